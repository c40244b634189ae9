//! Scalar functions, comparisons and selections in canonical form.
//!
//! Invariant: an identity is used only where both sides are finite together.

use super::*;
use crate::cascade::Reducer;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};
use std::collections::BTreeMap;

impl Symbols {
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

    pub(super) fn is_predicate(&self, p: PolyId) -> bool {
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

    pub(super) fn compare(&mut self, op: BinaryOp, a: PolyId, b: PolyId) -> PolyId {
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
}
