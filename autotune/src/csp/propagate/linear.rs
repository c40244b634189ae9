//! Comparisons of a linear form with zero: `Σ cᵢ·xᵢ + k` `==`, `<=` or `!=` 0.
//!
//! Invariant: bounds are narrowed to what the other terms' bounds leave; equalities also narrow by residues, and an
//! equality with two open terms is made consistent value by value where their domains are small.
//! Source: bounds propagation of linear constraints, Marriott and Stuckey, "Programming with Constraints", 1998, ch. 3.

use super::super::domain::{Conflict, Narrow, Store, Var};
use super::super::number::{self, div_ceil, div_floor};
use super::require;

/// How a linear form compares with zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compare {
    /// Equal to zero.
    Eq,
    /// At most zero.
    Le,
    /// Not zero.
    Ne,
}

/// `Σ coef·x + constant` compared with zero.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Linear {
    /// Coefficients, none of them 0, and their variables, none twice.
    pub terms: Vec<(i64, Var)>,
    /// The constant.
    pub constant: i128,
    /// The comparison.
    pub compare: Compare,
}

/// Domains up to this size are made consistent value by value in two-term equalities.
const PAIRWISE: u64 = 512;

fn term_range(store: &Store, coef: i64, x: Var) -> (i128, i128) {
    let (c, lo, hi) = (i128::from(coef), i128::from(store.lo(x)), i128::from(store.hi(x)));
    if c >= 0 { (c.saturating_mul(lo), c.saturating_mul(hi)) } else { (c.saturating_mul(hi), c.saturating_mul(lo)) }
}

impl Linear {
    /// The range of the form over the domains.
    pub(crate) fn range(&self, store: &Store) -> (i128, i128) {
        let mut range = (self.constant, self.constant);
        for (c, x) in &self.terms {
            let (lo, hi) = term_range(store, *c, *x);
            range = (range.0.saturating_add(lo), range.1.saturating_add(hi));
        }
        range
    }

    pub(super) fn holds(&self, value: &dyn Fn(Var) -> i64) -> bool {
        let sum = self.terms.iter().fold(self.constant, |acc, (c, x)| acc + i128::from(*c) * i128::from(value(*x)));
        match self.compare {
            Compare::Eq => sum == 0,
            Compare::Le => sum <= 0,
            Compare::Ne => sum != 0,
        }
    }

    pub(super) fn simplify(&self, store: &Store) -> Linear {
        let mut out = Linear { terms: Vec::new(), constant: self.constant, compare: self.compare };
        for (c, x) in &self.terms {
            match store.value(*x) {
                Some(v) => out.constant += i128::from(*c) * i128::from(v),
                None => out.terms.push((*c, *x)),
            }
        }
        out
    }

    pub(super) fn truth(&self, store: &Store) -> Option<bool> {
        let (lo, hi) = self.range(store);
        let equal = if lo == 0 && hi == 0 {
            Some(true)
        } else if lo > 0 || hi < 0 || self.lone_value_is_missing(store) {
            Some(false)
        } else {
            None
        };
        match self.compare {
            Compare::Eq => equal,
            Compare::Ne => equal.map(|e| !e),
            Compare::Le if hi <= 0 => Some(true),
            Compare::Le if lo > 0 => Some(false),
            Compare::Le => None,
        }
    }

    /// With one open term, whether the value that makes the form zero is not in its domain.
    fn lone_value_is_missing(&self, store: &Store) -> bool {
        let mut open = None;
        let mut rest = self.constant;
        for (c, x) in &self.terms {
            match store.value(*x) {
                Some(v) => rest += i128::from(*c) * i128::from(v),
                None if open.is_none() => open = Some((i128::from(*c), *x)),
                None => return false,
            }
        }
        match open {
            Some((c, x)) => rest % c != 0 || i64::try_from(-rest / c).map_or(true, |v| !store.contains(x, v)),
            None => rest != 0,
        }
    }

    pub(super) fn enforce(&self, store: &mut Store, positive: bool) -> Narrow {
        match (self.compare, positive) {
            (Compare::Eq, true) | (Compare::Ne, false) => self.equal(store),
            (Compare::Ne, true) | (Compare::Eq, false) => self.differ(store),
            (Compare::Le, true) => at_most(store, &self.terms, self.constant, 1),
            (Compare::Le, false) => at_most(store, &self.terms, 1 - self.constant, -1),
        }
    }

    fn differ(&self, store: &mut Store) -> Narrow {
        let mut open = None;
        let mut rest = self.constant;
        for (c, x) in &self.terms {
            match store.value(*x) {
                Some(v) => rest += i128::from(*c) * i128::from(v),
                None if open.is_none() => open = Some((i128::from(*c), *x)),
                None => return Ok(()),
            }
        }
        match open {
            None => require(rest != 0),
            Some((c, x)) if rest % c == 0 => match i64::try_from(-rest / c) {
                Ok(v) => store.remove(x, v),
                Err(_) => Ok(()),
            },
            Some(_) => Ok(()),
        }
    }

