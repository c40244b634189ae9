//! Loads LLVM at run time and compiles textual LLVM IR to native code.
//!
//! No LLVM is linked: [`Llvm::load`] opens a shared library (an explicit path, the one that ships with rustc, the
//! system's), checks its version and resolves the LLVM-C functions of one table (`api.rs`). What it offers is small:
//!
//! - [`Llvm::compile`]: IR text → relocatable [`Object`] (also [`Llvm::assembly`] and [`Llvm::optimize`] to look at);
//! - [`Llvm::link`]: an [`Object`] → [`Code`] in this process, freed when dropped;
//! - [`Llvm::host`]: the processor's name and features in LLVM's words.
//!
//! Invariants: the crate depends on nothing of this workspace and reads no environment variable; text that LLVM
//! refuses is an error that keeps LLVM's message; the pass pipeline is one of a fixed list ([`Passes`]). IR text keeps
//! to syntax that LLVM 19 to 22 accept. One thing cannot be made an error: an intrinsic that the chosen processor
//! lacks makes LLVM's instruction selection abort the process, so callers emit only what [`TargetOptions::features`]
//! and [`TargetOptions::cpu`] allow.
//!
//! Source: the LLVM-C headers `llvm-c/{Core,IRReader,Analysis,TargetMachine,Orc,LLJIT}.h`, unchanged from 19 to 22 in
//! the functions used.

mod api;
mod compile;
mod error;
mod jit;
mod load;
mod symbols;

pub use compile::{Host, Object, Passes, TargetOptions};
pub use error::{Attempt, LlvmError};
pub use jit::Code;
pub use load::{Llvm, LoadOptions};
