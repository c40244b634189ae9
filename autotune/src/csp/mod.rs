//! A solver for constraints over finite integer domains, with a text form.
//!
//! Domains are progressions or value sets over a trail ([`domain`]); a model's terms and conditions are flattened into
//! propagators ([`compile`], [`propagate`]) that run to a fixpoint ([`engine`]); presolve splits the problem into
//! independent components ([`component`]); a depth-first search answers the queries ([`search`], [`solve`]); [`uniform`]
//! draws.
//!
//! Invariant: every assignment handed out has passed [`Model::check`], the direct evaluation of the model; propagators
//! never lose a solution, which [`check`] tests against enumeration.
//!
//! ```
//! use einfall_autotune::csp::{Domain, Expr, Model, Solver};
//! let mut model = Model::new();
//! let x = model.var("x", Domain::DEFAULT);
//! model.constrain("bound", (Expr::from(5) * x).at_most(15));
//! model.constrain("next", (Expr::from(x) + 1).at_most(3));
//! let values: Vec<i64> = Solver::new(&model).all(&[], 100).unwrap().iter().map(|a| a[x.idx()]).collect();
//! assert_eq!(values, [1, 2]);
//! ```

pub mod check;
pub mod compile;
pub mod component;
pub mod domain;
pub mod engine;
mod explain;
mod model;
mod number;
pub mod propagate;
mod report;
pub mod search;
mod solve;
pub mod text;
mod uniform;

pub use explain::{Conflict, Explanation};
pub use model::{Assignment, Broken, Cmp, Constraint, Domain, Expr, Model, Pred, VarId, Variable};
pub use number::{LIMIT, divisors, gcd, lcm};
pub use report::{Conflicting, Report, SCHEMA, Solution, Status, Value};
pub use search::Direction;
pub use solve::{Costed, Diversity, Error, Left, Options, Solver};
pub use uniform::Uniform;
