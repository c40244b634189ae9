//! The CPU mapping model against the lowering: the rule's mapping is a solution of its CSP, and what the model proposes
//! or draws lowers.

use einfall_autotune::model_cpu::{candidates, choose, choose_at, drawn, price, rule_at, why_not};
use einfall_codegen::backend::llvm::Isa;
use einfall_codegen::{pipeline, tables};
use einfall_ir::cascade::{Size, parse};
use einfall_ir::dtype::DType;
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;

/// Plans of the library that the CPU path takes.
fn plans() -> Vec<Plan> {
    let mut out = Vec::new();
    for (_, text) in einfall_kernels::SOURCES {
        for c in parse(text).expect("a library file").cascades {
            let program = pipeline::Program::Cascade(c);
            let context = pipeline::Context::default();
            let Ok(records) = pipeline::run(tables::TO_TILE, tables::FORMS, program, &context, None) else { continue };
            if let Some(pipeline::Program::Tile(plan)) = records.into_iter().last().map(|r| r.program) {
                let rule = choose(&plan, &DataSheet::cpu());
                if lowers(&plan, &rule).is_ok() {
                    out.push(plan);
                }
            }
        }
    }
    out
}

fn lowers(plan: &Plan, mapping: &Mapping) -> Result<(), String> {
    let context =
        pipeline::Context { mapping: Some(mapping.clone()), isa: Some(Isa::AVX2), ..pipeline::Context::default() };
    let mut program = pipeline::Program::Tile(plan.clone());
    for pass in tables::CPU {
        program = (pass.step)(program, &context).map_err(|d| format!("{}: {d:?}", pass.name))?;
    }
    Ok(())
}

#[test]
fn the_rule_is_admitted_and_candidates_lower() {
    let sheet = DataSheet::cpu();
    let all = plans();
    assert!(all.len() > 20, "{} plans", all.len());
    for plan in &all {
        let sizes: Vec<u64> = plan.ranks.iter().map(|(_, r)| r.fixed.unwrap_or(256)).collect();
        let rule = choose(plan, &sheet);
        let cost = price(plan, &sheet, Some(&sizes), &rule).unwrap_or_else(|e| panic!("{}: {e}", plan.name));
        let seconds = cost.seconds;
        assert!(seconds.is_finite() && 0.0 <= cost.floor && cost.floor <= seconds, "{}: {cost:?}", plan.name);
        assert!(cost.terms.iter().any(|t| t.0 == cost.binding) && cost.tasks >= 1.0, "{}: {cost:?}", plan.name);
        let found = candidates(plan, &sheet, Some(&sizes), 4);
        assert!(found.iter().any(|f| f.0 == rule), "{}: the rule is no candidate", plan.name);
        assert!(found.windows(2).all(|w| w[0].1.seconds <= w[1].1.seconds), "{}: cheapest first", plan.name);
        assert_eq!(found, candidates(plan, &sheet, Some(&sizes), 4));
        for m in found.iter().map(|f| &f.0).chain(&drawn(plan, &sheet, Some(&sizes), 3, 4)) {
            lowers(plan, m).unwrap_or_else(|e| panic!("{}: {e}\n{m}", plan.name));
            assert_eq!(why_not(plan, &sheet, Some(&sizes), m), None, "{}\n{m}", plan.name);
        }
    }
}

/// A processor of so many cores.
fn cores(n: u64) -> DataSheet {
    with_cores("x86-64-v3", n)
}

/// A sheet's processor with so many cores.
fn with_cores(name: &str, n: u64) -> DataSheet {
    let mut sheet = DataSheet::named(name).expect("a built-in sheet");
    for level in sheet.levels.iter_mut().filter(|l| l.name != "dram") {
        level.instances = n;
    }
    sheet.peak.iter_mut().for_each(|(_, rate)| *rate *= n as f64);
    sheet
}

