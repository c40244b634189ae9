//! Which variant of a kernel a launch runs.
//!
//! Variants compute the same on their domains; the first whose assumptions hold is taken, and the last one assumes the
//! least. Invariant: this module and the launcher of an artifact ([`crate::artifact::GpuLaunch`]) agree.

use super::{Assumption, Expr, Kernel, Module};
use crate::arena::Id;
use crate::ops::BinaryOp;

/// What is known of an array at launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArrayFacts {
    /// The base address, in bytes.
    pub address: u64,
    /// Strides in elements, outermost first.
    pub strides: Vec<i64>,
}

impl Module {
    /// The kernels of each launch, in order: variants of one kernel together.
    pub fn launches(&self) -> Vec<&[Kernel]> {
        let same = |a: &Kernel, b: &Kernel| a.variant_of.is_some() && a.variant_of == b.variant_of;
        self.kernels.chunk_by(same).collect()
    }
}

/// The value of an integer expression over extents alone; none if it is another expression or overflows.
pub fn value(e: &Expr, ranks: &[u64]) -> Option<i64> {
    match e {
        Expr::Int(n) => Some(*n),
        Expr::Extent(r) => i64::try_from(*ranks.get(r.index())?).ok(),
        Expr::Binary(op, a, b) => {
            let (a, b) = (value(a, ranks)?, value(b, ranks)?);
            match op {
                BinaryOp::Add => a.checked_add(b),
                BinaryOp::Sub => a.checked_sub(b),
                BinaryOp::Mul => a.checked_mul(b),
                BinaryOp::Div => Some(if b == 0 { 0 } else { a.checked_div_euclid(b)? }),
                BinaryOp::Mod => Some(if b == 0 { 0 } else { a.checked_rem_euclid(b)? }),
                BinaryOp::Min => Some(a.min(b)),
                BinaryOp::Max => Some(a.max(b)),
                BinaryOp::Pow
                | BinaryOp::Lt
                | BinaryOp::Le
                | BinaryOp::Gt
                | BinaryOp::Ge
                | BinaryOp::Eq
                | BinaryOp::Ne
                | BinaryOp::And
                | BinaryOp::Or => None,
            }
        }
        Expr::Float(_)
        | Expr::Var(_)
        | Expr::Grid(_)
        | Expr::Unit
        | Expr::ClusterRank
        | Expr::Scalar(_)
        | Expr::Fetch { .. }
        | Expr::Frag { .. }
        | Expr::Coord(_)
        | Expr::Unary(..)
        | Expr::Fma(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Rand(_) => None,
    }
}

/// Whether `a` holds for extents `ranks` and arrays `arrays` (by position among the plan's buffers).
pub fn holds(kernel: &Kernel, a: &Assumption, ranks: &[u64], arrays: &[ArrayFacts]) -> bool {
    match a {
        Assumption::AtMost(e, n) => value(e, ranks).is_some_and(|v| v <= *n as i64),
        Assumption::Multiple(e, n) => value(e, ranks).is_some_and(|v| v % (*n as i64).max(1) == 0),
        Assumption::Aligned(buf, n) => {
            let b = &kernel.bufs[*buf];
            let super::BufSpace::Global { param, .. } = b.space else { return true };
            let Some(facts) = arrays.get(param) else { return false };
            let Some((last, outer)) = facts.strides.split_last() else { return true };
            let bytes = |s: &i64| s.unsigned_abs() * u64::from(b.dtype.bits()) / 8;
            *last == 1 && facts.address % n == 0 && outer.iter().all(|s| bytes(s) % n == 0)
        }
    }
}

/// The first of `variants` whose assumptions hold.
pub fn choose<'a>(variants: &'a [Kernel], ranks: &[u64], arrays: &[ArrayFacts]) -> Option<&'a Kernel> {
    variants.iter().find(|k| k.assumes.iter().all(|a| holds(k, a, ranks, arrays)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_variant_that_may_run_is_taken() {
        let text = "module m {
    ranks M, K
    kernel fast of rows {
        grid [M]
        global x: bf16[M, K] = 0
        assume K <= 64
        assume K multiple 8
        assume x aligned 16
        role main: 1 warp {
        }
    }
    kernel slow of rows {
        grid [M]
        role main: 1 warp {
        }
    }
    kernel other {
        grid [M]
        role main: 1 warp {
        }
    }
}
";
        let m = super::super::parse::parse(text).unwrap();
        assert_eq!(super::super::print::print(&m), text);
        let launches = m.launches();
        assert_eq!(launches.iter().map(|l| l.len()).collect::<Vec<_>>(), [2, 1]);
        let pick = |k: u64, stride: i64, address: u64| {
            let arrays = [ArrayFacts { address, strides: vec![stride, 1] }];
            choose(launches[0], &[3, k], &arrays).map(|k| k.name.as_str())
        };
        assert_eq!(pick(64, 64, 256), Some("fast"));
        // A row too long, no multiple, padded to an odd pitch, a base between vectors.
        for (k, stride, address) in [(72, 72, 256), (63, 64, 256), (64, 68, 256), (64, 64, 264)] {
            assert_eq!(pick(k, stride, address), Some("slow"));
        }
    }
}
