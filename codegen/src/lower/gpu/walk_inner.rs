//! walk-inner: an operation over an inner axis that no block holds whole becomes a stream over that axis.
//!
//! ```text
//! store y[m, k] = x[m, k] / r0 over m, k      (inner k, block 1024)
//! →  for k { store y[m, k] = x[m, k] / r0 over m, k }
//! C = reduce sum(t) mask[b, t]                (inner t)
//! →  C = 0.0;  for t { C = carry reduce sum(t) mask[b, t] }
//! ```
//! Streams in streams have no lowering: a stream of few steps is written out, step by step, where something in it must be
//! walked (the maxima of a top-k). An axis without a block of its own takes that of an axis of its extent.
//! Invariant: an axis becomes a stream's if a stream walks it in every operation that has it; an inner axis left is whole
//! in its block, by its fixed extent or by what the variant assumes.

use einfall_ir::mapping::KernelMapping;
use einfall_ir::ops::ReduceOp;
use einfall_ir::tile::{AxisId, AxisKind, Expr, Kernel, Node, Op, Plan, Stream};

use super::apply_mapping::fixed;
use super::hold_rows::axes_of;
use super::{Step, refuse};
use crate::identity::tile_constant;
use crate::passes::rewrite_tiles::{rewrite, roots_of};

/// Steps of a stream that is written out, at most.
const STEPS: u64 = 16;

/// Applies the pass.
///
/// # Errors
/// An axis that is not whole in its block where no stream can walk it.
pub(super) fn run(plan: &Plan, kernel: &Kernel, m: &KernelMapping) -> Step<Kernel> {
    let mut k = kernel.clone();
    let mut walked = Vec::new();
    for (id, a) in kernel.axes.iter().filter(|(_, a)| a.kind == AxisKind::Inner && a.block.is_none()) {
        let mapped = m.axis(&a.name).map(|x| x.block);
        let whole = fixed(&a.extent, &plan.ranks).is_some_and(|n| mapped.is_none_or(|b| b >= n));
        let held = kernel.tiles.iter().any(|(_, t)| t.axes.contains(&id));
        if !whole && !held {
            walked.push(id);
        }
    }
    write_out(plan, &mut k, &walked);
    let candidates = walked.clone();
    walked.retain(|a| k.body.iter().all(|n| is_cut_by(&k, n, *a, &candidates)));
    if let Some(a) =
        candidates.iter().find(|a| !walked.contains(a) && !m.axis(&k.axes[**a].name).is_some_and(|x| x.whole))
    {
        let message = format!("axis {} of kernel {} is walked within another stream", k.axes[*a].name, k.name);
        return refuse("nested streams", message, "hold it `whole` in its block, fix its extent, or run it on the CPU");
    }
    let mut body = Vec::new();
    for node in std::mem::take(&mut k.body) {
        let axis = match &node {
            Node::Op(op) => {
                let axes = axes_of(&k, op);
                let mut found = walked.iter().copied().filter(|a| axes.contains(a));
                found.next().filter(|_| found.next().is_none())
            }
            Node::Stream(_) => None,
        };
        match (node, axis) {
            (Node::Op(op @ Op::Store { .. }), Some(axis)) => body.push(stream(axis, op)),
            (Node::Op(Op::Reduce { out, op, value, over, carry: false }), Some(axis)) if over == [axis] => {
                let start = if op.selects_argument() { bound(op) } else { op.identity() };
                let first = k.exprs.push(tile_constant(start, k.tiles[out[0]].dtype));
                body.push(Node::Op(Op::Map { out: out[0], value: first }));
                if let Some(place) = out.get(1) {
                    let none = k.exprs.push(Expr::Int(-1));
                    body.push(Node::Op(Op::Map { out: *place, value: none }));
                }
                body.push(stream(axis, Op::Reduce { out, op, value, over, carry: true }));
            }
            (node, _) => body.push(node),
        }
    }
    k.body = body;
    for a in candidates {
        if walked.contains(&a) {
            k.axes[a].kind = AxisKind::Stream;
        }
        let same = kernel.axes.iter().filter(|(id, x)| *id != a && x.extent == kernel.axes[a].extent);
        let borrowed = same.filter_map(|(_, x)| m.axis(&x.name)).find(|x| !x.whole);
        if m.axis(&k.axes[a].name).is_none() {
            k.axes[a].block = borrowed.map(|x| x.block);
        }
    }
    Ok(k)
}

