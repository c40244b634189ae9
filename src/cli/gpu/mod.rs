//! Commands on an NVIDIA GPU: plans with mappings beside cascades, each in a process that may fail.

pub mod bench;
mod large;
pub mod plans;
pub mod selftest;
mod supervise;

use einfall::Options;
use einfall::cuda::Engine;

use super::Failure;

/// Opens a device by its number.
pub fn engine(index: usize) -> Result<Engine, Failure> {
    Engine::new(&Options::from_env().map_err(Failure::usage)?, index).map_err(Failure::machine)
}

/// An error as text.
fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Pseudo-random words: xorshift64*.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15))
    }

    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Near standard normal: the sum of four uniform variables, scaled.
    pub fn normal(&mut self) -> f32 {
        let w = self.word();
        let sum: u64 = (0..4).map(|i| w >> (16 * i) & 0xffff).sum();
        (sum as f32 / 65_536.0 - 2.0) * 3f32.sqrt()
    }
}
