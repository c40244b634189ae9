//! Kernels with known results, and planted faults that must be caught.

use super::*;
use crate::kernel::*;
use crate::layout::Distribution;
use crate::ops::BinaryOp;

fn global(name: &str, dims: &[i64], param: usize, written: bool) -> Buf {
    Buf {
        name: name.to_string(),
        dtype: DType::F32,
        dims: dims.iter().map(|d| Expr::Int(*d)).collect(),
        space: BufSpace::Global { param, written },
    }
}

/// c = a + b in blocks of 16; every task adds one block, the last one bounded.
fn vector_add(n: i64) -> Kernel {
    let mut k = Kernel {
        name: "add".to_string(),
        grid: vec![Expr::Int((n + 15) / 16)],
        cluster: Vec::new(),
        bufs: Arena::new(),
        frags: Arena::new(),
        barriers: Arena::new(),
        vars: Arena::new(),
        roles: Vec::new(),
    };
    let bufs = [("a", false), ("b", false), ("c", true)].map(|(s, w)| {
        let param = k.bufs.len();
        k.bufs.push(global(s, &[n], param, w))
    });
    let frags = ["x", "y", "z"].map(|s| {
        let dist = Distribution::vectors(&[16], Some(0), 8);
        k.frags.push(Frag { name: s.to_string(), dtype: DType::F32, dist })
    });
    let at = Expr::Grid(0).bin(BinaryOp::Mul, Expr::Int(16));
    let view = |buf| View { buf, stage: None, at: vec![at.clone()], walk: vec![Some((0, 1))] };
    let bounds = vec![Bound { dim: 0, limit: Expr::Int(n).bin(BinaryOp::Sub, at.clone()) }];
    let x = |f| Expr::Frag { frag: f, dims: vec![0] };
    k.roles.push(Role {
        name: "main".to_string(),
        scope: Scope::Thread,
        units: 1,
        regs: None,
        body: vec![
            Stmt::Load { out: frags[0], src: view(bufs[0]), bounds: bounds.clone() },
            Stmt::Load { out: frags[1], src: view(bufs[1]), bounds: bounds.clone() },
            Stmt::Map { out: frags[2], value: x(frags[0]).bin(BinaryOp::Add, x(frags[1])) },
            Stmt::Store { dst: view(bufs[2]), src: frags[2], bounds, join: None },
        ],
    });
    k
}

#[test]
fn vector_add_with_a_tail() {
    let k = vector_add(37);
    let data = |s: f64| (0..37).map(|i| f64::from(i) * s).collect::<Vec<_>>();
    let mut buffers = vec![
        GlobalBuffer::new(&[37], DType::F32, data(1.0)),
        GlobalBuffer::new(&[37], DType::F32, data(100.0)),
        GlobalBuffer::undefined(&[37], DType::F32),
    ];
    let stats = run(&k, &Arena::new(), &[], &mut buffers, &Options::default()).unwrap();
    assert_eq!(stats.tasks, 3);
    assert_eq!(buffers[2].data, data(101.0));
    assert!(buffers[2].defined.iter().all(|d| *d));
}

#[test]
fn overlapping_stores_of_tasks_race() {
    let mut k = vector_add(37);
    k.grid = vec![Expr::Int(2)];
    let Stmt::Store { dst, bounds, .. } = &mut k.roles[0].body[3] else { panic!() };
    (dst.at, *bounds) = (vec![Expr::Int(0)], Vec::new());
    let zeros = || GlobalBuffer::new(&[37], DType::F32, vec![0.0; 37]);
    let e = run(&k, &Arena::new(), &[], &mut [zeros(), zeros(), zeros()], &Options::default()).unwrap_err();
    assert_eq!(e.kind, ErrorKind::Race, "{e}");
    assert!(e.to_string().contains("`c`[0]"), "{e}");
}

fn read(source: &str) -> Module {
    let module = parse::parse(source).unwrap_or_else(|e| panic!("{}", crate::diag::render(&e, "kernel", source)));
    let printed = print::print(&module);
    assert!(parse::parse(&printed).as_ref() == Ok(&module), "{printed}");
    assert_eq!(print::print(&parse::parse(&printed).unwrap()), printed);
    module
}

/// Small integers, exact in every type.
fn numbers(n: u64, seed: u64) -> Vec<f64> {
    let mut rng = Rng(seed);
    (0..n).map(|_| rng.below(7) as f64 - 3.0).collect()
}

fn matmul(a: &[f64], b: &[f64], [m, n, k]: [u64; 3]) -> Vec<f64> {
    let (n, k) = (n as usize, k as usize);
    (0..m as usize * n).map(|i| (0..k).map(|l| a[i / n * k + l] * b[l * n + i % n]).sum()).collect()
}

