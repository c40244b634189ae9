//! An artifact of two hand-written kernels through cache, binding and launch, and everything a launch refuses.

use einfall_ir::arena::{Arena, Id};
use einfall_ir::artifact::{Artifact, Code, Launch, Slot};
use einfall_ir::cascade::{Rank, RankId, Size};
use einfall_ir::diag::Span;
use einfall_ir::dtype::DType;
use einfall_ir::tile::{Buffer, BufferId, BufferKind};
use einfall_runtime::{Arguments, Bound, Engine, EngineOptions, Error, Executable, HostArray, View, ViewMut};
use std::sync::Arc;

/// Elements a task covers.
const BLOCK: u64 = 64;

/// `t[n] = x[n] + y[n]` then `z[n] = (s * t[n]) + k`, the second by way of scratch. x has a run-time stride.
const IR: &str = "
define void @add(ptr %slots, i64 %first, i64 %end, ptr %scratch) {
entry:
  %x = load ptr, ptr %slots
  %p1 = getelementptr i64, ptr %slots, i64 1
  %sx = load i64, ptr %p1
  %p2 = getelementptr i64, ptr %slots, i64 2
  %y = load ptr, ptr %p2
  %p3 = getelementptr i64, ptr %slots, i64 3
  %t = load ptr, ptr %p3
  %p4 = getelementptr i64, ptr %slots, i64 4
  %n = load i64, ptr %p4
  %from = mul i64 %first, 64
  %to0 = mul i64 %end, 64
  %to = call i64 @llvm.smin.i64(i64 %to0, i64 %n)
  br label %head
head:
  %i = phi i64 [ %from, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %to
  br i1 %more, label %body, label %done
body:
  %ix = mul i64 %i, %sx
  %px = getelementptr float, ptr %x, i64 %ix
  %py = getelementptr float, ptr %y, i64 %i
  %pt = getelementptr float, ptr %t, i64 %i
  %vx = load float, ptr %px
  %vy = load float, ptr %py
  %vt = fadd float %vx, %vy
  store float %vt, ptr %pt
  %next = add i64 %i, 1
  br label %head
done:
  ret void
}
define void @scale(ptr %slots, i64 %first, i64 %end, ptr %scratch) {
entry:
  %t = load ptr, ptr %slots
  %p1 = getelementptr i64, ptr %slots, i64 1
  %z = load ptr, ptr %p1
  %p2 = getelementptr i64, ptr %slots, i64 2
  %s64 = load double, ptr %p2
  %s = fptrunc double %s64 to float
  %p3 = getelementptr i64, ptr %slots, i64 3
  %k64 = load i64, ptr %p3
  %k = sitofp i64 %k64 to float
  %p4 = getelementptr i64, ptr %slots, i64 4
  %n = load i64, ptr %p4
  br label %task
task:
  %b = phi i64 [ %first, %entry ], [ %bnext, %stored ]
  %any = icmp slt i64 %b, %end
  br i1 %any, label %start, label %done
start:
  %from = mul i64 %b, 64
  %to0 = add i64 %from, 64
  %to = call i64 @llvm.smin.i64(i64 %to0, i64 %n)
  br label %head
head:
  %i = phi i64 [ %from, %start ], [ %next, %body ]
  %more = icmp slt i64 %i, %to
  br i1 %more, label %body, label %store
body:
  %j = sub i64 %i, %from
  %pt = getelementptr float, ptr %t, i64 %i
  %vt = load float, ptr %pt
  %vs = fmul float %vt, %s
  %pp = getelementptr float, ptr %scratch, i64 %j
  store float %vs, ptr %pp
  %next = add i64 %i, 1
  br label %head
store:
  br label %shead
shead:
  %i2 = phi i64 [ %from, %store ], [ %next2, %sbody ]
  %more2 = icmp slt i64 %i2, %to
  br i1 %more2, label %sbody, label %stored
sbody:
  %j2 = sub i64 %i2, %from
  %pp2 = getelementptr float, ptr %scratch, i64 %j2
  %v = load float, ptr %pp2
  %vz = fadd float %v, %k
  %pz = getelementptr float, ptr %z, i64 %i2
  store float %vz, ptr %pz
  %next2 = add i64 %i2, 1
  br label %shead
stored:
  %bnext = add i64 %b, 1
  br label %task
done:
  ret void
}
declare i64 @llvm.smin.i64(i64, i64)
";

fn artifact() -> Artifact {
    let mut ranks: Arena<RankId, Rank> = Arena::new();
    let n = ranks.push(Rank { name: "N".into(), fixed: None, span: Span::default() });
    let mut buffers: Arena<BufferId, Buffer> = Arena::new();
    let mut buffer =
        |name: &str, dtype, dims, kind| buffers.push(Buffer { name: name.into(), dtype, dims, kind, positive: false });
    let x = buffer("x", DType::F32, vec![Size::Rank(n)], BufferKind::Input);
    let y = buffer("y", DType::F32, vec![Size::Rank(n)], BufferKind::Input);
    let s = buffer("s", DType::F32, vec![], BufferKind::Input);
    let k = buffer("k", DType::I32, vec![], BufferKind::Input);
    let t = buffer("t", DType::F32, vec![Size::Rank(n)], BufferKind::Workspace);
    let z = buffer("z", DType::F32, vec![Size::Rank(n)], BufferKind::Output);
    let launch = |symbol: &str, slots, reads, writes| Launch {
        symbol: symbol.into(),
        slots,
        grid: vec![Size::CeilDiv(Box::new(Size::Rank(n)), Box::new(Size::Const(BLOCK)))],
        ordered: false,
        scratch_bytes: Size::Const(BLOCK * 4),
        reads,
        writes,
        // Large, so that even small cases go to the threads.
        flops: Size::Const(1 << 30),
        bytes: Size::Mul(Box::new(Size::Rank(n)), Box::new(Size::Const(12))),
        gpu: None,
    };
    let slots = vec![Slot::Base(x), Slot::Stride(x, 0), Slot::Base(y), Slot::Base(t), Slot::Extent(n)];
    let add = launch("add", slots, vec![x, y], vec![t]);
    let slots = vec![Slot::Base(t), Slot::Base(z), Slot::Scalar(s), Slot::Scalar(k), Slot::Extent(n)];
    let scale = launch("scale", slots, vec![t], vec![z]);
    let code = Code::LlvmIr(IR.into());
    Artifact {
        name: "pair".into(),
        target: "cpu".into(),
        ranks,
        buffers,
        code,
        launches: vec![add, scale],
        defaults: vec![],
        facts: vec![],
    }
}

fn engine(threads: usize) -> Engine {
    Engine::new(&EngineOptions { threads: Some(threads), ..EngineOptions::default() }).unwrap()
}

fn load(engine: &Engine, artifact: Artifact) -> Result<Arc<Executable>, Error> {
    // SAFETY: the kernels above keep to the convention.
    unsafe { engine.load(artifact) }
}

fn bound(n: u64) -> Bound {
    load(&engine(2), artifact()).unwrap().bind(&[("N", n)]).unwrap()
}

fn inputs(n: u64) -> (Vec<f32>, Vec<f32>) {
    ((0..n).map(|i| i as f32).collect(), (0..n).map(|i| (i * 7 % 13) as f32).collect())
}

#[test]
fn results_are_right_and_do_not_depend_on_the_threads() {
    for n in [1u64, 63, 64, 65, 1000, 12345] {
        let (x, y) = inputs(n);
        let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| 0.5 * (x + y) - 3.0).collect();
        for threads in [1, 2, 7] {
            let bound = load(&engine(threads), artifact()).unwrap().bind(&[("N", n)]).unwrap();
            for _ in 0..3 {
                let mut z = vec![f32::NAN; n as usize];
                let times = bound
                    .launch(
                        Arguments::new()
                            .input("x", View::dense(&x, &[n]).unwrap())
                            .input("y", View::dense(&y, &[n]).unwrap())
                            .scalar("s", 0.5)
                            .scalar("k", -3.0)
                            .output("z", ViewMut::dense(&mut z, &[n]).unwrap()),
                    )
                    .unwrap();
                assert_eq!(times.len(), 2);
                assert_eq!(z, expected, "N = {n}, {threads} threads");
            }
        }
    }
}

