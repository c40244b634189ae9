//! A reduction of a fragment, as printers take it.
//!
//! Invariant: elements are joined in order within a chain, and chains pairwise, so that additions overlap and errors stay
//! small.

use einfall_ir::kernel::{Bound, Expr, FragId};
use einfall_ir::ops::ReduceOp;

/// Chains of a reduction within a thread.
pub(in crate::backend) const CHAINS: usize = 4;

/// `out = op(src)` over some dimensions (see [`einfall_ir::kernel::Stmt::Reduce`]).
#[derive(Clone, Copy)]
pub(in crate::backend) struct Reduction<'a> {
    pub(in crate::backend) out: &'a [FragId],
    pub(in crate::backend) op: ReduceOp,
    pub(in crate::backend) src: FragId,
    pub(in crate::backend) over: &'a [usize],
    pub(in crate::backend) base: Option<&'a Expr>,
    pub(in crate::backend) bounds: &'a [Bound],
    pub(in crate::backend) carry: bool,
}

impl Reduction<'_> {
    /// Whether joining a value twice is joining it once.
    pub(in crate::backend) fn idempotent(&self) -> bool {
        matches!(self.op, ReduceOp::Min | ReduceOp::Max | ReduceOp::Any | ReduceOp::All)
    }

    /// Dimensions of the source, of `rank`, that the result has.
    pub(in crate::backend) fn kept(&self, rank: usize) -> Vec<usize> {
        (0..rank).filter(|d| !self.over.contains(d)).collect()
    }
}

/// One value of several chains, joined pairwise.
pub(in crate::backend) fn joined<V, E>(
    mut chains: Vec<V>,
    mut join: impl FnMut(&V, &V) -> Result<V, E>,
) -> Result<Option<V>, E> {
    while chains.len() > 1 {
        let half = chains.len().div_ceil(2);
        for i in half..chains.len() {
            chains[i - half] = join(&chains[i - half], &chains[i])?;
        }
        chains.truncate(half);
    }
    Ok(chains.pop())
}
