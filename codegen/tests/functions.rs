//! Scalar functions in vector lanes, over the whole range of f32: within the ulps that the operator table allows, and
//! exact at infinities, NaN and zero.

mod common;

use common::{Split, compile, isas, run};
use einfall_ir::array::Array;
use einfall_ir::cascade::eval::philox;
use einfall_ir::dtype::DType;
use einfall_ir::ops::UnaryOp;
use einfall_ir::tile::parse::parse;

/// Every exponent with several mantissas and both signs, every edge, and a dense sweep where functions turn.
fn points() -> Vec<f64> {
    let mut v = Vec::new();
    for e in 0..=254u32 {
        for m in [0u32, 1, 0x1357b, 0x2aaaaa, 0x3504f3, 0x3504f4, 0x4c2b7d, 0x7ffffe, 0x7fffff] {
            let x = f64::from(f32::from_bits((e << 23) | m));
            v.extend([x, -x]);
        }
    }
    for i in -60_000..=60_000 {
        v.push(f64::from(i as f32 * 0.0021));
    }
    for i in -4000..=4000 {
        v.push(f64::from(i as f32 * 1e-4));
        v.push(f64::from(1.0 + i as f32 * 6e-8));
        v.push(f64::from(88.5 + i as f32 * 1e-4));
        v.push(f64::from(-103.5 + i as f32 * 1e-3));
    }
    v.extend([f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 0.0, -0.0]);
    v
}

#[test]
fn functions_stay_within_their_ulps() {
    let x = points();
    let n = x.len() as u64;
    let input = Array::new(DType::F32, &[n], x.clone()).unwrap();
    let mut wrong = Vec::new();
    for isa in isas() {
        for op in UnaryOp::ALL {
            if op == UnaryOp::Not {
                continue;
            }
            let text = format!(
                "plan f[N] {{\n input X: f32[N]\n output Y: f32[N]\n kernel f {{\n grid i in N block 4096\n \
                 store Y[i] = {}(X[i]) over i\n }}\n}}\n",
                op.name()
            );
            let plan = parse(&text).unwrap_or_else(|d| panic!("{d}\n{text}"));
            let c = compile(&plan, &isa).unwrap();
            let y = run(&c, &[n], std::slice::from_ref(&input), Split::Whole).remove(0);
            let mut worst = (0.0, 0.0, 0.0, 0.0);
            for (&x, &got) in x.iter().zip(&y.data) {
                // Arguments of sine and cosine are reduced in f64, which ends at 2^45 (documented).
                if matches!(op, UnaryOp::Sin | UnaryOp::Cos) && x.abs() > 2f64.powi(45) {
                    continue;
                }
                let want = op.eval(x);
                let rounded = DType::F32.round(want);
                if want.is_nan() || rounded.is_infinite() || got.is_nan() || got.is_infinite() {
                    let over = want.abs() > DType::F32.max_finite() * (1.0 - 1e-6) && got.abs() > 3.4e38;
                    if !(want.is_nan() && got.is_nan() || rounded == got || over) {
                        worst = (f64::INFINITY, x, want, got);
                    }
                    continue;
                }
                let ulps = (got - want).abs() / DType::F32.ulp(want);
                if ulps > worst.0 {
                    worst = (ulps, x, want, got);
                }
            }
            if worst.0 > op.ulps().max(0.5) {
                wrong.push(format!("{} on {} bytes: {worst:?}, allowed {}", op.name(), isa.vector_bytes, op.ulps()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Conversions to 8-bit floats round to the nearest, ties to even, over the whole range of f32, and every code of these
/// types is read as its value.
#[test]
fn eight_bit_floats_round_and_read_exactly() {
    for dtype in [DType::F8E4M3, DType::F8E5M2] {
        let mut x = points();
        // Halfway between neighbours, and a little to either side.
        for k in 0..4096 {
            let y = f64::from(k) * 2f64.powi(-18);
            let y = f64::from((1.0 + y * 64.0) as f32);
            x.extend((-18..18).flat_map(|e| [y * 2f64.powi(e), -y * 2f64.powi(e)]));
        }
        let n = x.len() as u64;
        let input = Array::new(DType::F32, &[n], x.clone()).unwrap();
        let text = format!(
            "plan f[N] {{\n input X: f32[N]\n output Y: {dtype}[N]\n output Z: f32[N]\n kernel f {{\n \
             grid i in N block 4096\n store Y[i] = X[i] over i\n }}\n kernel g {{\n grid i in N block 4096\n \
             store Z[i] = Y[i] over i\n }}\n}}\n"
        );
        let plan = parse(&text).unwrap_or_else(|d| panic!("{d}\n{text}"));
        for isa in isas() {
            let c = compile(&plan, &isa).unwrap();
            let out = run(&c, &[n], std::slice::from_ref(&input), Split::Whole);
            for (i, &x) in x.iter().enumerate() {
                let want = dtype.round(x);
                for got in [out[0].data[i], out[1].data[i]] {
                    let right = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                    assert!(right, "{dtype} on {} bytes: {x} became {got}, not {want}", isa.vector_bytes);
                }
            }
        }
    }
}

/// Random numbers are Philox's to the last bit, whatever lanes compute them.
#[test]
fn random_numbers_are_the_evaluators() {
    let text = "plan f[N, M] {\n input s: i64[]\n output Y: f32[N, M]\n output Z: f32[N]\n kernel f {\n \
                grid i in N block 3\n grid j in M block 64\n store Y[i, j] = rand(s[], i, j, 7, i * 5) over i, j\n }\n \
                kernel g {\n grid i in N block 1\n store Z[i] = rand(-3, i, 0, 0, 0) over i\n }\n}\n";
    let text = text.replace("i64[]", "i64");
    let plan = parse(&text).unwrap_or_else(|d| panic!("{d}\n{text}"));
    for isa in isas() {
        let c = compile(&plan, &isa).unwrap();
        for seed in [0, 1, -1, 0x1234_5678_9abc_i64] {
            let (n, m) = (7, 131);
            let out = run(&c, &[n, m], &[Array::scalar(DType::I64, seed as f64)], Split::Each);
            for (k, got) in out[0].data.iter().enumerate() {
                let (i, j) = (k as i64 / m as i64, k as i64 % m as i64);
                assert_eq!(*got, philox::uniform(seed, [i, j, 7, i * 5]), "{seed} at {i}, {j}");
            }
            for (i, got) in out[1].data.iter().enumerate() {
                assert_eq!(*got, philox::uniform(-3, [i as i64, 0, 0, 0]));
            }
        }
    }
}
