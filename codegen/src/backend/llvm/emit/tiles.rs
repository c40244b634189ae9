//! Atoms on tile registers (AMX): accumulators in tiles 0 and up, operands loaded into those above them.
//!
//! Tiles are used by number, so that a task configures them once; one accumulator is held at a time. Source: Intel 64 and
//! IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (palette 1: eight tiles of 16 rows of 64 bytes).

use std::collections::BTreeSet;

use super::*;
use einfall_ir::arena::Id;
use einfall_ir::kernel::atoms;
use einfall_ir::kernel::{Bound, Expr, FragId, Kernel, Operand, Stmt, View};

/// Rows of a tile, and its columns of f32.
const SIDE: u64 = 16;
/// Tile registers.
const TILES: usize = 8;

/// Fragments that atoms on tile registers accumulate into.
pub(super) fn accumulators(k: &Kernel) -> BTreeSet<FragId> {
    fn visit(body: &[Stmt], found: &mut BTreeSet<FragId>) {
        for s in body {
            match s {
                Stmt::Atom { atom, acc, .. } if atoms::find(atom).is_some_and(|a| a.tiled()) => {
                    found.insert(*acc);
                }
                Stmt::For { body, .. } => visit(body, found),
                Stmt::If { then, otherwise, .. } => {
                    visit(then, found);
                    visit(otherwise, found);
                }
                _ => {}
            }
        }
    }
    let mut found = BTreeSet::new();
    k.roles.iter().for_each(|r| visit(&r.body, &mut found));
    found
}

impl<'a> Emit<'a> {
    fn tile_call(&mut self, name: &str, types: &str, arguments: &str) {
        self.t.decls.insert(format!("declare void @llvm.x86.{name}({types})"));
        self.t.line(&format!("call void @llvm.x86.{name}({arguments})"));
    }

    /// Sets the shape of all tiles, where any are used.
    pub(in super::super) fn configure_tiles(&mut self) {
        if !self.frags.iter().any(|f| f.tiled) {
            return;
        }
        // Byte 0: the palette; bytes 16 to 31: bytes of each tile's rows; bytes 48 to 55: rows.
        let words = |of: u64| (0..4).fold(0u64, |w, i| w | of << (16 * i));
        let bytes = (0..8).fold(0u64, |w, i| w | SIDE << (8 * i));
        let config = [1, 0, words(64), words(64), 0, 0, bytes, 0];
        self.t.allocas += "  %tiles = alloca [8 x i64], align 64\n";
        for (i, word) in config.iter().enumerate() {
            let p = self.t.def(&format!("getelementptr i64, ptr %tiles, i64 {i}"));
            self.t.line(&format!("store i64 {word}, ptr {p}, align 8"));
        }
        self.tile_call("ldtilecfg", "ptr", "ptr %tiles");
    }

    /// Gives the tiles back, so that the operating system need not keep them.
    pub(in super::super) fn release_tiles(&mut self) {
        if self.frags.iter().any(|f| f.tiled) {
            self.tile_call("tilerelease", "", "");
        }
    }

    /// Tiles along the rows and columns of an accumulator.
    fn tiles_of(&self, frag: FragId) -> Out<(u64, u64)> {
        match self.k.frags[frag].dist.dims.as_slice() {
            [m, n] if m.is_multiple_of(SIDE) && n.is_multiple_of(SIDE) && m * n / SIDE / SIDE <= TILES as u64 - 2 => {
                Ok((m / SIDE, n / SIDE))
            }
            dims => Err(self.unsupported(&format!("{dims:?} elements in tile registers"))),
        }
    }

    /// Takes the tile registers for an accumulator.
    fn hold_tiles(&mut self, frag: FragId) -> Out<()> {
        match self.in_tiles.replace(frag) {
            Some(other) if other != frag => Err(self.unsupported("two accumulators in tile registers")),
            _ => Ok(()),
        }
    }

    pub(super) fn zero_tiles(&mut self, frag: FragId, value: &Expr) -> Out<()> {
        if *value != Expr::Float(0.0) {
            return Err(self.unsupported("elements of tile registers"));
        }
        self.hold_tiles(frag)?;
        let (m, n) = self.tiles_of(frag)?;
        for tile in 0..m * n {
            self.tile_call("tilezero", "i8", &format!("i8 {tile}"));
        }
        Ok(())
    }

    /// An accumulator from memory or to it, in which its rows are contiguous.
    pub(super) fn move_tiles(&mut self, frag: FragId, view: &View, bounds: &[Bound], load: bool) -> Out<()> {
        self.hold_tiles(frag)?;
        let (m, n) = self.tiles_of(frag)?;
        let (base, steps) = self.view_base(view)?;
        let plain = self.bufs[view.buf.index()].dtype == DType::F32 && steps.last().is_some_and(|s| s == "1");
        if !bounds.is_empty() || !plain {
            return Err(self.unsupported("tile registers of elements apart"));
        }
        let bytes = self.t.mul(&steps[0], "4");
        for i in 0..m {
            for j in 0..n {
                let p = self.address(view.buf, &base, &steps, &[SIDE * i, SIDE * j], None).ptr;
                let name = if load { "tileloadd64" } else { "tilestored64" };
                self.tile_call(name, "i8, ptr, i64", &format!("i8 {}, ptr {p}, i64 {bytes}", i * n + j));
            }
        }
        if !load {
            self.in_tiles = None;
        }
        Ok(())
    }

