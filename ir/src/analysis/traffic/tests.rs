//! Counts by hand.

use super::*;
use crate::mapping::{self, AxisMapping, MergeSite, Split};
use crate::target::MemoryLevel;
use crate::tile::parse::parse;

const GEMM: &str = "plan gemm[M, N, K] {
    input A: bf16[M, K]
    input B: bf16[K, N]
    output C: bf16[M, N]
    kernel gemm {
        grid m in M
        grid n in N
        stream k in K
        tile a: bf16[m, k]
        tile b: bf16[k, n]
        tile c: f32[m, n]
        c = 0.0
        for k {
            a = load A[m, k]
            b = load B[k, n]
            c = carry contract(k) a, b
        }
        store C[m, n] = c over m, n
    }
}
";
const GEMM_MAPPING: &str = "mapping gemm on h100 {
    kernel gemm {
        axis m block 128 cluster 2 units 2
        axis n block 256
        axis k block 64
        role producer: 1 warp regs 40
        role consumer: 2 warpgroup regs 232
        tile a in shared stages 3 swizzle 128 by tma
        tile b in shared stages 3 swizzle 128 by tma multicast m
        op c@1 atom wgmma.m64n256k16.bf16 role consumer
    }
}
";
const SCORES: &str = "plan scores[B, G, R, M, N, E] {
    input Q: bf16[B, G * R, M, E]
    input K: bf16[B, G, N, E]
    output O: f32[B, G * R, M]
    kernel scores {
        grid b in B block 1
        grid h in G * R block 1
        grid m in M
        stream n in N
        inner e in E
        tile q: bf16[b, h, m, e]
        tile k: bf16[b, h, n, e]
        tile s: f32[b, h, m, n]
        tile x: f32[b, h, m]
        q = load Q[b, h, m, e]
        x = -inf
        for n where n <= m {
            k = load K[b, h / R, n, e]
            s = contract(e) q, k
            x = carry reduce max(n) s
        }
        store O[b, h, m] = x over b, h, m
    }
}
";

fn cache_sheet(bytes: u64) -> DataSheet {
    let level = |name: &str, bytes, bandwidth| MemoryLevel { name: name.into(), bytes, instances: 1, bandwidth };
    DataSheet {
        name: "test".into(),
        atoms: Vec::new(),
        followed_pages: None,
        levels: vec![level("dram", 1 << 40, 1e9), level("cache", bytes, 1e10), level("registers", 12, 1e12)],
        peak: vec![("f32".into(), 1e9)],
        gpu: None,
        webgpu: None,
    }
}

fn blocks(kernel: &str, all: &[(&str, u64)]) -> KernelMapping {
    let axes = all.iter().map(|(a, b)| AxisMapping::new(*a, *b)).collect();
    KernelMapping { kernel: kernel.into(), axes, ..KernelMapping::default() }
}

fn close(have: f64, want: f64) {
    assert!((have - want).abs() <= 1e-9 * want.abs(), "{have} is not {want}");
}

#[test]
fn a_tiled_product_on_a_gpu_by_hand() {
    let plan = parse(GEMM).unwrap();
    let m = mapping::parse::parse(GEMM_MAPPING).unwrap();
    let n = 4096.0;
    let t = plan_traffic(&plan, &m, &[4096, 4096, 4096], &DataSheet::h100()).unwrap();
    let one = n * n * 2.0;
    close(t.tasks, 32.0 * 16.0);
    let shared = t.level("shared").unwrap();
    // A once per block of columns, B once per block of rows, of which two share a copy.
    close(shared.read_bytes, one * 16.0 + one * 32.0);
    close(shared.supplied_bytes, one * 16.0 + one * 32.0 / 2.0);
    close(shared.write_bytes, one);
    // An instruction has 64 rows and all 256 columns: B is read by both warpgroups. C leaves registers.
    let registers = t.level("registers").unwrap();
    close(registers.read_bytes, one * 16.0 + 2.0 * one * 32.0);
    close(registers.write_bytes, one);
    // A wave of 8 x 16 tasks covers 1024 rows: with all of B it fits the second-level cache.
    let l2 = t.level("l2").unwrap();
    close(l2.bytes(), 3.0 * one);
    close(t.contractions[0].1, 2.0 * n * n * n);
    assert_eq!(t.contractions[0].0, DType::BF16);
    let seconds = t.seconds(&DataSheet::h100());
    let contract = seconds.iter().find(|(r, _)| r == "contract").unwrap().1;
    close(contract, 2.0 * n * n * n / 989e12);
    close(t.roofline_us(&DataSheet::h100()), 1e6 * seconds.iter().map(|s| s.1).fold(0.0, f64::max));
}

