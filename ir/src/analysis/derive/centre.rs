//! Sums of powers relative to an element of their fiber: the constant anchor of polynomial accumulators.
//!
//! A centred form Σ κ·(x − μ)^i separates into sums of powers of x, and what is subtracted in the end cancels: Σx² is
//! larger than Σ(x − μ)² by N·μ². Any a that is constant over the fiber may be taken off first. With x = x' + a,
//!     Σ κ·x^i = Σ_j C(i,j)·a^(i−j)·Σ κ·x'^j,
//! and where the output's value is a centred form, a leaves it by algebra alone. The anchor is then never moved, and
//! accumulators of parts of a fiber still add. With a an element of the fiber, (a − μ)² ≤ N·σ²: what is subtracted is
//! at most N times what remains, whatever the mean, as in the error bound of a sum of N terms (Chan, Golub & LeVeque
//! 1983 on shifted data). That is still too much for a first element that is an outlier: three σ away, ten times the
//! error of what remains. So a is the median of three elements, of which two must be far for it to be, and where third
//! and higher powers are summed, which magnify more, of three means of three. Where a stays as an offset, as in the mean
//! a + (Σx')/N, the result is off by up to half an ulp of a − μ, which may be larger by any factor than a mean near 0 and
//! what summing x itself leaves of it: sums that are results are taken as they are written. Invariant: a value is rewritten
//! only when a is gone from it, or stands in it once as an offset and it is no result.

use std::collections::{BTreeMap, BTreeSet};

use super::super::emit::{Emitter, Scope};
use super::super::inline::{Definition, Inlined};
use super::super::separation;
use super::super::symbolic::{Atom, AtomId, Mono, PolyId, Rat, Symbols, Var};
use super::{Finish, build, ends, needed_finals, over, top_reductions};
use crate::arena::Id;
use crate::cascade::{
    Cascade, Einsum, Expr, ExprId, IndexId, IndexKind, Output, OutputSource, RankId, Reducer, Size, Stmt, Target,
    TensorId, TensorKind,
};
use crate::diag::Span;
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

/// The most tensors of a cascade that are centred.
const MAX_CENTRED: usize = 4;

/// Groups of elements whose median is the anchor.
const GROUPS: i64 = 3;
/// Elements of a group, where third and higher powers are summed; one otherwise.
const NEAR: i64 = 3;

/// A sum over the rank, its index opened.
struct Opened {
    atom: AtomId,
    filter: Vec<PolyId>,
    body: PolyId,
}

/// What is centred: T = coefficient·lead + others.
struct Candidate {
    value: PolyId,
    lead: AtomId,
    coefficient: Rat,
    /// Its variables in the order of the lead's dimensions.
    dims: Vec<Var>,
}

/// Finals in terms of T' = T − a.
struct Rewritten {
    /// Of the sums that changed.
    filter: Vec<PolyId>,
    /// The highest power of T' that is summed.
    degree: Rat,
    values: Vec<(TensorId, PolyId)>,
}

/// The cascade with centred tensors in it, and in `x` the values that read them; none where no value gains.
pub(super) fn centre(c: &Cascade, x: &mut Inlined, rank: RankId, finish: Finish) -> Option<Cascade> {
    let finals = needed_finals(c, x, rank, finish);
    let element = x.symbols.fresh(Size::Rank(rank));
    let waiting = build::waits(c, rank);
    let readable: BTreeMap<TensorId, Definition> =
        x.tensors.iter().filter(|(t, _)| !waiting.contains(t)).map(|(t, d)| (*t, d.clone())).collect();
    let inputs: BTreeSet<TensorId> =
        c.tensors.iter().filter(|(_, t)| t.kind == TensorKind::Input).map(|(t, _)| t).collect();
    let whole = |o: &Output| match o.source {
        OutputSource::Whole(t) | OutputSource::Points { state: t, .. } | OutputSource::Point { state: t, .. } => t,
    };
    let mut results: BTreeSet<TensorId> = c.outputs.iter().map(whole).collect();
    // What a result is made of alone, as a mean of its sum, is as near to 0 as it is.
    loop {
        let before = results.len();
        for (writes, reads) in c.stmts.iter().map(|s| ends(c, s)) {
            if reads.len() == 1 && !writes.is_disjoint(&results) {
                results.extend(reads);
            }
        }
        if results.len() == before {
            break;
        }
    }
    let mut out: Option<Cascade> = None;
    let mut made = 0;
    while made < MAX_CENTRED {
        let target = out.as_ref().unwrap_or(c);
        let sums = opened(x, &finals, rank, &element);
        let ids = (TensorId::new(target.tensors.len()), TensorId::new(target.tensors.len() + 1));
        let found = candidates(&mut x.symbols, &sums, &element, &inputs)
            .into_iter()
            .find_map(|k| rewritten(x, (&finals, &results), &sums, &k, &element, ids).map(|r| (k, r)));
        let Some((candidate, made_of)) = found else { break };
        let mut next = target.clone();
        statements(&mut next, x, &readable, &finals, &candidate, &made_of, &element, ids)?;
        for (t, v) in made_of.values {
            x.tensors.get_mut(&t).expect("a final tensor").value = v;
        }
        out = Some(next);
        made += 1;
    }
    out
}

