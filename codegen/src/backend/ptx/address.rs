//! Addresses of fragments' elements in windows of arrays and of shared memory, and how many go in one instruction.
//!
//! An address is a base per thread plus constants: in device memory per distinct offset along strided dimensions, in
//! shared memory per distinct place in the swizzle's period. Invariant: a width is given only where every group of
//! neighbours is whole and aligned, or is asked for at run time ([`Emit::aligned`]).

use std::collections::HashMap;

use einfall_ir::arena::Id;
use einfall_ir::kernel::{Assumption, Bound, BufSpace, Expr, FragId, Kernel, View};
use einfall_ir::ops::BinaryOp;

use super::Res;
use super::emit::Emit;
use super::text::{Ty, Val};

/// What addresses of one statement have in common.
#[derive(Default)]
pub(super) struct Addresses {
    /// Thread's base: device memory a 64-bit address, shared memory a linear byte.
    pub(super) base: Option<Val>,
    pub(super) known: HashMap<Vec<i64>, String>,
    pub(super) bounds: HashMap<(usize, i64), Val>,
}

/// A number that divides `e`, by its form and what the kernel assumes; 0 for 0.
fn factor(k: &Kernel, e: &Expr) -> u64 {
    let assumed = k.assumes.iter().filter_map(|a| match a {
        Assumption::Multiple(x, n) if x == e => Some(*n),
        Assumption::Multiple(..) | Assumption::AtMost(..) | Assumption::Aligned(..) => None,
    });
    let by_form = match e {
        Expr::Int(i) => i.unsigned_abs(),
        Expr::Binary(BinaryOp::Add | BinaryOp::Sub, a, b) => gcd(factor(k, a), factor(k, b)),
        Expr::Binary(BinaryOp::Mul, a, b) => factor(k, a).saturating_mul(factor(k, b)),
        _ => 1,
    };
    assumed.fold(by_form, |f, n| if f == 0 { 0 } else { f / gcd(f, n) * n })
}

/// Whether `n` divides `e`, by its form and what the kernel assumes.
pub(in crate::backend) fn divides(k: &Kernel, n: u64, e: &Expr) -> bool {
    factor(k, e).is_multiple_of(n)
}

