//! What one task of a mapping takes: register tiles, packing, loops around lanes, and the arrays that it moves.
//!
//! A mirror of the lowering (`codegen/src/lower/cpu`) in numbers: which operand's rows and columns a contraction takes,
//! which operations share a nest of loops, along which axis lanes run, what is read in place. Instructions are counted in
//! slots, the time of one vector multiply-add at the peak.

use einfall_ir::analysis::runs::Runs;
use einfall_ir::arena::Id;
use einfall_ir::tile::{AxisId, Tile, TileId};

use super::cost::Pricer;
use super::work::{Access, Kind, Source, Step, Work};

/// Slots until a multiply-add's result may be added to (4 cycles of two).
const LATENCY: f64 = 8.0;
/// Slots of a load, of a store, of a conversion from or to a narrower type.
const LOAD: f64 = 1.0;
const STORE: f64 = 2.0;
const CONVERT: f64 = 2.0;
/// Slots that a lane takes which is loaded or stored by itself, and a vector that is transposed in registers.
const LANE: f64 = 4.0;
const TRANSPOSE: f64 = 8.0;
/// Rows of a tile; rows of a block up to which multiply-adds of vectors are taken (`codegen/src/lower/cpu/place.rs`).
const TILE: f64 = 16.0;
const TILE_ROWS: f64 = 8.0;
/// Slots of a vector at positions that are data, which are checked.
const CHECKED: f64 = 4.0;
/// How much longer what prefetchers do not follow takes from beyond the second-level cache.
const STRAYED: f64 = 2.0;
/// Bytes that a run of neighbours costs beside its own.
const BEGUN: f64 = 256.0;
/// Slots to begin a loop over lanes.
const LOOP: f64 = 8.0;
/// Slots to begin a register tile: addresses, and the end of the loop before it.
const REGISTER_TILE: f64 = 40.0;
/// The share of a register tile that the rest of a run's rows takes, and values of keys whose number is not known.
const REST: f64 = 0.3;
const VALUES: f64 = 16.0;
/// Slots to begin an operation, a step of a stream, a task.
const OPERATION: f64 = 10.0;
const STREAM_STEP: f64 = 15.0;
const TASK: f64 = 60.0;
/// Rows up to which a contraction is a reduction of products (`codegen/src/lower/cpu/contract.rs`).
const THIN_ROWS: f64 = 2.0;

/// What a task takes, in slots and in seconds of memory.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Task {
    pub products: f64,
    pub packing: f64,
    pub elementwise: f64,
    pub walking: f64,
    pub memory: f64,
    /// Slots of multiply-adds of whole register tiles, and nothing else.
    pub least: f64,
}

/// An assignment as it is priced.
pub(super) struct Chosen<'p, 's, 'a> {
    pricer: &'p Pricer<'s, 'a>,
    /// Coordinates of a block that code is made for, of a whole one and of a block on average.
    most: Vec<f64>,
    pub full: Vec<f64>,
    block: Vec<f64>,
    /// Blocks along each axis, those apart that a filter skips.
    trips: Vec<f64>,
    /// The contiguous axis of each tile in scratch.
    layout: Vec<Option<AxisId>>,
    /// Tiles that are read in place.
    direct: Vec<bool>,
    /// Bytes of the task's tiles in scratch.
    footprint: f64,
    /// Neighbours of each tile that are laid out together.
    together: Vec<f64>,
}

/// How a contraction uses its axes (`codegen/src/lower/cpu/place.rs`).
struct Shape {
    rows: TileId,
    columns: TileId,
    lane: AxisId,
    row: Option<AxisId>,
    /// Rows of a register tile, and vectors of its columns.
    height: f64,
    vectors: f64,
    /// Slots of a product of tiles, where these are.
    product: Option<f64>,
    /// Neighbours along the summed axis that a vector instruction multiplies, and its slots.
    dots: (f64, f64),
    /// Rows that share the columns by runs, and how many runs a block has.
    runs: Option<(AxisId, f64)>,
}

