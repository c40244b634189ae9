//! The contract between code generation and run time: code, and how to launch it.
//!
//! Invariant: everything a launch needs beyond the caller's arrays is an expression over the ranks; nothing in here
//! depends on the crate that made it. [`Artifact::to_bytes`] and [`Artifact::from_bytes`] are its form in a file.

mod bytes;
mod formula;

use serde::{Deserialize, Serialize};

use crate::arena::{Arena, Id};
use crate::cascade::{Rank, RankId, Size};
use crate::dtype::DType;
use crate::tile::{Buffer, BufferId};

pub use bytes::BytesError;
pub use formula::{Fact, Formula, FormulaError, Leaf};

/// Version of the calling conventions, of this contract and of its form in bytes; part of every cache key.
pub const VERSION: u32 = 9;

/// A plan compiled for one target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Values of the scalar parameters that a caller need not give.
    pub defaults: Vec<(BufferId, Formula)>,
    /// What a caller must keep, checked before a launch.
    pub facts: Vec<Fact>,
}

impl Artifact {
    /// What a condition asks, in words, by the names of ranks and buffers: `N is at most 64`.
    pub fn words(&self, condition: &Condition) -> String {
        let size = |s: &Size| crate::tile::print::size_text(s, &self.ranks, 0);
        match condition {
            Condition::AtMost(s, n) => format!("{} is at most {n}", size(s)),
            Condition::Multiple(s, n) => format!("{} is a multiple of {n}", size(s)),
            Condition::Aligned(b, bytes) => format!(
                "`{}` starts at a multiple of {bytes} bytes, as its rows do, and its last stride is 1",
                self.buffers[*b].name
            ),
        }
    }

    /// Checks that it refers only to what it has.
    ///
    /// # Errors
    /// What is not there, in words.
    pub fn check(&self) -> Result<(), String> {
        let inside = |b: BufferId| b.index() < self.buffers.len();
        let mut sizes: Vec<&Size> = self.buffers.iter().flat_map(|(_, b)| &b.dims).collect();
        for launch in &self.launches {
            let symbol = &launch.symbol;
            sizes.extend(launch.grid.iter().chain([&launch.scratch_bytes, &launch.flops, &launch.bytes]));
            if !launch.reads.iter().chain(&launch.writes).all(|b| inside(*b)) {
                return Err(format!("kernel `{symbol}` reads or writes an array that is not there"));
            }
            if let Some(slot) = launch.slots.iter().find(|s| !self.has(**s)) {
                return Err(format!("kernel `{symbol}` takes {slot:?}, which is not there"));
            }
            let Some(gpu) = &launch.gpu else { continue };
            for condition in &gpu.assumes {
                match condition {
                    Condition::AtMost(size, _) | Condition::Multiple(size, _) => sizes.push(size),
                    Condition::Aligned(b, _) if inside(*b) => {}
                    Condition::Aligned(..) => {
                        return Err(format!("kernel `{symbol}` assumes something of an array that is not there"));
                    }
                }
            }
            if !gpu.counters.iter().all(|b| inside(*b)) {
                return Err(format!("kernel `{symbol}` counts in an array that is not there"));
            }
            let names = |m: &TensorMap| {
                let dims = self.buffers.get(m.buffer).map(|b| b.dims.len());
                dims.is_some_and(|n| m.dims.iter().all(|d| *d < n)) && m.dims.len() == m.extents.len()
            };
            if !gpu.maps.iter().all(names) {
                return Err(format!("a tensor map of kernel `{symbol}` names what is not there"));
            }
        }
        let formulas = self.defaults.iter().map(|(_, f)| f).chain(self.facts.iter().map(|f| &f.holds));
        if !formulas.into_iter().all(|f| f.is_inside(self)) || !self.defaults.iter().all(|(b, _)| inside(*b)) {
            return Err("a default or fact reads what is not there".to_owned());
        }
        if let Code::Wgsl { modules } = &self.code {
            let arrays = |l: &Launch| l.slots.iter().filter(|s| matches!(s, Slot::Base(_))).count();
            let fits = |(m, l): (&WgslModule, &Launch)| m.written.len() == arrays(l) && l.gpu.is_some();
            if modules.len() != self.launches.len() || !modules.iter().zip(&self.launches).all(fits) {
                return Err("its WGSL modules are not those of its launches".to_owned());
            }
        }
        let mut known = true;
        sizes.into_iter().for_each(|s| s.for_each_rank(&mut |r| known &= r.index() < self.ranks.len()));
        if known { Ok(()) } else { Err("a size names a rank that is not there".to_owned()) }
    }

    fn has(&self, slot: Slot) -> bool {
        let buffer = |b: BufferId| self.buffers.get(b);
        match slot {
            Slot::Base(b) => buffer(b).is_some_and(|b| !b.is_scalar()),
            Slot::Stride(b, d) => buffer(b).is_some_and(|b| d < b.dims.len()),
            Slot::Scalar(b) => buffer(b).is_some_and(Buffer::is_scalar),
            Slot::Extent(r) => r.index() < self.ranks.len(),
        }
    }
}

