//! GPU lowering: a tile plan with a mapping becomes kernels with roles, channels and schedules.
//!
//! The steps, one file each: [`stage_stores`] (stores that leave through shared memory get a staging tile),
//! [`stage_operands`] (so do operands that a step computes and uses otherwise too),
//! [`reduce_products`] (contractions without an instruction), [`hold_rows`], [`walk_inner`] and [`share_reads`] (which
//! axes are whole in a block, and what is read once then), [`apply_mapping`] (blocks, spaces, roles and places in the
//! schedule of every operation), [`work_loop`] (which blocks a task computes, and in which order), [`assign_layouts`]
//! (swizzled shared layouts; who holds what in registers, from the atoms or as [`spread`] says), [`insert_channels`] (a
//! ring buffer with full and empty barriers between any writer and reader of a shared tile), [`split_domains`] (blocks
//! of a stream that need no mask), [`left_out`] (which masks change nothing), [`variants`] (what a launch must check
//! before it runs a kernel), [`schedule`] (skews expanded into prologue, steady loop and epilogue, with every wait),
//! [`emit`], [`early_loads`] (where loads are issued), [`late_starts`] (what begins as a constant), [`store_once`] (which unit
//! finishes what one stores), and [`overlap_launches`].
//! Invariant: nothing asks for a kernel's name or how many contractions a body has; what a mapping asks for that cannot
//! be done is refused with the constraint's name (codes G01xx), an expected answer.

use einfall_ir::analysis::resources::{self, Limits};
use einfall_ir::diag::{Diagnostic, Span};
use einfall_ir::kernel;
use einfall_ir::mapping::{KernelMapping, Mapping, MergeSite};
use einfall_ir::tile::{self, Plan};

use crate::pipeline::{Level, Pass, Program};

mod apply_mapping;
mod assign_layouts;
mod early_loads;
mod emit;
mod exprs;
mod hold_rows;
mod insert_channels;
mod join_parts;
mod late_starts;
mod left_out;
mod overlap_launches;
mod reduce_products;
mod schedule;
mod share_reads;
mod split_domains;
pub mod split_streams;
mod spread;
mod stage_operands;
pub mod stage_stores;
mod store_once;
mod variants;
mod walk_inner;
mod work_loop;

/// The lowering as a pass: tile → kernel by the mapping of the context.
pub const PASS: Pass = Pass {
    name: "lower-kernels-gpu",
    level: Level::Tile,
    step: |program, context| match (program, &context.mapping) {
        (Program::Tile(plan), Some(mapping)) => lower(&plan, mapping).map(Program::Kernel),
        (Program::Tile(_), None) => Err(vec![
            Diagnostic::error("G0102", Span::default(), "a GPU needs a mapping").help("pass one with --mapping FILE"),
        ]),
        (other @ (Program::Cascade(_) | Program::Kernel(_)), _) => Ok(other),
    },
    why: "last: blocks, roles and schedules come from the mapping, which names the tiles that formation made",
};

/// What a step returns: its result, or why the mapping cannot be lowered.
type Step<T> = Result<T, Diagnostic>;

/// An infeasible or unsupported mapping: `constraint` names the rule.
fn refuse<T>(constraint: &'static str, message: impl std::fmt::Display, help: &str) -> Step<T> {
    let refusal = Diagnostic::error("G0101", Span::default(), format!("{constraint}: {message}")).help(help);
    Err(Diagnostic { constraint: Some(constraint), ..refusal })
}

/// Lowers every kernel of `plan` by `mapping` for the device it is for (an H100 if no built-in sheet has the name).
///
/// # Errors
/// M02xx where the mapping does not fit the plan, G01xx where it is infeasible or not supported.
pub fn lower(plan: &Plan, mapping: &Mapping) -> Result<kernel::Module, Vec<Diagnostic>> {
    lower_for(plan, mapping, &Limits::named(&mapping.target))
}

/// One kernel by one entry of its mapping; none if its extents never fit.
fn variant(plan: &Plan, k: &tile::Kernel, m: &KernelMapping, limits: &Limits) -> Step<Option<kernel::Kernel>> {
    let whole = k;
    let blocks_alone = m.ops.is_empty() && m.tiles.iter().all(|t| t.engine.is_none());
    let products = if blocks_alone { reduce_products::run(k) } else { k.clone() };
    let mut k = walk_inner::run(plan, &hold_rows::run(&products, m)?, m)?;
    if m.ops.iter().all(|o| o.atom.is_none()) {
        k = share_reads::run(plan, &k);
    }
    let Some(assumes) = variants::assumptions(plan, whole, &k, m) else { return Ok(None) };
    let lowered = apply_mapping::run(plan, &k, m)
        .and_then(|f| work_loop::run(f, limits.multiprocessors))
        .and_then(assign_layouts::run)
        .and_then(insert_channels::run)
        .and_then(|f| emit::run(f, limits))?;
    let lowered = if m.early { early_loads::run(lowered) } else { lowered };
    let lowered = store_once::run(late_starts::run(lowered));
    Ok(Some(kernel::Kernel { assumes, ..lowered }))
}

/// Whether the parts of `kernel` merge where the last of them arrives.
fn merges_in_place(mapping: &Mapping, kernel: &str) -> bool {
    let at = |m: &KernelMapping| m.split.as_ref().is_some_and(|s| s.merge == MergeSite::LastArriver);
    mapping.kernels.iter().any(|m| m.kernel == kernel && at(m))
}

