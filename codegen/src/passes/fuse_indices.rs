//! fuse-indices: two reduced indices that are only ever read as one mixed-radix number become one index.
//!
//! Before: `o[h,t,e] = ..;    y[t,d] = sum(h, e) o[h,t,e] * w[d,h*E+e]`
//! After:  `o[t,h*E+e] = ..;  y[t,d] = sum(he) o[t,he] * w[d,he]`
//!
//! A stream walks one axis: over `he` it is H·E long and contiguous in both operands, over `e` alone it is E long and
//! starts anew for each h. An intermediate whose only readers are that reduction gets its two dimensions joined where
//! the later one stood. Invariant: an array of the caller keeps its dimensions.

use einfall_ir::arena::Id;
use einfall_ir::cascade::affine::{Affine, Poly};
use einfall_ir::cascade::{
    Cascade, Einsum, Expr, ExprId, Index, IndexId, IndexKind, Reducer, Size, Stmt, TensorId, TensorKind,
};
use einfall_ir::ops::BinaryOp;

use super::rewrite::{mentions, rewrite};

/// A reduction whose indices `outer` and `inner` are one number.
struct Fusion {
    reduction: ExprId,
    outer: IndexId,
    inner: IndexId,
    /// Intermediates with the positions of their dimensions for the two indices.
    joined: Vec<(TensorId, usize, usize)>,
}

/// Fuses every pair of indices that allows it.
pub fn fuse_indices(mut c: Cascade) -> Cascade {
    while let Some(fusion) = find(&c) {
        apply(&mut c, &fusion);
    }
    c
}

fn einsums(c: &Cascade) -> impl Iterator<Item = &Einsum> {
    c.stmts.iter().filter_map(|s| match s {
        Stmt::Einsum(e) => Some(e),
        Stmt::Iter(_) => None,
    })
}

fn find(c: &Cascade) -> Option<Fusion> {
    let mut reductions = Vec::new();
    for e in einsums(c) {
        c.walk(e.value, &mut |id, x| {
            if let Expr::Reduce { op: Reducer::Op(op), over, body } = x
                && !op.selects_argument()
            {
                reductions.push((id, over.clone(), *body));
            }
        });
    }
    reductions.into_iter().find_map(|(reduction, over, body)| {
        let pairs = over.iter().flat_map(|&h| over.iter().filter(move |&&e| e != h).map(move |&e| (h, e)));
        pairs.into_iter().find_map(|(outer, inner)| {
            let mut seen = Seen::default();
            let fits = accesses(c, body, outer, inner, &mut seen) && seen.mixed;
            let mut joined: Vec<(TensorId, usize, usize)> = seen.apart.clone();
            joined.sort();
            joined.dedup();
            let alone = |j: &(TensorId, usize, usize)| {
                let same = seen.apart.iter().filter(|a| *a == j).count();
                joined.iter().filter(|k| k.0 == j.0).count() == 1 && same == reads(c, j.0) && may_join(c, *j)
            };
            (fits && joined.iter().all(alone)).then(|| Fusion { reduction, outer, inner, joined: joined.clone() })
        })
    })
}

/// How a body reads with two indices.
#[derive(Default)]
struct Seen {
    /// Whether some access has them as one number.
    mixed: bool,
    /// Accesses with each as a position of its own.
    apart: Vec<(TensorId, usize, usize)>,
}

/// Whether the indices occur under `root` only together in accesses.
fn accesses(c: &Cascade, root: ExprId, outer: IndexId, inner: IndexId, seen: &mut Seen) -> bool {
    if !mentions(c, root, outer) && !mentions(c, root, inner) {
        return true;
    }
    let free = |e: ExprId| !mentions(c, e, outer) && !mentions(c, e, inner);
    match &c.exprs[root] {
        Expr::Read { tensor, at } => {
            let is = |i: IndexId| at.iter().position(|&a| matches!(c.exprs[a], Expr::Index(j) if j == i));
            if let (Some(p), Some(q)) = (is(outer), is(inner)) {
                seen.apart.push((*tensor, p, q));
                return at.iter().enumerate().all(|(k, &a)| k == p || k == q || free(a));
            }
            let number = at.iter().position(|&a| mixed(c, a, outer, inner).is_some());
            seen.mixed |= number.is_some();
            number.is_some_and(|p| at.iter().enumerate().all(|(k, &a)| k == p || free(a)))
        }
        Expr::Unary(..) | Expr::Binary(..) | Expr::Select(..) | Expr::Cast(..) | Expr::Tuple(_) => {
            let mut operands = Vec::new();
            c.exprs[root].for_each_operand(|e| operands.push(e));
            operands.into_iter().all(|e| accesses(c, e, outer, inner, seen))
        }
        Expr::Int(_)
        | Expr::Float(_)
        | Expr::Size(_)
        | Expr::Index(_)
        | Expr::Reduce { .. }
        | Expr::Scan { .. }
        | Expr::Segment { .. }
        | Expr::Rand { .. } => false,
    }
}

