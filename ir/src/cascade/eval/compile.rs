//! From an Einsum and extents to a [`Program`].
//!
//! Filters are tested at the outermost place where all their indices are bound: conjuncts over free indices first,
//! the others inside the reductions that bind their indices. A read outside a tensor's support jumps to the end of
//! the innermost reduction's iteration, or out of the point. Running reductions are taken out into preludes, so each
//! costs one sweep. The default rounding points of contractions are placed here.

use std::collections::{BTreeSet, HashMap};

use super::domain::Ty;
use super::error::EvalError;
use super::program::{
    Access, Dot, Draw, Ins, Loop, Place, Position, Prelude, Program, Ragged, Reg, Result1, Running, TargetTensor,
};
use crate::arena::Id;
use crate::array::strides;
use crate::cascade::bind::Bindings;
use crate::cascade::types::Kind;
use crate::cascade::{
    Cascade, Einsum, Expr, ExprId, IndexId, IndexKind, MonoidExpr, MonoidId, Reducer, Size, Target, TensorId,
    TensorKind,
};
use crate::diag::Span;
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

/// What compilation knows besides the Einsum.
pub(super) struct Context<'a> {
    pub c: &'a Cascade,
    pub b: &'a Bindings,
    /// Whether contractions take the default rounding points.
    pub permissions: bool,
    /// Tensors on partial support, by position.
    pub partial: &'a [bool],
    /// Tensors computed on demand, by position.
    pub demanded: &'a [bool],
    /// The kind of every expression.
    pub kinds: &'a [Kind],
    /// The iterated index of the enclosing `iter`.
    pub iterated: Option<IndexId>,
}

/// Where an open index is stepped.
#[derive(Clone, Copy)]
enum Stepped {
    Iterated,
    Free(usize),
    Inner(usize),
}

#[derive(Clone)]
struct Conjunct {
    expr: ExprId,
    indices: BTreeSet<IndexId>,
    applied: bool,
}

/// An integer affine form over slots.
#[derive(Clone, Default)]
struct Affine {
    base: i64,
    terms: Vec<(IndexId, i64)>,
}

struct Compiler<'a> {
    cx: &'a Context<'a>,
    p: Program,
    /// Tensor number of the next prelude result.
    hidden: &'a mut u32,
    slots: HashMap<IndexId, u32>,
    open: Vec<(IndexId, Stepped)>,
    labels: Vec<u32>,
    used: Vec<bool>,
    memo: HashMap<ExprId, (Reg, Ty)>,
    log: Vec<ExprId>,
    conjuncts: Vec<Conjunct>,
    rounding: HashMap<ExprId, DType>,
    absent: u32,
    /// Points of the loop nest open now.
    nest: u64,
    depth: u32,
}

type Done<T> = Result<T, EvalError>;

/// Compiles one Einsum; `hidden` numbers the tensors of preludes, from the cascade's count on.
pub(super) fn compile(cx: &Context, e: &Einsum, hidden: &mut u32) -> Done<Program> {
    let mut k = Compiler::new(cx, e.span, hidden);
    if let Some(f) = e.filter {
        split(cx.c, f, &mut |expr| {
            let indices = indices_of(cx.c, expr);
            k.conjuncts.push(Conjunct { expr, indices, applied: false });
        });
    }
    k.statement(e)?;
    if let Some(c) = k.conjuncts.iter().find(|c| !c.applied) {
        return unsupported(
            cx.c,
            c.expr,
            "a filter mixes indices of separate reductions; write the reductions as separate Einsums",
        );
    }
    Ok(k.seal())
}

fn unsupported<T>(c: &Cascade, e: ExprId, what: &str) -> Done<T> {
    Err(EvalError::Unsupported { what: what.to_owned(), span: c.spans[e.index()] })
}

