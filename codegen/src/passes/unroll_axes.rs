//! unroll-axes: an inner axis of a few coordinates whose tiles are read at fixed ones becomes a tile per coordinate.
//!
//! Before: `g = contract(p) R, h` over `[a, d]` with a in 4;  `c = sigmoid(g{a = 1}) * c + tanh(g{a = 2})`
//! After:  `g_0 = contract(p) R_0, h; ..; g_3 = ..;  c = sigmoid(g_1) * c + tanh(g_2)`
//!
//! Tiles that instructions distribute over threads have no fixed coordinate at hand, and their rows are not those of two
//! axes at once; each coordinate's contraction is one of plain rows. Invariant: the plan computes the same; an axis that
//! is reduced, scanned or read under another name stays.

use std::collections::BTreeMap;

use einfall_ir::cascade::Size;
use einfall_ir::kernel::atoms::Atom;
use einfall_ir::tile::{AxisId, AxisKind, Expr, ExprId, Kernel, Node, Op, Place, Plan, TileId};

use super::rewrite_tiles::{new_tile, rewrite, roots_of, tidy};

/// The most coordinates an axis is unrolled over.
const MAX_COORDINATES: u64 = 8;

/// Unrolls axes read at fixed coordinates in kernels of contractions for `atoms`.
pub fn unroll_axes(mut plan: Plan, atoms: &[Atom]) -> Plan {
    if atoms.is_empty() {
        return plan;
    }
    for k in 0..plan.kernels.len() {
        let mut kernel = plan.kernels[k].clone();
        let mut contracts = false;
        kernel.for_each_op(&mut |op, _| contracts |= matches!(op, Op::Contract { .. }));
        if !contracts {
            continue;
        }
        for a in kernel.axes.ids().collect::<Vec<_>>() {
            if let Some(n) = extent(&kernel, a).filter(|n| *n <= MAX_COORDINATES && is_read_fixed(&kernel, a)) {
                kernel = tidy(unroll(kernel, a, n));
            }
        }
        plan.kernels[k] = kernel;
    }
    plan
}

fn extent(k: &Kernel, a: AxisId) -> Option<u64> {
    match (&k.axes[a].extent, k.axes[a].kind) {
        (Size::Const(n), AxisKind::Inner) => Some(*n),
        _ => None,
    }
}

/// Whether a tile is read at a fixed coordinate of the axis, and nothing needs the axis whole.
fn is_read_fixed(k: &Kernel, a: AxisId) -> bool {
    let (mut fixed, mut whole) = (false, false);
    let mut see = |root: ExprId| {
        k.walk(root, &mut |_, e| {
            let Expr::TileAt { tile, at } = e else { return };
            for (own, place) in k.tiles[*tile].axes.iter().zip(at) {
                match place {
                    Place::At(_) => fixed |= *own == a,
                    Place::Axis(to) => whole |= own != to && (*own == a || *to == a),
                }
            }
        });
    };
    k.for_each_op(&mut |op, _| op.roots().into_iter().for_each(&mut see));
    k.for_each_op(&mut |op, _| {
        whole |= match op {
            Op::Reduce { over, .. } | Op::Contract { over, .. } => over.contains(&a),
            Op::Scan { along, .. } => *along == a,
            Op::Load { .. } | Op::Store { .. } | Op::Map { .. } => false,
        };
    });
    fixed && !whole
}

fn unroll(mut k: Kernel, a: AxisId, n: u64) -> Kernel {
    let mut parts: BTreeMap<TileId, Vec<TileId>> = BTreeMap::new();
    let whole: Vec<TileId> = k.tiles.iter().filter(|(_, t)| t.axes.contains(&a)).map(|(id, _)| id).collect();
    for t in whole {
        let mut like = k.tiles[t].clone();
        like.axes.retain(|x| *x != a);
        parts.insert(t, (0..n).map(|v| new_tile(&mut k, &format!("{}_{v}", like.name), &like)).collect());
    }
    let mut body = std::mem::take(&mut k.body);
    nodes(&mut k, &mut body, a, n, &parts);
    k.body = body;
    k
}

fn nodes(k: &mut Kernel, list: &mut Vec<Node>, a: AxisId, n: u64, parts: &BTreeMap<TileId, Vec<TileId>>) {
    let mut made = Vec::with_capacity(list.len());
    for node in list.drain(..) {
        match node {
            Node::Stream(mut s) => {
                nodes(k, &mut s.body, a, n, parts);
                made.push(Node::Stream(s));
            }
            Node::Op(op) => {
                let has = match &op {
                    Op::Store { axes, .. } => axes.contains(&a),
                    Op::Load { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {
                        op.outs().iter().any(|t| parts.contains_key(t))
                    }
                };
                for v in 0..if has { n } else { 1 } {
                    made.push(Node::Op(one(k, op.clone(), a, has.then_some(v), parts)));
                }
            }
        }
    }
    *list = made;
}

/// The operation at one coordinate, or one that does not range over the axis.
fn one(k: &mut Kernel, mut op: Op, a: AxisId, v: Option<u64>, parts: &BTreeMap<TileId, Vec<TileId>>) -> Op {
    let part = |t: TileId, at: Option<u64>| match (parts.get(&t), at) {
        (Some(list), Some(v)) => list[v as usize],
        _ => t,
    };
    roots_of(&mut op, &mut |root| {
        rewrite(k, root, &mut |k, e| match k.exprs[e].clone() {
            Expr::Coord(x) if x == a => v.map(|v| k.exprs.push(Expr::Int(v as i64))),
            Expr::Tile(t) if parts.contains_key(&t) => Some(k.exprs.push(Expr::Tile(part(t, v)))),
            Expr::TileAt { tile, mut at } if parts.contains_key(&tile) => {
                let own = k.tiles[tile].axes.clone();
                let place = own.iter().position(|x| *x == a)?;
                let coordinate = match at.remove(place) {
                    Place::At(c) => Some(c),
                    Place::Axis(_) => v,
                };
                let new = part(tile, coordinate);
                let rest = &k.tiles[new].axes;
                let plain = rest.iter().zip(&at).all(|(x, p)| *p == Place::Axis(*x));
                Some(k.exprs.push(if plain { Expr::Tile(new) } else { Expr::TileAt { tile: new, at } }))
            }
            _ => None,
        })
    });
    match &mut op {
        Op::Load { out, .. } | Op::Map { out, .. } => *out = part(*out, v),
        Op::Reduce { out, .. } => out.iter_mut().for_each(|t| *t = part(*t, v)),
        Op::Contract { out, a, b, .. } => [out, a, b].into_iter().for_each(|t| *t = part(*t, v)),
        Op::Scan { out, carry, .. } => {
            *out = part(*out, v);
            carry.iter_mut().for_each(|t| *t = part(*t, v));
        }
        Op::Store { axes, .. } => axes.retain(|x| *x != a),
    }
    op
}
