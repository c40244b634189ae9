//! Which fragments of the consumers are live at once, per structure: the sets whose registers must fit the budget.
//!
//! The same backward liveness as `einfall_ir::analysis::resources`, over operations instead of statements, with the
//! scratch fragments that the lowering makes (values on their way to shared memory, operands of reductions that are no
//! tile, gathered elements). Invariant: the sets cover those of the lowered kernel, so that a mapping whose sets fit
//! lowers within its budgets.

use std::collections::BTreeSet;

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::tile::{Expr, ExprId, Op, TileId};

use super::facts::Facts;
use super::structure::{Held, Place, Structure, frame_of, uniform};

/// A fragment: how it is held, and its element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// How it is held.
    pub held: Held,
    /// Its elements.
    pub dtype: DType,
}

/// Fragments that are live at once.
pub type LiveSet = Vec<Fragment>;

#[derive(Clone, Debug, Default)]
struct Line {
    defs: Vec<usize>,
    uses: Vec<usize>,
    /// Whether groups in flight are awaited before it, so that their operands live until then.
    settles: bool,
}

struct Lines<'s, 'a> {
    facts: &'s Facts<'a>,
    s: &'s Structure,
    fragments: Vec<Fragment>,
    /// The fragment of each register tile.
    of: Vec<Option<usize>>,
    /// `staged[i]`: whether store `i` leaves through shared memory.
    staged: Vec<usize>,
}

/// The maximal live sets of the consumers. `staged`: operations of stores that leave through shared memory.
pub fn live_sets(facts: &Facts<'_>, s: &Structure, staged: &[usize]) -> Vec<LiveSet> {
    let mut l = Lines { facts, s, fragments: Vec::new(), of: vec![None; s.places.len()], staged: staged.to_vec() };
    for (i, held) in s.held.iter().enumerate() {
        if let (Some(held), Place::Registers) = (held, s.places[i]) {
            l.of[i] = Some(l.fragments.len());
            let dtype = facts.kernel.tiles[TileId::new(i)].dtype;
            l.fragments.push(Fragment { held: *held, dtype });
        }
    }
    // Runs of operations: outside streams in order, streams by trip.
    let mut runs: Vec<(Option<usize>, Vec<Line>)> = Vec::new();
    let mut done = BTreeSet::new();
    for at in 0..facts.ops.len() {
        if s.in_producer(facts, at) {
            continue;
        }
        match facts.ops[at].stream {
            None => runs.push((None, l.lines(at))),
            Some(stream) if done.insert(stream) => {
                let trip = s.trip(facts, stream);
                let lines = trip.into_iter().flat_map(|i| l.lines(i)).collect();
                runs.push((Some(stream), lines));
            }
            Some(_) => {}
        }
    }
    let operands: Vec<usize> = s.contractions.iter().filter_map(|c| l.of[c.a.index()]).collect();
    let mut sets: BTreeSet<BTreeSet<usize>> = BTreeSet::new();
    let mut live: BTreeSet<usize> = BTreeSet::new();
    for (stream, lines) in runs.iter().rev() {
        loop {
            let before = backward(lines, live.clone(), &operands, &mut sets);
            if stream.is_none() {
                live = before;
                break;
            }
            let joined: BTreeSet<usize> = live.union(&before).copied().collect();
            if joined == live {
                break;
            }
            live = joined;
        }
    }
    let all: Vec<&BTreeSet<usize>> = sets.iter().collect();
    let maximal = |x: &BTreeSet<usize>| !x.is_empty() && !all.iter().any(|y| *y != x && x.is_subset(y));
    let kept = all.iter().filter(|x| maximal(x));
    kept.map(|x| x.iter().map(|i| l.fragments[*i]).collect()).collect()
}

fn backward(
    lines: &[Line],
    mut live: BTreeSet<usize>,
    operands: &[usize],
    sets: &mut BTreeSet<BTreeSet<usize>>,
) -> BTreeSet<usize> {
    sets.insert(live.clone());
    for line in lines.iter().rev() {
        line.defs.iter().for_each(|d| {
            live.remove(d);
        });
        live.extend(&line.uses);
        sets.insert(live.clone());
        if line.settles {
            live.extend(operands);
            sets.insert(live.clone());
        }
    }
    live
}

impl Lines<'_, '_> {
    fn temp(&mut self, held: Held, dtype: DType) -> usize {
        self.fragments.push(Fragment { held, dtype });
        self.fragments.len() - 1
    }

