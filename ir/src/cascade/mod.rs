//! The cascade IR: what is computed, as a list of Einsums with every name resolved.
//!
//! An Einsum maps, reduces and populates (EDGE; FuseMax, arXiv 2406.10491). The text form is `text` → syntax tree →
//! this; the printer goes the other way. Invariants, checked by `verify`: every [`Expr::Read`] has one access
//! expression per dimension; every index used in a statement is bound in it (free, reduced or iterated); user
//! functions are expanded; a filter is a conjunction kept whole in [`Einsum::filter`].

pub mod affine;
pub mod bind;
pub mod build;
pub mod eval;
pub mod format;
pub mod parse;
pub mod print;
pub mod resolve;
pub mod syntax;
pub mod types;
pub mod verify;

pub use format::format;
pub use print::print;
pub use verify::verify;

use crate::arena::Arena;
use crate::define_ids;
use crate::diag::{Diagnostic, Diagnostics, Severity, Span};
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

define_ids! {
    /// A rank of a cascade.
    RankId,
    /// A tensor of a cascade: parameter, intermediate, state or output.
    TensorId,
    /// An index variable; each Einsum has its own.
    IndexId,
    /// An expression node.
    ExprId,
    /// A user-defined monoid.
    MonoidId,
}

/// Reads, resolves and verifies `source`.
///
/// ```
/// use einfall_ir::cascade::parse;
///
/// let module = parse("cascade double[M](x: f32[M]) -> (y: f32[M]) { y[m] = 2.0 * x[m] }").expect("it is right");
/// assert_eq!(module.cascades[0].name, "double");
/// let wrong = parse("cascade double[M](x: f32[M]) -> (y: f32[M]) { y[m] = 2.0 * x[n] }").expect_err("no index n");
/// assert_eq!(wrong[0].code, "E0226");
/// ```
///
/// # Errors
/// Every error found, at least one, in source order, with the text.
pub fn parse(source: &str) -> Result<Module, Diagnostics> {
    let (module, diagnostics) = check(source);
    match module {
        Some(module) => Ok(module),
        None => Err(Diagnostics::new(diagnostics, source)),
    }
}

/// Like [`parse()`], but returns warnings with a module too; no module if there is an error.
///
/// ```
/// use einfall_ir::cascade::check;
///
/// let text = "cascade c[M](x: f32[M]) -> (y: f32[M]) { t[m] = x[m]; y[m] = x[m] }";
/// let (module, warnings) = check(text);
/// assert!(module.is_some());
/// assert_eq!(warnings[0].code, "W0001"); // t is never read
/// ```
pub fn check(source: &str) -> (Option<Module>, Vec<Diagnostic>) {
    let parsed = parse::parse_file(source);
    let mut diagnostics = parsed.diagnostics;
    let module = resolve::resolve(&parsed.file, &mut diagnostics);
    for c in &module.cascades {
        diagnostics.extend(verify(c));
    }
    diagnostics.sort_by_key(|d| (d.primary.0.start, d.code));
    diagnostics.truncate(parse::MAX_DIAGNOSTICS);
    let failed = diagnostics.iter().any(|d| d.severity == Severity::Error);
    if failed {
        // What is unused is known only once everything can be read.
        diagnostics.retain(|d| d.severity == Severity::Error);
    }
    ((!failed).then_some(module), diagnostics)
}

/// A file of cascades.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Module {
    /// Its `//!` lines.
    pub docs: Vec<String>,
    /// Its cascades in order.
    pub cascades: Vec<Cascade>,
}

/// One cascade: a DAG of Einsums, with iterative ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Cascade {
    /// Its name, unique in the file.
    pub name: String,
    /// Its `///` lines.
    pub docs: Vec<String>,
    /// Whether default rounding points are forbidden (`@exact`).
    pub exact: bool,
    /// The ranks of its header, in order.
    pub ranks: Arena<RankId, Rank>,
    /// Every tensor: first the parameters in order, then the others as they appear.
    pub tensors: Arena<TensorId, Tensor>,
    /// Every index of every statement.
    pub indices: Arena<IndexId, Index>,
    /// Expression nodes; a node's operands come before it.
    pub exprs: Arena<ExprId, Expr>,
    /// User-defined monoids it reduces with.
    pub monoids: Arena<MonoidId, Monoid>,
    /// Parameters in declaration order.
    pub params: Vec<TensorId>,
    /// Outputs in declaration order.
    pub outputs: Vec<Output>,
    /// Declared facts over ranks and scalar parameters: a caller must keep them.
    pub requires: Vec<ExprId>,
    /// Statements in the order written; also a valid evaluation order.
    pub stmts: Vec<Stmt>,
    /// Source place of every expression, parallel to `exprs`.
    pub spans: Vec<Span>,
}

