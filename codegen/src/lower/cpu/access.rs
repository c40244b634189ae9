//! Elementwise tile expressions at a point of a nest: which memory they touch, and how.
//!
//! An access is a *load* where its position is provably inside the array and affine in the lane; where what is not
//! provable is the same for all lanes (a row by an index), a load that one test guards; and a checked *gather* otherwise
//! (the printer turns a gather with unit lane stride into a masked vector load). What does not depend on the lane is
//! loaded once, as a scalar.

use std::collections::{BTreeMap, BTreeSet};

use einfall_ir::arena::Id;
use einfall_ir::cascade::Size;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Bound, BufId, BufSpace, Expr as E, FragId, Stmt, VarId, View};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, AxisId, BufferId, BufferKind, ExprId, Place as At, TileId};

use super::build::*;
use super::place::Place;
use super::{Lower, Out};

/// A point of a nest, or a vector of points along `lane`.
#[derive(Clone, Debug)]
pub(super) struct Point {
    /// Coordinates within the block; of the lane axis, the first.
    pub(super) local: BTreeMap<AxisId, E>,
    /// The axis lanes run along.
    pub(super) lane: Option<AxisId>,
    /// Points along the lane axis.
    pub(super) width: u64,
    /// Points from this one on are absent.
    pub(super) limit: Option<E>,
}

/// Statements that bring operands in, and what is at hand.
#[derive(Default)]
pub(super) struct Sink {
    /// What does not depend on the lane, where `hoist` allows it to stand before the lane loop.
    pub(super) outer: Vec<Stmt>,
    pub(super) inner: Vec<Stmt>,
    pub(super) hoist: bool,
    /// Elements of tiles made in this nest.
    pub(super) live: BTreeMap<TileId, FragId>,
    pub(super) loaded: Vec<(String, FragId)>,
    pub(super) named: Vec<(String, E)>,
}

impl Sink {
    fn push(&mut self, s: Stmt, varies: bool) {
        if varies || !self.hoist { self.inner.push(s) } else { self.outer.push(s) }
    }
}

