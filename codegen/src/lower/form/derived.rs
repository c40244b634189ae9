//! Groups whose streams collapse into one: the one-pass form of `analysis::derive` as a single stream.
//!
//! The group is derived as a cascade of its own. What comes back are anchors and accumulators with element-wise
//! steps; a block of the stream joins its anchors first, moves the accumulators to the new anchors once, and then adds
//! the block's contributions relative to them (the accumulators are linear, so a block is as good as an element).

use std::collections::{HashMap, HashSet};

use einfall_ir::analysis::derive::{Derivation, derive};
use einfall_ir::arena::Id;
use einfall_ir::cascade::{
    Cascade, Einsum, Expr, ExprId, IndexId, Output, OutputSource, Rank, RankId, Reducer, Size, Stmt, TensorId,
    TensorKind,
};
use einfall_ir::dtype::DType;
use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{self, AxisId, AxisKind, BufferId, Kernel, Op, TileId};

use super::emit::{Emitter, PlanTypes};
use super::group::{Classes, Program, Role, Schedule};
use super::program::{Contraction, Kind, Node, plain_access, reductions_of_dims};
use super::stream::{common_guard, emit_group, emit_statement};
use crate::identity::identity;
use crate::passes::Unsupported;
use crate::passes::fix_extents::replace_ranks;
use crate::passes::propagate_support::{guard_of, split_conjuncts};
use crate::passes::rewrite::mentions;

/// The one-pass form of a schedule with several streams, if it has one and no stored tensor keeps the streamed axis.
pub(super) fn derive_schedule(program: &Program<'_>, s: &Schedule) -> Option<Derivation> {
    let stream = s.stream?;
    let several = s.levels.iter().any(|(level, role)| *level > 0 && *role != Role::Row);
    let keeps = (0..s.nodes.len()).any(|p| s.levels[p].1 == Role::Inside && s.stored.contains(&s.nodes[p]));
    if !several || keeps {
        return None;
    }
    let (sub, rank) = sub_cascade(program, s, stream);
    let mut d = guarded(derive(&sub, rank)?);
    let extent = program.cascade.indices[stream].extent.clone();
    if extent != Size::Rank(rank) {
        replace_ranks(&mut d.cascade, &mut |r| (r == rank).then(|| extent.clone()));
    }
    // Without a stream of its own, the derived form must be one kernel as it stands.
    (d.stream.is_some() || ordinary(program, s, &d.cascade).is_ok_and(|o| o.is_some())).then_some(d)
}

/// The group as a cascade: other tensors are inputs, stored ones outputs, guards filters; and the streamed rank, a
/// new one where its extent is shared with another axis or is no rank.
fn sub_cascade(program: &Program<'_>, s: &Schedule, stream: IndexId) -> (Cascade, RankId) {
    let mut c = program.cascade.clone();
    let extent = c.indices[stream].extent.clone();
    let streamed = |i: IndexId| s.classes.find(i) == stream;
    let members: Vec<&Node> = s.nodes.iter().map(|&k| &program.nodes[k]).collect();
    let shared = members.iter().flat_map(|n| n.indices()).any(|i| !streamed(i) && c.indices[i].extent == extent);
    let rank = match extent {
        Size::Rank(r) if !shared => r,
        _ => {
            let span = c.indices[stream].span;
            let name = (0..).map(|k| format!("R{k}")).find(|n| c.rank(n).is_none()).expect("some name is free");
            c.ranks.push(Rank { name, fixed: None, span })
        }
    };
    for i in c.indices.ids().collect::<Vec<_>>() {
        if streamed(i) {
            c.indices[i].extent = Size::Rank(rank);
            c.indices[i].rank = Some(rank);
        }
    }
    let written: HashSet<TensorId> = members.iter().flat_map(|n| n.einsum.targets.iter().map(|t| t.tensor)).collect();
    c.params.clear();
    for n in &members {
        for (t, _) in &n.reads {
            if !written.contains(t) && !c.params.contains(t) {
                c.params.push(*t);
                c.tensors[*t].kind = TensorKind::Input;
            }
        }
    }
    c.stmts = members.iter().map(|n| Stmt::Einsum(with_filter(&mut c, n))).collect();
    c.requires.clear();
    c.outputs.clear();
    for &k in &s.stored {
        for t in &program.nodes[k].einsum.targets {
            let tensor = &mut c.tensors[t.tensor];
            tensor.kind = TensorKind::Output;
            let (name, dtype, dims, span) = (tensor.name.clone(), tensor.dtype, tensor.dims.clone(), tensor.span);
            c.outputs.push(Output { name, dtype, dims, source: OutputSource::Whole(t.tensor), span });
        }
    }
    (c, rank)
}

