//! The cost of blocks on a processor: what a core's vector instructions, its caches and the walk over blocks take, and how
//! evenly ranges of tasks fill the cores.
//!
//! Ranges of tasks are handed out as the run time hands them out; what one task takes is in [`super::task`]. Invariants:
//! costs rank mappings of one kernel, and nothing is fitted to a kernel; [`Cost::floor`] counts the multiply-adds of
//! whole register tiles and what no cache can hold, and nothing else.

use std::cell::RefCell;
use std::collections::BTreeMap;

use einfall_ir::arena::Id;
use einfall_ir::cascade::Size;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms::{self, Atom};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{Axis, AxisId, BufferKind};

use super::space::Space;
use super::task::Chosen;
use super::work::{Kind, Source, Work, kept};

/// Operations and bytes together below which the calling thread does all tasks, and ranges of tasks that a thread is
/// handed (`runtime/src/launch.rs`).
const INLINE_WORK: f64 = 131_072.0;
const RANGES_PER_THREAD: f64 = 8.0;
/// Seconds to wake the other threads and wait for them, and to hand out a range.
const WAKE: f64 = 8e-6;
const RANGE: f64 = 5e-7;
/// Seconds to begin a launch that follows another at once, and to wait for its end: no thread sleeps.
const FOLLOWING: f64 = 3e-6;
/// Share of a range by which the slowest of two cores is behind; of more cores as many times as they can be halved.
const SLOWER: f64 = 0.2;
/// Share of a sheet's rates that are surely not exceeded: they are measured, on a machine that may be busy.
const CERTAIN: f64 = 0.8;
/// Tasks up to which each is weighed by itself.
const WEIGHED: f64 = 64.0;
/// Operations a byte below which arrays are taken to come from further away: other work ran in between.
const INTENSE: f64 = 16.0;
/// How many times over.
const ELSEWHERE: f64 = 8.0;

/// What a mapping is predicted to take.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost {
    /// Seconds, all terms together.
    pub seconds: f64,
    /// Seconds that no order or overlap of the same work beats.
    pub floor: f64,
    /// Seconds that each term alone would take on all cores, by name.
    pub terms: Vec<(&'static str, f64)>,
    /// The greatest of them.
    pub binding: &'static str,
    /// Tasks launched.
    pub tasks: f64,
}

impl Cost {
    /// Kernels one after the other.
    pub fn total<'c>(parts: impl IntoIterator<Item = &'c Cost>) -> Cost {
        let mut out = Cost::default();
        for c in parts {
            out.seconds += c.seconds;
            out.floor += c.floor;
            out.tasks += c.tasks;
            for (name, t) in &c.terms {
                match out.terms.iter_mut().find(|x| x.0 == *name) {
                    Some(found) => found.1 += t,
                    None => out.terms.push((name, *t)),
                }
            }
        }
        out.binding = out.terms.iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("nothing", |t| t.0);
        out
    }
}

/// A processor as costs see it.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub cores: f64,
    /// Seconds of a vector multiply-add at the peak of one core.
    pub slot: f64,
    pub lanes: f64,
    /// Rows of a register tile.
    pub rows: f64,
    /// The instruction for products of bf16, where the processor has one, and the slots that it takes.
    pub product: Option<(Atom, f64)>,
    /// Pages that a core's prefetchers follow at a time.
    pub followed: f64,
    /// Capacities of L1, L2 of a core and the last cache, in bytes.
    bytes: [f64; 3],
    /// Seconds that a core takes for a byte from L1, L2, the last cache and memory, all cores reading.
    pub byte: [f64; 4],
}

