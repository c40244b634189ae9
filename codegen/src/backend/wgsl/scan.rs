//! Running reductions along one dimension of a fragment.
//!
//! The dimension's digits, smallest stride first, are variables, then threads, then variables again: a thread runs over
//! its own elements, adds what threads before it have, and blocks follow one another. Invariant: elements are joined in
//! order; every thread ends with the same carry.

use einfall_ir::kernel::{Bound, FragId};
use einfall_ir::ops::ReduceOp;

use super::Res;
use super::access::Addresses;
use super::emit::Emit;
use super::reduce::{identity, offsets};
use super::value::{Ty, Val};
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
        let Walk { carried, lanes, run, mut rows } = walk;
        rows.sort();
        let zero = identity(op, self.held(src).dtype);
        let ty = zero.ty;
        let mut a;
        let mut results: Vec<Val> = vec![zero.clone(); self.held(src).count()];
        let mut last: Vec<(usize, Val)> = Vec::new();
        for (_, row) in rows {
            let place = |e: &Self, v: usize| e.held(src).consts[v][along] / run;
            let mut running = carried.as_ref().and_then(|(c, at)| at[row[0]].map(|i| self.element(*c, i)));
            let mut from = 0;
            while from < row.len() {
                // Names within a guarded run end where threads meet.
                a = Addresses::default();
                let block = place(self, row[from]);
                let to = row[from..].iter().position(|v| place(self, *v) != block).map_or(row.len(), |n| from + n);
                let mut own: Vec<Val> = Vec::new();
                for &v in &row[from..to] {
                    let x = self.element(src, v);
                    let p = self.present(src, v, bounds, &mut a)?;
                    let mut x = self.to(&self.select(&p, &x, &zero), ty);
                    if let Some(before) = own.last() {
                        x = self.combine(op, before, &x)?;
                    }
                    let name = self.kept(ty);
                    self.line(&format!("{name} = {};", x.s));
                    own.push(Val::new(ty, name));
                }
                let total = own.last().cloned().unwrap_or_else(|| zero.clone());
                let (before, whole) = self.before(op, &lanes, &total, &zero)?;
                let start = match (&running, before) {
                    (Some(r), Some(b)) => Some(self.combine(op, r, &b)?),
                    (Some(r), None) => Some(r.clone()),
                    (None, b) => b,
                };
                for (v, x) in row[from..to].iter().zip(&own) {
                    let x = match &start {
                        Some(s) => self.combine(op, s, x)?,
                        None => x.clone(),
                    };
                    let name = self.kept(ty);
                    self.line(&format!("{name} = {};", x.s));
                    results[*v] = Val::new(ty, name);
                }
                let next = match &running {
                    Some(r) => self.combine(op, r, &whole)?,
                    None => whole,
                };
                let name = self.kept(ty);
                self.line(&format!("{name} = {};", next.s));
                running = Some(Val::new(ty, name));
                from = to;
            }
            if let (Some((_, at)), Some(r)) = (&carried, running)
                && let Some(i) = at[row[0]]
            {
                last.push((i, r));
            }
        }
        for (v, x) in results.iter().enumerate() {
            self.set(out, v, x)?;
        }
        if let Some((c, _)) = carried {
            for v in 0..self.held(c).count() {
                let found = last.iter().find(|l| l.0 == v).map(|l| l.1.clone());
                let x = found.ok_or_else(|| self.fail("a scan whose carry has elements of its own"))?;
                self.set(c, v, &x)?;
            }
        }
        Ok(())
    }

    /// What threads before this one join to (none: there is one only), and what all do.
    fn before(&mut self, op: ReduceOp, lanes: &[ThreadDigit], total: &Val, zero: &Val) -> Res<(Option<Val>, Val)> {
        if lanes.is_empty() {
            return Ok((None, total.clone()));
        }
        let mut digits = lanes.to_vec();
        digits.sort_by_key(|g| g.place);
        if digits != lanes {
            return Err(self.fail("a scan over threads whose numbers do not follow the elements"));
        }
        self.exchanged = self.exchanged.max(1);
        let copy = self.next_copy();
        let at = self.slot(copy, 0, "local");
        let bits =
            if total.ty == Ty::Float { format!("bitcast<u32>({})", total.s) } else { format!("u32({})", total.s) };
        self.line(&format!("{at} = {bits};"));
        self.barrier();
        self.turn = Some(1 - copy);
        let first = self.first_peer(&digits);
        let (before, whole) = (self.kept(total.ty), self.kept(total.ty));
        self.line(&format!("{before} = {};", zero.s));
        let mut sum: Option<Val> = None;
        for offset in offsets(&digits) {
            let peer = if offset == 0 { first.clone() } else { format!("{first} + {offset}") };
            let text = self.slot(copy, 0, &peer);
            let x = if total.ty == Ty::Float { format!("bitcast<f32>({text})") } else { format!("i32({text})") };
            if let Some(s) = &sum {
                self.line(&format!("if ({peer} == local) {{ {before} = {}; }}", s.s));
            }
            let x = Val::new(total.ty, x);
            let next = match &sum {
                None => x,
                Some(s) => self.to(&self.combine(op, s, &x)?, total.ty),
            };
            sum = Some(self.named(&next));
        }
        let sum = sum.unwrap_or_else(|| zero.clone());
        self.line(&format!("{whole} = {};", sum.s));
        let of = |name: String| Val::new(total.ty, name);
        Ok((Some(of(before)), of(whole)))
    }
}
