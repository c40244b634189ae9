//! `explain`: passes, derivations, bounds and the plan of every cascade of a file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use einfall::with_statics;
use einfall_autotune::{model_cpu, model_gpu};
use einfall_codegen::pipeline::Context;
use einfall_ir::analysis::explain::{Mapped, Options, report, to_json, to_text};
use einfall_ir::analysis::traffic::{plan_traffic, roofline_us};
use einfall_ir::cascade::{Cascade, Rank};
use einfall_ir::kernel::atoms;
use einfall_ir::target::DataSheet;

use super::source::{Pairs, Source, sizes};
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
    /// The data sheet whose memory levels are bounded
    #[arg(long, default_value = "cpu")]
    target: String,
    /// Print the versioned JSON of docs/explain-schema.md
    #[arg(long)]
    json: bool,
}

/// Prints the report.
pub fn explain(args: &ExplainArgs) -> Result<(), Failure> {
    let source = Source::read(&args.file)?;
    let mut module = source.module()?;
    let Some(target) = DataSheet::named(&args.target) else {
        let names: Vec<String> = DataSheet::all().into_iter().map(|d| d.name).collect();
        return Err(Failure::Usage(format!("there is no target `{}`; there are {}", args.target, names.join(", "))));
    };
    let given = sizes(&args.size).into_iter().chain(sizes(&args.statics)).collect::<BTreeMap<String, u64>>();
    for name in given.keys() {
        if !module.cascades.iter().any(|c| c.rank(name).is_some()) {
            return Err(Failure::Usage(format!("no cascade of {} has a rank `{name}`", source.name)));
        }
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
    let atoms = if target.gpu.is_some() { atoms::all().collect() } else { Vec::new() };
    let plan = einfall::plan_for(c, &Context { atoms, ..Context::default() }).ok()?;
    let extent = |r: &Rank| given.get(&r.name).copied().or(r.fixed);
    let extents: Option<Vec<u64>> = plan.ranks.iter().map(|(_, r)| extent(r)).collect();
    let mapping = match target.gpu {
        Some(_) => model_gpu::choose(&plan, target, extents.as_deref()),
        None => model_cpu::choose(&plan, target),
    };
    let mut entry =
        Mapped { kernels: Some(plan.kernels.len()), mapping: Some(mapping.to_string()), ..Mapped::default() };
    if let Some(n) = &extents
        && let Some(t) = plan_traffic(&plan, &mapping, n, target)
    {
        entry.bytes = t.levels.iter().map(|l| (l.level.clone(), l.bytes())).collect();
        entry.predicted_us = roofline_us(&plan, &mapping, n, target);
    }
    Some(entry)
}
