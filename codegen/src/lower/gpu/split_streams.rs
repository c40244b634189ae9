//! split-streams: a long stream cut over several tasks, whose results a second kernel merges.
//!
//! ```text
//! kernel k { grid m in M; stream n in N; init; for n { body }; rest }               (split n parts P merge WHERE)
//! →  kernel k       { grid m in M; grid n_part in P'; stream n in L; init; for n { body at n_part·L + n }
//!                     store every carried tile t in k_t[n_part, m, ..] }
//!    kernel k_merge { grid m in M; stream n_part in P'; init; for n_part { load the parts' tiles; join }; rest }
//! ```
//! The step that joins a part comes from the body itself: what the body does to a carried tile by what is carried (an
//! anchor that moved) happens to both sides, and where it joins elements in, the part's value is joined in. So sums add,
//! maxima join, and online softmax's states merge by the monoid its one-pass form derives from (Dao et al.,
//! Flash-Decoding, 2023). Only streams that pass [`order_free::check`] and store nothing may be cut. L is a multiple of
//! the stream's block; elements beyond N contribute the identity, and blocks of them are skipped by the stream's filter.
//! P' is an expression over extents: at most P, at most one part per block, and as many as fill the device a small
//! number of times: with u units of work on s multiprocessors k·s/u parts, where k = ⌈8u/s⌉ rounds within 1 and 4 keep
//! the last round's idle share below an eighth where that is possible. Invariant: the plan computes the same.

use std::collections::{BTreeMap, BTreeSet};

use einfall_ir::analysis::order_free;
use einfall_ir::cascade::Size;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::Scope;
use einfall_ir::mapping::{KernelMapping, Mapping, MergeSite, Split};
use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{
    Axis, AxisId, AxisKind, Buffer, BufferId, BufferKind, Expr, ExprId, Kernel, Node, Op, Plan, Stream, Tile, TileId,
};

use super::{Step, refuse};
use crate::identity::tile_constant;
use crate::passes::rewrite_tiles::{new_tile, rewrite, roots_of, tidy};

/// The plan with every stream that `mapping` splits cut, for a device of `multiprocessors`.
///
/// # Errors
/// The stream depends on its order, or it holds something that cannot be cut yet.
pub fn run(plan: &Plan, mapping: &Mapping, multiprocessors: u64) -> Step<Plan> {
    let mut plan = plan.clone();
    for m in &mapping.kernels {
        let Some(split) = &m.split else { continue };
        let Some(at) = plan.kernels.iter().position(|k| k.name == m.kernel) else { continue };
        if is_split(&plan, &m.kernel) {
            continue;
        }
        if split.merge == MergeSite::Cluster {
            let message = format!("parts of {} merge by {}", m.kernel, split.merge.name());
            return refuse("split", message, "write `merge last_arriver` or `merge second_kernel`");
        }
        let (part, merge) = cut(&mut plan, at, m, split, multiprocessors)?;
        plan.kernels[at] = part;
        plan.kernels.insert(at + 1, merge);
    }
    Ok(plan)
}

/// The axis of parts is called by the stream's axis and this.
pub(super) const PART: &str = "part";

/// The counters of parts that have arrived are called by the kernel and this.
pub(super) const COUNT: &str = "count";

/// Where the mapping says nothing of the merge: parts whose states a step reads at once, so that their loads are in flight
/// together, and elements of a part's tiles that it holds. A warpgroup that arrives last holds four times what a warp
/// does, which is what arrives last among warps and what a kernel of its own is; its parts are an odd number, so that no
/// lanes share them and no warps must meet over them.
fn merged(site: MergeSite, m: &KernelMapping) -> (u64, u64) {
    let warps = m.roles.last().is_some_and(|r| r.scope == Scope::Warp);
    match site {
        MergeSite::LastArriver if !warps => (17, 512),
        MergeSite::LastArriver | MergeSite::Cluster | MergeSite::SecondKernel => (8, 128),
    }
}

/// The kernel that merges the parts of `kernel`.
pub fn merge_name(kernel: &str) -> String {
    format!("{kernel}_merge")
}

/// Whether the plan has the kernel that merges the parts of `kernel`.
pub(super) fn is_split(plan: &Plan, kernel: &str) -> bool {
    plan.kernels.iter().any(|k| k.name == merge_name(kernel))
}

fn constant(n: u64) -> Box<Size> {
    Box::new(Size::Const(n))
}

