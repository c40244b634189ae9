//! The mapping model for GPUs: every kernel of a plan gets the cheapest mapping that a data sheet admits.
//!
//! A kernel's [`facts`] lead to its [`structure`]s (cuts, orientations, places of tiles, roles, schedules); each
//! structure has an integer CSP ([`space`]) over blocks, units, clusters, instructions, stages, swizzles, register
//! budgets and orders; [`cost`] prices assignments and [`mod@search`] finds the cheapest; [`mod@write`] turns assignments into
//! mappings and back. Kernels without contractions go to [`elementwise`], those of devices without instructions for
//! tiles to [`multiply_add`], which asks [`cooperative`] where an adapter multiplies matrices, other contractions without an instruction to [`products`]. Invariant: nothing asks for a
//! kernel's name;
//! what is returned for a kernel that the model has a structure for satisfies every constraint of its CSP.

use std::ops::ControlFlow;

use einfall_ir::mapping::{AxisMapping, KernelMapping, Mapping};
use einfall_ir::target::{DataSheet, Gpu};
use einfall_ir::tile::{AxisKind, Kernel, Op, Plan};

use crate::csp::{Pred, Solver, VarId};

pub mod cooperative;
pub mod cost;
pub mod elementwise;
pub mod facts;
pub mod family;
mod few_rows;
pub mod live;
pub mod multiply_add;
pub mod obstacle;
pub mod products;
pub mod sample;
pub mod search;
pub mod space;
pub mod structure;
pub mod work;
pub mod write;

pub use cost::Cost;
use facts::Facts;
pub use facts::Unsupported;
use family::Family;
pub use obstacle::{Obstacle, obstacle};
use rayon::prelude::*;
pub use sample::sample;
use search::search;
use space::Space;
use structure::structures;
use write::Normal;

/// Whether a kernel contracts.
fn contracts(kernel: &Kernel) -> bool {
    let mut found = false;
    kernel.for_each_op(&mut |op, _| found |= matches!(op, Op::Contract { .. }));
    found
}

/// The instructions of a sheet's device, or why the model has no mappings for it.
fn device(sheet: &DataSheet) -> Result<(Family, &Gpu), Unsupported> {
    let family = Family::of(sheet)?;
    match &sheet.gpu {
        Some(gpu) => Ok((family, gpu)),
        None => facts::unsupported("device", format!("{} is not a GPU", sheet.name)),
    }
}

/// The best `k` mappings of one kernel with contractions, cheapest first.
///
/// # Errors
/// Why there is none.
pub fn kernel_candidates(
    plan: &Plan,
    kernel: &Kernel,
    sheet: &DataSheet,
    sizes: Option<&[u64]>,
    k: usize,
) -> Result<Vec<(KernelMapping, Cost)>, Unsupported> {
    mapped(Facts::new(plan, kernel, sizes)?, sheet, k)
}

fn mapped(facts: Facts<'_>, sheet: &DataSheet, k: usize) -> Result<Vec<(KernelMapping, Cost)>, Unsupported> {
    let (family, gpu) = device(sheet)?;
    let kernel = facts.kernel;
    let all = structures(&facts, family)?;
    let found = search(&facts, &all, sheet, (family, gpu), k);
    if found.is_empty() {
        return facts::unsupported("resources", format!("no blocks of {} fit {}", kernel.name, sheet.name));
    }
    Ok(found.into_iter().map(|f| (f.mapping, f.cost)).collect())
}

/// What is left where the model has no mapping by instructions: sums of products where no structure obeys the rules; where
/// no blocks fit one that does, the wrong blocks, so that the lowering says what it lacks.
fn fallback(kernel: &Kernel, plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>) -> Vec<KernelMapping> {
    let facts = Facts::new(plan, kernel, sizes).map(|f| f.with_inner(|_| Some(INNER_CLASSES[0])));
    if device(sheet).and_then(|(family, _)| structures(&facts?, family)).is_err() {
        return products::variants(kernel, plan, sheet, sizes);
    }
    let axes = kernel.axes.iter().filter(|(_, a)| a.kind != AxisKind::Inner).map(|(_, a)| {
        let block = if a.kind == AxisKind::Stream { 64 } else { 1 };
        AxisMapping::new(&a.name, a.block.unwrap_or(block))
    });
    vec![KernelMapping { kernel: kernel.name.clone(), axes: axes.collect(), ..KernelMapping::default() }]
}

