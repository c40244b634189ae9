//! NVIDIA's assembler and disassembler: what they make of PTX, with every warning an error.
//!
//! Needs `target/ptxas` here or in a parent folder (`make ptxas`).

// Every test uses a part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

fn tool(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap();
    let found = here.ancestors().map(|d| d.join("target/ptxas/nvidia/cu13/bin").join(name)).find(|p| p.exists());
    found.unwrap_or_else(|| panic!("{name} is not in target/ptxas: run `make ptxas`"))
}

/// What the assembler made of a module.
pub struct Assembled {
    /// What it said (`-v`).
    pub log: String,
    /// The machine code, of all kernels.
    pub sass: String,
}

/// Assembles for an architecture.
///
/// # Errors
/// What the assembler said: errors, and warnings (C75xx among them), spills included.
pub fn assemble(ptx: &str, arch: &str) -> Result<Assembled, String> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let file = |ext: &str| std::env::temp_dir().join(format!("einfall-asm-{}-{n}.{ext}", std::process::id()));
    let (source, cubin) = (file("ptx"), file("cubin"));
    std::fs::write(&source, ptx).unwrap();
    let run = |c: &mut Command| -> Result<String, String> {
        let out = c.output().unwrap_or_else(|e| panic!("{c:?}: {e}"));
        let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        if out.status.success() { Ok(said) } else { Err(said) }
    };
    let arch = format!("-arch={arch}");
    let mut ptxas = Command::new(tool("ptxas"));
    let made = run(ptxas.args([&arch, "-v", "-Werror", "--warn-on-spills"]).arg(&source).arg("-o").arg(&cubin));
    let made =
        made.and_then(|log| Ok(Assembled { sass: run(Command::new(tool("nvdisasm")).arg("-c").arg(&cubin))?, log }));
    let _ = (std::fs::remove_file(source), std::fs::remove_file(cubin));
    let made = made?;
    if made.log.contains("C75") || made.log.contains("warning") {
        return Err(made.log);
    }
    Ok(made)
}

impl Assembled {
    /// Registers of each kernel by name.
    pub fn registers(&self) -> Vec<(String, u64)> {
        let mut name = String::new();
        let mut list = Vec::new();
        for line in self.log.lines() {
            if let Some((_, rest)) = line.split_once("Compiling entry function '") {
                name = rest.split('\'').next().unwrap_or_default().to_string();
            } else if let Some((_, rest)) = line.split_once("Used ") {
                let n = rest.split(' ').next().and_then(|n| n.parse().ok());
                list.push((name.clone(), n.unwrap_or_else(|| panic!("{line}"))));
            }
        }
        list
    }

    /// Instructions of the machine code whose text has `what`.
    pub fn count(&self, what: &str) -> usize {
        self.sass.lines().filter(|l| l.contains(what)).count()
    }
}

/// Runs `f` on every item, two at a time; all failures together.
pub fn all<T: Sync>(items: &[T], f: impl Fn(&T) -> Result<(), String> + Sync) {
    let next = AtomicUsize::new(0);
    let failures = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(e) = f(item) {
                        failures.lock().unwrap().push(e);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), items.len(), failures.join("\n"));
}