/// A statement with the guard of its reduction as its filter. What a filter says of all points of a fiber would be the
/// statement's support; a guard leaves a value over nothing there, so that each of its conditions is of points.
fn with_filter(c: &mut Cascade, node: &Node) -> Einsum {
    let mut e = node.einsum.clone();
    if let Kind::Reduce { op, body, over } = &node.kind
        && let Some(cond) = guard_of(c, *body, *op, c.tensors[node.target()].dtype)
        && let Expr::Select(_, value, _) = c.exprs[*body]
    {
        e.value = c.push_expr(Expr::Reduce { op: Reducer::Op(*op), over: over.clone(), body: value }, e.span);
        let mut all = Vec::new();
        split_conjuncts(c, cond, &mut all);
        for p in all {
            let p = if over.iter().any(|i| mentions(c, p, *i)) {
                p
            } else {
                let n = c.push_expr(Expr::Index(over[0]), e.span);
                let here = c.push_expr(Expr::Binary(BinaryOp::Eq, n, n), e.span);
                c.push_expr(Expr::Binary(BinaryOp::Mul, p, here), e.span)
            };
            e.filter = Some(and(c, e.filter, p));
        }
    }
    e
}

fn and(c: &mut Cascade, all: Option<ExprId>, p: ExprId) -> ExprId {
    all.map_or(p, |o| c.push_expr(Expr::Binary(BinaryOp::And, o, p), c.spans[p.index()]))
}

/// Emits a derived group as one kernel.
pub(super) fn emit_derived(
    program: &Program<'_>,
    s: &Schedule,
    d: &Derivation,
    name: String,
    buffers: &HashMap<TensorId, BufferId>,
    types: &PlanTypes,
) -> Result<Kernel, Unsupported> {
    let mut kernel = emit_form(program, s, d, name, buffers, types)?;
    let sums = s.nodes.iter().filter(|k| matches!(program.nodes[**k].kind, Kind::Reduce { op: ReduceOp::Sum, .. }));
    keep_exact(&mut kernel, sums.count());
    Ok(kernel)
}

/// Where more sums were derived than the text's `before` and results are added to or subtracted from one another, the
/// contractions among them keep their operands: what the text may lose in one operand, differences would magnify.
fn keep_exact(kernel: &mut Kernel, before: usize) {
    let mut sums: Vec<TileId> = Vec::new();
    let mut maps: Vec<(TileId, tile::ExprId)> = Vec::new();
    let mut roots: Vec<tile::ExprId> = Vec::new();
    kernel.for_each_op(&mut |op, _| match op {
        Op::Contract { out, .. } => sums.push(*out),
        Op::Reduce { out, op: ReduceOp::Sum, .. } => sums.extend(out),
        Op::Map { out, value } => {
            maps.push((*out, *value));
            roots.push(*value);
        }
        Op::Store { value, .. } => roots.push(*value),
        Op::Reduce { .. } | Op::Load { .. } | Op::Scan { .. } => {}
    });
    sums.sort();
    sums.dedup();
    if sums.len() <= before {
        return;
    }
    let mut cancelling: HashSet<TileId> = HashSet::new();
    for root in roots {
        kernel.walk(root, &mut |_, e| {
            if let tile::Expr::Binary(BinaryOp::Add | BinaryOp::Sub, a, b) = e {
                let (x, y) = (summed(kernel, &sums, &maps, *a), summed(kernel, &sums, &maps, *b));
                if !x.is_empty() && !y.is_empty() {
                    cancelling.extend(x.into_iter().chain(y));
                }
            }
        });
    }
    cancelling.into_iter().for_each(|t| kernel.tiles[t].exact = true);
}

