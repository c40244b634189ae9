//! J of a value that is made of several sums, whatever statements they stand in.
//!
//! A reduction's own J is that of its summand, but `E[x²] − μ²` says what Σ(x − μ)² says, and lse − Σp·s what −Σp·ln p
//! says. In canonical form both spellings of a value are one sum of products of accumulators, so J is read off there.
//! Accumulators with the most indices are carried, others (and denominators) only scale them. A value linear in them
//! is Σ coefficient·accumulator: one function is carried per different coefficient. A value that is not linear in two
//! or more of them is the expansion of a centred form: each is a function of its own, and so is the constant, which
//! the centred summand has. Invariant: depends on the canonical value alone.

use std::collections::BTreeSet;

use super::symbolic::{Atom, AtomId, Mono, PolyId, Rat, Symbols};
use crate::cascade::{RankId, Reducer, Size};
use crate::ops::ReduceOp;

/// J of `p` over `rank`: 0 if it is made of no sum over it.
pub fn value_rank(s: &Symbols, p: PolyId, rank: RankId) -> usize {
    let mut direct = BTreeSet::new();
    for m in s.poly(p).terms.keys() {
        direct.extend(factors(s, m, rank).into_iter().map(|(a, _)| a));
    }
    // A denominator that not every term has multiplies the others.
    let below: Vec<BTreeSet<AtomId>> = s.poly(p).terms.keys().map(|m| denominators(s, m, rank)).collect();
    let all: BTreeSet<AtomId> = below.iter().flatten().copied().collect();
    let shared = |a: &AtomId| below.iter().all(|b| b.contains(a));
    let multiplied: BTreeSet<AtomId> = all.into_iter().filter(|a| !shared(a)).collect();
    let Some(most) = direct.iter().map(|a| s.atom_vars(*a).len()).max() else { return within(s, p, rank) };
    let top: BTreeSet<AtomId> = direct.into_iter().filter(|a| s.atom_vars(*a).len() == most).collect();
    let mut degrees = BTreeSet::new();
    let mut coefficients = BTreeSet::new();
    for m in s.poly(p).terms.keys() {
        let own: Vec<(AtomId, Rat)> = factors(s, m, rank).into_iter().filter(|(a, _)| top.contains(a)).collect();
        let degree = own.iter().fold(Rat::ZERO, |n, (_, q)| n + q.clone());
        let rest = Mono { exp: m.exp, factors: m.factors.iter().filter(|f| !own.contains(f)).cloned().collect() };
        if !own.is_empty() {
            coefficients.insert(barriers(s, &rest, rank));
            degrees.insert(degree);
        } else if m.factors.iter().any(|(a, _)| s.reduces(*a, rank)) {
            // A function of sums (a logarithm) beside them is an accumulator times itself, once over a denominator.
            let inside: BTreeSet<AtomId> = sums_in(s, &rest, rank);
            if !inside.is_disjoint(&multiplied) {
                coefficients.insert(rest);
            }
        }
    }
    if degrees.len() > 1 && top.len() > 1 { top.len() + 1 } else { coefficients.len().max(1) }
}

/// Sums over the rank that are factors of a product, with their positive powers.
fn factors(s: &Symbols, m: &Mono, rank: RankId) -> Vec<(AtomId, Rat)> {
    m.factors.iter().filter(|(a, q)| *q > Rat::ZERO && is_sum(s, *a, rank)).cloned().collect()
}

fn denominators(s: &Symbols, m: &Mono, rank: RankId) -> BTreeSet<AtomId> {
    m.factors.iter().filter(|(a, q)| *q < Rat::ZERO && is_sum(s, *a, rank)).map(|(a, _)| *a).collect()
}

fn is_sum(s: &Symbols, a: AtomId, rank: RankId) -> bool {
    match s.atom(a) {
        Atom::Reduce { op: Reducer::Op(ReduceOp::Sum), vars, .. } => vars.iter().any(|v| v.over(rank)),
        _ => false,
    }
}

/// The part of a product that depends on reductions over the rank.
fn barriers(s: &Symbols, m: &Mono, rank: RankId) -> Mono {
    let holds = |p: PolyId| s.reductions(p).iter().any(|(e, _)| e.contains(&Size::Rank(rank)));
    let factors = m.factors.iter().filter(|(a, _)| s.reduces(*a, rank)).cloned().collect();
    Mono { exp: m.exp.filter(|e| holds(*e)), factors }
}

