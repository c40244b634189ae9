#![no_main]
//! The target `csp` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("csp"), |bytes: &[u8]| run("csp", bytes));
