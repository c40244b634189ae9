//! The engine: one device, its code cache, and the executables loaded on it.
//!
//! Invariant: what [`Engine::load`] loads is a function of the artifact's text and what the cache's key names; every
//! kernel is checked against the device's limits before anything is launched.

use super::array::DeviceArray;
use super::driver::{Context, Event, Function, Memory, Module, Stream, call};
use super::error::CudaError;
use super::gpu::{Gpu, gpus};
use super::launch::Bound;
use super::link;
use super::tensor_map::Maps;
use crate::array::HostArray;
use crate::cache::Cache;
use crate::error::Error;
use crate::program::{self, Program};
use cudarc::driver::sys::{self, CUfunction_attribute as Attribute};
use einfall_ir::artifact::{Artifact, Code, Launch, Slot};
use einfall_ir::dtype::DType;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of parameters that PTX 8.0 kernels may take.
const MAX_PARAMETER_BYTES: usize = 4096;
/// Tasks of a cluster that every device with clusters allows; more are asked for by an attribute.
const PORTABLE_CLUSTER: u64 = 8;

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
    cache: Option<Cache>,
    assembled: AtomicU64,
}

/// What executables keep of their engine.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) maps: Maps,
    /// Some device memory, for the maps of arrays without elements.
    pub(super) spare: Memory,
    pub(super) gpu: Gpu,
    pub(super) context: Arc<Context>,
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
        let shared = Arc::new(Shared { maps: Maps::default(), spare, gpu, context });
        Ok(Engine { shared, cache, assembled: AtomicU64::new(0) })
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.shared.gpu
    }

    /// The code cache, if there is one.
    pub fn cache(&self) -> Option<&Cache> {
        self.cache.as_ref()
    }

    /// How many PTX texts were assembled so far; one from the cache does not count.
    pub fn assembled(&self) -> u64 {
        self.assembled.load(Ordering::Relaxed)
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

    /// Assembles (or takes from the cache) and loads an artifact.
    ///
    /// # Errors
    /// [`Error::Artifact`] where it contradicts itself or is not for a GPU, [`Error::Cuda`] where the driver refuses
    /// its code or a kernel exceeds the device's limits.
    ///
    /// # Safety
    /// The code keeps to the GPU convention of [`Launch`]: kernels have its parameters, and tasks touch only the arrays
    /// and slots of their launch, only inside their extents. Code generation makes such artifacts.
    pub unsafe fn load(&self, artifact: Artifact) -> Result<Arc<Executable>, Error> {
        let _span = tracing::debug_span!("load", cascade = artifact.name).entered();
        program::check(&artifact)?;
        check_launches(&artifact)?;
        let Code::Ptx { text, arch } = &artifact.code else {
            let reason = "its code is not PTX; this engine runs kernels on a GPU".to_owned();
            return Err(Error::Artifact { name: artifact.name, reason });
        };
        let gpu = &self.shared.gpu;
        let (module, log) = match link::wants_whole(text) {
            true => {
                self.assembled.fetch_add(1, Ordering::Relaxed);
                link::load(self.context(), gpu, &artifact.name, text, arch)?
            }
            false => self.linked(&artifact.name, text, arch)?,
        };
        let mut functions = Vec::new();
        for launch in &artifact.launches {
            functions.push(self.function(&module, launch)?);
        }
        Ok(Arc::new(Executable {
            functions,
            module: Arc::new(module),
            log,
            shared: Arc::clone(&self.shared),
            program: Program::new(artifact),
        }))
    }

    /// Code by the driver's linker, or from the cache.
    fn linked(&self, name: &str, text: &str, arch: &str) -> Result<(Module, String), Error> {
        let gpu = &self.shared.gpu;
        let key = link::key(text, arch, gpu);
        let cached = self.cache.as_ref().and_then(|cache| cache.get(&key));
        // SAFETY: the entry is whole and this user's, so `put` below wrote it from the assembler's output.
        match cached.map(|image| unsafe { Module::load(self.context(), &image) }) {
            Some(Ok(module)) => {
                tracing::debug!(%key, "the code comes from the cache");
                return Ok((module, String::new()));
            }
            Some(Err(error)) => tracing::warn!(%key, %error, "cached code does not load and is rebuilt"),
            None => {}
        }
        self.assembled.fetch_add(1, Ordering::Relaxed);
        match link::assemble(self.context(), gpu, name, text, arch) {
            Ok(code) => {
                if let Some(cache) = &self.cache
                    && let Err(error) = cache.put(&key, &code.image)
                {
                    tracing::warn!(%error, "a kernel is not cached");
                }
                tracing::debug!(log = code.log, "assembled");
                // SAFETY: the driver's assembler made it a line above.
                Ok((unsafe { Module::load(self.context(), &code.image)? }, code.log))
            }
            // A driver whose linker refuses what its loader takes: no code to cache then.
            Err(error @ CudaError::Assemble { .. }) => match link::load(self.context(), gpu, name, text, arch) {
                Ok(loaded) => {
                    tracing::warn!(%error, "the driver's linker refuses a text that loads");
                    Ok(loaded)
                }
                Err(_) => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Finds a kernel, checks it against the device and sets what its launches need.
    fn function(&self, module: &Module, launch: &Launch) -> Result<(Function, FunctionInfo), Error> {
        let function = module.function(&launch.symbol)?;
        let symbol = &launch.symbol;
        let get = |a: Attribute| {
            let mut value = 0;
            // SAFETY: the module is loaded.
            call(unsafe { sys::cuFuncGetAttribute(&mut value, a, function.0) }, || format!("asking about `{symbol}`"))?;
            Ok::<u32, CudaError>(value.max(0) as u32)
        };
        let set = |a: Attribute, value: i32| {
            // SAFETY: as above.
            call(unsafe { sys::cuFuncSetAttribute(function.0, a, value) }, || format!("preparing `{symbol}`"))
        };
        let refuse = |reason: String| CudaError::Launch { kernel: symbol.clone(), reason };
        use Attribute::*;
        let info = FunctionInfo {
            symbol: symbol.clone(),
            registers: get(CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: get(CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            static_shared_bytes: get(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            max_threads: get(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        };
        let Some(gpu) = &launch.gpu else { return Ok((function, info)) };
        if gpu.threads > info.max_threads {
            let reason = format!("it has {} threads a task and its code allows {}", gpu.threads, info.max_threads);
            return Err(refuse(reason).into());
        }
        let (shared, limit) = (gpu.shared_bytes + u64::from(info.static_shared_bytes), self.shared.gpu.shared_bytes);
        if shared > limit {
            return Err(refuse(format!("it takes {shared} bytes of shared memory and the device has {limit}")).into());
        }
        set(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, gpu.shared_bytes as i32)?;
        if gpu.cluster.iter().product::<u64>() > PORTABLE_CLUSTER {
            set(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)?;
        }
        Ok((function, info))
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
        for map in &gpu.maps {
            let dims = artifact.buffers.get(map.buffer).map(|b| b.dims.len());
            if dims.is_none_or(|n| map.dims.iter().any(|d| *d >= n)) || map.dims.len() != map.extents.len() {
                return bad(format!("a tensor map of kernel `{symbol}` names what is not there"));
            }
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

/// What the assembler made of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionInfo {
    /// The symbol.
    pub symbol: String,
    /// Registers of a thread (at launch; roles may move them).
    pub registers: u32,
    /// Local memory of a thread in bytes: spills and arrays that are indexed.
    pub local_bytes: u32,
    /// Shared memory that is not sized at launch, in bytes.
    pub static_shared_bytes: u32,
    /// Threads of a task at most.
    pub max_threads: u32,
}

/// An artifact loaded on a device. Sizes are bound by [`Executable::bind`].
#[derive(Debug)]
pub struct Executable {
    pub(super) functions: Vec<(Function, FunctionInfo)>,
    pub(super) module: Arc<Module>,
    log: String,
    pub(super) shared: Arc<Shared>,
    pub(super) program: Program,
}

impl Executable {
    /// The cascade's name.
    pub fn name(&self) -> &str {
        self.program.name()
    }

    /// Names of the ranks, in the cascade's order.
    pub fn ranks(&self) -> impl Iterator<Item = &str> {
        self.program.ranks()
    }

    /// The device it is loaded on.
    pub fn gpu(&self) -> &Gpu {
        &self.shared.gpu
    }

    /// What the driver's assembler said; empty where the code came from the cache.
    pub fn log(&self) -> &str {
        &self.log
    }

    /// What the assembler made of each kernel, in launch order.
    pub fn functions(&self) -> impl Iterator<Item = &FunctionInfo> {
        self.functions.iter().map(|(_, info)| info)
    }

    /// The sizes of ranks that the shapes of arrays imply (see [`crate::Executable::infer`]).
    ///
    /// # Errors
    /// [`Error::UnknownArray`], [`Error::Dimensions`], and [`Error::RankConflict`] or [`Error::Extent`] for shapes that
    /// contradict each other.
    pub fn infer(&self, shapes: &[(&str, &[u64])]) -> Result<Vec<(String, u64)>, Error> {
        self.program.infer(shapes)
    }

    /// Fixes the sizes of all ranks. Nothing is compiled: the code serves every size.
    ///
    /// # Errors
    /// [`Error::UnknownRank`], [`Error::MissingRank`], [`Error::RankConflict`], [`Error::Size`]; and [`Error::Cuda`]
    /// with [`CudaError::Extent`] for an extent that does not fit 31 bits, or [`CudaError::Launch`] for a grid that the
    /// device cannot run.
    pub fn bind<S: AsRef<str>>(self: &Arc<Executable>, sizes: &[(S, u64)]) -> Result<Bound, Error> {
        Bound::new(Arc::clone(self), self.program.bind(sizes)?)
    }
}
