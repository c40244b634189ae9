//! One-pass derivation: a cascade whose reductions over a rank depend on one another, as accumulators of one stream.
//!
//! Canonical values hold every reduction with its barriers separated off (`separation`), so what is left to carry are
//! sums Σ κ(c)·e^E(c), maxima and minima whose bodies know no barrier. Sums that share an exponent E share an anchor
//! M = max E: they are carried as Σ κ·(E−M)^i·e^(E−M), and moving the anchor is the linear map
//!     accᵢ ← e^(M−M') · Σ_j C(i,j)·(M−M')^(i−j)·accⱼ,
//! which composes and is the identity for M' = M. The value of an output does not depend on the anchor; an exponent
//! whose scale e^M stays in an output is not anchored. FlashAttention-2's running softmax is this for one E; a
//! learnable sink is a start value of M. An empty fiber keeps M = −∞ and every sum 0, and outputs then have the value
//! the text gives for an empty fiber. `check` re-computes a derivation without any of this file.

use std::collections::{BTreeMap, BTreeSet};

use super::inline::{Definition, Inlined, conjuncts, inline};
use super::interval::{Interval, exponent_is_safe};
use super::levels::levels_after;
use super::passes::passes_over;
use super::symbolic::{Atom, AtomId, Mono, PolyId, Rat, Symbols, Var};
use crate::cascade::{Cascade, Einsum, Expr, ExprId, IndexId, OutputSource, RankId, Reducer, Size, Stmt, TensorId};
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp};

mod build;
mod centre;

/// When the anchor of a stream moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Policy {
    /// Never: a constant anchor, proved to stay in range.
    Hoist,
    /// With every step: the running extremum.
    Rolling,
    /// When the running extremum has left the anchor by a threshold.
    Lazy,
    /// At the joins of a tree: (anchor, accumulators) merge associatively.
    Tree,
}

impl Policy {
    /// Its name in reports and mappings.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Hoist => "hoist",
            Policy::Rolling => "rolling",
            Policy::Lazy => "lazy",
            Policy::Tree => "tree",
        }
    }
}

/// A running maximum that sums are carried relative to.
#[derive(Clone, Debug, PartialEq)]
pub struct Anchor {
    /// The state; point n is the old anchor of step n, point n+1 the new one.
    pub state: TensorId,
    /// Indices of the kept dimensions in the state's step statement (the stream's index is not among them).
    pub dims: Vec<IndexId>,
    /// The element's exponent.
    pub contribution: ExprId,
    /// Elements that count; the others leave the state as it is.
    pub filter: Option<ExprId>,
    /// Start value: −∞, or what the outputs add to the sums.
    pub initial: ExprId,
}

/// A carried accumulator.
#[derive(Clone, Debug, PartialEq)]
pub struct Accumulator {
    /// The state (or, without a stream, the tensor of an ordinary reduction).
    pub state: TensorId,
    /// Indices of the kept dimensions in its step statement.
    pub dims: Vec<IndexId>,
    /// The monoid that joins contributions.
    pub op: ReduceOp,
    /// Position in [`Derivation::anchors`].
    pub anchor: Option<usize>,
    /// One element's contribution, relative to the new anchor.
    pub contribution: ExprId,
    /// Elements that count; the others leave the state as it is.
    pub filter: Option<ExprId>,
    /// Value of an empty fiber.
    pub initial: ExprId,
    /// The old accumulator moved to the new anchor; none when it never moves.
    pub repair: Option<ExprId>,
}

/// A cascade derived over one rank. Every expression is in `cascade`.
#[derive(Clone, Debug, PartialEq)]
pub struct Derivation {
    /// The whole cascade in derived form.
    pub cascade: Cascade,
    /// The rank that one pass now suffices for.
    pub rank: RankId,
    /// Position of the stream among the cascade's statements; none when every anchor is constant and the
    /// accumulators are ordinary reductions.
    pub stream: Option<usize>,
    /// The stream's index.
    pub index: Option<IndexId>,
    /// Anchors.
    pub anchors: Vec<Anchor>,
    /// Accumulators.
    pub accumulators: Vec<Accumulator>,
    /// Tensors computed from the final accumulators.
    pub finals: Vec<TensorId>,
    /// Policies under which the derived form is exact and in range.
    pub policies: Vec<Policy>,
}

/// The derived form as a cascade.
pub fn to_cascade(d: &Derivation) -> Cascade {
    d.cascade.clone()
}

