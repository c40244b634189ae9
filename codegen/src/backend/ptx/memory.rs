//! Loads and stores of fragments, gathers and scatters.
//!
//! Neighbouring elements go in one instruction where layout and alignment allow; in device memory alignment is asked at
//! run time, once per statement, unless the kernel assumes it, and both forms print.
//! Invariant: an absent element is neither read nor written; a copy held by several threads is stored by one.

use std::collections::HashMap;

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Bound, BufId, BufSpace, Expr, FragId, View};
use einfall_ir::ops::{BinaryOp, ReduceOp};

use super::Res;
use super::address::Addresses;
use super::emit::Emit;
use super::expr::Memo;
use super::frag::{Packing, packing};
use super::text::{Ty, Val};
use crate::backend::gpu::memo::Element;

/// Elements of a fragment moved by one instruction.
#[derive(Clone, Copy)]
struct Group {
    first: usize,
    width: usize,
}

/// `ld`/`st` suffix, register class and bytes of a single element.
pub(super) fn element_access(dtype: DType) -> (&'static str, Ty, u64) {
    match dtype {
        DType::F64 => ("f64", Ty::F64, 8),
        DType::F32 | DType::Tf32 => ("f32", Ty::F32, 4),
        DType::F16 | DType::BF16 => ("b16", Ty::B16, 2),
        DType::F8E4M3 | DType::F8E5M2 => ("b8", Ty::B16, 1),
        DType::I64 => ("s64", Ty::S64, 8),
        DType::I32 => ("s32", Ty::S32, 4),
        DType::I8 | DType::I4 => ("s8", Ty::S32, 1),
        DType::U8 | DType::U4 | DType::Bool => ("u8", Ty::S32, 1),
    }
}

