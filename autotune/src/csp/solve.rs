//! Queries on a model: first, all, count, lexicographic optimum, least cost, best diverse assignments.
//!
//! Invariant: every assignment handed out has passed [`Model::check`]; results depend on the model and the query alone,
//! not on threads or timing.

use super::compile::{Compiler, Empty, Form, Problem};
use super::component::{Component, Presolved, presolve};
use super::domain::{Store, Var};
use super::model::{Assignment, Expr, Model, VarId};
use super::search::{Bound, Decision, Direction, OutOfNodes, Search, satisfy, split};
use rayon::prelude::*;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicI64, Ordering};

/// Subproblems a branch and bound is split into, at least, where the first variables allow it.
const SUBPROBLEMS: usize = 64;

/// How to search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Options {
    /// Nodes a component's search may visit before the query fails with [`Error::OutOfNodes`].
    pub node_limit: u64,
    /// Compare every propagator run with enumeration; for tests.
    pub audit: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { node_limit: 200_000_000, audit: false }
    }
}

/// Why a query has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The search visited as many nodes as it may.
    OutOfNodes {
        /// The limit.
        limit: u64,
    },
    /// A term of this constraint, or of the cost, leaves ±2^62 over the declared domains in a place where the solver
    /// cannot carry on; tighter domains help.
    Range {
        /// The constraint's name, or `cost`.
        name: String,
    },
    /// An assignment failed direct evaluation: a fault of the solver.
    Unsound {
        /// The constraint or variable it violates.
        name: String,
    },
    /// The count exceeds 2^128 − 1.
    CountOverflow,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::OutOfNodes { limit } => write!(f, "no answer within {limit} search nodes"),
            Error::Range { name } => write!(f, "a term of `{name}` may leave ±2^62: bound its variables"),
            Error::Unsound { name } => write!(f, "internal fault: an assignment found violates `{name}`"),
            Error::CountOverflow => write!(f, "more than 2^128 − 1 assignments"),
        }
    }
}

impl std::error::Error for Error {}

/// An assignment and its cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Costed {
    /// The assignment.
    pub assignment: Assignment,
    /// The cost expression's value.
    pub cost: i64,
}

/// What the best assignments must differ in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diversity {
    /// How many assignments to return at most.
    pub count: usize,
    /// In how many of `over` any two of them differ, at least.
    pub distance: u32,
    /// The variables compared.
    pub over: Vec<VarId>,
}

/// Answers queries on one model.
#[derive(Clone, Copy, Debug)]
pub struct Solver<'m> {
    model: &'m Model,
    options: Options,
}

/// The open model variables of a part, in the order to decide them.
fn order_in(part: &Component, wanted: &[(VarId, Direction)]) -> Vec<(Var, Direction)> {
    wanted
        .iter()
        .filter_map(|(v, d)| part.local(Var(v.0)).map(|l| (l, *d)))
        .filter(|(l, _)| !part.engine.store.is_fixed(*l))
        .collect()
}

