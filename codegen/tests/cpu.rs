//! The CPU path against the cascade evaluator: every library cascade through LLVM, within computed tolerances, with
//! poisoned outputs and scratch, canaries around arrays, and bitwise equality across task splits.

mod common;

use common::{Split, compile, isas, run};
use einfall_codegen::lower::cpu;
use einfall_codegen::pipeline::{Context, Program};
use einfall_codegen::tables;
use einfall_ir::array::Array;
use einfall_ir::cascade::bind::{Bindings, Given, bind, check_facts};
use einfall_ir::cascade::{Cascade, Expr, eval, parse};
use einfall_ir::dtype::DType;
use einfall_ir::tile::{AxisKind, Plan};
use einfall_ir::tolerance::{self, inputs};

fn plan(c: Cascade) -> Option<Plan> {
    let context = Context::default();
    let made = tables::TO_TILE.iter().try_fold(Program::Cascade(c), |p, pass| (pass.step)(p, &context));
    match made.ok()? {
        Program::Tile(plan) => Some(plan),
        Program::Cascade(_) | Program::Kernel(_) => None,
    }
}

/// A small deterministic generator (xorshift64*).
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

/// Extents under which the cascade's facts hold: most of them small, some of several vectors with a tail.
fn draw(c: &Cascade, rng: &mut Rng) -> Option<Bindings> {
    (0..400).find_map(|_| {
        let sizes = c.ranks.iter().filter(|(_, r)| r.fixed.is_none());
        let sizes: Vec<(String, u64)> = sizes
            .map(|(_, r)| (r.name.clone(), 1 + if rng.below(3) == 0 { rng.below(40) } else { rng.below(5) }))
            .collect();
        let b = bind(c, &Given { sizes, ..Given::default() }).ok()?;
        check_facts(c, &b, &[]).is_ok().then_some(b)
    })
}

/// Blocks for every axis that has none: drawn, so that tails of every kind arise.
fn block(plan: &Plan, rng: &mut Rng) -> Plan {
    let mut plan = plan.clone();
    for k in &mut plan.kernels {
        for (_, a) in k.axes.iter_mut() {
            if a.kind != AxisKind::Inner && a.block.is_none() {
                a.block = Some([1, 5, 16, 32][rng.below(4) as usize]);
            }
        }
    }
    plan
}

/// Whether some point of some statement may not exist.
fn removes_points(c: &Cascade) -> bool {
    c.einsums().any(|e| e.filter.is_some()) || c.exprs.iter().any(|(_, e)| matches!(e, Expr::Segment { .. }))
}

