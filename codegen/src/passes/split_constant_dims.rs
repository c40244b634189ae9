//! split-constant-dims: a dimension that is only ever read at literals becomes a tensor per literal.
//!
//! Before: `g[m,a] = ..;  y[m] = sigmoid(g[m,0]) * g[m,1]`
//! After:  `g_0[m] = ..;  g_1[m] = ..;  y[m] = sigmoid(g_0[m]) * g_1[m]`
//!
//! Every access that is left is then an index of the reading statement, which is what fusing needs. Reductions stay
//! whole (one walk, not several), and so do iterations: their tiles are read at fixed places.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use einfall_ir::cascade::{Cascade, Einsum, Expr, ExprId, IndexId, Size, Stmt, TensorId, TensorKind};

use super::rewrite::{rewrite, substitute};

/// One split: dimension `dim` of a tensor, with the tensor that stands for each literal.
struct Split {
    dim: usize,
    parts: BTreeMap<i64, TensorId>,
}

/// Splits every intermediate that allows it.
pub fn split_constant_dims(mut c: Cascade) -> Cascade {
    while let Some((tensor, split)) = find(&mut c) {
        apply(&mut c, tensor, &split);
    }
    c
}

fn find(c: &mut Cascade) -> Option<(TensorId, Split)> {
    let mut literals: HashMap<TensorId, Vec<Option<BTreeSet<i64>>>> = HashMap::new();
    let mut written: HashMap<TensorId, Vec<Vec<bool>>> = HashMap::new();
    for e in c.einsums() {
        for t in &e.targets {
            let plain = t.at.iter().map(|&a| matches!(c.exprs[a], Expr::Index(i) if e.free.contains(&i))).collect();
            written.entry(t.tensor).or_default().push(plain);
        }
        for root in e.roots() {
            c.walk(root, &mut |_, x| {
                let Expr::Read { tensor, at } = x else { return };
                let dims = literals.entry(*tensor).or_insert_with(|| vec![Some(BTreeSet::new()); at.len()]);
                for (slot, &a) in dims.iter_mut().zip(at) {
                    match (slot.as_mut(), &c.exprs[a]) {
                        (Some(set), Expr::Int(v)) => {
                            set.insert(*v);
                        }
                        _ => *slot = None,
                    }
                }
            });
        }
    }
    let (tensor, dim, values) = c.tensors.iter().find_map(|(id, t)| {
        let [plain] = written.get(&id)?.as_slice() else { return None };
        let one_target = c.stmts.iter().any(|s| match s {
            Stmt::Einsum(e) => e.targets.len() == 1 && e.targets[0].tensor == id && elementwise(c, e),
            Stmt::Iter(_) => false,
        });
        if t.kind != TensorKind::Intermediate || !one_target {
            return None;
        }
        literals.get(&id)?.iter().enumerate().find_map(|(dim, set)| {
            let set = set.as_ref().filter(|s| !s.is_empty())?;
            let Size::Const(extent) = t.dims[dim] else { return None };
            let inside = set.iter().all(|&v| u64::try_from(v).is_ok_and(|v| v < extent));
            (plain[dim] && inside).then(|| (id, dim, set.clone()))
        })
    })?;
    let mut parts = BTreeMap::new();
    for v in values {
        let mut part = c.tensors[tensor].clone();
        part.dims.remove(dim);
        part.name = (0..)
            .map(|k| if k == 0 { format!("{}_{v}", part.name) } else { format!("{}_{v}_{k}", part.name) })
            .find(|n| c.tensor(n).is_none())
            .expect("some name is free");
        parts.insert(v, c.tensors.push(part));
    }
    Some((tensor, Split { dim, parts }))
}

/// Whether it reduces nothing: splitting a reduction would make several walks of one.
fn elementwise(c: &Cascade, e: &Einsum) -> bool {
    let mut reduces = false;
    c.walk(e.value, &mut |_, x| reduces |= matches!(x, Expr::Reduce { .. } | Expr::Scan { .. }));
    !reduces
}

fn apply(c: &mut Cascade, tensor: TensorId, split: &Split) {
    let stmts = std::mem::take(&mut c.stmts);
    let each = |c: &mut Cascade, list: Vec<Einsum>| -> Vec<Einsum> {
        list.into_iter().flat_map(|e| statement(c, e, tensor, split)).collect()
    };
    let mut out = Vec::new();
    for stmt in stmts {
        match stmt {
            Stmt::Einsum(e) => out.extend(each(c, vec![e]).into_iter().map(Stmt::Einsum)),
            Stmt::Iter(mut i) => {
                i.inits = each(c, std::mem::take(&mut i.inits));
                i.body = each(c, std::mem::take(&mut i.body));
                out.push(Stmt::Iter(i));
            }
        }
    }
    c.stmts = out;
}

fn statement(c: &mut Cascade, mut e: Einsum, tensor: TensorId, split: &Split) -> Vec<Einsum> {
    if e.targets[0].tensor != tensor {
        let redirect = |c: &mut Cascade, root: ExprId| redirect(c, root, tensor, split);
        e.value = redirect(c, e.value);
        e.filter = e.filter.map(|x| redirect(c, x));
        e.otherwise = e.otherwise.map(|x| redirect(c, x));
        for t in &mut e.targets {
            t.at = t.at.iter().map(|&a| redirect(c, a)).collect();
        }
        return vec![e];
    }
    let Expr::Index(i) = c.exprs[e.targets[0].at[split.dim]] else { return vec![e] };
    split
        .parts
        .iter()
        .map(|(&v, &part)| {
            let literal = c.push_expr(Expr::Int(v), e.span);
            let map: HashMap<IndexId, ExprId> = HashMap::from([(i, literal)]);
            let mut copy = e.clone();
            copy.free.retain(|&j| j != i);
            copy.targets[0].tensor = part;
            copy.targets[0].at.remove(split.dim);
            copy.value = substitute(c, e.value, &map);
            copy.filter = e.filter.map(|x| substitute(c, x, &map));
            copy.otherwise = e.otherwise.map(|x| substitute(c, x, &map));
            copy
        })
        .collect()
}

fn redirect(c: &mut Cascade, root: ExprId, tensor: TensorId, split: &Split) -> ExprId {
    rewrite(c, root, &mut |c, id, e| {
        let Expr::Read { tensor: t, at } = e else { return None };
        if *t != tensor {
            return None;
        }
        let Expr::Int(v) = c.exprs[at[split.dim]] else { return None };
        let mut at: Vec<ExprId> = at.iter().map(|&a| redirect(c, a, tensor, split)).collect();
        at.remove(split.dim);
        let span = c.spans[einfall_ir::arena::Id::index(id)];
        Some(c.push_expr(Expr::Read { tensor: split.parts[&v], at }, span))
    })
}
