//! Float64 with a running worst-case absolute error: how far any admissible evaluation in the declared types may be.
//!
//! A length-n sum adds γₙ·Σ|aᵢ|, γₙ = nu/(1−nu), u of the accumulator type (Higham, *Accuracy and Stability of
//! Numerical Algorithms*, §3.1 and §4.2); stores add their type's u; intrinsics their ulps; monotone functions
//! propagate intervals. Invariant: where control flow or a discrete result could differ, the bound is infinite.

use super::domain::{Domain, Ty, add_exp, better, descending, same, total_exp, worst};
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

/// A float64 value and how far an admissible evaluation may be from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// The value.
    pub x: f64,
    /// The largest absolute deviation; infinite when nothing is known.
    pub e: f64,
}

/// Division by hardware approximation: a reciprocal of 1 ulp and a multiplication.
const DIVISION_ULPS: f64 = 2.0;
/// exp2(y·log2 x) on hardware.
const POWER_ULPS: f64 = 16.0;

/// The bounded arithmetic.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounded {
    /// Whether the control flow of this point may differ.
    uncertain: bool,
}

/// A bounded reduction in progress.
#[derive(Clone, Debug, Default)]
pub struct BoundAcc {
    n: u64,
    x: f64,
    /// Σ of bounds, or the largest bound.
    e: f64,
    /// Σ |x|.
    magnitude: f64,
    low: f64,
    high: f64,
    scaled: f64,
    place: i64,
    best: f64,
    best_e: f64,
    /// Largest (in the operator's order) value that an exactly known other candidate takes.
    exact_rival: f64,
    /// Largest value that another candidate may take.
    rival: f64,
    items: Vec<(f64, f64, i64)>,
}

/// `x·e` where a zero bound stays zero.
fn times(x: f64, e: f64) -> f64 {
    if e == 0.0 || x == 0.0 { 0.0 } else { (x * e).abs() }
}

/// A bound with non-finite cases settled: a NaN bound knows nothing.
fn bound(x: f64, e: f64) -> Bound {
    Bound { x, e: if e.is_nan() { f64::INFINITY } else { e } }
}

/// What one rounding of `x` in `ty` may add. A float64 reference itself rounds once more.
fn rounding(ty: Ty, x: f64) -> f64 {
    if !x.is_finite() {
        return 0.0;
    }
    match ty {
        Ty::Int => 0.0,
        Ty::F32 => ty.unit() * x.abs(),
        Ty::F64 => 2.0 * ty.unit() * x.abs(),
    }
}

/// The smallest normal value: what a backend that flushes may lose.
fn flush(ty: Ty, x: f64) -> f64 {
    match ty {
        Ty::Int => 0.0,
        Ty::F32 if x.abs() < 2f64.powi(-100) && x != 0.0 => 2f64.powi(-126),
        Ty::F32 | Ty::F64 => 0.0,
    }
}

/// How far a monotone function moves over `a ± e`.
fn swing(f: impl Fn(f64) -> f64, a: Bound) -> f64 {
    if a.e == 0.0 {
        return 0.0;
    }
    let x = f(a.x);
    let d = |y: f64| if y == x { 0.0 } else { (y - x).abs() };
    d(f(a.x + a.e)).max(d(f(a.x - a.e)))
}

impl Domain for Bounded {
    type Value = Bound;
    type Acc = BoundAcc;

    fn exact(&self, x: f64) -> Bound {
        Bound { x, e: 0.0 }
    }
    fn center(v: Bound) -> f64 {
        v.x
    }

    fn unary(&mut self, op: UnaryOp, ty: Ty, a: Bound) -> Bound {
        use UnaryOp::*;
        let x = op.eval(a.x);
        let moved = match op {
            Neg | Abs => a.e,
            Exp | Exp2 | Tanh | Sigmoid | Erf | Floor | Ceil | Round => swing(|t| op.eval(t), a),
            Sign => swing(|t| op.eval(t), a),
            Log | Log2 | Sqrt | Rsqrt => {
                // The whole interval must lie in the domain.
                if a.e > 0.0 && a.x - a.e < 0.0 { f64::INFINITY } else { swing(|t| op.eval(t), a) }
            }
            Log1p => {
                if a.e > 0.0 && a.x - a.e < -1.0 {
                    f64::INFINITY
                } else {
                    swing(|t| op.eval(t), a)
                }
            }
            Recip => {
                if a.e > 0.0 && a.x.abs() <= a.e {
                    f64::INFINITY
                } else {
                    swing(|t| op.eval(t), a)
                }
            }
            Sin | Cos => a.e.min(2.0),
            Not => {
                if a.e > 0.0 {
                    f64::INFINITY
                } else {
                    0.0
                }
            }
        };
        // Near their zeros sin and cos are held to ulps of 1.
        let scale = if matches!(op, Sin | Cos) { 1.0 } else { x };
        bound(x, moved + 2.0 * op.ulps() * rounding(ty, scale) + flush(ty, x))
    }