impl<'m> Solver<'m> {
    /// A solver with the default options.
    pub fn new(model: &'m Model) -> Solver<'m> {
        Solver { model, options: Options::default() }
    }

    /// A solver with these options.
    pub fn with_options(model: &'m Model, options: Options) -> Solver<'m> {
        Solver { model, options }
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    pub(crate) fn options(&self) -> Options {
        self.options
    }

    fn compiler(&self) -> Result<Option<Compiler>, Error> {
        match Compiler::new(self.model) {
            Ok(c) => Ok(Some(c)),
            Err(Empty::Domain(_) | Empty::Constraint(_)) => Ok(None),
            Err(Empty::Range(i)) => Err(Error::Range { name: self.model.constraints()[i].name.clone() }),
        }
    }

    pub(crate) fn presolved(&self) -> Result<Option<Presolved>, Error> {
        Ok(self.compiler()?.and_then(|c| presolve(c.finish(), &[], self.options.audit).ok()))
    }

    fn out_of_nodes(&self) -> Error {
        Error::OutOfNodes { limit: self.options.node_limit }
    }

    fn verified(&self, assignment: Assignment) -> Result<Assignment, Error> {
        match self.model.check(&assignment) {
            Ok(()) => Ok(assignment),
            Err(broken) => Err(Error::Unsound { name: broken.name }),
        }
    }

    /// The domains after presolve, as the values left per variable; `None` where there are none. Domains of more than
    /// `limit` values are given by their bounds.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn domains(&self, limit: u64) -> Result<Option<Vec<Left>>, Error> {
        Ok(self.presolved()?.map(|p| {
            let left = |v: VarId| {
                let v = Var(v.0);
                if p.store.size(v) <= limit {
                    Left::Values(p.store.iter(v).collect())
                } else {
                    Left::Bounds(p.store.lo(v), p.store.hi(v))
                }
            };
            self.model.var_ids().map(left).collect()
        }))
    }

    /// Writes the values of a part's variables, all fixed in `store`, into an assignment.
    fn write(&self, part: &Component, store: &Store, out: &mut [i64]) {
        for (i, v) in part.vars.iter().enumerate() {
            if let Some(slot) = out.get_mut(v.idx()) {
                *slot = store.lo(Var(i as u32));
            }
        }
    }

    /// The assignment of the variables that presolve fixed; the others have some value of their domain.
    pub(crate) fn base(&self, p: &Presolved) -> Assignment {
        self.model.var_ids().map(|v| p.store.lo(Var(v.0))).collect()
    }

    /// The first leaf of every part's search in the given order; `None` where some part has none.
    fn first_of_parts(&self, mut p: Presolved, wanted: &[(VarId, Direction)]) -> Result<Option<Assignment>, Error> {
        let mut out = self.base(&p);
        for part in &mut p.parts {
            let order = order_in(part, wanted);
            let mut engine = part.engine.clone();
            let mut found = None;
            let limit = self.options.node_limit;
            let outcome = if order.is_empty() {
                satisfy(&mut engine, limit).map(|(store, _)| found = store)
            } else {
                Search::new(&mut engine, &order, limit).run(&mut |store| {
                    found = Some(store.clone());
                    ControlFlow::Break(())
                })
            };
            outcome.map_err(|OutOfNodes| self.out_of_nodes())?;
            match found {
                Some(store) => self.write(part, &store, &mut out),
                None => return Ok(None),
            }
        }
        self.verified(out).map(Some)
    }

    /// Some assignment, or `None` where there is none. Variables are decided most constrained first, with restarts.
    ///
    /// # Errors
    /// [`Error::OutOfNodes`], [`Error::Range`].
    pub fn first(&self) -> Result<Option<Assignment>, Error> {
        match self.presolved()? {
            Some(p) => self.first_of_parts(p, &[]),
            None => Ok(None),
        }
    }

    /// The lexicographic optimum: the assignment that is best in the first variable of `order`, among those in the
    /// second, and so on; the other variables take some value that fits.
    ///
    /// # Errors
    /// [`Error::OutOfNodes`], [`Error::Range`].
    pub fn lexicographic(&self, order: &[(VarId, Direction)]) -> Result<Option<Assignment>, Error> {
        match self.presolved()? {
            Some(p) => self.first_of_parts(p, order),
            None => Ok(None),
        }
    }

    /// Calls `visit` on assignments that differ in `over` (every variable where empty), each combination of values of
    /// `over` once, in ascending order within each independent component. Returns how many there were before `visit`
    /// broke off.
    ///
    /// # Errors
    /// [`Error::OutOfNodes`], [`Error::Range`].
    pub fn for_each(&self, over: &[VarId], visit: &mut dyn FnMut(&[i64]) -> ControlFlow<()>) -> Result<u64, Error> {
        let Some(p) = self.presolved()? else { return Ok(0) };
        let wanted = self.projection(over);
        let mut base = self.base(&p);
        // The first part streams; the others, which are visited once per leaf of it, are listed.
        let Some((head, tail)) = p.parts.split_first() else {
            let out = self.verified(base)?;
            let _ = visit(&out);
            return Ok(1);
        };
        let mut lists: Vec<(&Component, Vec<Vec<i64>>)> = Vec::new();
        for part in tail {
            let order = order_in(part, &wanted);
            let mut list = Vec::new();
            let mut engine = part.engine.clone();
            Search::new(&mut engine, &order, self.options.node_limit)
                .run(&mut |store| {
                    list.push((0..part.vars.len() as u32).map(|i| store.lo(Var(i))).collect());
                    ControlFlow::Continue(())
                })
                .map_err(|OutOfNodes| self.out_of_nodes())?;
            if list.is_empty() {
                return Ok(0);
            }
            lists.push((part, list));
        }
        let mut n = 0;
        let mut broken = None;
        let mut engine = head.engine.clone();
        let order = order_in(head, &wanted);
        Search::new(&mut engine, &order, self.options.node_limit)
            .run(&mut |store| {
                self.write(head, store, &mut base);
                self.product(&lists, &mut base, &mut |assignment| {
                    if let Err(b) = self.model.check(assignment) {
                        broken = Some(Error::Unsound { name: b.name });
                        return ControlFlow::Break(());
                    }
                    n += 1;
                    visit(assignment)
                })
            })
            .map_err(|OutOfNodes| self.out_of_nodes())?;
        broken.map_or(Ok(n), Err)
    }

    fn product(
        &self,
        lists: &[(&Component, Vec<Vec<i64>>)],
        base: &mut Assignment,
        visit: &mut dyn FnMut(&[i64]) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let Some(((part, list), rest)) = lists.split_first() else { return visit(base) };
        for values in list {
            for (v, x) in part.vars.iter().zip(values) {
                if let Some(slot) = base.get_mut(v.idx()) {
                    *slot = *x;
                }
            }
            self.product(rest, base, visit)?;
        }
        ControlFlow::Continue(())
    }

    fn projection(&self, over: &[VarId]) -> Vec<(VarId, Direction)> {
        if over.is_empty() {
            self.model.var_ids().map(|v| (v, Direction::Min)).collect()
        } else {
            over.iter().map(|v| (*v, Direction::Min)).collect()
        }
    }

    /// The assignments that differ in `over` (every variable where empty), at most `limit`; see [`Solver::for_each`].
    ///
    /// # Errors
    /// [`Error::OutOfNodes`], [`Error::Range`].
    pub fn all(&self, over: &[VarId], limit: usize) -> Result<Vec<Assignment>, Error> {
        let mut out = Vec::new();
        if limit == 0 {
            return Ok(out);
        }
        self.for_each(over, &mut |assignment| {
            out.push(assignment.to_vec());
            if out.len() == limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok(out)
    }

    /// How many combinations of values of `over` (every variable where empty) occur in solutions: the product over the
    /// independent components, which are counted in parallel.
    ///
    /// # Errors
    /// [`Error::OutOfNodes`], [`Error::Range`], [`Error::CountOverflow`].
    pub fn count(&self, over: &[VarId]) -> Result<u128, Error> {
        let Some(p) = self.presolved()? else { return Ok(0) };
        let wanted = self.projection(over);
        let counts: Vec<u128> =
            p.parts.into_par_iter().map(|part| self.count_part(part, &wanted)).collect::<Result<_, _>>()?;
        if counts.contains(&0) {
            return Ok(0);
        }
        counts.into_iter().try_fold(1u128, |acc, n| acc.checked_mul(n)).ok_or(Error::CountOverflow)
    }

    fn count_part(&self, part: Component, wanted: &[(VarId, Direction)]) -> Result<u128, Error> {
        let order = order_in(&part, wanted);
        let mut engine = part.engine;
        if engine.props().is_empty() {
            let sizes = order.iter().map(|(v, _)| u128::from(engine.store.size(*v)));
            return sizes.into_iter().try_fold(1u128, |acc, n| acc.checked_mul(n)).ok_or(Error::CountOverflow);
        }
        if order.is_empty() {
            let (found, _) = satisfy(&mut engine, self.options.node_limit).map_err(|OutOfNodes| self.out_of_nodes())?;
            return Ok(u128::from(found.is_some()));
        }
        let mut n = 0u128;
        Search::new(&mut engine, &order, self.options.node_limit)
            .run(&mut |_| {
                n += 1;
                ControlFlow::Continue(())
            })
            .map_err(|OutOfNodes| self.out_of_nodes())?;
        Ok(n)
    }

    /// The assignment of least cost; among equals the first in ascending order of the model's variables within each
    /// component. Parts of the cost over independent components are minimised apart, each by a parallel branch and
    /// bound whose outcome does not depend on timing.
    ///
    /// # Errors
    /// [`Error::OutOfNodes`], [`Error::Range`].
    pub fn minimize(&self, cost: &Expr) -> Result<Option<Costed>, Error> {
        self.minimize_apart(cost, &[], &[], 0)
    }

    /// The cheapest assignment, then the cheapest that differs enough from it, then from both, and so on: at most
    /// `diversity.count` assignments in order of cost, any two of which differ in at least `diversity.distance` of
    /// `diversity.over`.
    ///
    /// # Errors
    /// [`Error::OutOfNodes`], [`Error::Range`].
    pub fn diverse(&self, cost: &Expr, diversity: &Diversity) -> Result<Vec<Costed>, Error> {
        let mut out: Vec<Costed> = Vec::new();
        while out.len() < diversity.count {
            match self.minimize_apart(cost, &out, &diversity.over, diversity.distance)? {
                Some(next) => out.push(next),
                None => break,
            }
        }
        Ok(out)
    }

    fn minimize_apart(
        &self,
        cost: &Expr,
        from: &[Costed],
        over: &[VarId],
        distance: u32,
    ) -> Result<Option<Costed>, Error> {
        let Some(mut compiler) = self.compiler()? else { return Ok(None) };
        let form: Form = compiler.cost(cost).ok_or_else(|| Error::Range { name: "cost".to_owned() })?;
        for other in from {
            compiler.distance(over.iter().map(|v| (*v, other.assignment[v.idx()])).collect(), distance);
        }
        let problem: Problem = compiler.finish();
        let Ok(p) = presolve(problem, &form.terms, self.options.audit) else { return Ok(None) };
        let wanted = self.projection(&[]);
        let mut out = self.base(&p);
        for part in &p.parts {
            let order = order_in(part, &wanted);
            match self.minimize_part(part, &order)? {
                Some(values) => {
                    for (v, x) in part.vars.iter().zip(values) {
                        if let Some(slot) = out.get_mut(v.idx()) {
                            *slot = x;
                        }
                    }
                }
                None => return Ok(None),
            }
        }
        let assignment = self.verified(out)?;
        let cost = cost.eval(&assignment).and_then(|c| i64::try_from(c).ok());
        match cost {
            Some(cost) => Ok(Some(Costed { assignment, cost })),
            None => Err(Error::Unsound { name: "cost".to_owned() }),
        }
    }

    /// The least-cost values of a part's variables.
    fn minimize_part(&self, part: &Component, order: &[(Var, Direction)]) -> Result<Option<Vec<i64>>, Error> {
        let Some(cost) = part.cost else {
            let mut found = None;
            let mut engine = part.engine.clone();
            Search::new(&mut engine, order, self.options.node_limit)
                .run(&mut |store| {
                    found = Some(values_of(part, store));
                    ControlFlow::Break(())
                })
                .map_err(|OutOfNodes| self.out_of_nodes())?;
            return Ok(found);
        };
        let subproblems = split(&mut part.engine.clone(), order, SUBPROBLEMS);
        let shared = AtomicI64::new(i64::MAX);
        type Best = Option<(i64, Vec<i64>)>;
        let solve = |decisions: &Vec<Decision>| -> Result<Best, Error> {
            let mut engine = part.engine.clone();
            let mut search = Search::new(&mut engine, order, self.options.node_limit);
            search.bound = Some(Bound { cost, own: i64::MAX, shared: &shared });
            let mut best: Best = None;
            if search.replay(decisions).is_ok() {
                search
                    .run(&mut |store| {
                        let c = store.lo(cost);
                        if best.as_ref().is_none_or(|(b, _)| c < *b) {
                            best = Some((c, values_of(part, store)));
                        }
                        ControlFlow::Continue(())
                    })
                    .map_err(|OutOfNodes| self.out_of_nodes())?;
            }
            Ok(best)
        };
        let found: Vec<Best> = subproblems.par_iter().map(solve).collect::<Result<_, _>>()?;
        // Of equal costs the earliest subproblem wins, which is the lexicographically first assignment.
        let least = shared.load(Ordering::Relaxed);
        Ok(found.into_iter().flatten().find(|(c, _)| *c == least).map(|(_, values)| values))
    }
}

fn values_of(part: &Component, store: &Store) -> Vec<i64> {
    (0..part.vars.len() as u32).map(|i| store.lo(Var(i))).collect()
}

/// What is left of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// These values.
    Values(Vec<i64>),
    /// Values between these bounds.
    Bounds(i64, i64),
}
