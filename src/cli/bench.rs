//! `bench`: library cascades at the shapes of the field's benchmarks, under the names the peers' script prints, and
//! cascades of one's own (`own`).

pub mod own;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use einfall::{Bound, Engine, Kernel, Options};
use einfall_ir::array::Array;
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::dtype::DType;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::BufferKind;
use einfall_runtime::{Arguments, ArraySpec, HostArray};

use super::Failure;
use super::run::DeviceArg;
use super::source::Pairs;

/// Arguments of `bench`.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  einfall bench softmax.ein --size M=4096,N=4096\n  \
einfall bench softmax.ein --size M=4096,N=4096 --mapping a.mapping --mapping b.mapping\n  \
einfall bench --family attn_fwd --jsonl")]
pub struct BenchArgs {
    /// A .ein file with a cascade to time on random arrays; without it library cascades are timed (CPU, WebGPU)
    #[arg(requires = "size")]
    pub file: Option<PathBuf>,
    /// Which cascade of the file
    #[arg(long, requires = "file")]
    pub cascade: Option<String>,
    /// Extents of the file's cascade
    #[arg(long, value_name = "RANK=N,..", requires = "file")]
    pub size: Vec<Pairs<u64>>,
    /// Extents of the file's cascade, fixed at compile time
    #[arg(long = "static", value_name = "RANK=N,..", requires = "file")]
    pub statics: Vec<Pairs<u64>>,
    /// The device
    #[arg(long, default_value = "cpu")]
    device: DeviceArg,
    /// The family: gemm, attn_fwd, norm or rnn_fwd, and decode on a GPU; all by default
    #[arg(long)]
    pub family: Option<String>,
    /// Only cases whose name contains this (GPU)
    #[arg(long)]
    pub case: Option<String>,
    /// A JSON object per line
    #[arg(long)]
    pub jsonl: bool,
    /// Milliseconds of repeats per case, and per block and mapping on a GPU
    #[arg(long, default_value_t = 500)]
    pub budget_ms: u64,
    /// Mapping files, each timed: on the file's cascade, or on the cases whose plan it names, in turns (GPU); without any
    /// a table's or the model's choice
    #[arg(long, value_name = "FILE")]
    pub mapping: Vec<PathBuf>,
    /// Folder of the reference plans that mappings may name (GPU)
    #[arg(long, default_value = "tests/plans")]
    pub plans: PathBuf,
    /// How often every mapping of a case is timed, in turns (GPU)
    #[arg(long, default_value_t = 1)]
    pub blocks: usize,
    /// Do the work itself, from this item on
    #[arg(long, hide = true)]
    pub worker: Option<usize>,
    /// Do every so many items, as a worker
    #[arg(long, hide = true, default_value_t = 1)]
    pub step: usize,
}

