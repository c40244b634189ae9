//! expand-selections: top-k, and argument selections among points that may not exist, become reductions of values.
//!
//! Before: `(v[m], i[m]) = argmax(n) S[m,n] where n <= m`
//! After:  `w[m] = max(n) S[m,n] where n <= m;  q[m] = min(n) (if S[m,n] == w[m] then n else N) where n <= m`
//!         `v[m] = w[m];  i[m] = if q[m] < N then q[m] else -1`
//!
//! `(v[m,j], i[m,j]) = topk(n, k) S[m,n]` is k such steps of an iteration over j, each among the points that come
//! after the one selected before: smaller ones, and equal ones at higher positions. NaN is larger than any number
//! (docs/language.md, "Ties").

use std::collections::{HashMap, HashSet};

use einfall_ir::arena::Id;
use einfall_ir::cascade::types::{self, Kind};
use einfall_ir::cascade::{
    Cascade, Einsum, Expr, ExprId, IndexId, IndexKind, Iter, Reducer, Size, Stmt, TensorId, TensorKind,
};
use einfall_ir::diag::Span;
use einfall_ir::dtype::DType;
use einfall_ir::ops::{BinaryOp, ReduceOp};

use super::propagate_support::split_conjuncts;
use super::rewrite::{assign, fresh_index, intermediate, mentions, substitute};

/// Rewrites every top-k, and every argument selection that a filter or an operand without some points restricts.
pub fn expand_selections(mut c: Cascade) -> Cascade {
    let stmts = std::mem::take(&mut c.stmts);
    // Tensors that may lack points.
    let mut partial: HashSet<TensorId> = HashSet::new();
    let mut out = Vec::new();
    for stmt in stmts {
        let Stmt::Einsum(e) = stmt else {
            out.push(stmt);
            continue;
        };
        let lacks = partial.iter().any(|t| c.reads(&e, *t));
        if (e.filter.is_some() || lacks) && e.otherwise.is_none() {
            partial.extend(e.targets.iter().map(|t| t.tensor));
        }
        let Expr::Reduce { op, over, body } = c.exprs[e.value].clone() else {
            out.push(Stmt::Einsum(e));
            continue;
        };
        match op {
            Reducer::TopK { k } => Selection::new(&mut c, &e, &over, body).top(&e, k, &mut out),
            Reducer::Op(op) if op.selects_argument() && (e.filter.is_some() || lacks) => {
                let pick = if op == ReduceOp::ArgMax { ReduceOp::Max } else { ReduceOp::Min };
                Selection::new(&mut c, &e, &over, body).one(&e, pick, &mut out);
            }
            Reducer::Op(_) | Reducer::User(_) => out.push(Stmt::Einsum(e)),
        }
    }
    c.stmts = out;
    c
}

/// The points among which a statement selects.
struct Selection<'a> {
    c: &'a mut Cascade,
    span: Span,
    /// Indices that the value depends on and the selection keeps.
    kept: Vec<IndexId>,
    over: Vec<IndexId>,
    /// What is compared: a float.
    body: ExprId,
    /// Conditions on the points selected among.
    among: Vec<ExprId>,
    /// Conditions on the statement's own points.
    outer: Vec<ExprId>,
}

/// One statement's own names of the kept and selected indices.
struct Scope {
    free: Vec<IndexId>,
    at: Vec<ExprId>,
    over: Vec<IndexId>,
    body: ExprId,
    among: Option<ExprId>,
    /// The point's position among the selected indices.
    position: ExprId,
}

