//! Memory of a running kernel: values, which elements were written, and who touched them last.
//!
//! Invariant: every access is checked for range, initialisation and races. A race is two accesses to one element, at
//! least one a write and not both atomic, neither of which happens before the other by vector clocks (Flanagan and
//! Freund, FastTrack, PLDI 2009: the last write as an epoch, readers as a set). A read by the asynchronous proxy also
//! needs the generic writer's proxy fence in between (PTX ISA, "Memory consistency model", "Proxies"). What the grids
//! before a dependent one did to an array is ordered before it by its wait for them alone.

use std::collections::HashMap;

use super::ErrorKind;
use crate::dtype::DType;
use crate::layout::Swizzle;

/// How coordinates become element positions.
#[derive(Clone, Debug)]
pub(super) enum Placement {
    /// Elements per coordinate.
    Strided(Vec<i64>),
    /// Per dimension the element offset of each coordinate, then a swizzle of the byte address.
    Tables { tables: Vec<Vec<u32>>, swizzle: Option<Swizzle>, elem_bytes: u64, stage_elems: usize, stages: u64 },
}

const NONE: u32 = u32::MAX;
/// The grids before this one, as one agent of every wave: the last that `known` tells of.
const PRIOR: u32 = u32::MAX - 1;
/// The clock of all that they did.
pub(super) const PRIOR_CLOCK: u32 = 1;

/// Marks of an element: a kernel has read it, a kernel has written it.
pub(super) const READ: u8 = 1;
pub(super) const WRITTEN: u8 = 2;

#[derive(Clone, Copy, Debug)]
struct Reader {
    agent: u32,
    clock: u32,
    stmt: u32,
}

/// Who touched one element.
#[derive(Clone, Copy, Debug)]
struct Cell {
    write_agent: u32,
    write_clock: u32,
    write_stmt: u32,
    /// Bit 0: by the generic proxy; bit 1: atomic.
    flags: u8,
    readers: [Reader; 2],
    /// Whether further readers are in the overflow table.
    more: bool,
}

const NO_READER: Reader = Reader { agent: NONE, clock: 0, stmt: 0 };
const FRESH: Cell =
    Cell { write_agent: NONE, write_clock: 0, write_stmt: 0, flags: 0, readers: [NO_READER; 2], more: false };

/// Who accesses memory, and what it has seen.
#[derive(Clone, Debug)]
pub(super) struct Access<'a> {
    pub(super) agent: u32,
    pub(super) clock: u32,
    /// What the accessing agent knows of each agent of its wave, from `base` on.
    pub(super) known: &'a [u32],
    pub(super) base: u32,
    pub(super) stmt: u32,
    /// For the asynchronous proxy: the newest fence of each unit that is known.
    pub(super) fences: Option<&'a [u32]>,
}

impl Access<'_> {
    fn after(&self, agent: u32, clock: u32) -> bool {
        if agent == PRIOR {
            return self.known.last().is_some_and(|k| *k >= clock);
        }
        agent >= self.base && self.known.get((agent - self.base) as usize).is_some_and(|k| *k >= clock)
    }
}

/// What is wrong with an access, and which element of the access list it is.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) kind: ErrorKind,
    pub(super) position: usize,
    pub(super) text: String,
    /// The other statement.
    pub(super) other: Option<u32>,
}

#[derive(Clone, Debug)]
pub(super) struct Memory {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) dims: Vec<i64>,
    pub(super) placement: Placement,
    pub(super) data: Vec<f64>,
    pub(super) defined: Vec<bool>,
    cells: Vec<Cell>,
    overflow: HashMap<usize, Vec<Reader>>,
    /// Of arrays: what the kernel did to each element.
    pub(super) marks: Vec<u8>,
}

impl Memory {
    pub(super) fn new(
        name: String,
        dtype: DType,
        dims: Vec<i64>,
        placement: Placement,
        data: Vec<f64>,
        defined: Vec<bool>,
        tracked: bool,
    ) -> Memory {
        let cells = if tracked { vec![FRESH; data.len()] } else { Vec::new() };
        Memory { name, dtype, dims, placement, data, defined, cells, overflow: HashMap::new(), marks: Vec::new() }
    }

    /// An array: what is done to it is marked, and what `prior` marks was done by grids that may still run, in which
    /// `stmt` stands for them.
    pub(super) fn shared_with(mut self, prior: &[u8], stmt: u32) -> Memory {
        self.marks = vec![0; self.data.len()];
        if prior.iter().any(|m| *m != 0) {
            self.cells.resize(self.data.len(), FRESH);
            for (cell, mark) in self.cells.iter_mut().zip(prior) {
                if mark & WRITTEN != 0 {
                    (cell.write_agent, cell.write_clock, cell.write_stmt) = (PRIOR, PRIOR_CLOCK, stmt);
                }
                if mark & READ != 0 {
                    cell.readers[0] = Reader { agent: PRIOR, clock: PRIOR_CLOCK, stmt };
                }
            }
        }
        self
    }

    /// The element position of `coords` in `stage`, without a range check of the coordinates.
    pub(super) fn position(&self, stage: u64, coords: &[i64]) -> i64 {
        match &self.placement {
            Placement::Strided(strides) => coords.iter().zip(strides).map(|(c, s)| c * s).sum(),
            Placement::Tables { tables, swizzle, elem_bytes, stage_elems, .. } => {
                let linear: u64 = coords.iter().zip(tables).map(|(c, t)| u64::from(t[*c as usize])).sum();
                let linear = match swizzle {
                    None => linear,
                    Some(s) => s.apply(linear * elem_bytes) / elem_bytes,
                };
                (stage as usize * stage_elems) as i64 + linear as i64
            }
        }
    }

