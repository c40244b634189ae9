//! Contractions: an outer product per step of the summed axes, in a register tile of MR rows × NR columns of lanes.
//!
//! Where the processor has an instruction for it ([`Atom`]) and both operands are of its type, the step is atoms: on tiles of
//! scratch, or on pairs of neighbours along the innermost summed axis.
//! Operands that are not laid out for it are packed into scratch first ([`super::place`]). Contractions with almost no
//! rows to share the columns over are reductions of products instead ([`thin`]). Source of the blocking: K. Goto and
//! R. van de Geijn, "Anatomy of high-performance matrix multiplication", 2008; here the column panel stays in L1.

use std::collections::BTreeMap;

use einfall_ir::analysis::runs::runs;
use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms::Atom;
use einfall_ir::kernel::{Bound, Expr as E, Frag, FragId, Operand, Stmt, View};
use einfall_ir::layout::Distribution;
use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{self, AxisId, BufferId, ExprId, Node, Op, TileId};

use super::access::{Point, Sink};
use super::build::*;
use super::nest::TransposeSource;
use super::place::{Layout, Place, Scratch, Shape};
use super::runs::RunRows;
use super::{Lower, Out};

/// One step of the summed axes, given local coordinates and the chunk and offset of the innermost.
type StepBody<'b, 'l> = dyn FnMut(&mut Lower<'l>, &BTreeMap<AxisId, E>, Option<(E, E)>) -> Vec<Stmt> + 'b;

/// An element of a tile at a point.
type Value<'b, 'l> = dyn FnMut(&mut Lower<'l>, &Point, &mut Sink) -> Out<E> + 'b;

/// A contraction whose operands are laid out for it.
pub(super) struct Product {
    pub(super) out: TileId,
    /// Whether it adds to the value before.
    carry: bool,
    pub(super) shape: Shape,
    /// The axis of the columns.
    lane: AxisId,
    /// Rows and columns.
    ra: Scratch,
    pub(super) rb: Scratch,
    /// The result.
    acc: Scratch,
}

/// Contractions whose columns are shared by at most this many rows are reductions.
pub(super) const THIN_ROWS: u64 = 2;

/// The product of a contraction's operands among the expressions that [`thin`] adds.
pub(super) fn factors(k: &tile::Kernel, a: TileId, b: TileId) -> Option<ExprId> {
    let tile = |e: ExprId| match k.exprs[e] {
        tile::Expr::Tile(t) => Some(t),
        _ => None,
    };
    let found = k.exprs.iter().find(|(_, e)| match e {
        tile::Expr::Binary(BinaryOp::Mul, x, y) => tile(*x) == Some(a) && tile(*y) == Some(b),
        _ => false,
    });
    found.map(|f| f.0)
}

/// Rewrites contractions with no axis of their own per operand, or almost no rows, to reductions of products.
pub(super) fn thin(plan: &tile::Plan, k: &tile::Kernel) -> tile::Kernel {
    fn go(plan: &tile::Plan, whole: &tile::Kernel, k: &mut tile::Kernel, nodes: &mut [Node]) {
        for n in nodes {
            match n {
                Node::Stream(s) => go(plan, whole, k, &mut s.body),
                Node::Op(op) => {
                    let runs = runs(plan, whole, op);
                    let Op::Contract { out, a, b, over, carry } = op else { continue };
                    let few = |x: &AxisId| {
                        let axis = &k.axes[*x];
                        let fixed = match axis.extent {
                            einfall_ir::cascade::Size::Const(n) => Some(n),
                            _ => None,
                        };
                        let block = match axis.kind {
                            tile::AxisKind::Inner => fixed,
                            tile::AxisKind::Grid | tile::AxisKind::Stream => {
                                Some(axis.block.unwrap_or(1).min(fixed.unwrap_or(u64::MAX)))
                            }
                        };
                        block.is_some_and(|b| b <= THIN_ROWS)
                    };
                    let has = |t: TileId, x: &AxisId| {
                        let single = runs.as_ref().is_some_and(|r| r.operand == t && r.axis == *x);
                        k.tiles[t].axes.contains(x) && !single
                    };
                    let own = |t: TileId, o: TileId| {
                        let (t, out) = (&k.tiles[t].axes, &k.tiles[*out].axes);
                        t.iter().filter(|x| !has(o, x) && out.contains(x)).all(few)
                    };
                    let reduces = own(*a, *b) || own(*b, *a);
                    if !reduces && runs.is_none() {
                        continue;
                    }
                    let (a, b, out, over, carry) = (*a, *b, *out, over.clone(), *carry);
                    let (x, y) = (k.exprs.push(tile::Expr::Tile(a)), k.exprs.push(tile::Expr::Tile(b)));
                    let value = k.exprs.push(tile::Expr::Binary(BinaryOp::Mul, x, y));
                    // Of short runs the products are reduced, too.
                    if !reduces {
                        continue;
                    }
                    *op = Op::Reduce { out: vec![out], op: ReduceOp::Sum, value, over, carry };
                }
            }
        }
    }
    let whole = k;
    let mut k = k.clone();
    let mut body = std::mem::take(&mut k.body);
    go(plan, whole, &mut k, &mut body);
    k.body = body;
    k
}

impl<'l> Lower<'l> {
    /// A contraction.
    pub(super) fn contract(&mut self, op: &Op) -> Out<Vec<Stmt>> {
        let Op::Contract { out, a, b, carry, .. } = op else { return Ok(Vec::new()) };
        let shape = self.contract_shape(op);
        let Some(lane) = shape.lane else { return Err(self.unsupported("a contraction without columns")) };
        let (rows, cols) = if shape.swapped { (*b, *a) } else { (*a, *b) };
        let mut stmts = Vec::new();
        let row_layout = self.row_layout(rows, &shape);
        let lane_layout = self.lane_layout(cols, &shape);
        let ra = self.operand(rows, row_layout, true, &mut stmts)?;
        if let Some(atom) = &shape.atom {
            stmts.extend(self.clear_tail(&ra, &shape, atom)?);
        }
        let Place::Scratch(acc) = self.places[out.index()].clone() else {
            return Err(self.unsupported("a contraction into an array"));
        };
        let product = |shape: Shape, rb: Scratch| Product { out: *out, carry: *carry, shape, lane, ra, rb, acc };
        if let Some(runs) = shape.runs.clone() {
            let rb = self.copy_of(cols, lane_layout, false);
            stmts.extend(self.product_of_runs(op, &product(shape, rb), &runs)?);
            return Ok(stmts);
        }
        let rb = self.operand(cols, lane_layout, false, &mut stmts)?;
        stmts.extend(self.product(&product(shape, rb), &mut BTreeMap::new(), None)?);
        Ok(stmts)
    }

    /// Register tiles over the columns and all rows of a block, or those of a run.
    pub(super) fn product(
        &mut self,
        p: &Product,
        local: &mut BTreeMap<AxisId, E>,
        run: Option<&RunRows>,
    ) -> Out<Vec<Stmt>> {
        let (lane, row) = (p.lane, p.shape.row);
        let others: Vec<AxisId> = self
            .wide(&self.k.tiles[p.out].axes)
            .into_iter()
            .filter(|x| *x != lane && Some(*x) != row && !local.contains_key(x))
            .collect();
        self.loops(&others, local, &mut |s, local| {
            let j = s.var(&s.k.axes[lane].name.clone());
            local.insert(lane, E::Var(j));
            let body = match (row, run) {
                (Some(r), Some(run)) => s.run_tiles(p, r, run, local)?,
                (Some(r), None) => {
                    let i = s.var(&s.k.axes[r].name.clone());
                    local.insert(r, E::Var(i));
                    let body = s.register_tile(p, p.shape.mr, local, None);
                    local.remove(&r);
                    let hi = s.ranges[r.index()].size.clone();
                    vec![Stmt::For { var: i, lo: int(0), hi, step: p.shape.mr as i64, unroll: false, body }]
                }
                (None, _) => s.register_tile(p, p.shape.mr, local, None),
            };
            local.remove(&lane);
            let hi = s.ranges[lane.index()].size.clone();
            Ok(vec![Stmt::For { var: j, lo: int(0), hi, step: p.shape.nr as i64, unroll: false, body }])
        })
    }

    /// One register tile of `mr` rows over all summed axes; of its rows, the first `limit` are stored.
    pub(super) fn register_tile(
        &mut self,
        p: &Product,
        mr: u64,
        local: &BTreeMap<AxisId, E>,
        limit: Option<E>,
    ) -> Vec<Stmt> {
        let (shape, lane, ra, rb) = (Shape { mr, ..p.shape.clone() }, p.lane, &p.ra, &p.rb);
        let dtype = Self::register_type(self.k.tiles[p.out].dtype);
        let out_dtype = self.held(p.out);
        let full = Distribution::vectors(&[mr, shape.nr], Some(1), self.isa.lanes());
        let acc = self.tile_frag("acc", dtype, full.clone());
        let place = |s: &Self, at: &Scratch, local: &BTreeMap<AxisId, E>, split: Option<(E, E)>| -> Vec<E> {
            let mut v = s.scratch_at(at, |a| local.get(&a).cloned().unwrap_or(int(0)));
            if let (Some(_), Some((panel, inner))) = (at.layout.panel, split) {
                let last = v.len() - 1;
                v[0] = panel;
                v[last] = inner;
            }
            v
        };
        let walk = |at: &Scratch, a: Option<AxisId>| a.and_then(|a| Self::scratch_dim(at, a)).map(|d| (d, 1));
        let acc_view = View {
            buf: p.acc.buf,
            stage: None,
            at: place(self, &p.acc, local, None),
            walk: vec![walk(&p.acc, shape.row), walk(&p.acc, Some(lane))],
        };
        let mut inner = Vec::new();
        if p.carry {
            inner.push(Stmt::Load { out: acc, src: acc_view.clone(), bounds: Vec::new() });
        } else {
            inner.push(Stmt::Map { out: acc, value: if dtype == DType::I64 { int(0) } else { E::Float(0.0) } });
        }
        inner.extend(self.summed(&shape, ra, local, &mut |s, local, split| {
            if let Some(atom) = &shape.atom {
                let (a, b) = (place(s, ra, local, split), place(s, rb, local, None));
                return Self::tiles(&shape, atom, acc, (ra, a), (rb, b));
            }
            let fa = s.tile_frag("rows", dtype, full.project(&[0]));
            let fb = s.tile_frag("cols", dtype, full.project(&[1]));
            let view = |s: &Self, p: &Scratch, a: Option<AxisId>, split: Option<(E, E)>| View {
                buf: p.buf,
                stage: None,
                at: place(s, p, local, split),
                walk: vec![walk(p, a)],
            };
            let frag = |f: FragId, dims: Vec<usize>| Box::new(E::Frag { frag: f, dims });
            let (x, y, z) = (frag(fa, vec![0]), frag(fb, vec![1]), frag(acc, vec![0, 1]));
            let value = if dtype == DType::I64 {
                E::Binary(BinaryOp::Add, z, Box::new(E::Binary(BinaryOp::Mul, x, y)))
            } else {
                E::Fma(x, y, z)
            };
            vec![
                Stmt::Load { out: fb, src: view(s, rb, Some(lane), None), bounds: Vec::new() },
                Stmt::Load { out: fa, src: view(s, ra, shape.row, split), bounds: Vec::new() },
                Stmt::Map { out: acc, value },
            ]
        }));
        let src = if matches!(out_dtype, DType::F32 | DType::F64 | DType::I64) {
            acc
        } else {
            let r = self.tile_frag("rounded", dtype, full.clone());
            let v = E::Frag { frag: acc, dims: vec![0, 1] };
            inner.push(Stmt::Map { out: r, value: E::Cast(out_dtype, Box::new(v)) });
            r
        };
        match limit {
            Some(limit) if shape.atom.as_ref().is_some_and(Atom::tiled) => {
                inner.extend(self.store_rows(&acc_view, src, &shape, limit))
            }
            limit => {
                let bounds = limit.map(|limit| Bound { dim: 0, limit }).into_iter().collect();
                inner.push(Stmt::Store { dst: acc_view, src, bounds, join: None });
            }
        }
        inner
    }

    /// The atoms of one step: all pairs of a tile of rows and a tile of columns, or one that has all.
    fn tiles(
        shape: &Shape,
        atom: &Atom,
        acc: FragId,
        (ra, a_at): (&Scratch, Vec<E>),
        (rb, b_at): (&Scratch, Vec<E>),
    ) -> Vec<Stmt> {
        let atom = atom.over(shape.mr, shape.nr);
        let [m, n, _] = atom.shape;
        let last = shape.over.last().copied();
        let view = |s: &Scratch, at: &[E], own: Option<AxisId>, from: u64, rows: bool| {
            let dim = |axis: Option<AxisId>| axis.and_then(|x| Lower::scratch_dim(s, x)).map(|d| (d, 1));
            let mut at = at.to_vec();
            if let Some((d, _)) = dim(own) {
                at[d] = add(at[d].clone(), int(from as i64));
            }
            let walk = if rows { vec![dim(own), dim(last)] } else { vec![dim(last), dim(own)] };
            View { buf: s.buf, stage: None, at, walk }
        };
        let mut out = Vec::new();
        for i in (0..shape.mr).step_by(m as usize) {
            for j in (0..shape.nr).step_by(n as usize) {
                out.push(Stmt::Atom {
                    atom: atom.name.clone(),
                    acc,
                    acc_from: vec![i, j],
                    a: Operand::Mem(view(ra, &a_at, shape.row, i, true)),
                    b: Operand::Mem(view(rb, &b_at, shape.lane, j, false)),
                    keep: int(1),
                });
            }
        }
        out
    }

    /// Sets what lies between the end of the innermost summed axis and the end of an atom's step to 0 in every row.
    fn clear_tail(&mut self, rows: &Scratch, shape: &Shape, atom: &Atom) -> Out<Vec<Stmt>> {
        let Some(&k) = shape.over.last() else { return Ok(Vec::new()) };
        let (size, step) = (self.ranges[k.index()].size.clone(), atom.shape[2]);
        if matches!(size, E::Int(n) if (n as u64).is_multiple_of(step)) {
            return Ok(Vec::new());
        }
        let zero = self.frag("zero", DType::F32, 0);
        let outer: Vec<AxisId> = rows.layout.order.iter().copied().filter(|x| *x != k).collect();
        let mut local = BTreeMap::new();
        let body = self.loops(&outer, &mut local, &mut |s, local| {
            let v = s.var(&s.k.axes[k].name.clone());
            local.insert(k, E::Var(v));
            let at = s.scratch_at(rows, |x| local.get(&x).cloned().unwrap_or(int(0)));
            local.remove(&k);
            let dst = View { buf: rows.buf, stage: None, at, walk: vec![] };
            let body = vec![Stmt::Store { dst, src: zero, bounds: Vec::new(), join: None }];
            let hi = round_up(size.clone(), step);
            Ok(vec![Stmt::For { var: v, lo: size.clone(), hi, step: 1, unroll: false, body }])
        })?;
        let mut then = vec![Stmt::Map { out: zero, value: E::Float(0.0) }];
        then.extend(body);
        Ok(vec![Stmt::If { cond: size.bin(BinaryOp::Mod, int(step as i64)), then, otherwise: Vec::new() }])
    }

    pub(super) fn tile_frag(&mut self, name: &str, dtype: DType, dist: Distribution) -> FragId {
        let name = format!("{name}_{}", self.frags.len());
        self.frags.push(Frag { name, dtype, dist })
    }

    /// Loops over the summed axes around one step; the innermost in chunks where the row operand is.
    fn summed(
        &mut self,
        shape: &Shape,
        rows: &Scratch,
        local: &BTreeMap<AxisId, E>,
        step: &mut StepBody<'_, 'l>,
    ) -> Vec<Stmt> {
        let mut local = local.clone();
        let Some((&last, before)) = shape.over.split_last() else { return step(self, &local, None) };
        let vars: Vec<_> = before
            .iter()
            .map(|a| {
                let v = self.var(&self.k.axes[*a].name.clone());
                local.insert(*a, E::Var(v));
                (*a, v)
            })
            .collect();
        let name = self.k.axes[last].name.clone();
        let size = self.ranges[last.index()].size.clone();
        let k = self.var(&name);
        // Rows and lanes lie beyond the end up to the end of an atom's step, and are 0 there.
        let step_by = shape.atom.as_ref().map_or(1, |a| a.shape[2] as i64);
        let chunk = rows.layout.panel.filter(|_| rows.layout.order.last() == Some(&last));
        let mut body = match chunk {
            None => {
                local.insert(last, E::Var(k));
                let body = step(self, &local, None);
                vec![Stmt::For { var: k, lo: int(0), hi: size, step: step_by, unroll: false, body }]
            }
            Some(w) if w as i64 == step_by => {
                // A step is a panel.
                local.insert(last, mul(E::Var(k), int(step_by)));
                let body = step(self, &local, Some((E::Var(k), int(0))));
                vec![Stmt::For { var: k, lo: int(0), hi: ceil_div(size, w), step: 1, unroll: false, body }]
            }
            Some(w) => {
                let c = self.var(&name);
                let w = w as i64;
                let origin = mul(E::Var(c), int(w));
                local.insert(last, add(origin.clone(), E::Var(k)));
                let body = step(self, &local, Some((E::Var(c), E::Var(k))));
                let hi = min(int(w), sub(size.clone(), origin));
                let inner = Stmt::For { var: k, lo: int(0), hi, step: step_by, unroll: false, body };
                let chunks = ceil_div(size, w as u64);
                vec![Stmt::For { var: c, lo: int(0), hi: chunks, step: 1, unroll: false, body: vec![inner] }]
            }
        };
        for (a, v) in vars.into_iter().rev() {
            let hi = self.ranges[a.index()].size.clone();
            body = vec![Stmt::For { var: v, lo: int(0), hi, step: 1, unroll: false, body }];
        }
        body
    }

    /// The operand in the layout wanted: its own place, or a packed copy made now.
    fn operand(&mut self, t: TileId, layout: Layout, row: bool, stmts: &mut Vec<Stmt>) -> Out<Scratch> {
        if let Place::Scratch(s) = &self.places[t.index()]
            && self.laid_out(s, &layout)
        {
            return Ok(s.clone());
        }
        let s = self.copy_of(t, layout, row);
        stmts.extend(self.pack(t, &s)?);
        Ok(s)
    }

    /// Scratch for a packed copy of an operand of the operation at the current position.
    fn copy_of(&mut self, t: TileId, layout: Layout, row: bool) -> Scratch {
        let key = (self.position, row);
        match self.packs.get(&key) {
            Some(s) => s.clone(),
            None => {
                let s = self.scratch(t, layout);
                self.packs.insert(key, s.clone());
                s
            }
        }
    }

    /// Copies a tile into scratch of another layout; one coordinate of the axes that a run fixes.
    pub(super) fn pack(&mut self, t: TileId, to: &Scratch) -> Out<Vec<Stmt>> {
        let direct;
        let from = match &self.places[t.index()] {
            Place::Direct { buffer, at } => {
                direct = (*buffer, at.clone());
                Some(TransposeSource::Array { buffer: direct.0, at: &direct.1 })
            }
            Place::Scratch(s) => Some(TransposeSource::Scratch(s.clone())),
            Place::Computed(_) => None,
        };
        if let Some(from) = from
            && let Some(stmts) = self.transpose_into(to, &from)?
        {
            return Ok(stmts);
        }
        if to.layout.together() > 1 {
            let names = self.own_places(t);
            return self.pack_pairs(to, &mut |s, p, sink| s.tile_value(t, &names, p, sink));
        }
        let Some(&lane) = to.layout.order.last() else {
            return Err(self.unsupported("a contraction of scalars"));
        };
        let outer: Vec<AxisId> = to.layout.order.iter().copied().filter(|a| *a != lane).collect();
        let dtype = Self::register_type(self.bufs[to.buf].dtype);
        let names = self.own_places(t);
        let mut local = self.run.at.clone();
        let width = self.isa.lanes();
        self.loops(&outer, &mut local, &mut |s, local| {
            s.along_axis(lane, width, local, &mut |s, p: &Point| {
                let mut sink = Sink::default();
                let v = s.tile_value(t, &names, p, &mut sink)?;
                let frag = s.frag("packed", dtype, p.width);
                sink.inner.push(Stmt::Map { out: frag, value: v });
                let stmt = s.scratch_store(to, frag, true, p)?;
                sink.inner.push(stmt);
                Ok(sink.inner)
            })
        })
    }

    /// Loads a tile that lives where neighbours stand together.
    pub(super) fn load_paired(&mut self, t: TileId, buffer: BufferId, at: &[ExprId]) -> Out<Vec<Stmt>> {
        let Place::Scratch(to) = self.places[t.index()].clone() else {
            return Err(self.unsupported("a load of pairs into an array"));
        };
        if let Some(stmts) = self.transpose_into(&to, &TransposeSource::Array { buffer, at })? {
            return Ok(stmts);
        }
        self.pack_pairs(&to, &mut |s, p, sink| s.read_value(buffer, at, p, sink))
    }

    /// Writes two rows at a time where pairs of rows stand together, and zeros from the last row to the end of an atom's
    /// step.
    fn pack_pairs(&mut self, to: &Scratch, value: &mut Value<'_, 'l>) -> Out<Vec<Stmt>> {
        let [outer @ .., k, lane] = to.layout.order.as_slice() else {
            return Err(self.unsupported("pairs of a tile with one axis"));
        };
        let (k, lane) = (*k, *lane);
        // A panel's row at a time.
        let width = to.layout.panel.unwrap_or(1).max(self.isa.lanes());
        let rows = self.ranges[k.index()].size.clone();
        let two = |e: &E| e.clone().bin(BinaryOp::Mod, int(2));
        let even = sub(rows.clone(), two(&rows));
        let padded = round_up(rows.clone(), self.step());
        let mut local = self.run.at.clone();
        self.loops(outer, &mut local, &mut |s, local| {
            let mut out = Vec::new();
            // Pairs of rows, a last row alone, pairs of none.
            let parts = [
                (int(0), even.clone(), 2),
                (even.clone(), rows.clone(), 1),
                (round_up(rows.clone(), 2), padded.clone(), 0),
            ];
            for (lo, hi, present) in parts {
                if lo == hi {
                    continue;
                }
                let v = s.var(&s.k.axes[k].name.clone());
                let body = s.along_axis(lane, width, local, &mut |s, p| {
                    let mut sink = Sink::default();
                    let mut values = Vec::new();
                    for i in 0..present {
                        let mut p = p.clone();
                        p.local.insert(k, add(E::Var(v), int(i)));
                        let x = value(s, &p, &mut sink)?;
                        let frag = s.frag("row", DType::F32, p.width);
                        sink.inner.push(Stmt::Map { out: frag, value: x });
                        values.push(E::Frag { frag, dims: vec![1] });
                    }
                    let dist = Distribution::vectors(&[2, p.width], Some(1), s.isa.lanes());
                    let pair = s.tile_frag("pair", DType::F32, dist);
                    let mut values = values.into_iter();
                    let [x, y] = [(); 2].map(|()| values.next().unwrap_or(E::Float(0.0)));
                    let first = E::Coord(0).bin(BinaryOp::Eq, int(0));
                    sink.inner
                        .push(Stmt::Map { out: pair, value: E::Select(Box::new(first), Box::new(x), Box::new(y)) });
                    let mut at = p.local.clone();
                    at.insert(k, E::Var(v));
                    let at = s.scratch_at(to, |x| at.get(&x).cloned().unwrap_or(int(0)));
                    let dim = |x: AxisId| Self::scratch_dim(to, x).map(|d| (d, 1));
                    let dst = View { buf: to.buf, stage: None, at, walk: vec![dim(k), dim(lane)] };
                    sink.inner.push(Stmt::Store { dst, src: pair, bounds: Vec::new(), join: None });
                    Ok(sink.inner)
                })?;
                out.push(Stmt::For { var: v, lo, hi, step: 2, unroll: false, body });
            }
            Ok(out)
        })
    }
}
