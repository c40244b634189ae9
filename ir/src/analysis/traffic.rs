//! Bytes that one mapped kernel moves into and out of every memory level, and the operations it does.
//!
//! A kernel under a mapping is a nest of loops: grid blocks (those that run at the same time innermost, because they
//! advance through their streams together), streams, and the loops of an operation over its blocks. An access moves
//! its footprint once per trip of the loops around it, except those innermost ones it does not depend on: there the
//! data is still in place (the tail of notes on tile choice: Σ F_A·Π⌈N_r/T_r⌉ over loops outside the tail). A *cache*
//! holds the largest part of the nest whose footprint is at most its capacity; below that part nothing is moved
//! again. A *managed* level (a GPU's shared memory, then registers) moves what the operations say: loads once per
//! task and step, multicast copies once per cluster at their source, operands of an atom once per instruction that
//! reads them. Sources: IOOpt (Olivry et al. 2021) for tails, Mattson's stack distances (1970) for caches under LRU.
//!
//! Invariants: a function of plan, mapping, extents and data sheet alone; never less than a level of unbounded
//! capacity would move. Each kernel starts with cold caches. Ragged last blocks count what they hold, not a whole block.

mod access;
mod cache;
mod filter;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use access::{Build, Place, Touch};
use cache::Nest;

use crate::arena::Id;
use crate::dtype::DType;
use crate::kernel::atoms;
use crate::mapping::{KernelMapping, Mapping, RoleMapping, Source};
use crate::target::{DataSheet, Gpu, TASK_SHARED_BYTES};
use crate::tile::{AxisId, AxisKind, Expr, ExprId, Kernel, Node, Op, Plan, Space, TileId};

/// Evaluations of a filter over blocks, at most; more blocks than that are sampled evenly.
const SAMPLES: u64 = 1 << 14;

/// What crosses the boundary between one memory level and the slower one before it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LevelTraffic {
    /// The faster level's name.
    pub level: String,
    /// Bytes that arrive in its instances together.
    pub read_bytes: f64,
    /// Bytes that leave them.
    pub write_bytes: f64,
    /// Bytes the slower level hands out: `read_bytes`, where a multicast copy counts once for its cluster.
    pub supplied_bytes: f64,
}

impl LevelTraffic {
    /// Bytes that enter or leave the level.
    pub fn bytes(&self) -> f64 {
        self.read_bytes + self.write_bytes
    }
}

/// What a kernel or a plan moves and computes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Traffic {
    /// One entry per level of the data sheet but the first, slowest first.
    pub levels: Vec<LevelTraffic>,
    /// Operations of contractions (two per multiply-add) by the type of their operands.
    pub contractions: Vec<(DType, f64)>,
    /// Scalar operations outside contractions.
    pub scalar_ops: f64,
    /// Tasks launched.
    pub tasks: f64,
}

impl Traffic {
    /// The entry of a level.
    pub fn level(&self, name: &str) -> Option<&LevelTraffic> {
        self.levels.iter().find(|l| l.level == name)
    }

    /// Seconds of each resource, had it nothing else to wait for: memory levels by name (the slower level's
    /// bandwidth), then `contract` and `scalar`. A type without a peak of its own computes at f32's.
    pub fn seconds(&self, sheet: &DataSheet) -> Vec<(String, f64)> {
        let mut out = Vec::new();
        for (l, above) in self.levels.iter().zip(&sheet.levels) {
            let rate = above.bandwidth * above.instances as f64;
            out.push((l.level.clone(), (l.supplied_bytes + l.write_bytes) / rate));
        }
        let f32_peak = sheet.peak_of(DType::F32);
        let rate = |d: DType| sheet.peak_of(d).or(f32_peak);
        let contract = self.contractions.iter().filter_map(|(d, n)| Some(n / rate(*d)?)).sum();
        out.push(("contract".into(), contract));
        out.push(("scalar".into(), f32_peak.map_or(0.0, |p| self.scalar_ops / p)));
        out
    }

    /// The roofline time in microseconds: that of the resource needed longest.
    pub fn roofline_us(&self, sheet: &DataSheet) -> f64 {
        self.seconds(sheet).into_iter().map(|(_, s)| s).fold(0.0, f64::max) * 1e6
    }

