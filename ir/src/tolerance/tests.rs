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
                    if let Err(m) = x.compare(&a.values) {
                        panic!("{} at {:?}, {variant:?}: {m}", c.name, b.extents);
                    }
                }
            }
        }
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
const EQUIVALENT: [(&str, Fault, &str, &str); 4] = [
    ("mean_pool", Fault::DroppedElement, "of C", "the count cancels when the pooled row is normalised"),
    ("mean_pool", Fault::DroppedTile, "of C", "the same"),
    ("mean_pool", Fault::StaleTile, "of C", "the same"),
    ("router", Fault::DroppedElement, "of M", "the values are in descending order: the second is never the maximum"),
];

/// Extents large enough for four tiles of four, so that every mutant differs from its original.
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
