//! Contractions by instructions that read registers and are done when they are issued: operands in shared memory are
//! loaded into fragments held as the instruction reads them, a step of k at a time.
//!
//! Invariant: a fragment of `b` has two neighbouring atoms' columns at most, so that the registers in use stay few
//! whatever the block; the assembler renames them and loads ahead.

use einfall_ir::kernel::{Expr, FragId, Operand, Stmt, View};
use einfall_ir::tile::{AxisId, Op, Space, TileId};

use super::super::assign_layouts::{Oriented, repeated};
use super::super::exprs::{Place, add};
use super::super::schedule::Iteration;
use super::super::{Step, refuse};
use super::Emit;

impl Emit<'_, '_> {
    /// Contraction `i` by its synchronous atom.
    pub(super) fn contract_now(
        &mut self,
        i: usize,
        o: &Oriented,
        place: &Place,
        at: &Iteration,
        out: &mut Vec<Stmt>,
    ) -> Step<()> {
        let f = self.f;
        let Op::Contract { out: t, carry, .. } = f.ops[i].op else {
            return refuse("atoms", "not a contraction", "this is a fault of the compiler");
        };
        if o.atom.cooperative() {
            self.multiply(i, o, place, at, out);
            return Ok(());
        }
        let (Some(a_window), Some(b_window)) = (&o.atom.a_dist, &o.atom.b_dist) else {
            let message = format!("{} reads no register operands", o.atom.name.0);
            return refuse("operand source", message, "use an asynchronous atom");
        };
        let acc = self.frag(*t);
        let [m, n, k] = o.atom.shape;
        let [rows, columns, depth] = o.extents;
        let in_registers = (f.tile(o.a).space == Space::Registers).then(|| self.frag(o.a));
        let wide = if columns.is_multiple_of(2 * n) { 2 * n } else { n };
        let name = f.ops[i].name.clone();
        let a_dist = repeated(a_window, [rows, k], 1);
        let b_dist = repeated(b_window, [k, wide], 0);
        let dtype = o.atom.operand;
        let a_frag = in_registers.unwrap_or_else(|| self.temp(&format!("{name}_left"), dtype, &a_dist));
        let b_frag = self.temp(&format!("{name}_right"), dtype, &b_dist);
        for ki in 0..depth / k {
            if in_registers.is_none() {
                let src = self.part(o.a, [o.m, o.k], [0, ki * k], o.k, place, at);
                out.push(Stmt::Load { out: a_frag, src, bounds: Vec::new() });
            }
            for first in (0..columns).step_by(wide as usize) {
                let src = self.part(o.b, [o.k, o.n], [ki * k, first], o.k, place, at);
                out.push(Stmt::Load { out: b_frag, src, bounds: Vec::new() });
                for mi in 0..rows / m {
                    for ni in 0..wide / n {
                        let a_from = vec![mi * m, if in_registers.is_some() { ki * k } else { 0 }];
                        let operand = |frag: FragId, from| Operand::Frag { frag, from };
                        out.push(Stmt::Atom {
                            atom: o.atom.name.clone(),
                            acc,
                            acc_from: vec![mi * m, first + ni * n],
                            a: operand(a_frag, a_from),
                            b: operand(b_frag, vec![0, ni * n]),
                            keep: Expr::Int(i64::from(*carry || ki > 0)),
                        });
                    }
                }
            }
        }
        self.give_back(i, at, out);
        Ok(())
    }

    /// Contraction `i` of matrices that the instruction reads from shared memory itself.
    fn multiply(&mut self, i: usize, o: &Oriented, place: &Place, at: &Iteration, out: &mut Vec<Stmt>) {
        let Op::Contract { out: t, carry, .. } = self.f.ops[i].op else { return };
        let (acc, [m, n, k], [rows, columns, depth]) = (self.frag(*t), o.atom.shape, o.extents);
        let starts = |extent: u64, step: u64| (0..extent).step_by(step as usize);
        for ki in starts(depth, k) {
            // Of the wider operand one matrix is held at a time.
            for ni in starts(columns, n) {
                for mi in starts(rows, m) {
                    out.push(Stmt::Atom {
                        atom: o.atom.name.clone(),
                        acc,
                        acc_from: vec![mi, ni],
                        a: Operand::Mem(self.part(o.a, [o.m, o.k], [mi, ki], o.k, place, at)),
                        b: Operand::Mem(self.part(o.b, [o.k, o.n], [ki, ni], o.k, place, at)),
                        keep: Expr::Int(i64::from(*carry || ki > 0)),
                    });
                }
            }
        }
        self.give_back(i, at, out);
    }

    /// Gives back the stages that contraction `i` is the last to read.
    fn give_back(&self, i: usize, at: &Iteration, out: &mut Vec<Stmt>) {
        let f = self.f;
        for c in 0..f.channels.len() {
            let here = f.channels[c].stream.is_some() || self.item.is_none();
            if f.channels[c].last_reader == i && here && self.empty[c].is_some() {
                self.release_block(c, at, out);
            }
        }
    }

    /// The window of a shared tile that starts at `from` of the unit's part, walked along `walk`.
    fn part(
        &self,
        t: TileId,
        walk: [AxisId; 2],
        from: [u64; 2],
        summed: AxisId,
        place: &Place,
        at: &Iteration,
    ) -> View {
        let f = self.f;
        let dims = &f.tile(t).dims;
        let origin = dims.iter().map(|d| {
            let first = walk.iter().position(|a| a == d).map_or(0, |x| from[x]);
            // Summed axes are whole in every unit.
            let unit = if *d == summed { Expr::Int(0) } else { f.unit_offset(*d, place.role) };
            add(unit, Expr::Int(first as i64))
        });
        let stage = f.channel(t).and_then(|c| self.stage(c, at));
        let at = origin.collect();
        let walk = walk.map(|a| dims.iter().position(|d| *d == a).map(|d| (d, 1))).to_vec();
        View { buf: self.shared(t), stage, at, walk }
    }
}
