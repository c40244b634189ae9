//! `bench`: library cascades at the shapes of the field's benchmarks, under the names the peers' scripts print (`cases`, on
//! a processor `cpu`), and cascades of one's own (`own`).

pub mod cases;
mod cpu;
pub mod own;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use einfall::Options;

use super::Failure;
use super::run::DeviceArg;
use super::source::Pairs;

/// Arguments of `bench`.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  einfall bench softmax.ein --size M=4096,N=4096\n  \
einfall bench softmax.ein --size M=4096,N=4096 --mapping a.mapping --mapping b.mapping\n  \
einfall bench --family attn_fwd --threads 16 --jsonl")]
pub struct BenchArgs {
    /// A .ein file with a cascade to time on random arrays; without it library cascades are timed
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
    /// The family: gemm, attn_fwd, decode, norm or rnn, and not on a GPU ceilings, variants, linrec or moe; all by default
    #[arg(long)]
    pub family: Option<String>,
    /// Only cases whose name contains this
    #[arg(long)]
    pub case: Option<String>,
    /// Worker threads; by default EINFALL_THREADS, then as many as the machine runs at once (CPU)
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
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
    /// How often a case is timed, several mappings of it in turns
    #[arg(long, default_value_t = 1)]
    pub blocks: usize,
    /// Wait for a line on standard input before every block, the first of which prepares its case: something else takes
    /// turns with it (CPU, without a file)
    #[arg(long, conflicts_with = "file")]
    pub paced: bool,
    /// Do the work itself, from this item on
    #[arg(long, hide = true)]
    pub worker: Option<usize>,
    /// Do every so many items, as a worker
    #[arg(long, hide = true, default_value_t = 1)]
    pub step: usize,
}

/// Names of families, with the short ones of some.
const FAMILIES: [(&str, &str); 9] = [
    ("ceilings", "ceilings"),
    ("gemm", "gemm"),
    ("attn_fwd", "attn_fwd"),
    ("attn_variants", "variants"),
    ("attn_decode", "decode"),
    ("norm", "norm"),
    ("rnn_fwd", "rnn"),
    ("linrec_fwd", "linrec"),
    ("moe", "moe"),
];

impl BenchArgs {
    /// The options of an engine: the environment's, and the command line's threads.
    fn options(&self) -> Result<Options, Failure> {
        let options = Options::from_env().map_err(Failure::usage)?;
        Ok(Options { threads: self.threads.map(NonZeroUsize::get).or(options.threads), ..options })
    }

    /// Whether a case is asked for.
    pub fn wants(&self, family: &str, case: &str) -> bool {
        let long = |name: &str| FAMILIES.iter().find(|f| f.1 == name).map_or(name.to_owned(), |f| f.0.to_owned());
        self.family.as_deref().is_none_or(|f| long(f) == family)
            && self.case.as_deref().is_none_or(|n| case.contains(n))
    }
}

/// Where no case is asked for.
pub fn no_case() -> Failure {
    let names: Vec<&str> = FAMILIES.iter().map(|f| f.1).collect();
    Failure::Usage(format!("there is no such family or case; the families are {}", names.join(", ")))
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
    cpu::bench(args)
}

/// One line of output, with the peers' field names.
#[derive(serde::Serialize)]
pub struct Row {
    pub family: String,
    pub case: String,
    pub peer: String,
    pub device: String,
    pub ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tflops: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gbps: Option<f64>,
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
        let flops = self.tflops.map(|t| format!("{:.1} GFLOP/s", t * 1e3));
        let rates: Vec<String> = flops.into_iter().chain(self.gbps.map(|g| format!("{g:.1} GB/s"))).collect();
        let roof = 100.0 * self.roofline_fraction;
        println!(
            "{:13} {:36} {:9.3} ms  {}  {roof:.0}% of the roofline  {} kernels",
            self.family,
            self.case,
            self.ms,
            rates.join(", "),
            self.kernels
        );
        Ok(())
    }
}
