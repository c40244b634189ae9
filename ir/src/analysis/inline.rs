//! A cascade as canonical expressions: every tensor's value with its producers inlined, and every reduction written
//! in the text with the separation of its inlined body.
//!
//! Support is carried beside the value as a set of conjuncts and joins the filter of the reduction that consumes it.
//! Not inlined, and read as they are: inputs, states and other tensors of an iteration seen from outside it, scatters,
//! left-hand sides that are no mixed-radix form of their free indices. Invariant: values depend on what the text
//! means, not on how it is cut into statements.

use std::collections::{BTreeMap, BTreeSet};

use super::separation::{self, Separation};
use super::symbolic::{Atom, PolyId, Symbols, Var};
use crate::arena::Id;
use crate::cascade::{
    Cascade, Einsum, Expr, ExprId, IndexId, IndexKind, RankId, Reducer, Size, Stmt, TensorId, TensorKind,
};
use crate::dtype::DType;
use crate::ops::{BinaryOp, UnaryOp};

/// A tensor's value over its free indices.
#[derive(Clone, Debug)]
pub struct Definition {
    /// One variable per dimension of the left-hand side's free indices.
    pub free: Vec<(IndexId, Var)>,
    /// The left-hand side: one expression over those variables per dimension.
    pub at: Vec<PolyId>,
    /// The value.
    pub value: PolyId,
    /// Conjuncts of the support; empty when the tensor is whole.
    pub support: BTreeSet<PolyId>,
    /// Whether readers see through it.
    pub inlined: bool,
    /// Whether collisions are joined (a scatter).
    pub joined: bool,
}

/// A reduction written in the text.
#[derive(Clone, Debug)]
pub struct Site {
    /// The tensor its statement assigns.
    pub einsum: TensorId,
    /// Its expression node.
    pub expr: ExprId,
    /// Its operator.
    pub op: Reducer,
    /// The ranks it reduces.
    pub ranks: Vec<RankId>,
    /// The indices it binds, while open.
    pub temps: Vec<Var>,
    /// The inlined body before normalisation.
    pub body: PolyId,
    /// The inlined filter.
    pub filter: Vec<PolyId>,
    /// How the body depends on barriers over the reduced ranks.
    pub separation: Separation,
    /// Its value in normal form.
    pub value: PolyId,
    /// Sites whose bodies contain it, nearest last; empty at the top of its statement.
    pub depth: usize,
}

/// Factors of a value with all producers inlined beyond which readers take its tensor as it is. Cascades of one layer's
/// operation stay below half of it; whole layers do not.
pub const MAX_FACTORS: usize = 64;

/// The canonical form of a cascade.
#[derive(Clone)]
pub struct Inlined {
    /// The interning table.
    pub symbols: Symbols,
    /// Values of assigned tensors.
    pub tensors: BTreeMap<TensorId, Definition>,
    /// Reductions in textual order.
    pub sites: Vec<Site>,
    /// Tensors that are not inlined because their values exceed [`MAX_FACTORS`], with their factors. What is reduced
    /// behind them is in [`Symbols::hidden`].
    pub large: BTreeMap<TensorId, usize>,
}

/// Inlines a whole cascade.
pub fn inline(c: &Cascade) -> Inlined {
    let mut x = Inliner {
        c,
        s: Symbols::new(),
        tensors: BTreeMap::new(),
        sites: Vec::new(),
        depth: 0,
        pool: BTreeMap::new(),
        large: BTreeMap::new(),
    };
    x.facts();
    for stmt in &c.stmts {
        match stmt {
            Stmt::Einsum(e) => x.einsum(e, &BTreeMap::new(), true),
            Stmt::Iter(i) => {
                let v = x.s.fresh(i.extent.clone());
                let at = x.s.of_atom(Atom::Var(v));
                for e in &i.inits {
                    x.einsum(e, &BTreeMap::new(), false);
                }
                let step = BTreeMap::from([(i.index, at)]);
                let mut inside = Vec::new();
                for e in &i.body {
                    let state = e.targets.iter().any(|t| c.tensors[t.tensor].kind == TensorKind::State);
                    x.einsum(e, &step, !state);
                    inside.extend(e.targets.iter().map(|t| t.tensor));
                }
                // From outside, an iteration is what it produces.
                for t in inside {
                    if let Some(d) = x.tensors.get_mut(&t) {
                        d.inlined = false;
                    }
                }
            }
        }
    }
    Inlined { symbols: x.s, tensors: x.tensors, sites: x.sites, large: x.large }
}

