//! Reference mappings lowered for a GPU and evaluated, race-free, before any backend exists: under every adversarial
//! schedule the kernels give what the tile plans mean.

mod device;

use device::{agrees, formed, formed_at, formed_text, lowered, lowered_on, plan, survivors, text};
use einfall_codegen::lower::gpu;
use einfall_ir::analysis::resources;
use einfall_ir::kernel::Module;
use einfall_ir::tile::{self, Plan};

/// A plan of `tests/plans` and its kernels by the mapping.
fn lower(name: &str, mapping: &str) -> (Plan, Module) {
    let plan = plan(name);
    let module = lowered(&plan, mapping);
    (plan, module)
}

#[test]
fn gemm_cluster_multicast() {
    let (plan, module) = lower("gemm", &text("mappings/gemm.mapping"));
    for (m, n, k) in [(300, 264, 200), (128, 256, 64), (8, 8, 8), (257, 8, 136)] {
        agrees(&plan, &module, &[m, n, k], 1);
    }
}

/// Attention in a work loop: q turns over blocks, the result leaves through its place or through one of its own, and
/// blocks are longest first in sections of heads.
#[test]
fn attention_persistent() {
    let plan = plan("attention");
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
        let module = lowered_on(&plan, &mapping.replace("b, h, m longest_first", order), Some(slots));
        agrees(&plan, &module, &[1, 1, 3, 200, 300, 72, 80], 1);
        agrees(&plan, &module, &[1, 2, 1, 300, 130, 128, 128], 1);
    }
    let staged = base
        .replace("tile q in shared", "tile q in shared stages 2")
        .replace(" stages 2 swizzle 128 by tma\n        tile v", " stages 1 swizzle 128 by tma\n        tile v");
    let module = lowered_on(&plan, &staged.replace("b, h, m longest_first", "h, m, b persistent"), Some(2));
    agrees(&plan, &module, &[1, 1, 3, 200, 300, 72, 80], 1);
}

/// The library's reference mapping where tasks take several blocks: an even number of them in pairs, an odd one in turns,
/// rows without keys among them.
#[test]
fn library_attention_persistent() {
    let plan = formed("attention");
    for slots in [1, 3] {
        let module = lowered_on(&plan, &text("mappings/attention_128_causal.mapping"), Some(slots));
        agrees(&plan, &module, &[1, 2, 2, 200, 300, 72, 80], 1);
        agrees(&plan, &module, &[1, 1, 2, 300, 130, 64, 64], 1);
    }
    let plan = formed("attention_full");
    let module = lowered_on(&plan, &text("mappings/attention_128_full.mapping"), Some(2));
    agrees(&plan, &module, &[1, 2, 264, 360, 64, 64], 1);
}

/// A section has fewer heads than the mapping says where their keys and values would not stay in the cache: 8 MiB a head
/// leave four, 2 MiB eight.
#[test]
fn sections_fit_the_cache() {
    let printed = |n: u64, group: u64| {
        let plan = formed_at("attention", &[("N", n), ("E", 128), ("F", 128)]);
        let mapping = text("mappings/attention_128_causal.mapping");
        let mapping = mapping.replace("longest_first", &format!("group {group} longest_first"));
        einfall_ir::kernel::print::print(&lowered(&plan, &mapping))
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
        let module = lowered(&plan, mapping);
        agrees(&plan, &module, &[1, 1, 1, 330, 400, 64, 64], 1);
    }
}

#[test]
fn planted_faults_in_work_loops_are_caught() {
    let plan = plan("gemm");
    let module = lowered_on(&plan, &text("mappings/gemm_persistent.mapping"), Some(2));
    let (n, missed) = survivors(&plan, &module, &[&[512, 264, 256]]);
    assert!(n > 30);
    let sound =
        ["Missing consumer.4.12: bar_sync unit_consumer(unit)", "Missing consumer.4.15: bar_sync unit_consumer(unit)"];
    assert_eq!(missed, sound);
}

/// Two swizzle spans of k per step, and a tile of two atoms in n; k ends within a step.
#[test]
fn gemm_blocks_of_several_atoms() {
    let plan = plan("gemm");
    let base = text("mappings/gemm.mapping");
    let deep = base.replace("axis k block 64", "axis k block 128").replace("axis n block 256", "axis n block 128");
    for mapping in [deep.replace("m64n256k16", "m64n128k16"), base.replace("m64n256k16", "m64n128k16")] {
        agrees(&plan, &lowered(&plan, &mapping), &[140, 264, 328], 1);
    }
}

