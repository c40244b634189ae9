//! Canonical symbolic expressions: scalar functions as sums of products of powers, with one exponential each.
//!
//! A [`Poly`] is Σ coefficient · e^E · Π atomᵢ^qᵢ with rational coefficients and exponents, E itself a sum. Quotients,
//! roots, sigmoids and tanh become powers, so that rewritten texts meet in one form: `exp(a-b)` and `exp(a)/exp(b)`,
//! `x/sqrt(v)` and `x*rsqrt(v)`, `P/L*V` and `P*V/L`. Everything is interned: equal expressions have equal ids.
//! Invariants: no term has coefficient 0; a [`Atom::Base`] never carries a positive integer power (it is multiplied
//! out); reduced indices are named by nesting height, so renaming an index changes nothing. Identities are those of
//! real arithmetic wherever both sides are finite.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

pub use dashu_ratio::RBig as Rat;

use crate::arena::Id;
use crate::cascade::{RankId, Reducer, Size, TensorId};
use crate::define_ids;
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

define_ids! {
    /// An interned sum of products.
    PolyId,
    /// An interned indivisible factor.
    AtomId,
}

/// An index variable.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Var {
    /// A free index, or one that is being bound.
    Free {
        /// Unique number.
        id: u32,
        /// Its range.
        extent: Size,
    },
    /// The index of a reduction, named by the height of its body.
    Bound {
        /// One more than the largest level within the body.
        level: u32,
        /// Position among the reduction's indices.
        slot: u32,
        /// Its range.
        extent: Size,
    },
}

impl Var {
    /// Its range.
    pub fn extent(&self) -> &Size {
        match self {
            Var::Free { extent, .. } | Var::Bound { extent, .. } => extent,
        }
    }

    /// Whether it ranges over exactly this rank.
    pub fn over(&self, rank: RankId) -> bool {
        *self.extent() == Size::Rank(rank)
    }
}

/// An indivisible factor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Atom {
    /// An index.
    Var(Var),
    /// An extent.
    Extent(Size),
    /// An element of a tensor that is not inlined.
    Read(TensorId, Vec<PolyId>),
    /// A sum of two or more terms, or a positive constant, under a power.
    Base(PolyId),
    /// Natural logarithm.
    Log(PolyId),
    /// A function without a normal form of its own.
    Unary(UnaryOp, PolyId),
    /// Likewise, of two arguments; comparisons are against 0.
    Binary(BinaryOp, PolyId, PolyId),
    /// Floor quotient of integers.
    FloorDiv(PolyId, PolyId),
    /// `if cond then a else b`.
    Select(PolyId, PolyId, PolyId),
    /// A rounding point written in the text.
    Cast(DType, PolyId),
    /// A reduction; component `part` of its results.
    Reduce {
        /// The monoid.
        op: Reducer,
        /// Which result.
        part: u32,
        /// Indices it binds.
        vars: Vec<Var>,
        /// Conjuncts that hold at the points reduced over.
        filter: Vec<PolyId>,
        /// What is reduced, one per component.
        body: Vec<PolyId>,
    },
    /// A running reduction along a free index.
    Scan(Reducer, Var, PolyId),
    /// The segment of an index by offsets.
    Segment(TensorId, PolyId),
    /// A uniform random value.
    Rand(PolyId, Vec<PolyId>),
    /// +∞.
    Infinity,
    /// Not a number.
    Nan,
    /// A scale e^M carried apart; always positive.
    Scale(u32),
    /// The logarithm M of [`Atom::Scale`].
    ScaleLog(u32),
    /// A value computed elsewhere (an accumulator).
    Slot(u32),
}

/// Coefficient-free product: e^exp · Π atom^q, factors ordered by id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mono {
    /// Argument of the exponential.
    pub exp: Option<PolyId>,
    /// Factors and their non-zero exponents.
    pub factors: Vec<(AtomId, Rat)>,
}