/// Every sum over the rank that the finals are made of.
fn opened(x: &mut Inlined, finals: &[TensorId], rank: RankId, element: &Var) -> Vec<Opened> {
    let s = &mut x.symbols;
    let n = s.of_atom(Atom::Var(element.clone()));
    let mut out: Vec<Opened> = Vec::new();
    for t in finals {
        for a in top_reductions(s, x.tensors[t].value, rank).unwrap_or_default() {
            let Atom::Reduce { op: Reducer::Op(ReduceOp::Sum), vars, filter, body, .. } = s.atom(a).clone() else {
                continue;
            };
            if out.iter().any(|o| o.atom == a) || !over(&vars[0], rank) {
                continue;
            }
            let open = BTreeMap::from([(vars[0].clone(), n)]);
            let mut filter: Vec<PolyId> = filter.into_iter().map(|p| s.substitute(p, &open)).collect();
            filter.sort();
            out.push(Opened { atom: a, filter, body: s.substitute(body[0], &open) });
        }
    }
    out
}

/// What may be centred: sums of inputs that are summed as they are, then single factors.
fn candidates(s: &mut Symbols, sums: &[Opened], element: &Var, inputs: &BTreeSet<TensorId>) -> Vec<Candidate> {
    let mut found: Vec<(PolyId, AtomId, Rat)> = Vec::new();
    let leads = |s: &Symbols, a: AtomId| {
        matches!(s.atom(a), Atom::Read(..) | Atom::Cast(..) | Atom::Unary(..)) && s.atom_vars(a).contains(element)
    };
    for o in sums {
        let terms = &s.poly(o.body).terms;
        let alone = terms.iter().find_map(|(m, k)| match m.factors.as_slice() {
            [(a, q)] if m.exp.is_none() && q.is_one() && leads(s, *a) => Some((*a, k.clone(), m)),
            _ => None,
        });
        if let Some((a, k, own)) = alone
            && terms.keys().all(|m| m.exp.is_none() && (m == own || !occurs(s, m, a)))
        {
            found.push((o.body, a, k));
        }
    }
    for o in sums {
        let factors: BTreeSet<AtomId> =
            s.poly(o.body).terms.keys().flat_map(|m| m.factors.iter().map(|(a, _)| *a)).collect();
        for a in factors.into_iter().filter(|a| leads(s, *a)).collect::<Vec<_>>() {
            found.push((s.power_of_atom(a, Rat::ONE), a, Rat::ONE));
        }
    }
    let mut out: Vec<Candidate> = Vec::new();
    for (value, lead, coefficient) in found {
        if !out.iter().any(|k| k.value == value) && is_cheap(s, value, inputs) {
            out.push(Candidate { value, lead, coefficient, dims: dims(s, value, lead, element) });
        }
    }
    out
}

/// Whether a value is one of inputs alone, so that an element of it can be had apart from the stream.
fn is_cheap(s: &Symbols, p: PolyId, inputs: &BTreeSet<TensorId>) -> bool {
    let mut cheap = true;
    s.visit(p, &mut |a| {
        cheap &= match s.atom(a) {
            Atom::Read(t, _) => inputs.contains(t),
            Atom::Var(_) | Atom::Extent(_) | Atom::Cast(..) | Atom::Unary(..) | Atom::Base(_) => true,
            Atom::Log(_)
            | Atom::Binary(..)
            | Atom::FloorDiv(..)
            | Atom::Select(..)
            | Atom::Reduce { .. }
            | Atom::Scan(..)
            | Atom::Segment(..)
            | Atom::Rand(..)
            | Atom::Infinity
            | Atom::Nan
            | Atom::Scale(_)
            | Atom::ScaleLog(_)
            | Atom::Slot(_) => false,
        };
        cheap
    });
    cheap
}

