//! Elements and vectors of lanes in memory: types in memory and in registers, masks, contiguous, strided and gathered
//! accesses of one register.
//!
//! Invariant: a lane whose mask is off is neither read nor written.

use super::super::math::{F8, Lanes};
use super::super::value::{Text, Ty, Val};
use super::*;
use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::BufId;

impl<'a> Emit<'a> {
    pub(super) fn arith(&self, d: DType) -> Out<Ty> {
        Ok(match d {
            DType::F32 | DType::BF16 | DType::F16 | DType::F8E4M3 | DType::F8E5M2 => Ty::F32,
            DType::F64 => Ty::F64,
            DType::I64 | DType::I32 | DType::I8 | DType::U8 => Ty::Int,
            DType::Bool => Ty::Bool,
            DType::Tf32 | DType::I4 | DType::U4 => return Err(self.unsupported(&format!("arrays of type {d}"))),
        })
    }

    /// LLVM's type of a stored element.
    pub(super) fn mem(d: DType) -> (&'static str, u64) {
        match d {
            DType::F32 | DType::Tf32 => ("float", 4),
            DType::F64 => ("double", 8),
            DType::BF16 => ("i16", 2),
            DType::F16 => ("half", 2),
            DType::I64 => ("i64", 8),
            DType::I32 => ("i32", 4),
            DType::I8 | DType::U8 | DType::Bool | DType::F8E4M3 | DType::F8E5M2 | DType::I4 | DType::U4 => ("i8", 1),
        }
    }

    pub(super) fn gep(&mut self, b: BufId, ptr: &str, off: &str) -> String {
        if off == "0" {
            return ptr.to_string();
        }
        let (elem, _) = Self::mem(self.bufs[b.index()].dtype);
        self.t.def(&format!("getelementptr {elem}, ptr {ptr}, i64 {off}"))
    }

    /// Widens stored elements to arithmetic ones.
    pub(super) fn widen(&mut self, d: DType, s: String, vector: bool) -> Out<Val> {
        let (elem, _) = Self::mem(d);
        let shape = |t: &Text, e: &str| if vector { t.vec(e) } else { e.to_string() };
        let ty = self.arith(d)?;
        let raw = |v: String| if vector { Val::Vector(ty, v) } else { Val::Uniform(ty, v) };
        let from = shape(&self.t, elem);
        Ok(match d {
            DType::F32 | DType::F64 | DType::I64 | DType::Tf32 => raw(s),
            DType::F16 => {
                let to = shape(&self.t, "float");
                raw(self.t.def(&format!("fpext {from} {s} to {to}")))
            }
            DType::BF16 => {
                let scalef = self.isa.scalef;
                let v = Lanes::new(&mut self.t, vector, scalef).bf16_value(&s);
                raw(v)
            }
            DType::I32 | DType::I8 => {
                let to = shape(&self.t, "i64");
                raw(self.t.def(&format!("sext {from} {s} to {to}")))
            }
            DType::U8 => {
                let to = shape(&self.t, "i64");
                raw(self.t.def(&format!("zext {from} {s} to {to}")))
            }
            DType::Bool => {
                let zero = if vector { "zeroinitializer".to_string() } else { "0".into() };
                raw(self.t.def(&format!("icmp ne {from} {s}, {zero}")))
            }
            DType::F8E4M3 | DType::F8E5M2 => {
                let v = Lanes::new(&mut self.t, vector, self.isa.scalef).f8_value(&s, F8::of(d));
                raw(v)
            }
            DType::I4 | DType::U4 => return Err(self.unsupported(&format!("arrays of type {d}"))),
        })
    }

    /// Narrows arithmetic elements to stored ones.
    pub(super) fn narrow(&mut self, d: DType, v: Val, vector: bool) -> Out<String> {
        let v = if self.stored == Some(d) { v } else { self.cast(v, d)? };
        let (elem, _) = Self::mem(d);
        let s = match (&v, vector) {
            (Val::Uniform(_, s), false) => s.clone(),
            (_, true) => self.t.vector(&v),
            (Val::Affine(..) | Val::Vector(..), false) => return Err(self.unsupported("a vector stored as a scalar")),
        };
        let shape = |t: &Text, e: &str| if vector { t.vec(e) } else { e.to_string() };
        let to = shape(&self.t, elem);
        Ok(match d {
            DType::F32 | DType::F64 | DType::I64 | DType::Tf32 => s,
            DType::BF16 => {
                // The value is a bf16 already: its upper bits.
                let (f, i) = (shape(&self.t, "float"), shape(&self.t, "i32"));
                let b = self.t.def(&format!("bitcast {f} {s} to {i}"));
                let c = if vector { self.t.splat_const("i32", "16") } else { "16".into() };
                let b = self.t.def(&format!("lshr {i} {b}, {c}"));
                self.t.def(&format!("trunc {i} {b} to {to}"))
            }
            DType::F16 => {
                let f = shape(&self.t, "float");
                self.t.def(&format!("fptrunc {f} {s} to {to}"))
            }
            DType::I32 | DType::I8 | DType::U8 => {
                let l = shape(&self.t, "i64");
                self.t.def(&format!("trunc {l} {s} to {to}"))
            }
            DType::Bool => {
                let b = shape(&self.t, "i1");
                self.t.def(&format!("zext {b} {s} to {to}"))
            }
            DType::F8E4M3 | DType::F8E5M2 => Lanes::new(&mut self.t, vector, self.isa.scalef).f8_bits(&s, F8::of(d)),
            DType::I4 | DType::U4 => return Err(self.unsupported(&format!("arrays of type {d}"))),
        })
    }

