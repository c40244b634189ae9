//! The tile IR: a plan of kernels; each kernel a nest of streams over tiles.
//!
//! A normal form (ARCHITECTURE.md, "How kernels are formed"). A kernel has *axes*, each a rank of the problem cut into
//! blocks: a grid axis is cut over the launch, a stream axis is walked block after block, an inner axis is whole in
//! every tile. A tile's dimensions are axes, so its extents are the axes' blocks, and every operation says what it does
//! to whole tiles. Invariants: (1) the result does not depend on the blocks, which only the mapping chooses; (2)
//! elements whose coordinate on an axis reaches the axis's extent (tails) do not exist: reductions and contractions
//! skip them, loads and stores leave them alone; (3) nothing here names an operation of the user's: no pass asks how
//! many contractions a body has, or of what kind.

pub mod eval;
pub mod parse;
pub mod print;
#[cfg(test)]
mod tests;
pub mod verify;

use serde::{Deserialize, Serialize};

use crate::arena::Arena;
use crate::cascade::{Rank, RankId, Size};
use crate::define_ids;
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

define_ids! {
    /// An array in device memory.
    BufferId,
    /// An axis of a kernel.
    AxisId,
    /// A tile of a kernel.
    TileId,
    /// An elementwise expression of a kernel.
    ExprId,
}

/// A compiled cascade: kernels in launch order and the arrays between them.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The cascade's name.
    pub name: String,
    /// Whether default rounding points are forbidden (`@exact` before the cascade).
    pub exact: bool,
    /// Its ranks, bound at launch.
    pub ranks: Arena<RankId, Rank>,
    /// Arrays in device memory: inputs, outputs, workspace.
    pub buffers: Arena<BufferId, Buffer>,
    /// Kernels; each sees what the ones before it stored.
    pub kernels: Vec<Kernel>,
}

/// What an array in device memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BufferKind {
    /// Read-only parameter.
    Input,
    /// Parameter updated in place.
    InOut,
    /// Result.
    Output,
    /// Temporary between kernels, part of the workspace.
    Workspace,
}

/// An array in device memory; no dimensions: a scalar parameter, passed by value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub dims: Vec<Size>,
    /// What it is for.
    pub kind: BufferKind,
    /// Whether every element is known to be above 0: a fact of the cascade, checked before launch.
    pub positive: bool,
}

impl Buffer {
    /// Whether it is a parameter that travels by value.
    pub fn is_scalar(&self) -> bool {
        self.kind == BufferKind::Input && self.dims.is_empty()
    }
}

/// One kernel: `body` runs once per point of the grid of blocks of its grid axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Unique in the plan.
    pub name: String,
    /// Its axes.
    pub axes: Arena<AxisId, Axis>,
    /// The grid axis whose blocks follow each other: a task sees what those of blocks before stored, and blocks of it
    /// are 1. None: all tasks are independent.
    pub ordered: Option<AxisId>,
    /// Its tiles.
    pub tiles: Arena<TileId, Tile>,
    /// Its expressions; operands come before users.
    pub exprs: Arena<ExprId, Expr>,
    /// What one block does, in order.
    pub body: Vec<Node>,
}

/// How an axis is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AxisKind {
    /// Cut over the launch; blocks are independent.
    Grid,
    /// Walked by a [`Stream`], block after block.
    Stream,
    /// Whole in each tile that has it; an operation may still walk it in steps.
    Inner,
}

/// A rank of the problem as one kernel sees it; coordinates run over `0 .. extent`.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    /// Unique in the kernel; an index name of the cascade where there is one.
    pub name: String,
    /// How many coordinates.
    pub extent: Size,
    /// How it is walked.
    pub kind: AxisKind,
    /// Coordinates per block, once mapped. Inner axes have none. An iterated axis has 1.
    pub block: Option<u64>,
}

impl Axis {
    /// A nameless axis that is whole in every tile.
    pub fn inner(extent: Size) -> Axis {
        Axis { name: String::new(), extent, kind: AxisKind::Inner, block: None }
    }
}

/// Where a tile lives, once mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Not copied: operations read the array itself (CPU caches, L2).
    Direct,
    /// Registers, distributed over the units of a role.
    Registers,
    /// Memory shared by a workgroup or CTA.
    Shared,
    /// Memory private to one task (CPU: a core's cache).
    Scratch,
    /// An array of the workspace, filled once a launch before the kernel, laid out for the operation that reads it.
    Packed,
}

/// A block of values over some axes. Scalars per block have none.
#[derive(Clone, Debug, PartialEq)]
pub struct Tile {
    /// Unique in the kernel.
    pub name: String,
    /// Element type held: a rounding point when narrower than f32.
    pub dtype: DType,
    /// Its dimensions, outermost first.
    pub axes: Vec<AxisId>,
    /// Where it lives, once mapped.
    pub space: Option<Space>,
    /// Whether operands of contractions into it keep their types: of one contraction of the text, several were derived
    /// whose results cancel, and rounding its operand is no licence to round theirs.
    pub exact: bool,
}