/// Whether `a` is in a product, at any depth.
fn occurs(s: &Symbols, m: &Mono, a: AtomId) -> bool {
    let mut found = false;
    let mut look = |b: AtomId| {
        found |= a == b;
        !found
    };
    for (f, _) in &m.factors {
        s.visit_atom(*f, &mut look);
    }
    if let Some(e) = m.exp {
        s.visit(e, &mut look);
    }
    found
}

/// A value's variables as the lead is laid out, or the element's last.
fn dims(s: &Symbols, value: PolyId, lead: AtomId, element: &Var) -> Vec<Var> {
    let all = s.vars(value);
    if let Atom::Read(_, at) = s.atom(lead) {
        let plain: Vec<Var> = at.iter().filter_map(|p| s.as_var(*p)).collect();
        if plain.len() == at.len()
            && plain.len() == all.len()
            && plain.iter().collect::<BTreeSet<_>>().len() == all.len()
        {
            return plain;
        }
    }
    all.iter().filter(|v| *v != element).chain([element]).cloned().collect()
}

/// The finals in terms of T' = T − a; none unless a leaves some final. A final that a does not leave is rewritten only
/// where a is an offset of it and it is none of the results.
fn rewritten(
    x: &mut Inlined,
    (finals, results): (&[TensorId], &BTreeSet<TensorId>),
    sums: &[Opened],
    k: &Candidate,
    element: &Var,
    (anchor, centred): (TensorId, TensorId),
) -> Option<Rewritten> {
    let s = &mut x.symbols;
    let mut read = |t: TensorId, with: bool| {
        let vars: Vec<&Var> = k.dims.iter().filter(|v| with || *v != element).collect();
        let at = vars.into_iter().map(|v| s.of_atom(Atom::Var(v.clone()))).collect();
        s.intern_atom(Atom::Read(t, at))
    };
    let (a, moved) = (read(anchor, false), read(centred, true));
    // lead = (T' + a − others) / coefficient.
    let own = s.power_of_atom(k.lead, Rat::ONE);
    let own = s.scale(own, &k.coefficient);
    let others = s.sub(k.value, own);
    let (moved, offset) = (s.power_of_atom(moved, Rat::ONE), s.power_of_atom(a, Rat::ONE));
    let lead = s.add(moved, offset);
    let lead = s.sub(lead, others);
    let lead = s.scale(lead, &(Rat::ONE / k.coefficient.clone()));
    let mut forms: BTreeMap<AtomId, PolyId> = BTreeMap::new();
    let mut filter: Option<Vec<PolyId>> = None;
    let mut degree = Rat::ZERO;
    for o in sums {
        let terms = s.poly(o.body).terms.clone();
        let powers = |m: &Mono| m.factors.iter().find(|(b, _)| *b == k.lead).map(|(_, q)| q.clone());
        let polynomial = terms.keys().all(|m| {
            let rest = Mono { exp: m.exp, factors: m.factors.iter().filter(|f| f.0 != k.lead).cloned().collect() };
            powers(m).is_none_or(|q| q.is_int() && q > Rat::ZERO) && !occurs(s, &rest, k.lead)
        });
        if !polynomial || !terms.keys().any(|m| powers(m).is_some()) {
            continue;
        }
        // One element stands for all sums: they must range over the same points.
        if filter.as_ref().is_some_and(|f| *f != o.filter) {
            return None;
        }
        filter = Some(o.filter.clone());
        degree = terms.keys().filter_map(powers).fold(degree, Rat::max);
        let body = s.rewrite(o.body, &mut |s, b| Some(if b == k.lead { lead } else { s.power_of_atom(b, Rat::ONE) }));
        let mut parts: BTreeMap<Rat, PolyId> = BTreeMap::new();
        for (mut m, c) in s.poly(body).terms.clone() {
            let power = m.factors.iter().position(|(b, _)| *b == a).map_or(Rat::ZERO, |at| m.factors.remove(at).1);
            let t = s.term(c, m);
            let zero = s.integer(0);
            let sum = parts.get(&power).copied().unwrap_or(zero);
            parts.insert(power, s.add(sum, t));
        }
        let mut value = s.integer(0);
        for (power, part) in parts {
            let op = Reducer::Op(ReduceOp::Sum);
            let sum = separation::reduce(s, op, 0, std::slice::from_ref(element), o.filter.clone(), vec![part]).value;
            let scale = s.power_of_atom(a, power.clone());
            let scale = if power.is_zero() { s.integer(1) } else { scale };
            let t = s.mul(scale, sum);
            value = s.add(value, t);
        }
        forms.insert(o.atom, value);
    }
    let filter = filter?;
    let fits = |p: &PolyId| s.vars(*p).iter().all(|v| k.dims.contains(v));
    if !filter.iter().all(fits) {
        return None;
    }
    let (mut gained, mut values) = (false, Vec::new());
    for t in finals {
        let old = x.tensors[t].value;
        let new = s.rewrite(old, &mut |s, b| match forms.get(&b) {
            Some(v) => Some(*v),
            None if matches!(s.atom(b), Atom::Reduce { .. }) => Some(s.power_of_atom(b, Rat::ONE)),
            None => None,
        });
        let (mut present, mut offsets) = (false, true);
        for m in s.poly(new).terms.keys() {
            let rest = Mono { exp: m.exp, factors: m.factors.iter().filter(|f| f.0 != a).cloned().collect() };
            let outside = m.factors.iter().find(|f| f.0 == a);
            present |= outside.is_some() || occurs(s, &rest, a);
            offsets &= outside.is_none_or(|f| f.1.is_one()) && !occurs(s, &rest, a);
        }
        gained |= new != old && !present;
        if new != old && (!present || offsets && !results.contains(t)) {
            values.push((*t, new));
        }
    }
    gained.then_some(Rewritten { filter, degree, values })
}

