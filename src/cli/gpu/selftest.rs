//! `selftest --device cuda`: reference plans by every mapping for them, library cascades and random streams against the
//! float64 evaluators at sizes around every tile edge; one-hot operands through every operand layout of the
//! instructions; then repeated runs, bit by bit.

use std::path::PathBuf;
use std::time::Duration;

use einfall::CompileOptions;
use einfall::cuda::{Engine, Kernel};
use einfall_codegen::probes::{self, Hot, Probe};
use einfall_codegen::random::{Drawn, drawn};
use einfall_ir::cascade::bind::{Bindings, Given, bind, check_facts};
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::mapping::Mapping;
use einfall_ir::tile::Plan;
use einfall_ir::tolerance::inputs::{Variant, random};
use einfall_runtime::HostArray;
use einfall_runtime::cuda::{Arguments, Stream};

use super::super::device::{SelftestArgs, draw, next};
use super::super::lower::read_mapping;
use super::super::{Failure, compare};
use super::large;
use super::plans::{self, edge_sizes, is_for, read_plan};
use super::supervise::{Tally, alive, supervise, work};
use super::text;

/// Runs on the same arrays that must agree bit by bit.
const REPEATS: usize = 20;
/// Points that the evaluator visits per case.
const BUDGET: f64 = 2e5;
/// Points between inputs and outputs that it visits for all cases but small ones, and what is small.
const INNER: u64 = 4_000_000;
const FEW: u64 = 3;
/// Random streams, by their seeds.
const STREAMS: u64 = 48;

/// Something to test.
enum Item {
    /// A reference plan by a mapping file, or a random stream by a drawn one.
    Mapped { name: String, plan: Box<Plan>, mapping: Mapping },
    /// A library cascade by a mapping file, or by the model's choice.
    Cascade { name: String, cascade: Box<Cascade>, mapping: Option<Mapping> },
    /// One-hot operands through an instruction, by layout.
    Probe(Box<Probe>),
    /// Arrays of more than 2³¹ elements.
    Large { name: String, case: usize },
    /// Something that is not tested, with why.
    Skipped(String),
}

impl Item {
    fn name(&self) -> &str {
        match self {
            Item::Mapped { name, .. } | Item::Cascade { name, .. } | Item::Large { name, .. } | Item::Skipped(name) => {
                name
            }
            Item::Probe(p) => &p.name,
        }
    }
}

/// Everything there is to test, in a fixed order.
fn items(args: &SelftestArgs) -> Result<Vec<Item>, Failure> {
    let mut list = Vec::new();
    let mut mappings = Vec::new();
    for path in plans::files(&args.mappings, "mapping") {
        mappings.push((stem(&path), read_mapping(&path)?));
    }
    let mut used = vec![false; mappings.len()];
    for path in plans::files(&args.plans, "tile") {
        let plan = read_plan(&path, &[])?;
        for (k, (file, mapping)) in mappings.iter().enumerate().filter(|(_, (_, m))| is_for(m, &plan)) {
            used[k] = true;
            let name = format!("{}.tile by {file}", stem(&path));
            list.push(Item::Mapped { name, plan: Box::new(plan.clone()), mapping: mapping.clone() });
        }
    }
    for (file, text) in einfall_kernels::SOURCES {
        let module = parse(text).map_err(|d| Failure::Wrong(format!("{file}: {d:?}")))?;
        for c in module.cascades {
            let name = format!("{file}/{}", c.name);
            let plan = match einfall::cuda::plan(&c) {
                Ok(plan) => plan,
                Err(e) => {
                    list.push(Item::Skipped(format!("{name}: {}", first_line(&e))));
                    continue;
                }
            };
            for (k, (by, mapping)) in mappings.iter().enumerate().filter(|(_, (_, m))| is_for(m, &plan)) {
                used[k] = true;
                let (name, mapping) = (format!("{name} by {by}"), Some(mapping.clone()));
                list.push(Item::Cascade { name, cascade: Box::new(c.clone()), mapping });
            }
            list.push(Item::Cascade { name, cascade: Box::new(c), mapping: None });
        }
    }
    for ((file, mapping), used) in mappings.iter().zip(used) {
        if !used {
            list.push(Item::Skipped(format!("{file}: there is no plan `{}` with its kernels", mapping.plan)));
        }
    }
    for seed in 0..STREAMS {
        let Drawn { plan, mapping, .. } = drawn(seed).map_err(Failure::Wrong)?;
        list.push(Item::Mapped { name: format!("random stream {seed}"), plan: Box::new(plan), mapping });
    }
    list.extend(Probe::all().into_iter().map(|p| Item::Probe(Box::new(p))));
    let cases = large::CASES.iter().enumerate().filter(|_| args.large);
    list.extend(cases.map(|(case, (file, ..))| Item::Large { name: format!("{file} large"), case }));
    list.retain(|i| args.filter.as_ref().is_none_or(|f| i.name().contains(f.as_str())));
    Ok(list)
}

