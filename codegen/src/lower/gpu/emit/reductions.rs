//! Reductions and scans: within a unit by one statement, across the units of a role through shared memory.
//!
//! ```text
//! r0 = carry reduce sum(k) x          (k cut over 4 units)
//! →  reduce r0_unit = sum x over [k]
//!    store r0_units[unit] = r0_unit;  task_sync;  load r0_all = r0_units
//!    reduce r0 = sum r0_all over [0] carry
//! ```
//! A stream that only accumulates meets once, after its last step; one that uses the result in every step meets in every
//! step, over two copies of the shared tile by turns: a unit writes a copy again only after every unit has written the
//! other one, so after every unit's reads. Invariant: every unit ends with the same result, each part counted once.

use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Barrier, BarrierKind, Bound, Buf, BufId, BufSpace, Expr, FragId, Stmt, View};
use einfall_ir::layout::{DistDigit, Distribution, MemLayout};
use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{self, AxisId, ExprId, Op, Space, TileId};

use super::super::exprs::{Place, add, sub};
use super::super::schedule::Iteration;
use super::super::split_domains::at_least_zero;
use super::super::{Step, refuse};
use super::{Emit, Frame, implied, is_walked};
use crate::identity::{is_identity_in, kernel_constant};

/// Elements of units' parts that a thread holds at a time when they are joined.
const AT_ONCE: u64 = 64;

impl Emit<'_, '_> {
    /// The fragment of an operation's source over its frame.
    #[allow(clippy::too_many_arguments)]
    fn source(
        &mut self,
        i: usize,
        value: ExprId,
        dtype: DType,
        frame: &Frame,
        place: &Place,
        at: &Iteration,
        out: &mut Vec<Stmt>,
    ) -> Step<FragId> {
        let f = self.f;
        match &f.kernel.exprs[value] {
            tile::Expr::Tile(t) if f.tile(*t).space == Space::Registers && f.tile(*t).dims == frame.dims => {
                Ok(self.frag(*t))
            }
            _ => {
                let value = self.value(i, value, frame, place, at, out)?;
                let t = self.temp(&format!("{}_in", f.ops[i].name), dtype, &frame.dist);
                out.push(Stmt::Map { out: t, value });
                Ok(t)
            }
        }
    }

    /// Limits along `axes` of the frame, where elements may be absent.
    fn limits(&self, axes: &[AxisId], frame: &Frame, place: &Place) -> Vec<Bound> {
        let f = self.f;
        axes.iter()
            .filter(|a| !f.axis(**a).exact && (place.checked || !is_walked(place, **a)))
            .filter_map(|a| frame.dims.iter().position(|d| d == a).map(|dim| (dim, *a)))
            .map(|(dim, a)| Bound { dim, limit: sub(f.extent(a), f.origin(a, place)) })
            .collect()
    }

    /// What is reduced without the selections that keep elements out: those a block without masks needs not, and those
    /// that cut a reduced axis at one coordinate, which are limits.
    fn guarded(
        &self,
        mut value: ExprId,
        (op, dtype): (ReduceOp, DType),
        over: &[AxisId],
        frame: &Frame,
        place: &Place,
    ) -> (ExprId, Vec<Bound>) {
        let f = self.f;
        let global = |b: tile::BufferId| self.global(b);
        let mut guards = Vec::new();
        while let tile::Expr::Select(cond, inside, outside) = f.kernel.exprs[value] {
            if !is_identity_in(f.kernel, outside, op, dtype) {
                break;
            }
            if place.checked || !implied(f, self.filter, cond) {
                let Some(form) = at_least_zero(f, cond, place, &global) else { break };
                let &[(axis, -1)] = form.axes.as_slice() else { break };
                let dim = frame.dims.iter().position(|d| *d == axis).filter(|_| over.contains(&axis));
                let Some(dim) = dim else { break };
                let limit = sub(add(form.base, Expr::Int(1)), f.origin(axis, place));
                guards.push(Bound { dim, limit });
            }
            value = inside;
        }
        (value, guards)
    }

