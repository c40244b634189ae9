//! Printed PTX, run: what the reference kernels compute is what their tile plans mean.

mod device;
mod machine;

use device::{formed, formed_alone, text};
use einfall_codegen::backend::ptx::{Target, print};
use einfall_codegen::lower::gpu;
use einfall_ir::array::Array;
use einfall_ir::artifact::{Artifact, Code};
use einfall_ir::cascade::bind::{Given, bind, check_facts};
use einfall_ir::dtype::DType;
use einfall_ir::kernel::Module;
use einfall_ir::kernel::eval::Schedule;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{self, BufferKind, Plan};
use einfall_ir::tolerance::expect;
use einfall_ir::tolerance::inputs::{Variant, random};
use machine::launch::{execute, launched, written};

fn mapped(plan: &Plan, mapping: &str) -> Module {
    let mapping = einfall_ir::mapping::parse::parse(mapping).unwrap_or_else(|e| panic!("{e}"));
    gpu::lower(plan, &mapping).unwrap_or_else(|e| panic!("{e:?}"))
}

/// Inputs of a plan: small integers, or floats of their types in [-1, 1]; scalars 0.125.
fn inputs(plan: &Plan, ranks: &[u64], integers: bool) -> Vec<Array> {
    let mut s = 7u64;
    let mut next = move || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        s >> 33
    };
    let taken = plan.buffers.iter().filter(|(_, b)| matches!(b.kind, BufferKind::Input | BufferKind::InOut));
    taken
        .map(|(_, b)| {
            let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
            Array::from_fn(b.dtype, &dims, |_| match dims.is_empty() {
                true => 0.125,
                false if integers => (next() % 3) as f64 - 1.0,
                false => DType::BF16.round(next() as f64 / f64::from(1u32 << 30) - 1.0),
            })
        })
        .collect()
}

fn printed(plan: &Plan, module: &Module) -> Artifact {
    print(plan, module, &Target::sm_90a()).unwrap_or_else(|e| panic!("{e}"))
}

/// Runs the printed kernels and compares with the plan in float64: exactly for sums of small integers, otherwise to
/// `roundings` of the stored type (or of bf16 operands) relative to the largest output.
fn agrees(plan: &Plan, module: &Module, ranks: &[u64], roundings: f64) {
    compare(plan, &printed(plan, module), ranks, roundings, false);
}

fn compare(plan: &Plan, artifact: &Artifact, ranks: &[u64], roundings: f64, backwards: bool) {
    let inputs = inputs(plan, ranks, roundings == 0.0);
    let got = launched(artifact, ranks, &inputs, 1, backwards);
    let want = tile::eval::run(plan, ranks, &inputs, &tile::eval::Options::default()).unwrap();
    for (got, want) in got.iter().zip(&want) {
        let most = want.data.iter().fold(0f64, |m, x| m.max(x.abs()));
        let allowed = roundings * DType::BF16.unit_roundoff() * most;
        let wrong: Vec<(usize, f64, f64)> = got
            .iter()
            .zip(&want.data)
            .enumerate()
            .filter(|(_, (x, y))| !(*x == *y || (x.is_nan() && y.is_nan()) || (*x - *y).abs() <= allowed))
            .map(|(i, (x, y))| (i, *x, *y))
            .collect();
        let some = &wrong[..wrong.len().min(8)];
        assert!(wrong.is_empty(), "{} at {ranks:?}: {} of {} differ: {some:?}", plan.name, wrong.len(), got.len());
    }
}

fn reference(plan: &str, mapping: &str) -> (Plan, Module) {
    let plan = device::plan(plan);
    let module = mapped(&plan, &text(&format!("mappings/{mapping}.mapping")));
    (plan, module)
}

#[test]
fn gemm_with_multicast_is_exact_on_integers() {
    let (plan, module) = reference("gemm", "gemm");
    agrees(&plan, &module, &[300, 264, 200], 0.0);
    agrees(&plan, &module, &[64, 256, 64], 0.0);
}