fn cut(plan: &mut Plan, at: usize, m: &KernelMapping, split: &Split, multiprocessors: u64) -> Step<(Kernel, Kernel)> {
    let kernel = plan.kernels[at].clone();
    let name = &kernel.name;
    let found = kernel.body.iter().position(|n| match n {
        Node::Stream(s) => kernel.axes[s.axis].name == split.axis,
        Node::Op(_) => false,
    });
    let Some(place) = found else {
        return refuse("split", format!("{name} has no outermost stream over {}", split.axis), "split a stream");
    };
    let Node::Stream(stream) = kernel.body[place].clone() else { unreachable!("found as a stream") };
    order_free::check(&kernel, &stream)
        .and_then(|()| order_free::stores_nothing(&stream))
        .or_else(|why| refuse("split", format!("{} of {name} is not cut: {why}", split.axis), "leave out `split`"))?;
    let Some(block) = m.axis(&split.axis).map(|a| a.block).or(kernel.axes[stream.axis].block) else {
        return refuse("blocks", format!("axis {} of kernel {name} has no block", split.axis), "add an `axis` line");
    };
    let grid: Vec<AxisId> = kernel.axes.ids().filter(|a| kernel.axes[*a].kind == AxisKind::Grid).collect();
    let extent = kernel.axes[stream.axis].extent.clone();
    let blocks = Size::CeilDiv(Box::new(extent.clone()), constant(block));
    let tasks = |a: &AxisId| {
        let axis = &kernel.axes[*a];
        let own = m.axis(&axis.name).map(|x| x.block).or(axis.block).unwrap_or(1);
        if own == 1 { axis.extent.clone() } else { Size::CeilDiv(Box::new(axis.extent.clone()), constant(own)) }
    };
    let places: Vec<Size> = ordered(&kernel, m).iter().map(tasks).collect();
    let all = places.iter().cloned().reduce(|n, x| Size::Mul(Box::new(n), Box::new(x)));
    let units = all.unwrap_or(Size::Const(1));
    let units = Box::new(Size::Max(Box::new(units), constant(1)));
    let slots = multiprocessors * split.resident.max(1);
    let rounds = Size::CeilDiv(Box::new(Size::Mul(constant(8), units.clone())), constant(slots));
    let rounds = Size::Max(constant(1), Box::new(Size::Min(Box::new(rounds), constant(4))));
    let fill = Size::Div(Box::new(Size::Mul(Box::new(rounds), constant(slots))), units);
    let most = Size::Min(constant(split.parts.max(1)), Box::new(Size::Min(Box::new(fill), Box::new(blocks.clone()))));
    let parts = Size::Max(constant(1), Box::new(most));
    let cut = Cut { blocks, parts: parts.clone(), block, even: maskable(&stream) };

    let carried = order_free::carried(&kernel, &stream);
    let mut merge = kernel.clone();
    let mut part = kernel;
    let axis_name = format!("{}_{PART}", split.axis);
    let by_part = Axis { name: axis_name.clone(), extent: parts.clone(), kind: AxisKind::Grid, block: Some(1) };
    let by_part = part.axes.push(by_part);
    part.axes[stream.axis].extent = cut.longest();
    // Every tile is one of a part.
    part.tiles.iter_mut().for_each(|(_, t)| t.axes.insert(0, by_part));
    part.body.truncate(place + 1);
    restrict(plan, &mut part, place, by_part, &cut, &extent)?;

    // Where the parts are kept: by part and task, then the tile's own axes.
    let mut kept: Vec<(TileId, BufferId, Vec<AxisId>)> = Vec::new();
    for t in &carried {
        let tile = part.tiles[*t].clone();
        let mut axes = grid.clone();
        axes.extend(tile.axes.iter().copied().filter(|a| !grid.contains(a) && *a != by_part));
        let mut dims = vec![parts.clone()];
        dims.extend(axes.iter().map(|a| part.axes[*a].extent.clone()));
        let label = format!("{}_{}", part.name, tile.name);
        let kind = BufferKind::Workspace;
        let buffer = Buffer { name: label, dtype: tile.dtype, dims, kind, positive: false };
        let buffer = plan.buffers.push(buffer);
        let all: Vec<AxisId> = std::iter::once(by_part).chain(axes.iter().copied()).collect();
        let at = all.iter().map(|a| part.exprs.push(Expr::Coord(*a))).collect();
        let value = part.exprs.push(Expr::Tile(*t));
        part.body.push(Node::Op(Op::Store { buffer, at, axes: all, value, join: None, when: None }));
        kept.push((*t, buffer, axes));
    }

    if split.merge == MergeSite::LastArriver {
        // One counter per block of the launch without its parts.
        let name = format!("{}_{COUNT}", part.name);
        let kind = BufferKind::Workspace;
        plan.buffers.push(Buffer { name, dtype: DType::I32, dims: places, kind, positive: false });
    }

    let (at_once, elements) = merged(split.merge, m);
    merge.name = merge_name(&merge.name);
    merge.axes[stream.axis] = Axis { name: axis_name, extent: parts, kind: AxisKind::Stream, block: Some(at_once) };
    // Axes that every carried tile has, and nothing reduces, are cut over the launch: the merge has little else to do.
    let mut reduced: BTreeSet<AxisId> = BTreeSet::new();
    for n in merge.body.iter().enumerate().filter(|(i, _)| *i != place).map(|(_, n)| n) {
        match n {
            Node::Op(Op::Reduce { over, .. } | Op::Contract { over, .. }) => reduced.extend(over),
            Node::Op(Op::Scan { along, .. }) => reduced.extend([*along]),
            Node::Op(Op::Load { .. } | Op::Store { .. } | Op::Map { .. }) => {}
            Node::Stream(_) => reduced.extend(merge.axes.ids()),
        }
    }
    for a in merge.axes.ids().collect::<Vec<_>>() {
        let everywhere = !carried.is_empty() && carried.iter().all(|t| merge.tiles[*t].axes.contains(&a));
        if merge.axes[a].kind == AxisKind::Inner && everywhere && !reduced.contains(&a) {
            merge.axes[a].kind = AxisKind::Grid;
        }
    }
    blocks_of_merge(&mut merge, &carried, m, elements);
    let body = join(&mut merge, &stream, &kept)?;
    merge.body[place] = Node::Stream(Stream { filter: None, body, ..stream });
    Ok((tidy(part), tidy(merge)))
}