    pub(super) fn reduce(&mut self, i: usize, place: &Place, at: &Iteration, out: &mut Vec<Stmt>) -> Step<()> {
        let f = self.f;
        let Op::Reduce { out: outs, op, value, over, carry } = f.ops[i].op else {
            return refuse("reductions", "not a reduction", "this is a fault of the compiler");
        };
        let frame = self.frame(i)?;
        let whole = *value;
        let dtype = f.kernel.tiles[outs[0]].dtype;
        let (value, guards) = self.guarded(whole, (*op, dtype), over, &frame, place);
        let src = self.source(i, value, dtype, &frame, place, at, out)?;
        let left_out =
            |a: &AxisId| is_walked(place, *a) && self.absorbs(i, whole, *a, self.filter, op.identity_of(dtype));
        let limited: Vec<AxisId> = over.iter().copied().filter(|a| op.selects_argument() || !left_out(a)).collect();
        let mut bounds = self.limits(&limited, &frame, place);
        bounds.extend(guards);
        let base = if op.selects_argument() {
            let [axis] = over[..] else {
                let message = format!("{} selects an argument over several axes", f.ops[i].name);
                return refuse("reductions", message, "select over one axis");
            };
            Some(f.origin(axis, place))
        } else {
            None
        };
        let dims = over.iter().filter_map(|a| frame.dims.iter().position(|d| d == a)).collect();
        let reduce = |out, carry| Stmt::Reduce { out, op: *op, src, over: dims, base, bounds, carry };
        let results: Vec<FragId> = outs.iter().map(|t| self.frag(*t)).collect();
        if !over.iter().any(|a| f.cut(*a, place.role)) {
            out.push(reduce(results, *carry));
            return Ok(());
        }
        let parts = self.parts(i);
        if self.deferred(i) {
            out.push(reduce(parts, true));
            return Ok(());
        }
        // An argument selection's result may be among the candidates of every unit; other values count once.
        let selects = op.selects_argument() && *carry;
        if selects {
            let copies = parts.iter().zip(&results).zip(outs);
            out.extend(copies.map(|((p, r), t)| {
                let dims = (0..f.tile(*t).dims.len()).collect();
                Stmt::Map { out: *p, value: Expr::Frag { frag: *r, dims } }
            }));
        }
        out.push(reduce(parts, selects));
        let stages = if at.trip.is_some() { 2 } else { 1 };
        let stage = at.trip.is_some().then(|| self.turn(at).bin(BinaryOp::Mod, Expr::Int(2)));
        self.merge(&[i], stages, stage, place.role, out);
        Ok(())
    }

    /// Whether operation `i`'s units meet after its stream: nothing else in the stream uses its results.
    pub(in super::super) fn deferred(&self, i: usize) -> bool {
        let f = self.f;
        let Op::Reduce { out, over, carry: true, .. } = f.ops[i].op else { return false };
        let Some(stream) = f.stream_of(i) else { return false };
        let alone = |t: &TileId| {
            let touches = |o: usize| f.ops[o].op.outs().contains(t) || f.reads(f.ops[o].op).contains(t);
            (0..f.ops.len()).all(|o| o == i || f.stream_of(o) != Some(stream) || !touches(o))
        };
        over.iter().any(|a| f.cut(*a, f.ops[i].role)) && out.iter().all(alone)
    }

    /// What each unit has of a reduction.
    fn parts(&mut self, i: usize) -> Vec<FragId> {
        let f = self.f;
        let outs = f.ops[i].op.outs().to_vec();
        outs.iter()
            .map(|t| {
                let dist = f.tile(*t).dist.clone().expect("assigned");
                let name = format!("{}_{}_unit", f.ops[i].name, f.tile(*t).name);
                self.temp(&name, f.kernel.tiles[*t].dtype, &dist)
            })
            .collect()
    }

