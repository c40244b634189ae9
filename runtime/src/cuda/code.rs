//! The code of an executable: PTX in parts, each assembled when it is needed.
//!
//! Kernels without variants are one part, assembled when the artifact is loaded; every variant is a part of its own,
//! assembled when sizes and arrays first choose it, so a process waits for what it runs. Invariant: a launch's function
//! is checked against the device's limits before it is handed out, and no part is assembled twice.

use super::driver::{Function, Module, call};
use super::engine::Shared;
use super::error::CudaError;
use super::link;
use crate::error::Error;
use cudarc::driver::sys::{self, CUfunction_attribute as Attribute};
use einfall_ir::artifact::{self, Artifact, Launch};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Tasks of a cluster that every device with clusters allows; more are asked for by an attribute.
const PORTABLE_CLUSTER: u64 = 8;
/// What a kernel's text begins with.
const ENTRY: &str = "\n.visible .entry ";

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

/// The code of an artifact.
#[derive(Debug)]
pub(super) struct Code {
    name: String,
    arch: String,
    parts: Vec<Part>,
    /// Per launch, its part and its place in it.
    places: Vec<(usize, usize)>,
}

/// Kernels that are assembled together.
#[derive(Debug)]
struct Part {
    text: String,
    /// Indices of their launches.
    launches: Vec<usize>,
    loaded: OnceLock<Loaded>,
    /// Held while it is assembled.
    turn: Mutex<()>,
}

/// A part on the device.
#[derive(Debug)]
struct Loaded {
    module: Arc<Module>,
    log: String,
    /// Per launch of the part.
    functions: Vec<(Function, FunctionInfo)>,
}

impl Code {
    /// The code of an artifact, of which everything without variants is loaded.
    pub(super) fn new(shared: &Shared, artifact: &Artifact) -> Result<Code, Error> {
        let artifact::Code::Ptx { text, arch } = &artifact.code else {
            let reason = "its code is not PTX; this engine runs kernels on a GPU".to_owned();
            return Err(Error::Artifact { name: artifact.name.clone(), reason });
        };
        let (texts, part_of) = parts(text, &artifact.launches);
        let part = |text| Part { text, launches: Vec::new(), loaded: OnceLock::new(), turn: Mutex::new(()) };
        let mut parts: Vec<Part> = texts.into_iter().map(part).collect();
        let mut places = Vec::with_capacity(part_of.len());
        for (launch, part) in part_of.into_iter().enumerate() {
            places.push((part, parts[part].launches.len()));
            parts[part].launches.push(launch);
        }
        let code = Code { name: artifact.name.clone(), arch: arch.clone(), parts, places };
        for (index, launch) in artifact.launches.iter().enumerate() {
            if !varies(launch) {
                code.function(shared, &artifact.launches, index)?;
            }
        }
        if artifact.launches.is_empty() {
            code.load(shared, &artifact.launches, 0)?;
        }
        Ok(code)
    }

    /// The code of an artifact as machine code; none where the driver does not take it, which the log is told.
    ///
    /// # Safety
    /// The image is whole and was made of the artifact's PTX by NVIDIA's assembler.
    pub(super) unsafe fn of_image(shared: &Shared, artifact: &Artifact, image: &[u8]) -> Option<Code> {
        let made = || -> Result<Loaded, Error> {
            // SAFETY: the caller's promise.
            let module = unsafe { Module::load(&shared.context, image)? };
            let functions =
                artifact.launches.iter().map(|l| shared.function(&module, l)).collect::<Result<_, Error>>()?;
            Ok(Loaded { module: Arc::new(module), log: String::new(), functions })
        };
        let loaded = made()
            .inspect_err(
                |error| tracing::warn!(%error, name = artifact.name, "machine code is not taken; its PTX is assembled"),
            )
            .ok()?;
        let launches: Vec<usize> = (0..artifact.launches.len()).collect();
        let places = launches.iter().map(|l| (0, *l)).collect();
        let part = Part { text: String::new(), launches, loaded: OnceLock::from(loaded), turn: Mutex::new(()) };
        Some(Code { name: artifact.name.clone(), arch: String::new(), parts: vec![part], places })
    }

    /// The function of a launch and the module that holds it, assembled now if it never was.
    pub(super) fn function(
        &self,
        shared: &Shared,
        launches: &[Launch],
        index: usize,
    ) -> Result<(Function, Arc<Module>), Error> {
        let (part, within) = self.places[index];
        let loaded = self.load(shared, launches, part)?;
        Ok((loaded.functions[within].0, Arc::clone(&loaded.module)))
    }

    fn load(&self, shared: &Shared, launches: &[Launch], at: usize) -> Result<&Loaded, Error> {
        let part = &self.parts[at];
        if let Some(loaded) = part.loaded.get() {
            return Ok(loaded);
        }
        let _turn = part.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = part.loaded.get() {
            return Ok(loaded);
        }
        let (module, log) = match link::wants_whole(&part.text) {
            true => {
                shared.assembled.fetch_add(1, Ordering::Relaxed);
                link::load(&shared.context, &shared.gpu, &self.name, &part.text, &self.arch)?
            }
            false => shared.linked(&self.name, &part.text, &self.arch)?,
        };
        let functions = part.launches.iter().map(|l| shared.function(&module, &launches[*l]));
        let functions = functions.collect::<Result<_, Error>>()?;
        Ok(part.loaded.get_or_init(|| Loaded { module: Arc::new(module), log, functions }))
    }

    /// What the assembler said of the parts that are loaded.
    pub(super) fn log(&self) -> String {
        let logs = self.parts.iter().filter_map(|p| p.loaded.get()).map(|l| l.log.as_str());
        logs.filter(|l| !l.is_empty()).collect::<Vec<_>>().join("\n")
    }

