//! `z = coef · Π xs`.
//!
//! Invariant: bounds are narrowed by interval division; over non-negative domains a fixed product restricts each factor
//! to the divisor lattice of what the fixed factors leave, common factors of the factors' domains become strides of the
//! product, and with one open factor product and factor are made consistent value by value.
//! Source: Apt and Zoeteweij, "An analysis of arithmetic constraints on integer intervals", Constraints 12, 2007; the
//! divisor rules follow from `x · y = v  ⇒  x | v`.

use super::super::domain::{Conflict, EXPAND, Narrow, Store, Var};
use super::super::number::{self, CAP, FACTOR_LIMIT, LIMIT, div_ceil, div_floor, mul};
use super::{Lattices, require};

/// Work bound, in pairs of values, of the rules that compare two domains value by value.
const PAIRS: u64 = 4096;

pub(super) fn propagate(store: &mut Store, lattices: &mut Lattices, z: Var, coef: i64, xs: &[Var]) -> Narrow {
    let plain = coef > 0 && store.lo(z) >= 0 && xs.iter().all(|x| store.lo(*x) >= 0);
    if plain {
        bounds(store, z, coef, xs)?;
        if store.lo(z) >= 1 && store.hi(z) < LIMIT {
            lattice(store, lattices, z, coef, xs)?;
        }
        Ok(())
    } else {
        signed_bounds(store, z, coef, xs)
    }
}

/// The common factor of the values of `x`, at least 1.
pub(super) fn common_factor(store: &Store, x: Var) -> i64 {
    match store.set(x) {
        Some(set) => {
            let mut g = 0;
            for v in set {
                g = number::gcd(g, *v);
                if g == 1 {
                    break;
                }
            }
            g.max(1)
        }
        None if store.is_fixed(x) => store.lo(x).abs().max(1),
        None => number::gcd(store.lo(x), store.step(x)).max(1),
    }
}

/// Bounds over non-negative domains.
fn bounds(store: &mut Store, z: Var, coef: i64, xs: &[Var]) -> Narrow {
    let (mut lo, mut hi) = (i128::from(coef), i128::from(coef));
    for x in xs {
        lo = mul(lo, i128::from(store.lo(*x)));
        hi = mul(hi, i128::from(store.hi(*x)));
    }
    let limit = i128::from(LIMIT);
    store.set_min(z, lo.min(limit))?;
    store.set_max(z, hi.min(limit))?;
    let (z_lo, z_hi) = (i128::from(store.lo(z)), i128::from(store.hi(z)));
    if z_lo <= lo && hi <= z_hi {
        // The factors' bounds already imply the product's: only tighter products narrow factors.
        return Ok(());
    }
    for (i, x) in xs.iter().enumerate() {
        if store.is_fixed(*x) {
            continue;
        }
        let others = |end: &dyn Fn(Var) -> i64| {
            let skip = |acc, (j, y): (usize, &Var)| if i == j { acc } else { mul(acc, i128::from(end(*y))) };
            xs.iter().enumerate().fold(i128::from(coef), skip)
        };
        if z_hi < limit {
            let least = others(&|y| store.lo(y));
            if least > 0 {
                store.set_max(*x, z_hi / least)?;
            }
        }
        if z_lo > 0 {
            let most = others(&|y| store.hi(y));
            require(most > 0)?;
            store.set_min(*x, div_ceil(z_lo, most))?;
        }
    }
    Ok(())
}

/// Divisibility over positive domains.
fn lattice(store: &mut Store, lattices: &mut Lattices, z: Var, coef: i64, xs: &[Var]) -> Narrow {
    let mut fixed = i128::from(coef);
    let mut open = [None; 2];
    let mut n_open = 0usize;
    for x in xs {
        match store.value(*x) {
            Some(v) => fixed = mul(fixed, i128::from(v)),
            None => {
                if n_open < 2 {
                    open[n_open] = Some(*x);
                }
                n_open += 1;
            }
        }
    }
    require(fixed > 0)?;
    let fixed = match i64::try_from(fixed) {
        Ok(f) if f < LIMIT => f,
        // z >= fixed cannot hold below the limit.
        _ => return Err(Conflict),
    };
    if let Some(v) = store.value(z) {
        require(v % fixed == 0)?;
        let rest = v / fixed;
        return match (n_open, open) {
            (0, _) => require(rest == 1),
            (1, [Some(x), _]) => store.assign(x, i128::from(rest)),
            _ => {
                for x in xs {
                    if !store.is_fixed(*x) {
                        keep_divisors(store, lattices, *x, rest)?;
                    }
                }
                if let (2, [Some(x), Some(y)]) = (n_open, open)
                    && x != y
                {
                    keep_cofactors(store, x, y, rest)?;
                    keep_cofactors(store, y, x, rest)?;
                }
                Ok(())
            }
        };
    }
    // z is open: it has the factor `fixed` and the common factors of the open domains.
    let mut stride = i128::from(fixed);
    for x in xs {
        if !store.is_fixed(*x) {
            stride = mul(stride, i128::from(common_factor(store, *x)));
        }
    }
    require(stride <= i128::from(store.hi(z)))?;
    store.set_stride(z, stride as i64, 0)?;
    match (n_open, open) {
        (0, _) => store.assign(z, i128::from(fixed)),
        (1, [Some(x), _]) => image(store, z, fixed, x),
        _ => {
            let Some(targets) = store.set(z) else { return Ok(()) };
            if targets.len() > 64 {
                return Ok(());
            }
            let targets: Vec<i64> = targets.iter().map(|v| v / fixed).collect();
            for x in xs {
                if store.is_fixed(*x) {
                    continue;
                }
                if store.size(*x) * targets.len() as u64 <= PAIRS {
                    store.retain(*x, |v| v != 0 && targets.iter().any(|t| t % v == 0))?;
                } else if store.set(*x).is_none() && targets.iter().all(|t| *t <= FACTOR_LIMIT) {
                    let mut union = Vec::new();
                    for t in &targets {
                        union.extend_from_slice(&lattices.divisors(*t).ok_or(Conflict)?);
                    }
                    union.sort_unstable();
                    union.dedup();
                    store.intersect(*x, &union)?;
                }
            }
            Ok(())
        }
    }
}

