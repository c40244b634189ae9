//! The share of a stream's steps that its filter leaves: blocks it rules out as a whole are skipped.
//!
//! Invariant: bounds over a block hold at each of its points, so no block with a point left is counted as skipped.

use super::{Model, SAMPLES, walk};
use crate::arena::Id;
use crate::ops::{BinaryOp, UnaryOp};
use crate::tile::{AxisId, Expr, ExprId, Kernel, Stream};

/// The share of (block, step) pairs that a stream's filter does not rule out as a whole; a block is `block` long along
/// each axis.
pub(super) fn kept(
    m: &Model<'_>,
    s: &Stream,
    sizes: &impl Fn(&crate::cascade::Size) -> Option<f64>,
    block: &impl Fn(AxisId) -> f64,
) -> f64 {
    let Some(filter) = s.filter else { return 1.0 };
    let mut axes = Vec::new();
    walk(m.kernel, filter, &mut |e| {
        if let Expr::Coord(a) = e {
            axes.push(*a);
        }
    });
    axes.push(s.axis);
    axes.sort();
    axes.dedup();
    let counts: Vec<u64> = axes.iter().map(|a| (m.extent[a.index()] / block(*a)).ceil().max(1.0) as u64).collect();
    let each = (SAMPLES as f64).powf(1.0 / axes.len() as f64).floor() as u64;
    let taken: Vec<u64> = counts.iter().map(|n| (*n).min(each.max(1))).collect();
    let total: u64 = taken.iter().product();
    let mut kept = 0u64;
    for code in 0..total {
        let mut rest = code;
        let mut range = vec![(0.0, 0.0); m.extent.len()];
        for ((a, n), t) in axes.iter().zip(&counts).zip(&taken) {
            // Evenly spaced blocks, the middle one of each stretch.
            let b = ((rest % t) * n + n / 2) / t;
            rest /= t;
            let from = b as f64 * block(*a);
            range[a.index()] = (from, (from + block(*a)).min(m.extent[a.index()]) - 1.0);
        }
        kept += u64::from(interval(m.kernel, filter, &range, sizes).1 != 0.0);
    }
    kept as f64 / total as f64
}

type Interval = (f64, f64);

const ANY: Interval = (f64::NEG_INFINITY, f64::INFINITY);

/// Bounds of an integer expression over a block.
fn interval(
    k: &Kernel,
    e: ExprId,
    range: &[Interval],
    sizes: &impl Fn(&crate::cascade::Size) -> Option<f64>,
) -> Interval {
    let of = |e: ExprId| interval(k, e, range, sizes);
    match &k.exprs[e] {
        Expr::Int(n) => (*n as f64, *n as f64),
        Expr::Float(x) => (*x, *x),
        Expr::Size(s) => sizes(s).map_or(ANY, |n| (n, n)),
        Expr::Coord(a) => range[a.index()],
        Expr::Binary(op, a, b) => {
            let ((al, ah), (bl, bh)) = (of(*a), of(*b));
            let truth = |never: bool, always: bool| (f64::from(u8::from(always)), f64::from(u8::from(!never)));
            match op {
                BinaryOp::Add => (al + bl, ah + bh),
                BinaryOp::Sub => (al - bh, ah - bl),
                BinaryOp::Mul => {
                    let all = [al * bl, al * bh, ah * bl, ah * bh];
                    if all.iter().any(|x| x.is_nan()) {
                        return ANY;
                    }
                    (all.iter().copied().fold(f64::INFINITY, f64::min), all.iter().copied().fold(ANY.0, f64::max))
                }
                BinaryOp::Div if bl == bh && bl > 0.0 => ((al / bl).floor(), (ah / bl).floor()),
                BinaryOp::Mod if bl == bh && bl > 0.0 => (0.0, bl - 1.0),
                BinaryOp::Div | BinaryOp::Mod | BinaryOp::Pow => ANY,
                BinaryOp::Min => (al.min(bl), ah.min(bh)),
                BinaryOp::Max => (al.max(bl), ah.max(bh)),
                BinaryOp::Lt => truth(al >= bh, ah < bl),
                BinaryOp::Le => truth(al > bh, ah <= bl),
                BinaryOp::Gt => truth(ah <= bl, al > bh),
                BinaryOp::Ge => truth(ah < bl, al >= bh),
                BinaryOp::Eq => truth(ah < bl || al > bh, al == ah && bl == bh && al == bl),
                BinaryOp::Ne => truth(al == ah && bl == bh && al == bl, ah < bl || al > bh),
                BinaryOp::And => truth(ah == 0.0 && al == 0.0 || bh == 0.0 && bl == 0.0, al > 0.0 && bl > 0.0),
                BinaryOp::Or => truth(ah == 0.0 && al == 0.0 && bh == 0.0 && bl == 0.0, al > 0.0 || bl > 0.0),
            }
        }
        Expr::Unary(UnaryOp::Neg, a) => {
            let (l, h) = of(*a);
            (-h, -l)
        }
        Expr::Select(_, a, b) => {
            let ((al, ah), (bl, bh)) = (of(*a), of(*b));
            (al.min(bl), ah.max(bh))
        }
        Expr::Tile(_) | Expr::TileAt { .. } | Expr::Read { .. } | Expr::Unary(..) | Expr::Cast(..) | Expr::Rand(_) => {
            ANY
        }
    }
}
