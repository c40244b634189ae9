//! Streams cut over tasks and merged by a second kernel: the plan means the same, and its kernels agree with it under
//! every adversarial schedule.

mod device;

use device::{formed, near, text};
use einfall_codegen::backend::ptx::{Target, print};
use einfall_codegen::lower::gpu::{self, split_streams};
use einfall_codegen::pipeline::{Context, Program};
use einfall_codegen::tables;
use einfall_ir::analysis::order_free;
use einfall_ir::analysis::resources::Limits;
use einfall_ir::arena::Id;
use einfall_ir::array::Array;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::eval::{GlobalBuffer, Options, Schedule, run};
use einfall_ir::kernel::mutate::mutants;
use einfall_ir::kernel::{Expr, GridDependency, Kernel, Module, Stmt};
use einfall_ir::mapping::parse::parse;
use einfall_ir::ops::BinaryOp;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{self, BufferKind, Plan};

/// The plan of `source` as it is, and cut as the mapping says on a device of so many multiprocessors.
fn cut(source: &str, mapping: &str, multiprocessors: u64) -> (Plan, Plan) {
    let plan = tile::parse::parse(source).unwrap_or_else(|e| panic!("{e:?}"));
    let mapping = parse(mapping).unwrap_or_else(|e| panic!("{e}"));
    let split = split_streams::run(&plan, &mapping, multiprocessors).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(tile::verify::verify(&split), Ok(()), "{split}");
    assert_eq!(tile::parse::parse(&split.to_string()).unwrap().to_string(), split.to_string());
    (plan, split)
}

fn inputs(plan: &Plan, ranks: &[u64]) -> Vec<Array> {
    let mut s = 11u64;
    let mut next = move || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        DType::BF16.round((s >> 40) as f64 / f64::from(1u32 << 23) - 1.0)
    };
    let given = plan.buffers.iter().filter(|(_, b)| matches!(b.kind, BufferKind::Input | BufferKind::InOut));
    given
        .map(|(_, b)| {
            let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
            Array::from_fn(b.dtype, &dims, |_| if b.positive { next().abs() + 0.125 } else { next() })
        })
        .collect()
}

/// Whether both plans give the same.
fn means_the_same(plan: &Plan, split: &Plan, ranks: &[u64]) -> Vec<Array> {
    let given = inputs(plan, ranks);
    let options = tile::eval::Options::default();
    let want = tile::eval::run(plan, ranks, &given, &options).unwrap();
    let got = tile::eval::run(split, ranks, &given, &options).unwrap_or_else(|e| panic!("{e} at {ranks:?}\n{split}"));
    for (x, y) in got.iter().zip(&want) {
        assert!(x.data.iter().zip(&y.data).all(|(x, y)| near(*x, *y)), "at {ranks:?}\n{split}");
    }
    want
}

fn lowered(split: &Plan, mapping: &str) -> Module {
    let module = gpu::lower(split, &parse(mapping).unwrap()).unwrap_or_else(|e| panic!("{e:?}\n{split}"));
    let limits = einfall_ir::kernel::verify::Limits::SM90;
    let faults = einfall_ir::kernel::verify::verify(&module, &limits);
    assert!(faults.is_empty(), "{}", faults.iter().map(|v| format!("{v}\n")).collect::<String>());
    module
}

