//! The integer CSP of one structure: blocks, units, clusters, atoms, stages, swizzles, register budgets, order.
//!
//! Variables are named as the mapping's lines are (`block m`, `stages k`, `atom s`, `regs consumer`), constraints as
//! the lowering names its refusals. Invariant: an assignment that passes [`crate::csp::Model::check`] becomes a mapping
//! that lowers, verifies and fits the device; the resource formulas are those of `einfall_ir::analysis::resources` and
//! PTX's rules of boxes, swizzles and instruction shapes.

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::Scope;
use einfall_ir::target::Gpu;
use einfall_ir::tile::{AxisId, AxisKind, Op, TileId};

use super::facts::Facts;
use super::family::{DEPTH, Family};
use super::live::{Fragment, live_sets};
use super::structure::{Contraction, Held, Place, Schedule, Structure, frame_of};
use crate::csp::{Domain, Expr, Model, Pred, VarId};
use einfall_ir::analysis::resources::{EXCHANGE_BYTES, INSTRUCTION_OVERHEAD, OVERHEAD};

/// Most coordinates of a block.
pub const LARGEST: u64 = 512;
/// Most copies of a tile in flight.
pub const STAGES: u64 = 8;
/// Most parts of a stream; 1: it is whole.
pub const PARTS: [i64; 5] = [1, 8, 32, 64, 256];
/// Blocks of a section, where blocks are walked in sections; clusters of two divide it.
pub const GROUP: i64 = 8;
/// Registers per thread that joining parts' states takes, by what the lowering holds of them at once; with states of
/// [`WIDE_STATES`] elements a row it holds every row's own values in more lanes.
const MERGE_REGISTERS: [i64; 2] = [168, 220];
/// See [`MERGE_REGISTERS`].
const WIDE_STATES: i64 = 256;
/// Elements of a box per dimension (CUDA driver API, `cuTensorMapEncodeTiled`).
const BOX: i64 = 256;
/// The pattern of the widest swizzle repeats after so many bytes; stages start there.
const REPEAT: i64 = 1024;

/// Variables of a structure.
#[derive(Clone, Debug, Default)]
pub struct Vars {
    /// Coordinates per block of each sized axis.
    pub block: Vec<Option<VarId>>,
    /// Tasks of a cluster along each sized grid axis.
    pub cluster: Vec<Option<VarId>>,
    /// Consumer units.
    pub units: Option<VarId>,
    /// Columns of each contraction's instruction.
    pub atom: Vec<VarId>,
    /// Rows of all of them, where the family has several.
    pub rows: Option<VarId>,
    /// Copies of each shared tile filled in a stream.
    pub stages: Vec<Option<VarId>>,
    /// Swizzle span of each shared tile.
    pub swizzle: Vec<Option<VarId>>,
    /// Per store: through shared memory or not, and whether that memory is another tile's.
    pub staged: Vec<Option<VarId>>,
    /// See `staged`.
    pub reuses: Vec<Option<VarId>>,
    /// Registers per thread of the producer, where there is one, and the consumers; 0: shared out evenly, and for a role
    /// alone what the assembler takes.
    pub regs: Vec<VarId>,
    /// Whether consumers take turns.
    pub ping_pong: Option<VarId>,
    /// Whether long blocks go first.
    pub longest: Option<VarId>,
    /// Whether a stream goes from its last block to its first.
    pub descending: Vec<Option<VarId>>,
    /// Which of the orders of the grid.
    pub order: Option<VarId>,
    /// Blocks of the second-fastest axis of that order that are walked together; 1: none.
    pub group: Option<VarId>,
    /// Whether tasks take block after block.
    pub persistent: Option<VarId>,
    /// How a stream is cut over tasks.
    pub split: Option<SplitVars>,
}

/// Variables of a stream cut over tasks.
#[derive(Clone, Copy, Debug)]
pub struct SplitVars {
    /// Most parts; 1: it is whole, and the others mean nothing.
    pub parts: VarId,
    /// Tasks a multiprocessor runs at a time that they are counted for.
    pub resident: VarId,
    /// Whether the last task to arrive merges them; otherwise a second kernel does.
    pub last: VarId,
}

