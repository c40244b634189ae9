//! On every library cascade: fresh evaluations in the declared types stay within the computed tolerance, planted
//! faults do not.

use std::path::Path;

use super::faults::{Fault, Plant, corruptions};
use super::inputs::{Variant, random};
use super::*;
use crate::cascade::bind::{Given, bind};
use crate::cascade::eval::evaluate;
use crate::cascade::parse;

/// Every cascade of the library, by file name.
fn library() -> Vec<Cascade> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
    let mut files: Vec<_> =
        std::fs::read_dir(folder).expect("the library's folder").flatten().map(|f| f.path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "ein"));
    files.sort();
    let mut all = Vec::new();
    for f in files {
        let text = std::fs::read_to_string(&f).expect("a readable file");
        match parse(&text) {
            Ok(m) => all.extend(m.cascades),
            Err(d) => panic!("{}: {}", f.display(), d[0]),
        }
    }
    all
}

fn sized(c: &Cascade, sizes: &[(&str, u64)]) -> Option<Bindings> {
    let sizes = sizes.iter().map(|(n, e)| (n.to_string(), *e)).collect();
    bind(c, &Given { sizes, ..Given::default() }).ok()
}

/// Small odd extents that the cascade's facts allow, different for each `turn`.
fn small(c: &Cascade, turn: usize) -> Bindings {
    const EXTENTS: [u64; 7] = [3, 5, 1, 7, 2, 9, 4];
    for shift in 0..49 {
        let pick = |i: usize| EXTENTS[(i * (1 + shift / 7) + turn * 3 + shift) % 7];
        let free = c.ranks.iter().filter(|(_, r)| r.fixed.is_none());
        let sizes: Vec<(&str, u64)> = free.enumerate().map(|(i, (_, r))| (r.name.as_str(), pick(i))).collect();
        if let Some(b) = sized(c, &sizes) {
            return b;
        }
    }
    panic!("{}: no small extents bind", c.name)
}

fn inputs_of(c: &Cascade, b: &Bindings, seed: u64, v: Variant) -> Vec<Array> {
    random(c, b, seed, v).unwrap_or_else(|e| panic!("{}: {e}", c.name))
}

fn ok<T>(c: &Cascade, r: Result<T, EvalError>) -> T {
    r.unwrap_or_else(|e| panic!("{}: {e}", c.name))
}

#[test]
fn declared_evaluations_stay_within_tolerance() {
    let options = Options::default();
    for c in library() {
        for (turn, variant) in [(0, Variant::Normal), (1, Variant::Ties), (2, Variant::Uniform), (3, Variant::Normal)] {
            let b = small(&c, turn);
            let inputs = inputs_of(&c, &b, 7 + turn as u64, variant);
            let expected = ok(&c, expect(&c, &b, &inputs, &options));
            for seed in 100..106 {
                let fresh = ok(&c, evaluate_declared(&c, &b, &inputs, &options, seed, Rounding::Nearest));
                for (x, (_, a)) in expected.iter().zip(fresh.results()) {
                    // The running bound alone holds, whatever the samples show.
                    for (i, (v, a)) in x.values.iter().zip(&a.values).enumerate() {
                        let d = (v - a).abs();
                        let within = d <= x.bounds[i] * (1.0 + 1e-6) + x.dtype.ulp(0.0) || v == a || v.is_nan();
                        assert!(within || !x.dtype.round(*v).is_finite(), "{}: {a} for {v} ± {}", c.name, x.bounds[i]);
                    }
                    if let Err(m) = x.compare(&a.values) {
                        panic!("{} at {:?}, {variant:?}: {m}", c.name, b.extents);
                    }
                }
            }
        }
    }
}

/// One cascade of this text at these sizes, its inputs and what is expected of them.
fn expected_of(text: &str, sizes: &[(&str, u64)], variant: Variant) -> (Cascade, Bindings, Vec<Array>, Vec<Expected>) {
    let module = parse(text).unwrap_or_else(|d| panic!("{}", d[0]));
    let c = module.cascades.into_iter().next().expect("one cascade");
    let b = sized(&c, sizes).expect("it binds");
    let inputs = inputs_of(&c, &b, 5, variant);
    let expected = ok(&c, expect(&c, &b, &inputs, &Options::default()));
    (c, b, inputs, expected)
}

#[test]
fn small_integers_are_bit_exact() {
    let text = "cascade t[M, N, K](A: bf16[M, K], B: bf16[K, N]) -> (Y: f32[M, N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }";
    let sizes = [("M", 5), ("N", 3), ("K", 129)];
    let (c, b, inputs, expected) = expected_of(text, &sizes, Variant::Integers);
    assert_eq!(expected[0].deviation, 0.0);
    let fresh = ok(&c, evaluate_declared(&c, &b, &inputs, &Options::default(), 50, Rounding::Nearest));
    assert_eq!(ok(&c, fresh.output(0)).values, expected[0].values);
    // One ulp stays, a unit does not.
    let mut wrong = expected[0].values.clone();
    wrong[7] += 1.0;
    let m = expected[0].compare(&wrong).expect_err("a unit is more than an ulp");
    assert_eq!((m.at, m.wrong, m.elements), (vec![2, 1], 1, 15));
}

