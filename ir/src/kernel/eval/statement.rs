//! The statements that complete at once: elementwise work, loads and stores, barriers, fences and groups.
//!
//! Invariant: each returns whether the unit may run on; after anything others could observe or must wait for, it is
//! the scheduler's turn.

use super::compile::{Column, Inst, Lane, Limits, Uniform, Window};
use super::machine::{FragState, Status, Wave, join, kind_index};
use super::memory::{Access, Memory, PRIOR_CLOCK, Placement, WRITTEN};
use super::{ErrorKind, KernelError};
use crate::arena::Id;
use crate::kernel::{BarrierKind, FenceKind, GridDependency, GroupKind};
use crate::ops::{BinaryOp, ReduceOp};

/// A window with its numbers: what a load, store or copy walks.
#[derive(Clone, Debug)]
pub(super) struct Walked {
    pub(super) buf: usize,
    pub(super) stage: u64,
    pub(super) origin: Vec<i64>,
    pub(super) walk: Vec<Option<(usize, i64)>>,
    pub(super) extents: Vec<u64>,
}

impl Walked {
    /// Buffer coordinates of tile element `n` (last tile dimension fastest).
    pub(super) fn coords(&self, n: usize) -> Vec<i64> {
        let mut rest = n as u64;
        let mut coords = self.origin.clone();
        for d in (0..self.extents.len()).rev() {
            let i = rest % self.extents[d].max(1);
            rest /= self.extents[d].max(1);
            if let Some((dim, step)) = self.walk[d] {
                coords[dim] += i as i64 * step;
            }
        }
        coords
    }

    /// Element positions in `memory`; −1 for tile coordinates at or beyond `limits`. Coordinates outside the buffer
    /// are absent too if `clip`; otherwise they are an error, which is the coordinates.
    pub(super) fn positions(&self, memory: &Memory, limits: &[(usize, i64)], clip: bool) -> Result<Vec<i64>, Vec<i64>> {
        let n = self.extents.iter().product::<u64>() as usize;
        let absent = |d: usize, i: i64| limits.iter().any(|(dim, limit)| *dim == d && i >= *limit);
        let last: Vec<i64> = (0..self.extents.len())
            .map(|d| limits.iter().filter(|l| l.0 == d).fold(self.extents[d] as i64, |m, l| m.min(l.1)).max(0) - 1)
            .collect();
        if last.iter().any(|l| *l < 0) {
            return Ok(vec![-1; n]);
        }
        let mut low = self.origin.clone();
        let mut high = self.origin.clone();
        let mut walkers = vec![0; self.origin.len()];
        for (d, w) in self.walk.iter().enumerate() {
            if let Some((dim, step)) = *w {
                walkers[dim] += 1;
                low[dim] += (last[d] * step).min(0);
                high[dim] += (last[d] * step).max(0);
            }
        }
        let inside = low.iter().all(|l| *l >= 0) && high.iter().zip(&memory.dims).all(|(h, d)| h < d);
        let additive = match &memory.placement {
            Placement::Strided(_) => true,
            Placement::Tables { .. } => walkers.iter().all(|w| *w <= 1),
        };
        if inside && additive {
            return Ok(self.separable(memory, &absent));
        }
        let mut out = Vec::with_capacity(n);
        let mut tile = vec![0i64; self.extents.len()];
        for e in 0..n {
            if tile.iter().enumerate().any(|(d, i)| absent(d, *i)) {
                out.push(-1);
            } else {
                let coords = self.coords(e);
                if coords.iter().zip(&memory.dims).all(|(c, d)| (0..*d).contains(c)) {
                    out.push(memory.position(self.stage, &coords));
                } else if clip {
                    out.push(-1);
                } else {
                    return Err(coords);
                }
            }
            for d in (0..tile.len()).rev() {
                tile[d] += 1;
                if tile[d] < self.extents[d] as i64 {
                    break;
                }
                tile[d] = 0;
            }
        }
        Ok(out)
    }

