//! `cp.async`: every thread of a unit copies pieces of a box from an array to shared memory, 16 bytes at a time.
//!
//! Pieces lie as [`Distribution::accesses`] says: lanes side by side along the contiguous dimension, then rows. What is
//! beyond the array is filled with zeros by the instruction's source size. Alignment is taken from the kernel's
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
        let aligned = self.aligned(src, &[], width)?;
        if aligned.int_const() == Some(1) {
            return self.copy_pieces(src, dst, places, &part, width, run);
        }
        let (single, end) = (self.t.label(), self.t.label());
        self.t.line(&format!("@!{} bra {single}", aligned.s));
        self.copy_pieces(src, dst, places, &part, width, run)?;
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
        bounds: &[Bound],
        a: &mut Addresses,
        started: &mut HashMap<(usize, i64), Val>,
    ) -> Res<Val> {
        let p = self.present(places, v, bounds, a)?;
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

    fn copy_pieces(
        &mut self,
        src: &View,
        dst: &View,
        places: FragId,
        part: &Part,
        width: usize,
        run: Option<usize>,
    ) -> Res<()> {
        let esize = self.k.bufs[src.buf].dtype.bytes(1) as i64;
        let bytes = width as i64 * esize;
        let (mut from, mut to) = (Addresses::default(), Addresses::default());
        let (along, across): (Vec<Bound>, Vec<Bound>) = part.bounds.iter().cloned().partition(|b| Some(b.dim) == run);
        let replica = self.first_replica(places);
        let guard = replica.map_or(String::new(), |p| format!("@{} ", p.s));
        // Bytes of a piece that exist, by the constant part of its place along the contiguous dimension.
        let mut sizes: HashMap<i64, Val> = HashMap::new();
        let mut started = HashMap::new();
        for v in (0..self.frags.get(places).count).step_by(width) {
            let mut size = Val::int(bytes);
            if let (Some(b), Some(d)) = (along.first(), run) {
                let c = self.frags.get(places).consts[v][d];
                size = match sizes.get(&c) {
                    Some(s) => s.clone(),
                    None => {
                        let limit = self.int(&b.limit)?;
                        let t = self.thread_coord(places, d);
                        let rest = self.sub(&limit, &t);
                        let rest = self.sub(&rest, &Val::int(c));
                        let rest = self.mul(&rest, &Val::int(esize));
                        let rest = self.bin(BinaryOp::Min, &rest, &Val::int(bytes))?;
                        let rest = self.bin(BinaryOp::Max, &rest, &Val::int(0))?;
                        sizes.insert(c, rest.clone());
                        rest
                    }
                };
            }
            let p = self.exists(places, v, part, &across, &mut from, &mut started)?;
            let (a, a_off) = self.address(src, places, v, &mut from)?;
            let (b, b_off) = self.address(dst, places, v, &mut to)?;
            let how = if bytes == 16 { "cg" } else { "ca" };
            let whole = size.int_const() == Some(bytes) && p.int_const() == Some(1);
            let tail = if whole {
                String::new()
            } else {
                let size = self.in_reg(&size);
                let size = match p.int_const() {
                    Some(1) => size,
                    Some(_) => "0".to_string(),
                    None => self.t.def(Ty::S32, "selp.b32", &[&size, "0", &p.s]),
                };
                format!(", {size}")
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
        for v in 0..self.frags.get(places).count {
            let p = self.exists(places, v, part, &part.bounds, &mut from, &mut started)?;
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
