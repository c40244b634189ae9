//! Reductions within a loop nest: accumulators per vector shape, what a step adds to them, and how lanes and shapes
//! join when the nest ends a point.
//!
//! Invariant: an element beyond a tail contributes the identity, and a selection keeps the first of equals.

use super::super::access::{Point, Sink};
use super::super::build::*;
use super::super::place::Place;
use super::super::{Lower, Out};
use super::*;
use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Bound, Expr as E, FragId, Stmt};
use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{ExprId, Op, TileId};

pub(super) fn reduce(out: FragId, op: ReduceOp, src: FragId, carry: bool) -> Stmt {
    Stmt::Reduce { out: vec![out], op, src, over: vec![0], base: None, bounds: Vec::new(), carry }
}

/// `x`, or 0 where it is infinite.
pub(super) fn finite(x: E) -> E {
    let abs = E::Unary(einfall_ir::ops::UnaryOp::Abs, Box::new(x.clone()));
    let c = E::Binary(BinaryOp::Lt, Box::new(abs), Box::new(E::Float(f64::INFINITY)));
    // NaN is kept: it is not below infinity, and 0 would hide it.
    let nan = E::Binary(BinaryOp::Ne, Box::new(x.clone()), Box::new(x.clone()));
    let keep = E::Binary(BinaryOp::Or, Box::new(c), Box::new(nan));
    E::Select(Box::new(keep), Box::new(x), Box::new(E::Float(0.0)))
}

impl<'l> Lower<'l> {
    /// Declares and initialises the accumulators of every reduction for one vector width.
    pub(super) fn start(&mut self, nest: &Nest, width: u64, out: &mut Vec<Stmt>) -> Out<Vec<Acc>> {
        let mut accs = Vec::new();
        for op in &nest.ops {
            let Op::Reduce { out: tiles, op, .. } = op else { continue };
            let dtype = Self::register_type(self.k.tiles[tiles[0]].dtype);
            let mut frags = vec![self.frag("acc", dtype, width)];
            let id = match op {
                ReduceOp::Any | ReduceOp::All => int(op.identity() as i64),
                ReduceOp::Max | ReduceOp::ArgMax if dtype == DType::I64 => int(i64::MIN),
                ReduceOp::Min | ReduceOp::ArgMin if dtype == DType::I64 => int(i64::MAX),
                ReduceOp::ArgMax => E::Float(f64::NEG_INFINITY),
                ReduceOp::ArgMin => E::Float(f64::INFINITY),
                ReduceOp::Sum | ReduceOp::Product if dtype == DType::I64 => int(op.identity() as i64),
                ReduceOp::Sum | ReduceOp::Product | ReduceOp::Min | ReduceOp::Max | ReduceOp::LogSumExp => {
                    E::Float(op.identity())
                }
            };
            out.push(Stmt::Map { out: frags[0], value: id });
            match op {
                ReduceOp::LogSumExp => {
                    let s = self.frag("acc", dtype, width);
                    out.push(Stmt::Map { out: s, value: E::Float(0.0) });
                    frags.push(s);
                }
                ReduceOp::ArgMin | ReduceOp::ArgMax => {
                    let s = self.frag("at", DType::I64, width);
                    out.push(Stmt::Map { out: s, value: int(FAR) });
                    frags.push(s);
                }
                ReduceOp::Sum | ReduceOp::Product | ReduceOp::Min | ReduceOp::Max | ReduceOp::Any | ReduceOp::All => {}
            }
            accs.push(Acc { frags, width });
        }
        Ok(accs)
    }