impl Machine {
    fn of(sheet: &DataSheet) -> Machine {
        let registers = sheet.level("registers");
        let cores = registers.map_or(1.0, |l| l.instances as f64).max(1.0);
        // 32 registers of 64 bytes, or 16 of 32 (as AVX2; Neon's 32 of 16 take as many bytes).
        let (count, lanes) = match registers.map_or(512, |l| l.bytes) {
            b if b >= 2048 => (32.0, 16.0),
            b => (16.0, (b as f64 / 64.0).max(4.0)),
        };
        let slot = 2.0 * lanes * cores / sheet.peak_of(DType::F32).unwrap_or(1e11);
        let caches: Vec<_> = sheet.levels.iter().rev().filter(|l| l.name.starts_with('l')).collect();
        let nth = |i: usize| caches.get(i.min(caches.len().saturating_sub(1)));
        let rate = |i: usize| nth(i).map_or(1e11, |l| l.bandwidth * l.instances as f64);
        let last = caches.len().saturating_sub(1).max(2);
        let dram = sheet.levels.first().map_or(1e10, |l| l.bandwidth * l.instances as f64);
        let all = |rate: f64| cores / rate;
        Machine {
            cores,
            slot,
            lanes,
            product: atoms::of_processor(sheet).and_then(|atom| {
                let operations = 2.0 * atom.shape.iter().product::<u64>() as f64;
                let slots = operations * cores / sheet.peak_of(atom.operand)? / slot;
                Some((atom, slots))
            }),
            followed: sheet.followed_pages.map_or(f64::INFINITY, |n| n as f64),
            rows: ((count - 4.0) / 2.0_f64).floor(),
            bytes: [0, 1, last].map(|i| nth(i).map_or(1e6, |l| l.bytes as f64)),
            byte: [all(rate(0)), all(rate(1)), all(rate(last)), all(dram)],
        }
    }

    /// The nearest level that keeps so many bytes beside what passes through (0 is L1; 3 memory).
    pub fn holds(&self, bytes: f64) -> usize {
        self.bytes.iter().position(|b| 2.0 * bytes <= *b).unwrap_or(3)
    }
}

/// Prices assignments of one kernel.
pub struct Pricer<'s, 'a> {
    pub(super) space: &'s Space<'a>,
    pub(super) work: Work,
    pub(super) machine: Machine,
    /// Level that arrays come from at first.
    pub(super) home: usize,
    /// Seconds that memory takes at least.
    moved: f64,
    /// Whether the calling thread does all tasks.
    alone: bool,
    kept: RefCell<BTreeMap<(usize, Vec<u64>), f64>>,
}

impl<'s, 'a> Pricer<'s, 'a> {
    /// For the kernel of a space on a processor.
    pub fn new(space: &'s Space<'a>, sheet: &DataSheet) -> Pricer<'s, 'a> {
        let (work, machine) = (Work::of(space), Machine::of(sheet));
        let mut arrays: BTreeMap<usize, f64> = BTreeMap::new();
        let mut operations = 0.0;
        let whole = |axes: &[AxisId]| axes.iter().map(|a| space.extents[a.index()] as f64).product::<f64>();
        for s in &work.steps {
            let mut all: Vec<AxisId> = s.axes.iter().chain(&s.over).chain(&s.streams).copied().collect();
            all.sort();
            all.dedup();
            operations += whole(&all) * if let Kind::Contract { .. } = s.kind { 2.0 } else { 1.0 };
            for access in s.reads.iter().chain([&s.write]) {
                if let Source::Array(a) = access {
                    let most = arrays.entry(a.buffer).or_default();
                    *most = most.max((whole(&a.axes) * a.bytes).min(a.whole));
                }
            }
        }
        let bytes: f64 = arrays.values().sum();
        let given = |b: &usize| {
            let kind = space.plan.buffers.iter().nth(*b).map(|(_, b)| b.kind);
            kind != Some(BufferKind::Workspace)
        };
        let outside: f64 = arrays.iter().filter(|(b, _)| given(b)).map(|(_, n)| n).sum();
        let far = if operations < INTENSE * bytes { ELSEWHERE } else { 1.0 };
        let home = machine.holds(outside * far / machine.cores).max(machine.holds(outside * far).min(2)).max(1);
        // What the last cache may have kept since the launch before is not moved.
        let moved = (outside - machine.bytes[2]).max(0.0) * machine.byte[3] / machine.cores;
        let alone = machine.cores < 2.0 || operations + bytes < INLINE_WORK;
        Pricer { space, work, machine, home, moved, alone, kept: RefCell::new(BTreeMap::new()) }
    }

