//! The IR to the syntax tree, and so to text.
//!
//! Invariant: printing, parsing and printing again gives the same text, for cascades from any origin that verify.
//! Binders are written only where the parser would not find the same extent; indices of one statement that share a name,
//! or a name with a tensor, are numbered.

use std::collections::{HashMap, HashSet};

use super::affine::same_size;
use super::format::{einsum_text, expr_text, file_text};
use super::syntax::{self, ExprKind, Ident};
use super::types::{default_dtype, kinds};
use super::*;
use crate::ops::UnaryOp;

/// A module as text.
pub fn print(module: &Module) -> String {
    let mut items = Vec::new();
    let mut monoids: Vec<(Monoid, String)> = Vec::new();
    let mut taken: HashSet<String> = module.cascades.iter().map(|c| c.name.clone()).collect();
    for c in &module.cascades {
        let mut names = HashMap::new();
        for (id, m) in c.monoids.iter() {
            let same = |k: &Monoid| {
                k.name == m.name && k.fields == m.fields && k.identity == m.identity && k.combine == m.combine
            };
            let name = match monoids.iter().find(|(k, _)| same(k)) {
                Some((_, name)) => name.clone(),
                None => {
                    let name = fresh(&m.name, |n| taken.contains(n));
                    taken.insert(name.clone());
                    items.push(syntax::Item::Monoid(monoid(m, &name)));
                    monoids.push((m.clone(), name.clone()));
                    name
                }
            };
            names.insert(id, name);
        }
        items.push(syntax::Item::Cascade(cascade(c, names)));
    }
    file_text(&syntax::File { docs: module.docs.clone(), items })
}

/// One cascade as text.
///
/// ```
/// use einfall_ir::cascade::{parse, print::print_cascade};
///
/// let module = parse("cascade c[M](x: f32[M]) -> (y: f32[M]) { y[m] = (x[m]) }").expect("it is right");
/// let text = print_cascade(&module.cascades[0]);
/// assert!(text.contains("y[m] = x[m]"));
/// assert_eq!(print_cascade(&parse(&text).expect("what it prints parses").cascades[0]), text);
/// ```
pub fn print_cascade(c: &Cascade) -> String {
    print(&Module { docs: Vec::new(), cascades: vec![c.clone()] })
}

/// An extent as text.
pub fn size_text(c: &Cascade, s: &Size) -> String {
    super::format::tight_text(&size(c, s))
}

/// An expression as text, with indices under their own names.
pub fn expr_text_of(c: &Cascade, e: ExprId) -> String {
    expr_text(&Printer::new(c, HashMap::new()).expr(e))
}

/// A statement as one line of text.
pub fn einsum_text_of(c: &Cascade, e: &Einsum) -> String {
    let mut p = Printer::new(c, HashMap::new());
    // Every tensor but its own new ones has known extents.
    p.known = c.tensors.ids().collect();
    einsum_text(&p.einsum(e, None))
}

fn node(kind: ExprKind) -> syntax::Expr {
    syntax::Expr::new(kind, Span::default())
}

fn name(n: &str) -> syntax::Expr {
    node(ExprKind::Name(n.to_string()))
}

/// `base`, or `base` with the first number that is not taken.
fn fresh(base: &str, taken: impl Fn(&str) -> bool) -> String {
    if !taken(base) {
        return base.to_string();
    }
    (2..).map(|k| format!("{base}_{k}")).find(|n| !taken(n)).unwrap_or_default()
}

fn size(c: &Cascade, s: &Size) -> syntax::Expr {
    let two = |a: &Size, b: &Size| (Box::new(size(c, a)), Box::new(size(c, b)));
    let infix = |op, a, b| {
        let (a, b) = two(a, b);
        node(ExprKind::Binary(op, a, b))
    };
    let call = |f: &str, a, b| node(ExprKind::Call(Ident::new(f), vec![size(c, a), size(c, b)]));
    match s {
        Size::Const(n) => match i64::try_from(*n) {
            Ok(n) => node(ExprKind::Int(n)),
            Err(_) => name(&n.to_string()),
        },
        Size::Rank(r) => name(&c.ranks[*r].name),
        Size::Add(a, b) => infix(BinaryOp::Add, a, b),
        Size::Sub(a, b) => infix(BinaryOp::Sub, a, b),
        Size::Mul(a, b) => infix(BinaryOp::Mul, a, b),
        Size::Div(a, b) => infix(BinaryOp::Div, a, b),
        Size::CeilDiv(a, b) => call("ceildiv", a, b),
        Size::Min(a, b) => call("min", a, b),
        Size::Max(a, b) => call("max", a, b),
    }
}