    /// The parts of a reduction before its stream.
    pub(in super::super) fn start(&mut self, i: usize, out: &mut Vec<Stmt>) {
        let Op::Reduce { op, .. } = self.f.ops[i].op else { return };
        let dtypes: Vec<DType> = self.f.ops[i].op.outs().iter().map(|t| self.f.kernel.tiles[*t].dtype).collect();
        let parts = self.parts(i);
        let first = match op {
            ReduceOp::ArgMin => f64::INFINITY,
            ReduceOp::ArgMax => f64::NEG_INFINITY,
            op => op.identity(),
        };
        let values = [first, -1.0].into_iter().zip(dtypes).map(|(x, dtype)| kernel_constant(x, dtype));
        out.extend(parts.into_iter().zip(values).map(|(out, value)| Stmt::Map { out, value }));
    }

    /// The units' parts of reductions `ops` meet and become the results.
    pub(in super::super) fn merge(
        &mut self,
        ops: &[usize],
        stages: u64,
        stage: Option<Expr>,
        role: usize,
        out: &mut Vec<Stmt>,
    ) {
        let f = self.f;
        for &i in ops {
            for (part, t) in self.parts(i).into_iter().zip(f.ops[i].op.outs()) {
                let dims = self.k.frags[part].dist.dims.len();
                let mut at = vec![Expr::Unit];
                at.resize(1 + dims, Expr::Int(0));
                let walk = (0..dims).map(|d| Some((d + 1, 1))).collect();
                let dst = View { buf: self.meeting(i, *t, stages, role), stage: stage.clone(), at, walk };
                out.push(Stmt::Store { dst, src: part, bounds: Vec::new(), join: None });
            }
        }
        self.role_sync(role, out);
        for &i in ops {
            let Op::Reduce { out: outs, op, carry, .. } = f.ops[i].op else { continue };
            let held = |t: &TileId| f.tile(*t).dist.as_ref().map_or(1, |d| d.counts().1);
            let units = f.roles[role].units;
            if let [t] = outs[..]
                && units * held(&t) > AT_ONCE
            {
                self.merge_in_turn(i, t, *op, *carry, (stages, stage.clone(), role), out);
                continue;
            }
            let mut all = Vec::new();
            for t in outs {
                let (dist, dtype) = (f.tile(*t).dist.clone().expect("assigned"), f.kernel.tiles[*t].dtype);
                let dist = with_units(&dist, f.roles[role].units);
                let rank = dist.dims.len();
                let frag = self.temp(&format!("{}_{}_all", f.ops[i].name, f.tile(*t).name), dtype, &dist);
                let walk = (0..rank).map(|d| Some((d, 1))).collect();
                let buf = self.meeting(i, *t, stages, role);
                let src = View { buf, stage: stage.clone(), at: vec![Expr::Int(0); rank], walk };
                out.push(Stmt::Load { out: frag, src, bounds: Vec::new() });
                all.push((frag, dist));
            }
            let results: Vec<FragId> = outs.iter().map(|t| self.frag(*t)).collect();
            let reduce = |out: FragId, op: ReduceOp, src: FragId, carry: bool| Stmt::Reduce {
                out: vec![out],
                op,
                src,
                over: vec![0],
                base: None,
                bounds: Vec::new(),
                carry,
            };
            match (all.as_slice(), results.as_slice()) {
                ([(values, dist), (places, _)], [best, place]) => {
                    // The best value of all units, and the lowest place among those that have it. Units without
                    // candidates have place −1.
                    let rank = dist.dims.len();
                    let of = |frag: FragId| Expr::Frag { frag, dims: (0..rank).collect() };
                    let row = |frag: FragId| Expr::Frag { frag, dims: (1..rank).collect() };
                    let before = self.before(i, *best, *place, out);
                    let pick = if *op == ReduceOp::ArgMin { ReduceOp::Min } else { ReduceOp::Max };
                    let carried = self.deferred(i);
                    out.push(reduce(*best, pick, *values, carried));
                    let nan = |e: Expr| e.clone().bin(BinaryOp::Ne, e);
                    let equal = |v: Expr, best: Expr| {
                        let both = nan(v.clone()).bin(BinaryOp::And, nan(best.clone()));
                        v.bin(BinaryOp::Eq, best).bin(BinaryOp::Or, both)
                    };
                    let far = Expr::Int(i64::from(i32::MAX));
                    let key = |v: Expr, p: Expr, best: Expr| {
                        let taken = equal(v, best).bin(BinaryOp::And, Expr::Int(0).bin(BinaryOp::Le, p.clone()));
                        Expr::Select(Box::new(taken), Box::new(p), Box::new(far.clone()))
                    };
                    out.push(Stmt::Map { out: *places, value: key(of(*values), of(*places), row(*best)) });
                    let kept: Vec<usize> = (0..rank - 1).collect();
                    let own = |frag: FragId| Expr::Frag { frag, dims: kept.clone() };
                    if let Some((v, p)) = before.filter(|_| carried) {
                        out.push(Stmt::Map { out: *place, value: key(own(v), own(p), own(*best)) });
                    }
                    out.push(reduce(*place, ReduceOp::Min, *places, carried));
                    let none = own(*place).bin(BinaryOp::Eq, far.clone());
                    let value = Expr::Select(Box::new(none), Box::new(Expr::Int(-1)), Box::new(own(*place)));
                    out.push(Stmt::Map { out: *place, value });
                }
                ([(values, _)], [result]) => out.push(reduce(*result, *op, *values, *carry)),
                _ => {}
            }
        }
        // In a work loop the next block writes the same copies.
        if f.work_loop.as_ref().is_some_and(|w| w.persistent) {
            self.role_sync(role, out);
        }
    }