    fn binary(&mut self, op: BinaryOp, ty: Ty, a: Bound, b: Bound) -> Bound {
        use BinaryOp::*;
        let x = op.eval(a.x, b.x, ty == Ty::Int);
        let e = a.e + b.e;
        let flip = |differ: bool| if differ { f64::INFINITY } else { 0.0 };
        match op {
            Add | Sub => bound(x, e + rounding(ty, x)),
            Mul => {
                let moved = times(a.x, b.e) + times(b.x, a.e) + times(a.e, b.e);
                bound(x, moved + rounding(ty, x) + flush(ty, x))
            }
            Div if ty == Ty::Int => bound(x, flip(e > 0.0)),
            Div => {
                let room = b.x.abs() - b.e;
                if b.e > 0.0 && room <= 0.0 {
                    return bound(x, f64::INFINITY);
                }
                let moved = if e == 0.0 { 0.0 } else { (a.e + times(x, b.e)) / room };
                bound(x, moved + 2.0 * DIVISION_ULPS * rounding(ty, x) + flush(ty, x))
            }
            Mod => bound(x, flip(e > 0.0) + rounding(ty, x)),
            Pow => bound(x, power(a, b, x) + 2.0 * POWER_ULPS * rounding(ty, x) + flush(ty, x)),
            Min | Max => {
                let wins = |p: Bound, q: Bound| if op == Max { p.x - p.e > q.x + q.e } else { p.x + p.e < q.x - q.e };
                let moved = if wins(a, b) {
                    a.e
                } else if wins(b, a) {
                    b.e
                } else {
                    a.e.max(b.e)
                };
                bound(x, moved)
            }
            Lt | Le | Gt | Ge | Eq | Ne => bound(x, flip(e > 0.0 && (a.x - b.x).abs() <= e)),
            And => {
                let no = |p: Bound| p.x == 0.0 && p.e == 0.0;
                bound(x, flip(e > 0.0 && !no(a) && !no(b)))
            }
            Or => {
                let yes = |p: Bound| p.x != 0.0 && p.e == 0.0;
                bound(x, flip(e > 0.0 && !yes(a) && !yes(b)))
            }
        }
    }

    fn cast(&mut self, to: DType, a: Bound) -> Bound {
        let x = to.round(a.x);
        if a.e == 0.0 || !to.is_float() {
            // Rounding to a discrete type is monotone.
            return bound(x, swing(|t| to.round(t), a));
        }
        bound(x, a.e + to.ulp(a.x.abs() + a.e))
    }

    /// A derived form rounds operands at its own scale (P = e^(s−m) where the text has P/ΣP), where the same value may lie
    /// anywhere between two powers of two: a rounding adds up to u·|x|, not half the spacing at x.
    fn operand(&mut self, to: DType, a: Bound) -> Bound {
        let relative = if a.x.is_finite() { to.unit_roundoff() * (a.x.abs() + a.e) } else { 0.0 };
        bound(a.x, a.e + narrowed(to, a).max(relative))
    }

    fn store(&mut self, to: DType, ty: Ty, a: Bound) -> Bound {
        match (to, ty) {
            (_, Ty::Int) if to.is_float() => bound(a.x, a.e + narrowed(to, a)),
            (DType::F32, Ty::F32) | (DType::F64, _) => a,
            _ if to.is_float() => bound(a.x, a.e + narrowed(to, a)),
            _ => bound(to.round(a.x), swing(|t| to.round(t), a)),
        }
    }

    fn store_block(&mut self, to: DType, scale: DType, block: &mut [Bound]) {
        let reach = block.iter().fold(0.0f64, |m, v| m.max(v.x.abs() + v.e));
        // Half a spacing of the largest element; a scale rounded down saturates by its relative error.
        let unit = if to.is_float() { to.unit_roundoff() } else { 0.5 / to.max_finite() };
        let moved =
            reach * (unit * (1.0 + scale.unit_roundoff()) + scale.unit_roundoff()) + scale.ulp(0.0) * to.max_finite();
        block.iter_mut().for_each(|v| *v = bound(v.x, v.e + moved));
    }
    fn truth(&mut self, a: Bound) -> bool {
        self.uncertain |= a.e > 0.0;
        a.x != 0.0
    }
    fn position(&mut self, a: Bound) -> i64 {
        self.uncertain |= a.e > 0.0;
        a.x as i64
    }
    fn absent(&mut self, a: Bound) {
        self.uncertain |= a.e > 0.0;
    }
    fn nothing(&mut self) -> Bound {
        bound(0.0, 0.0)
    }
    fn settle(&mut self, a: Bound) -> Bound {
        if self.uncertain { bound(a.x, f64::INFINITY) } else { a }
    }
    fn start(&mut self) {
        self.uncertain = false;
    }

