//! The independent checker of propagators: enumeration against [`Propagator::holds`].
//!
//! Invariant: knows nothing of how a propagator narrows; compares the domains before and after with the tuples that
//! satisfy it.

use super::domain::{Store, Var};
use super::propagate::Propagator;

/// Tuples enumerated per check; larger products of domains are skipped.
const TUPLES: u64 = 20_000;

/// A propagator run that lost a solution, accepted a falsified tuple, or added a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Violation {
    /// The propagator.
    pub propagator: Propagator,
    /// The variables.
    pub vars: Vec<Var>,
    /// The tuple, in the order of `vars`.
    pub tuple: Vec<i64>,
    /// What is wrong with it.
    pub what: &'static str,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} on {:?} with {:?}: {}", self.propagator, self.vars, self.tuple, self.what)
    }
}

impl std::error::Error for Violation {}

impl Violation {
    /// The domains of the variables in a store, each up to 50 values.
    pub fn domains(&self, store: &Store) -> Vec<Vec<i64>> {
        self.vars.iter().map(|v| store.iter(*v).take(50).collect()).collect()
    }
}

/// Compares one run with enumeration. `after` is `None` where the run conflicted.
///
/// # Errors
/// A [`Violation`] with the tuple that shows it.
pub fn sound(prop: &Propagator, before: &Store, after: Option<&Store>) -> Result<(), Box<Violation>> {
    let mut vars = Vec::new();
    prop.for_each_var(|v| {
        if !vars.contains(&v) {
            vars.push(v);
        }
    });
    let violation = |tuple: &[i64], what| {
        Box::new(Violation { propagator: prop.clone(), vars: vars.clone(), tuple: tuple.to_vec(), what })
    };
    if let Some(after) = after {
        for v in &vars {
            if after.size(*v) <= TUPLES
                && let Some(added) = after.iter(*v).find(|x| !before.contains(*v, *x))
            {
                return Err(violation(&[added], "a value was added"));
            }
        }
    }
    let tuples = vars.iter().fold(1u64, |acc, v| acc.saturating_mul(before.size(*v)));
    if tuples > TUPLES {
        return Ok(());
    }
    let domains: Vec<Vec<i64>> = vars.iter().map(|v| before.iter(*v).collect()).collect();
    let mut at = vec![0usize; vars.len()];
    let mut tuple = vec![0i64; vars.len()];
    loop {
        for (slot, (domain, i)) in tuple.iter_mut().zip(domains.iter().zip(&at)) {
            *slot = domain[*i];
        }
        let value = |v: Var| vars.iter().position(|w| *w == v).map_or(0, |i| tuple[i]);
        let holds = prop.holds(&value);
        let kept = after.is_some_and(|a| vars.iter().zip(&tuple).all(|(v, x)| a.contains(*v, *x)));
        if holds && !kept {
            return Err(violation(&tuple, "a solution was lost"));
        }
        if !holds && kept && after.is_some_and(|a| vars.iter().all(|v| a.is_fixed(*v))) {
            return Err(violation(&tuple, "a falsified tuple was accepted"));
        }
        let mut i = 0;
        loop {
            if i == at.len() {
                return Ok(());
            }
            at[i] += 1;
            if at[i] < domains[i].len() {
                break;
            }
            at[i] = 0;
            i += 1;
        }
    }
}