/// Extents of inner axes that a kernel gets variants for where no size is given.
const INNER_CLASSES: [u64; 3] = [64, 128, 256];

/// The mapping of every kernel of `plan` for the device of `sheet`. `sizes`: one value per rank of the plan, the sizes
/// to be fast at; inner axes are mapped for just these (or smaller) extents. Without sizes, kernels with inner axes get
/// variants for head widths up to 64, 128 and 256. Never fails: a kernel outside the model gets blocks alone ([`products`]).
pub fn choose(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>) -> Mapping {
    let best = |facts: Facts<'_>| mapped(facts, sheet, 1).ok().and_then(|c| c.into_iter().next()).map(|c| c.0);
    let entries = |kernel: &Kernel| -> Vec<KernelMapping> {
        if !contracts(kernel) {
            return elementwise::variants(kernel, plan, sheet, sizes);
        }
        if let Some(all) = multiply_add::variants(kernel, plan, sheet, sizes) {
            return all;
        }
        let found: Vec<KernelMapping> = match Facts::new(plan, kernel, sizes) {
            Ok(facts) if facts.open() => {
                INNER_CLASSES.par_iter().filter_map(|n| best(facts.clone().with_inner(|_| Some(*n)))).collect()
            }
            Ok(facts) => best(facts).into_iter().collect(),
            Err(_) => Vec::new(),
        };
        if found.is_empty() { fallback(kernel, plan, sheet, sizes) } else { found }
    };
    let kernels = plan.kernels.par_iter().flat_map_iter(entries).collect();
    Mapping { plan: plan.name.clone(), target: sheet.name.clone(), kernels }
}

/// The best `k` mappings of the plan that differ in structure or several numbers, cheapest first, with the cost of all
/// kernels that contract. The i-th candidate has every kernel's i-th best mapping, or its last.
pub fn candidates(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, k: usize) -> Vec<(Mapping, Cost)> {
    let per_kernel: Vec<Vec<(Vec<KernelMapping>, Option<Cost>)>> = plan
        .kernels
        .iter()
        .map(|kernel| {
            if !contracts(kernel) {
                return vec![(elementwise::variants(kernel, plan, sheet, sizes), None)];
            }
            if let Some(all) = multiply_add::variants(kernel, plan, sheet, sizes) {
                // Whether parts of a stream are worth a second launch is what measuring says best.
                let whole = all.iter().map(|m| KernelMapping { split: None, ..m.clone() }).collect();
                let cut = all.iter().any(|m| m.split.is_some());
                return std::iter::once(all).chain(cut.then_some(whole)).map(|m| (m, None)).collect();
            }
            match kernel_candidates(plan, kernel, sheet, sizes, k) {
                Ok(found) => found.into_iter().map(|(m, c)| (vec![m], Some(c))).collect(),
                Err(_) => vec![(fallback(kernel, plan, sheet, sizes), None)],
            }
        })
        .collect();
    let most = per_kernel.iter().map(Vec::len).max().unwrap_or(0).min(k);
    (0..most)
        .map(|i| {
            let chosen: Vec<_> = per_kernel.iter().filter_map(|list| list.get(i).or(list.last())).cloned().collect();
            let cost = Cost::total(chosen.iter().filter_map(|c| c.1.as_ref()));
            let kernels = chosen.into_iter().flat_map(|c| c.0).collect();
            (Mapping { plan: plan.name.clone(), target: sheet.name.clone(), kernels }, cost)
        })
        .collect()
}