/// Calls `f` on the conjuncts of a predicate.
fn split(c: &Cascade, e: ExprId, f: &mut impl FnMut(ExprId)) {
    match &c.exprs[e] {
        Expr::Binary(BinaryOp::And, a, b) => {
            split(c, *a, f);
            split(c, *b, f);
        }
        Expr::Binary(..)
        | Expr::Int(_)
        | Expr::Float(_)
        | Expr::Size(_)
        | Expr::Index(_)
        | Expr::Read { .. }
        | Expr::Unary(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Tuple(_)
        | Expr::Reduce { .. }
        | Expr::Scan { .. }
        | Expr::Segment { .. }
        | Expr::Rand { .. } => f(e),
    }
}

/// The indices `e` depends on: those it mentions less those it binds.
pub(super) fn indices_of(c: &Cascade, e: ExprId) -> BTreeSet<IndexId> {
    let mut out = BTreeSet::new();
    let mut bound = BTreeSet::new();
    c.walk(e, &mut |_, x| match x {
        Expr::Index(i) => {
            out.insert(*i);
        }
        Expr::Segment { of, .. } => {
            out.insert(*of);
        }
        Expr::Scan { over, .. } => {
            out.insert(*over);
        }
        Expr::Reduce { over, .. } => bound.extend(over.iter().copied()),
        Expr::Int(_)
        | Expr::Float(_)
        | Expr::Size(_)
        | Expr::Read { .. }
        | Expr::Unary(..)
        | Expr::Binary(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Tuple(_)
        | Expr::Rand { .. } => {}
    });
    out.retain(|i| !bound.contains(i));
    out
}

impl<'a> Compiler<'a> {
    fn new(cx: &'a Context<'a>, span: Span, hidden: &'a mut u32) -> Compiler<'a> {
        let mut k = Compiler {
            cx,
            p: Program { span, ..Program::default() },
            hidden,
            slots: HashMap::new(),
            open: Vec::new(),
            labels: Vec::new(),
            used: Vec::new(),
            memo: HashMap::new(),
            log: Vec::new(),
            conjuncts: Vec::new(),
            rounding: HashMap::new(),
            absent: 0,
            nest: 1,
            depth: 0,
        };
        if let Some(i) = cx.iterated {
            let slot = k.slot(i);
            k.p.iterated = Some(Loop { slot, extent: 0, cursors: Vec::new() });
            k.open.push((i, Stepped::Iterated));
        }
        k
    }

    fn statement(&mut self, e: &Einsum) -> Done<()> {
        let c = self.cx.c;
        let top = match &c.exprs[e.value] {
            Expr::Reduce { op: Reducer::TopK { k }, .. } => Some(*k),
            _ => None,
        };
        // The index of a top-k selection's last dimension is not looped over: a point has all k results.
        let tail = top.and_then(|_| self.tail_index(e));
        for i in e.free.iter().filter(|i| Some(**i) != tail) {
            self.open_free(*i)?;
        }
        for t in &e.targets {
            let tensor = &c.tensors[t.tensor];
            let in_place = tensor.kind == TensorKind::InOut;
            self.p.targets.push(TargetTensor { tensor: t.tensor.index() as u32, dtype: tensor.dtype, in_place });
        }
        self.p.join = e.join;
        let (outside, nowhere) = (self.label(), self.label());
        self.absent = outside;
        self.test_free_conjuncts()?;
        let mut values = self.values(e.value, e.targets.len())?;
        if top.is_some() {
            // Positions may be left out.
            values.truncate(e.targets.len());
        }
        self.ending(e, &values, top)?;
        self.place(outside);
        if self.used[outside as usize] {
            self.forget(0);
            if let Some(otherwise) = e.otherwise {
                self.absent = nowhere;
                let (reg, ty) = self.expr(otherwise)?;
                let filled = self.fill(reg, ty, values.len(), top);
                self.ending(e, &filled, top)?;
            } else {
                self.used[nowhere as usize] = true;
            }
        }
        self.place(nowhere);
        self.emit(Ins::Absent);
        self.p.partial = self.used[nowhere as usize] && e.join.is_none();
        Ok(())
    }

    /// The same value for every result.
    fn fill(&mut self, reg: Reg, ty: Ty, results: usize, top: Option<u64>) -> Vec<(Reg, Ty)> {
        let Some(k) = top else { return vec![(reg, ty); results] };
        (0..results)
            .map(|_| {
                let base = self.regs(k as u32);
                (0..k as u32).for_each(|i| self.emit(Ins::Move { dst: base + i, a: reg }));
                (base, ty)
            })
            .collect()
    }

    /// The free index that stands for the k results of a top-k selection.
    fn tail_index(&self, e: &Einsum) -> Option<IndexId> {
        let t = e.targets.first()?;
        if t.at.len() < self.cx.c.tensors[t.tensor].dims.len() {
            return None;
        }
        match &self.cx.c.exprs[*t.at.last()?] {
            Expr::Index(i) if e.free.contains(i) => Some(*i),
            _ => None,
        }
    }

    fn test_free_conjuncts(&mut self) -> Done<()> {
        let reduced = |i: &IndexId| self.cx.c.indices[*i].kind == IndexKind::Reduced;
        let free: Vec<usize> =
            (0..self.conjuncts.len()).filter(|n| !self.conjuncts[*n].indices.iter().any(reduced)).collect();
        self.test(&free)
    }

    fn test(&mut self, conjuncts: &[usize]) -> Done<()> {
        for n in conjuncts {
            let (cond, _) = self.expr(self.conjuncts[*n].expr)?;
            self.conjuncts[*n].applied = true;
            self.jump_unless(cond, self.absent);
        }
        Ok(())
    }

    /// Ends a point with these values.
    fn ending(&mut self, e: &Einsum, values: &[(Reg, Ty)], top: Option<u64>) -> Done<()> {
        if values.len() != e.targets.len() {
            let what = format!("{} targets take {} results; name one target per result", e.targets.len(), values.len());
            return Err(EvalError::Unsupported { what, span: e.span });
        }
        let mut results = Vec::new();
        for (t, (reg, ty)) in e.targets.iter().zip(values) {
            let place = self.target(t, top.is_some())?;
            results.push(Result1 { reg: *reg, count: top.unwrap_or(1) as u32, ty: *ty, place });
        }
        let variant = self.p.endings.len() as u32;
        self.p.endings.push(results);
        self.emit(Ins::Present { variant });
        Ok(())
    }

    fn target(&mut self, t: &Target, top: bool) -> Done<Place> {
        let n = self.cx.c.tensors[t.tensor].dims.len();
        let at = if top && t.at.len() == n { &t.at[..n - 1] } else { &t.at[..] };
        let span = t.at.first().map_or(self.p.span, |e| self.cx.c.spans[e.index()]);
        match self.access(t.tensor, at, span)? {
            Ok(cursor) => Ok(Place::Cursor(cursor)),
            Err(access) => Ok(Place::Access(access)),
        }
    }

    /// The values of a statement's right-hand side. An argument selection with two targets gives the value selected
    /// and its position.
    fn values(&mut self, e: ExprId, targets: usize) -> Done<Vec<(Reg, Ty)>> {
        if let Expr::Reduce { op, over, body } = &self.cx.c.exprs[e] {
            let acc = self.p.n_accs;
            let mut values = self.reduce(e, *op, over, *body)?;
            if let (Reducer::Op(op), 2) = (op, targets)
                && op.selects_argument()
            {
                let ty = if self.cx.kinds[body.index()] == Kind::Float { Ty::F32 } else { Ty::Int };
                let dst = self.regs(1);
                self.emit(Ins::Best { acc, op: *op, dst });
                values.insert(0, (dst, ty));
            }
            return Ok(values);
        }
        if let Expr::Scan { op, over, body } = &self.cx.c.exprs[e] {
            return self.scan(e, *op, *over, *body);
        }
        Ok(vec![self.expr(e)?])
    }

    /// The value of an expression.
    fn expr(&mut self, e: ExprId) -> Done<(Reg, Ty)> {
        if let Some(known) = self.memo.get(&e) {
            return Ok(*known);
        }
        self.depth += 1;
        if self.depth > 2000 {
            return unsupported(self.cx.c, e, "an expression is nested deeper than 2000; name parts of it");
        }
        let (mut reg, ty) = self.fresh(e)?;
        self.depth -= 1;
        if let Some(to) = self.rounding.get(&e).copied() {
            let dst = self.regs(1);
            self.emit(Ins::Operand { to, dst, a: reg });
            reg = dst;
        }
        self.memo.insert(e, (reg, ty));
        self.log.push(e);
        Ok((reg, ty))
    }

    fn fresh(&mut self, e: ExprId) -> Done<(Reg, Ty)> {
        let c = self.cx.c;
        match &c.exprs[e] {
            Expr::Int(i) => Ok((self.constant(*i as f64), Ty::Int)),
            Expr::Float(x) => Ok((self.constant(*x), Ty::F32)),
            Expr::Size(s) => Ok((self.constant(self.size(s)? as f64), Ty::Int)),
            Expr::Index(i) => {
                let slot = self.bound(*i)?;
                let dst = self.regs(1);
                self.emit(Ins::Index { dst, slot });
                Ok((dst, Ty::Int))
            }
            Expr::Read { tensor, at } => self.read(e, *tensor, at),
            Expr::Unary(op, a) => {
                let (a, ta) = self.expr(*a)?;
                use UnaryOp::*;
                let ty = match op {
                    Neg | Abs | Sign | Floor | Ceil | Round => ta,
                    Not => Ty::Int,
                    Exp | Exp2 | Log | Log2 | Log1p | Sqrt | Rsqrt | Recip | Sin | Cos | Tanh | Sigmoid | Erf => {
                        ta.float()
                    }
                };
                let dst = self.regs(1);
                self.emit(Ins::Unary { op: *op, ty, dst, a });
                Ok((dst, ty))
            }
            Expr::Binary(op, a, b) => {
                let ((a, ta), (b, tb)) = (self.expr(*a)?, self.expr(*b)?);
                let ty = ta.join(tb);
                let ty = if self.cx.kinds[e.index()] == Kind::Float && !op.is_predicate() { ty.float() } else { ty };
                let dst = self.regs(1);
                self.emit(Ins::Binary { op: *op, ty, dst, a, b });
                Ok((dst, if op.is_predicate() { Ty::Int } else { ty }))
            }
            Expr::Select(p, a, b) => {
                let (cond, _) = self.expr(*p)?;
                let (dst, other, end) = (self.regs(1), self.label(), self.label());
                self.jump_unless(cond, other);
                let mark = self.log.len();
                let (a, ta) = self.expr(*a)?;
                self.emit(Ins::Move { dst, a });
                self.forget(mark);
                self.jump(end);
                self.place(other);
                let (b, tb) = self.expr(*b)?;
                self.emit(Ins::Move { dst, a: b });
                self.forget(mark);
                self.place(end);
                Ok((dst, ta.join(tb)))
            }
            Expr::Cast(to, a) => {
                let (a, _) = self.expr(*a)?;
                let dst = self.regs(1);
                self.emit(Ins::Cast { to: *to, dst, a });
                Ok((dst, Ty::of(*to)))
            }
            Expr::Tuple(_) => unsupported(c, e, "a tuple stands only under a reduction with as many components"),
            Expr::Reduce { op, over, body } => {
                let values = self.reduce(e, *op, over, *body)?;
                self.single(e, &values)
            }
            Expr::Scan { op, over, body } => {
                let values = self.scan(e, *op, *over, *body)?;
                self.single(e, &values)
            }
            Expr::Segment { offsets, of } => {
                let slot = self.bound(*of)?;
                let (extent, dims) = (self.extent(*of)?, self.cx.b.dims(c, *offsets)?);
                let table = self.p.ragged.len() as u32;
                let tensor = self.reads(*offsets);
                let offsets = dims.first().copied().unwrap_or(0);
                self.p.ragged.push(Ragged { tensor, offsets, extent });
                let (dst, absent) = (self.regs(1), self.leave());
                self.emit(Ins::Segment { dst, table, slot, absent });
                Ok((dst, Ty::Int))
            }
            Expr::Rand { seed, coords } => {
                if coords.len() > 4 {
                    return unsupported(c, e, "rand takes at most four coordinates; combine some of them");
                }
                let (seed, _) = self.expr(*seed)?;
                let coords = coords.iter().map(|x| self.expr(*x).map(|(r, _)| r)).collect::<Done<_>>()?;
                let (dst, draw) = (self.regs(1), self.p.draws.len() as u32);
                self.p.draws.push(Draw { seed, coords });
                self.emit(Ins::Rand { dst, draw });
                Ok((dst, Ty::F32))
            }
        }
    }

    fn single(&self, e: ExprId, values: &[(Reg, Ty)]) -> Done<(Reg, Ty)> {
        match values {
            [one] => Ok(*one),
            _ => unsupported(
                self.cx.c,
                e,
                "a reduction with several results stands alone on the right, with a target for each",
            ),
        }
    }

    fn read(&mut self, e: ExprId, tensor: TensorId, at: &[ExprId]) -> Done<(Reg, Ty)> {
        let ty = Ty::of(self.cx.c.tensors[tensor].dtype);
        let t = self.reads(tensor);
        let placed = self.access(tensor, at, self.cx.c.spans[e.index()])?;
        let dst = self.regs(1);
        let leaves = self.cx.partial[tensor.index()];
        let demanded = self.cx.demanded[tensor.index()];
        let ins = match placed {
            Ok(cursor) if demanded => Ins::LoadDemanded { dst, tensor: t, cursor, absent: self.maybe_leave(leaves) },
            Ok(cursor) if leaves => Ins::LoadPartial { dst, tensor: t, cursor, absent: self.leave() },
            Ok(cursor) => Ins::Load { dst, tensor: t, cursor },
            Err(access) => Ins::Fetch { dst, access, absent: self.maybe_leave(leaves) },
        };
        self.emit(ins);
        Ok((dst, ty))
    }

    fn reads(&mut self, tensor: TensorId) -> u32 {
        let t = tensor.index() as u32;
        if !self.p.reads.contains(&t) {
            self.p.reads.push(t);
        }
        t
    }

    /// A cursor if every position is affine and in range, a checked access otherwise.
    fn access(&mut self, tensor: TensorId, at: &[ExprId], span: Span) -> Done<Result<u32, u32>> {
        let dims = self.cx.b.dims(self.cx.c, tensor)?;
        let strides = strides(&dims);
        let forms: Vec<Option<Affine>> = at.iter().map(|e| self.affine(*e)).collect::<Done<_>>()?;
        let mut inside = true;
        for (f, d) in forms.iter().zip(&dims) {
            inside &= match f {
                Some(f) => self.within(f, *d)?,
                None => false,
            };
        }
        if inside {
            let mut sum = Affine::default();
            for (f, s) in forms.iter().flatten().zip(&strides) {
                sum = add(&sum, f, *s).ok_or_else(|| self.overflow(span))?;
            }
            return Ok(Ok(self.cursor(&sum)));
        }
        let mut positions = Vec::new();
        for (((e, f), d), s) in at.iter().zip(forms).zip(&dims).zip(&strides) {
            let position = match f {
                Some(f) => Position::Cursor(self.cursor(&f)),
                None => Position::Reg(self.expr(*e)?.0),
            };
            positions.push((position, *d, *s));
        }
        let id = self.p.accesses.len() as u32;
        self.p.accesses.push(Access { tensor: tensor.index() as u32, at: positions, span });
        Ok(Err(id))
    }

    fn overflow(&self, span: Span) -> EvalError {
        EvalError::Unsupported { what: "an access exceeds 2^63; use smaller coefficients".to_owned(), span }
    }

    /// The affine form of an integer expression, if it has one.
    fn affine(&self, e: ExprId) -> Done<Option<Affine>> {
        let constant = |base: i64| Ok(Some(Affine { base, terms: Vec::new() }));
        match &self.cx.c.exprs[e] {
            Expr::Int(i) => constant(*i),
            Expr::Size(s) => constant(self.size(s)? as i64),
            Expr::Index(i) => {
                self.bound(*i)?;
                Ok(Some(Affine { base: 0, terms: vec![(*i, 1)] }))
            }
            Expr::Unary(UnaryOp::Neg, a) => Ok(self.affine(*a)?.and_then(|a| add(&Affine::default(), &a, -1))),
            Expr::Binary(op, a, b) => {
                let (Some(a), Some(b)) = (self.affine(*a)?, self.affine(*b)?) else { return Ok(None) };
                let scaled = |x: &Affine, by: &Affine| add(&Affine::default(), x, by.base);
                Ok(match op {
                    BinaryOp::Add => add(&a, &b, 1),
                    BinaryOp::Sub => add(&a, &b, -1),
                    BinaryOp::Mul if b.terms.is_empty() => scaled(&a, &b),
                    BinaryOp::Mul if a.terms.is_empty() => scaled(&b, &a),
                    BinaryOp::Div | BinaryOp::Mod if a.terms.is_empty() && b.terms.is_empty() => {
                        let v = op.eval(a.base as f64, b.base as f64, true);
                        Some(Affine { base: v as i64, terms: Vec::new() })
                    }
                    _ => None,
                })
            }
            _ => Ok(None),
        }
    }

    /// Whether a form stays in `0..extent` for every value of its indices.
    fn within(&self, f: &Affine, extent: u64) -> Done<bool> {
        let (mut low, mut high) = (i128::from(f.base), i128::from(f.base));
        for (i, coefficient) in &f.terms {
            let n = self.extent(*i)?;
            if n == 0 {
                return Ok(true);
            }
            let reach = i128::from(*coefficient) * i128::from(n - 1);
            low += reach.min(0);
            high += reach.max(0);
        }
        Ok(low >= 0 && high < i128::from(extent))
    }

    fn cursor(&mut self, f: &Affine) -> u32 {
        let id = self.p.cursors.len() as u32;
        self.p.cursors.push(f.base);
        for (i, coefficient) in &f.terms {
            let step = self.open.iter().rev().find(|(o, _)| o == i).map(|(_, s)| *s);
            let cursors = match step {
                Some(Stepped::Free(n)) => &mut self.p.free[n].cursors,
                Some(Stepped::Inner(n)) => &mut self.p.loops[n].cursors,
                Some(Stepped::Iterated) => match &mut self.p.iterated {
                    Some(l) => &mut l.cursors,
                    None => continue,
                },
                None => continue,
            };
            cursors.push((id, *coefficient));
        }
        id
    }

    fn reduce(&mut self, e: ExprId, op: Reducer, over: &[IndexId], body: ExprId) -> Done<Vec<(Reg, Ty)>> {
        if self.cx.permissions && op == Reducer::Op(ReduceOp::Sum) {
            self.round_operands(body, over);
        }
        let (done, fast) = (self.label(), self.dot(op, over, body)?);
        if let Some((of, dst)) = fast {
            self.used[done as usize] = true;
            self.emit(Ins::Dot { of, dst, done });
        }
        let acc = match op {
            Reducer::Op(op) => {
                let acc = self.acc();
                self.emit(Ins::Begin { acc, op });
                acc
            }
            Reducer::TopK { .. } => {
                let acc = self.acc();
                self.emit(Ins::BeginTop { acc });
                acc
            }
            Reducer::User(_) => 0,
        };
        let state = match op {
            Reducer::User(m) => self.monoid_state(m),
            Reducer::Op(_) | Reducer::TopK { .. } => Vec::new(),
        };
        let (outer_absent, outer_nest, mark) = (self.absent, self.nest, self.log.len());
        let mut nest = Vec::new();
        for (n, i) in over.iter().enumerate() {
            let (slot, extent) = (self.slot(*i), self.extent(*i)?);
            let (of, next, exit, back) = (self.p.loops.len() as u32, self.label(), self.label(), self.label());
            self.p.loops.push(Loop { slot, extent, cursors: Vec::new() });
            self.used[exit as usize] = true;
            self.emit(Ins::Loop { of, exit });
            self.place(back);
            self.open.push((*i, Stepped::Inner(of as usize)));
            self.nest = self.nest.saturating_mul(extent);
            nest.push((of, next, exit, back));
            self.absent = next;
            // Conjuncts whose last index is bound here, and that mention an index of this reduction.
            let ready = |x: &Conjunct| {
                let reduced = |j: &&IndexId| self.cx.c.indices[**j].kind == IndexKind::Reduced;
                x.indices.contains(i)
                    && !over[n + 1..].iter().any(|j| x.indices.contains(j))
                    && x.indices.iter().filter(reduced).all(|j| self.open.iter().any(|(o, _)| o == j))
            };
            let tests: Vec<usize> = (0..self.conjuncts.len()).filter(|n| ready(&self.conjuncts[*n])).collect();
            // A conjunct that mentions an outer index of this reduction only is tested at that level; one that waits
            // for a nested reduction is tested there.
            self.test(&tests)?;
        }
        self.p.work = self.p.work.max(self.nest);
        let (mut values, place) = (Vec::new(), self.position_row(op, over)?);
        match (&self.cx.c.exprs[body], op) {
            (Expr::Tuple(items), Reducer::User(_)) => {
                for x in items {
                    values.push(self.expr(*x)?);
                }
            }
            _ => values.push(self.expr(body)?),
        }
        match op {
            Reducer::Op(op) => self.emit(Ins::Add { acc, op, a: values[0].0, place }),
            Reducer::TopK { .. } => self.emit(Ins::AddTop { acc, a: values[0].0, place }),
            Reducer::User(m) => self.monoid_join(e, m, &state, &values)?,
        }
        self.forget(mark);
        self.absent = outer_absent;
        self.nest = outer_nest;
        for (of, next, exit, back) in nest.into_iter().rev() {
            self.place(next);
            self.used[back as usize] = true;
            self.emit(Ins::Next { of, back });
            self.place(exit);
            self.open.pop();
        }
        let results = match op {
            Reducer::Op(op) => {
                let (ty, dst) = (reduced_type(op, values[0].1), fast.map_or_else(|| self.regs(1), |(_, dst)| dst));
                self.emit(Ins::Total { acc, op, ty, dst });
                vec![(dst, ty)]
            }
            Reducer::TopK { k } => {
                let k = u32::try_from(k).ok().filter(|k| *k <= 1 << 20);
                let Some(k) = k else { return unsupported(self.cx.c, e, "top-k selects at most 2^20 elements") };
                let (v, p) = (self.regs(k), self.regs(k));
                self.emit(Ins::TotalTop { acc, k, values: v, places: p });
                vec![(v, values[0].1), (p, Ty::Int)]
            }
            Reducer::User(_) => state.iter().zip(&values).map(|(r, (_, ty))| (*r, *ty)).collect(),
        };
        self.place(done);
        Ok(results)
    }

    /// Registers of a user monoid's running value, set to its identity.
    fn monoid_state(&mut self, m: MonoidId) -> Vec<Reg> {
        let identity = self.cx.c.monoids[m].identity.clone();
        let base = self.regs(identity.len() as u32);
        for (i, x) in identity.iter().enumerate() {
            let a = self.constant(*x);
            self.emit(Ins::Move { dst: base + i as u32, a });
        }
        (0..identity.len() as u32).map(|i| base + i).collect()
    }

    /// `state = combine(state, values)`.
    fn monoid_join(&mut self, e: ExprId, m: MonoidId, state: &[Reg], values: &[(Reg, Ty)]) -> Done<()> {
        let monoid = &self.cx.c.monoids[m];
        if state.len() != values.len() || monoid.combine.len() != state.len() {
            return unsupported(
                self.cx.c,
                e,
                &format!("the monoid {} takes {} components; give as many values", monoid.name, state.len()),
            );
        }
        let ty = values.iter().fold(Ty::Int, |t, (_, u)| t.join(*u));
        let joined: Vec<Reg> = monoid.combine.iter().map(|x| self.monoid_expr(x, state, values, ty)).collect();
        for (dst, a) in state.iter().zip(joined) {
            self.emit(Ins::Move { dst: *dst, a });
        }
        Ok(())
    }

    fn monoid_expr(&mut self, x: &MonoidExpr, left: &[Reg], right: &[(Reg, Ty)], ty: Ty) -> Reg {
        match x {
            MonoidExpr::Left(i) => left[*i],
            MonoidExpr::Right(i) => right[*i].0,
            MonoidExpr::Const(v) => self.constant(*v),
            MonoidExpr::Unary(op, a) => {
                let a = self.monoid_expr(a, left, right, ty);
                let dst = self.regs(1);
                self.emit(Ins::Unary { op: *op, ty: ty.float(), dst, a });
                dst
            }
            MonoidExpr::Binary(op, a, b) => {
                let a = self.monoid_expr(a, left, right, ty);
                let b = self.monoid_expr(b, left, right, ty);
                let dst = self.regs(1);
                self.emit(Ins::Binary { op: *op, ty, dst, a, b });
                dst
            }
            MonoidExpr::Select(p, a, b) => {
                let cond = self.monoid_expr(p, left, right, ty);
                let (dst, other, end) = (self.regs(1), self.label(), self.label());
                self.jump_unless(cond, other);
                let a = self.monoid_expr(a, left, right, ty);
                self.emit(Ins::Move { dst, a });
                self.jump(end);
                self.place(other);
                let b = self.monoid_expr(b, left, right, ty);
                self.emit(Ins::Move { dst, a: b });
                self.place(end);
                dst
            }
        }
    }

    /// A row of position strides for operators that select an argument; row-major over several indices.
    fn position_row(&mut self, op: Reducer, over: &[IndexId]) -> Done<u32> {
        let selects = match op {
            Reducer::Op(op) => op.selects_argument(),
            Reducer::TopK { .. } => true,
            Reducer::User(_) => false,
        };
        let row = self.p.places.len() as u32;
        if selects {
            let extents = over.iter().map(|i| self.extent(*i)).collect::<Done<Vec<_>>>()?;
            let row = over.iter().map(|i| self.slots[i]).zip(strides(&extents)).collect();
            self.p.places.push(row);
        }
        Ok(row)
    }

    /// The fast path of `Σ a·b` over one index with strided operands.
    fn dot(&mut self, op: Reducer, over: &[IndexId], body: ExprId) -> Done<Option<(u32, Reg)>> {
        let c = self.cx.c;
        let ([i], Reducer::Op(ReduceOp::Sum), Expr::Binary(BinaryOp::Mul, a, b)) = (over, op, &c.exprs[body]) else {
            return Ok(None);
        };
        if self.cx.permissions || self.conjuncts.iter().any(|x| x.indices.contains(i)) {
            return Ok(None);
        }
        let mut rows = Vec::new();
        for operand in [*a, *b] {
            let Expr::Read { tensor, at } = &c.exprs[operand] else { return Ok(None) };
            if self.cx.partial[tensor.index()] || self.cx.demanded[tensor.index()] {
                return Ok(None);
            }
            let dims = self.cx.b.dims(c, *tensor)?;
            let mut sum = Affine::default();
            self.slot(*i);
            self.open.push((*i, Stepped::Inner(usize::MAX)));
            let mut fits = true;
            for ((e, d), s) in at.iter().zip(&dims).zip(strides(&dims)) {
                match self.affine(*e)? {
                    Some(f) if self.within(&f, *d)? => match add(&sum, &f, s) {
                        Some(next) => sum = next,
                        None => fits = false,
                    },
                    _ => fits = false,
                }
            }
            self.open.pop();
            if !fits {
                return Ok(None);
            }
            let stride = sum.terms.iter().find(|(j, _)| j == i).map_or(0, |(_, s)| *s);
            sum.terms.retain(|(j, _)| j != i);
            rows.push((self.reads(*tensor), self.cursor(&sum), stride));
        }
        let of = self.p.dots.len() as u32;
        self.p.dots.push(Dot { a: rows[0], b: rows[1], count: self.extent(*i)? });
        Ok(Some((of, self.regs(1))))
    }

    /// Places the default rounding points of a contraction (design §1): in a sum of products, the factors that
    /// depend on the reduced indices, and their partial products, may be rounded to the narrowest float type of 16
    /// bits or more among the stored tensors they read.
    fn round_operands(&mut self, e: ExprId, over: &[IndexId]) {
        let c = self.cx.c;
        match &c.exprs[e] {
            Expr::Binary(BinaryOp::Add | BinaryOp::Sub, a, b) => {
                self.round_operands(*a, over);
                self.round_operands(*b, over);
            }
            Expr::Unary(UnaryOp::Neg, a) => self.round_operands(*a, over),
            Expr::Binary(BinaryOp::Mul, a, b) => {
                let (mut factors, mut products) = (Vec::new(), Vec::new());
                factors_of(c, *a, &mut factors, &mut products);
                factors_of(c, *b, &mut factors, &mut products);
                let depends = |f: &ExprId| indices_of(c, *f).iter().any(|i| over.contains(i));
                factors.retain(depends);
                if factors.len() < 2 {
                    return;
                }
                let Some(to) = narrowest(c, &factors) else { return };
                let exact = |f: &ExprId| {
                    matches!(&c.exprs[*f], Expr::Read { tensor, .. }
                        if c.tensors[*tensor].dtype.unit_roundoff() >= to.unit_roundoff() || !c.tensors[*tensor].dtype.is_float())
                };
                for f in factors.iter().filter(|f| !exact(f)) {
                    self.rounding.insert(*f, to);
                }
                for (product, parts) in products {
                    if parts.iter().filter(|f| depends(f)).count() >= 2 {
                        self.rounding.insert(product, to);
                    }
                }
            }
            _ => {}
        }
    }

    /// Takes a running reduction out into a prelude and reads its result.
    fn scan(&mut self, e: ExprId, op: Reducer, over: IndexId, body: ExprId) -> Done<Vec<(Reg, Ty)>> {
        let c = self.cx.c;
        let mut rows = indices_of(c, body);
        for x in self.conjuncts.iter().filter(|x| x.indices.contains(&over)) {
            rows.extend(x.indices.iter().copied());
        }
        rows.retain(|i| *i != over && Some(*i) != self.cx.iterated);
        let mut k = Compiler::new(self.cx, c.spans[e.index()], self.hidden);
        k.conjuncts = self.conjuncts.clone();
        for i in rows.iter().chain([&over]) {
            k.open_free(*i)?;
        }
        let absent = k.label();
        k.absent = absent;
        // Only conjuncts that mention the running index restrict what is accumulated.
        let tests: Vec<usize> = (0..k.conjuncts.len())
            .filter(|n| {
                let x = &k.conjuncts[*n].indices;
                x.contains(&over) && x.iter().all(|i| k.open.iter().any(|(o, _)| o == i))
            })
            .collect();
        k.test(&tests)?;
        let items = match &c.exprs[body] {
            Expr::Tuple(items) => items.clone(),
            _ => vec![body],
        };
        let values = items.iter().map(|x| k.expr(*x)).collect::<Done<Vec<_>>>()?;
        let mut running = Running { reset: Vec::new(), acc: None, regs: Vec::new() };
        match op {
            Reducer::Op(op) if op.selects_argument() => {
                let (acc, dst) = (k.acc(), k.regs(1));
                let place = k.p.places.len() as u32;
                k.p.places.push(vec![(k.slots[&over], 1)]);
                k.emit(Ins::Add { acc, op, a: values[0].0, place });
                k.emit(Ins::Total { acc, op, ty: Ty::Int, dst });
                running.acc = Some((acc, op));
                running.reset.push((dst, op.identity()));
                running.regs.push((dst, Ty::Int));
            }
            Reducer::Op(op) => {
                let (dst, ty) = (k.regs(1), reduced_type(op, values[0].1));
                k.emit(Ins::Combine { op, ty, dst, a: dst, b: values[0].0 });
                running.reset.push((dst, op.identity()));
                running.regs.push((dst, ty));
            }
            Reducer::User(m) => {
                let identity = c.monoids[m].identity.clone();
                let base = k.regs(identity.len() as u32);
                let state: Vec<Reg> = (0..identity.len() as u32).map(|i| base + i).collect();
                k.monoid_join(e, m, &state, &values)?;
                running.reset.extend(state.iter().copied().zip(identity));
                running.regs.extend(state.iter().copied().zip(values.iter().map(|v| v.1)));
            }
            Reducer::TopK { .. } => {
                return unsupported(c, e, "a running top-k is not defined; use a filter on a reduction instead");
            }
        }
        k.place(absent);
        k.emit(Ins::Present { variant: 0 });
        let mut form = Affine::default();
        let indices: Vec<IndexId> = rows.iter().copied().chain([over]).collect();
        let dims = indices.iter().map(|i| k.extent(*i)).collect::<Done<Vec<u64>>>()?;
        for (i, s) in indices.iter().zip(strides(&dims)) {
            form.terms.push((*i, s));
        }
        let cursor = k.cursor(&form);
        let results = running.regs.clone();
        let first = *k.hidden;
        let ending =
            results.iter().map(|(reg, ty)| Result1 { reg: *reg, count: 1, ty: *ty, place: Place::Cursor(cursor) });
        k.p.endings.push(ending.collect());
        for (n, (_, ty)) in results.iter().enumerate() {
            let dtype = match ty {
                Ty::Int => DType::I64,
                Ty::F32 => DType::F32,
                Ty::F64 => DType::F64,
            };
            k.p.targets.push(TargetTensor { tensor: first + n as u32, dtype, in_place: false });
        }
        *k.hidden += results.len() as u32;
        k.p.running = Some(running);
        for (mine, theirs) in self.conjuncts.iter_mut().zip(&k.conjuncts) {
            mine.applied |= theirs.applied && theirs.indices.iter().any(|i| c.indices[*i].kind == IndexKind::Reduced);
        }
        let program = k.seal();
        self.p.work = self.p.work.max(program.work);
        for t in &program.reads {
            self.reads(TensorId::new(*t as usize));
        }
        self.p.preludes.push(Prelude { program, dims });
        let mut regs = Vec::new();
        for (n, (_, ty)) in results.iter().enumerate() {
            let (cursor, dst) = (self.cursor(&form), self.regs(1));
            self.emit(Ins::Load { dst, tensor: first + n as u32, cursor });
            regs.push((dst, *ty));
        }
        Ok(regs)
    }

    fn open_free(&mut self, i: IndexId) -> Done<()> {
        let (slot, extent) = (self.slot(i), self.extent(i)?);
        self.open.push((i, Stepped::Free(self.p.free.len())));
        self.p.free.push(Loop { slot, extent, cursors: Vec::new() });
        self.nest = self.nest.saturating_mul(extent);
        self.p.work = self.p.work.max(self.nest);
        Ok(())
    }

    fn slot(&mut self, i: IndexId) -> u32 {
        let next = self.slots.len() as u32;
        *self.slots.entry(i).or_insert(next)
    }

    /// The slot of an index that is open here.
    fn bound(&self, i: IndexId) -> Done<u32> {
        match self.slots.get(&i) {
            Some(slot) if self.open.iter().any(|(o, _)| *o == i) => Ok(*slot),
            _ => {
                let index = &self.cx.c.indices[i];
                let what = format!("the index {} is not bound here; reduce over it or put it on the left", index.name);
                Err(EvalError::Unsupported { what, span: index.span })
            }
        }
    }

    fn extent(&self, i: IndexId) -> Done<u64> {
        self.size(&self.cx.c.indices[i].extent)
    }

    fn size(&self, s: &Size) -> Done<u64> {
        Ok(self.cx.b.sizes(self.cx.c, "an index", std::slice::from_ref(s))?[0])
    }

    fn constant(&mut self, x: f64) -> Reg {
        let found = self.p.consts.iter().find(|(_, v)| v.to_bits() == x.to_bits()).map(|(r, _)| *r);
        found.unwrap_or_else(|| {
            let reg = self.regs(1);
            self.p.consts.push((reg, x));
            reg
        })
    }

    fn regs(&mut self, n: u32) -> Reg {
        self.p.n_regs += n;
        self.p.n_regs - n
    }

    fn acc(&mut self) -> u32 {
        self.p.n_accs += 1;
        self.p.n_accs - 1
    }

    fn label(&mut self) -> u32 {
        self.labels.push(u32::MAX);
        self.used.push(false);
        self.labels.len() as u32 - 1
    }

    fn place(&mut self, label: u32) {
        self.labels[label as usize] = self.p.code.len() as u32;
    }

    fn emit(&mut self, ins: Ins) {
        self.p.code.push(ins);
    }

    fn jump(&mut self, to: u32) {
        self.used[to as usize] = true;
        self.emit(Ins::Jump { to });
    }

    fn jump_unless(&mut self, cond: Reg, to: u32) {
        self.used[to as usize] = true;
        self.emit(Ins::Unless { cond, to });
    }

    /// The label that leaves the point of the innermost reduction, or the output point.
    fn leave(&mut self) -> u32 {
        self.maybe_leave(true)
    }

    fn maybe_leave(&mut self, leaves: bool) -> u32 {
        self.used[self.absent as usize] |= leaves;
        self.absent
    }

    /// Forgets expressions compiled after `mark`: their registers are not written on every path from here.
    fn forget(&mut self, mark: usize) {
        for e in self.log.drain(mark..) {
            self.memo.remove(&e);
        }
    }

    /// Resolves jump targets.
    fn seal(mut self) -> Program {
        self.p.n_slots = self.slots.len() as u32;
        for ins in &mut self.p.code {
            match ins {
                Ins::LoadPartial { absent: to, .. }
                | Ins::LoadDemanded { absent: to, .. }
                | Ins::Fetch { absent: to, .. }
                | Ins::Segment { absent: to, .. }
                | Ins::Jump { to }
                | Ins::Unless { to, .. }
                | Ins::Loop { exit: to, .. }
                | Ins::Next { back: to, .. }
                | Ins::Dot { done: to, .. } => *to = self.labels[*to as usize],
                Ins::Index { .. }
                | Ins::Load { .. }
                | Ins::Unary { .. }
                | Ins::Binary { .. }
                | Ins::Cast { .. }
                | Ins::Operand { .. }
                | Ins::Move { .. }
                | Ins::Begin { .. }
                | Ins::Add { .. }
                | Ins::Total { .. }
                | Ins::Best { .. }
                | Ins::BeginTop { .. }
                | Ins::AddTop { .. }
                | Ins::TotalTop { .. }
                | Ins::Combine { .. }
                | Ins::Rand { .. }
                | Ins::Present { .. }
                | Ins::Absent => {}
            }
        }
        self.p
    }
}

/// The type a reduction of values of type `ty` has.
fn reduced_type(op: ReduceOp, ty: Ty) -> Ty {
    match op {
        ReduceOp::Sum | ReduceOp::Product | ReduceOp::Min | ReduceOp::Max => ty,
        ReduceOp::LogSumExp => ty.float(),
        ReduceOp::Any | ReduceOp::All | ReduceOp::ArgMin | ReduceOp::ArgMax => Ty::Int,
    }
}

/// `a + by·b`, none on overflow.
fn add(a: &Affine, b: &Affine, by: i64) -> Option<Affine> {
    let mut sum = Affine { base: a.base.checked_add(b.base.checked_mul(by)?)?, terms: a.terms.clone() };
    for (i, c) in &b.terms {
        let c = c.checked_mul(by)?;
        match sum.terms.iter_mut().find(|(j, _)| j == i) {
            Some((_, d)) => *d = d.checked_add(c)?,
            None => sum.terms.push((*i, c)),
        }
    }
    sum.terms.retain(|(_, c)| *c != 0);
    Some(sum)
}

/// The factors of a product, and its partial products with their factors.
fn factors_of(c: &Cascade, e: ExprId, factors: &mut Vec<ExprId>, products: &mut Vec<(ExprId, Vec<ExprId>)>) {
    if let Expr::Binary(BinaryOp::Mul, a, b) = &c.exprs[e] {
        let from = factors.len();
        factors_of(c, *a, factors, products);
        factors_of(c, *b, factors, products);
        products.push((e, factors[from..].to_vec()));
    } else {
        factors.push(e);
    }
}

/// The narrowest float type of 16 bits or more among the stored tensors read under `roots`, if narrower than f32.
fn narrowest(c: &Cascade, roots: &[ExprId]) -> Option<DType> {
    let mut found: Option<DType> = None;
    for root in roots {
        c.walk(*root, &mut |_, e| {
            if let Expr::Read { tensor, .. } = e {
                let t = &c.tensors[*tensor];
                let stored = t.declared || matches!(t.kind, TensorKind::Input | TensorKind::InOut);
                let wide = t.dtype.is_float() && t.dtype.bits() >= 16;
                if stored && wide && found.is_none_or(|f| t.dtype.unit_roundoff() > f.unit_roundoff()) {
                    found = Some(t.dtype);
                }
            }
        });
    }
    found.filter(|d| d.unit_roundoff() > DType::F32.unit_roundoff())
}