/// The sums that an expression reads, through tiles made of them.
fn summed(kernel: &Kernel, sums: &[TileId], maps: &[(TileId, tile::ExprId)], root: tile::ExprId) -> HashSet<TileId> {
    let (mut found, mut seen, mut open) = (HashSet::new(), HashSet::new(), vec![root]);
    while let Some(root) = open.pop() {
        kernel.walk(root, &mut |_, e| {
            let (tile::Expr::Tile(t) | tile::Expr::TileAt { tile: t, .. }) = e else { return };
            if sums.contains(t) {
                found.insert(*t);
            } else if seen.insert(*t) {
                open.extend(maps.iter().filter(|(out, _)| out == t).map(|(_, value)| *value));
            }
        });
    }
    found
}

fn emit_form(
    program: &Program<'_>,
    s: &Schedule,
    d: &Derivation,
    name: String,
    buffers: &HashMap<TensorId, BufferId>,
    types: &PlanTypes,
) -> Result<Kernel, Unsupported> {
    let c = &d.cascade;
    let by_name: HashMap<&str, BufferId> =
        buffers.iter().map(|(t, b)| (program.cascade.tensors[*t].name.as_str(), *b)).collect();
    let buffers: HashMap<TensorId, BufferId> =
        c.tensors.iter().filter_map(|(id, t)| Some((id, *by_name.get(t.name.as_str())?))).collect();
    let written = |t: &TensorId| d.cascade.outputs.iter().any(|o| o.source == OutputSource::Whole(*t));
    let mut before = Vec::new();
    let mut after = Vec::new();
    for (k, stmt) in c.stmts.iter().enumerate() {
        if let Stmt::Einsum(e) = stmt {
            let list = if d.stream.is_none_or(|at| k < at) { &mut before } else { &mut after };
            list.push(Node::new(c, e)?);
        }
    }
    let Some(index) = d.index else {
        let (program, schedule) = ordinary(program, s, c)?.expect("accepted as one kernel");
        return emit_group(&program, &schedule, name, &buffers, types);
    };
    let mut classes = unify(c, d, &before, &after);
    for (i, j) in together(program, s, c, before.iter().chain(&after)) {
        classes.join(i, j);
    }

    let find = classes.clone();
    let mut em = Emitter::new(c, name, &buffers, move |i| find.find(i));
    for i in grid(program, s, c, before.iter().chain(&after)) {
        em.axis(i, AxisKind::Grid);
    }
    let axis = em.axis(index, AxisKind::Stream);
    em.set_blocked(index);
    let inside = |n: &Node| n.einsum.free.iter().any(|&i| classes.find(i) == classes.find(index));
    for n in before.iter().filter(|n| !inside(n)) {
        emit_statement(&mut em, n, written(&n.target()), true, types)?;
    }
    for (state, dims, initial) in d
        .anchors
        .iter()
        .map(|a| (a.state, &a.dims, a.initial))
        .chain(d.accumulators.iter().map(|a| (a.state, &a.dims, a.initial)))
    {
        let tensor = &c.tensors[state];
        let axes = em.axes(dims);
        let out = em.tile(&tensor.name, tensor.dtype, axes);
        let value = em.convert(initial)?;
        em.push(Op::Map { out, value });
        em.incoming.insert(state, out);
    }
    em.open(axis);
    for n in before.iter().filter(|n| inside(n)) {
        emit_statement(&mut em, n, false, true, types)?;
    }
    step(&mut em, c, d, axis, index, types)?;
    let carried: Vec<(ExprId, ReduceOp, DType)> = d
        .anchors
        .iter()
        .map(|a| (a.contribution, ReduceOp::Max, a.state))
        .chain(d.accumulators.iter().map(|a| (a.contribution, a.op, a.state)))
        .map(|(body, op, state)| (body, op, c.tensors[state].dtype))
        .collect();
    let filter = common_guard(&mut em, c, &carried)?;
    em.close(false, false, filter);
    // Finals read the last point of each state.
    em.outgoing = em.incoming.clone();
    for n in &after {
        let read = after.iter().any(|m| m.reads.iter().any(|(t, _)| *t == n.target()));
        emit_statement(&mut em, n, written(&n.target()), read, types)?;
    }
    Ok(em.finish())
}

