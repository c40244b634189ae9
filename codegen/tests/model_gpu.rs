//! The GPU mapping model against the lowering: what the model admits lowers, verifies and computes what the plan means;
//! the reference mappings are among it; what it rejects it names.

use std::fmt::Write;

use einfall_autotune::csp::{Expr, Pred, Solver};
use einfall_autotune::model_gpu::space::Space;
use einfall_autotune::model_gpu::{
    admits, admitted, candidates, choose, count, kernel_candidates, obstacle, price, sample, why_not,
};
use einfall_codegen::lower::gpu::{self, split_streams};
use einfall_codegen::{pipeline, tables};
use einfall_ir::analysis::resources::Limits;
use einfall_ir::arena::Id;
use einfall_ir::array::Array;
use einfall_ir::cascade::bind::{Given, bind, check_facts};
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::dtype::DType;
use einfall_ir::kernel::Module;
use einfall_ir::kernel::eval::{GlobalBuffer, Options, Schedule, run};
use einfall_ir::kernel::variants::{ArrayFacts, choose as variant};
use einfall_ir::kernel::verify;
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{self, BufferId, BufferKind, Kernel, Op, Plan};

fn text(path: &str) -> String {
    let path = format!("{}/../tests/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn plan(name: &str) -> Plan {
    tile::parse::parse(&text(&format!("plans/{name}.tile"))).unwrap()
}

fn mapping(name: &str) -> Mapping {
    einfall_ir::mapping::parse::parse(&text(&format!("mappings/{name}.mapping"))).unwrap()
}

/// A cascade's plan, as the pipeline makes it; none where it is refused.
fn formed(cascade: Cascade) -> Option<Plan> {
    let program = pipeline::Program::Cascade(cascade);
    let wgmma = einfall_ir::kernel::atoms::all().filter(|a| a.asynchronous);
    let context = pipeline::Context { atoms: wgmma.collect(), ..pipeline::Context::default() };
    let records = pipeline::run(tables::TO_TILE, tables::FORMS, program, &context, None).ok()?;
    match records.into_iter().last()?.program {
        pipeline::Program::Tile(plan) => Some(plan),
        pipeline::Program::Cascade(_) | pipeline::Program::Kernel(_) => None,
    }
}

fn contracts(kernel: &Kernel) -> bool {
    let mut found = false;
    kernel.for_each_op(&mut |op, _| found |= matches!(op, Op::Contract { .. }));
    found
}

/// Arrays of a launch: floats in [-1, 1], indices around every extent.
fn arrays(plan: &Plan, ranks: &[u64]) -> Vec<Array> {
    let most = ranks.iter().copied().max().unwrap_or(0) as i64;
    let mut s = 7u64;
    let mut next = move || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        s >> 33
    };
    let inputs = plan.buffers.iter().filter(|(_, b)| matches!(b.kind, BufferKind::Input | BufferKind::InOut));
    let array = |(_, b): (_, &tile::Buffer)| {
        let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
        Array::from_fn(b.dtype, &dims, |_| {
            if b.dtype.is_float() {
                let x = DType::BF16.round(next() as f64 / f64::from(1u32 << 30) - 1.0);
                if b.positive { x.abs() + 0.125 } else { x }
            } else {
                (next() as i64 % (most + 4) - 2) as f64
            }
        })
    };
    inputs.map(array).collect()
}