    /// Contiguous elements (or one), under a mask; absent elements read 0.
    pub(super) fn load_lanes(&mut self, d: DType, ptr: &str, vector: bool, mask: Option<&str>) -> Out<Val> {
        let (elem, align) = Self::mem(d);
        let s = match (vector, mask) {
            (false, _) => self.t.def(&format!("load {elem}, ptr {ptr}, align {align}")),
            (true, None) => {
                let vt = self.t.vec(elem);
                self.t.def(&format!("load {vt}, ptr {ptr}, align {align}"))
            }
            (true, Some(m)) => {
                let (vt, vb) = (self.t.vec(elem), self.t.vec("i1"));
                let name = format!("llvm.masked.load.{}.p0", self.vec_suffix(elem));
                let align = format!("i32 {align}");
                self.masked_call(&vt, &name, &[("ptr", ptr), ("", &align), (&vb, m), (&vt, "zeroinitializer")])
            }
        };
        self.widen(d, s, vector)
    }

    /// A masked memory intrinsic, whose alignment argument is a literal.
    pub(super) fn masked_call(&mut self, ret: &str, name: &str, args: &[(&str, &str)]) -> String {
        let args: Vec<(String, String)> = args
            .iter()
            .map(|(t, v)| match v.strip_prefix("i32 ") {
                Some(n) if t.is_empty() => ("i32".to_string(), n.to_string()),
                _ => (t.to_string(), v.to_string()),
            })
            .collect();
        let args: Vec<(&str, &str)> = args.iter().map(|(t, v)| (t.as_str(), v.as_str())).collect();
        self.t.call(ret, name, &args)
    }

    pub(super) fn vec_suffix(&self, elem: &str) -> String {
        let e = match elem {
            "float" => "f32",
            "double" => "f64",
            "half" => "f16",
            other => other,
        };
        format!("v{}{e}", self.t.lanes)
    }

    /// Lane offsets `0, s, 2s, …`.
    pub(super) fn lane_offsets(&mut self, stride: &str) -> String {
        match stride.parse::<i64>() {
            Ok(s) => self.t.iota("i64", s),
            Err(_) => {
                let s = self.t.splat("i64", stride);
                let (vt, iota) = (self.t.vec("i64"), self.t.iota("i64", 1));
                self.t.def(&format!("mul {vt} {s}, {iota}"))
            }
        }
    }

    pub(super) fn full_mask(&self) -> String {
        self.t.splat_const("i1", "true")
    }

    /// Elements at `base + offsets` under a mask.
    pub(super) fn gather_lanes(&mut self, d: DType, base: &str, offsets: &str, mask: Option<&str>) -> Out<Val> {
        let (elem, align) = Self::mem(d);
        let (vt, vb, vp, vi) = (self.t.vec(elem), self.t.vec("i1"), self.t.vec("ptr"), self.t.vec("i64"));
        let ptrs = self.t.def(&format!("getelementptr {elem}, ptr {base}, {vi} {offsets}"));
        let full = self.full_mask();
        let m = mask.unwrap_or(&full).to_string();
        let name = format!("llvm.masked.gather.{}.v{}p0", self.vec_suffix(elem), self.t.lanes);
        let align = format!("i32 {align}");
        let s = self.masked_call(&vt, &name, &[(&vp, &ptrs), ("", &align), (&vb, &m), (&vt, "zeroinitializer")]);
        self.widen(d, s, true)
    }

    pub(super) fn store_lanes(&mut self, d: DType, ptr: &str, v: Val, vector: bool, mask: Option<&str>) -> Out<()> {
        let s = self.narrow(d, v, vector)?;
        let (elem, align) = Self::mem(d);
        match (vector, mask) {
            (false, _) => self.t.line(&format!("store {elem} {s}, ptr {ptr}, align {align}")),
            (true, None) => {
                let vt = self.t.vec(elem);
                self.t.line(&format!("store {vt} {s}, ptr {ptr}, align {align}"));
            }
            (true, Some(m)) => {
                let (vt, vb) = (self.t.vec(elem), self.t.vec("i1"));
                let name = format!("llvm.masked.store.{}.p0", self.vec_suffix(elem));
                let align = format!("i32 {align}");
                self.masked_call("void", &name, &[(&vt, &s), ("ptr", ptr), ("", &align), (&vb, m)]);
            }
        }
        Ok(())
    }

    pub(super) fn scatter_lanes(&mut self, d: DType, base: &str, offsets: &str, v: Val, mask: Option<&str>) -> Out<()> {
        let s = self.narrow(d, v, true)?;
        let (elem, align) = Self::mem(d);
        let (vt, vb, vp, vi) = (self.t.vec(elem), self.t.vec("i1"), self.t.vec("ptr"), self.t.vec("i64"));
        let ptrs = self.t.def(&format!("getelementptr {elem}, ptr {base}, {vi} {offsets}"));
        let full = self.full_mask();
        let m = mask.unwrap_or(&full).to_string();
        let name = format!("llvm.masked.scatter.{}.v{}p0", self.vec_suffix(elem), self.t.lanes);
        let align = format!("i32 {align}");
        self.masked_call("void", &name, &[(&vt, &s), (&vp, &ptrs), ("", &align), (&vb, &m)]);
        Ok(())
    }

    /// A lane mask that includes a scalar condition.
    pub(super) fn lane_mask(&mut self, cond: Option<String>, lanes: Option<String>) -> Option<String> {
        match (cond, lanes) {
            (None, l) => l,
            (Some(c), None) => Some(self.t.splat("i1", &c)),
            (Some(c), Some(l)) => {
                let (vb, off) = (self.t.vec("i1"), "zeroinitializer");
                Some(self.t.def(&format!("select i1 {c}, {vb} {l}, {vb} {off}")))
            }
        }
    }
}