    /// What an assignment costs.
    pub fn cost(&self, values: &[i64]) -> Cost {
        let (space, m) = (self.space, &self.machine);
        let kernel = space.kernel;
        // Code for an extent that is fixed is made for no more than that.
        let made = |((_, a), block): ((AxisId, &Axis), f64)| match a.extent {
            Size::Const(n) => block.min(n as f64),
            _ => block,
        };
        let most: Vec<f64> = kernel.axes.iter().zip(space.blocks(values)).map(made).collect();
        let full: Vec<f64> = most.iter().zip(&space.extents).map(|(b, e)| b.min(*e as f64).max(1.0)).collect();
        let count = |a: AxisId| (space.extents[a.index()] as f64 / full[a.index()]).ceil();
        let mut trips: Vec<f64> = kernel.axes.ids().map(count).collect();
        for (i, f) in self.work.filters.iter().enumerate() {
            let key = (i, f.axes.iter().map(|a| full[a.index()] as u64).collect());
            let share = *self.kept.borrow_mut().entry(key).or_insert_with(|| kept(space, f, &full));
            trips[f.axis.index()] *= share;
        }
        let tasks: f64 = kernel.axes.ids().filter(|a| space.parallel(*a)).map(count).product();
        let steps = space.launched.as_ref().map_or(1.0, |l| count(l.0));
        let chosen = Chosen::new(self, most, full, trips);
        let task = chosen.task();
        let seconds = |slots: f64| slots * m.slot;
        let busy = seconds(task.products + task.packing + task.elementwise);
        let own = busy.max(task.memory) + 0.3 * busy.min(task.memory) + seconds(task.walking);
        let longest = if self.alone || tasks < 2.0 { tasks } else { self.longest(&chosen, tasks) };
        let shared = !self.alone && tasks > 1.0;
        let ranges = tasks.min(m.cores * RANGES_PER_THREAD);
        let handed = RANGE * (ranges / m.cores).ceil();
        let launch = if shared { WAKE + handed * steps + FOLLOWING * (steps - 1.0) } else { 0.0 };
        // Some core is slower than the others, with another machine's work or with a late start: by part of a range.
        let longest = longest + if shared { SLOWER * m.cores.log2() * (tasks / ranges) } else { 0.0 };
        let used = if shared { tasks.min(m.cores) } else { 1.0 };
        let total = |t: f64| t * tasks / used;
        let terms = vec![
            ("multiply-adds", total(seconds(task.products))),
            ("packing", total(seconds(task.packing))),
            ("elementwise", total(seconds(task.elementwise))),
            ("memory", total(task.memory)),
            ("loops and tasks", total(seconds(task.walking)) + launch),
            ("uneven tasks", (longest - tasks / used).max(0.0) * own),
        ];
        let binding = terms.iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("nothing", |t| t.0);
        let least = seconds(task.least) * tasks / if self.alone { 1.0 } else { m.cores };
        let floor = CERTAIN * least.max(self.moved);
        Cost { seconds: longest * own + launch, floor, terms, binding, tasks }
    }

    /// Tasks of mean length that the busiest core does.
    fn longest(&self, c: &Chosen<'_, '_, '_>, tasks: f64) -> f64 {
        let m = &self.machine;
        let ranges = tasks.min(m.cores * RANGES_PER_THREAD);
        if tasks > WEIGHED {
            let each = (tasks / ranges).ceil().min(tasks / ranges + 1.0);
            return ((ranges / m.cores).ceil() * tasks / ranges).max(tasks / m.cores).max(each);
        }
        // Ranges are taken in order by whichever core is free.
        let axes: Vec<(f64, f64)> = self
            .space
            .kernel
            .axes
            .iter()
            .filter(|(id, _)| self.space.parallel(*id))
            .map(|(id, _)| (self.space.extents[id.index()] as f64, c.full[id.index()]))
            .collect();
        let weight = |task: f64| {
            let mut rest = task;
            let mut w = 1.0;
            for (extent, block) in axes.iter().rev() {
                let n = (extent / block).ceil();
                let at = rest % n;
                rest = (rest / n).floor();
                w *= (extent - at * block).min(*block) / (extent / n);
            }
            w
        };
        let mut free: Vec<f64> = vec![0.0; m.cores as usize];
        for r in 0..ranges as u64 {
            let bound = |i: u64| (i as f64 * tasks / ranges).floor() as u64;
            let length: f64 = (bound(r)..bound(r + 1)).map(|t| weight(t as f64)).sum();
            if let Some(first) = free.iter_mut().min_by(|a, b| a.total_cmp(b)) {
                *first += length;
            }
        }
        free.into_iter().fold(0.0, f64::max)
    }
}