    fn add(&mut self, other: &Traffic) {
        if self.levels.is_empty() {
            self.levels.clone_from(&other.levels);
        } else {
            for (a, b) in self.levels.iter_mut().zip(&other.levels) {
                a.read_bytes += b.read_bytes;
                a.write_bytes += b.write_bytes;
                a.supplied_bytes += b.supplied_bytes;
            }
        }
        for (d, n) in &other.contractions {
            count(&mut self.contractions, *d, *n);
        }
        self.scalar_ops += other.scalar_ops;
        self.tasks += other.tasks;
    }
}

fn count(all: &mut Vec<(DType, f64)>, d: DType, n: f64) {
    match all.iter_mut().find(|(x, _)| *x == d) {
        Some((_, m)) => *m += n,
        None => all.push((d, n)),
    }
}

/// The kernels of a plan together; `extents` by rank. None if an extent does not evaluate.
pub fn plan_traffic(plan: &Plan, mapping: &Mapping, extents: &[u64], sheet: &DataSheet) -> Option<Traffic> {
    let mut out = Traffic::default();
    for k in &plan.kernels {
        out.add(&kernel_traffic(plan, k, &entry(k, mapping, extents)?, extents, sheet)?);
    }
    Some(out)
}

/// The entry of a mapping that a kernel is launched by at these extents: the first whose `whole` blocks hold them, else
/// the last. None if an extent does not evaluate.
fn entry(k: &Kernel, mapping: &Mapping, extents: &[u64]) -> Option<KernelMapping> {
    let mut last = None;
    for m in mapping.kernels.iter().filter(|m| m.kernel == k.name) {
        let mut holds = true;
        for (_, a) in k.axes.iter() {
            let n = a.extent.eval(extents).ok()?;
            holds &= m.axis(&a.name).is_none_or(|x| !x.whole || n <= x.block);
        }
        if holds {
            return Some(m.clone());
        }
        last = Some(m);
    }
    Some(last.cloned().unwrap_or_default())
}

/// The roofline times of a plan's kernels, one after another, in microseconds. None if an extent does not evaluate.
pub fn roofline_us(plan: &Plan, mapping: &Mapping, extents: &[u64], sheet: &DataSheet) -> Option<f64> {
    let us =
        |k: &Kernel| Some(kernel_traffic(plan, k, &entry(k, mapping, extents)?, extents, sheet)?.roofline_us(sheet));
    plan.kernels.iter().map(us).sum()
}

/// What `kernel` of `plan` moves under `mapping` on `sheet`, for these extents of the plan's ranks. An axis without a
/// block is one block (a grid axis: one coordinate). None if an extent does not evaluate.
pub fn kernel_traffic(
    plan: &Plan,
    kernel: &Kernel,
    mapping: &KernelMapping,
    extents: &[u64],
    sheet: &DataSheet,
) -> Option<Traffic> {
    let model = Model::of(plan, kernel, mapping, extents, sheet)?;
    let mut out = Traffic { tasks: model.tasks(), ..Traffic::default() };
    let managed = sheet.levels.iter().position(|l| l.name == "shared");
    for (n, level) in sheet.levels.iter().enumerate().skip(1) {
        let workers = sheet.levels.iter().map(|l| l.instances).max().unwrap_or(1);
        let mut t = match managed {
            Some(m) if n == m => model.task_level(),
            Some(m) if n > m => model.register_level(level.bytes),
            Some(_) | None => model.cache(level.bytes, (workers / level.instances.max(1)).max(1), managed.is_none()),
        };
        t.level.clone_from(&level.name);
        out.levels.push(t);
    }
    for x in &model.ops {
        let points = x.points(&model);
        if let Op::Contract { a, .. } = x.op {
            count(&mut out.contractions, kernel.tiles[*a].dtype, 2.0 * points);
        }
        out.scalar_ops += points * x.scalar_ops as f64;
    }
    Some(out)
}

