//! Tests of the level as a whole: text, verifier and evaluator against direct loops, for many blocks.

use super::eval::{Blocks, Options, TileError, run};
use super::parse::parse;
use super::verify::verify;
use crate::array::Array;
use crate::dtype::DType;

const GEMM: &str = include_str!("../../../tests/plans/gemm.tile");
const ATTENTION: &str = include_str!("../../../tests/plans/attention.tile");
const ATTENTION_FULL: &str = include_str!("../../../tests/plans/attention_full.tile");
const LSTM: &str = include_str!("../../../tests/plans/lstm.tile");

/// A deterministic array of values in [-1, 1], bf16-representable.
fn input(dims: &[u64], seed: u64) -> Array {
    let mut s = seed;
    Array::from_fn(DType::BF16, dims, |_| {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (s >> 40) as f64 / f64::from(1u32 << 23) - 1.0
    })
}

fn block_choices() -> Vec<Blocks> {
    let mut all = vec![Blocks::Declared, Blocks::Uniform(1), Blocks::Uniform(3), Blocks::Uniform(64)];
    all.extend((0..6).map(|s| Blocks::Drawn(s * 7919 + 1)));
    all
}

/// Runs under every choice of blocks, with and without skipping, and checks that the results agree.
fn run_all(text: &str, ranks: &[u64], inputs: &[Array]) -> Vec<Array> {
    let plan = parse(text).unwrap();
    verify(&plan).unwrap();
    let first = run(&plan, ranks, inputs, &Options::default()).unwrap();
    for blocks in block_choices() {
        for skip_masked in [false, true] {
            let options = Options { blocks: blocks.clone(), skip_masked, ..Options::default() };
            let got = run(&plan, ranks, inputs, &options).unwrap_or_else(|e| panic!("{blocks:?}: {e}"));
            for (a, b) in first.iter().zip(&got) {
                assert_eq!(a.dims, b.dims);
                for (x, y) in a.data.iter().zip(&b.data) {
                    assert!((x - y).abs() <= 1e-12 * (1.0 + x.abs()), "{blocks:?}: {x} {y}");
                }
            }
        }
    }
    first
}

#[test]
fn texts_round_trip() {
    for text in [GEMM, ATTENTION, ATTENTION_FULL, LSTM] {
        let plan = parse(text).unwrap();
        let printed = plan.to_string();
        let again = parse(&printed).unwrap_or_else(|e| panic!("{e}\n{printed}"));
        assert_eq!(printed, again.to_string());
        assert_eq!(plan.kernels, again.kernels);
        verify(&again).unwrap();
        // The files are in the printer's form, comments apart.
        let body: String = text.lines().filter(|l| !l.starts_with("//")).flat_map(|l| [l, "\n"]).collect();
        assert_eq!(body, printed);
    }
}

#[test]
fn every_construct_round_trips() {
    let text = "plan all[T, N = 8, X] {
    input x: f32[T, N]
    input i: i32[max(T, 1) * (N - 2) / 3, ceildiv(N, 4)]
    inout s: f32[T]
    output y: f32[T, N]
    output best: f32[T]
    output at: i32[T]
    workspace w: f32[N]

    kernel all {
        grid t in T block 4
        stream n in N
        tile a: f32[t, n] in registers
        tile c: f32[t] in scratch
        tile v: f32[t]
        tile j: i32[t]
        c = 0.0
        v = -inf
        j = -1
        for n rev where n % 2 == 0 or not(t < 3) and x[t, n] > -1.5e-7 {
            a = load x[t, n]
            a = scan sum(n) a from c
            v, j = carry reduce argmax(n) a
            store y[t, n] = if a > 0.0 then max(a, 1.0) - (2.0 - a) else bf16(exp(a)) over t, n
        }
        store s[t] join sum = v over t when t != 2
        store best[t] = v over t
        store at[t] = j over t
    }
}
";
    let plan = parse(text).unwrap();
    assert_eq!(plan.to_string(), text);
}

#[test]
fn gemm_with_tails() {
    let (m, n, k) = (5, 7, 9);
    let (a, b) = (input(&[m, k], 1), input(&[k, n], 2));
    let c = &run_all(GEMM, &[m, n, k], &[a.clone(), b.clone()])[0];
    for i in 0..m as usize {
        for j in 0..n as usize {
            let want: f64 = (0..9).map(|l| a.data[i * 9 + l] * b.data[l * 7 + j]).sum();
            assert!((c.data[i * 7 + j] - want).abs() < 1e-12);
        }
    }
}

