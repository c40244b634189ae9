//! `bench --device cuda`: the peers' cases under the peers' names, timed by events on the device.
//!
//! As the peers' script does: random data, warm-up, the level-2 cache overwritten before every launch, the median of
//! the launches within a budget. Several mappings of a case take turns on the same arrays, block by block.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use einfall::CompileOptions;
use einfall::cuda::{Bound, Engine, Kernel};
use einfall_ir::cascade::parse;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::Engine as Copy;
use einfall_ir::mapping::Mapping;
use einfall_ir::tile::{BufferKind, Plan};
use einfall_runtime::cuda::{Arguments, DeviceArray, Prepared, Stream};
use einfall_runtime::{ArrayError, HostArray};

use super::super::Failure;
use super::super::bench::cases::Measure;
use super::super::bench::{BenchArgs, no_case};
use super::super::lower::read_mapping;
use super::Random;
use super::plans::{self, is_for, read_plan};
use super::supervise::{Tally, supervise, work};

/// One case: library cascades and reference plans that compute it, its sizes, and the name the peers' script gives it.
struct Case {
    family: &'static str,
    name: String,
    cascade: &'static str,
    /// Tensors that the peers keep in bf16, whatever the library's file says.
    bf16: &'static [&'static str],
    /// Ranks that a program knows when it compiles, as the peers do: with them fixed the model's choice is timed again.
    fixed: &'static [&'static str],
    plans: &'static [&'static str],
    /// Reference mappings of the cascade, beside the folder of plans: timed with the model's choice.
    mappings: &'static [&'static str],
    sizes: Vec<(&'static str, u64)>,
    measure: Measure,
}

fn cases() -> Vec<Case> {
    let mut list = Vec::new();
    let gemm = [
        (4096, 4096, 4096),
        (8192, 8192, 8192),
        (16384, 4096, 4096),
        (128, 14336, 4096),
        (1024, 1024, 1024),
        (2048, 2048, 2048),
        (16, 4096, 4096),
        (64, 7168, 2112),
        (128, 24576, 1536),
        (1, 4096, 4096),
    ];
    for (m, n, k) in gemm {
        list.push(Case {
            family: "gemm",
            name: format!("m{m}_n{n}_k{k}_bf16"),
            cascade: "matmul",
            bf16: &[],
            fixed: &[],
            plans: &["gemm"],
            mappings: &[],
            sizes: vec![("M", m), ("N", n), ("K", k)],
            measure: Measure::Flops(2.0 * m as f64 * n as f64 * k as f64),
        });
    }
    let attention = [
        (4, 16, 16, 4096, 64, true),
        (4, 16, 16, 4096, 128, false),
        (4, 16, 16, 4096, 128, true),
        (1, 16, 16, 16384, 128, false),
        (1, 16, 16, 16384, 128, true),
        (2, 32, 8, 8192, 128, true),
        (4, 8, 8, 4096, 256, true),
        (16, 16, 16, 1024, 128, true),
    ];
    for (b, hq, hkv, n, d, causal) in attention {
        let flops = 4.0 * (b * hq) as f64 * n as f64 * n as f64 * d as f64 * if causal { 0.5 } else { 1.0 };
        list.push(Case {
            family: "attn_fwd",
            name: format!("b{b}_h{hq}_kv{hkv}_n{n}_d{d}_{}", if causal { "causal" } else { "full" }),
            cascade: if causal { "attention" } else { "attention_full" },
            bf16: &[],
            fixed: &[],
            plans: if causal { &["attention"] } else { &["attention_full"] },
            mappings: &[],
            // H counts the heads of K and V, R those of Q for each.
            sizes: vec![("B", b), ("H", hkv), ("G", hkv), ("R", hq / hkv), ("M", n), ("N", n), ("E", d), ("F", d)],
            measure: Measure::Flops(flops),
        });
    }
    for (b, hq, hkv, n, d) in [(64, 32, 8, 8192, 128), (1, 32, 8, 131_072, 128), (16, 64, 8, 32_768, 128)] {
        list.push(Case {
            family: "attn_decode",
            name: format!("b{b}_h{hq}_kv{hkv}_ctx{n}_d{d}"),
            cascade: "attention_gqa",
            bf16: &[],
            fixed: &[],
            plans: &["decode", "attention_decode"],
            mappings: &["attention_decode", "attention_decode_ahead"],
            sizes: vec![("B", b), ("H", hkv), ("G", hkv), ("R", hq / hkv), ("M", 1), ("N", n), ("E", d), ("F", d)],
            measure: Measure::Bytes(2.0 * (b * hkv * n * d) as f64 * 2.0),
        });
    }
    for (rows, d) in [(16384, 4096), (4096, 8192), (65536, 1024)] {
        for cascade in ["layernorm", "rmsnorm"] {
            list.push(Case {
                family: "norm",
                name: format!("{cascade}_{rows}x{d}_bf16"),
                cascade,
                bf16: &["gamma", "beta"],
                fixed: &["K"],
                plans: &[],
                mappings: &[],
                sizes: vec![("M", rows), ("K", d), ("N", d)],
                measure: Measure::Bytes(2.0 * (rows * d) as f64 * 2.0),
            });
        }
    }
    for (b, t, h, d) in [(16, 1024, 12, 64), (16, 1024, 6, 128), (16, 1024, 48, 16), (16, 1024, 24, 32)] {
        list.push(Case {
            family: "rnn_fwd",
            name: format!("lstm_b{b}_t{t}_h{h}_d{d}"),
            cascade: "lstm",
            bf16: &[],
            fixed: &[],
            plans: &["lstm", "lstm_gates"],
            mappings: &[],
            sizes: vec![("T", t), ("B", b), ("H", h), ("D", d)],
            measure: Measure::Time,
        });
    }
    list
}

