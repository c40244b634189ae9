//! One test per rule of the language: support, running reductions, joins, in-place parameters, iteration, monoids,
//! random values, casts, empty extents and limits.

use super::*;

const INF: f64 = f64::INFINITY;

/// Results by name, in-place parameters included.
fn results(text: &str, inputs: &[Array], sizes: &[(&str, u64)]) -> Vec<(String, Elements<f64>)> {
    let c = cascade(text);
    let b = bound_to(&c, inputs, sizes);
    evaluate_all(&c, &b, inputs, &Options::default()).unwrap_or_else(|e| panic!("{e}")).results()
}

fn values(text: &str, inputs: &[Array], sizes: &[(&str, u64)]) -> Vec<f64> {
    results(text, inputs, sizes).remove(0).1.values
}

fn error(text: &str, inputs: &[Array], sizes: &[(&str, u64)], options: &Options) -> String {
    let c = cascade(text);
    let b = bound_to(&c, inputs, sizes);
    match evaluate_all(&c, &b, inputs, options) {
        Ok(_) => panic!("it evaluates"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn a_filter_on_free_indices_leaves_points_to_else() {
    let x = f32s(&[4], &[1.0, 2.0, 3.0, 4.0]);
    let text = "cascade t[N](x: f32[N]) -> (y: f32[N]) { y[n] = 10 * x[n] where n % 2 == 1 else -1 }";
    assert_eq!(values(text, &[x], &[]), [-1.0, 20.0, -1.0, 40.0]);
}

#[test]
fn support_propagates_by_intersection_and_reductions_run_over_it() {
    let x = f32s(&[2, 4], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    let text = "cascade t[M, N](x: f32[M, N]) -> (s: f32[M], z: f32[M, N], c: f32[M], l: f32[M]) {
        a[m,n] = x[m,n] where n >= 1
        b[m,n] = x[m,n] where n + 3 * m <= 2
        p[m,n] = a[m,n] * b[m,n]
        s[m]   = sum(n) p[m,n]
        z[m,n] = p[m,n] else 0.5
        c[m]   = sum(n) 1 where p[m,n] > 0 else -5
        l[m]   = max(n) p[m,n]
    }";
    let out = results(text, &[x], &[]);
    assert_eq!(out[0].1.values, [4.0 + 9.0, 0.0]);
    assert_eq!(out[1].1.values, [0.5, 4.0, 9.0, 0.5, 0.5, 0.5, 0.5, 0.5]);
    assert_eq!(out[2].1.values, [2.0, 0.0]);
    assert_eq!(out[3].1.values, [9.0, -INF]);
    let c = cascade(text);
    let x = f32s(&[2, 4], &[1.0; 8]);
    let b = bound_to(&c, std::slice::from_ref(&x), &[]);
    let e = evaluate_all(&c, &b, &[x], &Options::default()).unwrap_or_else(|e| panic!("{e}"));
    let p = e.tensor("p").expect("an intermediate is kept");
    assert_eq!(p.support, Some(vec![false, true, true, false, false, false, false, false]));
}

#[test]
fn only_the_chosen_branch_counts() {
    let x = f32s(&[3], &[-1.0, 4.0, f64::NAN]);
    let text = "cascade t[N](x: f32[N]) -> (y: f32[N], z: f32) {
        a[n] = sqrt(x[n]) where n == 1
        y[n] = if n == 1 then a[n] else 7 else 99
        z    = sum(n) (if n == 2 then 0 else x[n])
    }";
    let out = results(text, &[x], &[]);
    assert_eq!(out[0].1.values, [7.0, 2.0, 7.0]);
    assert_eq!(out[1].1.values, [3.0]);
}

#[test]
fn a_conjunct_restricts_the_reductions_that_bind_its_indices() {
    let x = f32s(&[3, 4], &[1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0, 100.0, 200.0, 300.0, 400.0]);
    let text = "cascade t[M, N](x: f32[M, N]) -> (y: f32[M]) {
        y[m] = (sum(n) x[m,n]) / (sum(n) 1) where n < m + 1 and m < 2 else 9
    }";
    assert_eq!(values(text, std::slice::from_ref(&x), &[]), [1.0, 15.0, 9.0]);
    let nested = "cascade t[M, N](x: f32[M, N]) -> (y: f32) {
        y = sum(m) (max(n) x[m,n]) where n <= m and m != 1
    }";
    assert_eq!(values(nested, &[x], &[]), [1.0 + 300.0]);
}

