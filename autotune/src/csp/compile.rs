//! From a [`Model`] to propagators: terms become auxiliary variables, conditions become literals.
//!
//! Invariant: the compiled problem has, over the model's variables, exactly the assignments that [`Model::check`]
//! accepts; auxiliary variables are functions of them. Partial terms under a connective become total and carry a literal
//! that says whether they have a value.
//! Source: flattening as in Nethercote et al., "MiniZinc: towards a standard CP modelling language", CP 2007.

use super::domain::{Conflict, Store, Var};
use super::model::{Cmp, Domain, Expr, Model, Pred, VarId};
use super::number::{self, LIMIT};
use super::propagate::{Compare, Linear, Lit, Propagator, Relation, Table};
use std::collections::HashMap;

/// Propagators over a store whose first variables are the model's.
#[derive(Clone, Debug)]
pub struct Problem {
    /// The domains.
    pub store: Store,
    /// The propagators.
    pub props: Vec<Propagator>,
    /// Per propagator, the index of the constraint it came from, or `None` for a cost.
    pub origins: Vec<Option<usize>>,
    /// The clauses, each to be tried literal by literal before the search.
    pub clauses: Vec<Vec<Lit>>,
}

/// A model that has no solution already by one of its declarations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Empty {
    /// The domain of this variable is empty.
    Domain(VarId),
    /// This constraint cannot hold.
    Constraint(usize),
    /// This constraint has a term whose bounds leave ±2^62 where the solver cannot carry on.
    Range(usize),
}

impl std::fmt::Display for Empty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Empty::Domain(v) => write!(f, "variable {} has no value", v.idx()),
            Empty::Constraint(i) => write!(f, "constraint {i} cannot hold"),
            Empty::Range(i) => write!(f, "a term of constraint {i} may leave ±2^62: bound its variables"),
        }
    }
}

impl std::error::Error for Empty {}

/// A linear form `Σ coef·x + constant`.
#[derive(Clone, Debug, Default)]
pub struct Form {
    pub(crate) terms: Vec<(i64, Var)>,
    pub(crate) constant: i128,
}

impl Form {
    fn of(var: Var) -> Form {
        Form { terms: vec![(1, var)], constant: 0 }
    }

    fn constant(v: i128) -> Form {
        Form { terms: Vec::new(), constant: v }
    }

    /// Adds `factor · other`; `None` where a coefficient leaves the range.
    fn add(mut self, other: &Form, factor: i64) -> Option<Form> {
        for (c, x) in &other.terms {
            let c = c.checked_mul(factor)?;
            match self.terms.iter_mut().find(|(_, y)| y == x) {
                Some((d, _)) => *d = d.checked_add(c)?,
                None => self.terms.push((c, *x)),
            }
        }
        self.terms.retain(|(c, _)| *c != 0);
        self.constant += i128::from(factor) * other.constant;
        if self.terms.iter().any(|(c, _)| c.abs() >= LIMIT) || self.constant.abs() >= 1 << 100 {
            return None;
        }
        Some(self)
    }

    fn range(&self, store: &Store) -> (i128, i128) {
        Linear { terms: self.terms.clone(), constant: self.constant, compare: Compare::Eq }.range(store)
    }
}

/// Whether undefined terms falsify the whole constraint (`None`) or are collected as literals that must hold.
type Defined<'a> = Option<&'a mut Vec<Lit>>;

/// Why a constraint did not compile.
#[derive(Clone, Copy)]
enum Fault {
    /// It cannot hold.
    Empty,
    /// A term's bounds leave the range.
    Range,
}

