//! Planted faults: wrong versions of a program that a computed tolerance must reject.
//!
//! Each level plants its own faults by implementing [`Plant`]; results are corrupted by [`corruptions`]. Invariant: a
//! mutant is a well-formed program of the same signature that differs from the original in one place.

use std::collections::HashMap;

use crate::arena::{Arena, Id};
use crate::cascade::{Cascade, Einsum, Expr, ExprId, IndexId, Reducer, Size, Stmt};
use crate::diag::Span;
use crate::ops::{BinaryOp, ReduceOp};

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// A reduction misses one element.
    DroppedElement,
    /// A reduction misses a tile.
    DroppedTile,
    /// A comparison of a filter includes or excludes its boundary wrongly.
    FilterOffByOne,
    /// An operand's tile is the previous one.
    StaleTile,
    /// A factor is left out of a product: a rescaling, a normalisation.
    SkippedFactor,
    /// A barrier, a wait or a fence is missing; planted below the cascade level.
    MissingSynchronisation,
    /// Two elements of a row change places as if a swizzle bit were wrong.
    WrongSwizzle,
    /// A row holds its predecessor's values.
    StaleRow,
    /// Elements were never written.
    MissingStore,
}

/// A wrong version of a program.
#[derive(Clone, Debug)]
pub struct Mutant<T> {
    /// What is wrong.
    pub fault: Fault,
    /// Where: the tensor or statement, for messages.
    pub place: String,
    /// The least extent at which the fault can show, and the extent: a stale tile needs a second tile.
    pub needs: Option<(Size, u64)>,
    /// The wrong program.
    pub program: T,
}

/// A program that faults can be planted in.
pub trait Plant: Sized {
    /// Every mutant, with tiles of `tile` elements.
    fn mutants(&self, tile: u64) -> Vec<Mutant<Self>>;
}

/// What one edit does when the cascade is copied expression by expression: it sees the copied node and returns its
/// replacement.
type Edit<'a> = dyn FnMut(&mut Cascade, Expr, Span) -> ExprId + 'a;

/// A copy of `c` in which expression `at` is replaced by what `edit` makes of it.
fn rewritten(c: &Cascade, at: ExprId, edit: &mut Edit<'_>) -> Cascade {
    let mut out = Cascade { exprs: Arena::new(), spans: Vec::new(), ..c.clone() };
    let mut map: Vec<ExprId> = Vec::with_capacity(c.exprs.len());
    for (id, e) in c.exprs.iter() {
        let copy = renamed(e, &|x| map[x.index()]);
        let span = c.spans[id.index()];
        let new = if id == at { edit(&mut out, copy, span) } else { out.push_expr(copy, span) };
        map.push(new);
    }
    let f = |x: &mut ExprId| *x = map[x.index()];
    let einsum = |e: &mut Einsum| {
        f(&mut e.value);
        e.filter.iter_mut().for_each(f);
        e.otherwise.iter_mut().for_each(f);
        e.targets.iter_mut().flat_map(|t| &mut t.at).for_each(f);
    };
    for s in &mut out.stmts {
        match s {
            Stmt::Einsum(e) => einsum(e),
            Stmt::Iter(i) => i.inits.iter_mut().chain(&mut i.body).for_each(einsum),
        }
    }
    out.requires.iter_mut().for_each(f);
    out.tensors.iter_mut().for_each(|(_, t)| t.default.iter_mut().for_each(f));
    out
}

/// `e` with its operands renamed.
fn renamed(e: &Expr, f: &impl Fn(ExprId) -> ExprId) -> Expr {
    let all = |v: &[ExprId]| v.iter().map(|x| f(*x)).collect();
    match e {
        Expr::Int(_) | Expr::Float(_) | Expr::Size(_) | Expr::Index(_) | Expr::Segment { .. } => e.clone(),
        Expr::Read { tensor, at } => Expr::Read { tensor: *tensor, at: all(at) },
        Expr::Unary(op, a) => Expr::Unary(*op, f(*a)),
        Expr::Cast(d, a) => Expr::Cast(*d, f(*a)),
        Expr::Binary(op, a, b) => Expr::Binary(*op, f(*a), f(*b)),
        Expr::Select(p, a, b) => Expr::Select(f(*p), f(*a), f(*b)),
        Expr::Tuple(items) => Expr::Tuple(all(items)),
        Expr::Reduce { op, over, body } => Expr::Reduce { op: *op, over: over.clone(), body: f(*body) },
        Expr::Scan { op, over, body } => Expr::Scan { op: *op, over: *over, body: f(*body) },
        Expr::Rand { seed, coords } => Expr::Rand { seed: f(*seed), coords: all(coords) },
    }
}

