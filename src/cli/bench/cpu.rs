//! Library cascades on the processor: every case compared with the float64 evaluator, then timed block by block.
//!
//! Invariant: nothing is timed whose results were not compared just before: what the timed arrays gave at sampled
//! elements, or, where a recurrence would take the evaluator hours, the same code at small sizes.

use std::io::BufRead as _;
use std::time::{Duration, Instant};

use einfall::{Bound, CompileOptions, Engine, Kernel, Options};
use einfall_ir::array::Array;
use einfall_ir::cascade::bind::{Bindings, Given, bind, fill_defaults};
use einfall_ir::cascade::{Cascade, RankId, Stmt};
use einfall_ir::dtype::DType;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::BufferKind;
use einfall_ir::tolerance::inputs::{Variant, random};
use einfall_runtime::{Arguments, ArrayError, ArraySpec, HostArray};

use super::super::{Failure, compare};
use super::cases::{Case, Measure, cases};
use super::{BenchArgs, Row, no_case};

/// Bytes of all sets of arrays of a case that memory bounds: more than caches hold.
const STREAMED_BYTES: u64 = 512 << 20;
/// Sets of arrays at most.
const SETS: u64 = 16;
/// Elements of each output that are compared.
const SAMPLES: u64 = 8;
/// Extents at which a recurrence is compared at most: steps, and others (a tail beyond any register tile).
const STEPS: u64 = 5;
const EXTENT: u64 = 37;

/// What is timed: a case of the table, or a rate of the processor.
enum Item {
    Case(Box<Case>),
    /// A rate by name, the time of so much work of it, and its own kind of rate.
    Rate {
        name: String,
        seconds: f64,
        measure: Measure,
        threads: usize,
    },
}

impl Item {
    fn names(&self) -> (&str, &str) {
        match self {
            Item::Case(c) => (c.family, &c.name),
            Item::Rate { name, .. } => ("ceilings", name),
        }
    }
}

/// A case that was not timed.
#[derive(serde::Serialize)]
struct Fault<'a> {
    family: &'a str,
    case: &'a str,
    peer: &'static str,
    error: &'a str,
}

