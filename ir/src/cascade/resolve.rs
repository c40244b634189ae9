//! The syntax tree to the IR: names, ranks, indices and extents.
//!
//! An index binds, in this order, to the extent written at its binder (`for`, `in`, `iter`, `ragged`), to the dimension
//! where it stands alone, or to the rank of its capital. Invariants: one diagnostic a mistake; a statement with errors
//! is left out and the tensor it assigns is still known, so that what follows is checked too.

mod cycle;
mod expr;
mod statement;

use std::collections::{HashMap, HashSet};

use super::syntax::{self, ExprKind};
use super::types::Kind;
use super::*;
use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::ops::{BinaryOp, UnaryOp};

/// The most expression nodes a cascade may have once functions are expanded.
pub const MAX_NODES: usize = 200_000;
/// The most nodes one statement may have as a tree, once functions are expanded.
pub const MAX_TREE: u32 = 20_000;
/// The deepest expression once functions are expanded.
pub const MAX_HEIGHT: u32 = 200;
/// The most dimensions of a tensor, and ranks of a cascade.
pub const MAX_DIMS: usize = 64;

/// Resolves every cascade of `file`; cascades with errors are left out.
pub fn resolve(file: &syntax::File, diagnostics: &mut Vec<Diagnostic>) -> Module {
    let mut items = Items::default();
    let mut names: HashMap<&str, Span> = HashMap::new();
    for item in &file.items {
        let name = match item {
            syntax::Item::Function(f) => &f.name,
            syntax::Item::Monoid(m) => &m.name,
            syntax::Item::Cascade(c) => &c.name,
        };
        if let Some(first) = names.insert(&name.name, name.span) {
            diagnostics.push(
                Diagnostic::error("E0201", name.span, format!("`{}` is defined twice", name.name))
                    .also(first, "first defined here")
                    .help("give each function, monoid and cascade of a file its own name"),
            );
        }
        match item {
            syntax::Item::Function(f) => {
                items.functions.insert(&f.name.name, f);
            }
            syntax::Item::Monoid(m) => {
                items.monoids.insert(&m.name.name, m);
            }
            syntax::Item::Cascade(_) => {}
        }
        if !matches!(item, syntax::Item::Cascade(_)) && expr::is_builtin(&name.name) {
            diagnostics.push(
                Diagnostic::error("E0202", name.span, format!("`{}` is a built-in name", name.name))
                    .help("choose another name"),
            );
        }
    }
    for item in &file.items {
        match item {
            syntax::Item::Function(f) => {
                if expr::check_function(f, &items, diagnostics) {
                    items.recursive.insert(&f.name.name);
                }
            }
            syntax::Item::Monoid(_) | syntax::Item::Cascade(_) => {}
        }
    }
    for item in &file.items {
        if let syntax::Item::Monoid(m) = item {
            expr::monoid(m, &items, diagnostics);
        }
    }
    let mut module = Module { docs: file.docs.clone(), cascades: Vec::new() };
    for item in &file.items {
        if let syntax::Item::Cascade(c) = item {
            let before = diagnostics.len();
            let mut r = Resolver::new(c, &items, diagnostics);
            r.broken.extend(c.unreadable.iter().cloned());
            r.header(c);
            r.body(c);
            r.outputs(c);
            let cascade = r.c;
            let sound = diagnostics[before..].iter().all(|d| d.severity != Severity::Error);
            if sound && c.unreadable.is_empty() {
                module.cascades.push(cascade);
            }
        }
    }
    module
}

/// The functions and monoids of a file.
#[derive(Default)]
struct Items<'a> {
    functions: HashMap<&'a str, &'a syntax::Function>,
    monoids: HashMap<&'a str, &'a syntax::Monoid>,
    /// Functions that call themselves, and are not expanded.
    recursive: HashSet<&'a str>,
}

/// A `ragged` declaration.
struct RaggedIndex {
    name: String,
    extent: Size,
    offsets: TensorId,
    segment: String,
}

/// An error has been reported.
struct Failed;

struct Resolver<'a, 'd> {
    items: &'a Items<'a>,
    diagnostics: &'d mut Vec<Diagnostic>,
    c: Cascade,
    by_name: HashMap<String, TensorId>,
    rank_names: HashMap<String, RankId>,
    /// Names of parameters and outputs with errors, and of tensors of failed statements: no further complaint.
    broken: HashSet<String>,
    /// Tensors whose elements have values.
    assigned: HashMap<TensorId, Span>,
    /// Where each name is first used as an index.
    index_names: HashMap<String, Span>,
    ragged: Vec<RaggedIndex>,
    monoid_ids: HashMap<String, MonoidId>,
    kinds: Vec<Kind>,
    /// Tree size and height of every expression.
    measures: Vec<(u32, u32)>,
    /// Tensors whose first point, and whose step or value, has been assigned.
    states: HashSet<TensorId>,
    stepped: HashSet<TensorId>,
    /// Whether a statement has outgrown its limit: nothing more of it is expanded.
    overgrown: bool,
}

