//! Processors with dot products of pairs of bf16 (AVX512-BF16): which contractions become such instructions, in every
//! storage order, at sizes around register tiles, pairs and blocks, against the evaluator; where the processor has none, by
//! their definition.

mod common;

use common::{Compiled, Split, compile, compile_lowered, compiler, plan, run};
use einfall_codegen::backend::llvm::{self, Isa};
use einfall_codegen::lower::cpu;
use einfall_codegen::passes::round_operands::round_operands;
use einfall_ir::array::Array;
use einfall_ir::artifact::Code;
use einfall_ir::cascade::bind::{Given, bind};
use einfall_ir::cascade::{Cascade, eval, parse};
use einfall_ir::kernel;
use einfall_ir::tile::Plan;
use einfall_ir::tolerance::{self, inputs};
use einfall_llvm::{Passes, TargetOptions};

fn instructions(c: &Compiled) -> usize {
    let Code::LlvmIr(text) = &c.artifact.code else { panic!("no text") };
    text.lines().filter(|l| l.contains("call <16 x float>") && l.contains("dpbf16ps.512")).count()
}

fn one(text: &str) -> Cascade {
    parse(text).unwrap().cascades.remove(0)
}

/// What is wrong with compiled code at some sizes.
fn wrong(c: &Cascade, compiled: &Compiled, sizes: &[(&str, u64)], seed: u64) -> Option<String> {
    let sizes = sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
    let b = bind(c, &Given { sizes, ..Given::default() }).unwrap();
    let given = inputs::random(c, &b, seed, inputs::Variant::Normal).unwrap();
    let want = tolerance::expect(c, &b, &given, &eval::Options::default()).unwrap();
    let got = run(compiled, &b.extents, &given, Split::Each);
    let each = want.iter().zip(&got).find_map(|(w, g)| w.compare(&w.elements(g)).err());
    each.map(|e| format!("{:?}: {e}", b.extents))
}

fn check(text: &str, blocks: &[(&str, u64)], sizes: &[&[(&str, u64)]], want: usize) {
    let c = one(text);
    let plan = plan(&c, blocks);
    let compiled = compile(&plan, &Isa::DOTS).unwrap();
    assert_eq!(instructions(&compiled), want, "{text}\n{plan}");
    for (i, sizes) in sizes.iter().enumerate() {
        if let Some(e) = wrong(&c, &compiled, sizes, 3 + i as u64) {
            panic!("{text} {blocks:?} {e}");
        }
    }
}

const PRODUCT: [&[(&str, u64)]; 5] = [
    &[("M", 1), ("N", 1), ("K", 1)],
    &[("M", 3), ("N", 15), ("K", 2)],
    &[("M", 33), ("N", 47), ("K", 63)],
    &[("M", 64), ("N", 32), ("K", 130)],
    &[("M", 71), ("N", 100), ("K", 97)],
];

const PLAIN: &str =
    "cascade c[M, N, K](A: bf16[M,K], B: bf16[K,N]) -> (Y: f32[M,N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }";

/// Rows or columns, each by k or against it, in whole register tiles, few rows and few columns.
#[test]
fn every_storage_order_is_multiplied_by_pairs() {
    for (a, b) in [("A[m,k]", "B[k,n]"), ("A[m,k]", "B[n,k]"), ("A[k,m]", "B[k,n]"), ("A[k,m]", "B[n,k]")] {
        let shape = |t: &str| t[1..].to_uppercase();
        let text = format!(
            "cascade c[M, N, K](A: bf16{}, B: bf16{}) -> (Y: f32[M,N]) {{ Y[m,n] = sum(k) {a} * {b} }}",
            shape(a),
            shape(b)
        );
        check(&text, &[("m", 28), ("n", 64), ("k", 64)], &PRODUCT, 28);
        check(&text, &[("m", 48), ("n", 16), ("k", 81)], &PRODUCT, 24);
        check(&text, &[("m", 4), ("n", 32), ("k", 32)], &PRODUCT, 8);
        check(&text, &[("m", 5), ("n", 64), ("k", 7)], &PRODUCT, 10);
    }
}

