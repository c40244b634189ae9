//! mma.sync, ldmatrix, stmatrix and cp.async of the machine. Copies by threads arrive when they are waited for, not before: a
//! missing wait reads what was there.

use super::memory::decoded;
use super::{Arg, Inst, Machine};

/// A piece on its way: where to, from where, its bytes and how many of them exist.
pub struct Piece {
    to: u64,
    from: u64,
    bytes: u64,
    exist: u64,
}

impl Machine<'_> {
    /// `cp.async` and its groups.
    pub fn copy_async(&mut self, w: usize, i: &Inst, op: &[&str], active: &[usize], window: u64) {
        let cta = self.warps[w].cta;
        match op[2] {
            "commit_group" => self.warps[w].copies.push(Vec::new()),
            "wait_group" => {
                let Arg::Imm(pending) = i.args[0] else { panic!("{}", i.text) };
                // The newest group is the open one.
                let closed = self.warps[w].copies.len() - 1;
                let done = closed.saturating_sub(pending as usize);
                let pieces: Vec<Piece> = self.warps[w].copies.drain(..done).flatten().collect();
                for p in pieces {
                    for b in 0..p.bytes {
                        let v = if b < p.exist { Machine::read(self.global, p.from + b, 1) } else { 0 };
                        Machine::write(&mut self.shared[cta], p.to + b, 1, v);
                    }
                }
            }
            "cg" | "ca" => {
                for &l in active {
                    let bytes = self.value(w, &i.args[2], l);
                    let exist = i.args.get(3).map_or(bytes, |a| self.value(w, a, l));
                    let (to, from) = (self.value(w, &i.args[0], l) & window, self.value(w, &i.args[1], l));
                    assert!(exist <= bytes && (bytes == 16 || op[2] == "ca"), "{}", i.text);
                    assert!(to.is_multiple_of(bytes) && from.is_multiple_of(bytes), "unaligned: {}", i.text);
                    let open = self.warps[w].copies.last_mut().expect("there is an open group");
                    open.push(Piece { to, from, bytes, exist });
                }
            }
            _ => panic!("the machine does not know {}", i.text),
        }
    }

    /// `ldmatrix`: lane 8j + r gives row r of matrix j.
    pub fn load_matrix(&mut self, w: usize, i: &Inst, op: &[&str], window: u64) {
        let Arg::List(registers) = &i.args[0] else { panic!("{}", i.text) };
        let trans = op.contains(&"trans");
        assert_eq!(op[4], format!("x{}", registers.len()));
        let cta = self.warps[w].cta;
        for (j, r) in registers.iter().enumerate() {
            let row = |m: &Self, line: usize| {
                let at = m.value(w, &i.args[1], 8 * j + line) & window;
                assert!(at.is_multiple_of(16), "unaligned row: {} at {at:#x}", i.text);
                (0..8).map(|c| Machine::read(&m.shared[cta], at + 2 * c, 2)).collect::<Vec<u64>>()
            };
            let rows: Vec<Vec<u64>> = (0..8).map(|line| row(self, line)).collect();
            for l in 0..32 {
                let pick = |c: usize| if trans { rows[2 * (l % 4) + c][l / 4] } else { rows[l / 4][2 * (l % 4) + c] };
                let v = pick(0) | pick(1) << 16;
                self.set(w, r, l, v);
            }
        }
    }

    /// `stmatrix`: lane 8j + r says where row r of matrix j goes.
    pub fn store_matrix(&mut self, w: usize, i: &Inst, op: &[&str], window: u64) {
        let Arg::List(registers) = &i.args[1] else { panic!("{}", i.text) };
        let trans = op.contains(&"trans");
        assert_eq!(op[4], format!("x{}", registers.len()));
        let cta = self.warps[w].cta;
        for (j, r) in registers.iter().enumerate() {
            for line in 0..8 {
                let at = self.value(w, &i.args[0], 8 * j + line) & window;
                assert!(at.is_multiple_of(16), "unaligned row: {} at {at:#x}", i.text);
                for c in 0..8 {
                    // Who has the element, and in which half.
                    let (row, column) = if trans { (c, line) } else { (line, c) };
                    let v = self.value(w, r, 4 * row + column / 2) >> (16 * (column % 2)) & 0xffff;
                    Machine::write(&mut self.shared[cta], at + 2 * c as u64, 2, v);
                }
            }
        }
    }

    /// `mma.sync.m16n8k16` of 16-bit operands.
    pub fn mma(&mut self, w: usize, i: &Inst) {
        assert_eq!(i.op[3], "m16n8k16", "{}", i.text);
        let kind = i.op[7].as_str();
        let [Arg::List(d), Arg::List(a), Arg::List(b), Arg::List(c)] = &i.args[..] else { panic!("{}", i.text) };
        let half = |m: &Self, r: &Arg, l: usize, e: usize| decoded(m.value(w, r, l) >> (16 * e) & 0xffff, kind);
        let (mut left, mut right) = (vec![0f32; 256], vec![0f32; 128]);
        for l in 0..32 {
            let (g, t) = (l / 4, l % 4);
            for e in 0..2 {
                for (r, reg) in a.iter().enumerate() {
                    left[(g + 8 * (r % 2)) * 16 + 2 * t + 8 * (r / 2) + e] = half(self, reg, l, e);
                }
                for (r, reg) in b.iter().enumerate() {
                    right[(2 * t + 8 * r + e) * 8 + g] = half(self, reg, l, e);
                }
            }
        }
        for l in 0..32 {
            for x in 0..4 {
                let (row, col) = (l / 4 + 8 * (x / 2), 2 * (l % 4) + x % 2);
                let first = f32::from_bits(self.value(w, &c[x], l) as u32);
                let sum = (0..16).fold(first, |s, k| s + left[row * 16 + k] * right[k * 8 + col]);
                self.set(w, &d[x], l, u64::from(sum.to_bits()));
            }
        }
    }
}
