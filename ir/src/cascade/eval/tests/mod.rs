//! Values against closed forms and against loops written out, over odd extents, empty rows and NaN.

mod semantics;

use super::*;
use crate::cascade::bind::{Given, bind};
use crate::cascade::parse;

/// The only cascade of `text`.
fn cascade(text: &str) -> Cascade {
    match parse(text) {
        Ok(m) => m.cascades.into_iter().next().expect("one cascade"),
        Err(d) => panic!("{}", d.iter().map(|d| format!("{d}\n")).collect::<String>()),
    }
}

/// Extents from the inputs' shapes and from `sizes`.
fn bound_to(c: &Cascade, inputs: &[Array], sizes: &[(&str, u64)]) -> Bindings {
    let all = inputs.len() == c.params.len();
    let params = c.params.iter().filter(|p| all || c.tensors[**p].default.is_none());
    let given = Given {
        shapes: params.copied().zip(inputs.iter().map(|a| a.dims.clone())).collect(),
        sizes: sizes.iter().map(|(n, e)| (n.to_string(), *e)).collect(),
        scalars: Vec::new(),
    };
    bind(c, &given).unwrap_or_else(|e| panic!("{e}"))
}

fn run(text: &str, inputs: &[Array], sizes: &[(&str, u64)]) -> Vec<Array> {
    let c = cascade(text);
    let b = bound_to(&c, inputs, sizes);
    evaluate(&c, &b, inputs).unwrap_or_else(|e| panic!("{e}"))
}

fn f32s(dims: &[u64], data: &[f64]) -> Array {
    Array::new(DType::F32, dims, data.to_vec()).expect("data that fill the extents")
}

fn i32s(dims: &[u64], data: &[f64]) -> Array {
    Array::new(DType::I32, dims, data.to_vec()).expect("data that fill the extents")
}

/// Deterministic values in (−2, 2) that no pattern repeats.
fn wave(dtype: DType, dims: &[u64], phase: f64) -> Array {
    Array::from_fn(dtype, dims, |i| 2.0 * ((i as f64 + 1.0) * 12.9898 + phase).sin())
}

fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        let same = x == y || (x.is_nan() && y.is_nan());
        assert!(same || (x - y).abs() <= 1e-12 * (1.0 + y.abs()), "element {i}: {x} against {y}");
    }
}

#[test]
fn reductions_agree_with_loops() {
    let x = wave(DType::F32, &[3, 5], 0.3);
    let out = run(
        "cascade r[M, N](x: f32[M, N]) -> (s: f32[M], p: f32[M], a: f32[M], b: f32[M], l: f32[M], i: i32[M], j: i32[M], y: bool[M], z: bool[M]) {
            s[m] = sum(n) x[m,n]
            p[m] = product(n) x[m,n]
            a[m] = min(n) x[m,n]
            b[m] = max(n) x[m,n]
            l[m] = logsumexp(n) x[m,n]
            i[m] = argmin(n) x[m,n]
            j[m] = argmax(n) x[m,n]
            y[m] = any(n) x[m,n] > 1.9
            z[m] = all(n) x[m,n] < 1.9
        }",
        std::slice::from_ref(&x),
        &[],
    );
    for m in 0..3 {
        let row = &x.data[m * 5..m * 5 + 5];
        let max = row.iter().cloned().fold(f64::NEG_INFINITY, f64::max);
        let min = row.iter().cloned().fold(f64::INFINITY, f64::min);
        let expect = [
            row.iter().sum(),
            row.iter().product(),
            min,
            max,
            row.iter().map(|v| v.exp()).sum::<f64>().ln(),
            row.iter().position(|v| *v == min).unwrap() as f64,
            row.iter().position(|v| *v == max).unwrap() as f64,
            f64::from(row.iter().any(|v| *v > 1.9)),
            f64::from(row.iter().all(|v| *v < 1.9)),
        ];
        close(&out.iter().map(|o| o.data[m]).collect::<Vec<_>>(), &expect);
    }
}

#[test]
fn empty_reductions_are_identities() {
    let out = run(
        "cascade r[M, N](x: f32[M, N]) -> (s: f32[M], p: f32[M], a: f32[M], b: f32[M], l: f32[M], i: i32[M], v: f32[M, 2], k: i32[M, 2]) {
            s[m] = sum(n) x[m,n]
            p[m] = product(n) x[m,n]
            a[m] = min(n) x[m,n]
            b[m] = max(n) x[m,n]
            l[m] = logsumexp(n) x[m,n]
            i[m] = argmax(n) x[m,n]
            (v[m,j], k[m,j]) = topk(n, 2) x[m,n]
        }",
        &[f32s(&[1, 0], &[])],
        &[],
    );
    let inf = f64::INFINITY;
    let flat: Vec<f64> = out.iter().flat_map(|o| o.data.clone()).collect();
    assert_eq!(flat, [0.0, 1.0, inf, -inf, -inf, -1.0, -inf, -inf, -1.0, -1.0]);
}

