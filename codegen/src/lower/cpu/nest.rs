//! Elementwise operations, reductions, loads and stores: one loop nest for a run of operations over the same axes.
//!
//! Loops over the other axes surround a loop along the lane axis, in steps of several vectors, then of one, then a
//! masked vector for the tail. Values made by one operation and used by the next stay in registers; a tile nobody else reads
//! never reaches memory.

use std::collections::BTreeMap;

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Bound, Expr as E, FragId, Stmt, VarId, View};
use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{self, AxisId, BufferId, ExprId, Node, Op, Place as At, TileId};

use super::access::{Point, Sink};
use super::build::*;
use super::place::{Place, Scratch};
use super::{Lower, Out, tiles_of};

mod accumulate;
mod transpose;

pub(super) use transpose::TransposeSource;

/// What stands in a loop nest, given the local coordinates.
type LoopBody<'b, 'l> = dyn FnMut(&mut Lower<'l>, &mut BTreeMap<AxisId, E>) -> Out<Vec<Stmt>> + 'b;

/// What stands in a lane loop, given the points and whether they may end early.
type LaneBody<'b, 'l> = dyn FnMut(&mut Lower<'l>, &Point) -> Out<Vec<Stmt>> + 'b;

/// Larger than any position.
const FAR: i64 = i64::MAX;

/// Accumulators of one reduction, per vector shape.
struct Acc {
    /// Value, and for LogSumExp the sum or for selections the position.
    frags: Vec<FragId>,
    width: u64,
}

/// The nest being emitted.
pub(super) struct Nest<'o> {
    ops: Vec<&'o Op>,
    /// Position of the first operation.
    first: usize,
    pub(super) lane: Option<AxisId>,
    pub(super) reduced: Vec<AxisId>,
    pub(super) outer: Vec<AxisId>,
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
            if matches!(op, Op::Contract { .. } | Op::Scan { .. })
                || matches!(op, Op::Load { out, .. } if self.paired(*out))
            {
                break;
            }
            if let Op::Load { out, .. } | Op::Map { out, .. } = op
                && self.made_where_read(*out)
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
                    | tile::Expr::Cast(..)
                    | tile::Expr::Rand(_) => {}
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
        let nest = self.shape(ops);
        self.front = Some(Vec::new());
        let loops = self.emit(&nest);
        let front = self.front.take().unwrap_or_default();
        let mut out: Vec<Stmt> = front.into_iter().map(|(value, var)| Stmt::Let { var, value }).collect();
        out.extend(loops?);
        Ok(out)
    }

    /// How the loops around `ops` stand.
    pub(super) fn shape<'o>(&self, ops: &[&'o Op]) -> Nest<'o> {
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
            // Sums across the lanes read a row's part at each of their steps: long parts, in as many accumulators as leave
            // as many registers again.
            let sums = ops.iter().filter(|op| matches!(op, Op::Reduce { .. })).count() as u64;
            let long = if sums == 1 && !reduced.contains(&a) { self.isa.vector_registers / 2 } else { 4 };
            let vectors = if most >= long {
                long
            } else if most >= 4 {
                4
            } else {
                most.next_power_of_two().min(2)
            };
            width = self.panel_limit(ops, a, vectors * l);
        }
        let outer = axes.iter().copied().filter(|a| Some(*a) != lane && !reduced.contains(a)).collect();
        Nest { ops: ops.to_vec(), first: self.position, lane, reduced, outer, width }
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
                        | tile::Expr::Cast(..)
                        | tile::Expr::Rand(_) => {}
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
            Place::Computed(_) => 0,
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
        let (lo, hi) = self.walked(a);
        Ok(vec![Stmt::For { var: v, lo, hi, step: 1, unroll: false, body: inner }])
    }

    fn emit(&mut self, nest: &Nest) -> Out<Vec<Stmt>> {
        let mut local = BTreeMap::new();
        let lane_reduced = nest.lane.is_some_and(|l| nest.reduced.contains(&l));
        let outer = nest.outer.clone();
        let inner_reduced: Vec<AxisId> = nest.reduced.iter().copied().filter(|a| Some(*a) != nest.lane).collect();
        self.loops(&outer, &mut local, &mut |s, local| {
            if lane_reduced {
                // Accumulators for whole steps and for single vectors, joined across the lanes once.
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
                    s.along(nest, local, &mut |s, p| {
                        let which = shapes.iter().position(|w| *w == p.width).unwrap_or(0);
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
                s.along(nest, local, &mut |s, p| {
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
            None => body(self, &Point { local: local.clone(), lane: None, width: 0, limit: None }),
        }
    }

    /// A loop along an axis: whole steps of `width` elements, of four vectors, of one, then a masked vector. Masks are left out wherever
    /// they would be full: an AMD EPYC of the Zen 5 generation reads by full masks what is not in its first cache at 0.4
    /// of the rate of plain loads.
    pub(super) fn along_axis(
        &mut self,
        lane: AxisId,
        width: u64,
        local: &mut BTreeMap<AxisId, E>,
        body: &mut LaneBody<'_, 'l>,
    ) -> Out<Vec<Stmt>> {
        let l = self.isa.lanes();
        let mut size = self.ranges[lane.index()].size.clone();
        if let Some((a, _, rows)) = self.stripped
            && a == lane
            && rows < l
        {
            // Lanes beyond a strip of fewer rows than lanes are the next strip's.
            size = self.walked(lane).1;
        }
        let whole = |width: u64| sub(size.clone(), size.clone().bin(BinaryOp::Mod, int(width as i64)));
        let name = self.k.axes[lane].name.clone();
        let mut out = Vec::new();
        let mut step = |s: &mut Self, lo: E, hi: E, width: u64, tail: bool| -> Out<()> {
            let v: VarId = s.var(&name);
            local.insert(lane, E::Var(v));
            let limit = tail.then(|| sub(size.clone(), E::Var(v)));
            let p = Point { local: local.clone(), lane: Some(lane), width, limit };
            let b = body(s, &p)?;
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
        if let Some((a, _, rows)) = self.stripped
            && a == lane
        {
            let (lo, hi) = self.walked(lane);
            step(self, lo, hi, l, rows < l || self.lane_tail(lane, l))?;
            return Ok(out);
        }
        let mut done = int(0);
        for w in [width, 4 * l, l] {
            if w <= width && whole(w) != done {
                step(self, done, whole(w), w, false)?;
                done = whole(w);
            }
        }
        if self.lane_tail(lane, l) {
            step(self, whole(l), size.clone(), l, true)?;
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
                Op::Store { buffer, at, axes, value, join, when } => {
                    let alone = |a: &AxisId| at.iter().any(|e| self.k.exprs[*e] == tile::Expr::Coord(*a));
                    let mut grid = self.k.axes.iter().filter(|(_, a)| a.kind == tile::AxisKind::Grid);
                    // Points of this store, and of other tasks', that reach the same elements are the same points.
                    let owned = axes.iter().all(alone) && grid.all(|(a, _)| alone(&a));
                    self.store_op(*buffer, at, *value, (*join, owned), *when, p, &mut sink)?;
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
    pub(super) fn representable(&self, v: &E, dtype: DType) -> bool {
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
        (mut join, owned): (Option<ReduceOp>, bool),
        when: Option<ExprId>,
        p: &Point,
        sink: &mut Sink,
    ) -> Out<()> {
        let buf = self.globals[&buffer];
        let info = &self.plan.buffers[buffer];
        let (dims, dtype) = (info.dims.clone(), info.dtype);
        let mut v = self.expr(value, p, sink)?;
        if owned && let Some(op) = join.take() {
            let old = self.read_value(buffer, at, p, sink)?;
            v = self.joined(op, old, v)?;
        }
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
        let inside: Vec<bool> = at.iter().zip(&dims).map(|(a, d)| self.inside(*a, d)).collect();
        let affine = coefs.iter().all(Option::is_some) && moving.len() == usize::from(p.lane.is_some());
        let when = when.filter(|w| !self.is_known(*w));
        let alike = when.is_none_or(|w| self.lane_coef(w, p.lane) == Some(0)) && moving.iter().all(|d| inside[*d]);
        if affine
            && alike
            && let Some((at, cond)) = self.within(buf, at, &inside, when, p, sink)?
        {
            let walk = match moving.first() {
                Some(&d) => vec![coefs[d].map(|c| (d, c))],
                None => Vec::new(),
            };
            let store = Stmt::Store { dst: View { buf, stage: None, at, walk }, src: frag, bounds, join };
            sink.inner.push(match cond {
                Some(cond) => Stmt::If { cond, then: vec![store], otherwise: Vec::new() },
                None => store,
            });
            return Ok(());
        }
        let mut at: Vec<E> = at.iter().map(|a| self.expr(*a, p, sink)).collect::<Out<_>>()?;
        if let Some(w) = when {
            // A point outside the array is dropped.
            let c = self.expr(w, p, sink)?;
            let Some(first) = at.first_mut() else { return Err(self.unsupported("a conditional store of a scalar")) };
            *first = E::Select(Box::new(c), Box::new(first.clone()), Box::new(int(-1)));
        }
        sink.inner.push(Stmt::Scatter { buf, at, src: frag, bounds, join });
        Ok(())
    }

    /// Two values joined, elementwise.
    fn joined(&self, op: ReduceOp, a: E, b: E) -> Out<E> {
        match op {
            ReduceOp::LogSumExp | ReduceOp::ArgMin | ReduceOp::ArgMax => {
                Err(self.unsupported(format!("a write joined by {}", op.name())))
            }
            ReduceOp::Sum | ReduceOp::Product | ReduceOp::Min | ReduceOp::Max | ReduceOp::Any | ReduceOp::All => {
                Ok(E::Binary(monoid(op), Box::new(a), Box::new(b)))
            }
        }
    }

    // Reductions.

    /// An expression bound to a fragment, so that it is computed once.
    fn bind(&mut self, v: E, width: u64, sink: &mut Sink) -> E {
        let f = self.frag("value", DType::F32, width);
        sink.inner.push(Stmt::Map { out: f, value: v });
        E::Frag { frag: f, dims: if width > 0 { vec![0] } else { vec![] } }
    }
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
