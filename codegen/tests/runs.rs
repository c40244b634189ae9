//! Contractions by runs: operands that move with a row by data alone, against the evaluator, whatever the data: in order
//! and not, one run and runs of one, and positions outside their array.

mod common;

use common::{Split, compile, compile_lowered, isas, plan, run};
use einfall_codegen::backend::llvm::Isa;
use einfall_codegen::lower::cpu;
use einfall_ir::array::Array;
use einfall_ir::artifact::Code;
use einfall_ir::cascade::bind::{Bindings, Given, bind};
use einfall_ir::cascade::{Cascade, eval, parse};
use einfall_ir::kernel;
use einfall_ir::tile::Plan;
use einfall_ir::tolerance::{self, Expected, inputs};

/// Indices of rows in every order that matters: sorted, in turns, all the same, drawn, and outside `0..most`.
fn patterns(most: u64) -> Vec<Box<dyn Fn(u64, u64) -> f64>> {
    let drawn = move |i: u64, low: i64, high: i64| {
        let x = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33) as i64 % (high - low) + low
    };
    let most = most as i64;
    vec![
        Box::new(move |i, n| (i as i64 * most / n as i64) as f64),
        Box::new(move |i, _| (i as i64 % most) as f64),
        Box::new(move |_, _| (most - 1) as f64),
        // Runs of several rows, the first and the last index without any.
        Box::new(move |i, _| (drawn(i / 7, 1, most.max(3) - 1).min(most - 1)) as f64),
        Box::new(move |i, _| drawn(i, 0, most) as f64),
        Box::new(move |i, _| drawn(i / 3, -2, most + 2) as f64),
        Box::new(move |_, _| -1.0),
        Box::new(move |i, n| if i + 1 == n { 0.0 } else { i64::from(i32::MAX) as f64 }),
    ]
}

struct Case {
    text: String,
    /// The tensor of indices, what they choose from, and rows that have each.
    index: &'static str,
    most: &'static str,
}

fn case(index: &'static str, most: &'static str, text: &str) -> Case {
    Case { text: text.to_owned(), index, most }
}

fn given(c: &Cascade, b: &Bindings, case: &Case, pattern: &dyn Fn(u64, u64) -> f64) -> Vec<Array> {
    let mut all = inputs::random(c, b, 5, inputs::Variant::Normal).unwrap();
    let at = c.params.iter().position(|t| c.tensors[*t].name == case.index).unwrap();
    let n = all[at].data.len() as u64;
    all[at].data.iter_mut().enumerate().for_each(|(i, v)| *v = pattern(i as u64, n));
    all
}

fn bound(c: &Cascade, sizes: &[(&str, u64)]) -> Bindings {
    let sizes = sizes.iter().filter(|s| c.ranks.iter().any(|(_, r)| r.name == s.0));
    let sizes = sizes.map(|(n, v)| ((*n).to_owned(), *v)).collect();
    bind(c, &Given { sizes, ..Given::default() }).unwrap()
}

const SIZES: [&[(&str, u64)]; 4] = [
    &[("N", 45), ("X", 5), ("D", 19), ("F", 37), ("B", 2), ("G", 3)],
    &[("N", 1), ("X", 1), ("D", 1), ("F", 1), ("B", 1), ("G", 1)],
    &[("N", 33), ("X", 3), ("D", 32), ("F", 32), ("B", 3), ("G", 1)],
    &[("N", 61), ("X", 7), ("D", 21), ("F", 36), ("B", 1), ("G", 2)],
];

/// Arrays of every size and pattern, and what is to come of them.
struct Checks {
    text: String,
    all: Vec<(Bindings, usize, Vec<Array>, Vec<Expected>)>,
}

