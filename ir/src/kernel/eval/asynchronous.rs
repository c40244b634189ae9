//! Copies and contraction instructions: what issuing them checks, and what completing them does.
//!
//! Invariant: addresses and conditions are fixed at issue; memory and registers are read and written at completion,
//! with what the issuing unit knew at issue. wgmma, cp.async and bulk stores of one unit complete in order.

use std::rc::Rc;

use super::compile::{Source, Uniform, Window};
use super::machine::{Status, Wave, kind_index};
use super::memory::Access;
use super::statement::Walked;
use super::{ErrorKind, KernelError};
use crate::arena::Id;
use crate::kernel::atoms::{Atom, Descriptor};
use crate::kernel::copies::{BOX_ALIGN, TmaBox};
use crate::kernel::{BufSpace, Engine, GroupKind, View};
use crate::layout::MemLayout;

/// Elements of one memory, in tile order.
pub(super) struct Elements {
    place: Result<usize, usize>,
    positions: Vec<i64>,
    walked: Walked,
}

/// What an agent knew when it issued an operation.
#[derive(Clone)]
pub(super) struct Issue {
    unit: usize,
    stmt: u32,
    known: Rc<[u32]>,
    fences: Rc<[u32]>,
}

enum Side {
    Frag { frag: usize, from: Vec<u64> },
    Mem(Elements),
}

enum Operation {
    Contract { atom: Rc<Atom>, acc: usize, acc_from: Vec<u64>, a: Side, b: Side, keep: bool },
    Copy { src: Elements, dst: Elements, signal: Option<(usize, u64)> },
}

/// An operation of an in-order queue.
pub(super) struct Queued {
    issue: Issue,
    number: u32,
    operation: Operation,
}

/// A copy whose bytes a barrier counts.
pub(super) struct Load {
    issue: Issue,
    src: Rc<Elements>,
    dst: Elements,
    task: usize,
    bar: usize,
    phase: u64,
    bytes: u64,
}

/// Copies `window` of a row-major array of extents `dims` out, or in if `put`.
fn window(data: &mut [f64], dims: &[u64], from: &[u64], rows: u64, cols: u64, tile: &mut [f64], put: bool) {
    for r in 0..rows {
        let at = ((from[0] + r) * dims[1] + from[1]) as usize;
        let (x, y) = (&mut data[at..at + cols as usize], &mut tile[(r * cols) as usize..((r + 1) * cols) as usize]);
        if put { x.copy_from_slice(y) } else { y.copy_from_slice(x) }
    }
}

impl Wave<'_, '_> {
    fn issue(&self, unit: usize, stmt: u32) -> Issue {
        let known: Rc<[u32]> = self.units[unit].known.as_slice().into();
        let fences = self
            .fences
            .iter()
            .zip(known.iter())
            .map(|(clocks, k)| clocks.iter().rev().find(|c| *c <= k).copied().unwrap_or(0))
            .collect();
        Issue { unit, stmt, known, fences }
    }