    /// `acc ⊕= v`, absent lanes left alone.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn accumulate(
        &mut self,
        nest: &Nest,
        op: ReduceOp,
        v: E,
        value: ExprId,
        acc: &Acc,
        p: &Point,
        sink: &mut Sink,
    ) -> Out<()> {
        let _ = value;
        let dims: Vec<usize> = if acc.width > 0 { vec![0] } else { vec![] };
        let read = |f: FragId| E::Frag { frag: f, dims: dims.clone() };
        let present = p.limit.as_ref().map(|l| E::Binary(BinaryOp::Lt, Box::new(E::Coord(0)), Box::new(l.clone())));
        let keep = |new: E, old: E| match &present {
            Some(c) => E::Select(Box::new(c.clone()), Box::new(new), Box::new(old)),
            None => new,
        };
        let bin = |op, a: E, b: E| E::Binary(op, Box::new(a), Box::new(b));
        let a0 = acc.frags[0];
        match op {
            ReduceOp::Sum | ReduceOp::Product | ReduceOp::Min | ReduceOp::Max | ReduceOp::Any | ReduceOp::All => {
                let new = match (op, v) {
                    // Products of two factors fuse with the sum.
                    (ReduceOp::Sum, E::Binary(BinaryOp::Mul, x, y)) if self.is_float_acc(a0) => {
                        E::Fma(x, y, Box::new(read(a0)))
                    }
                    (op, v) => bin(monoid(op), v, read(a0)),
                };
                sink.inner.push(Stmt::Map { out: a0, value: keep(new, read(a0)) });
            }
            ReduceOp::LogSumExp => {
                // (m, s) ⊕ v = (M, s·e^(m−M) + e^(v−M)) with M = max(m, v), and M = 0 in the exponents where infinite.
                let (m, s) = (a0, acc.frags[1]);
                let x = self.bind(v, acc.width, sink);
                let top = self.bind(bin(BinaryOp::Max, x.clone(), read(m)), acc.width, sink);
                let safe = finite(top.clone());
                let safe = self.bind(safe, acc.width, sink);
                let e = |a: E| E::Unary(einfall_ir::ops::UnaryOp::Exp, Box::new(bin(BinaryOp::Sub, a, safe.clone())));
                let sum = bin(BinaryOp::Add, bin(BinaryOp::Mul, read(s), e(read(m))), e(x));
                sink.inner.push(Stmt::Map { out: s, value: keep(sum, read(s)) });
                sink.inner.push(Stmt::Map { out: m, value: keep(top, read(m)) });
            }
            ReduceOp::ArgMin | ReduceOp::ArgMax => {
                let (best, at) = (a0, acc.frags[1]);
                let x = self.bind(v, acc.width, sink);
                let here = self.reduced_position(nest, p)?;
                let beats = if op == ReduceOp::ArgMax { BinaryOp::Gt } else { BinaryOp::Lt };
                let nan = |a: E| bin(BinaryOp::Ne, a.clone(), a);
                let not = |a: E| E::Unary(einfall_ir::ops::UnaryOp::Not, Box::new(a));
                // Positions grow, so the first of equal values stays; the first NaN wins over all values.
                let first = bin(BinaryOp::Eq, read(at), int(FAR));
                let better = bin(
                    BinaryOp::Or,
                    bin(BinaryOp::Or, bin(beats, x.clone(), read(best)), first),
                    bin(BinaryOp::And, nan(x.clone()), not(nan(read(best)))),
                );
                let better = match &present {
                    Some(c) => bin(BinaryOp::And, c.clone(), better),
                    None => better,
                };
                let c = self.frag("better", DType::Bool, acc.width);
                sink.inner.push(Stmt::Map { out: c, value: better });
                let pick = |new: E, old: E| E::Select(Box::new(read(c)), Box::new(new), Box::new(old));
                sink.inner.push(Stmt::Map { out: best, value: pick(x, read(best)) });
                sink.inner.push(Stmt::Map { out: at, value: pick(here, read(at)) });
            }
        }
        Ok(())
    }

    pub(super) fn is_float_acc(&self, f: FragId) -> bool {
        self.frags[f].dtype.is_float()
    }

    /// The position over the reduced axes, the last fastest.
    pub(super) fn reduced_position(&self, nest: &Nest, p: &Point) -> Out<E> {
        // The order in which the operation names its axes.
        let over = nest.ops.iter().find_map(|o| match o {
            Op::Reduce { over, .. } => Some(over.clone()),
            Op::Load { .. } | Op::Store { .. } | Op::Map { .. } | Op::Contract { .. } | Op::Scan { .. } => None,
        });
        let mut at = int(0);
        for a in over.unwrap_or_default() {
            let r = &self.ranges[a.index()];
            let local = p.local.get(&a).cloned().unwrap_or(int(0));
            let mut c = add(r.origin.clone(), local);
            if p.lane == Some(a) {
                c = add(c, E::Coord(0));
            }
            at = add(mul(at, size(&self.k.axes[a].extent)), c);
        }
        Ok(at)
    }

    /// Joins accumulators across shapes and lanes, with the value before, and writes the results.
    pub(super) fn finish(&mut self, nest: &Nest, accs: &[Vec<Acc>], p: &Point) -> Out<Vec<Stmt>> {
        let mut out = Vec::new();
        let reduces: Vec<(Vec<TileId>, ReduceOp, bool)> = nest
            .ops
            .iter()
            .filter_map(|o| match o {
                Op::Reduce { out, op, carry, .. } => Some((out.clone(), *op, *carry)),
                Op::Load { .. } | Op::Store { .. } | Op::Map { .. } | Op::Contract { .. } | Op::Scan { .. } => None,
            })
            .collect();
        let bin = |op, a: E, b: E| E::Binary(op, Box::new(a), Box::new(b));
        for (i, (tiles, op, carry)) in reduces.into_iter().enumerate() {
            let width = if p.lane.is_some() { p.width } else { 0 };
            let dims: Vec<usize> = if width > 0 { vec![0] } else { vec![] };
            let read = |f: FragId| E::Frag { frag: f, dims: dims.clone() };
            let dtype = self.frags[accs[0][i].frags[0]].dtype;
            // Results at this point: per component one fragment of `width`.
            let mut parts: Vec<FragId> = accs[0][i].frags.clone();
            let across = p.lane.is_none() && accs[0][i].width > 0;
            if across {
                match op {
                    ReduceOp::LogSumExp => {
                        let (mut m, mut s): (Option<FragId>, Option<FragId>) = (None, None);
                        for shape in accs {
                            let (am, sm) = (shape[i].frags[0], shape[i].frags[1]);
                            let w = shape[i].width;
                            let top = self.frag("top", dtype, 0);
                            out.push(reduce(top, ReduceOp::Max, am, false));
                            let x = |f: FragId| E::Frag { frag: f, dims: vec![0] };
                            let t = E::Frag { frag: top, dims: vec![] };
                            let scaled = self.frag("scaled", dtype, w);
                            let e = E::Unary(
                                einfall_ir::ops::UnaryOp::Exp,
                                Box::new(bin(BinaryOp::Sub, x(am), finite(t.clone()))),
                            );
                            out.push(Stmt::Map { out: scaled, value: bin(BinaryOp::Mul, x(sm), e) });
                            let sum = self.frag("sum", dtype, 0);
                            out.push(reduce(sum, ReduceOp::Sum, scaled, false));
                            (m, s) = match (m, s) {
                                (Some(m0), Some(s0)) => {
                                    let (nm, ns) = self.join_lse((m0, s0), (top, sum), 0, &mut out);
                                    (Some(nm), Some(ns))
                                }
                                _ => (Some(top), Some(sum)),
                            };
                        }
                        parts = m.into_iter().chain(s).collect();
                    }
                    ReduceOp::ArgMin | ReduceOp::ArgMax => {
                        let mut best: Option<(FragId, FragId)> = None;
                        for shape in accs {
                            let r = self.select_across(op, shape[i].frags[0], shape[i].frags[1], &mut out);
                            best = Some(match best {
                                None => r,
                                Some(b) => self.select_join(op, b, r, 0, &mut out),
                            });
                        }
                        parts = best.into_iter().flat_map(|(a, b)| [a, b]).collect();
                    }
                    ReduceOp::Sum
                    | ReduceOp::Product
                    | ReduceOp::Min
                    | ReduceOp::Max
                    | ReduceOp::Any
                    | ReduceOp::All => {
                        let r = self.frag("all", dtype, 0);
                        for (n, shape) in accs.iter().enumerate() {
                            out.push(reduce(r, op, shape[i].frags[0], n > 0));
                        }
                        parts = vec![r];
                    }
                }
            }
            // The value before.
            let Place::Scratch(s0) = self.places[tiles[0].index()].clone() else { continue };
            let varies = p.lane.is_some();
            let mut before = Vec::new();
            if carry {
                for t in &tiles {
                    let Place::Scratch(s) = self.places[t.index()].clone() else { continue };
                    let (src, contiguous) = self.scratch_view(&s, p)?;
                    let bounds = match &p.limit {
                        Some(l) if varies && !contiguous => vec![Bound { dim: 0, limit: l.clone() }],
                        _ => Vec::new(),
                    };
                    let dt = self.bufs[s.buf].dtype;
                    let f = self.frag("before", dt, width);
                    out.push(Stmt::Load { out: f, src, bounds });
                    before.push(f);
                }
            }
            let mut results: Vec<(TileId, FragId)> = Vec::new();
            match op {
                ReduceOp::LogSumExp => {
                    let (m, s) = (parts[0], parts[1]);
                    let r = self.frag("lse", dtype, width);
                    let ln = E::Unary(einfall_ir::ops::UnaryOp::Log, Box::new(read(s)));
                    // An infinite maximum is the result: −∞ of nothing, ∞, or NaN.
                    let infinite = bin(
                        BinaryOp::Ge,
                        E::Unary(einfall_ir::ops::UnaryOp::Abs, Box::new(read(m))),
                        E::Float(f64::INFINITY),
                    );
                    let v = E::Select(Box::new(infinite), Box::new(read(m)), Box::new(bin(BinaryOp::Add, read(m), ln)));
                    out.push(Stmt::Map { out: r, value: v });
                    let r = if let Some(b) = before.first() {
                        let one = self.frag("one", dtype, width);
                        out.push(Stmt::Map { out: one, value: E::Float(1.0) });
                        let (m, s) = self.join_lse((*b, one), (r, one), width, &mut out);
                        let j = self.frag("joined", dtype, width);
                        let infinite = bin(
                            BinaryOp::Ge,
                            E::Unary(einfall_ir::ops::UnaryOp::Abs, Box::new(read(m))),
                            E::Float(f64::INFINITY),
                        );
                        let ln = E::Unary(einfall_ir::ops::UnaryOp::Log, Box::new(read(s)));
                        let v =
                            E::Select(Box::new(infinite), Box::new(read(m)), Box::new(bin(BinaryOp::Add, read(m), ln)));
                        out.push(Stmt::Map { out: j, value: v });
                        j
                    } else {
                        r
                    };
                    results.push((tiles[0], r));
                }
                ReduceOp::ArgMin | ReduceOp::ArgMax => {
                    let mut best = (parts[0], parts[1]);
                    if let [v, at] = before.as_slice() {
                        // A position of −1 is no element.
                        let far = self.frag("far", DType::I64, width);
                        let none = bin(BinaryOp::Lt, read(*at), int(0));
                        let v0 = E::Select(Box::new(none), Box::new(int(FAR)), Box::new(read(*at)));
                        out.push(Stmt::Map { out: far, value: v0 });
                        best = self.select_join(op, (*v, far), best, width, &mut out);
                    }
                    let at = self.frag("position", DType::I64, width);
                    let none = bin(BinaryOp::Eq, read(best.1), int(FAR));
                    out.push(Stmt::Map {
                        out: at,
                        value: E::Select(Box::new(none), Box::new(int(-1)), Box::new(read(best.1))),
                    });
                    // Of one result tile, its type says which of the two it is.
                    match tiles.as_slice() {
                        [v, a] => results.extend([(*v, best.0), (*a, at)]),
                        [a] => results.push((*a, at)),
                        _ => return Err(self.unsupported("an argument selection with that many results")),
                    }
                }
                ReduceOp::Sum | ReduceOp::Product | ReduceOp::Min | ReduceOp::Max | ReduceOp::Any | ReduceOp::All => {
                    let r = match before.first() {
                        Some(b) => {
                            let j = self.frag("joined", dtype, width);
                            out.push(Stmt::Map { out: j, value: bin(monoid(op), read(parts[0]), read(*b)) });
                            j
                        }
                        None => parts[0],
                    };
                    results.push((tiles[0], r));
                }
            }
            let _ = s0;
            for (t, mut f) in results {
                let tile = self.held(t);
                if !matches!(tile, DType::F32 | DType::F64 | DType::I64 | DType::Bool) {
                    let r = self.frag("rounded", Self::register_type(tile), width);
                    out.push(Stmt::Map { out: r, value: E::Cast(tile, Box::new(read(f))) });
                    f = r;
                }
                let Place::Scratch(s) = self.places[t.index()].clone() else { continue };
                let stmt = self.scratch_store(&s, f, varies, p)?;
                out.push(stmt);
            }
        }
        Ok(out)
    }

    /// (m, s) pairs of log-sum-exp joined.
    pub(super) fn join_lse(
        &mut self,
        a: (FragId, FragId),
        b: (FragId, FragId),
        width: u64,
        out: &mut Vec<Stmt>,
    ) -> (FragId, FragId) {
        let dims: Vec<usize> = if width > 0 { vec![0] } else { vec![] };
        let read = |f: FragId| E::Frag { frag: f, dims: dims.clone() };
        let bin = |op, a: E, b: E| E::Binary(op, Box::new(a), Box::new(b));
        let dtype = self.frags[a.0].dtype;
        let m = self.frag("top", dtype, width);
        out.push(Stmt::Map { out: m, value: bin(BinaryOp::Max, read(a.0), read(b.0)) });
        let e =
            |f: FragId| E::Unary(einfall_ir::ops::UnaryOp::Exp, Box::new(bin(BinaryOp::Sub, read(f), finite(read(m)))));
        let s = self.frag("sum", dtype, width);
        let v = bin(BinaryOp::Add, bin(BinaryOp::Mul, read(a.1), e(a.0)), bin(BinaryOp::Mul, read(b.1), e(b.0)));
        out.push(Stmt::Map { out: s, value: v });
        (m, s)
    }

    /// The selection over the lanes of (value, position) accumulators.
    pub(super) fn select_across(
        &mut self,
        op: ReduceOp,
        v: FragId,
        at: FragId,
        out: &mut Vec<Stmt>,
    ) -> (FragId, FragId) {
        let (dtype, w) = (self.frags[v].dtype, self.frags[v].dist.dims[0]);
        let join = if op == ReduceOp::ArgMax { ReduceOp::Max } else { ReduceOp::Min };
        let top = self.frag("top", dtype, 0);
        out.push(reduce(top, join, v, false));
        let x = |f: FragId| E::Frag { frag: f, dims: vec![0] };
        let t = E::Frag { frag: top, dims: vec![] };
        let bin = |op, a: E, b: E| E::Binary(op, Box::new(a), Box::new(b));
        let nan = |a: E| bin(BinaryOp::Ne, a.clone(), a);
        let hit = bin(BinaryOp::Or, bin(BinaryOp::Eq, x(v), t.clone()), bin(BinaryOp::And, nan(x(v)), nan(t)));
        let cand = self.frag("candidates", DType::I64, w);
        out.push(Stmt::Map { out: cand, value: E::Select(Box::new(hit), Box::new(x(at)), Box::new(int(FAR))) });
        let first = self.frag("first", DType::I64, 0);
        out.push(reduce(first, ReduceOp::Min, cand, false));
        (top, first)
    }

    /// Two selections joined: the better value, the lower position among equals.
    pub(super) fn select_join(
        &mut self,
        op: ReduceOp,
        a: (FragId, FragId),
        b: (FragId, FragId),
        width: u64,
        out: &mut Vec<Stmt>,
    ) -> (FragId, FragId) {
        let dims: Vec<usize> = if width > 0 { vec![0] } else { vec![] };
        let read = |f: FragId| E::Frag { frag: f, dims: dims.clone() };
        let bin = |op, a: E, b: E| E::Binary(op, Box::new(a), Box::new(b));
        let nan = |a: E| bin(BinaryOp::Ne, a.clone(), a);
        let not = |a: E| E::Unary(einfall_ir::ops::UnaryOp::Not, Box::new(a));
        let beats = if op == ReduceOp::ArgMax { BinaryOp::Gt } else { BinaryOp::Lt };
        let (va, vb) = (read(a.0), read(b.0));
        let both_nan = bin(BinaryOp::And, nan(va.clone()), nan(vb.clone()));
        let equal = bin(BinaryOp::Or, bin(BinaryOp::Eq, va.clone(), vb.clone()), both_nan);
        let wins = bin(
            BinaryOp::Or,
            bin(
                BinaryOp::Or,
                bin(beats, vb.clone(), va.clone()),
                bin(BinaryOp::And, nan(vb.clone()), not(nan(va.clone()))),
            ),
            bin(BinaryOp::And, equal, bin(BinaryOp::Lt, read(b.1), read(a.1))),
        );
        // An empty side (no position yet) never wins.
        let wins = bin(BinaryOp::And, wins, bin(BinaryOp::Ne, read(b.1), int(FAR)));
        let wins = bin(BinaryOp::Or, wins, bin(BinaryOp::Eq, read(a.1), int(FAR)));
        let c = self.frag("wins", DType::Bool, width);
        out.push(Stmt::Map { out: c, value: wins });
        let pick = |x: E, y: E| E::Select(Box::new(read(c)), Box::new(x), Box::new(y));
        let dtype = self.frags[a.0].dtype;
        let (v, at) = (self.frag("value", dtype, width), self.frag("at", DType::I64, width));
        out.push(Stmt::Map { out: v, value: pick(vb, va) });
        out.push(Stmt::Map { out: at, value: pick(read(b.1), read(a.1)) });
        (v, at)
    }
}
