//! From a cascade to results on any GPU behind WebGPU.
//!
//! [`Engine`] mirrors the processor's: compile once for every size, bind sizes, launch. Invariant: [`compile_wgsl`]
//! needs no device and no LLVM; an adapter is only asked to load and run.

use einfall_autotune::model_gpu;
use einfall_autotune::table::{Kind, Table};
use einfall_codegen::backend::wgsl;
use einfall_ir::array::Array;
use einfall_ir::cascade::Cascade;
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;
use einfall_runtime::HostArray;
use einfall_runtime::wgpu::{Arguments, EngineOptions, Prepared, Shaders};

use crate::device;
use crate::engine::split;
use crate::lowering::{CompileOptions, Error, with_statics};

pub use crate::lowering::{compile_wgsl, wgsl_plan};
pub use crate::shaders::data_sheet;

/// Compiles cascades and plans for one adapter and runs them there. Shared by many threads.
#[derive(Clone, Debug)]
pub struct Engine {
    runtime: einfall_runtime::wgpu::Engine,
    sheet: DataSheet,
}

impl Engine {
    /// Opens the adapter whose name contains `name`; none: the only one, or the only one that is no processor.
    ///
    /// # Errors
    /// [`Error::Runtime`] where there is none or several, in one sentence.
    pub fn new(name: Option<&str>) -> Result<Engine, Error> {
        let runtime = einfall_runtime::wgpu::Engine::new(&EngineOptions { name: name.map(str::to_owned) })?;
        Ok(Engine { sheet: data_sheet(runtime.adapter()), runtime })
    }

    /// The run time underneath: the adapter, arrays in its memory.
    pub fn runtime(&self) -> &einfall_runtime::wgpu::Engine {
        &self.runtime
    }

    /// The data sheet of the adapter: the built-in one of its kind, with the adapter's own limits.
    pub fn data_sheet(&self) -> &DataSheet {
        &self.sheet
    }

    fn target(&self) -> wgsl::Target {
        wgsl::Target::of(&self.sheet).unwrap_or_else(wgsl::Target::generic)
    }

    /// Compiles a cascade for every size.
    ///
    /// # Errors
    /// [`Error::Refused`] where something has no lowering or no WGSL, [`Error::Runtime`].
    pub fn compile(&self, cascade: &Cascade) -> Result<Kernel, Error> {
        self.compile_with(cascade, &CompileOptions::default())
    }

    /// As [`Engine::compile`], with extents fixed or a mapping given; without one the model's for this adapter.
    ///
    /// # Errors
    /// As [`Engine::compile`], and [`Error::Size`] for a rank that is not there or is fixed otherwise.
    pub fn compile_with(&self, cascade: &Cascade, options: &CompileOptions) -> Result<Kernel, Error> {
        let cascade = with_statics(cascade, &options.statics)?;
        let plan = wgsl_plan(&cascade, &self.target())?;
        let none = Table::new(Kind::Cpu, &self.sheet.name);
        let mapping = options.choose(&plan, &none, |sizes| model_gpu::choose(&plan, &self.sheet, sizes));
        Ok(Kernel { cascade: Some(cascade), ..self.compile_plan(&plan, &mapping)? })
    }

    /// Compiles a plan by a mapping.
    ///
    /// # Errors
    /// As [`Engine::compile`].
    pub fn compile_plan(&self, plan: &Plan, mapping: &Mapping) -> Result<Kernel, Error> {
        let artifact = compile_wgsl(plan, mapping, &self.target())?;
        // SAFETY: the artifact was made by code generation a line above.
        let executable = unsafe { self.runtime.load(artifact)? };
        Ok(Kernel { cascade: None, plan: plan.clone(), mapping: mapping.clone(), executable })
    }
}

/// A cascade or plan compiled for an adapter.
pub type Kernel = device::Kernel<Shaders>;

/// A compiled cascade or plan at fixed sizes.
pub type Bound = device::Bound<Shaders>;

impl Bound {
    /// Checks arrays in the adapter's memory and makes everything their launches need. Scalars with a default may be
    /// left out.
    ///
    /// # Errors
    /// [`Error::Bind`] where a scalar breaks a fact, [`Error::Runtime`] for arrays that do not fit.
    pub fn prepare<'a>(&'a self, arguments: Arguments<'a>) -> Result<Prepared, Error> {
        Ok(self.runtime.prepare(&self.with_defaults(arguments)?)?)
    }

    /// Runs on evaluator arrays by parameter name and returns the outputs: for tests and small data.
    ///
    /// # Errors
    /// [`Error::Bind`] where a scalar breaks a fact, [`Error::Runtime`].
    pub fn run_values(&self, inputs: &[(&str, &Array)]) -> Result<Vec<(String, HostArray)>, Error> {
        let (arrays, scalars) = split(inputs)?;
        let arrays: Vec<(&str, &HostArray)> = arrays.iter().map(|(n, a)| (*n, a)).collect();
        Ok(self.runtime.run_to_arrays(&arrays, &self.all_scalars(&scalars)?)?)
    }
}
