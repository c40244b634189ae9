//! Statements: structured control flow, fragments in stack slots that SROA lifts to registers, memory access.
//!
//! Invariant: absent elements are never touched in memory; a load of rows against the lanes becomes contiguous loads
//! and an in-register transpose, and only accesses that are neither contiguous nor transposable use gathers.

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Bound, BufId, BufSpace, Expr, FragId, Kernel, Stmt, VarId, View};
use einfall_ir::ops::{BinaryOp, ReduceOp};

use super::expr::Place;
use super::isa::Isa;
use super::value::{Text, Ty, Val, float_text};
use crate::lower::cpu::NotLowered;

type Out<T> = Result<T, NotLowered>;

/// A buffer as the function sees it.
pub(super) struct BufFacts {
    pub(super) ptr: String,
    /// Elements per unit of each dimension: SSA names or literals.
    pub(super) strides: Vec<String>,
    pub(super) dims: Vec<String>,
    pub(super) dtype: DType,
}

/// Registers of a fragment.
pub(super) struct FragFacts {
    /// Coordinates of lane 0 of each register.
    regs: Vec<Vec<u64>>,
    lane_dim: Option<usize>,
    ty: Ty,
    /// i32 and bool registers keep their own width in the slot.
    elem: &'static str,
}

/// One function being printed.
pub(super) struct Emit<'a> {
    pub(super) t: Text,
    pub(super) k: &'a Kernel,
    pub(super) isa: &'a Isa,
    pub(super) bufs: Vec<BufFacts>,
    frags: Vec<FragFacts>,
    /// Literals of unrolled counters.
    fixed: Vec<Option<i64>>,
    /// Whether several tasks may run at once, so that joins in device memory must be atomic.
    pub(super) shared_writes: bool,
}

/// A register's place in memory.
struct Address {
    ptr: String,
    /// Elements per lane; 0 for replicated lanes.
    lane_stride: String,
}

