//! Statements: which indices a statement has, what they range over, and what it assigns.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{Failed, RaggedIndex, Resolver};
use crate::cascade::affine::{Affine, product_extent, same_size, size_at_most};
use crate::cascade::syntax::{self, ExprKind, Ident};
use crate::cascade::types::{Kind, default_dtype};
use crate::cascade::{
    Einsum, Expr, ExprId, Index, IndexId, IndexKind, Iter, Size, Stmt, Storage, Target, TensorId, TensorKind,
};
use crate::diag::{Diagnostic, Span};
use crate::ops::BinaryOp;

/// What names mean inside one statement.
pub(super) struct Context<'s> {
    /// Set where no tensor may be read and no index used, with what this place is.
    pub constant: Option<&'static str>,
    /// Indices by name.
    pub indices: HashMap<String, IndexId>,
    /// Those that reductions bind.
    pub reduced: HashSet<String>,
    /// Reductions around the present place, outermost first.
    pub scope: Vec<String>,
    /// Arguments of the functions being expanded.
    pub args: Vec<HashMap<String, ExprId>>,
    /// Whether the present place is the filter.
    pub in_filter: bool,
    /// Dimensions at which each name stands alone.
    pub alone: BTreeMap<String, Vec<(Size, Span)>>,
    /// Names already complained about.
    pub failed_indices: HashSet<String>,
    /// Tensors this statement assigns.
    pub targets: HashSet<String>,
    /// Tensors that later statements assign.
    pub later: &'s HashSet<String>,
    /// Tensors assigned so far inside the enclosing `iter`.
    pub assigned_in_block: HashSet<TensorId>,
}

static NOTHING: std::sync::LazyLock<HashSet<String>> = std::sync::LazyLock::new(HashSet::new);

impl<'s> Context<'s> {
    pub fn constant(what: &'static str) -> Context<'static> {
        Context::new(Some(what), &NOTHING)
    }

    fn new(constant: Option<&'static str>, later: &'s HashSet<String>) -> Context<'s> {
        Context {
            constant,
            indices: HashMap::new(),
            reduced: HashSet::new(),
            scope: Vec::new(),
            args: Vec::new(),
            in_filter: false,
            alone: BTreeMap::new(),
            failed_indices: HashSet::new(),
            targets: HashSet::new(),
            later,
            assigned_in_block: HashSet::new(),
        }
    }
}

/// The enclosing `iter` of a statement.
struct Block {
    index_name: String,
    index: IndexId,
    extent: Size,
    rev: bool,
    /// Whether this statement sets a state's first point.
    init: bool,
}

impl Resolver<'_, '_> {
    pub(super) fn body(&mut self, c: &syntax::Cascade) {
        let mut later: HashSet<String> = HashSet::new();
        for s in &c.body {
            let einsums: &[syntax::Einsum] = match s {
                syntax::Stmt::Einsum(e) => std::slice::from_ref(e),
                syntax::Stmt::Iter(i) => &i.body,
                syntax::Stmt::Require(..) | syntax::Stmt::Ragged(_) => &[],
            };
            later.extend(einsums.iter().flat_map(|e| &e.targets).map(|t| t.name.name.clone()));
        }
        for s in &c.body {
            match s {
                syntax::Stmt::Require(facts, _) => {
                    for f in facts {
                        let mut cx = Context::constant("`require`");
                        let Ok(e) = self.expr(f, &mut cx) else { continue };
                        if self.kind(e) != Kind::Bool {
                            self.error(
                                Diagnostic::error("E0250", f.span, "`require` states a fact, this is a number")
                                    .help("write a comparison: `require N % 16 == 0`"),
                            );
                            continue;
                        }
                        self.c.requires.push(e);
                    }
                }
                syntax::Stmt::Ragged(r) => self.ragged(r),
                syntax::Stmt::Einsum(e) => match self.einsum(e, None, &later, &HashSet::new()) {
                    Ok(e) => self.c.stmts.push(Stmt::Einsum(e)),
                    Err(Failed) => self.mark_broken(e),
                },
                syntax::Stmt::Iter(i) => {
                    let _ = self.iter(i, &later);
                }
            }
        }
    }