/// Blocks of the merge that hold about so many elements of a part's largest tile: inner axes as the parts have them, axes
/// of the launch from the last in powers of two that divide the parts' blocks.
fn blocks_of_merge(merge: &mut Kernel, carried: &BTreeSet<TileId>, m: &KernelMapping, elements: u64) {
    let own = |a: &Axis| m.axis(&a.name).map(|x| x.block).or(a.block);
    let within = |merge: &Kernel, a: AxisId| carried.iter().any(|t| merge.tiles[*t].axes.contains(&a));
    let mut room = elements;
    for a in merge.axes.ids().filter(|a| merge.axes[*a].kind == AxisKind::Inner).collect::<Vec<_>>() {
        let block = own(&merge.axes[a]);
        merge.axes[a].block = block;
        room /= if within(merge, a) { block.unwrap_or(1).max(1) } else { 1 };
    }
    for a in merge.axes.ids().filter(|a| merge.axes[*a].kind == AxisKind::Grid).collect::<Vec<_>>().into_iter().rev() {
        // The largest power of two: lanes hold those evenly.
        let part = 1 << own(&merge.axes[a]).unwrap_or(1).trailing_zeros();
        let block = part.min(1 << room.max(1).ilog2());
        merge.axes[a].block = Some(block);
        room /= if within(merge, a) { block } else { 1 };
    }
}

/// The grid axes in the order of the launch's dimensions.
fn ordered(k: &Kernel, m: &KernelMapping) -> Vec<AxisId> {
    let grid = |id: &AxisId| k.axes[*id].kind == AxisKind::Grid;
    let named = m.work.order.iter().filter_map(|n| k.axes.ids().find(|a| k.axes[*a].name == *n && grid(a)));
    let mut out: Vec<AxisId> = named.collect();
    let rest: Vec<AxisId> = k.axes.ids().filter(|a| grid(a) && !out.contains(a)).collect();
    out.extend(rest);
    out
}

/// A stream's blocks over its parts. Evenly: part p has blocks ⌊p·blocks/parts⌋ up to the next part's first, so that
/// lengths differ by one block. Otherwise every part but the last has as many blocks as the longest.
struct Cut {
    blocks: Size,
    parts: Size,
    block: u64,
    even: bool,
}

/// Whether every contraction over the stream has an operand that is computed there, which is 0 where it is masked: then
/// a part may end before the longest one does. Loads read on.
fn maskable(s: &Stream) -> bool {
    s.body.iter().all(|n| match n {
        Node::Op(Op::Contract { a, b, over, .. }) if over.contains(&s.axis) => mapped(s, *a) || mapped(s, *b),
        Node::Op(_) | Node::Stream(_) => true,
    })
}

/// Whether the stream's step computes the tile element by element.
fn mapped(s: &Stream, t: TileId) -> bool {
    s.body.iter().any(|n| matches!(n, Node::Op(Op::Map { out, .. }) if *out == t))
}