/// Products of tiles are chosen as all others: where the rule leaves one large task a core and the model prices smaller
/// ones plainly lower.
#[test]
fn products_of_tiles_are_chosen_by_the_model() {
    let (matmul, sheet) = (plan("matmul"), with_cores("x86-64-v4-amx", 16));
    let sizes = [512, 512, 512];
    let seconds = |m: &Mapping| price(&matmul, &sheet, Some(&sizes), m).expect("admitted").seconds;
    let (rule, chosen) = (rule_at(&matmul, &sheet, &sizes), choose_at(&matmul, &sheet, &sizes));
    let large = with_cores("x86-64-v4-amx", 2);
    // Also where the rule's tasks are as many as the cores.
    let (few, own) = (rule_at(&matmul, &large, &sizes), choose_at(&matmul, &large, &sizes));
    assert!(seconds(&chosen) < seconds(&rule), "{chosen}");
    let at_two = |m: &Mapping| price(&matmul, &large, Some(&sizes), m).expect("admitted");
    let best = candidates(&matmul, &large, Some(&sizes), 1).swap_remove(0);
    assert!(at_two(&few).tasks >= 2.0);
    assert_eq!(own, if best.1.seconds < 0.9 * at_two(&few).seconds { best.0 } else { few });
}

/// Products of tiles read their rows again for every panel of columns: rows that the second-level cache does not hold come from
/// the last one (measured on 16 cores of a Xeon: 6.5 ms in blocks of 512 × 512 × 2048, 3.3 in the rule's).
#[test]
fn rows_beyond_the_second_cache_cost() {
    let mut sheet = with_cores("x86-64-v4-amx", 16);
    for level in &mut sheet.levels {
        (level.bandwidth, level.instances, level.bytes) = match level.name.as_str() {
            "dram" => (250e9, 1, level.bytes),
            "l3" => (400e9, 1, 300 << 20),
            "l2" => (120e9, 16, level.bytes),
            "l1" => (250e9, 16, level.bytes),
            _ => (level.bandwidth, 16, level.bytes),
        };
    }
    let (matmul, sizes) = (plan("matmul"), [2048; 3]);
    let seconds = |m: &Mapping| price(&matmul, &sheet, Some(&sizes), m).expect("admitted").seconds;
    let of =
        |n: u64, k: u64| seconds(&mapping(&matmul, &format!("axis m block {n}\naxis n block {n}\naxis k block {k}")));
    assert!(of(512, 2048) > 1.5 * of(256, 384), "{} {}", of(512, 2048), of(256, 384));
    let chosen = choose_at(&matmul, &sheet, &sizes);
    assert!(price(&matmul, &sheet, Some(&sizes), &chosen).expect("admitted").tasks >= 64.0, "{chosen}");
}

/// Tasks that are as many as the cores, and even, are not priced as if every core were as fast as the others.
#[test]
fn some_core_is_slower() {
    let plan = plan("matmul");
    let uneven = |n: u64, m: u64| {
        let own = mapping(&plan, &format!("axis m block {m}\naxis n block 512\naxis k block 256"));
        let cost = price(&plan, &cores(n), Some(&[2016, 512, 512]), &own).expect("admitted");
        cost.terms.iter().find(|t| t.0 == "uneven tasks").expect("a term").1 / cost.seconds
    };
    assert_eq!(uneven(1, 126), 0.0);
    assert!(uneven(16, 126) > uneven(2, 126) && uneven(2, 126) > 0.0);
    assert!(uneven(2, 1008) > uneven(2, 126), "smaller tasks leave less to wait for");
}

/// Rows that are open at a time cost where the sheet says how many its prefetchers follow, from that number on.
#[test]
fn open_pages_cost_where_they_are_bounded() {
    let plan = plan("matmul");
    let seconds = |followed_pages: Option<u64>, k: u64| {
        let sheet = DataSheet { followed_pages, ..cores(1) };
        let own = mapping(&plan, &format!("axis m block 1\naxis n block 1024\naxis k block {k}"));
        price(&plan, &sheet, Some(&[1, 4096, 4096]), &own).expect("admitted").seconds
    };
    assert!(seconds(Some(16), 256) > seconds(None, 256));
    assert_eq!(seconds(Some(16), 16), seconds(None, 16));
}

/// Neighbours that the next step of a stream reads are one run with those of this one.
#[test]
fn runs_go_on_over_a_stream() {
    let plan = plan("matmul");
    let memory = |k: u64| {
        let own = mapping(&plan, &format!("axis m block 126\naxis n block 16\naxis k block {k}"));
        let cost = price(&plan, &cores(1), Some(&[8064, 16, 8192]), &own).expect("admitted");
        cost.terms.iter().find(|t| t.0 == "memory").expect("a term").1
    };
    // Rows of A in steps of 64 bytes, and of 4 KB.
    assert!(memory(16) < 1.5 * memory(1024), "{} {}", memory(16), memory(1024));
}

