//! WebGPU on Mesa's lavapipe: the library against the evaluator at every size of subgroups, and what must be caught.
//!
//! Without lavapipe (`make vulkan`) these tests say that they are skipped.

use std::process::Command;

use einfall::wgpu::{Engine, compile_wgsl, wgsl_plan};
use einfall_codegen::backend::wgsl::Target;
use einfall_ir::array::Array;
use einfall_ir::artifact::Code;
use einfall_ir::cascade::bind::{Given, bind};
use einfall_ir::cascade::{Cascade, eval, parse};
use einfall_ir::dtype::DType;
use einfall_ir::tolerance::expect;
use einfall_ir::tolerance::inputs::{Variant, random};
use einfall_runtime::HostArray;
use einfall_runtime::wgpu::WgpuError;

fn lavapipe() -> Option<Engine> {
    match Engine::new(Some("lavapipe")) {
        Ok(engine) => Some(engine),
        Err(e) => {
            eprintln!("SKIPPED: {e}");
            None
        }
    }
}

fn library(name: &str) -> Cascade {
    parse(einfall_kernels::source(name).expect("a library file")).expect("parses").cascades.remove(0)
}

/// Runs a compiled artifact at sizes on inputs of a seed; whether the outputs are those of the evaluator.
fn agrees(
    engine: &Engine,
    c: &Cascade,
    artifact: einfall_ir::artifact::Artifact,
    sizes: &[(&str, u64)],
    seed: u64,
) -> Result<bool, einfall_runtime::Error> {
    let given = Given { sizes: sizes.iter().map(|(n, v)| (n.to_string(), *v)).collect(), ..Given::default() };
    let b = bind(c, &given).expect("sizes");
    let inputs = random(c, &b, seed, Variant::Normal).expect("inputs");
    let expected = expect(c, &b, &inputs, &eval::Options::default()).expect("evaluates");
    let (mut arrays, mut scalars) = (Vec::new(), Vec::new());
    for (p, a) in c.params.iter().zip(&inputs) {
        let name = c.tensors[*p].name.as_str();
        match a.dims.is_empty() {
            true => scalars.push((name, a.data[0])),
            false => arrays.push((name, HostArray::from_values(a).expect("an array"))),
        }
    }
    let arrays: Vec<(&str, &HostArray)> = arrays.iter().map(|(n, a)| (*n, a)).collect();
    // SAFETY: code generation made the artifact; what a test takes out of it are barriers.
    let executable = unsafe { engine.runtime().load(artifact)? };
    let outputs = executable.bind(sizes)?.run_to_arrays(&arrays, &scalars)?;
    Ok(expected.iter().all(|e| {
        let (_, got) = outputs.iter().find(|(n, _)| *n == e.name).expect("an output");
        e.compare(&got.to_values().expect("values").data).is_ok()
    }))
}

#[test]
fn the_library_agrees_at_every_size_of_subgroups() {
    if lavapipe().is_none() {
        return;
    }
    for (bits, subgroup) in [(128, 4), (256, 8), (512, 16)] {
        let out = Command::new(env!("CARGO_BIN_EXE_einfall"))
            .args(["selftest", "--device", "wgpu:lavapipe", "--sizes", "1", "--seed", &bits.to_string()])
            .env("LP_NATIVE_VECTOR_WIDTH", bits.to_string())
            .env("XDG_RUNTIME_DIR", std::env::temp_dir())
            .output()
            .expect("the binary runs");
        let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{bits} bits:\n{said}");
        assert!(said.contains(&format!("subgroups of {subgroup} to {subgroup}")), "{said}");
    }
}