/// Bytes that a profiler counts between the slowest memory and the cache before the multiprocessors' own while `kernel`
/// runs: (read, written). Unlike [`kernel_traffic`], which asks what must move through an ideal cache, this is of one in
/// two halves that loses data before it is full, and does not write back what it holds at the end. None as there, and
/// for what is no GPU.
pub fn counted_bytes(
    plan: &Plan,
    kernel: &Kernel,
    mapping: &KernelMapping,
    extents: &[u64],
    sheet: &DataSheet,
) -> Option<(f64, f64)> {
    let model = Model::of(plan, kernel, mapping, extents, sheet)?;
    let (level, gpu) = (sheet.levels.get(1).filter(|l| l.name != "shared")?, sheet.gpu.as_ref()?);
    let (mut nest, together) = model.nest(gpu.multiprocessors * model.resident(gpu), false);
    // Of tasks that run at the same time, some walk a step that others leave out.
    let inner = &nest.global[nest.global.len() - together..];
    let wide = |a: AxisId| inner.iter().filter(|l| l.axis == a).map(|l| l.over).fold(model.block(a), f64::max);
    let sizes = |s: &crate::cascade::Size| s.eval(extents).ok().map(|n| n as f64);
    let mut streams = Vec::new();
    all_streams(&kernel.body, &mut streams);
    nest.kept = streams.into_iter().map(|s| filter::kept(&model, s, &sizes, &wide)).collect();
    Some(nest.counted(level.bytes as f64, together))
}

/// The streams among nodes, in text order.
fn all_streams<'a>(nodes: &'a [Node], out: &mut Vec<&'a crate::tile::Stream>) {
    for n in nodes {
        if let Node::Stream(s) = n {
            out.push(s);
            all_streams(&s.body, out);
        }
    }
}

/// One loop: a trip covers `inside` coordinates of the axis, all trips `over`.
#[derive(Clone, Debug)]
struct Loop {
    axis: AxisId,
    inside: f64,
    over: f64,
    /// The stream it walks.
    stream: Option<usize>,
}

impl Loop {
    fn count(&self) -> f64 {
        (self.over / self.inside).ceil().max(1.0)
    }

    /// Trips of an access along the axis: a ragged last one counts as the part it is.
    fn share(&self) -> f64 {
        (self.over / self.inside).max(1.0)
    }
}

/// An operation with the loops of its own.
struct Work<'a> {
    op: &'a Op,
    name: String,
    streams: Vec<usize>,
    domain: Vec<AxisId>,
    /// Over the blocks of its domain, outermost first.
    loops: Vec<Loop>,
    touches: Vec<Touch>,
    scalar_ops: usize,
}

impl Work<'_> {
    /// Points it is done at, over the whole launch.
    fn points(&self, m: &Model<'_>) -> f64 {
        let own: f64 = self.domain.iter().map(|a| m.block(*a)).product();
        own * m.executions(&self.streams, &self.domain)
    }
}

struct Model<'a> {
    kernel: &'a Kernel,
    mapping: &'a KernelMapping,
    extent: Vec<f64>,
    block: Vec<f64>,
    /// Grid axes, slowest first, in blocks.
    grid: Vec<Loop>,
    streams: Vec<Loop>,
    /// The share of its steps that a stream's filter leaves.
    kept: Vec<f64>,
    ops: Vec<Work<'a>>,
    parts: f64,
}

/// Calls `f` on `root` and all under it.
fn walk(k: &Kernel, root: ExprId, f: &mut impl FnMut(&Expr)) {
    k.walk(root, &mut |_, e| f(e));
}