fn monoid(m: &Monoid, as_name: &str) -> syntax::Monoid {
    fn expr(m: &Monoid, args: &(Ident, Ident), e: &MonoidExpr) -> syntax::Expr {
        let go = |e: &MonoidExpr| Box::new(expr(m, args, e));
        node(match e {
            MonoidExpr::Left(i) => ExprKind::Field(args.0.clone(), Ident::new(&m.fields[*i])),
            MonoidExpr::Right(i) => ExprKind::Field(args.1.clone(), Ident::new(&m.fields[*i])),
            MonoidExpr::Const(x) => ExprKind::Float(*x),
            MonoidExpr::Unary(op @ (UnaryOp::Neg | UnaryOp::Not), a) => ExprKind::Unary(*op, go(a)),
            MonoidExpr::Unary(op, a) => ExprKind::Call(Ident::new(op.name()), vec![*go(a)]),
            MonoidExpr::Binary(op, a, b) if op.infix() => ExprKind::Binary(*op, go(a), go(b)),
            MonoidExpr::Binary(op, a, b) => ExprKind::Call(Ident::new(op.name()), vec![*go(a), *go(b)]),
            MonoidExpr::Select(c, a, b) => ExprKind::Select(go(c), go(a), go(b)),
        })
    }
    let args = (Ident::new("a"), Ident::new("b"));
    syntax::Monoid {
        docs: Vec::new(),
        name: Ident::new(as_name),
        fields: m.fields.iter().map(Ident::new).collect(),
        identity: m.identity.iter().map(|x| node(ExprKind::Float(*x))).collect(),
        combine: m.combine.iter().map(|e| expr(m, &args, e)).collect(),
        args,
        span: Span::default(),
    }
}

fn tensor_type(c: &Cascade, dtype: crate::dtype::DType, dims: &[Size], storage: &Storage) -> syntax::TensorType {
    let dims = dims.iter().map(|d| size(c, d)).collect();
    syntax::TensorType { dtype, dims, storage: storage.clone(), span: Span::default() }
}

fn cascade(c: &Cascade, monoid_names: HashMap<MonoidId, String>) -> syntax::Cascade {
    let mut p = Printer::new(c, monoid_names);
    let ranks = c.ranks.iter().map(|(_, r)| (Ident::new(&r.name), r.fixed)).collect();
    let param = |id: &TensorId| {
        let t = &c.tensors[*id];
        syntax::Param {
            docs: t.docs.clone(),
            inout: t.kind == TensorKind::InOut,
            name: Ident::new(&t.name),
            ty: tensor_type(c, t.dtype, &t.dims, &t.storage),
            default: t.default.map(|e| p.expr(e)),
            span: Span::default(),
        }
    };
    let params = c.params.iter().map(param).collect();
    let output = |o: &Output| {
        let (storage, docs, slice) = match &o.source {
            OutputSource::Whole(t) => (c.tensors[*t].storage.clone(), c.tensors[*t].docs.clone(), None),
            OutputSource::Points { state, from, to } => {
                let t = &c.tensors[*state];
                let from = (*from != Size::Const(0)).then(|| size(c, from));
                let to = (*to != t.dims[0]).then(|| size(c, to));
                (Storage::default(), Vec::new(), Some((Ident::new(&t.name), syntax::Slice::Points(from, to))))
            }
            OutputSource::Point { state, at } => {
                let slice = syntax::Slice::Point(size(c, at));
                (Storage::default(), Vec::new(), Some((Ident::new(&c.tensors[*state].name), slice)))
            }
        };
        syntax::Output {
            docs,
            name: Ident::new(&o.name),
            ty: tensor_type(c, o.dtype, &o.dims, &storage),
            slice,
            span: Span::default(),
        }
    };
    let outputs = c.outputs.iter().map(output).collect();
    p.known.extend(&c.params);
    p.known.extend(c.outputs.iter().filter_map(|o| match o.source {
        OutputSource::Whole(t) => Some(t),
        OutputSource::Points { .. } | OutputSource::Point { .. } => None,
    }));
    let mut body = Vec::new();
    if !c.requires.is_empty() {
        let facts = c.requires.iter().map(|e| p.expr(*e)).collect();
        body.push(syntax::Stmt::Require(facts, Span::default()));
    }
    for s in &c.stmts {
        body.push(match s {
            Stmt::Einsum(e) => syntax::Stmt::Einsum(p.einsum(e, None)),
            Stmt::Iter(i) => syntax::Stmt::Iter(p.iter(i)),
        });
    }
    syntax::Cascade {
        docs: c.docs.clone(),
        exact: c.exact,
        name: Ident::new(&c.name),
        ranks,
        params,
        outputs,
        body,
        unreadable: Vec::new(),
        span: Span::default(),
        close: Span::default(),
    }
}

