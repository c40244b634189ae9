//! A randomised simulation of the declared types: one admissible evaluation.
//!
//! Every operation rounds to its compute type, sums run in a random order, intrinsics are perturbed by up to their
//! ulps, operands of contractions round to the narrowest stored type, stores to their type. Rounding is stochastic, to
//! explore what roundings may add up to, or to nearest, as devices do. Invariant: a value that a type holds exactly
//! stays exact; the same seed gives the same evaluation.

use super::domain::{Domain, Ty, add_exp, better, block_scale, descending, same, worst};
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

/// The simulated arithmetic.
#[derive(Clone, Debug)]
pub struct Declared {
    state: u64,
    rounding: Rounding,
}

/// Which of the two neighbours a rounding takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// Either, with the probability of its nearness.
    Stochastic,
    /// The nearest, ties to even.
    Nearest,
}

/// A simulated reduction in progress.
#[derive(Clone, Debug, Default)]
pub struct DeclaredAcc {
    values: Vec<f64>,
    best: f64,
    place: i64,
    items: Vec<(f64, i64)>,
}

impl Declared {
    /// A simulation drawn by `seed`.
    pub fn new(seed: u64, rounding: Rounding) -> Declared {
        Declared { rounding, state: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03 }
    }

    /// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    #[inline]
    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [−1, 1).
    #[inline]
    fn signed(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * 2f64.powi(-52) - 1.0
    }

    /// One stochastic rounding in `ty`.
    #[inline]
    fn rounded(&mut self, ty: Ty, x: f64) -> f64 {
        match ty {
            Ty::Int => x,
            Ty::F32 if self.rounding == Rounding::Nearest => f64::from(x as f32),
            Ty::F32 => {
                if !x.is_finite() {
                    return x;
                }
                // Adding random bits below the f32 mantissa and truncating rounds up with the right probability.
                const BELOW: u64 = (1 << 29) - 1;
                let r = f64::from_bits((x.to_bits() + (self.bits() & BELOW)) & !BELOW);
                if r.abs() > DType::F32.max_finite() { f64::INFINITY.copysign(x) } else { r }
            }
            Ty::F64 => {
                if x.is_finite() && x != x.trunc() {
                    x * (1.0 + self.signed() * ty.unit())
                } else {
                    x
                }
            }
        }
    }

    /// One stochastic rounding to a stored type.
    pub(crate) fn stored(&mut self, to: DType, x: f64) -> f64 {
        match to {
            DType::F64 => x,
            DType::F32 => self.rounded(Ty::F32, x),
            _ if !to.is_float() || self.rounding == Rounding::Nearest => to.round(x),
            _ => {
                if !x.is_finite() || x.abs() >= to.max_finite() {
                    return to.round(x);
                }
                let ulp = to.ulp(x);
                let (down, part) = ((x / ulp).floor(), x / ulp - (x / ulp).floor());
                let up = ((self.bits() >> 11) as f64 * 2f64.powi(-53)) < part;
                to.round((down + f64::from(up)) * ulp)
            }
        }
    }

    /// `x` with a relative error of up to `ulps` ulps of `ty`.
    fn perturbed(&mut self, ty: Ty, x: f64, ulps: f64) -> f64 {
        if ulps == 0.0 || !x.is_finite() {
            return x;
        }
        let extra = (ulps - 0.5).max(0.0);
        let x = if extra > 0.0 { x * (1.0 + self.signed() * 2.0 * extra * ty.unit()) } else { x };
        self.rounded(ty, x)
    }
}

impl Domain for Declared {
    type Value = f64;
    type Acc = DeclaredAcc;

    #[inline(always)]
    fn exact(&self, x: f64) -> f64 {
        x
    }
    #[inline(always)]
    fn center(v: f64) -> f64 {
        v
    }
    fn unary(&mut self, op: UnaryOp, ty: Ty, a: f64) -> f64 {
        let x = op.eval(a);
        // exp(0), log(1), tanh(0) and the like come out exact on every backend.
        if x == x.trunc() && a == a.trunc() { x } else { self.perturbed(ty, x, op.ulps()) }
    }
    #[inline]
    fn binary(&mut self, op: BinaryOp, ty: Ty, a: f64, b: f64) -> f64 {
        let x = op.eval(a, b, ty == Ty::Int);
        match op {
            BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Mod => self.rounded(ty, x),
            BinaryOp::Div if ty == Ty::Int => x,
            BinaryOp::Div => self.perturbed(ty, x, 2.0),
            BinaryOp::Pow => self.perturbed(ty, x, 16.0),
            BinaryOp::Min
            | BinaryOp::Max
            | BinaryOp::Lt
            | BinaryOp::Le
            | BinaryOp::Gt
            | BinaryOp::Ge
            | BinaryOp::Eq
            | BinaryOp::Ne
            | BinaryOp::And
            | BinaryOp::Or => x,
        }
    }
    fn cast(&mut self, to: DType, a: f64) -> f64 {
        // A written conversion rounds to nearest.
        to.round(a)
    }
    fn operand(&mut self, to: DType, a: f64) -> f64 {
        self.stored(to, a)
    }
    fn store(&mut self, to: DType, ty: Ty, a: f64) -> f64 {
        if ty == Ty::F32 && to == DType::F32 { a } else { self.stored(to, a) }
    }
    fn store_block(&mut self, to: DType, scale: DType, block: &mut [f64]) {
        let largest = block.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let scale = block_scale(to, scale, largest);
        if scale == 0.0 || !scale.is_finite() {
            return;
        }
        for v in block {
            // Integer elements are rounded to nearest before they are stored.
            let stored = if to.is_float() {
                let held = (*v / scale).clamp(to.min_finite(), to.max_finite());
                self.stored(to, held)
            } else {
                to.round((*v / scale).round_ties_even())
            };
            *v = stored * scale;
        }
    }
    #[inline(always)]
    fn truth(&mut self, a: f64) -> bool {
        a != 0.0
    }
    #[inline(always)]
    fn position(&mut self, a: f64) -> i64 {
        a as i64
    }
    fn absent(&mut self, _: f64) {}
    fn nothing(&mut self) -> f64 {
        0.0
    }
    fn settle(&mut self, a: f64) -> f64 {
        a
    }
    fn start(&mut self) {}

