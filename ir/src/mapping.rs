//! The mapping: how the kernels of a plan are laid out on a device. Pure data, never compute (house rule).
//!
//! Its text form is what `lower --mapping FILE` reads, what the CSP produces and what tables store. Names refer to
//! the tile IR's kernels, axes, tiles and operations (an operation is named by the tile it writes, `#k` appended for
//! the k-th writer after the first). Everything left out takes the lowering's default.

use crate::kernel::{Engine, Scope};
use crate::tile::Space;

/// The mapping of one plan onto one kind of device.
#[derive(Clone, Debug, PartialEq)]
pub struct Mapping {
    /// The plan's name.
    pub plan: String,
    /// The data sheet it is for.
    pub target: String,
    /// One entry per kernel that is not all defaults.
    pub kernels: Vec<KernelMapping>,
}

/// The mapping of one kernel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelMapping {
    /// The kernel's name.
    pub kernel: String,
    /// Partition of the axes.
    pub axes: Vec<AxisMapping>,
    /// Order and persistence of the work loop.
    pub work: Work,
    /// Placement of tiles.
    pub tiles: Vec<TileMapping>,
    /// Atoms, roles and slots of operations.
    pub ops: Vec<OpMapping>,
    /// Concurrent roles; none: one role of one unit.
    pub roles: Vec<RoleMapping>,
    /// How anchored reductions are repaired.
    pub anchor: Anchor,
    /// Split of a stream over several tasks, with how the parts are merged.
    pub split: Option<Split>,
}

/// Partition of one axis, outermost level first.
#[derive(Clone, Debug, PartialEq)]
pub struct AxisMapping {
    /// The axis.
    pub axis: String,
    /// Coordinates per task (grid axis) or per step (stream and inner axes).
    pub block: u64,
    /// Tasks of a cluster along it.
    pub cluster: u64,
    /// Units of a role it is cut over (warpgroups sharing a block).
    pub units: u64,
    /// Coordinates of one instruction or register tile; 0: the atom's.
    pub register: u64,
}

/// How tasks get their blocks.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Work {
    /// Grid axes, slowest first; empty: as in the kernel.
    pub order: Vec<String>,
    /// One task per block, or as many tasks as the device holds, each walking several blocks.
    pub persistent: bool,
    /// Blocks of the second-fastest axis walked together (L2 locality); 1: none.
    pub group: u64,
    /// Longest blocks first (causal triangles).
    pub longest_first: bool,
}

/// Placement of one tile.
#[derive(Clone, Debug, PartialEq)]
pub struct TileMapping {
    /// The tile.
    pub tile: String,
    /// Where it lives.
    pub space: Space,
    /// Copies in flight (shared memory).
    pub stages: u64,
    /// Swizzle span in bytes (0: none).
    pub swizzle: u64,
    /// The axis whose elements are contiguous; none: the last.
    pub contiguous: Option<String>,
    /// What fills it from device memory; none: plain loads and stores.
    pub engine: Option<Engine>,
    /// The axis whose cluster tasks share one copy by multicast.
    pub multicast: Option<String>,
}

/// Where an operand of a contraction is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// From memory by the instruction (wgmma SS, CPU broadcast).
    Memory,
    /// From registers (wgmma RS).
    Registers,
}

/// Atom, role and place in the schedule of one operation.
#[derive(Clone, Debug, PartialEq)]
pub struct OpMapping {
    /// The operation (see the module's docs for names).
    pub op: String,
    /// The contraction instruction.
    pub atom: Option<String>,
    /// Whether the operands are exchanged (outᵀ = bᵀ·aᵀ).
    pub swapped: bool,
    /// Where the left operand comes from.
    pub a: Source,
    /// The role that runs it.
    pub role: Option<String>,
    /// Iterations it runs behind the first stage of its stream.
    pub skew: u64,
    /// Its place among the operations of one iteration.
    pub slot: u64,
}

/// A concurrent role.
#[derive(Clone, Debug, PartialEq)]
pub struct RoleMapping {
    /// Its name.
    pub role: String,
    /// What a unit is.
    pub scope: Scope,
    /// How many units.
    pub units: u64,
    /// Registers per thread.
    pub regs: Option<u64>,
    /// Whether its units take turns at the tensor cores by named barriers (ping-pong).
    pub ping_pong: bool,
}

/// The anchor policy of derived reductions (finite separation rank, ARCHITECTURE.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Anchor {
    /// A constant anchor, no repair.
    Hoist,
    /// The running value.
    #[default]
    Rolling,
    /// Re-anchored only when it moved by more than a threshold.
    Lazy,
    /// Partial results merged pairwise.
    Tree,
}

/// Where the parts of a split stream meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MergeSite {
    /// The last task to arrive merges, in the same launch.
    LastArriver,
    /// Over distributed shared memory of a cluster.
    Cluster,
    /// A second kernel.
    SecondKernel,
}

/// A stream axis cut over several tasks.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// The stream axis.
    pub axis: String,
    /// How many parts.
    pub parts: u64,
    /// Where they meet.
    pub merge: MergeSite,
    /// Whether parts are joined in a fixed order.
    pub ordered: bool,
}
