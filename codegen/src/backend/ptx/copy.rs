//! Tile copies: TMA by one thread through a tensor map; cp.async by every thread of the unit is in `thread_copy`.
//!
//! A tensor map is shared by all copies of the same array with the same box. Invariant: a box is what
//! [`TmaBox`] says, in shared memory and in the map. Source: PTX ISA, "cp.async.bulk.tensor".

use einfall_ir::arena::Id;
use einfall_ir::artifact::TensorMap;
use einfall_ir::kernel::copies::TmaBox;
use einfall_ir::kernel::{BarrierId, BufSpace, Engine, Expr, FenceKind, Kernel, Stmt, View, walk};
use einfall_ir::tile::BufferId;

use super::Res;
use super::emit::Emit;
use super::text::{Ty, Val};

/// Tensor maps of the kernel, in the order of its parameters.
#[derive(Default)]
pub(super) struct Maps {
    pub(super) all: Vec<TensorMap>,
}

impl Maps {
    fn index(&mut self, m: TensorMap) -> usize {
        match self.all.iter().position(|x| *x == m) {
            Some(i) => i,
            None => {
                self.all.push(m);
                self.all.len() - 1
            }
        }
    }
}

/// Whether arrays that bulk copies write are read, or published to other tasks, in the same kernel.
pub(super) fn rereads(k: &Kernel) -> bool {
    let t = Traffic::of(k);
    t.published || t.copied.iter().any(|s| t.read.contains(s))
}

/// Whether any array is both written and read.
pub(super) fn exchanges(k: &Kernel) -> bool {
    let t = Traffic::of(k);
    t.published || t.copied.iter().chain(&t.stored).any(|s| t.read.contains(s))
}

/// Arrays by how statements access them.
#[derive(Default)]
struct Traffic {
    /// Written by TMA.
    copied: Vec<usize>,
    /// Written by threads.
    stored: Vec<usize>,
    read: Vec<usize>,
    /// Whether the grid synchronises on what was written.
    published: bool,
}

impl Traffic {
    fn of(k: &Kernel) -> Traffic {
        let param = |b| match &k.bufs[b].space {
            BufSpace::Global { param, .. } => Some(*param),
            BufSpace::Shared { .. } | BufSpace::Scratch { .. } => None,
        };
        let mut t = Traffic::default();
        for r in &k.roles {
            walk(&r.body, &mut |s| match s {
                Stmt::Copy { src, dst, .. } => {
                    t.copied.extend(param(dst.buf));
                    t.read.extend(param(src.buf));
                }
                Stmt::Load { src, .. } => t.read.extend(param(src.buf)),
                Stmt::Gather { buf, .. } => t.read.extend(param(*buf)),
                Stmt::Store { dst, .. } => t.stored.extend(param(dst.buf)),
                Stmt::Scatter { buf, .. } => t.stored.extend(param(*buf)),
                Stmt::GridSync | Stmt::Fence(FenceKind::Gpu) => t.published = true,
                _ => {}
            });
        }
        t
    }
}

