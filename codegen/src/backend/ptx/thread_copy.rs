//! `cp.async`: every thread of a unit copies pieces of a box from an array to shared memory, 16 bytes at a time.
//!
//! Pieces lie as [`Distribution::accesses`] says: lanes side by side along the contiguous dimension, then rows. What is
//! beyond the array is filled with zeros: its source size is 0. Alignment, and that rows end with a piece, are taken from the kernel's
//! assumptions or asked at run time; arrays that are not aligned are copied element by element through registers, which
//! is done when the statement is. Invariant: every element of the box is written by one thread.
//! Source: PTX ISA, "cp.async" (sizes of 4, 8 and 16 bytes, zero fill; `.cg` for 16).

use std::collections::HashMap;

use einfall_ir::kernel::{Bound, BufSpace, FragId, View};
use einfall_ir::layout::Distribution;
use einfall_ir::ops::BinaryOp;

use super::Res;
use super::address::Addresses;
use super::emit::Emit;
use super::memory::element_access;
use super::text::{Ty, Val};

/// What of a box is in its array.
struct Part {
    /// Limits along dimensions of the box.
    bounds: Vec<Bound>,
    /// Dimensions along which the box may start before the array, with its first coordinate.
    starts: Vec<(usize, Val)>,
    /// Whether the array has the coordinates that the box does not walk.
    inside: Val,
}

/// Addresses on the way along a box's rows.
#[derive(Default)]
struct Walked {
    /// Constant parts of the last address's coordinates but the contiguous one, and its register.
    last: Option<(Vec<i64>, String)>,
    /// Bytes of so many steps along a dimension.
    steps: HashMap<(usize, i64), String>,
}

