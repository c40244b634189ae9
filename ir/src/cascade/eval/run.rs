//! Running programs over points, in any arithmetic.
//!
//! Invariant: every tensor a program reads is filled, or computed on demand, before it is read; a point writes its
//! targets and nothing else.

use std::collections::HashMap;

use super::domain::Domain;
use super::error::EvalError;
use super::philox::uniform;
use super::program::{Access, Ins, Loop, Place, Position, Prelude, Program, Result1};
use super::{Limits, Plan};
use crate::arena::Id;
use crate::array::element_count;
use crate::cascade::{Cascade, TensorId};
use crate::ops::ReduceOp;

/// A tensor's elements.
pub(super) enum Store<V> {
    /// Not written yet.
    Empty,
    /// All elements, with their support if it is partial.
    Dense(Vec<V>, Option<Vec<bool>>),
    /// Elements computed so far, absent ones marked.
    Demanded(HashMap<i64, (V, bool)>),
}

impl<V> Store<V> {
    #[inline(always)]
    fn data(&self) -> &[V] {
        match self {
            Store::Dense(data, _) => data,
            Store::Empty | Store::Demanded(_) => &[],
        }
    }
}

/// Registers and indices of one program in progress.
struct Frame<D: Domain> {
    regs: Vec<D::Value>,
    accs: Vec<D::Acc>,
    slots: Vec<i64>,
    cursors: Vec<i64>,
    /// The segment of every position of each ragged index; −1 for none.
    segments: Vec<Vec<i64>>,
}

/// How a point ended.
enum Ended {
    /// With the results of this row of `endings`.
    Present(u32),
    Absent,
}

/// The state of an evaluation.
pub(super) struct Machine<'a, D: Domain> {
    pub c: &'a Cascade,
    pub plan: &'a Plan,
    pub limits: Limits,
    pub checked: bool,
    pub domain: D,
    pub stores: Vec<Store<D::Value>>,
    pub elements: u64,
    frames: Vec<Option<Frame<D>>>,
}

type Done<T> = Result<T, EvalError>;