/// A kernel of parts with their merge in it, where `m` says so.
fn merged(
    plan: &Plan,
    part: kernel::Kernel,
    parts: &tile::Kernel,
    m: &KernelMapping,
    mapping: &Mapping,
    limits: &Limits,
) -> Step<Option<kernel::Kernel>> {
    if !merges_in_place(mapping, &parts.name) {
        return Ok(Some(part));
    }
    let name = split_streams::merge_name(&parts.name);
    let Some(merges) = plan.kernels.iter().find(|k| k.name == name) else {
        return refuse("split", format!("{} has not been cut", parts.name), "run split-streams first");
    };
    let empty = KernelMapping { kernel: name.clone(), ..KernelMapping::default() };
    let own = mapping.kernels.iter().find(|k| k.kernel == name).unwrap_or(&empty);
    let own = join_parts::mapped(own, &part)?;
    let Some(merge) = variant(plan, merges, &own, limits)? else { return Ok(None) };
    join_parts::run(plan, (part, parts, m), (merge, merges, &own)).map(Some)
}

/// Lowers every kernel of `plan` by `mapping` for a device with `limits`.
///
/// # Errors
/// As [`lower`].
pub fn lower_for(plan: &Plan, mapping: &Mapping, limits: &Limits) -> Result<kernel::Module, Vec<Diagnostic>> {
    if let Some(k) = plan.kernels.iter().find(|k| k.ordered.is_some()) {
        let message = format!("blocks of {} follow each other, which tasks of a GPU's launch do not", k.name);
        return refuse("order", message, "write a sequential stream instead").map_err(|d| vec![d]);
    }
    let bare = |m: &KernelMapping| KernelMapping { kernel: m.kernel.clone(), ..KernelMapping::default() };
    let names = Mapping { kernels: mapping.kernels.iter().map(bare).collect(), ..mapping.clone() };
    einfall_ir::mapping::verify::verify(&names, plan)?;
    let mut kernels = Vec::new();
    let joined = |k: &tile::Kernel| {
        let of = |other: &&tile::Kernel| split_streams::merge_name(&other.name) == k.name;
        plan.kernels.iter().find(of).is_some_and(|other| merges_in_place(mapping, &other.name))
    };
    for k in plan.kernels.iter().filter(|k| !joined(k)) {
        let empty = KernelMapping { kernel: k.name.clone(), ..KernelMapping::default() };
        let mut entries: Vec<&KernelMapping> = mapping.kernels.iter().filter(|m| m.kernel == k.name).collect();
        if entries.is_empty() {
            entries.push(&empty);
        }
        let mut all = Vec::new();
        for m in entries {
            // Each entry stages what it sends.
            let one = Mapping { kernels: vec![m.clone()], ..mapping.clone() };
            let (staged, one) = stage_stores::run(plan, &one).map_err(|d| vec![d])?;
            let (staged, one) = stage_operands::run(&staged, &one);
            einfall_ir::mapping::verify::verify(&one, &staged)?;
            let (m, own) = (&one.kernels[0], staged.kernels.iter().find(|x| x.name == k.name).unwrap_or(k));
            let Some(lowered) = variant(&staged, own, m, limits).map_err(|d| vec![d])? else { continue };
            let Some(lowered) = merged(&staged, lowered, own, m, mapping, limits).map_err(|d| vec![d])? else {
                continue;
            };
            let exceeded = resources::check(&lowered, limits);
            if !exceeded.is_empty() {
                let refused = exceeded.iter().filter_map(|x| {
                    let help = "use smaller blocks, fewer stages or other register budgets";
                    refuse::<()>("resources", format!("kernel {}: {x}", k.name), help).err()
                });
                return Err(refused.collect());
            }
            all.push(lowered);
        }
        let mut all = variants::run(plan, &k.name, all).map_err(|d| vec![d])?;
        if mapping.kernels.iter().any(|m| m.kernel == k.name && m.dependent) {
            overlap_launches::run(&mut kernels, &mut all).map_err(|d| vec![d])?;
        }
        kernels.extend(all);
    }
    Ok(kernel::Module { name: plan.name.clone(), ranks: plan.ranks.clone(), kernels })
}

/// Passes that move statements, in tests.
#[cfg(test)]
mod moving {
    use einfall_ir::kernel::{Kernel, parse, print};

    /// The statements of the main role, `body`, of a kernel with these declarations and `units` warps after a pass, in one line.
    pub(super) fn moved(declared: &str, units: usize, body: &str, pass: impl Fn(Kernel) -> Kernel) -> String {
        let text = format!(
            "module m {{\nranks N\nkernel k {{\ngrid [N]\n{declared}\nrole main: {units} warp {{\n{body}\n}}\n}}\n}}\n"
        );
        let mut m = parse::parse(&text).unwrap_or_else(|d| panic!("{d:?}\n{text}"));
        let kernel = m.kernels.remove(0);
        m.kernels.push(pass(kernel));
        let text = print::print(&m);
        let lines = text.lines().skip_while(|l| !l.contains("role main")).skip(1).take_while(|l| *l != "        }");
        lines.map(str::trim).collect::<Vec<_>>().join("; ")
    }
}
