//! Launching a bound plan on this machine's threads.
//!
//! A launch checks the caller's arrays (names, types, shapes, strides, overlap), fills each kernel's slots and runs
//! its tasks in contiguous ranges on this thread and those of the pool ([`crate::team`]). Invariant: a task's result
//! depends on nothing but its number, so the split over threads does not show in the results.

use crate::arguments::{Named, Place, places};
use crate::array::{ALIGN_BYTES, HostArray, View, ViewMut};
use crate::error::Error;
use crate::linked::Bound;
use crate::program::Step;
use crate::team::Team;
use einfall_ir::arena::Id;
use einfall_ir::artifact::Slot;
use einfall_ir::dtype::DType;
use einfall_ir::tile::{BufferId, BufferKind};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Below this many operations plus bytes a kernel runs on the calling thread: asking the others takes about as long.
const INLINE_WORK: u64 = 1 << 17;
/// Ranges of tasks handed out per thread, for balance.
const RANGES_PER_THREAD: u64 = 8;

/// Threads to run tasks on.
pub(crate) fn threads(n: usize) -> Result<Team, Error> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n).thread_name(|i| format!("einfall-{i}")).build();
    Ok(Team::new(Arc::new(pool.map_err(|e| Error::Threads { reason: e.to_string() })?)))
}

/// The arrays of one launch, by name.
#[derive(Debug, Default)]
pub struct Arguments<'a> {
    inputs: Vec<(&'a str, View<'a>)>,
    outputs: Vec<(&'a str, ViewMut<'a>)>,
    scalars: Vec<(&'a str, f64)>,
    workspace: Option<&'a mut [u8]>,
}

