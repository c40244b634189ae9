//! Ahead-of-time compilation: `.ein` files to a Rust module, from a build script.
//!
//! ```no_run
//! // build.rs
//! use einfall::build::{Kernels, Target};
//! einfall::build::Kernels::new()
//!     .file("kernels/softmax.ein")
//!     .targets(&[Target::named("x86-64-v3"), Target::named("x86-64-v4"), Target::named("sm_80")])
//!     .emit();
//! ```
//!
//! The program includes the module with [`einfall::include_kernels!`](crate::include_kernels). Machine code goes into a
//! static library that is linked; nothing is loaded when the program runs. Invariants: (1) this module and
//! [`Options::from_env`](crate::Options::from_env) alone read the environment, here what cargo sets for build scripts; (2)
//! the output is a function of the files and the settings; (3) no network and no device is asked.

mod assembler;
mod compile;
mod header;
mod manifest;
mod module;

use std::path::{Path, PathBuf};

use einfall_autotune::table::Table;
use einfall_ir::artifact::{Code, Launch};
use einfall_ir::cascade::{self, Module};
use einfall_ir::diag::{Diagnostic, Severity, render};
use einfall_runtime::Level;
use einfall_runtime::llvm::{Llvm, LoadOptions};

use crate::lowering::{CompileOptions, Error};

pub use assembler::Assembler;
pub use compile::{Piece, Product, Settings, Target, compile};
pub use header::header;
pub use manifest::manifest;
pub use module::{file_name, module};

/// Name of the module's file.
const MODULE: &str = "einfall.rs";

/// A file that is wrong, in lines that say where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// One line for each thing that is wrong: `FILE:LINE:COLUMN: CODE: what (what to do)`.
    pub lines: Vec<String>,
    /// The same with the text around it, for people.
    pub rendered: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.rendered.trim_end())
    }
}

impl std::error::Error for Failure {}

impl Failure {
    fn plain(what: String) -> Failure {
        Failure { rendered: what.clone(), lines: vec![what] }
    }

    /// Diagnostics about a file.
    fn of(diagnostics: &[Diagnostic], file: &str, text: &str) -> Failure {
        let line = |d: &Diagnostic| {
            let before = text.get(..d.primary.0.start as usize).unwrap_or(text);
            let (row, column) =
                (before.matches('\n').count() + 1, before.rsplit('\n').next().unwrap_or("").chars().count() + 1);
            let label = if d.primary.1.is_empty() { String::new() } else { format!(": {}", d.primary.1) };
            format!("{file}:{row}:{column}: {d}{label}")
        };
        Failure { lines: diagnostics.iter().map(line).collect(), rendered: render(diagnostics, file, text) }
    }
}

/// Reads a file of cascades; warnings are returned beside them.
///
/// # Errors
/// A file that cannot be read or is wrong.
pub fn read(path: &Path) -> Result<(String, Module, Vec<String>), Failure> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|e| Failure::plain(format!("{name}: {e}")))?;
    let (module, diagnostics) = cascade::check(&text);
    match module {
        Some(module) => {
            let warnings = diagnostics.iter().filter(|d| d.severity == Severity::Warning).cloned().collect::<Vec<_>>();
            Ok((text.clone(), module, Failure::of(&warnings, &name, &text).lines))
        }
        None => Err(Failure::of(&diagnostics, &name, &text)),
    }
}

/// Compiles every cascade of a file. Extents are fixed in the cascades that have the rank.
///
/// # Errors
/// What is wrong with the file, with its places.
pub fn compile_file(
    path: &Path,
    targets: &[Target],
    settings: &Settings,
    llvm: Option<&Llvm>,
) -> Result<Vec<Product>, Failure> {
    let (text, parsed, _) = read(path)?;
    let name = path.display().to_string();
    let one = |c: &cascade::Cascade| {
        let mut settings = settings.clone();
        settings.options.statics.retain(|(rank, _)| c.rank(rank).is_some());
        compile(c, targets, &settings, llvm).map_err(|e| match e {
            Error::Refused { diagnostics, .. } => Failure::of(&diagnostics, &name, &text),
            e => Failure::plain(format!("{name}: {e}")),
        })
    };
    let products = parsed.cascades.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    // What the module would refuse is said with its place.
    if let Err(wrong) = module(&products) {
        let diagnostics: Vec<Diagnostic> = wrong.into_iter().map(|(_, d)| d).collect();
        return Err(Failure::of(&diagnostics, &name, &text));
    }
    Ok(products)
}

