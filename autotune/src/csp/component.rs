//! Presolve: root propagation, probing of clauses, and the split into independent components.
//!
//! Invariant: the components' solution sets, multiplied, are the problem's; a component shares no open variable with
//! another.
//! Source: constructive disjunction, Van Hentenryck, Saraswat and Deville, 1998; components by petgraph's union of
//! edges.

use super::compile::Problem;
use super::domain::{Conflict, Store, Var};
use super::engine::Engine;
use super::propagate::{Compare, Linear, Lit, Propagator, Relation};
use petgraph::unionfind::UnionFind;

/// Sets up to this size are united exactly when probing; larger domains by their bounds.
const UNITE: u64 = 4096;

/// Probing rounds.
const ROUNDS: usize = 3;

/// An independent part of a problem, as a problem of its own.
#[derive(Clone, Debug)]
pub struct Component {
    /// The open variables and their propagators, at a fixpoint.
    pub engine: Engine,
    /// The problem's variable behind each variable of `engine`.
    pub vars: Vec<Var>,
    /// The cost of this part, where it has one.
    pub cost: Option<Var>,
    /// The problem's propagator behind each propagator of `engine`, but for the cost's.
    pub origins: Vec<usize>,
}

/// A problem at its root fixpoint, in parts.
#[derive(Clone, Debug)]
pub struct Presolved {
    /// The domains after presolve.
    pub store: Store,
    /// The parts with open variables.
    pub parts: Vec<Component>,
    /// What the cost adds up to outside the parts.
    pub cost_constant: i128,
}

impl Component {
    /// The variable of this part that stands for `var` of the problem.
    pub fn local(&self, var: Var) -> Option<Var> {
        self.vars.binary_search(&var).ok().map(|i| Var(i as u32))
    }
}

/// Propagates, probes and splits. `cost` is a linear form to be distributed over the parts.
///
/// # Errors
/// [`Conflict`] where the problem has no solution already here.
pub fn presolve(problem: Problem, cost: &[(i64, Var)], audit: bool) -> Result<Presolved, Conflict> {
    let mut engine = Engine::new(problem.store, problem.props);
    if audit {
        engine.audit();
    }
    engine.propagate()?;
    for _ in 0..ROUNDS {
        let mut changed = false;
        for clause in &problem.clauses {
            changed |= probe(&mut engine, clause)?;
        }
        if !changed {
            break;
        }
    }
    split(&engine, cost, audit)
}

/// What the branches of a clause allow a variable: bounds and, where small, values.
type Allowed = (i64, i64, Option<Vec<i64>>);

/// Tries each open literal of a clause and keeps what any of them allows; true where that narrowed a domain.
fn probe(engine: &mut Engine, clause: &[Lit]) -> Result<bool, Conflict> {
    let fixed = |store: &Store, l: &Lit| store.value(l.var).map(|v| (v == 1) == l.positive);
    if clause.iter().any(|l| fixed(&engine.store, l) == Some(true)) {
        return Ok(false);
    }
    let open: Vec<Lit> = clause.iter().copied().filter(|l| fixed(&engine.store, l).is_none()).collect();
    let n = engine.store.n_vars();
    let mut union: Option<Vec<Option<Allowed>>> = None;
    for lit in &open {
        engine.push();
        let alive = engine.store.assign(lit.var, i128::from(lit.positive)).is_ok() && engine.propagate().is_ok();
        if alive {
            let store = &engine.store;
            let small = |v: Var| (store.size(v) <= UNITE).then(|| store.iter(v).collect::<Vec<_>>());
            union = Some(match union {
                None => (0..n as u32).map(Var).map(|v| Some((store.lo(v), store.hi(v), small(v)))).collect(),
                Some(seen) => seen
                    .into_iter()
                    .enumerate()
                    .map(|(i, old)| {
                        let v = Var(i as u32);
                        let (lo, hi, values) = old?;
                        let values = match (values, small(v)) {
                            (Some(mut a), Some(b)) => {
                                a.extend(b);
                                a.sort_unstable();
                                a.dedup();
                                Some(a)
                            }
                            _ => None,
                        };
                        Some((lo.min(store.lo(v)), hi.max(store.hi(v)), values))
                    })
                    .collect(),
            });
        }
        engine.pop();
    }
    let union = union.ok_or(Conflict)?;
    for (i, allowed) in union.into_iter().enumerate() {
        let v = Var(i as u32);
        if let Some((lo, hi, values)) = allowed {
            engine.store.set_min(v, i128::from(lo))?;
            engine.store.set_max(v, i128::from(hi))?;
            if let Some(values) = values {
                engine.store.intersect(v, &values)?;
            }
        }
    }
    let changed = engine.store.has_changes();
    engine.propagate()?;
    Ok(changed)
}

