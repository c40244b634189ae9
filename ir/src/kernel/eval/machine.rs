//! The state of a running wave of tasks and its scheduler.
//!
//! Invariant: `known[a]` of a unit is the newest clock of agent `a` that happens before the unit's next statement.
//! Agents of a wave: its units, then three queues per unit (wgmma, cp.async, bulk), then its mbarriers' copies, then the
//! grids before it.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use super::asynchronous::{Load, Queued};
use super::compile::{Inst, Program, Uniform};
use super::memory::{Access, Fault, Memory, Placement};
use super::{Context, ErrorKind, KernelError, Rng, Schedule, Stats};
use crate::arena::Id;
use crate::kernel::{BarrierKind, BufSpace, GroupKind};

/// A register fragment of one unit.
pub(super) struct FragState {
    pub(super) dims: Vec<u64>,
    /// Empty until first written.
    pub(super) data: Vec<f64>,
    pub(super) defined: Vec<bool>,
    /// Whether every element is defined.
    pub(super) whole: bool,
    /// Newest wgmma that writes it, and that reads it, by number in the unit's queue.
    pub(super) written_by: u32,
    pub(super) read_by: u32,
    /// Whether ordinary statements used its registers since the last `wgmma.fence`.
    pub(super) touched: bool,
}

/// Asynchronous operations of one kind issued by one unit; they complete in order.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) issued: u32,
    pub(super) done: u32,
    /// Newest operation of each committed group, oldest first.
    pub(super) groups: Vec<u32>,
    /// Newest operation committed.
    pub(super) committed: u32,
    pub(super) pending: VecDeque<Queued>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ready,
    Phase { bar: usize, phase: u64 },
    Named { bar: usize },
    Group { kind: GroupKind, number: u32 },
    Meet { scope: usize },
    Done,
}

pub(super) struct Unit {
    pub(super) role: usize,
    pub(super) number: u64,
    pub(super) task: usize,
    pub(super) pc: usize,
    pub(super) vars: Vec<Option<i64>>,
    pub(super) loops: Vec<i64>,
    pub(super) frags: Vec<FragState>,
    pub(super) known: Vec<u32>,
    pub(super) status: Status,
    pub(super) queues: [Queue; 3],
    /// The phase it was woken by and has not seen yet.
    woken: Option<(usize, u64)>,
}

/// One stage of a barrier in one task.
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) stage: u64,
    pub(super) kind: BarrierKind,
    /// Phases completed.
    pub(super) phase: u64,
    /// Arrivals (mbarrier) or threads (named) still missing in this phase.
    pub(super) missing: u64,
    /// Bytes expected and not yet landed.
    pub(super) bytes: i64,
    /// The number of the phase after the last one that another task arrived in; 0: none did.
    pub(super) distant: u64,
    /// What arrivals so far know.
    pub(super) gathered: Vec<u32>,
    /// What a waiter learns from the last completed phase.
    pub(super) released: Vec<u32>,
}

/// A meeting of units: a task, a cluster or the grid.
struct Meeting {
    members: Vec<usize>,
    arrived: usize,
    known: Vec<u32>,
}

pub(super) struct Wave<'a, 'b> {
    pub(super) ctx: &'a Context<'a>,
    pub(super) memories: &'b mut [Option<Memory>],
    /// Shared and scratch memory of the wave's tasks.
    pub(super) local: Vec<Memory>,
    /// Per task and buffer: a local memory (`Ok`) or an array (`Err`).
    pub(super) place: Vec<Vec<Result<usize, usize>>>,
    pub(super) coords: Vec<Vec<u64>>,
    /// The cluster of each task, and its rank in it.
    pub(super) cluster_of: Vec<(usize, usize)>,
    /// Tasks by cluster and rank.
    pub(super) clusters: Vec<Vec<usize>>,
    pub(super) units: Vec<Unit>,
    pub(super) bars: Vec<Bar>,
    /// First stage of each barrier of a task, and all stages of a task.
    pub(super) bar_offsets: Vec<usize>,
    pub(super) bars_per_task: usize,
    meetings: Vec<Meeting>,
    /// Newest-last clocks of each unit's proxy fences.
    pub(super) fences: Vec<Vec<u32>>,
    pub(super) loads: Vec<Load>,
    /// By counter (array and position): what the units that counted there knew.
    pub(super) counted: HashMap<(usize, usize), Vec<u32>>,
    pub(super) base: u32,
    pub(super) stats: &'b mut Stats,
}