impl Emit<'_> {
    pub(super) fn space(&self, buf: BufId) -> Res<&'static str> {
        let b = &self.k.bufs[buf];
        if b.dtype.is_packed() {
            return Err(self.fail(&format!("elements of `{}`, which are packed 4-bit integers", b.name)));
        }
        match b.space {
            BufSpace::Global { .. } => Ok("global"),
            BufSpace::Shared { .. } => Ok("shared::cta"),
            BufSpace::Scratch { .. } => Err(self.fail("memory private to a CPU task")),
        }
    }

    /// Bytes between elements along a dimension of an array: a register, or the element's size.
    pub(super) fn byte_stride(&self, buf: BufId, dim: usize) -> Val {
        let b = &self.k.bufs[buf];
        if dim + 1 == b.dims.len() {
            Val { ty: Ty::S64, ..Val::int(b.dtype.bytes(1) as i64) }
        } else {
            Val::reg(Ty::S64, format!("%st{}_{dim}", buf.index()))
        }
    }

    /// The address of an element of an array.
    pub(super) fn global_address(&mut self, buf: BufId, coords: &[Val]) -> Res<String> {
        let mut a = format!("%b{}", buf.index());
        for (d, c) in coords.iter().enumerate() {
            if c.int_const() == Some(0) {
                continue;
            }
            let s = self.byte_stride(buf, d);
            a = match s.int_const() {
                Some(k) => {
                    let c = self.in_reg(c);
                    self.t.def(Ty::S64, "mad.wide.s32", &[&c, &k.to_string(), &a])
                }
                None => {
                    let c = self.to(c, Ty::S64);
                    self.t.def(Ty::S64, "mad.lo.s64", &[&s.s, &c.s, &a])
                }
            };
        }
        Ok(a)
    }

    /// One element as a value; 0 unless `p`.
    pub(super) fn load_scalar(&mut self, buf: BufId, space: &str, a: &str, offset: i64, p: Option<&Val>) -> Res<Val> {
        let dtype = self.k.bufs[buf].dtype;
        let (suffix, ty, _) = element_access(dtype);
        let d = self.t.reg(ty);
        let guard = self.guarded_zero(&d, ty, p);
        let op = self.load_op(buf, space);
        self.t.line(&format!("{guard}{op}.{suffix} {d}, [{a}+{offset}]"));
        Ok(self.value_of_bits(dtype, &d))
    }

    pub(super) fn load_op(&self, buf: BufId, space: &str) -> String {
        let BufSpace::Global { param, .. } = self.k.bufs[buf].space else { return format!("ld.{space}") };
        // What the kernel before may still be writing is not constant while a dependent one runs.
        let written = self.k.dependent
            || self
                .k
                .bufs
                .iter()
                .any(|(_, b)| matches!(b.space, BufSpace::Global { param: q, written: true, .. } if q == param));
        if written { format!("ld.{space}") } else { format!("ld.{space}.nc") }
    }

    /// Sets `d` to 0 and returns the guard of the instruction that overwrites it.
    pub(super) fn guarded_zero(&mut self, d: &str, ty: Ty, p: Option<&Val>) -> String {
        let Some(p) = p.filter(|p| p.int_const() != Some(1)) else { return String::new() };
        self.t.line(&match ty {
            Ty::F32 => format!("mov.f32 {d}, 0f00000000"),
            Ty::F64 => format!("mov.f64 {d}, 0d0000000000000000"),
            Ty::B16 => format!("mov.b16 {d}, 0"),
            Ty::S64 => format!("mov.b64 {d}, 0"),
            Ty::S32 | Ty::Pred => format!("mov.b32 {d}, 0"),
        });
        format!("@{} ", self.in_reg(p))
    }

    /// The value of loaded bits.
    fn value_of_bits(&mut self, dtype: DType, d: &str) -> Val {
        match dtype {
            DType::BF16 => {
                let w = self.t.def(Ty::S32, "cvt.u32.u16", &[d]);
                let w = self.t.def(Ty::S32, "shl.b32", &[&w, "16"]);
                Val::reg(Ty::F32, self.t.def(Ty::F32, "mov.b32", &[&w]))
            }
            DType::F16 => Val::reg(Ty::F32, self.t.def(Ty::F32, "cvt.f32.f16", &[d])),
            DType::F8E4M3 | DType::F8E5M2 => self.float8(dtype, d),
            DType::F64
            | DType::F32
            | DType::Tf32
            | DType::I64
            | DType::I32
            | DType::I8
            | DType::U8
            | DType::I4
            | DType::U4
            | DType::Bool => Val::reg(element_access(dtype).1, d.to_string()),
        }
    }

    /// A value as a register to be stored as `dtype`.
    fn stored_bits(&mut self, v: &Val, dtype: DType) -> Res<String> {
        Ok(match dtype {
            DType::BF16 | DType::F16 => {
                let x = self.to(v, Ty::F32);
                let x = self.in_reg(&x);
                let name = if dtype == DType::BF16 { "cvt.rn.bf16.f32" } else { "cvt.rn.f16.f32" };
                self.t.def(Ty::B16, name, &[&x])
            }
            DType::F8E4M3 | DType::F8E5M2 => self.pack_bytes(dtype, v, &Val::f32(0.0)),
            DType::F64
            | DType::F32
            | DType::Tf32
            | DType::I64
            | DType::I32
            | DType::I8
            | DType::U8
            | DType::I4
            | DType::U4
            | DType::Bool => {
                let x = self.rounded(v, dtype)?;
                let x = self.to(&x, element_access(dtype).1);
                self.in_reg(&x)
            }
        })
    }

    /// Whether element `v` is within the bounds and the tile.
    pub(super) fn present(&mut self, f: FragId, v: usize, bounds: &[Bound], a: &mut Addresses) -> Res<Val> {
        let frag = self.frags.get(f);
        let (at, dims) = (frag.consts[v].clone(), frag.dims.clone());
        let mut p = Val::pred(true);
        for (i, b) in bounds.iter().enumerate() {
            let one = match a.bounds.get(&(i, at[b.dim])) {
                Some(one) => one.clone(),
                None => {
                    let limit = self.int(&b.limit)?;
                    let t = self.thread_coord(f, b.dim);
                    let rest = self.sub(&limit, &t);
                    let one = self.bin(BinaryOp::Gt, &rest, &Val::int(at[b.dim]))?;
                    a.bounds.insert((i, at[b.dim]), one.clone());
                    one
                }
            };
            p = self.bin(BinaryOp::And, &p, &one)?;
        }
        for d in 0..dims.len() {
            if at[d] + self.frags.get(f).thread_max(d) >= dims[d] {
                let t = self.thread_coord(f, d);
                let c = self.add(&t, &Val::int(at[d]));
                let one = self.bin(BinaryOp::Lt, &c, &Val::int(dims[d]))?;
                p = self.bin(BinaryOp::And, &p, &one)?;
            }
        }
        Ok(p)
    }

    /// Prints `f` for the widest groups of elements, and for single ones if alignment is not known.
    fn in_groups(
        &mut self,
        view: &View,
        frag: FragId,
        bounds: &[Bound],
        mut f: impl FnMut(&mut Self, Group, &mut Addresses) -> Res<()>,
    ) -> Res<()> {
        let width = self.widest(view, frag, bounds);
        let count = self.frags.get(frag).count();
        let mut each = |e: &mut Self, width: usize| -> Res<()> {
            let mut a = Addresses::default();
            let mut seen = std::collections::HashSet::new();
            for first in (0..count).step_by(width) {
                // Registers that repeat an element say nothing new.
                let new = seen.insert(e.frags.get(frag).consts[first].clone());
                if new || packing(e.frags.get(frag).dtype) != Packing::Pair {
                    f(e, Group { first, width }, &mut a)?;
                }
            }
            Ok(())
        };
        if width == 1 || matches!(self.k.bufs[view.buf].space, BufSpace::Shared { .. }) {
            return each(self, width);
        }
        let aligned = self.aligned(view, bounds, width)?;
        if aligned.int_const() == Some(1) {
            return each(self, width);
        }
        let (single, end) = (self.t.label(), self.t.label());
        self.t.line(&format!("@!{} bra {single}", aligned.s));
        each(self, width)?;
        self.t.line(&format!("bra.uni {end}"));
        self.t.place(&single);
        each(self, 1)?;
        self.t.place(&end);
        Ok(())
    }

    pub(super) fn load(&mut self, out: FragId, src: &View, bounds: &[Bound]) -> Res<()> {
        let space = self.space(src.buf)?;
        let (from, to) = (self.k.bufs[src.buf].dtype, self.frags.get(out).dtype);
        self.role.dirty = true;
        if bounds.is_empty() && self.load_matrices(out, src)? {
            return Ok(());
        }
        // Halves of a packed register are joined when the second is there.
        let mut pending: Vec<Val> = Vec::new();
        self.in_groups(src, out, bounds, |e, g, a| {
            let p = e.present(out, g.first, bounds, a)?;
            let (r, offset) = e.address(src, out, g.first, a)?;
            let values =
                e.load_group(src.buf, space, &r, offset, g.width, &p, (from == to).then_some((out, g.first)))?;
            let Some(values) = values else { return Ok(()) };
            let per = match packing(to) {
                Packing::Single(_) => 1,
                Packing::Pair => 2,
                Packing::Quad => 4,
            };
            for (i, v) in values.into_iter().enumerate() {
                pending.push(v);
                let at = g.first + i;
                if pending.len() == per || at + 1 == e.frags.get(out).count() {
                    e.set_some(out, at + 1 - pending.len(), &pending)?;
                    pending.clear();
                }
            }
            Ok(())
        })
    }

    /// Writes a packed register's elements from `first` on.
    fn set_some(&mut self, f: FragId, first: usize, values: &[Val]) -> Res<()> {
        let (dtype, d) = (self.frags.get(f).dtype, self.frags.get(f).register(first));
        match packing(dtype) {
            Packing::Single(ty) => {
                let x = self.rounded(&values[0], dtype)?;
                let x = self.to(&x, ty);
                self.t.line(&format!("mov.{} {d}, {}", ty.storage(), x.s));
            }
            Packing::Pair => {
                let zero = Val::f32(0.0);
                self.pack_pair(dtype, &d, &values[0], values.get(1).unwrap_or(&zero));
            }
            Packing::Quad => {
                let zero = Val::f32(0.0);
                let at = |i: usize| values.get(i).unwrap_or(&zero).clone();
                let (lo, hi) = (self.pack_bytes(dtype, &at(0), &at(1)), self.pack_bytes(dtype, &at(2), &at(3)));
                self.t.line(&format!("mov.b32 {d}, {{{lo}, {hi}}}"));
            }
        }
        Ok(())
    }

    /// Loads `width` neighbours; straight into registers of a fragment of the same type where whole ones are loaded.
    #[allow(clippy::too_many_arguments)]
    fn load_group(
        &mut self,
        buf: BufId,
        space: &str,
        a: &str,
        offset: i64,
        width: usize,
        p: &Val,
        straight: Option<(FragId, usize)>,
    ) -> Res<Option<Vec<Val>>> {
        let dtype = self.k.bufs[buf].dtype;
        let (_, ty, esize) = element_access(dtype);
        if width == 1 {
            let v = self.load_scalar(buf, space, a, offset, Some(p))?;
            return Ok(Some(vec![v]));
        }
        let (word, bits) = if esize == 8 { (ty, "b64") } else { (if esize == 4 { ty } else { Ty::S32 }, "b32") };
        let per = if esize == 2 { 2 } else { 1 };
        let n = width / per;
        let words: Vec<String> = (0..n)
            .map(|i| match straight {
                Some((f, first)) => self.frags.get(f).register(first + i * per),
                None => self.t.reg(word),
            })
            .collect();
        let mut guard = String::new();
        for w in &words {
            guard = self.guarded_zero(w, word, Some(p));
        }
        let op = self.load_op(buf, space);
        let (vector, list) = if n == 1 {
            (String::new(), words[0].clone())
        } else {
            (format!(".v{n}"), format!("{{{}}}", words.join(", ")))
        };
        self.t.line(&format!("{guard}{op}{vector}.{bits} {list}, [{a}+{offset}]"));
        if straight.is_some() {
            return Ok(None);
        }
        let mut values = Vec::new();
        for w in words {
            if per == 1 {
                values.push(Val::reg(word, w));
            } else {
                for h in 0..2 {
                    let half = self.half(&w, h);
                    values.push(self.value_of_bits(dtype, &half));
                }
            }
        }
        Ok(Some(values))
    }

    pub(super) fn store(&mut self, dst: &View, src: FragId, bounds: &[Bound], join: Option<ReduceOp>) -> Res<()> {
        let space = self.space(dst.buf)?;
        self.role.dirty = true;
        let replica = self.first_replica(src);
        if let Some(op) = join {
            let mut a = Addresses::default();
            for v in 0..self.frags.get(src).count() {
                let p = self.present(src, v, bounds, &mut a)?;
                let p = self.both(&p, replica.as_ref())?;
                let (r, offset) = self.address(dst, src, v, &mut a)?;
                let x = self.element(src, v);
                self.join_in_memory(dst.buf, space, &format!("{r}+{offset}"), &x, op, &p)?;
            }
            return Ok(());
        }
        if bounds.is_empty() && self.store_matrices(dst, src)? {
            return Ok(());
        }
        self.in_groups(dst, src, bounds, |e, g, a| {
            let p = e.present(src, g.first, bounds, a)?;
            let p = e.both(&p, replica.as_ref())?;
            if p.int_const() == Some(0) {
                return Ok(());
            }
            let (r, offset) = e.address(dst, src, g.first, a)?;
            let guard = if p.int_const().is_some() { String::new() } else { format!("@{} ", p.s) };
            e.store_group(dst.buf, space, &format!("{r}+{offset}"), &guard, src, g)
        })
    }

    fn both(&mut self, p: &Val, q: Option<&Val>) -> Res<Val> {
        match q {
            Some(q) => self.bin(BinaryOp::And, p, q),
            None => Ok(p.clone()),
        }
    }

    fn store_group(&mut self, buf: BufId, space: &str, a: &str, guard: &str, src: FragId, g: Group) -> Res<()> {
        let dtype = self.k.bufs[buf].dtype;
        let (suffix, _, esize) = element_access(dtype);
        let same = self.frags.get(src).dtype == dtype;
        if g.width == 1 {
            let bits = if same && packing(dtype) == Packing::Pair {
                let r = self.frags.get(src).register(g.first);
                self.half(&r, g.first % 2)
            } else {
                let v = self.element(src, g.first);
                self.stored_bits(&v, dtype)?
            };
            self.t.line(&format!("{guard}st.{space}.{suffix} [{a}], {bits}"));
            return Ok(());
        }
        let mut words = Vec::new();
        let per = if esize == 2 { 2 } else { 1 };
        for first in (g.first..g.first + g.width).step_by(per) {
            if same && first % per == 0 {
                words.push(self.frags.get(src).register(first));
            } else if per == 2 {
                let (lo, hi) = (self.element(src, first), self.element(src, first + 1));
                let d = self.t.reg(Ty::S32);
                self.pack_pair(dtype, &d, &lo, &hi);
                words.push(d);
            } else {
                let v = self.element(src, first);
                words.push(self.stored_bits(&v, dtype)?);
            }
        }
        let bits = if esize == 8 { "b64" } else { "b32" };
        let (vector, list) = match words.len() {
            1 => (String::new(), words[0].clone()),
            n => (format!(".v{n}"), format!("{{{}}}", words.join(", "))),
        };
        self.t.line(&format!("{guard}st.{space}{vector}.{bits} [{a}], {list}"));
        Ok(())
    }

    /// `[a] = [a] ⊕ x`, atomically.
    fn join_in_memory(&mut self, buf: BufId, space: &str, a: &str, x: &Val, op: ReduceOp, p: &Val) -> Res<()> {
        let dtype = self.k.bufs[buf].dtype;
        let name = match (op, dtype) {
            (ReduceOp::Sum, DType::F32) => "add.f32",
            (ReduceOp::Sum, DType::F64) => "add.f64",
            (ReduceOp::Sum, DType::F16) => "add.noftz.f16",
            (ReduceOp::Sum, DType::BF16) if self.target.hopper() => "add.noftz.bf16",
            (ReduceOp::Sum, DType::I32) => "add.s32",
            (ReduceOp::Sum, DType::I64) => "add.u64",
            (ReduceOp::Min, DType::I32) => "min.s32",
            (ReduceOp::Max, DType::I32) => "max.s32",
            (ReduceOp::Min, DType::I64) => "min.s64",
            (ReduceOp::Max, DType::I64) => "max.s64",
            _ => return Err(self.fail(&format!("an atomic {} of {dtype}", op.name()))),
        };
        let bits = self.stored_bits(x, dtype)?;
        let guard = match p.int_const() {
            Some(0) => return Ok(()),
            Some(_) => String::new(),
            None => format!("@{} ", p.s),
        };
        self.t.line(&format!("{guard}red.relaxed.gpu.{space}.{name} [{a}], {bits}"));
        Ok(())
    }

    /// Address of an element given by coordinates, and whether it is inside the buffer.
    fn indexed(&mut self, buf: BufId, at: &[Expr], el: &Element, memo: &mut Memo) -> Res<(Vec<Val>, Val)> {
        let dims = self.k.bufs[buf].dims.clone();
        let (mut coords, mut inside) = (Vec::new(), Val::pred(true));
        for (e, n) in at.iter().zip(&dims) {
            let c = self.value(e, Some(el), memo)?;
            let c = self.to(&c, Ty::S32);
            let n = self.int(n)?;
            if !(c.lo >= 0 && c.hi < n.lo) {
                let (x, n) = (self.in_reg(&c), n.s.clone());
                // A negative coordinate is a large unsigned one.
                let one = Val::reg(Ty::Pred, self.t.def(Ty::Pred, "setp.lt.u32", &[&x, &n]));
                inside = self.bin(BinaryOp::And, &inside, &one)?;
            }
            coords.push(c);
        }
        Ok((coords, inside))
    }

    pub(super) fn gather(&mut self, out: FragId, buf: BufId, at: &[Expr], bounds: &[Bound]) -> Res<()> {
        let space = self.space(buf)?;
        if space != "global" {
            return Err(self.fail("a gather from shared memory"));
        }
        self.role.dirty = true;
        let (mut memo, mut a) = (Memo::default(), Addresses::default());
        let mut loaded: HashMap<Vec<i64>, Val> = HashMap::new();
        let mut dims = std::collections::BTreeSet::new();
        at.iter().for_each(|e| dims.extend(memo.dims(e)));
        dims.extend(bounds.iter().map(|b| b.dim));
        self.set_elements(out, |e, v| {
            let at_v = e.frags.get(out).consts[v].clone();
            let key: Vec<i64> = dims.iter().map(|d| at_v[*d]).collect();
            if let Some(x) = loaded.get(&key) {
                return Ok(x.clone());
            }
            let el = Element { of: out, v, at: at_v };
            let (coords, inside) = e.indexed(buf, at, &el, &mut memo)?;
            let p = e.present(out, v, bounds, &mut a)?;
            let p = e.bin(BinaryOp::And, &p, &inside)?;
            let address = e.global_address(buf, &coords)?;
            let x = e.load_scalar(buf, space, &address, 0, Some(&p))?;
            loaded.insert(key, x.clone());
            Ok(x)
        })
    }

    pub(super) fn scatter(
        &mut self,
        buf: BufId,
        at: &[Expr],
        src: FragId,
        bounds: &[Bound],
        join: Option<ReduceOp>,
    ) -> Res<()> {
        let space = self.space(buf)?;
        if space != "global" {
            return Err(self.fail("a scatter to shared memory"));
        }
        self.role.dirty = true;
        let (mut memo, mut a) = (Memo::default(), Addresses::default());
        let replica = self.first_replica(src);
        for v in 0..self.frags.get(src).count() {
            let el = Element { of: src, v, at: self.frags.get(src).consts[v].clone() };
            let (coords, inside) = self.indexed(buf, at, &el, &mut memo)?;
            let p = self.present(src, v, bounds, &mut a)?;
            let p = self.bin(BinaryOp::And, &p, &inside)?;
            let p = self.both(&p, replica.as_ref())?;
            let address = self.global_address(buf, &coords)?;
            let x = self.element(src, v);
            match join {
                Some(op) => self.join_in_memory(buf, space, &address, &x, op, &p)?,
                None => {
                    let dtype = self.k.bufs[buf].dtype;
                    let bits = self.stored_bits(&x, dtype)?;
                    let guard = match p.int_const() {
                        Some(0) => continue,
                        Some(_) => String::new(),
                        None => format!("@{} ", p.s),
                    };
                    self.t.line(&format!("{guard}st.{space}.{} [{address}], {bits}", element_access(dtype).0));
                }
            }
        }
        Ok(())
    }
}
