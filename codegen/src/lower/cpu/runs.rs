//! Contractions by runs: neighbouring rows that read the same part of an array are multiplied together.
//!
//! Before: `y[n,f] += x[n,d] * w[s[n],d,f]`, a block of rows
//! After:  `for every longest run first..end of rows with the same s: pack w[s[first]]; y[first..end] += x[first..end] * it`
//!
//! Runs are found when the kernel runs, by comparing every row's keys with those of the row before
//! ([`einfall_ir::analysis::runs`]): nothing is assumed of their order, and rows with keys of their own are runs of one.
//! Invariant: of a run's last register tile only the rows of the run are stored.

use std::collections::BTreeMap;

use einfall_ir::analysis::runs::{self, Runs};
use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Buf, BufSpace, Expr as E, FragId, Stmt, VarId, View};
use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{AxisId, ExprId, Op, TileId};

use super::access::Point;
use super::build::*;
use super::contract::{Product, THIN_ROWS, factors};
use super::place::{Place, Shape};
use super::{Lower, Out};

/// What is fixed while the operand of a run is packed.
#[derive(Default)]
pub(super) struct Fixed {
    /// Coordinates of the axes of which the operand has one at a time.
    pub(super) at: BTreeMap<AxisId, E>,
    /// Keys, by the variables that hold them.
    keys: Vec<(ExprId, E)>,
    /// Whether keys are known to lie within the dimensions that they are positions along.
    pub(super) inside: bool,
    /// Whether some key is known not to: the operand's elements are zeros.
    pub(super) absent: bool,
    /// An axis of which loops walk a run alone, its first and its end.
    pub(super) walked: Option<(AxisId, E, E)>,
}

impl Fixed {
    /// The value of a key.
    pub(super) fn value(&self, e: ExprId) -> Option<E> {
        self.keys.iter().find(|k| k.0 == e).map(|k| k.1.clone())
    }
}

/// The rows of a run.
pub(super) struct RunRows {
    first: VarId,
    /// The first row after its whole register tiles.
    whole: VarId,
    /// Rows from there on.
    rest: VarId,
}

impl<'l> Lower<'l> {
    /// The runs of a contraction whose block has several rows.
    pub(super) fn runs(&self, op: &Op) -> Option<Runs> {
        runs::runs(self.plan, self.k, op).filter(|r| !self.ranges[r.axis.index()].unit)
    }

    /// Finds the runs of a block's rows, and multiplies each.
    pub(super) fn product_of_runs(&mut self, op: &Op, p: &Product, runs: &Runs) -> Out<Vec<Stmt>> {
        let around = self.wide(&runs.around);
        let rows = self.ranges[runs.axis.index()].size.clone();
        let name = self.k.axes[runs.axis].name.clone();
        self.loops(&around, &mut BTreeMap::new(), &mut |s, local| {
            let keys_at = |s: &mut Self, row: E| -> Out<Vec<E>> {
                let mut local = local.clone();
                local.insert(runs.axis, row);
                let point = Point { local, lane: None, width: 0, limit: None };
                runs.keys.iter().map(|e| s.uniform(*e, &point)).collect()
            };
            let (first, end, row) = (s.var("first"), s.var("end"), s.var(&name));
            let mut out = vec![Stmt::Let { var: first, value: int(0) }];
            let mut held = Vec::new();
            for value in keys_at(s, int(0))? {
                let var = s.var("key");
                out.push(Stmt::Let { var, value });
                held.push(var);
            }
            // The row after the last has the last one's keys.
            let mut body = Vec::new();
            let mut ends = E::Var(row).bin(BinaryOp::Eq, rows.clone());
            let mut found = Vec::new();
            for (value, before) in keys_at(s, min(E::Var(row), sub(rows.clone(), int(1))))?.into_iter().zip(&held) {
                let var = s.var("key");
                body.push(Stmt::Let { var, value });
                ends = ends.bin(BinaryOp::Or, E::Var(var).bin(BinaryOp::Ne, E::Var(*before)));
                found.push(var);
            }
            let mut then = vec![Stmt::Let { var: end, value: E::Var(row) }];
            let keys: Vec<(ExprId, E)> = runs.keys.iter().copied().zip(held.iter().map(|v| E::Var(*v))).collect();
            let mut at = local.clone();
            at.insert(runs.axis, E::Var(first));
            s.run = Fixed { at, keys: keys.clone(), ..Fixed::default() };
            let packed = s.pack_run(p, runs.operand);
            s.run = Fixed::default();
            let mut multiply = packed?;
            let run = RunRows { first, whole: s.var("whole"), rest: s.var("rest") };
            let mr = int(p.shape.mr as i64);
            let count = sub(E::Var(end), E::Var(first));
            let whole = sub(E::Var(end), count.bin(BinaryOp::Mod, mr));
            multiply.push(Stmt::Let { var: run.whole, value: whole });
            multiply.push(Stmt::Let { var: run.rest, value: sub(E::Var(end), E::Var(run.whole)) });
            multiply.extend(s.product(p, &mut local.clone(), Some(&run))?);
            s.run = Fixed { keys, walked: Some((runs.axis, E::Var(first), E::Var(end))), ..Fixed::default() };
            let reduced = if around.is_empty() { s.reduce_run(op) } else { Ok(None) };
            s.run = Fixed::default();
            then.extend(match reduced? {
                Some(reduce) => {
                    let cond = sub(E::Var(end), E::Var(first)).bin(BinaryOp::Le, int(THIN_ROWS as i64));
                    vec![Stmt::If { cond, then: reduce, otherwise: multiply }]
                }
                None => multiply,
            });
            then.push(Stmt::Let { var: first, value: E::Var(row) });
            for (before, now) in held.iter().zip(&found) {
                then.push(Stmt::Let { var: *before, value: E::Var(*now) });
            }
            body.push(Stmt::If { cond: ends, then, otherwise: Vec::new() });
            let hi = add(rows.clone(), int(1));
            out.push(Stmt::For { var: row, lo: int(1), hi, step: 1, unroll: false, body });
            Ok(out)
        })
    }

