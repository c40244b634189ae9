//! The cost of a mapping: nearly the greatest of what each level moves, the tensor cores, the other units and latencies take,
//! over how well whole waves of tasks fill the device.
//!
//! Rates come from the data sheet. wgmma reads both operands from shared memory at 128 bytes per clock, so narrow
//! instructions wait for it: that gives the measured rates (n ≥ 64 at 95%, n = 32 at 63% from shared memory and 94%
//! from registers, n = 16 at 38%, n = 8 at 21%). mma reads registers, which every unit loads from shared memory once per
//! step of k. Traffic counts blocks: what the tasks of one wave share is read from
//! device memory once if the wave's order brings them together. Invariant: costs are for ranking and say which term
//! binds; nothing is fitted to a kernel.

use einfall_ir::analysis::resources::launch_registers;
use einfall_ir::arena::Id;
use einfall_ir::target::{DataSheet, Gpu, TASK_SHARED_BYTES};
use einfall_ir::tile::{AxisId, Op};

use super::space::Space;
use super::structure::{Place, Schedule};
pub use super::work::Work;

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
/// Clocks between two blocks of a task that takes block after block: where the next one is.
const ROUND: f64 = 200.0;
/// How much longer than the mean tasks take that were dealt their blocks beforehand: as equal blocks, as folded pairs of
/// long and short ones, as they come.
const DEALT: [f64; 3] = [1.03, 1.01, 1.25];
/// Share of device memory's rate that a copy of a large array reaches (measured: 4,250 of 4,800 GB/s on an H200).
const COPY: f64 = 0.9;
/// Bytes that a multiprocessor may have under way before streams only mix in device memory, and how much longer that
/// takes (measured: decode on an H200 with 64, 96, 128 and 192 KB).
const UNDER_WAY: (f64, f64) = (65_536.0, 0.045);
/// Latencies that a stage of a stream bound by memory is away for (measured: 32 KB under way give 2,850 GB/s).
const AWAY: f64 = 3.5;
/// Share of its issue slots that a scheduler fills by one warp, two, three or four of the consumers.
const ISSUED: [f64; 4] = [0.6, 0.85, 0.95, 1.0];
/// Bytes of parts' states that the last task to arrive has under way at once.
const MERGED_BYTES: f64 = 34816.0;
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
    let sms = gpu.multiprocessors as f64;
    let units: f64 = grid.iter().map(|a| blocks(*a)).product();
    let steps = |i: usize| (extent(f.streams[i].axis) / block(f.streams[i].axis)).ceil();
    // Tasks that share a stream: as many as fill the device a small number of times, as the lowering counts them.
    let parts = match (v.split, f.shared_stream()) {
        (Some(split), Some(i)) if !ideal => {
            let most = values[split.parts.idx()] as f64;
            let slots = sms * values[split.resident.idx()] as f64;
            let rounds = (8.0 * units / slots).ceil().clamp(1.0, 4.0);
            most.min((rounds * slots / units).floor()).min(steps(i)).max(1.0)
        }
        _ => 1.0,
    };
    let merged = v.split.is_some_and(|s| values[s.parts.idx()] > 1);
    let tasks = units * parts;
    let group = value(v.group, 1.0);
    let persistent = !ideal && value(v.persistent, 0.0) > 0.0;

    // Trips of each stream, on average over tasks.
    let trips: Vec<f64> = f
        .streams
        .iter()
        .enumerate()
        .map(|(i, x)| {
            let all = (steps(i) / if x.parts { parts } else { 1.0 }).ceil();
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
        if !space.family.asynchronous() {
            // Every unit loads the rows it has once per step of k, and the columns it has; instructions take them from
            // registers.
            let along = |a: AxisId| if s.cut == Some(a) { c.units } else { 1.0 };
            let read = bytes * bk * (bn * along(x.m) + if memory { bm * along(x.n) } else { 0.0 }) * times;
            tensor += (2.0 * bm * bn * bk * times / peak / WIDE).max(read / SHARED_PER_CLOCK / WIDE);
            shared += read;
            continue;
        }
        // The hardware computes 64 rows whatever the instruction keeps.
        let rows = v.rows.map_or(space.family.rows[0], |r| values[r.idx()]) as f64;
        let read = 16.0 * bytes * (n + if memory { rows } else { 0.0 });
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
        let count = (bm / rows) * (bn / n) * (bk / 16.0) * times;
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
    // A work loop has as many tasks as there are multiprocessors.
    let resident: u64 = if ideal || persistent { 1 } else { resident(space, gpu, &c, values) };
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
        if !m.load && merged {
            // The merge stores results, a part its states.
            l2_task -= tile * times * (1.0 - 1.0 / parts);
        }
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

    // States of a part are stored, and read again by the merge.
    let states = match merged {
        true => {
            let size = |(axes, bytes): &(Vec<AxisId>, f64)| {
                axes.iter().map(|a| block(*a).min(extent(*a))).product::<f64>() * bytes
            };
            work.states.iter().map(size).sum()
        }
        false => 0.0,
    };
    l2_task += 2.0 * states;
    dram += states * tasks;

    // One task alone, and how much of a multiprocessor it keeps busy.
    let elementwise = special.max(plain);
    let turns = v.ping_pong.is_some_and(|p| values[p.idx()] == 1);
    // Warps of a unit on each of a multiprocessor's four schedulers.
    let per_scheduler = space.family.threads() as f64 / 128.0;
    let overlap = match s.schedule {
        Schedule::Overlapped => {
            if turns {
                0.95
            } else {
                0.9
            }
        }
        // Warps of one scheduler fill each other's gaps.
        Schedule::Plain | Schedule::Prefetched(_) if c.units * per_scheduler > 1.0 => {
            if turns {
                0.75
            } else {
                0.5
            }
        }
        Schedule::Plain | Schedule::Prefetched(_) => 0.0,
    };
    // So many tasks' warps share the schedulers; a task alone is as slow as its own.
    let together = |tasks: u64| {
        let warps = ((c.units * per_scheduler * tasks as f64).ceil() as usize).max(1);
        let slots = if ideal { 1.0 } else { ISSUED[warps.min(ISSUED.len()) - 1] };
        let elementwise = elementwise / slots;
        tensor.max(elementwise) + (1.0 - overlap) * tensor.min(elementwise)
    };
    let (together, crowded) = (together(1), together(resident));
    let all_trips: f64 = trips.iter().sum();
    let fill = fill / L2_PER_CLOCK;
    let rings: Vec<f64> = s.fetched().filter_map(|t| v.stages[t.index()]).map(|x| values[x.idx()] as f64).collect();
    let stages = if rings.is_empty() { f64::INFINITY } else { rings.iter().sum::<f64>() / rings.len() as f64 };
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
    let handed = if turns && !ideal { 1.0 } else { 0.0 };
    let sync = all_trips * gpu.barrier_latency as f64 * (work.waits * hidden + work.hand_over + handed + 1.0);
    // Registers have no ring: without prefetching their loads take part of every trip that its other work does not hide.
    let direct = if work.register_loads && !matches!(s.schedule, Schedule::Prefetched(_)) {
        (latency * all_trips - together - sync).max(0.0)
    } else {
        0.0
    };
    let staged = v.staged.iter().flatten().any(|x| values[x.idx()] == 1);
    let store = (l2_task - l2_stream - states) / if staged { L2_PER_CLOCK } else { L2_PER_CLOCK / 2.0 };
    let busy = crowded.max(fill).max(shared / SHARED_PER_CLOCK) + tail + 0.25 * sync;
    let block_alone = together.max(fill) + exposed + direct + sync + tail;
    // The last of a block's parts finds its states stored and counted, then reads those of all.
    let last = v.split.is_some_and(|s| values[s.last.idx()] == 1);
    let arrival = if last { 2.0 * latency } else { 0.0 };
    let merge = match merged {
        true => {
            let reads = (parts * states / MERGED_BYTES).ceil() * LOADED * latency + parts * states / L2_PER_CLOCK;
            reads + if last { 0.0 } else { LAUNCH * gpu.clock + latency }
        }
        false => 0.0,
    };
    let alone = block_alone + store + arrival + TASK_OVERHEAD + latency;
    let span = |r: f64| (r * busy).max(alone);
    let resident_f = resident as f64;
    let differ = f.streams.iter().any(|x| x.filter.is_some());
    let even = !differ || v.longest.is_none_or(|l| values[l.idx()] == 0);
    let clocks = if ideal {
        // Parts of a stream make tasks as short as one likes.
        let least = if v.split.is_some() { 0.0 } else { alone };
        (tasks / sms * busy).max(least)
    } else if persistent {
        let clustered: f64 = grid.iter().map(|a| c.clusters[a.index()]).product();
        let slots = (sms / clustered).floor().max(1.0) * clustered;
        let filtered = |a: &&AxisId| f.streams.iter().any(|x| x.filtered.contains(a));
        let folded = grid.iter().find(filtered).is_some_and(|a| {
            let pairs = (blocks(*a) / c.clusters[a.index()]) % 2.0 == 0.0 && tasks >= 4.0 * slots;
            !even && pairs
        });
        let (rounds, dealt) = match (folded, differ) {
            (true, _) => (2.0 * (tasks / 2.0 / slots).ceil(), DEALT[1]),
            (false, true) => ((tasks / slots).ceil(), DEALT[2]),
            (false, false) => ((tasks / slots).ceil(), DEALT[0]),
        };
        // A copy engine sends one result while the next block is computed, if it has memory of its own.
        let reused = v.reuses.iter().flatten().any(|x| values[x.idx()] == 1);
        let between = ROUND + if staged && !reused { 0.0 } else { store } + if reused { latency } else { 0.0 };
        // What the consumers load themselves before a stream is not under way while they compute.
        let fetch = if s.producer && !work.head_loads { 0.0 } else { LOADED * latency };
        rounds * (block_alone + between + fetch) * dealt + TASK_OVERHEAD + latency + store
    } else if even {
        let full = (tasks / (sms * resident_f)).floor();
        let rest = tasks - full * sms * resident_f;
        full * span(resident_f) + if rest > 0.0 { span((rest / sms).ceil()) } else { 0.0 } + merge
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
    // Bytes that copies of a stream have under way on a multiprocessor, which device memory's rate follows from.
    let each: f64 = work
        .moves
        .iter()
        .filter(|m| m.fetched.is_some() && m.stream.is_some())
        .map(|m| m.axes.iter().map(|a| block(*a).min(extent(*a))).product::<f64>() * m.bytes)
        .sum();
    let under_way = each * if ahead > 0.0 { ahead } else { 1.0 } * resident as f64;
    let memory = if ideal || each == 0.0 {
        COPY * rate("dram")
    } else {
        let mixed = 1.0 + UNDER_WAY.1 * ((under_way - UNDER_WAY.0) / UNDER_WAY.0 * 2.0).clamp(0.0, 1.0);
        let busy_multiprocessors = (tasks / resident as f64).min(sms);
        (COPY * rate("dram") / mixed).min(busy_multiprocessors * under_way / (AWAY * latency * per_clock))
    };
    let terms = vec![
        ("device memory", dram_bytes / memory),
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
    let own = (c.units as u64 * space.family.threads() as u64).next_multiple_of(128);
    let threads = own + u64::from(s.producer) * 128;
    let by_registers = match space.vars.regs[..] {
        [producer, consumer] if values[consumer.idx()] > 0 => {
            let set = 128 * values[producer.idx()] as u64 + c.units as u64 * 128 * values[consumer.idx()] as u64;
            let starts = |tasks: &u64| launch_registers(gpu.registers, gpu.thread_registers, threads, *tasks);
            let widest = space.widest(values);
            (2..=32).rev().find(|n| starts(n) * threads >= set && starts(n) >= widest).unwrap_or(1)
        }
        [consumer] if values[consumer.idx()] > 0 => gpu.registers / (values[consumer.idx()] as u64 * threads),
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
