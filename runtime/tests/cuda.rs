//! The CUDA run time on a hand-written kernel. Without a driver every test checks the one sentence that says so; with
//! a device they run on it.

use std::sync::Arc;
use std::time::Instant;

use einfall_ir::arena::Arena;
use einfall_ir::artifact::{Artifact, Code, GpuLaunch, Launch, Slot};
use einfall_ir::cascade::{Rank, RankId, Size};
use einfall_ir::diag::Span;
use einfall_ir::dtype::DType;
use einfall_ir::tile::{Buffer, BufferId, BufferKind};
use einfall_runtime::cuda::{Arguments, CudaError, DeviceArray, Engine, EngineOptions, Executable, Stream};
use einfall_runtime::{Error, HostArray};

/// y[i] = a * x[i] + y0[i] over tasks of 128 threads; `STRIDE` bytes from element to element of y.
const SAXPY: &str = r#"
.version 7.0
.target sm_80
.address_size 64
.visible .entry saxpy(.param .b64 p_y, .param .b64 p_x, .param .b64 p_y0, .param .b64 p_a, .param .b64 p_n)
.maxntid 128
{
    .reg .pred %p;
    .reg .b32 %r<4>;
    .reg .b64 %d<12>;
    .reg .f64 %g;
    .reg .f32 %f<5>;
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %tid.x;
    mad.lo.u32 %r2, %r0, 128, %r1;
    cvt.u64.u32 %d0, %r2;
    ld.param.b64 %d1, [p_n];
    setp.ge.u64 %p, %d0, %d1;
    @%p ret;
    ld.param.b64 %d2, [p_y];
    ld.param.b64 %d3, [p_x];
    ld.param.b64 %d4, [p_y0];
    ld.param.f64 %g, [p_a];
    shl.b64 %d5, %d0, 2;
    add.u64 %d6, %d2, %d5;
    add.u64 %d7, %d3, %d5;
    add.u64 %d8, %d4, %d5;
    ld.global.f32 %f0, [%d7];
    ld.global.f32 %f1, [%d8];
    cvt.rn.f32.f64 %f2, %g;
    fma.rn.f32 %f3, %f2, %f0, %f1;
    st.global.f32 [%d6], %f3;
    ret;
}
"#;

fn artifact(text: &str) -> Artifact {
    let mut ranks: Arena<RankId, Rank> = Arena::new();
    let n = ranks.push(Rank { name: "N".into(), fixed: None, span: Span::default() });
    let mut buffers: Arena<BufferId, Buffer> = Arena::new();
    let mut buffer = |name: &str, dims, kind| {
        buffers.push(Buffer { name: name.into(), dtype: DType::F32, dims, kind, positive: false })
    };
    let x = buffer("x", vec![Size::Rank(n)], BufferKind::Input);
    let y0 = buffer("y0", vec![Size::Rank(n)], BufferKind::Input);
    let a = buffer("a", vec![], BufferKind::Input);
    let y = buffer("y", vec![Size::Rank(n)], BufferKind::Output);
    let launch = Launch {
        symbol: "saxpy".into(),
        slots: vec![Slot::Base(y), Slot::Base(x), Slot::Base(y0), Slot::Scalar(a), Slot::Extent(n)],
        grid: vec![Size::CeilDiv(Box::new(Size::Rank(n)), Box::new(Size::Const(128)))],
        ordered: false,
        scratch_bytes: Size::Const(0),
        reads: vec![x, y0, a],
        writes: vec![y],
        flops: Size::Rank(n),
        bytes: Size::Rank(n),
        gpu: Some(GpuLaunch {
            threads: 128,
            cluster: vec![],
            shared_bytes: 0,
            cooperative: false,
            dependent: false,
            counters: vec![],
            maps: vec![],
            variant_of: None,
            assumes: vec![],
        }),
    };
    let code = Code::Ptx { text: text.into(), arch: "sm_80".into() };
    Artifact {
        name: "saxpy".into(),
        target: "gpu".into(),
        ranks,
        buffers,
        code,
        launches: vec![launch],
        defaults: vec![],
        facts: vec![],
    }
}

/// The first device; without one, checks that the reason is one sentence.
fn engine(cache: Option<std::path::PathBuf>) -> Option<Engine> {
    match Engine::new(&EngineOptions { index: 0, cache }) {
        Ok(engine) => Some(engine),
        Err(e) => {
            assert!(matches!(
                &e,
                Error::Cuda(CudaError::NoDriver | CudaError::NoDevice { .. } | CudaError::Call { .. })
            ));
            assert!(!e.to_string().contains('\n'), "{e}");
            None
        }
    }
}

fn load(engine: &Engine, text: &str) -> Result<Arc<Executable>, Error> {
    // SAFETY: the kernel above keeps to the convention.
    unsafe { engine.load(artifact(text)) }
}