impl From<Conflict> for Fault {
    fn from(_: Conflict) -> Fault {
        Fault::Empty
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Form(Vec<(i64, Var)>, i128),
    Product(i64, Vec<Var>),
    Power(Var, u32),
    Quotient(Var, Var, bool),
    Extremum(Vec<Var>, bool),
}

pub(crate) struct Compiler {
    problem: Problem,
    memo: HashMap<Key, Var>,
    constants: HashMap<i64, Var>,
    origin: Option<usize>,
}

/// Compiles a model.
///
/// # Errors
/// [`Empty`] where a declared domain is empty or a constraint is false by itself.
pub fn compile(model: &Model) -> Result<Problem, Empty> {
    Ok(Compiler::new(model)?.finish())
}

impl Compiler {
    /// Compiles the model's variables and constraints; costs may follow.
    pub(crate) fn new(model: &Model) -> Result<Compiler, Empty> {
        let problem = Problem { store: Store::default(), props: Vec::new(), origins: Vec::new(), clauses: Vec::new() };
        let mut this = Compiler { problem, memo: HashMap::new(), constants: HashMap::new(), origin: None };
        for (id, var) in model.var_ids().zip(model.vars()) {
            let store = &mut this.problem.store;
            let added = match &var.domain {
                Domain::Range { lo, hi, step } => store.add_range((*lo).max(1 - LIMIT), (*hi).min(LIMIT - 1), *step),
                Domain::Values(values) => store.add_set(values),
                Domain::Divisors(n) => match number::divisors(*n) {
                    Some(list) => store.add_set(&list),
                    None => Err(Conflict),
                },
            };
            added.map_err(|Conflict| Empty::Domain(id))?;
        }
        for (i, c) in model.constraints().iter().enumerate() {
            this.origin = Some(i);
            this.post(&c.pred, true).map_err(|fault| match fault {
                Fault::Empty => Empty::Constraint(i),
                Fault::Range => Empty::Range(i),
            })?;
        }
        this.origin = None;
        Ok(this)
    }

    pub(crate) fn finish(self) -> Problem {
        self.problem
    }

    /// A linear form equal to `cost`; `None` where the cost has no value within the range.
    pub(crate) fn cost(&mut self, cost: &Expr) -> Option<Form> {
        self.form(cost, &mut None).ok()
    }

    /// Requires that at least `at_least` of the pairs differ.
    pub(crate) fn distance(&mut self, pairs: Vec<(VarId, i64)>, at_least: u32) {
        let pairs = pairs.into_iter().map(|(v, x)| (Var(v.0), x)).collect();
        self.push(Propagator::Distance { pairs, at_least });
    }

    fn push(&mut self, prop: Propagator) {
        self.problem.props.push(prop);
        self.problem.origins.push(self.origin);
    }

    fn aux(&mut self, lo: i128, hi: i128) -> Result<Var, Fault> {
        let limit = i128::from(LIMIT);
        Ok(self.problem.store.add_range(lo.clamp(-limit, limit) as i64, hi.clamp(-limit, limit) as i64, 1)?)
    }

    fn constant(&mut self, v: i64) -> Result<Var, Fault> {
        if let Some(var) = self.constants.get(&v) {
            return Ok(*var);
        }
        let var = self.problem.store.add_range(v, v, 1)?;
        self.constants.insert(v, var);
        Ok(var)
    }

    // Conditions.

