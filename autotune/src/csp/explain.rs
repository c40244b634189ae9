//! Why a model has no solution: a conflicting set of its constraints, by name, from which none can be left out.
//!
//! Invariant: the set returned has been refuted on its own. `minimal` is claimed only where every set with one
//! constraint less has been shown to have a solution.
//! Source: QuickXplain, Junker, "Preferred explanations and relaxations for over-constrained problems", AAAI 2004. The
//! constraints whose propagators took part in a refutation refute by themselves, which bounds the set to start from.

use super::compile::{Empty, Problem, compile};
use super::component::split;
use super::engine::Engine;
use super::model::{Assignment, Model};
use super::search::{OutOfNodes, satisfy};
use super::solve::{Error, Solver};

/// Nodes a refutation of a subset may take, as a multiple of those of the full refutation, and at least.
const BUDGET: (u64, u64) = (4, 2_000);

/// Constraints that cannot hold together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Indices of the constraints in their model, ascending.
    pub constraints: Vec<usize>,
    /// Whether leaving out any one of them was shown to make the rest satisfiable.
    pub minimal: bool,
}

/// The answer to [`Solver::explain`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Explanation {
    /// The model has a solution.
    Feasible(Assignment),
    /// The domain declared for this variable (index) is empty.
    EmptyDomain(usize),
    /// These constraints conflict.
    Conflict(Conflict),
}

/// What is known of a set of constraints.
enum Verdict {
    Feasible,
    /// Refuted with only these of them taking part.
    Refuted(Vec<usize>, u64),
    Unknown,
}

impl Solver<'_> {
    /// A minimal conflicting set of constraints, or an assignment where there is no conflict.
    ///
    /// # Errors
    /// [`Error::OutOfNodes`] where the model itself is not decided within the limit, [`Error::Range`].
    pub fn explain(&self) -> Result<Explanation, Error> {
        let model = self.model();
        let every: Vec<usize> = (0..model.constraints().len()).collect();
        match compile(model) {
            Err(Empty::Domain(v)) => return Ok(Explanation::EmptyDomain(v.idx())),
            Err(Empty::Constraint(i)) => {
                return Ok(Explanation::Conflict(Conflict { constraints: vec![i], minimal: true }));
            }
            Err(Empty::Range(i)) => return Err(Error::Range { name: model.constraints()[i].name.clone() }),
            Ok(_) => {}
        }
        let (core, nodes) = match verdict(model, &every, 0) {
            Verdict::Refuted(core, nodes) => (core, nodes),
            Verdict::Feasible | Verdict::Unknown => {
                if let Some(assignment) = self.first()? {
                    return Ok(Explanation::Feasible(assignment));
                }
                match verdict(model, &every, self.options().node_limit) {
                    Verdict::Refuted(core, nodes) => (core, nodes),
                    Verdict::Feasible | Verdict::Unknown => {
                        return Err(Error::OutOfNodes { limit: self.options().node_limit });
                    }
                }
            }
        };
        let budget = if nodes == 0 { 0 } else { (nodes * BUDGET.0).max(BUDGET.1) };
        let mut constraints = quickxplain(model, core, budget);
        let minimal = reduce(model, &mut constraints, budget.max(BUDGET.1));
        constraints.sort_unstable();
        Ok(Explanation::Conflict(Conflict { constraints, minimal }))
    }
}

/// Decides the constraints of `subset` by propagation and at most `budget` nodes of search.
fn verdict(model: &Model, subset: &[usize], budget: u64) -> Verdict {
    let restricted = model.restrict(subset);
    let problem = match compile(&restricted) {
        Ok(p) => p,
        Err(Empty::Constraint(i)) => return Verdict::Refuted(vec![subset[i]], 0),
        Err(Empty::Domain(_) | Empty::Range(_)) => return Verdict::Unknown,
    };
    let Problem { store, props, origins, clauses: _ } = problem;
    let mut engine = Engine::new(store, props);
    let alive = engine.propagate().is_ok();
    // What propagation used and then what one part's search used refute together.
    let root: Vec<usize> = (0..origins.len()).filter(|i| engine.used()[*i]).collect();
    let core = |part: Vec<usize>| {
        let used = root.iter().copied().chain(part).filter_map(|i| origins[i]);
        let mut core: Vec<usize> = used.map(|i| subset[i]).collect();
        core.sort_unstable();
        core.dedup();
        core
    };
    if !alive {
        return Verdict::Refuted(core(Vec::new()), 0);
    }
    if budget == 0 {
        return Verdict::Unknown;
    }
    let Ok(presolved) = split(&engine, &[], false) else {
        return Verdict::Refuted(core((0..origins.len()).collect()), 0);
    };
    let mut unknown = false;
    for mut part in presolved.parts {
        match satisfy(&mut part.engine, budget) {
            Err(OutOfNodes) => unknown = true,
            Ok((Some(_), _)) => {}
            Ok((None, nodes)) => {
                let used = part.engine.used().iter().zip(&part.origins).filter(|(u, _)| **u).map(|(_, i)| *i);
                return Verdict::Refuted(core(used.collect()), nodes);
            }
        }
    }
    if unknown { Verdict::Unknown } else { Verdict::Feasible }
}

fn refuted(model: &Model, subset: &[usize], budget: u64) -> bool {
    matches!(verdict(model, subset, budget), Verdict::Refuted(..))
}

/// A subset of `core` that is refuted within the budget and, as far as the budget decides, has no smaller one.
fn quickxplain(model: &Model, core: Vec<usize>, budget: u64) -> Vec<usize> {
    fn descend(model: &Model, base: &[usize], grown: bool, rest: &[usize], budget: u64) -> Vec<usize> {
        if grown && refuted(model, base, budget) {
            return Vec::new();
        }
        if rest.len() <= 1 {
            return rest.to_vec();
        }
        let (left, right) = rest.split_at(rest.len() / 2);
        let with = |more: &[usize]| {
            let mut out = base.to_vec();
            out.extend_from_slice(more);
            out
        };
        let from_right = descend(model, &with(left), true, right, budget);
        let mut out = descend(model, &with(&from_right), !from_right.is_empty(), left, budget);
        out.extend(from_right);
        out
    }
    descend(model, &[], false, &core, budget)
}

/// Leaves out constraints one by one; true where each one left was shown to be needed.
fn reduce(model: &Model, constraints: &mut Vec<usize>, budget: u64) -> bool {
    let mut minimal = true;
    let mut i = 0;
    while i < constraints.len() {
        let without: Vec<usize> = constraints.iter().copied().filter(|c| *c != constraints[i]).collect();
        match verdict(model, &without, budget) {
            Verdict::Refuted(core, _) => {
                // Restart on what the refutation used; it is smaller.
                *constraints = core;
                minimal = true;
                i = 0;
            }
            Verdict::Feasible => i += 1,
            Verdict::Unknown => {
                minimal = false;
                i += 1;
            }
        }
    }
    minimal
}
