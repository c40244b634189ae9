//! The `einfall` command line: argument parsing, dispatch and exit codes. What it does is in [`cli`].

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
