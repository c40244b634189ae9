//! PTX text from kernel IR, for NVIDIA GPUs from sm_80 on.
//!
//! A kernel is one entry: parameters, barrier initialisation, a dispatch on the warp number, and one branch per role.
//! Fragments are registers by their distribution: one 32-bit register per element, 16-bit elements packed in pairs;
//! accumulators and wgmma operands are these registers themselves and never copied. Uniform integers have 32 bits,
//! addresses in device memory 64. Invariant: a statement either prints with the meaning that the kernel evaluator gives
//! it or is refused by name ([`Unprintable`]).
//! Source: PTX ISA 8.0; `.target sm_90a` for wgmma, TMA and setmaxnreg, `sm_80` for everything else.

mod across;
pub(in crate::backend) mod address;
mod atom;
mod copy;
mod emit;
mod expr;
mod frag;
pub(in crate::backend) mod launch;
mod math;
mod matrix;
mod memory;
pub(in crate::backend) mod partial;
mod ranges;
mod reduce;
mod scalar;
mod scan;
mod sync;
mod text;
mod thread_copy;

use std::fmt;

use einfall_ir::diag::{Diagnostic, Span};
use einfall_ir::target::DataSheet;

pub use launch::print;

/// What is printed for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// `sm_90a` or `sm_80`.
    pub arch: String,
    /// The data sheet's name.
    pub name: String,
    /// 32-bit registers of a multiprocessor.
    pub registers: u64,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_bytes: u64,
    /// Threads of a multiprocessor.
    pub threads: u64,
}

impl Target {
    /// NVIDIA H100 and H200.
    pub fn sm_90a() -> Target {
        Target {
            arch: "sm_90a".to_string(),
            name: "h100".to_string(),
            registers: 65_536,
            shared_bytes: 228 << 10,
            threads: 2048,
        }
    }

    /// NVIDIA A100 and everything since, without what Hopper added.
    pub fn sm_80() -> Target {
        Target {
            arch: "sm_80".to_string(),
            name: "a100".to_string(),
            registers: 65_536,
            shared_bytes: 164 << 10,
            threads: 2048,
        }
    }

    /// What a data sheet's device runs: Hopper's own instructions where it has them, else what every GPU since Ampere
    /// has. None for processors and for adapters of WebGPU.
    pub fn of(sheet: &DataSheet) -> Option<Target> {
        let gpu = sheet.gpu.as_ref().filter(|_| sheet.webgpu.is_none())?;
        let own = gpu.capability == 90 && gpu.atoms.iter().any(|a| a == "wgmma");
        let arch = if own { "sm_90a" } else { "sm_80" };
        Some(Target {
            arch: arch.to_string(),
            name: sheet.name.clone(),
            registers: gpu.registers,
            shared_bytes: gpu.shared_per_multiprocessor,
            threads: gpu.threads_per_multiprocessor,
        })
    }

    /// Whether wgmma, TMA, clusters and setmaxnreg exist.
    pub(crate) fn hopper(&self) -> bool {
        self.arch == "sm_90a"
    }
}

/// What the printer has no instruction sequence for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unprintable {
    /// The kernel.
    pub kernel: String,
    /// The construct, a noun phrase.
    pub what: String,
}

impl fmt::Display for Unprintable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {}: no PTX is known for {}", self.kernel, self.what)
    }
}

impl std::error::Error for Unprintable {}

impl Unprintable {
    /// As a diagnostic without a place: mappings and plans are not source text.
    pub fn diagnostic(&self) -> Diagnostic {
        let help = "choose another mapping, or rewrite it with supported constructs";
        Diagnostic::error("E0903", Span::default(), self.to_string()).help(help)
    }
}

/// Results of the printer's parts.
type Res<T> = Result<T, Unprintable>;
