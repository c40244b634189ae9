//! emit: the operations of a role as kernel statements, with buffers, fragments and barriers.
//!
//! Invariant: absent elements (tails) read 0 and are never stored; an elementwise tile that a contraction sums over a
//! partial axis is set to 0 beyond the extent, so that what an absent element holds never reaches a sum.

use std::collections::BTreeMap;

use einfall_ir::arena::{Arena, Id};
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{
    Barrier, BarrierId, BarrierKind, Buf, BufId, BufSpace, Engine, Expr, FenceKind, Frag, FragId, GroupKind, Kernel,
    Operand, Role, Stmt, Var, VarId, View,
};
use einfall_ir::layout::Distribution;
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, AxisId, BufferId, ExprId, Op, Space, TileId};

use super::apply_mapping::Facts;
use super::assign_layouts::{domain, operands, orient, renamed};
use super::exprs::{Place, add, size, sub, var};
use super::schedule::{Flow, Group, Iteration};
use super::split_domains::conjuncts;
use super::{Limits, Step, left_out, refuse};
use crate::identity::kernel_constant;
use thread_copies::BLOCK;

mod accesses;
mod copies;
mod reductions;
mod synchronous;
pub(super) mod thread_copies;

/// The kernel being made.
pub(super) struct Emit<'f, 'a> {
    pub f: &'f Facts<'a>,
    k: Kernel,
    /// Device arrays in use, by position in the plan.
    pub global: Vec<Option<BufId>>,
    shared: Vec<Option<BufId>>,
    frags: Vec<Option<FragId>>,
    temps: BTreeMap<String, FragId>,
    full: Vec<Option<BarrierId>>,
    pub empty: Vec<Option<BarrierId>>,
    /// Whether the device has barriers for some of a task's threads.
    names: bool,
    syncs: BTreeMap<usize, BarrierId>,
    turns: BTreeMap<usize, BarrierId>,
    /// Array elements the present operation has read, by their text.
    reads: BTreeMap<String, Expr>,
    /// Shared tiles where units leave parts of reductions.
    meetings: BTreeMap<String, BufId>,
    /// Skew of each operation within its role.
    pub skews: Vec<i64>,
    /// The filter of the stream being emitted.
    pub filter: Option<ExprId>,
    /// Whether the block of the stream being emitted is known to be within the extent and the filter.
    pub inside: bool,
    /// The stream being emitted.
    pub item: Option<usize>,
    /// The role being emitted.
    pub role: usize,
    /// In a work loop: iterations of each stream in the task's earlier blocks.
    pub ring: BTreeMap<usize, VarId>,
    /// Trips of each stream of the role.
    pub trips: BTreeMap<usize, VarId>,
    /// Places in the rings of the stream being emitted, by their number of stages.
    pub rings: BTreeMap<u64, Ring>,
}

/// The place of a trip in rings of one size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ring {
    pub stage: VarId,
    pub parity: VarId,
}

/// Emits the kernel.
///
/// # Errors
/// Operations that have no GPU lowering yet.
pub(super) fn run(f: Facts<'_>, limits: &Limits) -> Step<Kernel> {
    let mut e = Emit::new(&f, limits.named_barriers > 0);
    for r in 0..f.roles.len() {
        let body = e.role(r)?;
        let m = &f.roles[r];
        e.k.roles.push(Role { name: m.role.clone(), scope: m.scope, units: m.units, regs: m.regs, body });
    }
    Ok(e.k)
}

/// Elements of a fragment with their axes.
struct Frame {
    dims: Vec<AxisId>,
    dist: Distribution,
}

