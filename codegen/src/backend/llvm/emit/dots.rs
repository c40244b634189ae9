//! Atoms that are dot products of pairs of bf16 (`vdpbf16ps`): sums in vector registers, a pair of a row's elements in all
//! lanes, pairs of the columns' elements from memory.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, "VDPBF16PS".

use super::*;
use einfall_ir::kernel::atoms::{self, Atom};
use einfall_ir::kernel::{AtomName, FragId, View};

impl<'a> Emit<'a> {
    fn dot_atom(&self, name: &AtomName) -> Option<Atom> {
        let unit = atoms::processor_dots(self.isa.lanes()).next().filter(|_| self.isa.dots)?;
        atoms::find(name).filter(|a| unit.over(a.shape[0], a.shape[1]) == *a)
    }

    /// Whether an atom is dot products of pairs that the processor has.
    pub(super) fn is_dot(&self, name: &AtomName) -> bool {
        self.dot_atom(name).is_some()
    }

    /// All rows by all vectors of columns; of an operand every element is loaded once.
    pub(super) fn dots(&mut self, name: &AtomName, (acc, from): (FragId, &[u64]), a: &View, b: &View) -> Out<()> {
        let Some(atom) = self.dot_atom(name) else { return Err(self.unsupported(&format!("the atom {}", name.0))) };
        let ([m, n, _], lanes) = (atom.shape, self.t.lanes);
        let (a_base, a_steps) = self.view_base(a)?;
        let (b_base, b_steps) = self.view_base(b)?;
        let (words, sums) = (self.t.vec("i32"), self.t.vec("float"));
        let pairs = format!("<{} x bfloat>", 2 * lanes);
        let mut columns = Vec::new();
        for j in (0..n).step_by(lanes as usize) {
            let p = self.address(b.buf, &b_base, &b_steps, &[0, j], None).ptr;
            columns.push((j, self.t.def(&format!("load {pairs}, ptr {p}, align 2"))));
        }
        for i in 0..m {
            let p = self.address(a.buf, &a_base, &a_steps, &[i, 0], None).ptr;
            let word = self.t.def(&format!("load i32, ptr {p}, align 2"));
            let row = self.t.splat("i32", &word);
            let row = self.t.def(&format!("bitcast {words} {row} to {pairs}"));
            for (j, column) in &columns {
                let coords = [from[0] + i, from[1] + j];
                let Some(r) = self.frags[acc.index()].regs.iter().position(|c| *c == coords) else {
                    return Err(self.unsupported("sums that are not held by rows"));
                };
                let sum = self.read_reg(acc, r);
                let sum = self.t.vector(&sum);
                let call = format!("llvm.x86.avx512bf16.dpbf16ps.{}", 32 * lanes);
                let sum = self.t.call(&sums, &call, &[(&sums, &sum), (&pairs, &row), (&pairs, column)]);
                self.write_reg(acc, r, Val::Vector(Ty::F32, sum))?;
            }
        }
        Ok(())
    }
}
