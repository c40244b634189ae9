//! A loaded artifact at fixed sizes, and its launches on an adapter.
//!
//! Invariant: everything a launch needs is made once, by [`Bound::prepare`]: pipelines, words, bindings, workspace.

use super::answer::Wait;
#[cfg(not(target_family = "wasm"))]
use super::answer::done;
use super::array::{DeviceArray, GUARD_BYTES, Numbers};
use super::engine::{Shaders, Shared};
use crate::arguments::{DeviceArguments, Named, Place, places};
use crate::array::{HostArray, View};
use crate::error::Error;
use crate::executable::{self, Loaded};
use crate::program::{Program, Sizes};
use crate::shaders::{Dispatch, WgpuError};
use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::tile::BufferKind;
use std::collections::BTreeMap;
use std::sync::Arc;
#[cfg(not(target_family = "wasm"))]
use std::time::Duration;

/// The arrays of one launch, by name. Scalars travel by value.
pub type Arguments<'a> = DeviceArguments<'a, DeviceArray>;

/// An executable at fixed sizes.
pub type Bound = executable::Bound<Shaders>;

impl Loaded for Shaders {
    #[cfg(feature = "cpu")]
    type Memory = ();

    fn check(&self, program: &Program, sizes: &Sizes) -> Result<(), Error> {
        Ok(self.modules.check_sizes(program, sizes)?)
    }
}

impl Bound {
    /// An array for the parameter `name`, full of NaNs.
    ///
    /// # Errors
    /// [`Error::UnknownArray`]; [`Error::Wgpu`] for one that is too large.
    #[cfg(not(target_family = "wasm"))]
    pub fn array(&self, name: &str) -> Result<DeviceArray, Error> {
        done(self.array_async(name))
    }

    /// As `Bound::array`, without blocking.
    ///
    /// # Errors
    /// [`Error::UnknownArray`]; [`Error::Wgpu`] for one that is too large.
    pub async fn array_async(&self, name: &str) -> Result<DeviceArray, Error> {
        let program = &self.executable.program;
        let (id, buffer) = program.find(name, "array", |b| !b.is_scalar())?;
        let shape = &self.sizes.shapes[id.index()];
        Ok(DeviceArray::new(&self.executable.code.shared, buffer.dtype, shape, &format!("`{name}`")).await?)
    }

    /// Checks the arrays and makes everything their launches need.
    ///
    /// # Errors
    /// [`Error::MissingArray`], [`Error::UnknownArray`], [`Error::Twice`], [`Error::DType`], [`Error::Shape`],
    /// [`Error::Overlap`]; [`Error::Wgpu`] for arrays of another adapter, kernels that it refuses, and where memory for
    /// temporaries is short.
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare(&self, arguments: &Arguments) -> Result<Prepared, Error> {
        done(self.prepare_async(arguments))
    }

    /// As `Bound::prepare`, without blocking.
    ///
    /// # Errors
    /// [`Error::MissingArray`], [`Error::UnknownArray`], [`Error::Twice`], [`Error::DType`], [`Error::Shape`],
    /// [`Error::Overlap`]; [`Error::Wgpu`] for arrays of another adapter, kernels that it refuses, and where memory for
    /// temporaries is short.
    pub async fn prepare_async(&self, arguments: &Arguments<'_>) -> Result<Prepared, Error> {
        let (program, shared) = (&self.executable.program, &self.executable.code.shared);
        shared.alive()?;
        let mut numbers = Numbers::default();
        let mut places = self.places(arguments, &mut numbers)?;
        let mut arrays: Vec<Option<DeviceArray>> = Vec::new();
        for (id, buffer) in program.artifact.buffers.iter() {
            let given = arguments.inputs.iter().chain(&arguments.outputs).find(|(n, _)| *n == buffer.name);
            let array = match (given, self.sizes.offsets[id.index()]) {
                (Some((_, array)), _) => Some((*array).clone()),
                (None, Some(_)) => {
                    let shape = &self.sizes.shapes[id.index()];
                    let what = format!("the temporary `{}`", buffer.name);
                    let array = DeviceArray::new(shared, buffer.dtype, shape, &what).await?;
                    places[id.index()] = Some(array.temporary(&mut numbers)?);
                    Some(array)
                }
                (None, None) => None,
            };
            arrays.push(array);
        }
        let kernels = self.executable.code.modules.dispatches(program, &self.sizes, &places)?;
        let mut steps = Vec::with_capacity(kernels.len());
        for kernel in &kernels {
            steps.push(self.step(kernel, &arrays).await?);
        }
        Ok(Prepared { shared: Arc::clone(shared), steps })
    }

