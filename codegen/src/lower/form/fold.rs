//! A reduction or scan by a monoid of the user's as one kernel.
//!
//! A scan walks its index point after point and stores what is joined so far. A reduction is spread over a fixed
//! number of partial results, [`LANES`], along an inner axis (so that a device's lanes have something to do whatever
//! is kept), each joining every [`LANES`]-th point; then these are joined in order. Either way the order depends on
//! extents alone, and with it the rounding.

use std::collections::HashMap;

use einfall_ir::cascade::types::{self, Kind as Value};
use einfall_ir::cascade::{Cascade, ExprId, MonoidExpr, MonoidId, Size, TensorId};
use einfall_ir::diag::Span;
use einfall_ir::dtype::DType;
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, Axis, AxisId, AxisKind, BufferId, Kernel, Op, TileId};

use super::emit::Emitter;
use super::program::{Kind, Node};
use crate::passes::Unsupported;

/// Partial results of a reduction: a vector of the widest CPUs in f32.
const LANES: u64 = 16;

/// Emits one fold.
pub(super) fn emit_fold(
    c: &Cascade,
    node: &Node,
    name: String,
    buffers: &HashMap<TensorId, BufferId>,
) -> Result<Kernel, Unsupported> {
    let Kind::Fold { monoid, over, body, running } = &node.kind else {
        return Err(Unsupported::new(node.einsum.span, "a fold that is none"));
    };
    let em = Emitter::new(c, name, buffers, |i| i);
    let double = node.einsum.targets.iter().any(|t| c.tensors[t.tensor].dtype == DType::F64);
    let dtype = if double { DType::F64 } else { DType::F32 };
    let kinds = types::kinds(c);
    let integer: Vec<bool> = body.iter().map(|e| kinds[einfall_ir::arena::Id::index(*e)] != Value::Float).collect();
    let mut fold = Fold { c, em, monoid: *monoid, body, integer, dtype };
    let kept = node.einsum.free.iter().filter(|i| !(*running && over.contains(i)));
    let grid: Vec<AxisId> = kept.map(|&i| fold.em.axis(i, AxisKind::Grid)).collect();
    let last = *over.last().expect("a fold is over something");
    if *running {
        let along = fold.em.axis(last, AxisKind::Stream);
        let held = fold.start("", &grid);
        fold.em.open(along);
        let points = fold.points(node.einsum.span)?;
        fold.join(&held, &points, None);
        fold.store(node, &held)?;
        fold.em.close(false, true, None);
        return Ok(fold.em.finish());
    }
    let extent = c.indices[last].extent.clone();
    let lane = fold.em.new_axis("lane", Axis::inner(Size::Const(LANES)));
    let chunks = Size::CeilDiv(Box::new(extent.clone()), Box::new(Size::Const(LANES)));
    let chunk_axis = Axis { kind: AxisKind::Stream, ..Axis::inner(chunks) };
    let chunk = fold.em.new_axis(&c.indices[last].name, chunk_axis);
    let spread: Vec<AxisId> = grid.iter().copied().chain([lane]).collect();
    let parts = fold.start("_part", &spread);
    for &i in &over[..over.len() - 1] {
        let axis = fold.em.axis(i, AxisKind::Stream);
        fold.em.open(axis);
    }
    fold.em.open(chunk);
    let (first, within) = (fold.em.expr(tile::Expr::Coord(chunk)), fold.em.expr(tile::Expr::Coord(lane)));
    let width = fold.em.expr(tile::Expr::Int(LANES as i64));
    let first = fold.em.binary(BinaryOp::Mul, first, width);
    let point = fold.em.binary(BinaryOp::Add, first, within);
    let end = fold.em.expr(tile::Expr::Size(extent));
    let exists = fold.em.binary(BinaryOp::Lt, point, end);
    fold.em.values.insert(last, point);
    let points = fold.points(node.einsum.span)?;
    fold.join(&parts, &points, Some(exists));
    for _ in over {
        fold.em.close(false, true, None);
    }
    let held = fold.start("", &grid);
    let part_axis = Axis { kind: AxisKind::Stream, ..Axis::inner(Size::Const(LANES)) };
    let part = fold.em.new_axis("part", part_axis);
    fold.em.open(part);
    let at: Vec<tile::Place> = grid.iter().chain([&part]).map(|a| tile::Place::Axis(*a)).collect();
    let points: Vec<tile::ExprId> =
        parts.iter().map(|&tile| fold.em.expr(tile::Expr::TileAt { tile, at: at.clone() })).collect();
    fold.join(&held, &points, None);
    fold.em.close(false, true, None);
    fold.store(node, &held)?;
    Ok(fold.em.finish())
}