impl Cut {
    /// Coordinates of the longest part.
    fn longest(&self) -> Size {
        let most = Size::CeilDiv(Box::new(self.blocks.clone()), Box::new(self.parts.clone()));
        Size::Mul(Box::new(most), constant(self.block))
    }

    /// The first coordinate of part `number`.
    fn start(&self, k: &mut Kernel, number: ExprId) -> ExprId {
        if !self.even {
            let longest = k.exprs.push(Expr::Size(self.longest()));
            return k.exprs.push(Expr::Binary(BinaryOp::Mul, number, longest));
        }
        let blocks = k.exprs.push(Expr::Size(self.blocks.clone()));
        let before = k.exprs.push(Expr::Binary(BinaryOp::Mul, number, blocks));
        let parts = k.exprs.push(Expr::Size(self.parts.clone()));
        let first = k.exprs.push(Expr::Binary(BinaryOp::Div, before, parts));
        let block = k.exprs.push(Expr::Int(self.block as i64));
        k.exprs.push(Expr::Binary(BinaryOp::Mul, first, block))
    }
}

/// Moves the stream at `place` to its part: coordinates start where the part does, elements from the next part's start
/// and from `extent` on contribute nothing.
fn restrict(plan: &Plan, k: &mut Kernel, place: usize, by_part: AxisId, cut: &Cut, extent: &Size) -> Step<()> {
    let Node::Stream(mut s) = k.body[place].clone() else { unreachable!("the caller found a stream") };
    let own = k.exprs.push(Expr::Coord(s.axis));
    let number = k.exprs.push(Expr::Coord(by_part));
    let one = k.exprs.push(Expr::Int(1));
    let following = k.exprs.push(Expr::Binary(BinaryOp::Add, number, one));
    let (start, next) = (cut.start(k, number), cut.start(k, following));
    let global = k.exprs.push(Expr::Binary(BinaryOp::Add, start, own));
    let whole = k.exprs.push(Expr::Size(extent.clone()));
    let end = if cut.even { k.exprs.push(Expr::Binary(BinaryOp::Min, next, whole)) } else { whole };
    let inside = k.exprs.push(Expr::Binary(BinaryOp::Lt, global, end));
    let axis = s.axis;
    // Loads that read 0 beyond the array need no mask of their own.
    let bounded = |k: &Kernel, t: TileId| {
        s.body.iter().any(|n| match n {
            Node::Op(Op::Load { out, buffer, at }) if *out == t => {
                at.iter().zip(&plan.buffers[*buffer].dims).any(|(e, d)| k.exprs[*e] == Expr::Coord(axis) && d == extent)
            }
            Node::Op(_) | Node::Stream(_) => false,
        })
    };
    let mut masked: BTreeSet<TileId> = BTreeSet::new();
    for n in &s.body {
        let Node::Op(Op::Contract { a, b, over, .. }) = n else { continue };
        if !over.contains(&axis) {
            continue;
        }
        if !cut.even && bounded(k, *a) && bounded(k, *b) {
            continue;
        }
        match [a, b].into_iter().find(|t| mapped(&s, **t)) {
            Some(t) => masked.insert(*t),
            None => {
                let message = format!("operands of {} are not known to be 0 beyond the extent", k.tiles[*a].name);
                return refuse("split", message, "copy an operand into a tile of its own");
            }
        };
    }
    let moved = |k: &mut Kernel, root: ExprId| {
        rewrite(k, root, &mut |k, e| (k.exprs[e] == Expr::Coord(axis)).then_some(global))
    };
    let filter = s.filter.map(|f| moved(k, f));
    let mut body = std::mem::take(&mut s.body);
    for n in &mut body {
        let Node::Op(op) = n else { continue };
        roots_of(op, &mut |e| moved(k, e));
        let (value, other) = match op {
            Op::Reduce { out, op, value, over, .. } if over.contains(&axis) => {
                (value, tile_constant(op.identity(), k.tiles[out[0]].dtype))
            }
            Op::Map { out, value } if masked.contains(out) => (value, tile_constant(0.0, k.tiles[*out].dtype)),
            Op::Reduce { .. }
            | Op::Map { .. }
            | Op::Load { .. }
            | Op::Store { .. }
            | Op::Contract { .. }
            | Op::Scan { .. } => continue,
        };
        let other = k.exprs.push(other);
        *value = k.exprs.push(Expr::Select(inside, *value, other));
    }
    s.body = body;
    s.filter = Some(match filter {
        Some(f) => k.exprs.push(Expr::Binary(BinaryOp::And, f, inside)),
        None => inside,
    });
    k.body[place] = Node::Stream(s);
    Ok(())
}