    /// Posts the condition or its negation.
    fn post(&mut self, pred: &Pred, positive: bool) -> Result<(), Fault> {
        match pred {
            Pred::Bool(b) => require(*b == positive),
            Pred::Not(p) => self.post(p, !positive),
            Pred::And(ps) if positive => ps.iter().try_for_each(|p| self.post(p, true)),
            Pred::Or(ps) if !positive => ps.iter().try_for_each(|p| self.post(p, false)),
            Pred::Implies(p, q) if !positive => {
                self.post(p, true)?;
                self.post(q, false)
            }
            Pred::Iff(p, q) => {
                let (a, b) = (self.literal(p)?, self.literal(q)?);
                let b = if positive { b } else { b.negate() };
                self.clause(vec![a.negate(), b]);
                self.clause(vec![a, b.negate()]);
                Ok(())
            }
            Pred::And(ps) | Pred::Or(ps) => {
                let lits = ps.iter().map(|p| self.literal(p)).collect::<Result<Vec<_>, _>>()?;
                self.clause(lits.into_iter().map(|l| if positive { l } else { l.negate() }).collect());
                Ok(())
            }
            Pred::Implies(p, q) => {
                let (a, b) = (self.literal(p)?, self.literal(q)?);
                self.clause(vec![a.negate(), b]);
                Ok(())
            }
            Pred::Compare(..) | Pred::Divides { .. } | Pred::Table(..) => {
                if positive {
                    if let Some(()) = self.post_definition(pred)? {
                        return Ok(());
                    }
                    let relation = self.relation(pred, &mut None)?;
                    self.push(Propagator::Post { relation, positive: true });
                    return Ok(());
                }
                // Not (defined and holds).
                let mut defined = Vec::new();
                let relation = self.relation(pred, &mut Some(&mut defined))?;
                if defined.is_empty() {
                    self.push(Propagator::Post { relation, positive: false });
                } else {
                    let lit = self.reify(relation)?;
                    let mut lits: Vec<Lit> = defined.into_iter().map(Lit::negate).collect();
                    lits.push(lit.negate());
                    self.clause(lits);
                }
                Ok(())
            }
        }
    }

    /// Posts `product == variable` and the like without an auxiliary variable in between.
    fn post_definition(&mut self, pred: &Pred) -> Result<Option<()>, Fault> {
        let Pred::Compare(Cmp::Eq, a, b) = pred else { return Ok(None) };
        let (Some((coef, xs)), Some((other, ys))) = (self.monomial(a)?, self.monomial(b)?) else { return Ok(None) };
        if xs.len().max(ys.len()) < 2 {
            return Ok(None);
        }
        let ((coef, xs), (other, ys)) =
            if ys.len() <= xs.len() { ((coef, xs), (other, ys)) } else { ((other, ys), (coef, xs)) };
        let z = match ys[..] {
            [z] if other == 1 => z,
            [] => self.constant(other)?,
            _ => self.product(other, ys, &mut None)?,
        };
        self.push(Propagator::Product { z, coef, xs });
        Ok(Some(()))
    }

    /// The term as `coef · Π xs` where it is one, with `coef` positive.
    fn monomial(&mut self, e: &Expr) -> Result<Option<(i64, Vec<Var>)>, Fault> {
        Ok(match e {
            Expr::Const(c) if *c > 0 && *c < LIMIT => Some((*c, Vec::new())),
            Expr::Var(v) => Some((1, vec![Var(v.0)])),
            Expr::Product(es) => {
                let mut coef = 1i64;
                let mut xs = Vec::new();
                for e in es {
                    match e {
                        Expr::Const(c) if *c > 0 => match coef.checked_mul(*c).filter(|v| *v < LIMIT) {
                            Some(v) => coef = v,
                            None => return Ok(None),
                        },
                        other => xs.push(self.var_of(other, &mut None)?),
                    }
                }
                Some((coef, xs))
            }
            _ => None,
        })
    }

    fn clause(&mut self, lits: Vec<Lit>) {
        self.problem.clauses.push(lits.clone());
        self.push(Propagator::Clause(lits));
    }

    fn bool_var(&mut self) -> Result<Lit, Fault> {
        Ok(Lit { var: self.problem.store.add_range(0, 1, 1)?, positive: true })
    }

    fn reify(&mut self, relation: Relation) -> Result<Lit, Fault> {
        let lit = self.bool_var()?;
        self.push(Propagator::Reify { lit, relation });
        Ok(lit)
    }

