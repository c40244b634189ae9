//! Expressions: names to nodes, functions expanded, reductions to their indices.

use std::collections::HashMap;

use super::statement::Context;
use super::{Failed, Items, Resolver, closest, unary_from_name};
use crate::cascade::syntax::{self, ExprKind, Ident};
use crate::cascade::{Expr, ExprId, Monoid, MonoidExpr, MonoidId, Reducer, Size};
use crate::diag::{Diagnostic, Span};
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

/// Functions that are no operators.
const SPECIAL: [&str; 5] = ["rand", "segment", "ceildiv", "topk", "scan"];

/// Whether a name is taken by an operator, a type or a special function.
pub(super) fn is_builtin(name: &str) -> bool {
    SPECIAL.contains(&name)
        || DType::from_name(name).is_some()
        || UnaryOp::from_name(name).is_some()
        || BinaryOp::from_name(name).is_some()
        || ReduceOp::from_name(name).is_some()
        || name.strip_prefix("cum").and_then(ReduceOp::from_name).is_some()
}

/// A function of two arguments written as a call.
fn binary_call(name: &str) -> Option<BinaryOp> {
    BinaryOp::from_name(name).filter(|op| !op.infix())
}

fn arity(name: &str, want: usize, got: usize, span: Span) -> Diagnostic {
    let s = if want == 1 { "" } else { "s" };
    Diagnostic::error("E0220", span, format!("`{name}` takes {want} argument{s}, not {got}")).help(format!(
        "write `{name}({})`",
        (0..want).map(|i| ["a", "b", "c", "d"][i.min(3)]).collect::<Vec<_>>().join(", ")
    ))
}

impl Resolver<'_, '_> {
    pub(super) fn expr(&mut self, e: &syntax::Expr, cx: &mut Context<'_>) -> Result<ExprId, Failed> {
        let span = e.span;
        if self.overgrown {
            return Err(Failed);
        }
        match &e.kind {
            ExprKind::Int(n) => self.push(Expr::Int(*n), span),
            ExprKind::Float(x) => self.push(Expr::Float(*x), span),
            ExprKind::Bool(b) => {
                let n = self.push(Expr::Int(i64::from(*b)), span)?;
                self.push(Expr::Cast(DType::Bool, n), span)
            }
            ExprKind::Name(n) => self.named(n, span, cx),
            ExprKind::Field(a, f) => Err(self.error(
                Diagnostic::error("E0221", span, format!("`{}.{}` is not a value here", a.name, f.name))
                    .help("components are named only in a monoid's `combine`"),
            )),
            ExprKind::Access(name, at) => self.access(name, at, span, cx),
            ExprKind::Call(name, args) => self.call(name, args, span, cx),
            ExprKind::Unary(op, a) => {
                let a = self.expr(a, cx)?;
                self.push(Expr::Unary(*op, a), span)
            }
            ExprKind::Binary(op, a, b) => {
                let (x, y) = (self.expr(a, cx), self.expr(b, cx));
                let (x, y) = (x?, y?);
                self.push(Expr::Binary(*op, x, y), span)
            }
            ExprKind::Select(c, a, b) => {
                let (c, x, y) = (self.expr(c, cx), self.expr(a, cx), self.expr(b, cx));
                let (c, x, y) = (c?, x?, y?);
                self.push(Expr::Select(c, x, y), span)
            }
            ExprKind::Tuple(_) => {
                Err(self.error(Diagnostic::error("E0222", span, "a tuple is no value by itself").help(
                    "tuples are reduced by a monoid of several components: `(a[m], b[m]) = welford(k) (1, x[m,k])`",
                )))
            }
            ExprKind::Reduce { op, scan, over, body } => self.reduce(op, *scan, over, body, span, cx),
        }
    }