/// Writes a file so that it is either the old or the new one: a temporary file beside it, then a rename. Where `path` is a
/// link, what it leads to is replaced; what is no file, such as a pipe, a device or a link that leads nowhere yet, is written
/// to, which another may see half done.
///
/// # Errors
/// What the system says.
pub fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let resolved = path.canonicalize();
    let path = resolved.as_deref().unwrap_or(path);
    if std::fs::metadata(path).map_or(path.is_symlink(), |m| !m.is_file()) {
        return std::fs::write(path, bytes);
    }
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    // As if it were made in place: what the process may give, not what temporary files get.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.prefix(".writing-").tempfile_in(folder)?;
    std::io::Write::write_all(&mut file, bytes)?;
    if let Ok(meta) = std::fs::metadata(path) {
        file.as_file().set_permissions(meta.permissions())?;
    }
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

/// Writes everything about products into a folder, each file whole: artifacts, PTX, cubins, shaders and then their manifests, the
/// Rust module; the objects' paths are returned.
///
/// # Errors
/// A file that cannot be written.
pub fn write(products: &[Product], folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        write_whole(&path, bytes).map_err(|e| Failure::plain(format!("{}: {e}", path.display())))?;
        Ok::<PathBuf, Failure>(path)
    };
    let mut objects = Vec::new();
    for product in products {
        for piece in &product.pieces {
            let name = |extension| file_name(&product.cascade, piece.target, extension);
            let bytes = piece.artifact.to_bytes().map_err(|e| Failure::plain(e.to_string()))?;
            put(&name("artifact"), &bytes)?;
            if let Some(object) = &piece.object {
                objects.push(put(&name("o"), object)?);
            }
            match &piece.artifact.code {
                Code::Ptx { text, .. } => {
                    put(&name("ptx"), text.as_bytes())?;
                    if let Some(cubin) = &piece.cubin {
                        put(&name("cubin"), cubin)?;
                    }
                }
                Code::Wgsl { modules } => {
                    let shader = |l: &Launch| format!("{}.{}.wgsl", product.cascade.name, l.symbol);
                    for (launch, module) in piece.artifact.launches.iter().zip(modules) {
                        put(&shader(launch), module.text.as_bytes())?;
                    }
                    let manifest = manifest(&piece.artifact, modules, shader);
                    put(&name("json"), format!("{manifest:#}\n").as_bytes())?;
                }
                Code::LlvmIr(_) | Code::Object(_) | Code::Linked => {}
            }
        }
    }
    let text = module(products).map_err(|wrong| {
        let all: Vec<String> = wrong.iter().map(|(name, d)| format!("{name}: {d}")).collect();
        Failure::plain(all.join("\n"))
    })?;
    put(MODULE, text.as_bytes())?;
    Ok(objects)
}

/// Puts objects into a static library, with a symbol table that every linker takes.
///
/// # Errors
/// A file that cannot be read or written.
pub fn archive(objects: &[PathBuf], path: &Path) -> Result<(), Failure> {
    use ar_archive_writer::{ArchiveKind, DEFAULT_OBJECT_READER, NewArchiveMember, write_archive_to_stream};
    let fail = |path: &Path, e: std::io::Error| Failure::plain(format!("{}: {e}", path.display()));
    let mut members = Vec::new();
    for object in objects {
        let bytes = std::fs::read(object).map_err(|e| fail(object, e))?;
        let name = object.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        members.push(NewArchiveMember::new(bytes, &DEFAULT_OBJECT_READER, name));
    }
    let kind = if cfg!(target_os = "macos") { ArchiveKind::Darwin } else { ArchiveKind::Gnu };
    let mut bytes = std::io::Cursor::new(Vec::new());
    write_archive_to_stream(&mut bytes, &members, kind, false, None).map_err(|e| fail(path, e))?;
    write_whole(path, &bytes.into_inner()).map_err(|e| fail(path, e))
}

