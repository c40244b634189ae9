//! From a cascade to results: compile, bind sizes, launch.

use std::sync::Arc;

use einfall_autotune::table::{Kind, Table, fingerprint};
use einfall_autotune::tune;
use einfall_codegen::backend::llvm::{self, Isa};
use einfall_codegen::lower::gpu::split_streams::merge_name;
use einfall_codegen::pipeline::{self, Context, Program, Stop};
use einfall_codegen::tables;
use einfall_ir::array::Array;
use einfall_ir::cascade::Cascade;
use einfall_ir::cascade::bind::{BindError, Bindings, Given, bind, check_facts, scalar_value};
use einfall_ir::diag::Diagnostic;
use einfall_ir::mapping::{self, KernelMapping, Mapping};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;
use einfall_runtime::{Arguments, Cpu, Executable};

use crate::options::{Options, joined};
use crate::plans::{Compiled, Surroundings};

/// Why a cascade is not compiled, bound or launched.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// Something has no lowering, or the mapping does not fit: places in the cascade's source and what to do.
    Refused {
        /// The pass that refuses.
        pass: &'static str,
        /// What it says.
        diagnostics: Vec<Diagnostic>,
    },
    /// A fault of the compiler itself.
    Internal(String),
    /// Sizes or facts that do not fit.
    Bind(BindError),
    /// A size given for a rank that is not there, or twice with different values.
    Size(String),
    /// A table of mappings that cannot be read, with its source.
    Table(String),
    /// LLVM, arrays, threads.
    Runtime(einfall_runtime::Error),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::Refused { pass, diagnostics } => {
                write!(f, "{pass}:")?;
                diagnostics.iter().try_for_each(|d| write!(f, " {d}"))
            }
            Error::Internal(what) => write!(f, "a fault of the compiler: {what}"),
            Error::Bind(e) => e.fmt(f),
            Error::Size(what) | Error::Table(what) => f.write_str(what),
            Error::Runtime(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Runtime(e) => Some(e),
            Error::Refused { .. } | Error::Internal(_) | Error::Bind(_) | Error::Size(_) | Error::Table(_) => None,
        }
    }
}

impl From<einfall_runtime::Error> for Error {
    fn from(e: einfall_runtime::Error) -> Error {
        Error::Runtime(e)
    }
}

impl From<BindError> for Error {
    fn from(e: BindError) -> Error {
        Error::Bind(e)
    }
}

impl From<Stop> for Error {
    fn from(stop: Stop) -> Error {
        match stop {
            Stop::Refused { pass, diagnostics } => Error::Refused { pass, diagnostics },
            other => Error::Internal(other.to_string()),
        }
    }
}

/// Compiles cascades for this machine's processor and runs them on its threads. Shared by many threads.
#[derive(Debug)]
pub struct Engine {
    runtime: einfall_runtime::Engine,
    sheet: DataSheet,
    table: Table,
    isa: Isa,
    surroundings: Surroundings,
}

/// What [`Engine::compile_with`] may be told besides the cascade.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CompileOptions {
    /// Extents fixed at compile time, by rank name; others stay symbolic.
    pub statics: Vec<(String, u64)>,
    /// The mapping; none: a table's for the nearest class of sizes, else the model's.
    pub mapping: Option<Mapping>,
    /// Sizes to be fast at, by rank name; the code serves every size all the same. Fixed extents count without being
    /// given; ranks that a cascade lacks are passed over.
    pub sizes: Vec<(String, u64)>,
}

impl CompileOptions {
    /// The mapping for a plan: the one given, else `table`'s for the sizes, else what `model` chooses.
    pub(crate) fn choose(&self, plan: &Plan, table: &Table, model: impl FnOnce(Option<&[u64]>) -> Mapping) -> Mapping {
        if let Some(mapping) = &self.mapping {
            return mapping.clone();
        }
        let given = |name: &str| self.sizes.iter().find(|(n, _)| n == name).map(|(_, v)| *v);
        let known = plan.ranks.iter().map(|(_, r)| (r.name.clone(), r.fixed.or_else(|| given(&r.name))));
        let known: Vec<(String, Option<u64>)> = known.collect();
        let sizes: Vec<(String, u64)> = known.iter().filter_map(|(n, v)| Some((n.clone(), (*v)?))).collect();
        let whole: Option<Vec<u64>> = known.iter().map(|(_, v)| *v).collect();
        let chosen = model(whole.as_deref());
        let measured = table.lookup(&fingerprint(plan), &sizes).and_then(|e| {
            let mapping = e.read().ok()?;
            fits(&mapping, plan).is_ok().then_some(mapping)
        });
        match measured {
            None => chosen,
            Some(mapping) => tune::beside(mapping, chosen),
        }
    }
}

