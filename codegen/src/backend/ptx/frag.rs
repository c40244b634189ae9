//! Fragments as registers.
//!
//! The thread part of a coordinate (see [`crate::backend::gpu::held`]) is computed once per role. 16-bit elements 2j and
//! 2j+1 share a register (low half first), 8-bit floats stand four to a register. Invariant: registers of a fragment are
//! written in place and never renamed, so that accumulators stay where wgmma has them.

use einfall_ir::dtype::DType;
use einfall_ir::kernel::FragId;

use super::Res;
use super::emit::Emit;
use super::scalar::class;
use super::text::{Text, Ty, Val};
use crate::backend::gpu::held::Held;

/// How elements stand in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// A register each, of this class.
    Single(Ty),
    /// Two 16-bit floats in 32 bits.
    Pair,
    /// Four 8-bit floats in 32 bits.
    Quad,
}

pub(super) fn packing(dtype: DType) -> Packing {
    match dtype {
        DType::F16 | DType::BF16 => Packing::Pair,
        DType::F8E4M3 | DType::F8E5M2 => Packing::Quad,
        DType::F64
        | DType::F32
        | DType::Tf32
        | DType::I64
        | DType::I32
        | DType::I8
        | DType::U8
        | DType::I4
        | DType::U4
        | DType::Bool => Packing::Single(class(dtype)),
    }
}

impl Held {
    /// How its registers' names begin.
    fn prefix(&self) -> String {
        format!("%x{}_", self.id)
    }

    /// The register that holds element `v`.
    pub(super) fn register(&self, v: usize) -> String {
        let n = match packing(self.dtype) {
            Packing::Single(_) => v,
            Packing::Pair => v / 2,
            Packing::Quad => v / 4,
        };
        format!("{}{n}", self.prefix())
    }

    /// How many registers there are.
    pub(super) fn registers(&self) -> usize {
        match packing(self.dtype) {
            Packing::Single(_) => self.count(),
            Packing::Pair => self.count().div_ceil(2),
            Packing::Quad => self.count().div_ceil(4),
        }
    }

    pub(super) fn declare(&self, t: &mut Text) {
        let ty = match packing(self.dtype) {
            Packing::Single(ty) => ty,
            Packing::Pair | Packing::Quad => Ty::S32,
        };
        t.name(&self.prefix(), ty, self.registers());
    }
}

