//! PTX of library cascades without contractions, mapped by the rule: NVIDIA's assembler takes it without spills, and
//! rows held whole are read and written in 16-byte accesses, once.
//!
//! Needs `target/ptxas` here or in a parent folder (`make ptxas`).

use std::path::{Path, PathBuf};
use std::process::Command;

use einfall_autotune::model_gpu::choose;
use einfall_codegen::backend::ptx::{Target, print};
use einfall_codegen::lower::gpu;
use einfall_codegen::tables;
use einfall_ir::artifact::Code;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;

fn tool(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap();
    let found = here.ancestors().map(|d| d.join("target/ptxas/nvidia/cu13/bin").join(name)).find(|p| p.exists());
    found.unwrap_or_else(|| panic!("{name} is not in target/ptxas: run `make ptxas`"))
}

fn formed(name: &str) -> Plan {
    let cascade = einfall_ir::cascade::parse(einfall_kernels::source(name).unwrap()).unwrap().cascades.remove(0);
    tables::formed(cascade).unwrap()
}

/// The machine code of a plan's kernels by the rule; none of them spills.
fn assemble(name: &str, sizes: Option<&[u64]>) -> String {
    let plan = formed(name);
    let mapping = choose(&plan, &DataSheet::named("h200").unwrap(), sizes);
    let module = gpu::lower(&plan, &mapping).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let artifact = print(&plan, &module, &Target::sm_90a()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let Code::Ptx { text, .. } = artifact.code else { panic!("a GPU artifact has PTX") };
    let file = |ext: &str| std::env::temp_dir().join(format!("einfall-rows-{}-{name}.{ext}", std::process::id()));
    let (source, cubin) = (file("ptx"), file("cubin"));
    std::fs::write(&source, &text).unwrap();
    let run = |c: &mut Command| {
        let out = c.output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{c:?}:\n{said}");
        said
    };
    let log = run(Command::new(tool("ptxas"))
        .args(["-arch=sm_90a", "-v", "--warn-on-spills"])
        .arg(&source)
        .arg("-o")
        .arg(&cubin));
    let sass = run(Command::new(tool("nvdisasm")).arg("-c").arg(&cubin));
    let _ = (std::fs::remove_file(source), std::fs::remove_file(cubin));
    for line in log.lines() {
        assert!(line.contains("info") || line.contains("bytes stack frame") || line.trim().is_empty(), "{name}: {log}");
    }
    assert!(!log.lines().any(|l| l.contains("spill") && !l.contains(" 0 bytes spill stores")), "{name}: {log}");
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
