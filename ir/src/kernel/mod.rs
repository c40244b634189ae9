//! The kernel IR: structured code near the target, from which every backend prints.
//!
//! A kernel runs over a grid of tasks (CTAs, workgroups, CPU tasks). In a task each *role* runs its body on some
//! units; a unit is a thread, warp or warpgroup that acts as one: statements are collective over the unit, and
//! *fragments* are register arrays distributed over it ([`Distribution`]: a CPU unit is one thread with vector
//! lanes). Asynchronous work (TMA, cp.async, wgmma) writes buffers and accumulators and is awaited by tokens:
//! barriers and groups, never by renaming. Invariants: fragment extents are static; elementwise operands are
//! distributed like the result, projected to their dimensions; integer expressions are uniform over a unit.
//! Source of the asynchronous semantics: PTX ISA 8.x, "Asynchronous operations", "mbarrier", "wgmma".

pub mod atoms;
pub mod copies;
pub mod eval;
pub mod mutate;
pub mod parse;
pub mod print;
mod uses;
pub mod variants;
pub mod verify;

use std::collections::BTreeSet;

use crate::arena::Arena;
use crate::cascade::{Rank, RankId};
use crate::define_ids;
use crate::dtype::DType;
use crate::layout::{Distribution, MemLayout};
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

define_ids! {
    /// A memory buffer.
    BufId,
    /// A register fragment.
    FragId,
    /// A barrier, with stages.
    BarrierId,
    /// A scalar integer variable: a loop counter or a `let`.
    VarId,
}

/// A module: the kernels of one plan, with the ranks they share.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// The plan's name.
    pub name: String,
    /// Ranks bound at launch.
    pub ranks: Arena<RankId, Rank>,
    /// Kernels in launch order.
    pub kernels: Vec<Kernel>,
}

/// One kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Unique in the module; the symbol.
    pub name: String,
    /// The kernel of the plan it is one variant of; none: it stands alone. Variants of one kernel follow one another
    /// in the module, and a launch runs the first whose assumptions hold ([`variants`]).
    pub variant_of: Option<String>,
    /// What the code takes for granted; whoever launches checks it.
    pub assumes: Vec<Assumption>,
    /// Whether a launch may start it while the kernel before it runs (programmatic dependent launch): it waits by
    /// [`GridDependency::Wait`] before it touches what that one does.
    pub dependent: bool,
    /// Tasks along each grid dimension, outermost first: expressions over extents.
    pub grid: Vec<Expr>,
    /// Tasks of a cluster along each grid dimension; empty: no clusters.
    pub cluster: Vec<u64>,
    /// Memory it touches.
    pub bufs: Arena<BufId, Buf>,
    /// Register fragments.
    pub frags: Arena<FragId, Frag>,
    /// Barriers in shared memory, and named ones.
    pub barriers: Arena<BarrierId, Barrier>,
    /// Integer variables.
    pub vars: Arena<VarId, Var>,
    /// Concurrent roles of a task.
    pub roles: Vec<Role>,
}

/// What a variant of a kernel takes for granted about a launch.
#[derive(Clone, Debug, PartialEq)]
pub enum Assumption {
    /// The expression over extents is at most so much.
    AtMost(Expr, u64),
    /// The expression over extents is a multiple of so much.
    Multiple(Expr, u64),
    /// The array's base address and, in bytes, all its strides but the last dimension's are multiples of so many
    /// bytes, and elements are contiguous along the last dimension: what wide loads and stores need.
    Aligned(BufId, u64),
}

/// An integer variable.
#[derive(Clone, Debug, PartialEq)]
pub struct Var {
    /// For the reader; unique in the kernel.
    pub name: String,
}

