//! propagate-support: every reduction guards its own body, so that later passes need not know about supports.
//!
//! Before: `S[m,n] = .. where n <= m;  L[m] = sum(n) exp(S[m,n])`
//! After:  `S[m,n] = ..;  L[m] = sum(n) (if n <= m then exp(S[m,n]) else 0)`
//!
//! Support propagates by intersection (docs/language.md, "Support"): a read outside a tensor's support removes the
//! point of the innermost reduction around it, or of the output. Only outputs keep a predicate, as
//! `if support then value else otherwise`.

use std::collections::HashMap;

use einfall_ir::cascade::{Cascade, Einsum, Expr, ExprId, IndexId, Reducer, Stmt, TensorId, TensorKind};
use einfall_ir::dtype::DType;
use einfall_ir::ops::{BinaryOp, ReduceOp};

use super::Unsupported;
use super::rewrite::{mentions, substitute};
use crate::identity::{identity, is_identity, value_type};

/// A tensor's support: a predicate over its left-hand side's indices.
struct Support {
    /// One index per dimension, as the defining statement names them.
    dims: Vec<IndexId>,
    /// True on the support.
    holds: ExprId,
}

/// The statement around an expression.
#[derive(Clone, Copy)]
struct Around<'a> {
    conjuncts: &'a [ExprId],
    supports: &'a HashMap<TensorId, Support>,
    /// The statement's value.
    value: Option<ExprId>,
    /// What the expression's value becomes a part of: an element of the result, or a coordinate.
    into: DType,
}

/// Makes every support explicit.
///
/// # Errors
/// Partial supports behind left sides that are not plain indices, and argument selections among some of the points
/// that `expand-selections` left, because they stand inside an expression.
pub fn propagate_support(mut cascade: Cascade) -> Result<Cascade, Unsupported> {
    let mut supports = HashMap::new();
    let mut stmts = std::mem::take(&mut cascade.stmts);
    for stmt in &mut stmts {
        match stmt {
            Stmt::Einsum(e) => guard(&mut cascade, e, &mut supports)?,
            Stmt::Iter(i) => {
                for e in i.inits.iter_mut().chain(&mut i.body) {
                    guard(&mut cascade, e, &mut supports)?;
                }
            }
        }
    }
    cascade.stmts = stmts;
    Ok(cascade)
}

fn guard(c: &mut Cascade, e: &mut Einsum, supports: &mut HashMap<TensorId, Support>) -> Result<(), Unsupported> {
    let mut conjuncts = Vec::new();
    if let Some(filter) = e.filter.take() {
        split_conjuncts(c, filter, &mut conjuncts);
    }
    // A condition over operands that do not exist does not hold.
    for condition in &mut conjuncts {
        let mut present = Vec::new();
        let around = Around { conjuncts: &[], supports, value: None, into: DType::Bool };
        let own = guard_expr(c, *condition, around, &mut [], &mut present)?;
        if !present.is_empty() {
            present.push(own);
            *condition = conjunction(c, present).expect("the condition itself");
        }
    }
    let mut used = vec![false; conjuncts.len()];
    let mut outer = Vec::new();
    let into = c.tensors[e.targets[0].tensor].dtype;
    let around = Around { conjuncts: &conjuncts, supports, value: Some(e.value), into };
    e.value = guard_expr(c, e.value, around, &mut used, &mut outer)?;
    let free: Vec<ExprId> = conjuncts.iter().zip(&used).filter(|(_, u)| !**u).map(|(e, _)| *e).collect();
    outer.extend(free);
    let Some(holds) = conjunction(c, outer) else { return Ok(()) };
    for target in &e.targets {
        let tensor = &c.tensors[target.tensor];
        // What is updated in place keeps the elements that are not written.
        let whole = [TensorKind::Output, TensorKind::State, TensorKind::InOut];
        if whole.contains(&tensor.kind) || e.join.is_some() {
            continue;
        }
        let dims: Option<Vec<IndexId>> = target
            .at
            .iter()
            .map(|&a| match c.exprs[a] {
                Expr::Index(i) => Some(i),
                _ => None,
            })
            .collect();
        let Some(dims) = dims else {
            return Err(Unsupported::new(
                e.span,
                format!("`{}` has partial support behind a computed left-hand side", tensor.name),
            ));
        };
        supports.insert(target.tensor, Support { dims, holds });
    }
    match (e.otherwise.take(), e.join) {
        (Some(otherwise), None) => {
            let span = c.spans[einfall_ir::arena::Id::index(e.value)];
            e.value = c.push_expr(Expr::Select(holds, e.value, otherwise), span);
        }
        // A joined or in-place write keeps its predicate: points outside are not written.
        (None, _) if e.join.is_some() || written_in_place(c, e) => e.filter = Some(holds),
        (otherwise, _) => e.otherwise = otherwise,
    }
    Ok(())
}