    /// What a failed statement assigns has a value as far as others are concerned.
    fn mark_broken(&mut self, e: &syntax::Einsum) {
        for t in &e.targets {
            match self.by_name.get(&t.name.name) {
                Some(id) => {
                    self.assigned.entry(*id).or_insert(t.span);
                }
                None => {
                    self.broken.insert(t.name.name.clone());
                }
            }
        }
    }

    fn ragged(&mut self, r: &syntax::Ragged) {
        let cx = Context::constant("offsets");
        let offsets = self.tensor_named(&r.offsets, &cx);
        let offsets = offsets.and_then(|t| self.check_offsets(t, r.offsets.span).map(|()| t));
        let (Ok(extent), Ok(offsets)) = (self.size(&r.extent), offsets) else {
            self.broken.insert(r.segment.name.clone());
            return;
        };
        for name in [&r.index, &r.segment] {
            if let Some(t) = self.by_name.get(&name.name) {
                let other = self.c.tensors[*t].span;
                self.tensor_is_index(name, other);
                return;
            }
            self.index_names.entry(name.name.clone()).or_insert(name.span);
        }
        self.ragged.retain(|old| old.name != r.index.name);
        self.ragged.push(RaggedIndex { name: r.index.name.clone(), extent, offsets, segment: r.segment.name.clone() });
    }

    /// The offsets and ragged index of a segment's name, if that index is in the statement.
    pub(super) fn segment_of(&self, name: &str, cx: &Context<'_>) -> Option<(TensorId, IndexId)> {
        let r = self.ragged.iter().find(|r| r.segment == name)?;
        Some((r.offsets, *cx.indices.get(&r.name)?))
    }

    fn iter(&mut self, i: &syntax::Iter, later: &HashSet<String>) -> Result<(), Failed> {
        let extent = match self.size(&i.extent) {
            Ok(e) => e,
            Err(Failed) => {
                i.body.iter().for_each(|e| self.mark_broken(e));
                return Err(Failed);
            }
        };
        if let Some(t) = self.by_name.get(&i.index.name) {
            let other = self.c.tensors[*t].span;
            self.tensor_is_index(&i.index, other);
        }
        self.index_names.entry(i.index.name.clone()).or_insert(i.index.span);
        let rank = rank_of(&extent);
        let (name, span) = (i.index.name.clone(), i.index.span);
        let index = self.c.indices.push(Index { name, extent: extent.clone(), rank, kind: IndexKind::Iterated, span });
        let mut out = Iter {
            index,
            extent: extent.clone(),
            rev: i.rev,
            states: vec![],
            inits: vec![],
            body: vec![],
            span: i.span,
        };
        let mut in_block: HashSet<TensorId> = HashSet::new();
        let first = if i.rev { extent.clone() } else { Size::Const(0) };
        let is_init = |r: &Self, e: &syntax::Einsum| {
            e.targets.iter().any(|t| t.at.first().is_some_and(|at| r.is_size(at, &first)))
        };
        let cycles = super::cycle::same_step_cycles(i, |e| is_init(self, e));
        let cyclic: HashSet<usize> = cycles.iter().flat_map(|(members, _)| members.iter().copied()).collect();
        for (members, d) in cycles {
            members.iter().for_each(|k| self.mark_broken(&i.body[*k]));
            self.error(d);
        }
        for (k, e) in i.body.iter().enumerate() {
            if cyclic.contains(&k) {
                continue;
            }
            let init = is_init(self, e);
            let block = Block { index_name: i.index.name.clone(), index, extent: extent.clone(), rev: i.rev, init };
            match self.einsum(e, Some(&block), later, &in_block) {
                Ok(stmt) => {
                    let targets: Vec<TensorId> = stmt.targets.iter().map(|t| t.tensor).collect();
                    if init {
                        out.states.extend(&targets);
                        out.inits.push(stmt);
                    } else {
                        out.body.push(stmt);
                    }
                    in_block.extend(targets);
                }
                Err(Failed) => self.mark_broken(e),
            }
        }
        for t in &in_block {
            self.assigned.entry(*t).or_insert(i.span);
        }
        self.c.stmts.push(Stmt::Iter(out));
        Ok(())
    }

