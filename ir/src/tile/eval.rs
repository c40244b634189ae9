//! The float64 evaluator of the tile IR: runs a plan block by block, for blocks of any size.
//!
//! It is the meaning of the level: what a kernel does depends on its text alone, never on the blocks (tests run
//! several). Elements that do not exist (tails) are skipped; a tile is poison until written, and again once the
//! blocks of its axes have moved on; reading poison is an error that names the operation and the tile. Tasks of one
//! kernel are independent: an element stored by one task and touched by another is an error.

use std::collections::BTreeMap;
use std::fmt;

use super::{AxisId, AxisKind, BufferKind, Expr, ExprId, Kernel, Node, Op, Place, Plan, Stream, TileId};
use crate::arena::Id;
use crate::array::{Array, element_count, strides};
use crate::cascade::SizeError;
use crate::cascade::eval::declared::{Declared, Rounding};
use crate::cascade::eval::domain::{Domain, Ty};
use crate::dtype::DType;
use crate::ops::ReduceOp;

/// The blocks to run with. Axes of sequential streams always have 1, inner axes are whole.
#[derive(Clone, Debug, PartialEq)]
pub enum Blocks {
    /// What the plan declares; axes without a block are whole.
    Declared,
    /// The same for every axis.
    Uniform(u64),
    /// A small number per axis, drawn from this seed: 1, odd ones, and more than the extent.
    Drawn(u64),
    /// By kernel and axis name; others as declared.
    Named(BTreeMap<(String, String), u64>),
}

/// How to run a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Block sizes.
    pub blocks: Blocks,
    /// Whether tiles and arrays round to their declared types; otherwise only written casts and integer types do.
    pub rounding: bool,
    /// Whether blocks of a stream whose filter is false everywhere are skipped, as a lowering may.
    pub skip_masked: bool,
    /// With `rounding`: to either neighbour, drawn from this seed with the probability of its nearness, and operations of
    /// floats as processors compute them, off by what theirs may be; none: to the nearest, operations exact.
    pub stochastic: Option<u64>,
    /// With `rounding`: whether outputs that no kernel reads again round to their type too. Without, what the last
    /// rounding adds can be told apart from what came before.
    pub round_results: bool,
    /// Of the last kernel, so many tasks drawn from a seed; what the others would have stored stays NaN. None: all.
    pub tasks: Option<(u64, u64)>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            blocks: Blocks::Declared,
            rounding: false,
            skip_masked: true,
            stochastic: None,
            round_results: true,
            tasks: None,
        }
    }
}

/// Why a plan cannot be run: a fault of the plan, or of the arguments.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum TileError {
    /// An extent has no value for these ranks.
    Extent(SizeError),
    /// As many arrays are needed as there are inputs and inouts.
    InputCount {
        /// Arrays needed.
        want: usize,
        /// Arrays given.
        got: usize,
    },
    /// An input of other extents than declared.
    InputShape {
        /// The array.
        buffer: String,
        /// Declared extents.
        want: Vec<u64>,
        /// Given extents.
        got: Vec<u64>,
    },
    /// An operation reads a tile that holds nothing for the present blocks.
    Poison {
        /// The kernel.
        kernel: String,
        /// The operation that reads.
        op: String,
        /// The tile read.
        tile: String,
    },
    /// An operation uses an axis that no stream around it walks.
    AxisNotWalked {
        /// The kernel.
        kernel: String,
        /// The operation.
        op: String,
        /// The axis.
        axis: String,
    },
    /// An element of an array is read that nothing wrote.
    Unwritten {
        /// The kernel that reads; none: the caller, of an output.
        kernel: Option<String>,
        /// The array.
        buffer: String,
        /// The element.
        at: Vec<u64>,
    },
    /// Two tasks of a kernel touch one element of an array and at least one stores to it.
    Race {
        /// The kernel.
        kernel: String,
        /// The operation that came second.
        op: String,
        /// The array.
        buffer: String,
        /// The element.
        at: Vec<u64>,
    },
}

impl fmt::Display for TileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TileError::Extent(e) => write!(f, "an extent has no value: {e:?}"),
            TileError::InputCount { want, got } => write!(f, "{got} arrays given for {want} inputs"),
            TileError::InputShape { buffer, want, got } => {
                write!(f, "array {buffer} has extents {got:?}, declared {want:?}")
            }
            TileError::Poison { kernel, op, tile } => {
                write!(f, "kernel {kernel}: operation {op} reads tile {tile} before it is written for these blocks")
            }
            TileError::AxisNotWalked { kernel, op, axis } => {
                write!(f, "kernel {kernel}: operation {op} uses stream axis {axis} outside a stream over it")
            }
            TileError::Unwritten { kernel: Some(k), buffer, at } => {
                write!(f, "kernel {k} reads {buffer}{at:?}, which nothing wrote")
            }
            TileError::Unwritten { kernel: None, buffer, at } => write!(f, "nothing wrote output {buffer}{at:?}"),
            TileError::Race { kernel, op, buffer, at } => {
                write!(f, "kernel {kernel}: operation {op} touches {buffer}{at:?}, which another task uses too")
            }
        }
    }
}