/// Where a buffer lives.
#[derive(Clone, Debug, PartialEq)]
pub enum BufSpace {
    /// Device memory, passed by base pointer and run-time strides (in elements). `param` is the position of the
    /// array among the plan's buffers. No dimensions: a scalar parameter passed by value.
    Global {
        /// Position among the plan's buffers.
        param: usize,
        /// Whether the kernel writes it.
        written: bool,
        /// As of [`BufSpace::Scratch`]. Where more than 1, the plan's array has one dimension more: its last three count
        /// groups of neighbours, coordinates of the last dimension, and neighbours.
        together: u64,
    },
    /// Shared memory of a task, `stages` copies of a static layout.
    Shared {
        /// Placement of one stage.
        layout: MemLayout,
        /// Copies.
        stages: u64,
    },
    /// Memory private to a task on a CPU: strided, one stride expression per dimension, in elements.
    Scratch {
        /// Strides in elements.
        strides: Vec<Expr>,
        /// Neighbours along the last dimension but one that stand together, one after the other, for each coordinate of
        /// the last dimension (whose stride is then 1): 1, or how many elements of `b` an atom reads as one. Element
        /// (.., i, j) is at i / together · together · stride + j · together + i % together.
        together: u64,
    },
}

/// A memory buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Buf {
    /// Unique in the kernel.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents: expressions over extents; constants for shared memory.
    pub dims: Vec<Expr>,
    /// Where it lives.
    pub space: BufSpace,
}

/// A register fragment.
#[derive(Clone, Debug, PartialEq)]
pub struct Frag {
    /// Unique in the kernel.
    pub name: String,
    /// Element type of the registers.
    pub dtype: DType,
    /// Who holds what.
    pub dist: Distribution,
}

/// What a barrier is.
#[derive(Clone, Debug, PartialEq)]
pub enum BarrierKind {
    /// An mbarrier: a phase completes after `count` arrivals and all expected bytes. [`Stmt::Arrive`] is one arrival
    /// per unit (one elected thread); a signalled `cp.async` copy arrives once per thread of its unit (`noinc`).
    /// Barriers are initialised, and the initialisation visible to every unit of the task or cluster, at kernel start.
    Mbarrier {
        /// Arrivals per phase.
        count: u64,
    },
    /// A named barrier of the CTA over `threads` threads (`bar.sync`/`bar.arrive`).
    Named {
        /// Threads that take part, arrivals included.
        threads: u64,
    },
}

/// A barrier with stages (an array of equal barriers).
#[derive(Clone, Debug, PartialEq)]
pub struct Barrier {
    /// Unique in the kernel.
    pub name: String,
    /// What it is.
    pub kind: BarrierKind,
    /// How many.
    pub stages: u64,
}

/// The collective that acts as one unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// One thread: a CPU core.
    Thread,
    /// 32 threads.
    Warp,
    /// 128 threads.
    Warpgroup,
}

impl Scope {
    /// Its threads.
    pub fn threads(self) -> u64 {
        match self {
            Scope::Thread => 1,
            Scope::Warp => 32,
            Scope::Warpgroup => 128,
        }
    }
}

/// Concurrent units of a task that run the same body; [`Expr::Unit`] tells them apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Role {
    /// Unique in the kernel.
    pub name: String,
    /// What a unit is.
    pub scope: Scope,
    /// How many units.
    pub units: u64,
    /// Registers per thread: by setmaxnreg among other roles, else the most the assembler uses.
    pub regs: Option<u64>,
    /// What each unit does.
    pub body: Vec<Stmt>,
}

/// A scalar expression: uniform (integers, conditions) or elementwise in a [`Stmt::Map`].
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A variable.
    Var(VarId),
    /// A rank's extent.
    Extent(RankId),
    /// The task's position along a grid dimension.
    Grid(usize),
    /// The unit's number in its role.
    Unit,
    /// The task's rank in its cluster.
    ClusterRank,
    /// A scalar parameter's value.
    Scalar(BufId),
    /// One element of a buffer, uniform: an index or offset read by the control flow. Out of range reads 0.
    Fetch {
        /// The buffer.
        buf: BufId,
        /// One coordinate per dimension.
        at: Vec<Expr>,
    },
    /// Elementwise: the fragment's element; its dimension `i` is dimension `dims[i]` of the result.
    Frag {
        /// The fragment.
        frag: FragId,
        /// Which dimensions of the result it has.
        dims: Vec<usize>,
    },
    /// Elementwise: the element's coordinate along a dimension of the result, within the fragment.
    Coord(usize),
    /// A scalar function.
    Unary(UnaryOp, Box<Expr>),
    /// A scalar function of two arguments; integer when both are.
    Binary(BinaryOp, Box<Expr>, Box<Expr>),
    /// a·b + c with one rounding.
    Fma(Box<Expr>, Box<Expr>, Box<Expr>),
    /// `if cond then a else b`; both sides may be computed.
    Select(Box<Expr>, Box<Expr>, Box<Expr>),
    /// A conversion, rounding.
    Cast(DType, Box<Expr>),
    /// A uniform value in [0,1): the seed, then four integer coordinates
    /// ([`crate::cascade::eval::philox::uniform`]).
    Rand(Box<[Expr; 5]>),
}