impl Emit<'_> {
    pub(super) fn thread_copy(&mut self, src: &View, dst: &View, extents: &[u64], signals: bool) -> Res<()> {
        let k = self.k;
        if signals {
            return Err(self.fail("cp.async copies that signal a barrier"));
        }
        let array = &k.bufs[src.buf];
        let (BufSpace::Global { .. }, BufSpace::Shared { .. }) = (&array.space, &k.bufs[dst.buf].space) else {
            return Err(self.fail("cp.async copies between these spaces"));
        };
        self.role.dirty = true;
        let esize = array.dtype.bytes(1);
        let last = array.dims.len() - 1;
        let run = src.walk.iter().position(|w| *w == Some((last, 1)));
        let width = run.map_or(1, |d| gcd(extents[d], 16 / esize));
        let dist = Distribution::accesses(extents, run, width, self.role.scope.threads());
        let places = self.frags.places(&dist, array.dtype, None);
        let width = self.widest(src, places, &[]).min(self.widest(dst, places, &[]));
        // Limits along the dimensions of the box, unless it is known to lie within the array.
        let mut part = Part { bounds: Vec::new(), starts: Vec::new(), inside: Val::pred(true) };
        for (dim, (at, n)) in src.at.iter().zip(&array.dims).enumerate() {
            let (first, extent) = (self.int(at)?, self.int(n)?);
            let d = src.walk.iter().position(|w| w.is_some_and(|w| w.0 == dim));
            let most = match d {
                Some(d) => src.walk[d].map_or(1, |w| w.1) * (extents[d] as i64 - 1),
                None => 0,
            };
            if first.lo >= 0 && first.hi.saturating_add(most) < extent.lo {
                continue;
            }
            match d.map(|d| (d, src.walk[d])) {
                Some((d, Some((_, 1)))) if first.lo >= 0 || Some(d) != run => {
                    part.bounds.push(Bound { dim: d, limit: n.clone().bin(BinaryOp::Sub, at.clone()) });
                    if first.lo < 0 {
                        part.starts.push((d, first));
                    }
                }
                Some(_) => {
                    return Err(self.fail("a cp.async copy that steps, or whose rows may start before their array"));
                }
                None => {
                    let (x, n) = (self.in_reg(&first), self.in_reg(&extent));
                    // A negative coordinate is a large unsigned one.
                    let one = Val::reg(Ty::Pred, self.t.def(Ty::Pred, "setp.lt.u32", &[&x, &n]));
                    part.inside = self.bin(BinaryOp::And, &part.inside, &one)?;
                }
            }
        }
        if width as u64 * esize < 4 {
            return self.copy_elements(src, dst, places, &part);
        }
        let aligned = self.aligned(src, &part.bounds, width)?;
        if aligned.int_const() == Some(1) {
            return self.copy_pieces(src, dst, places, &part, width);
        }
        let (single, end) = (self.t.label(), self.t.label());
        self.t.line(&format!("@!{} bra {single}", aligned.s));
        self.copy_pieces(src, dst, places, &part, width)?;
        self.t.line(&format!("bra.uni {end}"));
        self.t.place(&single);
        self.copy_elements(src, dst, places, &part)?;
        self.t.place(&end);
        Ok(())
    }

    /// Whether element `v` of the box is in the array.
    fn exists(
        &mut self,
        places: FragId,
        v: usize,
        part: &Part,
        a: &mut Addresses,
        started: &mut HashMap<(usize, i64), Val>,
    ) -> Res<Val> {
        let p = self.present(places, v, &part.bounds, a)?;
        let mut p = self.bin(BinaryOp::And, &p, &part.inside)?;
        for (d, first) in &part.starts {
            let c = self.frags.get(places).consts[v][*d];
            let one = match started.get(&(*d, c)) {
                Some(one) => one.clone(),
                None => {
                    let t = self.thread_coord(places, *d);
                    let x = self.add(first, &t);
                    let one = self.bin(BinaryOp::Ge, &x, &Val::int(-c))?;
                    started.insert((*d, c), one.clone());
                    one
                }
            };
            p = self.bin(BinaryOp::And, &p, &one)?;
        }
        Ok(p)
    }

    /// The address of element `v` in an array, from the one before where they are some rows apart: few registers hold
    /// what the pieces of a box have in common.
    fn next_address(
        &mut self,
        src: &View,
        places: FragId,
        v: usize,
        a: &mut Addresses,
        walked: &mut Walked,
    ) -> Res<(String, i64)> {
        let rank = self.k.bufs[src.buf].dims.len();
        let mut at = vec![0; rank];
        for (d, w) in src.walk.iter().enumerate() {
            if let Some((to, step)) = *w {
                at[to] += self.frags.get(places).consts[v][d] * step;
            }
        }
        let esize = self.k.bufs[src.buf].dtype.bytes(1) as i64;
        let offset = at.pop().unwrap_or(0) * esize;
        let moved = walked.last.as_ref().map(|(before, _)| -> Vec<(usize, i64)> {
            (0..rank - 1).map(|d| (d, at[d] - before[d])).filter(|m| m.1 != 0).collect()
        });
        let address = match (moved.as_deref(), &walked.last) {
            (Some([]), Some((_, s))) => s.clone(),
            (Some(&[(d, n)]), Some((_, s))) if n > 0 => {
                let s = s.clone();
                let step = match walked.steps.get(&(d, n)) {
                    Some(step) => step.clone(),
                    None => {
                        let stride = self.byte_stride(src.buf, d);
                        let step = self.t.def(Ty::S64, "mul.lo.s64", &[&stride.s, &n.to_string()]);
                        walked.steps.insert((d, n), step.clone());
                        step
                    }
                };
                self.t.def(Ty::S64, "add.s64", &[&s, &step])
            }
            _ => self.address(src, places, v, a)?.0,
        };
        walked.last = Some((at, address.clone()));
        Ok((address, offset))
    }

    fn copy_pieces(&mut self, src: &View, dst: &View, places: FragId, part: &Part, width: usize) -> Res<()> {
        let esize = self.k.bufs[src.buf].dtype.bytes(1) as i64;
        let bytes = width as i64 * esize;
        let (mut from, mut to) = (Addresses::default(), Addresses::default());
        let replica = self.first_replica(places);
        let guard = replica.map_or(String::new(), |p| format!("@{} ", p.s));
        let mut started = HashMap::new();
        let mut walked = Walked::default();
        for v in (0..self.frags.get(places).count()).step_by(width) {
            let p = self.exists(places, v, part, &mut from, &mut started)?;
            let (a, a_off) = self.next_address(src, places, v, &mut from, &mut walked)?;
            let (b, b_off) = self.address(dst, places, v, &mut to)?;
            let how = if bytes == 16 { "cg" } else { "ca" };
            // A piece is whole or absent, which is one instruction; other sizes are several.
            let tail = match p.int_const() {
                Some(1) => String::new(),
                Some(_) => ", 0".to_string(),
                None => format!(", {}", self.t.def(Ty::S32, "selp.b32", &[&bytes.to_string(), "0", &p.s])),
            };
            self.t
                .line(&format!("{guard}cp.async.{how}.shared::cta.global [{b}+{b_off}], [{a}+{a_off}], {bytes}{tail}"));
        }
        Ok(())
    }

    fn copy_elements(&mut self, src: &View, dst: &View, places: FragId, part: &Part) -> Res<()> {
        let mut started = HashMap::new();
        let (suffix, ty, _) = element_access(self.k.bufs[src.buf].dtype);
        self.space(src.buf)?;
        let op = self.load_op(src.buf, "global");
        let (mut from, mut to) = (Addresses::default(), Addresses::default());
        let replica = self.first_replica(places);
        let guard = replica.map_or(String::new(), |p| format!("@{} ", p.s));
        for v in 0..self.frags.get(places).count() {
            let p = self.exists(places, v, part, &mut from, &mut started)?;
            let (a, a_off) = self.address(src, places, v, &mut from)?;
            let (b, b_off) = self.address(dst, places, v, &mut to)?;
            let d = self.t.reg(ty);
            let exists = self.guarded_zero(&d, ty, Some(&p));
            self.t.line(&format!("{exists}{op}.{suffix} {d}, [{a}+{a_off}]"));
            self.t.line(&format!("{guard}st.shared::cta.{suffix} [{b}+{b_off}], {d}"));
        }
        Ok(())
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
