//! Normal forms: extents as polynomials over ranks, and access expressions as affine forms over indices.
//!
//! Invariant: two sizes with the same polynomial have the same value wherever both have one. Forms that grow beyond
//! [`MAX_TERMS`] or overflow are given up (`None`), never approximated.

use std::collections::BTreeMap;

use super::{Cascade, Expr, ExprId, IndexId, Size};
use crate::ops::{BinaryOp, UnaryOp};

/// The most terms a polynomial may have.
pub const MAX_TERMS: usize = 64;

/// A polynomial with integer coefficients; its variables are ranks and inexact quotients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Poly {
    /// Coefficients (never 0) by monomial; a monomial is a sorted list of variables.
    terms: BTreeMap<Vec<Size>, i128>,
}

impl Poly {
    /// A constant.
    pub fn constant(n: i128) -> Poly {
        let mut p = Poly::default();
        if n != 0 {
            p.terms.insert(Vec::new(), n);
        }
        p
    }

    /// The polynomial of an extent.
    pub fn of(size: &Size) -> Option<Poly> {
        match size {
            Size::Const(n) => Some(Poly::constant(i128::from(*n))),
            Size::Rank(_) => Some(Poly::variable(size.clone())),
            Size::Add(a, b) => Poly::of(a)?.add(&Poly::of(b)?),
            Size::Sub(a, b) => Poly::of(a)?.add(&Poly::of(b)?.scale(-1)?),
            Size::Mul(a, b) => Poly::of(a)?.mul(&Poly::of(b)?),
            Size::Min(a, b) | Size::Max(a, b) => {
                let (x, y) = (Poly::of(a)?, Poly::of(b)?);
                let (low, high) = match y.sub(&x)?.as_constant() {
                    Some(d) if d >= 0 => (x, y),
                    Some(_) => (y, x),
                    None => return Some(Poly::variable(size.clone())),
                };
                Some(if matches!(size, Size::Min(..)) { low } else { high })
            }
            Size::Div(a, b) | Size::CeilDiv(a, b) => {
                let (x, y) = (Poly::of(a)?, Poly::of(b)?);
                match (x.as_constant(), y.as_constant()) {
                    (Some(x), Some(y)) if y > 0 => Some(Poly::constant(if matches!(size, Size::Div(..)) {
                        x.div_euclid(y)
                    } else {
                        -(-x).div_euclid(y)
                    })),
                    _ => Some(Poly::variable(size.clone())),
                }
            }
        }
    }

    fn variable(size: Size) -> Poly {
        Poly { terms: BTreeMap::from([(vec![size], 1)]) }
    }

    /// Its value if it is a constant.
    pub fn as_constant(&self) -> Option<i128> {
        match self.terms.len() {
            0 => Some(0),
            1 => self.terms.get(&Vec::new()).copied(),
            _ => None,
        }
    }

    /// Whether it is provably 0 or more, knowing that every variable is.
    pub fn is_non_negative(&self) -> bool {
        self.terms.values().all(|c| *c >= 0)
    }

    /// Whether it is zero.
    pub fn is_zero(&self) -> bool {
        self.terms.is_empty()
    }

    /// Sum.
    pub fn add(&self, other: &Poly) -> Option<Poly> {
        let mut out = self.clone();
        for (m, c) in &other.terms {
            let sum = out.terms.get(m).copied().unwrap_or(0).checked_add(*c)?;
            if sum == 0 {
                out.terms.remove(m);
            } else {
                out.terms.insert(m.clone(), sum);
            }
        }
        (out.terms.len() <= MAX_TERMS).then_some(out)
    }

    /// Difference.
    pub fn sub(&self, other: &Poly) -> Option<Poly> {
        self.add(&other.scale(-1)?)
    }

    fn scale(&self, k: i128) -> Option<Poly> {
        let mut out = Poly::default();
        for (m, c) in &self.terms {
            out.terms.insert(m.clone(), c.checked_mul(k)?);
        }
        Some(out)
    }

    /// Product.
    pub fn mul(&self, other: &Poly) -> Option<Poly> {
        let mut out = Poly::default();
        for (m, c) in &self.terms {
            for (n, d) in &other.terms {
                let mut product = [m.clone(), n.clone()].concat();
                if product.len() > MAX_TERMS {
                    return None;
                }
                product.sort();
                out = out.add(&Poly { terms: BTreeMap::from([(product, c.checked_mul(*d)?)]) })?;
            }
        }
        out.terms.retain(|_, c| *c != 0);
        Some(out)
    }
}

