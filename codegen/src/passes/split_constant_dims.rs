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

#[cfg(test)]
mod tests {
    use einfall_ir::array::Array;
    use einfall_ir::cascade::bind::{Given, bind};
    use einfall_ir::cascade::eval::evaluate;
    use einfall_ir::cascade::parse;
    use einfall_ir::cascade::print::print_cascade;

    use super::*;

    const HEAD: &str = "cascade c[M, N](x: f32[M,4], w: f32[M,4,N]) -> (y: f32[M]) {\n";

    /// The cascade before and after as text; both compute the same.
    fn split(body: &str) -> (String, String) {
        let text = format!("{HEAD}{body}\n}}\n");
        let c = parse(&text).unwrap_or_else(|d| panic!("{d:?}\n{text}")).cascades.remove(0);
        let s = split_constant_dims(c.clone());
        let b = bind(&c, &Given { sizes: vec![("M".into(), 3), ("N".into(), 2)], ..Given::default() }).unwrap();
        let mut k = 0.0;
        let inputs: Vec<Array> = c
            .params
            .iter()
            .map(|t| {
                Array::from_fn(c.tensors[*t].dtype, &b.dims(&c, *t).unwrap(), |_| {
                    k += 0.7;
                    f64::sin(k)
                })
            })
            .collect();
        let (want, have) = (evaluate(&c, &b, &inputs).unwrap(), evaluate(&s, &b, &inputs).unwrap());
        for (w, h) in want.iter().zip(&have) {
            assert!(w.data.iter().zip(&h.data).all(|(a, b)| a == b), "{}", print_cascade(&s));
        }
        (print_cascade(&c), print_cascade(&s))
    }

    fn stays(body: &str) {
        let (before, after) = split(body);
        assert_eq!(before, after);
    }

    #[test]
    fn a_tensor_per_literal_that_is_read() {
        let (_, after) = split("g[m,a] = exp(x[m,a])\n y[m] = sigmoid(g[m,0]) * g[m,2] + g[m,0]");
        assert!(after.contains("g_0[m] = exp(x[m,0])") && after.contains("g_2[m] = exp(x[m,2])"), "{after}");
        assert!(!after.contains("g_1") && !after.contains("g[m,"), "{after}");
        assert!(after.contains("y[m] = sigmoid(g_0[m]) * g_2[m] + g_0[m]"), "{after}");
    }

    #[test]
    fn what_reads_a_part_is_split_in_its_turn() {
        let (_, after) = split("g[m,a] = x[m,a] + 1.0\n h[m,a] = g[m,a] * 2.0\n y[m] = h[m,1] - h[m,3]");
        assert!(after.contains("h_1[m] = g_1[m] * 2.0") && after.contains("g_3[m] = x[m,3] + 1.0"), "{after}");
    }

    #[test]
    fn a_name_that_is_taken_is_not_taken_again() {
        let (_, after) = split("g_0[m] = x[m,1]\n g[m,a] = x[m,a]\n y[m] = g[m,0] * g_0[m]");
        assert!(after.contains("g_0_1[m] = x[m,0]") && after.contains("g_0_1[m] * g_0[m]"), "{after}");
    }

    #[test]
    fn filters_and_what_stands_elsewhere_follow() {
        let (_, after) = split("g[m,a] = x[m,a] where a + m < 3 else -1.0\n y[m] = g[m,0] + g[m,3]");
        assert!(after.contains("where 0 + m < 3 else -1.0") && after.contains("where 3 + m < 3 else -1.0"), "{after}");
    }

    #[test]
    fn what_stays_whole() {
        // Read along the dimension as well.
        stays("g[m,a] = exp(x[m,a])\n y[m] = g[m,0] + (sum(a) g[m,a])");
        // A reduction is one walk over what it reads.
        stays("g[m,a] = sum(n) w[m,a,n]\n y[m] = g[m,0] * g[m,1]");
        // An array of the caller.
        stays("y[m] = x[m,0] * x[m,1]");
    }
}