/// Clusters along both axes: each task sends a slice of A along its row of tasks and of B along its column.
#[test]
fn gemm_clusters_along_two_axes() {
    let plan = plan("gemm");
    let mapping = text("mappings/gemm.mapping")
        .replace("axis n block 256", "axis n block 128 cluster 2")
        .replace("m64n256k16", "m64n128k16")
        .replace(
            "tile a in shared stages 3 swizzle 128 by tma",
            "tile a in shared stages 3 swizzle 128 by tma multicast n",
        );
    for (work, slots) in [("", 132), ("work order n, m persistent group 2\n        ", 8)] {
        let mapping = mapping.replace("role producer:", &format!("{work}role producer:"));
        let module = lowered_on(&plan, &mapping, Some(slots));
        agrees(&plan, &module, &[300, 264, 264], 1);
        agrees(&plan, &module, &[520, 520, 72], 1);
    }
    let module = lowered(&plan, &mapping);
    assert_eq!(module.kernels[0].cluster, [2, 2]);
    let (n, missed) = survivors(&plan, &module, &[&[256, 256, 320]]);
    assert!(n > 30);
    let sound = [
        "WrongStage producer.4.0: wait a_b_empty(stage3_k_producer) phase 1 - parity3_k_producer",
        "Missing consumer.9: bar_sync unit_consumer(unit)",
    ];
    assert_eq!(missed, sound);
}

/// A persistent kernel on devices of few multiprocessors: tasks walk several blocks.
#[test]
fn gemm_persistent() {
    let mapping = text("mappings/gemm_persistent.mapping");
    let plan = plan("gemm");
    for (slots, grouped) in [(2, "group 8"), (4, "group 4"), (6, "group 2 longest_first"), (132, "group 8")] {
        let module = lowered_on(&plan, &mapping.replace("group 8", grouped), Some(slots));
        agrees(&plan, &module, &[1100, 520, 136], 1);
        agrees(&plan, &module, &[300, 264, 320], 1);
    }
    // One unit of work per task, sections of two along m.
    let module = lowered(&plan, &mapping.replace("persistent group 8", "group 2"));
    agrees(&plan, &module, &[700, 520, 64], 1);
    assert_eq!(module.kernels[0].cluster, [2]);
}

#[test]
fn attention_causal_overlapped() {
    let (plan, module) = lower("attention", &text("mappings/attention.mapping"));
    // [B, H, R, M, N, E, F]: tails in m, n, e and f; rows without keys (M > N); one block, none to skip.
    for ranks in [[1, 1, 2, 200, 300, 72, 80], [1, 1, 1, 300, 130, 128, 128], [2, 1, 1, 40, 40, 64, 16]] {
        agrees(&plan, &module, &ranks, 1);
    }
}

#[test]
fn attention_full_overlapped() {
    let (plan, module) = lower("attention_full", &text("mappings/attention_full.mapping"));
    for ranks in [[1, 1, 2, 136, 360, 128, 128], [1, 1, 1, 8, 176, 128, 128], [1, 2, 1, 64, 528, 128, 64]] {
        agrees(&plan, &module, &ranks, 1);
    }
}

#[test]
fn lstm_resident() {
    let (plan, module) = lower("lstm_gates", &text("mappings/lstm.mapping"));
    // [T, B, H, D]: batch and width with tails, a single step, no step.
    for ranks in [[5, 20, 2, 96], [1, 3, 1, 128], [0, 2, 1, 64]] {
        agrees(&plan, &module, &ranks, 1);
    }
    // Blocks of 8 rows; states that fill half an instruction, spread over all warps.
    let (plan, module) = lower("lstm_gates", &text("mappings/lstm_64.mapping"));
    agrees(&plan, &module, &[4, 11, 2, 56], 1);
    let (plan, module) = lower("lstm_gates", &text("mappings/lstm_32.mapping"));
    for ranks in [[4, 11, 2, 32], [3, 8, 1, 24]] {
        agrees(&plan, &module, &ranks, 1);
    }
}

/// Every planted fault is caught, except those that change nothing that can be observed:
/// - a `bar_sync unit_..` orders the threads of one unit, which the evaluator runs as one;
/// - without a `commit` two groups become one, so that waits only get longer;
/// - waiting for, or giving back, the next stage of a ring is sound as long as all of a barrier's uses move together;
/// - what is given back after a stream's last trips is never filled again, and waited for by tasks of a cluster alone.
fn all_caught(plan: &str, mapping: &str, ranks: &[u64], sound: &[&str]) {
    let (plan, module) = lower(plan, &text(&format!("mappings/{mapping}.mapping")));
    let (n, missed) = survivors(&plan, &module, &[ranks]);
    assert!(n > 30);
    assert_eq!(missed, sound);
}

