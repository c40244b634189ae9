//! A plan of carried values written as a cascade: one stream `iter n in N` with the accumulators' steps, then the
//! outputs from their last points. Statements that only led to those outputs are gone.

use std::collections::{BTreeMap, BTreeSet};

use super::super::compact::compact;
use super::super::emit::{Emitter, Scope, Unsupported};
use super::super::inline::{Definition, Inlined, conjuncts, indices_of};
use super::super::symbolic::{Atom, AtomId, PolyId, Rat, Symbols, Var};
use super::{Accumulator, Anchor, Carried, Derivation, Final, Plan, Policy, ends, output_tensor, over};
use crate::cascade::{
    Cascade, Einsum, Expr, ExprId, IndexId, IndexKind, Iter, RankId, Reducer, Size, Stmt, Target, TensorId, TensorKind,
};
use crate::diag::Span;
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

/// A point of a state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Point {
    First,
    Old,
    New,
    Last,
}

struct Builder<'a> {
    em: Emitter<'a>,
    rank: RankId,
    plan: &'a Plan,
    stream: Option<IndexId>,
    anchors: BTreeMap<usize, TensorId>,
    states: BTreeMap<usize, TensorId>,
    dtype: DType,
}

pub(super) fn build(
    c: &Cascade,
    x: &mut Inlined,
    rank: RankId,
    mut plan: Plan,
    policies: Vec<Policy>,
) -> Result<Derivation, Unsupported> {
    let counts = counts(c, &mut x.symbols, rank, &mut plan);
    let mut d = c.clone();
    let readable: BTreeMap<TensorId, Definition> = {
        let waiting = waits(c, rank);
        x.tensors.iter().filter(|(t, _)| !waiting.contains(t)).map(|(t, d)| (*t, d.clone())).collect()
    };
    let mut em = Emitter::new(&mut d, &mut x.symbols, &readable);
    for f in &plan.finals {
        for (i, v) in &f.free {
            em.names.entry(v.clone()).or_insert_with(|| c.indices[*i].name.clone());
        }
    }
    if let Some((_, i)) = c.indices.iter().find(|(_, i)| i.rank == Some(rank) && i.kind == IndexKind::Reduced) {
        em.names.insert(plan.element.clone(), i.name.clone());
    }
    let (mut slots, classes) = used(&plan, em.s);
    slots.extend(counts.iter().flatten().copied());
    let wide = plan.finals.iter().any(|f| c.tensors[f.tensor].dtype == DType::F64);
    let dtype = if wide { DType::F64 } else { DType::F32 };
    let (anchors, states) = Default::default();
    let mut b = Builder { em, rank, plan: &plan, stream: None, anchors, states, dtype };
    let (mut anchors, mut accumulators) = (Vec::new(), Vec::new());
    let mut block = None;
    let mut plain = Vec::new();
    if classes.is_empty() {
        for k in slots {
            let (a, e) = b.reduction(k)?;
            accumulators.push(a);
            plain.push(e);
        }
    } else {
        let element = plan.element.clone();
        let n = b.em.index(&element, IndexKind::Iterated, &BTreeMap::new());
        b.stream = Some(n);
        let (mut inits, mut body) = (Vec::new(), Vec::new());
        for k in &classes {
            let a = b.anchor(*k, &mut inits, &mut body)?;
            anchors.push(a);
        }
        let order: Vec<usize> = classes.iter().copied().collect();
        for k in slots {
            let a = b.accumulator(k, &order, &mut inits, &mut body)?;
            accumulators.push(a);
        }
        let states = b.anchors.values().chain(b.states.values()).copied().collect();
        block =
            Some(Iter { index: n, extent: Size::Rank(rank), rev: false, states, inits, body, span: Span::default() });
    }
    let mut finished = BTreeMap::new();
    for (k, (last, count)) in plan.finals.iter().zip(&counts).enumerate() {
        let e = b.finish(c, k, count)?;
        finished.insert(last.tensor, e);
    }
    let Builder { em, .. } = b;
    let (produced, read) = (em.produced, em.read);
    // What stays of the text: all that outputs, producers and the stream still read.
    let finals: BTreeSet<TensorId> = finished.keys().copied().collect();
    let mut stack: Vec<TensorId> = c.outputs.iter().map(|o| output_tensor(&o.source)).collect();
    stack.extend(read);
    let (mut seen, mut kept) = (BTreeSet::new(), BTreeSet::new());
    while let Some(t) = stack.pop() {
        if finals.contains(&t) || !seen.insert(t) {
            continue;
        }
        for (k, stmt) in c.stmts.iter().enumerate() {
            let (writes, reads) = ends(c, stmt);
            if writes.contains(&t) && kept.insert(k) {
                stack.extend(reads);
            }
        }
    }
    let mut late = finals.clone();
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for (k, stmt) in c.stmts.iter().enumerate() {
        if !kept.contains(&k) {
            continue;
        }
        let (writes, reads) = ends(c, stmt);
        if reads.iter().any(|t| late.contains(t)) {
            late.extend(writes);
            last.push(stmt.clone());
        } else {
            first.push(stmt.clone());
        }
    }
    let mut stmts = first;
    stmts.extend(produced.into_iter().chain(plain).map(Stmt::Einsum));
    let stream = block.is_some().then_some(stmts.len());
    stmts.extend(block.map(Stmt::Iter));
    // Finals in the order of the text.
    for stmt in &c.stmts {
        for t in ends(c, stmt).0 {
            if let Some(e) = finished.remove(&t) {
                stmts.push(Stmt::Einsum(e));
            }
        }
    }
    stmts.extend(last);
    d.stmts = stmts;
    let (cascade, map) = compact(&d);
    let index = stream.map(|k| match &cascade.stmts[k] {
        Stmt::Iter(i) => i.index,
        Stmt::Einsum(_) => unreachable!("the stream is an iteration"),
    });
    for a in &mut anchors {
        a.state = map.tensors[&a.state];
        a.contribution = map.exprs[&a.contribution];
        a.initial = map.exprs[&a.initial];
        a.filter = a.filter.map(|f| map.exprs[&f]);
        a.dims = a.dims.iter().map(|i| map.indices[i]).collect();
    }
    for a in &mut accumulators {
        a.state = map.tensors[&a.state];
        a.contribution = map.exprs[&a.contribution];
        a.initial = map.exprs.get(&a.initial).copied().unwrap_or(a.contribution);
        a.repair = a.repair.map(|r| map.exprs[&r]);
        a.filter = a.filter.map(|f| map.exprs[&f]);
        a.dims = a.dims.iter().map(|i| map.indices[i]).collect();
    }
    let finals = finals.iter().map(|t| map.tensors[t]).collect();
    Ok(Derivation { cascade, rank, stream, index, anchors, accumulators, finals, policies })
}