/// Anchor policies over `rank`: empty when nothing over it needs an anchor, none when nothing is reduced over it or
/// its derivation is refused.
pub fn policies(c: &Cascade, rank: RankId) -> Option<Vec<Policy>> {
    let x = inline(c);
    policies_of(&x, rank, derive_inlined(c, &x, rank, Policy::Rolling).as_ref())
}

/// Likewise, where the cascade's canonical form and its derivation over `rank` are at hand.
pub fn policies_of(x: &Inlined, rank: RankId, derived: Option<&Derivation>) -> Option<Vec<Policy>> {
    if !x.sites.iter().any(|s| s.ranks.contains(&rank)) {
        return None;
    }
    if x.sites.iter().any(|s| s.ranks.contains(&rank) && s.separation.rank().is_none()) {
        return None;
    }
    Some(derived.map(|d| d.policies.clone()).unwrap_or_default())
}

/// The derivation over `rank` with a rolling anchor where one is needed; none when there is nothing to gain.
///
/// ```
/// use einfall_ir::analysis::derive::{derive, to_cascade};
/// use einfall_ir::cascade::{parse, print::print_cascade};
///
/// let text = "cascade lse[M, N](x: f32[M,N]) -> (y: f32[M]) {
///     a[m] = max(n) x[m,n]
///     s[m] = sum(n) exp(x[m,n] - a[m])
///     y[m] = a[m] + log(s[m])
/// }";
/// let c = parse(text).expect("it is right").cascades.remove(0);
/// let one_pass = to_cascade(&derive(&c, c.rank("N").expect("a rank")).expect("one pass suffices"));
/// println!("{}", print_cascade(&one_pass)); // accumulators stepped along n
/// ```
pub fn derive(c: &Cascade, rank: RankId) -> Option<Derivation> {
    derive_with(c, rank, Policy::Rolling)
}

/// The derivation over `rank`. With [`Policy::Hoist`] every anchor is constant, none unless that is in range.
pub fn derive_with(c: &Cascade, rank: RankId, policy: Policy) -> Option<Derivation> {
    derive_inlined(c, &inline(c), rank, policy)
}

/// Likewise, from the cascade's canonical form.
pub fn derive_inlined(c: &Cascade, x: &Inlined, rank: RankId, policy: Policy) -> Option<Derivation> {
    let before = passes_over(c, &[rank]).max;
    let after = levels_after(c, x, rank).passes;
    // Statements behind sums without exponents stay as they are written: in one value with the sums, what is subtracted
    // from an element would be summed and scaled apart from it.
    if after < before
        && let Some(d) = finished(c, x, rank, policy, Finish::Text, |s, p| p.slots.iter().all(|k| !k.is_exponential(s)))
    {
        return Some(d);
    }
    // Where an output has no value of a fiber without points by itself, what it is made of may have one.
    let gains = |_: &Symbols, p: &Plan| after < before || p.classes.iter().any(|k| k.anchored);
    finished(c, x, rank, policy, Finish::Outputs, gains)
        .or_else(|| finished(c, x, rank, policy, Finish::Text, gains).filter(|_| after < before))
}

/// The derivation with finals as `finish` says, if the plan is one that `fits`.
fn finished(
    c: &Cascade,
    x: &Inlined,
    rank: RankId,
    policy: Policy,
    finish: Finish,
    fits: impl Fn(&Symbols, &Plan) -> bool,
) -> Option<Derivation> {
    if needed_finals(c, x, rank, finish).is_empty() {
        return None;
    }
    let mut x = x.clone();
    let centred = centre::centre(c, &mut x, rank, finish);
    let c = centred.as_ref().unwrap_or(c);
    let mut plan = Plan::new(c, &mut x, rank, finish)?;
    if !fits(&x.symbols, &plan) {
        return None;
    }
    let anchored = plan.classes.iter().any(|k| k.anchored);
    let bounded = plan.bounded(c, &x.symbols);
    let policies = match (anchored, bounded) {
        (true, true) => vec![Policy::Hoist, Policy::Rolling, Policy::Lazy, Policy::Tree],
        (true, false) => vec![Policy::Rolling, Policy::Lazy, Policy::Tree],
        (false, _) => vec![Policy::Hoist, Policy::Tree],
    };
    if policy == Policy::Hoist {
        if !policies.contains(&Policy::Hoist) {
            return None;
        }
        if anchored {
            plan = Plan::with(c, &mut x, rank, finish, true)?;
        }
    }
    build::build(c, &mut x, rank, plan, policies).ok()
}

/// Which tensors are finished from accumulators.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Finish {
    /// The last ones: the outputs themselves where they can be.
    Outputs,
    /// Those whose statements reduce over the rank, as far as they can be.
    Text,
}

