//! Uniform draws against enumeration: on small random models every assignment comes as often as every other.
//!
//! The statistic is Pearson's χ² over all assignments, as its distance from the mean in standard deviations; draws
//! depend on seeds alone, so a test that passes passes always.

mod random;

use einfall_autotune::csp::{Domain, Expr, Model, Uniform, VarId};
use random::{Rng, brute_force, model};
use std::collections::HashMap;

/// How far χ² of these counts is from what uniform draws give, in standard deviations.
fn deviation(counts: &[u64]) -> f64 {
    let draws: u64 = counts.iter().sum();
    let expected = draws as f64 / counts.len() as f64;
    let chi2: f64 = counts.iter().map(|n| (*n as f64 - expected).powi(2) / expected).sum();
    let free = counts.len() as f64 - 1.0;
    (chi2 - free) / (2.0 * free).sqrt()
}

/// Counts of `draws` draws per assignment of `all`.
fn counted<T: std::hash::Hash + Eq>(all: &[T], draws: u64, mut draw: impl FnMut() -> T) -> Vec<u64> {
    let at: HashMap<&T, usize> = all.iter().enumerate().map(|(i, a)| (a, i)).collect();
    let mut counts = vec![0; all.len()];
    for _ in 0..draws {
        counts[at[&draw()]] += 1;
    }
    counts
}

/// Draws per assignment.
const EACH: u64 = 60;

#[test]
fn every_assignment_of_random_models_is_as_likely() {
    let (mut judged, mut sum, mut naive_sum) = (0, 0.0, 0.0);
    for seed in 0..200 {
        // One to three models side by side: what they have together is drawn from.
        let mut rng = Rng::new(seed);
        let models: Vec<Model> = (0..1 + seed % 3).map(|_| model(&mut rng)).collect();
        let each: Vec<Vec<Vec<i64>>> = models.iter().map(brute_force).collect();
        let all: Vec<(usize, Vec<i64>)> =
            each.iter().enumerate().flat_map(|(i, list)| list.iter().map(move |a| (i, a.clone()))).collect();
        let mut uniform = Uniform::new(&models, seed).expect("models compile");
        if all.is_empty() {
            assert_eq!(uniform.draw(10_000), Ok(None), "seed {seed}");
            assert_eq!(uniform.bound(), Ok(0), "attempts that fail must exhaust an empty model");
            continue;
        }
        if !(2..=150).contains(&all.len()) {
            continue;
        }
        let counts = counted(&all, EACH * all.len() as u64, || {
            uniform.draw(100_000).expect("drawn").expect("there are assignments")
        });
        let off = deviation(&counts);
        assert!(off < 6.0, "seed {seed}: χ² is {off:.1} deviations from uniform over {}", all.len());
        // Bounds end as counts.
        assert!(uniform.bound().expect("counted") >= all.len() as u128);
        judged += 1;
        sum += off;
        // Each variable's value drawn evenly among those that occur, one after the other: not uniform, and seen to be.
        let naive = counted(&all, EACH * all.len() as u64, || {
            let mut left: Vec<&(usize, Vec<i64>)> = all.iter().collect();
            let mut at = 0;
            while left.len() > 1 {
                let value = |a: &(usize, Vec<i64>)| if at == 0 { a.0 as i64 } else { a.1[at - 1] };
                let mut values: Vec<i64> = left.iter().map(|a| value(a)).collect();
                values.sort_unstable();
                values.dedup();
                let chosen = values[rng.below(values.len() as u64) as usize];
                left.retain(|a| value(a) == chosen);
                at += 1;
            }
            left[0].clone()
        });
        naive_sum += deviation(&naive);
    }
    println!(
        "{judged} models, mean deviation {:.2}, naive {:.2}",
        sum / f64::from(judged),
        naive_sum / f64::from(judged)
    );
    assert!(judged > 60);
    // The mean over so many is much narrower than one.
    assert!((sum / f64::from(judged)).abs() < 0.3);
    assert!(naive_sum / f64::from(judged) > 3.0, "the statistic tells a sampler that is not uniform");
}

/// 1 has one completion, every other value of x a hundred.
fn lopsided() -> (Model, VarId) {
    let mut m = Model::new();
    let x = m.var("x", Domain::range(1, 4));
    let y = m.var("y", Domain::range(0, 99));
    m.constrain("few", Expr::from(x).equals(1).implies(Expr::from(y).equals(7)));
    (m, x)
}

#[test]
fn rare_assignments_are_as_likely_as_common_prefixes() {
    let (m, x) = lopsided();
    let mut uniform = Uniform::new([&m], 3).expect("compiles");
    let n = 60_200;
    let ones = (0..n).filter(|_| uniform.draw(100_000).expect("drawn").expect("some").1[x.idx()] == 1).count();
    // 200 expected of n · 1/301, ± 14 each deviation.
    assert!((130..=270).contains(&ones), "{ones}");
    assert_eq!(uniform.bound(), Ok(301));
}

#[test]
fn draws_depend_on_the_seed_alone() {
    let (m, _) = lopsided();
    let draws = |seed| {
        let mut u = Uniform::new([&m], seed).expect("compiles");
        (0..50).map(|_| u.draw(10_000).expect("drawn").expect("some")).collect::<Vec<_>>()
    };
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(1), draws(2));
}