    /// Atoms one after the other: an operand that several read is loaded once.
    pub(super) fn atoms(&mut self, run: &[Stmt]) -> Out<()> {
        let mut held: Vec<&View> = Vec::new();
        for s in run {
            let Stmt::Atom { atom, acc, acc_from, a: Operand::Mem(a), b: Operand::Mem(b), keep: Expr::Int(1) } = s
            else {
                return Err(self.unsupported("an atom with operands in registers"));
            };
            let known = self.isa.amx && atoms::processor_tiles().any(|t| t.name == *atom);
            if !known || self.in_tiles != Some(*acc) {
                return Err(self.unsupported(&format!("the atom {}", atom.0)));
            }
            let (m, n) = self.tiles_of(*acc)?;
            let (first, free) = ((m * n) as usize, TILES - (m * n) as usize);
            let mut tile = [0; 2];
            for (view, t) in [a, b].into_iter().zip(&mut tile) {
                let place = held.iter().position(|v| *v == view);
                let place = match place {
                    Some(p) => p,
                    None => {
                        // Where all tiles are taken, the one that the other operand is not in is used anew.
                        let slot = if held.len() < free { held.len() } else { (tile_of(&held, a) + 1) % free };
                        if slot == held.len() {
                            held.push(view)
                        } else {
                            held[slot] = view
                        }
                        self.load_operand(first + slot, view)?;
                        slot
                    }
                };
                *t = first + place;
            }
            let d = acc_from[0] / SIDE * n + acc_from[1] / SIDE;
            self.tile_call("tdpbf16ps", "i8, i8, i8", &format!("i8 {d}, i8 {}, i8 {}", tile[0], tile[1]));
        }
        Ok(())
    }

    /// Sixteen rows of 64 bytes: of `a`, or of `b`, whose rows are pairs of neighbours along k.
    fn load_operand(&mut self, tile: usize, view: &View) -> Out<()> {
        let (base, steps) = self.view_base(view)?;
        let together = self.bufs[view.buf.index()].together;
        let bytes = self.t.mul(&steps[0], &(2 * together).to_string());
        self.tile_call("tileloadd64", "i8, ptr, i64", &format!("i8 {tile}, ptr {base}, i64 {bytes}"));
        Ok(())
    }

    /// Two rows at a time of a fragment to memory in which pairs of rows stand together: the upper halves of two f32, whose
    /// values are bf16.
    pub(super) fn store_pairs(&mut self, view: &View, src: FragId) -> Out<()> {
        let (base, steps) = self.view_base(view)?;
        let f = &self.frags[src.index()];
        let (regs, lane) = (f.regs.clone(), f.lane_dim);
        let last = self.bufs[view.buf.index()].strides.len().wrapping_sub(1);
        let dim = |d: usize| view.walk.iter().position(|w| *w == Some((d, 1)));
        let (Some(row), Some(column)) = (dim(last.wrapping_sub(1)), dim(last)) else {
            return Err(self.unsupported("pairs of rows that are not walked"));
        };
        let dtype = self.bufs[view.buf.index()].dtype;
        if lane != Some(column) || self.bufs[view.buf.index()].together != 2 || dtype != DType::BF16 {
            return Err(self.unsupported("a store of pairs against the lanes"));
        }
        let (vi, vf) = (self.t.vec("i32"), self.t.vec("float"));
        for (r, coords) in regs.iter().enumerate().filter(|(_, c)| c[row] % 2 == 0) {
            let mut next = coords.clone();
            next[row] += 1;
            let Some(s) = regs.iter().position(|c| *c == next) else {
                return Err(self.unsupported("half a pair of rows"));
            };
            let mut bits = Vec::new();
            for r in [r, s] {
                let v = self.read_reg(src, r);
                let v = if self.stored == Some(dtype) { v } else { self.cast(v, dtype)? };
                let v = self.t.vector(&v);
                bits.push(self.t.def(&format!("bitcast {vf} {v} to {vi}")));
            }
            let sixteen = self.t.splat_const("i32", "16");
            let low = self.t.def(&format!("lshr {vi} {}, {sixteen}", bits[0]));
            let mask = self.t.splat_const("i32", "-65536");
            let high = self.t.def(&format!("and {vi} {}, {mask}", bits[1]));
            let both = self.t.def(&format!("or {vi} {low}, {high}"));
            let p = self.address(view.buf, &base, &steps, coords, None).ptr;
            self.t.line(&format!("store {vi} {both}, ptr {p}, align 4"));
        }
        Ok(())
    }
}

/// Where a view is held; 0 where it is not.
fn tile_of(held: &[&View], view: &View) -> usize {
    held.iter().position(|v| *v == view).unwrap_or(0)
}