impl<'f, 'a> Emit<'f, 'a> {
    fn new(f: &'f Facts<'a>, names: bool) -> Emit<'f, 'a> {
        let mut k = Kernel {
            name: f.kernel.name.clone(),
            variant_of: None,
            assumes: Vec::new(),
            dependent: false,
            grid: Vec::new(),
            cluster: Vec::new(),
            bufs: Arena::new(),
            frags: Arena::new(),
            barriers: Arena::new(),
            vars: Arena::new(),
            roles: Vec::new(),
        };
        (k.grid, k.cluster) = f.launch();
        k.vars = f.vars.clone();
        let global = f
            .plan
            .buffers
            .iter()
            .map(|(id, b)| {
                let (read, written) = used(f, id);
                (read || written).then(|| {
                    let dims = b.dims.iter().map(|d| size(f, d)).collect();
                    let space = BufSpace::Global { param: id.index(), written, together: 1 };
                    k.bufs.push(Buf { name: b.name.clone(), dtype: b.dtype, dims, space })
                })
            })
            .collect();
        let mut shared: Vec<Option<BufId>> = vec![None; f.tiles.len()];
        for (id, t) in f.kernel.tiles.iter() {
            let facts = f.tile(id);
            let used = f.ops.iter().any(|o| o.op.outs().contains(&id));
            if facts.space == Space::Shared && used && f.home(id) == id {
                let layout = facts.layout.clone().expect("assigned to every shared tile");
                let dims = layout.extents().into_iter().map(|e| Expr::Int(e as i64)).collect();
                let space = BufSpace::Shared { layout, stages: facts.mapping.stages };
                shared[id.index()] =
                    Some(k.bufs.push(Buf { name: format!("{}_s", t.name), dtype: t.dtype, dims, space }));
            }
        }
        for id in f.kernel.tiles.ids() {
            if f.tile(id).space == Space::Shared {
                shared[id.index()] = shared[f.home(id).index()];
            }
        }
        let frags = f
            .tiles
            .iter()
            .zip(f.kernel.tiles.iter())
            .map(|(t, (_, own))| {
                let dist = t.dist.clone()?;
                Some(k.frags.push(Frag { name: t.name.clone(), dtype: own.dtype, dist }))
            })
            .collect();
        let (mut full, mut empty) = (Vec::new(), Vec::new());
        for c in &f.channels {
            let writers = if c.engine.is_some() { 1 } else { f.roles[c.producer].units };
            let mut bar = |name: String, count: u64| {
                k.barriers.push(Barrier { name, kind: BarrierKind::Mbarrier { count }, stages: c.stages })
            };
            full.push(c.has_mbarriers().then(|| bar(format!("{}_full", c.name), writers)));
            empty.push(c.needs_empty().then(|| {
                let sharers = f.peers(&c.multicast).len() as u64;
                bar(format!("{}_empty", c.name), f.roles[c.consumer].units * sharers)
            }));
        }
        Emit {
            f,
            k,
            global,
            shared,
            frags,
            temps: BTreeMap::new(),
            full,
            empty,
            names,
            syncs: BTreeMap::new(),
            turns: BTreeMap::new(),
            reads: BTreeMap::new(),
            meetings: BTreeMap::new(),
            skews: vec![0; f.ops.len()],
            filter: None,
            inside: false,
            item: None,
            role: 0,
            ring: BTreeMap::new(),
            trips: BTreeMap::new(),
            rings: BTreeMap::new(),
        }
    }

    /// A new variable; names get a number when taken.
    pub(super) fn var(&mut self, name: &str) -> VarId {
        let taken = |n: &str, k: &Kernel| k.vars.iter().any(|(_, v)| v.name == n);
        let mut unique = name.to_string();
        let mut i = 1;
        while taken(&unique, &self.k) {
            i += 1;
            unique = format!("{name}{i}");
        }
        self.k.vars.push(Var { name: unique })
    }

    fn named(&mut self, name: &str, role: usize, per_stage: u64) -> BarrierId {
        let m = &self.f.roles[role];
        let kind = BarrierKind::Named { threads: m.scope.threads() * per_stage };
        self.k.barriers.push(Barrier { name: format!("{name}_{}", m.role), kind, stages: m.units })
    }

    /// The barrier by which units of a role take turns, if they do.
    pub(super) fn ping_pong(&mut self, role: usize) -> Option<BarrierId> {
        let m = &self.f.roles[role];
        if !m.ping_pong || m.units < 2 {
            return None;
        }
        if let Some(b) = self.turns.get(&role) {
            return Some(*b);
        }
        let b = self.named("turn", role, 2);
        self.turns.insert(role, b);
        Some(b)
    }

