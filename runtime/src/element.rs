//! Stored bytes of elements ↔ their logical values.
//!
//! Invariant: encoding rounds as [`DType::round`] does; decoding is exact (but i64 beyond ±2⁵³). Source of the 8-bit
//! floats: OCP 8-bit Floating Point Specification 1.0, tables 1 and 2.

use crate::array::ArrayError;
use einfall_ir::dtype::DType;
use half::{bf16, f16};

/// Exponent bias and mantissa bits of an 8-bit float.
fn small_float(dtype: DType) -> (i32, u32) {
    if dtype == DType::F8E4M3 { (7, 3) } else { (15, 2) }
}

/// The value of an 8-bit float's code.
fn decode_small(dtype: DType, code: u8) -> f64 {
    let (bias, mantissa_bits) = small_float(dtype);
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let mantissa = f64::from(code & ((1 << mantissa_bits) - 1));
    let exponent = i32::from((code & 0x7f) >> mantissa_bits);
    let magnitude = match dtype {
        DType::F8E4M3 if code & 0x7f == 0x7f => f64::NAN,
        DType::F8E5M2 if exponent == 31 && mantissa != 0.0 => f64::NAN,
        DType::F8E5M2 if exponent == 31 => f64::INFINITY,
        _ if exponent == 0 => mantissa * 2f64.powi(1 - bias - mantissa_bits as i32),
        _ => (1.0 + mantissa / f64::from(1u32 << mantissa_bits)) * 2f64.powi(exponent - bias),
    };
    sign * magnitude
}

/// The code of a value that is representable.
fn encode_small(dtype: DType, value: f64) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    // Magnitudes are monotone in the code, NaN last.
    let codes = 0..=0x7fu8;
    let same = |code: &u8| {
        let v = decode_small(dtype, *code);
        v == value.abs() || (v.is_nan() && value.is_nan())
    };
    sign | codes.into_iter().find(same).unwrap_or(0x7f)
}

/// Writes `values`, rounded, as little-endian elements. `bytes` holds exactly as many.
pub(crate) fn encode(dtype: DType, values: &[f64], bytes: &mut [u8]) -> Result<(), ArrayError> {
    fn fill<const N: usize>(bytes: &mut [u8], values: &[f64], f: impl Fn(f64) -> [u8; N]) {
        bytes.chunks_exact_mut(N).zip(values).for_each(|(chunk, v)| chunk.copy_from_slice(&f(*v)));
    }
    let round = |v: f64| dtype.round(v);
    match dtype {
        DType::F64 => fill(bytes, values, f64::to_le_bytes),
        DType::F32 | DType::Tf32 => fill(bytes, values, |v| (round(v) as f32).to_le_bytes()),
        DType::F16 => fill(bytes, values, |v| f16::from_f64(v).to_le_bytes()),
        DType::BF16 => fill(bytes, values, |v| bf16::from_f64(v).to_le_bytes()),
        DType::F8E4M3 | DType::F8E5M2 => fill(bytes, values, |v| [encode_small(dtype, round(v))]),
        DType::I64 => fill(bytes, values, |v| (v as i64).to_le_bytes()),
        DType::I32 => fill(bytes, values, |v| (v as i32).to_le_bytes()),
        DType::I8 => fill(bytes, values, |v| (v as i8).to_le_bytes()),
        DType::U8 => fill(bytes, values, |v| [v as u8]),
        DType::Bool => fill(bytes, values, |v| [u8::from(v != 0.0)]),
        DType::I4 | DType::U4 => return Err(ArrayError::Packed { dtype }),
    }
    Ok(())
}

/// The values of little-endian elements.
pub(crate) fn decode(dtype: DType, bytes: &[u8]) -> Result<Vec<f64>, ArrayError> {
    fn read<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        bytes.as_chunks::<N>().0.iter().map(|chunk| f(*chunk)).collect()
    }
    Ok(match dtype {
        DType::F64 => read(bytes, f64::from_le_bytes),
        DType::F32 | DType::Tf32 => read(bytes, |b| f64::from(f32::from_le_bytes(b))),
        DType::F16 => read(bytes, |b| f16::from_le_bytes(b).to_f64()),
        DType::BF16 => read(bytes, |b| bf16::from_le_bytes(b).to_f64()),
        DType::F8E4M3 | DType::F8E5M2 => read(bytes, |[b]| decode_small(dtype, b)),
        DType::I64 => read(bytes, |b| i64::from_le_bytes(b) as f64),
        DType::I32 => read(bytes, |b| f64::from(i32::from_le_bytes(b))),
        DType::I8 => read(bytes, |b| f64::from(i8::from_le_bytes(b))),
        DType::U8 => read(bytes, |[b]| f64::from(b)),
        DType::Bool => read(bytes, |[b]| f64::from(u8::from(b != 0))),
        DType::I4 | DType::U4 => return Err(ArrayError::Packed { dtype }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_floats_are_those_of_the_specification() {
        assert_eq!(decode_small(DType::F8E4M3, 0x7e), 448.0);
        assert_eq!(decode_small(DType::F8E4M3, 0x01), 2f64.powi(-9));
        assert_eq!(decode_small(DType::F8E5M2, 0x7b), 57344.0);
        assert_eq!(decode_small(DType::F8E5M2, 0x01), 2f64.powi(-16));
        assert_eq!(decode_small(DType::F8E5M2, 0xfc), f64::NEG_INFINITY);
        for dtype in [DType::F8E4M3, DType::F8E5M2] {
            for code in 0..=255u8 {
                let value = decode_small(dtype, code);
                if value.is_nan() {
                    assert!(decode_small(dtype, encode_small(dtype, value)).is_nan());
                } else {
                    assert_eq!(dtype.round(value), value, "{dtype} {code:#x}");
                    assert_eq!(encode_small(dtype, value), code, "{dtype} {value}");
                }
            }
        }
    }
}