/// Keeps the divisors of `n >= 1` in the domain of `x`.
pub(super) fn keep_divisors(store: &mut Store, lattices: &mut Lattices, x: Var, n: i64) -> Narrow {
    store.set_max(x, i128::from(n))?;
    if store.set(x).is_some() || store.size(x) <= 64 {
        return store.retain(x, |v| v != 0 && n % v == 0);
    }
    match lattices.divisors(n) {
        Some(divisors) => store.intersect(x, &divisors),
        None => store.retain(x, |v| v != 0 && n % v == 0),
    }
}

/// Keeps the divisors of `n` in the domain of `x` whose cofactor is left for `y`.
fn keep_cofactors(store: &mut Store, x: Var, y: Var, n: i64) -> Narrow {
    if store.size(x) > EXPAND {
        return Ok(());
    }
    let lost: Vec<i64> = store.iter(x).filter(|v| *v == 0 || n % v != 0 || !store.contains(y, n / v)).collect();
    drop_values(store, x, &lost)
}

/// Removes the ascending values `lost` of `x`.
pub(super) fn drop_values(store: &mut Store, x: Var, lost: &[i64]) -> Narrow {
    if lost.is_empty() {
        return Ok(());
    }
    let mut at = 0;
    store.retain(x, |v| {
        let gone = at < lost.len() && lost[at] == v;
        at += usize::from(gone);
        !gone
    })
}

/// `z = factor · x` value by value, where the domains are small.
fn image(store: &mut Store, z: Var, factor: i64, x: Var) -> Narrow {
    let plain = |s: &Store, v: Var| s.set(v).is_none();
    if store.size(x) <= 512 && !(plain(store, x) && plain(store, z) && store.step(x) == 1 && store.step(z) == factor) {
        let lost: Vec<i64> =
            store.iter(x).filter(|v| v.checked_mul(factor).is_none_or(|w| !store.contains(z, w))).collect();
        drop_values(store, x, &lost)?;
    }
    if store.size(z) <= 512 {
        let lost: Vec<i64> = store.iter(z).filter(|w| w % factor != 0 || !store.contains(x, w / factor)).collect();
        drop_values(store, z, &lost)?;
    }
    Ok(())
}

fn interval_mul(a: (i128, i128), b: (i128, i128)) -> (i128, i128) {
    let c = [mul(a.0, b.0), mul(a.0, b.1), mul(a.1, b.0), mul(a.1, b.1)];
    (c.into_iter().min().unwrap_or(0), c.into_iter().max().unwrap_or(0))
}

/// Bounds over domains of any sign.
fn signed_bounds(store: &mut Store, z: Var, coef: i64, xs: &[Var]) -> Narrow {
    let wide = |store: &Store, x: Var| (i128::from(store.lo(x)), i128::from(store.hi(x)));
    let limit = i128::from(LIMIT);
    let start = (i128::from(coef), i128::from(coef));
    let all = xs.iter().fold(start, |acc, x| interval_mul(acc, wide(store, *x)));
    store.set_min(z, all.0.clamp(-limit, limit))?;
    store.set_max(z, all.1.clamp(-limit, limit))?;
    let mut target = wide(store, z);
    if target.0 == -limit {
        target.0 = -CAP;
    }
    if target.1 == limit {
        target.1 = CAP;
    }
    for (i, x) in xs.iter().enumerate() {
        if store.is_fixed(*x) {
            continue;
        }
        let others = (0..xs.len()).filter(|j| *j != i).fold(start, |acc, j| interval_mul(acc, wide(store, xs[j])));
        let (p, q) = others;
        if p <= 0 && q >= 0 {
            if target.0 > 0 || target.1 < 0 {
                require(p != 0 || q != 0)?;
                // The others are not all zero, so |x| <= |z|.
                let most = target.0.abs().max(target.1.abs());
                store.set_min(*x, -most)?;
                store.set_max(*x, most)?;
                store.remove(*x, 0)?;
            }
            continue;
        }
        let corners = |f: fn(i128, i128) -> i128| [f(target.0, p), f(target.0, q), f(target.1, p), f(target.1, q)];
        // A saturated target stands for any larger magnitude: it bounds x only by sign.
        let unbounded = target.0 == -CAP || target.1 == CAP;
        let least = corners(div_ceil).into_iter().min().unwrap_or(-CAP);
        let most = corners(div_floor).into_iter().max().unwrap_or(CAP);
        if !unbounded {
            store.set_min(*x, least)?;
            store.set_max(*x, most)?;
        }
    }
    let mut open = xs.iter().filter(|x| !store.is_fixed(**x));
    let (first, second) = (open.next().copied(), open.next().copied());
    let fixed = xs.iter().filter_map(|y| store.value(*y)).fold(i128::from(coef), |acc, y| mul(acc, i128::from(y)));
    match (first, second, store.value(z)) {
        (None, _, _) => store.assign(z, fixed.clamp(-limit, limit)),
        (Some(x), None, Some(v)) if v.abs() < LIMIT => {
            if fixed == 0 {
                return require(v == 0);
            }
            require(i128::from(v) % fixed == 0)?;
            store.assign(x, i128::from(v) / fixed)
        }
        _ => Ok(()),
    }
}