struct Printer<'a> {
    c: &'a Cascade,
    monoid_names: HashMap<MonoidId, String>,
    kinds: Vec<super::types::Kind>,
    /// Tensors whose extents the parser knows at this point.
    known: HashSet<TensorId>,
    /// Names given to the indices of the present statement.
    index_names: HashMap<IndexId, String>,
    /// Extents to write at the binders of the present statement.
    explicit: HashSet<IndexId>,
}

impl<'a> Printer<'a> {
    fn new(c: &'a Cascade, monoid_names: HashMap<MonoidId, String>) -> Self {
        Printer {
            c,
            monoid_names,
            kinds: kinds(c),
            known: HashSet::new(),
            index_names: HashMap::new(),
            explicit: HashSet::new(),
        }
    }

    fn index_name(&self, i: IndexId) -> &str {
        self.index_names.get(&i).map_or(self.c.indices[i].name.as_str(), String::as_str)
    }

    fn iter(&mut self, i: &Iter) -> syntax::Iter {
        let inits: Vec<_> = i.inits.iter().map(|e| self.einsum(e, Some((i, true)))).collect();
        let body: Vec<_> = i.body.iter().map(|e| self.einsum(e, Some((i, false)))).collect();
        syntax::Iter {
            index: Ident::new(self.fresh_index(i.index, &HashSet::new())),
            extent: size(self.c, &i.extent),
            rev: i.rev,
            body: inits.into_iter().chain(body).collect(),
            span: Span::default(),
            close: Span::default(),
        }
    }

    /// The index's name, numbered if a tensor or an index of `taken` has it.
    fn fresh_index(&self, i: IndexId, taken: &HashSet<String>) -> String {
        let base = &self.c.indices[i].name;
        fresh(base, |n| {
            taken.contains(n) || self.c.tensor(n).is_some() || self.c.rank(n).is_some() || parse::KEYWORDS.contains(&n)
        })
    }

    fn einsum(&mut self, e: &Einsum, block: Option<(&Iter, bool)>) -> syntax::Einsum {
        let c = self.c;
        // Every index of the statement, in order: iterated, free, then reduced.
        let mut order: Vec<IndexId> = block.iter().map(|(i, _)| i.index).chain(e.free.iter().copied()).collect();
        for root in e.roots() {
            c.walk(root, &mut |_, x| match x {
                Expr::Index(i) | Expr::Segment { of: i, .. } | Expr::Scan { over: i, .. } => order.push(*i),
                Expr::Reduce { over, .. } => order.extend(over),
                Expr::Int(_)
                | Expr::Float(_)
                | Expr::Size(_)
                | Expr::Read { .. }
                | Expr::Unary(..)
                | Expr::Binary(..)
                | Expr::Select(..)
                | Expr::Cast(..)
                | Expr::Tuple(_)
                | Expr::Rand { .. } => {}
            });
        }
        self.index_names.clear();
        let mut taken = HashSet::new();
        for i in order {
            if !self.index_names.contains_key(&i) {
                let n = self.fresh_index(i, &taken);
                taken.insert(n.clone());
                self.index_names.insert(i, n);
            }
        }
        self.explicit = self.unclear(e, block);
        let free_explicit: Vec<_> = e.free.iter().filter(|i| self.explicit.contains(*i)).collect();
        let binders = free_explicit.into_iter().map(|i| self.binder(*i)).collect();
        let init = block.is_some_and(|(_, init)| init);
        let mut targets = Vec::new();
        for (n, t) in e.targets.iter().enumerate() {
            let x = &c.tensors[t.tensor];
            let is_new = !self.known.contains(&t.tensor);
            let plain = default_dtype(c, &self.kinds, e.value, n, e.targets.len(), init);
            let typed = is_new && (x.declared || x.dtype != plain || x.storage != Storage::default());
            targets.push(syntax::Target {
                name: Ident::new(&x.name),
                at: t.at.iter().map(|a| self.expr(*a)).collect(),
                ty: typed.then(|| (x.dtype, x.storage.clone())),
                span: Span::default(),
            });
        }
        let first = &c.tensors[e.targets[0].tensor];
        let own_docs = matches!(first.kind, TensorKind::Intermediate | TensorKind::State)
            && !self.known.contains(&e.targets[0].tensor);
        let docs = if own_docs { first.docs.clone() } else { Vec::new() };
        let out = syntax::Einsum {
            docs,
            targets,
            binders,
            join: e.join,
            value: self.expr(e.value),
            filter: e.filter.map(|f| self.expr(f)),
            otherwise: e.otherwise.map(|o| self.expr(o)),
            span: Span::default(),
        };
        self.known.extend(e.targets.iter().map(|t| t.tensor));
        out
    }

