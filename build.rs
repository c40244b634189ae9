//! Names the state of the compiler's sources, so that a cache never returns what other sources made.
//!
//! Where the crates of the compiler come from a registry their folders are not here and their versions say it all.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

/// What decides the artifact of a cascade.
const FOLDERS: [&str; 5] = ["src", "ir/src", "ir/data", "codegen/src", "autotune/src"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let mut files = Vec::new();
    for folder in FOLDERS.iter().map(Path::new).filter(|f| f.exists()) {
        println!("cargo:rerun-if-changed={}", folder.display());
        walk(folder, &mut files).unwrap_or_else(|e| panic!("reading {}: {e}", folder.display()));
    }
    files.sort();
    // Fixed keys: the same sources have the same name in every build.
    let mut hasher = DefaultHasher::new();
    for file in files {
        let text = std::fs::read(&file).unwrap_or_else(|e| panic!("reading {}: {e}", file.display()));
        (file, text).hash(&mut hasher);
    }
    println!("cargo:rustc-env=EINFALL_SOURCES={:016x}", hasher.finish());
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { walk(&path, files)? } else { files.push(path) }
    }
    Ok(())
}