/// Every barrier of a kernel of rows is needed: without one, results are wrong. Sums are compared, as a softmax does not
/// depend on its maximum. Subgroups run in lockstep, so the test runs itself again where they are smallest.
#[test]
fn a_missing_barrier_is_caught() {
    let Some(engine) = lavapipe() else { return };
    if std::env::var("LP_NATIVE_VECTOR_WIDTH").as_deref() != Ok("128") {
        let again = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "a_missing_barrier_is_caught"])
            .env("LP_NATIVE_VECTOR_WIDTH", "128")
            .output()
            .expect("runs");
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stdout));
        return;
    }
    let target = Target::of(engine.data_sheet()).expect("an adapter").without_subgroups();
    let mut removed = 0;
    for (name, sizes) in [("rmsnorm", vec![("M", 5), ("K", 301)])] {
        let c = library(name);
        let plan = wgsl_plan(&c).expect("a plan");
        let mapping = einfall_autotune::model_gpu::choose(&plan, engine.data_sheet(), None);
        let artifact = compile_wgsl(&plan, &mapping, &target).expect("compiles");
        assert!(agrees(&engine, &c, artifact.clone(), &sizes, 1).expect("runs"), "{name}");
        let Code::Wgsl { modules } = &artifact.code else { panic!("no WGSL") };
        for (i, module) in modules.iter().enumerate() {
            // Workgroup memory keeps what the launch before left: other inputs each time, or that would be right.
            let mut seed = 1;
            let mut with = |text: String| {
                seed += 1;
                let mut other = artifact.clone();
                let Code::Wgsl { modules } = &mut other.code else { panic!("no WGSL") };
                modules[i].text = text;
                agrees(&engine, &c, other, &sizes, seed)
            };
            // Only the variant that these sizes choose is made.
            if with("nothing".to_owned()).is_ok() {
                continue;
            }
            for (at, found) in module.text.match_indices("workgroupBarrier();") {
                let mut text = module.text.clone();
                // Where arrays are read again their own barrier follows, at which invocations meet as well.
                let rest = &text[at + found.len()..];
                let second = if rest.trim_start().starts_with("storageBarrier();") {
                    rest.find(';').map_or(0, |n| n + 1)
                } else {
                    0
                };
                text.replace_range(at..at + found.len() + second, "");
                removed += 1;
                assert!(!with(text).expect("runs"), "{name}, module {i}, byte {at}");
            }
        }
    }
    assert!(removed > 0);
}

#[test]
fn hostile_indices_read_nothing_outside() {
    let Some(engine) = lavapipe() else { return };
    let text = "cascade pick[N, V, D](table: f32[V, D], at: i32[N]) -> (y: f32[N, D]) { y[n,d] = table[at[n],d] }";
    let c = parse(text).expect("parses").cascades.remove(0);
    let kernel = engine.compile(&c).expect("compiles");
    let at = [0.0, -1.0, 2.0, 3.0, f64::from(i32::MAX), f64::from(i32::MIN), 1.0];
    let table = Array::from_fn(DType::F32, &[3, 5], |i| 1.0 + i as f64);
    let index = Array::from_fn(DType::I32, &[7], |i| at[i]);
    let bound = kernel.bind(&[("N", 7), ("V", 3), ("D", 5)]).expect("binds");
    let y = bound.run_values(&[("table", &table), ("at", &index)]).expect("runs").remove(0).1;
    let y = y.to_values().expect("values").data;
    for (n, at) in at.iter().enumerate() {
        for d in 0..5 {
            let inside = (0.0..3.0).contains(at);
            let expected = if inside { 1.0 + at * 5.0 + d as f64 } else { 0.0 };
            assert_eq!(y[n * 5 + d], expected, "row {n}");
        }
    }
}

#[test]
fn adapters_are_picked_by_name_and_a_lost_device_is_an_error() {
    let error = Engine::new(Some("no such adapter")).expect_err("refused").to_string();
    assert!(error.starts_with("no adapter's name contains `no such adapter`; "), "{error}");
    let Some(engine) = lavapipe() else { return };
    assert!(engine.runtime().array(DType::F32, &[4]).is_ok());
    let huge = engine.runtime().array(DType::F32, &[1 << 40]).expect_err("too large").to_string();
    assert!(huge.contains("maxStorageBufferBindingSize"), "{huge}");
    engine.runtime().lose();
    let error = engine.runtime().array(DType::F32, &[4]).expect_err("lost");
    assert!(matches!(error, WgpuError::Lost { .. }), "{error}");
    // The process goes on.
    assert!(lavapipe().is_some_and(|e| e.runtime().array(DType::F32, &[4]).is_ok()));
}
