//! Tile copies by threads, and contractions by an atom's multiply-adds.
//!
//! A copy is done when it is issued, all its loads, then its stores, but for kernels with tiles of several stages or with
//! matrices: there what is loaded stays in variables until the copy's group is awaited ([`super::ahead`]). Both are among the orders that the
//! evaluator runs. Atoms whose operands are in variables are their meaning,
//! multiply-adds. Invariant: elements beyond the array are 0 in the tile.

use einfall_ir::kernel::{AtomName, BufSpace, Engine, Expr, FragId, Operand, View, atoms};
use einfall_ir::ops::BinaryOp;

use super::Res;
use super::emit::Emit;
use super::frag::class;
use super::value::{Ty, Val};

/// Pieces that a thread has under way.
const UNDER_WAY: u64 = 8;

/// A copy by the threads of a unit: which pieces it moves, and how threads share them out.
#[derive(Clone)]
pub(super) struct Pieces {
    src: View,
    dst: View,
    extents: Vec<u64>,
    /// Neighbours of a piece.
    n: u64,
    /// Dimensions of the tile, the one that goes fastest over threads first; whether neighbours lie along that one.
    order: Vec<usize>,
    leads: bool,
    /// Whether a piece is one item at both ends, which goes as it is.
    whole: bool,
}

/// A piece of one thread: whether there is one, and its first element in the tile.
struct Piece {
    exists: Val,
    coords: Vec<Val>,
}