impl Lower<'_> {
    fn local(&self, p: &Point, a: AxisId) -> Out<E> {
        match p.local.get(&a) {
            Some(e) => Ok(e.clone()),
            None if self.ranges[a.index()].unit => Ok(int(0)),
            None => Err(self.unsupported(format!("an element along axis {} outside its loops", self.k.axes[a].name))),
        }
    }

    /// The coordinate (of lane 0) on an axis, over the whole problem.
    fn coord(&self, p: &Point, a: AxisId) -> Out<E> {
        Ok(add(self.ranges[a.index()].origin.clone(), self.local(p, a)?))
    }

    /// Elementwise value of `e` at `p`; operands are loaded by statements pushed to `sink`.
    pub(super) fn expr(&mut self, e: ExprId, p: &Point, sink: &mut Sink) -> Out<E> {
        if let Some(v) = self.run.value(e) {
            return Ok(v);
        }
        let b = |x: E| Box::new(x);
        let node = self.k.exprs[e].clone();
        Ok(match node {
            tile::Expr::Int(i) => E::Int(i),
            tile::Expr::Float(f) => E::Float(f),
            tile::Expr::Size(s) => size(&s),
            tile::Expr::Coord(a) => {
                let c = self.coord(p, a)?;
                if p.lane == Some(a) { add(c, E::Coord(0)) } else { c }
            }
            tile::Expr::Tile(t) => {
                let names = self.own_places(t);
                self.tile_value(t, &names, p, sink)?
            }
            tile::Expr::TileAt { tile, at } => self.tile_value(tile, &at, p, sink)?,
            tile::Expr::Read { buffer, at } => self.read_value(buffer, &at, p, sink)?,
            tile::Expr::Unary(op, a) => E::Unary(op, b(self.expr(a, p, sink)?)),
            tile::Expr::Binary(op, x, y) => {
                if self.is_known(e) {
                    return Ok(E::Int(1));
                }
                let (x, y) = (self.expr(x, p, sink)?, self.expr(y, p, sink)?);
                if matches!((&x, &y), (E::Int(_), E::Int(_))) { x.bin(op, y) } else { E::Binary(op, b(x), b(y)) }
            }
            tile::Expr::Select(c, x, y) => {
                if self.is_known(c) {
                    return self.expr(x, p, sink);
                }
                let c = self.expr(c, p, sink)?;
                E::Select(b(c), b(self.expr(x, p, sink)?), b(self.expr(y, p, sink)?))
            }
            tile::Expr::Cast(d, a) => E::Cast(d, b(self.expr(a, p, sink)?)),
            tile::Expr::Rand(of) => {
                let mut values = [const { E::Int(0) }; 5];
                for (v, e) in values.iter_mut().zip(of) {
                    *v = self.expr(e, p, sink)?;
                }
                E::Rand(Box::new(values))
            }
        })
    }

    /// A uniform integer: nothing in it depends on the lane.
    pub(super) fn uniform(&mut self, e: ExprId, p: &Point) -> Out<E> {
        let mut sink = Sink::default();
        let scalar = Point { lane: None, width: 0, limit: None, ..p.clone() };
        let v = self.expr(e, &scalar, &mut sink)?;
        if sink.inner.iter().chain(&sink.outer).any(|s| !matches!(s, Stmt::Let { .. })) {
            return Err(self.unsupported("a float in a position"));
        }
        Ok(v)
    }

    /// A tile's own axes as places.
    pub(super) fn own_places(&self, t: TileId) -> Vec<At> {
        self.k.tiles[t].axes.iter().map(|a| At::Axis(*a)).collect()
    }

    /// The coordinate within the block of axis `a` that place `n` names.
    fn place_local(&self, p: &Point, a: AxisId, n: At) -> Out<E> {
        match n {
            At::At(i) => Ok(sub(int(i as i64), self.ranges[a.index()].origin.clone())),
            At::Axis(n) if n == a => self.local(p, n),
            At::Axis(n) => Ok(sub(self.coord(p, n)?, self.ranges[a.index()].origin.clone())),
        }
    }

    /// A tile's element at the places `names` of its axes.
    pub(super) fn tile_value(&mut self, t: TileId, names: &[At], p: &Point, sink: &mut Sink) -> Out<E> {
        let own = self.k.tiles[t].axes.clone();
        let plain = self.own_places(t) == names;
        let varies = p.lane.is_some_and(|l| names.contains(&At::Axis(l)));
        if plain && let Some(&frag) = sink.live.get(&t) {
            return Ok(E::Frag { frag, dims: if varies { vec![0] } else { vec![] } });
        }
        match self.places[t.index()].clone() {
            Place::Direct { buffer, at } => {
                if plain {
                    return self.read_value(buffer, &at, p, sink);
                }
                // The point under the tile's own axis names.
                let mut q = p.clone();
                q.lane = None;
                for (a, n) in own.iter().zip(names) {
                    q.local.insert(*a, self.place_local(p, *a, *n)?);
                    if p.lane.is_some_and(|l| *n == At::Axis(l)) {
                        q.lane = Some(*a);
                    }
                }
                self.read_value(buffer, &at, &q, sink)
            }
            Place::Computed(value) => {
                if !plain {
                    return Err(self.unsupported("a computed operand under other names of its axes"));
                }
                let v = self.expr(value, p, sink)?;
                let dtype = self.k.tiles[t].dtype;
                let exact = matches!(dtype, DType::F32 | DType::F64 | DType::I64 | DType::Bool);
                Ok(if exact || self.representable(&v, dtype) { v } else { E::Cast(dtype, Box::new(v)) })
            }
            Place::Scratch(s) => {
                let mut local = BTreeMap::new();
                let mut lane_axis = None;
                for (a, n) in own.iter().zip(names) {
                    local.insert(*a, self.place_local(p, *a, *n)?);
                    if p.lane.is_some_and(|l| *n == At::Axis(l)) && s.layout.order.contains(a) {
                        lane_axis = Some(*a);
                    }
                }
                let at = self.scratch_at(&s, |a| local.get(&a).cloned().unwrap_or(int(0)));
                let dtype = self.bufs[s.buf].dtype;
                if dtype == DType::I64 && lane_axis.is_none() {
                    return Ok(self.fetch(E::Fetch { buf: s.buf, at }, sink));
                }
                let walk = match lane_axis {
                    Some(a) => vec![Self::scratch_dim(&s, a).map(|d| (d, 1))],
                    None => vec![],
                };
                let contiguous = lane_axis == s.layout.order.last().copied();
                let view = View { buf: s.buf, stage: None, at, walk };
                let bounds = match (&p.limit, lane_axis, contiguous) {
                    (Some(l), Some(_), false) => vec![Bound { dim: 0, limit: l.clone() }],
                    _ => vec![],
                };
                Ok(self.load_view(view, bounds, lane_axis.is_some(), Self::register_type(dtype), p, sink))
            }
        }
    }

    /// A fetched integer bound to a variable, once.
    fn fetch(&mut self, e: E, sink: &mut Sink) -> E {
        if !sink.hoist { self.fetch_in_front(e) } else { self.named("fetched", e, sink) }
    }

    /// An integer that is the same for all lanes, bound to a variable, once.
    fn named(&mut self, name: &str, e: E, sink: &mut Sink) -> E {
        let key = format!("{e:?}");
        if let Some((_, v)) = sink.named.iter().find(|(k, _)| *k == key) {
            return v.clone();
        }
        let v = self.var(name);
        sink.push(Stmt::Let { var: v, value: e }, false);
        sink.named.push((key, E::Var(v)));
        E::Var(v)
    }

    /// A fetched integer bound before all loops of the nest, where it is the same in all of them and nothing writes it.
    fn fetch_in_front(&mut self, e: E) -> E {
        let (E::Fetch { buf, at }, Some(front)) = (&e, &self.front) else { return e };
        if let Some((_, v)) = front.iter().find(|(known, _)| *known == e) {
            return E::Var(*v);
        }
        let mut outside: BTreeSet<VarId> = front.iter().map(|(_, v)| *v).collect();
        let ranges = self.ranges.iter().flat_map(|r| [&r.origin, &r.size]);
        ranges.for_each(|e| {
            variables(e, &mut |v| {
                outside.insert(v);
            });
        });
        let unwritten = |b: BufId| matches!(self.bufs[b].space, BufSpace::Global { written: false, .. });
        let mut fixed = unwritten(*buf);
        at.iter().for_each(|x| {
            variables(x, &mut |v| fixed &= outside.contains(&v));
            fetched(x, &mut |b| fixed &= unwritten(b));
        });
        if !fixed {
            return e;
        }
        let v = self.var("fetched");
        self.front.get_or_insert_default().push((e, v));
        E::Var(v)
    }

    fn load_view(
        &mut self,
        view: View,
        bounds: Vec<Bound>,
        varies: bool,
        dtype: DType,
        p: &Point,
        sink: &mut Sink,
    ) -> E {
        let dims = if varies { vec![0] } else { vec![] };
        let key = format!("{view:?}{bounds:?}");
        if let Some((_, frag)) = sink.loaded.iter().find(|(k, _)| *k == key) {
            return E::Frag { frag: *frag, dims };
        }
        let name = self.bufs[view.buf].name.clone();
        let frag = self.frag(&name, dtype, if varies { p.width } else { 0 });
        self.loaded_types.insert(self.frags[frag].name.clone(), self.bufs[view.buf].dtype);
        sink.push(Stmt::Load { out: frag, src: view, bounds }, varies);
        sink.loaded.push((key, frag));
        E::Frag { frag, dims }
    }

    /// An array's element.
    pub(super) fn read_value(&mut self, buffer: BufferId, at: &[ExprId], p: &Point, sink: &mut Sink) -> Out<E> {
        let buf = self.globals[&buffer];
        let info = &self.plan.buffers[buffer];
        let (dims, dtype) = (info.dims.clone(), Self::register_type(info.dtype));
        if dims.is_empty() && info.kind == BufferKind::Input {
            return Ok(E::Scalar(buf));
        }
        let coefs: Vec<Option<i64>> = at.iter().map(|a| self.lane_coef(*a, p.lane)).collect();
        let moving: Vec<usize> = (0..at.len()).filter(|i| coefs[*i] != Some(0)).collect();
        let affine = coefs.iter().all(Option::is_some) && moving.len() <= 1;
        let varies = !moving.is_empty();
        if !varies && dtype == DType::I64 {
            let at = at.iter().map(|a| self.uniform(*a, p)).collect::<Out<_>>()?;
            return Ok(self.fetch(E::Fetch { buf, at }, sink));
        }
        if self.run.absent && at.iter().any(|a| self.run.value(*a).is_some()) {
            return Ok(absent(dtype));
        }
        let inside: Vec<bool> = at.iter().zip(&dims).map(|(a, d)| self.inside(*a, d)).collect();
        let bounds: Vec<Bound> = match (&p.limit, varies) {
            (Some(l), true) => vec![Bound { dim: 0, limit: l.clone() }],
            _ => vec![],
        };
        if affine
            && varies
            && moving.iter().all(|i| inside[*i])
            && inside.contains(&false)
            && let Some(v) = self.guarded_load(buf, at, (&coefs, &inside), bounds.clone(), p, sink)?
        {
            return Ok(v);
        }
        if affine && !inside.contains(&false) {
            let origin = at.iter().map(|a| self.uniform(*a, p)).collect::<Out<_>>()?;
            let walk = match moving.first() {
                Some(&d) => vec![coefs[d].map(|c| (d, c))],
                None => vec![],
            };
            let view = View { buf, stage: None, at: origin, walk };
            return Ok(self.load_view(view, bounds, varies, dtype, p, sink));
        }
        let at: Vec<E> = at.iter().map(|a| self.expr(*a, p, sink)).collect::<Out<_>>()?;
        let key = format!("gather{buf:?}{at:?}{bounds:?}");
        let dims = if varies { vec![0] } else { vec![] };
        if let Some((_, frag)) = sink.loaded.iter().find(|(k, _)| *k == key) {
            return Ok(E::Frag { frag: *frag, dims });
        }
        let name = self.bufs[buf].name.clone();
        let frag = self.frag(&name, dtype, if varies { p.width } else { 0 });
        sink.push(Stmt::Gather { out: frag, buf, at, bounds }, varies);
        sink.loaded.push((key, frag));
        Ok(E::Frag { frag, dims })
    }

    /// Elements of a row, or of what else positions that are the same for all lanes name: loaded where those are inside
    /// the array, zeros where not. None where a position is made in this nest.
    fn guarded_load(
        &mut self,
        buf: BufId,
        at: &[ExprId],
        (coefs, inside): (&[Option<i64>], &[bool]),
        bounds: Vec<Bound>,
        p: &Point,
        sink: &mut Sink,
    ) -> Out<Option<E>> {
        let Some((origin, cond)) = self.within(buf, at, inside, None, p, sink)? else { return Ok(None) };
        let walk: Vec<_> = (0..at.len()).filter(|d| coefs[*d] != Some(0)).map(|d| coefs[d].map(|c| (d, c))).collect();
        let key = format!("guarded {buf:?}{origin:?}{walk:?}{bounds:?}");
        if let Some((_, frag)) = sink.loaded.iter().find(|(k, _)| *k == key) {
            return Ok(Some(E::Frag { frag: *frag, dims: vec![0] }));
        }
        let Some(cond) = cond else { return Ok(None) };
        let (name, held) = (self.bufs[buf].name.clone(), self.bufs[buf].dtype);
        let dtype = Self::register_type(held);
        let frag = self.frag(&name, dtype, p.width);
        self.loaded_types.insert(self.frags[frag].name.clone(), held);
        let load = Stmt::Load { out: frag, src: View { buf, stage: None, at: origin, walk }, bounds };
        let zeros = Stmt::Map { out: frag, value: absent(dtype) };
        sink.push(Stmt::If { cond, then: vec![load], otherwise: vec![zeros] }, true);
        sink.loaded.push((key, frag));
        Ok(Some(E::Frag { frag, dims: vec![0] }))
    }

    /// Positions of the first lane, and the test that those which are not known to be inside the array are, and that
    /// `when` holds, which is the same for all lanes. None where one of them is made in this nest.
    pub(super) fn within(
        &mut self,
        buf: BufId,
        at: &[ExprId],
        inside: &[bool],
        when: Option<ExprId>,
        p: &Point,
        sink: &mut Sink,
    ) -> Out<Option<(Vec<E>, Option<E>)>> {
        let scalar = Point { lane: None, width: 0, limit: None, ..p.clone() };
        let mut origin: Vec<E> = at.iter().map(|a| self.expr(*a, &scalar, sink)).collect::<Out<_>>()?;
        let mut cond = when.map(|w| self.expr(w, &scalar, sink)).transpose()?;
        if origin.iter().chain(&cond).any(made) {
            return Ok(None);
        }
        let dims = self.bufs[buf].dims.clone();
        for d in (0..at.len()).filter(|d| !inside[*d]) {
            if !matches!(origin[d], E::Var(_) | E::Int(_)) {
                origin[d] = self.named("at", origin[d].clone(), sink);
            }
            let at = origin[d].clone();
            let low = int(0).bin(BinaryOp::Le, at.clone());
            let inside = low.bin(BinaryOp::And, at.bin(BinaryOp::Lt, dims[d].clone()));
            cond = Some(match cond {
                Some(other) => other.bin(BinaryOp::And, inside),
                None => inside,
            });
        }
        Ok(Some((origin, cond)))
    }

    /// How an integer expression grows along the lane; none where it is not affine in it.
    pub(super) fn lane_coef(&self, e: ExprId, lane: Option<AxisId>) -> Option<i64> {
        let Some(lane) = lane else { return Some(0) };
        match &self.k.exprs[e] {
            tile::Expr::Int(_) | tile::Expr::Float(_) | tile::Expr::Size(_) => Some(0),
            tile::Expr::Coord(a) => Some(i64::from(*a == lane)),
            tile::Expr::Tile(t) => (!self.k.tiles[*t].axes.contains(&lane)).then_some(0),
            tile::Expr::TileAt { at, .. } => (!at.contains(&At::Axis(lane))).then_some(0),
            tile::Expr::Read { at, .. } => at.iter().all(|a| self.lane_coef(*a, Some(lane)) == Some(0)).then_some(0),
            tile::Expr::Binary(op, a, b) => {
                let (x, y) = (self.lane_coef(*a, Some(lane))?, self.lane_coef(*b, Some(lane))?);
                match op {
                    BinaryOp::Add => Some(x + y),
                    BinaryOp::Sub => Some(x - y),
                    BinaryOp::Mul => match (&self.k.exprs[*a], &self.k.exprs[*b]) {
                        (tile::Expr::Int(i), _) => Some(i * y),
                        (_, tile::Expr::Int(i)) => Some(i * x),
                        _ => (x == 0 && y == 0).then_some(0),
                    },
                    _ => (x == 0 && y == 0).then_some(0),
                }
            }
            tile::Expr::Unary(..) | tile::Expr::Select(..) | tile::Expr::Cast(..) | tile::Expr::Rand(_) => {
                let mut all = true;
                self.k.exprs[e].for_each_operand(|o| all &= self.lane_coef(o, Some(lane)) == Some(0));
                all.then_some(0)
            }
        }
    }

    /// Whether `0 ≤ e < dim` follows from the extents of the axes in it.
    pub(super) fn inside(&self, e: ExprId, dim: &Size) -> bool {
        if self.run.inside && self.run.value(e).is_some() {
            return true;
        }
        let Some(top) = self.upper(e) else { return false };
        match (&top, dim) {
            (Size::Const(a), Size::Const(b)) => a <= b,
            _ => {
                let (t, d) = (normal(&top), normal(dim));
                // Equal up to a larger constant: `T` points of `T + 1`.
                t.0 == d.0 && t.1 <= d.1
            }
        }
    }

    /// An exclusive upper bound of a non-negative integer expression.
    fn upper(&self, e: ExprId) -> Option<Size> {
        match &self.k.exprs[e] {
            tile::Expr::Int(i) if *i >= 0 => Some(Size::Const(*i as u64 + 1)),
            tile::Expr::Coord(a) => Some(self.k.axes[*a].extent.clone()),
            tile::Expr::Size(s) => Some(Size::Add(Box::new(s.clone()), Box::new(Size::Const(1)))),
            tile::Expr::Binary(BinaryOp::Add, a, b) => {
                for (x, y) in [(a, b), (b, a)] {
                    // x·s + y with y < s.
                    if let tile::Expr::Binary(BinaryOp::Mul, q, s) = &self.k.exprs[*x] {
                        for (q, s) in [(q, s), (s, q)] {
                            let s = match &self.k.exprs[*s] {
                                tile::Expr::Size(s) => s.clone(),
                                tile::Expr::Int(i) if *i > 0 => Size::Const(*i as u64),
                                _ => continue,
                            };
                            let low = self.upper(*y)?;
                            if normal(&low) == normal(&s) {
                                return Some(Size::Mul(Box::new(self.upper(*q)?), Box::new(s)));
                            }
                        }
                    }
                    if let tile::Expr::Int(i) = &self.k.exprs[*y]
                        && *i >= 0
                    {
                        let x = self.upper(*x)?;
                        return Some(Size::Add(Box::new(x), Box::new(Size::Const(*i as u64))));
                    }
                }
                None
            }
            tile::Expr::Binary(BinaryOp::Sub, a, b) => match (&self.k.exprs[*a], &self.k.exprs[*b]) {
                // x + i − j of at least as much as is taken: the step before the next.
                (tile::Expr::Binary(BinaryOp::Add, x, i), tile::Expr::Int(j)) => match &self.k.exprs[*i] {
                    tile::Expr::Int(i) if i >= j && *j >= 0 => {
                        let x = self.upper(*x)?;
                        Some(Size::Add(Box::new(x), Box::new(Size::Const((i - j) as u64))))
                    }
                    _ => None,
                },
                // i − x where x is at most i: of two halves the other.
                (tile::Expr::Int(i), _) => match self.upper(*b)? {
                    Size::Const(top) if *i >= 0 && i128::from(top) <= i128::from(*i) + 1 => {
                        Some(Size::Const(*i as u64 + 1))
                    }
                    _ => None,
                },
                _ => None,
            },
            tile::Expr::Binary(BinaryOp::Mod, _, s) => match &self.k.exprs[*s] {
                tile::Expr::Size(s) => Some(s.clone()),
                tile::Expr::Int(i) if *i > 0 => Some(Size::Const(*i as u64)),
                _ => None,
            },
            tile::Expr::Binary(BinaryOp::Div, x, s) => {
                let s = match &self.k.exprs[*s] {
                    tile::Expr::Size(s) => s.clone(),
                    tile::Expr::Int(i) if *i > 0 => Size::Const(*i as u64),
                    _ => return None,
                };
                match self.upper(*x)? {
                    Size::Mul(a, b) if normal(&b) == normal(&s) => Some(*a),
                    Size::Mul(a, b) if normal(&a) == normal(&s) => Some(*b),
                    other => Some(Size::CeilDiv(Box::new(other), Box::new(s))),
                }
            }
            tile::Expr::Int(_)
            | tile::Expr::Float(_)
            | tile::Expr::Tile(_)
            | tile::Expr::TileAt { .. }
            | tile::Expr::Read { .. }
            | tile::Expr::Unary(..)
            | tile::Expr::Binary(..)
            | tile::Expr::Select(..)
            | tile::Expr::Cast(..)
            | tile::Expr::Rand(_) => None,
        }
    }
}