    /// Whether an access expression is exactly this extent.
    fn is_size(&self, e: &syntax::Expr, size: &Size) -> bool {
        match (&e.kind, size) {
            (ExprKind::Int(n), Size::Const(m)) => i128::from(*n) == i128::from(*m),
            (ExprKind::Name(n), Size::Rank(r)) => self.rank_names.get(n) == Some(r),
            (ExprKind::Binary(op, a, b), Size::Add(x, y)) => {
                *op == BinaryOp::Add && self.is_size(a, x) && self.is_size(b, y)
            }
            (ExprKind::Binary(op, a, b), Size::Sub(x, y)) => {
                *op == BinaryOp::Sub && self.is_size(a, x) && self.is_size(b, y)
            }
            (ExprKind::Binary(op, a, b), Size::Mul(x, y)) => {
                *op == BinaryOp::Mul && self.is_size(a, x) && self.is_size(b, y)
            }
            _ => false,
        }
    }

    fn einsum(
        &mut self,
        e: &syntax::Einsum,
        block: Option<&Block>,
        later: &HashSet<String>,
        in_block: &HashSet<TensorId>,
    ) -> Result<Einsum, Failed> {
        self.overgrown = false;
        let mut cx = Context::new(None, later);
        cx.assigned_in_block = in_block.clone();
        let init = block.is_some_and(|b| b.init);
        for t in &e.targets {
            if !cx.targets.insert(t.name.name.clone()) {
                return Err(self.error(
                    Diagnostic::error(
                        "E0251",
                        t.name.span,
                        format!("`{}` is assigned twice in one statement", t.name.name),
                    )
                    .help("give each result its own tensor"),
                ));
            }
        }
        // Names bound on the left, in order, and by reductions.
        let mut free: Vec<Ident> = Vec::new();
        for t in &e.targets {
            for at in &t.at {
                self.left_indices(at, &mut free);
            }
        }
        let mut reduced: Vec<(Ident, bool)> = Vec::new();
        let mut explicit: HashMap<String, (Size, Span)> = HashMap::new();
        let roots: Vec<&syntax::Expr> =
            [Some(&e.value), e.filter.as_ref(), e.otherwise.as_ref()].into_iter().flatten().collect();
        let mut failed = false;
        let mut binders: Vec<&syntax::Binder> = e.binders.iter().collect();
        for root in &roots {
            reductions(root, &mut |over, scan| {
                for b in over {
                    if !reduced.iter().any(|(i, s)| i.name == b.index.name && *s == scan) {
                        reduced.push((b.index.clone(), scan));
                    }
                    binders.push(b);
                }
            });
        }
        for b in binders {
            let Some(extent) = &b.extent else { continue };
            match self.size(extent) {
                Ok(s) => {
                    let place = b.index.span.to(extent.span);
                    if let Some((old, at)) = explicit.get(&b.index.name) {
                        if !same_size(old, &s) {
                            let d = self.clash(&b.index.name, (&old.clone(), *at), (&s, place));
                            self.error(d);
                            failed = true;
                        }
                    } else {
                        explicit.insert(b.index.name.clone(), (s, place));
                    }
                }
                Err(Failed) => failed = true,
            }
        }
        for b in &e.binders {
            let bound = free.iter().any(|f| f.name == b.index.name);
            if !bound {
                self.error(
                    Diagnostic::error(
                        "E0252",
                        b.index.span,
                        format!("`for` binds `{}`, which is not on the left-hand side", b.index.name),
                    )
                    .help(format!("write `sum({} in ..)` to bind a reduced index", b.index.name)),
                );
                failed = true;
            }
        }
        for (i, scan) in &reduced {
            let on_left = free.iter().any(|f| f.name == i.name) || block.is_some_and(|b| b.index_name == i.name);
            if on_left && !scan {
                let place = free.iter().find(|f| f.name == i.name).map_or(i.span, |f| f.span);
                self.error(
                    Diagnostic::error(
                        "E0253",
                        i.span,
                        format!("`{}` is reduced here and kept on the left-hand side", i.name),
                    )
                    .also(place, "kept here")
                    .help("rename one of the two: a reduced index is gone after its reduction"),
                );
                failed = true;
            }
            if !on_left && *scan {
                self.error(
                    Diagnostic::error(
                        "E0254",
                        i.span,
                        format!("a scan runs along an index of the left-hand side, `{}` is not one", i.name),
                    )
                    .help(format!("put `{}` on the left, or reduce over it", i.name)),
                );
                failed = true;
            }
        }
        for i in free.iter().chain(reduced.iter().map(|(i, _)| i)) {
            if let Some(t) = self.by_name.get(&i.name) {
                let other = self.c.tensors[*t].span;
                self.tensor_is_index(i, other);
                failed = true;
            } else if cx.targets.contains(&i.name) {
                let other = e.targets.iter().find(|t| t.name.name == i.name).map_or(i.span, |t| t.name.span);
                self.tensor_is_index(i, other);
                failed = true;
            } else if i.name.starts_with(|c: char| c.is_ascii_uppercase()) {
                let name = i.name.clone();
                if self.rank_names.contains_key(&name) {
                    self.error(
                        Diagnostic::error("E0255", i.span, format!("`{name}` is a rank; a reduction names an index"))
                            .help(format!("write `{}`", name.to_ascii_lowercase())),
                    );
                } else {
                    self.unknown_rank(&name, i.span);
                }
                failed = true;
            }
        }
        if failed {
            return Err(Failed);
        }
        // Where indices stand alone.
        for t in &e.targets {
            if let Some(id) = self.by_name.get(&t.name.name).copied() {
                self.alone_at(id, &t.at, init, block, &mut cx);
            }
        }
        for root in &roots {
            self.alone_in(root, block, &mut cx);
        }
        for t in &e.targets {
            for at in &t.at {
                self.alone_in(at, block, &mut cx);
            }
        }
        if let Some(b) = block {
            if !init {
                cx.indices.insert(b.index_name.clone(), b.index);
                let place = self.c.indices[b.index].span;
                self.check_extents(&b.index_name, &b.extent, place, &cx)?;
            } else if let Some(place) = mention(&roots, &b.index_name) {
                return Err(self.error(
                    Diagnostic::error(
                        "E0256",
                        place,
                        format!("an initial value does not depend on `{}`", b.index_name),
                    )
                    .help("initialisers run once, before the first step"),
                ));
            }
        }
        let mut free_ids = Vec::new();
        for i in &free {
            if block.is_some_and(|b| b.index_name == i.name) {
                if init {
                    return Err(Failed);
                }
                continue;
            }
            let id = self.index(i, IndexKind::Free, &explicit, &mut cx);
            match id {
                Ok(id) => free_ids.push(id),
                Err(Failed) => failed = true,
            }
        }
        for (i, scan) in &reduced {
            if *scan {
                continue;
            }
            cx.reduced.insert(i.name.clone());
            failed |= self.index(i, IndexKind::Reduced, &explicit, &mut cx).is_err();
        }
        if failed {
            return Err(Failed);
        }
        let value = self.expr(&e.value, &mut cx);
        cx.in_filter = true;
        let filter = e.filter.as_ref().map(|f| self.expr(f, &mut cx));
        cx.in_filter = false;
        let otherwise = e.otherwise.as_ref().map(|o| self.expr(o, &mut cx));
        let mut positions = Vec::new();
        for t in &e.targets {
            let at: Vec<_> = t.at.iter().map(|a| self.expr(a, &mut cx)).collect();
            positions.push(at.into_iter().collect::<Result<Vec<_>, _>>());
        }
        let value = value?;
        let filter = filter.transpose()?;
        let otherwise = otherwise.transpose()?;
        let mut targets = Vec::new();
        for (n, (t, at)) in e.targets.iter().zip(positions).enumerate() {
            let at = at?;
            let tensor = self.target(e, n, t, &at, value, block)?;
            targets.push(Target { tensor, at });
        }
        let doc_tensor = targets[0].tensor;
        if !e.docs.is_empty() && self.c.tensors[doc_tensor].docs.is_empty() {
            self.c.tensors[doc_tensor].docs = e.docs.clone();
        }
        Ok(Einsum { targets, value, filter, otherwise, join: e.join, free: free_ids, span: e.span })
    }

