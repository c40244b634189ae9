//! Operations on values of all invocations, as WGSL defines them for 32 bits.
//!
//! Invariant: an operation that is not here is an error, never a guess.

use std::rc::Rc;

use naga::{BinaryOperator, Literal, MathFunction, ScalarKind, UnaryOperator};

use super::{Data, Res};

pub fn literal(l: &Literal) -> Res<(ScalarKind, u32)> {
    Ok(match *l {
        Literal::F32(x) => (ScalarKind::Float, x.to_bits()),
        Literal::F16(x) => (ScalarKind::Float, x.to_f32().to_bits()),
        Literal::U32(x) => (ScalarKind::Uint, x),
        Literal::I32(x) => (ScalarKind::Sint, x as u32),
        Literal::Bool(b) => (ScalarKind::Bool, u32::from(b)),
        other => return Err(format!("the literal {other:?}")),
    })
}

fn map(d: &Data, kind: ScalarKind, f: impl Fn(u32) -> u32) -> Data {
    Data { kind, n: d.n, bits: d.bits.iter().map(|x| f(*x)).collect() }
}

fn float(f: impl Fn(f32) -> f32) -> impl Fn(u32) -> u32 {
    move |x| f(f32::from_bits(x)).to_bits()
}

pub fn unary(op: UnaryOperator, x: &Data) -> Res<Data> {
    Ok(match (op, x.kind) {
        (UnaryOperator::Negate, ScalarKind::Float) => map(x, x.kind, float(|v| -v)),
        (UnaryOperator::Negate, ScalarKind::Sint) => map(x, x.kind, |v| (v as i32).wrapping_neg() as u32),
        (UnaryOperator::LogicalNot, ScalarKind::Bool) => map(x, x.kind, |v| u32::from(v == 0)),
        (UnaryOperator::BitwiseNot, ScalarKind::Sint | ScalarKind::Uint) => map(x, x.kind, |v| !v),
        (op, kind) => return Err(format!("{op:?} of {kind:?}")),
    })
}

pub fn binary(op: BinaryOperator, a: &Data, b: &Data) -> Res<Data> {
    use BinaryOperator as B;
    let n = a.n.max(b.n);
    let lanes = a.bits.len() / a.n;
    let at = |d: &Data, i: usize, c: usize| d.bits[i * d.n + if d.n == 1 { 0 } else { c }];
    let compares = matches!(op, B::Equal | B::NotEqual | B::Less | B::LessEqual | B::Greater | B::GreaterEqual);
    let kind = if compares { ScalarKind::Bool } else { a.kind };
    let one: Box<dyn Fn(u32, u32) -> u32> = match (a.kind, op) {
        (ScalarKind::Float, op) => {
            let f: fn(f32, f32) -> u32 = match op {
                B::Add => |x, y| (x + y).to_bits(),
                B::Subtract => |x, y| (x - y).to_bits(),
                B::Multiply => |x, y| (x * y).to_bits(),
                B::Divide => |x, y| (x / y).to_bits(),
                B::Equal => |x, y| u32::from(x == y),
                B::NotEqual => |x, y| u32::from(x != y),
                B::Less => |x, y| u32::from(x < y),
                B::LessEqual => |x, y| u32::from(x <= y),
                B::Greater => |x, y| u32::from(x > y),
                B::GreaterEqual => |x, y| u32::from(x >= y),
                other => return Err(format!("{other:?} of floats")),
            };
            Box::new(move |x, y| f(f32::from_bits(x), f32::from_bits(y)))
        }
        (ScalarKind::Sint, op) => {
            let f: fn(i32, i32) -> i32 = match op {
                B::Add => i32::wrapping_add,
                B::Subtract => i32::wrapping_sub,
                B::Multiply => i32::wrapping_mul,
                B::Divide => |x, y| if y == 0 { x } else { x.wrapping_div(y) },
                B::Modulo => |x, y| if y == 0 { 0 } else { x.wrapping_rem(y) },
                B::Equal => |x, y| i32::from(x == y),
                B::NotEqual => |x, y| i32::from(x != y),
                B::Less => |x, y| i32::from(x < y),
                B::LessEqual => |x, y| i32::from(x <= y),
                B::Greater => |x, y| i32::from(x > y),
                B::GreaterEqual => |x, y| i32::from(x >= y),
                B::And => |x, y| x & y,
                B::InclusiveOr => |x, y| x | y,
                B::ExclusiveOr => |x, y| x ^ y,
                B::ShiftLeft => |x, y| x.wrapping_shl(y as u32),
                B::ShiftRight => |x, y| x.wrapping_shr(y as u32),
                other => return Err(format!("{other:?} of integers")),
            };
            Box::new(move |x, y| f(x as i32, y as i32) as u32)
        }
        (ScalarKind::Uint | ScalarKind::Bool, op) => {
            let f: fn(u32, u32) -> u32 = match op {
                B::Add => u32::wrapping_add,
                B::Subtract => u32::wrapping_sub,
                B::Multiply => u32::wrapping_mul,
                B::Divide => |x, y| x.checked_div(y).unwrap_or(x),
                B::Modulo => |x, y| x.checked_rem(y).unwrap_or(0),
                B::Equal => |x, y| u32::from(x == y),
                B::NotEqual => |x, y| u32::from(x != y),
                B::Less => |x, y| u32::from(x < y),
                B::LessEqual => |x, y| u32::from(x <= y),
                B::Greater => |x, y| u32::from(x > y),
                B::GreaterEqual => |x, y| u32::from(x >= y),
                B::And | B::LogicalAnd => |x, y| x & y,
                B::InclusiveOr | B::LogicalOr => |x, y| x | y,
                B::ExclusiveOr => |x, y| x ^ y,
                B::ShiftLeft => u32::wrapping_shl,
                B::ShiftRight => u32::wrapping_shr,
            };
            Box::new(f)
        }
        (kind, op) => return Err(format!("{op:?} of {kind:?}")),
    };
    let bits = (0..lanes).flat_map(|i| (0..n).map(move |c| (i, c))).map(|(i, c)| one(at(a, i, c), at(b, i, c)));
    Ok(Data { kind, n, bits: bits.collect() })
}