/// A structure with its CSP.
#[derive(Clone, Debug)]
pub struct Space<'s, 'a> {
    /// The kernel.
    pub facts: &'s Facts<'a>,
    /// The structure.
    pub structure: &'s Structure,
    /// The device's instructions.
    pub family: Family,
    /// The CSP.
    pub model: Model,
    /// Its variables.
    pub vars: Vars,
    /// Orders of the grid axes.
    pub orders: Vec<Vec<AxisId>>,
    /// How many of them, from the first, are worth trying.
    pub worth: usize,
    /// Shared memory in bytes.
    pub shared: Expr,
    /// Registers per thread that the consumers' fragments take.
    pub need: Expr,
}

/// The smallest step of blocks along an axis that instructions ask for.
fn step(s: &Structure, family: Family, a: AxisId) -> u64 {
    let mut step = 8;
    for c in &s.contractions {
        if c.m == a {
            step = step.max(rows_of(s, family).iter().copied().min().unwrap_or(8) as u64);
        }
        if c.k == a {
            step = step.max(DEPTH as u64);
        }
    }
    step
}

/// Rows that the instructions of a structure may have: shorter ones take their left operand from registers.
fn rows_of(s: &Structure, family: Family) -> &'static [i64] {
    let registers = s.contractions.iter().all(|c| s.places[c.a.index()] == Place::Registers);
    if registers { family.rows } else { &family.rows[..1] }
}

impl<'s, 'a> Space<'s, 'a> {
    /// The CSP of `structure` on a device.
    pub fn new(facts: &'s Facts<'a>, structure: &'s Structure, family: Family, gpu: &Gpu) -> Space<'s, 'a> {
        let (orders, worth) = orders(facts, structure);
        let (model, vars) = (Model::new(), Vars::default());
        let zero = Expr::Const(0);
        let mut space =
            Space { facts, structure, family, model, vars, orders, worth, shared: zero.clone(), need: zero };
        space.variables(gpu);
        space.shared = space.shared_bytes();
        space.shapes();
        space.shared_tiles();
        space.clusters(gpu);
        space.work();
        space.resources(gpu);
        space
    }

    /// Coordinates per block of an axis.
    pub fn block(&self, a: AxisId) -> Expr {
        self.vars.block[a.index()].map_or(Expr::Const(1), Expr::Var)
    }

    /// Rows of an instruction.
    fn rows(&self) -> Expr {
        self.vars.rows.map_or(Expr::Const(self.family.rows[0]), Expr::Var)
    }

    fn units(&self) -> Expr {
        self.vars.units.map_or(Expr::Const(1), Expr::Var)
    }

    /// Units that share the blocks of an axis.
    fn cut(&self, a: AxisId) -> Expr {
        if self.structure.cut == Some(a) { self.units() } else { Expr::Const(1) }
    }

