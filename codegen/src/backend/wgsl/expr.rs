//! Expressions: uniform ones, and elementwise ones with what depends on fewer dimensions computed once.
//!
//! Integers have 32 bits; division and remainder are the IR's (floor, and 0 for a divisor of 0), printed as WGSL's own
//! where ranges show that they agree. Minimum and maximum keep NaN. Invariant: a value is kept only while the variables
//! it names are unchanged: within one statement.

use einfall_ir::artifact::Slot;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{BufId, Expr};
use einfall_ir::ops::{BinaryOp, UnaryOp};

use super::Res;
use super::emit::{Emit, plain};
use super::frag::class;
use super::value::{Ty, Val};
use crate::backend::gpu::fold;
use crate::backend::gpu::memo::{self, Element};

/// What one statement has computed, by expression and coordinates.
pub(super) type Memo = memo::Memo<(usize, Vec<i64>), Val>;

/// What no literal of WGSL is.
const BEYOND: &str = "an integer constant beyond 32 bits";

/// Whether extents alone decide an integer: it is the same wherever it stands.
fn of_extents(e: &Expr) -> bool {
    match e {
        Expr::Int(_) | Expr::Extent(_) => true,
        Expr::Binary(_, a, b) => of_extents(a) && of_extents(b),
        _ => false,
    }
}

/// Whether something in it is divided by what is not known before the launch, which takes dozens of instructions.
fn divides(e: &Expr) -> bool {
    let Expr::Binary(op, a, b) = e else { return false };
    let here = matches!(op, BinaryOp::Div | BinaryOp::Mod) && !matches!(**b, Expr::Int(_));
    here || divides(a) || divides(b)
}

