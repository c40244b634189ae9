//! Library cascades without contractions, lowered for a GPU by small mappings and evaluated under every adversarial
//! schedule: they give what the tile plans mean, at sizes around every block's edge, and lost barriers are caught.

mod device;

use device::formed_alone;
use einfall_codegen::lower::gpu;
use einfall_codegen::tables;
use einfall_ir::array::Array;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::Module;
use einfall_ir::kernel::eval::{GlobalBuffer, KernelError, Options, Schedule, run};
use einfall_ir::kernel::variants::{ArrayFacts, choose};
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{self, BufferKind, Plan};

/// The plan's kernels by `entries` of a mapping.
fn lowered(plan: &Plan, entries: &str) -> Module {
    let text = format!("mapping {} on h100 {{\n{entries}}}\n", plan.name);
    verified(plan, &einfall_ir::mapping::parse::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")))
}

/// The plan's kernels by a mapping; they verify, and print as they parse.
fn verified(plan: &Plan, mapping: &Mapping) -> Module {
    let module = gpu::lower(plan, mapping).unwrap_or_else(|e| panic!("{}: {e:?}", plan.name));
    let violations = einfall_ir::kernel::verify::verify(&module, &einfall_ir::kernel::verify::Limits::SM90);
    let printed = einfall_ir::kernel::print::print(&module);
    assert!(violations.is_empty(), "{}{printed}", violations.iter().map(|v| format!("{v}\n")).collect::<String>());
    let again = einfall_ir::kernel::parse::parse(&printed).unwrap_or_else(|e| panic!("{e:?}\n{printed}"));
    assert_eq!(einfall_ir::kernel::print::print(&again), printed);
    module
}

/// Arrays of a launch: floats in [-1, 1], indices around and beyond every extent.
fn arrays(plan: &Plan, ranks: &[u64]) -> Vec<Array> {
    let most = ranks.iter().copied().max().unwrap_or(0) as i64;
    let mut s = 7u64;
    let mut next = move || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        s >> 33
    };
    let inputs = plan.buffers.iter().filter(|(_, b)| matches!(b.kind, BufferKind::Input | BufferKind::InOut));
    inputs
        .map(|(_, b)| {
            let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
            Array::from_fn(b.dtype, &dims, |_| {
                if b.dtype.is_float() {
                    DType::BF16.round(next() as f64 / f64::from(1u32 << 30) - 1.0)
                } else {
                    (next() as i64 % (most + 4) - 2) as f64
                }
            })
        })
        .collect()
}

fn buffers(plan: &Plan, ranks: &[u64], inputs: &[Array]) -> Vec<GlobalBuffer> {
    let mut given = inputs.iter();
    let buffer = |b: &tile::Buffer| {
        let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
        match b.kind {
            BufferKind::Input | BufferKind::InOut => {
                GlobalBuffer::new(&dims, b.dtype, given.next().unwrap().data.clone())
            }
            BufferKind::Output | BufferKind::Workspace => GlobalBuffer::undefined(&dims, b.dtype),
        }
    };
    plan.buffers.iter().map(|(_, b)| b).map(buffer).collect()
}

/// Runs a plan's launches, each by the variant that its sizes choose.
fn execute(
    plan: &Plan,
    module: &Module,
    ranks: &[u64],
    inputs: &[Array],
    options: &Options,
) -> Result<Vec<GlobalBuffer>, KernelError> {
    let mut b = buffers(plan, ranks, inputs);
    let facts: Vec<ArrayFacts> = b.iter().map(|x| ArrayFacts { address: 256, strides: x.strides.clone() }).collect();
    for launch in module.launches() {
        let kernel = choose(launch, ranks, &facts).unwrap_or_else(|| panic!("no variant takes {ranks:?}"));
        run(kernel, &plan.ranks, ranks, &mut b, options)?;
    }
    Ok(b)
}

fn near(x: f64, y: f64) -> bool {
    x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= 1e-9 * (1.0 + y.abs())
}

/// Whether every launch gives what the plan means under `schedule`; a message if not.
fn agrees(plan: &Plan, module: &Module, ranks: &[u64], schedule: Schedule) -> Result<(), String> {
    let inputs = arrays(plan, ranks);
    let want = tile::eval::run(plan, ranks, &inputs, &tile::eval::Options::default()).unwrap();
    let options = Options { schedule, seed: 3, ..Options::default() };
    let got = execute(plan, module, ranks, &inputs, &options).map_err(|e| format!("{schedule:?} at {ranks:?}: {e}"))?;
    let outs = plan.buffers.iter().zip(&got).filter(|((_, b), _)| b.kind == BufferKind::Output);
    for (((_, b), got), want) in outs.zip(&want) {
        if !got.defined.iter().all(|d| *d) {
            return Err(format!("{} is not written whole at {ranks:?}", b.name));
        }
        for (i, (x, y)) in got.data.iter().zip(&want.data).enumerate() {
            if !near(*x, *y) {
                return Err(format!("{}[{i}] is {x}, not {y}, at {ranks:?} ({schedule:?})", b.name));
            }
        }
    }
    Ok(())
}