/// One line of output, with the peers' field names.
#[derive(serde::Serialize)]
struct Row {
    family: String,
    case: String,
    peer: &'static str,
    mapping: String,
    block: usize,
    ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    tflops: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gbps: Option<f64>,
    launches: usize,
    build_s: f64,
    kernels: usize,
    atoms: Vec<String>,
    copy_engines: Vec<String>,
    registers: Vec<u32>,
    local_bytes: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sm_mhz: Option<u32>,
    device: String,
}

/// A case that was not timed.
#[derive(serde::Serialize)]
struct Fault {
    family: String,
    case: String,
    peer: &'static str,
    mapping: String,
    error: String,
}

/// A way to compute a case.
enum Way {
    Plan(Box<Plan>, Mapping),
    /// A mapping, or the model's choice.
    Cascade(Option<Mapping>),
    /// The model's choice with some ranks fixed.
    Fixed,
}

/// The ways of a case: every mapping given that fits one of its plans; without any mapping given, the model's choice
/// and the reference mappings where there are some.
fn ways(case: &Case, mappings: &[(String, Mapping)], folder: &Path) -> Result<Vec<(String, Way)>, Failure> {
    let cascade = library(case, &[])?;
    let own = einfall::cuda::plan(&cascade).ok();
    let mut list = Vec::new();
    for (name, m) in mappings {
        if own.as_ref().is_some_and(|p| is_for(m, p)) {
            list.push((name.clone(), Way::Cascade(Some(m.clone()))));
            continue;
        }
        for file in case.plans {
            let path = folder.join(format!("{file}.tile"));
            if m.plan == *file && path.exists() {
                let plan = read_plan(&path, &[])?;
                if is_for(m, &plan) {
                    list.push((name.clone(), Way::Plan(Box::new(plan), m.clone())));
                }
            }
        }
    }
    if mappings.is_empty() {
        list.push(("model".to_owned(), Way::Cascade(None)));
        if !case.fixed.is_empty() {
            list.push((format!("model, {} fixed", case.fixed.join(", ")), Way::Fixed));
        }
        for m in case.mappings {
            let path = folder.join("../mappings").join(format!("{m}.mapping"));
            if path.exists() {
                list.push((path.display().to_string(), Way::Cascade(Some(read_mapping(&path)?))));
            }
        }
    }
    Ok(list)
}

