//! The cost of a mapping: nearly the greatest of what each level moves, the tensor cores, the other units and latencies take,
//! over how well whole waves of tasks fill the device.
//!
//! Rates come from the data sheet. wgmma reads both operands from shared memory at 128 bytes per clock, so narrow
//! instructions wait for it: that gives the measured rates (n ≥ 64 at 95%, n = 32 at 63% from shared memory and 94%
//! from registers, n = 16 at 38%, n = 8 at 21%). Traffic counts blocks: what the tasks of one wave share is read from
//! device memory once if the wave's order brings them together. Invariant: costs are for ranking and say which term
//! binds; nothing is fitted to a kernel.

use einfall_ir::analysis::resources::launch_registers;
use einfall_ir::arena::Id;
use einfall_ir::ops::{BinaryOp, UnaryOp};
use einfall_ir::target::{DataSheet, Gpu, TASK_SHARED_BYTES};
use einfall_ir::tile::{AxisId, Expr, ExprId, Op};

use super::facts::Facts;
use super::space::Space;
use super::structure::{Place, Schedule, Structure};

/// Share of the peak that the widest instructions reach.
const WIDE: f64 = 0.955;
/// Bytes per clock that a multiprocessor reads from its shared memory.
const SHARED_PER_CLOCK: f64 = 128.0;
/// Bytes per clock that a multiprocessor takes from L2.
const L2_PER_CLOCK: f64 = 64.0;
/// How much longer a copy travels while all multiprocessors fetch than alone (measured: rings of two and three stages
/// of matrix products on an H200).
const LOADED: f64 = 1.5;
/// How much longer than the mean the multiprocessor with the longest blocks works: where each section ends with short
/// blocks of several places, where all long blocks come first, and where one place comes after the other.
const UNEVEN: [f64; 3] = [1.005, 1.01, 1.07];
/// Exponent of the norm that joins the terms (a maximum has an infinite one).
const CONTENTION: i32 = 4;
/// Clocks to start a task and to end it.
const TASK_OVERHEAD: f64 = 1500.0;
/// The term that is no resource: the time of the processor with everything that is exposed.
const WAVES: &str = "latency and waves";
/// Seconds to launch a kernel.
const LAUNCH: f64 = 2e-6;

/// What a kernel's mapping is predicted to take.
#[derive(Clone, Debug, PartialEq)]
pub struct Cost {
    /// Seconds, all terms together.
    pub seconds: f64,
    /// Seconds that each resource alone would take, by name.
    pub terms: Vec<(&'static str, f64)>,
    /// The term that binds.
    pub binding: &'static str,
    /// Bytes moved from and to device memory.
    pub dram_bytes: f64,
    /// Bytes moved from and to L2.
    pub l2_bytes: f64,
    /// Tasks launched.
    pub tasks: f64,
    /// Tasks that run on one multiprocessor at once.
    pub resident: u64,
}

impl Cost {
    /// Seconds that the busiest single resource takes: no order or overlap of the same work is faster.
    pub fn floor(&self) -> f64 {
        self.terms.iter().filter(|t| t.0 != WAVES).map(|t| t.1).fold(0.0, f64::max)
    }

    /// Kernels one after the other: times and traffic add up; the binding term is that of the longest.
    pub fn total<'c>(parts: impl Iterator<Item = &'c Cost>) -> Cost {
        let mut out = Cost {
            seconds: 0.0,
            terms: Vec::new(),
            binding: "nothing",
            dram_bytes: 0.0,
            l2_bytes: 0.0,
            tasks: 0.0,
            resident: 0,
        };
        let mut longest = 0.0;
        for c in parts {
            out.seconds += c.seconds;
            out.dram_bytes += c.dram_bytes;
            out.l2_bytes += c.l2_bytes;
            out.tasks += c.tasks;
            for (name, t) in &c.terms {
                match out.terms.iter_mut().find(|x| x.0 == *name) {
                    Some(found) => found.1 += t,
                    None => out.terms.push((name, *t)),
                }
            }
            if c.seconds > longest {
                (longest, out.binding, out.resident) = (c.seconds, c.binding, c.resident);
            }
        }
        out
    }
}