/// Lowers a library cascade by the entries and runs it at each size under every schedule.
fn check(name: &str, entries: &str, sizes: &[&[u64]]) -> Module {
    let plan = formed_alone(name);
    let module = lowered(&plan, entries);
    for ranks in sizes {
        for schedule in Schedule::ALL {
            agrees(&plan, &module, ranks, schedule)
                .unwrap_or_else(|e| panic!("{name}: {e}\n{}", einfall_ir::kernel::print::print(&module)));
        }
    }
    module
}

/// Entries for kernel `kernel`: rows along `row` held whole over `units` units, then walked in smaller blocks.
fn rows(kernel: &str, grid: &str, row: &str, whole: u64, block: u64, units: u64) -> String {
    format!(
        "kernel {kernel} {{\n{grid}axis {row} block {whole} units {units} whole\n}}\n\
         kernel {kernel} {{\n{grid}axis {row} block {block} units {units}\n}}\n"
    )
}

/// [rows, columns]: whole vectors and not, at and beyond the block (256), none, one.
const SIZES: &[&[u64]] = &[&[5, 256], &[3, 200], &[2, 129], &[3, 257], &[2, 640], &[1, 1], &[0, 8], &[3, 0]];

#[test]
fn normalisations() {
    for units in [1, 2, 4] {
        let m = check("layernorm", &rows("layernorm_0", "axis m block 1\n", "k", 256, 64, units), SIZES);
        assert_eq!(m.kernels.len(), 4);
        // A row is read once and written once where it is held whole.
        let text = einfall_ir::kernel::print::print_kernel(&m.kernels[0], &m.ranks);
        assert_eq!(text.matches("= x[").count(), 1, "{text}");
        assert!(!text.contains("for "), "{text}");
        check("rmsnorm", &rows("rmsnorm_0", "axis m block 1\n", "k", 256, 64, units), SIZES);
        check("softmax", &rows("softmax_0", "axis m block 1\n", "n", 256, 64, units), SIZES);
    }
}

/// Products of few rows: K cut over the units of a task, whose parts meet in shared memory and are stored by one of them;
/// blocks that divide the extents need no mask, and other extents another entry.
#[test]
fn few_rows_of_a_product() {
    let entry = |m: u64, n: u64, k: u64, units: u64, exact: &str| {
        format!(
            "kernel matmul_0 {{\naxis m block {m}{exact}\naxis n block {n}{exact}\naxis k block {k} units {units} \
             register 4{exact}\n}}\n"
        )
    };
    for (m, n, k, units) in [(1, 32, 64, 4), (4, 16, 64, 2), (4, 32, 128, 8)] {
        let sizes = [[m, n, k], [2 * m, 2 * n, 3 * k], [m, n + 8, k], [m + 1, n - 1, k + 5], [1, 1, 1], [2, 8, 0]];
        let sizes: Vec<&[u64]> = sizes.iter().map(|s| s.as_slice()).collect();
        let both = format!("{}{}", entry(m, n, k, units, " exact"), entry(m, n, k, units, ""));
        let module = check("matmul", &both, &sizes);
        let text = einfall_ir::kernel::print::print_kernel(&module.kernels[0], &module.ranks);
        assert!(text.contains(&format!("assume K multiple {k}")), "{text}");
        assert!(!text.contains(" within ") && !text.contains("where"), "{text}");
        // What the units left is read by the one that stores.
        let end = &text[text.rfind("task_sync").expect("they meet")..];
        assert!(end.find("if unit == 0").expect("once") < end.find("load ").expect("read"), "{text}");
        // Without the entry for others they are refused.
        let alone = lowered(&formed_alone("matmul"), &entry(m, n, k, units, " exact"));
        assert!(alone.kernels.iter().all(|x| !x.assumes.is_empty()));
    }
}

#[test]
fn several_rows_of_a_task() {
    for grid in ["axis m block 4\n", "axis m block 4 units 4\n", "axis m block 8 units 4\n"] {
        let entries = |k: &str, row: &str| rows(k, grid, row, 256, 32, 1);
        check("layernorm", &entries("layernorm_0", "k"), SIZES);
        check("softmax", &entries("softmax_0", "n"), SIZES);
        check("argmax", &entries("argmax_rows_0", "n"), SIZES);
        check("cumsum", entries("cumsum_rows_0", "n").split_once("whole\n}\n").unwrap().1, SIZES);
    }
}

