//! Mapping model, integer CSP, cost model and device tables of Einfall.

pub mod csp;
pub mod model_cpu;
pub mod model_gpu;
pub mod table;
pub mod tune;

/// This crate's version, for keys of what it decides.
pub const RELEASE: &str = env!("CARGO_PKG_VERSION");