    fn named(&mut self, n: &str, span: Span, cx: &mut Context<'_>) -> Result<ExprId, Failed> {
        if let Some(args) = cx.args.last() {
            return match args.get(n) {
                Some(id) => Ok(*id),
                None => match self.rank_names.get(n) {
                    Some(r) => {
                        let r = *r;
                        self.push(Expr::Size(Size::Rank(r)), span)
                    }
                    None => Err(self.unknown_rank(n, span)),
                },
            };
        }
        if let Some(i) = cx.indices.get(n).copied() {
            if cx.reduced.contains(n) && !cx.scope.iter().any(|s| s == n) && !cx.in_filter {
                return Err(self.error(
                    Diagnostic::error("E0223", span, format!("index `{n}` is used outside the reduction that binds it"))
                        .help(format!("put this inside the reduction over `{n}`; a reduction extends as far right as its parentheses allow")),
                ));
            }
            return self.push(Expr::Index(i), span);
        }
        if let Some((offsets, of)) = self.segment_of(n, cx) {
            return self.push(Expr::Segment { offsets, of }, span);
        }
        if let Some(t) = self.by_name.get(n).copied() {
            let rank = self.c.tensors[t].dims.len();
            if rank != 0 {
                return Err(self.error(
                    Diagnostic::error(
                        "E0224",
                        span,
                        format!(
                            "`{n}` has {rank} dimension{} and is used without indices",
                            if rank == 1 { "" } else { "s" }
                        ),
                    )
                    .help(format!("write `{n}[{}]`", vec!["i"; rank].join(", "))),
                ));
            }
            self.must_be_assigned(t, span, cx)?;
            return self.push(Expr::Read { tensor: t, at: Vec::new() }, span);
        }
        if let Some(r) = self.rank_names.get(n).copied() {
            return self.push(Expr::Size(Size::Rank(r)), span);
        }
        if self.broken.contains(n) {
            return Err(Failed);
        }
        if cx.failed_indices.contains(n) {
            return Err(Failed);
        }
        Err(self.unknown_name(n, span, cx))
    }

    fn unknown_name(&mut self, n: &str, span: Span, cx: &mut Context<'_>) -> Failed {
        if cx.constant.is_none() && n.starts_with(|c: char| c.is_ascii_lowercase()) {
            // An index that something binds, but not the statement.
            cx.failed_indices.insert(n.to_string());
            let known = cx.alone.contains_key(n) || self.rank_names.contains_key(&n.to_ascii_uppercase());
            if cx.in_filter {
                return self.error(
                    Diagnostic::error(
                        "E0225",
                        span,
                        format!("the filter mentions `{n}`, which this statement does not bind"),
                    )
                    .help(format!(
                        "a filter speaks of the indices on the left and of reduced ones: reduce over `{n}` or remove it"
                    )),
                );
            }
            if known {
                return self.error(
                    Diagnostic::error(
                        "E0226",
                        span,
                        format!("index `{n}` is on the right only: a reduction is left implicit"),
                    )
                    .label("no reduction binds it")
                    .help(format!("name the reduction: `sum({n}) ..`, or put `{n}` on the left-hand side")),
                );
            }
        }
        if n.starts_with(|c: char| c.is_ascii_uppercase()) && self.tensor_names().is_empty() {
            return self.unknown_rank(n, span);
        }
        let mut known: Vec<String> = self.tensor_names();
        known.extend(self.c.ranks.iter().map(|(_, r)| r.name.clone()));
        known.extend(cx.indices.keys().cloned());
        known.sort();
        let d = Diagnostic::error("E0227", span, format!("nothing is named `{n}`"));
        let d = match closest(n, &known) {
            Some(near) => d.help(format!("write `{near}`")),
            None => {
                d.help("declare it as a parameter or a rank, assign it in an earlier statement, or bind it as an index")
            }
        };
        self.error(d)
    }