/// `e` as a part known at run time and a constant, at least 0.
fn split(e: &Expr) -> (Expr, i64) {
    match e {
        Expr::Int(n) if *n >= 0 => (Expr::Int(0), *n),
        Expr::Binary(BinaryOp::Add, a, b) => match **b {
            Expr::Int(n) if n >= 0 => ((**a).clone(), n),
            _ => (e.clone(), 0),
        },
        _ => (e.clone(), 0),
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Emit<'_> {
    /// The address of element `v` of a fragment in a window: a register and an offset.
    pub(super) fn address(&mut self, view: &View, f: FragId, v: usize, a: &mut Addresses) -> Res<(String, i64)> {
        match self.k.bufs[view.buf].space {
            BufSpace::Global { .. } => self.address_global(view, f, v, a),
            BufSpace::Shared { .. } | BufSpace::Scratch { .. } => self.address_shared(view, f, v, a),
        }
    }

    /// The run-time part, `at` included, of the coordinate along buffer dimension `dim`, the constant part for element `v`, and the
    /// largest thread part.
    fn coordinate(&mut self, view: &View, at: &Expr, f: FragId, v: usize, dim: usize) -> Res<(Val, i64, i64)> {
        let mut x = self.int(at)?;
        let (mut c, mut most) = (0, 0);
        for (d, w) in view.walk.iter().enumerate() {
            if let Some((to, step)) = *w
                && to == dim
            {
                let t = self.thread_coord(f, d);
                let t = self.mul(&t, &Val::int(step));
                x = self.add(&x, &t);
                let frag = self.frags.get(f);
                c += frag.consts[v][d] * step;
                most += frag.thread_max(d) * step;
            }
        }
        Ok((x, c, most))
    }

    fn address_global(&mut self, view: &View, f: FragId, v: usize, a: &mut Addresses) -> Res<(String, i64)> {
        let rank = self.k.bufs[view.buf].dims.len();
        let base = match &a.base {
            Some(b) => b.s.clone(),
            None => {
                let mut coords = Vec::new();
                for d in 0..rank {
                    coords.push(self.coordinate(view, &view.at[d], f, v, d)?.0);
                }
                let b = self.global_address(view.buf, &coords)?;
                a.base = Some(Val::reg(Ty::S64, b.clone()));
                b
            }
        };
        let mut consts = vec![0; rank];
        for (d, w) in view.walk.iter().enumerate() {
            if let Some((to, step)) = *w {
                consts[to] += self.frags.get(f).consts[v][d] * step;
            }
        }
        let esize = self.k.bufs[view.buf].dtype.bytes(1) as i64;
        let offset = consts.pop().unwrap_or(0) * esize;
        if let Some(s) = a.known.get(&consts) {
            return Ok((s.clone(), offset));
        }
        let mut s = base;
        for (d, c) in consts.iter().enumerate().filter(|c| *c.1 != 0) {
            let stride = self.byte_stride(view.buf, d);
            s = self.t.def(Ty::S64, "mad.lo.s64", &[&stride.s, &c.to_string(), &s]);
        }
        a.known.insert(consts, s.clone());
        Ok((s, offset))
    }

    fn address_shared(&mut self, view: &View, f: FragId, v: usize, a: &mut Addresses) -> Res<(String, i64)> {
        let k = self.k;
        let b = &k.bufs[view.buf];
        let BufSpace::Shared { layout, .. } = &b.space else { return Err(self.fail("memory private to a CPU task")) };
        let esize = b.dtype.bytes(1) as i64;
        // Whether digits of the run-time and the constant part add without carries.
        let mut separable = true;
        let mut parts = Vec::new();
        for dim in 0..b.dims.len() {
            let (at, first) = split(&view.at[dim]);
            let (x, c, most) = self.coordinate(view, &at, f, v, dim)?;
            let c = c + first;
            let mut place = 1;
            for g in layout.dims[dim].iter().rev().skip(1).rev() {
                place *= g.extent as i64;
                separable &= factor(k, &at).is_multiple_of(place as u64) && c % place + most < place && c >= 0;
            }
            parts.push((x, c));
        }
        let start = k_offset(self.shared.bufs[view.buf.index()]);
        let mut constant = 0;
        let linear = if separable {
            for (dim, (_, c)) in parts.iter().enumerate() {
                constant += fixed_offset(&layout.dims[dim], *c) * esize;
            }
            match &a.base {
                Some(base) => base.clone(),
                None => {
                    let base = self.linear(view, &parts, false)?;
                    a.base = Some(base.clone());
                    base
                }
            }
        } else {
            self.linear(view, &parts, true)?
        };
        let Some(s) = layout.swizzle else {
            let key = if separable { vec![] } else { parts.iter().map(|p| p.1).collect() };
            let r = match a.known.get(&key) {
                Some(r) => r.clone(),
                None => self.add(&linear, &Val::reg(Ty::S32, "%smem".to_string())).s,
            };
            a.known.insert(key, r.clone());
            return Ok((r, start + constant));
        };
        let period = 1i64 << (s.base + s.shift + s.bits);
        let low = constant.rem_euclid(period);
        let key = if separable { vec![low] } else { parts.iter().map(|p| p.1).collect() };
        let r = match a.known.get(&key) {
            Some(r) => r.clone(),
            None => {
                let x = self.add(&linear, &Val::int(low));
                let x = self.in_reg(&x);
                let mask = ((1u64 << s.bits) - 1) << s.base;
                let y = self.t.def(Ty::S32, "shr.u32", &[&x, &s.shift.to_string()]);
                let y = self.t.def(Ty::S32, "and.b32", &[&y, &mask.to_string()]);
                let y = self.t.def(Ty::S32, "xor.b32", &[&x, &y]);
                self.t.def(Ty::S32, "add.s32", &[&y, "%smem"])
            }
        };
        a.known.insert(key, r.clone());
        Ok((r, start + constant - low))
    }

    /// The byte of a window's element before swizzling, from the start of its buffer.
    fn linear(&mut self, view: &View, parts: &[(Val, i64)], with_constants: bool) -> Res<Val> {
        let k = self.k;
        let b = &k.bufs[view.buf];
        let BufSpace::Shared { layout, .. } = &b.space else { return Err(self.fail("memory private to a CPU task")) };
        let esize = b.dtype.bytes(1) as i64;
        let mut sum = Val::int(0);
        if let Some(stage) = &view.stage {
            let s = self.int(stage)?;
            sum = self.mul(&s, &Val::int(layout.stage_bytes(esize as u64) as i64));
        }
        for (dim, (x, c)) in parts.iter().enumerate() {
            let x = if with_constants { self.add(x, &Val::int(*c)) } else { x.clone() };
            let o = self.digits_offset(&layout.dims[dim], &x)?;
            let o = self.mul(&o, &Val::int(esize));
            sum = self.add(&sum, &o);
        }
        Ok(sum)
    }

    /// The most elements that one instruction may move between a window and a fragment, if everything that is not known
    /// here is aligned.
    pub(super) fn widest(&self, view: &View, f: FragId, bounds: &[Bound]) -> usize {
        let (k, frag) = (self.k, self.frags.get(f));
        let b = &k.bufs[view.buf];
        let esize = b.dtype.bytes(1) as usize;
        let Some(last) = self.contiguous(view) else { return 1 };
        let Some(d) = view.walk.iter().position(|w| *w == Some((last, 1))) else { return 1 };
        if view.walk.iter().filter(|w| w.is_some_and(|w| w.0 == last)).count() != 1 || b.dtype.bits() < 8 || esize == 1
        {
            return 1;
        }
        let mut width = 16 / esize;
        while width > 1 {
            let shared = match &b.space {
                BufSpace::Shared { layout, .. } => {
                    let mut others = layout.dims.iter().flatten().filter(|g| g.stride != 1);
                    others.all(|g| g.stride.is_multiple_of(width as u64))
                        && layout.dims[last].first().is_some_and(|g| g.extent.is_multiple_of(width as u64))
                        && view.at.get(last).is_some_and(|e| factor(k, e).is_multiple_of(width as u64))
                        && bounds.iter().all(|x| x.dim != d || factor(k, &x.limit).is_multiple_of(width as u64))
                }
                BufSpace::Global { .. } => true,
                BufSpace::Scratch { .. } => false,
            };
            let threads = frag.threads[d].iter().all(|g| g.stride.is_multiple_of(width as u64));
            let runs = frag.count().is_multiple_of(width)
                && frag.consts.chunks(width).all(|c| {
                    c[0][d] % width as i64 == 0
                        && c.iter().enumerate().all(|(i, x)| {
                            x.iter().enumerate().all(|(j, y)| *y == c[0][j] + if j == d { i as i64 } else { 0 })
                        })
                });
            let whole = frag.dims[d] % width as i64 == 0;
            if shared && threads && runs && whole {
                return width;
            }
            width /= 2;
        }
        1
    }

    /// The dimension of a window's buffer along which elements are neighbours.
    pub(super) fn contiguous(&self, view: &View) -> Option<usize> {
        let b = &self.k.bufs[view.buf];
        match &b.space {
            BufSpace::Global { .. } => b.dims.len().checked_sub(1),
            BufSpace::Shared { layout, .. } => {
                layout.dims.iter().position(|d| d.first().is_some_and(|g| g.stride == 1 && g.extent > 1))
            }
            BufSpace::Scratch { .. } => None,
        }
    }

    /// Whether accesses of `width` elements are aligned and whole, asked at run time.
    pub(super) fn aligned(&mut self, view: &View, bounds: &[Bound], width: usize) -> Res<Val> {
        let rank = self.k.bufs[view.buf].dims.len();
        let esize = self.k.bufs[view.buf].dtype.bytes(1);
        let bytes = width as u64 * esize;
        let assumed = self.k.assumes.iter().any(|a| match a {
            Assumption::Aligned(b, n) => *b == view.buf && n.is_multiple_of(bytes),
            Assumption::AtMost(..) | Assumption::Multiple(..) => false,
        });
        let mut word = "0".to_string();
        if !assumed {
            let mut any = format!("%b{}", view.buf.index());
            for d in 0..rank - 1 {
                let s = self.byte_stride(view.buf, d);
                any = self.t.def(Ty::S64, "or.b64", &[&any, &s.s]);
            }
            word = self.t.def(Ty::S32, "cvt.u32.u64", &[&any]);
        }
        let d = view.walk.iter().position(|w| *w == Some((rank - 1, 1)));
        let limits = bounds.iter().filter(|b| Some(b.dim) == d).map(|b| &b.limit);
        for e in limits.chain([&view.at[rank - 1]]) {
            if !factor(self.k, e).is_multiple_of(width as u64) {
                let x = self.int(e)?;
                let x = self.mul(&x, &Val::int(esize as i64));
                word = self.t.def(Ty::S32, "or.b32", &[&x.s, &word]);
            }
        }
        if word == "0" {
            return Ok(Val::pred(true));
        }
        let low = self.t.def(Ty::S32, "and.b32", &[&word, &(bytes - 1).to_string()]);
        Ok(Val::reg(Ty::Pred, self.t.def(Ty::Pred, "setp.eq.s32", &[&low, "0"])))
    }
}

fn k_offset(bytes: u64) -> i64 {
    bytes as i64
}

/// Offset of a constant coordinate.
pub(super) fn fixed_offset(digits: &[einfall_ir::layout::Digit], c: i64) -> i64 {
    let (mut rest, mut sum) = (c, 0);
    for (i, g) in digits.iter().enumerate() {
        let value = if i + 1 == digits.len() { rest } else { rest % g.extent as i64 };
        rest /= (g.extent as i64).max(1);
        sum += value * g.stride as i64;
    }
    sum
}