/// A sum of products; terms ordered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Poly {
    /// Products and their non-zero coefficients.
    pub terms: BTreeMap<Mono, Rat>,
}

#[derive(Clone, Debug)]
struct AtomFacts {
    atom: Atom,
    vars: BTreeSet<Var>,
    positive: bool,
    /// Largest level of a bound index within.
    height: u32,
    /// Reductions within: the ranges of their indices, and what they vary with.
    inner: Reductions,
}

/// Reductions behind a tensor: the ranges of the indices each binds, and the dimensions it varies with.
pub type Hidden = BTreeSet<(Vec<Size>, BTreeSet<usize>)>;

/// Reductions within a value: the ranges of the indices each binds, and the variables each varies with.
pub type Reductions = BTreeSet<(Vec<Size>, BTreeSet<Var>)>;

/// The interning table.
#[derive(Clone, Default)]
pub struct Symbols {
    polys: Vec<Poly>,
    poly_ids: HashMap<Poly, PolyId>,
    atoms: Vec<AtomFacts>,
    atom_ids: HashMap<Atom, AtomId>,
    /// Tensors known to be positive (declared facts).
    pub positive: BTreeSet<TensorId>,
    /// Of tensors read without looking into them: the ranges each reduction behind them binds, with the dimensions of
    /// the tensor that it varies with.
    pub hidden: BTreeMap<TensorId, Hidden>,
    fresh: u32,
}

/// What one rewriting has already made of sums and factors.
#[derive(Default)]
struct Rewritten {
    sums: HashMap<PolyId, PolyId>,
    atoms: HashMap<AtomId, PolyId>,
}

/// Products of sums with more terms than this stay unexpanded.
const MAX_TERMS: usize = 400;

fn int(n: i64) -> Rat {
    Rat::from(n)
}

fn is_positive(q: &Rat) -> bool {
    *q > Rat::ZERO
}

impl Symbols {
    /// An empty table.
    pub fn new() -> Self {
        Symbols::default()
    }

    /// The sum behind an id.
    pub fn poly(&self, p: PolyId) -> &Poly {
        &self.polys[p.index()]
    }

    /// The factor behind an id.
    pub fn atom(&self, a: AtomId) -> &Atom {
        &self.atoms[a.index()].atom
    }

    /// Free variables of a factor.
    pub fn atom_vars(&self, a: AtomId) -> &BTreeSet<Var> {
        &self.atoms[a.index()].vars
    }

    /// Free variables of a sum.
    pub fn vars(&self, p: PolyId) -> BTreeSet<Var> {
        let mut out = BTreeSet::new();
        self.collect_vars(p, &mut out);
        out
    }

    fn collect_vars(&self, p: PolyId, out: &mut BTreeSet<Var>) {
        for m in self.poly(p).terms.keys() {
            if let Some(e) = m.exp {
                self.collect_vars(e, out);
            }
            for (a, _) in &m.factors {
                out.extend(self.atom_vars(*a).iter().cloned());
            }
        }
    }

    /// Reductions within a factor.
    pub fn atom_reductions(&self, a: AtomId) -> &Reductions {
        &self.atoms[a.index()].inner
    }

    /// Whether a reduction over `rank` is within a factor.
    pub fn reduces(&self, a: AtomId, rank: RankId) -> bool {
        self.atom_reductions(a).iter().any(|(extents, _)| extents.contains(&Size::Rank(rank)))
    }

    /// Reductions within a sum.
    pub fn reductions(&self, p: PolyId) -> Reductions {
        let mut out = Reductions::new();
        self.collect_reductions(p, &mut out);
        out
    }

    fn collect_reductions(&self, p: PolyId, out: &mut Reductions) {
        for m in self.poly(p).terms.keys() {
            if let Some(e) = m.exp {
                self.collect_reductions(e, out);
            }
            for (a, _) in &m.factors {
                out.extend(self.atom_reductions(*a).iter().cloned());
            }
        }
    }

