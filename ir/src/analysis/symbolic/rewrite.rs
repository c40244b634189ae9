//! Substitution, rewriting and walks of canonical expressions.
//!
//! Invariant: a rewritten expression is in canonical form again, its reductions separated anew.

use super::*;
use crate::cascade::{Reducer, Size};
use crate::ops::BinaryOp;
use std::collections::{BTreeMap, HashMap, HashSet};

/// What one rewriting has already made of sums and factors.
#[derive(Default)]
pub(super) struct Rewritten {
    sums: HashMap<PolyId, PolyId>,
    atoms: HashMap<AtomId, PolyId>,
}

/// The sums an atom holds directly.
pub fn atom_operands(a: &Atom) -> Vec<PolyId> {
    match a {
        Atom::Var(_)
        | Atom::Extent(_)
        | Atom::Infinity
        | Atom::Nan
        | Atom::Scale(_)
        | Atom::ScaleLog(_)
        | Atom::Slot(_) => Vec::new(),
        Atom::Read(_, at) => at.clone(),
        Atom::Base(p) | Atom::Log(p) | Atom::Unary(_, p) | Atom::Cast(_, p) | Atom::Segment(_, p) => vec![*p],
        Atom::Scan(_, _, p) => vec![*p],
        Atom::Binary(_, a, b) | Atom::FloorDiv(a, b) => vec![*a, *b],
        Atom::Select(c, a, b) => vec![*c, *a, *b],
        Atom::Reduce { filter, body, .. } => body.iter().chain(filter).copied().collect(),
        Atom::Rand(s, at) => std::iter::once(*s).chain(at.iter().copied()).collect(),
    }
}

impl Symbols {
    /// Replaces free variables, renormalising whatever holds them.
    pub fn substitute(&mut self, p: PolyId, map: &BTreeMap<Var, PolyId>) -> PolyId {
        let moved = |(v, to): (&Var, &PolyId)| (self.as_var(*to).as_ref() != Some(v)).then(|| (v.clone(), *to));
        let map: BTreeMap<Var, PolyId> = map.iter().filter_map(moved).collect();
        if map.is_empty() {
            return p;
        }
        self.rewrite(p, &mut |s, a| match s.atom(a) {
            Atom::Var(v) => map.get(v).copied(),
            _ if s.atom_vars(a).iter().all(|v| !map.contains_key(v)) => Some(s.power_of_atom(a, Rat::ONE)),
            _ => None,
        })
    }

    /// Rebuilds `p` with atoms replaced where `f` gives a value; atoms it leaves are rebuilt from their operands.
    /// `f` is asked once per atom.
    pub fn rewrite(&mut self, p: PolyId, f: &mut impl FnMut(&mut Symbols, AtomId) -> Option<PolyId>) -> PolyId {
        self.rewrite_sum(p, f, &mut Rewritten::default())
    }

    pub(super) fn rewrite_sum<F>(&mut self, p: PolyId, f: &mut F, done: &mut Rewritten) -> PolyId
    where
        F: FnMut(&mut Symbols, AtomId) -> Option<PolyId>,
    {
        if let Some(known) = done.sums.get(&p) {
            return *known;
        }
        let mut out = self.integer(0);
        for (m, c) in self.poly(p).terms.clone() {
            let mut t = self.rational(c);
            if let Some(e) = m.exp {
                let e = self.rewrite_sum(e, f, done);
                let e = self.exp(e);
                t = self.mul(t, e);
            }
            for (a, q) in m.factors {
                let v = match done.atoms.get(&a) {
                    Some(v) => *v,
                    None => {
                        let v = f(self, a).unwrap_or_else(|| self.rebuild(a, f, done));
                        done.atoms.insert(a, v);
                        v
                    }
                };
                let v = self.pow(v, &q);
                t = self.mul(t, v);
            }
            out = self.add(out, t);
        }
        done.sums.insert(p, out);
        out
    }

