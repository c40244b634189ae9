//! Finite separation rank: `g(r,c) = Σ_{j≤J} a_j(r)·b_j(c)` found exactly, and reductions put in normal form by it.
//!
//! r are values of reductions over the reduced rank (barriers), c is all that varies with the reduced index. In
//! canonical form a product either splits into an r-part and a c-part or holds a factor of both; grouping the split
//! products gives a rational matrix (r-products × c-products) whose rank is J and whose row basis are the b_j. The
//! decomposition is its own proof; `numeric` measures the same rank at 120 digits as a cross-check. Theory:
//! finite separation rank generalises the repair functions of Neptune and the multiplicative separation of RedFuser.

use std::collections::{BTreeMap, BTreeSet};

use super::symbolic::{Atom, AtomId, Mono, Poly, PolyId, Rat, Symbols, Var};
use crate::cascade::Reducer;
use crate::ops::ReduceOp;

/// The most accumulators a derivation carries for one reduction.
pub const MAX_RANK: usize = 4;

/// How a reduced expression depends on barriers over its own rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Separation {
    /// It does not.
    Free,
    /// By so many separated products.
    Rank(usize),
    /// Finite, but more than [`MAX_RANK`].
    TooMany(usize),
    /// Some factor depends on a barrier and on the reduced index and does not split.
    Mixed(AtomId),
}

impl Separation {
    /// J, if the reduction is derivable: 1 when it depends on no barrier.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Separation::Free => Some(1),
            Separation::Rank(j) => Some(*j),
            Separation::TooMany(_) | Separation::Mixed(_) => None,
        }
    }
}

/// A reduction in normal form.
pub struct Reduced {
    /// Its value.
    pub value: PolyId,
    /// How its body depended on barriers.
    pub separation: Separation,
}

/// Which side of the separation an expression is on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    /// Constant over the fiber, and no barrier.
    Constant,
    Barrier,
    Element,
    Both,
}

/// Whether `a` holds a reduction over the range of one of `temps` that is constant over them.
fn has_barrier(s: &Symbols, a: AtomId, temps: &[Var]) -> bool {
    s.atom_reductions(a).iter().any(|(extents, vars)| {
        extents.iter().any(|e| temps.iter().any(|t| t.extent() == e)) && vars.iter().all(|v| !temps.contains(v))
    })
}

fn side_of_atom(s: &Symbols, a: AtomId, temps: &[Var]) -> Side {
    let element = s.atom_vars(a).iter().any(|v| temps.contains(v));
    match (element, has_barrier(s, a, temps)) {
        (false, false) => Side::Constant,
        (false, true) => Side::Barrier,
        (true, false) => Side::Element,
        (true, true) => Side::Both,
    }
}

fn join(a: Side, b: Side) -> Side {
    match (a, b) {
        (Side::Constant, x) | (x, Side::Constant) => x,
        (x, y) if x == y => x,
        _ => Side::Both,
    }
}

fn side_of_mono(s: &Symbols, m: &Mono, temps: &[Var]) -> Side {
    let mut side = Side::Constant;
    for (a, _) in &m.factors {
        side = join(side, side_of_atom(s, *a, temps));
    }
    if let Some(e) = m.exp {
        for t in s.poly(e).terms.keys() {
            side = join(side, side_of_mono(s, t, temps));
        }
    }
    side
}

/// One product as (barrier part, rest); `Err` names a factor of both.
fn split_mono(s: &mut Symbols, m: &Mono, temps: &[Var]) -> Result<(Mono, Mono), AtomId> {
    let (mut r, mut c) = (Mono::default(), Mono::default());
    for (a, q) in &m.factors {
        match side_of_atom(s, *a, temps) {
            Side::Barrier => r.factors.push((*a, q.clone())),
            Side::Constant | Side::Element => c.factors.push((*a, q.clone())),
            Side::Both => return Err(*a),
        }
    }
    if let Some(e) = m.exp {
        let (mut er, mut ec) = (Poly::default(), Poly::default());
        for (t, k) in s.poly(e).terms.clone() {
            match side_of_mono(s, &t, temps) {
                Side::Barrier => er.terms.insert(t, k),
                Side::Constant | Side::Element => ec.terms.insert(t, k),
                Side::Both => {
                    let blame = t.factors.iter().map(|f| f.0).find(|a| side_of_atom(s, *a, temps) != Side::Constant);
                    let one = s.term(Rat::ONE, t.clone());
                    return Err(blame.unwrap_or_else(|| s.intern_atom(Atom::Base(one))));
                }
            };
        }
        r.exp = (!er.terms.is_empty()).then(|| s.intern(er));
        c.exp = (!ec.terms.is_empty()).then(|| s.intern(ec));
    }
    Ok((r, c))
}