#[test]
fn strides_scalars_as_arrays_and_the_callers_workspace() {
    let n = 100u64;
    let (x, y) = inputs(2 * n);
    let bound = bound(n);
    assert_eq!(bound.workspace_bytes(), 448);
    let mut workspace = HostArray::zeros(DType::U8, &[bound.workspace_bytes()]).unwrap();
    let (s, k) = (HostArray::from_slice(&[2f32], &[]).unwrap(), HostArray::from_slice(&[5i32], &[]).unwrap());
    let mut z = vec![0f32; n as usize];
    bound
        .launch(
            Arguments::new()
                .input("x", View::new(&x, &[n], &[2]).unwrap())
                .input("y", View::dense(&y[..n as usize], &[n]).unwrap())
                .input("s", s.view())
                .input("k", k.view())
                .output("z", ViewMut::dense(&mut z, &[n]).unwrap())
                .workspace(workspace.bytes_mut()),
        )
        .unwrap();
    assert!((0..n as usize).all(|i| z[i] == 2.0 * (x[2 * i] + y[i]) + 5.0));
    assert!(workspace.bytes().iter().any(|b| *b != 0), "the caller's workspace was not used");
}

#[test]
fn zero_extents_launch_nothing() {
    let bound = bound(0);
    assert_eq!(bound.kernels().map(|k| k.tasks).collect::<Vec<_>>(), [0, 0]);
    let empty = HostArray::zeros(DType::F32, &[0]).unwrap();
    let outputs = bound.run_to_arrays(&[("x", &empty), ("y", &empty)], &[("s", 1.0), ("k", 0.0)]).unwrap();
    assert_eq!(outputs, [("z".to_string(), empty)]);
}