impl Emit<'_> {
    pub(super) fn copy(
        &mut self,
        engine: Engine,
        src: &View,
        dst: &View,
        extents: &[u64],
        signal: Option<&(BarrierId, Expr)>,
        multicast: Option<u64>,
    ) -> Res<()> {
        match engine {
            Engine::Tma => self.tensor_copy(src, dst, extents, signal, multicast),
            Engine::CpAsync => self.thread_copy(src, dst, extents, signal.is_some()),
        }
    }

    fn tensor_copy(
        &mut self,
        src: &View,
        dst: &View,
        extents: &[u64],
        signal: Option<&(BarrierId, Expr)>,
        multicast: Option<u64>,
    ) -> Res<()> {
        let k = self.k;
        if !self.target.hopper() {
            return Err(self.fail("TMA before sm_90"));
        }
        let loads = matches!(k.bufs[dst.buf].space, BufSpace::Shared { .. });
        let (shared, global) = if loads { (dst, src) } else { (src, dst) };
        let BufSpace::Shared { layout, .. } = &k.bufs[shared.buf].space else {
            return Err(self.fail("a tensor copy without shared memory"));
        };
        let BufSpace::Global { param, .. } = &k.bufs[global.buf].space else {
            return Err(self.fail("a tensor copy between shared memories"));
        };
        let array = &k.bufs[global.buf];
        let b = TmaBox::of(extents, shared, layout, array.dtype.bytes(1)).map_err(|e| self.fail(&e))?;
        // The array's dimensions in the box's order, then the ones the box does not walk.
        let mut dims = Vec::new();
        for &d in &b.order {
            match global.walk[d] {
                Some((dim, 1)) if !dims.contains(&dim) => dims.push(dim),
                _ => return Err(self.fail("a tensor copy that walks a dimension twice or by steps")),
            }
        }
        let mut box_extents: Vec<u32> = b.order.iter().map(|d| extents[*d] as u32).collect();
        for d in (0..array.dims.len()).rev() {
            if !dims.contains(&d) {
                dims.push(d);
                box_extents.push(1);
            }
        }
        if dims.len() > 5 {
            return Err(self.fail("a tensor map of more than 5 dimensions"));
        }
        let swizzle_bytes = b.swizzle.map_or(0, |s| s.span_bytes()) as u32;
        let map = TensorMap { buffer: BufferId::new(*param), dims: dims.clone(), extents: box_extents, swizzle_bytes };
        let map = self.maps.index(map);
        let mut coords = Vec::new();
        for d in &dims {
            let c = self.int(&global.at[*d])?;
            coords.push(self.in_reg(&c));
        }
        let coords = coords.join(", ");
        let at = self.shared_origin(shared)?;
        let rank = dims.len();
        let leader = self.leader();
        // The address of a parameter is a constant: no register holds it between copies.
        let generic = self.t.def(Ty::S64, "mov.b64", &[&format!("map{map}")]);
        let map = self.t.def(Ty::S64, "cvta.param.u64", &[&generic]);
        if loads {
            let Some((barrier, stage)) = signal else { return Err(self.fail("a tensor load without a barrier")) };
            let (bar, offset) = self.barrier_address(*barrier, stage)?;
            let (kind, mask) = match multicast {
                None => ("", String::new()),
                Some(m) => {
                    let mask = self.t.def(Ty::B16, "mov.b16", &[&m.to_string()]);
                    (".multicast::cluster", format!(", {mask}"))
                }
            };
            self.t.line(&format!(
                "{leader}cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes{kind} \
                 [{at}], [{map}, {{{coords}}}], [{bar}+{offset}]{mask}"
            ));
        } else {
            self.t.line(&format!(
                "{leader}cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [{map}, {{{coords}}}], [{at}]"
            ));
        }
        Ok(())
    }

    /// The address of a window's origin in shared memory.
    pub(super) fn shared_origin(&mut self, v: &View) -> Res<String> {
        let (dynamic, constant) = self.shared_linear(v)?;
        let s = self.add(&dynamic, &Val::reg(Ty::S32, "%smem".to_string()));
        Ok(format!("{}+{constant}", s.s))
    }

    /// Byte of a window's origin before swizzling, from the start of shared memory: a run-time part and a constant.
    pub(super) fn shared_linear(&mut self, v: &View) -> Res<(Val, i64)> {
        let k = self.k;
        let b = &k.bufs[v.buf];
        let BufSpace::Shared { layout, .. } = &b.space else { return Err(self.fail("shared memory that is not")) };
        let esize = b.dtype.bytes(1) as i64;
        let mut constant = self.shared.bufs[v.buf.index()] as i64;
        let mut sum = Val::int(0);
        if let Some(stage) = &v.stage {
            let s = self.int(stage)?;
            let bytes = layout.stage_bytes(esize as u64) as i64;
            let m = self.mul(&s, &Val::int(bytes));
            sum = self.add(&sum, &m);
        }
        for (d, at) in v.at.iter().enumerate() {
            let c = self.int(at)?;
            let o = self.digits_offset(&layout.dims[d], &c)?;
            let o = self.mul(&o, &Val::int(esize));
            sum = self.add(&sum, &o);
        }
        if let Some(c) = sum.int_const() {
            constant += c;
            sum = Val::int(0);
        }
        Ok((sum, constant))
    }

    /// Offset of coordinate `c` of a dimension with these digits.
    pub(super) fn digits_offset(&mut self, digits: &[einfall_ir::layout::Digit], c: &Val) -> Res<Val> {
        use einfall_ir::ops::BinaryOp::{Div, Mod};
        let mut rest = c.clone();
        let mut sum = Val::int(0);
        for (i, g) in digits.iter().enumerate() {
            let extent = Val::int(g.extent as i64);
            let value = if i + 1 == digits.len() {
                rest.clone()
            } else {
                let v = self.bin(Mod, &rest, &extent)?;
                rest = self.bin(Div, &rest, &extent)?;
                v
            };
            let o = self.mul(&value, &Val::int(g.stride as i64));
            sum = self.add(&sum, &o);
        }
        Ok(sum)
    }
}
