//! Analyses of cascades and kernels: pure functions from IR to facts.

pub mod passes;