impl std::error::Error for TileError {}

impl From<SizeError> for TileError {
    fn from(e: SizeError) -> Self {
        TileError::Extent(e)
    }
}

/// Runs `plan` for the rank extents `ranks` on `inputs`, one array per input and inout in order, and returns one
/// array per output and inout in order.
///
/// # Errors
/// Any fault of [`TileError`].
///
/// # Panics
/// On plans that [`super::verify`] refuses.
pub fn run(plan: &Plan, ranks: &[u64], inputs: &[Array], options: &Options) -> Result<Vec<Array>, TileError> {
    let takes = |k: BufferKind| matches!(k, BufferKind::Input | BufferKind::InOut);
    let want = plan.buffers.iter().filter(|(_, b)| takes(b.kind)).count();
    if inputs.len() != want {
        return Err(TileError::InputCount { want, got: inputs.len() });
    }
    let mut given = inputs.iter();
    let mut memory = Vec::with_capacity(plan.buffers.len());
    for (id, b) in plan.buffers.iter() {
        let dims = b.dims.iter().map(|d| d.eval(ranks)).collect::<Result<Vec<_>, _>>()?;
        let n = element_count(&dims).ok_or(SizeError::Overflow)? as usize;
        let mut m = Memory {
            strides: strides(&dims),
            dims,
            data: vec![f64::NAN; n],
            written: vec![false; n],
            ..Memory::default()
        };
        if takes(b.kind) {
            let a = given.next().expect("counted above");
            if a.dims != m.dims {
                return Err(TileError::InputShape { buffer: b.name.clone(), want: m.dims, got: a.dims.clone() });
            }
            m.data.copy_from_slice(&a.data);
            m.written.fill(true);
        }
        m.exact = !options.round_results && b.kind == BufferKind::Output && !is_read(plan, id);
        memory.push(m);
    }
    for (k, kernel) in plan.kernels.iter().enumerate() {
        for m in &mut memory {
            m.writer = vec![0; m.data.len()];
            m.reader = vec![0; m.data.len()];
        }
        let tasks = options.tasks.filter(|_| k + 1 == plan.kernels.len());
        Task::run_all(plan, kernel, ranks, options, tasks, &mut memory)?;
    }
    let mut outs = Vec::new();
    for ((_, b), m) in plan.buffers.iter().zip(memory) {
        if matches!(b.kind, BufferKind::Output | BufferKind::InOut) {
            let missing = m.written.iter().position(|w| !w);
            if let (Some(i), None) = (missing, options.tasks) {
                let at = crate::array::coordinates(&m.dims, i as u64);
                return Err(TileError::Unwritten { kernel: None, buffer: b.name.clone(), at });
            }
            outs.push(Array { dtype: b.dtype, dims: m.dims, data: m.data });
        }
    }
    Ok(outs)
}

/// Whether some kernel loads from a buffer.
fn is_read(plan: &Plan, buffer: super::BufferId) -> bool {
    fn loads(nodes: &[Node], buffer: super::BufferId) -> bool {
        nodes.iter().any(|n| match n {
            Node::Stream(s) => loads(&s.body, buffer),
            Node::Op(Op::Load { buffer: b, .. }) => *b == buffer,
            Node::Op(Op::Store { join, buffer: b, .. }) => join.is_some() && *b == buffer,
            Node::Op(Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. }) => false,
        })
    }
    let reads = |e: &Expr| matches!(e, Expr::Read { buffer: b, .. } if *b == buffer);
    plan.kernels.iter().any(|k| loads(&k.body, buffer) || k.exprs.iter().any(|(_, e)| reads(e)))
}

/// An array in device memory while a plan runs.
#[derive(Default)]
struct Memory {
    dims: Vec<u64>,
    strides: Vec<i64>,
    data: Vec<f64>,
    written: Vec<bool>,
    /// Whether stores leave values as they are.
    exact: bool,
    /// The task of the running kernel that stored the element (counted from 1); 0: none.
    writer: Vec<u32>,
    /// A task of the running kernel that read the element; [`MANY`]: several.
    reader: Vec<u32>,
}

const MANY: u32 = u32::MAX;

/// The values of a tile and the block they are for.
struct Held {
    /// First coordinate and count along each axis of the tile.
    window: Vec<(u64, u64)>,
    data: Vec<f64>,
}

/// Where a tile's elements lie: axis, first coordinate and stride, last axis first.
struct Steps {
    tile: usize,
    steps: Vec<(usize, u64, u64)>,
}