/// What a build script compiles. Paths are relative to the package's folder.
#[derive(Clone, Debug, Default)]
pub struct Kernels {
    files: Vec<PathBuf>,
    targets: Vec<Target>,
    tables: Vec<PathBuf>,
    options: CompileOptions,
    llvm: Option<PathBuf>,
    cubins: bool,
    ptxas: Option<PathBuf>,
}

impl Target {
    /// The target of this name: `x86-64-v3`, `x86-64-v4`, `x86-64-v4-bf16`, `x86-64-v4-amx`,
    /// `aarch64`, `sm_80`, `sm_90a`, `wgsl`.
    ///
    /// # Panics
    /// For any other name.
    pub fn named(name: &str) -> Target {
        let known = || Target::ALL.map(Target::name).join(", ");
        Target::from_name(name).unwrap_or_else(|| panic!("there is no target `{name}`; there are {}", known()))
    }
}

impl Kernels {
    /// Nothing yet.
    pub fn new() -> Kernels {
        Kernels::default()
    }

    /// Every cascade of this file.
    pub fn file(mut self, path: impl Into<PathBuf>) -> Kernels {
        self.files.push(path.into());
        self
    }

    /// What code is made for; without any, the processor levels of the program's architecture. Levels of other
    /// architectures are left out.
    pub fn targets(mut self, targets: &[Target]) -> Kernels {
        self.targets.extend(targets);
        self
    }

    /// A table of measured mappings (`einfall tune`), whose mappings are taken for plans that it knows.
    pub fn table(mut self, path: impl Into<PathBuf>) -> Kernels {
        self.tables.push(path.into());
        self
    }

    /// Fixes a rank's extent, in every cascade that has the rank.
    pub fn fix(mut self, rank: &str, extent: u64) -> Kernels {
        self.options.statics.push((rank.to_owned(), extent));
        self
    }

    /// A size to be fast at; every other size is served all the same.
    pub fn size(mut self, rank: &str, size: u64) -> Kernels {
        self.options.sizes.push((rank.to_owned(), size));
        self
    }

    /// The LLVM library to compile with; without it the one that ships with rustc, else the system's.
    pub fn llvm(mut self, path: impl Into<PathBuf>) -> Kernels {
        self.llvm = Some(path.into());
        self
    }

    /// Machine code beside the PTX of GPUs, so that the driver need not assemble it at a program's first start: by the file
    /// that the variable `EINFALL_PTXAS` names, else by the `ptxas` on the `PATH`. Where there is none a warning of the build
    /// says so, and programs hold PTX alone, as without this. A card for which the machine code is not made takes the PTX.
    pub fn cubins(mut self) -> Kernels {
        self.cubins = true;
        self
    }

    /// As [`Kernels::cubins`], by this `ptxas`; that there is none is an error.
    pub fn ptxas(mut self, path: impl Into<PathBuf>) -> Kernels {
        self.ptxas = Some(path.into());
        self.cubins()
    }

    /// Compiles, writes the module and the library to `OUT_DIR`, and tells cargo what to link and when to run again.
    /// What is wrong becomes errors of the build, and the process ends.
    pub fn emit(self) {
        match self.run() {
            Ok(lines) => lines.iter().for_each(|line| println!("{line}")),
            Err(failure) => {
                for file in self.files.iter().chain(&self.tables) {
                    println!("cargo::rerun-if-changed={}", file.display());
                }
                failure.lines.iter().for_each(|line| println!("cargo::error={}", line.replace('\n', " ")));
                eprintln!("{}", failure.rendered);
                std::process::exit(1);
            }
        }
    }

