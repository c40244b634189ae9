//! Running reductions along one dimension of a fragment.
//!
//! The dimension's digits, smallest stride first, are registers, then lanes, then registers again: a thread runs over
//! its own elements, lanes add what comes before them (Hillis and Steele), and blocks follow one another.
//! Invariant: elements are joined in order; every lane ends with the same carry.

use std::collections::HashMap;

use einfall_ir::kernel::{Bound, FragId};
use einfall_ir::ops::{BinaryOp, ReduceOp};

use super::Res;
use super::emit::Emit;
use super::reduce::identity;
use super::scalar::class;
use super::text::{Ty, Val};
use crate::backend::gpu::held::{ThreadDigit, Walk};

impl Emit<'_> {
    pub(super) fn scan(
        &mut self,
        out: FragId,
        op: ReduceOp,
        src: FragId,
        along: usize,
        carry: Option<FragId>,
        bounds: &[Bound],
    ) -> Res<()> {
        let walk = self.frags.walk(op, out, src, along, carry).map_err(|what| self.fail(&what))?;
        let Walk { carried, lanes, run, rows } = walk;
        if lanes.iter().any(|g| !g.extent.is_power_of_two() || g.place * g.extent > 32) {
            return Err(self.fail("a scan across warps"));
        }
        let ty = class(self.frags.get(src).dtype);
        let zero = identity(op, ty, self.frags.get(src).dtype);
        let count = self.frags.get(src).count();
        let mut results: Vec<Val> = vec![zero.clone(); count];
        let mut last: Vec<(usize, Val)> = Vec::new();
        let mut limits = HashMap::new();
        for (_, row) in rows {
            let at = |e: &Self, v: usize| e.frags.get(src).consts[v][along];
            let mut running = carried.as_ref().and_then(|(c, at)| at[row[0]].map(|i| self.element(*c, i)));
            let mut from = 0;
            while from < row.len() {
                let block = at(self, row[from]) / run;
                let to = row[from..].iter().position(|v| at(self, *v) / run != block).map_or(row.len(), |n| from + n);
                let mut own: Vec<Val> = Vec::new();
                for &v in &row[from..to] {
                    let mut x = self.element(src, v);
                    if let Some(p) = self.within(src, v, bounds, &mut limits)? {
                        x = self.select(&p, &x, &zero);
                    }
                    let x = match own.last() {
                        Some(before) => self.combine(op, &before.clone(), &x)?,
                        None => x,
                    };
                    own.push(self.to(&x, ty));
                }
                let total = own.last().cloned().unwrap_or_else(|| zero.clone());
                let (before, whole) = self.across_lanes(op, &lanes, &total, &zero)?;
                let start = match (running.as_ref(), before) {
                    (Some(r), Some(b)) => Some(self.combine(op, r, &b)?),
                    (Some(r), None) => Some(r.clone()),
                    (None, b) => b,
                };
                for (v, x) in row[from..to].iter().zip(&own) {
                    let x = match &start {
                        Some(s) => self.combine(op, s, x)?,
                        None => x.clone(),
                    };
                    results[*v] = self.to(&x, ty);
                }
                running = Some(match running {
                    Some(r) => self.combine(op, &r, &whole)?,
                    None => whole,
                });
                from = to;
            }
            if let (Some((_, at)), Some(r)) = (&carried, running)
                && let Some(i) = at[row[0]]
            {
                last.push((i, r));
            }
        }
        self.set_elements(out, |_, v| Ok(results[v].clone()))?;
        if let Some((c, _)) = carried {
            self.set_elements(c, |e, v| {
                let found = last.iter().find(|l| l.0 == v).map(|l| l.1.clone());
                found.ok_or_else(|| e.fail("a scan whose carry has elements of its own"))
            })?;
        }
        Ok(())
    }

    /// What lanes before this one join to (none: there is one lane only), and what all do.
    fn across_lanes(
        &mut self,
        op: ReduceOp,
        lanes: &[ThreadDigit],
        total: &Val,
        zero: &Val,
    ) -> Res<(Option<Val>, Val)> {
        let mut inclusive = total.clone();
        let mut before: Option<Val> = None;
        for g in lanes {
            let thread = self.role.thread.clone();
            let q = self.bin(BinaryOp::Div, &thread, &Val::int(g.place as i64))?;
            let digit = self.bin(BinaryOp::Mod, &q, &Val::int(g.extent as i64))?;
            // This digit's lanes, in order; lower digits' lanes hold the same total after their own round.
            let mut scanned = inclusive.clone();
            let mut step = 1;
            while step < g.extent {
                let other = self.shuffled("up", &scanned, &(step * g.place).to_string());
                let joined = self.combine(op, &other, &scanned)?;
                let p = self.bin(BinaryOp::Ge, &digit, &Val::int(step as i64))?;
                scanned = self.select(&p, &joined, &scanned);
                step *= 2;
            }
            let previous = self.shuffled("up", &scanned, &g.place.to_string());
            let first = self.bin(BinaryOp::Eq, &digit, &Val::int(0))?;
            let previous = self.select(&first, zero, &previous);
            before = Some(match before {
                Some(b) => self.combine(op, &previous, &b)?,
                None => previous,
            });
            // The last lane of the digit has the sum over all of it.
            let up = self.sub(&Val::int(g.extent as i64 - 1), &digit);
            let up = self.mul(&up, &Val::int(g.place as i64));
            let lane = self.add(&up, &Val::ranged("%lane".to_string(), 0, 31));
            let lane = self.in_reg(&lane);
            inclusive = self.shuffled("idx", &scanned, &lane);
        }
        Ok((before, inclusive))
    }

    /// `shfl.sync` of any class.
    pub(super) fn shuffled(&mut self, mode: &str, x: &Val, by: &str) -> Val {
        let clamp = if mode == "up" { "0" } else { "31" };
        let op = format!("shfl.sync.{mode}.b32");
        let args = |r: &str| [r.to_string(), by.to_string(), clamp.to_string(), "0xFFFFFFFF".to_string()];
        let word = |e: &mut Self, ty: Ty, r: &str| {
            let a = args(r);
            e.t.def(ty, &op, &[&a[0], &a[1], &a[2], &a[3]])
        };
        match x.ty {
            Ty::F32 => {
                let r = self.in_reg(x);
                Val::reg(Ty::F32, word(self, Ty::F32, &r))
            }
            Ty::S64 | Ty::F64 => {
                let r = self.in_reg(x);
                let (lo, hi) = (self.t.reg(Ty::S32), self.t.reg(Ty::S32));
                self.t.line(&format!("mov.b64 {{{lo}, {hi}}}, {r}"));
                let (lo, hi) = (word(self, Ty::S32, &lo), word(self, Ty::S32, &hi));
                let d = self.t.reg(x.ty);
                self.t.line(&format!("mov.b64 {d}, {{{lo}, {hi}}}"));
                Val::reg(x.ty, d)
            }
            Ty::S32 | Ty::Pred | Ty::B16 => {
                let x = self.to(x, Ty::S32);
                let r = self.in_reg(&x);
                Val { lo: x.lo, hi: x.hi, ..Val::reg(Ty::S32, word(self, Ty::S32, &r)) }
            }
        }
    }
}
