#![no_main]
//! The target `cache` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("cache"), |bytes: &[u8]| run("cache", bytes));
