//! Integer arithmetic of the solver: greatest common divisors, divisor lattices, integer roots, divisions that round
//! in a named direction.
//!
//! Invariant: nothing here overflows. Values lie strictly between ±[`LIMIT`]; intermediate results are `i128` and
//! saturate at [`CAP`], which stands for "at least this much".

/// Values lie strictly between `-LIMIT` and `LIMIT`; a result at ±`LIMIT` stands for one that left the range.
pub const LIMIT: i64 = (1 << 62) - 1;

/// Where interval arithmetic saturates; larger than [`LIMIT`] so that dividing any value by it rounds to 0 or ±1.
pub(crate) const CAP: i128 = 1 << 64;

/// Greatest common divisor of magnitudes; `gcd(0, n) = |n|`.
pub fn gcd(a: i64, b: i64) -> i64 {
    let (mut a, mut b) = (a.unsigned_abs(), b.unsigned_abs());
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a.min(LIMIT as u64) as i64
}

/// Least common multiple of two positive numbers, or `None` beyond [`LIMIT`].
///
/// ```
/// assert_eq!(einfall_autotune::csp::lcm(9, 6), Some(18));
/// ```
pub fn lcm(a: i64, b: i64) -> Option<i64> {
    let wide = i128::from(a / gcd(a, b).max(1)) * i128::from(b);
    i64::try_from(wide).ok().filter(|v| *v <= LIMIT)
}

/// The product, saturated at ±[`CAP`].
pub(crate) fn mul(a: i128, b: i128) -> i128 {
    a.saturating_mul(b).clamp(-CAP, CAP)
}

/// `a / b` rounded towards minus infinity; `b` is not 0.
pub(crate) fn div_floor(a: i128, b: i128) -> i128 {
    let q = a / b;
    if a % b != 0 && ((a < 0) != (b < 0)) { q - 1 } else { q }
}

/// `a / b` rounded towards plus infinity; `b` is not 0.
pub(crate) fn div_ceil(a: i128, b: i128) -> i128 {
    -div_floor(-a, b)
}

/// `base` to the power `exponent`, saturated at ±[`CAP`].
pub(crate) fn pow(base: i128, exponent: u32) -> i128 {
    let mut out: i128 = 1;
    for _ in 0..exponent {
        out = mul(out, base);
        if out == 0 || out.abs() == CAP {
            // The magnitude no longer changes; the sign follows the parity of the exponent.
            let negative = base < 0 && exponent % 2 == 1;
            return if out == 0 {
                0
            } else if negative {
                -CAP
            } else {
                CAP
            };
        }
        if out == 1 && base == 1 {
            return 1;
        }
        if base == -1 {
            return if exponent.is_multiple_of(2) { 1 } else { -1 };
        }
    }
    out
}

/// The largest `r >= 0` with `r^n <= v`, for `v >= 0` and `n >= 1`.
pub(crate) fn root_floor(v: i64, n: u32) -> i64 {
    let (mut lo, mut hi) = (0i64, v);
    while lo < hi {
        let mid = lo + (hi - lo) / 2 + 1;
        if pow(i128::from(mid), n) <= i128::from(v) {
            lo = mid;
        } else {
            hi = mid - 1;
        }
    }
    lo
}

/// Largest number [`divisors`] factors; trial division up to 2^20 covers it.
pub(crate) const FACTOR_LIMIT: i64 = 1 << 40;

/// The positive divisors of `n` in ascending order, or `None` where `n < 1` or `n` exceeds 2^40.
pub fn divisors(n: i64) -> Option<Vec<i64>> {
    if !(1..=FACTOR_LIMIT).contains(&n) {
        return None;
    }
    let mut out = vec![1i64];
    let mut rest = n;
    let mut p = 2;
    while p * p <= rest {
        if rest % p == 0 {
            let base = out.len();
            let mut power = 1;
            while rest % p == 0 {
                rest /= p;
                power *= p;
                for i in 0..base {
                    out.push(out[i] * power);
                }
            }
        }
        p += if p == 2 { 1 } else { 2 };
    }
    if rest > 1 {
        for i in 0..out.len() {
            out.push(out[i] * rest);
        }
    }
    out.sort_unstable();
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_are_those_found_by_trial() {
        for n in 1..500 {
            let slow: Vec<i64> = (1..=n).filter(|d| n % d == 0).collect();
            assert_eq!(divisors(n), Some(slow), "n = {n}");
        }
        assert_eq!(divisors(1 << 30).map(|d| d.len()), Some(31));
        assert_eq!(divisors(0), None);
        assert_eq!(divisors(FACTOR_LIMIT + 1), None);
    }

    #[test]
    fn divisions_round_as_named() {
        for a in -20i128..=20 {
            for b in (-6i128..=6).filter(|b| *b != 0) {
                let exact = a as f64 / b as f64;
                assert_eq!(div_floor(a, b), exact.floor() as i128);
                assert_eq!(div_ceil(a, b), exact.ceil() as i128);
            }
        }
    }

    #[test]
    fn powers_and_roots_agree_and_saturate() {
        for b in -9i128..=9 {
            for e in 0..20u32 {
                assert_eq!(pow(b, e), b.checked_pow(e).expect("small").clamp(-CAP, CAP), "{b}^{e}");
            }
        }
        assert_eq!(pow(2, 1000), CAP);
        assert_eq!(pow(-2, 1001), -CAP);
        assert_eq!(pow(-1, 1001), -1);
        for v in 0..300 {
            for n in 1..6 {
                let r = i128::from(root_floor(v, n));
                assert!(pow(r, n) <= i128::from(v) && pow(r + 1, n) > i128::from(v));
            }
        }
        assert_eq!(root_floor(LIMIT, 2), (1 << 31) - 1);
        assert_eq!(lcm(LIMIT, 2), None);
        assert_eq!(gcd(0, 7), 7);
    }
}
