//! From a cascade to kernels, without any device: what engines and ahead-of-time compilation share.
//!
//! Invariant: nothing here loads or runs code.

#[cfg(any(feature = "build", feature = "cpu", feature = "shaders"))]
use einfall_autotune::{
    table::{Table, fingerprint},
    tune,
};
use einfall_codegen::backend::{ptx, wgsl};
use einfall_codegen::lower::gpu::split_streams::merge_name;
use einfall_codegen::pipeline::{self, Context, Program, Stop};
use einfall_codegen::tables;
use einfall_ir::analysis::resources::Limits;
use einfall_ir::artifact::Artifact;
use einfall_ir::cascade::Cascade;
use einfall_ir::cascade::bind::BindError;
use einfall_ir::diag::{Diagnostic, Span};
use einfall_ir::kernel::atoms;
use einfall_ir::mapping::{self, KernelMapping, Mapping};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;

/// Why a cascade is not compiled, bound or launched.
///
/// ```
/// use einfall::{Engine, Error, Options};
///
/// let text = "cascade blocks[M](w: i8[M] scaled(f32, 32)) -> (y: f32[M]) { y[m] = f32(w[m]) }";
/// let c = einfall::ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
/// match Engine::new(&Options::default())?.compile(&c) {
///     Err(Error::Refused { diagnostics, .. }) => {
///         println!("{}", einfall::ir::diag::render(&diagnostics, "blocks.ein", text));
///     }
///     other => panic!("block-scaled storage is not compiled yet: {other:?}"),
/// }
/// # Ok::<(), Error>(())
/// ```
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
    /// A variable of the environment with a value that does not fit.
    Environment(String),
    /// NVIDIA's assembler, which machine code ahead of time is made by, does not take the PTX.
    Assembler(String),
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
            Error::Size(what) | Error::Table(what) | Error::Environment(what) | Error::Assembler(what) => {
                f.write_str(what)
            }
            Error::Runtime(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Runtime(e) => Some(e),
            Error::Bind(e) => Some(e),
            Error::Refused { .. }
            | Error::Internal(_)
            | Error::Size(_)
            | Error::Table(_)
            | Error::Environment(_)
            | Error::Assembler(_) => None,
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

/// What a compilation may be told besides the cascade.
///
/// ```
/// use einfall::CompileOptions;
///
/// // Fixed to 64 columns, which is compiled in; fast for 4,096 rows, and right for any number.
/// let options = CompileOptions {
///     statics: vec![("N".to_owned(), 64)],
///     sizes: vec![("M".to_owned(), 4096)],
///     ..CompileOptions::default()
/// };
/// assert!(options.mapping.is_none());
/// ```
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

#[cfg(any(feature = "build", feature = "cpu", feature = "shaders"))]
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

/// Whether a mapping is for a plan: every name it uses exists there, or in a kernel that one of its splits makes.
///
/// ```
/// # let text = "cascade scale[M, N](x: f32[M, N], k: f32 = 2.0) -> (y: f32[M, N]) { y[m,n] = k * x[m,n] }";
/// # let c = einfall::ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
/// let plan = einfall::plan(&c)?;
/// let mapping = |kernel: &str| {
///     let text = format!("mapping scale on cpu {{\n    kernel {kernel} {{\n        axis m block 4\n    }}\n}}\n");
///     einfall::ir::mapping::parse::parse(&text).expect("it parses")
/// };
/// assert!(einfall::fits(&mapping("scale_0"), &plan).is_ok());
/// assert!(einfall::fits(&mapping("other"), &plan).is_err_and(|why| why.contains("the kernels are scale_0")));
/// # Ok::<(), einfall::Error>(())
/// ```
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
/// ```
/// # let text = "cascade scale[M, N](x: f32[M, N], k: f32 = 2.0) -> (y: f32[M, N]) { y[m,n] = k * x[m,n] }";
/// # let c = einfall::ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
/// let fixed = einfall::with_statics(&c, &[("N".to_owned(), 64)])?;
/// assert!(einfall::with_statics(&fixed, &[("N".to_owned(), 65)]).is_err());
/// assert!(einfall::with_statics(&c, &[("Q".to_owned(), 1)]).is_err());
/// # Ok::<(), einfall::Error>(())
/// ```
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
/// ```
/// # let text = "cascade scale[M, N](x: f32[M, N], k: f32 = 2.0) -> (y: f32[M, N]) { y[m,n] = k * x[m,n] }";
/// # let c = einfall::ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
/// let plan = einfall::plan(&c)?;
/// assert_eq!(plan.kernels.len(), 1);
/// println!("{plan}"); // the text that `einfall lower --stop-after round-operands` prints
/// # Ok::<(), einfall::Error>(())
/// ```
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
            pass.apply(program, context).map_err(|diagnostics| Error::Refused { pass: pass.name, diagnostics })?;
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
            pass.apply(program, context).map_err(|diagnostics| Error::Refused { pass: pass.name, diagnostics })?;
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
/// ```
/// use einfall::codegen::pipeline::{Context, Program};
/// use einfall::codegen::tables::TO_TILE;
///
/// # let text = "cascade scale[M, N](x: f32[M, N], k: f32 = 2.0) -> (y: f32[M, N]) { y[m,n] = k * x[m,n] }";
/// # let c = einfall::ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
/// let records = einfall::trace(TO_TILE, Program::Cascade(c), &Context::default(), Some("form-kernels"))
///     .map_err(|(_, stop)| stop)?;
/// let changed = records.iter().filter(|r| !r.unchanged).map(|r| r.name).collect::<Vec<_>>();
/// assert_eq!(changed, ["form-kernels"]);
/// # Ok::<(), einfall::codegen::pipeline::Stop>(())
/// ```
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

/// The plan of a cascade for a GPU, before any mapping: operands of contractions are of types its instructions take.
///
/// # Errors
/// [`Error::Refused`] where something has no lowering.
pub fn gpu_plan(cascade: &Cascade) -> Result<Plan, Error> {
    plan_for(cascade, &Context { atoms: atoms::all().collect(), ..Context::default() })
}

/// Why a kernel of the plan has no mapping on a device: the constraints that cannot hold together, and the smallest
/// change that makes one fit. None where every kernel has one. `sizes`: one value per rank of the plan.
pub fn unmapped(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>) -> Option<Diagnostic> {
    let obstacle = einfall_autotune::model_gpu::obstacle(plan, sheet, sizes)?;
    let why = Diagnostic::error("G0102", Span::default(), obstacle.to_string());
    Some(why.help(obstacle.change.unwrap_or_else(|| {
        "the model has no structure for it: give a mapping (--mapping), or rewrite it with supported constructs"
            .to_owned()
    })))
}

/// The PTX of a plan by a mapping, with how to launch it. Needs no device and no LLVM.
///
/// ```
/// use einfall::autotune::model_gpu;
/// use einfall::codegen::backend::ptx;
/// use einfall::ir::{artifact::Code, target::DataSheet};
///
/// # let text = "cascade scale[M, N](x: f32[M, N], k: f32 = 2.0) -> (y: f32[M, N]) { y[m,n] = k * x[m,n] }";
/// # let c = einfall::ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
/// let plan = einfall::gpu_plan(&c)?;
/// let mapping = model_gpu::choose(&plan, &DataSheet::h100(), None);
/// let artifact = einfall::compile_ptx(&plan, &mapping, &ptx::Target::sm_90a())?;
/// assert!(matches!(&artifact.code, Code::Ptx { text, .. } if text.contains(".target sm_90a")));
/// # Ok::<(), einfall::Error>(())
/// ```
///
/// # Errors
/// [`Error::Refused`] where the mapping does not fit or something has no PTX.
pub fn compile_ptx(plan: &Plan, mapping: &Mapping, target: &ptx::Target) -> Result<Artifact, Error> {
    let context = Context { mapping: Some(mapping.clone()), atoms: atoms::all().collect(), ..Context::default() };
    let (mapped, module) = lower(tables::GPU, plan, &context)?;
    ptx::print(&mapped, &module, target)
        .map_err(|e| Error::Refused { pass: "print-ptx", diagnostics: vec![e.diagnostic()] })
}

/// The plan of a cascade for an adapter of WebGPU, before any mapping: kernels have no more arrays than it binds, where
/// packing some of them achieves that.
///
/// # Errors
/// [`Error::Refused`] where something has no lowering.
pub fn wgsl_plan(cascade: &Cascade, target: &wgsl::Target) -> Result<Plan, Error> {
    let arrays = usize::try_from(target.storage_buffers).ok();
    plan_for(cascade, &Context { atoms: target.atoms(), arrays, ..Context::default() })
}

/// The WGSL of a plan by a mapping, with how to launch it. Needs no device and no LLVM.
///
/// # Errors
/// [`Error::Refused`] where the mapping does not fit, something has no WGSL or a limit of the target is exceeded.
pub fn compile_wgsl(plan: &Plan, mapping: &Mapping, target: &wgsl::Target) -> Result<Artifact, Error> {
    let atoms = target.atoms();
    // An adapter's own limits, which the sheet of its kind need not have.
    let limits = DataSheet::named(&mapping.target).and_then(|s| s.gpu).map(|g| Limits {
        shared_bytes: target.workgroup_bytes,
        threads: target.invocations,
        ..Limits::of(&g)
    });
    let context = Context { mapping: Some(mapping.clone()), atoms, limits, ..Context::default() };
    let (mapped, module) = lower(tables::GPU, plan, &context)?;
    wgsl::print(&mapped, &module, target)
        .map_err(|e| Error::Refused { pass: "print-wgsl", diagnostics: vec![e.diagnostic()] })
}

/// What the printer for processors refuses.
#[cfg(any(feature = "build", feature = "cpu"))]
pub(crate) fn unprintable(e: impl std::fmt::Display) -> Error {
    Error::Refused {
        pass: "print-llvm",
        diagnostics: vec![Diagnostic::error("E0901", Default::default(), e.to_string())],
    }
}
