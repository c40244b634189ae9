//! launch-steps: a sequential stream whose steps are launches, so that many cores share a step.
//!
//! ```text
//! kernel k { stream t in T; inner d in D;  h = h0[d];  for t sequential { r = h{d = p}; ..  h = h_2 };  rest }
//! →  kernel k_start { h = h0[d];  store k_h[0, d] = h }
//!    kernel k       { grid t in T ordered; grid d in D;  h = load k_h[t % 2, d];  r = k_h[t % 2, p]; ..  h = h_2
//!                     store k_h[(t + 1) % 2, d] = h }
//!    kernel k_end   { h = load k_h[T % 2, d];  rest }
//! ```
//! The mapping says which stream (`axis t block 1 launches`) and which inner axes are cut (`axis d block 32`). What is
//! carried has two places, by turns, since tasks of one step read what others of it replace. What tasks read of each other in
//! a narrower type (the operand of an instruction) is stored in that type too, so that fewer bytes go from core to core. What
//! does not change from step to step is loaded in each. Invariant: the plan computes the same ([`steps`] says which streams can).

use std::collections::BTreeMap;

use einfall_ir::analysis::steps;
use einfall_ir::cascade::Size;
use einfall_ir::dtype::DType;
use einfall_ir::mapping::{KernelMapping, Mapping};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{
    AxisId, AxisKind, Buffer, BufferId, BufferKind, Expr, ExprId, Kernel, Node, Op, Place, Plan, TileId,
};

use super::{NotLowered, fresh};
use crate::passes::rewrite_tiles::{for_each_root, rewrite, tidy};

/// Takes the streams apart whose steps the mapping launches.
///
/// # Errors
/// A stream that cannot be.
pub fn launch_steps(plan: &Plan, mapping: &Mapping) -> Result<Plan, NotLowered> {
    let mut plan = plan.clone();
    let mut kernels = Vec::new();
    for k in plan.kernels.clone() {
        let m = mapping.kernels.iter().find(|m| m.kernel == k.name);
        let line = m.and_then(|m| m.axes.iter().find(|a| a.launches));
        match (m, line) {
            (Some(m), Some(line)) => {
                let fail = |why: String| NotLowered {
                    kernel: k.name.clone(),
                    what: format!("launches of {}: {why}", line.axis),
                };
                kernels.extend(apart(&mut plan, &k, m, &line.axis).map_err(fail)?);
            }
            _ => kernels.push(k),
        }
    }
    plan.kernels = kernels;
    Ok(plan)
}

fn apart(plan: &mut Plan, k: &Kernel, m: &KernelMapping, stream: &str) -> Result<Vec<Kernel>, String> {
    let axis = k.axes.iter().find(|(_, a)| a.name == stream).map(|(id, _)| id).ok_or("there is no such axis")?;
    let named = |a: &AxisId| k.axes[*a].kind == AxisKind::Inner && m.axis(&k.axes[*a].name).is_some();
    let cut: Vec<AxisId> = k.axes.ids().filter(named).collect();
    let steps = steps::check(k, axis, &cut)?;
    let Node::Stream(body) = &k.body[steps.place] else { return Err("there is no such stream".to_string()) };

    // Where what is carried lies.
    let mut arrays: BTreeMap<TileId, BufferId> = BTreeMap::new();
    for t in &steps.states {
        let tile = &k.tiles[*t];
        let mut dims = vec![Size::Const(2)];
        dims.extend(tile.axes.iter().map(|a| k.axes[*a].extent.clone()));
        let name = fresh(plan, format!("{}_{}", k.name, tile.name));
        let buffer = Buffer { name, dtype: tile.dtype, dims, kind: BufferKind::Workspace, positive: false };
        arrays.insert(*t, plan.buffers.push(buffer));
    }
    // States that are read elsewhere in another type, by tile and type.
    let mut rounded: BTreeMap<(TileId, DType), BufferId> = BTreeMap::new();
    for node in &body.body {
        let Some((tile, dtype, _)) = whole_read(k, node, &cut).filter(|r| arrays.contains_key(&r.0)) else { continue };
        let own = &k.tiles[tile];
        if !dtype.is_float() || !own.dtype.is_float() || dtype.bits() >= own.dtype.bits() {
            continue;
        }
        rounded.entry((tile, dtype)).or_insert_with(|| {
            let name = fresh(plan, format!("{}_{}_{dtype}", k.name, own.name));
            let dims = plan.buffers[arrays[&tile]].dims.clone();
            plan.buffers.push(Buffer { name, dtype, dims, kind: BufferKind::Workspace, positive: false })
        });
    }
    let stored: Vec<(TileId, BufferId)> =
        arrays.iter().map(|(t, a)| (*t, *a)).chain(rounded.iter().map(|((t, _), a)| (*t, *a))).collect();
    let before = &k.body[..steps.place];
    let lasting = |n: &&Node| match n {
        Node::Op(Op::Store { .. }) | Node::Stream(_) => false,
        Node::Op(op) => !op.outs().iter().any(|t| steps.states.contains(t)),
    };

    // Before the first step.
    let mut start = whole(k, m, fresh(plan, format!("{}_start", k.name)));
    start.body = before.to_vec();
    for (t, array) in &stored {
        let first = start.exprs.push(Expr::Int(0));
        let store = store(&mut start, *t, *array, first);
        start.body.push(store);
    }

    // A step.
    let mut step = k.clone();
    step.axes[axis].kind = AxisKind::Grid;
    step.axes[axis].block = Some(1);
    step.ordered = Some(axis);
    for a in &cut {
        step.axes[*a].kind = AxisKind::Grid;
    }
    step.body = before.iter().filter(lasting).cloned().collect();
    let now = parity(&mut step, Expr::Coord(axis), 0);
    let next = parity(&mut step, Expr::Coord(axis), 1);
    for (t, array) in &arrays {
        let at = own_positions(&mut step, *t, now);
        step.body.push(Node::Op(Op::Load { out: *t, buffer: *array, at }));
    }
    let mut inside = body.body.clone();
    for node in &mut inside {
        let Some((tile, dtype, at)) = whole_read(&step, node, &cut) else { continue };
        if let (Some(array), Node::Op(Op::Map { value, .. })) = (rounded.get(&(tile, dtype)), node) {
            *value = read(&mut step, *array, now, &at);
        }
    }
    for_each_root(&mut inside, &mut |e| {
        rewrite(&mut step, e, &mut |k, e| {
            let Expr::TileAt { tile, at } = k.exprs[e].clone() else { return None };
            let array = *arrays.get(&tile)?;
            let own = k.tiles[tile].axes.clone();
            own.iter().zip(&at).any(|(a, p)| cut.contains(a) && *p != Place::Axis(*a)).then_some(())?;
            Some(read(k, array, now, &at))
        })
    });
    step.body.extend(inside);
    for (t, array) in &stored {
        let store = store(&mut step, *t, *array, next);
        step.body.push(store);
    }

    let mut kernels = vec![tidy(start), tidy(step)];
    // After the last.
    let after = &k.body[steps.place + 1..];
    if !after.is_empty() {
        let mut end = whole(k, m, fresh(plan, format!("{}_end", k.name)));
        end.body = before.iter().filter(lasting).cloned().collect();
        let last = parity(&mut end, Expr::Size(k.axes[axis].extent.clone()), 0);
        for (t, array) in &arrays {
            let at = own_positions(&mut end, *t, last);
            end.body.push(Node::Op(Op::Load { out: *t, buffer: *array, at }));
        }
        end.body.extend(after.iter().cloned());
        kernels.push(tidy(end));
    }
    Ok(kernels)
}