/// g = Σ a_j·b_j with the b_j linearly independent and free of barriers; `Err` names a factor that does not split.
pub fn separate(s: &mut Symbols, g: PolyId, temps: &[Var]) -> Result<Vec<(PolyId, PolyId)>, AtomId> {
    let mut rows: BTreeMap<Mono, Poly> = BTreeMap::new();
    for (m, k) in s.poly(g).terms.clone() {
        let (r, c) = split_mono(s, &m, temps)?;
        *rows.entry(r).or_default().terms.entry(c).or_insert(Rat::ZERO) += k;
    }
    // Row echelon over the rationals; `ech[k]` = Σ_j expr[k][j]·basis[j].
    let mut basis: Vec<Poly> = Vec::new();
    let mut coefficients: Vec<Poly> = Vec::new();
    let mut ech: Vec<(Mono, Poly, Vec<Rat>)> = Vec::new();
    for (r, row) in rows {
        let mut rest = row.clone();
        let mut combo = vec![Rat::ZERO; basis.len()];
        for (pivot, e, expr) in &ech {
            let Some(x) = rest.terms.get(pivot).cloned() else { continue };
            let f = x / e.terms[pivot].clone();
            for (m, k) in &e.terms {
                let slot = rest.terms.entry(m.clone()).or_insert(Rat::ZERO);
                *slot -= f.clone() * k.clone();
                if slot.is_zero() {
                    rest.terms.remove(m);
                }
            }
            for (j, k) in expr.iter().enumerate() {
                combo[j] += f.clone() * k.clone();
            }
        }
        let mut share = combo.clone();
        if let Some(pivot) = rest.terms.keys().next().cloned() {
            let mut expr: Vec<Rat> = combo.iter().map(|k| -k.clone()).collect();
            expr.push(Rat::ONE);
            for e in &mut ech {
                e.2.push(Rat::ZERO);
            }
            ech.push((pivot, rest, expr));
            basis.push(row);
            coefficients.push(Poly::default());
            share = vec![Rat::ZERO; basis.len()];
            *share.last_mut().expect("just grown") = Rat::ONE;
        }
        for (j, k) in share.into_iter().enumerate() {
            if !k.is_zero() {
                *coefficients[j].terms.entry(r.clone()).or_insert(Rat::ZERO) += k;
            }
        }
    }
    Ok(coefficients.into_iter().zip(basis).map(|(a, b)| (s.intern(a), s.intern(b))).collect())
}

/// Selections whose condition varies with the element alone become products with the condition.
fn split_selects(s: &mut Symbols, p: PolyId, temps: &[Var]) -> PolyId {
    let mut out = s.integer(0);
    for (m, k) in s.poly(p).terms.clone() {
        let mut t = s.rational(k);
        if let Some(e) = m.exp {
            let e = s.exp(e);
            t = s.mul(t, e);
        }
        for (a, q) in m.factors {
            let mut f = s.power_of_atom(a, q.clone());
            if let Atom::Select(c, x, y) = s.atom(a).clone() {
                let both = side_of_atom(s, a, temps) == Side::Both;
                if both && q.is_one() && s.constant(c).is_none() {
                    let not = s.unary(crate::ops::UnaryOp::Not, c);
                    let (x, y) = (s.mul(c, x), s.mul(not, y));
                    let sum = s.add(x, y);
                    f = split_selects(s, sum, temps);
                }
            }
            t = s.mul(t, f);
        }
        out = s.add(out, t);
    }
    out
}