pub(super) fn kind_index(kind: GroupKind) -> usize {
    match kind {
        GroupKind::Wgmma => 0,
        GroupKind::CpAsync => 1,
        GroupKind::Bulk => 2,
    }
}

pub(super) fn join(into: &mut [u32], from: &[u32]) {
    for (a, b) in into.iter_mut().zip(from) {
        *a = (*a).max(*b);
    }
}

/// Runs one wave; returns the agent number after its last.
pub(super) fn wave(
    ctx: &Context<'_>,
    groups: Vec<Vec<Vec<u64>>>,
    memories: &mut [Option<Memory>],
    of_buf: &[Option<usize>],
    base: u32,
    rng: &mut Rng,
    stats: &mut Stats,
) -> Result<u32, KernelError> {
    let mut w = Wave {
        ctx,
        memories,
        local: Vec::new(),
        place: Vec::new(),
        coords: Vec::new(),
        cluster_of: Vec::new(),
        clusters: Vec::new(),
        units: Vec::new(),
        bars: Vec::new(),
        bar_offsets: Vec::new(),
        bars_per_task: 0,
        meetings: Vec::new(),
        fences: Vec::new(),
        loads: Vec::new(),
        counted: HashMap::new(),
        base,
        stats,
    };
    w.build(groups, of_buf)?;
    let agents = w.agents();
    w.stats.tasks += w.coords.len() as u64;
    w.run(rng)?;
    Ok(base + agents as u32)
}

impl Wave<'_, '_> {
    pub(super) fn agents(&self) -> usize {
        4 * self.units.len() + self.bars.len() + 1
    }

    /// All grids before this one.
    pub(super) fn prior_agent(&self) -> usize {
        self.agents() - 1
    }

    pub(super) fn queue_agent(&self, unit: usize, kind: GroupKind) -> usize {
        self.units.len() + 3 * unit + kind_index(kind)
    }

    pub(super) fn bar_agent(&self, bar: usize) -> usize {
        4 * self.units.len() + bar
    }