    /// The products of a short run, reduced where its operand lies.
    fn reduce_run(&mut self, op: &Op) -> Out<Option<Vec<Stmt>>> {
        let Op::Contract { out, a, b, over, carry } = op else { return Ok(None) };
        let Some(value) = factors(self.k, *a, *b) else { return Ok(None) };
        let reduce = Op::Reduce { out: vec![*out], op: ReduceOp::Sum, value, over: over.clone(), carry: *carry };
        let rows = self.run.walked.as_ref().map(|w| w.0);
        if self.shape(&[&reduce]).lane == rows {
            return Ok(None);
        }
        Ok(Some(self.nest(&[&reduce])?))
    }

    /// Packs the operand of a run. Where its positions are keys and others that are surely inside the array, one test of
    /// the keys stands for a test of every element.
    fn pack_run(&mut self, p: &Product, t: TileId) -> Out<Vec<Stmt>> {
        let mut inside: Option<E> = None;
        if let Place::Direct { buffer, at } = self.places[t.index()].clone() {
            for (e, dim) in at.iter().zip(&self.plan.buffers[buffer].dims) {
                let Some(v) = self.run.value(*e) else { continue };
                let within = int(0).bin(BinaryOp::Le, v.clone()).bin(BinaryOp::And, v.bin(BinaryOp::Lt, size(dim)));
                inside = Some(match inside {
                    Some(other) => other.bin(BinaryOp::And, within),
                    None => within,
                });
            }
        }
        let Some(cond) = inside else { return self.pack(t, &p.rb) };
        self.run.inside = true;
        let then = self.pack(t, &p.rb)?;
        (self.run.inside, self.run.absent) = (false, true);
        let otherwise = self.pack(t, &p.rb)?;
        Ok(vec![Stmt::If { cond, then, otherwise }])
    }

    /// Register tiles of a run: whole ones, then one of the fewest rows, by halves, that holds the rest.
    pub(super) fn run_tiles(
        &mut self,
        p: &Product,
        row: AxisId,
        run: &RunRows,
        local: &mut BTreeMap<AxisId, E>,
    ) -> Out<Vec<Stmt>> {
        let least = p.shape.atom.as_ref().map_or(1, |a| a.shape[0]);
        let mut heights = vec![p.shape.mr];
        while let Some(h) = heights.last().filter(|h| **h > least) {
            heights.push(h.div_ceil(2).max(least));
        }
        let i = self.var(&self.k.axes[row].name.clone());
        local.insert(row, E::Var(i));
        let body = self.register_tile(p, p.shape.mr, local, None);
        local.insert(row, E::Var(run.whole));
        let mut tails = Vec::new();
        for h in heights.into_iter().rev() {
            // Of the most rows a run's rest has one less.
            let then = self.register_tile(p, h, local, Some(E::Var(run.rest)));
            tails = match tails.is_empty() {
                true => then,
                false => {
                    let cond = E::Var(run.rest).bin(BinaryOp::Gt, int(h.div_ceil(2).max(least) as i64));
                    vec![Stmt::If { cond, then, otherwise: tails }]
                }
            };
        }
        local.remove(&row);
        let (lo, hi) = (E::Var(run.first), E::Var(run.whole));
        let step = p.shape.mr as i64;
        Ok(vec![
            Stmt::For { var: i, lo, hi, step, unroll: false, body },
            Stmt::If { cond: E::Var(run.rest), then: tails, otherwise: Vec::new() },
        ])
    }

    /// Stores the first rows of an accumulator that can only be stored whole, by way of memory of its own.
    pub(super) fn store_rows(&mut self, to: &View, src: FragId, shape: &Shape, limit: E) -> Vec<Stmt> {
        let name = format!("spare_{}", self.bufs.len());
        let strides = vec![int(shape.nr as i64), int(1)];
        let dims = vec![int(shape.mr as i64), int(shape.nr as i64)];
        let spare =
            self.bufs.push(Buf { name, dtype: DType::F32, dims, space: BufSpace::Scratch { strides, together: 1 } });
        let row = self.var("row");
        let line = self.frag("line", DType::F32, shape.nr);
        let whole = View { buf: spare, stage: None, at: vec![int(0), int(0)], walk: vec![Some((0, 1)), Some((1, 1))] };
        let from = View { at: vec![E::Var(row), int(0)], walk: vec![Some((1, 1))], ..whole.clone() };
        let mut at = to.at.clone();
        if let Some(Some((d, _))) = to.walk.first() {
            at[*d] = add(at[*d].clone(), E::Var(row));
        }
        let into = View { at, walk: to.walk[1..].to_vec(), ..to.clone() };
        vec![
            Stmt::Store { dst: whole, src, bounds: Vec::new(), join: None },
            Stmt::For {
                var: row,
                lo: int(0),
                hi: limit,
                step: 1,
                unroll: false,
                body: vec![
                    Stmt::Load { out: line, src: from, bounds: Vec::new() },
                    Stmt::Store { dst: into, src: line, bounds: Vec::new(), join: None },
                ],
            },
        ]
    }
}
