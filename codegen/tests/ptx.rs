//! PTX of the reference mappings, through NVIDIA's assembler: it assembles without warnings, keeps its registers, and
//! the machine code has the tensor-core instructions and waits that were printed, no more.
//!
//! Needs `target/ptxas` here or in a parent folder (`make ptxas`).

mod assembler;
mod device;

use assembler::assemble;
use device::{formed, formed_alone, text};
use einfall_codegen::backend::ptx::{Target, print};
use einfall_codegen::lower::gpu;
use einfall_ir::artifact::{Artifact, Code};
use einfall_ir::kernel::Module;
use einfall_ir::tile::Plan;

fn ptx(artifact: &Artifact) -> &str {
    match &artifact.code {
        Code::Ptx { text, .. } => text,
        Code::LlvmIr(_) | Code::Object(_) | Code::Linked | Code::Wgsl { .. } => panic!("a GPU artifact has PTX"),
    }
}

/// The plan of a file and its kernels by a mapping.
fn lower(plan: &str, mapping: &str) -> (Plan, Module) {
    let plan = device::plan(plan);
    let module = mapped(&plan, &text(&format!("mappings/{mapping}.mapping")));
    (plan, module)
}

fn mapped(plan: &Plan, mapping: &str) -> Module {
    let mapping = einfall_ir::mapping::parse::parse(mapping).unwrap_or_else(|e| panic!("{e}"));
    gpu::lower(plan, &mapping).unwrap_or_else(|e| panic!("{e:?}"))
}

/// The kernels assemble without warnings or spills, and their machine code issues, awaits and fences wgmma exactly as
/// the text does.
fn assembles(plan: &Plan, module: &Module) {
    let artifact = print(plan, module, &Target::sm_90a()).unwrap_or_else(|e| panic!("{e}"));
    let text = ptx(&artifact);
    let made = assemble(text, "sm_90a").unwrap_or_else(|log| panic!("{}:\n{log}", module.name));
    for (machine, printed) in
        [("HGMMA", "wgmma.mma_async"), ("WARPGROUP.DEPBAR", "wgmma.wait_group"), ("WARPGROUP.ARRIVE", "wgmma.fence")]
    {
        let asked = text.lines().filter(|l| l.contains(printed)).count();
        assert_eq!(made.count(machine), asked, "{machine} of {}", module.name);
    }
}

#[test]
fn reference_mappings_assemble() {
    for (plan, mapping) in [
        ("gemm", "gemm"),
        ("gemm", "gemm_persistent"),
        ("attention", "attention"),
        ("attention", "attention_persistent"),
        ("attention_full", "attention_full"),
        ("lstm_gates", "lstm"),
        ("lstm_gates", "lstm_64"),
        ("lstm_gates", "lstm_32"),
    ] {
        let (plan, module) = lower(plan, mapping);
        assembles(&plan, &module);
    }
}

/// Parts of a split stream, two tasks of a multiprocessor at a time: the registers at launch are what half of its
/// register file gives each thread, budgets are set from there.
#[test]
fn split_streams_assemble() {
    for (plan, mapping, resident) in [
        ("decode.tile", "decode", 1),
        ("attention_gqa", "attention_decode", 1),
        ("attention_gqa", "attention_decode_columns", 2),
    ] {
        let plan = match plan.strip_suffix(".tile") {
            Some(name) => device::plan(name),
            None => formed(plan),
        };
        let source = text(&format!("mappings/{mapping}.mapping"));
        let mapping = einfall_ir::mapping::parse::parse(&source).unwrap();
        let split = gpu::split_streams::run(&plan, &mapping, 132).unwrap();
        let module = mapped(&split, &source);
        assembles(&split, &module);
        let artifact = print(&split, &module, &Target::sm_90a()).unwrap();
        let text = ptx(&artifact);
        let first = text.split(".visible .entry").nth(1).unwrap();
        assert!(first.contains(&format!(".minnctapersm {resident}\n")));
        // The number of parts is computed once a role.
        assert!(first.matches("div.u32").count() < 24);
    }
}

