//! Sums, products, powers and exponentials in canonical form.
//!
//! Invariant: what two spellings of one rational or exponential expression give is one id.

use super::*;
use crate::arena::Id;
use std::collections::{BTreeMap, BTreeSet};

/// c^q when it is a small perfect square and q a half-integer.
pub(super) fn exact_root(c: &Rat, q: &Rat) -> Option<Rat> {
    let twice = q.clone() * int(2);
    if !twice.is_int() {
        return None;
    }
    let root = |n: i64| (n as f64).sqrt().round() as i64;
    let (n, d) = (i64::try_from(c.numerator().clone()).ok()?, i64::try_from(c.denominator().clone()).ok()?);
    if n >= 1 << 50 || d >= 1 << 50 {
        return None;
    }
    let (rn, rd) = (root(n), root(d));
    if rn * rn != n || rd * rd != d {
        return None;
    }
    let k = isize::try_from(twice.numerator().clone()).ok()?;
    Some((int(rn) / int(rd)).pow(k))
}

pub(super) fn add_term(p: &mut Poly, m: Mono, c: Rat) {
    use std::collections::btree_map::Entry;
    match p.terms.entry(m) {
        Entry::Vacant(v) => {
            if !c.is_zero() {
                v.insert(c);
            }
        }
        Entry::Occupied(mut o) => {
            *o.get_mut() += c;
            if o.get().is_zero() {
                o.remove();
            }
        }
    }
}

impl Symbols {
    /// a + b.
    pub fn add(&mut self, a: PolyId, b: PolyId) -> PolyId {
        let mut p = self.poly(a).clone();
        for (m, c) in self.poly(b).terms.clone() {
            add_term(&mut p, m, c);
        }
        self.intern(p)
    }

    /// c·a.
    pub fn scale(&mut self, a: PolyId, c: &Rat) -> PolyId {
        let mut p = Poly::default();
        if !c.is_zero() {
            p.terms = self.poly(a).terms.iter().map(|(m, x)| (m.clone(), x.clone() * c.clone())).collect();
        }
        self.intern(p)
    }

    /// −a.
    pub fn neg(&mut self, a: PolyId) -> PolyId {
        self.scale(a, &int(-1))
    }

    /// a − b.
    pub fn sub(&mut self, a: PolyId, b: PolyId) -> PolyId {
        let b = self.neg(b);
        self.add(a, b)
    }

    /// Product of two products: usually one term, more when a base is multiplied out.
    pub fn mul_mono(&mut self, a: &Mono, b: &Mono) -> PolyId {
        let exp = match (a.exp, b.exp) {
            (None, e) | (e, None) => e,
            (Some(x), Some(y)) => {
                let s = self.add(x, y);
                (!self.poly(s).terms.is_empty()).then_some(s)
            }
        };
        let mut factors: BTreeMap<AtomId, Rat> = a.factors.iter().cloned().collect();
        for (f, q) in &b.factors {
            let e = factors.entry(*f).or_insert(Rat::ZERO);
            *e += q.clone();
        }
        let mut out = Mono { exp, factors: Vec::new() };
        let mut expand = Vec::new();
        for (f, q) in factors {
            if q.is_zero() {
                continue;
            }
            match self.atom(f) {
                Atom::Base(p) if q.is_int() && is_positive(&q) => expand.push((*p, q)),
                Atom::Binary(op, ..) if op.is_predicate() && is_positive(&q) => out.factors.push((f, Rat::ONE)),
                _ => out.factors.push((f, q)),
            }
        }
        let mut r = self.term(Rat::ONE, out);
        for (p, q) in expand {
            let n = i64::try_from(q.numerator().clone()).unwrap_or(1);
            for _ in 0..n {
                r = self.mul(r, p);
            }
        }
        r
    }

    /// a · b, multiplied out.
    pub fn mul(&mut self, a: PolyId, b: PolyId) -> PolyId {
        let (x, y) = (self.poly(a).clone(), self.poly(b).clone());
        if x.terms.len() * y.terms.len() > MAX_TERMS {
            // Too large to expand: each factor becomes opaque.
            let (fa, fb) = (self.intern_atom(Atom::Base(a)), self.intern_atom(Atom::Base(b)));
            let mut factors = BTreeMap::new();
            for f in [fa, fb] {
                *factors.entry(f).or_insert(Rat::ZERO) += Rat::ONE;
            }
            return self.term(Rat::ONE, Mono { exp: None, factors: factors.into_iter().collect() });
        }
        let mut out = Poly::default();
        for (m, c) in &x.terms {
            for (n, d) in &y.terms {
                let prod = self.mul_mono(m, n);
                let k = c.clone() * d.clone();
                for (mm, cc) in self.poly(prod).terms.clone() {
                    add_term(&mut out, mm, cc * k.clone());
                }
            }
        }
        self.intern(out)
    }

