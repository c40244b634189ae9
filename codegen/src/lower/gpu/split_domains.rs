//! split-domains: which blocks of a stream exist, and which of them need no mask.
//!
//! From a filter's conjuncts, each `± n + Σ c·axis + rest ≥ 0` with the walked axis n, follow bounds on n over the
//! task's block: `lo`/`hi` beyond which no element of the block passes, `full_lo`/`full_hi` between which all do. For
//! causal attention, `n ≤ m + (N − M)` gives hi from the block's last row and full_hi from its first. A conjunct of
//! another form skips nothing and leaves no block without a mask. Invariant: blocks outside `begin..end` hold no
//! element that passes, blocks in `full_begin..full_end` only elements that exist and pass.

use einfall_ir::kernel::{BufId, Expr};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, AxisId, ExprId};

use super::apply_mapping::Facts;
use super::exprs::{Linear, Place, add, ceil_div, max, min, mul, sub};

/// Ranges of blocks, as numbers of blocks of the walked axis.
pub(super) struct Domain {
    pub begin: Expr,
    pub end: Expr,
    /// Blocks without masks; none: every block is checked.
    pub full: Option<(Expr, Expr)>,
    /// Whether blocks before the full ones may need masks.
    pub masked_before: bool,
    /// Whether blocks after the full ones may need masks.
    pub masked_after: bool,
}

/// The conjuncts of `e`.
pub(super) fn conjuncts(f: &Facts<'_>, e: ExprId, out: &mut Vec<ExprId>) {
    match &f.kernel.exprs[e] {
        tile::Expr::Binary(BinaryOp::And, a, b) => {
            conjuncts(f, *a, out);
            conjuncts(f, *b, out);
        }
        tile::Expr::Int(_)
        | tile::Expr::Float(_)
        | tile::Expr::Size(_)
        | tile::Expr::Coord(_)
        | tile::Expr::Tile(_)
        | tile::Expr::TileAt { .. }
        | tile::Expr::Read { .. }
        | tile::Expr::Unary(..)
        | tile::Expr::Binary(..)
        | tile::Expr::Select(..)
        | tile::Expr::Cast(..)
        | tile::Expr::Rand(_) => out.push(e),
    }
}

/// An order comparison as (larger side, smaller side, 1 if they may not be equal, else 0): it holds exactly where larger −
/// smaller − that is ≥ 0.
pub(super) fn ordered(e: &tile::Expr) -> Option<(ExprId, ExprId, i64)> {
    let tile::Expr::Binary(op, a, b) = *e else { return None };
    match op {
        BinaryOp::Le => Some((b, a, 0)),
        BinaryOp::Lt => Some((b, a, 1)),
        BinaryOp::Ge => Some((a, b, 0)),
        BinaryOp::Gt => Some((a, b, 1)),
        BinaryOp::Add
        | BinaryOp::Sub
        | BinaryOp::Mul
        | BinaryOp::Div
        | BinaryOp::Mod
        | BinaryOp::Pow
        | BinaryOp::Min
        | BinaryOp::Max
        | BinaryOp::Eq
        | BinaryOp::Ne
        | BinaryOp::And
        | BinaryOp::Or => None,
    }
}

/// The linear form that is ≥ 0 exactly where the comparison `e` holds.
pub(super) fn at_least_zero(
    f: &Facts<'_>,
    e: ExprId,
    place: &Place,
    buf: &dyn Fn(tile::BufferId) -> BufId,
) -> Option<Linear> {
    let (large, small, strict) = ordered(&f.kernel.exprs[e])?;
    let (l, s) = (f.linear(large, place, buf)?, f.linear(small, place, buf)?);
    let mut axes = l.axes;
    for (a, c) in s.axes {
        match axes.iter_mut().find(|(b, _)| *b == a) {
            Some(found) => found.1 -= c,
            None => axes.push((a, -c)),
        }
    }
    Some(Linear { base: sub(sub(l.base, s.base), Expr::Int(strict)), axes })
}

/// The smallest or largest value of `form` without `axis`, over the task's blocks.
fn extreme(f: &Facts<'_>, form: &Linear, axis: AxisId, place: &Place, largest: bool) -> Expr {
    form.axes.iter().filter(|(a, _)| *a != axis).fold(form.base.clone(), |sum, (a, c)| {
        let first = f.task_origin(*a, place);
        let last = min(add(first.clone(), Expr::Int(f.axis(*a).block as i64 - 1)), sub(f.extent(*a), Expr::Int(1)));
        add(sum, mul(if (*c > 0) == largest { last } else { first }, Expr::Int(*c)))
    })
}

/// The blocks of a stream over `axis` with `filter`.
pub(super) fn domain(
    f: &Facts<'_>,
    axis: AxisId,
    filter: Option<ExprId>,
    place: &Place,
    buf: &dyn Fn(tile::BufferId) -> BufId,
) -> Domain {
    let block = f.axis(axis).block;
    let extent = f.extent(axis);
    let tail = !f.axis(axis).exact;
    let mut list = Vec::new();
    if let Some(e) = filter {
        conjuncts(f, e, &mut list);
    }
    let (mut lo, mut hi) = (None::<Expr>, None::<Expr>);
    let (mut full_lo, mut full_hi) = (None::<Expr>, None::<Expr>);
    let mut all_known = true;
    let join = |x: &mut Option<Expr>, y: Expr, with: fn(Expr, Expr) -> Expr| {
        *x = Some(match x.take() {
            Some(x) => with(x, y),
            None => y,
        });
    };
    for e in list {
        let form = at_least_zero(f, e, place, buf);
        let c = form.as_ref().and_then(|l| l.axes.iter().find(|x| x.0 == axis)).map_or(0, |x| x.1);
        match (form, c) {
            (Some(form), -1) => {
                join(&mut hi, add(extreme(f, &form, axis, place, true), Expr::Int(1)), min);
                join(&mut full_hi, add(extreme(f, &form, axis, place, false), Expr::Int(1)), min);
            }
            (Some(form), 1) => {
                let negated = |largest| sub(Expr::Int(0), extreme(f, &form, axis, place, largest));
                join(&mut lo, negated(true), max);
                join(&mut full_lo, negated(false), max);
            }
            _ => all_known = false,
        }
    }
    let masked_after = full_hi.is_some() || tail;
    let masked_before = full_lo.is_some();
    let b = Expr::Int(block as i64);
    let begin = lo.map_or(Expr::Int(0), |lo| max(lo, Expr::Int(0)).bin(BinaryOp::Div, b.clone()));
    let top = hi.map_or(extent.clone(), |hi| min(extent.clone(), max(hi, Expr::Int(0))));
    let end = ceil_div(top, block);
    let end = if begin == Expr::Int(0) { end } else { max(begin.clone(), end) };
    let full = all_known.then(|| {
        let first = full_lo.map_or(begin.clone(), |lo| max(ceil_div(max(lo, Expr::Int(0)), block), begin.clone()));
        let top = full_hi.map_or(extent.clone(), |hi| min(extent.clone(), max(hi, Expr::Int(0))));
        // Without masks after them the last block, if partial, is still a full one for zero-filled operands only.
        let last = top.bin(BinaryOp::Div, b);
        (min(first, end.clone()), min(last, end.clone()))
    });
    Domain { begin, end, full, masked_before, masked_after }
}
