//! What kind of value each expression has.
//!
//! Rules: arithmetic of integers is integer, with any float it is float; analytic functions give floats; comparisons
//! and logic give bools; an argument selection gives an integer. Invariant: total on every cascade whose operands
//! precede their users.

use super::{Cascade, Expr, ExprId, Reducer};
use crate::arena::Id;
use crate::dtype::DType;
use crate::ops::{BinaryOp, UnaryOp};

/// The kind of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An integer: division is floor division.
    Int,
    /// A float.
    Float,
    /// A truth value.
    Bool,
}

impl Kind {
    /// The kind of the elements of a type.
    pub fn of(dtype: DType) -> Kind {
        if dtype.is_float() {
            Kind::Float
        } else if dtype == DType::Bool {
            Kind::Bool
        } else {
            Kind::Int
        }
    }

    /// The kind of an arithmetic result.
    pub fn join(self, other: Kind) -> Kind {
        if self == other { self } else { Kind::Float }
    }
}

/// The kind of every expression, parallel to `exprs`. A tuple, or a reduction with two results, has its first
/// component's kind.
pub fn kinds(c: &Cascade) -> Vec<Kind> {
    let mut out = Vec::with_capacity(c.exprs.len());
    for (_, e) in c.exprs.iter() {
        let kind = kind_of(c, &out, e);
        out.push(kind);
    }
    out
}

/// The kind of `e`, given those of its operands.
pub(super) fn kind_of(c: &Cascade, known: &[Kind], e: &Expr) -> Kind {
    let k = |id: &super::ExprId| known.get(id.index()).copied().unwrap_or(Kind::Float);
    match e {
        Expr::Int(_) | Expr::Size(_) | Expr::Index(_) | Expr::Segment { .. } => Kind::Int,
        Expr::Float(_) | Expr::Rand { .. } => Kind::Float,
        Expr::Read { tensor, .. } => Kind::of(c.tensors[*tensor].dtype),
        Expr::Unary(op, a) => match op {
            UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Sign | UnaryOp::Floor | UnaryOp::Ceil | UnaryOp::Round => {
                if k(a) == Kind::Int { Kind::Int } else { Kind::Float }
            }
            UnaryOp::Not => Kind::Bool,
            UnaryOp::Exp
            | UnaryOp::Exp2
            | UnaryOp::Log
            | UnaryOp::Log2
            | UnaryOp::Log1p
            | UnaryOp::Sqrt
            | UnaryOp::Rsqrt
            | UnaryOp::Recip
            | UnaryOp::Sin
            | UnaryOp::Cos
            | UnaryOp::Tanh
            | UnaryOp::Sigmoid
            | UnaryOp::Erf => Kind::Float,
        },
        Expr::Binary(op, a, b) => match op {
            BinaryOp::Pow => Kind::Float,
            _ if op.is_predicate() => Kind::Bool,
            _ => k(a).join(k(b)),
        },
        Expr::Select(_, a, b) => k(a).join(k(b)),
        Expr::Cast(dtype, _) => Kind::of(*dtype),
        Expr::Tuple(items) => items.first().map_or(Kind::Float, k),
        Expr::Reduce { op, body, .. } | Expr::Scan { op, body, .. } => match op {
            Reducer::Op(op) if op.selects_argument() => Kind::Int,
            Reducer::Op(crate::ops::ReduceOp::LogSumExp) => Kind::Float,
            Reducer::Op(crate::ops::ReduceOp::Any | crate::ops::ReduceOp::All) => Kind::Bool,
            // A sum of truth values is refused; it counts.
            Reducer::Op(_) | Reducer::TopK { .. } if k(body) == Kind::Bool => Kind::Int,
            Reducer::Op(_) | Reducer::TopK { .. } => k(body),
            Reducer::User(_) => Kind::Float,
        },
    }
}

/// The type of an undeclared tensor: f32 for floats (f64 where f64 is read), i32 or i64 for integers, bool for
/// truth values; a state takes the type of the tensor or cast that is its initial value.
///
/// `n` of `of` targets is meant; `init` says that it is a state's initial value.
pub fn default_dtype(c: &Cascade, kinds: &[Kind], value: ExprId, n: usize, of: usize, init: bool) -> DType {
    let kind = |e: ExprId| kinds[e.index()];
    if init {
        match &c.exprs[value] {
            Expr::Read { tensor, .. } => return c.tensors[*tensor].dtype,
            Expr::Cast(dtype, _) => return *dtype,
            _ => {}
        }
    }
    let (mut wide_int, mut wide_float, mut source) = (false, false, false);
    c.walk(value, &mut |_, e| match e {
        Expr::Read { tensor, .. } => {
            let d = c.tensors[*tensor].dtype;
            wide_int |= d == DType::I64;
            wide_float |= d == DType::F64;
            source = true;
        }
        Expr::Cast(d, _) => {
            wide_int |= *d == DType::I64;
            wide_float |= *d == DType::F64;
            source = true;
        }
        Expr::Size(_) | Expr::Index(_) | Expr::Segment { .. } => source = true,
        Expr::Reduce { op: Reducer::Op(op), .. } => source |= op.selects_argument(),
        Expr::Reduce { .. }
        | Expr::Int(_)
        | Expr::Float(_)
        | Expr::Unary(..)
        | Expr::Binary(..)
        | Expr::Select(..)
        | Expr::Tuple(_)
        | Expr::Scan { .. }
        | Expr::Rand { .. } => {}
    });
    let of_value = match &c.exprs[value] {
        Expr::Reduce { op: Reducer::Op(op), body, .. } if op.selects_argument() && of == 2 && n == 0 => kind(*body),
        Expr::Reduce { op: Reducer::TopK { .. }, .. } if n == 1 => Kind::Int,
        _ => kind(value),
    };
    match of_value {
        Kind::Bool => DType::Bool,
        Kind::Int if !source => DType::F32,
        Kind::Int if wide_int => DType::I64,
        Kind::Int => DType::I32,
        Kind::Float if wide_float => DType::F64,
        Kind::Float => DType::F32,
    }
}
