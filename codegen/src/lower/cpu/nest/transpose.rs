//! Copies between layouts that are contiguous along different axes: squares of lanes × lanes elements are transposed
//! in registers.
//!
//! Invariant: rows beyond an extent are not touched, but where pairs of rows stand together, which are zeros up to the end of
//! an atom's step; lanes beyond it may lie in the target's padding.

use super::super::access::Point;
use super::super::build::*;
use super::super::place::{Place, Scratch};
use super::super::{Lower, Out};
use einfall_ir::arena::Id;
use einfall_ir::cascade::Size;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Bound, Expr as E, Frag, FragId, Stmt, View};
use einfall_ir::layout::Distribution;
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{AxisId, BufferId, ExprId, Op};

/// What a transposing copy reads.
#[derive(Clone)]
pub(in super::super) enum TransposeSource<'a> {
    /// An array at these positions.
    Array { buffer: BufferId, at: &'a [ExprId] },
    /// A tile in scratch.
    Scratch(Scratch),
}

impl<'l> Lower<'l> {
    /// A load into scratch whose source is contiguous along another axis than its target: squares of lanes × lanes
    /// elements are transposed in registers.
    pub(super) fn transposing_load(&mut self, op: &Op) -> Out<Option<Vec<Stmt>>> {
        let Op::Load { out, buffer, at } = op else { return Ok(None) };
        let Place::Scratch(s) = self.places[out.index()].clone() else { return Ok(None) };
        self.transpose_into(&s, &TransposeSource::Array { buffer: *buffer, at })
    }

