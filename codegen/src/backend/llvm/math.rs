//! Scalar functions of f32 expanded into basic vector instructions: no calls, no scalar loops.
//!
//! Invariant: each expansion stays within [`einfall_ir::ops::UnaryOp::ulps`] over the whole range of f32 (sine and cosine: up to
//! 2⁴⁵), keeps NaN, and runs in the lanes it is given. Sources: exp and log after Cephes `expf`, `logf` (S. Moshier);
//! erf after N. Juffa's `erff` (two fused polynomials); sine and cosine by Cody–Waite reduction in f64.

use einfall_ir::dtype::DType;

use super::value::{Text, Ty, float_text};

/// An 8-bit float type (Micikevicius et al., arXiv 2209.05433).
pub(super) struct F8 {
    mantissa: i64,
    bias: i32,
    largest: f64,
    /// Whether there are infinities; without, what is too large becomes the largest number.
    infinite: bool,
    /// The lowest code without sign that is no number.
    special: i64,
}

impl F8 {
    const E4M3: F8 = F8 { mantissa: 3, bias: 7, largest: 448.0, infinite: false, special: 0x7f };
    const E5M2: F8 = F8 { mantissa: 2, bias: 15, largest: 57344.0, infinite: true, special: 0x7c };

    /// The one that `d` is.
    pub(super) fn of(d: DType) -> &'static F8 {
        if d == DType::F8E4M3 { &F8::E4M3 } else { &F8::E5M2 }
    }

    /// How far its lowest bit is above f32's.
    fn place(&self) -> i64 {
        23 - self.mantissa
    }

    fn smallest_normal(&self) -> f64 {
        2f64.powi(1 - self.bias)
    }

    fn smallest(&self) -> f64 {
        self.smallest_normal() * 2f64.powi(-(self.mantissa as i32))
    }
}

/// Types of the lanes an expansion works in: scalars or vectors.
pub(super) struct Lanes<'a> {
    pub(super) t: &'a mut Text,
    f: String,
    i: String,
    b: String,
    vector: bool,
    scalef: bool,
}