    /// Joins the units' parts of a tile of many elements a few units at a time, so that registers hold no more of them.
    fn merge_in_turn(
        &mut self,
        i: usize,
        t: TileId,
        op: ReduceOp,
        carry: bool,
        (stages, stage, role): (u64, Option<Expr>, usize),
        out: &mut Vec<Stmt>,
    ) {
        let f = self.f;
        let (own, dtype) = (f.tile(t).dist.clone().expect("assigned"), f.kernel.tiles[t].dtype);
        let (units, buf) = (f.roles[role].units, self.meeting(i, t, stages, role));
        let mut few = (AT_ONCE / own.counts().1).clamp(1, units);
        while !units.is_multiple_of(few) {
            few -= 1;
        }
        let dist = with_units(&own, few);
        let rank = dist.dims.len();
        let frag = self.temp(&format!("{}_{}_some", f.ops[i].name, f.tile(t).name), dtype, &dist);
        for first in (0..units).step_by(few as usize) {
            let mut at = vec![Expr::Int(0); rank];
            at[0] = Expr::Int(first as i64);
            let walk = (0..rank).map(|d| Some((d, 1))).collect();
            let src = View { buf, stage: stage.clone(), at, walk };
            out.push(Stmt::Load { out: frag, src, bounds: Vec::new() });
            let (outs, carry) = (vec![self.frag(t)], carry || first > 0);
            out.push(Stmt::Reduce { out: outs, op, src: frag, over: vec![0], base: None, bounds: Vec::new(), carry });
        }
    }

    /// Copies of an argument selection's results before its units meet.
    fn before(&mut self, i: usize, best: FragId, place: FragId, out: &mut Vec<Stmt>) -> Option<(FragId, FragId)> {
        if !self.deferred(i) {
            return None;
        }
        let copy = |e: &mut Self, frag: FragId, what: &str, out: &mut Vec<Stmt>| {
            let source = e.k.frags[frag].clone();
            let to = e.temp(&format!("{}_{what}_before", e.f.ops[i].name), source.dtype, &source.dist);
            let dims = (0..source.dist.dims.len()).collect();
            out.push(Stmt::Map { out: to, value: Expr::Frag { frag, dims } });
            to
        };
        Some((copy(self, best, "value", out), copy(self, place, "place", out)))
    }