    /// The tensor a target writes: declared, or made here.
    fn target(
        &mut self,
        e: &syntax::Einsum,
        n: usize,
        t: &syntax::Target,
        at: &[ExprId],
        value: ExprId,
        block: Option<&Block>,
    ) -> Result<TensorId, Failed> {
        let init = block.is_some_and(|b| b.init);
        if let Some(id) = self.by_name.get(&t.name.name).copied() {
            let (kind, rank, decl) = {
                let x = &self.c.tensors[id];
                (x.kind, x.dims.len(), x.span)
            };
            if kind == TensorKind::Input {
                return Err(self.error(
                    Diagnostic::error(
                        "E0257",
                        t.name.span,
                        format!("`{}` is an input and is not written", t.name.name),
                    )
                    .also(decl, "declared here")
                    .help(format!(
                        "declare it `inout {}: ..` to write it in place, or assign another name",
                        t.name.name
                    )),
                ));
            }
            if at.len() != rank {
                return Err(self.error(
                    Diagnostic::error(
                        "E0232",
                        t.span,
                        format!(
                            "`{}` takes {rank} ind{}, not {}",
                            t.name.name,
                            if rank == 1 { "ex" } else { "ices" },
                            at.len()
                        ),
                    )
                    .also(decl, "declared here")
                    .help("write one index expression for each dimension"),
                ));
            }
            if let Some((dtype, _)) = &t.ty
                && *dtype != self.c.tensors[id].dtype
            {
                let declared = self.c.tensors[id].dtype;
                return Err(self.error(
                    Diagnostic::error(
                        "E0258",
                        t.span,
                        format!("`{}` is declared {declared}, not {dtype}", t.name.name),
                    )
                    .also(decl, "declared here")
                    .help("remove the type here: the declaration holds"),
                ));
            }
            if let Some(first) = self.assigned.get(&id).copied() {
                let step_of_state = kind == TensorKind::State && block.is_some_and(|b| !b.init);
                if kind != TensorKind::InOut && !step_of_state {
                    return Err(self.assigned_twice(t, first));
                }
            }
            if init && self.c.tensors[id].dtype.is_packed() {
                let dtype = self.c.tensors[id].dtype;
                let what = format!("`{}` is a state, whose elements are not packed", t.name.name);
                // The block is read on: what else it says is not wrong for this.
                self.error(
                    Diagnostic::error("E0207", t.span, what)
                        .also(decl, "declared here")
                        .help(format!("return it as i8, or assign an output `{dtype} packed(..)` in a statement")),
                );
            }
            let first_time = if init {
                self.c.tensors[id].kind = TensorKind::State;
                self.states.insert(id)
            } else {
                kind == TensorKind::InOut || self.stepped.insert(id)
            };
            if !first_time {
                return Err(self.assigned_twice(t, decl));
            }
            if kind != TensorKind::InOut && block.is_none() {
                self.assigned.insert(id, t.span);
            }
            return Ok(id);
        }
        // A new tensor: its extents are those of its indices.
        let mut dims = Vec::new();
        for (k, (a, place)) in at.iter().zip(&t.at).enumerate() {
            if let (0, true, Some(b)) = (k, init, block) {
                dims.push(Size::Add(Box::new(b.extent.clone()), Box::new(Size::Const(1))));
                continue;
            }
            if let (0, Some(b)) = (k, block) {
                let is_next = Affine::of(&self.c, *a)
                    .is_some_and(|f| f.terms.contains_key(&b.index) && f.as_index().is_none() && f.terms.len() == 1);
                if is_next && !init {
                    let first = if b.rev { self.size_text(&b.extent) } else { "0".to_string() };
                    return Err(self.error(
                        Diagnostic::error("E0259", t.span, format!("state `{}` has no initial value", t.name.name))
                            .help(format!("write `{}[{first}, ..] = ..` first in the block", t.name.name)),
                    ));
                }
            }
            let radix = Affine::of(&self.c, *a).and_then(|f| f.mixed_radix(&self.c));
            match radix {
                Some(order) => dims.push(product_extent(&self.c, &order)),
                None => {
                    return Err(self.error(
                        Diagnostic::error(
                            "E0260",
                            place.span,
                            format!(
                                "the extent of this dimension of `{}` does not follow from its access",
                                t.name.name
                            ),
                        )
                        .help(format!("write one index alone (or `g*R+r`), or declare `{}` as an output", t.name.name)),
                    ));
                }
            }
        }
        let kind = if init { TensorKind::State } else { TensorKind::Intermediate };
        let (dtype, storage) = match &t.ty {
            Some((d, s)) => (*d, s.clone()),
            None => (default_dtype(&self.c, &self.kinds, value, n, e.targets.len(), init), Storage::default()),
        };
        let id = self.declare(Vec::new(), &t.name, dtype, storage, dims, kind)?;
        self.c.tensors[id].declared = t.ty.is_some();
        if init {
            self.states.insert(id);
        } else {
            self.stepped.insert(id);
        }
        if block.is_none() {
            self.assigned.insert(id, t.span);
        }
        Ok(id)
    }

