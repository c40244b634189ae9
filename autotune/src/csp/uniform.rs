//! Assignments drawn uniformly from all that several models have together, without listing them.
//!
//! A tree of decisions is grown where draws go. Every node has an upper bound of the assignments below it: the product
//! of the sizes of its variables' domains after propagation, or the sum of its children's bounds once it has some. An
//! attempt walks down from the root and takes a child with the probability of its bound in the parent's; what the
//! children's bounds lack of the parent's is the probability that the attempt fails. So every assignment is reached
//! with the same probability, one in the root's bound, however loose bounds are; a failed attempt has tightened
//! them.
//!
//! Invariant: what is returned has passed [`Model::check`]; attempts are independent given the tree, and each is exactly
//! uniform: choices are drawn by integers. A sequence of draws depends on models and seed alone.
//! Source: self-reducible acceptance and rejection, Huber, "Exact sampling from perfect matchings of dense regular
//! bipartite graphs", Algorithmica 44, 2006; bounds refined where attempts go, Kuck et al., "Approximating the permanent
//! by sampling from adaptive partitions", NeurIPS 2019.

use super::component::Component;
use super::domain::Var;
use super::engine::Engine;
use super::model::{Assignment, Model};
use super::search::{Decision, OutOfNodes, halves, satisfy};
use super::solve::{Error, Solver};

/// Domains of at most so many values are taken value by value, larger ones by halves.
const VALUES: u64 = 4;

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
#[derive(Clone, Debug)]
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// One of `0..n`, each as likely; `n` > 0.
    fn below(&mut self, n: u128) -> u128 {
        let bits = 128 - (n - 1).leading_zeros();
        loop {
            let x = u128::from(self.next()) << 64 | u128::from(self.next());
            let x = if bits == 0 { 0 } else { x >> (128 - bits) };
            if x < n {
                return x;
            }
        }
    }
}

/// What a decision leads to.
#[derive(Clone, Debug)]
struct Node {
    decision: Decision,
    bound: u128,
    children: Vec<u32>,
    /// Whether it is one assignment, known to exist.
    leaf: bool,
}

/// The decisions of an independent part of a model.
#[derive(Clone, Debug)]
struct Tree {
    engine: Engine,
    /// The part's variables that are the model's.
    order: Vec<Var>,
    /// The problem's variable behind each of the part's.
    vars: Vec<Var>,
    nodes: Vec<Node>,
    limit: u64,
}

impl Tree {
    fn new(part: Component, model: &Model, limit: u64) -> Result<Tree, Error> {
        let mine = |i: &u32| part.vars[*i as usize].idx() < model.vars().len();
        let order: Vec<Var> = (0..part.vars.len() as u32).filter(mine).map(Var).collect();
        let mut tree = Tree { engine: part.engine, order, vars: part.vars, nodes: Vec::new(), limit };
        let bound = tree.bound()?;
        tree.nodes.push(Node { decision: (Var(0), 0, 0), bound, children: Vec::new(), leaf: false });
        Ok(tree)
    }

    /// Assignments of the model's variables that their domains leave.
    fn bound(&self) -> Result<u128, Error> {
        let sizes = self.order.iter().map(|v| u128::from(self.engine.store.size(*v)));
        sizes.into_iter().try_fold(1u128, |n, size| n.checked_mul(size)).ok_or(Error::CountOverflow)
    }

    fn take(&mut self, (var, lo, hi): Decision) -> bool {
        self.engine.push();
        let store = &mut self.engine.store;
        let narrowed = store.set_min(var, i128::from(lo)).and_then(|()| store.set_max(var, i128::from(hi)));
        narrowed.and_then(|()| self.engine.propagate()).is_ok()
    }

    /// The children of the node that the engine stands at.
    fn expand(&mut self, var: Var) -> Result<Vec<u32>, Error> {
        let store = &self.engine.store;
        let decisions: Vec<Decision> = if store.size(var) <= VALUES {
            store.iter(var).map(|v| (var, v, v)).collect()
        } else {
            let (low, high) = halves(store, var);
            vec![low, high]
        };
        let mut children = Vec::new();
        for decision in decisions {
            let bound = if self.take(decision) { self.bound() } else { Ok(0) };
            self.engine.pop();
            let bound = bound?;
            if bound > 0 {
                children.push(self.nodes.len() as u32);
                self.nodes.push(Node { decision, bound, children: Vec::new(), leaf: false });
            }
        }
        Ok(children)
    }

    /// One attempt: the values of the part's variables, or none.
    fn attempt(&mut self, rng: &mut Rng) -> Result<Option<Vec<i64>>, Error> {
        let depth = self.engine.store.depth();
        let mut path = vec![0usize];
        let found = self.walk(&mut path, rng);
        while self.engine.store.depth() > depth {
            self.engine.pop();
        }
        // From the last node up: it has its children's sum, or its own.
        for at in path.into_iter().rev() {
            if !self.nodes[at].children.is_empty() {
                self.nodes[at].bound = self.nodes[at].children.iter().map(|c| self.nodes[*c as usize].bound).sum();
            }
        }
        found
    }

