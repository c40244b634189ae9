//! `passes`, `lower` and `bisect`: the pipeline, seen from outside.

use std::path::{Path, PathBuf};

use einfall::{Engine, Options, trace, with_statics};
use einfall_codegen::backend::{llvm::Isa, ptx, wgsl};
use einfall_codegen::pipeline::{self, Context, Program, Record, Stop, Verdict};
use einfall_codegen::tables;
use einfall_ir::analysis::resources::Limits;
use einfall_ir::array::Array;
use einfall_ir::artifact::Code;
use einfall_ir::cascade::bind::Given;
use einfall_ir::cascade::{Cascade, eval};
use einfall_ir::kernel::{Module, atoms};
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{self, Plan};
use einfall_ir::tolerance::inputs::{Variant, random};
use einfall_ir::tolerance::{Expected, expect};

use super::source::{Pairs, Source, bindings, data_sheet, sizes};
use super::{Failure, engine_failure};

/// Prints the pass tables.
pub fn passes() {
    println!("every cascade:\n{}", pipeline::table(tables::TO_TILE));
    println!("for a CPU:\n{}", pipeline::table(tables::CPU));
    print!("for a GPU:\n{}", pipeline::table(tables::GPU));
}

/// Which lowering follows the tile level.
#[derive(Clone, Debug, PartialEq)]
pub enum Lowering {
    /// Kernels for this machine's processor
    Cpu,
    /// Kernels with roles, channels and schedules, for the GPU of a data sheet
    Gpu(Box<DataSheet>),
}

impl std::str::FromStr for Lowering {
    type Err = String;

    /// `cpu`, `gpu` (the H100's data sheet), or a GPU's data sheet: its name or its file.
    fn from_str(text: &str) -> Result<Lowering, String> {
        let sheet = match text {
            "cpu" => return Ok(Lowering::Cpu),
            "gpu" => Some(DataSheet::h100()),
            file if file.ends_with(".toml") => Some(data_sheet(file)?),
            name => DataSheet::named(name),
        };
        sheet.filter(|s| s.gpu.is_some()).map(|s| Lowering::Gpu(Box::new(s))).ok_or_else(|| {
            let gpus = DataSheet::all().into_iter().filter(|s| s.gpu.is_some()).map(|s| s.name);
            format!(
                "choose cpu, gpu, {}, or the file (NAME.toml) of a GPU's data sheet",
                gpus.collect::<Vec<_>>().join(", ")
            )
        })
    }
}

/// Arguments of `lower`.
#[derive(clap::Args)]
pub struct LowerArgs {
    /// The .ein file, or a .tile file (a plan as text)
    file: PathBuf,
    /// Which cascade of the file
    #[arg(long)]
    cascade: Option<String>,
    /// Stop after this pass (`einfall passes` lists them) and print what it made
    #[arg(long, value_name = "PASS")]
    stop_after: Option<String>,
    /// A mapping file; without it the model chooses
    #[arg(long, value_name = "FILE")]
    mapping: Option<PathBuf>,
    /// Extents fixed at compile time
    #[arg(long = "static", value_name = "RANK=N,..")]
    statics: Vec<Pairs<u64>>,
    /// What to lower to
    #[arg(long, default_value = "cpu", value_name = "cpu|gpu|SHEET")]
    target: Lowering,
    /// Extents the mapping is chosen for, each of them; without them it serves every size
    #[arg(long, value_name = "RANK=N,..")]
    size: Vec<Pairs<u64>>,
    /// Print the mapping instead
    #[arg(long, conflicts_with_all = ["trace", "emit"])]
    print_mapping: bool,
    /// Print what every pass made, not only the last
    #[arg(long)]
    trace: bool,
    /// Print the code of the lowered kernels instead
    #[arg(long, value_enum, conflicts_with_all = ["trace", "stop_after"])]
    emit: Option<Emit>,
}

/// Code that `lower --emit` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Emit {
    /// PTX for the GPU of --target
    Ptx,
    /// PTX for sm_80, which every GPU since has
    PtxSm80,
    /// WGSL for the adapter of --target, or for any
    Wgsl,
}

/// The last plan and the kernels made of it.
fn made<'a>(given: &'a Program, records: &'a [Record]) -> Result<(&'a Plan, &'a Module), Failure> {
    let plan = records.iter().rev().map(|r| &r.program).chain([given]).find_map(|p| match p {
        Program::Tile(plan) => Some(plan),
        Program::Cascade(_) | Program::Kernel(_) => None,
    });
    match (plan, records.last().map(|r| &r.program)) {
        (Some(plan), Some(Program::Kernel(module))) => Ok((plan, module)),
        _ => Err(Failure::Wrong("no kernels were made".to_owned())),
    }
}

