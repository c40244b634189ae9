//! Boolean propagators over 0/1 variables, and the distance from a reference assignment.
//!
//! Invariant: unit propagation; nothing is narrowed before all but one literal are decided.

use super::super::domain::{Narrow, Store, Var};
use super::{Lit, require};

pub(super) fn clause(store: &mut Store, lits: &[Lit]) -> Narrow {
    let mut open = None;
    for lit in lits {
        match lit.truth(store) {
            Some(true) => return Ok(()),
            Some(false) => {}
            None if open.is_none() || open == Some(*lit) => open = Some(*lit),
            None => return Ok(()),
        }
    }
    match open {
        Some(lit) => lit.set(store, true),
        None => require(false),
    }
}

pub(super) fn conjunction(store: &mut Store, lit: Lit, all: &[Lit]) -> Narrow {
    match lit.truth(store) {
        Some(true) => all.iter().try_for_each(|l| l.set(store, true)),
        Some(false) => {
            let mut open = None;
            for l in all {
                match l.truth(store) {
                    Some(false) => return Ok(()),
                    Some(true) => {}
                    None if open.is_none() || open == Some(*l) => open = Some(*l),
                    None => return Ok(()),
                }
            }
            match open {
                Some(l) => l.set(store, false),
                None => require(false),
            }
        }
        None => {
            if all.iter().any(|l| l.truth(store) == Some(false)) {
                return lit.set(store, false);
            }
            if all.iter().all(|l| l.truth(store) == Some(true)) {
                return lit.set(store, true);
            }
            Ok(())
        }
    }
}

pub(super) fn distance(store: &mut Store, pairs: &[(Var, i64)], at_least: u32) -> Narrow {
    let mut differ = 0;
    let mut open = 0;
    for (x, v) in pairs {
        if !store.contains(*x, *v) {
            differ += 1;
        } else if !store.is_fixed(*x) {
            open += 1;
        }
    }
    if differ >= at_least {
        return Ok(());
    }
    require(differ + open >= at_least)?;
    if differ + open == at_least {
        for (x, v) in pairs {
            if !store.is_fixed(*x) {
                store.remove(*x, *v)?;
            }
        }
    }
    Ok(())
}
