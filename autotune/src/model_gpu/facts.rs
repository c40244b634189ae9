//! What the mapping model asks of a kernel: its axes with extents, its operations by stream, what each touches.
//!
//! Invariant: a function of the plan and the sizes alone; nothing here depends on a choice. Extents that are not known
//! get nominal values, which only the cost sees, except for inner axes: their blocks must cover them.

use einfall_ir::analysis::order_free;
use einfall_ir::arena::Id;
use einfall_ir::tile::{AxisId, AxisKind, Expr, ExprId, Kernel, Node, Op, Place, Plan, TileId};

/// Nominal extent of an axis that blocks cut, where no size is given.
const LONG: u64 = 4096;
/// Nominal extent of an axis that is walked point by point.
const SHORT: u64 = 8;
/// Nominal extent of an inner axis.
const INNER: u64 = 128;

/// An axis with what is known of it.
#[derive(Clone, Debug)]
pub struct AxisFacts {
    /// Its name.
    pub name: String,
    /// How it is walked.
    pub kind: AxisKind,
    /// Its extent, if sizes or the plan give it.
    pub extent: Option<u64>,
    /// Whether the plan itself fixes the extent.
    pub fixed: bool,
    /// Its block, where the plan declares it.
    pub declared: Option<u64>,
    /// Whether it is walked one by one by a sequential stream.
    pub sequential: bool,
}

impl AxisFacts {
    /// Whether every block has one coordinate.
    pub fn single(&self) -> bool {
        self.sequential || self.declared == Some(1) || (self.kind == AxisKind::Inner && self.extent == Some(1))
    }

    /// The extent, or a nominal one; `cut`: whether blocks of several coordinates cut it.
    pub fn nominal(&self, cut: bool) -> u64 {
        self.extent.unwrap_or(match self.kind {
            AxisKind::Inner => INNER,
            AxisKind::Grid | AxisKind::Stream if cut || self.kind == AxisKind::Stream => LONG,
            AxisKind::Grid | AxisKind::Stream => SHORT,
        })
    }
}

/// An operation with its place.
#[derive(Clone, Debug)]
pub struct OpFacts<'a> {
    /// The operation.
    pub op: &'a Op,
    /// Its name in mappings.
    pub name: String,
    /// The stream around it.
    pub stream: Option<usize>,
    /// Tiles it reads, sorted.
    pub reads: Vec<TileId>,
}

impl OpFacts<'_> {
    /// Whether it touches the tile.
    pub fn touches(&self, t: TileId) -> bool {
        self.reads.contains(&t) || self.op.outs().contains(&t)
    }
}

/// A stream.
#[derive(Clone, Debug)]
pub struct StreamFacts {
    /// The axis walked.
    pub axis: AxisId,
    /// Axes its filter depends on, the walked one apart.
    pub filtered: Vec<AxisId>,
    /// Whether it has a filter.
    pub filter: Option<ExprId>,
    /// Whether it may be cut into parts that are merged.
    pub parts: bool,
    /// Whether it may be walked from its last block to its first.
    pub turns: bool,
}

/// A kernel as the model sees it.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Its axes, by position.
    pub axes: Vec<AxisFacts>,
    /// Its operations in order.
    pub ops: Vec<OpFacts<'a>>,
    /// Its streams in order.
    pub streams: Vec<StreamFacts>,
}

/// Why a kernel has no GPU mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// The rule.
    pub constraint: String,
    /// What breaks it.
    pub message: String,
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.constraint, self.message)
    }
}

impl std::error::Error for Unsupported {}

pub(super) fn unsupported<T>(constraint: &str, message: impl Into<String>) -> Result<T, Unsupported> {
    Err(Unsupported { constraint: constraint.into(), message: message.into() })
}

