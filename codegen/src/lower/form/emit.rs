//! From statements and a schedule to the tile IR: axes, tiles, streams and operations of one kernel.

use std::collections::{HashMap, HashSet};

use einfall_ir::arena::Id;
use einfall_ir::cascade::{Cascade, Expr, ExprId, IndexId, TensorId};
use einfall_ir::diag::Span;
use einfall_ir::dtype::DType;
use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{self, AxisId, AxisKind, BufferId, Kernel, Op, Stream, Tile, TileId};

use super::program::{Contraction, Kind, Node};
use crate::identity::tile_constant;
use crate::passes::Unsupported;

/// A list of nodes being filled: the body of the kernel, or of a stream.
struct Frame {
    /// The axis walked; none for the kernel's body.
    axis: Option<AxisId>,
    nodes: Vec<tile::Node>,
    /// Tiles that only hold within this frame.
    local: Vec<TileId>,
}

/// Builds one kernel.
pub(super) struct Emitter<'a> {
    c: &'a Cascade,
    /// Array of every tensor that has one.
    buffers: &'a HashMap<TensorId, BufferId>,
    pub kernel: Kernel,
    frames: Vec<Frame>,
    axis_of: HashMap<IndexId, AxisId>,
    /// Class of an index.
    class: Box<dyn Fn(IndexId) -> IndexId + 'a>,
    /// The tile that holds a tensor now.
    pub tile_of: HashMap<TensorId, TileId>,
    /// Expressions already built, by their text.
    interned: HashMap<String, tile::ExprId>,
    /// Tiles that hold an expression's value over some axes.
    held: HashMap<(tile::ExprId, Vec<AxisId>), TileId>,
    /// The iterated index, and whether it runs backwards.
    iteration: Option<(IndexId, bool)>,
    /// Whether a step of the iteration is a block of points, so that tiles have the iterated axis.
    blocked: bool,
    /// States as they come into a step.
    pub incoming: HashMap<TensorId, TileId>,
    /// States a step has produced.
    pub outgoing: HashMap<TensorId, TileId>,
    /// Indices that are no axis's coordinate, with their values.
    pub values: HashMap<IndexId, tile::ExprId>,
    /// The axes of the next statement's results, where they are not its left-hand side's.
    pub step_axes: Option<Vec<AxisId>>,
    axis_names: HashSet<String>,
    tile_names: HashSet<String>,
}

