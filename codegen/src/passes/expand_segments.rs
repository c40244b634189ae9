//! expand-segments: the segment that an index lies in becomes a tensor.
//!
//! Before: `ragged n in N by offs as e;  Y[n,f] = sum(d) X[n,d] * W[e,d,f]`
//! After:  `b[x] = cummax(x) min(max(offs[x], 0), N);  c[n] = sum(x) if b[x] <= n then 1 else 0`
//!         `s[n] = c[n] - 1 where c[n] >= 1 and c[n] < X + 1;  Y[n,f] = sum(d) X[n,d] * W[s[n],d,f]`
//!
//! `b` are the offsets clamped to be monotone within the rank (docs/language.md, "Ragged ranks"); as many of them are
//! at or below `n` as segments begin there, so an empty segment holds nothing. `s` lacks the points in no segment, and
//! what needs them lacks them too.

use std::collections::HashMap;

use einfall_ir::arena::Id;
use einfall_ir::cascade::{Cascade, Einsum, Expr, ExprId, IndexKind, Reducer, Size, Stmt, TensorId};
use einfall_ir::diag::Span;
use einfall_ir::dtype::DType;
use einfall_ir::ops::{BinaryOp, ReduceOp};

use super::Unsupported;
use super::rewrite::{assign, fresh_index, intermediate, rewrite};

/// Gives every segment a tensor, defined before the first statement that asks for it.
///
/// # Errors
/// Offsets that an iteration computes.
pub fn expand_segments(mut c: Cascade) -> Result<Cascade, Unsupported> {
    let mut known: HashMap<(TensorId, Size), TensorId> = HashMap::new();
    let stmts = std::mem::take(&mut c.stmts);
    let within: Vec<TensorId> = stmts
        .iter()
        .filter_map(|s| match s {
            Stmt::Iter(i) => Some(i.inits.iter().chain(&i.body).flat_map(|e| e.targets.iter().map(|t| t.tensor))),
            Stmt::Einsum(_) => None,
        })
        .flatten()
        .collect();
    let mut out = Vec::new();
    for mut stmt in stmts {
        let mut before = Vec::new();
        let mut fault = None;
        let einsums: Vec<&mut Einsum> = match &mut stmt {
            Stmt::Einsum(e) => vec![e],
            Stmt::Iter(i) => i.inits.iter_mut().chain(&mut i.body).collect(),
        };
        for e in einsums {
            let mut expand = |c: &mut Cascade, root: ExprId| -> ExprId {
                rewrite(c, root, &mut |c, id, x| {
                    let Expr::Segment { offsets, of } = *x else { return None };
                    let span = c.spans[id.index()];
                    if within.contains(&offsets) {
                        fault = Some(Unsupported::new(span, "a ragged rank by offsets that an iteration computes"));
                    }
                    let extent = c.indices[of].extent.clone();
                    let segments = *known
                        .entry((offsets, extent.clone()))
                        .or_insert_with(|| define(c, offsets, extent, span, &mut before));
                    let at = vec![c.push_expr(Expr::Index(of), span)];
                    Some(c.push_expr(Expr::Read { tensor: segments, at }, span))
                })
            };
            e.value = expand(&mut c, e.value);
            e.filter = e.filter.map(|f| expand(&mut c, f));
            e.otherwise = e.otherwise.map(|o| expand(&mut c, o));
            for t in &mut e.targets {
                t.at = t.at.iter().map(|a| expand(&mut c, *a)).collect();
            }
        }
        fault.map_or(Ok(()), Err)?;
        out.extend(before.into_iter().map(Stmt::Einsum));
        out.push(stmt);
    }
    c.stmts = out;
    Ok(c)
}

/// The tensor of segments of a rank of `extent` points by `offsets`; its statements go to `before`.
fn define(c: &mut Cascade, offsets: TensorId, extent: Size, span: Span, before: &mut Vec<Einsum>) -> TensorId {
    let dtype = if c.tensors[offsets].dtype == DType::I64 { DType::I64 } else { DType::I32 };
    let count = c.tensors[offsets].dims[0].clone();
    let size = |c: &mut Cascade, s: &Size| {
        c.push_expr(
            match s {
                Size::Const(n) => Expr::Int(*n as i64),
                other => Expr::Size(other.clone()),
            },
            span,
        )
    };
    let binary = |c: &mut Cascade, op, a, b| c.push_expr(Expr::Binary(op, a, b), span);
    let read = |c: &mut Cascade, tensor, at| c.push_expr(Expr::Read { tensor, at: vec![at] }, span);

    // Where each segment begins.
    let bounds = intermediate(c, "begin", dtype, vec![count.clone()], span);
    let (x, at_x) = fresh_index(c, "x", count.clone(), IndexKind::Free, span);
    let (zero, most) = (c.push_expr(Expr::Int(0), span), size(c, &extent));
    let offset = read(c, offsets, at_x);
    let low = binary(c, BinaryOp::Max, offset, zero);
    let body = binary(c, BinaryOp::Min, low, most);
    let value = c.push_expr(Expr::Scan { op: Reducer::Op(ReduceOp::Max), over: x, body }, span);
    before.push(assign(bounds, vec![at_x], vec![x], value, span));

    // How many begin at or before each point.
    let begun = intermediate(c, "begun", dtype, vec![extent.clone()], span);
    let (n, at_n) = fresh_index(c, "n", extent.clone(), IndexKind::Free, span);
    let (x, at_x) = fresh_index(c, "x", count.clone(), IndexKind::Reduced, span);
    let begin = read(c, bounds, at_x);
    let holds = binary(c, BinaryOp::Le, begin, at_n);
    let (one, zero) = (c.push_expr(Expr::Int(1), span), c.push_expr(Expr::Int(0), span));
    let body = c.push_expr(Expr::Select(holds, one, zero), span);
    let value = c.push_expr(Expr::Reduce { op: Reducer::Op(ReduceOp::Sum), over: vec![x], body }, span);
    before.push(assign(begun, vec![at_n], vec![n], value, span));

    let segments = intermediate(c, "segment", dtype, vec![extent.clone()], span);
    let (n, at_n) = fresh_index(c, "n", extent, IndexKind::Free, span);
    let (b, one, most) = (read(c, begun, at_n), c.push_expr(Expr::Int(1), span), size(c, &count));
    let value = binary(c, BinaryOp::Sub, b, one);
    let (some, inside) = (binary(c, BinaryOp::Ge, b, one), binary(c, BinaryOp::Lt, b, most));
    let filter = binary(c, BinaryOp::And, some, inside);
    before.push(Einsum { filter: Some(filter), ..assign(segments, vec![at_n], vec![n], value, span) });
    segments
}