    fn assigned_twice(&mut self, t: &syntax::Target, first: Span) -> Failed {
        self.error(
            Diagnostic::error("E0261", t.span, format!("`{}` is assigned twice", t.name.name))
                .also(first, "first assigned here")
                .help("give the second value another name: a tensor has one definition"),
        )
    }

    /// Indices named in a left-hand access, in order; a segment's name stands for its ragged index.
    fn left_indices(&self, e: &syntax::Expr, out: &mut Vec<Ident>) {
        match &e.kind {
            ExprKind::Name(n) => {
                if let Some(r) = self.ragged.iter().find(|r| r.segment == *n) {
                    if !out.iter().any(|i| i.name == r.name) {
                        out.push(Ident { name: r.name.clone(), span: e.span });
                    }
                    return;
                }
                let scalar = self.by_name.get(n).is_some_and(|t| self.c.tensors[*t].dims.is_empty());
                if !scalar && !self.rank_names.contains_key(n) && !out.iter().any(|i| i.name == *n) {
                    out.push(Ident { name: n.clone(), span: e.span });
                }
            }
            ExprKind::Call(f, args) if f.name == "segment" => {
                if let Some(n) = args.get(1) {
                    self.left_indices(n, out);
                }
            }
            ExprKind::Access(_, items) | ExprKind::Call(_, items) | ExprKind::Tuple(items) => {
                items.iter().for_each(|i| self.left_indices(i, out));
            }
            ExprKind::Unary(_, a) => self.left_indices(a, out),
            ExprKind::Binary(_, a, b) => [a, b].iter().for_each(|x| self.left_indices(x, out)),
            ExprKind::Select(a, b, c) => [a, b, c].iter().for_each(|x| self.left_indices(x, out)),
            ExprKind::Int(_)
            | ExprKind::Float(_)
            | ExprKind::Bool(_)
            | ExprKind::Field(..)
            | ExprKind::Reduce { .. } => {}
        }
    }

