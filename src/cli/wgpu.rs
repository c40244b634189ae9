//! Commands on an adapter of WebGPU.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use einfall::CompileOptions;
use einfall::wgpu::{Bound, Engine, Kernel, data_sheet};
use einfall_ir::array::Array;
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::dtype::DType;
use einfall_ir::mapping::Mapping;
use einfall_ir::tile::BufferKind;
use einfall_runtime::HostArray;
use einfall_runtime::wgpu::{Arguments, Prepared, WgpuError, adapters};

use super::Failure;
use super::bench::{BenchArgs, Case, Row, cases, retyped};
use super::device::{SelftestArgs, next, suite};
use super::lower::read_mapping;
use super::source::{Source, sizes};

/// Opens an adapter by name.
pub fn engine(name: Option<&str>) -> Result<Engine, Failure> {
    Engine::new(name).map_err(Failure::machine)
}

/// Lists adapters and what they offer.
pub fn devices() {
    let all = adapters();
    if all.is_empty() {
        println!("wgpu\n  no adapter: there is no Vulkan driver");
    }
    for a in all {
        let kind = if a.software { ", a processor" } else { "" };
        println!("wgpu:{}", a.name);
        println!("  {} through {}{kind}; data sheet {}", a.driver, a.backend, data_sheet(&a).name);
        let subgroups = match a.subgroup {
            (0, _) => "no subgroups".to_owned(),
            (least, most) => format!("subgroups of {least} to {most}"),
        };
        let has = |b: bool| if b { "" } else { "no " };
        println!("  {subgroups}, {}f16, {}timestamps", has(a.f16), has(a.timestamps));
        println!(
            "  {} bytes of workgroup memory, {} invocations a workgroup, {} storage buffers of up to {} bytes",
            a.workgroup_bytes, a.invocations, a.storage_buffers, a.binding_bytes
        );
    }
}

/// The differential suite: every library cascade at drawn sizes against the float64 evaluator, guard bytes around every
/// array.
pub fn selftest(args: &SelftestArgs, name: Option<&str>) -> Result<(), Failure> {
    let engine = engine(name)?;
    let adapter = engine.runtime().adapter();
    println!("{}, subgroups of {} to {}", adapter.name, adapter.subgroup.0, adapter.subgroup.1);
    let compile = |c: &Cascade| engine.compile(c);
    suite(args, compile, |c, kernel, sizes, inputs| {
        let names = c.params.iter().map(|p| c.tensors[*p].name.as_str());
        kernel.bind(sizes)?.run_values(&names.zip(inputs).collect::<Vec<_>>())
    })
}

/// One way to run a case, ready to be timed.
struct Ready {
    mapping: String,
    kernel: Kernel,
    bound: Bound,
    prepared: Prepared,
    build_s: f64,
}

/// Times every case of the family, or the cascade of a file, by the device's own clock: rounds of launches in one
/// submission, the median of several. Several mappings take turns, as often as `--blocks` says, a line each time: what
/// differs between two lines of one mapping is the device's, not the mapping's.
pub fn bench(args: &BenchArgs, name: Option<&str>) -> Result<(), Failure> {
    let list = match &args.file {
        Some(file) => {
            let source = Source::read(file)?;
            let c = source.cascade(args.cascade.as_deref())?;
            let sizes = sizes(&args.size);
            let name = sizes.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(",");
            vec![(c.name.clone(), name, c, sizes)]
        }
        None => library(args)?,
    };
    let engine = engine(name)?;
    let named = |p: &PathBuf| Ok((p.display().to_string(), Some(read_mapping(p)?)));
    let mut mappings = args.mapping.iter().map(named).collect::<Result<Vec<_>, Failure>>()?;
    if mappings.is_empty() {
        mappings.push((String::new(), None));
    }
    for (family, name, c, sizes) in &list {
        let mut ready = Vec::new();
        for (label, mapping) in &mappings {
            match prepared(&engine, c, sizes, label, mapping.clone()) {
                Ok(r) => ready.push(r),
                Err(e) => eprintln!("skip {family} {name} {label}: {e}"),
            }
        }
        for _ in 0..args.blocks.max(1) {
            for r in &ready {
                let seconds = time(r, args.budget_ms).map_err(Failure::wrong)?;
                row(&engine, (family, name), r, seconds).print(args.jsonl)?;
            }
        }
    }
    Ok(())
}

/// A family, a case's name, its cascade and sizes.
type Timed = (String, String, Cascade, Vec<(String, u64)>);

