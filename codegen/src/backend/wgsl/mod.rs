//! WGSL text from kernel IR, for any GPU behind WebGPU: one module with one entry per kernel.
//!
//! A task is a workgroup, a unit a run of its invocations; fragments are function variables by their distribution, one
//! 32-bit value per element. What hardware of one vendor does by shuffles goes through workgroup memory, so that no
//! lane count is assumed; where a device promises one ([`Target::subgroup`]), neighbours within it are shuffled. Arrays
//! are words of 32 bits, narrow elements packed in them. Control flow that differs between units is taken apart around
//! barriers, which all invocations reach. Invariants: a statement either prints with the meaning that the kernel
//! evaluator gives it or is refused by name ([`Unprintable`]); nothing is read or written outside an array, whatever
//! the arrays hold, so that modules need no bounds checks of the implementation.
//! Source: WGSL, W3C Candidate Recommendation; `subgroups` as in its language extension.

mod access;
mod ahead;
mod copy;
mod emit;
mod expr;
mod frag;
mod launch;
mod matrix;
mod memory;
mod prelude;
mod reduce;
mod scan;
mod value;

use std::fmt;

pub use einfall_ir::artifact::Bindings;
use einfall_ir::diag::{Diagnostic, Span};
use einfall_ir::kernel::atoms::{self, Atom};
use einfall_ir::target::DataSheet;

pub use launch::print;

/// Whose WGSL: front ends differ in one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// naga (wgpu, Firefox): subgroup operations need no directive, and `enable subgroups;` is an error.
    Naga,
    /// Tint (Dawn, Chromium): subgroup operations need `enable subgroups;`.
    Tint,
}

/// What is printed for: what one adapter allows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// The data sheet's name.
    pub name: String,
    /// The front end.
    pub dialect: Dialect,
    /// Where arrays and words are bound.
    pub bindings: Bindings,
    /// Invocations with consecutive numbers, from multiples of this on, that subgroup operations reach; 1: none are used.
    pub subgroup: u64,
    /// Whether the built-in `exp2` keeps 2 ulps, beyond what WGSL promises; otherwise it is computed from arithmetic.
    pub exact_exp2: bool,
    /// Whether the built-in `unpack2x16float` keeps subnormal numbers, infinities and NaN, and `pack2x16float` gives them and rounds
    /// to nearest, ties to even; otherwise halves are read and made by their bits.
    pub exact_halves: bool,
    /// Bytes of workgroup memory of a task.
    pub workgroup_bytes: u64,
    /// Invocations of a task.
    pub invocations: u64,
    /// Storage buffers of a kernel.
    pub storage_buffers: u64,
    /// Products of cooperative matrices, names of atoms; where there are any, 32 consecutive invocations are a subgroup.
    pub matrices: Vec<String>,
}

impl Target {
    /// What every WebGPU implementation allows (WebGPU, "Limits").
    pub fn generic() -> Target {
        Target {
            name: "webgpu".to_string(),
            dialect: Dialect::Naga,
            bindings: Bindings::Own,
            subgroup: 1,
            exact_exp2: false,
            exact_halves: false,
            workgroup_bytes: 16 << 10,
            invocations: 256,
            storage_buffers: 8,
            matrices: Vec::new(),
        }
    }

    /// What a data sheet's adapter allows; none for what is no WebGPU adapter.
    pub fn of(sheet: &DataSheet) -> Option<Target> {
        let (gpu, webgpu) = (sheet.gpu.as_ref()?, sheet.webgpu.as_ref()?);
        Some(Target {
            name: sheet.name.clone(),
            dialect: Dialect::Naga,
            bindings: Bindings::Own,
            subgroup: webgpu.subgroup.max(1),
            exact_exp2: webgpu.exact_exp2,
            exact_halves: webgpu.exact_halves,
            workgroup_bytes: gpu.shared_per_task,
            invocations: gpu.threads_per_task,
            storage_buffers: webgpu.storage_buffers,
            matrices: webgpu.matrices.clone(),
        })
    }

    /// The same for a browser that compiles with Tint.
    pub fn tint(self) -> Target {
        // Cooperative matrices are an extension of naga.
        Target { dialect: Dialect::Tint, matrices: Vec::new(), ..self }
    }

    /// The same for memory that another run time hands out.
    pub fn pooled(self) -> Target {
        Target { bindings: Bindings::Pooled, ..self }
    }

    /// The same without subgroup operations.
    pub fn without_subgroups(self) -> Target {
        Target { subgroup: 1, matrices: Vec::new(), ..self }
    }

    /// The contraction instructions that kernels for it are formed with.
    pub fn atoms(&self) -> Vec<Atom> {
        atoms::of_adapter(&self.matrices)
    }
}

/// What the printer has no text for, or a limit of the target that a kernel exceeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unprintable {
    /// The kernel.
    pub kernel: String,
    /// The construct or the limit, a noun phrase.
    pub what: String,
    /// What to do.
    pub help: &'static str,
}

impl fmt::Display for Unprintable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {}: no WGSL is known for {}", self.kernel, self.what)
    }
}

impl std::error::Error for Unprintable {}

impl Unprintable {
    /// As a diagnostic without a place: mappings and plans are not source text.
    pub fn diagnostic(&self) -> Diagnostic {
        Diagnostic::error("E0904", Span::default(), self.to_string()).help(self.help)
    }
}

/// Results of the printer's parts.
type Res<T> = Result<T, Unprintable>;