/// C of a kernel over ranks M, N, K with arrays A, B, C.
fn gemm(module: &Module, kernel: &Kernel, size: [u64; 3], options: &Options) -> Result<Vec<f64>, KernelError> {
    let [m, n, k] = size;
    let dtype = kernel.bufs.iter().next().unwrap().1.dtype;
    let mut buffers = [
        GlobalBuffer::new(&[m, k], dtype, numbers(m * k, 1)),
        GlobalBuffer::new(&[k, n], dtype, numbers(k * n, 2)),
        GlobalBuffer::undefined(&[m, n], DType::F32),
    ];
    run(kernel, &module.ranks, &size, &mut buffers, options)?;
    assert!(buffers[2].defined.iter().all(|d| *d), "an element of C was not written");
    Ok(std::mem::take(&mut buffers[2].data))
}

fn expected([m, n, k]: [u64; 3]) -> Vec<f64> {
    matmul(&numbers(m * k, 1), &numbers(k * n, 2), [m, n, k])
}

fn options(schedule: Schedule, seed: u64) -> Options {
    Options { schedule, seed, rounding: false, tasks: None }
}

#[test]
fn blocked_matmul_with_scratch() {
    let module = read(include_str!("../testdata/matmul.kernel"));
    for size in [[8, 32, 5], [7, 19, 3], [1, 1, 1]] {
        let c = gemm(&module, &module.kernels[0], size, &Options::default()).unwrap();
        assert_eq!(c, expected(size));
    }
}

const PIPELINE: &str = include_str!("../testdata/pipeline.kernel");

#[test]
fn pipelined_gemm_under_every_schedule() {
    let module = read(PIPELINE);
    for schedule in Schedule::ALL {
        for (seed, size) in [[128, 64, 64], [256, 64, 320], [100, 72, 168]].into_iter().enumerate() {
            let c = gemm(&module, &module.kernels[0], size, &options(schedule, seed as u64));
            assert_eq!(
                c.unwrap_or_else(|e| panic!("{schedule:?} {size:?}: {e}")),
                expected(size),
                "{schedule:?} {size:?}"
            );
        }
    }
}

#[test]
fn named_barriers_order_ping_pong() {
    let module = read(include_str!("../testdata/ping_pong.kernel"));
    let want = (0..12).fold(1.0, |x, i| 2.0 * x + f64::from(i % 2));
    for schedule in Schedule::ALL {
        for seed in 0..5 {
            let mut out = [GlobalBuffer::undefined(&[1], DType::F32)];
            run(&module.kernels[0], &module.ranks, &[], &mut out, &options(schedule, seed)).unwrap();
            assert_eq!(out[0].data, [want]);
        }
    }
}

#[test]
fn multicast_in_a_cluster() {
    let module = read(include_str!("../testdata/multicast.kernel"));
    for schedule in Schedule::ALL {
        let size = [128, 128, 320];
        let c = gemm(&module, &module.kernels[0], size, &options(schedule, 7));
        assert_eq!(c.unwrap_or_else(|e| panic!("{schedule:?}: {e}")), expected(size), "{schedule:?}");
    }
}

/// The kernel with one piece of its text replaced fails under some schedule; returns all first errors.
fn planted(source: &str, from: &str, to: &str, size: [u64; 3]) -> Vec<String> {
    assert_eq!(source.matches(from).count(), 1, "`{from}` must stand once in the kernel");
    let module = read(&source.replace(from, to));
    let mut errors = Vec::new();
    for schedule in Schedule::ALL {
        for seed in 0..3 {
            match gemm(&module, &module.kernels[0], size, &options(schedule, seed)) {
                Ok(c) if c == expected(size) => {}
                Ok(_) => errors.push(format!("{schedule:?}: wrong result")),
                Err(e) => errors.push(format!("{schedule:?}: {e}")),
            }
        }
    }
    errors
}

/// Each fault must be caught, by an error that mentions `says`, under at least one schedule.
fn caught(from: &str, to: &str, says: &str) {
    let errors = planted(PIPELINE, from, to, [128, 64, 384]);
    assert!(errors.iter().any(|e| e.contains(says)), "`{from}` -> `{to}`: {:#?}", errors.first());
}

#[test]
fn a_missing_wait_is_a_race() {
    caught("wait full(s) phase k / 3 % 2", "", "Race");
    caught("wait empty(s) phase (k / 3 + 1) % 2", "", "Race");
}

#[test]
fn a_missing_arrive_is_a_deadlock() {
    caught("arrive empty((k - 1) % 3)", "", "Deadlock");
    caught("arrive full(s) expect 24576", "", "Deadlock");
    caught("bar_sync stored(0)", "", "Race");
}

#[test]
fn a_wrong_phase_is_caught() {
    caught("phase (k / 3 + 1) % 2", "phase k / 3 % 2", "Deadlock");
    caught("phase k / 3 % 2", "phase (k / 3 + 1) % 2", "Uninitialised");
}

