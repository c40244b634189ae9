//! Where tiles live: read in place, or in scratch laid out for the contraction that reads them.
//!
//! A contraction wants its *lane operand* in panels `[panels, …, NR]` (one panel is a column block of the register
//! tile, rows adjacent) and its *row operand* with the innermost summed axis contiguous and a static row stride.
//! Invariant: the contiguous axis of a scratch tile is allocated in whole vectors, rows of contractions in whole
//! register tiles, so that scratch accesses along the lanes need no masks.

use einfall_ir::analysis::runs::Runs;
use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms::Atom;
use einfall_ir::kernel::{Buf, BufId, BufSpace, Expr as E};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, AxisId, BufferId, Op, TileId};

use super::build::*;
use super::{Lower, Out};

/// Placement of a tile.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// The tile is the array's elements at these positions, read where used.
    Direct { buffer: BufferId, at: Vec<tile::ExprId> },
    /// The value is computed where it is read: once a run, into what is packed for it.
    Computed(tile::ExprId),
    /// Private memory.
    Scratch(Scratch),
}

/// A tile in scratch: dimensions `[panels]`, the other axes in order, then the contiguous axis (within its panel).
#[derive(Clone, Debug)]
pub(super) struct Scratch {
    pub(super) buf: BufId,
    pub(super) layout: Layout,
    /// Whether it is part of an array of the workspace, which has the elements of all tasks ([`super::packed`]).
    pub(super) shared: bool,
}

/// Order of a tile's axes in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Axes with more than one coordinate, outermost first; the last is contiguous.
    pub(super) order: Vec<AxisId>,
    /// The contiguous axis is cut into panels of this many elements, the panels outermost.
    pub(super) panel: Option<u64>,
    /// Held in the type of an instruction's operands, with so many neighbours of the axis before the contiguous one
    /// together ([`BufSpace::Scratch`]); none: in the type of registers, one by one.
    pub(super) operand: Option<(DType, u64)>,
}

impl Layout {
    /// Neighbours of the axis before the contiguous one that stand together.
    pub(super) fn together(&self) -> u64 {
        self.operand.map_or(1, |o| o.1)
    }
}

/// How a contraction uses its axes.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// Whether `b` of the operation is the row operand.
    pub(super) swapped: bool,
    /// The axis lanes run along, in the lane operand and the result.
    pub(super) lane: Option<AxisId>,
    /// The axis rows of the register tile run along.
    pub(super) row: Option<AxisId>,
    /// Summed axes, innermost last.
    pub(super) over: Vec<AxisId>,
    /// Rows and columns of the register tile.
    pub(super) mr: u64,
    pub(super) nr: u64,
    /// The instruction that multiplies; none: multiply-adds of vectors.
    pub(super) atom: Option<Atom>,
    /// Rows that share the lane operand, which has one coordinate of theirs at a time; none: all do.
    pub(super) runs: Option<Runs>,
}

/// Rows of a block up to which laying out the other operand for tiles is not worth it.
const TILE_ROWS: i64 = 8;

/// Elements of a chunk of a summed axis whose extent is only known at launch: a static row stride.
const CHUNK: u64 = 128;