struct Inliner<'a> {
    c: &'a Cascade,
    s: Symbols,
    tensors: BTreeMap<TensorId, Definition>,
    sites: Vec<Site>,
    depth: usize,
    /// Variables by range and count: statements share them, so that a read at the indices of the definition is the
    /// definition itself.
    pool: BTreeMap<(Size, usize), Var>,
    large: BTreeMap<TensorId, usize>,
}

/// What an expression is evaluated in.
struct Scope {
    env: BTreeMap<IndexId, PolyId>,
    filter: Vec<ExprId>,
    einsum: TensorId,
    /// Variables of the pool that are taken.
    used: Vec<Var>,
}

type Support = BTreeSet<PolyId>;

impl Inliner<'_> {
    /// `require x > 0` makes a parameter positive.
    fn facts(&mut self) {
        let c = self.c;
        let mut stack = c.requires.clone();
        while let Some(e) = stack.pop() {
            let Expr::Binary(op, a, b) = &c.exprs[e] else { continue };
            let (low, high) = match op {
                BinaryOp::And => {
                    stack.extend([*a, *b]);
                    continue;
                }
                BinaryOp::Gt | BinaryOp::Ge => (*b, *a),
                BinaryOp::Lt | BinaryOp::Le => (*a, *b),
                _ => continue,
            };
            let strict = matches!(op, BinaryOp::Gt | BinaryOp::Lt);
            let bound = match c.exprs[low] {
                Expr::Int(n) => n as f64,
                Expr::Float(x) => x,
                _ => continue,
            };
            if let Expr::Read { tensor, .. } = &c.exprs[high]
                && (bound > 0.0 || (strict && bound == 0.0))
            {
                self.s.positive.insert(*tensor);
            }
        }
    }

    /// The first variable over `extent` that `used` lacks.
    fn variable(&mut self, extent: &Size, used: &[Var]) -> Var {
        let mut k = 0;
        loop {
            let s = &mut self.s;
            let v = self.pool.entry((extent.clone(), k)).or_insert_with(|| s.fresh(extent.clone())).clone();
            if !used.contains(&v) {
                return v;
            }
            k += 1;
        }
    }

    fn einsum(&mut self, e: &Einsum, step: &BTreeMap<IndexId, PolyId>, inlined: bool) {
        let c = self.c;
        let mut env = step.clone();
        let mut free = Vec::new();
        let mut used = Vec::new();
        for &i in &e.free {
            if env.contains_key(&i) {
                continue;
            }
            let v = self.variable(&c.indices[i].extent, &used);
            used.push(v.clone());
            let x = self.s.of_atom(Atom::Var(v.clone()));
            env.insert(i, x);
            free.push((i, v));
        }
        for (&i, &x) in step {
            if let Some(v) = self.s.as_var(x) {
                free.push((i, v));
            }
        }
        let mut filter = Vec::new();
        if let Some(f) = e.filter {
            conjuncts(c, f, &mut filter);
        }
        for (part, target) in e.targets.iter().enumerate() {
            let used = used.clone();
            let mut scope = Scope { env: env.clone(), filter: filter.clone(), einsum: target.tensor, used };
            let mut support = Support::new();
            let mut value = self.value(e, part, &mut scope, &mut support);
            let outer: Vec<ExprId> = filter
                .iter()
                .copied()
                .filter(|f| indices_of(c, *f).iter().all(|i| c.indices[*i].kind != IndexKind::Reduced))
                .collect();
            for f in outer {
                let p = self.expr(f, &mut scope, &mut Support::new());
                support.insert(p);
            }
            support.retain(|p| self.s.constant(*p).is_none_or(|k| k.is_zero()));
            if let Some(o) = e.otherwise {
                let other = self.expr(o, &mut scope, &mut Support::new());
                let mut cond = self.s.integer(1);
                for p in &support {
                    cond = self.s.mul(cond, *p);
                }
                value = self.s.select(cond, value, other);
                support.clear();
            }
            let t = &c.tensors[target.tensor];
            // A declared narrow type is a rounding point; wide ones are not.
            let wide = matches!(t.dtype, DType::F32 | DType::F64 | DType::I32 | DType::I64 | DType::Bool);
            let returned = t.kind == TensorKind::Output;
            if !wide && (t.declared || returned) {
                value = self.s.of_atom(Atom::Cast(t.dtype, value));
            }
            let at: Vec<PolyId> = target.at.iter().map(|a| self.expr(*a, &mut scope, &mut Support::new())).collect();
            let joined = e.join.is_some();
            let inlined = inlined && !joined;
            let mut factors = 0;
            self.s.visit(value, &mut |_| {
                factors += 1;
                true
            });
            if inlined && factors > MAX_FACTORS {
                self.close(target.tensor, &at, value, &support);
                self.large.insert(target.tensor, factors);
            }
            self.tensors.insert(target.tensor, Definition { free: free.clone(), at, value, support, inlined, joined });
        }
    }

    /// Notes what is reduced behind a tensor that readers do not look into.
    fn close(&mut self, tensor: TensorId, at: &[PolyId], value: PolyId, support: &Support) {
        let mut inner = self.s.reductions(value);
        for p in support {
            inner.extend(self.s.reductions(*p));
        }
        let dims: Vec<BTreeSet<Var>> = at.iter().map(|p| self.s.vars(*p)).collect();
        let place = |(extents, vars): (Vec<Size>, BTreeSet<Var>)| {
            let varies = (0..dims.len()).filter(|d| !dims[*d].is_disjoint(&vars)).collect();
            (extents, varies)
        };
        self.s.hidden.insert(tensor, inner.into_iter().map(place).collect());
    }

    /// The right-hand side; for one of several targets, that component of the reduction.
    fn value(&mut self, e: &Einsum, part: usize, scope: &mut Scope, support: &mut Support) -> PolyId {
        match &self.c.exprs[e.value] {
            Expr::Reduce { op, over, body } if e.targets.len() > 1 || matches!(op, Reducer::TopK { .. }) => {
                let target = &e.targets[part];
                let position = match (op, target.at.last()) {
                    (Reducer::TopK { .. }, Some(&last)) => Some(self.expr(last, scope, &mut Support::new())),
                    _ => None,
                };
                self.reduce(e.value, *op, part as u32, over, *body, position, scope)
            }
            _ => self.expr(e.value, scope, support),
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn reduce(
        &mut self,
        node: ExprId,
        op: Reducer,
        part: u32,
        over: &[IndexId],
        body: ExprId,
        position: Option<PolyId>,
        scope: &mut Scope,
    ) -> PolyId {
        let c = self.c;
        let mut temps = Vec::new();
        for &i in over {
            let v = self.variable(&c.indices[i].extent, &scope.used);
            scope.used.push(v.clone());
            let x = self.s.of_atom(Atom::Var(v.clone()));
            scope.env.insert(i, x);
            temps.push(v);
        }
        let mut inner = Support::new();
        self.depth += 1;
        let bodies: Vec<PolyId> = match &c.exprs[body] {
            Expr::Tuple(items) => items.clone().into_iter().map(|x| self.expr(x, scope, &mut inner)).collect(),
            _ => vec![self.expr(body, scope, &mut inner)],
        };
        for f in scope.filter.clone() {
            let used = indices_of(c, f);
            let ours = used.iter().any(|i| over.contains(i));
            if ours && used.iter().all(|i| scope.env.contains_key(i)) {
                let p = self.expr(f, scope, &mut Support::new());
                inner.insert(p);
            }
        }
        self.depth -= 1;
        inner.retain(|p| self.s.constant(*p).is_none_or(|k| k.is_zero()));
        for i in over {
            scope.env.remove(i);
            scope.used.pop();
        }
        let filter: Vec<PolyId> = inner.into_iter().collect();
        let mut with_position = bodies.clone();
        with_position.extend(position);
        let r = separation::reduce(&mut self.s, op, part, &temps, filter.clone(), with_position);
        self.sites.push(Site {
            einsum: scope.einsum,
            expr: node,
            op,
            ranks: over.iter().filter_map(|i| c.indices[*i].rank).collect(),
            temps,
            body: bodies[0],
            filter,
            separation: r.separation,
            value: r.value,
            depth: self.depth,
        });
        r.value
    }

    fn expr(&mut self, e: ExprId, scope: &mut Scope, support: &mut Support) -> PolyId {
        let c = self.c;
        match &c.exprs[e] {
            Expr::Int(n) => self.s.integer(*n),
            Expr::Float(x) => self.s.float(*x),
            Expr::Size(n) => self.s.size(n),
            Expr::Index(i) => scope.env.get(i).copied().unwrap_or_else(|| {
                let v = Var::Free { id: u32::MAX - i.index() as u32, extent: c.indices[*i].extent.clone() };
                self.s.of_atom(Atom::Var(v))
            }),
            Expr::Read { tensor, at } => {
                let at: Vec<PolyId> = at.iter().map(|a| self.expr(*a, scope, &mut Support::new())).collect();
                self.read(*tensor, at, support)
            }
            Expr::Unary(op, a) => {
                let a = self.expr(*a, scope, support);
                self.s.unary(*op, a)
            }
            Expr::Binary(op, a, b) => {
                let integer = *op == BinaryOp::Div && is_integer(c, *a) && is_integer(c, *b);
                let (x, y) = (self.expr(*a, scope, support), self.expr(*b, scope, support));
                self.s.binary(*op, x, y, integer)
            }
            Expr::Select(k, a, b) => {
                // Only the chosen branch's support counts: branches of partial support stay where they are chosen.
                let k = self.expr(*k, scope, support);
                let (x, y) = (self.expr(*a, scope, support), self.expr(*b, scope, support));
                self.s.select(k, x, y)
            }
            Expr::Cast(d, a) => {
                let integer = is_integer(c, *a);
                let a = self.expr(*a, scope, support);
                match d {
                    DType::F32 | DType::F64 => a,
                    DType::I32 | DType::I64 if integer => a,
                    _ => self.s.of_atom(Atom::Cast(*d, a)),
                }
            }
            Expr::Tuple(items) => {
                let first = items[0];
                self.expr(first, scope, support)
            }
            Expr::Reduce { op, over, body } => self.reduce(e, *op, 0, over, *body, None, scope),
            Expr::Scan { op, over, body } => {
                let p = self.expr(*body, scope, support);
                match scope.env.get(over).and_then(|x| self.s.as_var(*x)) {
                    Some(v) => self.s.of_atom(Atom::Scan(*op, v, p)),
                    None => self.s.of_atom(Atom::Nan),
                }
            }
            Expr::Segment { offsets, of } => {
                let at = scope.env[of];
                self.s.of_atom(Atom::Segment(*offsets, at))
            }
            Expr::Rand { seed, coords } => {
                let seed = self.expr(*seed, scope, support);
                let coords = coords.iter().map(|x| self.expr(*x, scope, support)).collect();
                self.s.of_atom(Atom::Rand(seed, coords))
            }
        }
    }

    fn read(&mut self, tensor: TensorId, at: Vec<PolyId>, support: &mut Support) -> PolyId {
        if let Some(d) = self.tensors.get(&tensor).cloned()
            && d.inlined
            && let Some(map) = self.invert(&d, &at)
        {
            for p in &d.support {
                let p = self.s.substitute(*p, &map);
                support.insert(p);
            }
            if self.large.contains_key(&tensor) {
                return self.s.of_atom(Atom::Read(tensor, at));
            }
            return self.s.substitute(d.value, &map);
        }
        self.s.of_atom(Atom::Read(tensor, at))
    }

    /// Values of a definition's free variables at a read: each dimension is one variable, or `g*R + r` with r < R.
    fn invert(&mut self, d: &Definition, at: &[PolyId]) -> Option<BTreeMap<Var, PolyId>> {
        let mut map = BTreeMap::new();
        for (lhs, read) in d.at.iter().zip(at) {
            if let Some(v) = self.s.as_var(*lhs) {
                map.insert(v, *read);
                continue;
            }
            let mut rest = *read;
            let mut form = *lhs;
            // Least significant digit first: the variable whose coefficient is 1.
            loop {
                if let Some(v) = self.s.as_var(form) {
                    map.insert(v, rest);
                    break;
                }
                let digit = self.s.poly(form).terms.keys().find_map(|m| {
                    let one = m.factors.as_slice();
                    match (m.exp, one) {
                        (None, [(a, q)]) if q.is_one() => match self.s.atom(*a) {
                            Atom::Var(v) => Some(v.clone()),
                            _ => None,
                        },
                        _ => None,
                    }
                })?;
                let x = self.s.of_atom(Atom::Var(digit.clone()));
                let radix = self.s.size(digit.extent());
                let higher = self.s.sub(form, x);
                form = self.s.div(higher, radix);
                let (high, low) = self.digits(rest, radix, digit.extent());
                map.insert(digit, low);
                rest = high;
            }
        }
        (map.len() >= d.free.len()).then_some(map)
    }

    /// (x / radix, x % radix) of an integer expression; exact when x is visibly `h*radix + l` with l below it.
    fn digits(&mut self, x: PolyId, radix: PolyId, extent: &Size) -> (PolyId, PolyId) {
        let mut low = self.s.integer(0);
        for m in self.s.poly(x).terms.clone().into_keys() {
            let t = self.s.term(1.into(), m);
            if self.s.as_var(t).is_some_and(|v| v.extent() == extent) {
                low = t;
            }
        }
        let high = self.s.sub(x, low);
        let quotient = self.s.div(high, radix);
        let whole =
            self.s.poly(quotient).terms.keys().all(|m| m.factors.iter().all(|(_, q)| *q > super::symbolic::Rat::ZERO));
        if whole {
            return (quotient, low);
        }
        let high = self.s.binary(BinaryOp::Div, x, radix, true);
        let low = self.s.binary(BinaryOp::Mod, x, radix, true);
        (high, low)
    }
}

/// The conjuncts of a predicate.
pub(crate) fn conjuncts(c: &Cascade, e: ExprId, out: &mut Vec<ExprId>) {
    match &c.exprs[e] {
        Expr::Binary(BinaryOp::And, a, b) => {
            conjuncts(c, *a, out);
            conjuncts(c, *b, out);
        }
        _ => out.push(e),
    }
}

/// Every index in an expression.
pub(crate) fn indices_of(c: &Cascade, e: ExprId) -> BTreeSet<IndexId> {
    let mut out = BTreeSet::new();
    c.walk(e, &mut |_, x| {
        if let Expr::Index(i) | Expr::Segment { of: i, .. } = x {
            out.insert(*i);
        }
    });
    out
}

/// Whether an expression is an integer.
pub(crate) fn is_integer(c: &Cascade, e: ExprId) -> bool {
    match &c.exprs[e] {
        Expr::Int(_) | Expr::Size(_) | Expr::Index(_) | Expr::Segment { .. } => true,
        Expr::Float(_) | Expr::Rand { .. } => false,
        Expr::Read { tensor, .. } => c.tensors[*tensor].dtype.is_int(),
        Expr::Cast(d, _) => d.is_int(),
        Expr::Unary(op, a) => matches!(op, UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Sign) && is_integer(c, *a),
        Expr::Binary(op, a, b) => !op.is_predicate() && *op != BinaryOp::Pow && is_integer(c, *a) && is_integer(c, *b),
        Expr::Select(_, a, b) => is_integer(c, *a) && is_integer(c, *b),
        Expr::Tuple(_) => false,
        Expr::Reduce { op, body, .. } | Expr::Scan { op, body, .. } => match op {
            Reducer::Op(o) => o.selects_argument() || is_integer(c, *body),
            Reducer::TopK { .. } | Reducer::User(_) => false,
        },
    }
}