    /// Scratch fragments of an elementwise value over `frame`: parts of shared tiles, and gathered elements.
    fn scratch(&mut self, value: ExprId, frame: Held, uses: &mut Vec<usize>, out: &mut Vec<Line>) {
        let mut shared: Vec<TileId> = Vec::new();
        let mut gathers: Vec<(ExprId, DType)> = Vec::new();
        let (facts, s) = (self.facts, self.s);
        facts.kernel.walk(value, &mut |id, e| match e {
            Expr::Tile(t) | Expr::TileAt { tile: t, .. } => {
                if s.places[t.index()].shared().is_some() && !shared.contains(t) {
                    shared.push(*t);
                }
            }
            Expr::Read { buffer, at } => {
                let known = gathers.iter().any(|g| g.0 == id);
                if !known && !at.is_empty() && !at.iter().all(|p| uniform(facts, s, *p)) {
                    gathers.push((id, facts.plan.buffers[*buffer].dtype));
                }
            }
            Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Coord(_)
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => {}
        });
        for t in shared {
            let own = s.sized_of(facts.tile_axes(t));
            let held = project(frame, &own);
            let temp = self.temp(held, facts.kernel.tiles[t].dtype);
            out.push(Line { defs: vec![temp], ..Line::default() });
            uses.push(temp);
        }
        for (_, dtype) in gathers {
            let temp = self.temp(frame, dtype);
            out.push(Line { defs: vec![temp], uses: uses.clone(), settles: false });
            uses.push(temp);
        }
    }

    fn lines(&mut self, at: usize) -> Vec<Line> {
        let (facts, s) = (self.facts, self.s);
        let o = &facts.ops[at];
        let mut out = Vec::new();
        let frag = |t: &TileId| self.of[t.index()];
        let mut uses: Vec<usize> = o.reads.iter().filter_map(frag).collect();
        let defs: Vec<usize> = o.op.outs().iter().filter_map(frag).collect();
        let contracted = |t: &TileId| s.contractions.iter().any(|c| c.out == *t);
        let operand = |t: &TileId| s.contractions.iter().any(|c| c.a == *t);
        let settles = o.reads.iter().chain(o.op.outs()).any(contracted) || o.op.outs().iter().any(operand);
        let frame = frame_of(facts, s, at).unwrap_or(Held::Scalar);
        match o.op {
            Op::Contract { carry, out: acc, .. } => {
                if *carry {
                    uses.extend(self.of[acc.index()]);
                }
                out.push(Line { defs: if *carry { Vec::new() } else { defs }, uses, settles: false });
            }
            Op::Load { .. } => out.push(Line { defs, ..Line::default() }),
            Op::Map { out: t, value } => {
                out.push(Line { settles, ..Line::default() });
                if s.places[t.index()].shared().is_some() {
                    self.scratch(*value, frame, &mut uses, &mut out);
                    let part = self.temp(frame, facts.kernel.tiles[*t].dtype);
                    out.push(Line { defs: vec![part], uses, settles: false });
                    out.push(Line { uses: vec![part], ..Line::default() });
                } else {
                    let frame = s.held[t.index()].unwrap_or(frame);
                    self.scratch(*value, frame, &mut uses, &mut out);
                    out.push(Line { defs, uses, settles: false });
                }
            }
            Op::Reduce { out: outs, value, carry, .. } => {
                out.push(Line { settles, ..Line::default() });
                let plain = match &facts.kernel.exprs[*value] {
                    Expr::Tile(t) => s.held[t.index()] == Some(frame) && self.of[t.index()].is_some(),
                    _ => false,
                };
                if plain {
                    out.push(Line { defs: if *carry { Vec::new() } else { defs }, uses, settles: false });
                } else {
                    let mut inner: Vec<usize> = Vec::new();
                    facts.kernel.walk(*value, &mut |_, e| {
                        if let Expr::Tile(t) | Expr::TileAt { tile: t, .. } = e {
                            inner.extend(self.of[t.index()]);
                        }
                    });
                    self.scratch(*value, frame, &mut inner, &mut out);
                    let temp = self.temp(frame, facts.kernel.tiles[outs[0]].dtype);
                    out.push(Line { defs: vec![temp], uses: inner, settles: false });
                    let mut last = vec![temp];
                    if *carry {
                        last.extend(outs.iter().filter_map(|t| self.of[t.index()]));
                    }
                    out.push(Line { defs: if *carry { Vec::new() } else { defs }, uses: last, settles: false });
                }
            }
            Op::Store { buffer, value, .. } => {
                out.push(Line { settles, ..Line::default() });
                let plain = match &facts.kernel.exprs[*value] {
                    Expr::Tile(t) => s.held[t.index()] == Some(frame) && self.of[t.index()].is_some(),
                    _ => false,
                };
                if plain && !self.staged.contains(&at) {
                    out.push(Line { uses, ..Line::default() });
                } else {
                    self.scratch(*value, frame, &mut uses, &mut out);
                    let part = self.temp(frame, facts.plan.buffers[*buffer].dtype);
                    out.push(Line { defs: vec![part], uses, settles: false });
                    out.push(Line { uses: vec![part], ..Line::default() });
                }
            }
            Op::Scan { .. } => out.push(Line { defs, uses, settles }),
        }
        out
    }
}

fn project(frame: Held, own: &[einfall_ir::tile::AxisId]) -> Held {
    match frame {
        Held::Whole(x, y) => match (own.contains(&x), own.contains(&y)) {
            (true, true) => frame,
            (true, false) => Held::Rows(x),
            (false, true) => Held::Columns(y),
            (false, false) => Held::Scalar,
        },
        Held::Rows(x) | Held::Columns(x) if own.contains(&x) => frame,
        Held::Rows(_) | Held::Columns(_) | Held::Scalar => Held::Scalar,
    }
}