#[test]
fn sizes_are_checked_and_inferred() {
    let exe = load(&engine(1), artifact()).unwrap();
    assert!(matches!(exe.bind::<&str>(&[]), Err(Error::MissingRank { rank }) if rank == "N"));
    assert!(matches!(exe.bind(&[("M", 1)]), Err(Error::UnknownRank { rank, .. }) if rank == "M"));
    let error = exe.bind(&[("N", 4), ("N", 5)]).unwrap_err();
    assert!(matches!(error, Error::RankConflict { expected: 4, found: 5, .. }), "{error}");
    assert_eq!(exe.infer(&[("x", &[9])]).unwrap(), [("N".to_string(), 9)]);
    let error = exe.infer(&[("x", &[9]), ("y", &[8])]).unwrap_err();
    assert!(matches!(error, Error::RankConflict { expected: 9, found: 8, .. }), "{error}");
    assert!(matches!(exe.infer(&[("t", &[9])]), Err(Error::UnknownArray { .. })), "workspace is not an argument");
    assert!(matches!(exe.infer(&[("x", &[9, 9])]), Err(Error::Dimensions { expected: 1, found: 2, .. })));
    assert!(matches!(exe.bind(&[("N", 1 << 62)]), Err(Error::Array(_)) | Err(Error::Size { .. })));
    assert!(matches!(exe.bind(&[("N", u64::MAX)]), Err(Error::Array(_)) | Err(Error::Size { .. })));
}

#[test]
fn composite_extents_are_solved() {
    let mut a = artifact();
    let rank = |name: &str| Rank { name: name.into(), fixed: None, span: Span::default() };
    let (g, r) = (a.ranks.push(rank("G")), a.ranks.push(rank("R")));
    let mut dims = |name: &str, dims| {
        a.buffers.push(Buffer { name: name.into(), dtype: DType::F32, dims, kind: BufferKind::Input, positive: false })
    };
    let two = |a: Size, b: Size, f: fn(Box<Size>, Box<Size>) -> Size| f(Box::new(a), Box::new(b));
    dims("q", vec![two(Size::Rank(g), Size::Rank(r), Size::Mul)]);
    dims("keys", vec![Size::Rank(g), two(Size::Rank(r), Size::Const(1), Size::Add)]);
    let exe = load(&engine(1), a).unwrap();
    let infer = |shapes: &[(&str, &[u64])]| exe.infer(shapes);
    let of = |n: u64, m: u64| vec![("G".to_string(), n), ("R".to_string(), m)];
    assert_eq!(infer(&[("q", &[12]), ("keys", &[3, 5])]).unwrap(), of(3, 4));
    assert!(matches!(infer(&[("q", &[13]), ("keys", &[3, 5])]), Err(Error::Extent { found: 13, .. })));
    assert!(matches!(infer(&[("keys", &[3, 0])]), Err(Error::Extent { dim: 1, .. })));
}

