#![no_main]
//! The target `mapping` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("mapping"), |bytes: &[u8]| run("mapping", bytes));
