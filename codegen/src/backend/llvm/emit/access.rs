//! Loads, stores, gathers and scatters of whole fragments.
//!
//! Invariant: absent elements are never touched in memory; a load of rows against the lanes becomes contiguous loads
//! and an in-register transpose, and only accesses that are neither contiguous nor transposable use gathers.

use super::super::expr::Place;
use super::super::value::{Ty, Val, float_text};
use super::*;
use einfall_ir::arena::Id;
use einfall_ir::kernel::{Bound, BufId, BufSpace, Expr, FragId, View};
use einfall_ir::ops::{BinaryOp, ReduceOp};

/// A register's place in memory.
pub(super) struct Address {
    pub(super) ptr: String,
    /// Elements per lane; 0 for replicated lanes.
    lane_stride: String,
}

impl<'a> Emit<'a> {
    /// The view's origin: pointer, and per fragment dimension its element stride.
    pub(super) fn view_base(&mut self, view: &View) -> Out<(String, Vec<String>)> {
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

    pub(super) fn address(
        &mut self,
        b: BufId,
        base: &str,
        steps: &[String],
        coords: &[u64],
        lane_dim: Option<usize>,
    ) -> Address {
        let mut off = "0".to_string();
        for (c, s) in coords.iter().zip(steps) {
            let p = self.t.mul(s, &c.to_string());
            off = self.t.add(&off, &p);
        }
        let ptr = self.gep(b, base, &off);
        Address { ptr, lane_stride: lane_dim.map_or("0".to_string(), |d| steps[d].clone()) }
    }

    /// Scalar limits of bounds, evaluated once.
    pub(super) fn limits(&mut self, bounds: &[Bound]) -> Out<Vec<(usize, String)>> {
        bounds.iter().map(|b| Ok((b.dim, self.int(&b.limit)?))).collect()
    }

    /// The mask of a register under bounds: (scalar condition, lane mask).
    pub(super) fn mask(
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

    pub(super) fn load(&mut self, out: FragId, view: &View, bounds: &[Bound]) -> Out<()> {
        if self.bufs[view.buf.index()].together > 1 {
            return Err(self.unsupported("a load of elements that stand in pairs"));
        }
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
    pub(super) fn load_transposed(
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

    pub(super) fn store(&mut self, view: &View, src: FragId, bounds: &[Bound], join: Option<ReduceOp>) -> Out<()> {
        if self.frags[src.index()].tiled {
            return Err(self.unsupported("elements of tile registers"));
        }
        if self.bufs[view.buf.index()].together > 1 {
            return match (bounds, join) {
                ([], None) => self.store_pairs(view, src),
                _ => Err(self.unsupported("a store of part of what stands in pairs")),
            };
        }
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

    pub(super) fn is_global(&self, b: BufId) -> bool {
        matches!(self.k.bufs[b].space, BufSpace::Global { .. })
    }

    /// Coordinates of gathers: the flat offset over lanes and the mask of those in range.
    pub(super) fn gathered(
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

    pub(super) fn gather(&mut self, out: FragId, buf: BufId, at: &[Expr], bounds: &[Bound]) -> Out<()> {
        if self.bufs[buf.index()].together > 1 {
            return Err(self.unsupported("a load of elements that stand in pairs"));
        }
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

    pub(super) fn scatter(
        &mut self,
        buf: BufId,
        at: &[Expr],
        src: FragId,
        bounds: &[Bound],
        join: Option<ReduceOp>,
    ) -> Out<()> {
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
    pub(super) fn scatter_joined(
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
}
