//! Elementwise operations, reductions, loads and stores: one loop nest for a run of operations over the same axes.
//!
//! Loops over the other axes surround a loop along the lane axis, in steps of several vectors, then of one masked
//! vector for the tail. Values made by one operation and used by the next stay in registers; a tile nobody else reads
//! never reaches memory.

use std::collections::BTreeMap;

use einfall_ir::arena::Id;
use einfall_ir::cascade::Size;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Bound, Expr as E, Frag, FragId, Stmt, VarId, View};
use einfall_ir::layout::Distribution;
use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{self, AxisId, BufferId, ExprId, Node, Op, Place as At, TileId};

use super::access::{Point, Sink};
use super::build::*;
use super::place::{Place, Scratch};
use super::{Lower, Out, tiles_of};

/// What stands in a loop nest, given the local coordinates.
type LoopBody<'b, 'l> = dyn FnMut(&mut Lower<'l>, &mut BTreeMap<AxisId, E>) -> Out<Vec<Stmt>> + 'b;

/// What stands in a lane loop, given the points and whether they may end early.
type LaneBody<'b, 'l> = dyn FnMut(&mut Lower<'l>, &Point, bool) -> Out<Vec<Stmt>> + 'b;

/// Larger than any position.
const FAR: i64 = i64::MAX;

/// Accumulators of one reduction, per vector shape.
struct Acc {
    /// Value, and for LogSumExp the sum or for selections the position.
    frags: Vec<FragId>,
    width: u64,
}

/// The nest being emitted.
struct Nest<'o> {
    ops: Vec<&'o Op>,
    /// Position of the first operation.
    first: usize,
    lane: Option<AxisId>,
    reduced: Vec<AxisId>,
    outer: Vec<AxisId>,
    /// Vectors per step times lanes.
    width: u64,
}

impl<'l> Lower<'l> {
    /// Axes an operation ranges over, and those it reduces.
    fn op_axes(&self, op: &Op) -> (Vec<AxisId>, Vec<AxisId>) {
        match op {
            Op::Load { out, .. } | Op::Map { out, .. } => (self.wide(&self.k.tiles[*out].axes), Vec::new()),
            Op::Store { axes, .. } => (self.wide(axes), Vec::new()),
            Op::Reduce { out, over, .. } => {
                let over = self.wide(over);
                let mut axes = self.wide(&self.k.tiles[out[0]].axes);
                axes.extend(&over);
                (self.wide(&axes), over)
            }
            Op::Contract { .. } | Op::Scan { .. } => (Vec::new(), Vec::new()),
        }
    }

    /// How many of the first nodes share one nest.
    pub(super) fn group(&self, nodes: &[Node]) -> usize {
        let mut n = 0;
        let mut axes: Option<Vec<AxisId>> = None;
        let mut reduced: Option<Vec<AxisId>> = None;
        let (mut written, mut sums): (Vec<TileId>, Vec<TileId>) = (Vec::new(), Vec::new());
        let mut crossed: Vec<TileId> = Vec::new();
        let mut stored: Vec<BufferId> = Vec::new();
        for node in nodes {
            let Node::Op(op) = node else { break };
            if matches!(op, Op::Contract { .. } | Op::Scan { .. }) {
                break;
            }
            if let Op::Load { out, .. } = op
                && matches!(self.places[out.index()], Place::Direct { .. })
            {
                break;
            }
            let (mut a, mut r) = self.op_axes(op);
            a.sort();
            r.sort();
            let is_reduce = matches!(op, Op::Reduce { .. });
            if axes.as_ref().is_some_and(|x| *x != a) || (is_reduce && reduced.as_ref().is_some_and(|x| *x != r)) {
                break;
            }
            // What it reads must be whole, or made at the same point of this nest.
            let mut ok = true;
            let mut now_crossed = Vec::new();
            for root in op.roots() {
                tiles_of(self.k, root, &mut |t| ok &= !sums.contains(&t));
                self.k.walk(root, &mut |_, e| match e {
                    tile::Expr::TileAt { tile, at } if *at != self.own_places(*tile) => {
                        ok &= !written.contains(tile);
                        now_crossed.push(*tile);
                    }
                    tile::Expr::Tile(t) | tile::Expr::TileAt { tile: t, .. } => {
                        // Through an array read in place, it may meet a store of this nest.
                        if let Place::Direct { buffer, .. } = &self.places[t.index()] {
                            ok &= !stored.contains(buffer);
                        }
                        let wide = self.wide(&self.k.tiles[*t].axes);
                        let carried = written.contains(t) && wide.len() != a.len();
                        ok &= !carried;
                    }
                    tile::Expr::Read { buffer, .. } => ok &= !stored.contains(buffer),
                    tile::Expr::Int(_)
                    | tile::Expr::Float(_)
                    | tile::Expr::Size(_)
                    | tile::Expr::Coord(_)
                    | tile::Expr::Unary(..)
                    | tile::Expr::Binary(..)
                    | tile::Expr::Select(..)
                    | tile::Expr::Cast(..) => {}
                });
            }
            if let Op::Load { buffer, .. } = op {
                ok &= !stored.contains(buffer);
            }
            for t in op.outs() {
                ok &= !crossed.contains(t) && !sums.contains(t);
                // A narrower tile read at other points of the nest must not change under it.
                ok &= !(is_reduce && written.contains(t));
            }
            if !ok && n > 0 {
                break;
            }
            // A sum that the nest reads elsewhere (its value before) must not be overwritten early: sums are stored
            // when the nest ends a point, and readers of this nest come after by the test above.
            crossed.extend(now_crossed);
            if is_reduce {
                if self.reads_earlier(&nodes[..n], op) {
                    break;
                }
                sums.extend(op.outs());
                reduced = Some(r);
            } else {
                written.extend(op.outs());
            }
            if let Op::Store { buffer, .. } = op {
                stored.push(*buffer);
            }
            axes = Some(a);
            n += 1;
            // An operation that crosses its own output runs alone.
            if !ok {
                break;
            }
        }
        n.max(1)
    }

    /// Whether an operation of `nodes` reads what `op` is about to write.
    fn reads_earlier(&self, nodes: &[Node], op: &Op) -> bool {
        let mut found = false;
        for node in nodes {
            let Node::Op(o) = node else { continue };
            for root in o.roots() {
                tiles_of(self.k, root, &mut |t| found |= op.outs().contains(&t));
            }
        }
        found
    }

    /// The nest of `ops`, the first of which stands at the current position.
    pub(super) fn nest(&mut self, ops: &[&Op]) -> Out<Vec<Stmt>> {
        if let [op] = ops
            && let Some(stmts) = self.transposing_load(op)?
        {
            return Ok(stmts);
        }
        let (mut axes, mut reduced) = (Vec::new(), Vec::new());
        for op in ops {
            let (a, r) = self.op_axes(op);
            if axes.is_empty() {
                axes = a;
            }
            if reduced.is_empty() {
                reduced = r;
            }
        }
        let lane = self.choose_lane(ops, &axes);
        let l = self.isa.lanes();
        let mut width = 0;
        if let Some(a) = lane {
            let most = match &self.ranges[a.index()].most {
                E::Int(n) => (*n as u64).div_ceil(l),
                _ => 4,
            };
            let vectors = if most >= 4 { 4 } else { most.next_power_of_two().min(2) };
            width = self.panel_limit(ops, a, vectors * l);
        }
        let outer = axes.iter().copied().filter(|a| Some(*a) != lane && !reduced.contains(a)).collect();
        let nest = Nest { ops: ops.to_vec(), first: self.position, lane, reduced, outer, width };
        self.emit(&nest)
    }

    /// Steps along the lane axis may not leave a panel.
    fn panel_limit(&self, ops: &[&Op], lane: AxisId, width: u64) -> u64 {
        let mut w = width;
        let mut see = |t: TileId| {
            if let Place::Scratch(s) = &self.places[t.index()]
                && let Some(p) = s.layout.panel
            {
                // Under another name the lane may walk any axis of the tile.
                let _ = lane;
                w = w.min(p);
            }
        };
        for op in ops {
            op.outs().iter().for_each(|t| see(*t));
            for root in op.roots() {
                tiles_of(self.k, root, &mut see);
            }
        }
        w
    }

    /// The axis that most accesses walk contiguously.
    pub(super) fn choose_lane(&self, ops: &[&Op], axes: &[AxisId]) -> Option<AxisId> {
        let mut best: Option<(i64, AxisId)> = None;
        for &a in axes {
            let mut score = 0;
            let few = matches!(&self.ranges[a.index()].most, E::Int(n) if (*n as u64) < self.isa.lanes());
            if few {
                score -= 2;
            }
            for op in ops {
                for t in op.outs() {
                    if !matches!(op, Op::Reduce { .. }) {
                        score += 2 * self.tile_score(*t, &self.own_places(*t), a);
                    }
                }
                if let Op::Store { buffer, at, .. } = op {
                    score += 2 * self.read_score(*buffer, at, a);
                }
                if let Op::Load { buffer, at, .. } = op {
                    score += self.read_score(*buffer, at, a);
                }
                for root in op.roots() {
                    self.k.walk(root, &mut |_, e| match e {
                        tile::Expr::Tile(t) => score += self.tile_score(*t, &self.own_places(*t), a),
                        tile::Expr::TileAt { tile, at } => score += self.tile_score(*tile, at, a),
                        tile::Expr::Read { buffer, at } => score += self.read_score(*buffer, at, a),
                        tile::Expr::Int(_)
                        | tile::Expr::Float(_)
                        | tile::Expr::Size(_)
                        | tile::Expr::Coord(_)
                        | tile::Expr::Unary(..)
                        | tile::Expr::Binary(..)
                        | tile::Expr::Select(..)
                        | tile::Expr::Cast(..) => {}
                    });
                }
            }
            if best.is_none_or(|(s, _)| score >= s) {
                best = Some((score, a));
            }
        }
        best.map(|b| b.1)
    }

    /// 2 where the lane walks the tile contiguously, 0 where it does not matter, −3 where it strides.
    fn tile_score(&self, t: TileId, names: &[At], lane: AxisId) -> i64 {
        let Some(i) = names.iter().position(|n| *n == At::Axis(lane)) else { return 0 };
        match &self.places[t.index()] {
            Place::Direct { buffer, at } => self.read_score(*buffer, at, self.k.tiles[t].axes[i]),
            Place::Scratch(s) => {
                let own = self.k.tiles[t].axes[i];
                if !s.layout.order.contains(&own) {
                    0
                } else if s.layout.order.last() == Some(&own) {
                    2
                } else {
                    -3
                }
            }
        }
    }

    fn read_score(&self, _: BufferId, at: &[ExprId], lane: AxisId) -> i64 {
        let coefs: Vec<_> = at.iter().map(|a| self.lane_coef(*a, Some(lane))).collect();
        let Some((last, rest)) = coefs.split_last() else { return 0 };
        if coefs.iter().all(|c| *c == Some(0)) {
            0
        } else if *last == Some(1) && rest.iter().all(|c| *c == Some(0)) {
            2
        } else {
            -3
        }
    }

    /// Loops over `axes`, outermost first, around `body`.
    pub(super) fn loops(
        &mut self,
        axes: &[AxisId],
        local: &mut BTreeMap<AxisId, E>,
        body: &mut LoopBody<'_, 'l>,
    ) -> Out<Vec<Stmt>> {
        let Some((&a, rest)) = axes.split_first() else { return body(self, local) };
        let v = self.var(&self.k.axes[a].name.clone());
        local.insert(a, E::Var(v));
        let inner = self.loops(rest, local, body)?;
        local.remove(&a);
        let hi = self.ranges[a.index()].size.clone();
        Ok(vec![Stmt::For { var: v, lo: int(0), hi, step: 1, unroll: false, body: inner }])
    }

    fn emit(&mut self, nest: &Nest) -> Out<Vec<Stmt>> {
        let mut local = BTreeMap::new();
        let lane_reduced = nest.lane.is_some_and(|l| nest.reduced.contains(&l));
        let outer = nest.outer.clone();
        let inner_reduced: Vec<AxisId> = nest.reduced.iter().copied().filter(|a| Some(*a) != nest.lane).collect();
        self.loops(&outer, &mut local, &mut |s, local| {
            if lane_reduced {
                // Accumulators for whole steps and for the tail, joined across the lanes once.
                let l = s.isa.lanes();
                let mut shapes = vec![nest.width];
                if s.has_tail(nest) && nest.width != l {
                    shapes.push(l);
                }
                let mut out = Vec::new();
                let mut accs: Vec<Vec<Acc>> = Vec::new();
                for w in &shapes {
                    accs.push(s.start(nest, *w, &mut out)?);
                }
                let body = s.loops(&inner_reduced, local, &mut |s, local| {
                    s.along(nest, local, &mut |s, p, tail| {
                        let which = usize::from(tail && accs.len() > 1);
                        s.body(nest, p, &accs[which])
                    })
                })?;
                out.extend(body);
                out.extend(s.finish(
                    nest,
                    &accs,
                    &Point { local: local.clone(), lane: None, width: 0, limit: None },
                )?);
                Ok(out)
            } else {
                s.along(nest, local, &mut |s, p, _| {
                    let mut start = Vec::new();
                    let accs = s.start(nest, p.width, &mut start)?;
                    let mut local = p.local.clone();
                    let body = s.loops(&inner_reduced, &mut local, &mut |s, local| {
                        s.body(nest, &Point { local: local.clone(), ..p.clone() }, &accs)
                    })?;
                    // Accumulators start at every step along the lanes; only operands stand before the loop.
                    let (mut out, body) = split_hoisted(body);
                    if !out.is_empty() {
                        out.push(HOIST_MARK);
                    }
                    out.extend(start);
                    out.extend(body);
                    out.extend(s.finish(nest, std::slice::from_ref(&accs), p)?);
                    Ok(out)
                })
            }
        })
    }

    /// Whether the lane axis may end within a step.
    fn has_tail(&self, nest: &Nest) -> bool {
        nest.lane.is_some_and(|l| self.lane_tail(l, nest.width))
    }

    /// The loop along the lane axis of a nest.
    fn along(&mut self, nest: &Nest, local: &mut BTreeMap<AxisId, E>, body: &mut LaneBody<'_, 'l>) -> Out<Vec<Stmt>> {
        self.along_lane(nest.lane, nest.width, local, body)
    }

    /// As [`Lower::along_axis`] where there is an axis; else one scalar point.
    pub(super) fn along_lane(
        &mut self,
        lane: Option<AxisId>,
        width: u64,
        local: &mut BTreeMap<AxisId, E>,
        body: &mut LaneBody<'_, 'l>,
    ) -> Out<Vec<Stmt>> {
        match lane {
            Some(a) => self.along_axis(a, width, local, body),
            None => body(self, &Point { local: local.clone(), lane: None, width: 0, limit: None }, false),
        }
    }

    /// A loop along an axis: whole steps of `width` elements, then masked vectors (`body` is told which).
    pub(super) fn along_axis(
        &mut self,
        lane: AxisId,
        width: u64,
        local: &mut BTreeMap<AxisId, E>,
        body: &mut LaneBody<'_, 'l>,
    ) -> Out<Vec<Stmt>> {
        let (w, l) = (width, self.isa.lanes());
        let size = self.ranges[lane.index()].size.clone();
        let whole = sub(size.clone(), size.clone().bin(BinaryOp::Mod, int(w as i64)));
        let name = self.k.axes[lane].name.clone();
        let mut out = Vec::new();
        let mut step = |s: &mut Self, lo: E, hi: E, width: u64, tail: bool| -> Out<()> {
            let v: VarId = s.var(&name);
            local.insert(lane, E::Var(v));
            let limit = tail.then(|| sub(size.clone(), E::Var(v)));
            let p = Point { local: local.clone(), lane: Some(lane), width, limit };
            let b = body(s, &p, tail)?;
            local.remove(&lane);
            let (outer, b) = split_hoisted(b);
            if outer.is_empty() {
                out.push(Stmt::For { var: v, lo, hi, step: width as i64, unroll: false, body: b });
            } else {
                let cond = lo.clone().bin(BinaryOp::Lt, hi.clone());
                let mut then = outer;
                then.push(Stmt::For { var: v, lo, hi, step: width as i64, unroll: false, body: b });
                out.push(Stmt::If { cond, then, otherwise: Vec::new() });
            }
            Ok(())
        };
        if whole != int(0) {
            step(self, int(0), whole.clone(), w, false)?;
        }
        if self.lane_tail(lane, w) {
            step(self, whole, size.clone(), l, true)?;
        }
        Ok(out)
    }

    /// Whether an axis may end within a step of `width`.
    fn lane_tail(&self, lane: AxisId, width: u64) -> bool {
        !matches!(&self.ranges[lane.index()].size, E::Int(n) if (*n as u64).is_multiple_of(width))
    }

    /// One execution of the operations at a point (or vector of points).
    fn body(&mut self, nest: &Nest, p: &Point, accs: &[Acc]) -> Out<Vec<Stmt>> {
        // Hoisting is possible where the lane loop is the innermost.
        let hoist = nest.lane.is_some_and(|l| nest.reduced.is_empty() || nest.reduced.contains(&l));
        let mut sink = Sink { hoist, ..Sink::default() };
        let mut acc = accs.iter();
        let last = nest.first + nest.ops.len();
        for (i, op) in nest.ops.iter().enumerate() {
            let position = nest.first + i;
            match op {
                Op::Map { out, value } => {
                    let v = self.expr(*value, p, &mut sink)?;
                    self.define(*out, v, p, position, last, nest.first, &mut sink)?;
                }
                Op::Load { out, buffer, at } => {
                    let v = self.read_value(*buffer, at, p, &mut sink)?;
                    self.define(*out, v, p, position, last, nest.first, &mut sink)?;
                }
                Op::Reduce { op, value, .. } => {
                    let v = self.expr(*value, p, &mut sink)?;
                    if let Some(a) = acc.next() {
                        self.accumulate(nest, *op, v, *value, a, p, &mut sink)?;
                    }
                }
                Op::Store { buffer, at, value, join, when, .. } => {
                    self.store_op(*buffer, at, *value, *join, *when, p, &mut sink)?;
                }
                Op::Contract { .. } | Op::Scan { .. } => {
                    return Err(self.unsupported("a contraction inside an elementwise nest"));
                }
            }
        }
        let mut out = sink.outer;
        if !out.is_empty() {
            out.push(HOIST_MARK);
        }
        out.extend(sink.inner);
        Ok(out)
    }

    /// Binds a tile's element, and writes it to scratch where someone else reads it.
    #[allow(clippy::too_many_arguments)]
    fn define(
        &mut self,
        t: TileId,
        v: E,
        p: &Point,
        position: usize,
        last: usize,
        first: usize,
        sink: &mut Sink,
    ) -> Out<()> {
        let tile = &self.k.tiles[t];
        let (name, dtype) = (tile.name.clone(), self.held(t));
        let varies = p.lane.is_some_and(|l| tile.axes.contains(&l));
        let v = match dtype {
            DType::F32 | DType::F64 | DType::I64 | DType::Bool => v,
            // Elements of the tile's own type are representable in it.
            _ if self.representable(&v, dtype) => v,
            _ => E::Cast(dtype, Box::new(v)),
        };
        let frag = self.frag(&name, Self::register_type(dtype), if varies { p.width } else { 0 });
        sink.inner.push(Stmt::Map { out: frag, value: v });
        sink.live.insert(t, frag);
        let escapes = self.readers[t.index()].iter().any(|r| *r <= position || *r >= last || *r < first);
        let crossed = self.readers[t.index()].iter().any(|r| *r > position && *r < last && self.crosses(t, *r));
        if escapes || crossed {
            let Place::Scratch(s) = self.places[t.index()].clone() else { return Ok(()) };
            let stmt = self.scratch_store(&s, frag, varies, p)?;
            sink.inner.push(stmt);
        }
        Ok(())
    }

    /// Whether a value is an element of an array of this type, as loaded.
    fn representable(&self, v: &E, dtype: DType) -> bool {
        let E::Frag { frag, .. } = v else { return false };
        let name = &self.frags[*frag].name;
        self.loaded_types.get(name).is_some_and(|d| *d == dtype)
    }

    /// Whether the operation at `position` reads the tile under other axis names.
    fn crosses(&self, t: TileId, position: usize) -> bool {
        let (mut i, mut found) = (0, false);
        let own = self.own_places(t);
        self.k.for_each_op(&mut |op, _| {
            if i == position {
                for root in op.roots() {
                    self.k.walk(root, &mut |_, e| {
                        found |= matches!(e, tile::Expr::TileAt { tile, at } if *tile == t && *at != own);
                    });
                }
            }
            i += 1;
        });
        found
    }

    /// Where a point of a tile lies in its scratch.
    fn scratch_view(&self, s: &Scratch, p: &Point) -> Out<(View, bool)> {
        for a in &s.layout.order {
            if !p.local.contains_key(a) && !self.ranges[a.index()].unit {
                return Err(self.unsupported(format!("a tile without a loop over its axis {}", self.k.axes[*a].name)));
            }
        }
        let at = self.scratch_at(s, |a| p.local.get(&a).cloned().unwrap_or(int(0)));
        let lane = p.lane.filter(|l| s.layout.order.contains(l));
        let walk = match lane {
            Some(l) => vec![Self::scratch_dim(s, l).map(|d| (d, 1))],
            None => Vec::new(),
        };
        let contiguous = lane.is_none() || lane == s.layout.order.last().copied();
        Ok((View { buf: s.buf, stage: None, at, walk }, contiguous))
    }

    pub(super) fn scratch_store(&mut self, s: &Scratch, frag: FragId, varies: bool, p: &Point) -> Out<Stmt> {
        let (dst, contiguous) = self.scratch_view(s, p)?;
        let bounds = match &p.limit {
            Some(l) if varies && !contiguous => vec![Bound { dim: 0, limit: l.clone() }],
            _ => Vec::new(),
        };
        Ok(Stmt::Store { dst, src: frag, bounds, join: None })
    }

    #[allow(clippy::too_many_arguments)]
    fn store_op(
        &mut self,
        buffer: BufferId,
        at: &[ExprId],
        value: ExprId,
        join: Option<ReduceOp>,
        when: Option<ExprId>,
        p: &Point,
        sink: &mut Sink,
    ) -> Out<()> {
        let buf = self.globals[&buffer];
        let info = &self.plan.buffers[buffer];
        let (dims, dtype) = (info.dims.clone(), info.dtype);
        let v = self.expr(value, p, sink)?;
        let coefs: Vec<Option<i64>> = at.iter().map(|a| self.lane_coef(*a, p.lane)).collect();
        let moving: Vec<usize> = (0..at.len()).filter(|i| coefs[*i] != Some(0)).collect();
        let width = if p.lane.is_some() { p.width } else { 0 };
        let frag = self.frag("stored", Self::register_type(dtype), width);
        let v = match (Self::register_type(dtype), dtype) {
            (DType::I64, d) if d != DType::I64 => E::Cast(d, Box::new(v)),
            _ => v,
        };
        sink.inner.push(Stmt::Map { out: frag, value: v });
        let bounds: Vec<Bound> = match &p.limit {
            Some(l) => vec![Bound { dim: 0, limit: l.clone() }],
            None => Vec::new(),
        };
        let inside = at.iter().zip(&dims).all(|(a, d)| self.inside(*a, d));
        let affine = coefs.iter().all(Option::is_some) && moving.len() == usize::from(p.lane.is_some());
        if affine && inside && when.is_none() {
            let at = at.iter().map(|a| self.uniform(*a, p)).collect::<Out<_>>()?;
            let walk = match moving.first() {
                Some(&d) => vec![coefs[d].map(|c| (d, c))],
                None => Vec::new(),
            };
            let dst = View { buf, stage: None, at, walk };
            sink.inner.push(Stmt::Store { dst, src: frag, bounds, join });
            return Ok(());
        }
        let mut at: Vec<E> = at.iter().map(|a| self.expr(*a, p, sink)).collect::<Out<_>>()?;
        if let Some(w) = when.filter(|w| !self.is_known(*w)) {
            // A point outside the array is dropped.
            let c = self.expr(w, p, sink)?;
            let Some(first) = at.first_mut() else { return Err(self.unsupported("a conditional store of a scalar")) };
            *first = E::Select(Box::new(c), Box::new(first.clone()), Box::new(int(-1)));
        }
        sink.inner.push(Stmt::Scatter { buf, at, src: frag, bounds, join });
        Ok(())
    }

    // Reductions.

    /// Declares and initialises the accumulators of every reduction for one vector width.
    fn start(&mut self, nest: &Nest, width: u64, out: &mut Vec<Stmt>) -> Out<Vec<Acc>> {
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
    fn accumulate(
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

    fn is_float_acc(&self, f: FragId) -> bool {
        self.frags[f].dtype.is_float()
    }

    /// An expression bound to a fragment, so that it is computed once.
    fn bind(&mut self, v: E, width: u64, sink: &mut Sink) -> E {
        let f = self.frag("value", DType::F32, width);
        sink.inner.push(Stmt::Map { out: f, value: v });
        E::Frag { frag: f, dims: if width > 0 { vec![0] } else { vec![] } }
    }

    /// The position over the reduced axes, the last fastest.
    fn reduced_position(&self, nest: &Nest, p: &Point) -> Out<E> {
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
    fn finish(&mut self, nest: &Nest, accs: &[Vec<Acc>], p: &Point) -> Out<Vec<Stmt>> {
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
    fn join_lse(
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
    fn select_across(&mut self, op: ReduceOp, v: FragId, at: FragId, out: &mut Vec<Stmt>) -> (FragId, FragId) {
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
    fn select_join(
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

    /// A load into scratch whose source is contiguous along another axis than its target: squares of lanes × lanes
    /// elements are transposed in registers.
    fn transposing_load(&mut self, op: &Op) -> Out<Option<Vec<Stmt>>> {
        let Op::Load { out, buffer, at } = op else { return Ok(None) };
        let Place::Scratch(s) = self.places[out.index()].clone() else { return Ok(None) };
        self.transpose_into(&s, &TransposeSource::Array { buffer: *buffer, at })
    }

    /// As [`Lower::transposing_load`] for any source.
    pub(super) fn transpose_into(&mut self, s: &Scratch, from: &TransposeSource) -> Out<Option<Vec<Stmt>>> {
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
        let l = self.isa.lanes();
        let few = |a: AxisId| matches!(&self.ranges[a.index()].most, E::Int(n) if (*n as u64) < l / 2);
        if few(unit) || few(lane) {
            return Ok(None);
        }
        let outer: Vec<AxisId> = s.layout.order.iter().copied().filter(|a| *a != unit && *a != lane).collect();
        let mut local = BTreeMap::new();
        let (s, from) = (s.clone(), from.clone());
        let stmts = self.loops(&outer, &mut local, &mut |me, local| {
            let (u, v) = (me.var(&me.k.axes[unit].name.clone()), me.var(&me.k.axes[lane].name.clone()));
            local.insert(unit, E::Var(u));
            local.insert(lane, E::Var(v));
            let p = Point { local: local.clone(), lane: None, width: 0, limit: None };
            let (src, su) = match &from {
                TransposeSource::Array { buffer, at } => {
                    let buf = me.globals[buffer];
                    let dim = |a: AxisId| at.iter().position(|e| me.lane_coef(*e, Some(a)) != Some(0));
                    let (du, dv) = (dim(unit), dim(lane));
                    let origin = at.iter().map(|a| me.uniform(*a, &p)).collect::<Out<Vec<_>>>()?;
                    (View { buf, stage: None, at: origin, walk: vec![du.map(|d| (d, 1)), dv.map(|d| (d, 1))] }, true)
                }
                TransposeSource::Scratch(f) => {
                    let at = me.scratch_at(f, |a| local.get(&a).cloned().unwrap_or(int(0)));
                    let dim = |a: AxisId| Self::scratch_dim(f, a).map(|d| (d, 1));
                    (View { buf: f.buf, stage: None, at, walk: vec![dim(unit), dim(lane)] }, false)
                }
            };
            let frag = me.square();
            let (nu, nv) = (me.ranges[unit.index()].size.clone(), me.ranges[lane.index()].size.clone());
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
                b.truncate(1);
                vec![load, Stmt::Store { dst: dst.clone(), src: frag, bounds: b, join: None }]
            };
            let _ = su;
            let multiple = |n: &E| matches!(n, E::Int(n) if (*n as u64).is_multiple_of(l));
            let inner = if multiple(&nu) && multiple(&nv) {
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
            let inner = vec![Stmt::For { var: u, lo: int(0), hi: nu, step: l as i64, unroll: false, body: inner }];
            Ok(vec![Stmt::For { var: v, lo: int(0), hi: nv, step: l as i64, unroll: false, body: inner }])
        })?;
        Ok(Some(stmts))
    }

    /// A fragment of lanes × lanes elements.
    fn square(&mut self) -> FragId {
        let l = self.isa.lanes();
        let name = format!("square_{}", self.frags.len());
        self.frags.push(Frag { name, dtype: DType::F32, dist: Distribution::vectors(&[l, l], Some(1), l) })
    }
}

/// What a transposing copy reads.
#[derive(Clone)]
pub(super) enum TransposeSource<'a> {
    /// An array at these positions.
    Array { buffer: BufferId, at: &'a [ExprId] },
    /// A tile in scratch.
    Scratch(Scratch),
}

/// Separates statements that may stand before the lane loop from those in it; never reaches the module.
const HOIST_MARK: Stmt = Stmt::TaskSync;

fn split_hoisted(stmts: Vec<Stmt>) -> (Vec<Stmt>, Vec<Stmt>) {
    match stmts.iter().position(|s| *s == HOIST_MARK) {
        Some(i) => {
            let mut outer = stmts;
            let inner = outer.split_off(i + 1);
            outer.pop();
            (outer, inner)
        }
        None => (Vec::new(), stmts),
    }
}

fn reduce(out: FragId, op: ReduceOp, src: FragId, carry: bool) -> Stmt {
    Stmt::Reduce { out: vec![out], op, src, over: vec![0], base: None, bounds: Vec::new(), carry }
}

/// `x`, or 0 where it is infinite.
fn finite(x: E) -> E {
    let abs = E::Unary(einfall_ir::ops::UnaryOp::Abs, Box::new(x.clone()));
    let c = E::Binary(BinaryOp::Lt, Box::new(abs), Box::new(E::Float(f64::INFINITY)));
    // NaN is kept: it is not below infinity, and 0 would hide it.
    let nan = E::Binary(BinaryOp::Ne, Box::new(x.clone()), Box::new(x.clone()));
    let keep = E::Binary(BinaryOp::Or, Box::new(c), Box::new(nan));
    E::Select(Box::new(keep), Box::new(x), Box::new(E::Float(0.0)))
}

/// The operator that joins two values.
pub(super) fn monoid(op: ReduceOp) -> BinaryOp {
    match op {
        ReduceOp::Sum => BinaryOp::Add,
        ReduceOp::Product => BinaryOp::Mul,
        ReduceOp::Min | ReduceOp::ArgMin => BinaryOp::Min,
        ReduceOp::Max | ReduceOp::ArgMax | ReduceOp::LogSumExp => BinaryOp::Max,
        ReduceOp::Any => BinaryOp::Or,
        ReduceOp::All => BinaryOp::And,
    }
}
