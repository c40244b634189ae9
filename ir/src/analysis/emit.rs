//! Canonical expressions back to cascade IR.
//!
//! Where a canonical value is that of a tensor of the cascade, the tensor is read, so contractions stay the Einsums
//! they were; a reduction that no tensor holds gets an Einsum of its own. Invariant: what is emitted evaluates to the
//! canonical value and keeps e^x/(1+e^x) a sigmoid, so nothing overflows that did not before.

use std::collections::{BTreeMap, BTreeSet};

use super::inline::Definition;
use super::interval::one_plus_exp;
use super::symbolic::{Atom, AtomId, Mono, PolyId, Rat, Symbols, Var};
use crate::cascade::{
    Cascade, Einsum, Expr, ExprId, Index, IndexId, IndexKind, RankId, Reducer, Size, Storage, Target, Tensor, TensorId,
    TensorKind,
};
use crate::diag::Span;
use crate::dtype::DType;
use crate::ops::{BinaryOp, UnaryOp};

/// What stands in the way of emitting: a construct without a text form on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported(pub &'static str);

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} has no text form on its own", self.0)
    }
}

impl std::error::Error for Unsupported {}

type Emit<T> = Result<T, Unsupported>;

/// Expressions of the statement under construction.
pub struct Scope {
    /// Index of each variable.
    pub indices: BTreeMap<Var, IndexId>,
    /// Conjuncts known to hold: tensors of this support may be read.
    pub holds: BTreeSet<PolyId>,
    /// Values of slots and of logarithms of scales, by atom.
    pub slots: BTreeMap<AtomId, ExprId>,
}

/// Writes into a cascade.
pub struct Emitter<'a> {
    /// The cascade written to.
    pub c: &'a mut Cascade,
    /// The table of the canonical expressions.
    pub s: &'a mut Symbols,
    /// Tensors whose values may be read instead of recomputed.
    pub tensors: &'a BTreeMap<TensorId, Definition>,
    /// Names of variables, from the text.
    pub names: BTreeMap<Var, String>,
    /// Einsums that were needed besides, in order.
    pub produced: Vec<Einsum>,
    /// Tensors of the cascade that were read.
    pub read: BTreeSet<TensorId>,
    made: BTreeMap<AtomId, (TensorId, Vec<Var>)>,
}

impl<'a> Emitter<'a> {
    /// An emitter into `c`.
    pub fn new(c: &'a mut Cascade, s: &'a mut Symbols, tensors: &'a BTreeMap<TensorId, Definition>) -> Self {
        Emitter {
            c,
            s,
            tensors,
            names: BTreeMap::new(),
            produced: Vec::new(),
            read: BTreeSet::new(),
            made: BTreeMap::new(),
        }
    }

    /// Stores an expression.
    pub fn push(&mut self, e: Expr) -> ExprId {
        self.c.push_expr(e, Span::default())
    }

    /// a ∘ b.
    pub fn binary(&mut self, op: BinaryOp, a: ExprId, b: ExprId) -> ExprId {
        self.push(Expr::Binary(op, a, b))
    }

    /// f(a).
    pub fn unary(&mut self, op: UnaryOp, a: ExprId) -> ExprId {
        self.push(Expr::Unary(op, a))
    }

    /// A float literal.
    pub fn float(&mut self, x: f64) -> ExprId {
        self.push(Expr::Float(x))
    }

    /// A new index over the range of `v`, named as in the text where it has a name there.
    pub fn index(&mut self, v: &Var, kind: IndexKind, taken: &BTreeMap<Var, IndexId>) -> IndexId {
        let extent = v.extent().clone();
        let rank = match extent {
            Size::Rank(r) => Some(r),
            _ => None,
        };
        let base = self.names.get(v).cloned().unwrap_or_else(|| match rank {
            Some(r) => self.c.ranks[r].name.to_lowercase(),
            None => "i".into(),
        });
        let mut name = base.clone();
        let mut k = 1;
        while taken.values().any(|i| self.c.indices[*i].name == name)
            || self.c.tensors.iter().any(|(_, t)| t.name == name)
        {
            k += 1;
            name = format!("{base}_{k}");
        }
        self.c.indices.push(Index { name, extent, rank, kind, span: Span::default() })
    }

