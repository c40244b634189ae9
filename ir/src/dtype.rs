//! Element types: sizes, ranges and exact rounding.
//!
//! Invariant: [`DType::round`] is round-to-nearest-even into the type, computed from float64.

use std::fmt;

/// The type of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum DType {
    F64,
    F32,
    /// f32 with a 10-bit mantissa; stored in 32 bits.
    Tf32,
    F16,
    BF16,
    /// OCP FP8 E4M3 (finite, saturating on cast; NaN 0x7f).
    F8E4M3,
    /// OCP FP8 E5M2.
    F8E5M2,
    I64,
    I32,
    I8,
    U8,
    /// Signed 4 bits; two to a byte in a declared order.
    I4,
    Bool,
    /// Unsigned 4 bits, packed as [`DType::I4`] is.
    U4,
}

/// What a type can hold: one row a type.
struct Facts {
    name: &'static str,
    bits: u32,
    /// Explicit mantissa bits; 0 for integers.
    mantissa: i32,
    /// Exponent of the largest finite value's leading bit.
    max_exp: i32,
    /// Exponent of the smallest normal value.
    min_exp: i32,
    /// Largest finite value.
    max: f64,
}

impl DType {
    /// Every type, widest first.
    pub const ALL: [DType; 14] = [
        DType::F64,
        DType::F32,
        DType::Tf32,
        DType::F16,
        DType::BF16,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::I64,
        DType::I32,
        DType::I8,
        DType::U8,
        DType::I4,
        DType::U4,
        DType::Bool,
    ];

    fn facts(self) -> Facts {
        let f = |name, bits, mantissa, max_exp, min_exp, max| Facts { name, bits, mantissa, max_exp, min_exp, max };
        match self {
            DType::F64 => f("f64", 64, 52, 1023, -1022, f64::MAX),
            DType::F32 => f("f32", 32, 23, 127, -126, f32::MAX as f64),
            DType::Tf32 => f("tf32", 32, 10, 127, -126, (2.0 - 2f64.powi(-10)) * 2f64.powi(127)),
            DType::F16 => f("f16", 16, 10, 15, -14, 65504.0),
            DType::BF16 => f("bf16", 16, 7, 127, -126, (2.0 - 2f64.powi(-7)) * 2f64.powi(127)),
            DType::F8E4M3 => f("f8e4m3", 8, 3, 8, -6, 448.0),
            DType::F8E5M2 => f("f8e5m2", 8, 2, 15, -14, 57344.0),
            DType::I64 => f("i64", 64, 0, 63, 0, i64::MAX as f64),
            DType::I32 => f("i32", 32, 0, 31, 0, i32::MAX as f64),
            DType::I8 => f("i8", 8, 0, 7, 0, 127.0),
            DType::U8 => f("u8", 8, 0, 8, 0, 255.0),
            DType::I4 => f("i4", 4, 0, 3, 0, 7.0),
            DType::U4 => f("u4", 4, 0, 4, 0, 15.0),
            DType::Bool => f("bool", 8, 0, 1, 0, 1.0),
        }
    }