    fn walk(&mut self, path: &mut Vec<usize>, rng: &mut Rng) -> Result<Option<Vec<i64>>, Error> {
        loop {
            let at = path[path.len() - 1];
            let bound = self.nodes[at].bound;
            if bound == 0 {
                return Ok(None);
            }
            let store = &self.engine.store;
            let Some(var) = self.order.iter().copied().find(|v| !store.is_fixed(*v)) else {
                if !self.nodes[at].leaf {
                    let mut engine = self.engine.clone();
                    let (found, _) = satisfy(&mut engine, self.limit)
                        .map_err(|OutOfNodes| Error::OutOfNodes { limit: self.limit })?;
                    self.nodes[at].leaf = found.is_some();
                    self.nodes[at].bound = u128::from(found.is_some());
                }
                let store = &self.engine.store;
                let values = (0..self.vars.len() as u32).map(|i| store.lo(Var(i))).collect();
                return Ok(self.nodes[at].leaf.then_some(values));
            };
            if self.nodes[at].children.is_empty() {
                let children = self.expand(var)?;
                if children.is_empty() {
                    self.nodes[at].bound = 0;
                    return Ok(None);
                }
                // More than the parent may have would make some assignment more likely than others.
                if children.iter().map(|c| self.nodes[*c as usize].bound).sum::<u128>() > bound {
                    return Err(Error::Unsound { name: "propagation".to_owned() });
                }
                self.nodes[at].children = children;
            }
            let mut left = rng.below(bound);
            let child = self.nodes[at].children.iter().copied().find(|c| {
                let own = self.nodes[*c as usize].bound;
                let here = left < own;
                left = left.saturating_sub(own);
                here
            });
            let Some(child) = child else { return Ok(None) };
            path.push(child as usize);
            if !self.take(self.nodes[child as usize].decision) {
                // It had a bound above 0 when it was made, in the same place.
                return Err(Error::Unsound { name: "propagation".to_owned() });
            }
        }
    }
}

/// A model with the trees of its parts.
#[derive(Clone, Debug)]
struct Source<'m> {
    model: &'m Model,
    base: Assignment,
    parts: Vec<Tree>,
}

impl Source<'_> {
    fn bound(&self) -> Result<u128, Error> {
        let bounds = self.parts.iter().map(|t| t.nodes[0].bound);
        bounds.into_iter().try_fold(1u128, |n, b| n.checked_mul(b)).ok_or(Error::CountOverflow)
    }
}

/// Draws from the assignments of several models: all of them together are equally likely.
#[derive(Clone, Debug)]
pub struct Uniform<'m> {
    sources: Vec<Option<Source<'m>>>,
    rng: Rng,
}

impl<'m> Uniform<'m> {
    /// Draws with this seed.
    ///
    /// # Errors
    /// [`Error::Range`], and [`Error::CountOverflow`] where domains leave more than 2^128 assignments.
    pub fn new(models: impl IntoIterator<Item = &'m Model>, seed: u64) -> Result<Uniform<'m>, Error> {
        let mut sources = Vec::new();
        for model in models {
            let solver = Solver::new(model);
            let limit = solver.options().node_limit;
            sources.push(match solver.presolved()? {
                None => None,
                Some(p) => {
                    let base = solver.base(&p);
                    let parts = p.parts.into_iter().map(|part| Tree::new(part, model, limit));
                    Some(Source { model, base, parts: parts.collect::<Result<_, _>>()? })
                }
            });
        }
        Ok(Uniform { sources, rng: Rng(seed) })
    }

    /// At most how many assignments there are; what attempts have learnt tightens it.
    ///
    /// # Errors
    /// [`Error::CountOverflow`].
    pub fn bound(&self) -> Result<u128, Error> {
        let each = self.sources.iter().flatten().map(Source::bound);
        each.into_iter().try_fold(0u128, |n, b| n.checked_add(b?).ok_or(Error::CountOverflow))
    }

    /// One assignment with its model's position; none where `attempts` failed, or there is nothing to draw.
    ///
    /// # Errors
    /// [`Error::OutOfNodes`], [`Error::CountOverflow`]; [`Error::Unsound`] where what was drawn breaks a constraint, a fault of
    /// the solver.
    pub fn draw(&mut self, attempts: u64) -> Result<Option<(usize, Assignment)>, Error> {
        for _ in 0..attempts {
            let bounds: Vec<u128> =
                self.sources.iter().map(|s| s.as_ref().map_or(Ok(0), Source::bound)).collect::<Result<_, _>>()?;
            let all = bounds.iter().try_fold(0u128, |n, b| n.checked_add(*b)).ok_or(Error::CountOverflow)?;
            if all == 0 {
                return Ok(None);
            }
            let mut left = self.rng.below(all);
            let at = bounds.iter().position(|b| {
                let here = left < *b;
                left = left.saturating_sub(*b);
                here
            });
            let Some((at, source)) = at.and_then(|i| Some((i, self.sources[i].as_mut()?))) else { continue };
            let mut out = source.base.clone();
            let mut whole = true;
            for tree in &mut source.parts {
                let Some(values) = tree.attempt(&mut self.rng)? else {
                    whole = false;
                    break;
                };
                for (v, x) in tree.vars.iter().zip(values) {
                    if let Some(slot) = out.get_mut(v.idx()) {
                        *slot = x;
                    }
                }
            }
            if whole {
                return match source.model.check(&out) {
                    Ok(()) => Ok(Some((at, out))),
                    Err(broken) => Err(Error::Unsound { name: broken.name }),
                };
            }
        }
        Ok(None)
    }
}
