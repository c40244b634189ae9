//! Pass counts per tensor and rank: how often a fiber of a rank is traversed by the cascade as written.
//!
//! A pass over rank R is one traversal of every element of a fiber. A read that must come after every element was
//! visited is a further pass. The levels are those of the FuseMax pass analysis (arXiv 2406.10491, §4): a reduction
//! over R is a barrier (its result is one level up); iterative edges, running reductions and prefix filters are not;
//! an iteration against the direction of a complete one is. Provenance flows only through tensors that carry every
//! sub-rank of a split rank. Invariant: the count depends on the data flow alone, never on names.
//!
//! Two indices over one rank may walk different fibers (queries and keys of self-attention), so levels are computed
//! per *fiber class*: dimensions joined by a common index.

use std::collections::{BTreeMap, BTreeSet};

use crate::cascade::{Cascade, Einsum, Expr, ExprId, IndexId, IndexKind, Iter, RankId, Stmt, TensorId};
use crate::ops::BinaryOp;

/// Pass counts over one rank, or over a rank split into several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passes {
    /// The largest count over all tensors; 0 if no tensor is read along the rank.
    pub max: usize,
    /// Count of every tensor that is read along the rank.
    pub per_tensor: BTreeMap<TensorId, usize>,
}

/// Passes over each rank of the header, in order.
pub fn pass_counts(c: &Cascade) -> Vec<(RankId, Passes)> {
    c.ranks.ids().map(|r| (r, passes_over(c, &[r]))).collect()
}

/// Passes over the rank that is split into `sub_ranks`, outermost first (one rank: unsplit).
pub fn passes_over(c: &Cascade, sub_ranks: &[RankId]) -> Passes {
    let mut out = Passes::default();
    let classes = if sub_ranks.len() == 1 { fiber_classes(c, sub_ranks[0]) } else { vec![indices_over(c, sub_ranks)] };
    for class in classes {
        let mut walk = Walk::new(c, sub_ranks, class);
        walk.run();
        for (tensor, n) in walk.counts() {
            let slot = out.per_tensor.entry(tensor).or_default();
            *slot = (*slot).max(n);
            out.max = out.max.max(n);
        }
    }
    out
}

fn indices_over(c: &Cascade, ranks: &[RankId]) -> BTreeSet<IndexId> {
    c.indices.iter().filter(|(_, i)| i.rank.is_some_and(|r| ranks.contains(&r))).map(|(id, _)| id).collect()
}

/// The indices over `rank`, grouped by the fibers they walk.
fn fiber_classes(c: &Cascade, rank: RankId) -> Vec<BTreeSet<IndexId>> {
    type Group = (BTreeSet<IndexId>, BTreeSet<(TensorId, usize)>);
    let mut groups: Vec<Group> = Vec::new();
    for_each_access(c, &mut |tensor, at| {
        for (dim, &e) in at.iter().enumerate() {
            for v in direct_indices(c, e) {
                if c.indices[v].rank != Some(rank) {
                    continue;
                }
                let mut joined = (BTreeSet::from([v]), BTreeSet::from([(tensor, dim)]));
                groups.retain(|g| {
                    let meets = g.0.contains(&v) || g.1.contains(&(tensor, dim));
                    if meets {
                        joined.0.extend(&g.0);
                        joined.1.extend(&g.1);
                    }
                    !meets
                });
                groups.push(joined);
            }
        }
    });
    groups.into_iter().map(|g| g.0).collect()
}

/// Calls `f` on every access: reads, left-hand sides, and reads nested in accesses.
fn for_each_access(c: &Cascade, f: &mut impl FnMut(TensorId, &[ExprId])) {
    for e in c.einsums() {
        for t in &e.targets {
            f(t.tensor, &t.at);
        }
        for root in e.roots() {
            c.walk(root, &mut |_, x| {
                if let Expr::Read { tensor, at } = x {
                    f(*tensor, at);
                }
            });
        }
    }
}

