//! Every reference mapping of every plan and library cascade it is for, through NVIDIA's assembler without a GPU: no
//! warning, no spill, no injected or serialised wait; registers within a multiprocessor's; and machine code that
//! contracts, copies, commits and waits as often as the text says.
//!
//! Mappings for compute capability 8.0 are assembled for 8.0, 9.0 and 10.0: that code runs on all of them.

mod assembler;

use assembler::{Assembled, all, assemble};
use einfall_autotune::model_gpu::choose;
use einfall_codegen::backend::ptx::{Target, print};
use einfall_codegen::lower::gpu;
use einfall_codegen::pipeline::{self, Context, Program};
use einfall_codegen::tables;
use einfall_ir::analysis::resources::{Limits, resources};
use einfall_ir::artifact::{Artifact, Code};
use einfall_ir::kernel::{Module, atoms};
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{self, Plan};

/// The texts of files with an extension in a folder of `tests`, with their names.
fn texts(folder: &str, extension: &str) -> Vec<(String, String)> {
    let folder = format!("{}/../tests/{folder}", env!("CARGO_MANIFEST_DIR"));
    let mut list: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    list.retain(|p| p.extension().is_some_and(|e| e == extension));
    list.sort();
    let read = |p: std::path::PathBuf| {
        let name = p.file_stem().unwrap().to_string_lossy().into_owned();
        (name, std::fs::read_to_string(&p).unwrap())
    };
    list.into_iter().map(read).collect()
}

/// The plans of the library's cascades that have one, as they are before mappings.
fn library() -> Vec<Plan> {
    let mut plans = Vec::new();
    for (_, source) in einfall_kernels::SOURCES {
        for cascade in einfall_ir::cascade::parse(source).unwrap().cascades {
            let context = Context { atoms: atoms::all().collect(), ..Context::default() };
            let formed = pipeline::run(tables::TO_TILE, tables::FORMS, Program::Cascade(cascade), &context, None);
            if let Ok(records) = formed
                && let Some(Program::Tile(plan)) = records.into_iter().next_back().map(|r| r.program)
            {
                plans.push(plan);
            }
        }
    }
    plans
}

/// The plan after its splits, and its kernels.
fn lowered(plan: &Plan, mapping: &Mapping) -> Result<(Plan, Module), String> {
    let gpu = DataSheet::named(&mapping.target).and_then(|s| s.gpu);
    let slots = gpu.map_or_else(Limits::h100, |g| Limits::of(&g)).multiprocessors;
    let split = gpu::split_streams::run(plan, mapping, slots).map_err(|e| format!("{e:?}"))?;
    let module = gpu::lower(&split, mapping).map_err(|e| format!("{e:?}"))?;
    Ok((split, module))
}

/// Which architectures a target's code is assembled for.
fn architectures(target: &Target) -> &'static [&'static str] {
    if target.arch == "sm_90a" { &["sm_90a"] } else { &["sm_80", "sm_90", "sm_100a"] }
}

/// What the machine code must have as often as the text: instruction by instruction.
fn pairs(arch: &str) -> &'static [(&'static str, &'static str)] {
    match arch {
        "sm_90a" => &[
            ("HGMMA", "wgmma.mma_async"),
            ("WARPGROUP.DEPBAR", "wgmma.wait_group"),
            ("WARPGROUP.ARRIVE", "wgmma.fence"),
            ("HMMA", "mma.sync"),
            ("LDSM", "ldmatrix"),
            ("STSM", "stmatrix"),
            ("UTMALDG", ".shared::cluster.global.mbarrier::complete_tx"),
            ("UTMASTG", ".global.shared::cta.bulk_group"),
            ("ACQBULK", "griddepcontrol.wait"),
            ("PREEXIT", "griddepcontrol.launch_dependents"),
        ],
        _ => &[
            ("HMMA", "mma.sync"),
            ("LDSM", "ldmatrix"),
            ("LDGSTS", ".shared::cta.global ["),
            ("LDGDEPBAR", "cp.async.commit_group"),
            ("DEPBAR.LE", "cp.async.wait_group"),
        ],
    }
}

/// Mappings by which several contractions load the same operand, which the assembler does once for some cards.
const MERGED: [&str; 1] = ["lstm_64_a100"];

fn text(a: &Artifact) -> &str {
    match &a.code {
        Code::Ptx { text, .. } => text,
        Code::LlvmIr(_) | Code::Object(_) | Code::Linked | Code::Wgsl { .. } => panic!("a GPU artifact has PTX"),
    }
}

