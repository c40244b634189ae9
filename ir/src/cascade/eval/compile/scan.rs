//! Running reductions: each is taken out into a prelude that fills a tensor in one sweep.
//!
//! Invariant: a point outside the support repeats the running value.

use std::collections::BTreeSet;

use super::super::domain::Ty;
use super::super::program::Reg;
use super::super::program::{Ins, Place, Prelude, Result1, Running, TargetTensor};
use super::reduce::reduced_type;
use super::{Affine, Compiler, Done, unsupported};
use crate::arena::Id;
use crate::array::strides;
use crate::cascade::{Expr, ExprId, IndexId, IndexKind, Reducer, TensorId};
use crate::dtype::DType;

impl Compiler<'_> {
    /// Takes a running reduction out into a prelude and reads its result.
    pub(super) fn scan(&mut self, e: ExprId, op: Reducer, over: IndexId, body: ExprId) -> Done<Vec<(Reg, Ty)>> {
        let c = self.cx.c;
        let mut rows: BTreeSet<IndexId> = c.free_indices(body).into_iter().collect();
        for x in self.conjuncts.iter().filter(|x| x.indices.contains(&over)) {
            rows.extend(x.indices.iter().copied());
        }
        rows.retain(|i| *i != over && Some(*i) != self.cx.iterated);
        let mut k = Compiler::new(self.cx, c.spans[e.index()], self.hidden);
        k.conjuncts = self.conjuncts.clone();
        for i in rows.iter().chain([&over]) {
            k.open_free(*i)?;
        }
        let absent = k.label();
        k.absent = absent;
        // Only conjuncts that mention the running index restrict what is accumulated.
        let tests: Vec<usize> = (0..k.conjuncts.len())
            .filter(|n| {
                let x = &k.conjuncts[*n].indices;
                x.contains(&over) && x.iter().all(|i| k.open.iter().any(|(o, _)| o == i))
            })
            .collect();
        k.test(&tests)?;
        let items = if let Expr::Tuple(items) = &c.exprs[body] { items.clone() } else { vec![body] };
        let values = items.iter().map(|x| k.expr(*x)).collect::<Done<Vec<_>>>()?;
        let mut running = Running { reset: Vec::new(), acc: None, regs: Vec::new() };
        match op {
            Reducer::Op(op) if op.selects_argument() => {
                let (acc, dst) = (k.acc(), k.regs(1));
                let place = k.p.places.len() as u32;
                k.p.places.push(vec![(k.slots[&over], 1)]);
                k.emit(Ins::Add { acc, op, a: values[0].0, place });
                k.emit(Ins::Total { acc, op, ty: Ty::Int, dst });
                running.acc = Some((acc, op));
                running.reset.push((dst, op.identity()));
                running.regs.push((dst, Ty::Int));
            }
            Reducer::Op(op) => {
                let (dst, ty) = (k.regs(1), reduced_type(op, values[0].1));
                k.emit(Ins::Combine { op, ty, dst, a: dst, b: values[0].0 });
                running.reset.push((dst, op.identity()));
                running.regs.push((dst, ty));
            }
            Reducer::User(m) => {
                let identity = c.monoids[m].identity.clone();
                let base = k.regs(identity.len() as u32);
                let state: Vec<Reg> = (0..identity.len() as u32).map(|i| base + i).collect();
                k.monoid_join(e, m, &state, &values)?;
                running.reset.extend(state.iter().copied().zip(identity));
                running.regs.extend(state.iter().copied().zip(values.iter().map(|v| v.1)));
            }
            Reducer::TopK { .. } => {
                return unsupported(c, e, "a running top-k is not defined; use a filter on a reduction instead");
            }
        }
        k.place(absent);
        k.emit(Ins::Present { variant: 0 });
        let mut form = Affine::default();
        let indices: Vec<IndexId> = rows.iter().copied().chain([over]).collect();
        let dims = indices.iter().map(|i| k.extent(*i)).collect::<Done<Vec<u64>>>()?;
        for (i, s) in indices.iter().zip(strides(&dims)) {
            form.terms.push((*i, s));
        }
        let cursor = k.cursor(&form);
        let results = running.regs.clone();
        let first = *k.hidden;
        let ending =
            results.iter().map(|(reg, ty)| Result1 { reg: *reg, count: 1, ty: *ty, place: Place::Cursor(cursor) });
        k.p.endings.push(ending.collect());
        for (n, (_, ty)) in results.iter().enumerate() {
            let dtype = match ty {
                Ty::Int => DType::I64,
                Ty::F32 => DType::F32,
                Ty::F64 => DType::F64,
            };
            k.p.targets.push(TargetTensor { tensor: first + n as u32, dtype, block: None, in_place: false });
        }
        *k.hidden += results.len() as u32;
        k.p.running = Some(running);
        for (mine, theirs) in self.conjuncts.iter_mut().zip(&k.conjuncts) {
            mine.applied |= theirs.applied && theirs.indices.iter().any(|i| c.indices[*i].kind == IndexKind::Reduced);
        }
        let program = k.seal();
        self.p.work = self.p.work.max(program.work);
        for t in &program.reads {
            self.reads(TensorId::new(*t as usize));
        }
        self.p.preludes.push(Prelude { program, dims });
        let mut regs = Vec::new();
        for (n, (_, ty)) in results.iter().enumerate() {
            let (cursor, dst) = (self.cursor(&form), self.regs(1));
            self.emit(Ins::Load { dst, tensor: first + n as u32, cursor });
            regs.push((dst, *ty));
        }
        Ok(regs)
    }
}