    /// Free variables of one product.
    pub fn mono_vars(&self, m: &Mono) -> BTreeSet<Var> {
        let mut out = BTreeSet::new();
        if let Some(e) = m.exp {
            self.collect_vars(e, &mut out);
        }
        for (a, _) in &m.factors {
            out.extend(self.atom_vars(*a).iter().cloned());
        }
        out
    }

    fn height(&self, p: PolyId) -> u32 {
        let of = |m: &Mono| {
            let inner = m.factors.iter().map(|(a, _)| self.atoms[a.index()].height).max().unwrap_or(0);
            m.exp.map_or(inner, |e| inner.max(self.height(e)))
        };
        self.poly(p).terms.keys().map(of).max().unwrap_or(0)
    }

    /// A new free variable over `extent`.
    pub fn fresh(&mut self, extent: Size) -> Var {
        self.fresh += 1;
        Var::Free { id: self.fresh, extent }
    }

    /// Interns a sum.
    pub fn intern(&mut self, p: Poly) -> PolyId {
        if let Some(id) = self.poly_ids.get(&p) {
            return *id;
        }
        let id = PolyId::new(self.polys.len());
        self.polys.push(p.clone());
        self.poly_ids.insert(p, id);
        id
    }

    /// Interns a factor.
    pub fn intern_atom(&mut self, atom: Atom) -> AtomId {
        if let Some(id) = self.atom_ids.get(&atom) {
            return *id;
        }
        let mut vars = BTreeSet::new();
        let mut height = 0;
        let mut inner = Reductions::new();
        for p in atom_operands(&atom) {
            self.collect_vars(p, &mut vars);
            height = height.max(self.height(p));
            self.collect_reductions(p, &mut inner);
        }
        let mut positive = false;
        match &atom {
            Atom::Var(v) => {
                vars.insert(v.clone());
                if let Var::Bound { level, .. } = v {
                    height = *level;
                }
            }
            Atom::Scan(_, v, _) => {
                vars.insert(v.clone());
            }
            Atom::Reduce { op, vars: bound, body, part, .. } => {
                for v in bound {
                    vars.remove(v);
                }
                inner.insert((bound.iter().map(|v| v.extent().clone()).collect(), vars.clone()));
                positive = *part == 0
                    && match op {
                        Reducer::Op(ReduceOp::Sum | ReduceOp::Product | ReduceOp::Max | ReduceOp::Min) => {
                            self.is_positive(body[0])
                        }
                        Reducer::Op(
                            ReduceOp::LogSumExp | ReduceOp::Any | ReduceOp::All | ReduceOp::ArgMin | ReduceOp::ArgMax,
                        )
                        | Reducer::TopK { .. }
                        | Reducer::User(_) => false,
                    };
            }
            Atom::Extent(_) | Atom::Scale(_) | Atom::Infinity => positive = true,
            Atom::Read(t, at) => {
                positive = self.positive.contains(t);
                for (extents, dims) in self.hidden.get(t).into_iter().flatten() {
                    let mut over = BTreeSet::new();
                    dims.iter().filter_map(|d| at.get(*d)).for_each(|p| self.collect_vars(*p, &mut over));
                    inner.insert((extents.clone(), over));
                }
            }
            Atom::Base(p) => positive = self.is_positive(*p),
            Atom::Unary(op, _) => positive = matches!(op, UnaryOp::Abs),
            Atom::Binary(op, a, b) => {
                positive = op.is_predicate()
                    || match op {
                        BinaryOp::Max => self.is_positive(*a) || self.is_positive(*b),
                        BinaryOp::Min => self.is_positive(*a) && self.is_positive(*b),
                        _ => false,
                    }
            }
            Atom::Select(_, a, b) => positive = self.is_positive(*a) && self.is_positive(*b),
            Atom::Cast(_, a) => positive = self.is_positive(*a),
            Atom::Log(p) => {
                positive = self.constant(*p).is_some_and(|c| c > Rat::ONE);
            }
            Atom::FloorDiv(..) | Atom::Segment(..) | Atom::Rand(..) | Atom::Nan | Atom::ScaleLog(_) | Atom::Slot(_) => {
            }
        }
        let id = AtomId::new(self.atoms.len());
        self.atoms.push(AtomFacts { atom: atom.clone(), vars, positive, height, inner });
        self.atom_ids.insert(atom, id);
        id
    }