    fn equal(&self, store: &mut Store) -> Narrow {
        let mut open: [Option<(i64, Var)>; 2] = [None; 2];
        let mut n_open = 0;
        let mut rest = self.constant;
        for (c, x) in &self.terms {
            match store.value(*x) {
                Some(v) => rest += i128::from(*c) * i128::from(v),
                None => {
                    if n_open < 2 {
                        open[n_open] = Some((*c, *x));
                    }
                    n_open += 1;
                }
            }
        }
        match (n_open, open) {
            (0, _) => require(rest == 0),
            (1, [Some((c, x)), _]) => {
                let c = i128::from(c);
                require(rest % c == 0)?;
                store.assign(x, -rest / c)
            }
            (2, [Some(p), Some(q)]) => {
                at_most(store, &[p, q], rest, 1)?;
                at_most(store, &[p, q], -rest, -1)?;
                residues(store, &[p, q], rest)?;
                pairwise(store, p, q, rest)?;
                pairwise(store, q, p, rest)
            }
            _ => {
                at_most(store, &self.terms, self.constant, 1)?;
                at_most(store, &self.terms, -self.constant, -1)?;
                residues(store, &self.terms, self.constant)
            }
        }
    }
}

/// Narrows `sign·Σ c·x + constant <= 0` by bounds.
fn at_most(store: &mut Store, terms: &[(i64, Var)], constant: i128, sign: i64) -> Narrow {
    let mut least = constant;
    for (c, x) in terms {
        least = least.saturating_add(term_range(store, sign * c, *x).0);
    }
    require(least <= 0)?;
    for (c, x) in terms {
        if store.is_fixed(*x) {
            continue;
        }
        let c = sign * c;
        let (lo, hi) = term_range(store, c, *x);
        // c·x may exceed its least value by at most the slack.
        if hi - lo <= -least {
            continue;
        }
        let most = lo - least;
        let c = i128::from(c);
        if c > 0 {
            store.set_max(*x, div_floor(most, c))?;
        } else {
            store.set_min(*x, div_ceil(most, c))?;
        }
    }
    Ok(())
}

/// Narrows `Σ c·x + constant == 0` by residues: each term is fixed modulo the common divisor of the others' steps.
fn residues(store: &mut Store, terms: &[(i64, Var)], constant: i128) -> Narrow {
    let step_of = |store: &Store, c: i64, x: Var| -> Option<i64> {
        if store.is_fixed(x) {
            return Some(0);
        }
        c.checked_mul(store.step(x)).filter(|v| *v != i64::MIN)
    };
    let mut units = 0;
    for (c, x) in terms {
        match step_of(store, *c, *x) {
            Some(s) => units += u32::from(s.abs() == 1),
            None => return Ok(()),
        }
    }
    if units >= 2 {
        return Ok(());
    }
    for i in 0..terms.len() {
        let (c, x) = terms[i];
        if store.is_fixed(x) {
            continue;
        }
        let mut modulus = 0;
        let mut base = constant;
        for (j, (d, y)) in terms.iter().enumerate() {
            if j != i {
                modulus = number::gcd(modulus, step_of(store, *d, *y).unwrap_or(1));
                base += i128::from(*d) * i128::from(store.lo(*y));
            }
        }
        if modulus <= 1 {
            continue;
        }
        let common = number::gcd(c, modulus);
        require(base % i128::from(common) == 0)?;
        if common == c.abs() {
            // c·x ≡ -base (mod modulus) divides through by c.
            let m = modulus / common;
            let r = (-base / i128::from(c)).rem_euclid(i128::from(m));
            store.set_stride(x, m, r as i64)?;
        }
    }
    Ok(())
}

/// Keeps the values of `p`'s variable whose partner `-(rest + c·x)/d` is in the other domain.
fn pairwise(store: &mut Store, p: (i64, Var), q: (i64, Var), rest: i128) -> Narrow {
    let ((c, x), (d, y)) = (p, q);
    if store.size(x) > PAIRWISE || (store.set(x).is_none() && store.set(y).is_none() && c.abs() == 1 && d.abs() == 1) {
        return Ok(());
    }
    let (lo, hi) = (store.lo(y), store.hi(y));
    // The partner's domain is read while x is narrowed: take the few missing values first.
    let mut lost = Vec::new();
    for v in store.iter(x) {
        let need = -(rest + i128::from(c) * i128::from(v));
        let partner = if need % i128::from(d) == 0 { i64::try_from(need / i128::from(d)).ok() } else { None };
        if partner.is_none_or(|w| w < lo || w > hi || !store.contains(y, w)) {
            lost.push(v);
        }
    }
    if lost.is_empty() {
        return Ok(());
    }
    if lost.len() as u64 == store.size(x) {
        return Err(Conflict);
    }
    let mut at = 0;
    store.retain(x, |v| {
        let gone = at < lost.len() && lost[at] == v;
        at += usize::from(gone);
        !gone
    })
}
