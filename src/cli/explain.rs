//! `explain`: passes, derivations, bounds and the plan of every cascade of a file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use einfall::with_statics;
use einfall_autotune::{model_cpu, model_gpu};
use einfall_codegen::pipeline::Context;
use einfall_ir::analysis::explain::{Mapped, Options, report, to_json, to_text};
use einfall_ir::analysis::traffic::{plan_traffic, roofline_us};
use einfall_ir::cascade::{Cascade, Module, Rank};
use einfall_ir::kernel::atoms;
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;

use super::lower::{gpu_plan, plan_sizes, read_mapping};
use super::source::{Pairs, Source, data_sheet, ranks_of, sizes};
use super::{Failure, engine_failure};

/// Arguments of `explain`.
#[derive(clap::Args)]
pub struct ExplainArgs {
    /// The .ein file
    file: PathBuf,
    /// Extents, for the bounds
    #[arg(long, value_name = "RANK=N,..")]
    size: Vec<Pairs<u64>>,
    /// Extents fixed at compile time
    #[arg(long = "static", value_name = "RANK=N,..")]
    statics: Vec<Pairs<u64>>,
    /// The data sheet whose memory levels are bounded: a name, or a file as `devices --probe` prints it
    #[arg(long, default_value = "cpu")]
    target: String,
    /// Name the constraint that rejects this mapping, and stop
    #[arg(long, value_name = "FILE")]
    why_not: Option<PathBuf>,
    /// Print the versioned JSON of docs/explain-schema.md
    #[arg(long)]
    json: bool,
}

/// Prints the report.
pub fn explain(args: &ExplainArgs) -> Result<(), Failure> {
    let source = Source::read(&args.file)?;
    let mut module = source.module()?;
    let target = data_sheet(&args.target).map_err(Failure::Usage)?;
    let given = sizes(&args.size).into_iter().chain(sizes(&args.statics)).collect::<BTreeMap<String, u64>>();
    for name in given.keys() {
        if !module.cascades.iter().any(|c| c.rank(name).is_some()) {
            let there = ranks_of(module.cascades.iter());
            return Err(Failure::Usage(format!("no cascade of {} has a rank `{name}`; {there}", source.name)));
        }
    }
    if let Some(path) = &args.why_not {
        return why_not(&source, &module, &target, &given, path);
    }
    let mut mapped = BTreeMap::new();
    for c in &mut module.cascades {
        let own: Vec<(String, u64)> = sizes(&args.statics).into_iter().filter(|(n, _)| c.rank(n).is_some()).collect();
        *c = with_statics(c, &own).map_err(|e| engine_failure(&source, e))?;
        if let Some(entry) = map(c, &target, &given) {
            mapped.insert(c.name.clone(), entry);
        }
    }
    let report = report(&module, &Options { sizes: given, target: Some(target) }, &mapped);
    if args.json {
        println!("{}", to_json(&report));
    } else {
        print!("{}", to_text(&report));
    }
    Ok(())
}

/// The kernels of a cascade, the mapping that the model of the target chooses for them, and what that costs where every
/// extent is known. None for what has no lowering: its analyses stand all the same.
fn map(c: &Cascade, target: &DataSheet, given: &BTreeMap<String, u64>) -> Option<Mapped> {
    let plan = einfall::plan_for(c, &Context { atoms: atoms::of(target), ..Context::default() }).ok()?;
    let extent = |r: &Rank| given.get(&r.name).copied().or(r.fixed);
    let extents: Option<Vec<u64>> = plan.ranks.iter().map(|(_, r)| extent(r)).collect();
    let mapping = match target.gpu {
        Some(_) => model_gpu::choose(&plan, target, extents.as_deref()),
        None => model_cpu::choose_for(&plan, target, extents.as_deref()),
    };
    let predicted = match target.gpu {
        Some(_) => predictions(&plan, target, extents.as_deref()),
        None => cpu_predictions(&plan, target, extents.as_deref(), &mapping),
    };
    let text = predicted + &mapping.to_string();
    let mut entry = Mapped { kernels: Some(plan.kernels.len()), mapping: Some(text), ..Mapped::default() };
    if let Some(n) = &extents
        && let Some(t) = plan_traffic(&plan, &mapping, n, target)
    {
        entry.bytes = t.levels.iter().map(|l| (l.level.clone(), l.bytes())).collect();
        entry.predicted_us = roofline_us(&plan, &mapping, n, target);
    }
    Some(entry)
}

