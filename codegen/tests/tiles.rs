//! Processors that multiply tiles (AMX): which contractions become such instructions, in every storage order, at sizes
//! around tiles and blocks, against the evaluator; where the processor has none, by their definition in memory.

mod common;

use common::{Compiled, Split, compile, compiler, plan, run};
use einfall_codegen::backend::llvm::Isa;
use einfall_ir::artifact::Code;
use einfall_ir::cascade::bind::{Given, bind};
use einfall_ir::cascade::{eval, parse};
use einfall_ir::tolerance::{self, inputs};
use einfall_llvm::{Passes, TargetOptions};

fn instructions(c: &Compiled) -> usize {
    let Code::LlvmIr(text) = &c.artifact.code else { panic!("no text") };
    text.lines().filter(|l| l.contains("call void") && l.contains("tdpbf16ps")).count()
}

fn check(text: &str, blocks: &[(&str, u64)], sizes: &[&[(&str, u64)]], want: usize) {
    let c = parse(text).unwrap().cascades.remove(0);
    let plan = plan(&c, blocks);
    let compiled = compile(&plan, &Isa::AMX).unwrap();
    assert_eq!(instructions(&compiled), want, "{text}\n{plan}");
    for (i, sizes) in sizes.iter().enumerate() {
        let sizes = sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
        let b = bind(&c, &Given { sizes, ..Given::default() }).unwrap();
        let given = inputs::random(&c, &b, 3 + i as u64, inputs::Variant::Normal).unwrap();
        let want = tolerance::expect(&c, &b, &given, &eval::Options::default()).unwrap();
        let got = run(&compiled, &b.extents, &given, Split::Each);
        for (w, g) in want.iter().zip(&got) {
            w.compare(&w.elements(g)).unwrap_or_else(|e| panic!("{text} {:?} {blocks:?}: {e}", b.extents));
        }
    }
}

const PRODUCT: [&[(&str, u64)]; 4] = [
    &[("M", 1), ("N", 1), ("K", 1)],
    &[("M", 33), ("N", 47), ("K", 63)],
    &[("M", 64), ("N", 32), ("K", 130)],
    &[("M", 71), ("N", 100), ("K", 97)],
];

/// Rows or columns, each by k or against it.
#[test]
fn every_storage_order_is_multiplied_by_tiles() {
    for (a, b) in [("A[m,k]", "B[k,n]"), ("A[m,k]", "B[n,k]"), ("A[k,m]", "B[k,n]"), ("A[k,m]", "B[n,k]")] {
        let shape = |t: &str| t[1..].to_uppercase();
        let text = format!(
            "cascade c[M, N, K](A: bf16{}, B: bf16{}) -> (Y: f32[M,N]) {{ Y[m,n] = sum(k) {a} * {b} }}",
            shape(a),
            shape(b)
        );
        check(&text, &[("m", 64), ("n", 64), ("k", 64)], &PRODUCT, 4);
        check(&text, &[("m", 48), ("n", 16), ("k", 80)], &PRODUCT, 4);
        check(&text, &[("m", 16), ("n", 32), ("k", 32)], &PRODUCT, 2);
    }
}

/// Several summed axes in another order than they lie, batches last, one step.
#[test]
fn operands_in_other_orders_are_packed_or_multiplied_by_vectors() {
    let sizes: [&[(&str, u64)]; 2] =
        [&[("M", 40), ("N", 33), ("R", 20), ("C", 37)], &[("M", 17), ("N", 16), ("R", 1), ("C", 32)]];
    let text = "cascade c[M, N, R, C](X: bf16[M,R,C], W: bf16[N,C,R]) -> (Y: f32[M,N]) {
        Y[m,n] = sum(r, c) X[m,r,c] * W[n,c,r]
    }";
    check(text, &[("m", 32), ("n", 32), ("r", 16), ("c", 32)], &sizes, 4);
    let text = "cascade c[M, N, K, B](X: bf16[M,K,B], W: bf16[K,N,B]) -> (Y: f32[M,N,B]) {
        Y[m,n,b] = sum(k) X[m,k,b] * W[k,n,b]
    }";
    let sizes: [&[(&str, u64)]; 1] = [&[("M", 20), ("N", 19), ("K", 40), ("B", 18)]];
    check(text, &[("m", 32), ("n", 32), ("k", 32), ("b", 1)], &sizes, 4);
    check(text, &[("m", 32), ("n", 32), ("k", 32), ("b", 16)], &sizes, 0);
    let text =
        "cascade c[M, N, K = 1](A: bf16[M,K], B: bf16[K,N]) -> (Y: f32[M,N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }";
    check(text, &[("m", 32), ("n", 32), ("k", 32)], &[&[("M", 20), ("N", 19)]], 0);
}

