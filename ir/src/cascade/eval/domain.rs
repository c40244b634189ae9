//! The arithmetic an evaluation runs in: what a value is and what each operation does to it.
//!
//! One traversal, several domains: plain float64 ([`Plain`]), float64 with a worst-case error bound
//! ([`super::bound::Bounded`]) and a randomised simulation of the declared types ([`super::declared::Declared`]).
//! Invariant: the float64 part of every deterministic domain is the same; indices are exact in all of them.

use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

/// The type an operation computes in. Stored narrower floats compute in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ty {
    /// Integers and booleans: exact.
    Int,
    /// Accumulates and rounds in f32.
    F32,
    /// Some operand is f64.
    F64,
}

impl Ty {
    /// The type an element of `dtype` computes in.
    pub fn of(dtype: DType) -> Ty {
        match dtype {
            DType::F64 => Ty::F64,
            DType::F32 | DType::Tf32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => Ty::F32,
            DType::I64 | DType::I32 | DType::I8 | DType::U8 | DType::I4 | DType::U4 | DType::Bool => Ty::Int,
        }
    }

    /// The type of a value combined from both.
    pub fn join(self, other: Ty) -> Ty {
        match (self, other) {
            (Ty::F64, _) | (_, Ty::F64) => Ty::F64,
            (Ty::F32, _) | (_, Ty::F32) => Ty::F32,
            (Ty::Int, Ty::Int) => Ty::Int,
        }
    }

    /// At least f32.
    pub fn float(self) -> Ty {
        self.join(Ty::F32)
    }

    /// Unit roundoff of one operation.
    pub fn unit(self) -> f64 {
        match self {
            Ty::Int => 0.0,
            Ty::F32 => DType::F32.unit_roundoff(),
            Ty::F64 => DType::F64.unit_roundoff(),
        }
    }
}

/// An arithmetic.
pub trait Domain {
    /// A scalar.
    type Value: Copy + std::fmt::Debug;
    /// The state of one reduction in progress.
    type Acc: Clone;

    /// An exact value: a literal, an index, an input element.
    fn exact(&self, x: f64) -> Self::Value;
    /// The float64 part.
    fn center(v: Self::Value) -> f64;
    /// A scalar function.
    fn unary(&mut self, op: UnaryOp, ty: Ty, a: Self::Value) -> Self::Value;
    /// A scalar function of two arguments.
    fn binary(&mut self, op: BinaryOp, ty: Ty, a: Self::Value, b: Self::Value) -> Self::Value;
    /// A written conversion.
    fn cast(&mut self, to: DType, a: Self::Value) -> Self::Value;
    /// A default rounding point: an operand of a contraction that may be rounded to `to`.
    fn operand(&mut self, to: DType, a: Self::Value) -> Self::Value;
    /// A value computed in `ty` and stored in a tensor of type `to`.
    fn store(&mut self, to: DType, ty: Ty, a: Self::Value) -> Self::Value;
    /// Stores one block of a block-scaled tensor: elements of type `to`, one scale of type `scale`, chosen so that the
    /// largest magnitude takes the largest finite element.
    fn store_block(&mut self, to: DType, scale: DType, block: &mut [Self::Value]);
    /// A condition that steers control flow.
    fn truth(&mut self, a: Self::Value) -> bool;
    /// A position in a tensor.
    fn position(&mut self, a: Self::Value) -> i64;
    /// Notes that a point is left out because `a` is absent.
    fn absent(&mut self, a: Self::Value);
    /// The value of an absent element.
    fn nothing(&mut self) -> Self::Value;
    /// A value that leaves a point: carries the uncertainty of the control flow that led to it.
    fn settle(&mut self, a: Self::Value) -> Self::Value;
    /// Forgets the uncertainty of control flow: called before each point.
    fn start(&mut self);

