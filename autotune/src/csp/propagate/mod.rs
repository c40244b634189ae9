//! Propagators: each narrows the domains of its variables without losing a solution.
//!
//! Invariant: [`Propagator::propagate`] is sound (no satisfying tuple of the domains before is lost) and decides fixed
//! tuples (with every variable fixed it conflicts exactly when [`Propagator::holds`] is false). `holds` states the
//! meaning by direct evaluation and shares no code with the narrowing; [`super::check`] compares the two.

mod arithmetic;
mod divide;
mod linear;
mod logic;
mod product;
mod table;

use super::domain::{Conflict, Narrow, Store, Var};
use super::number::{self, LIMIT};
pub use linear::{Compare, Linear};
use std::collections::HashMap;
use std::sync::Arc;
pub use table::Table;

/// A 0/1 variable or its negation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lit {
    /// The variable, with the domain `{0, 1}`.
    pub var: Var,
    /// True where the literal holds for 1.
    pub positive: bool,
}

impl Lit {
    /// The literal that holds when this one does not.
    pub fn negate(self) -> Lit {
        Lit { positive: !self.positive, ..self }
    }

    fn truth(self, store: &Store) -> Option<bool> {
        store.value(self.var).map(|v| (v == 1) == self.positive)
    }

    fn set(self, store: &mut Store, truth: bool) -> Narrow {
        store.assign(self.var, i128::from(truth == self.positive))
    }

    fn holds(self, value: &dyn Fn(Var) -> i64) -> bool {
        (value(self.var) == 1) == self.positive
    }
}

/// A relation that can be posted, refused, or tied to a literal.
#[derive(Clone, Debug, PartialEq)]
pub enum Relation {
    /// A comparison of a linear form with zero.
    Linear(Linear),
    /// `divisor != 0` and `dividend % divisor == 0`.
    Divides {
        /// The dividend.
        dividend: Var,
        /// The divisor.
        divisor: Var,
    },
    /// Membership of a tuple in a list of rows.
    Table(Table),
}

/// One propagator of a compiled problem.
#[derive(Clone, Debug, PartialEq)]
pub enum Propagator {
    /// The relation holds (`positive`) or does not.
    Post {
        /// What is posted.
        relation: Relation,
        /// False to post the negation.
        positive: bool,
    },
    /// `lit` holds exactly when the relation does.
    Reify {
        /// The literal.
        lit: Lit,
        /// The relation it is tied to.
        relation: Relation,
    },
    /// `z = coef · Π xs`, saturated at ±[`LIMIT`].
    Product {
        /// The product.
        z: Var,
        /// The constant factor, not 0.
        coef: i64,
        /// The factors.
        xs: Vec<Var>,
    },
    /// `z = x ^ exponent`, saturated at ±[`LIMIT`].
    Power {
        /// The power.
        z: Var,
        /// The base.
        x: Var,
        /// The exponent.
        exponent: u32,
    },
    /// `z = a / b` rounded down, or up where `ceil`; `b != 0`.
    Quotient {
        /// The quotient.
        z: Var,
        /// The dividend.
        a: Var,
        /// The divisor.
        b: Var,
        /// Rounds up.
        ceil: bool,
    },
    /// `z = max xs`, or `min xs`.
    Extremum {
        /// The extremum.
        z: Var,
        /// The operands, at least one.
        xs: Vec<Var>,
        /// True for the maximum.
        max: bool,
    },
    /// `z = y` where `y != 0` and `z = 1` otherwise: a divisor made total.
    NonZero {
        /// The total divisor.
        z: Var,
        /// The divisor.
        y: Var,
    },
    /// At least one literal holds.
    Clause(Vec<Lit>),
    /// `lit` holds exactly when all of `all` hold.
    Conjunction {
        /// The literal.
        lit: Lit,
        /// The conjuncts.
        all: Vec<Lit>,
    },
    /// At least `at_least` of the pairs `(x, value)` differ.
    Distance {
        /// The variables and what they are compared with.
        pairs: Vec<(Var, i64)>,
        /// How many must differ.
        at_least: u32,
    },
}

/// Divisor lattices already enumerated.
#[derive(Clone, Debug, Default)]
pub struct Lattices {
    known: HashMap<i64, Arc<[i64]>>,
}

impl Lattices {
    /// The divisors of `n` in ascending order, where [`number::divisors`] gives them.
    pub(crate) fn divisors(&mut self, n: i64) -> Option<Arc<[i64]>> {
        if let Some(known) = self.known.get(&n) {
            return Some(known.clone());
        }
        let list: Arc<[i64]> = number::divisors(n)?.into();
        self.known.insert(n, list.clone());
        Some(list)
    }
}

impl Relation {
    fn enforce(&self, store: &mut Store, lattices: &mut Lattices, positive: bool) -> Narrow {
        match self {
            Relation::Linear(l) => l.enforce(store, positive),
            Relation::Divides { dividend, divisor } if positive => {
                divide::enforce_divides(store, lattices, *dividend, *divisor)
            }
            Relation::Divides { dividend, divisor } => divide::refuse_divides(store, *dividend, *divisor),
            Relation::Table(t) => t.enforce(store, positive),
        }
    }

