//! What the cascade passes share: substitution, structural equality, occurrence, new names and statements.

use std::collections::HashMap;

use einfall_ir::arena::Id;
use einfall_ir::cascade::{
    Cascade, Einsum, Expr, ExprId, Index, IndexId, IndexKind, Size, Storage, Target, Tensor, TensorId, TensorKind,
};
use einfall_ir::diag::Span;
use einfall_ir::dtype::DType;

/// `base`, or `base` with the lowest number that makes it a name of nothing in the cascade.
fn fresh_name(c: &Cascade, base: &str) -> String {
    let taken = |n: &str| {
        c.tensor(n).is_some()
            || c.rank(n).is_some()
            || c.indices.iter().any(|(_, i)| i.name == n)
            || c.monoids.iter().any(|(_, m)| m.name == n)
    };
    (0..).map(|k| format!("{base}{k}")).find(|n| !taken(n)).expect("some number is free")
}

/// A new intermediate tensor.
pub fn intermediate(c: &mut Cascade, base: &str, dtype: DType, dims: Vec<Size>, span: Span) -> TensorId {
    let name = fresh_name(c, base);
    c.tensors.push(Tensor {
        name,
        docs: Vec::new(),
        dtype,
        declared: false,
        storage: Storage::default(),
        dims,
        kind: TensorKind::Intermediate,
        default: None,
        span,
    })
}

/// A new index over `extent`, and its value.
pub fn fresh_index(c: &mut Cascade, base: &str, extent: Size, kind: IndexKind, span: Span) -> (IndexId, ExprId) {
    let name = fresh_name(c, base);
    let rank = match extent {
        Size::Rank(r) => Some(r),
        _ => None,
    };
    let index = c.indices.push(Index { name, extent, rank, kind, span });
    (index, c.push_expr(Expr::Index(index), span))
}

/// `tensor[at] = value` for every point of `free`.
pub fn assign(tensor: TensorId, at: Vec<ExprId>, free: Vec<IndexId>, value: ExprId, span: Span) -> Einsum {
    Einsum { targets: vec![Target { tensor, at }], value, filter: None, otherwise: None, join: None, free, span }
}

/// Whether index `i` occurs free under `root`.
pub fn mentions(c: &Cascade, root: ExprId, i: IndexId) -> bool {
    let mut found = false;
    c.walk(root, &mut |_, e| {
        found |= match e {
            Expr::Index(j) => *j == i,
            Expr::Segment { of, .. } => *of == i,
            Expr::Scan { over, .. } => *over == i,
            Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Tuple(_)
            | Expr::Reduce { .. }
            | Expr::Rand { .. } => false,
        }
    });
    found
}

/// Structural equality of two expressions of one cascade.
pub fn same(c: &Cascade, a: ExprId, b: ExprId) -> bool {
    if a == b {
        return true;
    }
    let (x, y) = (&c.exprs[a], &c.exprs[b]);
    let (mut xs, mut ys) = (Vec::new(), Vec::new());
    x.for_each_operand(|e| xs.push(e));
    y.for_each_operand(|e| ys.push(e));
    same_head(x, y) && xs.len() == ys.len() && xs.iter().zip(&ys).all(|(&p, &q)| same(c, p, q))
}

/// Whether two nodes agree in everything but their operands.
fn same_head(x: &Expr, y: &Expr) -> bool {
    match (x, y) {
        (Expr::Int(a), Expr::Int(b)) => a == b,
        (Expr::Float(a), Expr::Float(b)) => a.to_bits() == b.to_bits(),
        (Expr::Size(a), Expr::Size(b)) => a == b,
        (Expr::Index(a), Expr::Index(b)) => a == b,
        (Expr::Read { tensor: a, .. }, Expr::Read { tensor: b, .. }) => a == b,
        (Expr::Unary(a, _), Expr::Unary(b, _)) => a == b,
        (Expr::Binary(a, ..), Expr::Binary(b, ..)) => a == b,
        (Expr::Cast(a, _), Expr::Cast(b, _)) => a == b,
        (Expr::Reduce { op: a, over: i, .. }, Expr::Reduce { op: b, over: j, .. }) => a == b && i == j,
        (Expr::Scan { op: a, over: i, .. }, Expr::Scan { op: b, over: j, .. }) => a == b && i == j,
        (Expr::Segment { offsets: a, of: i }, Expr::Segment { offsets: b, of: j }) => a == b && i == j,
        (Expr::Select(..), Expr::Select(..)) | (Expr::Tuple(_), Expr::Tuple(_)) => true,
        // Two draws at equal coordinates are equal.
        (Expr::Rand { .. }, Expr::Rand { .. }) => true,
        _ => false,
    }
}