/// Tiles that are made and read in one nest stay in registers and take no room from those that are kept in a cache: moments of
/// 64 rows by 16 parts are 12 KB, with what is made of them in a step as much again.
#[test]
fn tiles_in_registers_fill_no_cache() {
    let plan = plan("welford");
    let memory = |m: u64| {
        let own = mapping(&plan, &format!("axis m block {m}\naxis k block 1"));
        let cost = price(&plan, &cores(1), Some(&[512, 1 << 14]), &own).expect("admitted");
        cost.terms.iter().find(|t| t.0 == "memory").expect("a term").1
    };
    assert!(memory(64) < 1.1 * memory(16), "{} {}", memory(64), memory(16));
    assert!(memory(256) > 1.1 * memory(16), "{} {}", memory(256), memory(16));
}

/// What is chosen at known sizes is admitted, lowers and is not priced above the rule, however many cores there are.
#[test]
fn choices_at_known_sizes_lower() {
    for plan in &plans() {
        for (n, size) in [(1, 256), (16, 40), (16, 1), (2, 2048)] {
            let sheet = cores(n);
            let sizes: Vec<u64> = plan.ranks.iter().map(|(_, r)| r.fixed.unwrap_or(size)).collect();
            let chosen = choose_at(plan, &sheet, &sizes);
            lowers(plan, &chosen).unwrap_or_else(|e| panic!("{}: {e}\n{chosen}", plan.name));
            assert_eq!(why_not(plan, &sheet, Some(&sizes), &chosen), None, "{}\n{chosen}", plan.name);
        }
    }
}

/// Rows are those that there are, and of the axes around where there are few.
#[test]
fn rows_are_as_many_as_there_are() {
    let block = |name: &str, sizes: &[u64], kernel: usize, axis: &str| {
        let chosen = rule_at(&plan(name), &cores(64), sizes);
        chosen.kernels[kernel].axis(axis).map(|a| a.block)
    };
    assert_eq!(block("matmul", &[2000, 2000, 2000], 0, "m"), Some(126));
    assert_eq!(block("matmul", &[5, 4096, 4096], 0, "m"), Some(5));
    // Larger blocks where enough tasks are left: 8 a core.
    let two = rule_at(&plan("matmul"), &cores(2), &[2048, 2048, 2048]);
    assert_eq!(["m", "n"].map(|a| two.kernels[0].axis(a).map(|l| l.block)), [Some(504), Some(512)]);
    let few = rule_at(&plan("matmul"), &cores(1), &[5, 8192, 2048]);
    assert_eq!(few.kernels[0].axis("m").map(|l| l.block), Some(5));
    let eight = rule_at(&plan("matmul"), &cores(8), &[2048, 2048, 2048]);
    assert_eq!(["m", "n"].map(|a| eight.kernels[0].axis(a).map(|l| l.block)), [Some(252), Some(256)]);
    // T, B, I, D: rows of W·x are batches and steps.
    assert_eq!(block("lstm_layer", &[512, 16, 512, 512], 0, "b"), Some(16));
    assert_eq!(block("lstm_layer", &[512, 16, 512, 512], 0, "t"), Some(7));
    assert_eq!(block("lstm_layer", &[3, 16, 512, 512], 0, "t"), Some(3));
}

