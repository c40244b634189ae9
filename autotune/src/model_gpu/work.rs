//! What a kernel's cost needs to know that no assignment changes: work per element, what is moved, what filters keep.
//!
//! Invariant: a function of the kernel, its sizes and the structure alone. Filters are sampled on a grid of coordinates.

use einfall_ir::arena::Id;
use einfall_ir::ops::{BinaryOp, UnaryOp};
use einfall_ir::tile::{AxisId, Expr, ExprId, Op, TileId};

use super::facts::Facts;
use super::structure::Structure;

/// What does not depend on an assignment.
#[derive(Clone, Debug)]
pub struct Work {
    /// Nominal extents of the axes.
    pub extents: Vec<f64>,
    /// Per operation: special functions and other arithmetic per element, and the axes of its elements.
    pub(super) per_op: Vec<(f64, f64, Vec<AxisId>)>,
    /// Share of each stream's points that its filter keeps.
    pub(super) kept: Vec<f64>,
    /// Loads and stores.
    pub(super) moves: Vec<Move>,
    /// Whether a stream loads into registers.
    pub(super) register_loads: bool,
    /// Whether consumers load tiles into registers before a stream.
    pub(super) head_loads: bool,
    /// Contractions inside streams.
    pub(super) waits: f64,
    /// Tiles that consumers hand over through shared memory.
    pub(super) hand_over: f64,
    /// Bytes that an operation writes to shared memory per element of its tile.
    pub(super) written: Vec<f64>,
    /// What a part of a shared stream leaves for the merge: per tile its axes and bytes of an element.
    pub(super) states: Vec<(Vec<AxisId>, f64)>,
}

/// A load or store.
#[derive(Clone, Debug)]
pub(super) struct Move {
    pub(super) axes: Vec<AxisId>,
    pub(super) bytes: f64,
    pub(super) load: bool,
    /// The tile, if a copy engine fetches it.
    pub(super) fetched: Option<usize>,
    pub(super) stream: Option<usize>,
    /// Bytes of everything it touches, once.
    pub(super) whole: f64,
}

fn functions(f: &Facts<'_>, root: ExprId) -> (f64, f64) {
    let (mut special, mut plain) = (0.0, 0.0);
    f.kernel.walk(root, &mut |_, e| match e {
        Expr::Unary(op, _) => {
            let (s, p) = match op {
                UnaryOp::Exp | UnaryOp::Log | UnaryOp::Log1p => (1.0, 1.0),
                UnaryOp::Exp2 | UnaryOp::Log2 | UnaryOp::Sqrt | UnaryOp::Rsqrt | UnaryOp::Recip => (1.0, 0.0),
                UnaryOp::Sin | UnaryOp::Cos => (1.0, 2.0),
                UnaryOp::Tanh => (2.0, 4.0),
                UnaryOp::Sigmoid => (2.0, 2.0),
                UnaryOp::Erf => (1.0, 14.0),
                UnaryOp::Neg
                | UnaryOp::Abs
                | UnaryOp::Sign
                | UnaryOp::Floor
                | UnaryOp::Ceil
                | UnaryOp::Round
                | UnaryOp::Not => (0.0, 1.0),
            };
            special += s;
            plain += p;
        }
        Expr::Binary(BinaryOp::Div | BinaryOp::Pow | BinaryOp::Mod, ..) => {
            special += 1.0;
            plain += 2.0;
        }
        Expr::Binary(..) | Expr::Select(..) | Expr::Cast(..) | Expr::Rand(_) => plain += 1.0,
        Expr::Read { at, .. } if !at.is_empty() => plain += 2.0,
        Expr::Int(_)
        | Expr::Float(_)
        | Expr::Size(_)
        | Expr::Coord(_)
        | Expr::Tile(_)
        | Expr::TileAt { .. }
        | Expr::Read { .. } => {}
    });
    (special, plain)
}