/// One task of a kernel: a point of its grid of blocks.
struct Task<'a> {
    plan: &'a Plan,
    kernel: &'a Kernel,
    ranks: &'a [u64],
    options: &'a Options,
    memory: &'a mut [Memory],
    integer: &'a [bool],
    /// What expressions of floats compute in.
    arithmetic: Ty,
    /// Operation names, in the order of [`Kernel::for_each_op`].
    names: &'a [String],
    extents: &'a [u64],
    blocks: &'a [u64],
    /// Its number, from 1.
    number: u32,
    /// The present block of each axis: first coordinate and count; none for stream axes not being walked.
    window: Vec<Option<(u64, u64)>>,
    tiles: Vec<Option<Held>>,
}

/// The expressions an operation needs, operands first, with room for their values at one point.
struct Program {
    order: Vec<ExprId>,
}

impl Program {
    fn new(kernel: &Kernel, roots: &[ExprId]) -> Program {
        let mut need = vec![false; kernel.exprs.len()];
        let mut stack = roots.to_vec();
        while let Some(e) = stack.pop() {
            if !std::mem::replace(&mut need[e.index()], true) {
                kernel.exprs[e].for_each_operand(|o| stack.push(o));
            }
        }
        Program { order: kernel.exprs.ids().filter(|e| need[e.index()]).collect() }
    }
}

impl<'a> Task<'a> {
    fn run_all(
        plan: &'a Plan,
        kernel: &'a Kernel,
        ranks: &'a [u64],
        options: &'a Options,
        tasks: Option<(u64, u64)>,
        memory: &'a mut [Memory],
    ) -> Result<(), TileError> {
        let extents = kernel.axes.iter().map(|(_, a)| a.extent.eval(ranks)).collect::<Result<Vec<_>, _>>()?;
        let blocks = blocks(kernel, &extents, &options.blocks);
        let integer = kernel.integer_exprs(plan);
        let types = kernel.tiles.iter().map(|(_, t)| t.dtype).chain(plan.buffers.iter().map(|(_, b)| b.dtype));
        let arithmetic = types.fold(Ty::F32, |ty, dtype| ty.join(Ty::of(dtype)));
        let names = kernel.op_names(plan);
        let grid: Vec<usize> =
            kernel.axes.iter().filter(|(_, a)| a.kind == AxisKind::Grid).map(|(id, _)| id.index()).collect();
        let counts: Vec<u64> = grid.iter().map(|&a| extents[a].div_ceil(blocks[a])).collect();
        let total: u64 = counts.iter().product();
        // Where blocks of an axis follow each other, tasks of different ones may touch an element.
        let ordered = kernel.ordered.and_then(|a| grid.iter().position(|g| *g == a.index()));
        let within: u64 = ordered.map_or(1, |d| counts[d + 1..].iter().product());
        let step = |number: u64| ordered.map_or(0, |d| number / within % counts[d]);
        let numbers = (0..ordered.map_or(1, |d| counts[d])).flat_map(|s| (0..total).filter(move |n| step(*n) == s));
        let mut before = None;
        for number in numbers {
            if tasks.is_some_and(|(count, seed)| !drawn(number, total, count, seed)) {
                continue;
            }
            if before.replace(step(number)).is_some_and(|b| b != step(number)) {
                for m in memory.iter_mut() {
                    m.writer.fill(0);
                    m.reader.fill(0);
                }
            }
            let mut window: Vec<_> = kernel
                .axes
                .iter()
                .zip(&extents)
                .map(|((_, a), &n)| (a.kind == AxisKind::Inner).then_some((0, n)))
                .collect();
            for (&axis, at) in grid.iter().zip(crate::array::coordinates(&counts, number)) {
                window[axis] = Some(block_at(at, blocks[axis], extents[axis]));
            }
            let mut task = Task {
                plan,
                kernel,
                ranks,
                options,
                memory: &mut *memory,
                integer: &integer,
                arithmetic,
                names: &names,
                extents: &extents,
                blocks: &blocks,
                number: u32::try_from(number + 1).expect("fewer than 2^32 tasks"),
                window,
                tiles: kernel.tiles.iter().map(|_| None).collect(),
            };
            task.nodes(&kernel.body, &mut 0)?;
        }
        Ok(())
    }

    /// Runs `nodes`; `next` counts the operations passed, in text order.
    fn nodes(&mut self, nodes: &'a [Node], next: &mut usize) -> Result<(), TileError> {
        for node in nodes {
            match node {
                Node::Op(op) => {
                    self.op(op, *next)?;
                    *next += 1;
                }
                Node::Stream(s) => {
                    let first = *next;
                    let axis = s.axis.index();
                    let count = self.extents[axis].div_ceil(self.blocks[axis]);
                    let outer = self.window[axis];
                    for i in 0..count {
                        let at = if s.reverse { count - 1 - i } else { i };
                        self.window[axis] = Some(block_at(at, self.blocks[axis], self.extents[axis]));
                        *next = first;
                        if self.options.skip_masked && self.masked(s, first)? {
                            continue;
                        }
                        self.nodes(&s.body, next)?;
                    }
                    self.window[axis] = outer;
                    *next = first + count_ops(&s.body);
                }
            }
        }
        Ok(())
    }

