//! Divisibility and quotients.
//!
//! Invariant: a fixed dividend restricts the divisor to its divisor lattice, a fixed divisor makes the dividend a stride;
//! quotients narrow bounds over positive divisors and enumerate small domains of any sign.
//! Source: interval division as in Apt and Zoeteweij, 2007; rounding per [`number::div_floor`] and
//! [`number::div_ceil`].

use super::super::domain::{Narrow, Store, Var};
use super::super::number::{self, div_ceil, div_floor};
use super::product::{common_factor, drop_values, keep_divisors};
use super::{Lattices, require};

/// Work bound, in pairs of values.
const PAIRS: u64 = 4096;

pub(super) fn divides_truth(store: &Store, a: Var, b: Var) -> Option<bool> {
    if let Some(d) = store.value(b) {
        if d == 0 {
            return Some(false);
        }
        if common_factor(store, a) % d == 0 && (store.lo(a) != 0 || store.hi(a) != 0) {
            return Some(true);
        }
        if let Some(v) = store.value(a) {
            return Some(v % d == 0);
        }
        let d = d.abs();
        if store.set(a).is_some() {
            return if store.iter(a).all(|v| v % d != 0) { Some(false) } else { None };
        }
        let first = i128::from(d) * div_ceil(i128::from(store.lo(a)), i128::from(d));
        return if first > i128::from(store.hi(a)) { Some(false) } else { None };
    }
    if let Some(v) = store.value(a) {
        if v != 0 && store.lo(b) > v.abs() {
            return Some(false);
        }
        if store.size(b) <= 512 {
            let mut any = (false, false);
            for d in store.iter(b) {
                if d != 0 && v % d == 0 {
                    any.0 = true;
                } else {
                    any.1 = true;
                }
            }
            return match any {
                (true, false) => Some(true),
                (false, true) => Some(false),
                _ => None,
            };
        }
    }
    None
}

pub(super) fn refuse_divides(store: &mut Store, a: Var, b: Var) -> Narrow {
    if let Some(truth) = divides_truth(store, a, b) {
        return require(!truth);
    }
    if let Some(d) = store.value(b) {
        return store.retain(a, |v| v % d != 0);
    }
    if let Some(v) = store.value(a) {
        return store.retain(b, |d| d == 0 || v % d != 0);
    }
    Ok(())
}

pub(super) fn enforce_divides(store: &mut Store, lattices: &mut Lattices, a: Var, b: Var) -> Narrow {
    store.remove(b, 0)?;
    if let Some(d) = store.value(b) {
        require(d != 0)?;
        return store.set_stride(a, d.abs(), 0);
    }
    if let Some(v) = store.value(a) {
        if v == 0 {
            return Ok(());
        }
        if store.lo(b) > 0 {
            return keep_divisors(store, lattices, b, v.abs());
        }
        store.set_max(b, i128::from(v.abs()))?;
        store.set_min(b, -i128::from(v.abs()))?;
        return store.retain(b, |d| d != 0 && v % d == 0);
    }
    if store.lo(b) > 0 {
        if store.lo(a) > 0 {
            store.set_max(b, i128::from(store.hi(a)))?;
            store.set_min(a, i128::from(store.lo(b)))?;
        }
        let factor = common_factor(store, b);
        store.set_stride(a, factor, 0)?;
        if let Some(values) = store.set(a) {
            let values = values.to_vec();
            if values.contains(&0) {
                return Ok(());
            }
            if store.size(b) * values.len() as u64 <= PAIRS {
                store.retain(b, |d| values.iter().any(|v| v % d == 0))?;
            } else if values.len() <= 64 && store.set(b).is_none() {
                let mut union = Vec::new();
                for v in &values {
                    match lattices.divisors(v.abs()) {
                        Some(divisors) => union.extend_from_slice(&divisors),
                        None => return Ok(()),
                    }
                }
                union.sort_unstable();
                union.dedup();
                store.intersect(b, &union)?;
            }
        }
        if store.set(b).is_some() && store.size(a) * store.size(b) <= PAIRS {
            let divisors: Vec<i64> = store.iter(b).collect();
            store.retain(a, |v| divisors.iter().any(|d| v % d == 0))?;
        }
    }
    Ok(())
}