    fn truth(&self, store: &Store) -> Option<bool> {
        match self {
            Relation::Linear(l) => l.truth(store),
            Relation::Divides { dividend, divisor } => divide::divides_truth(store, *dividend, *divisor),
            Relation::Table(t) => t.truth(store),
        }
    }

    fn holds(&self, value: &dyn Fn(Var) -> i64) -> bool {
        match self {
            Relation::Linear(l) => l.holds(value),
            Relation::Divides { dividend, divisor } => value(*divisor) != 0 && value(*dividend) % value(*divisor) == 0,
            Relation::Table(t) => t.rows.iter().any(|row| t.xs.iter().zip(row).all(|(x, v)| value(*x) == *v)),
        }
    }

    fn for_each_var(&self, mut f: impl FnMut(Var)) {
        match self {
            Relation::Linear(l) => l.terms.iter().for_each(|(_, x)| f(*x)),
            Relation::Divides { dividend, divisor } => {
                f(*dividend);
                f(*divisor);
            }
            Relation::Table(t) => t.xs.iter().for_each(|x| f(*x)),
        }
    }

    fn rename(&mut self, mut to: impl FnMut(Var) -> Var) {
        match self {
            Relation::Linear(l) => l.terms.iter_mut().for_each(|(_, x)| *x = to(*x)),
            Relation::Divides { dividend, divisor } => {
                *dividend = to(*dividend);
                *divisor = to(*divisor);
            }
            Relation::Table(t) => t.xs.iter_mut().for_each(|x| *x = to(*x)),
        }
    }
}

impl Propagator {
    /// Narrows the domains; run again until nothing changes.
    ///
    /// # Errors
    /// [`Conflict`] where no tuple of the domains satisfies the propagator.
    pub fn propagate(&self, store: &mut Store, lattices: &mut Lattices) -> Narrow {
        match self {
            Propagator::Post { relation, positive } => relation.enforce(store, lattices, *positive),
            Propagator::Reify { lit, relation } => match lit.truth(store) {
                Some(truth) => relation.enforce(store, lattices, truth),
                None => match relation.truth(store) {
                    Some(truth) => lit.set(store, truth),
                    None => Ok(()),
                },
            },
            Propagator::Product { z, coef, xs } => product::propagate(store, lattices, *z, *coef, xs),
            Propagator::Power { z, x, exponent } => arithmetic::power(store, *z, *x, *exponent),
            Propagator::Quotient { z, a, b, ceil } => divide::quotient(store, *z, *a, *b, *ceil),
            Propagator::Extremum { z, xs, max: true } => arithmetic::maximum(store, *z, xs),
            Propagator::Extremum { z, xs, max: false } => arithmetic::minimum(store, *z, xs),
            Propagator::NonZero { z, y } => arithmetic::non_zero(store, *z, *y),
            Propagator::Clause(lits) => logic::clause(store, lits),
            Propagator::Conjunction { lit, all } => logic::conjunction(store, *lit, all),
            Propagator::Distance { pairs, at_least } => logic::distance(store, pairs, *at_least),
        }
    }

    /// Whether a full assignment satisfies the propagator, by direct evaluation.
    pub fn holds(&self, value: &dyn Fn(Var) -> i64) -> bool {
        let saturate = |wide: i128| wide.clamp(-i128::from(LIMIT), i128::from(LIMIT));
        match self {
            Propagator::Post { relation, positive } => relation.holds(value) == *positive,
            Propagator::Reify { lit, relation } => lit.holds(value) == relation.holds(value),
            Propagator::Product { z, coef, xs } => {
                // Magnitudes of at least one only grow: an overflow saturates unless some factor is zero.
                let zero = xs.iter().any(|x| value(*x) == 0);
                let exact = xs.iter().fold(i128::from(*coef), |acc, x| acc.saturating_mul(i128::from(value(*x))));
                (if zero { 0 } else { saturate(exact) }) == i128::from(value(*z))
            }
            Propagator::Power { z, x, exponent } => {
                saturate(i128::from(value(*x)).saturating_pow(*exponent)) == i128::from(value(*z))
            }
            Propagator::Quotient { z, a, b, ceil } => {
                let (z, a, b) = (i128::from(value(*z)), i128::from(value(*a)), i128::from(value(*b)));
                // z is the quotient when the remainder it leaves has the divisor's sign (down) or the other (up).
                let rest = a - z * b;
                b != 0
                    && if *ceil {
                        rest * b.signum() <= 0 && rest.abs() < b.abs()
                    } else {
                        rest * b.signum() >= 0 && rest.abs() < b.abs()
                    }
            }
            Propagator::Extremum { z, xs, max } => {
                let values = xs.iter().map(|x| value(*x));
                Some(value(*z)) == if *max { values.max() } else { values.min() }
            }
            Propagator::NonZero { z, y } => value(*z) == if value(*y) == 0 { 1 } else { value(*y) },
            Propagator::Clause(lits) => lits.iter().any(|l| l.holds(value)),
            Propagator::Conjunction { lit, all } => lit.holds(value) == all.iter().all(|l| l.holds(value)),
            Propagator::Distance { pairs, at_least } => {
                pairs.iter().filter(|(x, v)| value(*x) != *v).count() >= *at_least as usize
            }
        }
    }

