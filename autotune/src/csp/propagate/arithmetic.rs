//! Powers, extrema and the total divisor.
//!
//! Invariant: bounds consistent; value by value where a domain is small.

use super::super::domain::{EXPAND, Narrow, Store, Var};
use super::super::number::{self, LIMIT};
use super::product::drop_values;
use super::require;

fn saturated_power(x: i64, exponent: u32) -> i64 {
    number::pow(i128::from(x), exponent).clamp(-i128::from(LIMIT), i128::from(LIMIT)) as i64
}

pub(super) fn power(store: &mut Store, z: Var, x: Var, exponent: u32) -> Narrow {
    if exponent == 0 {
        return store.assign(z, 1);
    }
    if let Some(v) = store.value(x) {
        return store.assign(z, i128::from(saturated_power(v, exponent)));
    }
    let even = exponent.is_multiple_of(2);
    let (x_lo, x_hi) = (store.lo(x), store.hi(x));
    let (low, high) = (saturated_power(x_lo, exponent), saturated_power(x_hi, exponent));
    let least = if even && x_lo < 0 && x_hi > 0 { 0 } else { low.min(high) };
    store.set_min(z, i128::from(least))?;
    store.set_max(z, i128::from(low.max(high)))?;
    if x_lo >= 0 {
        if store.hi(z) < LIMIT {
            store.set_max(x, i128::from(number::root_floor(store.hi(z), exponent)))?;
        }
        if store.lo(z) > 0 {
            store.set_min(x, i128::from(number::root_floor(store.lo(z) - 1, exponent)) + 1)?;
        }
    } else if even && store.hi(z) < LIMIT {
        let root = i128::from(number::root_floor(store.hi(z), exponent));
        store.set_max(x, root)?;
        store.set_min(x, -root)?;
    }
    if store.size(x) <= EXPAND {
        let lost: Vec<i64> = store.iter(x).filter(|v| !store.contains(z, saturated_power(*v, exponent))).collect();
        drop_values(store, x, &lost)?;
    }
    if store.size(z) <= 512 {
        let lost: Vec<i64> = store.iter(z).filter(|w| !has_root(store, x, *w, exponent)).collect();
        drop_values(store, z, &lost)?;
    }
    Ok(())
}

/// Whether some value left of `x` has the power `w`; true where that is not known.
fn has_root(store: &Store, x: Var, w: i64, exponent: u32) -> bool {
    if w.abs() == LIMIT {
        return true;
    }
    let root = number::root_floor(w.abs(), exponent);
    [root, -root].into_iter().any(|r| saturated_power(r, exponent) == w && store.contains(x, r))
}

pub(super) fn maximum(store: &mut Store, z: Var, xs: &[Var]) -> Narrow {
    let most = xs.iter().map(|x| store.hi(*x)).max();
    let least = xs.iter().map(|x| store.lo(*x)).max();
    let (Some(most), Some(least)) = (most, least) else { return require(false) };
    store.set_max(z, i128::from(most))?;
    store.set_min(z, i128::from(least))?;
    let top = i128::from(store.hi(z));
    xs.iter().try_for_each(|x| store.set_max(*x, top))?;
    let bottom = store.lo(z);
    let mut able = xs.iter().filter(|x| store.hi(**x) >= bottom);
    if let (Some(x), None) = (able.next(), able.next()) {
        store.set_min(*x, i128::from(bottom))?;
    }
    supported(store, z, xs)
}

pub(super) fn minimum(store: &mut Store, z: Var, xs: &[Var]) -> Narrow {
    let least = xs.iter().map(|x| store.lo(*x)).min();
    let most = xs.iter().map(|x| store.hi(*x)).min();
    let (Some(least), Some(most)) = (least, most) else { return require(false) };
    store.set_min(z, i128::from(least))?;
    store.set_max(z, i128::from(most))?;
    let bottom = i128::from(store.lo(z));
    xs.iter().try_for_each(|x| store.set_min(*x, bottom))?;
    let top = store.hi(z);
    let mut able = xs.iter().filter(|x| store.lo(**x) <= top);
    if let (Some(x), None) = (able.next(), able.next()) {
        store.set_max(*x, i128::from(top))?;
    }
    supported(store, z, xs)
}

/// An extremum is a value of one of its operands.
fn supported(store: &mut Store, z: Var, xs: &[Var]) -> Narrow {
    if store.size(z) > 512 {
        return Ok(());
    }
    let lost: Vec<i64> = store.iter(z).filter(|v| !xs.iter().any(|x| store.contains(*x, *v))).collect();
    drop_values(store, z, &lost)
}

pub(super) fn non_zero(store: &mut Store, z: Var, y: Var) -> Narrow {
    store.remove(z, 0)?;
    if let Some(v) = store.value(y) {
        return store.assign(z, if v == 0 { 1 } else { i128::from(v) });
    }
    store.set_min(z, i128::from(store.lo(y).min(1)))?;
    store.set_max(z, i128::from(store.hi(y).max(1)))?;
    if !store.contains(z, 1) {
        store.remove(y, 0)?;
    }
    // Zero maps to one, so zero stays while one does.
    store.set_min(y, i128::from(store.lo(z).min(0)))?;
    store.set_max(y, i128::from(store.hi(z).max(0)))?;
    if store.size(y) <= EXPAND {
        let lost: Vec<i64> = store.iter(y).filter(|v| !store.contains(z, if *v == 0 { 1 } else { *v })).collect();
        drop_values(store, y, &lost)?;
    }
    Ok(())
}
