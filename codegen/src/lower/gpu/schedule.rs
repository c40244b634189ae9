//! The modulo scheduler: skews and slots become a prologue, a steady loop and an epilogue, with every wait in place.
//!
//! An operation of skew s does iteration `trip − s` in a trip of the loop; within a trip operations go by slot, then by
//! the kernel's order. So softmax of one tile overlapping the contractions of the next, software prefetching and
//! double buffering are numbers in the mapping. wgmma groups in flight are tracked: before a register tile is touched
//! the newest group that owns it is awaited, with as many groups left pending as came after it, and what that group
//! read is released then. A group may stay open into the next trip if every trip leaves the same groups open (the
//! first trip is peeled to get there, or shares its code with those that need masks: [`shared`]); otherwise trips end by
//! waiting. Short streams that cannot fill the pipeline take a plain loop. A schedule that would need two copies of a
//! register tile is refused. Invariant: register tiles are only touched when no group owns them, and a stage is released
//! exactly once, after its last reader. Source: modulo scheduling, Rau 1994; FlashAttention-3 §3 for the overlaps.

use std::collections::BTreeSet;

use einfall_ir::arena::Id;
use einfall_ir::kernel::{Expr, FragId, GroupKind, Stmt, VarId};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, AxisId, AxisKind, BufferId, ExprId, Op, Space};

use super::apply_mapping::{Facts, Item};
use super::emit::thread_copies::{BLOCK, Copies, later};
use super::emit::{Emit, Ring};
use super::exprs::{Place, add, max, min, sub, var};
use super::split_domains::domain;
use super::work_loop::RoleWork;
use super::{Step, refuse};

mod shared;

/// A committed wgmma group that has not been awaited.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Group {
    /// Accumulators it writes.
    pub accs: Vec<FragId>,
    /// Register operands it reads.
    pub sources: Vec<FragId>,
    /// Channels to release then, each with its iteration relative to the present trip.
    pub releases: Vec<(usize, i64)>,
    /// The first trip that has it: in earlier ones it was not issued.
    pub since: i64,
}

/// What is in flight at a point of a role's code.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Flow {
    pub groups: Vec<Group>,
    /// Whether bulk stores may be in flight.
    pub bulk: bool,
    /// Fragments used by other statements since the last `wgmma.fence`, if there was one.
    pub touched: Option<BTreeSet<FragId>>,
    /// Channels known to be filled, each with its iteration relative to the present trip.
    pub filled: BTreeSet<(usize, i64)>,
    /// Copies by threads.
    pub copies: Copies,
}

impl Flow {
    /// Notes that statements other than wgmma use the fragments.
    pub fn touch(&mut self, frags: &[FragId]) {
        if let Some(t) = &mut self.touched {
            t.extend(frags);
        }
    }

    /// Whether the registers need a fence before wgmma uses them; if so it counts as placed.
    pub fn fence(&mut self, frags: &[FragId]) -> bool {
        let needed = self.touched.as_ref().is_none_or(|t| frags.iter().any(|f| t.contains(f)));
        if needed {
            self.touched = Some(BTreeSet::new());
        }
        needed
    }

    /// What holds where control flow from both places meets; groups must agree.
    fn meet(&self, other: &Flow) -> Option<Flow> {
        let touched = match (&self.touched, &other.touched) {
            (Some(a), Some(b)) => Some(a.union(b).copied().collect()),
            _ => None,
        };
        let filled = self.filled.intersection(&other.filled).copied().collect();
        let copies = self.copies.meet(&other.copies)?;
        (self.groups == other.groups).then(|| Flow {
            groups: self.groups.clone(),
            bulk: self.bulk || other.bulk,
            touched,
            filled,
            copies,
        })
    }
}

/// The iteration an operation works on.
#[derive(Clone, Debug)]
pub(super) struct Iteration {
    /// The trip's counter; none outside streams.
    pub trip: Option<VarId>,
    /// Added to the counter.
    pub rel: i64,
}

impl Iteration {
    /// Its number.
    pub fn number(&self) -> Expr {
        self.trip.map_or(Expr::Int(0), |v| add(var(v), Expr::Int(self.rel)))
    }
}

