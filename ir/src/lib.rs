//! The three intermediate representations of Einfall, from what is computed to how a device computes it.
//!
//! [`cascade`] (what) → [`tile`] (streams over tiles) → [`kernel`] (structured, near the target). Each level has a
//! text form that prints and parses, a verifier and a float64 evaluator. The mapping is separate data ([`mapping`]).
//! Invariant: this crate depends on no other crate of the workspace and does no I/O.

pub mod analysis;
pub mod arena;
pub mod array;
pub mod artifact;
pub mod cascade;
pub mod diag;
pub mod dtype;
pub mod kernel;
pub mod layout;
pub mod mapping;
pub mod ops;
pub mod target;
pub mod text;
pub mod tile;
pub mod tolerance;

/// This crate's version, for keys of what it decides.
pub const RELEASE: &str = env!("CARGO_PKG_VERSION");