#[test]
fn attention_with_empty_rows() {
    // M > N: the first rows have no key.
    let (h, r, m, n, e, f) = (2, 2, 6, 4, 3, 5);
    let ranks = [1, h, r, m, n, e, f];
    let (q, k, v) = (input(&[1, h * r, m, e], 3), input(&[1, h, n, e], 4), input(&[1, h, n, f], 5));
    let scale = Array::scalar(DType::F32, 0.7);
    let o = &run_all(ATTENTION, &ranks, &[q.clone(), k.clone(), v.clone(), scale.clone()])[0];
    let full = &run_all(ATTENTION_FULL, &ranks, &[q.clone(), k.clone(), v.clone(), scale])[0];
    for (masked, o) in [(true, o), (false, full)] {
        for g in 0..h * r {
            for i in 0..m {
                let keys: Vec<u64> =
                    (0..n).filter(|j| !masked || *j as i64 <= i as i64 + n as i64 - m as i64).collect();
                let kv = g / r;
                let score = |j: u64| {
                    let dot = |l| q.data[((g * m + i) * e + l) as usize] * k.data[((kv * n + j) * e + l) as usize];
                    (f64::from(0.7f32) * (0..e).map(dot).sum::<f64>()).exp()
                };
                let total: f64 = keys.iter().map(|j| score(*j)).sum();
                for c in 0..f {
                    let sum: f64 = keys.iter().map(|j| score(*j) * v.data[((kv * n + j) * f + c) as usize]).sum();
                    let want = if keys.is_empty() { 0.0 } else { sum / total };
                    assert!((o.data[((g * m + i) * f + c) as usize] - want).abs() < 1e-12);
                }
            }
        }
    }
}

#[test]
fn lstm_over_heads() {
    let (t, b, h, d) = (4usize, 3usize, 2usize, 3usize);
    let ranks = [t as u64, b as u64, h as u64, d as u64];
    let (tt, bb, hh, dd) = (ranks[0], ranks[1], ranks[2], ranks[3]);
    let (wx, rw) = (input(&[tt, bb, hh, 4, dd], 6), input(&[hh, 4, dd, dd], 7));
    let (bias, h0, c0) = (input(&[hh, 4, dd], 8), input(&[bb, hh, dd], 9), input(&[bb, hh, dd], 10));
    let outs = run_all(LSTM, &ranks, &[wx.clone(), rw.clone(), bias.clone(), h0.clone(), c0.clone()]);
    let (mut hs, mut cs) = (h0.data.clone(), c0.data.clone());
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for step in 0..t {
        let before = hs.clone();
        for row in 0..b * h {
            let n = row % h;
            for x in 0..d {
                let gate = |a: usize| {
                    let dot: f64 = (0..d).map(|p| rw.data[((n * 4 + a) * d + x) * d + p] * before[row * d + p]).sum();
                    wx.data[((step * b * h + row) * 4 + a) * d + x] + bias.data[(n * 4 + a) * d + x] + dot
                };
                cs[row * d + x] = sigmoid(gate(1)) * cs[row * d + x] + sigmoid(gate(0)) * gate(2).tanh();
                hs[row * d + x] = sigmoid(gate(3)) * cs[row * d + x].tanh();
                assert!((outs[0].data[step * b * h * d + row * d + x] - hs[row * d + x]).abs() < 1e-12);
            }
        }
    }
    assert!(outs[1].data.iter().zip(&hs).all(|(x, y)| (x - y).abs() < 1e-12));
    assert!(outs[2].data.iter().zip(&cs).all(|(x, y)| (x - y).abs() < 1e-12));
}

#[test]
fn declared_types_round() {
    let plan = parse(GEMM).unwrap();
    let inputs = [input(&[2, 3], 1), input(&[3, 2], 2)];
    let exact = run(&plan, &[2, 2, 3], &inputs, &Options::default()).unwrap();
    let options = Options { rounding: true, ..Options::default() };
    let rounded = run(&plan, &[2, 2, 3], &inputs, &options).unwrap();
    assert_ne!(exact, rounded);
    for (x, y) in exact[0].data.iter().zip(&rounded[0].data) {
        assert_eq!(DType::BF16.round(DType::F32.round(*x)), *y);
    }
}

/// The messages of the verifier for GEMM with `from` replaced by `to`.
fn faults(text: &str, from: &str, to: &str) -> String {
    let changed = text.replacen(from, to, 1);
    assert_ne!(changed, text, "{from} is not in the text");
    match verify(&parse(&changed).unwrap_or_else(|e| panic!("{e}"))) {
        Ok(()) => panic!("accepted: {from} → {to}"),
        Err(f) => f.iter().map(|f| format!("{f}\n")).collect(),
    }
}

