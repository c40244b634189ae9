//! The subcommands, one file a theme; errors are rendered here and nowhere else.
//!
//! Exit codes: 0 done; 1 the text, the data or a comparison is wrong; 2 the command line is wrong; 3 this machine
//! lacks something (a file, LLVM, a device).

// In place of the standard ones, which panic when the reader of a pipe has gone (`einfall passes | head -1`).
macro_rules! print {
    ($($arg:tt)*) => { $crate::cli::write_out(format_args!($($arg)*)) };
}
macro_rules! println {
    () => { print!("\n") };
    ($($arg:tt)*) => { print!("{}\n", format_args!($($arg)*)) };
}

mod bench;
mod compare;
mod compile;
mod csp;
mod device;
mod explain;
mod gpu;
mod lower;
mod report;
mod run;
mod source;
mod tables;
mod text;
mod traffic;
mod tune;
#[cfg(feature = "wgpu")]
mod wgpu;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use einfall_runtime::cuda::CudaError;
#[cfg(feature = "wgpu")]
use einfall_runtime::wgpu::WgpuError;

/// Kernels for sequence models, derived from cascades of Einsums.
#[derive(Parser)]
#[command(name = "einfall", version, about, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 done; 1 the text, the data or a comparison is wrong; 2 the command line is \
wrong; 3 this machine lacks something (a file, LLVM, a device).")]
struct Args {
    /// Say more: -v what is compiled and cached, -vv every pass
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Parse and verify files; print what is wrong and what to write instead
    Check(text::CheckArgs),
    /// Rewrite files in the standard layout; comments survive
    Fmt(text::FmtArgs),
    /// Print passes over the data, derivations, I/O lower bounds and the plan
    Explain(explain::ExplainArgs),
    /// List the passes, in order, with why each stands where it does
    Passes,
    /// Print the program after a pass
    Lower(lower::LowerArgs),
    /// Evaluate after every pass and name the first whose results are wrong
    Bisect(lower::BisectArgs),
    /// Compile ahead of time: machine code, PTX, a C header, a Rust module
    Compile(compile::CompileArgs),
    /// Make a crate that compiles cascades when it is built
    New(compile::NewArgs),
    /// Run a cascade on arrays from files or at random
    Run(run::RunArgs),
    /// List devices and what they compile with
    Devices(device::DevicesArgs),
    /// Show or clear the cache of compiled kernels
    #[command(subcommand)]
    Cache(device::CacheCommand),
    /// Compare every library cascade on a device with the float64 evaluator
    Selftest(device::SelftestArgs),
    /// Time library cascades at the shapes of the field's benchmarks
    Bench(bench::BenchArgs),
    /// Measure mappings and keep the fastest
    Tune(tune::TuneArgs),
    /// Show, merge, check and prune tables of measured mappings
    #[command(subcommand)]
    Tables(tables::TablesCommand),
    /// Join result files of benchmarks into tables of ratios, or into a page with rooflines and derivations
    Report(report::ReportArgs),
    /// Write the bytes that mappings move by the analysis, to compare with a profiler's
    Traffic(traffic::TrafficArgs),
    /// Solve an integer constraint system
    Csp(csp::CspArgs),
}

/// Why a command failed.
pub enum Failure {
    /// The text, the data or a comparison is wrong: exit code 1. The message may have several lines.
    Wrong(String),
    /// The command line is wrong: exit code 2.
    Usage(String),
    /// This machine lacks something: exit code 3.
    Machine(String),
}

impl Failure {
    /// Wrong input, from anything that says so itself.
    pub fn wrong(e: impl std::fmt::Display) -> Failure {
        Failure::Wrong(e.to_string())
    }

    /// A command line or environment that is wrong, from anything that says so itself.
    pub fn usage(e: impl std::fmt::Display) -> Failure {
        Failure::Usage(e.to_string())
    }

    /// Something lacking, from anything that says so itself.
    pub fn machine(e: impl std::fmt::Display) -> Failure {
        Failure::Machine(e.to_string())
    }
}