impl Checks {
    fn new(case: &Case, c: &Cascade) -> Checks {
        let mut all = Vec::new();
        for sizes in SIZES {
            let b = bound(c, sizes);
            let most = sizes.iter().find(|s| s.0 == case.most).unwrap().1;
            for (i, pattern) in patterns(most).iter().enumerate() {
                let given = given(c, &b, case, pattern.as_ref());
                let want = tolerance::expect(c, &b, &given, &eval::Options::default()).unwrap();
                all.push((b.clone(), i, given, want));
            }
        }
        Checks { text: case.text.clone(), all }
    }

    /// The first size, pattern and element that disagree.
    fn wrong(&self, compiled: &common::Compiled) -> Option<String> {
        self.all.iter().find_map(|(b, i, given, want)| {
            let got = run(compiled, &b.extents, given, Split::Each);
            let wrong = want.iter().zip(&got).find_map(|(w, g)| w.compare(&w.elements(g)).err());
            wrong.map(|e| format!("{} {:?}, pattern {i}: {e}", self.text, b.extents))
        })
    }
}

fn runs_in(plan: &Plan, isa: &Isa) -> usize {
    let module = cpu::lower(plan, isa).unwrap();
    kernel::print::print(&module).lines().filter(|l| l.trim_start().starts_with("let end_")).count()
}

fn check(case: &Case, blocks: &[(&str, u64)], want: usize) {
    check_blocks(case, &[(blocks, want)]);
}

fn check_blocks(case: &Case, blocks: &[(&[(&str, u64)], usize)]) {
    let c = parse(&case.text).unwrap().cascades.remove(0);
    let checks = Checks::new(case, &c);
    for ((blocks, want), isa) in blocks.iter().flat_map(|b| isas().into_iter().map(move |isa| (*b, isa))) {
        let plan = plan(&c, blocks);
        assert_eq!(runs_in(&plan, &isa), want, "{}\n{plan}", case.text);
        let compiled = compile(&plan, &isa).unwrap_or_else(|e| panic!("{}: {e}", case.text));
        if let Some(e) = checks.wrong(&compiled) {
            panic!("{} bytes, {blocks:?}: {e}", isa.vector_bytes);
        }
    }
}

const BLOCKS: &[(&str, u64)] = &[("n", 42), ("f", 64), ("d", 16)];

fn product(x: &str, w: &str, y: &str) -> Case {
    case(
        "e",
        "X",
        &format!(
            "cascade c[N, X, D, F](x: {x}[N,D], w: {w}[X,D,F], e: i32[N]) -> (y: {y}[N,F]) {{
            y[n,f] = sum(d) x[n,d] * w[e[n],d,f]
        }}"
        ),
    )
}

/// Every type, with sums carried over blocks of what is summed.
#[test]
fn rows_that_share_an_operand_are_multiplied_together() {
    for (x, w, y) in [
        ("f32", "f32", "f32"),
        ("bf16", "bf16", "bf16"),
        ("f64", "f64", "f64"),
        ("f16", "f32", "f16"),
        ("i32", "i8", "i32"),
    ] {
        check(&product(x, w, y), BLOCKS, 1);
    }
}

/// Blocks of few and of many rows and columns; one row is no run.
#[test]
fn blocks_of_every_size() {
    let blocks = [(3, 16, 64, 1), (14, 5, 1, 1), (126, 256, 256, 1), (33, 32, 7, 1), (1, 64, 16, 0), (2, 64, 16, 0)];
    let named = blocks.map(|(n, f, d, runs)| ([("n", n), ("f", f), ("d", d)], runs));
    let each: Vec<_> = named.iter().map(|(b, runs)| (b.as_slice(), *runs)).collect();
    check_blocks(&product("f32", "f32", "f32"), &each);
}