    fn alone_at(&self, t: TensorId, at: &[syntax::Expr], init: bool, block: Option<&Block>, cx: &mut Context<'_>) {
        let tensor = &self.c.tensors[t];
        if tensor.dims.len() != at.len() {
            return;
        }
        let state = tensor.kind == TensorKind::State || init;
        for (k, (e, d)) in at.iter().zip(&tensor.dims).enumerate() {
            // Points of a state are checked with the iteration, not as an extent.
            if k == 0 && state && block.is_some() {
                continue;
            }
            if let Some(n) = e.as_name()
                && !self.by_name.contains_key(n)
                && !self.rank_names.contains_key(n)
            {
                cx.alone.entry(n.to_string()).or_default().push((d.clone(), e.span));
            }
        }
    }

    fn alone_in(&self, e: &syntax::Expr, block: Option<&Block>, cx: &mut Context<'_>) {
        let mut go = |x: &syntax::Expr| self.alone_in(x, block, cx);
        match &e.kind {
            ExprKind::Access(name, at) => {
                at.iter().for_each(&mut go);
                if let Some(t) = self.by_name.get(&name.name) {
                    self.alone_at(*t, at, false, block, cx);
                }
            }
            ExprKind::Call(_, items) | ExprKind::Tuple(items) => items.iter().for_each(go),
            ExprKind::Unary(_, a) => go(a),
            ExprKind::Binary(_, a, b) => [a, b].into_iter().for_each(|x| go(x)),
            ExprKind::Select(a, b, c) => [a, b, c].into_iter().for_each(|x| go(x)),
            ExprKind::Reduce { body, .. } => go(body),
            ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Bool(_) | ExprKind::Name(_) | ExprKind::Field(..) => {}
        }
    }

