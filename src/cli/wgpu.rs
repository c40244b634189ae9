//! Commands on an adapter of WebGPU.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use einfall::CompileOptions;
use einfall::wgpu::{Bound, Engine, Kernel, data_sheet, wgsl_plan};
use einfall_codegen::backend::wgsl;
use einfall_ir::cascade::Cascade;
use einfall_ir::dtype::DType;
use einfall_ir::mapping::Mapping;
use einfall_ir::tile::{BufferKind, Plan};
use einfall_runtime::wgpu::{Arguments, Prepared, WgpuError, adapters};
use einfall_runtime::{ArrayError, ArraySpec, HostArray};

use super::bench::cases::{Case, Measure, cases};
use super::bench::own::Subject;
use super::bench::{BenchArgs, Row, no_case};
use super::device::{SelftestArgs, suite};
use super::gpu::plans::is_for;
use super::lower::read_mapping;
use super::{Failure, engine_failure};

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
        if let products @ [_, ..] = a.products().as_slice() {
            println!("  cooperative matrices: {}", products.join(", "));
        }
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
        let given: Vec<_> = names.zip(inputs).collect();
        let first = kernel.bind(sizes).and_then(|bound| bound.run_values(&given));
        for_sizes(first, |e| {
            println!("again {} with code for {sizes:?}: {e}", c.name);
            let known = sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
            let options = CompileOptions { sizes: known, ..CompileOptions::default() };
            engine.compile_with(c, &options)?.bind(sizes)?.run_values(&given)
        })
    })
}

/// What code for any size gave; where that has blocks that the sizes exceed, what `again` gives by code for these.
fn for_sizes<T>(
    first: Result<T, einfall::Error>,
    again: impl FnOnce(&WgpuError) -> Result<T, einfall::Error>,
) -> Result<T, einfall::Error> {
    match first {
        Err(einfall::Error::Runtime(einfall_runtime::Error::Wgpu(e @ WgpuError::Sizes { .. }))) => again(&e),
        done => done,
    }
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
    let engine = engine(name)?;
    match &args.file {
        Some(file) => own(&engine, file, args),
        None => families(&engine, args),
    }
}

/// The plan of a cascade for the adapter.
fn plan(engine: &Engine, c: &Cascade) -> Result<Plan, einfall::Error> {
    wgsl_plan(c, &wgsl::Target::of(engine.data_sheet()).unwrap_or_else(wgsl::Target::generic))
}

/// Times the cascade of a file: whatever fails ends it.
fn own(engine: &Engine, file: &Path, args: &BenchArgs) -> Result<(), Failure> {
    let subject = Subject::read(file, args, |c| plan(engine, c))?;
    let (c, scalars) = (&subject.cascade, subject.scalars());
    let mut value = |spec: &ArraySpec| HostArray::from_values(subject.value(spec.name));
    let mut ready = Vec::new();
    for (label, mapping) in &subject.mappings {
        let made = prepared(engine, c, (&subject.sizes, &scalars), &mut value, (label, mapping.clone()));
        ready.push(made.map_err(|e| engine_failure(&subject.source, e))?);
    }
    in_turns(engine, (&c.name, &subject.extents()), &ready, args)
}