#[test]
fn stages_off_by_one_are_caught() {
    caught("stages 3 layout (128:64, 64:1)", "stages 2 layout (128:64, 64:1)", "has no stage 2");
    caught("mbarrier full[3]", "mbarrier full[2]", "has no stage 2");
}

#[test]
fn a_stale_stage_is_caught() {
    let release = "if k > 0 {\n                    arrive empty((k - 1) % 3)\n                }";
    caught(release, "arrive empty(s)", "Race");
    caught("arrive empty((k - 1) % 3)", "arrive empty(k % 3)", "Deadlock");
    caught("mem As(s)[unit * 64", "mem As((k + 1) % 3)[unit * 64", "");
}

#[test]
fn missing_fences_are_caught() {
    caught("fence wgmma", "", "fence wgmma");
    caught("fence proxy_async", "", "fence proxy_async");
}

#[test]
fn touching_what_wgmma_owns_is_caught() {
    caught("wait_group wgmma 0", "", "wait_group is missing");
    caught("wait_group wgmma 1", "", "Race");
    caught("wait_group wgmma 1", "wait_group wgmma 2", "Race");
    caught("commit wgmma", "", "Race");
    caught("wait_group bulk 0", "", "in flight");
}

#[test]
fn wrong_byte_counts_are_caught() {
    caught("expect 24576", "expect 24560", "-16 bytes");
    caught("expect 24576", "expect 16384", "it expects too few");
    caught("expect 24576", "expect 24592", "Deadlock");
    caught("mbarrier full[3] count 1", "mbarrier full[3] count 2", "Deadlock");
    caught("mbarrier empty[3] count 2", "mbarrier empty[3] count 1", "");
}

#[test]
fn wrong_swizzles_are_caught() {
    let a = "stages 3 layout (128:64, 64:1) swizzle 128";
    caught(a, "stages 3 layout (128:64, 64:1) swizzle 64", "exceeds the swizzle span");
    caught(a, "stages 3 layout (128:64, 64:1) swizzle(3, 4, 4)", "no mode of the hardware");
    caught(a, "stages 3 layout (128:64, 64:1)", "contiguous");
    // Rows with a gap: TMA writes them dense, the descriptor finds no canonical layout.
    caught(a, "stages 3 layout (128:72, 64:1) swizzle 128", "");
}

#[test]
fn multicast_faults_are_caught() {
    let source = include_str!("../testdata/multicast.kernel");
    for (from, to, says) in [
        ("multicast 3", "multicast 1", "Deadlock"),
        ("arrive empty(s) remote 1", "", "Deadlock"),
        ("mbarrier empty[2] count 2", "mbarrier empty[2] count 1", ""),
        ("expect 16384", "expect 12288", ""),
        ("multicast 3", "multicast 7", "outside the cluster"),
    ] {
        let errors = planted(source, from, to, [128, 64, 384]);
        assert!(errors.iter().any(|e| e.contains(says)), "`{from}` -> `{to}`: {errors:#?}");
    }
}

/// Mutants of a kernel over M, N, K that no schedule catches.
fn survivors(source: &str, sizes: &[[u64; 3]]) -> Vec<String> {
    let module = read(source);
    let kernel = &module.kernels[0];
    let mut n = 0;
    let missed = mutate::mutants(kernel, &module.ranks).filter(|m| {
        n += 1;
        !sizes.iter().any(|size| {
            Schedule::ALL
                .into_iter()
                .any(|s| gemm(&module, &m.kernel, *size, &options(s, 3)).map_or(true, |c| c != expected(*size)))
        })
    });
    let missed = missed.map(|m| format!("{:?} {}", m.fault, m.place)).collect();
    assert!(n > 15);
    missed
}

// Waiting for the next stage's release in place of this one's is sound: consumers release stages in order, so the
// wait of the iteration before already covers this stage, and the next stage's release needs no later copy. The same
// holds for arrivals at the next stage's barrier, as long as all of a barrier's arrivals move together.
#[test]
fn every_other_mutant_of_the_pipeline_is_caught() {
    let sound = ["WrongStage producer.0.1: wait empty(s) phase (k / 3 + 1) % 2"];
    assert_eq!(survivors(PIPELINE, &[[128, 64, 384], [128, 64, 704]]), sound);
}

#[test]
fn every_other_mutant_of_the_cluster_kernel_is_caught() {
    let source = include_str!("../testdata/multicast.kernel");
    let sound = [
        "WrongStage producer.0.1: wait empty(s) phase (k / 2 + 1) % 2",
        "WrongStage consumer.0.7: arrive empty(s) remote 1",
    ];
    assert_eq!(survivors(source, &[[128, 64, 384]]), sound);
}
