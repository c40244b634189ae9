//! Default distributions: how the threads of a unit hold tiles that no atom constrains.
//!
//! All tiles of a role are projections of one joint distribution, so that elementwise operands, results of reductions
//! and broadcasts agree by construction ([`Distribution::serves`]). Along the axis that arrays are contiguous in, a
//! thread holds the elements of one 16-byte access (of the narrowest array that covers the operation), lanes follow one
//! another, then registers; lanes that are left go to rows, and what is left of them repeats. Axes that no operation
//! has together (the same loop, written twice) share their lanes. Invariant: every extent is covered exactly, whatever
//! its factors: lanes are the largest power of two that divides it.

use einfall_ir::layout::Distribution;
use einfall_ir::tile::{AxisId, Expr, Op, Space};

use super::apply_mapping::Facts;
use super::assign_layouts::domain;
use super::exprs::Place;

/// Bytes of the widest access of one thread.
const ACCESS_BYTES: u64 = 16;

/// The joint distribution of a role's unit.
pub(super) struct Spread {
    /// The axes of each dimension.
    classes: Vec<Vec<AxisId>>,
    dist: Distribution,
}

impl Spread {
    /// The distribution of a tile over `axes`, in that order; none if an axis is no dimension of the role's tiles or
    /// two share one.
    pub fn over(&self, axes: &[AxisId]) -> Option<Distribution> {
        let kept: Option<Vec<usize>> = axes.iter().map(|a| self.classes.iter().position(|c| c.contains(a))).collect();
        let kept = kept?;
        let distinct = kept.iter().enumerate().all(|(i, d)| !kept[..i].contains(d));
        distinct.then(|| self.dist.project(&kept))
    }

    /// The joint distribution of `role`.
    pub fn of(f: &Facts<'_>, role: usize) -> Spread {
        let mut classes: Vec<Vec<AxisId>> = Vec::new();
        let ops: Vec<usize> = (0..f.ops.len())
            .filter(|i| f.ops[*i].role == role && !matches!(f.ops[*i].op, Op::Contract { .. }))
            .collect();
        let domains: Vec<Vec<AxisId>> = ops.iter().map(|i| domain(f, *i)).collect();
        let apart = |a: &AxisId, b: &AxisId| !domains.iter().any(|d| d.contains(a) && d.contains(b));
        for a in domains.iter().flatten() {
            if classes.iter().any(|c| c.contains(a)) {
                continue;
            }
            let held = f.held(*a, role);
            match classes.iter_mut().find(|c| f.held(c[0], role) == held && c.iter().all(|b| apart(a, b))) {
                Some(class) => class.push(*a),
                None => classes.push(vec![*a]),
            }
        }
        // Elements that accesses move along each class as their contiguous dimension, and the narrowest element of
        // those that move the most.
        let mut moved = vec![(0, u64::MAX); classes.len()];
        for (i, d) in ops.iter().zip(&domains) {
            let elems: u64 = d.iter().map(|a| f.held(*a, role)).product();
            for (axis, bytes) in contiguous(f, *i, role) {
                if let Some(c) = classes.iter().position(|c| c.contains(&axis)) {
                    let most = &mut moved[c];
                    *most = match elems.cmp(&most.0) {
                        std::cmp::Ordering::Greater => (elems, bytes),
                        std::cmp::Ordering::Equal => (elems, most.1.min(bytes)),
                        std::cmp::Ordering::Less => *most,
                    };
                }
            }
        }
        let lead = (0..classes.len()).rev().max_by_key(|c| moved[*c].0);
        let dims: Vec<u64> = classes.iter().map(|c| f.held(c[0], role)).collect();
        let asked = |c: usize| classes[c].iter().map(|a| f.axis(*a).register).max().unwrap_or(0);
        let near: Vec<u64> = (0..classes.len()).map(asked).collect();
        let width = lead.map_or(1, |c| {
            let asked = near[c];
            let default = if moved[c].0 == 0 { 1 } else { (ACCESS_BYTES / moved[c].1).max(1) };
            gcd(dims[c], if asked > 0 { asked } else { default })
        });
        let threads = f.roles[role].scope.threads();
        Spread { dist: Distribution::neighbours(&dims, lead, width, &near, threads), classes }
    }
}

/// Axes along which the arrays that operation `i` touches are contiguous, each with the bytes of an element.
fn contiguous(f: &Facts<'_>, i: usize, role: usize) -> Vec<(AxisId, u64)> {
    let op = f.ops[i].op;
    let place = Place { role, block: None, checked: true };
    let mut arrays = Vec::new();
    match op {
        Op::Load { out, buffer, at } if f.tile(*out).space == Space::Registers => arrays.push((*buffer, at.clone())),
        Op::Store { buffer, at, .. } => arrays.push((*buffer, at.clone())),
        Op::Load { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {}
    }
    for root in op.roots() {
        f.kernel.walk(root, &mut |_, e| {
            if let Expr::Read { buffer, at } = e {
                arrays.push((*buffer, at.clone()));
            }
        });
    }
    let mut out = Vec::new();
    for (buffer, at) in arrays {
        let Some(last) = at.last() else { continue };
        // Only the form of the position matters here, not which buffer of the kernel is read by it.
        let form = f.linear(*last, &place, &|b| einfall_ir::arena::Id::new(einfall_ir::arena::Id::index(b)));
        if let Some(form) = form
            && let [(axis, 1)] = form.axes[..]
        {
            out.push((axis, (f.plan.buffers[buffer].dtype.bytes(1)).max(1)));
        }
    }
    out
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_are_covered_once() {
        for (dims, lead, width) in [
            (vec![4, 512], Some(1), 8),
            (vec![3, 80], Some(1), 8),
            (vec![512], Some(0), 4),
            (vec![16, 7], Some(1), 1),
            (vec![6, 10], None, 1),
            (vec![], None, 1),
            (vec![64, 64], Some(0), 2),
        ] {
            let d = Distribution::accesses(&dims, lead, width, 32);
            let (threads, regs, lanes) = d.counts();
            assert_eq!((threads, lanes), (32, 1), "{dims:?}");
            assert!(d.covers(), "{dims:?}: {d}");
            let elems: u64 = dims.iter().product();
            let copies = threads * regs / elems;
            assert!(copies.is_power_of_two() && threads * regs == elems * copies, "{dims:?}: {d}");
        }
        // A row of 512 over 32 lanes: two accesses of 8 elements, the lanes one after another.
        let d = Distribution::accesses(&[512], Some(0), 8, 32);
        assert_eq!(d.to_string(), "T[32@0.8]V[8@0.1,2@0.256]L[]");
    }
}