/// Times the cases of the library that are asked for. What the model finds no kernel for is passed over and said; a mapping
/// that was given and any other error leave the command failed once all cases had their turn.
fn families(engine: &Engine, args: &BenchArgs) -> Result<(), Failure> {
    let named = |p: &PathBuf| Ok((p.display().to_string(), read_mapping(p)?));
    let mappings = args.mapping.iter().map(named).collect::<Result<Vec<_>, Failure>>()?;
    let (mut n_ready, mut failed) = (0, Vec::new());
    for case in &library(args)? {
        let (family, name, c) = (case.family, &case.name, &case.cascade()?);
        let (sizes, scalars) = (&case.extents(c), &case.scalars(c));
        let mut seed = 0;
        let mut value = |spec: &ArraySpec| {
            seed += 1;
            case.array(spec, seed)
        };
        let ways: Vec<(String, Option<Mapping>)> = match (mappings.as_slice(), plan(engine, c)) {
            ([], _) => vec![(String::new(), None)],
            (given, Ok(plan)) => {
                let own = given.iter().filter(|(_, m)| is_for(m, &plan));
                own.map(|(label, m)| (label.clone(), Some(m.clone()))).collect()
            }
            (_, Err(_)) => Vec::new(),
        };
        let mut ready = Vec::new();
        for (label, mapping) in ways {
            let chosen = mapping.is_none();
            match prepared(engine, c, (sizes, scalars), &mut value, (&label, mapping)) {
                Ok(r) => ready.push(r),
                Err(e @ einfall::Error::Refused { .. }) if chosen => eprintln!("skip {family} {name}: {e}"),
                Err(e) => failed.push(format!("{family} {name} {label}: {e}")),
            }
        }
        n_ready += ready.len();
        if let Err(Failure::Wrong(e) | Failure::Usage(e) | Failure::Machine(e)) =
            in_turns(engine, (family, name), &ready, args)
        {
            failed.push(format!("{family} {name}: {e}"));
        }
    }
    if n_ready == 0 && failed.is_empty() && !mappings.is_empty() {
        return Err(Failure::Usage("the mappings are for the plan of no case".to_owned()));
    }
    if failed.is_empty() { Ok(()) } else { Err(Failure::Wrong(format!("not timed:\n{}", failed.join("\n")))) }
}

/// Times what is ready in turns, a line each.
fn in_turns(engine: &Engine, names: (&str, &str), ready: &[Ready], args: &BenchArgs) -> Result<(), Failure> {
    if let Some(r) = ready.first() {
        warm(r).map_err(Failure::wrong)?;
    }
    for _ in 0..args.blocks.max(1) {
        for r in ready {
            let (seconds, still) = time(r, args.budget_ms).map_err(Failure::wrong)?;
            if !still {
                eprintln!("{} {} {}: no two medians in a row were alike", names.0, names.1, r.mapping);
            }
            row(engine, names, r, seconds).print(args.jsonl)?;
        }
    }
    Ok(())
}

/// The cases of the library that are asked for, and a larger product.
fn library(args: &BenchArgs) -> Result<Vec<Case>, Failure> {
    let table = cases();
    let n = 4096u64;
    let product = table.iter().filter(|c| c.file == "matmul" && c.name.starts_with("m2048_"));
    let large: Vec<Case> = product
        .map(|c| Case {
            name: format!("m{n}_n{n}_k{n}_{}", c.dtype),
            sizes: vec![("M", n), ("N", n), ("K", n)],
            measure: Measure::Flops(2.0 * (n * n * n) as f64),
            ..c.clone()
        })
        .collect();
    let list: Vec<Case> = table.into_iter().chain(large).filter(|c| args.wants(c.family, &c.name)).collect();
    if list.is_empty() { Err(no_case()) } else { Ok(list) }
}

/// Numbers by the names of ranks or parameters.
type Named<'a, T> = &'a [(String, T)];