    /// Calls `f` on each variable, with repetitions.
    pub fn for_each_var(&self, mut f: impl FnMut(Var)) {
        match self {
            Propagator::Post { relation, .. } => relation.for_each_var(f),
            Propagator::Reify { lit, relation } => {
                f(lit.var);
                relation.for_each_var(f);
            }
            Propagator::Product { z, xs, .. } | Propagator::Extremum { z, xs, .. } => {
                f(*z);
                xs.iter().for_each(|x| f(*x));
            }
            Propagator::Power { z, x, .. } => [*z, *x].into_iter().for_each(f),
            Propagator::Quotient { z, a, b, .. } => [*z, *a, *b].into_iter().for_each(f),
            Propagator::NonZero { z, y } => [*z, *y].into_iter().for_each(f),
            Propagator::Clause(lits) => lits.iter().for_each(|l| f(l.var)),
            Propagator::Conjunction { lit, all } => {
                f(lit.var);
                all.iter().for_each(|l| f(l.var));
            }
            Propagator::Distance { pairs, .. } => pairs.iter().for_each(|(x, _)| f(*x)),
        }
    }

    /// Replaces every variable.
    pub(crate) fn rename(&mut self, mut to: impl FnMut(Var) -> Var) {
        match self {
            Propagator::Post { relation, .. } => relation.rename(to),
            Propagator::Reify { lit, relation } => {
                lit.var = to(lit.var);
                relation.rename(to);
            }
            Propagator::Product { z, xs, .. } | Propagator::Extremum { z, xs, .. } => {
                *z = to(*z);
                xs.iter_mut().for_each(|x| *x = to(*x));
            }
            Propagator::Power { z, x, .. } => {
                *z = to(*z);
                *x = to(*x);
            }
            Propagator::Quotient { z, a, b, .. } => {
                *z = to(*z);
                *a = to(*a);
                *b = to(*b);
            }
            Propagator::NonZero { z, y } => {
                *z = to(*z);
                *y = to(*y);
            }
            Propagator::Clause(lits) => lits.iter_mut().for_each(|l| l.var = to(l.var)),
            Propagator::Conjunction { lit, all } => {
                lit.var = to(lit.var);
                all.iter_mut().for_each(|l| l.var = to(l.var));
            }
            Propagator::Distance { pairs, .. } => pairs.iter_mut().for_each(|(x, _)| *x = to(*x)),
        }
    }

    /// The same propagator with fixed variables folded into its constants, or `None` where it can never narrow again.
    /// The store is at a fixpoint of this propagator.
    pub(crate) fn simplify(&self, store: &Store) -> Option<Propagator> {
        let mut open = 0;
        self.for_each_var(|v| open += u32::from(!store.is_fixed(v)));
        if open == 0 {
            return None;
        }
        match self {
            Propagator::Post { relation, positive } => match relation.truth(store) {
                Some(truth) if truth == *positive => None,
                _ => Some(Propagator::Post { relation: relation.simplify(store), positive: *positive }),
            },
            Propagator::Reify { lit, relation } => {
                let relation = relation.simplify(store);
                match lit.truth(store) {
                    Some(truth) => Propagator::Post { relation, positive: truth }.simplify(store),
                    None => Some(Propagator::Reify { lit: *lit, relation }),
                }
            }
            Propagator::Product { z, coef, xs } => {
                let mut folded = i128::from(*coef);
                let mut rest = Vec::new();
                for x in xs {
                    match store.value(*x) {
                        Some(v) => folded = number::mul(folded, i128::from(v)),
                        None => rest.push(*x),
                    }
                }
                if folded == 0 || folded.abs() >= i128::from(LIMIT) {
                    return Some(self.clone());
                }
                Some(Propagator::Product { z: *z, coef: folded as i64, xs: rest })
            }
            Propagator::Clause(lits) => {
                if lits.iter().any(|l| l.truth(store) == Some(true)) {
                    return None;
                }
                Some(Propagator::Clause(lits.iter().copied().filter(|l| l.truth(store).is_none()).collect()))
            }
            Propagator::Power { .. }
            | Propagator::Quotient { .. }
            | Propagator::Extremum { .. }
            | Propagator::NonZero { .. }
            | Propagator::Conjunction { .. }
            | Propagator::Distance { .. } => Some(self.clone()),
        }
    }
}

impl Relation {
    fn simplify(&self, store: &Store) -> Relation {
        match self {
            Relation::Linear(l) => Relation::Linear(l.simplify(store)),
            Relation::Divides { .. } | Relation::Table(_) => self.clone(),
        }
    }
}

/// Conflicts unless `ok`.
fn require(ok: bool) -> Narrow {
    if ok { Ok(()) } else { Err(Conflict) }
}