impl<'a> Emit<'a> {
    pub(super) fn new(k: &'a Kernel, isa: &'a Isa, bufs: Vec<BufFacts>) -> Out<Emit<'a>> {
        let mut t = Text::new(isa.lanes());
        let mut frags = Vec::new();
        let fail = |what: &str| NotLowered { kernel: k.name.clone(), what: what.to_string() };
        for (id, f) in k.frags.iter() {
            let (threads, regs, lanes) = f.dist.counts();
            let lane_dim = match f.dist.lanes.as_slice() {
                [] => None,
                [d] if d.stride == 0 => None,
                [d] if d.stride == 1 => Some(d.dim),
                _ => return Err(fail("lanes with several digits")),
            };
            if threads != 1 || (lane_dim.is_some() && lanes != isa.lanes()) {
                return Err(fail(&format!("the distribution {} on {} lanes", f.dist, isa.lanes())));
            }
            let (ty, elem) = match f.dtype {
                DType::F32 | DType::BF16 | DType::F16 => (Ty::F32, "float"),
                DType::F64 => (Ty::F64, "double"),
                DType::I64 | DType::I32 | DType::I8 | DType::U8 => (Ty::Int, "i64"),
                DType::Bool => (Ty::Bool, "i8"),
                DType::Tf32 | DType::F8E4M3 | DType::F8E5M2 | DType::I4 => {
                    return Err(fail(&format!("fragments of type {}", f.dtype)));
                }
            };
            let store = if lane_dim.is_some() { t.vec(elem) } else { elem.to_string() };
            for r in 0..regs {
                t.allocas += &format!("  %f{}.{r} = alloca {store}, align 64\n", id.index());
            }
            let regs = (0..regs).map(|r| f.dist.coords(0, r, 0)).collect();
            frags.push(FragFacts { regs, lane_dim, ty, elem });
        }
        for (id, _) in k.vars.iter() {
            t.allocas += &format!("  %v{} = alloca i64, align 8\n", id.index());
        }
        let fixed = vec![None; k.vars.len()];
        Ok(Emit { t, k, isa, bufs, frags, fixed, shared_writes: false })
    }

    pub(super) fn unsupported(&self, what: &str) -> NotLowered {
        NotLowered { kernel: self.k.name.clone(), what: what.to_string() }
    }

    pub(super) fn var(&mut self, v: VarId) -> String {
        match self.fixed[v.index()] {
            Some(i) => i.to_string(),
            None => self.t.def(&format!("load i64, ptr %v{}, align 8", v.index())),
        }
    }

    fn set_var(&mut self, v: VarId, value: &str) {
        self.fixed[v.index()] = None;
        self.t.line(&format!("store i64 {value}, ptr %v{}, align 8", v.index()));
    }

    // Fragments.

    fn reg_type(&self, frag: FragId) -> String {
        let f = &self.frags[frag.index()];
        if f.lane_dim.is_some() { self.t.vec(f.elem) } else { f.elem.to_string() }
    }

    /// The register that holds the element at `coords` in lane 0.
    pub(super) fn read_frag(&mut self, frag: FragId, coords: &[u64]) -> Out<Val> {
        let f = &self.frags[frag.index()];
        let Some(r) = f.regs.iter().position(|c| c.as_slice() == coords) else {
            return Err(self.unsupported(&format!("fragment {} read at {coords:?}", self.k.frags[frag].name)));
        };
        Ok(self.read_reg(frag, r))
    }

    fn read_reg(&mut self, frag: FragId, r: usize) -> Val {
        let ty = self.reg_type(frag);
        let f = &self.frags[frag.index()];
        let (lane, kind) = (f.lane_dim.is_some(), f.ty);
        let s = self.t.def(&format!("load {ty}, ptr %f{}.{r}, align 64", frag.index()));
        let s = if kind == Ty::Bool {
            let to = if lane { self.t.vec("i1") } else { "i1".into() };
            self.t.def(&format!("trunc {ty} {s} to {to}"))
        } else {
            s
        };
        if lane { Val::Vector(kind, s) } else { Val::Uniform(kind, s) }
    }

    fn write_reg(&mut self, frag: FragId, r: usize, v: Val) -> Out<()> {
        let f = &self.frags[frag.index()];
        let (lane, kind) = (f.lane_dim.is_some(), f.ty);
        let v = if v.ty() == kind {
            v
        } else if kind == Ty::Int {
            self.cast(v, DType::I64)?
        } else {
            self.convert(v, kind)
        };
        let s = match (&v, lane) {
            (_, true) => self.t.vector(&v),
            (Val::Uniform(_, s), false) => s.clone(),
            (Val::Affine(..) | Val::Vector(..), false) => {
                let s = self.t.vector(&v);
                let vt = self.t.vec(kind.llvm());
                self.t.def(&format!("extractelement {vt} {s}, i64 0"))
            }
        };
        let ty = self.reg_type(frag);
        let s = if kind == Ty::Bool {
            let from = if lane { self.t.vec("i1") } else { "i1".into() };
            self.t.def(&format!("zext {from} {s} to {ty}"))
        } else {
            s
        };
        self.t.line(&format!("store {ty} {s}, ptr %f{}.{r}, align 64", frag.index()));
        Ok(())
    }

    // Buffers.

    pub(super) fn scalar(&mut self, b: BufId) -> Out<Val> {
        let bits = self.bufs[b.index()].ptr.clone();
        Ok(match self.bufs[b.index()].dtype {
            DType::F64 => Val::Uniform(Ty::F64, self.t.def(&format!("bitcast i64 {bits} to double"))),
            d if d.is_float() => {
                let v = self.t.def(&format!("bitcast i64 {bits} to double"));
                Val::Uniform(Ty::F32, self.t.def(&format!("fptrunc double {v} to float")))
            }
            DType::Bool => Val::Uniform(Ty::Bool, self.t.def(&format!("icmp ne i64 {bits}, 0"))),
            _ => Val::Uniform(Ty::Int, bits),
        })
    }

    /// Whether `at` lies in the buffer, as i1 text; none where every coordinate is a literal zero.
    fn in_range(&mut self, b: BufId, at: &[String]) -> Option<String> {
        let dims = self.bufs[b.index()].dims.clone();
        let mut ok: Option<String> = None;
        for (a, d) in at.iter().zip(&dims) {
            let c = self.t.def(&format!("icmp ult i64 {a}, {d}"));
            ok = Some(match ok {
                None => c,
                Some(o) => self.t.def(&format!("and i1 {o}, {c}")),
            });
        }
        ok
    }

    fn offset(&mut self, b: BufId, at: &[String]) -> String {
        let strides = self.bufs[b.index()].strides.clone();
        let mut off = "0".to_string();
        for (a, s) in at.iter().zip(&strides) {
            let p = self.t.mul(a, s);
            off = self.t.add(&off, &p);
        }
        off
    }

    /// One uniform element; out of range reads 0.
    pub(super) fn fetch(&mut self, b: BufId, at: &[String]) -> Out<Val> {
        let ok = self.in_range(b, at);
        let off = self.offset(b, at);
        let off = match &ok {
            Some(c) => self.t.def(&format!("select i1 {c}, i64 {off}, i64 0")),
            None => off,
        };
        // An empty buffer has no element to read in its place: read only where in range.
        let (yes, done) = (self.t.label("fetch"), self.t.label("fetched"));
        let dtype = self.bufs[b.index()].dtype;
        let ty = self.arith(dtype)?;
        let slot = self.t.name();
        self.t.allocas += &format!("  {slot} = alloca {}, align 8\n", ty.llvm());
        let zero = if ty == Ty::Int || ty == Ty::Bool { "0".to_string() } else { float_text(ty, 0.0) };
        self.t.line(&format!("store {} {zero}, ptr {slot}, align 8", ty.llvm()));
        if let Some(c) = ok {
            self.t.line(&format!("br i1 {c}, label %{yes}, label %{done}"));
        } else {
            self.t.line(&format!("br label %{yes}"));
        }
        self.t.start(&yes);
        let ptr = self.gep(b, &self.bufs[b.index()].ptr.clone(), &off);
        let v = self.load_lanes(dtype, &ptr, false, None)?;
        let Val::Uniform(_, s) = v else { return Err(self.unsupported("a fetched vector")) };
        self.t.line(&format!("store {} {s}, ptr {slot}, align 8", ty.llvm()));
        self.t.line(&format!("br label %{done}"));
        self.t.start(&done);
        Ok(Val::Uniform(ty, self.t.def(&format!("load {}, ptr {slot}, align 8", ty.llvm()))))
    }

    fn arith(&self, d: DType) -> Out<Ty> {
        Ok(match d {
            DType::F32 | DType::BF16 | DType::F16 => Ty::F32,
            DType::F64 => Ty::F64,
            DType::I64 | DType::I32 | DType::I8 | DType::U8 => Ty::Int,
            DType::Bool => Ty::Bool,
            DType::Tf32 | DType::F8E4M3 | DType::F8E5M2 | DType::I4 => {
                return Err(self.unsupported(&format!("arrays of type {d}")));
            }
        })
    }

    /// LLVM's type of a stored element.
    fn mem(d: DType) -> (&'static str, u64) {
        match d {
            DType::F32 | DType::Tf32 => ("float", 4),
            DType::F64 => ("double", 8),
            DType::BF16 => ("i16", 2),
            DType::F16 => ("half", 2),
            DType::I64 => ("i64", 8),
            DType::I32 => ("i32", 4),
            DType::I8 | DType::U8 | DType::Bool | DType::F8E4M3 | DType::F8E5M2 | DType::I4 => ("i8", 1),
        }
    }

    fn gep(&mut self, b: BufId, ptr: &str, off: &str) -> String {
        if off == "0" {
            return ptr.to_string();
        }
        let (elem, _) = Self::mem(self.bufs[b.index()].dtype);
        self.t.def(&format!("getelementptr {elem}, ptr {ptr}, i64 {off}"))
    }

    /// Widens stored elements to arithmetic ones.
    fn widen(&mut self, d: DType, s: String, vector: bool) -> Out<Val> {
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
                let v = super::math::Lanes::new(&mut self.t, vector, scalef).bf16_value(&s);
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
            DType::F8E4M3 | DType::F8E5M2 | DType::I4 => return Err(self.unsupported(&format!("arrays of type {d}"))),
        })
    }

    /// Narrows arithmetic elements to stored ones.
    fn narrow(&mut self, d: DType, v: Val, vector: bool) -> Out<String> {
        let v = self.cast(v, d)?;
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
            DType::F8E4M3 | DType::F8E5M2 | DType::I4 => return Err(self.unsupported(&format!("arrays of type {d}"))),
        })
    }

    /// Contiguous elements (or one), under a mask; absent elements read 0.
    fn load_lanes(&mut self, d: DType, ptr: &str, vector: bool, mask: Option<&str>) -> Out<Val> {
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
    fn masked_call(&mut self, ret: &str, name: &str, args: &[(&str, &str)]) -> String {
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

    fn vec_suffix(&self, elem: &str) -> String {
        let e = match elem {
            "float" => "f32",
            "double" => "f64",
            "half" => "f16",
            other => other,
        };
        format!("v{}{e}", self.t.lanes)
    }

    /// Lane offsets `0, s, 2s, …`.
    fn lane_offsets(&mut self, stride: &str) -> String {
        match stride.parse::<i64>() {
            Ok(s) => self.t.iota("i64", s),
            Err(_) => {
                let s = self.t.splat("i64", stride);
                let (vt, iota) = (self.t.vec("i64"), self.t.iota("i64", 1));
                self.t.def(&format!("mul {vt} {s}, {iota}"))
            }
        }
    }

    fn full_mask(&self) -> String {
        self.t.splat_const("i1", "true")
    }

    /// Elements at `base + offsets` under a mask.
    fn gather_lanes(&mut self, d: DType, base: &str, offsets: &str, mask: Option<&str>) -> Out<Val> {
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

    fn store_lanes(&mut self, d: DType, ptr: &str, v: Val, vector: bool, mask: Option<&str>) -> Out<()> {
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

    fn scatter_lanes(&mut self, d: DType, base: &str, offsets: &str, v: Val, mask: Option<&str>) -> Out<()> {
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

    /// Runs `f` where the scalar condition holds.
    fn guarded(&mut self, cond: Option<&str>, f: impl FnOnce(&mut Self) -> Out<()>) -> Out<()> {
        let Some(c) = cond else { return f(self) };
        let (yes, done) = (self.t.label("then"), self.t.label("endif"));
        self.t.line(&format!("br i1 {c}, label %{yes}, label %{done}"));
        self.t.start(&yes);
        f(self)?;
        self.t.line(&format!("br label %{done}"));
        self.t.start(&done);
        Ok(())
    }

    // Views.

    /// The view's origin: pointer, and per fragment dimension its element stride.
    fn view_base(&mut self, view: &View) -> Out<(String, Vec<String>)> {
        if view.stage.is_some() {
            return Err(self.unsupported("staged memory"));
        }
        let at = view.at.iter().map(|a| self.int(a)).collect::<Out<Vec<_>>>()?;
        let off = self.offset(view.buf, &at);
        let ptr = self.bufs[view.buf.index()].ptr.clone();
        let ptr = self.gep(view.buf, &ptr, &off);
        let mut steps = Vec::new();
        for w in &view.walk {
            steps.push(match w {
                None => "0".to_string(),
                Some((d, step)) => {
                    let s = self.bufs[view.buf.index()].strides[*d].clone();
                    self.t.mul(&s, &step.to_string())
                }
            });
        }
        Ok((ptr, steps))
    }

    fn address(&mut self, b: BufId, base: &str, steps: &[String], coords: &[u64], lane_dim: Option<usize>) -> Address {
        let mut off = "0".to_string();
        for (c, s) in coords.iter().zip(steps) {
            let p = self.t.mul(s, &c.to_string());
            off = self.t.add(&off, &p);
        }
        let ptr = self.gep(b, base, &off);
        Address { ptr, lane_stride: lane_dim.map_or("0".to_string(), |d| steps[d].clone()) }
    }

    /// Scalar limits of bounds, evaluated once.
    fn limits(&mut self, bounds: &[Bound]) -> Out<Vec<(usize, String)>> {
        bounds.iter().map(|b| Ok((b.dim, self.int(&b.limit)?))).collect()
    }

    /// The mask of a register under bounds: (scalar condition, lane mask).
    fn mask(
        &mut self,
        limits: &[(usize, String)],
        coords: &[u64],
        lane_dim: Option<usize>,
    ) -> Out<(Option<String>, Option<String>)> {
        let (mut cond, mut lanes): (Option<String>, Option<String>) = (None, None);
        for (dim, limit) in limits {
            let rest = self.t.sub(limit, &coords[*dim].to_string());
            if lane_dim == Some(*dim) {
                let v = self.binary(BinaryOp::Lt, Val::Affine("0".into(), 1), Val::Uniform(Ty::Int, rest))?;
                let m = self.t.vector(&v);
                lanes = Some(match lanes {
                    None => m,
                    Some(l) => {
                        let vb = self.t.vec("i1");
                        self.t.def(&format!("and {vb} {l}, {m}"))
                    }
                });
            } else {
                let c = self.t.def(&format!("icmp sgt i64 {rest}, 0"));
                cond = Some(match cond {
                    None => c,
                    Some(o) => self.t.def(&format!("and i1 {o}, {c}")),
                });
            }
        }
        Ok((cond, lanes))
    }

    /// A lane mask that includes a scalar condition.
    fn lane_mask(&mut self, cond: Option<String>, lanes: Option<String>) -> Option<String> {
        match (cond, lanes) {
            (None, l) => l,
            (Some(c), None) => Some(self.t.splat("i1", &c)),
            (Some(c), Some(l)) => {
                let (vb, off) = (self.t.vec("i1"), "zeroinitializer");
                Some(self.t.def(&format!("select i1 {c}, {vb} {l}, {vb} {off}")))
            }
        }
    }

    fn load(&mut self, out: FragId, view: &View, bounds: &[Bound]) -> Out<()> {
        let limits = self.limits(bounds)?;
        let (base, steps) = self.view_base(view)?;
        let d = self.bufs[view.buf.index()].dtype;
        let lane_dim = self.frags[out.index()].lane_dim;
        let regs = self.frags[out.index()].regs.clone();
        if let Some(ld) = lane_dim
            && steps[ld] != "1"
            && steps[ld] != "0"
        {
            let extents = &self.k.frags[out].dist.dims;
            let unit = (0..steps.len()).find(|&u| u != ld && steps[u] == "1" && extents[u] == self.t.lanes);
            if let Some(unit) = unit {
                return self.load_transposed(out, view.buf, &base, &steps, &limits, ld, unit);
            }
        }
        for (r, coords) in regs.iter().enumerate() {
            let (cond, lanes) = self.mask(&limits, coords, lane_dim)?;
            let a = self.address(view.buf, &base, &steps, coords, lane_dim);
            let v = match lane_dim {
                None => match cond {
                    None => self.load_lanes(d, &a.ptr, false, None)?,
                    Some(c) => {
                        // An absent scalar reads the origin, which exists, and is replaced by 0.
                        let p = self.t.def(&format!("select i1 {c}, ptr {}, ptr {base}", a.ptr));
                        let v = self.load_lanes(d, &p, false, None)?;
                        self.select(Val::Uniform(Ty::Bool, c), v, Val::int(0))
                    }
                },
                Some(_) if a.lane_stride == "1" => {
                    let m = self.lane_mask(cond, lanes);
                    self.load_lanes(d, &a.ptr, true, m.as_deref())?
                }
                Some(_) if a.lane_stride == "0" => return Err(self.unsupported("a broadcast along the lanes")),
                Some(_) => {
                    let m = self.lane_mask(cond, lanes);
                    let offs = self.lane_offsets(&a.lane_stride);
                    self.gather_lanes(d, &a.ptr, &offs, m.as_deref())?
                }
            };
            self.write_reg(out, r, v)?;
        }
        Ok(())
    }

    /// Squares of lanes × lanes elements, contiguous against the lanes: contiguous loads, then log₂ L butterfly stages.
    #[allow(clippy::too_many_arguments)]
    fn load_transposed(
        &mut self,
        out: FragId,
        buf: BufId,
        base: &str,
        steps: &[String],
        limits: &[(usize, String)],
        lane: usize,
        unit: usize,
    ) -> Out<()> {
        let n = self.t.lanes as usize;
        let d = self.bufs[buf.index()].dtype;
        let regs = self.frags[out.index()].regs.clone();
        let ty = self.arith(d)?;
        let vt = self.t.vec(ty.llvm());
        for (_, origin) in regs.iter().enumerate().filter(|(_, c)| c[unit] == 0) {
            let mut rows = Vec::new();
            for l in 0..n as u64 {
                let mut coords = origin.clone();
                coords[lane] += l;
                let (cond, lanes) = self.mask(limits, &coords, Some(unit))?;
                let a = self.address(buf, base, steps, &coords, Some(unit));
                let m = self.lane_mask(cond, lanes);
                let v = self.load_lanes(d, &a.ptr, true, m.as_deref())?;
                rows.push(self.t.vector(&v));
            }
            let mut s = 1;
            while s < n {
                let lo: Vec<usize> = (0..n).map(|e| if e & s == 0 { e } else { n + (e ^ s) }).collect();
                let hi: Vec<usize> = (0..n).map(|e| if e & s == 0 { e ^ s } else { n + e }).collect();
                let mut next = rows.clone();
                for i in (0..n).filter(|i| i & s == 0) {
                    for (to, pick) in [(i, &lo), (i | s, &hi)] {
                        let idx: Vec<String> = pick.iter().map(|p| format!("i32 {p}")).collect();
                        next[to] = self.t.def(&format!(
                            "shufflevector {vt} {}, {vt} {}, <{n} x i32> <{}>",
                            rows[i],
                            rows[i | s],
                            idx.join(", ")
                        ));
                    }
                }
                rows = next;
                s *= 2;
            }
            for (u, row) in rows.into_iter().enumerate() {
                let mut coords = origin.clone();
                coords[unit] = u as u64;
                let Some(r) = regs.iter().position(|c| *c == coords) else {
                    return Err(self.unsupported("a transposed load of part of a square"));
                };
                self.write_reg(out, r, Val::Vector(ty, row))?;
            }
        }
        Ok(())
    }

    fn store(&mut self, view: &View, src: FragId, bounds: &[Bound], join: Option<ReduceOp>) -> Out<()> {
        let limits = self.limits(bounds)?;
        let (base, steps) = self.view_base(view)?;
        let d = self.bufs[view.buf.index()].dtype;
        let lane_dim = self.frags[src.index()].lane_dim;
        let regs = self.frags[src.index()].regs.clone();
        if join.is_some() && self.shared_writes && self.is_global(view.buf) {
            return Err(self.unsupported("a joined store to device memory from several tasks"));
        }
        for (r, coords) in regs.iter().enumerate() {
            let (cond, lanes) = self.mask(&limits, coords, lane_dim)?;
            let a = self.address(view.buf, &base, &steps, coords, lane_dim);
            let v = self.read_reg(src, r);
            let buf = view.buf;
            match lane_dim {
                None => self.guarded(cond.as_deref(), |s| {
                    let v = match join {
                        None => v,
                        Some(op) => {
                            let old = s.load_lanes(d, &a.ptr, false, None)?;
                            s.join(op, old, v)?
                        }
                    };
                    s.store_lanes(d, &a.ptr, v, false, None)
                })?,
                Some(_) if a.lane_stride == "1" => {
                    let m = self.lane_mask(cond, lanes);
                    let v = match join {
                        None => v,
                        Some(op) => {
                            let old = self.load_lanes(d, &a.ptr, true, m.as_deref())?;
                            self.join(op, old, v)?
                        }
                    };
                    self.store_lanes(d, &a.ptr, v, true, m.as_deref())?;
                }
                Some(_) => {
                    let m = self.lane_mask(cond, lanes);
                    let offs = self.lane_offsets(&a.lane_stride);
                    let v = match join {
                        None => v,
                        Some(op) => {
                            let old = self.gather_lanes(d, &a.ptr, &offs, m.as_deref())?;
                            self.join(op, old, v)?
                        }
                    };
                    self.scatter_lanes(d, &a.ptr, &offs, v, m.as_deref())?;
                }
            }
            let _ = buf;
        }
        Ok(())
    }

    fn is_global(&self, b: BufId) -> bool {
        matches!(self.k.bufs[b].space, BufSpace::Global { .. })
    }

    /// Coordinates of gathers: the flat offset over lanes and the mask of those in range.
    fn gathered(
        &mut self,
        buf: BufId,
        at: &[Expr],
        place: &Place,
        limits: &[(usize, String)],
    ) -> Out<(Val, Option<String>, Option<String>)> {
        let (mut cond, mut lanes) = self.mask(limits, &place.coords, place.lane_dim)?;
        let mut off = Val::int(0);
        let (strides, dims) = (self.bufs[buf.index()].strides.clone(), self.bufs[buf.index()].dims.clone());
        for (i, a) in at.iter().enumerate() {
            // `select(when, at, −1)` is how a condition on the points is written.
            let v = self.eval(a, Some(place))?;
            let dim = Val::Uniform(Ty::Int, dims[i].clone());
            let low = self.binary(BinaryOp::Ge, v.clone(), Val::int(0))?;
            let high = self.binary(BinaryOp::Lt, v.clone(), dim)?;
            for c in [low, high] {
                match c {
                    Val::Uniform(_, c) => {
                        cond = Some(match cond {
                            None => c,
                            Some(o) => self.t.def(&format!("and i1 {o}, {c}")),
                        });
                    }
                    Val::Affine(..) | Val::Vector(..) => {
                        let m = self.t.vector(&c);
                        lanes = Some(match lanes {
                            None => m,
                            Some(l) => {
                                let vb = self.t.vec("i1");
                                self.t.def(&format!("and {vb} {l}, {m}"))
                            }
                        });
                    }
                }
            }
            let p = self.binary(BinaryOp::Mul, v, Val::Uniform(Ty::Int, strides[i].clone()))?;
            off = self.binary(BinaryOp::Add, off, p)?;
        }
        Ok((off, cond, lanes))
    }

    fn gather(&mut self, out: FragId, buf: BufId, at: &[Expr], bounds: &[Bound]) -> Out<()> {
        let limits = self.limits(bounds)?;
        let d = self.bufs[buf.index()].dtype;
        let base = self.bufs[buf.index()].ptr.clone();
        let lane_dim = self.frags[out.index()].lane_dim;
        for (r, coords) in self.frags[out.index()].regs.clone().into_iter().enumerate() {
            let place = Place { coords, lane_dim };
            let (off, cond, lanes) = self.gathered(buf, at, &place, &limits)?;
            let v = match (&off, lane_dim) {
                (Val::Uniform(_, o), _) => {
                    // One element for all lanes.
                    let ty = self.arith(d)?;
                    let slot = self.t.name();
                    self.t.allocas += &format!("  {slot} = alloca {}, align 8\n", ty.llvm());
                    let zero = if matches!(ty, Ty::Int | Ty::Bool) { "0".to_string() } else { float_text(ty, 0.0) };
                    self.t.line(&format!("store {} {zero}, ptr {slot}, align 8", ty.llvm()));
                    let o = o.clone();
                    let base = base.clone();
                    let s2 = slot.clone();
                    self.guarded(cond.as_deref(), |s| {
                        let p = s.gep(buf, &base, &o);
                        let v = s.load_lanes(d, &p, false, None)?;
                        let Val::Uniform(ty, v) = v else { return Err(s.unsupported("a gathered vector")) };
                        s.t.line(&format!("store {} {v}, ptr {s2}, align 8", ty.llvm()));
                        Ok(())
                    })?;
                    let v = Val::Uniform(ty, self.t.def(&format!("load {}, ptr {slot}, align 8", ty.llvm())));
                    match lanes {
                        Some(m) => {
                            let z = self.convert(Val::int(0), ty);
                            self.select(Val::Vector(Ty::Bool, m), v, z)
                        }
                        None => v,
                    }
                }
                (Val::Affine(o, 1), Some(_)) => {
                    let p = self.gep(buf, &base, o);
                    let m = self.lane_mask(cond, lanes);
                    self.load_lanes(d, &p, true, m.as_deref())?
                }
                (Val::Affine(..) | Val::Vector(..), Some(_)) => {
                    let offs = self.t.vector(&off);
                    let m = self.lane_mask(cond, lanes);
                    self.gather_lanes(d, &base, &offs, m.as_deref())?
                }
                (Val::Affine(..) | Val::Vector(..), None) => return Err(self.unsupported("lanes without a dimension")),
            };
            self.write_reg(out, r, v)?;
        }
        Ok(())
    }

    fn scatter(&mut self, buf: BufId, at: &[Expr], src: FragId, bounds: &[Bound], join: Option<ReduceOp>) -> Out<()> {
        let limits = self.limits(bounds)?;
        let d = self.bufs[buf.index()].dtype;
        let base = self.bufs[buf.index()].ptr.clone();
        let lane_dim = self.frags[src.index()].lane_dim;
        if join.is_some() && self.shared_writes && self.is_global(buf) {
            return Err(self.unsupported("a joined store to device memory from several tasks"));
        }
        for (r, coords) in self.frags[src.index()].regs.clone().into_iter().enumerate() {
            let place = Place { coords, lane_dim };
            let (off, cond, lanes) = self.gathered(buf, at, &place, &limits)?;
            let v = self.read_reg(src, r);
            match (&off, lane_dim) {
                (Val::Uniform(_, o), None) => {
                    let (o, base) = (o.clone(), base.clone());
                    self.guarded(cond.as_deref(), |s| {
                        let p = s.gep(buf, &base, &o);
                        let v = match join {
                            None => v,
                            Some(op) => {
                                let old = s.load_lanes(d, &p, false, None)?;
                                s.join(op, old, v)?
                            }
                        };
                        s.store_lanes(d, &p, v, false, None)
                    })?;
                }
                (Val::Affine(o, 1), Some(_)) => {
                    let p = self.gep(buf, &base, o);
                    let m = self.lane_mask(cond, lanes);
                    let v = match join {
                        None => v,
                        Some(op) => {
                            let old = self.load_lanes(d, &p, true, m.as_deref())?;
                            self.join(op, old, v)?
                        }
                    };
                    self.store_lanes(d, &p, v, true, m.as_deref())?;
                }
                (Val::Affine(..), Some(_)) if join.is_none() => {
                    let offs = self.t.vector(&off);
                    let m = self.lane_mask(cond, lanes);
                    self.scatter_lanes(d, &base, &offs, v, m.as_deref())?;
                }
                (Val::Vector(..), Some(_)) if join.is_none() => {
                    let offs = self.t.vector(&off);
                    let m = self.lane_mask(cond, lanes);
                    self.scatter_lanes(d, &base, &offs, v, m.as_deref())?;
                }
                // Lanes may collide: one after another.
                (_, Some(_)) => self.scatter_joined(buf, &base, &off, v, cond, lanes, join)?,
                (Val::Affine(..) | Val::Vector(..), None) => return Err(self.unsupported("lanes without a dimension")),
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn scatter_joined(
        &mut self,
        buf: BufId,
        base: &str,
        off: &Val,
        v: Val,
        cond: Option<String>,
        lanes: Option<String>,
        join: Option<ReduceOp>,
    ) -> Out<()> {
        let d = self.bufs[buf.index()].dtype;
        let offs = self.t.vector(off);
        let m = self.lane_mask(cond, lanes).unwrap_or_else(|| self.full_mask());
        let ty = v.ty();
        let s = self.t.vector(&v);
        let (vi, vb, vt) = (self.t.vec("i64"), self.t.vec("i1"), self.t.vec(ty.llvm()));
        for lane in 0..self.t.lanes {
            let c = self.t.def(&format!("extractelement {vb} {m}, i64 {lane}"));
            let o = self.t.def(&format!("extractelement {vi} {offs}, i64 {lane}"));
            let x = self.t.def(&format!("extractelement {vt} {s}, i64 {lane}"));
            self.guarded(Some(&c), |s| {
                let p = s.gep(buf, base, &o);
                let mut v = Val::Uniform(ty, x.clone());
                if let Some(op) = join {
                    let old = s.load_lanes(d, &p, false, None)?;
                    v = s.join(op, old, v)?;
                }
                s.store_lanes(d, &p, v, false, None)
            })?;
        }
        Ok(())
    }

    /// Two values joined by a monoid.
    pub(super) fn join(&mut self, op: ReduceOp, a: Val, b: Val) -> Out<Val> {
        let op = match op {
            ReduceOp::Sum => BinaryOp::Add,
            ReduceOp::Product => BinaryOp::Mul,
            ReduceOp::Min => BinaryOp::Min,
            ReduceOp::Max => BinaryOp::Max,
            ReduceOp::Any => BinaryOp::Or,
            ReduceOp::All => BinaryOp::And,
            ReduceOp::LogSumExp | ReduceOp::ArgMin | ReduceOp::ArgMax => {
                return Err(self.unsupported(&format!("{} as one instruction", op.name())));
            }
        };
        self.binary(op, a, b)
    }

    fn reduce(
        &mut self,
        out: FragId,
        op: ReduceOp,
        src: FragId,
        over: &[usize],
        bounds: &[Bound],
        carry: bool,
    ) -> Out<()> {
        let limits = self.limits(bounds)?;
        let (regs, lane_dim) = (self.frags[src.index()].regs.clone(), self.frags[src.index()].lane_dim);
        let dims = self.k.frags[src].dist.dims.len();
        let kept: Vec<usize> = (0..dims).filter(|d| !over.contains(d)).collect();
        let across = lane_dim.is_some_and(|d| over.contains(&d));
        for (r, target) in self.frags[out.index()].regs.clone().iter().enumerate() {
            let mut acc: Option<Val> = None;
            for (s, coords) in regs.iter().enumerate() {
                if kept.iter().zip(target).any(|(k, t)| coords[*k] != *t) {
                    continue;
                }
                let mut v = self.read_reg(src, s);
                let (cond, lanes) = self.mask(&limits, coords, lane_dim)?;
                if cond.is_some() || lanes.is_some() {
                    let id = Val::Uniform(Ty::F64, float_text(Ty::F64, op.identity()));
                    let id = self.convert(id, v.ty());
                    let m = match (&v, cond, lanes) {
                        (Val::Uniform(..), Some(c), None) => Val::Uniform(Ty::Bool, c),
                        (_, c, l) => Val::Vector(Ty::Bool, self.lane_mask(c, l).unwrap_or_else(|| self.full_mask())),
                    };
                    v = self.select(m, v, id);
                }
                acc = Some(match acc {
                    None => v,
                    Some(a) => self.join(op, a, v)?,
                });
            }
            let Some(mut v) = acc else { return Err(self.unsupported("a reduction of nothing")) };
            if across {
                v = self.across_lanes(op, v)?;
            }
            if carry {
                let old = self.read_reg(out, r);
                v = self.join(op, old, v)?;
            }
            self.write_reg(out, r, v)?;
        }
        Ok(())
    }

    /// All lanes joined, as a tree of halves.
    fn across_lanes(&mut self, op: ReduceOp, v: Val) -> Out<Val> {
        let ty = v.ty();
        let mut v = v;
        let n = self.t.lanes;
        let vt = self.t.vec(ty.llvm());
        let mut half = n / 2;
        while half > 0 {
            let s = self.t.vector(&v);
            let idx: Vec<String> =
                (0..n).map(|i| if i < half { format!("i32 {}", i + half) } else { "i32 poison".into() }).collect();
            let up = self.t.def(&format!("shufflevector {vt} {s}, {vt} poison, <{n} x i32> <{}>", idx.join(", ")));
            v = self.join(op, v, Val::Vector(ty, up))?;
            half /= 2;
        }
        let s = self.t.vector(&v);
        Ok(Val::Uniform(ty, self.t.def(&format!("extractelement {vt} {s}, i64 0"))))
    }

    // Control flow.

    pub(super) fn stmts(&mut self, body: &[Stmt]) -> Out<()> {
        body.iter().try_for_each(|s| self.stmt(s))
    }

    fn stmt(&mut self, s: &Stmt) -> Out<()> {
        match s {
            Stmt::For { var, lo, hi, step, unroll, body } => self.for_loop(*var, lo, hi, *step, *unroll, body),
            Stmt::If { cond, then, otherwise } => {
                let c = self.condition(cond)?;
                let (yes, no, done) = (self.t.label("then"), self.t.label("else"), self.t.label("endif"));
                self.t.line(&format!("br i1 {c}, label %{yes}, label %{no}"));
                self.t.start(&yes);
                self.stmts(then)?;
                self.t.line(&format!("br label %{done}"));
                self.t.start(&no);
                self.stmts(otherwise)?;
                self.t.line(&format!("br label %{done}"));
                self.t.start(&done);
                Ok(())
            }
            Stmt::Let { var, value } => {
                let v = self.int(value)?;
                self.set_var(*var, &v);
                Ok(())
            }
            Stmt::Map { out, value } => {
                // The value before may be read: every register depends on the same coordinates only.
                let lane_dim = self.frags[out.index()].lane_dim;
                for (r, coords) in self.frags[out.index()].regs.clone().into_iter().enumerate() {
                    let v = self.eval(value, Some(&Place { coords, lane_dim }))?;
                    let v = match self.k.frags[*out].dtype {
                        d @ (DType::BF16 | DType::F16 | DType::I32 | DType::I8 | DType::U8) => self.cast(v, d)?,
                        _ => v,
                    };
                    self.write_reg(*out, r, v)?;
                }
                Ok(())
            }
            Stmt::Reduce { out, op, src, over, base, bounds, carry } => {
                if out.len() != 1 || base.is_some() {
                    return Err(self.unsupported("an argument selection as one statement"));
                }
                self.reduce(out[0], *op, *src, over, bounds, *carry)
            }
            Stmt::Scan { .. } => Err(self.unsupported("a scan as one statement")),
            Stmt::Load { out, src, bounds } => self.load(*out, src, bounds),
            Stmt::Store { dst, src, bounds, join } => self.store(dst, *src, bounds, *join),
            Stmt::Gather { out, buf, at, bounds } => self.gather(*out, *buf, at, bounds),
            Stmt::Scatter { buf, at, src, bounds, join } => self.scatter(*buf, at, *src, bounds, *join),
            // One unit per task: nothing to wait for.
            Stmt::TaskSync => Ok(()),
            Stmt::Atom { atom, .. } => Err(self.unsupported(&format!("the atom {}", atom.0))),
            Stmt::Copy { .. }
            | Stmt::Arrive { .. }
            | Stmt::Wait { .. }
            | Stmt::NamedSync { .. }
            | Stmt::NamedArrive { .. }
            | Stmt::Fence(_)
            | Stmt::Commit(_)
            | Stmt::WaitGroup { .. }
            | Stmt::Last { .. }
            | Stmt::ClusterSync
            | Stmt::GridSync => Err(self.unsupported("asynchronous statements")),
        }
    }

    /// A loop whose test stands at its end, behind a guard, so that what does not change can be hoisted.
    fn for_loop(&mut self, var: VarId, lo: &Expr, hi: &Expr, step: i64, unroll: bool, body: &[Stmt]) -> Out<()> {
        if let (true, Expr::Int(lo), Expr::Int(hi)) = (unroll, lo, hi) {
            let mut i = *lo;
            while i < *hi {
                self.fixed[var.index()] = Some(i);
                self.stmts(body)?;
                i += step;
            }
            self.fixed[var.index()] = None;
            return Ok(());
        }
        let (lo, hi) = (self.int(lo)?, self.int(hi)?);
        self.set_var(var, &lo);
        let (head, done) = (self.t.label("loop"), self.t.label("done"));
        let c = self.t.def(&format!("icmp slt i64 {lo}, {hi}"));
        self.t.line(&format!("br i1 {c}, label %{head}, label %{done}"));
        self.t.start(&head);
        self.stmts(body)?;
        let v = self.var(var);
        let v = self.t.def(&format!("add nsw i64 {v}, {step}"));
        self.set_var(var, &v);
        let c = self.t.def(&format!("icmp slt i64 {v}, {hi}"));
        self.t.line(&format!("br i1 {c}, label %{head}, label %{done}, !llvm.loop !0"));
        self.t.start(&done);
        Ok(())
    }
}
