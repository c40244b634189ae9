//! extract-reductions: a statement is either elementwise or one reduction of an elementwise body.
//!
//! Before: `S[m,n] = scale * (sum(e) Q[m,e] * K[n,e])`
//! After:  `s0[m,n] = sum(e) Q[m,e] * K[n,e];  S[m,n] = scale * s0[m,n]`
//!
//! Equal reductions of one statement become one. A reduction into a type narrower than f32 gets an f32 tensor of its
//! own, so that partial sums are never rounded to it.

use std::collections::{HashMap, HashSet};

use einfall_ir::arena::Id;
use einfall_ir::cascade::{Cascade, Einsum, Expr, ExprId, Index, IndexId, IndexKind, Size, Stmt, types};

use super::rewrite::{assign, intermediate, rewrite, same, substitute};

/// Gives every reduction or scan below a statement's root a statement of its own.
pub fn extract_reductions(mut c: Cascade) -> Cascade {
    let stmts = std::mem::take(&mut c.stmts);
    let mut out = Vec::new();
    for stmt in stmts {
        match stmt {
            Stmt::Einsum(e) => {
                for e in extract(&mut c, e) {
                    out.push(Stmt::Einsum(e));
                }
            }
            Stmt::Iter(mut i) => {
                let inits = std::mem::take(&mut i.inits);
                i.inits = inits.into_iter().flat_map(|e| extract(&mut c, e)).collect();
                let body = std::mem::take(&mut i.body);
                i.body = body.into_iter().flat_map(|e| extract(&mut c, e)).collect();
                out.push(Stmt::Iter(i));
            }
        }
    }
    c.stmts = out;
    c
}

fn extract(c: &mut Cascade, mut e: Einsum) -> Vec<Einsum> {
    let mut before = Moved::default();
    let root = e.value;
    let order = e.free.clone();
    let value = c.exprs[root].clone();
    // A reduction at the root stays; only what lies under it moves. A root that stores elsewhere than at its own
    // indices, or joins, or stores a type narrower than what reductions accumulate in, moves too: the store is then
    // elementwise, and rounds once.
    let plain = e.join.is_none()
        && e.targets.iter().all(|t| {
            let dtype = c.tensors[t.tensor].dtype;
            let mut seen = HashSet::new();
            !(dtype.is_float() && dtype.bits() < 32)
                && t.at.iter().all(|&a| matches!(c.exprs[a], Expr::Index(i) if seen.insert(i)))
        });
    e.value = match value {
        Expr::Reduce { op, over, body } if plain => {
            let new = move_out(c, body, &order, &mut before);
            let span = c.spans[root.index()];
            if new == body { root } else { c.push_expr(Expr::Reduce { op, over, body: new }, span) }
        }
        Expr::Scan { op, over, body } if plain => {
            let new = move_out(c, body, &order, &mut before);
            let span = c.spans[root.index()];
            if new == body { root } else { c.push_expr(Expr::Scan { op, over, body: new }, span) }
        }
        _ => move_out(c, root, &order, &mut before),
    };
    e.filter = e.filter.map(|f| move_out(c, f, &order, &mut before));
    before.statements.push(e);
    before.statements
}

/// What has moved out of one statement.
#[derive(Default)]
struct Moved {
    /// The new statements, in order.
    statements: Vec<Einsum>,
    /// Reductions moved, with the reads that stand in for them: an equal one is not moved twice.
    reads: Vec<(ExprId, ExprId)>,
}

/// Rewrites `root` with each outermost reduction replaced by a read of a new tensor; its statement (and those of
/// reductions nested in it) is appended to `before`. Its dimensions follow `order`.
fn move_out(c: &mut Cascade, root: ExprId, order: &[IndexId], before: &mut Moved) -> ExprId {
    rewrite(c, root, &mut |c, id, e| {
        if !matches!(e, Expr::Reduce { .. } | Expr::Scan { .. }) {
            return None;
        }
        if let Some((_, read)) = before.reads.iter().find(|(old, _)| same(c, *old, id)) {
            return Some(*read);
        }
        let span = c.spans[id.index()];
        let mut used = c.free_indices(id);
        used.sort_by_key(|i| order.iter().position(|o| o == i).unwrap_or(order.len()));
        // Fresh indices for the new statement; an iterated index stays what it is.
        let mut map = HashMap::new();
        let mut free = Vec::new();
        let mut fresh = |c: &mut Cascade, i: IndexId, kind: IndexKind| {
            let copy = Index { kind, ..c.indices[i].clone() };
            let j = c.indices.push(copy);
            let expr = c.push_expr(Expr::Index(j), span);
            map.insert(i, expr);
            (j, expr)
        };
        let mut at = Vec::new();
        let mut dims: Vec<Size> = Vec::new();
        let mut outer_at = Vec::new();
        for &i in &used {
            dims.push(c.indices[i].extent.clone());
            let outer = c.push_expr(Expr::Index(i), span);
            outer_at.push(outer);
            if c.indices[i].kind == IndexKind::Iterated {
                at.push(outer);
                continue;
            }
            let (j, expr) = fresh(c, i, IndexKind::Free);
            free.push(j);
            at.push(expr);
        }
        let bound: Vec<IndexId> = match &c.exprs[id] {
            Expr::Reduce { over, .. } => over.clone(),
            _ => Vec::new(),
        };
        for i in bound {
            fresh(c, i, IndexKind::Reduced);
        }
        let value = substitute(c, id, &map);
        let dtype = types::default_dtype(c, &types::kinds(c), value, 0, 1, false);
        let tensor = intermediate(c, "r", dtype, dims, span);
        let new = assign(tensor, at, free, value, span);
        before.statements.extend(extract(c, new));
        let read = c.push_expr(Expr::Read { tensor, at: outer_at }, span);
        before.reads.push((id, read));
        Some(read)
    })
}