/// Sums that share an exponent and a filter.
struct Class {
    exponent: PolyId,
    filter: Vec<PolyId>,
    /// Whether the sums are carried relative to a running maximum.
    anchored: bool,
    /// Exponents the outputs add to the sums: start values of the anchor.
    initial: Vec<PolyId>,
    /// The maximum of the exponent over the fiber, in canonical form.
    maximum: PolyId,
    dims: Vec<Var>,
}

/// What a slot carries.
#[derive(Clone, PartialEq)]
struct Carried {
    op: ReduceOp,
    /// The class it is relative to.
    class: Option<usize>,
    /// κ, or the whole body without a class.
    weight: PolyId,
    /// Power of (E − M).
    power: u32,
    filter: Vec<PolyId>,
    dims: Vec<Var>,
}

impl Carried {
    /// Whether what is summed has an exponent, of the anchor or its own.
    fn is_exponential(&self, s: &Symbols) -> bool {
        self.class.is_some() || s.poly(self.weight).terms.keys().any(|m| m.exp.is_some())
    }
}

struct Final {
    tensor: TensorId,
    /// Free indices of its statement and the shared variables they stand for.
    free: Vec<(IndexId, Var)>,
    value: PolyId,
}

struct Plan {
    element: Var,
    classes: Vec<Class>,
    slots: Vec<Carried>,
    finals: Vec<Final>,
}

fn over(v: &Var, rank: RankId) -> bool {
    *v.extent() == Size::Rank(rank)
}

fn mentions_rank(s: &Symbols, p: PolyId, rank: RankId) -> bool {
    let mut found = s.reductions(p).iter().any(|(extents, _)| extents.contains(&Size::Rank(rank)));
    s.visit(p, &mut |a| {
        found |= matches!(s.atom(a), Atom::Scan(_, v, _) if over(v, rank));
        !found
    });
    found
}

/// Reductions over `rank` that a value is directly made of; none if one hides inside another reduction or has a form
/// that is not carried.
fn top_reductions(s: &Symbols, p: PolyId, rank: RankId) -> Option<Vec<AtomId>> {
    let mut out = Vec::new();
    let mut fine = true;
    s.visit(p, &mut |a| match s.atom(a) {
        Atom::Reduce { op, vars, body, filter, .. } => {
            if vars.iter().any(|v| over(v, rank)) {
                let carried = matches!(op, Reducer::Op(ReduceOp::Sum | ReduceOp::Max | ReduceOp::Min));
                fine &= carried && vars.len() == 1;
                fine &= body.iter().chain(filter).all(|q| !mentions_rank(s, *q, rank));
                if !out.contains(&a) {
                    out.push(a);
                }
            } else {
                fine &= body.iter().chain(filter).all(|q| !mentions_rank(s, *q, rank));
            }
            false
        }
        Atom::Scan(..) => {
            fine = false;
            false
        }
        Atom::Read(t, _) => {
            // What is reduced behind a tensor that is not looked into is not carried.
            fine &= !s.hidden.get(t).is_some_and(|all| all.iter().any(|(e, _)| e.contains(&Size::Rank(rank))));
            true
        }
        _ => true,
    });
    fine.then_some(out)
}

/// Whether a tensor's value is finished from accumulators over `rank`.
fn is_final(x: &Inlined, t: TensorId, rank: RankId) -> bool {
    x.tensors.get(&t).is_some_and(|d| {
        d.inlined
            && !d.free.iter().any(|(_, v)| over(v, rank))
            && d.support.iter().all(|p| !mentions_rank(&x.symbols, *p, rank))
            && top_reductions(&x.symbols, d.value, rank).is_some_and(|r| !r.is_empty())
    })
}

fn output_tensor(o: &OutputSource) -> TensorId {
    match o {
        OutputSource::Whole(t) => *t,
        OutputSource::Points { state, .. } | OutputSource::Point { state, .. } => *state,
    }
}

/// Tensors a statement assigns, and tensors it reads.
fn ends(c: &Cascade, stmt: &Stmt) -> (BTreeSet<TensorId>, BTreeSet<TensorId>) {
    let (mut writes, mut reads) = (BTreeSet::new(), BTreeSet::new());
    let mut einsum = |e: &Einsum| {
        writes.extend(e.targets.iter().map(|t| t.tensor));
        for r in e.roots() {
            c.walk(r, &mut |_, x| match x {
                Expr::Read { tensor, .. } | Expr::Segment { offsets: tensor, .. } => {
                    reads.insert(*tensor);
                }
                _ => {}
            });
        }
    };
    match stmt {
        Stmt::Einsum(e) => einsum(e),
        Stmt::Iter(i) => i.inits.iter().chain(&i.body).for_each(&mut einsum),
    }
    (writes, reads)
}