    fn build(&mut self, groups: Vec<Vec<Vec<u64>>>, of_buf: &[Option<usize>]) -> Result<(), KernelError> {
        let kernel = self.ctx.kernel;
        let units_per_task: u64 = kernel.roles.iter().map(|r| r.units).sum();
        let tasks: usize = groups.iter().map(Vec::len).sum();
        let concurrent = units_per_task > 1
            || tasks > 1
            || !kernel.barriers.is_empty()
            || self.ctx.programs.iter().any(|p| p.copies);
        for (_, b) in kernel.barriers.iter() {
            self.bar_offsets.push(self.bars_per_task);
            self.bars_per_task += b.stages as usize;
        }
        for (c, members) in groups.into_iter().enumerate() {
            self.clusters.push(Vec::new());
            for (rank, coords) in members.into_iter().enumerate() {
                let task = self.coords.len();
                self.coords.push(coords);
                self.clusters[c].push(task);
                self.cluster_of.push((c, rank));
                let mut places = Vec::new();
                for (id, _) in kernel.bufs.iter() {
                    places.push(match of_buf[id.index()] {
                        Some(param) => Err(param),
                        None => {
                            self.local.push(local_memory(self.ctx, id.index(), concurrent)?);
                            Ok(self.local.len() - 1)
                        }
                    });
                }
                self.place.push(places);
                for (_, b) in kernel.barriers.iter() {
                    for stage in 0..b.stages {
                        let missing = match b.kind {
                            BarrierKind::Mbarrier { count } => count,
                            BarrierKind::Named { threads } => threads,
                        };
                        if missing == 0 {
                            return Err(KernelError::illegal(format!("barrier `{}` waits for nobody", b.name)));
                        }
                        self.bars.push(Bar {
                            name: b.name.clone(),
                            stage,
                            kind: b.kind.clone(),
                            phase: 0,
                            missing,
                            bytes: 0,
                            distant: 0,
                            gathered: Vec::new(),
                            released: Vec::new(),
                        });
                    }
                }
                for (r, role) in kernel.roles.iter().enumerate() {
                    for number in 0..role.units {
                        let program = &self.ctx.programs[r];
                        let frags = kernel.frags.iter().map(|(_, f)| FragState {
                            dims: f.dist.dims.clone(),
                            data: Vec::new(),
                            defined: Vec::new(),
                            whole: false,
                            written_by: 0,
                            read_by: 0,
                            touched: true,
                        });
                        self.units.push(Unit {
                            role: r,
                            number,
                            task,
                            pc: 0,
                            vars: vec![None; kernel.vars.len()],
                            loops: vec![0; program.loops],
                            frags: frags.collect(),
                            known: Vec::new(),
                            status: Status::Ready,
                            queues: Default::default(),
                            woken: None,
                        });
                    }
                }
            }
        }
        let agents = self.agents();
        for (u, unit) in self.units.iter_mut().enumerate() {
            unit.known = vec![0; agents];
            unit.known[u] = 1;
        }
        for bar in &mut self.bars {
            bar.gathered = vec![0; agents];
            bar.released = vec![0; agents];
        }
        self.fences = vec![Vec::new(); self.units.len()];
        let meeting = |members: Vec<usize>| Meeting { members, arrived: 0, known: vec![0; agents] };
        let of = |keep: &dyn Fn(&Unit) -> bool| -> Vec<usize> {
            self.units.iter().enumerate().filter(|(_, u)| keep(u)).map(|(i, _)| i).collect()
        };
        let mut meetings = Vec::new();
        for task in 0..self.coords.len() {
            meetings.push(meeting(of(&|u| u.task == task)));
        }
        for cluster in 0..self.clusters.len() {
            meetings.push(meeting(of(&|u| self.cluster_of[u.task].0 == cluster)));
        }
        meetings.push(meeting(of(&|_| true)));
        self.meetings = meetings;
        Ok(())
    }

    fn run(&mut self, rng: &mut Rng) -> Result<(), KernelError> {
        let mut last = 0;
        loop {
            let ready: Vec<usize> = (0..self.units.len()).filter(|u| self.units[*u].status == Status::Ready).collect();
            let queued = self.queued();
            if ready.is_empty() && queued.is_empty() {
                if self.units.iter().all(|u| u.status == Status::Done) {
                    return Ok(());
                }
                return Err(self.deadlock());
            }
            let producer = |u: &usize| !self.ctx.programs[self.units[*u].role].copies;
            let schedule = self.ctx.options.schedule;
            let complete = !queued.is_empty()
                && (ready.is_empty()
                    || match schedule {
                        Schedule::EagerAsync => true,
                        Schedule::DelayAsync => false,
                        Schedule::Random => rng.below(ready.len() + queued.len()) >= ready.len(),
                        Schedule::RoundRobin | Schedule::ProducerFirst | Schedule::ConsumerFirst => rng.below(2) == 0,
                    });
            if complete {
                let (unit, kind) = queued[rng.below(queued.len())];
                match unit {
                    Some(unit) => self.complete_queued(unit, kind)?,
                    None => {
                        let load = self.loads.swap_remove(rng.below(self.loads.len()));
                        self.complete_load(load)?;
                    }
                }
                self.stats.async_ops += 1;
                continue;
            }
            let unit = match schedule {
                Schedule::RoundRobin => *ready.iter().find(|u| **u > last).unwrap_or(&ready[0]),
                Schedule::ProducerFirst => *ready.iter().min_by_key(|u| producer(u)).unwrap_or(&ready[0]),
                Schedule::ConsumerFirst => *ready.iter().min_by_key(|u| !producer(u)).unwrap_or(&ready[0]),
                Schedule::Random | Schedule::DelayAsync | Schedule::EagerAsync => ready[rng.below(ready.len())],
            };
            last = unit;
            self.units[unit].woken = None;
            self.advance(unit)?;
        }
    }