/// Row sums are joined over the four lanes of a row once, after all trips; row maxima are needed in every trip: two rows
/// by two shuffles at three places, both loops and the sum's end.
#[test]
fn sums_over_lanes_are_completed_once() {
    let (plan, module) = lower("attention", "attention");
    let a = print(&plan, &module, &Target::sm_90a()).unwrap();
    assert_eq!(ptx(&a).matches("shfl.sync.bfly").count(), 3 * 4);
    // Where something else reads the sum in every trip, it is whole in every trip.
    let source = text("plans/attention.tile")
        .replace("tile l: f32[b, h, m]\n", "tile l: f32[b, h, m]\n        tile t: f32[b, h, m]\n")
        .replace("            w = p\n", "            t = l\n            w = p\n")
        .replace("if l == 0.0 then 0.0 else o / l", "if t == 0.0 then 0.0 else o / t");
    let plan = einfall_ir::tile::parse::parse(&source).unwrap();
    let module =
        mapped(&plan, &text("mappings/attention.mapping").replace("op w slot 3", "op t slot 2\n        op w slot 3"));
    let a = print(&plan, &module, &Target::sm_90a()).unwrap();
    assert_eq!(ptx(&a).matches("shfl.sync.bfly").count(), 2 * 2 * 4);
}

/// What a schedule overlaps with a contraction stands before the wait for it, for the assembler too: a load that depends
/// on the row sums precedes the wait in both loops over keys. Without reductions there is nothing to hold.
#[test]
fn a_softmax_is_finished_before_the_wait() {
    let held = |plan: &str| {
        let (plan, module) = lower(plan, plan);
        let a = print(&plan, &module, &Target::sm_90a()).unwrap();
        let lines: Vec<&str> = ptx(&a).lines().map(str::trim).collect();
        let at: Vec<usize> = (0..lines.len()).filter(|i| lines[*i].contains("ld.volatile.shared")).collect();
        assert!(at.iter().all(|i| lines[i + 1] == "wgmma.wait_group.sync.aligned 0;"));
        at.len()
    };
    assert_eq!((held("attention"), held("gemm")), (2, 0));
}

/// The library's attention on the reference mappings: no spills, nothing serialised.
#[test]
fn library_attention_assembles() {
    for (cascade, mapping) in [
        ("attention", "attention_64_causal"),
        ("attention", "attention_128_causal"),
        ("attention", "attention_256_causal"),
        ("attention_full", "attention_64_full"),
        ("attention_full", "attention_128_full"),
        ("attention_full", "attention_256_full"),
    ] {
        let plan = formed(cascade);
        let module = mapped(&plan, &text(&format!("mappings/{mapping}.mapping")));
        assembles(&plan, &module);
    }
}

#[test]
fn a_library_cascade_assembles() {
    let plan = formed_alone("linear_gelu");
    let module = mapped(&plan, &text("mappings/linear_gelu.mapping"));
    assembles(&plan, &module);
}

#[test]
fn launches_carry_what_a_driver_needs() {
    let (plan, module) = lower("gemm", "gemm");
    let a = print(&plan, &module, &Target::sm_90a()).unwrap();
    let gpu = a.launches[0].gpu.as_ref().unwrap();
    // Two consumer warpgroups and the producer's, whose warps share one budget.
    assert_eq!((gpu.threads, gpu.cluster.as_slice()), (384, [2, 1].as_slice()));
    assert_eq!(gpu.shared_bytes, (3 * 48 + 64) * 1024 + 2 * 3 * 8);
    let boxes: Vec<_> = gpu.maps.iter().map(|m| (m.dims.clone(), m.extents.clone(), m.swizzle_bytes)).collect();
    // C's map first (consumers are printed first): 64 rows by 128 bytes, then A's and B's, B cut by the cluster.
    assert_eq!(boxes[0], (vec![1, 0], vec![64, 64], 128));
    assert_eq!(boxes[1], (vec![1, 0], vec![64, 128], 128));
    assert_eq!(boxes[2], (vec![1, 0], vec![64, 32], 128));
    // A phase of `empty` counts every warp of every consumer of both tasks.
    assert!(ptx(&a).contains("mbarrier.init.shared::cta.b64 [%smem+213016], 16;"));
}

#[test]
fn what_has_no_instructions_is_refused_by_name() {
    let (plan, module) = lower("gemm", "gemm");
    let e = print(&plan, &module, &Target::sm_80()).unwrap_err();
    assert_eq!(e.to_string(), "kernel gemm: no PTX is known for clusters before sm_90");
    let (plan, module) = lower("attention", "attention");
    let e = print(&plan, &module, &Target::sm_80()).unwrap_err();
    assert!(e.to_string().contains("before sm_90") || e.to_string().contains("sm_90a"), "{e}");
}