/// What does not depend on an assignment.
#[derive(Clone, Debug)]
pub struct Work {
    /// Nominal extents of the axes.
    pub extents: Vec<f64>,
    /// Per operation: special functions and other arithmetic per element, and the axes of its elements.
    per_op: Vec<(f64, f64, Vec<AxisId>)>,
    /// Share of each stream's points that its filter keeps.
    kept: Vec<f64>,
    /// Loads and stores.
    moves: Vec<Move>,
    /// Whether a stream loads into registers.
    register_loads: bool,
    /// Contractions inside streams.
    waits: f64,
    /// Tiles that consumers hand over through shared memory.
    hand_over: f64,
    /// Bytes that an operation writes to shared memory per element of its tile.
    written: Vec<f64>,
}

/// A load or store.
#[derive(Clone, Debug)]
struct Move {
    axes: Vec<AxisId>,
    bytes: f64,
    load: bool,
    /// The tile, if a copy engine fetches it.
    fetched: Option<usize>,
    stream: Option<usize>,
    /// Bytes of everything it touches, once.
    whole: f64,
}

fn functions(f: &Facts<'_>, root: ExprId) -> (f64, f64) {
    let (mut special, mut plain) = (0.0, 0.0);
    f.kernel.walk(root, &mut |_, e| match e {
        Expr::Unary(op, _) => {
            let (s, p) = match op {
                UnaryOp::Exp | UnaryOp::Log | UnaryOp::Log1p => (1.0, 1.0),
                UnaryOp::Exp2 | UnaryOp::Log2 | UnaryOp::Sqrt | UnaryOp::Rsqrt | UnaryOp::Recip => (1.0, 0.0),
                UnaryOp::Sin | UnaryOp::Cos => (1.0, 2.0),
                UnaryOp::Tanh => (2.0, 4.0),
                UnaryOp::Sigmoid => (2.0, 2.0),
                UnaryOp::Erf => (1.0, 14.0),
                UnaryOp::Neg
                | UnaryOp::Abs
                | UnaryOp::Sign
                | UnaryOp::Floor
                | UnaryOp::Ceil
                | UnaryOp::Round
                | UnaryOp::Not => (0.0, 1.0),
            };
            special += s;
            plain += p;
        }
        Expr::Binary(BinaryOp::Div | BinaryOp::Pow | BinaryOp::Mod, ..) => {
            special += 1.0;
            plain += 2.0;
        }
        Expr::Binary(..) | Expr::Select(..) | Expr::Cast(..) => plain += 1.0,
        Expr::Read { at, .. } if !at.is_empty() => plain += 2.0,
        Expr::Int(_)
        | Expr::Float(_)
        | Expr::Size(_)
        | Expr::Coord(_)
        | Expr::Tile(_)
        | Expr::TileAt { .. }
        | Expr::Read { .. } => {}
    });
    (special, plain)
}

impl Work {
    /// The work of a kernel under a structure.
    pub fn of(f: &Facts<'_>, s: &Structure) -> Work {
        let extents: Vec<f64> = f.axes.iter().enumerate().map(|(i, a)| a.nominal(s.sized[i]).max(1) as f64).collect();
        let per_op = f.ops.iter().map(|o| {
            let value = match o.op {
                Op::Map { value, .. } | Op::Reduce { value, .. } | Op::Scan { value, .. } | Op::Store { value, .. } => {
                    Some(*value)
                }
                Op::Load { .. } | Op::Contract { .. } => None,
            };
            let (special, plain) = value.map_or((0.0, 0.0), |v| functions(f, v));
            let (more, axes): (f64, Vec<AxisId>) = match o.op {
                Op::Reduce { out, over, .. } => (1.0, f.tile_axes(out[0]).iter().chain(over).copied().collect()),
                Op::Map { out, .. } | Op::Scan { out, .. } | Op::Load { out, .. } | Op::Contract { out, .. } => {
                    (0.5, f.tile_axes(*out).to_vec())
                }
                Op::Store { axes, .. } => (1.0, axes.clone()),
            };
            (special, plain + more, s.sized_of(&axes))
        });
        let per_op = per_op.collect();
        let kept = (0..f.streams.len()).map(|i| kept_share(f, i, &extents)).collect();
        let mut moves = Vec::new();
        for (i, o) in f.ops.iter().enumerate() {
            let (axes, dtype, load) = match o.op {
                Op::Load { out, .. } => (f.tile_axes(*out).to_vec(), f.kernel.tiles[*out].dtype, true),
                Op::Store { axes, buffer, .. } => (axes.clone(), f.plan.buffers[*buffer].dtype, false),
                Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => continue,
            };
            let bytes = dtype.bytes(1) as f64;
            let whole = axes.iter().map(|a| extents[a.index()]).product::<f64>() * bytes;
            let fetched = match o.op {
                Op::Load { out, .. } if s.fetches(f, i) => Some(out.index()),
                Op::Load { .. } | Op::Store { .. } => None,
                Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => None,
            };
            moves.push(Move { axes, bytes, load, fetched, stream: o.stream, whole });
        }
        let register_loads = moves.iter().any(|m| m.load && m.fetched.is_none() && m.stream.is_some());
        let waits = s.contractions.iter().filter(|x| f.ops[x.op].stream.is_some()).count() as f64;
        let hand_over = s.written().count() as f64 * 2.0;
        let written = f.ops.iter().map(|o| match o.op {
            Op::Map { out, .. } if s.places[out.index()].shared().is_some() => {
                2.0 * f.kernel.tiles[*out].dtype.bytes(1) as f64
            }
            Op::Map { .. }
            | Op::Load { .. }
            | Op::Store { .. }
            | Op::Reduce { .. }
            | Op::Contract { .. }
            | Op::Scan { .. } => 0.0,
        });
        let written = written.collect();
        Work { extents, per_op, kept, moves, register_loads, waits, hand_over, written }
    }
}