impl<'a, 'd> Resolver<'a, 'd> {
    fn new(c: &syntax::Cascade, items: &'a Items<'a>, diagnostics: &'d mut Vec<Diagnostic>) -> Self {
        let cascade = Cascade {
            name: c.name.name.clone(),
            docs: c.docs.clone(),
            exact: c.exact,
            ranks: Arena::new(),
            tensors: Arena::new(),
            indices: Arena::new(),
            exprs: Arena::new(),
            monoids: Arena::new(),
            params: Vec::new(),
            outputs: Vec::new(),
            requires: Vec::new(),
            stmts: Vec::new(),
            spans: Vec::new(),
        };
        Resolver {
            items,
            diagnostics,
            c: cascade,
            by_name: HashMap::new(),
            rank_names: HashMap::new(),
            broken: HashSet::new(),
            assigned: HashMap::new(),
            index_names: HashMap::new(),
            ragged: Vec::new(),
            monoid_ids: HashMap::new(),
            kinds: Vec::new(),
            measures: Vec::new(),
            states: HashSet::new(),
            stepped: HashSet::new(),
            overgrown: false,
        }
    }

    fn error(&mut self, d: Diagnostic) -> Failed {
        self.diagnostics.push(d);
        Failed
    }

    fn header(&mut self, c: &syntax::Cascade) {
        for (name, fixed) in &c.ranks {
            if let Some(first) = self.rank_names.get(&name.name) {
                let first = self.c.ranks[*first].span;
                self.error(
                    Diagnostic::error("E0203", name.span, format!("rank `{}` is declared twice", name.name))
                        .also(first, "first declared here")
                        .help("remove one of the two"),
                );
                continue;
            }
            let id = self.c.ranks.push(Rank { name: name.name.clone(), fixed: *fixed, span: name.span });
            self.rank_names.insert(name.name.clone(), id);
        }
        if c.ranks.len() > MAX_DIMS {
            self.error(
                Diagnostic::error("E0204", c.name.span, format!("more than {MAX_DIMS} ranks"))
                    .help("write the small extents as numbers"),
            );
        }
        for p in &c.params {
            let dims = self.dims(&p.ty);
            let Ok(dims) = dims else {
                self.broken.insert(p.name.name.clone());
                continue;
            };
            let kind = if p.inout { TensorKind::InOut } else { TensorKind::Input };
            if let Some(default) = &p.default
                && (!dims.is_empty() || p.inout)
            {
                self.error(
                    Diagnostic::error("E0205", default.span, "only a scalar input has a default")
                        .help("remove the default, or the extents"),
                );
            }
            let Ok(id) = self.declare(p.docs.clone(), &p.name, p.ty.dtype, p.ty.storage.clone(), dims, kind) else {
                self.broken.insert(p.name.name.clone());
                continue;
            };
            self.c.params.push(id);
            self.assigned.insert(id, p.span);
        }
        // Defaults may mention ranks and other scalars.
        for p in &c.params {
            let (Some(default), Some(id)) = (&p.default, self.by_name.get(&p.name.name).copied()) else { continue };
            let mut cx = statement::Context::constant("a default");
            if let Ok(e) = self.expr(default, &mut cx) {
                self.c.tensors[id].default = Some(e);
            }
        }
        for o in &c.outputs {
            if o.slice.is_some() {
                if let Some(id) = self.by_name.get(&o.name.name) {
                    let first = self.c.tensors[*id].span;
                    self.name_taken(&o.name, first, "tensor");
                }
                continue;
            }
            match self.dims(&o.ty) {
                Ok(dims) => {
                    let storage = o.ty.storage.clone();
                    if self.declare(o.docs.clone(), &o.name, o.ty.dtype, storage, dims, TensorKind::Output).is_err() {
                        self.broken.insert(o.name.name.clone());
                    }
                }
                Err(Failed) => {
                    self.broken.insert(o.name.name.clone());
                }
            }
        }
    }

