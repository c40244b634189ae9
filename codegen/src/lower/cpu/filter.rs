//! Streams: the loop over blocks, and which blocks a filter skips or frees of masks.
//!
//! Each conjunct `l ⋈ r` that is affine in coordinates is bounded over the block by interval arithmetic: a block where
//! it cannot hold is skipped, and where it always holds the body is emitted without it.

use einfall_ir::arena::Id;
use einfall_ir::kernel::{Expr as E, Stmt};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, ExprId, Stream};

use super::build::*;
use super::{Lower, Out};

impl Lower<'_> {
    /// The loop over the blocks of a stream's axis.
    pub(super) fn stream(&mut self, s: &Stream) -> Out<Vec<Stmt>> {
        let axis = &self.k.axes[s.axis];
        let block = if s.sequential { 1 } else { axis.block.unwrap_or(1).max(1) };
        let (name, extent) = (axis.name.clone(), size(&axis.extent));
        let step = self.var(&name);
        let count = ceil_div(extent.clone(), block);
        let number = if s.reverse { sub(sub(count.clone(), int(1)), E::Var(step)) } else { E::Var(step) };
        let before = self.ranges[s.axis.index()].clone();
        let (range, mut body) = self.block_range(&name, extent, block, mul(number, int(block as i64)));
        self.ranges[s.axis.index()] = range;

        let mut conjuncts = Vec::new();
        if let Some(f) = s.filter {
            self.conjuncts(f, &mut conjuncts);
        }
        let bounds: Vec<Option<(E, E)>> = conjuncts.iter().map(|c| self.truth_bounds(*c)).collect();
        let first = self.position;
        if bounds.iter().any(Option::is_some) {
            let and = |a: E, b: E| match (&a, &b) {
                (E::Int(1), _) => b,
                (_, E::Int(1)) => a,
                _ => E::Binary(BinaryOp::And, Box::new(a), Box::new(b)),
            };
            let (mut some, mut every) = (int(1), int(1));
            for (possible, always) in bounds.iter().flatten() {
                some = and(some, possible.clone());
                every = and(every, always.clone());
            }
            let known: Vec<ExprId> =
                conjuncts.iter().zip(&bounds).filter(|(_, b)| b.is_some()).map(|(c, _)| *c).collect();
            let n = self.known.len();
            self.known.extend(known);
            let full = self.nodes(&s.body)?;
            self.known.truncate(n);
            self.position = first;
            let masked = self.nodes(&s.body)?;
            body.push(Stmt::If {
                cond: some,
                then: vec![Stmt::If { cond: every, then: full, otherwise: masked }],
                otherwise: Vec::new(),
            });
        } else {
            body.extend(self.nodes(&s.body)?);
        }
        self.ranges[s.axis.index()] = before;
        Ok(vec![Stmt::For { var: step, lo: int(0), hi: count, step: 1, unroll: false, body }])
    }

    fn conjuncts(&self, e: ExprId, out: &mut Vec<ExprId>) {
        match &self.k.exprs[e] {
            tile::Expr::Binary(BinaryOp::And, a, b) => {
                self.conjuncts(*a, out);
                self.conjuncts(*b, out);
            }
            _ => out.push(e),
        }
    }

    /// Whether `e` follows from the known conditions.
    pub(super) fn is_known(&self, e: ExprId) -> bool {
        if self.known.is_empty() {
            return false;
        }
        if let tile::Expr::Binary(BinaryOp::And, a, b) = &self.k.exprs[e] {
            return self.is_known(*a) && self.is_known(*b);
        }
        self.known.iter().any(|k| self.same(*k, e))
    }

    fn same(&self, a: ExprId, b: ExprId) -> bool {
        if a == b {
            return true;
        }
        let (x, y) = (&self.k.exprs[a], &self.k.exprs[b]);
        match (x, y) {
            (tile::Expr::Read { buffer: p, at: i }, tile::Expr::Read { buffer: q, at: j }) => {
                p == q && i.len() == j.len() && i.iter().zip(j).all(|(a, b)| self.same(*a, *b))
            }
            (tile::Expr::Unary(o, a), tile::Expr::Unary(p, b)) => o == p && self.same(*a, *b),
            (tile::Expr::Cast(o, a), tile::Expr::Cast(p, b)) => o == p && self.same(*a, *b),
            (tile::Expr::Binary(o, a, b), tile::Expr::Binary(p, c, d)) => {
                o == p && self.same(*a, *c) && self.same(*b, *d)
            }
            (tile::Expr::Select(a, b, c), tile::Expr::Select(d, e, f)) => {
                self.same(*a, *d) && self.same(*b, *e) && self.same(*c, *f)
            }
            _ => x == y,
        }
    }

    /// Over the block: whether the comparison can hold, and whether it always does.
    fn truth_bounds(&self, e: ExprId) -> Option<(E, E)> {
        let tile::Expr::Binary(op, l, r) = &self.k.exprs[e] else { return None };
        let cmp = |op: BinaryOp, a: &E, b: &E| a.clone().bin(op, b.clone());
        let (l, r) = (self.interval(*l)?, self.interval(*r)?);
        Some(match op {
            BinaryOp::Lt | BinaryOp::Le => (cmp(*op, &l.0, &r.1), cmp(*op, &l.1, &r.0)),
            BinaryOp::Gt | BinaryOp::Ge => (cmp(*op, &l.1, &r.0), cmp(*op, &l.0, &r.1)),
            _ => return None,
        })
    }

    /// Smallest and largest value of an integer expression over the block.
    fn interval(&self, e: ExprId) -> Option<(E, E)> {
        match &self.k.exprs[e] {
            tile::Expr::Int(i) => Some((int(*i), int(*i))),
            tile::Expr::Size(s) => Some((size(s), size(s))),
            tile::Expr::Coord(a) => {
                let r = &self.ranges[a.index()];
                if r.unit {
                    return Some((r.origin.clone(), r.origin.clone()));
                }
                Some((r.origin.clone(), sub(add(r.origin.clone(), r.size.clone()), int(1))))
            }
            tile::Expr::Binary(op, a, b) => {
                let (x, y) = (self.interval(*a)?, self.interval(*b)?);
                match op {
                    BinaryOp::Add => Some((add(x.0, y.0), add(x.1, y.1))),
                    BinaryOp::Sub => Some((sub(x.0, y.1), sub(x.1, y.0))),
                    BinaryOp::Mul => match (&self.k.exprs[*a], &self.k.exprs[*b]) {
                        (tile::Expr::Int(i), _) if *i >= 0 => Some((mul(int(*i), y.0), mul(int(*i), y.1))),
                        (_, tile::Expr::Int(i)) if *i >= 0 => Some((mul(int(*i), x.0), mul(int(*i), x.1))),
                        _ => None,
                    },
                    _ => None,
                }
            }
            tile::Expr::Float(_)
            | tile::Expr::Tile(_)
            | tile::Expr::TileAt { .. }
            | tile::Expr::Read { .. }
            | tile::Expr::Unary(..)
            | tile::Expr::Select(..)
            | tile::Expr::Cast(..)
            | tile::Expr::Rand(_) => None,
        }
    }
}
