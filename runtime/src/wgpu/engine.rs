//! The engine: one device, and the executables loaded on it.
//!
//! Invariant: every limit that a kernel could exceed is checked before the implementation sees it; the first error that
//! the device reports on its own, its loss included, is kept and refuses everything after it.

use super::adapter::named;
#[cfg(not(target_family = "wasm"))]
use super::answer::done;
use super::answer::{Answer, Wait};
use super::array::DeviceArray;
use crate::error::Error;
use crate::executable;
use crate::program::Program;
use crate::shaders::{Adapter, Modules, WgpuError};
use einfall_ir::artifact::{Artifact, Bindings};
use einfall_ir::dtype::DType;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// What an engine is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EngineOptions {
    /// A part of the adapter's name; none: the only one, or the only one that is no processor.
    pub name: Option<String>,
}

/// Loads artifacts on one adapter. Shared by many threads.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(super) shared: Arc<Shared>,
}

/// What executables and arrays keep of their engine.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) adapter: Adapter,
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    /// What the device reported on its own.
    fault: Arc<OnceLock<String>>,
    /// Held while an error scope is open: scopes are of a thread, errors of the device. Never held over an `await`.
    scope: Mutex<()>,
}

impl Shared {
    /// Whether the device may still be used.
    pub(super) fn alive(&self) -> Result<(), WgpuError> {
        match self.fault.get() {
            None => Ok(()),
            Some(reason) => {
                Err(WgpuError::Lost { adapter: self.adapter.name.clone(), reason: reason.trim().to_owned() })
            }
        }
    }

    /// Lets the device answer what it is done with.
    pub(super) fn poll(&self, how: wgpu::PollType) -> Result<(), WgpuError> {
        let polled = self.device.poll(how);
        self.alive()?;
        polled.map(|_| ()).map_err(|e| self.lost(e.to_string()))
    }

    fn lost(&self, reason: String) -> WgpuError {
        WgpuError::Lost { adapter: self.adapter.name.clone(), reason }
    }

    /// A call whose errors are its own; it is made at once, its errors may come later.
    fn scoped<T, F>(&self, call: F) -> impl Future<Output = Result<T, wgpu::Error>> + use<T, F>
    where
        F: FnOnce(&wgpu::Device) -> T,
    {
        let one = self.scope.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let value = call(&self.device);
        let (validation, memory) = (validation.pop(), memory.pop());
        drop(one);
        async move {
            let (first, second) = (validation.await, memory.await);
            match first.or(second) {
                None => Ok(value),
                Some(error) => Err(error),
            }
        }
    }

    /// A call whose errors refuse the device: nothing that was checked should meet one.
    pub(super) async fn checked<T>(&self, call: impl FnOnce(&wgpu::Device) -> T) -> Result<T, WgpuError> {
        let value = self.scoped(call).await;
        self.alive()?;
        value.map_err(|e| WgpuError::NoDevice { adapter: self.adapter.name.clone(), reason: e.to_string() })
    }

    /// A buffer for `what`, of so many bytes.
    pub(super) async fn buffer(
        &self,
        what: &str,
        descriptor: &wgpu::BufferDescriptor<'_>,
    ) -> Result<wgpu::Buffer, WgpuError> {
        let made = self.scoped(|d| d.create_buffer(descriptor)).await;
        self.alive()?;
        let adapter = self.adapter.name.clone();
        made.map_err(|e| match e {
            wgpu::Error::OutOfMemory { .. } => {
                WgpuError::Memory { what: what.to_owned(), bytes: descriptor.size, adapter }
            }
            e => WgpuError::NoDevice { adapter, reason: e.to_string() },
        })
    }

    /// The content of a buffer once everything before is done.
    pub(super) async fn read_back(&self, buffer: &wgpu::Buffer, wait: Wait) -> Result<Vec<u8>, WgpuError> {
        self.alive()?;
        let size = buffer.size();
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: Some("read back"), size, usage, mapped_at_creation: false };
        let host = self.buffer("a copy for the host", &descriptor).await?;
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(buffer, 0, &host, 0, size);
        self.queue.submit([encoder.finish()]);
        let mapped = Answer::new();
        let answer = mapped.clone();
        host.map_async(wgpu::MapMode::Read, .., move |r| answer.give(r.map_err(|e| e.to_string())));
        mapped.wait(self, wait).await?.map_err(|e| self.lost(e))?;
        Ok(host.get_mapped_range(..).map_err(|e| self.lost(e.to_string()))?.to_vec())
    }

    /// Everything on the device is done.
    pub(super) async fn finished(&self, wait: Wait) -> Result<(), WgpuError> {
        self.alive()?;
        let finished = Answer::new();
        let answer = finished.clone();
        self.queue.on_submitted_work_done(move || answer.give(()));
        finished.wait(self, wait).await
    }
}

impl Engine {
    /// Opens an adapter by name.
    ///
    /// # Errors
    /// [`WgpuError::NoAdapter`], [`WgpuError::Ambiguous`], [`WgpuError::NoDevice`].
    #[cfg(not(target_family = "wasm"))]
    pub fn new(options: &EngineOptions) -> Result<Engine, Error> {
        done(Engine::new_async(options))
    }

