//! What is cached comes back as it was made, for just what decides it, and nothing harmful ever comes back.

use std::cell::Cell;

use super::*;
use einfall_codegen::backend::llvm::{self, Isa};
use einfall_codegen::pipeline::Context;
use einfall_codegen::tables;
use einfall_ir::cascade::parse;
use einfall_ir::target::DataSheet;

const SOFTMAX: &str = "cascade soft[M, N](x: f32[M, N]) -> (y: f32[M, N]) {
    a[m]   = max(n) x[m,n]
    e[m,n] = exp(x[m,n] - a[m])
    s[m]   = sum(n) e[m,n]
    y[m,n] = e[m,n] / s[m]
}";

fn cascade(text: &str) -> Cascade {
    parse(text).unwrap_or_else(|d| panic!("{d:?}")).cascades.remove(0)
}

/// Lowered for a processor, without LLVM; none where something has no lowering yet.
fn try_lowered(cascade: &Cascade) -> Option<Compiled> {
    let plan = crate::plan(cascade).ok()?;
    let mapping = einfall_autotune::model_cpu::choose(&plan, &DataSheet::cpu());
    let context = Context { mapping: Some(mapping.clone()), isa: Some(Isa::AVX512), ..Context::default() };
    let (plan, module) = crate::lowering::lower(tables::CPU, &plan, &context).ok()?;
    let artifact = llvm::print(&plan, &module, &Isa::AVX512, "cpu").ok()?;
    Some(Compiled { plan, mapping, artifact })
}

fn lowered(cascade: &Cascade) -> Compiled {
    try_lowered(cascade).expect("it has a lowering")
}

/// With what stands for its loaded code: the artifact.
fn loaded(made: Compiled) -> (Compiled, Artifact) {
    let artifact = made.artifact.clone();
    (made, artifact)
}

/// As texts and bytes, in which places in a source do not count.
fn form(c: &Compiled) -> (String, String, Vec<u8>) {
    (c.plan.to_string(), c.mapping.to_string(), c.artifact.to_bytes().unwrap())
}

fn cache() -> (tempfile::TempDir, Cache) {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(&folder.path().join("cache")).unwrap();
    (folder, cache)
}

#[test]
fn every_library_cascade_survives_its_bytes() {
    let mut n = 0;
    for (_, text) in einfall_kernels::SOURCES {
        let c = cascade(text);
        let Some(made) = try_lowered(&c) else { continue };
        let read = Compiled::from_bytes(&made.to_bytes().unwrap()).unwrap();
        assert_eq!(form(&read), form(&made), "{}", c.name);
        n += 1;
    }
    assert!(n > 20, "{n} cascades");
}

#[test]
fn the_second_compilation_is_a_look_up() {
    let (_folder, cache) = cache();
    let (c, options) = (cascade(SOFTMAX), CompileOptions::default());
    let here = Surroundings::new(&["a processor"]);
    let made = Cell::new(0);
    let compile = |here: &Surroundings, c: &Cascade, options: &CompileOptions| {
        let make = || {
            made.set(made.get() + 1);
            Ok(loaded(lowered(c)))
        };
        let (plan, mapping, artifact) = here.compile(Some(&cache), c, options, make, Ok).unwrap();
        (made.take(), form(&Compiled { plan, mapping, artifact }))
    };
    let (first, expected) = compile(&here, &c, &options);
    assert_eq!(first, 1);
    assert_eq!(compile(&here, &c, &options), (0, expected.clone()));
    // Layout and comments of the text, and places, do not count.
    let other = cascade(&format!("// again\n\n{}", SOFTMAX.replace("    ", "  ")));
    assert_eq!(compile(&here, &other, &options), (0, expected));
    // All else does.
    let fixed = crate::with_statics(&c, &[("N".to_owned(), 64)]).unwrap();
    assert_eq!(compile(&here, &fixed, &options).0, 1, "a fixed extent");
    assert_eq!(compile(&here, &cascade(&SOFTMAX.replace("soft", "smax")), &options).0, 1, "the name");
    assert_eq!(compile(&here, &cascade(&SOFTMAX.replace("exp(", "exp(2.0 * ")), &options).0, 1, "the text");
    let sized = CompileOptions { sizes: vec![("N".to_owned(), 64)], ..options.clone() };
    assert_eq!(compile(&here, &c, &sized).0, 1, "sizes");
    let mapped = CompileOptions { mapping: Some(lowered(&c).mapping), ..options.clone() };
    assert_eq!(compile(&here, &c, &mapped).0, 1, "a mapping");
    assert_eq!(compile(&Surroundings::new(&["another"]), &c, &options).0, 1, "the device");
    assert_eq!(compile(&Surroundings::new(&["a processor", "table"]), &c, &options).0, 1, "a table");
    assert_eq!(compile(&here, &c, &options).0, 0, "all of them lie side by side");
}

/// Whole by the cache's own hash, and yet not what was put there.
#[test]
fn a_damaged_plan_is_compiled_again() {
    let (_folder, cache) = cache();
    let (c, options, here) = (cascade(SOFTMAX), CompileOptions::default(), Surroundings::new(&[]));
    let whole = lowered(&c).to_bytes().unwrap();
    let key = here.key(&c, &options);
    let compile = || {
        let made = Cell::new(false);
        let make = || {
            made.set(true);
            Ok(loaded(lowered(&c)))
        };
        let (_, _, artifact) = here.compile(Some(&cache), &c, &options, make, Ok).unwrap();
        assert_eq!(artifact.to_bytes().unwrap(), lowered(&c).artifact.to_bytes().unwrap());
        made.get()
    };
    for bytes in [&whole[..whole.len() - 1], &[&whole[..], b"!"].concat(), b"", b"\xff\xff\xff\xff\xff\xff"] {
        cache.put(&key, bytes).unwrap();
        assert!(compile(), "{} of {} bytes were taken", bytes.len(), whole.len());
        assert!(!compile(), "what was made again is not in the cache");
    }
    // An artifact of another version of the contract.
    let mut foreign = whole.clone();
    let at = foreign.windows(8).position(|w| w == b"einfall\0").unwrap() + 8;
    foreign[at] ^= 1;
    cache.put(&key, &foreign).unwrap();
    assert!(compile(), "another version was taken");
    // One that reads and that the engine refuses.
    cache.put(&key, &whole).unwrap();
    let refuse = Cell::new(true);
    let load = |a: Artifact| match refuse.replace(false) {
        true => Err(Error::Internal("it does not link".to_owned())),
        false => Ok(a),
    };
    assert!(here.compile(Some(&cache), &c, &options, || Ok(loaded(lowered(&c))), load).is_ok());
}

#[test]
fn no_bytes_panic() {
    let text = "cascade twice[N](x: f32[N]) -> (y: f32[N]) { y[n] = 2.0 * x[n] }";
    let whole = lowered(&cascade(text)).to_bytes().unwrap();
    for len in 0..whole.len() {
        assert!(Compiled::from_bytes(&whole[..len]).is_err(), "{len} bytes of {} were taken", whole.len());
    }
    for at in 0..whole.len() {
        for bit in [0x01, 0x10, 0x80] {
            let mut flipped = whole.clone();
            flipped[at] ^= bit;
            // The cache's hash refuses such an entry before it is read; reading it must not harm all the same.
            if let Ok(read) = Compiled::from_bytes(&flipped) {
                assert_eq!(read.artifact.check(), Ok(()));
            }
        }
    }
}