    /// a / b.
    pub fn div(&mut self, a: PolyId, b: PolyId) -> PolyId {
        let inv = self.pow(b, &int(-1));
        self.mul(a, inv)
    }

    /// The largest product (with positive content) that can leave a sum under the power `q`, and the rest.
    pub(super) fn extract(&mut self, p: PolyId, integer: bool) -> (Rat, Mono, PolyId) {
        let terms = self.poly(p).terms.clone();
        let mut common: BTreeMap<AtomId, Rat> = BTreeMap::new();
        let all: BTreeSet<AtomId> = terms.keys().flat_map(|m| m.factors.iter().map(|f| f.0)).collect();
        for a in all {
            if !integer && !self.atoms[a.index()].positive {
                continue;
            }
            let powers = terms.keys().map(|m| m.factors.iter().find(|f| f.0 == a).map_or(Rat::ZERO, |f| f.1.clone()));
            // A carried scale leaves with its largest power: what stays is then bounded.
            let q = if matches!(self.atom(a), Atom::Scale(_)) { powers.max() } else { powers.min() };
            let q = q.unwrap_or(Rat::ZERO);
            if !q.is_zero() {
                common.insert(a, q);
            }
        }
        let mut exponent = Poly::default();
        let exps: Vec<Poly> = terms.keys().map(|m| m.exp.map_or(Poly::default(), |e| self.poly(e).clone())).collect();
        let keys: BTreeSet<Mono> = exps.iter().flat_map(|e| e.terms.keys().cloned()).collect();
        for k in keys {
            let q = exps.iter().map(|e| e.terms.get(&k).cloned().unwrap_or(Rat::ZERO)).min().unwrap_or(Rat::ZERO);
            if !q.is_zero() {
                exponent.terms.insert(k, q);
            }
        }
        let exp = (!exponent.terms.is_empty()).then(|| self.intern(exponent));
        let m = Mono { exp, factors: common.into_iter().collect() };
        let inverse = self.invert_mono(&m);
        let inverse = self.term(Rat::ONE, inverse);
        let rest = self.mul(p, inverse);
        // The largest coefficient becomes 1: a second extraction changes nothing.
        let abs = |c: &Rat| if is_positive(c) { c.clone() } else { -c.clone() };
        let mut content = self.poly(rest).terms.values().map(abs).max().unwrap_or(Rat::ONE);
        if integer && self.poly(rest).terms.values().next().is_some_and(|c| !is_positive(c)) {
            content = -content;
        }
        let rest = self.scale(rest, &(Rat::ONE / content.clone()));
        (content, m, rest)
    }

    pub(super) fn invert_mono(&mut self, m: &Mono) -> Mono {
        let exp = m.exp.map(|e| self.neg(e));
        Mono { exp, factors: m.factors.iter().map(|(a, q)| (*a, -q.clone())).collect() }
    }

    /// p^q for a rational q.
    pub fn pow(&mut self, p: PolyId, q: &Rat) -> PolyId {
        if q.is_zero() {
            return self.integer(1);
        }
        if *q == Rat::ONE {
            return p;
        }
        let integer = q.is_int();
        let terms = self.poly(p).terms.clone();
        if terms.is_empty() {
            return if is_positive(q) { p } else { self.of_atom(Atom::Infinity) };
        }
        if terms.len() == 1 {
            let (m, c) = terms.into_iter().next().expect("one term");
            return self.pow_mono(&c, &m, q);
        }
        if integer && is_positive(q) {
            let n = i64::try_from(q.numerator().clone()).unwrap_or(i64::MAX);
            if n <= 8 {
                let mut r = p;
                for _ in 1..n {
                    r = self.mul(r, p);
                }
                return r;
            }
        }
        let (c, m, rest) = self.extract(p, integer);
        let outside = self.pow_mono(&c, &m, q);
        if self.poly(rest).terms.len() < 2 {
            let inside = self.pow(rest, q);
            return self.mul(outside, inside);
        }
        let base = self.intern_atom(Atom::Base(rest));
        let inside = self.power_of_atom(base, q.clone());
        self.mul(outside, inside)
    }

