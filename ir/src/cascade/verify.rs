//! What a cascade must satisfy beyond names: shapes of nodes, types, left sides, support, iteration.
//!
//! The parser runs it on what it resolved; the pass runner on what a pass made, where a failure is a bug of that pass.
//! Invariant: it reads the IR only, never its text, and reports every violation it can find in one run.

mod iteration;
mod left;
mod support;
mod typing;

use std::collections::HashSet;

use super::affine::Affine;
use super::types::{Kind, kinds};
use super::*;

/// Every violation in `c`, errors and warnings, in no particular order; empty for a sound cascade.
pub fn verify(c: &Cascade) -> Vec<Diagnostic> {
    let mut v = Verifier { c, kinds: kinds(c), out: Vec::new(), known_sizes: known_sizes(c) };
    if !v.structure() {
        return v.out;
    }
    v.tensors();
    v.iteration();
    let mut support = support::Support::default();
    for s in &c.stmts {
        match s {
            Stmt::Einsum(e) => v.einsum(e, None, &mut support),
            Stmt::Iter(i) => {
                for e in &i.inits {
                    v.einsum(e, Some((i, true)), &mut support);
                }
                for e in &i.body {
                    v.einsum(e, Some((i, false)), &mut support);
                }
            }
        }
    }
    v.unused();
    v.out
}

/// Extents of the ranks the text fixes, 0 for the others, and which are fixed.
fn known_sizes(c: &Cascade) -> Vec<Option<u64>> {
    c.ranks.iter().map(|(_, r)| r.fixed).collect()
}

struct Verifier<'a> {
    c: &'a Cascade,
    kinds: Vec<Kind>,
    out: Vec<Diagnostic>,
    known_sizes: Vec<Option<u64>>,
}

/// The `iter` around a statement, and whether the statement is one of its initialisers.
type Block<'a> = Option<(&'a Iter, bool)>;