/// The cases of the library that are asked for.
fn library(args: &BenchArgs) -> Result<Vec<Timed>, Failure> {
    let large = [DType::F32, DType::BF16].map(|dtype| Case {
        family: "gemm",
        name: format!("m4096_n4096_k4096_{dtype}"),
        file: "matmul",
        sizes: vec![("M", 4096), ("N", 4096), ("K", 4096)],
        dtype,
    });
    let wanted = |c: &Case| {
        args.family.as_deref().is_none_or(|f| f == c.family) && args.case.as_deref().is_none_or(|n| c.name.contains(n))
    };
    let mut list = Vec::new();
    for case in cases().into_iter().chain(large).filter(wanted) {
        let text = einfall_kernels::source(case.file).expect("a library file");
        let module = parse(text).map_err(|d| Failure::Wrong(format!("{}: {d:?}", case.file)))?;
        let c = retyped(module.cascades.into_iter().next_back().expect("a cascade"), case.dtype);
        let sizes = case.sizes.iter().filter(|(n, _)| c.rank(n).is_some());
        let sizes = sizes.map(|(n, v)| ((*n).to_owned(), *v)).collect();
        list.push((case.family.to_owned(), case.name, c, sizes));
    }
    if list.is_empty() {
        return Err(Failure::Usage("there is no such family; there are gemm, attn_fwd, norm and rnn_fwd".to_owned()));
    }
    Ok(list)
}

fn prepared(
    engine: &Engine,
    c: &Cascade,
    sizes: &[(String, u64)],
    label: &str,
    mapping: Option<Mapping>,
) -> Result<Ready, einfall::Error> {
    let start = Instant::now();
    let options = CompileOptions { sizes: sizes.to_vec(), mapping, ..CompileOptions::default() };
    let kernel = engine.compile_with(c, &options)?;
    let bound = kernel.bind(sizes)?;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut arrays = Vec::new();
    for spec in bound.runtime().arrays().filter(|s| !s.shape.is_empty()) {
        let array = bound.runtime().array(spec.name)?;
        if spec.kind != BufferKind::Output {
            // Random values, never zeros.
            let value = |_: usize| next(&mut state) as f64 / f64::from(1u32 << 31) - 0.5;
            let host = HostArray::from_values(&Array::from_fn(spec.dtype, spec.shape, value));
            let copied = host.map_err(Into::into).and_then(|h| array.copy_from(&h).map_err(Into::into));
            copied.map_err(einfall::Error::Runtime)?;
        }
        arrays.push((spec.name.to_owned(), spec.kind, array));
    }
    let mut arguments = Arguments::new();
    for (name, kind, array) in &arrays {
        arguments = match kind {
            BufferKind::Output => arguments.output(name, array),
            BufferKind::Input | BufferKind::InOut | BufferKind::Workspace => arguments.input(name, array),
        };
    }
    let prepared = bound.prepare(arguments)?;
    prepared.time(1).map_err(|e| einfall::Error::Runtime(e.into()))?;
    let build_s = start.elapsed().as_secs_f64();
    Ok(Ready { mapping: label.to_owned(), kernel, bound, prepared, build_s })
}

/// The median time of a launch, in seconds.
fn time(r: &Ready, budget_ms: u64) -> Result<f64, WgpuError> {
    let time = |n: u32| r.prepared.time(n);
    let each = time(2)?.max(Duration::from_nanos(100));
    let budget = Duration::from_millis(budget_ms);
    let rounds = (budget.as_secs_f64() / 5.0 / each.as_secs_f64()).clamp(1.0, 200.0) as u32;
    let mut samples: Vec<f64> = Vec::new();
    for _ in 0..5 {
        samples.push(time(rounds)?.as_secs_f64());
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples[samples.len() / 2])
}

fn row(engine: &Engine, (family, case): (&str, &str), r: &Ready, seconds: f64) -> Row {
    let chosen: Vec<&str> = r.prepared.symbols().collect();
    let run = || r.bound.runtime().kernels().filter(|k| chosen.contains(&k.symbol));
    let flops: f64 = run().map(|k| k.flops as f64).sum();
    let bytes: f64 = run().map(|k| k.bytes as f64).sum();
    let sheet = engine.data_sheet();
    let peak = sheet.peak_of(DType::F32).unwrap_or(f64::INFINITY);
    let bandwidth = sheet.levels.first().map_or(f64::INFINITY, |l| l.bandwidth * l.instances as f64);
    Row {
        family: family.to_owned(),
        case: if r.mapping.is_empty() { case.to_owned() } else { format!("{case} {}", r.mapping) },
        peer: "einfall-wgpu".to_owned(),
        device: engine.runtime().adapter().name.clone(),
        ms: seconds * 1e3,
        tflops: flops / seconds / 1e12,
        gbps: bytes / seconds / 1e9,
        build_s: r.build_s,
        kernels: chosen.len(),
        atoms: r.kernel.mapping().kernels.iter().flat_map(|k| &k.ops).filter_map(|o| o.atom.clone()).collect(),
        threads: 0,
        roofline_fraction: (flops / peak).max(bytes / bandwidth) / seconds,
    }
}