    /// Marks a slot as positive.
    pub fn set_positive(&mut self, a: AtomId) {
        self.atoms[a.index()].positive = true;
    }

    /// A factor as a sum.
    pub fn of_atom(&mut self, atom: Atom) -> PolyId {
        let a = self.intern_atom(atom);
        self.power_of_atom(a, Rat::ONE)
    }

    /// `a^q` as a sum.
    pub fn power_of_atom(&mut self, a: AtomId, q: Rat) -> PolyId {
        self.term(Rat::ONE, Mono { exp: None, factors: vec![(a, q)] })
    }

    /// A one-term sum.
    pub fn term(&mut self, c: Rat, m: Mono) -> PolyId {
        let mut p = Poly::default();
        if !c.is_zero() {
            p.terms.insert(m, c);
        }
        self.intern(p)
    }

    /// A constant.
    pub fn rational(&mut self, c: Rat) -> PolyId {
        self.term(c, Mono::default())
    }

    /// An integer constant.
    pub fn integer(&mut self, n: i64) -> PolyId {
        self.rational(int(n))
    }

    /// A float literal, exact; infinities and NaN become atoms.
    pub fn float(&mut self, x: f64) -> PolyId {
        if x.is_nan() {
            return self.of_atom(Atom::Nan);
        }
        if x.is_infinite() {
            let p = self.of_atom(Atom::Infinity);
            return if x > 0.0 { p } else { self.neg(p) };
        }
        let r = Rat::try_from(x).expect("finite");
        self.rational(r)
    }

    /// The value of a constant sum.
    pub fn constant(&self, p: PolyId) -> Option<Rat> {
        let terms = &self.poly(p).terms;
        match terms.len() {
            0 => Some(Rat::ZERO),
            1 => terms.get(&Mono::default()).cloned(),
            _ => None,
        }
    }

