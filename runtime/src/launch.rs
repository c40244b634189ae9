//! Launching a bound plan on this machine's threads.
//!
//! A launch checks the caller's arrays (names, types, shapes, strides, overlap), fills each kernel's slots and runs
//! its tasks in contiguous ranges on the pool. Invariant: a task's result depends on nothing but its number, so the
//! split over threads does not show in the results.

use crate::array::{ALIGN_BYTES, HostArray, View, ViewMut};
use crate::error::Error;
use crate::executable::{Bound, Step, is_scalar};
use einfall_ir::arena::Id;
use einfall_ir::artifact::Slot;
use einfall_ir::dtype::DType;
use einfall_ir::tile::{BufferId, BufferKind};
use rayon::prelude::*;
use std::time::{Duration, Instant};

/// Below this many operations plus bytes a kernel runs on the calling thread: waking the others takes about as long.
const INLINE_WORK: u64 = 1 << 17;
/// Ranges of tasks handed out per thread, for balance.
const RANGES_PER_THREAD: u64 = 8;

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

    /// Memory for temporaries: at least [`Bound::workspace_bytes`], 64-byte aligned. Without it the launch takes its
    /// own.
    pub fn workspace(mut self, memory: &'a mut [u8]) -> Arguments<'a> {
        self.workspace = Some(memory);
        self
    }
}

