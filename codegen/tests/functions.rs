//! Scalar functions in vector lanes, over the whole range of f32: within the ulps that the operator table allows, and
//! exact at infinities, NaN and zero.

mod common;

use common::{Split, compile, isas, run};
use einfall_ir::array::Array;
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
