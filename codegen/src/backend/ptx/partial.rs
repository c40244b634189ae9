//! Sums over lanes that are completed once.
//!
//! ```text
//! s = 0; for ..: s = fix * s; s += sum x over lanes      a butterfly of shuffles in every step
//! →  each lane keeps its part; after the loop one butterfly
//! ```
//! A part times a factor that all lanes share is that lane's part of the product, so a running sum that is only scaled
//! and added to needs its lanes together when something else reads it. Found per role by walking its statements, with
//! no regard to what they compute; FlashAttention-3's row sums are one case. Invariant: between the statement that sets
//! a partial fragment to 0 and the one after which it is completed, every statement that touches it is linear in it
//! with factors equal in all lanes that share an element; elsewhere every lane holds the whole value.

use std::collections::HashMap;

use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Expr, FragId, Kernel, Stmt};
use einfall_ir::ops::{BinaryOp, ReduceOp};

use super::Res;
use super::across::Lanes;
use super::emit::Emit;

/// The fragments of a role whose lanes hold parts, and when they are completed.
#[derive(Default)]
pub(super) struct Partial {
    /// Masks of the butterfly, by fragment.
    masks: HashMap<FragId, Lanes>,
    /// Fragments completed after a statement, by its address.
    complete: HashMap<*const Stmt, Vec<FragId>>,
}

impl Partial {
    /// Whether lanes hold parts of `f` while it is summed.
    pub(super) fn holds(&self, f: FragId) -> bool {
        self.masks.contains_key(&f)
    }
}

/// Whether the statement adds to `f` by a carried sum; if so what it sums.
fn adds(s: &Stmt, f: FragId) -> Option<(FragId, &[usize])> {
    match s {
        Stmt::Reduce { out, op: ReduceOp::Sum, src, over, base: None, carry: true, .. }
            if out.as_slice() == [f] && *src != f =>
        {
            Some((*src, over))
        }
        _ => None,
    }
}

fn contains_adds(s: &Stmt, f: FragId) -> bool {
    adds(s, f).is_some() || s.bodies().into_iter().flatten().any(|s| contains_adds(s, f))
}

fn is_zero(s: &Stmt, f: FragId) -> bool {
    matches!(s, Stmt::Map { out, value: Expr::Float(x) } if *out == f && *x == 0.0)
}

/// Whether what the statement does to `f` may be done to parts of it.
fn linear(k: &Kernel, s: &Stmt, f: FragId) -> bool {
    // Equal in every lane that shares an element of `f`.
    fn shared(k: &Kernel, e: &Expr, f: FragId) -> bool {
        let mut all = match e {
            Expr::Frag { frag, dims } => {
                *frag != f && k.frags[*frag].dist == k.frags[f].dist && dims.iter().copied().eq(0..dims.len())
            }
            _ => true,
        };
        e.for_each_operand(|x| all &= shared(k, x, f));
        all
    }
    if !s.touches(f) || is_zero(s, f) || adds(s, f).is_some() {
        return true;
    }
    match s {
        Stmt::Map { out, value: Expr::Binary(BinaryOp::Mul, a, b) } if *out == f => {
            let own = |e: &Expr| matches!(e, Expr::Frag { frag, .. } if *frag == f);
            (own(a) && shared(k, b, f)) || (own(b) && shared(k, a, f))
        }
        Stmt::For { lo, hi, body, .. } => !lo.reads(f) && !hi.reads(f) && body.iter().all(|s| linear(k, s, f)),
        Stmt::If { cond, then, otherwise } => !cond.reads(f) && then.iter().chain(otherwise).all(|s| linear(k, s, f)),
        _ => false,
    }
}

/// The statement after which `f` can be completed, in `list` or within.
pub(in crate::backend) fn last<'s>(k: &Kernel, list: &'s [Stmt], f: FragId) -> Option<&'s Stmt> {
    let end = list.iter().rposition(|s| contains_adds(s, f))?;
    let first = list.iter().position(|s| s.touches(f))?;
    if is_zero(&list[first], f) && list[..=end].iter().all(|s| linear(k, s, f)) {
        return Some(&list[end]);
    }
    // Everything about it in one loop or branch.
    let mut touching = list.iter().filter(|s| s.touches(f));
    let (Some(only), None) = (touching.next(), touching.next()) else { return None };
    let mut within = only.bodies().into_iter().filter(|l| l.iter().any(|s| s.touches(f)));
    match (within.next(), within.next()) {
        (Some(l), None) => last(k, l, f),
        _ => None,
    }
}

/// What is summed into `f`, and over which of its dimensions.
pub(in crate::backend) fn sums<'s>(body: &'s [Stmt], f: FragId, out: &mut Vec<(FragId, &'s [usize])>) {
    for s in body {
        out.extend(adds(s, f));
        s.bodies().into_iter().for_each(|l| sums(l, f, out));
    }
}

impl Emit<'_> {
    /// Finds the sums of a role's body that are completed once.
    pub(super) fn find_partial(&mut self, body: &[Stmt]) -> Res<()> {
        let k = self.k;
        for f in k.frags.ids() {
            if k.frags[f].dtype != DType::F32 {
                continue;
            }
            let Some(end) = last(k, body, f) else { continue };
            let mut all = Vec::new();
            sums(body, f, &mut all);
            let masks = all.iter().map(|(src, over)| self.reduced_lanes(*src, over)).collect::<Res<Vec<_>>>();
            // Sums that are refused are refused where they stand.
            let Ok(masks) = masks else { continue };
            if let Some(first) = masks.first().filter(|m| !m.is_empty())
                && masks.iter().all(|m| m == first)
            {
                self.role.partial.masks.insert(f, first.clone());
                self.role.partial.complete.entry(std::ptr::from_ref(end)).or_default().push(f);
            }
        }
        Ok(())
    }

    /// Completes the fragments that are completed after `s`.
    pub(super) fn complete_partial(&mut self, s: &Stmt) -> Res<()> {
        let Some(frags) = self.role.partial.complete.get(&std::ptr::from_ref(s)).cloned() else { return Ok(()) };
        for f in frags {
            let lanes = self.role.partial.masks.get(&f).cloned().unwrap_or_default();
            let mut whole = Vec::new();
            for v in 0..self.frags.get(f).count() {
                let mut x = self.element(f, v);
                for mask in &lanes.masks {
                    let other = self.shuffle(&x, *mask);
                    x = self.combine(ReduceOp::Sum, &x, &other)?;
                }
                whole.push(x);
            }
            self.join_warps(ReduceOp::Sum, &mut whole, &lanes)?;
            self.set_elements(f, |_, v| Ok(whole[v].clone()))?;
        }
        Ok(())
    }
}
