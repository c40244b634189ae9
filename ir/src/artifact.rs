//! The contract between code generation and run time: code, and how to launch it.
//!
//! Invariant: everything a launch needs beyond the caller's arrays is an expression over the ranks; nothing in here
//! depends on the crate that made it.

use crate::arena::Arena;
use crate::cascade::{Rank, RankId, Size};
use crate::dtype::DType;
use crate::tile::{Buffer, BufferId};

/// Version of the calling conventions and of this contract; part of every cache key.
pub const VERSION: u32 = 1;

/// A plan compiled for one target.
#[derive(Clone, Debug, PartialEq)]
pub struct Artifact {
    /// The cascade's name.
    pub name: String,
    /// The data sheet it was compiled for.
    pub target: String,
    /// Ranks bound at launch.
    pub ranks: Arena<RankId, Rank>,
    /// Arrays: inputs, outputs, workspace, in the plan's order.
    pub buffers: Arena<BufferId, Buffer>,
    /// The code of all kernels.
    pub code: Code,
    /// Launches in order; each sees what the ones before it stored.
    pub launches: Vec<Launch>,
}

/// Code in the form a device takes.
#[derive(Clone, Debug, PartialEq)]
pub enum Code {
    /// Textual LLVM IR, to be compiled for the host.
    LlvmIr(String),
    /// A relocatable object for the host.
    Object(Vec<u8>),
}

/// One kernel launch.
///
/// CPU convention: `extern "C" fn(slots: *const u64, first_task: i64, end_task: i64, scratch: *mut u8)`. Tasks
/// `first_task .. end_task` of the linearised grid are run in order; the kernel is thread-safe for disjoint ranges.
/// `scratch` holds `scratch_bytes` bytes, 64-byte aligned, private to the call, with unspecified content.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The symbol.
    pub symbol: String,
    /// What `slots` holds, 8 bytes each.
    pub slots: Vec<Slot>,
    /// Extent of each grid dimension, outermost first; tasks are numbered with the last fastest.
    pub grid: Vec<Size>,
    /// Private memory of one call.
    pub scratch_bytes: Size,
    /// Arrays it reads.
    pub reads: Vec<BufferId>,
    /// Arrays it writes.
    pub writes: Vec<BufferId>,
    /// Floating-point operations of the whole launch.
    pub flops: Size,
    /// Bytes each of which a perfect cache would move once: inputs read plus outputs written.
    pub bytes: Size,
}

/// One 8-byte argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// Address of an array's first element.
    Base(BufferId),
    /// Stride of an array's dimension, in elements (i64).
    Stride(BufferId, usize),
    /// A scalar parameter's value: f64 bits for float types, i64 for integers and bools.
    Scalar(BufferId),
    /// A rank's extent (i64).
    Extent(RankId),
}

impl Slot {
    /// The bits of a scalar parameter's `value` of type `dtype` in its slot.
    pub fn scalar_bits(dtype: DType, value: f64) -> u64 {
        if dtype.is_float() { value.to_bits() } else { (value as i64) as u64 }
    }
}