/// A step of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// A tile operation.
    Op(Op),
    /// A loop over the blocks of an axis.
    Stream(Stream),
}

/// A loop over the blocks of a stream axis. Tiles written inside and read in a later step, or after, are carried.
#[derive(Clone, Debug, PartialEq)]
pub struct Stream {
    /// The axis walked.
    pub axis: AxisId,
    /// From the last block to the first.
    pub reverse: bool,
    /// Whether steps depend on each other beyond carried reductions, so that the block must be 1 (an iterative rank).
    pub sequential: bool,
    /// A predicate over coordinates: where it is false, an element of the step contributes nothing (its operations
    /// already select the identity there). Blocks wholly false may be skipped, blocks wholly true need no mask.
    pub filter: Option<ExprId>,
    /// What one step does, in order.
    pub body: Vec<Node>,
}

/// A tile operation. `out` is written whole; operations on it and its sources range over its axes.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// `out[axes] = buffer[at]`: a block copied from device memory. Positions outside the array read 0.
    Load {
        /// The tile filled.
        out: TileId,
        /// The array read.
        buffer: BufferId,
        /// One integer expression per dimension of the array: affine in coordinates, or a gather.
        at: Vec<ExprId>,
    },
    /// `buffer[at] = value` for every point of `axes` where `when` holds. Positions outside the array are dropped.
    Store {
        /// The array written.
        buffer: BufferId,
        /// One integer expression per dimension of the array.
        at: Vec<ExprId>,
        /// The points stored.
        axes: Vec<AxisId>,
        /// What is stored, rounded to the array's type.
        value: ExprId,
        /// How colliding or earlier values are joined; none overwrites.
        join: Option<ReduceOp>,
        /// Points to store.
        when: Option<ExprId>,
    },
    /// `out[axes] = value`, elementwise.
    Map {
        /// The tile written.
        out: TileId,
        /// Its elements; may read `out` itself (the value before).
        value: ExprId,
    },
    /// `out[axes] = ⊕_over value`, joined with the value before if `carry`.
    Reduce {
        /// The tile written, or (value, position) for argument selections.
        out: Vec<TileId>,
        /// The monoid.
        op: ReduceOp,
        /// What is reduced: an expression over the axes of `out` and `over`.
        value: ExprId,
        /// Axes reduced: stream axes of enclosing streams (this block only) or inner axes.
        over: Vec<AxisId>,
        /// Whether the value before is joined in.
        carry: bool,
    },
    /// `out[..] = Σ_over a[..] · b[..]` in `out`'s type (f32 accumulation), added to the value before if `carry`.
    Contract {
        /// The accumulator.
        out: TileId,
        /// Left operand.
        a: TileId,
        /// Right operand.
        b: TileId,
        /// Axes summed.
        over: Vec<AxisId>,
        /// Whether the value before is added.
        carry: bool,
    },
    /// A running reduction along `along` (inclusive) of `value`.
    Scan {
        /// The tile written.
        out: TileId,
        /// The monoid.
        op: ReduceOp,
        /// What is accumulated.
        value: ExprId,
        /// The axis it runs along.
        along: AxisId,
        /// A tile without `along` that holds the value carried between blocks, updated.
        carry: Option<TileId>,
    },
}

/// A place along one dimension of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// This point's coordinate on an axis.
    Axis(AxisId),
    /// A fixed coordinate.
    At(u64),
}

/// An elementwise expression: its value at a point of the axes it is used over.
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// An extent's value.
    Size(Size),
    /// The coordinate on an axis, counted over the whole problem.
    Coord(AxisId),
    /// The tile's element at this point; axes it lacks broadcast.
    Tile(TileId),
    /// The tile's element at other places of its axes: under another name of an axis (a state produced along `d` and
    /// consumed along `p`, `h{d = p}`) or at a fixed coordinate of an inner axis (one gate, `g{a = 1}`).
    TileAt {
        /// The tile.
        tile: TileId,
        /// One place per dimension of the tile.
        at: Vec<Place>,
    },
    /// An array's element, or a scalar parameter's value. Positions outside the array read 0.
    Read {
        /// The array.
        buffer: BufferId,
        /// One integer expression per dimension.
        at: Vec<ExprId>,
    },
    /// A scalar function.
    Unary(UnaryOp, ExprId),
    /// A scalar function of two arguments; integer when both are.
    Binary(BinaryOp, ExprId, ExprId),
    /// `if cond then a else b`.
    Select(ExprId, ExprId, ExprId),
    /// A conversion, rounding.
    Cast(DType, ExprId),
    /// A uniform value in [0,1): the seed, then four integer coordinates
    /// ([`crate::cascade::eval::philox::uniform`]).
    Rand([ExprId; 5]),
}

