//! The syntax tree of cascades: what the text says, with a span on every node, before any name has a meaning.
//!
//! Invariant: the tree is what the printer writes and the parser reads; resolving it gives the IR of [`super`].

use super::Storage;
use crate::diag::Span;
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

/// A name as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ident {
    /// Its letters.
    pub name: String,
    /// Where.
    pub span: Span,
}

impl Ident {
    /// A name that stands nowhere.
    pub fn new(name: impl Into<String>) -> Ident {
        Ident { name: name.into(), span: Span::default() }
    }
}

/// A file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct File {
    /// `//!` lines.
    pub docs: Vec<String>,
    /// Functions, monoids and cascades in order.
    pub items: Vec<Item>,
}

/// A top-level item.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// `fn f(x) = ..`.
    Function(Function),
    /// `monoid m(a, b) { .. }`.
    Monoid(Monoid),
    /// `cascade c[..](..) -> (..) { .. }`.
    Cascade(Cascade),
}

impl Item {
    /// The whole item, docs excluded.
    pub fn span(&self) -> Span {
        match self {
            Item::Function(f) => f.span,
            Item::Monoid(m) => m.span,
            Item::Cascade(c) => c.span,
        }
    }
}

/// A user-defined scalar function.
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    /// `///` lines.
    pub docs: Vec<String>,
    /// Its name.
    pub name: Ident,
    /// Its parameters.
    pub params: Vec<Ident>,
    /// Its value.
    pub body: Expr,
    /// The whole item.
    pub span: Span,
}

/// `monoid NAME(fields) { identity = (..); combine(a, b) = (..) }`.
#[derive(Clone, Debug, PartialEq)]
pub struct Monoid {
    /// `///` lines.
    pub docs: Vec<String>,
    /// Its name.
    pub name: Ident,
    /// Its components.
    pub fields: Vec<Ident>,
    /// Neutral element, one per component.
    pub identity: Vec<Expr>,
    /// The names of the two joined values.
    pub args: (Ident, Ident),
    /// The join, one per component.
    pub combine: Vec<Expr>,
    /// The whole item.
    pub span: Span,
}

/// A cascade.
#[derive(Clone, Debug, PartialEq)]
pub struct Cascade {
    /// `///` lines.
    pub docs: Vec<String>,
    /// Whether `@exact` stands before it.
    pub exact: bool,
    /// Its name.
    pub name: Ident,
    /// Its ranks with their extents, if fixed.
    pub ranks: Vec<(Ident, Option<u64>)>,
    /// Its parameters.
    pub params: Vec<Param>,
    /// Its outputs.
    pub outputs: Vec<Output>,
    /// Its statements.
    pub body: Vec<Stmt>,
    /// Tensors assigned by statements that could not be read.
    pub unreadable: Vec<String>,
    /// The whole item.
    pub span: Span,
    /// The closing brace.
    pub close: Span,
}

/// `dtype[dims] storage`.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Extents.
    pub dims: Vec<Expr>,
    /// Packing and scaling.
    pub storage: Storage,
    /// The whole type.
    pub span: Span,
}

/// A parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// `///` lines.
    pub docs: Vec<String>,
    /// Whether it is written in place.
    pub inout: bool,
    /// Its name.
    pub name: Ident,
    /// Its type.
    pub ty: TensorType,
    /// A scalar's value when the caller gives none.
    pub default: Option<Expr>,
    /// The whole parameter, docs excluded.
    pub span: Span,
}

/// An output.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// `///` lines.
    pub docs: Vec<String>,
    /// Its name.
    pub name: Ident,
    /// Its type.
    pub ty: TensorType,
    /// The slice of a state it returns.
    pub slice: Option<(Ident, Slice)>,
    /// The whole output, docs excluded.
    pub span: Span,
}

/// Points of a state.
#[derive(Clone, Debug, PartialEq)]
pub enum Slice {
    /// `[from..to]`, both optional.
    Points(Option<Expr>, Option<Expr>),
    /// `[at]`.
    Point(Expr),
}

/// A statement.
#[derive(Clone, Debug, PartialEq)]
pub enum Stmt {
    /// `require a, b`.
    Require(Vec<Expr>, Span),
    /// `ragged n in N by offs as e`.
    Ragged(Ragged),
    /// An assignment.
    Einsum(Einsum),
    /// An iterative rank.
    Iter(Iter),
}

impl Stmt {
    /// The whole statement, docs excluded.
    pub fn span(&self) -> Span {
        match self {
            Stmt::Require(_, span) => *span,
            Stmt::Ragged(r) => r.span,
            Stmt::Einsum(e) => e.span,
            Stmt::Iter(i) => i.span,
        }
    }
}