/// Splits an engine at its fixpoint into independent parts.
///
/// # Errors
/// [`Conflict`] where a part has no solution already by propagation.
pub fn split(engine: &Engine, cost: &[(i64, Var)], audit: bool) -> Result<Presolved, Conflict> {
    let store = &engine.store;
    let n = store.n_vars();
    let props: Vec<(usize, Propagator)> = if engine.settled() {
        engine.props().iter().enumerate().filter_map(|(i, p)| Some((i, p.simplify(store)?))).collect()
    } else {
        engine.props().iter().cloned().enumerate().collect()
    };
    let mut groups = UnionFind::<usize>::new(n);
    for (_, prop) in &props {
        let mut first = None;
        prop.for_each_var(|v| {
            if !store.is_fixed(v) {
                let anchor = *first.get_or_insert(v.idx());
                groups.union(anchor, v.idx());
            }
        });
    }
    // Groups in the order of their first open variable.
    let mut part_of_group = vec![usize::MAX; n];
    let mut members: Vec<Vec<Var>> = Vec::new();
    for v in (0..n as u32).map(Var).filter(|v| !store.is_fixed(*v)) {
        let group = groups.find(v.idx());
        if part_of_group[group] == usize::MAX {
            part_of_group[group] = members.len();
            members.push(Vec::new());
        }
        members[part_of_group[group]].push(v);
    }
    let mut part_props: Vec<Vec<(usize, Propagator)>> = vec![Vec::new(); members.len()];
    for (origin, prop) in props {
        let mut part = None;
        prop.for_each_var(|v| {
            if !store.is_fixed(v) {
                part = Some(part_of_group[groups.find(v.idx())]);
            }
        });
        if let Some(part) = part {
            // Fixed variables come along as constants of the part.
            prop.for_each_var(|v| {
                if store.is_fixed(v) && !members[part].contains(&v) {
                    members[part].push(v);
                }
            });
            part_props[part].push((origin, prop));
        }
    }
    let mut cost_constant = 0i128;
    let mut part_cost: Vec<Vec<(i64, Var)>> = vec![Vec::new(); members.len()];
    for (c, v) in cost {
        match store.value(*v) {
            Some(x) => cost_constant += i128::from(*c) * i128::from(x),
            None => part_cost[part_of_group[groups.find(v.idx())]].push((*c, *v)),
        }
    }
    let mut parts = Vec::new();
    for ((mut vars, props), cost) in members.into_iter().zip(part_props).zip(part_cost) {
        vars.sort_unstable();
        let mut local = Store::default();
        for v in &vars {
            local.add_copy(store, *v);
        }
        let to = |v: Var| Var(vars.binary_search(&v).unwrap_or(0) as u32);
        let (origins, mut props): (Vec<usize>, Vec<Propagator>) = props.into_iter().unzip();
        props.iter_mut().for_each(|p| p.rename(to));
        let mut cost_var = None;
        if !cost.is_empty() {
            let terms: Vec<(i64, Var)> = cost.iter().map(|(c, v)| (*c, to(*v))).collect();
            let mut form = Linear { terms, constant: 0, compare: Compare::Eq };
            let (lo, hi) = form.range(&local);
            let limit = i128::from(super::number::LIMIT);
            let z = local.add_range(lo.clamp(-limit, limit) as i64, hi.clamp(-limit, limit) as i64, 1)?;
            form.terms.push((-1, z));
            props.push(Propagator::Post { relation: Relation::Linear(form), positive: true });
            cost_var = Some(z);
        }
        let mut engine = Engine::new(local, props);
        if audit {
            engine.audit();
        }
        engine.propagate()?;
        parts.push(Component { engine, vars, cost: cost_var, origins });
    }
    Ok(Presolved { store: store.clone(), parts, cost_constant })
}
