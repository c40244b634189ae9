//! Compiles the cascades of the example.

use einfall::build::{Kernels, Target};

fn main() {
    let targets = ["x86-64-v3", "x86-64-v4", "aarch64", "sm_80", "sm_90a"];
    Kernels::new()
        .file("kernels/attend.ein")
        .file("kernels/normalise.ein")
        .fix("E", 64)
        .fix("F", 64)
        .targets(&targets.map(Target::named))
        .cubins()
        .emit();
}