/// The terms of a position beside `outer·E + inner`, if it is that and terms without either.
fn mixed(c: &Cascade, at: ExprId, outer: IndexId, inner: IndexId) -> Option<Vec<ExprId>> {
    let mut terms = Vec::new();
    let mut todo = vec![at];
    while let Some(e) = todo.pop() {
        match c.exprs[e] {
            Expr::Binary(BinaryOp::Add, a, b) => todo.extend([b, a]),
            _ => terms.push(e),
        }
    }
    let extent = Poly::of(&c.indices[inner].extent)?;
    let is = |e: ExprId, i: IndexId, coefficient: &Poly| {
        Affine::of(c, e)
            .is_some_and(|a| a.constant.is_zero() && a.terms.len() == 1 && a.terms.get(&i) == Some(coefficient))
    };
    let one = Poly::constant(1);
    let (h, e) = (terms.iter().position(|t| is(*t, outer, &extent))?, terms.iter().position(|t| is(*t, inner, &one))?);
    let rest: Vec<ExprId> = terms.iter().enumerate().filter(|(k, _)| *k != h && *k != e).map(|(_, t)| *t).collect();
    rest.iter().all(|t| !mentions(c, *t, outer) && !mentions(c, *t, inner)).then_some(rest)
}

/// How often a tensor is read.
fn reads(c: &Cascade, tensor: TensorId) -> usize {
    let mut n = 0;
    for e in c.einsums() {
        for root in e.roots() {
            c.walk(root, &mut |_, x| match x {
                Expr::Read { tensor: t, .. } | Expr::Segment { offsets: t, .. } if *t == tensor => n += 1,
                _ => {}
            });
        }
    }
    n
}

/// Whether an intermediate has one statement, whose left side is plain, so that two of its dimensions may be joined.
fn may_join(c: &Cascade, (tensor, _, _): (TensorId, usize, usize)) -> bool {
    let mut writers = einsums(c).filter(|e| e.targets.iter().any(|t| t.tensor == tensor));
    let (Some(e), None) = (writers.next(), writers.next()) else { return false };
    let mut seen: Vec<IndexId> = Vec::new();
    let plain = |&a: &ExprId| match c.exprs[a] {
        Expr::Index(i) if e.free.contains(&i) && !seen.contains(&i) => {
            seen.push(i);
            true
        }
        _ => false,
    };
    c.tensors[tensor].kind == TensorKind::Intermediate
        && e.join.is_none()
        && e.targets.len() == 1
        && e.targets[0].at.iter().all(plain)
}

fn apply(c: &mut Cascade, fusion: &Fusion) {
    let Fusion { outer, inner, .. } = *fusion;
    let [h, e] = [outer, inner].map(|i| c.indices[i].clone());
    let name = format!("{}{}", h.name, e.name);
    let name = (0..)
        .map(|k| if k == 0 { name.clone() } else { format!("{name}_{k}") })
        .find(|n| c.tensor(n).is_none() && c.rank(n).is_none() && c.indices.iter().all(|(_, i)| i.name != *n))
        .expect("some name is free");
    let size = Size::Mul(Box::new(h.extent), Box::new(e.extent.clone()));
    let fused = Index { name, extent: size.clone(), rank: None, kind: IndexKind::Reduced, span: e.span };
    let fused = c.indices.push(fused);
    let stmts = std::mem::take(&mut c.stmts);
    let mut out = Vec::new();
    for stmt in stmts {
        let Stmt::Einsum(mut s) = stmt else {
            out.push(stmt);
            continue;
        };
        s.value = rewrite(c, s.value, &mut |c, id, x| {
            let (true, Expr::Reduce { op, over, body }) = (id == fusion.reduction, x) else { return None };
            let over = over.iter().filter(|i| **i != inner).map(|i| if *i == outer { fused } else { *i }).collect();
            let body = body_of(c, *body, fusion, fused);
            Some(c.push_expr(Expr::Reduce { op: *op, over, body }, c.spans[id.index()]))
        });
        for t in &mut s.targets {
            let Some(&(_, p, q)) = fusion.joined.iter().find(|j| j.0 == t.tensor) else { continue };
            let span = s.span;
            let extent = c.push_expr(Expr::Size(e.extent.clone()), span);
            let scaled = c.push_expr(Expr::Binary(BinaryOp::Mul, t.at[p], extent), span);
            let number = c.push_expr(Expr::Binary(BinaryOp::Add, scaled, t.at[q]), span);
            join(&mut t.at, (p, q), number);
        }
        out.push(Stmt::Einsum(s));
    }
    c.stmts = out;
    for &(t, p, q) in &fusion.joined {
        join(&mut c.tensors[t].dims, (p, q), size.clone());
    }
}

/// Puts one entry in the place of two: where the later one stood.
fn join<T>(list: &mut Vec<T>, (p, q): (usize, usize), one: T) {
    list[p.max(q)] = one;
    list.remove(p.min(q));
}

