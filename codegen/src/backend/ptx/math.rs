//! Scalar functions as short straight lines of instructions.
//!
//! Errors in ulps of f32: sqrt 0.5; recip 1; rsqrt 2; exp, exp2 2 where the result is kept in f32, else (a result
//! rounded to 16 bits at once, or `exp(a − b)` with b a row's) |x|·2⁻²³ + 2 in relative terms, below 1 ulp of 1 for
//! x ≤ 0; log, log2, log1p 3; tanh, erf 4; sigmoid 4, for negative x as `exp(a − b)`; sin, cos 3 (in f64). Subnormal results of exp are flushed to 0.
//! NaN is kept. Sources: exp by ex2.approx with a compensated product; log after Cephes `logf` (S. Moshier); erf after
//! N. Juffa's `erff`; sine and cosine by Cody–Waite reduction in f64.

use std::f64::consts::{FRAC_2_PI, FRAC_PI_2, LN_2, LOG2_E};

use einfall_ir::ops::UnaryOp;

use super::Res;
use super::emit::Emit;
use super::text::{Ty, Val};

impl Emit<'_> {
    /// `op(x)`; `coarse`: the result is rounded to 16 bits or fewer at once.
    pub(super) fn unary(&mut self, op: UnaryOp, x: &Val, coarse: bool) -> Res<Val> {
        use UnaryOp::*;
        if let Some(k) = x.k.filter(|_| x.ty.is_float()) {
            let v = op.eval(k);
            return Ok(match x.ty {
                _ if op == Not => Val::pred(v != 0.0),
                Ty::F64 => Val::f64(v),
                _ => Val::f32(v),
            });
        }
        match op {
            Not => {
                let p = self.to(x, Ty::Pred);
                return Ok(match p.int_const() {
                    Some(c) => Val::pred(c == 0),
                    None => Val::reg(Ty::Pred, self.t.def(Ty::Pred, "not.pred", &[&p.s])),
                });
            }
            Neg | Abs | Sign if !x.ty.is_float() => return self.integer_unary(op, x),
            _ => {}
        }
        if x.ty == Ty::F64 {
            return self.unary_f64(op, x);
        }
        let v = self.to(x, Ty::F32);
        let x = self.in_reg(&v);
        let s = match op {
            Neg => self.f1("neg.f32", &x),
            Abs => self.f1("abs.f32", &x),
            Exp if coarse => {
                let t = self.fmul(&x, LOG2_E);
                self.f1("ex2.approx.ftz.f32", &t)
            }
            Exp => self.exp_f32(&x),
            Exp2 => self.f1("ex2.approx.ftz.f32", &x),
            Log => self.log_f32(&x, false),
            Log2 => self.log_f32(&x, true),
            Log1p => self.log1p_f32(&x),
            Sqrt => self.f1("sqrt.rn.f32", &x),
            Rsqrt => self.f1("rsqrt.approx.f32", &x),
            Recip => self.f1("rcp.rn.f32", &x),
            Sin | Cos => self.sin_cos(&x, op == Cos),
            Tanh => self.tanh_f32(&x, coarse),
            Sigmoid => self.sigmoid_f32(&x),
            Erf => self.erf_f32(&x),
            Floor => self.f1("cvt.rmi.f32.f32", &x),
            Ceil => self.f1("cvt.rpi.f32.f32", &x),
            Round => self.f1("cvt.rni.f32.f32", &x),
            Sign => self.sign_f32(&x),
            Not => unreachable!("handled above"),
        };
        Ok(Val::reg(Ty::F32, s))
    }

    fn integer_unary(&mut self, op: UnaryOp, x: &Val) -> Res<Val> {
        let x = if x.ty == Ty::Pred { self.to(x, Ty::S32) } else { x.clone() };
        let zero = Val::int(0);
        match op {
            UnaryOp::Neg => Ok(self.sub(&zero, &x)),
            UnaryOp::Abs => {
                let n = self.sub(&zero, &x);
                self.bin(einfall_ir::ops::BinaryOp::Max, &x, &n)
            }
            _ => {
                let low = self.bin(einfall_ir::ops::BinaryOp::Max, &x, &Val::int(-1))?;
                self.bin(einfall_ir::ops::BinaryOp::Min, &low, &Val::int(1))
            }
        }
    }

    fn unary_f64(&mut self, op: UnaryOp, x: &Val) -> Res<Val> {
        use UnaryOp::*;
        let name = match op {
            Neg => "neg.f64",
            Abs => "abs.f64",
            Sqrt => return self.sqrt(x),
            Recip => "rcp.rn.f64",
            Floor => "cvt.rmi.f64.f64",
            Ceil => "cvt.rpi.f64.f64",
            Round => "cvt.rni.f64.f64",
            Exp | Exp2 | Log | Log2 | Log1p | Rsqrt | Sin | Cos | Tanh | Sigmoid | Erf | Sign | Not => {
                return Err(self.fail(&format!("`{}` in f64", op.name())));
            }
        };
        Ok(Val::reg(Ty::F64, self.t.def(Ty::F64, name, &[&x.s])))
    }

    /// Philox4x32-10 (Salmon et al., SC 2011), keyed by a seed, at four coordinates: the top 24 bits of the first word, in
    /// [0,1).
    pub(super) fn random(&mut self, of: &[Val]) -> Val {
        let mut words = Vec::new();
        for v in of {
            let v = if v.ty == Ty::S64 { v.clone() } else { self.to(v, Ty::S32) };
            let s = self.in_reg(&v);
            let low = if v.ty == Ty::S64 { self.t.def(Ty::S32, "cvt.u32.u64", &[&s]) } else { s.clone() };
            words.push((low, v.ty, s));
        }
        let (low, ty, seed) = words.remove(0);
        let high = if ty == Ty::S64 {
            let high = self.t.def(Ty::S64, "shr.u64", &[&seed, "32"]);
            self.t.def(Ty::S32, "cvt.u32.u64", &[&high])
        } else {
            self.t.def(Ty::S32, "shr.s32", &[&seed, "31"])
        };
        let (mut key, mut at) = ([low, high], words.into_iter().map(|w| w.0).collect::<Vec<_>>());
        let of_bits = |n: u32| n.cast_signed().to_string();
        for turn in 0..10 {
            let t = &mut self.t;
            let mut next = Vec::new();
            for (from, by, with, k) in [(2, 0xCD9E_8D57, 1, 0), (0, 0xD251_1F53, 3, 1)] {
                let high = t.def(Ty::S32, "mul.hi.u32", &[&at[from], &of_bits(by)]);
                let mixed = t.def(Ty::S32, "xor.b32", &[&high, &at[with]]);
                next.push(t.def(Ty::S32, "xor.b32", &[&mixed, &key[k]]));
                next.push(t.def(Ty::S32, "mul.lo.s32", &[&at[from], &of_bits(by)]));
            }
            at = next;
            if turn < 9 {
                for (k, by) in key.iter_mut().zip([0x9E37_79B9, 0xBB67_AE85]) {
                    *k = t.def(Ty::S32, "add.s32", &[&*k, &of_bits(by)]);
                }
            }
        }
        let top = self.t.def(Ty::S32, "shr.u32", &[&at[0], "8"]);
        let top = self.t.def(Ty::F32, "cvt.rn.f32.s32", &[&top]);
        Val::reg(Ty::F32, self.fmul(&top, 1.0 / 16_777_216.0))
    }

    pub(super) fn sqrt(&mut self, x: &Val) -> Res<Val> {
        let (ty, name) = if x.ty == Ty::F64 { (Ty::F64, "sqrt.rn.f64") } else { (Ty::F32, "sqrt.rn.f32") };
        let x = self.to(x, ty);
        Ok(Val::reg(ty, self.t.def(ty, name, &[&x.s])))
    }

    fn f1(&mut self, op: &str, x: &str) -> String {
        self.t.def(Ty::F32, op, &[x])
    }

    fn fmul(&mut self, x: &str, k: f64) -> String {
        self.t.def(Ty::F32, "mul.f32", &[x, &Val::f32(k).s])
    }

    fn ffma(&mut self, a: &str, b: &str, c: &str) -> String {
        self.t.def(Ty::F32, "fma.rn.f32", &[a, b, c])
    }

    fn f(&self, k: f64) -> String {
        Val::f32(k).s
    }

    /// Σ cᵢ xⁱ by Horner's rule, highest coefficient first.
    fn poly(&mut self, x: &str, coefs: &[f64]) -> String {
        let first = self.f(coefs[0]);
        let mut p = self.t.def(Ty::F32, "mov.f32", &[&first]);
        for &c in &coefs[1..] {
            let c = self.f(c);
            p = self.ffma(&p, x, &c);
        }
        p
    }

    /// ex2(t)·(1 + e·ln2) with t + e = x·log₂e, where that is finite.
    fn exp_f32(&mut self, x: &str) -> String {
        let t = self.fmul(x, LOG2_E);
        let y = self.f1("ex2.approx.ftz.f32", &t);
        let n = self.f1("neg.f32", &t);
        let (hi, lo) = (self.f(LOG2_E), self.f(LOG2_E - f64::from(LOG2_E as f32)));
        let e = self.ffma(x, &hi, &n);
        let e = self.ffma(x, &lo, &e);
        let e = self.fmul(&e, LN_2);
        let z = self.ffma(&y, &e, &y);
        // Beyond, y is 0 or ∞ already, and e may be NaN.
        let a = self.f1("abs.f32", &t);
        let p = self.t.def(Ty::Pred, "setp.lt.f32", &[&a, &self.f(127.0)]);
        self.t.def(Ty::F32, "selp.f32", &[&z, &y, &p])
    }

    /// Log of x, natural or to the base 2.
    fn log_f32(&mut self, x: &str, two: bool) -> String {
        let sub = self.t.def(Ty::Pred, "setp.lt.f32", &[x, &self.f(f64::from(f32::MIN_POSITIVE))]);
        let up = self.fmul(x, 8_388_608.0);
        let s = self.t.def(Ty::F32, "selp.f32", &[&up, x, &sub]);
        let e0 = self.t.def(Ty::F32, "selp.f32", &[&self.f(-23.0), &self.f(0.0), &sub]);
        let b = self.t.def(Ty::S32, "mov.b32", &[&s]);
        // Exponent and mantissa about √½: subtracting its bits moves the cut.
        let d = self.t.def(Ty::S32, "sub.s32", &[&b, "0x3F3504F3"]);
        let e = self.t.def(Ty::S32, "shr.s32", &[&d, "23"]);
        let low = self.t.def(Ty::S32, "and.b32", &[&d, "0x7FFFFF"]);
        let m = self.t.def(Ty::S32, "add.s32", &[&low, "0x3F3504F3"]);
        let m = self.t.def(Ty::F32, "mov.b32", &[&m]);
        let e = self.t.def(Ty::F32, "cvt.rn.f32.s32", &[&e]);
        let e = self.t.def(Ty::F32, "add.f32", &[&e, &e0]);
        let m = self.t.def(Ty::F32, "add.f32", &[&m, &self.f(-1.0)]);
        let p = self.poly(
            &m,
            &[
                7.037_683_6e-2,
                -1.151_461e-1,
                1.167_699_9e-1,
                -1.242_014_1e-1,
                1.424_932_3e-1,
                -1.666_805_8e-1,
                2.000_071_5e-1,
                -2.499_999_4e-1,
                3.333_333_1e-1,
            ],
        );
        let m2 = self.t.def(Ty::F32, "mul.rn.f32", &[&m, &m]);
        let m3 = self.t.def(Ty::F32, "mul.rn.f32", &[&m2, &m]);
        let tail = self.t.def(Ty::F32, "mul.rn.f32", &[&p, &m3]);
        let half = self.f(-0.5);
        let y = if two {
            let y = self.ffma(&m2, &half, &tail);
            let k = self.f(LOG2_E - 1.0);
            let s = self.t.def(Ty::F32, "mul.rn.f32", &[&y, &k]);
            let s = self.ffma(&m, &k, &s);
            let s = self.t.def(Ty::F32, "add.rn.f32", &[&s, &y]);
            let s = self.t.def(Ty::F32, "add.rn.f32", &[&s, &m]);
            self.t.def(Ty::F32, "add.rn.f32", &[&s, &e])
        } else {
            let (lo, hi) = (self.f(-2.121_944_4e-4), self.f(0.693_359_375));
            let y = self.ffma(&e, &lo, &tail);
            let y = self.ffma(&m2, &half, &y);
            let y = self.t.def(Ty::F32, "add.rn.f32", &[&m, &y]);
            self.ffma(&e, &hi, &y)
        };
        // −∞ at 0, NaN below; ∞ and NaN stay.
        let finite = self.t.def(Ty::Pred, "setp.lt.f32", &[x, &self.f(f64::INFINITY)]);
        let y = self.t.def(Ty::F32, "selp.f32", &[&y, x, &finite]);
        let positive = self.t.def(Ty::Pred, "setp.leu.f32", &[x, &self.f(0.0)]);
        let edge = self.f1("lg2.approx.f32", x);
        self.t.def(Ty::F32, "selp.f32", &[&edge, &y, &positive])
    }

    /// log(u)·x/(u−1) with u = 1 + x, which corrects the rounding of 1 + x (W. Kahan).
    fn log1p_f32(&mut self, x: &str) -> String {
        let u = self.t.def(Ty::F32, "add.rn.f32", &[x, &self.f(1.0)]);
        let d = self.t.def(Ty::F32, "add.rn.f32", &[&u, &self.f(-1.0)]);
        let l = self.log_f32(&u, false);
        let q = self.t.def(Ty::F32, "div.full.f32", &[x, &d]);
        let y = self.t.def(Ty::F32, "mul.rn.f32", &[&l, &q]);
        let same = self.t.def(Ty::Pred, "setp.eq.f32", &[&u, &self.f(1.0)]);
        let y = self.t.def(Ty::F32, "selp.f32", &[x, &y, &same]);
        // u ≤ 0, ∞ and NaN: the logarithm itself.
        let inside = self.t.def(Ty::Pred, "setp.gt.f32", &[&u, &self.f(0.0)]);
        let finite = self.t.def(Ty::Pred, "setp.lt.f32", &[&u, &self.f(f64::INFINITY)]);
        let both = self.t.def(Ty::Pred, "and.pred", &[&inside, &finite]);
        self.t.def(Ty::F32, "selp.f32", &[&y, &l, &both])
    }

    fn recip_1p(&mut self, e: &str) -> String {
        let d = self.t.def(Ty::F32, "add.f32", &[e, &self.f(1.0)]);
        self.f1("rcp.approx.ftz.f32", &d)
    }

    /// 1/(1 + e^−|x|), times e^−|x| for negative x.
    fn sigmoid_f32(&mut self, x: &str) -> String {
        let a = self.f1("abs.f32", x);
        let t = self.fmul(&a, -LOG2_E);
        let e = self.f1("ex2.approx.ftz.f32", &t);
        let r = self.recip_1p(&e);
        let p = self.t.def(Ty::Pred, "setp.ge.f32", &[x, &self.f(0.0)]);
        let n = self.t.def(Ty::F32, "mul.f32", &[&e, &r]);
        let y = self.t.def(Ty::F32, "selp.f32", &[&r, &n, &p]);
        let nan = self.t.def(Ty::Pred, "setp.nan.f32", &[x, x]);
        self.t.def(Ty::F32, "selp.f32", &[x, &y, &nan])
    }

    /// 1 − 2/(1 + e^2|x|) with the sign of x; an odd polynomial below 0.625.
    fn tanh_f32(&mut self, x: &str, coarse: bool) -> String {
        let a = self.f1("abs.f32", x);
        let t = self.fmul(&a, 2.0 * LOG2_E);
        let e = self.f1("ex2.approx.ftz.f32", &t);
        let r = self.recip_1p(&e);
        let two = self.f(-2.0);
        let one = self.f(1.0);
        let large = self.ffma(&r, &two, &one);
        let large = self.t.def(Ty::F32, "copysign.f32", &[x, &large]);
        let s = self.t.def(Ty::F32, "mul.f32", &[x, x]);
        let coefs: &[f64] = if coarse {
            &[2.063_908_9e-2, -5.373_971_5e-2, 1.333_144_3e-1, -3.333_328e-1]
        } else {
            &[-5.704_988_7e-3, 2.063_908_9e-2, -5.373_971_5e-2, 1.333_144_3e-1, -3.333_328e-1]
        };
        let p = self.poly(&s, coefs);
        let ps = self.t.def(Ty::F32, "mul.f32", &[&p, &s]);
        let small = self.ffma(&ps, x, x);
        let cut = if coarse { 0.5 } else { 0.625 };
        let p = self.t.def(Ty::Pred, "setp.ltu.f32", &[&a, &self.f(cut)]);
        self.t.def(Ty::F32, "selp.f32", &[&small, &large, &p])
    }

    fn erf_f32(&mut self, x: &str) -> String {
        let a = self.f1("abs.f32", x);
        // erf rounds to 1 from 3.92 on.
        let t = self.t.def(Ty::F32, "min.NaN.f32", &[&a, &self.f(4.0)]);
        let s = self.t.def(Ty::F32, "mul.f32", &[&t, &t]);
        let r = self.poly(&t, &[-1.728_534_7e-5, 3.831_971_3e-4]);
        let u = self.poly(&t, &[-3.883_964_4e-3, 2.425_462_2e-2]);
        let mut r = self.ffma(&r, &s, &u);
        for k in [-1.067_778_8e-1, -6.348_467e-1, -1.287_175_1e-1] {
            let k = self.f(k);
            r = self.ffma(&r, &t, &k);
        }
        let nt = self.f1("neg.f32", &t);
        let r = self.ffma(&r, &t, &nt);
        let r = self.fmul(&r, LOG2_E);
        let e = self.f1("ex2.approx.ftz.f32", &r);
        let large = self.t.def(Ty::F32, "sub.f32", &[&self.f(1.0), &e]);
        let large = self.t.def(Ty::F32, "copysign.f32", &[x, &large]);
        let p = self.poly(
            &s,
            &[-5.967_617e-4, 4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_3e-1, -3.761_253_4e-1, 1.283_791_7e-1],
        );
        let small = self.ffma(&p, x, x);
        let p = self.t.def(Ty::Pred, "setp.gt.f32", &[&a, &self.f(0.927_734_375)]);
        self.t.def(Ty::F32, "selp.f32", &[&large, &small, &p])
    }

    fn sign_f32(&mut self, x: &str) -> String {
        let s = self.t.def(Ty::F32, "copysign.f32", &[x, &self.f(1.0)]);
        let zero = self.t.def(Ty::Pred, "setp.ne.f32", &[x, &self.f(0.0)]);
        self.t.def(Ty::F32, "selp.f32", &[&s, x, &zero])
    }

    /// x^y = ex2(y·log₂|x|), negative for odd y and negative x; NaN for negative x and other y.
    pub(super) fn pow_f32(&mut self, x: &Val, y: &Val) -> Res<Val> {
        let (x, y) = (self.in_reg(x), self.in_reg(y));
        let f64_of = |e: &mut Self, v: &str| e.t.def(Ty::F64, "cvt.f64.f32", &[v]);
        let a = self.f1("abs.f32", &x);
        // log₂ a = e + log₂ m, the product with y in f64: the error of y·log₂ a stays below 2⁻³⁰ of y·log₂ m.
        let l = self.log_f32(&a, true);
        let (l, yd) = (f64_of(self, &l), f64_of(self, &y));
        let p = self.t.def(Ty::F64, "mul.rn.f64", &[&l, &yd]);
        let n = self.t.def(Ty::F64, "cvt.rni.f64.f64", &[&p]);
        let r = self.t.def(Ty::F64, "sub.f64", &[&p, &n]);
        let (n, r) = (self.t.def(Ty::F32, "cvt.rn.f32.f64", &[&n]), self.t.def(Ty::F32, "cvt.rn.f32.f64", &[&r]));
        let (n, r) = (self.f1("ex2.approx.f32", &n), self.f1("ex2.approx.f32", &r));
        let v = self.t.def(Ty::F32, "mul.f32", &[&n, &r]);
        let whole = self.f1("cvt.rni.f32.f32", &y);
        let is_whole = self.t.def(Ty::Pred, "setp.eq.f32", &[&whole, &y]);
        let h = self.fmul(&y, 0.5);
        let hw = self.f1("cvt.rni.f32.f32", &h);
        let odd = self.t.def(Ty::Pred, "setp.ne.f32", &[&hw, &h]);
        let negative = self.t.def(Ty::Pred, "setp.lt.f32", &[&x, &self.f(0.0)]);
        let nv = self.f1("neg.f32", &v);
        let signed = self.t.def(Ty::F32, "selp.f32", &[&nv, &v, &odd]);
        let nan = self.f(f64::NAN);
        let below = self.t.def(Ty::F32, "selp.f32", &[&signed, &nan, &is_whole]);
        let v = self.t.def(Ty::F32, "selp.f32", &[&below, &v, &negative]);
        let zero = self.t.def(Ty::Pred, "setp.eq.f32", &[&y, &self.f(0.0)]);
        Ok(Val::reg(Ty::F32, self.t.def(Ty::F32, "selp.f32", &[&self.f(1.0), &v, &zero])))
    }

    /// Sine or cosine by reduction to [−π/4, π/4] in f64.
    fn sin_cos(&mut self, x: &str, cosine: bool) -> String {
        let d = |k: f64| Val::f64(k).s;
        let xd = self.t.def(Ty::F64, "cvt.f64.f32", &[x]);
        let q = self.t.def(Ty::F64, "mul.f64", &[&xd, &d(FRAC_2_PI)]);
        let n = self.t.def(Ty::F64, "cvt.rni.f64.f64", &[&q]);
        let r = self.t.def(Ty::F64, "fma.rn.f64", &[&n, &d(-FRAC_PI_2), &xd]);
        let r = self.t.def(Ty::F64, "fma.rn.f64", &[&n, &d(-6.123_233_995_736_766e-17), &r]);
        let quadrant = self.t.def(Ty::S64, "cvt.rzi.s64.f64", &[&n]);
        let quadrant = self.t.def(Ty::S32, "cvt.u32.u64", &[&quadrant]);
        let quadrant = if cosine { self.t.def(Ty::S32, "add.s32", &[&quadrant, "1"]) } else { quadrant };
        let s2 = self.t.def(Ty::F64, "mul.f64", &[&r, &r]);
        let horner = |e: &mut Self, coefs: &[f64]| {
            let mut p = e.t.def(Ty::F64, "mov.f64", &[&d(coefs[0])]);
            for &c in &coefs[1..] {
                p = e.t.def(Ty::F64, "fma.rn.f64", &[&p, &s2, &d(c)]);
            }
            p
        };
        let ps = horner(self, &[2.755_731_9e-6, -1.984_126_98e-4, 8.333_333_333e-3, -0.166_666_666_666_666_66, 1.0]);
        let ps = self.t.def(Ty::F64, "mul.f64", &[&ps, &r]);
        let pc = horner(self, &[2.480_158_73e-5, -1.388_888_888_9e-3, 4.166_666_666_666e-2, -0.5, 1.0]);
        let ps = self.t.def(Ty::F32, "cvt.rn.f32.f64", &[&ps]);
        let pc = self.t.def(Ty::F32, "cvt.rn.f32.f64", &[&pc]);
        let odd = self.t.def(Ty::S32, "and.b32", &[&quadrant, "1"]);
        let odd = self.t.def(Ty::Pred, "setp.ne.s32", &[&odd, "0"]);
        let y = self.t.def(Ty::F32, "selp.f32", &[&pc, &ps, &odd]);
        // Quadrants 2 and 3 change the sign.
        let sign = self.t.def(Ty::S32, "and.b32", &[&quadrant, "2"]);
        let sign = self.t.def(Ty::S32, "shl.b32", &[&sign, "30"]);
        let bits = self.t.def(Ty::S32, "mov.b32", &[&y]);
        let bits = self.t.def(Ty::S32, "xor.b32", &[&bits, &sign]);
        self.t.def(Ty::F32, "mov.b32", &[&bits])
    }
}