    fn clash(&self, name: &str, a: (&Size, Span), b: (&Size, Span)) -> Diagnostic {
        let (x, y) = (self.size_text(a.0), self.size_text(b.0));
        Diagnostic::error("E0262", b.1, format!("index `{name}` runs over both {x} and {y}"))
            .label(format!("extent {y} here"))
            .also(a.1, format!("extent {x} here"))
            .help("use two indices, or give both dimensions the same rank")
    }

    fn check_extents(&mut self, name: &str, extent: &Size, place: Span, cx: &Context<'_>) -> Result<(), Failed> {
        for (d, span) in cx.alone.get(name).into_iter().flatten() {
            if !size_at_most(extent, d) && !self.required_at_most(extent, d) {
                let d = self.clash(name, (extent, place), (d, *span));
                return Err(self.error(d));
            }
        }
        Ok(())
    }

    /// Whether a `require` above says `a <= b`.
    fn required_at_most(&self, a: &Size, b: &Size) -> bool {
        let size = |e: ExprId| match &self.c.exprs[e] {
            Expr::Size(s) => Some(s),
            _ => None,
        };
        self.c.requires.iter().any(|r| {
            let (x, y) = match &self.c.exprs[*r] {
                Expr::Binary(BinaryOp::Le, x, y) => (*x, *y),
                Expr::Binary(BinaryOp::Ge, x, y) => (*y, *x),
                _ => return false,
            };
            matches!((size(x), size(y)), (Some(x), Some(y)) if same_size(x, a) && same_size(y, b))
        })
    }