impl<'a> Facts<'a> {
    /// The facts of `kernel` for `sizes` (one value per rank of the plan).
    ///
    /// # Errors
    /// Streams in streams and reversed streams have no lowering.
    pub fn new(plan: &'a Plan, kernel: &'a Kernel, sizes: Option<&[u64]>) -> Result<Facts<'a>, Unsupported> {
        let mut facts = Facts { plan, kernel, axes: Vec::new(), ops: Vec::new(), streams: Vec::new() };
        let names = kernel.op_names(plan);
        for (place, node) in kernel.body.iter().enumerate() {
            match node {
                Node::Op(op) => facts.push(op, None, &names),
                Node::Stream(s) => {
                    if s.reverse {
                        return unsupported("stream order", "reversed streams have no GPU lowering");
                    }
                    let mut filtered = Vec::new();
                    if let Some(f) = s.filter {
                        kernel.walk(f, &mut |_, e| {
                            if let Expr::Coord(a) = e
                                && *a != s.axis
                                && !filtered.contains(a)
                            {
                                filtered.push(*a);
                            }
                        });
                    }
                    let stream = facts.streams.len();
                    facts.streams.push(StreamFacts {
                        axis: s.axis,
                        filtered,
                        filter: s.filter,
                        parts: order_free::parts(kernel, place).is_ok(),
                        turns: !s.sequential && order_free::check(kernel, s).is_ok(),
                    });
                    for inner in &s.body {
                        match inner {
                            Node::Op(op) => facts.push(op, Some(stream), &names),
                            Node::Stream(_) => {
                                return unsupported("nested streams", "streams in streams have no GPU lowering");
                            }
                        }
                    }
                }
            }
        }
        let values: Vec<Option<u64>> = plan
            .ranks
            .iter()
            .enumerate()
            .map(|(i, (_, r))| r.fixed.or_else(|| sizes.and_then(|s| s.get(i).copied())))
            .collect();
        for (id, a) in kernel.axes.iter() {
            let mut known = true;
            let mut at = vec![0; values.len()];
            a.extent.for_each_rank(&mut |r| match values[r.index()] {
                Some(n) => at[r.index()] = n,
                None => known = false,
            });
            let extent = if known { a.extent.eval(&at).ok() } else { None };
            let mut fixed = true;
            a.extent.for_each_rank(&mut |r| fixed &= plan.ranks[r].fixed.is_some());
            let sequential = kernel.body.iter().any(|n| matches!(n, Node::Stream(s) if s.axis == id && s.sequential));
            facts.axes.push(AxisFacts {
                name: a.name.clone(),
                kind: a.kind,
                extent,
                fixed,
                declared: a.block,
                sequential,
            });
        }
        Ok(facts)
    }

    /// The same facts with inner axes of unknown extent as long as `length` says, by name.
    pub fn with_inner(mut self, length: impl Fn(&str) -> Option<u64>) -> Facts<'a> {
        for a in self.axes.iter_mut().filter(|a| a.kind == AxisKind::Inner && a.extent.is_none()) {
            a.extent = length(&a.name);
        }
        self
    }

    /// Whether some inner axis has an unknown extent.
    pub fn open(&self) -> bool {
        self.axes.iter().any(|a| a.kind == AxisKind::Inner && a.extent.is_none())
    }

    fn push(&mut self, op: &'a Op, stream: Option<usize>, names: &[String]) {
        let name = names[self.ops.len()].clone();
        let reads = reads(self.kernel, op);
        self.ops.push(OpFacts { op, name, stream, reads });
    }

    /// An axis.
    pub fn axis(&self, a: AxisId) -> &AxisFacts {
        &self.axes[a.index()]
    }

    /// The stream that tasks may share in parts: the only one, at known sizes, whose states can be merged.
    pub fn shared_stream(&self) -> Option<usize> {
        let known = self.axes.iter().all(|a| a.extent.is_some());
        self.streams.iter().position(|s| s.parts).filter(|_| known)
    }

    /// What a part of the shared stream leaves for the merge.
    pub fn states(&self) -> Vec<TileId> {
        let axis = self.shared_stream().map(|i| self.streams[i].axis);
        let stream = self.kernel.body.iter().find_map(|n| match n {
            Node::Stream(s) if Some(s.axis) == axis => Some(s),
            Node::Stream(_) | Node::Op(_) => None,
        });
        stream.map_or(Vec::new(), |s| order_free::carried(self.kernel, s).into_iter().collect())
    }

    /// Axes of a tile.
    pub fn tile_axes(&self, t: TileId) -> &'a [AxisId] {
        &self.kernel.tiles[t].axes
    }

    /// Contractions: their operations' positions.
    pub fn contractions(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.ops.len()).filter(|i| matches!(self.ops[*i].op, Op::Contract { .. }))
    }

    /// The operation that fills a tile from device memory, if one does.
    pub fn load_of(&self, t: TileId) -> Option<usize> {
        self.ops.iter().position(|o| matches!(o.op, Op::Load { out, .. } if *out == t))
    }

    /// The operations that write a tile.
    pub fn writers(&self, t: TileId) -> Vec<usize> {
        (0..self.ops.len()).filter(|i| self.ops[*i].op.outs().contains(&t)).collect()
    }

    /// The axis that array position `e` is, if it is `axis + uniform` over the axes `sized`; `Some(None)`: uniform.
    pub fn linear(&self, e: ExprId, sized: &dyn Fn(AxisId) -> bool) -> Option<Option<AxisId>> {
        use einfall_ir::ops::BinaryOp;
        let mut found = Vec::new();
        self.kernel.walk(e, &mut |_, x| {
            if let Expr::Coord(a) = x
                && sized(*a)
            {
                found.push(Some(*a));
            } else if matches!(x, Expr::Tile(_) | Expr::TileAt { .. }) {
                found.push(None);
            }
        });
        match found.as_slice() {
            [] => Some(None),
            [Some(a)] => {
                // Reached through sums only, and not subtracted: a step of one.
                let mut at = e;
                loop {
                    let node = &self.kernel.exprs[at];
                    if *node == Expr::Coord(*a) {
                        return Some(Some(*a));
                    }
                    let Expr::Binary(op @ (BinaryOp::Add | BinaryOp::Sub), x, y) = node else { return None };
                    let mut left = false;
                    self.kernel.walk(*x, &mut |_, z| left |= *z == Expr::Coord(*a));
                    if !left && *op == BinaryOp::Sub {
                        return None;
                    }
                    at = if left { *x } else { *y };
                }
            }
            _ => None,
        }
    }
}