/// Runs the cut plan's kernels one after the other.
fn agrees(plan: &Plan, split: &Plan, module: &Module, ranks: &[u64]) {
    let want = means_the_same(plan, split, ranks);
    let given = inputs(plan, ranks);
    let counted: Vec<usize> = module.kernels.iter().flat_map(|k| k.counters()).collect();
    for schedule in Schedule::ALL {
        let mut given = given.iter();
        let mut arrays: Vec<GlobalBuffer> = split
            .buffers
            .iter()
            .map(|(id, b)| {
                let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
                match b.kind {
                    BufferKind::Input | BufferKind::InOut => {
                        GlobalBuffer::new(&dims, b.dtype, given.next().unwrap().data.clone())
                    }
                    BufferKind::Workspace if counted.contains(&id.index()) => {
                        GlobalBuffer::new(&dims, b.dtype, vec![0.0; dims.iter().product::<u64>() as usize])
                    }
                    BufferKind::Output | BufferKind::Workspace => GlobalBuffer::undefined(&dims, b.dtype),
                }
            })
            .collect();
        let options = Options { schedule, seed: 3, ..Options::default() };
        for launch in module.launches() {
            // The last variant assumes nothing.
            let kernel = launch.last().unwrap();
            run(kernel, &split.ranks, ranks, &mut arrays, &options)
                .unwrap_or_else(|e| panic!("{}: {e} at {ranks:?}", kernel.name));
        }
        assert!(counted.iter().all(|c| arrays[*c].data.iter().all(|n| *n == 0.0)), "counters start again");
        let outs = split.buffers.iter().zip(&arrays).filter(|((_, b), _)| b.kind == BufferKind::Output);
        for ((_, got), want) in outs.zip(&want) {
            assert!(got.defined.iter().all(|d| *d));
            assert!(got.data.iter().zip(&want.data).all(|(x, y)| near(*x, *y)), "{schedule:?} at {ranks:?}");
        }
    }
}

#[test]
fn decode_in_parts() {
    let mapping = text("mappings/decode.mapping");
    let slots = Limits::h100().multiprocessors;
    let (plan, split) = cut(&text("plans/decode.tile"), &mapping, slots);
    assert_eq!(split.kernels.len(), 2);
    let module = lowered(&split, &mapping);
    // [B, H, R, N, E, F]: parts of one block, a tail, a part without keys, no keys.
    for ranks in [[1, 2, 4, 700, 128, 128], [2, 1, 8, 128, 64, 128], [1, 1, 1, 1290, 128, 72], [1, 1, 3, 0, 64, 64]] {
        agrees(&plan, &split, &module, &ranks);
    }
}

/// The library's grouped-query attention with one query position is decode: the heads of a group fill the rows.
#[test]
fn grouped_queries_in_parts() {
    let mappings = [
        "attention_decode",
        "attention_decode_columns",
        "attention_decode_ahead",
        "attention_decode_dependent",
        "attention_decode_a100",
    ];
    mappings.iter().for_each(|m| grouped_queries(m));
}

fn grouped_queries(mapping: &str) {
    let mapping = text(&format!("mappings/{mapping}.mapping"));
    let plan = formed("attention_gqa");
    let (plan, split) = cut(&plan.to_string(), &mapping, Limits::h100().multiprocessors);
    let module = lowered(&split, &mapping);
    // [B, G, R, M, N, E, F]: uneven parts, a tail, two queries, no keys.
    for ranks in
        [[1, 2, 4, 1, 700, 128, 128], [2, 1, 8, 1, 128, 64, 128], [1, 1, 3, 2, 330, 128, 72], [1, 1, 2, 1, 0, 64, 64]]
    {
        agrees(&plan, &split, &module, &ranks);
    }
}

/// A merge that comes too early, or does not wait to be counted at all, is seen: it reads what nothing ordered before.
#[test]
fn a_merge_before_the_last_part_is_caught() {
    let mapping = text("mappings/attention_decode.mapping");
    let plan = formed("attention_gqa");
    let (_, split) = cut(&plan.to_string(), &mapping, Limits::h100().multiprocessors);
    let module = lowered(&split, &mapping);
    let kernel = module.kernels.last().unwrap();
    let ranks = [1, 1, 2, 1, 200, 64, 64];
    let fails = |k: &Kernel, schedule| {
        let given = inputs(&plan, &ranks);
        let mut given = given.iter();
        let arrays = split.buffers.iter().map(|(id, b)| {
            let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(&ranks).unwrap()).collect();
            match b.kind {
                BufferKind::Input => GlobalBuffer::new(&dims, b.dtype, given.next().unwrap().data.clone()),
                _ if kernel.counters().contains(&id.index()) => GlobalBuffer::new(&dims, b.dtype, vec![0.0]),
                _ => GlobalBuffer::undefined(&dims, b.dtype),
            }
        });
        let mut arrays: Vec<GlobalBuffer> = arrays.collect();
        let options = Options { schedule, seed: 5, ..Options::default() };
        run(k, &split.ranks, &ranks, &mut arrays, &options).is_err()
    };
    assert!(Schedule::ALL.iter().all(|s| !fails(kernel, *s)));
    let mut early = 0;
    for mutant in mutants(kernel, &split.ranks).filter(|m| m.place.contains(": last ")) {
        assert!(Schedule::ALL.iter().any(|s| fails(&mutant.kernel, *s)), "{:?} {}", mutant.fault, mutant.place);
        early += 1;
    }
    assert_eq!(early, 2);
    // The part of the highest number merges, whoever has arrived.
    let mut uncounted = kernel.clone();
    let body = &mut uncounted.roles.last_mut().unwrap().body;
    let at = body.iter().position(|s| matches!(s, Stmt::Last { .. })).unwrap();
    let Stmt::Last { var, of, .. } = body[at].clone() else { unreachable!("found") };
    let value = Expr::Binary(BinaryOp::Eq, Box::new(Expr::Grid(4)), Box::new(of.bin(BinaryOp::Sub, Expr::Int(1))));
    body[at] = Stmt::Let { var, value };
    assert!(Schedule::ALL.iter().any(|s| fails(&uncounted, *s)));
}

