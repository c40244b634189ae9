//! The separation rank measured: the rank of the matrix [g(r_i, c_j)] at random points with 120 digits.
//!
//! Points keep the invariant of their reduction (a maximum is at least every sampled element). A few digits mislead
//! (a sigmoid has rank 3 at 1e-4 and 8 at 1e-12), so pivots below 1e-80 of the largest count as 0. A measurement is
//! never a proof: `separation` gives the exact decomposition.

use std::collections::{BTreeMap, HashMap};

use super::inline::{Inlined, Site};
use super::precise::{Num, Stream};
use super::symbolic::{Atom, AtomId, Mono, PolyId, Rat, Symbols, Var};
use crate::cascade::Reducer;
use crate::ops::{ReduceOp, UnaryOp};

/// Points sampled on either side; ranks up to one less are told apart.
const POINTS: usize = 7;

/// Elements of a sampled fiber.
const FIBER: usize = 4;

/// The measured rank of a site's inlined body, at most 7; none where it cannot be evaluated.
pub fn rank(x: &Inlined, site: &Site) -> Option<usize> {
    let mut s = x.symbols.clone();
    let mut at = Sampler { values: HashMap::new(), random: Stream(0x5eed), temps: site.temps.clone() };
    let mut matrix = Vec::new();
    for i in 0..POINTS {
        let mut row = Vec::new();
        for j in 0..POINTS {
            let v = at.poly(&mut s, site.body, i, j)?;
            if !matches!(v, Num::Finite(_)) {
                return None;
            }
            row.push(v);
        }
        matrix.push(row);
    }
    Some(matrix_rank(matrix))
}

/// Rank by elimination with full pivoting.
fn matrix_rank(mut m: Vec<Vec<Num>>) -> usize {
    let mut first = None;
    let n = m.len();
    for k in 0..n {
        let mut best = (k, k);
        for i in k..n {
            for j in k..n {
                if m[i][j].abs().compare(&m[best.0][best.1].abs()) == Some(std::cmp::Ordering::Greater) {
                    best = (i, j);
                }
            }
        }
        let pivot = m[best.0][best.1].clone();
        let scale = first.get_or_insert_with(|| pivot.abs()).clone();
        if pivot.is_zero() || pivot.agrees(&Num::of(0.0), 80, scale.to_f64()) {
            return k;
        }
        m.swap(k, best.0);
        for row in &mut m {
            row.swap(k, best.1);
        }
        let top = m[k].clone();
        for row in m.iter_mut().skip(k + 1) {
            let f = row[k].div(&top[k]);
            for (x, t) in row.iter_mut().zip(&top).skip(k) {
                *x = x.sub(&f.mul(t));
            }
        }
    }
    n
}

/// Random values of leaves: element atoms by j, barriers by i, the rest once.
struct Sampler {
    values: HashMap<(AtomId, usize, usize), Num>,
    random: Stream,
    temps: Vec<Var>,
}

fn rational(q: &Rat) -> Option<(i64, i64)> {
    Some((i64::try_from(q.numerator().clone()).ok()?, i64::try_from(q.denominator().clone()).ok()?))
}

fn number(q: &Rat) -> Option<Num> {
    // Coefficients are small rationals or float literals: a product of float64 parts is exact.
    match rational(q) {
        Some((n, d)) if n.abs() < 1 << 53 && d < 1 << 53 => Some(Num::ratio(n, d)),
        _ => Some(Num::of(q.to_f64().value())),
    }
}

impl Sampler {
    fn poly(&mut self, s: &mut Symbols, p: PolyId, i: usize, j: usize) -> Option<Num> {
        let mut sum = Num::of(0.0);
        for (m, c) in s.poly(p).terms.clone() {
            let t = self.mono(s, &m, i, j)?.mul(&number(&c)?);
            sum = sum.add(&t);
        }
        Some(sum)
    }

    fn mono(&mut self, s: &mut Symbols, m: &Mono, i: usize, j: usize) -> Option<Num> {
        let mut product = match m.exp {
            Some(e) => self.poly(s, e, i, j)?.exp(),
            None => Num::of(1.0),
        };
        for (a, q) in &m.factors {
            let (n, d) = rational(q)?;
            product = product.mul(&self.atom(s, *a, i, j)?.pow(n, d));
        }
        Some(product)
    }

    fn leaf(&mut self, s: &Symbols, a: AtomId, i: usize, j: usize, positive: bool) -> Num {
        let element = s.atom_vars(a).iter().any(|v| self.temps.contains(v));
        let key = (a, if element { usize::MAX } else { i }, if element { j } else { usize::MAX });
        let random = &mut self.random;
        self.values
            .entry(key)
            .or_insert_with(|| Num::of(if positive { random.within(0.5, 2.5) } else { random.within(-2.0, 2.0) }))
            .clone()
    }