    /// Where the given arrays are, and the scalars.
    fn places(&self, arguments: &Arguments, numbers: &mut Numbers) -> Result<Vec<Option<Place>>, Error> {
        let (program, shared) = (&self.executable.program, &self.executable.code.shared);
        let mut views = Vec::new();
        for (name, array) in arguments.inputs.iter().chain(&arguments.outputs) {
            if !Arc::ptr_eq(&array.shared, shared) {
                let reason = format!("`{name}` is an array of another engine");
                return Err(WgpuError::Launch { kernel: program.name().to_owned(), reason }.into());
            }
            views.push((*name, array.place(numbers)?));
        }
        let named: Vec<Named> = views.iter().map(|(n, v)| (*n, v)).collect();
        let (ins, outs) = named.split_at(arguments.inputs.len());
        places(program, &self.sizes, ins, outs, &arguments.scalars, |_: DType, _: &View| {
            let reason = "a scalar is given as an array; give its value".to_owned();
            Err(WgpuError::Launch { kernel: program.name().to_owned(), reason }.into())
        })
    }

    async fn step(&self, kernel: &Dispatch<'_>, arrays: &[Option<DeviceArray>]) -> Result<Step, Error> {
        let (program, shared) = (&self.executable.program, &self.executable.code.shared);
        let pipeline = self.executable.code.pipeline(kernel.symbol, kernel.index).await?;
        let bytes: Vec<u8> = kernel.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let size = (bytes.len() as u64).next_multiple_of(16).max(16);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let label = Some(kernel.symbol);
        let descriptor = wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false };
        let uniform = shared.buffer("the words of a kernel", &descriptor).await?;
        if !bytes.is_empty() {
            shared.queue.write_buffer(&uniform, 0, &bytes);
        }
        let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: uniform.as_entire_binding() }];
        for (i, name) in kernel.arrays.iter().enumerate() {
            let place = program.artifact.buffers.iter().find(|(_, b)| b.name == *name);
            let Some(array) = place.and_then(|(id, _)| arrays[id.index()].as_ref()) else {
                let reason = format!("`{name}` has no place");
                return Err(WgpuError::Launch { kernel: kernel.symbol.to_owned(), reason }.into());
            };
            let resource = wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: &array.buffer,
                offset: GUARD_BYTES,
                size: std::num::NonZeroU64::new(array.bound_bytes()),
            });
            entries.push(wgpu::BindGroupEntry { binding: i as u32 + 1, resource });
        }
        let layout = pipeline.get_bind_group_layout(0);
        let group = shared
            .checked(|d| d.create_bind_group(&wgpu::BindGroupDescriptor { label, layout: &layout, entries: &entries }));
        let group = group.await?;
        Ok(Step { symbol: kernel.symbol.to_owned(), pipeline, group, grid: kernel.grid })
    }

    /// Copies the inputs to the device, runs, and returns the outputs in the cascade's order. Arrays updated in place
    /// are copied from `inputs`; other outputs are full of NaNs first.
    ///
    /// # Errors
    /// As [`Bound::prepare`] and [`Prepared::launch`]; [`WgpuError::Guard`] where a kernel wrote outside an array.
    #[cfg(not(target_family = "wasm"))]
    pub fn run_to_arrays(
        &self,
        inputs: &[(&str, &HostArray)],
        scalars: &[(&str, f64)],
    ) -> Result<Vec<(String, HostArray)>, Error> {
        done(self.run(inputs, scalars, Wait::Block))
    }

    /// As `Bound::run_to_arrays`, without blocking.
    ///
    /// # Errors
    /// As [`Bound::prepare_async`] and [`Prepared::launch`]; [`WgpuError::Guard`] where a kernel wrote outside an array.
    pub async fn run_to_arrays_async(
        &self,
        inputs: &[(&str, &HostArray)],
        scalars: &[(&str, f64)],
    ) -> Result<Vec<(String, HostArray)>, Error> {
        self.run(inputs, scalars, Wait::Yield).await
    }

    async fn run(
        &self,
        inputs: &[(&str, &HostArray)],
        scalars: &[(&str, f64)],
        wait: Wait,
    ) -> Result<Vec<(String, HostArray)>, Error> {
        let copy = |array: &DeviceArray, host: &HostArray| Ok(array.copy_from(host)?);
        let program = &self.executable.program;
        let mut made = BTreeMap::new();
        for (id, buffer) in program.artifact.buffers.iter() {
            if buffer.kind != BufferKind::Workspace && !buffer.is_scalar() {
                made.insert(id, self.array_async(&buffer.name).await?);
            }
        }
        let array = |name: &str, _: bool| {
            let (id, _) = program.find(name, "array", |b| !b.is_scalar())?;
            Ok(made[&id].clone())
        };
        let (arguments, outputs) = Arguments::of_host(self.arrays(), inputs, scalars, array, copy)?;
        self.prepare_async(&arguments).await?.launch()?;
        let mut results = Vec::new();
        for (name, array) in outputs {
            let host = array.host(&name, wait).await?;
            results.push((name, host));
        }
        Ok(results)
    }
}

