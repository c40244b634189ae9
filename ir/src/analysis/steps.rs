//! steps: whether the steps of a sequential stream can be launches of their own, whose tasks cut axes that are whole in a
//! task otherwise.
//!
//! A recurrence over a whole state (`h[t+1] = f(R·h[t])`) is one task: every element of a step reads all elements of the
//! step before. Where each step is launched, what is carried goes through device memory, and the elements of a step are
//! tasks. Invariant: in a stream that passes, a task of a step reads of the same step only what it makes itself.

use std::collections::BTreeSet;

use super::order_free::carried;
use crate::dtype::DType;
use crate::tile::{AxisId, AxisKind, BufferId, Expr, ExprId, Kernel, Node, Op, Place, Stream, TileId};

/// A stream whose steps can be launches.
#[derive(Clone, Debug, PartialEq)]
pub struct Steps {
    /// Its place among the nodes of the kernel.
    pub place: usize,
    /// What its steps carry.
    pub states: BTreeSet<TileId>,
}

/// Where the steps of the stream over `axis` can be launches whose tasks cut the inner axes `cut`; otherwise why not.
///
/// # Errors
/// What stands against it.
pub fn check(k: &Kernel, axis: AxisId, cut: &[AxisId]) -> Result<Steps, String> {
    let name = |a: AxisId| &k.axes[a].name;
    let found = k.body.iter().enumerate().find_map(|(i, n)| match n {
        Node::Stream(s) if s.axis == axis => Some((i, s)),
        Node::Stream(_) | Node::Op(_) => None,
    });
    let Some((place, stream)) = found else { return Err(format!("no outermost stream is over {}", name(axis))) };
    if !stream.sequential || stream.filter.is_some() || stream.reverse {
        return Err(format!("the stream over {} is not sequential", name(axis)));
    }
    let flat = |nodes: &[Node]| nodes.iter().all(|n| matches!(n, Node::Op(_)));
    if !flat(&k.body[..place]) || !flat(&k.body[place + 1..]) || !flat(&stream.body) {
        return Err("it has other streams".to_string());
    }
    if let Some(a) = cut.iter().find(|a| k.axes[**a].kind != AxisKind::Inner) {
        return Err(format!("{} is not whole in a task", name(*a)));
    }
    let states = carried(k, stream);
    if let Some(t) = states.iter().find(|t| !matches!(k.tiles[**t].dtype, DType::F32 | DType::F64 | DType::I64)) {
        return Err(format!("{} is carried in a narrow type", k.tiles[*t].name));
    }
    for t in &states {
        if let Some(a) = cut.iter().find(|a| !k.tiles[*t].axes.contains(a)) {
            return Err(format!("{} is carried and the same along {}", k.tiles[*t].name, name(*a)));
        }
    }
    let checked = Checked { k, cut, states: &states };
    checked.arrays()?;
    checked.before(&k.body[..place])?;
    checked.stream(stream)?;
    checked.after(stream, &k.body[place + 1..])?;
    Ok(Steps { place, states })
}

struct Checked<'a> {
    k: &'a Kernel,
    cut: &'a [AxisId],
    states: &'a BTreeSet<TileId>,
}

/// The operations among nodes.
fn operations(nodes: &[Node]) -> impl Iterator<Item = &Op> {
    nodes.iter().filter_map(|n| match n {
        Node::Op(op) => Some(op),
        Node::Stream(_) => None,
    })
}