/// Tensors whose text waits for a reduction over the rank.
pub(super) fn waits(c: &Cascade, rank: RankId) -> BTreeSet<TensorId> {
    let mut out = BTreeSet::new();
    for stmt in &c.stmts {
        let (writes, reads) = ends(c, stmt);
        let mut reduces = false;
        let mut einsum = |e: &Einsum| {
            c.walk(e.value, &mut |_, x| {
                if let Expr::Reduce { over, .. } = x {
                    reduces |= over.iter().any(|i| c.indices[*i].rank == Some(rank));
                }
            });
        };
        match stmt {
            Stmt::Einsum(e) => einsum(e),
            Stmt::Iter(i) => i.inits.iter().chain(&i.body).for_each(&mut einsum),
        }
        if reduces || reads.iter().any(|t| out.contains(t)) {
            out.extend(writes);
        }
    }
    out
}

/// Per final, the slots that count the elements of its fiber: what the filter of its sums leaves may be nothing, where
/// a quotient of sums is 0/0 and the text has a value.
fn counts(c: &Cascade, s: &mut Symbols, rank: RankId, plan: &mut Plan) -> Vec<Vec<usize>> {
    let one = s.integer(1);
    let mut out = Vec::new();
    for f in &plan.finals {
        let own = FinalParts::of(s, f);
        let filters: BTreeSet<Vec<PolyId>> = own.slots.iter().map(|(_, j)| plan.slots[*j].filter.clone()).collect();
        let anchored = !own.logs.is_empty() || own.slots.iter().any(|(_, j)| plan.slots[*j].class.is_some());
        let whole = filters.iter().any(|f| f.is_empty());
        let mut list = Vec::new();
        if own.inverted && !anchored && !whole && empty_value(c, rank, f.tensor, 0).is_some() {
            for filter in filters {
                let mut vars: BTreeSet<Var> = filter.iter().flat_map(|p| s.vars(*p)).collect();
                vars.remove(&plan.element);
                let dims = vars.into_iter().collect();
                let count = Carried { op: ReduceOp::Sum, class: None, weight: one, power: 0, filter, dims };
                let at = plan.slots.iter().position(|o| *o == count).unwrap_or(plan.slots.len());
                if at == plan.slots.len() {
                    plan.slots.push(count);
                }
                list.push(at);
            }
        }
        out.push(list);
    }
    out
}

