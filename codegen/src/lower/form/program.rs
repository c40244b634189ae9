//! The statements of a normalised cascade as a graph: who reads what, along which indices.

use std::collections::{HashMap, HashSet};

use einfall_ir::cascade::{Cascade, Einsum, Expr, ExprId, IndexId, MonoidId, Reducer, TensorId};
use einfall_ir::dtype::DType;
use einfall_ir::ops::{BinaryOp, ReduceOp};

use crate::identity::is_identity;
use crate::passes::Unsupported;
use crate::passes::rewrite::mentions;

/// What a statement does.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// Elementwise.
    Map,
    /// One reduction of an elementwise body.
    Reduce { op: ReduceOp, over: Vec<IndexId>, body: ExprId },
    /// A running reduction along a free index.
    Scan { op: ReduceOp, over: IndexId, body: ExprId },
    /// A reduction, or a running one along the free index `over`, by a monoid of the user's: one body a component.
    Fold { monoid: MonoidId, over: Vec<IndexId>, body: Vec<ExprId>, running: bool },
}

/// One statement.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// The statement.
    pub einsum: Einsum,
    /// Its kind.
    pub kind: Kind,
    /// The left-hand side's indices if they are plain and distinct, one per dimension.
    pub dims: Option<Vec<IndexId>>,
    /// Every tensor element read, with its accesses.
    pub reads: Vec<(TensorId, Vec<ExprId>)>,
}

impl Node {
    /// Classifies a normalised statement.
    pub fn new(c: &Cascade, einsum: &Einsum) -> Result<Node, Unsupported> {
        let unsupported = |what: &str| Unsupported::new(einsum.span, what);
        let components = |body: ExprId| match &c.exprs[body] {
            Expr::Tuple(items) => items.clone(),
            _ => vec![body],
        };
        let kind = match &c.exprs[einsum.value] {
            Expr::Reduce { op, over, body } => match op {
                Reducer::Op(op) => Kind::Reduce { op: *op, over: over.clone(), body: *body },
                Reducer::TopK { .. } => return Err(unsupported("top-k within an iteration")),
                Reducer::User(m) => {
                    Kind::Fold { monoid: *m, over: over.clone(), body: components(*body), running: false }
                }
            },
            Expr::Scan { op, over, body } => match op {
                Reducer::Op(op) => Kind::Scan { op: *op, over: *over, body: *body },
                Reducer::TopK { .. } => return Err(unsupported("a running top-k")),
                Reducer::User(m) => {
                    Kind::Fold { monoid: *m, over: vec![*over], body: components(*body), running: true }
                }
            },
            _ => Kind::Map,
        };
        // Points are removed by guards of bodies: a filter says which elements of an array are written, and no more.
        if let (Some(filter), Kind::Reduce { over, .. }) = (einsum.filter, &kind)
            && over.iter().any(|i| mentions(c, filter, *i))
        {
            return Err(unsupported("a filter of a reduction's points that is no guard of its body"));
        }
        // Outside iterations a joined write is a kernel of its own and no node.
        if einsum.join.is_some() {
            return Err(unsupported("a joined write (`+=`) within an iteration"));
        }
        let mut seen = HashSet::new();
        let dims = einsum.targets[0]
            .at
            .iter()
            .map(|&a| match c.exprs[a] {
                Expr::Index(i) if seen.insert(i) => Some(i),
                _ => None,
            })
            .collect();
        let mut reads = Vec::new();
        for root in einsum.roots() {
            c.walk(root, &mut |_, e| {
                if let Expr::Read { tensor, at } = e {
                    reads.push((*tensor, at.clone()));
                }
            });
        }
        Ok(Node { einsum: einsum.clone(), kind, dims, reads })
    }

    /// The tensor written (the first, for several results).
    pub fn target(&self) -> TensorId {
        self.einsum.targets[0].tensor
    }