#[test]
fn planted_faults_in_gemm_are_caught() {
    let sound = [
        "WrongStage producer.4.0: wait a_b_empty(stage3_k_producer) phase 1 - parity3_k_producer",
        "Missing consumer.9: bar_sync unit_consumer(unit)",
    ];
    all_caught("gemm", "gemm", &[256, 256, 320], &sound);
}

#[test]
fn planted_faults_in_attention_are_caught() {
    let sound = [
        "WrongStage producer.7.0: wait k_empty(stage2_n_producer) phase 1 - parity2_n_producer",
        "WrongStage producer.7.4: wait v_empty(stage2_n_producer) phase 1 - parity2_n_producer",
        "WrongStage consumer.10.3.24: arrive k_empty(stage2_n_consumer)",
        "Missing consumer.10.20: arrive v_empty(stage2_n_consumer)",
        "WrongStage consumer.10.20: arrive v_empty(stage2_n_consumer)",
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
            let plan = plan("attention");
            let mapping = einfall_ir::mapping::parse::parse(&mapping).unwrap();
            let refused = gpu::lower(&plan, &mapping).expect_err(what);
            assert!(refused[0].message.contains("w and o@2 use tile w out of order"), "{refused:?}");
            continue;
        }
        let (plan, module) = lower("attention", &mapping);
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
        // 65,536 registers in the multiprocessor, of which 384 threads start with 168 each.
        ("gemm", "gemm", "regs 40", "regs 48", "registers of the task: 65536 of at most 64512"),
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
            "gemm",
            "gemm",
            "axis n block 256",
            "axis n block 256 launches",
            "has steps to launch but is not a stream axis",
        ),
        (
            "gemm",
            "gemm",
            "axis k block 64",
            "axis k block 64 launches",
            "launches steps of 64 coordinates; a step is one",
        ),
        ("gemm", "gemm", "tile c in registers", "tile c in packed", "spaces: tile c is in packed on a GPU"),
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
        let plan = device::plan(plan);
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
        let (_, module) = lower(plan, &text(&format!("mappings/{mapping}.mapping")));
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

/// What ptxas 13.0 asks for (C7602): an accumulator, an operand in registers where there is one, and 26 more.
#[test]
fn instructions_need_registers_at_launch() {
    let of = |plan: &str, mapping: &str| {
        let (_, module) = lower(plan, &text(&format!("mappings/{mapping}.mapping")));
        resources::instruction_registers(&module.kernels[0])
    };
    // 64×256 floats over 128 threads; 64×128 with an operand of 64×16.
    assert_eq!((of("gemm", "gemm"), of("attention", "attention")), (128 + 26, 64 + 4 + 26));
    let synchronous = lowered(&formed("matmul"), &text("mappings/matmul_128x128_a100.mapping"));
    assert_eq!(resources::instruction_registers(&synchronous.kernels[0]), 0);
}

/// A library cascade through formation and a mapping, under every schedule.
fn library(cascade: &str, mapping: &str, sizes: &[&[u64]]) -> Module {
    let plan = formed(cascade);
    let module = lowered(&plan, &text(&format!("mappings/{mapping}.mapping")));
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
        let module = lowered(plan, &mapping);
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
    let causal = formed("attention");
    let (scores, weights, reductions, _) = count(&causal);
    // One loop has the first trip and the masked blocks.
    assert_eq!((scores, weights, reductions), (1, 0, 0));
    // Keys beyond the last pass this filter, or are not proved not to.
    let source = einfall_kernels::source("attention").unwrap();
    for filter in ["n <= m + 9", "n <= 2 * m"] {
        let plan = formed_text(&source.replace("n <= m + (N - M)", filter), &[]);
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
    let plan = formed("attention");
    let module = lowered(&plan, &text("mappings/attention_128_causal.mapping"));
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

/// Products of cooperative matrices: tails of every dimension, operands along either dimension, a ring loaded ahead. What is
/// missing or at a wrong stage is found.
#[test]
fn products_of_cooperative_matrices() {
    for (a, b, transposed) in [("M, K] ", "K, N]", false), ("K, M]", "N, K]", true)] {
        let (at_a, at_b) = if transposed { ("k,m", "n,k") } else { ("m,k", "k,n") };
        let text = format!(
            "cascade mm[M, N, K](A: f16[{a}, B: f16[{b}) -> (Y: f32[M, N]) {{ Y[m,n] = sum(k) A[{at_a}] * B[{at_b}] }}"
        );
        let plan = device::formed_text(&text, &[]);
        for (stages, columns, units) in [(1, 1, 2), (2, 1, 2), (1, 2, 4)] {
            let mapping = format!(
                "mapping mm on webgpu-nvidia {{ kernel mm_0 {{
                     axis m block 64 units 2
                     axis n block 32 units {columns}
                     axis k block 32
                     role main: {units} warp
                     tile A in shared stages {stages} by cp_async
                     tile B in shared stages {stages} by cp_async
                     op A slot 0
                     op B slot 0
                     op Y@1 atom coop.m16n16k16.f16 skew {} slot 1 }} }}",
                stages - 1
            );
            let module = lowered(&plan, &mapping);
            for (m, n, k) in [(65, 40, 81), (16, 16, 16), (1, 1, 1)] {
                agrees(&plan, &module, &[m, n, k], 1);
            }
            if !transposed {
                let (n, missed) = survivors(&plan, &module, &[&[65, 40, 81]]);
                assert!(n > 4, "{n} faults");
                // A copy whose group nobody closes is in the next one, which is awaited with it.
                assert!(missed.len() < 3 && missed.iter().all(|m| m.ends_with("commit cp_async")), "{missed:?}");
            }
        }
    }
}

