//! Mappings of kernels without contractions: how much each thread has in flight, from the sheet's numbers.
//!
//! Such kernels are bound by device memory, and memory by what is in flight. By Little's law a multiprocessor needs
//! `bandwidth · latency / multiprocessors` bytes under way (H200: 4.8 TB/s · 800 clocks / 132 = 16 KB); a row held from
//! its load to its store is being loaded for a quarter of that time, so that four times as much must be resident
//! ([`RESIDENT`]: 64 KB). A thread that holds n bytes of a row needs about [`WORKING`] + n / 4 · 1.5 registers
//! (what it holds, and half of it again in f32 on the way), which bounds the threads of a multiprocessor and which the
//! assembler is held to; the rule takes the fewest 16-byte loads per thread that keep enough resident. H200, bf16: 64
//! bytes and 64 registers, so that a row of 4096 is held by four warps, and eight rows, 64 KB, are resident; one of
//! 1024 is held by one warp. Walked rows have as much in flight per step. What is read only after a reduction of the
//! row (a norm's weights) is loaded early, beside the row, where its registers leave enough resident: a row is then held
//! for one latency less ([`EARLY`]). H200, bf16 weights: 88 registers keep 48 KB resident, f32 ones would 35 KB.
//! Invariant: blocks are multiples of whole accesses of whole warps, and the last entry of a kernel takes any extent.

use std::collections::{BTreeMap, BTreeSet};

use einfall_ir::arena::Id;
use einfall_ir::cascade::Size;
use einfall_ir::kernel::Scope;
use einfall_ir::mapping::{AxisMapping, KernelMapping, RoleMapping};
use einfall_ir::target::{DataSheet, Gpu};
use einfall_ir::tile::{AxisId, AxisKind, BufferId, Expr, ExprId, Kernel, Node, Op, Plan};

/// How often the bytes under way must be resident.
const RESIDENT: f64 = 4.0;
/// The same for rows that are held for no other load: between a LayerNorm with bf16 weights, which gains by it (48 KB
/// resident on an H200), and one with f32 weights, which loses (35 KB).
const EARLY: f64 = 2.5;
/// Registers of a thread beside what it holds.
const WORKING: u64 = 40;
/// Registers of a thread that walks, beside that.
const WALKING: u64 = 16;
/// Threads of a warp.
const WARP: u64 = 32;
/// Bytes of the widest access.
const ACCESS: u64 = 16;
/// Warps of a task; also the most that share a row held whole.
const WARPS: u64 = 4;
const MOST_WARPS: u64 = 16;
/// Steps of a stream along which arrays are not contiguous.
const STEPS: u64 = 8;

/// What the rule asks of a kernel.
pub(super) struct Facts<'a> {
    plan: &'a Plan,
    kernel: &'a Kernel,
    sizes: Option<&'a [u64]>,
    /// Axes along which arrays are contiguous: the dimensions of the largest such array, bytes of its elements.
    pub(super) contiguous: BTreeMap<AxisId, (usize, u64)>,
    /// Bytes per element of a row of all arrays that several operations read, by the axis they are contiguous in.
    held: BTreeMap<AxisId, u64>,
    /// Bytes per element of a row of all arrays that are first read after a reduction, by extent.
    late: Vec<(Size, u64)>,
    /// Values that streams carry from step to step, of each element along an axis.
    carried: BTreeMap<AxisId, u64>,
    /// Axes that scans run along.
    scanned: Vec<AxisId>,
    /// Axes of sequential streams, which take one step at a time.
    pub(super) stepped: Vec<AxisId>,
    /// Axes of streams and of operations that range over a whole inner axis.
    walked: Vec<AxisId>,
}

impl<'a> Facts<'a> {
    pub(super) fn new(plan: &'a Plan, kernel: &'a Kernel, sizes: Option<&'a [u64]>) -> Facts<'a> {
        let mut f = Facts {
            plan,
            kernel,
            sizes,
            contiguous: BTreeMap::new(),
            held: BTreeMap::new(),
            late: Vec::new(),
            carried: BTreeMap::new(),
            scanned: Vec::new(),
            stepped: Vec::new(),
            walked: Vec::new(),
        };
        for node in &kernel.body {
            if let Node::Stream(s) = node {
                let list = if s.sequential { &mut f.stepped } else { &mut f.walked };
                list.push(s.axis);
            }
        }
        for (id, a) in kernel.axes.iter() {
            if a.kind == AxisKind::Inner && a.block.is_none() && f.extent(id).is_none_or(|n| n > STEPS) {
                f.walked.push(id);
            }
        }
        f.walked.sort();
        f.walked.dedup();
        let (mut before, mut inside) = (BTreeSet::new(), BTreeSet::new());
        kernel.for_each_op(&mut |op, around| {
            if around.is_empty() { &mut before } else { &mut inside }.extend(op.outs().iter().copied());
            match op {
                Op::Load { buffer, at, .. } | Op::Store { buffer, at, .. } => f.access(*buffer, at),
                Op::Scan { along, .. } => f.scanned.push(*along),
                Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } => {}
            }
            for root in op.roots() {
                kernel.walk(root, &mut |_, e| {
                    if let Expr::Read { buffer, at } = e {
                        f.access(*buffer, at);
                    }
                });
            }
        });
        for t in before.intersection(&inside) {
            kernel.tiles[*t].axes.iter().for_each(|a| *f.carried.entry(*a).or_insert(0) += 1);
        }
        f.hold();
        f
    }