struct Case {
    stream: Stream,
    x: DeviceArray,
    y0: DeviceArray,
    y: DeviceArray,
}

impl Case {
    fn new(engine: &Engine, n: u64) -> Case {
        let stream = engine.stream().unwrap();
        let host = |k: f32| {
            let data: Vec<f32> = (0..n).map(|i| i as f32 * k).collect();
            HostArray::from_slice(&data, &[n]).unwrap()
        };
        let x = engine.upload(&stream, &host(1.0)).unwrap();
        let y0 = engine.upload(&stream, &host(0.5)).unwrap();
        let y = engine.array(DType::F32, &[n]).unwrap();
        y.fill(&stream, 0xff).unwrap();
        Case { stream, x, y0, y }
    }

    fn arguments(&self) -> Arguments<'static> {
        Arguments::new().input("x", &self.x).input("y0", &self.y0).output("y", &self.y).scalar("a", 2.0)
    }
}

#[test]
fn one_code_serves_fifty_sizes_and_graphs_replay() {
    let Some(engine) = engine(None) else { return };
    let executable = load(&engine, SAXPY).unwrap();
    for n in (0..49).map(|i| i * 37).chain([1 << 20]) {
        let case = Case::new(&engine, n);
        let bound = executable.bind(&[("N", n)]).unwrap();
        let prepared = bound.prepare(&case.arguments()).unwrap();
        assert_eq!(prepared.symbols().len(), usize::from(n > 0));
        prepared.launch(&case.stream).unwrap();
        let check = || {
            let y = case.y.to_host(&case.stream).unwrap();
            assert!(y.as_slice::<f32>().unwrap().iter().enumerate().all(|(i, y)| *y == i as f32 * 2.5), "{n}");
        };
        check();
        let graph = prepared.graph().unwrap();
        drop(prepared);
        case.y.fill(&case.stream, 0xff).unwrap();
        graph.launch(&case.stream).unwrap();
        check();
    }
    assert_eq!(engine.assembled(), 1, "one compilation for every size");
}

#[test]
fn a_launch_takes_at_most_five_microseconds() {
    let Some(engine) = engine(None) else { return };
    let executable = load(&engine, SAXPY).unwrap();
    let case = Case::new(&engine, 128);
    let prepared = executable.bind(&[("N", 128)]).unwrap().prepare(&case.arguments()).unwrap();
    prepared.launch(&case.stream).unwrap();
    case.stream.synchronize().unwrap();
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        let start = Instant::now();
        for _ in 0..200 {
            prepared.launch(&case.stream).unwrap();
        }
        best = best.min(start.elapsed().as_secs_f64() / 200.0);
        case.stream.synchronize().unwrap();
    }
    println!("{:.2} microseconds a launch", best * 1e6);
    assert!(best < 5e-6, "{best}");
}

#[test]
fn code_comes_from_the_cache_the_second_time() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("cache");
    for assembled in [1, 0] {
        let Some(engine) = engine(Some(folder.clone())) else { return };
        let executable = load(&engine, SAXPY).unwrap();
        assert_eq!(engine.assembled(), assembled);
        assert!(executable.functions().all(|f| f.registers > 0 && f.local_bytes == 0));
    }
}

#[test]
fn arrays_that_do_not_fit_are_refused() {
    let Some(engine) = engine(None) else { return };
    let executable = load(&engine, SAXPY).unwrap();
    let case = Case::new(&engine, 256);
    let bound = executable.bind(&[("N", 256)]).unwrap();
    let refused = |a: &Arguments| bound.prepare(a).unwrap_err().to_string();
    let over = Arguments::new().input("x", &case.y).input("y0", &case.y0).output("y", &case.y).scalar("a", 1.0);
    assert!(refused(&over).contains("`y` is written and overlaps `x`"));
    let missing = Arguments::new().input("x", &case.x).output("y", &case.y).scalar("a", 1.0);
    assert!(refused(&missing).contains("`y0`"));
    let bf16 = engine.array(DType::BF16, &[256]).unwrap();
    assert!(refused(&case.arguments().input("z", &bf16)).contains("there is no input `z`"));
    let wrong = Arguments::new().input("x", &bf16).input("y0", &case.y0).output("y", &case.y).scalar("a", 1.0);
    assert!(refused(&wrong).contains("bf16 is given"));
    // Nor is another device's memory this one's.
    if let Ok(second) = Engine::new(&EngineOptions { index: 1, cache: None }) {
        let elsewhere = second.array(DType::F32, &[256]).unwrap();
        let foreign = Arguments::new().input("x", &elsewhere).input("y0", &case.y0).output("y", &case.y);
        assert!(refused(&foreign.scalar("a", 1.0)).contains("`x` is on CUDA device 1"));
    }
    // Host memory is not device memory.
    let host = vec![0f32; 256];
    // SAFETY: the array is refused before anything reads it.
    let array = unsafe { DeviceArray::from_raw(&engine, DType::F32, host.as_ptr() as u64, &[256], &[1]) }.unwrap();
    let foreign = Arguments::new().input("x", &array).input("y0", &case.y0).output("y", &case.y).scalar("a", 1.0);
    assert!(refused(&foreign).contains("`x` is in"), "{}", refused(&foreign));
    // SAFETY: as above.
    let odd = unsafe { DeviceArray::from_raw(&engine, DType::F32, case.x.address() + 2, &[8], &[1]) };
    assert!(odd.unwrap_err().to_string().contains("not aligned"));
    assert!(matches!(executable.bind(&[("N", 1 << 31)]), Err(Error::Cuda(CudaError::Extent { .. }))));
}