/// What goes wrong on a device without a word is seen here: each fault makes a wrong result or stops the machine.
#[test]
fn planted_faults_are_caught() {
    let (plan, module) = reference("gemm", "gemm");
    let good = printed(&plan, &module);
    let Code::Ptx { text, arch } = &good.code else { panic!("no PTX") };
    for (from, to) in [
        // The swizzle of the epilogue's stores; the stride of a descriptor; its transpose.
        ("xor.b32", "or.b32"),
        ("1073741888}", "1073741889}"),
        (", 1, 1, 0, 1", ", 1, 1, 0, 0"),
        // A barrier that counts warps that never come; bytes that are not waited for; a task's row.
        ("213016], 16", "213016], 20"),
        ("], 49152", "], 49136"),
        // The rank in a descriptor's address.
        ("and.b32 %smem_window, %smem, 0x3FFFF", "mov.b32 %smem_window, %smem"),
        ("mov.u32 %cluster_rank, %cluster_ctarank", "mov.u32 %cluster_rank, 0"),
    ] {
        assert!(text.contains(from), "{from}");
        let mut bad = good.clone();
        bad.code = Code::Ptx { text: text.replace(from, to), arch: arch.clone() };
        let caught = std::panic::catch_unwind(|| compare(&plan, &bad, &[256, 256, 320], 0.0, false));
        assert!(caught.is_err(), "`{from}` → `{to}` is not noticed");
    }
}

#[test]
fn persistent_gemm_is_exact_on_integers() {
    let (plan, module) = reference("gemm", "gemm_persistent");
    agrees(&plan, &module, &[520, 520, 136], 0.0);
}

#[test]
fn attention_agrees() {
    let (plan, module) = reference("attention", "attention");
    // P and O are rounded to bf16, and P's row sum is not.
    agrees(&plan, &module, &[1, 1, 2, 200, 328, 128, 128], 4.0);
    let (plan, module) = reference("attention_full", "attention_full");
    agrees(&plan, &module, &[1, 1, 1, 136, 392, 72, 80], 4.0);
}

#[test]
fn persistent_attention_agrees() {
    let (plan, module) = reference("attention", "attention_persistent");
    agrees(&plan, &module, &[1, 1, 2, 264, 264, 128, 128], 4.0);
    // A device of one or two multiprocessors: tasks take several blocks, in folded pairs where their number is even.
    let mapping = text("mappings/attention_persistent.mapping");
    let mapping = einfall_ir::mapping::parse::parse(&mapping).unwrap();
    for slots in [1, 2] {
        let limits = einfall_ir::analysis::resources::Limits {
            multiprocessors: slots,
            ..einfall_ir::analysis::resources::Limits::h100()
        };
        let module = gpu::lower_for(&plan, &mapping, &limits).unwrap();
        for (m, n) in [(200, 200), (129, 300), (300, 129), (264, 0), (520, 264)] {
            agrees(&plan, &module, &[1, 1, 3, m, n, 64, 64], 4.0);
        }
    }
}

#[test]
fn an_lstm_agrees() {
    let (plan, module) = reference("lstm_gates", "lstm");
    // Four steps, each rounding the state to bf16.
    agrees(&plan, &module, &[4, 18, 1, 128], 8.0);
    agrees(&plan, &module, &[3, 5, 2, 104], 8.0);
    let (plan, module) = reference("lstm_gates", "lstm_32");
    agrees(&plan, &module, &[4, 11, 2, 32], 8.0);
    agrees(&plan, &module, &[3, 8, 1, 24], 8.0);
}

#[test]
fn a_fused_linear_layer_agrees() {
    let plan = formed_alone("linear_gelu");
    let module = mapped(&plan, &text("mappings/linear_gelu.mapping"));
    agrees(&plan, &module, &[200, 136, 264], 1.5);
}