/// A window into a buffer, walked by a fragment or a copied tile.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// The buffer.
    pub buf: BufId,
    /// The stage, for staged shared memory.
    pub stage: Option<Expr>,
    /// Coordinate of the window's origin, one per dimension of the buffer.
    pub at: Vec<Expr>,
    /// For each dimension of the fragment or tile: the buffer dimension it walks and its step; none broadcasts.
    pub walk: Vec<Option<(usize, i64)>>,
}

/// Elements beyond `limit` along fragment dimension `dim` are absent: loads give 0, stores skip them.
#[derive(Clone, Debug, PartialEq)]
pub struct Bound {
    /// Fragment dimension.
    pub dim: usize,
    /// Coordinates `>= limit` are absent.
    pub limit: Expr,
}

/// The engine that moves a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Engine {
    /// `cp.async.bulk.tensor`: global ↔ shared, one thread issues; zero-fills out of range.
    Tma,
    /// `cp.async`: global → shared, every thread of the unit copies 4–16 bytes at a time.
    CpAsync,
}

/// A contraction instruction, by name in the atom table.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AtomName(pub String);

/// An operand of an atom.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A fragment; `from` is the first coordinate per dimension of the window the atom reads.
    Frag {
        /// The fragment.
        frag: FragId,
        /// Window origin (static).
        from: Vec<u64>,
    },
    /// Memory the atom reads itself (wgmma: shared, through a descriptor).
    Mem(View),
}

/// What a fence orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FenceKind {
    /// Generic writes to shared memory before later asynchronous-proxy reads (`fence.proxy.async.shared::cta`).
    ProxyAsync,
    /// Register writes before wgmma reads them (`wgmma.fence`).
    Wgmma,
    /// Barrier initialisation before other units and the asynchronous proxy use it (`fence.mbarrier_init`).
    MbarrierInit,
    /// Writes to device memory before a later grid-scope flag (`fence.acq_rel.gpu`).
    Gpu,
}

/// How a grid depends on the one launched before it (PTX ISA, "griddepcontrol").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GridDependency {
    /// The unit waits until the grids before have ended and what they did is visible (`griddepcontrol.wait`).
    Wait,
    /// As far as the task is concerned, the grid after it may start (`griddepcontrol.launch_dependents`); it does when
    /// every task has said so or ended.
    Launch,
}

/// Which asynchronous group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// `wgmma.commit_group` / `wait_group`.
    Wgmma,
    /// `cp.async.commit_group` / `wait_group`.
    CpAsync,
    /// `cp.async.bulk.commit_group` / `wait_group`: stores by TMA.
    Bulk,
}