fn stem(path: &std::path::Path) -> String {
    path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
}

fn first_line(e: &impl std::fmt::Display) -> String {
    e.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Tests everything in child processes and prints a closing line.
pub fn selftest(args: &SelftestArgs, device: usize) -> Result<(), Failure> {
    let items = items(args)?;
    if let Some(first) = args.worker {
        let engine = super::engine(device)?;
        let stream = engine.runtime().stream().map_err(Failure::machine)?;
        work(first, args.step, items.len(), |i| items[i].name(), |i| item(&engine, &stream, &items[i], args));
        return Ok(());
    }
    drop(super::engine(device)?);
    let mut arguments = vec!["selftest".to_owned(), "--device".to_owned(), format!("cuda:{device}")];
    let path = |p: &PathBuf| p.display().to_string();
    arguments.extend(["--plans".to_owned(), path(&args.plans), "--mappings".to_owned(), path(&args.mappings)]);
    arguments.extend(["--seed".to_owned(), args.seed.to_string(), "--sizes".to_owned(), args.sizes.to_string()]);
    if let Some(f) = &args.filter {
        arguments.extend(["--filter".to_owned(), f.clone()]);
    }
    if args.large {
        arguments.push("--large".to_owned());
    }
    let t = supervise(&arguments, items.len(), args.jobs, Duration::from_secs(args.silence))?;
    println!("{} passed, {} failed, {} skipped", t.passed, t.failed, t.skipped);
    if t.failed == 0 { Ok(()) } else { Err(Failure::Wrong(format!("{} comparisons failed", t.failed))) }
}

/// Tests one item.
fn item(engine: &Engine, stream: &Stream, item: &Item, args: &SelftestArgs) -> Tally {
    let mut t = Tally::default();
    let (name, compiled) = match item {
        Item::Skipped(why) => {
            println!("skip {why}");
            return Tally { skipped: 1, ..t };
        }
        Item::Large { name, case } => {
            let (tally, line) = match large::check(engine, stream, &large::CASES[*case], args.seed) {
                Ok(what) => (Tally { passed: 1, ..t }, format!("ok   {what}")),
                Err(e) => (Tally { failed: 1, ..t }, format!("FAIL {name}: {e}")),
            };
            println!("{line}");
            return tally;
        }
        Item::Mapped { name, plan, mapping } => (name, engine.compile_plan(plan, mapping)),
        Item::Probe(p) => (&p.name, engine.compile_plan(&p.plan, &p.mapping)),
        Item::Cascade { name, cascade, mapping } => {
            let options = CompileOptions { mapping: mapping.clone(), ..CompileOptions::default() };
            (name, engine.compile_with(cascade, &options))
        }
    };
    let kernel = match compiled {
        Ok(kernel) => kernel,
        Err(e @ einfall::Error::Refused { .. }) => {
            println!("skip {name}: {}", first_line(&e));
            return Tally { skipped: 1, ..t };
        }
        Err(e) => {
            println!("FAIL {name}: {e}");
            return Tally { failed: 1, ..t };
        }
    };
    let before = engine.runtime().assembled();
    let mut report = |what: String, done: Result<Outcome, String>| match done {
        Ok(Outcome::Agrees) => {
            t.passed += 1;
            alive();
        }
        Ok(Outcome::Refused(why)) => {
            println!("skip {name} at {what}: {why}");
            t.skipped += 1;
        }
        Err(e) => {
            println!("FAIL {name} at {what}: {e}");
            t.failed += 1;
            if e.contains("nothing more can run") || e.contains("not used any more") {
                // The device is of no use to this process: the parent starts another after this item.
                std::process::exit(9);
            }
        }
    };
    let variants = [Variant::Normal, Variant::Uniform, Variant::Integers, Variant::Small];
    match item {
        Item::Mapped { plan, mapping, .. } => {
            for (i, sizes) in edge_sizes(plan, mapping).into_iter().enumerate() {
                let what = named(plan.ranks.iter().map(|(_, r)| r.name.as_str()), &sizes);
                let seed = args.seed + i as u64;
                let done = mapped(&kernel, stream, plan, &sizes, seed, variants[i % variants.len()], i == 0);
                report(what, done);
            }
        }
        Item::Cascade { cascade, .. } => {
            let mut state = args.seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
            for i in 0..args.sizes {
                let Some(b) = draw(cascade, &mut state) else {
                    report("any size".to_owned(), Err("no sizes satisfy its facts".to_owned()));
                    break;
                };
                let what = named(cascade.ranks.iter().map(|(_, r)| r.name.as_str()), &b.extents);
                let seed = next(&mut state);
                report(what, one(&kernel, stream, cascade, &b, seed, i == 0));
            }
            for (i, b) in edges(cascade, &kernel).into_iter().enumerate() {
                let what = named(cascade.ranks.iter().map(|(_, r)| r.name.as_str()), &b.extents);
                let seed = next(&mut state);
                report(what, one(&kernel, stream, cascade, &b, seed, i == 0));
            }
        }
        Item::Probe(probe) => {
            for hot in Probe::sweep() {
                report(format!("{hot:?}"), probed(&kernel, stream, probe, hot));
            }
        }
        Item::Large { .. } | Item::Skipped(_) => {}
    }
    // A kernel's variants are assembled when sizes and arrays first choose them, and never again.
    if engine.runtime().assembled() - before > kernel.executable().variants() as u64 {
        report("its sizes".to_owned(), Err("a size was compiled for; one code must serve all".to_owned()));
    }
    let info: Vec<String> = kernel
        .executable()
        .functions()
        .map(|f| format!("{} registers{}", f.registers, spills(f.local_bytes)))
        .collect();
    println!("{} {name}: {} agree ({})", if t.failed == 0 { "ok  " } else { "BAD " }, t.passed, info.join("; "));
    t
}

fn spills(bytes: u32) -> String {
    if bytes == 0 { String::new() } else { format!(", {bytes} bytes local") }
}

fn named<'a>(names: impl Iterator<Item = &'a str>, sizes: &[u64]) -> String {
    names.zip(sizes).map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(",")
}

