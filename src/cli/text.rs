//! `check` and `fmt`: the text itself.

use std::path::PathBuf;

use einfall_ir::cascade;

use super::Failure;
use super::source::{Source, ein_files};

/// Arguments of `check`.
#[derive(clap::Args)]
pub struct CheckArgs {
    /// .ein files, folders of them, or - for standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Parses and verifies; prints diagnostics of every file.
pub fn check(args: &CheckArgs) -> Result<(), Failure> {
    let mut wrong = String::new();
    let mut n_wrong = 0;
    for path in ein_files(&args.files)? {
        let source = Source::read(&path)?;
        match source.module() {
            Ok(module) => {
                let names: Vec<&str> = module.cascades.iter().map(|c| c.name.as_str()).collect();
                println!("{}: {} ok", source.name, names.join(", "));
            }
            Err(Failure::Wrong(text)) => {
                wrong.push_str(&text);
                n_wrong += 1;
            }
            Err(other) => return Err(other),
        }
    }
    match n_wrong {
        0 => Ok(()),
        1 => Err(Failure::Wrong(wrong)),
        n => Err(Failure::Wrong(format!("{wrong}\n{n} files are wrong"))),
    }
}

/// Arguments of `fmt`.
#[derive(clap::Args)]
pub struct FmtArgs {
    /// .ein files, folders of them, or - for standard input to standard output
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Change nothing; fail if a file is not in the standard layout
    #[arg(long)]
    check: bool,
}

/// Rewrites files whole.
pub fn fmt(args: &FmtArgs) -> Result<(), Failure> {
    let mut unformatted = Vec::new();
    for path in ein_files(&args.files)? {
        let source = Source::read(&path)?;
        let text = cascade::format(&source.text).map_err(|d| Failure::Wrong(source.render(&d)))?;
        if source.name == "-" && !args.check {
            print!("{text}");
        } else if text != source.text {
            if args.check {
                unformatted.push(source.name);
            } else {
                write_whole(&path, text.as_bytes())?;
            }
        }
    }
    if unformatted.is_empty() {
        return Ok(());
    }
    Err(Failure::Wrong(format!("not in the standard layout: {}\nrun `einfall fmt` on them", unformatted.join(", "))))
}

/// As [`einfall::build::write_whole`].
pub fn write_whole(path: &std::path::Path, bytes: &[u8]) -> Result<(), Failure> {
    einfall::build::write_whole(path, bytes).map_err(|e| Failure::Machine(format!("{}: {e}", path.display())))
}