#[test]
fn ties_and_nan() {
    let out = run(
        "cascade r[M, N](x: f32[M, N]) -> (i: i32[M], b: f32[M], v: f32[M, 3], k: i32[M, 3], w: f32[M], q: i32[M]) {
            i[m] = argmax(n) x[m,n]
            b[m] = max(n) x[m,n]
            (v[m,j], k[m,j]) = topk(n, 3) x[m,n]
            (w[m], q[m]) = argmin(n) x[m,n]
        }",
        &[f32s(&[2, 4], &[1.0, 3.0, 3.0, 1.0, 2.0, f64::NAN, 5.0, -1.0])],
        &[],
    );
    assert_eq!(out[0].data, [1.0, 1.0]);
    close(&out[1].data, &[3.0, f64::NAN]);
    close(&out[2].data, &[3.0, 3.0, 1.0, f64::NAN, 5.0, 2.0]);
    assert_eq!(out[3].data, [1.0, 2.0, 0.0, 1.0, 2.0, 0.0]);
    close(&out[4].data, &[1.0, f64::NAN]);
    assert_eq!(out[5].data, [0.0, 1.0]);
}

const ATTENTION: &str = include_str!("../../../../../kernels/attention.ein");
const LSTM: &str = include_str!("../../../../../kernels/lstm.ein");
const MOE: &str = include_str!("../../../../../kernels/moe_up.ein");

/// Attention written as loops: causal with the queries at the end of the keys; an empty row is 0.
fn attention_loops(q: &Array, k: &Array, v: &Array) -> Vec<f64> {
    let (b, h, m, e) = (q.dims[0], q.dims[1], q.dims[2], q.dims[3]);
    let (g, n, f) = (k.dims[1], k.dims[2], v.dims[3]);
    let at = |a: &Array, i: [u64; 4]| {
        let d = &a.dims;
        a.data[(((i[0] * d[1] + i[1]) * d[2] + i[2]) * d[3] + i[3]) as usize]
    };
    let scale = DType::F32.round(1.0 / (e as f64).sqrt());
    let mut out = Vec::new();
    for bi in 0..b {
        for hi in 0..h {
            let gi = hi / (h / g);
            for mi in 0..m {
                let keys: Vec<u64> = (0..n).filter(|ni| (*ni as i64) <= mi as i64 + n as i64 - m as i64).collect();
                let dot = |ni: u64| (0..e).map(|ei| at(q, [bi, hi, mi, ei]) * at(k, [bi, gi, ni, ei])).sum::<f64>();
                let s: Vec<f64> = keys.iter().map(|ni| scale * dot(*ni)).collect();
                let x = s.iter().cloned().fold(f64::NEG_INFINITY, f64::max);
                let l: f64 = s.iter().map(|s| (s - x).exp()).sum();
                for fi in 0..f {
                    let o: f64 = s.iter().zip(&keys).map(|(s, ni)| (s - x).exp() / l * at(v, [bi, gi, *ni, fi])).sum();
                    out.push(o);
                }
            }
        }
    }
    out
}

#[test]
fn attention_agrees_with_loops() {
    let c = cascade(ATTENTION);
    for [b, g, r, m, n, e, f] in
        [[1, 2, 3, 5, 7, 3, 4], [2, 1, 1, 1, 1, 1, 1], [1, 1, 2, 4, 2, 3, 2], [1, 1, 1, 3, 0, 2, 2]]
    {
        let q = wave(DType::BF16, &[b, g * r, m, e], 0.1);
        let k = wave(DType::BF16, &[b, g, n, e], 0.7);
        let v = wave(DType::BF16, &[b, g, n, f], 1.9);
        let inputs = [q, k, v];
        let bindings = bound_to(&c, &inputs, &[]);
        let expect = attention_loops(&inputs[0], &inputs[1], &inputs[2]);
        let out = evaluate(&c, &bindings, &inputs).unwrap_or_else(|e| panic!("{e}"));
        close(&out[0].data, &expect);
        // Every point alone gives the same.
        let points: Vec<Vec<u64>> = (0..expect.len()).map(|i| out[0].coordinates(i)).collect();
        let alone =
            evaluate_points(&c, &bindings, &inputs, &Options::default(), 0, &points).unwrap_or_else(|e| panic!("{e}"));
        close(&alone, &expect);
    }
}

