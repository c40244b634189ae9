//! PTX of the reference mappings, through NVIDIA's assembler: it assembles without warnings, keeps its registers, and
//! the machine code has the tensor-core instructions and waits that were printed, no more.
//!
//! Needs `target/ptxas` here or in a parent folder (`make ptxas`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use einfall_codegen::backend::ptx::{Target, print};
use einfall_codegen::lower::gpu;
use einfall_ir::artifact::{Artifact, Code};
use einfall_ir::kernel::Module;
use einfall_ir::tile::{self, Plan};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn text(path: &str) -> String {
    let path = root().join("tests").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn tool(name: &str) -> PathBuf {
    let here = root().canonicalize().unwrap();
    let found = here.ancestors().map(|d| d.join("target/ptxas/nvidia/cu13/bin").join(name)).find(|p| p.exists());
    found.unwrap_or_else(|| panic!("{name} is not in target/ptxas: run `make ptxas`"))
}

/// What the assembler makes of PTX.
struct Assembled {
    /// What it says (`-v`).
    log: String,
    /// The machine code.
    sass: String,
}

fn assemble(ptx: &str, arch: &str) -> Assembled {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let file = |ext: &str| std::env::temp_dir().join(format!("einfall-ptx-{}-{n}.{ext}", std::process::id()));
    let (source, cubin) = (file("ptx"), file("cubin"));
    std::fs::write(&source, ptx).unwrap();
    let run = |c: &mut Command| {
        let out = c.output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{c:?}:\n{said}");
        said
    };
    let arch = format!("-arch={arch}");
    let log =
        run(Command::new(tool("ptxas")).args([&arch, "-v", "--warn-on-spills"]).arg(&source).arg("-o").arg(&cubin));
    let sass = run(Command::new(tool("nvdisasm")).arg("-c").arg(&cubin));
    let _ = (std::fs::remove_file(source), std::fs::remove_file(cubin));
    Assembled { log, sass }
}

fn ptx(artifact: &Artifact) -> &str {
    match &artifact.code {
        Code::Ptx { text, .. } => text,
        Code::LlvmIr(_) | Code::Object(_) => panic!("a GPU artifact has PTX"),
    }
}

/// The plan of a file and its kernels by a mapping.
fn lower(plan: &str, mapping: &str) -> (Plan, Module) {
    let plan = tile::parse::parse(&text(&format!("plans/{plan}.tile"))).unwrap();
    let module = mapped(&plan, &text(&format!("mappings/{mapping}.mapping")));
    (plan, module)
}

fn mapped(plan: &Plan, mapping: &str) -> Module {
    let mapping = einfall_ir::mapping::parse::parse(mapping).unwrap_or_else(|e| panic!("{e}"));
    gpu::lower(plan, &mapping).unwrap_or_else(|e| panic!("{e:?}"))
}

/// Spilled bytes of a kernel that assembles without other warnings, and whose machine code issues, awaits and fences
/// wgmma exactly as the text does.
fn assembles(plan: &Plan, module: &Module) -> u64 {
    let artifact = print(plan, module, &Target::sm_90a()).unwrap_or_else(|e| panic!("{e}"));
    let text = ptx(&artifact);
    let Assembled { log, sass } = assemble(text, "sm_90a");
    // C75xx: wgmma serialised, waits injected, setmaxnreg ignored.
    for line in log.lines() {
        let harmless = line.contains("info") || line.contains("spill") || line.trim().is_empty();
        assert!(harmless && !line.contains("C75"), "{log}");
    }
    let count = |s: &str, what: &str| s.lines().filter(|l| l.contains(what)).count();
    for (machine, printed) in
        [("HGMMA", "wgmma.mma_async"), ("WARPGROUP.DEPBAR", "wgmma.wait_group"), ("WARPGROUP.ARRIVE", "wgmma.fence")]
    {
        assert_eq!(count(&sass, machine), count(text, printed), "{machine} of {}", module.name);
    }
    let spills = log.lines().filter_map(|l| {
        let (before, _) = l.split_once(" bytes spill stores")?;
        before.split_once("stack frame, ")?.1.parse::<u64>().ok()
    });
    spills.sum::<u64>()
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
        assert_eq!(assembles(&plan, &module), 0, "{} spills", plan.name);
    }
}

