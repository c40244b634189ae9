//! Depth-first search over one component.
//!
//! Invariant: ordered variables are decided in the given order and direction, so leaves arrive in lexicographic order;
//! the other variables are decided most constrained first and only until one completion is found, so each assignment of
//! the ordered variables arrives once. Domains larger than [`SPLIT`] are halved, which keeps the order.

use super::domain::{Narrow, Store, Var};
use super::engine::Engine;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicI64, Ordering};

/// Domains of more values than this are halved instead of enumerated.
const SPLIT: u64 = 64;

/// The order in which a variable's values are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Smallest first.
    Min,
    /// Largest first.
    Max,
}

/// The search ran into its node limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfNodes;

impl std::fmt::Display for OutOfNodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("no answer within the search's nodes")
    }
}

impl std::error::Error for OutOfNodes {}

/// What a cost must stay below.
#[derive(Debug)]
pub struct Bound<'a> {
    /// The cost.
    pub cost: Var,
    /// The best cost found here: later leaves must be cheaper.
    pub own: i64,
    /// The best cost found anywhere: leaves as cheap are kept, so the outcome does not depend on timing.
    pub shared: &'a AtomicI64,
}

/// Values `lo..=hi` of a variable: one decision.
pub type Decision = (Var, i64, i64);

/// Which values variables outside the order try first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Low,
    High,
    /// One or the other per variable and depth, by a hash with this seed.
    Mixed(u64),
}

impl Style {
    fn low_first(self, var: Var, depth: usize) -> bool {
        match self {
            Style::Low => true,
            Style::High => false,
            Style::Mixed(seed) => {
                let key = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(var.0) << 20 ^ depth as u64;
                (key.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) & 1 == 0
            }
        }
    }
}

/// One depth-first search.
pub struct Search<'a> {
    engine: &'a mut Engine,
    order: &'a [(Var, Direction)],
    /// Cost bound, for branch and bound.
    pub bound: Option<Bound<'a>>,
    /// Nodes visited.
    pub nodes: u64,
    limit: u64,
    style: Style,
}

type Flow = Result<ControlFlow<()>, OutOfNodes>;