/// A body with its accesses at the fused index.
fn body_of(c: &mut Cascade, body: ExprId, fusion: &Fusion, fused: IndexId) -> ExprId {
    rewrite(c, body, &mut |c, id, x| {
        let Expr::Read { tensor, at } = x else { return None };
        let span = c.spans[id.index()];
        let mut at = at.clone();
        if let Some(&(_, p, q)) = fusion.joined.iter().find(|j| j.0 == *tensor) {
            let index = c.push_expr(Expr::Index(fused), span);
            join(&mut at, (p, q), index);
        } else {
            let found = at.iter().enumerate().find_map(|(k, &a)| Some((k, mixed(c, a, fusion.outer, fusion.inner)?)));
            let (k, rest) = found?;
            let index = c.push_expr(Expr::Index(fused), span);
            at[k] = rest.into_iter().fold(index, |a, b| c.push_expr(Expr::Binary(BinaryOp::Add, b, a), span));
        }
        Some(c.push_expr(Expr::Read { tensor: *tensor, at }, span))
    })
}

#[cfg(test)]
mod tests {
    use einfall_ir::array::Array;
    use einfall_ir::cascade::bind::{Given, bind};
    use einfall_ir::cascade::eval::evaluate;
    use einfall_ir::cascade::parse;
    use einfall_ir::cascade::print::print_cascade;

    use super::*;

    /// The fused text; it computes what the text given computes.
    fn fused(text: &str) -> String {
        let c = parse(text).unwrap_or_else(|d| panic!("{d:?}\n{text}")).cascades.remove(0);
        let f = fuse_indices(c.clone());
        let out = print_cascade(&f);
        parse(&out).unwrap_or_else(|d| panic!("{d:?}\n{out}"));
        for n in [1, 2, 3] {
            let sizes = c.ranks.iter().enumerate().map(|(k, (_, r))| (r.name.clone(), n + k as u64 % 3)).collect();
            let b = bind(&c, &Given { sizes, ..Given::default() }).unwrap();
            let inputs: Vec<Array> = c
                .params
                .iter()
                .map(|t| {
                    let mut k = 0.0;
                    Array::from_fn(c.tensors[*t].dtype, &b.dims(&c, *t).unwrap(), |_| {
                        k += 1.0;
                        f64::sin(k)
                    })
                })
                .collect();
            let (want, have) = (evaluate(&c, &b, &inputs).unwrap(), evaluate(&f, &b, &inputs).unwrap());
            for (w, h) in want.iter().zip(&have) {
                assert!(w.data.iter().zip(&h.data).all(|(x, y)| (x - y).abs() < 1e-12), "{out}");
            }
        }
        out
    }

    const HEAD: &str = "cascade c[T, H, E, D](o: f32[H,T,E], w: f32[D,H*E]) -> (y: f32[T,D]) {\n";

    #[test]
    fn an_intermediate_is_laid_out_as_it_is_reduced() {
        let text = fused(&format!("{HEAD} p[h,t,e] = exp(o[h,t,e])\n y[t,d] = sum(h, e) p[h,t,e] * w[d,h*E+e] }}"));
        assert!(text.contains("p[t,h*E+e] = exp(o[h,t,e])"), "{text}");
        assert!(text.contains("y[t,d] = sum(he) p[t,he] * w[d,he]"), "{text}");
        // Reversed as written, beside other terms, and behind an elementwise function.
        let text = fused(
            "cascade c[T, H, E, D](o: f32[H,T,E], w: f32[D,D+H*E]) -> (y: f32[T,D]) {\n p[h,t,e] = exp(o[h,t,e])\n \
             y[t,d] = 1.0 + (sum(e, h) p[h,t,e] * exp(w[d,e+E*h+d])) }",
        );
        assert!(text.contains("p[t,he] * exp(w[d,d+he])"), "{text}");
        // Three indices.
        let text = fused(
            "cascade c[T, A, B, C](o: f32[T,A*B*C], w: f32[A*B*C]) -> (y: f32[T]) {\n \
             y[t] = sum(a, b, c) o[t,a*(B*C)+b*C+c] * w[a*(B*C)+b*C+c] }",
        );
        assert!(text.contains("sum(a, bc in B*C)") || text.contains("sum(abc"), "{text}");
    }

    #[test]
    fn what_stays_as_it_is() {
        for body in [
            // An array of the caller has its own dimensions.
            "y[t,d] = sum(h, e) o[h,t,e] * w[d,h*E+e]",
            // Another reader.
            "p[h,t,e] = exp(o[h,t,e])\n q[t] = max(h, e) p[h,t,e]\n y[t,d] = q[t] * (sum(h, e) p[h,t,e] * w[d,h*E+e])",
            // An index by itself.
            "p[h,t,e] = exp(o[h,t,e])\n y[t,d] = sum(h, e) p[h,t,e] * w[d,h*E+e] * h",
            // Nothing is read as one number.
            "p[h,t,e] = exp(o[h,t,e])\n q[d] = sum(e) w[d,e]\n y[t,d] = (sum(h, e) p[h,t,e]) * q[d]",
        ] {
            let c = parse(&format!("{HEAD} {body} }}")).unwrap_or_else(|d| panic!("{d:?}")).cascades.remove(0);
            let before = print_cascade(&c);
            let after = print_cascade(&fuse_indices(c));
            assert_eq!(before, after);
        }
    }
}