fn written_in_place(c: &Cascade, e: &Einsum) -> bool {
    e.targets.iter().any(|t| c.tensors[t.tensor].kind == TensorKind::InOut)
}

/// Rewrites `id` so that its reductions guard their bodies; predicates that remove the point itself go to `outer`.
fn guard_expr(
    c: &mut Cascade,
    id: ExprId,
    around: Around<'_>,
    used: &mut [bool],
    outer: &mut Vec<ExprId>,
) -> Result<ExprId, Unsupported> {
    let span = c.spans[einfall_ir::arena::Id::index(id)];
    let expr = c.exprs[id].clone();
    let mut go = |c: &mut Cascade, e, outer: &mut Vec<ExprId>| guard_expr(c, e, around, used, outer);
    let new = match expr {
        Expr::Int(_) | Expr::Float(_) | Expr::Size(_) | Expr::Index(_) | Expr::Segment { .. } => return Ok(id),
        Expr::Read { tensor, at } => {
            let coordinate = Around { into: DType::I64, ..around };
            let mut go = |c: &mut Cascade, e, outer: &mut Vec<ExprId>| guard_expr(c, e, coordinate, used, outer);
            let at = at.into_iter().map(|a| go(c, a, outer)).collect::<Result<Vec<_>, _>>()?;
            if let Some(s) = around.supports.get(&tensor) {
                let map: HashMap<IndexId, ExprId> = s.dims.iter().copied().zip(at.iter().copied()).collect();
                let holds = substitute(c, s.holds, &map);
                outer.push(holds);
            }
            Expr::Read { tensor, at }
        }
        Expr::Unary(op, a) => Expr::Unary(op, go(c, a, outer)?),
        Expr::Cast(d, a) => Expr::Cast(d, go(c, a, outer)?),
        Expr::Binary(op, a, b) => Expr::Binary(op, go(c, a, outer)?, go(c, b, outer)?),
        Expr::Select(cond, a, b) => {
            let cond = go(c, cond, outer)?;
            let (mut in_a, mut in_b) = (Vec::new(), Vec::new());
            let (a, b) = (go(c, a, &mut in_a)?, go(c, b, &mut in_b)?);
            if !in_a.is_empty() || !in_b.is_empty() {
                let yes = c.push_expr(Expr::Int(1), span);
                let pa = conjunction(c, in_a).unwrap_or(yes);
                let pb = conjunction(c, in_b).unwrap_or(yes);
                outer.push(c.push_expr(Expr::Select(cond, pa, pb), span));
            }
            Expr::Select(cond, a, b)
        }
        Expr::Tuple(items) => Expr::Tuple(items.into_iter().map(|a| go(c, a, outer)).collect::<Result<_, _>>()?),
        Expr::Rand { seed, coords } => Expr::Rand {
            seed: go(c, seed, outer)?,
            coords: coords.into_iter().map(|a| go(c, a, outer)).collect::<Result<_, _>>()?,
        },
        Expr::Scan { op, over, body } => {
            let mut inside = Vec::new();
            let inner = go(c, body, &mut inside)?;
            let dtype = reduced_type(c, around, id, body);
            let body = select_or_identity(c, op, dtype, inside, inner, span)?;
            Expr::Scan { op, over, body }
        }
        Expr::Reduce { op, over, body } => {
            let mut inside = Vec::new();
            let inner = go(c, body, &mut inside)?;
            for (k, &conjunct) in around.conjuncts.iter().enumerate() {
                if over.iter().any(|&i| mentions(c, conjunct, i)) {
                    used[k] = true;
                    inside.push(conjunct);
                }
            }
            let dtype = reduced_type(c, around, id, body);
            let body = select_or_identity(c, op, dtype, inside, inner, span)?;
            Expr::Reduce { op, over, body }
        }
    };
    Ok(c.push_expr(new, span))
}