/// The share of a stream's points that its filter keeps, sampled on a grid of coordinates; what depends on data counts
/// as kept.
fn kept_share(f: &Facts<'_>, stream: usize, extents: &[f64]) -> f64 {
    const STEPS: usize = 12;
    let x = &f.streams[stream];
    let Some(filter) = x.filter else { return 1.0 };
    let mut axes = vec![x.axis];
    axes.extend(x.filtered.iter().copied().filter(|a| extents[a.index()] > 1.0).take(2));
    let total = STEPS.pow(axes.len() as u32);
    let mut kept = 0;
    for code in 0..total {
        let at = |a: AxisId| {
            let i = axes.iter().position(|x| *x == a)?;
            let step = code / STEPS.pow(i as u32) % STEPS;
            Some((extents[a.index()] * (step as f64 + 0.5) / STEPS as f64).floor())
        };
        kept += usize::from(value(f, filter, &at, extents).is_none_or(|v| v != 0.0));
    }
    (kept as f64 / total as f64).max(0.01)
}

fn value(f: &Facts<'_>, e: ExprId, at: &dyn Fn(AxisId) -> Option<f64>, extents: &[f64]) -> Option<f64> {
    let of = |e: ExprId| value(f, e, at, extents);
    match &f.kernel.exprs[e] {
        Expr::Int(n) => Some(*n as f64),
        Expr::Float(x) => Some(*x),
        Expr::Size(s) => size(f, s, extents),
        Expr::Coord(a) => at(*a).or(Some(0.0)),
        Expr::Unary(op, a) => Some(op.eval(of(*a)?)),
        Expr::Binary(op, a, b) => Some(op.eval(of(*a)?, of(*b)?, true)),
        Expr::Select(c, a, b) => of(if of(*c)? != 0.0 { *a } else { *b }),
        Expr::Tile(_) | Expr::TileAt { .. } | Expr::Read { .. } | Expr::Cast(..) => None,
    }
}

/// An extent with each rank at the nominal extent of the axis over it.
fn size(f: &Facts<'_>, s: &einfall_ir::cascade::Size, extents: &[f64]) -> Option<f64> {
    use einfall_ir::cascade::Size;
    let mut values = vec![1u64; f.plan.ranks.len()];
    for (i, (_, r)) in f.plan.ranks.iter().enumerate() {
        if let Some(n) = r.fixed {
            values[i] = n;
        }
    }
    for (i, (_, a)) in f.kernel.axes.iter().enumerate() {
        if let Size::Rank(r) = a.extent {
            values[r.index()] = extents[i] as u64;
        }
    }
    s.eval(&values).ok().map(|n| n as f64)
}

/// An assignment's numbers, read once.
struct Chosen {
    blocks: Vec<f64>,
    clusters: Vec<f64>,
    units: f64,
}

/// What `values` costs on a device.
pub fn cost(space: &Space<'_, '_>, work: &Work, sheet: &DataSheet, gpu: &Gpu, values: &[i64]) -> Cost {
    price(space, work, sheet, gpu, values, false)
}

/// A lower bound in seconds for every assignment with the blocks, units, clusters and instructions of `values`: copies
/// are hidden, and any number of tasks run at once.
pub fn bound(space: &Space<'_, '_>, work: &Work, sheet: &DataSheet, gpu: &Gpu, values: &[i64]) -> f64 {
    price(space, work, sheet, gpu, values, true).seconds
}

