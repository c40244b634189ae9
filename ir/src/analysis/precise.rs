//! Scalars at 120 digits with infinities and NaN: what cross-checks of derivations compute in.
//!
//! Invariant: no operation panics; what has no value is NaN. The finite part is `dashu-float` at 400 bits.

use std::cmp::Ordering;

use dashu_float::FBig;
use dashu_float::round::mode::HalfEven;

use crate::dtype::DType;
use crate::ops::{BinaryOp, UnaryOp};

/// Binary digits carried: 120 decimal ones.
pub const BITS: usize = 400;
type Big = FBig<HalfEven, 2>;

/// A number of the extended reals.
#[derive(Clone, Debug)]
pub enum Num {
    /// Finite.
    Finite(Big),
    /// ±∞; true for +∞.
    Infinite(bool),
    /// No number.
    Nan,
}

use Num::{Finite, Infinite, Nan};

fn big(x: f64) -> Big {
    Big::try_from(x).expect("finite").with_precision(BITS).value()
}

impl Num {
    /// The exact value of a float.
    pub fn of(x: f64) -> Num {
        if x.is_nan() {
            Nan
        } else if x.is_infinite() {
            Infinite(x > 0.0)
        } else {
            Finite(big(x))
        }
    }

    /// The quotient of two integers.
    pub fn ratio(n: i64, d: i64) -> Num {
        Num::of(n as f64).div(&Num::of(d as f64))
    }

    /// The nearest float64.
    pub fn to_f64(&self) -> f64 {
        match self {
            Finite(x) => x.to_f64().value(),
            Infinite(up) => {
                if *up {
                    f64::INFINITY
                } else {
                    f64::NEG_INFINITY
                }
            }
            Nan => f64::NAN,
        }
    }

    fn sign(&self) -> i32 {
        match self {
            Finite(x) if *x == big(0.0) => 0,
            Finite(x) => {
                if *x > big(0.0) {
                    1
                } else {
                    -1
                }
            }
            Infinite(up) => {
                if *up {
                    1
                } else {
                    -1
                }
            }
            Nan => 0,
        }
    }

    /// Whether it is 0.
    pub fn is_zero(&self) -> bool {
        matches!(self, Finite(_)) && self.sign() == 0
    }

    /// −x.
    pub fn neg(&self) -> Num {
        match self {
            Finite(x) => Finite(-x.clone()),
            Infinite(up) => Infinite(!up),
            Nan => Nan,
        }
    }

    /// x + y.
    pub fn add(&self, o: &Num) -> Num {
        match (self, o) {
            (Finite(a), Finite(b)) => Finite(a.clone() + b.clone()),
            (Infinite(a), Infinite(b)) if a != b => Nan,
            (Infinite(a), Finite(_) | Infinite(_)) | (Finite(_), Infinite(a)) => Infinite(*a),
            (Nan, _) | (_, Nan) => Nan,
        }
    }

    /// x − y.
    pub fn sub(&self, o: &Num) -> Num {
        self.add(&o.neg())
    }

    /// x · y.
    pub fn mul(&self, o: &Num) -> Num {
        match (self, o) {
            (Finite(a), Finite(b)) => Finite(a.clone() * b.clone()),
            (Nan, _) | (_, Nan) => Nan,
            _ => match self.sign() * o.sign() {
                0 => Nan,
                s => Infinite(s > 0),
            },
        }
    }

    /// x / y; division by 0 follows IEEE 754 with an unsigned zero.
    pub fn div(&self, o: &Num) -> Num {
        match (self, o) {
            (Nan, _) | (_, Nan) | (Infinite(_), Infinite(_)) => Nan,
            (Finite(_), Infinite(_)) => Num::of(0.0),
            (Infinite(up), Finite(_)) => Infinite(*up == (o.sign() >= 0)),
            (Finite(a), Finite(b)) => match (self.sign(), o.sign()) {
                (0, 0) => Nan,
                (s, 0) => Infinite(s > 0),
                _ => Finite(a.clone() / b.clone()),
            },
        }
    }

