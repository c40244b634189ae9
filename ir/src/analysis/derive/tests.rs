//! Derived forms against the cascades they come from.

use super::super::precise::Stream;
use super::super::samples::{self, one};
use super::*;
use crate::array::Array;
use crate::cascade::bind::{Given, bind};
use crate::cascade::eval::declared::Rounding;
use crate::cascade::eval::{Options, evaluate, evaluate_declared};
use crate::cascade::print::print_cascade;
use crate::tolerance::expect;

/// Random inputs of a cascade at these extents; integers index below 2.
fn inputs(c: &Cascade, sizes: &[(&str, u64)], seed: u64, spread: f64) -> (crate::cascade::bind::Bindings, Vec<Array>) {
    let size = |r: &crate::cascade::Rank| {
        let n = sizes.iter().find(|s| s.0 == r.name).map_or(2, |s| s.1);
        (r.name.clone(), r.fixed.unwrap_or(n))
    };
    let given = Given { sizes: c.ranks.iter().map(|(_, r)| size(r)).collect(), ..Given::default() };
    let b = bind(c, &given).expect("bindings");
    let mut random = Stream(seed);
    let inputs = c
        .params
        .iter()
        .map(|t| {
            let dims = b.dims(c, *t).expect("dims");
            let dtype = c.tensors[*t].dtype;
            Array::from_fn(dtype, &dims, |_| {
                if dtype.is_float() {
                    if dims.is_empty() { random.within(0.2, 1.5) } else { random.within(-spread, spread) }
                } else {
                    (random.unit() * 2.0).floor()
                }
            })
        })
        .collect();
    (b, inputs)
}

/// Evaluates both and compares wherever the original is finite; returns the derived text.
fn same(c: &Cascade, d: &Cascade, sizes: &[(&str, u64)]) -> String {
    let text = print_cascade(d);
    for (seed, spread) in [(1, 1.0), (2, 3.0), (3, 0.1)] {
        let (b, x) = inputs(c, sizes, seed, spread);
        let want = evaluate(c, &b, &x).expect("original");
        let have = evaluate(d, &b, &x).unwrap_or_else(|e| panic!("{e:?}\n{text}"));
        for (w, h) in want.iter().zip(&have) {
            assert_eq!(w.dims, h.dims);
            let scale = w.data.iter().filter(|x| x.is_finite()).fold(1e-3, |m: f64, x| m.max(x.abs()));
            for (i, (a, b)) in w.data.iter().zip(&h.data).enumerate() {
                let fine = a.is_nan() || a == b || (a - b).abs() <= 1e-9 * scale;
                assert!(fine, "element {i}: {a} against {b}\n{text}");
                assert!(!b.is_nan() || a.is_nan(), "element {i} is NaN\n{text}");
            }
        }
    }
    text
}

/// The printed form reads back as the same cascade.
fn reads_back(text: &str) {
    let again = one(text);
    assert_eq!(print_cascade(&again), text);
}

const ROWS: &[(&str, u64)] = &[("M", 5), ("N", 4), ("K", 6), ("E", 3), ("F", 3)];