/// `ragged n in N by offs as e`.
#[derive(Clone, Debug, PartialEq)]
pub struct Ragged {
    /// The index that runs over the ragged rank.
    pub index: Ident,
    /// Its extent.
    pub extent: Expr,
    /// The tensor of offsets.
    pub offsets: Ident,
    /// The name of the index's segment.
    pub segment: Ident,
    /// The whole statement.
    pub span: Span,
}

/// `iter t in T [rev] { .. }`.
#[derive(Clone, Debug, PartialEq)]
pub struct Iter {
    /// The iterated index.
    pub index: Ident,
    /// Its extent.
    pub extent: Expr,
    /// Whether it runs backwards.
    pub rev: bool,
    /// Its statements, initialisers included.
    pub body: Vec<Einsum>,
    /// The whole block.
    pub span: Span,
    /// The closing brace.
    pub close: Span,
}

/// An assignment.
#[derive(Clone, Debug, PartialEq)]
pub struct Einsum {
    /// `///` lines.
    pub docs: Vec<String>,
    /// What is written.
    pub targets: Vec<Target>,
    /// `for n in H`.
    pub binders: Vec<Binder>,
    /// The joining reduction of `+=`.
    pub join: Option<ReduceOp>,
    /// The right-hand side.
    pub value: Expr,
    /// `where ..`.
    pub filter: Option<Expr>,
    /// `else ..`.
    pub otherwise: Option<Expr>,
    /// The whole statement, docs excluded.
    pub span: Span,
}

/// A left-hand side.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The tensor.
    pub name: Ident,
    /// One access expression a dimension.
    pub at: Vec<Expr>,
    /// The declared element type.
    pub ty: Option<(DType, Storage)>,
    /// The whole target.
    pub span: Span,
}

/// `n` or `n in EXTENT`.
#[derive(Clone, Debug, PartialEq)]
pub struct Binder {
    /// The index.
    pub index: Ident,
    /// Its extent if written.
    pub extent: Option<Expr>,
}

/// What a written reduction joins with.
#[derive(Clone, Debug, PartialEq)]
pub enum Reducer {
    /// A built-in operator.
    Op(ReduceOp),
    /// `topk(n, k)`.
    TopK(Box<Expr>),
    /// A user-defined monoid.
    User(Ident),
}

/// An expression.
#[derive(Clone, Debug, PartialEq)]
pub struct Expr {
    /// What it is.
    pub kind: ExprKind,
    /// Where.
    pub span: Span,
    /// Height of the tree, 1 for a leaf.
    pub depth: u32,
}

/// What an expression is.
#[derive(Clone, Debug, PartialEq)]
pub enum ExprKind {
    /// An integer literal.
    Int(i64),
    /// A float literal, `inf` and `nan` included.
    Float(f64),
    /// `true` or `false`.
    Bool(bool),
    /// A name: index, rank, scalar tensor or function parameter.
    Name(String),
    /// `a.field` of a monoid's argument.
    Field(Ident, Ident),
    /// `T[..]`.
    Access(Ident, Vec<Expr>),
    /// `f(..)`: scalar function, cast, `rand`, `segment`, `ceildiv`.
    Call(Ident, Vec<Expr>),
    /// A prefix operator.
    Unary(UnaryOp, Box<Expr>),
    /// An infix operator.
    Binary(BinaryOp, Box<Expr>, Box<Expr>),
    /// `if a then b else c`.
    Select(Box<Expr>, Box<Expr>, Box<Expr>),
    /// A named reduction, or a scan.
    Reduce {
        /// What it joins with.
        op: Reducer,
        /// Whether it is a scan.
        scan: bool,
        /// The indices.
        over: Vec<Binder>,
        /// The reduced expression.
        body: Box<Expr>,
    },
    /// `(a, b)`.
    Tuple(Vec<Expr>),
}

impl Expr {
    /// An expression at `span`.
    pub fn new(kind: ExprKind, span: Span) -> Expr {
        let mut depth = 0;
        let mut see = |e: &Expr| depth = depth.max(e.depth);
        match &kind {
            ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Bool(_) | ExprKind::Name(_) | ExprKind::Field(..) => {}
            ExprKind::Access(_, items) | ExprKind::Call(_, items) | ExprKind::Tuple(items) => {
                items.iter().for_each(see)
            }
            ExprKind::Unary(_, a) => see(a),
            ExprKind::Binary(_, a, b) => {
                see(a);
                see(b);
            }
            ExprKind::Select(a, b, c) => {
                see(a);
                see(b);
                see(c);
            }
            ExprKind::Reduce { op, over, body, .. } => {
                if let Reducer::TopK(k) = op {
                    see(k);
                }
                over.iter().filter_map(|b| b.extent.as_ref()).for_each(&mut see);
                see(body);
            }
        }
        Expr { kind, span, depth: depth + 1 }
    }

    /// The name, if it is one alone.
    pub fn as_name(&self) -> Option<&str> {
        match &self.kind {
            ExprKind::Name(n) => Some(n),
            _ => None,
        }
    }
}