/// A small expression builder at one place.
struct Build<'a> {
    c: &'a mut Cascade,
    span: Span,
}

impl Build<'_> {
    fn push(&mut self, e: Expr) -> ExprId {
        self.c.push_expr(e, self.span)
    }
    fn binary(&mut self, op: BinaryOp, a: ExprId, b: ExprId) -> ExprId {
        self.push(Expr::Binary(op, a, b))
    }
    fn int(&mut self, i: i64) -> ExprId {
        self.push(Expr::Int(i))
    }
    /// The tile that index `i` lies in.
    fn tile_of(&mut self, i: IndexId, tile: u64) -> ExprId {
        let (i, t) = (self.push(Expr::Index(i)), self.int(tile as i64));
        self.binary(BinaryOp::Div, i, t)
    }
    /// Half the extent of `i`.
    fn middle(&mut self, i: IndexId) -> ExprId {
        let extent = self.c.indices[i].extent.clone();
        self.push(Expr::Size(Size::Div(Box::new(extent), Box::new(Size::Const(2)))))
    }
}

impl Plant for Cascade {
    fn mutants(&self, tile: u64) -> Vec<Mutant<Cascade>> {
        let mut out = Vec::new();
        for e in self.einsums() {
            let name = |what: &str| {
                let targets: Vec<&str> = e.targets.iter().map(|t| self.tensors[t.tensor].name.as_str()).collect();
                format!("{what} of {}", targets.join(", "))
            };
            let mut seen: HashMap<ExprId, ()> = HashMap::new();
            let mut places = Vec::new();
            self.walk(e.value, &mut |id, x| {
                if seen.insert(id, ()).is_none() {
                    places.push((id, x.clone()));
                }
            });
            for (id, x) in places {
                match &x {
                    Expr::Reduce { op, over, body } => {
                        let Some(i) = over.last().copied() else { continue };
                        if let Some(nothing) = neutral(*op) {
                            for fault in [Fault::DroppedElement, Fault::DroppedTile] {
                                let t = if fault == Fault::DroppedElement { 1 } else { tile };
                                let program = rewritten(self, id, &mut |c, x, span| without(c, x, span, i, t, nothing));
                                let needs = Some((self.indices[i].extent.clone(), 1));
                                out.push(Mutant { fault, place: name("a reduction"), needs, program });
                            }
                        }
                        self.walk(*body, &mut |read, r| {
                            if let Expr::Read { tensor, at } = r
                                && at.iter().any(|p| matches!(self.exprs[*p], Expr::Index(j) if j == i))
                            {
                                let program = rewritten(self, read, &mut |c, r, span| stale(c, r, span, i, tile));
                                let place = name(&format!("the read of {} in a reduction", self.tensors[*tensor].name));
                                let needs = Some((self.indices[i].extent.clone(), tile + 1));
                                out.push(Mutant { fault: Fault::StaleTile, place, needs, program });
                            }
                        });
                    }
                    Expr::Binary(BinaryOp::Mul, a, b) => {
                        for kept in [a, b] {
                            let kept = *kept == *a;
                            let program = rewritten(self, id, &mut |c, x, span| match x {
                                Expr::Binary(_, a, b) => {
                                    if kept {
                                        a
                                    } else {
                                        b
                                    }
                                }
                                other => c.push_expr(other, span),
                            });
                            out.push(Mutant {
                                fault: Fault::SkippedFactor,
                                place: name("a product"),
                                needs: None,
                                program,
                            });
                        }
                    }
                    Expr::Int(_)
                    | Expr::Float(_)
                    | Expr::Size(_)
                    | Expr::Index(_)
                    | Expr::Read { .. }
                    | Expr::Unary(..)
                    | Expr::Binary(..)
                    | Expr::Select(..)
                    | Expr::Cast(..)
                    | Expr::Tuple(_)
                    | Expr::Scan { .. }
                    | Expr::Segment { .. }
                    | Expr::Rand { .. } => {}
                }
            }
            let Some(filter) = e.filter else { continue };
            self.walk(filter, &mut |id, x| {
                if let Expr::Binary(op, ..) = x
                    && let Some(wrong) = boundary(*op)
                {
                    let program = rewritten(self, id, &mut |c, x, span| match x {
                        Expr::Binary(_, a, b) => c.push_expr(Expr::Binary(wrong, a, b), span),
                        other => c.push_expr(other, span),
                    });
                    out.push(Mutant { fault: Fault::FilterOffByOne, place: name("the filter"), needs: None, program });
                }
            });
        }
        out
    }
}