#[test]
fn kernels_without_contractions_agree() {
    let rows = |kernel: &str, grid: &str, row: &str, units: u64| {
        format!(
            "kernel {kernel} {{\n{grid}axis {row} block 256 units {units} whole\n}}\n\
             kernel {kernel} {{\n{grid}axis {row} block 64 units {units}\n}}\n"
        )
    };
    for (name, kernel, row) in [
        ("layernorm", "layernorm_0", "k"),
        ("rmsnorm", "rmsnorm_0", "k"),
        ("softmax", "softmax_0", "n"),
        ("argmax", "argmax_rows_0", "n"),
        ("logsumexp", "logsumexp_rows_0", "n"),
        ("third_moment", "third_moment_0", "k"),
        ("entropy", "entropy_0", "n"),
    ] {
        for units in [1, 4] {
            let plan = formed_alone(name);
            let entries = rows(kernel, "axis m block 1\n", row, units);
            let module = mapped(&plan, &format!("mapping {} on h100 {{\n{entries}}}\n", plan.name));
            for ranks in [[5, 256], [3, 200], [2, 129], [3, 640], [1, 1]] {
                agrees(&plan, &module, &ranks, 1.5);
            }
        }
    }
}

/// Every function of one argument, within its ulps of f32 where the instructions it is made of are exact.
#[test]
fn scalar_functions_keep_their_ulps() {
    use einfall_ir::ops::UnaryOp;
    for op in UnaryOp::ALL {
        let from = match op {
            UnaryOp::Not => continue,
            UnaryOp::Log | UnaryOp::Log2 | UnaryOp::Sqrt | UnaryOp::Rsqrt => 1e-6,
            UnaryOp::Log1p => -0.99,
            _ => -9.0,
        };
        let f = op.name();
        let source = format!("cascade f[N](x: f32[N]) -> (y: f32[N]) {{\n    y[n] = {f}(x[n])\n}}\n");
        let cascade = einfall_ir::cascade::parse(&source).unwrap().cascades.remove(0);
        let plan = einfall_codegen::tables::formed(cascade).unwrap();
        let name = &plan.kernels[0].name;
        let module =
            mapped(&plan, &format!("mapping f on h100 {{\nkernel {name} {{\naxis n block 256 units 4\n}}\n}}\n"));
        let n = 1000usize;
        let x =
            Array::from_fn(DType::F32, &[n as u64], |i| DType::F32.round(from + (9.0 - from) * i as f64 / n as f64));
        let got = execute(&printed(&plan, &module), &[n as u64], std::slice::from_ref(&x));
        // Fast forms of sigmoid err by the rounding of x·log₂e as well.
        let allowed = op.ulps().max(0.5) + if op == UnaryOp::Sigmoid { 9.0 } else { 0.0 };
        for (x, y) in x.data.iter().zip(&got[0]) {
            let want = op.eval(*x);
            let ulps = (y - want).abs() / DType::F32.ulp(want);
            assert!(*y == want || ulps <= allowed, "{f}({x}) is {y}, not {want}: {ulps} ulps");
        }
    }
}

/// The library's grouped-query attention, its keys cut over tasks of which the last merges: it agrees, its counters
/// serve the next launch, and the result is the same bit by bit whichever task is the last.
#[test]
fn parts_merge_where_the_last_arrives() {
    merges_in_place("attention_decode");
    merges_in_place("attention_decode_ahead");
}

/// Heads as columns: maxima and sums over keys meet across the warps of a warpgroup, in every step of the stream.
#[test]
fn reductions_across_warps_agree() {
    merges_in_place("attention_decode_columns");
}

