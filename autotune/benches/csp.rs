//! Times of the solver's queries on FlashRNN's constraint systems; `csp_baseline.toml` beside this file holds the
//! stored results.
//!
//! Run with `cargo bench -p einfall-autotune --bench csp`.

use criterion::{Criterion, criterion_group, criterion_main};
use einfall_autotune::csp::{Expr, Solver, VarId, text};
use std::path::PathBuf;

fn file(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/flashrnn").join(name);
    std::fs::read_to_string(path).expect("test data")
}

fn queries(c: &mut Criterion) {
    let source = file("lstm_bfloat16_768x1_b16_h100.csp");
    let infeasible = file("lstm_bfloat16_3072x1_b8_h100.csp");
    let model = text::parse(&source).expect("read");
    let refuted = text::parse(&infeasible).expect("read");
    let order = text::parse_order(&file("order.txt").trim().replace('\n', ","), &model).expect("read");
    let forward: Vec<VarId> =
        order.iter().map(|(v, _)| *v).filter(|v| model.name(*v).starts_with("FLASHRNN_FORWARD")).collect();
    let blocks = Expr::from(model.find("FLASHRNN_FORWARD_NUM_BLOCKS").expect("a variable"));
    let memory = Expr::from(model.find("FORWARD_STATE_SHARED_MEMORY").expect("a variable"));
    let cost = memory - Expr::from(1000) * blocks;

    let mut group = c.benchmark_group("csp");
    group.sample_size(20);
    group.bench_function("parse", |b| b.iter(|| text::parse(&source)));
    group.bench_function("first", |b| b.iter(|| Solver::new(&model).first()));
    group.bench_function("infeasible", |b| b.iter(|| Solver::new(&refuted).first()));
    group.bench_function("lexicographic", |b| b.iter(|| Solver::new(&model).lexicographic(&order)));
    group.bench_function("count_forward_14787", |b| b.iter(|| Solver::new(&model).count(&forward)));
    group.bench_function("count_all", |b| b.iter(|| Solver::new(&model).count(&[])));
    group.bench_function("minimize", |b| b.iter(|| Solver::new(&model).minimize(&cost)));
    group.bench_function("explain", |b| b.iter(|| Solver::new(&refuted).explain()));
    group.finish();
}

criterion_group!(benches, queries);
criterion_main!(benches);
