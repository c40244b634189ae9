//! One piece of code for all masked trips of a stream.
//!
//! ```text
//! peeled trip: s(0)                                   if 0 < trips {
//! for masked before { s(i); o(i−1) }                    for pass in 0..2 {
//! for full          { s(i); o(i−1) without masks }  →      for masked of this pass { s(i); if i ≥ 1 { o(i−1) } }
//! for masked after  { s(i); o(i−1) }                       for full, in the first pass { s(i); o(i−1) without masks }
//! o(last)                                               }
//!                                                       o(last) }
//! ```
//! Masks are needed in few trips, and the first trip of a pipeline differs from the others in what it leaves out. What
//! runs behind is left out of the first trip by a condition, so that the first trip, the masked ones before the full ones
//! and those after are the same code; the driver's assembler takes as much less time. In the conditional part older
//! groups are awaited, on both ways, so that what is under way afterwards is the same but for the conditional groups.
//! Units take no turns in the first trip.
//! Invariant: the loop without masks is what it is without this; where its trips do not begin with the same work in
//! flight, the stream keeps its peeled trip.

use einfall_ir::kernel::{Expr, Stmt};
use einfall_ir::ops::BinaryOp;

use super::super::Step;
use super::super::emit::Emit;
use super::super::exprs::{max, min, var};
use super::{Flow, Plan, advance};

impl Emit<'_, '_> {
    /// The whole stream with its masked trips in one place; none if it has none, or trips do not leave the same groups
    /// open.
    pub(super) fn shared_trips(&mut self, p: &Plan, entry: &Flow) -> Step<Option<(Vec<Stmt>, bool)>> {
        let f = self.f;
        let by_threads = f.channels.iter().any(|c| c.by_threads());
        let Some((from, to)) = p.full.filter(|_| p.skew == 1 && (p.masked_before || p.masked_after)) else {
            return Ok(None);
        };
        // A turn begins with the work of every trip and ends with what runs behind.
        let (mut begin, mut end) = (None, None);
        for i in &p.ops {
            begin = begin.or(self.turns_at(p, *i, false).map(|_| self.skews[*i]));
            end = end.or(self.turns_at(p, *i, true).map(|_| self.skews[*i]));
        }
        if by_threads || begin.is_some_and(|s| s > 0) || end == Some(0) {
            return Ok(None);
        }
        let mut steady = entry.clone();
        let (mut masked, mut full);
        loop {
            (masked, full) = (Vec::new(), Vec::new());
            let mut after = steady.clone();
            self.masked_trip(p, &mut after, &mut masked)?;
            if after.groups.iter().any(|g| g.since > 0) {
                return Ok(None);
            }
            let mut plain = steady.clone();
            self.trip(p, |_| true, false, true, &mut plain, &mut full)?;
            for (flow, body) in [(&mut after, &mut masked), (&mut plain, &mut full)] {
                advance(flow);
                self.turn_rings(body);
            }
            let Some(met) = steady.meet(&after).and_then(|m| m.meet(&plain)) else { return Ok(None) };
            if met == steady {
                break;
            }
            steady = met;
        }
        let n = var(p.count);
        let first = Expr::Int(1);
        let begin = if p.masked_before { min(max(var(from), first.clone()), n.clone()) } else { first };
        let each = |lo, hi, body| Stmt::For { var: p.trip, lo, hi, step: 1, unroll: false, body };
        let mut out = Vec::new();
        self.first_turn(p, p.skew, &mut out);
        if p.masked_after {
            out.push(Stmt::Let { var: from, value: begin });
            out.push(Stmt::Let { var: to, value: max(min(var(to), n.clone()), var(from)) });
            let pass = self.var(&format!("pass_{}_{}", f.axis_name(p.axis), f.roles[p.role].role));
            let select = |a, b| {
                let earlier = var(pass).bin(BinaryOp::Eq, Expr::Int(0));
                Expr::Select(Box::new(earlier), Box::new(a), Box::new(b))
            };
            let masked = each(select(Expr::Int(0), var(to)), select(var(from), n.clone()), masked);
            let full = each(select(var(from), var(to)), var(to), full);
            let body = vec![masked, full];
            out.push(Stmt::For { var: pass, lo: Expr::Int(0), hi: Expr::Int(2), step: 1, unroll: false, body });
        } else {
            out.push(Stmt::Let { var: from, value: begin });
            out.push(each(Expr::Int(0), var(from), masked));
            out.push(each(var(from), n.clone(), full));
        }
        let mut flow = steady;
        self.drain(p, &mut flow, &mut out)?;
        let mut otherwise = Vec::new();
        self.release_stationary(&self.released_after(p), &mut otherwise);
        let cond = Expr::Int(1).bin(BinaryOp::Le, n);
        Ok(Some((vec![Stmt::If { cond, then: out, otherwise }], flow.bulk)))
    }

    /// A trip with masks, in which what runs behind is left out where there is no iteration for it yet.
    fn masked_trip(&mut self, p: &Plan, flow: &mut Flow, out: &mut Vec<Stmt>) -> Step<()> {
        let mut rest = p.ops.as_slice();
        while let Some(&first) = rest.first() {
            let skew = self.skews[first];
            let (run, others) = rest.split_at(rest.iter().take_while(|i| self.skews[**i] == skew).count());
            rest = others;
            if skew == 0 {
                for i in run {
                    let mut turn = Vec::new();
                    self.take_turn(p, *i, flow, &mut turn);
                    if let Some(sync) = turn.pop() {
                        out.extend(turn);
                        let cond = Expr::Int(p.skew).bin(BinaryOp::Le, var(p.trip));
                        out.push(Stmt::If { cond, then: vec![sync], otherwise: Vec::new() });
                    }
                    self.one(p, *i, 0, true, flow, out)?;
                }
                continue;
            }
            let (mut inside, mut then, mut otherwise) = (flow.clone(), Vec::new(), Vec::new());
            for i in run {
                self.one(p, *i, -skew, true, &mut inside, &mut then)?;
                self.give_turn(p, *i, &mut then);
            }
            let older = &flow.groups;
            let left = |k: &usize| inside.groups.len() >= *k && inside.groups[..*k] == older[older.len() - *k..];
            let left = (1..=older.len()).rev().find(left);
            if let Some(k) = left {
                self.settle(&mut inside, k - 1, Some(p.trip), &mut then);
            }
            self.settle_all(flow, Some(p.trip), &mut otherwise);
            inside.groups.iter_mut().for_each(|g| g.since = skew);
            let cond = Expr::Int(skew).bin(BinaryOp::Le, var(p.trip));
            out.push(Stmt::If { cond, then, otherwise });
            flow.touched = match (flow.touched.take(), inside.touched) {
                (Some(a), Some(b)) => Some(a.union(&b).copied().collect()),
                _ => None,
            };
            flow.filled = flow.filled.intersection(&inside.filled).copied().collect();
            flow.bulk |= inside.bulk;
            flow.groups = inside.groups;
        }
        Ok(())
    }
}
