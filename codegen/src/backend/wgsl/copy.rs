//! Tile copies by threads, and contractions by an atom's multiply-adds.
//!
//! What hardware with asynchronous copies overlaps is done here when it is issued, which is one of the orders that the
//! evaluator runs: all loads of a copy first, then its stores. Atoms whose operands are in variables are their meaning,
//! multiply-adds. Invariant: elements beyond the array are 0 in the tile.

use einfall_ir::kernel::{AtomName, BufSpace, Engine, Expr, FragId, Operand, View, atoms};
use einfall_ir::ops::BinaryOp;

use super::Res;
use super::emit::Emit;
use super::frag::class;
use super::value::{Ty, Val};

/// Pieces that a thread has under way.
const UNDER_WAY: u64 = 8;

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
        let (threads, pieces) = (self.unit_threads, extents.iter().product::<u64>() / n);
        let stage = self.stage_offset(dst)?;
        let mut step = 0;
        while step * threads < pieces {
            let mut under_way = Vec::new();
            while step * threads < pieces && under_way.len() < UNDER_WAY as usize {
                let first = step * threads;
                let hi = (first + threads) as i64 - 1;
                let p = if first == 0 { "thread".to_string() } else { format!("(thread + {first})") };
                let mut rest = Val::ranged(p, first as i64, hi);
                let exists = self.bin(BinaryOp::Lt, &rest, &Val::int(pieces as i64))?;
                let mut coords = vec![Val::int(0); extents.len()];
                for &d in &order {
                    let m = if Some(d) == lead { n } else { 1 };
                    let extent = Val::int((extents[d] / m) as i64);
                    let c =
                        if order.last() == Some(&d) { rest.clone() } else { self.bin(BinaryOp::Mod, &rest, &extent)? };
                    rest = self.bin(BinaryOp::Div, &rest, &extent)?;
                    let c = self.bin(BinaryOp::Mul, &c, &Val::int(m as i64))?;
                    coords[d] = self.named(&c);
                }
                let from = self.window(src, &coords)?;
                let inside = self.inside(src.buf, &from)?;
                let inside = self.bin(BinaryOp::And, &exists, &inside)?;
                let to = self.window(dst, &coords)?;
                let to = self.index_of(dst.buf, &to)?;
                let to = self.bin(BinaryOp::Add, &stage, &to)?;
                let to = self.bin(BinaryOp::Div, &to, &Val::int(n as i64))?;
                let to = self.named(&to);
                let index = self.index_of(src.buf, &from)?;
                let index = self.bin(BinaryOp::Div, &index, &Val::int(n as i64))?;
                let index = Val { s: index.s, ..Val::new(Ty::Int, "") };
                let ty = class(k.bufs[src.buf].dtype);
                // Items of one type go as they are.
                let whole = self.native(src.buf) && [src.buf, dst.buf].iter().all(|b| self.form(*b).words == n);
                let names: Vec<String> = (0..if whole { 1 } else { n }).map(|_| self.fresh("c")).collect();
                for name in &names {
                    let zero = match ty {
                        _ if whole => format!("{}()", Self::half_item(n)),
                        Ty::Float => "0.0".to_owned(),
                        Ty::Int | Ty::Bool => "0".to_owned(),
                    };
                    self.line(&format!("var {name} = {zero};"));
                }
                if inside.known().is_none() {
                    self.enter(&format!("if ({}) {{", inside.s));
                }
                // What is known to be outside stays 0.
                let values = match inside.known() {
                    Some(0) => Vec::new(),
                    _ if whole => vec![Val::new(ty, format!("{}[{}]", self.variable(src.buf), index.s))],
                    _ => self.load_group(src.buf, &index, n)?,
                };
                for (name, v) in names.iter().zip(&values) {
                    self.line(&format!("{name} = {};", v.s));
                }
                if inside.known().is_none() {
                    self.leave();
                }
                under_way.push((exists, to, whole, names.into_iter().map(|s| Val::new(ty, s)).collect::<Vec<_>>()));
                step += 1;
            }
            for (exists, to, whole, values) in under_way {
                if exists.known().is_none() {
                    self.enter(&format!("if ({}) {{", exists.s));
                }
                if whole {
                    self.line(&format!("{}[{}] = {};", self.variable(dst.buf), to.s, values[0].s));
                } else {
                    self.store_group(dst.buf, &to, &values, k.bufs[src.buf].dtype)?;
                }
                if exists.known().is_none() {
                    self.leave();
                }
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