#[test]
fn without_a_multicast_the_source_hands_out_all() {
    let plan = parse(GEMM).unwrap();
    let m = mapping::parse::parse(&GEMM_MAPPING.replace(" multicast m", "")).unwrap();
    let t = plan_traffic(&plan, &m, &[4096, 4096, 4096], &DataSheet::h100()).unwrap();
    let shared = t.level("shared").unwrap();
    close(shared.read_bytes, shared.supplied_bytes);
}

#[test]
fn a_product_too_wide_for_the_cache_pays_per_wave() {
    let plan = parse(GEMM).unwrap();
    let m = mapping::parse::parse(GEMM_MAPPING).unwrap();
    let (rows, cols, depth) = (4096.0, 65536.0, 4096.0);
    let t = plan_traffic(&plan, &m, &[4096, 65536, 4096], &DataSheet::h100()).unwrap();
    // 132 of the 256 column blocks run at once; each of the 32 row blocks brings all of B in again.
    let l2 = t.level("l2").unwrap();
    let (a, b) = (rows * depth * 2.0, depth * cols * 2.0);
    close(l2.read_bytes, 2.0 * a + 32.0 * b);
    // Grouping 16 row blocks brings B in twice.
    let grouped = GEMM_MAPPING.replace("role producer:", "work group 16\n        role producer:");
    let m = mapping::parse::parse(&grouped).unwrap();
    let t = plan_traffic(&plan, &m, &[4096, 65536, 4096], &DataSheet::h100()).unwrap();
    let read = t.level("l2").unwrap().read_bytes;
    assert!((2.0 * b..4.0 * b + 32.0 * a).contains(&read), "{} of {}", read / b, 32);
}

#[test]
fn caches_between_nothing_and_everything() {
    let plan = parse(GEMM).unwrap();
    let (m, n, k) = (40u64, 48u64, 64u64);
    let map = blocks("gemm", &[("m", 8), ("n", 16), ("k", 32)]);
    let of = |bytes| kernel_traffic(&plan, &plan.kernels[0], &map, &[m, n, k], &cache_sheet(bytes)).unwrap();
    let (m, n, k) = (m as f64, n as f64, k as f64);
    // All fits: everything once.
    let t = of(1 << 30);
    close(t.level("cache").unwrap().read_bytes, 2.0 * (m * k + k * n));
    close(t.level("cache").unwrap().write_bytes, 2.0 * m * n);
    let mut last = f64::INFINITY;
    for bytes in [0, 16, 256, 2048, 4096, 8192, 1 << 14, 1 << 16, 1 << 20] {
        let now = of(bytes).level("cache").unwrap().bytes();
        assert!(now <= last, "{bytes}: {now} after {last}");
        last = now;
    }
    // Registers that hold one element: each multiply-add brings both operands; the sum stays over the block of k.
    let r = of(1 << 30);
    let r = r.level("registers").unwrap();
    assert!(r.read_bytes >= 2.0 * 2.0 * m * n * k, "{}", r.read_bytes);
}