impl<'a> Model<'a> {
    fn of(
        plan: &'a Plan,
        kernel: &'a Kernel,
        mapping: &'a KernelMapping,
        extents: &[u64],
        sheet: &DataSheet,
    ) -> Option<Model<'a>> {
        let mut extent = Vec::new();
        let mut block = Vec::new();
        let mut sequential = vec![false; kernel.axes.len()];
        mark_sequential(&kernel.body, &mut sequential);
        for (id, a) in kernel.axes.iter() {
            let n = a.extent.eval(extents).ok()? as f64;
            let mapped = mapping.axis(&a.name).map(|m| m.block).or(a.block).map(|b| b as f64);
            let b = match a.kind {
                _ if sequential[id.index()] => 1.0,
                AxisKind::Grid => mapped.unwrap_or(1.0),
                AxisKind::Stream => mapped.unwrap_or(n),
                AxisKind::Inner => n,
            };
            extent.push(n.max(0.0));
            block.push(b.min(n).max(1.0));
        }
        let mut model = Model {
            kernel,
            mapping,
            extent,
            block,
            grid: Vec::new(),
            streams: Vec::new(),
            kept: Vec::new(),
            ops: Vec::new(),
            parts: 1.0,
        };
        model.order_grid();
        let sizes = |s: &crate::cascade::Size| s.eval(extents).ok().map(|n| n as f64);
        let mut build =
            Build { plan, names: kernel.op_names(plan).into_iter(), sizes: &sizes, direct: BTreeMap::new() };
        build.direct_tiles(kernel, mapping, sheet);
        build.nodes(&kernel.body, &mut Vec::new(), &mut model)?;
        for n in 0..model.ops.len() {
            model.ops[n].loops = model.own_loops(n, sheet);
        }
        if let Some(s) = &mapping.split {
            model.parts = s.parts as f64;
        }
        Some(model)
    }

    fn block(&self, a: AxisId) -> f64 {
        self.block[a.index()]
    }

    fn order_grid(&mut self) {
        let ids: Vec<AxisId> = self.kernel.axes.iter().filter(|(_, a)| a.kind == AxisKind::Grid).map(|x| x.0).collect();
        let named = |n: &String| ids.iter().copied().find(|a| self.kernel.axes[*a].name == *n);
        let mut order: Vec<AxisId> = self.mapping.work.order.iter().filter_map(named).collect();
        order.extend(ids.iter().filter(|a| !order.contains(a)).copied().collect::<Vec<_>>());
        let grid =
            |a: &AxisId| Loop { axis: *a, inside: self.block[a.index()], over: self.extent[a.index()], stream: None };
        let mut loops: Vec<Loop> = order.iter().map(grid).collect();
        let group = self.mapping.work.group.max(1) as f64;
        if group > 1.0 && loops.len() >= 2 {
            // Blocks of the second-fastest axis are walked together inside the fastest.
            let second = &mut loops[order.len() - 2];
            let wide = (second.inside * group).min(second.over.max(second.inside));
            let inner = Loop { over: wide, ..second.clone() };
            second.inside = wide;
            loops.push(inner);
        }
        self.grid = loops;
    }

    /// Grid loops with `concurrent` blocks innermost: (those outside, those that run at the same time).
    fn waves(&self, concurrent: u64) -> (Vec<Loop>, Vec<Loop>) {
        let mut left = concurrent as f64;
        let (mut outer, mut inner) = (Vec::new(), Vec::new());
        for l in self.grid.iter().rev() {
            let here = l.count().min(left).max(1.0);
            left = (left / here).floor().max(1.0);
            let wide = (l.inside * here).min(l.over.max(l.inside));
            if here > 1.0 {
                inner.push(Loop { over: wide, ..l.clone() });
            }
            if here < l.count() {
                outer.push(Loop { inside: wide, ..l.clone() });
            }
        }
        outer.reverse();
        inner.reverse();
        (outer, inner)
    }

    /// Tasks on one multiprocessor at once, by what the mapping gives them; one where they are persistent.
    fn resident(&self, gpu: &Gpu) -> u64 {
        let m = self.mapping;
        if m.work.persistent {
            return 1;
        }
        let threads = |r: &RoleMapping| r.units * r.scope.threads();
        let all: u64 = m.roles.iter().map(threads).sum();
        let registers: u64 = m.roles.iter().map(|r| threads(r) * r.regs.unwrap_or(gpu.thread_registers)).sum();
        let shared = |(id, t): (TileId, &crate::tile::Tile)| {
            let of = self.mapping.tile(&t.name).filter(|x| x.space == Space::Shared && x.reuses.is_none());
            let elems: f64 = self.kernel.tiles[id].axes.iter().map(|a| self.block(*a)).product();
            of.map_or(0.0, |x| x.stages.max(1) as f64 * elems * bytes_of(t.dtype))
        };
        let shared = self.kernel.tiles.iter().map(shared).sum::<f64>() as u64 + TASK_SHARED_BYTES;
        let fit = |have: u64, each: u64| have / each.max(1);
        let resident = fit(gpu.registers, registers).min(fit(gpu.shared_per_multiprocessor, shared));
        resident.min(fit(gpu.threads_per_multiprocessor, all)).clamp(1, 32)
    }

    fn tasks(&self) -> f64 {
        self.parts * self.grid.iter().map(Loop::count).product::<f64>()
    }

    /// How often an operation runs on blocks of `domain`, counting ragged blocks by what they hold.
    fn executions(&self, streams: &[usize], domain: &[AxisId]) -> f64 {
        let of = |l: &Loop| if domain.contains(&l.axis) { l.share() } else { l.count() };
        let steps: f64 = streams.iter().map(|s| of(&self.streams[*s]) * self.kept[*s]).product();
        // Outside its stream every part of a split does the whole of an operation.
        let split = self.mapping.split.as_ref().map(|s| &s.axis);
        let whole = streams.iter().all(|s| Some(&self.kernel.axes[self.streams[*s].axis].name) != split);
        let parts = if whole { self.parts } else { 1.0 };
        parts * steps * self.grid.iter().map(of).product::<f64>()
    }

    /// Loops of an operation over its blocks: instruction tiles of a contraction, single points of anything else.
    fn own_loops(&self, n: usize, sheet: &DataSheet) -> Vec<Loop> {
        let w = &self.ops[n];
        let over = |a: AxisId, inside: f64| {
            let over = self.block(a);
            Loop { axis: a, inside: inside.min(over), over, stream: None }
        };
        let Op::Contract { .. } = w.op else { return w.domain.iter().map(|a| over(*a, 1.0)).collect() };
        let Some(c) = self.contraction(w, sheet.levels.last().map_or(0, |l| l.bytes)) else { return Vec::new() };
        let mut loops: Vec<Loop> = c.batch.iter().map(|a| over(*a, 1.0)).collect();
        let last = |axes: &[AxisId], a: AxisId, size: f64| if axes.last() == Some(&a) { size } else { 1.0 };
        loops.extend(c.cols.iter().map(|a| over(*a, last(&c.cols, *a, c.tile.1))));
        loops.extend(c.rows.iter().map(|a| over(*a, last(&c.rows, *a, c.tile.0))));
        loops.extend(c.over.iter().map(|a| over(*a, 1.0)));
        loops
    }

    /// The shape of a contraction and its instruction or register tile (rows, columns).
    fn contraction(&self, w: &Work<'_>, register_bytes: u64) -> Option<Contraction> {
        let Op::Contract { out, a, b, over, .. } = w.op else { return None };
        let axes = |t: TileId| &self.kernel.tiles[t].axes;
        let (out, a, b) = (axes(*out), axes(*a), axes(*b));
        let pick = |f: &dyn Fn(&AxisId) -> bool| out.iter().copied().filter(|x| f(x)).collect::<Vec<_>>();
        let rows = pick(&|x| a.contains(x) && !b.contains(x));
        let cols = pick(&|x| b.contains(x) && !a.contains(x));
        let batch = pick(&|x| a.contains(x) == b.contains(x));
        let op = self.mapping.op(&w.name);
        let atom = op.and_then(|o| o.atom.as_ref()).and_then(|n| atoms::all().find(|x| x.name.0 == *n));
        // Without an instruction or a register tile in the mapping: the largest square of f32 that registers hold.
        let square = (register_bytes as f64 / 4.0).sqrt().floor().max(1.0);
        let register = |axes: &[AxisId]| {
            let named = axes.last().and_then(|x| self.mapping.axis(&self.kernel.axes[*x].name));
            named.filter(|m| m.register > 0).map_or(square, |m| m.register as f64)
        };
        let tile = match atom {
            Some(x) if op.is_some_and(|o| o.swapped) => (x.shape[1] as f64, x.shape[0] as f64),
            Some(x) => (x.shape[0] as f64, x.shape[1] as f64),
            None => (register(&rows), register(&cols)),
        };
        Some(Contraction { rows, cols, batch, over: over.clone(), tile })
    }

    /// A task's own memory, filled by what the operations load.
    fn task_level(&self) -> LevelTraffic {
        let mut out = LevelTraffic::default();
        for w in &self.ops {
            for t in w.touches.iter().filter(|t| matches!(t.place, Place::Array(_))) {
                let cover = |a: AxisId| self.block(a);
                let bytes = t.bytes(&cover) * self.executions(&w.streams, &t.axes);
                if t.write {
                    out.write_bytes += bytes;
                    continue;
                }
                out.read_bytes += bytes;
                let tile = t.fills.and_then(|t| self.mapping.tile(&self.kernel.tiles[t].name));
                let along = tile.and_then(|t| t.multicast.as_ref()).and_then(|a| self.mapping.axis(a));
                out.supplied_bytes += bytes / along.map_or(1, |a| a.cluster.max(1)) as f64;
            }
        }
        let partials = self.partial_bytes();
        out.write_bytes += partials;
        out.read_bytes += partials;
        out.supplied_bytes += partials;
        out
    }

    /// Bytes of the tiles that the parts of a split hand on: all that the stream carries, once per part and block.
    fn partial_bytes(&self) -> f64 {
        let Some(split) = &self.mapping.split else { return 0.0 };
        let inside =
            |w: &Work<'_>| w.streams.iter().any(|s| self.kernel.axes[self.streams[*s].axis].name == split.axis);
        let mut carried: Vec<TileId> = Vec::new();
        for w in self.ops.iter().filter(|w| inside(w)) {
            let kept = match w.op {
                Op::Reduce { out, carry: true, .. } => out.as_slice(),
                Op::Contract { out, carry: true, .. } => std::slice::from_ref(out),
                Op::Load { .. }
                | Op::Store { .. }
                | Op::Map { .. }
                | Op::Reduce { .. }
                | Op::Contract { .. }
                | Op::Scan { .. } => &[],
            };
            carried.extend(kept);
        }
        carried.sort();
        carried.dedup();
        let bytes = |t: &TileId| {
            let tile = &self.kernel.tiles[*t];
            let elems: f64 = tile.axes.iter().map(|a| self.block(*a)).product();
            elems * bytes_of(tile.dtype) * self.executions(&[], &tile.axes)
        };
        carried.iter().map(bytes).sum()
    }

    /// Registers under a managed memory: tiles kept there are read by the operations that use them, an instruction's
    /// operands once per instruction; what is loaded straight into registers passes once.
    fn register_level(&self, register_bytes: u64) -> LevelTraffic {
        let mut out = LevelTraffic::default();
        let space = |t: TileId| {
            let k = &self.kernel.tiles[t];
            self.mapping.tile(&k.name).map(|m| m.space).or(k.space).unwrap_or(Space::Registers)
        };
        let engine = |t: TileId| self.mapping.tile(&self.kernel.tiles[t].name).and_then(|m| m.engine);
        let by_engine = |op: &Op| matches!(op, Op::Load { out, .. } if engine(*out).is_some());
        for w in &self.ops {
            let cover = |a: AxisId| self.block(a);
            let op = self.mapping.op(&w.name);
            for t in &w.touches {
                let mut times = 1.0;
                match &t.place {
                    // What a copy engine brings in does not pass through registers.
                    _ if by_engine(w.op) && (t.write || t.fills.is_some()) => continue,
                    Place::Tile(x) if space(*x) != Space::Shared => continue,
                    Place::Tile(x) => {
                        if let (Op::Contract { a, .. }, Some(c)) = (w.op, self.contraction(w, register_bytes)) {
                            if x == a && op.is_some_and(|o| o.a == Source::Registers) {
                                continue;
                            }
                            let n = |axes: &[AxisId], size: f64| {
                                (axes.iter().map(|a| self.block(*a)).product::<f64>() / size).ceil().max(1.0)
                            };
                            times = if x == a { n(&c.cols, c.tile.1) } else { n(&c.rows, c.tile.0) };
                        }
                    }
                    Place::Array(_) => {}
                }
                let bytes = times * t.bytes(&cover) * self.executions(&w.streams, &t.axes);
                if t.write {
                    out.write_bytes += bytes;
                } else {
                    out.read_bytes += bytes;
                }
            }
        }
        out.supplied_bytes = out.read_bytes;
        out
    }

    /// A cache of `capacity` bytes that `concurrent` tasks share; `fine`: below the blocks too, tiles included.
    fn cache(&self, capacity: u64, concurrent: u64, fine: bool) -> LevelTraffic {
        self.nest(concurrent, fine).0.traffic(capacity as f64)
    }

    /// The loops around every operation, and how many of the innermost are of tasks that run at the same time.
    fn nest(&self, concurrent: u64, fine: bool) -> (Nest<'a, '_>, usize) {
        let (outer, inner) = self.waves(concurrent);
        let together = inner.len();
        let mut global = outer;
        global.extend(self.streams.iter().cloned());
        global.extend(inner);
        (Nest { model: self, global, fine, kept: self.kept.clone() }, together)
    }
}

struct Contraction {
    rows: Vec<AxisId>,
    cols: Vec<AxisId>,
    batch: Vec<AxisId>,
    over: Vec<AxisId>,
    tile: (f64, f64),
}

fn mark_sequential(nodes: &[Node], out: &mut [bool]) {
    for n in nodes {
        if let Node::Stream(s) = n {
            out[s.axis.index()] |= s.sequential;
            mark_sequential(&s.body, out);
        }
    }
}

fn bytes_of(d: DType) -> f64 {
    f64::from(d.bits()) / 8.0
}
