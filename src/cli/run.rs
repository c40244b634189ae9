//! `run`: a cascade on arrays from files or at random.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use einfall::arrays::{Format, Limits, Reason, read, write};
use einfall::{CompileOptions, Engine, Options, with_statics};
use einfall_ir::array::Array;
use einfall_ir::cascade::bind::{Given, bind, check_facts, fill_defaults};
use einfall_ir::cascade::{Cascade, PackOrder, eval};
use einfall_ir::dtype::DType;
use einfall_ir::tolerance::inputs::{Variant, random};
use einfall_runtime::HostArray;

use super::gpu::plans;
use super::source::{Pairs, Source, sizes};
use super::{Failure, compare, engine_failure};

/// Where a command runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceArg {
    /// This machine's processor, through LLVM.
    Cpu,
    /// An NVIDIA GPU by its number.
    Cuda(usize),
    /// An adapter of WebGPU by a part of its name; none: the only one, or the only one that is no processor.
    #[cfg(feature = "wgpu")]
    Wgpu(Option<String>),
    /// The float64 evaluator: every construct, slowly.
    Reference,
}

impl std::str::FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceArg, String> {
        match (text, text.split_once(':')) {
            ("cpu", _) => Ok(DeviceArg::Cpu),
            ("cuda", _) => Ok(DeviceArg::Cuda(0)),
            (_, Some(("cuda", n))) => n
                .parse()
                .map(DeviceArg::Cuda)
                .map_err(|_| format!("`{n}` is no number of a device; `einfall devices` lists them")),
            ("reference", _) => Ok(DeviceArg::Reference),
            #[cfg(feature = "wgpu")]
            ("wgpu", _) => Ok(DeviceArg::Wgpu(None)),
            #[cfg(feature = "wgpu")]
            (_, Some(("wgpu", name))) if !name.is_empty() => Ok(DeviceArg::Wgpu(Some(name.to_owned()))),
            #[cfg(not(feature = "wgpu"))]
            ("wgpu", _) | (_, Some(("wgpu", _))) => {
                Err("this build has no WebGPU; build einfall with `--features wgpu`".to_owned())
            }
            _ if cfg!(feature = "wgpu") => {
                Err("devices are cpu, cuda, cuda:N, wgpu, wgpu:NAME (a part of an adapter's name) and reference"
                    .to_owned())
            }
            _ => Err("devices are cpu, cuda, cuda:N and reference".to_owned()),
        }
    }
}

/// Arguments of `run`.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  einfall run softmax.ein --random 1 --size M=64,N=1000 --check\n  \
einfall run matmul.ein --input x=x.npy --input w=w.npy --out y.npy\n  \
einfall run layer.ein --inputs weights.safetensors --inputs batch.npz --out result.npz")]
pub struct RunArgs {
    /// The .ein file, or a .tile file (a plan, for a GPU or the reference device; its arrays are random)
    file: PathBuf,
    /// Which cascade of the file
    #[arg(long)]
    cascade: Option<String>,
    /// An array for one parameter, from a .npy file
    #[arg(long = "input", value_name = "NAME=FILE", value_parser = name_and_file)]
    input: Vec<(String, PathBuf)>,
    /// Arrays for parameters by name, from a .npz, .safetensors or .npy file; arrays of other names are an error
    #[arg(long = "inputs", value_name = "FILE")]
    inputs: Vec<PathBuf>,
    /// Values of scalar parameters
    #[arg(long = "set", value_name = "NAME=NUMBER,..")]
    set: Vec<Pairs<f64>>,
    /// Draw what is not given at random, from this seed
    #[arg(long, value_name = "SEED")]
    random: Option<u64>,
    /// Extents that no array decides
    #[arg(long, value_name = "RANK=N,..")]
    size: Vec<Pairs<u64>>,
    /// Extents fixed at compile time
    #[arg(long = "static", value_name = "RANK=N,..")]
    statics: Vec<Pairs<u64>>,
    /// Where to write the outputs: .npz, .safetensors, or .npy for a single one
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Compare with the float64 evaluator, within computed tolerances
    #[arg(long)]
    check: bool,
    /// A mapping file instead of the model's choice
    #[arg(long, value_name = "FILE")]
    mapping: Option<PathBuf>,
    /// Print what the time from the text to the first result went into
    #[arg(long)]
    timings: bool,
    /// Where to run: cpu; cuda; reference, the float64 evaluator; in builds with the feature `wgpu` also wgpu or wgpu:NAME
    /// (a part of an adapter's name)
    #[arg(long, default_value = "cpu")]
    device: DeviceArg,
}

fn name_and_file(text: &str) -> Result<(String, PathBuf), String> {
    let (name, file) = text.split_once('=').ok_or_else(|| format!("`{text}` is no NAME=FILE"))?;
    Ok((name.to_owned(), PathBuf::from(file)))
}

