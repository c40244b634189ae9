//! Accesses: affine positions become cursors that the loops keep, all others are checked one by one.
//!
//! Invariant: a cursor never leaves its tensor at any point that runs.

use super::super::domain::Ty;
use super::super::error::EvalError;
use super::super::program::{Access, Ins, Place, Position, Reg};
use super::{Affine, Compiler, Done, Stepped};
use crate::arena::Id;
use crate::array::strides;
use crate::cascade::{Expr, ExprId, Target, TensorId};
use crate::diag::Span;
use crate::ops::{BinaryOp, UnaryOp};

impl Compiler<'_> {
    pub(super) fn target(&mut self, t: &Target, top: bool) -> Done<Place> {
        let n = self.cx.c.tensors[t.tensor].dims.len();
        let at = if top && t.at.len() == n { &t.at[..n - 1] } else { &t.at[..] };
        let span = t.at.first().map_or(self.p.span, |e| self.cx.c.spans[e.index()]);
        match self.access(t.tensor, at, span)? {
            Ok(cursor) => Ok(Place::Cursor(cursor)),
            Err(access) => Ok(Place::Access(access)),
        }
    }

    pub(super) fn read(&mut self, e: ExprId, tensor: TensorId, at: &[ExprId]) -> Done<(Reg, Ty)> {
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

    pub(super) fn reads(&mut self, tensor: TensorId) -> u32 {
        let t = tensor.index() as u32;
        if !self.p.reads.contains(&t) {
            self.p.reads.push(t);
        }
        t
    }

    /// A cursor if every position is affine and in range, a checked access otherwise.
    pub(super) fn access(&mut self, tensor: TensorId, at: &[ExprId], span: Span) -> Done<Result<u32, u32>> {
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

    pub(super) fn overflow(&self, span: Span) -> EvalError {
        EvalError::Unsupported { what: "an access exceeds 2^63; use smaller coefficients".to_owned(), span }
    }

    /// The affine form of an integer expression, if it has one.
    pub(super) fn affine(&self, e: ExprId) -> Done<Option<Affine>> {
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
                    BinaryOp::Mul
                    | BinaryOp::Div
                    | BinaryOp::Mod
                    | BinaryOp::Pow
                    | BinaryOp::Min
                    | BinaryOp::Max
                    | BinaryOp::Lt
                    | BinaryOp::Le
                    | BinaryOp::Gt
                    | BinaryOp::Ge
                    | BinaryOp::Eq
                    | BinaryOp::Ne
                    | BinaryOp::And
                    | BinaryOp::Or => None,
                })
            }
            Expr::Float(_)
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Tuple(_)
            | Expr::Reduce { .. }
            | Expr::Scan { .. }
            | Expr::Segment { .. }
            | Expr::Rand { .. } => Ok(None),
        }
    }

    /// Whether a form stays in `0..extent` for every value of its indices.
    pub(super) fn within(&self, f: &Affine, extent: u64) -> Done<bool> {
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

    pub(super) fn cursor(&mut self, f: &Affine) -> u32 {
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
}

/// `a + by·b`, none on overflow.
pub(super) fn add(a: &Affine, b: &Affine, by: i64) -> Option<Affine> {
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
