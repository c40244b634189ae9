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
        space: BufSpace::Global { param, written, together: 1 },
    }
}

/// c = a + b in blocks of 16; every task adds one block, the last one bounded.
fn vector_add(n: i64) -> Kernel {
    let mut k = Kernel {
        name: "add".to_string(),
        variant_of: None,
        assumes: Vec::new(),
        dependent: false,
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
    assert!(n >= 8);
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
        // The second of two waits for both stages covers the first: arrivals at both come in order.
        "WrongStage producer.1.0: wait empty(k % 2) phase (k / 2 + 1) % 2",
        "WrongStage consumer.0.7: arrive empty(s) remote 1",
    ];
    assert_eq!(survivors(source, &[[128, 64, 384]]), sound);
}

#[test]
fn cp_async_and_warp_mma() {
    let source = include_str!("../testdata/warp_mma.kernel");
    let module = read(source);
    for schedule in Schedule::ALL {
        let c = gemm(&module, &module.kernels[0], [64, 32, 80], &options(schedule, 5));
        assert_eq!(c.unwrap_or_else(|e| panic!("{schedule:?}: {e}")), expected([64, 32, 80]));
    }
    assert_eq!(survivors(source, &[[32, 16, 80]]), [""; 0]);
}

fn attention(module: &Module, kernel: &Kernel, options: &Options) -> Result<f64, KernelError> {
    let (m, n) = (128, 256);
    let data = |len, seed| numbers(len, seed).into_iter().map(|x| x / 4.0).collect::<Vec<_>>();
    let (q, k, v) = (data(m * 64, 1), data(n * 64, 2), data(n * 64, 3));
    let mut buffers = [
        GlobalBuffer::new(&[m, 64], DType::BF16, q.clone()),
        GlobalBuffer::new(&[n, 64], DType::BF16, k.clone()),
        GlobalBuffer::new(&[n, 64], DType::BF16, v.clone()),
        GlobalBuffer::undefined(&[m, 64], DType::F32),
    ];
    run(kernel, &module.ranks, &[m, n], &mut buffers, options)?;
    let mut worst = 0f64;
    for i in 0..m as usize {
        let dot = |j: usize| (0..64).map(|e| q[i * 64 + e] * k[j * 64 + e]).sum::<f64>();
        let s: Vec<f64> = (0..n as usize).map(dot).collect();
        let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let p: Vec<f64> = s.iter().map(|x| (x - max).exp()).collect();
        let l: f64 = p.iter().sum();
        for f in 0..64 {
            let o: f64 = p.iter().enumerate().map(|(j, p)| p * v[j * 64 + f]).sum::<f64>() / l;
            worst = worst.max((o - buffers[3].data[i * 64 + f]).abs());
        }
    }
    Ok(worst)
}

/// Float64 agrees to rounding errors of float64; in the declared types P has 8 bits, so the error is near 2^-9 of a
/// weighted mean of values up to 3/4.
#[test]
fn attention_with_p_in_registers() {
    let module = read(include_str!("../testdata/online_softmax.kernel"));
    let kernel = &module.kernels[0];
    for schedule in Schedule::ALL {
        assert!(attention(&module, kernel, &options(schedule, 1)).unwrap() < 1e-13);
    }
    let rounded = attention(&module, kernel, &Options { rounding: true, ..options(Schedule::Random, 1) }).unwrap();
    assert!(rounded > 1e-6 && rounded < 0.75 / 256.0, "{rounded}");
    // A copy landing just before the arrival that belongs to it is rare: several seeds.
    let events = || (0..12).flat_map(|seed| Schedule::ALL.map(|s| options(s, seed)));
    let missed: Vec<String> = mutate::mutants(kernel, &module.ranks)
        .filter(|m| !events().any(|o| attention(&module, &m.kernel, &o).map_or(true, |worst| worst > 1e-13)))
        .map(|m| format!("{:?} {}", m.fault, m.place))
        .collect();
    assert_eq!(missed, [""; 0]);
}

#[test]
fn large_tiles_run_in_seconds() {
    let wide = PIPELINE
        .replace("(N + 63) / 64", "(N + 255) / 256")
        .replace(
            "Bs: bf16[64, 64] stages 3 layout (64:64, 64:1)",
            "Bs: bf16[64, 256] stages 3 layout (64:64, (64:1, 4:4096))",
        )
        .replace("shared Cs: f32[128, 64]\n", "")
        .replace("f32[64, 64]", "f32[64, 256]")
        .replace("8@1.8]", "32@1.8]")
        .replace("24576", "49152")
        .replace("m64n64k16", "m64n256k16")
        .replace("grid.1 * 64", "grid.1 * 256");
    let copy = "copy tma [64, 64] B[k * 64, grid.1 * 256] -> Bs(s)[0, 0] signal full(s)";
    assert!(wide.contains(copy));
    let panels: Vec<String> = (0..4)
        .map(|p| format!("copy tma [64, 64] B[k * 64, grid.1 * 256 + {0}] -> Bs(s)[0, {0}] signal full(s)", p * 64))
        .collect();
    let (head, _) = wide.split_once("store Cs").unwrap();
    let text =
        head.replace(copy, &panels.join("\n")) + "store C[grid.0 * 128 + unit * 64, grid.1 * 256] = acc\n}\n}\n}";
    let module = read(&text.replace("named stored[1] threads 256\n", ""));
    assert_eq!(verify::verify(&module, &verify::Limits::SM90), []);
    let start = std::time::Instant::now();
    let size = [256, 256, 512];
    assert_eq!(gemm(&module, &module.kernels[0], size, &Options::default()).unwrap(), expected(size));
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    println!("two CTAs of 128x256x64, 8 steps: {:?}", start.elapsed());
}

