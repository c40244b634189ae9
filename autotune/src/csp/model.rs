//! Models: named integer variables with finite domains, and named constraints over them.
//!
//! Invariant: [`Model::check`] is the meaning. Everything else (compiling, propagating, searching) must agree with it,
//! and every assignment the solver returns has passed it.
//!
//! # Partial terms
//! Sums are exact. Every other operation needs operands and a result strictly between ±[`LIMIT`] (2^62 − 1), and
//! divisions a divisor other than 0. A comparison with an operand that has no value is false, and the connectives see
//! just that: the relational semantics of Frisch and Stuckey, "The proper treatment of undefinedness in constraint
//! languages", CP 2009.

use super::number::{LIMIT, div_ceil, div_floor};
use einfall_ir::diag::Span;
use std::collections::HashMap;
use std::fmt;
use std::ops;

/// A variable of a [`Model`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VarId(pub(crate) u32);

impl VarId {
    /// The position of the variable in its model, and of its value in an [`Assignment`].
    pub fn idx(self) -> usize {
        self.0 as usize
    }
}

/// A declared domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Domain {
    /// `lo, lo + step, .., hi`.
    Range {
        /// The smallest value.
        lo: i64,
        /// The largest value, rounded down to the progression.
        hi: i64,
        /// The distance of the values, at least 1.
        step: i64,
    },
    /// These values.
    Values(Vec<i64>),
    /// The positive divisors of a number from 1 to 2^40.
    Divisors(i64),
}

impl Domain {
    /// What a variable without a declaration gets: `1..=2^30`.
    pub const DEFAULT: Domain = Domain::Range { lo: 1, hi: 1 << 30, step: 1 };

    /// The range `lo..=hi`.
    pub fn range(lo: i64, hi: i64) -> Domain {
        Domain::Range { lo, hi, step: 1 }
    }
}

/// How two terms compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cmp {
    /// `==`
    Eq,
    /// `!=`
    Ne,
    /// `<=`
    Le,
    /// `<`
    Lt,
}

/// An integer term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    /// A number.
    Const(i64),
    /// A variable.
    Var(VarId),
    /// The sum of the terms.
    Sum(Vec<Expr>),
    /// The term with the other sign.
    Neg(Box<Expr>),
    /// The product of the terms.
    Product(Vec<Expr>),
    /// The quotient, rounded down.
    Quotient(Box<Expr>, Box<Expr>),
    /// The quotient, rounded up.
    CeilDiv(Box<Expr>, Box<Expr>),
    /// The term to a constant power; `0 ^ 0` is 1.
    Power(Box<Expr>, u32),
    /// The least of the terms, at least one.
    Min(Vec<Expr>),
    /// The greatest of the terms, at least one.
    Max(Vec<Expr>),
}

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pred {
    /// Always or never.
    Bool(bool),
    /// A comparison.
    Compare(Cmp, Expr, Expr),
    /// `dividend % divisor == 0`, false for a divisor of 0.
    Divides {
        /// The dividend.
        dividend: Expr,
        /// The divisor.
        divisor: Expr,
    },
    /// The tuple of the terms is one of the rows.
    Table(Vec<Expr>, Vec<Vec<i64>>),
    /// Not.
    Not(Box<Pred>),
    /// All of them.
    And(Vec<Pred>),
    /// At least one of them.
    Or(Vec<Pred>),
    /// The second wherever the first.
    Implies(Box<Pred>, Box<Pred>),
    /// Both or neither.
    Iff(Box<Pred>, Box<Pred>),
}

/// A named condition that must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constraint {
    /// The name, unique in its model.
    pub name: String,
    /// What must hold.
    pub pred: Pred,
    /// Where it stands in the text it came from; empty for models built by calls.
    pub span: Span,
}

/// A variable and its declared domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// The name, unique in its model.
    pub name: String,
    /// The declared domain.
    pub domain: Domain,
}

/// Variables and constraints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    vars: Vec<Variable>,
    constraints: Vec<Constraint>,
    by_name: HashMap<String, VarId>,
}

/// One value per variable of a model, by [`VarId::idx`].
pub type Assignment = Vec<i64>;

impl Model {
    /// An empty model.
    pub fn new() -> Model {
        Model::default()
    }

    /// Adds a variable. Declaring a name again replaces its domain and returns the same variable.
    pub fn var(&mut self, name: impl Into<String>, domain: Domain) -> VarId {
        let name = name.into();
        if let Some(id) = self.by_name.get(&name) {
            self.vars[id.idx()].domain = domain;
            return *id;
        }
        let id = VarId(self.vars.len() as u32);
        self.by_name.insert(name.clone(), id);
        self.vars.push(Variable { name, domain });
        id
    }

    /// Adds a constraint. A name already taken gets a number appended.
    pub fn constrain(&mut self, name: impl Into<String>, pred: Pred) {
        self.constrain_at(name, pred, Span::default());
    }

