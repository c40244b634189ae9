#![no_main]
//! The target `npy` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("npy"), |bytes: &[u8]| run("npy", bytes));