impl<'a> Arguments<'a> {
    /// None yet.
    pub fn new() -> Arguments<'a> {
        Arguments::default()
    }

    /// An array to read. A scalar may also be given as an array without dimensions.
    pub fn input(mut self, name: &'a str, view: View<'a>) -> Arguments<'a> {
        self.inputs.push((name, view));
        self
    }

    /// An array to write, or to update in place.
    pub fn output(mut self, name: &'a str, view: ViewMut<'a>) -> Arguments<'a> {
        self.outputs.push((name, view));
        self
    }

    /// A scalar parameter; it is rounded to its type.
    pub fn scalar(mut self, name: &'a str, value: f64) -> Arguments<'a> {
        self.scalars.push((name, value));
        self
    }

    /// Whether an array or scalar of this name is among them.
    pub fn gives(&self, name: &str) -> bool {
        self.inputs.iter().any(|(n, _)| *n == name)
            || self.outputs.iter().any(|(n, _)| *n == name)
            || self.scalars.iter().any(|(n, _)| *n == name)
    }

    /// The scalars given by value, by name.
    pub fn scalars(&self) -> &[(&'a str, f64)] {
        &self.scalars
    }

    /// Shapes of the arrays, by name.
    pub(crate) fn shapes(&self) -> Vec<(&'a str, &[u64])> {
        let inputs = self.inputs.iter().map(|(n, v)| (*n, v.shape()));
        inputs.chain(self.outputs.iter().map(|(n, v)| (*n, v.as_view().shape()))).collect()
    }

    /// Memory for temporaries: at least [`Bound::workspace_bytes`], 64-byte aligned. Without it the launch takes its
    /// own.
    pub fn workspace(mut self, memory: &'a mut [u8]) -> Arguments<'a> {
        self.workspace = Some(memory);
        self
    }
}

impl Bound {
    /// Runs every kernel in order and returns the time of each. Returns when the results are in the outputs.
    ///
    /// # Errors
    /// Before anything is written: [`Error::MissingArray`], [`Error::UnknownArray`], [`Error::Twice`],
    /// [`Error::DType`], [`Error::Shape`], [`Error::Strides`], [`Error::Overlap`], [`Error::Workspace`]. At any time:
    /// [`Error::Array`] where memory for temporaries is short; the outputs are then unspecified.
    pub fn launch(&self, mut arguments: Arguments) -> Result<Vec<Duration>, Error> {
        let _span = tracing::debug_span!("launch", cascade = self.executable.name()).entered();
        let given = arguments.workspace.take();
        let inputs: Vec<Named> = arguments.inputs.iter().map(|(n, v)| (*n, v)).collect();
        let outputs: Vec<Named> = arguments.outputs.iter().map(|(n, v)| (*n, v.as_view())).collect();
        let program = &self.executable.program;
        let mut places = places(program, &self.sizes, &inputs, &outputs, &arguments.scalars, read_scalar)?;
        let mut own = match &given {
            Some(memory) => {
                let (found, address) = (memory.len() as u64, memory.as_ptr() as usize);
                if found < self.sizes.workspace_bytes
                    || !address.is_multiple_of(ALIGN_BYTES) && self.sizes.workspace_bytes > 0
                {
                    return Err(Error::Workspace { needed: self.sizes.workspace_bytes, found, address });
                }
                None
            }
            None => Some(self.memory.take(self.sizes.workspace_bytes)?),
        };
        let base = match (given, &mut own) {
            (Some(memory), _) => memory.as_mut_ptr(),
            (None, Some(block)) => block.bytes_mut().as_mut_ptr(),
            (None, None) => std::ptr::null_mut(),
        };
        for ((id, _), offset) in program.artifact.buffers.iter().zip(&self.sizes.offsets) {
            if let Some(offset) = offset {
                let strides = einfall_ir::array::strides(&self.sizes.shapes[id.index()]);
                let base = base as usize + *offset as usize;
                places[id.index()] = Some(Place { base, strides, scalar: 0 });
            }
        }
        let timed = |(index, step)| {
            let start = Instant::now();
            self.run(index, step, &places)?;
            Ok(start.elapsed())
        };
        let times = self.sizes.steps.iter().enumerate().map(timed).collect::<Result<Vec<Duration>, Error>>()?;
        if let Some(block) = own {
            self.memory.give(block);
        }
        Ok(times)
    }

    /// Allocates the outputs, launches, and returns them in the cascade's order. Arrays updated in place are copied
    /// from `inputs`.
    ///
    /// # Errors
    /// As [`Bound::launch`].
    pub fn run_to_arrays(
        &self,
        inputs: &[(&str, &HostArray)],
        scalars: &[(&str, f64)],
    ) -> Result<Vec<(String, HostArray)>, Error> {
        let mut outputs = Vec::new();
        for spec in self.arrays() {
            match spec.kind {
                BufferKind::Output => outputs.push((spec.name.to_string(), HostArray::zeros(spec.dtype, spec.shape)?)),
                BufferKind::InOut => {
                    let (_, array) = inputs.iter().find(|(name, _)| *name == spec.name).ok_or_else(|| {
                        let (array, shape) = (spec.name.to_string(), spec.shape.to_vec());
                        Error::MissingArray { array, dtype: spec.dtype, shape }
                    })?;
                    outputs.push((spec.name.to_string(), HostArray::clone(array)));
                }
                BufferKind::Input | BufferKind::Workspace => {}
            }
        }
        let mut arguments = Arguments::new();
        let updated = |name: &str| self.arrays().any(|a| a.name == name && a.kind == BufferKind::InOut);
        for (name, array) in inputs {
            if !updated(name) {
                arguments = arguments.input(name, array.view());
            }
        }
        for (name, value) in scalars {
            arguments = arguments.scalar(name, *value);
        }
        for (name, array) in &mut outputs {
            arguments = arguments.output(name, array.view_mut());
        }
        self.launch(arguments)?;
        Ok(outputs)
    }

    /// Runs one kernel's tasks, on the threads of the pool too where that pays.
    fn run(&self, index: usize, step: &Step, places: &[Option<Place>]) -> Result<(), Error> {
        let exe = &*self.executable;
        let launch = &exe.program.artifact.launches[index];
        let place = |b: BufferId| {
            places[b.index()].as_ref().ok_or_else(|| Error::Artifact {
                name: exe.program.artifact.name.clone(),
                reason: format!("`{}` is not placed", exe.program.artifact.buffers[b].name),
            })
        };
        let mut slots = Vec::with_capacity(launch.slots.len());
        for slot in &launch.slots {
            slots.push(match *slot {
                Slot::Base(b) => place(b)?.base as u64,
                Slot::Stride(b, d) => place(b)?.strides[d] as u64,
                Slot::Scalar(b) => place(b)?.scalar,
                Slot::Extent(r) => self.sizes.extents[r.index()],
            });
        }
        let function = exe.code.functions[index];
        let call = |first: u64, end: u64, scratch: &mut HostArray| {
            // SAFETY: the loader's caller vouches for the code; slots, ranges and scratch are as the convention says,
            // and the arrays were checked.
            unsafe { function(slots.as_ptr(), first as i64, end as i64, scratch.bytes_mut().as_mut_ptr()) };
        };
        let with_scratch = |work: &mut dyn FnMut(&mut HostArray)| -> Result<(), Error> {
            let mut scratch = self.memory.take(step.scratch_bytes)?;
            work(&mut scratch);
            self.memory.give(scratch);
            Ok(())
        };
        let team = &exe.code.team;
        let threads = team.threads();
        if step.tasks == 0 {
            return Ok(());
        }
        // Tasks are numbered with those of a round after one another.
        if !step.is_shared(threads) {
            return with_scratch(&mut |scratch| call(0, step.tasks, scratch));
        }
        let tasks = step.tasks / step.rounds;
        let ranges = tasks.min(threads as u64 * if step.rounds > 1 { 1 } else { RANGES_PER_THREAD });
        // Ranges differ by at most one task.
        let bound = |i: usize| (i as u128 * u128::from(tasks) / u128::from(ranges)) as u64;
        let failed = OnceLock::new();
        // One of several failures is as good as another.
        let tell = |done: Result<(), Error>| drop(done.map_err(|e| failed.set(e)));
        if step.rounds == 1 {
            team.share(ranges as usize, &|list| {
                tell(with_scratch(&mut |scratch| list.by_ref().for_each(|i| call(bound(i), bound(i + 1), scratch))));
            });
        } else {
            team.rounds(step.rounds as usize, ranges as usize, &|turns| {
                tell(with_scratch(&mut |scratch| {
                    turns.by_ref().for_each(|(round, i)| {
                        let first = round as u64 * tasks;
                        call(first + bound(i), first + bound(i + 1), scratch);
                    });
                }));
            });
        }
        failed.into_inner().map_or(Ok(()), Err)
    }
}

/// The slot bits of a scalar given as an array of one element in host memory.
fn read_scalar(dtype: DType, view: &View) -> Result<u64, Error> {
    let bytes = dtype.bytes(1) as usize;
    // SAFETY: the view covers one element.
    let bytes = unsafe { std::slice::from_raw_parts(view.base(), bytes) };
    let value = crate::element::decode(dtype, bytes)?[0];
    Ok(match dtype {
        // Exact beyond 2⁵³ too.
        DType::I64 => u64::from_le_bytes(bytes.try_into().unwrap_or_default()),
        _ => Slot::scalar_bits(dtype, value),
    })
}

impl Step {
    /// Whether its tasks go to several threads, which meet at the end of every round.
    fn is_shared(&self, threads: usize) -> bool {
        let round = self.flops.saturating_add(self.bytes) / self.rounds.max(1);
        threads > 1 && self.tasks > self.rounds && round >= INLINE_WORK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_of_little_work_stay_with_one_thread() {
        let step = |tasks, rounds, flops| Step { tasks, rounds, flops, ..Step::default() };
        assert!(step(8, 1, INLINE_WORK).is_shared(2));
        assert!(!step(8, 1, INLINE_WORK).is_shared(1));
        assert!(!step(8, 1, INLINE_WORK - 1).is_shared(2));
        // Threads meet after each round.
        assert!(!step(8, 4, INLINE_WORK).is_shared(2));
        assert!(step(8, 4, 4 * INLINE_WORK).is_shared(2));
        assert!(!step(4, 4, 4 * INLINE_WORK).is_shared(2));
    }
}