/// Whether two extents are the same for all ranks.
pub fn same_size(a: &Size, b: &Size) -> bool {
    a == b || matches!((Poly::of(a), Poly::of(b)), (Some(a), Some(b)) if a == b)
}

/// Whether `a <= b` for all ranks, provably.
pub fn size_at_most(a: &Size, b: &Size) -> bool {
    let difference = || Poly::of(b)?.sub(&Poly::of(a)?);
    a == b || difference().is_some_and(|d| d.is_non_negative())
}

/// `constant + Σ coefficient · index`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Affine {
    /// Indices with their coefficients (never 0), by index.
    pub terms: BTreeMap<IndexId, Poly>,
    /// What is added.
    pub constant: Poly,
}

impl Affine {
    /// The affine form of `e`, if it has one.
    pub fn of(c: &Cascade, e: ExprId) -> Option<Affine> {
        let constant = |p: Poly| Affine { terms: BTreeMap::new(), constant: p };
        match &c.exprs[e] {
            Expr::Int(n) => Some(constant(Poly::constant(i128::from(*n)))),
            Expr::Size(s) => Some(constant(Poly::of(s)?)),
            Expr::Index(i) => {
                Some(Affine { terms: BTreeMap::from([(*i, Poly::constant(1))]), constant: Poly::default() })
            }
            Expr::Unary(UnaryOp::Neg, a) => Affine::of(c, *a)?.times(&Poly::constant(-1)),
            Expr::Binary(BinaryOp::Add, a, b) => Affine::of(c, *a)?.plus(&Affine::of(c, *b)?),
            Expr::Binary(BinaryOp::Sub, a, b) => {
                Affine::of(c, *a)?.plus(&Affine::of(c, *b)?.times(&Poly::constant(-1))?)
            }
            Expr::Binary(BinaryOp::Mul, a, b) => {
                let (a, b) = (Affine::of(c, *a)?, Affine::of(c, *b)?);
                if a.terms.is_empty() {
                    b.times(&a.constant)
                } else if b.terms.is_empty() {
                    a.times(&b.constant)
                } else {
                    None
                }
            }
            Expr::Float(_)
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Tuple(_)
            | Expr::Reduce { .. }
            | Expr::Scan { .. }
            | Expr::Segment { .. }
            | Expr::Rand { .. } => None,
        }
    }

    fn plus(&self, other: &Affine) -> Option<Affine> {
        let mut out = Affine { terms: self.terms.clone(), constant: self.constant.add(&other.constant)? };
        for (i, k) in &other.terms {
            let sum = out.terms.get(i).cloned().unwrap_or_default().add(k)?;
            if sum.is_zero() {
                out.terms.remove(i);
            } else {
                out.terms.insert(*i, sum);
            }
        }
        Some(out)
    }

    fn times(&self, k: &Poly) -> Option<Affine> {
        let mut out = Affine { terms: BTreeMap::new(), constant: self.constant.mul(k)? };
        for (i, c) in &self.terms {
            let product = c.mul(k)?;
            if !product.is_zero() {
                out.terms.insert(*i, product);
            }
        }
        Some(out)
    }

    /// The single index this is, if it is one alone.
    pub fn as_index(&self) -> Option<IndexId> {
        match self.terms.iter().next() {
            Some((i, k)) if self.terms.len() == 1 && *k == Poly::constant(1) && self.constant.is_zero() => Some(*i),
            _ => None,
        }
    }

    /// The indices from most to least significant if this is a mixed-radix number: each coefficient is the product of
    /// the extents of the indices after it. Such a form maps the box of its indices one to one onto `0 .. product`.
    pub fn mixed_radix(&self, c: &Cascade) -> Option<Vec<IndexId>> {
        if !self.constant.is_zero() {
            return None;
        }
        let mut left = self.terms.clone();
        let mut order = Vec::new();
        let mut radix = Poly::constant(1);
        while !left.is_empty() {
            let (i, _) = left.iter().find(|(_, k)| **k == radix)?;
            let i = *i;
            left.remove(&i);
            order.push(i);
            radix = radix.mul(&Poly::of(&c.indices[i].extent)?)?;
        }
        order.reverse();
        Some(order)
    }
}

/// The product of the extents of `indices`, 1 for none.
pub fn product_extent(c: &Cascade, indices: &[IndexId]) -> Size {
    let extents = indices.iter().map(|i| c.indices[*i].extent.clone());
    extents.reduce(|a, b| Size::Mul(Box::new(a), Box::new(b))).unwrap_or(Size::Const(1))
}