/// The library's cascade with some of its ranks fixed at the case's sizes.
fn library(case: &Case, fixed: &[&str]) -> Result<einfall_ir::cascade::Cascade, Failure> {
    let text = einfall_kernels::source(case.cascade).expect("a library file");
    let module = parse(text).map_err(|d| Failure::Wrong(format!("{}: {d:?}", case.cascade)))?;
    let mut cascade = module.cascades.into_iter().next_back().expect("a cascade");
    let named = |t: &einfall_ir::cascade::Tensor| case.bf16.contains(&t.name.as_str());
    cascade.tensors.iter_mut().filter(|(_, t)| named(t)).for_each(|(_, t)| t.dtype = DType::BF16);
    for (_, rank) in cascade.ranks.iter_mut().filter(|(_, r)| fixed.contains(&r.name.as_str())) {
        rank.fixed = case.sizes.iter().find(|(n, _)| *n == rank.name).map(|(_, size)| *size);
    }
    Ok(cascade)
}

/// Times every case of the family, each in a process that may fail.
pub fn bench(args: &BenchArgs, device: usize) -> Result<(), Failure> {
    let list: Vec<Case> = cases().into_iter().filter(|c| args.wants(c.family, &c.name)).collect();
    if list.is_empty() {
        return Err(no_case());
    }
    let Some(first) = args.worker else {
        drop(super::engine(device)?);
        let mut arguments = vec!["bench".to_owned(), "--device".to_owned(), format!("cuda:{device}")];
        let mut push = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        args.family.iter().for_each(|f| push("--family", f.clone()));
        args.case.iter().for_each(|c| push("--case", c.clone()));
        args.mapping.iter().for_each(|m| push("--mapping", m.display().to_string()));
        push("--plans", args.plans.display().to_string());
        push("--budget-ms", args.budget_ms.to_string());
        push("--blocks", args.blocks.to_string());
        if args.jsonl {
            arguments.push("--jsonl".to_owned());
        }
        let t = supervise(&arguments, list.len(), 1, Duration::from_secs(60))?;
        return if t.failed == 0 { Ok(()) } else { Err(Failure::Wrong(format!("{} cases were not timed", t.failed))) };
    };
    let engine = super::engine(device)?;
    let stream = engine.runtime().stream().map_err(Failure::machine)?;
    let named = |p: &PathBuf| Ok((p.display().to_string(), read_mapping(p)?));
    let mappings = args.mapping.iter().map(named).collect::<Result<Vec<_>, Failure>>()?;
    // As large as the level-2 cache several times over.
    let flush = engine.runtime().array(DType::U8, &[1 << 28]).map_err(Failure::machine)?;
    work(
        first,
        args.step,
        list.len(),
        |i| &list[i].name,
        |i| {
            let done =
                ways(&list[i], &mappings, &args.plans).and_then(|w| one(&engine, &stream, &flush, &list[i], w, args));
            match done {
                Ok(tally) => tally,
                Err(Failure::Wrong(m) | Failure::Usage(m) | Failure::Machine(m)) => {
                    fault(&list[i], "", &m);
                    if m.contains("nothing more can run") || m.contains("not used any more") {
                        std::process::exit(9);
                    }
                    Tally { failed: 1, ..Tally::default() }
                }
            }
        },
    );
    Ok(())
}

fn fault(case: &Case, mapping: &str, error: &str) {
    let (family, case, error) = (case.family.to_owned(), case.name.clone(), error.to_owned());
    let row = Fault { family, case, peer: "einfall", mapping: mapping.to_owned(), error };
    println!("{}", serde_json::to_string(&row).unwrap_or_default());
}

/// A way that is ready to run.
struct Ready {
    mapping: String,
    kernel: Kernel,
    prepared: Prepared,
    build_s: f64,
}

/// Times every way of one case, block by block in turns.
fn one(
    engine: &Engine,
    stream: &Stream,
    flush: &DeviceArray,
    case: &Case,
    ways: Vec<(String, Way)>,
    args: &BenchArgs,
) -> Result<Tally, Failure> {
    let mut tally = Tally::default();
    let mut arrays: Vec<(String, DeviceArray)> = Vec::new();
    let mut ready = Vec::new();
    for (mapping, way) in ways {
        match prepare(engine, stream, case, &way, &mut arrays) {
            Ok((kernel, prepared, build_s)) => ready.push(Ready { mapping, kernel, prepared, build_s }),
            Err(e) => {
                let text = e.to_string();
                fault(case, &mapping, &text);
                tally.failed += 1;
            }
        }
    }
    for block in 0..args.blocks {
        for r in &ready {
            let (ms, launches) = time(engine, stream, flush, &r.prepared, Duration::from_millis(args.budget_ms))?;
            print(engine, case, r, block, ms, launches, args.jsonl)?;
            tally.passed += u64::from(block == 0);
        }
    }
    Ok(tally)
}