/// Times of the steps of a start.
struct Laps {
    last: Instant,
    steps: Vec<(&'static str, Duration)>,
}

impl Laps {
    /// Ends a step; none: what went on since the last one does not count.
    fn end(&mut self, step: Option<&'static str>) {
        let now = Instant::now();
        self.steps.extend(step.map(|s| (s, now - self.last)));
        self.last = now;
    }
}

/// Runs, prints a line per output, checks and writes if asked.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    if args.file.extension().is_some_and(|e| e == "tile") {
        return run_plan(args);
    }
    if args.device == DeviceArg::Reference && args.mapping.is_some() {
        return Err(Failure::Usage("the reference device evaluates the text and takes no mapping".to_owned()));
    }
    if let Some(path) = &args.out {
        writable(path)?;
    }
    let mut laps = Laps { last: Instant::now(), steps: Vec::new() };
    let source = Source::read(&args.file)?;
    let cascade = source.cascade(args.cascade.as_deref())?;
    laps.end(Some("read, parse and verify the text"));
    let statics = sizes(&args.statics);
    let c = with_statics(&cascade, &statics).map_err(|e| engine_failure(&source, e))?;
    let given = gather(args, &c)?;

    // Extents from the arrays, then from --size.
    let mut facts = Given { sizes: sizes(&args.size), ..Given::default() };
    for (&p, a) in c.params.iter().zip(&given) {
        match a {
            Some(a) if c.tensors[p].dims.is_empty() && a.shape().is_empty() => {
                let value = a.to_values().map_err(Failure::wrong)?;
                facts.scalars.push((p, value.data[0]));
            }
            Some(a) => facts.shapes.push((p, a.shape().to_vec())),
            None => {}
        }
    }
    let b = bind(&c, &facts).map_err(|e| source.bind_failure(&e))?;
    check_facts(&c, &b, &facts.scalars).map_err(|e| source.bind_failure(&e))?;
    source.room(&c, &b)?;
    let drawn = match args.random {
        Some(seed) => random(&c, &b, seed, Variant::Normal).map_err(|e| source.bind_failure(&e))?,
        None => Vec::new(),
    };
    let mut values = Vec::new();
    for (k, (&p, a)) in c.params.iter().zip(&given).enumerate() {
        let t = &c.tensors[p];
        values.push(match a {
            Some(a) => Some(a.to_values().map_err(Failure::wrong)?),
            None if t.default.is_some() => None,
            None if args.random.is_some() => Some(drawn[k].clone()),
            None => {
                let what = format!("parameter `{}` is not given: --input {0}=FILE, or --random SEED", t.name);
                return Err(Failure::Wrong(what));
            }
        });
    }
    let values = fill_defaults(&c, &b, &values).map_err(|e| source.bind_failure(&e))?;

    laps.end(None);
    let outputs = match &args.device {
        DeviceArg::Reference => reference(&c, &b, &values)?,
        #[cfg(feature = "wgpu")]
        DeviceArg::Wgpu(name) => {
            let engine = super::wgpu::engine(name.as_deref())?;
            let fail = |e| engine_failure(&source, e);
            let mapping = args.mapping.as_deref().map(super::lower::read_mapping).transpose()?;
            let options = CompileOptions { statics, mapping, ..CompileOptions::default() };
            let kernel = engine.compile_with(&cascade, &options).map_err(fail)?;
            let named: Vec<(&str, u64)> =
                c.ranks.iter().zip(&b.extents).map(|((_, r), n)| (r.name.as_str(), *n)).collect();
            let names = c.params.iter().map(|p| c.tensors[*p].name.as_str());
            let inputs: Vec<(&str, &Array)> = names.zip(&values).collect();
            kernel.bind(&named).and_then(|bound| bound.run_values(&inputs)).map_err(fail)?
        }
        DeviceArg::Cuda(n) => {
            let engine = super::gpu::engine(*n)?;
            let fail = |e| engine_failure(&source, e);
            let stream = engine.runtime().stream().map_err(Failure::machine)?;
            laps.end(Some("open the device"));
            let mapping = args.mapping.as_deref().map(super::lower::read_mapping).transpose()?;
            let kernel = engine
                .compile_with(&cascade, &CompileOptions { statics, mapping, ..CompileOptions::default() })
                .map_err(fail)?;
            let named: Vec<(&str, u64)> =
                c.ranks.iter().zip(&b.extents).map(|((_, r), n)| (r.name.as_str(), *n)).collect();
            let names = c.params.iter().map(|p| c.tensors[*p].name.as_str());
            let inputs: Vec<(&str, &Array)> = names.zip(&values).collect();
            laps.end(Some("compile, or look up, and load"));
            let bound = kernel.bind(&named).map_err(fail)?;
            laps.end(Some("bind the sizes"));
            let outputs = bound.run_values(&stream, &inputs).map_err(fail)?;
            laps.end(Some("load variants, copy the arrays, launch"));
            outputs
        }
        DeviceArg::Cpu => {
            let engine =
                Engine::new(&Options::from_env().map_err(Failure::usage)?).map_err(|e| engine_failure(&source, e))?;
            laps.end(Some("load LLVM, start the threads"));
            let mapping = args.mapping.as_deref().map(super::lower::read_mapping).transpose()?;
            let options = CompileOptions { statics, mapping, ..CompileOptions::default() };
            let kernel = engine.compile_with(&cascade, &options).map_err(|e| engine_failure(&source, e))?;
            let named: Vec<(&str, u64)> =
                c.ranks.iter().zip(&b.extents).map(|((_, r), n)| (r.name.as_str(), *n)).collect();
            laps.end(Some("compile, or look up, and link"));
            let bound = kernel.bind(&named).map_err(|e| engine_failure(&source, e))?;
            laps.end(Some("bind the sizes"));
            let outputs = bound.run_values(&c, &values).map_err(|e| engine_failure(&source, e))?;
            laps.end(Some("copy the arrays, launch"));
            outputs
        }
    };
    for (name, a) in &outputs {
        println!("{name}: {}{:?}", a.dtype(), a.shape());
    }
    for (step, time) in laps.steps.iter().filter(|_| args.timings) {
        println!("{:9.3} ms  {step}", time.as_secs_f64() * 1e3);
    }
    if args.check {
        for line in compare::outputs(&c, &b, &values, &outputs, args.random.unwrap_or(0))? {
            println!("{line}");
        }
    }
    if let Some(path) = &args.out {
        let list: Vec<(&str, &HostArray)> = outputs.iter().map(|(n, a)| (n.as_str(), a)).collect();
        write(path, &list).map_err(|e| Failure::Machine(e.to_string()))?;
    }
    Ok(())
}