    /// NVIDIA's assembler, where machine code is asked for and there is one; what cargo is told of it.
    fn assembler(&self, gpus: bool, lines: &mut Vec<String>) -> Result<Option<Assembler>, Failure> {
        if !(self.cubins && gpus) {
            return Ok(None);
        }
        lines.push("cargo::rerun-if-env-changed=EINFALL_PTXAS".to_owned());
        let named = self.ptxas.clone().or_else(|| std::env::var_os("EINFALL_PTXAS").map(PathBuf::from));
        lines.extend(named.iter().map(|path| format!("cargo::rerun-if-changed={}", path.display())));
        match (Assembler::find(named.as_deref()), &named) {
            (Ok(assembler), _) => Ok(Some(assembler)),
            (Err(why), Some(_)) => Err(Failure::plain(why)),
            (Err(why), None) => {
                lines.push(format!("cargo::warning=no cubins, PTX alone, which drivers assemble: {why}"));
                Ok(None)
            }
        }
    }

    /// The lines for cargo.
    fn run(&self) -> Result<Vec<String>, Failure> {
        let var = |name: &str| {
            std::env::var(name).map_err(|_| Failure::plain(format!("{name} is not set: `emit` is for build scripts")))
        };
        let (out, arch, triple) = (PathBuf::from(var("OUT_DIR")?), var("CARGO_CFG_TARGET_ARCH")?, var("TARGET")?);
        let package = var("CARGO_PKG_NAME")?.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        let mut targets = self.targets.clone();
        if targets.is_empty() {
            targets = Level::ALL.map(Target::Cpu).to_vec();
        }
        targets.retain(|t| match t {
            Target::Cpu(level) => level.arch() == arch,
            Target::Cuda(_) | Target::Wgsl => true,
        });
        let mut lines = vec!["cargo::rerun-if-changed=build.rs".to_owned()];
        let mut tables = Vec::new();
        for path in &self.tables {
            lines.push(format!("cargo::rerun-if-changed={}", path.display()));
            let fail = |e: &dyn std::fmt::Display| Failure::plain(format!("{}: {e}", path.display()));
            let bytes = std::fs::read(path).map_err(|e| fail(&e))?;
            tables.push(Table::parse(&bytes).map_err(|e| fail(&e))?);
        }
        let load = || Llvm::load(&LoadOptions { path: self.llvm.clone(), ..LoadOptions::default() });
        let llvm = targets.iter().any(|t| t.needs_llvm()).then(load);
        let llvm = llvm.transpose().map_err(|e| Failure::plain(e.to_string()))?;
        let assembler = self.assembler(targets.iter().any(|t| matches!(t, Target::Cuda(_))), &mut lines)?;
        let mut products: Vec<Product> = Vec::new();
        for path in &self.files {
            lines.push(format!("cargo::rerun-if-changed={}", path.display()));
            let (_, _, warnings) = read(path)?;
            lines.extend(warnings.iter().map(|w| format!("cargo::warning={}", w.replace('\n', " "))));
            let (options, prefix) = (self.options.clone(), format!("einfall_{package}"));
            let (tables, triple, assembler) = (tables.clone(), Some(triple.clone()), assembler.clone());
            let settings = Settings { options, tables, triple, prefix, assembler };
            for product in compile_file(path, &targets, &settings, llvm.as_ref())? {
                let name = &product.cascade.name;
                if products.iter().any(|p| p.cascade.name == *name) {
                    let what = format!("{}: there is another cascade `{name}`; names must differ", path.display());
                    return Err(Failure::plain(what));
                }
                products.push(product);
            }
        }
        let unused = |rank: &&(String, u64)| products.iter().all(|p| p.cascade.rank(&rank.0).is_none());
        if let Some((rank, _)) = self.options.statics.iter().find(unused) {
            return Err(Failure::plain(format!("no cascade has a rank `{rank}` to fix")));
        }
        let objects = write(&products, &out)?;
        if !objects.is_empty() {
            let library = format!("einfall_{package}");
            archive(&objects, &out.join(format!("lib{library}.a")))?;
            lines.push(format!("cargo::rustc-link-search=native={}", out.display()));
            lines.push(format!("cargo::rustc-link-lib=static={library}"));
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests;