fn table() -> Vec<(String, &'static str)> {
    let mut all: Vec<(String, &'static str)> =
        vec![(samples::attention(), "N"), (samples::layernorm(false), "K"), (samples::layernorm(true), "K")];
    for t in [
        samples::DEFERRED,
        samples::UNSTABILISED,
        samples::UNSTABILISED_DEFERRED,
        samples::LSE,
        samples::CROSS_ENTROPY,
        samples::VARIANCE,
        samples::THIRD,
        samples::ENTROPY,
        samples::SOFTMAX,
    ] {
        all.push((t.into(), "N"));
    }
    for t in [samples::RMS_MATMUL, samples::LAYERNORM, samples::AMAX] {
        all.push((t.into(), "K"));
    }
    all
}

#[test]
fn derived_forms_agree_with_the_text_and_read_back() {
    for (t, r) in table() {
        let c = one(&t);
        let rank = c.rank(r).unwrap();
        let d = derive(&c, rank).unwrap_or_else(|| panic!("nothing derived:\n{t}"));
        let text = same(&c, &d.cascade, ROWS);
        reads_back(&text);
        let levels = super::super::passes::passes_over(&d.cascade, &[rank]).max;
        let kept = d.cascade.outputs.iter().any(|o| o.dims.contains(&Size::Rank(rank)));
        assert_eq!(levels, if kept { 2 } else { 1 }, "{text}");
    }
}

#[test]
fn empty_fibers_have_the_values_of_the_text() {
    // Every row is masked: attention is 0 and log-sum-exp −∞.
    let masked = samples::attention().replace("where n <= m + (N - M)", "where n < 0");
    let c = one(&masked);
    let d = derive(&c, c.rank("N").unwrap()).unwrap();
    let (b, x) = inputs(&c, ROWS, 7, 1.0);
    assert!(evaluate(&d.cascade, &b, &x).unwrap()[0].data.iter().all(|v| *v == 0.0));
    let lse = samples::LSE
        .replace("max(n) S[m,n]", "max(n) S[m,n] where n < m")
        .replace("sum(n) exp(S[m,n] - X[m])", "sum(n) exp(S[m,n] - X[m]) where n < m");
    let c = one(&lse);
    let d = derive(&c, c.rank("N").unwrap()).unwrap();
    let (b, x) = inputs(&c, ROWS, 7, 1.0);
    let out = &evaluate(&d.cascade, &b, &x).unwrap()[0];
    assert_eq!(out.data[0], f64::NEG_INFINITY);
    assert!(out.data[1].is_finite());
    // An empty rank.
    for (t, r) in table() {
        if t.contains("target") {
            continue;
        }
        let c = one(&t);
        let d = derive(&c, c.rank(r).unwrap()).unwrap();
        same(&c, &d.cascade, &[("M", 2), (r, 0)]);
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for t in [samples::UNSTABILISED, samples::UNSTABILISED_DEFERRED, samples::ENTROPY] {
        let c = one(t);
        let d = derive(&c, c.rank("N").unwrap()).unwrap();
        let (b, x) = inputs(&c, ROWS, 9, 900.0);
        let out = evaluate(&d.cascade, &b, &x).unwrap();
        assert!(out[0].data.iter().all(|v| v.is_finite()), "{}", print_cascade(&d.cascade));
    }
}

#[test]
fn policies_follow_ranges() {
    let of = |t: &str, r: &str| {
        let c = one(t);
        policies(&c, c.rank(r).unwrap())
    };
    use Policy::*;
    assert_eq!(of(&samples::attention(), "N"), Some(vec![Rolling, Lazy, Tree]));
    let capped = samples::attention_with("", &format!("30.0 * tanh({} / 30.0)", samples::QK), "where n <= m");
    assert_eq!(of(&capped, "N"), Some(vec![Hoist, Rolling, Lazy, Tree]));
    let far = capped.replace("30.0", "300.0");
    assert_eq!(of(&far, "N"), Some(vec![Rolling, Lazy, Tree]));
    assert_eq!(of(samples::RMS_MATMUL, "K"), Some(vec![Hoist, Tree]));
    assert_eq!(of(samples::SIGMOID, "N"), None);
    assert_eq!(of(samples::FP8, "K"), None);
    assert_eq!(of(samples::RMS_MATMUL, "F"), None);
    assert_eq!(of(&samples::attention(), "E"), Some(vec![]));
    // The hoisted form is exact too.
    let c = one(&capped);
    let d = derive_with(&c, c.rank("N").unwrap(), Hoist).unwrap();
    assert!(d.stream.is_none() && d.anchors.is_empty());
    same(&c, &d.cascade, ROWS);
    let c = one(&samples::attention());
    assert!(derive_with(&c, c.rank("N").unwrap(), Hoist).is_none());
}

#[test]
fn a_learnable_sink_starts_the_anchor() {
    let text = "cascade sink[M, N, F](S: f32[M,N], V: f32[N,F], sink: f32[M]) -> (O: f32[M,F]) {
        X[m] = max(sink[m], max(n) S[m,n])
        P[m,n] = exp(S[m,n] - X[m])
        L[m] = exp(sink[m] - X[m]) + (sum(n) P[m,n])
        O[m,f] = sum(n) P[m,n] / L[m] * V[n,f]
    }";
    let c = one(text);
    let d = derive(&c, c.rank("N").unwrap()).unwrap();
    assert!(matches!(d.cascade.exprs[d.anchors[0].initial], Expr::Read { .. }));
    same(&c, &d.cascade, ROWS);
    same(&c, &d.cascade, &[("M", 2), ("N", 0)]);
}

/// The derived text of a cascade over N, which agrees with its text.
fn derived_text(signature: &str, body: &str) -> (Cascade, Cascade, String) {
    let c = one(&format!("cascade c[M, N]({signature}) {{\n{body}\n}}"));
    let d = derive(&c, c.rank("N").unwrap()).unwrap_or_else(|| panic!("nothing derived:\n{body}"));
    let text = same(&c, &d.cascade, ROWS);
    reads_back(&text);
    assert_eq!(super::super::check::check(&c, &d), Ok(()), "{text}");
    (c, d.cascade, text)
}

#[test]
fn centred_forms_are_carried_relative_to_an_element_of_the_fiber() {
    let x = "x: f32[M,N]";
    let (_, _, text) = derived_text(
        &format!("{x}, z: f32[N,M]) -> (y: f32[M]"),
        "u[m] = (sum(n) x[m,n]) / N\n v[m] = (sum(n) z[n,m]) / N\n y[m] = (sum(n) (x[m,n] - u[m]) * (z[n,m] - v[m])) / N",
    );
    assert!(text.contains("x_first[m] = max(min(if abs(x[m,0]) < inf then x[m,0] else 0.0, if 1 < N"), "{text}");
    assert!(text.contains("z_first[m] = max(min(if abs(z[0,m]) < inf then z[0,m] else 0.0, if 1 < N"), "{text}");
    assert!(text.contains("z_centred[n,m] = z[n,m] - z_first[m]"), "{text}");
    // Weights, and a sum of two inputs as one variable.
    let (_, _, text) = derived_text(
        &format!("{x}, w: f32[N]) -> (y: f32[M]"),
        "l[m] = sum(n) exp(w[n])\n u[m] = (sum(n) exp(w[n]) * x[m,n]) / l[m]\n \
         y[m] = sum(n) exp(w[n]) * (x[m,n] - u[m]) * (x[m,n] - u[m])",
    );
    assert!(text.contains("x_centred"), "{text}");
    let (_, _, text) = derived_text(
        &format!("{x}, p: f32[N]) -> (y: f32[M]"),
        "h[m,n] = x[m,n] + p[n]\n u[m] = (sum(n) h[m,n]) / N\n y[m] = (sum(n) (h[m,n] - u[m]) * (h[m,n] - u[m])) / N",
    );
    assert_eq!(text.matches("_first[m] =").count(), 1, "{text}");
    assert!(!text.contains("x[m,n] * x[m,n]"), "{text}");
    // What is no centred form keeps its sums: a shift would not leave it.
    for t in [samples::RMS_MATMUL, samples::ENTROPY, samples::UNSTABILISED] {
        let c = one(t);
        let r = if t == samples::RMS_MATMUL { "K" } else { "N" };
        let text = print_cascade(&derive(&c, c.rank(r).unwrap()).unwrap().cascade);
        assert!(!text.contains("_first"), "{text}");
    }
}

#[test]
fn an_anchor_is_an_element_that_counts() {
    let (c, d, text) = derived_text(
        "x: f32[M,N]) -> (y: f32[M]",
        "l[m] = sum(n) 1.0 where n > m\n s[m] = sum(n) x[m,n] where n > m\n u[m] = s[m] / l[m]\n \
         y[m] = sum(n) (x[m,n] - u[m]) * (x[m,n] - u[m]) where n > m",
    );
    assert!(text.contains("x_first"), "{text}");
    // The first element never counts here, whatever stands there.
    for outside in [f64::NAN, f64::INFINITY, 1e300] {
        let (b, mut given) = inputs(&c, ROWS, 5, 1.0);
        let want = evaluate(&d, &b, &given).unwrap();
        for m in 0..5 {
            given[0].data[m * 4] = outside;
        }
        let have = evaluate(&d, &b, &given).unwrap();
        assert_eq!(have[0].data[..3], want[0].data[..3], "{text}");
    }
    // An infinity that counts gives what the text gives.
    let c = one(samples::VARIANCE);
    let d = derive(&c, c.rank("N").unwrap()).unwrap();
    let (b, mut given) = inputs(&c, ROWS, 5, 1.0);
    given[0].data[0] = f64::INFINITY;
    let (want, have) = (evaluate(&c, &b, &given).unwrap(), evaluate(&d.cascade, &b, &given).unwrap());
    assert_eq!(have[0].data[0], want[0].data[0]);
    assert!(want[1].data[0].is_nan() && have[1].data[0].is_nan());
}

/// The mean of a row and its variance, both results, in f32: the mean is summed as it is written. As an offset from the
/// anchor it would be rounded at the anchor's distance, beyond what roundings of its own sum come to.
#[test]
fn means_that_are_results_are_as_exact_as_their_sums() {
    let (c, d, text) = derived_text(
        "x: f32[M,N]) -> (u: f32[M], v: f32[M]",
        "u[m] = (sum(n) x[m,n]) / N\n v[m] = (sum(n) (x[m,n] - u[m]) * (x[m,n] - u[m])) / N",
    );
    assert!(text.contains("x_centred"), "{text}");
    let options = Options::default();
    for seed in 0..40 {
        let (b, mut x) = inputs(&c, &[("M", 1), ("N", 65)], seed, 1.0);
        // The anchor, a median of three, is far from a mean near 0.
        x[0].data[..3].fill(3.7);
        let rest: f64 = x[0].data.iter().sum();
        x[0].data[64] = f64::from((x[0].data[64] - rest + 1e-3) as f32);
        x[0].data.iter_mut().for_each(|v| *v = f64::from(*v as f32));
        let expected = expect(&c, &b, &x, &options).expect("the text");
        let found = evaluate_declared(&d, &b, &x, &options, seed, Rounding::Nearest).expect("the derived form");
        let (name, u) = found.results().remove(0);
        expected[0].compare(&u.values).unwrap_or_else(|why| panic!("{name}, seed {seed}: {why}\n{text}"));
    }
}

/// A row normalised by its own mean and variance: rows far from 0, rows whose first element is far from the others, and
/// plain ones are within the tolerance of the text; sums of the elements themselves and one element as the anchor are not.
#[test]
fn normalised_rows_are_as_exact_as_their_text() {
    let c = one("cascade c[M, N, K](x: f32[M,N], z: f32[M,K]) -> (y: f32[M,K]) {
        u[m] = (sum(n) x[m,n]) / N
        v[m] = (sum(n) (x[m,n] - u[m]) * (x[m,n] - u[m])) / N
        y[m,k] = (z[m,k] - u[m]) / sqrt(v[m] + 1e-5)
    }");
    let rank = c.rank("N").unwrap();
    let d = derive(&c, rank).unwrap();
    let text = print_cascade(&d.cascade);
    assert_eq!(super::super::check::check(&c, &d), Ok(()), "{text}");
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    assert!(lines.contains(&"y[m,k] = (z[m,k] - u[m]) / sqrt(v[m] + 1e-5)"), "{text}");
    let raw = finished(&c, &inline(&c), rank, Policy::Rolling, Finish::Outputs, |_, _| true).unwrap().cascade;
    let median = text.lines().find(|l| l.contains("x_first[m] =")).unwrap();
    let alone = one(&text.replace(median, "    x_first[m] = x[m,0]"));
    let options = Options::default();
    // Whether all rows drawn about `mean` are within the tolerance by a form; the first elements are `far` above it.
    let fits = |form: &Cascade, (mean, far, n): (f64, f64, u64)| {
        (0..3).all(|seed| {
            let (m, k) = (32usize, 12usize);
            let (b, mut x) = inputs(&c, &[("M", m as u64), ("N", n), ("K", k as u64)], seed, 1.0);
            let mut random = Stream(seed + n);
            let mut normal = || (0..12).map(|_| random.unit()).sum::<f64>() - 6.0;
            x[0].data.iter_mut().for_each(|v| *v = f64::from((normal() + mean) as f32));
            for row in 0..m {
                let at = row * n as usize;
                x[0].data[at] += far;
                let (from, to) = x.split_at_mut(1);
                to[0].data[row * k..][..k].copy_from_slice(&from[0].data[at..][..k]);
            }
            let want = &expect(&c, &b, &x, &options).unwrap()[0];
            let found = evaluate_declared(form, &b, &x, &options, seed, Rounding::Nearest).unwrap();
            want.compare(&found.results().remove(0).1.values).is_ok()
        })
    };
    for rows in
        [(0.0, 0.0, 16), (0.0, 0.0, 257), (10.0, 0.0, 65), (1000.0, 0.0, 65), (0.0, 30.0, 257), (0.0, 1000.0, 257)]
    {
        assert!(fits(&d.cascade, rows), "{rows:?}\n{text}");
    }
    for (form, rows) in [(&raw, (10.0, 0.0, 65)), (&raw, (1000.0, 0.0, 65)), (&alone, (0.0, 30.0, 257))] {
        assert!(!fits(form, rows), "{rows:?}\n{}", print_cascade(form));
    }
}

/// Softmax of scaled elements: exponentials are relative to the maximum, whatever factor the maximum was freed of.
#[test]
fn scaled_exponentials_have_an_anchor() {
    for scale in ["x[m,n] * 0.5", "x[m,n] / sqrt(N)", "x[m,n] * 0.5 + b[m]", "-2.0 * x[m,n]"] {
        let (c, d, text) = derived_text(
            "x: f32[M,N], b: f32[M]) -> (y: f32[M]",
            &format!("T[m,n] = {scale}\n u[m] = max(n) T[m,n]\n y[m] = sum(n) exp(T[m,n] - u[m])"),
        );
        assert!(text.contains("iter"), "{scale}\n{text}");
        let (b, x) = inputs(&c, ROWS, 3, 1e4);
        let (want, have) = (evaluate(&c, &b, &x).unwrap(), evaluate(&d, &b, &x).unwrap());
        for (w, h) in want[0].data.iter().zip(&have[0].data) {
            assert!((w - h).abs() <= 1e-9 * w.abs(), "{scale}: {w} against {h}\n{text}");
        }
    }
}

/// A sum over points that are none leaves the others as they are; where it divides, it is not joined with them.
#[test]
fn a_fiber_of_no_points_is_nothing_to_another() {
    let text = |last: &str| {
        one(&format!(
            "cascade c[M, N](x: f32[M,N], k: i32[M]) -> (y: f32[M]) {{
                 u[m] = max(n) x[m,n] where n < k[m]
                 e[m] = sum(n) exp(x[m,n] - u[m]) where n < k[m]
                 v[m] = sum(n) {last}
                 y[m] = 2.0 * e[m] - v[m] }}"
        ))
    };
    let c = text("x[m,n]");
    let d = derive(&c, c.rank("N").unwrap()).expect("a form").cascade;
    let (b, mut x) = inputs(&c, ROWS, 3, 1.0);
    x[1].data.iter_mut().enumerate().for_each(|(m, k)| *k = (m % 2) as f64);
    let (want, have) = (evaluate(&c, &b, &x).unwrap(), evaluate(&d, &b, &x).unwrap());
    for (w, h) in want[0].data.iter().zip(&have[0].data) {
        assert!((w - h).abs() <= 1e-9 * (1.0 + w.abs()), "{w} against {h}\n{}", print_cascade(&d));
    }
}
