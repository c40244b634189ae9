//! Reference mappings lowered for a GPU and evaluated, race-free, before any backend exists: under every adversarial
//! schedule the kernels give what the tile plans mean.

use einfall_codegen::lower::gpu;
use einfall_ir::array::Array;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::eval::{GlobalBuffer, KernelError, Options, Schedule, run};
use einfall_ir::kernel::{Kernel, Module};
use einfall_ir::tile::{self, BufferKind, Plan};

fn text(path: &str) -> String {
    let path = format!("{}/../tests/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The plan with some ranks fixed, and its kernels by the mapping.
fn lower(plan: &str, fixed: &[(&str, u64)], mapping: &str) -> (Plan, Module) {
    let mut plan = tile::parse::parse(&text(&format!("plans/{plan}.tile"))).unwrap();
    for (_, r) in plan.ranks.iter_mut() {
        r.fixed = fixed.iter().find(|f| f.0 == r.name).map(|f| f.1).or(r.fixed);
    }
    let mapping = einfall_ir::mapping::parse::parse(mapping).unwrap_or_else(|e| panic!("{e}"));
    let module = gpu::lower(&plan, &mapping).unwrap_or_else(|e| panic!("{e:?}"));
    (plan, module)
}

/// Deterministic bf16 values in [-1, 1].
fn values(seed: u64) -> impl FnMut(usize) -> f64 {
    let mut s = seed;
    move |_| {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        DType::BF16.round((s >> 40) as f64 / f64::from(1u32 << 23) - 1.0)
    }
}

fn inputs(plan: &Plan, ranks: &[u64]) -> Vec<Array> {
    let takes = |k: BufferKind| matches!(k, BufferKind::Input | BufferKind::InOut);
    plan.buffers
        .iter()
        .enumerate()
        .filter(|(_, (_, b))| takes(b.kind))
        .map(|(i, (_, b))| {
            let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
            Array::from_fn(b.dtype, &dims, values(i as u64 * 31 + 7))
        })
        .collect()
}

fn buffers(plan: &Plan, ranks: &[u64], inputs: &[Array]) -> Vec<GlobalBuffer> {
    let mut given = inputs.iter();
    plan.buffers
        .iter()
        .map(|(_, b)| {
            let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
            match b.kind {
                BufferKind::Input | BufferKind::InOut => {
                    GlobalBuffer::new(&dims, b.dtype, given.next().unwrap().data.clone())
                }
                BufferKind::Output | BufferKind::Workspace => GlobalBuffer::undefined(&dims, b.dtype),
            }
        })
        .collect()
}

fn execute(
    plan: &Plan,
    kernel: &Kernel,
    ranks: &[u64],
    inputs: &[Array],
    options: &Options,
) -> Result<Vec<GlobalBuffer>, KernelError> {
    let mut b = buffers(plan, ranks, inputs);
    run(kernel, &plan.ranks, ranks, &mut b, options)?;
    Ok(b)
}

/// Runs the single kernel of `module` under every schedule and compares with the tile plan in float64.
fn agrees(plan: &Plan, module: &Module, ranks: &[u64], seeds: u64) {
    let inputs = inputs(plan, ranks);
    let want = tile::eval::run(plan, ranks, &inputs, &tile::eval::Options::default()).unwrap();
    for schedule in Schedule::ALL {
        for seed in 0..seeds {
            let options = Options { schedule, seed, ..Options::default() };
            let got = execute(plan, &module.kernels[0], ranks, &inputs, &options)
                .unwrap_or_else(|e| panic!("{schedule:?} at {ranks:?}: {e}"));
            let outs = plan.buffers.iter().zip(&got).filter(|((_, b), _)| b.kind == BufferKind::Output);
            for (((_, b), got), want) in outs.zip(&want) {
                assert!(got.defined.iter().all(|d| *d), "{} is not written whole at {ranks:?}", b.name);
                for (i, (x, y)) in got.data.iter().zip(&want.data).enumerate() {
                    assert!((x - y).abs() <= 1e-9 * (1.0 + y.abs()), "{}[{i}] {x} {y} at {ranks:?}", b.name);
                }
            }
        }
    }
}

#[test]
fn gemm_cluster_multicast() {
    let (plan, module) = lower("gemm", &[], &text("mappings/gemm.mapping"));
    for (m, n, k) in [(300, 264, 200), (128, 256, 64), (8, 8, 8), (257, 8, 136)] {
        agrees(&plan, &module, &[m, n, k], 1);
    }
}

#[test]
fn attention_causal_overlapped() {
    let (plan, module) = lower("attention", &[], &text("mappings/attention.mapping"));
    // [B, H, R, M, N, E, F]: tails in m, n, e and f; rows without keys (M > N); one block, none to skip.
    for ranks in [[1, 1, 2, 200, 300, 72, 80], [1, 1, 1, 300, 130, 128, 128], [2, 1, 1, 40, 40, 64, 16]] {
        agrees(&plan, &module, &ranks, 1);
    }
}

#[test]
fn attention_full_overlapped() {
    let (plan, module) = lower("attention_full", &[], &text("mappings/attention_full.mapping"));
    for ranks in [[1, 1, 2, 136, 360, 128, 128], [1, 1, 1, 8, 176, 128, 128], [1, 2, 1, 64, 528, 128, 64]] {
        agrees(&plan, &module, &ranks, 1);
    }
}

#[test]
fn lstm_resident() {
    let (plan, module) = lower("lstm_gates", &[], &text("mappings/lstm.mapping"));
    // [T, B, H, D]: batch and width with tails, a single step, no step.
    for ranks in [[5, 20, 2, 96], [1, 3, 1, 128], [0, 2, 1, 64]] {
        agrees(&plan, &module, &ranks, 1);
    }
}