#[test]
fn classes_of_values_must_match() {
    let text = "cascade t[N](x: f32[N]) -> (y: f16[N], i: i32) {
        y[n] = x[n] * 2.0
        i = argmax(n) x[n]
    }";
    let (c, b, _, _) = expected_of(text, &[("N", 5)], Variant::Normal);
    let data = vec![1.0, f64::NAN, f64::INFINITY, 1e6, 32752.0];
    let inputs = [Array::new(DType::F32, &[5], data).expect("five elements")];
    let x = ok(&c, expect(&c, &b, &inputs, &Options::default()));
    let right = [2.0, f64::NAN, f64::INFINITY, f64::INFINITY, 65504.0];
    assert!(x[0].compare(&right).is_ok());
    for (i, wrong) in [(1, 0.0), (2, 65504.0), (2, f64::NAN), (3, 65504.0), (3, f64::NEG_INFINITY), (0, f64::INFINITY)]
    {
        let mut values = right;
        values[i] = wrong;
        assert_eq!(x[0].compare(&values).expect_err("another class").at, [i as u64]);
    }
    // Positions are exact.
    assert!(x[1].compare(&[1.0]).is_ok() && x[1].compare(&[2.0]).is_err());
    assert!(x[0].compare(&right[..4]).is_err());
}

#[test]
fn uncertain_choices_have_no_bound() {
    let text = "cascade t[N](x: f32[N], y: f32[N]) -> (z: f32[N]) {
        z[n] = if x[n] * 1.1 - y[n] * 1.1 > 0 then 1.0 else -1.0
    }";
    let (c, b, _, _) = expected_of(text, &[("N", 2)], Variant::Normal);
    let of = |d: [f64; 2]| Array::new(DType::F32, &[2], d.to_vec()).expect("two elements");
    let x = ok(&c, expect(&c, &b, &[of([3.0, 3.0]), of([3.0, 2.0])], &Options::default()));
    assert_eq!((x[0].bounds[0], x[0].bounds[1]), (f64::INFINITY, 0.0));
}

#[test]
fn block_scaled_outputs_are_quantised_by_block() {
    let text = "cascade t[N](x: f32[N]) -> (y: f8e4m3[N] scaled(f32, 4)) { y[n] = x[n] }";
    let (c, b, inputs, expected) = expected_of(text, &[("N", 11)], Variant::Normal);
    let fresh = ok(&c, evaluate_declared(&c, &b, &inputs, &Options::default(), 9, Rounding::Nearest));
    let y = ok(&c, fresh.output(0)).values;
    assert!(expected[0].compare(&y).is_ok() && y != expected[0].values);
    // The largest of a block is exact up to the scale's rounding.
    for (v, q) in inputs[0].data.chunks(4).zip(y.chunks(4)) {
        let largest = |s: &[f64]| s.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        assert!((largest(v) - largest(q)).abs() <= 1e-6 * largest(v));
    }
}

#[test]
fn chosen_points_have_the_whole_tensors_values() {
    let text = "cascade t[M, K](x: bf16[M, K]) -> (y: bf16[M]) { y[m] = sum(k) x[m,k] * x[m,k] }";
    let (c, b, inputs, whole) = expected_of(text, &[("M", 7), ("K", 65)], Variant::Normal);
    let points = [vec![6], vec![2]];
    let some = ok(&c, expect_points(&c, &b, &inputs, &Options::default(), 0, &points));
    for (k, m) in [6, 2].into_iter().enumerate() {
        assert_eq!((some.values[k], some.bounds[k]), (whole[0].values[m], whole[0].bounds[m]));
        assert!(some.admits(k, DType::BF16.round(some.values[k])));
    }
}

#[test]
fn sampled_points_agree_with_the_whole() {
    for c in library() {
        let b = small(&c, 1);
        let inputs = inputs_of(&c, &b, 3, Variant::Normal);
        let whole = ok(&c, evaluate(&c, &b, &inputs));
        for (i, w) in whole.iter().enumerate() {
            let points: Vec<Vec<u64>> = (0..w.data.len()).step_by(2).map(|k| w.coordinates(k)).collect();
            let alone = ok(&c, evaluate_points(&c, &b, &inputs, &Options::default(), i, &points));
            for (k, x) in alone.iter().enumerate() {
                let y = w.data[2 * k];
                assert!(
                    x == &y || (x - y).abs() <= 1e-13 * y.abs() || (x.is_nan() && y.is_nan()),
                    "{}: {x} {y}",
                    c.name
                );
            }
        }
    }
}