/// A number of 16 bits as one of 32.
fn half(bits: u32) -> u32 {
    let (exponent, mantissa) = (bits >> 10 & 31, bits & 1023);
    let x = match exponent {
        0 => mantissa as f32 * 2f32.powi(-24),
        31 if mantissa == 0 => f32::INFINITY,
        31 => f32::NAN,
        e => (1024 + mantissa) as f32 * 2f32.powi(e as i32 - 25),
    };
    if bits & 0x8000 == 0 { x } else { -x }.to_bits()
}

/// The bits of the half nearest to a number, ties to even.
fn half_bits(x: f32) -> u32 {
    let sign = x.to_bits() >> 16 & 0x8000;
    let a = x.abs();
    let magnitude = match a {
        _ if a.is_nan() => 0x7e00,
        _ if a < 2f32.powi(-14) => (a * 2f32.powi(24)).round_ties_even() as u32,
        // Beyond the exponents that a half has; what rounds up to them carries into infinity.
        _ if a >= 65536.0 => 0x7c00,
        _ => {
            let bits = a.to_bits();
            ((bits + 0xfff + ((bits >> 13) & 1)) >> 13) - (112 << 10)
        }
    };
    sign | magnitude
}

pub fn math(fun: MathFunction, list: &[Rc<Data>]) -> Res<Data> {
    use MathFunction as M;
    let x = &list[0];
    let of = |i: usize, k: usize| list.get(k).map_or(0, |d| d.bits[i]);
    let zip = |f: &dyn Fn(&[u32; 3]) -> u32| {
        let bits = (0..x.bits.len()).map(|i| f(&[of(i, 0), of(i, 1), of(i, 2)]));
        Ok(Data { kind: x.kind, n: x.n, bits: bits.collect() })
    };
    if fun == M::Pack2x16float {
        let bits = |x: u32| half_bits(f32::from_bits(x));
        let words = x.bits.chunks(2).map(|c| bits(c[0]) | bits(c[1]) << 16);
        return Ok(Data { kind: ScalarKind::Uint, n: 1, bits: words.collect() });
    }
    if fun == M::Unpack2x16float {
        let bits = x.bits.iter().flat_map(|w| [half(w & 0xffff), half(w >> 16)]);
        return Ok(Data { kind: ScalarKind::Float, n: 2, bits: bits.collect() });
    }
    match x.kind {
        ScalarKind::Float => {
            let f: fn(&[f32; 3]) -> f32 = match fun {
                M::Abs => |v| v[0].abs(),
                M::Min => |v| v[0].min(v[1]),
                M::Max => |v| v[0].max(v[1]),
                M::Clamp => |v| v[0].max(v[1]).min(v[2]),
                M::Floor => |v| v[0].floor(),
                M::Ceil => |v| v[0].ceil(),
                M::Round => |v| v[0].round_ties_even(),
                M::Trunc => |v| v[0].trunc(),
                M::Exp => |v| v[0].exp(),
                M::Exp2 => |v| v[0].exp2(),
                M::Log => |v| v[0].ln(),
                M::Log2 => |v| v[0].log2(),
                M::Sin => |v| v[0].sin(),
                M::Cos => |v| v[0].cos(),
                M::Tanh => |v| v[0].tanh(),
                M::Sqrt => |v| v[0].sqrt(),
                M::InverseSqrt => |v| 1.0 / v[0].sqrt(),
                M::Fma => |v| v[0].mul_add(v[1], v[2]),
                M::Sign => |v| if v[0] == 0.0 { 0.0 } else { v[0].signum() },
                other => return Err(format!("{other:?} of floats")),
            };
            zip(&|v| f(&v.map(f32::from_bits)).to_bits())
        }
        ScalarKind::Sint => {
            let f: fn(&[u32; 3]) -> i32 = match fun {
                M::Abs => |v| (v[0] as i32).wrapping_abs(),
                M::Min => |v| (v[0] as i32).min(v[1] as i32),
                M::Max => |v| (v[0] as i32).max(v[1] as i32),
                M::Clamp => |v| (v[0] as i32).max(v[1] as i32).min(v[2] as i32),
                M::Sign => |v| (v[0] as i32).signum(),
                M::ExtractBits => |v| {
                    let (at, n) = (v[1].min(32), v[2].min(32 - v[1].min(32)));
                    if n == 0 { 0 } else { (v[0] << (32 - at - n)) as i32 >> (32 - n) }
                },
                other => return Err(format!("{other:?} of integers")),
            };
            zip(&|v| f(v) as u32)
        }
        ScalarKind::Uint => {
            let f: fn(&[u32; 3]) -> u32 = match fun {
                M::Min => |v| v[0].min(v[1]),
                M::Max => |v| v[0].max(v[1]),
                M::Clamp => |v| v[0].max(v[1]).min(v[2]),
                M::ExtractBits => |v| {
                    let (at, n) = (v[1].min(32), v[2].min(32 - v[1].min(32)));
                    if n == 0 { 0 } else { (v[0] << (32 - at - n)) >> (32 - n) }
                },
                other => return Err(format!("{other:?} of integers without sign")),
            };
            zip(&f)
        }
        kind => Err(format!("{fun:?} of {kind:?}")),
    }
}