/// Extents fixed by the text, odd or whole: rows are then laid out without chunks.
#[test]
fn fixed_extents_are_multiplied_by_pairs() {
    for (m, n, k) in [(29, 50, 33), (14, 32, 64), (126, 7, 3)] {
        let text = format!(
            "cascade c[M = {m}, N = {n}, K = {k}](A: bf16[M,K], B: bf16[K,N]) -> (Y: bf16[M,N]) {{
                Y[m,n] = sum(k) A[m,k] * B[k,n]
            }}"
        );
        let c = one(&text);
        let compiled = compile(&plan(&c, &[("m", 256), ("n", 256), ("k", 256)]), &Isa::DOTS).unwrap();
        assert!(instructions(&compiled) > 0, "{text}");
        assert_eq!(wrong(&c, &compiled, &[], 9), None);
    }
}

/// Several summed axes in another order than they lie, and batches along which nothing is summed.
#[test]
fn operands_in_other_orders_are_packed_in_pairs() {
    let sizes: [&[(&str, u64)]; 2] =
        [&[("M", 40), ("N", 33), ("R", 20), ("C", 37)], &[("M", 17), ("N", 16), ("R", 1), ("C", 32)]];
    let text = "cascade c[M, N, R, C](X: bf16[M,R,C], W: bf16[N,C,R]) -> (Y: f32[M,N]) {
        Y[m,n] = sum(r, c) X[m,r,c] * W[n,c,r]
    }";
    check(text, &[("m", 28), ("n", 32), ("r", 16), ("c", 32)], &sizes, 28);
    let text = "cascade c[M, N, K, B](X: bf16[M,K,B], W: bf16[K,N,B]) -> (Y: f32[M,N,B]) {
        Y[m,n,b] = sum(k) X[m,k,b] * W[k,n,b]
    }";
    let sizes: [&[(&str, u64)]; 1] = [&[("M", 20), ("N", 19), ("K", 40), ("B", 18)]];
    check(text, &[("m", 28), ("n", 32), ("k", 32), ("b", 1)], &sizes, 28);
    check(text, &[("m", 28), ("n", 32), ("k", 32), ("b", 16)], &sizes, 28);
}

/// What is computed and only a factor: rounded once, into the rows that the instructions read; sums that another contraction
/// reads.
#[test]
fn computed_factors_are_rounded_for_pairs() {
    let text = "cascade c[M, N, K](A: bf16[M,K], B: bf16[K,N], s: f32[M]) -> (Y: bf16[M,N]) {
        P[m,k] = exp(f32(A[m,k]) - s[m])
        Y[m,n] = sum(k) P[m,k] * B[k,n]
    }";
    check(text, &[("m", 28), ("n", 64), ("k", 64)], &PRODUCT, 28);
    let text = include_str!("../../kernels/attention_full.ein");
    let sizes: [&[(&str, u64)]; 2] = [
        &[("B", 2), ("H", 1), ("M", 40), ("N", 150), ("E", 64), ("F", 64)],
        &[("B", 1), ("H", 2), ("M", 33), ("N", 31), ("E", 21), ("F", 24)],
    ];
    check(text, &[("m", 28), ("n", 63)], &sizes, 56);
}

/// Contractions whose operands are, or must stay, wider.
#[test]
fn other_contractions_take_no_pairs() {
    for text in [
        "cascade c[M, N, K](A: f32[M,K], B: f32[K,N]) -> (Y: f32[M,N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }",
        "@exact cascade c[M, N, K](A: f32[M,K], B: bf16[K,N]) -> (Y: f32[M,N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }",
        "cascade c[M, N, K](A: f16[M,K], B: f16[K,N]) -> (Y: f32[M,N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }",
    ] {
        check(text, &[("m", 64), ("n", 64), ("k", 64)], &PRODUCT, 0);
    }
    // Almost no rows are a reduction.
    check(PLAIN, &[("m", 2), ("n", 64), ("k", 64)], &PRODUCT, 0);
}

