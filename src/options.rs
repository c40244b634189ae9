//! Options of an engine, and the one place that reads the environment.

use std::path::PathBuf;

use einfall_runtime::EngineOptions;
use einfall_runtime::llvm::{LoadOptions, Passes};

/// What an engine is made of. Every field is a plain value; two equal options make the same code.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Options {
    /// The LLVM library to load; none: the one that ships with rustc, then the system's.
    pub llvm: Option<PathBuf>,
    /// Folder of the object cache; none: no cache.
    pub cache: Option<PathBuf>,
    /// Worker threads; none: as many as the machine runs at once.
    pub threads: Option<usize>,
}

impl Options {
    /// Options from `EINFALL_LLVM` (a library file), `EINFALL_CACHE` (a folder; `off` for none; otherwise
    /// `$XDG_CACHE_HOME/einfall` or `~/.cache/einfall`) and `EINFALL_THREADS` (a number).
    ///
    /// # Errors
    /// A variable with a value that does not fit, named.
    pub fn from_env() -> Result<Options, String> {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        let cache = match var("EINFALL_CACHE") {
            Some(v) if v == "off" => None,
            Some(v) => Some(PathBuf::from(v)),
            None => default_cache(),
        };
        let threads = match var("EINFALL_THREADS") {
            None => None,
            Some(v) => {
                let n = v.to_str().and_then(|v| v.parse().ok()).filter(|n| *n > 0);
                Some(n.ok_or_else(|| format!("EINFALL_THREADS is {v:?}, no positive number"))?)
            }
        };
        Ok(Options { llvm: var("EINFALL_LLVM").map(PathBuf::from), cache, threads })
    }

    /// The run time's options.
    pub(crate) fn engine(&self) -> EngineOptions {
        EngineOptions {
            llvm: LoadOptions { path: self.llvm.clone(), ..LoadOptions::default() },
            cache: self.cache.clone(),
            threads: self.threads,
            passes: Passes::Tidy,
        }
    }
}

fn default_cache() -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache"));
    std::env::var_os("XDG_CACHE_HOME")
        .filter(|v| !v.is_empty())
        .map(PathBuf::from)
        .or_else(home)
        .map(|d| d.join("einfall"))
}