/// A statement, collective over its unit.
#[derive(Clone, Debug, PartialEq)]
pub enum Stmt {
    /// `for var in lo..hi step`.
    For {
        /// The counter.
        var: VarId,
        /// First value.
        lo: Expr,
        /// One past the last value.
        hi: Expr,
        /// Increment, positive.
        step: i64,
        /// Copies of the body to print (1: a loop; the trip count must then be static).
        unroll: bool,
        /// The body.
        body: Vec<Stmt>,
    },
    /// `if cond then .. else ..`, uniform.
    If {
        /// The condition.
        cond: Expr,
        /// Taken when non-zero.
        then: Vec<Stmt>,
        /// Taken when zero.
        otherwise: Vec<Stmt>,
    },
    /// Binds an integer variable; may be rebound in loops.
    Let {
        /// The variable.
        var: VarId,
        /// Its value.
        value: Expr,
    },
    /// `out[i..] = value`, elementwise over the fragment.
    Map {
        /// The fragment written.
        out: FragId,
        /// Its elements.
        value: Expr,
    },
    /// `out = ⊕ over dims of src` (across registers, lanes and threads), joined with `out` if `carry`.
    /// Argument selections write (value, position).
    Reduce {
        /// One fragment, or two.
        out: Vec<FragId>,
        /// The monoid.
        op: ReduceOp,
        /// What is reduced.
        src: FragId,
        /// Dimensions of `src` that disappear; the others map to `out`'s in order.
        over: Vec<usize>,
        /// Added to every position of an argument selection.
        base: Option<Expr>,
        /// Elements of `src` beyond are skipped.
        bounds: Vec<Bound>,
        /// Whether the value before is joined in.
        carry: bool,
    },
    /// `out[.., i, ..] = carry ⊕ src[.., 0, ..] ⊕ … ⊕ src[.., i, ..]`: a running reduction along a dimension of two
    /// fragments held alike (across registers and lanes of a unit).
    Scan {
        /// The fragment written.
        out: FragId,
        /// The monoid.
        op: ReduceOp,
        /// What is accumulated.
        src: FragId,
        /// The dimension it runs along.
        along: usize,
        /// A fragment without that dimension: joined in first, then set to the last running value.
        carry: Option<FragId>,
        /// Elements of `src` beyond contribute nothing.
        bounds: Vec<Bound>,
    },
    /// Memory → fragment.
    Load {
        /// The fragment written; converted to its type.
        out: FragId,
        /// Where from.
        src: View,
        /// Absent elements read 0.
        bounds: Vec<Bound>,
    },
    /// Fragment → memory, converted to the buffer's type.
    Store {
        /// Where to.
        dst: View,
        /// The fragment read.
        src: FragId,
        /// Absent elements are not stored.
        bounds: Vec<Bound>,
        /// How earlier values are joined (atomically in device memory); none overwrites.
        join: Option<ReduceOp>,
    },
    /// Gathered load: element coordinates are elementwise expressions; outside the buffer reads 0.
    Gather {
        /// The fragment written.
        out: FragId,
        /// The buffer.
        buf: BufId,
        /// One elementwise integer expression per dimension.
        at: Vec<Expr>,
        /// Absent elements read 0.
        bounds: Vec<Bound>,
    },
    /// Scattered store: outside the buffer is dropped.
    Scatter {
        /// The buffer.
        buf: BufId,
        /// One elementwise integer expression per dimension, over the dimensions of `src`.
        at: Vec<Expr>,
        /// What is stored.
        src: FragId,
        /// Absent elements are not stored.
        bounds: Vec<Bound>,
        /// How earlier values are joined; none overwrites.
        join: Option<ReduceOp>,
    },
    /// `acc += a·b` (or `= a·b`) by one instruction. Asynchronous atoms join the unit's open wgmma group.
    Atom {
        /// The instruction.
        atom: AtomName,
        /// The accumulator.
        acc: FragId,
        /// Window origin in the accumulator (static).
        acc_from: Vec<u64>,
        /// Left operand.
        a: Operand,
        /// Right operand.
        b: Operand,
        /// Whether the accumulator's value is kept (uniform condition); otherwise it starts from 0.
        keep: Expr,
    },
    /// An asynchronous tile copy of `extents` elements.
    Copy {
        /// The engine.
        engine: Engine,
        /// Where from.
        src: View,
        /// Where to.
        dst: View,
        /// Extents of the copied tile.
        extents: Vec<u64>,
        /// The barrier (and stage) whose phase counts the bytes; none for stores, which join the bulk group.
        signal: Option<(BarrierId, Expr)>,
        /// Multicast to the tasks of the cluster in this mask (by cluster rank).
        multicast: Option<u64>,
    },
    /// Arrives at a barrier, first adding `expect_bytes` to what the phase waits for.
    Arrive {
        /// The barrier.
        barrier: BarrierId,
        /// Its stage.
        stage: Expr,
        /// Bytes of asynchronous copies this phase waits for.
        expect_bytes: Option<u64>,
        /// The cluster rank whose barrier it is; none: this task's.
        remote: Option<Expr>,
    },
    /// Waits until the phase of parity `phase` has completed.
    Wait {
        /// The barrier.
        barrier: BarrierId,
        /// Its stage.
        stage: Expr,
        /// Parity: 0 for the first phase, then 1, 0, …
        phase: Expr,
    },
    /// `bar.sync` (blocks) on a named barrier.
    NamedSync {
        /// The barrier.
        barrier: BarrierId,
        /// Its stage.
        stage: Expr,
    },
    /// `bar.arrive` (does not block) on a named barrier.
    NamedArrive {
        /// The barrier.
        barrier: BarrierId,
        /// Its stage.
        stage: Expr,
    },
    /// Orders memory accesses.
    Fence(FenceKind),
    /// Closes the unit's open group.
    Commit(GroupKind),
    /// Waits until at most `pending` of the unit's newest groups are open.
    WaitGroup {
        /// Which groups.
        kind: GroupKind,
        /// How many may stay open.
        pending: u64,
    },
    /// Counts the unit at a counter in device memory, an i32 array of zeros between launches. `var` is 1 in the unit
    /// that is the `of`-th to count there, whose counter starts again at 0, and 0 in the others. What units did before
    /// they counted happens before what the last one does after it (release and acquire at device scope).
    Last {
        /// Whether the unit is the last.
        var: VarId,
        /// The counters.
        counter: BufId,
        /// Which of them: one coordinate per dimension.
        at: Vec<Expr>,
        /// How many units count, at least 1.
        of: Expr,
    },
    /// Every thread of the task.
    TaskSync,
    /// Every thread of the cluster.
    ClusterSync,
    /// Every thread of the grid (cooperative launch).
    GridSync,
    /// Order between this grid and its neighbours in the stream.
    GridDependency(GridDependency),
}