/// Compiles a way and puts its arrays in place; arrays of one name, type and strides are shared between ways.
fn prepare(
    engine: &Engine,
    stream: &Stream,
    case: &Case,
    way: &Way,
    arrays: &mut Vec<(String, DeviceArray)>,
) -> Result<(Kernel, Prepared, f64), einfall::Error> {
    let start = Instant::now();
    let kernel = match way {
        Way::Plan(plan, mapping) => engine.compile_plan(plan, mapping)?,
        Way::Cascade(_) | Way::Fixed => {
            let (fixed, mapping) = match way {
                Way::Cascade(m) => (&[][..], m.clone()),
                Way::Fixed | Way::Plan(..) => (case.fixed, None),
            };
            let cascade = library(case, fixed).map_err(|_| einfall::Error::Size("a library file".to_owned()))?;
            // Without a mapping the model's for just these sizes.
            let mapping = mapping.map(Ok).unwrap_or_else(|| {
                let plan = einfall::cuda::plan(&cascade)?;
                let sizes: Vec<(String, u64)> = case.sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
                let ranks = plans::ranks(&plan, &sizes).ok();
                Ok::<_, einfall::Error>(einfall_autotune::model_gpu::choose(
                    &plan,
                    engine.data_sheet(),
                    ranks.as_deref(),
                ))
            })?;
            engine.compile_with(&cascade, &CompileOptions { mapping: Some(mapping), ..CompileOptions::default() })?
        }
    };
    let names: Vec<&str> = kernel.executable().ranks().collect();
    let sizes: Vec<(&str, u64)> = case.sizes.iter().filter(|(n, _)| names.contains(n)).copied().collect();
    let bound = kernel.bind(&sizes)?;
    let compiled = start.elapsed();
    let arguments = fill(&bound, stream, arrays)?;
    // Variants are assembled here; making the arrays does not count.
    let start = Instant::now();
    let prepared = bound.prepare(arguments)?;
    prepared.launch(stream).map_err(einfall_runtime::Error::from)?;
    stream.synchronize().map_err(einfall_runtime::Error::from)?;
    Ok((kernel, prepared, (compiled + start.elapsed()).as_secs_f64()))
}

/// Random arrays for every parameter.
pub fn fill<'a>(
    bound: &'a Bound,
    stream: &Stream,
    arrays: &mut Vec<(String, DeviceArray)>,
) -> Result<Arguments<'a>, einfall::Error> {
    let mut arguments = Arguments::new();
    let failed = |e| einfall::Error::Runtime(einfall_runtime::Error::Cuda(e));
    let specs: Vec<_> = bound.runtime().arrays().collect();
    for (i, spec) in specs.iter().enumerate() {
        if spec.shape.is_empty() && spec.kind == BufferKind::Input {
            // Scalars scale; those of a cascade have their defaults.
            let value = 0.125;
            arguments = arguments.scalar(spec.name, value);
            continue;
        }
        let array = bound.runtime().array(spec.name)?;
        let same = |a: &DeviceArray| {
            a.dtype() == array.dtype() && a.shape() == array.shape() && a.strides() == array.strides()
        };
        let array = match arrays.iter().find(|(n, a)| n == spec.name && same(a)) {
            Some((_, a)) => a.clone(),
            None => {
                let host = values(spec.dtype, spec.shape, i as u64).map_err(|e| einfall::Error::Runtime(e.into()))?;
                array.copy_from(stream, &host).map_err(failed)?;
                arrays.push((spec.name.to_owned(), array.clone()));
                array
            }
        };
        arguments = match spec.kind {
            BufferKind::Output | BufferKind::InOut => arguments.output(spec.name, &array),
            BufferKind::Input | BufferKind::Workspace => arguments.input(spec.name, &array),
        };
    }
    Ok(arguments)
}