/// Prints the WGSL modules of the kernels, one after another.
fn emit_wgsl(source: &Source, given: &Program, records: &[Record], lowering: &Lowering) -> Result<(), Failure> {
    let target = match lowering {
        Lowering::Gpu(sheet) => wgsl::Target::of(sheet).unwrap_or_else(wgsl::Target::generic),
        Lowering::Cpu => return Err(Failure::Usage("--emit wgsl needs --target webgpu".to_owned())),
    };
    let (plan, module) = made(given, records)?;
    let artifact = wgsl::print(plan, module, &target).map_err(|e| Failure::Wrong(source.render(&[e.diagnostic()])))?;
    if let Code::Wgsl { modules } = artifact.code {
        modules.iter().for_each(|m| println!("{}", m.text));
    }
    Ok(())
}

/// Prints the code of the kernels that the last pass made.
fn emit(source: &Source, given: &Program, records: &[Record], emit: Emit, lowering: &Lowering) -> Result<(), Failure> {
    if emit == Emit::Wgsl {
        return emit_wgsl(source, given, records, lowering);
    }
    let target = match emit {
        Emit::Ptx => match lowering {
            Lowering::Gpu(sheet) => ptx::Target::of(sheet).unwrap_or_else(ptx::Target::sm_90a),
            Lowering::Cpu => return Err(Failure::Usage("--emit ptx needs --target gpu".to_owned())),
        },
        Emit::PtxSm80 | Emit::Wgsl => ptx::Target::sm_80(),
    };
    let (plan, module) = made(given, records)?;
    let artifact = ptx::print(plan, module, &target).map_err(|e| Failure::Wrong(source.render(&[e.diagnostic()])))?;
    if let Code::Ptx { text, .. } = artifact.code {
        print!("{text}");
    }
    Ok(())
}

/// Reads a mapping file.
pub fn read_mapping(path: &Path) -> Result<Mapping, Failure> {
    let source = Source::read(path)?;
    einfall_ir::mapping::parse::parse(&source.text).map_err(|d| Failure::Wrong(source.render(&[d])))
}

fn stop_failure(source: &Source, stop: Stop) -> Failure {
    match stop {
        Stop::Refused { pass, diagnostics } => {
            let text = source.render(&diagnostics);
            Failure::Wrong(format!("{text}(refused by {pass})"))
        }
        Stop::NoSuchPass { name } => {
            Failure::Usage(format!("there is no pass `{name}` here; `einfall passes` lists them"))
        }
        other => Failure::Wrong(other.to_string()),
    }
}

/// Runs both halves of the pipeline, up to a pass.
fn records(
    source: &Source,
    program: Program,
    mapping: Option<(&Path, Mapping)>,
    target: &Lowering,
    given: &[(String, u64)],
    stop_after: Option<&str>,
) -> Result<(Vec<Record>, Option<Mapping>), Failure> {
    let (lower, to_tile) = match target {
        Lowering::Cpu => (tables::CPU, Context::default()),
        Lowering::Gpu(sheet) => (tables::GPU, context(sheet)),
    };
    let first = stop_after.filter(|n| tables::TO_TILE.iter().any(|p| p.name == *n));
    let second = stop_after.filter(|n| lower.iter().any(|p| p.name == *n));
    if let (Some(name), None, None) = (stop_after, first, second) {
        return Err(stop_failure(source, Stop::NoSuchPass { name: name.to_owned() }));
    }
    let mut all = Vec::new();
    let plan = match program {
        Program::Cascade(_) => {
            let made = trace(tables::TO_TILE, program, &to_tile, first);
            all = made.map_err(|(_, stop)| stop_failure(source, stop))?;
            if first.is_some() {
                return Ok((all, None));
            }
            all.last().map(|r| r.program.clone())
        }
        Program::Tile(_) | Program::Kernel(_) => Some(program),
    };
    let Some(Program::Tile(plan)) = plan else {
        return Err(Failure::Wrong("no plan was made".to_owned()));
    };
    let cpu = einfall_runtime::Cpu::detect();
    let model = mapping.is_none().then(|| plan.clone());
    let mapping = match (mapping, target) {
        (Some((path, m)), _) => {
            einfall::fits(&m, &plan).map_err(|why| Failure::Wrong(format!("{}: {why}", path.display())))?;
            Some(m)
        }
        (None, Lowering::Cpu) => {
            let sizes = plan_sizes(&plan, given)?;
            Some(einfall_autotune::model_cpu::choose_for(&plan, &cpu.data_sheet(), sizes.as_deref()))
        }
        (None, Lowering::Gpu(sheet)) => {
            let sizes = plan_sizes(&plan, given)?;
            Some(einfall_autotune::model_gpu::choose(&plan, sheet, sizes.as_deref()))
        }
    };
    // A mapping for another device than the target's is lowered for that one.
    let limits = match (&mapping, target) {
        (Some(m), Lowering::Gpu(sheet)) if m.target == sheet.name => to_tile.limits,
        _ => None,
    };
    let context = Context { mapping: mapping.clone(), isa: Some(isa(&cpu)), limits, ..to_tile };
    let made = trace(lower, Program::Tile(plan), &context, second).map_err(|(_, mut stop)| {
        if let (Stop::Refused { diagnostics, .. }, Some(plan), Lowering::Gpu(sheet)) = (&mut stop, &model, target)
            && sheet.webgpu.is_none()
            && let Ok(sizes) = plan_sizes(plan, given)
            && let Some(why) = einfall::cuda::unmapped(plan, sheet, sizes.as_deref())
        {
            *diagnostics = vec![why];
        }
        stop_failure(source, stop)
    });
    all.extend(made?);
    Ok((all, mapping))
}