/// The type of the elements that reduction `id` joins: the statement's if it is the statement's value, otherwise that of
/// its body. What becomes a part of a float may be infinite.
fn reduced_type(c: &Cascade, around: Around<'_>, id: ExprId, body: ExprId) -> DType {
    if around.value == Some(id) || around.into.is_float() { around.into } else { value_type(c, body) }
}

fn select_or_identity(
    c: &mut Cascade,
    op: Reducer,
    dtype: DType,
    inside: Vec<ExprId>,
    body: ExprId,
    span: einfall_ir::diag::Span,
) -> Result<ExprId, Unsupported> {
    let Some(holds) = conjunction(c, inside) else { return Ok(body) };
    let guarded = |c: &mut Cascade, value: ExprId, identity: f64| {
        let identity = c.push_expr(Expr::Float(identity), span);
        c.push_expr(Expr::Select(holds, value, identity), span)
    };
    match op {
        Reducer::Op(op) if !op.selects_argument() => {
            let identity = identity(c, op, dtype, span);
            Ok(c.push_expr(Expr::Select(holds, body, identity), span))
        }
        Reducer::User(m) => {
            let identity = c.monoids[m].identity.clone();
            let Expr::Tuple(items) = c.exprs[body].clone() else { return Ok(guarded(c, body, identity[0])) };
            let items = items.into_iter().zip(identity).map(|(x, i)| guarded(c, x, i)).collect();
            Ok(c.push_expr(Expr::Tuple(items), span))
        }
        Reducer::Op(_) | Reducer::TopK { .. } => {
            Err(Unsupported::new(span, "an argument selection among some of the points, inside an expression"))
        }
    }
}

/// The condition of a body `if cond then value else identity` of a reduction of elements of `dtype`.
pub(crate) fn guard_of(c: &Cascade, body: ExprId, op: ReduceOp, dtype: DType) -> Option<ExprId> {
    match c.exprs[body] {
        Expr::Select(cond, _, other) if is_identity(c, other, op, dtype) => Some(cond),
        _ => None,
    }
}

/// The conjuncts of a predicate, outermost `and`s split.
pub(crate) fn split_conjuncts(c: &Cascade, id: ExprId, out: &mut Vec<ExprId>) {
    match c.exprs[id] {
        Expr::Binary(BinaryOp::And, a, b) => {
            split_conjuncts(c, a, out);
            split_conjuncts(c, b, out);
        }
        _ => out.push(id),
    }
}

fn conjunction(c: &mut Cascade, mut items: Vec<ExprId>) -> Option<ExprId> {
    let mut unique: Vec<ExprId> = Vec::new();
    for item in items.drain(..) {
        if !unique.iter().any(|&u| super::rewrite::same(c, u, item)) {
            unique.push(item);
        }
    }
    let mut items = unique.into_iter();
    let first = items.next()?;
    Some(items.fold(first, |a, b| {
        let span = c.spans[einfall_ir::arena::Id::index(b)];
        c.push_expr(Expr::Binary(BinaryOp::And, a, b), span)
    }))
}