impl Stmt {
    /// The lists of statements directly within: a loop's body, the branches of a condition.
    pub fn bodies(&self) -> [&[Stmt]; 2] {
        match self {
            Stmt::For { body, .. } => [body, &[]],
            Stmt::If { then, otherwise, .. } => [then, otherwise],
            Stmt::Let { .. }
            | Stmt::Map { .. }
            | Stmt::Reduce { .. }
            | Stmt::Scan { .. }
            | Stmt::Load { .. }
            | Stmt::Store { .. }
            | Stmt::Gather { .. }
            | Stmt::Scatter { .. }
            | Stmt::Atom { .. }
            | Stmt::Copy { .. }
            | Stmt::Arrive { .. }
            | Stmt::Wait { .. }
            | Stmt::NamedSync { .. }
            | Stmt::NamedArrive { .. }
            | Stmt::Fence(_)
            | Stmt::Commit(_)
            | Stmt::WaitGroup { .. }
            | Stmt::Last { .. }
            | Stmt::TaskSync
            | Stmt::ClusterSync
            | Stmt::GridSync
            | Stmt::GridDependency(_) => [&[], &[]],
        }
    }
}

/// Calls `f` on every statement in order, outer ones first.
pub fn walk<'a>(body: &'a [Stmt], f: &mut impl FnMut(&'a Stmt)) {
    for s in body {
        f(s);
        s.bodies().into_iter().for_each(|b| walk(b, f));
    }
}

impl Kernel {
    /// Arrays in which units count ([`Stmt::Last`]), by position among the plan's: zeros before the first launch.
    pub fn counters(&self) -> BTreeSet<usize> {
        fn go(k: &Kernel, body: &[Stmt], out: &mut BTreeSet<usize>) {
            for s in body {
                match s {
                    Stmt::For { body, .. } => go(k, body, out),
                    Stmt::If { then, otherwise, .. } => {
                        go(k, then, out);
                        go(k, otherwise, out);
                    }
                    Stmt::Last { counter, .. } => {
                        if let BufSpace::Global { param, .. } = k.bufs[*counter].space {
                            out.insert(param);
                        }
                    }
                    _ => {}
                }
            }
        }
        let mut out = BTreeSet::new();
        self.roles.iter().for_each(|r| go(self, &r.body, &mut out));
        out
    }

