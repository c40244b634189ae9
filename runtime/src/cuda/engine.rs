//! The engine: one device, its code cache, and the executables loaded on it.
//!
//! Invariant: what [`Engine::load`] loads is a function of the artifact's text and what the cache's key names; every
//! kernel is checked against the device's limits before anything is launched.

use super::array::DeviceArray;
use super::code::{Code, FunctionInfo, varies};
use super::driver::{Context, Event, Memory, Stream};
use super::error::CudaError;
use super::gpu::{Gpu, gpus};
use super::tensor_map::Maps;
use crate::array::HostArray;
use crate::cache::Cache;
use crate::error::Error;
use crate::executable;
use crate::program::{self, Program};
use einfall_ir::artifact::{Artifact, Slot};
use einfall_ir::dtype::DType;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of parameters that PTX 8.0 kernels may take.
const MAX_PARAMETER_BYTES: usize = 4096;

/// What an engine is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EngineOptions {
    /// The device's number.
    pub index: usize,
    /// Folder of the code cache; none for no cache.
    pub cache: Option<PathBuf>,
}

/// Loads artifacts on one GPU. Shared by many threads.
#[derive(Debug)]
pub struct Engine {
    pub(super) shared: Arc<Shared>,
}

/// What executables keep of their engine.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) maps: Maps,
    /// Some device memory, for the maps of arrays without elements.
    pub(super) spare: Memory,
    pub(super) gpu: Gpu,
    pub(super) context: Arc<Context>,
    pub(super) cache: Option<Cache>,
    /// Texts assembled so far.
    pub(super) assembled: AtomicU64,
}

impl Engine {
    /// Opens a device and the cache. A cache folder that cannot be used is left out with a warning.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::OldDriver`], [`CudaError::NoDevice`], [`CudaError::Call`].
    pub fn new(options: &EngineOptions) -> Result<Engine, Error> {
        let mut list = gpus()?;
        let (index, count) = (options.index, list.len());
        if index >= count {
            return Err(CudaError::NoDevice { index, count }.into());
        }
        let gpu = list.swap_remove(index);
        let context = Arc::new(Context::new(index)?);
        let spare = Memory::alloc(&context, 256, "an engine")?;
        tracing::debug!(device = gpu.name, driver = gpu.driver, "a CUDA device is open");
        let cache = options.cache.as_ref().and_then(|folder| {
            Cache::open(folder).inspect_err(|error| tracing::warn!(%error, "kernels are not cached")).ok()
        });
        let (maps, assembled) = (Maps::default(), AtomicU64::new(0));
        Ok(Engine { shared: Arc::new(Shared { maps, spare, gpu, context, cache, assembled }) })
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.shared.gpu
    }

    /// The code cache, if there is one.
    pub fn cache(&self) -> Option<&Cache> {
        self.shared.cache.as_ref()
    }

    /// How many PTX texts were assembled so far; one from the cache does not count.
    pub fn assembled(&self) -> u64 {
        self.shared.assembled.load(Ordering::Relaxed)
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.shared.context
    }

    /// A new stream.
    ///
    /// # Errors
    /// [`CudaError::Call`], [`CudaError::Refused`].
    pub fn stream(&self) -> Result<Stream, CudaError> {
        Stream::new(self.context())
    }

    /// A new event.
    ///
    /// # Errors
    /// [`CudaError::Call`], [`CudaError::Refused`].
    pub fn event(&self) -> Result<Event, CudaError> {
        Event::new(self.context())
    }

