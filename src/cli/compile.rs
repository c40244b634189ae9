//! `compile` and `new`: kernels ahead of time, and a crate that does so when it is built.

use std::path::{Path, PathBuf};

use einfall::build::{self, Settings, Target};
use einfall::{CompileOptions, Options};
use einfall_runtime::llvm::{Llvm, LoadOptions};

use super::Failure;
use super::source::{Pairs, sizes};
use super::text::write_whole;

/// Arguments of `compile`.
#[derive(clap::Args)]
#[command(
    after_help = "Written for each cascade and target: NAME.TARGET.artifact (how to launch it), and NAME.TARGET.o or \
NAME.TARGET.ptx (and .cubin), or NAME.wgsl.json (a manifest) and NAME.KERNEL.wgsl; for all of them einfall.h (C functions), einfall.rs (Rust functions; einfall::include_kernels!) and \
libeinfall_kernels.a.\n\nExample:\n  einfall compile softmax.ein --target x86-64-v3,x86-64-v4,sm_80 --out kernels"
)]
pub struct CompileArgs {
    /// Files of cascades
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// What to compile for
    #[arg(long = "target", required = true, value_delimiter = ',', value_parser = target)]
    targets: Vec<Target>,
    /// The folder that everything is written to; made if it is not there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Extents fixed at compile time
    #[arg(long = "static", value_name = "RANK=N,..")]
    statics: Vec<Pairs<u64>>,
    /// Sizes to be fast at; every other size is served all the same
    #[arg(long, value_name = "RANK=N,..")]
    size: Vec<Pairs<u64>>,
    /// Tables of measured mappings
    #[arg(long, value_name = "FILE")]
    table: Vec<PathBuf>,
    /// The triple that objects are made for, where it is not Linux with the GNU C library
    #[arg(long, value_name = "TRIPLE")]
    triple: Option<String>,
    /// NVIDIA's assembler: cubins are written beside PTX
    #[arg(long, value_name = "FILE")]
    ptxas: Option<PathBuf>,
}

fn target(name: &str) -> Result<Target, String> {
    Target::from_name(name).ok_or_else(|| format!("the targets are {}", Target::ALL.map(Target::name).join(", ")))
}

fn failed(failure: build::Failure) -> Failure {
    Failure::Wrong(failure.rendered)
}

/// Compiles files and writes what C and Rust programs link.
pub fn compile(args: &CompileArgs) -> Result<(), Failure> {
    let options = CompileOptions { statics: sizes(&args.statics), sizes: sizes(&args.size), mapping: None };
    let mut tables = Vec::new();
    for path in &args.table {
        tables.push(einfall::TableSource::File(path.clone()).read().map_err(Failure::wrong)?);
    }
    let llvm = Options::from_env().map_err(Failure::usage)?.llvm;
    let load = || Llvm::load(&LoadOptions { path: llvm, ..LoadOptions::default() });
    let llvm = args.targets.iter().any(|t| t.needs_llvm()).then(load).transpose().map_err(Failure::machine)?;
    let assembler =
        args.ptxas.as_deref().map(|p| build::Assembler::find(Some(p))).transpose().map_err(Failure::Machine)?;
    let (triple, prefix) = (args.triple.clone(), "einfall".to_owned());
    let settings = Settings { options, tables, triple, prefix, assembler };
    let mut products: Vec<build::Product> = Vec::new();
    for path in &args.files {
        for product in build::compile_file(path, &args.targets, &settings, llvm.as_ref()).map_err(failed)? {
            let name = &product.cascade.name;
            if products.iter().any(|p| p.cascade.name == *name) {
                let what = format!("{}: there is another cascade `{name}`; names must differ", path.display());
                return Err(Failure::Wrong(what));
            }
            products.push(product);
        }
    }
    if let Some((rank, _)) =
        settings.options.statics.iter().find(|(r, _)| products.iter().all(|p| p.cascade.rank(r).is_none()))
    {
        return Err(Failure::Usage(format!("no cascade has a rank `{rank}` to fix")));
    }
    let machine = |path: &Path, e: std::io::Error| Failure::Machine(format!("{}: {e}", path.display()));
    std::fs::create_dir_all(&args.out).map_err(|e| machine(&args.out, e))?;
    let objects = build::write(&products, &args.out).map_err(failed)?;
    let header = args.out.join("einfall.h");
    write_whole(&header, build::header(&products).as_bytes())?;
    if !objects.is_empty() {
        build::archive(&objects, &args.out.join("libeinfall_kernels.a")).map_err(failed)?;
    }
    for product in &products {
        let targets: Vec<&str> = product.pieces.iter().map(|p| p.target.name()).collect();
        println!("{}: {}", product.cascade.name, targets.join(", "));
    }
    Ok(())
}

/// Arguments of `new`.
#[derive(clap::Args)]
pub struct NewArgs {
    /// The folder to make; its last part is the crate's name
    path: PathBuf,
    /// Take einfall from this folder instead of the registry
    #[arg(long, value_name = "DIR")]
    einfall: Option<PathBuf>,
}

/// The files of a new crate; `@NAME@` and `@EINFALL@` stand for the crate's name and where einfall comes from.
const FILES: [(&str, &str); 4] = [
    ("Cargo.toml", include_str!("new/Cargo.toml.in")),
    ("build.rs", include_str!("new/build.rs.in")),
    ("src/main.rs", include_str!("new/main.rs.in")),
    ("kernels/softmax.ein", include_str!("new/softmax.ein")),
];

/// Makes a crate whose build script compiles a cascade.
pub fn new(args: &NewArgs) -> Result<(), Failure> {
    let name = args.path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let valid = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if !valid {
        return Err(Failure::Usage(format!("`{name}` is no name of a crate: a letter, then letters, digits, - and _")));
    }
    if args.path.exists() {
        return Err(Failure::Usage(format!("{} is there already", args.path.display())));
    }
    let machine = |path: &Path, e: std::io::Error| Failure::Machine(format!("{}: {e}", path.display()));
    let from = match &args.einfall {
        None => format!("version = {:?}", env!("CARGO_PKG_VERSION")),
        Some(path) => format!("path = {:?}", path.canonicalize().map_err(|e| machine(path, e))?),
    };
    for (file, text) in FILES {
        let path = args.path.join(file);
        let folder = path.parent().unwrap_or(&args.path);
        std::fs::create_dir_all(folder).map_err(|e| machine(folder, e))?;
        let text = text.replace("@NAME@", name).replace("@EINFALL@", &from);
        std::fs::write(&path, text).map_err(|e| machine(&path, e))?;
    }
    println!("{}: `cargo run` there reads rows of numbers and prints their softmax", args.path.display());
    Ok(())
}