    fn name_taken(&mut self, name: &syntax::Ident, first: Span, what: &str) -> Failed {
        self.error(
            Diagnostic::error("E0206", name.span, format!("`{}` already names a {what}", name.name))
                .also(first, format!("the {what}"))
                .help("choose another name"),
        )
    }

    fn declare(
        &mut self,
        docs: Vec<String>,
        name: &syntax::Ident,
        dtype: DType,
        storage: Storage,
        dims: Vec<Size>,
        kind: TensorKind,
    ) -> Result<TensorId, Failed> {
        if expr::is_builtin(&name.name) {
            return Err(self.error(
                Diagnostic::error("E0202", name.span, format!("`{}` is a built-in name", name.name))
                    .help("choose another name"),
            ));
        }
        if let Some(rank) = self.rank_names.get(&name.name) {
            let first = self.c.ranks[*rank].span;
            return Err(self.name_taken(name, first, "rank"));
        }
        if let Some(id) = self.by_name.get(&name.name) {
            let first = self.c.tensors[*id].span;
            return Err(self.name_taken(name, first, "tensor"));
        }
        if let Some(first) = self.index_names.get(&name.name).copied() {
            return Err(self.tensor_is_index(name, first));
        }
        if dims.len() > MAX_DIMS {
            return Err(self.error(
                Diagnostic::error("E0204", name.span, format!("`{}` has more than {MAX_DIMS} dimensions", name.name))
                    .help("merge dimensions"),
            ));
        }
        let stored = matches!(kind, TensorKind::Input | TensorKind::InOut | TensorKind::Output);
        if dtype.is_packed() && stored && dims.is_empty() {
            return Err(self.error(
                Diagnostic::error("E0207", name.span, format!("`{}` is one {dtype}, half a byte", name.name))
                    .help("declare a scalar i8 or i32"),
            ));
        }
        if dtype.is_packed() && stored && storage.packing.is_none() {
            return Err(self.error(
                Diagnostic::error(
                    "E0207",
                    name.span,
                    format!("`{}` packs two {dtype} to a byte in no declared order", name.name),
                )
                .help(
                    "write `packed(low)` if even elements take the low bits, `packed(high)` otherwise, after the type",
                ),
            ));
        }
        if storage.packing.is_some() && !dtype.is_packed() {
            return Err(self.error(
                Diagnostic::error("E0207", name.span, format!("{dtype} elements fill whole bytes and are not packed"))
                    .help("remove `packed(..)`, or declare i4 or u4"),
            ));
        }
        let declared = !matches!(kind, TensorKind::Intermediate);
        let span = name.span;
        let tensor =
            Tensor { name: name.name.clone(), docs, dtype, declared, storage, dims, kind, default: None, span };
        let id = self.c.tensors.push(tensor);
        self.by_name.insert(name.name.clone(), id);
        Ok(id)
    }

    fn tensor_is_index(&mut self, name: &syntax::Ident, other: Span) -> Failed {
        self.error(
            Diagnostic::error("E0208", name.span, format!("`{}` names both a tensor and an index", name.name))
                .also(other, "also used here")
                .help("rename one of the two: a name means one thing in a cascade"),
        )
    }

    fn dims(&mut self, ty: &syntax::TensorType) -> Result<Vec<Size>, Failed> {
        let mut out = Vec::new();
        let mut failed = false;
        for d in &ty.dims {
            match self.size(d) {
                Ok(s) => out.push(s),
                Err(Failed) => failed = true,
            }
        }
        if failed {
            return Err(Failed);
        }
        let fixed: Vec<u64> = self.c.ranks.iter().map(|(_, r)| r.fixed.unwrap_or(0)).collect();
        let known = |s: &Size| {
            let mut all = true;
            s.for_each_rank(&mut |r| all &= self.c.ranks[r].fixed.is_some());
            all.then(|| s.eval(&fixed))
        };
        let mut elems: Option<u64> = Some(1);
        for (d, e) in out.iter().zip(&ty.dims) {
            match known(d) {
                Some(Ok(n)) => elems = elems.and_then(|p| p.checked_mul(n.max(1))),
                Some(Err(why)) => {
                    return Err(self.error(
                        Diagnostic::error("E0209", e.span, format!("this extent {why}"))
                            .help("extents are 0 to 2^63-1"),
                    ));
                }
                None => {}
            }
        }
        match elems {
            Some(n) if n <= i64::MAX as u64 / 8 => Ok(out),
            _ => Err(self.error(
                Diagnostic::error("E0209", ty.span, "this tensor has more bytes than an address can count")
                    .help("the product of its extents must stay below 2^60"),
            )),
        }
    }