/// Near-normal values; small integers for integer types.
pub fn values(dtype: DType, shape: &[u64], seed: u64) -> Result<HostArray, ArrayError> {
    let mut array = HostArray::zeros(dtype, shape)?;
    let mut random = Random::new(seed + 1);
    match dtype {
        DType::BF16 => array.bytes_mut().chunks_exact_mut(2).for_each(|b| {
            // Truncation is as random as the value.
            b.copy_from_slice(&((random.normal().to_bits() >> 16) as u16).to_le_bytes());
        }),
        DType::F32 => {
            array.bytes_mut().chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&random.normal().to_le_bytes()));
        }
        DType::F16 => {
            let elems = array.elems() as usize;
            let list = einfall_ir::array::Array::from_fn(dtype, &[elems as u64], |_| f64::from(random.normal()));
            array.bytes_mut().copy_from_slice(HostArray::from_values(&list)?.bytes());
        }
        _ => array.bytes_mut().iter_mut().for_each(|b| *b = (random.word() >> 63) as u8),
    }
    Ok(array)
}

/// Median milliseconds of a launch, and of how many. The cache is overwritten before each.
fn time(
    engine: &Engine,
    stream: &Stream,
    flush: &DeviceArray,
    prepared: &Prepared,
    budget: Duration,
) -> Result<(f64, usize), Failure> {
    let fail = |e: einfall_runtime::cuda::CudaError| Failure::wrong(e);
    let run = |n: usize, flushed: bool| -> Result<Vec<f64>, einfall_runtime::cuda::CudaError> {
        let mut events = Vec::new();
        for _ in 0..n {
            if flushed {
                flush.fill(stream, 0)?;
            }
            let (start, end) = (engine.runtime().event()?, engine.runtime().event()?);
            stream.record(&start)?;
            prepared.launch(stream)?;
            stream.record(&end)?;
            events.push((start, end));
        }
        stream.synchronize()?;
        events.iter().map(|(a, b)| b.milliseconds_since(a)).collect()
    };
    // Five launches say how many fit the budget; a third of them warm up.
    let first = run(5, true).map_err(fail)?;
    let estimate = first.iter().sum::<f64>() / first.len() as f64 + 0.1;
    let n = ((budget.as_secs_f64() * 1e3 / estimate) as usize).clamp(10, 2000);
    run(n.div_ceil(3), true).map_err(fail)?;
    let mut samples = run(n, true).map_err(fail)?;
    samples.sort_by(f64::total_cmp);
    Ok((samples[samples.len() / 2], n))
}

fn print(
    engine: &Engine,
    case: &Case,
    r: &Ready,
    block: usize,
    ms: f64,
    launches: usize,
    jsonl: bool,
) -> Result<(), Failure> {
    let (tflops, gbps) = case.measure.rates(ms / 1e3);
    let kernels = &r.kernel.mapping().kernels;
    let mut engines: Vec<String> = kernels
        .iter()
        .flat_map(|k| k.tiles.iter().filter_map(|t| t.engine).chain(k.ops.iter().filter_map(|o| o.engine)))
        .map(|e| match e {
            Copy::Tma => "tma".to_owned(),
            Copy::CpAsync => "cp_async".to_owned(),
        })
        .collect();
    engines.sort();
    engines.dedup();
    let launched = r.prepared.symbols();
    let functions = || r.kernel.executable().functions().filter(|f| launched.contains(&f.symbol));
    let row = Row {
        family: case.family.to_owned(),
        case: case.name.clone(),
        peer: "einfall",
        mapping: r.mapping.clone(),
        block,
        ms,
        tflops,
        gbps,
        launches,
        build_s: r.build_s,
        kernels: launched.len(),
        atoms: kernels.iter().flat_map(|k| &k.ops).filter_map(|o| o.atom.clone()).collect(),
        copy_engines: engines,
        registers: functions().map(|f| f.registers).collect(),
        local_bytes: functions().map(|f| f.local_bytes).collect(),
        sm_mhz: engine.runtime().gpu().clocks().map(|c| c.sm_mhz),
        device: engine.runtime().gpu().name.clone(),
    };
    if jsonl {
        println!("{}", serde_json::to_string(&row).map_err(Failure::wrong)?);
        return Ok(());
    }
    let rate = tflops.map(|t| format!("{t:8.1} TFLOP/s")).or(gbps.map(|g| format!("{g:8.1} GB/s"))).unwrap_or_default();
    let clock = row.sm_mhz.map(|c| format!("{c} MHz")).unwrap_or_default();
    println!(
        "{:11} {:32} {:40} {:9.4} ms {rate}  {} kernels  {clock}",
        row.family, row.case, row.mapping, row.ms, row.kernels
    );
    Ok(())
}
