//! Arrays in files: .npy, .npz and .safetensors.
//!
//! Invariants: a file is untrusted (no size it states is believed before it is compared with what is there, and
//! nothing in it can make a read panic); a file is written whole or not at all, beside its place and renamed.
//! What is read is dense, row-major, little-endian and aligned, whatever the file's order was.

mod npy;
mod npz;
mod safetensors;
#[cfg(test)]
mod tests;

use einfall_ir::dtype::DType;
use einfall_runtime::{ArrayError, HostArray};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A file format, told by the file's extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// One array; its name is the file's stem.
    Npy,
    /// A zip archive of .npy files.
    Npz,
    /// Named arrays behind a JSON header.
    Safetensors,
}

impl Format {
    /// The format of a path, by its extension.
    pub fn of(path: &Path) -> Option<Format> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "npy" => Some(Format::Npy),
            "npz" => Some(Format::Npz),
            "safetensors" => Some(Format::Safetensors),
            _ => None,
        }
    }
}

/// How much a file may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all arrays together, unpacked.
    pub total_bytes: u64,
    /// Number of arrays.
    pub arrays: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { total_bytes: 64 << 30, arrays: 1 << 16 }
    }
}

/// An error about an array file.
#[derive(Debug, thiserror::Error)]
#[error("{}{}: {reason}", path.display(), array.as_ref().map(|a| format!(" (array `{a}`)")).unwrap_or_default())]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// The array in it, where it is about one.
    pub array: Option<String>,
    /// What is wrong.
    pub reason: Reason,
}

/// What is wrong with an array file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// The system refuses.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The extension names no known format.
    #[error("the file's name must end in .npy, .npz or .safetensors")]
    Format,
    /// The content is not of the format.
    #[error("the file is not a valid {format} file: {detail}")]
    Malformed {
        /// The format's name.
        format: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// The data end early.
    #[error("{expected} bytes of data are announced, and {found} are there")]
    Truncated {
        /// Bytes of the shape.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// Bytes follow the data.
    #[error("bytes follow the {expected} bytes of data that the shape announces")]
    Trailing {
        /// Bytes of the shape.
        expected: u64,
    },
    /// An element type without an equal here.
    #[error("element type {found} is not supported{hint}")]
    DType {
        /// As the file spells it.
        found: String,
        /// What to do instead, with a leading separator.
        hint: &'static str,
    },
    /// An array cannot be made.
    #[error(transparent)]
    Array(#[from] ArrayError),
    /// Two arrays of one name.
    #[error("there are two arrays of this name")]
    Duplicate,
    /// More than [`Limits`] admit.
    #[error("the file holds more than the limit of {limit} {unit}")]
    Limit {
        /// The limit.
        limit: u64,
        /// `bytes` or `arrays`.
        unit: &'static str,
    },
    /// A .npy file holds one array.
    #[error("a .npy file holds one array, and {found} are to be written; use .npz or .safetensors")]
    Count {
        /// Arrays given.
        found: usize,
    },
}

impl Reason {
    /// The error without a place in a file yet.
    fn at(self, path: &Path, array: Option<&str>) -> FileError {
        FileError { path: path.into(), array: array.map(String::from), reason: self }
    }
}

/// Reads every array of a file, in the file's order (.safetensors: by position).
///
/// # Errors
/// [`FileError`]; see [`Reason`].
pub fn read(path: &Path, limits: &Limits) -> Result<Vec<(String, HostArray)>, FileError> {
    let bare = |reason: Reason| reason.at(path, None);
    let format = Format::of(path).ok_or_else(|| bare(Reason::Format))?;
    let mut file = std::fs::File::open(path).map_err(|e| bare(e.into()))?;
    let metadata = file.metadata().map_err(|e| bare(e.into()))?;
    if !metadata.is_file() {
        return Err(bare(io::Error::from(io::ErrorKind::InvalidInput).into()));
    }
    match format {
        Format::Npy => {
            let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
            let mut reader = io::BufReader::new(&mut file);
            let array = npy::read(&mut reader, metadata.len(), limits.total_bytes).map_err(bare)?;
            Ok(vec![(name, array)])
        }
        Format::Npz => {
            npz::read(io::BufReader::new(file), metadata.len(), limits).map_err(|(a, r)| r.at(path, a.as_deref()))
        }
        Format::Safetensors => {
            safetensors::read(file, metadata.len(), limits).map_err(|(a, r)| r.at(path, a.as_deref()))
        }
    }
}

/// Writes arrays to a file in the order given (.safetensors orders them by alignment and name), whole or not at all.
///
/// ```
/// use einfall::arrays::{Limits, read, write};
/// use einfall::runtime::HostArray;
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("both.npz");
/// let (x, n) = (HostArray::from_slice(&[1f32, 2.], &[2])?, HostArray::from_slice(&[7i32], &[])?);
/// write(&path, &[("x", &x), ("n", &n)])?;
/// assert_eq!(read(&path, &Limits::default())?.len(), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`FileError`]; see [`Reason`].
pub fn write(path: &Path, arrays: &[(&str, &HostArray)]) -> Result<(), FileError> {
    let bare = |reason: Reason| reason.at(path, None);
    let format = Format::of(path).ok_or_else(|| bare(Reason::Format))?;
    for (i, (name, _)) in arrays.iter().enumerate() {
        if arrays[..i].iter().any(|(other, _)| other == name) {
            return Err(Reason::Duplicate.at(path, Some(name)));
        }
    }
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        Some(_) | None => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.prefix(".writing-").tempfile_in(folder).map_err(|e| bare(e.into()))?;
    let mut out = io::BufWriter::new(file.as_file_mut());
    match (format, arrays) {
        (Format::Npy, [(name, array)]) => npy::write(&mut out, array).map_err(|r| r.at(path, Some(name)))?,
        (Format::Npy, _) => return Err(bare(Reason::Count { found: arrays.len() })),
        (Format::Npz, _) => npz::write(&mut out, arrays).map_err(|(a, r)| r.at(path, a.as_deref()))?,
        (Format::Safetensors, _) => safetensors::write(&mut out, arrays).map_err(|(a, r)| r.at(path, a.as_deref()))?,
    }
    out.flush().map_err(|e| bare(e.into()))?;
    drop(out);
    file.as_file().sync_all().map_err(|e| bare(e.into()))?;
    file.persist(path).map_err(|e| bare(e.error.into()))?;
    Ok(())
}

/// An error about an array of this name, if it has one.
type Named = (Option<String>, Reason);

/// Bytes of a dense array, as a `Reason` where there is no such array or it exceeds `limit`.
fn announced_bytes(dtype: DType, shape: &[u64], limit: u64) -> Result<u64, Reason> {
    let bytes = einfall_runtime::array::dense_bytes(dtype, shape)? as u64;
    if bytes > limit { Err(Reason::Limit { limit, unit: "bytes" }) } else { Ok(bytes) }
}