    /// Notes what several operations read, and what is read only after a reduction.
    fn hold(&mut self) {
        let mut readers: BTreeMap<(Size, BufferId), (AxisId, usize)> = BTreeMap::new();
        let (mut reduced, mut late) = (false, Vec::new());
        self.kernel.for_each_op(&mut |op, _| {
            let mut read = Vec::new();
            for root in op.roots() {
                self.kernel.walk(root, &mut |_, e| {
                    if let Expr::Read { buffer, at } = e
                        && let Some(axis) = at.last().and_then(|last| self.steps_along(*last))
                    {
                        read.push((*buffer, axis));
                    }
                });
            }
            read.sort();
            read.dedup();
            for (buffer, axis) in read {
                let extent = self.kernel.axes[axis].extent.clone();
                let key = (extent, buffer);
                if reduced && !readers.contains_key(&key) {
                    late.push((key.0.clone(), self.bytes(buffer)));
                }
                readers.entry(key).or_insert((axis, 0)).1 += 1;
            }
            reduced |= matches!(op, Op::Reduce { .. });
        });
        self.late = late;
        for ((_, buffer), (axis, n)) in readers {
            if n > 1 {
                *self.held.entry(axis).or_insert(0) += self.bytes(buffer);
            }
        }
    }

    /// Bytes of an array's element.
    fn bytes(&self, buffer: BufferId) -> u64 {
        self.plan.buffers[buffer].dtype.bytes(1).max(1)
    }

    fn access(&mut self, buffer: BufferId, at: &[ExprId]) {
        let Some(axis) = at.last().and_then(|last| self.steps_along(*last)) else { return };
        let b = &self.plan.buffers[buffer];
        let mut axes = Vec::new();
        for x in at {
            self.kernel.walk(*x, &mut |_, e| {
                if let Expr::Coord(a) = e {
                    axes.push(*a);
                }
            });
        }
        axes.sort();
        axes.dedup();
        let new = (axes.len(), b.dtype.bytes(1).max(1));
        let entry = self.contiguous.entry(axis).or_insert(new);
        *entry = match new.0.cmp(&entry.0) {
            std::cmp::Ordering::Greater => new,
            std::cmp::Ordering::Equal => (new.0, new.1.min(entry.1)),
            std::cmp::Ordering::Less => *entry,
        };
    }

    /// The axis in which a position goes up by one.
    fn steps_along(&self, e: ExprId) -> Option<AxisId> {
        match &self.kernel.exprs[e] {
            Expr::Coord(a) => Some(*a),
            Expr::Binary(einfall_ir::ops::BinaryOp::Add, a, b) => self.steps_along(*a).xor(self.steps_along(*b)),
            Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Tile(_)
            | Expr::TileAt { .. }
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => None,
        }
    }

    /// An axis's extent, where the plan or the sizes fix it.
    pub(super) fn extent(&self, a: AxisId) -> Option<u64> {
        let size: &Size = &self.kernel.axes[a].extent;
        let mut known = true;
        let mut values = vec![0; self.plan.ranks.len()];
        size.for_each_rank(&mut |r| {
            let given = self.sizes.and_then(|s| s.get(r.index()).copied());
            match self.plan.ranks[r].fixed.or(given) {
                Some(n) => values[r.index()] = n,
                None => known = false,
            }
        });
        if known { size.eval(&values).ok() } else { None }
    }

    /// The innermost grid axis but `lead`.
    fn rows(&self, lead: AxisId) -> Option<AxisId> {
        self.kernel.axes.iter().filter(|(id, a)| a.kind == AxisKind::Grid && *id != lead).map(|(id, _)| id).next_back()
    }
}

/// How much of a device's memory its threads keep under way.
struct Memory<'a> {
    gpu: &'a Gpu,
    /// Bytes under way per multiprocessor that take all of the bandwidth.
    under_way: f64,
}