    /// Whether the filter of `s` is false at every point of the present blocks.
    fn masked(&mut self, s: &Stream, op: usize) -> Result<bool, TileError> {
        let Some(filter) = s.filter else { return Ok(false) };
        let mut axes = Vec::new();
        self.kernel.walk(filter, &mut |_, e| {
            if let Expr::Coord(a) = e
                && !axes.contains(a)
            {
                axes.push(*a);
            }
        });
        let mut any = false;
        self.points(op, &axes, &[filter], |_, _, v| any |= v[0] != 0.0)?;
        Ok(!any)
    }

    fn name(&self, op: usize) -> String {
        self.names.get(op).cloned().unwrap_or_else(|| "filter".to_string())
    }

    /// The present windows of `axes`.
    fn windows(&self, op: usize, axes: &[AxisId]) -> Result<Vec<(u64, u64)>, TileError> {
        axes.iter()
            .map(|a| {
                self.window[a.index()].ok_or_else(|| TileError::AxisNotWalked {
                    kernel: self.kernel.name.clone(),
                    op: self.name(op),
                    axis: self.kernel.axes[*a].name.clone(),
                })
            })
            .collect()
    }

    fn poison(&self, op: usize, tile: TileId) -> TileError {
        TileError::Poison {
            kernel: self.kernel.name.clone(),
            op: self.name(op),
            tile: self.kernel.tiles[tile].name.clone(),
        }
    }

    /// Calls `f(self, coords, values of roots)` at every existing point of `axes`, last axis fastest; `coords` is
    /// indexed by axis.
    fn points(
        &mut self,
        op: usize,
        axes: &[AxisId],
        roots: &[ExprId],
        mut f: impl FnMut(&mut Self, &[u64], &[f64]),
    ) -> Result<(), TileError> {
        let windows = self.windows(op, axes)?;
        let program = Program::new(self.kernel, roots);
        self.check_points(op, axes, &program)?;
        let mut values = vec![0.0; self.kernel.exprs.len()];
        // Axes outside the points' have a coordinate only where their block is one point.
        let mut coords: Vec<u64> = self.window.iter().map(|w| w.map_or(0, |w| w.0)).collect();
        let mut out = vec![0.0; roots.len()];
        let counts: Vec<u64> = windows.iter().map(|w| w.1).collect();
        let total: u64 = counts.iter().product();
        if total == 0 {
            return Ok(());
        }
        // Where elements of tiles lie is the same at every point.
        let place = |e: &ExprId| match self.kernel.exprs[*e] {
            Expr::Tile(t) => self.steps(op, t).map(Some),
            _ => Ok(None),
        };
        let places = program.order.iter().map(place).collect::<Result<Vec<_>, _>>()?;
        let mut at = vec![0u64; axes.len()];
        for _ in 0..total {
            for ((a, w), i) in axes.iter().zip(&windows).zip(&at) {
                coords[a.index()] = w.0 + i;
            }
            for (e, place) in program.order.iter().zip(&places) {
                values[e.index()] = match place {
                    Some(steps) => self.element(steps, &coords),
                    None => self.value(op, *e, &values, &coords)?,
                };
            }
            for (o, r) in out.iter_mut().zip(roots) {
                *o = values[r.index()];
            }
            f(self, &coords, &out);
            for d in (0..at.len()).rev() {
                at[d] += 1;
                if at[d] < counts[d] {
                    break;
                }
                at[d] = 0;
            }
        }
        Ok(())
    }

    /// Whether every coordinate the program needs is fixed at a point of `axes`.
    fn check_points(&self, op: usize, axes: &[AxisId], program: &Program) -> Result<(), TileError> {
        for e in &program.order {
            let needed: Vec<AxisId> = match &self.kernel.exprs[*e] {
                Expr::Coord(a) => vec![*a],
                Expr::Tile(t) => self.kernel.tiles[*t].axes.clone(),
                Expr::TileAt { at, .. } => {
                    let axes = at.iter().filter_map(|p| match p {
                        Place::Axis(a) => Some(*a),
                        Place::At(_) => None,
                    });
                    axes.collect()
                }
                Expr::Int(_)
                | Expr::Float(_)
                | Expr::Size(_)
                | Expr::Read { .. }
                | Expr::Unary(..)
                | Expr::Binary(..)
                | Expr::Select(..)
                | Expr::Cast(..)
                | Expr::Rand(_) => Vec::new(),
            };
            for a in &needed {
                if !axes.contains(a) && self.windows(op, &[*a])?[0].1 != 1 {
                    return Err(TileError::AxisNotWalked {
                        kernel: self.kernel.name.clone(),
                        op: self.name(op),
                        axis: self.kernel.axes[*a].name.clone(),
                    });
                }
            }
        }
        Ok(())
    }