    /// Positions as sums of one table per tile dimension.
    fn separable(&self, memory: &Memory, absent: &dyn Fn(usize, i64) -> bool) -> Vec<i64> {
        const ABSENT: i64 = i64::MIN / 16;
        let walked: Vec<usize> = self.walk.iter().flatten().map(|w| w.0).collect();
        let (base, offset): (i64, Box<dyn Fn(usize, i64) -> i64 + '_>) = match &memory.placement {
            Placement::Strided(strides) => (
                self.origin.iter().zip(strides).map(|(c, s)| c * s).sum(),
                Box::new(move |d, i| self.walk[d].map_or(0, |(dim, step)| i * step * strides[dim])),
            ),
            Placement::Tables { tables, .. } => (
                (0..self.origin.len())
                    .filter(|d| !walked.contains(d))
                    .map(|d| i64::from(tables[d][self.origin[d] as usize]))
                    .sum(),
                Box::new(move |d, i| {
                    self.walk[d].map_or(0, |(dim, step)| i64::from(tables[dim][(self.origin[dim] + i * step) as usize]))
                }),
            ),
        };
        let mut out = vec![base];
        for (d, &extent) in self.extents.iter().enumerate() {
            let table: Vec<i64> =
                (0..extent as i64).map(|i| if absent(d, i) { ABSENT } else { offset(d, i) }).collect();
            out = out.iter().flat_map(|x| table.iter().map(move |t| x + t)).collect();
        }
        match &memory.placement {
            Placement::Strided(_) => {
                for p in out.iter_mut().filter(|p| **p < ABSENT / 2) {
                    *p = -1;
                }
            }
            Placement::Tables { swizzle, elem_bytes, stage_elems, .. } => {
                let stage = (self.stage as usize * stage_elems) as i64;
                for p in &mut out {
                    *p = match swizzle {
                        _ if *p < ABSENT / 2 => -1,
                        None => stage + *p,
                        Some(s) => stage + (s.apply(*p as u64 * elem_bytes) / elem_bytes) as i64,
                    };
                }
            }
        }
        out
    }
}