/// Steps of a recurrence are launched where its tasks are fewer than cores and a step is work for several.
#[test]
fn steps_are_shared_by_idle_cores() {
    let layer = plan("lstm_layer");
    let launched = |n: u64, sizes: &[u64]| {
        let chosen = choose_at(&layer, &cores(n), sizes);
        let k = &chosen.kernels[1];
        let cut = k.axis("t").is_some_and(|t| t.launches).then(|| k.axis("d").map_or(0, |d| d.block));
        (cut, k.tiles.len())
    };
    assert_eq!(launched(16, &[512, 16, 512, 512]), (Some(32), 1));
    assert_eq!(launched(4, &[512, 16, 512, 512]), (Some(128), 1));
    // Two rows are a reduction, which reads R as it lies.
    assert_eq!(launched(16, &[512, 2, 512, 1024]), (Some(64), 0));
    // One core; as many batches as cores; little work.
    assert_eq!(launched(1, &[512, 16, 512, 512]), (None, 0));
    assert_eq!(launched(2, &[512, 500, 512, 512]), (None, 0));
    assert_eq!(launched(16, &[512, 16, 512, 64]), (None, 0));
    // What is launched is priced as shared, and measured first.
    let sizes = [512, 16, 512, 512];
    let price = |n: u64, m: &Mapping| price(&layer, &cores(n), Some(&sizes), m).expect("admitted").seconds;
    let shared = choose_at(&layer, &cores(16), &sizes);
    let mut alone = shared.clone();
    alone.kernels[1] = rule_at(&layer, &cores(16), &sizes).kernels[1].clone();
    assert!(price(16, &shared) < 0.5 * price(16, &alone));
    assert!(price(2, &shared) > 0.9 * price(1, &alone) / 2.0, "steps that are launches are not free");
    let first = &candidates(&layer, &cores(16), Some(&sizes), 4)[0].0;
    assert_eq!(first.kernels[1], shared.kernels[1]);
}

/// Neighbours go on over axes that lie side by side: both halves of a row are a run twice as long as each.
#[test]
fn runs_go_on_over_axes() {
    let rotary = plan("rotary");
    let memory = |c: u64, h: u64| {
        let lines = format!("axis b block 1\naxis t block 16\naxis h block {h}\naxis c block {c}\naxis d block 64");
        let cost = price(&rotary, &cores(1), Some(&[8, 4096, 8, 32]), &mapping(&rotary, &lines)).expect("admitted");
        cost.terms.iter().find(|t| t.0 == "memory").expect("a term").1
    };
    assert!(memory(2, 8) < 0.9 * memory(2, 4) && memory(2, 4) < 0.9 * memory(1, 4));
    // Every second half is no run, however many heads there are.
    assert!(memory(1, 8) > 0.95 * memory(1, 4));
}

fn plan(name: &str) -> Plan {
    plans().into_iter().find(|p| p.name == name).unwrap_or_else(|| panic!("no plan {name}"))
}

/// A mapping of one kernel with these lines.
fn mapping(plan: &Plan, lines: &str) -> Mapping {
    let text =
        format!("mapping {} on cpu {{\n    kernel {} {{\n{lines}\n    }}\n}}\n", plan.name, plan.kernels[0].name);
    einfall_ir::mapping::parse::parse(&text).unwrap_or_else(|d| panic!("{}\n{text}", d.message))
}

#[test]
fn rejected_mappings_name_the_constraint() {
    let sheet = DataSheet::cpu();
    let (matmul, lstm) = (plan("matmul"), plan("lstm"));
    for (plan, lines, constraint, says) in [
        (&matmul, "axis m block 126\naxis n block 256\naxis k block 256", "", ""),
        // Blocks that are not searched are admitted.
        (&matmul, "axis m block 100\naxis n block 50\naxis k block 77", "", ""),
        (&matmul, "axis m block 126 cluster 2", "axis m", "leave this out"),
        (&matmul, "axis m block 126 units 2", "axis m", "leave this out"),
        (
            &matmul,
            "axis m block 16384\naxis n block 16384\naxis k block 64",
            "elements of",
            "block m = 16384, block n = 16384",
        ),
        (&matmul, "axis m block 4096\naxis n block 4096\naxis k block 16384", "elements of", "block k = 16384"),
        // An axis that is left out keeps its block.
        (&matmul, "axis m block 126", "", ""),
        (&matmul, "axis m block 126\nwork persistent", "work", "leave this out"),
        (&matmul, "axis m block 126\ntile A in shared stages 2", "tiles", "leave this out"),
        (&matmul, "axis m block 126\nrole main: 2 warpgroup", "roles", "leave this out"),
        (&lstm, "axis t block 4", "block t", "4 is not among 1"),
        // What the cost model does not price is admitted where it can be lowered.
        (&matmul, "axis m block 126\ntile B in packed", "", ""),
        (&lstm, "axis t block 1 launches\naxis d block 32", "", ""),
        (&lstm, "axis d block 32", "block d", "leave this out"),
        (&lstm, "axis t block 1 launches\naxis p block 32", "launches of t", "is carried and the same along p"),
    ] {
        let sizes: Vec<u64> = plan.ranks.iter().map(|(_, r)| r.fixed.unwrap_or(256)).collect();
        let why = why_not(plan, &sheet, Some(&sizes), &mapping(plan, lines));
        match (why, constraint) {
            (None, "") => {}
            (Some(why), _) => {
                assert!(!constraint.is_empty() && why.constraint.starts_with(constraint), "{lines}: {why}");
                assert!(why.to_string().contains(says), "{lines}: {why}");
            }
            (None, _) => panic!("{lines} is admitted"),
        }
    }
}

