//! PTX of library cascades as the model maps them: NVIDIA's assembler takes it and spills no registers, but for as many bytes
//! as [`SPILLING`] says; rows held whole are read and written in 16-byte
//! accesses, once.
//!
//! Needs `target/ptxas` here or in a parent folder (`make ptxas`).

mod assembler;
mod device;

use assembler::Assembled;
use device::{formed, formed_alone};
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

/// Library cascades some of whose kernels spill registers by the model's choice, and the bytes of all spill stores and loads
/// in their machine code, at most.
const SPILLING: [(&str, u64); 7] = [
    ("attention_block_mask", 160),
    ("attention_padded", 72),
    ("decode_attention", 64),
    ("moe_mlp", 24),
    ("router", 484),
    ("slstm", 56),
    ("topk", 1884),
];

/// The bytes spilled, if the assembler complains of nothing else.
fn spilled(log: &str) -> Option<u64> {
    let complaints = log.lines().filter(|l| ["error", "warning", "fatal", "C75"].iter().any(|w| l.contains(w)));
    let bytes = |line: &str| {
        let (_, counts) = line.split_once("Registers are spilled to local memory in function ")?;
        let counts = counts.split(", ").filter_map(|c| c.split_once(" bytes spill "));
        counts.map(|(n, _)| n.parse::<u64>().ok()).try_fold(0, |all, n| Some(all + n?))
    };
    complaints.map(bytes).try_fold(0, |all, n| Some(all + n?))
}

#[test]
fn only_spills_are_counted() {
    let line = "ptxas error   : Registers are spilled to local memory in function 'a_v0', 20 bytes spill stores, 36 bytes spill loads\n";
    let info = "    24 bytes stack frame, 20 bytes spill stores, 36 bytes spill loads\n";
    assert_eq!(spilled(&format!("{line}{info}")), Some(56));
    assert_eq!(spilled(&format!("{line}{}", line.replace("error  ", "warning"))), Some(112));
    assert_eq!(spilled(&format!("{line}ptxas error   : Undefined symbol\n")), None);
    assert_eq!(spilled(&format!("{line}ptxas info    : (C7510) Potential Performance Loss\n")), None);
}

/// Everything in the library, by what the model chooses for any size: how much spills is known, nothing else is remarked.
#[test]
fn the_library_assembles() {
    let names: Vec<&str> = einfall_kernels::SOURCES.iter().map(|(name, _)| *name).collect();
    assert!(SPILLING.iter().all(|s| names.contains(&s.0)));
    let sheet = DataSheet::named("h200").unwrap();
    assembler::all(&names, |name| {
        let plan = formed(name);
        let mapping = choose(&plan, &sheet, None);
        let module = gpu::lower(&plan, &mapping).map_err(|e| format!("{name}: {e:?}"))?;
        let artifact = print(&plan, &module, &Target::sm_90a()).map_err(|e| format!("{name}: {e}"))?;
        let Code::Ptx { text, .. } = &artifact.code else { panic!("a GPU artifact has PTX") };
        let most = SPILLING.iter().find(|(n, _)| n == name).map(|s| s.1);
        match (assembler::assemble(text, "sm_90a"), most) {
            (Ok(_), None) => Ok(()),
            (Ok(_), Some(_)) => Err(format!("{name} spills no more: take it off the list")),
            (Err(log), Some(most)) => match spilled(&log) {
                Some(n) if n <= most => Ok(()),
                Some(n) => Err(format!("{name} spills {n} bytes, and may spill {most}")),
                None => Err(format!("{name}: {log}")),
            },
            (Err(log), None) => Err(format!("{name}: {log}")),
        }
    });
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