/// The reduction of `body` over `temps` in normal form: factors free of the indices outside, barriers separated.
pub fn reduce(
    s: &mut Symbols,
    op: Reducer,
    part: u32,
    temps: &[Var],
    filter: Vec<PolyId>,
    body: Vec<PolyId>,
) -> Reduced {
    match op {
        Reducer::Op(ReduceOp::Sum) => {
            let g = split_selects(s, body[0], temps);
            sum(s, temps, filter, g)
        }
        Reducer::Op(ReduceOp::LogSumExp) => {
            let e = s.exp(body[0]);
            let inner = sum(s, temps, filter, e);
            Reduced { value: s.log(inner.value), separation: inner.separation }
        }
        Reducer::Op(o @ (ReduceOp::Max | ReduceOp::Min)) => order(s, o, temps, filter, body[0]),
        Reducer::Op(ReduceOp::ArgMax | ReduceOp::ArgMin) | Reducer::TopK { .. } => {
            selection(s, op, part, temps, filter, body)
        }
        Reducer::Op(ReduceOp::Product | ReduceOp::Any | ReduceOp::All) | Reducer::User(_) => {
            opaque(s, op, part, temps, filter, body)
        }
    }
}

fn opaque(s: &mut Symbols, op: Reducer, part: u32, temps: &[Var], filter: Vec<PolyId>, body: Vec<PolyId>) -> Reduced {
    let mut separation = Separation::Free;
    for p in &body {
        if let Some(a) = barrier_in(s, *p, temps) {
            separation = Separation::Mixed(a);
        }
    }
    let a = s.close_reduce(op, part, temps, filter, body);
    Reduced { value: s.power_of_atom(a, Rat::ONE), separation }
}

fn barrier_in(s: &Symbols, p: PolyId, temps: &[Var]) -> Option<AtomId> {
    let mut found = None;
    s.visit(p, &mut |a| {
        if found.is_none() && has_barrier(s, a, temps) {
            found = Some(a);
        }
        false
    });
    found
}

fn sum(s: &mut Symbols, temps: &[Var], filter: Vec<PolyId>, body: PolyId) -> Reduced {
    if s.poly(body).terms.is_empty() {
        return Reduced { value: body, separation: Separation::Free };
    }
    let barrier = barrier_in(s, body, temps).is_some();
    let whole = |s: &mut Symbols, separation| {
        let value = sum_of(s, temps, filter.clone(), body);
        Reduced { value, separation }
    };
    match separate(s, body, temps) {
        Err(a) => whole(s, Separation::Mixed(a)),
        Ok(parts) if parts.len() > MAX_RANK => whole(s, Separation::TooMany(parts.len())),
        Ok(parts) => {
            let separation = if barrier { Separation::Rank(parts.len()) } else { Separation::Free };
            let mut value = s.integer(0);
            for (a, b) in parts {
                let b = sum_of(s, temps, filter.clone(), b);
                let t = s.mul(a, b);
                value = s.add(value, t);
            }
            Reduced { value, separation }
        }
    }
}