/// The derivation with each filter as a guard of what it filters: what is removed contributes the identity. What is updated
/// in place keeps the conditions of what is written.
fn guarded(mut d: Derivation) -> Derivation {
    let c = &mut d.cascade;
    let guard = |c: &mut Cascade, body: ExprId, filter: Option<ExprId>, op: ReduceOp, tensor: TensorId| {
        let Some(cond) = filter else { return body };
        let span = c.spans[cond.index()];
        let other = identity(c, op, c.tensors[tensor].dtype, span);
        c.push_expr(Expr::Select(cond, body, other), span)
    };
    for a in &mut d.anchors {
        a.contribution = guard(c, a.contribution, a.filter.take(), ReduceOp::Max, a.state);
    }
    for a in &mut d.accumulators {
        a.contribution = guard(c, a.contribution, a.filter.take(), a.op, a.state);
    }
    let mut stmts = std::mem::take(&mut c.stmts);
    for stmt in &mut stmts {
        let Stmt::Einsum(e) = stmt else { continue };
        let (Some(filter), Expr::Reduce { op: Reducer::Op(op), over, body }) = (e.filter, c.exprs[e.value].clone())
        else {
            continue;
        };
        let target = e.targets[0].tensor;
        let (mut all, mut points) = (Vec::new(), None);
        split_conjuncts(c, filter, &mut all);
        e.filter = None;
        for p in all {
            let kept = c.tensors[target].kind == TensorKind::InOut && !over.iter().any(|i| mentions(c, p, *i));
            let list = if kept { &mut e.filter } else { &mut points };
            *list = Some(and(c, *list, p));
        }
        let body = guard(c, body, points, op, target);
        e.value = c.push_expr(Expr::Reduce { op: Reducer::Op(op), over, body }, e.span);
    }
    c.stmts = stmts;
    d
}

/// One block: anchors, repairs, contributions.
fn step(
    em: &mut Emitter<'_>,
    c: &Cascade,
    d: &Derivation,
    axis: AxisId,
    index: IndexId,
    types: &PlanTypes,
) -> Result<(), Unsupported> {
    for a in &d.anchors {
        let old = em.incoming[&a.state];
        let axes = em.kernel.tiles[old].axes.clone();
        let new = em.tile(&format!("{}_new", c.tensors[a.state].name), c.tensors[a.state].dtype, axes);
        let value = em.expr(tile::Expr::Tile(old));
        em.push(Op::Map { out: new, value });
        let value = em.convert(a.contribution)?;
        em.push(Op::Reduce { out: vec![new], op: ReduceOp::Max, value, over: vec![axis], carry: true });
        em.outgoing.insert(a.state, new);
    }
    // Repairs see the old values of every accumulator: those that others read are moved last.
    let mut moved: Vec<(TileId, TileId)> = Vec::new();
    for a in &d.accumulators {
        let Some(repair) = a.repair else { continue };
        let old = em.incoming[&a.state];
        let value = em.convert(repair)?;
        let read_by_others =
            d.accumulators.iter().any(|b| b.state != a.state && b.repair.is_some_and(|r| reads(c, r, a.state)));
        if read_by_others {
            let axes = em.kernel.tiles[old].axes.clone();
            let new = em.tile(&format!("{}_moved", c.tensors[a.state].name), c.tensors[a.state].dtype, axes);
            em.push(Op::Map { out: new, value });
            moved.push((old, new));
        } else {
            em.push(Op::Map { out: old, value });
        }
    }
    for (old, new) in moved {
        let value = em.expr(tile::Expr::Tile(new));
        em.push(Op::Map { out: old, value });
    }
    // Contractions first: their operands are tiles that the other reductions can share.
    let contracts = |a: &einfall_ir::analysis::derive::Accumulator| {
        a.op == ReduceOp::Sum && Contraction::of(c, a.contribution, &a.dims, &[index]).is_some()
    };
    for first in [true, false] {
        for a in d.accumulators.iter().filter(|a| contracts(a) == first) {
            let out = [em.incoming[&a.state]];
            em.reduce(&out, a.op, (&a.dims, &[index]), a.contribution, true, types)?;
        }
    }
    for a in &d.anchors {
        let (out, new) = (em.incoming[&a.state], em.outgoing[&a.state]);
        let value = em.expr(tile::Expr::Tile(new));
        em.push(Op::Map { out, value });
    }
    Ok(())
}

fn reads(c: &Cascade, root: ExprId, tensor: TensorId) -> bool {
    let mut found = false;
    c.walk(root, &mut |_, e| found |= matches!(e, Expr::Read { tensor: t, .. } if *t == tensor));
    found
}

