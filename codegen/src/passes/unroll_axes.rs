//! unroll-axes: an inner axis of a few coordinates whose tiles are read at fixed ones becomes a tile per coordinate.
//!
//! Before: `g = contract(p) R, h` over `[a, d]` with a in 4;  `c = sigmoid(g{a = 1}) * c + tanh(g{a = 2})`
//! After:  `g_0 = contract(p) R_0, h; ..; g_3 = ..;  c = sigmoid(g_1) * c + tanh(g_2)`
//!
//! A short stream that reads tiles at its own coordinate is written out first, so that these coordinates are fixed too:
//! `for part in 4 { c = join(c, c_part{lane = part}) }` becomes `c = join(c, c_part_0); ..; c = join(c, c_part_3)`.
//!
//! Tiles that instructions distribute over threads have no fixed coordinate at hand, and their rows are not those of two
//! axes at once; each coordinate's contraction is one of plain rows. Where the parts of a fold lie side by side, one thread
//! holds them all. Invariant: the plan computes the same; an axis that is reduced, scanned or read under another name stays.

use std::collections::BTreeMap;

use einfall_ir::cascade::Size;
use einfall_ir::kernel::atoms::Atom;
use einfall_ir::tile::{AxisId, AxisKind, Expr, ExprId, Kernel, Node, Op, Place, Plan, Stream, TileId};

use super::rewrite_tiles::{new_tile, rewrite, roots_of, tidy};

/// The most coordinates an axis is unrolled over in a kernel of contractions.
const MAX_COORDINATES: u64 = 8;
/// The most steps of a stream that is written out.
const MAX_STEPS: u64 = 16;

/// Unrolls axes read at fixed coordinates in kernels of contractions for `atoms`.
pub fn unroll_axes(mut plan: Plan, atoms: &[Atom]) -> Plan {
    if atoms.is_empty() {
        return plan;
    }
    for k in 0..plan.kernels.len() {
        let mut kernel = plan.kernels[k].clone();
        let mut contracts = false;
        kernel.for_each_op(&mut |op, _| contracts |= matches!(op, Op::Contract { .. }));
        let written = write_out(&mut kernel);
        if !contracts && !written {
            continue;
        }
        let most = if written { MAX_STEPS } else { MAX_COORDINATES };
        for a in kernel.axes.ids().collect::<Vec<_>>() {
            if let Some(n) = extent(&kernel, a).filter(|n| *n <= most && is_read_fixed(&kernel, a)) {
                kernel = tidy(unroll(kernel, a, n));
            }
        }
        plan.kernels[k] = kernel;
    }
    plan
}

/// Writes out short streams that read tiles at their own coordinate; whether there were any.
fn write_out(k: &mut Kernel) -> bool {
    let (mut body, mut written) = (Vec::new(), false);
    for node in std::mem::take(&mut k.body) {
        let Node::Stream(s) = node else {
            body.push(node);
            continue;
        };
        let steps = match k.axes[s.axis].extent {
            Size::Const(n) if n <= MAX_STEPS && reads_at_its_coordinate(k, &s) => n,
            _ => {
                body.push(Node::Stream(s));
                continue;
            }
        };
        written = true;
        for step in 0..steps {
            for node in &s.body {
                let Node::Op(op) = node else { continue };
                let mut op = op.clone();
                roots_of(&mut op, &mut |root| {
                    rewrite(k, root, &mut |k, e| match k.exprs[e].clone() {
                        Expr::Coord(x) if x == s.axis => Some(k.exprs.push(Expr::Int(step as i64))),
                        Expr::TileAt { tile, mut at } if at.contains(&Place::Axis(s.axis)) => {
                            at.iter_mut().filter(|p| **p == Place::Axis(s.axis)).for_each(|p| *p = Place::At(step));
                            Some(k.exprs.push(Expr::TileAt { tile, at }))
                        }
                        _ => None,
                    })
                });
                body.push(Node::Op(op));
            }
        }
    }
    k.body = body;
    written
}

/// Whether a stream walks point after point, forward, over operations alone that read a tile along another axis at its
/// coordinate and have no elements along it.
fn reads_at_its_coordinate(k: &Kernel, s: &Stream) -> bool {
    let mut reads = false;
    let plain =
        s.sequential && !s.reverse && s.filter.is_none() && !k.tiles.iter().any(|(_, t)| t.axes.contains(&s.axis));
    let maps = s.body.iter().all(|node| {
        let Node::Op(op @ Op::Map { .. }) = node else { return false };
        for root in op.roots() {
            k.walk(root, &mut |_, e| {
                if let Expr::TileAt { tile, at } = e {
                    reads |=
                        k.tiles[*tile].axes.iter().zip(at).any(|(own, p)| *own != s.axis && *p == Place::Axis(s.axis));
                }
            });
        }
        true
    });
    plain && maps && reads
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
    // Elementwise operations in a row go coordinate by coordinate, so that what is between them is held of one at a time.
    let mut run: Vec<Op> = Vec::new();
    let flush = |k: &mut Kernel, run: &mut Vec<Op>, made: &mut Vec<Node>| {
        made.extend(
            (0..n)
                .flat_map(|v| run.iter().map(move |op| (v, op)))
                .map(|(v, op)| Node::Op(one(k, op.clone(), a, Some(v), parts))),
        );
        run.clear();
    };
    for node in list.drain(..) {
        match node {
            Node::Stream(mut s) => {
                flush(k, &mut run, &mut made);
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
                let alone = !has || !matches!(op, Op::Map { .. }) || reads_others(k, &op, parts);
                if alone {
                    flush(k, &mut run, &mut made);
                }
                match has {
                    true => run.push(op),
                    false => made.push(Node::Op(one(k, op, a, None, parts))),
                }
                if alone {
                    flush(k, &mut run, &mut made);
                }
            }
        }
    }
    flush(k, &mut run, &mut made);
    *list = made;
}

/// Whether an operation reads a tile of several parts at a fixed coordinate.
fn reads_others(k: &Kernel, op: &Op, parts: &BTreeMap<TileId, Vec<TileId>>) -> bool {
    let mut others = false;
    for root in op.roots() {
        k.walk(root, &mut |_, e| {
            if let Expr::TileAt { tile, at } = e {
                others |= parts.contains_key(tile) && at.iter().any(|p| matches!(p, Place::At(_)));
            }
        });
    }
    others
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