/// What became of one comparison that did not fail.
enum Outcome {
    Agrees,
    /// The sizes or arrays are refused before anything runs.
    Refused(String),
}

/// A plan at some sizes; `repeat`: again and again, bit by bit.
fn mapped(
    kernel: &Kernel,
    stream: &Stream,
    plan: &Plan,
    sizes: &[u64],
    seed: u64,
    variant: Variant,
    repeat: bool,
) -> Result<Outcome, String> {
    let sized: Vec<(&str, u64)> = plan.ranks.iter().zip(sizes).map(|((_, r), n)| (r.name.as_str(), *n)).collect();
    let bound = match kernel.bind(&sized) {
        Ok(bound) => bound,
        Err(e) => return Ok(Outcome::Refused(first_line(&e))),
    };
    let case = plans::case(plan, sizes, seed, variant, BUDGET)?;
    let inputs: Vec<(&str, &einfall_ir::array::Array)> = case.inputs.iter().map(|(n, a)| (n.as_str(), a)).collect();
    let outputs = match bound.run_values(stream, &inputs) {
        Ok(outputs) => outputs,
        Err(e) => return refused_or(e),
    };
    plans::compare(&case.expected, &outputs)?;
    if repeat {
        repeated(&bound, stream, &inputs, &outputs)?;
    }
    Ok(Outcome::Agrees)
}

/// A probe with one element, or one in every row: exactly the expected row or column.
fn probed(kernel: &Kernel, stream: &Stream, probe: &Probe, hot: Hot) -> Result<Outcome, String> {
    let [m, n, k] = probes::SHAPE;
    let bound = match kernel.bind(&[("M", m), ("N", n), ("K", k)]) {
        Ok(bound) => bound,
        Err(e) => return Ok(Outcome::Refused(first_line(&e))),
    };
    let ([a, b], want) = probe.case(hot);
    let outputs = match bound.run_values(stream, &[("A", &a), ("B", &b)]) {
        Ok(outputs) => outputs,
        Err(e) => return refused_or(e),
    };
    let got = outputs.first().ok_or("no output")?.1.to_values().map_err(text)?;
    match got.data.iter().zip(&want).position(|(x, y)| x != y) {
        None => Ok(Outcome::Agrees),
        Some(i) => Err(format!("D[{}, {}] is {}, not {}", i as u64 / n, i as u64 % n, got.data[i], want[i])),
    }
}

