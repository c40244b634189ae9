//! The path for compute capability 8.0: the same passes with mma.sync, ldmatrix and cp.async. Reference mappings are
//! evaluated without races under every adversarial schedule, with every fault planted in them caught, and run as PTX.

mod device;
mod machine;

use device::{agrees, all_caught, formed, lowered, mapping_text};
use einfall_codegen::backend::ptx::{Target, print};
use einfall_ir::array::Array;
use einfall_ir::artifact::Artifact;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::Module;
use einfall_ir::tile;
use machine::launch::execute;

/// The library's matmul by a mapping.
fn matmul(mapping: &str) -> (tile::Plan, Module) {
    let plan = formed("matmul");
    let module = lowered(&plan, mapping);
    (plan, module)
}

#[test]
fn matmul_in_four_warps() {
    let (plan, module) = matmul(&mapping_text("matmul_128x128_a100"));
    for ranks in [[140, 136, 200], [128, 128, 32], [8, 264, 72], [130, 8, 0], [64, 64, 96]] {
        agrees(&plan, &module, &ranks, 1);
    }
}

/// What is left is sound: without a commit two groups become one, so that waits only get longer; threads write and read
/// shared memory by the same layout, whichever it is.
#[test]
fn planted_faults_in_rings_without_barriers_are_caught() {
    let (plan, module) = matmul(&mapping_text("matmul_128x128_a100"));
    all_caught(
        &plan,
        &module,
        &[&[132, 128, 288], &[132, 128, 64]],
        &[
            "Missing main.5.2: commit cp_async",
            "Missing main.5.281.1: commit cp_async",
            "WrongSwizzle A_s",
            "WrongSwizzle B_s",
        ],
    );
}

/// The library's attention by a mapping.
fn attention(cascade: &str, mapping: &str) -> (tile::Plan, Module) {
    let plan = formed(cascade);
    let module = lowered(&plan, &mapping_text(mapping));
    (plan, module)
}

#[test]
fn attention_in_eight_warps() {
    for d in [64, 128] {
        let (plan, module) = attention("attention", &format!("attention_{d}_causal_a100"));
        for [m, n] in [[200, 300], [150, 70], [128, 64]] {
            let ranks = extents(&plan, &[("B", 1), ("G", 1), ("R", 2), ("M", m), ("N", n), ("E", d), ("F", d - 8)]);
            agrees(&plan, &module, &ranks, 1);
        }
    }
}

#[test]
fn full_attention_in_eight_warps() {
    for d in [64, 128] {
        let (plan, module) = attention("attention_full", &format!("attention_{d}_full_a100"));
        for [m, n] in [[200, 300], [130, 64], [8, 0]] {
            let ranks = extents(&plan, &[("B", 1), ("H", 2), ("M", m), ("N", n), ("E", d), ("F", d - 8)]);
            agrees(&plan, &module, &ranks, 1);
        }
    }
}

/// The state goes round through shared memory, from every warp to every warp; by mma.sync, R resident in registers.
#[test]
fn lstm_in_four_warps() {
    let plan = device::plan("lstm_gates");
    let module = lowered(&plan, &mapping_text("lstm_64_a100"));
    let artifact = printed(&plan, &module);
    for ranks in [[4, 11, 2, 56], [3, 8, 1, 64], [1, 1, 1, 24]] {
        agrees(&plan, &module, &ranks, 1);
        // H is rounded to bf16 at every step, which the next multiplies on.
        runs(&plan, &artifact, &ranks, 4.0);
    }
}

/// Extents in the order of a plan's ranks.
fn extents(plan: &tile::Plan, given: &[(&str, u64)]) -> Vec<u64> {
    let of = |name: &str| given.iter().find(|g| g.0 == name).unwrap_or_else(|| panic!("no extent of {name}")).1;
    plan.ranks.iter().map(|(_, r)| of(&r.name)).collect()
}

/// The PTX of a module for compute capability 8.0.
fn printed(plan: &tile::Plan, module: &Module) -> Artifact {
    print(plan, module, &Target::sm_80()).unwrap_or_else(|e| panic!("{e}"))
}

/// Runs the printed kernels and compares with the plan in float64, to `roundings` of the stored type relative to the
/// largest output.
fn runs(plan: &tile::Plan, artifact: &Artifact, ranks: &[u64], roundings: f64) {
    let inputs: Vec<Array> = device::inputs(plan, ranks);
    let inputs: Vec<Array> = inputs
        .into_iter()
        .map(|a| match roundings == 0.0 {
            true => Array { data: a.data.iter().map(|x| (x * 2.0).round()).collect(), ..a },
            false => a,
        })
        .collect();
    let got = execute(artifact, ranks, &inputs);
    let want = tile::eval::run(plan, ranks, &inputs, &tile::eval::Options::default()).unwrap();
    for (got, want) in got.iter().zip(&want) {
        let most = want.data.iter().fold(0f64, |m, x| m.max(x.abs()));
        let allowed = roundings * DType::BF16.unit_roundoff() * most;
        let wrong = got.iter().zip(&want.data).enumerate().find(|(_, (x, y))| x.is_nan() || (*x - *y).abs() > allowed);
        assert!(wrong.is_none(), "{} at {ranks:?}: {wrong:?}", plan.name);
    }
}

#[test]
fn printed_matmul_is_exact_on_integers() {
    let (plan, module) = matmul(&mapping_text("matmul_128x128_a100"));
    let artifact = printed(&plan, &module);
    for ranks in [[200, 136, 200], [128, 128, 32], [8, 264, 72], [130, 8, 0], [130, 131, 37]] {
        runs(&plan, &artifact, &ranks, 0.0);
    }
}