    /// The value of one expression whose operands have theirs in `values`.
    fn value(&mut self, op: usize, e: ExprId, values: &[f64], coords: &[u64]) -> Result<f64, TileError> {
        let at = |id: &ExprId| values[id.index()];
        Ok(match &self.kernel.exprs[e] {
            Expr::Int(n) => *n as f64,
            Expr::Float(x) => *x,
            Expr::Size(s) => s.eval(self.ranks)? as f64,
            Expr::Coord(a) => coords[a.index()] as f64,
            Expr::Tile(t) => self.element(&self.steps(op, *t)?, coords),
            Expr::TileAt { tile, at } => self.element_at(op, *tile, at, coords)?,
            Expr::Read { buffer, at: ids } => {
                let at: Vec<f64> = ids.iter().map(at).collect();
                self.read(op, buffer.index(), &at)?
            }
            Expr::Unary(o, a) => match self.simulated(e, [*a, *a], values) {
                Some((mut rounded, ty)) => rounded.unary(*o, ty, at(a)),
                None => o.eval(at(a)),
            },
            Expr::Binary(o, a, b) => match self.simulated(e, [*a, *b], values) {
                Some((mut rounded, ty)) => rounded.binary(*o, ty, at(a), at(b)),
                None => o.eval(at(a), at(b), self.integer[a.index()] && self.integer[b.index()]),
            },
            Expr::Select(c, a, b) => {
                if at(c) != 0.0 {
                    at(a)
                } else {
                    at(b)
                }
            }
            Expr::Cast(d, a) => d.round(at(a)),
            Expr::Rand(of) => uniform_of(of.map(|e| at(&e))),
        })
    }

    /// The arithmetic that a randomised evaluation computes an operation of floats in: one draw an expression and values.
    fn simulated(&self, e: ExprId, operands: [ExprId; 2], values: &[f64]) -> Option<(Declared, Ty)> {
        let seed = self.options.stochastic.filter(|_| self.options.rounding)?;
        if operands.iter().all(|o| self.integer[o.index()]) {
            return None;
        }
        let [a, b] = operands.map(|o| values[o.index()].to_bits());
        let draw = seed ^ a ^ b.rotate_left(17) ^ (e.index() as u64).rotate_left(48);
        Some((Declared::new(draw, Rounding::Stochastic), self.arithmetic))
    }

    /// Where the elements of `tile` lie. A tile written for other blocks of its axes holds nothing for these.
    fn steps(&self, op: usize, tile: TileId) -> Result<Steps, TileError> {
        let held = self.tiles[tile.index()].as_ref().ok_or_else(|| self.poison(op, tile))?;
        let axes = &self.kernel.tiles[tile].axes;
        if axes.iter().zip(&held.window).any(|(a, w)| self.window[a.index()] != Some(*w)) {
            return Err(self.poison(op, tile));
        }
        let mut steps = Vec::with_capacity(axes.len());
        let mut stride = 1;
        for (axis, (first, count)) in axes.iter().zip(&held.window).rev() {
            steps.push((axis.index(), *first, stride));
            stride *= count;
        }
        Ok(Steps { tile: tile.index(), steps })
    }

    /// The element of a tile at this point.
    fn element(&self, of: &Steps, coords: &[u64]) -> f64 {
        let offset: u64 = of.steps.iter().map(|(axis, first, stride)| (coords[*axis] - first) * stride).sum();
        self.tiles[of.tile].as_ref().map_or(f64::NAN, |held| held.data[offset as usize])
    }

    /// The element of `tile` at places other than this point.
    fn element_at(&self, op: usize, tile: TileId, at: &[Place], coords: &[u64]) -> Result<f64, TileError> {
        let held = self.tiles[tile.index()].as_ref().ok_or_else(|| self.poison(op, tile))?;
        let mut offset = 0;
        for ((axis, place), (first, count)) in self.kernel.tiles[tile].axes.iter().zip(at).zip(&held.window) {
            let c = match place {
                Place::Axis(a) => coords[a.index()],
                Place::At(c) => *c,
            };
            if self.window[axis.index()] != Some((*first, *count)) || c < *first || c >= first + count {
                return Err(self.poison(op, tile));
            }
            offset = offset * count + (c - first);
        }
        Ok(held.data[offset as usize])
    }

    /// The row-major position of `at` in an array, if it is inside.
    fn position(&self, buffer: usize, at: &[f64]) -> Option<usize> {
        let m = &self.memory[buffer];
        let mut pos = 0;
        for ((x, d), s) in at.iter().zip(&m.dims).zip(&m.strides) {
            if !(*x >= 0.0 && *x < *d as f64) {
                return None;
            }
            pos += *x as i64 * s;
        }
        Some(pos as usize)
    }

