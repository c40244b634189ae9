//! Commands on an adapter of WebGPU.

use std::time::{Duration, Instant};

use einfall::CompileOptions;
use einfall::wgpu::{Engine, data_sheet};
use einfall_ir::array::Array;
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::dtype::DType;
use einfall_ir::tile::BufferKind;
use einfall_runtime::HostArray;
use einfall_runtime::wgpu::{Arguments, adapters};

use super::Failure;
use super::bench::{BenchArgs, Case, Row, cases, retyped};
use super::device::{SelftestArgs, next, suite};

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

/// Times every case of the family by the device's own clock: rounds of launches in one submission, the median of several.
pub fn bench(args: &BenchArgs, name: Option<&str>) -> Result<(), Failure> {
    let engine = engine(name)?;
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
    let list: Vec<Case> = cases().into_iter().chain(large).filter(wanted).collect();
    if list.is_empty() {
        return Err(Failure::Usage("there is no such family; there are gemm, attn_fwd, norm and rnn_fwd".to_owned()));
    }
    for case in &list {
        let text = einfall_kernels::source(case.file).expect("a library file");
        let module = parse(text).map_err(|d| Failure::Wrong(format!("{}: {d:?}", case.file)))?;
        let c = retyped(module.cascades.into_iter().next_back().expect("a cascade"), case.dtype);
        match time(&engine, &c, case, args) {
            Ok(row) => row.print(args.jsonl)?,
            Err(e) => eprintln!("skip {} {}: {e}", case.family, case.name),
        }
    }
    Ok(())
}

fn time(engine: &Engine, c: &Cascade, case: &Case, args: &BenchArgs) -> Result<Row, einfall::Error> {
    let start = Instant::now();
    let sizes: Vec<(&str, u64)> = case.sizes.iter().filter(|(n, _)| c.rank(n).is_some()).copied().collect();
    let known = sizes.iter().map(|(n, v)| (n.to_string(), *v)).collect();
    let options = CompileOptions { sizes: known, ..CompileOptions::default() };
    let kernel = engine.compile_with(c, &options)?;
    let bound = kernel.bind(&sizes)?;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut arguments = Arguments::new();
    for spec in bound.runtime().arrays().filter(|s| !s.shape.is_empty()) {
        let array = bound.runtime().array(spec.name)?;
        if spec.kind == BufferKind::Output {
            arguments = arguments.output(spec.name, &array);
            continue;
        }
        // Random values, never zeros.
        let values = Array::from_fn(spec.dtype, spec.shape, |_| next(&mut state) as f64 / f64::from(1u32 << 31) - 0.5);
        let host = HostArray::from_values(&values).map_err(|e| einfall::Error::Runtime(e.into()))?;
        array.copy_from(&host).map_err(|e| einfall::Error::Runtime(e.into()))?;
        arguments = arguments.input(spec.name, &array);
    }
    let prepared = bound.prepare(arguments)?;
    let time = |n: u32| prepared.time(n).map_err(|e| einfall::Error::Runtime(e.into()));
    let first = time(1)?;
    let build_s = start.elapsed().as_secs_f64();
    let budget = Duration::from_millis(args.budget_ms);
    let each = time(2)?.max(Duration::from_nanos(100)).min(first.max(Duration::from_nanos(100)));
    let rounds = (budget.as_secs_f64() / 5.0 / each.as_secs_f64()).clamp(1.0, 200.0) as u32;
    let mut samples: Vec<f64> = Vec::new();
    for _ in 0..5 {
        samples.push(time(rounds)?.as_secs_f64());
    }
    samples.sort_by(f64::total_cmp);
    let seconds = samples[samples.len() / 2];
    let chosen: Vec<&str> = prepared.symbols().collect();
    let run = || bound.runtime().kernels().filter(|k| chosen.contains(&k.symbol));
    let flops: f64 = run().map(|k| k.flops as f64).sum();
    let bytes: f64 = run().map(|k| k.bytes as f64).sum();
    let sheet = engine.data_sheet();
    let peak = sheet.peak_of(DType::F32).unwrap_or(f64::INFINITY);
    let bandwidth = sheet.levels.first().map_or(f64::INFINITY, |l| l.bandwidth * l.instances as f64);
    Ok(Row {
        family: case.family.to_owned(),
        case: case.name.clone(),
        peer: "einfall-wgpu".to_owned(),
        device: engine.runtime().adapter().name.clone(),
        ms: seconds * 1e3,
        tflops: flops / seconds / 1e12,
        gbps: bytes / seconds / 1e9,
        build_s,
        kernels: chosen.len(),
        atoms: kernel.mapping().kernels.iter().flat_map(|k| &k.ops).filter_map(|o| o.atom.clone()).collect(),
        threads: 0,
        roofline_fraction: (flops / peak).max(bytes / bandwidth) / seconds,
    })
}