    /// The unswizzled byte address of `coords` in `stage`, from the buffer's start.
    pub(super) fn linear_byte(&self, stage: u64, coords: &[i64]) -> u64 {
        match &self.placement {
            Placement::Strided(_) => 0,
            Placement::Tables { tables, elem_bytes, stage_elems, .. } => {
                let linear: u64 = coords.iter().zip(tables).map(|(c, t)| u64::from(t[*c as usize])).sum();
                (stage * *stage_elems as u64 + linear) * elem_bytes
            }
        }
    }

    /// Reads the elements at `at` (negative: absent, gives 0).
    pub(super) fn read(&mut self, at: &[i64], out: &mut [f64], who: &Access<'_>) -> Result<(), Fault> {
        for (n, (&p, o)) in at.iter().zip(out.iter_mut()).enumerate() {
            if p < 0 {
                *o = 0.0;
                continue;
            }
            let i = p as usize;
            let fault = |kind, text: String, other| Fault { kind, position: n, text, other };
            let Some(&defined) = self.defined.get(i) else {
                return Err(fault(ErrorKind::OutOfBounds, format!("element {i} is outside the buffer"), None));
            };
            if let Some(mark) = self.marks.get_mut(i) {
                *mark |= READ;
            }
            if let Some(cell) = self.cells.get_mut(i) {
                if cell.write_agent != NONE {
                    if !who.after(cell.write_agent, cell.write_clock) {
                        let text = "read while another agent's write is not ordered before it".to_string();
                        return Err(fault(ErrorKind::Race, text, Some(cell.write_stmt)));
                    }
                    if let Some(fences) = who.fences
                        && cell.flags & 1 != 0
                        && fences.get((cell.write_agent - who.base) as usize).is_none_or(|f| *f < cell.write_clock)
                    {
                        let text = "read by the asynchronous proxy without `fence proxy_async` after the generic write"
                            .to_string();
                        return Err(fault(ErrorKind::Race, text, Some(cell.write_stmt)));
                    }
                }
                let reader = Reader { agent: who.agent, clock: who.clock, stmt: who.stmt };
                let slot = cell.readers.iter_mut().find(|r| r.agent == who.agent || r.agent == NONE);
                match slot {
                    Some(slot) => *slot = reader,
                    None => {
                        cell.more = true;
                        let list = self.overflow.entry(i).or_default();
                        match list.iter_mut().find(|r| r.agent == who.agent) {
                            Some(slot) => *slot = reader,
                            None => list.push(reader),
                        }
                    }
                }
            }
            if !defined {
                return Err(fault(
                    ErrorKind::Uninitialised,
                    "read before anything was written to it".to_string(),
                    None,
                ));
            }
            *o = self.data[i];
        }
        Ok(())
    }

    /// Writes `values` to the elements at `at` (negative: skipped), joined with what is there by `join`.
    pub(super) fn write(
        &mut self,
        at: &[i64],
        values: &[f64],
        who: &Access<'_>,
        join: Option<crate::ops::ReduceOp>,
        rounding: bool,
    ) -> Result<(), Fault> {
        let generic = who.fences.is_none();
        let round = rounding || !self.dtype.is_float();
        for (n, (&p, &v)) in at.iter().zip(values).enumerate() {
            if p < 0 {
                continue;
            }
            let i = p as usize;
            let fault = |kind, text: String, other| Fault { kind, position: n, text, other };
            if i >= self.data.len() {
                return Err(fault(ErrorKind::OutOfBounds, format!("element {i} is outside the buffer"), None));
            }
            if let Some(mark) = self.marks.get_mut(i) {
                *mark |= WRITTEN;
            }
            if let Some(cell) = self.cells.get_mut(i) {
                let both_atomic = join.is_some() && cell.flags & 2 != 0;
                if cell.write_agent != NONE && !both_atomic && !who.after(cell.write_agent, cell.write_clock) {
                    let text = "written while another agent's write is not ordered before it".to_string();
                    return Err(fault(ErrorKind::Race, text, Some(cell.write_stmt)));
                }
                for r in cell.readers {
                    if r.agent != NONE && !who.after(r.agent, r.clock) {
                        let text = "written while another agent's read is not ordered before it".to_string();
                        return Err(fault(ErrorKind::Race, text, Some(r.stmt)));
                    }
                }
                if cell.more {
                    for r in self.overflow.remove(&i).unwrap_or_default() {
                        if !who.after(r.agent, r.clock) {
                            let text = "written while another agent's read is not ordered before it".to_string();
                            return Err(fault(ErrorKind::Race, text, Some(r.stmt)));
                        }
                    }
                }
                *cell = Cell {
                    write_agent: who.agent,
                    write_clock: who.clock,
                    write_stmt: who.stmt,
                    flags: u8::from(generic) | (u8::from(join.is_some()) << 1),
                    readers: [NO_READER; 2],
                    more: false,
                };
            }
            let v = match join {
                None => v,
                Some(op) => {
                    if !self.defined[i] {
                        let text = "joined into an element that was never written".to_string();
                        return Err(fault(ErrorKind::Uninitialised, text, None));
                    }
                    op.combine(self.data[i], v)
                }
            };
            self.data[i] = if round { super::round(self.dtype, v) } else { v };
            self.defined[i] = true;
        }
        Ok(())
    }

    /// The element at `position` alone, uniform control flow reading it.
    pub(super) fn fetch(&mut self, position: i64, who: &Access<'_>) -> Result<f64, Fault> {
        let mut out = [0.0];
        self.read(&[position], &mut out, who)?;
        Ok(out[0])
    }
}