impl Emit<'_> {
    pub(super) fn copy(&mut self, engine: Engine, src: &View, dst: &View, extents: &[u64], signals: bool) -> Res<()> {
        let k = self.k;
        let into_tile = matches!(k.bufs[src.buf].space, BufSpace::Global { .. })
            && matches!(k.bufs[dst.buf].space, BufSpace::Shared { .. });
        if engine == Engine::Tma || signals || !into_tile {
            return Err(self.fail("copies by an asynchronous engine"));
        }
        let n = self.piece(src, dst, extents);
        // The dimension that neighbours lie along in device memory goes fastest over threads.
        let last = k.bufs[src.buf].dims.len().checked_sub(1);
        let lead = (0..extents.len()).find(|d| src.walk.get(*d).copied().flatten().map(|w| w.0) == last);
        let mut order: Vec<usize> = (0..extents.len()).rev().collect();
        if let Some(lead) = lead {
            order.retain(|d| *d != lead);
            order.insert(0, lead);
        }
        let whole = self.native(src.buf) && [src.buf, dst.buf].iter().all(|b| self.form(*b).words == n);
        let (src, dst, extents, leads) = (src.clone(), dst.clone(), extents.to_vec(), lead.is_some());
        let c = Pieces { src, dst, extents, n, order, leads, whole };
        if self.ahead.is_some() {
            return self.issue(c);
        }
        for first in (0..self.steps(&c)).step_by(UNDER_WAY as usize) {
            let mut under_way = Vec::new();
            for step in first..self.steps(&c).min(first + UNDER_WAY) {
                let piece = self.at_step(&c, step)?;
                let to = self.place(&c, &piece, None)?;
                let names: Vec<String> = (0..self.values(&c)).map(|_| self.fresh("c")).collect();
                self.fetch_piece(&c, &piece, &names, "var ", true)?;
                under_way.push((piece, to, names));
            }
            for (piece, to, names) in under_way {
                self.leave_piece(&c, &piece, &to, &names)?;
            }
        }
        Ok(())
    }

    /// The number of the item of `n` elements, a power of two, that an element begins; no element has a negative number.
    pub(super) fn item_of(&self, element: &Val, n: u64) -> Val {
        match (element.known(), n) {
            (_, 1) => element.clone(),
            (Some(x), _) => Val::int(x >> n.trailing_zeros()),
            (None, _) => {
                Val::ranged(format!("({} >> {}u)", element.s, n.trailing_zeros()), element.lo.max(0), element.hi)
            }
        }
    }

    /// Pieces of a thread.
    pub(super) fn steps(&self, c: &Pieces) -> u64 {
        (c.extents.iter().product::<u64>() / c.n).div_ceil(self.unit_threads)
    }

    /// Variables of a piece.
    pub(super) fn values(&self, c: &Pieces) -> u64 {
        if c.whole { 1 } else { c.n }
    }

    /// The type of a variable of a piece, and its zero.
    pub(super) fn piece_type(&self, c: &Pieces) -> (String, String) {
        match class(self.k.bufs[c.src.buf].dtype) {
            _ if c.whole => (Self::half_item(c.n), format!("{}()", Self::half_item(c.n))),
            Ty::Float => ("f32".to_owned(), "0.0".to_owned()),
            Ty::Int | Ty::Bool => ("i32".to_owned(), "0".to_owned()),
        }
    }

    fn at_step(&mut self, c: &Pieces, step: u64) -> Res<Piece> {
        let (threads, pieces) = (self.unit_threads, c.extents.iter().product::<u64>() / c.n);
        let first = step * threads;
        let hi = (first + threads) as i64 - 1;
        let p = if first == 0 { "thread".to_string() } else { format!("(thread + {first})") };
        let mut rest = Val::ranged(p, first as i64, hi);
        let exists = self.bin(BinaryOp::Lt, &rest, &Val::int(pieces as i64))?;
        let mut coords = vec![Val::int(0); c.extents.len()];
        for (i, &d) in c.order.iter().enumerate() {
            let m = if i == 0 && c.leads { c.n } else { 1 };
            let extent = Val::int((c.extents[d] / m) as i64);
            let at = if c.order.last() == Some(&d) { rest.clone() } else { self.bin(BinaryOp::Mod, &rest, &extent)? };
            rest = self.bin(BinaryOp::Div, &rest, &extent)?;
            let at = self.bin(BinaryOp::Mul, &at, &Val::int(m as i64))?;
            coords[d] = self.named(&at);
        }
        Ok(Piece { exists, coords })
    }

    /// The number of a piece's item in the tile; `stage`: elements before its stage, if not the present one.
    fn place(&mut self, c: &Pieces, piece: &Piece, stage: Option<&Val>) -> Res<Val> {
        let stage = match stage {
            Some(s) => s.clone(),
            None => self.stage_offset(&c.dst)?,
        };
        let to = self.window(&c.dst, &piece.coords)?;
        let to = self.index_of(c.dst.buf, &to)?;
        let to = self.bin(BinaryOp::Add, &stage, &to)?;
        let to = self.item_of(&to, c.n);
        Ok(self.named(&to))
    }

    /// Whether all of what a copy moves is within the array.
    fn within(&mut self, c: &Pieces) -> Res<Val> {
        let first = vec![Val::int(0); c.extents.len()];
        let last: Vec<Val> = c.extents.iter().map(|n| Val::int(*n as i64 - 1)).collect();
        let mut all = Val::bool(true);
        for corner in [first, last] {
            let at = self.window(&c.src, &corner)?;
            let inside = self.inside(c.src.buf, &at)?;
            all = self.bin(BinaryOp::And, &all, &inside)?;
        }
        Ok(all)
    }

    /// Loads a piece into variables, zeros where it is beyond the array, which is not asked unless `checked`.
    fn fetch_piece(&mut self, c: &Pieces, piece: &Piece, names: &[String], declared: &str, checked: bool) -> Res<()> {
        let from = self.window(&c.src, &piece.coords)?;
        let inside = if checked { self.inside(c.src.buf, &from)? } else { Val::bool(true) };
        let inside = self.bin(BinaryOp::And, &piece.exists, &inside)?;
        // Rows are whole items, so that only what a trip moves is computed in it.
        let mut index = Val::int(0);
        for (d, at) in from.iter().enumerate() {
            let term = if d + 1 == from.len() {
                self.item_of(at, c.n)
            } else {
                let stride = self.stride(c.src.buf, d);
                let stride = self.item_of(&stride, c.n);
                let stride = self.settled(&stride);
                self.bin(BinaryOp::Mul, at, &stride)?
            };
            index = self.bin(BinaryOp::Add, &index, &term)?;
        }
        let index = Val { s: index.s, ..Val::new(Ty::Int, "") };
        let ty = class(self.k.bufs[c.src.buf].dtype);
        let (_, zero) = self.piece_type(c);
        for name in names.iter().filter(|_| inside.known() != Some(1) || !declared.is_empty()) {
            self.line(&format!("{declared}{name} = {zero};"));
        }
        if inside.known().is_none() {
            self.enter(&format!("if ({}) {{", inside.s));
        }
        // What is known to be outside stays 0; items of one type go as they are.
        let values = match inside.known() {
            Some(0) => Vec::new(),
            _ if c.whole => vec![Val::new(ty, format!("{}[{}]", self.variable(c.src.buf), index.s))],
            _ => self.load_group(c.src.buf, &index, c.n)?,
        };
        for (name, v) in names.iter().zip(&values) {
            self.line(&format!("{name} = {};", v.s));
        }
        if inside.known().is_none() {
            self.leave();
        }
        Ok(())
    }

    /// Stores a piece into the tile.
    fn leave_piece(&mut self, c: &Pieces, piece: &Piece, to: &Val, names: &[String]) -> Res<()> {
        let dtype = self.k.bufs[c.src.buf].dtype;
        let values: Vec<Val> = names.iter().map(|s| Val::new(class(dtype), s.clone())).collect();
        if piece.exists.known().is_none() {
            self.enter(&format!("if ({}) {{", piece.exists.s));
        }
        if c.whole {
            self.line(&format!("{}[{}] = {};", self.variable(c.dst.buf), to.s, names[0]));
        } else {
            self.store_group(c.dst.buf, to, &values, dtype)?;
        }
        if piece.exists.known().is_none() {
            self.leave();
        }
        Ok(())
    }

    /// The variables of a copy's piece under way.
    fn kept_piece(&self, c: &Pieces, step: u64) -> Vec<String> {
        let (of, each) = (self.variable(c.dst.buf), self.values(c));
        (0..each).map(|i| format!("h_{of}_{}", step * each + i)).collect()
    }

    /// Loads what a copy moves into variables of its own, which its group's end stores.
    fn issue(&mut self, c: Pieces) -> Res<()> {
        let ty = self.piece_type(&c).0;
        for step in 0..self.steps(&c) {
            for name in self.kept_piece(&c, step) {
                self.declare_once(&name, &ty);
            }
        }
        let stage = format!("h_{}_stage", self.variable(c.dst.buf));
        self.declare_once(&stage, "i32");
        let offset = self.stage_offset(&c.dst)?;
        self.line(&format!("{stage} = {};", offset.s));
        // A tile within the array has no piece beyond it.
        let within = self.within(&c)?;
        let apart = within.known().is_none();
        if apart {
            let within = self.named(&within);
            self.enter(&format!("if ({}) {{", within.s));
        }
        for (checked, wanted) in [(false, within.known() != Some(0)), (true, within.known() != Some(1))] {
            if !wanted {
                continue;
            }
            if checked && apart {
                self.leave();
                self.enter("else {");
            }
            for step in 0..self.steps(&c) {
                let (piece, names) = (self.at_step(&c, step)?, self.kept_piece(&c, step));
                self.fetch_piece(&c, &piece, &names, "", checked)?;
            }
        }
        if apart {
            self.leave();
        }
        if let Some(ahead) = &mut self.ahead {
            ahead.open.push(c);
        }
        Ok(())
    }

    /// Closes a group of copies.
    pub(super) fn commit(&mut self) {
        if let Some(ahead) = &mut self.ahead {
            let group = std::mem::take(&mut ahead.open);
            ahead.groups.push(group);
        }
    }

    /// Stores what all groups but the newest have loaded.
    pub(super) fn await_groups(&mut self, pending: u64) -> Res<()> {
        let Some(ahead) = &mut self.ahead else { return Ok(()) };
        let done = ahead.groups.len().saturating_sub(pending as usize);
        let done: Vec<Pieces> = ahead.groups.drain(..done).flatten().collect();
        for c in done {
            let stage = Val::ranged(format!("h_{}_stage", self.variable(c.dst.buf)), 0, i64::from(i32::MAX));
            for step in 0..self.steps(&c) {
                let (piece, names) = (self.at_step(&c, step)?, self.kept_piece(&c, step));
                let to = self.place(&c, &piece, Some(&stage))?;
                self.leave_piece(&c, &piece, &to, &names)?;
            }
        }
        Ok(())
    }

    /// Coordinates in a window's buffer of an element of the copied tile.
    pub(super) fn window(&mut self, view: &View, coords: &[Val]) -> Res<Vec<Val>> {
        let mut out = Vec::new();
        for (d, at) in view.at.iter().enumerate() {
            let mut x = self.int(at)?;
            for (i, w) in view.walk.iter().enumerate() {
                if let Some((to, step)) = *w
                    && to == d
                {
                    let c = self.bin(BinaryOp::Mul, &coords[i], &Val::int(step))?;
                    x = self.bin(BinaryOp::Add, &x, &c)?;
                }
            }
            out.push(self.named(&x));
        }
        Ok(out)
    }

    /// `acc += a·b` by multiply-adds of what each thread holds.
    pub(super) fn atom(
        &mut self,
        name: &AtomName,
        acc: FragId,
        acc_from: &[u64],
        a: &Operand,
        b: &Operand,
        keep: &Expr,
    ) -> Res<()> {
        if atoms::find(name).is_some_and(|x| x.cooperative()) {
            return self.product(name, acc, acc_from, (a, b), keep);
        }
        let found = atoms::find(name).filter(|x| x.threads_alone());
        let (Some(atom), Operand::Frag { frag: a, from: a_from }, Operand::Frag { frag: b, from: b_from }) =
            (found, a, b)
        else {
            return Err(self.fail(&format!("the instruction {}", name.0)));
        };
        let keep = self.int(keep)?;
        let [m, n, k] = atom.shape.map(|x| x as i64);
        let window = |e: &Self, f: FragId, from: &[u64], extents: [i64; 2]| -> Vec<(usize, [i64; 2])> {
            let held = e.held(f);
            let at = held.consts.iter().enumerate().map(|(v, c)| (v, [c[0] - from[0] as i64, c[1] - from[1] as i64]));
            at.filter(|(_, c)| (0..2).all(|d| (0..extents[d]).contains(&c[d]))).collect()
        };
        let cells = window(self, acc, acc_from, [m, n]);
        let (left, right) = (window(self, *a, a_from, [m, k]), window(self, *b, b_from, [k, n]));
        let mut first = keep.known() == Some(0);
        if keep.known().is_none() {
            return Err(self.fail("an accumulator that is kept or not as a value says"));
        }
        for step in 0..k {
            for (v, [row, column]) in &cells {
                let x = left.iter().find(|(_, c)| *c == [*row, step]).map(|(i, _)| self.element(*a, *i));
                let y = right.iter().find(|(_, c)| *c == [step, *column]).map(|(i, _)| self.element(*b, *i));
                let (Some(x), Some(y)) = (x, y) else {
                    return Err(self.fail("an atom whose operands other threads hold"));
                };
                let acc = self.element(acc, *v);
                let text = match first {
                    true => format!("{} = {} * {};", acc.s, x.s, y.s),
                    false => format!("{0} = fma({1}, {2}, {0});", acc.s, x.s, y.s),
                };
                self.line(&text);
            }
            first = false;
        }
        Ok(())
    }
}
