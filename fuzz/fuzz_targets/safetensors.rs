#![no_main]
//! The target `safetensors` for cargo-fuzz.

use einfall_fuzz::{plant, run};

libfuzzer_sys::fuzz_target!(init: plant("safetensors"), |bytes: &[u8]| run("safetensors", bytes));
