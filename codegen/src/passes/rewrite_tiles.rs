//! Surgery on kernels of the tile IR that the passes on plans share: expressions, operations, and what is left over.

use std::collections::HashMap;

use einfall_ir::arena::{Arena, Id};
use einfall_ir::tile::{AxisId, Expr, ExprId, Kernel, Node, Op, Place, Stream, Tile, TileId};

/// Calls `f` on every node under `root`, parents first; where it gives an expression, that takes the node's place,
/// elsewhere the operands are rewritten.
pub fn rewrite(k: &mut Kernel, root: ExprId, f: &mut impl FnMut(&mut Kernel, ExprId) -> Option<ExprId>) -> ExprId {
    if let Some(new) = f(k, root) {
        return new;
    }
    let old = k.exprs[root].clone();
    let mut operands = Vec::new();
    old.for_each_operand(|e| operands.push(e));
    let new: Vec<ExprId> = operands.iter().map(|&e| rewrite(k, e, f)).collect();
    if new == operands { root } else { k.exprs.push(with_operands(old, &new)) }
}

/// `e` with other operands, in order.
fn with_operands(e: Expr, to: &[ExprId]) -> Expr {
    match e {
        Expr::Int(_) | Expr::Float(_) | Expr::Size(_) | Expr::Coord(_) | Expr::Tile(_) | Expr::TileAt { .. } => e,
        Expr::Read { buffer, .. } => Expr::Read { buffer, at: to.to_vec() },
        Expr::Unary(op, _) => Expr::Unary(op, to[0]),
        Expr::Binary(op, _, _) => Expr::Binary(op, to[0], to[1]),
        Expr::Select(..) => Expr::Select(to[0], to[1], to[2]),
        Expr::Cast(d, _) => Expr::Cast(d, to[0]),
        Expr::Rand(_) => Expr::Rand([to[0], to[1], to[2], to[3], to[4]]),
    }
}

/// Structural equality of two expressions.
pub fn same(k: &Kernel, a: ExprId, b: ExprId) -> bool {
    if a == b {
        return true;
    }
    let (x, y) = (&k.exprs[a], &k.exprs[b]);
    let (mut xs, mut ys) = (Vec::new(), Vec::new());
    x.for_each_operand(|e| xs.push(e));
    y.for_each_operand(|e| ys.push(e));
    let heads =
        with_operands(x.clone(), &vec![a; xs.len().max(5)]) == with_operands(y.clone(), &vec![a; ys.len().max(5)]);
    heads && xs.len() == ys.len() && xs.iter().zip(&ys).all(|(&p, &q)| same(k, p, q))
}