/// Sizes around the edges of the blocks that a cascade was mapped with, where its facts hold. Where the evaluator would be
/// busy for minutes with what stands between inputs and outputs, ranks that are not at another edge than the first are
/// small, the longest of them first.
fn edges(c: &Cascade, kernel: &Kernel) -> Vec<Bindings> {
    let plan = kernel.plan();
    let free: Vec<bool> = plan.ranks.iter().map(|(_, r)| r.fixed.is_none()).collect();
    let bound = |sizes: &[u64]| {
        let sizes = plan.ranks.iter().zip(sizes).filter(|((_, r), _)| r.fixed.is_none());
        let sizes = sizes.map(|((_, r), n)| (r.name.clone(), *n)).collect();
        let b = bind(c, &Given { sizes, ..Given::default() }).ok()?;
        check_facts(c, &b, &[]).is_ok().then_some(b)
    };
    let list = edge_sizes(plan, kernel.mapping());
    let first = list.first().cloned().unwrap_or_default();
    let light = |mut sizes: Vec<u64>| {
        let mut b = bound(&sizes)?;
        let mut same: Vec<usize> = (0..sizes.len()).filter(|r| free[*r] && sizes[*r] == first[*r]).collect();
        same.sort_by_key(|r| sizes[*r]);
        while compare::inner_points(c, &b) > INNER
            && let Some(r) = same.pop()
        {
            let before = sizes[r];
            sizes[r] = before.min(FEW);
            match bound(&sizes) {
                Some(fewer) => b = fewer,
                None => sizes[r] = before,
            }
        }
        Some(b)
    };
    list.into_iter().filter_map(light).collect()
}

/// A cascade at some sizes.
fn one(
    kernel: &Kernel,
    stream: &Stream,
    c: &Cascade,
    b: &Bindings,
    seed: u64,
    repeat: bool,
) -> Result<Outcome, String> {
    let values = random(c, b, seed, Variant::Small).map_err(|e| e.to_string())?;
    let sizes: Vec<(&str, u64)> = c.ranks.iter().zip(&b.extents).map(|((_, r), n)| (r.name.as_str(), *n)).collect();
    let bound = match kernel.bind(&sizes) {
        Ok(bound) => bound,
        Err(e) => return Ok(Outcome::Refused(first_line(&e))),
    };
    let inputs: Vec<(&str, &einfall_ir::array::Array)> =
        c.params.iter().zip(&values).map(|(p, a)| (c.tensors[*p].name.as_str(), a)).collect();
    let outputs = match bound.run_values(stream, &inputs) {
        Ok(outputs) => outputs,
        Err(e) => return refused_or(e),
    };
    compare::outputs_within(c, b, &values, &outputs, seed, BUDGET as u64).map_err(|e| match e {
        Failure::Wrong(m) | Failure::Usage(m) | Failure::Machine(m) => m,
    })?;
    if repeat {
        repeated(&bound, stream, &inputs, &outputs)?;
    }
    Ok(Outcome::Agrees)
}

/// Sizes and arrays that a kernel does not take are skipped, everything else is a failure.
fn refused_or(e: einfall::Error) -> Result<Outcome, String> {
    use einfall_runtime::cuda::CudaError;
    match &e {
        einfall::Error::Runtime(einfall_runtime::Error::Cuda(
            CudaError::TensorMap { .. } | CudaError::Launch { .. } | CudaError::Extent { .. },
        )) => Ok(Outcome::Refused(first_line(&e))),
        _ => Err(e.to_string()),
    }
}

/// The same launch on the same arrays, outputs poisoned in between, gives the same bits; by itself and as a graph.
fn repeated(
    bound: &einfall::cuda::Bound,
    stream: &Stream,
    inputs: &[(&str, &einfall_ir::array::Array)],
    outputs: &[(String, HostArray)],
) -> Result<(), String> {
    let in_place = |n: &str| inputs.iter().any(|(i, _)| *i == n);
    let mut arguments = Arguments::new();
    let mut results = Vec::new();
    for (name, host) in outputs {
        if in_place(name) {
            // Updated in place: a second run starts from other values.
            return Ok(());
        }
        let array = bound.runtime().array(name).map_err(text)?;
        arguments = arguments.output(name, &array);
        results.push((name, array, host));
    }
    for (name, a) in inputs {
        match a.dims.is_empty() {
            true => arguments = arguments.scalar(name, a.data[0]),
            false => {
                let array = bound.runtime().array(name).map_err(text)?;
                let host = HostArray::from_values(a).map_err(text)?;
                array.copy_from(stream, &host).map_err(text)?;
                arguments = arguments.input(name, &array);
            }
        }
    }
    let prepared = bound.prepare(arguments).map_err(text)?;
    let graph = prepared.graph().map_err(text)?;
    for turn in 0..REPEATS {
        for (_, array, _) in &results {
            array.fill(stream, 0xff).map_err(text)?;
        }
        match turn % 2 {
            0 => prepared.launch(stream).map_err(text)?,
            _ => graph.launch(stream).map_err(text)?,
        }
        for (name, array, host) in &results {
            let again = array.to_host(stream).map_err(text)?;
            if again.bytes() != host.bytes() {
                return Err(format!("run {turn} gives other bits in `{name}`"));
            }
        }
    }
    Ok(())
}