impl<'a> Emitter<'a> {
    /// An empty kernel called `name`.
    pub fn new(
        c: &'a Cascade,
        name: String,
        buffers: &'a HashMap<TensorId, BufferId>,
        class: impl Fn(IndexId) -> IndexId + 'a,
    ) -> Emitter<'a> {
        let kernel = Kernel::new(name);
        Emitter {
            c,
            buffers,
            kernel,
            frames: vec![Frame { axis: None, nodes: Vec::new(), local: Vec::new() }],
            axis_of: HashMap::new(),
            class: Box::new(class),
            tile_of: HashMap::new(),
            interned: HashMap::new(),
            held: HashMap::new(),
            iteration: None,
            blocked: false,
            incoming: HashMap::new(),
            outgoing: HashMap::new(),
            values: HashMap::new(),
            step_axes: None,
            axis_names: HashSet::new(),
            tile_names: HashSet::new(),
        }
    }

    /// The finished kernel.
    pub fn finish(mut self) -> Kernel {
        let frame = self.frames.pop().expect("the body");
        debug_assert!(self.frames.is_empty());
        self.kernel.body = frame.nodes;
        self.kernel
    }

    /// Says which index iterates, so that states are read at the right point.
    pub fn set_iteration(&mut self, index: IndexId, rev: bool) {
        self.iteration = Some((index, rev));
    }

    /// As [`Emitter::set_iteration`], forwards, with many points a step.
    pub fn set_blocked(&mut self, index: IndexId) {
        self.iteration = Some((index, false));
        self.blocked = true;
    }

    /// The tile that holds a tensor at this access, if one does.
    fn held_tensor(&self, tensor: TensorId, at: &[ExprId]) -> Option<TileId> {
        if let Some(&tile) = self.tile_of.get(&tensor) {
            return Some(tile);
        }
        let (index, rev) = self.iteration?;
        let at_t = matches!(self.c.exprs[*at.first()?], Expr::Index(i) if i == index);
        // Forwards, point t comes in and t+1 goes out; backwards the other way round.
        let map = if at_t != rev { &self.incoming } else { &self.outgoing };
        map.get(&tensor).copied()
    }

    /// The axis of an index's class, made on first use.
    pub fn axis(&mut self, i: IndexId, kind: AxisKind) -> AxisId {
        let i = (self.class)(i);
        if let Some(&axis) = self.axis_of.get(&i) {
            return axis;
        }
        let index = &self.c.indices[i];
        let name = unique(&mut self.axis_names, &index.name);
        let axis = self.kernel.axes.push(tile::Axis { name, extent: index.extent.clone(), kind, block: None });
        self.axis_of.insert(i, axis);
        axis
    }

    /// An axis that is no index's.
    pub fn new_axis(&mut self, name: &str, axis: tile::Axis) -> AxisId {
        let name = unique(&mut self.axis_names, name);
        self.kernel.axes.push(tile::Axis { name, ..axis })
    }

    /// The axis of an index seen before, or an inner one.
    pub fn known_axis(&mut self, i: IndexId) -> AxisId {
        self.axis(i, AxisKind::Inner)
    }

    /// A new tile.
    pub fn tile(&mut self, name: &str, dtype: DType, axes: Vec<AxisId>) -> TileId {
        let name = unique(&mut self.tile_names, name);
        let tile = self.kernel.tiles.push(Tile { name, dtype, axes, space: None, exact: false });
        self.frames.last_mut().expect("a frame").local.push(tile);
        tile
    }

    /// Interns an expression.
    pub fn expr(&mut self, e: tile::Expr) -> tile::ExprId {
        let key = format!("{e:?}");
        if let Some(&id) = self.interned.get(&key) {
            return id;
        }
        let id = self.kernel.exprs.push(e);
        self.interned.insert(key, id);
        id
    }

    /// Interns `op(a, b)`.
    pub fn binary(&mut self, op: BinaryOp, a: tile::ExprId, b: tile::ExprId) -> tile::ExprId {
        self.expr(tile::Expr::Binary(op, a, b))
    }

    /// Appends an operation to the innermost frame.
    pub fn push(&mut self, op: Op) {
        self.frames.last_mut().expect("a frame").nodes.push(tile::Node::Op(op));
    }

    /// Opens a stream over `axis`.
    pub fn open(&mut self, axis: AxisId) {
        self.frames.push(Frame { axis: Some(axis), nodes: Vec::new(), local: Vec::new() });
    }

    /// Whether an expression reads what the innermost frame computes.
    pub fn is_computed_here(&self, e: tile::ExprId) -> bool {
        fn outs(nodes: &[tile::Node], written: &mut HashSet<TileId>) {
            nodes.iter().for_each(|n| match n {
                tile::Node::Op(op) => written.extend(op.outs()),
                tile::Node::Stream(s) => outs(&s.body, written),
            });
        }
        let mut written = HashSet::new();
        outs(&self.frames.last().expect("a frame").nodes, &mut written);
        let mut found = false;
        self.kernel.walk(e, &mut |_, e| {
            found |= matches!(e, tile::Expr::Tile(t) | tile::Expr::TileAt { tile: t, .. } if written.contains(t));
        });
        found
    }

    /// Closes the innermost stream. Values computed inside do not outlive it, carried tiles excepted.
    pub fn close(&mut self, reverse: bool, sequential: bool, filter: Option<tile::ExprId>) {
        let frame = self.frames.pop().expect("an open stream");
        let axis = frame.axis.expect("a stream, not the body");
        let local: HashSet<TileId> = frame.local.into_iter().collect();
        self.held.retain(|_, t| !local.contains(t));
        self.tile_of.retain(|_, t| !local.contains(t));
        let stream = Stream { axis, reverse, sequential, filter, body: frame.nodes };
        self.frames.last_mut().expect("the frame around").nodes.push(tile::Node::Stream(stream));
    }

    /// The expression of a cascade expression, at the same point.
    pub fn convert(&mut self, id: ExprId) -> Result<tile::ExprId, Unsupported> {
        let span = self.c.spans[id.index()];
        let unsupported = |what: &str| Err(Unsupported::new(span, what));
        let e = match &self.c.exprs[id] {
            Expr::Int(v) => tile::Expr::Int(*v),
            Expr::Float(v) => tile::Expr::Float(*v),
            Expr::Size(s) => tile::Expr::Size(s.clone()),
            Expr::Index(i) => match self.values.get(i) {
                Some(&value) => return Ok(value),
                None => tile::Expr::Coord(self.known_axis(*i)),
            },
            Expr::Read { tensor, at } => {
                if let Some(tile) = self.held_tensor(*tensor, at) {
                    return self.read_tile(tile, *tensor, at);
                }
                let Some(&buffer) = self.buffers.get(tensor) else {
                    return unsupported(&format!("`{}` read here", self.c.tensors[*tensor].name));
                };
                let at = at.iter().map(|&a| self.convert(a)).collect::<Result<_, _>>()?;
                let e = self.expr(tile::Expr::Read { buffer, at });
                // An element already loaded is not read twice.
                let step = self.step_axis();
                let axes: Vec<AxisId> = self.axes_of(e).into_iter().filter(|a| Some(*a) != step).collect();
                return Ok(match self.held.get(&(e, axes)) {
                    Some(&tile) => self.expr(tile::Expr::Tile(tile)),
                    None => e,
                });
            }
            Expr::Unary(op, a) => tile::Expr::Unary(*op, self.convert(*a)?),
            Expr::Binary(op, a, b) => tile::Expr::Binary(*op, self.convert(*a)?, self.convert(*b)?),
            Expr::Select(x, a, b) => tile::Expr::Select(self.convert(*x)?, self.convert(*a)?, self.convert(*b)?),
            Expr::Cast(d, a) => tile::Expr::Cast(*d, self.convert(*a)?),
            Expr::Tuple(_) => return unsupported("a tuple"),
            Expr::Reduce { .. } | Expr::Scan { .. } => return unsupported("a reduction in this place"),
            Expr::Segment { .. } => return unsupported("a ragged rank"),
            Expr::Rand { seed, coords } => {
                let mut of = [self.expr(tile::Expr::Int(0)); 5];
                for (to, e) in of.iter_mut().zip([seed].into_iter().chain(coords)) {
                    *to = self.convert(*e)?;
                }
                tile::Expr::Rand(of)
            }
        };
        Ok(self.expr(e))
    }

    /// The element of a tile at an access: plain where the access names the tile's own axes, renamed otherwise.
    fn read_tile(&mut self, tile: TileId, tensor: TensorId, at: &[ExprId]) -> Result<tile::ExprId, Unsupported> {
        let own = self.kernel.tiles[tile].axes.clone();
        // A state or an iterated intermediate is held without its iterated dimension.
        let iterated =
            |a: ExprId| matches!((&self.c.exprs[a], self.iteration), (Expr::Index(i), Some((t, _))) if *i == t);
        let at: Vec<ExprId> = if self.incoming.contains_key(&tensor) {
            at[1..].to_vec()
        } else if self.blocked {
            at.to_vec()
        } else {
            at.iter().copied().filter(|&a| !iterated(a)).collect()
        };
        let mut places = Vec::new();
        for a in at {
            places.push(match self.c.exprs[a] {
                Expr::Index(i) => tile::Place::Axis(self.known_axis(i)),
                Expr::Int(n) if n >= 0 => tile::Place::At(n as u64),
                _ => {
                    let name = &self.c.tensors[tensor].name;
                    let what = format!("a computed access to `{name}` within an iteration");
                    return Err(Unsupported::new(self.c.spans[a.index()], what));
                }
            });
        }
        let plain = places.iter().zip(&own).all(|(p, o)| *p == tile::Place::Axis(*o));
        Ok(self.expr(if plain { tile::Expr::Tile(tile) } else { tile::Expr::TileAt { tile, at: places } }))
    }

    /// The axes an expression varies over, in the kernel's order.
    pub fn axes_of(&self, root: tile::ExprId) -> Vec<AxisId> {
        let mut set: Vec<AxisId> = Vec::new();
        let mut add = |a: AxisId| {
            if !set.contains(&a) {
                set.push(a);
            }
        };
        self.kernel.walk(root, &mut |_, e| match e {
            tile::Expr::Coord(a) => add(*a),
            tile::Expr::Tile(t) => self.kernel.tiles[*t].axes.iter().copied().for_each(&mut add),
            tile::Expr::TileAt { at, .. } => at.iter().for_each(|p| match p {
                tile::Place::Axis(a) => add(*a),
                tile::Place::At(_) => {}
            }),
            tile::Expr::Int(_)
            | tile::Expr::Float(_)
            | tile::Expr::Size(_)
            | tile::Expr::Read { .. }
            | tile::Expr::Unary(..)
            | tile::Expr::Binary(..)
            | tile::Expr::Select(..)
            | tile::Expr::Cast(..)
            | tile::Expr::Rand(_) => {}
        });
        set
    }

    /// A tile that holds `value`, as an operand: a tile that already does, a load, or a map. `order` says which axes
    /// come first.
    pub fn operand(&mut self, name: &str, value: tile::ExprId, order: &[AxisId], plan: &PlanTypes) -> TileId {
        if let tile::Expr::Tile(t) = self.kernel.exprs[value] {
            return t;
        }
        let mut axes = self.axes_of(value);
        let step = self.step_axis();
        axes.retain(|a| Some(*a) != step);
        axes.sort_by_key(|a| order.iter().position(|o| o == a).unwrap_or(order.len()));
        if let Some(&t) = self.held.get(&(value, axes.clone())) {
            return t;
        }
        if let tile::Expr::Read { buffer, at } = self.kernel.exprs[value].clone() {
            // Keep the array's own order of dimensions.
            let all = self.axes_of(value);
            let home = self.home(&all, &at);
            let axes: Vec<AxisId> = all.into_iter().filter(|a| Some(*a) != step).collect();
            let out = self.tile(&plan.names[&buffer], plan.dtypes[&buffer], axes.clone());
            self.move_local(out, home);
            self.frames[home].nodes.push(tile::Node::Op(Op::Load { out, buffer, at }));
            self.held.insert((value, axes), out);
            return out;
        }
        let out = self.tile(name, DType::F32, axes.clone());
        self.push(Op::Map { out, value });
        self.held.insert((value, axes), out);
        out
    }

    /// The axis of the iterated index: it has one coordinate a step, so tiles go without it.
    fn step_axis(&self) -> Option<AxisId> {
        let (index, _) = self.iteration.filter(|_| !self.blocked)?;
        self.axis_of.get(&(self.class)(index)).copied()
    }

    /// The outermost frame in which a load over `axes` does not change from step to step.
    fn home(&self, axes: &[AxisId], at: &[tile::ExprId]) -> usize {
        let reads_tiles = at.iter().any(|&e| {
            let mut found = false;
            self.kernel.walk(e, &mut |_, e| found |= matches!(e, tile::Expr::Tile(_) | tile::Expr::TileAt { .. }));
            found
        });
        if reads_tiles {
            return self.frames.len() - 1;
        }
        (0..self.frames.len()).rev().find(|&f| self.frames[f].axis.is_none_or(|a| axes.contains(&a))).unwrap_or(0)
    }

    fn move_local(&mut self, tile: TileId, frame: usize) {
        let last = self.frames.len() - 1;
        self.frames[last].local.retain(|t| *t != tile);
        self.frames[frame].local.push(tile);
    }

    /// The axes of a statement's left-hand side indices.
    pub fn axes(&mut self, indices: &[IndexId]) -> Vec<AxisId> {
        indices.iter().map(|&i| self.known_axis(i)).collect()
    }

    /// A constant as an element of type `dtype`; integers saturate.
    pub fn constant(&mut self, value: f64, dtype: DType) -> tile::ExprId {
        self.expr(tile_constant(value, dtype))
    }

    /// Fills `tile` with a constant in the innermost frame.
    pub fn fill(&mut self, tile: TileId, value: f64) {
        let value = self.constant(value, self.kernel.tiles[tile].dtype);
        self.push(Op::Map { out: tile, value });
    }

    /// `out[free] (+)= ⊕_over body` as a contraction where it is one.
    pub fn reduce(
        &mut self,
        out: &[TileId],
        op: ReduceOp,
        (free, over): (&[IndexId], &[IndexId]),
        body: ExprId,
        carry: bool,
        types: &PlanTypes,
    ) -> Result<(), Unsupported> {
        let axes = self.axes(over);
        let split = if op == ReduceOp::Sum { Contraction::of(self.c, body, free, over) } else { None };
        let Some(split) = split else {
            let mut value = self.convert(body)?;
            if let Some(t) = self.held.iter().find(|((e, _), _)| *e == value).map(|(_, t)| *t) {
                value = self.expr(tile::Expr::Tile(t));
            }
            self.push(Op::Reduce { out: out.to_vec(), op, value, over: axes, carry });
            return Ok(());
        };
        let mut a = None;
        for f in split.a {
            let f = self.convert(f)?;
            a = Some(a.map_or(f, |a| self.binary(BinaryOp::Mul, a, f)));
        }
        let mut a = a.expect("a contraction has two operands");
        let mut b = self.convert(split.b)?;
        let zero = self.constant(0.0, self.kernel.tiles[out[0]].dtype);
        for (guard, truth) in split.guards.into_iter().rev() {
            let guard = self.convert(guard)?;
            // On the operand that varies with the guard already, so that it grows no axes.
            let within = |em: &Self, e| {
                let own = em.axes_of(e);
                em.axes_of(guard).iter().all(|x| own.contains(x))
            };
            let side = if !within(self, a) && within(self, b) { &mut b } else { &mut a };
            let (yes, no) = if truth { (*side, zero) } else { (zero, *side) };
            *side = self.expr(tile::Expr::Select(guard, yes, no));
        }
        let name = self.kernel.tiles[out[0]].name.clone();
        let order: Vec<AxisId> = self.kernel.tiles[out[0]].axes.iter().chain(&axes).copied().collect();
        let a = self.operand(&format!("{name}_a"), a, &order, types);
        let b = self.operand(&format!("{name}_b"), b, &order, types);
        self.push(Op::Contract { out: out[0], a, b, over: axes, carry });
        Ok(())
    }

    /// The tiles a statement writes: one per target; for a lone argument selection also the value's.
    pub fn result_tiles(&mut self, node: &Node) -> Vec<TileId> {
        let axes = match &node.dims {
            Some(dims) => dims.clone(),
            None => node.einsum.free.clone(),
        };
        let axes = match &self.step_axes {
            Some(axes) => axes.clone(),
            None => self.axes(&axes),
        };
        let mut tiles: Vec<TileId> = Vec::new();
        for t in &node.einsum.targets {
            let tensor = &self.c.tensors[t.tensor];
            let tile = self.tile(&tensor.name, tensor.dtype, axes.clone());
            self.tile_of.insert(t.tensor, tile);
            tiles.push(tile);
        }
        if let Kind::Reduce { op, .. } = node.kind
            && op.selects_argument()
            && tiles.len() == 1
        {
            let name = format!("{}_value", self.kernel.tiles[tiles[0]].name);
            let value = self.tile(&name, DType::F32, axes);
            tiles.insert(0, value);
        }
        tiles
    }

    /// What an argument selection or reduction starts from, in the order of [`Emitter::result_tiles`].
    pub fn identities(op: ReduceOp) -> [f64; 2] {
        match op {
            ReduceOp::ArgMax => [f64::NEG_INFINITY, -1.0],
            ReduceOp::ArgMin => [f64::INFINITY, -1.0],
            ReduceOp::Sum
            | ReduceOp::Product
            | ReduceOp::Min
            | ReduceOp::Max
            | ReduceOp::LogSumExp
            | ReduceOp::Any
            | ReduceOp::All => [op.identity(), op.identity()],
        }
    }

    /// Stores a statement's targets in their arrays from tiles or, for a lone elementwise one, from `value`.
    pub fn store(&mut self, node: &Node, value: Option<tile::ExprId>, span: Span) -> Result<(), Unsupported> {
        for t in &node.einsum.targets {
            let Some(&buffer) = self.buffers.get(&t.tensor) else { continue };
            let value = match (value, self.tile_of.get(&t.tensor)) {
                (Some(v), _) => v,
                (None, Some(&tile)) => self.expr(tile::Expr::Tile(tile)),
                (None, None) => return Err(Unsupported::new(span, "a result that is never computed")),
            };
            let at = t.at.iter().map(|&a| self.convert(a)).collect::<Result<Vec<_>, _>>()?;
            let axes = self.axes(&node.einsum.free);
            let when = node.einsum.filter.map(|f| self.convert(f)).transpose()?;
            self.push(Op::Store { buffer, at, axes, value, join: None, when });
        }
        Ok(())
    }
}

/// What an emitter needs to know about the plan's arrays.
pub(super) struct PlanTypes {
    /// Element types.
    pub dtypes: HashMap<BufferId, DType>,
    /// Names.
    pub names: HashMap<BufferId, String>,
}

/// `name`, or `name2`, `name3`, … if taken.
fn unique(taken: &mut HashSet<String>, name: &str) -> String {
    let mut candidate = name.to_string();
    let mut k = 2;
    while !taken.insert(candidate.clone()) {
        candidate = format!("{name}_{k}");
        k += 1;
    }
    candidate
}
