#![no_main]
//! The target `table` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("table"), |bytes: &[u8]| run("table", bytes));
