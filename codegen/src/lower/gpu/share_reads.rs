//! share-reads: an array element that several operations of one straight piece of code read is loaded once.
//!
//! ```text
//! r0 = carry reduce max(k) x[m, k]
//! r1 = carry reduce sum(k) exp(x[m, k] - r0)
//! →  x_r = load x[m, k]
//!    r0 = carry reduce max(k) x_r
//!    r1 = carry reduce sum(k) exp(x_r - r0)
//! ```
//! Invariant: an array that the kernel stores to is left alone.

use std::collections::BTreeMap;

use einfall_ir::arena::Id;
use einfall_ir::tile::print::expr_text;
use einfall_ir::tile::{AxisId, AxisKind, BufferId, Expr, ExprId, Kernel, Node, Op, Plan, Tile};

/// Applies the pass.
pub(super) fn run(plan: &Plan, kernel: &Kernel) -> Kernel {
    let mut k = kernel.clone();
    let mut stored = Vec::new();
    k.for_each_op(&mut |op, _| {
        if let Op::Store { buffer, .. } = op {
            stored.push(*buffer);
        }
    });
    let body = std::mem::take(&mut k.body);
    k.body = piece(plan, &mut k, body, &stored, None);
    k
}

/// What is read: the array and the text of its position.
type Element = (BufferId, String);

/// One list of nodes; in a stream's body only what changes with its axis is shared.
fn piece(plan: &Plan, k: &mut Kernel, body: Vec<Node>, stored: &[BufferId], walked: Option<AxisId>) -> Vec<Node> {
    // Readers of each element, by the place of the operation in the list.
    let mut readers: BTreeMap<Element, (Vec<usize>, Vec<ExprId>)> = BTreeMap::new();
    for (i, node) in body.iter().enumerate() {
        let Node::Op(op) = node else { continue };
        for root in op.roots() {
            k.walk(root, &mut |id, e| {
                if let Expr::Read { buffer, at } = e
                    && !at.is_empty()
                    && !stored.contains(buffer)
                {
                    let text: Vec<String> = at.iter().map(|x| expr_text(plan, k, *x)).collect();
                    let entry = readers.entry((*buffer, text.join(", "))).or_default();
                    entry.0.push(i);
                    entry.1.push(id);
                }
            });
        }
    }
    let mut loads: BTreeMap<usize, Vec<Op>> = BTreeMap::new();
    for ((buffer, _), (places, exprs)) in readers {
        let first = places[0];
        if places.iter().all(|p| *p == first) {
            continue;
        }
        let Expr::Read { at, .. } = k.exprs[exprs[0]].clone() else { continue };
        let mut axes = Vec::new();
        let mut plain = true;
        for x in &at {
            k.walk(*x, &mut |_, e| match e {
                Expr::Coord(a) => axes.push(*a),
                Expr::Tile(_) | Expr::TileAt { .. } => plain = false,
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
        axes.sort_by_key(|a| a.index());
        axes.dedup();
        // What varies over grid axes only stays uniform where it is.
        let varies = axes.iter().any(|a| k.axes[*a].kind != AxisKind::Grid);
        if !plain || !varies || walked.is_some_and(|w| !axes.contains(&w)) {
            continue;
        }
        let mut name = format!("{}_r", plan.buffers[buffer].name);
        while k.tiles.iter().any(|(_, t)| t.name == name) {
            name.push('r');
        }
        let out = k.tiles.push(Tile { name, dtype: plan.buffers[buffer].dtype, axes, space: None, exact: false });
        // What the position reads may be shared too, so that it is copied before uses are replaced.
        let at = at.iter().map(|x| copy(k, *x)).collect();
        for e in exprs {
            k.exprs[e] = Expr::Tile(out);
        }
        loads.entry(first).or_default().push(Op::Load { out, buffer, at });
    }
    let mut out = Vec::new();
    for (i, node) in body.into_iter().enumerate() {
        out.extend(loads.remove(&i).into_iter().flatten().map(Node::Op));
        out.push(match node {
            Node::Stream(mut s) => {
                s.body = piece(plan, k, std::mem::take(&mut s.body), stored, Some(s.axis));
                Node::Stream(s)
            }
            Node::Op(op) => Node::Op(op),
        });
    }
    out
}

/// The expression again, with operands of its own.
fn copy(k: &mut Kernel, e: ExprId) -> ExprId {
    let again = match k.exprs[e].clone() {
        e @ (Expr::Int(_) | Expr::Float(_) | Expr::Size(_) | Expr::Coord(_) | Expr::Tile(_) | Expr::TileAt { .. }) => e,
        Expr::Read { buffer, at } => Expr::Read { buffer, at: at.into_iter().map(|x| copy(k, x)).collect() },
        Expr::Unary(op, a) => Expr::Unary(op, copy(k, a)),
        Expr::Binary(op, a, b) => Expr::Binary(op, copy(k, a), copy(k, b)),
        Expr::Select(c, a, b) => Expr::Select(copy(k, c), copy(k, a), copy(k, b)),
        Expr::Cast(d, a) => Expr::Cast(d, copy(k, a)),
        Expr::Rand(of) => Expr::Rand(of.map(|e| copy(k, e))),
    };
    k.exprs.push(again)
}