/// A named extent.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Rank {
    /// Upper-case name.
    pub name: String,
    /// Its extent if the text fixes it (`E = 128`); otherwise bound at launch.
    pub fixed: Option<u64>,
    /// Where it is declared.
    #[serde(skip)]
    pub span: Span,
}

/// An extent: an integer expression over ranks. Values are non-negative; `Sub` and inexact `Div` are checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Size {
    /// A literal.
    Const(u64),
    /// A rank's extent.
    Rank(RankId),
    /// Sum.
    Add(Box<Size>, Box<Size>),
    /// Difference; negative is an error at binding.
    Sub(Box<Size>, Box<Size>),
    /// Product.
    Mul(Box<Size>, Box<Size>),
    /// Floor quotient.
    Div(Box<Size>, Box<Size>),
    /// Quotient rounded up.
    CeilDiv(Box<Size>, Box<Size>),
    /// The smaller.
    Min(Box<Size>, Box<Size>),
    /// The larger.
    Max(Box<Size>, Box<Size>),
}

/// What a tensor is to its cascade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorKind {
    /// Given by the caller, read-only.
    Input,
    /// Given by the caller, read and written in place.
    InOut,
    /// Computed and forgotten.
    Intermediate,
    /// Lives on T+1 points of an iterative rank, its first dimension.
    State,
    /// Computed and returned whole.
    Output,
}

/// A multi-dimensional array with a type; a scalar has no dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Case-sensitive name.
    pub name: String,
    /// Its `///` lines.
    pub docs: Vec<String>,
    /// Element type as stored; intermediates are f32 unless declared.
    pub dtype: DType,
    /// Whether the text declares the type (a declared intermediate type is a rounding point).
    pub declared: bool,
    /// How elements are packed or scaled, if not plainly.
    pub storage: Storage,
    /// Extents, outermost first. A state's first dimension is `T + 1`.
    pub dims: Vec<Size>,
    /// What it is.
    pub kind: TensorKind,
    /// For a scalar parameter, its value when the caller gives none.
    pub default: Option<ExprId>,
    /// Where it is first named.
    pub span: Span,
}

/// Packing order and block scaling of a tensor's storage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Storage {
    /// Order of sub-byte elements within a byte along the last dimension.
    pub packing: Option<PackOrder>,
    /// One scale of `dtype` per `block` consecutive elements of the last dimension.
    pub block_scale: Option<BlockScale>,
}

/// Which of two packed elements takes the low bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PackOrder {
    /// Even elements in the low bits.
    LowFirst,
    /// Even elements in the high bits.
    HighFirst,
}

/// A block-scaled form: the element is `stored * scale[.., i / block]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlockScale {
    /// Elements per scale.
    pub block: u64,
    /// Type of the scales.
    pub dtype: DType,
}

impl Tensor {
    /// Element type and extents of the array that a caller gives or gets: of packed elements their bytes. Rows begin at a
    /// byte, so that the last one of an odd extent is half used.
    ///
    /// ```
    /// use einfall_ir::cascade::{parse, print::size_text};
    /// use einfall_ir::dtype::DType;
    ///
    /// let c = parse("cascade c[N, K](w: i4[N,K] packed(low)) -> (y: i32[N]) { y[n] = sum(k) w[n,k] }");
    /// let c = c.expect("it is right").cascades.remove(0);
    /// let (dtype, dims) = c.tensors[c.params[0]].stored();
    /// assert_eq!((dtype, size_text(&c, &dims[1]).as_str()), (DType::U8, "ceildiv(K, 2)"));
    /// ```
    pub fn stored(&self) -> (DType, Vec<Size>) {
        let mut dims = self.dims.clone();
        match dims.last_mut() {
            Some(last) if self.storage.packing.is_some() => {
                *last = match &last {
                    Size::Const(n) => Size::Const(n.div_ceil(2)),
                    other => Size::CeilDiv(Box::new((*other).clone()), Box::new(Size::Const(2))),
                };
                (DType::U8, dims)
            }
            Some(_) | None => (self.dtype, dims),
        }
    }
}