    /// All threads of the unit meet; where only a task's threads can, its other units do with them.
    pub(super) fn unit_sync(&mut self, role: usize, out: &mut Vec<Stmt>) {
        if !self.names && self.f.roles.len() == 1 {
            out.push(Stmt::TaskSync);
            return;
        }
        let barrier = match self.syncs.get(&role) {
            Some(b) => *b,
            None => {
                let b = self.named("unit", role, 1);
                self.syncs.insert(role, b);
                b
            }
        };
        out.push(Stmt::NamedSync { barrier, stage: Expr::Unit });
    }

    fn global(&self, b: BufferId) -> BufId {
        self.global[b.index()].expect("arrays in use have a buffer")
    }

    fn frag(&self, t: TileId) -> FragId {
        self.frags[t.index()].expect("register tiles in use have a fragment")
    }

    fn shared(&self, t: TileId) -> BufId {
        self.shared[t.index()].expect("shared tiles in use have a buffer")
    }

    /// A scratch fragment, the same at every expansion of the same operation.
    fn temp(&mut self, key: &str, dtype: DType, dist: &Distribution) -> FragId {
        if let Some(t) = self.temps.get(key) {
            return *t;
        }
        // Names of operations have `.` and `@`, names of fragments do not.
        let mut name: String = key.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        while self.k.frags.iter().any(|(_, f)| f.name == name) {
            name.push('_');
        }
        let t = self.k.frags.push(Frag { name, dtype, dist: dist.clone() });
        self.temps.insert(key.to_string(), t);
        t
    }

    /// The iteration counted over all of the task's blocks.
    fn turn(&self, at: &Iteration) -> Expr {
        match self.item.and_then(|item| self.ring.get(&item)) {
            Some(before) => add(var(*before), at.number()),
            None => at.number(),
        }
    }

    /// The stage of a ring of several that this iteration uses.
    fn stage(&self, channel: usize, at: &Iteration) -> Option<Expr> {
        let stages = self.f.channels[channel].stages;
        (stages > 1).then(|| self.place_in_ring(channel, at).0)
    }

    /// The parity of the phase that ends when the stage is filled for this iteration.
    fn phase(&self, channel: usize, at: &Iteration) -> Expr {
        self.place_in_ring(channel, at).1
    }

    /// Stage and parity. In a stream they are variables that go on with every trip; what is behind is looked back for.
    fn place_in_ring(&self, channel: usize, at: &Iteration) -> (Expr, Expr) {
        let ch = &self.f.channels[channel];
        let stages = ch.stages as i64;
        let Some(ring) = ch.stream.and_then(|_| self.rings.get(&ch.stages)) else {
            let turn = match &self.f.work_loop {
                Some(w) if w.persistent => var(w.roles[self.role].round),
                Some(_) | None => Expr::Int(0),
            };
            let phase = turn.clone().bin(BinaryOp::Div, Expr::Int(stages)).bin(BinaryOp::Mod, Expr::Int(2));
            return (if stages > 1 { turn.bin(BinaryOp::Mod, Expr::Int(stages)) } else { Expr::Int(0) }, phase);
        };
        // Whole rounds back only turn the parity.
        let (rounds, back) = (at.rel.div_euclid(stages), at.rel.rem_euclid(stages));
        let odd = |x: Expr| sub(Expr::Int(1), x);
        let parity = if rounds.rem_euclid(2) == 1 { odd(var(ring.parity)) } else { var(ring.parity) };
        if back == 0 {
            return (if stages > 1 { var(ring.stage) } else { Expr::Int(0) }, parity);
        }
        let stage = add(var(ring.stage), Expr::Int(back));
        let wraps = Expr::Int(stages).bin(BinaryOp::Le, stage.clone());
        let select = |a, b| Expr::Select(Box::new(wraps.clone()), Box::new(a), Box::new(b));
        (select(sub(stage.clone(), Expr::Int(stages)), stage), select(odd(parity.clone()), parity))
    }

