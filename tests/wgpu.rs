//! WebGPU on Mesa's lavapipe: the library against the evaluator at every size of subgroups, and what must be refused.
//!
//! Without lavapipe (`make vulkan`) these tests say that they are skipped.

use std::process::Command;

use einfall::wgpu::Engine;
use einfall_ir::array::Array;
use einfall_ir::cascade::parse;
use einfall_ir::dtype::DType;
use einfall_ir::mapping::KernelMapping;
use einfall_runtime::wgpu::WgpuError;

fn lavapipe() -> Option<Engine> {
    match Engine::new(Some("lavapipe")) {
        Ok(engine) => Some(engine),
        Err(einfall::Error::Runtime(einfall_runtime::Error::Wgpu(e @ WgpuError::NoAdapter { .. }))) => {
            eprintln!("SKIPPED: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn the_library_agrees_at_every_size_of_subgroups() {
    if lavapipe().is_none() {
        return;
    }
    // Seeds that draw sizes which every cascade has a variant for: sLSTM takes heads of up to 64.
    for (bits, subgroup, seed) in [(128, 4, 128), (256, 8, 256), (512, 16, 513)] {
        let out = Command::new(env!("CARGO_BIN_EXE_einfall"))
            .args(["selftest", "--device", "wgpu:lavapipe", "--sizes", "1", "--seed", &seed.to_string()])
            .env("LP_NATIVE_VECTOR_WIDTH", bits.to_string())
            .env("XDG_RUNTIME_DIR", std::env::temp_dir())
            .output()
            .expect("the binary runs");
        let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{bits} bits:\n{said}");
        assert!(said.contains(&format!("subgroups of {subgroup} to {subgroup}")), "{said}");
    }
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

/// A fact over a scalar holds for the value given at launch, not only for its default.
#[test]
fn scalars_that_break_a_fact_are_refused_before_a_launch() {
    let Some(engine) = lavapipe() else { return };
    let text = "cascade scaled[N](x: f32[N], s: f32 = 1.0) -> (y: f32[N]) {
        require s > 0
        y[n] = s * x[n]
    }";
    let c = parse(text).expect("parses").cascades.remove(0);
    let bound = engine.compile(&c).expect("compiles").bind(&[("N", 3)]).expect("binds");
    let (x, s) = (Array::from_fn(DType::F32, &[3], |i| i as f64), Array::scalar(DType::F32, -1.0));
    let refused = bound.run_values(&[("x", &x), ("s", &s)]).expect_err("s is below 0");
    assert!(matches!(refused, einfall::Error::Bind(_)), "{refused}");
    let y = engine.runtime().array(DType::F32, &[3]).expect("an array");
    let arguments = einfall_runtime::wgpu::Arguments::new().input("x", &y).output("y", &y).scalar("s", -1.0);
    let refused = bound.prepare(arguments).expect_err("s is below 0");
    assert!(matches!(refused, einfall::Error::Bind(_)), "{refused}");
    assert!(bound.run_values(&[("x", &x)]).is_ok());
}

/// A future's value; the thread sleeps until it is woken.
fn block_on<T>(future: impl Future<Output = T> + Send) -> T {
    struct Thread(std::thread::Thread);
    impl std::task::Wake for Thread {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Thread(std::thread::current())).into();
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
            std::task::Poll::Ready(value) => return value,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}

/// What a browser does: nothing blocks, and whoever runs the futures is woken when there is something to do.
#[test]
fn launches_without_blocking_agree_with_those_that_block() {
    if lavapipe().is_none() {
        return;
    }
    let options = einfall_runtime::wgpu::EngineOptions { name: Some("lavapipe".to_owned()) };
    let engine = block_on(einfall_runtime::wgpu::Engine::new_async(&options)).expect("an engine");
    assert!(block_on(einfall_runtime::wgpu::adapters_async()).contains(engine.adapter()));
    let text = "cascade c[M, N](x: f32[M, N], inout a: f32[M], s: f32 = 2.0) -> (y: f32[M]) {
        t[m] = sum(n) x[m,n] * x[m,n]
        y[m] = s * t[m] + a[m]
        a[m] = t[m]
    }";
    let c = parse(text).expect("parses").cascades.remove(0);
    let blocking = Engine::new(Some("lavapipe")).expect("an engine").compile(&c).expect("compiles");
    let bound = blocking.bind(&[("M", 33), ("N", 70)]).expect("binds");
    let x = Array::from_fn(DType::F32, &[33, 70], |i| (i % 17) as f64 - 8.0);
    let a = Array::from_fn(DType::F32, &[33], |i| i as f64);
    let expected = bound.run_values(&[("x", &x), ("a", &a)]).expect("runs");
    let hosts = [("x", &x), ("a", &a)].map(|(n, v)| (n, einfall_runtime::HostArray::from_values(v).expect("an array")));
    let inputs: Vec<_> = hosts.iter().map(|(n, h)| (*n, h)).collect();
    let found = block_on(bound.runtime().run_to_arrays_async(&inputs, &[("s", 2.0)])).expect("runs");
    assert_eq!(found, expected);
    assert!(found.iter().any(|(_, y)| y.to_values().expect("values").data.iter().any(|v| *v > 0.0)));

    // Piece by piece.
    let run = bound.runtime();
    let [dx, da, dy] = ["x", "a", "y"].map(|n| block_on(run.array_async(n)).expect("an array"));
    dx.copy_from(&hosts[0].1).expect("copies");
    da.copy_from(&hosts[1].1).expect("copies");
    let arguments = einfall_runtime::wgpu::Arguments::new().input("x", &dx).output("a", &da).output("y", &dy);
    let prepared = block_on(run.prepare_async(&arguments.scalar("s", 2.0))).expect("prepares");
    prepared.launch().expect("launches");
    block_on(prepared.synchronize_async()).expect("ends");
    for (name, array) in [("a", &da), ("y", &dy)] {
        let host = block_on(array.to_host_async(name)).expect("read back");
        let (_, expected) = expected.iter().find(|(n, _)| n == name).expect("an output");
        assert_eq!(&host, expected, "{name}");
    }
    // One array twice is seen, whatever numbers arrays have.
    let twice = einfall_runtime::wgpu::Arguments::new().input("x", &dx).output("a", &da).output("y", &da);
    let said = block_on(run.prepare_async(&twice.scalar("s", 2.0))).expect_err("an overlap").to_string();
    assert!(said.contains("`a`") && said.contains("`y`"), "{said}");

    engine.lose();
    let said = block_on(engine.array_async(DType::F32, &[4])).expect_err("lost");
    assert!(matches!(said, WgpuError::Lost { .. }), "{said}");
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

/// What `bench` is asked for and cannot time ends it; extents are fixed where it is told so.
#[test]
fn bench_says_by_its_exit_code_what_was_not_timed() {
    if lavapipe().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    for (name, text) in [
        ("ok.ein", "cascade scale[M, N](x: f32[M, N], s: f32) -> (y: f32[M, N]) { y[m,n] = s * x[m,n] }"),
        (
            "fixed.ein",
            "cascade fixed[M, N](x: f32[M, N]) -> (y: f32[M, N]) { require N == 32\n y[m,n] = 2.0 * x[m,n] }",
        ),
        ("blocks.ein", "cascade blocks[M](W: i8[M] scaled(f32, 32)) -> (y: f32[M]) { y[m] = f32(W[m]) }"),
        ("other.mapping", "mapping other on webgpu {\n kernel scale_0 {\n axis m block 4\n }\n}\n"),
    ] {
        std::fs::write(folder.path().join(name), text).expect("a file");
    }
    let bench = |args: &str| {
        let out = Command::new(env!("CARGO_BIN_EXE_einfall"))
            .args(["bench", "--device", "wgpu:lavapipe", "--budget-ms", "5", "--jsonl"])
            .args(args.split_whitespace())
            .current_dir(folder.path())
            .env("XDG_RUNTIME_DIR", std::env::temp_dir())
            .output()
            .expect("the binary runs");
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        (out.status.code(), text(&out.stdout), text(&out.stderr))
    };
    for args in ["ok.ein --size M=64,N=32", "ok.ein --size M=64 --static N=32", "fixed.ein --size M=64 --static N=32"] {
        let (code, out, said) = bench(args);
        assert!(code == Some(0) && out.lines().count() == 1 && out.contains("M=64,N=32"), "{args}: {out}{said}");
    }
    for (args, expected, says) in [
        ("ok.ein --size M=64,N=32 --static N=33", 1, "33"),
        ("ok.ein --size M=64,N=32 --static Q=33", 2, "there is no rank `Q`"),
        ("fixed.ein --size M=64,N=33", 1, "N == 32"),
        ("blocks.ein --size M=64", 1, "blocks.ein"),
        ("ok.ein --size M=64,N=32 --mapping other.mapping", 1, "other.mapping"),
        ("--family norm --mapping other.mapping", 2, "the plan of no case"),
    ] {
        let (code, out, said) = bench(args);
        assert!(code == Some(expected) && out.is_empty() && said.contains(says), "{args}: {code:?} {out}{said}");
    }
}

/// A cascade's results on random arrays at some sizes, within the computed tolerance.
fn agrees(kernel: &einfall::wgpu::Kernel, c: &einfall_ir::cascade::Cascade, sizes: &[(&str, u64)]) {
    use einfall_ir::cascade::bind::{Given, bind};
    use einfall_ir::cascade::eval;
    use einfall_ir::tolerance::expect;
    use einfall_ir::tolerance::inputs::{Variant, random};

    let given = sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
    let b = bind(c, &Given { sizes: given, ..Given::default() }).expect("the sizes fit");
    let inputs = random(c, &b, 7, Variant::Normal).expect("inputs");
    let expected = expect(c, &b, &inputs, &eval::Options::default()).expect("the evaluator runs");
    let named: Vec<(&str, &Array)> =
        c.params.iter().zip(&inputs).map(|(p, x)| (c.tensors[*p].name.as_str(), x)).collect();
    let found = kernel.bind(sizes).expect("binds").run_values(&named).expect("runs");
    for (e, (name, y)) in expected.iter().zip(&found) {
        e.compare(&y.to_values().expect("values").data).unwrap_or_else(|why| panic!("{name} at {sizes:?}: {why}"));
    }
}

/// Where a launch has few tasks at the sizes to be fast at, its stream is cut over more, and a second launch merges what
/// they leave: right at these sizes and at others.
#[test]
fn streams_are_cut_where_there_are_few_tasks() {
    let Some(engine) = lavapipe() else { return };
    let matmul = "cascade c[M, N, K](A: T[M,K], B: T[K,N]) -> (Y: f32[M,N]) {
        Y[m,n] = sum(k) A[m,k] * B[k,n]
    }";
    let decode = "cascade c[B, M, N, E](Q: T[B,M,E], K: T[B,N,E], V: T[B,N,E]) -> (O: f32[B,M,E]) {
        S[b,m,n] = (sum(e) Q[b,m,e] * K[b,n,e]) / sqrt(E)
        X[b,m]   = max(n) S[b,m,n]
        P[b,m,n] = exp(S[b,m,n] - X[b,m])
        L[b,m]   = sum(n) P[b,m,n]
        O[b,m,e] = (sum(n) P[b,m,n] * V[b,n,e]) / L[b,m]
    }";
    type Sizes<'a> = &'a [(&'a str, u64)];
    let cases: [(&str, Sizes<'_>, &[Sizes<'_>]); 4] = [
        (matmul, &[("M", 1), ("N", 130), ("K", 1000)], &[&[("M", 5), ("N", 1), ("K", 33)]]),
        (matmul, &[("M", 16), ("N", 64), ("K", 512)], &[&[("M", 1), ("N", 70), ("K", 1)]]),
        (
            decode,
            &[("B", 2), ("M", 1), ("N", 333), ("E", 64)],
            &[&[("B", 1), ("M", 3), ("N", 1), ("E", 33)], &[("B", 1), ("M", 2), ("N", 64), ("E", 60)]],
        ),
        (decode, &[("B", 1), ("M", 1), ("N", 512), ("E", 128)], &[&[("B", 3), ("M", 1), ("N", 129), ("E", 100)]]),
    ];
    for dtype in ["f32", "bf16", "f16"] {
        for (text, sizes, others) in cases {
            let c = parse(&text.replace(": T[", &format!(": {dtype}["))).expect("parses").cascades.remove(0);
            let fast = sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
            let options = einfall::CompileOptions { sizes: fast, ..einfall::CompileOptions::default() };
            let kernel = engine.compile_with(&c, &options).expect("compiles");
            // By tasks that a second dispatch joins, or, where rows are few, by the warps of a task.
            let by_tasks = |m: &KernelMapping| m.split.as_ref().is_some_and(|s| s.parts > 1);
            let by_warps = |m: &KernelMapping| m.axis("k").is_some_and(|k| k.units > 1);
            let cut = kernel.mapping().kernels.iter().any(|m| by_tasks(m) || by_warps(m));
            assert!(cut, "{sizes:?}: {}", kernel.mapping());
            agrees(&kernel, &c, sizes);
            others.iter().for_each(|sizes| agrees(&kernel, &c, sizes));
            // Without sizes nothing says that tasks are few.
            let any = engine.compile(&c).expect("compiles");
            assert!(any.mapping().kernels.iter().all(|m| m.split.is_none()));
        }
    }
}

/// Every number of f16 is read as it is; what lies between two is rounded to the nearer one, in a tie to the even one.
#[test]
fn f16_is_read_and_rounded_by_its_bits() {
    let Some(engine) = lavapipe() else { return };
    let c = |from: &str, to: &str| {
        let text = format!("cascade c[N](x: {from}[N]) -> (y: {to}[N]) {{ y[n] = x[n] }}");
        parse(&text).expect("parses").cascades.remove(0)
    };
    let convert = |c: &einfall_ir::cascade::Cascade, x: &Array| {
        let bound = engine.compile(c).expect("compiles").bind(&[("N", x.data.len() as u64)]).expect("binds");
        bound.run_values(&[("x", x)]).expect("runs").remove(0).1.to_values().expect("values").data
    };
    let number = |code: u32| {
        let (e, m) = ((code >> 10) & 31, f64::from(code & 1023));
        let size = if e == 0 { m * 2f64.powi(-24) } else { (1024.0 + m) * 2f64.powi(e as i32 - 25) };
        if code < 0x8000 { size } else { -size }
    };
    let finite: Vec<f64> = (0..0x1_0000u32).filter(|c| (c >> 10) & 31 < 31).map(number).collect();
    let mut all = finite.clone();
    all.extend([f64::INFINITY, f64::NEG_INFINITY]);
    let halves = Array::from_fn(DType::F16, &[all.len() as u64], |i| all[i]);
    assert_eq!(convert(&c("f16", "f32"), &halves), all);
    // Numbers, ties and both sides of each; beyond the largest, too.
    let mut between: Vec<f64> = Vec::new();
    for code in 0..0x7c00u32 {
        let (low, high) = (number(code), if code == 0x7bff { 65536.0 } else { number(code + 1) });
        let tie = (low + high) / 2.0;
        let near = f64::from(f32::from_bits((tie as f32).to_bits() + 1));
        let under = f64::from(f32::from_bits((tie as f32).to_bits() - 1));
        between.extend([low, under, tie, near, -under, -tie, -near]);
    }
    between.extend([f64::INFINITY, f64::NEG_INFINITY, 1e30, -1e30, 1e-30]);
    let x = Array::from_fn(DType::F32, &[between.len() as u64], |i| between[i]);
    let want: Vec<f64> = between.iter().map(|v| DType::F16.round(*v)).collect();
    let found = convert(&c("f32", "f16"), &x);
    for (i, (have, want)) in found.iter().zip(&want).enumerate() {
        assert_eq!(have, want, "{:e}", between[i]);
    }
    let nan = Array::from_fn(DType::F32, &[3], |i| if i == 1 { f64::NAN } else { 1.0 });
    assert!(convert(&c("f32", "f16"), &nan).iter().enumerate().all(|(i, v)| v.is_nan() == (i == 1)));
}