#[test]
fn running_reductions() {
    let x = f32s(&[2, 4], &[1.0, -2.0, 3.0, 4.0, 0.5, 0.5, -3.0, 8.0]);
    let text = "cascade t[M, N](x: f32[M, N], d: i32[N]) -> (s: f32[M, N], h: f32[M, N], e: f32[M, N], w: f32[M]) {
        s[m,n] = cumsum(n) x[m,n]
        h[m,n] = x[m,n] + 2 * (cummax(n) x[m,n])
        e[m,n] = cumsum(n) x[m,n] where d[n] == 1 else -1
        w[m]   = sum(n) s[m,n] * x[m,n]
    }";
    let out = results(text, &[x, i32s(&[4], &[0.0, 1.0, 0.0, 1.0])], &[]);
    assert_eq!(out[0].1.values, [1.0, -1.0, 2.0, 6.0, 0.5, 1.0, -2.0, 6.0]);
    assert_eq!(out[1].1.values, [3.0, 0.0, 9.0, 12.0, 1.5, 1.5, -2.0, 24.0]);
    // A removed point neither adds nor has a value.
    assert_eq!(out[2].1.values, [-1.0, -2.0, -1.0, 2.0, -1.0, 0.5, -1.0, 8.5]);
    assert_eq!(out[3].1.values, [1.0 + 2.0 + 6.0 + 24.0, 0.25 + 0.5 + 6.0 + 48.0]);
}

#[test]
fn joined_writes_collide_and_drop_what_is_out_of_range() {
    let text = "cascade t[N, M](x: f32[N], d: i32[N], z: f32[M]) -> (y: f32[M], w: f32[M]) {
        y[d[n]] += x[n]
        w[m] = y[m] + z[m]
    }";
    let inputs =
        [f32s(&[5], &[1.0, 2.0, 3.0, 4.0, 5.0]), i32s(&[5], &[2.0, 0.0, 2.0, -1.0, 3.0]), f32s(&[3], &[0.0; 3])];
    assert_eq!(values(text, &inputs, &[]), [2.0, 0.0, 4.0]);
    let checked = Options { checked: true, ..Options::default() };
    let message = error(text, &inputs, &[], &checked);
    assert_eq!(message, "y: position -1 of dimension 0 is outside 0..3; check the index tensor");
}

#[test]
fn in_place_parameters_keep_what_is_not_written() {
    let text = "cascade t[C, H](inout cache: f32[C, H], row: f32[H], place: i32) -> (y: f32[H]) {
        cache[place,h] = row[h]
        y[h] = sum(c) cache[c,h]
    }";
    let cache = f32s(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let row = f32s(&[2], &[10.0, 20.0]);
    let out = results(text, &[cache.clone(), row.clone(), Array::scalar(DType::I32, 1.0)], &[]);
    assert_eq!(out[0].1.values, [16.0, 28.0]);
    assert_eq!(out[1].0, "cache");
    assert_eq!(out[1].1.values, [1.0, 2.0, 10.0, 20.0, 5.0, 6.0]);
    let out = results(text, &[cache, row, Array::scalar(DType::I32, 3.0)], &[]);
    assert_eq!(out[1].1.values, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
}

#[test]
fn a_statement_updates_an_in_place_parameter() {
    let text = "cascade t[N](inout x: f32[N]) -> () { x[n] = 2 * x[n] + n where n != 2 }";
    assert_eq!(values(text, &[f32s(&[4], &[1.0, 2.0, 3.0, 4.0])], &[]), [2.0, 5.0, 3.0, 11.0]);
}

#[test]
fn iteration_in_both_directions() {
    let text = "cascade t[T](x: f32[T], a: f32) -> (y: f32[T] = h[1..], z: f32[T] = k[0..T], last: f32 = h[T]) {
        iter t in T {
            h[0] = a
            h[t+1] = 0.5 * h[t] + x[t]
        }
        iter t in T rev {
            k[T] = a
            k[t] = 0.5 * k[t+1] + x[t]
        }
    }";
    let a = Array::scalar(DType::F32, 8.0);
    let out = results(text, &[f32s(&[3], &[1.0, 2.0, 3.0]), a.clone()], &[]);
    assert_eq!(out[0].1.values, [5.0, 4.5, 5.25]);
    assert_eq!(out[1].1.values, [1.0 + 0.5 * 5.5, 5.5, 7.0]);
    assert_eq!(out[2].1.values, [5.25]);
    let out = results(text, &[f32s(&[0], &[]), a], &[]);
    assert_eq!((out[0].1.values.len(), out[2].1.values[0]), (0, 8.0));
}