impl Lower<'_> {
    /// Decides every tile's place.
    pub(super) fn place_tiles(&mut self) -> Out<()> {
        let mut wanted: Vec<Option<Layout>> = vec![None; self.k.tiles.len()];
        let mut loads: Vec<Option<(BufferId, Vec<tile::ExprId>)>> = vec![None; self.k.tiles.len()];
        let mut writers = vec![0; self.k.tiles.len()];
        let mut contracts = Vec::new();
        // Values of elementwise operations, and readers that have one coordinate of some axes at a time.
        let mut computed: Vec<Option<tile::ExprId>> = vec![None; self.k.tiles.len()];
        let mut by_runs = vec![0; self.k.tiles.len()];
        // Reads of each tile by contractions that want neighbours together.
        let mut paired: Vec<Vec<Layout>> = vec![Vec::new(); self.k.tiles.len()];
        self.k.for_each_op(&mut |op, _| {
            op.outs().iter().for_each(|t| writers[t.index()] += 1);
            match op {
                Op::Load { out, buffer, at } => loads[out.index()] = Some((*buffer, at.clone())),
                Op::Contract { .. } => contracts.push(op.clone()),
                Op::Scan { carry: Some(c), .. } => writers[c.index()] += 1,
                Op::Map { out, value } => computed[out.index()] = Some(*value),
                Op::Store { .. } | Op::Reduce { .. } | Op::Scan { .. } => {}
            }
        });
        for op in &contracts {
            let Op::Contract { a, b, .. } = op else { continue };
            let shape = self.contract_shape(op);
            if shape.lane.is_none() {
                continue;
            }
            for (t, is_row) in [(*a, !shape.swapped), (*b, shape.swapped)] {
                if shape.runs.is_some() && !is_row {
                    // Packed once a run.
                    by_runs[t.index()] += 1;
                    continue;
                }
                let layout = if is_row { self.row_layout(t, &shape) } else { self.lane_layout(t, &shape) };
                // Held wider than an instruction reads it: a copy is rounded.
                if layout.operand.is_some() && self.held(t) != self.k.tiles[t].dtype {
                    continue;
                }
                // Neighbours that stand together are written together: by a load that nothing else reads, else by a
                // copy, from where the tile lives.
                if layout.together() > 1 {
                    let list = &mut paired[t.index()];
                    list.push(layout.clone());
                    let loaded = loads[t.index()].is_some() && writers[t.index()] == 1;
                    if !loaded || list.len() < self.readers[t.index()].len() || list.iter().any(|l| *l != layout) {
                        continue;
                    }
                }
                wanted[t.index()].get_or_insert(layout);
            }
        }
        for t in self.k.tiles.ids() {
            if let (Some(value), true) = (computed[t.index()], by_runs[t.index()] == self.readers[t.index()].len())
                && by_runs[t.index()] > 0
                && writers[t.index()] == 1
            {
                self.places.push(Place::Computed(value));
                continue;
            }
            let load = loads[t.index()].take().filter(|_| writers[t.index()] == 1);
            let wanted = wanted[t.index()].take();
            if let Some(s) = self.packed(t, load.as_ref(), wanted.as_ref())? {
                self.places.push(Place::Scratch(s));
                continue;
            }
            let place = match (wanted, load) {
                (None, Some((buffer, at))) => Place::Direct { buffer, at },
                (Some(layout), _) => Place::Scratch(self.scratch(t, layout)),
                (None, None) => {
                    let layout = Layout { order: self.wide(&self.k.tiles[t].axes), panel: None, operand: None };
                    Place::Scratch(self.scratch(t, layout))
                }
            };
            self.places.push(place);
        }
        Ok(())
    }

    /// The roles of a contraction's axes.
    pub(super) fn contract_shape(&self, op: &Op) -> Shape {
        let Op::Contract { out, a, b, over, .. } = op else {
            return Shape {
                swapped: false,
                lane: None,
                row: None,
                over: Vec::new(),
                mr: 1,
                nr: 1,
                atom: None,
                runs: None,
            };
        };
        let axes = |t: TileId| self.wide(&self.k.tiles[t].axes);
        let (ao, bo, oo) = (axes(*a), axes(*b), axes(*out));
        // Where an operand has one coordinate of the rows at a time, its columns are the lanes.
        let runs = self.runs(op);
        let shared = |x: &AxisId| ao.contains(x) && bo.contains(x);
        let own = |x: &AxisId| match &runs {
            Some(r) => !shared(x) && if r.first { ao.contains(x) } else { bo.contains(x) },
            None => ao.contains(x) != bo.contains(x),
        };
        // Lanes along the last axis of the result that only one operand has.
        let lane = oo.iter().rev().copied().find(own);
        let swapped = lane.is_some_and(|l| ao.contains(&l));
        let (rows, lanes) = if swapped { (&bo, &ao) } else { (&ao, &bo) };
        let row = match &runs {
            Some(r) => Some(r.axis),
            None => oo.iter().rev().copied().find(|x| rows.contains(x) && !lanes.contains(x)),
        };
        let l = self.isa.lanes();
        let literal = |x: Option<AxisId>| match x.map(|x| &self.ranges[x.index()].most) {
            Some(E::Int(n)) => Some(*n as u64),
            _ => None,
        };
        let nr = if literal(lane).is_some_and(|n| n <= l) { l } else { 2 * l };
        let most = (self.isa.vector_registers - 4) / (nr / l);
        let mr = match (row, literal(row)) {
            (None, _) => 1,
            (Some(_), None) => most,
            (Some(_), Some(n)) => n.div_ceil(n.div_ceil(most)).max(1),
        };
        // The row operand is walked along its own last summed axis.
        let mut over = self.wide(over);
        if let Some(inner) = rows.iter().rev().copied().find(|x| over.contains(x)) {
            over.retain(|x| *x != inner);
            over.push(inner);
        }
        let [x, y] = [*a, *b].map(|t| self.k.tiles[t].dtype);
        let summed = over.last().is_some_and(|k| rows.contains(k) && lanes.contains(k));
        let many = row.is_some_and(|r| !matches!(self.ranges[r.index()].most, E::Int(n) if n <= TILE_ROWS));
        // Rows of the result are contiguous along the lanes: as it stands, and not laid out for another contraction.
        let mut plain = oo.last() == lane.as_ref() && self.held(*out) == DType::F32;
        self.k.for_each_op(&mut |op, _| {
            if let Op::Contract { a, b, .. } = op {
                plain &= a != out && b != out;
            }
        });
        // Sums in vector registers are like any others.
        let sums = Self::register_type(self.k.tiles[*out].dtype);
        let fits = |i: &Atom| i.operand == x && i.acc == sums && (!i.tiled() || many && plain);
        let atoms = if x == y && summed && lane.is_some() { self.isa.atoms() } else { Vec::new() };
        let atom = atoms.into_iter().find(fits);
        if let Some(atom) = atom.clone().filter(Atom::tiled) {
            // Two by two tiles accumulate, and two of each operand are held beside them.
            let [m, n, _] = atom.shape;
            let (mr, nr) = (if literal(row).is_some_and(|r| r <= m) { m } else { 2 * m }, 2 * n);
            return Shape { swapped, lane, row, over, mr, nr, atom: Some(atom), runs };
        }
        Shape { swapped, lane, row, over, mr, nr, atom, runs }
    }

    /// Panels of NR columns.
    pub(super) fn lane_layout(&self, t: TileId, s: &Shape) -> Layout {
        let mut order = self.wide(&self.k.tiles[t].axes);
        if let Some(runs) = &s.runs {
            order.retain(|x| !runs.single(*x));
        }
        if let Some(l) = s.lane {
            order.retain(|x| *x != l);
            // Summed axes innermost, in the order they are walked.
            order.retain(|x| !s.over.contains(x));
            let own = self.wide(&self.k.tiles[t].axes);
            order.extend(s.over.iter().filter(|x| own.contains(x)));
            order.push(l);
        }
        let operand = s.atom.as_ref().map(|a| (a.operand, u64::from(32 / a.operand.bits())));
        Layout { order, panel: Some(s.nr), operand }
    }

    /// The innermost summed axis contiguous; in chunks where its extent is not a literal.
    pub(super) fn row_layout(&self, t: TileId, s: &Shape) -> Layout {
        let mut order = self.wide(&self.k.tiles[t].axes);
        let mut panel = None;
        if let Some(inner) = s.over.last().filter(|x| order.contains(x)) {
            order.retain(|x| x != inner);
            order.push(*inner);
            // What an atom reads of several rows is a panel, so that they stand one after the other.
            panel = match &s.atom {
                _ if order.len() < 2 => None,
                Some(atom) if atom.tiled() => Some(atom.shape[2]),
                _ if matches!(self.ranges[inner.index()].most, E::Int(_)) => None,
                _ => Some(CHUNK),
            };
        }
        Layout { order, panel, operand: s.atom.as_ref().map(|a| (a.operand, 1)) }
    }

    /// Coordinates allocated along an axis: whole vectors, panels and register tiles.
    fn allocated(&self, a: AxisId, contiguous: bool) -> E {
        let most = self.ranges[a.index()].most.clone();
        let l = self.isa.lanes();
        let mut n = if contiguous { round_up(most.clone(), l) } else { most.clone() };
        let mut shapes = Vec::new();
        self.k.for_each_op(&mut |op, _| {
            if matches!(op, Op::Contract { .. }) {
                shapes.push(self.contract_shape(op));
            }
        });
        for s in shapes {
            if s.lane == Some(a) {
                n = max(n, round_up(most.clone(), s.nr));
            }
            if s.row == Some(a) {
                // A run's last register tile begins anywhere.
                let beyond = if s.runs.is_some() { s.mr } else { 0 };
                n = max(n, add(round_up(most.clone(), s.mr), int(beyond as i64)));
            }
            if s.atom.is_some() && s.over.last() == Some(&a) {
                n = max(n, round_up(most.clone(), self.step()));
            }
        }
        n
    }

    /// A new scratch buffer for a tile.
    pub(super) fn scratch(&mut self, t: TileId, layout: Layout) -> Scratch {
        let tile = &self.k.tiles[t];
        let dtype = match layout.operand.map_or(tile.dtype, |o| o.0) {
            d if layout.operand.is_some() => d,
            // Values are rounded to the tile's type and held as f32; positions are 64-bit.
            DType::F64 => DType::F64,
            DType::Bool => DType::Bool,
            DType::I64 | DType::I32 | DType::I8 | DType::U8 | DType::I4 | DType::U4 => DType::I64,
            DType::F32 | DType::Tf32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => DType::F32,
        };
        let mut dims: Vec<E> = Vec::new();
        let n = layout.order.len();
        for (i, a) in layout.order.iter().enumerate() {
            dims.push(self.allocated(*a, i + 1 == n));
        }
        if let (Some(w), Some(last)) = (layout.panel, dims.last_mut()) {
            let panels = ceil_div(last.clone(), w);
            *last = int(w as i64);
            dims.insert(0, panels);
        }
        // Rows of whole vectors; a power-of-two distance between rows would map them to the same cache sets.
        let mut strides = vec![int(1); dims.len()];
        for i in (0..dims.len().saturating_sub(1)).rev() {
            let below = mul(dims[i + 1].clone(), strides[i + 1].clone());
            let own_panel = layout.panel.is_some_and(|w| w <= 2 * self.isa.lanes());
            strides[i] = if i + 2 == dims.len() && !own_panel {
                let l = self.isa.vector_bytes / u64::from(dtype.bits() / 8).clamp(1, 4);
                match below {
                    E::Int(w) if (w as u64) <= l => int(l as i64),
                    w => add(round_up(w, l), int(l as i64)),
                }
            } else {
                below
            };
        }
        let name = format!("{}_{}", tile.name, self.bufs.len());
        let together = layout.together();
        let buf = self.bufs.push(Buf { name, dtype, dims, space: BufSpace::Scratch { strides, together } });
        Scratch { buf, layout, shared: false }
    }

    /// Coordinates in a scratch buffer of the point with local coordinates `local`, and the buffer dimension of each
    /// axis of the layout.
    pub(super) fn scratch_at(&self, s: &Scratch, local: impl Fn(AxisId) -> E) -> Vec<E> {
        let coordinate = |a: AxisId| match s.shared {
            true => add(self.ranges[a.index()].origin.clone(), local(a)),
            false => local(a),
        };
        let mut at: Vec<E> = s.layout.order.iter().map(|a| coordinate(*a)).collect();
        if let (Some(w), Some(last)) = (s.layout.panel, at.last_mut()) {
            let w = int(w as i64);
            let panel = last.clone().bin(BinaryOp::Div, w.clone());
            *last = last.clone().bin(BinaryOp::Mod, w);
            at.insert(0, panel);
        }
        at
    }

    /// The dimension of the scratch buffer that `axis` walks within a panel.
    pub(super) fn scratch_dim(s: &Scratch, axis: AxisId) -> Option<usize> {
        let i = s.layout.order.iter().position(|a| *a == axis)?;
        Some(i + usize::from(s.layout.panel.is_some()))
    }
}