    /// Waits for everything on the device.
    ///
    /// # Errors
    /// [`CudaError::Kernel`] for a kernel that failed, [`CudaError::Refused`] after one.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.context().synchronize()
    }

    /// Free and all bytes of device memory.
    ///
    /// # Errors
    /// [`CudaError::Call`], [`CudaError::Refused`].
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.context().memory()
    }

    /// A dense array in device memory, with unspecified content.
    ///
    /// # Errors
    /// [`CudaError::Memory`] where there is too little, [`CudaError::Array`] for a shape that cannot be.
    pub fn array(&self, dtype: DType, shape: &[u64]) -> Result<DeviceArray, CudaError> {
        DeviceArray::alloc(self.context(), dtype, shape, false, "an array")
    }

    /// As [`Engine::array`], with rows padded to whole multiples of 16 bytes, as copy engines want them.
    ///
    /// # Errors
    /// As [`Engine::array`].
    pub fn padded_array(&self, dtype: DType, shape: &[u64]) -> Result<DeviceArray, CudaError> {
        DeviceArray::alloc(self.context(), dtype, shape, true, "an array")
    }

    /// A dense copy of a host array.
    ///
    /// # Errors
    /// As [`Engine::array`], and [`CudaError::Refused`].
    pub fn upload(&self, stream: &Stream, host: &HostArray) -> Result<DeviceArray, CudaError> {
        let array = self.array(host.dtype(), host.shape())?;
        array.copy_from(stream, host)?;
        Ok(array)
    }

    /// Assembles (or takes from the cache) and loads an artifact. Of a kernel with variants, each is assembled when
    /// [`prepare`](super::Bound::prepare) first chooses it.
    ///
    /// # Errors
    /// [`Error::Artifact`] where it contradicts itself or is not for a GPU, [`Error::Cuda`] where the driver refuses
    /// its code or a kernel exceeds the device's limits.
    ///
    /// # Safety
    /// The code keeps to the GPU convention of [`Launch`](einfall_ir::artifact::Launch): kernels have its parameters, and
    /// tasks touch only the arrays and slots of their launch, only inside their extents. Code generation makes such
    /// artifacts.
    pub unsafe fn load(&self, artifact: Artifact) -> Result<Arc<Executable>, Error> {
        // SAFETY: the caller's promise.
        unsafe { self.load_assembled(artifact, None) }
    }

    /// As [`Engine::load`], with machine code (a cubin) of the whole artifact's PTX: nothing is assembled. One that the driver
    /// does not take, because a later toolkit made it, is passed over with a warning.
    ///
    /// # Errors
    /// As [`Engine::load`].
    ///
    /// # Safety
    /// As [`Engine::load`], and the machine code is whole and was made of the artifact's PTX by NVIDIA's assembler.
    pub unsafe fn load_assembled(&self, artifact: Artifact, cubin: Option<&[u8]>) -> Result<Arc<Executable>, Error> {
        let _span = tracing::debug_span!("load", cascade = artifact.name).entered();
        program::check(&artifact)?;
        check_launches(&artifact)?;
        // SAFETY: the caller's promise.
        let assembled = cubin.and_then(|image| unsafe { Code::of_image(&self.shared, &artifact, image) });
        let code = assembled.map_or_else(|| Code::new(&self.shared, &artifact), Ok)?;
        let code = Modules { code, shared: Arc::clone(&self.shared) };
        Ok(Arc::new(Executable { code, program: Program::new(artifact) }))
    }
}

/// Checks what only a GPU asks of an artifact.
fn check_launches(artifact: &Artifact) -> Result<(), Error> {
    let bad = |reason: String| Err(Error::Artifact { name: artifact.name.clone(), reason });
    for launch in &artifact.launches {
        let symbol = &launch.symbol;
        let Some(gpu) = &launch.gpu else {
            return bad(format!("kernel `{symbol}` says nothing about its launch on a GPU"));
        };
        if !gpu.cluster.is_empty() && gpu.cluster.len() != launch.grid.len() || gpu.cluster.contains(&0) {
            return bad(format!(
                "kernel `{symbol}` has clusters of {:?} in a grid of {} dimensions",
                gpu.cluster,
                launch.grid.len()
            ));
        }
        if gpu.threads == 0 {
            return bad(format!("kernel `{symbol}` has no threads"));
        }
        if parameter_bytes(gpu.maps.len(), &launch.slots) > MAX_PARAMETER_BYTES {
            return bad(format!("kernel `{symbol}` takes more than {MAX_PARAMETER_BYTES} bytes of parameters"));
        }
    }
    Ok(())
}

/// Bytes of a kernel's parameters: maps of 128, then slots of 8.
pub(super) fn parameter_bytes(maps: usize, slots: &[Slot]) -> usize {
    128 * maps + 8 * slots.len()
}

/// The code of an artifact on a device.
#[derive(Debug)]
pub struct Modules {
    pub(super) code: Code,
    pub(super) shared: Arc<Shared>,
}

/// An artifact loaded on a device.
pub type Executable = executable::Executable<Modules>;

impl Executable {
    /// The device it is loaded on.
    pub fn gpu(&self) -> &Gpu {
        &self.code.shared.gpu
    }

    /// What the driver's assembler said so far; empty where the code came from the cache.
    pub fn log(&self) -> String {
        self.code.code.log()
    }

    /// What the assembler made of each kernel, in launch order, variants that nothing has chosen yet left out.
    pub fn functions(&self) -> impl Iterator<Item = &FunctionInfo> {
        self.code.code.functions()
    }

    /// How many of its kernels are variants, assembled when sizes and arrays first choose them.
    pub fn variants(&self) -> usize {
        self.program.artifact.launches.iter().filter(|l| varies(l)).count()
    }
}