/// Writes out streams of few steps around operations that have one of `axes`.
fn write_out(plan: &Plan, k: &mut Kernel, axes: &[AxisId]) {
    let mut body = Vec::new();
    for node in std::mem::take(&mut k.body) {
        match node {
            Node::Stream(s) if can_be_written_out(plan, k, &s, axes) => {
                for step in 0..fixed(&k.axes[s.axis].extent, &plan.ranks).unwrap_or(0) {
                    let at = k.exprs.push(Expr::Int(step as i64));
                    body.extend(s.body.iter().cloned().map(|mut node| {
                        if let Node::Op(op) = &mut node {
                            let here = |k: &Kernel, e| (k.exprs[e] == Expr::Coord(s.axis)).then_some(at);
                            roots_of(op, &mut |e| rewrite(k, e, &mut |k, e| here(k, e)));
                        }
                        node
                    }));
                }
            }
            node @ (Node::Stream(_) | Node::Op(_)) => body.push(node),
        }
    }
    k.body = body;
}

fn can_be_written_out(plan: &Plan, k: &Kernel, s: &Stream, axes: &[AxisId]) -> bool {
    let ranges = |op: &Op| match op {
        Op::Store { axes, .. } => axes.contains(&s.axis),
        Op::Reduce { over, .. } | Op::Contract { over, .. } => over.contains(&s.axis),
        Op::Scan { along, .. } => *along == s.axis,
        Op::Load { .. } | Op::Map { .. } => false,
    };
    s.sequential
        && !s.reverse
        && s.filter.is_none()
        && fixed(&k.axes[s.axis].extent, &plan.ranks).is_some_and(|n| n <= STEPS)
        && s.body.iter().any(|n| axes.iter().any(|a| has(k, n, *a)))
        && s.body.iter().all(|n| matches!(n, Node::Op(op) if !ranges(op)))
        && !k.tiles.iter().any(|(_, t)| t.axes.contains(&s.axis))
}

/// Whether a part of the body that has `axis` can be cut along it, of the axes `among` along it alone.
fn is_cut_by(k: &Kernel, node: &Node, axis: AxisId, among: &[AxisId]) -> bool {
    match node {
        Node::Op(op) => {
            let axes = axes_of(k, op);
            let form = match op {
                Op::Store { .. } => true,
                Op::Reduce { over, carry, .. } => *over == [axis] && !carry,
                Op::Load { .. } | Op::Map { .. } | Op::Contract { .. } | Op::Scan { .. } => false,
            };
            !axes.contains(&axis) || (form && among.iter().filter(|a| axes.contains(a)).count() == 1)
        }
        Node::Stream(s) => !s.body.iter().any(|n| has(k, n, axis)),
    }
}

fn has(k: &Kernel, node: &Node, axis: AxisId) -> bool {
    match node {
        Node::Op(op) => axes_of(k, op).contains(&axis),
        Node::Stream(s) => s.body.iter().any(|n| has(k, n, axis)),
    }
}

/// What an argument selection's value starts from.
fn bound(op: ReduceOp) -> f64 {
    if op == ReduceOp::ArgMin { f64::INFINITY } else { f64::NEG_INFINITY }
}

fn stream(axis: AxisId, op: Op) -> Node {
    Node::Stream(Stream { axis, reverse: false, sequential: false, filter: None, body: vec![Node::Op(op)] })
}