    /// A fresh accumulator.
    fn accumulator(&self) -> Self::Acc;
    /// Empties `acc`.
    fn begin(&mut self, acc: &mut Self::Acc, op: ReduceOp);
    /// Joins an element that stands at `place`.
    fn add(&mut self, acc: &mut Self::Acc, op: ReduceOp, v: Self::Value, place: i64);
    /// The joined value so far.
    fn total(&mut self, acc: &mut Self::Acc, op: ReduceOp, ty: Ty) -> Self::Value;
    /// The value an argument selection has selected; the identity of the matching extremum when there is none.
    fn best(&mut self, acc: &Self::Acc, op: ReduceOp) -> Self::Value;
    /// Empties `acc` for a top-k selection.
    fn begin_top(&mut self, acc: &mut Self::Acc);
    /// Offers a candidate.
    fn add_top(&mut self, acc: &mut Self::Acc, v: Self::Value, place: i64);
    /// The `values.len()` largest in descending order, ties to the lowest position; −∞ and −1 where missing.
    fn total_top(&mut self, acc: &mut Self::Acc, values: &mut [Self::Value], places: &mut [Self::Value]);
    /// Two partial values joined, for running reductions of operators that select no argument.
    fn combine(&mut self, op: ReduceOp, ty: Ty, a: Self::Value, b: Self::Value) -> Self::Value;

    /// Sum of products of two strided rows, if the domain has a fast path: `(a, stride, b, stride, count)`.
    fn dot(
        &mut self,
        _a: (&[Self::Value], usize, i64),
        _b: (&[Self::Value], usize, i64),
        _n: u64,
    ) -> Option<Self::Value> {
        None
    }
}

/// Plain float64.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

/// A reduction in float64.
#[derive(Clone, Debug, Default)]
pub struct PlainAcc {
    /// The joined value, or the best one of an argument selection, or the maximum of a log-sum-exp.
    value: f64,
    /// Σ exp(x − value) of a log-sum-exp.
    scaled: f64,
    /// The position of the best value; −1 when there is none.
    place: i64,
    items: Vec<(f64, i64)>,
}

impl Domain for Plain {
    type Value = f64;
    type Acc = PlainAcc;

    #[inline(always)]
    fn exact(&self, x: f64) -> f64 {
        x
    }
    #[inline(always)]
    fn center(v: f64) -> f64 {
        v
    }
    #[inline(always)]
    fn unary(&mut self, op: UnaryOp, _: Ty, a: f64) -> f64 {
        op.eval(a)
    }
    #[inline(always)]
    fn binary(&mut self, op: BinaryOp, ty: Ty, a: f64, b: f64) -> f64 {
        op.eval(a, b, ty == Ty::Int)
    }
    fn cast(&mut self, to: DType, a: f64) -> f64 {
        to.round(a)
    }
    #[inline(always)]
    fn operand(&mut self, _: DType, a: f64) -> f64 {
        a
    }
    #[inline(always)]
    fn store(&mut self, to: DType, ty: Ty, a: f64) -> f64 {
        if to.is_float() || (ty == Ty::Int && to != DType::Bool && a.abs() <= to.max_finite()) {
            a
        } else {
            to.round(a)
        }
    }
    fn store_block(&mut self, _: DType, _: DType, _: &mut [f64]) {}
    #[inline(always)]
    fn truth(&mut self, a: f64) -> bool {
        a != 0.0
    }
    #[inline(always)]
    fn position(&mut self, a: f64) -> i64 {
        a as i64
    }
    #[inline(always)]
    fn absent(&mut self, _: f64) {}
    fn nothing(&mut self) -> f64 {
        0.0
    }
    #[inline(always)]
    fn settle(&mut self, a: f64) -> f64 {
        a
    }
    #[inline(always)]
    fn start(&mut self) {}