impl Engine {
    /// Finds LLVM, opens the cache, starts the threads, reads the tables.
    ///
    /// # Errors
    /// [`Error::Runtime`] where there is no LLVM or no threads, [`Error::Table`] for a table that is refused.
    pub fn new(options: &Options) -> Result<Engine, Error> {
        let runtime = einfall_runtime::Engine::new(&options.engine())?;
        let host = runtime.host();
        let cpu = Cpu::detect();
        let mut isa = Isa::of(&host.triple, &host.features);
        for (level, bytes) in [(1, &mut isa.l1_bytes), (2, &mut isa.l2_bytes)] {
            if cpu.cache_bytes(level) > 0 {
                *bytes = cpu.cache_bytes(level);
            }
        }
        let table = joined(&options.tables, Kind::Cpu, &cpu.name)?;
        let sheet = cpu.data_sheet();
        let surroundings = Surroundings::new(&["cpu", &format!("{sheet:?}"), &format!("{isa:?}"), &table.to_string()]);
        Ok(Engine { sheet, table, isa, runtime, surroundings })
    }

    /// The run time underneath.
    pub fn runtime(&self) -> &einfall_runtime::Engine {
        &self.runtime
    }

    /// The data sheet of this machine's processor.
    pub fn data_sheet(&self) -> &DataSheet {
        &self.sheet
    }

    /// Compiles a cascade for every size.
    ///
    /// # Errors
    /// [`Error::Refused`] where something has no lowering, [`Error::Runtime`] where LLVM refuses.
    pub fn compile(&self, cascade: &Cascade) -> Result<Kernel, Error> {
        self.compile_with(cascade, &CompileOptions::default())
    }

    /// As [`Engine::compile`], with extents fixed or a mapping given.
    ///
    /// # Errors
    /// As [`Engine::compile`]; [`Error::Size`] for a rank that is not there.
    pub fn compile_with(&self, cascade: &Cascade, options: &CompileOptions) -> Result<Kernel, Error> {
        let cascade = with_statics(cascade, &options.statics)?;
        // SAFETY: the artifact was made by code generation, now or before it went into the cache.
        let load = |artifact| Ok(unsafe { self.runtime.load(artifact)? });
        let make = || self.lowered(&cascade, options);
        let cache = self.runtime.cache();
        let (plan, mapping, executable) = self.surroundings.compile(cache, &cascade, options, make, load)?;
        Ok(Kernel { cascade, plan, mapping, executable })
    }

    /// The LLVM IR of a cascade whose fixed extents are set.
    fn lowered(&self, cascade: &Cascade, options: &CompileOptions) -> Result<Compiled, Error> {
        let plan = plan(cascade)?;
        let model = |_: Option<&[u64]>| einfall_autotune::model_cpu::choose(&plan, &self.sheet);
        let mapping = options.choose(&plan, &self.table, model);
        let context = Context { mapping: Some(mapping.clone()), ..self.context(None) };
        let (mapped, module) = lower(tables::CPU, &plan, &context)?;
        let artifact = llvm::print(&mapped, &module, &self.isa, "cpu").map_err(|e| Error::Refused {
            pass: "print-llvm",
            diagnostics: vec![Diagnostic::error("E0901", Default::default(), e.to_string())],
        })?;
        Ok(Compiled { plan: mapped, mapping, artifact })
    }

    /// The context passes run in for this processor.
    pub fn context(&self, mapping: Option<Mapping>) -> Context {
        Context { mapping, isa: Some(self.isa), ..Context::default() }
    }
}

/// Whether a mapping is for a plan: every name it uses exists there, or in a kernel that one of its splits makes.
///
/// # Errors
/// What does not fit, in one line.
pub fn fits(mapping: &Mapping, plan: &Plan) -> Result<(), String> {
    let split = |m: &&KernelMapping| m.split.is_some();
    let merges: Vec<String> = mapping.kernels.iter().filter(split).map(|m| merge_name(&m.kernel)).collect();
    // Staging tiles of stores are the lowering's, which names them after their arrays.
    let staging: Vec<String> = plan.buffers.iter().map(|(_, b)| format!("{}_out", b.name)).collect();
    let mut own: Vec<KernelMapping> = mapping.kernels.iter().filter(|m| !merges.contains(&m.kernel)).cloned().collect();
    for m in &mut own {
        let tile = |name: &str| {
            let kernel = plan.kernels.iter().find(|k| k.name == m.kernel);
            kernel.is_some_and(|k| k.tiles.iter().any(|(_, t)| t.name == name))
        };
        let kept = m.tiles.iter().filter(|t| tile(&t.tile) || !staging.contains(&t.tile)).cloned().collect();
        m.tiles = kept;
    }
    let own = Mapping { kernels: own, ..mapping.clone() };
    mapping::verify::verify(&own, plan).map_err(|list| {
        let line = |d: &Diagnostic| match &d.help {
            Some(help) => format!("{} ({help})", d.message),
            None => d.message.clone(),
        };
        list.iter().map(line).collect::<Vec<_>>().join("; ")
    })
}