#[test]
fn draws_differ_and_end_where_all_are_drawn() {
    let sheet = DataSheet::cpu();
    let plan = plan("matmul");
    let few = drawn(&plan, &sheet, Some(&[8, 16, 16]), 5, 10_000);
    let all = drawn(&plan, &sheet, Some(&[4096, 4096, 4096]), 5, 200);
    assert_eq!(all.len(), 200);
    for list in [&few, &all] {
        assert!(list.iter().enumerate().all(|(i, m)| !list[..i].contains(m)));
    }
    // All that there are, whatever the seed.
    let again = drawn(&plan, &sheet, Some(&[8, 16, 16]), 6, 10_000);
    assert!(few.len() < 100 && few.len() == again.len() && few.iter().all(|m| again.contains(m)));
    // The same blocks at sizes that admit the same.
    assert_eq!(all, drawn(&plan, &sheet, Some(&[5000, 6000, 7000]), 5, 200));
}

/// Work that cannot be cheaper: twice the rows never take less, and partial register tiles cost whole ones.
#[test]
fn costs_grow_with_work() {
    let sheet = DataSheet::cpu();
    let plan = plan("matmul");
    let m = mapping(&plan, "axis m block 126\naxis n block 256\naxis k block 256");
    let at = |sizes: &[u64]| price(&plan, &sheet, Some(sizes), &m).unwrap();
    for n in [1, 13, 64, 300, 1000] {
        let (small, large) = (at(&[n, 512, 512]), at(&[2 * n, 512, 512]));
        assert!(small.seconds <= large.seconds * 1.001, "{n}: {small:?}\n{large:?}");
        assert!(small.floor <= large.floor, "{n}: {small:?}\n{large:?}");
        // Two operations a multiply-add at the sheet's peak.
        let ideal = 2.0 * (n * 512 * 512) as f64 / sheet.peak_of(DType::F32).unwrap();
        assert!(small.floor >= 0.5 * ideal, "{n}: {small:?}");
    }
    // A partial register tile costs a whole one.
    assert_eq!(at(&[13, 512, 512]).floor.to_bits(), at(&[14, 512, 512]).floor.to_bits());
}