    fn accumulator(&self) -> BoundAcc {
        BoundAcc::default()
    }
    fn begin(&mut self, acc: &mut BoundAcc, op: ReduceOp) {
        let items = std::mem::take(&mut acc.items);
        let x = op.identity();
        let worst = worst(op);
        *acc =
            BoundAcc { x, low: x, high: x, place: -1, exact_rival: worst, rival: worst, items, ..BoundAcc::default() };
    }

    fn add(&mut self, acc: &mut BoundAcc, op: ReduceOp, v: Bound, place: i64) {
        acc.n += 1;
        match op {
            ReduceOp::Sum => {
                acc.x += v.x;
                acc.e += v.e;
                acc.magnitude += v.x.abs() + v.e;
            }
            ReduceOp::Product => {
                acc.e = times(acc.x, v.e) + times(v.x, acc.e) + times(acc.e, v.e);
                acc.x *= v.x;
            }
            ReduceOp::Min | ReduceOp::Max => {
                acc.x = op.combine(acc.x, v.x);
                acc.low = op.combine(acc.low, v.x - v.e);
                acc.high = op.combine(acc.high, v.x + v.e);
            }
            ReduceOp::LogSumExp => {
                add_exp(&mut acc.x, &mut acc.scaled, v.x);
                acc.e = acc.e.max(v.e);
            }
            ReduceOp::Any | ReduceOp::All => {
                let joined = if op == ReduceOp::Any { BinaryOp::Or } else { BinaryOp::And };
                let j = self.binary(joined, Ty::Int, bound(acc.x, acc.e), v);
                (acc.x, acc.e) = (j.x, j.e);
            }
            ReduceOp::ArgMin | ReduceOp::ArgMax => {
                acc.e = acc.e.max(v.e);
                let toward = if op == ReduceOp::ArgMin { -1.0 } else { 1.0 };
                let rival = |acc: &mut BoundAcc, x: f64, e: f64| {
                    let reach = x + toward * e;
                    let slot = if e == 0.0 { &mut acc.exact_rival } else { &mut acc.rival };
                    if reach.is_nan() || better(op, reach, *slot) {
                        *slot = reach;
                    }
                };
                if acc.place < 0 {
                    (acc.best, acc.best_e, acc.place) = (v.x, v.e, place);
                } else if better(op, v.x, acc.best) || (same(v.x, acc.best) && place < acc.place) {
                    let (x, e) = (acc.best, acc.best_e);
                    rival(acc, x, e);
                    (acc.best, acc.best_e, acc.place) = (v.x, v.e, place);
                } else {
                    rival(acc, v.x, v.e);
                }
            }
        }
    }

    fn total(&mut self, acc: &mut BoundAcc, op: ReduceOp, ty: Ty) -> Bound {
        match op {
            ReduceOp::Sum => {
                let e = if acc.n <= 1 { acc.e } else { acc.e + times(acc.magnitude, gamma(acc.n, ty)) };
                bound(acc.x, if acc.x.is_finite() || e.is_infinite() { e } else { 0.0 })
            }
            ReduceOp::Product => bound(acc.x, acc.e + times(acc.x.abs() + acc.e, gamma(acc.n, ty))),
            ReduceOp::Min | ReduceOp::Max => {
                let d = |y: f64| if y == acc.x { 0.0 } else { (y - acc.x).abs() };
                bound(acc.x, d(acc.low).max(d(acc.high)))
            }
            ReduceOp::LogSumExp => {
                let x = total_exp(acc.x, acc.scaled);
                if !x.is_finite() {
                    return bound(x, acc.e);
                }
                // Terms are exp of differences, each with ulps relative to its exponent's size; the logarithm turns
                // relative error into absolute.
                let terms = gamma(acc.n + 2, ty) + 2.0 * UnaryOp::Exp.ulps() * rounding(ty, 1.0);
                let exponents = rounding(ty, 128.0);
                bound(x, acc.e + terms + exponents + (2.0 * UnaryOp::Log.ulps() + 2.0) * rounding(ty, x.abs().max(1.0)))
            }
            ReduceOp::Any | ReduceOp::All => bound(acc.x, acc.e),
            ReduceOp::ArgMin | ReduceOp::ArgMax => {
                let toward = if op == ReduceOp::ArgMin { 1.0 } else { -1.0 };
                let worst = acc.best + toward * acc.best_e;
                let reaches = |r: f64| acc.n > 1 && (same(r, worst) || better(op, r, worst));
                let flips = reaches(acc.rival) && acc.rival.is_finite()
                    || acc.rival.is_nan()
                    || (acc.best_e > 0.0 && reaches(acc.exact_rival));
                bound(acc.place as f64, if flips { f64::INFINITY } else { 0.0 })
            }
        }
    }

