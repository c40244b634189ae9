//! Reference mappings lowered for a GPU and evaluated, race-free, before any backend exists: under every adversarial
//! schedule the kernels give what the tile plans mean.

use einfall_codegen::lower::gpu;
use einfall_codegen::pipeline::{self, Context, Program};
use einfall_codegen::tables;
use einfall_ir::analysis::resources;
use einfall_ir::array::Array;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms;
use einfall_ir::kernel::eval::{GlobalBuffer, KernelError, Options, Schedule, run};
use einfall_ir::kernel::{Kernel, Module};
use einfall_ir::tile::{self, BufferKind, Plan};

fn text(path: &str) -> String {
    let path = format!("{}/../tests/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The plan with some ranks fixed, and its kernels by the mapping.
fn lower(plan: &str, fixed: &[(&str, u64)], mapping: &str) -> (Plan, Module) {
    let mut plan = tile::parse::parse(&text(&format!("plans/{plan}.tile"))).unwrap();
    for (_, r) in plan.ranks.iter_mut() {
        r.fixed = fixed.iter().find(|f| f.0 == r.name).map(|f| f.1).or(r.fixed);
    }
    let module = checked(&plan, mapping);
    (plan, module)
}

/// The kernels of a plan by a mapping; they verify, and print as they parse.
fn checked(plan: &Plan, mapping: &str) -> Module {
    checked_on(plan, mapping, resources::Limits::h100().multiprocessors)
}

/// As [`checked`], for a device with fewer multiprocessors.
fn checked_on(plan: &Plan, mapping: &str, multiprocessors: u64) -> Module {
    let mapping = einfall_ir::mapping::parse::parse(mapping).unwrap_or_else(|e| panic!("{e}"));
    let limits = resources::Limits { multiprocessors, ..resources::Limits::h100() };
    let module = gpu::lower_for(plan, &mapping, &limits).unwrap_or_else(|e| panic!("{e:?}"));
    let limits = einfall_ir::kernel::verify::Limits::SM90;
    let violations = einfall_ir::kernel::verify::verify(&module, &limits);
    assert!(violations.is_empty(), "{}", violations.iter().map(|v| format!("{v}\n")).collect::<String>());
    let printed = einfall_ir::kernel::print::print(&module);
    let again = einfall_ir::kernel::parse::parse(&printed).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(einfall_ir::kernel::print::print(&again), printed);
    module
}

/// Deterministic bf16 values in [-1, 1].
fn values(seed: u64) -> impl FnMut(usize) -> f64 {
    let mut s = seed;
    move |_| {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        DType::BF16.round((s >> 40) as f64 / f64::from(1u32 << 23) - 1.0)
    }
}

fn inputs(plan: &Plan, ranks: &[u64]) -> Vec<Array> {
    let takes = |k: BufferKind| matches!(k, BufferKind::Input | BufferKind::InOut);
    plan.buffers
        .iter()
        .enumerate()
        .filter(|(_, (_, b))| takes(b.kind))
        .map(|(i, (_, b))| {
            let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
            let mut value = values(i as u64 * 31 + 7);
            Array::from_fn(b.dtype, &dims, |at| if b.positive { value(at).abs() + 0.125 } else { value(at) })
        })
        .collect()
}

fn buffers(plan: &Plan, ranks: &[u64], inputs: &[Array]) -> Vec<GlobalBuffer> {
    let mut given = inputs.iter();
    plan.buffers
        .iter()
        .map(|(_, b)| {
            let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
            match b.kind {
                BufferKind::Input | BufferKind::InOut => {
                    GlobalBuffer::new(&dims, b.dtype, given.next().unwrap().data.clone())
                }
                BufferKind::Output | BufferKind::Workspace => GlobalBuffer::undefined(&dims, b.dtype),
            }
        })
        .collect()
}

fn execute(
    plan: &Plan,
    kernel: &Kernel,
    ranks: &[u64],
    inputs: &[Array],
    options: &Options,
) -> Result<Vec<GlobalBuffer>, KernelError> {
    let mut b = buffers(plan, ranks, inputs);
    run(kernel, &plan.ranks, ranks, &mut b, options)?;
    Ok(b)
}

/// Runs the single kernel of `module` under every schedule and compares with the tile plan in float64.
fn agrees(plan: &Plan, module: &Module, ranks: &[u64], seeds: u64) {
    let inputs = inputs(plan, ranks);
    let want = tile::eval::run(plan, ranks, &inputs, &tile::eval::Options::default()).unwrap();
    for schedule in Schedule::ALL {
        for seed in 0..seeds {
            let options = Options { schedule, seed, ..Options::default() };
            let got = execute(plan, &module.kernels[0], ranks, &inputs, &options)
                .unwrap_or_else(|e| panic!("{schedule:?} at {ranks:?}: {e}"));
            let outs = plan.buffers.iter().zip(&got).filter(|((_, b), _)| b.kind == BufferKind::Output);
            for (((_, b), got), want) in outs.zip(&want) {
                assert!(got.defined.iter().all(|d| *d), "{} is not written whole at {ranks:?}", b.name);
                for (i, (x, y)) in got.data.iter().zip(&want.data).enumerate() {
                    assert!((x - y).abs() <= 1e-9 * (1.0 + y.abs()), "{}[{i}] {x} {y} at {ranks:?}", b.name);
                }
            }
        }
    }
}

#[test]
fn gemm_cluster_multicast() {
    let (plan, module) = lower("gemm", &[], &text("mappings/gemm.mapping"));
    for (m, n, k) in [(300, 264, 200), (128, 256, 64), (8, 8, 8), (257, 8, 136)] {
        agrees(&plan, &module, &[m, n, k], 1);
    }
}

/// Attention in a work loop: q turns over blocks, the result leaves through its place or through one of its own, and
/// blocks are longest first in sections of heads.
#[test]
fn attention_persistent() {
    let plan = tile::parse::parse(&text("plans/attention.tile")).unwrap();
    let base = text("mappings/attention.mapping");
    let own = base.replace(" reuses q", "");
    for (order, slots, mapping) in [
        ("b, h, m persistent longest_first", 2, &base),
        ("b, h, m persistent longest_first", 3, &own),
        ("b, h, m persistent longest_first", 1, &base),
        ("b, h, m persistent group 2 longest_first", 1, &own),
        ("b, m, h persistent longest_first", 1, &own),
        ("b, h, m persistent group 2 longest_first", 2, &own),
        ("m, h, b persistent", 1, &own),
        ("h, m, b group 2", 1, &own),
    ] {
        let module = checked_on(&plan, &mapping.replace("b, h, m longest_first", order), slots);
        agrees(&plan, &module, &[1, 1, 3, 200, 300, 72, 80], 1);
        agrees(&plan, &module, &[1, 2, 1, 300, 130, 128, 128], 1);
    }
    let staged = base
        .replace("tile q in shared", "tile q in shared stages 2")
        .replace(" stages 2 swizzle 128 by tma\n        tile v", " stages 1 swizzle 128 by tma\n        tile v");
    let module = checked_on(&plan, &staged.replace("b, h, m longest_first", "h, m, b persistent"), 2);
    agrees(&plan, &module, &[1, 1, 3, 200, 300, 72, 80], 1);
}

/// The library's reference mapping where tasks take several blocks: an even number of them in pairs, an odd one in turns,
/// rows without keys among them.
#[test]
fn library_attention_persistent() {
    let plan = formed("attention", &[]);
    for slots in [1, 3] {
        let module = checked_on(&plan, &text("mappings/attention_128_causal.mapping"), slots);
        agrees(&plan, &module, &[1, 2, 2, 200, 300, 72, 80], 1);
        agrees(&plan, &module, &[1, 1, 2, 300, 130, 64, 64], 1);
    }
    let plan = formed("attention_full", &[]);
    let module = checked_on(&plan, &text("mappings/attention_128_full.mapping"), 2);
    agrees(&plan, &module, &[1, 2, 264, 360, 64, 64], 1);
}

/// A section has fewer heads than the mapping says where their keys and values would not stay in the cache: 8 MiB a head
/// leave four, 2 MiB eight.
#[test]
fn sections_fit_the_cache() {
    let printed = |n: u64, group: u64| {
        let plan = formed("attention", &[("N", n), ("E", 128), ("F", 128)]);
        let mapping = text("mappings/attention_128_causal.mapping");
        let mapping = mapping.replace("longest_first", &format!("group {group} longest_first"));
        einfall_ir::kernel::print::print(&checked(&plan, &mapping))
    };
    assert_eq!(printed(16384, 8), printed(16384, 4));
    assert_ne!(printed(16384, 4), printed(16384, 2));
    assert_ne!(printed(4096, 8), printed(4096, 4));
}

/// Masks on both sides of the full blocks, walked up and down.
#[test]
fn attention_window_both_ways() {
    let window = "n <= m + (N - M) and m + (N - M) < n + 150";
    let source = text("plans/attention.tile").replace("n <= m + (N - M)", window);
    let plan = tile::parse::parse(&source).unwrap();
    let base = text("mappings/attention.mapping");
    for mapping in [
        &base,
        &base.replace(" descending", ""),
        &base
            .replace("axis n block 128 ", "axis n block 64 ")
            .replace("op s atom wgmma.m64n128k16", "op s atom wgmma.m64n64k16"),
    ] {
        let module = checked(&plan, mapping);
        agrees(&plan, &module, &[1, 1, 1, 330, 400, 64, 64], 1);
    }
}

#[test]
fn planted_faults_in_work_loops_are_caught() {
    let plan = tile::parse::parse(&text("plans/gemm.tile")).unwrap();
    let module = checked_on(&plan, &text("mappings/gemm_persistent.mapping"), 2);
    let (n, missed) = survivors(&plan, &module, &[512, 264, 256]);
    assert!(n > 30);
    let sound =
        ["Missing consumer.4.12: bar_sync unit_consumer(unit)", "Missing consumer.4.15: bar_sync unit_consumer(unit)"];
    assert_eq!(missed, sound);
}

/// Two swizzle spans of k per step, and a tile of two atoms in n; k ends within a step.
#[test]
fn gemm_blocks_of_several_atoms() {
    let plan = tile::parse::parse(&text("plans/gemm.tile")).unwrap();
    let base = text("mappings/gemm.mapping");
    let deep = base.replace("axis k block 64", "axis k block 128").replace("axis n block 256", "axis n block 128");
    for mapping in [deep.replace("m64n256k16", "m64n128k16"), base.replace("m64n256k16", "m64n128k16")] {
        agrees(&plan, &checked(&plan, &mapping), &[140, 264, 328], 1);
    }
}

/// Clusters along both axes: each task sends a slice of A along its row of tasks and of B along its column.
#[test]
fn gemm_clusters_along_two_axes() {
    let plan = tile::parse::parse(&text("plans/gemm.tile")).unwrap();
    let mapping = text("mappings/gemm.mapping")
        .replace("axis n block 256", "axis n block 128 cluster 2")
        .replace("m64n256k16", "m64n128k16")
        .replace(
            "tile a in shared stages 3 swizzle 128 by tma",
            "tile a in shared stages 3 swizzle 128 by tma multicast n",
        );
    for (work, slots) in [("", 132), ("work order n, m persistent group 2\n        ", 8)] {
        let mapping = mapping.replace("role producer:", &format!("{work}role producer:"));
        let module = checked_on(&plan, &mapping, slots);
        agrees(&plan, &module, &[300, 264, 264], 1);
        agrees(&plan, &module, &[520, 520, 72], 1);
    }
    let module = checked(&plan, &mapping);
    assert_eq!(module.kernels[0].cluster, [2, 2]);
    let (n, missed) = survivors(&plan, &module, &[256, 256, 320]);
    assert!(n > 30);
    // As in the other GEMM: what is given back after the last trip is never filled again.
    let back = "a_b_empty(select(3 <= stage3_k_consumer + 2, stage3_k_consumer + 2 - 3, stage3_k_consumer + 2))";
    let column = "cluster_rank - cluster_rank / 2 * 2";
    let peers = [column, &format!("{column} + 2"), "cluster_rank - cluster_rank % 2 + (cluster_rank % 2 + 1) % 2"];
    let mut sound =
        vec!["WrongStage producer.4.0: wait a_b_empty(stage3_k_producer) phase 1 - parity3_k_producer".to_string()];
    for (at, rank) in (13..).zip(peers) {
        sound.extend(["Missing", "WrongStage"].map(|f| format!("{f} consumer.5.{at}: arrive {back} remote {rank}")));
    }
    sound.push("Missing consumer.9: bar_sync unit_consumer(unit)".to_string());
    assert_eq!(missed, sound);
}

/// A persistent kernel on devices of few multiprocessors: tasks walk several blocks.
#[test]
fn gemm_persistent() {
    let mapping = text("mappings/gemm_persistent.mapping");
    let plan = tile::parse::parse(&text("plans/gemm.tile")).unwrap();
    for (slots, grouped) in [(2, "group 8"), (4, "group 4"), (6, "group 2 longest_first"), (132, "group 8")] {
        let module = checked_on(&plan, &mapping.replace("group 8", grouped), slots);
        agrees(&plan, &module, &[1100, 520, 136], 1);
        agrees(&plan, &module, &[300, 264, 320], 1);
    }
    // One unit of work per task, sections of two along m.
    let module = checked(&plan, &mapping.replace("persistent group 8", "group 2"));
    agrees(&plan, &module, &[700, 520, 64], 1);
    assert_eq!(module.kernels[0].cluster, [2]);
}

#[test]
fn attention_causal_overlapped() {
    let (plan, module) = lower("attention", &[], &text("mappings/attention.mapping"));
    // [B, H, R, M, N, E, F]: tails in m, n, e and f; rows without keys (M > N); one block, none to skip.
    for ranks in [[1, 1, 2, 200, 300, 72, 80], [1, 1, 1, 300, 130, 128, 128], [2, 1, 1, 40, 40, 64, 16]] {
        agrees(&plan, &module, &ranks, 1);
    }
}

#[test]
fn attention_full_overlapped() {
    let (plan, module) = lower("attention_full", &[], &text("mappings/attention_full.mapping"));
    for ranks in [[1, 1, 2, 136, 360, 128, 128], [1, 1, 1, 8, 176, 128, 128], [1, 2, 1, 64, 528, 128, 64]] {
        agrees(&plan, &module, &ranks, 1);
    }
}

#[test]
fn lstm_resident() {
    let (plan, module) = lower("lstm_gates", &[], &text("mappings/lstm.mapping"));
    // [T, B, H, D]: batch and width with tails, a single step, no step.
    for ranks in [[5, 20, 2, 96], [1, 3, 1, 128], [0, 2, 1, 64]] {
        agrees(&plan, &module, &ranks, 1);
    }
    // Blocks of 8 rows; states that fill half an instruction, spread over all warps.
    let (plan, module) = lower("lstm_gates", &[], &text("mappings/lstm_64.mapping"));
    agrees(&plan, &module, &[4, 11, 2, 56], 1);
    let (plan, module) = lower("lstm_gates", &[], &text("mappings/lstm_32.mapping"));
    for ranks in [[4, 11, 2, 32], [3, 8, 1, 24]] {
        agrees(&plan, &module, &ranks, 1);
    }
}

/// Mutants of the kernel that no schedule catches: one line per fault and statement.
fn survivors(plan: &Plan, module: &Module, ranks: &[u64]) -> (usize, Vec<String>) {
    let inputs = inputs(plan, ranks);
    let want = tile::eval::run(plan, ranks, &inputs, &tile::eval::Options::default()).unwrap();
    let right = |kernel: &Kernel, schedule| {
        let options = Options { schedule, seed: 3, ..Options::default() };
        let Ok(got) = execute(plan, kernel, ranks, &inputs, &options) else { return false };
        let outs = plan.buffers.iter().zip(&got).filter(|((_, b), _)| b.kind == BufferKind::Output);
        outs.zip(&want).all(|((_, g), w)| {
            let near = |(x, y): (&f64, &f64)| (x - y).abs() <= 1e-9 * (1.0 + y.abs());
            g.defined.iter().all(|d| *d) && g.data.iter().zip(&w.data).all(near)
        })
    };
    let mut n = 0;
    let mut missed = Vec::new();
    for m in einfall_ir::kernel::mutate::mutants(&module.kernels[0], &plan.ranks) {
        n += 1;
        if Schedule::ALL.into_iter().all(|s| right(&m.kernel, s)) {
            missed.push(format!("{:?} {}", m.fault, m.place));
        }
    }
    (n, missed)
}

/// Every planted fault is caught, except those that change nothing that can be observed:
/// - a `bar_sync unit_..` orders the threads of one unit, which the evaluator runs as one;
/// - without a `commit` two groups become one, so that waits only get longer;
/// - waiting for, or giving back, the next stage of a ring is sound as long as all of a barrier's uses move together;
/// - what is given back after a stream's last trips is never filled again.
fn all_caught(plan: &str, mapping: &str, ranks: &[u64], sound: &[&str]) {
    let (plan, module) = lower(plan, &[], &text(&format!("mappings/{mapping}.mapping")));
    let (n, missed) = survivors(&plan, &module, ranks);
    assert!(n > 30);
    assert_eq!(missed, sound);
}

#[test]
fn planted_faults_in_gemm_are_caught() {
    let sound = [
        "WrongStage producer.4.0: wait a_b_empty(stage3_k_producer) phase 1 - parity3_k_producer",
        "Missing consumer.5.13: arrive a_b_empty(select(3 <= stage3_k_consumer + 2, stage3_k_consumer + 2 - 3, stage3_k_consumer + 2)) remote 0",
        "WrongStage consumer.5.13: arrive a_b_empty(select(3 <= stage3_k_consumer + 2, stage3_k_consumer + 2 - 3, stage3_k_consumer + 2)) remote 0",
        "Missing consumer.5.14: arrive a_b_empty(select(3 <= stage3_k_consumer + 2, stage3_k_consumer + 2 - 3, stage3_k_consumer + 2)) remote 1",
        "WrongStage consumer.5.14: arrive a_b_empty(select(3 <= stage3_k_consumer + 2, stage3_k_consumer + 2 - 3, stage3_k_consumer + 2)) remote 1",
        "Missing consumer.9: bar_sync unit_consumer(unit)",
    ];
    all_caught("gemm", "gemm", &[256, 256, 320], &sound);
}

#[test]
fn planted_faults_in_attention_are_caught() {
    let sound = [
        "WrongStage producer.7.0: wait k_empty(stage2_n_producer) phase 1 - parity2_n_producer",
        "WrongStage producer.7.4: wait v_empty(stage2_n_producer) phase 1 - parity2_n_producer",
        "WrongStage consumer.10.28.24: arrive k_empty(stage2_n_consumer)",
        "Missing consumer.10.45: arrive v_empty(stage2_n_consumer)",
        "WrongStage consumer.10.45: arrive v_empty(stage2_n_consumer)",
        "Missing consumer.14: bar_sync unit_consumer(unit)",
    ];
    all_caught("attention", "attention", &[1, 1, 1, 128, 572, 128, 128], &sound);
}

#[test]
fn planted_faults_in_lstm_are_caught() {
    let sound = [
        "Missing cell.14.7.3: bar_sync unit_cell(unit)",
        "Missing cell.14.7.15: commit wgmma",
        "Missing cell.14.7.24: commit wgmma",
        "Missing cell.14.12: bar_sync unit_cell(unit)",
        "Missing cell.14.24: commit wgmma",
        "Missing cell.14.33: commit wgmma",
    ];
    all_caught("lstm_gates", "lstm", &[5, 16, 1, 128], &sound);
}

/// The mapping with lines changed, lowered for the attention plan and run.
#[test]
fn schedules_are_choices() {
    let base = text("mappings/attention.mapping");
    let mut plain = base.replace(" skew 1", "");
    (0..4).for_each(|i| plain = plain.replace(&format!(" slot {i}"), ""));
    for (what, mapping) in [
        ("no overlap", plain.clone()),
        ("no overlap, no turns, one stage", plain.replace(" ping_pong", "").replace(" stages 2", "")),
        ("a second trip behind", base.replace("skew 1 slot 1", "skew 2 slot 1").replace("stages 2", "stages 3")),
        ("one unit", base.replace("block 128 units 2", "block 64").replace("2 warpgroup", "1 warpgroup")),
        ("V a trip later", base.replace("op v role producer", "op v role producer skew 1")),
        (
            "three stages",
            base.replace("axis n block 128 descending", "axis n block 64")
                .replace("stages 2", "stages 3")
                .replace("op s atom wgmma.m64n128k16", "op s atom wgmma.m64n64k16"),
        ),
        (
            "stores from registers",
            base.replace("        op store.O by tma\n", "")
                .replace("        tile O_out in shared swizzle 128 reuses q\n", ""),
        ),
    ] {
        if what == "a second trip behind" {
            // P of two iterations would live in one register tile.
            let plan = tile::parse::parse(&text("plans/attention.tile")).unwrap();
            let mapping = einfall_ir::mapping::parse::parse(&mapping).unwrap();
            let refused = gpu::lower(&plan, &mapping).expect_err(what);
            assert!(refused[0].message.contains("w and o@2 use tile w out of order"), "{refused:?}");
            continue;
        }
        let (plan, module) = lower("attention", &[], &mapping);
        let ranks = [1, 1, 1, 136, 392, 72, 80];
        agrees(&plan, &module, &ranks, 1);
    }
}

#[test]
fn infeasible_mappings_name_the_constraint() {
    for (plan, mapping, from, to, says) in [
        ("gemm", "gemm", "stages 3", "stages 4", "resources: kernel gemm: shared memory: 26"),
        ("gemm", "gemm", "block 128 cluster 2 units 2", "block 256 cluster 2 units 2", "shared memory"),
        ("gemm", "gemm", "regs 232", "regs 144", "registers of consumer: 128 of at most 122"),
        ("gemm", "gemm", "regs 40", "regs 240", "registers of the task"),
        ("gemm", "gemm", "m64n256k16.bf16", "m64n256k16.f16", "atom types: a is bf16"),
        (
            "gemm",
            "gemm",
            "m64n256k16.bf16",
            "m64n96k16.bf16",
            "atom shape: n of c@1 is 256 per unit, the atom takes 96",
        ),
        ("gemm", "gemm", "wgmma.m64n256k16.bf16", "wgmma.m64n260k16.bf16", "atoms: there is no atom"),
        ("gemm", "gemm", " atom wgmma.m64n256k16.bf16", "", "atoms: contraction c@1 has no atom"),
        ("gemm", "gemm", "axis k block 64", "axis k block 32", "swizzle: tile a"),
        ("gemm", "gemm", "role consumer by", "role producer by", "roles: tile c in registers is used by c and C_out"),
        ("gemm", "gemm", "        axis k block 64\n", "", "blocks: axis k of kernel gemm has no block"),
        ("gemm", "gemm_persistent", "group 8", "group 3", "work loop: a group of 3 blocks along m cuts clusters of 2"),
        ("gemm", "gemm", "axis n block 256", "axis n block 256 descending", "descends but is not a stream axis"),
        (
            "lstm_gates",
            "lstm",
            "role cell",
            "axis t block 1 descending\n        role cell",
            "stream order: t does not descend",
        ),
        ("attention", "attention", "reuses q", "reuses k", "reuse: O_out cannot take the place of k"),
        ("gemm", "gemm", "units 2\n", "units 2\n        split k parts 2 merge cluster\n", "split"),
        ("attention", "attention", "a registers skew", "skew", "operand source"),
    ] {
        let source = text(&format!("mappings/{mapping}.mapping"));
        assert!(source.contains(from), "{from}");
        let plan = tile::parse::parse(&text(&format!("plans/{plan}.tile"))).unwrap();
        let mapping = einfall_ir::mapping::parse::parse(&source.replace(from, to)).unwrap();
        let refused = gpu::lower(&plan, &mapping).expect_err(to);
        assert!(refused.iter().any(|d| d.message.contains(says)), "{from} → {to}: {refused:?}");
        assert!(refused.iter().all(|d| d.help.is_some()));
    }
}

#[test]
fn resources_are_those_of_the_papers() {
    use resources::{Limits, resources};
    let of = |plan: &str, mapping: &str, role: &str| {
        let (_, module) = lower(plan, &[], &text(&format!("mappings/{mapping}.mapping")));
        let r = resources(&module.kernels[0], &Limits::h100());
        (r.roles.iter().find(|x| x.name == role).unwrap().fragment_registers, r.shared_bytes)
    };
    // 64×256 floats over 128 threads; three stages of 48 KiB, 64 KiB of staging and two barriers of three stages.
    assert_eq!(of("gemm", "gemm", "consumer"), (128, (3 * 48 + 64) * 1024 + 2 * 3 * 8));
    // O + S + P = D/2 + N/2 + N/4, and what the softmax carries per row (five numbers for two rows of a thread).
    let (registers, shared) = of("attention", "attention", "consumer");
    assert!((160..=170).contains(&registers), "{registers}");
    assert_eq!(shared, 32 * 1024 * 5 + 8 * 9);
    let (registers, _) = of("attention_full", "attention_full", "consumer");
    assert!((196..=208).contains(&registers), "{registers}");
}

/// The plan of a library cascade as a device with the given instructions gets it.
fn formed(cascade: &str, fixed: &[(&str, u64)]) -> Plan {
    let source = einfall_kernels::source(cascade).unwrap_or_else(|| panic!("there is no cascade {cascade}"));
    form(source, fixed)
}

fn form(source: &str, fixed: &[(&str, u64)]) -> Plan {
    let mut c = einfall_ir::cascade::parse(source).unwrap_or_else(|d| panic!("{d:?}\n{source}")).cascades.remove(0);
    for (name, extent) in fixed {
        let rank = c.rank(name).unwrap_or_else(|| panic!("there is no rank {name}"));
        c.ranks[rank].fixed = Some(*extent);
    }
    let context = Context { atoms: atoms::all().collect(), ..Context::default() };
    let records = pipeline::run(tables::TO_TILE, tables::FORMS, Program::Cascade(c), &context, None)
        .unwrap_or_else(|(_, stop)| panic!("{stop}"));
    match records.into_iter().next_back().map(|r| r.program) {
        Some(Program::Tile(plan)) => plan,
        other => panic!("{other:?}"),
    }
}

/// A library cascade through formation and a mapping, under every schedule.
fn library(cascade: &str, mapping: &str, sizes: &[&[u64]]) -> Module {
    let plan = formed(cascade, &[]);
    let module = checked(&plan, &text(&format!("mappings/{mapping}.mapping")));
    for ranks in sizes {
        agrees(&plan, &module, ranks, 1);
    }
    module
}

#[test]
fn library_linear_layers() {
    library("linear_gelu", "linear_gelu", &[&[200, 136, 264]]);
    library("matmul", "matmul_128x256", &[&[300, 264, 200], &[8, 8, 8]]);
    library("matmul", "matmul_128x128", &[&[300, 264, 200], &[128, 128, 64]]);
}

#[test]
fn library_attention_causal() {
    // [B, G, R, M, N, E, F]: tails in m, n, e and f; rows without keys (M > N); one block, none to skip.
    let sizes: [&[u64]; 3] = [&[1, 1, 2, 200, 300, 72, 80], &[1, 1, 1, 300, 130, 128, 128], &[2, 1, 1, 40, 40, 64, 16]];
    library("attention", "attention_128_causal", &sizes);
    library("attention", "attention_64_causal", &[&[1, 1, 2, 200, 300, 64, 64], &[1, 2, 1, 16, 400, 40, 56]]);
    library("attention", "attention_256_causal", &[&[1, 1, 1, 136, 200, 256, 256]]);
}

#[test]
fn library_attention_full() {
    // [B, H, M, N, E, F].
    library("attention_full", "attention_128_full", &[&[1, 2, 136, 360, 128, 128], &[1, 1, 8, 176, 128, 128]]);
    library("attention_full", "attention_64_full", &[&[1, 1, 200, 300, 64, 64]]);
    library("attention_full", "attention_256_full", &[&[1, 1, 136, 200, 256, 248]]);
}

#[test]
fn library_lstm_resident() {
    // [T, B, H, D]: batch and width with tails, a single step, no step.
    library("lstm", "lstm_128", &[&[5, 20, 2, 96], &[1, 3, 1, 128], &[0, 2, 1, 64]]);
}

/// A causal filter leaves out every key beyond the last, so a masked block selects once per score and nothing else asks
/// where a key is; a filter that does not keeps its limits.
#[test]
fn a_mask_is_applied_once() {
    use einfall_ir::kernel::Stmt;
    let mapping = text("mappings/attention_128_causal.mapping");
    let count = |plan: &Plan| {
        let module = checked(plan, &mapping);
        let printed = einfall_ir::kernel::print::print(&module);
        let lines = |what: &[&str]| printed.lines().filter(|l| what.iter().all(|w| l.contains(w))).count();
        let k = &module.kernels[0];
        let limited = |body: &[Stmt]| {
            body.iter().filter(|s| matches!(s, Stmt::Reduce { bounds, .. } if !bounds.is_empty())).count()
        };
        let mut reductions = 0;
        fn all<'s>(body: &'s [Stmt], f: &mut dyn FnMut(&'s [Stmt])) {
            f(body);
            for s in body {
                match s {
                    Stmt::For { body, .. } => all(body, f),
                    Stmt::If { then, otherwise, .. } => {
                        all(then, f);
                        all(otherwise, f);
                    }
                    _ => {}
                }
            }
        }
        k.roles.iter().for_each(|r| all(&r.body, &mut |b| reductions += limited(b)));
        (lines(&["map r0 = select"]), lines(&["map sum_n_2_a_bf16 = select"]), reductions, module)
    };
    let causal = formed("attention", &[]);
    let (scores, weights, reductions, _) = count(&causal);
    // The first trip and the loop of masked blocks.
    assert_eq!((scores, weights, reductions), (2, 0, 0));
    // Keys beyond the last pass this filter, or are not proved not to.
    let source = einfall_kernels::source("attention").unwrap();
    for filter in ["n <= m + 9", "n <= 2 * m"] {
        let plan = form(&source.replace("n <= m + (N - M)", filter), &[]);
        let (scores, weights, reductions, module) = count(&plan);
        assert!(scores > 0 && weights > 0 && reductions > 0, "{filter}: {scores} {weights} {reductions}");
        agrees(&plan, &module, &[1, 1, 1, 40, 37, 64, 16], 1);
        agrees(&plan, &module, &[1, 1, 1, 150, 140, 16, 16], 1);
    }
}

/// Operations per score in the softmax of the blocks without a mask: one multiply-add, one power of two, one maximum,
/// one sum and one rounding.
#[test]
fn a_score_costs_one_multiply_add_and_one_power() {
    use einfall_ir::kernel::{Expr, Stmt};
    let plan = formed("attention", &[]);
    let module = checked(&plan, &text("mappings/attention_128_causal.mapping"));
    let k = &module.kernels[0];
    let consumer = k.roles.iter().find(|r| r.name == "consumer").unwrap();
    fn loops<'s>(body: &'s [Stmt], found: &mut Vec<&'s [Stmt]>) {
        for s in body {
            match s {
                Stmt::For { body, .. } => {
                    found.push(body);
                    loops(body, found);
                }
                Stmt::If { then, otherwise, .. } => {
                    loops(then, found);
                    loops(otherwise, found);
                }
                _ => {}
            }
        }
    }
    let mut all = Vec::new();
    loops(&consumer.body, &mut all);
    // The loop without masks: none of its maps selects by coordinates of scores.
    let wide = |f: einfall_ir::kernel::FragId| k.frags[f].dist.dims.len() == 2 && k.frags[f].name != "sum_n_2";
    let per_score = |body: &[Stmt]| {
        let mut names = Vec::new();
        for s in body {
            match s {
                Stmt::Map { out, value: Expr::Frag { .. } } if wide(*out) => names.push("copy".to_string()),
                Stmt::Map { out, value } if wide(*out) => names.push(format!("{value:?}")),
                Stmt::Reduce { src, op, .. } if wide(*src) => names.push(op.name().to_string()),
                _ => {}
            }
        }
        names
    };
    let plain = all.iter().map(|b| per_score(b)).find(|n| !n.is_empty() && n.iter().all(|x| !x.contains("Select")));
    let plain = plain.expect("a loop without masks");
    let kinds: Vec<&str> = plain.iter().map(|x| x.split('(').next().unwrap()).collect();
    // max, exp2(r * c - x), its sum, and the copy that rounds.
    assert_eq!(kinds, ["max", "Unary", "sum", "copy"], "{plain:#?}");
    let power = &plain[1];
    let count = |what: &str| power.matches(what).count();
    assert_eq!((count("Exp2"), count("Sub"), count("Div"), count("Add")), (1, 1, 0, 0), "{power}");
    // One product per score; the other is of two scalars.
    assert_eq!(count("Mul"), 2, "{power}");
}