/// Warps that do not meet between writing and reading what they exchange: seen at every place of either variant of the
/// kernel, where the first warps run ahead or the last ones.
#[test]
fn planted_faults_across_warps_are_caught() {
    // Two parts: each task streams several blocks, and parts meet.
    let mapping = text("mappings/attention_decode_columns.mapping").replace("parts 64", "parts 2");
    let plan = formed("attention_gqa");
    let split = gpu::split_streams::run(&plan, &einfall_ir::mapping::parse::parse(&mapping).unwrap(), 132).unwrap();
    let good = printed(&split, &mapped(&split, &mapping));
    let Code::Ptx { text, arch } = &good.code else { panic!("no PTX") };
    let lines: Vec<&str> = text.lines().collect();
    // The copies change after every exchange: the sum of both places less the one in use.
    let turn = |l: &&str| {
        l.trim().strip_prefix("sub.s32 ").is_some_and(|l| {
            l.split(", ").count() == 3 && {
                let args: Vec<&str> = l.trim_end_matches(';').split(", ").collect();
                args[0] == args[2] && text.contains(&format!("shl.b32 {}, {}, 1;", args[1], args[0]))
            }
        })
    };
    let ranks = [1, 1, 9, 2, 200, 64, 72];
    let variants: Vec<&String> =
        good.launches.iter().filter(|l| l.gpu.as_ref().unwrap().variant_of.is_some()).map(|l| &l.symbol).collect();
    assert!(variants.len() >= 2, "{variants:?}");
    for variant in variants {
        let mut alone = good.clone();
        alone.launches.retain(|l| l.gpu.as_ref().unwrap().variant_of.is_none() || l.symbol == *variant);
        let first = lines.iter().position(|l| l.contains(&format!(".entry {variant}("))).unwrap();
        let last = first + lines[first..].iter().position(|l| *l == "}").unwrap();
        let turns: Vec<usize> = (first..last).filter(|i| turn(&lines[*i])).collect();
        assert!(turns.len() >= 3, "{variant}: {turns:?}");
        compare(&split, &alone, &ranks, 4.0, false);
        compare(&split, &alone, &ranks, 4.0, true);
        for turn in turns {
            // The meeting before it: the last one above.
            let fault = (first..turn).rev().find(|i| lines[*i].contains("bar.sync")).unwrap();
            let kept = lines.iter().enumerate().filter(|(i, _)| *i != fault).map(|(_, l)| format!("{l}\n"));
            let mut bad = alone.clone();
            bad.code = Code::Ptx { text: kept.collect(), arch: arch.clone() };
            let wrong = |back: bool| std::panic::catch_unwind(|| compare(&split, &bad, &ranks, 4.0, back)).is_err();
            assert!(wrong(false) || wrong(true), "{variant}: line {fault} without its meeting is not noticed");
        }
    }
}

fn merges_in_place(mapping: &str) {
    let mapping = text(&format!("mappings/{mapping}.mapping"));
    let plan = formed("attention_gqa");
    let split = gpu::split_streams::run(&plan, &einfall_ir::mapping::parse::parse(&mapping).unwrap(), 132).unwrap();
    let module = mapped(&split, &mapping);
    // [B, G, R, M, N, E, F]: uneven parts and a tail; rows of several blocks of the merge; one part.
    for ranks in [[1, 2, 4, 1, 700, 128, 128], [1, 1, 9, 2, 200, 64, 72], [1, 1, 2, 1, 40, 64, 64]] {
        agrees(&split, &module, &ranks, 4.0);
        let (artifact, given) = (printed(&split, &module), inputs(&split, &ranks, false));
        let once = execute(&artifact, &ranks, &given);
        assert_eq!(launched(&artifact, &ranks, &given, 2, false), once, "the second launch at {ranks:?}");
        assert_eq!(launched(&artifact, &ranks, &given, 1, true), once, "from the last task at {ranks:?}");
    }
}

#[test]
fn decode_in_parts_agrees() {
    let mapping = text("mappings/decode.mapping");
    let plan = device::plan("decode");
    let split = gpu::split_streams::run(&plan, &einfall_ir::mapping::parse::parse(&mapping).unwrap(), 132).unwrap();
    let module = mapped(&split, &mapping);
    // [B, H, R, N, E, F]: a tail and a part without keys; no keys.
    agrees(&split, &module, &[1, 2, 4, 700, 128, 128], 4.0);
    agrees(&split, &module, &[1, 1, 3, 0, 64, 64], 4.0);
}

