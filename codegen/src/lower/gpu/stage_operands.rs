//! stage-operands: an operand that a step computes into shared memory is a copy, where other operations use it too.
//!
//! ```text
//! p = exp(s - x); l = carry reduce sum(n) p; o = carry contract(n) p, v          (tile p in shared)
//! →  p = exp(s - x); p_operand = p; l = carry reduce sum(n) p; o = carry contract(n) p_operand, v
//!                                                                                  (tile p_operand in shared)
//! ```
//! What threads hold they go on using from their registers; only the contraction reads what others wrote. Invariant: the
//! plan computes the same; tiles that contractions alone read stay as they are.

use einfall_ir::mapping::{Mapping, OpMapping};
use einfall_ir::tile::{Expr, Kernel, Node, Op, Plan, Space, TileId};

use crate::passes::rewrite_tiles::new_tile;

/// Applies the pass: the plan with the copies, and the mapping with entries for them.
pub fn run(plan: &Plan, mapping: &Mapping) -> (Plan, Mapping) {
    let (mut plan, mut mapping) = (plan.clone(), mapping.clone());
    for m in &mut mapping.kernels {
        let Some(at) = plan.kernels.iter().position(|k| k.name == m.kernel) else { continue };
        let names = plan.kernels[at].op_names(&plan);
        let kernel = &mut plan.kernels[at];
        for entry in m.tiles.iter_mut().filter(|t| t.space == Space::Shared && t.engine.is_none()) {
            let Some(tile) = kernel.tiles.iter().find(|(_, t)| t.name == entry.tile).map(|(id, _)| id) else {
                continue;
            };
            let Some(writer) = writer(kernel, tile).filter(|_| shared_use(kernel, tile)) else { continue };
            let like = kernel.tiles[tile].clone();
            let copy = new_tile(kernel, &format!("{}_operand", like.name), &like);
            let name = kernel.tiles[copy].name.clone();
            if let Some(own) = m.ops.iter().find(|o| o.op == names[writer]).cloned() {
                m.ops.push(OpMapping { op: name.clone(), ..own });
            }
            entry.tile = name;
            let value = kernel.exprs.push(Expr::Tile(tile));
            let mut body = std::mem::take(&mut kernel.body);
            copied(&mut body, tile, &Op::Map { out: copy, value });
            kernel.body = body;
        }
    }
    (plan, mapping)
}

/// The number of the only operation that writes the tile, an elementwise one.
fn writer(k: &Kernel, tile: TileId) -> Option<usize> {
    let (mut writers, mut n) = (Vec::new(), 0);
    k.for_each_op(&mut |op, _| {
        if op.outs().contains(&tile) {
            writers.push((n, matches!(op, Op::Map { .. })));
        }
        n += 1;
    });
    match writers.as_slice() {
        [(n, true)] => Some(*n),
        _ => None,
    }
}

/// Whether a contraction reads the tile, and something else does too.
fn shared_use(k: &Kernel, tile: TileId) -> bool {
    let (mut multiplied, mut other) = (false, false);
    k.for_each_op(&mut |op, _| {
        multiplied |= matches!(op, Op::Contract { a, b, .. } if [a, b].contains(&&tile));
        for root in op.roots() {
            k.walk(root, &mut |_, e| {
                other |= matches!(e, Expr::Tile(t) | Expr::TileAt { tile: t, .. } if *t == tile);
            });
        }
    });
    multiplied && other
}

/// Puts `copy` behind what writes the tile, and has contractions read it.
fn copied(nodes: &mut Vec<Node>, tile: TileId, copy: &Op) {
    let mut written = None;
    for (i, node) in nodes.iter_mut().enumerate() {
        match node {
            Node::Stream(s) => copied(&mut s.body, tile, copy),
            Node::Op(Op::Contract { a, b, .. }) => {
                for t in [a, b].into_iter().filter(|t| **t == tile) {
                    *t = copy.outs()[0];
                }
            }
            Node::Op(op) if op.outs().contains(&tile) => written = Some(i),
            Node::Op(_) => {}
        }
    }
    if let Some(i) = written {
        nodes.insert(i + 1, Node::Op(copy.clone()));
    }
}
