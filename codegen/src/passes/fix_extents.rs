//! fix-extents: a rank whose extent is fixed becomes that number wherever it stands.
//!
//! Before: `cascade c[M, E = 64](x: f32[M,E]) .. scale: f32 = 1/sqrt(E)`
//! After:  `cascade c[M, E = 64](x: f32[M,64]) .. scale: f32 = 1/sqrt(64)`

use einfall_ir::cascade::{Cascade, Expr, OutputSource, RankId, Size, Stmt};

/// Replaces every fixed rank by its extent and folds arithmetic of literals.
pub fn fix_extents(mut c: Cascade) -> Cascade {
    let fixed: Vec<(RankId, u64)> = c.ranks.iter().filter_map(|(r, rank)| Some((r, rank.fixed?))).collect();
    if fixed.is_empty() {
        return c;
    }
    replace_ranks(&mut c, &mut |r| fixed.iter().find(|(f, _)| *f == r).map(|(_, n)| Size::Const(*n)));
    c
}

/// Replaces ranks by other extents everywhere in a cascade.
pub(crate) fn replace_ranks(c: &mut Cascade, f: &mut impl FnMut(RankId) -> Option<Size>) {
    for (_, i) in c.indices.iter_mut() {
        replace(&mut i.extent, f);
    }
    for (_, t) in c.tensors.iter_mut() {
        t.dims.iter_mut().for_each(|d| replace(d, f));
    }
    for (_, e) in c.exprs.iter_mut() {
        if let Expr::Size(s) = e {
            replace(s, f);
        }
    }
    for o in &mut c.outputs {
        o.dims.iter_mut().for_each(|d| replace(d, f));
        match &mut o.source {
            OutputSource::Whole(_) => {}
            OutputSource::Points { from, to, .. } => {
                replace(from, f);
                replace(to, f);
            }
            OutputSource::Point { at, .. } => replace(at, f),
        }
    }
    for stmt in &mut c.stmts {
        if let Stmt::Iter(i) = stmt {
            replace(&mut i.extent, f);
        }
    }
}

fn replace(s: &mut Size, f: &mut impl FnMut(RankId) -> Option<Size>) {
    match s {
        Size::Const(_) => {}
        Size::Rank(r) => {
            if let Some(new) = f(*r) {
                *s = new;
            }
        }
        Size::Add(a, b)
        | Size::Sub(a, b)
        | Size::Mul(a, b)
        | Size::Div(a, b)
        | Size::CeilDiv(a, b)
        | Size::Min(a, b)
        | Size::Max(a, b) => {
            replace(a, f);
            replace(b, f);
            if let (Size::Const(_), Size::Const(_)) = (&**a, &**b)
                && let Ok(n) = s.eval(&[])
            {
                *s = Size::Const(n);
            }
        }
    }
}