impl<'p, 's, 'a> Chosen<'p, 's, 'a> {
    /// The blocks of an assignment, and how often each is walked.
    pub fn new(pricer: &'p Pricer<'s, 'a>, most: Vec<f64>, full: Vec<f64>, trips: Vec<f64>) -> Chosen<'p, 's, 'a> {
        let k = pricer.space.kernel;
        let direct = pricer.work.loaded.iter().map(Option::is_some).collect();
        let together = vec![1.0; k.tiles.len()];
        let mean = |(full, e): (&f64, &u64)| *e as f64 / (*e as f64 / full).ceil();
        let block = full.iter().zip(&pricer.space.extents).map(mean).collect();
        let mut c = Chosen {
            pricer,
            most,
            full,
            block,
            trips,
            layout: vec![None; k.tiles.len()],
            direct,
            footprint: 0.0,
            together,
        };
        for (id, t) in k.tiles.iter() {
            c.layout[id.index()] = t.axes.iter().rev().copied().find(|a| c.wide(*a));
        }
        let mut wanted = vec![false; k.tiles.len()];
        for s in &pricer.work.steps {
            let Some(shape) = c.shape(s).filter(|_| !c.thin(s)) else { continue };
            let inner = c.inner(s, shape.rows);
            for (t, contiguous) in [(shape.rows, inner), (shape.columns, Some(shape.lane))] {
                if shape.runs.is_some() && t == shape.columns {
                    continue;
                }
                if !std::mem::replace(&mut wanted[t.index()], true) {
                    c.layout[t.index()] = contiguous.or(c.layout[t.index()]);
                    c.together[t.index()] = if t == shape.columns { shape.dots.0 } else { 1.0 };
                    c.direct[t.index()] = false;
                }
            }
        }
        let passing = c.passing();
        let held = k.tiles.iter().filter(|(id, _)| !c.direct[id.index()] && !passing.contains(id));
        let single = |id: TileId, a: &AxisId| pricer.work.single[id.index()].contains(a);
        let axes = |(id, t): (TileId, &Tile)| t.axes.iter().copied().filter(|a| !single(id, a)).collect::<Vec<_>>();
        c.footprint = held.map(|t| 4.0 * c.points(&axes(t))).sum();
        c
    }

    /// Tiles that are made and read in one nest of loops: they stay in registers.
    fn passing(&self) -> Vec<TileId> {
        let steps = &self.pricer.work.steps;
        let mut out = Vec::new();
        let mut at = 0;
        while at < steps.len() {
            let nested = matches!(steps[at].kind, Kind::Reduce | Kind::Elementwise) && !self.made_by_runs(&steps[at]);
            let n = if nested { self.group(&steps[at..]) } else { 1 };
            let made = steps[at..at + n].iter().filter(|s| s.kind == Kind::Elementwise && nested);
            out.extend(made.filter_map(|s| match &s.write {
                Source::Tile(t, _) if self.only_read_in(*t, at..at + n) => Some(*t),
                Source::Tile(..) | Source::Array(_) => None,
            }));
            at += n;
        }
        out
    }

    /// Whether no other operation than these, by number, reads a tile.
    fn only_read_in(&self, tile: TileId, these: std::ops::Range<usize>) -> bool {
        let reads = |s: &Step| s.reads.iter().any(|r| matches!(r, Source::Tile(t, _) if *t == tile));
        self.pricer.work.steps.iter().enumerate().all(|(i, s)| these.contains(&i) || !reads(s))
    }

    fn wide(&self, a: AxisId) -> bool {
        self.most[a.index()] > 1.0
    }

    fn points(&self, axes: &[AxisId]) -> f64 {
        axes.iter().map(|a| self.block[a.index()]).product()
    }

    /// Coordinates along an axis, each block's rounded up to whole tiles of `tile`, a block on average.
    fn padded(&self, a: AxisId, tile: f64) -> f64 {
        let (extent, block) = (self.pricer.space.extents[a.index()] as f64, self.full[a.index()]);
        let whole = (extent / block).floor();
        let rest = extent - whole * block;
        let up = |n: f64| (n / tile).ceil() * tile;
        (whole * up(block) + up(rest)) / (extent / block).ceil()
    }

    fn tile(&self, t: TileId) -> &[AxisId] {
        &self.pricer.space.kernel.tiles[t].axes
    }

    /// The summed axis along which rows are contiguous: the last that the row operand has.
    fn inner(&self, s: &Step, rows: TileId) -> Option<AxisId> {
        self.tile(rows).iter().rev().copied().find(|a| s.over.contains(a) && self.wide(*a))
    }

    fn shape(&self, s: &Step) -> Option<Shape> {
        let Kind::Contract { out, a, b } = s.kind else { return None };
        let has = |t: TileId, x: &AxisId| self.tile(t).contains(x);
        let wide = || self.tile(out).iter().rev().copied().filter(|x| self.wide(*x));
        let runs = s.runs.as_ref().filter(|r| self.wide(r.axis));
        let lane = match runs {
            Some(r) => wide().find(|x| has(r.operand, x) && !(has(a, x) && has(b, x)))?,
            None => wide().find(|x| has(a, x) != has(b, x))?,
        };
        let (rows, columns) = if has(a, &lane) { (b, a) } else { (a, b) };
        let row = match runs {
            Some(r) => Some(r.axis),
            None => wide().find(|x| has(rows, x) && !has(columns, x)),
        };
        let runs = runs.map(|r| (r.axis, self.runs_of(r)));
        let m = &self.pricer.machine;
        let plan = self.pricer.space.plan;
        let many = row.is_some_and(|r| self.most[r.index()] > TILE_ROWS);
        let narrow = super::narrow(plan, self.pricer.space.kernel, out, a, b);
        let atom = m.product.as_ref().filter(|(atom, _)| narrow && (many || !atom.tiled()));
        let product = atom.filter(|(atom, _)| atom.tiled()).map(|p| p.1);
        let dots = atom.map_or((1.0, 1.0), |(atom, slots)| (atom.shape[2] as f64, *slots));
        if product.is_some() {
            let height = if row.is_some_and(|r| self.most[r.index()] <= TILE) { TILE } else { 2.0 * TILE };
            return Some(Shape { rows, columns, lane, row, height, vectors: 2.0, product, dots, runs });
        }
        let vectors = if self.most[lane.index()] <= m.lanes { 1.0 } else { 2.0 };
        let most = (2.0 * m.rows / vectors).floor();
        let height = row.map_or(1.0, |r| {
            let n = self.most[r.index()];
            (n / (n / most).ceil()).ceil()
        });
        Some(Shape { rows, columns, lane, row, height, vectors, product: None, dots, runs })
    }

    /// Runs in a block of rows, as if the rows were in order and the values of their keys equally frequent.
    fn runs_of(&self, r: &Runs) -> f64 {
        let (block, extent) = (self.block[r.axis.index()], self.pricer.space.extents[r.axis.index()] as f64);
        let values = Work::values(self.pricer.space, r).unwrap_or(VALUES).min(extent);
        (1.0 + block * (values - 1.0).max(0.0) / extent).min(block)
    }

    /// Whether an elementwise operation's result is computed where it is packed, once a run.
    fn made_by_runs(&self, s: &Step) -> bool {
        match &s.write {
            Source::Tile(t, _) if s.kind == Kind::Elementwise => {
                self.shared(*t).is_some_and(|(axis, _)| self.wide(axis))
            }
            Source::Tile(..) | Source::Array(_) => false,
        }
    }

    /// Coordinates that an operand of a contraction has at a time, once for every run where rows share it by runs.
    fn packed(&self, t: TileId, shape: &Shape) -> f64 {
        let whole = self.points(self.tile(t));
        match shape.runs.filter(|_| t == shape.columns) {
            Some((axis, runs)) => whole / self.block[axis.index()] * runs,
            None => whole,
        }
    }

    /// Whether a contraction has almost no rows and is a reduction.
    fn thin(&self, s: &Step) -> bool {
        let Kind::Contract { out, a, b } = s.kind else { return false };
        if s.runs.as_ref().is_some_and(|r| self.block[r.axis.index()] <= THIN_ROWS * self.runs_of(r)) {
            return true;
        }
        let few = |t: TileId, other: TileId| {
            let single = |x: &AxisId| s.runs.as_ref().is_some_and(|r| r.operand == other && r.axis == *x);
            let has = |x: &AxisId| self.tile(other).contains(x) && !single(x);
            let mut own = self.tile(t).iter().filter(|x| !has(x) && self.tile(out).contains(x));
            own.all(|x| self.most[x.index()] <= THIN_ROWS)
        };
        few(a, b) || few(b, a)
    }

    /// What a task takes.
    pub fn task(&self) -> Task {
        let mut task = Task { walking: TASK, ..Task::default() };
        let steps = &self.pricer.work.steps;
        let mut entered: Vec<AxisId> = Vec::new();
        let mut at = 0;
        while at < steps.len() {
            let s = &steps[at];
            let trips: f64 = s.streams.iter().map(|a| self.trips[a.index()]).product();
            for (i, stream) in s.streams.iter().enumerate() {
                if !entered.contains(stream) {
                    entered.push(*stream);
                    let around: f64 = s.streams[..=i].iter().map(|a| self.trips[a.index()]).product();
                    task.walking += STREAM_STEP * around;
                }
            }
            if matches!(s.kind, Kind::Load(t) if self.direct[t.index()]) || self.made_by_runs(s) {
                at += 1;
                continue;
            }
            task.walking += OPERATION * trips;
            match s.kind {
                Kind::Contract { .. } => match self.shape(s).filter(|_| !self.thin(s)) {
                    Some(shape) => self.contract(s, &shape, trips, &mut task),
                    None => {
                        let nodes = vec![(1.0, s.axes.iter().chain(&s.over).copied().collect())];
                        let reduce = Step { kind: Kind::Reduce, nodes, join: 20.0, ..s.clone() };
                        self.nest(&[reduce], at, trips, &mut task);
                    }
                },
                Kind::Load(_) => task.packing += self.copied(&s.reads[0], &s.write, &s.axes) * trips,
                Kind::Scan => self.scan(s, trips, &mut task),
                Kind::Reduce | Kind::Elementwise => {
                    let n = self.group(&steps[at..]);
                    self.nest(&steps[at..at + n], at, trips, &mut task);
                    at += n - 1;
                }
            }
            at += 1;
        }
        task.memory += self.memory();
        task
    }

    /// Wide axes that an operation ranges over, in order.
    fn ranged(&self, s: &Step) -> Vec<AxisId> {
        let mut axes: Vec<AxisId> = s.axes.iter().chain(&s.over).copied().filter(|a| self.wide(*a)).collect();
        axes.sort();
        axes.dedup();
        axes
    }

    /// How many of the first operations share one nest of loops (`codegen/src/lower/cpu/nest.rs`).
    fn group(&self, steps: &[Step]) -> usize {
        let first = self.ranged(&steps[0]);
        let over = |s: &Step| s.over.iter().filter(|a| self.wide(**a)).count();
        let (mut written, mut sums): (Vec<TileId>, Vec<TileId>) = (Vec::new(), Vec::new());
        let mut reduced = None;
        let mut n = 0;
        for s in steps {
            let reduces = s.kind == Kind::Reduce;
            let apart = s.streams != steps[0].streams
                || !matches!(s.kind, Kind::Reduce | Kind::Elementwise)
                || self.made_by_runs(s)
                || self.ranged(s) != first
                || reduces && reduced.is_some_and(|r| r != over(s))
                || s.reads.iter().any(|r| match r {
                    Source::Array(_) => false,
                    Source::Tile(t, names) => {
                        let own = self.tile(*t).iter().zip(names).all(|(a, n)| *n == Some(*a));
                        let narrower = self.tile(*t).iter().filter(|a| self.wide(**a)).count() != first.len();
                        sums.contains(t) || written.contains(t) && (!own || narrower)
                    }
                });
            if apart && n > 0 {
                break;
            }
            if let Source::Tile(t, _) = &s.write {
                if reduces { &mut sums } else { &mut written }.push(*t);
            }
            if reduces {
                reduced = Some(over(s));
            }
            n += 1;
        }
        n
    }

    /// Slots of copying a tile into another layout.
    fn copied(&self, from: &Source, to: &Source, axes: &[AxisId]) -> f64 {
        let m = &self.pricer.machine;
        let lane = axes.iter().copied().find(|a| self.walks(to, *a) == Walk::Along);
        let Some(lane) = lane else { return self.points(axes) * LANE };
        let narrow = if self.narrow(from) { CONVERT } else { 0.0 };
        let vectors = self.padded(lane, m.lanes) / m.lanes;
        let outer = self.points(axes) / self.block[lane.index()];
        let checked = if self.checked(from, lane) { CHECKED } else { 0.0 };
        let per = match self.walks(from, lane) {
            // What stands together is stored together, and as narrow as it was.
            Walk::Along | Walk::Still if self.together_in(to) > 1.0 => {
                LOAD + (STORE + narrow) / self.together_in(to) + checked
            }
            Walk::Along | Walk::Still => LOAD + STORE + narrow + checked,
            Walk::Apart => {
                let along = axes.iter().find(|a| self.walks(from, **a) == Walk::Along);
                match along
                    .filter(|a| self.most[a.index()] >= m.lanes / 2.0 && self.most[lane.index()] >= m.lanes / 2.0)
                {
                    Some(_) => TRANSPOSE + narrow,
                    None => LANE * m.lanes,
                }
            }
        };
        outer * (vectors * per + LOOP / 2.0)
    }

    /// Neighbours that stand together where a copy is written.
    fn together_in(&self, to: &Source) -> f64 {
        match to {
            Source::Tile(t, _) => self.together[t.index()],
            Source::Array(_) => 1.0,
        }
    }

    /// Whether positions along other axes than the lanes' are data that changes within the block.
    fn checked(&self, s: &Source, lane: AxisId) -> bool {
        let access = match s {
            Source::Array(a) => Some(a),
            Source::Tile(t, _) => self.pricer.work.loaded[t.index()].as_ref().filter(|_| self.direct[t.index()]),
        };
        access.is_some_and(|a| a.data.iter().any(|x| *x != lane && self.wide(*x)))
    }

    /// Point after point along an axis; side by side along another, where there is one.
    fn scan(&self, s: &Step, trips: f64, task: &mut Task) {
        let m = &self.pricer.machine;
        let nodes: f64 = s.nodes.iter().map(|n| n.0).sum::<f64>() + s.join;
        let lane = s.axes.iter().rev().copied().find(|a| !s.over.contains(a) && self.wide(*a));
        let points = self.points(&s.axes) * trips;
        task.elementwise += match lane {
            None => points * LATENCY.max(nodes),
            Some(lane) => {
                let vectors = points / self.block[lane.index()] * (self.padded(lane, m.lanes) / m.lanes);
                let spread =
                    |x: &Source| if self.walks(x, lane) == Walk::Apart { LANE * m.lanes } else { LOAD + STORE };
                vectors * (nodes + LATENCY + s.reads.iter().chain([&s.write]).map(spread).sum::<f64>())
            }
        };
    }

    /// An outer product: register tiles over panels.
    fn contract(&self, s: &Step, shape: &Shape, trips: f64, task: &mut Task) {
        let m = &self.pricer.machine;
        let (neighbours, slots) = shape.dots;
        let steps = (self.points(&s.over) / neighbours).ceil();
        let columns = self.padded(shape.lane, shape.vectors * m.lanes) / (shape.vectors * m.lanes);
        let rows = match shape.runs {
            // Of a run's rest, half of what a register tile of the next size by halves has is there.
            Some((axis, runs)) => self.block[axis.index()] / shape.height + REST * runs,
            None => shape.row.map_or(1.0, |r| self.padded(r, shape.height) / shape.height),
        };
        let own: Vec<AxisId> = s.axes.iter().copied().filter(|a| *a != shape.lane && Some(*a) != shape.row).collect();
        let tiles = columns * rows * self.points(&own) * trips;
        if let Some(product) = shape.product {
            self.tiles(s, shape, product, (tiles, trips), task);
            return;
        }
        let adds = shape.height * shape.vectors;
        // A panel is read from L1 where a block of it stays there beside the rows.
        let panel = 4.0 * steps * shape.vectors * m.lanes;
        let level = m.holds(panel / 2.0 + 2.0 * steps * shape.height);
        let fetch = if level == 0 { 0.0 } else { shape.vectors * m.lanes * 4.0 * m.byte[level.min(2)] / m.slot };
        let step = (adds * slots).max(shape.height + shape.vectors).max(LATENCY).max(fetch);
        let ends = adds * (LOAD + STORE) + REGISTER_TILE;
        task.products += tiles * (step * steps + ends);
        task.least += tiles * adds * slots * steps;
        // Panels are written and read once where the cache is that holds all of them.
        let panels = 8.0 / neighbours * self.packed(shape.columns, shape);
        let far = m.holds(panels / 2.0);
        task.memory += if far == 0 { 0.0 } else { panels * trips * m.byte[far] };
        // What is not laid out for it is packed now.
        for (t, contiguous) in [(shape.rows, self.inner(s, shape.rows)), (shape.columns, Some(shape.lane))] {
            let wanted = contiguous.or(self.layout[t.index()]);
            let (once, axes) = (self.packed(t, shape), self.tile(t));
            if shape.runs.is_some() && t == shape.columns && self.direct[t.index()] {
                let loaded = self.pricer.work.steps.iter().find(|x| x.kind == Kind::Load(t));
                let from = Source::Tile(t, axes.iter().map(|a| Some(*a)).collect());
                let turned = loaded.is_some() && self.walks(&from, shape.lane) != Walk::Along;
                let narrow = if self.narrow(&from) { CONVERT } else { 0.0 };
                let per = if turned { TRANSPOSE } else { LOAD + STORE };
                task.packing += once / m.lanes * (per + narrow) * trips;
            } else if self.layout[t.index()] != wanted {
                task.packing += once / m.lanes * (TRANSPOSE + LOAD) * trips;
            }
        }
    }

    /// Products of tiles, two by two with what they read loaded once, on what is laid out for them now: rows along the summed
    /// axis, columns in pairs.
    fn tiles(&self, s: &Step, shape: &Shape, product: f64, (tiles, trips): (f64, f64), task: &mut Task) {
        let m = &self.pricer.machine;
        let steps = (self.points(&s.over) / (2.0 * TILE)).ceil();
        let across = shape.height / TILE;
        let (products, loads) = (2.0 * across, 2.0 + across);
        let panel = 2.0 * 2.0 * TILE * steps * (2.0 * TILE + shape.height);
        // Rows are read again for every panel of columns, from the cache that holds all of them beside the sums.
        let Kind::Contract { out, .. } = s.kind else { return };
        let (rows, sums) = (2.0 * self.points(self.tile(shape.rows)), 4.0 * self.points(self.tile(out)));
        let from = |bytes: f64, level: usize| if level == 0 { 0.0 } else { bytes * m.byte[level.min(2)] / m.slot };
        let fetch = from(2.0 * 1024.0, m.holds(panel / 2.0)) + from(across * 1024.0, m.holds((rows + panel) / 2.0));
        let step = (products * product).max(loads * TILE * LOAD).max(fetch);
        let moved = from(2.0 * products * 1024.0, m.holds((rows + sums) / 2.0));
        let ends = (products * TILE * (LOAD + STORE)).max(moved) + REGISTER_TILE;
        task.products += tiles * (step * steps + ends);
        task.least += tiles * products * product * steps;
        task.packing += self.packed(shape.columns, shape) / m.lanes * trips * (TRANSPOSE + STORE);
    }

    /// Loops around lanes: a run of elementwise operations, reductions and stores, the first of which is number `first`.
    fn nest(&self, group: &[Step], first: usize, trips: f64, task: &mut Task) {
        let m = &self.pricer.machine;
        let axes = self.ranged(&group[0]);
        let score = |lane: AxisId| -> f64 {
            let few = if self.most[lane.index()] < m.lanes { -2.0 } else { 0.0 };
            let of = |s: &Step| {
                let write = if s.kind == Kind::Reduce { 0.0 } else { 2.0 * self.walks(&s.write, lane).score() };
                write + s.reads.iter().map(|r| self.walks(r, lane).score()).sum::<f64>()
            };
            few + group.iter().map(of).sum::<f64>()
        };
        // Of equal ones the last.
        let order = group[0].axes.iter().chain(&group[0].over).copied().filter(|a| self.wide(*a));
        let lane = order.map(|a| (score(a), a)).fold(None, |best: Option<(f64, AxisId)>, x| match best {
            Some(b) if b.0 > x.0 => Some(b),
            Some(_) | None => Some(x),
        });
        let lane = lane.map(|l| l.1);
        let over: Vec<AxisId> = group.iter().flat_map(|s| &s.over).copied().filter(|a| self.wide(*a)).collect();
        let reduces = group.iter().any(|s| s.kind == Kind::Reduce);
        let outer: f64 = axes.iter().filter(|a| Some(**a) != lane).map(|a| self.block[a.index()]).product();
        // Slots of a vector, of what is the same for all lanes, and at the ends of the lanes' loop.
        let (mut per, mut once, mut ends) = (0.0, 0.0, LOOP);
        let (mut made, mut read): (Vec<TileId>, Vec<&Source>) = (Vec::new(), Vec::new());
        let mut bytes = 0.0;
        for s in group {
            for (cost, on) in &s.nodes {
                *if lane.is_none_or(|l| on.contains(&l)) { &mut per } else { &mut once } += cost;
            }
            for r in &s.reads {
                if matches!(r, Source::Tile(t, _) if made.contains(t)) || read.iter().any(|x| same(x, r)) {
                    continue;
                }
                read.push(r);
                let narrow = if self.narrow(r) { CONVERT } else { 0.0 };
                match lane.map_or(Walk::Still, |l| self.walks(r, l)) {
                    Walk::Along => per += LOAD + narrow,
                    Walk::Still => once += LOAD + narrow,
                    Walk::Apart => per += LANE * m.lanes,
                }
                if lane.is_some_and(|l| self.checked(r, l)) {
                    per += CHECKED;
                }
                if let Source::Tile(t, _) = r {
                    bytes += if self.direct[t.index()] { 0.0 } else { 4.0 * self.points(self.tile(*t)) };
                }
            }
            let results = s.axes.iter().filter(|a| self.wide(**a)).map(|a| self.block[a.index()]).product::<f64>();
            if s.kind == Kind::Reduce {
                let summed = lane.is_some_and(|l| s.over.contains(&l));
                ends += if summed { s.join * results / outer } else { (LOAD + STORE) * results / m.lanes / outer };
                continue;
            }
            if let Source::Tile(t, _) = &s.write {
                made.push(*t);
                if self.only_read_in(*t, first..first + group.len()) {
                    continue;
                }
                bytes += 4.0 * self.points(self.tile(*t));
            }
            let narrow = if self.narrow(&s.write) { CONVERT } else { 0.0 };
            match lane.map_or(Walk::Still, |l| self.walks(&s.write, l)) {
                Walk::Along => per += STORE + narrow,
                Walk::Still => once += STORE + narrow,
                Walk::Apart => per += LANE * m.lanes,
            }
        }
        // Steps of several vectors, then one by one; a reduction waits for the vectors before.
        let least = if reduces { LATENCY } else { 0.0 };
        let loops = match lane {
            None => per.max(least),
            Some(l) => {
                let most = (self.most[l.index()] / m.lanes).ceil();
                let width = if most >= 4.0 { 4.0 } else { most.clamp(1.0, 2.0) };
                let held = self.block[l.index()] / m.lanes;
                let steps = (held / width + 1e-9).floor();
                let tail = (held - steps * width - 1e-6).max(0.0).ceil();
                steps * (width * per).max(least) + tail * (per + 2.0).max(least)
            }
        };
        // What the lanes share is computed once before the innermost loops.
        let inner: f64 = over.iter().filter(|a| Some(**a) != lane).map(|a| self.block[a.index()]).product();
        let shared = if lane.is_some_and(|l| over.contains(&l)) { once } else { once / inner.max(1.0) + LOAD };
        task.elementwise += outer * (loops + shared + ends) * trips;
        let level = m.holds(self.footprint);
        task.memory += if level == 0 { 0.0 } else { bytes * trips * m.byte[level] };
    }

    fn narrow(&self, s: &Source) -> bool {
        match s {
            Source::Array(a) => a.bytes < 4.0,
            Source::Tile(t, _) => {
                self.direct[t.index()] && self.pricer.work.loaded[t.index()].as_ref().is_some_and(|a| a.bytes < 4.0)
            }
        }
    }

    fn walks(&self, s: &Source, lane: AxisId) -> Walk {
        let array = |a: &Access, lane: AxisId| match () {
            () if a.contiguous == Some(lane) => Walk::Along,
            () if a.axes.contains(&lane) => Walk::Apart,
            () => Walk::Still,
        };
        match s {
            Source::Array(a) => array(a, lane),
            Source::Tile(t, names) => {
                let Some(i) = names.iter().position(|n| *n == Some(lane)) else { return Walk::Still };
                let own = self.tile(*t)[i];
                match &self.pricer.work.loaded[t.index()] {
                    Some(a) if self.direct[t.index()] => array(a, own),
                    _ if self.layout[t.index()] == Some(own) => Walk::Along,
                    _ if self.wide(own) => Walk::Apart,
                    _ => Walk::Still,
                }
            }
        }
    }

    /// Whether an axis is summed by an operation, or by a contraction that reads what it loads in place.
    fn summed(&self, s: &Step, axis: AxisId) -> bool {
        match s.kind {
            Kind::Load(t) => self.pricer.work.steps.iter().any(|x| match x.kind {
                Kind::Contract { a, b, .. } => (a == t || b == t) && x.over.contains(&axis) && self.thin(x),
                Kind::Load(_) | Kind::Reduce | Kind::Scan | Kind::Elementwise => false,
            }),
            Kind::Contract { .. } | Kind::Reduce | Kind::Scan | Kind::Elementwise => s.over.contains(&axis),
        }
    }

    /// The axis of which a tile has one coordinate at a time, and how many a block of rows asks for.
    fn shared(&self, t: TileId) -> Option<(AxisId, f64)> {
        let of = |s: &Step| s.runs.as_ref().filter(|r| r.operand == t).map(|r| (r.axis, self.runs_of(r)));
        let work = &self.pricer.work;
        work.steps.iter().find_map(of).filter(|(axis, _)| work.single[t.index()].contains(axis))
    }

    /// Seconds of moving arrays to a core: from where they are at first and from where they stay after that.
    fn memory(&self) -> f64 {
        let (m, space) = (&self.pricer.machine, self.pricer.space);
        let extent = |a: &AxisId| space.extents[a.index()] as f64;
        let count = |a: &AxisId| (extent(a) / self.full[a.index()]).ceil();
        let tasks: f64 = space.kernel.axes.ids().filter(|a| space.parallel(*a)).map(|a| count(&a)).product();
        let mut seen: Vec<usize> = Vec::new();
        let mut seconds = 0.0;
        for s in &self.pricer.work.steps {
            for source in s.reads.iter().chain([&s.write]) {
                let Source::Array(a) = source else { continue };
                let runs = match s.kind {
                    Kind::Load(t) => self.shared(t),
                    Kind::Contract { .. } | Kind::Reduce | Kind::Scan | Kind::Elementwise => None,
                };
                let reach = |x: &AxisId| match runs {
                    Some((axis, runs)) if axis == *x => runs,
                    _ if space.parallel(*x) => self.block[x.index()],
                    _ => extent(x),
                };
                let inside = s.streams.iter().filter(|x| a.axes.contains(x));
                let kept: f64 = inside.map(|x| self.trips[x.index()] / count(x)).product();
                // Short runs of neighbours cost lines more: prefetchers begin anew. What the next step reads goes on.
                let next = |x: AxisId| if s.streams.last() == Some(&x) { self.trips[x.index()] } else { 1.0 };
                let run = a.run(|x| self.block[x.index()] * next(x));
                let elements: f64 = a.axes.iter().map(reach).product();
                let (own, begun) = ((kept * elements * a.bytes).min(a.whole), 1.0 + BEGUN / run);
                let touched = own * begun;
                let outside = s.streams.iter().filter(|x| !a.axes.contains(x));
                let again: f64 = outside.map(|x| self.trips[x.index()]).product();
                let later = m.holds(a.whole).max(1);
                // Rows that are summed are walked innermost, some vectors of each: pages that are open at a time.
                let summed = |x: &&AxisId| Some(**x) != a.contiguous && self.summed(s, **x);
                let rows: f64 = a.axes.iter().filter(summed).map(|x| self.block[x.index()]).product();
                let pages = rows * a.contiguous.map_or(1.0, |c| (extent(&c) * a.bytes / 4096.0).min(1.0));
                let stray = |level: usize| if pages > m.followed && level > 1 { STRAYED } else { 1.0 };
                if seen.contains(&a.buffer) {
                    seconds += touched * again * m.byte[m.holds(touched).max(1)];
                } else {
                    seen.push(a.buffer);
                    let home = self.pricer.home.max(later);
                    // A task's share of what is read for the first time.
                    let first = (a.whole.min(own * tasks) / tasks).min(own) * begun;
                    seconds += stray(home) * first * m.byte[home] + stray(later) * (touched - first) * m.byte[later];
                    let level = m.holds(touched);
                    seconds += if level == 0 { 0.0 } else { (again - 1.0).max(0.0) * touched * m.byte[level] };
                }
            }
        }
        seconds
    }
}

/// Whether two reads are of the same place.
fn same(a: &Source, b: &Source) -> bool {
    match (a, b) {
        (Source::Tile(x, p), Source::Tile(y, q)) => x == y && p == q,
        (Source::Array(x), Source::Array(y)) => {
            (x.buffer, x.contiguous, &x.axes) == (y.buffer, y.contiguous, &y.axes) && x.data.is_empty()
        }
        (Source::Tile(..), Source::Array(_)) | (Source::Array(_), Source::Tile(..)) => false,
    }
}

/// How lanes meet what is read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Walk {
    Along,
    Still,
    Apart,
}

impl Walk {
    /// As the lowering weighs it.
    fn score(self) -> f64 {
        match self {
            Walk::Along => 2.0,
            Walk::Still => 0.0,
            Walk::Apart => -3.0,
        }
    }
}