impl Emit<'_> {
    /// A uniform expression.
    pub(super) fn uniform(&mut self, e: &Expr) -> Res<Val> {
        self.value(e, None, &mut Memo::default())
    }

    /// A uniform integer.
    pub(super) fn int(&mut self, e: &Expr) -> Res<Val> {
        let v = self.uniform(e)?;
        Ok(self.to(&v, Ty::Int))
    }

    /// The value of `e`; `el` says for which element.
    pub(super) fn value(&mut self, e: &Expr, el: Option<&Element>, memo: &mut Memo) -> Res<Val> {
        let leaf = matches!(e, Expr::Int(_) | Expr::Float(_) | Expr::Var(_) | Expr::Frag { .. } | Expr::Coord(_));
        if !leaf && divides(e) && of_extents(e) {
            let v = self.compute(e, None, memo)?;
            return Ok(self.settled(&v));
        }
        let Some(el) = el.filter(|_| !leaf) else { return self.compute(e, el, memo) };
        let dims = memo.dims(e);
        let key = (std::ptr::from_ref(e) as usize, dims.iter().map(|d| el.at[*d]).collect::<Vec<_>>());
        if let Some(v) = memo.values.get(&key) {
            return Ok(v.clone());
        }
        let mut v = self.compute(e, Some(el), memo)?;
        if dims.len() < el.at.len() {
            v = self.named(&v);
        }
        memo.values.insert(key, v.clone());
        Ok(v)
    }

    fn compute(&mut self, e: &Expr, el: Option<&Element>, memo: &mut Memo) -> Res<Val> {
        Ok(match e {
            Expr::Int(i) if i32::try_from(*i).is_err() => return Err(self.fail(BEYOND)),
            Expr::Int(i) => Val::int(*i),
            Expr::Float(x) => Val::float(*x),
            Expr::Var(v) => {
                let name = format!("v_{}", plain(&self.k.vars[*v].name));
                match self.ranges[einfall_ir::arena::Id::index(*v)] {
                    Some((lo, hi)) if lo == hi => Val::int(lo),
                    Some((lo, hi)) => Val::ranged(name, lo, hi),
                    None => Val::new(Ty::Int, name),
                }
            }
            Expr::Extent(r) => self.extent(*r),
            Expr::Grid(d) => self.grid[*d].clone(),
            Expr::Unit if self.units == 1 => Val::int(0),
            Expr::Unit => Val::ranged("unit", 0, self.units as i64 - 1),
            Expr::ClusterRank => Val::int(0),
            Expr::Scalar(b) => {
                self.storable(*b)?;
                let array = self.array(*b).ok_or_else(|| self.fail("a scalar that is no parameter"))?;
                let w = self.word(Slot::Scalar(array));
                match class(self.k.bufs[*b].dtype) {
                    Ty::Float => Val::new(Ty::Float, format!("bitcast<f32>({w})")),
                    Ty::Int | Ty::Bool => Val::new(Ty::Int, w),
                }
            }
            Expr::Fetch { buf, at } => {
                let mut coords = Vec::new();
                for c in at {
                    let c = self.value(c, el, memo)?;
                    coords.push(self.to(&c, Ty::Int));
                }
                self.fetch(*buf, &coords)?
            }
            Expr::Frag { frag, dims } => {
                let el = el.ok_or_else(|| self.fail("a fragment in a uniform expression"))?;
                let Some(served) = self.frags.serve(*frag, el.of, dims) else {
                    let (f, r) = (&self.held(*frag).name, &self.held(el.of).name);
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
                let x = self.value(a, el, memo)?;
                self.unary(*op, &x)?
            }
            Expr::Binary(op, a, b) => {
                let (x, y) = (self.value(a, el, memo)?, self.value(b, el, memo)?);
                self.bin(*op, &x, &y)?
            }
            Expr::Fma(a, b, c) => {
                let (a, b) = (self.value(a, el, memo)?, self.value(b, el, memo)?);
                let c = self.value(c, el, memo)?;
                if [&a, &b, &c].iter().any(|x| x.ty == Ty::Float) {
                    let [a, b, c] = [a, b, c].map(|x| self.to(&x, Ty::Float));
                    Val::new(Ty::Float, format!("fma({}, {}, {})", a.s, b.s, c.s))
                } else {
                    let p = self.bin(BinaryOp::Mul, &a, &b)?;
                    self.bin(BinaryOp::Add, &p, &c)?
                }
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
                let mut words = Vec::new();
                for x in of.iter() {
                    let x = self.value(x, el, memo)?;
                    words.push(self.to(&x, Ty::Int).s);
                }
                Val::new(Ty::Float, format!("random({})", words.join(", ")))
            }
        })
    }

    /// One element of a buffer, 0 outside it.
    fn fetch(&mut self, buf: BufId, coords: &[Val]) -> Res<Val> {
        let Some(_) = self.array(buf) else { return Err(self.fail("a uniform read of workgroup memory")) };
        let inside = self.inside(buf, coords)?;
        let index = self.index_of(buf, coords)?;
        let ty = class(self.k.bufs[buf].dtype);
        let zero = if ty == Ty::Float { "0.0" } else { "0" };
        if inside.known() == Some(1) {
            return self.load_call(buf, &index.s);
        }
        // Outside, the first word is read and dropped: no binding is empty.
        let load = self.load_call(buf, &format!("select(0, {}, {})", index.s, inside.s))?;
        Ok(Val::new(ty, format!("select({zero}, {}, {})", load.s, inside.s)))
    }

    /// Whether coordinates are inside a buffer.
    pub(super) fn inside(&mut self, buf: BufId, coords: &[Val]) -> Res<Val> {
        let dims = self.k.bufs[buf].dims.clone();
        let mut p = Val::bool(true);
        for (c, n) in coords.iter().zip(&dims) {
            let n = self.int(n)?;
            for (op, bound) in [(BinaryOp::Ge, Val::int(0)), (BinaryOp::Lt, n)] {
                let one = self.bin(op, c, &bound)?;
                p = self.bin(BinaryOp::And, &p, &one)?;
            }
        }
        Ok(p)
    }

    /// `v` in class `ty`.
    pub(super) fn to(&self, v: &Val, ty: Ty) -> Val {
        if v.ty == ty {
            return v.clone();
        }
        match (v.ty, ty) {
            (Ty::Float, Ty::Bool) => match v.k {
                Some(k) => Val::bool(k != 0.0),
                None => Val::new(ty, format!("({} != 0.0)", v.s)),
            },
            (Ty::Int | Ty::Bool, _) if v.known().is_some() => {
                let n = v.known().unwrap_or(0);
                match ty {
                    Ty::Int => Val::int(n),
                    Ty::Float => Val::float(n as f64),
                    Ty::Bool => Val::bool(n != 0),
                }
            }
            (Ty::Int, Ty::Bool) => Val::new(ty, format!("({} != 0)", v.s)),
            (Ty::Float, Ty::Int) => match v.k {
                Some(k) => Val::int(DType::I32.round(k) as i64),
                None => Val::new(ty, format!("to_int({})", v.s)),
            },
            (Ty::Bool, Ty::Int) => Val::ranged(format!("select(0, 1, {})", v.s), 0, 1),
            (Ty::Bool, Ty::Float) => Val::new(ty, format!("select(0.0, 1.0, {})", v.s)),
            (Ty::Int, _) => Val::new(ty, format!("f32({})", v.s)),
            (Ty::Float, Ty::Float) | (Ty::Bool, Ty::Bool) => v.clone(),
        }
    }

    /// `if c then a else b`.
    pub(super) fn select(&self, c: &Val, a: &Val, b: &Val) -> Val {
        let c = self.to(c, Ty::Bool);
        let ty = join(a, b);
        let (x, y) = (self.to(a, ty), self.to(b, ty));
        match c.known() {
            Some(0) => return y,
            Some(_) => return x,
            None => {}
        }
        Val { lo: x.lo.min(y.lo), hi: x.hi.max(y.hi), ..Val::new(ty, format!("select({}, {}, {})", y.s, x.s, c.s)) }
    }

    pub(super) fn bin(&self, op: BinaryOp, a: &Val, b: &Val) -> Res<Val> {
        use BinaryOp::*;
        match op {
            And | Or => {
                let (a, b) = (self.to(a, Ty::Bool), self.to(b, Ty::Bool));
                if let Some(i) = fold::decided(op == And, [a.known(), b.known()]) {
                    return Ok([a, b][i].clone());
                }
                let sign = if op == And { "&&" } else { "||" };
                return Ok(Val::new(Ty::Bool, format!("({} {sign} {})", a.s, b.s)));
            }
            Lt | Le | Gt | Ge | Eq | Ne => return Ok(self.compare(op, a, b)),
            Add | Sub | Mul | Div | Mod | Pow | Min | Max => {}
        }
        let ty = join(a, b);
        let (a, b) = (self.to(a, ty), self.to(b, ty));
        if ty == Ty::Float { Ok(float(op, &a, &b)) } else { self.integer(op, &a, &b) }
    }

    fn compare(&self, op: BinaryOp, a: &Val, b: &Val) -> Val {
        let ty = join(a, b);
        let (a, b) = (self.to(a, ty), self.to(b, ty));
        if ty == Ty::Float {
            if let (Some(x), Some(y)) = (a.k, b.k) {
                return Val::bool(op.eval(x, y, false) != 0.0);
            }
        } else {
            if let Some(v) = fold::compared(op, (a.lo, a.hi), (b.lo, b.hi)) {
                return Val::bool(v);
            }
        }
        Val::new(Ty::Bool, format!("({} {} {})", a.s, op.name(), b.s))
    }

    fn integer(&self, op: BinaryOp, a: &Val, b: &Val) -> Res<Val> {
        use BinaryOp::*;
        if let (Some(x), Some(y)) = (a.known(), b.known()) {
            let v = fold::integers(op, x, y).filter(|v| i32::try_from(*v).is_ok());
            return v.map(Val::int).ok_or_else(|| self.fail(BEYOND));
        }
        let (lo, hi) = (i64::from(i32::MIN), i64::from(i32::MAX));
        let clamp = |x: i64, y: i64| (x.clamp(lo, hi), y.clamp(lo, hi));
        let plain = |sign: &str| format!("({} {sign} {})", a.s, b.s);
        let (ka, kb) = (a.known(), b.known());
        let (s, range) = match op {
            Add if ka == Some(0) => return Ok(b.clone()),
            Add | Sub if kb == Some(0) => return Ok(a.clone()),
            Add => (plain("+"), clamp(a.lo.saturating_add(b.lo), a.hi.saturating_add(b.hi))),
            Sub => (plain("-"), clamp(a.lo.saturating_sub(b.hi), a.hi.saturating_sub(b.lo))),
            Mul if ka == Some(0) || kb == Some(0) => return Ok(Val::int(0)),
            Mul if ka == Some(1) => return Ok(b.clone()),
            Mul | Div if kb == Some(1) => return Ok(a.clone()),
            Mul => {
                let all = [a.lo * b.lo, a.lo * b.hi, a.hi * b.lo, a.hi * b.hi];
                (plain("*"), clamp(*all.iter().min().unwrap_or(&lo), *all.iter().max().unwrap_or(&hi)))
            }
            Div if a.lo >= 0 && b.lo > 0 => (plain("/"), (a.lo / b.hi, a.hi / b.lo)),
            Mod if a.lo >= 0 && b.lo > 0 => (plain("%"), (0, a.hi.min(b.hi - 1))),
            Div => {
                let range = if a.lo >= 0 && b.lo >= 0 { (0, a.hi) } else { (lo, hi) };
                (format!("floor_div({}, {})", a.s, b.s), range)
            }
            Mod => {
                let range = if b.lo >= 0 { (0, b.hi) } else { (lo, hi) };
                (format!("floor_mod({}, {})", a.s, b.s), range)
            }
            Min if a.hi <= b.lo => return Ok(a.clone()),
            Min if b.hi <= a.lo => return Ok(b.clone()),
            Max if a.lo >= b.hi => return Ok(a.clone()),
            Max if b.lo >= a.hi => return Ok(b.clone()),
            Min => (format!("min({}, {})", a.s, b.s), (a.lo.min(b.lo), a.hi.min(b.hi))),
            Max => (format!("max({}, {})", a.s, b.s), (a.lo.max(b.lo), a.hi.max(b.hi))),
            Pow => match kb {
                Some(n @ 1..=8) => (vec![a.s.as_str(); n as usize].join(" * "), (lo, hi)),
                _ => return Err(self.fail("`pow` of integers with such an exponent")),
            },
            Lt | Le | Gt | Ge | Eq | Ne | And | Or => return Err(self.fail("a comparison as a number")),
        };
        let s = if op == Pow { format!("({s})") } else { s };
        Ok(Val::ranged(s, range.0, range.1))
    }

    pub(super) fn unary(&self, op: UnaryOp, x: &Val) -> Res<Val> {
        use UnaryOp::*;
        if op == Not {
            let x = self.to(x, Ty::Bool);
            return Ok(match x.known() {
                Some(v) => Val::bool(v == 0),
                None => Val::new(Ty::Bool, format!("(!{})", x.s)),
            });
        }
        if x.ty != Ty::Float && matches!(op, Neg | Abs | Sign) {
            let x = self.to(x, Ty::Int);
            return match op {
                Neg => self.integer(BinaryOp::Sub, &Val::int(0), &x),
                Abs => Ok(Val::ranged(format!("abs({})", x.s), 0, i64::from(i32::MAX))),
                _ => Ok(Val::ranged(format!("sign({})", x.s), -1, 1)),
            };
        }
        let x = self.to(x, Ty::Float);
        if let Some(k) = x.k {
            return Ok(Val::float(op.eval(k)));
        }
        let fast = self.target.exact_exp2;
        let name = match op {
            Neg => return Ok(Val::new(Ty::Float, format!("(-{})", x.s))),
            Abs => "abs",
            Exp if fast => "exp_fast",
            Exp => "exp_exact",
            Exp2 if fast => "exp2",
            Exp2 => "exp2_exact",
            Log => "log_exact",
            Log2 => "log2_exact",
            Log1p => "log1p",
            Sqrt => "sqrt",
            Rsqrt => "inverseSqrt",
            Recip => return Ok(Val::new(Ty::Float, format!("(1.0 / {})", x.s))),
            Sin => "sin_exact",
            Cos => "cos_exact",
            Tanh if fast => "tanh_fast",
            Tanh => "tanh_exact",
            Sigmoid if fast => "sigmoid_fast",
            Sigmoid => "sigmoid_exact",
            Erf if fast => "erf_fast",
            Erf => "erf_exact",
            Floor => "floor",
            Ceil => "ceil",
            Round => "round",
            Sign => "sign_nan",
            Not => "!",
        };
        Ok(Val::new(Ty::Float, format!("{name}({})", x.s)))
    }

    /// `v` rounded to `dtype`, in the class of its expressions.
    pub(super) fn rounded(&self, v: &Val, dtype: DType) -> Res<Val> {
        let name = match dtype {
            DType::F32 => return Ok(self.to(v, Ty::Float)),
            DType::I32 => return Ok(self.to(v, Ty::Int)),
            DType::F64 | DType::I64 => return Err(self.fail(&format!("{dtype}, which WGSL does not have"))),
            DType::Tf32 => "round_tf32",
            DType::BF16 => "round_bf16",
            DType::F16 if self.target.exact_halves => "as_f16",
            DType::F16 => "round_f16",
            DType::F8E4M3 => "round_e4m3",
            DType::F8E5M2 => "round_e5m2",
            DType::I8 | DType::U8 | DType::I4 | DType::U4 => {
                let (lo, hi) = (dtype.min_finite() as i64, dtype.max_finite() as i64);
                let x = self.to(v, Ty::Int);
                if x.lo >= lo && x.hi <= hi {
                    return Ok(x);
                }
                return Ok(Val::ranged(format!("clamp({}, {lo}, {hi})", x.s), lo, hi));
            }
            DType::Bool => {
                let p = self.to(v, Ty::Bool);
                return Ok(self.to(&p, Ty::Int));
            }
        };
        let x = self.to(v, Ty::Float);
        if let Some(k) = x.k {
            return Ok(Val::float(dtype.round(k)));
        }
        // A conversion of a value just converted is the value.
        Ok(if x.s.starts_with(&format!("{name}(")) { x } else { Val::new(Ty::Float, format!("{name}({})", x.s)) })
    }
}