/// What a mapping of all kernels costs: those with contractions, by the first entry of each; none where no kernel has
/// a price.
///
/// # Errors
/// The constraint that rejects it.
pub fn price(
    plan: &Plan,
    sheet: &DataSheet,
    sizes: Option<&[u64]>,
    mapping: &Mapping,
) -> Result<Option<Cost>, Rejected> {
    let mut costs = Vec::new();
    for kernel in plan.kernels.iter().filter(|k| contracts(k)) {
        let empty = KernelMapping { kernel: kernel.name.clone(), ..KernelMapping::default() };
        let entry = mapping.kernels.iter().find(|m| m.kernel == kernel.name).unwrap_or(&empty);
        costs.push(admitted(plan, kernel, sheet, sizes, entry)?);
    }
    Ok((!costs.is_empty()).then(|| Cost::total(costs.iter())))
}

/// `n` mappings of the plan, every kernel with contractions drawn from what the model admits for it, all others by
/// their rule; none where the model has nothing to draw from.
pub fn drawn(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, seed: u64, n: usize) -> Vec<Mapping> {
    let mut lists: Vec<Vec<Vec<KernelMapping>>> = Vec::new();
    let mut any = false;
    for (i, kernel) in plan.kernels.iter().enumerate() {
        let drawn = match contracts(kernel) {
            true => sample(plan, kernel, sheet, sizes, seed.wrapping_add(i as u64), n).unwrap_or_default(),
            false => Vec::new(),
        };
        any |= !drawn.is_empty();
        lists.push(match (drawn.is_empty(), contracts(kernel)) {
            (false, _) => drawn.into_iter().map(|m| vec![m]).collect(),
            (true, true) => vec![fallback(kernel, plan, sheet, sizes)],
            (true, false) => vec![elementwise::variants(kernel, plan, sheet, sizes)],
        });
    }
    let most = if any { lists.iter().map(Vec::len).max().unwrap_or(0) } else { 0 };
    (0..most)
        .map(|i| {
            let kernels = lists.iter().flat_map(|l| l[i % l.len()].clone()).collect();
            Mapping { plan: plan.name.clone(), target: sheet.name.clone(), kernels }
        })
        .collect()
}

/// Why the model does not admit a mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The kernel.
    pub kernel: String,
    /// The constraint, or the aspect of the mapping that no structure has.
    pub constraint: String,
    /// What breaks it.
    pub message: String,
}

impl std::fmt::Display for Rejected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "kernel {}: {}: {}", self.kernel, self.constraint, self.message)
    }
}

impl std::error::Error for Rejected {}

/// The constraint that rejects `mapping`; none if it is admitted. Kernels without contractions are not judged.
pub fn why_not(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, mapping: &Mapping) -> Option<Rejected> {
    for kernel in plan.kernels.iter().filter(|k| contracts(k)) {
        let empty = KernelMapping { kernel: kernel.name.clone(), ..KernelMapping::default() };
        let mut entries: Vec<&KernelMapping> = mapping.kernels.iter().filter(|m| m.kernel == kernel.name).collect();
        if entries.is_empty() {
            entries.push(&empty);
        }
        for m in entries {
            if let Err(e) = admitted(plan, kernel, sheet, sizes, m) {
                return Some(e);
            }
        }
    }
    None
}