impl<'a> Selection<'a> {
    fn new(c: &'a mut Cascade, e: &Einsum, over: &[IndexId], body: ExprId) -> Selection<'a> {
        let span = e.span;
        let (mut among, mut outer, mut all) = (Vec::new(), Vec::new(), Vec::new());
        e.filter.iter().for_each(|f| split_conjuncts(c, *f, &mut all));
        for condition in all {
            let inside = over.iter().any(|i| mentions(c, condition, *i));
            if inside { &mut among } else { &mut outer }.push(condition);
        }
        let used: Vec<IndexId> = among.iter().chain([&body]).flat_map(|r| c.free_indices(*r)).collect();
        let kept = e.free.iter().copied().filter(|i| used.contains(i)).collect();
        // Integers are compared as f64, which holds those of 32 bits: an empty selection has an infinite value.
        let body = match types::kinds(c)[body.index()] {
            Kind::Float => body,
            Kind::Int | Kind::Bool => c.push_expr(Expr::Cast(DType::F64, body), span),
        };
        Selection { c, span, kept, over: over.to_vec(), body, among, outer }
    }

    fn push(&mut self, e: Expr) -> ExprId {
        self.c.push_expr(e, self.span)
    }

    fn binary(&mut self, op: BinaryOp, a: ExprId, b: ExprId) -> ExprId {
        self.push(Expr::Binary(op, a, b))
    }

    fn all(&mut self, conditions: impl IntoIterator<Item = ExprId>) -> Option<ExprId> {
        conditions.into_iter().reduce(|a, b| self.binary(BinaryOp::And, a, b))
    }

    /// The type values are compared in.
    fn dtype(&self) -> DType {
        types::default_dtype(self.c, &types::kinds(self.c), self.body, 0, 1, false)
    }

    fn kept_dims(&self) -> Vec<Size> {
        self.kept.iter().map(|i| self.c.indices[*i].extent.clone()).collect()
    }

    /// How many points are selected among.
    fn count(&mut self) -> ExprId {
        let sizes: Vec<Size> = self.over.iter().map(|i| self.c.indices[*i].extent.clone()).collect();
        let count = sizes.into_iter().reduce(|a, b| Size::Mul(Box::new(a), Box::new(b))).unwrap_or(Size::Const(1));
        self.push(match count {
            Size::Const(n) => Expr::Int(n as i64),
            other => Expr::Size(other),
        })
    }

    /// Fresh indices for one more statement.
    fn scope(&mut self) -> Scope {
        let span = self.span;
        let mut map = HashMap::new();
        let mut fresh = |c: &mut Cascade, i: IndexId, kind: IndexKind| {
            let (j, value) = {
                let old = c.indices[i].clone();
                let j = c.indices.push(einfall_ir::cascade::Index { kind, ..old });
                (j, c.push_expr(Expr::Index(j), span))
            };
            map.insert(i, value);
            (j, value)
        };
        let (free, at) = self.kept.clone().into_iter().map(|i| fresh(self.c, i, IndexKind::Free)).unzip();
        let bound: Vec<(IndexId, ExprId)> =
            self.over.clone().into_iter().map(|i| fresh(self.c, i, IndexKind::Reduced)).collect();
        let body = substitute(self.c, self.body, &map);
        let among = self.among.clone().into_iter().map(|f| substitute(self.c, f, &map)).collect::<Vec<_>>();
        let among = self.all(among);
        let mut position = bound[0].1;
        for (i, value) in &bound[1..] {
            let extent = self.c.indices[*i].extent.clone();
            let extent = match extent {
                Size::Const(n) => self.push(Expr::Int(n as i64)),
                other => self.push(Expr::Size(other)),
            };
            let scaled = self.binary(BinaryOp::Mul, position, extent);
            position = self.binary(BinaryOp::Add, scaled, *value);
        }
        Scope { free, at, over: bound.into_iter().map(|b| b.0).collect(), body, among, position }
    }

    /// Whether two values are one in the order of selection.
    fn same(&mut self, a: ExprId, b: ExprId) -> ExprId {
        let equal = self.binary(BinaryOp::Eq, a, b);
        let (nan_a, nan_b) = (self.binary(BinaryOp::Ne, a, a), self.binary(BinaryOp::Ne, b, b));
        let both = self.binary(BinaryOp::And, nan_a, nan_b);
        self.binary(BinaryOp::Or, equal, both)
    }

    /// `⊕(over) value where condition`, of a scope.
    fn reduction(&mut self, t: TensorId, s: &Scope, op: ReduceOp, value: ExprId, before: &[ExprId]) -> Einsum {
        let value = self.push(Expr::Reduce { op: Reducer::Op(op), over: s.over.clone(), body: value });
        let at = before.iter().copied().chain(s.at.clone()).collect();
        Einsum { filter: s.among, ..assign(t, at, s.free.clone(), value, self.span) }
    }

    /// The statements that give `w` the value selected and `q` its position, or a number past the last.
    fn pick(&mut self, w: TensorId, q: TensorId, op: ReduceOp, step: &[ExprId], after: &After) -> [Einsum; 2] {
        let mut s = self.scope();
        self.restrict(&mut s, after);
        let value = self.reduction(w, &s, op, s.body, step);
        let mut s = self.scope();
        self.restrict(&mut s, after);
        let at = step.iter().copied().chain(s.at.clone()).collect();
        let selected = self.push(Expr::Read { tensor: w, at });
        let same = self.same(s.body, selected);
        let none = self.count();
        let position = self.push(Expr::Select(same, s.position, none));
        [value, self.reduction(q, &s, ReduceOp::Min, position, step)]
    }

    /// Restricts a scope to what comes after the point selected before.
    fn restrict(&mut self, s: &mut Scope, after: &After) {
        let After::Point { value, position, step } = *after else { return };
        let at: Vec<ExprId> = [step].into_iter().chain(s.at.clone()).collect();
        let old = self.push(Expr::Read { tensor: value, at: at.clone() });
        let place = self.push(Expr::Read { tensor: position, at });
        let (first, zero) = (self.push(Expr::Int(FIRST)), self.push(Expr::Int(0)));
        let none_yet = self.binary(BinaryOp::Eq, place, first);
        let found = self.binary(BinaryOp::Ge, place, zero);
        let less = self.binary(BinaryOp::Lt, s.body, old);
        let number = self.binary(BinaryOp::Eq, s.body, s.body);
        let nan = self.binary(BinaryOp::Ne, old, old);
        let below_nan = self.binary(BinaryOp::And, number, nan);
        let same = self.same(s.body, old);
        let later = self.binary(BinaryOp::Gt, s.position, place);
        let tied = self.binary(BinaryOp::And, same, later);
        let smaller = self.binary(BinaryOp::Or, less, below_nan);
        let next = self.binary(BinaryOp::Or, smaller, tied);
        let next = self.binary(BinaryOp::And, found, next);
        let next = self.binary(BinaryOp::Or, none_yet, next);
        s.among = self.all(s.among.into_iter().chain([next]));
    }

    /// The statements that give the targets what was selected: `value` and `position` at their own points.
    fn results(&mut self, e: &Einsum, value: ExprId, position: ExprId, out: &mut Vec<Stmt>) {
        let filter = self.all(self.outer.clone());
        let values = match e.targets.len() {
            1 => vec![position],
            _ => vec![value, position],
        };
        for (target, value) in e.targets.iter().zip(values) {
            let target = target.clone();
            out.push(Stmt::Einsum(Einsum { targets: vec![target], value, filter, ..e.clone() }));
        }
    }

    /// `if q < count then q else -1`.
    fn position(&mut self, q: ExprId) -> ExprId {
        let (count, none) = (self.count(), self.push(Expr::Int(-1)));
        let some = self.binary(BinaryOp::Lt, q, count);
        self.push(Expr::Select(some, q, none))
    }

    /// One point.
    fn one(mut self, e: &Einsum, op: ReduceOp, out: &mut Vec<Stmt>) {
        let (dtype, dims, span) = (self.dtype(), self.kept_dims(), self.span);
        let w = intermediate(self.c, "best", dtype, dims.clone(), span);
        let q = intermediate(self.c, "place", DType::I32, dims, span);
        out.extend(self.pick(w, q, op, &[], &After::All).map(Stmt::Einsum));
        let at: Vec<ExprId> = self.kept.clone().into_iter().map(|i| self.push(Expr::Index(i))).collect();
        let value = self.push(Expr::Read { tensor: w, at: at.clone() });
        let q = self.push(Expr::Read { tensor: q, at });
        let position = self.position(q);
        self.results(e, value, position, out);
    }

    /// The `k` largest, one a step.
    fn top(mut self, e: &Einsum, k: u64, out: &mut Vec<Stmt>) {
        let (dtype, span) = (self.dtype(), self.span);
        // The index of the selected element is the targets' last.
        let last = e.targets[0].at.last().copied();
        self.kept.retain(|i| !last.is_some_and(|l| matches!(self.c.exprs[l], Expr::Index(j) if j == *i)));
        let (step, at_step) = fresh_index(self.c, "j", Size::Const(k), IndexKind::Iterated, span);
        let next = {
            let one = self.push(Expr::Int(1));
            self.binary(BinaryOp::Add, at_step, one)
        };
        let dims = self.kept_dims();
        let with = |n: u64| [Size::Const(n)].into_iter().chain(dims.clone()).collect::<Vec<_>>();
        let w = intermediate(self.c, "best", dtype, with(k), span);
        let q = intermediate(self.c, "place", DType::I32, with(k), span);
        let value = intermediate(self.c, "bound", dtype, with(k + 1), span);
        let place = intermediate(self.c, "taken", DType::I32, with(k + 1), span);
        for state in [value, place] {
            self.c.tensors[state].kind = TensorKind::State;
            self.c.tensors[state].declared = true;
        }
        let zero = self.push(Expr::Int(0));
        let infinite = self.push(Expr::Float(f64::INFINITY));
        let first = self.push(Expr::Int(FIRST));
        let mut inits = Vec::new();
        for (state, start) in [(value, infinite), (place, first)] {
            let s = self.scope();
            let at = [zero].into_iter().chain(s.at).collect();
            inits.push(assign(state, at, s.free, start, span));
        }
        let after = After::Point { value, position: place, step: at_step };
        let mut body = Vec::from(self.pick(w, q, ReduceOp::Max, &[at_step], &after));
        for (state, from) in [(value, w), (place, q)] {
            let s = self.scope();
            let at = |first: ExprId| [first].into_iter().chain(s.at.clone()).collect::<Vec<_>>();
            let read = self.push(Expr::Read { tensor: from, at: at(at_step) });
            let new = if from == q { self.position(read) } else { read };
            body.push(assign(state, at(next), s.free.clone(), new, span));
        }
        let extent = Size::Const(k);
        out.push(Stmt::Iter(Iter { index: step, extent, rev: false, states: vec![value, place], inits, body, span }));
        let at: Vec<ExprId> =
            last.into_iter().chain(self.kept.clone().into_iter().map(|i| self.push(Expr::Index(i)))).collect();
        let value = self.push(Expr::Read { tensor: w, at: at.clone() });
        let q = self.push(Expr::Read { tensor: q, at });
        let position = self.position(q);
        self.results(e, value, position, out);
    }
}

/// The position of what was selected before the first step.
const FIRST: i64 = -2;

/// Which points a selection is among.
enum After {
    /// All.
    All,
    /// Those after the one that the states `value` and `position` hold at `step`.
    Point { value: TensorId, position: TensorId, step: ExprId },
}