/// Final tensors that the outputs need when nothing behind them is kept.
fn needed_finals(c: &Cascade, x: &Inlined, rank: RankId, finish: Finish) -> Vec<TensorId> {
    let mut seen = BTreeSet::new();
    let mut stack: Vec<TensorId> = c.outputs.iter().map(|o| output_tensor(&o.source)).collect();
    let mut out = BTreeSet::new();
    while let Some(t) = stack.pop() {
        if !seen.insert(t) {
            continue;
        }
        let fin = is_final(x, t, rank);
        if fin && !(finish == Finish::Text && is_made_of_finals(c, x, t, rank)) {
            out.insert(t);
            continue;
        }
        for stmt in &c.stmts {
            let (writes, reads) = ends(c, stmt);
            if writes.contains(&t) {
                stack.extend(reads);
            }
        }
    }
    out.into_iter().collect()
}

/// Whether a tensor's statement reduces nothing over the rank and reads only finals of what does.
fn is_made_of_finals(c: &Cascade, x: &Inlined, t: TensorId, rank: RankId) -> bool {
    let waiting = build::waits(c, rank);
    let mut found = false;
    for stmt in c.stmts.iter().filter(|s| ends(c, s).0.contains(&t)) {
        let Stmt::Einsum(e) = stmt else { return false };
        let mut reduces = false;
        e.roots().for_each(|r| {
            c.walk(r, &mut |_, x| {
                if let Expr::Reduce { over, .. } = x {
                    reduces |= over.iter().any(|i| c.indices[*i].rank == Some(rank));
                }
            });
        });
        let reads = ends(c, stmt).1;
        if reduces || !reads.iter().all(|r| !waiting.contains(r) || is_final(x, *r, rank)) {
            return false;
        }
        found |= reads.iter().any(|r| waiting.contains(r));
    }
    found
}

/// The quotient of sums, when it is exact.
fn divide(s: &mut Symbols, p: PolyId, d: PolyId) -> Option<PolyId> {
    let (dm, dc) = s.poly(d).terms.clone().into_iter().next()?;
    let divisor = s.term(dc, dm);
    let terms: Vec<(Mono, Rat)> = s.poly(p).terms.clone().into_iter().collect();
    for (m, c) in terms {
        let lead = s.term(c, m);
        let q = s.div(lead, divisor);
        if s.mul(q, d) == p {
            return Some(q);
        }
    }
    None
}

/// Whether `q` holds a negative power of something that varies with `v`.
fn has_pole(s: &Symbols, q: PolyId, v: &Var) -> bool {
    s.poly(q).terms.keys().any(|m| m.factors.iter().any(|(a, k)| *k < Rat::ZERO && s.atom_vars(*a).contains(v)))
}

impl Plan {
    fn new(c: &Cascade, x: &mut Inlined, rank: RankId, finish: Finish) -> Option<Plan> {
        Plan::with(c, x, rank, finish, false)
    }

