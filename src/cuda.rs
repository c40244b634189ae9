//! From a cascade, or a plan with a mapping, to results on an NVIDIA GPU.
//!
//! [`Engine`] mirrors the processor's: compile once for every size, bind sizes, launch. Invariant: nothing here needs
//! LLVM, and [`compile_ptx`] needs no device either; a device is only asked to load and run.

use einfall_autotune::table::{Kind, Table};
use einfall_autotune::{model_gpu, tune};
use einfall_codegen::backend::ptx;
use einfall_ir::array::Array;
use einfall_ir::cascade::Cascade;
use einfall_ir::dtype::DType;
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{BufferKind, Plan};
use einfall_runtime::HostArray;
use einfall_runtime::cuda::{Arguments, Gpu, Modules, Prepared, Stream};

use crate::device;
use crate::engine::split;
use crate::lowering::{CompileOptions, Error, with_statics};
pub use crate::lowering::{compile_ptx, gpu_plan as plan, unmapped};
use crate::options::{Options, joined};
use crate::plans::{Compiled, Surroundings};

/// Compiles cascades and plans for one GPU and runs them there. Shared by many threads.
///
/// ```no_run
/// use einfall::Options;
/// use einfall::runtime::HostArray;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let text = "cascade scale[M, N](x: f32[M, N], k: f32 = 2.0) -> (y: f32[M, N]) { y[m,n] = k * x[m,n] }";
/// # let c = einfall::ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
/// let engine = einfall::cuda::Engine::new(&Options::from_env()?, 0)?;
/// let kernel = engine.compile(&c)?;
/// let x = HostArray::from_slice(&[1f32, 2., 3.], &[1, 3])?.to_values()?;
/// let k = einfall::ir::array::Array::scalar(einfall::ir::dtype::DType::F32, 5.0);
/// let stream = engine.runtime().stream()?;
/// let outputs = kernel.bind(&[("M", 1), ("N", 3)])?.run_values(&stream, &[("x", &x), ("k", &k)])?;
/// println!("{:?}", outputs[0].1.as_slice::<f32>());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Engine {
    runtime: einfall_runtime::cuda::Engine,
    sheet: DataSheet,
    table: Table,
    surroundings: Surroundings,
}

impl Engine {
    /// Opens device number `index` and the cache. LLVM is not asked for.
    ///
    /// # Errors
    /// [`Error::Runtime`] where there is no driver, an older one, or no such device, in one sentence; [`Error::Table`] for
    /// a table that is refused.
    pub fn new(options: &Options, index: usize) -> Result<Engine, Error> {
        let tables = options;
        let options = einfall_runtime::cuda::EngineOptions { index, cache: options.cache.clone() };
        let runtime = einfall_runtime::cuda::Engine::new(&options)?;
        let sheet = data_sheet(runtime.gpu());
        let table = joined(&tables.tables, Kind::Cuda, &runtime.gpu().name)?;
        let gpu = runtime.gpu();
        let device = format!("{} {:?} {:?}", gpu.name, gpu.capability, target(gpu));
        let surroundings = Surroundings::new(&["cuda", &device, &format!("{sheet:?}"), &table.to_string()]);
        Ok(Engine { runtime, sheet, table, surroundings })
    }

    /// The run time underneath: streams, events, arrays in device memory.
    pub fn runtime(&self) -> &einfall_runtime::cuda::Engine {
        &self.runtime
    }

    /// The data sheet of the device: the nearest built-in one, with what the device says of itself.
    pub fn data_sheet(&self) -> &DataSheet {
        &self.sheet
    }

    /// Compiles a cascade for every size.
    ///
    /// # Errors
    /// [`Error::Refused`] where something has no lowering, [`Error::Runtime`] where the driver refuses.
    pub fn compile(&self, cascade: &Cascade) -> Result<Kernel, Error> {
        self.compile_with(cascade, &CompileOptions::default())
    }

    /// As [`Engine::compile`], with extents fixed or a mapping given; without one the model's for this device.
    ///
    /// # Errors
    /// As [`Engine::compile`], and [`Error::Size`] for a rank that is not there or is fixed otherwise.
    pub fn compile_with(&self, cascade: &Cascade, options: &CompileOptions) -> Result<Kernel, Error> {
        let cascade = with_statics(cascade, &options.statics)?;
        // SAFETY: the artifact was made by code generation, now or before it went into the cache.
        let load = |artifact| Ok(unsafe { self.runtime.load(artifact)? });
        let make = || {
            let made = self.lowered(&cascade, options)?;
            let executable = load(made.artifact.clone())?;
            Ok((made, executable))
        };
        let cache = self.runtime.cache();
        let (plan, mapping, executable) = self.surroundings.compile(cache, &cascade, options, make, load)?;
        Ok(Kernel { cascade: Some(cascade), plan, mapping, executable })
    }

    /// The PTX of a cascade whose fixed extents are set.
    fn lowered(&self, cascade: &Cascade, options: &CompileOptions) -> Result<Compiled, Error> {
        let plan = plan(cascade)?;
        // Chosen for these sizes, and for every other size beside it.
        let model = |sizes: Option<&[u64]>| {
            let any = model_gpu::choose(&plan, &self.sheet, None);
            match sizes.filter(|_| !options.sizes.is_empty()) {
                Some(sizes) => tune::beside(model_gpu::choose(&plan, &self.sheet, Some(sizes)), any),
                None => any,
            }
        };
        let mapping = options.choose(&plan, &self.table, model);
        let mut made = compile_ptx(&plan, &mapping, &target_of(&mapping, self.runtime.gpu()));
        if let (Err(Error::Refused { diagnostics, .. }), None) = (&mut made, &options.mapping)
            && let Some(why) = unmapped(&plan, &self.sheet, None)
        {
            *diagnostics = vec![why];
        }
        Ok(Compiled { artifact: made?, plan, mapping })
    }