    fn tile_name(&self, t: TileId) -> &'a str {
        &self.facts.kernel.tiles[t].name
    }

    fn variables(&mut self, gpu: &Gpu) {
        let (f, s) = (self.facts, self.structure);
        let flag = Domain::range(0, 1);
        for (i, a) in f.axes.iter().enumerate() {
            let id = AxisId::new(i);
            let mut block = None;
            let mut cluster = None;
            if s.is_sized(id) {
                let step = step(s, self.family, id);
                let (lo, hi) = match (a.kind, a.extent) {
                    (AxisKind::Inner, extent) => {
                        let extent = extent.unwrap_or(a.nominal(true)).max(1);
                        (extent.next_multiple_of(step), extent.next_multiple_of(256))
                    }
                    (AxisKind::Grid | AxisKind::Stream, _) => (step, LARGEST),
                };
                let domain = Domain::Range { lo: lo as i64, hi: hi as i64, step: step as i64 };
                block = Some(self.model.var(format!("block {}", a.name), domain));
                if a.kind == AxisKind::Grid {
                    cluster = Some(self.model.var(format!("cluster {}", a.name), Domain::range(1, 2)));
                }
            }
            self.vars.block.push(block);
            self.vars.cluster.push(cluster);
        }
        let most = if s.cut.is_some() { self.family.units } else { 1 };
        let least = if s.cut.is_some() { 2 } else { 1 };
        self.vars.units = Some(self.model.var("units", Domain::range(least, most)));
        for c in &s.contractions {
            let name = format!("atom {}", f.ops[c.op].name);
            self.vars.atom.push(self.model.var(name, Domain::Range { lo: 8, hi: self.family.columns, step: 8 }));
        }
        if let rows @ [_, _, ..] = rows_of(s, self.family) {
            self.vars.rows = Some(self.model.var("atom rows", Domain::Values(rows.to_vec())));
        }
        for (i, place) in s.places.iter().enumerate() {
            let t = TileId::new(i);
            let name = self.tile_name(t);
            let streamed = f.writers(t).first().is_some_and(|w| f.ops[*w].stream.is_some());
            let stages = match place {
                Place::Fetched(_) => STAGES as i64,
                Place::Written(_) => 2,
                Place::Registers | Place::Unused => 0,
            };
            let stages =
                (stages > 0 && streamed).then(|| self.model.var(format!("stages {name}"), Domain::range(1, stages)));
            let swizzle =
                place.shared().map(|_| self.model.var(format!("swizzle {name}"), Domain::Values(vec![32, 64, 128])));
            self.vars.stages.push(stages);
            self.vars.swizzle.push(swizzle);
        }
        for l in &s.stores {
            let name = &f.ops[l.op].name;
            let staged = l.staged.map(|_| self.model.var(format!("staged {name}"), flag.clone()));
            let reuses = l.reuses.map(|_| self.model.var(format!("reuses {name}"), flag.clone()));
            self.vars.staged.push(staged);
            self.vars.reuses.push(reuses);
        }
        // A role alone is bound by what a thread may have; among roles one may set more aside than it can use.
        let most = if s.producer { 256 } else { gpu.thread_registers as i64 };
        let own = Domain::Values(std::iter::once(0).chain((24..=most).step_by(8)).collect());
        if s.producer {
            let producer = Domain::Values(vec![0, 24, 32, 40, 48, 56]);
            self.vars.regs.push(self.model.var("regs producer", producer));
        }
        self.vars.regs.push(self.model.var("regs consumer", own));
        // Units that hand tiles to each other in every trip cannot take turns.
        let hands = s.written().any(|t| f.ops[f.writers(t)[0]].stream.is_some());
        if s.cut.is_some() && !hands && self.family.asynchronous() {
            self.vars.ping_pong = Some(self.model.var("ping_pong", flag.clone()));
        }
        if f.streams.iter().any(|x| x.filtered.iter().any(|a| f.axis(*a).kind == AxisKind::Grid)) {
            self.vars.longest = Some(self.model.var("longest_first", flag.clone()));
        }
        for x in &f.streams {
            let name = format!("descending {}", f.axis(x.axis).name);
            self.vars.descending.push(x.turns.then(|| self.model.var(name, flag.clone())));
        }
        if self.orders.len() > 1 {
            self.vars.order = Some(self.model.var("order", Domain::range(0, self.orders.len() as i64 - 1)));
        }
        if self.orders[0].len() > 1 {
            self.vars.group = Some(self.model.var("group", Domain::Values(vec![1, GROUP])));
        }
        if !self.orders[0].is_empty() {
            self.vars.persistent = Some(self.model.var("persistent", Domain::range(0, 1)));
        }
        if f.shared_stream().is_some() {
            self.vars.split = Some(SplitVars {
                parts: self.model.var("parts", Domain::Values(PARTS.to_vec())),
                resident: self.model.var("parts resident", Domain::range(1, self.family.resident)),
                last: self.model.var("merge last_arriver", Domain::range(0, 1)),
            });
        }
    }

    /// How tasks take their blocks, and parts of them.
    fn work(&mut self) {
        let (f, v) = (self.facts, self.vars.clone());
        let is = |x: VarId, n: i64| Expr::Var(x).equals(n);
        if let Some(split) = v.split {
            let cut = is(split.parts, 1).negate();
            // The parts' kernel stores states only, and a task is one part of one block.
            let alone = v.persistent.iter().chain(&v.longest).chain(v.staged.iter().flatten()).map(|x| is(*x, 0));
            let single = v.cluster.iter().flatten().chain(&v.group).map(|x| is(*x, 1));
            let only = Pred::And(alone.chain(single).collect());
            self.model.constrain("parts", cut.clone().implies(only));
            let whole = Pred::And(vec![is(split.resident, 1), is(split.last, 0)]);
            self.model.constrain("whole streams", is(split.parts, 1).implies(whole));
            // Lanes hold whole rows of its states: where they cannot, warps would have to meet in shared memory.
            for a in self.state_rows() {
                let rows = self.block(a).one_of(&[64, 128, 256]);
                self.model
                    .constrain(format!("lanes of the merge along {}", f.axis(a).name), is(split.last, 1).implies(rows));
            }
        }
    }

    /// Inner axes of what parts of the shared stream leave for the merge.
    fn state_rows(&self) -> Vec<AxisId> {
        let f = self.facts;
        let mut axes: Vec<AxisId> = f.states().iter().flat_map(|t| f.tile_axes(*t)).copied().collect();
        axes.sort();
        axes.dedup();
        axes.retain(|a| f.axis(*a).kind == AxisKind::Inner);
        axes
    }

    /// Instruction shapes.
    fn shapes(&mut self) {
        let (f, s) = (self.facts, self.structure);
        // Whole axes of one extent may become one.
        let inner = |a: &AxisId| f.axis(*a).kind == AxisKind::Inner && !f.axis(*a).fixed && s.is_sized(*a);
        let inner: Vec<AxisId> = f.kernel.axes.ids().filter(inner).collect();
        for pair in inner.windows(2) {
            if f.kernel.axes[pair[0]].extent == f.kernel.axes[pair[1]].extent {
                let same = self.block(pair[0]).equals(self.block(pair[1]));
                self.model.constrain(format!("blocks of {} and {}", f.axis(pair[0]).name, f.axis(pair[1]).name), same);
            }
        }
        for (i, c) in s.contractions.iter().enumerate() {
            let name = &f.ops[c.op].name;
            let atom = Expr::Var(self.vars.atom[i]);
            let rows = self.block(c.m).multiple_of(self.rows() * self.cut(c.m));
            self.model.constrain(format!("atom rows of {name}"), rows);
            let columns = self.block(c.n).multiple_of(atom.clone() * self.cut(c.n));
            self.model.constrain(format!("atom columns of {name}"), columns);
            self.model.constrain(format!("atom depth of {name}"), self.block(c.k).multiple_of(DEPTH));
            // Contiguous along the columns: every instruction starts a panel of the swizzle.
            if self.family.asynchronous()
                && s.places[c.b.index()].shared() == Some(c.n)
                && let Some(swizzle) = self.vars.swizzle[c.b.index()]
            {
                let bytes = c.operand.bytes(1) as i64;
                self.model.constrain(format!("panels of {name}"), (atom * bytes).multiple_of(swizzle));
            }
        }
    }

    /// Swizzles and boxes.
    fn shared_tiles(&mut self) {
        let (f, s) = (self.facts, self.structure);
        for (i, place) in s.places.iter().enumerate() {
            let (Some(inner), Some(swizzle)) = (place.shared(), self.vars.swizzle[i]) else { continue };
            let t = TileId::new(i);
            let name = self.tile_name(t);
            let bytes = f.kernel.tiles[t].dtype.bytes(1) as i64;
            self.model.constrain(format!("swizzle of {name}"), (self.block(inner) * bytes).multiple_of(swizzle));
            let own = s.sized_of(f.tile_axes(t));
            let Some(&outer) = own.iter().find(|a| **a != inner) else { continue };
            if matches!(place, Place::Fetched(_)) {
                self.model.constrain(format!("box of {name}"), self.block(outer).at_most(BOX));
                self.least_stages(t, name);
            }
        }
        for (i, l) in s.stores.iter().enumerate() {
            let (Some([x, y]), Some(staged)) = (l.staged, self.vars.staged[i]) else { continue };
            let name = &f.ops[l.op].name;
            let Op::Store { buffer, .. } = f.ops[l.op].op else { continue };
            let bytes = f.plan.buffers[*buffer].dtype.bytes(1) as i64;
            let on = Expr::Var(staged).equals(1);
            // Each unit sends its own part: whole panels, if it cuts the contiguous axis.
            let part = (self.block(y) * bytes).multiple_of(self.cut(y) * 128);
            self.model.constrain(format!("swizzle of {name}"), on.clone().implies(part));
            let rows = self.block(x).at_most(self.cut(x) * BOX);
            self.model.constrain(format!("box of {name}"), on.clone().implies(rows));
            if let (Some(t), Some(reuses)) = (l.reuses, self.vars.reuses[i]) {
                let own = s.sized_of(f.tile_axes(t));
                let same = Pred::And(vec![
                    on,
                    self.block(own[1]).equals(self.block(y)),
                    self.vars.swizzle[t.index()].map_or(Pred::Bool(false), |w| Expr::Var(w).equals(128)),
                ]);
                let taken = Expr::Var(reuses).equals(1);
                self.model.constrain(format!("memory that {name} reuses"), taken.implies(same));
            }
        }
    }

    /// Copies that a role needs to run ahead of itself.
    fn least_stages(&mut self, t: TileId, name: &str) {
        let s = self.structure;
        let Some(stages) = self.vars.stages[t.index()] else { return };
        // A sum that nothing else touches stays in flight into the next trip, and holds its operands until then.
        let open = s.contractions.iter().any(|c| {
            let stream = self.facts.ops[c.op].stream;
            let mut others = self.facts.ops.iter().enumerate().filter(|(i, o)| *i != c.op && o.stream == stream);
            (c.a == t || c.b == t) && stream.is_some() && !others.any(|(_, o)| o.touches(c.out))
        });
        let least = match (s.producer, s.schedule) {
            (true, _) => 1 + i64::from(open),
            (false, Schedule::Plain | Schedule::Overlapped) if !self.family.asynchronous() => 1,
            (false, Schedule::Plain | Schedule::Overlapped) => 2,
            (false, Schedule::Prefetched(ahead)) => ahead as i64 + 1,
        };
        if least > 1 {
            self.model.constrain(format!("stages of {name}"), Expr::Const(least).at_most(stages));
        }
        // A unit whose turn is later still reads the stage before the one that the first unit waits for.
        if let Some(p) = self.vars.ping_pong {
            let two = (Expr::Const(1) + p).at_most(stages);
            self.model.constrain(format!("turns around {name}"), two);
        }
    }

    fn clusters(&mut self, gpu: &Gpu) {
        let (f, s) = (self.facts, self.structure);
        let all: Vec<(AxisId, VarId)> =
            f.kernel.axes.ids().filter_map(|a| self.vars.cluster[a.index()].map(|v| (a, v))).collect();
        if all.is_empty() {
            return;
        }
        let product = Expr::Product(all.iter().map(|(_, v)| Expr::Var(*v)).collect());
        self.model.constrain("cluster", product.at_most(2.min(gpu.max_cluster as i64)));
        for (a, v) in all {
            let on = Expr::Var(v).equals(2);
            let name = &f.axis(a).name;
            // Tasks that share copies make the same trips, and something must be shared.
            let differs = f.streams.iter().any(|x| x.filtered.contains(&a));
            let shared: Vec<TileId> = s.fetched().filter(|t| !f.tile_axes(*t).contains(&a)).collect();
            if differs || shared.is_empty() {
                self.model.constrain(format!("cluster along {name}"), on.negate());
                continue;
            }
            for t in shared {
                let inner = s.places[t.index()].shared();
                let own = s.sized_of(f.tile_axes(t));
                let Some(&outer) = own.iter().find(|x| Some(**x) != inner) else { continue };
                let label = format!("multicast of {}", self.tile_name(t));
                self.model.constrain(label, on.clone().implies(self.block(outer).multiple_of(16)));
            }
        }
    }

    /// Registers per thread of a fragment.
    fn registers(&self, x: &Fragment) -> Expr {
        let bits = i64::from(x.dtype.bits());
        // Four lanes share a row, and every element of a whole fragment has one thread.
        let threads = self.family.threads();
        match x.held {
            Held::Scalar => Expr::Const((bits + 31) / 32),
            Held::Rows(a) => (self.block(a) * bits).ceil_div(self.cut(a) * (8 * threads)),
            Held::Columns(a) => (self.block(a) * bits).ceil_div(self.cut(a) * 128),
            Held::Whole(a, b) => Expr::Product(vec![self.block(a), self.block(b), Expr::Const(bits)])
                .ceil_div(Expr::Product(vec![self.cut(a), self.cut(b), Expr::Const(32 * threads)])),
        }
    }

    fn shared_bytes(&self) -> Expr {
        let (f, s) = (self.facts, self.structure);
        let mut terms = Vec::new();
        for (i, place) in s.places.iter().enumerate() {
            if place.shared().is_none() {
                continue;
            }
            let t = TileId::new(i);
            let mut size: Vec<Expr> = s.sized_of(f.tile_axes(t)).into_iter().map(|a| self.block(a)).collect();
            size.push(Expr::Const(f.kernel.tiles[t].dtype.bytes(1) as i64));
            let stages = self.vars.stages[i].map_or(Expr::Const(1), Expr::Var);
            terms.push(Expr::Product(vec![Expr::Product(size).ceil_div(REPEAT), Expr::Const(REPEAT), stages.clone()]));
            // A full and an empty barrier per stage.
            terms.push(stages * 16);
        }
        for (i, l) in s.stores.iter().enumerate() {
            let (Some([x, y]), Some(staged)) = (l.staged, self.vars.staged[i]) else { continue };
            let Op::Store { buffer, .. } = f.ops[l.op].op else { continue };
            let bytes = f.plan.buffers[*buffer].dtype.bytes(1) as i64;
            let size = Expr::Product(vec![self.block(x), self.block(y), Expr::Const(bytes)]).ceil_div(REPEAT) * REPEAT;
            let own = self.vars.reuses[i].map_or(Expr::Const(1), |r| Expr::Const(1) - r);
            terms.push(Expr::Product(vec![size, Expr::Var(staged), own]));
        }
        if let Some(most) = self.exchanged() {
            // Two copies a unit of what one reduction's results take.
            terms.push(Expr::Product(vec![most, self.units(), Expr::Const(2 * EXCHANGE_BYTES as i64)]));
        }
        Expr::Sum(terms)
    }

    /// 32-bit values per thread that the warps of a unit exchange at most for one reduction over the rows they share out.
    fn exchanged(&self) -> Option<Expr> {
        let (f, s) = (self.facts, self.structure);
        let crosses = |at: &usize| {
            let Op::Reduce { over, .. } = f.ops[*at].op else { return None };
            match frame_of(f, s, *at)? {
                Held::Whole(rows, columns) if over.contains(&rows) => {
                    let kept = if over.contains(&columns) { Held::Scalar } else { Held::Columns(columns) };
                    Some(self.registers(&Fragment { held: kept, dtype: DType::F32 }))
                }
                Held::Rows(rows) if over.contains(&rows) => Some(Expr::Const(1)),
                Held::Whole(..) | Held::Rows(_) | Held::Columns(_) | Held::Scalar => None,
            }
        };
        let all: Vec<Expr> = (0..f.ops.len()).filter_map(|i| crosses(&i)).collect();
        (self.family.scope == Scope::Warpgroup && !all.is_empty()).then_some(Expr::Max(all))
    }

    /// Registers per thread that the widest instruction wants at the start of a kernel.
    pub fn widest(&self, values: &[i64]) -> u64 {
        let operand = |c: &Contraction| if self.structure.places[c.a.index()] == Place::Registers { 4 } else { 0 };
        if !self.family.asynchronous() {
            return 0;
        }
        let each = self.structure.contractions.iter().zip(&self.vars.atom);
        each.map(|(c, n)| values[n.idx()].max(0) as u64 / 2 + operand(c) + INSTRUCTION_OVERHEAD).max().unwrap_or(0)
    }

    /// Registers per thread of the operands that a synchronous instruction is given: a step of the left one's rows where
    /// they come from memory, and two neighbouring instructions' columns.
    fn operands(&self) -> Expr {
        if self.family.asynchronous() {
            return Expr::Const(0);
        }
        let s = self.structure;
        let left = s.contractions.iter().filter(|c| s.places[c.a.index()] != Place::Registers).map(|c| {
            let bits = i64::from(c.operand.bits()) * DEPTH;
            (self.block(c.m) * bits).ceil_div(self.cut(c.m) * (32 * self.family.threads()))
        });
        let mut all: Vec<Expr> = left.collect();
        all.push(Expr::Const(0));
        Expr::Max(all) + 4
    }

    /// Registers per thread of the rows that instructions compute between those kept: as many as accumulators and operands
    /// have where an instruction of 64 rows keeps 32.
    fn between(&self) -> Expr {
        let (f, s) = (self.facts, self.structure);
        let each = |c: &Contraction| {
            let sum = self.registers(&Fragment { held: Held::Whole(c.m, c.n), dtype: f.kernel.tiles[c.out].dtype });
            let operand = self.registers(&Fragment { held: Held::Whole(c.m, c.k), dtype: c.operand });
            if s.places[c.a.index()] == Place::Registers { sum + operand } else { sum }
        };
        let all = Expr::Sum(s.contractions.iter().map(each).collect());
        let times = Expr::Const(self.family.rows[0]) / self.rows() - 1;
        Expr::Product(vec![all, times])
    }

    fn resources(&mut self, gpu: &Gpu) {
        let (f, s) = (self.facts, self.structure);
        self.model.constrain("shared memory", self.shared.clone().at_most(gpu.shared_per_task as i64));
        // The assembler shares registers out among whole warpgroups: the producer's warp counts as four.
        let own = i64::from(s.producer) * 128;
        let threads = (self.units() * self.family.threads()).ceil_div(128) * 128 + own;
        self.model.constrain("threads", threads.clone().at_most(gpu.threads_per_task as i64));
        // Budgets: set for both roles, or shared out evenly by eights.
        let even = (Expr::Const(gpu.registers as i64) / (threads.clone() * 8)) * 8;
        let mut budget = Expr::Min(vec![even, Expr::Const(gpu.thread_registers as i64)]);
        // A budget of 0 stands for the even share.
        let set = |c: Expr, even: Expr| {
            let unset = Expr::Const(1) - Expr::Min(vec![c.clone(), Expr::Const(1)]);
            Expr::Min(vec![c, Expr::Const(gpu.thread_registers as i64)]) + unset * even
        };
        if let [consumer] = self.vars.regs[..] {
            let c = Expr::Var(consumer);
            let all = c.clone() * threads;
            self.model.constrain("registers of the task", all.at_most(gpu.registers as i64));
            budget = set(c, budget);
        }
        if let [producer, consumer] = self.vars.regs[..] {
            let (p, c) = (Expr::Var(producer), Expr::Var(consumer));
            let both = Pred::Iff(Box::new(p.clone().equals(0)), Box::new(c.clone().equals(0)));
            self.model.constrain("register budgets", both);
            // Roles move registers inside what the task starts with: an even share, by eights.
            let groups = self.units() + 1;
            let share = (Expr::Const(gpu.registers as i64) / (groups.clone() * 1024)) * 8;
            let share = Expr::Min(vec![share, Expr::Const((gpu.thread_registers / 8 * 8) as i64)]);
            let all = p + self.units() * c.clone();
            self.model.constrain("registers of the task", all.at_most(share * groups));
            budget = set(c, budget);
        }
        if let Some(split) = self.vars.split {
            // What arrives last joins blocks of parts' states that it holds in registers.
            let least = |n: i64| Expr::Const(n).at_most(budget.clone());
            let last = Expr::Var(split.last).equals(1);
            self.model.constrain("registers of the merge", last.clone().implies(least(MERGE_REGISTERS[0])));
            for a in self.state_rows() {
                let wide = Pred::And(vec![last.clone(), self.block(a).equals(WIDE_STATES)]);
                self.model.constrain("registers of the merge", wide.implies(least(MERGE_REGISTERS[1])));
            }
        }
        let staged: Vec<usize> = s.stores.iter().filter(|l| l.staged.is_some()).map(|l| l.op).collect();
        let mut sets = live_sets(f, s, &staged);
        sets.sort_by_key(|x| std::cmp::Reverse(x.len()));
        let mut needs: Vec<Expr> = Vec::new();
        for set in sets {
            let sum = Expr::Sum(set.iter().map(|x| self.registers(x)).collect());
            if !needs.contains(&sum) {
                needs.push(sum);
            }
        }
        let mut need = if needs.is_empty() { Expr::Const(0) } else { Expr::Max(needs) };
        if let Some(most) = self.exchanged() {
            // What the unit's other warps have of the results.
            need = need + most * 3;
        }
        self.need = need + self.operands() + self.between() + (OVERHEAD as i64 + self.family.addresses);
        self.model.constrain("registers of the consumers", self.need.clone().at_most(budget));
        // One barrier per unit where units hand over shared memory, one where they take turns.
        let hands = s.written().next().is_some() || s.stores.iter().any(|l| l.staged.is_some());
        let mut barriers = if hands { self.units() } else { Expr::Const(0) };
        if let Some(p) = self.vars.ping_pong {
            barriers = barriers + self.units() * p;
        }
        if self.exchanged().is_some() {
            barriers = barriers + self.units();
        }
        self.model.constrain("named barriers", barriers.at_most(gpu.named_barriers as i64));
    }
}