/// Pairs of bf16 halve the multiply-adds of a product of bf16, and nothing of one that must be exact or is a reduction.
#[test]
fn pairs_halve_products_of_bf16() {
    let formed = |text: &str| {
        let program = pipeline::Program::Cascade(parse(text).unwrap().cascades.remove(0));
        let records = pipeline::run(tables::TO_TILE, tables::FORMS, program, &pipeline::Context::default(), None);
        match records.unwrap_or_else(|e| panic!("{e:?}")).into_iter().last().map(|r| r.program) {
            Some(pipeline::Program::Tile(plan)) => plan,
            _ => panic!("no plan of {text}"),
        }
    };
    let text = |head: &str, a: &str| {
        format!(
            "{head}cascade c[M, N, K](A: {a}[M,K], B: bf16[K,N]) -> (Y: f32[M,N]) {{ Y[m,n] = sum(k) A[m,k] * B[k,n] }}"
        )
    };
    let [plain, pairs] = ["x86-64-v4", "x86-64-v4-bf16"].map(|n| DataSheet::named(n).expect("a built-in sheet"));
    let plain = DataSheet { followed_pages: pairs.followed_pages, ..plain };
    for (head, a, rows, halved) in
        [("", "bf16", 126, true), ("", "f32", 126, true), ("", "bf16", 2, false), ("@exact ", "f32", 126, false)]
    {
        let plan = formed(&text(head, a));
        let m = mapping(&plan, &format!("axis m block {rows}\naxis n block 256\naxis k block 256"));
        let [x, y] = [&plain, &pairs].map(|sheet| price(&plan, sheet, Some(&[rows, 2048, 2048]), &m).unwrap());
        let least = if halved { 0.7 * x.seconds } else { x.seconds };
        assert!(y.seconds <= least && (halved || y.seconds >= least), "{head}{a} {rows}: {x:?}\n{y:?}");
        assert!(y.floor <= y.seconds && (!halved || y.floor < 0.6 * x.floor), "{head}{a} {rows}: {x:?}\n{y:?}");
        for (mapping, written) in [(choose_at(&plan, &pairs, &[rows, 2048, 2048]), false), (m, true)] {
            let context =
                pipeline::Context { mapping: Some(mapping), isa: Some(Isa::DOTS), ..pipeline::Context::default() };
            let lowered = tables::CPU
                .iter()
                .try_fold(pipeline::Program::Tile(plan.clone()), |p, pass| (pass.step)(p, &context))
                .unwrap_or_else(|d| panic!("{d:?}"));
            let pipeline::Program::Kernel(module) = lowered else { panic!("no kernels") };
            let printed = einfall_ir::kernel::print::print(&module);
            assert!(!written || printed.contains("atom dot16.") == halved, "{head}{a} {rows}\n{printed}");
        }
    }
}

/// Rows that share an operand by runs have blocks: tiles of one row's operand do not count for every row, and blocks are
/// the cheaper the fewer the values of the rows' index are.
#[test]
fn rows_that_share_operands_have_blocks() {
    let sheet = DataSheet::cpu();
    for name in ["moe_up", "moe_down", "moe_mlp"] {
        let plan = plan(name);
        let rule = choose(&plan, &sheet);
        let mut contractions = 0;
        for (k, m) in plan.kernels.iter().zip(&rule.kernels) {
            k.for_each_op(&mut |op, _| {
                let Some(runs) = einfall_ir::analysis::runs::runs(&plan, k, op) else { return };
                contractions += 1;
                let block = m.axis(&k.axes[runs.axis].name).unwrap().block;
                assert!(block > 16, "{name}: {block} rows");
            });
        }
        assert_eq!(contractions, if name == "moe_mlp" { 3 } else { 1 }, "{plan}");
    }
    // T, N, X, D, F.
    let plan = plan("moe_up");
    let at = |rows: u64, experts: u64| {
        let mut m = choose(&plan, &sheet);
        for a in m.kernels[1].axes.iter_mut().filter(|a| a.axis == "n") {
            a.block = rows;
        }
        price(&plan, &sheet, Some(&[4096, 4096, experts, 1024, 1024]), &m).unwrap_or_else(|e| panic!("{e}")).seconds
    };
    assert!(at(126, 8) < 0.5 * at(1, 8), "{} {}", at(126, 8), at(1, 8));
    assert!(at(126, 8) < at(126, 256), "{} {}", at(126, 8), at(126, 256));
    let large = "axis n block 256\naxis f block 1024\naxis d block 1024";
    let large = mapping(&plan, large).to_string().replace("moe_up_0", "moe_up_1");
    let large = einfall_ir::mapping::parse::parse(&large).unwrap();
    assert_eq!(why_not(&plan, &sheet, Some(&[4096, 4096, 8, 1024, 1024]), &large), None);
}

/// Code for an extent that is fixed is made for no more than that, whatever the block.
#[test]
fn fixed_extents_bound_what_code_is_made_for() {
    let sheet = DataSheet::cpu();
    let mut plan = plan("matmul");
    let m = plan.kernels[0].axes.iter().find(|(_, a)| a.name == "m").unwrap().0;
    plan.kernels[0].axes[m].extent = Size::Const(5);
    let at = |block: u64| {
        let lines = format!("axis m block {block}\naxis n block 256\naxis k block 256");
        let cost = price(&plan, &sheet, Some(&[5, 512, 512]), &mapping(&plan, &lines)).unwrap();
        (cost.floor.to_bits(), cost.seconds.to_bits())
    };
    assert_eq!(at(126), at(5));
}