#[test]
fn printed_attention_agrees() {
    for d in [64, 128] {
        let (plan, module) = attention("attention", &format!("attention_{d}_causal_a100"));
        let artifact = printed(&plan, &module);
        let ranks = extents(&plan, &[("B", 1), ("G", 1), ("R", 2), ("M", 200), ("N", 300), ("E", d), ("F", d - 3)]);
        // P and O are rounded to bf16, and P's row sum is not.
        runs(&plan, &artifact, &ranks, 4.0);
    }
}

/// What cannot be done is refused by the constraint's name.
#[test]
fn rings_that_threads_fill_have_limits() {
    let base = mapping_text("matmul_128x128_a100");
    let wgmma = mapping_text("matmul_128x128").replace("by tma", "by cp_async").replace("op A role producer", "");
    for (mapping, says) in [
        (base.replace("stages 4", "stages 3"), "stages: r0@1 runs 3 iterations behind"),
        (base.replace("skew 3", "skew 0").replace("op A slot 0", "op A skew 1 slot 0"), "stages: "),
        (base.replace("by cp_async", ""), "copy engine: A is loaded without an engine"),
        (wgmma.replace("on h100", "on a100"), "copy engine: "),
    ] {
        let mapping = einfall_ir::mapping::parse::parse(&mapping).unwrap_or_else(|e| panic!("{e}\n{mapping}"));
        let e = einfall_codegen::lower::gpu::lower(&formed("matmul"), &mapping).unwrap_err();
        assert!(e[0].message.contains(says), "{e:?}");
    }
}

/// What an A100 runs, a card with less shared memory and fewer threads runs too.
#[test]
fn reference_mappings_fit_smaller_cards() {
    for (plan, mapping, ranks) in
        [("matmul", "matmul_128x128_a100", vec![130, 136, 72]), ("attention_full", "attention_128_full_a100", vec![])]
    {
        let plan = formed(plan);
        let module = lowered(&plan, &mapping_text(mapping).replace("on a100", "on rtx4090"));
        if !ranks.is_empty() {
            agrees(&plan, &module, &ranks, 1);
        }
    }
}

/// Kernels without contractions by the rule for an A100: evaluated, and run as PTX.
#[test]
fn rows_agree() {
    let sheet = einfall_ir::target::DataSheet::a100();
    for name in ["layernorm", "rmsnorm", "softmax", "mean_variance"] {
        let plan = formed(name);
        let mapping = einfall_autotune::model_gpu::choose(&plan, &sheet, None);
        let module = lowered(&plan, &mapping.to_string());
        let artifact = printed(&plan, &module);
        for ranks in [[3, 512], [2, 129], [1, 1]] {
            agrees(&plan, &module, &ranks, 1);
            runs(&plan, &artifact, &ranks, 1.5);
        }
    }
}

/// In a work loop rings go on from block to block, and what is filled once per block is filled again.
#[test]
fn persistent_kernels_fill_their_rings_again() {
    let few = |text: &str| {
        let mapping = einfall_ir::mapping::parse::parse(text).unwrap_or_else(|e| panic!("{e}"));
        let gpu = einfall_ir::target::DataSheet::a100().gpu.unwrap();
        let limits = einfall_ir::analysis::resources::Limits::of(&gpu);
        (mapping, einfall_ir::analysis::resources::Limits { multiprocessors: 2, ..limits })
    };
    let plan = formed("matmul");
    let text =
        mapping_text("matmul_128x128_a100").replace("role main", "work order m, n persistent\n        role main");
    let (mapping, limits) = few(&text);
    let module = einfall_codegen::lower::gpu::lower_for(&plan, &mapping, &limits).unwrap_or_else(|e| panic!("{e:?}"));
    for ranks in [[300, 264, 136], [260, 136, 32], [130, 260, 0]] {
        agrees(&plan, &module, &ranks, 1);
    }
    let plan = formed("attention");
    let text = mapping_text("attention_64_causal_a100").replace("longest_first", "persistent longest_first");
    let (mapping, limits) = few(&text);
    let module = einfall_codegen::lower::gpu::lower_for(&plan, &mapping, &limits).unwrap_or_else(|e| panic!("{e:?}"));
    let ranks = extents(&plan, &[("B", 1), ("G", 1), ("R", 3), ("M", 200), ("N", 150), ("E", 64), ("F", 64)]);
    agrees(&plan, &module, &ranks, 1);
    runs(&plan, &printed(&plan, &module), &ranks, 4.0);
}

/// As there; and what is committed and awaited at the end is what a stream without trips leaves, which nobody reads.
#[test]
fn planted_faults_in_attention_are_caught() {
    let (plan, module) = attention("attention", "attention_64_causal_a100");
    let at = |m, n| extents(&plan, &[("B", 1), ("G", 1), ("R", 1), ("M", m), ("N", n), ("E", 16), ("F", 16)]);
    all_caught(
        &plan,
        &module,
        &[&at(130, 200), &at(20, 40)],
        &[
            "Missing main.10.2: commit cp_async",
            "Missing main.10.7.3: commit cp_async",
            "Missing main.10.8.3: commit cp_async",
            "Missing main.11: commit cp_async",
            "Missing main.14: wait_group cp_async 0",
            "LaterGroup main.14: wait_group cp_async 0",
            "WrongSwizzle Q_s",
            "WrongSwizzle K_s",
            "WrongSwizzle V_s",
        ],
    );
}