/// Whether the module of a plan, cut as its mapping says, gives what the plan means at `ranks`; what is wrong if not.
fn agrees(plan: &Plan, (cut, module): &(Plan, Module), ranks: &[u64], schedule: Schedule) -> Result<(), String> {
    let inputs = arrays(plan, ranks);
    let want = tile::eval::run(plan, ranks, &inputs, &tile::eval::Options::default()).map_err(|e| e.to_string())?;
    let mut given = inputs.iter();
    let counted: Vec<usize> = module.kernels.iter().flat_map(|k| k.counters()).collect();
    let buffer = |(id, b): (BufferId, &tile::Buffer)| {
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
    };
    let mut got: Vec<GlobalBuffer> = cut.buffers.iter().map(buffer).collect();
    let facts: Vec<ArrayFacts> = got.iter().map(|x| ArrayFacts { address: 256, strides: x.strides.clone() }).collect();
    let options = Options { schedule, seed: 3, ..Options::default() };
    for launch in module.launches() {
        let kernel = variant(launch, ranks, &facts).ok_or("no variant takes these sizes")?;
        run(kernel, &cut.ranks, ranks, &mut got, &options).map_err(|e| format!("{schedule:?}: {e}"))?;
    }
    let outs = cut.buffers.iter().zip(&got).filter(|((_, b), _)| b.kind == BufferKind::Output);
    for (((_, b), got), want) in outs.zip(&want) {
        if !got.defined.iter().all(|d| *d) {
            return Err(format!("{} is not written whole", b.name));
        }
        for (i, (x, y)) in got.data.iter().zip(&want.data).enumerate() {
            if x != y && !(x.is_nan() && y.is_nan()) && (x - y).abs() > 1e-9 * (1.0 + y.abs()) {
                return Err(format!("{}[{i}] is {x}, not {y} ({schedule:?})", b.name));
            }
        }
    }
    Ok(())
}

/// The plan cut as a mapping says, and its module, which must lower, verify and print as it parses.
fn lowered(plan: &Plan, m: &Mapping) -> Result<(Plan, Module), String> {
    let again = einfall_ir::mapping::parse::parse(&m.to_string()).map_err(|e| e.to_string())?;
    if again != *m {
        return Err("the mapping does not print as it parses".into());
    }
    let limits = Limits::of(&DataSheet::named(&m.target).and_then(|s| s.gpu).unwrap());
    let plan = split_streams::run(plan, m, limits.multiprocessors).map_err(|e| e.message)?;
    let module = gpu::lower_for(&plan, m, &limits).map_err(|e| e[0].message.clone())?;
    let limits =
        verify::Limits { shared_bytes: limits.shared_bytes, registers: limits.registers, threads: limits.threads };
    let violations = verify::verify(&module, &limits);
    match violations.first() {
        Some(v) => Err(format!("does not verify: {v}")),
        None => Ok((plan, module)),
    }
}