    fn race(&self, op: usize, buffer: usize, i: usize) -> TileError {
        TileError::Race {
            kernel: self.kernel.name.clone(),
            op: self.name(op),
            buffer: self.plan.buffers[Id::new(buffer)].name.clone(),
            at: crate::array::coordinates(&self.memory[buffer].dims, i as u64),
        }
    }

    fn read(&mut self, op: usize, buffer: usize, at: &[f64]) -> Result<f64, TileError> {
        let Some(i) = self.position(buffer, at) else { return Ok(0.0) };
        let m = &self.memory[buffer];
        if m.writer[i] != 0 && m.writer[i] != self.number {
            return Err(self.race(op, buffer, i));
        }
        if !m.written[i] {
            return Err(TileError::Unwritten {
                kernel: Some(self.kernel.name.clone()),
                buffer: self.plan.buffers[Id::new(buffer)].name.clone(),
                at: crate::array::coordinates(&m.dims, i as u64),
            });
        }
        let m = &mut self.memory[buffer];
        m.reader[i] = if m.reader[i] == 0 || m.reader[i] == self.number { self.number } else { MANY };
        Ok(m.data[i])
    }

    /// Stores one element; joined stores of several tasks commute and do not race with each other.
    fn store(&mut self, op: usize, buffer: usize, i: usize, x: f64, join: Option<ReduceOp>) -> Result<(), TileError> {
        let m = &self.memory[buffer];
        let others = |n: u32| n != 0 && n != self.number;
        if others(m.reader[i]) || (others(m.writer[i]) && join.is_none()) {
            return Err(self.race(op, buffer, i));
        }
        let mut x = x;
        if let Some(j) = join {
            if !m.written[i] {
                return Err(TileError::Unwritten {
                    kernel: Some(self.kernel.name.clone()),
                    buffer: self.plan.buffers[Id::new(buffer)].name.clone(),
                    at: crate::array::coordinates(&m.dims, i as u64),
                });
            }
            x = j.combine(m.data[i], x);
        }
        let dtype = self.plan.buffers[Id::new(buffer)].dtype;
        let m = &mut self.memory[buffer];
        m.data[i] = if m.exact { x } else { self.options.round(dtype, x) };
        m.written[i] = true;
        m.writer[i] = self.number;
        Ok(())
    }

    /// The values to start `tile` from when it is carried: those before, whole.
    fn before(&self, op: usize, tile: TileId, window: &[(u64, u64)]) -> Result<Vec<f64>, TileError> {
        match &self.tiles[tile.index()] {
            Some(h) if h.window == window => Ok(h.data.clone()),
            _ => Err(self.poison(op, tile)),
        }
    }

    fn write(&mut self, tile: TileId, window: Vec<(u64, u64)>, mut data: Vec<f64>) {
        let dtype = self.kernel.tiles[tile].dtype;
        for x in &mut data {
            *x = self.options.round(dtype, *x);
        }
        self.tiles[tile.index()] = Some(Held { window, data });
    }

    fn op(&mut self, op: &'a Op, n: usize) -> Result<(), TileError> {
        match op {
            Op::Load { out, buffer, at } => {
                let axes = &self.kernel.tiles[*out].axes;
                let window = self.windows(n, axes)?;
                let (mut data, mut fault) = (Vec::new(), None);
                self.points(n, axes, at, |task, _, at| match task.read(n, buffer.index(), at) {
                    Ok(x) => data.push(x),
                    Err(e) => fault = fault.take().or(Some(e)),
                })?;
                fault.map_or(Ok(()), Err)?;
                self.write(*out, window, data);
            }
            Op::Store { buffer, at, axes, value, join, when } => {
                let mut roots = at.clone();
                roots.push(*value);
                roots.extend(*when);
                let mut fault = None;
                let rank = at.len();
                self.points(n, axes, &roots, |task, _, v| {
                    if v.get(rank + 1).is_none_or(|w| *w != 0.0)
                        && let Some(i) = task.position(buffer.index(), &v[..rank])
                        && let Err(e) = task.store(n, buffer.index(), i, v[rank], *join)
                    {
                        fault = fault.take().or(Some(e));
                    }
                })?;
                fault.map_or(Ok(()), Err)?;
            }
            Op::Map { out, value } => {
                let axes = &self.kernel.tiles[*out].axes;
                let window = self.windows(n, axes)?;
                let mut data = Vec::new();
                self.points(n, axes, &[*value], |_, _, v| data.push(v[0]))?;
                self.write(*out, window, data);
            }
            Op::Reduce { out, op, value, over, carry } => self.reduce(n, out, *op, *value, over, *carry)?,
            Op::Contract { out, a, b, over, carry } => {
                let axes = &self.kernel.tiles[*out].axes;
                let window = self.windows(n, axes)?;
                let size: u64 = window.iter().map(|w| w.1).product();
                let mut data = if *carry { self.before(n, *out, &window)? } else { vec![0.0; size as usize] };
                self.contract(n, axes, over, [*a, *b], &mut data)?;
                self.write(*out, window, data);
            }
            Op::Scan { out, op, value, along, carry } => {
                let axes = &self.kernel.tiles[*out].axes;
                let window = self.windows(n, axes)?;
                let mut data = Vec::new();
                self.points(n, axes, &[*value], |_, _, v| data.push(v[0]))?;
                let rest: Vec<AxisId> = axes.iter().copied().filter(|a| a != along).collect();
                let rest_window = self.windows(n, &rest)?;
                let size: u64 = rest_window.iter().map(|w| w.1).product();
                let mut state = match carry {
                    Some(t) => {
                        let mut state = Vec::with_capacity(size as usize);
                        if size > 0 {
                            let steps = self.steps(n, *t)?;
                            self.points(n, &rest, &[], |task, c, _| state.push(task.element(&steps, c)))?;
                        }
                        state
                    }
                    None => vec![op.identity(); size as usize],
                };
                let mut i = 0;
                // Points come in order along `along` for each of the others.
                self.points(n, axes, &[], |_, c, _| {
                    let s = &mut state[offset(&rest, &rest_window, c)];
                    *s = op.combine(*s, data[i]);
                    data[i] = *s;
                    i += 1;
                })?;
                self.write(*out, window, data);
                if let Some(t) = carry {
                    let own = &self.kernel.tiles[*t].axes;
                    let own_window = self.windows(n, own)?;
                    let mut next = vec![0.0; state.len()];
                    self.points(n, own, &[], |_, c, _| {
                        next[offset(own, &own_window, c)] = state[offset(&rest, &rest_window, c)];
                    })?;
                    self.write(*t, own_window, next);
                }
            }
        }
        Ok(())
    }

