//! Devices, buffers, launch and caches of Einfall.
//!
//! An [`einfall_ir::artifact::Artifact`] comes in, arrays go through it, arrays come out. Invariants: this crate
//! reads no environment variable; a cache is never trusted (see [`cache`]); what a launch computes does not depend
//! on the number of threads.

pub mod array;
#[cfg(feature = "cpu")]
pub mod cache;
pub mod device;
mod element;

pub use array::{ArrayError, Element, HostArray, View, ViewMut};
pub use device::{Cpu, Device, Isa};
