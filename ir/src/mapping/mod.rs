//! The mapping: how the kernels of a plan are laid out on a device. Pure data, never compute (house rule).
//!
//! Its text form is what `lower --mapping FILE` reads, what the CSP produces and what tables store. Names refer to
//! the tile IR's kernels, axes, tiles and operations ([`crate::tile::Kernel::op_names`]: an operation is named by the
//! tile it writes or `store.ARRAY`, `@k` appended for the k-th of that name after the first). Everything left out
//! takes the lowering's default.

pub mod parse;
pub mod print;
#[cfg(test)]
mod tests;
pub mod verify;

use crate::kernel::{Engine, Scope};
use crate::tile::Space;

/// The mapping of one plan onto one kind of device.
#[derive(Clone, Debug, PartialEq)]
pub struct Mapping {
    /// The plan's name.
    pub plan: String,
    /// The data sheet it is for.
    pub target: String,
    /// One entry per kernel that is not all defaults. Several entries of one kernel are variants of it, in the order
    /// in which a launch tries them: the first whose blocks hold the extents ([`AxisMapping::whole`]) runs.
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
    /// Split of a stream over several tasks, with how the parts are merged.
    pub split: Option<Split>,
    /// Whether loads of arrays that it only reads are issued beside the first load before them, not where their
    /// elements are used: latencies side by side, for registers held longer.
    pub early: bool,
    /// Whether its launch may start while the plan's kernel before it runs (programmatic dependent launch).
    pub dependent: bool,
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
    /// Units of a role it is cut over (warpgroups sharing a block). Axes of one operation are cut together: a role has as many
    /// units as they have parts, and each has a part of every one.
    pub units: u64,
    /// Coordinates of one instruction or register tile; 0: the atom's. Where no atom says, the neighbouring coordinates
    /// that one thread holds (one wide load); 0: 16 bytes of the narrowest array along the axis that most is contiguous in,
    /// 1 along others.
    pub register: u64,
    /// Whether one block must hold the whole extent, so that what is read along it stays in registers from its first
    /// use to its last: the kernel becomes a variant for such extents, and needs an entry for longer ones after it.
    pub whole: bool,
    /// Whether the extent is taken to be a multiple of the block, so that nothing along it is masked: the kernel becomes a
    /// variant for such extents, and needs an entry for others after it.
    pub exact: bool,
    /// Whether a stream over it goes from its last block to its first: blocks that need a mask at the end of a
    /// triangle then come first.
    pub descending: bool,
    /// Whether each step of a sequential stream over it is a launch of its own, so that tasks which cut other axes read
    /// what others stored in the step before ([`crate::analysis::steps`]).
    pub launches: bool,
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
    /// A tile whose shared memory it takes over once that is no longer needed.
    pub reuses: Option<String>,
}

/// Where an operand of a contraction is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Source {
    /// From memory by the instruction (wgmma SS, CPU broadcast).
    #[default]
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
    /// Its place among the operations of one iteration; equal slots keep the order of the kernel.
    pub slot: u64,
    /// What carries a store's elements out through shared memory; none: registers to device memory.
    pub engine: Option<Engine>,
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
    /// Registers per thread: what setmaxnreg gives a role among others; for a role alone the most the assembler uses,
    /// so that enough tasks are resident.
    pub regs: Option<u64>,
    /// Whether its units take turns at the tensor cores by named barriers (ping-pong).
    pub ping_pong: bool,
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
    /// How many parts at most.
    pub parts: u64,
    /// Tasks that a multiprocessor runs at a time: parts fill so many places on each.
    pub resident: u64,
    /// Where they meet.
    pub merge: MergeSite,
    /// Whether parts are joined in a fixed order.
    pub ordered: bool,
}

impl AxisMapping {
    /// The axis cut into blocks of `block`, nothing else.
    pub fn new(axis: impl Into<String>, block: u64) -> AxisMapping {
        AxisMapping {
            axis: axis.into(),
            block,
            cluster: 1,
            units: 1,
            register: 0,
            whole: false,
            exact: false,
            descending: false,
            launches: false,
        }
    }
}

impl TileMapping {
    /// The tile in `space`, one stage, no swizzle, plain loads and stores.
    pub fn new(tile: impl Into<String>, space: Space) -> TileMapping {
        TileMapping {
            tile: tile.into(),
            space,
            stages: 1,
            swizzle: 0,
            contiguous: None,
            engine: None,
            multicast: None,
            reuses: None,
        }
    }
}

impl OpMapping {
    /// The operation with every default.
    pub fn new(op: impl Into<String>) -> OpMapping {
        OpMapping {
            op: op.into(),
            atom: None,
            swapped: false,
            a: Source::Memory,
            role: None,
            skew: 0,
            slot: 0,
            engine: None,
        }
    }
}

impl KernelMapping {
    /// The entry of this axis.
    pub fn axis(&self, name: &str) -> Option<&AxisMapping> {
        self.axes.iter().find(|a| a.axis == name)
    }

    /// The entry of this tile.
    pub fn tile(&self, name: &str) -> Option<&TileMapping> {
        self.tiles.iter().find(|t| t.tile == name)
    }

    /// The entry of this operation.
    pub fn op(&self, name: &str) -> Option<&OpMapping> {
        self.ops.iter().find(|o| o.op == name)
    }
}