    /// As [`Lower::transposing_load`] for any source.
    pub(in super::super) fn transpose_into(&mut self, s: &Scratch, from: &TransposeSource) -> Out<Option<Vec<Stmt>>> {
        let Some(lane) = s.layout.order.last().copied() else { return Ok(None) };
        // The axis along which the source is contiguous.
        let unit = match from {
            TransposeSource::Array { buffer, at } => {
                let dims: Vec<Size> = self.plan.buffers[*buffer].dims.clone();
                if !at.iter().zip(&dims).all(|(a, d)| self.inside(*a, d)) {
                    return Ok(None);
                }
                let one = |a: AxisId| -> Option<usize> {
                    let c: Vec<_> = at.iter().map(|e| self.lane_coef(*e, Some(a))).collect();
                    let hot: Vec<usize> = (0..c.len()).filter(|i| c[*i] != Some(0)).collect();
                    (hot.len() == 1 && c[hot[0]] == Some(1)).then(|| hot[0])
                };
                let last = at.len().wrapping_sub(1);
                let unit = s.layout.order.iter().copied().find(|a| one(*a) == Some(last));
                match (unit, one(lane)) {
                    (Some(u), Some(d)) if u != lane && d != last => u,
                    _ => return Ok(None),
                }
            }
            TransposeSource::Scratch(f) => match f.layout.order.last() {
                Some(u) if *u != lane && f.layout.order.contains(&lane) && s.layout.order.contains(u) => *u,
                _ => return Ok(None),
            },
        };
        // Pairs are of neighbours along the axis before the contiguous one.
        if s.layout.together() > 1 && s.layout.order.iter().rev().nth(1) != Some(&unit) {
            return Ok(None);
        }
        let l = self.isa.lanes();
        let few = |a: AxisId| matches!(&self.ranges[a.index()].most, E::Int(n) if (*n as u64) < l / 2);
        if few(unit) || few(lane) {
            return Ok(None);
        }
        let outer: Vec<AxisId> = s.layout.order.iter().copied().filter(|a| *a != unit && *a != lane).collect();
        let mut local = self.run.at.clone();
        let (s, from) = (s.clone(), from.clone());
        let stmts = self.loops(&outer, &mut local, &mut |me, local| {
            let (u, v) = (me.var(&me.k.axes[unit].name.clone()), me.var(&me.k.axes[lane].name.clone()));
            local.insert(unit, E::Var(u));
            local.insert(lane, E::Var(v));
            let p = Point { local: local.clone(), lane: None, width: 0, limit: None };
            let src = match &from {
                TransposeSource::Array { buffer, at } => {
                    let buf = me.globals[buffer];
                    let dim = |a: AxisId| at.iter().position(|e| me.lane_coef(*e, Some(a)) != Some(0));
                    let (du, dv) = (dim(unit), dim(lane));
                    let origin = at.iter().map(|a| me.uniform(*a, &p)).collect::<Out<Vec<_>>>()?;
                    View { buf, stage: None, at: origin, walk: vec![du.map(|d| (d, 1)), dv.map(|d| (d, 1))] }
                }
                TransposeSource::Scratch(f) => {
                    let at = me.scratch_at(f, |a| local.get(&a).cloned().unwrap_or(int(0)));
                    let dim = |a: AxisId| Self::scratch_dim(f, a).map(|d| (d, 1));
                    View { buf: f.buf, stage: None, at, walk: vec![dim(unit), dim(lane)] }
                }
            };
            let frag = me.square();
            let (nu, nv) = (me.ranges[unit.index()].size.clone(), me.ranges[lane.index()].size.clone());
            // Rows beyond the end are zeros where an atom reads whole steps of them.
            let step = if s.layout.operand.is_some() { me.step() } else { l };
            let paired = s.layout.together() > 1;
            let limits = |on: bool| {
                if on {
                    vec![
                        Bound { dim: 0, limit: sub(nu.clone(), E::Var(u)) },
                        Bound { dim: 1, limit: sub(nv.clone(), E::Var(v)) },
                    ]
                } else {
                    Vec::new()
                }
            };
            let at = me.scratch_at(&s, |a| local.get(&a).cloned().unwrap_or(int(0)));
            let dim = |a: AxisId| Self::scratch_dim(&s, a).map(|d| (d, 1));
            let dst = View { buf: s.buf, stage: None, at, walk: vec![dim(unit), dim(lane)] };
            let variant = |full: bool| {
                let mut b = limits(!full);
                let load = Stmt::Load { out: frag, src: src.clone(), bounds: b.clone() };
                // Lanes beyond the tail lie in the padding; rows beyond it do not exist.
                b.truncate(if paired { 0 } else { 1 });
                vec![load, Stmt::Store { dst: dst.clone(), src: frag, bounds: b, join: None }]
            };
            let multiple = |n: &E, of: u64| matches!(n, E::Int(n) if (*n as u64).is_multiple_of(of));
            let inner = if multiple(&nu, if paired { step } else { l }) && multiple(&nv, l) {
                variant(true)
            } else {
                let le = |a: E, b: E| E::Binary(BinaryOp::Le, Box::new(a), Box::new(b));
                let cond = E::Binary(
                    BinaryOp::And,
                    Box::new(le(add(E::Var(u), int(l as i64)), nu.clone())),
                    Box::new(le(add(E::Var(v), int(l as i64)), nv.clone())),
                );
                vec![Stmt::If { cond, then: variant(true), otherwise: variant(false) }]
            };
            local.remove(&unit);
            local.remove(&lane);
            let hi = if paired { round_up(nu, step) } else { nu };
            let inner = vec![Stmt::For { var: u, lo: int(0), hi, step: l as i64, unroll: false, body: inner }];
            Ok(vec![Stmt::For { var: v, lo: int(0), hi: nv, step: l as i64, unroll: false, body: inner }])
        })?;
        Ok(Some(stmts))
    }

    /// A fragment of lanes × lanes elements.
    pub(super) fn square(&mut self) -> FragId {
        let l = self.isa.lanes();
        let name = format!("square_{}", self.frags.len());
        self.frags.push(Frag { name, dtype: DType::F32, dist: Distribution::vectors(&[l, l], Some(1), l) })
    }
}