/// What a final value is made of.
struct FinalParts {
    slots: BTreeSet<(AtomId, usize)>,
    /// Classes whose scale stays in it.
    logs: BTreeSet<usize>,
    /// Whether it may divide by an accumulator, or takes the logarithm of one.
    inverted: bool,
}

impl FinalParts {
    fn of(s: &Symbols, f: &Final) -> FinalParts {
        let mut p = FinalParts { slots: BTreeSet::new(), logs: BTreeSet::new(), inverted: false };
        s.visit(f.value, &mut |a| {
            match s.atom(a) {
                Atom::Slot(j) => {
                    p.slots.insert((a, *j as usize));
                }
                Atom::ScaleLog(j) | Atom::Scale(j) => {
                    p.logs.insert(*j as usize);
                }
                Atom::Log(_) | Atom::Base(_) => p.inverted = true,
                _ => {}
            }
            true
        });
        p.inverted |= s.poly(f.value).terms.keys().any(|m| m.factors.iter().any(|(_, q)| *q < Rat::ZERO));
        p
    }
}

/// Slots and classes the outputs use, with those their repairs use.
fn used(plan: &Plan, s: &Symbols) -> (BTreeSet<usize>, BTreeSet<usize>) {
    let (mut slots, mut classes) = (BTreeSet::new(), BTreeSet::new());
    for f in &plan.finals {
        s.visit(f.value, &mut |a| {
            match s.atom(a) {
                Atom::Slot(k) => {
                    slots.insert(*k as usize);
                }
                Atom::Scale(k) | Atom::ScaleLog(k) => {
                    classes.insert(*k as usize);
                }
                _ => {}
            }
            true
        });
    }
    for k in slots.clone() {
        let own = &plan.slots[k];
        for (j, other) in plan.slots.iter().enumerate() {
            if own.class.is_some()
                && other.class == own.class
                && other.weight == own.weight
                && other.filter == own.filter
                && other.power < own.power
            {
                slots.insert(j);
            }
        }
        classes.extend(own.class);
    }
    (slots, classes)
}