    fn with(c: &Cascade, x: &mut Inlined, rank: RankId, finish: Finish, hoisted: bool) -> Option<Plan> {
        let tensors = needed_finals(c, x, rank, finish);
        if tensors.is_empty() {
            return None;
        }
        let s = &mut x.symbols;
        // Free variables of all finals, shared by extent and order.
        let mut shared: BTreeMap<(Size, usize), Var> = BTreeMap::new();
        let mut finals = Vec::new();
        for t in tensors {
            let d = x.tensors[&t].clone();
            let mut count: BTreeMap<Size, usize> = BTreeMap::new();
            let (mut free, mut map) = (Vec::new(), BTreeMap::new());
            for (i, v) in &d.free {
                let k = count.entry(v.extent().clone()).or_default();
                let key = (v.extent().clone(), *k);
                *k += 1;
                let w = shared.entry(key).or_insert_with(|| s.fresh(v.extent().clone())).clone();
                let p = s.of_atom(Atom::Var(w.clone()));
                map.insert(v.clone(), p);
                free.push((*i, w));
            }
            let mut value = s.substitute(d.value, &map);
            // The statement's target rounds; the cast is not repeated.
            if let Some(inner) = outer_cast(s, value, c.tensors[t].dtype) {
                value = inner;
            }
            finals.push(Final { tensor: t, free, value });
        }
        let element = s.fresh(Size::Rank(rank));
        let waiting = build::waits(c, rank);
        let readable: Vec<Definition> = x
            .tensors
            .iter()
            .filter(|(t, d)| d.inlined && !waiting.contains(t) && d.free.iter().any(|(_, v)| over(v, rank)))
            .map(|(_, d)| d.clone())
            .collect();
        let mut unanchored: BTreeSet<(PolyId, Vec<PolyId>)> = BTreeSet::new();
        let mut apart: BTreeSet<(PolyId, Vec<PolyId>)> = BTreeSet::new();
        for _ in 0..6 {
            let mut draft = Draft {
                rank,
                element: element.clone(),
                hoisted,
                readable: &readable,
                unanchored: &unanchored,
                apart: &apart,
                classes: Vec::new(),
                slots: Vec::new(),
            };
            let mut values = Vec::new();
            let atoms: Vec<Vec<AtomId>> =
                finals.iter().map(|f| top_reductions(s, f.value, rank)).collect::<Option<_>>()?;
            // Sums first: a maximum that is an anchor is carried once.
            let mut forms = BTreeMap::new();
            for sums in [true, false] {
                for a in atoms.iter().flatten() {
                    if is_sum(s, *a) == sums && !forms.contains_key(a) {
                        let form = draft.form(s, *a);
                        forms.insert(*a, form);
                    }
                }
            }
            for f in &finals {
                values.push(s.rewrite(f.value, &mut |_, a| forms.get(&a).copied()));
            }
            let Draft { mut classes, slots, .. } = draft;
            let mut again = false;
            for (k, class) in classes.iter_mut().enumerate() {
                let scale = s.intern_atom(Atom::Scale(k as u32));
                let log = s.intern_atom(Atom::ScaleLog(k as u32));
                let uses: Vec<PolyId> = values.iter().copied().filter(|v| mentions(s, *v, scale, log)).collect();
                let stays =
                    |s: &Symbols, v: PolyId| s.poly(v).terms.keys().any(|m| m.factors.iter().any(|(a, _)| *a == scale));
                let touched = |f: &Final, s: &Symbols| atoms_of_class(s, &forms, f.value, scale);
                let involved: Vec<bool> = finals.iter().map(|f| touched(f, s)).collect();
                let gains = values.iter().zip(&involved).any(|(v, used)| *used && !stays(s, *v));
                let key = (class.exponent, class.filter.clone());
                if !gains && class.anchored {
                    again |= unanchored.insert(key.clone());
                }
                let starts = start_values(s, &values, scale);
                let fits = |s: &Symbols, p: PolyId| s.vars(p).iter().all(|v| class.dims.contains(v));
                let starts: Vec<PolyId> = starts.into_iter().filter(|p| fits(s, *p)).collect();
                // A start value makes the anchor no longer the maximum: outputs that need that carry it apart.
                if !starts.is_empty() && uses.iter().any(|v| mentions_log(s, *v, log)) {
                    again |= apart.insert(key);
                }
                class.initial = starts;
            }
            if again {
                continue;
            }
            // What the text takes off an exponent before it is summed keeps it in range: put outside it would not.
            let carried = |a: AtomId, s: &Symbols| match s.atom(a) {
                Atom::Slot(k) => Some(&slots[*k as usize]),
                _ => None,
            };
            let overflows = |s: &Symbols, v: PolyId| {
                s.poly(v).terms.keys().any(|m| {
                    let raw = |a: AtomId| carried(a, s).is_some_and(|k| k.class.is_none() && k.is_exponential(s));
                    let mut by_slots = false;
                    m.exp.iter().for_each(|e| {
                        s.visit(*e, &mut |a| {
                            by_slots |= carried(a, s).is_some();
                            true
                        })
                    });
                    by_slots && m.factors.iter().any(|(a, _)| raw(*a))
                })
            };
            if !hoisted && values.iter().any(|v| overflows(s, *v)) {
                return None;
            }
            for (f, v) in finals.iter_mut().zip(values) {
                f.value = v;
            }
            return Some(Plan { element, classes, slots, finals });
        }
        None
    }

    /// Whether every anchored exponent is proved to stay in range.
    fn bounded(&self, c: &Cascade, s: &Symbols) -> bool {
        let params = parameter_bounds(c);
        self.classes.iter().filter(|k| k.anchored).all(|k| exponent_is_safe(s, k.exponent, &params))
    }
}