    /// Adds a constraint that stands at `span` of a text.
    pub fn constrain_at(&mut self, name: impl Into<String>, pred: Pred, span: Span) {
        let wanted = name.into();
        let taken = |n: &str| self.constraints.iter().any(|c| c.name == n);
        let mut name = wanted.clone();
        let mut n = 2;
        while taken(&name) {
            name = format!("{wanted}_{n}");
            n += 1;
        }
        self.constraints.push(Constraint { name, pred, span });
    }

    /// The variables in order of declaration.
    pub fn vars(&self) -> &[Variable] {
        &self.vars
    }

    /// The constraints in order.
    pub fn constraints(&self) -> &[Constraint] {
        &self.constraints
    }

    /// The variable of that name.
    pub fn find(&self, name: &str) -> Option<VarId> {
        self.by_name.get(name).copied()
    }

    /// The identifiers of all variables.
    pub fn var_ids(&self) -> impl Iterator<Item = VarId> + use<> {
        (0..self.vars.len() as u32).map(VarId)
    }

    /// The name of a variable.
    pub fn name(&self, var: VarId) -> &str {
        &self.vars[var.idx()].name
    }

    /// The same variables with only the constraints of these indices.
    pub fn restrict(&self, keep: &[usize]) -> Model {
        let constraints = keep.iter().map(|i| self.constraints[*i].clone()).collect();
        Model { vars: self.vars.clone(), constraints, by_name: self.by_name.clone() }
    }

    /// Evaluates every domain and constraint directly.
    ///
    /// # Errors
    /// The first one that the assignment violates.
    pub fn check(&self, values: &[i64]) -> Result<(), Broken> {
        for (var, v) in self.vars.iter().zip(values) {
            let inside = match &var.domain {
                Domain::Range { lo, hi, step } => v >= lo && v <= hi && (v - lo) % step == 0,
                Domain::Values(list) => list.contains(v),
                Domain::Divisors(n) => *v > 0 && n % v == 0,
            };
            if !inside {
                return Err(Broken { name: var.name.clone() });
            }
        }
        match self.constraints.iter().find(|c| !c.pred.eval(values)) {
            Some(c) => Err(Broken { name: c.name.clone() }),
            None => Ok(()),
        }
    }
}

/// The variable whose domain, or the constraint, that an assignment violates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Its name.
    pub name: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the assignment violates `{}`", self.name)
    }
}

impl std::error::Error for Broken {}

fn bounded(v: i128) -> Option<i128> {
    (v.abs() < i128::from(LIMIT)).then_some(v)
}

impl Expr {
    /// The value, or `None` where it has none.
    pub fn eval(&self, values: &[i64]) -> Option<i128> {
        let operand = |e: &Expr| e.eval(values).and_then(bounded);
        match self {
            Expr::Const(c) => Some(i128::from(*c)),
            Expr::Var(v) => Some(i128::from(values[v.idx()])),
            Expr::Sum(es) => es.iter().try_fold(0i128, |acc, e| acc.checked_add(e.eval(values)?)),
            Expr::Neg(e) => operand(e).map(|v| -v),
            Expr::Product(es) => {
                // A factor of zero makes the product zero however large the others are.
                let mut out = 1i128;
                let mut zero = false;
                for e in es {
                    let v = operand(e)?;
                    zero |= v == 0;
                    out = super::number::mul(out, v);
                }
                if zero { Some(0) } else { bounded(out) }
            }
            Expr::Quotient(a, b) => {
                let (a, b) = (operand(a)?, operand(b)?);
                if b == 0 { None } else { Some(div_floor(a, b)) }
            }
            Expr::CeilDiv(a, b) => {
                let (a, b) = (operand(a)?, operand(b)?);
                if b == 0 { None } else { Some(div_ceil(a, b)) }
            }
            Expr::Power(e, n) => bounded(super::number::pow(operand(e)?, *n)),
            Expr::Min(es) => es.iter().map(operand).collect::<Option<Vec<_>>>()?.into_iter().min(),
            Expr::Max(es) => es.iter().map(operand).collect::<Option<Vec<_>>>()?.into_iter().max(),
        }
    }

    /// The quotient, rounded up.
    pub fn ceil_div(self, divisor: impl Into<Expr>) -> Expr {
        Expr::CeilDiv(Box::new(self), Box::new(divisor.into()))
    }

    /// The term to a constant power.
    pub fn pow(self, exponent: u32) -> Expr {
        Expr::Power(Box::new(self), exponent)
    }

    /// `self == other`
    pub fn equals(self, other: impl Into<Expr>) -> Pred {
        Pred::Compare(Cmp::Eq, self, other.into())
    }

    /// `self != other`
    pub fn differs(self, other: impl Into<Expr>) -> Pred {
        Pred::Compare(Cmp::Ne, self, other.into())
    }

    /// `self <= other`
    pub fn at_most(self, other: impl Into<Expr>) -> Pred {
        Pred::Compare(Cmp::Le, self, other.into())
    }

    /// `self < other`
    pub fn below(self, other: impl Into<Expr>) -> Pred {
        Pred::Compare(Cmp::Lt, self, other.into())
    }