    fn tensor_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.by_name.keys().cloned().collect();
        names.sort();
        names
    }

    fn must_be_assigned(&mut self, t: crate::cascade::TensorId, span: Span, cx: &Context<'_>) -> Result<(), Failed> {
        if self.assigned.contains_key(&t) || cx.assigned_in_block.contains(&t) {
            return Ok(());
        }
        let name = self.c.tensors[t].name.clone();
        if self.broken.contains(&name) {
            return Err(Failed);
        }
        if cx.targets.contains(&name) {
            return Err(self.error(
                Diagnostic::error("E0228", span, format!("`{name}` is read by the statement that assigns it")).help(
                    "a tensor that feeds itself is a state: write it in `iter t in T { .. }` with points t and t+1",
                ),
            ));
        }
        Err(self.error(
            Diagnostic::error("E0229", span, format!("`{name}` is used before it is assigned"))
                .help("move the statement that assigns it above this one"),
        ))
    }

    pub(super) fn tensor_named(&mut self, name: &Ident, cx: &Context<'_>) -> Result<crate::cascade::TensorId, Failed> {
        if let Some(t) = self.by_name.get(&name.name).copied() {
            return Ok(t);
        }
        if self.broken.contains(&name.name) {
            return Err(Failed);
        }
        if cx.targets.contains(&name.name) {
            return Err(self.error(
                Diagnostic::error(
                    "E0228",
                    name.span,
                    format!("`{}` is read by the statement that assigns it", name.name),
                )
                .help("a tensor that feeds itself is a state: write it in `iter t in T { .. }` with points t and t+1"),
            ));
        }
        if cx.later.contains(&name.name) {
            return Err(self.error(
                Diagnostic::error("E0229", name.span, format!("`{}` is used before it is assigned", name.name))
                    .help("move the statement that assigns it above this one"),
            ));
        }
        let near = closest(&name.name, &self.tensor_names());
        let d = Diagnostic::error("E0230", name.span, format!("there is no tensor `{}`", name.name));
        Err(self.error(match near {
            Some(near) => d.help(format!("write `{near}`")),
            None => d.help("declare it as a parameter, or assign it in an earlier statement"),
        }))
    }

    fn access(
        &mut self,
        name: &Ident,
        at: &[syntax::Expr],
        span: Span,
        cx: &mut Context<'_>,
    ) -> Result<ExprId, Failed> {
        if !cx.args.is_empty() {
            return Err(Failed);
        }
        if let Some(what) = cx.constant {
            return Err(self.error(
                Diagnostic::error("E0231", span, format!("{what} reads no tensor elements"))
                    .help("use ranks and scalar parameters only"),
            ));
        }
        let tensor = self.tensor_named(name, cx)?;
        let rank = self.c.tensors[tensor].dims.len();
        if at.len() != rank {
            let decl = self.c.tensors[tensor].span;
            let dims: Vec<String> = self.c.tensors[tensor].dims.iter().map(|d| self.size_text(d)).collect();
            return Err(self.error(
                Diagnostic::error(
                    "E0232",
                    span,
                    format!(
                        "`{}` takes {rank} ind{}, not {}",
                        name.name,
                        if rank == 1 { "ex" } else { "ices" },
                        at.len()
                    ),
                )
                .also(decl, format!("declared here as [{}]", dims.join(", ")))
                .help(format!("write one index expression for each of [{}]", dims.join(", "))),
            ));
        }
        self.must_be_assigned(tensor, name.span, cx)?;
        let mut ids = Vec::new();
        for e in at {
            ids.push(self.expr(e, cx)?);
        }
        self.push(Expr::Read { tensor, at: ids }, span)
    }

    fn call(
        &mut self,
        name: &Ident,
        args: &[syntax::Expr],
        span: Span,
        cx: &mut Context<'_>,
    ) -> Result<ExprId, Failed> {
        let n = name.name.as_str();
        if n == "ceildiv" {
            let e = syntax::Expr::new(ExprKind::Call(name.clone(), args.to_vec()), span);
            let s = self.size(&e)?;
            return self.push(Expr::Size(s), span);
        }
        if n == "segment" {
            return self.segment_call(args, span, cx);
        }
        if self.items.recursive.contains(n) {
            return Err(Failed);
        }
        if let Some(f) = self.items.functions.get(n).copied() {
            if f.params.len() != args.len() {
                let d = arity(n, f.params.len(), args.len(), span).also(f.name.span, "defined here");
                return Err(self.error(d));
            }
            let mut env = HashMap::new();
            for (p, a) in f.params.iter().zip(args) {
                env.insert(p.name.clone(), self.expr(a, cx)?);
            }
            if cx.args.len() >= 64 {
                self.overgrown = true;
                return Err(self.error(
                    Diagnostic::error("E0233", span, "functions call each other too deeply")
                        .help("functions are expanded and cannot recurse"),
                ));
            }
            cx.args.push(env);
            let before = self.c.exprs.len();
            let r = self.expr(&f.body, cx);
            cx.args.pop();
            // Expanded nodes stand where the call stands.
            for s in &mut self.c.spans[before..] {
                *s = span;
            }
            return r;
        }
        let unary = unary_from_name(n);
        let cast = DType::from_name(n);
        if let Some(want) = unary.map(|_| 1).or(cast.map(|_| 1)).or(binary_call(n).map(|_| 2))
            && args.len() != want
        {
            return Err(self.error(arity(n, want, args.len(), span)));
        }
        let mut ids = Vec::new();
        let mut failed = false;
        if unary.is_none() && cast.is_none() && binary_call(n).is_none() && n != "rand" {
            return Err(self.unknown_function(name));
        }
        for a in args {
            match self.expr(a, cx) {
                Ok(id) => ids.push(id),
                Err(Failed) => failed = true,
            }
        }
        if failed {
            return Err(Failed);
        }
        let e = if let Some(op) = unary {
            Expr::Unary(op, ids[0])
        } else if let Some(dtype) = cast {
            Expr::Cast(dtype, ids[0])
        } else if let Some(op) = binary_call(n) {
            Expr::Binary(op, ids[0], ids[1])
        } else {
            if !(2..=5).contains(&ids.len()) {
                return Err(self.error(
                    Diagnostic::error(
                        "E0220",
                        span,
                        format!("`rand` takes a seed and one to four coordinates, not {} arguments", ids.len()),
                    )
                    .help("write `rand(seed, m, n)`"),
                ));
            }
            Expr::Rand { seed: ids[0], coords: ids[1..].to_vec() }
        };
        self.push(e, span)
    }

    fn unknown_function(&mut self, name: &Ident) -> Failed {
        let mut known: Vec<String> = self.items.functions.keys().map(|s| s.to_string()).collect();
        known.extend(UnaryOp::ALL.iter().map(|o| o.name().to_string()));
        known.extend(["pow", "min", "max", "rand"].map(String::from));
        known.extend(ReduceOp::ALL.iter().map(|o| o.name().to_string()));
        let help = if self.by_name.contains_key(&name.name) {
            format!("`{0}` is a tensor: write `{0}[..]`", name.name)
        } else {
            match closest(&name.name, &known) {
                Some(near) => format!("write `{near}(..)`"),
                None => format!("define it: `fn {}(x) = ..` above the cascade", name.name),
            }
        };
        self.error(Diagnostic::error("E0234", name.span, format!("there is no function `{}`", name.name)).help(help))
    }

    fn segment_call(&mut self, args: &[syntax::Expr], span: Span, cx: &mut Context<'_>) -> Result<ExprId, Failed> {
        if let [offs, n] = args
            && let (Some(offs_name), Some(n_name)) = (offs.as_name(), n.as_name())
        {
            let t = self.tensor_named(&Ident { name: offs_name.to_string(), span: offs.span }, cx)?;
            self.check_offsets(t, offs.span)?;
            if let Some(i) = cx.indices.get(n_name).copied() {
                // Naming the index checks that it is in scope.
                self.named(n_name, n.span, cx)?;
                return self.push(Expr::Segment { offsets: t, of: i }, span);
            }
            return Err(self.unknown_name(n_name, n.span, cx));
        }
        Err(self.error(
            Diagnostic::error("E0220", span, "`segment` takes a tensor of offsets and an index")
                .help("write `segment(offs, n)`"),
        ))
    }

    pub(super) fn check_offsets(&mut self, t: crate::cascade::TensorId, span: Span) -> Result<(), Failed> {
        let tensor = &self.c.tensors[t];
        if tensor.dims.len() == 1 && tensor.dtype.is_int() {
            return Ok(());
        }
        let (decl, name) = (tensor.span, tensor.name.clone());
        Err(self.error(
            Diagnostic::error("E0235", span, format!("`{name}` does not hold offsets"))
                .also(decl, "declared here")
                .help("offsets are one-dimensional integers, one more than there are segments: `offs: i32[X+1]`"),
        ))
    }

    fn reduce(
        &mut self,
        op: &syntax::Reducer,
        scan: bool,
        over: &[syntax::Binder],
        body: &syntax::Expr,
        span: Span,
        cx: &mut Context<'_>,
    ) -> Result<ExprId, Failed> {
        if !cx.args.is_empty() {
            return Err(Failed);
        }
        if let Some(what) = cx.constant {
            return Err(self.error(
                Diagnostic::error("E0231", span, format!("{what} does not reduce"))
                    .help("use ranks and scalar parameters only"),
            ));
        }
        let mut ids = Vec::new();
        for b in over {
            let n = &b.index.name;
            if !scan && cx.scope.contains(n) {
                return Err(self.error(
                    Diagnostic::error(
                        "E0236",
                        b.index.span,
                        format!("this reduction shadows the outer reduction over `{n}`"),
                    )
                    .help("give the inner index another name: `sum(k in K) ..`"),
                ));
            }
            match cx.indices.get(n) {
                Some(i) => ids.push(*i),
                None => return Err(Failed),
            }
        }
        let op = match op {
            syntax::Reducer::Op(op) => {
                if scan && op.selects_argument() {
                    return Err(self.error(
                        Diagnostic::error("E0237", span, format!("`{}` has no running form", op.name()))
                            .help("write `cummax(n) ..` or `cummin(n) ..`"),
                    ));
                }
                Reducer::Op(*op)
            }
            syntax::Reducer::TopK(k) => Reducer::TopK { k: self.top_k(k)? },
            syntax::Reducer::User(name) => Reducer::User(self.monoid_named(name)?),
        };
        if scan && ids.len() != 1 {
            return Err(self
                .error(Diagnostic::error("E0238", span, "a scan runs along one index").help("write `cumsum(n) ..`")));
        }
        if !scan {
            cx.scope.extend(over.iter().map(|b| b.index.name.clone()));
        }
        let body = match (&body.kind, op) {
            (ExprKind::Tuple(items), Reducer::User(m)) => self.tuple_body(items, m, body.span, cx),
            (_, Reducer::User(m)) if self.c.monoids[m].fields.len() > 1 => Err(self.wrong_tuple(m, 1, body.span)),
            _ => self.expr(body, cx),
        };
        if !scan {
            cx.scope.truncate(cx.scope.len() - over.len());
        }
        let body = body?;
        if scan {
            self.push(Expr::Scan { op, over: ids[0], body }, span)
        } else {
            self.push(Expr::Reduce { op, over: ids, body }, span)
        }
    }

    fn wrong_tuple(&mut self, m: MonoidId, got: usize, span: Span) -> Failed {
        let (name, fields) = (self.c.monoids[m].name.clone(), self.c.monoids[m].fields.clone());
        self.error(
            Diagnostic::error("E0239", span, format!("`{name}` joins {} components, not {got}", fields.len()))
                .help(format!("reduce a tuple ({})", fields.join(", "))),
        )
    }

    fn tuple_body(
        &mut self,
        items: &[syntax::Expr],
        m: MonoidId,
        span: Span,
        cx: &mut Context<'_>,
    ) -> Result<ExprId, Failed> {
        if items.len() != self.c.monoids[m].fields.len() {
            return Err(self.wrong_tuple(m, items.len(), span));
        }
        let mut ids = Vec::new();
        for i in items {
            ids.push(self.expr(i, cx)?);
        }
        self.push(Expr::Tuple(ids), span)
    }

    fn top_k(&mut self, k: &syntax::Expr) -> Result<u64, Failed> {
        let n = match &k.kind {
            ExprKind::Int(n) => u64::try_from(*n).ok(),
            ExprKind::Name(r) => self.rank_names.get(r).and_then(|r| self.c.ranks[*r].fixed),
            _ => None,
        };
        match n {
            Some(n) if (1..=1024).contains(&n) => Ok(n),
            _ => Err(self.error(
                Diagnostic::error("E0240", k.span, "how many to keep must be a number the text fixes")
                    .help("write an integer from 1 to 1024, or a rank with a fixed extent: `topk(n, 8)`"),
            )),
        }
    }

    fn monoid_named(&mut self, name: &Ident) -> Result<MonoidId, Failed> {
        if let Some(id) = self.monoid_ids.get(&name.name) {
            return Ok(*id);
        }
        let Some(m) = self.items.monoids.get(name.name.as_str()).copied() else {
            let mut known: Vec<String> = ReduceOp::ALL.iter().map(|o| o.name().to_string()).collect();
            known.extend(self.items.monoids.keys().map(|s| s.to_string()));
            let d = Diagnostic::error("E0241", name.span, format!("there is no reduction `{}`", name.name));
            return Err(self.error(match closest(&name.name, &known) {
                Some(near) => d.help(format!("write `{near}(..)`")),
                None => d.help(format!(
                    "the reductions are {}; define others with `monoid {}(a) {{ .. }}`",
                    ReduceOp::ALL.map(|o| o.name()).join(", "),
                    name.name
                )),
            }));
        };
        // Errors of the monoid itself were reported where it stands.
        let Some(m) = monoid(m, self.items, &mut Vec::new()) else { return Err(Failed) };
        let id = self.c.monoids.push(m);
        self.monoid_ids.insert(name.name.clone(), id);
        Ok(id)
    }
}

