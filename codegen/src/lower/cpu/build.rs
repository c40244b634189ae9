//! Short constructors of kernel expressions, folding literals.

use einfall_ir::cascade::Size;
use einfall_ir::kernel::Expr as E;
use einfall_ir::ops::BinaryOp::*;

pub(super) fn int(i: i64) -> E {
    E::Int(i)
}

pub(super) fn add(a: E, b: E) -> E {
    a.bin(Add, b)
}

pub(super) fn sub(a: E, b: E) -> E {
    a.bin(Sub, b)
}

pub(super) fn mul(a: E, b: E) -> E {
    a.bin(Mul, b)
}

pub(super) fn min(a: E, b: E) -> E {
    a.bin(Min, b)
}

pub(super) fn max(a: E, b: E) -> E {
    a.bin(Max, b)
}

pub(super) fn ceil_div(a: E, b: u64) -> E {
    add(a, int(b as i64 - 1)).bin(Div, int(b as i64))
}

/// The smallest multiple of `to` that is at least `a`.
pub(super) fn round_up(a: E, to: u64) -> E {
    mul(ceil_div(a, to), int(to as i64))
}

/// An extent as an expression.
pub(super) fn size(s: &Size) -> E {
    match s {
        Size::Const(c) => int(*c as i64),
        Size::Rank(r) => E::Extent(*r),
        Size::Add(a, b) => add(size(a), size(b)),
        Size::Sub(a, b) => sub(size(a), size(b)),
        Size::Mul(a, b) => mul(size(a), size(b)),
        Size::Div(a, b) => size(a).bin(Div, size(b)),
        Size::CeilDiv(a, b) => {
            let b = size(b);
            add(size(a), sub(b.clone(), int(1))).bin(Div, b)
        }
        Size::Min(a, b) => min(size(a), size(b)),
        Size::Max(a, b) => max(size(a), size(b)),
    }
}
