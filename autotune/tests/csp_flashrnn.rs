//! FlashRNN's constraint systems, in the text FlashRNN 1.0.8 builds: counts, lexicographic optima, feasibility, times.
//!
//! The texts under `data/flashrnn` are written by `extract.py` there (Apache-2.0, NXAI GmbH); other sizes are made from
//! them by replacing the numbers that FlashRNN would write. Expected figures: ConstrINT and a plain enumerator.

use einfall_autotune::csp::{Direction, Explanation, Model, Solver, VarId, text};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Sizes of one system.
#[derive(Clone, Copy)]
struct Size {
    dim: i64,
    heads: i64,
    batch: i64,
    fp32: bool,
}

fn file(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/flashrnn").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The text without the attribution, which names the sizes.
fn body(text: &str) -> &str {
    text.split_once("\n\n").expect("attribution, then the system").1
}

/// The system of FlashRNN's LSTM on an H100 for other sizes.
fn system(size: Size) -> String {
    let base = if size.fp32 { "lstm_float32_768x1_b16_h100.csp" } else { "lstm_bfloat16_768x1_b16_h100.csp" };
    let multiple = if size.fp32 { 16 } else { 8 };
    let batch = (size.batch + multiple - 1) / multiple * multiple;
    let mut out = String::new();
    for line in body(&file(base)).lines() {
        let value = match line.split_once(" == ").map(|(name, _)| name) {
            Some("HEAD_DIM") if !line.contains("INTERNAL") => Some(size.dim),
            Some("NUM_HEADS" | "FLASHRNN_NUM_HEADS") => Some(size.heads),
            Some("BATCH_DIM") => Some(batch),
            Some("FLASHRNN_HIDDEN_DIM") => Some(size.dim * size.heads),
            _ => None,
        };
        match value {
            Some(v) => out += &format!("{} == {v};\n", line.split_once(" == ").expect("just split").0),
            None => out += &format!("{line}\n"),
        }
    }
    out
}

fn bf16(dim: i64, heads: i64) -> Size {
    Size { dim, heads, batch: 16, fp32: false }
}

fn model(size: Size) -> Model {
    text::parse(&system(size)).expect("FlashRNN's text is read")
}

/// The eleven tiling variables of one direction, in FlashRNN's order.
fn tiling(model: &Model, forward: bool) -> Vec<VarId> {
    let (way, gate, hidden) = if forward { ("FORWARD", "GATE", "HIDDEN") } else { ("BACKWARD", "HIDDEN", "GATE") };
    let names = [
        "WARP_TILING_DIM_BATCH".to_owned(),
        format!("WARP_TILING_DIM_{gate}"),
        "MULTIHEAD_TILING_COUNT".to_owned(),
        format!("RECURRENT_TILING_COUNT_{gate}"),
        format!("RECURRENT_TILING_COUNT_{hidden}"),
        "BLOCK_TILING_COUNT_BATCH".to_owned(),
        "WARP_LOOPING_COUNT_BATCH".to_owned(),
        format!("WARP_LOOPING_COUNT_{gate}"),
        format!("WARP_TILING_COUNT_{hidden}"),
        "WARP_TILING_COUNT_BATCH".to_owned(),
        format!("WARP_RECURRENT_CACHED_{hidden}"),
    ];
    names.iter().map(|n| model.find(&format!("FLASHRNN_{way}_{n}")).expect("a tiling variable")).collect()
}

fn order(model: &Model) -> Vec<(VarId, Direction)> {
    text::parse_order(&file("order.txt").trim().replace('\n', ","), model).expect("FlashRNN's order is read")
}

/// Runs `f` and checks the bar in release mode, where it holds.
fn within<T>(bar_ms: u64, what: &str, f: impl Fn() -> T) -> T {
    let once = || {
        let start = Instant::now();
        let out = f();
        (start.elapsed(), out)
    };
    // The best of three: other work on the machine only adds.
    let (mut best, out) = once();
    for _ in 0..2 {
        best = best.min(once().0);
    }
    println!("{what}: {best:?}");
    if !cfg!(debug_assertions) {
        assert!(best <= Duration::from_millis(bar_ms), "{what} took {best:?}, more than {bar_ms} ms");
    }
    out
}

#[test]
fn replaced_numbers_give_the_text_flashrnn_builds() {
    for (name, size) in [
        ("lstm_bfloat16_16x48_b16_h100.csp", bf16(16, 48)),
        ("lstm_bfloat16_64x12_b16_h100.csp", bf16(64, 12)),
        ("lstm_bfloat16_3072x1_b8_h100.csp", Size { batch: 8, ..bf16(3072, 1) }),
    ] {
        assert_eq!(system(size), body(&file(name)), "{name}");
    }
}

#[test]
fn counts_are_those_of_the_plain_enumerator() {
    for (dim, heads, forward, backward) in [(16, 48, 178, 109), (64, 12, 3177, 5724), (768, 1, 14787, 30027)] {
        let m = model(bf16(dim, heads));
        let solver = Solver::new(&m);
        for (is_forward, expected) in [(true, forward), (false, backward)] {
            let over = tiling(&m, is_forward);
            let what = format!("count {dim}x{heads} forward {is_forward}");
            let count = within(300, &what, || solver.count(&over).expect("counted"));
            assert_eq!(count, expected, "{what}");
        }
        // Every variable of the text is a function of the tiling, so the whole count is the product.
        assert_eq!(solver.count(&[]).expect("counted"), forward * backward);
    }
}

#[test]
fn enumeration_lists_each_assignment_once_and_in_time() {
    let m = model(bf16(768, 1));
    let over = tiling(&m, true);
    let solver = Solver::new(&m);
    let all = within(300, "enumerate 768x1 forward", || {
        let mut tuples: Vec<Vec<i64>> = Vec::new();
        let n = solver.for_each(&over, &mut |a| {
            tuples.push(over.iter().map(|v| a[v.idx()]).collect());
            std::ops::ControlFlow::Continue(())
        });
        (n.expect("enumerated"), tuples)
    });
    let (n, mut tuples) = all;
    assert_eq!((n, tuples.len()), (14787, 14787));
    tuples.sort();
    tuples.dedup();
    assert_eq!(tuples.len(), 14787);
}

#[test]
fn lexicographic_optimum_is_constrints() {
    let m = model(bf16(768, 1));
    let order = order(&m);
    let best = within(10, "lexicographic 768x1", || Solver::new(&m).lexicographic(&order).expect("solved"));
    let best = best.expect("feasible");
    let of = |forward| tiling(&m, forward).iter().map(|v| best[v.idx()]).collect::<Vec<_>>();
    assert_eq!(of(true), [16, 16, 1, 96, 1, 1, 1, 1, 4, 1, 12]);
    assert_eq!(of(false), [16, 16, 1, 48, 1, 1, 1, 1, 8, 1, 24]);
}

#[test]
fn feasibility_and_first_solutions_in_time() {
    let feasible = |size: Size| {
        let what = format!("first {}x{} fp32 {}", size.dim, size.heads, size.fp32);
        within(10, &what, || Solver::new(&model(size)).first().expect("decided")).is_some()
    };
    assert!(!feasible(Size { batch: 8, ..bf16(3072, 1) }));
    for (dim, expected) in [(16, true), (24, false), (33, false), (40, false), (64, true), (80, true), (768, true)] {
        assert_eq!(feasible(bf16(dim, 1)), expected, "D = {dim}");
    }
    for (fp32, largest) in [(false, 2688), (true, 1856)] {
        for dim in (64..=4096).step_by(64) {
            let size = Size { dim, heads: 1, batch: 16, fp32 };
            if feasible(size) {
                assert!(dim <= largest, "D = {dim} fp32 {fp32}");
            } else {
                assert_ne!(dim, largest);
            }
        }
    }
}

#[test]
fn infeasible_systems_are_explained_in_time() {
    for (dim, batch) in [(3072, 8), (24, 16), (33, 16), (40, 16)] {
        let m = model(Size { dim, heads: 1, batch, fp32: false });
        let explanation = within(1000, &format!("explain {dim}"), || Solver::new(&m).explain().expect("decided"));
        let Explanation::Conflict(conflict) = explanation else { panic!("D = {dim} is infeasible") };
        let names: Vec<&str> = conflict.constraints.iter().map(|i| m.constraints()[*i].name.as_str()).collect();
        println!("D = {dim}: minimal {} {names:?}", conflict.minimal);
        assert!(conflict.minimal, "D = {dim}: {names:?}");
        let only = m.restrict(&conflict.constraints);
        assert_eq!(Solver::new(&only).first(), Ok(None), "the conflict stands alone");
        for left_out in &conflict.constraints {
            let rest: Vec<usize> = conflict.constraints.iter().copied().filter(|c| c != left_out).collect();
            let found = Solver::new(&m.restrict(&rest)).first().expect("decided");
            assert!(found.is_some(), "D = {dim} without {left_out}");
        }
    }
}
