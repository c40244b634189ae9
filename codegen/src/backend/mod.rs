//! Printers of kernel IR: one folder per kind of code, and what those for GPUs share.

mod gpu;
pub mod llvm;
pub mod ptx;
pub mod wgsl;