impl Work {
    /// The work of a kernel under a structure.
    pub fn of(f: &Facts<'_>, s: &Structure) -> Work {
        let extents: Vec<f64> = f.axes.iter().enumerate().map(|(i, a)| a.nominal(s.sized[i]).max(1) as f64).collect();
        let per_op = f.ops.iter().map(|o| {
            let value = match o.op {
                Op::Map { value, .. } | Op::Reduce { value, .. } | Op::Scan { value, .. } | Op::Store { value, .. } => {
                    Some(*value)
                }
                Op::Load { .. } | Op::Contract { .. } => None,
            };
            let (special, plain) = value.map_or((0.0, 0.0), |v| functions(f, v));
            let (more, axes): (f64, Vec<AxisId>) = match o.op {
                Op::Reduce { out, over, .. } => (1.0, f.tile_axes(out[0]).iter().chain(over).copied().collect()),
                Op::Map { out, .. } | Op::Scan { out, .. } | Op::Load { out, .. } | Op::Contract { out, .. } => {
                    (0.5, f.tile_axes(*out).to_vec())
                }
                Op::Store { axes, .. } => (1.0, axes.clone()),
            };
            (special, plain + more, s.sized_of(&axes))
        });
        let per_op = per_op.collect();
        let kept = (0..f.streams.len()).map(|i| kept_share(f, i, &extents)).collect();
        let mut moves = Vec::new();
        for (i, o) in f.ops.iter().enumerate() {
            let (axes, dtype, load) = match o.op {
                Op::Load { out, .. } => (f.tile_axes(*out).to_vec(), f.kernel.tiles[*out].dtype, true),
                Op::Store { axes, buffer, .. } => (axes.clone(), f.plan.buffers[*buffer].dtype, false),
                Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => continue,
            };
            let bytes = dtype.bytes(1) as f64;
            let whole = axes.iter().map(|a| extents[a.index()]).product::<f64>() * bytes;
            let fetched = match o.op {
                Op::Load { out, .. } if s.fetches(f, i) => Some(out.index()),
                Op::Load { .. } | Op::Store { .. } => None,
                Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => None,
            };
            moves.push(Move { axes, bytes, load, fetched, stream: o.stream, whole });
        }
        let register_loads = moves.iter().any(|m| m.load && m.fetched.is_none() && m.stream.is_some());
        let head_loads = moves.iter().any(|m| m.load && m.fetched.is_none() && m.stream.is_none());
        let waits = s.contractions.iter().filter(|x| f.ops[x.op].stream.is_some()).count() as f64;
        let hand_over = s.written().count() as f64 * 2.0;
        let written = f.ops.iter().map(|o| match o.op {
            Op::Map { out, .. } if s.places[out.index()].shared().is_some() => {
                2.0 * f.kernel.tiles[*out].dtype.bytes(1) as f64
            }
            Op::Map { .. }
            | Op::Load { .. }
            | Op::Store { .. }
            | Op::Reduce { .. }
            | Op::Contract { .. }
            | Op::Scan { .. } => 0.0,
        });
        let written = written.collect();
        let bytes = |t: &TileId| (f.tile_axes(*t).to_vec(), f.kernel.tiles[*t].dtype.bytes(1) as f64);
        let states = f.states().iter().map(bytes).collect();
        Work { extents, per_op, kept, moves, register_loads, head_loads, waits, hand_over, written, states }
    }
}

/// The share of a stream's points that its filter keeps, sampled on a grid of coordinates; what depends on data counts
/// as kept.
fn kept_share(f: &Facts<'_>, stream: usize, extents: &[f64]) -> f64 {
    const STEPS: usize = 12;
    let x = &f.streams[stream];
    let Some(filter) = x.filter else { return 1.0 };
    let mut axes = vec![x.axis];
    axes.extend(x.filtered.iter().copied().filter(|a| extents[a.index()] > 1.0).take(2));
    let total = STEPS.pow(axes.len() as u32);
    let mut kept = 0;
    for code in 0..total {
        let at = |a: AxisId| {
            let i = axes.iter().position(|x| *x == a)?;
            let step = code / STEPS.pow(i as u32) % STEPS;
            Some((extents[a.index()] * (step as f64 + 0.5) / STEPS as f64).floor())
        };
        kept += usize::from(value(f, filter, &at, extents).is_none_or(|v| v != 0.0));
    }
    (kept as f64 / total as f64).max(0.01)
}

fn value(f: &Facts<'_>, e: ExprId, at: &dyn Fn(AxisId) -> Option<f64>, extents: &[f64]) -> Option<f64> {
    let of = |e: ExprId| value(f, e, at, extents);
    match &f.kernel.exprs[e] {
        Expr::Int(n) => Some(*n as f64),
        Expr::Float(x) => Some(*x),
        Expr::Size(s) => size(f, s, extents),
        Expr::Coord(a) => at(*a).or(Some(0.0)),
        Expr::Unary(op, a) => Some(op.eval(of(*a)?)),
        Expr::Binary(op, a, b) => Some(op.eval(of(*a)?, of(*b)?, true)),
        Expr::Select(c, a, b) => of(if of(*c)? != 0.0 { *a } else { *b }),
        Expr::Tile(_) | Expr::TileAt { .. } | Expr::Read { .. } | Expr::Cast(..) | Expr::Rand(_) => None,
    }
}

/// An extent with each rank at the nominal extent of the axis over it.
fn size(f: &Facts<'_>, s: &einfall_ir::cascade::Size, extents: &[f64]) -> Option<f64> {
    use einfall_ir::cascade::Size;
    let mut values = vec![1u64; f.plan.ranks.len()];
    for (i, (_, r)) in f.plan.ranks.iter().enumerate() {
        if let Some(n) = r.fixed {
            values[i] = n;
        }
    }
    for (i, (_, a)) in f.kernel.axes.iter().enumerate() {
        if let Size::Rank(r) = a.extent {
            values[r.index()] = extents[i] as u64;
        }
    }
    s.eval(&values).ok().map(|n| n as f64)
}