impl Builder<'_> {
    fn name(&self, what: &str) -> String {
        let n = self.em.names.get(&self.plan.element).cloned().unwrap_or_else(|| "n".into());
        format!("{what}_{n}")
    }

    /// A scope over `dims`, with the stream's index when it steps; and the free indices.
    fn scope(&mut self, dims: &[Var], step: bool, filter: &[PolyId]) -> (Scope, Vec<IndexId>) {
        let mut indices = BTreeMap::new();
        if let (Some(n), true) = (self.stream, step) {
            indices.insert(self.plan.element.clone(), n);
        }
        let mut free = Vec::new();
        for v in dims {
            let i = self.em.index(v, IndexKind::Free, &indices);
            indices.insert(v.clone(), i);
            free.push(i);
        }
        (Scope { indices, holds: filter.iter().copied().collect(), slots: BTreeMap::new() }, free)
    }

    fn place(&mut self, at: Option<Point>, dims: &[Var], scope: &Scope) -> Result<Vec<ExprId>, Unsupported> {
        let mut out = Vec::new();
        if let (Some(p), Some(n)) = (at, self.stream) {
            let e = match p {
                Point::First => self.em.push(Expr::Int(0)),
                Point::Old => self.em.push(Expr::Index(n)),
                Point::New => {
                    let (i, one) = (self.em.push(Expr::Index(n)), self.em.push(Expr::Int(1)));
                    self.em.binary(BinaryOp::Add, i, one)
                }
                Point::Last => self.em.push(Expr::Size(Size::Rank(self.rank))),
            };
            out.push(e);
        }
        for v in dims {
            let i = *scope.indices.get(v).ok_or(Unsupported("an accumulator with an index its output lacks"))?;
            out.push(self.em.push(Expr::Index(i)));
        }
        Ok(out)
    }

    fn read(&mut self, t: TensorId, p: Point, dims: &[Var], scope: &Scope) -> Result<ExprId, Unsupported> {
        let at = self.place(self.stream.map(|_| p), dims, scope)?;
        Ok(self.em.push(Expr::Read { tensor: t, at }))
    }

    fn statement(
        &mut self,
        tensor: TensorId,
        p: Point,
        dims: &[Var],
        scope: &Scope,
        free: Vec<IndexId>,
        value: ExprId,
    ) -> Result<Einsum, Unsupported> {
        let at = self.place(self.stream.map(|_| p), dims, scope)?;
        let targets = vec![Target { tensor, at }];
        Ok(Einsum { targets, value, filter: None, otherwise: None, join: None, free, span: Span::default() })
    }

    fn state(&mut self, name: &str, dims: &[Var]) -> TensorId {
        let mut all: Vec<Size> = dims.iter().map(|v| v.extent().clone()).collect();
        let kind = if self.stream.is_some() {
            all.insert(0, Size::Add(Box::new(Size::Rank(self.rank)), Box::new(Size::Const(1))));
            TensorKind::State
        } else {
            TensorKind::Intermediate
        };
        let name = self.name(name);
        let dtype = self.dtype;
        self.em.tensor(&name, all, kind, dtype)
    }

    /// A step that leaves the state as it was at points the filter removes.
    #[allow(clippy::too_many_arguments)]
    fn step(
        &mut self,
        state: TensorId,
        dims: &[Var],
        filter: &[PolyId],
        scope: &mut Scope,
        free: Vec<IndexId>,
        value: ExprId,
    ) -> Result<Einsum, Unsupported> {
        let mut e = self.statement(state, Point::New, dims, scope, free, value)?;
        e.filter = self.em.conjunction(filter, scope)?;
        if e.filter.is_some() {
            e.otherwise = Some(self.read(state, Point::Old, dims, scope)?);
        }
        Ok(e)
    }

    fn anchor(&mut self, k: usize, inits: &mut Vec<Einsum>, body: &mut Vec<Einsum>) -> Result<Anchor, Unsupported> {
        let class = &self.plan.classes[k];
        let dims = class.dims.clone();
        let state = self.state("max", &dims);
        self.anchors.insert(k, state);
        let (mut scope, free) = self.scope(&dims, false, &[]);
        let mut initial = self.em.float(f64::NEG_INFINITY);
        for (j, p) in class.initial.iter().enumerate() {
            let e = self.em.poly(*p, &mut scope)?;
            initial = if j == 0 { e } else { self.em.binary(BinaryOp::Max, initial, e) };
        }
        inits.push(self.statement(state, Point::First, &dims, &scope, free, initial)?);
        let (mut scope, free) = self.scope(&dims, true, &class.filter);
        let contribution = self.em.poly(class.exponent, &mut scope)?;
        let old = self.read(state, Point::Old, &dims, &scope)?;
        let value = self.em.binary(BinaryOp::Max, old, contribution);
        let step = self.step(state, &dims, &class.filter, &mut scope, free.clone(), value)?;
        let filter = step.filter;
        body.push(step);
        Ok(Anchor { state, dims: free, contribution, filter, initial })
    }

    fn accumulator(
        &mut self,
        k: usize,
        order: &[usize],
        inits: &mut Vec<Einsum>,
        body: &mut Vec<Einsum>,
    ) -> Result<Accumulator, Unsupported> {
        let slot = self.plan.slots[k].clone();
        let dims = slot.dims.clone();
        let state = self.state(slot.op.name(), &dims);
        self.states.insert(k, state);
        let (scope, free) = self.scope(&dims, false, &[]);
        let initial = self.em.float(slot.op.identity());
        inits.push(self.statement(state, Point::First, &dims, &scope, free, initial)?);
        let (mut scope, free) = self.scope(&dims, true, &slot.filter);
        let mut contribution = self.em.poly(slot.weight, &mut scope)?;
        let zero = self.em.float(slot.op.identity());
        let (moved, repair, anchor);
        match slot.class {
            None => {
                moved = self.read(state, Point::Old, &dims, &scope)?;
                (repair, anchor) = (None, None);
            }
            Some(class) => {
                let kept = &self.plan.classes[class];
                let m = self.anchors[&class];
                let e = self.em.poly(kept.exponent, &mut scope)?;
                let new = self.read(m, Point::New, &kept.dims, &scope)?;
                let shift = self.em.binary(BinaryOp::Sub, e, new);
                let mut term = self.em.unary(UnaryOp::Exp, shift);
                for _ in 0..slot.power {
                    term = self.em.binary(BinaryOp::Mul, term, shift);
                }
                if self.em.s.constant(slot.weight) != Some(Rat::ONE) {
                    term = self.em.binary(BinaryOp::Mul, term, contribution);
                }
                // An element of weight e^−∞ adds nothing, whatever the anchor.
                let lowest = self.em.float(f64::NEG_INFINITY);
                let gone = self.em.binary(BinaryOp::Eq, e, lowest);
                contribution = self.em.push(Expr::Select(gone, zero, term));
                moved = self.moved(k, class, &dims, &scope)?;
                repair = Some(moved);
                anchor = order.iter().position(|x| *x == class);
            }
        }
        let op = match slot.op {
            ReduceOp::Max => BinaryOp::Max,
            ReduceOp::Min => BinaryOp::Min,
            _ => BinaryOp::Add,
        };
        let value = self.em.binary(op, moved, contribution);
        let step = self.step(state, &dims, &slot.filter, &mut scope, free.clone(), value)?;
        let filter = step.filter;
        body.push(step);
        Ok(Accumulator { state, dims: free, op: slot.op, anchor, contribution, filter, initial, repair })
    }

    /// The accumulator of a step's start under the anchor of its end.
    fn moved(&mut self, k: usize, class: usize, dims: &[Var], scope: &Scope) -> Result<ExprId, Unsupported> {
        let slot = self.plan.slots[k].clone();
        let kept = self.plan.classes[class].dims.clone();
        let m = self.anchors[&class];
        let (old, new) = (self.read(m, Point::Old, &kept, scope)?, self.read(m, Point::New, &kept, scope)?);
        let shift = self.em.binary(BinaryOp::Sub, old, new);
        let mut sum: Option<ExprId> = None;
        let mut binomial = 1u32;
        for j in (0..=slot.power).rev() {
            let lower = self
                .plan
                .slots
                .iter()
                .position(|o| {
                    o.power == j && o.class == slot.class && o.weight == slot.weight && o.filter == slot.filter
                })
                .ok_or(Unsupported("a lower power that is not carried"))?;
            let state = *self.states.get(&lower).ok_or(Unsupported("a lower power carried later"))?;
            let mut term = self.read(state, Point::Old, dims, scope)?;
            for _ in j..slot.power {
                term = self.em.binary(BinaryOp::Mul, shift, term);
            }
            if binomial != 1 {
                let f = self.em.float(f64::from(binomial));
                term = self.em.binary(BinaryOp::Mul, f, term);
            }
            sum = Some(match sum {
                None => term,
                Some(o) => self.em.binary(BinaryOp::Add, o, term),
            });
            binomial = binomial * j / (slot.power - j + 1);
        }
        let factor = self.em.unary(UnaryOp::Exp, shift);
        let scaled = self.em.binary(BinaryOp::Mul, factor, sum.expect("at least its own power"));
        // Before the first element there is nothing to move.
        let (lowest, zero) = (self.em.float(f64::NEG_INFINITY), self.em.float(0.0));
        let fresh = self.em.binary(BinaryOp::Eq, old, lowest);
        Ok(self.em.push(Expr::Select(fresh, zero, scaled)))
    }

    /// Without a stream: an accumulator as a reduction of its own.
    fn reduction(&mut self, k: usize) -> Result<(Accumulator, Einsum), Unsupported> {
        let slot = self.plan.slots[k].clone();
        let dims = slot.dims.clone();
        let state = self.state(slot.op.name(), &dims);
        self.states.insert(k, state);
        let (mut scope, free) = self.scope(&dims, false, &slot.filter);
        let element = self.plan.element.clone();
        let n = self.em.index(&element, IndexKind::Reduced, &scope.indices);
        scope.indices.insert(element, n);
        let contribution = self.em.poly(slot.weight, &mut scope)?;
        let op = Reducer::Op(slot.op);
        let value = self.em.push(Expr::Reduce { op, over: vec![n], body: contribution });
        let filter = self.em.conjunction(&slot.filter, &mut scope)?;
        let mut e = self.statement(state, Point::New, &dims, &scope, free.clone(), value)?;
        e.filter = filter;
        let initial = self.em.float(slot.op.identity());
        let a =
            Accumulator { state, dims: free, op: slot.op, anchor: None, contribution, filter, initial, repair: None };
        Ok((a, e))
    }

    /// The statement of a final tensor.
    fn finish(&mut self, c: &Cascade, k: usize, counts: &[usize]) -> Result<Einsum, Unsupported> {
        let f = &self.plan.finals[k];
        let original = c
            .einsums()
            .find(|e| e.targets.iter().any(|t| t.tensor == f.tensor))
            .ok_or(Unsupported("a final tensor without a statement"))?;
        if original.targets.len() > 1 {
            return Err(Unsupported("a statement with several targets"));
        }
        let indices = f.free.iter().map(|(i, v)| (v.clone(), *i)).collect();
        let mut scope = Scope { indices, holds: BTreeSet::new(), slots: BTreeMap::new() };
        let FinalParts { slots, logs, inverted } = FinalParts::of(self.em.s, f);
        let mut classes: BTreeSet<usize> = logs.clone();
        let own: BTreeSet<usize> = slots.iter().map(|(_, j)| *j).collect();
        let kept = logs.clone();
        for (a, j) in slots {
            let dims = self.plan.slots[j].dims.clone();
            let state = self.states[&j];
            let e = self.read(state, Point::Last, &dims, &scope)?;
            scope.slots.insert(a, e);
            classes.extend(self.plan.slots[j].class);
        }
        for j in logs {
            let a: AtomId = self.em.s.intern_atom(Atom::ScaleLog(j as u32));
            let dims = self.plan.classes[j].dims.clone();
            let e = self.read(self.anchors[&j], Point::Last, &dims, &scope)?;
            scope.slots.insert(a, e);
        }
        let mut value = self.em.poly(f.value, &mut scope)?;
        // A bare accumulator of an empty fiber is its start value already. Otherwise the value of an empty fiber is
        // the text's, where that has one.
        let bare_value = scope.slots.values().any(|e| *e == value);
        let empty = empty_value(c, self.rank, f.tensor, 0);
        let may_be_empty = classes.iter().any(|j| {
            let class = &self.plan.classes[*j];
            class.initial.is_empty() && !class.filter.is_empty()
        });
        if empty.is_none() && may_be_empty && (inverted || !kept.is_empty()) {
            return Err(Unsupported("a quotient of sums over points that may be none, with other values"));
        }
        if let (Some(v), false) = (empty, bare_value) {
            // A maximum says that its own points are none, and of others that are some of those.
            let bare: Vec<usize> =
                classes.iter().copied().filter(|j| self.plan.classes[*j].initial.is_empty()).collect();
            let within = |j: usize, f: &[PolyId]| self.plan.classes[j].filter.iter().all(|p| f.contains(p));
            let all = bare.iter().copied().find(|j| {
                classes.iter().all(|k| within(*j, &self.plan.classes[*k].filter))
                    && own.iter().all(|k| within(*j, &self.plan.slots[*k].filter))
            });
            let quotient = inverted || !kept.is_empty();
            if all.is_none() && !bare.is_empty() && quotient {
                return Err(Unsupported("a quotient of sums over different points"));
            }
            let cond = match all {
                None if !bare.is_empty() => None,
                Some(j) => {
                    let dims = self.plan.classes[j].dims.clone();
                    let last = self.read(self.anchors[&j], Point::Last, &dims, &scope)?;
                    let lowest = self.em.float(f64::NEG_INFINITY);
                    Some(self.em.binary(BinaryOp::Eq, last, lowest))
                }
                None if !counts.is_empty() => {
                    let mut all = None;
                    for j in counts {
                        let dims = self.plan.slots[*j].dims.clone();
                        let (n, zero) = (self.read(self.states[j], Point::Last, &dims, &scope)?, self.em.float(0.0));
                        let none = self.em.binary(BinaryOp::Eq, n, zero);
                        all = Some(all.map_or(none, |o| self.em.binary(BinaryOp::And, o, none)));
                    }
                    all
                }
                None if inverted && classes.is_empty() => {
                    let n = self.em.push(Expr::Size(Size::Rank(self.rank)));
                    let zero = self.em.push(Expr::Int(0));
                    Some(self.em.binary(BinaryOp::Eq, n, zero))
                }
                None => None,
            };
            if let Some(cond) = cond {
                let v = self.em.float(if v.is_nan() { 0.0 } else { v + 0.0 });
                value = self.em.push(Expr::Select(cond, v, value));
            }
        }
        let mut e = original.clone();
        e.value = value;
        e.filter = None;
        if original.otherwise.is_none() {
            let mut all = Vec::new();
            if let Some(p) = original.filter {
                conjuncts(c, p, &mut all);
            }
            for p in all {
                if indices_of(c, p).iter().any(|i| c.indices[*i].kind == IndexKind::Reduced) {
                    continue;
                }
                e.filter = Some(match e.filter {
                    None => p,
                    Some(o) => self.em.binary(BinaryOp::And, o, p),
                });
            }
        }
        e.otherwise = None;
        debug_assert!(f.free.iter().all(|(_, v)| !over(v, self.rank)));
        Ok(e)
    }
}

