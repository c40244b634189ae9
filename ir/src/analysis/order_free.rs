//! order-free: whether the steps of a stream may be taken in another order, or apart and merged.
//!
//! What a stream gives does not depend on its blocks (the tile IR's first invariant), so what remains is how a step
//! uses what it carries. It may join what it reads into it by a commutative reduction, and may rescale it by what is
//! carried itself (an anchor that moved); it may not do anything else with what it carries: no running reductions, no
//! stores of it, no update by data of the block alone. Parts of a stream can be merged if, besides, everything it carries
//! is joined by reductions of one result, and what lies beyond a part's end can be left out of every contraction.
//! Invariant: a stream that passes gives the same in any order of its elements.

use std::collections::BTreeSet;

use crate::tile::{AxisId, Expr, ExprId, Kernel, Node, Op, Plan, Stream, TileId};

/// What an expression depends on.
struct Reads {
    tiles: Vec<TileId>,
    axis: bool,
}

fn reads(kernel: &Kernel, root: ExprId, axis: AxisId, out: &mut Reads) {
    kernel.walk(root, &mut |_, e| match e {
        Expr::Tile(t) | Expr::TileAt { tile: t, .. } => out.tiles.push(*t),
        Expr::Coord(a) => out.axis |= *a == axis,
        Expr::Int(_)
        | Expr::Float(_)
        | Expr::Size(_)
        | Expr::Read { .. }
        | Expr::Unary(..)
        | Expr::Binary(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Rand(_) => {}
    });
}

/// What an operation reads, what it joins into itself apart.
fn operands(kernel: &Kernel, op: &Op, axis: AxisId) -> Reads {
    let mut out = Reads { tiles: Vec::new(), axis: false };
    for root in op.roots() {
        reads(kernel, root, axis, &mut out);
    }
    if let Op::Contract { a, b, .. } = op {
        out.tiles.extend([*a, *b]);
    }
    out
}

/// Whether the operation joins into what it writes.
fn carries(op: &Op) -> bool {
    match op {
        Op::Reduce { carry, .. } | Op::Contract { carry, .. } => *carry,
        Op::Scan { carry, .. } => carry.is_some(),
        Op::Load { .. } | Op::Store { .. } | Op::Map { .. } => false,
    }
}

/// Tiles that a step reads before it writes them.
pub fn carried(kernel: &Kernel, s: &Stream) -> BTreeSet<TileId> {
    let (mut written, mut carried) = (BTreeSet::new(), BTreeSet::new());
    for node in &s.body {
        let Node::Op(op) = node else { continue };
        let mut before = operands(kernel, op, s.axis).tiles;
        if carries(op) {
            before.extend(op.outs());
        }
        carried.extend(before.into_iter().filter(|t| !written.contains(t)));
        written.extend(op.outs().iter().copied());
    }
    carried.retain(|t| written.contains(t));
    carried
}

/// Whether the steps of `s` may be taken in any order; otherwise why not.
///
/// # Errors
/// What a step does that depends on the order.
pub fn check(kernel: &Kernel, s: &Stream) -> Result<(), String> {
    if s.sequential {
        return Err("its steps depend on each other".to_string());
    }
    let carried = carried(kernel, s);
    // Tiles that depend on the step's elements, and tiles that depend on what is carried.
    let (mut fresh, mut derived) = (BTreeSet::new(), carried.clone());
    for node in &s.body {
        let Node::Op(op) = node else { return Err("it has a stream inside".to_string()) };
        let r = operands(kernel, op, s.axis);
        let name = |t: &TileId| kernel.tiles[*t].name.clone();
        let local = r.axis || r.tiles.iter().any(|t| fresh.contains(t));
        let dependent = r.tiles.iter().any(|t| derived.contains(t));
        let outs: Vec<TileId> = op.outs().to_vec();
        let sums_axis = match op {
            Op::Reduce { over, op, .. } => {
                if op.selects_argument() {
                    return Err(format!("{} keeps the first of equal elements", name(&outs[0])));
                }
                over.contains(&s.axis)
            }
            Op::Contract { over, .. } => over.contains(&s.axis),
            Op::Scan { out, along, .. } => {
                if *along == s.axis {
                    return Err(format!("{} is a running reduction", name(out)));
                }
                false
            }
            Op::Store { buffer: _, .. } => {
                if dependent {
                    return Err("it stores what depends on the steps before".to_string());
                }
                false
            }
            Op::Load { .. } | Op::Map { .. } => false,
        };
        if carries(op) {
            continue;
        }
        for t in outs {
            let has_axis = kernel.tiles[t].axes.contains(&s.axis);
            let is_local = local || sums_axis || has_axis;
            if carried.contains(&t) && is_local {
                return Err(format!("{} is updated by the step's own elements", name(&t)));
            }
            for (set, member) in [(&mut fresh, is_local), (&mut derived, dependent || carried.contains(&t))] {
                if member {
                    set.insert(t);
                } else {
                    set.remove(&t);
                }
            }
        }
    }
    Ok(())
}

/// Whether the stream at `place` of the kernel's body may be cut into parts that tasks of their own compute, and whose
/// states are merged; otherwise why not.
///
/// # Errors
/// What keeps the parts from being computed apart.
pub fn parts(kernel: &Kernel, place: usize) -> Result<(), String> {
    parts_where(kernel, place, &|_| false)
}

/// As [`parts`], where every part but the last has as many blocks: what is loaded is then 0 beyond the last part's end if
/// the stream goes along a whole dimension of the array.
///
/// # Errors
/// As [`parts`].
pub fn equal_parts(plan: &Plan, kernel: &Kernel, place: usize) -> Result<(), String> {
    let Some(Node::Stream(s)) = kernel.body.get(place) else { return Err("it is no stream".to_string()) };
    let extent = &kernel.axes[s.axis].extent;
    let whole = |t: TileId| {
        s.body.iter().any(|n| match n {
            Node::Op(Op::Load { out, buffer, at }) if *out == t => {
                let dims = &plan.buffers[*buffer].dims;
                at.iter().zip(dims).any(|(e, d)| kernel.exprs[*e] == Expr::Coord(s.axis) && d == extent)
            }
            Node::Op(_) | Node::Stream(_) => false,
        })
    };
    parts_where(kernel, place, &whole)
}

/// Whether the steps of a stream store nothing.
///
/// # Errors
/// That they do.
pub fn stores_nothing(s: &Stream) -> Result<(), String> {
    match s.body.iter().any(|n| matches!(n, Node::Op(Op::Store { .. }))) {
        true => Err("its steps store".to_string()),
        false => Ok(()),
    }
}

/// `ends`: whether what is loaded into a tile is 0 beyond a part's end.
fn parts_where(kernel: &Kernel, place: usize, ends: &dyn Fn(TileId) -> bool) -> Result<(), String> {
    let Some(Node::Stream(s)) = kernel.body.get(place) else { return Err("it is no stream".to_string()) };
    check(kernel, s)?;
    stores_nothing(s)?;
    let carried = carried(kernel, s);
    let mapped = |t: TileId| s.body.iter().any(|n| matches!(n, Node::Op(Op::Map { out, .. }) if *out == t));
    let name = |t: TileId| &kernel.tiles[t].name;
    for node in &s.body {
        let Node::Op(op) = node else { continue };
        if let Op::Contract { a, b, over, .. } = op
            && over.contains(&s.axis)
            && !mapped(*a)
            && !mapped(*b)
            && !(ends(*a) && ends(*b))
        {
            return Err(format!("nothing masks the operands {} and {} beyond a part", name(*a), name(*b)));
        }
        let single = match op {
            Op::Reduce { op, out, .. } => out.len() == 1 && !op.selects_argument(),
            Op::Scan { .. } => false,
            Op::Load { .. } | Op::Store { .. } | Op::Map { .. } | Op::Contract { .. } => true,
        };
        let kept = op.outs().iter().find(|t| carried.contains(t));
        let joins = single && (carries(op) || matches!(op, Op::Map { .. }));
        if let (Some(t), false) = (kept, joins) {
            return Err(format!("nothing merges {} of two parts", name(*t)));
        }
    }
    // The parts' tasks compute what stands before the stream, the merge what stands after it.
    let within = |t: &TileId| s.body.iter().any(|n| touches(kernel, n, *t));
    for (i, node) in kernel.body.iter().enumerate().filter(|(i, _)| *i != place) {
        let Node::Op(op) = node else { return Err("it is not the only stream".to_string()) };
        if matches!(op, Op::Contract { .. } | Op::Scan { .. }) {
            return Err("the kernel contracts or scans outside of it".to_string());
        }
        if i < place && op.outs().iter().any(|t| !within(t)) {
            return Err(format!("{} is not used in it", name(op.outs()[0])));
        }
    }
    Ok(())
}

/// Whether the operation reads or writes the tile.
fn touches(kernel: &Kernel, node: &Node, t: TileId) -> bool {
    let Node::Op(op) = node else { return false };
    let none = kernel.axes.ids().next();
    op.outs().contains(&t) || none.is_some_and(|a| operands(kernel, op, a).tiles.contains(&t))
}