/// Mutants that compute the same function, so that no tolerance can tell: cascade, fault, place, why.
const EQUIVALENT: [(&str, Fault, &str, &str); 5] = [
    (
        "paged_attention",
        Fault::DroppedElement,
        "of X",
        "any finite anchor gives the same softmax; only an overflow would tell, and no outlier drawn stands alone there",
    ),
    ("mean_pool", Fault::DroppedElement, "of C", "the count cancels when the pooled row is normalised"),
    ("mean_pool", Fault::DroppedTile, "of C", "the same"),
    ("mean_pool", Fault::StaleTile, "of C", "the same"),
    ("router", Fault::DroppedElement, "of M", "the values are in descending order: the second is never the maximum"),
];

/// Extents large enough for four tiles of four, so that every mutant differs from its original, and small enough that an
/// outlier often is where an element is dropped: L pages of S keys are as many keys as others have.
fn large_enough(c: &Cascade) -> Bindings {
    let extents = [
        ("B", 2),
        ("G", 2),
        ("R", 3),
        ("M", 13),
        ("N", 17),
        ("K", 19),
        ("F", 5),
        ("X", 9),
        ("P", 12),
        ("D", 11),
        ("W", 9),
        ("L", 6),
        ("S", 3),
    ];
    let free = c.ranks.iter().filter(|(_, r)| r.fixed.is_none());
    let extent = |name: &str| extents.iter().find(|(n, _)| *n == name).map_or(10, |(_, e)| *e);
    let sizes: Vec<(&str, u64)> = free.map(|(_, r)| (r.name.as_str(), extent(&r.name))).collect();
    sized(c, &sizes).unwrap_or_else(|| panic!("{} binds", c.name))
}

/// Inputs with what is expected of them, made when first asked for.
struct Cases<'a> {
    c: &'a Cascade,
    b: &'a Bindings,
    made: Vec<(Vec<Array>, Vec<Expected>)>,
}

impl Cases<'_> {
    /// Two ordinary inputs, then many with outliers: a maximum that shifts a softmax cancels unless missing it
    /// overflows, which takes an outlier at the place dropped.
    const COUNT: usize = 20;

    fn get(&mut self, i: usize) -> &(Vec<Array>, Vec<Expected>) {
        while self.made.len() <= i {
            let n = self.made.len();
            let variant = [Variant::Normal, Variant::Small, Variant::Large].get(n).copied().unwrap_or(Variant::Spikes);
            let mut inputs = inputs_of(self.c, self.b, 11 + n as u64, variant);
            for (id, a) in self.c.params.iter().zip(&mut inputs) {
                // A softcap of 50 keeps exp from overflowing whatever maximum is subtracted: it is raised.
                if self.c.tensors[*id].name == "cap" {
                    a.data[0] = 1000.0;
                }
            }
            let expected = ok(self.c, expect(self.c, self.b, &inputs, &Options::default()));
            self.made.push((inputs, expected));
        }
        &self.made[i]
    }

    /// Whether some result of a mutant, evaluated as a device would, leaves the tolerance on some inputs.
    fn catch(&mut self, m: &Cascade) -> bool {
        let (c, b) = (self.c, self.b);
        (0..Cases::COUNT).any(|i| {
            let (inputs, expected) = self.get(i);
            let wrong = ok(c, evaluate_declared(m, b, inputs, &Options::default(), 77, Rounding::Nearest));
            expected.iter().zip(wrong.results()).any(|(x, (_, a))| x.compare(&a.values).is_err())
        })
    }
}

#[test]
fn planted_faults_are_caught() {
    let (mut missed, mut planted) = (Vec::new(), 0);
    for c in library() {
        let b = large_enough(&c);
        let mut cases = Cases { c: &c, b: &b, made: Vec::new() };
        for m in c.mutants(4) {
            if m.needs.as_ref().is_some_and(|(extent, least)| b.size(extent).is_ok_and(|e| e < *least)) {
                continue;
            }
            planted += 1;
            let same = EQUIVALENT.iter().any(|(n, f, p, _)| *n == c.name && *f == m.fault && m.place.ends_with(p));
            if cases.catch(&m.program) == same {
                let how = if same { "equivalent, yet caught" } else { "missed" };
                missed.push(format!("{}: {:?} in {}: {how}", c.name, m.fault, m.place));
            }
        }
        // Small inputs keep every recurrence tame, so that a stale row shows.
        let (inputs, expected) = cases.get(1);
        let right = ok(&c, evaluate_declared(&c, &b, inputs, &Options::default(), 78, Rounding::Nearest));
        for (x, (_, a)) in expected.iter().zip(right.results()) {
            for (fault, wrong) in corruptions(&x.dims, &a.values, poison(x.dtype)) {
                planted += 1;
                if x.compare(&wrong).is_ok() {
                    missed.push(format!("{}: {fault:?} of {}", c.name, x.name));
                }
            }
        }
    }
    assert!(missed.is_empty(), "{} of {planted} faults: {missed:#?}", missed.len());
    assert!(planted > 400, "{planted} faults planted");
}