#[test]
fn library_cascades_agree_with_the_evaluator() {
    let only = std::env::var("EINFALL_TEST_ONLY").ok();
    let rounds = std::env::var("EINFALL_TEST_ROUNDS").map_or(4, |n| n.parse().expect("a number of rounds"));
    let mut refused = Vec::new();
    let mut wrong = Vec::new();
    for (file, text) in einfall_kernels::SOURCES {
        if only.as_ref().is_some_and(|o| !o.split(',').any(|o| o == *file)) {
            continue;
        }
        // Draws of their own, whatever else the library has.
        let fnv1a = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
        let mut rng = Rng(file.bytes().fold(0xcbf2_9ce4_8422_2325, fnv1a));
        for c in parse(text).unwrap().cascades {
            let Some(p) = plan(c.clone()) else { continue };
            for round in 0..rounds {
                let Some(b) = draw(&c, &mut rng) else { panic!("{file}: no extents") };
                let p = block(&p, &mut rng);
                let variant = inputs::Variant::ALL[(2 * round as usize + file.len()) % 9];
                let given = inputs::random(&c, &b, 7 + round, variant).unwrap();
                // The deviation that docs/language.md lists: a point that a filter removes is a factor 0 in its block,
                // and 0 times an infinity is NaN.
                let deviates = variant == inputs::Variant::NonFinite && removes_points(&c);
                let want = tolerance::expect(&c, &b, &given, &eval::Options::default()).unwrap();
                for isa in if round == 0 { isas() } else { isas()[..1].to_vec() } {
                    let compiled = match compile(&p, &isa) {
                        Ok(c) => c,
                        Err(e) => {
                            refused.push(format!("{file}: {}", e.what));
                            break;
                        }
                    };
                    let got = run(&compiled, &b.extents, &given, Split::Whole);
                    let again = run(&compiled, &b.extents, &given, Split::Each);
                    for (w, (g, h)) in want.iter().zip(got.iter().zip(&again)) {
                        let same = g.data.iter().zip(&h.data).all(|(x, y)| x.to_bits() == y.to_bits());
                        if !same {
                            wrong.push(format!("{file} {:?} differs between task splits", b.extents));
                        }
                        // Derived forms agree with the cascade as written wherever that is finite.
                        let finite = |x: f64| w.dtype.round(x).is_finite();
                        let told = |x: f64, y: f64| finite(x) && !(deviates && y.is_nan());
                        let seen: Vec<f64> =
                            w.values.iter().zip(w.elements(g)).map(|(x, y)| if told(*x, y) { y } else { *x }).collect();
                        if let Err(e) = w.compare(&seen) {
                            let blocks: Vec<_> = p
                                .kernels
                                .iter()
                                .flat_map(|k| k.axes.iter().map(|(_, a)| (a.name.clone(), a.block)))
                                .collect();
                            wrong.push(format!(
                                "{file} {} {:?} {blocks:?} {variant:?}: {e}",
                                isa.vector_bytes, b.extents
                            ));
                        }
                    }
                }
            }
        }
    }
    refused.dedup();
    assert!(wrong.is_empty(), "{}\nrefused: {refused:#?}", wrong.join("\n"));
    // What has no lowering yet is refused by name, and nothing else is.
    assert_eq!(refused, Vec::<String>::new());
}

/// Rows of `x` far from 0: every row's mean is 1,000 or more times its deviation.
fn far_rows(mut given: Vec<Array>, x: usize) -> Vec<Array> {
    let a = &mut given[x];
    let (dtype, row) = (a.dtype, a.dims[1] as usize);
    for (i, v) in a.data.iter_mut().enumerate() {
        let m = (i / row) as f64;
        let mean = if (i / row) % 2 == 0 { 1.0 } else { -1.0 } * (1.0 + m) * 1e3;
        *v = dtype.round(mean + v.clamp(-1.0, 1.0) * (1.0 + m));
    }
    given
}

