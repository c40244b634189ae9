//! An iterative rank as one kernel: a sequential stream whose states are tiles.
//!
//! States are read at the point that comes in and written at the point that goes out (t and t+1, exchanged when
//! reversed). Axes along which states are only read where they were written are cut over the launch; a state read
//! along a reduced axis is read under that axis's name, which is where units that share a state exchange it.

use std::collections::{HashMap, HashSet};

use einfall_ir::arena::Id;
use einfall_ir::cascade::{Cascade, Expr, ExprId, IndexId, Iter, OutputSource, Size, TensorId, TensorKind};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, AxisKind, BufferId, Kernel, Op, TileId};

use super::emit::{Emitter, PlanTypes};
use super::group::Classes;
use super::program::Node;
use super::stream::emit_statement;
use crate::passes::Unsupported;

/// Where points of a state go.
pub(super) struct StateSink {
    /// The state.
    pub state: TensorId,
    /// The array.
    pub buffer: BufferId,
    /// Which points.
    pub source: OutputSource,
}

/// Emits one iteration. `sinks` lists the arrays that take points of its states; `read_outside` the step-wise tensors
/// that have arrays.
pub(super) fn emit_iter(
    c: &Cascade,
    iter: &Iter,
    name: String,
    buffers: &HashMap<TensorId, BufferId>,
    sinks: &[StateSink],
    types: &PlanTypes,
) -> Result<Kernel, Unsupported> {
    let inits = iter.inits.iter().map(|e| Node::new(c, e)).collect::<Result<Vec<_>, _>>()?;
    let body = iter.body.iter().map(|e| Node::new(c, e)).collect::<Result<Vec<_>, _>>()?;
    if let Some(e) = iter.body.iter().find(|e| c.tensors[e.targets[0].tensor].kind == TensorKind::InOut) {
        return Err(Unsupported::new(e.span, "an `inout` tensor written within an iteration"));
    }
    let states: HashSet<TensorId> = iter.states.iter().copied().collect();
    let steps: HashSet<TensorId> =
        body.iter().flat_map(|n| n.einsum.targets.iter().map(|t| t.tensor)).filter(|t| !states.contains(t)).collect();
    let it = Iteration { c, iter, states: &states, steps: &steps };
    let (classes, renamed) = it.unify(&inits, &body)?;
    let grid = it.grid(&classes, &renamed, &inits, &body);

    let find = classes.clone();
    let mut em = Emitter::new(c, name, buffers, move |i| find.find(i));
    for &i in &grid {
        em.axis(i, AxisKind::Grid);
    }
    let t = em.axis(iter.index, AxisKind::Stream);
    em.set_iteration(iter.index, iter.rev);

    // The state that comes in, from its initialiser.
    for node in &inits {
        let state = node.target();
        let axes: Vec<IndexId> = node.einsum.free.clone();
        let axes = em.axes(&axes);
        let value = em.convert(node.einsum.value)?;
        let tensor = &c.tensors[state];
        let tile = em.tile(&tensor.name, tensor.dtype, axes);
        em.push(Op::Map { out: tile, value });
        em.incoming.insert(state, tile);
    }
    if let Some(&missing) = iter.states.iter().find(|s| !em.incoming.contains_key(s)) {
        let what = format!("the state `{}` without an initialiser", c.tensors[missing].name);
        return Err(Unsupported::new(iter.span, what));
    }
    let first = if iter.rev { iter.extent.clone() } else { Size::Const(0) };
    for sink in sinks {
        let point = em.expr(tile::Expr::Size(first.clone()));
        let tile = em.incoming[&sink.state];
        it.sink(&mut em, sink, tile, point, true)?;
    }

    em.open(t);
    for node in &body {
        let state = states.contains(&node.target());
        if state {
            let own = em.kernel.tiles[em.incoming[&node.target()]].axes.clone();
            let axes = em.axes(&it.step_dims(node)?);
            if axes != own {
                let what = "a state written along other indices than its initialiser's";
                return Err(Unsupported::new(node.einsum.span, what));
            }
        }
        let axes: Vec<IndexId> = it.step_dims(node)?;
        em.step_axes = Some(em.axes(&axes));
        let stored = !state && node.einsum.targets.iter().any(|x| buffers.contains_key(&x.tensor));
        emit_statement(&mut em, node, stored, true, types)?;
        em.step_axes = None;
        if state {
            let tile = em.tile_of.remove(&node.target()).expect("just written");
            em.outgoing.insert(node.target(), tile);
        }
    }
    let coord = em.expr(tile::Expr::Coord(t));
    let produced = if iter.rev {
        coord
    } else {
        let one = em.expr(tile::Expr::Int(1));
        em.binary(BinaryOp::Add, coord, one)
    };
    for sink in sinks {
        let tile = em.outgoing[&sink.state];
        it.sink(&mut em, sink, tile, produced, false)?;
    }
    for &state in &iter.states {
        let (out, value) = (em.incoming[&state], em.outgoing[&state]);
        let value = em.expr(tile::Expr::Tile(value));
        em.push(Op::Map { out, value });
    }
    em.close(iter.rev, true, None);
    Ok(em.finish())
}

