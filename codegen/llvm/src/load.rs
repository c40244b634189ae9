//! Finding, checking and opening LLVM.
//!
//! Order: an explicit path (and then nothing else), the LLVM that ships with rustc, the system's, newest first.
//! Invariant: a library is opened at most once for its path, its version is checked before any other function is
//! called, and it stays mapped until the process ends, because code it made may still run.

use crate::api::{self, Api};
use crate::error::{Attempt, LlvmError};
use libloading::Library;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

/// Where to look for LLVM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LoadOptions {
    /// The library to take; where it is given nothing else is tried.
    pub path: Option<PathBuf>,
    /// Whether to ask the `rustc` on the PATH for its toolchain and take the LLVM in it.
    pub rustc: bool,
    /// Whether to try the system's `libLLVM` by name.
    pub system: bool,
    /// Major versions to accept.
    pub versions: RangeInclusive<u32>,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions { path: None, rustc: true, system: true, versions: 19..=22 }
    }
}

/// A loaded LLVM. Cheap to clone; every method may be called from many threads at once.
#[derive(Clone)]
pub struct Llvm {
    pub(crate) api: Arc<Api>,
    version: (u32, u32, u32),
    path: PathBuf,
}

impl std::fmt::Debug for Llvm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Llvm").field("version", &self.version).field("path", &self.path).finish()
    }
}

/// Serialises opening and target registration, which LLVM does not.
static LOADING: Mutex<()> = Mutex::new(());

const HINT: &str = if cfg!(target_os = "linux") {
    "install one, e.g. `apt-get install libllvm19` on Debian or Ubuntu, or a Rust toolchain by rustup (it ships LLVM), \
     or give the path of a libLLVM shared library"
} else if cfg!(target_os = "macos") {
    "install one, e.g. `brew install llvm`, and give the path of its libLLVM.dylib"
} else {
    "install LLVM and give the path of its LLVM-C shared library"
};

impl Llvm {
    /// Finds and opens LLVM. Meant to be called once for a process: it takes 4 to 15 ms, and the library (some
    /// 200 MB of address space, mapped lazily) is never unmapped.
    ///
    /// # Errors
    /// With an explicit path: [`LlvmError::Open`], [`LlvmError::Version`] or [`LlvmError::Symbol`]. Otherwise
    /// [`LlvmError::NotFound`], which lists every place tried and says what to install.
    pub fn load(options: &LoadOptions) -> Result<Llvm, LlvmError> {
        let _guard = LOADING.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(path) = &options.path {
            return open(path, &options.versions);
        }
        let mut tried = Vec::new();
        if options.rustc {
            match rustc_libraries() {
                Err(reason) => tried.push(Attempt { place: "`rustc --print sysroot`".into(), reason }),
                Ok(paths) => {
                    for path in paths {
                        match open(&path, &options.versions) {
                            Ok(llvm) => return Ok(llvm),
                            Err(e) => tried.push(Attempt { place: path.display().to_string(), reason: e.to_string() }),
                        }
                    }
                }
            }
        }
        if options.system {
            for name in system_names(&options.versions) {
                match open(Path::new(&name), &options.versions) {
                    Ok(llvm) => return Ok(llvm),
                    // A name the system does not have is the ordinary case and says nothing.
                    Err(LlvmError::Open { .. }) => {}
                    Err(e) => tried.push(Attempt { place: name, reason: e.to_string() }),
                }
            }
            tried.push(Attempt { place: "the system's libLLVM".into(), reason: "none of these versions".into() });
        }
        Err(LlvmError::NotFound { wanted: wanted(&options.versions), tried, hint: HINT })
    }

    /// Major, minor and patch version.
    pub fn version(&self) -> (u32, u32, u32) {
        self.version
    }

    /// The file or library name it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn wanted(versions: &RangeInclusive<u32>) -> String {
    if versions.start() == versions.end() {
        versions.start().to_string()
    } else {
        format!("{} to {}", versions.start(), versions.end())
    }
}

/// Opens one library and checks it.
fn open(path: &Path, versions: &RangeInclusive<u32>) -> Result<Llvm, LlvmError> {
    // SAFETY: opening runs the library's initialisers; the caller chose this file, or it is the toolchain's or the
    // system's LLVM, whose initialisers only fill its own tables.
    let library =
        unsafe { Library::new(path) }.map_err(|e| LlvmError::Open { path: path.into(), reason: e.to_string() })?;
    // SAFETY: a library that exports these LLVM-C names gives them LLVM-C's signatures.
    let version =
        unsafe { api::version(&library) }.ok_or(LlvmError::Symbol { path: path.into(), symbol: "LLVMGetVersion" })?;
    if !versions.contains(&version.0) {
        return Err(LlvmError::Version { path: path.into(), found: version, wanted: wanted(versions) });
    }
    // SAFETY: as above, and the version is one whose headers agree with the table.
    let api = unsafe { Api::resolve(&library) }.map_err(|symbol| LlvmError::Symbol { path: path.into(), symbol })?;
    // SAFETY: as above; `LOADING` is held.
    if !unsafe { api::initialize_targets(&library) } {
        return Err(LlvmError::Symbol { path: path.into(), symbol: "LLVMInitializeX86Target" });
    }
    std::mem::forget(library);
    Ok(Llvm { api: Arc::new(api), version, path: path.into() })
}

/// The LLVM libraries of the toolchain whose rustc is on the PATH.
fn rustc_libraries() -> Result<Vec<PathBuf>, String> {
    let mut command = Command::new("rustc");
    // A rustup proxy must neither follow the working directory's toolchain file nor download anything.
    command.args(["--print", "sysroot"]).env("RUSTUP_AUTO_INSTALL", "0");
    if cfg!(unix) {
        command.current_dir("/");
    }
    let output = command.output().map_err(|e| e.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_string());
    }
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let folder = sysroot.join(if cfg!(windows) { "bin" } else { "lib" });
    let entries = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        // A linker script of the same name is a few bytes of text that the loader refuses.
        .filter(|p| is_llvm_name(p) && std::fs::metadata(p).is_ok_and(|m| m.len() > 1 << 20))
        .collect();
    paths.sort();
    if paths.is_empty() { Err(format!("no libLLVM in {}", folder.display())) } else { Ok(paths) }
}

/// Whether a file is named as LLVM's shared library is.
fn is_llvm_name(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else { return false };
    if cfg!(windows) {
        name.starts_with("LLVM") && name.ends_with(".dll")
    } else if cfg!(target_os = "macos") {
        name.starts_with("libLLVM") && name.ends_with(".dylib")
    } else {
        name.starts_with("libLLVM") && name.contains(".so")
    }
}

/// Names for the dynamic loader, newest version first.
fn system_names(versions: &RangeInclusive<u32>) -> Vec<String> {
    let mut names = Vec::new();
    for v in versions.clone().rev() {
        if cfg!(windows) {
            continue;
        } else if cfg!(target_os = "macos") {
            names.push(format!("libLLVM-{v}.dylib"));
        } else {
            names.extend([format!("libLLVM.so.{v}.1"), format!("libLLVM-{v}.so"), format!("libLLVM.so.{v}")]);
        }
    }
    match std::env::consts::OS {
        "windows" => names.push("LLVM-C.dll".into()),
        "macos" => names.push("libLLVM.dylib".into()),
        _ => {}
    }
    names
}