/// The statements that centre a tensor.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The mean of a group of elements.
    Mean(i64),
    Anchor,
    Centred,
}

/// Appends `a[..]`, the median of T at the rank's first points that are summed and finite (the first of them, or 0, for others), and
/// `T'[..] = T − a`.
#[allow(clippy::too_many_arguments)]
fn statements(
    c: &mut Cascade,
    x: &mut Inlined,
    readable: &BTreeMap<TensorId, Definition>,
    finals: &[TensorId],
    k: &Candidate,
    Rewritten { filter, degree, .. }: &Rewritten,
    element: &Var,
    (anchor, centred): (TensorId, TensorId),
) -> Option<()> {
    let wide = finals.iter().any(|f| c.tensors[*f].dtype == DType::F64);
    let dtype = if wide { DType::F64 } else { DType::F32 };
    let text: Vec<(Var, String)> = finals
        .iter()
        .flat_map(|t| x.tensors[t].free.iter().map(|(i, v)| (v.clone(), c.indices[*i].name.clone())))
        .chain(
            c.indices
                .iter()
                .find(|(_, i)| i.kind == IndexKind::Reduced && i.extent == *element.extent())
                .map(|(_, i)| (element.clone(), i.name.clone())),
        )
        .collect();
    let at = c.stmts.iter().position(|stmt| super::ends(c, stmt).0.iter().any(|t| finals.contains(t)))?;
    let mut em = Emitter::new(c, &mut x.symbols, readable);
    em.names.extend(text);
    let extents = |with: bool| -> Vec<Size> {
        k.dims.iter().filter(|v| with || *v != element).map(|v| v.extent().clone()).collect()
    };
    let (row, whole) = (extents(false), extents(true));
    let base = match em.s.atom(k.lead) {
        Atom::Read(t, _) => em.c.tensors[*t].name.clone(),
        _ => "value".into(),
    };
    let kind = TensorKind::Intermediate;
    assert_eq!(em.tensor(&format!("{base}_first"), row, kind, dtype), anchor);
    assert_eq!(em.tensor(&format!("{base}_centred"), whole, kind, dtype), centred);
    let mut made = Vec::new();
    // Means that the anchor is the median of, each a tensor of its own; then the anchor; then T'.
    let each = if *degree > Rat::from(2) { NEAR } else { 1 };
    let groups = 0..if each > 1 { GROUPS } else { 0 };
    let parts = groups.map(Part::Mean).chain([Part::Anchor, Part::Centred]);
    let mut means: Vec<TensorId> = Vec::new();
    for part in parts {
        let mut scope = Scope { indices: BTreeMap::new(), holds: BTreeSet::new(), slots: BTreeMap::new() };
        let mut free = Vec::new();
        for v in k.dims.iter().filter(|v| part == Part::Centred || *v != element) {
            let i = em.index(v, IndexKind::Free, &scope.indices);
            scope.indices.insert(v.clone(), i);
            free.push(i);
        }
        let row: Vec<IndexId> = free.iter().copied().filter(|i| scope.indices.get(element) != Some(i)).collect();
        let read = |em: &mut Emitter<'_>, tensor: TensorId| {
            let at = row.iter().map(|i| em.push(Expr::Index(*i))).collect();
            em.push(Expr::Read { tensor, at })
        };
        let (target, value) = match part {
            Part::Mean(group) => {
                let points = group * each..(group + 1) * each;
                let near =
                    points.map(|n| counted(&mut em, k, filter, element, n, &mut scope)).collect::<Option<Vec<_>>>()?;
                let (some, value) = mean(&mut em, &near);
                let other = match means.first() {
                    Some(first) => read(&mut em, *first),
                    None => em.float(0.0),
                };
                let tensor = em.tensor(&format!("{base}_near"), extents(false), kind, dtype);
                means.push(tensor);
                (tensor, em.push(Expr::Select(some, value, other)))
            }
            Part::Anchor => {
                let mut values: Vec<ExprId> = means.iter().map(|t| read(&mut em, *t)).collect();
                for point in values.len() as i64..GROUPS {
                    let (usable, value) = counted(&mut em, k, filter, element, point, &mut scope)?;
                    let other = values.first().copied().unwrap_or_else(|| em.float(0.0));
                    values.push(em.push(Expr::Select(usable, value, other)));
                }
                (anchor, median(&mut em, &values))
            }
            Part::Centred => {
                let value = em.poly(k.value, &mut scope).ok()?;
                let a = read(&mut em, anchor);
                (centred, em.binary(BinaryOp::Sub, value, a))
            }
        };
        let at = free.iter().map(|i| em.push(Expr::Index(*i))).collect();
        let targets = vec![Target { tensor: target, at }];
        made.push(Stmt::Einsum(Einsum {
            targets,
            value,
            filter: None,
            otherwise: None,
            join: None,
            free,
            span: Span::default(),
        }));
    }
    if !em.produced.is_empty() {
        return None;
    }
    c.stmts.splice(at..at, made);
    Some(())
}

