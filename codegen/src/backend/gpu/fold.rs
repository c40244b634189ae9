//! What is known of integer operations without running them.
//!
//! Invariant: division and remainder are the IR's: floor, and 0 for a divisor of 0.

use einfall_ir::ops::BinaryOp;

/// Whether a comparison holds of values in ranges; none: it depends.
pub(in crate::backend) fn compared(op: BinaryOp, a: (i64, i64), b: (i64, i64)) -> Option<bool> {
    use BinaryOp::*;
    match op {
        Lt if a.1 < b.0 => Some(true),
        Lt if a.0 >= b.1 => Some(false),
        Le if a.1 <= b.0 => Some(true),
        Le if a.0 > b.1 => Some(false),
        Gt if a.0 > b.1 => Some(true),
        Gt if a.1 <= b.0 => Some(false),
        Ge if a.0 >= b.1 => Some(true),
        Ge if a.1 < b.0 => Some(false),
        Eq | Ne if a.1 < b.0 || b.1 < a.0 => Some(op == Ne),
        Eq | Ne if a.0 == a.1 && b.0 == b.1 => Some((a.0 == b.0) == (op == Eq)),
        _ => None,
    }
}

/// The value of an operation on constants; none where it does not fit 64 bits, or is a comparison.
pub(in crate::backend) fn integers(op: BinaryOp, x: i64, y: i64) -> Option<i64> {
    use BinaryOp::*;
    match op {
        Add => x.checked_add(y),
        Sub => x.checked_sub(y),
        Mul => x.checked_mul(y),
        Div => Some(if y == 0 { 0 } else { floor_div(x, y) }),
        Mod => Some(if y == 0 { 0 } else { x - y * floor_div(x, y) }),
        Min => Some(x.min(y)),
        Max => Some(x.max(y)),
        Pow => u32::try_from(y).ok().and_then(|y| x.checked_pow(y)),
        Lt | Le | Gt | Ge | Eq | Ne | And | Or => None,
    }
}

/// The operand that decides, or is all that is left of, a conjunction (`and`) or disjunction of predicates, of which
/// `known` are constants: its number.
pub(in crate::backend) fn decided(and: bool, known: [Option<i64>; 2]) -> Option<usize> {
    (0..2).find_map(|i| known[i].map(|c| if (c == 1) == and { 1 - i } else { i }))
}

/// The largest integer not above the quotient.
pub(in crate::backend) fn floor_div(a: i64, b: i64) -> i64 {
    let q = a.wrapping_div(b);
    if a % b != 0 && (a < 0) != (b < 0) { q - 1 } else { q }
}