/// A value whose joining changes nothing.
fn neutral(op: Reducer) -> Option<f64> {
    match op {
        Reducer::Op(ReduceOp::ArgMin) => Some(f64::INFINITY),
        Reducer::Op(ReduceOp::ArgMax) | Reducer::TopK { .. } => Some(f64::NEG_INFINITY),
        Reducer::Op(op) => Some(op.identity()),
        Reducer::User(_) => None,
    }
}

/// The comparison that treats its boundary the other way.
fn boundary(op: BinaryOp) -> Option<BinaryOp> {
    use BinaryOp::*;
    match op {
        Lt => Some(Le),
        Le => Some(Lt),
        Gt => Some(Ge),
        Ge => Some(Gt),
        Add | Sub | Mul | Div | Mod | Pow | Min | Max | Eq | Ne | And | Or => None,
    }
}

/// The reduction `x` without the tile in the middle of `i`.
fn without(c: &mut Cascade, x: Expr, span: Span, i: IndexId, tile: u64, nothing: f64) -> ExprId {
    let Expr::Reduce { op, over, body } = x else { return c.push_expr(x, span) };
    let mut k = Build { c, span };
    let (here, middle, t) = (k.tile_of(i, tile), k.middle(i), k.int(tile as i64));
    let gone = k.binary(BinaryOp::Div, middle, t);
    let dropped = k.binary(BinaryOp::Eq, here, gone);
    let nothing = k.push(Expr::Float(nothing));
    let body = k.push(Expr::Select(dropped, nothing, body));
    k.push(Expr::Reduce { op, over, body })
}

/// The read `x`, which in the second tile of `i` sees the first.
fn stale(c: &mut Cascade, x: Expr, span: Span, i: IndexId, tile: u64) -> ExprId {
    let Expr::Read { tensor, mut at } = x else { return c.push_expr(x, span) };
    let mut k = Build { c, span };
    for p in &mut at {
        if matches!(k.c.exprs[*p], Expr::Index(j) if j == i) {
            let (here, one, t) = (k.tile_of(i, tile), k.int(1), k.int(tile as i64));
            let second = k.binary(BinaryOp::Eq, here, one);
            let before = k.binary(BinaryOp::Sub, *p, t);
            *p = k.push(Expr::Select(second, before, *p));
        }
    }
    k.push(Expr::Read { tensor, at })
}

/// Wrong versions of a result of extents `dims`: elements of a row swapped by one bit of their position, a row that
/// repeats its predecessor, elements that keep `poison`. Versions that happen to equal the result are left out.
pub fn corruptions(dims: &[u64], data: &[f64], poison: f64) -> Vec<(Fault, Vec<f64>)> {
    let row = dims.last().copied().unwrap_or(1) as usize;
    let mut out = Vec::new();
    let mut bit = 1;
    while bit < row {
        let mut wrong = data.to_vec();
        for r in wrong.chunks_mut(row) {
            for j in (0..row).filter(|j| j & bit == 0 && j | bit < row) {
                r.swap(j, j | bit);
            }
        }
        out.push((Fault::WrongSwizzle, wrong));
        bit *= 2;
    }
    if row > 0 && data.len() > row {
        let mut wrong = data.to_vec();
        let last = data.len() - row;
        wrong.copy_within(last - row..last, last);
        out.push((Fault::StaleRow, wrong));
    }
    if !data.is_empty() {
        let mut wrong = data.to_vec();
        wrong[data.len() - 1] = poison;
        out.push((Fault::MissingStore, wrong));
    }
    out.retain(|(_, w)| w.iter().zip(data).any(|(x, y)| x != y && !(x.is_nan() && y.is_nan())));
    out
}