/// Compiles a cascade at sizes, with scalars, and puts its arrays, filled by `value`, in place.
fn prepared(
    engine: &Engine,
    c: &Cascade,
    (sizes, scalars): (Named<'_, u64>, Named<'_, f64>),
    value: &mut dyn FnMut(&ArraySpec) -> Result<HostArray, ArrayError>,
    (label, mapping): (&str, Option<Mapping>),
) -> Result<Ready, einfall::Error> {
    let start = Instant::now();
    let options = CompileOptions { sizes: sizes.to_vec(), mapping, ..CompileOptions::default() };
    let kernel = engine.compile_with(c, &options)?;
    let bound = kernel.bind(sizes)?;
    let mut arrays = Vec::new();
    for spec in bound.runtime().arrays().filter(|s| !s.shape.is_empty()) {
        let array = bound.runtime().array(spec.name)?;
        if spec.kind != BufferKind::Output {
            let host = value(&spec);
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
    for (name, x) in scalars {
        arguments = arguments.scalar(name, *x);
    }
    let prepared = bound.prepare(arguments)?;
    prepared.time(1).map_err(|e| einfall::Error::Runtime(e.into()))?;
    let build_s = start.elapsed().as_secs_f64();
    Ok(Ready { mapping: label.to_owned(), kernel, bound, prepared, build_s })
}

/// Two medians in a row that differ by no more are those of a device whose clocks have settled.
const ALIKE: f64 = 0.02;
/// Medians that are taken at most.
const MEDIANS: usize = 10;

/// How long a device works before anything is timed: an idle one's clocks may stay low for some tenths of a second, and medians
/// that are alike by then are those of the low clocks (docs/tuning-log.md, section 11).
const WARM: Duration = Duration::from_millis(500);

/// Has the device work, so that its clocks rise.
fn warm(r: &Ready) -> Result<(), WgpuError> {
    let mut worked = Duration::ZERO;
    let mut rounds = 1;
    while worked < WARM {
        let each = r.prepared.time(rounds)?.max(Duration::from_nanos(100));
        worked += each * rounds;
        rounds = (0.05 / each.as_secs_f64()).clamp(1.0, 10_000.0) as u32;
    }
    Ok(())
}

/// What `median` gives twice in a row, but for [`ALIKE`]: the clocks of an idle device take a while to rise. Where that does
/// not happen the last of [`MEDIANS`], and `false`.
fn settled<E>(mut median: impl FnMut() -> Result<f64, E>) -> Result<(f64, bool), E> {
    let mut before = median()?;
    for _ in 1..MEDIANS {
        let now = median()?;
        if (now - before).abs() <= ALIKE * before {
            return Ok((now, true));
        }
        before = now;
    }
    Ok((before, false))
}

/// The median time of a launch once the device has settled, in seconds, and whether it has.
fn time(r: &Ready, budget_ms: u64) -> Result<(f64, bool), WgpuError> {
    let time = |n: u32| r.prepared.time(n);
    let budget = Duration::from_millis(budget_ms);
    settled(|| {
        let each = time(2)?.max(Duration::from_nanos(100));
        let rounds = (budget.as_secs_f64() / 5.0 / each.as_secs_f64()).clamp(1.0, 200.0) as u32;
        let mut samples: Vec<f64> = Vec::new();
        for _ in 0..5 {
            samples.push(time(rounds)?.as_secs_f64());
        }
        samples.sort_by(f64::total_cmp);
        Ok(samples[samples.len() / 2])
    })
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
        tflops: Some(flops / seconds / 1e12),
        gbps: Some(bytes / seconds / 1e9),
        build_s: r.build_s,
        kernels: chosen.len(),
        atoms: r.kernel.mapping().kernels.iter().flat_map(|k| &k.ops).filter_map(|o| o.atom.clone()).collect(),
        threads: 0,
        roofline_fraction: (flops / peak).max(bytes / bandwidth) / seconds,
    }
}

#[cfg(test)]
mod tests {
    use super::{MEDIANS, WgpuError, for_sizes, settled};

    #[test]
    fn code_for_the_sizes_is_made_where_sizes_were_refused_alone() {
        let (kernel, reason) = (|| "k".to_owned(), || "why".to_owned());
        let refused = |e: WgpuError| Err::<u32, _>(einfall::Error::Runtime(einfall_runtime::Error::Wgpu(e)));
        let sizes = || refused(WgpuError::Sizes { kernel: kernel(), reason: reason() });
        assert_eq!(for_sizes(sizes(), |_| Ok(7)).expect("the second"), 7);
        assert!(for_sizes(sizes(), |_| sizes()).expect_err("both").to_string().contains("why"));
        let never = |_: &WgpuError| -> Result<u32, einfall::Error> { panic!("nothing that sizes change") };
        let arrays = refused(WgpuError::Launch { kernel: kernel(), reason: reason() });
        assert!(for_sizes(arrays, never).expect_err("an array").to_string().contains("why"));
        assert_eq!(for_sizes(Ok(1), never).expect("the first"), 1);
    }

    #[test]
    fn a_time_is_one_that_comes_twice() {
        let of = |times: &[f64]| {
            let mut times = times.iter();
            let mut taken = 0;
            let found = settled(|| {
                taken += 1;
                times.next().copied().ok_or("no more")
            });
            (found, taken)
        };
        // A card whose clocks rise, and one that was busy already.
        assert_eq!(of(&[3.0, 1.2, 1.0, 1.01, 9.0]), (Ok((1.01, true)), 4));
        assert_eq!(of(&[1.0, 1.0]), (Ok((1.0, true)), 2));
        let falling: Vec<f64> = (0..20).map(|i| 0.9f64.powi(i)).collect();
        assert_eq!(of(&falling), (Ok((falling[MEDIANS - 1], false)), MEDIANS));
        assert_eq!(of(&[1.0]), (Err("no more"), 2));
    }
}