    /// Free indices, then reduced ones.
    pub fn indices(&self) -> impl Iterator<Item = IndexId> + '_ {
        self.einsum.free.iter().copied().chain(self.over().iter().copied())
    }

    /// Reduced indices.
    pub fn over(&self) -> &[IndexId] {
        match &self.kind {
            Kind::Reduce { over, .. } | Kind::Fold { over, running: false, .. } => over,
            Kind::Map | Kind::Scan { .. } | Kind::Fold { .. } => &[],
        }
    }

    /// Whether it is a reduction by a monoid of the user's, which is a kernel of its own.
    pub fn is_fold(&self) -> bool {
        matches!(self.kind, Kind::Fold { .. })
    }

    /// Whether it is a product of matrices: computing it twice is never worth it.
    pub fn is_heavy(&self, c: &Cascade) -> bool {
        self.contraction(c).is_some_and(|x| x.both_free)
    }

    /// How its body splits into two operands with indices of their own, if it is a contraction.
    pub fn contraction(&self, c: &Cascade) -> Option<Contraction> {
        match &self.kind {
            Kind::Reduce { op: ReduceOp::Sum, over, body } => Contraction::of(c, *body, &self.einsum.free, over),
            Kind::Reduce { .. } | Kind::Map | Kind::Scan { .. } | Kind::Fold { .. } => None,
        }
    }
}

/// A sum of products seen as a contraction: `Σ_over guards ? a · b : 0`.
#[derive(Clone, Debug)]
pub(super) struct Contraction {
    /// Factors of the left operand.
    pub a: Vec<ExprId>,
    /// The right operand.
    pub b: ExprId,
    /// Points that count, outermost condition first: those where each condition has the given truth.
    pub guards: Vec<(ExprId, bool)>,
    /// Whether each operand has a free index that the other lacks, or only looks up where it reads by: a product of
    /// matrices, not of a vector.
    pub both_free: bool,
}

impl Contraction {
    /// Splits `body`, whose result has indices `free`, so that at least one operand has a free index the other lacks, and both have a reduced one.
    pub fn of(c: &Cascade, body: ExprId, free: &[IndexId], over: &[IndexId]) -> Option<Contraction> {
        let zero = |e: ExprId| is_identity(c, e, ReduceOp::Sum, DType::F64);
        let (mut product, mut guards) = (body, Vec::new());
        while let Expr::Select(cond, yes, no) = c.exprs[product] {
            let (value, truth) = match (zero(yes), zero(no)) {
                (false, true) => (yes, true),
                (true, false) => (no, false),
                (true, true) | (false, false) => break,
            };
            guards.push((cond, truth));
            product = value;
        }
        let mut factors = Vec::new();
        flatten_product(c, product, &mut factors);
        let sets: Vec<HashSet<IndexId>> = factors.iter().map(|&f| c.free_indices(f).into_iter().collect()).collect();
        let mut best: Option<((usize, bool, bool, usize), usize)> = None;
        for b in 0..factors.len() {
            let rest: HashSet<IndexId> =
                sets.iter().enumerate().filter(|(k, _)| *k != b).flat_map(|(_, s)| s.iter().copied()).collect();
            let reduces = |s: &HashSet<IndexId>| over.iter().any(|i| s.contains(i));
            if !reduces(&rest) || !reduces(&sets[b]) {
                continue;
            }
            let own = |x: &HashSet<IndexId>, y: &HashSet<IndexId>| {
                x.iter().filter(|i| !y.contains(i) && !over.contains(i)).count()
            };
            let (in_a, in_b) = (own(&rest, &sets[b]), own(&sets[b], &rest));
            if in_a + in_b == 0 {
                continue;
            }
            let bare = matches!(c.exprs[factors[b]], Expr::Read { .. });
            // The right operand should own the last index of the result, along which it is stored.
            let last = free.iter().rev().find(|i| rest.contains(i) != sets[b].contains(i));
            let score = (in_a.min(in_b), last.is_some_and(|i| sets[b].contains(i)), bare, in_b);
            if best.is_none_or(|(s, _)| score >= s) {
                best = Some((score, b));
            }
        }
        let ((shared, ..), b) = best?;
        let right = factors.remove(b);
        let walked = |of: &[ExprId]| -> HashSet<IndexId> { of.iter().flat_map(|&f| walked_indices(c, f)).collect() };
        let (by_a, by_b) = (walked(&factors), walked(&[right]));
        let lacks = |own: &[ExprId], other: &HashSet<IndexId>| {
            own.iter().flat_map(|&f| c.free_indices(f)).any(|i| !other.contains(&i) && !over.contains(&i))
        };
        let both_free = shared > 0 || (lacks(&factors, &by_b) && lacks(&[right], &by_a));
        Some(Contraction { a: factors, b: right, guards, both_free })
    }
}

