//! PTX of library cascades without contractions, mapped by the rule: NVIDIA's assembler takes it without spills, and
//! rows held whole are read and written in 16-byte accesses, once.
//!
//! Needs `target/ptxas` here or in a parent folder (`make ptxas`).

mod assembler;
mod device;

use assembler::Assembled;
use device::formed_alone;
use einfall_autotune::model_gpu::choose;
use einfall_codegen::backend::ptx::{Target, print};
use einfall_codegen::lower::gpu;
use einfall_ir::artifact::Code;
use einfall_ir::target::DataSheet;

/// The machine code of a plan's kernels by the rule; none of them spills.
fn assemble(name: &str, sizes: Option<&[u64]>) -> String {
    let plan = formed_alone(name);
    let mapping = choose(&plan, &DataSheet::named("h200").unwrap(), sizes);
    let module = gpu::lower(&plan, &mapping).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let artifact = print(&plan, &module, &Target::sm_90a()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let Code::Ptx { text, .. } = artifact.code else { panic!("a GPU artifact has PTX") };
    let Assembled { sass, .. } = assembler::assemble(&text, "sm_90a").unwrap_or_else(|log| panic!("{name}: {log}"));
    sass
}

#[test]
fn the_library_assembles() {
    for name in [
        "argmax",
        "cross_entropy",
        "cumsum",
        "embedding",
        "embedding_layernorm",
        "entropy",
        "layernorm",
        "logsumexp",
        "mean_variance",
        "rmsnorm",
        "softmax",
        "third_moment",
    ] {
        assemble(name, None);
    }
}

/// Machine code of one kernel.
fn section<'a>(sass: &'a str, kernel: &str) -> &'a str {
    let start = sass.find(&format!(".text.{kernel}:")).unwrap_or_else(|| panic!("no code of {kernel}"));
    let rest = &sass[start + 1..];
    &rest[..rest.find("\n.text.").unwrap_or(rest.len())]
}

#[test]
fn rows_held_whole_move_once_in_wide_accesses() {
    for (name, loads, stores) in [("layernorm", 4, 4), ("rmsnorm", 4, 4)] {
        let sass = assemble(name, Some(&[16384, 4096]));
        let code = section(&sass, &format!("{name}__{name}_0_v0"));
        let count = |what: &str| code.lines().filter(|l| l.contains(what)).count();
        assert_eq!(count("STG.E.128"), stores, "{name}\n{code}");
        assert!(count("LDG.E.128") >= loads, "{name}\n{code}");
        assert_eq!(count("LDG.E.U16") + count("STG.E.U16"), 0, "{name}");
    }
}
