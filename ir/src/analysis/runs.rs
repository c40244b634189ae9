//! runs: contractions of which one operand moves with a row axis by data alone, so that rows with equal data share it.
//!
//! `y[n,f] = sum(d) a[n,d] * b[n,d,f]` with `b = load w[s[n], d, f]` is a matrix product over every run of rows whose
//! `s[n]` is the same. The *keys* of such an operand are the integers by which it moves: `s[n]` here. Invariant: two rows
//! with equal keys have the same operand, whatever the data; nothing is assumed of how rows are ordered.

use crate::ops::UnaryOp;
use crate::tile::{AxisId, BufferId, Expr, ExprId, Kernel, Op, Place, Plan, TileId};

/// The rows of a contraction that may share an operand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs {
    /// The axis of the rows.
    pub axis: AxisId,
    /// The operand that they share.
    pub operand: TileId,
    /// Whether it is the contraction's first.
    pub first: bool,
    /// Other axes of the operand that keys depend on, which are walked around the rows.
    pub around: Vec<AxisId>,
    /// What is the same all over a run.
    pub keys: Vec<ExprId>,
}

impl Runs {
    /// Whether the operand has one coordinate of this axis at a time.
    pub fn single(&self, axis: AxisId) -> bool {
        axis == self.axis || self.around.contains(&axis)
    }
}

/// The runs of a contraction, if one of its operands is loaded, or computed from what is loaded, at positions that move
/// with a row axis by data alone, and has columns of its own.
pub fn runs(plan: &Plan, k: &Kernel, op: &Op) -> Option<Runs> {
    let Op::Contract { out, a, b, over, .. } = op else { return None };
    // What another contraction reads is laid out for that one.
    let mut read = false;
    k.for_each_op(&mut |op, _| read |= matches!(op, Op::Contract { a, b, .. } if a == out || b == out));
    if read {
        return None;
    }
    let axes = |t: TileId| &k.tiles[t].axes;
    for (operand, other, first) in [(*b, *a, false), (*a, *b, true)] {
        // Axes of both operands and the result; of the operand's others, the columns and what is summed.
        let (shared, within): (Vec<AxisId>, Vec<AxisId>) = axes(operand)
            .iter()
            .copied()
            .partition(|x| axes(*out).contains(x) && axes(other).contains(x) && !over.contains(x));
        if !within.iter().any(|x| axes(*out).contains(x)) {
            continue;
        }
        for &axis in axes(*out).iter().rev().filter(|x| shared.contains(x)) {
            let mut found = Search { plan, k, operand, axis, within: within.clone(), keys: Vec::new() };
            if found.written(operand) && !found.keys.is_empty() {
                let keys = found.keys;
                let moving = |x: &AxisId| *x != axis && keys.iter().any(|e| depends(k, *e, *x));
                let around = shared.iter().copied().filter(moving).collect();
                return Some(Runs { axis, operand, first, around, keys });
            }
        }
    }
    None
}

/// Axes of which a tile has one coordinate at a time, because only contractions by runs read it.
pub fn single_axes(plan: &Plan, k: &Kernel, tile: TileId) -> Vec<AxisId> {
    let mut readers: Vec<Option<Runs>> = Vec::new();
    let mut others = false;
    k.for_each_op(&mut |op, _| {
        if let Op::Contract { a, b, .. } = op
            && (*a == tile || *b == tile)
        {
            readers.push(runs(plan, k, op).filter(|r| r.operand == tile));
        }
        for root in op.roots() {
            k.walk(root, &mut |_, e| {
                others |= matches!(e, Expr::Tile(t) | Expr::TileAt { tile: t, .. } if *t == tile);
            });
        }
    });
    let own = &k.tiles[tile].axes;
    let all = |x: &AxisId| readers.iter().all(|r| r.as_ref().is_some_and(|r| r.single(*x)));
    if others || readers.is_empty() { Vec::new() } else { own.iter().copied().filter(all).collect() }
}

/// Whether an expression's value may differ along an axis.
pub fn depends(k: &Kernel, e: ExprId, axis: AxisId) -> bool {
    match &k.exprs[e] {
        Expr::Coord(a) => *a == axis,
        Expr::Tile(t) => k.tiles[*t].axes.contains(&axis),
        Expr::TileAt { at, .. } => at.contains(&Place::Axis(axis)),
        other => {
            let mut any = false;
            other.for_each_operand(|o| any |= depends(k, o, axis));
            any
        }
    }
}