    fn index(
        &mut self,
        i: &Ident,
        kind: IndexKind,
        explicit: &HashMap<String, (Size, Span)>,
        cx: &mut Context<'_>,
    ) -> Result<IndexId, Failed> {
        if let Some(id) = cx.indices.get(&i.name) {
            return Ok(*id);
        }
        let ragged = self.ragged.iter().find(|r| r.name == i.name).map(|r| (r.extent.clone(), i.span));
        let written = explicit.get(&i.name).cloned().or(ragged);
        let extent = match &written {
            Some((s, place)) => {
                self.check_extents(&i.name, s, *place, cx)?;
                s.clone()
            }
            None => match cx.alone.get(&i.name).map(|v| v.as_slice()) {
                Some([first, rest @ ..]) => {
                    if let Some(other) = rest.iter().find(|(s, _)| !same_size(s, &first.0)) {
                        let d = self.clash(&i.name, (&first.0, first.1), (&other.0, other.1));
                        return Err(self.error(d));
                    }
                    first.0.clone()
                }
                _ => match self.rank_names.get(&i.name.to_ascii_uppercase()) {
                    Some(r) => Size::Rank(*r),
                    None => return Err(self.unbound(i, kind)),
                },
            },
        };
        self.index_names.entry(i.name.clone()).or_insert(i.span);
        let rank = rank_of(&extent);
        let id = self.c.indices.push(Index { name: i.name.clone(), extent, rank, kind, span: i.span });
        cx.indices.insert(i.name.clone(), id);
        Ok(id)
    }

    fn unbound(&mut self, i: &Ident, kind: IndexKind) -> Failed {
        let how = match kind {
            IndexKind::Reduced => format!("`sum({} in EXTENT) ..`", i.name),
            IndexKind::Free | IndexKind::Iterated => format!("`.. for {} in EXTENT = ..`", i.name),
        };
        let what = Diagnostic::error("E0263", i.span, format!("index `{}` is bound to no extent", i.name));
        self.error(
            what.label("it stands alone in no dimension, and no rank has its capital")
                .help(format!("write {how}, or declare rank `{}`", i.name.to_ascii_uppercase())),
        )
    }
}

fn rank_of(s: &Size) -> Option<crate::cascade::RankId> {
    match s {
        Size::Rank(r) => Some(*r),
        Size::Const(_)
        | Size::Add(..)
        | Size::Sub(..)
        | Size::Mul(..)
        | Size::Div(..)
        | Size::CeilDiv(..)
        | Size::Min(..)
        | Size::Max(..) => None,
    }
}

/// Calls `f` on the binders of every reduction and scan under `e`, outermost first.
fn reductions<'e>(e: &'e syntax::Expr, f: &mut impl FnMut(&'e [syntax::Binder], bool)) {
    match &e.kind {
        ExprKind::Reduce { over, scan, body, .. } => {
            f(over, *scan);
            reductions(body, f);
        }
        ExprKind::Access(_, items) | ExprKind::Call(_, items) | ExprKind::Tuple(items) => {
            items.iter().for_each(|i| reductions(i, f));
        }
        ExprKind::Unary(_, a) => reductions(a, f),
        ExprKind::Binary(_, a, b) => {
            reductions(a, f);
            reductions(b, f);
        }
        ExprKind::Select(a, b, c) => {
            reductions(a, f);
            reductions(b, f);
            reductions(c, f);
        }
        ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Bool(_) | ExprKind::Name(_) | ExprKind::Field(..) => {}
    }
}

/// Where `name` is mentioned.
fn mention(roots: &[&syntax::Expr], name: &str) -> Option<Span> {
    roots.iter().find_map(|e| match &e.kind {
        ExprKind::Name(n) => (n == name).then_some(e.span),
        ExprKind::Access(_, items) | ExprKind::Call(_, items) | ExprKind::Tuple(items) => {
            mention(&items.iter().collect::<Vec<_>>(), name)
        }
        ExprKind::Unary(_, a) => mention(&[a], name),
        ExprKind::Binary(_, a, b) => mention(&[a, b], name),
        ExprKind::Select(a, b, c) => mention(&[a, b, c], name),
        ExprKind::Reduce { body, .. } => mention(&[body], name),
        ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Bool(_) | ExprKind::Field(..) => None,
    })
}