/// A returned tensor: `tensor` whole, or a slice of a state.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// Its name in the signature.
    pub name: String,
    /// The type returned (may round the source once more).
    pub dtype: DType,
    /// Its extents.
    pub dims: Vec<Size>,
    /// Where its elements come from.
    pub source: OutputSource,
    /// Where it is declared.
    pub span: Span,
}

/// Where an output's elements come from.
#[derive(Clone, Debug, PartialEq)]
pub enum OutputSource {
    /// The tensor of the same name, assigned by a statement.
    Whole(TensorId),
    /// Points `from .. to` (exclusive) of a state's first dimension.
    Points {
        /// The state.
        state: TensorId,
        /// First point.
        from: Size,
        /// One past the last point.
        to: Size,
    },
    /// One point of a state; the first dimension is dropped.
    Point {
        /// The state.
        state: TensorId,
        /// The point.
        at: Size,
    },
}

/// How an index is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexKind {
    /// It appears on the left-hand side.
    Free,
    /// A reduction of the statement binds it.
    Reduced,
    /// The enclosing `iter` binds it.
    Iterated,
}

/// An index variable ranging over `0 .. extent`.
#[derive(Clone, Debug, PartialEq)]
pub struct Index {
    /// Lower-case name.
    pub name: String,
    /// Its range.
    pub extent: Size,
    /// The named rank it ranges over; none for anonymous extents.
    pub rank: Option<RankId>,
    /// How it is bound.
    pub kind: IndexKind,
    /// Where it first appears.
    pub span: Span,
}

/// A statement.
#[derive(Clone, Debug, PartialEq)]
pub enum Stmt {
    /// An Einsum outside iteration.
    Einsum(Einsum),
    /// An iterative rank with its states.
    Iter(Iter),
}

/// `targets = value  where filter  else otherwise`.
#[derive(Clone, Debug, PartialEq)]
pub struct Einsum {
    /// What is assigned: one target, or one per result of a multi-result reduction.
    pub targets: Vec<Target>,
    /// The right-hand side.
    pub value: ExprId,
    /// Points kept: a predicate over free and reduced indices. A conjunct over reduced indices restricts the
    /// reductions that bind them; a conjunct over free indices alone removes output points.
    pub filter: Option<ExprId>,
    /// The value stored outside the support of a materialised output.
    pub otherwise: Option<ExprId>,
    /// The reduction that joins colliding writes (`+=`); none requires an injective, covering left side.
    pub join: Option<ReduceOp>,
    /// Free indices, in order of appearance on the left.
    pub free: Vec<IndexId>,
    /// The whole statement.
    pub span: Span,
}

/// A left-hand side access.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The tensor written.
    pub tensor: TensorId,
    /// One integer expression per dimension: affine in the free indices, or a gather (scatter) with a join.
    pub at: Vec<ExprId>,
}

/// `iter t in T [rev] { inits; body }`.
#[derive(Clone, Debug, PartialEq)]
pub struct Iter {
    /// The iterated index.
    pub index: IndexId,
    /// Its extent.
    pub extent: Size,
    /// Whether it runs from the last point to the first: states flow from t+1 to t.
    pub rev: bool,
    /// States, each on `extent + 1` points.
    pub states: Vec<TensorId>,
    /// Statements that set a state's first point (the last when `rev`); run once.
    pub inits: Vec<Einsum>,
    /// Statements of one step.
    pub body: Vec<Einsum>,
    /// The whole block.
    pub span: Span,
}

/// A scalar expression over indices, extents and tensor elements.
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    /// An integer literal.
    Int(i64),
    /// A float literal.
    Float(f64),
    /// The value of an extent.
    Size(Size),
    /// The value of an index.
    Index(IndexId),
    /// An element; out-of-range positions of gathers read 0.
    Read {
        /// The tensor read.
        tensor: TensorId,
        /// One integer expression per dimension.
        at: Vec<ExprId>,
    },
    /// A scalar function.
    Unary(UnaryOp, ExprId),
    /// A scalar function of two arguments.
    Binary(BinaryOp, ExprId, ExprId),
    /// `if cond then a else b`; only the chosen branch's support and NaNs count.
    Select(ExprId, ExprId, ExprId),
    /// A written conversion: a rounding point that stands in the way of fusing.
    Cast(DType, ExprId),
    /// Several values: the body of a reduction with a multi-component monoid, and nothing else.
    Tuple(Vec<ExprId>),
    /// A named reduction over `over`.
    Reduce {
        /// The monoid.
        op: Reducer,
        /// The indices it binds.
        over: Vec<IndexId>,
        /// What is reduced.
        body: ExprId,
    },
    /// A running reduction along the free index `over` (inclusive): `cumsum(n) x[n]`.
    Scan {
        /// The monoid.
        op: Reducer,
        /// The free index it runs along.
        over: IndexId,
        /// What is accumulated.
        body: ExprId,
    },
    /// The segment that index `of` lies in, by offsets `offsets: [X+1]` made monotone within the rank.
    Segment {
        /// The offsets tensor.
        offsets: TensorId,
        /// The ragged index.
        of: IndexId,
    },
    /// A uniform value in [0,1) from Philox4x32-10 keyed by `seed` at integer coordinates.
    Rand {
        /// Integer seed.
        seed: ExprId,
        /// Coordinates, at most four.
        coords: Vec<ExprId>,
    },
}

