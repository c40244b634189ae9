//! Each cascade of the encoder at small sizes against its float64 evaluation, within the bound of its declared types.

use einfall::ir::array::Array;
use einfall::ir::cascade::eval::{Options as EvalOptions, evaluate_bounds};
use einfall::ir::cascade::{self, Cascade};
use einfall::ir::dtype::DType;
use einfall::{CompileOptions, Engine, Options};
use minilm::encoder::TEXT;

/// Values in −1 to 1, the same every time.
fn values(seed: u64, i: usize) -> f64 {
    let x = (seed * 1_000_003 + i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    f64::from(DType::F32.round(((x >> 11) as f64 / (1u64 << 53) as f64) * 2.0 - 1.0) as f32)
}

/// Runs one cascade and compares every output element; `fixed` extents are fixed at compile time.
fn agrees(
    engine: &Engine,
    name: &str,
    fixed: &[(&str, u64)],
    sizes: &[(&str, u64)],
    integers: &dyn Fn(&str, usize) -> f64,
) {
    let module = cascade::parse(TEXT).expect("the text");
    let cascade: &Cascade = module.cascades.iter().find(|c| c.name == name).expect("the cascade");
    let statics = fixed.iter().map(|(r, n)| ((*r).to_owned(), *n)).collect();
    let kernel = engine.compile_with(cascade, &CompileOptions { statics, ..CompileOptions::default() }).expect(name);
    let bound = kernel.bind(sizes).expect(name);
    let cascade = kernel.cascade();
    let extents = &bound.bindings().extents;
    let mut inputs = Vec::new();
    for (seed, &p) in cascade.params.iter().enumerate() {
        let t = &cascade.tensors[p];
        if t.default.is_some() {
            continue;
        }
        let dims: Vec<u64> = t.dims.iter().map(|d| d.eval(extents).expect("an extent")).collect();
        inputs.push(Array::from_fn(t.dtype, &dims, |i| match t.dtype.is_int() {
            true => integers(&t.name, i),
            false => values(seed as u64, i),
        }));
    }
    let expected = evaluate_bounds(cascade, bound.bindings(), &inputs, &EvalOptions::default()).expect("evaluated");
    let arrays: Vec<_> = cascade
        .params
        .iter()
        .zip(&inputs)
        .map(|(p, a)| {
            (cascade.tensors[*p].name.as_str(), einfall::runtime::HostArray::from_values(a).expect("an array"))
        })
        .collect();
    let mut found: Vec<_> = bound
        .runtime()
        .arrays()
        .filter(|a| a.kind == einfall::ir::tile::BufferKind::Output)
        .map(|a| (a.name.to_owned(), einfall::runtime::HostArray::zeros(a.dtype, a.shape).expect("an array")))
        .collect();
    let mut arguments = einfall::runtime::Arguments::new();
    for (n, a) in &arrays {
        arguments = arguments.input(n, a.view());
    }
    for (n, a) in &mut found {
        arguments = arguments.output(n, a.view_mut());
    }
    bound.launch(arguments).expect(name);
    for (o, (output, found)) in found.iter().enumerate() {
        let expected = expected.output(o).expect("an output");
        for (i, (x, e)) in found.as_slice::<f32>().expect("f32").iter().zip(&expected.values).enumerate() {
            let error = (f64::from(*x) - e.x).abs();
            assert!(error <= e.e, "{name} {fixed:?} {sizes:?}: {output}[{i}] is {x}, not {} ± {:e}", e.x, e.e);
        }
    }
}

#[test]
fn every_cascade_agrees_with_its_evaluation() {
    let engine = Engine::new(&Options::default()).expect("an engine");
    let none = |_: &str, _: usize| 0.0;
    agrees(&engine, "similarity", &[("D", 48)], &[("I", 5), ("J", 5)], &none);
    let lengths = |_: &str, i: usize| [3.0, 7.0, 1.0][i % 3];
    agrees(&engine, "pool", &[("D", 40)], &[("B", 3), ("T", 7)], &lengths);
    let tokens = |_: &str, i: usize| ((i * 5 + 2) % 11) as f64;
    agrees(&engine, "embed", &[("D", 40), ("W", 11), ("P", 9), ("G", 2)], &[("B", 3), ("T", 7)], &tokens);
    for (h, e, f, t) in [(2, 16, 64, 7), (3, 8, 40, 19)] {
        agrees(&engine, "layer", &[("H", h), ("E", e), ("F", f)], &[("B", 3), ("T", t)], &lengths);
    }
}