impl Wave<'_, '_> {
    pub(super) fn statement(&mut self, unit: usize, inst: &Inst, stmt: u32) -> Result<bool, KernelError> {
        match inst {
            Inst::Map { out, value } => {
                let values = self.column(unit, value, stmt)?;
                self.set_frag(unit, *out, values, stmt)?;
                Ok(true)
            }
            Inst::Reduce { out, op, src, over, base, bounds, carry } => {
                self.reduce(unit, out, *op, *src, over, base.as_ref(), bounds, *carry, stmt)?;
                Ok(true)
            }
            Inst::Scan { out, op, src, along, carry, bounds } => {
                self.scan(unit, *out, *op, *src, *along, *carry, bounds, stmt)?;
                Ok(true)
            }
            Inst::Load { out, src, bounds } => {
                let extents = self.units[unit].frags[*out].dims.clone();
                let walked = self.walked(unit, src, extents, stmt)?;
                let limits = self.limits(unit, bounds, stmt)?;
                let positions = self.positions(unit, &walked, &limits, false, stmt)?;
                let values = self.read_generic(unit, walked.buf, &positions, stmt, |n| Some(walked.coords(n)))?;
                self.set_frag(unit, *out, values, stmt)?;
                Ok(true)
            }
            Inst::Store { dst, src, bounds, join } => {
                self.use_frag(unit, *src, false, stmt)?;
                let extents = self.units[unit].frags[*src].dims.clone();
                let walked = self.walked(unit, dst, extents, stmt)?;
                let limits = self.limits(unit, bounds, stmt)?;
                let positions = self.positions(unit, &walked, &limits, false, stmt)?;
                self.write_generic(unit, walked.buf, &positions, *src, *join, stmt, |n| Some(walked.coords(n)))?;
                Ok(true)
            }
            Inst::Gather { out, buf, at, bounds } => {
                let (positions, coords) = self.indexed(unit, *buf, at, bounds, *out, stmt)?;
                let at = |n: usize| coords.iter().map(|c| c.get(n).map(|x| *x as i64)).collect();
                let values = self.read_generic(unit, *buf, &positions, stmt, at)?;
                self.set_frag(unit, *out, values, stmt)?;
                Ok(true)
            }
            Inst::Scatter { buf, at, src, bounds, join } => {
                self.use_frag(unit, *src, false, stmt)?;
                let (positions, coords) = self.indexed(unit, *buf, at, bounds, *src, stmt)?;
                let at = |n: usize| coords.iter().map(|c| c.get(n).map(|x| *x as i64)).collect();
                self.write_generic(unit, *buf, &positions, *src, *join, stmt, at)?;
                Ok(true)
            }
            Inst::Atom { atom, acc, acc_from, a, b, keep } => {
                let keep = self.value(unit, keep, stmt)? != 0.0;
                self.issue_atom(unit, atom, *acc, acc_from, a, b, keep, stmt)?;
                Ok(!atom.asynchronous)
            }
            Inst::Copy { engine, src, dst, extents, signal, multicast } => {
                self.issue_copy(unit, *engine, src, dst, extents, signal.as_ref(), *multicast, stmt)?;
                Ok(false)
            }
            Inst::Arrive { barrier, stage, expect, remote } => {
                let stage = self.integer(unit, stage, stmt)?;
                let task = match remote {
                    None => self.units[unit].task,
                    Some(r) => {
                        let rank = self.integer(unit, r, stmt)?;
                        let cluster = self.cluster_of[self.units[unit].task].0;
                        match usize::try_from(rank).ok().and_then(|r| self.clusters[cluster].get(r)) {
                            Some(task) => *task,
                            None => {
                                let text = format!("cluster rank {rank} does not exist");
                                return Err(self.error(unit, stmt, ErrorKind::OutOfBounds, text));
                            }
                        }
                    }
                };
                let bar = self.barrier(unit, task, *barrier, stage, stmt)?;
                self.refuse_exited(unit, task, "arrives at", stmt)?;
                if let Some(bytes) = expect {
                    self.bars[bar].bytes += *bytes as i64;
                }
                if task != self.units[unit].task {
                    self.bars[bar].distant = self.bars[bar].phase + 1;
                }
                let known = self.units[unit].known.clone();
                self.tick(unit);
                if !self.arrive(bar, 1, &known) {
                    let text = format!("more arrivals at {} than its phase counts", self.bar_name(bar));
                    return Err(self.error(unit, stmt, ErrorKind::Barrier, text));
                }
                self.settle(bar)?;
                Ok(false)
            }
            Inst::Wait { barrier, stage, phase } => {
                let (stage, parity) = (self.integer(unit, stage, stmt)?, self.integer(unit, phase, stmt)?);
                let bar = self.barrier(unit, self.units[unit].task, *barrier, stage, stmt)?;
                if !(0..=1).contains(&parity) {
                    let text = format!("the phase of a wait is a parity, 0 or 1, not {parity}");
                    return Err(self.error(unit, stmt, ErrorKind::Barrier, text));
                }
                let current = self.bars[bar].phase;
                if current % 2 == parity as u64 {
                    self.units[unit].status = Status::Phase { bar, phase: current };
                } else {
                    let released = self.bars[bar].released.clone();
                    join(&mut self.units[unit].known, &released);
                }
                Ok(false)
            }
            Inst::Named { barrier, stage, blocks } => {
                let stage = self.integer(unit, stage, stmt)?;
                let bar = self.barrier(unit, self.units[unit].task, *barrier, stage, stmt)?;
                if !matches!(self.bars[bar].kind, BarrierKind::Named { .. }) {
                    return Err(self.error(unit, stmt, ErrorKind::Illegal, "this is no named barrier"));
                }
                let threads = self.ctx.kernel.roles[self.units[unit].role].scope.threads();
                let known = self.units[unit].known.clone();
                self.tick(unit);
                if *blocks {
                    self.units[unit].status = Status::Named { bar };
                }
                if !self.arrive(bar, threads, &known) {
                    let text = format!("more threads at {} than it counts", self.bar_name(bar));
                    return Err(self.error(unit, stmt, ErrorKind::Barrier, text));
                }
                self.settle(bar)?;
                Ok(false)
            }
            Inst::Fence(kind) => {
                match kind {
                    FenceKind::ProxyAsync => {
                        let clock = self.units[unit].known[unit];
                        self.fences[unit].push(clock);
                        self.tick(unit);
                    }
                    FenceKind::Wgmma => self.units[unit].frags.iter_mut().for_each(|f| f.touched = false),
                    FenceKind::MbarrierInit | FenceKind::Gpu => {}
                }
                Ok(true)
            }
            Inst::Commit(kind) => {
                let q = &mut self.units[unit].queues[kind_index(*kind)];
                q.committed = q.issued;
                q.groups.push(q.committed);
                Ok(false)
            }
            Inst::WaitGroup { kind, pending } => {
                let agent = self.queue_agent(unit, *kind);
                let u = &mut self.units[unit];
                let q = &mut u.queues[kind_index(*kind)];
                let number = q.groups.len().checked_sub(*pending as usize + 1).map_or(0, |i| q.groups[i]);
                if q.done < number {
                    // Tried again once the queue has got that far.
                    u.pc -= 1;
                    u.status = Status::Group { kind: *kind, number };
                } else {
                    let keep = q.groups.len().saturating_sub(*pending as usize);
                    q.groups.drain(..keep);
                    u.known[agent] = u.known[agent].max(number);
                }
                Ok(false)
            }
            Inst::Last { var, counter, at, of } => {
                self.last(unit, *var, *counter, at, of, stmt)?;
                Ok(false)
            }
            Inst::GridDependency(GridDependency::Wait) => {
                let prior = self.prior_agent();
                self.units[unit].known[prior] = PRIOR_CLOCK;
                Ok(false)
            }
            // Whether the next grid starts early is for its evaluation.
            Inst::GridDependency(GridDependency::Launch) => Ok(true),
            Inst::LoopInit { .. }
            | Inst::LoopTest { .. }
            | Inst::LoopStep { .. }
            | Inst::Branch { .. }
            | Inst::Jump(_)
            | Inst::Let { .. }
            | Inst::TaskSync
            | Inst::ClusterSync
            | Inst::GridSync
            | Inst::End => unreachable!("control flow is the machine's"),
        }
    }

