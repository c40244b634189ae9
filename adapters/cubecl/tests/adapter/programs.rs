//! The library through cubecl, against the float64 evaluator; faults and wrong input.

use crate::common::{Case, cascade, draw, lavapipe, library, next, sized};
use einfall::ir::artifact::{Artifact, Code};
use einfall::ir::cascade::{Size, parse};
use einfall::ir::dtype::DType;
use einfall::ir::target::DataSheet;
use einfall::{CompileOptions, shaders};
use einfall_cubecl::{Array, Call, Program, Tuned, adapter};

/// Every cascade that has WGSL: several kernels, several outputs, arrays updated in place, narrow types, words or none.
#[test]
fn the_library_agrees_with_the_evaluator() {
    let Some(client) = lavapipe() else { return };
    let (mut state, mut ran, mut wrong, mut refused) = (0x9e37_79b9_7f4a_7c15u64, 0, Vec::new(), Vec::new());
    for (file, text) in einfall_kernels::SOURCES {
        for c in parse(text).expect("library files parse").cascades {
            let program = match Program::compile(&client, &c, &CompileOptions::default()) {
                Ok(program) => program,
                Err(einfall_cubecl::Error::Compile(e)) => {
                    refused.push(format!("{file}/{}: {e}", c.name));
                    continue;
                }
                Err(e) => panic!("{file}/{}: {e}", c.name),
            };
            let b = draw(&c, &mut state);
            let extents = b.extents.clone();
            match Case::new(&c, b, next(&mut state)).run(&program) {
                Ok(()) => ran += 1,
                Err(e) => wrong.push(format!("{file}/{} at {extents:?}: {e}", c.name)),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(ran >= 60, "{ran} ran; refused:\n{}", refused.join("\n"));
}

/// A program of an artifact.
fn load(client: &einfall_cubecl::Client, artifact: Artifact) -> Result<Program, einfall_cubecl::Error> {
    // SAFETY: code generation made it, and no test lets it reach further.
    unsafe { Program::load(client, artifact) }
}

/// The artifact that a program would hold.
fn artifact(client: &einfall_cubecl::Client, name: &str) -> Artifact {
    let sheet = shaders::data_sheet(&adapter(client));
    shaders::compile(&library(name), &sheet, &CompileOptions::default()).expect("it compiles")
}

/// Kernels that compute something else are seen: a grid without its last tasks, a loop that ends too early.
#[test]
fn planted_faults_are_caught() {
    let Some(client) = lavapipe() else { return };
    let c = library("matmul");
    let case = Case::new(&c, sized(&c, &[("M", 130), ("N", 70), ("K", 40)]), 3);
    let right = artifact(&client, "matmul");
    case.run(&load(&client, right.clone()).expect("loads")).expect("the kernel is right");

    let mut short = right.clone();
    for launch in &mut short.launches {
        let first = launch.grid[0].clone();
        launch.grid[0] = Size::Sub(Box::new(first), Box::new(Size::Const(1)));
    }
    let said = case.run(&load(&client, short).expect("loads")).expect_err("a part is missing");
    assert!(said.contains("NaN"), "{said}");

    let mut other = right;
    let Code::Wgsl { modules } = &mut other.code else { panic!("no WGSL") };
    let mut planted = 0;
    for module in modules {
        let text = module.text.replace("fma(", "max(0.0, ").replace("max(0.0, ", "fmx(");
        planted += text.matches("fmx(").count();
        module.text = format!("fn fmx(a: f32, b: f32, c: f32) -> f32 {{ return fma(a, b, c * 0.999); }}\n{text}");
    }
    assert!(planted > 0);
    case.run(&load(&client, other).expect("loads")).expect_err("sums are off by a thousandth");
}

#[test]
fn wrong_calls_are_refused_by_name() {
    let Some(client) = lavapipe() else { return };
    let c = cascade(
        "cascade scaled[M, N](x: f32[M, N], s: f32[M], k: f32 = 1.0) -> (y: f32[M, N]) {
            require k > 0
            y[m,n] = k * s[m] * x[m,n]
        }",
    );
    let program = Program::compile(&client, &c, &CompileOptions::default()).expect("compiles");
    let array = |dtype: DType, shape: &[u64]| Array::empty(&client, dtype, shape);
    let x = || array(DType::F32, &[3, 5]);
    let call = |s: Array| Call::new().array("x", x()).array("s", s);
    program.launch(call(array(DType::F32, &[3]))).expect("this one fits");
    let short = Array::new(client.empty(16), DType::F32, &[3, 5], &[5, 1]);
    for (call, says) in [
        (call(array(DType::F32, &[4])), "rank `M` is 3 and cannot be 4 (from dimension 0 of `s`)"),
        (call(array(DType::F32, &[3, 1])), "`s`"),
        (call(array(DType::F16, &[3])), "`s`"),
        (Call::new().array("x", x()), "`s`"),
        (call(array(DType::F32, &[3])).array("z", x()), "`z`"),
        (call(array(DType::F32, &[3])).output("z", x()), "`z`"),
        (call(array(DType::F32, &[3])).output("y", array(DType::F32, &[3, 4])), "`N`"),
        (call(array(DType::F32, &[3])).scalar("k", -1.0), "requires that k > 0"),
        (
            Call::new().array("x", short).array("s", array(DType::F32, &[3])),
            "`x` reaches beyond the 16 bytes that are bound",
        ),
    ] {
        let said = program.launch(call).expect_err(says).to_string();
        assert!(said.contains(says), "{said} (expected: {says})");
    }
}

/// What the device lacks is named before cubecl sees a kernel.
#[test]
fn missing_capabilities_are_refused_by_name() {
    let Some(client) = lavapipe() else { return };
    let device = adapter(&client);
    let of =
        |sheet: &DataSheet| shaders::compile(&library("softmax"), sheet, &CompileOptions::default()).expect("compiles");
    // cubecl offers no planes where a processor runs shaders.
    assert_eq!(device.subgroup, (0, 0));
    let nvidia = DataSheet::named("webgpu-nvidia").expect("a sheet");
    let said = load(&client, of(&nvidia)).expect_err("no subgroups").to_string();
    assert!(said.contains("needs subgroups of at least 32") && said.contains(&device.name), "{said}");

    let mut large = artifact(&client, "softmax");
    for launch in &mut large.launches {
        launch.gpu.as_mut().expect("a GPU's").shared_bytes = 1 << 20;
    }
    let said = load(&client, large).expect_err("too much workgroup memory").to_string();
    assert!(said.contains("`maxComputeWorkgroupStorageSize`") && said.contains("1048576"), "{said}");

    let mut own = artifact(&client, "softmax");
    let Code::Wgsl { modules } = &mut own.code else { panic!("no WGSL") };
    modules[0].bindings = einfall::ir::artifact::Bindings::Own;
    let said = load(&client, own).expect_err("bound otherwise").to_string();
    assert!(said.contains("`Own`") && said.contains("`Pooled`"), "{said}");

    let mut other = artifact(&client, "softmax");
    other.code = Code::Linked;
    let said = load(&client, other).expect_err("no WGSL").to_string();
    assert!(said.contains("is not WGSL"), "{said}");
}

/// Several mappings: each is right, cubecl takes one of them and takes it again.
#[test]
fn the_tuner_takes_one_of_several_mappings() {
    let Some(client) = lavapipe() else { return };
    let c = library("matmul");
    let sizes = [("M", 40), ("N", 64), ("K", 16)];
    let options = CompileOptions {
        sizes: sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect(),
        ..CompileOptions::default()
    };
    let tuned = Tuned::compile(&client, &c, &options, 4).expect("compiles");
    assert!(tuned.programs().len() > 1, "{tuned:?}");
    let case = Case::new(&c, sized(&c, &sizes), 5);
    for program in tuned.programs() {
        case.run(program).expect("every mapping agrees");
    }
    let first = tuned.pick(&case.call(&client)).expect("one of them");
    assert!(first < tuned.programs().len());
    case.compare(&client, &tuned.launch(case.call(&client)).expect("launches")).expect("the fastest agrees");
    assert_eq!(tuned.pick(&case.call(&client)).expect("one of them"), first);
    // Other sizes are measured anew, and what does not fit is an error, not cubecl's panic.
    let other = Case::new(&c, sized(&c, &[("M", 7), ("N", 3), ("K", 5)]), 6);
    other.compare(&client, &tuned.launch(other.call(&client)).expect("launches")).expect("agrees at other sizes");
    let said = tuned.launch(Call::new().array("A", Array::empty(&client, DType::F32, &[2, 2]))).expect_err("no B");
    assert!(said.to_string().contains('`'), "{said}");
    assert!(Tuned::new(Vec::new()).is_err());
}

/// Measuring does not touch arrays that are updated in place, and one that others hold is refused.
#[test]
fn arrays_updated_in_place_are_updated_once() {
    let Some(client) = lavapipe() else { return };
    let c = cascade("cascade add_rows[N, M](inout a: f32[N], x: f32[M], at: i32[M]) -> () { a[at[m]] += x[m] }");
    let options = CompileOptions::default();
    let one = || Program::compile(&client, &c, &options).expect("compiles");
    let tuned = Tuned::new(vec![("one".to_owned(), one()), ("another".to_owned(), one())]).expect("two programs");
    let put = |v: f32| {
        let bytes: Vec<u8> = (0..1000).flat_map(|_| v.to_le_bytes()).collect();
        Array::from_bytes(&client, DType::F32, &[1000], &bytes).expect("an array")
    };
    let at: Vec<u8> = (0..1000i32).flat_map(i32::to_le_bytes).collect();
    let at = Array::from_bytes(&client, DType::I32, &[1000], &at).expect("an array");
    let call = |a: Array| Call::new().array("a", a).array("x", put(2.0)).array("at", at.clone());
    let results = tuned.launch(call(put(1.0))).expect("launches");
    let expected: Vec<u8> = (0..1000).flat_map(|_| 3f32.to_le_bytes()).collect();
    assert_eq!(results[0].1.to_bytes(&client).expect("read back"), expected);
    let shared = put(1.0);
    let said = one().launch(call(shared.clone())).expect_err("shared");
    assert!(said.to_string().contains("`a` is updated in place"), "{said}");
    drop(shared);
}

/// Rows that are longer in memory than in the array: what lies between them is neither measured on nor written, and results
/// have the strides that were given.
#[test]
fn padded_rows_are_updated_in_place() {
    let Some(client) = lavapipe() else { return };
    let c = cascade("cascade more[M, N](inout a: f32[M, N], x: f32[M, N]) -> () { a[m,n] = a[m,n] + x[m,n] }");
    let one = || Program::compile(&client, &c, &CompileOptions::default()).expect("compiles");
    let tuned = Tuned::new(vec![("one".to_owned(), one()), ("another".to_owned(), one())]).expect("two programs");
    let (rows, columns, stride) = (5u64, 70u64, 96i64);
    let floats = |n: usize, of: &dyn Fn(usize) -> f32| (0..n).flat_map(|i| of(i).to_le_bytes()).collect::<Vec<u8>>();
    let memory = floats(480, &|i| i as f32);
    let a = Array::new(client.create_from_slice(&memory), DType::F32, &[rows, columns], &[stride, 1]);
    let twos = floats(350, &|_| 2.0);
    let x = Array::from_bytes(&client, DType::F32, &[rows, columns], &twos).expect("an array");
    let whole = a.clone();
    let said = tuned.launch(Call::new().array("a", a.clone()).array("x", x.clone())).expect_err("shared").to_string();
    assert!(said.contains("`a` is updated in place"), "{said}");
    drop(whole);
    let results = tuned.launch(Call::new().array("a", a).array("x", x)).expect("launches");
    let (_, result) = &results[0];
    assert_eq!((result.shape(), result.strides()), (&[rows, columns][..], &[stride, 1][..]));
    let expected = floats(350, &|i| (i / 70 * 96 + i % 70) as f32 + 2.0);
    assert_eq!(result.to_bytes(&client).expect("read back"), expected);
    // All of the buffer, as one row.
    let between = |strides: &[i64]| Array::new(result.handle().clone(), DType::F32, &[480], strides);
    let everything = between(&[1]).to_bytes(&client).expect("read back");
    let added = |i: usize| if i % 96 < 70 { 2.0 } else { 0.0 };
    assert_eq!(everything, floats(480, &|i| i as f32 + added(i)));
    let said = between(&[2]).to_bytes(&client).expect_err("beyond the buffer").to_string();
    assert!(said.contains("strides [2]"), "{said}");
}

/// Arrays whose rows are dense are read where they are; others are refused by name.
#[test]
fn strided_arrays_are_read_in_place() {
    let Some(client) = lavapipe() else { return };
    let c = cascade("cascade twice[B, M, N](x: f32[B, M, N]) -> (y: f32[B, M, N]) { y[b,m,n] = 2.0 * x[b,m,n] }");
    let program = Program::compile(&client, &c, &CompileOptions::default()).expect("compiles");
    let bytes: Vec<u8> = (0..60u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
    let handle = client.create_from_slice(&bytes);
    // [5,3,4] as [3,5,4].
    let x = Array::new(handle.clone(), DType::F32, &[3, 5, 4], &[4, 12, 1]);
    let results = program.launch(Call::new().array("x", x)).expect("launches");
    let y = results[0].1.to_bytes(&client).expect("read back");
    let y: Vec<f32> = y.chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("four"))).collect();
    let expected = (0..60).map(|i| (2 * (i / 20 * 4 + i / 4 % 5 * 12 + i % 4)) as f32);
    assert_eq!(y, expected.collect::<Vec<f32>>());
    for (strides, says) in [([1, 12, 3], "`x`"), ([-4, 12, 1], "`x` of [3, 5, 4] has strides [-4, 12, 1]")] {
        let x = Array::new(handle.clone(), DType::F32, &[3, 5, 4], &strides);
        let said = program.launch(Call::new().array("x", x)).expect_err("not dense").to_string();
        assert!(said.contains(says), "{said}");
    }
    let odd = Array::new(handle.offset_start(4), DType::F32, &[1, 1, 4], &[4, 4, 1]);
    let said = program.launch(Call::new().array("x", odd)).expect_err("an offset").to_string();
    assert!(said.contains("`x` starts at byte 4"), "{said}");
}