    /// Waits until the stage is filled, unless that is known.
    pub(super) fn wait_full(&mut self, channel: usize, at: &Iteration, flow: &mut Flow, out: &mut Vec<Stmt>) {
        let meets = self.f.channels[channel].meets;
        let rel = if at.trip.is_some() { at.rel } else { BLOCK };
        if (meets || at.trip.is_some()) && !flow.filled.insert((channel, rel)) {
            return;
        }
        if meets {
            self.role_sync(self.f.channels[channel].consumer, out);
            flow.copies.read.clear();
        }
        let Some(barrier) = self.full[channel] else { return };
        let stage = self.stage(channel, at).unwrap_or(Expr::Int(0));
        out.push(Stmt::Wait { barrier, stage, phase: self.phase(channel, at) });
    }

    fn wait_empty(&self, channel: usize, at: &Iteration, out: &mut Vec<Stmt>) {
        if let Some(barrier) = self.empty[channel] {
            let stage = self.stage(channel, at).unwrap_or(Expr::Int(0));
            let phase = sub(Expr::Int(1), self.phase(channel, at));
            out.push(Stmt::Wait { barrier, stage, phase });
        }
    }

    /// Gives a stage back to whoever fills it.
    pub(super) fn release(&self, channel: usize, at: &Iteration, out: &mut Vec<Stmt>) {
        let Some(barrier) = self.empty[channel] else { return };
        let stage = self.stage(channel, at).unwrap_or(Expr::Int(0));
        let peers = self.f.peers(&self.f.channels[channel].multicast);
        let alone = peers.len() == 1;
        for rank in peers {
            let remote = (!alone).then_some(rank);
            out.push(Stmt::Arrive { barrier, stage: stage.clone(), expect_bytes: None, remote });
        }
    }

    /// Gives a stage back, unless a staging tile takes its place first: then after that has left.
    pub(super) fn release_block(&self, channel: usize, at: &Iteration, out: &mut Vec<Stmt>) {
        if self.taken_over(channel).is_none() {
            self.release(channel, at, out);
        }
    }

    /// The staging tile that takes the place of a channel's tile.
    pub(super) fn taken_over(&self, channel: usize) -> Option<TileId> {
        let f = self.f;
        let tiles = &f.channels[channel].tiles;
        f.kernel.tiles.ids().find(|t| f.home(*t) != *t && tiles.contains(&f.home(*t)))
    }

    /// Channels filled once per block that `ops` read.
    pub(super) fn stationary(&self, ops: &[usize]) -> Vec<usize> {
        let read = |c: usize| {
            let tiles = &self.f.channels[c].tiles;
            ops.iter().any(|i| self.f.reads(self.f.ops[*i].op).iter().any(|t| tiles.contains(t)))
        };
        (0..self.f.channels.len()).filter(|c| self.f.channels[*c].stream.is_none() && read(*c)).collect()
    }

    /// Whether the operation is different in blocks that need no mask.
    pub(super) fn sensitive(&self, i: usize, axis: AxisId, filter: Option<ExprId>) -> bool {
        let f = self.f;
        let mut selects = false;
        for root in f.ops[i].op.roots() {
            f.kernel.walk(root, &mut |_, e| {
                if let tile::Expr::Select(c, _, _) = e {
                    selects |= implied(f, filter, *c);
                }
            });
        }
        let tail = !f.axis(axis).exact;
        let sums = match f.ops[i].op {
            Op::Reduce { out, over, op, value, .. } => {
                let nothing = op.identity_of(f.kernel.tiles[out[0]].dtype);
                over.contains(&axis) && !self.absorbs(i, *value, axis, filter, nothing)
            }
            Op::Map { out, value } => summed(f, *out).contains(&axis) && !self.absorbs(i, *value, axis, filter, 0.0),
            Op::Load { .. } | Op::Store { .. } | Op::Contract { .. } | Op::Scan { .. } => false,
        };
        selects || (tail && sums)
    }

    /// Whether absent elements along `axis` of a value are `nothing` without a mask, because the filter leaves them out.
    fn absorbs(&self, i: usize, value: ExprId, axis: AxisId, filter: Option<ExprId>, nothing: f64) -> bool {
        let f = self.f;
        filter.is_some_and(|e| left_out::covers(f, e, axis) && left_out::value(f, e, i, value) == Some(nothing))
    }