/// The merge starts while the parts run and waits before it reads what they store; without the wait it reads what may not
/// be there yet, which is seen under every schedule, and so is a kernel that stores over what the one before still reads.
#[test]
fn a_merge_may_start_before_the_parts_have_ended() {
    let mapping = text("mappings/decode.mapping")
        .replace("axis f block 128\n    }\n}", "axis f block 128\n        dependent\n    }\n}");
    let (plan, split) = cut(&text("plans/decode.tile"), &mapping, Limits::h100().multiprocessors);
    let module = lowered(&split, &mapping);
    let printed = einfall_ir::kernel::print::print(&module);
    let again = einfall_ir::kernel::parse::parse(&printed).unwrap();
    assert_eq!(einfall_ir::kernel::print::print(&again), printed);
    let dependent: Vec<bool> = module.kernels.iter().map(|k| k.dependent).collect();
    assert!(!dependent[0] && dependent[1..].iter().all(|d| *d) && dependent.len() > 1, "{dependent:?}");
    let leaves = |k: &Kernel| k.roles.iter().any(|r| r.body.contains(&Stmt::GridDependency(GridDependency::Launch)));
    assert!(leaves(&module.kernels[0]) && !module.kernels[1..].iter().any(leaves));
    let ranks = [1, 2, 4, 700, 128, 128];
    agrees(&plan, &split, &module, &ranks);
    let fails = |k: &Kernel, schedule| {
        let mut given = inputs(&split, &ranks).into_iter();
        let arrays = split.buffers.iter().map(|(_, b)| {
            let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(&ranks).unwrap()).collect();
            match b.kind {
                BufferKind::Input => GlobalBuffer::new(&dims, b.dtype, given.next().unwrap().data),
                _ => GlobalBuffer::undefined(&dims, b.dtype),
            }
        });
        let mut arrays: Vec<GlobalBuffer> = arrays.collect();
        let options = Options { schedule, seed: 3, ..Options::default() };
        run(&module.kernels[0], &split.ranks, &ranks, &mut arrays, &options).unwrap();
        run(k, &split.ranks, &ranks, &mut arrays, &options).err().map(|e| e.to_string())
    };
    let merge = module.launches()[1].last().unwrap();
    let mut waits = 0;
    for mutant in mutants(merge, &split.ranks).filter(|m| m.place.contains("grid_dependency wait")) {
        for schedule in Schedule::ALL {
            let said = fails(&mutant.kernel, schedule).unwrap_or_else(|| panic!("{schedule:?}: {}", mutant.place));
            assert!(said.contains("Race") && said.contains("a kernel launched before"), "{said}");
        }
        waits += 1;
    }
    assert_eq!(waits, 1);
    assert!(Schedule::ALL.iter().all(|s| fails(merge, *s).is_none()));
    // The parts again, as a kernel that does not wait: they store where the first ones stored.
    let mut again = module.kernels[0].clone();
    again.dependent = true;
    assert!(Schedule::ALL.iter().all(|s| fails(&again, *s).is_some_and(|e| e.contains("Race"))));
}