#[test]
fn selections_scans_and_gathers() {
    for units in [1, 4] {
        check("argmax", &rows("argmax_rows_0", "axis m block 1\n", "n", 256, 64, units), SIZES);
        check("logsumexp", &rows("logsumexp_rows_0", "axis m block 1\n", "n", 256, 64, units), SIZES);
        check("third_moment", &rows("third_moment_0", "axis m block 2\n", "k", 256, 64, units), SIZES);
        check("entropy", &rows("entropy_0", "axis m block 1\n", "n", 256, 32, units), SIZES);
        check("cross_entropy", &rows("cross_entropy_0", "axis m block 1\n", "n", 256, 32, units), SIZES);
    }
    check("cross_entropy", &rows("cross_entropy_0", "axis m block 2\n", "n", 256, 32, 2), SIZES);
    for rows in ["axis m block 1", "axis m block 2", "axis m block 4 units 2", "axis m block 2 units 2"] {
        check("cumsum", &format!("kernel cumsum_rows_0 {{\n{rows}\naxis n block 64\n}}\n"), SIZES);
    }
    // Positions of [tokens, words, columns]: indices outside the table give 0.
    for tokens in ["axis n block 1", "axis n block 2", "axis n block 4 units 4"] {
        let entries = format!("kernel embedding_0 {{\n{tokens}\naxis d block 64\n}}\n");
        check("embedding", &entries, &[&[5, 7, 72], &[3, 1, 64], &[4, 0, 8], &[1, 3, 1], &[0, 3, 8], &[2, 3, 0]]);
    }
}

#[test]
fn contractions_without_an_instruction() {
    // Means over masked tokens [batch, tokens, columns]: the tokens of a block are held, the columns walked.
    let pooled = "kernel mean_pool_0 {\naxis b block 1\naxis d block 64 units 2\naxis t_2 block 64 whole\n\
                  axis t block 64 whole\n}\nkernel mean_pool_1 {\naxis b block 1\naxis d block 64\n}\n";
    check("mean_pool", pooled, &[&[3, 50, 72], &[2, 64, 130], &[1, 1, 1], &[2, 0, 8]]);
    let rows = "kernel sigmoid_minus_max_0 {\naxis m block 2\naxis f block 32\naxis n block 8\n}\n";
    check("sigmoid_minus_max", rows, &[&[5, 20, 40], &[3, 8, 32], &[1, 1, 1], &[2, 0, 4]]);
    let linear = "kernel linear_0 {\naxis m block 4 units 4\naxis n block 32\naxis k block 8\n}\n";
    check("linear", linear, &[&[6, 40, 20], &[1, 1, 1], &[4, 32, 0]]);
}

/// Cascades of the library whose plans contract nothing, walk nothing point after point, draw no random numbers and
/// update nothing in place: what the rule for rows is for.
fn without_contractions() -> Vec<(&'static str, Plan)> {
    let form = |source: &str| {
        let cascade = einfall_ir::cascade::parse(source).ok()?.cascades.pop()?;
        tables::formed(cascade).ok()
    };
    let other = |p: &Plan| {
        let walks = |n: &tile::Node| matches!(n, tile::Node::Stream(s) if s.sequential);
        let draws = |k: &tile::Kernel| k.exprs.iter().any(|(_, e)| matches!(e, tile::Expr::Rand(_)));
        let mut found = p.kernels.iter().any(|k| k.body.iter().any(walks) || draws(k))
            || p.buffers.iter().any(|(_, b)| b.kind == BufferKind::InOut);
        let each = &mut |op: &tile::Op, _: &[tile::AxisId]| {
            found |= matches!(op, tile::Op::Contract { .. } | tile::Op::Store { join: Some(_), .. });
        };
        p.kernels.iter().for_each(|k| k.for_each_op(each));
        found
    };
    let plans = einfall_kernels::SOURCES.iter().filter_map(|(name, source)| Some((*name, form(source)?)));
    plans.filter(|(_, p)| !other(p)).collect()
}

