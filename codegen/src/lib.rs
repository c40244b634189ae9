//! Passes, lowering and backends of Einfall.

pub mod backend;
mod identity;
pub mod lower;
pub mod passes;
pub mod pipeline;
pub mod probes;
pub mod random;
pub mod tables;

/// This crate's version, for keys of what it decides.
pub const RELEASE: &str = env!("CARGO_PKG_VERSION");