    pub(super) fn rebuild<F>(&mut self, a: AtomId, f: &mut F, done: &mut Rewritten) -> PolyId
    where
        F: FnMut(&mut Symbols, AtomId) -> Option<PolyId>,
    {
        match self.atom(a).clone() {
            atom @ (Atom::Var(_)
            | Atom::Extent(_)
            | Atom::Infinity
            | Atom::Nan
            | Atom::Scale(_)
            | Atom::ScaleLog(_)
            | Atom::Slot(_)) => self.of_atom(atom),
            Atom::Read(t, at) => {
                let at = at.into_iter().map(|x| self.rewrite_sum(x, f, done)).collect();
                self.of_atom(Atom::Read(t, at))
            }
            Atom::Base(p) => self.rewrite_sum(p, f, done),
            Atom::Log(p) => {
                let p = self.rewrite_sum(p, f, done);
                self.log(p)
            }
            Atom::Unary(op, p) => {
                let p = self.rewrite_sum(p, f, done);
                self.unary(op, p)
            }
            Atom::Binary(op, x, y) => {
                let (x, y) = (self.rewrite_sum(x, f, done), self.rewrite_sum(y, f, done));
                self.binary(op, x, y, false)
            }
            Atom::FloorDiv(x, y) => {
                let (x, y) = (self.rewrite_sum(x, f, done), self.rewrite_sum(y, f, done));
                self.binary(BinaryOp::Div, x, y, true)
            }
            Atom::Select(c, x, y) => {
                let (c, x, y) =
                    (self.rewrite_sum(c, f, done), self.rewrite_sum(x, f, done), self.rewrite_sum(y, f, done));
                self.select(c, x, y)
            }
            Atom::Cast(d, p) => {
                let p = self.rewrite_sum(p, f, done);
                self.of_atom(Atom::Cast(d, p))
            }
            Atom::Segment(t, p) => {
                let p = self.rewrite_sum(p, f, done);
                self.of_atom(Atom::Segment(t, p))
            }
            Atom::Rand(s, at) => {
                let s = self.rewrite_sum(s, f, done);
                let at = at.into_iter().map(|x| self.rewrite_sum(x, f, done)).collect();
                self.of_atom(Atom::Rand(s, at))
            }
            Atom::Scan(op, v, p) => {
                let at = self.of_atom(Atom::Var(v.clone()));
                let at = self.rewrite_sum(at, f, done);
                let p = self.rewrite_sum(p, f, done);
                match self.as_var(at) {
                    Some(w) => self.of_atom(Atom::Scan(op, w, p)),
                    // A running reduction read at one point keeps its own index.
                    None => self.of_atom(Atom::Scan(op, v, p)),
                }
            }
            Atom::Reduce { op, part, vars, filter, body } => {
                let mut open = BTreeMap::new();
                let mut temps = Vec::new();
                for v in &vars {
                    let t = self.fresh(v.extent().clone());
                    let x = self.of_atom(Atom::Var(t.clone()));
                    open.insert(v.clone(), x);
                    temps.push(t);
                }
                let mut through = |s: &mut Symbols, p: PolyId| {
                    let p = s.substitute(p, &open);
                    s.rewrite_sum(p, f, done)
                };
                let filter: Vec<PolyId> = filter.into_iter().map(|p| through(self, p)).collect();
                let body: Vec<PolyId> = body.into_iter().map(|p| through(self, p)).collect();
                crate::analysis::separation::reduce(self, op, part, &temps, filter, body).value
            }
        }
    }

    /// The variable a sum consists of, if it is one.
    pub fn as_var(&self, p: PolyId) -> Option<Var> {
        let terms = &self.poly(p).terms;
        let (m, c) = terms.iter().next()?;
        match (terms.len(), m.exp, m.factors.as_slice()) {
            (1, None, [(a, q)]) if c.is_one() && q.is_one() => match self.atom(*a) {
                Atom::Var(v) => Some(v.clone()),
                _ => None,
            },
            _ => None,
        }
    }

    /// A reduction as an atom: its indices renamed by height.
    pub fn close_reduce(
        &mut self,
        op: Reducer,
        part: u32,
        temps: &[Var],
        filter: Vec<PolyId>,
        body: Vec<PolyId>,
    ) -> AtomId {
        let level = 1 + body.iter().chain(&filter).map(|p| self.height(*p)).max().unwrap_or(0);
        let mut order: Vec<Var> = temps.to_vec();
        order.sort_by(|a, b| a.extent().cmp(b.extent()).then(a.cmp(b)));
        let mut map = BTreeMap::new();
        let mut vars = Vec::new();
        for (slot, t) in order.iter().enumerate() {
            let v = Var::Bound { level, slot: slot as u32, extent: t.extent().clone() };
            let x = self.of_atom(Atom::Var(v.clone()));
            map.insert(t.clone(), x);
            vars.push(v);
        }
        let mut filter: Vec<PolyId> = filter.into_iter().map(|p| self.substitute(p, &map)).collect();
        filter.sort();
        filter.dedup();
        let body = body.into_iter().map(|p| self.substitute(p, &map)).collect();
        self.intern_atom(Atom::Reduce { op, part, vars, filter, body })
    }

    /// An extent as a sum: products and sums of ranks are multiplied out.
    pub fn size(&mut self, s: &Size) -> PolyId {
        match s {
            Size::Const(n) => self.rational(Rat::from(*n)),
            Size::Rank(_) => self.of_atom(Atom::Extent(s.clone())),
            Size::Add(a, b) => {
                let (a, b) = (self.size(a), self.size(b));
                self.add(a, b)
            }
            Size::Sub(a, b) => {
                let (a, b) = (self.size(a), self.size(b));
                self.sub(a, b)
            }
            Size::Mul(a, b) => {
                let (a, b) = (self.size(a), self.size(b));
                self.mul(a, b)
            }
            Size::Div(..) | Size::CeilDiv(..) | Size::Min(..) | Size::Max(..) => self.of_atom(Atom::Extent(s.clone())),
        }
    }

    /// Calls `f` on every atom within, once, outermost first; `f` says whether to go inside.
    pub fn visit(&self, p: PolyId, f: &mut impl FnMut(AtomId) -> bool) {
        self.visit_new(p, f, &mut HashSet::new());
    }

    /// Likewise from an atom.
    pub fn visit_atom(&self, a: AtomId, f: &mut impl FnMut(AtomId) -> bool) {
        let mut seen = HashSet::from([a]);
        if f(a) {
            for p in atom_operands(self.atom(a)) {
                self.visit_new(p, f, &mut seen);
            }
        }
    }

    pub(super) fn visit_new(&self, p: PolyId, f: &mut impl FnMut(AtomId) -> bool, seen: &mut HashSet<AtomId>) {
        for m in self.poly(p).terms.keys() {
            if let Some(e) = m.exp {
                self.visit_new(e, f, seen);
            }
            for (a, _) in &m.factors {
                if seen.insert(*a) && f(*a) {
                    for p in atom_operands(self.atom(*a)) {
                        self.visit_new(p, f, seen);
                    }
                }
            }
        }
    }
}