    /// Whether the expression's value is an integer (or a bool): division and remainder of integers are integer.
    pub fn is_integer(&self, e: &Expr) -> bool {
        let integral = |d: DType| !d.is_float();
        match e {
            Expr::Int(_)
            | Expr::Var(_)
            | Expr::Extent(_)
            | Expr::Grid(_)
            | Expr::Unit
            | Expr::ClusterRank
            | Expr::Coord(_) => true,
            Expr::Float(_) | Expr::Rand(_) => false,
            Expr::Scalar(buf) | Expr::Fetch { buf, .. } => self.bufs.get(*buf).is_some_and(|b| integral(b.dtype)),
            Expr::Frag { frag, .. } => self.frags.get(*frag).is_some_and(|f| integral(f.dtype)),
            Expr::Unary(UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Sign, a) => self.is_integer(a),
            Expr::Unary(op, _) => *op == UnaryOp::Not,
            Expr::Binary(op, a, b) => op.is_predicate() || (self.is_integer(a) && self.is_integer(b)),
            Expr::Fma(a, b, c) => self.is_integer(a) && self.is_integer(b) && self.is_integer(c),
            Expr::Select(_, a, b) => self.is_integer(a) && self.is_integer(b),
            Expr::Cast(d, _) => integral(*d),
        }
    }
}

impl Expr {
    /// `op(self, rhs)`, folding integer literals.
    pub fn bin(self, op: BinaryOp, rhs: Expr) -> Expr {
        use BinaryOp::*;
        match (op, &self, &rhs) {
            (Add, Expr::Int(0), _) => rhs,
            (Add | Sub, _, Expr::Int(0)) | (Mul | Div, _, Expr::Int(1)) => self,
            (Mul, Expr::Int(1), _) => rhs,
            (Mul, Expr::Int(0), _) | (Mul, _, Expr::Int(0)) => Expr::Int(0),
            (_, Expr::Int(a), Expr::Int(b)) => {
                let v = match op {
                    Add => a.checked_add(*b),
                    Sub => a.checked_sub(*b),
                    Mul => a.checked_mul(*b),
                    Div => Some(if *b == 0 { 0 } else { a.div_euclid(*b) }),
                    Mod => Some(if *b == 0 { 0 } else { a.rem_euclid(*b) }),
                    Min => Some(*a.min(b)),
                    Max => Some(*a.max(b)),
                    Pow => None,
                    Lt | Le | Gt | Ge | Eq | Ne | And | Or => Some(op.eval(*a as f64, *b as f64, true) as i64),
                };
                match v {
                    Some(v) => Expr::Int(v),
                    None => Expr::Binary(op, Box::new(self), Box::new(rhs)),
                }
            }
            _ => Expr::Binary(op, Box::new(self), Box::new(rhs)),
        }
    }

    /// Calls `f` on every operand.
    pub fn for_each_operand<'a>(&'a self, mut f: impl FnMut(&'a Expr)) {
        match self {
            Expr::Int(_)
            | Expr::Float(_)
            | Expr::Var(_)
            | Expr::Extent(_)
            | Expr::Grid(_)
            | Expr::Unit
            | Expr::ClusterRank
            | Expr::Scalar(_)
            | Expr::Frag { .. }
            | Expr::Coord(_) => {}
            Expr::Fetch { at, .. } => at.iter().for_each(f),
            Expr::Unary(_, a) | Expr::Cast(_, a) => f(a),
            Expr::Binary(_, a, b) => {
                f(a);
                f(b);
            }
            Expr::Fma(a, b, c) | Expr::Select(a, b, c) => {
                f(a);
                f(b);
                f(c);
            }
            Expr::Rand(of) => of.iter().for_each(f),
        }
    }
}