/// The operand in other orders, by several indices, by what is computed of them, and beside batches.
#[test]
fn operands_of_every_form() {
    let b = &[("n", 42), ("f", 64), ("d", 16), ("b", 1)];
    // Contiguous along what is summed.
    check(
        &case(
            "e",
            "X",
            "cascade c[N, X, D, F](x: f32[N,D], w: f32[X,F,D], e: i32[N]) -> (y: f32[N,F]) {
        y[n,f] = sum(d) x[n,d] * w[e[n],f,d]
    }",
        ),
        b,
        1,
    );
    // The shared operand first, its index last.
    check(
        &case(
            "e",
            "X",
            "cascade c[N, X, D, F](x: f32[D,N], w: f32[F,D,X], e: i64[N]) -> (y: f32[N,F]) {
        y[n,f] = sum(d) w[f,d,e[n]] * x[d,n]
    }",
        ),
        b,
        1,
    );
    // Part of a position, and two indices.
    check(
        &case(
            "e",
            "X",
            "cascade c[N, X, D, F](x: f32[N,D], w: f32[X*D,F], e: i32[N]) -> (y: f32[N,F]) {
        y[n,f] = sum(d) x[n,d] * w[e[n]*D+d,f]
    }",
        ),
        b,
        1,
    );
    check(
        &case(
            "e",
            "X",
            "cascade c[N, X, D, F, G](x: f32[N,D], w: f32[X,G,D,F], e: i32[N], g: i32[N]) -> (y: f32[N,F]) {
        y[n,f] = sum(d) x[n,d] * w[e[n],g[n],d,f]
    }",
        ),
        b,
        1,
    );
    // Neighbours of an index are one position, and rows are gathered too.
    check(
        &case(
            "e",
            "X",
            "cascade c[N, X, D, F](x: f32[N,D], w: f32[X,D,F], e: i32[N]) -> (y: f32[N,F]) {
        y[n,f] = sum(d) x[e[n],d] * w[e[n]/2,d,f]
    }",
        ),
        b,
        1,
    );
    // A batch that the index moves with, and one that it does not.
    for n in [1, 4] {
        let b = &[("n", 42), ("f", 64), ("d", 16), ("b", n)];
        check(
            &case(
                "e",
                "X",
                "cascade c[N, X, D, F, B](x: f32[B,N,D], w: f32[X,D,F], e: i32[B,N]) -> (y: f32[B,N,F]) {
            y[b,n,f] = sum(d) x[b,n,d] * w[e[b,n],d,f]
        }",
            ),
            b,
            1,
        );
        check(
            &case(
                "e",
                "X",
                "cascade c[N, X, D, F, B](x: f32[B,N,D], w: f32[X,D,F], e: i32[N]) -> (y: f32[B,N,F]) {
            y[b,n,f] = sum(d) x[b,n,d] * w[e[n],d,f]
        }",
            ),
            b,
            1,
        );
    }
}

/// Several contractions by one index, rows that do not exist, and weights computed of what is gathered.
#[test]
fn several_contractions_guards_and_computed_operands() {
    check(
        &case(
            "e",
            "X",
            "cascade c[N, X, D, F](x: f32[N,D], g: f32[X,D,F], u: f32[X,D,F], e: i32[N]) -> (y: f32[N,F]) {
        G[n,f] = sum(d) x[n,d] * g[e[n],d,f]
        U[n,f] = sum(d) x[n,d] * u[e[n],d,f]
        y[n,f] = G[n,f] * sigmoid(G[n,f]) * U[n,f]
    }",
        ),
        BLOCKS,
        2,
    );
    check(
        &case(
            "e",
            "X",
            "cascade c[N, X, D, F](x: f32[N,D], w: f32[X,D,F], e: i32[N]) -> (y: f32[N,F]) {
        y[n,f] = sum(d) x[n,d] * w[e[n],d,f]  where e[n] >= 0 and n % 3 != 1  else -1.0
    }",
        ),
        BLOCKS,
        1,
    );
    check(
        &case(
            "e",
            "X",
            "cascade c[N, X, D, F](x: f32[N,D], q: i8[X,D,F], s: f32[X,F], e: i32[N]) -> (y: f32[N,F]) {
        y[n,f] = sum(d) x[n,d] * (q[e[n],d,f] * s[e[n],f])
    }",
        ),
        BLOCKS,
        1,
    );
}

