//! Expressions: uniform ones, and elementwise ones with what depends on fewer dimensions computed once.
//!
//! Every node of an elementwise expression is computed once for each constant part of the coordinates it depends on: a
//! row's factor once per row, a uniform product once. `exp(a − b)` is one fma and one ex2 per element, b·log₂e being the
//! row's. Invariant: a value is kept only while the registers it names are unchanged: within one statement.

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{BufId, BufSpace, Expr};
use einfall_ir::ops::{BinaryOp, UnaryOp};

use super::Res;
use super::emit::Emit;
use super::text::{Ty, Val};
use crate::backend::gpu::memo::{self, Element};

/// What one statement has computed, by expression, way of deriving and coordinates.
pub(super) type Memo = memo::Memo<(usize, u8, Vec<i64>), Val>;

impl Emit<'_> {
    /// A uniform expression.
    pub(super) fn uniform(&mut self, e: &Expr) -> Res<Val> {
        self.value(e, None, &mut Memo::default())
    }

    /// A uniform integer of 32 bits.
    pub(super) fn int(&mut self, e: &Expr) -> Res<Val> {
        let v = self.uniform(e)?;
        Ok(self.to(&v, Ty::S32))
    }

    /// The value of `e`; `el` says for which element.
    pub(super) fn value(&mut self, e: &Expr, el: Option<&Element>, memo: &mut Memo) -> Res<Val> {
        if let Expr::Binary(..) = e
            && is_fixed(e)
            && has_quotient(e)
        {
            return self.fixed(e);
        }
        self.derived(e, 0, el, memo, |s, memo| s.compute(e, el, memo))
    }

    /// The value of an expression that a task computes once, before its role's body.
    fn fixed(&mut self, e: &Expr) -> Res<Val> {
        if let Some((_, v)) = self.fixed.iter().find(|(known, _)| known == e) {
            return Ok(v.clone());
        }
        let hoists = std::mem::take(&mut self.role.hoists);
        let mut made = None;
        let mut compute = |s: &mut Self| made = Some(s.compute(e, None, &mut Memo::default()));
        if hoists {
            self.hoisted(compute);
        } else {
            compute(self);
        }
        self.role.hoists = hoists;
        let v = made.expect("computed")?;
        self.fixed.push((e.clone(), v.clone()));
        Ok(v)
    }

    /// A value derived from `e` in way `kind`, computed once per what `e` depends on.
    fn derived(
        &mut self,
        e: &Expr,
        kind: u8,
        el: Option<&Element>,
        memo: &mut Memo,
        compute: impl FnOnce(&mut Self, &mut Memo) -> Res<Val>,
    ) -> Res<Val> {
        let Some(el) = el else { return compute(self, memo) };
        let dims = memo.dims(e);
        let key = (std::ptr::from_ref(e) as usize, kind, dims.iter().map(|d| el.at[*d]).collect::<Vec<_>>());
        if let Some(v) = memo.values.get(&key) {
            return Ok(v.clone());
        }
        let v = compute(self, memo)?;
        memo.values.insert(key, v.clone());
        Ok(v)
    }

    fn compute(&mut self, e: &Expr, el: Option<&Element>, memo: &mut Memo) -> Res<Val> {
        Ok(match e {
            Expr::Int(i) => Val::int(*i),
            Expr::Float(x) => Val::f32(*x),
            Expr::Var(v) => match self.role.vars[v.index()] {
                Some((lo, hi)) if lo == hi => Val::int(lo),
                Some((lo, hi)) => {
                    let any = self.role.loose.contains(&v.index());
                    Val { any, ..Val::ranged(format!("%v{}", v.index()), lo, hi) }
                }
                None => Val::reg(Ty::S32, format!("%v{}", v.index())),
            },
            Expr::Extent(r) => self.extent(*r),
            Expr::Grid(d) => self.grid[*d].clone(),
            Expr::Unit => self.role.unit.clone(),
            Expr::ClusterRank => {
                let n = self.k.cluster.iter().product::<u64>() as i64;
                if n <= 1 { Val::int(0) } else { Val::ranged("%cluster_rank".to_string(), 0, n - 1) }
            }
            Expr::Scalar(b) => self.scalars[b.index()].clone().ok_or_else(|| self.fail("a scalar that is an array"))?,
            Expr::Fetch { buf, at } => {
                let mut coords = Vec::new();
                for c in at {
                    let c = self.value(c, el, memo)?;
                    coords.push(self.to(&c, Ty::S32));
                }
                self.fetch(*buf, &coords)?
            }
            Expr::Frag { frag, dims } => {
                let el = el.ok_or_else(|| self.fail("a fragment in a uniform expression"))?;
                let Some(served) = self.frags.serve(*frag, el.of, dims) else {
                    let (f, r) = (&self.frags.get(*frag).name, &self.frags.get(el.of).name);
                    let what = format!("`{f}` in `{r}`, whose threads do not hold its elements");
                    return Err(self.fail(&what));
                };
                match served[el.v] {
                    Some(v) => self.element(*frag, v),
                    None => Val::int(0),
                }
            }
            Expr::Coord(d) => {
                let el = el.ok_or_else(|| self.fail("a coordinate in a uniform expression"))?;
                let t = self.thread_coord(el.of, *d);
                self.bin(BinaryOp::Add, &t, &Val::int(el.at[*d]))?
            }
            Expr::Unary(op, a) => {
                let fused =
                    if matches!(op, UnaryOp::Exp | UnaryOp::Exp2) { self.fused_exp(*op, a, el, memo)? } else { None };
                match fused {
                    Some(v) => v,
                    None => {
                        let x = self.value(a, el, memo)?;
                        self.unary(*op, &x, memo.coarse)?
                    }
                }
            }
            Expr::Binary(op, a, b) => {
                let (x, y) = (self.value(a, el, memo)?, self.value(b, el, memo)?);
                let fewer = el.is_some() && memo.dims(b).len() < memo.dims(a).len();
                if *op == BinaryOp::Div && fewer && y.k.is_none() && y.ty == Ty::F32 && !x.ty.eq(&Ty::F64) {
                    let r = self.derived(b, 1, el, memo, |s, _| {
                        Ok(Val::reg(Ty::F32, s.t.def(Ty::F32, "rcp.approx.ftz.f32", &[&y.s])))
                    })?;
                    let x = self.to(&x, Ty::F32);
                    return Ok(self.mul(&x, &r));
                }
                self.bin(*op, &x, &y)?
            }
            Expr::Fma(a, b, c) => {
                let (a, b) = (self.value(a, el, memo)?, self.value(b, el, memo)?);
                let c = self.value(c, el, memo)?;
                self.fma(&a, &b, &c)
            }
            Expr::Select(c, a, b) => {
                let c = self.value(c, el, memo)?;
                let (a, b) = (self.value(a, el, memo)?, self.value(b, el, memo)?);
                self.select(&c, &a, &b)
            }
            Expr::Cast(d, a) => {
                let x = self.value(a, el, memo)?;
                self.rounded(&x, *d)?
            }
            Expr::Rand(of) => {
                let of = of.iter().map(|x| self.value(x, el, memo)).collect::<Res<Vec<_>>>()?;
                self.random(&of)
            }
        })
    }

    /// `exp(a ± b)` where b depends on fewer dimensions: ex2(a·log₂e ± b·log₂e), the second product computed once.
    fn fused_exp(&mut self, op: UnaryOp, e: &Expr, el: Option<&Element>, memo: &mut Memo) -> Res<Option<Val>> {
        let (Expr::Binary(join @ (BinaryOp::Sub | BinaryOp::Add), a, b), Some(_)) = (e, el) else { return Ok(None) };
        if memo.dims(b).len() >= memo.dims(a).len() {
            return Ok(None);
        }
        let log2e = if op == UnaryOp::Exp { std::f64::consts::LOG2_E } else { 1.0 };
        // exp(x·u − b) with u uniform: u·log₂e is the factor.
        let (a, uniform) = match &**a {
            Expr::Binary(BinaryOp::Mul, x, u) if memo.dims(u).is_empty() => (x, Some(u)),
            Expr::Binary(BinaryOp::Mul, u, x) if memo.dims(u).is_empty() => (x, Some(u)),
            _ => (a, None),
        };
        let (x, y) = (self.value(a, el, memo)?, self.value(b, el, memo)?);
        if x.ty != Ty::F32 || y.ty == Ty::F64 {
            return Ok(None);
        }
        let scale = match uniform {
            None => Val::f32(log2e),
            Some(u) => self.derived(u, 3, el, memo, |s, memo| {
                let u = s.value(u, el, memo)?;
                let u = s.to(&u, Ty::F32);
                Ok(s.mul(&u, &Val::f32(log2e)))
            })?,
        };
        let sign = if *join == BinaryOp::Sub { -1.0 } else { 1.0 };
        let shift = self.derived(b, 2, el, memo, |s, _| {
            let y = s.to(&y, Ty::F32);
            Ok(s.mul(&y, &Val::f32(log2e * sign)))
        })?;
        let t = self.fma(&x, &scale, &shift);
        Ok(Some(Val::reg(Ty::F32, self.t.def(Ty::F32, "ex2.approx.ftz.f32", &[&t.s]))))
    }

    /// One element of a buffer, 0 outside it.
    fn fetch(&mut self, buf: BufId, coords: &[Val]) -> Res<Val> {
        let dims = self.k.bufs[buf].dims.clone();
        let BufSpace::Global { .. } = self.k.bufs[buf].space else {
            return Err(self.fail("a uniform read of shared memory"));
        };
        let mut inside = Val::pred(true);
        for (c, d) in coords.iter().zip(&dims) {
            let d = self.int(d)?;
            let low = self.bin(BinaryOp::Ge, c, &Val::int(0))?;
            let high = self.bin(BinaryOp::Lt, c, &d)?;
            let both = self.bin(BinaryOp::And, &low, &high)?;
            inside = self.bin(BinaryOp::And, &inside, &both)?;
        }
        let address = self.global_address(buf, coords)?;
        self.load_scalar(buf, "global", &address, 0, Some(&inside))
    }

    /// `v` rounded to `dtype`, in the class of its expressions.
    pub(super) fn rounded(&mut self, v: &Val, dtype: DType) -> Res<Val> {
        Ok(match dtype {
            DType::F64 => self.to(v, Ty::F64),
            DType::F32 => self.to(v, Ty::F32),
            DType::Tf32 => {
                let x = self.to(v, Ty::F32);
                let x = self.in_reg(&x);
                let bits = self.t.def(Ty::S32, "cvt.rna.tf32.f32", &[&x]);
                Val::reg(Ty::F32, self.t.def(Ty::F32, "mov.b32", &[&bits]))
            }
            DType::BF16 | DType::F16 => {
                let x = self.to(v, Ty::F32);
                if let Some(k) = x.k {
                    return Ok(Val::f32(dtype.round(k)));
                }
                let d = self.t.reg(Ty::S32);
                self.pack_pair(dtype, &d, &x, &Val::f32(0.0));
                if dtype == DType::BF16 {
                    let bits = self.t.def(Ty::S32, "shl.b32", &[&d, "16"]);
                    Val::reg(Ty::F32, self.t.def(Ty::F32, "mov.b32", &[&bits]))
                } else {
                    let h = self.half(&d, 0);
                    Val::reg(Ty::F32, self.t.def(Ty::F32, "cvt.f32.f16", &[&h]))
                }
            }
            DType::F8E4M3 | DType::F8E5M2 => {
                let b = self.pack_bytes(dtype, v, &Val::f32(0.0));
                self.float8(dtype, &b)
            }
            DType::I64 => self.to(v, Ty::S64),
            DType::I32 => self.to(v, Ty::S32),
            DType::I8 | DType::U8 | DType::I4 | DType::U4 => {
                let (lo, hi) = (dtype.min_finite() as i64, dtype.max_finite() as i64);
                let x = self.to(v, Ty::S32);
                let x = self.bin(BinaryOp::Max, &x, &Val::int(lo))?;
                self.bin(BinaryOp::Min, &x, &Val::int(hi))?
            }
            DType::Bool => {
                let p = self.to(v, Ty::Pred);
                self.to(&p, Ty::S32)
            }
        })
    }
}

/// Whether the expression has one value in a task.
fn is_fixed(e: &Expr) -> bool {
    match e {
        Expr::Int(_) | Expr::Extent(_) | Expr::Grid(_) => true,
        Expr::Binary(_, a, b) => is_fixed(a) && is_fixed(b),
        Expr::Float(_)
        | Expr::Var(_)
        | Expr::Unit
        | Expr::ClusterRank
        | Expr::Scalar(_)
        | Expr::Fetch { .. }
        | Expr::Frag { .. }
        | Expr::Coord(_)
        | Expr::Unary(..)
        | Expr::Fma(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Rand(_) => false,
    }
}

/// Whether computing it takes a division by something that is no literal: dozens of instructions.
fn has_quotient(e: &Expr) -> bool {
    let mut found = matches!(e, Expr::Binary(BinaryOp::Div | BinaryOp::Mod, _, b) if !matches!(**b, Expr::Int(_)));
    e.for_each_operand(|o| found |= has_quotient(o));
    found
}