/// What passes read of a GPU.
fn context(sheet: &DataSheet) -> Context {
    let arrays = sheet.webgpu.as_ref().and_then(|w| usize::try_from(w.storage_buffers).ok());
    Context { atoms: atoms::of(sheet), arrays, limits: sheet.gpu.as_ref().map(Limits::of), ..Context::default() }
}

/// The plan of a cascade for a GPU, with operands rounded for its instructions; none where it is refused.
pub fn gpu_plan(cascade: &Cascade, sheet: &DataSheet) -> Option<tile::Plan> {
    let context = context(sheet);
    let made = trace(tables::TO_TILE, Program::Cascade(cascade.clone()), &context, None).ok()?;
    match made.into_iter().last()?.program {
        Program::Tile(plan) => Some(plan),
        Program::Cascade(_) | Program::Kernel(_) => None,
    }
}

/// One value per rank of the plan; none where nothing is given.
///
/// # Errors
/// A rank without a value.
pub fn plan_sizes(plan: &tile::Plan, given: &[(String, u64)]) -> Result<Option<Vec<u64>>, Failure> {
    if given.is_empty() {
        return Ok(None);
    }
    let value = |r: &einfall_ir::cascade::Rank| {
        let given = given.iter().find(|(n, _)| *n == r.name).map(|g| g.1);
        r.fixed.or(given).ok_or_else(|| Failure::Usage(format!("--size gives no extent of `{}`", r.name)))
    };
    plan.ranks.iter().map(|(_, r)| value(r)).collect::<Result<_, _>>().map(Some)
}

/// The vector facts of this processor, without asking LLVM.
fn isa(cpu: &einfall_runtime::Cpu) -> Isa {
    match (cpu.arch, cpu.vector_bits()) {
        ("aarch64", _) => Isa::NEON,
        (_, 512) => Isa { amx: cpu.multiplies_tiles(), dots: cpu.multiplies_pairs(), ..Isa::AVX512 },
        (_, 256) => Isa::AVX2,
        _ => Isa::SSE2,
    }
}

/// Prints the program after the last pass, or after every pass.
pub fn lower(args: &LowerArgs) -> Result<(), Failure> {
    let source = Source::read(&args.file)?;
    let program = if args.file.extension().is_some_and(|e| e == "tile") {
        Program::Tile(tile::parse::parse(&source.text).map_err(|d| Failure::Wrong(source.render(&[d])))?)
    } else {
        let cascade = source.cascade(args.cascade.as_deref())?;
        let cascade = with_statics(&cascade, &sizes(&args.statics)).map_err(|e| engine_failure(&source, e))?;
        Program::Cascade(cascade)
    };
    let mapping = args.mapping.as_deref().map(|p| read_mapping(p).map(|m| (p, m))).transpose()?;
    let given: Vec<(String, u64)> = sizes(&args.size);
    let ranks: Vec<&str> = match &program {
        Program::Cascade(c) => c.ranks.iter().map(|(_, r)| r.name.as_str()).collect(),
        Program::Tile(plan) => plan.ranks.iter().map(|(_, r)| r.name.as_str()).collect(),
        Program::Kernel(_) => Vec::new(),
    };
    if let Some((name, _)) = given.iter().find(|(n, _)| !ranks.contains(&n.as_str())) {
        let there = ranks.join(", ");
        return Err(Failure::Usage(format!("{} has no rank `{name}`; the ranks are {there}", source.name)));
    }
    let (records, mapping) =
        records(&source, program.clone(), mapping, &args.target, &given, args.stop_after.as_deref())?;
    if args.print_mapping {
        match mapping {
            Some(m) => print!("{m}"),
            None => return Err(Failure::Usage("--print-mapping needs the passes up to the mapping".to_owned())),
        }
        return Ok(());
    }
    if let Some(form) = args.emit {
        return emit(&source, &program, &records, form, &args.target);
    }
    if args.trace {
        print!("{}", pipeline::trace(&records));
    } else if let Some(last) = records.last() {
        print!("{}", last.text);
    }
    Ok(())
}