    /// The indices whose extents the parser would not find: it looks where an index stands alone, then for the rank of
    /// its capital.
    fn unclear(&self, e: &Einsum, block: Option<(&Iter, bool)>) -> HashSet<IndexId> {
        let c = self.c;
        let mut alone: HashMap<IndexId, Vec<&Size>> = HashMap::new();
        let mut see = |t: TensorId, at: &[ExprId], is_target: bool| {
            if is_target && !self.known.contains(&t) {
                return;
            }
            let x = &c.tensors[t];
            let state = x.kind == TensorKind::State && block.is_some();
            for (k, (a, d)) in at.iter().zip(&x.dims).enumerate() {
                if let (Expr::Index(i), false) = (&c.exprs[*a], k == 0 && state) {
                    alone.entry(*i).or_default().push(d);
                }
            }
        };
        for t in &e.targets {
            see(t.tensor, &t.at, true);
        }
        for root in e.roots() {
            c.walk(root, &mut |_, x| {
                if let Expr::Read { tensor, at } = x {
                    see(*tensor, at, false);
                }
            });
        }
        let wrong = |(i, n): (&IndexId, &String)| {
            let index = &c.indices[*i];
            if index.kind == IndexKind::Iterated {
                return None;
            }
            let clear = match alone.get(i) {
                Some(dims) => dims.iter().all(|d| same_size(d, &index.extent)),
                None => c.rank(&n.to_ascii_uppercase()).is_some_and(|r| index.extent == Size::Rank(r)),
            };
            (!clear).then_some(*i)
        };
        self.index_names.iter().filter_map(wrong).collect()
    }

    fn binder(&self, i: IndexId) -> syntax::Binder {
        let extent = self.explicit.contains(&i).then(|| size(self.c, &self.c.indices[i].extent));
        syntax::Binder { index: Ident::new(self.index_name(i)), extent }
    }

    fn reducer(&self, op: Reducer) -> syntax::Reducer {
        match op {
            Reducer::Op(op) => syntax::Reducer::Op(op),
            Reducer::TopK { k } => syntax::Reducer::TopK(Box::new(node(ExprKind::Int(k as i64)))),
            Reducer::User(m) => {
                let own = || self.c.monoids[m].name.clone();
                syntax::Reducer::User(Ident::new(self.monoid_names.get(&m).cloned().unwrap_or_else(own)))
            }
        }
    }

    fn expr(&self, e: ExprId) -> syntax::Expr {
        let c = self.c;
        let go = |e: ExprId| Box::new(self.expr(e));
        let call =
            |f: &str, args: &[ExprId]| ExprKind::Call(Ident::new(f), args.iter().map(|a| self.expr(*a)).collect());
        node(match &c.exprs[e] {
            Expr::Int(n) => ExprKind::Int(*n),
            Expr::Float(x) => ExprKind::Float(*x),
            Expr::Size(s) => return size(c, s),
            Expr::Index(i) => ExprKind::Name(self.index_name(*i).to_string()),
            Expr::Read { tensor, at } if at.is_empty() => ExprKind::Name(c.tensors[*tensor].name.clone()),
            Expr::Read { tensor, at } => {
                ExprKind::Access(Ident::new(&c.tensors[*tensor].name), at.iter().map(|a| self.expr(*a)).collect())
            }
            Expr::Unary(op @ (UnaryOp::Neg | UnaryOp::Not), a) => ExprKind::Unary(*op, go(*a)),
            Expr::Unary(op, a) => call(op.name(), &[*a]),
            Expr::Binary(op, a, b) if op.infix() => ExprKind::Binary(*op, go(*a), go(*b)),
            Expr::Binary(op, a, b) => call(op.name(), &[*a, *b]),
            Expr::Select(k, a, b) => ExprKind::Select(go(*k), go(*a), go(*b)),
            Expr::Cast(d, a) => call(d.name(), &[*a]),
            Expr::Tuple(items) => ExprKind::Tuple(items.iter().map(|a| self.expr(*a)).collect()),
            Expr::Reduce { op, over, body } => ExprKind::Reduce {
                op: self.reducer(*op),
                scan: false,
                over: over.iter().map(|i| self.binder(*i)).collect(),
                body: go(*body),
            },
            Expr::Scan { op, over, body } => ExprKind::Reduce {
                op: self.reducer(*op),
                scan: true,
                over: vec![syntax::Binder { index: Ident::new(self.index_name(*over)), extent: None }],
                body: go(*body),
            },
            Expr::Segment { offsets, of } => {
                ExprKind::Call(Ident::new("segment"), vec![name(&c.tensors[*offsets].name), name(self.index_name(*of))])
            }
            Expr::Rand { seed, coords } => call("rand", &[&[*seed], coords.as_slice()].concat()),
        })
    }
}