impl Emit<'_> {
    /// The value of element `v` of a fragment.
    pub(super) fn element(&mut self, f: FragId, v: usize) -> Val {
        let frag = self.frags.get(f);
        let (r, dtype) = (frag.register(v), frag.dtype);
        match packing(dtype) {
            Packing::Single(ty) => Val::reg(ty, r),
            Packing::Pair if dtype == DType::BF16 => {
                let bits = if v.is_multiple_of(2) {
                    self.t.def(Ty::S32, "shl.b32", &[&r, "16"])
                } else {
                    self.t.def(Ty::S32, "and.b32", &[&r, "0xFFFF0000"])
                };
                Val::reg(Ty::F32, self.t.def(Ty::F32, "mov.b32", &[&bits]))
            }
            Packing::Pair => {
                let h = self.half(&r, v % 2);
                Val::reg(Ty::F32, self.t.def(Ty::F32, "cvt.f32.f16", &[&h]))
            }
            Packing::Quad => {
                let shifted = self.t.def(Ty::S32, "shr.u32", &[&r, &(v % 4 * 8).to_string()]);
                let b = self.t.def(Ty::B16, "cvt.u16.u32", &[&shifted]);
                self.float8(dtype, &b)
            }
        }
    }

    /// The f32 of the 8-bit float in the low half of a 16-bit register.
    pub(super) fn float8(&mut self, dtype: DType, b: &str) -> Val {
        let name = if dtype == DType::F8E4M3 { "e4m3x2" } else { "e5m2x2" };
        let pair = self.t.def(Ty::S32, &format!("cvt.rn.f16x2.{name}"), &[b]);
        let h = self.half(&pair, 0);
        Val::reg(Ty::F32, self.t.def(Ty::F32, "cvt.f32.f16", &[&h]))
    }

    /// One 16-bit half of a 32-bit register.
    pub(super) fn half(&mut self, r: &str, which: usize) -> String {
        let (a, b) = (self.t.reg(Ty::B16), self.t.reg(Ty::B16));
        self.t.line(&format!("mov.b32 {{{a}, {b}}}, {r}"));
        if which == 0 { a } else { b }
    }

    /// Writes every element of a fragment: `value` gives element after element.
    pub(super) fn set_elements(&mut self, f: FragId, mut value: impl FnMut(&mut Self, usize) -> Res<Val>) -> Res<()> {
        let (count, dtype) = (self.frags.get(f).count(), self.frags.get(f).dtype);
        let pack = packing(dtype);
        let mut v = 0;
        while v < count {
            let d = self.frags.get(f).register(v);
            match pack {
                Packing::Single(ty) => {
                    let x = value(self, v)?;
                    let x = self.rounded(&x, dtype)?;
                    let x = self.to(&x, ty);
                    if x.s != d {
                        let suffix = match ty {
                            Ty::S32 => "b32",
                            Ty::S64 => "b64",
                            Ty::F32 => "f32",
                            Ty::F64 => "f64",
                            Ty::Pred | Ty::B16 => unreachable!("no fragment's class"),
                        };
                        self.t.line(&format!("mov.{suffix} {d}, {}", x.s));
                    }
                    v += 1;
                }
                Packing::Pair => {
                    let lo = value(self, v)?;
                    let hi = if v + 1 < count { value(self, v + 1)? } else { Val::f32(0.0) };
                    self.pack_pair(dtype, &d, &lo, &hi);
                    v += 2;
                }
                Packing::Quad => {
                    let mut halves = Vec::new();
                    for p in [v, v + 2] {
                        let lo = if p < count { value(self, p)? } else { Val::f32(0.0) };
                        let hi = if p + 1 < count { value(self, p + 1)? } else { Val::f32(0.0) };
                        halves.push(self.pack_bytes(dtype, &lo, &hi));
                    }
                    self.t.line(&format!("mov.b32 {d}, {{{}, {}}}", halves[0], halves[1]));
                    v += 4;
                }
            }
        }
        Ok(())
    }

    /// Two values rounded into the halves of `d`.
    pub(super) fn pack_pair(&mut self, dtype: DType, d: &str, lo: &Val, hi: &Val) {
        let (lo, hi) = (self.to(lo, Ty::F32), self.to(hi, Ty::F32));
        let name = if dtype == DType::BF16 { "bf16x2" } else { "f16x2" };
        if let (Some(a), Some(b)) = (lo.k, hi.k) {
            let bits = |x: f64| -> u32 {
                match dtype {
                    DType::BF16 => (dtype.round(x) as f32).to_bits() >> 16,
                    _ => u32::from(half::f16::from_f64(x).to_bits()),
                }
            };
            self.t.line(&format!("mov.b32 {d}, {}", bits(a) | bits(b) << 16));
            return;
        }
        let (lo, hi) = (self.in_reg(&lo), self.in_reg(&hi));
        self.t.line(&format!("cvt.rn.{name}.f32 {d}, {hi}, {lo}"));
    }

    /// Two values rounded to 8-bit floats in a 16-bit register.
    pub(super) fn pack_bytes(&mut self, dtype: DType, lo: &Val, hi: &Val) -> String {
        let (lo, hi) = (self.to(lo, Ty::F32), self.to(hi, Ty::F32));
        let (lo, hi) = (self.in_reg(&lo), self.in_reg(&hi));
        let name = if dtype == DType::F8E4M3 { "e4m3x2" } else { "e5m2x2" };
        self.t.def(Ty::B16, &format!("cvt.rn.satfinite.{name}.f32"), &[&hi, &lo])
    }

    /// The thread part of a coordinate: computed once, before the role's body.
    pub(super) fn thread_coord(&mut self, f: FragId, dim: usize) -> Val {
        let frag = self.frags.get(f);
        let (digits, hi) = (frag.threads[dim].clone(), frag.thread_max(dim));
        let mut sum = Val::int(0);
        if digits.is_empty() {
            return sum;
        }
        if let Some(v) = self.role.thread_coords.get(&digits) {
            return v.clone();
        }
        self.hoisted(|e| {
            let t = e.role.thread.clone();
            for g in &digits {
                let q = e.divide_by(&t, g.place);
                // The last digit of the unit's threads needs no remainder.
                let whole = g.place * g.extent > u64::try_from(t.hi).unwrap_or(u64::MAX);
                let q = if whole { q } else { e.remainder_by(&q, g.extent) };
                let m = e.mul(&q, &Val::int(g.stride as i64));
                sum = e.add(&sum, &m);
            }
        });
        sum.lo = 0;
        sum.hi = hi;
        self.role.thread_coords.insert(digits, sum.clone());
        sum
    }

    fn divide_by(&mut self, a: &Val, k: u64) -> Val {
        self.bin(einfall_ir::ops::BinaryOp::Div, a, &Val::int(k as i64)).expect("integers divide")
    }

    fn remainder_by(&mut self, a: &Val, k: u64) -> Val {
        self.bin(einfall_ir::ops::BinaryOp::Mod, a, &Val::int(k as i64)).expect("integers divide")
    }

    /// Holds in one of the threads that have copies of the same elements; none if there are no copies.
    pub(super) fn first_replica(&mut self, f: FragId) -> Option<Val> {
        let frag = self.frags.get(f);
        let (replicas, threads) = (frag.replicas.clone(), frag.thread_count);
        let unit = self.role.scope.threads();
        if replicas.is_empty() && threads == unit {
            return None;
        }
        if let Some(v) = self.role.replicas.get(&(replicas.clone(), threads)) {
            return Some(v.clone());
        }
        let mut p = Val::pred(true);
        self.hoisted(|e| {
            let t = e.role.thread.clone();
            for g in &replicas {
                let q = e.divide_by(&t, g.place);
                let q = e.remainder_by(&q, g.extent);
                let zero = e.bin(einfall_ir::ops::BinaryOp::Eq, &q, &Val::int(0)).expect("integers compare");
                p = e.bin(einfall_ir::ops::BinaryOp::And, &p, &zero).expect("predicates join");
            }
            if threads < unit {
                let first = e.bin(einfall_ir::ops::BinaryOp::Lt, &t, &Val::int(threads as i64)).expect("compare");
                p = e.bin(einfall_ir::ops::BinaryOp::And, &p, &first).expect("predicates join");
            }
        });
        self.role.replicas.insert((replicas, threads), p.clone());
        Some(p)
    }
}