/// What `a` is where `p`, which is `c·a + d` with one term `c`, is `value`: a maximum from that of its multiple.
fn solved(s: &mut Symbols, p: PolyId, a: AtomId, value: PolyId) -> Option<PolyId> {
    let (mut scale, mut rest) = (None, value);
    for (m, k) in s.poly(p).terms.clone() {
        let factors: Vec<(AtomId, Rat)> = m.factors.iter().filter(|f| f.0 != a).cloned().collect();
        let whole = factors.len() + 1 == m.factors.len() && m.factors.contains(&(a, Rat::ONE));
        let own = s.term(Rat::ONE, Mono { exp: m.exp, factors: factors.clone() });
        let mut apart = true;
        s.visit(own, &mut |b| {
            apart &= b != a;
            apart
        });
        match (whole, apart) {
            (true, true) if scale.is_none() && m.exp.is_none() => {
                let inverse = factors.into_iter().map(|(f, q)| (f, -q)).collect();
                scale = Some(s.term(Rat::ONE / k, Mono { exp: None, factors: inverse }));
            }
            (false, true) if factors.len() == m.factors.len() => {
                let term = s.term(k, m);
                rest = s.sub(rest, term);
            }
            _ => return None,
        }
    }
    scale.map(|scale| s.mul(rest, scale))
}

fn is_sum(s: &Symbols, a: AtomId) -> bool {
    matches!(s.atom(a), Atom::Reduce { op: Reducer::Op(ReduceOp::Sum), .. })
}

/// The operand of a cast to `dtype` that is the whole value.
fn outer_cast(s: &Symbols, p: PolyId, dtype: DType) -> Option<PolyId> {
    let terms = &s.poly(p).terms;
    let (m, c) = terms.iter().next()?;
    match (terms.len(), m.exp, m.factors.as_slice()) {
        (1, None, [(a, q)]) if c.is_one() && q.is_one() => match s.atom(*a) {
            Atom::Cast(d, inner) if *d == dtype => Some(*inner),
            _ => None,
        },
        _ => None,
    }
}

fn mentions(s: &Symbols, p: PolyId, scale: AtomId, log: AtomId) -> bool {
    let mut found = false;
    s.visit(p, &mut |a| {
        found |= a == scale || a == log;
        !found
    });
    found
}

fn mentions_log(s: &Symbols, p: PolyId, log: AtomId) -> bool {
    mentions(s, p, log, log)
}

/// Whether a value holds a reduction whose carried form is relative to `scale`.
fn atoms_of_class(s: &Symbols, forms: &BTreeMap<AtomId, PolyId>, p: PolyId, scale: AtomId) -> bool {
    let mut found = false;
    s.visit(p, &mut |a| {
        if let Some(f) = forms.get(&a) {
            found |= mentions(s, *f, scale, scale);
        }
        true
    });
    found
}

/// Exponents F of terms e^F·(e^M)^−q inside sums that are inverted or taken the logarithm of.
fn start_values(s: &mut Symbols, values: &[PolyId], scale: AtomId) -> Vec<PolyId> {
    let mut inner = Vec::new();
    for v in values {
        s.visit(*v, &mut |a| {
            if let Atom::Base(p) | Atom::Log(p) = s.atom(a) {
                inner.push(*p);
            }
            true
        });
    }
    let mut out = Vec::new();
    for p in inner {
        for m in s.poly(p).terms.clone().into_keys() {
            let Some((_, q)) = m.factors.iter().find(|f| f.0 == scale) else { continue };
            if let (Some(e), true) = (m.exp, *q < Rat::ZERO) {
                let f = s.scale(e, &(Rat::NEG_ONE / q.clone()));
                if !out.contains(&f) {
                    out.push(f);
                }
            }
        }
    }
    out
}

/// Intervals of scalar parameters from declared facts.
fn parameter_bounds(c: &Cascade) -> BTreeMap<TensorId, Interval> {
    let mut out: BTreeMap<TensorId, Interval> = BTreeMap::new();
    let mut all = Vec::new();
    for r in &c.requires {
        conjuncts(c, *r, &mut all);
    }
    let number = |e: ExprId| match c.exprs[e] {
        Expr::Int(n) => Some(n as f64),
        Expr::Float(x) => Some(x),
        _ => None,
    };
    for e in all {
        let Expr::Binary(op, a, b) = &c.exprs[e] else { continue };
        let (low, high) = match op {
            BinaryOp::Lt | BinaryOp::Le => (*a, *b),
            BinaryOp::Gt | BinaryOp::Ge => (*b, *a),
            _ => continue,
        };
        if let (Expr::Read { tensor, .. }, Some(x)) = (&c.exprs[low], number(high)) {
            let i = out.entry(*tensor).or_insert((f64::NEG_INFINITY, f64::INFINITY));
            i.1 = i.1.min(x);
        }
        if let (Some(x), Expr::Read { tensor, .. }) = (number(low), &c.exprs[high]) {
            let i = out.entry(*tensor).or_insert((f64::NEG_INFINITY, f64::INFINITY));
            i.0 = i.0.max(x);
        }
    }
    out
}