    /// An extent: integers, ranks, `+ - * /` and `ceildiv(a, b)`.
    fn size(&mut self, e: &syntax::Expr) -> Result<Size, Failed> {
        let two = |a, b| (Box::new(a), Box::new(b));
        match &e.kind {
            ExprKind::Int(n) if *n >= 0 => Ok(Size::Const(*n as u64)),
            ExprKind::Name(n) => match self.rank_names.get(n) {
                Some(r) => Ok(Size::Rank(*r)),
                None => Err(self.unknown_rank(n, e.span)),
            },
            ExprKind::Binary(op, a, b)
                if matches!(op, BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Div) =>
            {
                let (a, b) = two(self.size(a)?, self.size(b)?);
                Ok(match op {
                    BinaryOp::Add => Size::Add(a, b),
                    BinaryOp::Sub => Size::Sub(a, b),
                    BinaryOp::Mul => Size::Mul(a, b),
                    _ => Size::Div(a, b),
                })
            }
            ExprKind::Call(f, args) if matches!(f.name.as_str(), "ceildiv" | "min" | "max") && args.len() == 2 => {
                let (a, b) = two(self.size(&args[0])?, self.size(&args[1])?);
                Ok(match f.name.as_str() {
                    "ceildiv" => Size::CeilDiv(a, b),
                    "min" => Size::Min(a, b),
                    _ => Size::Max(a, b),
                })
            }
            _ => Err(self.error(Diagnostic::error("E0210", e.span, "this is not an extent").help(
                "an extent is made of integers and ranks with `+ - * /` and `ceildiv(a, b)`, `min(a, b)`, `max(a, b)`",
            ))),
        }
    }

    fn unknown_rank(&mut self, name: &str, span: Span) -> Failed {
        let known: Vec<String> = self.c.ranks.iter().map(|(_, r)| r.name.clone()).collect();
        let help = match closest(name, &known) {
            Some(near) => format!("write `{near}`, or declare it: `cascade {}[.., {name}](..)`", self.c.name),
            None => format!("declare it: `cascade {}[.., {name}](..)`", self.c.name),
        };
        self.error(Diagnostic::error("E0211", span, format!("there is no rank `{name}`")).help(help))
    }

    fn outputs(&mut self, c: &syntax::Cascade) {
        if c.outputs.is_empty() && !c.params.iter().any(|p| p.inout) {
            self.error(
                Diagnostic::error("E0212", c.name.span, format!("cascade `{}` returns nothing", c.name.name))
                    .help("declare an output `-> (Y: f32[..])`, or an `inout` parameter"),
            );
        }
        for o in &c.outputs {
            if self.broken.contains(&o.name.name) {
                continue;
            }
            let source = match &o.slice {
                None => {
                    let Some(id) = self.by_name.get(&o.name.name).copied() else { continue };
                    if !self.assigned.contains_key(&id) {
                        self.error(
                            Diagnostic::error("E0213", o.span, format!("output `{}` is never assigned", o.name.name))
                                .help(format!("add a statement `{}[..] = ..`", o.name.name)),
                        );
                        continue;
                    }
                    Ok((OutputSource::Whole(id), self.c.tensors[id].dims.clone()))
                }
                Some((state, slice)) => self.output_slice(o, state, slice),
            };
            let Ok((source, dims)) = source else { continue };
            self.c.outputs.push(Output { name: o.name.name.clone(), dtype: o.ty.dtype, dims, source, span: o.span });
        }
    }