/// Numbers too small to be normal count as 0, as documented; the smallest normal ones do not.
#[test]
fn subnormal_operands_count_as_zero() {
    let c = one(PLAIN);
    let compiled = compile(&plan(&c, &[("m", 14), ("n", 32), ("k", 32)]), &Isa::DOTS).unwrap();
    let (m, n, k) = (5u64, 20u64, 3u64);
    let least = 2f64.powi(-126);
    for (x, want) in [(least, 3.0 * least * 8.0), (least / 2.0, 0.0)] {
        let fill = |dims: &[u64], x: f64| Array {
            dtype: einfall_ir::dtype::DType::BF16,
            dims: dims.to_vec(),
            data: vec![x; dims.iter().product::<u64>() as usize],
        };
        let got = run(&compiled, &[m, n, k], &[fill(&[m, k], x), fill(&[k, n], 8.0)], Split::Whole);
        assert!(got[0].data.iter().all(|y| *y == want), "{x:e}: {:?}", &got[0].data[..4]);
    }
}

fn lowered(plan: &Plan) -> (Plan, kernel::Module) {
    let plan = round_operands(plan.clone(), &Isa::DOTS.atoms());
    let module = cpu::lower(&plan, &Isa::DOTS).unwrap();
    (plan, module)
}

/// Products that begin a pair late, neighbours the other way round, and the last of an odd number in the other's place: seen.
#[test]
fn planted_faults_are_seen() {
    let c = one(PLAIN);
    let (plan, module) = lowered(&plan(&c, &[("m", 28), ("n", 64), ("k", 64)]));
    let text = kernel::print::print(&module);
    let sizes = [("M", 33), ("N", 47), ("K", 63)];
    let right = compile_lowered(&plan, module, &Isa::DOTS).unwrap();
    assert_eq!(wrong(&c, &right, &sizes, 5), None);
    let lines: Vec<&str> = text.lines().collect();
    let at = |what: &dyn Fn(&str) -> bool| lines.iter().position(|l| what(l)).unwrap_or_else(|| panic!("{text}"));
    let pair = at(&|l| l.contains("map pair_") && !l.contains("0.0"));
    let alone = at(&|l| l.contains("map pair_") && l.contains("[1], 0.0)"));
    let atom = at(&|l| l.contains("atom dot16.m14n32k2.bf16"));
    for (line, from, to) in [(atom - 1, " in 0..", " in 2.."), (pair, "== 0", "== 1"), (alone, "== 0", "== 1")] {
        let mut lines = lines.clone();
        let fault = lines[line].replacen(from, to, 1);
        assert_ne!(fault, lines[line]);
        lines[line] = &fault;
        let module = kernel::parse::parse(&lines.join("\n")).unwrap();
        let compiled = compile_lowered(&plan, module, &Isa::DOTS).unwrap();
        assert!(wrong(&c, &compiled, &sizes, 5).is_some(), "{fault}");
    }
}

/// In the machine code a step of the innermost loop is a register tile's instructions and what they read, and nothing is
/// spilled.
#[test]
fn pairs_become_machine_code_without_spills() {
    let c = one(PLAIN);
    let (plan, module) = lowered(&plan(&c, &[("m", 28), ("n", 64), ("k", 64)]));
    let artifact = llvm::print(&plan, &module, &Isa::DOTS, "cpu").unwrap();
    let Code::LlvmIr(text) = &artifact.code else { panic!("no text") };
    let (llvm, _) = compiler();
    let options = TargetOptions {
        triple: "x86_64-unknown-linux-gnu".to_owned(),
        cpu: "znver4".to_owned(),
        features: "-prefer-256-bit".to_owned(),
        passes: Passes::Tidy,
    };
    let assembly = llvm.assembly(text, &options).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let lines: Vec<&str> = assembly.lines().map(str::trim).collect();
    let products: Vec<usize> = (0..lines.len()).filter(|i| lines[*i].starts_with("vdpbf16ps")).collect();
    assert_eq!(products.len(), 28, "{assembly}");
    let (first, last) = (products[0], products[27]);
    let start = (0..first).rev().find(|i| lines[*i].ends_with(':')).unwrap();
    let end = (last..lines.len()).find(|i| lines[*i].starts_with('j')).unwrap();
    let inner = &lines[start..end];
    let reads = inner.iter().filter(|l| l.contains("(%") && !l.starts_with("lea")).count();
    let stack = inner.iter().filter(|l| l.contains("(%rsp") && l.contains("%zmm")).count();
    assert!(stack == 0 && reads <= 14 + 2, "{}", inner.join("\n"));
    assert!(inner.len() <= 28 + 16 + 8, "{}", inner.join("\n"));
}
