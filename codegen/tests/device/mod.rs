//! Plans formed for a device, lowered as a mapping says, and evaluated under every schedule against float64.

// Every test uses a part of this.
#![allow(dead_code)]

use einfall_codegen::lower::gpu;
use einfall_codegen::pipeline::{self, Context, Program};
use einfall_codegen::tables;
use einfall_ir::analysis::resources::Limits;
use einfall_ir::array::Array;
use einfall_ir::cascade::Cascade;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms;
use einfall_ir::kernel::eval::{GlobalBuffer, KernelError, Options, Schedule, run};
use einfall_ir::kernel::verify;
use einfall_ir::kernel::{Kernel, Module};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{self, BufferKind, Plan};

/// A file of the repository's `tests`.
pub fn text(path: &str) -> String {
    let path = format!("{}/../tests/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// A reference mapping's text.
pub fn mapping_text(name: &str) -> String {
    text(&format!("mappings/{name}.mapping"))
}

/// A plan of `tests/plans`.
pub fn plan(name: &str) -> Plan {
    tile::parse::parse(&text(&format!("plans/{name}.tile"))).unwrap_or_else(|e| panic!("{name}: {e:?}"))
}

/// The plan that a library cascade becomes, by every pass before the lowering.
pub fn formed(name: &str) -> Plan {
    formed_at(name, &[])
}

/// As [`formed`], with some ranks fixed.
pub fn formed_at(name: &str, fixed: &[(&str, u64)]) -> Plan {
    let source = einfall_kernels::source(name).unwrap_or_else(|| panic!("no cascade {name}"));
    formed_text(source, fixed)
}

/// As [`formed_at`], of a text.
pub fn formed_text(source: &str, fixed: &[(&str, u64)]) -> Plan {
    let mut cascade =
        einfall_ir::cascade::parse(source).unwrap_or_else(|d| panic!("{d:?}\n{source}")).cascades.remove(0);
    for (name, extent) in fixed {
        let rank = cascade.rank(name).unwrap_or_else(|| panic!("there is no rank {name}"));
        cascade.ranks[rank].fixed = Some(*extent);
    }
    formed_cascade(cascade)
}

/// As [`formed`], of a cascade.
pub fn formed_cascade(cascade: Cascade) -> Plan {
    let context = Context { atoms: atoms::all().collect(), ..Context::default() };
    let records = pipeline::run(tables::TO_TILE, tables::FORMS, Program::Cascade(cascade), &context, None)
        .unwrap_or_else(|(_, stop)| panic!("{stop}"));
    match records.into_iter().next_back().map(|r| r.program) {
        Some(Program::Tile(plan)) => plan,
        other => panic!("{other:?}"),
    }
}

/// What formation makes of a library cascade, before the passes on tiles.
pub fn formed_alone(name: &str) -> Plan {
    let source = einfall_kernels::source(name).unwrap_or_else(|| panic!("no cascade {name}"));
    let cascade = einfall_ir::cascade::parse(source).unwrap().cascades.remove(0);
    tables::formed(cascade).unwrap()
}

/// The kernels of a plan by a mapping, within what the mapping's device allows; they verify, and print as they parse.
pub fn lowered(plan: &Plan, mapping: &str) -> Module {
    lowered_on(plan, mapping, None)
}

/// As [`lowered`], on a device of so many multiprocessors.
pub fn lowered_on(plan: &Plan, mapping: &str, multiprocessors: Option<u64>) -> Module {
    let mapping = einfall_ir::mapping::parse::parse(mapping).unwrap_or_else(|e| panic!("{e}"));
    let sheet = DataSheet::named(&mapping.target).unwrap_or_else(|| panic!("no sheet {}", mapping.target));
    let mut limits = Limits::of(&sheet.gpu.unwrap());
    limits.multiprocessors = multiprocessors.unwrap_or(limits.multiprocessors);
    let module = gpu::lower_for(plan, &mapping, &limits).unwrap_or_else(|e| panic!("{e:?}\n{plan}"));
    let limits =
        verify::Limits { shared_bytes: limits.shared_bytes, registers: limits.registers, threads: limits.threads };
    let violations = verify::verify(&module, &limits);
    assert!(violations.is_empty(), "{}", violations.iter().map(|v| format!("{v}\n")).collect::<String>());
    let printed = einfall_ir::kernel::print::print(&module);
    let again = einfall_ir::kernel::parse::parse(&printed).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(einfall_ir::kernel::print::print(&again), printed);
    module
}

/// Deterministic bf16 values in [-1, 1].
fn values(seed: u64) -> impl FnMut(usize) -> f64 {
    let mut s = seed;
    move |_| {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        DType::BF16.round((s >> 40) as f64 / f64::from(1u32 << 23) - 1.0)
    }
}

/// Inputs of a plan.
pub fn inputs(plan: &Plan, ranks: &[u64]) -> Vec<Array> {
    let takes = |k: BufferKind| matches!(k, BufferKind::Input | BufferKind::InOut);
    let taken = plan.buffers.iter().enumerate().filter(|(_, (_, b))| takes(b.kind));
    taken
        .map(|(i, (_, b))| {
            let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
            let mut value = values(i as u64 * 31 + 7);
            Array::from_fn(b.dtype, &dims, |at| if b.positive { value(at).abs() + 0.125 } else { value(at) })
        })
        .collect()
}

fn buffers(plan: &Plan, ranks: &[u64], inputs: &[Array]) -> Vec<GlobalBuffer> {
    let mut given = inputs.iter();
    let buffers = plan.buffers.iter().map(|(_, b)| {
        let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
        match b.kind {
            BufferKind::Input | BufferKind::InOut => {
                GlobalBuffer::new(&dims, b.dtype, given.next().unwrap().data.clone())
            }
            BufferKind::Output | BufferKind::Workspace => GlobalBuffer::undefined(&dims, b.dtype),
        }
    });
    buffers.collect()
}

/// The kernels that a launch would run: of variants the last, which assumes least.
fn launched(module: &Module) -> Vec<&Kernel> {
    let last = |i: usize, k: &Kernel| match (&k.variant_of, module.kernels.get(i + 1)) {
        (Some(of), Some(next)) => next.variant_of.as_ref() != Some(of),
        _ => true,
    };
    module.kernels.iter().enumerate().filter(|(i, k)| last(*i, k)).map(|(_, k)| k).collect()
}

fn execute(
    plan: &Plan,
    kernels: &[&Kernel],
    ranks: &[u64],
    inputs: &[Array],
    options: &Options,
) -> Result<Vec<GlobalBuffer>, KernelError> {
    let mut b = buffers(plan, ranks, inputs);
    for k in kernels {
        run(k, &plan.ranks, ranks, &mut b, options)?;
    }
    Ok(b)
}

/// What the kernels a launch would run leave, under a schedule.
pub fn evaluated(
    plan: &Plan,
    module: &Module,
    ranks: &[u64],
    inputs: &[Array],
    schedule: Schedule,
) -> Result<Vec<GlobalBuffer>, KernelError> {
    execute(plan, &launched(module), ranks, inputs, &Options { schedule, ..Options::default() })
}

/// Whether two values agree to what float64 sums in another order may differ.
pub fn near(x: f64, y: f64) -> bool {
    (x - y).abs() <= 1e-9 * (1.0 + y.abs()) || x == y
}

/// Runs the kernels under every schedule and compares with the tile plan in float64.
pub fn agrees(plan: &Plan, module: &Module, ranks: &[u64], seeds: u64) {
    let inputs = inputs(plan, ranks);
    let want = tile::eval::run(plan, ranks, &inputs, &tile::eval::Options::default()).unwrap();
    for schedule in Schedule::ALL {
        for seed in 0..seeds {
            let options = Options { schedule, seed, ..Options::default() };
            let got = execute(plan, &launched(module), ranks, &inputs, &options)
                .unwrap_or_else(|e| panic!("{schedule:?} at {ranks:?}: {e}"));
            let outs = plan.buffers.iter().zip(&got).filter(|((_, b), _)| b.kind == BufferKind::Output);
            for (((_, b), got), want) in outs.zip(&want) {
                assert!(got.defined.iter().all(|d| *d), "{} is not written whole at {ranks:?}", b.name);
                for (i, (x, y)) in got.data.iter().zip(&want.data).enumerate() {
                    assert!(near(*x, *y), "{}[{i}] {x} {y} at {ranks:?}", b.name);
                }
            }
        }
    }
}

/// How many faults are planted in the first kernel, and those that no schedule catches at any of the extents: a line
/// each, of fault and statement.
pub fn survivors(plan: &Plan, module: &Module, sizes: &[&[u64]]) -> (usize, Vec<String>) {
    let wanted: Vec<_> = sizes
        .iter()
        .map(|ranks| {
            let inputs = inputs(plan, ranks);
            let want = tile::eval::run(plan, ranks, &inputs, &tile::eval::Options::default()).unwrap();
            (*ranks, inputs, want)
        })
        .collect();
    let right = |kernel: &Kernel, schedule, (ranks, inputs, want): &(&[u64], Vec<Array>, Vec<Array>)| {
        let options = Options { schedule, seed: 3, ..Options::default() };
        let Ok(got) = execute(plan, &[kernel], ranks, inputs, &options) else { return false };
        let outs = plan.buffers.iter().zip(&got).filter(|((_, b), _)| b.kind == BufferKind::Output);
        outs.zip(want)
            .all(|((_, g), w)| g.defined.iter().all(|d| *d) && g.data.iter().zip(&w.data).all(|(x, y)| near(*x, *y)))
    };
    let mut planted = 0;
    let mut missed = Vec::new();
    for m in einfall_ir::kernel::mutate::mutants(launched(module)[0], &plan.ranks) {
        planted += 1;
        if wanted.iter().all(|w| Schedule::ALL.into_iter().all(|s| right(&m.kernel, s, w))) {
            missed.push(format!("{:?} {}", m.fault, m.place));
        }
    }
    (planted, missed)
}

/// Every planted fault is caught by some schedule at some of the extents, but those named, which change nothing that
/// can be observed.
pub fn all_caught(plan: &Plan, module: &Module, sizes: &[&[u64]], sound: &[&str]) {
    let (planted, missed) = survivors(plan, module, sizes);
    assert!(planted > 10, "{planted} faults");
    assert_eq!(missed, sound);
}