    fn accumulator(&self) -> PlainAcc {
        PlainAcc::default()
    }
    #[inline(always)]
    fn begin(&mut self, acc: &mut PlainAcc, op: ReduceOp) {
        acc.value = op.identity();
        acc.scaled = 0.0;
        acc.place = -1;
    }
    #[inline(always)]
    fn add(&mut self, acc: &mut PlainAcc, op: ReduceOp, v: f64, place: i64) {
        match op {
            ReduceOp::Sum => acc.value += v,
            ReduceOp::Product | ReduceOp::Min | ReduceOp::Max | ReduceOp::Any | ReduceOp::All => {
                acc.value = op.combine(acc.value, v);
            }
            ReduceOp::LogSumExp => add_exp(&mut acc.value, &mut acc.scaled, v),
            ReduceOp::ArgMin | ReduceOp::ArgMax => {
                if acc.place < 0 || better(op, v, acc.value) || (same(v, acc.value) && place < acc.place) {
                    acc.value = v;
                    acc.place = place;
                }
            }
        }
    }
    fn total(&mut self, acc: &mut PlainAcc, op: ReduceOp, _: Ty) -> f64 {
        match op {
            ReduceOp::LogSumExp => total_exp(acc.value, acc.scaled),
            ReduceOp::ArgMin | ReduceOp::ArgMax => acc.place as f64,
            ReduceOp::Sum | ReduceOp::Product | ReduceOp::Min | ReduceOp::Max | ReduceOp::Any | ReduceOp::All => {
                acc.value
            }
        }
    }
    fn best(&mut self, acc: &PlainAcc, op: ReduceOp) -> f64 {
        if acc.place < 0 { worst(op) } else { acc.value }
    }
    fn begin_top(&mut self, acc: &mut PlainAcc) {
        acc.items.clear();
    }
    fn add_top(&mut self, acc: &mut PlainAcc, v: f64, place: i64) {
        acc.items.push((v, place));
    }
    fn total_top(&mut self, acc: &mut PlainAcc, values: &mut [f64], places: &mut [f64]) {
        acc.items.sort_by(|x, y| descending(x.0, y.0).then(x.1.cmp(&y.1)));
        for (i, (v, p)) in values.iter_mut().zip(places).enumerate() {
            let (x, at) = acc.items.get(i).copied().unwrap_or((f64::NEG_INFINITY, -1));
            *v = x;
            *p = at as f64;
        }
    }
    fn combine(&mut self, op: ReduceOp, _: Ty, a: f64, b: f64) -> f64 {
        op.combine(a, b)
    }

    #[inline]
    fn dot(&mut self, a: (&[f64], usize, i64), b: (&[f64], usize, i64), n: u64) -> Option<f64> {
        let ((xs, x0, dx), (ys, y0, dy)) = (a, b);
        if n == 0 {
            return Some(0.0);
        }
        let mut sum = 0.0;
        if dx == 1 && dy == 1 {
            let n = n as usize;
            for (x, y) in xs[x0..x0 + n].iter().zip(&ys[y0..y0 + n]) {
                sum += x * y;
            }
        } else {
            let (mut i, mut j) = (x0 as i64, y0 as i64);
            for _ in 0..n {
                sum += xs[i as usize] * ys[j as usize];
                i += dx;
                j += dy;
            }
        }
        Some(sum)
    }
}

/// Joins `v` to a running log-sum-exp kept as maximum and scaled sum.
pub(super) fn add_exp(max: &mut f64, scaled: &mut f64, v: f64) {
    if v.is_nan() || max.is_nan() {
        *max = f64::NAN;
    } else if v == f64::NEG_INFINITY {
        // Adds exp(−∞) = 0.
    } else if v > *max {
        let keep = if *max == f64::NEG_INFINITY { 0.0 } else { *scaled * (*max - v).exp() };
        *scaled = keep + 1.0;
        *max = v;
    } else {
        // Equal infinities add without a difference.
        *scaled += if v == *max { 1.0 } else { (v - *max).exp() };
    }
}

/// The value of a running log-sum-exp.
pub(super) fn total_exp(max: f64, scaled: f64) -> f64 {
    if max.is_infinite() || max.is_nan() { max } else { max + scaled.ln() }
}

/// Whether `v` beats `best`; a NaN beats every number.
pub(super) fn better(op: ReduceOp, v: f64, best: f64) -> bool {
    match (v.is_nan(), best.is_nan()) {
        (true, nan) => !nan,
        (false, true) => false,
        (false, false) => {
            if op == ReduceOp::ArgMin {
                v < best
            } else {
                v > best
            }
        }
    }
}

/// Whether the values tie; NaNs tie.
pub(super) fn same(a: f64, b: f64) -> bool {
    a == b || (a.is_nan() && b.is_nan())
}

/// Descending order with NaN first.
pub(super) fn descending(a: f64, b: f64) -> std::cmp::Ordering {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => std::cmp::Ordering::Equal,
        (true, false) => std::cmp::Ordering::Less,
        (false, true) => std::cmp::Ordering::Greater,
        (false, false) => b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal),
    }
}

/// What an empty argument selection has as its value.
pub(super) fn worst(op: ReduceOp) -> f64 {
    if op == ReduceOp::ArgMin { f64::INFINITY } else { f64::NEG_INFINITY }
}

/// The scale of a block whose largest magnitude is `largest`.
pub(super) fn block_scale(to: DType, scale: DType, largest: f64) -> f64 {
    scale.round(largest / to.max_finite())
}
