//! The pipelines: which passes run, in order, and why each stands where it does.
//!
//! [`TO_TILE`] takes every cascade to a plan over tiles; a mapping is chosen for that plan; [`CPU`] or [`GPU`] takes
//! the plan and its mapping to the kernel level. Nothing here looks inside a program.

use einfall_ir::analysis::resources;
use einfall_ir::cascade::print::print_cascade;
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::diag::{Diagnostic, Span};
use einfall_ir::kernel::verify::Limits;
use einfall_ir::mapping::Mapping;
use einfall_ir::{kernel, tile};

use crate::lower;
use crate::passes::{
    expand_segments, expand_selections, extract_reductions, fix_extents, fold_exponents, fuse_indices, load_reads,
    pack_arrays, propagate_support, round_operands, split_constant_dims, unpack_storage, unroll_axes,
};
use crate::pipeline::{Context, Forms, Level, Pass, Program};

/// From a cascade to a plan of kernels over tiles.
pub const TO_TILE: &[Pass] = &[
    Pass {
        name: "fix-extents",
        level: Level::Cascade,
        step: |p, _| Ok(Program::Cascade(fix_extents::fix_extents(cascade(p)))),
        why: "first: every later pass can fold extents that the text or --static fixes",
    },
    Pass {
        name: "expand-segments",
        level: Level::Cascade,
        step: |p, _| {
            let c = expand_segments::expand_segments(cascade(p)).map_err(|e| vec![e.diagnostic()])?;
            Ok(Program::Cascade(c))
        },
        why: "before supports: a point in no segment does not exist",
    },
    Pass {
        name: "expand-selections",
        level: Level::Cascade,
        step: |p, _| Ok(Program::Cascade(expand_selections::expand_selections(cascade(p)))),
        why: "before supports, which a selection among some of the points cannot express by an identity",
    },
    Pass {
        name: "propagate-support",
        level: Level::Cascade,
        step: |p, _| {
            let c = propagate_support::propagate_support(cascade(p)).map_err(|e| vec![e.diagnostic()])?;
            Ok(Program::Cascade(c))
        },
        why: "before statements are taken apart: a filter belongs to its whole statement",
    },
    Pass {
        name: "unpack-storage",
        level: Level::Cascade,
        step: |p, _| {
            let c = unpack_storage::unpack_storage(cascade(p)).map_err(|e| vec![e.diagnostic()])?;
            Ok(Program::Cascade(c))
        },
        why: "after supports, whose `else` is then part of what is packed; before accesses are read",
    },
    Pass {
        name: "split-constant-dims",
        level: Level::Cascade,
        step: |p, _| Ok(Program::Cascade(split_constant_dims::split_constant_dims(cascade(p)))),
        why: "before grouping, which needs accesses that are indices",
    },
    Pass {
        name: "fuse-indices",
        level: Level::Cascade,
        step: |p, _| Ok(Program::Cascade(fuse_indices::fuse_indices(cascade(p)))),
        why: "before reductions are taken out: a left side that is no list of indices needs a statement of its own",
    },
    Pass {
        name: "extract-reductions",
        level: Level::Cascade,
        step: |p, _| Ok(Program::Cascade(extract_reductions::extract_reductions(cascade(p)))),
        why: "last on cascades: form-kernels wants one reduction a statement",
    },
    Pass {
        name: "form-kernels",
        level: Level::Cascade,
        step: |p, _| Ok(Program::Tile(lower::form::form_kernels(&cascade(p)).map_err(|e| vec![e.diagnostic()])?)),
        why: "groups statements that share a stream and derives one-pass forms of what would need several",
    },
    Pass {
        name: "fold-exponents",
        level: Level::Tile,
        step: |p, _| Ok(Program::Tile(fold_exponents::fold_exponents(plan(p)))),
        why: "after one-pass forms, whose anchors it reads; before operands are copied",
    },
    Pass {
        name: "load-reads",
        level: Level::Tile,
        step: |p, context| Ok(Program::Tile(load_reads::load_reads(plan(p), &context.atoms))),
        why: "before axes are unrolled, so that one load becomes one per coordinate",
    },
    Pass {
        name: "unroll-axes",
        level: Level::Tile,
        step: |p, context| Ok(Program::Tile(unroll_axes::unroll_axes(plan(p), &context.atoms))),
        why: "before operands are copied: each coordinate's contraction has its own",
    },
    Pass {
        name: "round-operands",
        level: Level::Tile,
        step: |p, context| Ok(Program::Tile(round_operands::round_operands(plan(p), &context.atoms))),
        why: "after everything that decides what feeds a contraction; before the mapping, which names the tiles",
    },
    Pass {
        name: "pack-arrays",
        level: Level::Tile,
        step: |p, context| Ok(Program::Tile(pack_arrays::pack_arrays(plan(p), context.arrays))),
        why: "after loads are made, whose positions it rewrites; before the mapping, as it adds kernels and an array",
    },
];

/// The plan that the passes on cascades make of `c`: [`TO_TILE`] up to `form-kernels`.
///
/// # Errors
/// The first construct without a lowering.
pub fn formed(c: Cascade) -> Result<tile::Plan, Vec<Diagnostic>> {
    let context = Context::default();
    let on_cascades = TO_TILE.iter().filter(|pass| pass.level == Level::Cascade);
    on_cascades.map(|pass| pass.step).try_fold(Program::Cascade(c), |p, step| step(p, &context)).map(plan)
}