/// `root` with indices replaced by expressions; shares what does not change.
pub fn substitute(c: &mut Cascade, root: ExprId, map: &HashMap<IndexId, ExprId>) -> ExprId {
    rewrite(c, root, &mut |c, _, e| match e {
        Expr::Index(i) => map.get(i).copied(),
        Expr::Reduce { op, over, body } if over.iter().any(|i| map.contains_key(i)) => {
            // Bound indices may be renamed to other indices, never to expressions.
            let over = over.iter().map(|i| renamed(c, map, *i)).collect();
            let (op, body) = (*op, substitute(c, *body, map));
            let span = c.spans[root.index()];
            Some(c.push_expr(Expr::Reduce { op, over, body }, span))
        }
        Expr::Segment { offsets, of } => {
            let (offsets, of) = (*offsets, renamed(c, map, *of));
            let span = c.spans[root.index()];
            Some(c.push_expr(Expr::Segment { offsets, of }, span))
        }
        Expr::Scan { op, over, body } => {
            let (op, over, body) = (*op, renamed(c, map, *over), substitute(c, *body, map));
            let span = c.spans[root.index()];
            Some(c.push_expr(Expr::Scan { op, over, body }, span))
        }
        Expr::Int(_)
        | Expr::Float(_)
        | Expr::Size(_)
        | Expr::Read { .. }
        | Expr::Unary(..)
        | Expr::Binary(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Tuple(_)
        | Expr::Reduce { .. }
        | Expr::Rand { .. } => None,
    })
}

fn renamed(c: &Cascade, map: &HashMap<IndexId, ExprId>, i: IndexId) -> IndexId {
    match map.get(&i).map(|&e| &c.exprs[e]) {
        Some(Expr::Index(j)) => *j,
        _ => i,
    }
}

/// Rebuilds `root` top-down: where `f` answers, its answer replaces the node; elsewhere operands are rewritten.
pub fn rewrite(
    c: &mut Cascade,
    root: ExprId,
    f: &mut impl FnMut(&mut Cascade, ExprId, &Expr) -> Option<ExprId>,
) -> ExprId {
    let expr = c.exprs[root].clone();
    if let Some(new) = f(c, root, &expr) {
        return new;
    }
    let mut changed = false;
    let mut go = |c: &mut Cascade, e: ExprId| {
        let new = rewrite(c, e, f);
        changed |= new != e;
        new
    };
    let new = match expr {
        Expr::Int(_) | Expr::Float(_) | Expr::Size(_) | Expr::Index(_) | Expr::Segment { .. } => return root,
        Expr::Read { tensor, at } => Expr::Read { tensor, at: at.into_iter().map(|a| go(c, a)).collect() },
        Expr::Unary(op, a) => Expr::Unary(op, go(c, a)),
        Expr::Cast(d, a) => Expr::Cast(d, go(c, a)),
        Expr::Binary(op, a, b) => Expr::Binary(op, go(c, a), go(c, b)),
        Expr::Select(x, a, b) => Expr::Select(go(c, x), go(c, a), go(c, b)),
        Expr::Tuple(items) => Expr::Tuple(items.into_iter().map(|a| go(c, a)).collect()),
        Expr::Reduce { op, over, body } => Expr::Reduce { op, over, body: go(c, body) },
        Expr::Scan { op, over, body } => Expr::Scan { op, over, body: go(c, body) },
        Expr::Rand { seed, coords } => {
            Expr::Rand { seed: go(c, seed), coords: coords.into_iter().map(|a| go(c, a)).collect() }
        }
    };
    if changed {
        let span = c.spans[root.index()];
        c.push_expr(new, span)
    } else {
        root
    }
}