    /// Heads of queues that may complete, and one entry for the copies in flight.
    fn queued(&self) -> Vec<(Option<usize>, GroupKind)> {
        let mut out = Vec::new();
        for (u, unit) in self.units.iter().enumerate() {
            for kind in GroupKind::ALL {
                if !unit.queues[kind_index(kind)].pending.is_empty() {
                    out.push((Some(u), kind));
                }
            }
        }
        if !self.loads.is_empty() {
            out.push((None, GroupKind::Bulk));
        }
        out
    }

    /// Runs the unit until it has synchronised, issued something, blocked or ended.
    fn advance(&mut self, unit: usize) -> Result<(), KernelError> {
        let program: Rc<Program> = self.ctx.programs[self.units[unit].role].clone();
        loop {
            let step = &program.steps[self.units[unit].pc];
            self.units[unit].pc += 1;
            self.stats.statements += 1;
            let stmt = step.stmt;
            let goes_on = match &step.inst {
                Inst::LoopInit { var, lo, hi, slot } => {
                    let (lo, hi) = (self.integer(unit, lo, stmt)?, self.integer(unit, hi, stmt)?);
                    self.units[unit].vars[*var] = Some(lo);
                    self.units[unit].loops[*slot] = hi;
                    true
                }
                Inst::LoopTest { var, slot, exit } => {
                    let u = &mut self.units[unit];
                    if u.vars[*var].is_none_or(|v| v >= u.loops[*slot]) {
                        u.pc = *exit;
                    }
                    true
                }
                Inst::LoopStep { var, step, top } => {
                    let u = &mut self.units[unit];
                    u.vars[*var] = u.vars[*var].map(|v| v + step);
                    u.pc = *top;
                    true
                }
                Inst::Branch { cond, otherwise } => {
                    if self.value(unit, cond, stmt)? == 0.0 {
                        self.units[unit].pc = *otherwise;
                    }
                    true
                }
                Inst::Jump(to) => {
                    self.units[unit].pc = *to;
                    true
                }
                Inst::Let { var, value } => {
                    let v = self.integer(unit, value, stmt)?;
                    self.units[unit].vars[*var] = Some(v);
                    true
                }
                Inst::End => {
                    self.end(unit, stmt)?;
                    false
                }
                Inst::TaskSync => self.meet(unit, self.units[unit].task),
                Inst::ClusterSync => {
                    let cluster = self.cluster_of[self.units[unit].task].0;
                    self.meet(unit, self.coords.len() + cluster)
                }
                Inst::GridSync => self.meet(unit, self.meetings.len() - 1),
                other => self.statement(unit, other, stmt)?,
            };
            if !goes_on {
                return Ok(());
            }
        }
    }

    fn end(&mut self, unit: usize, stmt: u32) -> Result<(), KernelError> {
        for kind in [GroupKind::Wgmma, GroupKind::Bulk] {
            let issued = self.units[unit].queues[kind_index(kind)].issued;
            if self.units[unit].known[self.queue_agent(unit, kind)] < issued {
                let text = format!("ends with {} operations in flight: commit and wait_group are missing", kind.name());
                return Err(self.error(unit, stmt, ErrorKind::InFlight, text));
            }
        }
        self.units[unit].status = Status::Done;
        let task = self.units[unit].task;
        let mut others = self.units.iter().filter(|u| u.task == task);
        if others.all(|u| u.status == Status::Done) {
            // Memory of a task that has ended takes no arrival, and only a phase that was waited for is known to be over.
            for bar in task * self.bars_per_task..(task + 1) * self.bars_per_task {
                let (agent, distant) = (self.bar_agent(bar), self.bars[bar].distant);
                let seen = |u: &Unit| u.task == task && u64::from(u.known[agent]) >= distant;
                if distant > 0 && !self.units.iter().any(seen) {
                    let text = format!("ends while another task's arrival at {} may be under way", self.bar_name(bar));
                    return Err(self.error(unit, stmt, ErrorKind::InFlight, text));
                }
            }
        }
        Ok(())
    }

