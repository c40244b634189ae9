//! Printers of kernel IR: one folder per kind of code.

pub mod llvm;
pub mod ptx;
pub mod wgsl;