/// One kernel, ready.
#[derive(Debug)]
struct Step {
    symbol: String,
    pipeline: wgpu::ComputePipeline,
    group: wgpu::BindGroup,
    grid: [u32; 2],
}

/// Launches with everything they need; arrays live as long.
#[derive(Debug)]
pub struct Prepared {
    shared: Arc<Shared>,
    steps: Vec<Step>,
}

impl Prepared {
    fn encode(&self, timestamps: Option<(&wgpu::QuerySet, u32)>, repeat: u32) -> wgpu::CommandBuffer {
        let mut encoder = self.shared.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let writes = timestamps.map(|(query_set, first)| wgpu::ComputePassTimestampWrites {
                query_set,
                beginning_of_pass_write_index: Some(first),
                end_of_pass_write_index: Some(first + 1),
            });
            let descriptor = wgpu::ComputePassDescriptor { label: Some("einfall"), timestamp_writes: writes };
            let mut pass = encoder.begin_compute_pass(&descriptor);
            for _ in 0..repeat {
                for s in &self.steps {
                    pass.set_pipeline(&s.pipeline);
                    pass.set_bind_group(0, &s.group, &[]);
                    pass.dispatch_workgroups(s.grid[0], s.grid[1], 1);
                }
            }
        }
        encoder.finish()
    }

    /// Puts the launches on the device's queue.
    ///
    /// # Errors
    /// [`WgpuError::Lost`].
    pub fn launch(&self) -> Result<(), WgpuError> {
        self.shared.alive()?;
        if !self.steps.is_empty() {
            self.shared.queue.submit([self.encode(None, 1)]);
        }
        self.shared.alive()
    }

    /// Waits for everything on the device.
    ///
    /// # Errors
    /// [`WgpuError::Lost`].
    #[cfg(not(target_family = "wasm"))]
    pub fn synchronize(&self) -> Result<(), WgpuError> {
        done(self.shared.finished(Wait::Block))
    }

    /// As `Prepared::synchronize`, without blocking.
    ///
    /// # Errors
    /// [`WgpuError::Lost`].
    pub async fn synchronize_async(&self) -> Result<(), WgpuError> {
        self.shared.finished(Wait::Yield).await
    }

    /// The device's own time for all launches, once for each of `repeat` rounds in one pass, divided by `repeat`; the
    /// wall clock's where the device takes no times.
    ///
    /// # Errors
    /// [`WgpuError::Lost`].
    #[cfg(not(target_family = "wasm"))]
    pub fn time(&self, repeat: u32) -> Result<Duration, WgpuError> {
        self.shared.alive()?;
        let repeat = repeat.max(1);
        if !self.shared.adapter.timestamps {
            self.synchronize()?;
            let start = std::time::Instant::now();
            self.shared.queue.submit([self.encode(None, repeat)]);
            self.synchronize()?;
            return Ok(start.elapsed() / repeat);
        }
        let shared = &self.shared;
        let descriptor = wgpu::QuerySetDescriptor { label: None, ty: wgpu::QueryType::Timestamp, count: 2 };
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let (set, buffer) = done(shared.checked(|d| {
            let buffer = wgpu::BufferDescriptor { label: None, size: 16, usage, mapped_at_creation: false };
            (d.create_query_set(&descriptor), d.create_buffer(&buffer))
        }))?;
        let mut resolve = shared.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        resolve.resolve_query_set(&set, 0..2, &buffer, 0);
        shared.queue.submit([self.encode(Some((&set, 0)), repeat), resolve.finish()]);
        let bytes = done(shared.read_back(&buffer, Wait::Block))?;
        let at = |i: usize| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().unwrap_or_default());
        let ticks = at(1).saturating_sub(at(0)) as f64;
        let ns = ticks * f64::from(shared.queue.get_timestamp_period());
        Ok(Duration::from_secs_f64(ns * 1e-9 / f64::from(repeat)))
    }

    /// The kernels that a launch runs, in order.
    pub fn symbols(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().map(|s| s.symbol.as_str())
    }
}