    /// Counts the unit at a counter: it publishes what it knows there, and learns what was published before.
    fn last(
        &mut self,
        unit: usize,
        var: usize,
        counter: usize,
        at: &[Uniform],
        of: &Uniform,
        stmt: u32,
    ) -> Result<(), KernelError> {
        let of = self.integer(unit, of, stmt)?;
        let at = at.iter().map(|e| self.integer(unit, e, stmt)).collect::<Result<Vec<_>, _>>()?;
        let refuse = |s: &Self, kind, text: &str| Err(s.error(unit, stmt, kind, text));
        let Err(param) = self.place[self.units[unit].task][counter] else {
            return refuse(self, ErrorKind::Illegal, "counters are in device memory");
        };
        let memory = self.memories[param].as_mut().expect("arrays stay while the kernel runs");
        if at.len() != memory.dims.len() || at.iter().zip(&memory.dims).any(|(a, d)| a < &0 || a >= d) {
            return refuse(self, ErrorKind::OutOfBounds, "the counter does not exist");
        }
        let position = memory.position(0, &at) as usize;
        if !memory.defined[position] {
            return refuse(self, ErrorKind::Uninitialised, "the counter was never set to 0");
        }
        let before = memory.data[position] as i64;
        if before >= of {
            return refuse(self, ErrorKind::Barrier, "more units count than there are");
        }
        let last = before + 1 == of;
        memory.marks[position] |= WRITTEN;
        memory.data[position] = if last { 0.0 } else { (before + 1) as f64 };
        let agents = self.agents();
        let published = self.counted.entry((param, position)).or_insert_with(|| vec![0; agents]);
        join(published, &self.units[unit].known);
        self.units[unit].known.clone_from(published);
        self.tick(unit);
        self.units[unit].vars[var] = Some(i64::from(last));
        Ok(())
    }

    pub(super) fn barrier(
        &self,
        unit: usize,
        task: usize,
        barrier: usize,
        stage: i64,
        stmt: u32,
    ) -> Result<usize, KernelError> {
        self.bar_of(task, barrier, stage).ok_or_else(|| {
            let name = &self.ctx.kernel.barriers[Id::new(barrier)].name;
            self.error(unit, stmt, ErrorKind::OutOfBounds, format!("barrier `{name}` has no stage {stage}"))
        })
    }

    /// An error if every unit of `task` has ended.
    pub(super) fn refuse_exited(&self, unit: usize, task: usize, verb: &str, stmt: u32) -> Result<(), KernelError> {
        if self.units.iter().filter(|u| u.task == task).all(|u| u.status == Status::Done) {
            let text = format!("{verb} task {:?}, which has ended", self.coords[task]);
            return Err(self.error(unit, stmt, ErrorKind::InFlight, text));
        }
        Ok(())
    }