/// A monoid's meaning; functions are expanded.
pub(super) fn monoid(m: &syntax::Monoid, items: &Items<'_>, diagnostics: &mut Vec<Diagnostic>) -> Option<Monoid> {
    let before = diagnostics.len();
    let n = m.fields.len();
    for (what, list) in [("identity", &m.identity), ("combine", &m.combine)] {
        if list.len() != n || n == 0 {
            diagnostics.push(
                Diagnostic::error(
                    "E0242",
                    m.span,
                    format!("`{what}` of `{}` has {} components, not {n}", m.name.name, list.len()),
                )
                .help("give one value per component, and at least one component"),
            );
        }
    }
    let mut identity = Vec::new();
    for e in &m.identity {
        match &e.kind {
            ExprKind::Int(i) => identity.push(*i as f64),
            ExprKind::Float(x) => identity.push(*x),
            _ => {
                if let ExprKind::Unary(UnaryOp::Neg, a) = &e.kind
                    && let ExprKind::Float(x) = a.kind
                {
                    identity.push(-x);
                    continue;
                }
                diagnostics.push(
                    Diagnostic::error("E0243", e.span, "a component of the identity is a number")
                        .help("write a literal, `inf` or `-inf`"),
                );
            }
        }
    }
    let mut combine = Vec::new();
    let mut budget = 512u32;
    for e in &m.combine {
        if let Some(x) = monoid_expr(e, m, items, &[], &mut budget, diagnostics) {
            combine.push(x);
        }
    }
    (diagnostics.len() == before).then(|| Monoid {
        name: m.name.name.clone(),
        fields: m.fields.iter().map(|f| f.name.clone()).collect(),
        identity,
        combine,
        span: m.span,
    })
}