/// What moves with the row by its number is multiplied row by row.
#[test]
fn other_operands_have_no_runs() {
    check(
        &case(
            "e",
            "X",
            "cascade c[N, X, D, F](x: f32[N,D], w: f32[N,D,F], e: i32[X]) -> (y: f32[N,F]) {
        y[n,f] = sum(d) x[n,d] * w[n,d,f] + e[0] * 0.0
    }",
        ),
        BLOCKS,
        0,
    );
}

/// Runs multiplied by instructions for tiles, operands of their type or rounded to it, in either order.
#[test]
fn runs_are_multiplied_by_tiles() {
    for (w, order, at) in [("bf16", "X,D,F", "d,f"), ("bf16", "X,F,D", "f,d"), ("f32", "X,D,F", "d,f")] {
        let case = case(
            "e",
            "X",
            &format!(
                "cascade c[N, X, D, F](x: bf16[N,D], w: {w}[{order}], e: i32[N]) -> (y: f32[N,F]) {{
                y[n,f] = sum(d) x[n,d] * w[e[n],{at}]
            }}"
            ),
        );
        let c = parse(&case.text).unwrap().cascades.remove(0);
        let checks = Checks::new(&case, &c);
        for (n, height) in [(64, 2), (48, 2), (16, 1)] {
            let plan = plan(&c, &[("n", n), ("f", 64), ("d", 32)]);
            let compiled = compile(&plan, &Isa::AMX).unwrap();
            let Code::LlvmIr(text) = &compiled.artifact.code else { panic!("no text") };
            let products = text.lines().filter(|l| l.contains("call void") && l.contains("tdpbf16ps")).count();
            // Whole register tiles, the rest of a run in as many rows, and in half of them where there are two tiles.
            let want: usize = if height == 2 { 4 + 4 + 2 } else { 2 + 2 };
            assert_eq!(products, want, "{}\n{plan}", case.text);
            if let Some(e) = checks.wrong(&compiled) {
                panic!("{n} rows: {e}");
            }
        }
    }
}

/// A run that ends a row late, one that never ends before the block does, and one that begins a row late are seen.
#[test]
fn runs_with_wrong_ends_are_seen() {
    let isa = isas()[0];
    for case in [product("f32", "f32", "f32"), product("bf16", "bf16", "f32")] {
        let c = parse(&case.text).unwrap().cascades.remove(0);
        let checks = Checks::new(&case, &c);
        let plan = plan(&c, BLOCKS);
        let text = kernel::print::print(&cpu::lower(&plan, &isa).unwrap());
        let line = |start: &str| text.lines().find(|l| l.trim_start().starts_with(start)).unwrap().to_owned();
        let (end, cond) = (line("let end_"), text.lines().find(|l| l.contains(" or key_")).unwrap().to_owned());
        let first = text.lines().filter(|l| l.trim_start().starts_with("let first_")).nth(1).unwrap().to_owned();
        let never = cond.split(" or ").next().unwrap().to_owned() + " {";
        for (what, right, fault) in [
            ("ends late", &end, format!("{end} + 1")),
            ("ends early", &end, format!("{end} - 1")),
            ("never ends", &cond, never),
            ("begins late", &first, format!("{first} + 1")),
        ] {
            let faulty = text.replace(right.as_str(), &fault);
            assert_ne!(faulty, text, "{what}");
            let module = kernel::parse::parse(&faulty).unwrap_or_else(|e| panic!("{what}: {e:?}"));
            let compiled = compile_lowered(&plan, module, &isa).unwrap();
            assert!(checks.wrong(&compiled).is_some(), "a run that {what} is not seen");
        }
        // The text as it is, read again, computes the same.
        let module = kernel::parse::parse(&text).unwrap();
        let compiled = compile_lowered(&plan, module, &isa).unwrap();
        assert_eq!(checks.wrong(&compiled), None);
    }
}