struct Draft<'a> {
    rank: RankId,
    element: Var,
    hoisted: bool,
    /// Tensors along the rank that no barrier holds up.
    readable: &'a [Definition],
    unanchored: &'a BTreeSet<(PolyId, Vec<PolyId>)>,
    apart: &'a BTreeSet<(PolyId, Vec<PolyId>)>,
    classes: Vec<Class>,
    slots: Vec<Carried>,
}

impl Draft<'_> {
    fn dims(&self, s: &Symbols, all: &[PolyId]) -> Vec<Var> {
        let mut out = BTreeSet::new();
        for p in all {
            out.extend(s.vars(*p));
        }
        out.into_iter().filter(|v| *v != self.element).collect()
    }

    fn slot(&mut self, s: &mut Symbols, carried: Carried) -> PolyId {
        let k = match self.slots.iter().position(|c| *c == carried) {
            Some(k) => k,
            None => {
                self.slots.push(carried.clone());
                self.slots.len() - 1
            }
        };
        let a = s.intern_atom(Atom::Slot(k as u32));
        if carried.op == ReduceOp::Sum && carried.power == 0 && s.is_positive(carried.weight) {
            s.set_positive(a);
        }
        s.power_of_atom(a, Rat::ONE)
    }

    /// A reduction over the rank in terms of carried values.
    fn form(&mut self, s: &mut Symbols, a: AtomId) -> PolyId {
        let Atom::Reduce { op: Reducer::Op(op), vars, filter, body, .. } = s.atom(a).clone() else {
            return s.power_of_atom(a, Rat::ONE);
        };
        debug_assert!(over(&vars[0], self.rank));
        let n = s.of_atom(Atom::Var(self.element.clone()));
        let open = BTreeMap::from([(vars[0].clone(), n)]);
        let body = s.substitute(body[0], &open);
        let mut filter: Vec<PolyId> = filter.into_iter().map(|p| s.substitute(p, &open)).collect();
        filter.sort();
        if op != ReduceOp::Sum {
            if matches!(op, ReduceOp::Max | ReduceOp::Min) {
                let anchors = self.classes.iter().enumerate().filter(|(_, k)| k.anchored);
                let own: Vec<(usize, PolyId)> = anchors
                    .filter(|(_, k)| !self.apart.contains(&(k.exponent, k.filter.clone())))
                    .map(|(k, class)| (k, class.maximum))
                    .collect();
                let same = own.into_iter().find_map(|(k, maximum)| {
                    let log = s.of_atom(Atom::ScaleLog(k as u32));
                    solved(s, maximum, a, log)
                });
                if let Some(whole) = same {
                    return whole;
                }
            }
            let dims = self.dims(s, &[&[body], filter.as_slice()].concat());
            return self.slot(s, Carried { op, class: None, weight: body, power: 0, filter, dims });
        }
        // Parts by exponent.
        let mut parts: BTreeMap<Option<PolyId>, Vec<(Mono, Rat)>> = BTreeMap::new();
        for (m, c) in s.poly(body).terms.clone() {
            let varies = m.exp.is_some_and(|e| s.vars(e).contains(&self.element));
            let key = if varies { m.exp } else { None };
            let rest = if varies { Mono { exp: None, factors: m.factors } } else { m };
            parts.entry(key).or_default().push((rest, c));
        }
        let mut value = s.integer(0);
        for (exponent, terms) in parts {
            let mut weight = s.integer(0);
            for (m, c) in terms {
                let t = s.term(c, m);
                weight = s.add(weight, t);
            }
            let part = match exponent {
                None => self.plain(s, weight, &filter),
                Some(e) => self.exponential(s, e, weight, &filter),
            };
            value = s.add(value, part);
        }
        value
    }

    fn plain(&mut self, s: &mut Symbols, weight: PolyId, filter: &[PolyId]) -> PolyId {
        let dims = self.dims(s, &[&[weight], filter].concat());
        let filter = filter.to_vec();
        self.slot(s, Carried { op: ReduceOp::Sum, class: None, weight, power: 0, filter, dims })
    }

    fn exponential(&mut self, s: &mut Symbols, e: PolyId, weight: PolyId, filter: &[PolyId]) -> PolyId {
        // An exponent that is a tensor's value up to a constant of the fiber is that tensor: the constant stays outside.
        if let Some(whole) = self.whole_exponent(s, e, filter) {
            let offset = s.sub(e, whole);
            let factor = s.exp(offset);
            let v = self.exponential(s, whole, weight, filter);
            return s.mul(factor, v);
        }
        let key = (e, filter.to_vec());
        if self.hoisted || self.unanchored.contains(&key) {
            let f = s.exp(e);
            let weight = s.mul(weight, f);
            return self.plain(s, weight, filter);
        }
        let class = match self.classes.iter().position(|k| k.exponent == e && k.filter == filter) {
            Some(k) => k,
            None => {
                let element = self.element.clone();
                let max = Reducer::Op(ReduceOp::Max);
                let maximum = super::separation::reduce(s, max, 0, &[element], filter.to_vec(), vec![e]).value;
                let dims = self.dims(s, &[&[e], filter].concat());
                let (filter, initial) = (filter.to_vec(), Vec::new());
                self.classes.push(Class { exponent: e, filter, anchored: true, initial, maximum, dims });
                self.classes.len() - 1
            }
        };
        // Powers of the exponent within the weight are carried relative to the anchor too.
        let (mut rest, mut power) = (weight, 0u32);
        while power < 3 {
            match divide(s, rest, e) {
                Some(q) if !has_pole(s, q, &self.element) => {
                    rest = q;
                    power += 1;
                }
                _ => break,
            }
        }
        // What does not vary with the element stays outside.
        let (outside, inside) = self.split_constant(s, rest);
        let scale = s.of_atom(Atom::Scale(class as u32));
        let log = s.of_atom(Atom::ScaleLog(class as u32));
        let dims_of = |d: &Draft<'_>, s: &Symbols| {
            let own = d.dims(s, &[inside]);
            let mut all: BTreeSet<Var> = d.classes[class].dims.iter().cloned().collect();
            all.extend(own);
            all.into_iter().collect::<Vec<_>>()
        };
        let dims = dims_of(self, s);
        let mut value = s.integer(0);
        let mut binomial = Rat::ONE;
        for i in 0..=power {
            let carried = Carried {
                op: ReduceOp::Sum,
                class: Some(class),
                weight: inside,
                power: i,
                filter: filter.to_vec(),
                dims: dims.clone(),
            };
            let acc = self.slot(s, carried);
            let m = s.pow(log, &Rat::from(power - i));
            let t = s.mul(acc, m);
            let t = s.scale(t, &binomial);
            value = s.add(value, t);
            binomial = binomial * Rat::from(power - i) / Rat::from(i + 1);
        }
        let value = s.mul(value, scale);
        s.mul(value, outside)
    }

    /// The value of a tensor of the text that differs from `e` by a constant of the fiber.
    fn whole_exponent(&self, s: &mut Symbols, e: PolyId, filter: &[PolyId]) -> Option<PolyId> {
        let mut vars: BTreeSet<Var> = s.vars(e);
        vars.insert(self.element.clone());
        for d in self.readable {
            let mut maps: Vec<BTreeMap<Var, PolyId>> = vec![BTreeMap::new()];
            for (_, v) in &d.free {
                let mut next = Vec::new();
                for m in &maps {
                    for w in vars.iter().filter(|w| w.extent() == v.extent()) {
                        let x = s.of_atom(Atom::Var(w.clone()));
                        if !m.values().any(|y| *y == x) && next.len() < 32 {
                            let mut m = m.clone();
                            m.insert(v.clone(), x);
                            next.push(m);
                        }
                    }
                }
                maps = next;
            }
            for m in maps {
                let value = s.substitute(d.value, &m);
                let offset = s.sub(e, value);
                let known = d.support.iter().all(|p| {
                    let p = s.substitute(*p, &m);
                    filter.contains(&p)
                });
                if known && value != e && !s.vars(offset).contains(&self.element) {
                    return Some(value);
                }
            }
        }
        None
    }

    /// A one-term weight as (constant over the fiber, the rest).
    fn split_constant(&self, s: &mut Symbols, p: PolyId) -> (PolyId, PolyId) {
        let terms = s.poly(p).terms.clone();
        let one = s.integer(1);
        if terms.len() != 1 {
            return (one, p);
        }
        let (m, c) = terms.into_iter().next().expect("one term");
        let (inner, outer): (Vec<_>, Vec<_>) =
            m.factors.into_iter().partition(|(a, _)| s.atom_vars(*a).contains(&self.element));
        let outer = s.term(c, Mono { exp: m.exp, factors: outer });
        let inner = s.term(Rat::ONE, Mono { exp: None, factors: inner });
        (outer, inner)
    }
}

#[cfg(test)]
mod tests;
