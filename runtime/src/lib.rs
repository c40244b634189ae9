//! Devices, buffers, launch and caches of Einfall.
//!
//! An [`einfall_ir::artifact::Artifact`] comes in, arrays go through it, arrays come out: [`Engine::load`] compiles
//! and links it, [`Executable::bind`] fixes its sizes, [`Bound::launch`] runs it on the caller's memory. Invariants:
//! this crate reads no environment variable; a cache is never trusted (see [`cache`]); what a launch computes does
//! not depend on the number of threads.

#[cfg(any(feature = "cpu", feature = "cuda"))]
mod arguments;
pub mod array;
#[cfg(any(feature = "cpu", feature = "cuda"))]
pub mod cache;
#[cfg(feature = "cpu")]
mod calibrate;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
mod element;
#[cfg(feature = "cpu")]
mod engine;
mod error;
#[cfg(feature = "cpu")]
mod executable;
#[cfg(feature = "cpu")]
mod launch;
#[cfg(any(feature = "cpu", feature = "cuda"))]
mod program;
#[cfg(feature = "cpu")]
mod scratch;

pub use array::{ArrayError, Element, HostArray, View, ViewMut};
pub use device::{Cpu, Device, Isa};
#[cfg(feature = "cpu")]
pub use einfall_llvm as llvm;
#[cfg(feature = "cpu")]
pub use engine::{Engine, EngineOptions};
pub use error::Error;
#[cfg(feature = "cpu")]
pub use executable::{Bound, Executable};
#[cfg(feature = "cpu")]
pub use launch::Arguments;
#[cfg(any(feature = "cpu", feature = "cuda"))]
pub use program::{ArraySpec, KernelSpec};