/// A cascade with some extents fixed.
///
/// # Errors
/// [`Error::Size`] for a rank that is not there or is fixed otherwise.
pub fn with_statics(cascade: &Cascade, statics: &[(String, u64)]) -> Result<Cascade, Error> {
    let mut cascade = cascade.clone();
    for (name, extent) in statics {
        let Some(rank) = cascade.rank(name) else {
            let ranks: Vec<&str> = cascade.ranks.iter().map(|(_, r)| r.name.as_str()).collect();
            return Err(Error::Size(format!("there is no rank `{name}`; the ranks are {}", ranks.join(", "))));
        };
        let fixed = &mut cascade.ranks[rank].fixed;
        match *fixed {
            Some(n) if n != *extent => {
                return Err(Error::Size(format!("rank `{name}` is {n} in the text, not {extent}")));
            }
            Some(_) | None => *fixed = Some(*extent),
        }
    }
    Ok(cascade)
}

/// The plan of a cascade, before any mapping.
///
/// # Errors
/// [`Error::Refused`] where something has no lowering.
pub fn plan(cascade: &Cascade) -> Result<Plan, Error> {
    plan_for(cascade, &Context::default())
}

/// The plan of a cascade for a device whose contraction instructions the context names.
///
/// # Errors
/// [`Error::Refused`] where something has no lowering.
pub fn plan_for(cascade: &Cascade, context: &Context) -> Result<Plan, Error> {
    let mut program = Program::Cascade(cascade.clone());
    for pass in tables::TO_TILE {
        program =
            (pass.step)(program, context).map_err(|diagnostics| Error::Refused { pass: pass.name, diagnostics })?;
    }
    match program {
        Program::Tile(plan) => Ok(plan),
        Program::Cascade(_) | Program::Kernel(_) => Err(Error::Internal("no plan was made".to_owned())),
    }
}

/// Runs the passes of a device on a plan: the plan as mapped, and its kernels.
pub(crate) fn lower(
    passes: &[pipeline::Pass],
    plan: &Plan,
    context: &Context,
) -> Result<(Plan, einfall_ir::kernel::Module), Error> {
    let mut program = Program::Tile(plan.clone());
    let mut mapped = plan.clone();
    for pass in passes {
        program =
            (pass.step)(program, context).map_err(|diagnostics| Error::Refused { pass: pass.name, diagnostics })?;
        if let Program::Tile(plan) = &program {
            mapped = plan.clone();
        }
    }
    match program {
        Program::Kernel(module) => Ok((mapped, module)),
        Program::Cascade(_) | Program::Tile(_) => Err(Error::Internal("no kernels were made".to_owned())),
    }
}

/// Runs a table of passes with records, for `--stop-after`, traces and bisection.
///
/// # Errors
/// See [`Stop`]; the records up to there come along.
#[allow(clippy::result_large_err)]
pub fn trace(
    passes: &[pipeline::Pass],
    program: Program,
    context: &Context,
    stop_after: Option<&str>,
) -> Result<Vec<pipeline::Record>, (Vec<pipeline::Record>, Stop)> {
    pipeline::run(passes, tables::FORMS, program, context, stop_after)
}

/// A compiled cascade: serves every size of its symbolic ranks.
#[derive(Clone, Debug)]
pub struct Kernel {
    cascade: Cascade,
    plan: Plan,
    mapping: Mapping,
    executable: Arc<Executable>,
}

impl Kernel {
    /// The cascade compiled.
    pub fn cascade(&self) -> &Cascade {
        &self.cascade
    }

    /// Its kernels over tiles, as mapped.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How it is mapped.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The linked code.
    pub fn executable(&self) -> &Arc<Executable> {
        &self.executable
    }

