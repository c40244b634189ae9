//! Functions that WGSL lacks or does not promise enough about: exact literals, types of less than a word, and scalar
//! functions to the ulps that the operators' table states.
//!
//! WGSL promises 3 + 2|x| ulps of `exp`, an absolute error of `log`, and nothing of NaN. What is here computes from
//! sums, products, `floor` and bits. The polynomials are those of Cephes (S. Moshier). Invariant: a module has the
//! functions that it uses, each after those it uses itself.

/// Every function's text, by name, in order of use.
const FUNCTIONS: &[(&str, &str)] = &[
    // The optimiser is not to know: infinities and NaN are no constants of WGSL.
    ("infinity", "var<private> infinity_bits: u32 = 0x7f800000u;\nfn infinity() -> f32 { return bitcast<f32>(infinity_bits); }"),
    ("nan", "var<private> nan_bits: u32 = 0x7fc00000u;\nfn nan() -> f32 { return bitcast<f32>(nan_bits); }"),
    ("is_nan", "fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) << 1u) > 0xff000000u; }"),
    ("floor_div", "fn floor_div(a: i32, b: i32) -> i32 {
    if (b == 0) { return 0; }
    let q = a / b;
    return select(q, q - 1, a % b != 0 && ((a < 0) != (b < 0)));
}"),
    ("floor_mod", "fn floor_mod(a: i32, b: i32) -> i32 {
    if (b == 0) { return 0; }
    return a - b * floor_div(a, b);
}"),
    ("float_mod", "fn float_mod(a: f32, b: f32) -> f32 { return a - b * floor(a / b); }"),
    ("min_nan", "fn min_nan(a: f32, b: f32) -> f32 { return select(b, a, a < b || is_nan(a)); }"),
    ("max_nan", "fn max_nan(a: f32, b: f32) -> f32 { return select(b, a, a > b || is_nan(a)); }"),
    ("to_int", "fn to_int(x: f32) -> i32 {
    if (is_nan(x)) { return 0; }
    if (x >= 2147483648.0) { return 2147483647; }
    return i32(max(x, -2147483648.0));
}"),
    ("sign_nan", "fn sign_nan(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    return sign(x);
}"),
    ("power_of_two", "fn power_of_two(n: i32) -> f32 { return bitcast<f32>(u32(n + 127) << 23u); }"),
    // 2^n·e^r, |r| ≤ ln2/2, n of either sign as far as floats reach.
    ("scaled_exp", "fn scaled_exp(n: f32, r: f32) -> f32 {
    var p = fma(1.9875691500e-4, r, 1.3981999507e-3);
    p = fma(p, r, 8.3334519073e-3);
    p = fma(p, r, 4.1665795894e-2);
    p = fma(p, r, 1.6666665459e-1);
    p = fma(p, r, 5.0000001201e-1);
    let y = fma(p * r, r, r) + 1.0;
    let i = i32(n);
    let half = i / 2;
    return y * power_of_two(half) * power_of_two(i - half);
}"),
    ("exp_exact", "fn exp_exact(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    let n = floor(clamp(x, -105.0, 90.0) * 1.44269504 + 0.5);
    let c = clamp(x, -105.0, 90.0);
    return scaled_exp(n, (c - n * 0.693359375) + n * 2.12194440e-4);
}"),
    ("exp2_exact", "fn exp2_exact(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    let c = clamp(x, -151.0, 129.0);
    let n = floor(c + 0.5);
    return scaled_exp(n, (c - n) * 0.69314718);
}"),
    // exp2(t)·(1 + e·ln2) with t + e = x·log₂e.
    ("exp_fast", "fn exp_fast(x: f32) -> f32 {
    let t = x * 1.44269504;
    let y = exp2(t);
    let e = fma(x, 1.9259629e-8, fma(x, 1.44269504, -t));
    return select(y, fma(y, e * 0.69314718, y), abs(t) < 127.0);
}"),
    // The mantissa about √½ and the exponent: x = m·2^e.
    ("log_parts", "fn log_parts(x: f32) -> vec2<f32> {
    let small = x < 0x1p-126f;
    let s = select(x, x * 8388608.0, small);
    let d = bitcast<i32>(s) - 0x3f3504f3;
    let m = bitcast<f32>((d & 0x7fffff) + 0x3f3504f3) - 1.0;
    return vec2<f32>(m, f32(d >> 23u) + select(0.0, -23.0, small));
}"),
    // log(1 + m) − m + m²/2.
    ("log_tail", "fn log_tail(m: f32) -> f32 {
    var p = fma(7.0376836292e-2, m, -1.1514610310e-1);
    p = fma(p, m, 1.1676998740e-1);
    p = fma(p, m, -1.2420140846e-1);
    p = fma(p, m, 1.4249322787e-1);
    p = fma(p, m, -1.6668057665e-1);
    p = fma(p, m, 2.0000714765e-1);
    p = fma(p, m, -2.4999993993e-1);
    p = fma(p, m, 3.3333331174e-1);
    return p * m * m * m;
}"),
    // Where the logarithm of x is no number, or infinite.
    ("log_edge", "fn log_edge(x: f32, y: f32) -> f32 {
    if (is_nan(x) || x < 0.0) { return nan(); }
    if (x == 0.0) { return -infinity(); }
    return select(y, x, x > 0x1.fffffep127f);
}"),
    ("log_exact", "fn log_exact(x: f32) -> f32 {
    let p = log_parts(x);
    let y = fma(p.y, -2.12194440e-4, log_tail(p.x)) - 0.5 * p.x * p.x;
    return log_edge(x, fma(p.y, 0.693359375, p.x + y));
}"),
    ("log2_exact", "fn log2_exact(x: f32) -> f32 {
    let p = log_parts(x);
    let y = log_tail(p.x) - 0.5 * p.x * p.x;
    let z = fma(p.x, 0.44269504, y * 0.44269504) + y;
    return log_edge(x, (z + p.x) + p.y);
}"),
    // log(u)·x/(u − 1) with u = 1 + x, which corrects the rounding of 1 + x (W. Kahan).
    ("log1p", "fn log1p(x: f32) -> f32 {
    let u = 1.0 + x;
    let l = log_exact(u);
    if (u == 1.0) { return x; }
    return select(l, l * (x / (u - 1.0)), u > 0.0 && u < 0x1.fffffep127f);
}"),
    // log₂ x as a sum of two floats, the first with few bits, so that products with y keep theirs.
    ("pow_exact", "fn pow_exact(x: f32, y: f32) -> f32 {
    if (y == 0.0) { return 1.0; }
    let a = abs(x);
    let whole = floor(y) == y;
    let odd = whole && floor(y * 0.5) != y * 0.5;
    var v = 0.0;
    if (a > 0.0 && a <= 0x1.fffffep127f) {
        let p = log_parts(a);
        let m1 = bitcast<f32>(bitcast<u32>(p.x) & 0xfffff000u);
        let rest = (p.x - m1) + (log_tail(p.x) - 0.5 * p.x * p.x);
        let low = fma(m1, -1.760528610e-4, rest * 1.44269504);
        let high = m1 * 1.44287109375;
        let h = bitcast<f32>(bitcast<u32>(p.y + high) & 0xfffff000u);
        let l = ((p.y - h) + high) + low;
        let y1 = bitcast<f32>(bitcast<u32>(y) & 0xfffff000u);
        let t = h * y1;
        let e = fma(h, y - y1, l * y);
        let n = floor(clamp(t + e, -160.0, 160.0) + 0.5);
        v = scaled_exp(n, ((clamp(t, -1000.0, 1000.0) - n) + e) * 0.69314718);
        if (t + e > 150.0) { v = infinity(); }
        if (t + e < -155.0) { v = 0.0; }
    } else {
        v = select(0.0, infinity(), (a > 0.0) == (y > 0.0));
    }
    if (is_nan(x) || is_nan(y) || (x < 0.0 && !whole)) { return nan(); }
    return select(v, -v, x < 0.0 && odd);
}"),
    // Whether a candidate (y, j) of a selection is better than (x, i): NaN first, ties to the lowest position; a negative
    // position is none.
    ("is_better", "fn is_better(x: f32, i: i32, y: f32, j: i32, beats: bool) -> bool {
    let tie = (x == y || (is_nan(x) && is_nan(y))) && j < i;
    return j >= 0 && (i < 0 || beats || (is_nan(y) && !is_nan(x)) || tie);
}"),
    ("is_higher", "fn is_higher(x: f32, i: i32, y: f32, j: i32) -> bool { return is_better(x, i, y, j, y > x); }"),
    ("is_lower", "fn is_lower(x: f32, i: i32, y: f32, j: i32) -> bool { return is_better(x, i, y, j, y < x); }"),
    ("log_sum_exp", "fn log_sum_exp(a: f32, b: f32) -> f32 {
    let m = max_nan(a, b);
    let sum = m + log1p(exp_exact(-abs(a - b)));
    return select(m, sum, abs(m) <= 0x1.fffffep127f);
}"),
    ("sigmoid_of", "fn sigmoid_of(x: f32, e: f32) -> f32 {
    let r = 1.0 / (1.0 + e);
    if (is_nan(x)) { return x; }
    return select(e * r, r, x >= 0.0);
}"),
    ("sigmoid_exact", "fn sigmoid_exact(x: f32) -> f32 { return sigmoid_of(x, exp_exact(-abs(x))); }"),
    ("sigmoid_fast", "fn sigmoid_fast(x: f32) -> f32 { return sigmoid_of(x, exp_fast(-abs(x))); }"),
    ("tanh_of", "fn tanh_of(x: f32, e: f32) -> f32 {
    if (is_nan(x)) { return x; }
    let large = sign(x) * (1.0 - 2.0 / (1.0 + e));
    let s = x * x;
    var p = fma(-5.7049886e-3, s, 2.0639090e-2);
    p = fma(p, s, -5.3739715e-2);
    p = fma(p, s, 1.3331444e-1);
    p = fma(p, s, -3.3333280e-1);
    return select(large, fma(p * s, x, x), abs(x) < 0.625);
}"),
    ("tanh_exact", "fn tanh_exact(x: f32) -> f32 { return tanh_of(x, exp_exact(2.0 * abs(x))); }"),
    ("tanh_fast", "fn tanh_fast(x: f32) -> f32 { return tanh_of(x, exp_fast(2.0 * abs(x))); }"),
    // N. Juffa's erff: log₂-free exponent of a polynomial above 0.93, an odd polynomial below.
    ("erf_exponent", "fn erf_exponent(x: f32) -> f32 {
    let t = min(abs(x), 4.0);
    let s = t * t;
    let u = fma(-3.88396438e-3, t, 2.42546219e-2);
    var r = fma(fma(-1.72853470e-5, t, 3.83197126e-4), s, u);
    r = fma(r, t, -1.06777877e-1);
    r = fma(r, t, -6.34846687e-1);
    r = fma(r, t, -1.28717512e-1);
    return fma(r, t, -t);
}"),
    ("erf_of", "fn erf_of(x: f32, e: f32) -> f32 {
    if (is_nan(x)) { return x; }
    let s = x * x;
    var p = fma(-5.96761703e-4, s, 4.99119423e-3);
    p = fma(p, s, -2.67681349e-2);
    p = fma(p, s, 1.12819925e-1);
    p = fma(p, s, -3.76125336e-1);
    p = fma(p, s, 1.28379166e-1);
    return select(fma(p, x, x), sign(x) * (1.0 - e), abs(x) > 0.927734375);
}"),
    ("erf_exact", "fn erf_exact(x: f32) -> f32 { return erf_of(x, exp_exact(erf_exponent(x))); }"),
    ("erf_fast", "fn erf_fast(x: f32) -> f32 { return erf_of(x, exp_fast(erf_exponent(x))); }"),
    // sin(x + quarter·π/2) by reduction to [−π/4, π/4] with π/2 in four parts: good to |x| of some ten thousands.
    ("sine", "fn sine(x: f32, quarter: i32) -> f32 {
    if (!(abs(x) <= 0x1.fffffep127f)) { return nan(); }
    let n = floor(x * 0.636619772 + 0.5);
    var r = x - n * 1.5703125;
    r = r - n * 4.8351287841796875e-4;
    r = r - n * 3.1385570764541626e-7;
    r = r - n * 6.0771005065061922e-11;
    let s = r * r;
    let ps = fma(fma(fma(-1.9515295891e-4, s, 8.3321608736e-3), s, -1.6666654611e-1) * s, r, r);
    let pc = fma(fma(fma(2.443315711809948e-5, s, -1.388731625493765e-3), s, 4.166664568298827e-2) * s, s, fma(s, -0.5, 1.0));
    let q = (i32(n) + quarter) & 3;
    let y = select(ps, pc, (q & 1) == 1);
    return select(y, -y, q > 1);
}"),
    ("sin_exact", "fn sin_exact(x: f32) -> f32 { return sine(x, 0); }"),
    ("cos_exact", "fn cos_exact(x: f32) -> f32 { return sine(x, 1); }"),
    ("high_word", "fn high_word(a: u32, b: u32) -> u32 {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
    return (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u);
}"),
    // Philox4x32-10 (Salmon et al., SC 2011), keyed by a seed whose sign goes on; the top 24 bits of the first word.
    ("random", "fn random(seed: i32, i: i32, j: i32, k: i32, l: i32) -> f32 {
    var a = u32(i);
    var b = u32(j);
    var c = u32(k);
    var d = u32(l);
    var key = u32(seed);
    var key_high = u32(seed >> 31u);
    for (var turn = 0; turn < 10; turn++) {
        let p = high_word(a, 0xd2511f53u) ^ d ^ key_high;
        let q = high_word(c, 0xcd9e8d57u) ^ b ^ key;
        b = c * 0xcd9e8d57u;
        d = a * 0xd2511f53u;
        a = q;
        c = p;
        key += 0x9e3779b9u;
        key_high += 0xbb67ae85u;
    }
    return f32(a >> 8u) * 0x1p-24f;
}"),
    ("bf16_bits", "fn bf16_bits(x: f32) -> u32 {
    let b = bitcast<u32>(x);
    return select((b + 0x7fffu + ((b >> 16u) & 1u)) >> 16u, 0x7fc0u, is_nan(x));
}"),
    ("round_bf16", "fn round_bf16(x: f32) -> f32 { return bitcast<f32>(bf16_bits(x) << 16u); }"),
    ("get_bf16", "fn get_bf16(word: u32, i: i32) -> f32 {
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1) == 1));
}"),
    // |x| rounded to `bits` of mantissa, ties to even, with exponents from `least` on: exact steps of a power of two.
    ("rounded_to", "fn rounded_to(x: f32, bits: i32, least: i32) -> f32 {
    let a = abs(x);
    let exponent = max(i32(bitcast<u32>(a) >> 23u) - 127, least);
    let n = a * power_of_two(bits - exponent);
    let down = floor(n);
    let rest = n - down;
    let odd = floor(down * 0.5) * 2.0 != down;
    return select(down, down + 1.0, rest > 0.5 || (rest == 0.5 && odd)) * power_of_two(exponent - bits);
}"),
    // Rounded magnitudes as bits: exponent and mantissa, or multiples of the least step.
    ("narrow_bits", "fn narrow_bits(a: f32, bits: i32, least: i32) -> u32 {
    if (a < power_of_two(least)) { return u32(a * power_of_two(bits - least)); }
    let b = bitcast<u32>(a);
    let exponent = i32(b >> 23u) - 127;
    return (u32(exponent - least + 1) << u32(bits)) | ((b & 0x7fffffu) >> u32(23 - bits));
}"),
    ("widened", "fn widened(code: u32, bits: i32, least: i32) -> f32 {
    let exponent = i32(code >> u32(bits));
    let mantissa = f32(code & ((1u << u32(bits)) - 1u));
    if (exponent == 0) { return mantissa * power_of_two(least - bits); }
    return (mantissa * power_of_two(-bits) + 1.0) * power_of_two(exponent - 1 + least);
}"),
    // The built-in conversion, of adapters that are known to round to nearest.
    ("as_f16", "fn as_f16(x: f32) -> f32 { return unpack2x16float(pack2x16float(vec2<f32>(x, 0.0))).x; }"),
    ("round_f16", "fn round_f16(x: f32) -> f32 { return get_f16(f16_bits(x), 0); }"),
    // By its bits, ties to even: exponents from -14 on lose 13 bits of mantissa, smaller numbers are multiples of 2^-24.
    ("f16_bits", "fn f16_bits(x: f32) -> u32 {
    let b = bitcast<u32>(x);
    let a = b & 0x7fffffffu;
    let sign = (b >> 16u) & 0x8000u;
    let steps = bitcast<f32>(min(a, 0x38800000u)) * 0x1p24f;
    let down = u32(steps);
    let rest = steps - f32(down);
    let small = down + select(0u, 1u, rest > 0.5 || (rest == 0.5 && (down & 1u) == 1u));
    let large = min(((a + 0xfffu + ((a >> 13u) & 1u)) >> 13u) - 0x1c000u, 0x7c00u);
    let magnitude = select(large, small, a < 0x38800000u);
    return sign | select(magnitude, 0x7e00u, a > 0x7f800000u);
}"),
    ("get_f16", "fn get_f16(word: u32, i: i32) -> f32 {
    let code = (word >> (u32(i & 1) * 16u)) & 0xffffu;
    let magnitude = code & 0x7fffu;
    // Exponents of all ones stay so.
    let bits = (magnitude << 13u) + select(0x38000000u, 0x70000000u, magnitude >= 0x7c00u);
    let small = bitcast<u32>(f32(magnitude) * 0x1p-24f);
    return bitcast<f32>(select(bits, small, magnitude < 0x400u) | ((code & 0x8000u) << 16u));
}"),
    ("round_e4m3", "fn round_e4m3(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    let a = rounded_to(min(abs(x), 448.0), 3, -6);
    return select(a, -a, x < 0.0);
}"),
    ("e4m3_bits", "fn e4m3_bits(x: f32) -> u32 {
    let sign = (bitcast<u32>(x) >> 24u) & 0x80u;
    if (is_nan(x)) { return 0x7fu; }
    return sign | narrow_bits(rounded_to(min(abs(x), 448.0), 3, -6), 3, -6);
}"),
    ("get_e4m3", "fn get_e4m3(word: u32, i: i32) -> f32 {
    let code = (word >> (u32(i & 3) * 8u)) & 0xffu;
    let magnitude = code & 0x7fu;
    var a = widened(magnitude, 3, -6);
    if (magnitude == 0x7fu) { a = nan(); }
    return select(a, -a, code >= 0x80u);
}"),
    ("round_e5m2", "fn round_e5m2(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    let a = select(rounded_to(x, 2, -14), infinity(), abs(x) >= 61440.0);
    return select(a, -a, x < 0.0);
}"),
    ("e5m2_bits", "fn e5m2_bits(x: f32) -> u32 {
    let sign = (bitcast<u32>(x) >> 24u) & 0x80u;
    if (is_nan(x)) { return 0x7eu; }
    if (abs(x) >= 61440.0) { return sign | 0x7cu; }
    return sign | narrow_bits(rounded_to(x, 2, -14), 2, -14);
}"),
    ("get_e5m2", "fn get_e5m2(word: u32, i: i32) -> f32 {
    let code = (word >> (u32(i & 3) * 8u)) & 0xffu;
    let magnitude = code & 0x7fu;
    var a = widened(magnitude, 2, -14);
    if (magnitude == 0x7cu) { a = infinity(); }
    if (magnitude > 0x7cu) { a = nan(); }
    return select(a, -a, code >= 0x80u);
}"),
    // To nearest, ties away from 0.
    ("round_tf32", "fn round_tf32(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    return bitcast<f32>((bitcast<u32>(x) + 0x1000u) & 0xffffe000u);
}"),
    ("i8_bits", "fn i8_bits(x: i32) -> u32 { return u32(x) & 0xffu; }"),
    ("get_i8", "fn get_i8(word: u32, i: i32) -> i32 { return extractBits(bitcast<i32>(word), u32(i & 3) * 8u, 8u); }"),
    ("u8_bits", "fn u8_bits(x: i32) -> u32 { return u32(x) & 0xffu; }"),
    ("get_u8", "fn get_u8(word: u32, i: i32) -> i32 { return i32(extractBits(word, u32(i & 3) * 8u, 8u)); }"),
];

/// Whether `text` calls `name`.
fn calls(text: &str, name: &str) -> bool {
    let call = format!("{name}(");
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.match_indices(&call).any(|(i, _)| !text[..i].ends_with(word) && !text[..i].ends_with("fn "))
}

/// The functions that `text` needs, each after those it uses.
pub(super) fn used(text: &str) -> String {
    let mut needed: Vec<usize> = Vec::new();
    let mut open: Vec<&str> = vec![text];
    while let Some(text) = open.pop() {
        for (i, (name, body)) in FUNCTIONS.iter().enumerate() {
            if !needed.contains(&i) && calls(text, name) {
                needed.push(i);
                open.push(body);
            }
        }
    }
    needed.sort_unstable();
    needed.into_iter().map(|i| format!("\n{}\n", FUNCTIONS[i].1)).collect()
}