    /// Its spelling in every text form.
    pub fn name(self) -> &'static str {
        self.facts().name
    }

    /// The type with this spelling.
    pub fn from_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.name() == name)
    }

    /// Storage bits of one element (a bool takes a byte).
    pub fn bits(self) -> u32 {
        self.facts().bits
    }

    /// Storage bytes of `elems` elements, rounded up.
    pub fn bytes(self, elems: u64) -> u64 {
        (elems * u64::from(self.bits())).div_ceil(8)
    }

    /// Whether two elements share a byte, in an order that a tensor declares.
    pub fn is_packed(self) -> bool {
        self.bits() < 8
    }

    /// Whether it is a floating-point type.
    pub fn is_float(self) -> bool {
        self.facts().mantissa > 0
    }

    /// Whether it is an integer type (bool is not).
    pub fn is_int(self) -> bool {
        !self.is_float() && self != DType::Bool
    }

    /// Unit roundoff u of round-to-nearest: half an ulp at 1, e.g. 2⁻²⁴ for f32; 0 for integers.
    pub fn unit_roundoff(self) -> f64 {
        let m = self.facts().mantissa;
        if m == 0 { 0.0 } else { 2f64.powi(-(m + 1)) }
    }

    /// Largest finite value.
    pub fn max_finite(self) -> f64 {
        self.facts().max
    }

    /// Smallest finite value: the negated maximum for floats.
    pub fn min_finite(self) -> f64 {
        match self {
            DType::I64 => i64::MIN as f64,
            DType::I32 => i32::MIN as f64,
            DType::I8 => -128.0,
            DType::I4 => -8.0,
            DType::U8 | DType::U4 | DType::Bool => 0.0,
            DType::F64 | DType::F32 | DType::Tf32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => {
                -self.max_finite()
            }
        }
    }

    /// The spacing of values of this type around `x` (the subnormal spacing near 0); 1 for integers, 0 for f64 NaN.
    pub fn ulp(self, x: f64) -> f64 {
        let facts = self.facts();
        if facts.mantissa == 0 {
            return 1.0;
        }
        let exp =
            if x == 0.0 || !x.is_finite() { facts.min_exp } else { exponent(x).clamp(facts.min_exp, facts.max_exp) };
        power_of_two(exp - facts.mantissa)
    }

    /// `x` rounded to this type, ties to even. Floats overflow to infinity, except [`DType::F8E4M3`], which
    /// saturates as it has none; integers truncate towards zero and saturate, NaN gives 0; bool is `x != 0`.
    pub fn round(self, x: f64) -> f64 {
        let facts = self.facts();
        match self {
            DType::F64 => x,
            DType::Bool => f64::from(x != 0.0),
            DType::I64 | DType::I32 | DType::I8 | DType::U8 | DType::I4 | DType::U4 => {
                if x.is_nan() {
                    0.0
                } else {
                    x.trunc().clamp(self.min_finite(), self.max_finite())
                }
            }
            DType::F32 => f64::from(x as f32),
            DType::Tf32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => {
                if x == 0.0 || x.is_nan() {
                    return x;
                }
                if x.is_infinite() {
                    return if self == DType::F8E4M3 { facts.max.copysign(x) } else { x };
                }
                let ulp = self.ulp(x);
                // Dividing by a power of two is exact unless it underflows, which float64's range rules out here.
                // The quotient is below 2^51, beyond which a sum with 1.5 · 2^52 would not be rounded to a whole number.
                const WHOLE: f64 = (3u64 << 51) as f64;
                let r = (((x / ulp) + WHOLE - WHOLE) * ulp).copysign(x);
                if r.abs() <= facts.max {
                    r
                } else if self == DType::F8E4M3 {
                    facts.max.copysign(x)
                } else {
                    f64::INFINITY.copysign(x)
                }
            }
        }
    }
}

/// 2 to a power that float64 has.
fn power_of_two(exp: i32) -> f64 {
    f64::from_bits(if exp >= -1022 { ((exp + 1023) as u64) << 52 } else { 1 << (exp + 1074) })
}

/// Floor of log2 |x| for finite non-zero x.
fn exponent(x: f64) -> i32 {
    let bits = ((x.to_bits() >> 52) & 0x7ff) as i32;
    if bits == 0 { -1074 + (63 - (x.to_bits() & ((1 << 52) - 1)).leading_zeros() as i32) } else { bits - 1023 }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_matches_hardware_types() {
        let mut x = 1.234_567_890_123e-7_f64;
        for _ in 0..4000 {
            x *= -1.0173;
            assert_eq!(DType::F32.round(x), x as f32 as f64, "{x}");
            assert_eq!(DType::BF16.round(x), half::bf16::from_f64(x).to_f64(), "{x}");
            assert_eq!(DType::F16.round(x), half::f16::from_f64(x).to_f64(), "{x}");
        }
        for x in [1e-40, 3e-45, 65519.9, 65520.0, 1e39, f64::INFINITY] {
            assert_eq!(DType::F32.round(x), x as f32 as f64, "{x}");
            assert_eq!(DType::F16.round(x), half::f16::from_f64(x).to_f64(), "{x}");
        }
        assert_eq!(DType::BF16.round(-1e-45).to_bits(), (-0.0_f64).to_bits());
        assert_eq!([DType::F64.ulp(0.0), DType::F64.ulp(1.0)], [f64::from_bits(1), f64::EPSILON]);
        assert_eq!(DType::F8E4M3.round(1000.0), 448.0);
        assert_eq!(DType::I8.round(-3.7), -3.0);
        assert_eq!([DType::I4.round(9.0), DType::I4.round(-9.0)], [7.0, -8.0]);
        assert_eq!([DType::U4.round(16.0), DType::U4.round(-1.0)], [15.0, 0.0]);
        assert_eq!(DType::I32.round(f64::NAN), 0.0);
    }

    #[test]
    fn names_round_trip() {
        for d in DType::ALL {
            assert_eq!(DType::from_name(d.name()), Some(d));
        }
    }
}