/// Assembles a module for all architectures of its target.
fn check(name: &str, plan: &Plan, module: &Module, target: &Target) -> Result<(), String> {
    let artifact = print(plan, module, target).map_err(|e| format!("{name}: {e}"))?;
    let ptx = text(&artifact);
    for arch in architectures(target) {
        let made: Assembled = assemble(ptx, arch).map_err(|e| format!("{name} for {arch}:\n{e}"))?;
        for (machine, printed) in pairs(arch) {
            let (got, want) = (made.count(machine), ptx.lines().filter(|l| l.contains(printed)).count());
            let merged = *machine == "LDSM" && MERGED.contains(&name) && got > 0 && got < want;
            if got != want && !merged {
                return Err(format!("{name} for {arch}: {got} {machine} of {want} {printed}"));
            }
        }
        let registers = made.registers();
        for (l, k) in artifact.launches.iter().zip(&module.kernels) {
            let threads = u64::from(l.gpu.as_ref().map_or(0, |g| g.threads));
            let used = registers.iter().find(|(n, _)| *n == l.symbol).map(|r| r.1);
            let used = used.ok_or_else(|| format!("{name} for {arch}: nothing is said of {}", l.symbol))?;
            // Registers are given out by 8 to each thread; roles hand theirs over by budgets, out of what the task starts
            // with.
            let budgets = k.roles.len() > 1 && k.roles.iter().any(|r| r.regs.is_some());
            let limits =
                DataSheet::named(&target.name).and_then(|s| s.gpu).map_or_else(Limits::h100, |g| Limits::of(&g));
            let start = used.next_multiple_of(8) * threads;
            let taken = if budgets { resources(k, &limits).registers.max(start) } else { start };
            if taken > target.registers {
                return Err(format!("{name} for {arch}: {} takes {taken} registers", l.symbol));
            }
        }
    }
    Ok(())
}

#[test]
fn every_reference_mapping_assembles() {
    let mut plans: Vec<Plan> = texts("plans", "tile").iter().map(|(_, t)| tile::parse::parse(t).unwrap()).collect();
    plans.extend(library());
    let mut jobs = Vec::new();
    for (name, t) in texts("mappings", "mapping") {
        let mapping = einfall_ir::mapping::parse::parse(&t).unwrap_or_else(|e| panic!("{name}: {e}"));
        let fits = |p: &&Plan| p.name == mapping.plan && lowered(p, &mapping).is_ok();
        let of: Vec<&Plan> = plans.iter().filter(fits).collect();
        assert!(!of.is_empty(), "{name} is for no plan");
        jobs.extend(of.into_iter().map(|p| (name.clone(), p.clone(), mapping.clone())));
    }
    all(&jobs, |(name, plan, mapping)| {
        let (plan, module) = lowered(plan, mapping)?;
        let sheet = DataSheet::named(&mapping.target).ok_or_else(|| format!("{name}: no sheet {}", mapping.target))?;
        check(name, &plan, &module, &Target::of(&sheet).expect("a GPU"))
    });
}

/// Kernels without contractions, by the rule, for compute capability 8.0.
#[test]
fn rows_assemble_for_every_card_since_ampere() {
    let names = [
        "argmax_rows",
        "cross_entropy",
        "layernorm",
        "logsumexp_rows",
        "mean_variance",
        "rmsnorm",
        "softmax",
        "third_moment",
    ];
    let plans: Vec<Plan> = library().into_iter().filter(|p| names.contains(&p.name.as_str())).collect();
    assert!(plans.len() + 1 >= names.len(), "{:?}", plans.iter().map(|p| &p.name).collect::<Vec<_>>());
    let jobs: Vec<(&Plan, &str)> = plans.iter().flat_map(|p| [(p, "a100"), (p, "rtx4090")]).collect();
    all(&jobs, |(plan, sheet)| {
        let sheet = DataSheet::named(sheet).unwrap();
        let mapping = choose(plan, &sheet, None);
        let (plan, module) = lowered(plan, &mapping)?;
        check(&format!("{} on {}", plan.name, sheet.name), &plan, &module, &Target::of(&sheet).unwrap())
    });
}

/// Spills and serialised contractions are errors, not remarks.
#[test]
fn what_the_assembler_warns_of_fails() {
    let read = |name: &str| texts("mappings", "mapping").into_iter().find(|(n, _)| n == name).unwrap().1;
    let plan = library().into_iter().find(|p| p.name == "matmul").unwrap();
    for (name, arch, from, to, says) in [
        ("matmul_128x128_a100", "sm_80", ".maxntid", ".maxnreg 64\n.maxntid", "spilled"),
        ("matmul_128x128", "sm_90a", "wgmma.wait_group.sync.aligned 0;", "", "C75"),
    ] {
        let mapping = einfall_ir::mapping::parse::parse(&read(name)).unwrap();
        let (plan, module) = lowered(&plan, &mapping).unwrap();
        let target = Target::of(&DataSheet::named(&mapping.target).unwrap()).unwrap();
        let artifact = print(&plan, &module, &target).unwrap();
        assert!(text(&artifact).contains(from), "{name} has {from}");
        let said = assemble(&text(&artifact).replace(from, to), arch).map(|_| ()).unwrap_err();
        assert!(said.contains(says), "{name}: {said}");
    }
}