/// Whether T at a point of the rank is there, is summed and finite; and its value.
fn counted(
    em: &mut Emitter<'_>,
    k: &Candidate,
    filter: &[PolyId],
    element: &Var,
    point: i64,
    scope: &mut Scope,
) -> Option<(ExprId, ExprId)> {
    let n = em.s.integer(point);
    let here = BTreeMap::from([(element.clone(), n)]);
    let value = em.s.substitute(k.value, &here);
    let value = em.poly(value, scope).ok()?;
    let filter: Vec<PolyId> = filter.iter().map(|p| em.s.substitute(*p, &here)).collect();
    let (size, infinite) = (em.unary(UnaryOp::Abs, value), em.float(f64::INFINITY));
    let mut usable = em.binary(BinaryOp::Lt, size, infinite);
    if let Some(held) = em.conjunction(&filter, scope).ok()? {
        usable = em.binary(BinaryOp::And, held, usable);
    }
    if point > 0 {
        let (n, extent) = (em.push(Expr::Int(point)), em.push(Expr::Size(element.extent().clone())));
        let exists = em.binary(BinaryOp::Lt, n, extent);
        usable = em.binary(BinaryOp::And, exists, usable);
    }
    Some((usable, value))
}

/// Whether any of some elements counts, and the mean of those that do.
fn mean(em: &mut Emitter<'_>, near: &[(ExprId, ExprId)]) -> (ExprId, ExprId) {
    let mut sum = |of: &dyn Fn(&mut Emitter<'_>, ExprId) -> ExprId| {
        let mut out = None;
        for (usable, value) in near {
            let (x, zero) = (of(em, *value), em.float(0.0));
            let x = em.push(Expr::Select(*usable, x, zero));
            out = Some(out.map_or(x, |sum| em.binary(BinaryOp::Add, sum, x)));
        }
        out.expect("one element or more")
    };
    let total = sum(&|_, value| value);
    let count = sum(&|em, _| em.float(1.0));
    let (one, zero) = (em.float(1.0), em.float(0.0));
    let some = em.binary(BinaryOp::Lt, zero, count);
    let count = em.binary(BinaryOp::Max, count, one);
    (some, em.binary(BinaryOp::Div, total, count))
}

/// The median of three values.
fn median(em: &mut Emitter<'_>, values: &[ExprId]) -> ExprId {
    let (low, high) = (em.binary(BinaryOp::Min, values[0], values[1]), em.binary(BinaryOp::Max, values[0], values[1]));
    let high = em.binary(BinaryOp::Min, high, values[2]);
    em.binary(BinaryOp::Max, low, high)
}
