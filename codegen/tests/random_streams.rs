//! Random streams with 1 to 6 contractions, reductions, filters and emits go through the passes that every plan goes
//! through, lower by drawn mappings, and give under every adversarial schedule what their plans mean.

use einfall_codegen::lower::gpu;
use einfall_codegen::pipeline::{self, Context, Program};
use einfall_codegen::random::{Choices, Rng, extents, mapping, stream};
use einfall_codegen::tables;
use einfall_ir::array::Array;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms;
use einfall_ir::kernel::eval::{GlobalBuffer, Options, Schedule, run};
use einfall_ir::kernel::verify::{Limits, verify};
use einfall_ir::tile::{self, BufferKind, Op, Plan};

/// The plan as a device with contraction instructions gets it.
fn prepared(plan: Plan) -> Plan {
    let context = Context { atoms: atoms::all().collect(), ..Context::default() };
    let passes: Vec<_> = tables::TO_TILE.iter().filter(|p| p.level == pipeline::Level::Tile).copied().collect();
    let records = pipeline::run(&passes, tables::FORMS, Program::Tile(plan), &context, None)
        .unwrap_or_else(|(_, stop)| panic!("{stop}"));
    match records.into_iter().next_back().map(|r| r.program) {
        Some(Program::Tile(plan)) => plan,
        other => panic!("{other:?}"),
    }
}

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

/// One stream: its plan lowers by a drawn mapping and agrees; says how many contractions it has, and whether what was drawn was refused.
fn holds(seed: u64) -> (usize, bool) {
    let plan = prepared(stream(seed));
    let mut rng = Rng::new(seed ^ 0x5eed);
    let mut choices = Choices::draw(&mut rng);
    let mut fell_back = false;
    let lowered = |choices: &Choices| {
        let m = mapping(&plan, choices).unwrap_or_else(|e| panic!("seed {seed}: {e}\n{plan}"));
        gpu::lower(&plan, &m).map_err(|e| format!("seed {seed}: {e:?}\n{plan}\n{m}"))
    };
    // What is drawn may be too large, or ask an operation to run behind what it feeds: those are expected answers.
    let expected = |e: &String| {
        let refused = ["schedule", "resources", "work loop", "persistent"].iter().any(|c| e.contains(c));
        assert!(refused, "{e}");
    };
    let module = lowered(&choices).or_else(|e| {
        expected(&e);
        choices.behind = false;
        lowered(&choices)
    });
    let module = module.or_else(|e| {
        expected(&e);
        fell_back = true;
        choices = Choices { block: 32, ..Choices::plain() };
        lowered(&choices)
    });
    let module = module.unwrap_or_else(|e| panic!("{e}"));
    let faults = verify(&module, &Limits::SM90);
    assert!(faults.is_empty(), "seed {seed}: {}", faults.iter().map(|v| format!("{v}\n")).collect::<String>());
    let ranks = extents(&plan, &mut rng, 64 * choices.units);
    let inputs = arrays(&plan, &ranks, seed);
    let want = tile::eval::run(&plan, &ranks, &inputs, &tile::eval::Options::default())
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
    (n, fell_back)
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
