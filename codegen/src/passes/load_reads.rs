//! load-reads: an array read element by element within a kernel of contractions is read once, as a tile.
//!
//! Before: `for t sequential { g = W[t, a, d] + bias[a, d] + r }`
//! After:  `bias = load bias[a, d];  for t sequential { W = load W[t, a, d];  g = W + bias + r }`
//!
//! A tile is loaded where its elements begin to hold: before the stream if they do not change along it, at the start of
//! a step if they do. It has the axes of its positions alone, so that what an operation broadcasts is not read again per
//! element, and the mapping can place it, have it copied by an engine, or ahead of its use. Positions that are no sums of
//! coordinates stay reads (gathers). Invariant: the same elements are read; arrays that the kernel stores to stay reads.

use std::collections::{BTreeMap, BTreeSet};

use einfall_ir::kernel::atoms::Atom;
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{AxisId, BufferId, Expr, ExprId, Kernel, Node, Op, Plan, Tile, TileId};

use super::rewrite_tiles::{axes_of, new_tile, rewrite, roots_of};

/// Loads what kernels of contractions for `atoms` read along the contractions' axes.
pub fn load_reads(mut plan: Plan, atoms: &[Atom]) -> Plan {
    for k in 0..plan.kernels.len() {
        let mut kernel = plan.kernels[k].clone();
        let axes = if atoms.is_empty() { BTreeSet::new() } else { contracted(&kernel) };
        if axes.is_empty() {
            continue;
        }
        let mut stored = BTreeSet::new();
        kernel.for_each_op(&mut |op, _| {
            if let Op::Store { buffer, .. } = op {
                stored.insert(*buffer);
            }
        });
        let mut body = std::mem::take(&mut kernel.body);
        let mut pass = Reads { plan: &plan, axes: &axes, stored: &stored, outer: BTreeMap::new() };
        pass.nodes(&mut kernel, &mut body);
        kernel.body = body;
        plan.kernels[k] = kernel;
    }
    plan
}

/// Axes that one operand of a contraction has and the other lacks, and those summed.
fn contracted(k: &Kernel) -> BTreeSet<AxisId> {
    let mut axes = BTreeSet::new();
    k.for_each_op(&mut |op, _| {
        if let Op::Contract { a, b, over, .. } = op {
            let (x, y) = (&k.tiles[*a].axes, &k.tiles[*b].axes);
            axes.extend(x.iter().filter(|i| !y.contains(i)));
            axes.extend(y.iter().filter(|i| !x.contains(i)));
            axes.extend(over);
        }
    });
    axes
}

struct Reads<'a> {
    plan: &'a Plan,
    axes: &'a BTreeSet<AxisId>,
    stored: &'a BTreeSet<BufferId>,
    /// Tiles that hold for the rest of the kernel, by their text.
    outer: BTreeMap<String, TileId>,
}

/// The stream around an operation.
struct Around {
    axis: AxisId,
    sequential: bool,
}

impl Reads<'_> {
    fn nodes(&mut self, k: &mut Kernel, nodes: &mut Vec<Node>) {
        let mut made = Vec::with_capacity(nodes.len());
        for mut node in nodes.drain(..) {
            let mut before = Vec::new();
            match &mut node {
                Node::Op(op) => {
                    let mut none = BTreeMap::new();
                    self.op(k, op, None, &mut before, &mut none, &mut Vec::new());
                }
                Node::Stream(s) => {
                    let around = Around { axis: s.axis, sequential: s.sequential };
                    let (mut steps, mut inside) = (BTreeMap::new(), Vec::new());
                    for n in &mut s.body {
                        if let Node::Op(op) = n {
                            self.op(k, op, Some(&around), &mut before, &mut steps, &mut inside);
                        }
                    }
                    s.body.splice(0..0, inside);
                }
            }
            made.append(&mut before);
            made.push(node);
        }
        *nodes = made;
    }

    /// Replaces the reads of one operation; new loads go `before` the stream around it or `inside` it.
    fn op(
        &mut self,
        k: &mut Kernel,
        op: &mut Op,
        around: Option<&Around>,
        before: &mut Vec<Node>,
        steps: &mut BTreeMap<String, TileId>,
        inside: &mut Vec<Node>,
    ) {
        if matches!(op, Op::Load { .. }) {
            return;
        }
        let positions: Vec<ExprId> = match op {
            Op::Store { at, .. } => at.clone(),
            Op::Load { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => Vec::new(),
        };
        roots_of(op, &mut |root| {
            if positions.contains(&root) {
                return root;
            }
            rewrite(k, root, &mut |k, e| {
                let Expr::Read { buffer, at } = k.exprs[e].clone() else { return None };
                if at.is_empty() || self.stored.contains(&buffer) || !at.iter().all(|p| is_sum(k, *p)) {
                    return Some(e);
                }
                let mut axes = axes_of(k, e);
                let steps_along = around.is_some_and(|s| axes.contains(&s.axis));
                axes.retain(|a| around.is_none_or(|s| !s.sequential || s.axis != *a));
                if !axes.iter().any(|a| self.axes.contains(a)) {
                    return Some(e);
                }
                let text = einfall_ir::tile::print::expr_text(self.plan, k, e);
                let (known, place) =
                    if steps_along { (&mut *steps, &mut *inside) } else { (&mut self.outer, &mut *before) };
                let tile = *known.entry(text).or_insert_with(|| {
                    let array = &self.plan.buffers[buffer];
                    let like = Tile { name: String::new(), dtype: array.dtype, axes, space: None, exact: false };
                    let out = new_tile(k, &array.name, &like);
                    place.push(Node::Op(Op::Load { out, buffer, at }));
                    out
                });
                Some(k.exprs.push(Expr::Tile(tile)))
            })
        });
    }
}

/// Whether the position is made of coordinates, extents and numbers by `+`, `-` and `*`.
fn is_sum(k: &Kernel, e: ExprId) -> bool {
    match &k.exprs[e] {
        Expr::Int(_) | Expr::Size(_) | Expr::Coord(_) => true,
        Expr::Binary(BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul, a, b) => is_sum(k, *a) && is_sum(k, *b),
        Expr::Float(_)
        | Expr::Tile(_)
        | Expr::TileAt { .. }
        | Expr::Read { .. }
        | Expr::Unary(..)
        | Expr::Binary(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Rand(_) => false,
    }
}