    /// A literal that holds exactly when the condition does.
    fn literal(&mut self, pred: &Pred) -> Result<Lit, Fault> {
        match pred {
            Pred::Bool(b) => Ok(Lit { var: self.constant(1)?, positive: *b }),
            Pred::Not(p) => Ok(self.literal(p)?.negate()),
            Pred::And(ps) => {
                let all = ps.iter().map(|p| self.literal(p)).collect::<Result<Vec<_>, _>>()?;
                self.all_of(all)
            }
            Pred::Or(ps) => {
                let any = ps.iter().map(|p| self.literal(p)).collect::<Result<Vec<_>, _>>()?;
                let none = any.into_iter().map(Lit::negate).collect();
                Ok(self.all_of(none)?.negate())
            }
            Pred::Implies(p, q) => {
                let fails = vec![self.literal(p)?, self.literal(q)?.negate()];
                Ok(self.all_of(fails)?.negate())
            }
            Pred::Iff(p, q) => {
                let (a, b) = (self.literal(p)?, self.literal(q)?);
                let only_a = self.all_of(vec![a, b.negate()])?;
                let only_b = self.all_of(vec![a.negate(), b])?;
                self.all_of(vec![only_a.negate(), only_b.negate()])
            }
            Pred::Compare(..) | Pred::Divides { .. } | Pred::Table(..) => {
                let mut all = Vec::new();
                let relation = self.relation(pred, &mut Some(&mut all))?;
                let lit = self.reify(relation)?;
                all.push(lit);
                self.all_of(all)
            }
        }
    }

    fn all_of(&mut self, all: Vec<Lit>) -> Result<Lit, Fault> {
        if let [one] = all[..] {
            return Ok(one);
        }
        let lit = self.bool_var()?;
        self.push(Propagator::Conjunction { lit, all });
        Ok(lit)
    }

    fn relation(&mut self, pred: &Pred, defined: &mut Defined<'_>) -> Result<Relation, Fault> {
        match pred {
            Pred::Compare(cmp, a, b) => {
                let (a, b) = (self.form(a, defined)?, self.form(b, defined)?);
                let mut form = a.add(&b, -1).ok_or(Fault::Range)?;
                let compare = match cmp {
                    Cmp::Eq => Compare::Eq,
                    Cmp::Ne => Compare::Ne,
                    Cmp::Le => Compare::Le,
                    Cmp::Lt => {
                        form.constant += 1;
                        Compare::Le
                    }
                };
                Ok(Relation::Linear(Linear { terms: form.terms, constant: form.constant, compare }))
            }
            Pred::Divides { dividend, divisor } => Ok(Relation::Divides {
                dividend: self.var_of(dividend, defined)?,
                divisor: self.var_of(divisor, defined)?,
            }),
            Pred::Table(es, rows) => {
                let xs = es.iter().map(|e| self.var_of(e, defined)).collect::<Result<Vec<_>, _>>()?;
                Ok(Relation::Table(Table { xs, rows: rows.clone() }))
            }
            Pred::Bool(_) | Pred::Not(_) | Pred::And(_) | Pred::Or(_) | Pred::Implies(..) | Pred::Iff(..) => {
                // A connective as a relation: its literal compared with one.
                let lit = self.literal(pred)?;
                let constant = if lit.positive { -1 } else { 0 };
                Ok(Relation::Linear(Linear { terms: vec![(1, lit.var)], constant, compare: Compare::Eq }))
            }
        }
    }

    // Terms.

