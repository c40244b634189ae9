//! Contraction instructions: wgmma with operands in shared memory (matrix descriptors) or registers, and mma.sync.
//!
//! The low half of a descriptor is the address and LBO, the high half is constant. Accumulators and register operands
//! are the fragments' own registers. Source: PTX ISA, "wgmma.mma_async", "matrix descriptor", "mma.m16n8k16".

use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms::{self, Atom, Descriptor};
use einfall_ir::kernel::{AtomName, BufSpace, Expr, FragId, Operand, Scope, View};
use einfall_ir::ops::BinaryOp;

use super::Res;
use super::address::fixed_offset;
use super::emit::Emit;
use super::frag::{Packing, packing};
use super::text::{Ty, Val};

/// A type in an instruction's name.
fn type_name(d: DType) -> &'static str {
    match d {
        DType::F8E4M3 => "e4m3",
        DType::F8E5M2 => "e5m2",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        DType::Tf32 => "tf32",
        DType::F32 => "f32",
        DType::F64 => "f64",
        DType::I64 => "s64",
        DType::I32 => "s32",
        DType::I8 => "s8",
        DType::U8 => "u8",
        DType::I4 => "s4",
        DType::U4 => "u4",
        DType::Bool => "b1",
    }
}

impl Emit<'_> {
    #[allow(clippy::too_many_arguments)]
    pub(super) fn atom(
        &mut self,
        name: &AtomName,
        acc: FragId,
        acc_from: &[u64],
        a: &Operand,
        b: &Operand,
        keep: &Expr,
    ) -> Res<()> {
        let Some(atom) = atoms::find(name) else { return Err(self.fail(&format!("the atom `{}`", name.0))) };
        if atom.threads_alone() {
            return Err(self.fail("atoms that are multiply-adds of each thread"));
        }
        let [m, n, k] = atom.shape;
        let mut d = self.window(acc, acc_from, [m, n])?;
        if !atom.asynchronous {
            return self.mma(&atom, &d, a, b, keep);
        }
        if !self.target.hopper() || self.role.scope != Scope::Warpgroup {
            return Err(self.fail("wgmma outside a warpgroup of sm_90a"));
        }
        let transposes = atom.operand.bits() == 16;
        // Of 32 rows every thread has those of the instruction's lower rows; the upper ones multiply zeros.
        let half = m == 32;
        if half {
            let upper = self.upper_rows(acc, &d, Ty::F32);
            d = d.chunks(2).zip(upper.chunks(2)).flat_map(|(low, high)| [low, high].concat()).collect();
        }
        let (a, ta) = match a {
            Operand::Frag { frag, from } => {
                let mut registers = self.window(*frag, from, [m, k])?;
                if half {
                    let zeros = self.upper_rows(*frag, &registers, Ty::S32);
                    registers = registers.into_iter().zip(zeros).flat_map(|(r, zero)| [r, zero]).collect();
                }
                (format!("{{{}}}", registers.join(", ")), None)
            }
            Operand::Mem(v) => {
                let (r, t) = self.descriptor(v, 0, m, k)?;
                (r, Some(t))
            }
        };
        let Operand::Mem(v) = b else { return Err(self.fail("wgmma with b in registers")) };
        let (b, tb) = self.descriptor(v, 1, n, k)?;
        let keep = self.uniform(keep)?;
        let keep = self.to(&keep, Ty::Pred);
        let keep = self.in_reg(&keep);
        self.wgmma_fence();
        let t = type_name(atom.operand);
        let mut tail = "1, 1".to_string();
        if transposes {
            for x in ta.into_iter().chain([tb]) {
                tail += if x { ", 1" } else { ", 0" };
            }
        } else if ta.unwrap_or(false) || tb {
            return Err(self.fail("wgmma operands contiguous along m or n of a type that is not 16 bits wide"));
        }
        self.t.line(&format!(
            "wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{t}.{t} {{{}}}, {a}, {b}, {keep}, {tail}",
            d.join(", ")
        ));
        Ok(())
    }

    /// Registers of rows that are always 0, one for each of a fragment's registers `lower`.
    fn upper_rows(&mut self, f: FragId, lower: &[String], ty: Ty) -> Vec<String> {
        let key = (f, lower.first().cloned().unwrap_or_default());
        if let Some(known) = self.role.upper_rows.get(&key) {
            return known.clone();
        }
        let made: Vec<String> = lower.iter().map(|_| self.t.reg(ty)).collect();
        // Before the role's body, so that no register changes between instructions.
        self.hoisted(|e| made.iter().for_each(|r| e.t.line(&format!("mov.b32 {r}, 0"))));
        self.role.upper_rows.insert(key, made.clone());
        made
    }

    /// Registers that hold a window of a fragment, in order.
    fn window(&mut self, f: FragId, from: &[u64], shape: [u64; 2]) -> Res<Vec<String>> {
        let frag = self.frags.get(f);
        let inside = |c: &Vec<i64>| (0..2).all(|d| c[d] >= from[d] as i64 && c[d] < (from[d] + shape[d]) as i64);
        let held: Vec<usize> = (0..frag.count()).filter(|v| inside(&frag.consts[*v])).collect();
        let per = match packing(frag.dtype) {
            Packing::Single(_) => 1,
            Packing::Pair => 2,
            Packing::Quad => 4,
        };
        let whole = held.len().is_multiple_of(per)
            && held.chunks(per).all(|c| c[0].is_multiple_of(per) && c.iter().enumerate().all(|(i, v)| *v == c[0] + i));
        if !whole {
            return Err(self.fail(&format!("a window of `{}` whose packed elements are not its own", frag.name)));
        }
        Ok(held.chunks(per).map(|c| frag.register(c[0])).collect())
    }

    /// The matrix descriptor of an operand (dimension `mn` of the window is m or n), and whether it is transposed.
    fn descriptor(&mut self, v: &View, mn: usize, mn_extent: u64, k_extent: u64) -> Res<(String, bool)> {
        let k = self.k;
        let b = &k.bufs[v.buf];
        let (BufSpace::Shared { layout, .. }, Some(Some((mn_dim, 1))), Some(Some((k_dim, 1)))) =
            (&b.space, v.walk.get(mn), v.walk.get(1 - mn))
        else {
            return Err(self.fail("an operand that is no window of shared memory"));
        };
        let d = Descriptor::of(layout, b.dtype.bytes(1), *mn_dim, *k_dim, mn_extent, k_extent)
            .map_err(|e| self.fail(&e))?;
        let mode: u64 = match d.swizzle.map(|s| s.span_bytes()) {
            None => 0,
            Some(128) => 1,
            Some(64) => 2,
            Some(_) => 3,
        };
        let high = d.sbo >> 4 | mode << 30;
        let (run_time, bytes) = self.split(v);
        let (base, constant) = self.descriptor_base(&run_time)?;
        let constant = constant + bytes;
        let low = self.t.def(Ty::S32, "add.s32", &[&base, &((constant >> 4) as u64 + (d.lbo >> 4 << 16)).to_string()]);
        let r = self.t.reg(Ty::S64);
        self.t.line(&format!("mov.b64 {r}, {{{low}, {high}}}"));
        Ok((r, d.mn_major))
    }

    /// The window's run-time part and the constant bytes after it, where they add without carries between digits.
    fn split(&self, v: &View) -> (View, i64) {
        let b = &self.k.bufs[v.buf];
        let mut part = v.clone();
        let mut bytes = 0;
        let BufSpace::Shared { layout, .. } = &b.space else { return (part, 0) };
        for (at, digits) in part.at.iter_mut().zip(&layout.dims) {
            let (rest, c) = match &*at {
                Expr::Int(c) => (Expr::Int(0), *c),
                Expr::Binary(BinaryOp::Add, x, c) if digits.len() == 1 && matches!(**c, Expr::Int(_)) => {
                    let Expr::Int(c) = **c else { continue };
                    ((**x).clone(), c)
                }
                _ => continue,
            };
            bytes += fixed_offset(digits, c) * b.dtype.bytes(1) as i64;
            *at = rest;
        }
        (part, bytes)
    }

    /// The address field of a window's run-time part, and constant bytes to add: one register for all k-steps.
    fn descriptor_base(&mut self, v: &View) -> Res<(String, i64)> {
        if let Some((_, base, constant)) = self.role.descriptors.iter().find(|(known, _, _)| known == v) {
            return Ok((base.clone(), *constant));
        }
        let (dynamic, constant) = self.shared_linear(v)?;
        // Everything but the buffer's own offset is added after the shift, so that k-steps share one address.
        // In a cluster the address space's base holds the task's rank above bit 24, which the descriptor has no room for.
        let base = self.add(&dynamic, &Val::reg(Ty::S32, "%smem_window".to_string()));
        let shifted = self.t.def(Ty::S32, "shr.u32", &[&base.s, "4"]);
        self.role.descriptors.push((v.clone(), shifted.clone(), constant));
        Ok((shifted, constant))
    }

    fn mma(&mut self, atom: &Atom, d: &[String], a: &Operand, b: &Operand, keep: &Expr) -> Res<()> {
        let [m, n, k] = atom.shape;
        let (Operand::Frag { frag: a, from: a_from }, Operand::Frag { frag: b, from: b_from }) = (a, b) else {
            return Err(self.fail("mma.sync with an operand in memory"));
        };
        let (a, b) = (self.window(*a, a_from, [m, k])?, self.window(*b, b_from, [k, n])?);
        let keep = self.uniform(keep)?;
        let keep = self.to(&keep, Ty::Pred);
        let c: Vec<String> = match keep.int_const() {
            Some(0) => d.iter().map(|_| Val::f32(0.0).s).collect(),
            Some(_) => d.to_vec(),
            None => d.iter().map(|x| self.t.def(Ty::F32, "selp.f32", &[x, &Val::f32(0.0).s, &keep.s])).collect(),
        };
        let t = type_name(atom.operand);
        self.t.line(&format!(
            "mma.sync.aligned.m{m}n{n}k{k}.row.col.f32.{t}.{t}.f32 {{{}}}, {{{}}}, {{{}}}, {{{}}}",
            d.join(", "),
            a.join(", "),
            b.join(", "),
            c.join(", ")
        ));
        Ok(())
    }
}