/// What a reduction joins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reducer {
    /// A built-in operator.
    Op(ReduceOp),
    /// The largest `k` elements with their positions, in descending order, ties to the lowest position. Two targets
    /// (values, positions), whose last dimension is `k`; missing elements are −∞ and −1.
    TopK {
        /// How many.
        k: u64,
    },
    /// A user-defined monoid; the body's components are its tuple's.
    User(MonoidId),
}

/// A user-defined commutative monoid on tuples of scalars.
#[derive(Clone, Debug, PartialEq)]
pub struct Monoid {
    /// Its name.
    pub name: String,
    /// Component names, for the printer.
    pub fields: Vec<String>,
    /// Neutral element, one constant per component.
    pub identity: Vec<f64>,
    /// The join of tuples (a, b), one expression per component.
    pub combine: Vec<MonoidExpr>,
    /// Where it is declared.
    pub span: Span,
}

/// A scalar expression over the components of a monoid's two arguments.
#[derive(Clone, Debug, PartialEq)]
pub enum MonoidExpr {
    /// Component of the left argument.
    Left(usize),
    /// Component of the right argument.
    Right(usize),
    /// A literal.
    Const(f64),
    /// A scalar function.
    Unary(UnaryOp, Box<MonoidExpr>),
    /// A scalar function of two arguments.
    Binary(BinaryOp, Box<MonoidExpr>, Box<MonoidExpr>),
    /// `if cond then a else b`.
    Select(Box<MonoidExpr>, Box<MonoidExpr>, Box<MonoidExpr>),
}

impl Size {
    /// Its value for the given extents (one per rank, in order).
    ///
    /// # Errors
    /// A negative difference, a division by zero, or a value over 2⁶³−1.
    pub fn eval(&self, ranks: &[u64]) -> Result<u64, SizeError> {
        let two = |a: &Size, b: &Size| Ok((a.eval(ranks)?, b.eval(ranks)?));
        let v = match self {
            Size::Const(n) => Some(*n),
            Size::Rank(r) => Some(ranks[crate::arena::Id::index(*r)]),
            Size::Add(a, b) => two(a, b).map(|(a, b)| a.checked_add(b))?,
            Size::Mul(a, b) => two(a, b).map(|(a, b)| a.checked_mul(b))?,
            Size::Min(a, b) => two(a, b).map(|(a, b)| Some(a.min(b)))?,
            Size::Max(a, b) => two(a, b).map(|(a, b)| Some(a.max(b)))?,
            Size::Sub(a, b) => {
                let (a, b) = two(a, b)?;
                return a.checked_sub(b).ok_or(SizeError::Negative);
            }
            Size::Div(a, b) | Size::CeilDiv(a, b) => {
                let (x, y) = two(a, b)?;
                if y == 0 {
                    return Err(SizeError::DivisionByZero);
                }
                Some(if matches!(self, Size::Div(..)) { x / y } else { x.div_ceil(y) })
            }
        };
        v.filter(|v| *v <= i64::MAX as u64).ok_or(SizeError::Overflow)
    }

    /// Calls `f` on every rank it mentions.
    pub fn for_each_rank(&self, f: &mut impl FnMut(RankId)) {
        match self {
            Size::Const(_) => {}
            Size::Rank(r) => f(*r),
            Size::Add(a, b)
            | Size::Sub(a, b)
            | Size::Mul(a, b)
            | Size::Div(a, b)
            | Size::CeilDiv(a, b)
            | Size::Min(a, b)
            | Size::Max(a, b) => {
                a.for_each_rank(f);
                b.for_each_rank(f);
            }
        }
    }
}