/// To another kind: by value, to so many bytes, or else by bits.
pub fn cast(kind: ScalarKind, bytes: Option<u8>, x: &Data) -> Res<Data> {
    use ScalarKind::{Bool, Float, Sint, Uint};
    match (bytes, x.kind, kind) {
        // Devices need not round to nearest: what f16 does not have is not left to them.
        (Some(2), Float, Float) => {
            let exact = |v: &u32| {
                let x = f32::from_bits(*v);
                x.is_nan() || half::f16::from_f32(x).to_f32() == x
            };
            return if x.bits.iter().all(exact) {
                Ok(x.clone())
            } else {
                Err("a value as f16 that f16 does not have".into())
            };
        }
        (Some(2), from, to) => return Err(format!("{from:?} as {to:?} of 16 bits")),
        (None, ..) => return Ok(Data { kind, ..x.clone() }),
        (Some(_), from, to) if from == to => return Ok(x.clone()),
        (Some(_), ..) => {}
    }
    let f: fn(u32) -> u32 = match (x.kind, kind) {
        (Float, Sint) => |v| f32::from_bits(v) as i32 as u32,
        (Float, Uint) => |v| f32::from_bits(v) as u32,
        (Float, Bool) => |v| u32::from(f32::from_bits(v) != 0.0),
        (Sint, Float) => |v| (v as i32 as f32).to_bits(),
        (Uint, Float) => |v| (v as f32).to_bits(),
        (Bool, Float) => |v| (v as f32).to_bits(),
        (Sint, Uint) | (Uint, Sint) | (Bool, Sint | Uint) => |v| v,
        (Sint | Uint, Bool) => |v| u32::from(v != 0),
        (from, to) => return Err(format!("{from:?} as {to:?}")),
    };
    Ok(map(x, kind, f))
}
