//! Arithmetic on values: constants folded, ranges kept, the cheapest instruction that is right for the range.
//!
//! Invariant: integer division and remainder are those of the IR (floor, and 0 for a divisor of 0); narrower integers
//! saturate, NaN is 0 there; min and max of floats keep NaN; comparisons with NaN are false but `!=`. Products and sums may be contracted to fma by ptxas.

use einfall_ir::dtype::DType;
use einfall_ir::ops::BinaryOp;

use super::Res;
use super::emit::Emit;
use super::text::{I32, Ty, Val};
use crate::backend::gpu::fold;

/// The class that holds values of a type in expressions.
pub(super) fn class(dtype: DType) -> Ty {
    match dtype {
        DType::F64 => Ty::F64,
        DType::F32 | DType::Tf32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => Ty::F32,
        DType::I64 => Ty::S64,
        DType::I32 | DType::I8 | DType::U8 | DType::I4 | DType::U4 | DType::Bool => Ty::S32,
    }
}

impl Emit<'_> {
    /// `v` as a register or immediate of class `ty`.
    pub(super) fn to(&mut self, v: &Val, ty: Ty) -> Val {
        let v = &self.settled(v);
        if v.ty == ty {
            return v.clone();
        }
        if let Some(k) = v.k {
            match ty {
                Ty::F32 => return Val::f32(k),
                Ty::F64 => return Val::f64(k),
                Ty::Pred => return Val::pred(k != 0.0),
                Ty::S32 if !v.ty.is_float() => return Val::int(v.lo.clamp(I32.0, I32.1)),
                Ty::S64 if !v.ty.is_float() => return Val { ty, ..Val::int(v.lo) },
                Ty::S32 => return Val::int(i64::from(k as i32)),
                Ty::S64 => return Val { ty, ..Val::int(k as i64) },
                Ty::B16 => {}
            }
        }
        let t = &mut self.t;
        let s = v.s.as_str();
        let d = match (v.ty, ty) {
            (Ty::Pred, Ty::S32) => t.def(ty, "selp.b32", &["1", "0", s]),
            (Ty::Pred, Ty::S64) => t.def(ty, "selp.b64", &["1", "0", s]),
            (Ty::Pred, Ty::F32) => t.def(ty, "selp.f32", &["0f3F800000", "0f00000000", s]),
            (Ty::Pred, Ty::F64) => t.def(ty, "selp.f64", &["0d3FF0000000000000", "0d0000000000000000", s]),
            (Ty::S32, Ty::Pred) => t.def(ty, "setp.ne.s32", &[s, "0"]),
            (Ty::S64, Ty::Pred) => t.def(ty, "setp.ne.s64", &[s, "0"]),
            (Ty::F32, Ty::Pred) => t.def(ty, "setp.neu.f32", &[s, "0f00000000"]),
            (Ty::F64, Ty::Pred) => t.def(ty, "setp.neu.f64", &[s, "0d0000000000000000"]),
            (Ty::S32, Ty::S64) => t.def(ty, "cvt.s64.s32", &[s]),
            (Ty::S64, Ty::S32) if I32.0 <= v.lo && v.hi <= I32.1 => t.def(ty, "cvt.u32.u64", &[s]),
            (Ty::S64, Ty::S32) => t.def(ty, "cvt.sat.s32.s64", &[s]),
            (Ty::S32, Ty::F32) => t.def(ty, "cvt.rn.f32.s32", &[s]),
            (Ty::S32, Ty::F64) => t.def(ty, "cvt.rn.f64.s32", &[s]),
            (Ty::S64, Ty::F32) => t.def(ty, "cvt.rn.f32.s64", &[s]),
            (Ty::S64, Ty::F64) => t.def(ty, "cvt.rn.f64.s64", &[s]),
            (Ty::F32, Ty::S32) => t.def(ty, "cvt.rzi.s32.f32", &[s]),
            // These give the least integer for NaN, which is 0 here.
            (Ty::F32, Ty::S64) | (Ty::F64, Ty::S32 | Ty::S64) => {
                let (f, w) = (if v.ty == Ty::F32 { "f32" } else { "f64" }, if ty == Ty::S32 { "32" } else { "64" });
                let x = t.def(ty, &format!("cvt.rzi.s{w}.{f}"), &[s]);
                let nan = t.def(Ty::Pred, &format!("setp.nan.{f}"), &[s, s]);
                t.def(ty, &format!("selp.b{w}"), &["0", &x, &nan])
            }
            (Ty::F32, Ty::F64) => t.def(ty, "cvt.f64.f32", &[s]),
            (Ty::F64, Ty::F32) => t.def(ty, "cvt.rn.f32.f64", &[s]),
            (Ty::B16, _) | (_, Ty::B16) => unreachable!("16-bit registers are no expression's class"),
            (Ty::Pred, Ty::Pred)
            | (Ty::S32, Ty::S32)
            | (Ty::S64, Ty::S64)
            | (Ty::F32, Ty::F32)
            | (Ty::F64, Ty::F64) => {
                unreachable!("the classes differ")
            }
        };
        match ty {
            Ty::S64 if !v.ty.is_float() => Val { lo: v.lo, hi: v.hi, any: v.any, ..Val::reg(ty, d) },
            Ty::S32 if v.ty == Ty::S64 => Val { any: v.any, ..Val::ranged(d, v.lo, v.hi) },
            Ty::Pred | Ty::B16 | Ty::S32 | Ty::S64 | Ty::F32 | Ty::F64 => Val::reg(ty, d),
        }
    }

    /// `v` with its pending constant added.
    fn settled(&mut self, v: &Val) -> Val {
        if v.off == 0 {
            return v.clone();
        }
        Val { s: self.t.def(Ty::S32, "add.s32", &[&v.s, &v.off.to_string()]), off: 0, ..v.clone() }
    }

    /// An immediate moved to a register, for instructions that take none.
    pub(super) fn in_reg(&mut self, v: &Val) -> String {
        let v = &self.settled(v);
        if v.k.is_none() && v.int_const().is_none() {
            return v.s.clone();
        }
        match v.ty {
            Ty::S32 => self.t.def(v.ty, "mov.b32", &[&v.s]),
            Ty::S64 => self.t.def(v.ty, "mov.b64", &[&v.s]),
            Ty::F32 => self.t.def(v.ty, "mov.f32", &[&v.s]),
            Ty::F64 => self.t.def(v.ty, "mov.f64", &[&v.s]),
            Ty::Pred => self.t.def(v.ty, "setp.ne.s32", &[&v.s, "0"]),
            Ty::B16 => self.t.def(v.ty, "mov.b16", &[&v.s]),
        }
    }

    /// The common class of two operands.
    fn join(a: &Val, b: &Val) -> Ty {
        let rank = |t: Ty| match t {
            Ty::Pred | Ty::B16 => 0,
            Ty::S32 => 1,
            Ty::S64 => 2,
            Ty::F32 => 3,
            Ty::F64 => 4,
        };
        let ty = if rank(a.ty) >= rank(b.ty) { a.ty } else { b.ty };
        if ty == Ty::Pred { Ty::S32 } else { ty }
    }

    pub(super) fn add(&mut self, a: &Val, b: &Val) -> Val {
        let v = self.bin(BinaryOp::Add, a, b).expect("addition prints");
        self.settled(&v)
    }

    pub(super) fn sub(&mut self, a: &Val, b: &Val) -> Val {
        let v = self.bin(BinaryOp::Sub, a, b).expect("subtraction prints");
        self.settled(&v)
    }

    pub(super) fn mul(&mut self, a: &Val, b: &Val) -> Val {
        self.bin(BinaryOp::Mul, a, b).expect("multiplication prints")
    }

    pub(super) fn bin(&mut self, op: BinaryOp, a: &Val, b: &Val) -> Res<Val> {
        use BinaryOp::*;
        match op {
            And | Or => return Ok(self.logic(op == And, a, b)),
            Lt | Le | Gt | Ge | Eq | Ne => return Ok(self.compare(op, a, b)),
            Add | Sub | Mul | Div | Mod | Pow | Min | Max => {}
        }
        let ty = Self::join(a, b);
        if matches!(op, Add | Sub) && a.ty == Ty::S32 && b.ty == Ty::S32 {
            return Ok(self.sum(op == Sub, a, b));
        }
        let (a, b) = (self.to(a, ty), self.to(b, ty));
        if ty.is_float() { self.float(op, ty, &a, &b) } else { self.integer(op, ty, &a, &b) }
    }

    /// a ± b of 32-bit integers, constants left pending.
    fn sum(&mut self, minus: bool, a: &Val, b: &Val) -> Val {
        let sign = if minus { -1 } else { 1 };
        let (lo, hi) = if minus { (a.lo - b.hi, a.hi - b.lo) } else { (a.lo + b.lo, a.hi + b.hi) };
        let any = a.any || b.any;
        let ranged = |s: String, off: i64| Val { off, any, ..Val::ranged(s, lo, hi) };
        match (a.int_const(), b.int_const()) {
            (Some(x), Some(y)) => Val::int(x + sign * y),
            (_, Some(y)) => ranged(a.s.clone(), a.off + sign * y),
            (Some(x), None) if !minus => ranged(b.s.clone(), b.off + x),
            _ => {
                let op = if minus { "sub.s32" } else { "add.s32" };
                let (x, off) = match a.int_const() {
                    Some(x) => (x.to_string(), 0),
                    None => (a.s.clone(), a.off),
                };
                ranged(self.t.def(Ty::S32, op, &[&x, &b.s]), off + sign * b.off)
            }
        }
    }

    fn logic(&mut self, and: bool, a: &Val, b: &Val) -> Val {
        let (a, b) = (self.to(a, Ty::Pred), self.to(b, Ty::Pred));
        if let Some(i) = fold::decided(and, [a.int_const(), b.int_const()]) {
            return [a, b][i].clone();
        }
        Val::reg(Ty::Pred, self.t.def(Ty::Pred, if and { "and.pred" } else { "or.pred" }, &[&a.s, &b.s]))
    }

    fn compare(&mut self, op: BinaryOp, a: &Val, b: &Val) -> Val {
        use BinaryOp::*;
        let ty = Self::join(a, b);
        // The difference of what may be any integer may not fit one: order would be lost.
        let fits = matches!(op, Eq | Ne) || a.int_const().is_some() || b.int_const().is_some() || !a.any && !b.any;
        let apart = a.ty == Ty::S32 && b.ty == Ty::S32 && (a.off != 0 || b.off != 0) && fits;
        let (a, b) = match (apart, a.int_const(), b.int_const()) {
            // The registers' difference against the constants': one register serves all elements.
            (true, None, None) => {
                let d = self.t.def(Ty::S32, "sub.s32", &[&a.s, &b.s]);
                let k = b.off - a.off;
                let (lo, hi) = (a.lo - b.hi + k, a.hi - b.lo + k);
                (Val { any: a.any || b.any, ..Val::ranged(d, lo, hi) }, Val::int(k))
            }
            (true, None, Some(k)) => {
                (Val { off: 0, lo: a.lo - a.off, hi: a.hi - a.off, ..a.clone() }, Val::int(k - a.off))
            }
            _ => (self.to(a, ty), self.to(b, ty)),
        };
        if !ty.is_float() {
            if let Some(v) = fold::compared(op, (a.lo, a.hi), (b.lo, b.hi)) {
                return Val::pred(v);
            }
        } else if let (Some(x), Some(y)) = (a.k, b.k) {
            return Val::pred(op.eval(x, y, false) != 0.0);
        }
        let name = match op {
            Lt => "lt",
            Le => "le",
            Gt => "gt",
            Ge => "ge",
            Eq => "eq",
            _ if ty.is_float() => "neu",
            _ => "ne",
        };
        let suffix = match ty {
            Ty::S64 => "s64",
            Ty::F32 => "f32",
            Ty::F64 => "f64",
            Ty::S32 | Ty::Pred | Ty::B16 => "s32",
        };
        // Comparisons take an immediate on the right only.
        let x = if a.k.is_some() || a.int_const().is_some() { self.in_reg(&a) } else { a.s.clone() };
        Val::reg(Ty::Pred, self.t.def(Ty::Pred, &format!("setp.{name}.{suffix}"), &[&x, &b.s]))
    }

    fn float(&mut self, op: BinaryOp, ty: Ty, a: &Val, b: &Val) -> Res<Val> {
        use BinaryOp::*;
        let suffix = if ty == Ty::F32 { "f32" } else { "f64" };
        let make = |v: f64| if ty == Ty::F32 { Val::f32(v) } else { Val::f64(v) };
        if let (Some(x), Some(y)) = (a.k, b.k) {
            return Ok(make(op.eval(x, y, false)));
        }
        // Neutral operands; x·0 stays, for NaN.
        match (op, a.k, b.k) {
            (Mul, Some(1.0), _) => return Ok(b.clone()),
            (Mul | Div, _, Some(1.0)) => return Ok(a.clone()),
            (Sub, _, Some(0.0)) => return Ok(a.clone()),
            _ => {}
        }
        // Immediates stand on the right.
        let (a, b) = if a.k.is_some() && matches!(op, Add | Mul | Min | Max) { (b, a) } else { (a, b) };
        let x = if a.k.is_some() { self.in_reg(a) } else { a.s.clone() };
        let s = match op {
            Add => self.t.def(ty, &format!("add.{suffix}"), &[&x, &b.s]),
            Sub => self.t.def(ty, &format!("sub.{suffix}"), &[&x, &b.s]),
            Mul => self.t.def(ty, &format!("mul.{suffix}"), &[&x, &b.s]),
            Div => match (ty, b.k) {
                // Powers of two divide exactly by their inverse.
                (_, Some(k)) if k != 0.0 && (1.0 / k).is_normal() && k.abs().log2().fract() == 0.0 => {
                    self.t.def(ty, &format!("mul.{suffix}"), &[&x, &make(1.0 / k).s])
                }
                (Ty::F32, _) => {
                    let y = self.in_reg(b);
                    self.t.def(ty, "div.full.f32", &[&x, &y])
                }
                _ => self.t.def(ty, "div.rn.f64", &[&x, &b.s]),
            },
            Min | Max => {
                let name = if op == Min { "min" } else { "max" };
                if ty == Ty::F32 {
                    self.t.def(ty, &format!("{name}.NaN.f32"), &[&x, &b.s])
                } else {
                    let m = self.t.def(ty, &format!("{name}.f64"), &[&x, &b.s]);
                    let nan = self.t.def(Ty::Pred, "setp.nan.f64", &[&x, &b.s]);
                    let sum = self.t.def(ty, "add.f64", &[&x, &b.s]);
                    self.t.def(ty, "selp.f64", &[&sum, &m, &nan])
                }
            }
            Mod => {
                let q = self.float(Div, ty, a, b)?;
                let q = self.t.def(ty, &format!("cvt.rmi.{suffix}.{suffix}"), &[&q.s]);
                let n = self.t.def(ty, &format!("neg.{suffix}"), &[&q]);
                let y = self.in_reg(b);
                self.t.def(ty, &format!("fma.rn.{suffix}"), &[&n, &y, &x])
            }
            Pow => return self.pow(ty, a, b),
            Lt | Le | Gt | Ge | Eq | Ne | And | Or => unreachable!("predicates are compared"),
        };
        Ok(Val::reg(ty, s))
    }

    /// x^n for small constant integers, √x.
    fn pow(&mut self, ty: Ty, a: &Val, b: &Val) -> Res<Val> {
        match b.k {
            Some(0.5) => self.sqrt(a),
            Some(n) if n.fract() == 0.0 && (1.0..=8.0).contains(&n) => {
                let mut v = a.clone();
                for _ in 1..n as u32 {
                    v = self.mul(&v, a);
                }
                Ok(v)
            }
            _ if ty == Ty::F32 => self.pow_f32(a, b),
            _ => Err(self.fail("`pow` in f64 with such an exponent")),
        }
    }

    fn integer(&mut self, op: BinaryOp, ty: Ty, a: &Val, b: &Val) -> Res<Val> {
        use BinaryOp::*;
        if let (Some(x), Some(y)) = (a.int_const(), b.int_const()) {
            let v = fold::integers(op, x, y);
            return v.map(Val::int).ok_or_else(|| self.fail("an integer constant beyond 64 bits"));
        }
        let sat = |v: Option<i64>, up: bool| v.unwrap_or(if up { i64::MAX } else { i64::MIN });
        let w = if ty == Ty::S32 { "32" } else { "64" };
        let (ka, kb) = (a.int_const(), b.int_const());
        let (s, lo, hi) = match op {
            Add => {
                match (ka, kb) {
                    (Some(0), _) => return Ok(b.clone()),
                    (_, Some(0)) => return Ok(a.clone()),
                    _ => {}
                }
                let (x, y) = if ka.is_some() { (b, a) } else { (a, b) };
                let s = self.t.def(ty, &format!("add.s{w}"), &[&x.s, &y.s]);
                (s, sat(a.lo.checked_add(b.lo), false), sat(a.hi.checked_add(b.hi), true))
            }
            Sub => {
                if kb == Some(0) {
                    return Ok(a.clone());
                }
                let s = self.t.def(ty, &format!("sub.s{w}"), &[&a.s, &b.s]);
                (s, sat(a.lo.checked_sub(b.hi), false), sat(a.hi.checked_sub(b.lo), true))
            }
            Mul => {
                let (x, y) = if ka.is_some() { (b, a) } else { (a, b) };
                match y.int_const() {
                    Some(0) => return Ok(Val::int(0)),
                    Some(1) => return Ok(x.clone()),
                    _ => {}
                }
                let s = match y.int_const() {
                    Some(k) if k > 0 && k & (k - 1) == 0 => {
                        self.t.def(ty, &format!("shl.b{w}"), &[&x.s, &k.trailing_zeros().to_string()])
                    }
                    _ => self.t.def(ty, &format!("mul.lo.s{w}"), &[&x.s, &y.s]),
                };
                let corners =
                    [(a.lo, b.lo), (a.lo, b.hi), (a.hi, b.lo), (a.hi, b.hi)].map(|(p, q)| p.saturating_mul(q));
                (s, *corners.iter().min().expect("four"), *corners.iter().max().expect("four"))
            }
            Min | Max => {
                if (op == Min) == (a.hi <= b.lo) && (a.hi <= b.lo || b.hi <= a.lo) {
                    return Ok(a.clone());
                }
                if a.hi <= b.lo || b.hi <= a.lo {
                    return Ok(b.clone());
                }
                let (x, y) = if ka.is_some() { (b, a) } else { (a, b) };
                let name = if op == Min { "min" } else { "max" };
                let s = self.t.def(ty, &format!("{name}.s{w}"), &[&x.s, &y.s]);
                if op == Min { (s, a.lo.min(b.lo), a.hi.min(b.hi)) } else { (s, a.lo.max(b.lo), a.hi.max(b.hi)) }
            }
            Div | Mod => return Ok(self.divide(op == Div, ty, a, b)),
            Pow => return Err(self.fail("`pow` of integers")),
            Lt | Le | Gt | Ge | Eq | Ne | And | Or => unreachable!("predicates are compared"),
        };
        let made = if ty == Ty::S32 { Val::ranged(s, lo, hi) } else { Val { lo, hi, ..Val::reg(ty, s) } };
        Ok(Val { any: a.any || b.any, ..made })
    }

    fn divide(&mut self, quotient: bool, ty: Ty, a: &Val, b: &Val) -> Val {
        let w = if ty == Ty::S32 { "32" } else { "64" };
        let ranged = |s: String, lo, hi| {
            let made = if ty == Ty::S32 { Val::ranged(s, lo, hi) } else { Val { lo, hi, ..Val::reg(ty, s) } };
            Val { any: a.any || b.any, ..made }
        };
        if let Some(k) = b.int_const() {
            match k {
                0 => return Val::int(0),
                1 => return if quotient { a.clone() } else { Val::int(0) },
                _ => {}
            }
            let (lo, hi) = if quotient && k > 0 {
                (fold::floor_div(a.lo, k), fold::floor_div(a.hi, k))
            } else if quotient {
                (i64::MIN, i64::MAX)
            } else {
                (0.min(k + 1), 0.max(k - 1))
            };
            if !quotient && a.lo >= 0 && a.hi < k {
                return a.clone();
            }
            if k > 0 && k & (k - 1) == 0 {
                // Shifting and masking two's complement is floor division.
                let s = if quotient {
                    let sign = if a.lo >= 0 { "u" } else { "s" };
                    self.t.def(ty, &format!("shr.{sign}{w}"), &[&a.s, &k.trailing_zeros().to_string()])
                } else {
                    self.t.def(ty, &format!("and.b{w}"), &[&a.s, &(k - 1).to_string()])
                };
                return ranged(s, lo, hi);
            }
            if k > 0 && a.lo >= 0 && ty == Ty::S32 {
                // a·m >> 31 + l with l = ⌈log₂ k⌉ and m = ⌈2^(31+l) / k⌉ is exact below 2³¹ (T. Granlund and
                // P. Montgomery, 1994); ptxas would divide by the reciprocal where the divisor is uniform.
                let l = u64::BITS - (k as u64 - 1).leading_zeros();
                let m = (1u64 << (31 + l)).div_ceil(k as u64);
                let q = self.t.def(ty, "mul.hi.u32", &[&a.s, &m.to_string()]);
                let q = if l > 1 { self.t.def(ty, "shr.u32", &[&q, &(l - 1).to_string()]) } else { q };
                if quotient {
                    return ranged(q, lo, hi);
                }
                let back = self.t.def(ty, "mul.lo.s32", &[&q, &b.s]);
                return ranged(self.t.def(ty, "sub.s32", &[&a.s, &back]), lo, hi);
            }
            if k > 0 && a.lo >= 0 {
                let name = if quotient { "div" } else { "rem" };
                let s = self.t.def(ty, &format!("{name}.u{w}"), &[&a.s, &b.s]);
                return ranged(s, lo, hi);
            }
            return ranged(self.floor_divide(quotient, ty, w, &a.s, &b.s), lo, hi);
        }
        let x = if a.int_const().is_some() { self.in_reg(a) } else { a.s.clone() };
        if a.lo >= 0 && b.lo >= 0 {
            let name = if quotient { "div" } else { "rem" };
            let s = self.t.def(ty, &format!("{name}.u{w}"), &[&x, &b.s]);
            if b.lo > 0 {
                return ranged(s, 0, a.hi);
            }
            let zero = self.t.def(Ty::Pred, &format!("setp.eq.s{w}"), &[&b.s, "0"]);
            return ranged(self.t.def(ty, &format!("selp.b{w}"), &["0", &s, &zero]), 0, a.hi);
        }
        let s = self.floor_divide(quotient, ty, w, &x, &b.s);
        let zero = self.t.def(Ty::Pred, &format!("setp.eq.s{w}"), &[&b.s, "0"]);
        Val::reg(ty, self.t.def(ty, &format!("selp.b{w}"), &["0", &s, &zero]))
    }

    /// Floor division (or its remainder) from the truncating one.
    fn floor_divide(&mut self, quotient: bool, ty: Ty, w: &str, a: &str, b: &str) -> String {
        let q = self.t.def(ty, &format!("div.s{w}"), &[a, b]);
        let back = self.t.def(ty, &format!("mul.lo.s{w}"), &[&q, b]);
        let r = self.t.def(ty, &format!("sub.s{w}"), &[a, &back]);
        let nonzero = self.t.def(Ty::Pred, &format!("setp.ne.s{w}"), &[&r, "0"]);
        let sign = self.t.def(ty, &format!("xor.b{w}"), &[&r, b]);
        let differ = self.t.def(Ty::Pred, &format!("setp.lt.s{w}"), &[&sign, "0"]);
        let wrong = self.t.def(Ty::Pred, "and.pred", &[&nonzero, &differ]);
        let (plain, fixed) = if quotient {
            let fixed = self.t.def(ty, &format!("sub.s{w}"), &[&q, "1"]);
            (q, fixed)
        } else {
            let fixed = self.t.def(ty, &format!("add.s{w}"), &[&r, b]);
            (r, fixed)
        };
        self.t.def(ty, &format!("selp.b{w}"), &[&fixed, &plain, &wrong])
    }

    pub(super) fn fma(&mut self, a: &Val, b: &Val, c: &Val) -> Val {
        let ty = [a, b, c].iter().fold(Ty::Pred, |t, v| Self::join(&Val::reg(t, String::new()), v));
        if !ty.is_float() {
            let p = self.mul(a, b);
            return self.add(&p, c);
        }
        let (a, b, c) = (self.to(a, ty), self.to(b, ty), self.to(c, ty));
        if let (Some(x), Some(y), Some(z)) = (a.k, b.k, c.k) {
            let v = x.mul_add(y, z);
            return if ty == Ty::F32 { Val::f32(v) } else { Val::f64(v) };
        }
        let name = if ty == Ty::F32 { "fma.rn.f32" } else { "fma.rn.f64" };
        Val::reg(ty, self.t.def(ty, name, &[&a.s, &b.s, &c.s]))
    }

    pub(super) fn select(&mut self, c: &Val, a: &Val, b: &Val) -> Val {
        let c = self.to(c, Ty::Pred);
        let ty = Self::join(a, b);
        let (a, b) = (self.to(a, ty), self.to(b, ty));
        match c.int_const() {
            Some(0) => return b,
            Some(_) => return a,
            None => {}
        }
        if a == b {
            return a;
        }
        let name = match ty {
            Ty::F32 => "selp.f32",
            Ty::F64 => "selp.f64",
            Ty::S64 => "selp.b64",
            Ty::S32 | Ty::Pred | Ty::B16 => "selp.b32",
        };
        let s = self.t.def(ty, name, &[&a.s, &b.s, &c.s]);
        Val { lo: a.lo.min(b.lo), hi: a.hi.max(b.hi), any: a.any || b.any, ..Val::reg(ty, s) }
    }
}