/// From a mapped plan to kernels for CPU cores.
pub const CPU: &[Pass] = &[
    Pass {
        name: "round-operands",
        level: Level::Tile,
        step: |p, context| {
            let atoms = context.isa.map_or(Vec::new(), |isa| isa.atoms());
            Ok(Program::Tile(round_operands::round_operands(plan(p), &atoms)))
        },
        why: "first: whether a processor multiplies tiles is known here, and a plan serves every processor; before blocks, \
              so that what is computed does not depend on them",
    },
    Pass {
        name: "launch-steps",
        level: Level::Tile,
        step: |p, context| {
            let Some(mapping) = &context.mapping else { return Ok(p) };
            let plan = lower::cpu::launch_steps(&plan(p), mapping).map_err(|e| {
                let help = "leave `launches` out of the mapping";
                vec![Diagnostic::error("E0906", Span::default(), e.to_string()).help(help)]
            })?;
            Ok(Program::Tile(plan))
        },
        why: "before blocks, since inner axes become the launch's",
    },
    Pass {
        name: "apply-blocks",
        level: Level::Tile,
        step: |p, context| {
            let plan = plan(p);
            Ok(Program::Tile(match &context.mapping {
                Some(m) => lower::cpu::apply(&plan, m),
                None => plan,
            }))
        },
        why: "after the mapping is chosen for the plan's axes",
    },
    Pass {
        name: "pack-operands",
        level: Level::Tile,
        step: |p, context| {
            let isa = context.isa.ok_or_else(|| vec![missing("the instruction set of a CPU")])?;
            let Some(mapping) = &context.mapping else { return Ok(p) };
            let plan = lower::cpu::pack_operands(&plan(p), mapping, &isa).map_err(|e| {
                let help = "leave the line `tile .. in packed` out of the mapping";
                vec![Diagnostic::error("E0905", Span::default(), e.to_string()).help(help)]
            })?;
            Ok(Program::Tile(plan))
        },
        why: "after blocks, of which panels must be whole parts; the plan gains kernels and arrays",
    },
    Pass {
        name: "lower-cpu",
        level: Level::Tile,
        step: |p, context| {
            let isa = context.isa.ok_or_else(|| vec![missing("the instruction set of a CPU")])?;
            let module = lower::cpu::lower(&plan(p), &isa).map_err(|e| {
                let help = "use --device reference, or rewrite it with supported constructs";
                vec![Diagnostic::error("E0901", Span::default(), e.to_string()).help(help)]
            })?;
            Ok(Program::Kernel(module))
        },
        why: "last: every choice is made, what is left is loops, registers and memory",
    },
];

/// From a mapped plan to kernels with roles, channels and schedules.
pub const GPU: &[Pass] = &[
    Pass {
        name: "split-streams",
        level: Level::Tile,
        step: |p, context| {
            let Some(mapping) = &context.mapping else { return Ok(p) };
            let multiprocessors = limits(context, mapping).multiprocessors;
            let split = lower::gpu::split_streams::run(&plan(p), mapping, multiprocessors).map_err(|d| vec![d])?;
            Ok(Program::Tile(split))
        },
        why: "after the mapping is chosen, which says what is cut; the plan gains kernels and arrays",
    },
    Pass {
        name: "lower-gpu",
        level: Level::Tile,
        step: |p, context| {
            let mapping = context.mapping.as_ref().ok_or_else(|| vec![missing("a mapping (--mapping FILE)")])?;
            Ok(Program::Kernel(lower::gpu::lower_for(&plan(p), mapping, &limits(context, mapping))?))
        },
        why: "last: layouts, channels and the schedule follow from the mapping",
    },
];

/// What the GPU that is lowered for has: the context's limits, else those of the sheet that the mapping names.
fn limits(context: &Context, mapping: &Mapping) -> resources::Limits {
    context.limits.clone().unwrap_or_else(|| resources::Limits::named(&mapping.target))
}

/// How programs of every level print and are verified.
pub const FORMS: Forms = Forms { print, verify };

fn cascade(p: Program) -> Cascade {
    match p {
        Program::Cascade(c) => c,
        Program::Tile(_) | Program::Kernel(_) => unreachable!("the runner checks levels"),
    }
}

fn plan(p: Program) -> tile::Plan {
    match p {
        Program::Tile(plan) => plan,
        Program::Cascade(_) | Program::Kernel(_) => unreachable!("the runner checks levels"),
    }
}

fn missing(what: &str) -> Diagnostic {
    Diagnostic::error("E0902", Span::default(), format!("lowering needs {what}"))
}

fn print(p: &Program) -> String {
    match p {
        Program::Cascade(c) => print_cascade(c),
        Program::Tile(plan) => plan.to_string(),
        Program::Kernel(m) => kernel::print::print(m),
    }
}

/// Limits are the roomiest device's; those of the device at hand are checked where a mapping is lowered.
fn verify(p: &Program) -> Vec<String> {
    match p {
        Program::Cascade(c) => match parse(&print_cascade(c)) {
            Ok(_) => Vec::new(),
            Err(faults) => faults.iter().map(|d| d.to_string()).collect(),
        },
        Program::Tile(plan) => tile::verify::verify(plan).err().into_iter().flatten().map(|f| f.to_string()).collect(),
        Program::Kernel(m) => kernel::verify::verify(m, &Limits::SM90).iter().map(|f| f.to_string()).collect(),
    }
}
