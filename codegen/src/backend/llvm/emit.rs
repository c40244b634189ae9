//! Statements: structured control flow, fragments in stack slots that SROA lifts to registers, memory access.
//!
//! Invariant: absent elements are never touched in memory; a load of rows against the lanes becomes contiguous loads
//! and an in-register transpose, and only accesses that are neither contiguous nor transposable use gathers.

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Bound, BufId, Expr, FragId, Kernel, Operand, Stmt, VarId};
use einfall_ir::ops::{BinaryOp, ReduceOp};

use super::expr::Place;
use super::isa::Isa;
use super::value::{Text, Ty, Val, float_text};
use crate::lower::cpu::NotLowered;

mod access;
mod dots;
mod lanes;
mod rounded;
mod tiles;

type Out<T> = Result<T, NotLowered>;

/// A buffer as the function sees it.
pub(super) struct BufFacts {
    pub(super) ptr: String,
    /// Elements per unit of each dimension: SSA names or literals. Where neighbours stand together, those of the last
    /// dimension are so many apart, and along the one before it only multiples of that are steps.
    pub(super) strides: Vec<String>,
    /// Neighbours that stand together ([`einfall_ir::kernel::BufSpace::Scratch`]).
    pub(super) together: u64,
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
    /// Whether it is held in tile registers, as what an atom accumulates into.
    tiled: bool,
    /// The narrower float type that all its values are of.
    rounded: Option<DType>,
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
    /// The fragment that is in tile registers now.
    in_tiles: Option<FragId>,
    /// The type that what is being stored is rounded to already.
    stored: Option<DType>,
}

impl<'a> Emit<'a> {
    pub(super) fn new(k: &'a Kernel, isa: &'a Isa, bufs: Vec<BufFacts>) -> Out<Emit<'a>> {
        let mut t = Text::new(isa.lanes());
        let mut frags = Vec::new();
        let accumulators = tiles::accumulators(k);
        let rounded = rounded::types(k);
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
                DType::F32 | DType::BF16 | DType::F16 | DType::F8E4M3 | DType::F8E5M2 => (Ty::F32, "float"),
                DType::F64 => (Ty::F64, "double"),
                DType::I64 | DType::I32 | DType::I8 | DType::U8 => (Ty::Int, "i64"),
                DType::Bool => (Ty::Bool, "i8"),
                DType::Tf32 | DType::I4 | DType::U4 => return Err(fail(&format!("fragments of type {}", f.dtype))),
            };
            let store = if lane_dim.is_some() { t.vec(elem) } else { elem.to_string() };
            let tiled = accumulators.contains(&id);
            for r in 0..if tiled { 0 } else { regs } {
                t.allocas += &format!("  %f{}.{r} = alloca {store}, align 64\n", id.index());
            }
            let regs = (0..regs).map(|r| f.dist.coords(0, r, 0)).collect();
            frags.push(FragFacts { regs, lane_dim, ty, elem, tiled, rounded: rounded[id.index()] });
        }
        for (id, _) in k.vars.iter() {
            t.allocas += &format!("  %v{} = alloca i64, align 8\n", id.index());
        }
        let fixed = vec![None; k.vars.len()];
        Ok(Emit { t, k, isa, bufs, frags, fixed, shared_writes: false, in_tiles: None, stored: None })
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
        if f.tiled {
            return Err(self.unsupported("elements of tile registers"));
        }
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
        let mut rest = body;
        while let [s, after @ ..] = rest {
            // Atoms that follow each other share the tiles they read.
            let tiled = |s: &Stmt| matches!(s, Stmt::Atom { acc, .. } if self.frags[acc.index()].tiled);
            let atoms = rest.iter().take_while(|s| tiled(s)).count();
            if atoms > 0 {
                self.atoms(&rest[..atoms])?;
                rest = &rest[atoms..];
            } else {
                self.stmt(s)?;
                rest = after;
            }
        }
        Ok(())
    }

    fn stmt(&mut self, s: &Stmt) -> Out<()> {
        match s {
            Stmt::Load { out: frag, src: at, bounds } if self.frags[frag.index()].tiled => {
                self.move_tiles(*frag, at, bounds, true)
            }
            Stmt::Store { dst: at, src: frag, bounds, join: None } if self.frags[frag.index()].tiled => {
                self.move_tiles(*frag, at, bounds, false)
            }
            Stmt::Map { out, value } if self.frags[out.index()].tiled => self.zero_tiles(*out, value),
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
            Stmt::Store { dst, src, bounds, join } => {
                self.stored = self.frags[src.index()].rounded.filter(|_| join.is_none());
                let made = self.store(dst, *src, bounds, *join);
                self.stored = None;
                made
            }
            Stmt::Gather { out, buf, at, bounds } => self.gather(*out, *buf, at, bounds),
            Stmt::Scatter { buf, at, src, bounds, join } => self.scatter(*buf, at, *src, bounds, *join),
            // One unit per task: nothing to wait for.
            Stmt::TaskSync => Ok(()),
            Stmt::Atom { atom, acc, acc_from, a: Operand::Mem(a), b: Operand::Mem(b), keep: Expr::Int(1) }
                if self.is_dot(atom) =>
            {
                self.dots(atom, (*acc, acc_from), a, b)
            }
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
            | Stmt::GridSync
            | Stmt::GridDependency(_) => Err(self.unsupported("asynchronous statements")),
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