    fn form(&mut self, e: &Expr, defined: &mut Defined<'_>) -> Result<Form, Fault> {
        match e {
            Expr::Const(c) => Ok(Form::constant(i128::from(*c))),
            Expr::Var(v) => Ok(Form::of(Var(v.0))),
            Expr::Sum(es) => {
                let mut out = Form::default();
                for e in es {
                    let part = self.form(e, defined)?;
                    out = out.add(&part, 1).ok_or(Fault::Range)?;
                }
                Ok(out)
            }
            Expr::Neg(e) => self.scaled(e, -1, defined),
            Expr::Product(es) => {
                let mut coef = 1i64;
                let mut rest = Vec::new();
                for e in es {
                    match e {
                        Expr::Const(c) => {
                            coef = coef.checked_mul(*c).filter(|v| v.abs() < LIMIT).ok_or(Fault::Range)?
                        }
                        other => rest.push(other),
                    }
                }
                match rest[..] {
                    [] => Ok(Form::constant(i128::from(coef))),
                    [one] => self.scaled(one, coef, defined),
                    _ => {
                        let xs = rest.iter().map(|e| self.var_of(e, defined)).collect::<Result<Vec<_>, _>>()?;
                        if coef == 0 {
                            return Ok(Form::constant(0));
                        }
                        Ok(Form::of(self.product(coef, xs, defined)?))
                    }
                }
            }
            Expr::Power(..) | Expr::Quotient(..) | Expr::CeilDiv(..) | Expr::Min(_) | Expr::Max(_) => {
                Ok(Form::of(self.var_of(e, defined)?))
            }
        }
    }

    /// `coef · e`, distributed over sums where no part can leave the range.
    fn scaled(&mut self, e: &Expr, coef: i64, defined: &mut Defined<'_>) -> Result<Form, Fault> {
        let inner = self.form(e, defined)?;
        let widest = |f: &Form| {
            let (lo, hi) = f.range(&self.problem.store);
            lo.abs().max(hi.abs())
        };
        let limit = i128::from(LIMIT);
        if widest(&inner) < limit
            && let Some(form) = Form::default().add(&inner, coef)
            && widest(&form) < limit
        {
            return Ok(form);
        }
        let x = self.var_of(e, defined)?;
        if coef == 0 {
            return Ok(Form::constant(0));
        }
        Ok(Form::of(self.product(coef, vec![x], defined)?))
    }

    /// A variable equal to the term.
    fn var_of(&mut self, e: &Expr, defined: &mut Defined<'_>) -> Result<Var, Fault> {
        match e {
            Expr::Const(c) => self.constant(*c),
            Expr::Var(v) => Ok(Var(v.0)),
            Expr::Sum(_) | Expr::Neg(_) | Expr::Product(_) => {
                let form = self.form(e, defined)?;
                self.named(form, defined)
            }
            Expr::Power(e, exponent) => {
                let x = self.var_of(e, defined)?;
                let (lo, hi) = (self.problem.store.lo(x), self.problem.store.hi(x));
                let (p, q) = (number::pow(lo.into(), *exponent), number::pow(hi.into(), *exponent));
                let least = if lo < 0 && hi > 0 || lo == 0 { p.min(q).min(0) } else { p.min(q) };
                self.result(Key::Power(x, *exponent), (least, p.max(q).max(1)), defined, |z| Propagator::Power {
                    z,
                    x,
                    exponent: *exponent,
                })
            }
            Expr::Quotient(a, b) => self.quotient(a, b, false, defined),
            Expr::CeilDiv(a, b) => self.quotient(a, b, true, defined),
            Expr::Min(es) => self.extremum(es, false, defined),
            Expr::Max(es) => self.extremum(es, true, defined),
        }
    }

    fn extremum(&mut self, es: &[Expr], max: bool, defined: &mut Defined<'_>) -> Result<Var, Fault> {
        let xs = es.iter().map(|e| self.var_of(e, defined)).collect::<Result<Vec<_>, _>>()?;
        let lo = xs.iter().map(|x| self.problem.store.lo(*x)).min().ok_or(Fault::Range)?;
        let hi = xs.iter().map(|x| self.problem.store.hi(*x)).max().ok_or(Fault::Range)?;
        self.result(Key::Extremum(xs.clone(), max), (lo.into(), hi.into()), defined, |z| Propagator::Extremum {
            z,
            xs,
            max,
        })
    }

