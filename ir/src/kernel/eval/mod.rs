//! Executes a kernel in float64 under an adversarial schedule and reports races, deadlocks and misuse.
//!
//! Units run as coroutines: one runs until it has synchronised or issued asynchronous work, then the schedule picks the
//! next unit or the next asynchronous operation. Every unit, every unit's wgmma, cp.async and bulk-store queue and
//! every mbarrier's incoming copies is an *agent* with a vector-clock component, so that a race is found in any schedule
//! in which the two accesses happen at all, not only when values go wrong. Shared memory is addressed physically:
//! generic accesses through the layout, TMA through its dense box and swizzle mode, wgmma through its descriptor.
//! A dependent kernel races with the kernels run before it on the same arrays until it has waited for them.
//! Barriers are initialised at kernel start, followed by an implicit synchronisation of the task (or cluster).
//! cp.async writes need no proxy fence before wgmma reads them (as CUTLASS's kernels assume); generic writes do.
//! Without [`Options::rounding`] floats are kept in float64 everywhere; integers always are truncated to their type.
//! Fragments are whole tiles: who holds which element is the verifier's business.
//! Source: PTX ISA 8.x, "Memory consistency model", "Asynchronous operations", "mbarrier", "wgmma".

use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;

use crate::arena::{Arena, Id};
use crate::cascade::{Rank, RankId};
use crate::dtype::DType;
use crate::kernel::{BufSpace, Kernel, Stmt, walk};

mod asynchronous;
mod compile;
mod machine;
mod memory;
mod statement;

#[cfg(test)]
mod tests;

use compile::{Compiler, Program};
use memory::{Memory, Placement};

/// An array in device memory.
#[derive(Clone, Debug, PartialEq)]
pub struct GlobalBuffer {
    /// Extents; none for a scalar.
    pub dims: Vec<u64>,
    /// Strides in elements.
    pub strides: Vec<i64>,
    /// Element type.
    pub dtype: DType,
    /// Elements by position.
    pub data: Vec<f64>,
    /// Which elements hold a value.
    pub defined: Vec<bool>,
    /// What the kernels that have been run did to each element, since the last that was not dependent began.
    marks: Vec<u8>,
}

impl GlobalBuffer {
    /// A contiguous array with contents, row-major.
    pub fn new(dims: &[u64], dtype: DType, data: Vec<f64>) -> GlobalBuffer {
        let mut b = GlobalBuffer::undefined(dims, dtype);
        b.defined = vec![true; data.len()];
        b.data = data;
        b
    }

    /// A contiguous array without contents: reading it before it is written is an error.
    pub fn undefined(dims: &[u64], dtype: DType) -> GlobalBuffer {
        let n = dims.iter().product::<u64>() as usize;
        let mut stride = 1;
        let mut strides: Vec<i64> = dims
            .iter()
            .rev()
            .map(|d| {
                let s = stride;
                stride *= *d as i64;
                s
            })
            .collect();
        strides.reverse();
        let (data, defined) = (vec![0.0; n], vec![false; n]);
        GlobalBuffer { dims: dims.to_vec(), strides, dtype, data, defined, marks: Vec::new() }
    }
}

/// In which order units and asynchronous operations proceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// Units take turns; asynchronous operations complete at random.
    RoundRobin,
    /// Roles that issue copies run as far as they can.
    ProducerFirst,
    /// Roles that issue copies run only when nothing else can.
    ConsumerFirst,
    /// Anything that can happen next, at random.
    Random,
    /// Asynchronous operations complete only when nothing else can proceed.
    DelayAsync,
    /// Asynchronous operations complete as soon as they are issued.
    EagerAsync,
}

impl Schedule {
    /// Every schedule.
    pub const ALL: [Schedule; 6] = [
        Schedule::RoundRobin,
        Schedule::ProducerFirst,
        Schedule::ConsumerFirst,
        Schedule::Random,
        Schedule::DelayAsync,
        Schedule::EagerAsync,
    ];
}

/// How to evaluate.
#[derive(Clone, Debug)]
pub struct Options {
    /// The order of events.
    pub schedule: Schedule,
    /// Seed of what the schedule leaves open.
    pub seed: u64,
    /// Whether values are rounded to the types of fragments, buffers and casts.
    pub rounding: bool,
    /// The tasks to run, by number (last grid dimension fastest); a task brings its cluster. None: all.
    pub tasks: Option<Vec<u64>>,
}

impl Default for Options {
    fn default() -> Options {
        Options { schedule: Schedule::Random, seed: 0, rounding: false, tasks: None }
    }
}

/// What an evaluation did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Tasks run.
    pub tasks: u64,
    /// Statements executed by all units.
    pub statements: u64,
    /// Asynchronous operations completed.
    pub async_ops: u64,
    /// Multiplications and additions of atoms.
    pub atom_flops: u64,
    /// Bytes written to or read from shared memory by copies.
    pub copied_bytes: u64,
}

