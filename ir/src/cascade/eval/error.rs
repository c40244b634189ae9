//! Why an evaluation has no result.

use std::fmt;

use crate::cascade::bind::BindError;
use crate::diag::Span;
use crate::dtype::DType;

/// An evaluation that cannot be done.
#[derive(Clone, Debug, PartialEq)]
pub enum EvalError {
    /// The cascade does not bind.
    Bind(BindError),
    /// The number of inputs is neither that of the parameters nor that of the parameters without a default.
    InputCount {
        /// Parameters declared.
        expected: usize,
        /// Inputs given.
        actual: usize,
    },
    /// An input has another element type.
    InputType {
        /// The parameter.
        tensor: String,
        /// Its type.
        expected: DType,
        /// The type given.
        actual: DType,
    },
    /// An input has other extents, or data that do not fill them.
    InputShape {
        /// The parameter.
        tensor: String,
        /// Its extents.
        expected: Vec<u64>,
        /// The extents given.
        actual: Vec<u64>,
    },
    /// An iteration space or the memory needed exceeds the limit.
    TooLarge {
        /// What is too large.
        what: String,
        /// Its size in points or elements; saturated at 2⁶⁴−1.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// In checked mode: a position outside its tensor.
    OutOfRange {
        /// The tensor accessed.
        tensor: String,
        /// Which dimension, from 0.
        dim: usize,
        /// The position.
        position: i64,
        /// The extent.
        extent: u64,
        /// Where the access stands in the source.
        span: Span,
    },
    /// A form the language does not define.
    Unsupported {
        /// What it is, and what to write instead.
        what: String,
        /// Where it stands in the source.
        span: Span,
    },
    /// There is no such output or tensor, or the point lies outside it.
    NoSuchPoint {
        /// What was asked for.
        what: String,
    },
}

impl fmt::Display for EvalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EvalError::Bind(e) => e.fmt(f),
            EvalError::InputCount { expected, actual } => write!(
                f,
                "{actual} inputs are given for {expected} parameters; give one array per parameter, or leave out every one that has a default"
            ),
            EvalError::InputType { tensor, expected, actual } => {
                write!(f, "{tensor} is declared {expected} but is given {actual}; convert the input")
            }
            EvalError::InputShape { tensor, expected, actual } => {
                write!(f, "{tensor} has extents {expected:?} but is given {actual:?}; pass data of that shape")
            }
            EvalError::TooLarge { what, size, limit } => {
                write!(f, "{what} is {size}, over the limit of {limit}; use smaller sizes or raise the limit")
            }
            EvalError::OutOfRange { tensor, dim, position, extent, .. } => write!(
                f,
                "{tensor}: position {position} of dimension {dim} is outside 0..{extent}; check the index tensor"
            ),
            EvalError::Unsupported { what, .. } => f.write_str(what),
            EvalError::NoSuchPoint { what } => write!(f, "there is no {what}"),
        }
    }
}

impl std::error::Error for EvalError {}

impl From<BindError> for EvalError {
    fn from(e: BindError) -> EvalError {
        EvalError::Bind(e)
    }
}