    fn quotient(&mut self, a: &Expr, b: &Expr, ceil: bool, defined: &mut Defined<'_>) -> Result<Var, Fault> {
        let a = self.var_of(a, defined)?;
        let mut b = self.var_of(b, defined)?;
        if self.problem.store.contains(b, 0)
            && let Some(lits) = defined
        {
            let y = b;
            let (lo, hi) = (self.problem.store.lo(y), self.problem.store.hi(y));
            b = self.aux(i128::from(lo.min(1)), i128::from(hi.max(1)))?;
            self.push(Propagator::NonZero { z: b, y });
            let zero = Linear { terms: vec![(1, y)], constant: 0, compare: Compare::Ne };
            let lit = self.reify(Relation::Linear(zero))?;
            lits.push(lit);
        }
        let most = self.problem.store.lo(a).abs().max(self.problem.store.hi(a).abs());
        let range = (-i128::from(most), i128::from(most));
        self.result(Key::Quotient(a, b, ceil), range, defined, |z| Propagator::Quotient { z, a, b, ceil })
    }

    fn product(&mut self, coef: i64, mut xs: Vec<Var>, defined: &mut Defined<'_>) -> Result<Var, Fault> {
        xs.sort_unstable();
        let mut range = (i128::from(coef), i128::from(coef));
        for x in &xs {
            let (lo, hi) = (i128::from(self.problem.store.lo(*x)), i128::from(self.problem.store.hi(*x)));
            let corners = [(range.0, lo), (range.0, hi), (range.1, lo), (range.1, hi)].map(|(a, b)| number::mul(a, b));
            range = (corners.into_iter().min().unwrap_or(0), corners.into_iter().max().unwrap_or(0));
        }
        self.result(Key::Product(coef, xs.clone()), range, defined, |z| Propagator::Product { z, coef, xs })
    }

    fn named(&mut self, form: Form, defined: &mut Defined<'_>) -> Result<Var, Fault> {
        if form.terms.is_empty() {
            return match i64::try_from(form.constant) {
                Ok(v) if v.abs() < LIMIT => self.constant(v),
                _ => Err(Fault::Range),
            };
        }
        if form.constant == 0 && form.terms.len() == 1 && form.terms[0].0 == 1 {
            return Ok(form.terms[0].1);
        }
        let range = form.range(&self.problem.store);
        if defined.is_some() && (range.0 <= -i128::from(LIMIT) || range.1 >= i128::from(LIMIT)) {
            // Sums do not saturate.
            return Err(Fault::Range);
        }
        let key = Key::Form(form.terms.clone(), form.constant);
        self.result(key, range, defined, |z| {
            let mut terms = form.terms;
            terms.push((-1, z));
            let linear = Linear { terms, constant: form.constant, compare: Compare::Eq };
            Propagator::Post { relation: Relation::Linear(linear), positive: true }
        })
    }

    /// The variable that holds an operation's result, shared by equal operations. At the top a result out of range is
    /// a conflict; under a connective it saturates, and a literal tells.
    fn result(
        &mut self,
        key: Key,
        (lo, hi): (i128, i128),
        defined: &mut Defined<'_>,
        prop: impl FnOnce(Var) -> Propagator,
    ) -> Result<Var, Fault> {
        let limit = i128::from(LIMIT);
        let inside = lo > -limit && hi < limit;
        if inside && let Some(z) = self.memo.get(&key) {
            return Ok(*z);
        }
        let z = match defined {
            Some(lits) if !inside => {
                let z = self.aux(lo, hi)?;
                let below = Linear { terms: vec![(1, z)], constant: 1 - limit, compare: Compare::Le };
                let above = Linear { terms: vec![(-1, z)], constant: 1 - limit, compare: Compare::Le };
                for bound in [below, above] {
                    let lit = self.reify(Relation::Linear(bound))?;
                    lits.push(lit);
                }
                z
            }
            _ => self.aux(lo.max(1 - limit), hi.min(limit - 1))?,
        };
        if inside {
            self.memo.insert(key, z);
        }
        self.push(prop(z));
        Ok(z)
    }
}

fn require(ok: bool) -> Result<(), Fault> {
    if ok { Ok(()) } else { Err(Fault::Empty) }
}
