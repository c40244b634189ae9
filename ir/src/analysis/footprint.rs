//! Live footprint: the bytes of one fiber that are live at once when a cascade runs as written, free of any mapping.
//!
//! For rank R every other index is fixed to one point. A tensor whose fiber is read in more than one pass counts whole,
//! since its second reading waits for the end of the first; one that streams past, or does not run along R, counts one
//! element. This is the memory a schedule without spills holds; each spilled fiber is read again instead. Source:
//! FuseMax (arXiv 2406.10491), live footprint of a fiber.

use std::collections::BTreeMap;

use super::passes::passes_over;
use crate::arena::Id;
use crate::cascade::{Cascade, RankId, TensorId};

/// Bytes live at once in one fiber of `rank`; none if an extent has no value.
pub fn fiber_bytes(c: &Cascade, rank: RankId, extents: &[u64]) -> Option<u64> {
    let n = *extents.get(rank.index())?;
    let passes = passes_over(c, &[rank]);
    let mut total = 0u64;
    for (t, count) in &passes.per_tensor {
        let elems = if *count > 1 { n } else { 1 };
        total = total.checked_add(c.tensors[*t].dtype.bytes(elems))?;
    }
    // What does not run along the rank is one element of the fiber's state.
    let others: BTreeMap<TensorId, ()> = c
        .einsums()
        .flat_map(|e| e.targets.iter().map(|t| (t.tensor, ())))
        .filter(|(t, ())| !passes.per_tensor.contains_key(t))
        .collect();
    for t in others.keys() {
        total = total.checked_add(c.tensors[*t].dtype.bytes(1))?;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, one};
    use super::*;

    #[test]
    fn a_second_pass_keeps_the_fiber() {
        let c = one(samples::DEFERRED);
        let n = c.rank("N").unwrap();
        // K streams into S once; S (f32) is read twice, so is its fiber; K through S too.
        let small = fiber_bytes(&c, n, &[1, 10, 1, 1]).unwrap();
        let large = fiber_bytes(&c, n, &[1, 20, 1, 1]).unwrap();
        let kept: u64 = passes_over(&c, &[n])
            .per_tensor
            .iter()
            .filter(|(_, p)| **p > 1)
            .map(|(t, _)| c.tensors[*t].dtype.bytes(10))
            .sum();
        assert_eq!(large - small, kept);
        assert!(kept >= 40);
    }

    #[test]
    fn one_pass_is_constant_in_the_fiber() {
        let c = one(samples::UNSTABILISED_DEFERRED);
        let n = c.rank("N").unwrap();
        assert_eq!(fiber_bytes(&c, n, &[4, 8, 4, 4]), fiber_bytes(&c, n, &[4, 4096, 4, 4]));
    }
}
