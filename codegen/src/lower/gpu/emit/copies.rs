//! Loads and stores: windows of device arrays into registers, boxes into shared memory and out again.
//!
//! Invariant: a box is at most one swizzle span wide and lies where the layout has it; what reaches past an array is
//! zero-filled on the way in and clipped on the way out.

use einfall_ir::kernel::{Bound, Engine, Expr, FenceKind, GroupKind, Stmt, View};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{AxisId, BufferId, ExprId, TileId};

use super::super::assign_layouts::renamed;
use super::super::exprs::{Place, add, mul, sub};
use super::super::insert_channels::is_private;
use super::super::schedule::{Flow, Iteration};
use super::super::{Step, refuse};
use super::Emit;

impl Emit<'_, '_> {
    /// The window that array positions `position` walk over fragment dimensions `dims`; none if they are not linear
    /// with unit steps in one axis each.
    pub(super) fn window(&self, buffer: BufferId, position: &[ExprId], dims: &[AxisId], place: &Place) -> Option<View> {
        self.window_from(buffer, position, dims, place, |a| self.f.origin(a, place))
    }

    /// As [`Emit::window`], with `origin_of` as the first coordinate along each axis.
    pub(super) fn window_from(
        &self,
        buffer: BufferId,
        position: &[ExprId],
        dims: &[AxisId],
        place: &Place,
        origin_of: impl Fn(AxisId) -> Expr,
    ) -> Option<View> {
        let f = self.f;
        let buf = |b: BufferId| self.global(b);
        let mut walk = vec![None; dims.len()];
        let mut origin = Vec::new();
        for (d, p) in position.iter().enumerate() {
            let l = f.linear(*p, place, &buf)?;
            let mut first = l.base;
            for (a, c) in &l.axes {
                let slot = walk.get_mut(dims.iter().position(|x| x == a)?)?;
                if l.axes.len() > 1 || *c != 1 || slot.is_some() {
                    return None;
                }
                *slot = Some((d, *c));
                first = add(first, mul(origin_of(*a), Expr::Int(*c)));
            }
            origin.push(first);
        }
        Some(View { buf: self.global(buffer), stage: None, at: origin, walk })
    }

    /// Limits of the dimensions that may reach past their extents.
    pub(super) fn bounds(&self, dims: &[AxisId], place: &Place) -> Vec<Bound> {
        let f = self.f;
        let partial = dims.iter().enumerate().filter(|(_, a)| !f.axis(**a).exact);
        partial.map(|(dim, a)| Bound { dim, limit: sub(f.extent(*a), f.origin(*a, place)) }).collect()
    }

