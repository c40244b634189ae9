#![no_main]
//! The target `tile` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("tile"), |bytes: &[u8]| run("tile", bytes));
