#![no_main]
//! The target `compile` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("compile"), |bytes: &[u8]| run("compile", bytes));