#[test]
fn a_user_monoid_agrees_with_the_direct_formula() {
    let text = include_str!("../../../../../kernels/welford.ein");
    let x = wave(DType::F32, &[3, 7], 0.4);
    let out = run(text, std::slice::from_ref(&x), &[]);
    for m in 0..3 {
        let row = &x.data[m * 7..m * 7 + 7];
        let mean = row.iter().sum::<f64>() / 7.0;
        let var = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / 7.0;
        close(&[out[0].data[m], out[1].data[m]], &[mean, var]);
    }
}

#[test]
fn top_k_of_filtered_rows() {
    let x = f32s(&[2, 5], &[5.0, 1.0, 9.0, 9.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let text = "cascade t[M, N](x: f32[M, N]) -> (v: f32[M, 3], p: i32[M, 3]) {
        (v[m,j], p[m,j]) = topk(n, 3) x[m,n] where n < 4 - 2 * m
    }";
    let out = run(text, &[x], &[]);
    assert_eq!(out[0].data, [9.0, 9.0, 5.0, 2.0, 1.0, -INF]);
    assert_eq!(out[1].data, [2.0, 3.0, 0.0, 1.0, 0.0, -1.0]);
}

#[test]
fn random_values_follow_their_coordinates() {
    let text = "cascade t[M, N](seed: i32, x: f32[M, N]) -> (y: f32[M, N]) { y[m,n] = rand(seed, m, n) + 0 * x[m,n] }";
    let out = values(text, &[Array::scalar(DType::I32, 7.0), f32s(&[2, 3], &[0.0; 6])], &[]);
    for (i, y) in out.iter().enumerate() {
        assert_eq!(*y, philox::uniform(7, [i as i64 / 3, i as i64 % 3, 0, 0]));
        assert!((0.0..1.0).contains(y));
    }
}

#[test]
fn casts_and_integer_arithmetic() {
    let text = "cascade t[N](x: f32[N], i: i32[N]) -> (a: f32[N], b: i32[N], c: i32[N], d: i32[N], e: f32[N]) {
        a[n] = f8e4m3(x[n])
        b[n] = i32(x[n])
        c[n] = i[n] / 3
        d[n] = i[n] % 3
        e[n] = i[n] / 2.0
    }";
    let out = run(text, &[f32s(&[4], &[-1.7, 500.0, 0.3, f64::NAN]), i32s(&[4], &[-7.0, 7.0, -1.0, 3.0])], &[]);
    close(&out[0].data, &[-1.75, 448.0, 0.3125, f64::NAN]);
    assert_eq!(out[1].data, [-1.0, 500.0, 0.0, 0.0]);
    assert_eq!(out[2].data, [-3.0, 2.0, -1.0, 1.0]);
    assert_eq!(out[3].data, [2.0, 1.0, 2.0, 0.0]);
    assert_eq!(out[4].data, [-3.5, 3.5, -0.5, 1.5]);
}

#[test]
fn log_sum_exp_of_infinities() {
    let text = "cascade t[M, N](x: f32[M, N]) -> (y: f32[M]) { y[m] = logsumexp(n) x[m,n] }";
    let x = f32s(&[4, 2], &[-INF, -INF, -INF, 1.0, INF, -INF, f64::NAN, 0.0]);
    close(&values(text, &[x], &[]), &[-INF, 1.0, INF, f64::NAN]);
    // Far beyond the range of exp.
    close(&values(text, &[f32s(&[1, 2], &[1e6, 1e6])], &[]), &[1e6 + 2f64.ln()]);
}

#[test]
fn zero_extents_everywhere() {
    let text = "cascade t[M, N, K](A: f32[M, K], B: f32[K, N]) -> (Y: f32[M, N], t: f32) {
        Y[m,n] = sum(k) A[m,k] * B[k,n]
        t = max(m) (max(n) Y[m,n])
    }";
    for (m, n, k, y, t) in [(0, 3, 2, 0, -INF), (2, 0, 3, 0, -INF), (2, 2, 0, 4, 0.0)] {
        let out =
            run(text, &[f32s(&[m, k], &vec![1.0; (m * k) as usize]), f32s(&[k, n], &vec![1.0; (k * n) as usize])], &[]);
        assert_eq!((out[0].data.len(), out[1].data[0]), (y, t));
        assert!(out[0].data.iter().all(|v| *v == 0.0));
    }
}

