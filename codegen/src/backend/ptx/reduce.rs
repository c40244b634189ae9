//! Reductions of fragments: in a thread's registers, then between lanes by butterfly shuffles, then between the warps
//! of a unit ([`super::across`]).
//!
//! Sums run in four chains, so that additions overlap and errors stay small. Invariant: every thread that holds an
//! element of the result holds its whole value afterwards, but for sums that [`super::partial`] completes later.

use std::collections::HashMap;

use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Bound, FragId};
use einfall_ir::ops::{BinaryOp, ReduceOp, UnaryOp};

use super::Res;
use super::across::Lanes;
use super::emit::Emit;
use super::frag::{Packing, packing};
use super::scalar::class;
use super::text::{Ty, Val};
use crate::backend::gpu::held::ThreadDigit;
use crate::backend::gpu::reduction::{CHAINS, Reduction, joined};

/// Elements joined by a reduction that is worth finishing before a wait.
const WORTH_FINISHING: usize = 16;

/// The value of an empty reduction of elements of `dtype` in class `ty`.
pub(super) fn identity(op: ReduceOp, ty: Ty, dtype: DType) -> Val {
    match ty {
        Ty::F32 => Val::f32(op.identity()),
        Ty::F64 => Val::f64(op.identity()),
        Ty::Pred | Ty::B16 | Ty::S32 | Ty::S64 => match op {
            ReduceOp::Min => Val { ty, ..Val::int(dtype.max_finite() as i64) },
            ReduceOp::Max => Val { ty, ..Val::int(dtype.min_finite() as i64) },
            _ => Val::int(op.identity() as i64),
        },
    }
}