/// What is reduced or stored along one of two axes that units cut together is refused, as are parts that no role has.
#[test]
fn units_that_cut_two_axes_have_a_part_of_each() {
    let refused = |text: &str, mapping: &str| {
        let mapping = einfall_ir::mapping::parse::parse(mapping).expect("a mapping");
        let refused = gpu::lower(&device::formed_text(text, &[]), &mapping).expect_err("two axes");
        refused[0].message.clone()
    };
    let sums = "cascade s[M, N](x: f32[M, N]) -> (R: f32[M]) { R[m] = sum(n) x[m,n] }";
    let cut = "mapping s on webgpu-nvidia { kernel s_0 {
        axis m block 32 units 2
        axis n block 32 units 2
        role main: 4 warp } }";
    assert!(refused(sums, cut).contains("is not cut over units along two axes"), "{}", refused(sums, cut));
    let product =
        "cascade mm[M, N, K](A: f16[M, K], B: f16[K, N]) -> (Y: f32[M, N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }";
    let cut = "mapping mm on webgpu-nvidia { kernel mm_0 {
        axis m block 32 units 2
        axis n block 64 units 4
        axis k block 16
        role main: 4 warp
        tile A in shared by cp_async
        tile B in shared by cp_async
        op Y@1 atom coop.m16n16k16.f16 } }";
    assert!(refused(product, cut).contains("cut over as many as a role has"), "{}", refused(product, cut));
}

/// An adapter that has no such matrices, or whose front end knows none, is named.
#[test]
fn matrices_that_nobody_reports_are_refused() {
    use einfall_codegen::backend::wgsl::{Target, print};
    use einfall_ir::target::DataSheet;
    let text = "cascade mm[M, N, K](A: f16[M, K], B: f16[K, N]) -> (Y: f32[M, N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }";
    let plan = device::formed_text(text, &[]);
    let mapping = "mapping mm on webgpu-nvidia { kernel mm_0 {
         axis m block 16
         axis n block 16
         axis k block 16
         tile A in shared by cp_async
         tile B in shared by cp_async
         role main: 1 warp
         op Y@1 atom coop.m16n16k16.f16 } }";
    let module = lowered(&plan, mapping);
    let nvidia = Target::of(&DataSheet::named("webgpu-nvidia").expect("a sheet")).expect("an adapter");
    assert!(print(&plan, &module, &nvidia).is_ok());
    let other = Target::of(&DataSheet::named("webgpu-amd").expect("a sheet")).expect("an adapter");
    for target in [nvidia.clone().tint(), nvidia.without_subgroups(), other, Target::generic()] {
        let error = print(&plan, &module, &target).expect_err("no matrices");
        assert!(error.what.contains("cooperative matrices of 16×16×16 from f16 into f32"), "{error}");
        assert!(error.help.contains("fma"));
    }
    // Blocks that are no whole matrices.
    let odd = mapping.replace("axis n block 16", "axis n block 24");
    let odd = einfall_ir::mapping::parse::parse(&odd).expect("a mapping");
    let refused = gpu::lower(&plan, &odd).expect_err("24 columns");
    assert!(refused[0].message.contains("n of Y@1 is 24 per unit, the atom takes 16"), "{}", refused[0].message);
}