struct Fold<'a, 'n> {
    c: &'a Cascade,
    em: Emitter<'a>,
    monoid: MonoidId,
    /// The value of a point, a component each.
    body: &'n [ExprId],
    /// Components that are no floats as written.
    integer: Vec<bool>,
    dtype: DType,
}

impl Fold<'_, '_> {
    /// Tiles of the components, which hold the identity.
    fn start(&mut self, suffix: &str, axes: &[AxisId]) -> Vec<TileId> {
        let monoid = &self.c.monoids[self.monoid];
        let mut tiles = Vec::new();
        for (field, identity) in monoid.fields.iter().zip(&monoid.identity) {
            let tile = self.em.tile(&format!("{field}{suffix}"), self.dtype, axes.to_vec());
            self.em.fill(tile, *identity);
            tiles.push(tile);
        }
        tiles
    }

    /// The value of a point: floats.
    fn points(&mut self, span: Span) -> Result<Vec<tile::ExprId>, Unsupported> {
        if self.body.len() != self.c.monoids[self.monoid].fields.len() {
            return Err(Unsupported::new(span, "a monoid of other components than its value's"));
        }
        let mut out = Vec::new();
        for (e, integer) in self.body.iter().zip(self.integer.clone()) {
            let value = self.em.convert(*e)?;
            out.push(match (&self.em.kernel.exprs[value], integer) {
                (_, false) => value,
                (tile::Expr::Int(n), true) => {
                    let x = *n as f64;
                    self.em.expr(tile::Expr::Float(x))
                }
                (_, true) => self.em.expr(tile::Expr::Cast(self.dtype, value)),
            });
        }
        Ok(out)
    }

    /// `held = combine(held, points)` where `exists`.
    fn join(&mut self, held: &[TileId], points: &[tile::ExprId], exists: Option<tile::ExprId>) {
        let left: Vec<tile::ExprId> = held.iter().map(|t| self.em.expr(tile::Expr::Tile(*t))).collect();
        let monoid = &self.c.monoids[self.monoid];
        let mut new = Vec::new();
        // Every component from the old ones, before any changes.
        for (n, rule) in monoid.combine.iter().enumerate() {
            let mut value = self.combine(rule, &left, points);
            if let Some(exists) = exists {
                value = self.em.expr(tile::Expr::Select(exists, value, left[n]));
            }
            let axes = self.em.kernel.tiles[held[n]].axes.clone();
            let tile = self.em.tile(&format!("{}_new", monoid.fields[n]), self.dtype, axes);
            self.em.push(Op::Map { out: tile, value });
            new.push(tile);
        }
        for (out, from) in held.iter().zip(new) {
            let value = self.em.expr(tile::Expr::Tile(from));
            self.em.push(Op::Map { out: *out, value });
        }
    }

    fn combine(&mut self, rule: &MonoidExpr, a: &[tile::ExprId], b: &[tile::ExprId]) -> tile::ExprId {
        let e = match rule {
            MonoidExpr::Left(n) => return a[*n],
            MonoidExpr::Right(n) => return b[*n],
            MonoidExpr::Const(x) => tile::Expr::Float(*x),
            MonoidExpr::Unary(op, x) => tile::Expr::Unary(*op, self.combine(x, a, b)),
            MonoidExpr::Binary(op, x, y) => tile::Expr::Binary(*op, self.combine(x, a, b), self.combine(y, a, b)),
            MonoidExpr::Select(c, x, y) => {
                tile::Expr::Select(self.combine(c, a, b), self.combine(x, a, b), self.combine(y, a, b))
            }
        };
        self.em.expr(e)
    }

    /// Stores the components that have arrays.
    fn store(&mut self, node: &Node, held: &[TileId]) -> Result<(), Unsupported> {
        for (target, tile) in node.einsum.targets.iter().zip(held) {
            self.em.tile_of.insert(target.tensor, *tile);
        }
        self.em.store(node, None, node.einsum.span)
    }
}