    /// Compiles a plan by a mapping.
    ///
    /// # Errors
    /// As [`Engine::compile`].
    pub fn compile_plan(&self, plan: &Plan, mapping: &Mapping) -> Result<Kernel, Error> {
        let artifact = compile_ptx(plan, mapping, &target_of(mapping, self.runtime.gpu()))?;
        // SAFETY: the artifact was made by code generation a line above.
        let executable = unsafe { self.runtime.load(artifact)? };
        Ok(Kernel { cascade: None, plan: plan.clone(), mapping: mapping.clone(), executable })
    }
}

/// What is printed for a device: Hopper's own instructions where it is one, else what every GPU since Ampere has.
pub fn target(gpu: &Gpu) -> ptx::Target {
    let target = if gpu.capability == (9, 0) { ptx::Target::sm_90a() } else { ptx::Target::sm_80() };
    ptx::Target { registers: u64::from(gpu.registers), ..target }
}

/// What is printed for a mapping on a device: a mapping for an older device keeps to what that has.
pub fn target_of(mapping: &Mapping, gpu: &Gpu) -> ptx::Target {
    let own = target(gpu);
    let capability = 10 * gpu.capability.0 + gpu.capability.1;
    let older = DataSheet::named(&mapping.target)
        .filter(|s| s.webgpu.is_none() && s.gpu.as_ref().is_some_and(|g| g.capability < capability))
        .and_then(|s| ptx::Target::of(&s));
    older.map_or(own.clone(), |t| ptx::Target { registers: own.registers, ..t })
}

/// The data sheet of a device: of the built-in sheets the one of its model, else the first of the nearest capability not
/// above its own, with the device's own capacities.
pub fn data_sheet(gpu: &Gpu) -> DataSheet {
    let capability = 10 * gpu.capability.0 + gpu.capability.1;
    let name = gpu.name.to_lowercase();
    let older = |s: &DataSheet| {
        s.gpu.as_ref().filter(|g| s.webgpu.is_none() && g.capability <= capability).map(|g| g.capability)
    };
    let sheets = DataSheet::all();
    let named = sheets.iter().find(|s| older(s).is_some() && name.contains(&s.name));
    let nearest = || sheets.iter().rev().filter(|s| older(s).is_some()).max_by_key(|s| older(s));
    let mut sheet = named.or_else(nearest).cloned().unwrap_or_else(DataSheet::a100);
    if let Some(g) = &mut sheet.gpu {
        g.multiprocessors = u64::from(gpu.sms);
        g.registers = u64::from(gpu.registers);
        g.shared_per_task = gpu.shared_bytes;
    }
    for level in &mut sheet.levels {
        match level.name.as_str() {
            "dram" => level.bytes = gpu.memory_bytes,
            "l2" => level.bytes = gpu.l2_bytes,
            _ => {}
        }
    }
    sheet
}

/// A cascade or plan compiled for a GPU.
pub type Kernel = device::Kernel<Modules>;

/// A compiled cascade or plan at fixed sizes.
pub type Bound = device::Bound<Modules>;

impl Bound {
    /// Checks arrays in device memory and makes everything their launches need. Scalars with a default may be left
    /// out.
    ///
    /// # Errors
    /// [`Error::Bind`] where a scalar breaks a fact, [`Error::Runtime`] for arrays that do not fit.
    pub fn prepare<'a>(&'a self, arguments: Arguments<'a>) -> Result<Prepared, Error> {
        Ok(self.runtime.prepare(&self.with_defaults(arguments)?)?)
    }

    /// Copies host arrays to the device, runs, and returns the outputs in order.
    ///
    /// # Errors
    /// [`Error::Bind`] where a scalar breaks a fact, [`Error::Runtime`].
    pub fn run_to_arrays(
        &self,
        stream: &Stream,
        inputs: &[(&str, &HostArray)],
        scalars: &[(&str, f64)],
    ) -> Result<Vec<(String, HostArray)>, Error> {
        let scalars = self.all_scalars(scalars)?;
        Ok(self.runtime.run_to_arrays(stream, inputs, &scalars)?)
    }

    /// Runs on evaluator arrays by parameter name and returns the outputs: for tests and small data.
    ///
    /// # Errors
    /// [`Error::Bind`] where a scalar breaks a fact, [`Error::Runtime`].
    pub fn run_values(&self, stream: &Stream, inputs: &[(&str, &Array)]) -> Result<Vec<(String, HostArray)>, Error> {
        let (arrays, scalars) = split(inputs)?;
        let arrays: Vec<(&str, &HostArray)> = arrays.iter().map(|(n, a)| (*n, a)).collect();
        self.run_to_arrays(stream, &arrays, &scalars)
    }
}

/// Inputs and inouts of a plan with their element types, in order: what [`einfall_ir::tile::eval::run`] takes.
pub fn plan_inputs(plan: &Plan) -> impl Iterator<Item = (&str, DType)> {
    let takes = |k: BufferKind| matches!(k, BufferKind::Input | BufferKind::InOut);
    plan.buffers.iter().filter(move |(_, b)| takes(b.kind)).map(|(_, b)| (b.name.as_str(), b.dtype))
}
