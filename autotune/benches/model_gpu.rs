//! How long the GPU model takes to choose a mapping.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use einfall_autotune::model_gpu::{candidates, choose};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::parse::parse;

fn choices(c: &mut Criterion) {
    let sheet = DataSheet::h100();
    let plans: [(&str, &str, &[u64]); 4] = [
        ("gemm", include_str!("../../tests/plans/gemm.tile"), &[4096, 4096, 4096]),
        ("attention", include_str!("../../tests/plans/attention.tile"), &[4, 16, 1, 4096, 4096, 128, 128]),
        ("attention_full", include_str!("../../tests/plans/attention_full.tile"), &[4, 16, 1, 4096, 4096, 128, 128]),
        ("lstm_gates", include_str!("../../tests/plans/lstm_gates.tile"), &[1024, 16, 12, 64]),
    ];
    for (name, text, sizes) in plans {
        let plan = parse(text).expect("a plan");
        c.bench_function(&format!("choose {name}"), |b| b.iter(|| choose(black_box(&plan), &sheet, Some(sizes))));
        c.bench_function(&format!("candidates {name}"), |b| {
            b.iter(|| candidates(black_box(&plan), &sheet, Some(sizes), 8));
        });
    }
}

criterion_group!(benches, choices);
criterion_main!(benches);
