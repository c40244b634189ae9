//! A cascade without what nothing uses: tensors, indices and expressions are renumbered, order kept.
//!
//! Invariant: operands still come before their users; parameters stay, used or not.

use std::collections::BTreeMap;

use crate::arena::Arena;
use crate::cascade::{Cascade, Einsum, Expr, ExprId, IndexId, Iter, OutputSource, Stmt, Target, TensorId};

/// Old ids to new ones.
#[derive(Clone, Debug, Default)]
pub struct Renumbered {
    /// Tensors.
    pub tensors: BTreeMap<TensorId, TensorId>,
    /// Indices.
    pub indices: BTreeMap<IndexId, IndexId>,
    /// Expressions.
    pub exprs: BTreeMap<ExprId, ExprId>,
}

/// `c` without unused entries, and where everything went.
pub fn compact(c: &Cascade) -> (Cascade, Renumbered) {
    let mut out = c.clone();
    out.tensors = Arena::new();
    out.indices = Arena::new();
    out.exprs = Arena::new();
    out.spans = Vec::new();
    let mut used = std::collections::BTreeSet::new();
    let mut defaults = Vec::new();
    used.extend(c.params.iter().copied());
    for o in &c.outputs {
        used.insert(match o.source {
            OutputSource::Whole(t) => t,
            OutputSource::Points { state, .. } | OutputSource::Point { state, .. } => state,
        });
    }
    for e in c.einsums() {
        used.extend(e.targets.iter().map(|t| t.tensor));
    }
    for t in &used {
        defaults.extend(c.tensors[*t].default);
    }
    let mut map = Copy { c, out, map: Renumbered::default() };
    for t in used {
        let id = map.out.tensors.push(c.tensors[t].clone());
        map.map.tensors.insert(t, id);
    }
    for t in map.out.tensors.ids().collect::<Vec<_>>() {
        if let Some(e) = map.out.tensors[t].default {
            let e = map.expr(e);
            map.out.tensors[t].default = Some(e);
        }
    }
    map.out.params = c.params.iter().map(|t| map.map.tensors[t]).collect();
    map.out.requires = c.requires.iter().map(|e| map.expr(*e)).collect();
    for o in &mut map.out.outputs {
        match &mut o.source {
            OutputSource::Whole(t) => *t = map.map.tensors[t],
            OutputSource::Points { state, .. } | OutputSource::Point { state, .. } => *state = map.map.tensors[state],
        }
    }
    map.out.stmts = c
        .stmts
        .iter()
        .map(|s| match s {
            Stmt::Einsum(e) => Stmt::Einsum(map.einsum(e)),
            Stmt::Iter(i) => Stmt::Iter(Iter {
                index: map.index(i.index),
                extent: i.extent.clone(),
                rev: i.rev,
                states: i.states.iter().map(|t| map.map.tensors[t]).collect(),
                inits: i.inits.iter().map(|e| map.einsum(e)).collect(),
                body: i.body.iter().map(|e| map.einsum(e)).collect(),
                span: i.span,
            }),
        })
        .collect();
    (map.out, map.map)
}

struct Copy<'a> {
    c: &'a Cascade,
    out: Cascade,
    map: Renumbered,
}

impl Copy<'_> {
    fn index(&mut self, i: IndexId) -> IndexId {
        if let Some(j) = self.map.indices.get(&i) {
            return *j;
        }
        let j = self.out.indices.push(self.c.indices[i].clone());
        self.map.indices.insert(i, j);
        j
    }

    fn einsum(&mut self, e: &Einsum) -> Einsum {
        Einsum {
            free: e.free.iter().map(|i| self.index(*i)).collect(),
            targets: e
                .targets
                .iter()
                .map(|t| Target {
                    tensor: self.map.tensors[&t.tensor],
                    at: t.at.iter().map(|a| self.expr(*a)).collect(),
                })
                .collect(),
            value: self.expr(e.value),
            filter: e.filter.map(|f| self.expr(f)),
            otherwise: e.otherwise.map(|f| self.expr(f)),
            join: e.join,
            span: e.span,
        }
    }

    fn expr(&mut self, e: ExprId) -> ExprId {
        if let Some(f) = self.map.exprs.get(&e) {
            return *f;
        }
        let copy = match &self.c.exprs[e] {
            Expr::Int(n) => Expr::Int(*n),
            Expr::Float(x) => Expr::Float(*x),
            Expr::Size(n) => Expr::Size(n.clone()),
            Expr::Index(i) => Expr::Index(self.index(*i)),
            Expr::Read { tensor, at } => {
                Expr::Read { tensor: self.map.tensors[tensor], at: at.iter().map(|a| self.expr(*a)).collect() }
            }
            Expr::Unary(op, a) => Expr::Unary(*op, self.expr(*a)),
            Expr::Binary(op, a, b) => Expr::Binary(*op, self.expr(*a), self.expr(*b)),
            Expr::Select(k, a, b) => Expr::Select(self.expr(*k), self.expr(*a), self.expr(*b)),
            Expr::Cast(d, a) => Expr::Cast(*d, self.expr(*a)),
            Expr::Tuple(items) => Expr::Tuple(items.iter().map(|a| self.expr(*a)).collect()),
            Expr::Reduce { op, over, body } => {
                Expr::Reduce { op: *op, over: over.iter().map(|i| self.index(*i)).collect(), body: self.expr(*body) }
            }
            Expr::Scan { op, over, body } => Expr::Scan { op: *op, over: self.index(*over), body: self.expr(*body) },
            Expr::Segment { offsets, of } => Expr::Segment { offsets: self.map.tensors[offsets], of: self.index(*of) },
            Expr::Rand { seed, coords } => {
                Expr::Rand { seed: self.expr(*seed), coords: coords.iter().map(|a| self.expr(*a)).collect() }
            }
        };
        let span = self.c.spans[crate::arena::Id::index(e)];
        let id = self.out.push_expr(copy, span);
        self.map.exprs.insert(e, id);
        id
    }
}