    /// Fixes the sizes by rank name; fixed ranks need not be given. Facts over ranks are checked.
    ///
    /// # Errors
    /// [`Error::Bind`] for sizes that do not fit or facts that do not hold, [`Error::Runtime`].
    pub fn bind<S: AsRef<str>>(&self, sizes: &[(S, u64)]) -> Result<Bound, Error> {
        let given =
            Given { sizes: sizes.iter().map(|(n, v)| (n.as_ref().to_owned(), *v)).collect(), ..Given::default() };
        let bindings = bind(&self.cascade, &given)?;
        check_facts(&self.cascade, &bindings, &[])?;
        self.bound(bindings)
    }

    /// Fixes the sizes by the shapes of arrays given by name.
    ///
    /// # Errors
    /// As [`Kernel::bind`].
    pub fn bind_shapes(&self, shapes: &[(&str, &[u64])]) -> Result<Bound, Error> {
        let mut given = Given::default();
        for (name, shape) in shapes {
            if let Some(t) = self.cascade.params.iter().find(|t| self.cascade.tensors[**t].name == *name) {
                given.shapes.push((*t, shape.to_vec()));
            }
        }
        let bindings = bind(&self.cascade, &given)?;
        check_facts(&self.cascade, &bindings, &[])?;
        self.bound(bindings)
    }

    fn bound(&self, bindings: Bindings) -> Result<Bound, Error> {
        let c = &self.cascade;
        let sizes: Vec<(&str, u64)> =
            c.ranks.iter().zip(&bindings.extents).map(|((_, r), n)| (r.name.as_str(), *n)).collect();
        let runtime = self.executable.bind(&sizes)?;
        let defaults = defaults(c, &bindings)?;
        Ok(Bound { runtime, cascade: self.cascade.clone(), bindings, defaults })
    }
}

/// Values of the scalar parameters that have a default.
pub(crate) fn defaults(c: &Cascade, bindings: &Bindings) -> Result<Vec<(String, f64)>, Error> {
    let mut list = Vec::new();
    for &p in &c.params {
        if let Some(e) = c.tensors[p].default {
            list.push((c.tensors[p].name.clone(), scalar_value(c, bindings, &[], e)?));
        }
    }
    Ok(list)
}

/// A compiled cascade at fixed sizes. Many threads may launch it at once.
#[derive(Debug)]
pub struct Bound {
    runtime: einfall_runtime::Bound,
    /// For the facts over scalars, which code relies on.
    cascade: Cascade,
    bindings: Bindings,
    /// Scalars the caller need not give.
    defaults: Vec<(String, f64)>,
}

impl Bound {
    /// The run time's view: array specifications, kernels, workspace.
    pub fn runtime(&self) -> &einfall_runtime::Bound {
        &self.runtime
    }

    /// The extent of every rank.
    pub fn bindings(&self) -> &Bindings {
        &self.bindings
    }

    /// Runs every kernel on the caller's arrays and returns the time of each. Scalars with a default may be left out.
    ///
    /// # Errors
    /// [`Error::Bind`] where a scalar breaks a fact, [`Error::Runtime`]; before anything is written.
    pub fn launch<'a>(&'a self, mut arguments: Arguments<'a>) -> Result<Vec<std::time::Duration>, Error> {
        for (name, value) in &self.defaults {
            if !arguments.gives(name) {
                arguments = arguments.scalar(name, *value);
            }
        }
        let c = &self.cascade;
        let tensor = |name: &str| c.params.iter().copied().find(|t| c.tensors[*t].name == name);
        let scalars: Vec<_> = arguments.scalars().iter().filter_map(|(n, v)| Some((tensor(n)?, *v))).collect();
        check_facts(c, &self.bindings, &scalars)?;
        Ok(self.runtime.launch(arguments)?)
    }

    /// Runs on evaluator arrays, one per parameter in order, and returns the outputs: for tests and small data.
    ///
    /// # Errors
    /// [`Error::Runtime`].
    pub fn run_values(
        &self,
        cascade: &Cascade,
        inputs: &[Array],
    ) -> Result<Vec<(String, einfall_runtime::HostArray)>, Error> {
        let runtime = |e: einfall_runtime::ArrayError| Error::Runtime(e.into());
        let mut arrays = Vec::new();
        let mut scalars = Vec::new();
        for (&p, a) in cascade.params.iter().zip(inputs) {
            let name = cascade.tensors[p].name.as_str();
            match a.dims.is_empty() {
                true => scalars.push((name, a.data[0])),
                false => arrays.push((name, einfall_runtime::HostArray::from_values(a).map_err(runtime)?)),
            }
        }
        let arrays: Vec<(&str, &einfall_runtime::HostArray)> = arrays.iter().map(|(n, a)| (*n, a)).collect();
        Ok(self.runtime.run_to_arrays(&arrays, &scalars)?)
    }
}