    /// Boxes of a shared tile: per box the first coordinate per dimension (and what a unit adds), and its extents.
    pub(super) fn boxes(&self, t: TileId, extents: &[u64]) -> Vec<(Vec<u64>, Vec<u64>)> {
        let facts = self.f.tile(self.f.home(t));
        let layout = facts.layout.as_ref().expect("shared tiles have a layout");
        // The panel of the contiguous dimension, by the swizzle span.
        let inner = layout.dims.iter().position(|d| d.first().is_some_and(|g| g.stride == 1));
        let panel = match (layout.swizzle, inner) {
            (Some(_), Some(d)) => layout.dims[d][0].extent.min(extents[d]),
            (None, Some(d)) => layout.dims[d][0].extent.min(extents[d]).min(256),
            (_, None) => 1,
        };
        let Some(inner) = inner else { return vec![(vec![0; extents.len()], extents.to_vec())] };
        (0..extents[inner].div_ceil(panel))
            .map(|p| {
                let mut first = vec![0; extents.len()];
                let mut size = extents.to_vec();
                first[inner] = p * panel;
                size[inner] = panel;
                (first, size)
            })
            .collect()
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn load_shared(
        &mut self,
        i: usize,
        t: TileId,
        buffer: BufferId,
        position: &[ExprId],
        place: &Place,
        at: &Iteration,
        out: &mut Vec<Stmt>,
    ) -> Step<()> {
        let f = self.f;
        let c = f.channel(t).expect("loaded shared tiles are in a channel");
        let ch = &f.channels[c];
        let full_barrier = self.full[c].expect("channels filled by TMA have barriers");
        let dims = f.tile(t).dims.clone();
        let full: Vec<u64> = dims.iter().map(|a| f.axis(*a).block).collect();
        let Some(src) = self.window(buffer, position, &dims, place) else {
            let message = format!("{} is not a box of the array", f.ops[i].name);
            return refuse("copy engine", message, "load gathers into registers");
        };
        let stage = self.stage(c, at);
        let signal_stage = stage.clone().unwrap_or(Expr::Int(0));
        if ch.first_writer == i {
            self.wait_empty(c, at, out);
            let bytes = ch
                .tiles
                .iter()
                .map(|t| f.kernel.tiles[*t].dtype.bytes(f.tile(*t).dims.iter().map(|a| f.axis(*a).block).product()))
                .sum();
            out.push(Stmt::Arrive {
                barrier: full_barrier,
                stage: signal_stage.clone(),
                expect_bytes: Some(bytes),
                remote: None,
            });
        }
        let along = f.tile(t).mapping.multicast.as_ref();
        let along = along.and_then(|name| f.kernel.axes.ids().find(|a| f.axis_name(*a) == name));
        let shares = along.map_or(1, |a| f.axis(a).cluster);
        // Each task of the cluster copies one slice of the outer dimension to all.
        let layout = f.tile(t).layout.as_ref().expect("shared tiles have a layout");
        let outer = layout.dims.iter().position(|d| d.first().is_some_and(|g| g.stride != 1)).unwrap_or(0);
        if shares > 1 && !full[outer].is_multiple_of(8 * shares) {
            let message = format!("{} rows of {} over {shares} tasks", full[outer], f.tile(t).name);
            return refuse("multicast", message, "8 rows per task are the least");
        }
        for (first, mut extents) in self.boxes(t, &full) {
            let mut offset: Vec<Expr> = first.iter().map(|x| Expr::Int(*x as i64)).collect();
            if shares > 1 {
                extents[outer] /= shares;
                let place = along.map_or(Expr::Int(0), |a| f.cluster_position(a));
                offset[outer] = mul(place, Expr::Int(extents[outer] as i64));
            }
            let mut from = src.clone();
            for (d, w) in from.walk.iter().enumerate() {
                if let Some((dim, _)) = w {
                    from.at[*dim] = add(from.at[*dim].clone(), offset[d].clone());
                }
            }
            let walk = (0..dims.len()).map(|d| Some((d, 1))).collect();
            let dst = View { buf: self.shared(t), stage: stage.clone(), at: offset, walk };
            let copy = |multicast| Stmt::Copy {
                engine: Engine::Tma,
                src: from.clone(),
                dst: dst.clone(),
                extents: extents.clone(),
                signal: Some((full_barrier, signal_stage.clone())),
                multicast,
            };
            let Some(axis) = along.filter(|_| shares > 1) else {
                out.push(copy(None));
                continue;
            };
            // Masks are constants: one branch for each line of tasks along the axis.
            let (own, lines) = f.line(axis);
            for first in &lines {
                let mask = f.line_ranks(axis, *first).map(|r| 1 << r).sum();
                if lines.len() == 1 {
                    out.push(copy(Some(mask)));
                } else {
                    let cond = own.clone().bin(BinaryOp::Eq, Expr::Int(*first as i64));
                    out.push(Stmt::If { cond, then: vec![copy(Some(mask))], otherwise: Vec::new() });
                }
            }
        }
        Ok(())
    }

    /// A tile written to shared memory by plain stores: staging of an engine's store, or a channel between units.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn map_shared(
        &mut self,
        i: usize,
        t: TileId,
        value: ExprId,
        place: &Place,
        at: &Iteration,
        flow: &mut Flow,
        out: &mut Vec<Stmt>,
    ) -> Step<()> {
        let f = self.f;
        let private = is_private(f, t);
        let frame = self.frame(i)?;
        let v = self.masked(i, t, value, &frame, place, at, out)?;
        let dtype = f.kernel.tiles[t].dtype;
        let src = self.temp(&format!("{}_part", f.ops[i].name), dtype, &frame.dist);
        out.push(Stmt::Map { out: src, value: v });
        if private {
            self.settle_all(flow, at.trip, out);
            if flow.bulk {
                // One thread sends for the unit: the others learn from it that the tile is free.
                out.push(Stmt::WaitGroup { kind: GroupKind::Bulk, pending: 0 });
                self.unit_sync(place.role, out);
                flow.bulk = false;
            }
        } else if let Some(c) = f.channel(t) {
            // The unit must not wait for a stage that it still has to release itself.
            self.settle_where(flow, at, out, |g| g.releases.iter().any(|r| r.0 == c));
            self.wait_empty(c, at, out);
            if f.channels[c].is_single() && flow.copies.read.iter().any(|(x, _)| *x == c) {
                self.role_sync(place.role, out);
                flow.copies.read.clear();
            }
        }
        let renames = renamed(f, i);
        let own = |a: &AxisId| renames.iter().find(|(to, _)| to == a).map_or(*a, |(_, own)| *own);
        let mut walk = vec![None; frame.dims.len()];
        let mut origin = Vec::new();
        for (d, a) in f.tile(t).dims.iter().enumerate() {
            if f.axis(own(a)).block != f.axis(*a).block {
                let (x, y) = (f.axis_name(*a), f.axis_name(own(a)));
                let message = format!("{} has other blocks along {x} than {y}", f.ops[i].name);
                return refuse("channels", message, "give both axes the same block");
            }
            origin.push(f.unit_offset(own(a), place.role));
            match frame.dims.iter().position(|x| *x == own(a)) {
                Some(p) => walk[p] = Some((d, 1)),
                None => return refuse("channels", format!("{} lacks an axis", f.ops[i].name), "broadcast it first"),
            }
        }
        let stage = f.channel(f.home(t)).and_then(|c| self.stage(c, at));
        let dst = View { buf: self.shared(t), stage: stage.clone(), at: origin, walk };
        out.push(Stmt::Store { dst, src, bounds: Vec::new(), join: None });
        if f.channel(t).is_some_and(|c| f.channels[c].meets) {
            return Ok(());
        }
        out.push(Stmt::Fence(FenceKind::ProxyAsync));
        self.unit_sync(place.role, out);
        if let Some(barrier) = f.channel(t).and_then(|c| self.full[c]) {
            let stage = stage.unwrap_or(Expr::Int(0));
            out.push(Stmt::Arrive { barrier, stage, expect_bytes: None, remote: None });
        }
        Ok(())
    }