/// Refuses, before anything is computed, where outputs cannot be written.
fn writable(path: &Path) -> Result<(), Failure> {
    let name = path.display();
    if Format::of(path).is_none() {
        return Err(Failure::Usage(format!("{name}: {}", Reason::Format)));
    }
    match path.parent().filter(|p| !p.as_os_str().is_empty() && !p.is_dir()) {
        Some(folder) => Err(Failure::Machine(format!("{name}: there is no folder {}", folder.display()))),
        None => Ok(()),
    }
}

/// Points that the evaluator visits to check a plan.
const CHECK_POINTS: f64 = 3e6;

/// Runs a plan by a mapping on random arrays.
fn run_plan(args: &RunArgs) -> Result<(), Failure> {
    let given = [!args.input.is_empty(), !args.inputs.is_empty(), !args.set.is_empty(), args.out.is_some()];
    let Some(seed) = args.random.filter(|_| !given.contains(&true)) else {
        return Err(Failure::Usage("a plan runs on random arrays: --random SEED, without files".to_owned()));
    };
    if args.timings {
        return Err(Failure::Usage("--timings is for cascades: a plan is neither derived nor looked up".to_owned()));
    }
    let plan = plans::read_plan(&args.file, &sizes(&args.statics))?;
    let ranks = plans::ranks(&plan, &sizes(&args.size))?;
    let check = if args.check || args.device == DeviceArg::Reference { CHECK_POINTS } else { 0.0 };
    let case = plans::case(&plan, &ranks, seed, Variant::Normal, check).map_err(Failure::Wrong)?;
    match args.device {
        DeviceArg::Cpu => Err(Failure::Usage("a plan runs with --device cuda, or on the reference device".to_owned())),
        #[cfg(feature = "wgpu")]
        DeviceArg::Wgpu(_) => {
            Err(Failure::Usage("a plan runs with --device cuda, or on the reference device".to_owned()))
        }
        DeviceArg::Reference => {
            case.expected.iter().for_each(|e| println!("{}: {}{:?}", e.name, e.dtype, e.dims));
            Ok(())
        }
        DeviceArg::Cuda(n) => {
            let Some(file) = &args.mapping else {
                return Err(Failure::Usage("a plan is compiled by a mapping: --mapping FILE".to_owned()));
            };
            let source = Source::read(&args.file)?;
            let fail = |e| engine_failure(&source, e);
            let engine = super::gpu::engine(n)?;
            let stream = engine.runtime().stream().map_err(Failure::machine)?;
            let kernel = engine.compile_plan(&plan, &super::lower::read_mapping(file)?).map_err(fail)?;
            let named: Vec<(&str, u64)> =
                plan.ranks.iter().zip(&ranks).map(|((_, r), n)| (r.name.as_str(), *n)).collect();
            let inputs: Vec<(&str, &Array)> = case.inputs.iter().map(|(n, a)| (n.as_str(), a)).collect();
            let outputs = kernel.bind(&named).and_then(|b| b.run_values(&stream, &inputs)).map_err(fail)?;
            for (name, a) in &outputs {
                println!("{name}: {}{:?}", a.dtype(), a.shape());
            }
            for line in plans::compare(&case.expected, &outputs).map_err(Failure::Wrong)?.iter().filter(|_| args.check)
            {
                println!("{line}");
            }
            Ok(())
        }
    }
}

