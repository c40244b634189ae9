//! The subcommands, one file a theme; errors are rendered here and nowhere else.
//!
//! Exit codes: 0 done; 1 the text, the data or a comparison is wrong; 2 the command line is wrong; 3 this machine
//! lacks something (a file, LLVM, a device).

mod source;
mod text;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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

    /// Something lacking, from anything that says so itself.
    pub fn machine(e: impl std::fmt::Display) -> Failure {
        Failure::Machine(e.to_string())
    }

    /// A wrong command line, from anything that says so itself.
    pub fn usage(e: impl std::fmt::Display) -> Failure {
        Failure::Usage(e.to_string())
    }
}

/// Parses the command line, runs it, and renders what went wrong.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.command {
        Command::Check(a) => text::check(&a),
        Command::Fmt(a) => text::fmt(&a),
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