/// A plan's first kernel has none to overlap with, and cards before Hopper have no such launches.
#[test]
fn dependent_launches_that_cannot_be_are_refused() {
    let mapping = text("mappings/decode.mapping");
    let first = mapping.replace("split n parts", "dependent\n        split n parts");
    let (_, split) = cut(&text("plans/decode.tile"), &first, 132);
    let refused = gpu::lower(&split, &parse(&first).unwrap()).unwrap_err();
    assert!(refused[0].message.contains("dependent launch: decode is the plan's first kernel"), "{refused:?}");
    let plan = formed("mean_pool");
    let entries = "kernel mean_pool_0 {\n axis b block 1\n axis d block 16 units 4\n axis t block 64 whole\n axis t_2 block 64 whole\n }\n\
                   kernel mean_pool_1 {\n axis b block 1\n axis d block 64\n dependent\n }\n";
    for (sheet, says) in [("h100", None), ("a100", Some("dependent launches before sm_90"))] {
        let mapping = parse(&format!("mapping mean_pool on {sheet} {{\n{entries}}}")).unwrap();
        let module = gpu::lower(&plan, &mapping).unwrap_or_else(|e| panic!("{e:?}"));
        let target = Target::of(&DataSheet::named(sheet).unwrap()).unwrap();
        match (print(&plan, &module, &target), says) {
            (Ok(artifact), None) => {
                let gpu: Vec<_> = artifact.launches.iter().map(|l| l.gpu.as_ref().unwrap()).collect();
                assert!(gpu.iter().all(|g| g.dependent == g.variant_of.as_ref().is_some_and(|v| v == "mean_pool_1")));
            }
            (Err(e), Some(says)) => assert!(e.to_string().contains(says), "{e}"),
            (printed, _) => panic!("{printed:?} on {sheet}"),
        }
    }
}

/// What the merge where the last arrives cannot do is refused by name.
#[test]
fn merges_that_do_not_fit_the_parts_are_refused() {
    let mapping = text("mappings/attention_decode.mapping");
    let plan = formed("attention_gqa");
    for (from, to, says) in [
        ("axis r block 4", "axis r block 24", "blocks of 24 along r cross the tasks of attention_gqa_0, of 64"),
        (
            "        split n",
            "        work longest_first\n        split n",
            "its tasks are clustered or walk several blocks",
        ),
    ] {
        assert!(mapping.contains(from));
        let mapping = mapping.replace(from, to);
        let (_, split) = cut(&plan.to_string(), &mapping, 132);
        let refused = gpu::lower(&split, &parse(&mapping).unwrap()).expect_err(says);
        assert!(refused[0].message.contains(says) && refused[0].help.is_some(), "{refused:?}");
    }
}

/// The number of parts is an expression over extents.
#[test]
fn parts_fill_the_device() {
    let (_, split) = cut(&text("plans/decode.tile"), &text("mappings/decode.mapping"), 132);
    let parts = |b: u64, h: u64, n: u64| {
        split.kernels[1]
            .axes
            .iter()
            .find(|(_, a)| a.name == "n_part")
            .unwrap()
            .1
            .extent
            .eval(&[b, h, 4, n, 128, 128])
            .unwrap()
    };
    assert_eq!([parts(1, 8, 131_072), parts(1, 8, 1024), parts(1, 8, 0)], [16, 8, 1]);
    assert_eq!([parts(64, 8, 8192), parts(16, 2, 1 << 20), parts(2, 35, 1 << 20), parts(1, 1, 1 << 20)], [1, 8, 7, 64]);
}

/// Cuts through filters, with the blocks of the whole or small ones; sums merge as online softmax does.
#[test]
fn other_streams_in_parts() {
    let attention = "mapping attention on h100 {\n kernel attention {\n axis n block 16\n split n parts 5 merge second_kernel\n }\n}";
    for multiprocessors in [4, 40] {
        let (plan, split) = cut(&text("plans/attention.tile"), attention, multiprocessors);
        for ranks in [[1, 2, 2, 5, 70, 8, 4], [1, 1, 1, 9, 3, 4, 4], [1, 1, 1, 2, 81, 4, 4]] {
            means_the_same(&plan, &split, &ranks);
        }
    }
    let gemm = "mapping gemm on h100 {\n kernel gemm {\n axis k block 16\n split k parts 3 merge second_kernel\n }\n}";
    let (plan, split) = cut(&text("plans/gemm.tile"), gemm, 132);
    for ranks in [[5, 7, 40], [3, 2, 16], [2, 2, 0], [1, 1, 150]] {
        means_the_same(&plan, &split, &ranks);
    }
}