/// One case: a library file, its sizes, and the name the peers' script gives it.
pub struct Case {
    pub family: &'static str,
    pub name: String,
    pub file: &'static str,
    pub sizes: Vec<(&'static str, u64)>,
    pub dtype: DType,
}

pub fn cases() -> Vec<Case> {
    let mut list = Vec::new();
    for dtype in [DType::F32, DType::BF16] {
        for (m, n, k) in [(512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (16, 4096, 4096), (1, 4096, 4096)] {
            list.push(Case {
                family: "gemm",
                name: format!("m{m}_n{n}_k{k}_{dtype}"),
                file: "matmul",
                sizes: vec![("M", m), ("N", n), ("K", k)],
                dtype,
            });
        }
        for (d, causal) in [(64, false), (64, true), (128, false)] {
            list.push(Case {
                family: "attn_fwd",
                name: format!("b1_h8_kv8_n2048_d{d}_{}_{dtype}", if causal { "causal" } else { "full" }),
                file: if causal { "attention" } else { "attention_full" },
                sizes: vec![("B", 1), ("G", 8), ("R", 1), ("H", 8), ("M", 2048), ("N", 2048), ("E", d), ("F", d)],
                dtype,
            });
        }
        for file in ["layernorm", "rmsnorm", "softmax"] {
            list.push(Case {
                family: "norm",
                name: format!("{file}_16384x4096_{dtype}"),
                file,
                sizes: vec![("M", 16384), ("K", 4096), ("N", 4096)],
                dtype,
            });
        }
        list.push(Case {
            family: "rnn_fwd",
            name: format!("lstm_b16_t256_h12_d64_{dtype}"),
            file: "lstm",
            sizes: vec![("T", 256), ("B", 16), ("H", 12), ("D", 64)],
            dtype,
        });
    }
    list
}

/// The cascade with its bf16 tensors declared as `dtype`.
pub fn retyped(mut c: Cascade, dtype: DType) -> Cascade {
    let set = |d: &mut DType| {
        if *d == DType::BF16 {
            *d = dtype;
        }
    };
    c.tensors.iter_mut().for_each(|(_, t)| set(&mut t.dtype));
    c.outputs.iter_mut().for_each(|o| set(&mut o.dtype));
    c
}

/// Times every case of the family.
pub fn bench(args: &BenchArgs) -> Result<(), Failure> {
    if args.device == DeviceArg::Reference {
        return Err(Failure::Usage("the reference device is for checking, not for timing".to_owned()));
    }
    #[cfg(feature = "wgpu")]
    if let DeviceArg::Wgpu(name) = &args.device {
        return super::wgpu::bench(args, name.as_deref());
    }
    if let Some(file) = &args.file {
        if args.device != DeviceArg::Cpu {
            return Err(Failure::Usage(
                "a file is timed on the cpu or on wgpu; `einfall tune FILE --device cuda` times it on a GPU".to_owned(),
            ));
        }
        return own::bench(file, args);
    }
    if let DeviceArg::Cuda(n) = args.device {
        return super::gpu::bench::bench(args, n);
    }
    let list: Vec<Case> =
        cases().into_iter().filter(|c| args.family.as_deref().is_none_or(|f| f == c.family)).collect();
    if list.is_empty() {
        return Err(Failure::Usage("there is no such family; there are gemm, attn_fwd, norm and rnn_fwd".to_owned()));
    }
    let engine = Engine::new(&Options::from_env().map_err(Failure::usage)?).map_err(Failure::machine)?;
    let sheet = engine.runtime().measure().map_err(Failure::machine)?;
    for case in &list {
        let text = einfall_kernels::source(case.file).expect("a library file");
        let module = parse(text).map_err(|d| Failure::Wrong(format!("{}: {d:?}", case.file)))?;
        let c = retyped(module.cascades.into_iter().next_back().expect("a cascade"), case.dtype);
        let row = time(&engine, &c, case, &sheet, Duration::from_millis(args.budget_ms))?;
        row.print(args.jsonl)?;
    }
    Ok(())
}

/// One line of output, with the peers' field names.
#[derive(serde::Serialize)]
pub struct Row {
    pub family: String,
    pub case: String,
    pub peer: String,
    pub device: String,
    pub ms: f64,
    pub tflops: f64,
    pub gbps: f64,
    pub build_s: f64,
    pub kernels: usize,
    pub atoms: Vec<String>,
    pub threads: usize,
    pub roofline_fraction: f64,
}

impl Row {
    /// Prints it, as JSON or for people.
    pub fn print(&self, jsonl: bool) -> Result<(), Failure> {
        if jsonl {
            println!("{}", serde_json::to_string(self).map_err(Failure::wrong)?);
            return Ok(());
        }
        let rate = format!("{:.1} GFLOP/s, {:.1} GB/s", self.tflops * 1e3, self.gbps);
        let roof = 100.0 * self.roofline_fraction;
        println!(
            "{:9} {:36} {:9.3} ms  {rate}  {roof:.0}% of the roofline  {} kernels",
            self.family, self.case, self.ms, self.kernels
        );
        Ok(())
    }
}

fn time(engine: &Engine, c: &Cascade, case: &Case, sheet: &DataSheet, budget: Duration) -> Result<Row, Failure> {
    let start = Instant::now();
    let kernel = engine.compile(c).map_err(Failure::wrong)?;
    let build_s = start.elapsed().as_secs_f64();
    let sizes: Vec<(&str, u64)> = case.sizes.iter().filter(|(n, _)| c.rank(n).is_some()).copied().collect();
    let bound = kernel.bind(&sizes).map_err(Failure::wrong)?;
    // Random values, never zeros.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut value = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f64 / f64::from(1u32 << 24) - 0.5
    };
    let mut values = |spec: &ArraySpec| Array::from_fn(spec.dtype, spec.shape, |_| value());
    let seconds = median(&bound, &[], &mut values, budget)?;
    Ok(row(engine, &kernel, &bound, sheet, (case.family, &case.name), build_s, seconds))
}

/// The median time of a launch, in seconds. Two sets of arrays, filled by `values`, take turns.
fn median(
    bound: &Bound,
    scalars: &[(String, f64)],
    values: &mut dyn FnMut(&ArraySpec) -> Array,
    budget: Duration,
) -> Result<f64, Failure> {
    let mut sets = Vec::new();
    for _ in 0..2 {
        let mut inputs: Vec<(&str, HostArray)> = Vec::new();
        let mut outputs: Vec<(&str, HostArray)> = Vec::new();
        for spec in bound.runtime().arrays().filter(|s| !s.shape.is_empty()) {
            match spec.kind {
                BufferKind::Output => {
                    outputs.push((spec.name, HostArray::zeros(spec.dtype, spec.shape).map_err(Failure::wrong)?));
                }
                BufferKind::InOut => {
                    outputs.push((spec.name, HostArray::from_values(&values(&spec)).map_err(Failure::wrong)?));
                }
                BufferKind::Input | BufferKind::Workspace => {
                    inputs.push((spec.name, HostArray::from_values(&values(&spec)).map_err(Failure::wrong)?));
                }
            }
        }
        sets.push((inputs, outputs));
    }
    let mut samples = Vec::new();
    let begin = Instant::now();
    for turn in 0.. {
        let (inputs, outputs) = &mut sets[turn % 2];
        let mut arguments = Arguments::new();
        for (n, a) in inputs.iter() {
            arguments = arguments.input(n, a.view());
        }
        for (n, a) in outputs.iter_mut() {
            arguments = arguments.output(n, a.view_mut());
        }
        for (n, value) in scalars {
            arguments = arguments.scalar(n, *value);
        }
        let start = Instant::now();
        bound.launch(arguments).map_err(Failure::wrong)?;
        // The first two launches warm up.
        if turn >= 2 {
            samples.push(start.elapsed().as_secs_f64());
        }
        if turn >= 4 && begin.elapsed() > budget {
            break;
        }
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples[samples.len() / 2])
}

/// The line of a kernel that took so many seconds, under a family's and a case's name.
fn row(
    engine: &Engine,
    kernel: &Kernel,
    bound: &Bound,
    sheet: &DataSheet,
    (family, case): (&str, &str),
    build_s: f64,
    seconds: f64,
) -> Row {
    let flops: f64 = bound.runtime().kernels().map(|k| k.flops as f64).sum();
    let bytes: f64 = bound.runtime().kernels().map(|k| k.bytes as f64).sum();
    let peak = sheet.peak_of(DType::F32).unwrap_or(f64::INFINITY);
    let bandwidth = sheet.levels.first().map_or(f64::INFINITY, |l| l.bandwidth * l.instances as f64);
    let floor = (flops / peak).max(bytes / bandwidth);
    Row {
        family: family.to_owned(),
        case: case.to_owned(),
        peer: "einfall".to_owned(),
        device: sheet.name.clone(),
        ms: seconds * 1e3,
        tflops: flops / seconds / 1e12,
        gbps: bytes / seconds / 1e9,
        build_s,
        kernels: bound.runtime().kernels().count(),
        // What the mapping names; empty where the lowering makes its own outer products of vector operations.
        atoms: kernel.mapping().kernels.iter().flat_map(|k| &k.ops).filter_map(|o| o.atom.clone()).collect(),
        threads: engine.runtime().threads(),
        roofline_fraction: floor / seconds,
    }
}