    /// `self % divisor == 0`
    pub fn multiple_of(self, divisor: impl Into<Expr>) -> Pred {
        Pred::Divides { dividend: self, divisor: divisor.into() }
    }

    /// The value is one of these.
    pub fn one_of(self, values: &[i64]) -> Pred {
        Pred::Table(vec![self], values.iter().map(|v| vec![*v]).collect())
    }

    /// Calls `f` on each variable, with repetitions.
    pub fn for_each_var(&self, f: &mut dyn FnMut(VarId)) {
        match self {
            Expr::Const(_) => {}
            Expr::Var(v) => f(*v),
            Expr::Neg(e) | Expr::Power(e, _) => e.for_each_var(f),
            Expr::Sum(es) | Expr::Product(es) | Expr::Min(es) | Expr::Max(es) => {
                es.iter().for_each(|e| e.for_each_var(f))
            }
            Expr::Quotient(a, b) | Expr::CeilDiv(a, b) => {
                a.for_each_var(f);
                b.for_each_var(f);
            }
        }
    }
}

impl Pred {
    /// Whether the condition holds.
    pub fn eval(&self, values: &[i64]) -> bool {
        match self {
            Pred::Bool(b) => *b,
            Pred::Compare(cmp, a, b) => match (a.eval(values), b.eval(values)) {
                (Some(a), Some(b)) => match cmp {
                    Cmp::Eq => a == b,
                    Cmp::Ne => a != b,
                    Cmp::Le => a <= b,
                    Cmp::Lt => a < b,
                },
                _ => false,
            },
            Pred::Divides { dividend, divisor } => {
                let operand = |e: &Expr| e.eval(values).and_then(bounded);
                match (operand(dividend), operand(divisor)) {
                    (Some(a), Some(b)) => b != 0 && a % b == 0,
                    _ => false,
                }
            }
            Pred::Table(es, rows) => {
                let tuple: Option<Vec<i128>> = es.iter().map(|e| e.eval(values).and_then(bounded)).collect();
                tuple.is_some_and(|t| rows.iter().any(|r| t.iter().zip(r).all(|(a, b)| *a == i128::from(*b))))
            }
            Pred::Not(p) => !p.eval(values),
            Pred::And(ps) => ps.iter().all(|p| p.eval(values)),
            Pred::Or(ps) => ps.iter().any(|p| p.eval(values)),
            Pred::Implies(p, q) => !p.eval(values) || q.eval(values),
            Pred::Iff(p, q) => p.eval(values) == q.eval(values),
        }
    }

    /// The negation.
    pub fn negate(self) -> Pred {
        Pred::Not(Box::new(self))
    }

    /// `other` wherever this holds.
    pub fn implies(self, other: Pred) -> Pred {
        Pred::Implies(Box::new(self), Box::new(other))
    }

    /// Calls `f` on each variable, with repetitions.
    pub fn for_each_var(&self, f: &mut dyn FnMut(VarId)) {
        match self {
            Pred::Bool(_) => {}
            Pred::Compare(_, a, b) | Pred::Divides { dividend: a, divisor: b } => {
                a.for_each_var(f);
                b.for_each_var(f);
            }
            Pred::Table(es, _) => es.iter().for_each(|e| e.for_each_var(f)),
            Pred::Not(p) => p.for_each_var(f),
            Pred::And(ps) | Pred::Or(ps) => ps.iter().for_each(|p| p.for_each_var(f)),
            Pred::Implies(p, q) | Pred::Iff(p, q) => {
                p.for_each_var(f);
                q.for_each_var(f);
            }
        }
    }
}

impl From<i64> for Expr {
    fn from(v: i64) -> Expr {
        Expr::Const(v)
    }
}

impl From<VarId> for Expr {
    fn from(v: VarId) -> Expr {
        Expr::Var(v)
    }
}

impl<T: Into<Expr>> ops::Add<T> for Expr {
    type Output = Expr;
    fn add(self, other: T) -> Expr {
        match self {
            Expr::Sum(mut es) => {
                es.push(other.into());
                Expr::Sum(es)
            }
            first => Expr::Sum(vec![first, other.into()]),
        }
    }
}

impl<T: Into<Expr>> ops::Sub<T> for Expr {
    type Output = Expr;
    fn sub(self, other: T) -> Expr {
        ops::Add::add(self, Expr::Neg(Box::new(other.into())))
    }
}

impl<T: Into<Expr>> ops::Mul<T> for Expr {
    type Output = Expr;
    fn mul(self, other: T) -> Expr {
        match self {
            Expr::Product(mut es) => {
                es.push(other.into());
                Expr::Product(es)
            }
            first => Expr::Product(vec![first, other.into()]),
        }
    }
}

impl<T: Into<Expr>> ops::Div<T> for Expr {
    type Output = Expr;
    fn div(self, other: T) -> Expr {
        Expr::Quotient(Box::new(self), Box::new(other.into()))
    }
}