struct Iteration<'a> {
    c: &'a Cascade,
    iter: &'a Iter,
    states: &'a HashSet<TensorId>,
    steps: &'a HashSet<TensorId>,
}

impl Iteration<'_> {
    /// The dimensions a tensor keeps within a step: all but the iterated one.
    fn step_access(&self, tensor: TensorId, at: &[ExprId]) -> Vec<ExprId> {
        if self.states.contains(&tensor) {
            return at[1..].to_vec();
        }
        let iterated = |a: ExprId| matches!(self.c.exprs[a], Expr::Index(i) if i == self.iter.index);
        at.iter().copied().filter(|&a| !iterated(a)).collect()
    }

    /// The plain indices of a left-hand side within a step.
    fn step_dims(&self, node: &Node) -> Result<Vec<IndexId>, Unsupported> {
        let target = &node.einsum.targets[0];
        let at = self.step_access(target.tensor, &target.at);
        super::program::plain_access(self.c, &at)
            .ok_or_else(|| Unsupported::new(node.einsum.span, "a computed left-hand side within an iteration"))
    }

    /// Joins the indices along which step-wise tensors and states are read where they are written. Returns the
    /// indices a state is written along that are also read under another name.
    fn unify(&self, inits: &[Node], body: &[Node]) -> Result<(Classes, HashSet<IndexId>), Unsupported> {
        let mut classes = Classes::default();
        let mut written: HashMap<TensorId, Vec<IndexId>> = HashMap::new();
        for node in body.iter().chain(inits) {
            let dims = self.step_dims(node)?;
            match written.get(&node.target()) {
                Some(own) => {
                    for (&a, &b) in own.iter().zip(&dims) {
                        classes.join(a, b);
                    }
                }
                None => {
                    written.insert(node.target(), dims);
                }
            }
        }
        let mut renamed = HashSet::new();
        for node in body {
            let own: HashSet<IndexId> = node.indices().collect();
            for (t, at) in node.reads.iter().filter(|(t, _)| self.states.contains(t) || self.steps.contains(t)) {
                let Some(dims) = written.get(t) else { continue };
                for (&d, a) in dims.iter().zip(self.step_access(*t, at)) {
                    if matches!(self.c.exprs[a], Expr::Int(n) if n >= 0) {
                        continue;
                    }
                    let Expr::Index(i) = self.c.exprs[a] else {
                        let what = format!("a computed access to `{}` within an iteration", self.c.tensors[*t].name);
                        return Err(Unsupported::new(self.c.spans[a.index()], what));
                    };
                    let clash = own.iter().any(|&j| j != i && classes.find(j) == classes.find(d));
                    if node.over().contains(&i) || clash {
                        renamed.insert(d);
                    } else {
                        classes.join(d, i);
                    }
                }
            }
        }
        Ok((classes, renamed))
    }

    /// Classes that every statement has free and no state is read across.
    fn grid(&self, classes: &Classes, renamed: &HashSet<IndexId>, inits: &[Node], body: &[Node]) -> Vec<IndexId> {
        let across: HashSet<IndexId> = renamed.iter().map(|&i| classes.find(i)).collect();
        let reduced: HashSet<IndexId> =
            body.iter().flat_map(|n| n.over().iter().map(|&i| classes.find(i)).collect::<Vec<_>>()).collect();
        let mut grid: Vec<IndexId> = Vec::new();
        let Some(first) = body.first() else { return grid };
        for &i in &first.einsum.free {
            let i = classes.find(i);
            let everywhere = body.iter().chain(inits).all(|n| n.einsum.free.iter().any(|&j| classes.find(j) == i));
            if i != classes.find(self.iter.index) && everywhere && !across.contains(&i) && !reduced.contains(&i) {
                grid.push(i);
            }
        }
        grid
    }

    /// Stores `tile`, the state's value at `point`, where the sink wants that point.
    fn sink(
        &self,
        em: &mut Emitter<'_>,
        sink: &StateSink,
        tile: TileId,
        point: tile::ExprId,
        initial: bool,
    ) -> Result<(), Unsupported> {
        let axes = em.kernel.tiles[tile].axes.clone();
        let coords: Vec<tile::ExprId> = axes.iter().map(|&a| em.expr(tile::Expr::Coord(a))).collect();
        let value = em.expr(tile::Expr::Tile(tile));
        let (mut at, when) = match &sink.source {
            OutputSource::Points { from, to, .. } => {
                let whole = *from == Size::Const(0)
                    && *to == Size::Add(Box::new(self.iter.extent.clone()), Box::new(Size::Const(1)));
                let from_one = *from == Size::Const(1);
                let lo = em.expr(tile::Expr::Size(from.clone()));
                let hi = em.expr(tile::Expr::Size(to.clone()));
                let above = em.binary(BinaryOp::Ge, point, lo);
                let below = em.binary(BinaryOp::Lt, point, hi);
                let both = em.binary(BinaryOp::And, above, below);
                // A forward iteration's initial point lies before every slice from 1 on.
                if initial && from_one && !self.iter.rev {
                    return Ok(());
                }
                let position = em.binary(BinaryOp::Sub, point, lo);
                let always = whole || (from_one && !self.iter.rev && !initial && is_end(to, &self.iter.extent));
                (vec![position], (!always).then_some(both))
            }
            OutputSource::Point { at, .. } => {
                let wanted = em.expr(tile::Expr::Size(at.clone()));
                (Vec::new(), Some(em.binary(BinaryOp::Eq, point, wanted)))
            }
            OutputSource::Whole(_) => (vec![point], None),
        };
        at.extend(coords);
        em.push(Op::Store { buffer: sink.buffer, at, axes, value, join: None, when });
        Ok(())
    }
}

/// Whether `to` is one past the last point, `extent + 1`.
fn is_end(to: &Size, extent: &Size) -> bool {
    let one = Box::new(Size::Const(1));
    *to == Size::Add(Box::new(extent.clone()), one.clone()) || *to == Size::Add(one, Box::new(extent.clone()))
}

/// States and step-wise tensors that statements outside the iteration read, or that are outputs themselves.
pub(super) fn escaping(c: &Cascade, iter: &Iter, outside: &HashSet<TensorId>) -> Vec<TensorId> {
    let steps = iter.body.iter().flat_map(|e| e.targets.iter().map(|t| t.tensor));
    let mut list: Vec<TensorId> = Vec::new();
    for t in steps.chain(iter.states.iter().copied()) {
        if (outside.contains(&t) || c.tensors[t].kind == TensorKind::Output) && !list.contains(&t) {
            list.push(t);
        }
    }
    list
}
