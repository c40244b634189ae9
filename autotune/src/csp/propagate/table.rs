//! Membership of a tuple of variables in a list of rows.
//!
//! Invariant: the posted form is domain consistent: every value left occurs in a row whose other values are left.
//! Source: simple tabular reduction, Ullmann, "Partition search for non-binary constraint satisfaction", 2007.

use super::super::domain::{Narrow, Store, Var};
use super::require;

/// `(x₁, .., xₙ)` is one of the rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The variables.
    pub xs: Vec<Var>,
    /// The rows, each as long as `xs`.
    pub rows: Vec<Vec<i64>>,
}

impl Table {
    fn live<'a>(&'a self, store: &'a Store) -> impl Iterator<Item = &'a Vec<i64>> {
        self.rows.iter().filter(|row| self.xs.iter().zip(row.iter()).all(|(x, v)| store.contains(*x, *v)))
    }

    pub(super) fn truth(&self, store: &Store) -> Option<bool> {
        let mut live: Vec<&Vec<i64>> = self.live(store).collect();
        if live.is_empty() {
            return Some(false);
        }
        // All tuples of the domains are rows exactly when there are as many live rows as tuples.
        live.sort_unstable();
        live.dedup();
        let tuples = self.xs.iter().fold(1u64, |acc, x| acc.saturating_mul(store.size(*x)));
        let distinct = (1..self.xs.len()).all(|i| !self.xs[..i].contains(&self.xs[i]));
        if distinct && live.len() as u64 == tuples || self.xs.iter().all(|x| store.is_fixed(*x)) {
            return Some(true);
        }
        None
    }

    pub(super) fn enforce(&self, store: &mut Store, positive: bool) -> Narrow {
        if !positive {
            return self.refuse(store);
        }
        let mut support: Vec<Vec<i64>> = vec![Vec::new(); self.xs.len()];
        for row in self.live(store) {
            for (column, v) in support.iter_mut().zip(row) {
                column.push(*v);
            }
        }
        for (x, mut column) in self.xs.iter().zip(support) {
            column.sort_unstable();
            column.dedup();
            store.intersect(*x, &column)?;
        }
        Ok(())
    }

    fn refuse(&self, store: &mut Store) -> Narrow {
        match self.truth(store) {
            Some(truth) => require(!truth),
            None => {
                let mut open = self.xs.iter().enumerate().filter(|(_, x)| !store.is_fixed(**x));
                let (Some((at, x)), None) = (open.next(), open.next()) else { return Ok(()) };
                let gone: Vec<i64> = self.live(store).map(|row| row[at]).collect();
                gone.into_iter().try_for_each(|v| store.remove(*x, v))
            }
        }
    }
}
