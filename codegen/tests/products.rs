//! Contractions that no instruction takes, as the model maps them: a state times a vector, step after step, and sums over
//! inner axes of unknown extent. Every variant is evaluated under all schedules at sizes around its classes, assembled with
//! every warning an error, and run as PTX.

mod assembler;
mod device;
mod machine;

use device::{formed, inputs, lowered, near};
use einfall_autotune::model_gpu::choose;
use einfall_codegen::backend::ptx::{Target, print};
use einfall_ir::artifact::Code;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::Module;
use einfall_ir::kernel::eval::{GlobalBuffer, Options, Schedule, run};
use einfall_ir::kernel::variants::{ArrayFacts, choose as variant};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{self, BufferKind, Plan};

/// A library cascade with sizes in the order of its ranks.
const CASES: [(&str, &[&[u64]]); 4] = [
    // [B, T, H, E, F]: within, at and beyond classes of E; one step, none.
    (
        "linear_attention",
        &[&[1, 3, 2, 16, 24], &[2, 2, 1, 40, 9], &[1, 2, 1, 128, 33], &[1, 1, 1, 200, 5], &[1, 0, 1, 8, 8]],
    ),
    (
        "gated_delta_rule",
        &[&[1, 3, 2, 16, 24], &[2, 2, 1, 40, 9], &[1, 2, 1, 128, 33], &[1, 1, 1, 200, 5], &[1, 0, 1, 8, 8]],
    ),
    // [B, T, D, N].
    ("selective_scan", &[&[1, 4, 70, 16], &[2, 3, 33, 5], &[1, 2, 9, 100], &[1, 1, 3, 256], &[1, 0, 8, 4]]),
    // [B, T, D].
    ("mean_pool", &[&[2, 50, 72], &[3, 7, 40]]),
];

fn mapped(name: &str, sheet: &str) -> (Plan, Module) {
    let plan = formed(name);
    let mapping = choose(&plan, &DataSheet::named(sheet).unwrap(), None);
    let module = lowered(&plan, &mapping.to_string());
    (plan, module)
}

/// Every launch by the variant that it would choose for arrays at `address`, against the plan in float64.
fn agrees(plan: &Plan, module: &Module, ranks: &[u64], address: u64, schedule: Schedule) {
    let given = inputs(plan, ranks);
    let want = tile::eval::run(plan, ranks, &given, &tile::eval::Options::default()).unwrap();
    let mut given = given.into_iter();
    let buffers = plan.buffers.iter().map(|(_, b)| {
        let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
        match b.kind {
            BufferKind::Input | BufferKind::InOut => GlobalBuffer::new(&dims, b.dtype, given.next().unwrap().data),
            BufferKind::Output | BufferKind::Workspace => GlobalBuffer::undefined(&dims, b.dtype),
        }
    });
    let mut buffers: Vec<GlobalBuffer> = buffers.collect();
    let facts: Vec<ArrayFacts> = buffers.iter().map(|x| ArrayFacts { address, strides: x.strides.clone() }).collect();
    for launch in module.launches() {
        let kernel = variant(launch, ranks, &facts).unwrap_or_else(|| panic!("{}: none for {ranks:?}", plan.name));
        run(kernel, &plan.ranks, ranks, &mut buffers, &Options { schedule, seed: 3, ..Options::default() })
            .unwrap_or_else(|e| panic!("{} {schedule:?} at {ranks:?}: {e}", kernel.name));
    }
    let outs = plan.buffers.iter().zip(&buffers).filter(|((_, b), _)| b.kind == BufferKind::Output);
    for (((_, b), got), want) in outs.zip(&want) {
        assert!(got.defined.iter().all(|d| *d), "{} of {} is not written whole at {ranks:?}", b.name, plan.name);
        for (i, (x, y)) in got.data.iter().zip(&want.data).enumerate() {
            assert!(near(*x, *y), "{}: {}[{i}] {x} {y} at {ranks:?}", plan.name, b.name);
        }
    }
}

#[test]
fn sums_of_products_agree_under_every_schedule() {
    for (name, sizes) in CASES {
        let (plan, module) = mapped(name, "h200");
        for ranks in sizes {
            Schedule::ALL.into_iter().for_each(|s| agrees(&plan, &module, ranks, 256, s));
            agrees(&plan, &module, ranks, 2, Schedule::Random);
        }
    }
}

/// What a card has no instructions for is computed there all the same.
#[test]
fn attention_without_instructions_agrees() {
    for name in ["attention", "attention_gqa"] {
        let mut sheet = DataSheet::a100();
        sheet.gpu.as_mut().unwrap().atoms.clear();
        let plan = formed(name);
        let module = lowered(&plan, &choose(&plan, &sheet, None).to_string());
        let ranks: Vec<u64> = plan
            .ranks
            .iter()
            .map(|(_, r)| match r.name.as_str() {
                "B" | "G" => 1,
                "R" | "H" | "T" => 2,
                "M" => 5,
                "N" => 19,
                _ => 24,
            })
            .collect();
        [Schedule::Random, Schedule::RoundRobin].into_iter().for_each(|s| agrees(&plan, &module, &ranks, 256, s));
    }
}

#[test]
fn sums_of_products_assemble() {
    let names = CASES.iter().map(|c| c.0);
    let jobs: Vec<(&str, &str)> = names.flat_map(|n| [(n, "h200"), (n, "a100")]).collect();
    assembler::all(&jobs, |(name, sheet)| {
        let (plan, module) = mapped(name, sheet);
        let target = Target::of(&DataSheet::named(sheet).unwrap()).unwrap();
        let artifact = print(&plan, &module, &target).map_err(|e| e.to_string())?;
        let Code::Ptx { text, .. } = &artifact.code else { return Err("no PTX".to_string()) };
        let arches: &[&str] = if target.arch == "sm_90a" { &["sm_90a"] } else { &["sm_80", "sm_90", "sm_100a"] };
        arches.iter().try_for_each(|arch| match assembler::assemble(text, arch) {
            Ok(_) => Ok(()),
            Err(log) => Err(format!("{name} on {sheet} for {arch}:\n{log}")),
        })
    });
}

#[test]
fn printed_sums_of_products_agree() {
    for (name, sizes) in CASES {
        let (plan, module) = mapped(name, "h200");
        let artifact = print(&plan, &module, &Target::sm_90a()).unwrap_or_else(|e| panic!("{e}"));
        for ranks in sizes {
            let given = inputs(&plan, ranks);
            let got = machine::launch::execute(&artifact, ranks, &given);
            let want = tile::eval::run(&plan, ranks, &given, &tile::eval::Options::default()).unwrap();
            for (got, want) in got.iter().zip(&want) {
                let most = want.data.iter().fold(0f64, |m, x| m.max(x.abs()));
                // Results are bf16 or f32; the states are f32.
                let allowed = 1.5 * DType::BF16.unit_roundoff() * most;
                let off = |x: &f64, y: &f64| (x - y).is_nan() || (x - y).abs() > allowed;
                let wrong = got.iter().zip(&want.data).enumerate().find(|(_, (x, y))| off(x, y));
                assert!(wrong.is_none(), "{name} at {ranks:?}: {wrong:?}");
            }
        }
    }
}
