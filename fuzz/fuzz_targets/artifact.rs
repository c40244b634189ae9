#![no_main]
//! The target `artifact` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("artifact"), |bytes: &[u8]| run("artifact", bytes));
