//! The LLVM backend: kernel IR → textual LLVM IR that LLVM 19 to 22 accept, and how to launch it.
//!
//! A kernel becomes two functions: `NAME.task`, whose arguments are the arrays (each `noalias`), strides, extents and
//! scratch tiles, and `NAME`, which follows the CPU convention of [`einfall_ir::artifact::Launch`]: it reads the slots
//! and calls the task function for every task of its range. Invariants: the last dimension of every array is
//! contiguous (other strides are slots); the text is a function of the module and the [`Isa`] alone; no function is
//! called but LLVM intrinsics that lower to instructions.

mod emit;
mod expr;
mod isa;
pub(crate) mod launch;
mod math;
mod value;

pub use isa::Isa;
pub use launch::print;
