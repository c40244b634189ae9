//! Strips of rows: loops one after the other over the same rows run strip by strip, so that what one of them leaves of a
//! row is in the nearest cache when the next takes it up.
//!
//! Before: `for m in 0..256 { max over n }  for m in 0..256 { exp over n }`
//! After:  `for s in 0..256 step 16 { for m in s..s+16 { max over n }  for m in s..s+16 { exp over n } }`
//!
//! Invariant: loops of a strip meet each other's tiles at the same row only, and no array is both stored and touched
//! otherwise in them, so that no element changes.

use einfall_ir::arena::Id;
use einfall_ir::kernel::{Expr as E, Stmt};
use einfall_ir::tile::{self, AxisId, BufferId, Node, Op, TileId};

use super::build::*;
use super::gather::reads;
use super::place::Place;
use super::{Lower, Out};

/// Groups of operations, by their numbers, that run over so many rows at a time.
struct Strips {
    axis: AxisId,
    groups: Vec<usize>,
    step: u64,
}

/// What the loops of a strip touch.
#[derive(Default)]
struct Touched {
    written: Vec<TileId>,
    read: Vec<TileId>,
    stored: Vec<BufferId>,
    loaded: Vec<BufferId>,
    /// Tiles read at other points than their own.
    crossed: Vec<TileId>,
}

impl Touched {
    fn add(&mut self, l: &Lower<'_>, op: &Op) {
        self.written.extend(op.outs());
        self.read.extend(reads(l.k, op));
        if let Op::Store { buffer, .. } = op {
            self.stored.push(*buffer);
        }
        for root in op.roots() {
            l.k.walk(root, &mut |_, e| match e {
                tile::Expr::Read { buffer, .. } => self.loaded.push(*buffer),
                tile::Expr::TileAt { tile, at } if *at != l.own_places(*tile) => self.crossed.push(*tile),
                _ => {}
            });
        }
        for t in self.read.iter().chain(&self.written) {
            if let Place::Direct { buffer, .. } = &l.places[t.index()] {
                self.loaded.push(*buffer);
            }
        }
    }
}

impl<'l> Lower<'l> {
    /// The axis whose rows the loops of a group of operations walk first, if strips of them can be walked apart; and
    /// whether there are loops within a row.
    fn rows_of(&self, ops: &[&Op]) -> Option<(AxisId, bool)> {
        let walked = |op: &&Op| match op {
            Op::Map { out, .. } => !self.made_where_read(*out),
            Op::Reduce { .. } | Op::Store { .. } => true,
            Op::Load { .. } | Op::Contract { .. } | Op::Scan { .. } => false,
        };
        if !ops.iter().all(walked) {
            return None;
        }
        let nest = self.shape(ops);
        let axis = nest.outer.first().copied().or(nest.lane).filter(|a| !nest.reduced.contains(a))?;
        Some((axis, !nest.outer.is_empty()))
    }

    /// How the groups at the beginning of `nodes` run strip by strip; none where that would gain nothing.
    fn strip(&self, nodes: &[Node]) -> Option<Strips> {
        let mut groups = Vec::new();
        let (mut rows, mut within) = (None, 0);
        let mut touched = Touched::default();
        let mut at = 0;
        while at < nodes.len() {
            let n = self.group(&nodes[at..]);
            let ops = operations(&nodes[at..at + n]);
            if ops.len() < n {
                break;
            }
            let Some((axis, inner)) = self.rows_of(&ops) else { break };
            if rows.is_some_and(|r| r != axis) {
                break;
            }
            let mut own = Touched::default();
            ops.iter().for_each(|op| own.add(self, op));
            let has_row = |t: &TileId| self.k.tiles[*t].axes.contains(&axis);
            let shared = |x: &Touched, y: &Touched| {
                x.written.iter().any(|t| (y.read.contains(t) || y.written.contains(t)) && !has_row(t))
                    || x.written.iter().any(|t| y.crossed.contains(t))
                    || x.stored.iter().any(|b| y.loaded.contains(b) || y.stored.contains(b))
            };
            if shared(&own, &touched) || shared(&touched, &own) {
                break;
            }
            rows = Some(axis);
            within += usize::from(inner);
            groups.push(n);
            for (to, from) in [
                (&mut touched.written, own.written),
                (&mut touched.read, own.read),
                (&mut touched.crossed, own.crossed),
            ] {
                to.extend(from);
            }
            touched.stored.extend(own.stored);
            touched.loaded.extend(own.loaded);
            at += n;
        }
        let axis = rows?;
        // As many rows as lanes where these leave half of the nearest cache free, else row by row.
        let lanes = self.isa.lanes();
        let row = touched.written.iter().chain(&touched.read).map(|t| self.row_bytes(*t, axis)).max()?;
        let step = if row.is_some_and(|b| b * lanes <= self.isa.l1_bytes / 2) { lanes } else { 1 };
        let few = matches!(self.ranges[axis.index()].most, E::Int(n) if n as u64 <= step);
        (within > 1 && !few).then_some(Strips { axis, groups, step })
    }

    /// Bytes of a tile at one coordinate of an axis; none where that is not known here: such tiles do not count where any
    /// other does.
    fn row_bytes(&self, t: TileId, axis: AxisId) -> Option<u64> {
        let others = self.k.tiles[t].axes.iter().filter(|a| **a != axis);
        others
            .map(|a| match self.ranges[a.index()].most {
                E::Int(n) => Some(n as u64),
                _ => None,
            })
            .try_fold(4u64, |bytes, n| Some(bytes.saturating_mul(n?)))
    }

    /// Loops of the groups at the beginning of `nodes` that run strip by strip, and how many operations these are.
    pub(super) fn strips(&mut self, nodes: &[Node]) -> Out<Option<(Vec<Stmt>, usize)>> {
        let Some(Strips { axis, groups, step }) = self.strip(nodes) else { return Ok(None) };
        let var = self.var(&self.k.axes[axis].name.clone());
        self.stripped = Some((axis, var, step));
        let (mut body, mut at) = (Vec::new(), 0);
        for n in groups {
            let made = self.nest(&operations(&nodes[at..at + n]));
            if made.is_err() {
                self.stripped = None;
            }
            body.extend(made?);
            self.position += n;
            at += n;
        }
        self.stripped = None;
        let hi = self.ranges[axis.index()].size.clone();
        Ok(Some((vec![Stmt::For { var, lo: int(0), hi, step: step as i64, unroll: false, body }], at)))
    }

    /// The first and the end of the coordinates of an axis that loops walk now.
    pub(super) fn walked(&self, axis: AxisId) -> (E, E) {
        if let Some((a, first, end)) = &self.run.walked
            && *a == axis
        {
            return (first.clone(), end.clone());
        }
        let size = self.ranges[axis.index()].size.clone();
        match self.stripped {
            Some((a, v, step)) if a == axis => (E::Var(v), min(add(E::Var(v), int(step as i64)), size)),
            _ => (int(0), size),
        }
    }
}

/// The operations among the nodes.
pub(super) fn operations(nodes: &[Node]) -> Vec<&Op> {
    let mut ops = Vec::new();
    for n in nodes {
        if let Node::Op(op) = n {
            ops.push(op);
        }
    }
    ops
}