/// Splits from every term what all terms share and does not vary with `temps`.
fn hoist(s: &mut Symbols, body: PolyId, temps: &[Var], positive_only: bool) -> (Rat, Mono, PolyId) {
    let terms: Vec<(Mono, Rat)> = s.poly(body).terms.clone().into_iter().collect();
    let lead = terms[0].1.clone();
    let content = if positive_only && lead < Rat::ZERO { -lead } else { lead };
    let free = |s: &Symbols, a: AtomId| s.atom_vars(a).iter().all(|v| !temps.contains(v));
    let mut factors: Vec<(AtomId, Rat)> = terms[0].0.factors.clone();
    factors.retain(|(a, q)| {
        let one = s.atom_vars(*a);
        let outside = one.iter().all(|v| !temps.contains(v));
        outside && terms.iter().all(|(m, _)| m.factors.contains(&(*a, q.clone())))
    });
    if positive_only {
        factors.retain(|(a, q)| {
            let mut p = Poly::default();
            p.terms.insert(Mono { exp: None, factors: vec![(*a, q.clone())] }, Rat::ONE);
            let id = s.intern(p);
            s.is_positive(id)
        });
    }
    let mut exponent = Poly::default();
    if let Some(e) = terms[0].0.exp {
        for (t, k) in s.poly(e).terms.clone() {
            let outside = s.mono_vars(&t).iter().all(|v| !temps.contains(v));
            let shared = terms.iter().all(|(m, _)| m.exp.is_some_and(|x| s.poly(x).terms.get(&t) == Some(&k)));
            if outside && shared {
                exponent.terms.insert(t, k);
            }
        }
    }
    debug_assert!(factors.iter().all(|(a, _)| free(s, *a)));
    let exp = (!exponent.terms.is_empty()).then(|| s.intern(exponent));
    let m = Mono { exp, factors };
    let negated = m.exp.map(|e| s.neg(e));
    let inverse = Mono { exp: negated, factors: m.factors.iter().map(|(a, q)| (*a, -q.clone())).collect() };
    let inverse = s.term(Rat::ONE / content.clone(), inverse);
    let rest = s.mul(body, inverse);
    (content, m, rest)
}

fn sum_of(s: &mut Symbols, temps: &[Var], filter: Vec<PolyId>, body: PolyId) -> PolyId {
    let (c, m, mut rest) = hoist(s, body, temps, false);
    let mut outside = s.term(c, m);
    // An index that nothing depends on counts its extent.
    let mut used: BTreeSet<Var> = s.vars(rest);
    for f in &filter {
        used.extend(s.vars(*f));
    }
    // A filter is kept by a sum, be it of all points or none.
    let kept = if filter.is_empty() || temps.iter().any(|t| used.contains(t)) { None } else { temps.first() };
    let (live, idle): (Vec<Var>, Vec<Var>) =
        temps.iter().cloned().partition(|t| used.contains(t) || kept.is_some_and(|k| k == t));
    for t in &idle {
        let n = s.size(t.extent());
        outside = s.mul(outside, n);
    }
    if live.is_empty() {
        rest = s.mul(rest, outside);
        return rest;
    }
    let a = s.close_reduce(Reducer::Op(ReduceOp::Sum), 0, &live, filter, vec![rest]);
    let inner = s.power_of_atom(a, Rat::ONE);
    s.mul(outside, inner)
}

/// Additive terms and positive factors that do not vary leave an order statistic; returns (offset, factor, rest).
fn affine(s: &mut Symbols, body: PolyId, temps: &[Var]) -> (PolyId, PolyId, PolyId) {
    let (mut out, mut inside) = (Poly::default(), Poly::default());
    for (m, k) in s.poly(body).terms.clone() {
        let varies = s.mono_vars(&m).iter().any(|v| temps.contains(v));
        if varies { &mut inside } else { &mut out }.terms.insert(m, k);
    }
    let offset = s.intern(out);
    let inside = s.intern(inside);
    if s.poly(inside).terms.is_empty() {
        let one = s.integer(1);
        return (offset, one, inside);
    }
    let (c, m, rest) = hoist(s, inside, temps, true);
    let factor = s.term(c, m);
    (offset, factor, rest)
}

/// The exponent, when a product is a bare exponential: then order is that of the exponent.
fn bare_exponential(s: &Symbols, p: PolyId) -> Option<PolyId> {
    let terms = &s.poly(p).terms;
    let (m, k) = terms.iter().next()?;
    (terms.len() == 1 && k.is_one() && m.factors.is_empty()).then_some(m.exp).flatten()
}

