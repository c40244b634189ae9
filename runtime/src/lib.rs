//! Devices, buffers, launch and caches of Einfall.
//!
//! An [`einfall_ir::artifact::Artifact`] comes in, arrays go through it, arrays come out: [`Engine::load`] compiles
//! and links it, [`Executable::bind`] fixes its sizes, [`Bound::launch`] runs it on the caller's memory. Invariants:
//! this crate reads no environment variable; a cache is never trusted (see [`cache`]); what a launch computes does
//! not depend on the number of threads.

#[cfg(feature = "cpu")]
pub mod aot;
#[cfg(any(feature = "cpu", feature = "cuda", feature = "shaders"))]
mod arguments;
pub mod array;
#[cfg(any(feature = "jit", feature = "cuda"))]
pub mod cache;
#[cfg(feature = "jit")]
mod calibrate;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
mod element;
#[cfg(feature = "jit")]
mod engine;
mod error;
#[cfg(any(feature = "cpu", feature = "cuda", feature = "shaders"))]
pub mod executable;
#[cfg(feature = "cpu")]
mod launch;
mod level;
#[cfg(feature = "cpu")]
mod linked;
#[cfg(any(feature = "cpu", feature = "cuda", feature = "shaders"))]
mod program;
#[cfg(feature = "cpu")]
mod scratch;
#[cfg(feature = "shaders")]
pub mod shaders;
#[cfg(feature = "cpu")]
mod team;
#[cfg(any(feature = "cuda", feature = "shaders"))]
mod variants;
#[cfg(feature = "wgpu")]
pub mod wgpu;

#[cfg(any(feature = "cuda", feature = "shaders"))]
pub use arguments::DeviceArguments;
pub use array::{ArrayError, Element, HostArray, View, ViewMut};
pub use device::{Cpu, Device, Isa};
#[cfg(feature = "llvm")]
pub use einfall_llvm as llvm;
#[cfg(feature = "jit")]
pub use engine::{Engine, EngineOptions};
pub use error::Error;
#[cfg(feature = "cpu")]
pub use launch::Arguments;
pub use level::{Level, tiles_permitted};
#[cfg(feature = "cpu")]
pub use linked::{Bound, Executable, Linked};
#[cfg(any(feature = "cpu", feature = "cuda", feature = "shaders"))]
pub use program::{ArraySpec, KernelSpec};
