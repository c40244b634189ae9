//! Reductions: nested loops around a body, joined by an operator, a top-k selection or a user monoid.
//!
//! Invariant: a point of the body that is absent skips to the innermost loop's next iteration.

use super::super::domain::Ty;
use super::super::program::{Dot, Ins, Loop, Reg};
use super::access::add;
use super::{Affine, Compiler, Conjunct, Done, Stepped, unsupported};
use crate::arena::Id;
use crate::array::strides;
use crate::cascade::{Expr, ExprId, IndexId, IndexKind, MonoidExpr, MonoidId, Reducer};
use crate::ops::{BinaryOp, ReduceOp};

impl Compiler<'_> {
    pub(super) fn reduce(&mut self, e: ExprId, op: Reducer, over: &[IndexId], body: ExprId) -> Done<Vec<(Reg, Ty)>> {
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
        if let (Expr::Tuple(items), Reducer::User(_)) = (&self.cx.c.exprs[body], op) {
            for x in items {
                values.push(self.expr(*x)?);
            }
        } else {
            values.push(self.expr(body)?);
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
    pub(super) fn monoid_state(&mut self, m: MonoidId) -> Vec<Reg> {
        let identity = self.cx.c.monoids[m].identity.clone();
        let base = self.regs(identity.len() as u32);
        for (i, x) in identity.iter().enumerate() {
            let a = self.constant(*x);
            self.emit(Ins::Move { dst: base + i as u32, a });
        }
        (0..identity.len() as u32).map(|i| base + i).collect()
    }

    /// `state = combine(state, values)`.
    pub(super) fn monoid_join(&mut self, e: ExprId, m: MonoidId, state: &[Reg], values: &[(Reg, Ty)]) -> Done<()> {
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

    pub(super) fn monoid_expr(&mut self, x: &MonoidExpr, left: &[Reg], right: &[(Reg, Ty)], ty: Ty) -> Reg {
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
    pub(super) fn position_row(&mut self, op: Reducer, over: &[IndexId]) -> Done<u32> {
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
    pub(super) fn dot(&mut self, op: Reducer, over: &[IndexId], body: ExprId) -> Done<Option<(u32, Reg)>> {
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
}

/// The type a reduction of values of type `ty` has.
pub(super) fn reduced_type(op: ReduceOp, ty: Ty) -> Ty {
    match op {
        ReduceOp::Sum | ReduceOp::Product | ReduceOp::Min | ReduceOp::Max => ty,
        ReduceOp::LogSumExp => ty.float(),
        ReduceOp::Any | ReduceOp::All | ReduceOp::ArgMin | ReduceOp::ArgMax => Ty::Int,
    }
}