/// Times what is asked for, block by block. What fails is said and leaves the command failed at the end.
pub fn bench(args: &BenchArgs) -> Result<(), Failure> {
    let options = args.options()?;
    let mut items: Vec<Item> = Vec::new();
    let engine = Engine::new(&options).map_err(Failure::machine)?;
    let threads = engine.runtime().threads();
    // Rates are measured below, once it is known that something is asked for.
    let names = [
        ("fma_f32_1Tflop_threads1".to_owned(), 1),
        (format!("fma_f32_1Tflop_threads{threads}"), threads),
        ("read_1GiB".to_owned(), threads),
    ];
    for (i, (name, threads)) in names.into_iter().enumerate().filter(|(i, _)| *i != 1 || threads > 1) {
        let measure = if i < 2 { Measure::Flops(1e12) } else { Measure::Bytes(f64::from(1 << 30)) };
        items.push(Item::Rate { name, seconds: 0.0, measure, threads });
    }
    items.extend(cases().into_iter().map(|c| Item::Case(Box::new(c))));
    items.retain(|i| args.wants(i.names().0, i.names().1));
    if items.is_empty() {
        return Err(no_case());
    }
    let sheet = engine.runtime().measure().map_err(Failure::machine)?;
    for item in &mut items {
        if let Item::Rate { measure, seconds, threads, .. } = item {
            *seconds = match measure {
                Measure::Flops(n) => *n / peak(&sheet, &options, *threads, engine.runtime().threads())?,
                Measure::Bytes(n) => *n / bandwidth(&sheet),
                Measure::Time => 0.0,
            };
        }
    }
    let mut failed = Vec::new();
    for item in &items {
        if let Some(Failure::Wrong(e) | Failure::Usage(e) | Failure::Machine(e)) = blocks(&engine, &sheet, item, args)?
        {
            failed.push(format!("{} {}: {e}", item.names().0, item.names().1));
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(Failure::Wrong(format!("not timed:\n{}", failed.join("\n")))) }
}

/// Multiply-adds' peak of so many threads, FLOP/s.
fn peak(sheet: &DataSheet, options: &Options, threads: usize, all: usize) -> Result<f64, Failure> {
    let of = |s: &DataSheet| s.peak_of(DType::F32).unwrap_or(f64::INFINITY);
    if threads == all {
        return Ok(of(sheet));
    }
    let one = Engine::new(&Options { threads: Some(threads), ..options.clone() }).map_err(Failure::machine)?;
    Ok(of(&one.runtime().measure().map_err(Failure::machine)?))
}

/// Bytes read from memory in a second, by all threads.
fn bandwidth(sheet: &DataSheet) -> f64 {
    sheet.levels.first().map_or(f64::INFINITY, |l| l.bandwidth * l.instances as f64)
}

/// Times the blocks of one item and prints a line for each; returns what it failed with.
fn blocks(engine: &Engine, sheet: &DataSheet, item: &Item, args: &BenchArgs) -> Result<Option<Failure>, Failure> {
    let n = args.blocks.max(1);
    let mut ready: Option<Result<Ready, Failure>> = None;
    for block in 0..n {
        if args.paced {
            let mut line = String::new();
            let read = std::io::stdin().lock().read_line(&mut line).map_err(Failure::machine)?;
            // Nobody takes turns any more.
            if read == 0 {
                return Ok(None);
            }
        }
        let case = match item {
            Item::Case(case) => case,
            Item::Rate { name, seconds, measure, threads } => {
                rate((name, *seconds), *measure, *threads).print(args.jsonl)?;
                continue;
            }
        };
        let prepared = ready.get_or_insert_with(|| Ready::new(engine, case));
        let row = match prepared {
            Ok(r) => r.launches.time(Duration::from_millis(args.budget_ms)).map(|s| r.row(engine, sheet, case, s)),
            Err(Failure::Wrong(e) | Failure::Usage(e) | Failure::Machine(e)) => Err(Failure::Wrong(e.clone())),
        };
        let row = match row {
            Ok(row) => row,
            Err(Failure::Wrong(e) | Failure::Usage(e) | Failure::Machine(e)) => {
                if args.jsonl {
                    let fault = Fault { family: case.family, case: &case.name, peer: "einfall", error: &e };
                    println!("{}", serde_json::to_string(&fault).map_err(Failure::wrong)?);
                }
                // Who takes turns waits for a line for every one that he sends.
                if args.paced && block + 1 < n {
                    continue;
                }
                return Ok(Some(Failure::Wrong(e)));
            }
        };
        if block + 1 == n {
            // Memory is given back before the line says that others may go on.
            ready = None;
        }
        row.print(args.jsonl)?;
    }
    Ok(None)
}

/// One set of arrays.
struct Set {
    inputs: Vec<(String, HostArray)>,
    outputs: Vec<(String, HostArray)>,
}

/// A kernel at its sizes with sets of arrays that take turns.
pub struct Launches {
    pub bound: Bound,
    scalars: Vec<(String, f64)>,
    sets: Vec<Set>,
}

impl Launches {
    /// One set, filled by `value`; outputs hold no numbers, so that no result can be left over.
    pub fn new(
        bound: Bound,
        scalars: Vec<(String, f64)>,
        mut value: impl FnMut(&ArraySpec) -> Result<HostArray, ArrayError>,
    ) -> Result<Launches, Failure> {
        let mut set = Set { inputs: Vec::new(), outputs: Vec::new() };
        for spec in bound.runtime().arrays().filter(|s| !s.shape.is_empty()) {
            let (list, array) = match spec.kind {
                BufferKind::Output => {
                    let array = HostArray::zeros(spec.dtype, spec.shape).map(|mut array| {
                        array.bytes_mut().fill(0xff);
                        array
                    });
                    (&mut set.outputs, array)
                }
                BufferKind::InOut => (&mut set.outputs, value(&spec)),
                BufferKind::Input | BufferKind::Workspace => (&mut set.inputs, value(&spec)),
            };
            list.push((spec.name.to_owned(), array.map_err(Failure::wrong)?));
        }
        Ok(Launches { bound, scalars, sets: vec![set] })
    }

    /// Bytes of a set.
    fn bytes(&self) -> u64 {
        let arrays = self.sets[0].inputs.iter().chain(&self.sets[0].outputs);
        arrays.map(|(_, a)| a.bytes().len() as u64).sum()
    }

    /// As many sets as `n`, each launched once: others lie elsewhere and hold the same.
    pub fn spread(&mut self, n: usize) -> Result<(), Failure> {
        for i in 1..n {
            let first = &self.sets[0];
            self.sets.push(Set { inputs: first.inputs.clone(), outputs: first.outputs.clone() });
            self.launch(i)?;
        }
        self.launch(0).map(drop)
    }

    /// Seconds of a launch on a set.
    fn launch(&mut self, set: usize) -> Result<f64, Failure> {
        let Set { inputs, outputs } = &mut self.sets[set];
        let mut arguments = Arguments::new();
        for (n, a) in inputs.iter() {
            arguments = arguments.input(n, a.view());
        }
        for (n, a) in outputs.iter_mut() {
            arguments = arguments.output(n, a.view_mut());
        }
        for (n, value) in &self.scalars {
            arguments = arguments.scalar(n, *value);
        }
        let start = Instant::now();
        self.bound.launch(arguments).map_err(Failure::wrong)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// The median time of a launch in seconds, sets taking turns; the first launch warms up.
    pub fn time(&mut self, budget: Duration) -> Result<f64, Failure> {
        let mut samples = Vec::new();
        let begin = Instant::now();
        for turn in 0.. {
            let seconds = self.launch(turn % self.sets.len())?;
            if turn >= 1 {
                samples.push(seconds);
            }
            // Of what takes long one launch is enough, after the one that warmed up.
            let least = if begin.elapsed() > 3 * budget { 1 } else { 3 };
            if samples.len() >= least && begin.elapsed() > budget {
                break;
            }
        }
        samples.sort_by(f64::total_cmp);
        Ok(samples[samples.len() / 2])
    }

    /// Compares what the first set gave, at sampled elements.
    fn compare(&self, c: &Cascade, sizes: &[(String, u64)]) -> Result<(), Failure> {
        let b = bind(c, &Given { sizes: sizes.to_vec(), ..Given::default() }).map_err(Failure::wrong)?;
        let set = &self.sets[0];
        let value = |name: &str| -> Result<Option<Array>, Failure> {
            let array = set.inputs.iter().find(|(n, _)| n == name).map(|(_, a)| a.to_values().map_err(Failure::wrong));
            let scalar = self.scalars.iter().find(|(n, _)| n == name).map(|(_, x)| *x);
            let dtype = c.tensor(name).map_or(DType::F32, |t| c.tensors[t].dtype);
            array.transpose().map(|a| a.or(scalar.map(|x| Array::scalar(dtype, x))))
        };
        let given = c.params.iter().map(|p| value(&c.tensors[*p].name)).collect::<Result<Vec<_>, _>>()?;
        let inputs = fill_defaults(c, &b, &given).map_err(Failure::wrong)?;
        compare::sampled(c, &b, &inputs, &set.outputs, 1, SAMPLES).map(drop)
    }
}

/// A case that was compared.
struct Ready {
    kernel: Kernel,
    launches: Launches,
    build_s: f64,
}

impl Ready {
    fn new(engine: &Engine, case: &Case) -> Result<Ready, Failure> {
        let c = case.cascade()?;
        let start = Instant::now();
        let sizes = case.extents(&c);
        let options = CompileOptions { sizes: sizes.clone(), ..CompileOptions::default() };
        let kernel = engine.compile_with(&c, &options).map_err(Failure::wrong)?;
        let build_s = start.elapsed().as_secs_f64();
        let bound = kernel.bind(&sizes).map_err(Failure::wrong)?;
        let mut seed = 0;
        let mut launches = Launches::new(bound, case.scalars(&c), |spec| {
            seed += 1;
            case.array(spec, seed)
        })?;
        if c.stmts.iter().any(|s| matches!(s, Stmt::Iter(_))) {
            compare_small(&kernel, &c, case)?;
        } else {
            launches.launch(0)?;
            launches.compare(&c, &sizes)?;
        }
        launches.spread(match case.measure {
            Measure::Bytes(_) => (STREAMED_BYTES / launches.bytes().max(1)).clamp(2, SETS) as usize,
            Measure::Flops(_) | Measure::Time => 2,
        })?;
        Ok(Ready { kernel, launches, build_s })
    }

    fn row(&self, engine: &Engine, sheet: &DataSheet, case: &Case, seconds: f64) -> Row {
        let measured = (case.family, case.name.as_str(), case.measure.rates(seconds));
        row(engine, (&self.kernel, &self.launches.bound), sheet, measured, self.build_s, seconds)
    }
}

/// Compares a kernel at small sizes; what its cascade fixes stays.
fn compare_small(kernel: &Kernel, c: &Cascade, case: &Case) -> Result<(), Failure> {
    let index = |s: &Stmt| if let Stmt::Iter(i) = s { c.indices[i.index].rank } else { None };
    let steps: Vec<RankId> = c.stmts.iter().filter_map(index).collect();
    let small = |(n, size): (String, u64)| {
        let fixed = c.rank(&n).is_some_and(|r| c.ranks[r].fixed.is_some());
        let most = if c.rank(&n).is_some_and(|r| steps.contains(&r)) { STEPS } else { EXTENT };
        let size = if fixed { size } else { size.min(most) };
        (n, size)
    };
    let sizes: Vec<(String, u64)> = case.extents(c).into_iter().map(small).collect();
    let b: Bindings = bind(c, &Given { sizes: sizes.clone(), ..Given::default() }).map_err(Failure::wrong)?;
    let inputs = random(c, &b, 1, Variant::Normal).map_err(Failure::wrong)?;
    let outputs = kernel.bind(&sizes).and_then(|bound| bound.run_values(c, &inputs)).map_err(Failure::wrong)?;
    compare::outputs(c, &b, &inputs, &outputs, 1).map(drop)
}

/// The processor's name with its threads, as peers call it: times of several numbers of threads are not compared.
fn device(threads: usize) -> String {
    format!("{}, {threads} thread{}", einfall_runtime::Cpu::detect().name, if threads == 1 { "" } else { "s" })
}

/// The line of a rate.
fn rate((name, seconds): (&str, f64), measure: Measure, threads: usize) -> Row {
    let (tflops, gbps) = measure.rates(seconds);
    Row {
        family: "ceilings".to_owned(),
        case: name.to_owned(),
        peer: "einfall".to_owned(),
        device: device(threads),
        ms: seconds * 1e3,
        tflops,
        gbps,
        build_s: 0.0,
        kernels: 1,
        atoms: Vec::new(),
        threads,
        roofline_fraction: 1.0,
    }
}

/// The line of a kernel that took so many seconds, under a family's and a case's name, with its rates.
pub fn row(
    engine: &Engine,
    (kernel, bound): (&Kernel, &Bound),
    sheet: &DataSheet,
    (family, case, (tflops, gbps)): (&str, &str, (Option<f64>, Option<f64>)),
    build_s: f64,
    seconds: f64,
) -> Row {
    let (flops, bytes) = work(bound);
    let peak = sheet.peak_of(DType::F32).unwrap_or(f64::INFINITY);
    let floor = (flops / peak).max(bytes / bandwidth(sheet));
    Row {
        family: family.to_owned(),
        case: case.to_owned(),
        peer: "einfall".to_owned(),
        device: device(engine.runtime().threads()),
        ms: seconds * 1e3,
        tflops,
        gbps,
        build_s,
        kernels: bound.runtime().kernels().count(),
        // What the mapping names; empty where the lowering makes its own outer products of vector operations.
        atoms: kernel.mapping().kernels.iter().flat_map(|k| &k.ops).filter_map(|o| o.atom.clone()).collect(),
        threads: engine.runtime().threads(),
        roofline_fraction: floor / seconds,
    }
}

/// Operations and bytes of a launch, as its kernels count them.
pub fn work(bound: &Bound) -> (f64, f64) {
    let flops = bound.runtime().kernels().map(|k| k.flops as f64).sum();
    let bytes = bound.runtime().kernels().map(|k| k.bytes as f64).sum();
    (flops, bytes)
}