    /// Adds products of two tiles' elements to `data`, the elements at `axes`: at every point of `axes`, in order, over
    /// every point of `over`, in order.
    fn contract(
        &self,
        n: usize,
        axes: &[AxisId],
        over: &[AxisId],
        factors: [TileId; 2],
        data: &mut [f64],
    ) -> Result<(), TileError> {
        let all: Vec<AxisId> = axes.iter().chain(over).copied().collect();
        let counts: Vec<usize> = self.windows(n, &all)?.iter().map(|w| w.1 as usize).collect();
        if counts.contains(&0) {
            return Ok(());
        }
        let mut strides = [vec![0; all.len()], vec![0; all.len()], vec![0; all.len()]];
        for (of, tile) in strides.iter_mut().zip(factors) {
            for (axis, _, stride) in self.steps(n, tile)?.steps {
                // An axis that is not walked has one coordinate here.
                if let Some(d) = all.iter().position(|a| a.index() == axis) {
                    of[d] = stride as usize;
                }
            }
        }
        let mut stride = 1;
        for d in (0..axes.len()).rev() {
            strides[2][d] = stride;
            stride *= counts[d];
        }
        let of = |k: usize| self.tiles[factors[k].index()].as_ref().map(|h| &h.data[..]);
        let (Some(x), Some(y)) = (of(0), of(1)) else { return Ok(()) };
        // The last axis in a row; of no axes there is one point.
        let last = all.len().saturating_sub(1);
        let at_last = |s: &[usize]| s.last().copied().unwrap_or(0);
        let [dx, dy, dz] = [at_last(&strides[0]), at_last(&strides[1]), at_last(&strides[2])];
        let inner = counts.last().copied().unwrap_or(1);
        let mut at = vec![0; all.len()];
        let [mut px, mut py, mut pz] = [0, 0, 0];
        loop {
            for i in 0..inner {
                data[pz + i * dz] += x[px + i * dx] * y[py + i * dy];
            }
            let Some(d) = (0..last).rev().find(|d| at[*d] + 1 < counts[*d]) else { return Ok(()) };
            at[d] += 1;
            at[d + 1..].fill(0);
            let sum = |s: &[usize]| at.iter().zip(s).map(|(i, s)| i * s).sum();
            [px, py, pz] = [sum(&strides[0]), sum(&strides[1]), sum(&strides[2])];
        }
    }

