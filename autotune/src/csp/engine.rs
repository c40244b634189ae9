//! The propagation engine: a queue of propagators run to a fixpoint over a trailed store.
//!
//! Invariant: after [`Engine::propagate`] returns `Ok` and [`Engine::settled`] is true no propagator can narrow further.
//! A call that exceeds its step budget stops early, which is sound: fixed variables are always checked.

use super::domain::{Conflict, Narrow, Store, Var};
use super::propagate::{Lattices, Propagator};
use std::collections::VecDeque;
use std::sync::Arc;

/// Runs per propagator and fixpoint, on average, before it stops with what it has; guards against bounds that creep by
/// one.
const RUNS: u64 = 64;

/// A store, its propagators and their queue.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The domains.
    pub store: Store,
    props: Arc<[Propagator]>,
    watchers: Arc<[Vec<u32>]>,
    lattices: Lattices,
    queue: VecDeque<u32>,
    queued: Vec<bool>,
    /// Propagators that narrowed a domain or conflicted.
    used: Vec<bool>,
    /// Per variable, one more than the conflicts of its propagators.
    weights: Vec<u64>,
    settled: bool,
    audit: bool,
}

impl Engine {
    /// An engine over `store` with every propagator queued.
    pub fn new(store: Store, props: Vec<Propagator>) -> Engine {
        let mut watchers: Vec<Vec<u32>> = vec![Vec::new(); store.n_vars()];
        for (i, prop) in props.iter().enumerate() {
            prop.for_each_var(|v| {
                if watchers[v.idx()].last() != Some(&(i as u32)) {
                    watchers[v.idx()].push(i as u32);
                }
            });
        }
        let n = props.len();
        let weights = vec![1; store.n_vars()];
        Engine {
            store,
            props: props.into(),
            watchers: watchers.into(),
            lattices: Lattices::default(),
            queue: (0..n as u32).collect(),
            queued: vec![true; n],
            used: vec![false; n],
            weights,
            settled: false,
            audit: false,
        }
    }

    /// Compares every propagator run with enumeration from now on, and panics where one is unsound; for tests.
    pub fn audit(&mut self) {
        self.audit = true;
    }

    /// The propagators.
    pub fn props(&self) -> &[Propagator] {
        &self.props
    }

    /// Whether the last fixpoint was reached within its budget.
    pub fn settled(&self) -> bool {
        self.settled
    }

    /// Which propagators have narrowed a domain or conflicted so far.
    pub(crate) fn used(&self) -> &[bool] {
        &self.used
    }

    /// Runs queued propagators, and those whose variables change, until nothing changes.
    ///
    /// # Errors
    /// [`Conflict`] where a domain became empty; pop the level and go on.
    pub fn propagate(&mut self) -> Narrow {
        self.settled = true;
        let mut steps = 0u64;
        let budget = RUNS * self.props.len() as u64;
        loop {
            while let Some(var) = self.store.take_changed() {
                for p in &self.watchers[var.idx()] {
                    if !self.queued[*p as usize] {
                        self.queued[*p as usize] = true;
                        self.queue.push_back(*p);
                    }
                }
            }
            let Some(p) = self.queue.pop_front() else { return Ok(()) };
            self.queued[p as usize] = false;
            steps += 1;
            let result = if steps > budget { self.check_only(p) } else { self.run(p) };
            if result.is_err() {
                self.used[p as usize] = true;
                let weights = &mut self.weights;
                self.props[p as usize].for_each_var(|v| weights[v.idx()] += 1);
                self.clear_queue();
                return Err(Conflict);
            }
            if self.store.has_changes() {
                self.used[p as usize] = true;
            }
        }
    }

    fn run(&mut self, p: u32) -> Narrow {
        let prop = &self.props[p as usize];
        if !self.audit {
            return prop.propagate(&mut self.store, &mut self.lattices);
        }
        let before = self.store.clone();
        let result = prop.propagate(&mut self.store, &mut self.lattices);
        if let Err(violation) = super::check::sound(prop, &before, result.is_ok().then_some(&self.store)) {
            panic!("unsound propagation: {violation:?} from {:?}", violation.domains(&before));
        }
        result
    }

    /// Past the budget: decides fixed tuples and narrows nothing.
    fn check_only(&mut self, p: u32) -> Narrow {
        self.settled = false;
        let prop = &self.props[p as usize];
        let mut fixed = true;
        prop.for_each_var(|v| fixed &= self.store.is_fixed(v));
        let store = &self.store;
        if !fixed || prop.holds(&|v| store.lo(v)) { Ok(()) } else { Err(Conflict) }
    }

    fn clear_queue(&mut self) {
        for p in self.queue.drain(..) {
            self.queued[p as usize] = false;
        }
        self.store.forget_changes();
    }

    /// The open variable with the fewest values per conflict it took part in.
    /// Source: dom/wdeg, Boussemart et al., "Boosting systematic search by weighting constraints", ECAI 2004.
    pub(crate) fn most_constrained(&self) -> Option<Var> {
        let open = (0..self.store.n_vars() as u32).map(Var).filter(|v| !self.store.is_fixed(*v));
        let score = |v: Var| (u128::from(self.store.size(v)), u128::from(self.weights[v.idx()]));
        open.reduce(|best, v| {
            let ((size, weight), (best_size, best_weight)) = (score(v), score(best));
            if size * best_weight < best_size * weight { v } else { best }
        })
    }

    /// Opens a level.
    pub fn push(&mut self) {
        self.store.push();
    }

    /// Undoes the last level.
    pub fn pop(&mut self) {
        self.clear_queue();
        self.store.pop();
    }
}