/// Sums of powers are carried relative to an element of their row: one pass over rows whose means are far larger than
/// their deviations stays within the tolerance of the two-pass text, and moments about 0 do not.
#[test]
fn moments_of_rows_far_from_zero() {
    let about_zero = [
        (
            "mean_variance",
            "cascade raw[M, K](x: f32[M,K]) -> (mean: f32[M], var: f32[M]) {
                mean[m] = (sum(k) x[m,k]) / K
                var[m] = (sum(k) x[m,k] * x[m,k]) / K - mean[m] * mean[m]
            }",
        ),
        (
            "third_moment",
            "cascade raw[M, K](x: f32[M,K]) -> (T: f32[M]) {
                U[m] = (sum(k) x[m,k]) / K
                Q[m] = (sum(k) x[m,k] * x[m,k]) / K
                T[m] = (sum(k) x[m,k] * x[m,k] * x[m,k]) / K - 3.0 * U[m] * Q[m] + 2.0 * U[m] * U[m] * U[m]
            }",
        ),
        (
            "layernorm_matmul",
            "cascade raw[M, N, K](x: f32[M,K], gamma: f32[K], w: f32[K,N], eps: f32 = 1e-5) -> (y: f32[M,N]) {
                U[m] = (sum(k) x[m,k]) / K
                W[m] = (sum(k) x[m,k] * x[m,k]) / K - U[m] * U[m]
                D[m,n] = sum(k) x[m,k] * gamma[k] * w[k,n]
                G[n] = sum(k) gamma[k] * w[k,n]
                y[m,n] = (D[m,n] - U[m] * G[n]) * rsqrt(max(W[m], 0.0) + eps)
            }",
        ),
        ("layernorm_affine_matmul", ""),
    ];
    let isa = &isas()[0];
    let bf16 = about_zero.iter().map(|(name, _)| (*name, "", einfall_kernels::source(name).unwrap().to_string()));
    let f32 = bf16.clone().zip(&about_zero).map(|((name, _, text), raw)| (name, raw.1, text.replace("bf16", "f32")));
    for (name, raw, text) in f32.chain(bf16.clone()) {
        let c = parse(&text).unwrap().cascades.remove(0);
        for (seed, k) in [(3, 1), (5, 2), (7, 100), (11, 1027)] {
            let sizes = c.ranks.iter().map(|(_, r)| (r.name.clone(), if r.name == "K" { k } else { 12 })).collect();
            let b = bind(&c, &Given { sizes, ..Given::default() }).unwrap();
            let given = far_rows(inputs::random(&c, &b, seed, inputs::Variant::ALL[0]).unwrap(), 0);
            let want = tolerance::expect(&c, &b, &given, &eval::Options::default()).unwrap();
            let result = |c: &Cascade| {
                let p = plan(c.clone()).unwrap();
                run(&compile(&p, isa).unwrap(), &b.extents, &given, Split::Whole)
            };
            for (w, g) in want.iter().zip(result(&c)) {
                w.compare(&g.data).unwrap_or_else(|e| panic!("{name}, {k} a row: {e}"));
            }
            if k > 2 && !raw.is_empty() {
                let about_zero = result(&parse(raw).unwrap().cascades.remove(0));
                let far = want.iter().zip(about_zero).any(|(w, g)| w.compare(&g.data).is_err());
                assert!(far, "{name}, {k} a row: moments about 0 are as good");
            }
        }
    }
}

/// Forms that are nowhere near the text's: sums of third powers relative to an element of a row with outliers, and
/// exponentials whose maximum is also subtracted beside them.
#[test]
fn derived_forms_of_rows_with_outliers() {
    let isa = &isas()[0];
    let sizes: [(&str, &[(u64, u64)]); 2] = [
        ("third_moment", &[(30, 16), (37, 5), (17, 5), (28, 5), (40, 3), (3, 40), (1, 2)]),
        ("entropy", &[(27, 5), (4, 38), (14, 15), (20, 29)]),
    ];
    for (name, sizes) in sizes {
        let c = parse(einfall_kernels::source(name).unwrap()).unwrap().cascades.remove(0);
        let compiled = compile(&plan(c.clone()).unwrap(), isa).unwrap();
        let ranks: Vec<&String> = c.ranks.iter().map(|(_, r)| &r.name).collect();
        for (m, n) in sizes {
            let sizes = vec![(ranks[0].clone(), *m), (ranks[1].clone(), *n)];
            let b = bind(&c, &Given { sizes, ..Given::default() }).unwrap();
            let finite = inputs::Variant::ALL.into_iter().filter(|v| *v != inputs::Variant::NonFinite);
            for (variant, seed) in finite.flat_map(|v| [(v, 3), (v, 11), (v, 29)]) {
                let given = inputs::random(&c, &b, seed, variant).unwrap();
                let want = tolerance::expect(&c, &b, &given, &eval::Options::default()).unwrap();
                for (w, g) in want.iter().zip(run(&compiled, &b.extents, &given, Split::Whole)) {
                    w.compare(&g.data).unwrap_or_else(|e| panic!("{name} [{m}, {n}], {variant:?}, {seed}: {e}"));
                }
            }
        }
    }
}