#[test]
fn lstm_agrees_with_loops() {
    let c = cascade(LSTM);
    let (t, b, h, d) = (4, 2, 3, 5);
    let inputs = [
        wave(DType::BF16, &[t, b, h, 4, d], 0.2),
        wave(DType::BF16, &[h, 4, d, d], 0.5),
        wave(DType::F32, &[h, 4, d], 0.9),
        wave(DType::F32, &[b, h, d], 1.3),
        wave(DType::F32, &[b, h, d], 1.7),
    ];
    let bindings = bound_to(&c, &inputs, &[]);
    let out = evaluate(&c, &bindings, &inputs).unwrap_or_else(|e| panic!("{e}"));
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let [wx, rw, bias, h0, c0] = &inputs;
    let (mut hs, mut cs, mut all) = (h0.data.clone(), c0.data.clone(), Vec::new());
    for ti in 0..t {
        let (old, mut next) = (hs.clone(), hs.clone());
        for bi in 0..b {
            for hi in 0..h {
                for di in 0..d {
                    let gate = |a: u64| {
                        let x = wx.data[((((ti * b + bi) * h + hi) * 4 + a) * d + di) as usize];
                        let r: f64 = (0..d)
                            .map(|p| {
                                rw.data[(((hi * 4 + a) * d + di) * d + p) as usize]
                                    * old[((bi * h + hi) * d + p) as usize]
                            })
                            .sum();
                        x + bias.data[((hi * 4 + a) * d + di) as usize] + r
                    };
                    let at = ((bi * h + hi) * d + di) as usize;
                    cs[at] = sigmoid(gate(1)) * cs[at] + sigmoid(gate(0)) * gate(2).tanh();
                    next[at] = sigmoid(gate(3)) * cs[at].tanh();
                }
            }
        }
        hs = next;
        all.extend_from_slice(&hs);
    }
    close(&out[0].data, &all);
    close(&out[1].data, &hs);
    close(&out[2].data, &cs);
    let last = vec![t - 1, b - 1, h - 1, d - 1];
    let alone =
        evaluate_points(&c, &bindings, &inputs, &Options::default(), 0, &[last]).unwrap_or_else(|e| panic!("{e}"));
    close(&alone, &all[all.len() - 1..]);
}

#[test]
fn ragged_rows_use_their_expert_and_bad_offsets_are_clamped() {
    let c = cascade(MOE);
    let x = wave(DType::BF16, &[4, 3], 0.1);
    let w = wave(DType::BF16, &[3, 3, 2], 0.2);
    for (offsets, experts) in [
        ([0.0, 2.0, 2.0, 5.0], vec![0, 0, 2, 2, 2]),
        ([0.0, 4.0, 1.0, 5.0], vec![0, 0, 0, 0, 2]),
        ([-7.0, 1.0, 99.0, 5.0], vec![0, 1, 1, 1, 1]),
    ] {
        let rows = [3.0, 0.0, 9.0, 1.0, -1.0];
        let inputs = [x.clone(), w.clone(), i32s(&[4], &offsets), i32s(&[5], &rows)];
        let out = evaluate(&c, &bound_to(&c, &inputs, &[]), &inputs).unwrap_or_else(|e| panic!("{e}"));
        let mut expect = Vec::new();
        for (n, e) in experts.iter().enumerate() {
            for f in 0..2 {
                let row = rows[n];
                // A gather out of range reads 0.
                let a = |d: usize| if (0.0..4.0).contains(&row) { x.data[row as usize * 3 + d] } else { 0.0 };
                expect.push((0..3).map(|d| a(d) * w.data[e * 6 + d * 2 + f]).sum());
            }
        }
        close(&out[0].data, &expect);
    }
}

#[test]
fn checked_mode_names_the_place() {
    let c = cascade(MOE);
    let inputs = [
        wave(DType::BF16, &[4, 3], 0.1),
        wave(DType::BF16, &[1, 3, 2], 0.2),
        i32s(&[2], &[0.0, 2.0]),
        i32s(&[2], &[3.0, 4.0]),
    ];
    let options = Options { checked: true, ..Options::default() };
    let b = bound_to(&c, &inputs, &[]);
    let Err(EvalError::OutOfRange { tensor, dim, position, extent, span }) =
        evaluate_all(&c, &b, &inputs, &options).map(|_| ())
    else {
        panic!("a gather out of range is an error")
    };
    assert_eq!((tensor.as_str(), dim, position, extent), ("x", 0, 4, 4));
    assert_eq!(&MOE[span.start as usize..span.end as usize], "x[src[n],d]");
}