    fn best(&mut self, acc: &BoundAcc, op: ReduceOp) -> Bound {
        if acc.place < 0 {
            return bound(worst(op), 0.0);
        }
        // The extremum moves at most as far as any candidate.
        bound(acc.best, acc.e)
    }
    fn begin_top(&mut self, acc: &mut BoundAcc) {
        acc.items.clear();
    }
    fn add_top(&mut self, acc: &mut BoundAcc, v: Bound, place: i64) {
        acc.items.push((v.x, v.e, place));
    }
    fn total_top(&mut self, acc: &mut BoundAcc, values: &mut [Bound], places: &mut [Bound]) {
        acc.items.sort_by(|p, q| descending(p.0, q.0).then(p.2.cmp(&q.2)));
        // Order statistics move at most as far as the candidate that moves most.
        let worst = acc.items.iter().fold(0.0f64, |w, i| w.max(i.1));
        let near = |i: usize, j: usize| match (acc.items.get(i), acc.items.get(j)) {
            (Some(p), Some(q)) => worst > 0.0 && (p.0 - q.0).abs() <= 2.0 * worst,
            _ => false,
        };
        for i in 0..values.len() {
            match acc.items.get(i) {
                Some((x, e, at)) => {
                    let swaps = near(i, i + 1) || (i > 0 && near(i - 1, i));
                    values[i] = bound(*x, if swaps { worst } else { *e });
                    places[i] = bound(*at as f64, if swaps { f64::INFINITY } else { 0.0 });
                }
                None => {
                    values[i] = bound(f64::NEG_INFINITY, 0.0);
                    places[i] = bound(-1.0, 0.0);
                }
            }
        }
    }

    fn combine(&mut self, op: ReduceOp, ty: Ty, a: Bound, b: Bound) -> Bound {
        let op = match op {
            ReduceOp::Sum => BinaryOp::Add,
            ReduceOp::Product => BinaryOp::Mul,
            ReduceOp::Min | ReduceOp::ArgMin => BinaryOp::Min,
            ReduceOp::Max | ReduceOp::ArgMax => BinaryOp::Max,
            ReduceOp::Any => BinaryOp::Or,
            ReduceOp::All => BinaryOp::And,
            ReduceOp::LogSumExp => {
                let mut acc = self.accumulator();
                self.begin(&mut acc, op);
                self.add(&mut acc, op, a, 0);
                self.add(&mut acc, op, b, 1);
                return self.total(&mut acc, op, ty);
            }
        };
        // The neutral element joins without rounding.
        let exact = a.e == 0.0 && a.x == ReduceOp::Sum.identity() && op == BinaryOp::Add;
        if exact { bound(a.x + b.x, b.e) } else { self.binary(op, ty, a, b) }
    }
}

/// γₙ = nu/(1−nu); infinite once nu reaches 1.
fn gamma(n: u64, ty: Ty) -> f64 {
    let nu = n as f64 * rounding(ty, 1.0);
    if nu < 1.0 { nu / (1.0 - nu) } else { f64::INFINITY }
}

/// What rounding to `to` may add.
fn narrowed(to: DType, a: Bound) -> f64 {
    if !a.x.is_finite() {
        return 0.0;
    }
    let reach = a.x.abs() + a.e;
    if reach > to.max_finite() && a.x.abs() <= to.max_finite() {
        return f64::INFINITY;
    }
    // Half the spacing, also among the subnormals.
    0.5 * to.ulp(reach)
}

/// How far a power moves.
fn power(a: Bound, b: Bound, x: f64) -> f64 {
    if a.e == 0.0 && b.e == 0.0 {
        return 0.0;
    }
    let whole = b.e == 0.0 && b.x == b.x.trunc();
    if a.x - a.e > 0.0 {
        // Extremes of a positive base stand at the corners.
        let corners = [a.x - a.e, a.x + a.e].map(|p| [b.x - b.e, b.x + b.e].map(|q| (p.powf(q) - x).abs()));
        corners.iter().flatten().fold(0.0, |w, d| w.max(*d))
    } else if whole && b.x >= 1.0 {
        (a.x.abs() + a.e).powf(b.x) - a.x.abs().powf(b.x)
    } else {
        f64::INFINITY
    }
}