/// What is computed and only a factor: rounded once, into the rows that the instructions read.
#[test]
fn computed_factors_are_rounded_for_tiles() {
    let text = "cascade c[M, N, K](A: bf16[M,K], B: bf16[K,N], s: f32[M]) -> (Y: bf16[M,N]) {
        P[m,k] = exp(f32(A[m,k]) - s[m])
        Y[m,n] = sum(k) P[m,k] * B[k,n]
    }";
    check(text, &[("m", 32), ("n", 64), ("k", 64)], &PRODUCT, 4);
    let text = include_str!("../../kernels/attention_full.ein");
    let sizes: [&[(&str, u64)]; 2] = [
        &[("B", 2), ("H", 1), ("M", 40), ("N", 150), ("E", 64), ("F", 64)],
        &[("B", 1), ("H", 2), ("M", 33), ("N", 31), ("E", 20), ("F", 24)],
    ];
    check(text, &[("m", 32), ("n", 64)], &sizes, 8);
}

/// Contractions that are as well made without tiles, or whose operands must stay as they are.
#[test]
fn other_contractions_take_no_tiles() {
    for text in [
        // Wide operands, declared or exact.
        "cascade c[M, N, K](A: f32[M,K], B: f32[K,N]) -> (Y: f32[M,N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }",
        "@exact cascade c[M, N, K](A: f32[M,K], B: bf16[K,N]) -> (Y: f32[M,N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }",
    ] {
        check(text, &[("m", 64), ("n", 64), ("k", 64)], &PRODUCT, 0);
    }
    let text = "cascade c[M, N, K](A: bf16[M,K], B: bf16[K,N]) -> (Y: f32[M,N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }";
    check(text, &[("m", 4), ("n", 64), ("k", 64)], &PRODUCT, 0);
}

/// The processor's own instructions are what the text becomes, and tiles are configured and given back.
#[test]
fn tiles_become_machine_code() {
    let text = "cascade c[M, N, K](A: bf16[M,K], B: bf16[K,N]) -> (Y: f32[M,N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }";
    let c = parse(text).unwrap().cascades.remove(0);
    let plan = plan(&c, &[("m", 64), ("n", 64), ("k", 64)]);
    let module = einfall_codegen::lower::cpu::lower(&plan, &Isa::AMX).unwrap();
    let artifact = einfall_codegen::backend::llvm::print(&plan, &module, &Isa::AMX, "cpu").unwrap();
    let Code::LlvmIr(text) = &artifact.code else { panic!("no text") };
    let (llvm, host) = compiler();
    let options = TargetOptions {
        triple: "x86_64-unknown-linux-gnu".to_owned(),
        cpu: "sapphirerapids".to_owned(),
        features: String::new(),
        passes: Passes::Tidy,
    };
    let object = llvm.compile(text, &options).unwrap_or_else(|e| panic!("{e}\n{text}"));
    // VEX.128.F3.0F38.W0 5C is TDPBF16PS, VEX.128.NP.0F38.W0 49 is LDTILECFG and, with no operand, TILERELEASE.
    let count = |code: &[u8]| object.bytes().windows(code.len()).filter(|w| *w == code).count();
    let products = (0u8..8).map(|v| count(&[0xc4, 0xe2, 0x42 | (v << 3), 0x5c])).sum::<usize>();
    assert_eq!(products, 4, "{}", host.triple);
    assert_eq!(count(&[0xc4, 0xe2, 0x78, 0x49, 0xc0]), 1, "tiles are given back");
}
