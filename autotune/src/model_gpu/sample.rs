//! Admitted mappings drawn at random, for tests and for judging the model's choice.
//!
//! Invariant: all admitted assignments of all structures of a kernel are equally likely ([`Uniform`]); a draw depends on
//! its seed alone.

use einfall_ir::mapping::KernelMapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{Kernel, Plan};

use super::device;
use super::facts::{Facts, Unsupported, unsupported};
use super::space::Space;
use super::structure::structures;
use super::write::write;
use crate::csp::Uniform;

/// Attempts per mapping before giving up on it.
const ATTEMPTS: u64 = 200_000;

/// `n` admitted mappings of a kernel (fewer where attempts fail).
///
/// # Errors
/// Why there is none.
pub fn sample(
    plan: &Plan,
    kernel: &Kernel,
    sheet: &DataSheet,
    sizes: Option<&[u64]>,
    seed: u64,
    n: usize,
) -> Result<Vec<KernelMapping>, Unsupported> {
    let (family, gpu) = device(sheet)?;
    let facts = Facts::new(plan, kernel, sizes)?;
    let all = structures(&facts, family)?;
    let spaces: Vec<Space<'_, '_>> = all.iter().map(|s| Space::new(&facts, s, family, gpu)).collect();
    let failed = |e: crate::csp::Error| unsupported("draws", e.to_string());
    let mut draws = match Uniform::new(spaces.iter().map(|s| &s.model), seed) {
        Ok(draws) => draws,
        Err(e) => return failed(e),
    };
    let mut out = Vec::new();
    for _ in 0..n {
        match draws.draw(ATTEMPTS) {
            Ok(Some((at, values))) => out.push(write(&spaces[at], &values)),
            Ok(None) => break,
            Err(e) => return failed(e),
        }
    }
    Ok(out)
}