/// What an admitted mapping of one kernel costs.
///
/// # Errors
/// The constraint that rejects it.
pub fn admitted(
    plan: &Plan,
    kernel: &Kernel,
    sheet: &DataSheet,
    sizes: Option<&[u64]>,
    m: &KernelMapping,
) -> Result<Cost, Rejected> {
    let reject = |constraint: String, message: String| Rejected { kernel: kernel.name.clone(), constraint, message };
    let outside = |u: Unsupported| reject(u.constraint, u.message);
    let (family, gpu) = device(sheet).map_err(outside)?;
    // Without sizes an inner axis is as long as the mapping's block.
    let facts = Facts::new(plan, kernel, sizes).map_err(outside)?;
    let facts = facts.with_inner(|a| m.axis(a).map(|l| l.block));
    let all = structures(&facts, family).map_err(outside)?;
    let given = Normal::of(&facts, m);
    let mut best: Option<(usize, Rejected)> = None;
    for s in &all {
        let space = Space::new(&facts, s, family, gpu);
        let values = write::read(&space, m);
        let orders = space.vars.order.is_some_and(|o| values[o.idx()] < 0);
        let mut differs = if orders { vec!["work order".to_string()] } else { Vec::new() };
        if !orders {
            differs = given.differences(&Normal::of(&facts, &write::write(&space, &values)));
        }
        let found = match (differs.first(), space.model.check(&values)) {
            (None, Ok(())) => return Ok(cost::cost(&space, &cost::Work::of(&facts, s), sheet, gpu, &values)),
            (None, Err(broken)) => {
                let message = describe(&space, &values, &broken.name);
                (0, reject(broken.name, message))
            }
            (Some(first), _) => {
                let message = format!("no structure has it; nearest ones differ in {}", differs.join(", "));
                (differs.len(), reject(first.clone(), message))
            }
        };
        if best.as_ref().is_none_or(|b| found.0 < b.0) {
            best = Some(found);
        }
    }
    Err(best.map_or_else(|| reject("structure".into(), "the kernel has none".into()), |b| b.1))
}

/// The values of the variables of a constraint.
fn describe(space: &Space<'_, '_>, values: &[i64], name: &str) -> String {
    let mut vars: Vec<VarId> = space.model.find(name).into_iter().collect();
    if let Some(c) = space.model.constraints().iter().find(|c| c.name == name) {
        c.pred.for_each_var(&mut |v| {
            if !vars.contains(&v) {
                vars.push(v);
            }
        });
    }
    let list: Vec<String> = vars.iter().map(|v| format!("{} = {}", space.model.name(*v), values[v.idx()])).collect();
    format!("does not hold for {}", list.join(", "))
}

/// How many mappings of a kernel the model admits, up to `limit`: assignments of every structure's CSP.
///
/// # Errors
/// Why there is none.
pub fn count(
    plan: &Plan,
    kernel: &Kernel,
    sheet: &DataSheet,
    sizes: Option<&[u64]>,
    limit: u64,
) -> Result<u64, Unsupported> {
    let (family, gpu) = device(sheet)?;
    let facts = Facts::new(plan, kernel, sizes)?;
    let mut total = 0;
    for s in &structures(&facts, family)? {
        let space = Space::new(&facts, s, family, gpu);
        let mut visit = |_: &[i64]| {
            total += 1;
            if total >= limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        // A structure that cannot be enumerated adds nothing to the count.
        let _ = Solver::new(&space.model).for_each(&[], &mut visit);
        if total >= limit {
            break;
        }
    }
    Ok(total)
}

/// Whether the model admits a mapping of a kernel that has what `property` says of a structure: a condition on its
/// variables, or nothing where the structure cannot have it.
///
/// # Errors
/// Why the kernel has no mapping at all, or what keeps the solver from an answer.
pub fn admits(
    plan: &Plan,
    kernel: &Kernel,
    sheet: &DataSheet,
    sizes: Option<&[u64]>,
    property: &dyn Fn(&Space<'_, '_>) -> Option<Pred>,
) -> Result<bool, Unsupported> {
    let (family, gpu) = device(sheet)?;
    let facts = Facts::new(plan, kernel, sizes)?;
    for s in &structures(&facts, family)? {
        let mut space = Space::new(&facts, s, family, gpu);
        let Some(wanted) = property(&space) else { continue };
        space.model.constrain("property", wanted);
        match Solver::new(&space.model).first() {
            Ok(None) => {}
            Ok(Some(_)) => return Ok(true),
            Err(e) => return facts::unsupported("search", e.to_string()),
        }
    }
    Ok(false)
}