    /// Checks that the fragment may be read (or written) now.
    pub(super) fn use_frag(&mut self, unit: usize, frag: usize, write: bool, stmt: u32) -> Result<(), KernelError> {
        let finished = self.units[unit].known[self.queue_agent(unit, GroupKind::Wgmma)];
        let f = &mut self.units[unit].frags[frag];
        f.touched = true;
        let name = &self.ctx.kernel.frags[Id::new(frag)].name;
        if f.written_by > finished {
            let text = format!("`{name}` is used while a wgmma writes it: wait_group is missing");
            return Err(self.error(unit, stmt, ErrorKind::InFlight, text));
        }
        if write && f.read_by > finished {
            let text = format!("`{name}` is overwritten while a wgmma reads it: wait_group is missing");
            return Err(self.error(unit, stmt, ErrorKind::InFlight, text));
        }
        if !write && !f.whole {
            let elems = f.dims.iter().product::<u64>() as usize;
            if f.data.len() != elems || !f.defined.iter().all(|d| *d) {
                let text = format!("`{name}` is read before all of it was written");
                return Err(self.error(unit, stmt, ErrorKind::Uninitialised, text));
            }
            f.whole = true;
        }
        Ok(())
    }

    fn set_frag(&mut self, unit: usize, frag: usize, mut values: Vec<f64>, stmt: u32) -> Result<(), KernelError> {
        self.use_frag(unit, frag, true, stmt)?;
        let dtype = self.ctx.kernel.frags[Id::new(frag)].dtype;
        if self.ctx.options.rounding || !dtype.is_float() {
            values.iter_mut().for_each(|v| *v = super::round(dtype, *v));
        }
        let f = &mut self.units[unit].frags[frag];
        f.data = values;
        f.whole = true;
        Ok(())
    }

    pub(super) fn walked(
        &mut self,
        unit: usize,
        w: &Window,
        extents: Vec<u64>,
        stmt: u32,
    ) -> Result<Walked, KernelError> {
        let stage = match &w.stage {
            None => 0,
            Some(s) => self.integer(unit, s, stmt)?,
        };
        let origin = w.at.iter().map(|e| self.integer(unit, e, stmt)).collect::<Result<Vec<_>, _>>()?;
        let task = self.units[unit].task;
        let (rank, stages, name) = match self.memory(task, w.buf) {
            Some(m) => {
                let stages = match &m.placement {
                    Placement::Strided(_) => 1,
                    Placement::Tables { stages, .. } => *stages,
                };
                (m.dims.len(), stages, m.name.clone())
            }
            None => return Err(self.error(unit, stmt, ErrorKind::Illegal, "this buffer has no memory")),
        };
        let walk_ok = w.walk.iter().flatten().all(|(dim, _)| *dim < rank);
        if origin.len() != rank || w.walk.len() != extents.len() || !walk_ok {
            let text = format!("the window into `{name}` has the wrong number of dimensions");
            return Err(self.error(unit, stmt, ErrorKind::Illegal, text));
        }
        if !(0..stages as i64).contains(&stage) {
            let text = format!("`{name}` has no stage {stage}");
            return Err(self.error(unit, stmt, ErrorKind::OutOfBounds, text));
        }
        Ok(Walked { buf: w.buf, stage: stage as u64, origin, walk: w.walk.clone(), extents })
    }

    fn limits(&mut self, unit: usize, bounds: &Limits, stmt: u32) -> Result<Vec<(usize, i64)>, KernelError> {
        bounds.iter().map(|(d, e)| Ok((*d, self.integer(unit, e, stmt)?))).collect()
    }

    /// Positions of a window in the unit's memory.
    pub(super) fn positions(
        &mut self,
        unit: usize,
        walked: &Walked,
        limits: &[(usize, i64)],
        clip: bool,
        stmt: u32,
    ) -> Result<Vec<i64>, KernelError> {
        let task = self.units[unit].task;
        let memory = self.memory(task, walked.buf).expect("checked when the window was resolved");
        let result = walked.positions(memory, limits, clip);
        let (name, dims) = (memory.name.clone(), memory.dims.clone());
        result.map_err(|c| {
            let text = format!("`{name}`{c:?} is outside its extents {dims:?}");
            self.error(unit, stmt, ErrorKind::OutOfBounds, text)
        })
    }

    fn read_generic(
        &mut self,
        unit: usize,
        buf: usize,
        positions: &[i64],
        stmt: u32,
        coords: impl Fn(usize) -> Option<Vec<i64>>,
    ) -> Result<Vec<f64>, KernelError> {
        let mut values = vec![0.0; positions.len()];
        let (base, task) = (self.base, self.units[unit].task);
        let known = &self.units[unit].known;
        let who = Access { agent: base + unit as u32, clock: known[unit], known, base, stmt, fences: None };
        let memory = match self.place[task][buf] {
            Ok(local) => &mut self.local[local],
            Err(param) => self.memories[param].as_mut().expect("arrays stay while the kernel runs"),
        };
        let result = memory.read(positions, &mut values, &who);
        let name = memory.name.clone();
        result.map_err(|f| self.fault(unit, stmt, &name, coords(f.position), f))?;
        Ok(values)
    }

