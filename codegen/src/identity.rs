//! What a reduction over nothing gives, as a value of the type that it reduces: what is left out selects it.
//!
//! Invariant: the identity of a reduction of integers is an integer. A float in its place would make the other elements
//! floats, which hold 24 bits of them, and an integer register cannot hold an infinity.

use einfall_ir::arena::Id;
use einfall_ir::cascade::types::{self, Kind};
use einfall_ir::cascade::{Cascade, Expr, ExprId};
use einfall_ir::diag::Span;
use einfall_ir::dtype::DType;
use einfall_ir::ops::ReduceOp;
use einfall_ir::{kernel, tile};

/// The type that the values of an expression are of where no tensor says it.
pub(crate) fn value_type(c: &Cascade, value: ExprId) -> DType {
    let kinds = types::kinds(c);
    match kinds[value.index()] {
        Kind::Bool => DType::Bool,
        Kind::Float => DType::F32,
        Kind::Int if types::default_dtype(c, &kinds, value, 0, 1, false) == DType::I64 => DType::I64,
        Kind::Int => DType::I32,
    }
}

/// The identity of a reduction of elements of `dtype`.
pub(crate) fn identity(c: &mut Cascade, op: ReduceOp, dtype: DType, span: Span) -> ExprId {
    let x = op.identity_of(dtype);
    let number = c.push_expr(if dtype.is_float() { Expr::Float(x) } else { Expr::Int(writable(x)) }, span);
    if dtype == DType::Bool { c.push_expr(Expr::Cast(dtype, number), span) } else { number }
}

/// Whether `e` is the identity of a reduction of elements of `dtype`.
pub(crate) fn is_identity(c: &Cascade, e: ExprId, op: ReduceOp, dtype: DType) -> bool {
    match c.exprs[e] {
        Expr::Int(n) => op.is_identity(n as f64, dtype),
        Expr::Float(x) => op.is_identity(x, dtype),
        Expr::Cast(DType::Bool, x) => match c.exprs[x] {
            Expr::Int(n) => op.is_identity(DType::Bool.round(n as f64), dtype),
            Expr::Float(x) => op.is_identity(DType::Bool.round(x), dtype),
            _ => false,
        },
        _ => false,
    }
}

/// Whether `e` is the identity of a reduction of elements of `dtype`.
pub(crate) fn is_identity_in(k: &tile::Kernel, e: tile::ExprId, op: ReduceOp, dtype: DType) -> bool {
    match k.exprs[e] {
        tile::Expr::Int(n) => op.is_identity(n as f64, dtype),
        tile::Expr::Float(x) => op.is_identity(x, dtype),
        tile::Expr::Cast(DType::Bool, x) => match k.exprs[x] {
            tile::Expr::Int(n) => op.is_identity(DType::Bool.round(n as f64), dtype),
            tile::Expr::Float(x) => op.is_identity(DType::Bool.round(x), dtype),
            _ => false,
        },
        _ => false,
    }
}

/// A number as an element of `dtype`; integers saturate.
pub(crate) fn tile_constant(x: f64, dtype: DType) -> tile::Expr {
    if dtype.is_float() { tile::Expr::Float(x) } else { tile::Expr::Int(writable(dtype.round(x))) }
}

/// As [`tile_constant`], in a kernel.
pub(crate) fn kernel_constant(x: f64, dtype: DType) -> kernel::Expr {
    if dtype.is_float() { kernel::Expr::Float(x) } else { kernel::Expr::Int(writable(dtype.round(x))) }
}

/// An integer that the text forms can write: they have a sign and a number of 63 bits.
fn writable(x: f64) -> i64 {
    (x as i64).max(-i64::MAX)
}
