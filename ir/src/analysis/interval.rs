//! Intervals of canonical expressions: the proof that an exponent is bounded, so a constant anchor stays in range.
//!
//! Sound for the real value of an expression whatever its inputs hold, apart from NaN; dependencies between terms are
//! lost except in e^x/(e^x+1), which is a sigmoid.

use std::collections::BTreeMap;

use super::symbolic::{Atom, AtomId, Mono, PolyId, Rat, Symbols};
use crate::cascade::{Reducer, TensorId};
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

/// A closed interval of the extended reals.
pub type Interval = (f64, f64);

const ALL: Interval = (f64::NEG_INFINITY, f64::INFINITY);

/// e^±this times 2^31 elements stays within float32.
pub const SAFE_EXPONENT: f64 = 60.0;

/// Whether e^p summed over any fiber stays within float32 and does not vanish.
pub fn exponent_is_safe(s: &Symbols, p: PolyId, params: &BTreeMap<TensorId, Interval>) -> bool {
    let (lo, hi) = poly(s, p, params);
    lo >= -SAFE_EXPONENT && hi <= SAFE_EXPONENT
}

/// The interval of a sum.
pub fn poly(s: &Symbols, p: PolyId, params: &BTreeMap<TensorId, Interval>) -> Interval {
    let terms = &s.poly(p).terms;
    // A factor that all terms share multiplies their sum.
    let mut shared: Vec<(AtomId, Rat)> = Vec::new();
    if terms.len() > 1 {
        shared = terms.keys().next().map(|m| m.factors.clone()).unwrap_or_default();
        shared.retain(|f| terms.keys().all(|m| m.factors.contains(f)));
    }
    let mut sum = (0.0, 0.0);
    for (m, c) in terms {
        let c = c.to_f64().value();
        let mut m = m.clone();
        m.factors.retain(|f| !shared.contains(f));
        let t = times(mono(s, &m, params), (c, c));
        sum = (sum.0 + t.0, sum.1 + t.1);
    }
    if !shared.is_empty() {
        sum = times(sum, mono(s, &Mono { exp: None, factors: shared }, params));
    }
    if sum.0.is_nan() || sum.1.is_nan() { ALL } else { sum }
}

fn times(a: Interval, b: Interval) -> Interval {
    let product = |x: f64, y: f64| if x == 0.0 || y == 0.0 { 0.0 } else { x * y };
    let all = [product(a.0, b.0), product(a.0, b.1), product(a.1, b.0), product(a.1, b.1)];
    (all.iter().copied().fold(f64::INFINITY, f64::min), all.iter().copied().fold(f64::NEG_INFINITY, f64::max))
}

/// The argument x when `p` = 1 + e^x.
pub fn one_plus_exp(s: &Symbols, p: PolyId) -> Option<PolyId> {
    let terms = &s.poly(p).terms;
    let one = terms.get(&Mono::default())?;
    let (m, c) = terms.iter().find(|(m, _)| m.exp.is_some())?;
    (terms.len() == 2 && one.is_one() && c.is_one() && m.factors.is_empty()).then_some(m.exp).flatten()
}

fn mono(s: &Symbols, m: &Mono, params: &BTreeMap<TensorId, Interval>) -> Interval {
    let mut exp = m.exp;
    let mut out = (1.0, 1.0);
    for (a, q) in &m.factors {
        if let (Atom::Base(p), true) = (s.atom(*a), *q == Rat::NEG_ONE)
            && one_plus_exp(s, *p).is_some_and(|x| exp == Some(x))
        {
            exp = None;
            out = times(out, (0.0, 1.0));
            continue;
        }
        let q = q.to_f64().value();
        let (lo, hi) = atom(s, *a, params);
        let f = if q.fract() == 0.0 && (q as i64) % 2 == 0 && q > 0.0 {
            let (x, y) = (lo.abs().powf(q), hi.abs().powf(q));
            (if lo <= 0.0 && hi >= 0.0 { 0.0 } else { x.min(y) }, x.max(y))
        } else if lo >= 0.0 {
            let (x, y) = (lo.powf(q), hi.powf(q));
            (x.min(y), x.max(y))
        } else if q == 1.0 {
            (lo, hi)
        } else {
            ALL
        };
        out = times(out, f);
    }
    if let Some(e) = exp {
        let (lo, hi) = poly(s, e, params);
        out = times(out, (lo.exp(), hi.exp()));
    }
    out
}

