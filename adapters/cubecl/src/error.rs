//! What can go wrong between a cascade and a launch through cubecl.
//!
//! Invariant: an error names the array, kernel or capability it is about.

/// Why a program is not made or not launched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A cascade that is not compiled.
    #[error(transparent)]
    Compile(#[from] einfall::Error),
    /// Sizes, arrays, facts, limits and capabilities.
    #[error(transparent)]
    Launch(#[from] einfall::runtime::Error),
    /// An array updated in place that others use as well.
    #[error("`{array}` is updated in place and shared with others: give a copy of it")]
    Shared {
        /// The array.
        array: String,
    },
    /// An array whose buffer starts where the device cannot bind it.
    #[error(
        "`{array}` starts at byte {offset} of its buffer, and buffers are bound at multiples of {multiple}: give a copy"
    )]
    Offset {
        /// The array.
        array: String,
        /// Where it starts.
        offset: u64,
        /// What bindings start at multiples of.
        multiple: u64,
    },
    /// A client that does not take WGSL.
    #[error("the client is `{0}`, which does not take WGSL: give one of cubecl's `wgpu<wgsl>`")]
    Client(String),
    /// An array in the memory of another device, or of another client's.
    #[error("`{array}` lies in the memory of another device")]
    Elsewhere {
        /// The array.
        array: String,
    },
    /// No mapping to take.
    #[error("there is no program to take")]
    Nothing,
    /// Strides by which an array cannot be read.
    #[error("an array of {dtype}{shape:?} has strides {strides:?}, by which its buffer cannot be read")]
    Strides {
        /// Element type.
        dtype: einfall::ir::dtype::DType,
        /// Extents.
        shape: Vec<u64>,
        /// Strides, in elements.
        strides: Vec<i64>,
    },
    /// A tensor that is no array of this run time.
    #[error("the tensor {0}")]
    Tensor(String),
    /// cubecl's own words, for a kernel that it refuses and when something is read back.
    #[error("cubecl: {0}")]
    Cubecl(String),
}
