#![no_main]
//! The target `cascade` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("cascade"), |bytes: &[u8]| run("cascade", bytes));