/// Indices an access expression is made of, those inside nested reads excluded.
pub(crate) fn direct_indices(c: &Cascade, e: ExprId) -> Vec<IndexId> {
    match &c.exprs[e] {
        Expr::Index(v) => vec![*v],
        Expr::Read { .. } | Expr::Segment { .. } => Vec::new(),
        x => {
            let mut out = Vec::new();
            x.for_each_operand(|o| out.extend(direct_indices(c, o)));
            out
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Direction {
    Forward,
    Backward,
}

/// What is known of a tensor: the level at which its elements can be read, and the order they become known in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Avail {
    level: usize,
    order: Option<Direction>,
}

const AT_ONCE: Avail = Avail { level: 1, order: None };

/// What one region (a body walked element by element) has met so far.
#[derive(Default)]
struct Region {
    avail: Vec<Avail>,
    reads: Vec<TensorId>,
    scans: Vec<Direction>,
}

impl Region {
    /// The level it runs at and the order it runs in: values of both directions meet only after one is complete.
    fn level(&self, run: Option<Direction>) -> Avail {
        let mut at = Avail { level: 1, order: run };
        let orders = self.avail.iter().copied().chain(self.scans.iter().map(|d| Avail { level: 1, order: Some(*d) }));
        let mut all: Vec<Avail> = orders.collect();
        all.sort_by_key(|a| a.level);
        for a in all {
            let clash = matches!((a.order, at.order), (Some(x), Some(y)) if x != y);
            let level = if clash { a.level + 1 } else { a.level };
            if clash {
                at.level = at.level.max(level);
                at.order = run;
            } else {
                at.level = at.level.max(level);
                at.order = at.order.or(a.order);
            }
        }
        at
    }
}

struct Walk<'a> {
    c: &'a Cascade,
    sub_ranks: &'a [RankId],
    class: BTreeSet<IndexId>,
    avail: BTreeMap<TensorId, Avail>,
    reads: BTreeMap<TensorId, BTreeSet<usize>>,
    flows: BTreeMap<TensorId, BTreeSet<TensorId>>,
}

impl<'a> Walk<'a> {
    fn new(c: &'a Cascade, sub_ranks: &'a [RankId], class: BTreeSet<IndexId>) -> Self {
        let (avail, reads, flows) = Default::default();
        Walk { c, sub_ranks, class, avail, reads, flows }
    }

    fn run(&mut self) {
        for s in &self.c.stmts {
            match s {
                Stmt::Einsum(e) => self.einsum(e, None),
                Stmt::Iter(i) => self.iter(i),
            }
        }
    }

    fn iter(&mut self, i: &Iter) {
        let run = self.class.contains(&i.index).then_some(if i.rev { Direction::Backward } else { Direction::Forward });
        for e in &i.inits {
            self.einsum(e, None);
        }
        // States are read before they are written: levels rise to a fixed point.
        for _ in 0..=i.states.len() {
            let before = self.avail.clone();
            for e in &i.body {
                self.einsum(e, run);
            }
            if before == self.avail {
                break;
            }
        }
    }

    fn einsum(&mut self, e: &Einsum, run: Option<Direction>) {
        let mut top = Region::default();
        let roots: Vec<ExprId> = e.roots().collect();
        for &root in &roots {
            self.expr(root, e, &mut top);
        }
        let kept = e.targets.iter().any(|t| t.at.iter().any(|&x| self.has_class(x)));
        let at = top.level(run);
        if kept || run.is_some() {
            self.record(&top, at.level);
        }
        for t in &e.targets {
            let old = self.avail.get(&t.tensor).copied().unwrap_or(AT_ONCE);
            let order = if kept { at.order.or(old.order) } else { None };
            self.avail.insert(t.tensor, Avail { level: at.level.max(old.level), order });
            if t.at.iter().flat_map(|&x| direct_indices(self.c, x)).any(|v| self.class.contains(&v))
                && self.carries_all(&t.at)
            {
                for &root in &roots {
                    let mut sources = Vec::new();
                    self.c.walk(root, &mut |_, x| {
                        if let Expr::Read { tensor, at } = x {
                            let through = at
                                .iter()
                                .flat_map(|&a| direct_indices(self.c, a))
                                .any(|v| self.class.contains(&v) && self.c.indices[v].kind != IndexKind::Reduced);
                            if through && self.carries_all(at) {
                                sources.push(*tensor);
                            }
                        }
                    });
                    for s in sources {
                        self.flows.entry(s).or_default().insert(t.tensor);
                    }
                }
            }
        }
    }

    fn has_class(&self, e: ExprId) -> bool {
        direct_indices(self.c, e).iter().any(|v| self.class.contains(v))
    }

    /// Whether an access has an index of the class over every sub-rank.
    fn carries_all(&self, at: &[ExprId]) -> bool {
        self.sub_ranks.iter().all(|r| {
            at.iter()
                .flat_map(|&e| direct_indices(self.c, e))
                .any(|v| self.class.contains(&v) && self.c.indices[v].rank == Some(*r))
        })
    }

    fn record(&mut self, region: &Region, level: usize) {
        for t in &region.reads {
            self.reads.entry(*t).or_default().insert(level);
        }
    }

    /// Adds what `e` reads to `region`; reductions over the class open a region of their own.
    fn expr(&mut self, e: ExprId, stmt: &Einsum, region: &mut Region) {
        let c = self.c;
        match &c.exprs[e] {
            Expr::Read { tensor, at } => {
                let along = at.iter().any(|&x| self.has_class(x));
                let mut a = self.avail.get(tensor).copied().unwrap_or(AT_ONCE);
                if along {
                    if self.carries_all(at) {
                        region.reads.push(*tensor);
                    }
                } else if a.order.is_some() {
                    // A fixed point of an iterated tensor waits for the iteration.
                    a = Avail { level: a.level + 1, order: None };
                }
                region.avail.push(a);
                for &x in at {
                    self.expr(x, stmt, region);
                }
            }
            Expr::Segment { offsets, .. } => {
                region.avail.push(self.avail.get(offsets).copied().unwrap_or(AT_ONCE));
            }
            Expr::Reduce { over, body, .. } if over.iter().any(|v| self.class.contains(v)) => {
                let mut inner = Region::default();
                self.expr(*body, stmt, &mut inner);
                if let Some(f) = stmt.filter {
                    self.expr(f, stmt, &mut inner);
                }
                let at = inner.level(None);
                self.record(&inner, at.level);
                let outermost = self.sub_ranks[0];
                let whole = over.iter().any(|v| self.class.contains(v) && c.indices[*v].rank == Some(outermost));
                match self.prefix(over, *body, stmt) {
                    Some(direction) => region.avail.push(Avail { level: at.level, order: Some(direction) }),
                    None if whole => region.avail.push(Avail { level: at.level + 1, order: None }),
                    None => region.avail.push(at),
                }
            }
            Expr::Scan { over, body, .. } => {
                if self.class.contains(over) {
                    region.scans.push(Direction::Forward);
                }
                self.expr(*body, stmt, region);
            }
            Expr::Int(_) | Expr::Float(_) | Expr::Size(_) | Expr::Index(_) => {}
            x @ (Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Tuple(_)
            | Expr::Reduce { .. }
            | Expr::Rand { .. }) => {
                let mut operands = Vec::new();
                x.for_each_operand(|o| operands.push(o));
                for o in operands {
                    self.expr(o, stmt, region);
                }
            }
        }
    }

    /// The direction of a reduction that a prefix filter `n <= i` makes a running one: the body must not depend on
    /// `i`, otherwise every `i` has a fiber of its own.
    fn prefix(&self, over: &[IndexId], body: ExprId, stmt: &Einsum) -> Option<Direction> {
        let mut conjuncts = Vec::new();
        self.conjuncts(stmt.filter?, &mut conjuncts);
        for (op, a, b) in conjuncts {
            let (Expr::Index(x), Expr::Index(y)) = (&self.c.exprs[a], &self.c.exprs[b]) else { continue };
            let (x, y, op) = if over.contains(x) {
                (*x, *y, op)
            } else {
                let flipped = match op {
                    BinaryOp::Lt => BinaryOp::Gt,
                    BinaryOp::Le => BinaryOp::Ge,
                    BinaryOp::Gt => BinaryOp::Lt,
                    BinaryOp::Ge => BinaryOp::Le,
                    other => other,
                };
                (*y, *x, flipped)
            };
            let running = over.contains(&x) && !over.contains(&y) && self.c.indices[x].rank == self.c.indices[y].rank;
            if !running || !self.class.contains(&x) {
                continue;
            }
            let mut depends = false;
            self.c.walk(body, &mut |_, e| depends |= matches!(e, Expr::Index(v) if *v == y));
            if depends {
                continue;
            }
            match op {
                BinaryOp::Lt | BinaryOp::Le => return Some(Direction::Forward),
                BinaryOp::Gt | BinaryOp::Ge => return Some(Direction::Backward),
                _ => {}
            }
        }
        None
    }

    fn conjuncts(&self, e: ExprId, out: &mut Vec<(BinaryOp, ExprId, ExprId)>) {
        if let Expr::Binary(op, a, b) = &self.c.exprs[e] {
            if *op == BinaryOp::And {
                self.conjuncts(*a, out);
                self.conjuncts(*b, out);
            } else {
                out.push((*op, *a, *b));
            }
        }
    }

    /// Per tensor, the number of distinct levels at which it or its provenance closure is read.
    fn counts(&self) -> Vec<(TensorId, usize)> {
        let count = |start: TensorId| {
            let (mut seen, mut stack) = (BTreeSet::from([start]), vec![start]);
            let mut levels: BTreeSet<usize> = BTreeSet::new();
            while let Some(t) = stack.pop() {
                levels.extend(self.reads.get(&t).into_iter().flatten());
                for &next in self.flows.get(&t).into_iter().flatten() {
                    if seen.insert(next) {
                        stack.push(next);
                    }
                }
            }
            levels.len()
        };
        self.reads.keys().map(|&t| (t, count(t))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, one};
    use super::*;

    fn over(source: &str, rank: &str) -> usize {
        let c = one(source);
        passes_over(&c, &[c.rank(rank).expect("rank")]).max
    }

    #[test]
    fn published_counts() {
        assert_eq!(over(&samples::attention(), "N"), 3);
        assert_eq!(over(&samples::attention(), "M"), 1);
        assert_eq!(over(&samples::attention(), "E"), 1);
        assert_eq!(over(samples::DEFERRED, "N"), 2);
        assert_eq!(over(samples::UNSTABILISED, "N"), 2);
        assert_eq!(over(samples::UNSTABILISED_DEFERRED, "N"), 1);
        assert_eq!(over(samples::LSE, "N"), 2);
        assert_eq!(over(samples::CROSS_ENTROPY, "N"), 2);
        assert_eq!(over(samples::RMS_MATMUL, "K"), 2);
        assert_eq!(over(&samples::layernorm(true), "K"), 3);
        assert_eq!(over(samples::VARIANCE, "N"), 2);
        assert_eq!(over(samples::THIRD, "N"), 2);
        assert_eq!(over(samples::ENTROPY, "N"), 3);
        assert_eq!(over(samples::SOFTMAX, "N"), 3);
        assert_eq!(over(samples::LAYERNORM, "K"), 3);
        assert_eq!(over(samples::SIGMOID, "N"), 2);
        assert_eq!(over(samples::FP8, "K"), 2);
    }

    #[test]
    fn deferring_a_factor_saves_a_pass() {
        let text = "cascade t[K](x: f32[K], w: f32[K]) -> (y: f32[]) {
            q[] = sum(k) x[k] * x[k]
            y[] = rsqrt(q[]) * (sum(k) x[k] * w[k])
        }";
        assert_eq!(over(text, "K"), 1);
    }

    #[test]
    fn split_ranks_of_flash_attention() {
        let text = "cascade flash[M, N1, N0, E, F](Q: f32[M,E], K: f32[N1*N0,E], V: f32[N1*N0,F])
            -> (O: f32[M,F]) {
            iter i in N1 {
                mx[0,m] = -inf;  l[0,m] = 0.0;  o[0,m,f] = 0.0
                S[i,m,n0] = sum(e) Q[m,e] * K[i*N0+n0,e]
                mx[i+1,m] = max(mx[i,m], max(n0) S[i,m,n0])
                P[i,m,n0] = exp(S[i,m,n0] - mx[i+1,m])
                l[i+1,m] = exp(mx[i,m] - mx[i+1,m]) * l[i,m] + (sum(n0) P[i,m,n0])
                o[i+1,m,f] = exp(mx[i,m] - mx[i+1,m]) * o[i,m,f] + (sum(n0) P[i,m,n0] * V[i*N0+n0,f])
            }
            O[m,f] = o[N1,m,f] / l[N1,m]
        }";
        let c = one(text);
        let (n1, n0) = (c.rank("N1").unwrap(), c.rank("N0").unwrap());
        assert_eq!(passes_over(&c, &[n1]).max, 1);
        assert_eq!(passes_over(&c, &[n0]).max, 2);
        assert_eq!(passes_over(&c, &[n1, n0]).max, 1);
    }

    #[test]
    fn split_provenance_needs_every_sub_rank() {
        // The two-pass cascade of FuseMax: local maxima are read again, but they carry N1 alone.
        let text = "cascade fusemax[M, N1, N0, F](S: f32[M,N1,N0], V: f32[N1,N0,F]) -> (O: f32[M,F]) {
            LM[m,n1] = max(n0) S[m,n1,n0]
            P[m,n1,n0] = exp(S[m,n1,n0] - LM[m,n1])
            LD[m,n1] = sum(n0) P[m,n1,n0]
            LN[m,n1,f] = sum(n0) P[m,n1,n0] * V[n1,n0,f]
            GM[m] = max(n1) LM[m,n1]
            C[m,n1] = exp(LM[m,n1] - GM[m])
            D[m] = sum(n1) C[m,n1] * LD[m,n1]
            O[m,f] = (sum(n1) C[m,n1] * LN[m,n1,f]) / D[m]
        }";
        let c = one(text);
        let (n1, n0) = (c.rank("N1").unwrap(), c.rank("N0").unwrap());
        assert_eq!(passes_over(&c, &[n1, n0]).max, 1);
        assert_eq!(passes_over(&c, &[n1]).max, 2);
        assert_eq!(passes_over(&c, &[n0]).max, 2);
    }

    #[test]
    fn iterations_and_prefixes_are_no_barriers() {
        let scan = "cascade t[N](x: f32[N]) -> (y: f32[N]) {
            c[i] for i in N = sum(n) x[n] where n <= i
            y[n] = c[n] * x[n]
        }";
        assert_eq!(over(scan, "N"), 1);
        let whole = scan.replace(" where n <= i", "");
        assert_eq!(over(&whole, "N"), 2);
        // A body that depends on i gives every i a fiber of its own.
        let own = "cascade t[N](x: f32[N,N]) -> (y: f32[N,N]) {
            c[i] for i in N = sum(n) x[i,n] where n <= i
            y[i,n] for i in N = c[i] * x[i,n]
        }";
        assert_eq!(over(own, "N"), 2);
        let running = "cascade t[N](x: f32[N]) -> (y: f32[N]) { c[n] = cumsum(n) x[n]\n y[n] = c[n] * x[n] }";
        assert_eq!(over(running, "N"), 1);
    }

    #[test]
    fn an_opposite_iteration_waits_for_a_complete_one() {
        let text = |rev: &str, read: &str| {
            format!(
                "cascade t[T](x: f32[T]) -> (y: f32[T] = b[..T]) {{
                iter t in T {{
                    a[0] = 0.0
                    a[t+1] = 0.5 * a[t] + x[t]
                }}
                iter t in T{rev} {{
                    {read} = 0.0
                    {}
                }}
            }}",
                if rev.is_empty() { "b[t+1] = b[t] + a[t+1]" } else { "b[t] = b[t+1] + a[t+1]" }
            )
        };
        let forward = text("", "b[0]").replace("b[..T]", "b[1..]");
        assert_eq!(over(&forward, "T"), 1);
        assert_eq!(over(&text(" rev", "b[T]"), "T"), 2);
    }
}