/// Arguments of `bisect`.
#[derive(clap::Args)]
pub struct BisectArgs {
    /// The .ein file
    file: PathBuf,
    /// Which cascade of the file
    #[arg(long)]
    cascade: Option<String>,
    /// Extents
    #[arg(long, value_name = "RANK=N,..", required = true)]
    size: Vec<Pairs<u64>>,
    /// Seed of the inputs
    #[arg(long, default_value_t = 1)]
    random: u64,
}

/// Evaluates after every pass and names the first whose results leave the tolerance.
pub fn bisect(args: &BisectArgs) -> Result<(), Failure> {
    let source = Source::read(&args.file)?;
    let c = source.cascade(args.cascade.as_deref())?;
    let b = bindings(&source, &c, &Given { sizes: sizes(&args.size), ..Given::default() })?;
    source.room(&c, &b)?;
    let inputs = random(&c, &b, args.random, Variant::Normal).map_err(|e| source.bind_failure(&e))?;
    let expected = expect(&c, &b, &inputs, &eval::Options::default()).map_err(Failure::wrong)?;
    let (records, _) = records(&source, Program::Cascade(c.clone()), None, &Lowering::Cpu, &[], None)?;
    for r in &records {
        println!("{:20} {}", r.name, if r.unchanged { "(unchanged)" } else { r.level.name() });
    }
    let found = pipeline::bisect(&records, |p| judge(p, &c, &b, &inputs, &expected));
    let kernel = match &found {
        Some(_) => None,
        None => device(&source, &c, &b, &inputs, &expected)?,
    };
    match (found, kernel) {
        (Some((record, what)), _) => {
            Err(Failure::Wrong(format!("{} is the first pass whose results leave the tolerance: {what}", record.name)))
        }
        (None, Some(what)) => Err(Failure::Wrong(format!("every level agrees, the compiled code does not: {what}"))),
        (None, None) => {
            println!("every pass, and the compiled code, stays within the tolerance");
            Ok(())
        }
    }
}

fn judge(
    p: &Program,
    c: &Cascade,
    b: &einfall_ir::cascade::bind::Bindings,
    inputs: &[Array],
    expected: &[Expected],
) -> Verdict {
    let results = match p {
        Program::Cascade(now) => eval::evaluate(now, b, inputs).map_err(|e| e.to_string()),
        Program::Tile(plan) => {
            tile::eval::run(plan, &b.extents, inputs, &tile::eval::Options::default()).map_err(|e| e.to_string())
        }
        // Compiled code stands for the kernel level on a CPU.
        Program::Kernel(_) => return Verdict::Within,
    };
    match results {
        Err(e) => Verdict::Outside(e),
        Ok(arrays) => {
            let worst = c.outputs.iter().zip(&arrays).find_map(|(o, a)| {
                let e = expected.iter().find(|e| e.name == o.name)?;
                e.compare(&e.elements(a)).err().map(|m| m.to_string())
            });
            worst.map_or(Verdict::Within, Verdict::Outside)
        }
    }
}

fn device(
    source: &Source,
    c: &Cascade,
    b: &einfall_ir::cascade::bind::Bindings,
    inputs: &[Array],
    expected: &[Expected],
) -> Result<Option<String>, Failure> {
    let fail = |e| engine_failure(source, e);
    let engine = Engine::new(&Options::from_env().map_err(Failure::usage)?).map_err(fail)?;
    let kernel = engine.compile(c).map_err(fail)?;
    let named: Vec<(&str, u64)> = c.ranks.iter().zip(&b.extents).map(|((_, r), n)| (r.name.as_str(), *n)).collect();
    let outputs = kernel.bind(&named).map_err(fail)?.run_values(c, inputs).map_err(fail)?;
    for e in expected {
        if let Some((_, a)) = outputs.iter().find(|(n, _)| *n == e.name) {
            let values = a.to_values().map_err(Failure::wrong)?;
            if let Err(m) = e.compare(&e.elements(&values)) {
                return Ok(Some(m.to_string()));
            }
        }
    }
    Ok(None)
}