/// A state's elements of other tasks and nothing else, as an operation holds them in its result's type.
fn whole_read(k: &Kernel, node: &Node, cut: &[AxisId]) -> Option<(TileId, DType, Vec<Place>)> {
    let Node::Op(Op::Map { out, value }) = node else { return None };
    let Expr::TileAt { tile, at } = &k.exprs[*value] else { return None };
    let others = k.tiles[*tile].axes.iter().zip(at).any(|(a, p)| cut.contains(a) && *p != Place::Axis(*a));
    others.then(|| (*tile, k.tiles[*out].dtype, at.clone()))
}

/// An element of a state's array, in the place `now`.
fn read(k: &mut Kernel, array: BufferId, now: ExprId, at: &[Place]) -> ExprId {
    let mut positions = vec![now];
    for p in at {
        positions.push(k.exprs.push(match p {
            Place::Axis(a) => Expr::Coord(*a),
            Place::At(i) => Expr::Int(*i as i64),
        }));
    }
    k.exprs.push(Expr::Read { buffer: array, at: positions })
}

/// The kernel without a body, its blocks as mapped.
fn whole(k: &Kernel, m: &KernelMapping, name: String) -> Kernel {
    let mut own = Kernel { name, body: Vec::new(), ..k.clone() };
    for (_, a) in own.axes.iter_mut().filter(|(_, a)| a.kind != AxisKind::Inner) {
        a.block = m.axis(&a.name).map(|l| l.block).or(a.block);
    }
    own
}

/// `(e + n) % 2`.
fn parity(k: &mut Kernel, e: Expr, n: i64) -> ExprId {
    let mut at = k.exprs.push(e);
    if n > 0 {
        let n = k.exprs.push(Expr::Int(n));
        at = k.exprs.push(Expr::Binary(BinaryOp::Add, at, n));
    }
    let two = k.exprs.push(Expr::Int(2));
    k.exprs.push(Expr::Binary(BinaryOp::Mod, at, two))
}

/// The positions of a tile's elements in one of its array's places.
fn own_positions(k: &mut Kernel, t: TileId, place: ExprId) -> Vec<ExprId> {
    let axes = k.tiles[t].axes.clone();
    std::iter::once(place).chain(axes.into_iter().map(|a| k.exprs.push(Expr::Coord(a)))).collect()
}

fn store(k: &mut Kernel, t: TileId, array: BufferId, place: ExprId) -> Node {
    let at = own_positions(k, t, place);
    let value = k.exprs.push(Expr::Tile(t));
    let axes = k.tiles[t].axes.clone();
    Node::Op(Op::Store { buffer: array, at, axes, value, join: None, when: None })
}