    /// Whether every term is known not to be negative.
    pub fn is_positive(&self, p: PolyId) -> bool {
        let even = |q: &Rat| q.is_int() && (q.clone() / int(2)).is_int();
        !self.poly(p).terms.is_empty()
            && self.poly(p).terms.iter().all(|(m, c)| {
                is_positive(c) && m.factors.iter().all(|(a, q)| self.atoms[a.index()].positive || even(q))
            })
    }

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
    fn extract(&mut self, p: PolyId, integer: bool) -> (Rat, Mono, PolyId) {
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

    fn invert_mono(&mut self, m: &Mono) -> Mono {
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

    fn pow_mono(&mut self, c: &Rat, m: &Mono, q: &Rat) -> PolyId {
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

    /// A scalar function.
    pub fn unary(&mut self, op: UnaryOp, p: PolyId) -> PolyId {
        let half = Rat::from(1) / int(2);
        match op {
            UnaryOp::Neg => self.neg(p),
            UnaryOp::Exp => self.exp(p),
            UnaryOp::Exp2 => {
                let two = self.integer(2);
                let l = self.log(two);
                let e = self.mul(p, l);
                self.exp(e)
            }
            UnaryOp::Log => self.log(p),
            UnaryOp::Log2 => {
                let two = self.integer(2);
                let (n, d) = (self.log(p), self.log(two));
                self.div(n, d)
            }
            UnaryOp::Log1p => {
                let one = self.integer(1);
                let s = self.add(one, p);
                self.log(s)
            }
            UnaryOp::Sqrt => self.pow(p, &half),
            UnaryOp::Rsqrt => self.pow(p, &-half),
            UnaryOp::Recip => self.pow(p, &int(-1)),
            UnaryOp::Sigmoid => {
                let n = self.neg(p);
                let (e, one) = (self.exp(n), self.integer(1));
                let d = self.add(one, e);
                self.pow(d, &int(-1))
            }
            UnaryOp::Tanh => {
                let d = self.scale(p, &int(2));
                let (e, one) = (self.exp(d), self.integer(1));
                let d = self.add(one, e);
                let f = self.pow(d, &int(-1));
                let f = self.scale(f, &int(-2));
                self.add(one, f)
            }
            UnaryOp::Abs => match self.sign(p) {
                Some(true) => p,
                Some(false) => self.neg(p),
                None => {
                    let q = self.lead_positive(p).0;
                    self.of_atom(Atom::Unary(op, q))
                }
            },
            UnaryOp::Not => {
                let one = self.integer(1);
                if self.is_predicate(p) { self.sub(one, p) } else { self.of_atom(Atom::Unary(op, p)) }
            }
            UnaryOp::Sin
            | UnaryOp::Cos
            | UnaryOp::Erf
            | UnaryOp::Floor
            | UnaryOp::Ceil
            | UnaryOp::Round
            | UnaryOp::Sign => self.of_atom(Atom::Unary(op, p)),
        }
    }

    /// `p` or `−p`, whichever has a positive leading coefficient, and whether it was negated.
    pub fn lead_positive(&mut self, p: PolyId) -> (PolyId, bool) {
        match self.poly(p).terms.values().next() {
            Some(c) if !is_positive(c) => (self.neg(p), true),
            _ => (p, false),
        }
    }

    fn is_predicate(&self, p: PolyId) -> bool {
        self.constant(p).is_some_and(|c| c.is_zero() || c.is_one())
            || self.poly(p).terms.keys().all(|m| {
                m.exp.is_none()
                    && m.factors.iter().all(|(a, _)| match self.atom(*a) {
                        Atom::Binary(op, ..) => op.is_predicate(),
                        Atom::Unary(op, _) => *op == UnaryOp::Not,
                        _ => false,
                    })
            })
    }

    /// A scalar function of two arguments; `integer` selects floor division.
    pub fn binary(&mut self, op: BinaryOp, a: PolyId, b: PolyId, integer: bool) -> PolyId {
        match op {
            BinaryOp::Add => self.add(a, b),
            BinaryOp::Sub => self.sub(a, b),
            BinaryOp::Mul => self.mul(a, b),
            BinaryOp::Div if integer => match (self.constant(a), self.constant(b)) {
                (_, Some(c)) if c.is_one() => a,
                _ => self.of_atom(Atom::FloorDiv(a, b)),
            },
            BinaryOp::Div => self.div(a, b),
            BinaryOp::Pow => match self.constant(b) {
                Some(q) => self.pow(a, &q),
                None if self.is_positive(a) => {
                    let l = self.log(a);
                    let e = self.mul(b, l);
                    self.exp(e)
                }
                None => self.of_atom(Atom::Binary(op, a, b)),
            },
            BinaryOp::Min | BinaryOp::Max => {
                let d = self.sub(a, b);
                match self.sign(d) {
                    Some(up) if up == (op == BinaryOp::Max) => a,
                    Some(_) => b,
                    None => {
                        let (x, y) = if a < b { (a, b) } else { (b, a) };
                        self.of_atom(Atom::Binary(op, x, y))
                    }
                }
            }
            BinaryOp::Lt | BinaryOp::Le => self.compare(op, a, b),
            BinaryOp::Gt => self.compare(BinaryOp::Lt, b, a),
            BinaryOp::Ge => self.compare(BinaryOp::Le, b, a),
            BinaryOp::Eq | BinaryOp::Ne => {
                let d = self.sub(a, b);
                let d = self.lead_positive(d).0;
                let zero = self.integer(0);
                self.compare(op, d, zero)
            }
            BinaryOp::And if self.is_predicate(a) && self.is_predicate(b) => self.mul(a, b),
            BinaryOp::Or if self.is_predicate(a) && self.is_predicate(b) => {
                let (s, p) = (self.add(a, b), self.mul(a, b));
                self.sub(s, p)
            }
            BinaryOp::And | BinaryOp::Or | BinaryOp::Mod => self.of_atom(Atom::Binary(op, a, b)),
        }
    }

    fn compare(&mut self, op: BinaryOp, a: PolyId, b: PolyId) -> PolyId {
        let d = self.sub(a, b);
        let zero = self.integer(0);
        if let Some(c) = self.constant(d) {
            let holds = match op {
                BinaryOp::Lt => c < Rat::ZERO,
                BinaryOp::Le => c <= Rat::ZERO,
                BinaryOp::Eq => c.is_zero(),
                BinaryOp::Ne => !c.is_zero(),
                _ => false,
            };
            return self.integer(i64::from(holds));
        }
        self.of_atom(Atom::Binary(op, d, zero))
    }

    /// A selection; a branch of 0 makes it a product with the condition.
    pub fn select(&mut self, cond: PolyId, a: PolyId, b: PolyId) -> PolyId {
        if a == b {
            return a;
        }
        match self.constant(cond) {
            Some(c) if c.is_zero() => return b,
            Some(_) => return a,
            None => {}
        }
        if self.is_predicate(cond) {
            if self.constant(b) == Some(Rat::ZERO) {
                return self.mul(cond, a);
            }
            if self.constant(a) == Some(Rat::ZERO) {
                let not = self.unary(UnaryOp::Not, cond);
                return self.mul(not, b);
            }
        }
        self.of_atom(Atom::Select(cond, a, b))
    }

    /// The known sign of a sum: `Some(true)` for ≥ 0, `Some(false)` for ≤ 0. Knows that no element exceeds the
    /// maximum of its fiber.
    pub fn sign(&mut self, p: PolyId) -> Option<bool> {
        if self.poly(p).terms.is_empty() || self.is_positive(p) {
            return Some(true);
        }
        let n = self.neg(p);
        if self.is_positive(n) {
            return Some(false);
        }
        for (m, c) in self.poly(p).terms.clone() {
            let [(a, q)] = m.factors.as_slice() else { continue };
            if m.exp.is_some() || *q != Rat::ONE {
                continue;
            }
            let Atom::Reduce { op: Reducer::Op(op), vars, body, filter, .. } = self.atom(*a).clone() else { continue };
            let up = match op {
                ReduceOp::Max => true,
                ReduceOp::Min => false,
                _ => continue,
            };
            let ([v], true) = (vars.as_slice(), filter.is_empty() || !filter.is_empty()) else { continue };
            // p = c·M + rest with rest = −c·body at some element: p = c·(M − body).
            for w in self.vars(p) {
                if w.extent() != v.extent() {
                    continue;
                }
                let to = self.of_atom(Atom::Var(w));
                let element = self.substitute(body[0], &BTreeMap::from([(v.clone(), to)]));
                let reduced = self.term(c.clone(), m.clone());
                let rest = self.sub(p, reduced);
                let expected = self.scale(element, &-c.clone());
                if rest == expected {
                    return Some(is_positive(&c) == up);
                }
            }
        }
        None
    }

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

    fn rewrite_sum<F>(&mut self, p: PolyId, f: &mut F, done: &mut Rewritten) -> PolyId
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

    fn rebuild<F>(&mut self, a: AtomId, f: &mut F, done: &mut Rewritten) -> PolyId
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
                super::separation::reduce(self, op, part, &temps, filter, body).value
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

    fn visit_new(&self, p: PolyId, f: &mut impl FnMut(AtomId) -> bool, seen: &mut HashSet<AtomId>) {
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

/// c^q when it is a small perfect square and q a half-integer.
fn exact_root(c: &Rat, q: &Rat) -> Option<Rat> {
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

fn add_term(p: &mut Poly, m: Mono, c: Rat) {
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