#[test]
fn wrong_arguments_are_errors_before_anything_is_written() {
    let n = 10u64;
    let bound = bound(n);
    let (x, y) = inputs(n);
    let z = std::cell::RefCell::new(vec![-1f32; n as usize]);
    let vx = || View::dense(&x, &[n]).unwrap();
    let vy = || View::dense(&y, &[n]).unwrap();
    let scalars = || Arguments::new().scalar("s", 1.0).scalar("k", 1.0);
    fn with<'a>(a: Arguments<'a>, z: &'a mut [f32]) -> Arguments<'a> {
        let n = z.len() as u64;
        a.output("z", ViewMut::dense(z, &[n]).unwrap())
    }
    let refuse = |a: Arguments| {
        let error = bound.launch(a).unwrap_err();
        assert!(z.borrow().iter().all(|v| *v == -1.0), "{error} after writing");
        error
    };
    let error = refuse(with(scalars().input("x", vx()), &mut [-1f32; 10]));
    assert!(matches!(&error, Error::MissingArray { array, .. } if array == "y"), "{error}");
    let error = refuse(scalars().input("x", vx()).input("y", vy()));
    assert!(matches!(&error, Error::MissingArray { array, .. } if array == "z"), "{error}");
    let error = refuse(scalars().input("x", vx()).input("q", vy()));
    assert!(matches!(&error, Error::UnknownArray { array, .. } if array == "q"), "{error}");
    assert!(error.to_string().contains("`x`, `y`"), "{error}");
    let error = refuse(scalars().input("t", vx()));
    assert!(matches!(error, Error::UnknownArray { .. }), "workspace is not an argument: {error}");
    let error = refuse(scalars().input("x", vx()).input("x", vy()));
    assert!(matches!(&error, Error::Twice { array } if array == "x"), "{error}");
    let error = refuse(Arguments::new().scalar("x", 1.0));
    assert!(matches!(error, Error::UnknownArray { role: "scalar", .. }), "{error}");

    let wide = vec![0f64; 10];
    let error = refuse(scalars().input("x", View::dense(&wide, &[n]).unwrap()));
    assert!(matches!(error, Error::DType { expected: DType::F32, found: DType::F64, .. }), "{error}");
    let error = refuse(scalars().input("x", View::dense(&x[..9], &[9]).unwrap()));
    assert!(
        matches!(&error, Error::Shape { expected, found, .. } if expected[..] == [10] && found[..] == [9]),
        "{error}"
    );
    let error = refuse(scalars().input("x", View::dense(&x, &[5, 2]).unwrap()));
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    // x has a stride slot and y has none.
    assert!(matches!(refuse(scalars().input("y", View::new(&x, &[n], &[0]).unwrap())), Error::Strides { dim: 0, .. }));

    let mut shared = vec![1f32; 20];
    let base: *mut f32 = shared.as_mut_ptr();
    // SAFETY: both views are inside `shared`; the launch refuses them before it reads or writes.
    let (input, output) = unsafe {
        let input = View::from_raw(DType::F32, base.cast(), &[n], &[1]).unwrap();
        (input, ViewMut::from_raw(DType::F32, base.add(9).cast(), &[n], &[1]).unwrap())
    };
    let error = refuse(scalars().input("x", input).input("y", vy()).output("z", output));
    assert!(matches!(&error, Error::Overlap { written, other } if written == "z" && other == "x"), "{error}");

    let mut memory = HostArray::zeros(DType::U8, &[256]).unwrap();
    let mut out = z.borrow_mut();
    for range in [0..8, 1..129] {
        let a = with(scalars().input("x", vx()).input("y", vy()), &mut out).workspace(&mut memory.bytes_mut()[range]);
        assert!(matches!(bound.launch(a), Err(Error::Workspace { needed: 64, .. })));
    }
}

#[test]
fn malformed_artifacts_are_refused() {
    let engine = engine(1);
    let refuse = |change: &dyn Fn(&mut Artifact)| {
        let mut a = artifact();
        change(&mut a);
        load(&engine, a).unwrap_err()
    };
    let bad_slot = |slot| refuse(&move |a| a.launches[0].slots[0] = slot);
    let far = BufferId::new(99);
    for slot in [
        Slot::Base(far),
        Slot::Stride(BufferId::new(0), 1),
        Slot::Scalar(BufferId::new(0)),
        Slot::Extent(RankId::new(9)),
    ] {
        assert!(matches!(bad_slot(slot), Error::Artifact { .. }), "{slot:?}");
    }
    assert!(matches!(refuse(&|a| a.launches[0].grid = vec![Size::Rank(RankId::new(7))]), Error::Artifact { .. }));
    assert!(matches!(refuse(&|a| a.launches[1].symbol = "absent".into()), Error::Llvm(_)));
    assert!(matches!(refuse(&|a| a.code = Code::LlvmIr("nonsense".into())), Error::Llvm(_)));
    assert!(matches!(refuse(&|a| a.code = Code::Object(vec![1, 2, 3])), Error::Llvm(_)));
}

