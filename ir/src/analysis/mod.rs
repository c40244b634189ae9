//! Analyses of cascades and kernels: pure functions from IR to facts.

pub mod check;
pub mod compact;
pub mod derive;
pub mod emit;
pub mod explain;
pub mod footprint;
pub mod inline;
pub mod interval;
pub mod io;
pub mod levels;
pub mod numeric;
pub mod order_free;
pub mod passes;
pub mod precise;
pub mod resources;
pub mod runs;
#[cfg(test)]
mod samples;
pub mod separation;
pub mod steps;
pub mod sums;
pub mod symbolic;
pub mod traffic;
#[cfg(test)]
mod variants;
