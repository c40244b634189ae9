//! Canonical symbolic expressions: scalar functions as sums of products of powers, with one exponential each.
//!
//! A [`Poly`] is Σ coefficient · e^E · Π atomᵢ^qᵢ with rational coefficients and exponents, E itself a sum. Quotients,
//! roots, sigmoids and tanh become powers, so that rewritten texts meet in one form: `exp(a-b)` and `exp(a)/exp(b)`,
//! `x/sqrt(v)` and `x*rsqrt(v)`, `P/L*V` and `P*V/L`. Everything is interned: equal expressions have equal ids.
//! Invariants: no term has coefficient 0; a [`Atom::Base`] never carries a positive integer power (it is multiplied
//! out); reduced indices are named by nesting height, so renaming an index changes nothing. Identities are those of
//! real arithmetic wherever both sides are finite.

use std::collections::{BTreeMap, BTreeSet, HashMap};

pub use dashu_ratio::RBig as Rat;

use crate::arena::Id;
use crate::cascade::{RankId, Reducer, Size, TensorId};
use crate::define_ids;
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

mod arithmetic;
mod functions;
mod rewrite;

pub use rewrite::atom_operands;

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
}
