//! Elementwise operations and reductions stand as near as they may to those before them, so that they share loops.
//!
//! Before: `p = exp2(s);  v = load V;  o = carry contract p, v;  l = carry reduce sum p`
//! After:  `p = exp2(s);  l = carry reduce sum p;  v = load V;  o = carry contract p, v`
//!
//! Invariant: an operation passes only loads and contractions that write nothing it touches and read nothing it writes.

use einfall_ir::tile::{Kernel, Node, Op, TileId};

use super::tiles_of;

/// Moves elementwise operations and reductions up, over loads and contractions, to the one before these.
pub(super) fn gather(k: &Kernel) -> Kernel {
    let mut k = k.clone();
    let mut body = std::mem::take(&mut k.body);
    list(&k, &mut body);
    k.body = body;
    k
}

fn list(k: &Kernel, nodes: &mut [Node]) {
    let elementwise = |n: &Node| matches!(n, Node::Op(Op::Map { .. } | Op::Reduce { .. }));
    for i in 0..nodes.len() {
        if let Node::Stream(s) = &mut nodes[i] {
            list(k, &mut s.body);
        }
        if !elementwise(&nodes[i]) {
            continue;
        }
        let mut to = i;
        while to > 0 && passes(k, &nodes[to - 1], &nodes[i]) {
            to -= 1;
        }
        if to > 0 && elementwise(&nodes[to - 1]) {
            nodes[to..=i].rotate_right(1);
        }
    }
}

/// Whether `later` may stand before `earlier`, a load or a contraction.
fn passes(k: &Kernel, earlier: &Node, later: &Node) -> bool {
    let (Node::Op(x @ (Op::Load { .. } | Op::Contract { .. })), Node::Op(y)) = (earlier, later) else { return false };
    let (rx, ry) = (reads(k, x), reads(k, y));
    let touches = |list: &[TileId], op: &Op| op.outs().iter().any(|t| list.contains(t));
    !touches(&ry, x) && !touches(&rx, y) && !touches(x.outs(), y)
}

/// Tiles that an operation reads.
pub(super) fn reads(k: &Kernel, op: &Op) -> Vec<TileId> {
    let mut found = Vec::new();
    for root in op.roots() {
        tiles_of(k, root, &mut |t| found.push(t));
    }
    match op {
        Op::Contract { out, a, b, carry, .. } => {
            found.extend([*a, *b]);
            found.extend(carry.then_some(*out));
        }
        Op::Reduce { out, carry: true, .. } => found.extend(out),
        Op::Scan { carry: Some(c), .. } => found.push(*c),
        Op::Load { .. } | Op::Store { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Scan { .. } => {}
    }
    found
}