#[test]
fn heads_that_share_keys_and_causal_steps() {
    let plan = parse(SCORES).unwrap();
    let text = "mapping scores on h100 {
    kernel scores {
        axis m block 128
        axis n block 128
        tile q in shared by tma
        tile k in shared by tma
        op s atom wgmma.m64n128k16.bf16
    }
}
";
    let map = mapping::parse::parse(text).unwrap();
    let (b, g, r, m, n, e) = (2.0, 4.0, 8.0, 1024.0, 1024.0, 64.0);
    let t = plan_traffic(&plan, &map, &[2, 4, 8, 1024, 1024, 64], &DataSheet::h100()).unwrap();
    let (q, k) = (b * g * r * m * e * 2.0, b * g * n * e * 2.0);
    // Of 8 x 8 pairs of blocks the diagonal and what is below it run.
    let kept = 36.0 / 64.0;
    close(t.level("shared").unwrap().read_bytes, q + k * r * 8.0 * kept);
    // In the second-level cache each key is needed once, whatever heads share it.
    close(t.level("l2").unwrap().read_bytes, q + k);
    close(t.contractions[0].1, 2.0 * b * g * r * m * n * e * kept);
}

#[test]
fn gathered_rows_count_not_the_table() {
    let text = "plan embed[T, W, D] {
    input word: f32[W, D]
    input token: i32[T]
    output Y: f32[T, D]
    kernel embed {
        grid t in T
        inner d in D
        tile i: i32[t]
        tile x: f32[t, d]
        i = load token[t]
        x = load word[i, d]
        store Y[t, d] = x over t, d
    }
}
";
    let plan = parse(text).unwrap();
    for sheet in [DataSheet::cpu(), DataSheet::h100()] {
        let map =
            Mapping { plan: "embed".into(), target: sheet.name.clone(), kernels: vec![blocks("embed", &[("t", 8)])] };
        let t = plan_traffic(&plan, &map, &[64, 30000, 128], &sheet).unwrap();
        let first = &t.levels[0];
        close(first.read_bytes, 64.0 * 4.0 + 64.0 * 128.0 * 4.0);
        close(first.write_bytes, 64.0 * 128.0 * 4.0);
    }
}

#[test]
fn parts_of_a_split_hand_on_what_they_carry() {
    let plan = parse(GEMM).unwrap();
    let mut m = mapping::parse::parse(GEMM_MAPPING).unwrap();
    m.kernels[0].split =
        Some(Split { axis: "k".into(), parts: 4, resident: 1, merge: MergeSite::SecondKernel, ordered: true });
    let whole = mapping::parse::parse(GEMM_MAPPING).unwrap();
    let size = [256, 256, 8192];
    let (t, w) =
        (plan_traffic(&plan, &m, &size, &DataSheet::h100()), plan_traffic(&plan, &whole, &size, &DataSheet::h100()));
    let (t, w) = (t.unwrap(), w.unwrap());
    close(t.tasks, 4.0 * w.tasks);
    let (a, b) = (t.level("shared").unwrap(), w.level("shared").unwrap());
    close(a.read_bytes - b.read_bytes, 4.0 * 256.0 * 256.0 * 4.0);
    close(t.contractions[0].1, w.contractions[0].1);
}

#[test]
fn two_walks_of_a_row_that_fits_read_it_once() {
    let text = "plan softmax[M, N] {
    input X: f32[M, N]
    output Y: f32[M]
    kernel softmax {
        grid m in M
        stream n in N
        tile x: f32[m, n]
        tile y: f32[m]
        tile l: f32[m]
        y = -inf
        for n {
            x = load X[m, n]
            y = carry reduce max(n) x
        }
        l = 0.0
        for n {
            l = carry reduce sum(n) exp(X[m, n] - y)
        }
        store Y[m] = l over m
    }
}
";
    let plan = parse(text).unwrap();
    let map = blocks("softmax", &[("m", 4), ("n", 64)]);
    let of = |bytes| {
        let t = kernel_traffic(&plan, &plan.kernels[0], &map, &[64, 1024], &cache_sheet(bytes)).unwrap();
        t.level("cache").unwrap().read_bytes
    };
    close(of(64 << 10), 64.0 * 1024.0 * 4.0);
    close(of(8 << 10), 2.0 * 64.0 * 1024.0 * 4.0);
}

