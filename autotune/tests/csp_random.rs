//! Random small models against brute force: every query, with every propagator run audited by enumeration.
//!
//! The oracle knows only [`Model::check`]; models draw from every domain form, term and connective, over ranges that
//! include zero and negative numbers.

mod random;

use einfall_autotune::csp::{Direction, Diversity, Explanation, Model, Options, Solver, VarId, text};
use random::{Rng, brute_force, cost, model};

const MODELS: u64 = 1000;

fn options() -> Options {
    Options { audit: true, ..Options::default() }
}

fn show(m: &Model) -> String {
    text::print(m)
}

#[test]
fn a_thousand_random_models_agree_with_brute_force() {
    let mut feasible = 0;
    for seed in 0..MODELS {
        let mut rng = Rng::new(seed);
        let m = model(&mut rng);
        let solver = Solver::with_options(&m, options());
        let expected = brute_force(&m);
        feasible += u64::from(!expected.is_empty());

        let mut all = solver.all(&[], usize::MAX).expect("solved");
        all.sort();
        assert_eq!(all, expected, "seed {seed}\n{}", show(&m));
        assert_eq!(solver.count(&[]).expect("counted"), expected.len() as u128, "seed {seed}\n{}", show(&m));
        assert_eq!(solver.first().expect("solved").is_some(), !expected.is_empty());

        // A projection.
        let over: Vec<VarId> = m.var_ids().filter(|_| rng.below(2) == 0).collect();
        if !over.is_empty() {
            let project = |a: &Vec<i64>| over.iter().map(|v| a[v.idx()]).collect::<Vec<_>>();
            let mut tuples: Vec<Vec<i64>> = expected.iter().map(project).collect();
            tuples.sort();
            tuples.dedup();
            assert_eq!(solver.count(&over).expect("counted"), tuples.len() as u128, "seed {seed}\n{}", show(&m));
            let mut found: Vec<Vec<i64>> = solver.all(&over, usize::MAX).expect("solved").iter().map(project).collect();
            found.sort();
            assert_eq!(found, tuples, "seed {seed}\n{}", show(&m));
        }

        // A lexicographic optimum.
        let mut order: Vec<(VarId, Direction)> = Vec::new();
        for v in m.var_ids() {
            let direction = if rng.below(2) == 0 { Direction::Min } else { Direction::Max };
            order.insert(rng.below(order.len() as u64 + 1) as usize, (v, direction));
        }
        let key = |a: &Vec<i64>| {
            let signed = |(v, d): &(VarId, Direction)| if *d == Direction::Min { a[v.idx()] } else { -a[v.idx()] };
            order.iter().map(signed).collect::<Vec<_>>()
        };
        let best = expected.iter().min_by_key(|a| key(a)).cloned();
        assert_eq!(solver.lexicographic(&order).expect("solved"), best, "seed {seed}\n{}", show(&m));

        // The least cost, and diverse assignments.
        let cost = cost(&mut rng, &m);
        let costed: Vec<(i64, &Vec<i64>)> =
            expected.iter().filter_map(|a| Some((i64::try_from(cost.eval(a)?).ok()?, a))).collect();
        let least = costed.iter().map(|(c, _)| *c).min();
        let found = solver.minimize(&cost).expect("solved");
        let what = || format!("seed {seed}, cost {}\n{}", text::print_expr(&m, &cost), show(&m));
        assert_eq!(found.as_ref().map(|c| c.cost), least, "{}", what());
        if let Some(found) = &found {
            assert_eq!(cost.eval(&found.assignment), Some(i128::from(found.cost)));
            assert_eq!(solver.minimize(&cost).expect("solved"), Some(found.clone()), "deterministic");
        }
        let diversity = Diversity { count: 3, distance: 2, over: m.var_ids().collect() };
        let picks = solver.diverse(&cost, &diversity).expect("solved");
        let far = |a: &[i64], b: &[i64]| a.iter().zip(b).filter(|(x, y)| x != y).count() >= 2;
        for (i, pick) in picks.iter().enumerate() {
            let apart = |a: &Vec<i64>| picks[..i].iter().all(|p| far(&p.assignment, a));
            let cheapest = costed.iter().filter(|(_, a)| apart(a)).map(|(c, _)| *c).min();
            assert!(apart(&pick.assignment) && Some(pick.cost) == cheapest, "{}", what());
        }
        let more = costed.iter().any(|(_, a)| picks.iter().all(|p| far(&p.assignment, a)));
        assert!(picks.len() == 3 || !more, "{}", what());

        // The explanation.
        match solver.explain().expect("explained") {
            Explanation::Feasible(a) => assert!(expected.contains(&a), "seed {seed}"),
            Explanation::EmptyDomain(_) => panic!("seed {seed}: declared domains are not empty"),
            Explanation::Conflict(c) => {
                assert!(expected.is_empty(), "seed {seed}");
                assert!(brute_force(&m.restrict(&c.constraints)).is_empty(), "seed {seed}\n{}", show(&m));
                assert!(c.minimal, "seed {seed}\n{}", show(&m));
                for out in &c.constraints {
                    let rest: Vec<usize> = c.constraints.iter().copied().filter(|i| i != out).collect();
                    assert!(!brute_force(&m.restrict(&rest)).is_empty(), "seed {seed} {out}\n{}", show(&m));
                }
            }
        }
    }
    assert!(feasible > MODELS / 4 && feasible < MODELS * 9 / 10, "{feasible} of {MODELS} are feasible");
}

#[test]
fn printed_models_read_back() {
    for seed in 0..MODELS {
        let m = model(&mut Rng::new(seed));
        let printed = text::print(&m);
        let mut back = text::parse(&printed).unwrap_or_else(|e| panic!("seed {seed}: {e:?}\n{printed}"));
        assert_eq!(text::print(&back), printed, "seed {seed}");
        back = text::parse(&text::print(&back)).expect("read back");
        assert_eq!(brute_force(&back), brute_force(&m), "seed {seed}\n{printed}");
    }
}