fn price(space: &Space<'_, '_>, work: &Work, sheet: &DataSheet, gpu: &Gpu, values: &[i64], ideal: bool) -> Cost {
    let (f, s, v) = (space.facts, space.structure, &space.vars);
    let value = |x: Option<crate::csp::VarId>, none: f64| x.map_or(none, |x| values[x.idx()] as f64);
    let c = Chosen {
        blocks: v.block.iter().map(|b| value(*b, 1.0)).collect(),
        clusters: v.cluster.iter().map(|b| value(*b, 1.0)).collect(),
        units: value(v.units, 1.0),
    };
    let block = |a: AxisId| c.blocks[a.index()];
    let extent = |a: AxisId| work.extents[a.index()];
    let blocks = |a: AxisId| (extent(a) / (block(a) * c.clusters[a.index()])).ceil() * c.clusters[a.index()];
    let grid: &[AxisId] = {
        let order = v.order.map_or(0, |o| values[o.idx()].max(0) as usize);
        &space.orders[order]
    };
    let tasks: f64 = grid.iter().map(|a| blocks(*a)).product();
    let group = value(v.group, 1.0);
    let sms = gpu.multiprocessors as f64;

    // Trips of each stream, on average over tasks.
    let trips: Vec<f64> = f
        .streams
        .iter()
        .enumerate()
        .map(|(i, x)| {
            let all = (extent(x.axis) / block(x.axis)).ceil();
            if x.filter.is_none() {
                return all;
            }
            let edge: f64 =
                std::iter::once(x.axis).chain(x.filtered.iter().copied()).map(|a| block(a) / extent(a)).sum();
            (all * (work.kept[i] + edge / 2.0).min(1.0)).max(1.0)
        })
        .collect();
    let often = |stream: Option<usize>| stream.map_or(1.0, |i| trips[i]);

    // Per task, in clocks: tensor cores, special functions, other arithmetic, shared memory; inside streams and outside.
    let peak = sheet.peak_of(s.contractions[0].operand).unwrap_or(1e12) / (sms * gpu.clock);
    let (mut tensor, mut special, mut plain, mut shared) = (0.0, 0.0, 0.0, 0.0);
    let (mut tail_special, mut tail_plain) = (0.0, 0.0);
    for (i, x) in s.contractions.iter().enumerate() {
        let n = values[v.atom[i].idx()] as f64;
        let (bm, bn, bk) = (block(x.m), block(x.n), block(x.k));
        let bytes = x.operand.bytes(1) as f64;
        let times = often(f.ops[x.op].stream);
        let memory = s.places[x.a.index()] != Place::Registers;
        let read = 16.0 * bytes * (n + if memory { 64.0 } else { 0.0 });
        let one = 2.0 * 64.0 * n * 16.0 / peak;
        // Narrow instructions do not fill the pipe whatever their operands come from.
        let narrow = if n < 16.0 {
            0.22
        } else if n < 32.0 {
            0.4
        } else {
            1.0
        };
        let instruction = (one / (WIDE * narrow)).max(read / SHARED_PER_CLOCK / WIDE);
        let count = (bm / 64.0) * (bn / n) * (bk / 16.0) * times;
        tensor += instruction * count;
        shared += read * count;
    }
    for (i, o) in f.ops.iter().enumerate() {
        let (sp, pl, axes) = &work.per_op[i];
        if matches!(o.op, Op::Contract { .. }) || s.fetches(f, i) {
            continue;
        }
        // Vectors are held several times over: a row by four threads.
        let elements: f64 = axes.iter().map(|a| block(*a)).product::<f64>() * if axes.len() < 2 { 4.0 } else { 1.0 };
        let times = often(o.stream);
        if o.stream.is_some() {
            special += sp * elements * times;
            plain += pl * elements * times;
        } else {
            tail_special += sp * elements;
            tail_plain += pl * elements;
        }
        shared += work.written[i] * elements * times;
    }
    let special = special / gpu.special_per_clock as f64;
    let plain = plain / gpu.fma_per_clock as f64;
    let tail = (tail_special / gpu.special_per_clock as f64).max(tail_plain / gpu.fma_per_clock as f64);

    // Traffic per task: what it fetches, loads and stores.
    let (mut l2_task, mut l2_stream, mut fill, mut dram) = (0.0, 0.0, 0.0, 0.0);
    let l2_capacity = sheet.level("l2").map_or(1e7, |l| l.bytes as f64);
    let resident = if ideal { 1 } else { resident(space, gpu, &c, values) };
    let wave = (sms * resident as f64).min(tasks).max(1.0);
    for m in &work.moves {
        let tile: f64 = m.axes.iter().map(|a| block(*a)).product::<f64>() * m.bytes;
        let times = often(m.stream);
        let sharers: f64 = if m.fetched.is_some() {
            grid.iter().filter(|a| !m.axes.contains(a)).map(|a| c.clusters[a.index()]).product()
        } else {
            1.0
        };
        l2_task += tile * times / sharers;
        if m.stream.is_some() && m.load {
            l2_stream += tile * times / sharers;
            // A copy engine takes as long for a narrow row as for a whole span.
            let span = m.fetched.and_then(|t| v.swizzle[t]).map_or(128.0, |w| values[w.idx()] as f64);
            fill += tile * times / sharers * if span > 0.0 { 128.0 / span } else { 1.0 };
        }
        // Device memory: once if the array fits beside others in L2, otherwise once per wave and distinct block.
        if !m.load || m.whole <= l2_capacity / 2.0 {
            dram += m.whole;
            continue;
        }
        let kept = m.stream.map_or(1.0, |x| work.kept[x].min(1.0));
        let mut rest = wave;
        let mut distinct = 1.0;
        let mut slower = grid;
        // A section of `group` blocks of the second-fastest axis for each block of the fastest.
        if let ([outer @ .., second, fastest], true) = (grid, group > 1.0) {
            let (n2, n1) = (blocks(*second), blocks(*fastest));
            let g = group.min(n2);
            let along1 = (wave / g).clamp(1.0, n1);
            let along2 = if wave > g * n1 { (wave / n1).min(n2) } else { g.min(wave) };
            for (a, along) in [(second, along2), (fastest, along1)] {
                if m.axes.contains(a) {
                    distinct *= along;
                }
            }
            rest = (wave / (n1 * n2)).max(1.0);
            slower = outer;
        }
        for a in slower.iter().rev() {
            let along = blocks(*a).min(rest.max(1.0));
            if m.axes.contains(a) {
                distinct *= along;
            }
            rest /= along;
        }
        let waves = (tasks / wave).ceil();
        let all = tasks * tile * times;
        if ideal {
            dram += m.whole * kept;
            continue;
        }
        dram += (distinct * tile * times * waves).min(all).max(m.whole * kept);
    }

    // One task alone, and how much of a multiprocessor it keeps busy.
    let elementwise = special.max(plain);
    let turns = v.ping_pong.is_some_and(|p| values[p.idx()] == 1);
    let overlap = match s.schedule {
        Schedule::Overlapped => {
            if turns {
                0.95
            } else {
                0.9
            }
        }
        Schedule::Plain | Schedule::Prefetched(_) if c.units > 1.0 => {
            if turns {
                0.75
            } else {
                0.5
            }
        }
        Schedule::Plain | Schedule::Prefetched(_) => 0.0,
    };
    let together = tensor.max(elementwise) + (1.0 - overlap) * tensor.min(elementwise);
    let all_trips: f64 = trips.iter().sum();
    let fill = fill / L2_PER_CLOCK;
    let stages =
        s.fetched().filter_map(|t| v.stages[t.index()]).map(|x| values[x.idx()] as f64).fold(f64::INFINITY, f64::min);
    let latency = gpu.memory_latency as f64;
    // Each trip waits for a copy issued `ahead` trips before.
    let ahead = match s.schedule {
        Schedule::Prefetched(n) => n as f64,
        Schedule::Plain | Schedule::Overlapped if s.producer && stages.is_finite() => stages,
        Schedule::Plain | Schedule::Overlapped => 0.0,
    };
    // A stage is away while its copy travels and while it is read, which ends a trip after it began.
    let exposed = if ideal || all_trips == 0.0 || (!work.register_loads && stages.is_infinite()) {
        0.0
    } else if ahead == 0.0 {
        all_trips * latency + fill
    } else {
        ((LOADED * latency * all_trips + fill + 1.5 * together) / ahead - together).max(0.0)
    };
    let hidden = if overlap > 0.0 { 0.25 } else { 1.0 };
    let sync = all_trips * gpu.barrier_latency as f64 * (work.waits * hidden + work.hand_over + 1.0);
    // Registers have no ring: without prefetching their loads take part of every trip that its other work does not hide.
    let direct = if work.register_loads && !matches!(s.schedule, Schedule::Prefetched(_)) {
        (latency * all_trips - together - sync).max(0.0)
    } else {
        0.0
    };
    let staged = v.staged.iter().flatten().any(|x| values[x.idx()] == 1);
    let store = (l2_task - l2_stream) / if staged { L2_PER_CLOCK } else { L2_PER_CLOCK / 2.0 };
    let busy = together.max(fill).max(shared / SHARED_PER_CLOCK) + tail + 0.25 * sync;
    let alone = together.max(fill) + exposed + direct + sync + tail + store + TASK_OVERHEAD + latency;
    let span = |r: f64| (r * busy).max(alone);
    let resident_f = resident as f64;
    let even = f.streams.iter().all(|x| x.filter.is_none()) || v.longest.is_none_or(|l| values[l.idx()] == 0);
    let clocks = if ideal {
        (tasks / sms * busy).max(alone)
    } else if even {
        let full = (tasks / (sms * resident_f)).floor();
        let rest = tasks - full * sms * resident_f;
        full * span(resident_f) + if rest > 0.0 { span((rest / sms).ceil()) } else { 0.0 }
    } else {
        // Long blocks first even the last wave out, if few of them come late.
        let filtered = |a: &AxisId| f.streams.iter().any(|x| x.filtered.contains(a));
        let sections = group > 1.0 && grid.len() > 1 && blocks(grid[grid.len() - 2]) >= group;
        let uneven = UNEVEN[if sections { 0 } else { 1 + usize::from(!grid.first().is_some_and(filtered)) }];
        (tasks / (sms * resident_f)).max(1.0) * span(resident_f) * uneven
    };
    let (l2_bytes, dram_bytes) = (l2_task * tasks, dram);
    let per_clock = 1.0 / gpu.clock;
    let rate = |name: &str| sheet.level(name).map_or(1e12, |l| l.bandwidth * l.instances as f64);
    let share = tasks / sms * per_clock;
    let terms = vec![
        ("device memory", dram_bytes / rate("dram")),
        ("L2", l2_bytes / rate("l2")),
        ("shared memory", shared * share / SHARED_PER_CLOCK),
        ("tensor cores", tensor * share),
        ("special functions", (special + tail_special / gpu.special_per_clock as f64) * share),
        ("arithmetic", (plain + tail_plain / gpu.fma_per_clock as f64) * share),
        (WAVES, clocks * per_clock),
    ];
    // Nearly a maximum: resources that are almost as busy as the busiest make each other wait.
    let longest = terms.iter().map(|t| t.1).fold(f64::MIN_POSITIVE, f64::max);
    let contended = terms.iter().map(|t| (t.1 / longest).powi(CONTENTION)).sum::<f64>();
    let seconds = longest * contended.powf(1.0 / f64::from(CONTENTION)) + LAUNCH;
    // The processor's own time binds unless a level, or a unit within 15% of it, explains it.
    let binding = terms[..6]
        .iter()
        .filter(|t| t.1 * 1.15 >= seconds - LAUNCH)
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map_or(WAVES, |t| t.0);
    Cost { seconds, terms, binding, dram_bytes, l2_bytes, tasks, resident }
}