impl Expr {
    /// Calls `f` on every operand, in order.
    pub fn for_each_operand(&self, mut f: impl FnMut(ExprId)) {
        match self {
            Expr::Int(_) | Expr::Float(_) | Expr::Size(_) | Expr::Coord(_) | Expr::Tile(_) | Expr::TileAt { .. } => {}
            Expr::Read { at, .. } => at.iter().copied().for_each(f),
            Expr::Unary(_, a) | Expr::Cast(_, a) => f(*a),
            Expr::Binary(_, a, b) => {
                f(*a);
                f(*b);
            }
            Expr::Select(c, a, b) => {
                f(*c);
                f(*a);
                f(*b);
            }
            Expr::Rand(of) => of.iter().copied().for_each(f),
        }
    }
}

impl Kernel {
    /// A kernel of this name with nothing in it.
    pub fn new(name: impl Into<String>) -> Kernel {
        Kernel {
            name: name.into(),
            axes: Arena::new(),
            ordered: None,
            tiles: Arena::new(),
            exprs: Arena::new(),
            body: Vec::new(),
        }
    }

    /// Calls `f` on `root` and every node under it, parents first.
    pub fn walk(&self, root: ExprId, f: &mut impl FnMut(ExprId, &Expr)) {
        f(root, &self.exprs[root]);
        self.exprs[root].for_each_operand(|e| self.walk(e, f));
    }

    /// Calls `f` on every operation, in order, with the axes of the streams around it.
    pub fn for_each_op(&self, f: &mut impl FnMut(&Op, &[AxisId])) {
        fn go(nodes: &[Node], around: &mut Vec<AxisId>, f: &mut impl FnMut(&Op, &[AxisId])) {
            for node in nodes {
                match node {
                    Node::Op(op) => f(op, around),
                    Node::Stream(s) => {
                        around.push(s.axis);
                        go(&s.body, around, f);
                        around.pop();
                    }
                }
            }
        }
        go(&self.body, &mut Vec::new(), f);
    }
}

impl Kernel {
    /// The name of every operation, in the order of [`Kernel::for_each_op`]: the (first) tile it writes, or
    /// `store.BUFFER`, with `@k` appended for the k-th of that name after the first.
    pub fn op_names(&self, plan: &Plan) -> Vec<String> {
        let mut seen = std::collections::BTreeMap::<String, usize>::new();
        let mut names = Vec::new();
        self.for_each_op(&mut |op, _| {
            let name = match op {
                Op::Store { buffer, .. } => format!("store.{}", plan.buffers[*buffer].name),
                Op::Load { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {
                    op.outs().first().map_or_else(|| "nothing".to_string(), |t| self.tiles[*t].name.clone())
                }
            };
            let k = seen.entry(name.clone()).and_modify(|k| *k += 1).or_insert(0);
            names.push(if *k == 0 { name } else { format!("{name}@{k}") });
        });
        names
    }

    /// Whether each expression, by its position, is integer-valued (so that `/` and `%` are the integer ones).
    pub fn integer_exprs(&self, plan: &Plan) -> Vec<bool> {
        let mut int = Vec::with_capacity(self.exprs.len());
        for (_, e) in self.exprs.iter() {
            let at = |id: &ExprId| int[crate::arena::Id::index(*id)];
            let v = match e {
                Expr::Int(_) | Expr::Size(_) | Expr::Coord(_) => true,
                Expr::Float(_) | Expr::Rand(_) => false,
                Expr::Tile(t) | Expr::TileAt { tile: t, .. } => self.tiles[*t].dtype.is_int(),
                Expr::Read { buffer, .. } => plan.buffers[*buffer].dtype.is_int(),
                Expr::Unary(op, a) => match op {
                    UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Sign => at(a),
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
                    | UnaryOp::Erf
                    | UnaryOp::Floor
                    | UnaryOp::Ceil
                    | UnaryOp::Round
                    | UnaryOp::Not => false,
                },
                Expr::Binary(op, a, b) => !op.is_predicate() && at(a) && at(b),
                Expr::Select(_, a, b) => at(a) && at(b),
                Expr::Cast(d, _) => d.is_int(),
            };
            int.push(v);
        }
        int
    }
}

impl Op {
    /// The tiles it writes.
    pub fn outs(&self) -> &[TileId] {
        match self {
            Op::Load { out, .. } | Op::Map { out, .. } | Op::Contract { out, .. } | Op::Scan { out, .. } => {
                std::slice::from_ref(out)
            }
            Op::Reduce { out, .. } => out,
            Op::Store { .. } => &[],
        }
    }

    /// The expressions it holds directly.
    pub fn roots(&self) -> Vec<ExprId> {
        match self {
            Op::Load { at, .. } => at.clone(),
            Op::Store { at, value, when, .. } => at.iter().copied().chain([*value]).chain(*when).collect(),
            Op::Map { value, .. } | Op::Reduce { value, .. } | Op::Scan { value, .. } => vec![*value],
            Op::Contract { .. } => Vec::new(),
        }
    }
}