impl<'a, D: Domain> Machine<'a, D> {
    pub fn new(c: &'a Cascade, plan: &'a Plan, limits: Limits, checked: bool, domain: D) -> Machine<'a, D> {
        let stores = (0..plan.n_tensors).map(|_| Store::Empty).collect();
        let frames = plan.programs.iter().map(|_| None).collect();
        Machine { c, plan, limits, checked, domain, stores, elements: 0, frames }
    }

    /// Counts `dims` against the memory limit.
    pub fn reserve(&mut self, what: &str, dims: &[u64]) -> Done<usize> {
        let n = element_count(dims).unwrap_or(u64::MAX);
        self.elements = self.elements.saturating_add(n);
        if self.elements > self.limits.elements {
            let what = format!("the number of elements up to {what} {dims:?}");
            return Err(EvalError::TooLarge { what, size: self.elements, limit: self.limits.elements });
        }
        Ok(n as usize)
    }

    fn tensor_name(&self, t: u32) -> &str {
        let known = (t as usize) < self.c.tensors.len();
        if known { &self.c.tensors[TensorId::new(t as usize)].name } else { "a running reduction" }
    }

    /// Makes sure a target has elements to write to.
    fn allocate(&mut self, t: u32, dims: &[u64], partial: bool, fill: Option<f64>) -> Done<()> {
        if matches!(self.stores[t as usize], Store::Empty) {
            let name = self.tensor_name(t).to_owned();
            let n = self.reserve(&name, dims)?;
            let v = match fill {
                Some(x) => self.domain.exact(x),
                None => self.domain.nothing(),
            };
            self.stores[t as usize] = Store::Dense(vec![v; n], partial.then(|| vec![false; n]));
        }
        Ok(())
    }

    /// Evaluates one program over all its points; `step` is the value of the iterated index.
    pub fn execute(&mut self, program: &Program, step: u64) -> Done<()> {
        if program.work > self.limits.points {
            let what = "the number of points of an iteration space".to_owned();
            return Err(EvalError::TooLarge { what, size: program.work, limit: self.limits.points });
        }
        self.prepare(program)?;
        self.preludes(&program.preludes, step)?;
        let mut frame = self.frame(program, step)?;
        if program.free.iter().any(|l| l.extent == 0) {
            return Ok(());
        }
        let mut joins = self.join_states(program);
        let mut late = Vec::new();
        let buffered = program.targets.iter().any(|t| t.in_place && program.reads.contains(&t.tensor));
        loop {
            if let Some(r) = &program.running
                && program.free.last().is_none_or(|l| frame.slots[l.slot as usize] == 0)
            {
                for (reg, x) in &r.reset {
                    frame.regs[*reg as usize] = self.domain.exact(*x);
                }
                if let Some((acc, op)) = r.acc {
                    self.domain.begin(&mut frame.accs[acc as usize], op);
                }
            }
            self.domain.start();
            match self.point(program, &mut frame)? {
                Ended::Present(variant) => {
                    for (n, r) in program.endings[variant as usize].iter().enumerate() {
                        self.write(program, &frame, n, r, &mut joins, buffered.then_some(&mut late))?;
                    }
                }
                Ended::Absent if program.join.is_none() => self.leave_out(program, &frame),
                Ended::Absent => {}
            }
            if !advance(&program.free, &mut frame.slots, &mut frame.cursors) {
                break;
            }
        }
        for (t, i, v) in late {
            self.set(t, i, v);
        }
        self.finish_joins(program, joins);
        for t in &program.targets {
            let row = self.plan.dims.get(t.tensor as usize).and_then(|d| d.last()).copied().unwrap_or(1) as usize;
            if let (Some((block, scale)), Store::Dense(data, _)) = (t.block, &mut self.stores[t.tensor as usize]) {
                for r in data.chunks_mut(row.max(1)) {
                    r.chunks_mut(block.max(1) as usize).for_each(|b| self.domain.store_block(t.dtype, scale, b));
                }
            }
        }
        Ok(())
    }

    /// Allocates the targets of a program.
    pub fn prepare(&mut self, program: &Program) -> Done<()> {
        let plan = self.plan;
        for t in &program.targets {
            let fill = program.join.map(ReduceOp::identity);
            if let Some(dims) = plan.dims.get(t.tensor as usize) {
                self.allocate(t.tensor, dims, plan.partial[t.tensor as usize], fill)?;
            }
        }
        Ok(())
    }

    fn preludes(&mut self, preludes: &[Prelude], step: u64) -> Done<()> {
        for p in preludes {
            for t in &p.program.targets {
                self.allocate(t.tensor, &p.dims, false, None)?;
            }
            self.execute(&p.program, step)?;
        }
        Ok(())
    }

    /// One accumulator per element of a joined target.
    fn join_states(&mut self, program: &Program) -> Option<Vec<D::Acc>> {
        let (op, t) = (program.join?, program.targets.first()?);
        let n = self.stores[t.tensor as usize].data().len();
        let mut accs = vec![self.domain.accumulator(); n];
        accs.iter_mut().for_each(|a| self.domain.begin(a, op));
        Some(accs)
    }

    fn finish_joins(&mut self, program: &Program, joins: Option<Vec<D::Acc>>) {
        let (Some(op), Some(accs), Some(t)) = (program.join, joins, program.targets.first()) else { return };
        let ty = program.endings.first().and_then(|e| e.first()).map_or(super::domain::Ty::F32, |r| r.ty);
        for (i, mut acc) in accs.into_iter().enumerate() {
            let total = self.domain.total(&mut acc, op, ty);
            let old = self.stores[t.tensor as usize].data()[i];
            let joined = self.domain.combine(op, ty, old, total);
            let v = if t.block.is_some() { joined } else { self.domain.store(t.dtype, ty, joined) };
            self.set(t.tensor, i, v);
        }
    }

    fn set(&mut self, t: u32, i: usize, v: D::Value) {
        if let Store::Dense(data, support) = &mut self.stores[t as usize] {
            data[i] = v;
            if let Some(s) = support {
                s[i] = true;
            }
        }
    }

    fn write(
        &mut self,
        program: &Program,
        frame: &Frame<D>,
        n: usize,
        r: &Result1,
        joins: &mut Option<Vec<D::Acc>>,
        mut late: Option<&mut Vec<(u32, usize, D::Value)>>,
    ) -> Done<()> {
        let target = program.targets[n];
        let Some(at) = self.locate(program, frame, r.place)? else { return Ok(()) };
        for i in 0..r.count as usize {
            let v = self.domain.settle(frame.regs[r.reg as usize + i]);
            match (joins.as_mut(), program.join) {
                (Some(accs), Some(op)) => self.domain.add(&mut accs[at as usize + i], op, v, 0),
                _ => {
                    let v = if target.block.is_some() { v } else { self.domain.store(target.dtype, r.ty, v) };
                    match &mut late {
                        Some(late) => late.push((target.tensor, at as usize + i, v)),
                        None => self.set(target.tensor, at as usize + i, v),
                    }
                }
            }
        }
        Ok(())
    }

    /// Marks the targets of an absent point as outside the support.
    fn leave_out(&mut self, program: &Program, frame: &Frame<D>) {
        let nothing = self.domain.nothing();
        let nothing = self.domain.settle(nothing);
        let Some(ending) = program.endings.first() else { return };
        for (t, r) in program.targets.iter().zip(ending).filter(|(t, _)| !t.in_place) {
            if let Place::Cursor(cursor) = r.place
                && let Store::Dense(data, Some(support)) = &mut self.stores[t.tensor as usize]
            {
                let at = frame.cursors[cursor as usize] as usize;
                for i in at..at + r.count as usize {
                    support[i] = false;
                    data[i] = nothing;
                }
            }
        }
    }

    /// The linear position of a target; none when a checked access leaves its tensor.
    fn locate(&mut self, program: &Program, frame: &Frame<D>, place: Place) -> Done<Option<i64>> {
        match place {
            Place::Cursor(c) => Ok(Some(frame.cursors[c as usize])),
            Place::Access(a) => self.position(&program.accesses[a as usize], frame),
        }
    }

    fn position(&mut self, access: &Access, frame: &Frame<D>) -> Done<Option<i64>> {
        let mut linear = 0i64;
        for (dim, (p, extent, stride)) in access.at.iter().enumerate() {
            let i = match p {
                Position::Cursor(c) => frame.cursors[*c as usize],
                Position::Reg(r) => self.domain.position(frame.regs[*r as usize]),
            };
            if i < 0 || i as u64 >= *extent {
                if self.checked {
                    return Err(EvalError::OutOfRange {
                        tensor: self.tensor_name(access.tensor).to_owned(),
                        dim,
                        position: i,
                        extent: *extent,
                        span: access.span,
                    });
                }
                return Ok(None);
            }
            linear += i * stride;
        }
        Ok(Some(linear))
    }

    /// A frame at the first point of step `step`.
    fn frame(&mut self, program: &Program, step: u64) -> Done<Frame<D>> {
        let zero = self.domain.exact(0.0);
        let mut frame = Frame {
            regs: vec![zero; program.n_regs as usize],
            accs: vec![self.domain.accumulator(); program.n_accs as usize],
            slots: vec![0; program.n_slots as usize],
            cursors: program.cursors.clone(),
            segments: Vec::new(),
        };
        for (reg, x) in &program.consts {
            frame.regs[*reg as usize] = self.domain.exact(*x);
        }
        if let Some(l) = &program.iterated {
            frame.slots[l.slot as usize] = step as i64;
            for (c, s) in &l.cursors {
                frame.cursors[*c as usize] += s * step as i64;
            }
        }
        for r in &program.ragged {
            let offsets: Vec<i64> = (0..r.offsets as i64)
                .map(|i| Ok(D::center(self.element(r.tensor, i)?.0) as i64))
                .collect::<Done<_>>()?;
            frame.segments.push(segments(&offsets, r.extent));
        }
        Ok(frame)
    }

    /// An element and whether it is present.
    pub fn element(&mut self, t: u32, at: i64) -> Done<(D::Value, bool)> {
        match &self.stores[t as usize] {
            Store::Dense(data, support) => Ok((data[at as usize], support.as_ref().is_none_or(|s| s[at as usize]))),
            Store::Demanded(known) => match known.get(&at) {
                Some(found) => Ok(*found),
                None => self.demand(t, at),
            },
            Store::Empty => Ok((self.domain.nothing(), false)),
        }
    }

    /// Computes one element of a tensor defined by an invertible Einsum.
    fn demand(&mut self, t: u32, at: i64) -> Done<(D::Value, bool)> {
        let plan = self.plan;
        let Some(def) = &plan.demand[t as usize] else { return Ok((self.domain.nothing(), false)) };
        let program = &plan.programs[def.program];
        let mut frame = match self.frames[def.program].take() {
            Some(f) => f,
            None => {
                self.preludes(&program.preludes, 0)?;
                self.frame(program, 0)?
            }
        };
        frame.cursors.copy_from_slice(&program.cursors);
        def.invert(at, program, &mut frame.slots);
        for l in &program.free {
            for (c, s) in &l.cursors {
                frame.cursors[*c as usize] += s * frame.slots[l.slot as usize];
            }
        }
        self.domain.start();
        let found = match self.point(program, &mut frame)? {
            Ended::Present(variant) => {
                let r = &program.endings[variant as usize][0];
                let v = self.domain.settle(frame.regs[r.reg as usize]);
                (self.domain.store(program.targets[0].dtype, r.ty, v), true)
            }
            Ended::Absent => {
                let v = self.domain.nothing();
                (self.domain.settle(v), false)
            }
        };
        self.frames[def.program] = Some(frame);
        if let Store::Demanded(known) = &mut self.stores[t as usize] {
            self.elements = self.elements.saturating_add(1);
            if self.elements > self.limits.elements {
                let what = "the number of elements computed on demand".to_owned();
                return Err(EvalError::TooLarge { what, size: self.elements, limit: self.limits.elements });
            }
            known.insert(at, found);
        }
        Ok(found)
    }

    /// Runs a program for the point its frame stands at.
    fn point(&mut self, program: &Program, f: &mut Frame<D>) -> Done<Ended> {
        let code = &program.code[..];
        let mut pc = 0usize;
        macro_rules! reg {
            ($r:expr) => {
                f.regs[$r as usize]
            };
        }
        loop {
            let ins = code[pc];
            pc += 1;
            match ins {
                Ins::Load { dst, tensor, cursor } => {
                    reg!(dst) = self.stores[tensor as usize].data()[f.cursors[cursor as usize] as usize];
                }
                Ins::Binary { op, ty, dst, a, b } => reg!(dst) = self.domain.binary(op, ty, reg!(a), reg!(b)),
                Ins::Unary { op, ty, dst, a } => reg!(dst) = self.domain.unary(op, ty, reg!(a)),
                Ins::Add { acc, op, a, place } => {
                    let at = if op.selects_argument() { linear(&program.places[place as usize], &f.slots) } else { 0 };
                    self.domain.add(&mut f.accs[acc as usize], op, reg!(a), at);
                }
                Ins::Next { of, back } => {
                    let l = &program.loops[of as usize];
                    let i = &mut f.slots[l.slot as usize];
                    *i += 1;
                    if (*i as u64) < l.extent {
                        l.cursors.iter().for_each(|(c, s)| f.cursors[*c as usize] += s);
                        pc = back as usize;
                    } else {
                        let last = *i - 1;
                        *i = 0;
                        l.cursors.iter().for_each(|(c, s)| f.cursors[*c as usize] -= s * last);
                    }
                }
                Ins::Loop { of, exit } => {
                    let l = &program.loops[of as usize];
                    f.slots[l.slot as usize] = 0;
                    if l.extent == 0 {
                        pc = exit as usize;
                    }
                }
                Ins::Move { dst, a } => reg!(dst) = reg!(a),
                Ins::Index { dst, slot } => reg!(dst) = self.domain.exact(f.slots[slot as usize] as f64),
                Ins::Unless { cond, to } => {
                    if !self.domain.truth(reg!(cond)) {
                        pc = to as usize;
                    }
                }
                Ins::Jump { to } => pc = to as usize,
                Ins::LoadPartial { dst, tensor, cursor, absent } => {
                    let at = f.cursors[cursor as usize] as usize;
                    let (v, present) = match &self.stores[tensor as usize] {
                        Store::Dense(data, support) => (data[at], support.as_ref().is_none_or(|s| s[at])),
                        Store::Empty | Store::Demanded(_) => (self.domain.nothing(), false),
                    };
                    if present {
                        reg!(dst) = v;
                    } else {
                        self.domain.absent(v);
                        pc = absent as usize;
                    }
                }
                Ins::LoadDemanded { dst, tensor, cursor, absent } => {
                    let (v, present) = self.element(tensor, f.cursors[cursor as usize])?;
                    if present {
                        reg!(dst) = v;
                    } else {
                        self.domain.absent(v);
                        pc = absent as usize;
                    }
                }
                Ins::Fetch { dst, access, absent } => {
                    let access = &program.accesses[access as usize];
                    match self.position(access, f)? {
                        Some(at) => {
                            let (v, present) = self.element(access.tensor, at)?;
                            if present {
                                reg!(dst) = v;
                            } else {
                                self.domain.absent(v);
                                pc = absent as usize;
                            }
                        }
                        None => reg!(dst) = self.domain.exact(0.0),
                    }
                }
                Ins::Cast { to, dst, a } => reg!(dst) = self.domain.cast(to, reg!(a)),
                Ins::Operand { to, dst, a } => reg!(dst) = self.domain.operand(to, reg!(a)),
                Ins::Begin { acc, op } => self.domain.begin(&mut f.accs[acc as usize], op),
                Ins::Total { acc, op, ty, dst } => {
                    reg!(dst) = self.domain.total(&mut f.accs[acc as usize], op, ty);
                }
                Ins::Best { acc, op, dst } => reg!(dst) = self.domain.best(&f.accs[acc as usize], op),
                Ins::BeginTop { acc } => self.domain.begin_top(&mut f.accs[acc as usize]),
                Ins::AddTop { acc, a, place } => {
                    let at = linear(&program.places[place as usize], &f.slots);
                    self.domain.add_top(&mut f.accs[acc as usize], reg!(a), at);
                }
                Ins::TotalTop { acc, k, values, places } => {
                    // Positions directly follow the values.
                    let both = &mut f.regs[values as usize..(places + k) as usize];
                    let (v, p) = both.split_at_mut(k as usize);
                    self.domain.total_top(&mut f.accs[acc as usize], v, p);
                }
                Ins::Combine { op, ty, dst, a, b } => reg!(dst) = self.domain.combine(op, ty, reg!(a), reg!(b)),
                Ins::Dot { of, dst, done } => {
                    let d = &program.dots[of as usize];
                    let row = |(t, c, s): (u32, u32, i64)| {
                        (self.stores[t as usize].data(), f.cursors[c as usize] as usize, s)
                    };
                    if let Some(v) = self.domain.dot(row(d.a), row(d.b), d.count) {
                        reg!(dst) = v;
                        pc = done as usize;
                    }
                }
                Ins::Segment { dst, table, slot, absent } => {
                    let s = f.segments[table as usize][f.slots[slot as usize] as usize];
                    reg!(dst) = self.domain.exact(s as f64);
                    if s < 0 {
                        pc = absent as usize;
                    }
                }
                Ins::Rand { dst, draw } => {
                    let d = &program.draws[draw as usize];
                    let seed = self.domain.position(reg!(d.seed));
                    let mut coords = [0i64; 4];
                    for (x, r) in coords.iter_mut().zip(&d.coords) {
                        *x = self.domain.position(reg!(*r));
                    }
                    reg!(dst) = self.domain.exact(uniform(seed, coords));
                }
                Ins::Present { variant } => return Ok(Ended::Present(variant)),
                Ins::Absent => return Ok(Ended::Absent),
            }
        }
    }
}