    fn layout(&self, buf: usize) -> Option<(MemLayout, u64)> {
        let b = &self.ctx.kernel.bufs[Id::new(buf)];
        match &b.space {
            BufSpace::Shared { layout, .. } => Some((layout.clone(), b.dtype.bytes(1))),
            BufSpace::Global { .. } | BufSpace::Scratch { .. } => None,
        }
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn issue_atom(
        &mut self,
        unit: usize,
        atom: &Rc<Atom>,
        acc: usize,
        acc_from: &[u64],
        a: &Source,
        b: &Source,
        keep: bool,
        stmt: u32,
    ) -> Result<(), KernelError> {
        let [m, n, k] = atom.shape;
        self.check_window(unit, acc, acc_from, [m, n], stmt)?;
        let a = self.side(unit, a, [m, k], 0, atom, stmt)?;
        let b = self.side(unit, b, [k, n], 1, atom, stmt)?;
        let issue = self.issue(unit, stmt);
        let operation = Operation::Contract { atom: atom.clone(), acc, acc_from: acc_from.to_vec(), a, b, keep };
        if !atom.asynchronous {
            self.use_frag(unit, acc, true, stmt)?;
            return self.perform(Queued { issue, number: 0, operation }, unit as u32);
        }
        let finished = self.units[unit].known[self.queue_agent(unit, GroupKind::Wgmma)];
        let number = self.units[unit].queues[kind_index(GroupKind::Wgmma)].issued + 1;
        let Operation::Contract { a, b, .. } = &operation else { unreachable!("made above") };
        for (side, name) in [(a, "a"), (b, "b")] {
            if let Side::Frag { frag, .. } = side {
                let f = &mut self.units[unit].frags[*frag];
                let (touched, in_flight) = (f.touched, f.written_by > finished);
                f.read_by = number;
                self.check_registers(unit, *frag, name, touched, in_flight, stmt)?;
            }
        }
        let f = &mut self.units[unit].frags[acc];
        let (touched, in_flight) = (f.touched, f.read_by > finished && f.read_by != f.written_by);
        f.written_by = number;
        self.check_registers(unit, acc, "the accumulator", touched, in_flight, stmt)?;
        let q = &mut self.units[unit].queues[kind_index(GroupKind::Wgmma)];
        q.issued = number;
        q.pending.push_back(Queued { issue, number, operation });
        self.tick(unit);
        Ok(())
    }

    fn check_registers(
        &self,
        unit: usize,
        frag: usize,
        what: &str,
        touched: bool,
        in_flight: bool,
        stmt: u32,
    ) -> Result<(), KernelError> {
        let name = &self.ctx.kernel.frags[Id::new(frag)].name;
        if in_flight {
            let text = format!("`{name}` ({what}) belongs to a wgmma in flight: wait_group is missing");
            return Err(self.error(unit, stmt, ErrorKind::InFlight, text));
        }
        if touched {
            let text = format!("registers of `{name}` ({what}) were used since the last `fence wgmma`");
            return Err(self.error(unit, stmt, ErrorKind::InFlight, text));
        }
        Ok(())
    }

    fn check_window(
        &self,
        unit: usize,
        frag: usize,
        from: &[u64],
        shape: [u64; 2],
        stmt: u32,
    ) -> Result<(), KernelError> {
        let f = &self.ctx.kernel.frags[Id::new(frag)];
        let dims = &f.dist.dims;
        let fits = dims.len() == 2 && from.len() == 2 && (0..2).all(|d| from[d] + shape[d] <= dims[d]);
        if fits {
            return Ok(());
        }
        let text = format!("the window {shape:?} at {from:?} is not in `{}` {dims:?}", f.name);
        Err(self.error(unit, stmt, ErrorKind::OutOfBounds, text))
    }

    /// An operand of `shape`, whose dimension `mn` is m or n.
    fn side(
        &mut self,
        unit: usize,
        s: &Source,
        shape: [u64; 2],
        mn: usize,
        atom: &Atom,
        stmt: u32,
    ) -> Result<Side, KernelError> {
        match s {
            Source::Frag { frag, from } => {
                self.check_window(unit, *frag, from, shape, stmt)?;
                Ok(Side::Frag { frag: *frag, from: from.clone() })
            }
            Source::Mem(w) => Ok(Side::Mem(self.described(unit, w, shape, mn, atom, stmt)?)),
        }
    }

    /// The elements that a matrix descriptor for this window makes wgmma read.
    fn described(
        &mut self,
        unit: usize,
        w: &Window,
        shape: [u64; 2],
        mn: usize,
        atom: &Atom,
        stmt: u32,
    ) -> Result<Elements, KernelError> {
        let walked = self.walked(unit, w, shape.to_vec(), stmt)?;
        // Every element must exist; then the hardware's addresses are what counts.
        let positions = self.positions(unit, &walked, &[], false, stmt)?;
        if atom.cooperative() {
            return Ok(Elements { place: self.place[self.units[unit].task][w.buf], positions, walked });
        }
        let illegal = |w: &Self, text: String| w.error(unit, stmt, ErrorKind::Illegal, text);
        let Some((layout, bytes)) = self.layout(w.buf) else {
            return Err(illegal(self, "a memory operand must be in shared memory".to_string()));
        };
        let (Some((mn_dim, 1)), Some((k_dim, 1))) = (w.walk[mn], w.walk[1 - mn]) else {
            return Err(illegal(self, "a memory operand walks two dimensions by steps of 1".to_string()));
        };
        let d = Descriptor::of(&layout, bytes, mn_dim, k_dim, shape[mn], shape[1 - mn])
            .map_err(|text| illegal(self, text))?;
        let task = self.units[unit].task;
        let memory = self.memory(task, w.buf).expect("checked by `walked`");
        let start = memory.linear_byte(walked.stage, &walked.origin);
        let mut positions = Vec::with_capacity((shape[0] * shape[1]) as usize);
        for i in 0..shape[0] {
            for j in 0..shape[1] {
                let (x, k) = if mn == 0 { (i, j) } else { (j, i) };
                positions.push((d.address(start, bytes, x, k) / bytes) as i64);
            }
        }
        Ok(Elements { place: self.place[task][w.buf], positions, walked })
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn issue_copy(
        &mut self,
        unit: usize,
        engine: Engine,
        src: &Window,
        dst: &Window,
        extents: &[u64],
        signal: Option<&(usize, Uniform)>,
        multicast: Option<u64>,
        stmt: u32,
    ) -> Result<(), KernelError> {
        let task = self.units[unit].task;
        let from = self.walked(unit, src, extents.to_vec(), stmt)?;
        let to = self.walked(unit, dst, extents.to_vec(), stmt)?;
        let issue = self.issue(unit, stmt);
        let signal = match signal {
            None => None,
            Some((barrier, stage)) => Some((*barrier, self.integer(unit, stage, stmt)?)),
        };
        let (from_shared, to_shared) = (self.layout(src.buf).is_some(), self.layout(dst.buf).is_some());
        let illegal = |w: &Self, text: &str| Err(w.error(unit, stmt, ErrorKind::Illegal, text));
        let bytes = extents.iter().product::<u64>() * self.ctx.kernel.bufs[Id::new(src.buf)].dtype.bytes(1);
        self.stats.copied_bytes += bytes;
        match engine {
            Engine::CpAsync => {
                if from_shared || !to_shared || multicast.is_some() {
                    return illegal(self, "cp.async copies from device to shared memory of its task");
                }
                let src = Elements {
                    place: self.place[task][src.buf],
                    positions: self.positions(unit, &from, &[], true, stmt)?,
                    walked: from,
                };
                let positions = self.positions(unit, &to, &[], false, stmt)?;
                let dst = Elements { place: self.place[task][dst.buf], positions, walked: to };
                let signal = match signal {
                    None => None,
                    Some((b, s)) => {
                        let bar = self.barrier(unit, task, b, s, stmt)?;
                        Some((bar, self.bars[bar].phase))
                    }
                };
                self.enqueue(unit, GroupKind::CpAsync, issue, Operation::Copy { src, dst, signal });
            }
            Engine::Tma if to_shared && !from_shared => {
                let Some((barrier, stage)) = signal else {
                    return illegal(self, "a TMA load signals a barrier");
                };
                let b = self.boxed(unit, dst, &to, src, stmt)?;
                let src = Rc::new(Elements {
                    place: self.place[task][src.buf],
                    positions: self.positions(unit, &from, &[], true, stmt)?,
                    walked: from,
                });
                let (cluster, rank) = self.cluster_of[task];
                for r in (0..64).filter(|r| multicast.unwrap_or(1 << rank) >> r & 1 == 1) {
                    let Some(&target) = self.clusters[cluster].get(r) else {
                        return illegal(self, "the multicast mask names a task outside the cluster");
                    };
                    self.refuse_exited(unit, target, "copies to", stmt)?;
                    let bar = self.barrier(unit, target, barrier, stage, stmt)?;
                    let dst = Elements { place: self.place[target][dst.buf], positions: b.clone(), walked: to.clone() };
                    let phase = self.bars[bar].phase;
                    let load = Load { issue: issue.clone(), src: src.clone(), dst, task: target, bar, phase, bytes };
                    self.loads.push(load);
                }
            }
            Engine::Tma if from_shared && !to_shared => {
                if signal.is_some() || multicast.is_some() {
                    return illegal(self, "a TMA store signals no barrier");
                }
                let positions = self.boxed(unit, src, &from, dst, stmt)?;
                let src = Elements { place: self.place[task][src.buf], positions, walked: from };
                let positions = self.positions(unit, &to, &[], true, stmt)?;
                let dst = Elements { place: self.place[task][dst.buf], positions, walked: to };
                self.enqueue(unit, GroupKind::Bulk, issue, Operation::Copy { src, dst, signal: None });
            }
            Engine::Tma => return illegal(self, "TMA copies between device and shared memory"),
        }
        self.tick(unit);
        Ok(())
    }

    fn enqueue(&mut self, unit: usize, kind: GroupKind, issue: Issue, operation: Operation) {
        let q = &mut self.units[unit].queues[kind_index(kind)];
        q.issued += 1;
        let number = q.issued;
        q.pending.push_back(Queued { issue, number, operation });
    }

    /// Positions in shared memory of a tensor copy's box: dense from the window's origin, then swizzled.
    fn boxed(
        &mut self,
        unit: usize,
        shared: &Window,
        walked: &Walked,
        global: &Window,
        stmt: u32,
    ) -> Result<Vec<i64>, KernelError> {
        self.positions(unit, walked, &[], false, stmt)?;
        let illegal = |w: &Self, text: String| w.error(unit, stmt, ErrorKind::Illegal, text);
        let (layout, bytes) = self.layout(shared.buf).expect("the caller checked the space");
        let view = View { buf: Id::new(shared.buf), stage: None, at: Vec::new(), walk: shared.walk.clone() };
        let b = TmaBox::of(&walked.extents, &view, &layout, bytes).map_err(|e| illegal(self, e))?;
        let task = self.units[unit].task;
        let start =
            self.memory(task, shared.buf).expect("checked by `walked`").linear_byte(walked.stage, &walked.origin);
        if !start.is_multiple_of(BOX_ALIGN) {
            return Err(illegal(self, format!("the box starts at byte {start}, not at a multiple of {BOX_ALIGN}")));
        }
        let memory = self.memory(task, global.buf).expect("checked by `walked`");
        if let super::memory::Placement::Strided(strides) = &memory.placement {
            let strides = strides.clone();
            for (i, &d) in b.order.iter().enumerate() {
                let stride = match global.walk[d] {
                    Some((dim, 1)) => strides[dim],
                    _ => return Err(illegal(self, "a tensor copy walks every dimension by steps of 1".to_string())),
                };
                let legal = if i == 0 { stride == 1 } else { (stride as u64 * bytes).is_multiple_of(16) };
                if !legal && walked.extents[d] > 1 {
                    let text = format!("a tensor map cannot walk dimension {d} of the tile by a stride of {stride}");
                    return Err(illegal(self, text));
                }
            }
        }
        let n = walked.extents.iter().product::<u64>();
        let mut coords = vec![0; walked.extents.len()];
        let mut out = Vec::with_capacity(n as usize);
        for _ in 0..n {
            out.push((b.address(start, bytes, &coords) / bytes) as i64);
            for d in (0..coords.len()).rev() {
                coords[d] += 1;
                if coords[d] < walked.extents[d] {
                    break;
                }
                coords[d] = 0;
            }
        }
        Ok(out)
    }

    /// Completes the head of a unit's queue.
    pub(super) fn complete_queued(&mut self, unit: usize, kind: GroupKind) -> Result<(), KernelError> {
        let agent = self.queue_agent(unit, kind);
        let Some(op) = self.units[unit].queues[kind_index(kind)].pending.pop_front() else { return Ok(()) };
        let number = op.number;
        self.perform(op, agent as u32)?;
        let u = &mut self.units[unit];
        u.queues[kind_index(kind)].done = number;
        if let Status::Group { kind: waiting, number: wanted } = u.status
            && waiting == kind
            && number >= wanted
        {
            u.status = Status::Ready;
        }
        Ok(())
    }

    fn perform(&mut self, op: Queued, agent: u32) -> Result<(), KernelError> {
        let Queued { issue, number, operation } = op;
        match operation {
            Operation::Contract { atom, acc, acc_from, a, b, keep } => {
                let [m, n, k] = atom.shape;
                let a = self.operand(&issue, number, agent, a, [m, k])?;
                let b = self.operand(&issue, number, agent, b, [k, n])?;
                let frag = &mut self.units[issue.unit].frags[acc];
                let dims = frag.dims.clone();
                let elems = dims.iter().product::<u64>() as usize;
                if frag.data.len() != elems {
                    frag.data = vec![0.0; elems];
                    frag.defined = vec![false; elems];
                }
                if frag.defined.len() != elems {
                    frag.defined = vec![frag.whole; elems];
                }
                let mut tile = vec![0.0; (m * n) as usize];
                for r in 0..m {
                    let at = ((acc_from[0] + r) * dims[1] + acc_from[1]) as usize;
                    let defined = &mut frag.defined[at..at + n as usize];
                    if keep && !frag.whole && !defined.iter().all(|d| *d) {
                        let name = &self.ctx.kernel.frags[Id::new(acc)].name;
                        let text = format!("`{name}` is accumulated into before it was written");
                        return Err(self.error(issue.unit, issue.stmt, ErrorKind::Uninitialised, text));
                    }
                    defined.fill(true);
                }
                if keep {
                    window(&mut frag.data, &dims, &acc_from, m, n, &mut tile, false);
                }
                atom.apply(&mut tile, &a, &b);
                if self.ctx.options.rounding {
                    tile.iter_mut().for_each(|v| *v = super::round(atom.acc, *v));
                }
                let frag = &mut self.units[issue.unit].frags[acc];
                window(&mut frag.data, &dims, &acc_from, m, n, &mut tile, true);
                self.stats.atom_flops += 2 * m * n * k;
            }
            Operation::Copy { src, dst, signal } => {
                // cp.async orders like the asynchronous proxy but needs no proxy fence (see the module's notes).
                let mut issue = issue;
                if signal.is_some() || self.is_shared(&dst) {
                    issue.fences = vec![u32::MAX; issue.fences.len()].into();
                }
                let values = self.read_async(&issue, number, agent, &src)?;
                self.write_async(&issue, number, agent, &dst, &values)?;
                if let Some((bar, phase)) = signal {
                    if self.bars[bar].phase != phase {
                        return Err(self.late(&issue, bar, phase));
                    }
                    let threads = self.ctx.kernel.roles[self.units[issue.unit].role].scope.threads();
                    let mut known = issue.known.to_vec();
                    known[agent as usize] = number;
                    if !self.arrive(bar, threads, &known) {
                        let text = format!("more arrivals at {} than its phase counts", self.bar_name(bar));
                        return Err(self.error(issue.unit, issue.stmt, ErrorKind::Barrier, text));
                    }
                    self.settle(bar)?;
                }
            }
        }
        Ok(())
    }

    fn is_shared(&self, e: &Elements) -> bool {
        e.place.is_ok()
    }

    /// Completes a copy that a barrier counts.
    pub(super) fn complete_load(&mut self, load: Load) -> Result<(), KernelError> {
        let agent = self.bar_agent(load.bar) as u32;
        let clock = load.phase as u32 + 1;
        if self.units.iter().filter(|u| u.task == load.task).all(|u| u.status == Status::Done) {
            let text = format!("this copy is in flight when task {:?} ends", self.coords[load.task]);
            return Err(self.error(load.issue.unit, load.issue.stmt, ErrorKind::InFlight, text));
        }
        let values = self.read_async(&load.issue, clock, agent, &load.src)?;
        self.write_async(&load.issue, clock, agent, &load.dst, &values)?;
        if self.bars[load.bar].phase != load.phase {
            return Err(self.late(&load.issue, load.bar, load.phase));
        }
        self.bars[load.bar].bytes -= load.bytes as i64;
        self.settle(load.bar)
    }

    fn late(&self, issue: &Issue, bar: usize, phase: u64) -> KernelError {
        let text = format!(
            "bytes land in {} after phase {phase}, which they belong to, has completed: it expects too few",
            self.bar_name(bar)
        );
        self.error(issue.unit, issue.stmt, ErrorKind::Barrier, text)
    }

    fn operand(
        &mut self,
        issue: &Issue,
        number: u32,
        agent: u32,
        side: Side,
        shape: [u64; 2],
    ) -> Result<Vec<f64>, KernelError> {
        match side {
            Side::Mem(e) => self.read_async(issue, number, agent, &e),
            Side::Frag { frag, from } => {
                let f = &mut self.units[issue.unit].frags[frag];
                let dims = f.dims.clone();
                let elems = dims.iter().product::<u64>() as usize;
                let defined = f.data.len() == elems
                    && (f.whole
                        || (0..shape[0]).all(|r| {
                            let at = ((from[0] + r) * dims[1] + from[1]) as usize;
                            f.defined[at..at + shape[1] as usize].iter().all(|d| *d)
                        }));
                if !defined {
                    let name = &self.ctx.kernel.frags[Id::new(frag)].name;
                    let text = format!("`{name}` is read before it was written");
                    return Err(self.error(issue.unit, issue.stmt, ErrorKind::Uninitialised, text));
                }
                let mut tile = vec![0.0; (shape[0] * shape[1]) as usize];
                window(&mut f.data, &dims, &from, shape[0], shape[1], &mut tile, false);
                Ok(tile)
            }
        }
    }

    fn read_async(&mut self, issue: &Issue, clock: u32, agent: u32, from: &Elements) -> Result<Vec<f64>, KernelError> {
        let mut values = vec![0.0; from.positions.len()];
        let base = self.base;
        let who = Access {
            agent: base + agent,
            clock,
            known: &issue.known,
            base,
            stmt: issue.stmt,
            fences: Some(&issue.fences),
        };
        let memory = match from.place {
            Ok(local) => &mut self.local[local],
            Err(param) => self.memories[param].as_mut().expect("arrays stay while the kernel runs"),
        };
        let result = memory.read(&from.positions, &mut values, &who);
        let name = memory.name.clone();
        let coords = |n: usize| Some(from.walked.coords(n));
        result.map_err(|f| self.fault(issue.unit, issue.stmt, &name, coords(f.position), f))?;
        Ok(values)
    }

    fn write_async(
        &mut self,
        issue: &Issue,
        clock: u32,
        agent: u32,
        to: &Elements,
        values: &[f64],
    ) -> Result<(), KernelError> {
        let base = self.base;
        let who = Access {
            agent: base + agent,
            clock,
            known: &issue.known,
            base,
            stmt: issue.stmt,
            fences: Some(&issue.fences),
        };
        let memory = match to.place {
            Ok(local) => &mut self.local[local],
            Err(param) => self.memories[param].as_mut().expect("arrays stay while the kernel runs"),
        };
        let result = memory.write(&to.positions, values, &who, None, self.ctx.options.rounding);
        let name = memory.name.clone();
        result.map_err(|f| self.fault(issue.unit, issue.stmt, &name, Some(to.walked.coords(f.position)), f))
    }
}