    /// A unit sends its part of a staging tile. Whether the store is left under way: a tile whose place another role
    /// fills again is given back at once.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn store_engine(
        &mut self,
        i: usize,
        t: TileId,
        buffer: BufferId,
        position: &[ExprId],
        place: &Place,
        at: &Iteration,
        out: &mut Vec<Stmt>,
    ) -> Step<bool> {
        let f = self.f;
        let dims = f.tile(t).dims.clone();
        let Some(dst) = self.window(buffer, position, &dims, place) else {
            let message = format!("{} is not a box of the array", f.ops[i].name);
            return refuse("store engine", message, "store from registers");
        };
        let stage = f.channel(f.home(t)).and_then(|c| self.stage(c, at));
        // The engine clips at the array's end alone: an axis that ends before it would overwrite what follows.
        let clipped = |a: &AxisId| {
            let mut at = position.iter().zip(&f.plan.buffers[buffer].dims);
            f.axis(*a).exact
                || at.any(|(p, n)| {
                    f.kernel.exprs[*p] == einfall_ir::tile::Expr::Coord(*a) && *n == f.kernel.axes[*a].extent
                })
        };
        if let Some(a) = dims.iter().find(|a| !clipped(a)) {
            let message = format!("{} ends within the array along {}", f.ops[i].name, f.axis_name(*a));
            return refuse("store engine", message, "store from registers");
        }
        let part: Vec<u64> = dims.iter().map(|a| f.held(*a, place.role)).collect();
        for (first, extents) in self.boxes(t, &part) {
            let mut to = dst.clone();
            for (d, w) in to.walk.iter().enumerate() {
                if let Some((dim, _)) = w {
                    to.at[*dim] = add(to.at[*dim].clone(), Expr::Int(first[d] as i64));
                }
            }
            let origin = dims.iter().zip(&first);
            let from = origin.map(|(a, x)| add(f.unit_offset(*a, place.role), Expr::Int(*x as i64))).collect();
            let walk = (0..dims.len()).map(|d| Some((d, 1))).collect();
            let src = View { buf: self.shared(t), stage: stage.clone(), at: from, walk };
            out.push(Stmt::Copy { engine: Engine::Tma, src, dst: to, extents, signal: None, multicast: None });
        }
        out.push(Stmt::Commit(GroupKind::Bulk));
        let lent = f.channel(f.home(t)).filter(|c| self.taken_over(*c).is_some() && f.channels[*c].turns);
        if let Some(c) = lent {
            out.push(Stmt::WaitGroup { kind: GroupKind::Bulk, pending: 0 });
            self.release(c, at, out);
        }
        Ok(lent.is_none())
    }
}