impl Checked<'_> {
    fn tile(&self, t: TileId) -> &str {
        &self.k.tiles[t].name
    }

    /// Tiles that an operation reads.
    fn read(&self, op: &Op) -> Vec<TileId> {
        let mut out = Vec::new();
        for root in op.roots() {
            self.k.walk(root, &mut |_, e| {
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
            Op::Reduce { out: o, carry: true, .. } => out.extend(o),
            Op::Scan { carry, .. } => out.extend(*carry),
            Op::Load { .. } | Op::Store { .. } | Op::Map { .. } | Op::Reduce { .. } => {}
        }
        out
    }

    /// No array is read that the kernel stores to.
    fn arrays(&self) -> Result<(), String> {
        let (mut read, mut stored): (BTreeSet<BufferId>, BTreeSet<BufferId>) = (BTreeSet::new(), BTreeSet::new());
        for (_, e) in self.k.exprs.iter() {
            if let Expr::Read { buffer, .. } = e {
                read.insert(*buffer);
            }
        }
        self.k.for_each_op(&mut |op, _| match op {
            Op::Load { buffer, .. } => {
                read.insert(*buffer);
            }
            Op::Store { buffer, .. } => {
                stored.insert(*buffer);
            }
            Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {}
        });
        if read.is_disjoint(&stored) { Ok(()) } else { Err("it reads an array that it stores to".to_string()) }
    }

    /// What stands before the stream is either a state's first value, or does not read one and is computed anew by the tasks
    /// of a step, each of what it cuts.
    fn before(&self, nodes: &[Node]) -> Result<(), String> {
        for op in operations(nodes) {
            let first = op.outs().iter().any(|t| self.states.contains(t));
            let store = matches!(op, Op::Store { .. });
            if !first && !store && self.read(op).iter().any(|t| self.states.contains(t)) {
                return Err("what stands before the stream reads what is carried".to_string());
            }
            if !first && !store {
                op.roots().into_iter().try_for_each(|root| self.elsewhere(root, &BTreeSet::new()))?;
            }
            self.uncut(op)?;
        }
        Ok(())
    }

    /// No operation joins elements along an axis that is cut.
    fn uncut(&self, op: &Op) -> Result<(), String> {
        let joined: &[AxisId] = match op {
            Op::Reduce { over, .. } | Op::Contract { over, .. } => over,
            Op::Scan { along, .. } => std::slice::from_ref(along),
            Op::Load { .. } | Op::Store { .. } | Op::Map { .. } => &[],
        };
        match joined.iter().find(|a| self.cut.contains(a)) {
            Some(a) => Err(format!("elements along {} are joined", self.k.axes[*a].name)),
            None => Ok(()),
        }
    }

    fn stream(&self, s: &Stream) -> Result<(), String> {
        let mut written: BTreeSet<TileId> = BTreeSet::new();
        for op in operations(&s.body) {
            self.uncut(op)?;
            for root in op.roots() {
                self.elsewhere(root, &written)?;
            }
            if matches!(op, Op::Store { join: Some(_), .. }) {
                return Err("a step joins what it stores to what is there".to_string());
            }
            if let Op::Store { axes, .. } = op
                && let Some(a) = self.cut.iter().find(|a| !axes.contains(a))
            {
                return Err(format!("what is stored is the same along {}", self.k.axes[*a].name));
            }
            written.extend(op.outs());
        }
        Ok(())
    }

    /// Tiles at other coordinates of an axis that is cut are states as the step before left them.
    fn elsewhere(&self, root: ExprId, written: &BTreeSet<TileId>) -> Result<(), String> {
        let mut wrong = None;
        self.k.walk(root, &mut |_, e| {
            let Expr::TileAt { tile, at } = e else { return };
            let own = self.k.tiles[*tile].axes.iter().zip(at);
            let moved = own.into_iter().any(|(a, p)| self.cut.contains(a) && *p != Place::Axis(*a));
            if moved && (!self.states.contains(tile) || written.contains(tile)) {
                wrong = Some(*tile);
            }
        });
        match wrong {
            Some(t) => Err(format!("{} of the same step is read elsewhere", self.tile(t))),
            None => Ok(()),
        }
    }

    /// What stands after the stream reads of its steps only what is carried.
    fn after(&self, s: &Stream, nodes: &[Node]) -> Result<(), String> {
        let made: BTreeSet<TileId> = operations(&s.body).flat_map(|op| op.outs().to_vec()).collect();
        let mut own: BTreeSet<TileId> = BTreeSet::new();
        for op in operations(nodes) {
            let lost = |t: &&TileId| made.contains(t) && !self.states.contains(t) && !own.contains(t);
            if let Some(t) = self.read(op).iter().find(lost) {
                return Err(format!("{} is read after the stream", self.tile(*t)));
            }
            own.extend(op.outs());
        }
        Ok(())
    }
}
