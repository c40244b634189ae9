#![no_main]
//! The target `npz` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("npz"), |bytes: &[u8]| run("npz", bytes));