    /// Emits operation `i` at `place`.
    pub(super) fn op(
        &mut self,
        i: usize,
        place: &Place,
        at: &Iteration,
        flow: &mut Flow,
        out: &mut Vec<Stmt>,
    ) -> Step<()> {
        let f = self.f;
        let op = f.ops[i].op;
        self.reads.clear();
        // Stages it reads have been filled.
        for c in 0..f.channels.len() {
            let ch = &f.channels[c];
            let reads = f.reads(op).iter().any(|t| ch.tiles.contains(t));
            if reads && !ch.by_threads() && (ch.stream.is_some() || self.item.is_none()) {
                // Whoever fills it goes through the rings in order: it must not wait for a stage that this unit holds.
                let stages = |c: usize| f.channels[c].stages as i64;
                self.settle_where(flow, at, out, |g| g.releases.iter().any(|r| r.1 <= at.rel - stages(r.0)));
                self.wait_full(c, at, flow, out);
            }
        }
        let stages = self.stages_read(i, at.rel);
        // What is filled once has been awaited when the stream began, or with its first group.
        let own = |s: &&(usize, i64)| self.item.is_none() || s.1 != BLOCK;
        let due: Vec<(usize, i64)> = stages.iter().filter(own).copied().collect();
        self.await_copies(&due, flow, out)?;
        flow.copies.read.extend(stages);
        flow.copies.read.extend(self.single_copies(i, at.rel));
        // Registers it touches belong to no group in flight.
        if !matches!(op, Op::Contract { .. }) {
            let reads: Vec<FragId> = f.reads(op).iter().filter_map(|t| self.frags[t.index()]).collect();
            let writes: Vec<FragId> = op.outs().iter().filter_map(|t| self.frags[t.index()]).collect();
            self.settle_where(flow, at, out, |g| {
                g.accs.iter().any(|a| reads.contains(a) || writes.contains(a))
                    || g.sources.iter().any(|s| writes.contains(s))
            });
            flow.touch(&reads);
            flow.touch(&writes);
        }
        match op {
            Op::Load { out: t, buffer, at: position } => {
                if f.tile(*t).space == Space::Shared && f.tile(*t).mapping.engine == Some(Engine::CpAsync) {
                    self.load_by_threads(i, *t, *buffer, position, place, at, flow, out)?;
                } else if f.tile(*t).space == Space::Shared {
                    self.load_shared(i, *t, *buffer, position, place, at, out)?;
                } else {
                    self.load_registers(i, *t, *buffer, position, place, out)?;
                }
            }
            Op::Map { out: t, value } if f.tile(*t).space == Space::Shared => {
                self.map_shared(i, *t, *value, place, at, flow, out)?;
            }
            // A value that is its own tile's stays where it is.
            Op::Map { out: t, value } if self.is_own(*t, *value, place) => {}
            Op::Map { out: t, value } => {
                let dims = f.tile(*t).dims.clone();
                let frame = Frame { dist: f.tile(*t).dist.clone().expect("assigned"), dims };
                let value = self.masked(i, *t, *value, &frame, place, at, out)?;
                out.push(Stmt::Map { out: self.frag(*t), value });
            }
            Op::Reduce { .. } => self.reduce(i, place, at, out)?,
            Op::Contract { .. } => self.contract(i, place, at, flow, out)?,
            Op::Store { buffer, at: position, axes, value, join, when } => {
                if f.ops[i].mapping.engine == Some(Engine::Tma) {
                    let tile::Expr::Tile(t) = f.kernel.exprs[*value] else {
                        return refuse("store engine", "the stored value is not staged", "run stage-stores first");
                    };
                    flow.bulk = self.store_engine(i, t, *buffer, position, place, at, out)?;
                } else {
                    self.store_registers(i, *buffer, position, axes, *value, *join, *when, place, at, out)?;
                }
            }
            Op::Scan { .. } => self.scan(i, place, at, out)?,
        }
        // Stages it is the last to read are free, unless a group still reads them.
        if !matches!(op, Op::Contract { .. }) {
            for c in 0..f.channels.len() {
                // A tile that outlives the stream is released after it.
                let here = f.channels[c].stream.is_some() || self.item.is_none();
                if f.channels[c].last_reader == i && here && self.empty[c].is_some() {
                    flow.filled.remove(&(c, at.rel));
                    self.release_block(c, at, out);
                }
            }
        }
        Ok(())
    }

