//! walk-inner: an operation over an inner axis that no block holds whole becomes a stream over that axis.
//!
//! ```text
//! store y[m, k] = x[m, k] / r0 over m, k      (inner k, block 1024)
//! →  for k { store y[m, k] = x[m, k] / r0 over m, k }
//! C = reduce sum(t) mask[b, t]                (inner t)
//! →  C = 0.0;  for t { C = carry reduce sum(t) mask[b, t] }
//! ```
//! An axis without a block of its own takes that of an axis of its extent. Invariant: an inner axis left is whole in its
//! block, by its fixed extent or by what the variant assumes.

use einfall_ir::mapping::KernelMapping;
use einfall_ir::ops::ReduceOp;
use einfall_ir::tile::{AxisId, AxisKind, Expr, Kernel, Node, Op, Plan, Stream};

use super::apply_mapping::fixed;
use super::hold_rows::axes_of;

/// Applies the pass.
pub(super) fn run(plan: &Plan, kernel: &Kernel, m: &KernelMapping) -> Kernel {
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
                let first = k.exprs.push(Expr::Float(start));
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
    for a in walked {
        k.axes[a].kind = AxisKind::Stream;
        let same = kernel.axes.iter().filter(|(id, x)| *id != a && x.extent == kernel.axes[a].extent);
        let borrowed = same.filter_map(|(_, x)| m.axis(&x.name)).find(|x| !x.whole);
        if m.axis(&k.axes[a].name).is_none() {
            k.axes[a].block = borrowed.map(|x| x.block);
        }
    }
    k
}

/// What an argument selection's value starts from.
fn bound(op: ReduceOp) -> f64 {
    if op == ReduceOp::ArgMin { f64::INFINITY } else { f64::NEG_INFINITY }
}

fn stream(axis: AxisId, op: Op) -> Node {
    Node::Stream(Stream { axis, reverse: false, sequential: false, filter: None, body: vec![Node::Op(op)] })
}