fn order(s: &mut Symbols, op: ReduceOp, temps: &[Var], filter: Vec<PolyId>, body: PolyId) -> Reduced {
    let barrier = barrier_in(s, body, temps).is_some();
    let (offset, factor, rest) = affine(s, body, temps);
    if s.poly(rest).terms.is_empty() && filter.is_empty() {
        return Reduced { value: offset, separation: Separation::Free };
    }
    let (value, inner) = match bare_exponential(s, rest) {
        Some(e) => {
            let inner = order(s, op, temps, filter, e);
            (s.exp(inner.value), inner.separation)
        }
        None => {
            let mixed = barrier_in(s, rest, temps);
            let (up, flipped) = s.lead_positive(rest);
            let o = match (op, flipped) {
                (o, false) => o,
                (ReduceOp::Max, true) => ReduceOp::Min,
                (_, true) => ReduceOp::Max,
            };
            let a = s.close_reduce(Reducer::Op(o), 0, temps, filter, vec![up]);
            let v = s.power_of_atom(a, Rat::ONE);
            let v = if flipped { s.neg(v) } else { v };
            (v, mixed.map_or(Separation::Free, Separation::Mixed))
        }
    };
    let separation = match inner {
        Separation::Free if barrier => Separation::Rank(1),
        other => other,
    };
    let v = s.mul(factor, value);
    Reduced { value: s.add(offset, v), separation }
}

fn selection(
    s: &mut Symbols,
    op: Reducer,
    part: u32,
    temps: &[Var],
    filter: Vec<PolyId>,
    mut body: Vec<PolyId>,
) -> Reduced {
    let barrier = barrier_in(s, body[0], temps).is_some();
    let values = matches!(op, Reducer::TopK { .. }) && part == 0;
    let mut undo: Vec<(PolyId, PolyId, bool)> = Vec::new();
    let mut op = op;
    loop {
        let (offset, factor, mut rest) = affine(s, body[0], temps);
        if s.poly(rest).terms.is_empty() {
            break;
        }
        if let Reducer::Op(o) = op {
            let (up, flipped) = s.lead_positive(rest);
            rest = up;
            if flipped {
                op = Reducer::Op(if o == ReduceOp::ArgMax { ReduceOp::ArgMin } else { ReduceOp::ArgMax });
            }
        }
        let e = bare_exponential(s, rest);
        undo.push((offset, factor, e.is_some()));
        body[0] = e.unwrap_or(rest);
        if e.is_none() {
            break;
        }
    }
    let separation = match barrier_in(s, body[0], temps) {
        Some(a) => Separation::Mixed(a),
        None if barrier => Separation::Rank(1),
        None => Separation::Free,
    };
    let a = s.close_reduce(op, part, temps, filter, body);
    let mut value = s.power_of_atom(a, Rat::ONE);
    if values {
        for (offset, factor, exponential) in undo.into_iter().rev() {
            if exponential {
                value = s.exp(value);
            }
            let v = s.mul(factor, value);
            value = s.add(offset, v);
        }
    }
    Reduced { value, separation }
}

#[cfg(test)]
mod tests {
    use super::super::inline::inline;
    use super::super::samples::{self, one};
    use super::*;

    /// J of the last reduction over `rank` in the text.
    fn last(source: &str, rank: &str) -> Separation {
        let c = one(source);
        let r = c.rank(rank).expect("rank");
        let x = inline(&c);
        x.sites.iter().rfind(|s| s.ranks.contains(&r)).expect("a reduction").separation.clone()
    }

    #[test]
    fn ranks_of_the_table() {
        assert_eq!(last(&samples::attention(), "N"), Separation::Rank(1));
        assert_eq!(last(samples::RMS_MATMUL, "K"), Separation::Rank(1));
        assert_eq!(last(&samples::layernorm(false), "K"), Separation::Rank(2));
        assert_eq!(last(&samples::layernorm(true), "K"), Separation::Rank(3));
        assert_eq!(last(samples::VARIANCE, "N"), Separation::Rank(3));
        assert_eq!(last(samples::THIRD, "N"), Separation::Rank(4));
        assert_eq!(last(samples::ENTROPY, "N"), Separation::Rank(2));
        assert!(matches!(last(samples::SIGMOID, "N"), Separation::Mixed(_)));
        assert!(matches!(last(samples::FP8, "K"), Separation::Mixed(_)));
        assert_eq!(last(samples::AMAX, "K"), Separation::Rank(1));
    }

    #[test]
    fn the_fifth_central_moment_is_finite_but_too_large() {
        let text = samples::THIRD.replace(", 3)", ", 5)");
        assert_eq!(last(&text, "N"), Separation::TooMany(6));
    }
}