#[test]
fn axes_of_one_extent_walk_the_same_row_and_constants_do_not() {
    let text = "plan norm[M, K] {
    input X: f32[M, 2, K]
    output Y: f32[M, K]
    kernel norm {
        grid m in M
        stream k in K
        stream k_2 in K
        tile y: f32[m]
        y = 0.0
        for k {
            y = carry reduce sum(k) X[m, 0, k]
        }
        for k_2 {
            store Y[m, k_2] = X[m, 0, k_2] * y + X[m, 1, k_2] over m, k_2
        }
    }
}
";
    let plan = parse(text).unwrap();
    let kernel = &plan.kernels[0];
    let row = 64.0 * 1024.0 * 4.0;
    let map = blocks("norm", &[("m", 1), ("k", 1024), ("k_2", 1024)]);
    let t = kernel_traffic(&plan, kernel, &map, &[64, 1024], &DataSheet::h100()).unwrap();
    // The first row by two axes, and the second.
    close(t.level("l2").unwrap().read_bytes, 2.0 * row);
    let (read, _) = counted_bytes(&plan, kernel, &map, &[64, 1024], &DataSheet::h100()).unwrap();
    close(read, 2.0 * row);
}

#[test]
fn counted_bytes_of_what_fits_and_of_what_does_not() {
    let plan = parse(GEMM).unwrap();
    let m = mapping::parse::parse(GEMM_MAPPING).unwrap();
    let sheet = DataSheet::named("h200").unwrap();
    let counted = |size: &[u64]| counted_bytes(&plan, &plan.kernels[0], &m.kernels[0], size, &sheet).unwrap();
    // All of it fits: read once, and nothing is written back before the end.
    let (read, written) = counted(&[1024, 1024, 1024]);
    assert!((read / (2.0 * 1024.0 * 1024.0 * 2.0) - 1.0).abs() < 1e-3, "{read}");
    assert!(written < 0.01 * 1024.0 * 1024.0 * 2.0, "{written}");
    // 132 of 256 column blocks run at once, and bring all of B in for each of 32 row blocks. All but what fits the cache
    // at the end has been written.
    let (read, written) = counted(&[4096, 65536, 4096]);
    let (a, b, c) = (4096.0 * 4096.0 * 2.0, 4096.0 * 65536.0 * 2.0, 4096.0 * 65536.0 * 2.0);
    assert!((32.0 * b..32.0 * b + 3.0 * a).contains(&read), "{} of B", read / b);
    assert!(written < c && written > c - 0.1 * 52e6, "{written} of {c}");
    // More is read as less fits, never less than all of it once.
    let mut last = 0.0;
    for depth in [256, 1024, 2048, 4096, 8192, 16384] {
        let (read, _) = counted(&[4096, 4096, depth]);
        let once = 2.0 * 4096.0 * depth as f64 * 2.0;
        assert!(read >= 0.999 * once && read / once >= 0.999 * last, "{depth}: {} after {last}", read / once);
        last = read / once;
    }
    let cpu = counted_bytes(&plan, &plan.kernels[0], &m.kernels[0], &[64, 64, 64], &DataSheet::cpu());
    assert!(cpu.is_none(), "a processor has no such cache");
}

#[test]
fn halves_of_a_row_are_two() {
    let text = "plan gate[M, F] {
    input X: f32[M, 2 * F]
    output Y: f32[M, F]
    kernel gate {
        grid m in M
        inner f in F
        store Y[m, f] = X[m, f] * X[m, f + F] + X[m, f + 1] over m, f
    }
}
";
    let plan = parse(text).unwrap();
    let t = kernel_traffic(&plan, &plan.kernels[0], &blocks("gate", &[("m", 1)]), &[64, 256], &DataSheet::h100());
    // A shift by one is the same row, a shift by all of it another.
    close(t.unwrap().level("l2").unwrap().read_bytes, 64.0 * 512.0 * 4.0);
}