/// The free indices of a factor but those that occur only in positions that are read themselves (`n` of `w[s[n],d]`).
fn walked_indices(c: &Cascade, e: ExprId) -> Vec<IndexId> {
    match &c.exprs[e] {
        Expr::Read { at, .. } => {
            let plain = |a: &&ExprId| {
                let mut reads = false;
                c.walk(**a, &mut |_, x| reads |= matches!(x, Expr::Read { .. }));
                !reads
            };
            at.iter().filter(plain).flat_map(|&a| c.free_indices(a)).collect()
        }
        _ => c.free_indices(e).into_iter().collect(),
    }
}

/// The factors of a product.
pub(super) fn flatten_product(c: &Cascade, e: ExprId, out: &mut Vec<ExprId>) {
    match c.exprs[e] {
        Expr::Binary(BinaryOp::Mul, a, b) => {
            flatten_product(c, a, out);
            flatten_product(c, b, out);
        }
        _ => out.push(e),
    }
}

/// The plain indices of an access, if it has no others and none twice.
pub(super) fn plain_access(c: &Cascade, at: &[ExprId]) -> Option<Vec<IndexId>> {
    let mut seen = HashSet::new();
    at.iter()
        .map(|&a| match c.exprs[a] {
            Expr::Index(i) if seen.insert(i) => Some(i),
            _ => None,
        })
        .collect()
}

/// For every statement, how many different reductions consume each of its dimensions, directly or through
/// elementwise statements. Two or more say that fusing saves re-reading it.
pub(super) fn reductions_of_dims(c: &Cascade, nodes: &[Node]) -> Vec<Vec<usize>> {
    let mut readers: HashMap<TensorId, Vec<usize>> = HashMap::new();
    for (k, node) in nodes.iter().enumerate() {
        for (t, _) in &node.reads {
            let list = readers.entry(*t).or_default();
            if !list.contains(&k) {
                list.push(k);
            }
        }
    }
    let empty = Vec::new();
    nodes
        .iter()
        .map(|node| {
            let n_dims = node.dims.as_ref().map_or(0, Vec::len);
            (0..n_dims)
                .map(|dim| {
                    let mut found = HashSet::new();
                    let mut seen = HashSet::new();
                    let mut todo = vec![(node.target(), dim)];
                    while let Some((t, d)) = todo.pop() {
                        if !seen.insert((t, d)) {
                            continue;
                        }
                        for &r in readers.get(&t).unwrap_or(&empty) {
                            let reader = &nodes[r];
                            for (_, at) in reader.reads.iter().filter(|(u, _)| *u == t) {
                                let Expr::Index(i) = c.exprs[at[d]] else { continue };
                                if reader.over().contains(&i) {
                                    found.insert(r);
                                } else if matches!(reader.kind, Kind::Map) {
                                    let position = reader.dims.as_ref().and_then(|v| v.iter().position(|&j| j == i));
                                    todo.extend(position.map(|p| (reader.target(), p)));
                                }
                            }
                        }
                    }
                    found.len()
                })
                .collect()
        })
        .collect()
}
