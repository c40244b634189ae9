#![no_main]
//! The target `sheet` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("sheet"), |bytes: &[u8]| run("sheet", bytes));