/// The axes the value of `root` varies over, in order of occurrence.
pub fn axes_of(k: &Kernel, root: ExprId) -> Vec<AxisId> {
    let mut found: Vec<AxisId> = Vec::new();
    k.walk(root, &mut |_, e| match e {
        Expr::Coord(a) => found.push(*a),
        Expr::Tile(t) => found.extend(&k.tiles[*t].axes),
        Expr::TileAt { at, .. } => found.extend(at.iter().filter_map(|p| match p {
            Place::Axis(a) => Some(*a),
            Place::At(_) => None,
        })),
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
    let mut axes = Vec::new();
    for a in found {
        if !axes.contains(&a) {
            axes.push(a);
        }
    }
    axes
}

/// Calls `f` on every expression that operations and streams hold, which takes the place of what it gives.
pub fn for_each_root(nodes: &mut [Node], f: &mut impl FnMut(ExprId) -> ExprId) {
    for node in nodes {
        match node {
            Node::Stream(s) => {
                s.filter = s.filter.map(&mut *f);
                for_each_root(&mut s.body, f);
            }
            Node::Op(op) => roots_of(op, f),
        }
    }
}

/// As [`for_each_root`], for one operation.
pub fn roots_of(op: &mut Op, f: &mut impl FnMut(ExprId) -> ExprId) {
    match op {
        Op::Load { at, .. } => at.iter_mut().for_each(|e| *e = f(*e)),
        Op::Store { at, value, when, .. } => {
            at.iter_mut().for_each(|e| *e = f(*e));
            *value = f(*value);
            *when = when.map(f);
        }
        Op::Map { value, .. } | Op::Reduce { value, .. } | Op::Scan { value, .. } => *value = f(*value),
        Op::Contract { .. } => {}
    }
}

/// A new tile; its name gets a number when taken.
pub fn new_tile(k: &mut Kernel, base: &str, like: &Tile) -> TileId {
    let taken = |n: &str| k.tiles.iter().any(|(_, t)| t.name == n) || k.axes.iter().any(|(_, a)| a.name == n);
    let name = (1..).map(|i| if i == 1 { base.to_string() } else { format!("{base}_{i}") }).find(|n| !taken(n));
    k.tiles.push(Tile { name: name.expect("some name is free"), ..like.clone() })
}

/// The kernel without elementwise operations and loads whose tile nothing reads, and without tiles and expressions
/// that nothing uses.
pub fn tidy(mut k: Kernel) -> Kernel {
    loop {
        let mut read = vec![false; k.tiles.len()];
        let kernel = &k;
        let mut see = |root: ExprId, own: Option<TileId>| {
            kernel.walk(root, &mut |_, e| {
                if let Expr::Tile(t) | Expr::TileAt { tile: t, .. } = e
                    && Some(*t) != own
                {
                    read[t.index()] = true;
                }
            });
        };
        streams(&k.body, &mut |s| s.filter.into_iter().for_each(|e| see(e, None)));
        k.for_each_op(&mut |op, _| {
            let own = match op {
                Op::Map { out, .. } => Some(*out),
                Op::Load { .. } | Op::Store { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => None,
            };
            op.roots().into_iter().for_each(|e| see(e, own));
        });
        k.for_each_op(&mut |op, _| match op {
            Op::Contract { a, b, .. } => [*a, *b].iter().for_each(|t| read[t.index()] = true),
            // What joins a value into a tile keeps it; only results nobody reads are dropped here.
            Op::Reduce { out, .. } => out.iter().for_each(|t| read[t.index()] = true),
            Op::Scan { carry, .. } => carry.iter().for_each(|t| read[t.index()] = true),
            Op::Load { .. } | Op::Store { .. } | Op::Map { .. } => {}
        });
        k.for_each_op(&mut |op, _| {
            if let Op::Contract { out, carry: true, .. } = op {
                read[out.index()] = true;
            }
        });
        let mut body = std::mem::take(&mut k.body);
        let dropped = drop_unread(&mut body, &read);
        k.body = body;
        if !dropped {
            return renumbered(&k);
        }
    }
}

fn streams(nodes: &[Node], f: &mut impl FnMut(&Stream)) {
    for node in nodes {
        if let Node::Stream(s) = node {
            f(s);
            streams(&s.body, f);
        }
    }
}

fn drop_unread(nodes: &mut Vec<Node>, read: &[bool]) -> bool {
    let before = nodes.len();
    let mut dropped = false;
    nodes.retain_mut(|node| match node {
        Node::Stream(s) => {
            dropped |= drop_unread(&mut s.body, read);
            true
        }
        Node::Op(Op::Map { out, .. } | Op::Load { out, .. }) => read[out.index()],
        Node::Op(Op::Store { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. }) => true,
    });
    dropped || nodes.len() < before
}

/// The kernel with only the tiles and expressions in use, equal expressions shared.
fn renumbered(k: &Kernel) -> Kernel {
    let mut used = vec![false; k.tiles.len()];
    let mut mark = |root: ExprId| {
        k.walk(root, &mut |_, e| {
            if let Expr::Tile(t) | Expr::TileAt { tile: t, .. } = e {
                used[t.index()] = true;
            }
        });
    };
    streams(&k.body, &mut |s| s.filter.into_iter().for_each(&mut mark));
    k.for_each_op(&mut |op, _| op.roots().into_iter().for_each(&mut mark));
    k.for_each_op(&mut |op, _| {
        op.outs().iter().for_each(|t| used[t.index()] = true);
        match op {
            Op::Contract { a, b, .. } => [*a, *b].iter().for_each(|t| used[t.index()] = true),
            Op::Scan { carry, .. } => carry.iter().for_each(|t| used[t.index()] = true),
            Op::Load { .. } | Op::Store { .. } | Op::Map { .. } | Op::Reduce { .. } => {}
        }
    });
    let mut tiles = Arena::new();
    let mut to: HashMap<TileId, TileId> = HashMap::new();
    for (id, t) in k.tiles.iter().filter(|(id, _)| used[id.index()]) {
        to.insert(id, tiles.push(t.clone()));
    }
    let mut new = Kernel { tiles, exprs: Arena::new(), ..k.clone() };
    let mut body = std::mem::take(&mut new.body);
    let (mut known, mut done) = (HashMap::new(), HashMap::new());
    for_each_root(&mut body, &mut |e| copy(k, &mut new, e, &to, &mut known, &mut done));
    retile(&mut body, &to);
    new.body = body;
    new
}

fn copy(
    from: &Kernel,
    into: &mut Kernel,
    e: ExprId,
    tiles: &HashMap<TileId, TileId>,
    known: &mut HashMap<String, ExprId>,
    done: &mut HashMap<ExprId, ExprId>,
) -> ExprId {
    if let Some(&new) = done.get(&e) {
        return new;
    }
    let mut operands = Vec::new();
    from.exprs[e].for_each_operand(|x| operands.push(x));
    let operands: Vec<ExprId> = operands.into_iter().map(|x| copy(from, into, x, tiles, known, done)).collect();
    let made = match with_operands(from.exprs[e].clone(), &operands) {
        Expr::Tile(t) => Expr::Tile(tiles[&t]),
        Expr::TileAt { tile, at } => Expr::TileAt { tile: tiles[&tile], at },
        other @ (Expr::Int(_)
        | Expr::Float(_)
        | Expr::Size(_)
        | Expr::Coord(_)
        | Expr::Read { .. }
        | Expr::Unary(..)
        | Expr::Binary(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Rand(_)) => other,
    };
    let id = *known.entry(format!("{made:?}")).or_insert_with(|| into.exprs.push(made));
    done.insert(e, id);
    id
}

fn retile(nodes: &mut [Node], to: &HashMap<TileId, TileId>) {
    for node in nodes {
        match node {
            Node::Stream(s) => retile(&mut s.body, to),
            Node::Op(op) => match op {
                Op::Load { out, .. } | Op::Map { out, .. } => *out = to[out],
                Op::Reduce { out, .. } => out.iter_mut().for_each(|t| *t = to[t]),
                Op::Contract { out, a, b, .. } => [out, a, b].into_iter().for_each(|t| *t = to[t]),
                Op::Scan { out, carry, .. } => {
                    *out = to[out];
                    carry.iter_mut().for_each(|t| *t = to[t]);
                }
                Op::Store { .. } => {}
            },
        }
    }
}