#[test]
fn the_library_by_the_rule() {
    let sheet = DataSheet::named("h200").unwrap();
    let all = without_contractions();
    let names: Vec<&str> = all.iter().map(|(n, _)| *n).collect();
    for wanted in ["layernorm", "rmsnorm", "softmax", "embedding", "embedding_layernorm", "cumsum", "argmax", "entropy"]
    {
        assert!(names.contains(&wanted), "{names:?}");
    }
    for (name, plan) in all {
        let n = plan.ranks.len();
        let ranks = |rows: u64, last: u64| {
            let mut v = vec![rows; n];
            if let Some(x) = v.last_mut() {
                *x = last;
            }
            v
        };
        for hint in [None, Some(ranks(64, 4096)), Some(ranks(64, 96)), Some(ranks(64, 777))] {
            let mapping = einfall_autotune::model_gpu::choose(&plan, &sheet, hint.as_deref());
            let module = verified(&plan, &mapping);
            assert!(module.launches().iter().all(|l| l.len() <= 8), "{name}");
            for sizes in [ranks(5, 1000), ranks(2, 4096), ranks(1, 20001), ranks(3, 1), ranks(0, 8), ranks(2, 0)] {
                agrees(&plan, &module, &sizes, Schedule::Random)
                    .unwrap_or_else(|e| panic!("{name} {hint:?}: {e}\n{mapping}"));
            }
        }
    }
}

#[test]
fn lost_barriers_are_caught() {
    let plan = formed_alone("layernorm");
    let module = lowered(&plan, &rows("layernorm_0", "axis m block 1\n", "k", 256, 64, 4));
    // Rows held whole, and walked rows: every meeting of the units, and every copy they alternate between.
    for (ranks, variant) in [([3, 256], 0), ([3, 600], 2)] {
        let mut n = 0;
        for m in einfall_ir::kernel::mutate::mutants(&module.kernels[variant], &plan.ranks) {
            let mut mutant = module.clone();
            mutant.kernels[variant] = m.kernel;
            n += 1;
            let caught = Schedule::ALL.into_iter().any(|s| agrees(&plan, &mutant, &ranks, s).is_err());
            assert!(caught, "{:?} {}", m.fault, m.place);
        }
        assert!(n >= 2);
    }
    let plan = formed_alone("logsumexp");
    let module = lowered(&plan, &rows("logsumexp_rows_0", "axis m block 1\n", "n", 256, 64, 4));
    let variant = module.kernels.len() - 1;
    let found = einfall_ir::kernel::mutate::mutants(&module.kernels[variant], &plan.ranks);
    let missed: Vec<String> = found
        .filter(|m| {
            let mut mutant = module.clone();
            mutant.kernels[variant] = m.kernel.clone();
            !Schedule::ALL.into_iter().any(|s| agrees(&plan, &mutant, &[2, 637], s).is_err())
        })
        .map(|m| format!("{:?} {}", m.fault, m.place))
        .collect();
    assert_eq!(missed, Vec::<String>::new());
}

#[test]
fn what_cannot_be_done_is_refused() {
    for (name, entries, says) in [
        ("cumsum", "kernel cumsum_rows_0 {\naxis m block 1\naxis n block 64 units 2\n}\n", "scans: Y runs along"),
        ("layernorm", "kernel layernorm_0 {\naxis m block 1\n}\n", "blocks: axis k of kernel layernorm_0"),
        (
            "layernorm",
            "kernel layernorm_0 {\naxis m block 1\naxis k block 64\nrole main: 2 warp\n}\n",
            "units: several units would do the same work",
        ),
        (
            "layernorm",
            "kernel layernorm_0 {\naxis m block 2 units 2\naxis k block 64 units 2\n}\n",
            "is not cut over units along two axes",
        ),
    ] {
        let plan = formed_alone(name);
        let text = format!("mapping {} on h100 {{\n{entries}}}\n", plan.name);
        let mapping = einfall_ir::mapping::parse::parse(&text).unwrap();
        let refused = gpu::lower(&plan, &mapping).expect_err(says);
        assert!(refused[0].message.contains(says), "{refused:?}");
    }
    // A row known to be longer than the only block that would hold it.
    let mut plan = formed_alone("softmax");
    plan.ranks.iter_mut().for_each(|(_, r)| r.fixed = (r.name == "N").then_some(300));
    let text = "mapping softmax on h100 {\nkernel softmax_0 {\naxis m block 1\naxis n block 256 whole\n}\n}\n";
    let refused = gpu::lower(&plan, &einfall_ir::mapping::parse::parse(text).unwrap()).expect_err("too long");
    assert!(refused[0].message.contains("no entry for softmax_0 holds its extents"), "{refused:?}");
}

/// Tasks of a persistent kernel meet again in every row.
#[test]
fn rows_in_a_work_loop() {
    for units in [1, 2, 4] {
        let grid = "axis m block 1\nwork persistent\n";
        for name in ["layernorm", "softmax"] {
            let row = if name == "softmax" { "n" } else { "k" };
            check(name, &rows(&format!("{name}_0"), grid, row, 128, 32, units), &[&[300, 100], &[270, 150]]);
        }
    }
}