/// What the GPU model predicts for the kernels that contract, a comment line each.
fn predictions(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>) -> String {
    let mut text = String::new();
    for kernel in &plan.kernels {
        match model_gpu::kernel_candidates(plan, kernel, sheet, sizes, 1) {
            Ok(found) => {
                let cost = &found[0].1;
                let us = cost.seconds * 1e6;
                text += &format!("// {}: predicted {us:.1} us, {} binds:", kernel.name, cost.binding);
                for (term, seconds) in &cost.terms {
                    text += &format!(" {term} {:.1} us;", seconds * 1e6);
                }
                text += &format!(" {:.0} tasks, {} per multiprocessor\n", cost.tasks, cost.resident);
            }
            Err(e) => text += &format!("// {}: {}: {}\n", kernel.name, e.constraint, e.message),
        }
    }
    text
}

/// What the CPU model predicts for every kernel under a mapping, a comment line each.
fn cpu_predictions(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, mapping: &Mapping) -> String {
    let Some(sizes) = sizes else { return String::new() };
    let costs = match model_cpu::costs(plan, sheet, Some(sizes), mapping) {
        Ok(costs) => costs,
        Err(e) => return format!("// {e}\n"),
    };
    let mut text = String::new();
    for (kernel, cost) in plan.kernels.iter().zip(&costs) {
        let (us, floor) = (cost.seconds * 1e6, cost.floor * 1e6);
        text += &format!("// {}: predicted {us:.1} us, no less than {floor:.1}; {} binds:", kernel.name, cost.binding);
        for (term, seconds) in &cost.terms {
            text += &format!(" {term} {:.1} us;", seconds * 1e6);
        }
        text += &format!(" {:.0} tasks\n", cost.tasks);
    }
    text
}

/// Names what rejects a mapping file.
fn why_not(
    source: &Source,
    module: &Module,
    sheet: &DataSheet,
    given: &BTreeMap<String, u64>,
    path: &Path,
) -> Result<(), Failure> {
    let mapping = read_mapping(path)?;
    let named = module.cascades.iter().find(|c| c.name == mapping.plan);
    let Some(cascade) = named else {
        let names: Vec<&str> = module.cascades.iter().map(|c| c.name.as_str()).collect();
        return Err(Failure::Wrong(format!(
            "{}: the mapping is for plan `{}`; {} has {}",
            path.display(),
            mapping.plan,
            source.name,
            names.join(", ")
        )));
    };
    let plan = match sheet.gpu {
        Some(_) => gpu_plan(cascade, sheet)
            .ok_or_else(|| Failure::Wrong(format!("{}: `{}` has no plan", source.name, cascade.name)))?,
        None => einfall::plan(cascade).map_err(|e| engine_failure(source, e))?,
    };
    einfall::fits(&mapping, &plan).map_err(|why| Failure::Wrong(format!("{}: {why}", path.display())))?;
    let list: Vec<(String, u64)> = given.iter().map(|(n, v)| (n.clone(), *v)).collect();
    let sizes = plan_sizes(&plan, &list)?;
    let rejected = match sheet.gpu {
        Some(_) => model_gpu::why_not(&plan, sheet, sizes.as_deref(), &mapping),
        None => model_cpu::why_not(&plan, sheet, sizes.as_deref(), &mapping),
    };
    match rejected {
        Some(rejected) => Err(Failure::Wrong(rejected.to_string())),
        None => {
            println!("the model admits {}", path.display());
            Ok(())
        }
    }
}