    /// The dimensions an elementwise operation ranges over, held as one of its register tiles says.
    fn frame(&self, i: usize) -> Step<Frame> {
        let f = self.f;
        let want = domain(f, i);
        for t in operands(f, i) {
            let facts = f.tile(t);
            if let Some(dist) = &facts.dist
                && facts.dims.len() == want.len()
                && want.iter().all(|a| facts.dims.contains(a))
            {
                return Ok(Frame { dims: facts.dims.clone(), dist: dist.clone() });
            }
        }
        let spread = f.spreads.get(f.ops[i].role).and_then(|s| s.over(&want));
        if let Some(dist) = spread {
            return Ok(Frame { dims: want, dist });
        }
        let message = format!("nothing says how the elements of {} are distributed", f.ops[i].name);
        refuse("distribution", message, "block all but a few of its axes to 1")
    }

    /// The value of a tile; 0 beyond the extents that a contraction sums it over.
    #[allow(clippy::too_many_arguments)]
    fn masked(
        &mut self,
        i: usize,
        t: TileId,
        value: ExprId,
        frame: &Frame,
        place: &Place,
        at: &Iteration,
        out: &mut Vec<Stmt>,
    ) -> Step<Expr> {
        let f = self.f;
        let mut v = self.value(i, value, frame, place, at, out)?;
        let renames = renamed(f, i);
        for a in summed(f, t) {
            let own = renames.iter().find(|(to, _)| *to == a).map_or(a, |(_, own)| *own);
            if f.axis(a).exact || (!place.checked && is_walked(place, a)) {
                continue;
            }
            if is_walked(place, a) && own == a && self.absorbs(i, value, a, self.filter, 0.0) {
                continue;
            }
            if let Some(d) = frame.dims.iter().position(|x| *x == own) {
                let inside = add(f.origin(own, place), Expr::Coord(d)).bin(BinaryOp::Lt, f.extent(own));
                v = Expr::Select(
                    Box::new(inside),
                    Box::new(v),
                    Box::new(kernel_constant(0.0, f.kernel.tiles[t].dtype)),
                );
            }
        }
        Ok(v)
    }

    /// Whether the value is the tile itself, once selections that the stream's filter decides are made, and nothing of
    /// it is absent.
    fn is_own(&self, t: TileId, value: ExprId, place: &Place) -> bool {
        let f = self.f;
        let partial = |a: &AxisId| !f.axis(*a).exact && (place.checked || !is_walked(place, *a));
        match &f.kernel.exprs[value] {
            tile::Expr::Tile(own) => *own == t && !summed(f, t).iter().any(partial),
            tile::Expr::Select(c, a, _) if !place.checked && implied(f, self.filter, *c) => self.is_own(t, *a, place),
            _ => false,
        }
    }