/// What kind of error an evaluation met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Two unordered accesses, or a missing proxy fence.
    Race,
    /// Nothing can proceed.
    Deadlock,
    /// An access outside its buffer or stage.
    OutOfBounds,
    /// A read of something never written.
    Uninitialised,
    /// A barrier used against its counts or phases.
    Barrier,
    /// A fragment or buffer used while an asynchronous operation owns it, or never waited for.
    InFlight,
    /// The kernel breaks a rule of its instructions, or does not fit the buffers given.
    Illegal,
}

/// Why an evaluation stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelError {
    /// What kind of error.
    pub kind: ErrorKind,
    /// What happened.
    pub message: String,
    /// Task, role, unit and statement; empty where no statement is to blame.
    pub place: String,
}

impl KernelError {
    pub(crate) fn illegal(message: impl Into<String>) -> KernelError {
        KernelError { kind: ErrorKind::Illegal, message: message.into(), place: String::new() }
    }
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)?;
        if self.place.is_empty() { Ok(()) } else { write!(f, "\n  at {}", self.place) }
    }
}

impl std::error::Error for KernelError {}

/// `x` rounded to `dtype`, as [`DType::round`], fast for the common types.
fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(x as f32),
        DType::F64
        | DType::Tf32
        | DType::F16
        | DType::BF16
        | DType::F8E4M3
        | DType::F8E5M2
        | DType::I64
        | DType::I32
        | DType::I8
        | DType::U8
        | DType::I4
        | DType::U4
        | DType::Bool => dtype.round(x),
    }
}

/// What all tasks share.
struct Context<'a> {
    kernel: &'a Kernel,
    programs: Vec<Rc<Program>>,
    places: Vec<String>,
    grid: Vec<u64>,
    /// Per buffer: extents and, for scratch, strides.
    extents: Vec<(Vec<i64>, Vec<i64>)>,
    options: &'a Options,
}

/// Runs `kernel` with `ranks[r]` the extent of rank `r` (named in `names`) and `buffers` the plan's arrays.
/// Arrays that the kernel writes are updated, also when it fails. Kernels of a plan are run one after another on the
/// same arrays; a dependent one races with those that were run since the last that is not, itself included, until it
/// has waited for them.
pub fn run(
    kernel: &Kernel,
    names: &Arena<RankId, Rank>,
    ranks: &[u64],
    buffers: &mut [GlobalBuffer],
    options: &Options,
) -> Result<Stats, KernelError> {
    let mut scalars = HashMap::new();
    for b in 0..kernel.bufs.len() {
        if let Some(param) = Compiler::scalar_param(kernel, b) {
            let value = buffers.get(param).and_then(|g| g.data.first());
            let name = &kernel.bufs[Id::new(b)].name;
            scalars.insert(b, *value.ok_or_else(|| KernelError::illegal(format!("no value is given for `{name}`")))?);
        }
    }
    let mut c = Compiler::new(kernel, names, ranks, &scalars, options.rounding);
    let constants = |exprs: &[crate::kernel::Expr], what: &str| -> Result<Vec<i64>, KernelError> {
        exprs
            .iter()
            .map(|e| match c.uniform(e)? {
                compile::Uniform::Const(x) if x >= 0.0 => Ok(x as i64),
                _ => Err(KernelError::illegal(format!("{what} must be non-negative integers over extents"))),
            })
            .collect()
    };
    let grid: Vec<u64> = constants(&kernel.grid, "grid dimensions")?.into_iter().map(|g| g as u64).collect();
    let mut extents = Vec::new();
    for (_, b) in kernel.bufs.iter() {
        let dims = constants(&b.dims, &format!("extents of `{}`", b.name))?;
        let strides = match &b.space {
            BufSpace::Scratch { strides, .. } => constants(strides, &format!("strides of `{}`", b.name))?,
            BufSpace::Global { .. } | BufSpace::Shared { .. } => Vec::new(),
        };
        extents.push((dims, strides));
    }
    let programs = (0..kernel.roles.len()).map(|r| c.program(r).map(Rc::new)).collect::<Result<_, _>>()?;
    let mut places = std::mem::take(&mut c.places);
    places.push("a kernel launched before".to_string());
    let ctx = Context { kernel, programs, places, grid, extents, options };
    let (mut memories, of_buf) = globals(&ctx, buffers)?;
    let result = tasks(&ctx, &mut memories, &of_buf);
    for (param, m) in memories.into_iter().enumerate() {
        if let Some(m) = m {
            let buffer = &mut buffers[param];
            (buffer.data, buffer.defined) = (m.data, m.defined);
            let before = if kernel.dependent { std::mem::take(&mut buffer.marks) } else { Vec::new() };
            buffer.marks = m.marks;
            buffer.marks.iter_mut().zip(before).for_each(|(mark, b)| *mark |= b);
        }
    }
    result
}

/// Takes the arrays the kernel uses; the second result maps buffers to parameters.
type Globals = (Vec<Option<Memory>>, Vec<Option<usize>>);