    #[allow(clippy::too_many_arguments)]
    fn write_generic(
        &mut self,
        unit: usize,
        buf: usize,
        positions: &[i64],
        src: usize,
        join: Option<ReduceOp>,
        stmt: u32,
        coords: impl Fn(usize) -> Option<Vec<i64>>,
    ) -> Result<(), KernelError> {
        let (base, task) = (self.base, self.units[unit].task);
        let u = &self.units[unit];
        let who = Access { agent: base + unit as u32, clock: u.known[unit], known: &u.known, base, stmt, fences: None };
        let memory = match self.place[task][buf] {
            Ok(local) => &mut self.local[local],
            Err(param) => self.memories[param].as_mut().expect("arrays stay while the kernel runs"),
        };
        let result = memory.write(positions, &u.frags[src].data, &who, join, self.ctx.options.rounding);
        let name = memory.name.clone();
        result.map_err(|f| self.fault(unit, stmt, &name, coords(f.position), f))
    }

    /// Positions and coordinates of a gather or scatter over the tile of `frag`; outside is absent.
    fn indexed(
        &mut self,
        unit: usize,
        buf: usize,
        at: &[Column],
        bounds: &Limits,
        frag: usize,
        stmt: u32,
    ) -> Result<(Vec<i64>, Vec<Vec<f64>>), KernelError> {
        let coords = at.iter().map(|c| self.column(unit, c, stmt)).collect::<Result<Vec<_>, _>>()?;
        let limits = self.limits(unit, bounds, stmt)?;
        let dims = self.units[unit].frags[frag].dims.clone();
        let task = self.units[unit].task;
        let Some(memory) = self.memory(task, buf).filter(|m| m.dims.len() == at.len()) else {
            return Err(self.error(unit, stmt, ErrorKind::Illegal, "one coordinate per dimension is needed"));
        };
        let n = dims.iter().product::<u64>() as usize;
        let mut positions = Vec::with_capacity(n);
        let mut point = vec![0i64; at.len()];
        for e in 0..n {
            let mut rest = e as u64;
            let mut present = true;
            for d in (0..dims.len()).rev() {
                let i = (rest % dims[d]) as i64;
                rest /= dims[d];
                present &= limits.iter().all(|(dim, limit)| *dim != d || i < *limit);
            }
            for (p, c) in point.iter_mut().zip(&coords) {
                *p = c[e] as i64;
            }
            present &= point.iter().zip(&memory.dims).all(|(c, d)| (0..*d).contains(c));
            positions.push(if present { memory.position(0, &point) } else { -1 });
        }
        Ok((positions, coords))
    }

    /// An elementwise expression's values.
    fn column(&mut self, unit: usize, column: &Column, stmt: u32) -> Result<Vec<f64>, KernelError> {
        let mut uniforms = vec![0.0; column.lanes.len()];
        for (i, lane) in column.lanes.iter().enumerate() {
            match lane {
                Lane::Uniform(u) => uniforms[i] = self.value(unit, u, stmt)?,
                Lane::Frag { frag, .. } => self.use_frag(unit, *frag, false, stmt)?,
                Lane::Table(_)
                | Lane::Unary(..)
                | Lane::Binary(..)
                | Lane::Fma(..)
                | Lane::Select(..)
                | Lane::Cast(..)
                | Lane::Rand(_) => {}
            }
        }
        Ok(evaluate(column, &uniforms, &self.units[unit].frags))
    }