#[test]
fn sizes_over_the_limits_are_errors() {
    let text = "cascade t[N, M](x: f32[N]) -> (y: f32[N]) { y[n] = sum(a in M) (sum(b in M) (sum(c in M) x[n])) }";
    let x = f32s(&[2], &[1.0, 2.0]);
    let message = error(text, std::slice::from_ref(&x), &[("M", 1 << 40)], &Options::default());
    assert_eq!(
        message,
        "the number of points of an iteration space is 18446744073709551615, over the limit of 1099511627776; use smaller sizes or raise the limit"
    );
    let text = "cascade t[N, M](x: f32[N]) -> (y: f32[N]) {
        z[n,m] = x[n]
        y[n] = sum(m) z[n,m]
    }";
    let message = error(text, &[x], &[("M", 1 << 30)], &Options::default());
    assert!(message.starts_with("the number of elements up to z [2, 1073741824] is 2147483"), "{message}");
}

#[test]
fn inputs_that_do_not_fit_are_named() {
    let c = cascade("cascade t[N](x: f32[N], k: i32 = 3) -> (y: f32[N]) { y[n] = x[n] * k }");
    let x = f32s(&[2], &[1.0, 2.0]);
    let b = bound_to(&c, std::slice::from_ref(&x), &[]);
    assert_eq!(evaluate(&c, &b, std::slice::from_ref(&x)).map(|o| o[0].data.clone()), Ok(vec![3.0, 6.0]));
    let message = |inputs: &[Array]| evaluate(&c, &b, inputs).map_err(|e| e.to_string()).unwrap_err();
    assert!(message(&[]).starts_with("0 inputs are given for 2 parameters"));
    assert_eq!(message(&[f32s(&[3], &[0.0; 3])]), "x has extents [2] but is given [3]; pass data of that shape");
    assert_eq!(message(&[i32s(&[2], &[0.0; 2])]), "x is declared f32 but is given i32; convert the input");
    let lying = Array { data: vec![1.0], ..x };
    assert_eq!(message(&[lying]), "x has extents [2] but is given [2]; pass data of that shape");
}

#[test]
fn reads_past_an_edge_are_zero() {
    let text = "cascade t[N, K](x: f32[N], w: f32[K]) -> (y: f32[N]) { y[n] = sum(k) w[k] * x[n + k - 1] }";
    let inputs = [f32s(&[4], &[1.0, 2.0, 3.0, 4.0]), f32s(&[3], &[1.0, 10.0, 100.0])];
    assert_eq!(values(text, &inputs, &[]), [210.0, 321.0, 432.0, 43.0]);
}

#[test]
fn sampled_points_of_a_large_product_need_little_memory() {
    let text = "cascade t[M, N, K](A: f32[M, K], B: f32[K, N]) -> (Y: f32[M, N]) {
        P[m,n] = sum(k) A[m,k] * B[k,n]
        Y[m,n] = P[m,n] / (1 + abs(P[m,n]))
    }";
    let (a, b) = (wave(DType::F32, &[4000, 3], 0.1), wave(DType::F32, &[3, 5000], 0.2));
    let c = cascade(text);
    let inputs = [a.clone(), b.clone()];
    let bindings = bound_to(&c, &inputs, &[]);
    let options = Options { limits: Limits { elements: 100_000, points: 1 << 40 }, checked: false };
    let points = [vec![3999, 4999], vec![17, 23]];
    let out = evaluate_points(&c, &bindings, &inputs, &options, 0, &points).unwrap_or_else(|e| panic!("{e}"));
    for (p, y) in points.iter().zip(out) {
        let s: f64 = (0..3).map(|k| a.data[p[0] as usize * 3 + k] * b.data[k * 5000 + p[1] as usize]).sum();
        close(&[y], &[s / (1.0 + s.abs())]);
    }
    let outside = evaluate_points(&c, &bindings, &inputs, &options, 0, &[vec![4000, 0]]);
    assert!(matches!(outside, Err(EvalError::NoSuchPoint { .. })));
}
