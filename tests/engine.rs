//! The facade end to end, on shapes the library's cascades do not have.
#![cfg(feature = "cpu")]

use einfall::ir::array::Array;
use einfall::ir::cascade::{eval, parse};
use einfall::ir::dtype::DType;
use einfall::ir::tolerance::{expect, inputs};
use einfall::{Engine, Options};

/// Results without dimensions, stored, returned, and read again by a later kernel.
#[test]
fn scalars_are_results_too() {
    let text = "cascade chain[N, M](x: f32[N], z: f32[M]) -> (d: f32[], y: f32[M], u: f32[N]) {
        d = sum(n) x[n] * x[n]
        w = sum(m) z[m]
        y[m] = z[m] * d + w
        u[n] = x[n] / (1.0 + d)
    }";
    let module = parse(text).unwrap_or_else(|d| panic!("{d:?}"));
    let c = &module.cascades[0];
    let kernel = Engine::new(&Options::default()).unwrap().compile(c).unwrap();
    for (seed, sizes) in [[("N", 50), ("M", 37)], [("N", 1), ("M", 1)], [("N", 0), ("M", 3)]].iter().enumerate() {
        let bound = kernel.bind(sizes).unwrap();
        let given = inputs::random(c, bound.bindings(), seed as u64, inputs::Variant::Normal).unwrap();
        let outputs = bound.run_values(c, &given).unwrap();
        let expected = expect(c, bound.bindings(), &given, &eval::Options::default()).unwrap();
        assert_eq!(outputs.len(), expected.len());
        for (e, (name, got)) in expected.iter().zip(&outputs) {
            assert_eq!(e.name, *name);
            e.compare(&e.elements(&got.to_values().unwrap())).unwrap_or_else(|m| panic!("{sizes:?}: {m}"));
        }
    }
}

/// A fact over a scalar holds for the value given at launch, not only for its default.
#[test]
fn scalars_that_break_a_fact_are_refused_at_launch() {
    use einfall::runtime::Arguments;
    let text = "cascade scaled[N](x: f32[N], s: f32 = 1.0) -> (y: f32[N]) {
        require s > 0
        y[n] = s * x[n]
    }";
    let module = parse(text).unwrap_or_else(|d| panic!("{d:?}"));
    let kernel = Engine::new(&Options::default()).unwrap().compile(&module.cascades[0]).unwrap();
    let bound = kernel.bind(&[("N", 3)]).unwrap();
    let refused = bound.launch(Arguments::new().scalar("s", -1.0)).unwrap_err();
    assert!(matches!(refused, einfall::Error::Bind(_)), "{refused}");
    let given = [Array::from_fn(DType::F32, &[3], |i| i as f64), Array::scalar(DType::F32, -1.0)];
    let refused = bound.run_values(&module.cascades[0], &given).unwrap_err();
    assert!(matches!(refused, einfall::Error::Bind(_)), "{refused}");
}

/// A gather is charged for the rows it reaches, at most the table.
#[test]
fn gathers_are_charged_by_rows() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/embedding.ein")).unwrap();
    let module = parse(&text).unwrap_or_else(|d| panic!("{d:?}"));
    let kernel = Engine::new(&Options::default()).unwrap().compile(&module.cascades[0]).unwrap();
    for (n, w, rows) in [(8, 30_000, 8), (8, 3, 3)] {
        let bound = kernel.bind(&[("N", n), ("W", w), ("D", 16)]).unwrap();
        let bytes: u64 = bound.runtime().kernels().map(|k| k.bytes).sum();
        assert_eq!(bytes, rows * 16 * 2 + n * 4 + n * 16 * 2, "{n} of {w}");
    }
}

/// The second engine on a cache folder compiles nothing, and its kernels do what the first one's do.
#[test]
fn a_warm_cache_gives_the_same_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { cache: Some(folder.path().join("cache")), ..Options::default() };
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/softmax.ein")).unwrap();
    let mut runs = Vec::new();
    for _ in 0..2 {
        let module = parse(&text).unwrap_or_else(|d| panic!("{d:?}"));
        let c = &module.cascades[0];
        let engine = Engine::new(&options).unwrap();
        let kernel = engine.compile(c).unwrap();
        let bound = kernel.bind(&[("M", 5), ("N", 77)]).unwrap();
        let given = inputs::random(c, bound.bindings(), 3, inputs::Variant::Normal).unwrap();
        let outputs = bound.run_values(c, &given).unwrap();
        for (e, (_, got)) in
            expect(c, bound.bindings(), &given, &eval::Options::default()).unwrap().iter().zip(&outputs)
        {
            e.compare(&e.elements(&got.to_values().unwrap())).unwrap_or_else(|m| panic!("{m}"));
        }
        let bytes: Vec<Vec<u8>> = outputs.iter().map(|(_, a)| a.bytes().to_vec()).collect();
        let usage = engine.runtime().cache().expect("a cache").usage().unwrap();
        runs.push((bytes, usage, kernel.plan().to_string(), kernel.mapping().to_string()));
    }
    assert_eq!(runs[0], runs[1]);
    assert_eq!(runs[0].1.entries, 2, "a plan and an object");
}
