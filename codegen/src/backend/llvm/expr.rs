//! Expressions: integers stay scalar or affine in the lane as long as they can, floats become vectors.
//!
//! Invariant: arithmetic is f32, or f64 where an operand is f64; integers are i64; predicates i1.

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Expr, FragId};
use einfall_ir::ops::{BinaryOp, UnaryOp};

use super::emit::Emit;
use super::math::{F8, Lanes};
use super::value::{Ty, Val, float_text};
use crate::lower::cpu::NotLowered;

/// Where an elementwise expression is evaluated: a register of the result.
pub(super) struct Place {
    /// Tile coordinates of lane 0.
    pub(super) coords: Vec<u64>,
    /// The dimension lanes run along.
    pub(super) lane_dim: Option<usize>,
}

type Out<T> = Result<T, NotLowered>;

impl Emit<'_> {
    /// A uniform integer as scalar text.
    pub(super) fn int(&mut self, e: &Expr) -> Out<String> {
        match self.eval(e, None)? {
            Val::Uniform(Ty::Int, s) => Ok(s),
            Val::Uniform(Ty::Bool, s) => Ok(self.t.def(&format!("zext i1 {s} to i64"))),
            Val::Uniform(..) | Val::Affine(..) | Val::Vector(..) => {
                Err(self.unsupported("a non-integer used as a uniform integer"))
            }
        }
    }

    /// A uniform condition as scalar i1.
    pub(super) fn condition(&mut self, e: &Expr) -> Out<String> {
        let v = self.eval(e, None)?;
        match self.truth(v) {
            Val::Uniform(_, s) => Ok(s),
            Val::Affine(..) | Val::Vector(..) => Err(self.unsupported("a condition that differs between lanes")),
        }
    }

    /// The value as a predicate.
    pub(super) fn truth(&mut self, v: Val) -> Val {
        let zero = match v.ty() {
            Ty::Bool => return v,
            Ty::Int => "0".to_string(),
            Ty::F32 | Ty::F64 => float_text(v.ty(), 0.0),
        };
        let ty = v.ty();
        let op = if ty == Ty::Int { "icmp ne" } else { "fcmp une" };
        match &v {
            Val::Uniform(_, s) => Val::Uniform(Ty::Bool, self.t.def(&format!("{op} {} {s}, {zero}", ty.llvm()))),
            Val::Affine(..) | Val::Vector(..) => {
                let s = self.t.vector(&v);
                let z = self.t.splat_const(ty.llvm(), &zero);
                let vt = self.t.vec(ty.llvm());
                Val::Vector(Ty::Bool, self.t.def(&format!("{op} {vt} {s}, {z}")))
            }
        }
    }

    /// Converts between arithmetic types without rounding to storage types.
    pub(super) fn convert(&mut self, v: Val, to: Ty) -> Val {
        let from = v.ty();
        if from == to {
            return v;
        }
        if let (Val::Uniform(_, s), Ty::F32 | Ty::F64) = (&v, to)
            && let (Ty::Int, Ok(i)) = (from, s.parse::<i64>())
        {
            return Val::Uniform(to, float_text(to, i as f64));
        }
        if to == Ty::Bool {
            return self.truth(v);
        }
        let op = match (from, to) {
            (Ty::Bool, Ty::Int) => "zext",
            (Ty::Bool, _) => "uitofp",
            (Ty::Int, _) => "sitofp",
            (Ty::F32, Ty::F64) => "fpext",
            (Ty::F64, Ty::F32) => "fptrunc",
            (Ty::F32 | Ty::F64, _) => return self.float_to_int(v, 64),
        };
        match &v {
            Val::Uniform(_, s) => Val::Uniform(to, self.t.def(&format!("{op} {} {s} to {}", from.llvm(), to.llvm()))),
            Val::Affine(..) | Val::Vector(..) => {
                let s = self.t.vector(&v);
                let (f, t) = (self.t.vec(from.llvm()), self.t.vec(to.llvm()));
                Val::Vector(to, self.t.def(&format!("{op} {f} {s} to {t}")))
            }
        }
    }

    /// Truncates towards zero, saturates to `bits`, NaN gives 0.
    fn float_to_int(&mut self, v: Val, bits: u32) -> Val {
        let from = v.ty();
        let elem = from.llvm();
        let fs = if from == Ty::F32 { "f32" } else { "f64" };
        match &v {
            Val::Uniform(_, s) => {
                let s = s.clone();
                let i = format!("i{bits}");
                let r = self.t.call(&i, &format!("llvm.fptosi.sat.i{bits}.{fs}"), &[(elem, &s)]);
                let r = if bits < 64 { self.t.def(&format!("sext {i} {r} to i64")) } else { r };
                Val::Uniform(Ty::Int, r)
            }
            Val::Affine(..) | Val::Vector(..) => {
                let s = self.t.vector(&v);
                let n = self.t.lanes;
                let (f, i, l) = (self.t.vec(elem), self.t.vec(&format!("i{bits}")), self.t.vec("i64"));
                let r = self.t.call(&i, &format!("llvm.fptosi.sat.v{n}i{bits}.v{n}{fs}"), &[(&f, &s)]);
                let r = if bits < 64 { self.t.def(&format!("sext {i} {r} to {l}")) } else { r };
                Val::Vector(Ty::Int, r)
            }
        }
    }

    /// Rounds a value to a storage type and returns it in its arithmetic type.
    pub(super) fn cast(&mut self, v: Val, to: DType) -> Out<Val> {
        Ok(match to {
            DType::F32 => self.convert(v, Ty::F32),
            DType::F64 => self.convert(v, Ty::F64),
            DType::BF16 => {
                let v = self.convert(v, Ty::F32);
                self.lanewise(v, |l, x| {
                    let b = l.bf16_bits(x);
                    l.bf16_value(&b)
                })
            }
            DType::F16 => {
                let v = self.convert(v, Ty::F32);
                let (vector, s) = self.text_of(&v);
                let (f, h) = if vector {
                    (self.t.vec("float"), self.t.vec("half"))
                } else {
                    ("float".into(), "half".to_string())
                };
                let r = self.t.def(&format!("fptrunc {f} {s} to {h}"));
                let r = self.t.def(&format!("fpext {h} {r} to {f}"));
                if vector { Val::Vector(Ty::F32, r) } else { Val::Uniform(Ty::F32, r) }
            }
            DType::I64 => match v.ty() {
                Ty::F32 | Ty::F64 => self.float_to_int(v, 64),
                Ty::Int => v,
                Ty::Bool => self.convert(v, Ty::Int),
            },
            DType::I32 | DType::I8 => {
                let bits = to.bits();
                match v.ty() {
                    Ty::F32 | Ty::F64 => self.float_to_int(v, bits),
                    Ty::Bool => self.convert(v, Ty::Int),
                    Ty::Int => {
                        let (lo, hi) = (to.min_finite() as i64, to.max_finite() as i64);
                        self.clamp_int(v, lo, hi)
                    }
                }
            }
            DType::U8 => {
                let v = if v.ty() == Ty::Int { v } else { self.convert(v, Ty::Int) };
                self.clamp_int(v, 0, 255)
            }
            DType::Bool => self.truth(v),
            DType::F8E4M3 | DType::F8E5M2 => {
                let v = self.convert(v, Ty::F32);
                self.lanewise(v, |l, x| l.f8_round(x, F8::of(to)))
            }
            DType::Tf32 | DType::I4 | DType::U4 => return Err(self.unsupported(&format!("elements of type {to}"))),
        })
    }

    fn clamp_int(&mut self, v: Val, lo: i64, hi: i64) -> Val {
        let v = self.int_binary("llvm.smax", v, Val::int(lo));
        self.int_binary("llvm.smin", v, Val::int(hi))
    }

    /// Whether the value is a vector, and its text.
    fn text_of(&mut self, v: &Val) -> (bool, String) {
        match v {
            Val::Uniform(_, s) => (false, s.clone()),
            Val::Affine(..) | Val::Vector(..) => (true, self.t.vector(v)),
        }
    }

    /// An expansion of f32 lanes.
    pub(super) fn lanewise(&mut self, v: Val, f: impl FnOnce(&mut Lanes<'_>, &str) -> String) -> Val {
        let (vector, s) = self.text_of(&v);
        let scalef = self.isa.scalef;
        let r = f(&mut Lanes::new(&mut self.t, vector, scalef), &s);
        if vector { Val::Vector(Ty::F32, r) } else { Val::Uniform(Ty::F32, r) }
    }

    /// Applies an instruction (`fadd`, `icmp slt`) to two values of one type.
    fn instr(&mut self, op: &str, a: Val, b: Val, out: Ty) -> Val {
        let ty = a.ty().llvm();
        match (&a, &b) {
            (Val::Uniform(_, x), Val::Uniform(_, y)) => Val::Uniform(out, self.t.def(&format!("{op} {ty} {x}, {y}"))),
            _ => {
                let (x, y) = (self.t.vector(&a), self.t.vector(&b));
                let vt = self.t.vec(ty);
                Val::Vector(out, self.t.def(&format!("{op} {vt} {x}, {y}")))
            }
        }
    }

    /// Applies a two-argument i64 intrinsic.
    fn int_binary(&mut self, name: &str, a: Val, b: Val) -> Val {
        match (&a, &b) {
            (Val::Uniform(_, x), Val::Uniform(_, y)) => {
                let (x, y) = (x.clone(), y.clone());
                if let (Ok(i), Ok(j)) = (x.parse::<i64>(), y.parse::<i64>()) {
                    return Val::int(if name.ends_with("min") { i.min(j) } else { i.max(j) });
                }
                Val::Uniform(Ty::Int, self.t.call("i64", &format!("{name}.i64"), &[("i64", &x), ("i64", &y)]))
            }
            _ => {
                let (x, y) = (self.t.vector(&a), self.t.vector(&b));
                let l = self.t.vec("i64");
                let name = format!("{name}.v{}i64", self.t.lanes);
                Val::Vector(Ty::Int, self.t.call(&l, &name, &[(&l, &x), (&l, &y)]))
            }
        }
    }

    fn common(&mut self, a: Val, b: Val) -> (Val, Val) {
        let ty = match (a.ty(), b.ty()) {
            (Ty::F64, _) | (_, Ty::F64) => Ty::F64,
            (Ty::F32, _) | (_, Ty::F32) => Ty::F32,
            (Ty::Int, _) | (_, Ty::Int) => Ty::Int,
            (Ty::Bool, Ty::Bool) => Ty::Bool,
        };
        (self.convert(a, ty), self.convert(b, ty))
    }

    /// `if c then a else b`, lanewise.
    pub(super) fn select(&mut self, c: Val, a: Val, b: Val) -> Val {
        let (a, b) = self.common(a, b);
        let ty = a.ty();
        match (&c, &a, &b) {
            (Val::Uniform(_, c), Val::Uniform(_, x), Val::Uniform(_, y)) => {
                Val::Uniform(ty, self.t.def(&format!("select i1 {c}, {0} {x}, {0} {y}", ty.llvm())))
            }
            (Val::Uniform(_, c), _, _) => {
                let c = c.clone();
                let (x, y) = (self.t.vector(&a), self.t.vector(&b));
                let vt = self.t.vec(ty.llvm());
                Val::Vector(ty, self.t.def(&format!("select i1 {c}, {vt} {x}, {vt} {y}")))
            }
            _ => {
                let (m, x, y) = (self.t.vector(&c), self.t.vector(&a), self.t.vector(&b));
                let (vb, vt) = (self.t.vec("i1"), self.t.vec(ty.llvm()));
                Val::Vector(ty, self.t.def(&format!("select {vb} {m}, {vt} {x}, {vt} {y}")))
            }
        }
    }

    /// The value of an expression at a place; none for uniform expressions.
    pub(super) fn eval(&mut self, e: &Expr, place: Option<&Place>) -> Out<Val> {
        Ok(match e {
            Expr::Int(i) => Val::int(*i),
            Expr::Float(f) => Val::Uniform(Ty::F32, float_text(Ty::F32, *f)),
            Expr::Var(v) => Val::Uniform(Ty::Int, self.var(*v)),
            Expr::Extent(r) => Val::Uniform(Ty::Int, format!("%ext{}", r.index())),
            Expr::Grid(d) => Val::Uniform(Ty::Int, format!("%grid{d}")),
            Expr::Unit | Expr::ClusterRank => Val::int(0),
            Expr::Scalar(b) => self.scalar(*b)?,
            Expr::Fetch { buf, at } => {
                let at = at.iter().map(|a| self.int(a)).collect::<Out<Vec<_>>>()?;
                self.fetch(*buf, &at)?
            }
            Expr::Frag { frag, dims } => self.frag_value(*frag, dims, place)?,
            Expr::Coord(d) => {
                let Some(p) = place else { return Err(self.unsupported("a coordinate in a uniform expression")) };
                let base = p.coords[*d] as i64;
                if p.lane_dim == Some(*d) { Val::Affine(base.to_string(), 1) } else { Val::int(base) }
            }
            Expr::Unary(op, a) => {
                let a = self.eval(a, place)?;
                self.unary(*op, a)?
            }
            Expr::Binary(op, a, b) => {
                let (a, b) = (self.eval(a, place)?, self.eval(b, place)?);
                self.binary(*op, a, b)?
            }
            Expr::Fma(a, b, c) => {
                let (a, b, c) = (self.eval(a, place)?, self.eval(b, place)?, self.eval(c, place)?);
                self.fma(a, b, c)
            }
            Expr::Select(c, a, b) => {
                let c = self.eval(c, place)?;
                let c = self.truth(c);
                let (a, b) = (self.eval(a, place)?, self.eval(b, place)?);
                self.select(c, a, b)
            }
            Expr::Cast(d, a) => {
                let a = self.eval(a, place)?;
                self.cast(a, *d)?
            }
            Expr::Rand(of) => {
                let of = of.iter().map(|e| self.eval(e, place)).collect::<Out<Vec<_>>>()?;
                self.uniform_random(&of)
            }
        })
    }

    /// Philox4x32-10 (Salmon et al., SC 2011), of 64-bit lanes that hold 32 bits: the seed, then four coordinates.
    fn uniform_random(&mut self, of: &[Val]) -> Val {
        let vector = of.iter().any(|v| !matches!(v, Val::Uniform(..)));
        let ty = if vector { self.t.vec("i64") } else { "i64".to_string() };
        let konst = |s: &Self, n: i64| if vector { s.t.splat_const("i64", &n.to_string()) } else { n.to_string() };
        let low = konst(self, 0xFFFF_FFFF);
        let thirty_two = konst(self, 32);
        let mut words = Vec::new();
        for v in of {
            let v = self.convert(v.clone(), Ty::Int);
            words.push(match &v {
                Val::Uniform(_, s) if !vector => s.clone(),
                _ => self.t.vector(&v),
            });
        }
        let bin = |s: &mut Self, op: &str, a: &str, b: &str| s.t.def(&format!("{op} {ty} {a}, {b}"));
        let mut keys = [bin(self, "and", &words[0], &low), bin(self, "lshr", &words[0], &thirty_two)];
        let mut at: Vec<String> = words[1..].iter().map(|w| bin(self, "and", w, &low)).collect();
        for _ in 0..10 {
            let p = bin(self, "mul", &at[0], &konst(self, 0xD251_1F53));
            let q = bin(self, "mul", &at[2], &konst(self, 0xCD9E_8D57));
            let mut next = Vec::new();
            for (product, other, key) in [(&q, &at[1], &keys[0]), (&p, &at[3], &keys[1])] {
                let high = bin(self, "lshr", product, &thirty_two);
                let mixed = bin(self, "xor", &high, other);
                next.push(bin(self, "xor", &mixed, key));
                next.push(bin(self, "and", product, &low));
            }
            at = next;
            for (key, step) in keys.iter_mut().zip([0x9E37_79B9, 0xBB67_AE85]) {
                let sum = bin(self, "add", key, &konst(self, step));
                *key = bin(self, "and", &sum, &low);
            }
        }
        // The top 24 bits, which are exact in f32.
        let top = bin(self, "lshr", &at[0], &konst(self, 8));
        let top = if vector { Val::Vector(Ty::Int, top) } else { Val::Uniform(Ty::Int, top) };
        let top = self.convert(top, Ty::F32);
        self.instr("fmul", top, Val::Uniform(Ty::F32, float_text(Ty::F32, 2f64.powi(-24))), Ty::F32)
    }

    fn frag_value(&mut self, frag: FragId, dims: &[usize], place: Option<&Place>) -> Out<Val> {
        let coords: Vec<u64> = match place {
            Some(p) => dims.iter().map(|d| p.coords[*d]).collect(),
            None if dims.is_empty() => Vec::new(),
            None => return Err(self.unsupported("a fragment in a uniform expression")),
        };
        self.read_frag(frag, &coords)
    }

    fn fma(&mut self, a: Val, b: Val, c: Val) -> Val {
        let (a, b) = self.common(a, b);
        let (a, c) = self.common(a, c);
        let (b, c) = self.common(b, c);
        let ty = a.ty();
        let fs = if ty == Ty::F64 { "f64" } else { "f32" };
        match (&a, &b, &c) {
            (Val::Uniform(_, x), Val::Uniform(_, y), Val::Uniform(_, z)) => {
                let (x, y, z, f) = (x.clone(), y.clone(), z.clone(), ty.llvm());
                Val::Uniform(ty, self.t.call(f, &format!("llvm.fma.{fs}"), &[(f, &x), (f, &y), (f, &z)]))
            }
            _ => {
                let (x, y, z) = (self.t.vector(&a), self.t.vector(&b), self.t.vector(&c));
                let f = self.t.vec(ty.llvm());
                let name = format!("llvm.fma.v{}{fs}", self.t.lanes);
                Val::Vector(ty, self.t.call(&f, &name, &[(&f, &x), (&f, &y), (&f, &z)]))
            }
        }
    }

    /// A one-argument float intrinsic of either float type.
    fn float_intrinsic(&mut self, name: &str, v: Val) -> Val {
        let ty = v.ty();
        let fs = if ty == Ty::F64 { "f64" } else { "f32" };
        let (vector, s) = self.text_of(&v);
        if vector {
            let f = self.t.vec(ty.llvm());
            let name = format!("llvm.{name}.v{}{fs}", self.t.lanes);
            Val::Vector(ty, self.t.call(&f, &name, &[(&f, &s)]))
        } else {
            Val::Uniform(ty, self.t.call(ty.llvm(), &format!("llvm.{name}.{fs}"), &[(ty.llvm(), &s)]))
        }
    }

    fn unary(&mut self, op: UnaryOp, a: Val) -> Out<Val> {
        use UnaryOp::*;
        if op == Not {
            let a = self.truth(a);
            return Ok(self.instr("xor", a, Val::Uniform(Ty::Bool, "true".into()), Ty::Bool));
        }
        if a.ty() == Ty::Int {
            match op {
                Neg => return self.binary(BinaryOp::Sub, Val::int(0), a),
                Abs => {
                    let n = self.binary(BinaryOp::Sub, Val::int(0), a.clone())?;
                    return self.binary(BinaryOp::Max, a, n);
                }
                Sign => return Ok(self.clamp_int(a, -1, 1)),
                Floor | Ceil | Round => return Ok(a),
                Exp | Exp2 | Log | Log2 | Log1p | Sqrt | Rsqrt | Recip | Sin | Cos | Tanh | Sigmoid | Erf | Not => {}
            }
        }
        let a = if a.ty() == Ty::F64 { a } else { self.convert(a, Ty::F32) };
        let double = a.ty() == Ty::F64;
        let one = || Val::Uniform(Ty::F64, float_text(Ty::F64, 1.0));
        Ok(match op {
            Neg => {
                let (vector, s) = self.text_of(&a);
                let ty = a.ty();
                let vt = if vector { self.t.vec(ty.llvm()) } else { ty.llvm().to_string() };
                let r = self.t.def(&format!("fneg {vt} {s}"));
                if vector { Val::Vector(ty, r) } else { Val::Uniform(ty, r) }
            }
            Abs => self.float_intrinsic("fabs", a),
            Sqrt => self.float_intrinsic("sqrt", a),
            Floor => self.float_intrinsic("floor", a),
            Ceil => self.float_intrinsic("ceil", a),
            // In the default rounding mode rint is roundeven.
            Round => self.float_intrinsic("rint", a),
            Rsqrt if double => {
                let s = self.float_intrinsic("sqrt", a);
                self.instr("fdiv", one(), s, Ty::F64)
            }
            Recip if double => self.instr("fdiv", one(), a, Ty::F64),
            Exp | Exp2 | Log | Log2 | Log1p | Sin | Cos | Tanh | Sigmoid | Erf | Sign if double => {
                return Err(self.unsupported(&format!("{} of f64", op.name())));
            }
            Exp => self.lanewise(a, |l, x| l.exp(x)),
            Exp2 => self.lanewise(a, |l, x| l.exp2(x)),
            Log => self.lanewise(a, |l, x| l.log(x)),
            Log2 => self.lanewise(a, |l, x| l.log2(x)),
            Log1p => self.lanewise(a, |l, x| l.log1p(x)),
            Rsqrt => self.lanewise(a, |l, x| l.rsqrt(x)),
            Recip => self.lanewise(a, |l, x| l.recip(x)),
            Sin => self.lanewise(a, |l, x| l.sin_cos(x, false)),
            Cos => self.lanewise(a, |l, x| l.sin_cos(x, true)),
            Tanh => self.lanewise(a, |l, x| l.tanh(x)),
            Sigmoid => self.lanewise(a, |l, x| l.sigmoid(x)),
            Erf => self.lanewise(a, |l, x| l.erf(x)),
            Sign => self.lanewise(a, |l, x| l.sign(x)),
            Not => a,
        })
    }

    pub(super) fn binary(&mut self, op: BinaryOp, a: Val, b: Val) -> Out<Val> {
        use BinaryOp::*;
        if matches!(op, And | Or) {
            let (a, b) = (self.truth(a), self.truth(b));
            return Ok(self.instr(if op == And { "and" } else { "or" }, a, b, Ty::Bool));
        }
        let (a, b) = self.common(a, b);
        let (a, b) = if a.ty() == Ty::Bool { (self.convert(a, Ty::Int), self.convert(b, Ty::Int)) } else { (a, b) };
        if a.ty() == Ty::Int { self.int_op(op, a, b) } else { self.float_op(op, a, b) }
    }

    fn int_op(&mut self, op: BinaryOp, a: Val, b: Val) -> Out<Val> {
        use BinaryOp::*;
        // Forms affine in the lane stay so.
        match (op, &a, &b) {
            (Add, Val::Uniform(_, x), Val::Uniform(_, y)) => return Ok(Val::Uniform(Ty::Int, self.t.add(x, y))),
            (Sub, Val::Uniform(_, x), Val::Uniform(_, y)) => return Ok(Val::Uniform(Ty::Int, self.t.sub(x, y))),
            (Mul, Val::Uniform(_, x), Val::Uniform(_, y)) => return Ok(Val::Uniform(Ty::Int, self.t.mul(x, y))),
            (Add, Val::Affine(x, c), Val::Uniform(_, y)) | (Add, Val::Uniform(_, y), Val::Affine(x, c)) => {
                return Ok(Val::Affine(self.t.add(x, y), *c));
            }
            (Sub, Val::Affine(x, c), Val::Uniform(_, y)) => return Ok(Val::Affine(self.t.sub(x, y), *c)),
            (Sub, Val::Uniform(_, x), Val::Affine(y, c)) => return Ok(Val::Affine(self.t.sub(x, y), -c)),
            (Add, Val::Affine(x, c), Val::Affine(y, d)) => return Ok(Val::Affine(self.t.add(x, y), c + d)),
            (Sub, Val::Affine(x, c), Val::Affine(y, d)) if c != d => return Ok(Val::Affine(self.t.sub(x, y), c - d)),
            (Sub, Val::Affine(x, _), Val::Affine(y, _)) => return Ok(Val::Uniform(Ty::Int, self.t.sub(x, y))),
            (Mul, Val::Affine(x, c), Val::Uniform(_, y)) | (Mul, Val::Uniform(_, y), Val::Affine(x, c)) => {
                if let Ok(k) = y.parse::<i64>() {
                    return Ok(if k == 0 { Val::int(0) } else { Val::Affine(self.t.mul(x, y), c * k) });
                }
            }
            (Lt | Le | Gt | Ge, Val::Affine(x, 1), Val::Uniform(_, y)) => {
                let rest = self.t.sub(y, x);
                return Ok(self.lane_compare(op, &rest));
            }
            (Lt | Le | Gt | Ge, Val::Uniform(_, y), Val::Affine(x, 1)) => {
                let rest = self.t.sub(y, x);
                let flipped = match op {
                    Lt => Gt,
                    Le => Ge,
                    Gt => Lt,
                    _ => Le,
                };
                return Ok(self.lane_compare(flipped, &rest));
            }
            _ => {}
        }
        Ok(match op {
            Add => self.instr("add", a, b, Ty::Int),
            Sub => self.instr("sub", a, b, Ty::Int),
            Mul => self.instr("mul", a, b, Ty::Int),
            Min => self.int_binary("llvm.smin", a, b),
            Max => self.int_binary("llvm.smax", a, b),
            Div | Mod => self.floor_div(op, a, b)?,
            Lt => self.instr("icmp slt", a, b, Ty::Bool),
            Le => self.instr("icmp sle", a, b, Ty::Bool),
            Gt => self.instr("icmp sgt", a, b, Ty::Bool),
            Ge => self.instr("icmp sge", a, b, Ty::Bool),
            Eq => self.instr("icmp eq", a, b, Ty::Bool),
            Ne => self.instr("icmp ne", a, b, Ty::Bool),
            Pow => {
                let (a, b) = (self.convert(a, Ty::F32), self.convert(b, Ty::F32));
                self.float_op(Pow, a, b)?
            }
            And | Or => return Err(self.unsupported("a bitwise operator on integers")),
        })
    }

    /// `lane op rest` in 32-bit lanes.
    fn lane_compare(&mut self, op: BinaryOp, rest: &str) -> Val {
        let top = self.t.lanes as i64 + 1;
        let c = self.clamp_int(Val::Uniform(Ty::Int, rest.to_string()), -2, top);
        let c = match c {
            Val::Uniform(_, s) if s.parse::<i64>().is_ok() => s,
            Val::Uniform(_, s) => self.t.def(&format!("trunc i64 {s} to i32")),
            Val::Affine(..) | Val::Vector(..) => rest.to_string(),
        };
        let c = self.t.splat("i32", &c);
        let iota = self.t.iota("i32", 1);
        let pred = match op {
            BinaryOp::Lt => "slt",
            BinaryOp::Le => "sle",
            BinaryOp::Gt => "sgt",
            _ => "sge",
        };
        let v = self.t.vec("i32");
        Val::Vector(Ty::Bool, self.t.def(&format!("icmp {pred} {v} {iota}, {c}")))
    }

    /// Floor division and its remainder; x/0 = x%0 = 0.
    fn floor_div(&mut self, op: BinaryOp, a: Val, b: Val) -> Out<Val> {
        if let (Val::Uniform(_, x), Val::Uniform(_, y)) = (&a, &b)
            && let (Ok(x), Ok(y)) = (x.parse::<i64>(), y.parse::<i64>())
        {
            let v = match (op, y) {
                (_, 0) => 0,
                (BinaryOp::Div, _) => x.div_euclid(y),
                (_, _) => x.rem_euclid(y),
            };
            return Ok(Val::int(v));
        }
        if let Val::Uniform(_, y) = &b
            && let Some(y) = y.parse::<i64>().ok().filter(|y| *y > 0 && y.count_ones() == 1)
        {
            return Ok(match op {
                BinaryOp::Div => self.instr("ashr", a, Val::int(i64::from(y.trailing_zeros())), Ty::Int),
                _ => self.instr("and", a, Val::int(y - 1), Ty::Int),
            });
        }
        let zero = self.instr("icmp eq", b.clone(), Val::int(0), Ty::Bool);
        let safe = self.select(zero.clone(), Val::int(1), b);
        let q = self.instr("sdiv", a.clone(), safe.clone(), Ty::Int);
        let back = self.instr("mul", q.clone(), safe.clone(), Ty::Int);
        let r = self.instr("sub", a, back, Ty::Int);
        // The remainder is made non-negative.
        let neg = self.instr("icmp slt", r.clone(), Val::int(0), Ty::Bool);
        let v = if op == BinaryOp::Div {
            let pos = self.instr("icmp sgt", safe, Val::int(0), Ty::Bool);
            let down = self.instr("sub", q.clone(), Val::int(1), Ty::Int);
            let up = self.instr("add", q.clone(), Val::int(1), Ty::Int);
            let fixed = self.select(pos, down, up);
            self.select(neg, fixed, q)
        } else {
            let n = self.instr("sub", Val::int(0), safe.clone(), Ty::Int);
            let mag = self.int_binary("llvm.smax", safe, n);
            let fixed = self.instr("add", r.clone(), mag, Ty::Int);
            self.select(neg, fixed, r)
        };
        Ok(self.select(zero, Val::int(0), v))
    }

    fn float_op(&mut self, op: BinaryOp, a: Val, b: Val) -> Out<Val> {
        use BinaryOp::*;
        let ty = a.ty();
        Ok(match op {
            Add => self.instr("fadd", a, b, ty),
            Sub => self.instr("fsub", a, b, ty),
            Mul => self.instr("fmul", a, b, ty),
            Div => self.instr("fdiv", a, b, ty),
            Mod => {
                let q = self.instr("fdiv", a.clone(), b.clone(), ty);
                let q = self.float_intrinsic("floor", q);
                let p = self.instr("fmul", b, q, ty);
                self.instr("fsub", a, p, ty)
            }
            // One compare-select is `minps`/`maxps`, which keeps b where either is NaN; a NaN in a is put back.
            Min | Max => {
                let pred = if op == Min { "fcmp olt" } else { "fcmp ogt" };
                let c = self.instr(pred, a.clone(), b.clone(), Ty::Bool);
                let m = self.select(c, a.clone(), b);
                let nan = self.instr("fcmp uno", a.clone(), a.clone(), Ty::Bool);
                self.select(nan, a, m)
            }
            Lt => self.instr("fcmp olt", a, b, Ty::Bool),
            Le => self.instr("fcmp ole", a, b, Ty::Bool),
            Gt => self.instr("fcmp ogt", a, b, Ty::Bool),
            Ge => self.instr("fcmp oge", a, b, Ty::Bool),
            Eq => self.instr("fcmp oeq", a, b, Ty::Bool),
            Ne => self.instr("fcmp une", a, b, Ty::Bool),
            Pow => self.pow(a, b)?,
            And | Or => return Err(self.unsupported("a bitwise operator on floats")),
        })
    }

    /// Powers with a literal exponent that is a small integer or ±½: products and roots.
    fn pow(&mut self, a: Val, b: Val) -> Out<Val> {
        let ty = a.ty();
        let Val::Uniform(_, text) = &b else { return Err(self.unsupported("pow with a varying exponent")) };
        let Some(y) = text.strip_prefix("0x").and_then(|h| u64::from_str_radix(h, 16).ok()).map(f64::from_bits) else {
            return Err(self.unsupported("pow with a run-time exponent"));
        };
        let one = Val::Uniform(ty, float_text(ty, 1.0));
        if y.abs() == 0.5 {
            let s = self.float_intrinsic("sqrt", a);
            return Ok(if y < 0.0 { self.instr("fdiv", one, s, ty) } else { s });
        }
        if (2.0 * y).fract() != 0.0 || y.abs() > 64.0 {
            return Err(self.unsupported("pow with an exponent that is no multiple of a half"));
        }
        let mut n = y.abs() as u32;
        let mut acc = (y.fract() != 0.0).then(|| self.float_intrinsic("sqrt", a.clone()));
        let mut base = a;
        while n > 0 {
            if n & 1 == 1 {
                acc = Some(match acc {
                    None => base.clone(),
                    Some(v) => self.instr("fmul", v, base.clone(), ty),
                });
            }
            n >>= 1;
            if n > 0 {
                base = self.instr("fmul", base.clone(), base, ty);
            }
        }
        let p = acc.unwrap_or_else(|| one.clone());
        Ok(if y < 0.0 { self.instr("fdiv", one, p, ty) } else { p })
    }
}