/// Tasks on one multiprocessor at once.
fn resident(space: &Space<'_, '_>, gpu: &Gpu, c: &Chosen, values: &[i64]) -> u64 {
    let s = space.structure;
    let shared = space.shared.eval(values).unwrap_or(0).max(0) as u64 + TASK_SHARED_BYTES;
    let threads = c.units as u64 * 128 + u64::from(s.producer) * 128;
    let by_registers = match space.vars.regs[..] {
        [producer, consumer] if values[consumer.idx()] > 0 => {
            let set = 128 * values[producer.idx()] as u64 + c.units as u64 * 128 * values[consumer.idx()] as u64;
            let starts = |tasks: &u64| launch_registers(gpu.registers, gpu.thread_registers, threads, *tasks);
            let widest = space.widest(values);
            (2..=32).rev().find(|n| starts(n) * threads >= set && starts(n) >= widest).unwrap_or(1)
        }
        // Without budgets the assembler takes what the fragments need.
        _ => {
            let need = space.need.eval(values).unwrap_or(0).max(24) as u64;
            gpu.registers / (need.next_multiple_of(8).min(gpu.thread_registers) * threads).max(1)
        }
    };
    let by_shared = gpu.shared_per_multiprocessor / shared.max(1);
    let by_threads = gpu.threads_per_multiprocessor / threads.max(1);
    by_shared.min(by_threads).min(by_registers).clamp(1, 32)
}
