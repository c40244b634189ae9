//! Random streams with 1 to 6 contractions, reductions, filters and emits go through the passes that every plan goes
//! through, lower by drawn mappings, give under every adversarial schedule what their plans mean, and assemble without a
//! warning or a spill to as many wgmma as their text has.

mod assembler;

use assembler::{all, assemble};
use einfall_codegen::backend::ptx::{Target, print};
use einfall_codegen::random::{Drawn, Rng, drawn, extents};
use einfall_ir::array::Array;
use einfall_ir::artifact::Code;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::eval::{GlobalBuffer, Options, Schedule, run};
use einfall_ir::kernel::verify::{Limits, verify};
use einfall_ir::tile::{self, BufferKind, Op, Plan};

fn arrays(plan: &Plan, ranks: &[u64], seed: u64) -> Vec<Array> {
    let mut rng = Rng::new(seed);
    let inputs = plan.buffers.iter().filter(|(_, b)| b.kind == BufferKind::Input);
    inputs
        .map(|(_, b)| {
            let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
            Array::from_fn(b.dtype, &dims, |_| DType::BF16.round(rng.below(2001) as f64 / 1000.0 - 1.0))
        })
        .collect()
}

/// One stream: its plan lowers by a drawn mapping and agrees; says how many contractions it has, and whether what was
/// drawn was refused.
fn holds(seed: u64) -> (usize, bool) {
    let stream = drawn(seed).unwrap_or_else(|e| panic!("{e}"));
    let Drawn { plan, choices, module, plain, .. } = &stream;
    let mut rng = Rng::new(seed ^ 0xed6e);
    let faults = verify(module, &Limits::SM90);
    assert!(faults.is_empty(), "seed {seed}: {}", faults.iter().map(|v| format!("{v}\n")).collect::<String>());
    let ranks = extents(&stream, &mut rng, 64 * choices.units);
    let inputs = arrays(plan, &ranks, seed);
    let want = tile::eval::run(plan, &ranks, &inputs, &tile::eval::Options::default())
        .unwrap_or_else(|e| panic!("seed {seed}: {e}\n{plan}"));
    for schedule in Schedule::ALL {
        let mut given = inputs.iter();
        let mut buffers: Vec<GlobalBuffer> = plan
            .buffers
            .iter()
            .map(|(_, b)| {
                let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(&ranks).unwrap()).collect();
                match b.kind {
                    BufferKind::Input | BufferKind::InOut => {
                        GlobalBuffer::new(&dims, b.dtype, given.next().unwrap().data.clone())
                    }
                    BufferKind::Output | BufferKind::Workspace => GlobalBuffer::undefined(&dims, b.dtype),
                }
            })
            .collect();
        let options = Options { schedule, seed, ..Options::default() };
        run(&module.kernels[0], &plan.ranks, &ranks, &mut buffers, &options)
            .unwrap_or_else(|e| panic!("seed {seed} {schedule:?} at {ranks:?}: {e}\n{plan}"));
        let outs = plan.buffers.iter().zip(&buffers).filter(|((_, b), _)| b.kind == BufferKind::Output);
        for (((_, b), got), want) in outs.zip(&want) {
            assert!(
                got.defined.iter().all(|d| *d),
                "seed {seed}: {} is not written whole at {ranks:?}\n{plan}",
                b.name
            );
            for (i, (x, y)) in got.data.iter().zip(&want.data).enumerate() {
                let near = (x - y).abs() <= 1e-9 * (1.0 + y.abs()) || x == y;
                assert!(near, "seed {seed}: {}[{i}] {x} {y} at {ranks:?}, {choices:?}\n{plan}", b.name);
            }
        }
    }
    let mut n = 0;
    plan.kernels[0].for_each_op(&mut |op, _| n += usize::from(matches!(op, Op::Contract { .. })));
    (n, *plain)
}

/// Streams of these seeds; how many have each number of contractions, and how many took the plain mapping.
fn all_hold(seeds: std::ops::Range<u64>) {
    let (mut seen, mut plain) = ([0; 7], 0);
    for seed in seeds.clone() {
        let (n, fell_back) = holds(seed);
        seen[n] += 1;
        plain += u64::from(fell_back);
    }
    println!("contractions {seen:?}, {plain} with the plain mapping");
    assert!(seen[1..].iter().all(|n| *n > 0), "not every number of contractions from 1 to 6 occurs: {seen:?}");
    assert!(plain * 3 < seeds.end - seeds.start, "too many drawn mappings are refused: {plain}");
}

#[test]
fn a_hundred_random_streams_lower_and_agree() {
    all_hold(0..100);
}

#[test]
fn another_hundred_random_streams_lower_and_agree() {
    all_hold(100..200);
}

/// NVIDIA's assembler takes the streams of these seeds as they are: nothing spills, nothing is serialised.
fn all_assemble(seeds: std::ops::Range<u64>) {
    let seeds: Vec<u64> = seeds.collect();
    all(&seeds, |seed| {
        let Drawn { plan, mapping, module, .. } = drawn(*seed)?;
        let artifact = print(&plan, &module, &Target::sm_90a()).map_err(|e| format!("seed {seed}: {e}"))?;
        let Code::Ptx { text, .. } = &artifact.code else { panic!("a GPU artifact has PTX") };
        let made = assemble(text, "sm_90a").map_err(|e| format!("seed {seed}: {e}\n{mapping}"))?;
        let (got, want) = (made.count("HGMMA"), text.matches("wgmma.mma_async").count());
        if got == want && want > 0 { Ok(()) } else { Err(format!("seed {seed}: {got} HGMMA of {want} wgmma\n{plan}")) }
    });
}

#[test]
fn a_hundred_random_streams_assemble() {
    all_assemble(0..100);
}

#[test]
fn another_hundred_random_streams_assemble() {
    all_assemble(100..200);
}