    /// What the assembler made of the kernels that are loaded, in launch order.
    pub(super) fn functions(&self) -> impl Iterator<Item = &FunctionInfo> {
        self.places.iter().filter_map(|(part, within)| Some(&self.parts[*part].loaded.get()?.functions[*within].1))
    }
}

/// Whether a kernel is one of several that sizes and arrays choose from.
pub(super) fn varies(launch: &Launch) -> bool {
    launch.gpu.as_ref().is_some_and(|g| g.variant_of.is_some())
}

/// The texts to assemble, and for each launch which of them holds it: what has no variants together, then every variant
/// by itself. A text whose kernels are not found one by one stays whole.
fn parts(text: &str, launches: &[Launch]) -> (Vec<String>, Vec<usize>) {
    let whole = || (vec![text.to_owned()], vec![0; launches.len()]);
    if !launches.iter().any(varies) {
        return whole();
    }
    let mut pieces = text.split(ENTRY);
    let head = pieces.next().unwrap_or_default();
    let entries: Vec<(&str, &str)> = pieces.filter_map(|p| Some((p.split('(').next()?.trim(), p))).collect();
    let found = |symbol: &str| {
        let mut of = entries.iter().filter(|(name, _)| *name == symbol);
        of.next().filter(|_| of.next().is_none()).map(|(_, text)| *text)
    };
    let (mut texts, mut part_of, mut common) = (Vec::new(), Vec::new(), String::new());
    let fixed = usize::from(launches.iter().any(|l| !varies(l)));
    for launch in launches {
        let Some(entry) = found(&launch.symbol) else { return whole() };
        if varies(launch) {
            part_of.push(fixed + texts.len());
            texts.push(format!("{head}{ENTRY}{entry}"));
        } else {
            part_of.push(0);
            common += ENTRY;
            common += entry;
        }
    }
    if fixed == 1 {
        texts.insert(0, format!("{head}{common}"));
    }
    (texts, part_of)
}

impl Shared {
    /// Code by the driver's linker, or from the cache.
    fn linked(&self, name: &str, text: &str, arch: &str) -> Result<(Module, String), Error> {
        let gpu = &self.gpu;
        let key = link::key(text, arch, gpu);
        let cached = self.cache.as_ref().and_then(|cache| cache.get(&key));
        // SAFETY: the entry is whole and this user's, so `put` below wrote it from the assembler's output.
        match cached.map(|image| unsafe { Module::load(&self.context, &image) }) {
            Some(Ok(module)) => {
                tracing::debug!(%key, "the code comes from the cache");
                return Ok((module, String::new()));
            }
            Some(Err(error)) => tracing::warn!(%key, %error, "cached code does not load and is rebuilt"),
            None => {}
        }
        self.assembled.fetch_add(1, Ordering::Relaxed);
        match link::assemble(&self.context, gpu, name, text, arch) {
            Ok(code) => {
                if let Some(cache) = &self.cache
                    && let Err(error) = cache.put(&key, &code.image)
                {
                    tracing::warn!(%error, "a kernel is not cached");
                }
                tracing::debug!(log = code.log, "assembled");
                // SAFETY: the driver's assembler made it a line above.
                Ok((unsafe { Module::load(&self.context, &code.image)? }, code.log))
            }
            // A driver whose linker refuses what its loader takes: no code to cache then.
            Err(error @ CudaError::Assemble { .. }) => match link::load(&self.context, gpu, name, text, arch) {
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
        let (shared, limit) = (gpu.shared_bytes + u64::from(info.static_shared_bytes), self.gpu.shared_bytes);
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

#[cfg(test)]
mod tests {
    use super::*;
    use einfall_ir::artifact::GpuLaunch;
    use einfall_ir::cascade::Size;

    fn launch(symbol: &str, variant_of: Option<&str>) -> Launch {
        let gpu = GpuLaunch {
            threads: 128,
            cluster: vec![],
            shared_bytes: 0,
            cooperative: false,
            dependent: false,
            counters: vec![],
            maps: vec![],
            variant_of: variant_of.map(str::to_owned),
            assumes: vec![],
        };
        let none = Size::Const(0);
        Launch {
            symbol: symbol.into(),
            slots: vec![],
            grid: vec![],
            ordered: false,
            scratch_bytes: none.clone(),
            reads: vec![],
            writes: vec![],
            flops: none.clone(),
            bytes: none,
            gpu: Some(gpu),
        }
    }

    #[test]
    fn variants_are_parts_of_their_own() {
        let text = ".version 8.0\n.target sm_90a\n.extern .shared smem;\n\n.visible .entry a(\n)\n{ 1 }\n\n.visible .entry \
                    b_0(\n)\n{ 2 }\n\n.visible .entry b_1(\n)\n{ 3 }\n\n.visible .entry c()\n{ 4 }";
        let launches = [launch("a", None), launch("b_0", Some("b")), launch("b_1", Some("b")), launch("c", None)];
        let (texts, part_of) = parts(text, &launches);
        assert_eq!(part_of, [0, 1, 2, 0]);
        assert!(texts.iter().all(|t| t.starts_with(".version 8.0\n.target sm_90a\n.extern .shared smem;\n")));
        let holds = |i: usize| (1..=4).filter(|k| texts[i].contains(&format!("{{ {k} }}"))).collect::<Vec<_>>();
        assert_eq!([holds(0), holds(1), holds(2)], [vec![1, 4], vec![2], vec![3]]);
        // A launch without its kernel: the text stays whole, and the driver says what is missing.
        assert_eq!(parts(text, &[launch("z", Some("b"))]), (vec![text.to_owned()], vec![0]));
        assert_eq!(parts(text, &launches[..1]).0, [text]);
    }
}