impl<'a> Memory<'a> {
    fn of(sheet: &'a DataSheet) -> Option<Memory<'a>> {
        let (gpu, dram) = (sheet.gpu.as_ref()?, sheet.levels.first()?);
        let under_way = dram.bandwidth * gpu.memory_latency as f64 / gpu.clock / gpu.multiprocessors as f64;
        Some(Memory { gpu, under_way })
    }

    /// Whether threads of so many registers, each holding so many bytes of a row, are enough for rows that are held
    /// `times` as long as they are loaded.
    fn enough(&self, registers: u64, bytes: u64, times: f64) -> bool {
        let threads = (self.gpu.registers / registers).min(self.gpu.threads_per_multiprocessor);
        (threads * bytes) as f64 >= times * self.under_way
    }
}

/// Bytes of a row that one thread holds on this device.
pub fn bytes_per_thread(sheet: &DataSheet) -> u64 {
    let Some(memory) = Memory::of(sheet) else { return 4 * ACCESS };
    let enough = |bytes: &u64| memory.enough(WORKING + bytes / 4 + bytes / 8, *bytes, RESIDENT);
    [ACCESS, 2 * ACCESS, 4 * ACCESS, 8 * ACCESS].into_iter().find(enough).unwrap_or(8 * ACCESS)
}

/// The mapping of a kernel without contractions that takes any extent.
pub fn choose(kernel: &Kernel, plan: &Plan, sheet: &DataSheet) -> KernelMapping {
    let all = variants(kernel, plan, sheet, None);
    all.into_iter().last().unwrap_or_else(|| KernelMapping { kernel: kernel.name.clone(), ..KernelMapping::default() })
}

/// The mappings of a kernel without contractions, in the order a launch tries them: rows held whole in registers, for
/// the sizes given or for classes of extents, then rows walked block after block.
pub fn variants(kernel: &Kernel, plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>) -> Vec<KernelMapping> {
    let f = Facts::new(plan, kernel, sizes);
    let bytes = bytes_per_thread(sheet);
    let lead = f.contiguous.iter().max_by_key(|(a, (dims, _))| (*dims, std::cmp::Reverse(**a))).map(|(a, x)| (*a, x.1));
    let Some((lead, elem)) = lead else {
        return vec![scalars(&f)];
    };
    let width = (ACCESS / elem).max(1);
    let mut out = Vec::new();
    if f.walked.contains(&lead) {
        // Elements that one warp holds, at the chosen bytes per thread.
        let warp = WARP * (bytes / elem).max(width);
        let threads = sheet.gpu.as_ref().map_or(u64::MAX, |g| g.threads_per_task);
        let most = 1 << (threads / WARP).clamp(1, MOST_WARPS).ilog2();
        let classes: Vec<(u64, u64)> = match f.extent(lead) {
            Some(n) if n <= WARP * width / 2 => vec![(n.next_power_of_two().max(width), 1)],
            Some(n) => {
                let warps = n.div_ceil(warp).next_power_of_two();
                // Where a task takes fewer threads, each holds more.
                let warps = if warps <= MOST_WARPS { warps.min(most) } else { warps };
                vec![(n.next_multiple_of(WARP * width * warps), warps)]
            }
            None => vec![(warp, 1), (WARPS * warp, WARPS), (MOST_WARPS * warp, MOST_WARPS / 2)],
        };
        let scanned = f.scanned.contains(&lead);
        for (block, warps) in classes {
            // A scan keeps a row in one warp; more than twice the bytes per thread would spill.
            let fits = warps <= most && block <= 2 * warp * warps;
            if fits && (!scanned || warps == 1) {
                let mut m = whole(&f, lead, block, warps, WARP * width);
                if sheet.webgpu.is_some() {
                    exact(&f, &mut m);
                }
                out.push(m);
            }
        }
    }
    out.push(walked(&f, lead, width, bytes / ACCESS, sheet));
    for m in &mut out {
        bound(&f, (lead, elem), bytes, sheet, m);
    }
    out
}

/// Bounds the registers of an entry's only role by what its threads hold, and decides which loads are early.
fn bound(f: &Facts<'_>, (lead, elem): (AxisId, u64), bytes: u64, sheet: &DataSheet, m: &mut KernelMapping) {
    let units = m.axes.iter().map(|a| a.units).max().unwrap_or(1);
    let Some(row) = m.axis(&f.kernel.axes[lead].name) else { return };
    let elems = row.block / row.units / WARP;
    let held = f.held.get(&lead).copied().unwrap_or(0).max(elem);
    if elems * elem > bytes {
        // Few such rows fit in any case.
        return;
    }
    let extent = &f.kernel.axes[lead].extent;
    let late: u64 = f.late.iter().filter(|(n, _)| n == extent).map(|(_, bytes)| bytes).sum();
    // What is held is packed; f32 on the way comes and goes before the early loads are used.
    let early = WORKING + elems * (held + late) / 4;
    let carried = f.carried.get(&lead).copied().unwrap_or(0);
    let more = if row.whole { 0 } else { WALKING.max(elems * carried) };
    let registers = WORKING + more + elems * held / 4 + elems * elem / 8;
    let gains = row.whole && late > 0;
    m.early = gains && Memory::of(sheet).is_some_and(|memory| memory.enough(early, elems * elem, EARLY));
    let most = sheet.gpu.as_ref().map_or(255, |g| g.thread_registers) / 8 * 8;
    let regs = Some(if m.early { registers.max(early) } else { registers }.next_multiple_of(8).min(most));
    m.roles = vec![RoleMapping { role: "main".into(), scope: Scope::Warp, units, regs, ping_pong: false }];
}

/// An entry's axes: those given, everything else one coordinate at a time or, walked, a few.
fn entry(f: &Facts<'_>, mut axes: Vec<AxisMapping>) -> KernelMapping {
    for (id, a) in f.kernel.axes.iter() {
        let known = axes.iter().any(|x| x.axis == a.name) || f.stepped.contains(&id);
        let small = a.kind == AxisKind::Inner && f.extent(id).is_some_and(|n| n <= STEPS);
        if known || small || a.block.is_some() {
            continue;
        }
        let block = if f.walked.contains(&id) { STEPS } else { 1 };
        axes.push(AxisMapping::new(&a.name, block));
    }
    axes.sort_by_key(|x| f.kernel.axes.iter().position(|(_, a)| a.name == x.axis));
    KernelMapping { kernel: f.kernel.name.clone(), axes, ..KernelMapping::default() }
}

/// Rows over the warps of a task, so many each.
fn rows_per_warp(f: &Facts<'_>, lead: AxisId, each: u64, axes: &mut Vec<AxisMapping>) {
    if let Some(rows) = f.rows(lead) {
        axes.push(AxisMapping { units: WARPS, ..AxisMapping::new(&f.kernel.axes[rows].name, WARPS * each) });
    }
}

/// Rows along `lead` held whole, each by `warps` warps; `reach` elements are one access of a warp.
fn whole(f: &Facts<'_>, lead: AxisId, block: u64, warps: u64, reach: u64) -> KernelMapping {
    let held = AxisMapping { units: warps, whole: true, ..AxisMapping::new(&f.kernel.axes[lead].name, block) };
    let mut axes = vec![held];
    if warps == 1 {
        rows_per_warp(f, lead, (reach / block).max(1), &mut axes);
    }
    // Other loops over the same extent are this one, written again.
    let mut m = entry(f, axes);
    let extent = &f.kernel.axes[lead].extent;
    m.axes.retain(|x| {
        let other = f.kernel.axes.iter().find(|(_, a)| a.name == x.axis);
        other.is_none_or(|(id, a)| id == lead || a.kind == AxisKind::Grid || a.extent != *extent)
    });
    for (id, a) in f.kernel.axes.iter() {
        let again = id != lead && a.extent == *extent && f.walked.contains(&id);
        if again && a.kind == AxisKind::Stream {
            m.axes.push(AxisMapping { units: warps, whole: true, ..AxisMapping::new(&a.name, block) });
        }
    }
    m
}

/// Blocks that divide their extents say so, if all along which a row is held do: nothing of them is masked. Without hardware
/// for tails, masks are a good part of what is computed for an element.
fn exact(f: &Facts<'_>, m: &mut KernelMapping) {
    let known = |name: &str| f.kernel.axes.iter().find(|(_, a)| a.name == name).and_then(|(id, _)| f.extent(id));
    let even = |a: &AxisMapping| known(&a.axis).is_some_and(|n| n.is_multiple_of(a.block));
    if m.axes.iter().filter(|a| a.whole).all(even) {
        m.axes.iter_mut().for_each(|a| a.exact = a.block > 1 && (a.whole || a.units > 1) && even(a));
    }
}

/// Blocks for any extent: `loads` accesses of each thread in flight.
fn walked(f: &Facts<'_>, lead: AxisId, width: u64, loads: u64, sheet: &DataSheet) -> KernelMapping {
    let row = WARP * width;
    let name = &f.kernel.axes[lead].name;
    let mut axes = Vec::new();
    if f.walked.contains(&lead) {
        let alone = f.scanned.contains(&lead);
        let units = if alone { 1 } else { WARPS };
        let block = row * loads * units;
        axes.push(AxisMapping { units, ..AxisMapping::new(name, block) });
        if alone {
            rows_per_warp(f, lead, 1, &mut axes);
        }
        for id in &f.walked {
            let a = &f.kernel.axes[*id];
            if *id != lead && f.contiguous.contains_key(id) && (a.extent == f.kernel.axes[lead].extent) {
                axes.push(AxisMapping { units, ..AxisMapping::new(&a.name, block) });
            }
        }
    } else {
        // Columns over lanes: what is walked is a row after the other, several in flight, as far as the registers of a few
        // tasks hold what is carried of every column.
        let share = |g: &Gpu| g.thread_registers.min(g.registers / (RESIDENT as u64 * WARPS * WARP));
        let most = sheet.gpu.as_ref().map_or(255, share).saturating_sub(WORKING + WALKING);
        let carried = f.carried.get(&lead).copied().unwrap_or(0);
        let fits = |n: u64| n * carried <= most;
        // Through WebGPU twice as many, as far as a row goes (docs/tuning-log.md, section 11: a copy).
        let task = WARPS * WARP * width;
        let several = |n: u64| if f.extent(lead).is_some_and(|x| x >= n * task) { n } else { 2 };
        let loads = loads.min(if sheet.webgpu.is_some() { several(4) } else { 2 });
        let rows = if f.walked.is_empty() && fits(width * loads) { loads } else { 1 };
        let whole = width;
        let halves = |n: &u64| Some(n / 2).filter(|n| *n > 0);
        let width = std::iter::successors(Some(whole), halves).find(|n| fits(n * rows)).unwrap_or(1);
        let register = if width < whole { width } else { 0 };
        let row = WARP * width;
        let extent = f.extent(lead).unwrap_or(0);
        if extent >= WARPS * row || f.rows(lead).is_none() {
            axes.push(AxisMapping { units: WARPS, register, ..AxisMapping::new(name, WARPS * row * rows) });
        } else {
            // Rows that may be short: one per warp, or several.
            let block = if extent == 0 { row * rows } else { extent.next_power_of_two().clamp(width, row * rows) };
            axes.push(AxisMapping { register, ..AxisMapping::new(name, block) });
            rows_per_warp(f, lead, (row / block).max(1), &mut axes);
        }
    }
    entry(f, axes)
}

/// No array is contiguous along an axis: threads over the innermost grid axis, or one task.
fn scalars(f: &Facts<'_>) -> KernelMapping {
    let grid = f.kernel.axes.iter().filter(|(_, a)| a.kind == AxisKind::Grid).map(|(_, a)| a).next_back();
    let axes = grid.map(|a| AxisMapping { units: WARPS, ..AxisMapping::new(&a.name, WARPS * WARP) });
    entry(f, axes.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_h200_holds_64_bytes_per_thread() {
        let sheet = DataSheet::named("h200").unwrap();
        assert_eq!(bytes_per_thread(&sheet), 64);
        let text = "plan norm[M, K] {
    input x: bf16[M, K]
    output y: bf16[M, K]

    kernel norm_0 {
        grid m in M
        stream k in K
        inner k_2 in K
        tile r: f32[m]
        r = 0.0
        for k {
            r = carry reduce sum(k) x[m, k]
        }
        store y[m, k_2] = x[m, k_2] / r over m, k_2
    }
}
";
        let plan = einfall_ir::tile::parse::parse(text).unwrap();
        let all = variants(&plan.kernels[0], &plan, &sheet, Some(&[16384, 4096]));
        let lines =
            |m: &KernelMapping| m.axes.iter().map(|a| (a.axis.clone(), a.block, a.units, a.whole)).collect::<Vec<_>>();
        assert_eq!(all.len(), 2);
        assert_eq!(lines(&all[0]), [("m".into(), 1, 1, false), ("k".into(), 4096, 4, true)]);
        assert_eq!(
            lines(&all[1]),
            [("m".into(), 1, 1, false), ("k".into(), 4096, 4, false), ("k_2".into(), 4096, 4, false)]
        );
        // Without sizes: rows of one warp, four warps, eight warps, any.
        let blocks: Vec<_> =
            variants(&plan.kernels[0], &plan, &sheet, None).iter().map(|m| m.axis("k").map(|a| a.block)).collect();
        assert_eq!(blocks, [Some(1024), Some(4096), Some(16384), Some(4096)]);
        assert_eq!(choose(&plan.kernels[0], &plan, &sheet), all[1]);
    }
}