/// The common class of two operands.
fn join(a: &Val, b: &Val) -> Ty {
    match (a.ty, b.ty) {
        (Ty::Float, _) | (_, Ty::Float) => Ty::Float,
        _ => Ty::Int,
    }
}

fn float(op: BinaryOp, a: &Val, b: &Val) -> Val {
    use BinaryOp::*;
    if let (Some(x), Some(y)) = (a.k, b.k) {
        return Val::float(op.eval(x, y, false));
    }
    let plain = |sign: &str| Val::new(Ty::Float, format!("({} {sign} {})", a.s, b.s));
    match op {
        Mul if a.k == Some(1.0) => b.clone(),
        Mul | Div if b.k == Some(1.0) => a.clone(),
        Sub if b.k == Some(0.0) => a.clone(),
        Add => plain("+"),
        Sub => plain("-"),
        Mul => plain("*"),
        Div => plain("/"),
        Min => Val::new(Ty::Float, format!("min_nan({}, {})", a.s, b.s)),
        Max => Val::new(Ty::Float, format!("max_nan({}, {})", a.s, b.s)),
        Mod => Val::new(Ty::Float, format!("float_mod({}, {})", a.s, b.s)),
        Pow => match b.k {
            Some(0.5) => Val::new(Ty::Float, format!("sqrt({})", a.s)),
            Some(n) if n.fract() == 0.0 && (1.0..=8.0).contains(&n) => {
                Val::new(Ty::Float, format!("({})", vec![a.s.as_str(); n as usize].join(" * ")))
            }
            _ => Val::new(Ty::Float, format!("pow_exact({}, {})", a.s, b.s)),
        },
        Lt | Le | Gt | Ge | Eq | Ne | And | Or => Val::float(0.0),
    }
}