    fn accumulator(&self) -> DeclaredAcc {
        DeclaredAcc::default()
    }
    fn begin(&mut self, acc: &mut DeclaredAcc, _: ReduceOp) {
        acc.values.clear();
        acc.place = -1;
    }
    fn add(&mut self, acc: &mut DeclaredAcc, op: ReduceOp, v: f64, place: i64) {
        if op.selects_argument() {
            if acc.place < 0 || better(op, v, acc.best) || (same(v, acc.best) && place < acc.place) {
                (acc.best, acc.place) = (v, place);
            }
        } else {
            acc.values.push(v);
        }
    }
    fn total(&mut self, acc: &mut DeclaredAcc, op: ReduceOp, ty: Ty) -> f64 {
        match op {
            ReduceOp::ArgMin | ReduceOp::ArgMax => acc.place as f64,
            ReduceOp::Sum | ReduceOp::Product => {
                let mut total = op.identity();
                for i in (0..acc.values.len()).rev() {
                    let j = (self.bits() % (i as u64 + 1)) as usize;
                    acc.values.swap(i, j);
                    total = self.rounded(ty, op.combine(total, acc.values[i]));
                }
                total
            }
            ReduceOp::Min | ReduceOp::Max | ReduceOp::Any | ReduceOp::All => {
                acc.values.iter().fold(op.identity(), |t, v| op.combine(t, *v))
            }
            ReduceOp::LogSumExp => {
                let max = acc.values.iter().fold(f64::NEG_INFINITY, |m, v| ReduceOp::Max.combine(m, *v));
                if !max.is_finite() {
                    let (mut m, mut s) = (f64::NEG_INFINITY, 0.0);
                    acc.values.iter().for_each(|v| add_exp(&mut m, &mut s, *v));
                    return m;
                }
                let mut total = 0.0;
                for i in (0..acc.values.len()).rev() {
                    let j = (self.bits() % (i as u64 + 1)) as usize;
                    acc.values.swap(i, j);
                    let d = self.rounded(ty, acc.values[i] - max);
                    let term = self.unary(UnaryOp::Exp, ty, d);
                    total = self.rounded(ty, total + term);
                }
                let log = self.unary(UnaryOp::Log, ty, total);
                self.rounded(ty, max + log)
            }
        }
    }
    fn best(&mut self, acc: &DeclaredAcc, op: ReduceOp) -> f64 {
        if acc.place < 0 { worst(op) } else { acc.best }
    }
    fn begin_top(&mut self, acc: &mut DeclaredAcc) {
        acc.items.clear();
    }
    fn add_top(&mut self, acc: &mut DeclaredAcc, v: f64, place: i64) {
        acc.items.push((v, place));
    }
    fn total_top(&mut self, acc: &mut DeclaredAcc, values: &mut [f64], places: &mut [f64]) {
        acc.items.sort_by(|p, q| descending(p.0, q.0).then(p.1.cmp(&q.1)));
        for (i, (v, p)) in values.iter_mut().zip(places).enumerate() {
            let (x, at) = acc.items.get(i).copied().unwrap_or((f64::NEG_INFINITY, -1));
            (*v, *p) = (x, at as f64);
        }
    }
    fn combine(&mut self, op: ReduceOp, ty: Ty, a: f64, b: f64) -> f64 {
        match op {
            ReduceOp::Sum | ReduceOp::Product => self.rounded(ty, op.combine(a, b)),
            ReduceOp::LogSumExp => {
                let x = op.combine(a, b);
                self.perturbed(ty, x, UnaryOp::Exp.ulps() + UnaryOp::Log.ulps())
            }
            ReduceOp::Min | ReduceOp::Max | ReduceOp::Any | ReduceOp::All | ReduceOp::ArgMin | ReduceOp::ArgMax => {
                op.combine(a, b)
            }
        }
    }
}