    /// An elementwise expression over `frame`.
    fn value(
        &mut self,
        i: usize,
        e: ExprId,
        frame: &Frame,
        place: &Place,
        at: &Iteration,
        out: &mut Vec<Stmt>,
    ) -> Step<Expr> {
        let f = self.f;
        let renames = renamed(f, i);
        let own = |a: AxisId| renames.iter().find(|(to, _)| *to == a).map_or(a, |(_, own)| *own);
        let boxed = |x: Expr| Box::new(x);
        Ok(match &f.kernel.exprs[e] {
            tile::Expr::Int(n) => Expr::Int(*n),
            tile::Expr::Float(x) => Expr::Float(*x),
            tile::Expr::Size(s) => size(f, s),
            tile::Expr::Coord(a) => match frame.dims.iter().position(|d| *d == own(*a)) {
                Some(d) => add(f.origin(own(*a), place), Expr::Coord(d)),
                None => f.origin(own(*a), place),
            },
            tile::Expr::Tile(t) | tile::Expr::TileAt { tile: t, .. } => {
                if let tile::Expr::TileAt { at, .. } = &f.kernel.exprs[e]
                    && at.iter().any(|p| matches!(p, tile::Place::At(_)))
                {
                    let message = format!("{} reads one coordinate of a register tile", f.ops[i].name);
                    return refuse("fixed coordinates", message, "split the axis into one tile per coordinate");
                }
                self.tile_value(i, *t, frame, place, at, out)?
            }
            tile::Expr::Read { buffer, at: position } if position.is_empty() => Expr::Scalar(self.global(*buffer)),
            tile::Expr::Read { buffer, at: position } => self.read(i, *buffer, position, frame, place, at, out)?,
            tile::Expr::Unary(op, a) => Expr::Unary(*op, boxed(self.value(i, *a, frame, place, at, out)?)),
            tile::Expr::Binary(op, a, b) => {
                let a = self.value(i, *a, frame, place, at, out)?;
                let b = self.value(i, *b, frame, place, at, out)?;
                a.bin(*op, b)
            }
            tile::Expr::Select(c, a, _) if !place.checked && implied(f, self.filter, *c) => {
                self.value(i, *a, frame, place, at, out)?
            }
            tile::Expr::Select(c, a, b) => {
                let c = self.value(i, *c, frame, place, at, out)?;
                let a = self.value(i, *a, frame, place, at, out)?;
                let b = self.value(i, *b, frame, place, at, out)?;
                Expr::Select(boxed(c), boxed(a), boxed(b))
            }
            tile::Expr::Cast(d, a) => Expr::Cast(*d, boxed(self.value(i, *a, frame, place, at, out)?)),
            tile::Expr::Rand(of) => {
                let mut values = [const { Expr::Int(0) }; 5];
                for (v, e) in values.iter_mut().zip(of) {
                    *v = self.value(i, *e, frame, place, at, out)?;
                }
                Expr::Rand(Box::new(values))
            }
        })
    }

    /// The elements of a tile over `frame`: its fragment, or a load of its part of shared memory.
    fn tile_value(
        &mut self,
        i: usize,
        t: TileId,
        frame: &Frame,
        place: &Place,
        at: &Iteration,
        out: &mut Vec<Stmt>,
    ) -> Step<Expr> {
        let f = self.f;
        let find = |a: &AxisId| frame.dims.iter().position(|d| d == a);
        let dims: Option<Vec<usize>> = f.tile(t).dims.iter().map(find).collect();
        let Some(dims) = dims else {
            let message = format!("{} uses {} over axes it does not range over", f.ops[i].name, f.tile(t).name);
            return refuse("distribution", message, "pass the tile through shared memory");
        };
        if f.tile(t).space == Space::Registers {
            return Ok(Expr::Frag { frag: self.frag(t), dims });
        }
        let dist = frame.dist.project(&dims);
        let temp = self.temp(&format!("{}_{}", f.ops[i].name, f.tile(t).name), f.kernel.tiles[t].dtype, &dist);
        let stage = f.channel(t).and_then(|c| self.stage(c, at));
        let origin = f.tile(t).dims.iter().map(|a| f.unit_offset(*a, place.role)).collect();
        let walk = (0..dims.len()).map(|d| Some((d, 1))).collect();
        let src = View { buf: self.shared(t), stage, at: origin, walk };
        out.push(Stmt::Load { out: temp, src, bounds: Vec::new() });
        Ok(Expr::Frag { frag: temp, dims })
    }