/// A derived group without anchors: an ordinary group whose reductions no longer wait for each other, and its
/// schedule if it is one kernel.
fn ordinary<'c>(
    outer: &Program<'_>,
    s: &Schedule,
    c: &'c Cascade,
) -> Result<Option<(Program<'c>, Schedule)>, Unsupported> {
    let mut nodes = Vec::new();
    for e in c.einsums() {
        nodes.push(Node::new(c, e)?);
    }
    let producer =
        nodes.iter().enumerate().flat_map(|(k, n)| n.einsum.targets.iter().map(move |t| (t.tensor, k))).collect();
    let pinned = c
        .outputs
        .iter()
        .filter_map(|o| match o.source {
            OutputSource::Whole(t) => Some(t),
            OutputSource::Points { .. } | OutputSource::Point { .. } => None,
        })
        .collect();
    let consumers = reductions_of_dims(c, &nodes);
    let all: Vec<usize> = (0..nodes.len()).collect();
    let joined = together(outer, s, c, nodes.iter());
    let mut program = Program::new(c, nodes, producer, consumers, pinned);
    program.joined = joined;
    Ok(program.schedule(&all).map(|s| (program, s)))
}

/// Joins indices along which statements read states, producers and finals where they are written.
fn unify(c: &Cascade, d: &Derivation, before: &[Node], after: &[Node]) -> Classes {
    let mut classes = Classes::default();
    let mut own: HashMap<TensorId, (usize, Vec<IndexId>)> = HashMap::new();
    for a in &d.anchors {
        own.insert(a.state, (1, a.dims.clone()));
    }
    for a in &d.accumulators {
        own.insert(a.state, (1, a.dims.clone()));
    }
    for n in before.iter().chain(after) {
        if let Some(dims) = &n.dims {
            own.insert(n.target(), (0, dims.clone()));
        }
    }
    for (_, e) in c.exprs.iter() {
        let Expr::Read { tensor, at } = e else { continue };
        let Some((skip, dims)) = own.get(tensor) else { continue };
        for (&i, j) in dims.iter().zip(plain_access(c, &at[*skip..]).unwrap_or_default()) {
            classes.join(i, j);
        }
    }
    // A state's initialiser names its dimensions anew.
    for stmt in &c.stmts {
        let Stmt::Iter(iter) = stmt else { continue };
        for e in iter.inits.iter().chain(&iter.body) {
            let target = &e.targets[0];
            let Some((skip, dims)) = own.get(&target.tensor) else { continue };
            for (&i, j) in dims.iter().zip(plain_access(c, &target.at[*skip..]).unwrap_or_default()) {
                classes.join(i, j);
            }
        }
    }
    classes
}

/// Indices of the derived cascade that are one index of the schedule, whether or not their statements still read one
/// another.
fn together<'n>(
    program: &Program<'_>,
    s: &Schedule,
    c: &Cascade,
    nodes: impl Iterator<Item = &'n Node>,
) -> Vec<(IndexId, IndexId)> {
    let mut first: HashMap<IndexId, IndexId> = HashMap::new();
    let pairs = placed(program, s, c, nodes);
    pairs.into_iter().map(|(o, i)| (*first.entry(o).or_insert(i), i)).filter(|(i, j)| i != j).collect()
}

/// Every free index of statements that the schedule has too: its class there, and what it is called here.
fn placed<'n>(
    program: &Program<'_>,
    s: &Schedule,
    c: &Cascade,
    nodes: impl Iterator<Item = &'n Node>,
) -> Vec<(IndexId, IndexId)> {
    let mut out = Vec::new();
    for n in nodes {
        let name = &c.tensors[n.target()].name;
        let original =
            s.nodes.iter().map(|&k| &program.nodes[k]).find(|o| program.cascade.tensors[o.target()].name == *name);
        let Some(original) = original else { continue };
        let free = original.einsum.free.iter().zip(&n.einsum.free);
        out.extend(free.map(|(&o, &i)| (s.classes.find(o), i)));
    }
    out
}

/// The grid of the schedule in the derived cascade's indices: statements keep their names and order of indices.
fn grid<'n>(program: &Program<'_>, s: &Schedule, c: &Cascade, nodes: impl Iterator<Item = &'n Node>) -> Vec<IndexId> {
    let same: HashMap<IndexId, IndexId> = placed(program, s, c, nodes).into_iter().collect();
    s.grid.iter().filter_map(|i| same.get(i).copied()).collect()
}