    #[allow(clippy::too_many_arguments)]
    fn reduce(
        &mut self,
        unit: usize,
        out: &[usize],
        op: ReduceOp,
        src: usize,
        over: &[usize],
        base: Option<&Uniform>,
        bounds: &Limits,
        carry: bool,
        stmt: u32,
    ) -> Result<(), KernelError> {
        let base = match base {
            Some(b) => self.value(unit, b, stmt)?,
            None => 0.0,
        };
        let limits = self.limits(unit, bounds, stmt)?;
        self.use_frag(unit, src, false, stmt)?;
        let wanted = if op.selects_argument() { 2 } else { 1 };
        let dims = self.units[unit].frags[src].dims.clone();
        let kept: Vec<usize> = (0..dims.len()).filter(|d| !over.contains(d)).collect();
        let shape: Vec<u64> = kept.iter().map(|d| dims[*d]).collect();
        if out.len() != wanted || out.iter().any(|o| self.units[unit].frags[*o].dims != shape) {
            let text = format!("a reduction by {} has {wanted} results of extents {shape:?}", op.name());
            return Err(self.error(unit, stmt, ErrorKind::Illegal, text));
        }
        let n = shape.iter().product::<u64>() as usize;
        let start = match op {
            ReduceOp::ArgMax => f64::NEG_INFINITY,
            ReduceOp::ArgMin => f64::INFINITY,
            _ => op.identity(),
        };
        let mut values = vec![start; n];
        let mut at = vec![-1.0; n];
        if carry {
            for o in out {
                self.use_frag(unit, *o, false, stmt)?;
            }
            values.clone_from(&self.units[unit].frags[out[0]].data);
            if wanted == 2 {
                at.clone_from(&self.units[unit].frags[out[1]].data);
            }
        }
        // Row-major strides of the result and of the reduced positions along each dimension of the source.
        let mut to = vec![0usize; dims.len()];
        let mut along = vec![0usize; dims.len()];
        for (list, strides) in [(&kept, &mut to), (&over.to_vec(), &mut along)] {
            let mut stride = 1;
            for &d in list.iter().rev() {
                strides[d] = stride;
                stride *= dims[d] as usize;
            }
        }
        let data = &self.units[unit].frags[src].data;
        let mut tile = vec![0usize; dims.len()];
        for &x in data {
            if limits.iter().all(|(d, limit)| (tile[*d] as i64) < *limit) {
                let i: usize = tile.iter().zip(&to).map(|(t, s)| t * s).sum();
                if wanted == 1 {
                    values[i] = op.combine(values[i], x);
                } else {
                    let p = base + tile.iter().zip(&along).map(|(t, s)| t * s).sum::<usize>() as f64;
                    let better = match op {
                        ReduceOp::ArgMin => x < values[i],
                        _ => x > values[i],
                    };
                    if at[i] < 0.0 || better || (x.is_nan() && !values[i].is_nan()) {
                        (values[i], at[i]) = (x, p);
                    } else if x == values[i] && p < at[i] {
                        at[i] = p;
                    }
                }
            }
            for d in (0..tile.len()).rev() {
                tile[d] += 1;
                if tile[d] < dims[d] as usize {
                    break;
                }
                tile[d] = 0;
            }
        }
        self.set_frag(unit, out[0], values, stmt)?;
        if wanted == 2 {
            self.set_frag(unit, out[1], at, stmt)?;
        }
        Ok(())
    }
}

impl Wave<'_, '_> {
    #[allow(clippy::too_many_arguments)]
    fn scan(
        &mut self,
        unit: usize,
        out: usize,
        op: ReduceOp,
        src: usize,
        along: usize,
        carry: Option<usize>,
        bounds: &Limits,
        stmt: u32,
    ) -> Result<(), KernelError> {
        let limits = self.limits(unit, bounds, stmt)?;
        self.use_frag(unit, src, false, stmt)?;
        let frags = &self.units[unit].frags;
        let dims: Vec<usize> = frags[src].dims.iter().map(|d| *d as usize).collect();
        let kept: Vec<u64> = (0..dims.len()).filter(|d| *d != along).map(|d| dims[d] as u64).collect();
        let fits = along < dims.len() && frags[out].dims == frags[src].dims;
        if !fits || carry.is_some_and(|c| frags[c].dims != kept) {
            let text = "a scan's result is shaped as its source, its carry as the source without a dimension";
            return Err(self.error(unit, stmt, ErrorKind::Illegal, text));
        }
        let inner: usize = dims[along + 1..].iter().product();
        let outer: usize = dims[..along].iter().product();
        let mut running = vec![op.identity(); outer * inner];
        if let Some(c) = carry {
            self.use_frag(unit, c, false, stmt)?;
            running.clone_from(&self.units[unit].frags[c].data);
        }
        let data = &self.units[unit].frags[src].data;
        let mut values = vec![0.0; data.len()];
        let mut tile = vec![0usize; dims.len()];
        for (e, x) in data.iter().enumerate() {
            let lane = e / (inner * dims[along]) * inner + e % inner;
            if limits.iter().all(|(d, limit)| (tile[*d] as i64) < *limit) {
                running[lane] = op.combine(running[lane], *x);
            }
            values[e] = running[lane];
            for d in (0..tile.len()).rev() {
                tile[d] += 1;
                if tile[d] < dims[d] {
                    break;
                }
                tile[d] = 0;
            }
        }
        self.set_frag(unit, out, values, stmt)?;
        match carry {
            Some(c) => self.set_frag(unit, c, running, stmt),
            None => Ok(()),
        }
    }
}