fn sums_in(s: &Symbols, m: &Mono, rank: RankId) -> BTreeSet<AtomId> {
    let mut out = BTreeSet::new();
    for (a, _) in &m.factors {
        s.visit_atom(*a, &mut |b| {
            if is_sum(s, b, rank) {
                out.insert(b);
            }
            true
        });
    }
    out
}

/// The largest J of what the value is a function of.
fn within(s: &Symbols, p: PolyId, rank: RankId) -> usize {
    let mut most = 0;
    for m in s.poly(p).terms.keys() {
        for (a, _) in &m.factors {
            most = most.max(match s.atom(*a) {
                Atom::Base(q) | Atom::Log(q) | Atom::Unary(_, q) => value_rank(s, *q, rank),
                _ if is_sum(s, *a, rank) => 1,
                _ => 0,
            });
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::super::explain::separation_rank;
    use super::super::inline::inline;
    use super::super::samples::one;

    fn j(body: &str, params: &str) -> Option<usize> {
        let c = one(&format!("cascade c[M, N]({params}) -> (y: f32[M]) {{\n{body}\n}}"));
        separation_rank(&c, &inline(&c), c.rank("N").unwrap())
    }

    #[test]
    fn spellings_of_one_value_have_one_rank() {
        let x = "x: f32[M,N]";
        let centred = "u[m] = (sum(n) x[m,n]) / N\n y[m] = (sum(n) (x[m,n] - u[m]) * (x[m,n] - u[m])) / N";
        let raw = "u[m] = (sum(n) x[m,n]) / N\n y[m] = (sum(n) x[m,n] * x[m,n]) / N - u[m] * u[m]";
        let turned = "a[m] = sum(n) x[m,n] * x[m,n]\n b[m] = sum(n) x[m,n]\n y[m] = (N * a[m] - b[m] * b[m]) / (N * N)";
        for body in [centred, raw, turned] {
            assert_eq!(j(body, x), Some(3), "{body}");
            let root = format!("{}\n y[m] = sqrt(v[m])", body.replace(" y[m]", " v[m]"));
            assert_eq!(j(&root, x), Some(3), "{root}");
        }
        let third = "u[m] = (sum(n) x[m,n]) / N\n q[m] = (sum(n) x[m,n] * x[m,n]) / N\n \
                     y[m] = (sum(n) x[m,n] * x[m,n] * x[m,n]) / N - 3.0 * u[m] * q[m] + 2.0 * u[m] * u[m] * u[m]";
        assert_eq!(j(third, x), Some(4));
        let xy = "x: f32[M,N], z: f32[M,N]";
        let apart = "y[m] = (sum(n) x[m,n] * z[m,n]) / N - (sum(n) x[m,n]) / N * ((sum(n) z[m,n]) / N)";
        let centred = "u[m] = (sum(n) x[m,n]) / N\n v[m] = (sum(n) z[m,n]) / N\n \
                       y[m] = (sum(n) (x[m,n] - u[m]) * (z[m,n] - v[m])) / N";
        assert_eq!((j(apart, xy), j(centred, xy)), (Some(4), Some(4)));
        let entropy = "X[m] = max(n) x[m,n]\n E[m,n] = exp(x[m,n] - X[m])\n L[m] = sum(n) E[m,n]\n ";
        let direct = "P[m,n] = E[m,n] / L[m]\n y[m] = -(sum(n) P[m,n] * log(P[m,n]))";
        let lse = "P[m,n] = E[m,n] / L[m]\n y[m] = X[m] + log(L[m]) - (sum(n) P[m,n] * x[m,n])";
        for body in [direct, lse] {
            assert_eq!(j(&format!("{entropy}{body}"), x), Some(2), "{body}");
        }
    }

    #[test]
    fn sums_beside_or_times_one_another_are_not_more() {
        let xy = "x: f32[M,N], z: f32[M,N]";
        for body in [
            "y[m] = (sum(n) x[m,n]) / N",
            "y[m] = (sum(n) x[m,n]) + (sum(n) z[m,n])",
            "y[m] = (sum(n) x[m,n]) * (sum(n) z[m,n])",
            "y[m] = (sum(n) x[m,n]) / (sum(n) z[m,n])",
            "y[m] = log(sum(n) exp(x[m,n])) + (sum(n) z[m,n]) * 0.0",
            "y[m] = sqrt(sum(n) x[m,n] * x[m,n])",
        ] {
            assert_eq!(j(body, xy), Some(1), "{body}");
        }
    }
}