/// Where one buffer is.
#[derive(Clone, Debug)]
struct Place {
    base: usize,
    strides: Vec<i64>,
    /// Slot bits of a scalar.
    scalar: u64,
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
        let mut places = self.place_arguments(&arguments)?;
        let mut own = match &given {
            Some(memory) => {
                let (found, address) = (memory.len() as u64, memory.as_ptr() as usize);
                if found < self.workspace_bytes || !address.is_multiple_of(ALIGN_BYTES) && self.workspace_bytes > 0 {
                    return Err(Error::Workspace { needed: self.workspace_bytes, found, address });
                }
                None
            }
            None => Some(self.scratch.take(self.workspace_bytes)?),
        };
        let base = match (given, &mut own) {
            (Some(memory), _) => memory.as_mut_ptr(),
            (None, Some(block)) => block.bytes_mut().as_mut_ptr(),
            (None, None) => std::ptr::null_mut(),
        };
        for ((id, _), offset) in self.executable.artifact.buffers.iter().zip(&self.offsets) {
            if let Some(offset) = offset {
                let strides = einfall_ir::array::strides(&self.shapes[id.index()]);
                let base = base as usize + *offset as usize;
                places[id.index()] = Some(Place { base, strides, scalar: 0 });
            }
        }
        let all = || {
            let timed = |(index, step)| {
                let start = Instant::now();
                self.run(index, step, &places)?;
                Ok(start.elapsed())
            };
            self.steps.iter().enumerate().map(timed).collect::<Result<Vec<Duration>, Error>>()
        };
        // The pool is entered once for all kernels, as entering it costs two thread switches.
        let pool = &self.executable.pool;
        let threads = pool.current_num_threads();
        let times = if self.steps.iter().any(|s| s.is_shared(threads)) { pool.install(all)? } else { all()? };
        if let Some(block) = own {
            self.scratch.give(block);
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

    /// Checks the arguments; where each buffer is, `None` for workspace.
    fn place_arguments(&self, arguments: &Arguments) -> Result<Vec<Option<Place>>, Error> {
        let exe = &*self.executable;
        let buffers = &exe.artifact.buffers;
        let mut places: Vec<Option<Place>> = vec![None; buffers.len()];
        let mut put = |id: BufferId, place: Place| match places[id.index()].replace(place) {
            Some(_) => Err(Error::Twice { array: buffers[id].name.clone() }),
            None => Ok(()),
        };
        for (name, value) in &arguments.scalars {
            let (id, buffer) = exe.find(name, "scalar", is_scalar)?;
            let scalar = Slot::scalar_bits(buffer.dtype, buffer.dtype.round(*value));
            put(id, Place { base: 0, strides: Vec::new(), scalar })?;
        }
        for (name, view) in &arguments.inputs {
            let (id, buffer) = exe.find(name, "input", |b| b.kind == BufferKind::Input)?;
            self.check_view(id, view)?;
            let mut scalar = 0;
            if is_scalar(buffer) {
                let bytes = buffer.dtype.bytes(1) as usize;
                // SAFETY: the view covers one element.
                let bytes = unsafe { std::slice::from_raw_parts(view.base(), bytes) };
                let value = crate::element::decode(buffer.dtype, bytes)?[0];
                scalar = match buffer.dtype {
                    // Exact beyond 2⁵³ too.
                    DType::I64 => u64::from_le_bytes(bytes.try_into().unwrap_or_default()),
                    _ => Slot::scalar_bits(buffer.dtype, value),
                };
            }
            put(id, Place { base: view.base() as usize, strides: view.strides().to_vec(), scalar })?;
        }
        for (name, view) in &arguments.outputs {
            let writable = |k: BufferKind| matches!(k, BufferKind::Output | BufferKind::InOut);
            let (id, _) = exe.find(name, "output", |b| writable(b.kind))?;
            self.check_view(id, view.as_view())?;
            put(id, Place { base: view.base() as usize, strides: view.as_view().strides().to_vec(), scalar: 0 })?;
        }
        for (i, (name, view)) in arguments.outputs.iter().enumerate() {
            let inputs = arguments.inputs.iter().map(|(n, v)| (n, v));
            let outputs = arguments.outputs[..i].iter().map(|(n, v)| (n, v.as_view()));
            if let Some((other, _)) = inputs.chain(outputs).find(|(_, v)| view.as_view().overlaps(v)) {
                return Err(Error::Overlap { written: name.to_string(), other: other.to_string() });
            }
        }
        for (id, buffer) in buffers.iter() {
            if places[id.index()].is_none() && buffer.kind != BufferKind::Workspace {
                let (array, shape) = (buffer.name.clone(), self.shapes[id.index()].clone());
                return Err(Error::MissingArray { array, dtype: buffer.dtype, shape });
            }
        }
        Ok(places)
    }

    /// Type, shape and strides of one array.
    fn check_view(&self, id: BufferId, view: &View) -> Result<(), Error> {
        let buffer = &self.executable.artifact.buffers[id];
        let array = buffer.name.clone();
        if view.dtype() != buffer.dtype {
            return Err(Error::DType { array, expected: buffer.dtype, found: view.dtype() });
        }
        let expected = &self.shapes[id.index()];
        if view.shape() != expected {
            return Err(Error::Shape { array, expected: expected.clone(), found: view.shape().to_vec() });
        }
        let must = &self.executable.dense[id.index()];
        match (0..must.len()).find(|d| must[*d] && !view.is_empty() && !view.is_dense_in(*d)) {
            None => Ok(()),
            Some(dim) => {
                Err(Error::Strides { array, dim, strides: view.strides().to_vec(), shape: view.shape().to_vec() })
            }
        }
    }

    /// Runs one kernel's tasks; on a thread of the pool where they are shared.
    fn run(&self, index: usize, step: &Step, places: &[Option<Place>]) -> Result<(), Error> {
        let exe = &*self.executable;
        let launch = &exe.artifact.launches[index];
        let place = |b: BufferId| {
            places[b.index()].as_ref().ok_or_else(|| Error::Artifact {
                name: exe.artifact.name.clone(),
                reason: format!("`{}` is not placed", exe.artifact.buffers[b].name),
            })
        };
        let mut slots = Vec::with_capacity(launch.slots.len());
        for slot in &launch.slots {
            slots.push(match *slot {
                Slot::Base(b) => place(b)?.base as u64,
                Slot::Stride(b, d) => place(b)?.strides[d] as u64,
                Slot::Scalar(b) => place(b)?.scalar,
                Slot::Extent(r) => self.extents[r.index()],
            });
        }
        let function = exe.functions[index];
        let call = |first: u64, end: u64| -> Result<(), Error> {
            let mut scratch = self.scratch.take(step.scratch_bytes)?;
            // SAFETY: the loader's caller vouches for the code; slots, ranges and scratch are as the convention says,
            // and the arrays were checked.
            unsafe { function(slots.as_ptr(), first as i64, end as i64, scratch.bytes_mut().as_mut_ptr()) };
            self.scratch.give(scratch);
            Ok(())
        };
        let threads = exe.pool.current_num_threads();
        if step.tasks == 0 {
            return Ok(());
        }
        if !step.is_shared(threads) {
            return call(0, step.tasks);
        }
        let ranges = step.tasks.min(threads as u64 * RANGES_PER_THREAD);
        // Ranges differ by at most one task.
        let bound = |i: usize| (i as u128 * u128::from(step.tasks) / u128::from(ranges)) as u64;
        (0..ranges as usize).into_par_iter().with_max_len(1).try_for_each(|i| call(bound(i), bound(i + 1)))
    }
}

impl Step {
    /// Whether its tasks go to several threads.
    fn is_shared(&self, threads: usize) -> bool {
        threads > 1 && self.tasks > 1 && self.flops.saturating_add(self.bytes) >= INLINE_WORK
    }
}
