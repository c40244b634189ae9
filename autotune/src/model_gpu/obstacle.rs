//! Why no mapping of a kernel fits a device, and the smallest change that makes one fit.
//!
//! Invariant: the named constraints conflict, by the solver's proof, in the structure that has the smallest such set; an
//! extent that is offered was searched and has a mapping.

use einfall_ir::target::DataSheet;
use einfall_ir::tile::{AxisKind, Plan};

use super::facts::Facts;
use super::search::search;
use super::space::Space;
use super::structure::structures;
use super::{contracts, device};
use crate::csp::{Explanation, Options, Solver};

/// Search nodes that one structure's conflict may take.
const NODES: u64 = 20_000;

/// Why a kernel has no mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// The kernel.
    pub kernel: String,
    /// The constraints that cannot hold together, or the rule that no structure obeys.
    pub constraints: Vec<String>,
    /// What breaks them.
    pub message: String,
    /// The smallest change that makes a mapping fit, where one was found.
    pub change: Option<String>,
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "kernel {}: {}", self.kernel, self.message)
    }
}

/// The first kernel with contractions that has no mapping, and why; none where all have one. `sizes`: one value per rank.
pub fn obstacle(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>) -> Option<Obstacle> {
    plan.kernels.iter().filter(|k| contracts(k)).find_map(|kernel| {
        let name = kernel.name.clone();
        let outside = |u: super::Unsupported| {
            Some(Obstacle { kernel: name.clone(), constraints: vec![u.constraint], message: u.message, change: None })
        };
        let (family, gpu) = match device(sheet) {
            Ok(found) => found,
            Err(u) => return outside(u),
        };
        let facts = match Facts::new(plan, kernel, sizes) {
            // Unknown extents are mapped by classes, of which the narrowest is the easiest to fit.
            Ok(facts) => facts.with_inner(|_| Some(super::INNER_CLASSES[0])),
            Err(u) => return outside(u),
        };
        let all = match structures(&facts, family) {
            Ok(all) => all,
            Err(u) => return outside(u),
        };
        if !search(&facts, &all, sheet, (family, gpu), 1).is_empty() {
            return None;
        }
        let mut least: Option<Vec<String>> = None;
        for s in &all {
            let space = Space::new(&facts, s, family, gpu);
            let options = Options { node_limit: NODES, ..Options::default() };
            if let Ok(Explanation::Conflict(c)) = Solver::with_options(&space.model, options).explain() {
                let mut names: Vec<String> =
                    c.constraints.iter().map(|i| space.model.constraints()[*i].name.clone()).collect();
                names.dedup();
                if least.as_ref().is_none_or(|l| names.len() < l.len()) {
                    least = Some(names);
                }
            }
        }
        let wide: Vec<(usize, u64)> = facts
            .axes
            .iter()
            .enumerate()
            .filter(|(_, a)| a.kind == AxisKind::Inner)
            .filter_map(|(i, a)| Some((i, a.extent.filter(|n| *n > 16)?)))
            .collect();
        let longest = wide.iter().map(|(_, n)| *n).max().unwrap_or(0);
        let fits = |limit: u64| {
            let mut facts = facts.clone();
            wide.iter().for_each(|(i, n)| facts.axes[*i].extent = Some((*n).min(limit)));
            structures(&facts, family).is_ok_and(|all| !search(&facts, &all, sheet, (family, gpu), 1).is_empty())
        };
        let limits = (1..).map(|k| longest.next_power_of_two() >> k).take_while(|n| *n >= 16);
        let change = limits.into_iter().find(|n| fits(*n)).map(|n| {
            let cut = wide.iter().filter(|(_, extent)| *extent > n);
            let names: Vec<String> =
                cut.map(|(i, extent)| format!("`{}` (now {extent})", facts.axes[*i].name)).collect();
            format!("it fits with {} of at most {n}", names.join(" and "))
        });
        let constraints = least.unwrap_or_else(|| vec!["resources".to_owned()]);
        let together = if constraints.len() == 1 { "cannot hold" } else { "cannot hold together" };
        let message = format!("no blocks fit {}: {} {together}", sheet.name, constraints.join(", "));
        Some(Obstacle { kernel: name, constraints, message, change })
    })
}