impl<'a> Search<'a> {
    /// A search over `engine`, which has been propagated, that visits at most `limit` nodes.
    pub fn new(engine: &'a mut Engine, order: &'a [(Var, Direction)], limit: u64) -> Search<'a> {
        Search { engine, order, bound: None, nodes: 0, limit, style: Style::Low }
    }

    /// Calls `leaf` with every variable fixed, once per assignment of the ordered variables.
    ///
    /// # Errors
    /// [`OutOfNodes`] where the limit is reached.
    pub fn run(&mut self, leaf: &mut dyn FnMut(&Store) -> ControlFlow<()>) -> Result<(), OutOfNodes> {
        self.ordered(0, leaf).map(|_| ())
    }

    /// Narrows one variable and propagates, with the cost bound.
    fn decide(&mut self, (var, lo, hi): Decision) -> Narrow {
        let store = &mut self.engine.store;
        if lo == hi {
            store.assign(var, i128::from(lo))?;
        } else {
            store.set_min(var, i128::from(lo))?;
            store.set_max(var, i128::from(hi))?;
        }
        if let Some(bound) = &self.bound {
            let most = bound.shared.load(Ordering::Relaxed).min(bound.own.saturating_sub(1));
            store.set_max(bound.cost, i128::from(most))?;
        }
        self.engine.propagate()
    }

    fn count_node(&mut self) -> Result<(), OutOfNodes> {
        self.nodes += 1;
        if self.nodes > self.limit { Err(OutOfNodes) } else { Ok(()) }
    }

    /// Tries one decision and what follows it.
    fn descend(&mut self, decision: Decision, at: usize, leaf: &mut dyn FnMut(&Store) -> ControlFlow<()>) -> Flow {
        self.count_node()?;
        self.engine.push();
        let flow = if self.decide(decision).is_ok() { self.ordered(at, leaf) } else { Ok(ControlFlow::Continue(())) };
        self.engine.pop();
        flow
    }

    fn ordered(&mut self, mut at: usize, leaf: &mut dyn FnMut(&Store) -> ControlFlow<()>) -> Flow {
        while at < self.order.len() && self.engine.store.is_fixed(self.order[at].0) {
            at += 1;
        }
        let Some((var, direction)) = self.order.get(at).copied() else {
            return self.complete(leaf).map(|(flow, _)| flow);
        };
        if self.engine.store.size(var) > SPLIT {
            let (low, high) = halves(&self.engine.store, var);
            let both = if direction == Direction::Min { [low, high] } else { [high, low] };
            for half in both {
                if self.descend(half, at, leaf)?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            return Ok(ControlFlow::Continue(()));
        }
        let store = &self.engine.store;
        let mut next = Some(if direction == Direction::Min { store.lo(var) } else { store.hi(var) });
        while let Some(value) = next {
            if self.descend((var, value, value), at + 1, leaf)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            let store = &self.engine.store;
            next = match direction {
                Direction::Min => store.next_above(var, value),
                Direction::Max => store.next_below(var, value),
            };
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Decides the remaining variables; true where a completion was found and reported.
    fn complete(
        &mut self,
        leaf: &mut dyn FnMut(&Store) -> ControlFlow<()>,
    ) -> Result<(ControlFlow<()>, bool), OutOfNodes> {
        let Some(var) = self.engine.most_constrained() else {
            let store = &self.engine.store;
            let flow = leaf(store);
            if let Some(bound) = &mut self.bound {
                let cost = self.engine.store.lo(bound.cost);
                bound.own = bound.own.min(cost);
                bound.shared.fetch_min(cost, Ordering::Relaxed);
            }
            return Ok((flow, true));
        };
        let mut try_one = |this: &mut Self, decision: Decision| {
            this.count_node()?;
            this.engine.push();
            let found = if this.decide(decision).is_ok() {
                this.complete(leaf)
            } else {
                Ok((ControlFlow::Continue(()), false))
            };
            this.engine.pop();
            found
        };
        let store = &self.engine.store;
        let low_first = self.style.low_first(var, store.depth());
        if store.size(var) > SPLIT {
            let (low, high) = halves(store, var);
            for half in if low_first { [low, high] } else { [high, low] } {
                let (flow, found) = try_one(self, half)?;
                if found {
                    return Ok((flow, true));
                }
            }
            return Ok((ControlFlow::Continue(()), false));
        }
        let mut next = Some(if low_first { store.lo(var) } else { store.hi(var) });
        while let Some(value) = next {
            let (flow, found) = try_one(self, (var, value, value))?;
            if found {
                return Ok((flow, true));
            }
            let store = &self.engine.store;
            next = if low_first { store.next_above(var, value) } else { store.next_below(var, value) };
        }
        Ok((ControlFlow::Continue(()), false))
    }

    /// Replays decisions, with every level left open.
    ///
    /// # Errors
    /// Conflict where they are infeasible.
    pub fn replay(&mut self, decisions: &[Decision]) -> Narrow {
        for d in decisions {
            self.engine.push();
            self.decide(*d)?;
        }
        Ok(())
    }
}

/// Nodes of the first run of [`satisfy`]; each later run may take half as many again.
const FIRST_RUN: u64 = 256;

/// The domains of some full assignment, or `None` where there is none, and the nodes visited. Runs that get nowhere
/// restart with other values first; what the conflicts taught about the variables stays.
///
/// # Errors
/// [`OutOfNodes`] where the runs together reach the limit.
pub fn satisfy(engine: &mut Engine, limit: u64) -> Result<(Option<Store>, u64), OutOfNodes> {
    let mut found = None;
    let mut nodes = 0;
    let mut run = FIRST_RUN;
    for round in 0u64.. {
        let mut search = Search::new(engine, &[], run.min(limit - nodes));
        search.style = match round {
            0 => Style::Low,
            1 => Style::High,
            seed => Style::Mixed(seed),
        };
        let outcome = search.run(&mut |store| {
            found = Some(store.clone());
            ControlFlow::Break(())
        });
        nodes += search.nodes.min(search.limit);
        match outcome {
            Ok(()) => break,
            Err(OutOfNodes) if nodes >= limit => return Err(OutOfNodes),
            Err(OutOfNodes) => run += run / 2,
        }
    }
    Ok((found, nodes))
}

/// The lower and the upper half of a domain.
pub(crate) fn halves(store: &Store, var: Var) -> (Decision, Decision) {
    let (lo, hi) = (store.lo(var), store.hi(var));
    let mid = lo + (hi - lo) / 2;
    ((var, lo, mid), (var, mid + 1, hi))
}

/// Splits the search into at least `target` subproblems in lexicographic order where the ordered variables allow it.
/// The result depends on the problem alone.
pub fn split(engine: &mut Engine, order: &[(Var, Direction)], target: usize) -> Vec<Vec<Decision>> {
    let mut parts: Vec<Vec<Decision>> = vec![Vec::new()];
    for (var, direction) in order {
        if parts.len() >= target {
            break;
        }
        let mut finer = Vec::new();
        for part in parts {
            let depth = engine.store.depth();
            let alive = Search::new(engine, &[], u64::MAX).replay(&part).is_ok();
            if alive {
                let store = &engine.store;
                if store.is_fixed(*var) {
                    finer.push(part);
                } else {
                    let mut decisions: Vec<Decision> = if store.size(*var) > SPLIT {
                        let (low, high) = halves(store, *var);
                        vec![low, high]
                    } else {
                        store.iter(*var).map(|v| (*var, v, v)).collect()
                    };
                    if *direction == Direction::Max {
                        decisions.reverse();
                    }
                    finer.extend(decisions.into_iter().map(|d| {
                        let mut longer = part.clone();
                        longer.push(d);
                        longer
                    }));
                }
            }
            while engine.store.depth() > depth {
                engine.pop();
            }
        }
        parts = finer;
    }
    parts
}