    /// Advances the unit's own clock: what it did so far is before what others learn now.
    pub(super) fn tick(&mut self, unit: usize) {
        self.units[unit].known[unit] += 1;
    }

    fn meet(&mut self, unit: usize, scope: usize) -> bool {
        let m = &mut self.meetings[scope];
        join(&mut m.known, &self.units[unit].known);
        m.arrived += 1;
        self.tick(unit);
        let m = &mut self.meetings[scope];
        if m.arrived < m.members.len() {
            self.units[unit].status = Status::Meet { scope };
            return false;
        }
        m.arrived = 0;
        for &u in &m.members {
            join(&mut self.units[u].known, &m.known);
            if self.units[u].status == (Status::Meet { scope }) {
                self.units[u].status = Status::Ready;
            }
        }
        false
    }

    /// `count` arrivals at `bar` by something that knows `known`; false if the phase takes fewer.
    #[must_use]
    pub(super) fn arrive(&mut self, bar: usize, count: u64, known: &[u32]) -> bool {
        let b = &mut self.bars[bar];
        if b.missing < count {
            return false;
        }
        b.missing -= count;
        join(&mut b.gathered, known);
        true
    }

    /// Completes the phase of `bar` if nothing is missing, and wakes its waiters.
    pub(super) fn settle(&mut self, bar: usize) -> Result<(), KernelError> {
        let agent = self.bar_agent(bar);
        let b = &mut self.bars[bar];
        if b.missing > 0 || b.bytes != 0 {
            return Ok(());
        }
        let phase = b.phase;
        b.phase += 1;
        b.released = b.gathered.clone();
        match b.kind {
            BarrierKind::Mbarrier { count } => {
                b.missing = count;
                b.released[agent] = phase as u32 + 1;
                b.gathered[agent] = phase as u32 + 1;
            }
            BarrierKind::Named { threads } => b.missing = threads,
        }
        for u in 0..self.units.len() {
            if let Some((at, p)) = self.units[u].woken
                && at == bar
                && p + 1 == phase
                && self.units[u].status == Status::Ready
            {
                let (pc, role) = (self.units[u].pc, self.units[u].role);
                let stmt = self.ctx.programs[role].steps[pc.saturating_sub(1)].stmt;
                let text = format!(
                    "phase {phase} of {} completed before this unit saw phase {p} complete: the barrier runs two phases ahead of a waiter",
                    self.bar_name(bar)
                );
                return Err(self.error(u, stmt, ErrorKind::Barrier, text));
            }
            let released = match self.units[u].status {
                Status::Phase { bar: at, phase: p } => at == bar && p == phase,
                Status::Named { bar: at } => at == bar,
                Status::Ready | Status::Group { .. } | Status::Meet { .. } | Status::Done => false,
            };
            if released {
                join(&mut self.units[u].known, &self.bars[bar].released);
                if matches!(self.units[u].status, Status::Phase { .. }) {
                    self.units[u].woken = Some((bar, phase));
                }
                self.units[u].status = Status::Ready;
            }
        }
        Ok(())
    }

    pub(super) fn bar_name(&self, bar: usize) -> String {
        let b = &self.bars[bar];
        if self.coords.len() > 1 {
            format!("{}({}) of task {:?}", b.name, b.stage, self.coords[bar / self.bars_per_task])
        } else {
            format!("{}({})", b.name, b.stage)
        }
    }

    /// The barrier's instance in `task`.
    pub(super) fn bar_of(&self, task: usize, barrier: usize, stage: i64) -> Option<usize> {
        let stages = self.ctx.kernel.barriers.get(Id::new(barrier))?.stages as i64;
        (0..stages).contains(&stage).then(|| task * self.bars_per_task + self.bar_offsets[barrier] + stage as usize)
    }