/// The next point of the driver's loops; false after the last.
fn advance(free: &[Loop], slots: &mut [i64], cursors: &mut [i64]) -> bool {
    for l in free.iter().rev() {
        let i = &mut slots[l.slot as usize];
        *i += 1;
        if (*i as u64) < l.extent {
            l.cursors.iter().for_each(|(c, s)| cursors[*c as usize] += s);
            return true;
        }
        let last = *i - 1;
        *i = 0;
        l.cursors.iter().for_each(|(c, s)| cursors[*c as usize] -= s * last);
    }
    false
}

fn linear(strides: &[(u32, i64)], slots: &[i64]) -> i64 {
    strides.iter().map(|(slot, s)| slots[*slot as usize] * s).sum()
}

/// The segment of every position of a ragged index of `extent`, by offsets made monotone within it.
fn segments(offsets: &[i64], extent: u64) -> Vec<i64> {
    let (n, mut low) = (extent as i64, 0);
    let mut out = vec![-1; extent as usize];
    let mut clamped = Vec::with_capacity(offsets.len());
    for o in offsets {
        low = (*o).clamp(low, n);
        clamped.push(low);
    }
    for (s, w) in clamped.windows(2).enumerate() {
        out[w[0] as usize..w[1] as usize].fill(s as i64);
    }
    out
}
