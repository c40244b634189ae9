//! From an Einsum and extents to a [`Program`].
//!
//! Filters are tested at the outermost place where all their indices are bound: conjuncts over free indices first,
//! the others inside the reductions that bind their indices. A read outside a tensor's support jumps to the end of
//! the innermost reduction's iteration, or out of the point. Running reductions are taken out into preludes, so each
//! costs one sweep. The default rounding points of contractions are placed here.

mod access;
mod operands;
mod reduce;
mod scan;

use std::collections::{BTreeSet, HashMap};

use super::domain::Ty;
use super::error::EvalError;
use super::program::{Draw, Ins, Loop, Program, Ragged, Reg, Result1, TargetTensor};
use crate::arena::Id;
use crate::cascade::bind::Bindings;
use crate::cascade::types::Kind;
use crate::cascade::{Cascade, Einsum, Expr, ExprId, IndexId, IndexKind, Reducer, Size, TensorKind};
use crate::diag::Span;
use crate::dtype::DType;
use crate::ops::{BinaryOp, UnaryOp};

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
            let indices = cx.c.free_indices(expr).into_iter().collect();
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
    if let Expr::Binary(BinaryOp::And, a, b) = &c.exprs[e] {
        split(c, *a, f);
        split(c, *b, f);
    } else {
        f(e);
    }
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
            let block = tensor.storage.block_scale.as_ref().map(|b| (b.block, b.dtype));
            if block.is_some() && self.cx.iterated.is_some() {
                return Err(EvalError::Unsupported {
                    what: format!(
                        "{} is block-scaled and written in an iteration; write it after the iteration",
                        tensor.name
                    ),
                    span: e.span,
                });
            }
            self.p.targets.push(TargetTensor { tensor: t.tensor.index() as u32, dtype: tensor.dtype, block, in_place });
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