#[test]
fn objects_are_cached_and_a_damaged_one_is_rebuilt() {
    let folder = tempfile::tempdir().unwrap();
    let options = EngineOptions { cache: Some(folder.path().join("cache")), ..EngineOptions::default() };
    let engine = Engine::new(&options).unwrap();
    let cache = engine.cache().unwrap();
    load(&engine, artifact()).unwrap();
    let entry = std::fs::read_dir(cache.path()).unwrap().next().unwrap().unwrap().path();
    let whole = std::fs::read(&entry).unwrap();
    // What is on disk is used: an engine finds it, and the bytes do not change.
    load(&Engine::new(&options).unwrap(), artifact()).unwrap();
    assert_eq!((cache.usage().unwrap().entries, std::fs::read(&entry).unwrap()), (1, whole.clone()));
    let mut damaged = whole.clone();
    damaged[200] ^= 1;
    std::fs::write(&entry, damaged).unwrap();
    let exe = load(&engine, artifact()).unwrap();
    let one = HostArray::from_slice(&[1f32], &[1]).unwrap();
    let z =
        exe.bind(&[("N", 1)]).unwrap().run_to_arrays(&[("x", &one), ("y", &one)], &[("s", 4.0), ("k", 1.0)]).unwrap();
    assert_eq!(z[0].1.as_slice::<f32>().unwrap(), [9.0]);
    assert_eq!(std::fs::read(&entry).unwrap(), whole, "the entry was not rebuilt");
    // Other code is another entry.
    let mut other = artifact();
    other.code = Code::LlvmIr(IR.replace("fmul", "fdiv"));
    load(&engine, other).unwrap();
    assert_eq!(cache.usage().unwrap().entries, 2);
}

#[test]
fn a_cache_that_cannot_be_is_left_out() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let engine = Engine::new(&EngineOptions { cache: Some(file.path().join("cache")), ..EngineOptions::default() });
    let engine = engine.unwrap();
    assert!(engine.cache().is_none());
    load(&engine, artifact()).unwrap();
}

#[test]
fn no_llvm_is_an_error_that_helps() {
    let mut options = EngineOptions::default();
    (options.llvm.rustc, options.llvm.system) = (false, false);
    let error = Engine::new(&options).unwrap_err().to_string();
    assert!(error.contains("install"), "{error}");
}

#[test]
fn many_threads_launch_one_plan() {
    fn shared<T: Send + Sync>(_: &T) {}
    let n = 5000;
    let bound = bound(n);
    shared(&bound);
    shared(bound.executable());
    shared(&engine(1));
    std::thread::scope(|scope| {
        for s in 1..5 {
            let bound = &bound;
            scope.spawn(move || {
                let (x, y) = inputs(n);
                let (x, y) = (HostArray::from_slice(&x, &[n]).unwrap(), HostArray::from_slice(&y, &[n]).unwrap());
                for _ in 0..10 {
                    let z = bound.run_to_arrays(&[("x", &x), ("y", &y)], &[("s", s as f64), ("k", 0.0)]).unwrap();
                    let (x, y) = (x.as_slice::<f32>().unwrap(), y.as_slice::<f32>().unwrap());
                    let z = z[0].1.as_slice::<f32>().unwrap();
                    assert!((0..n as usize).all(|i| z[i] == s as f32 * (x[i] + y[i])));
                }
            });
        }
    });
}

#[test]
fn an_extra_input_is_refused() {
    let one = HostArray::from_slice(&[1f32], &[1]).unwrap();
    let bound = bound(1);
    let error = bound.run_to_arrays(&[("x", &one), ("y", &one), ("z", &one)], &[("s", 4.0), ("k", 1.0)]).unwrap_err();
    assert!(matches!(&error, Error::UnknownArray { array, role: "input", .. } if array == "z"), "{error}");
}