    pub(super) fn pow_mono(&mut self, c: &Rat, m: &Mono, q: &Rat) -> PolyId {
        let integer = q.is_int();
        let mut out = self.integer(1);
        let mut kept = (Rat::ONE, Mono::default());
        if integer {
            let n = isize::try_from(q.numerator().clone()).unwrap_or(1);
            out = self.rational(c.pow(n));
        } else if *c == Rat::ONE {
        } else if is_positive(c) {
            let k = self.rational(c.clone());
            let root = exact_root(c, q);
            out = match root {
                Some(r) => self.rational(r),
                None => {
                    let b = self.intern_atom(Atom::Base(k));
                    self.power_of_atom(b, q.clone())
                }
            };
        } else {
            kept.0 = c.clone();
        }
        if let Some(e) = m.exp {
            let e = self.scale(e, q);
            let f = self.exp(e);
            out = self.mul(out, f);
        }
        for (a, k) in &m.factors {
            if integer || self.atoms[a.index()].positive {
                let power = k.clone() * q.clone();
                // Multiplying out is `mul_mono`'s task.
                let one = Mono { exp: None, factors: vec![(*a, power)] };
                let f = self.mul_mono(&one, &Mono::default());
                out = self.mul(out, f);
            } else {
                kept.1.factors.push((*a, k.clone()));
            }
        }
        if kept != (Rat::ONE, Mono::default()) {
            let inner = self.term(kept.0, kept.1);
            let b = self.intern_atom(Atom::Base(inner));
            let f = self.power_of_atom(b, q.clone());
            out = self.mul(out, f);
        }
        out
    }

    /// e^p; logarithms in p become powers.
    pub fn exp(&mut self, p: PolyId) -> PolyId {
        let mut rest = Poly::default();
        let mut out = self.integer(1);
        for (m, c) in self.poly(p).terms.clone() {
            if let (None, [(a, q)]) = (m.exp, m.factors.as_slice())
                && *q == Rat::ONE
            {
                match self.atom(*a).clone() {
                    Atom::Log(inner) => {
                        let f = self.pow(inner, &c);
                        out = self.mul(out, f);
                        continue;
                    }
                    Atom::ScaleLog(k) => {
                        let s = self.intern_atom(Atom::Scale(k));
                        let f = self.power_of_atom(s, c.clone());
                        out = self.mul(out, f);
                        continue;
                    }
                    Atom::Infinity if !is_positive(&c) => return self.integer(0),
                    _ => {}
                }
            }
            add_term(&mut rest, m, c);
        }
        if rest.terms.is_empty() {
            return out;
        }
        let e = self.intern(rest);
        let f = self.term(Rat::ONE, Mono { exp: Some(e), factors: Vec::new() });
        self.mul(out, f)
    }

    /// ln p, with every positive factor split off.
    pub fn log(&mut self, p: PolyId) -> PolyId {
        if self.constant(p) == Some(Rat::ONE) {
            return self.integer(0);
        }
        let terms = self.poly(p).terms.clone();
        let (c, m, rest) = if terms.len() == 1 {
            let (m, c) = terms.into_iter().next().expect("one term");
            let one = self.integer(1);
            (c, m, one)
        } else {
            self.extract(p, false)
        };
        let mut out = m.exp.unwrap_or_else(|| self.intern(Poly::default()));
        let mut kept = (Rat::ONE, Mono::default());
        if c == Rat::ONE {
        } else if is_positive(&c) {
            let k = self.rational(c);
            let f = self.of_atom(Atom::Log(k));
            out = self.add(out, f);
        } else {
            kept.0 = c;
        }
        for (a, q) in m.factors {
            if !self.atoms[a.index()].positive {
                kept.1.factors.push((a, q));
                continue;
            }
            let l = match self.atom(a).clone() {
                Atom::Base(b) => self.of_atom(Atom::Log(b)),
                Atom::Scale(k) => self.of_atom(Atom::ScaleLog(k)),
                _ => {
                    let b = self.power_of_atom(a, Rat::ONE);
                    self.of_atom(Atom::Log(b))
                }
            };
            let l = self.scale(l, &q);
            out = self.add(out, l);
        }
        let inner = self.term(kept.0, kept.1);
        let inner = self.mul(inner, rest);
        if self.constant(inner) != Some(Rat::ONE) {
            let l = self.of_atom(Atom::Log(inner));
            out = self.add(out, l);
        }
        out
    }
}