/// The library's and the hand-written plans with kernels that contract and the sizes they are mapped for.
fn cases() -> Vec<(String, Plan, Vec<u64>)> {
    let mut out = Vec::new();
    for (name, small) in [
        ("gemm", vec![136, 72, 200]),
        ("attention", vec![1, 1, 1, 72, 136, 64, 64]),
        ("attention_full", vec![1, 1, 1, 40, 200, 64, 128]),
        ("lstm_gates", vec![3, 20, 1, 64]),
    ] {
        out.push((format!("{name}.tile"), plan(name), small));
    }
    for (file, text) in einfall_kernels::SOURCES {
        for c in parse(text).unwrap().cascades {
            let Some(plan) = formed(c.clone()) else { continue };
            if !plan.kernels.iter().any(contracts) {
                continue;
            }
            // Extents under which the cascade's facts hold, the largest of a few draws.
            let mut state = 0x9e37_79b9_7f4a_7c15u64;
            let mut draw = |list: &[u64]| {
                state ^= state >> 12;
                state ^= state << 25;
                state ^= state >> 27;
                list[(state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % list.len()]
            };
            let mut rows = Vec::new();
            for (_, b) in plan.buffers.iter() {
                b.dims.iter().next_back().into_iter().for_each(|d| d.for_each_rank(&mut |r| rows.push(r)));
            }
            let found = (0..2000).filter_map(|_| {
                let free = c.ranks.iter().filter(|(_, r)| r.fixed.is_none());
                let sizes = free.map(|(id, r)| {
                    // Rows of arrays are multiples of 16 bytes, as tensor maps ask.
                    let list: &[u64] = if rows.contains(&id) { &[8, 64, 72, 136] } else { &[1, 2, 3, 72] };
                    (r.name.clone(), draw(list))
                });
                let sizes = sizes.collect();
                let b = bind(&c, &Given { sizes, ..Given::default() }).ok()?;
                let points: f64 = b.extents.iter().map(|n| *n as f64).product();
                (check_facts(&c, &b, &[]).is_ok() && points < 2e7).then_some((points as u64, b.extents))
            });
            let found = found.max().map(|x| x.1);
            out.push((format!("{file}/{}", c.name), plan, found.unwrap_or_else(|| panic!("{file}: no sizes"))));
        }
    }
    out
}

/// Plans written by hand with their reference mappings, at sizes of benchmarks.
const REFERENCES: [(&str, &str, &[u64]); 4] = [
    ("gemm", "gemm", &[4096, 4096, 4096]),
    ("attention", "attention", &[4, 16, 1, 4096, 4096, 128, 128]),
    ("attention_full", "attention_full", &[4, 16, 1, 4096, 4096, 128, 128]),
    ("lstm_gates", "lstm", &[1024, 16, 12, 128]),
];

#[test]
fn reference_mappings_are_admitted() {
    let sheet = DataSheet::h100();
    for (p, m, sizes) in REFERENCES {
        let (plan, mapping) = (plan(p), mapping(m));
        let why = why_not(&plan, &sheet, Some(sizes), &mapping);
        assert!(why.is_none(), "{m}: {}", why.unwrap());
        let cost = admitted(&plan, &plan.kernels[0], &sheet, Some(sizes), &mapping.kernels[0]).unwrap();
        // The model's choice is no worse by its own measure.
        let (best, own) = kernel_candidates(&plan, &plan.kernels[0], &sheet, Some(sizes), 1).unwrap().remove(0);
        println!("{m}: {:.1} us, {} binds; chosen {:.1} us", cost.seconds * 1e6, cost.binding, own.seconds * 1e6);
        assert!(own.seconds <= cost.seconds * 1.001, "{m}: {cost:?}\n{own:?}\n{best:?}");
    }
}

#[test]
fn choices_and_candidates_lower() {
    let sheet = DataSheet::h100();
    for (p, _, sizes) in REFERENCES {
        let plan = plan(p);
        for sizes in [Some(sizes), None] {
            let m = choose(&plan, &sheet, sizes);
            assert_eq!(choose(&plan, &sheet, sizes), m);
            lowered(&plan, &m).unwrap_or_else(|e| panic!("{p}: {e:?}\n{m}"));
            let several = candidates(&plan, &sheet, sizes, 4);
            assert!(several.len() == 4 && several.windows(2).all(|w| w[0].1.seconds <= w[1].1.seconds));
            for (c, _) in several {
                lowered(&plan, &c).unwrap_or_else(|e| panic!("{p}: {e:?}\n{c}"));
            }
        }
    }
}

#[test]
fn rejected_mappings_name_the_constraint() {
    let sheet = DataSheet::h100();
    for (p, m, from, to, says) in [
        ("gemm", "gemm", "stages 3", "stages 4", "shared memory"),
        ("gemm", "gemm", "regs 232", "regs 152", "registers of the consumers"),
        ("gemm", "gemm", "regs 40", "regs 56", "registers of the task"),
        ("gemm", "gemm", "m64n256k16", "m64n96k16", "atom columns of c@1"),
        ("gemm", "gemm", "axis k block 64", "axis k block 32", "swizzle of a"),
        ("gemm", "gemm", "block 128 cluster 2 units 2", "block 320 cluster 2 units 2", "atom rows of c@1"),
        ("gemm", "gemm", " multicast m", "", "multicast b"),
        ("gemm", "gemm", "op a role producer", "op a role consumer", "role of a"),
        ("attention", "attention", "axis m block 128 units 2", "axis m block 128 cluster 2 units 2", "multicast k"),
        ("attention", "attention", "op w slot 3", "op w slot 0", "schedule"),
        ("attention", "attention", "axis n block 128", "axis n block 120", "block n"),
    ] {
        let source = text(&format!("mappings/{m}.mapping"));
        assert!(source.contains(from), "{from}");
        let changed = einfall_ir::mapping::parse::parse(&source.replace(from, to)).unwrap();
        let why = why_not(&plan(p), &sheet, None, &changed).unwrap_or_else(|| panic!("{from} → {to} is admitted"));
        assert!(why.constraint.starts_with(says), "{from} → {to}: {why}");
    }
    let why = why_not(&plan("gemm"), &DataSheet::cpu(), None, &mapping("gemm")).unwrap();
    assert_eq!(why.constraint, "device");
    // Another family's instructions, copies and roles.
    let why = why_not(&plan("gemm"), &DataSheet::a100(), None, &mapping("gemm")).unwrap();
    assert_eq!(why.constraint, "roles", "{why}");
}

/// Every kernel of the library that contracts and has a structure: its choice and mappings drawn at random lower,
/// verify, and (every eighth) give what the plan means under an adversarial schedule. `EINFALL_TEST_DRAWN` says how many
/// are drawn per kernel.
#[test]
fn admitted_mappings_compute_their_plans() {
    drawn_mappings_compute("h100");
}

/// As above, by the instructions and copies of compute capability 8.0.
#[test]
fn admitted_mappings_compute_their_plans_on_ampere() {
    drawn_mappings_compute("a100");
}

fn drawn_mappings_compute(device: &str) {
    let drawn_per_kernel = std::env::var("EINFALL_TEST_DRAWN").ok().and_then(|n| n.parse().ok()).unwrap_or(8);
    let sheet = DataSheet::named(device).unwrap();
    let (mut report, mut wrong) = (String::new(), Vec::new());
    let only = std::env::var("EINFALL_TEST_CASE").unwrap_or_default();
    for (name, plan, ranks) in cases().into_iter().filter(|c| c.0.contains(&only)) {
        let chosen = choose(&plan, &sheet, Some(&ranks));
        for kernel in plan.kernels.iter().filter(|k| contracts(k)) {
            let n = match count(&plan, kernel, &sheet, Some(&ranks), 1000) {
                Ok(n) => n,
                Err(e) => {
                    writeln!(report, "{name} {}: outside the model: {}: {}", kernel.name, e.constraint, e.message)
                        .unwrap();
                    continue;
                }
            };
            let drawn = sample(&plan, kernel, &sheet, Some(&ranks), 1, drawn_per_kernel).unwrap();
            assert_eq!(drawn.len(), drawn_per_kernel, "{name} {}", kernel.name);
            writeln!(report, "{name} {}: {n} admitted (counting stops at 1000), {} drawn", kernel.name, drawn.len())
                .unwrap();
            assert!(n >= 500, "{name}: {n}");
            let others = drawn.into_iter().map(|k| {
                let mut m = chosen.clone();
                m.kernels.retain(|x| x.kernel != k.kernel);
                m.kernels.push(k);
                m
            });
            for (i, m) in std::iter::once(chosen.clone()).chain(others).enumerate() {
                let schedule = Schedule::ALL[i % Schedule::ALL.len()];
                // All lower and verify; every eighth is evaluated, as that takes its time.
                let done = lowered(&plan, &m).and_then(|module| match i % 8 {
                    0 => agrees(&plan, &module, &ranks, schedule),
                    _ => Ok(()),
                });
                if let Err(e) = done {
                    println!("{name}: {}", e.lines().next().unwrap_or_default());
                    wrong.push(format!("{name} at {ranks:?}: {e}\n{m}"));
                }
            }
        }
    }
    println!("{report}");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn what_cannot_fit_is_named_with_the_smallest_change() {
    let file = format!("{}/../kernels/attention.ein", env!("CARGO_MANIFEST_DIR"));
    let cascade = parse(&std::fs::read_to_string(file).unwrap()).unwrap().cascades.remove(0);
    let plan = formed(cascade).unwrap();
    let sizes = |width: u64| {
        let wide = |(_, r): (_, &einfall_ir::cascade::Rank)| if "EF".contains(&r.name) { width } else { 512 };
        plan.ranks.iter().map(wide).collect::<Vec<u64>>()
    };
    let sheet = DataSheet::h100();
    assert_eq!(obstacle(&plan, &sheet, Some(&sizes(256))), None);
    let why = obstacle(&plan, &sheet, Some(&sizes(1024))).unwrap();
    assert_eq!(why.constraints, ["registers of the consumers"]);
    assert!(why.message.contains("registers of the consumers cannot hold"), "{why}");
    assert_eq!(why.change.unwrap(), "it fits with `f` (now 1024) and `e` (now 1024) of at most 256");
}

/// The plan that a mapping is for, from the library or written by hand, with sizes of benchmarks: inner axes as long as
/// the mapping's blocks.
fn mapped_plans(m: &Mapping) -> Vec<(Plan, Vec<u64>)> {
    let library = einfall_kernels::SOURCES.iter().flat_map(|(_, text)| parse(text).unwrap().cascades);
    let formed = library.filter(|c| c.name == m.plan).filter_map(formed);
    let hand = ["gemm", "attention", "attention_full", "lstm", "lstm_gates", "decode"].map(plan);
    let all = formed.chain(hand).filter(|p| p.name == m.plan);
    let has = |p: &Plan| {
        m.kernels.iter().all(|k| k.kernel.ends_with("_merge") || p.kernels.iter().any(|x| x.name == k.kernel))
    };
    all.filter(has)
        .map(|p| {
            let decodes = m.plan.contains("gqa") || m.plan == "decode";
            let sizes = p.ranks.iter().map(|(id, r)| {
                let whole = p.kernels.iter().zip(&m.kernels).find_map(|(k, line)| {
                    let inner = k.axes.iter().find(|(_, a)| {
                        a.kind == tile::AxisKind::Inner && a.extent == einfall_ir::cascade::Size::Rank(id)
                    });
                    line.axis(&inner?.1.name).map(|l| l.block)
                });
                let usual = match r.name.as_str() {
                    "B" if decodes => 1,
                    "B" if m.plan.starts_with("lstm") => 16,
                    "B" => 4,
                    "H" if m.plan.starts_with("lstm") => 12,
                    "G" | "H" => 8,
                    "R" if decodes => 4,
                    "R" => 1,
                    "M" if decodes => 1,
                    "T" => 1024,
                    "N" if decodes => 131_072,
                    _ => 4096,
                };
                r.fixed.or(whole).unwrap_or(usual)
            });
            let sizes = sizes.collect();
            (p, sizes)
        })
        .collect()
}

/// Reference mappings that the model does not admit, the constraint that rejects each, and why it stands.
const REJECTED: [(&str, &str, &str); 1] = [(
    "attention_64_causal.mapping",
    "registers of the consumers",
    "138 registers of fragments and 22 of the assembler's fit 160 here; of mappings drawn some need the 32 that are reckoned",
)];

/// Every file of `tests/mappings` is among what the model admits on its device, at sizes of benchmarks, or is rejected by
/// the constraint that is listed.
#[test]
fn every_reference_mapping_is_admitted() {
    let folder = format!("{}/../tests/mappings", env!("CARGO_MANIFEST_DIR"));
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for name in names {
        let m = mapping(name.strip_suffix(".mapping").unwrap());
        let sheet = DataSheet::named(&m.target).unwrap();
        let plans = mapped_plans(&m);
        assert!(!plans.is_empty(), "{name} is for no plan");
        let why: Vec<_> = plans.iter().map(|(p, sizes)| why_not(p, &sheet, Some(sizes), &m)).collect();
        // Plans of one name may differ in their kernels' operations: the mapping is for one that has them.
        let why = why.into_iter().min_by_key(|w| w.is_some()).flatten();
        let listed = REJECTED.iter().find(|r| r.0 == name);
        if why.as_ref().map(|w| w.constraint.as_str()) != listed.map(|r| r.1) {
            wrong.push(format!("{name}: {why:?}, listed {listed:?}"));
        }
        seen += 1;
    }
    assert!(seen >= 31);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Kernels whose registers admit less than the others: the fewest columns of an instruction that none of their mappings
/// has, most units of a role without a producer, and what takes the registers.
const NARROW: [(&str, i64, i64, &str); 4] = [
    ("lstm_gates.tile lstm", 64, 3, "four gates' matrices and accumulators"),
    ("slstm/slstm slstm_0", 64, 4, "four gates' matrices and accumulators"),
    ("lstm_layer/lstm_layer lstm_layer_1", 64, 4, "four gates' matrices and accumulators"),
    (
        "varlen_attention/varlen_attention varlen_attention_2",
        56,
        1,
        "masks and offsets of rows beside two accumulators",
    ),
];

/// What mappings of every kernel that contracts must be able to have on an H100: each instruction that its shapes and
/// registers allow, a role for copies with every number of units, one role without, and streams in one task or in
/// parts where their states can be joined.
#[test]
fn admitted_mappings_cover_instructions_roles_and_parts() {
    let sheet = DataSheet::h100();
    let (mut judged, mut wrong, mut report) = (0, Vec::new(), String::new());
    let (mut short, mut whole) = (0, 0);
    for (name, plan, ranks) in cases() {
        for kernel in plan.kernels.iter().filter(|k| contracts(k)) {
            let can = |what: &dyn Fn(&Space<'_, '_>) -> Option<Pred>| admits(&plan, kernel, &sheet, Some(&ranks), what);
            let Ok(any) = can(&|_| Some(Pred::Bool(true))) else { continue };
            let can = |what: &dyn Fn(&Space<'_, '_>) -> Option<Pred>| can(what).unwrap();
            assert!(any, "{name} {}", kernel.name);
            judged += 1;
            let mut miss = |what: String| wrong.push(format!("{name} {}: {what}", kernel.name));
            // Some contraction by an instruction of so many columns.
            let by =
                |s: &Space<'_, '_>, n: i64| Pred::Or(s.vars.atom.iter().map(|v| Expr::from(*v).equals(n)).collect());
            let absent: Vec<i64> = (8..=256).step_by(8).filter(|n| !can(&|s| Some(by(s, *n)))).collect();
            whole += usize::from(absent.is_empty());
            for n in &absent {
                // What is left out would fit if registers were free and every panel of a swizzle might begin anywhere.
                let relaxed = |s: &Space<'_, '_>| {
                    let names = ["registers of the", "panels of", "shared memory", "atom depth of"];
                    let of = |c: &einfall_autotune::csp::Constraint| !names.iter().any(|p| c.name.starts_with(p));
                    let list = s.model.constraints();
                    let mut model = s.model.restrict(&(0..list.len()).filter(|i| of(&list[*i])).collect::<Vec<_>>());
                    model.constrain("columns", by(s, *n));
                    Solver::new(&model).first().unwrap().is_some()
                };
                let fits = std::cell::Cell::new(false);
                can(&|s| {
                    fits.set(fits.get() || relaxed(s));
                    None
                });
                if !fits.get() {
                    miss(format!("no instruction of {n} columns"));
                }
            }
            let label = format!("{name} {}", kernel.name);
            let narrow = NARROW.iter().find(|x| x.0 == label);
            let first = absent.first().copied().unwrap_or(i64::MAX);
            if narrow.map_or(first <= 64, |x| first != x.1) {
                miss(format!("no instruction of {first} columns"));
            }
            let roles = |n: i64, producer: bool| {
                can(&|s| {
                    let fits = s.structure.producer == producer;
                    fits.then(|| s.vars.units.map_or(Pred::Bool(n == 1), |u| Expr::from(u).equals(n)))
                })
            };
            // A role that fetches for itself is one unit; without fetches in a stream units share the loads.
            let (apart, alone): (Vec<i64>, Vec<i64>) =
                ((1..=4).filter(|n| roles(*n, true)).collect(), (1..=4).filter(|n| roles(*n, false)).collect());
            let units = match narrow {
                Some(x) => alone == (1..=x.2).collect::<Vec<_>>(),
                None => alone == [1] || alone == [1, 2, 3, 4],
            };
            if apart != [1, 2, 3, 4] || !units {
                miss(format!("units {apart:?} beside a producer, {alone:?} without one"));
            }
            let parts = |cut: bool| {
                can(&|s| {
                    let one = s.vars.split.map_or(Pred::Bool(true), |x| Expr::from(x.parts).equals(1));
                    Some(if cut { one.negate() } else { one })
                })
            };
            let merges = can(&|s| Some(Pred::Bool(s.vars.split.is_some())));
            if !parts(false) || parts(true) != merges {
                miss("streams in one part, or in several where they merge".to_owned());
            }
            let rows = |n: i64| can(&|s| s.vars.rows.map(|r| Expr::from(r).equals(n)));
            if can(&|s| Some(Pred::Bool(s.vars.rows.is_some()))) {
                short += 1;
                if !rows(32) || !rows(64) {
                    miss("instructions of 32 and of 64 rows".to_owned());
                }
            }
            writeln!(
                report,
                "{name} {}: not {absent:?} columns; units {apart:?} and {alone:?}; parts {merges}",
                kernel.name
            )
            .unwrap();
        }
    }
    println!("{report}");
    // Kernels with one accumulator have every instruction; recurrences short ones.
    assert!(judged > 25 && short >= 4 && whole >= 8, "{judged}, {short}, {whole}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Plans and sizes of benchmarks.
fn benchmarks() -> Vec<(String, Plan, Vec<u64>)> {
    let sized: [(&str, &[(&str, u64)]); 7] = [
        ("matmul", &[("M", 4096), ("N", 4096), ("K", 4096)]),
        ("matmul", &[("M", 8192), ("N", 8192), ("K", 8192)]),
        ("attention", &[("B", 4), ("G", 16), ("R", 1), ("M", 4096), ("N", 4096), ("E", 128), ("F", 128)]),
        ("attention", &[("B", 4), ("G", 16), ("R", 1), ("M", 4096), ("N", 4096), ("E", 64), ("F", 64)]),
        ("attention_full", &[("B", 4), ("H", 16), ("M", 4096), ("N", 4096), ("E", 128), ("F", 128)]),
        ("attention_full", &[("B", 1), ("H", 16), ("M", 16384), ("N", 16384), ("E", 128), ("F", 128)]),
        ("lstm", &[("T", 1024), ("B", 16), ("H", 12), ("D", 64)]),
    ];
    let of = |(name, sizes): (&str, &[(&str, u64)])| {
        let cascade = parse(einfall_kernels::source(name).unwrap()).unwrap().cascades.remove(0);
        let plan = formed(cascade).unwrap();
        let extent = |r: &str| sizes.iter().find(|s| s.0 == r).unwrap_or_else(|| panic!("{name}: {r}")).1;
        let ranks = plan.ranks.iter().map(|(_, r)| extent(&r.name)).collect();
        (format!("{name} {sizes:?}"), plan, ranks)
    };
    sized.into_iter().map(of).collect()
}

/// The choice is the first candidate, however many are asked for: what a search for one leaves out is no better than what
/// it finds.
#[test]
fn the_choice_is_the_first_candidate() {
    let mut wrong = Vec::new();
    for sheet in ["h100", "h200", "a100"].map(|n| DataSheet::named(n).unwrap()) {
        for (name, plan, ranks) in benchmarks() {
            let chosen = choose(&plan, &sheet, Some(&ranks));
            for k in [1, 2, 6] {
                let found = candidates(&plan, &sheet, Some(&ranks), k).remove(0).0;
                if found != chosen {
                    let price = |m: &Mapping| price(&plan, &sheet, Some(&ranks), m).unwrap().unwrap();
                    let (own, other) = (price(&chosen), price(&found));
                    let us = (own.seconds * 1e6, other.seconds * 1e6);
                    wrong.push(format!("{name} on {}: {us:?} for {k}\n{chosen}\n{found}", sheet.name));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}