/// The deviation that docs/language.md lists: an infinity at a point that a causal filter removes gives NaN within the
/// blocks that straddle the diagonal, and nothing anywhere else.
#[test]
fn removed_points_of_a_straddling_block_are_factors_of_zero() {
    let c = parse(einfall_kernels::source("attention").unwrap()).unwrap().cascades.remove(0);
    let mut p = plan(c.clone()).unwrap();
    for a in p.kernels.iter_mut().flat_map(|k| k.axes.iter_mut().map(|(_, a)| a)) {
        if a.kind != AxisKind::Inner {
            a.block = Some(16);
        }
    }
    let (n, last) = (40, 39);
    let size = |r: &str| {
        if r == "M" || r == "N" {
            n
        } else if r == "E" || r == "F" {
            8
        } else {
            1
        }
    };
    let sizes = c.ranks.iter().map(|(_, r)| (r.name.clone(), size(&r.name))).collect();
    let b = bind(&c, &Given { sizes, ..Given::default() }).unwrap();
    let mut given = inputs::random(&c, &b, 3, inputs::Variant::ALL[0]).unwrap();
    let finite = tolerance::expect(&c, &b, &given, &eval::Options::default()).unwrap();
    let v = &mut given[2];
    let at = v.data.len() - 8;
    v.data[at..].fill(f64::INFINITY);
    let got = run(&compile(&p, &isas()[0]).unwrap(), &b.extents, &given, Split::Whole);
    for (i, (x, y)) in finite[0].values.iter().zip(&got[0].data).enumerate() {
        let m = (i / 8) as u64 % n;
        match m {
            0..32 => assert!((x - y).abs() <= finite[0].tolerance[i], "row {m}: {x} against {y}"),
            32..39 => assert!(y.is_nan(), "row {m}: {y}; then docs/language.md is out of date"),
            _ => assert!(m == last && *y == f64::INFINITY, "row {m}: {y}"),
        }
    }
}

/// Rows by an index are loaded and stored under one test of the index, which lanes need not repeat: positions that are
/// beyond the array read zeros and are dropped, and what provably lies inside is not tested. Only lanes of which some may be
/// outside are checked one by one.
#[test]
fn rows_by_an_index_are_tested_once() {
    let take = "cascade take[N, V, D](x: f32[V,D], at: i32[N]) -> (y: f32[N,D]) { y[n,d] = x[at[n],d] }";
    let halves = "cascade halves[N, D](x: bf16[N,2*D]) -> (y: bf16[N,2*D]) {
        y[n,c*D+d] for c in 2 = x[n,(1-c)*D+d] + x[n,c*D+d]
    }";
    let turned = halves.replace("(1-c)*D+d", "(2-c)*D+d");
    let texts = [take, einfall_kernels::source("kv_append").unwrap(), halves, &turned];
    for (text, [gathers, tests]) in texts.into_iter().zip([[0, 3], [0, 3], [0, 0], [3, 0]]) {
        let c = parse(text).unwrap().cascades.remove(0);
        let p = common::plan(&c, &[("n", 4), ("d", 64), ("e", 64)]);
        for isa in isas() {
            let lowered = einfall_ir::kernel::print::print(&cpu::lower(&p, &isa).unwrap());
            let count = |what: &str| lowered.lines().filter(|l| l.trim_start().starts_with(what)).count();
            // Of loops hoisted operands stand under a test of their own.
            let tested = lowered.lines().filter(|l| l.contains(" and ") && l.trim_start().starts_with("if ")).count();
            assert_eq!([count("gather") + count("scatter"), tested], [gathers, tests], "{lowered}");
            let compiled = compile(&p, &isa).unwrap();
            for (seed, d) in [(1, 1), (2, 16), (3, 37), (5, 67)] {
                let sizes = c.ranks.iter().map(|(_, r)| (r.name.clone(), if r.name == "D" { d } else { 5 })).collect();
                let b = bind(&c, &Given { sizes, ..Given::default() }).unwrap();
                let mut given = inputs::random(&c, &b, seed, inputs::Variant::ALL[0]).unwrap();
                if let Some(at) = c.params.iter().position(|t| c.tensors[*t].dtype == DType::I32) {
                    given[at].data = vec![-1.0, 4.0, 5.0, f64::from(i32::MAX), 0.0];
                }
                let want = tolerance::expect(&c, &b, &given, &eval::Options::default()).unwrap();
                for (w, g) in want.iter().zip(run(&compiled, &b.extents, &given, Split::Whole)) {
                    w.compare(&g.data).unwrap_or_else(|e| panic!("{text}, {d}: {e}"));
                }
            }
        }
    }
}
