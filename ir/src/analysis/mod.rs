//! Analyses of cascades and kernels: pure functions from IR to facts.

pub mod inline;
pub mod passes;
pub mod separation;
pub mod symbolic;