    fn reduce(
        &mut self,
        n: usize,
        out: &[TileId],
        op: ReduceOp,
        value: ExprId,
        over: &[AxisId],
        carry: bool,
    ) -> Result<(), TileError> {
        let axes = &self.kernel.tiles[out[0]].axes;
        let window = self.windows(n, axes)?;
        let size: u64 = window.iter().map(|w| w.1).product();
        // An argument selection starts from the identity of its order and no position.
        let start = if op == ReduceOp::ArgMin {
            ReduceOp::Min.identity()
        } else if op == ReduceOp::ArgMax {
            ReduceOp::Max.identity()
        } else {
            op.identity()
        };
        let mut best = vec![start; size as usize];
        let mut position = vec![-1.0; size as usize];
        if carry {
            if op.selects_argument() && out.len() == 1 {
                return Err(self.poison(n, out[0]));
            }
            best = self.before(n, out[0], &window)?;
            if let Some(t) = out.get(1) {
                position = self.before(n, *t, &window)?;
            }
        }
        let all: Vec<AxisId> = axes.iter().chain(over).copied().collect();
        let extents: Vec<u64> = over.iter().map(|a| self.extents[a.index()]).collect();
        self.points(n, &all, &[value], |_, c, v| {
            let i = offset(axes, &window, c);
            if op.selects_argument() {
                let x = v[0];
                let better = if op == ReduceOp::ArgMin { x < best[i] } else { x > best[i] };
                // NaN is selected and kept; the lowest position wins ties.
                if position[i] < 0.0 || (!best[i].is_nan() && (better || x.is_nan())) {
                    best[i] = x;
                    let flat = over.iter().zip(&extents).fold(0, |p, (a, e)| p * e + c[a.index()]);
                    position[i] = flat as f64;
                }
            } else {
                best[i] = op.combine(best[i], v[0]);
            }
        })?;
        if op.selects_argument() && out.len() == 1 {
            self.write(out[0], window, position);
        } else {
            self.write(out[0], window.clone(), best);
            if let Some(t) = out.get(1) {
                self.write(*t, window, position);
            }
        }
        Ok(())
    }
}

impl Options {
    /// `x` as an element of type `dtype` holds it.
    fn round(&self, dtype: DType, x: f64) -> f64 {
        match self.stochastic.filter(|_| self.rounding && dtype.is_float()) {
            Some(seed) => Declared::new(seed ^ x.to_bits(), Rounding::Stochastic).stored(dtype, x),
            None if self.rounding || dtype.is_int() || dtype == DType::Bool => dtype.round(x),
            None => x,
        }
    }
}

/// A random number of a seed and four coordinates, all integers.
pub(crate) fn uniform_of([seed, coords @ ..]: [f64; 5]) -> f64 {
    crate::cascade::eval::philox::uniform(seed as i64, coords.map(|c| c as i64))
}

/// Whether `number` of `total` is among about `count` drawn from `seed`; the first and the last always are.
fn drawn(number: u64, total: u64, count: u64, seed: u64) -> bool {
    let mut z = (seed ^ number.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    count >= total || number == 0 || number + 1 == total || (z ^ (z >> 31)) % total < count
}

/// The block of each axis.
fn blocks(kernel: &Kernel, extents: &[u64], blocks: &Blocks) -> Vec<u64> {
    let mut sequential = vec![false; extents.len()];
    fn mark(nodes: &[Node], sequential: &mut [bool]) {
        for node in nodes {
            if let Node::Stream(s) = node {
                sequential[s.axis.index()] |= s.sequential;
                mark(&s.body, sequential);
            }
        }
    }
    mark(&kernel.body, &mut sequential);
    let mut seed = match blocks {
        Blocks::Drawn(s) => *s,
        Blocks::Declared | Blocks::Uniform(_) | Blocks::Named(_) => 0,
    };
    let declared = |a: &super::Axis, n: u64| a.block.unwrap_or(n).max(1);
    kernel
        .axes
        .iter()
        .zip(extents)
        .map(|((id, a), &n)| match a.kind {
            AxisKind::Inner => n.max(1),
            AxisKind::Stream if sequential[id.index()] => 1,
            AxisKind::Grid if kernel.ordered == Some(id) => 1,
            AxisKind::Grid | AxisKind::Stream => match blocks {
                Blocks::Declared => declared(a, n),
                Blocks::Uniform(b) => (*b).max(1),
                Blocks::Drawn(_) => {
                    // One step of a linear congruential generator (Knuth, MMIX).
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    [1, 2, 3, 4, 5, 7, 16, n + 1][(seed >> 61) as usize]
                }
                Blocks::Named(map) => {
                    map.get(&(kernel.name.clone(), a.name.clone())).map_or_else(|| declared(a, n), |b| (*b).max(1))
                }
            },
        })
        .collect()
}

/// First coordinate and count of block `i`.
fn block_at(i: u64, block: u64, extent: u64) -> (u64, u64) {
    let first = i * block;
    (first, block.min(extent - first))
}

/// Operations in `nodes`.
fn count_ops(nodes: &[Node]) -> usize {
    nodes
        .iter()
        .map(|n| match n {
            Node::Op(_) => 1,
            Node::Stream(s) => count_ops(&s.body),
        })
        .sum()
}

/// The row-major position of the coordinates in the windows of `axes`.
fn offset(axes: &[AxisId], window: &[(u64, u64)], coords: &[u64]) -> usize {
    axes.iter().zip(window).fold(0, |p, (a, (first, count))| p * count + (coords[a.index()] - first)) as usize
}