#[test]
fn memory_that_cannot_be_had_is_given_back() {
    let Some(engine) = engine(None) else { return };
    let (before, total) = engine.memory().unwrap();
    let first = engine.array(DType::U8, &[before / 2]).unwrap();
    let error = engine.array(DType::U8, &[total]).unwrap_err();
    assert!(matches!(error, CudaError::Memory { .. }), "{error}");
    drop(first);
    let (after, _) = engine.memory().unwrap();
    assert!(after + (64 << 20) >= before, "{before} {after}");
    // What a launch's first arrays took is given back when a later one cannot be had.
    let executable = load(&engine, SAXPY).unwrap();
    let bound = executable.bind(&[("N", i32::MAX as u64)]).unwrap();
    let room = 3 * i32::MAX as u64 * 4;
    if before > 2 * room {
        let filler = engine.array(DType::U8, &[before - room]).unwrap();
        let (start, _) = engine.memory().unwrap();
        let all = ["x", "y0", "y"].map(|name| bound.array(name));
        assert!(
            all.iter().any(Result::is_ok) && all.iter().any(Result::is_err),
            "some fit into {start} bytes, not all"
        );
        drop(all);
        let (end, _) = engine.memory().unwrap();
        assert!(end + (64 << 20) >= start, "{start} {end}");
        drop(filler);
    }
    // The engine is still of use.
    let executable = load(&engine, SAXPY).unwrap();
    assert!(executable.bind(&[("N", 5)]).is_ok());
}

#[test]
fn code_that_cannot_be_is_refused_with_the_log() {
    let Some(engine) = engine(None) else { return };
    let error = load(&engine, &SAXPY.replace("fma.rn.f32", "fmo.rn.f32")).unwrap_err();
    assert!(error.to_string().contains("fmo"), "the log names the line: {error}");
    let error = load(&engine, &SAXPY.replace(".version 7.0", ".version 99.0")).unwrap_err();
    assert!(matches!(error, Error::Cuda(CudaError::OldAssembler { .. })), "{error}");
    let mut other = artifact(SAXPY);
    other.code = Code::Ptx { text: SAXPY.into(), arch: "sm_70a".into() };
    // SAFETY: it is refused.
    let error = unsafe { engine.load(other) }.unwrap_err();
    assert!(matches!(error, Error::Cuda(CudaError::Arch { .. })), "{error}");
}

/// In a process of its own, as the failure is for good: see `a_failed_kernel_is_named_once`.
#[test]
fn a_failed_kernel_is_named_once() {
    const CHILD: &str = "EINFALL_TEST_FAILING_KERNEL";
    if std::env::var_os(CHILD).is_none() {
        if engine(None).is_some() {
            let exe = std::env::current_exe().unwrap();
            let args = ["--exact", "a_failed_kernel_is_named_once", "--nocapture"];
            let out = std::process::Command::new(exe).args(args).env(CHILD, "1").output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        }
        return;
    }
    let engine = engine(None).unwrap();
    // Every thread stores through an address that is none.
    let bad = load(&engine, &SAXPY.replace("[%d6], %f3", "[%d0], %f3")).unwrap();
    let case = Case::new(&engine, 256);
    let prepared = bad.bind(&[("N", 256)]).unwrap().prepare(&case.arguments()).unwrap();
    prepared.launch(&case.stream).unwrap();
    let error = case.stream.synchronize().unwrap_err();
    assert!(matches!(&error, CudaError::Kernel { names, .. } if names == &["saxpy"]), "{error}");
    for error in [prepared.launch(&case.stream).unwrap_err(), engine.synchronize().unwrap_err()] {
        assert!(matches!(&error, CudaError::Refused { names, .. } if names == &["saxpy"]), "{error}");
    }
    assert!(matches!(engine.array(DType::F32, &[4]), Err(CudaError::Refused { .. })));
}
