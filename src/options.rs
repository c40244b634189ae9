//! Options of an engine, and the one place that reads the environment.

use std::borrow::Cow;
use std::path::PathBuf;

#[cfg(feature = "cpu")]
use einfall_autotune::table::Kind;
use einfall_autotune::table::{MAX_BYTES, Table, TableError};
#[cfg(feature = "cpu")]
use einfall_runtime::EngineOptions;
#[cfg(feature = "cpu")]
use einfall_runtime::llvm::{LoadOptions, Passes};

use crate::lowering::Error;

#[cfg(feature = "cpu")]
/// What an engine is made of. Every field is a plain value; two equal options make the same code.
///
/// ```
/// use einfall::{Options, TableSource};
///
/// let options = Options {
///     cache: Some(std::env::temp_dir().join("einfall")),
///     threads: Some(2),
///     tables: vec![TableSource::File("cpu.toml".into())],
///     ..Options::default()
/// };
/// assert!(options.llvm.is_none());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Options {
    /// The LLVM library to load; none: the one that ships with rustc, then the system's.
    pub llvm: Option<PathBuf>,
    /// Folder of the object cache; none: no cache.
    pub cache: Option<PathBuf>,
    /// Worker threads; none: as many as the machine runs at once.
    pub threads: Option<usize>,
    /// Tables of mappings that were measured; those of other devices are passed over. None: the model alone decides.
    pub tables: Vec<TableSource>,
}

/// Where a table of mappings comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TableSource {
    /// The bytes of its text, as `include_bytes!` gives them.
    Embedded(Cow<'static, [u8]>),
    /// A file.
    File(PathBuf),
}

impl TableSource {
    /// Reads the table.
    ///
    /// ```
    /// use einfall::TableSource;
    ///
    /// let text = b"format = 1\nkind = \"cpu\"\ndevice = \"a processor\"\n";
    /// assert!(TableSource::Embedded(text.into()).read()?.entries.is_empty());
    /// let wrong = TableSource::Embedded(b"format = 7".into()).read().expect_err("another format");
    /// assert!(wrong.to_string().starts_with("an embedded table"));
    /// # Ok::<(), einfall::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Table`] where there is no such file, or the text is no table that this version takes; the source is named.
    pub fn read(&self) -> Result<Table, Error> {
        match self {
            TableSource::Embedded(bytes) => {
                Table::parse(bytes).map_err(|e| Error::Table(format!("an embedded table: {e}")))
            }
            TableSource::File(path) => {
                let fail = |e: &dyn std::fmt::Display| Error::Table(format!("{}: {e}", path.display()));
                let bytes = std::fs::metadata(path).map_err(|e| fail(&e))?.len();
                if bytes > MAX_BYTES as u64 {
                    return Err(fail(&TableError::TooLong(bytes as usize)));
                }
                Table::parse(&std::fs::read(path).map_err(|e| fail(&e))?).map_err(|e| fail(&e))
            }
        }
    }
}

#[cfg(feature = "cpu")]
/// The tables of a device, joined.
pub(crate) fn joined(sources: &[TableSource], kind: Kind, device: &str) -> Result<Table, Error> {
    let mut all = Table::new(kind, device);
    for source in sources {
        let table = source.read()?;
        if (table.kind, table.device.as_str()) == (kind, device) {
            all.merge(table).map_err(|e| Error::Table(e.to_string()))?;
        }
    }
    Ok(all)
}

#[cfg(feature = "cpu")]
impl Options {
    /// Options from `EINFALL_LLVM` (a library file), `EINFALL_CACHE` (a folder; `off` for none; otherwise
    /// `$XDG_CACHE_HOME/einfall` or `~/.cache/einfall`), `EINFALL_THREADS` (a number) and `EINFALL_TABLES` (table files,
    /// separated as in `PATH`).
    ///
    /// ```
    /// let options = einfall::Options::from_env()?;
    /// assert!(options.threads.is_none_or(|n| n > 0));
    /// # Ok::<(), einfall::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Environment`] for a variable with a value that does not fit, named.
    pub fn from_env() -> Result<Options, Error> {
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
                Some(n.ok_or_else(|| Error::Environment(format!("EINFALL_THREADS is {v:?}, no positive number")))?)
            }
        };
        let tables = var("EINFALL_TABLES").unwrap_or_default();
        let tables = std::env::split_paths(&tables).filter(|p| !p.as_os_str().is_empty());
        let tables = tables.map(TableSource::File).collect();
        Ok(Options { llvm: var("EINFALL_LLVM").map(PathBuf::from), cache, threads, tables })
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

#[cfg(feature = "cpu")]
fn default_cache() -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache"));
    std::env::var_os("XDG_CACHE_HOME")
        .filter(|v| !v.is_empty())
        .map(PathBuf::from)
        .or_else(home)
        .map(|d| d.join("einfall"))
}