/// Grid axes whose every order is a mapping.
const ORDERED: usize = 5;

/// Orders of the grid axes, and how many of the first are worth trying: as in the kernel, and with the sized ones
/// exchanged or first.
fn orders(f: &Facts<'_>, s: &Structure) -> (Vec<Vec<AxisId>>, usize) {
    let grid: Vec<AxisId> = f.kernel.axes.ids().filter(|a| f.axis(*a).kind == AxisKind::Grid).collect();
    let (sized, rest): (Vec<AxisId>, Vec<AxisId>) = grid.iter().copied().partition(|a| s.is_sized(*a));
    let reversed: Vec<AxisId> = sized.iter().rev().copied().collect();
    let join = |x: &[AxisId], y: &[AxisId]| x.iter().chain(y).copied().collect::<Vec<_>>();
    // What is longest beside the sized axes, so that sections have blocks to walk together.
    let mut long = rest.clone();
    long.sort_by_key(|a| f.axis(*a).extent);
    let mut out = vec![grid];
    let both = [join(&rest, &sized), join(&rest, &reversed), join(&sized, &rest), join(&reversed, &rest)];
    for order in both.into_iter().chain([join(&long, &sized)]) {
        if !out.contains(&order) {
            out.push(order);
        }
    }
    let worth = out.len();
    let mut all: Vec<Vec<AxisId>> = vec![Vec::new()];
    if out[0].len() <= ORDERED {
        for _ in 0..out[0].len() {
            let longer = |o: Vec<AxisId>| {
                let rest: Vec<AxisId> = out[0].iter().copied().filter(|a| !o.contains(a)).collect();
                rest.into_iter().map(move |a| join(&o, &[a])).collect::<Vec<_>>()
            };
            all = all.into_iter().flat_map(longer).collect();
        }
        all.retain(|o| !out.contains(o));
        out.extend(all);
    }
    (out, worth)
}
