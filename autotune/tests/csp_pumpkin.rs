//! Random small systems against pumpkin-solver, an independent lazy-clause-generation solver: the same solution sets.

#[path = "random/rng.rs"]
mod rng;

use einfall_autotune::csp::{Cmp, Domain, Expr, Model, Pred, Solver, VarId, text};
use pumpkin_solver::conflict_resolvers::resolvers::ResolutionResolver;
use pumpkin_solver::core::results::ProblemSolution;
use pumpkin_solver::core::results::solution_iterator::IteratedSolution;
use pumpkin_solver::core::termination::Indefinite;
use pumpkin_solver::core::variables::{DomainId, TransformableVariable};
use pumpkin_solver::{self as pumpkin};
use rng::Rng;
use std::collections::BTreeSet;

const SYSTEMS: u64 = 1000;

/// The same random system for both solvers.
struct Pair {
    model: Model,
    pumpkin: pumpkin::Solver,
    vars: Vec<(VarId, DomainId)>,
}

impl Pair {
    fn post(&mut self, pred: Pred, post: impl FnOnce(&mut pumpkin::Solver)) {
        let name = format!("k{}", self.model.constraints().len());
        self.model.constrain(name, pred);
        post(&mut self.pumpkin);
    }

    fn pick(&self, rng: &mut Rng) -> (Expr, DomainId) {
        let (v, d) = self.vars[rng.below(self.vars.len() as u64) as usize];
        (Expr::Var(v), d)
    }

    fn add_constraint(&mut self, rng: &mut Rng) {
        match rng.below(8) {
            kind @ 0..=3 => {
                let n = rng.range(1, self.vars.len() as i64) as usize;
                let coefs: Vec<i64> =
                    (0..n).map(|_| if rng.below(2) == 0 { rng.range(1, 4) } else { -rng.range(1, 4) }).collect();
                let rhs = rng.range(-6, 20);
                let chosen = self.vars[..n].to_vec();
                let sum = chosen.iter().zip(&coefs).map(|((v, _), c)| Expr::from(*c) * *v).collect();
                let cmp = [Cmp::Le, Cmp::Eq, Cmp::Ne, Cmp::Le][kind as usize];
                self.post(Pred::Compare(cmp, Expr::Sum(sum), Expr::Const(rhs)), |s| {
                    let terms: Vec<_> = chosen.iter().zip(&coefs).map(|((_, d), c)| d.scaled(*c as i32)).collect();
                    let tag = s.new_constraint_tag();
                    match cmp {
                        Cmp::Eq => s.add_constraint(pumpkin::equals(terms, rhs as i32, tag)).post(),
                        Cmp::Ne => s.add_constraint(pumpkin::not_equals(terms, rhs as i32, tag)).post(),
                        Cmp::Le | Cmp::Lt => {
                            s.add_constraint(pumpkin::less_than_or_equals(terms, rhs as i32, tag)).post()
                        }
                    }
                });
            }
            4 => {
                let ((x, a), (y, b), (z, c)) = (self.pick(rng), self.pick(rng), self.pick(rng));
                self.post((x * y).equals(z), |s| {
                    let tag = s.new_constraint_tag();
                    s.add_constraint(pumpkin::times(a, b, c, tag)).post();
                });
            }
            5 => {
                // Divisibility by a positive number: dividend = divisor · quotient.
                let ((x, a), d) = (self.pick(rng), rng.range(1, 5));
                self.post(x.multiple_of(d), |s| {
                    let quotient = s.new_bounded_integer(-100, 100);
                    let tag = s.new_constraint_tag();
                    s.add_constraint(pumpkin::equals([quotient.scaled(d as i32), a.scaled(-1)], 0, tag)).post();
                });
            }
            6 => {
                let ((x, a), (y, b), (z, c)) = (self.pick(rng), self.pick(rng), self.pick(rng));
                self.post(Expr::Max(vec![x, y]).equals(z), |s| {
                    let tag = s.new_constraint_tag();
                    s.add_constraint(pumpkin::maximum([a, b], c, tag)).post();
                });
            }
            _ => {
                let ((x, a), (y, b), (z, c)) = (self.pick(rng), self.pick(rng), self.pick(rng));
                self.post(Expr::Min(vec![x, y]).equals(z), |s| {
                    let tag = s.new_constraint_tag();
                    s.add_constraint(pumpkin::minimum([a, b], c, tag)).post();
                });
            }
        }
    }
}

fn pair(rng: &mut Rng) -> Pair {
    let mut out = Pair { model: Model::new(), pumpkin: pumpkin::Solver::default(), vars: Vec::new() };
    for i in 0..rng.range(2, 4) {
        let values: BTreeSet<i64> = if rng.below(2) == 0 {
            let lo = rng.range(-3, 4);
            (lo..=lo + rng.range(1, 7)).collect()
        } else {
            (0..rng.range(2, 6)).map(|_| rng.range(-4, 16)).collect()
        };
        let id = out.model.var(format!("v{i}"), Domain::Values(values.iter().copied().collect()));
        let domain = out.pumpkin.new_sparse_integer(values.iter().map(|v| *v as i32).collect::<Vec<_>>());
        out.vars.push((id, domain));
    }
    for _ in 0..rng.range(1, 4) {
        out.add_constraint(rng);
    }
    out
}

/// Every solution pumpkin finds.
fn enumerate(p: &mut Pair) -> BTreeSet<Vec<i64>> {
    let mut found = BTreeSet::new();
    let domains: Vec<DomainId> = p.vars.iter().map(|(_, d)| *d).collect();
    let mut brancher = p.pumpkin.default_brancher();
    let (mut termination, mut resolver) = (Indefinite, ResolutionResolver::default());
    let mut solutions = p.pumpkin.get_solution_iterator(&mut brancher, &mut termination, &mut resolver);
    loop {
        match solutions.next_solution() {
            IteratedSolution::Solution(solution, ..) => {
                found.insert(domains.iter().map(|d| i64::from(solution.get_integer_value(*d))).collect());
            }
            IteratedSolution::Finished | IteratedSolution::Unsatisfiable => return found,
            IteratedSolution::Unknown => panic!("pumpkin runs without a limit"),
        }
    }
}

#[test]
fn a_thousand_random_systems_agree_with_pumpkin() {
    let mut feasible = 0;
    for seed in 0..SYSTEMS {
        let mut p = pair(&mut Rng::new(seed));
        let expected = enumerate(&mut p);
        let all = Solver::new(&p.model).all(&[], usize::MAX).expect("solved");
        let ours: BTreeSet<Vec<i64>> = all.iter().cloned().collect();
        assert_eq!(ours.len(), all.len(), "seed {seed}: each solution once");
        assert_eq!(ours, expected, "seed {seed}\n{}", text::print(&p.model));
        feasible += u64::from(!expected.is_empty());
    }
    assert!(feasible > SYSTEMS / 4 && feasible < SYSTEMS, "{feasible} of {SYSTEMS} are feasible");
}