fn reference(
    c: &Cascade,
    b: &einfall_ir::cascade::bind::Bindings,
    values: &[Array],
) -> Result<Vec<(String, HostArray)>, Failure> {
    let all = eval::evaluate_all(c, b, values, &eval::Options::default()).map_err(Failure::wrong)?;
    all.results()
        .into_iter()
        .map(|(name, elements)| {
            let a = elements.into_array();
            let rounded = Array::from_fn(a.dtype, &a.dims, |i| a.data[i]);
            let packing = c.tensor(&name).and_then(|t| c.tensors[t].storage.packing);
            let stored = packing.map_or(rounded.clone(), |order| rounded.packed(order));
            Ok((name, HostArray::from_values(&stored).map_err(Failure::wrong)?))
        })
        .collect()
}

/// The bytes of a packed parameter whose elements are given.
fn packed(name: &str, dtype: DType, order: PackOrder, elements: &HostArray) -> Result<HostArray, Failure> {
    let values = elements.to_values().map_err(Failure::wrong)?;
    if let Some(i) = values.data.iter().position(|x| dtype.round(*x) != *x) {
        let (at, x) = (values.coordinates(i), values.data[i]);
        return Err(Failure::Wrong(format!("parameter `{name}` is {dtype}, which cannot hold the {x} at {at:?}")));
    }
    HostArray::from_values(&Array { dtype, ..values }.packed(order)).map_err(Failure::wrong)
}

/// The arrays given, one place per parameter.
fn gather(args: &RunArgs, c: &Cascade) -> Result<Vec<Option<HostArray>>, Failure> {
    let mut given: Vec<Option<HostArray>> = vec![None; c.params.len()];
    let mut put = |name: &str, array: HostArray| {
        let names = || c.params.iter().map(|p| c.tensors[*p].name.as_str()).collect::<Vec<_>>().join(", ");
        let Some(k) = c.params.iter().position(|p| c.tensors[*p].name == name) else {
            return Err(Failure::Wrong(format!("there is no parameter `{name}`; `{}` has {}", c.name, names())));
        };
        let t = &c.tensors[c.params[k]];
        let (stored, _) = t.stored();
        let array = match t.storage.packing {
            Some(order) if array.dtype() == DType::I8 => packed(name, t.dtype, order, &array)?,
            Some(_) | None => array,
        };
        if array.dtype() != stored {
            let (declared, found) = (t.dtype, array.dtype());
            let what = format!("parameter `{name}` is {declared}, the array given is {found}");
            return Err(Failure::Wrong(match t.storage.packing {
                Some(_) => format!("{what}; give its bytes as {stored}, or its elements as i8"),
                None => format!("{what}; convert the array, or declare the parameter {found}"),
            }));
        }
        if given[k].replace(array).is_some() {
            return Err(Failure::Usage(format!("parameter `{name}` is given twice")));
        }
        Ok(())
    };
    let load = |path: &PathBuf| read(path, &Limits::default()).map_err(|e| Failure::Wrong(e.to_string()));
    for (name, path) in &args.input {
        let mut arrays = load(path)?;
        match arrays.len() {
            1 => put(name, arrays.remove(0).1)?,
            n => {
                let what =
                    format!("{} holds {n} arrays; --input takes one, --inputs takes all by name", path.display());
                return Err(Failure::Usage(what));
            }
        }
    }
    for path in &args.inputs {
        for (name, array) in load(path)? {
            put(&name, array)?;
        }
    }
    for pairs in &args.set {
        for (name, value) in &pairs.0 {
            let Some(&p) = c.params.iter().find(|p| c.tensors[**p].name == *name) else {
                return Err(Failure::Wrong(format!("there is no scalar parameter `{name}`")));
            };
            let t = &c.tensors[p];
            if !t.dims.is_empty() {
                return Err(Failure::Wrong(format!("`{name}` is an array: give it with --input {name}=FILE")));
            }
            let fits = t.dtype.is_float() || t.dtype.round(*value) == *value || t.dtype == DType::Bool;
            if !fits {
                return Err(Failure::Wrong(format!("`{name}` is {}, which cannot hold {value}", t.dtype)));
            }
            let array = HostArray::from_values(&Array::scalar(t.dtype, *value)).map_err(Failure::wrong)?;
            put(name, array)?;
        }
    }
    Ok(given)
}