/// The value the text gives a tensor whose fibers of `rank` are empty; none if it depends on the data.
fn empty_value(c: &Cascade, rank: RankId, t: TensorId, depth: usize) -> Option<f64> {
    if depth > 64 {
        return None;
    }
    let e = c.stmts.iter().find_map(|s| match s {
        Stmt::Einsum(e) if e.targets.len() == 1 && e.targets[0].tensor == t => Some(e),
        Stmt::Einsum(_) | Stmt::Iter(_) => None,
    })?;
    empty_expr(c, rank, e.value, depth + 1)
}

fn empty_expr(c: &Cascade, rank: RankId, e: ExprId, depth: usize) -> Option<f64> {
    let of = |e: ExprId| empty_expr(c, rank, e, depth);
    match &c.exprs[e] {
        Expr::Int(n) => Some(*n as f64),
        Expr::Float(x) => Some(*x),
        Expr::Reduce { op: Reducer::Op(op), over, .. } if over.iter().any(|i| c.indices[*i].rank == Some(rank)) => {
            Some(op.identity())
        }
        Expr::Read { tensor, .. } => empty_value(c, rank, *tensor, depth + 1),
        Expr::Unary(op, a) => Some(op.eval(of(*a)?)),
        Expr::Binary(op, a, b) => Some(op.eval(of(*a)?, of(*b)?, false)),
        Expr::Select(k, a, b) => of(if of(*k)? != 0.0 { *a } else { *b }),
        Expr::Cast(_, a) => of(*a),
        Expr::Size(_)
        | Expr::Index(_)
        | Expr::Tuple(_)
        | Expr::Reduce { .. }
        | Expr::Scan { .. }
        | Expr::Segment { .. }
        | Expr::Rand { .. } => None,
    }
}