/// Elements evaluated at a time.
const CHUNK: usize = 256;

fn evaluate(column: &Column, uniforms: &[f64], frags: &[FragState]) -> Vec<f64> {
    let mut out = vec![0.0; column.len];
    let mut slots = vec![0.0; column.lanes.len() * CHUNK];
    for (i, lane) in column.lanes.iter().enumerate() {
        if let Lane::Uniform(_) = lane {
            slots[i * CHUNK..(i + 1) * CHUNK].fill(uniforms[i]);
        }
    }
    for (c, chunk) in out.chunks_mut(CHUNK).enumerate() {
        let (first, n) = (c * CHUNK, chunk.len());
        for (i, lane) in column.lanes.iter().enumerate() {
            let (before, rest) = slots.split_at_mut(i * CHUNK);
            let dst = &mut rest[..n];
            let arg = |a: usize| &before[a * CHUNK..a * CHUNK + n];
            match lane {
                Lane::Uniform(_) => {}
                Lane::Frag { frag, index: None } => dst.copy_from_slice(&frags[*frag].data[first..first + n]),
                Lane::Frag { frag, index: Some(index) } => {
                    let data = &frags[*frag].data;
                    dst.iter_mut().zip(&index[first..first + n]).for_each(|(d, i)| *d = data[*i as usize]);
                }
                Lane::Table(table) => {
                    dst.iter_mut().zip(&table[first..first + n]).for_each(|(d, t)| *d = f64::from(*t));
                }
                Lane::Unary(op, a) => dst.iter_mut().zip(arg(*a)).for_each(|(d, x)| *d = op.eval(*x)),
                Lane::Binary(op, int, a, b) => binary(*op, *int, dst, arg(*a), arg(*b)),
                Lane::Fma(a, b, c) => {
                    let (a, b, c) = (arg(*a), arg(*b), arg(*c));
                    for (i, d) in dst.iter_mut().enumerate() {
                        *d = a[i] * b[i] + c[i];
                    }
                }
                Lane::Select(c, a, b) => {
                    let (c, a, b) = (arg(*c), arg(*a), arg(*b));
                    for (i, d) in dst.iter_mut().enumerate() {
                        *d = if c[i] != 0.0 { a[i] } else { b[i] };
                    }
                }
                Lane::Rand(of) => {
                    for (i, d) in dst.iter_mut().enumerate() {
                        *d = crate::tile::eval::uniform_of(of.map(|a| arg(a)[i]));
                    }
                }
                Lane::Cast(dtype, a) => {
                    dst.iter_mut().zip(arg(*a)).for_each(|(d, x)| *d = super::round(*dtype, *x));
                }
            }
        }
        let last = (column.lanes.len() - 1) * CHUNK;
        chunk.copy_from_slice(&slots[last..last + n]);
    }
    out
}

fn binary(op: BinaryOp, int: bool, dst: &mut [f64], a: &[f64], b: &[f64]) {
    let mut each = |f: &dyn Fn(f64, f64) -> f64| {
        for ((d, x), y) in dst.iter_mut().zip(a).zip(b) {
            *d = f(*x, *y);
        }
    };
    match op {
        BinaryOp::Add => dst.iter_mut().zip(a).zip(b).for_each(|((d, x), y)| *d = x + y),
        BinaryOp::Sub => dst.iter_mut().zip(a).zip(b).for_each(|((d, x), y)| *d = x - y),
        BinaryOp::Mul => dst.iter_mut().zip(a).zip(b).for_each(|((d, x), y)| *d = x * y),
        BinaryOp::Div
        | BinaryOp::Mod
        | BinaryOp::Pow
        | BinaryOp::Min
        | BinaryOp::Max
        | BinaryOp::Lt
        | BinaryOp::Le
        | BinaryOp::Gt
        | BinaryOp::Ge
        | BinaryOp::Eq
        | BinaryOp::Ne
        | BinaryOp::And
        | BinaryOp::Or => each(&|x, y| op.eval(x, y, int)),
    }
}