/// An engine's error about a cascade of `source`, with its places there.
pub fn engine_failure(source: &source::Source, e: einfall::Error) -> Failure {
    match e {
        einfall::Error::Refused { diagnostics, .. } => Failure::Wrong(source.render(&diagnostics)),
        einfall::Error::Bind(e) => source.bind_failure(&e),
        einfall::Error::Size(what) | einfall::Error::Environment(what) => Failure::Usage(what),
        einfall::Error::Table(what) => Failure::Wrong(what),
        einfall::Error::Runtime(e) => match e {
            einfall_runtime::Error::Llvm(_) | einfall_runtime::Error::Threads { .. } => Failure::machine(e),
            einfall_runtime::Error::Cuda(
                CudaError::NoDriver | CudaError::OldDriver { .. } | CudaError::NoDevice { .. },
            ) => Failure::machine(e),
            #[cfg(feature = "wgpu")]
            einfall_runtime::Error::Wgpu(
                WgpuError::NoAdapter { .. }
                | WgpuError::Ambiguous { .. }
                | WgpuError::NoDevice { .. }
                | WgpuError::Memory { .. },
            ) => Failure::machine(e),
            e => Failure::wrong(e),
        },
        e => Failure::wrong(e),
    }
}

/// Writes to standard output; without a reader the process ends quietly, as there is nobody left to work for.
fn write_out(text: std::fmt::Arguments<'_>) {
    if let Err(e) = std::io::stdout().lock().write_fmt(text) {
        if e.kind() == std::io::ErrorKind::BrokenPipe {
            std::process::exit(0);
        }
        eprintln!("error: standard output cannot be written: {e}");
        std::process::exit(3);
    }
}

/// Warnings, and with `-v` what is compiled and cached, with `-vv` every pass, on standard error.
fn log(verbose: u8) {
    use tracing_subscriber::filter::{LevelFilter, Targets};
    use tracing_subscriber::layer::SubscriberExt as _;
    use tracing_subscriber::util::SubscriberInitExt as _;
    let level = |from| if verbose >= from { LevelFilter::DEBUG } else { LevelFilter::WARN };
    let targets = [("einfall", level(1)), ("einfall_runtime", level(1)), ("einfall_codegen", level(2))];
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).without_time().with_target(false);
    let shown = Targets::new().with_default(LevelFilter::WARN).with_targets(targets);
    tracing_subscriber::registry().with(shown).with(lines).init();
}

/// Parses the command line, runs it, and renders what went wrong.
pub fn main() -> ExitCode {
    let args = Args::parse();
    log(args.verbose);
    let done = match args.command {
        Command::Check(a) => text::check(&a),
        Command::Fmt(a) => text::fmt(&a),
        Command::Explain(a) => explain::explain(&a),
        Command::Passes => {
            lower::passes();
            Ok(())
        }
        Command::Lower(a) => lower::lower(&a),
        Command::Bisect(a) => lower::bisect(&a),
        Command::Compile(a) => compile::compile(&a),
        Command::New(a) => compile::new(&a),
        Command::Run(a) => run::run(&a),
        Command::Devices(a) => device::devices(&a),
        Command::Cache(c) => device::cache(&c),
        Command::Selftest(a) => device::selftest(&a),
        Command::Bench(a) => bench::bench(&a),
        Command::Tune(a) => tune::tune(&a),
        Command::Tables(c) => tables::tables(&c),
        Command::Report(a) => report::report(&a),
        Command::Traffic(a) => traffic::traffic(&a),
        Command::Csp(a) => csp::csp(&a),
    };
    let (code, message) = match done {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Wrong(m)) => (1, m),
        Err(Failure::Usage(m)) => (2, m),
        Err(Failure::Machine(m)) => (3, m),
    };
    let message = message.trim_end();
    if message.starts_with("error") {
        eprintln!("{message}");
    } else if !message.is_empty() {
        eprintln!("error: {message}");
    }
    ExitCode::from(code)
}
