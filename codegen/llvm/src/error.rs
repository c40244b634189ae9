//! What can go wrong between finding LLVM and calling its code.
//!
//! Invariant: an error about IR text keeps LLVM's own message; an error about the library names the file.

use std::fmt;
use std::path::PathBuf;

/// One place where LLVM was looked for, and why it was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The file or library name, or the command that should have named it.
    pub place: String,
    /// Why it was not taken.
    pub reason: String,
}

/// An error of the LLVM provider.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LlvmError {
    /// No usable LLVM anywhere; the message says what to install.
    #[error("no usable LLVM {wanted} found{}; {hint}", Tried(tried))]
    NotFound {
        /// The versions asked for, e.g. `19 to 22`.
        wanted: String,
        /// The places looked at, in order.
        tried: Vec<Attempt>,
        /// What to install or name.
        hint: &'static str,
    },
    /// The library at an explicit path does not open.
    #[error("cannot open {}: {reason}", path.display())]
    Open {
        /// The library.
        path: PathBuf,
        /// The dynamic loader's words.
        reason: String,
    },
    /// The library lacks a function this crate needs: it is not LLVM, or older than 16.
    #[error("{} has no function `{symbol}`: it is not an LLVM library of a supported version", path.display())]
    Symbol {
        /// The library.
        path: PathBuf,
        /// The missing function.
        symbol: &'static str,
    },
    /// The library is an LLVM of another version.
    #[error("{} is LLVM {}.{}.{}, and LLVM {wanted} is needed", path.display(), found.0, found.1, found.2)]
    Version {
        /// The library.
        path: PathBuf,
        /// Its major, minor and patch version.
        found: (u32, u32, u32),
        /// The versions asked for.
        wanted: String,
    },
    /// The library was built without the target.
    #[error("LLVM has no target for `{triple}`: {message}")]
    Target {
        /// The target triple asked for.
        triple: String,
        /// LLVM's message.
        message: String,
    },
    /// The IR text does not parse.
    #[error("LLVM does not parse the IR: {message}")]
    Parse {
        /// LLVM's message, with the line.
        message: String,
    },
    /// The IR parses but is malformed.
    #[error("LLVM's verifier refuses the IR: {message}")]
    Verify {
        /// LLVM's message.
        message: String,
    },
    /// The pass pipeline failed.
    #[error("LLVM's passes failed: {message}")]
    Passes {
        /// LLVM's message.
        message: String,
    },
    /// Code generation failed (inline assembly that does not assemble, for instance).
    #[error("LLVM's code generation failed: {message}")]
    Emit {
        /// LLVM's message.
        message: String,
    },
    /// An object could not be linked into this process.
    #[error("LLVM's linker refuses the object: {message}")]
    Link {
        /// LLVM's message.
        message: String,
    },
    /// The linked code has no such symbol, or it refers to one that the process lacks.
    #[error("symbol `{name}`: {message}")]
    Lookup {
        /// The symbol asked for.
        name: String,
        /// LLVM's message.
        message: String,
    },
    /// A name handed to LLVM holds a NUL byte.
    #[error("the {what} holds a NUL byte")]
    Nul {
        /// Which name.
        what: &'static str,
    },
}

/// Renders the attempts of [`LlvmError::NotFound`].
struct Tried<'a>(&'a [Attempt]);

impl fmt::Display for Tried<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, a) in self.0.iter().enumerate() {
            write!(f, "{}{}: {}", if i == 0 { " (tried " } else { "; " }, a.place, a.reason)?;
        }
        if self.0.is_empty() { Ok(()) } else { f.write_str(")") }
    }
}