impl Verifier<'_> {
    fn error(&mut self, d: Diagnostic) {
        self.out.push(d);
    }

    fn span(&self, e: ExprId) -> Span {
        self.c.spans.get(crate::arena::Id::index(e)).copied().unwrap_or_default()
    }

    fn kind(&self, e: ExprId) -> Kind {
        self.kinds[crate::arena::Id::index(e)]
    }

    fn tensor_name(&self, t: TensorId) -> &str {
        &self.c.tensors[t].name
    }

    /// The value of an extent the text fixes.
    fn known_size(&self, s: &Size) -> Option<u64> {
        let mut known = true;
        s.for_each_rank(&mut |r| known &= self.known_sizes[crate::arena::Id::index(r)].is_some());
        if !known {
            return None;
        }
        let values: Vec<u64> = self.known_sizes.iter().map(|n| n.unwrap_or(0)).collect();
        s.eval(&values).ok()
    }

    /// Every node under `root`, parents first.
    fn nodes(&self, root: ExprId) -> Vec<ExprId> {
        let mut out = Vec::new();
        self.c.walk(root, &mut |id, _| out.push(id));
        out
    }

    /// Ids in range, operands before users, one position a dimension: what other checks and the evaluator rely on.
    fn structure(&mut self) -> bool {
        let c = self.c;
        let mut wrong: Vec<(Span, String)> = Vec::new();
        for (id, e) in c.exprs.iter() {
            let span = self.span(id);
            e.for_each_operand(|o| {
                if o >= id {
                    wrong.push((span, "an operand does not precede its user".to_string()));
                }
            });
            if let Expr::Read { tensor, at } = e {
                let dims = c.tensors.get(*tensor).map(|t| t.dims.len());
                if dims != Some(at.len()) {
                    wrong.push((span, "a read has not one position for each dimension".to_string()));
                }
            }
            let offsets_ok = |t: &TensorId| c.tensors.get(*t).is_some_and(|t| t.dims.len() == 1 && t.dtype.is_int());
            if let Expr::Segment { offsets, .. } = e
                && !offsets_ok(offsets)
            {
                wrong.push((span, "offsets are not one-dimensional integers".to_string()));
            }
        }
        if c.spans.len() != c.exprs.len() {
            wrong.push((Span::default(), "spans and expressions differ in number".to_string()));
        }
        if wrong.is_empty() {
            for e in c.einsums() {
                for t in &e.targets {
                    if c.tensors.get(t.tensor).is_none_or(|x| x.dims.len() != t.at.len()) {
                        wrong.push((e.span, "a target has not one position for each dimension".to_string()));
                    }
                }
                if e.targets.is_empty() {
                    wrong.push((e.span, "a statement assigns nothing".to_string()));
                }
            }
        }
        for (span, what) in &wrong {
            let d = Diagnostic::error("E0390", *span, what.clone());
            self.error(
                d.help("this cascade was not made by the parser or the builder; the pass that made it is wrong"),
            );
        }
        wrong.is_empty()
    }

    fn tensors(&mut self) {
        let c = self.c;
        let mut names = HashSet::new();
        for (_, t) in c.tensors.iter() {
            if !names.insert(&t.name) {
                let d = Diagnostic::error("E0206", t.span, format!("`{}` already names a tensor", t.name));
                self.error(d.help("choose another name"));
            }
            if let Some(default) = t.default {
                self.assignable(default, self.kind(default), t.dtype, &t.name);
            }
        }
    }

    fn einsum(&mut self, e: &Einsum, block: Block<'_>, support: &mut support::Support) {
        self.scopes(e, block);
        let whole = self.results(e);
        self.types(e, whole);
        self.positions(e);
        self.left_sides(e, block);
        self.aliases(e);
        self.support(e, support);
    }

    /// Every index is bound where it is used; no reduction shadows another or a free index.
    fn scopes(&mut self, e: &Einsum, block: Block<'_>) {
        let mut bound: Vec<IndexId> = e.free.clone();
        if let Some((i, false)) = block {
            bound.push(i.index);
        }
        let mut roots = vec![e.value];
        roots.extend(e.otherwise);
        roots.extend(e.targets.iter().flat_map(|t| t.at.iter().copied()));
        for r in roots {
            self.scope(r, &mut bound);
        }
        // The filter speaks of every index of the statement.
        if let Some(f) = e.filter {
            for id in self.nodes(e.value) {
                if let Expr::Reduce { over, .. } = &self.c.exprs[id] {
                    bound.extend(over);
                }
            }
            self.scope(f, &mut bound);
        }
    }

    fn scope(&mut self, e: ExprId, bound: &mut Vec<IndexId>) {
        let c = self.c;
        let unbound = |v: &mut Self, i: IndexId| {
            let name = c.indices[i].name.clone();
            let d = Diagnostic::error(
                "E0223",
                v.span(e),
                format!("index `{name}` is used outside the reduction that binds it"),
            );
            v.error(d.help(format!("put this inside the reduction over `{name}`")));
        };
        match &c.exprs[e] {
            Expr::Index(i) | Expr::Segment { of: i, .. } | Expr::Scan { over: i, .. } if !bound.contains(i) => {
                unbound(self, *i);
            }
            Expr::Reduce { over, body, .. } => {
                for i in over {
                    if c.indices[*i].kind != IndexKind::Reduced {
                        let name = c.indices[*i].name.clone();
                        let d = Diagnostic::error(
                            "E0253",
                            self.span(e),
                            format!("`{name}` is reduced here and kept on the left-hand side"),
                        );
                        self.error(d.help("rename one of the two: a reduced index is gone after its reduction"));
                    }
                }
                let before = bound.len();
                bound.extend(over);
                self.scope(*body, bound);
                bound.truncate(before);
                return;
            }
            Expr::Index(_)
            | Expr::Segment { .. }
            | Expr::Scan { .. }
            | Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Tuple(_)
            | Expr::Rand { .. } => {}
        }
        let mut operands = Vec::new();
        c.exprs[e].for_each_operand(|o| operands.push(o));
        for o in operands {
            self.scope(o, bound);
        }
    }

    /// As many targets as the value has results; reductions with several results stand alone.
    fn results(&mut self, e: &Einsum) -> bool {
        let c = self.c;
        let count = |x: &Expr| match x {
            Expr::Reduce { op, .. } | Expr::Scan { op, .. } => match op {
                Reducer::Op(op) if op.selects_argument() => (1, 2),
                Reducer::Op(_) => (1, 1),
                Reducer::TopK { .. } => (2, 2),
                Reducer::User(m) => (c.monoids[*m].fields.len(), c.monoids[*m].fields.len()),
            },
            _ => (1, 1),
        };
        let (low, high) = count(&c.exprs[e.value]);
        let n = e.targets.len();
        if !(low..=high).contains(&n) {
            let want = if low == high { low.to_string() } else { format!("{low} or {high}") };
            let s = if high == 1 { "" } else { "s" };
            let d =
                Diagnostic::error("E0341", e.span, format!("{n} tensors are assigned, the value has {want} result{s}"));
            self.error(d.help(
                "several results come from `argmax`, `argmin`, `topk` or a monoid: `(v[m], i[m]) = argmax(n) S[m,n]`",
            ));
        }
        let mut roots = vec![e.value];
        roots.extend(e.filter);
        roots.extend(e.otherwise);
        for root in roots {
            for id in self.nodes(root) {
                if id != e.value && count(&c.exprs[id]).0 > 1 {
                    let d = Diagnostic::error("E0342", self.span(id), "a reduction with several results stands alone");
                    self.error(d.help("assign its results in a statement of its own, and use them in the next"));
                }
            }
        }
        if let Expr::Reduce { op: Reducer::TopK { k }, .. } = c.exprs[e.value] {
            for t in &e.targets {
                let last = t.at.last().and_then(|a| Affine::of(c, *a)).and_then(|f| f.as_index());
                let right = last.is_some_and(|i| self.known_size(&c.indices[i].extent) == Some(k));
                if !right {
                    let name = self.tensor_name(t.tensor).to_string();
                    let d = Diagnostic::error(
                        "E0343",
                        e.span,
                        format!("the last dimension of `{name}` does not hold the {k} elements kept"),
                    );
                    self.error(
                        d.help(format!("end its access with an index of extent {k}: `{name}[.., j]`, `for j in {k}`")),
                    );
                }
            }
        }
        (low..=high).contains(&n)
    }

    /// Positions known at compile time lie inside their dimension.
    fn positions(&mut self, e: &Einsum) {
        let c = self.c;
        let mut accesses: Vec<(TensorId, Vec<ExprId>)> = e.targets.iter().map(|t| (t.tensor, t.at.clone())).collect();
        for root in e.roots() {
            for id in self.nodes(root) {
                if let Expr::Read { tensor, at } = &c.exprs[id] {
                    accesses.push((*tensor, at.clone()));
                }
            }
        }
        for (t, at) in accesses {
            for (a, d) in at.iter().zip(&c.tensors[t].dims) {
                let Some(f) = Affine::of(c, *a).filter(|f| f.terms.is_empty()) else { continue };
                let Some(p) = f.constant.as_constant() else { continue };
                let past = self.known_size(d).is_some_and(|n| p >= i128::from(n));
                if p < 0 || past {
                    let extent = print::size_text(c, d);
                    let d = Diagnostic::error(
                        "E0350",
                        self.span(*a),
                        format!("position {p} is outside extent {extent} of `{}`", c.tensors[t].name),
                    );
                    self.error(d.help(format!("positions run from 0 to {extent} - 1")));
                }
            }
        }
    }

    /// A statement that writes in place reads only the elements it writes.
    fn aliases(&mut self, e: &Einsum) {
        let c = self.c;
        for t in e.targets.iter().filter(|t| c.tensors[t.tensor].kind == TensorKind::InOut) {
            for root in [Some(e.value), e.filter, e.otherwise].into_iter().flatten() {
                for id in self.nodes(root) {
                    let Expr::Read { tensor, at } = &c.exprs[id] else { continue };
                    if *tensor == t.tensor && !at.iter().zip(&t.at).all(|(a, b)| self.same_expr(*a, *b)) {
                        let name = self.tensor_name(t.tensor).to_string();
                        let d = Diagnostic::error(
                            "E0340",
                            self.span(id),
                            format!("`{name}` is written in place while other elements of it are read"),
                        );
                        self.error(d.help("copy what is read into another tensor in a statement before this one"));
                    }
                }
            }
        }
    }

    fn same_expr(&self, a: ExprId, b: ExprId) -> bool {
        if a == b {
            return true;
        }
        if let (Some(x), Some(y)) = (Affine::of(self.c, a), Affine::of(self.c, b)) {
            return x == y;
        }
        print::expr_text_of(self.c, a) == print::expr_text_of(self.c, b)
    }

    /// Warns of tensors that nothing reads.
    fn unused(&mut self) {
        let c = self.c;
        let mut read: HashSet<TensorId> = HashSet::new();
        for (_, e) in c.exprs.iter() {
            match e {
                Expr::Read { tensor, .. } | Expr::Segment { offsets: tensor, .. } => {
                    read.insert(*tensor);
                }
                Expr::Int(_)
                | Expr::Float(_)
                | Expr::Size(_)
                | Expr::Index(_)
                | Expr::Unary(..)
                | Expr::Binary(..)
                | Expr::Select(..)
                | Expr::Cast(..)
                | Expr::Tuple(_)
                | Expr::Reduce { .. }
                | Expr::Scan { .. }
                | Expr::Rand { .. } => {}
            }
        }
        for o in &c.outputs {
            read.insert(match o.source {
                OutputSource::Whole(t) => t,
                OutputSource::Points { state, .. } | OutputSource::Point { state, .. } => state,
            });
        }
        // One result of several may be of no interest.
        for e in c.einsums() {
            if e.targets.iter().any(|t| read.contains(&t.tensor)) {
                read.extend(e.targets.iter().map(|t| t.tensor));
            }
        }
        for (id, t) in c.tensors.iter() {
            if !read.contains(&id) && t.kind != TensorKind::InOut {
                let mut d = Diagnostic::error("W0001", t.span, format!("`{}` is never read", t.name));
                d.severity = Severity::Warning;
                self.error(d.help("remove it, or return it as an output"));
            }
        }
    }
}
