//! What one statement has computed, so that it is computed once for every element that needs it.
//!
//! Invariant: a value is kept only while the variables or registers it names are unchanged: within one statement.

use std::collections::{BTreeSet, HashMap};

use einfall_ir::kernel::{Expr, FragId};

/// The element an elementwise expression is computed for.
#[derive(Clone)]
pub(in crate::backend) struct Element {
    /// The fragment whose element it is.
    pub(in crate::backend) of: FragId,
    /// Its number in the thread.
    pub(in crate::backend) v: usize,
    /// Constant part of its coordinates.
    pub(in crate::backend) at: Vec<i64>,
}

/// Values of type `V` by keys `K`, and the dimensions that expressions depend on.
pub(in crate::backend) struct Memo<K, V> {
    pub(in crate::backend) values: HashMap<K, V>,
    dims: HashMap<usize, Vec<usize>>,
    /// Whether the result is rounded to 16 bits or fewer at once: fast functions are then exact enough.
    pub(in crate::backend) coarse: bool,
}

impl<K, V> Default for Memo<K, V> {
    fn default() -> Memo<K, V> {
        Memo::new(false)
    }
}

impl<K, V> Memo<K, V> {
    pub(in crate::backend) fn new(coarse: bool) -> Memo<K, V> {
        Memo { values: HashMap::new(), dims: HashMap::new(), coarse }
    }

    /// Dimensions of the result that `e` depends on.
    pub(in crate::backend) fn dims(&mut self, e: &Expr) -> Vec<usize> {
        let key = std::ptr::from_ref(e) as usize;
        if let Some(d) = self.dims.get(&key) {
            return d.clone();
        }
        let mut all = BTreeSet::new();
        match e {
            Expr::Frag { dims, .. } => all.extend(dims.iter().copied()),
            Expr::Coord(d) => all.extend([*d]),
            _ => e.for_each_operand(|o| all.extend(self.dims(o))),
        }
        let d: Vec<usize> = all.into_iter().collect();
        self.dims.insert(key, d.clone());
        d
    }
}