/// A library cascade by the model's mapping, at these extents of its ranks: integers exactly, floats to their roundings.
fn library_agrees(name: &str, sizes: &[&[u64]], variants: &[Variant]) {
    let source = einfall_kernels::source(name).unwrap_or_else(|| panic!("no cascade {name}"));
    let c = einfall_ir::cascade::parse(source).unwrap().cascades.remove(0);
    let plan = device::formed_cascade(c.clone());
    let mapping = einfall_autotune::model_gpu::choose(&plan, &DataSheet::h100(), None);
    let split = gpu::split_streams::run(&plan, &mapping, 132).unwrap();
    let module = gpu::lower(&split, &mapping).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let artifact = printed(&split, &module);
    for (seed, sizes) in sizes.iter().enumerate() {
        let free = c.ranks.iter().filter(|(_, r)| r.fixed.is_none()).map(|(_, r)| r.name.clone());
        let b = bind(&c, &Given { sizes: free.zip(sizes.iter().copied()).collect(), ..Given::default() }).unwrap();
        check_facts(&c, &b, &[]).unwrap();
        for &variant in variants {
            let given = random(&c, &b, seed as u64, variant).unwrap();
            let want = tile::eval::run(&plan, &b.extents, &given, &tile::eval::Options::default()).unwrap();
            let outputs = |(_, x): &(_, &tile::Buffer)| written(x.kind);
            let compare = |how: &str, got: Vec<Vec<f64>>, roundings: f64| {
                for (((_, x), got), want) in plan.buffers.iter().filter(outputs).zip(&got).zip(&want) {
                    let roundings = if x.dtype.is_float() { roundings } else { 0.0 };
                    let right = |(g, w): (&f64, &f64)| g == w || (g - w).abs() <= roundings * (1.0 + w.abs());
                    if let Some(i) = got.iter().zip(&want.data).position(|x| !right(x)) {
                        let (at, g, w) = (want.coordinates(i), got[i], want.data[i]);
                        panic!("{name} at {sizes:?}, {variant:?}, {how}: {}{at:?} is {g}, not {w}\n{split}", x.name);
                    }
                }
            };
            let roundings = 4.0 * DType::BF16.unit_roundoff();
            compare("PTX", execute(&artifact, &b.extents, &given), roundings);
            if seed >= 2 {
                continue;
            }
            compare("PTX backwards", launched(&artifact, &b.extents, &given, 1, true), roundings);
            for schedule in Schedule::ALL {
                let all = device::evaluated(&split, &module, &b.extents, &given, schedule)
                    .unwrap_or_else(|e| panic!("{name} at {sizes:?}, {schedule:?}: {e}"));
                let written = split.buffers.iter().zip(all).filter(|(x, _)| outputs(x)).map(|(_, g)| g);
                let got = written.inspect(|g| assert!(g.defined.iter().all(|d| *d), "{name}: {schedule:?}"));
                compare("evaluated", got.map(|g| g.data).collect(), 1e-9);
            }
        }
    }
}

/// Least positions among integers, carried over blocks: a selection of k, one after another.
#[test]
fn selections_agree() {
    let variants = [Variant::Normal, Variant::Ties];
    library_agrees("topk", &[&[1, 5], &[3, 131], &[7, 300]], &variants);
    library_agrees("router", &[&[5, 3, 8], &[67, 37, 72]], &variants);
}

/// Running counts and offsets of groups, joined stores of integers and gathers through them; any integers as input.
#[test]
fn a_counting_sort_agrees() {
    let variants = [Variant::Normal, Variant::Hostile];
    library_agrees("moe_permute", &[&[1, 1], &[37, 5], &[300, 67], &[700, 3]], &variants);
}

/// Segments found by one kernel, their matrices multiplied by others, results joined.
#[test]
fn mixtures_of_experts_agree() {
    let variants = [Variant::Small, Variant::Hostile];
    library_agrees("moe_up", &[&[5, 7, 3, 9, 11], &[17, 33, 5, 24, 40]], &variants);
    library_agrees("moe_down", &[&[5, 7, 3, 9, 11], &[17, 33, 5, 24, 40]], &variants);
    library_agrees("moe_mlp", &[&[5, 2, 7, 3, 9, 11], &[17, 3, 33, 5, 24, 40]], &variants);
}

/// A fold in parts that lie side by side, joined in order.
#[test]
fn moments_in_parts_agree() {
    library_agrees("welford", &[&[3, 1], &[37, 83], &[129, 16]], &[Variant::Normal, Variant::Ties]);
}

#[test]
fn random_numbers_agree() {
    library_agrees("dropout", &[&[3, 1], &[37, 83]], &[Variant::Normal]);
}