/// Why an extent has no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// A difference of extents below zero.
    Negative,
    /// A quotient by an extent of zero.
    DivisionByZero,
    /// More than 2⁶³−1.
    Overflow,
}

/// A predicate: what the extent does.
impl std::fmt::Display for SizeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            SizeError::Negative => "is negative",
            SizeError::DivisionByZero => "divides by zero",
            SizeError::Overflow => "exceeds 2^63-1",
        })
    }
}

impl std::error::Error for SizeError {}

impl Expr {
    /// Calls `f` on every operand, in order.
    pub fn for_each_operand(&self, mut f: impl FnMut(ExprId)) {
        match self {
            Expr::Int(_) | Expr::Float(_) | Expr::Size(_) | Expr::Index(_) | Expr::Segment { .. } => {}
            Expr::Read { at, .. } => at.iter().copied().for_each(f),
            Expr::Unary(_, a) | Expr::Cast(_, a) => f(*a),
            Expr::Binary(_, a, b) => {
                f(*a);
                f(*b);
            }
            Expr::Select(c, a, b) => {
                f(*c);
                f(*a);
                f(*b);
            }
            Expr::Tuple(items) => items.iter().copied().for_each(f),
            Expr::Reduce { body, .. } | Expr::Scan { body, .. } => f(*body),
            Expr::Rand { seed, coords } => {
                f(*seed);
                coords.iter().copied().for_each(f);
            }
        }
    }
}

impl Einsum {
    /// The expressions it holds directly: value, filter, otherwise and target accesses.
    pub fn roots(&self) -> impl Iterator<Item = ExprId> + '_ {
        let targets = self.targets.iter().flat_map(|t| t.at.iter().copied());
        [Some(self.value), self.filter, self.otherwise].into_iter().flatten().chain(targets)
    }
}

impl Cascade {
    /// Appends an expression that stands at `span`.
    pub fn push_expr(&mut self, expr: Expr, span: Span) -> ExprId {
        self.spans.push(span);
        self.exprs.push(expr)
    }

    /// Calls `f` on `root` and every node under it, each once (a function's argument is shared by its uses), a node
    /// before what it alone holds.
    pub fn walk(&self, root: ExprId, f: &mut impl FnMut(ExprId, &Expr)) {
        self.walk_new(root, f, &mut std::collections::HashSet::new());
    }

    fn walk_new(&self, e: ExprId, f: &mut impl FnMut(ExprId, &Expr), seen: &mut std::collections::HashSet<ExprId>) {
        if seen.insert(e) {
            f(e, &self.exprs[e]);
            self.exprs[e].for_each_operand(|o| self.walk_new(o, f, seen));
        }
    }

    /// Indices that `root` depends on, in order of first occurrence: those it mentions less those it binds.
    pub fn free_indices(&self, root: ExprId) -> Vec<IndexId> {
        let (mut seen, mut bound) = (Vec::new(), std::collections::HashSet::new());
        self.walk(root, &mut |_, e| match e {
            Expr::Index(i) | Expr::Segment { of: i, .. } | Expr::Scan { over: i, .. } => {
                if !seen.contains(i) {
                    seen.push(*i);
                }
            }
            Expr::Reduce { over, .. } => bound.extend(over.iter().copied()),
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
        seen.retain(|i| !bound.contains(i));
        seen
    }

    /// Whether a statement reads `tensor`.
    pub fn reads(&self, e: &Einsum, tensor: TensorId) -> bool {
        let mut found = false;
        for root in e.roots() {
            self.walk(root, &mut |_, x| {
                found |= match x {
                    Expr::Read { tensor: t, .. } | Expr::Segment { offsets: t, .. } => *t == tensor,
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
                    | Expr::Rand { .. } => false,
                };
            });
        }
        found
    }

    /// Every Einsum in evaluation order, those inside `iter` blocks included (inits before the body).
    pub fn einsums(&self) -> impl Iterator<Item = &Einsum> {
        self.stmts.iter().flat_map(|s| -> Box<dyn Iterator<Item = &Einsum>> {
            match s {
                Stmt::Einsum(e) => Box::new(std::iter::once(e)),
                Stmt::Iter(i) => Box::new(i.inits.iter().chain(&i.body)),
            }
        })
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorId> {
        self.tensors.iter().find(|(_, t)| t.name == name).map(|(id, _)| id)
    }

    /// The rank of this name.
    pub fn rank(&self, name: &str) -> Option<RankId> {
        self.ranks.iter().find(|(_, r)| r.name == name).map(|(id, _)| id)
    }
}