#[test]
fn gathers_scatters_and_selections() {
    let source = "module m { ranks T, R
        kernel k {
            grid [1]
            global table: f32[R, 4] = 0
            global index: i32[T] = 1
            global best: f32[T] = 2 written
            global where_best: i32[T] = 3 written
            global counts: f32[R] = 4 written
            frag i: i32[6] T[]V[6@0.1]L[]
            frag x: f32[6, 4] T[]V[4@1.1,6@0.1]L[]
            frag v: f32[6] T[]V[6@0.1]L[]
            frag p: i32[6] T[]V[6@0.1]L[]
            frag one: f32[6] T[]V[6@0.1]L[]
            role r: 1 thread {
                load i = index[0] bounds [0 < T]
                gather x = table[i[0], @1] bounds [0 < T]
                reduce v, p = argmax x over [1] base 10
                store best[0] = v bounds [0 < T]
                store where_best[0] = p bounds [0 < T]
                map one = 1.0 + 0.5 * @0
                scatter counts[i[0]] = one bounds [0 < T] join sum
            }
        }
    }";
    let module = read(source);
    let mut b = [
        GlobalBuffer::new(&[3, 4], DType::F32, vec![0., 5., 5., 1., -1., -2., -1., -3., 7., 0., 0., 9.]),
        GlobalBuffer::new(&[5], DType::I32, vec![2., 0., 1., -1., 2.]),
        GlobalBuffer::undefined(&[5], DType::F32),
        GlobalBuffer::undefined(&[5], DType::I32),
        GlobalBuffer::new(&[3], DType::F32, vec![0.0; 3]),
    ];
    run(&module.kernels[0], &module.ranks, &[5, 3], &mut b, &Options::default()).unwrap();
    // Row −1 is outside the table: it reads zeros and its scatter is dropped.
    assert_eq!(b[2].data, [9., 5., -1., 0., 9.]);
    assert_eq!(b[3].data, [13., 11., 10., 10., 13.]);
    assert_eq!(b[4].data, [1.5, 2.0, 1.0 + 3.0]);
}

#[test]
fn the_grid_synchronises_through_device_memory() {
    let source = "module m { ranks T
        kernel k {
            grid [T]
            global x: f32[T] = 0 written
            global y: f32[T] = 1 written
            frag v: f32[1] T[]V[]L[]
            role r: 1 thread {
                map v = 1.0 + grid.0
                store x[grid.0] = v
                grid_sync
                load v = x[(grid.0 + 1) % T]
                store y[grid.0] = v
            }
        }
    }";
    let go = |source: &str| {
        let module = read(source);
        let mut b = [GlobalBuffer::undefined(&[4], DType::F32), GlobalBuffer::undefined(&[4], DType::F32)];
        run(&module.kernels[0], &module.ranks, &[4], &mut b, &Options::default()).map(|_| b[1].data.clone())
    };
    assert_eq!(go(source).unwrap(), [2.0, 3.0, 4.0, 1.0]);
    let kind = go(&source.replace("grid_sync", "task_sync")).unwrap_err().kind;
    assert!(matches!(kind, ErrorKind::Race | ErrorKind::Uninitialised), "{kind:?}");
}

#[test]
fn misuse_is_named() {
    let source = "module m {
        kernel k {
            grid [2]
            cluster [2]
            global x: f32[4] = 0 written
            shared s: f32[4]
            frag v: f32[4] T[32@0.0]V[4@0.1]L[]
            mbarrier full[1] count 1
            named n[1] threads 32
            role a: 1 warp {
                map v = 0.0
                BODY
            }
        }
    }";
    for (body, kind, says) in [
        ("load v = s[0]", ErrorKind::Uninitialised, "`s`[0]: read before"),
        ("store x[1] = v", ErrorKind::OutOfBounds, "`x`[4] is outside its extents [4]"),
        ("store x[0] = v", ErrorKind::Race, "`x`[0]: written while another agent's write"),
        ("wait full(0) phase 2", ErrorKind::Barrier, "parity"),
        ("wait full(0) phase 0", ErrorKind::Deadlock, "misses 1 arrivals and 0 bytes"),
        ("arrive full(0) expect 16\narrive full(0)", ErrorKind::Barrier, "more arrivals"),
        ("arrive full(0) remote 2", ErrorKind::OutOfBounds, "cluster rank 2"),
        ("arrive full(cluster_rank)", ErrorKind::OutOfBounds, "no stage 1"),
        ("if cluster_rank == 0 { cluster_sync }", ErrorKind::Deadlock, "1 of 2 units"),
        ("if cluster_rank == 0 { arrive full(0) remote 1 }", ErrorKind::InFlight, "which has ended"),
        ("let i = fetch(x[0])", ErrorKind::Uninitialised, "`x`[0]"),
    ] {
        let module = read(&source.replace("BODY", body));
        let errors: Vec<KernelError> = Schedule::ALL
            .into_iter()
            .flat_map(|s| (0..4).map(move |seed| (s, seed)))
            .filter_map(|(s, seed)| {
                let mut x = [GlobalBuffer::undefined(&[4], DType::F32)];
                run(&module.kernels[0], &module.ranks, &[], &mut x, &options(s, seed)).err()
            })
            .collect();
        assert!(errors.iter().any(|e| e.kind == kind && e.message.contains(says)), "{body}: {:?}", errors.first());
    }
}