    /// A new tensor with a name of its own.
    pub fn tensor(&mut self, base: &str, dims: Vec<Size>, kind: TensorKind, dtype: DType) -> TensorId {
        let mut name = base.to_string();
        let mut k = 1;
        while self.c.tensors.iter().any(|(_, t)| t.name == name)
            || self.c.indices.iter().any(|(_, i)| i.name == name)
            || self.c.ranks.iter().any(|(_, r)| r.name == name)
        {
            k += 1;
            name = format!("{base}_{k}");
        }
        self.c.tensors.push(Tensor {
            name,
            docs: Vec::new(),
            dtype,
            declared: false,
            storage: Storage::default(),
            dims,
            kind,
            default: None,
            span: Span::default(),
        })
    }

    /// The conjunction of predicates; none when there are none.
    pub fn conjunction(&mut self, all: &[PolyId], at: &mut Scope) -> Emit<Option<ExprId>> {
        let mut out = None;
        for p in all {
            let e = self.condition(*p, at)?;
            out = Some(match out {
                None => e,
                Some(o) => self.binary(BinaryOp::And, o, e),
            });
        }
        Ok(out)
    }

    /// A predicate: a product of truth values, its negation, or any number that is not 0.
    pub fn condition(&mut self, p: PolyId, at: &mut Scope) -> Emit<ExprId> {
        let factors = |s: &Symbols, p: PolyId| {
            let terms = &s.poly(p).terms;
            let (m, c) = terms.iter().next()?;
            let plain = terms.len() == 1 && c.is_one() && m.exp.is_none() && !m.factors.is_empty();
            (plain && m.factors.iter().all(|f| f.1.is_one())).then(|| m.factors.iter().map(|f| f.0).collect::<Vec<_>>())
        };
        let truth = |e: &Emitter<'_>, a: AtomId| match e.s.atom(a) {
            Atom::Binary(op, ..) => op.is_predicate(),
            Atom::Unary(op, _) => *op == UnaryOp::Not,
            Atom::Read(t, _) => e.c.tensors[*t].dtype == DType::Bool,
            _ => false,
        };
        let one = self.s.integer(1);
        let not = self.s.sub(one, p);
        for (q, negated) in [(p, false), (not, true)] {
            let Some(all) = factors(self.s, q) else { continue };
            if !all.iter().all(|a| truth(self, *a)) {
                continue;
            }
            let mut out = None;
            for a in all {
                let e = self.atom(a, at)?;
                out = Some(match out {
                    None => e,
                    Some(o) => self.binary(BinaryOp::And, o, e),
                });
            }
            let e = out.expect("a product of one factor or more");
            return Ok(if negated { self.unary(UnaryOp::Not, e) } else { e });
        }
        let (e, zero) = (self.poly(p, at)?, self.float(0.0));
        Ok(self.binary(BinaryOp::Ne, e, zero))
    }

    /// A sum as an integer expression.
    pub fn integer(&mut self, p: PolyId, at: &mut Scope) -> Emit<ExprId> {
        self.sum(p, at, true)
    }

    /// A sum as a scalar expression.
    pub fn poly(&mut self, p: PolyId, at: &mut Scope) -> Emit<ExprId> {
        self.sum(p, at, false)
    }

    fn constant(&mut self, c: &Rat, integer: bool) -> ExprId {
        match i64::try_from(c.numerator().clone()) {
            Ok(n) if integer && c.is_int() => self.push(Expr::Int(n)),
            _ => self.float(c.to_f64().value()),
        }
    }

    fn sum(&mut self, p: PolyId, at: &mut Scope, integer: bool) -> Emit<ExprId> {
        if let Some(c) = self.s.constant(p) {
            return Ok(self.constant(&c, integer));
        }
        if !integer && let Some(e) = self.as_tensor(p, at)? {
            return Ok(e);
        }
        let mut terms: Vec<(Mono, Rat)> = self.s.poly(p).terms.clone().into_iter().collect();
        // A positive term first, so that the others subtract from it.
        terms.sort_by_key(|(_, c)| *c < Rat::ZERO);
        let mut out: Option<ExprId> = None;
        for (m, c) in terms {
            let negative = c < Rat::ZERO;
            let size = if negative { -c } else { c };
            let t = self.product(&m, &size, at, integer)?;
            out = Some(match (out, negative) {
                (None, false) => t,
                (None, true) => self.unary(UnaryOp::Neg, t),
                (Some(o), false) => self.binary(BinaryOp::Add, o, t),
                (Some(o), true) => self.binary(BinaryOp::Sub, o, t),
            });
        }
        Ok(out.expect("a sum that is no constant has terms"))
    }

    fn product(&mut self, m: &Mono, c: &Rat, at: &mut Scope, integer: bool) -> Emit<ExprId> {
        let mut exponent = m.exp.unwrap_or_else(|| self.s.integer(0));
        let (mut over, mut under, mut conditions) = (Vec::new(), Vec::new(), Vec::new());
        let half = Rat::from(1) / Rat::from(2);
        let mut exponentials = Vec::new();
        for (a, q) in &m.factors {
            let atom = self.s.atom(*a).clone();
            match &atom {
                Atom::Scale(k) => {
                    let l = self.s.of_atom(Atom::ScaleLog(*k));
                    let l = self.s.scale(l, q);
                    exponent = self.s.add(exponent, l);
                    continue;
                }
                Atom::Binary(op, ..) if op.is_predicate() && q.is_one() && !integer => {
                    conditions.push(self.atom(*a, at)?);
                    continue;
                }
                Atom::Base(p) if *q == Rat::NEG_ONE => {
                    if let Some(x) = one_plus_exp(self.s, *p) {
                        // e^x/(1+e^x) = σ(x); 1/(1+e^x) = σ(−x).
                        let with = self.s.sub(exponent, x);
                        let up = self.s.poly(with).terms.len() < self.s.poly(exponent).terms.len();
                        let argument = if up { x } else { self.s.neg(x) };
                        if up {
                            exponent = with;
                        }
                        let e = self.poly(argument, at)?;
                        exponentials.push(self.unary(UnaryOp::Sigmoid, e));
                        continue;
                    }
                }
                _ => {}
            }
            let (size, down) = if *q < Rat::ZERO { (-q.clone(), true) } else { (q.clone(), false) };
            let side = if down { &mut under } else { &mut over };
            let e = self.atom(*a, at)?;
            let e = if size.is_one() {
                e
            } else if size == half {
                self.unary(UnaryOp::Sqrt, e)
            } else if size.is_int() && size <= Rat::from(4) {
                let n = i64::try_from(size.numerator().clone()).unwrap_or(1);
                let mut r = e;
                for _ in 1..n {
                    r = self.binary(BinaryOp::Mul, r, e);
                }
                r
            } else {
                let q = self.float(size.to_f64().value());
                self.binary(BinaryOp::Pow, e, q)
            };
            side.push(e);
        }
        if !self.s.poly(exponent).terms.is_empty() {
            let e = self.poly(exponent, at)?;
            over.insert(0, self.unary(UnaryOp::Exp, e));
        }
        over.extend(exponentials);
        // Small integer denominators stay denominators.
        let (n, d) = (Rat::from(c.numerator().clone()), Rat::from(c.denominator().clone()));
        let literal = c.clone().denominator().clone() > 1024u32.into();
        let (n, d) = if literal { (c.clone(), Rat::ONE) } else { (n, d) };
        if !n.is_one() || over.is_empty() {
            let k = self.constant(&n, integer);
            over.insert(0, k);
        }
        if !d.is_one() {
            under.insert(0, self.constant(&d, integer));
        }
        let mut out = over[0];
        for e in &over[1..] {
            out = self.binary(BinaryOp::Mul, out, *e);
        }
        if let Some((first, rest)) = under.split_first() {
            let mut d = *first;
            for e in rest {
                d = self.binary(BinaryOp::Mul, d, *e);
            }
            out = self.binary(BinaryOp::Div, out, d);
        }
        if let Some((first, rest)) = conditions.split_first() {
            let mut cond = *first;
            for e in rest {
                cond = self.binary(BinaryOp::And, cond, *e);
            }
            let zero = self.float(0.0);
            out = self.push(Expr::Select(cond, out, zero));
        }
        Ok(out)
    }

    fn atom(&mut self, a: AtomId, at: &mut Scope) -> Emit<ExprId> {
        if let Some(e) = at.slots.get(&a) {
            return Ok(*e);
        }
        match self.s.atom(a).clone() {
            Atom::Var(v) => match at.indices.get(&v) {
                Some(i) => Ok(self.push(Expr::Index(*i))),
                None => Err(Unsupported("an index outside its statement")),
            },
            Atom::Extent(n) => Ok(self.push(Expr::Size(n))),
            Atom::Read(tensor, places) => {
                let places = places.into_iter().map(|p| self.integer(p, at)).collect::<Emit<Vec<_>>>()?;
                self.read.insert(tensor);
                Ok(self.push(Expr::Read { tensor, at: places }))
            }
            Atom::Base(p) => self.poly(p, at),
            Atom::Log(p) => {
                let e = self.poly(p, at)?;
                Ok(self.unary(UnaryOp::Log, e))
            }
            Atom::Unary(op, p) => {
                let e = self.poly(p, at)?;
                Ok(self.unary(op, e))
            }
            Atom::Binary(op, x, y) => {
                let whole = self.is_integer(x) && self.is_integer(y);
                let (x, y) =
                    if op.is_predicate() && self.s.constant(y) == Some(Rat::ZERO) { self.sides(x) } else { (x, y) };
                let (x, y) = (self.sum(x, at, whole)?, self.sum(y, at, whole)?);
                Ok(self.binary(op, x, y))
            }
            Atom::FloorDiv(x, y) => {
                let (x, y) = (self.integer(x, at)?, self.integer(y, at)?);
                Ok(self.binary(BinaryOp::Div, x, y))
            }
            Atom::Select(k, x, y) => {
                let (k, x, y) = (self.condition(k, at)?, self.poly(x, at)?, self.poly(y, at)?);
                Ok(self.push(Expr::Select(k, x, y)))
            }
            Atom::Cast(d, p) => {
                let e = self.poly(p, at)?;
                Ok(self.push(Expr::Cast(d, e)))
            }
            Atom::Segment(offsets, p) => match self.s.as_var(p).and_then(|v| at.indices.get(&v).copied()) {
                Some(of) => {
                    self.read.insert(offsets);
                    Ok(self.push(Expr::Segment { offsets, of }))
                }
                None => Err(Unsupported("the segment of a computed index")),
            },
            Atom::Rand(seed, coords) => {
                let seed = self.integer(seed, at)?;
                let coords = coords.into_iter().map(|p| self.integer(p, at)).collect::<Emit<Vec<_>>>()?;
                Ok(self.push(Expr::Rand { seed, coords }))
            }
            Atom::Infinity => Ok(self.float(f64::INFINITY)),
            Atom::Nan => Ok(self.float(f64::NAN)),
            Atom::Reduce { .. } => self.reduction(a, at),
            Atom::Scan(..) => Err(Unsupported("a running reduction within a derived stream")),
            Atom::Scale(_) | Atom::ScaleLog(_) | Atom::Slot(_) => Err(Unsupported("a carried value out of its scope")),
        }
    }

    /// p ≤ 0 as positive terms against negative ones.
    fn sides(&mut self, p: PolyId) -> (PolyId, PolyId) {
        let (mut left, mut right) = (self.s.integer(0), self.s.integer(0));
        for (m, c) in self.s.poly(p).terms.clone() {
            if c < Rat::ZERO {
                let t = self.s.term(-c, m);
                right = self.s.add(right, t);
            } else {
                let t = self.s.term(c, m);
                left = self.s.add(left, t);
            }
        }
        (left, right)
    }

    fn is_integer(&self, p: PolyId) -> bool {
        self.s.poly(p).terms.iter().all(|(m, c)| {
            c.is_int()
                && m.exp.is_none()
                && m.factors.iter().all(|(a, q)| {
                    q.is_int()
                        && *q > Rat::ZERO
                        && match self.s.atom(*a) {
                            Atom::Var(_) | Atom::Extent(_) | Atom::FloorDiv(..) | Atom::Segment(..) => true,
                            Atom::Read(t, _) => self.c.tensors[*t].dtype.is_int(),
                            Atom::Binary(op, x, y) => {
                                *op == BinaryOp::Mod && self.is_integer(*x) && self.is_integer(*y)
                            }
                            _ => false,
                        }
                })
        })
    }

    /// A read of a tensor of the cascade that has this value.
    fn as_tensor(&mut self, p: PolyId, at: &mut Scope) -> Emit<Option<ExprId>> {
        let mut worth = self.s.poly(p).terms.len() > 1;
        self.s.visit(p, &mut |a| {
            worth |= !matches!(self.s.atom(a), Atom::Read(..) | Atom::Var(_) | Atom::Extent(_));
            false
        });
        worth |= self.s.poly(p).terms.keys().any(|m| m.exp.is_some() || m.factors.len() > 1);
        if !worth {
            return Ok(None);
        }
        let vars: Vec<Var> = self.s.vars(p).into_iter().collect();
        for (t, d) in self.tensors {
            if !d.inlined || d.free.len() != vars.len() {
                continue;
            }
            let free: Vec<Var> = d.free.iter().map(|f| f.1.clone()).collect();
            let mut tried = 0;
            let found = self.assign(d, &free, &vars, &mut Vec::new(), p, &at.holds, &mut tried);
            if let Some(map) = found {
                let places: Vec<PolyId> = d.at.iter().map(|x| self.s.substitute(*x, &map)).collect();
                let places = places.into_iter().map(|x| self.integer(x, at)).collect::<Emit<Vec<_>>>()?;
                self.read.insert(*t);
                return Ok(Some(self.push(Expr::Read { tensor: *t, at: places })));
            }
        }
        Ok(None)
    }

    /// A renaming of a definition's free variables under which it equals `p`.
    #[allow(clippy::too_many_arguments)]
    fn assign(
        &mut self,
        d: &Definition,
        free: &[Var],
        vars: &[Var],
        chosen: &mut Vec<Var>,
        p: PolyId,
        holds: &BTreeSet<PolyId>,
        tried: &mut usize,
    ) -> Option<BTreeMap<Var, PolyId>> {
        if chosen.len() == free.len() {
            *tried += 1;
            let mut map = BTreeMap::new();
            for (f, v) in free.iter().zip(chosen.iter()) {
                let x = self.s.of_atom(Atom::Var(v.clone()));
                map.insert(f.clone(), x);
            }
            if self.s.substitute(d.value, &map) != p {
                return None;
            }
            let supported = d.support.iter().all(|q| {
                let q = self.s.substitute(*q, &map);
                holds.contains(&q)
            });
            return supported.then_some(map);
        }
        for v in vars {
            if *tried > 120 || chosen.contains(v) || v.extent() != free[chosen.len()].extent() {
                continue;
            }
            chosen.push(v.clone());
            if let Some(m) = self.assign(d, free, vars, chosen, p, holds, tried) {
                return Some(m);
            }
            chosen.pop();
        }
        None
    }

    /// A reduction as a read of an Einsum of its own.
    fn reduction(&mut self, a: AtomId, at: &mut Scope) -> Emit<ExprId> {
        let as_poly = self.s.power_of_atom(a, Rat::ONE);
        if let Some(e) = self.as_tensor(as_poly, at)? {
            return Ok(e);
        }
        if !self.made.contains_key(&a) {
            let Atom::Reduce { op, part: 0, vars, filter, body } = self.s.atom(a).clone() else {
                return Err(Unsupported("a second result of a reduction"));
            };
            if !matches!(op, Reducer::Op(_)) || body.len() != 1 {
                return Err(Unsupported("a reduction of tuples"));
            }
            let outer: Vec<Var> = self.s.atom_vars(a).iter().cloned().collect();
            let mut inside =
                Scope { indices: BTreeMap::new(), holds: filter.iter().copied().collect(), slots: BTreeMap::new() };
            let mut free = Vec::new();
            for v in &outer {
                let i = self.index(v, IndexKind::Free, &inside.indices);
                inside.indices.insert(v.clone(), i);
                free.push(i);
            }
            let mut over = Vec::new();
            for v in &vars {
                let i = self.index(v, IndexKind::Reduced, &inside.indices);
                inside.indices.insert(v.clone(), i);
                over.push(i);
            }
            let b = self.poly(body[0], &mut inside)?;
            let value = self.push(Expr::Reduce { op, over, body: b });
            let filter = self.conjunction(&filter, &mut inside)?;
            let dims = outer.iter().map(|v| v.extent().clone()).collect();
            let tensor = self.tensor("term", dims, TensorKind::Intermediate, DType::F32);
            let places = free.iter().map(|i| self.push(Expr::Index(*i))).collect();
            self.produced.push(Einsum {
                targets: vec![Target { tensor, at: places }],
                value,
                filter,
                otherwise: None,
                join: None,
                free,
                span: Span::default(),
            });
            self.made.insert(a, (tensor, outer));
        }
        let (tensor, vars) = self.made[&a].clone();
        let places = vars
            .iter()
            .map(|v| match at.indices.get(v) {
                Some(i) => Ok(self.push(Expr::Index(*i))),
                None => Err(Unsupported("an index outside its statement")),
            })
            .collect::<Emit<Vec<_>>>()?;
        Ok(self.push(Expr::Read { tensor, at: places }))
    }
}

/// Whether an extent is exactly a rank.
pub fn is_rank(size: &Size, rank: RankId) -> bool {
    *size == Size::Rank(rank)
}