    /// e^x.
    pub fn exp(&self) -> Num {
        match self {
            Finite(x) => {
                let f = self.to_f64();
                if f > 1e6 {
                    Infinite(true)
                } else if f < -1e6 {
                    Num::of(0.0)
                } else {
                    Finite(x.exp())
                }
            }
            Infinite(true) => Infinite(true),
            Infinite(false) => Num::of(0.0),
            Nan => Nan,
        }
    }

    /// ln x.
    pub fn ln(&self) -> Num {
        match self {
            Infinite(true) => Infinite(true),
            Finite(x) => match self.sign() {
                0 => Infinite(false),
                1 => Finite(x.ln()),
                _ => Nan,
            },
            Infinite(false) | Nan => Nan,
        }
    }

    /// x^y for a rational y = n/d.
    pub fn pow(&self, n: i64, d: i64) -> Num {
        let one = Num::of(1.0);
        if n < 0 {
            return one.div(&self.pow(-n, d));
        }
        if d == 1 && n <= 64 {
            return (0..n).fold(one, |acc, _| acc.mul(self));
        }
        if d == 2 {
            let root = match self {
                Finite(x) if self.sign() > 0 => Finite(x.sqrt()),
                Finite(_) if self.sign() == 0 => Num::of(0.0),
                Infinite(true) => Infinite(true),
                Finite(_) | Infinite(false) | Nan => Nan,
            };
            return root.pow(n, 1);
        }
        if self.is_zero() { Num::of(0.0) } else { self.ln().mul(&Num::ratio(n, d)).exp() }
    }

    /// The order of two numbers; none with NaN.
    pub fn compare(&self, o: &Num) -> Option<Ordering> {
        if matches!(self, Nan) || matches!(o, Nan) {
            return None;
        }
        if let (Infinite(a), Infinite(b)) = (self, o) {
            return Some(a.cmp(b));
        }
        Some(self.sub(o).sign().cmp(&0))
    }

    /// The larger; NaN wins.
    pub fn max(&self, o: &Num) -> Num {
        match self.compare(o) {
            None => Nan,
            Some(Ordering::Less) => o.clone(),
            Some(_) => self.clone(),
        }
    }

    /// The smaller; NaN wins.
    pub fn min(&self, o: &Num) -> Num {
        self.neg().max(&o.neg()).neg()
    }

    /// |x|.
    pub fn abs(&self) -> Num {
        if self.sign() < 0 { self.neg() } else { self.clone() }
    }

    /// The value rounded to a type.
    pub fn cast(&self, dtype: DType) -> Num {
        match dtype {
            DType::F64 | DType::F32 => self.clone(),
            _ => Num::of(dtype.round(self.to_f64())),
        }
    }

    /// A scalar function. Rounding functions go through float64; sin, cos and erf keep float64's digits.
    pub fn unary(&self, op: UnaryOp) -> Num {
        let one = Num::of(1.0);
        match op {
            UnaryOp::Neg => self.neg(),
            UnaryOp::Abs => self.abs(),
            UnaryOp::Exp => self.exp(),
            UnaryOp::Exp2 => self.mul(&Num::of(2.0).ln()).exp(),
            UnaryOp::Log => self.ln(),
            UnaryOp::Log2 => self.ln().div(&Num::of(2.0).ln()),
            UnaryOp::Log1p => one.add(self).ln(),
            UnaryOp::Sqrt => self.pow(1, 2),
            UnaryOp::Rsqrt => one.div(&self.pow(1, 2)),
            UnaryOp::Recip => one.div(self),
            UnaryOp::Sigmoid => one.div(&one.add(&self.neg().exp())),
            UnaryOp::Tanh => {
                let d = one.add(&self.mul(&Num::of(2.0)).exp());
                one.sub(&Num::of(2.0).div(&d))
            }
            UnaryOp::Sin
            | UnaryOp::Cos
            | UnaryOp::Erf
            | UnaryOp::Floor
            | UnaryOp::Ceil
            | UnaryOp::Round
            | UnaryOp::Sign
            | UnaryOp::Not => Num::of(op.eval(self.to_f64())),
        }
    }