/// How trips of a stream are made.
struct Plan {
    role: usize,
    axis: AxisId,
    filter: Option<ExprId>,
    /// Operations of the role, by slot.
    ops: Vec<usize>,
    skew: i64,
    trip: VarId,
    begin: VarId,
    count: VarId,
    /// Trips `peel + ..` of which one segment needs no mask: bounds of it.
    full: Option<(VarId, VarId)>,
    /// The skew of the operations that this segment is for.
    full_for: Option<i64>,
    masked_before: bool,
    masked_after: bool,
}

impl Emit<'_, '_> {
    /// The body of a role.
    pub(super) fn role(&mut self, role: usize) -> Step<Vec<Stmt>> {
        let f = self.f;
        self.role = role;
        self.ring.clear();
        self.trips.clear();
        let Some(work) = f.work_loop.as_ref().filter(|w| w.persistent) else {
            let mut out = f.work_prologue(role);
            let mut flow = Flow::default();
            self.block(role, &mut flow, &mut out)?;
            self.leave(role, &flow, &mut out);
            return Ok(out);
        };
        let mut out = f.work_prologue(role);
        // Iterations of every stream are counted over all blocks: rings go on where the block before left them.
        for (item, part) in f.items.iter().enumerate() {
            if let Item::Stream { axis, ops, .. } = part
                && ops.clone().any(|i| f.ops[i].role == role)
            {
                let before = self.var(&format!("before_{}_{}", f.axis_name(*axis), f.roles[role].role));
                self.ring.insert(item, before);
                out.push(Stmt::Let { var: before, value: Expr::Int(0) });
            }
        }
        let RoleWork { round, rounds, .. } = work.roles[role];
        let mut body = f.work_step(role);
        // Stores of the block before may be under way.
        let stores = f.ops.iter().any(|o| o.role == role && o.mapping.engine.is_some());
        let mut flow = Flow { bulk: stores, ..Flow::default() };
        self.block(role, &mut flow, &mut body)?;
        flow.bulk |= stores;
        out.push(Stmt::For { var: round, lo: Expr::Int(0), hi: var(rounds), step: 1, unroll: false, body });
        self.leave(role, &flow, &mut out);
        Ok(out)
    }

    /// What must have ended before a role does.
    fn leave(&self, role: usize, flow: &Flow, out: &mut Vec<Stmt>) {
        if flow.bulk {
            out.push(Stmt::WaitGroup { kind: GroupKind::Bulk, pending: 0 });
        }
        self.await_peers(role, out);
        if self.f.cluster_tasks() > 1 {
            out.push(Stmt::ClusterSync);
        }
    }

    /// Waits until the stages that a role filled are given back by the tasks that share them: what another task does to
    /// a barrier must not be under way when the barrier's own task ends, and meeting the other does not say that it has
    /// arrived.
    fn await_peers(&self, role: usize, out: &mut Vec<Stmt>) {
        let f = self.f;
        for (i, c) in f.channels.iter().enumerate() {
            let Some(barrier) = self.empty[i].filter(|_| c.producer == role && f.peers(&c.multicast).len() > 1) else {
                continue;
            };
            let rounds = f.work_loop.as_ref().filter(|w| w.persistent).map(|w| w.roles[role].rounds);
            // How often the ring was filled.
            let filled = match c.stream {
                Some(item) => {
                    let trips = self.ring.get(&item).or(self.trips.get(&item));
                    max(var(*trips.expect("a role walks the streams whose rings it fills")), Expr::Int(0))
                }
                None => rounds.map_or(Expr::Int(1), var),
            };
            let stages = Expr::Int(c.stages as i64);
            for next in 0..c.stages as i64 {
                let turn = add(filled.clone(), Expr::Int(next));
                let stage = match c.stages {
                    1 => Expr::Int(0),
                    _ => turn.clone().bin(BinaryOp::Mod, stages.clone()),
                };
                let parity = turn.bin(BinaryOp::Div, stages.clone()).bin(BinaryOp::Mod, Expr::Int(2));
                out.push(Stmt::Wait { barrier, stage, phase: sub(Expr::Int(1), parity) });
            }
        }
    }