/// Code in the form a device takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Code {
    /// Textual LLVM IR, to be compiled for the host.
    LlvmIr(String),
    /// A relocatable object for the host.
    Object(Vec<u8>),
    /// Functions that are linked into the program, under the launches' symbols.
    Linked,
    /// PTX, to be assembled by the driver (or ahead of time) for `arch`: `sm_90a`, `sm_80`.
    Ptx {
        /// The module's text.
        text: String,
        /// The target it names.
        arch: String,
    },
    /// WGSL, one module for each of the artifact's launches, in their order.
    Wgsl {
        /// The modules.
        modules: Vec<WgslModule>,
    },
}

/// Where a module's arrays and words are bound, all in group 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Bindings {
    /// The words are a uniform buffer at binding 0, arrays storage buffers from 1 on, `read` where a kernel only reads them.
    Own,
    /// For memory that another run time hands out: arrays are storage buffers from 0 on, all `read_write`, since several
    /// may lie in one buffer; where there are words, they are a uniform buffer after the last array. Every binding is used,
    /// so that a layout can be derived from the module.
    Pooled,
}

/// The module of one kernel, whose entry is the launch's symbol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WgslModule {
    /// Its text.
    pub text: String,
    /// Where arrays and words are bound.
    pub bindings: Bindings,
    /// Of every array, in the order of bindings, whether the kernel writes it.
    pub written: Vec<bool>,
    /// Consecutive invocations that its subgroup operations take for one subgroup; 1: it has none.
    pub subgroup: u64,
    /// Products of cooperative matrices that it takes, names of atoms ([`crate::kernel::atoms::cooperative_products`]); with
    /// any, 32 consecutive invocations are one subgroup.
    pub matrices: Vec<String>,
}

/// One kernel launch.
///
/// CPU convention: `extern "C" fn(slots: *const u64, first_task: i64, end_task: i64, scratch: *mut u8)`. Tasks
/// `first_task .. end_task` of the linearised grid are run in order; the kernel is thread-safe for disjoint ranges.
/// `scratch` holds `scratch_bytes` bytes, 64-byte aligned, private to the call, with unspecified content.
///
/// GPU convention: the kernel's parameters are its tensor maps ([`GpuLaunch::maps`], 128 bytes each, 64-byte aligned),
/// then `slots`, 8 bytes each. The grid is launched along x alone: clusters are numbered by their place in the grid of
/// clusters, the tasks of a cluster by their place in it, both with the last dimension fastest. Extents and positions
/// are below 2³¹ (checked when sizes are bound); strides and addresses have 64 bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// The symbol.
    pub symbol: String,
    /// What `slots` holds, 8 bytes each.
    pub slots: Vec<Slot>,
    /// Extent of each grid dimension, outermost first; tasks are numbered with the last fastest.
    pub grid: Vec<Size>,
    /// Whether tasks with a coordinate along the first dimension start when all those with lower ones have ended.
    pub ordered: bool,
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
    /// How a GPU launches it; none on a CPU.
    pub gpu: Option<GpuLaunch>,
}

/// What a GPU needs to know to launch a kernel. Source: CUDA driver API, `cuLaunchKernelEx`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuLaunch {
    /// Threads of a task.
    pub threads: u32,
    /// Tasks of a cluster along each grid dimension, which they divide; empty: no clusters.
    pub cluster: Vec<u64>,
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u64,
    /// Whether all tasks must be resident at once (grid-wide synchronisation).
    pub cooperative: bool,
    /// Whether it may start before the launch before it has ended, as it waits itself before it reads what that one
    /// stores (`griddepcontrol.wait`; programmatic dependent launch).
    pub dependent: bool,
    /// Arrays of the workspace in which units count ([`crate::kernel::Stmt::Last`]): zeros before the first launch, and
    /// every launch leaves zeros. They share bytes with no other array.
    pub counters: Vec<BufferId>,
    /// Tensor maps, in the order of the parameters.
    pub maps: Vec<TensorMap>,
    /// The kernel of the plan it is one variant of; none: it stands alone. Variants of one kernel follow one another
    /// among [`Artifact::launches`]; when sizes and arrays are bound, the first of them whose assumptions all hold is
    /// launched and the others are not ([`crate::kernel::variants`]). One that assumes nothing comes last.
    pub variant_of: Option<String>,
    /// What must hold of extents and arrays for this variant to be launched.
    pub assumes: Vec<Condition>,
}

/// What a variant of a kernel takes for granted: [`crate::kernel::Assumption`] in terms of the artifact.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Condition {
    /// The size is at most so much.
    AtMost(Size, u64),
    /// The size is a multiple of so much.
    Multiple(Size, u64),
    /// The array's base address and, in bytes, all its strides but the last dimension's are multiples of so many
    /// bytes, and the last dimension's stride is 1.
    Aligned(BufferId, u64),
}

/// How to encode one tensor map; the array's base, extents and strides come at launch. Source: CUDA driver API,
/// `cuTensorMapEncodeTiled`; out-of-range elements read as 0.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorMap {
    /// The array. Its base must be 16-byte aligned, its strides but the innermost multiples of 16 bytes.
    pub buffer: BufferId,
    /// Dimensions of the array in the map's order, innermost (stride 1) first; all of them, at most 5.
    pub dims: Vec<usize>,
    /// Extent of the box along each of `dims`, 1 to 256.
    pub extents: Vec<u32>,
    /// Span of the swizzle in bytes: 32, 64, 128, or 0 for none.
    pub swizzle_bytes: u32,
}

/// One 8-byte argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