/// The tiles an operation reads, as the lowering counts them.
fn reads(kernel: &Kernel, op: &Op) -> Vec<TileId> {
    let mut out = Vec::new();
    for root in op.roots() {
        kernel.walk(root, &mut |_, e| {
            if let Expr::Tile(t) | Expr::TileAt { tile: t, .. } = e {
                out.push(*t);
            }
        });
    }
    match op {
        Op::Contract { out: o, a, b, carry, .. } => {
            out.extend([*a, *b]);
            out.extend(carry.then_some(*o));
        }
        Op::Reduce { out: o, carry, .. } if *carry => out.extend(o),
        Op::Scan { carry, .. } => out.extend(*carry),
        Op::Reduce { .. } | Op::Load { .. } | Op::Store { .. } | Op::Map { .. } => {}
    }
    out.sort();
    out.dedup();
    out
}

/// Pairs (axis of the operation, axis of the tile read in its place).
pub(super) fn renamed(kernel: &Kernel, op: &Op) -> Vec<(AxisId, AxisId)> {
    let mut pairs = Vec::new();
    for root in op.roots() {
        kernel.walk(root, &mut |_, e| {
            if let Expr::TileAt { tile, at } = e {
                for (own, place) in kernel.tiles[*tile].axes.iter().zip(at) {
                    if let Place::Axis(a) = place
                        && a != own
                        && !pairs.contains(&(*a, *own))
                    {
                        pairs.push((*a, *own));
                    }
                }
            }
        });
    }
    pairs
}