/// One step of the merge: loads a block of parts' tiles and joins them into the carried ones.
fn join(k: &mut Kernel, s: &Stream, kept: &[(TileId, BufferId, Vec<AxisId>)]) -> Step<Vec<Node>> {
    let mut out = Vec::new();
    // The other side's tile for each tile; itself once both sides are one.
    let mut other: BTreeMap<TileId, TileId> = BTreeMap::new();
    for (t, buffer, axes) in kept {
        let like = k.tiles[*t].clone();
        let theirs = beside(k, &like, s.axis);
        let at = std::iter::once(s.axis).chain(axes.iter().copied()).collect::<Vec<_>>();
        let at = at.into_iter().map(|a| k.exprs.push(Expr::Coord(a))).collect();
        out.push(Node::Op(Op::Load { out: theirs, buffer: *buffer, at }));
        other.insert(*t, theirs);
    }
    let carried: BTreeSet<TileId> = kept.iter().map(|x| x.0).collect();
    let mut fresh: BTreeSet<TileId> = BTreeSet::new();
    for n in &s.body {
        let Node::Op(op) = n else { continue };
        let (t, with) = match op {
            Op::Reduce { out, op, carry: true, .. } => match (op, out.as_slice()) {
                (op, [t]) if !op.selects_argument() => (*t, *op),
                _ => return refuse("split", "parts of this reduction have no merge yet", "leave out `split`"),
            },
            Op::Contract { out, carry: true, .. } => (*out, ReduceOp::Sum),
            Op::Map { out: t, value } => {
                let mut reads = Vec::new();
                let mut local = k.tiles[*t].axes.contains(&s.axis);
                k.walk(*value, &mut |_, e| match e {
                    Expr::Tile(u) | Expr::TileAt { tile: u, .. } => reads.push(*u),
                    Expr::Coord(a) => local |= *a == s.axis,
                    Expr::Int(_)
                    | Expr::Float(_)
                    | Expr::Size(_)
                    | Expr::Read { .. }
                    | Expr::Unary(..)
                    | Expr::Binary(..)
                    | Expr::Select(..)
                    | Expr::Cast(..)
                    | Expr::Rand(_) => {}
                });
                if local || reads.iter().any(|u| fresh.contains(u)) {
                    fresh.insert(*t);
                    continue;
                }
                fresh.remove(t);
                if reads.iter().any(|u| other.get(u).is_some_and(|o| o != u)) {
                    // Theirs first: ours may overwrite what both read.
                    let theirs = match other.get(t) {
                        Some(o) if o != t => *o,
                        _ => {
                            let like = k.tiles[*t].clone();
                            beside(k, &like, s.axis)
                        }
                    };
                    let moved = rewrite(k, *value, &mut |k, e| match k.exprs[e].clone() {
                        Expr::Tile(u) => other.get(&u).filter(|o| **o != u).map(|o| k.exprs.push(Expr::Tile(*o))),
                        Expr::TileAt { tile, at } => {
                            let o = other.get(&tile).filter(|o| **o != tile);
                            o.map(|o| k.exprs.push(Expr::TileAt { tile: *o, at }))
                        }
                        _ => None,
                    });
                    out.push(Node::Op(Op::Map { out: theirs, value: moved }));
                    other.insert(*t, theirs);
                } else {
                    other.insert(*t, *t);
                }
                out.push(Node::Op(Op::Map { out: *t, value: *value }));
                continue;
            }
            Op::Load { .. }
            | Op::Reduce { carry: false, .. }
            | Op::Contract { carry: false, .. }
            | Op::Scan { carry: None, .. }
                if !op.outs().iter().any(|t| carried.contains(t)) =>
            {
                fresh.extend(op.outs());
                continue;
            }
            Op::Store { .. } => continue,
            Op::Load { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {
                return refuse("split", "a carried tile is written in a way that has no merge", "leave out `split`");
            }
        };
        let theirs = other.get(&t).copied().unwrap_or(t);
        let value = k.exprs.push(Expr::Tile(theirs));
        out.push(Node::Op(Op::Reduce { out: vec![t], op: with, value, over: vec![s.axis], carry: true }));
        other.insert(t, t);
    }
    Ok(out)
}

/// A tile for the other side: one of every part of the block.
fn beside(k: &mut Kernel, like: &Tile, part: AxisId) -> TileId {
    let axes = std::iter::once(part).chain(like.axes.iter().copied()).collect();
    new_tile(k, &format!("{}_in", like.name), &Tile { axes, ..like.clone() })
}