type MonoidEnv<'a> = (&'a str, MonoidExpr);

fn monoid_expr(
    e: &syntax::Expr,
    m: &syntax::Monoid,
    items: &Items<'_>,
    env: &[MonoidEnv<'_>],
    budget: &mut u32,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<MonoidExpr> {
    const HELP: &str =
        "a combination uses numbers, operators, functions and the components `a.x`, `b.x` of its arguments";
    if *budget == 0 {
        diagnostics.push(
            Diagnostic::error("E0217", e.span, "this combination grows too large")
                .help("a combination has at most 512 nodes"),
        );
        return None;
    }
    *budget -= 1;
    let mut sub = |e: &syntax::Expr| monoid_expr(e, m, items, env, budget, diagnostics);
    match &e.kind {
        ExprKind::Int(n) => Some(MonoidExpr::Const(*n as f64)),
        ExprKind::Float(x) => Some(MonoidExpr::Const(*x)),
        ExprKind::Name(n) => match env.iter().find(|(name, _)| name == n) {
            Some((_, x)) => Some(x.clone()),
            None => {
                diagnostics.push(Diagnostic::error("E0244", e.span, format!("nothing is named `{n}` here")).help(HELP));
                None
            }
        },
        ExprKind::Field(a, f) => {
            let side: Option<fn(usize) -> MonoidExpr> = if a.name == m.args.0.name {
                Some(MonoidExpr::Left)
            } else if a.name == m.args.1.name {
                Some(MonoidExpr::Right)
            } else {
                None
            };
            match (side, m.fields.iter().position(|x| x.name == f.name)) {
                (Some(side), Some(i)) if env.is_empty() => Some(side(i)),
                _ => {
                    diagnostics.push(
                        Diagnostic::error("E0244", e.span, format!("`{}.{}` is no component here", a.name, f.name))
                            .help(HELP),
                    );
                    None
                }
            }
        }
        ExprKind::Unary(op, a) => Some(MonoidExpr::Unary(*op, Box::new(sub(a)?))),
        ExprKind::Binary(op, a, b) => {
            let (a, b) = (sub(a)?, sub(b)?);
            Some(MonoidExpr::Binary(*op, Box::new(a), Box::new(b)))
        }
        ExprKind::Select(c, a, b) => {
            let (c, a, b) = (sub(c)?, sub(a)?, sub(b)?);
            Some(MonoidExpr::Select(Box::new(c), Box::new(a), Box::new(b)))
        }
        ExprKind::Call(name, args) => {
            let mut values = Vec::new();
            for a in args {
                values.push(sub(a)?);
            }
            let n = name.name.as_str();
            if let (Some(op), 1) = (unary_from_name(n), values.len()) {
                return Some(MonoidExpr::Unary(op, Box::new(values.remove(0))));
            }
            if let (Some(op), 2) = (binary_call(n), values.len()) {
                let b = values.pop()?;
                return Some(MonoidExpr::Binary(op, Box::new(values.pop()?), Box::new(b)));
            }
            if items.recursive.contains(n) {
                return None;
            }
            if let Some(f) = items.functions.get(n).filter(|f| f.params.len() == values.len()) {
                let env: Vec<MonoidEnv<'_>> = f.params.iter().map(|p| p.name.as_str()).zip(values).collect();
                // A parameterless function still hides the monoid's arguments.
                let env = if env.is_empty() { vec![("", MonoidExpr::Const(0.0))] } else { env };
                return monoid_expr(&f.body, m, items, &env, budget, diagnostics);
            }
            diagnostics.push(Diagnostic::error("E0244", e.span, format!("`{n}` is no function here")).help(HELP));
            None
        }
        ExprKind::Bool(_) | ExprKind::Access(..) | ExprKind::Reduce { .. } | ExprKind::Tuple(_) => {
            diagnostics.push(Diagnostic::error("E0244", e.span, "this does not stand in a combination").help(HELP));
            None
        }
    }
}

/// Checks a function where it is defined: it uses its parameters only, and does not call itself.
///
/// Returns whether it calls itself.
pub(super) fn check_function(f: &syntax::Function, items: &Items<'_>, diagnostics: &mut Vec<Diagnostic>) -> bool {
    fn visit(e: &syntax::Expr, f: &syntax::Function, items: &Items<'_>, diagnostics: &mut Vec<Diagnostic>) {
        const HELP: &str = "a function of scalars uses its parameters, numbers, ranks and other functions";
        let mut children: Vec<&syntax::Expr> = Vec::new();
        match &e.kind {
            ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Bool(_) => {}
            ExprKind::Name(n) => {
                let rank = n.starts_with(|c: char| c.is_ascii_uppercase());
                if !rank && !f.params.iter().any(|p| p.name == *n) {
                    diagnostics.push(
                        Diagnostic::error("E0245", e.span, format!("`{n}` is no parameter of `{}`", f.name.name))
                            .help(HELP),
                    );
                }
            }
            ExprKind::Field(..) | ExprKind::Access(..) | ExprKind::Tuple(_) | ExprKind::Reduce { .. } => {
                diagnostics
                    .push(Diagnostic::error("E0245", e.span, "this does not stand in a scalar function").help(HELP));
            }
            ExprKind::Call(name, args) => {
                if !is_builtin(&name.name) && !items.functions.contains_key(name.name.as_str()) {
                    diagnostics.push(
                        Diagnostic::error("E0234", name.span, format!("there is no function `{}`", name.name))
                            .help(HELP),
                    );
                }
                children.extend(args);
            }
            ExprKind::Unary(_, a) => children.push(a),
            ExprKind::Binary(_, a, b) => children.extend([&**a, b]),
            ExprKind::Select(a, b, c) => children.extend([&**a, b, c]),
        }
        for c in children {
            visit(c, f, items, diagnostics);
        }
    }
    visit(&f.body, f, items, diagnostics);
    let mut reached: Vec<&str> = vec![];
    let mut work: Vec<&syntax::Expr> = vec![&f.body];
    while let Some(e) = work.pop() {
        match &e.kind {
            ExprKind::Call(name, args) => {
                work.extend(args);
                if name.name == f.name.name {
                    diagnostics.push(
                        Diagnostic::error("E0233", name.span, format!("function `{}` calls itself", f.name.name))
                            .help("functions are expanded and cannot recurse; iterate with `iter t in T { .. }`"),
                    );
                    return true;
                }
                if let Some(g) = items.functions.get(name.name.as_str())
                    && !reached.contains(&name.name.as_str())
                {
                    reached.push(&name.name);
                    work.push(&g.body);
                }
            }
            ExprKind::Unary(_, a) => work.push(a),
            ExprKind::Binary(_, a, b) => work.extend([&**a, b]),
            ExprKind::Select(a, b, c) => work.extend([&**a, b, c]),
            ExprKind::Int(_)
            | ExprKind::Float(_)
            | ExprKind::Bool(_)
            | ExprKind::Name(_)
            | ExprKind::Field(..)
            | ExprKind::Access(..)
            | ExprKind::Tuple(_)
            | ExprKind::Reduce { .. } => {}
        }
    }
    false
}