    fn contract(&mut self, i: usize, place: &Place, at: &Iteration, flow: &mut Flow, out: &mut Vec<Stmt>) -> Step<()> {
        let f = self.f;
        let o = orient(f, i)?;
        let Op::Contract { out: t, carry, .. } = f.ops[i].op else {
            return refuse("atoms", "not a contraction", "this is a fault of the compiler");
        };
        if !o.atom.asynchronous {
            return self.contract_now(i, &o, place, at, out);
        }
        self.reads_what_threads_copied(i)?;
        let acc = self.frag(*t);
        let registers = f.tile(o.a).space == Space::Registers;
        let a_frag = registers.then(|| self.frag(o.a));
        // Accumulating groups complete in order; every other use of these registers must have ended.
        self.settle_where(flow, at, out, |g| g.sources.contains(&acc) || a_frag.is_some_and(|a| g.accs.contains(&a)));
        let registers_used: Vec<FragId> = a_frag.into_iter().chain([acc]).collect();
        if flow.fence(&registers_used) {
            out.push(Stmt::Fence(FenceKind::Wgmma));
        }
        let [m, n, k] = o.atom.shape;
        let view = |e: &Self, t: TileId, walk: [AxisId; 2], offset: [(AxisId, u64); 2]| {
            let dims = &f.tile(t).dims;
            let place_of = |a: AxisId| dims.iter().position(|d| *d == a).map(|d| (d, 1));
            let origin = dims.iter().map(|d| {
                let first = offset.iter().find(|(a, _)| a == d).map_or(0, |x| x.1);
                // Summed axes are whole in every unit.
                let unit = if *d == o.k { Expr::Int(0) } else { f.unit_offset(*d, place.role) };
                add(unit, Expr::Int(first as i64))
            });
            let stage = f.channel(t).and_then(|c| e.stage(c, at));
            View { buf: e.shared(t), stage, at: origin.collect(), walk: walk.map(place_of).to_vec() }
        };
        for mi in 0..o.extents[0] / m {
            for ni in 0..o.extents[1] / n {
                for ki in 0..o.extents[2] / k {
                    let a = match a_frag {
                        Some(frag) => Operand::Frag { frag, from: vec![mi * m, ki * k] },
                        None => Operand::Mem(view(self, o.a, [o.m, o.k], [(o.m, mi * m), (o.k, ki * k)])),
                    };
                    let b = Operand::Mem(view(self, o.b, [o.k, o.n], [(o.k, ki * k), (o.n, ni * n)]));
                    let keep = Expr::Int(i64::from(*carry || ki > 0));
                    let atom = o.atom.name.clone();
                    out.push(Stmt::Atom { atom, acc, acc_from: vec![mi * m, ni * n], a, b, keep });
                }
            }
        }
        let freed = (0..f.channels.len())
            .filter(|c| f.channels[*c].last_reader == i && self.empty[*c].is_some())
            .filter(|c| f.channels[*c].stream.is_some() || self.item.is_none())
            .map(|c| (c, at.rel))
            .collect();
        out.push(Stmt::Commit(GroupKind::Wgmma));
        flow.groups.push(Group { accs: vec![acc], sources: a_frag.into_iter().collect(), releases: freed, since: 0 });
        // With more than one older group of the same accumulator in flight nothing is gained: their operands are done.
        if flow.groups.len() > 1 && flow.groups.iter().all(|g| g.accs == vec![acc]) {
            let older = flow.groups.len() - 2;
            self.settle(flow, older, at.trip, out);
        }
        Ok(())
    }
}

fn is_walked(place: &Place, a: AxisId) -> bool {
    place.block.as_ref().is_some_and(|(axis, _)| *axis == a)
}

/// Axes that contractions sum the tile over.
fn summed(f: &Facts<'_>, t: TileId) -> Vec<AxisId> {
    let mut axes = Vec::new();
    for o in &f.ops {
        if let Op::Contract { a, b, over, .. } = o.op
            && (*a == t || *b == t)
        {
            axes.extend(over.iter().copied().filter(|x| f.kernel.tiles[t].axes.contains(x)));
        }
    }
    axes
}

/// Whether the filter of the stream says that `cond` holds.
fn implied(f: &Facts<'_>, filter: Option<ExprId>, cond: ExprId) -> bool {
    let Some(filter) = filter else { return false };
    let text = |e: ExprId| tile::print::expr_text(f.plan, f.kernel, e);
    let (mut known, mut asked) = (Vec::new(), Vec::new());
    conjuncts(f, filter, &mut known);
    conjuncts(f, cond, &mut asked);
    let known: Vec<String> = known.into_iter().map(text).collect();
    asked.into_iter().all(|e| known.contains(&text(e)))
}

/// Whether the kernel reads or stores to the array.
fn used(f: &Facts<'_>, id: BufferId) -> (bool, bool) {
    let mut read = f.kernel.exprs.iter().any(|(_, e)| matches!(e, tile::Expr::Read { buffer, .. } if *buffer == id));
    let mut written = false;
    for o in &f.ops {
        match o.op {
            Op::Load { buffer, .. } => read |= *buffer == id,
            Op::Store { buffer, .. } => written |= *buffer == id,
            Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {}
        }
    }
    (read, written)
}