    fn atom(&mut self, s: &mut Symbols, a: AtomId, i: usize, j: usize) -> Option<Num> {
        match s.atom(a).clone() {
            Atom::Var(_) => Some(self.leaf(s, a, i, j, true)),
            Atom::Extent(n) if self.temps.iter().any(|t| *t.extent() == n) => Some(Num::of(FIBER as f64)),
            Atom::Extent(_) | Atom::Scale(_) => Some(self.leaf(s, a, 0, j, true)),
            Atom::Read(t, _) => {
                let positive = s.positive.contains(&t);
                Some(self.leaf(s, a, 0, j, positive))
            }
            Atom::Base(p) => self.poly(s, p, i, j),
            Atom::Log(p) => Some(self.poly(s, p, i, j)?.ln()),
            Atom::Unary(op, p) => match op {
                UnaryOp::Sin | UnaryOp::Cos | UnaryOp::Erf => None,
                op => Some(self.poly(s, p, i, j)?.unary(op)),
            },
            Atom::Binary(op, x, y) => {
                let (x, y) = (self.poly(s, x, i, j)?, self.poly(s, y, i, j)?);
                Some(x.binary(op, &y, false))
            }
            Atom::FloorDiv(x, y) => {
                let (x, y) = (self.poly(s, x, i, j)?, self.poly(s, y, i, j)?);
                Some(x.binary(crate::ops::BinaryOp::Div, &y, true))
            }
            Atom::Select(k, x, y) => {
                let k = self.poly(s, k, i, j)?;
                self.poly(s, if k.is_zero() { y } else { x }, i, j)
            }
            Atom::Cast(d, p) => Some(self.poly(s, p, i, j)?.cast(d)),
            Atom::Reduce { op, vars, body, .. } => {
                let element = s.atom_vars(a).iter().any(|v| self.temps.contains(v));
                let ours = self.temps.iter().find(|t| vars.len() == 1 && vars[0].extent() == t.extent()).cloned();
                if let (false, Some(t), Reducer::Op(op @ (ReduceOp::Max | ReduceOp::Min | ReduceOp::Sum))) =
                    (element, ours, op)
                {
                    if let Some(v) = self.values.get(&(a, i, usize::MAX)) {
                        return Some(v.clone());
                    }
                    let x = s.of_atom(Atom::Var(t));
                    let body = s.substitute(body[0], &BTreeMap::from([(vars[0].clone(), x)]));
                    // A fiber of its own, so that relations between sums (a variance is positive) hold; no sampled
                    // element may exceed a maximum.
                    let mut elements: Vec<usize> = (0..FIBER).map(|k| POINTS + i * FIBER + k).collect();
                    if op != ReduceOp::Sum {
                        elements.extend(0..POINTS);
                    }
                    let mut v: Option<Num> = None;
                    for k in elements {
                        let e = self.poly(s, body, i, k)?;
                        v = Some(match (v, op) {
                            (None, _) => e,
                            (Some(v), ReduceOp::Max) => v.max(&e),
                            (Some(v), ReduceOp::Min) => v.min(&e),
                            (Some(v), _) => v.add(&e),
                        });
                    }
                    let mut v = v?;
                    let more = Num::of(self.random.within(0.1, 1.5));
                    match op {
                        ReduceOp::Max => v = v.add(&more),
                        ReduceOp::Min => v = v.sub(&more),
                        _ => {}
                    }
                    self.values.insert((a, i, usize::MAX), v.clone());
                    return Some(v);
                }
                let positive = s.is_positive(body[0]);
                Some(self.leaf(s, a, i, j, positive || matches!(op, Reducer::Op(ReduceOp::Sum))))
            }
            Atom::Scan(..) | Atom::Segment(..) | Atom::Rand(..) | Atom::Slot(_) | Atom::ScaleLog(_) => {
                Some(self.leaf(s, a, i, j, false))
            }
            Atom::Infinity => Some(Num::Infinite(true)),
            Atom::Nan => Some(Num::Nan),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::inline::inline;
    use super::super::samples::{self, one};
    use super::*;

    fn measured(source: &str, rank_name: &str) -> Option<usize> {
        let c = one(source);
        let r = c.rank(rank_name).expect("rank");
        let x = inline(&c);
        rank(&x, x.sites.iter().rfind(|s| s.ranks.contains(&r)).expect("a reduction"))
    }

    #[test]
    fn measured_ranks_agree_with_the_exact_ones() {
        assert_eq!(measured(&samples::attention(), "N"), Some(1));
        assert_eq!(measured(samples::LSE, "N"), Some(1));
        assert_eq!(measured(samples::RMS_MATMUL, "K"), Some(1));
        assert_eq!(measured(&samples::layernorm(false), "K"), Some(2));
        assert_eq!(measured(&samples::layernorm(true), "K"), Some(3));
        assert_eq!(measured(samples::VARIANCE, "N"), Some(3));
        assert_eq!(measured(samples::THIRD, "N"), Some(4));
        assert_eq!(measured(samples::ENTROPY, "N"), Some(2));
        assert_eq!(measured(&samples::THIRD.replace(", 3)", ", 5)"), "N"), Some(6));
        assert_eq!(measured(samples::SIGMOID, "N"), Some(POINTS));
        assert!(measured(samples::FP8, "K").is_some_and(|j| j > 4));
    }

    #[test]
    fn maxima_bound_their_fiber() {
        let text = |f: &str| {
            format!(
                "cascade t[N](s: f32[N], v: f32[N]) -> (y: f32[]) {{
                    X[] = max(n) s[n]
                    y[] = sum(n) {f} * v[n]
                }}"
            )
        };
        assert_eq!(measured(&text("abs(s[n] - X[])"), "N"), Some(2));
        assert_eq!(measured(&text("pow(max(s[n] - X[], 0.0), 2)"), "N"), Some(0));
    }
}