/// Parts of a split stream, two tasks of a multiprocessor at a time: the registers at launch are what half of its
/// register file gives each thread, budgets are set from there.
#[test]
fn split_streams_assemble() {
    for (plan, mapping, resident) in [
        ("plans/decode.tile", "decode", 1),
        ("attention_gqa", "attention_decode", 1),
        ("attention_gqa", "attention_decode_columns", 2),
    ] {
        let plan = match plan.strip_suffix(".tile") {
            Some(_) => tile::parse::parse(&text(plan)).unwrap(),
            None => formed(plan),
        };
        let source = text(&format!("mappings/{mapping}.mapping"));
        let mapping = einfall_ir::mapping::parse::parse(&source).unwrap();
        let split = gpu::split_streams::run(&plan, &mapping, 132).unwrap();
        let module = mapped(&split, &source);
        assert_eq!(assembles(&split, &module), 0, "{} spills", plan.name);
        let artifact = print(&split, &module, &Target::sm_90a()).unwrap();
        let text = ptx(&artifact);
        let first = text.split(".visible .entry").nth(1).unwrap();
        assert!(first.contains(&format!(".minnctapersm {resident}\n")));
        // The number of parts is computed once a role.
        assert!(first.matches("div.u32").count() < 24);
    }
}

/// The plan that formation makes of a library cascade for a GPU.
fn formed(name: &str) -> Plan {
    use einfall_codegen::pipeline::{self, Context, Program};
    use einfall_codegen::tables;
    let cascade = einfall_ir::cascade::parse(einfall_kernels::source(name).unwrap()).unwrap().cascades.remove(0);
    let context = Context { atoms: einfall_ir::kernel::atoms::all().collect(), ..Context::default() };
    let records = pipeline::run(tables::TO_TILE, tables::FORMS, Program::Cascade(cascade), &context, None)
        .unwrap_or_else(|(_, stop)| panic!("{stop}"));
    match records.into_iter().next_back().map(|r| r.program) {
        Some(Program::Tile(plan)) => plan,
        other => panic!("{other:?}"),
    }
}

/// Row sums are joined over the four lanes of a row once, after all trips; row maxima are needed in every trip: two rows
/// by two shuffles at four places, the first trip, both loops and the sum's end.
#[test]
fn sums_over_lanes_are_completed_once() {
    let (plan, module) = lower("attention", "attention");
    let a = print(&plan, &module, &Target::sm_90a()).unwrap();
    assert_eq!(ptx(&a).matches("shfl.sync.bfly").count(), 4 * 4);
    // Where something else reads the sum in every trip, it is whole in every trip.
    let source = text("plans/attention.tile")
        .replace("tile l: f32[b, h, m]\n", "tile l: f32[b, h, m]\n        tile t: f32[b, h, m]\n")
        .replace("            w = p\n", "            t = l\n            w = p\n")
        .replace("if l == 0.0 then 0.0 else o / l", "if t == 0.0 then 0.0 else o / t");
    let plan = einfall_ir::tile::parse::parse(&source).unwrap();
    let module =
        mapped(&plan, &text("mappings/attention.mapping").replace("op w slot 3", "op t slot 2\n        op w slot 3"));
    let a = print(&plan, &module, &Target::sm_90a()).unwrap();
    assert_eq!(ptx(&a).matches("shfl.sync.bfly").count(), 2 * 3 * 4);
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
        assert_eq!(assembles(&plan, &module), 0, "{mapping} spills");
    }
}

#[test]
fn a_library_cascade_assembles() {
    let source = einfall_kernels::source("linear_gelu").unwrap();
    let cascade = einfall_ir::cascade::parse(source).unwrap().cascades.remove(0);
    let plan = einfall_codegen::tables::formed(cascade).unwrap();
    let module = mapped(&plan, &text("mappings/linear_gelu.mapping"));
    assert_eq!(assembles(&plan, &module), 0);
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