fn divide(a: i64, b: i64, ceil: bool) -> i128 {
    let (a, b) = (i128::from(a), i128::from(b));
    if ceil { div_ceil(a, b) } else { div_floor(a, b) }
}

pub(super) fn quotient(store: &mut Store, z: Var, a: Var, b: Var, ceil: bool) -> Narrow {
    store.remove(b, 0)?;
    if let (Some(x), Some(y)) = (store.value(a), store.value(b)) {
        require(y != 0)?;
        return store.assign(z, divide(x, y, ceil));
    }
    if store.size(a).saturating_mul(store.size(b)) <= PAIRS {
        return enumerate(store, z, a, b, ceil);
    }
    if store.lo(b) <= 0 {
        // |quotient| never exceeds |a| over integers.
        let most = i128::from(store.lo(a).abs().max(store.hi(a).abs()));
        store.set_min(z, -most)?;
        return store.set_max(z, most);
    }
    let wide = |v: i64| i128::from(v);
    let ends = |store: &Store, v: i64| {
        let (p, q) = (divide(v, store.lo(b), ceil), divide(v, store.hi(b), ceil));
        (p.min(q), p.max(q))
    };
    store.set_min(z, ends(store, store.lo(a)).0)?;
    store.set_max(z, ends(store, store.hi(a)).1)?;
    // Down: z·b <= a <= (z+1)·b - 1. Up: (z-1)·b + 1 <= a <= z·b.
    let (low, high) = if ceil { (-1, 0) } else { (0, 1) };
    let (b_lo, b_hi) = (wide(store.lo(b)), wide(store.hi(b)));
    let (z_lo, z_hi) = (wide(store.lo(z)) + low, wide(store.hi(z)) + high);
    store.set_min(a, number::mul(z_lo, b_lo).min(number::mul(z_lo, b_hi)) - low)?;
    store.set_max(a, number::mul(z_hi, b_lo).max(number::mul(z_hi, b_hi)) - high)?;
    // With a and z positive: b <= a / z and b >= a / (z+1), with the same shifts.
    let (a_lo, a_hi) = (wide(store.lo(a)), wide(store.hi(a)));
    if a_lo > 0 && z_lo > 0 {
        store.set_max(b, div_floor(a_hi + low, z_lo))?;
    }
    if a_lo > 0 && z_hi > 0 {
        store.set_min(b, div_ceil(a_lo + high, z_hi))?;
    }
    Ok(())
}

/// Every value left of `z`, `a` and `b` takes part in some triple.
fn enumerate(store: &mut Store, z: Var, a: Var, b: Var, ceil: bool) -> Narrow {
    let (mut of_z, mut of_a, mut of_b) = (Vec::new(), Vec::new(), Vec::new());
    for x in store.iter(a) {
        for y in store.iter(b) {
            if y == 0 || (a == b && x != y) {
                continue;
            }
            if let Ok(q) = i64::try_from(divide(x, y, ceil))
                && store.contains(z, q)
            {
                of_z.push(q);
                of_a.push(x);
                of_b.push(y);
            }
        }
    }
    for (var, mut seen) in [(z, of_z), (a, of_a), (b, of_b)] {
        seen.sort_unstable();
        seen.dedup();
        let lost: Vec<i64> = if store.size(var) <= PAIRS {
            store.iter(var).filter(|v| seen.binary_search(v).is_err()).collect()
        } else {
            store.intersect(var, &seen)?;
            continue;
        };
        drop_values(store, var, &lost)?;
    }
    Ok(())
}
