//! hold-rows: streams over an axis whose block holds the whole extent become straight code over one block.
//!
//! ```text
//! for k { r0 = carry reduce sum(k) x[m, k] }        (axis k block 4096 whole)
//! for k { store y[m, k] = x[m, k] / r0 over m, k }
//! →  r0 = carry reduce sum(k) x[m, k]               (k: inner, in blocks of 4096)
//!    store y[m, k] = x[m, k] / r0 over m, k
//! ```
//! Axes of one extent that no operation has together become one, so that what different streams read is seen to be the
//! same. Invariant: the plan computes the same wherever the extents are at most the blocks, which the caller assumes.

use std::collections::BTreeMap;

use einfall_ir::mapping::KernelMapping;
use einfall_ir::tile::{AxisId, AxisKind, Expr, Kernel, Node, Op, Place};

use super::{Step, refuse};

/// Applies the pass.
///
/// # Errors
/// A stream whose steps follow one another cannot be held whole.
pub(super) fn run(kernel: &Kernel, m: &KernelMapping) -> Step<Kernel> {
    let mut k = kernel.clone();
    let whole: Vec<AxisId> =
        kernel.axes.iter().filter(|(_, a)| m.axis(&a.name).is_some_and(|x| x.whole)).map(|(id, _)| id).collect();
    if whole.is_empty() {
        return Ok(k);
    }
    // Steps that follow one another stay as they are.
    let steps = kernel.body.iter().filter_map(|n| match n {
        Node::Stream(s) if s.sequential || s.reverse => Some(s.axis),
        Node::Stream(_) | Node::Op(_) => None,
    });
    let steps: Vec<AxisId> = steps.collect();
    let mut names: BTreeMap<AxisId, AxisId> = BTreeMap::new();
    for (id, a) in kernel.axes.iter().filter(|(id, a)| a.kind != AxisKind::Grid && !steps.contains(id)) {
        let mapped = m.axis(&a.name);
        let joins = |w: &AxisId| {
            let (first, own) = (&kernel.axes[*w], *w == id);
            !own && *w < id && first.extent == a.extent && !together(kernel, *w, id)
        };
        let first = whole.iter().copied().find(joins).filter(|w| !names.contains_key(w));
        if mapped.is_none_or(|x| x.whole)
            && let Some(first) = first
            && names.iter().filter(|(_, to)| **to == first).all(|(from, _)| !together(kernel, *from, id))
        {
            names.insert(id, first);
        }
    }
    for id in &whole {
        if !names.contains_key(id) {
            let mapped = m.axis(&kernel.axes[*id].name);
            k.axes[*id].kind = AxisKind::Inner;
            k.axes[*id].block = mapped.map(|x| x.block);
        }
    }
    let mut body = Vec::new();
    for node in std::mem::take(&mut k.body) {
        match node {
            Node::Stream(s) if whole.contains(&s.axis) || names.contains_key(&s.axis) => {
                if s.sequential || s.reverse {
                    let message = format!("the steps of {} follow one another", kernel.axes[s.axis].name);
                    return refuse("whole blocks", message, "leave out `whole` on this axis");
                }
                body.extend(s.body);
            }
            other @ (Node::Stream(_) | Node::Op(_)) => body.push(other),
        }
    }
    k.body = body;
    rename(&mut k, &names);
    Ok(k)
}

/// Whether some operation has both axes. One that reads a tile with one axis at the coordinate of the other has that
/// other alone: it stays the same when they become one.
fn together(kernel: &Kernel, a: AxisId, b: AxisId) -> bool {
    let mut found = false;
    kernel.for_each_op(&mut |op, _| {
        let axes = indices_of(kernel, op, false);
        found |= axes.contains(&a) && axes.contains(&b);
    });
    found
}

/// Every axis an operation has: those it ranges over, those its expressions name, and those of the tiles it reads.
pub(super) fn axes_of(kernel: &Kernel, op: &Op) -> Vec<AxisId> {
    indices_of(kernel, op, true)
}

/// As [`axes_of`]; `own`: whether the axes of tiles count that are read at other axes.
fn indices_of(kernel: &Kernel, op: &Op, own: bool) -> Vec<AxisId> {
    let mut axes: Vec<AxisId> = op.outs().iter().flat_map(|t| kernel.tiles[*t].axes.clone()).collect();
    match op {
        Op::Store { axes: a, .. } => axes.extend(a),
        Op::Reduce { over, .. } => axes.extend(over),
        Op::Contract { a, b, over, .. } => {
            axes.extend(over);
            axes.extend(kernel.tiles[*a].axes.iter().chain(&kernel.tiles[*b].axes));
        }
        Op::Load { .. } | Op::Map { .. } | Op::Scan { .. } => {}
    }
    for root in op.roots() {
        kernel.walk(root, &mut |_, e| match e {
            Expr::Coord(a) => axes.push(*a),
            Expr::TileAt { at, .. } if !own => axes.extend(at.iter().filter_map(|p| match p {
                Place::Axis(a) => Some(*a),
                Place::At(_) => None,
            })),
            Expr::Tile(t) | Expr::TileAt { tile: t, .. } => axes.extend(&kernel.tiles[*t].axes),
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
    axes.sort();
    axes.dedup();
    axes
}

fn rename(k: &mut Kernel, names: &BTreeMap<AxisId, AxisId>) {
    let new = |a: &mut AxisId| *a = names.get(a).copied().unwrap_or(*a);
    for (_, t) in k.tiles.iter_mut() {
        t.axes.iter_mut().for_each(new);
    }
    for (_, e) in k.exprs.iter_mut() {
        match e {
            Expr::Coord(a) => new(a),
            Expr::TileAt { at, .. } => at.iter_mut().for_each(|p| {
                if let Place::Axis(a) = p {
                    new(a);
                }
            }),
            Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Tile(_)
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => {}
        }
    }
    nodes(&mut k.body, &new);
}

fn nodes(body: &mut [Node], new: &impl Fn(&mut AxisId)) {
    for node in body {
        match node {
            Node::Stream(s) => {
                new(&mut s.axis);
                nodes(&mut s.body, new);
            }
            Node::Op(op) => match op {
                Op::Store { axes, .. } => axes.iter_mut().for_each(new),
                Op::Reduce { over, .. } | Op::Contract { over, .. } => over.iter_mut().for_each(new),
                Op::Scan { along, .. } => new(along),
                Op::Load { .. } | Op::Map { .. } => {}
            },
        }
    }
}
