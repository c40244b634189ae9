//! What can go wrong between an artifact and its results.
//!
//! Invariant: an error names the array, rank or symbol it is about; rendering for people happens in the binary.

use crate::array::ArrayError;
use einfall_ir::cascade::SizeError;
use einfall_ir::dtype::DType;

/// An error of the run time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// LLVM is missing, or refuses the code.
    #[error(transparent)]
    #[cfg(feature = "llvm")]
    Llvm(#[from] einfall_llvm::LlvmError),
    /// An array cannot be made.
    #[error(transparent)]
    Array(#[from] ArrayError),
    /// The CUDA driver, or what is asked of it.
    #[error(transparent)]
    #[cfg(feature = "cuda")]
    Cuda(#[from] crate::cuda::CudaError),
    /// An adapter of WebGPU, or what is asked of it.
    #[error(transparent)]
    #[cfg(feature = "shaders")]
    Wgpu(#[from] crate::shaders::WgpuError),
    /// The threads cannot be started.
    #[error("worker threads cannot be started: {reason}")]
    Threads {
        /// The system's words.
        reason: String,
    },
    /// The artifact contradicts itself or is for another device.
    #[error("artifact `{name}` is malformed: {reason}")]
    Artifact {
        /// The artifact's name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A cascade compiled ahead of time, on a machine that it was not compiled for.
    #[error("`{name}` is compiled for {}, and this machine is none of these", levels.join(", "))]
    Level {
        /// The cascade.
        name: String,
        /// What it is compiled for.
        levels: Vec<String>,
    },
    /// A declared fact that does not hold.
    #[error("`{name}` requires that {fact}")]
    Fact {
        /// The cascade.
        name: String,
        /// The fact, as the text has it.
        fact: String,
    },
    /// A size for a rank that the cascade does not have.
    #[error("there is no rank `{rank}`; the ranks are {}", known.join(", "))]
    UnknownRank {
        /// The name given.
        rank: String,
        /// The cascade's ranks.
        known: Vec<String>,
    },
    /// A rank without a size.
    #[error("rank `{rank}` has no size")]
    MissingRank {
        /// The rank.
        rank: String,
    },
    /// Two sizes for one rank.
    #[error("rank `{rank}` is {expected} and cannot be {found} (from {source_name})")]
    RankConflict {
        /// The rank.
        rank: String,
        /// The size it has.
        expected: u64,
        /// The other size.
        found: u64,
        /// What gave the other size.
        source_name: String,
    },
    /// An extent that no rank sizes can give.
    #[error("dimension {dim} of `{array}` cannot have extent {found}: {reason}")]
    Extent {
        /// The array.
        array: String,
        /// The dimension.
        dim: usize,
        /// The extent given.
        found: u64,
        /// Why.
        reason: String,
    },
    /// A size expression without a value at the sizes given.
    #[error("a size of {what} has no value: {error:?}")]
    Size {
        /// The array or kernel it belongs to.
        what: String,
        /// Why.
        error: SizeError,
    },
    /// An array that was not given.
    #[error("`{array}` ({dtype}{shape:?}) is not given")]
    MissingArray {
        /// The array.
        array: String,
        /// Its type.
        dtype: DType,
        /// Its shape at the bound sizes.
        shape: Vec<u64>,
    },
    /// An array that the cascade does not take.
    #[error("there is no {role} `{array}`; there {}", list(known))]
    UnknownArray {
        /// The name given.
        array: String,
        /// `input`, `output` or `scalar`.
        role: &'static str,
        /// What there is.
        known: Vec<String>,
    },
    /// An array given twice.
    #[error("`{array}` is given twice")]
    Twice {
        /// The array.
        array: String,
    },
    /// An array of another type.
    #[error("`{array}` is {expected}, and {found} is given")]
    DType {
        /// The array.
        array: String,
        /// Its type.
        expected: DType,
        /// The type given.
        found: DType,
    },
    /// An array of another number of dimensions.
    #[error("`{array}` has {expected} dimensions, and {found} are given")]
    Dimensions {
        /// The array.
        array: String,
        /// Its dimensions.
        expected: usize,
        /// The dimensions given.
        found: usize,
    },
    /// An array of another shape.
    #[error("`{array}` has shape {expected:?}, and {found:?} is given")]
    Shape {
        /// The array.
        array: String,
        /// Its shape at the bound sizes.
        expected: Vec<u64>,
        /// The shape given.
        found: Vec<u64>,
    },
    /// Strides that the code was not compiled for.
    #[error("`{array}` must be dense in dimension {dim}; its strides are {strides:?} for shape {shape:?}")]
    Strides {
        /// The array.
        array: String,
        /// The dimension.
        dim: usize,
        /// The strides given, in elements.
        strides: Vec<i64>,
        /// The shape.
        shape: Vec<u64>,
    },
    /// An array that is written shares memory with another.
    #[error("`{written}` is written and overlaps `{other}` in memory")]
    Overlap {
        /// The array written.
        written: String,
        /// The other.
        other: String,
    },
    /// A workspace that is too small or not 64-byte aligned.
    #[error("the workspace must be {needed} bytes at a multiple of 64; {found} bytes at {address:#x} are given")]
    Workspace {
        /// Bytes needed.
        needed: u64,
        /// Bytes given.
        found: u64,
        /// Where.
        address: usize,
    },
}

fn list(known: &[String]) -> String {
    match known {
        [] => "are none".into(),
        [one] => format!("is only {one}"),
        many => format!("are {}", many.join(", ")),
    }
}