    fn deadlock(&self) -> KernelError {
        let mut text = "nothing can proceed:".to_string();
        for (u, unit) in self.units.iter().enumerate() {
            let what = match unit.status {
                Status::Ready | Status::Done => continue,
                Status::Phase { bar, phase } => {
                    let b = &self.bars[bar];
                    format!(
                        "phase {phase} (parity {}) of {}, which misses {} arrivals and {} bytes",
                        phase % 2,
                        self.bar_name(bar),
                        b.missing,
                        b.bytes
                    )
                }
                Status::Named { bar } => {
                    format!("{}, which misses {} threads", self.bar_name(bar), self.bars[bar].missing)
                }
                Status::Group { kind, .. } => format!("a {} group", kind.name()),
                Status::Meet { scope } => {
                    let m = &self.meetings[scope];
                    format!("a synchronisation that {} of {} units reached", m.arrived, m.members.len())
                }
            };
            let role = &self.ctx.programs[unit.role];
            let stmt = role.steps[unit.pc.saturating_sub(1)].stmt;
            text.push_str(&format!("\n  {} waits for {what}", self.describe(u, stmt)));
        }
        KernelError { kind: ErrorKind::Deadlock, message: text, place: String::new() }
    }

    pub(super) fn describe(&self, unit: usize, stmt: u32) -> String {
        let u = &self.units[unit];
        let role = &self.ctx.kernel.roles[u.role];
        format!(
            "task {:?}, unit {} of {}, `{}`",
            self.coords[u.task], u.number, role.name, self.ctx.places[stmt as usize]
        )
    }

    pub(super) fn error(&self, unit: usize, stmt: u32, kind: ErrorKind, message: impl Into<String>) -> KernelError {
        KernelError { kind, message: message.into(), place: self.describe(unit, stmt) }
    }

    pub(super) fn fault(
        &self,
        unit: usize,
        stmt: u32,
        buffer: &str,
        coords: Option<Vec<i64>>,
        f: Fault,
    ) -> KernelError {
        let at = coords.map_or_else(String::new, |c| format!("{c:?}"));
        let other =
            f.other.map_or_else(String::new, |s| format!("; the other access is `{}`", self.ctx.places[s as usize]));
        self.error(unit, stmt, f.kind, format!("`{buffer}`{at}: {}{other}", f.text))
    }

    pub(super) fn memory(&mut self, task: usize, buf: usize) -> Option<&mut Memory> {
        match self.place[task][buf] {
            Ok(local) => self.local.get_mut(local),
            Err(param) => self.memories.get_mut(param)?.as_mut(),
        }
    }

    /// A uniform expression's value for the unit.
    pub(super) fn value(&mut self, unit: usize, e: &Uniform, stmt: u32) -> Result<f64, KernelError> {
        Ok(match e {
            Uniform::Const(x) => *x,
            Uniform::Var(v) => match self.units[unit].vars[*v] {
                Some(i) => i as f64,
                None => {
                    let name = &self.ctx.kernel.vars[Id::new(*v)].name;
                    let text = format!("variable `{name}` has no value yet");
                    return Err(self.error(unit, stmt, ErrorKind::Uninitialised, text));
                }
            },
            Uniform::Grid(d) => self.coords[self.units[unit].task].get(*d).map_or(0.0, |c| *c as f64),
            Uniform::Unit => self.units[unit].number as f64,
            Uniform::ClusterRank => self.cluster_of[self.units[unit].task].1 as f64,
            Uniform::Fetch { buf, at } => {
                let at = at.iter().map(|e| self.integer(unit, e, stmt)).collect::<Result<Vec<_>, _>>()?;
                return self.fetch(unit, *buf, &at, stmt);
            }
            Uniform::Unary(op, a) => op.eval(self.value(unit, a, stmt)?),
            Uniform::Binary(op, int, a, b) => op.eval(self.value(unit, a, stmt)?, self.value(unit, b, stmt)?, *int),
            Uniform::Fma(a, b, c) => {
                let (a, b, c) = (self.value(unit, a, stmt)?, self.value(unit, b, stmt)?, self.value(unit, c, stmt)?);
                a.mul_add(b, c)
            }
            Uniform::Select(c, a, b) => {
                let taken = if self.value(unit, c, stmt)? != 0.0 { a } else { b };
                self.value(unit, taken, stmt)?
            }
            Uniform::Cast(d, a) => d.round(self.value(unit, a, stmt)?),
            Uniform::Rand(of) => {
                let mut values = [0.0; 5];
                for (v, e) in values.iter_mut().zip(of.iter()) {
                    *v = self.value(unit, e, stmt)?;
                }
                crate::tile::eval::uniform_of(values)
            }
        })
    }

