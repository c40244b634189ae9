//! Machine code of PTX, by NVIDIA's assembler where there is one.
//!
//! Invariant: no variable is read here but `PATH`; what the assembler makes depends on the text, the architecture and its
//! own version alone. Source: CUDA toolkit, `ptxas`; without a toolkit `pip install nvidia-cuda-nvcc` has it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// NVIDIA's assembler.
#[derive(Clone, Debug)]
pub struct Assembler {
    path: PathBuf,
    /// What it says of its version, in one line.
    version: String,
}

impl Assembler {
    /// The assembler at `path`, or else `ptxas` on the `PATH`.
    ///
    /// # Errors
    /// What was tried and what to do, where there is none.
    pub fn find(path: Option<&Path>) -> Result<Assembler, String> {
        let path = path.unwrap_or(Path::new("ptxas"));
        let failed = |why: String| {
            format!(
                "{}: {why}; install the CUDA toolkit's ptxas (`pip install nvidia-cuda-nvcc` has it alone) and set EINFALL_PTXAS to its file",
                path.display()
            )
        };
        let output = Command::new(path).arg("--version").output().map_err(|e| failed(e.to_string()))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = said.lines().rev().map(str::trim).find(|l| l.starts_with("Cuda compilation tools"));
        match version.filter(|_| output.status.success()) {
            Some(version) => Ok(Assembler { path: path.to_owned(), version: version.to_owned() }),
            None => Err(failed("it is no ptxas".to_owned())),
        }
    }

    /// Its version, as it says.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The cubin of a text for an architecture such as `sm_90a`.
    ///
    /// # Errors
    /// What it says.
    pub fn assemble(&self, ptx: &str, arch: &str) -> Result<Vec<u8>, String> {
        let fail = |e: std::io::Error| format!("{}: {e}", self.path.display());
        let folder = tempfile::tempdir().map_err(fail)?;
        let (source, made) = (folder.path().join("kernels.ptx"), folder.path().join("kernels.cubin"));
        std::fs::write(&source, ptx).map_err(fail)?;
        let mut command = Command::new(&self.path);
        let output = command.arg(format!("-arch={arch}")).arg(&source).arg("-o").arg(&made).output().map_err(fail)?;
        if !output.status.success() {
            let said = [output.stderr, output.stdout].map(|b| String::from_utf8_lossy(&b).trim().to_owned()).join("\n");
            return Err(format!("{} refuses the PTX for {arch}: {said}", self.path.display()));
        }
        std::fs::read(&made).map_err(fail)
    }
}
