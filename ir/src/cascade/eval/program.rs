//! The flat program one Einsum compiles to for one set of extents.
//!
//! A program computes one output point: the driver sets the free indices and runs `code` from the start. Affine
//! accesses are *cursors*, linear positions kept up to date by the loops (strides resolved, no lookups in the inner
//! loop). Invariant: jumps stay inside the innermost loop's body or leave the point; a register is written before it
//! is read on every path.

use super::domain::Ty;
use crate::diag::Span;
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

pub(super) type Reg = u32;

/// One step. Jump targets are label numbers until the program is sealed, then positions in `code`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ins {
    /// The value of an index.
    Index {
        dst: Reg,
        slot: u32,
    },
    /// An element at a cursor that is always in range.
    Load {
        dst: Reg,
        tensor: u32,
        cursor: u32,
    },
    /// The same of a tensor on partial support: jumps when absent.
    LoadPartial {
        dst: Reg,
        tensor: u32,
        cursor: u32,
        absent: u32,
    },
    /// The same of a tensor computed on demand.
    LoadDemanded {
        dst: Reg,
        tensor: u32,
        cursor: u32,
        absent: u32,
    },
    /// An element at positions checked one by one.
    Fetch {
        dst: Reg,
        access: u32,
        absent: u32,
    },
    Unary {
        op: UnaryOp,
        ty: Ty,
        dst: Reg,
        a: Reg,
    },
    Binary {
        op: BinaryOp,
        ty: Ty,
        dst: Reg,
        a: Reg,
        b: Reg,
    },
    Cast {
        to: DType,
        dst: Reg,
        a: Reg,
    },
    Operand {
        to: DType,
        dst: Reg,
        a: Reg,
    },
    Move {
        dst: Reg,
        a: Reg,
    },
    Jump {
        to: u32,
    },
    /// Jumps unless the condition holds.
    Unless {
        cond: Reg,
        to: u32,
    },
    /// Starts a loop; jumps past it when it has no iteration.
    Loop {
        of: u32,
        exit: u32,
    },
    /// Next iteration of a loop, or falls through.
    Next {
        of: u32,
        back: u32,
    },
    /// Empties an accumulator.
    Begin {
        acc: u32,
        op: ReduceOp,
    },
    /// Joins a value; `place` is a row of `places` for operators that need a position.
    Add {
        acc: u32,
        op: ReduceOp,
        a: Reg,
        place: u32,
    },
    Total {
        acc: u32,
        op: ReduceOp,
        ty: Ty,
        dst: Reg,
    },
    /// The value an argument selection has selected.
    Best {
        acc: u32,
        op: ReduceOp,
        dst: Reg,
    },
    BeginTop {
        acc: u32,
    },
    AddTop {
        acc: u32,
        a: Reg,
        place: u32,
    },
    /// Writes k values from `values` on and k positions from `places` on.
    TotalTop {
        acc: u32,
        k: u32,
        values: Reg,
        places: Reg,
    },
    Combine {
        op: ReduceOp,
        ty: Ty,
        dst: Reg,
        a: Reg,
        b: Reg,
    },
    /// `dst = Σ_i a[i] b[i]` with strides: a domain without a fast path falls through to the loop that follows,
    /// otherwise control goes to `done`.
    Dot {
        of: u32,
        dst: Reg,
        done: u32,
    },
    /// The segment of an index; jumps when it lies in none.
    Segment {
        dst: Reg,
        table: u32,
        slot: u32,
        absent: u32,
    },
    Rand {
        dst: Reg,
        draw: u32,
    },
    /// The point has values; row `variant` of `endings` holds them.
    Present {
        variant: u32,
    },
    /// The point is outside the support.
    Absent,
}

/// A loop over `0 .. extent`.
#[derive(Clone, Debug)]
pub(super) struct Loop {
    pub slot: u32,
    pub extent: u64,
    /// Cursors that move with it, with their strides.
    pub cursors: Vec<(u32, i64)>,
}

/// One position of a checked access.
#[derive(Clone, Copy, Debug)]
pub(super) enum Position {
    /// An affine position kept by the loops.
    Cursor(u32),
    /// A computed position.
    Reg(Reg),
}

/// A checked access.
#[derive(Clone, Debug)]
pub(super) struct Access {
    pub tensor: u32,
    pub at: Vec<(Position, u64, i64)>,
    pub span: Span,
}

/// Where a target is written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// At a cursor always in range.
    Cursor(u32),
    /// At a checked access.
    Access(u32),
}

/// A strided dot product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dot {
    pub a: (u32, u32, i64),
    pub b: (u32, u32, i64),
    pub count: u64,
}

/// A draw from the generator.
#[derive(Clone, Debug)]
pub(super) struct Draw {
    pub seed: Reg,
    pub coords: Vec<Reg>,
}

/// A ragged index: tensor of offsets, its length and the index's extent.
#[derive(Clone, Debug)]
pub(super) struct Ragged {
    pub tensor: u32,
    pub offsets: u64,
    pub extent: u64,
}

/// A value a point ends with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Result1 {
    pub reg: Reg,
    /// Consecutive registers stored at consecutive positions: k for top-k, otherwise 1.
    pub count: u32,
    pub ty: Ty,
    pub place: Place,
}

/// What a running reduction keeps between points.
#[derive(Clone, Debug)]
pub(super) struct Running {
    /// Registers and what they hold at the start of a row.
    pub reset: Vec<(Reg, f64)>,
    /// An argument selection's accumulator.
    pub acc: Option<(u32, ReduceOp)>,
    /// The value registers, stored whether or not the point is present.
    pub regs: Vec<(Reg, Ty)>,
}

/// A target tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct TargetTensor {
    pub tensor: u32,
    pub dtype: DType,
    /// Elements and type of the scales of a block-scaled tensor: rounded when the whole tensor is written.
    pub block: Option<(u64, DType)>,
    /// A parameter written in place: absent points keep its old value.
    pub in_place: bool,
}

/// One Einsum, compiled.
#[derive(Clone, Debug, Default)]
pub(super) struct Program {
    pub code: Vec<Ins>,
    pub n_regs: u32,
    pub n_accs: u32,
    pub n_slots: u32,
    /// Registers preset before the first point.
    pub consts: Vec<(Reg, f64)>,
    /// Start value of each cursor, free and iterated indices at 0.
    pub cursors: Vec<i64>,
    pub loops: Vec<Loop>,
    /// Loops of the driver, outermost first.
    pub free: Vec<Loop>,
    /// The slot of the iterated index and the cursors that move with it.
    pub iterated: Option<Loop>,
    pub accesses: Vec<Access>,
    pub dots: Vec<Dot>,
    pub draws: Vec<Draw>,
    pub ragged: Vec<Ragged>,
    /// Position strides per loop slot, for argument selections.
    pub places: Vec<Vec<(u32, i64)>>,
    /// The results of each way a point can end.
    pub endings: Vec<Vec<Result1>>,
    pub targets: Vec<TargetTensor>,
    pub join: Option<ReduceOp>,
    pub running: Option<Running>,
    /// Running reductions materialised before this program: each with the tensors it fills and their extents.
    pub preludes: Vec<Prelude>,
    /// Whether some point may be absent and has no `else`.
    pub partial: bool,
    /// Tensors read.
    pub reads: Vec<u32>,
    /// Points of the largest loop nest, including the free indices.
    pub work: u64,
    pub span: Span,
}

/// A running reduction filled before its reader runs.
#[derive(Clone, Debug)]
pub(super) struct Prelude {
    pub program: Program,
    pub dims: Vec<u64>,
}
