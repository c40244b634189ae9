#![no_main]
//! The target `kernel` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("kernel"), |bytes: &[u8]| run("kernel", bytes));
