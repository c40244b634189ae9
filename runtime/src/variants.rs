//! Which of a kernel's variants a launch on a GPU runs.
//!
//! Invariant: of the variants of one kernel exactly one is launched, the first whose assumptions all hold of the sizes
//! and arrays given.

use crate::arguments::Place;
use crate::program::{Program, Sizes};
use einfall_ir::arena::Id;
use einfall_ir::artifact::Condition;

/// Whether an assumption holds at these sizes; `aligned` judges arrays.
pub(crate) fn holds(
    condition: &Condition,
    program: &Program,
    sizes: &Sizes,
    aligned: impl Fn(&Condition) -> bool,
) -> bool {
    debug_assert_eq!(program.artifact.buffers.len(), sizes.shapes.len());
    match condition {
        Condition::AtMost(size, n) => size.eval(&sizes.extents).is_ok_and(|v| v <= *n),
        Condition::Multiple(size, n) => size.eval(&sizes.extents).is_ok_and(|v| v.is_multiple_of(*n)),
        Condition::Aligned(..) => aligned(condition),
    }
}

/// A kernel of which no variant fits.
#[derive(Debug)]
pub(crate) struct Unfit {
    /// The kernel.
    pub kernel: String,
    /// Why, by what the last variant takes for granted, and what to do.
    pub reason: String,
    /// Whether it is the sizes that do not fit: code compiled with them has a variant that does.
    #[cfg_attr(not(feature = "shaders"), allow(dead_code))]
    pub sizes: bool,
}

impl Unfit {
    fn new(program: &Program, kernel: String, condition: &Condition) -> Unfit {
        let (sizes, remedy) = match condition {
            Condition::AtMost(..) | Condition::Multiple(..) => {
                (true, "compile it with these sizes in the options, or by a mapping made for them")
            }
            Condition::Aligned(..) => (false, "give the array so"),
        };
        let wants = program.artifact.words(condition);
        let reason =
            format!("none of its variants fits the sizes and arrays given: the last wants that {wants}; {remedy}");
        Unfit { kernel, reason, sizes }
    }
}

/// The launches to make, in order: of the variants of a kernel, the first whose assumptions all hold.
///
/// # Errors
/// The kernel of which no variant fits, and why.
pub(crate) fn choose(program: &Program, sizes: &Sizes, places: &[Option<Place>]) -> Result<Vec<usize>, Unfit> {
    let aligned = |condition: &Condition| {
        let Condition::Aligned(b, bytes) = condition else { return true };
        let (bits, shape) = (u64::from(program.artifact.buffers[*b].dtype.bits()), &sizes.shapes[b.index()]);
        // An array without elements is not read.
        shape.contains(&0)
            || places[b.index()].as_ref().is_some_and(|p| {
                let outer = shape.len().saturating_sub(1);
                let whole = |d: usize| shape[d] <= 1 || (p.strides[d].unsigned_abs() * bits / 8).is_multiple_of(*bytes);
                (p.base as u64).is_multiple_of(*bytes)
                    && (0..outer).all(whole)
                    && (outer..shape.len()).all(|d| shape[d] <= 1 || p.strides[d] == 1)
            })
    };
    let launches = &program.artifact.launches;
    let (mut chosen, mut index) = (Vec::new(), 0);
    while index < launches.len() {
        let kernel = |i: usize| launches[i].gpu.as_ref().and_then(|g| g.variant_of.as_ref());
        let same = |i: usize| kernel(i).is_some() && kernel(i) == kernel(index);
        let end = (index + 1..launches.len()).find(|i| !same(*i)).unwrap_or(launches.len());
        let broken = |i: usize| {
            let assumes = launches[i].gpu.as_ref().map_or(&[][..], |g| &g.assumes);
            assumes.iter().find(|c| !holds(c, program, sizes, aligned))
        };
        let mut last = None;
        for i in index..end {
            last = broken(i);
            if last.is_none() {
                chosen.push(i);
                break;
            }
        }
        if let Some(condition) = last {
            let name = kernel(index).unwrap_or(&launches[index].symbol).clone();
            return Err(Unfit::new(program, name, condition));
        }
        index = end;
    }
    Ok(chosen)
}