    pub(super) fn integer(&mut self, unit: usize, e: &Uniform, stmt: u32) -> Result<i64, KernelError> {
        let v = self.value(unit, e, stmt)?;
        if v.fract() != 0.0 || v.abs() > 9e15 {
            return Err(self.error(unit, stmt, ErrorKind::Illegal, format!("{v} is used as an integer")));
        }
        Ok(v as i64)
    }

    fn fetch(&mut self, unit: usize, buf: usize, at: &[i64], stmt: u32) -> Result<f64, KernelError> {
        let (base, task) = (self.base, self.units[unit].task);
        let place = self.place[task][buf];
        let memory = match place {
            Ok(local) => &mut self.local[local],
            Err(param) => self.memories[param].as_mut().expect("arrays stay while the kernel runs"),
        };
        if at.len() != memory.dims.len() || at.iter().zip(&memory.dims).any(|(a, d)| a < &0 || a >= d) {
            return Ok(0.0);
        }
        let position = memory.position(0, at);
        let known = &self.units[unit].known;
        let who = Access { agent: base + unit as u32, clock: known[unit], known, base, stmt, fences: None };
        let result = memory.fetch(position, &who);
        let name = memory.name.clone();
        result.map_err(|f| self.fault(unit, stmt, &name, Some(at.to_vec()), f))
    }
}

/// Shared or scratch memory of one task.
fn local_memory(ctx: &Context<'_>, buf: usize, concurrent: bool) -> Result<Memory, KernelError> {
    let b = &ctx.kernel.bufs[Id::new(buf)];
    let (dims, strides) = &ctx.extents[buf];
    let (placement, elems) = match &b.space {
        BufSpace::Global { .. } => return Err(KernelError::illegal(format!("no array is given for `{}`", b.name))),
        BufSpace::Scratch { .. } => {
            if strides.len() != dims.len() {
                return Err(KernelError::illegal(format!("`{}` has {} strides", b.name, strides.len())));
            }
            let last: i64 = dims.iter().zip(strides).map(|(d, s)| (d - 1).max(0) * s).sum();
            (Placement::Strided(strides.clone()), if dims.contains(&0) { 0 } else { last as usize + 1 })
        }
        BufSpace::Shared { layout, stages } => {
            let extents: Vec<i64> = layout.extents().iter().map(|e| *e as i64).collect();
            if extents != *dims {
                return Err(KernelError::illegal(format!("`{}` has extents {dims:?}, its layout {extents:?}", b.name)));
            }
            let elem_bytes = b.dtype.bytes(1);
            let stage_elems = (layout.stage_bytes(elem_bytes) / elem_bytes) as usize;
            let tables = (0..dims.len())
                .map(|d| {
                    let mut coords = vec![0; dims.len()];
                    (0..dims[d])
                        .map(|c| {
                            coords[d] = c as u64;
                            layout.offset(&coords) as u32
                        })
                        .collect()
                })
                .collect();
            let placement =
                Placement::Tables { tables, swizzle: layout.swizzle, elem_bytes, stage_elems, stages: *stages };
            (placement, stage_elems * *stages as usize)
        }
    };
    if elems > 1 << 31 {
        return Err(KernelError::illegal(format!("`{}` has {elems} elements", b.name)));
    }
    Ok(Memory::new(b.name.clone(), b.dtype, dims.clone(), placement, vec![0.0; elems], vec![false; elems], concurrent))
}