    /// As `Engine::new`, without blocking.
    ///
    /// # Errors
    /// [`WgpuError::NoAdapter`], [`WgpuError::Ambiguous`], [`WgpuError::NoDevice`].
    pub async fn new_async(options: &EngineOptions) -> Result<Engine, Error> {
        let found = named(options.name.as_deref()).await?;
        let adapter = Adapter::of(&found);
        let wanted = wgpu::Features::SUBGROUP
            | wgpu::Features::SHADER_F16
            | wgpu::Features::TIMESTAMP_QUERY
            | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("einfall"),
            required_features: found.features() & wanted,
            required_limits: found.limits(),
            // SAFETY: of what is experimental only cooperative matrices are used, by kernels whose sizes and types the adapter
            // reports (`Modules::of`) and whose accesses code generation proves.
            experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
            ..wgpu::DeviceDescriptor::default()
        };
        let none =
            |e: wgpu::RequestDeviceError| WgpuError::NoDevice { adapter: adapter.name.clone(), reason: e.to_string() };
        let (device, queue) = found.request_device(&descriptor).await.map_err(none)?;
        let fault: Arc<OnceLock<String>> = Arc::default();
        let (lost, failed) = (Arc::clone(&fault), Arc::clone(&fault));
        device.set_device_lost_callback(move |reason, text| {
            let _ = lost.set(format!("the device was lost ({reason:?}): {text}"));
        });
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let _ = failed.set(format!("it reported: {error}"));
        }));
        tracing::debug!(adapter = adapter.name, driver = adapter.driver, "an adapter is open");
        Ok(Engine { shared: Arc::new(Shared { adapter, device, queue, fault, scope: Mutex::new(()) }) })
    }

    /// The adapter.
    pub fn adapter(&self) -> &Adapter {
        &self.shared.adapter
    }

    /// A dense array in the adapter's memory, full of NaNs.
    ///
    /// # Errors
    /// [`WgpuError::Limit`] for one that is too large, [`WgpuError::Array`], [`WgpuError::Lost`].
    #[cfg(not(target_family = "wasm"))]
    pub fn array(&self, dtype: DType, shape: &[u64]) -> Result<DeviceArray, WgpuError> {
        done(self.array_async(dtype, shape))
    }

    /// As `Engine::array`, without blocking.
    ///
    /// # Errors
    /// [`WgpuError::Limit`] for one that is too large, [`WgpuError::Array`], [`WgpuError::Lost`].
    pub async fn array_async(&self, dtype: DType, shape: &[u64]) -> Result<DeviceArray, WgpuError> {
        DeviceArray::new(&self.shared, dtype, shape, "an array").await
    }

    /// Gives the device up; everything that is asked of it afterwards is refused. For tests of what a lost device does.
    pub fn lose(&self) {
        self.shared.device.destroy();
        let _ = self.shared.device.poll(wgpu::PollType::Poll);
        let _ = self.shared.fault.set("the device was given up".to_owned());
    }

    /// Takes an artifact; a kernel's pipeline is made when it is first prepared.
    ///
    /// # Errors
    /// [`Error::Artifact`] where it contradicts itself or is not WGSL, [`Error::Wgpu`] where a kernel exceeds a limit or
    /// needs what the adapter lacks.
    ///
    /// # Safety
    /// The code keeps to the WebGPU convention of [`Launch`](einfall_ir::artifact::Launch), and its tasks touch only the
    /// arrays of their launch, only inside their extents. Code generation makes such artifacts.
    pub unsafe fn load(&self, artifact: Artifact) -> Result<Arc<Executable>, Error> {
        let modules = Modules::of(&artifact, &self.shared.adapter, Bindings::Own)?;
        let pipelines = artifact.launches.iter().map(|_| OnceLock::new()).collect();
        let code = Shaders { shared: Arc::clone(&self.shared), modules, pipelines };
        Ok(Arc::new(Executable { program: Program::new(artifact), code }))
    }
}

/// The shaders of an artifact on an adapter.
#[derive(Debug)]
pub struct Shaders {
    pub(super) shared: Arc<Shared>,
    pub(super) modules: Modules,
    pipelines: Vec<OnceLock<wgpu::ComputePipeline>>,
}

/// An artifact loaded on an adapter.
pub type Executable = executable::Executable<Shaders>;

impl Shaders {
    /// The pipeline of kernel `index`, made when it is first asked for.
    pub(super) async fn pipeline(&self, symbol: &str, index: usize) -> Result<wgpu::ComputePipeline, WgpuError> {
        if let Some(made) = self.pipelines[index].get() {
            return Ok(made.clone());
        }
        let (shared, module) = (&self.shared, self.modules.module(index));
        shared.alive()?;
        let entry = |binding: u32, ty| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let arrays = module
            .written
            .iter()
            .enumerate()
            .map(|(i, written)| entry(i as u32 + 1, wgpu::BufferBindingType::Storage { read_only: !written }));
        let entries: Vec<_> = [entry(0, wgpu::BufferBindingType::Uniform)].into_iter().chain(arrays).collect();
        let label = Some(symbol);
        let made = shared.scoped(|device| {
            let descriptor =
                wgpu::ShaderModuleDescriptor { label, source: wgpu::ShaderSource::Wgsl(module.text.as_str().into()) };
            // SAFETY: who loaded the artifact vouches that its tasks keep inside their arrays.
            let code =
                unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
            let group = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
            let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label,
                bind_group_layouts: &[Some(&group)],
                immediate_size: 0,
            });
            // Kernels write what they read of workgroup memory.
            let options =
                wgpu::PipelineCompilationOptions { zero_initialize_workgroup_memory: false, ..Default::default() };
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label,
                layout: Some(&layout),
                module: &code,
                entry_point: label,
                compilation_options: options,
                cache: None,
            })
        });
        let made = made.await;
        shared.alive()?;
        let pipeline = made.map_err(|e| WgpuError::Refused {
            kernel: symbol.to_owned(),
            adapter: shared.adapter.name.clone(),
            reason: e.to_string(),
        })?;
        Ok(self.pipelines[index].get_or_init(|| pipeline).clone())
    }
}