    /// The shared tile where units leave their parts.
    fn meeting(&mut self, i: usize, t: TileId, stages: u64, role: usize) -> BufId {
        let f = self.f;
        let key = format!("{}_{}_units", f.ops[i].name, f.tile(t).name);
        let name: String = key.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        if let Some(b) = self.meetings.get(&key) {
            return *b;
        }
        let mut extents = vec![f.roles[role].units];
        extents.extend(f.tile(t).dist.as_ref().map(|d| d.dims.clone()).unwrap_or_default());
        let dims = extents.iter().map(|e| Expr::Int(*e as i64)).collect();
        let space = BufSpace::Shared { layout: MemLayout::row_major(&extents), stages };
        let b = self.k.bufs.push(Buf { name, dtype: f.kernel.tiles[t].dtype, dims, space });
        self.meetings.insert(key, b);
        b
    }

    /// All units of the role meet.
    pub(in super::super) fn role_sync(&mut self, role: usize, out: &mut Vec<Stmt>) {
        let m = &self.f.roles[role];
        if self.f.roles.len() == 1 {
            out.push(Stmt::TaskSync);
            return;
        }
        let name = format!("all_{}", m.role);
        let known = self.k.barriers.iter().find(|(_, b)| b.name == name).map(|(id, _)| id);
        let kind = BarrierKind::Named { threads: m.scope.threads() * m.units };
        let barrier = known.unwrap_or_else(|| self.k.barriers.push(Barrier { name, kind, stages: 1 }));
        out.push(Stmt::NamedSync { barrier, stage: Expr::Int(0) });
    }

    pub(super) fn scan(&mut self, i: usize, place: &Place, at: &Iteration, out: &mut Vec<Stmt>) -> Step<()> {
        let f = self.f;
        let Op::Scan { out: t, op, value, along, carry } = f.ops[i].op else {
            return refuse("scans", "not a scan", "this is a fault of the compiler");
        };
        if f.cut(*along, place.role) {
            let message = format!("{} runs along an axis cut over units", f.ops[i].name);
            return refuse("scans", message, "cut another axis over units");
        }
        let frame = self.frame(i)?;
        let src = self.source(i, *value, f.kernel.tiles[*t].dtype, &frame, place, at, out)?;
        let bounds = self.limits(&[*along], &frame, place);
        let (result, carry) = (self.frag(*t), carry.map(|c| self.frag(c)));
        match frame.dims.iter().position(|d| d == along) {
            Some(along) => out.push(Stmt::Scan { out: result, op: *op, src, along, carry, bounds }),
            None => {
                // One element a step: the running value itself.
                let dims: Vec<usize> = (0..frame.dims.len()).collect();
                let of = |frag: FragId| Expr::Frag { frag, dims: dims.clone() };
                out.push(Stmt::Map { out: result, value: of(src) });
                if let Some(c) = carry {
                    let stmt = |out: FragId, src: FragId| Stmt::Reduce {
                        out: vec![out],
                        op: *op,
                        src,
                        over: Vec::new(),
                        base: None,
                        bounds: Vec::new(),
                        carry: true,
                    };
                    out.push(stmt(c, src));
                    out.push(Stmt::Map { out: result, value: of(c) });
                }
            }
        }
        Ok(())
    }
}

/// The distribution of a row of what every unit has, all of it in every thread's registers.
fn with_units(d: &Distribution, units: u64) -> Distribution {
    let up = |digits: &[DistDigit]| {
        let moved = digits.iter().map(|g| if g.stride == 0 { *g } else { DistDigit { dim: g.dim + 1, ..*g } });
        moved.collect::<Vec<_>>()
    };
    let mut dims = vec![units];
    dims.extend(&d.dims);
    let mut regs = vec![DistDigit { extent: units, dim: 0, stride: 1 }];
    regs.extend(up(&d.regs));
    Distribution { dims, threads: up(&d.threads), regs, lanes: up(&d.lanes) }
}