/// How an operand moves along an axis.
struct Search<'a> {
    plan: &'a Plan,
    k: &'a Kernel,
    operand: TileId,
    axis: AxisId,
    /// Axes of the operand that are walked within a row: what depends on them is no key.
    within: Vec<AxisId>,
    keys: Vec<ExprId>,
}

impl Search<'_> {
    /// Whether the one operation that writes a tile moves along the axis by data alone, and may be done later as well.
    fn written(&mut self, tile: TileId) -> bool {
        let (k, small) = (self.k, self.small(tile));
        let mut roots = None;
        k.for_each_op(&mut |op, _| match op {
            Op::Load { out, buffer, at } if *out == tile && !self.stores(*buffer) => roots = Some(at.clone()),
            Op::Map { out, value } if *out == tile && small => roots = Some(vec![*value]),
            Op::Load { .. }
            | Op::Store { .. }
            | Op::Map { .. }
            | Op::Reduce { .. }
            | Op::Contract { .. }
            | Op::Scan { .. } => {}
        });
        let Some(roots) = roots.filter(|_| self.once(tile)) else { return false };
        let mut same = true;
        for root in &roots {
            k.walk(*root, &mut |_, e| {
                if let Expr::Tile(t) | Expr::TileAt { tile: t, .. } = e {
                    same &= self.once(*t);
                }
            });
        }
        same && roots.iter().all(|e| self.moves(*e))
    }

    /// Whether one operation alone writes a tile, and nothing is carried in it.
    fn once(&self, tile: TileId) -> bool {
        let (mut writers, mut carried) = (0, false);
        self.k.for_each_op(&mut |op, _| {
            let own = op.outs().contains(&tile);
            writers += usize::from(own);
            carried |= match op {
                Op::Reduce { carry, .. } | Op::Contract { carry, .. } => own && *carry,
                Op::Scan { carry, .. } => *carry == Some(tile),
                Op::Load { .. } | Op::Store { .. } | Op::Map { .. } => false,
            };
        });
        writers == 1 && !carried
    }

    /// Whether a tile, if it is computed, need not be held for every row: it is the operand itself, or small.
    fn small(&self, tile: TileId) -> bool {
        tile == self.operand || !self.k.tiles[tile].axes.iter().any(|x| self.within.contains(x))
    }

    /// Whether a value moves along the axis by data alone; its keys are found on the way.
    fn moves(&mut self, e: ExprId) -> bool {
        let k = self.k;
        if matches!(&k.exprs[e], Expr::Read { buffer, .. } if self.stores(*buffer)) {
            return false;
        }
        if !depends(k, e, self.axis) {
            return true;
        }
        if self.is_integer(e) && !self.within.iter().any(|x| depends(k, e, *x)) {
            if !self.keys.contains(&e) {
                self.keys.push(e);
            }
            return true;
        }
        match &k.exprs[e] {
            Expr::Tile(t) => self.written(*t),
            Expr::Coord(_) | Expr::TileAt { .. } | Expr::Rand(_) => false,
            other @ (Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)) => {
                let mut operands = Vec::new();
                other.for_each_operand(|o| operands.push(o));
                operands.into_iter().all(|o| self.moves(o))
            }
        }
    }

    /// Whether an expression is an integer that is read, or computed from what is.
    fn is_integer(&self, e: ExprId) -> bool {
        match &self.k.exprs[e] {
            Expr::Int(_) | Expr::Size(_) => true,
            // A coordinate of the axis is another in every row.
            Expr::Coord(a) => *a != self.axis,
            Expr::Read { buffer, .. } => self.plan.buffers[*buffer].dtype.is_int(),
            Expr::Tile(t) => self.k.tiles[*t].dtype.is_int(),
            Expr::Unary(UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Sign | UnaryOp::Not, a) => self.is_integer(*a),
            Expr::Binary(_, a, b) => self.is_integer(*a) && self.is_integer(*b),
            Expr::Select(a, b, c) => [a, b, c].into_iter().all(|x| self.is_integer(*x)),
            Expr::Cast(d, a) => d.is_int() && self.is_integer(*a),
            Expr::Float(_) | Expr::TileAt { .. } | Expr::Unary(..) | Expr::Rand(_) => false,
        }
    }

    /// Whether the kernel writes an array: what is read of it is not the same everywhere in a block.
    fn stores(&self, array: BufferId) -> bool {
        let mut found = false;
        self.k.for_each_op(&mut |op, _| found |= matches!(op, Op::Store { buffer, .. } if *buffer == array));
        found
    }
}