#[test]
fn the_verifier_refuses() {
    let has = |faults: String, part: &str| assert!(faults.contains(part), "{faults}");
    has(faults(GEMM, "        c = 0.0\n", ""), "kernel gemm, operation c: tile c is read before it is written");
    has(faults(GEMM, "stream k", "inner k"), "a stream walks inner axis k");
    has(faults(GEMM, "contract(k) a, b", "contract(n) a, b"), "axis n is both kept and summed");
    has(faults(GEMM, "stream k in K", "stream k in K ordered"), "which takes a grid axis in blocks of 1");
    has(faults(GEMM, "grid n in N", "grid n in N block 2 ordered"), "which takes a grid axis in blocks of 1");
    has(faults(GEMM, "b = load B[k, n]\n", "\n"), "tile b is read before it is written");
    has(faults(GEMM, "A[m, k]\n", "A[m]\n            a = load A[m, k]\n"), "accessed with 1 positions");
    has(faults(GEMM, "store C", "store A"), "input A is stored to");
    has(faults(GEMM, "over m, n", "over m"), "axis n is not one of the points' axes");
    has(faults(GEMM, "tile a: bf16[m, k]", "tile a: bf16[m]"), "axis k is not one of the points' axes");
    has(faults(GEMM, "grid n in N", "stream n in N"), "stream axis n is used outside a stream over it");
    has(faults(GEMM, "A[m, k]\n", "A[m / 2, exp(k)]\n"), "a position in an array is not an integer");
    has(faults(GEMM, "tile c: f32[m, n]", "tile m: f32[m, n]\n        tile c: f32[m, n]"), "m names both");
    has(faults(LSTM, "for t sequential", "for t"), "axis t is not one of the points' axes");
    has(faults(LSTM, "h{d = p}", "h{n = a}"), "which must be an inner axis of the same extent");
    has(faults(LSTM, "g{a = 3}", "g{a = 4}"), "another place of a");
    has(faults(ATTENTION, "x = carry reduce max(n) s", "x = reduce max(m) s"), "is both kept and summed");
    // A tile of an earlier step is not this step's.
    let stale = "            s = s * scale[]\n";
    has(faults(ATTENTION_FULL, stale, "            s = s * scale[]\n            w = w\n"), "tile w is read before");
}

#[test]
fn the_parser_says_where() {
    for (from, to, code, at) in [
        ("carry contract", "carry contrast", "T0101", "contrast"),
        ("load A[m, k]", "load Z[m, k]", "T0102", "Z"),
        ("tile b:", "tile a:", "T0103", "a:"),
        ("over m, n", "over m, q", "T0102", "q"),
        ("bf16[m, k]", "bf17[m, k]", "T0102", "bf17"),
        ("grid n in N", "grid o in N ordered\n        grid n in N ordered", "T0104", "n in N"),
    ] {
        let text = GEMM.replacen(from, to, 1);
        let d = parse(&text).unwrap_err();
        assert_eq!(d.code, code, "{d}");
        assert!(text[d.primary.0.start as usize..].starts_with(at), "{d} at {:?}", d.primary);
    }
}

#[test]
fn faults_at_run_time_are_named() {
    let inputs = [input(&[4, 4], 1), input(&[4, 4], 2)];
    let two = |b| Options { blocks: Blocks::Uniform(b), ..Options::default() };
    // Two tasks along n store the same column.
    let text = GEMM.replace("store C[m, n]", "store C[m, 0]");
    let plan = parse(&text).unwrap();
    assert!(matches!(run(&plan, &[4, 4, 4], &inputs, &two(2)), Err(TileError::Race { .. })));
    // One after the other they may.
    let plan_in_order = parse(&text.replace("grid n in N", "grid n in N ordered")).unwrap();
    assert!(matches!(run(&plan_in_order, &[4, 4, 4], &inputs, &two(2)), Err(TileError::Unwritten { .. })));
    // One task leaves columns unwritten.
    assert!(matches!(run(&plan, &[4, 4, 4], &inputs, &two(8)), Err(TileError::Unwritten { .. })));
    // Without initialisation the carried tile is poison.
    let plan = parse(&GEMM.replace("        c = 0.0\n", "")).unwrap();
    let e = run(&plan, &[4, 4, 4], &inputs, &two(2)).unwrap_err();
    assert_eq!(e.to_string(), "kernel gemm: operation c reads tile c before it is written for these blocks");
    let e = run(&plan, &[4, 4, 4], &inputs[..1], &two(2)).unwrap_err();
    assert_eq!(e, TileError::InputCount { want: 2, got: 1 });
}

#[test]
fn scans_and_argument_selections() {
    let text = "plan p[T, N] {
    input x: f32[T, N]
    output y: f32[T, N]
    output v: f32[T]
    output i: i32[T]

    kernel p {
        grid t in T
        stream n in N
        tile a: f32[t, n]
        tile s: f32[t]
        tile b: f32[t]
        tile j: i32[t]
        s = 0.0
        b = -inf
        j = -1
        for n {
            a = load x[t, n]
            b, j = carry reduce argmax(n) a
            a = scan sum(n) a from s
            store y[t, n] = a over t, n
        }
        store v[t] = b over t
        store i[t] = j over t
    }
}
";
    let x = Array::from_fn(DType::F32, &[2, 7], |i| {
        [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 9.0, 2.0, 6.0, 5.0, 3.0, 6.0, 0.0, 1.0][i]
    });
    let outs = run_all(text, &[2, 7], &[x]);
    assert_eq!(outs[0].data[..7], [3.0, 4.0, 8.0, 9.0, 14.0, 23.0, 32.0]);
    assert_eq!(outs[1].data, [9.0, 6.0]);
    assert_eq!(outs[2].data, [5.0, 1.0]);
}