    /// A scalar function of two arguments.
    pub fn binary(&self, op: BinaryOp, o: &Num, integer: bool) -> Num {
        let truth = |b: bool| Num::of(f64::from(b));
        let order = self.compare(o);
        match op {
            BinaryOp::Add => self.add(o),
            BinaryOp::Sub => self.sub(o),
            BinaryOp::Mul => self.mul(o),
            BinaryOp::Div if !integer => self.div(o),
            BinaryOp::Div | BinaryOp::Mod => Num::of(op.eval(self.to_f64(), o.to_f64(), integer)),
            BinaryOp::Pow => {
                let y = o.to_f64();
                if (2.0 * y).fract() == 0.0 && y.abs() < 32.0 {
                    if y.fract() == 0.0 { self.pow(y as i64, 1) } else { self.pow((2.0 * y) as i64, 2) }
                } else {
                    self.ln().mul(o).exp()
                }
            }
            BinaryOp::Min => self.min(o),
            BinaryOp::Max => self.max(o),
            BinaryOp::Lt => truth(order == Some(Ordering::Less)),
            BinaryOp::Le => truth(matches!(order, Some(Ordering::Less | Ordering::Equal))),
            BinaryOp::Gt => truth(order == Some(Ordering::Greater)),
            BinaryOp::Ge => truth(matches!(order, Some(Ordering::Greater | Ordering::Equal))),
            BinaryOp::Eq => truth(order == Some(Ordering::Equal)),
            BinaryOp::Ne => truth(order != Some(Ordering::Equal)),
            BinaryOp::And => truth(!self.is_zero() && !o.is_zero()),
            BinaryOp::Or => truth(!self.is_zero() || !o.is_zero()),
        }
    }

    /// Whether two numbers agree to `digits` decimal digits, relative to `scale` (and both NaN or one infinity).
    pub fn agrees(&self, o: &Num, digits: i32, scale: f64) -> bool {
        match (self, o) {
            (Nan, Nan) => true,
            (Infinite(a), Infinite(b)) => a == b,
            (Finite(_), Finite(_)) => {
                let size = self.abs().max(&o.abs()).max(&Num::of(scale));
                let tolerance = (0..digits).fold(size, |t, _| t.div(&Num::of(10.0)));
                self.sub(o).abs().compare(&tolerance) != Some(Ordering::Greater)
            }
            _ => false,
        }
    }
}

/// A reproducible stream of numbers in (0, 1) (SplitMix64).
#[derive(Clone, Debug)]
pub struct Stream(pub u64);

impl Stream {
    /// The next one.
    pub fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64 + 1e-17
    }

    /// The next one, in (low, high).
    pub fn within(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elementary_functions_carry_120_digits() {
        let x = Num::ratio(7, 3);
        let back = x.exp().ln();
        assert!(back.agrees(&x, 115, 0.0));
        assert!(x.pow(1, 2).pow(2, 1).agrees(&x, 115, 0.0));
        assert!(!Num::of(1.0).agrees(&Num::of(1.0 + 1e-15), 20, 0.0));
    }

    #[test]
    fn nothing_panics() {
        let all = [0.0, 1.0, -1.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 1e300];
        for a in all {
            for op in UnaryOp::ALL {
                Num::of(a).unary(op);
            }
            for b in all {
                for op in BinaryOp::ALL {
                    let (x, y) = (Num::of(a).binary(op, &Num::of(b), false).to_f64(), op.eval(a, b, false));
                    if a.abs() < 2.0 && b.abs() < 2.0 && b != 0.0 && y.is_finite() {
                        assert!((x - y).abs() < 1e-12, "{op:?} {a} {b}: {x} {y}");
                    }
                }
            }
        }
    }
}