fn globals(ctx: &Context<'_>, buffers: &mut [GlobalBuffer]) -> Result<Globals, KernelError> {
    let mut of_buf = vec![None; ctx.kernel.bufs.len()];
    let mut written = vec![false; buffers.len()];
    let mut name_of = vec![None; buffers.len()];
    for (id, b) in ctx.kernel.bufs.iter() {
        let BufSpace::Global { param, written: w, .. } = b.space else { continue };
        let Some(g) = buffers.get(param) else {
            return Err(KernelError::illegal(format!("`{}` is array {param}; {} are given", b.name, buffers.len())));
        };
        let dims: Vec<i64> = g.dims.iter().map(|d| *d as i64).collect();
        if dims != ctx.extents[id.index()].0 || g.dtype != b.dtype || g.strides.len() != dims.len() {
            return Err(KernelError::illegal(format!(
                "`{}` is {}{:?}; the array given is {}{:?}",
                b.name,
                b.dtype,
                ctx.extents[id.index()].0,
                g.dtype,
                g.dims
            )));
        }
        of_buf[id.index()] = Some(param);
        written[param] |= w;
        name_of[param] = Some(b.name.clone());
    }
    let memories = buffers
        .iter_mut()
        .zip(name_of)
        .zip(&written)
        .map(|((g, name), &written)| {
            let (data, defined) = (std::mem::take(&mut g.data), std::mem::take(&mut g.defined));
            let dims = g.dims.iter().map(|d| *d as i64).collect();
            let placement = Placement::Strided(g.strides.clone());
            let memory = Memory::new(name.unwrap_or_default(), g.dtype, dims, placement, data, defined, written);
            let prior = if ctx.kernel.dependent { &g.marks[..] } else { &[] };
            Some(memory.shared_with(prior, ctx.places.len() as u32 - 1))
        })
        .collect();
    Ok((memories, of_buf))
}

/// Runs all tasks, those together that must be.
fn tasks(ctx: &Context<'_>, memories: &mut [Option<Memory>], of_buf: &[Option<usize>]) -> Result<Stats, KernelError> {
    let total: u64 = ctx.grid.iter().product();
    let cluster = if ctx.kernel.cluster.is_empty() { vec![1; ctx.grid.len()] } else { ctx.kernel.cluster.clone() };
    if cluster.len() != ctx.grid.len() || ctx.grid.iter().zip(&cluster).any(|(g, c)| *c == 0 || g % c != 0) {
        return Err(KernelError::illegal(format!("clusters of {cluster:?} do not tile the grid {:?}", ctx.grid)));
    }
    // Tasks of each cluster, by cluster rank.
    let mut clusters: HashMap<Vec<u64>, Vec<Vec<u64>>> = HashMap::new();
    let mut order = Vec::new();
    for task in 0..total {
        let coords = unflatten(task, &ctx.grid);
        let key: Vec<u64> = coords.iter().zip(&cluster).map(|(x, c)| x / c).collect();
        let members = clusters.entry(key.clone()).or_default();
        if members.is_empty() {
            order.push(key);
        }
        members.push(coords);
    }
    if let Some(wanted) = &ctx.options.tasks {
        let keys: Vec<Vec<u64>> = wanted
            .iter()
            .filter(|t| **t < total)
            .map(|t| unflatten(*t, &ctx.grid).iter().zip(&cluster).map(|(x, c)| x / c).collect())
            .collect();
        order.retain(|k| keys.contains(k));
    }
    let groups: Vec<Vec<Vec<u64>>> = order.into_iter().filter_map(|k| clusters.remove(&k)).collect();
    let waves: Vec<Vec<Vec<Vec<u64>>>> = if ctx.kernel.roles.iter().any(|r| meets(&r.body)) {
        vec![groups]
    } else {
        groups.into_iter().map(|g| vec![g]).collect()
    };
    let mut stats = Stats::default();
    let mut rng = Rng(ctx.options.seed);
    let mut base = 0;
    for wave in waves.into_iter().filter(|w| !w.is_empty()) {
        base = machine::wave(ctx, wave, memories, of_buf, base, &mut rng, &mut stats)?;
    }
    Ok(stats)
}

/// Coordinates of task `number`, last dimension fastest.
fn unflatten(mut number: u64, grid: &[u64]) -> Vec<u64> {
    let mut coords = vec![0; grid.len()];
    for d in (0..grid.len()).rev() {
        coords[d] = number % grid[d];
        number /= grid[d];
    }
    coords
}

fn meets(body: &[Stmt]) -> bool {
    let mut found = false;
    // Tasks that count meet as well: the last goes on with what the others did.
    walk(body, &mut |s| found |= matches!(s, Stmt::GridSync | Stmt::Last { .. }));
    found
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    /// A number below `n` (0 if n is 0).
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        if n == 0 { 0 } else { (z % n as u64) as usize }
    }
}