/// What a read beyond an array gives.
fn absent(dtype: DType) -> E {
    if dtype.is_float() { E::Float(0.0) } else { E::Int(0) }
}

/// Whether an expression has values of fragments in it.
fn made(e: &E) -> bool {
    let mut found = matches!(e, E::Frag { .. });
    e.for_each_operand(|o| found |= made(o));
    found
}

/// A size as a sorted sum of other terms and a constant, so that equal sizes compare equal.
fn normal(s: &Size) -> (Vec<String>, i128) {
    fn product(s: &Size, out: &mut Vec<String>, k: &mut i128) {
        match s {
            Size::Const(c) => *k *= i128::from(*c),
            Size::Mul(a, b) => {
                product(a, out, k);
                product(b, out, k);
            }
            other => out.push(format!("{other:?}")),
        }
    }
    fn go(s: &Size, sign: i128, out: &mut Vec<String>, k: &mut i128) {
        match s {
            Size::Const(c) => *k += sign * i128::from(*c),
            Size::Add(a, b) => {
                go(a, sign, out, k);
                go(b, sign, out, k);
            }
            Size::Sub(a, b) => {
                go(a, sign, out, k);
                go(b, -sign, out, k);
            }
            other => {
                let (mut terms, mut c) = (Vec::new(), 1);
                product(other, &mut terms, &mut c);
                terms.sort();
                out.push(format!("{}·{}", sign * c, terms.join("·")));
            }
        }
    }
    let (mut out, mut k) = (Vec::new(), 0);
    go(s, 1, &mut out, &mut k);
    out.sort();
    (out, k)
}

/// Calls `f` on every variable of an expression.
fn variables(e: &E, f: &mut impl FnMut(VarId)) {
    if let E::Var(v) = e {
        f(*v);
    }
    e.for_each_operand(|o| variables(o, f));
}

/// Calls `f` on every buffer that an expression fetches from.
fn fetched(e: &E, f: &mut impl FnMut(BufId)) {
    if let E::Fetch { buf, .. } = e {
        f(*buf);
    }
    e.for_each_operand(|o| fetched(o, f));
}