    fn output_slice(
        &mut self,
        o: &syntax::Output,
        state: &syntax::Ident,
        slice: &syntax::Slice,
    ) -> Result<(OutputSource, Vec<Size>), Failed> {
        let dims = self.dims(&o.ty)?;
        if self.broken.contains(&state.name) {
            return Err(Failed);
        }
        if o.ty.dtype.is_packed() {
            let what = format!("`{}` is a slice of a state, whose elements are not packed", o.name.name);
            return Err(self.error(
                Diagnostic::error("E0207", o.ty.span, what)
                    .help(format!("return it as i8, or assign an output `{} packed(..)` in a statement", o.ty.dtype)),
            ));
        }
        let id = match self.by_name.get(&state.name).copied() {
            Some(id) if self.c.tensors[id].kind == TensorKind::State => id,
            _ => {
                return Err(self.error(
                    Diagnostic::error("E0214", state.span, format!("`{}` is not a state", state.name)).help(format!(
                        "only states of an `iter` are returned as slices; otherwise assign `{}` in a statement",
                        o.name.name
                    )),
                ));
            }
        };
        let state_dims = self.c.tensors[id].dims.clone();
        let points = state_dims[0].clone();
        let (source, want) = match slice {
            syntax::Slice::Points(from, to) => {
                let from = from.as_ref().map_or(Ok(Size::Const(0)), |e| self.size(e))?;
                let to = to.as_ref().map_or(Ok(points.clone()), |e| self.size(e))?;
                if !affine::size_at_most(&to, &points) && affine::size_at_most(&points, &to) {
                    return Err(self.past_the_end(o, &state.name));
                }
                let length = Size::Sub(Box::new(to.clone()), Box::new(from.clone()));
                let want = [vec![length], state_dims[1..].to_vec()].concat();
                (OutputSource::Points { state: id, from, to }, want)
            }
            syntax::Slice::Point(at) => {
                let at = self.size(at)?;
                if affine::size_at_most(&points, &at) {
                    return Err(self.past_the_end(o, &state.name));
                }
                (OutputSource::Point { state: id, at }, state_dims[1..].to_vec())
            }
        };
        if want.len() != dims.len() || want.iter().zip(&dims).any(|(a, b)| !affine::same_size(a, b)) {
            let want: Vec<_> = want.iter().map(|s| self.size_text(&simplified(s))).collect();
            return Err(self.error(
                Diagnostic::error("E0215", o.ty.span, format!("this slice of `{}` has other extents", state.name))
                    .help(format!("write `{}[{}]`", o.ty.dtype, want.join(", "))),
            ));
        }
        Ok((source, dims))
    }

    fn past_the_end(&mut self, o: &syntax::Output, state: &str) -> Failed {
        self.error(
            Diagnostic::error("E0216", o.span, format!("this slice runs past the last point of `{state}`")).help(
                format!("a state over T has points 0 to T: `{state}[1..]` is points 1 to T, `{state}[T]` the last"),
            ),
        )
    }

    fn size_text(&self, s: &Size) -> String {
        print::size_text(&self.c, s)
    }

    fn push(&mut self, expr: Expr, span: Span) -> Result<ExprId, Failed> {
        let (mut size, mut height) = (1u32, 0u32);
        expr.for_each_operand(|id| {
            let (s, h) = self.measures[crate::arena::Id::index(id)];
            size = size.saturating_add(s);
            height = height.max(h);
        });
        height += 1;
        if size > MAX_TREE || height > MAX_HEIGHT || self.c.exprs.len() >= MAX_NODES {
            if std::mem::replace(&mut self.overgrown, true) {
                return Err(Failed);
            }
            return Err(self.error(
                Diagnostic::error("E0217", span, "this expression grows too large once functions are expanded")
                    .label(format!("at most {MAX_TREE} nodes a statement, {MAX_HEIGHT} deep, {MAX_NODES} a cascade"))
                    .help("name a part of it in a statement of its own"),
            ));
        }
        let kind = types::kind_of(&self.c, &self.kinds, &expr);
        self.kinds.push(kind);
        self.measures.push((size, height));
        Ok(self.c.push_expr(expr, span))
    }

    fn kind(&self, e: ExprId) -> Kind {
        self.kinds[crate::arena::Id::index(e)]
    }
}

/// `a - b` written without the cancelling parts where that is a constant or a rank.
fn simplified(s: &Size) -> Size {
    match s {
        Size::Sub(a, b) => match (&**a, &**b) {
            (a, Size::Const(0)) => a.clone(),
            (Size::Add(x, y), b) if **y == *b => (**x).clone(),
            _ => s.clone(),
        },
        _ => s.clone(),
    }
}

/// The known name nearest to `name`, if one is near.
fn closest(name: &str, known: &[String]) -> Option<String> {
    let distance = |a: &str, b: &str| {
        let b: Vec<char> = b.chars().collect();
        let mut row: Vec<usize> = (0..=b.len()).collect();
        for (i, x) in a.chars().enumerate() {
            let mut diagonal = row[0];
            row[0] = i + 1;
            for (j, y) in b.iter().enumerate() {
                let next = (diagonal + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
                diagonal = row[j + 1];
                row[j + 1] = next;
            }
        }
        row[b.len()]
    };
    let near = known.iter().map(|k| (distance(name, k), k)).min()?;
    (near.0 <= name.len() / 2 && near.0 <= 2).then(|| near.1.clone())
}

fn unary_from_name(name: &str) -> Option<UnaryOp> {
    UnaryOp::from_name(name)
}
