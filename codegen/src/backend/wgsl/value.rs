//! Values of expressions: WGSL text with its class, and what is known of integers.
//!
//! Invariant: a value's text may stand anywhere an operand may: it is a name, a literal, a call or in parentheses.

use std::fmt::Write as _;

/// The class of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Ty {
    /// `i32`.
    Int,
    /// `f32`.
    Float,
    /// `bool`.
    Bool,
}

impl Ty {
    /// Its WGSL type.
    pub(super) fn name(self) -> &'static str {
        match self {
            Ty::Int => "i32",
            Ty::Float => "f32",
            Ty::Bool => "bool",
        }
    }
}

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Val {
    pub(super) s: String,
    pub(super) ty: Ty,
    /// The value of a float literal.
    pub(super) k: Option<f64>,
    /// Least and largest value of an integer or bool.
    pub(super) lo: i64,
    pub(super) hi: i64,
}

impl Val {
    /// An integer literal.
    pub(super) fn int(n: i64) -> Val {
        let s = match n {
            -2_147_483_648 => "(-2147483647 - 1)".to_string(),
            n if n < 0 => format!("({n})"),
            n => n.to_string(),
        };
        Val { s, ty: Ty::Int, k: None, lo: n, hi: n }
    }

    /// An integer of which a range is known.
    pub(super) fn ranged(s: impl Into<String>, lo: i64, hi: i64) -> Val {
        Val { s: s.into(), ty: Ty::Int, k: None, lo, hi }
    }

    /// Any value.
    pub(super) fn new(ty: Ty, s: impl Into<String>) -> Val {
        let (lo, hi) = match ty {
            Ty::Bool => (0, 1),
            Ty::Int | Ty::Float => (i64::from(i32::MIN), i64::from(i32::MAX)),
        };
        Val { s: s.into(), ty, k: None, lo, hi }
    }

    /// A float literal, rounded to f32.
    pub(super) fn float(x: f64) -> Val {
        Val { k: Some(f64::from(x as f32)), ..Val::new(Ty::Float, float_text(x as f32)) }
    }

    /// A bool literal.
    pub(super) fn bool(b: bool) -> Val {
        Val { s: b.to_string(), ty: Ty::Bool, k: None, lo: i64::from(b), hi: i64::from(b) }
    }

    /// The value of an integer or bool that is known.
    pub(super) fn known(&self) -> Option<i64> {
        (self.ty != Ty::Float && self.lo == self.hi).then_some(self.lo)
    }
}

/// An f32 as WGSL: exact, in hexadecimal; infinities and NaN, which literals cannot be, by their bits at run time.
pub(super) fn float_text(x: f32) -> String {
    if !x.is_finite() {
        let name = if x.is_nan() { "nan()" } else { "infinity()" };
        return if x == f32::NEG_INFINITY { format!("(-{name})") } else { name.to_string() };
    }
    if x == 0.0 {
        return if x.is_sign_negative() { "(-0.0)" } else { "0.0" }.to_string();
    }
    if x.fract() == 0.0 && x.abs() < 1e6 {
        return if x < 0.0 { format!("({x:.1})") } else { format!("{x:.1}") };
    }
    let bits = x.to_bits();
    let (mut exponent, mut mantissa) = ((bits >> 23 & 0xFF) as i32 - 127, bits & 0x7F_FFFF);
    if exponent == -127 {
        // A subnormal, as a normal number of more exponent bits.
        let shift = mantissa.leading_zeros() - 8;
        mantissa = mantissa << shift & 0x7F_FFFF;
        exponent = -126 - shift as i32;
    }
    let mut s = String::new();
    let sign = if x < 0.0 { "-" } else { "" };
    let _ = write!(s, "{sign}0x1.{:06x}p{exponent}f", mantissa << 1);
    if x < 0.0 { format!("({s})") } else { s }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_exact() {
        for (x, text) in [
            (1.5f32, "0x1.800000p0f"),
            (-0.1, "(-0x1.99999ap-4f)"),
            (3.0, "3.0"),
            (f32::MIN_POSITIVE, "0x1.000000p-126f"),
            (f32::from_bits(1), "0x1.000000p-149f"),
            (f32::from_bits(3), "0x1.800000p-148f"),
            (f32::MAX, "0x1.fffffep127f"),
            (f32::NEG_INFINITY, "(-infinity())"),
        ] {
            assert_eq!(float_text(x), text);
        }
    }
}