    /// What a role does for one block.
    fn block(&mut self, role: usize, flow: &mut Flow, out: &mut Vec<Stmt>) -> Step<()> {
        let f = self.f;
        let mut body = Vec::new();
        let mut stored: Vec<BufferId> = Vec::new();
        for (item, part) in f.items.iter().enumerate() {
            let all = match part {
                Item::Op(i) => *i..*i + 1,
                Item::Stream { ops, .. } => ops.clone(),
            };
            let own: Vec<usize> = all.filter(|i| f.ops[*i].role == role).collect();
            if own.iter().any(|i| stored.iter().any(|b| needs_stored(f, *i, *b))) {
                self.meet_in_memory(role, &mut body);
                stored.clear();
            }
            stored.extend(own.iter().filter_map(|i| match f.ops[*i].op {
                Op::Store { buffer, .. } => Some(*buffer),
                Op::Load { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => None,
            }));
            match part {
                Item::Op(i) if f.ops[*i].role == role => {
                    let place = Place { role, block: None, checked: true };
                    let at = Iteration { trip: None, rel: 0 };
                    self.op(*i, &place, &at, flow, &mut body)?;
                }
                Item::Op(_) => {}
                Item::Stream { axis, filter, ops } => {
                    let ops: Vec<usize> = ops.clone().filter(|i| f.ops[*i].role == role).collect();
                    if !ops.is_empty() {
                        self.stream(item, role, *axis, *filter, ops, flow, &mut body)?;
                    }
                }
            }
        }
        self.settle_all(flow, None, &mut body);
        self.end_copies(flow, &mut body);
        out.extend(self.present(role, body)?);
        Ok(())
    }

    /// Threads meet before they read or join what others have stored in an array: a unit's, where units have parts of the
    /// grid of their own, otherwise the role's.
    fn meet_in_memory(&mut self, role: usize, out: &mut Vec<Stmt>) {
        let f = self.f;
        let apart = |a| f.kernel.axes[a].kind == AxisKind::Grid && f.cut(a, role);
        if f.kernel.axes.ids().any(apart) {
            self.unit_sync(role, out);
        } else {
            self.role_sync(role, out);
        }
    }

    /// The body for units whose part of the grid exists: where each unit has one coordinate of a grid axis, the last
    /// task may have too many units.
    fn present(&self, role: usize, body: Vec<Stmt>) -> Step<Vec<Stmt>> {
        let f = self.f;
        let place = Place { role, block: None, checked: true };
        let partial = |a: &AxisId| {
            let (x, kind) = (f.axis(*a), f.kernel.axes[*a].kind);
            kind == AxisKind::Grid && !x.sized() && !x.exact && f.cut(*a, role)
        };
        let conds = f.kernel.axes.ids().filter(partial).map(|a| f.origin(a, &place).bin(BinaryOp::Lt, f.extent(a)));
        let Some(cond) = conds.reduce(|a, b| a.bin(BinaryOp::And, b)) else { return Ok(body) };
        if !f.channels.is_empty() {
            let message = "units beyond the end of a grid axis would leave barriers waiting";
            return refuse("units", message, "give each unit two coordinates or more");
        }
        Ok(vec![Stmt::If { cond, then: body, otherwise: Vec::new() }])
    }

    #[allow(clippy::too_many_arguments)]
    fn stream(
        &mut self,
        item: usize,
        role: usize,
        axis: AxisId,
        filter: Option<ExprId>,
        mut ops: Vec<usize>,
        flow: &mut Flow,
        out: &mut Vec<Stmt>,
    ) -> Step<()> {
        let f = self.f;
        self.settle_all(flow, None, out);
        ops.sort_by_key(|i| (f.ops[*i].mapping.slot, *i));
        let skews: Vec<u64> = ops.iter().map(|i| f.ops[*i].mapping.skew).collect();
        let least = skews.iter().copied().min().unwrap_or(0);
        let skew = (skews.iter().copied().max().unwrap_or(0) - least) as i64;
        for i in &ops {
            self.skews[*i] = (f.ops[*i].mapping.skew - least) as i64;
        }
        self.keeps_order(&ops)?;
        self.keeps_stages(&ops)?;
        let name = format!("{}_{}", f.axis_name(axis), f.roles[role].role);
        let mut new = |s: &str| self.var(&format!("{s}_{name}"));
        let (trip, begin, count) = (new("trip"), new("begin"), new("count"));
        let (from, to) = (new("full_from"), new("full_to"));
        let place = Place { role, block: None, checked: true };
        let d = {
            let global = self.global.clone();
            let buf = move |b: einfall_ir::tile::BufferId| global[b.index()].expect("arrays in use have a buffer");
            domain(f, axis, filter, &place, &buf)
        };
        let descending = f.axis(axis).descending;
        out.push(Stmt::Let { var: begin, value: d.begin });
        out.push(Stmt::Let { var: count, value: sub(d.end, var(begin)) });
        // Only operations that change without masks need segments, and they must move together.
        let mut sensitive: Vec<i64> =
            ops.iter().filter(|i| self.sensitive(**i, axis, filter)).map(|i| self.skews[*i]).collect();
        sensitive.sort();
        sensitive.dedup();
        let full = match (sensitive.as_slice(), d.full) {
            ([s], Some((a, b))) => {
                let end = add(var(begin), var(count));
                let (a, b) = if descending { (sub(end.clone(), b), sub(end, a)) } else { (a, b) };
                let first = if descending { Expr::Int(0) } else { var(begin) };
                out.push(Stmt::Let { var: from, value: add(sub(a, first.clone()), Expr::Int(*s)) });
                out.push(Stmt::Let { var: to, value: add(sub(b, first), Expr::Int(*s)) });
                Some((from, to))
            }
            _ => None,
        };
        let (masked_before, masked_after) =
            if sensitive.is_empty() { (false, false) } else { (d.masked_before, d.masked_after) };
        let (masked_before, masked_after) =
            if descending { (masked_after, masked_before) } else { (masked_before, masked_after) };
        self.enter_rings(item, &ops, &name, out);
        let once = self.stationary(&ops);
        let (by_threads, awaited): (Vec<usize>, Vec<usize>) = once.iter().partition(|c| f.channels[**c].by_threads());
        for c in awaited {
            self.wait_full(c, &Iteration { trip: None, rel: 0 }, &mut Flow::default(), out);
        }
        // Copies in no group yet may join the first group of the stream.
        let (mut deferred, mut due) = self.deferrable(&ops, &by_threads);
        due.extend(deferred.extract_if(.., |c| !flow.copies.open.contains(c)));
        let due: Vec<(usize, i64)> = due.into_iter().map(|c| (c, BLOCK)).collect();
        self.await_copies(&due, flow, out)?;
        deferred.retain(|c| flow.copies.open.contains(c));
        flow.copies.open.retain(|c| !deferred.contains(c));
        let entry = self.entering(&deferred);
        let full_for = full.and(sensitive.first().copied());
        let p = Plan { role, axis, filter, ops, skew, trip, begin, count, full, full_for, masked_before, masked_after };
        let late: Vec<usize> = p.ops.iter().copied().filter(|i| self.deferred(*i)).collect();
        late.iter().for_each(|i| self.start(*i, out));
        let attempts = [None, Some((skew, false)), Some((skew.max(1), false)), Some((skew, true))];
        for attempt in attempts {
            self.item = Some(item);
            let made = match attempt {
                None => self.shared_trips(&p, &entry)?,
                Some((peel, flush)) => self.pipeline(&p, peel, flush, &entry)?,
            };
            self.item = None;
            if let Some((body, bulk)) = made {
                out.extend(body);
                let mut after = Flow { bulk: flow.bulk || bulk, ..Flow::default() };
                after.filled.extend(flow.filled.iter().filter(|s| s.1 == BLOCK));
                after.copies.open = std::mem::take(&mut flow.copies.open);
                if !deferred.is_empty() {
                    // Without a trip they are in no group.
                    out.push(Stmt::Commit(GroupKind::CpAsync));
                    after.copies.groups.push(deferred.iter().map(|c| (*c, BLOCK)).collect());
                }
                *flow = after;
                if !late.is_empty() {
                    self.merge(&late, 1, None, role, out);
                }
                self.trips.insert(item, count);
                if let Some(before) = self.ring.get(&item) {
                    let value = add(var(*before), var(count));
                    out.push(Stmt::Let { var: *before, value });
                }
                return Ok(());
            }
        }
        refuse("schedule", "trips do not leave the same work in flight", "check `skew` and `slot`")
    }

    /// The places in the rings of a stream before its first trip: where the block before left them.
    fn enter_rings(&mut self, item: usize, ops: &[usize], name: &str, out: &mut Vec<Stmt>) {
        let f = self.f;
        self.rings.clear();
        let uses = |i: &usize, t| f.ops[*i].op.outs().contains(t) || f.reads(f.ops[*i].op).contains(t);
        let used = f.channels.iter().filter(|c| c.stream == Some(item));
        let used = used.filter(|c| c.tiles.iter().any(|t| ops.iter().any(|i| uses(i, t))));
        let sizes: BTreeSet<u64> = used.map(|c| c.stages).collect();
        for stages in sizes {
            let (stage, parity) =
                (self.var(&format!("stage{stages}_{name}")), self.var(&format!("parity{stages}_{name}")));
            self.rings.insert(stages, Ring { stage, parity });
            let before = self.ring.get(&item).map_or(Expr::Int(0), |v| var(*v));
            let n = Expr::Int(stages as i64);
            if stages > 1 {
                out.push(Stmt::Let { var: stage, value: before.clone().bin(BinaryOp::Mod, n.clone()) });
            }
            let value = before.bin(BinaryOp::Div, n).bin(BinaryOp::Mod, Expr::Int(2));
            out.push(Stmt::Let { var: parity, value });
        }
    }

    /// The next trip's places.
    fn turn_rings(&self, out: &mut Vec<Stmt>) {
        for (stages, Ring { stage, parity }) in &self.rings {
            let other = sub(Expr::Int(1), var(*parity));
            if *stages == 1 {
                out.push(Stmt::Let { var: *parity, value: other });
                continue;
            }
            let last = var(*stage).bin(BinaryOp::Eq, Expr::Int(*stages as i64 - 1));
            let select = |a, b| Expr::Select(Box::new(last.clone()), Box::new(a), Box::new(b));
            out.push(Stmt::Let { var: *parity, value: select(other, var(*parity)) });
            out.push(Stmt::Let { var: *stage, value: select(Expr::Int(0), add(var(*stage), Expr::Int(1))) });
        }
    }

    /// Whether the schedule keeps the order in which operations touch each register tile, of which there is one copy:
    /// within an iteration, and against the next one.
    fn keeps_order(&self, ops: &[usize]) -> Step<()> {
        let f = self.f;
        let time = |i: usize, later: i64| (self.skews[i] + later, ops.iter().position(|x| *x == i));
        for &a in ops {
            for &b in ops.iter().filter(|b| a < **b) {
                let (op_a, op_b) = (f.ops[a].op, f.ops[b].op);
                let touches = |op: &Op, t| op.outs().contains(&t) || f.reads(op).contains(&t);
                let shared = op_a.outs().iter().copied().find(|t| touches(op_b, *t));
                let shared = shared.or(op_b.outs().iter().copied().find(|t| touches(op_a, *t)));
                let Some(t) = shared.filter(|t| f.tile(*t).space == Space::Registers) else { continue };
                if time(a, 0) > time(b, 0) || time(b, 0) > time(a, 1) {
                    let (a, b) = (&f.ops[a].name, &f.ops[b].name);
                    let message = format!("{a} and {b} use tile {} out of order", f.tile(t).name);
                    return refuse("schedule", message, "keep each tile's uses in order, within one iteration's span");
                }
            }
        }
        Ok(())
    }

    /// The whole stream with `peel` trips before the steady loop; none if trips do not leave the same groups open.
    fn pipeline(&mut self, p: &Plan, peel: i64, flush: bool, entry: &Flow) -> Step<Option<(Vec<Stmt>, bool)>> {
        let mut flow = entry.clone();
        let mut out = Vec::new();
        let n = var(p.count);
        self.first_turn(p, peel, &mut out);
        for t in 0..peel {
            out.push(Stmt::Let { var: p.trip, value: Expr::Int(t) });
            self.trip(p, |s| s <= t, true, false, &mut flow, &mut out)?;
            if flush {
                self.settle_all(&mut flow, Some(p.trip), &mut out);
            }
            advance(&mut flow);
            self.turn_rings(&mut out);
        }
        let mut steady = flow.clone();
        let first = Expr::Int(peel);
        let segments: Vec<(Expr, Expr, bool)> = match p.full {
            None => vec![(first, n.clone(), p.masked_before || p.masked_after)],
            Some((from, to)) => {
                let from = if p.masked_before { min(max(var(from), first.clone()), n.clone()) } else { first.clone() };
                let to = if p.masked_after { max(min(var(to), n.clone()), from.clone()) } else { n.clone() };
                let mut s = Vec::new();
                if p.masked_before {
                    s.push((first, from.clone(), true));
                }
                s.push((from, to.clone(), false));
                if p.masked_after {
                    s.push((to, n.clone(), true));
                }
                s
            }
        };
        // What holds at the start of every trip: weakened until every trip keeps it.
        let mut bodies;
        loop {
            bodies = Vec::new();
            let mut entry = steady.clone();
            for (_, _, checked) in &segments {
                let mut body = Vec::new();
                flow = steady.clone();
                self.trip(p, |_| true, *checked, true, &mut flow, &mut body)?;
                if flush {
                    self.settle_all(&mut flow, Some(p.trip), &mut body);
                }
                advance(&mut flow);
                self.turn_rings(&mut body);
                bodies.push(body);
                entry = match entry.meet(&flow) {
                    Some(e) => e,
                    None => return Ok(None),
                };
            }
            if entry == steady {
                break;
            }
            steady = entry;
        }
        flow = steady;
        for ((lo, hi, _), body) in segments.into_iter().zip(bodies) {
            out.push(Stmt::For { var: p.trip, lo, hi, step: 1, unroll: false, body });
        }
        self.drain(p, &mut flow, &mut out)?;
        let mut bulk = flow.bulk;
        if peel == 0 {
            return Ok(Some((out, bulk)));
        }
        let mut otherwise = Vec::new();
        if peel > 1 {
            let mut body = Vec::new();
            let mut flow = entry.clone();
            // Every trip but the first follows one that read its stages.
            let read = |i: &usize| self.stages_read(*i, 0).into_iter().map(|(c, rel)| (c, later(rel)));
            flow.copies.read.extend(p.ops.iter().flat_map(read).collect::<Vec<_>>());
            let mut plain = p.ops.clone();
            plain.sort();
            for i in plain {
                self.one(p, i, 0, true, &mut flow, &mut body)?;
            }
            self.settle_all(&mut flow, Some(p.trip), &mut body);
            bulk |= flow.bulk;
            self.turn_rings(&mut body);
            otherwise.push(Stmt::For { var: p.trip, lo: Expr::Int(0), hi: n.clone(), step: 1, unroll: false, body });
        }
        self.release_stationary(&self.released_after(p), &mut otherwise);
        let cond = Expr::Int(peel).bin(BinaryOp::Le, n);
        Ok(Some((vec![Stmt::If { cond, then: out, otherwise }], bulk)))
    }

    /// After the steady loop: the last trips of operations that run behind, and what the stream gives back.
    fn drain(&mut self, p: &Plan, flow: &mut Flow, out: &mut Vec<Stmt>) -> Step<()> {
        let n = var(p.count);
        // What only earlier operations read is given back before the last trips of the later ones.
        let read_out = self.read_out(p, flow);
        self.release_stationary(&read_out, out);
        for e in 0..p.skew {
            out.push(Stmt::Let { var: p.trip, value: add(n.clone(), Expr::Int(e)) });
            self.trip(p, |s| s > e, true, false, flow, out)?;
            advance(flow);
            if e + 1 < p.skew || !flow.groups.is_empty() {
                self.turn_rings(out);
            }
        }
        // After the last trip the counter stands one trip behind what open groups count from.
        if !flow.groups.is_empty() {
            out.push(Stmt::Let { var: p.trip, value: add(n, Expr::Int(p.skew)) });
            self.settle_all(flow, Some(p.trip), out);
        }
        let rest: Vec<usize> = self.released_after(p).into_iter().filter(|c| !read_out.contains(c)).collect();
        self.release_stationary(&rest, out);
        Ok(())
    }

    /// Channels filled once per block whose last reader is in the stream.
    fn released_after(&self, p: &Plan) -> Vec<usize> {
        let all = self.stationary(&p.ops).into_iter();
        all.filter(|c| p.ops.contains(&self.f.channels[*c].last_reader)).collect()
    }

    /// Those of them that nothing reads after the steady loop, if nothing is in flight there.
    fn read_out(&self, p: &Plan, flow: &Flow) -> Vec<usize> {
        if !flow.groups.is_empty() {
            return Vec::new();
        }
        let f = self.f;
        let reads = |i: usize, c: usize| f.reads(f.ops[i].op).iter().any(|t| f.channels[c].tiles.contains(t));
        let late = |c: usize| p.ops.iter().any(|i| self.skews[*i] > 0 && reads(*i, c));
        self.released_after(p).into_iter().filter(|c| !late(*c)).collect()
    }

    fn release_stationary(&self, channels: &[usize], out: &mut Vec<Stmt>) {
        channels.iter().for_each(|c| self.release_block(*c, &Iteration { trip: None, rel: 0 }, out));
    }

    /// One trip: the operations whose skew `takes`, in slot order.
    fn trip(
        &mut self,
        p: &Plan,
        takes: impl Fn(i64) -> bool,
        checked: bool,
        steady: bool,
        flow: &mut Flow,
        out: &mut Vec<Stmt>,
    ) -> Step<()> {
        // What earlier trips copied for this one is awaited at once.
        let running: Vec<usize> = p.ops.iter().copied().filter(|i| takes(self.skews[*i])).collect();
        let stages = running.iter().flat_map(|i| self.stages_read(*i, -self.skews[*i]));
        let known = |s: &(usize, i64)| flow.copies.groups.iter().any(|g| g.contains(s));
        let due: Vec<(usize, i64)> = stages.filter(known).collect();
        self.await_copies(&due, flow, out)?;
        for &i in &p.ops {
            let skew = self.skews[i];
            if !takes(skew) {
                continue;
            }
            if steady {
                self.take_turn(p, i, flow, out);
            }
            self.one(p, i, -skew, checked, flow, out)?;
            if steady {
                self.give_turn(p, i, out);
            }
        }
        Ok(())
    }

    /// The barrier by which units take turns, if operation `i` is the stream's first contraction in slot order, or its
    /// last one.
    fn turns_at(&mut self, p: &Plan, i: usize, last: bool) -> Option<einfall_ir::kernel::BarrierId> {
        let bar = self.ping_pong(p.role)?;
        let mut contracts = p.ops.iter().filter(|i| matches!(self.f.ops[**i].op, Op::Contract { .. }));
        let at = if last { contracts.next_back() } else { contracts.next() };
        (at == Some(&i)).then_some(bar)
    }

    /// Before the trip's first contraction: the unit's turn.
    fn take_turn(&mut self, p: &Plan, i: usize, flow: &mut Flow, out: &mut Vec<Stmt>) {
        let Some(barrier) = self.turns_at(p, i, false) else { return };
        // The unit whose turn it is may need the only stage of a ring, which must not wait for this unit's turn.
        let at = Iteration { trip: Some(p.trip), rel: 0 };
        let f = self.f;
        let alone = |g: &Group| g.releases.iter().any(|r| f.channels[r.0].stages < 2);
        self.settle_where(flow, &at, out, alone);
        out.push(Stmt::NamedSync { barrier, stage: Expr::Unit });
    }

    /// After the trip's last contraction: the next unit's turn.
    fn give_turn(&mut self, p: &Plan, i: usize, out: &mut Vec<Stmt>) {
        let Some(barrier) = self.turns_at(p, i, true) else { return };
        let units = Expr::Int(self.f.roles[p.role].units as i64);
        let next = add(Expr::Unit, Expr::Int(1)).bin(BinaryOp::Mod, units.clone());
        // Nobody waits for the turn after the last unit's last trip.
        let more = add(var(p.trip), Expr::Int(1)).bin(BinaryOp::Lt, var(p.count));
        let cond = add(Expr::Unit, Expr::Int(1)).bin(BinaryOp::Lt, units).bin(BinaryOp::Or, more);
        out.push(Stmt::If { cond, then: vec![Stmt::NamedArrive { barrier, stage: next }], otherwise: Vec::new() });
    }

    /// The first unit's turn in trip `first` is given by the last unit.
    fn first_turn(&mut self, p: &Plan, first: i64, out: &mut Vec<Stmt>) {
        let Some(barrier) = self.ping_pong(p.role) else { return };
        let last = Expr::Int(self.f.roles[p.role].units as i64 - 1);
        let cond = Expr::Unit.bin(BinaryOp::Eq, last);
        let cond = cond.bin(BinaryOp::And, Expr::Int(first).bin(BinaryOp::Lt, var(p.count)));
        out.push(Stmt::If {
            cond,
            then: vec![Stmt::NamedArrive { barrier, stage: Expr::Int(0) }],
            otherwise: Vec::new(),
        });
    }

    fn one(&mut self, p: &Plan, i: usize, rel: i64, checked: bool, flow: &mut Flow, out: &mut Vec<Stmt>) -> Step<()> {
        let at = Iteration { trip: Some(p.trip), rel };
        let number = match self.f.axis(p.axis).descending {
            false => at.number(),
            true => sub(sub(var(p.count), Expr::Int(1)), at.number()),
        };
        let block = add(var(p.begin), number);
        let place = Place { role: p.role, block: Some((p.axis, block)), checked };
        self.filter = p.filter;
        // Segments follow the operations that change without masks.
        self.inside = !checked && p.full_for == Some(self.skews[i]) && rel == -self.skews[i];
        let done = self.op(i, &place, &at, flow, out);
        (self.filter, self.inside) = (None, false);
        done
    }

    /// Waits for the group at `upto` and those before it, then releases what they read.
    pub(super) fn settle(&mut self, flow: &mut Flow, upto: usize, trip: Option<VarId>, out: &mut Vec<Stmt>) {
        let pending = (flow.groups.len() - 1 - upto) as u64;
        out.push(Stmt::WaitGroup { kind: GroupKind::Wgmma, pending });
        for g in flow.groups.drain(..=upto) {
            let mut given = Vec::new();
            for (channel, rel) in g.releases {
                flow.filled.remove(&(channel, rel));
                self.release_block(channel, &Iteration { trip, rel }, &mut given);
            }
            match trip.filter(|_| g.since > 0 && !given.is_empty()) {
                None => out.extend(given),
                Some(trip) => {
                    let cond = Expr::Int(g.since).bin(BinaryOp::Le, var(trip));
                    out.push(Stmt::If { cond, then: given, otherwise: Vec::new() });
                }
            }
        }
    }

    /// Waits for every group.
    pub(super) fn settle_all(&mut self, flow: &mut Flow, trip: Option<VarId>, out: &mut Vec<Stmt>) {
        if let Some(last) = flow.groups.len().checked_sub(1) {
            self.settle(flow, last, trip, out);
        }
    }

    /// Waits until `owned` holds of no open group.
    pub(super) fn settle_where(
        &mut self,
        flow: &mut Flow,
        at: &Iteration,
        out: &mut Vec<Stmt>,
        owned: impl Fn(&Group) -> bool,
    ) {
        if let Some(last) = flow.groups.iter().rposition(owned) {
            self.settle(flow, last, at.trip, out);
        }
    }
}

/// Whether operation `i`, or the filter of its stream, needs what array `b` holds.
fn needs_stored(f: &Facts<'_>, i: usize, b: BufferId) -> bool {
    let op = f.ops[i].op;
    let mut found = matches!(op, Op::Load { buffer, .. } | Op::Store { buffer, join: Some(_), .. } if *buffer == b);
    let filter = match &f.items[f.ops[i].item] {
        Item::Stream { filter, .. } => *filter,
        Item::Op(_) => None,
    };
    for root in op.roots().into_iter().chain(filter) {
        let reads = |e: &tile::Expr| matches!(e, tile::Expr::Read { buffer, .. } if *buffer == b);
        f.kernel.walk(root, &mut |_, e| found |= reads(e));
    }
    found
}

/// The next trip begins: what was this trip's is the one before's.
fn advance(flow: &mut Flow) {
    flow.filled = flow.filled.iter().map(|(c, rel)| (*c, later(*rel))).collect();
    flow.copies.advance();
    for g in &mut flow.groups {
        g.releases.iter_mut().for_each(|r| r.1 -= 1);
    }
}
