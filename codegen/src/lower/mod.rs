//! Lowering between the levels: cascade → tile ([`form`]) → kernel.

pub mod cpu;
pub mod form;
pub mod gpu;