impl Emit<'_> {
    pub(super) fn reduce(&mut self, r: &Reduction) -> Res<()> {
        let Reduction { op, src, over, bounds, carry, .. } = *r;
        if op.selects_argument() {
            return self.select_argument(r);
        }
        let out = r.out[0];
        let kept = r.kept(self.frags.get(src).dims.len());
        let groups = self.frags.groups(out, src, &kept).map_err(|what| self.fail(&what))?;
        let lanes = self.reduced_lanes(src, over)?;
        let ty = match op {
            ReduceOp::Any | ReduceOp::All => Ty::S32,
            _ => class(self.frags.get(src).dtype),
        };
        let identity = identity(op, ty, self.frags.get(src).dtype);
        // Lanes that keep parts of a running sum add to them.
        let partial = carry && op == ReduceOp::Sum && self.role.partial.holds(out);
        let mut limits = HashMap::new();
        let mut results = Vec::new();
        for (v, members) in groups.iter().enumerate() {
            let mut chains: Vec<Val> = Vec::new();
            if carry && (r.idempotent() || partial) {
                chains.push(self.element(out, v));
            }
            for (n, &m) in members.iter().enumerate() {
                let x = self.element(src, m);
                let p = self.within(src, m, bounds, &mut limits)?;
                let x = match p {
                    Some(p) => self.select(&p, &x, &identity),
                    None => x,
                };
                if chains.len() < CHAINS.min(members.len()) {
                    chains.push(x);
                } else {
                    let n = n % chains.len();
                    chains[n] = self.combine(op, &chains[n].clone(), &x)?;
                }
            }
            let x = joined(chains, |a, b| self.combine(op, a, b))?.unwrap_or_else(|| identity.clone());
            let mut x = self.to(&x, ty);
            for mask in lanes.masks.iter().filter(|_| !partial) {
                let other = self.shuffle(&x, *mask);
                x = self.combine(op, &x, &other)?;
                x = self.to(&x, ty);
            }
            results.push(x);
        }
        if !partial {
            self.join_warps(op, &mut results, &lanes)?;
        }
        if carry && !r.idempotent() && !partial {
            for (v, x) in results.iter_mut().enumerate() {
                let before = self.element(out, v);
                *x = self.combine(op, &before, x)?;
            }
        }
        self.set_elements(out, |_, v| Ok(results[v].clone()))?;
        let many = groups.iter().any(|g| g.len() >= WORTH_FINISHING);
        if many && ty == Ty::F32 && packing(self.frags.get(out).dtype) == Packing::Single(Ty::F32) {
            self.role.joined = Some(out);
        }
        Ok(())
    }

    /// Joins what the unit's warps hold of each result, if several do.
    pub(super) fn join_warps(&mut self, op: ReduceOp, results: &mut [Val], lanes: &Lanes) -> Res<()> {
        if lanes.warps.is_empty() {
            return Ok(());
        }
        let all = self.exchanged(results, &lanes.warps)?;
        for (x, list) in results.iter_mut().zip(all) {
            let ty = x.ty;
            let mut list = list.into_iter();
            let mut sum = list.next().expect("the thread's own warp");
            for y in list {
                sum = self.combine(op, &sum, &y)?;
                sum = self.to(&sum, ty);
            }
            *x = sum;
        }
        Ok(())
    }

    /// The lanes and warps that hold reduced dimensions.
    pub(super) fn reduced_lanes(&mut self, src: FragId, over: &[usize]) -> Res<Lanes> {
        let digits: Vec<ThreadDigit> = over.iter().flat_map(|d| self.frags.get(src).threads[*d].clone()).collect();
        let mut lanes = Lanes::default();
        for g in digits {
            if !g.extent.is_power_of_two() || !g.place.is_power_of_two() {
                return Err(self.fail("a reduction over threads that are no power of two"));
            }
            let end = g.place * g.extent;
            let mut m = g.place;
            while m < end.min(32) {
                lanes.masks.push(m);
                m *= 2;
            }
            if end > 32 {
                let first = g.place.max(32);
                lanes.warps.push((first / 32, end / first));
            }
        }
        lanes.masks.sort_unstable();
        lanes.warps.sort_unstable();
        Ok(lanes)
    }

    /// The value of the lane whose number differs by `mask`.
    pub(super) fn shuffle(&mut self, x: &Val, mask: u64) -> Val {
        self.shuffled("bfly", x, &mask.to_string())
    }

    /// Two partial values joined, the one of earlier elements first.
    pub(super) fn combine(&mut self, op: ReduceOp, a: &Val, b: &Val) -> Res<Val> {
        let join = match op {
            ReduceOp::Sum => BinaryOp::Add,
            ReduceOp::Product => BinaryOp::Mul,
            ReduceOp::Min | ReduceOp::ArgMin => BinaryOp::Min,
            ReduceOp::Max | ReduceOp::ArgMax => BinaryOp::Max,
            ReduceOp::Any => BinaryOp::Or,
            ReduceOp::All => BinaryOp::And,
            ReduceOp::LogSumExp => {
                // m + log(1 + e^−|a−b|); where the larger is ±∞ or NaN, that.
                let m = self.bin(BinaryOp::Max, a, b)?;
                let d = self.bin(BinaryOp::Sub, a, b)?;
                let d = self.unary(UnaryOp::Abs, &d, false)?;
                let d = self.unary(UnaryOp::Neg, &d, false)?;
                let e = self.unary(UnaryOp::Exp, &d, false)?;
                let l = self.unary(UnaryOp::Log1p, &e, false)?;
                let sum = self.bin(BinaryOp::Add, &m, &l)?;
                let size = self.unary(UnaryOp::Abs, &m, false)?;
                let finite = self.bin(BinaryOp::Lt, &size, &Val::f32(f64::INFINITY))?;
                return Ok(self.select(&finite, &sum, &m));
            }
        };
        self.bin(join, a, b)
    }

    /// Whether element `v` counts; none: it does.
    pub(super) fn within(
        &mut self,
        f: FragId,
        v: usize,
        bounds: &[Bound],
        limits: &mut HashMap<(usize, i64), Val>,
    ) -> Res<Option<Val>> {
        let frag = self.frags.get(f);
        let (at, dims) = (frag.consts[v].clone(), frag.dims.clone());
        let mut p = Val::pred(true);
        for (i, b) in bounds.iter().enumerate() {
            let one = match limits.get(&(i, at[b.dim])) {
                Some(one) => one.clone(),
                None => {
                    // The run-time part once, under a key that no coordinate has.
                    let rest = match limits.get(&(i, i64::MIN)) {
                        Some(rest) => rest.clone(),
                        None => {
                            let limit = self.int(&b.limit)?;
                            let t = self.thread_coord(f, b.dim);
                            let rest = self.sub(&limit, &t);
                            limits.insert((i, i64::MIN), rest.clone());
                            rest
                        }
                    };
                    let one = self.bin(BinaryOp::Gt, &rest, &Val::int(at[b.dim]))?;
                    limits.insert((i, at[b.dim]), one.clone());
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
        Ok(if p.int_const() == Some(1) { None } else { Some(p) })
    }

    /// (value, position) of the best element: NaN first, ties to the lowest position.
    fn select_argument(&mut self, r: &Reduction) -> Res<()> {
        let Reduction { op, src, over, base, bounds, carry, .. } = *r;
        let [value, position] = r.out else { return Err(self.fail("an argument selection without two results")) };
        let dtype = self.frags.get(src).dtype;
        if dtype == DType::F64 || !dtype.is_float() {
            return Err(self.fail(&format!("{} of {dtype}", op.name())));
        }
        let dims = self.frags.get(src).dims.clone();
        let kept = r.kept(dims.len());
        let groups = self.frags.groups(*value, src, &kept).map_err(|what| self.fail(&what))?;
        let also = self.frags.groups(*position, src, &kept).map_err(|what| self.fail(&what))?;
        if groups != also {
            return Err(self.fail("an argument selection whose results are held differently"));
        }
        let lanes = self.reduced_lanes(src, over)?;
        let base = match base {
            Some(b) => self.int(b)?,
            None => Val::int(0),
        };
        let mut strides = vec![0i64; dims.len()];
        let mut stride = 1;
        for &d in over.iter().rev() {
            strides[d] = stride;
            stride *= dims[d];
        }
        let start = Val::f32(if op == ReduceOp::ArgMax { f64::NEG_INFINITY } else { f64::INFINITY });
        let mut limits = HashMap::new();
        let (mut values, mut positions) = (Vec::new(), Vec::new());
        for (v, members) in groups.iter().enumerate() {
            let (mut x, mut at) = if carry {
                (self.element(*value, v), self.element(*position, v))
            } else {
                (start.clone(), Val::int(-1))
            };
            if carry {
                x = Val::reg(Ty::F32, self.t.def(Ty::F32, "mov.f32", &[&x.s]));
                at = self.to(&at, Ty::S32);
                at = Val::reg(Ty::S32, self.t.def(Ty::S32, "mov.b32", &[&at.s]));
            }
            for &m in members {
                let y = self.element(src, m);
                let c = self.frags.get(src).consts[m].clone();
                let mut q = base.clone();
                for &d in over {
                    let t = self.thread_coord(src, d);
                    let e = self.add(&t, &Val::int(c[d]));
                    let e = self.mul(&e, &Val::int(strides[d]));
                    q = self.add(&q, &e);
                }
                if let Some(p) = self.within(src, m, bounds, &mut limits)? {
                    q = self.select(&p, &q, &Val::int(-1));
                }
                (x, at) = self.better(op, (&x, &at), (&y, &q))?;
            }
            for mask in &lanes.masks {
                let (y, q) = (self.shuffle(&x, *mask), self.shuffle(&at, *mask));
                (x, at) = self.better(op, (&x, &at), (&y, &q))?;
            }
            values.push(x);
            positions.push(at);
        }
        if !lanes.warps.is_empty() {
            let n = values.len();
            let at = positions.iter().map(|p| self.to(p, Ty::S32)).collect::<Vec<_>>();
            let both: Vec<Val> = values.iter().cloned().chain(at).collect();
            let all = self.exchanged(&both, &lanes.warps)?;
            for v in 0..n {
                let (mut x, mut at) = (all[v][0].clone(), all[n + v][0].clone());
                for (y, q) in all[v].iter().zip(&all[n + v]).skip(1) {
                    (x, at) = self.better(op, (&x, &at), (y, q))?;
                }
                (values[v], positions[v]) = (x, at);
            }
        }
        self.set_elements(*value, |_, v| Ok(values[v].clone()))?;
        self.set_elements(*position, |_, v| Ok(positions[v].clone()))
    }

    /// The better of two candidates; a negative position is none.
    fn better(&mut self, op: ReduceOp, a: (&Val, &Val), b: (&Val, &Val)) -> Res<(Val, Val)> {
        use BinaryOp::{And, Eq, Ge, Gt, Lt, Ne, Or};
        let beats = self.bin(if op == ReduceOp::ArgMin { Lt } else { Gt }, b.0, a.0)?;
        let a_nan = self.bin(Ne, a.0, a.0)?;
        let b_nan = self.bin(Ne, b.0, b.0)?;
        let a_number = self.unary(UnaryOp::Not, &a_nan, false)?;
        let newly = self.bin(And, &b_nan, &a_number)?;
        let same = self.bin(Eq, a.0, b.0)?;
        let both_nan = self.bin(And, &a_nan, &b_nan)?;
        let tie = self.bin(Or, &same, &both_nan)?;
        let lower = self.bin(Lt, b.1, a.1)?;
        let tie = self.bin(And, &tie, &lower)?;
        let mut take = self.bin(Or, &beats, &newly)?;
        take = self.bin(Or, &take, &tie)?;
        let none = self.bin(Lt, a.1, &Val::int(0))?;
        take = self.bin(Or, &take, &none)?;
        let real = self.bin(Ge, b.1, &Val::int(0))?;
        take = self.bin(And, &take, &real)?;
        let x = self.select(&take, b.0, a.0);
        let at = self.select(&take, b.1, a.1);
        Ok((x, at))
    }
}