impl<'a> Lanes<'a> {
    pub(super) fn new(t: &'a mut Text, vector: bool, scalef: bool) -> Lanes<'a> {
        let pick = |t: &Text, e: &str| if vector { t.vec(e) } else { e.to_string() };
        let (f, i, b) = (pick(t, "float"), pick(t, "i32"), pick(t, "i1"));
        let scalef = scalef && vector && t.lanes == 16;
        Lanes { t, f, i, b, vector, scalef }
    }

    fn suffix(&self, elem: &str) -> String {
        if self.vector { format!("v{}{elem}", self.t.lanes) } else { elem.to_string() }
    }

    fn konst(&self, elem: &str, v: &str) -> String {
        if self.vector { self.t.splat_const(elem, v) } else { v.to_string() }
    }

    /// A float constant.
    fn c(&self, v: f64) -> String {
        self.konst("float", &float_text(Ty::F32, v))
    }

    /// An i32 constant.
    fn ci(&self, v: i64) -> String {
        self.konst("i32", &(v as i32).to_string())
    }

    fn bin(&mut self, op: &str, a: &str, b: &str) -> String {
        self.t.def(&format!("{op} {} {a}, {b}", self.f))
    }

    fn ibin(&mut self, op: &str, a: &str, b: &str) -> String {
        self.t.def(&format!("{op} {} {a}, {b}", self.i))
    }

    fn add(&mut self, a: &str, b: &str) -> String {
        self.bin("fadd", a, b)
    }

    fn sub(&mut self, a: &str, b: &str) -> String {
        self.bin("fsub", a, b)
    }

    fn mul(&mut self, a: &str, b: &str) -> String {
        self.bin("fmul", a, b)
    }

    fn div(&mut self, a: &str, b: &str) -> String {
        self.bin("fdiv", a, b)
    }

    fn fma(&mut self, a: &str, b: &str, c: &str) -> String {
        let (f, name) = (self.f.clone(), format!("llvm.fma.{}", self.suffix("f32")));
        self.t.call(&f, &name, &[(&f, a), (&f, b), (&f, c)])
    }

    fn intrinsic(&mut self, name: &str, a: &str) -> String {
        let (f, name) = (self.f.clone(), format!("llvm.{name}.{}", self.suffix("f32")));
        self.t.call(&f, &name, &[(&f, a)])
    }

    fn cmp(&mut self, pred: &str, a: &str, b: &str) -> String {
        self.t.def(&format!("fcmp {pred} {} {a}, {b}", self.f))
    }

    fn select(&mut self, c: &str, a: &str, b: &str) -> String {
        self.t.def(&format!("select {} {c}, {} {a}, {} {b}", self.b, self.f, self.f))
    }

    fn bits(&mut self, a: &str) -> String {
        self.t.def(&format!("bitcast {} {a} to {}", self.f, self.i))
    }

    fn float_of_bits(&mut self, a: &str) -> String {
        self.t.def(&format!("bitcast {} {a} to {}", self.i, self.f))
    }

    fn copysign(&mut self, mag: &str, sign: &str) -> String {
        let (f, name) = (self.f.clone(), format!("llvm.copysign.{}", self.suffix("f32")));
        self.t.call(&f, &name, &[(&f, mag), (&f, sign)])
    }

    /// Σ cᵢ xⁱ by Horner's rule, highest coefficient first.
    fn poly(&mut self, x: &str, coefs: &[f64]) -> String {
        let mut p = self.c(coefs[0]);
        for &k in &coefs[1..] {
            let k = self.c(k);
            p = self.fma(&p, x, &k);
        }
        p
    }

    /// `x` limited to `lo ..= hi`; NaN stays.
    fn clamp(&mut self, x: &str, lo: f64, hi: f64) -> String {
        let (lo, hi) = (self.c(lo), self.c(hi));
        let c = self.cmp("ogt", &lo, x);
        let x = self.select(&c, &lo, x);
        let c = self.cmp("olt", &hi, &x);
        self.select(&c, &hi, &x)
    }

    /// e^r · 2^n for |r| ≤ ln2/2 and integral n within ±160.
    fn exp_scaled(&mut self, r: &str, n: &str) -> String {
        let p = self
            .poly(r, &[1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_1e-1]);
        let r2 = self.mul(r, r);
        let q = self.fma(&p, &r2, r);
        let one = self.c(1.0);
        let p = self.add(&q, &one);
        if self.scalef {
            let f = self.f.clone();
            return self.t.call(
                &f,
                "llvm.x86.avx512.mask.scalef.ps.512",
                &[(&f, &p), (&f, n), (&f, "zeroinitializer"), ("i16", "-1"), ("i32", "4")],
            );
        }
        // Two factors 2^(n/2), each a normal number. NaN converts to any integer: the product stays NaN.
        let to_int = format!("llvm.fptosi.sat.{}.{}", self.suffix("i32"), self.suffix("f32"));
        let (f, i) = (self.f.clone(), self.i.clone());
        let k = self.t.call(&i, &to_int, &[(&f, n)]);
        let one = self.ci(1);
        let k1 = self.ibin("ashr", &k, &one);
        let k2 = self.ibin("sub", &k, &k1);
        let mut v = p;
        for k in [k1, k2] {
            let bias = self.ci(127);
            let e = self.ibin("add", &k, &bias);
            let shift = self.ci(23);
            let bits = self.ibin("shl", &e, &shift);
            let s = self.float_of_bits(&bits);
            v = self.mul(&v, &s);
        }
        v
    }

    pub(super) fn exp(&mut self, x: &str) -> String {
        // Beyond these e^x is 0 or ∞ in f32.
        let x = self.clamp(x, -105.0, 90.0);
        let k = self.c(std::f64::consts::LOG2_E);
        let t = self.mul(&x, &k);
        let n = self.intrinsic("rint", &t);
        let hi = self.c(-0.693_359_375);
        let lo = self.c(2.121_944_4e-4);
        let r = self.fma(&n, &hi, &x);
        let r = self.fma(&n, &lo, &r);
        self.exp_scaled(&r, &n)
    }

    pub(super) fn exp2(&mut self, x: &str) -> String {
        if self.scalef {
            return self.exp2_scaled(x);
        }
        let x = self.clamp(x, -151.0, 129.0);
        let n = self.intrinsic("rint", &x);
        let r = self.sub(&x, &n);
        let ln2 = self.c(std::f64::consts::LN_2);
        let r = self.mul(&r, &ln2);
        self.exp_scaled(&r, &n)
    }

    /// 2^x by AVX-512's own steps: the difference to the nearest integer (0 for an infinity), a polynomial of least greatest
    /// relative error (5·10⁻⁹ before rounding) on it, and a scaling that ends in 0 and ∞ where it must.
    fn exp2_scaled(&mut self, x: &str) -> String {
        let f = self.f.clone();
        let whole = [(f.as_str(), "zeroinitializer"), ("i16", "-1"), ("i32", "4")];
        let nearest = [(f.as_str(), x), ("i32", "8")];
        let r = self.t.call(&f, "llvm.x86.avx512.mask.reduce.ps.512", &[&nearest[..], &whole[..]].concat());
        let n = self.sub(x, &r);
        let q = self
            .poly(&r, &[1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1]);
        let one = self.c(1.0);
        let p = self.fma(&q, &r, &one);
        let scaled = [(f.as_str(), p.as_str()), (f.as_str(), n.as_str())];
        self.t.call(&f, "llvm.x86.avx512.mask.scalef.ps.512", &[&scaled[..], &whole[..]].concat())
    }

    /// `(e, m, log m - m + m²/2 …)`: the exponent, `m − 1` in [√½−1, √2−1] and the cubic tail of log(1 + (m−1)).
    fn log_parts(&mut self, x: &str) -> (String, String, String) {
        let tiny = self.c(f32::MIN_POSITIVE as f64);
        let sub = self.cmp("olt", x, &tiny);
        let up = self.c(8_388_608.0);
        let scaled = self.mul(x, &up);
        let x = self.select(&sub, &scaled, x);
        let (bias_sub, bias) = (self.c(-23.0), self.c(0.0));
        let e0 = self.select(&sub, &bias_sub, &bias);
        // Exponent and mantissa about √½: subtracting its bits moves the cut.
        let b = self.bits(&x);
        let cut = self.ci(0x3f35_04f3);
        let d = self.ibin("sub", &b, &cut);
        let shift = self.ci(23);
        let e = self.ibin("ashr", &d, &shift);
        let mask = self.ci(0x007f_ffff);
        let low = self.ibin("and", &d, &mask);
        let mbits = self.ibin("add", &low, &cut);
        let m = self.float_of_bits(&mbits);
        let e = self.t.def(&format!("sitofp {} {e} to {}", self.i, self.f));
        let e = self.add(&e, &e0);
        let one = self.c(1.0);
        let m = self.sub(&m, &one);
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
        let m2 = self.mul(&m, &m);
        let m3 = self.mul(&m2, &m);
        let tail = self.mul(&p, &m3);
        (e, m, tail)
    }

    /// Puts −∞ at 0, NaN below, and keeps ∞ and NaN.
    fn log_edges(&mut self, x: &str, y: &str) -> String {
        let zero = self.c(0.0);
        let inf = self.c(f64::INFINITY);
        let c = self.cmp("olt", x, &inf);
        let y = self.select(&c, y, x);
        let c = self.cmp("oeq", x, &zero);
        let ninf = self.c(f64::NEG_INFINITY);
        let y = self.select(&c, &ninf, &y);
        let c = self.cmp("olt", x, &zero);
        let nan = self.c(f64::NAN);
        self.select(&c, &nan, &y)
    }

    pub(super) fn log(&mut self, x: &str) -> String {
        let (e, m, tail) = self.log_parts(x);
        let lo = self.c(-2.121_944_4e-4);
        let y = self.fma(&e, &lo, &tail);
        let m2 = self.mul(&m, &m);
        let half = self.c(-0.5);
        let y = self.fma(&m2, &half, &y);
        let y = self.add(&m, &y);
        let hi = self.c(0.693_359_375);
        let y = self.fma(&e, &hi, &y);
        self.log_edges(x, &y)
    }

    pub(super) fn log2(&mut self, x: &str) -> String {
        let (e, m, tail) = self.log_parts(x);
        let m2 = self.mul(&m, &m);
        let half = self.c(-0.5);
        let y = self.fma(&m2, &half, &tail);
        // (m + y)·log2 e with log2 e = 1 + 0.4427: the leading term stays exact.
        let k = self.c(std::f64::consts::LOG2_E - 1.0);
        let s = self.mul(&y, &k);
        let s = self.fma(&m, &k, &s);
        let s = self.add(&s, &y);
        let s = self.add(&s, &m);
        let y = self.add(&s, &e);
        self.log_edges(x, &y)
    }

    pub(super) fn log1p(&mut self, x: &str) -> String {
        let one = self.c(1.0);
        let u = self.add(x, &one);
        let d = self.sub(&u, &one);
        let l = self.log(&u);
        // log(u)·x/(u−1) corrects the rounding of 1 + x (W. Kahan).
        let q = self.div(x, &d);
        let y = self.mul(&l, &q);
        let c = self.cmp("oeq", &u, &one);
        let y = self.select(&c, x, &y);
        let inf = self.c(f64::INFINITY);
        let c = self.cmp("oeq", &u, &inf);
        let y = self.select(&c, &l, &y);
        // u = 0 and u < 0.
        let zero = self.c(0.0);
        let c = self.cmp("ogt", &u, &zero);
        let y2 = self.select(&c, &y, &l);
        let c = self.cmp("uno", x, x);
        self.select(&c, x, &y2)
    }

    pub(super) fn sigmoid(&mut self, x: &str) -> String {
        let a = self.intrinsic("fabs", x);
        let n = self.t.def(&format!("fneg {} {a}", self.f));
        let e = self.exp(&n);
        let one = self.c(1.0);
        let d = self.add(&e, &one);
        let zero = self.c(0.0);
        let c = self.cmp("oge", x, &zero);
        let num = self.select(&c, &one, &e);
        self.div(&num, &d)
    }

    pub(super) fn tanh(&mut self, x: &str) -> String {
        let a = self.intrinsic("fabs", x);
        let two = self.c(2.0);
        let a2 = self.mul(&a, &two);
        let e = self.exp(&a2);
        let one = self.c(1.0);
        let d = self.add(&e, &one);
        let q = self.div(&two, &d);
        let large = self.sub(&one, &q);
        let large = self.copysign(&large, x);
        let s = self.mul(x, x);
        let p = self.poly(&s, &[-5.704_988_7e-3, 2.063_908_9e-2, -5.373_971_5e-2, 1.333_144_3e-1, -3.333_328e-1]);
        let ps = self.mul(&p, &s);
        let small = self.fma(&ps, x, x);
        let cut = self.c(0.625);
        let c = self.cmp("olt", &a, &cut);
        self.select(&c, &small, &large)
    }

    pub(super) fn erf(&mut self, x: &str) -> String {
        let a = self.intrinsic("fabs", x);
        // erf rounds to 1 from 3.92 on.
        let top = self.c(4.0);
        let c = self.cmp("ogt", &a, &top);
        let t = self.select(&c, &top, &a);
        let s = self.mul(&t, &t);
        let r = self.poly(&t, &[-1.728_534_7e-5, 3.831_971_3e-4]);
        let u = self.poly(&t, &[-3.883_964_4e-3, 2.425_462_2e-2]);
        let r = self.fma(&r, &s, &u);
        let mut r = r;
        for k in [-1.067_778_8e-1, -6.348_467e-1, -1.287_175_1e-1] {
            let k = self.c(k);
            r = self.fma(&r, &t, &k);
        }
        let nt = self.t.def(&format!("fneg {} {t}", self.f));
        let r = self.fma(&r, &t, &nt);
        let e = self.exp(&r);
        let one = self.c(1.0);
        let large = self.sub(&one, &e);
        let large = self.copysign(&large, x);
        let p = self.poly(
            &s,
            &[-5.967_617e-4, 4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_3e-1, -3.761_253_4e-1, 1.283_791_7e-1],
        );
        let small = self.fma(&p, x, x);
        let cut = self.c(0.927_734_375);
        let c = self.cmp("ogt", &a, &cut);
        self.select(&c, &large, &small)
    }

    /// Sine (or cosine) by reduction to [−π/4, π/4] in f64; 16 f32 lanes are two f64 registers.
    pub(super) fn sin_cos(&mut self, x: &str, cosine: bool) -> String {
        let d = if self.vector { self.t.vec("double") } else { "double".into() };
        let l = if self.vector { self.t.vec("i64") } else { "i64".into() };
        let sd = self.suffix("f64");
        let k = |s: &Self, v: f64| s.konst("double", &float_text(Ty::F64, v));
        let xd = self.t.def(&format!("fpext {} {x} to {d}", self.f));
        let two_over_pi = k(self, std::f64::consts::FRAC_2_PI);
        let q = self.t.def(&format!("fmul {d} {xd}, {two_over_pi}"));
        let n = self.t.call(&d, &format!("llvm.rint.{sd}"), &[(&d, &q)]);
        let fma = format!("llvm.fma.{sd}");
        let (hi, lo) = (k(self, -std::f64::consts::FRAC_PI_2), k(self, -6.123_233_995_736_766e-17));
        let r = self.t.call(&d, &fma, &[(&d, &n), (&d, &hi), (&d, &xd)]);
        let r = self.t.call(&d, &fma, &[(&d, &n), (&d, &lo), (&d, &r)]);
        let quadrant = self.t.call(&l, &format!("llvm.fptosi.sat.{}.{sd}", self.suffix("i64")), &[(&d, &n)]);
        let quadrant = self.t.def(&format!("trunc {l} {quadrant} to {}", self.i));
        let quadrant = if cosine {
            let one = self.ci(1);
            self.ibin("add", &quadrant, &one)
        } else {
            quadrant
        };
        let s2 = self.t.def(&format!("fmul {d} {r}, {r}"));
        let horner = |s: &mut Self, coefs: &[f64]| {
            let mut p = k(s, coefs[0]);
            for &c in &coefs[1..] {
                let c = k(s, c);
                p = s.t.call(&d, &fma, &[(&d, &p), (&d, &s2), (&d, &c)]);
            }
            p
        };
        let ps = horner(self, &[2.755_731_9e-6, -1.984_126_98e-4, 8.333_333_333e-3, -0.166_666_666_666_666_66, 1.0]);
        let ps = self.t.def(&format!("fmul {d} {ps}, {r}"));
        let pc = horner(self, &[2.480_158_73e-5, -1.388_888_888_9e-3, 4.166_666_666_666e-2, -0.5, 1.0]);
        let trunc = |s: &mut Self, v: &str| s.t.def(&format!("fptrunc {d} {v} to {}", s.f));
        let (ps, pc) = (trunc(self, &ps), trunc(self, &pc));
        let one = self.ci(1);
        let odd = self.ibin("and", &quadrant, &one);
        let zero = self.ci(0);
        let odd = self.t.def(&format!("icmp ne {} {odd}, {zero}", self.i));
        let y = self.select(&odd, &pc, &ps);
        // Quadrants 2 and 3 change the sign.
        let two = self.ci(2);
        let sign = self.ibin("and", &quadrant, &two);
        let shift = self.ci(30);
        let sign = self.ibin("shl", &sign, &shift);
        let yb = self.bits(&y);
        let yb = self.ibin("xor", &yb, &sign);
        let y = self.float_of_bits(&yb);
        // sin(±∞) is NaN: ∞ − ∞ already made r NaN. The sign of sin(−0) is kept by r.
        y
    }

    pub(super) fn rsqrt(&mut self, x: &str) -> String {
        let s = self.intrinsic("sqrt", x);
        let one = self.c(1.0);
        self.div(&one, &s)
    }

    pub(super) fn recip(&mut self, x: &str) -> String {
        let one = self.c(1.0);
        self.div(&one, x)
    }

    pub(super) fn sign(&mut self, x: &str) -> String {
        let one = self.c(1.0);
        let s = self.copysign(&one, x);
        let zero = self.c(0.0);
        let c = self.cmp("one", x, &zero);
        self.select(&c, &s, x)
    }

    /// An 8-bit float (`i8` lanes) as f32.
    pub(super) fn f8_value(&mut self, s: &str, kind: &F8) -> String {
        let (bytes, words) = (self.shape("i8"), self.i.clone());
        let x = self.t.def(&format!("zext {bytes} {s} to {words}"));
        let (low, place) = (self.ci(0x7f), self.ci(kind.place()));
        let magnitude = self.ibin("and", &x, &low);
        let bits = self.ibin("shl", &magnitude, &place);
        // The exponent's bias is f32's: what is missing is a factor, which is exact, for subnormal numbers too.
        let (f, factor) = (self.float_of_bits(&bits), self.c(2f64.powi(127 - kind.bias)));
        let f = self.mul(&f, &factor);
        let special = self.ci(kind.special);
        let pred = if kind.infinite { "uge" } else { "eq" };
        let is_special = self.t.def(&format!("icmp {pred} {words} {magnitude}, {special}"));
        let (nan, infinity) = (self.c(f64::NAN), self.c(f64::INFINITY));
        let instead = if kind.infinite {
            let infinite = self.t.def(&format!("icmp eq {words} {magnitude}, {special}"));
            self.select(&infinite, &infinity, &nan)
        } else {
            nan
        };
        let f = self.select(&is_special, &instead, &f);
        let shift = self.ci(24);
        let sign = self.ibin("shl", &x, &shift);
        let sign = self.float_of_bits(&sign);
        self.copysign(&f, &sign)
    }

    /// Rounds to an 8-bit float, as f32.
    pub(super) fn f8_round(&mut self, x: &str, kind: &F8) -> String {
        let a = self.intrinsic("fabs", x);
        let b = self.bits(&a);
        let (place, one) = (self.ci(kind.place()), self.ci(1));
        let odd = self.ibin("lshr", &b, &place);
        let odd = self.ibin("and", &odd, &one);
        let (half, keep) = (self.ci((1 << (kind.place() - 1)) - 1), self.ci(-(1 << kind.place())));
        let r = self.ibin("add", &b, &half);
        let r = self.ibin("add", &r, &odd);
        let r = self.ibin("and", &r, &keep);
        let normal = self.float_of_bits(&r);
        // Below the smallest normal number the distance of neighbours is constant.
        let (up, down) = (self.c(1.0 / kind.smallest()), self.c(kind.smallest()));
        let t = self.mul(&a, &up);
        let t = self.intrinsic("rint", &t);
        let t = self.mul(&t, &down);
        let limit = self.c(kind.smallest_normal());
        let small = self.cmp("olt", &a, &limit);
        let v = self.select(&small, &t, &normal);
        let (largest, over) = (self.c(kind.largest), self.c(if kind.infinite { f64::INFINITY } else { kind.largest }));
        let beyond = self.cmp("ogt", &v, &largest);
        let v = self.select(&beyond, &over, &v);
        let nan = self.cmp("uno", x, x);
        let v = self.select(&nan, x, &v);
        self.copysign(&v, x)
    }

    /// The bits of an 8-bit float (`i8` lanes) that `x` is the value of.
    pub(super) fn f8_bits(&mut self, x: &str, kind: &F8) -> String {
        let (bytes, words, floats) = (self.shape("i8"), self.i.clone(), self.f.clone());
        let a = self.intrinsic("fabs", x);
        // The factor f32 has too much, the other way round: exact, also where the result is subnormal.
        let factor = self.c(2f64.powi(kind.bias - 127));
        let scaled = self.mul(&a, &factor);
        let place = self.ci(kind.place());
        let b = self.bits(&scaled);
        let code = self.ibin("lshr", &b, &place);
        let special = self.ci(kind.special);
        let infinity = self.c(f64::INFINITY);
        let over = self.t.def(&format!("fcmp oeq {floats} {a}, {infinity}"));
        let code = self.t.def(&format!("select {} {over}, {words} {special}, {words} {code}", self.b));
        let nan_code = self.ci(if kind.infinite { kind.special + 2 } else { kind.special });
        let nan = self.cmp("uno", x, x);
        let code = self.t.def(&format!("select {} {nan}, {words} {nan_code}, {words} {code}", self.b));
        let b = self.bits(x);
        let (shift, mask) = (self.ci(24), self.ci(0x80));
        let sign = self.ibin("lshr", &b, &shift);
        let sign = self.ibin("and", &sign, &mask);
        let code = self.ibin("or", &code, &sign);
        self.t.def(&format!("trunc {words} {code} to {bytes}"))
    }

    fn shape(&self, elem: &str) -> String {
        if self.vector { self.t.vec(elem) } else { elem.to_string() }
    }

    /// Rounds to bf16 (ties to even) and returns the 16 bits; NaN stays NaN. `vcvtneps2bf16` would flush subnormals.
    pub(super) fn bf16_bits(&mut self, x: &str) -> String {
        let b = self.bits(x);
        let (c16, c1, c7fff) = (self.ci(16), self.ci(1), self.ci(0x7fff));
        let h = self.ibin("lshr", &b, &c16);
        let odd = self.ibin("and", &h, &c1);
        let r = self.ibin("add", &b, &c7fff);
        let r = self.ibin("add", &r, &odd);
        let quiet = self.ci(0x0040_0000);
        let q = self.ibin("or", &b, &quiet);
        let nan = self.cmp("uno", x, x);
        let r = self.t.def(&format!("select {} {nan}, {} {q}, {} {r}", self.b, self.i, self.i));
        let r = self.ibin("lshr", &r, &c16);
        let half = if self.vector { self.t.vec("i16") } else { "i16".into() };
        self.t.def(&format!("trunc {} {r} to {half}", self.i))
    }

    /// The f32 with these 16 bits on top.
    pub(super) fn bf16_value(&mut self, bits: &str) -> String {
        let half = if self.vector { self.t.vec("i16") } else { "i16".into() };
        let w = self.t.def(&format!("zext {half} {bits} to {}", self.i));
        let c16 = self.ci(16);
        let w = self.ibin("shl", &w, &c16);
        self.float_of_bits(&w)
    }
}