/// Split-K: the parts' sums leave from registers, the second kernel adds them.
#[test]
fn gemm_in_parts() {
    let mapping = text("mappings/gemm.mapping")
        .replace("        op store.C role consumer by tma\n", "        split k parts 4 merge second_kernel\n")
        .replace(
            "    }\n}",
            "    }\n    kernel gemm_merge {\n        axis m block 1\n        axis n block 128\n    }\n}",
        );
    let (plan, split) = cut(&text("plans/gemm.tile"), &mapping, 132);
    let module = lowered(&split, &mapping);
    for ranks in [[130, 264, 328], [8, 8, 8]] {
        agrees(&plan, &split, &module, &ranks);
    }
}

#[test]
fn what_depends_on_its_order_is_not_cut() {
    for (plan, line, says) in [
        ("lstm_gates", "split t parts 2 merge second_kernel", "t of lstm is not cut: its steps depend on each other"),
        ("decode", "split n parts 2 merge cluster", "parts of decode merge by cluster"),
    ] {
        let source = tile::parse::parse(&text(&format!("plans/{plan}.tile"))).unwrap();
        let kernel = &source.kernels[0].name;
        let mapping = format!("mapping {} on h100 {{\n kernel {kernel} {{\n {line}\n }}\n}}", source.name);
        let refused = split_streams::run(&source, &parse(&mapping).unwrap(), 132).expect_err(says);
        assert!(refused.message.contains(says) && refused.help.is_some(), "{refused}");
    }
    // What a step stores belongs to its part, of which the array knows nothing.
    let stores = "plan s[M, N] {
    input x: f32[M, N]
    output y: f32[M, N]
    output t: f32[M]

    kernel s_0 {
        grid m in M
        stream n in N
        tile r: f32[m]
        r = 0.0
        for n {
            store y[m, n] = x[m, n] + 1.0 over m, n
            r = carry reduce sum(n) x[m, n]
        }
        store t[m] = r over m
    }
}
";
    let source = tile::parse::parse(stores).unwrap();
    let mapping = "mapping s on h100 {\n kernel s_0 {\n axis m block 1\n axis n block 8\n split n parts 2 merge second_kernel\n }\n}";
    let refused = split_streams::run(&source, &parse(mapping).unwrap(), 132).expect_err("it stores");
    assert!(refused.message.contains("n of s_0 is not cut: its steps store"), "{refused}");
    let at = source.kernels[0].body.iter().position(|n| matches!(n, tile::Node::Stream(_))).unwrap();
    assert!(order_free::equal_parts(&source, &source.kernels[0], at).is_err());
    // Without the pass the lowering says what is missing.
    let source = tile::parse::parse(&text("plans/decode.tile")).unwrap();
    let mapping = text("mappings/decode.mapping");
    let mapping = mapping.split("    kernel decode_merge").next().unwrap().to_string() + "}\n";
    let refused = gpu::lower(&source, &parse(&mapping).unwrap()).expect_err("not cut");
    assert!(refused[0].message.contains("split: decode has not been cut"), "{refused:?}");
}

/// The passes cut a stream for the multiprocessors that there are: those of the context's limits, else of the sheet that the
/// mapping names.
#[test]
fn parts_are_for_the_device_that_is_lowered_for() {
    let plan = formed("attention_gqa");
    let mapping = parse(&text("mappings/attention_decode_a100.mapping")).unwrap();
    let pass = tables::GPU.iter().find(|p| p.name == "split-streams").unwrap();
    let few = Limits { multiprocessors: 7, ..Limits::h100() };
    for (limits, multiprocessors) in [(None, 108), (Some(few), 7)] {
        let context = Context { mapping: Some(mapping.clone()), limits, ..Context::default() };
        let cut = pass.apply(Program::Tile(plan.clone()), &context).unwrap();
        assert_eq!(cut, Program::Tile(split_streams::run(&plan, &mapping, multiprocessors).unwrap()));
    }
}