fn atom(s: &Symbols, a: AtomId, params: &BTreeMap<TensorId, Interval>) -> Interval {
    let of = |p: &PolyId| poly(s, *p, params);
    match s.atom(a) {
        Atom::Read(t, _) => {
            params.get(t).copied().unwrap_or(if s.positive.contains(t) { (0.0, f64::INFINITY) } else { ALL })
        }
        Atom::Var(_) | Atom::Extent(_) => (0.0, f64::INFINITY),
        Atom::Scale(_) => (0.0, f64::INFINITY),
        Atom::Base(p) => of(p),
        Atom::Log(p) => {
            let (lo, hi) = of(p);
            if lo >= 0.0 { (lo.ln(), hi.ln()) } else { ALL }
        }
        Atom::Unary(op, p) => match op {
            UnaryOp::Sin | UnaryOp::Cos | UnaryOp::Erf | UnaryOp::Sign => (-1.0, 1.0),
            UnaryOp::Floor | UnaryOp::Ceil | UnaryOp::Round => {
                let (lo, hi) = of(p);
                (lo.floor(), hi.ceil())
            }
            UnaryOp::Abs => {
                let (lo, hi) = of(p);
                (0.0, lo.abs().max(hi.abs()))
            }
            UnaryOp::Not => (0.0, 1.0),
            UnaryOp::Neg
            | UnaryOp::Exp
            | UnaryOp::Exp2
            | UnaryOp::Log
            | UnaryOp::Log2
            | UnaryOp::Log1p
            | UnaryOp::Sqrt
            | UnaryOp::Rsqrt
            | UnaryOp::Recip
            | UnaryOp::Tanh
            | UnaryOp::Sigmoid => ALL,
        },
        Atom::Binary(op, x, y) => {
            let (a, b) = (of(x), of(y));
            match op {
                BinaryOp::Max => (a.0.max(b.0), a.1.max(b.1)),
                BinaryOp::Min => (a.0.min(b.0), a.1.min(b.1)),
                op if op.is_predicate() => (0.0, 1.0),
                _ => ALL,
            }
        }
        Atom::Select(_, x, y) => {
            let (a, b) = (of(x), of(y));
            (a.0.min(b.0), a.1.max(b.1))
        }
        Atom::Cast(_, p) => {
            // Rounding to nearest moves a value by less than its own size.
            let (lo, hi) = of(p);
            (lo * if lo < 0.0 { 1.1 } else { 0.9 }, hi * if hi < 0.0 { 0.9 } else { 1.1 })
        }
        Atom::Reduce { op, part, body, .. } => match op {
            Reducer::Op(ReduceOp::Max | ReduceOp::Min) if *part == 0 => {
                let (lo, hi) = of(&body[0]);
                if *op == Reducer::Op(ReduceOp::Max) { (f64::NEG_INFINITY, hi) } else { (lo, f64::INFINITY) }
            }
            Reducer::Op(ReduceOp::Sum) => {
                let (lo, hi) = of(&body[0]);
                (if lo >= 0.0 { 0.0 } else { f64::NEG_INFINITY }, if hi <= 0.0 { 0.0 } else { f64::INFINITY })
            }
            _ => ALL,
        },
        Atom::Rand(..) => (0.0, 1.0),
        Atom::FloorDiv(..) | Atom::Scan(..) | Atom::Segment(..) | Atom::ScaleLog(_) | Atom::Slot(_) => ALL,
        Atom::Infinity => (f64::INFINITY, f64::INFINITY),
        Atom::Nan => ALL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tanh_and_sigmoid_are_bounded() {
        let mut s = Symbols::new();
        let x = s.of_atom(Atom::Slot(0));
        let none = BTreeMap::new();
        let t = s.unary(UnaryOp::Tanh, x);
        assert_eq!(poly(&s, t, &none), (-1.0, 1.0));
        let g = s.unary(UnaryOp::Sigmoid, x);
        assert_eq!(poly(&s, g, &none), (0.0, 1.0));
        let thirty = s.integer(30);
        let cap = s.mul(thirty, t);
        assert!(exponent_is_safe(&s, cap, &none));
        assert!(!exponent_is_safe(&s, x, &none));
        let far = s.scale(cap, &Rat::from(3));
        assert!(!exponent_is_safe(&s, far, &none));
    }
}