/// A running maximum of offsets, and segments counted from it.
#[test]
fn ragged_attention_agrees() {
    let sizes: [&[u64]; 3] = [&[1, 9, 11, 1, 8, 8], &[2, 37, 67, 3, 64, 72], &[2, 130, 140, 5, 64, 64]];
    library_agrees("varlen_attention", &sizes, &[Variant::Small, Variant::Ties]);
}

/// Integers near the ends of their types against positions, and conversions that saturate.
#[test]
fn extreme_integers_agree() {
    let plan = device::formed_text(
        "cascade ends[M, N](x: i32[M], w: i64[M], f: f32[M], y: i32[N]) -> (below: i32[M,N], from: i32[M,N],
            most: i32[M,N], narrow: i32[M], wide: i64[M]) {
            below[m,n] = if x[m] < n then 1 else 0
            from[m,n]  = if -1 - x[m] >= n + 2 then 1 else 0
            most[m,n]  = if max(x[m], -5) < max(y[n], -7) + 1 then 1 else 0
            narrow[m]  = i32(w[m])
            wide[m]    = i64(f[m])
        }",
        &[],
    );
    let mapping = einfall_autotune::model_gpu::choose(&plan, &DataSheet::h100(), None);
    let artifact = printed(&plan, &gpu::lower(&plan, &mapping).unwrap_or_else(|e| panic!("{e:?}")));
    let (least, most) = (f64::from(i32::MIN), f64::from(i32::MAX));
    let x = [least, least + 1.0, -1.0, 0.0, 1.0, 5.0, most - 1.0, most];
    let w = [-1e12, 1e12, most + 1.0, least - 1.0, 7.0, -7.0, most, least];
    let f = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e30, -1e30, 3.7, -3.7, 0.0];
    // One less than the largest is the most that 1 may be added to.
    let y = [least, -9.0, -7.0, -6.0, 0.0, 3.0, 63.0, most - 2.0, most - 1.0];
    let array = |t: DType, v: &[f64]| Array::from_fn(t, &[v.len() as u64], |i| t.round(v[i]));
    let given = [array(DType::I32, &x), array(DType::I64, &w), array(DType::F32, &f), array(DType::I32, &y)];
    let want = tile::eval::run(&plan, &[8, 9], &given, &tile::eval::Options::default()).unwrap();
    for (got, want) in execute(&artifact, &[8, 9], &given).iter().zip(&want) {
        assert_eq!(*got, want.data);
    }
}

/// With few keys the roundings of a one-pass form's weights, relative to the running maximum, come close to the bound
/// that the text's own weights have.
#[test]
fn weights_of_few_keys_agree() {
    let name = "paged_attention";
    let plan = device::formed(name);
    let mapping = einfall_autotune::model_gpu::choose(&plan, &DataSheet::h100(), None);
    let artifact = printed(&plan, &gpu::lower(&plan, &mapping).unwrap_or_else(|e| panic!("{e:?}")));
    let c = einfall_ir::cascade::parse(einfall_kernels::source(name).unwrap()).unwrap().cascades.remove(0);
    let sizes = [("B", 33), ("G", 2), ("R", 2), ("C", 2), ("S", 2), ("L", 2), ("E", 16), ("F", 16)];
    let given = Given { sizes: sizes.iter().map(|(n, v)| (n.to_string(), *v)).collect(), ..Given::default() };
    let b = bind(&c, &given).unwrap();
    let ranks: Vec<u64> =
        plan.ranks.iter().map(|(_, r)| sizes.iter().find(|s| s.0 == r.name).expect("a size").1).collect();
    for (variant, seed) in [
        (Variant::Normal, 8),
        (Variant::Normal, 10),
        (Variant::Uniform, 4),
        (Variant::Integers, 1),
        (Variant::Small, 9),
    ] {
        let inputs = random(&c, &b, seed, variant).unwrap();
        let expected = expect(&c, &b, &inputs, &Default::default()).unwrap();
        let got = execute(&artifact, &ranks, &inputs);
        let report = expected[0].compare(&got[0]).unwrap_or_else(|m| panic!("{variant:?} {seed}: {m}"));
        assert!(report.worst_ratio > 0.3, "{variant:?} {seed}: the tolerance is far from what is rounded: {report:?}");
    }
}
