//! A Rust builder of cascades: it makes the syntax tree the parser makes, writes it as text and reads that.
//!
//! So what is built obeys the same rules as what is written, diagnostics point into a text that can be shown
//! ([`CascadeBuilder::source`]), and the IR is the same. Invariant: a built cascade prints as its source does.
//!
//! ```
//! use einfall_ir::cascade::build::{CascadeBuilder, index, sum};
//! use einfall_ir::dtype::DType;
//!
//! let mut c = CascadeBuilder::new("matmul");
//! let [m, n, k] = ["M", "N", "K"].map(|r| c.rank(r));
//! let a = c.input("A", DType::BF16, [&m, &k]);
//! let b = c.input("B", DType::BF16, [&k, &n]);
//! let y = c.output("Y", DType::BF16, [&m, &n]);
//! let [i, j, l] = ["m", "n", "k"].map(index);
//! c.assign(y.at([&i, &j]), sum([&l], a.at([&i, &l]) * b.at([&l, &j])));
//! let cascade = c.finish().unwrap();
//! assert_eq!(cascade.params.len(), 2);
//! ```

use std::ops;

use super::format::file_text;
use super::syntax::{self, Binder, ExprKind, Ident};
use super::{Cascade, Module, Storage};
use crate::diag::{Diagnostics, Span};
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

/// A scalar expression: an index, an extent, an element, or an operation on them.
#[derive(Clone, Debug, PartialEq)]
pub struct Value(syntax::Expr);

fn node(kind: ExprKind) -> Value {
    Value(syntax::Expr::new(kind, Span::default()))
}

/// The index of this name.
pub fn index(name: &str) -> Value {
    node(ExprKind::Name(name.to_string()))
}

impl From<i64> for Value {
    fn from(n: i64) -> Value {
        node(ExprKind::Int(n))
    }
}

impl From<f64> for Value {
    fn from(x: f64) -> Value {
        node(ExprKind::Float(x))
    }
}

impl From<&Value> for Value {
    fn from(v: &Value) -> Value {
        v.clone()
    }
}

/// An infix or two-argument operator applied to two values.
pub fn binary(op: BinaryOp, a: impl Into<Value>, b: impl Into<Value>) -> Value {
    let (a, b) = (a.into().0, b.into().0);
    node(if op.infix() {
        ExprKind::Binary(op, Box::new(a), Box::new(b))
    } else {
        ExprKind::Call(Ident::new(op.name()), vec![a, b])
    })
}

/// A one-argument operator applied to a value.
pub fn unary(op: UnaryOp, a: impl Into<Value>) -> Value {
    let a = a.into().0;
    node(match op {
        UnaryOp::Neg | UnaryOp::Not => ExprKind::Unary(op, Box::new(a)),
        _ => ExprKind::Call(Ident::new(op.name()), vec![a]),
    })
}

/// `e` raised to a value.
pub fn exp(a: impl Into<Value>) -> Value {
    unary(UnaryOp::Exp, a)
}

/// A written conversion.
pub fn cast(dtype: DType, a: impl Into<Value>) -> Value {
    node(ExprKind::Call(Ident::new(dtype.name()), vec![a.into().0]))
}

/// `if cond then a else b`.
pub fn select(cond: impl Into<Value>, a: impl Into<Value>, b: impl Into<Value>) -> Value {
    node(ExprKind::Select(Box::new(cond.into().0), Box::new(a.into().0), Box::new(b.into().0)))
}

/// The segment of ragged index `of` by `offsets`.
pub fn segment(offsets: &TensorRef, of: &Value) -> Value {
    node(ExprKind::Call(Ident::new("segment"), vec![offsets.scalar().0, of.0.clone()]))
}

fn binders<'a>(over: impl IntoIterator<Item = &'a Value>) -> Vec<Binder> {
    let bind = |v: &Value| Binder { index: Ident::new(v.0.as_name().unwrap_or_default()), extent: None };
    over.into_iter().map(bind).collect()
}

/// A named reduction over indices.
pub fn reduce<'a>(op: ReduceOp, over: impl IntoIterator<Item = &'a Value>, body: impl Into<Value>) -> Value {
    let body = Box::new(body.into().0);
    node(ExprKind::Reduce { op: syntax::Reducer::Op(op), scan: false, over: binders(over), body })
}

/// `sum(..) body`.
pub fn sum<'a>(over: impl IntoIterator<Item = &'a Value>, body: impl Into<Value>) -> Value {
    reduce(ReduceOp::Sum, over, body)
}

/// `max(..) body`.
pub fn max<'a>(over: impl IntoIterator<Item = &'a Value>, body: impl Into<Value>) -> Value {
    reduce(ReduceOp::Max, over, body)
}

/// The `k` largest elements along `over`.
pub fn top_k(over: &Value, k: i64, body: impl Into<Value>) -> Value {
    let op = syntax::Reducer::TopK(Box::new(Value::from(k).0));
    node(ExprKind::Reduce { op, scan: false, over: binders([over]), body: Box::new(body.into().0) })
}

/// A running reduction along a free index.
pub fn scan(op: ReduceOp, along: &Value, body: impl Into<Value>) -> Value {
    let op = syntax::Reducer::Op(op);
    node(ExprKind::Reduce { op, scan: true, over: binders([along]), body: Box::new(body.into().0) })
}

impl Value {
    /// This reduction, or index binder, with the extent of its only index written out.
    pub fn within(mut self, extent: impl Into<Value>) -> Value {
        if let ExprKind::Reduce { over, .. } = &mut self.0.kind
            && let Some(b) = over.last_mut()
        {
            b.extent = Some(extent.into().0);
        }
        self
    }

    /// `self <= other`.
    pub fn le(self, other: impl Into<Value>) -> Value {
        binary(BinaryOp::Le, self, other)
    }

    /// `self < other`.
    pub fn lt(self, other: impl Into<Value>) -> Value {
        binary(BinaryOp::Lt, self, other)
    }

    /// `self == other`.
    pub fn equals(self, other: impl Into<Value>) -> Value {
        binary(BinaryOp::Eq, self, other)
    }

    /// `self and other`.
    pub fn and(self, other: impl Into<Value>) -> Value {
        binary(BinaryOp::And, self, other)
    }
}

macro_rules! operators {
    ($($trait:ident $method:ident $op:ident),*) => {$(
        impl<V: Into<Value>> ops::$trait<V> for Value {
            type Output = Value;
            fn $method(self, other: V) -> Value {
                binary(BinaryOp::$op, self, other)
            }
        }
        impl<V: Into<Value>> ops::$trait<V> for &Value {
            type Output = Value;
            fn $method(self, other: V) -> Value {
                binary(BinaryOp::$op, self, other)
            }
        }
    )*};
}

operators!(Add add Add, Sub sub Sub, Mul mul Mul, Div div Div, Rem rem Mod);

impl ops::Neg for Value {
    type Output = Value;
    fn neg(self) -> Value {
        unary(UnaryOp::Neg, self)
    }
}

/// A tensor of the cascade being built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorRef {
    name: String,
}

impl TensorRef {
    /// The element at these positions.
    pub fn at<V: Into<Value>>(&self, at: impl IntoIterator<Item = V>) -> Value {
        node(ExprKind::Access(Ident::new(&self.name), at.into_iter().map(|v| v.into().0).collect()))
    }

    /// The value of a scalar.
    pub fn scalar(&self) -> Value {
        node(ExprKind::Name(self.name.clone()))
    }
}

/// A cascade in the making.
#[derive(Clone, Debug)]
pub struct CascadeBuilder {
    cascade: syntax::Cascade,
    /// Statements of the open `iter`, if there is one.
    block: Option<syntax::Iter>,
}

impl CascadeBuilder {
    /// An empty cascade.
    pub fn new(name: &str) -> CascadeBuilder {
        CascadeBuilder {
            cascade: syntax::Cascade {
                docs: Vec::new(),
                exact: false,
                name: Ident::new(name),
                ranks: Vec::new(),
                params: Vec::new(),
                outputs: Vec::new(),
                body: Vec::new(),
                unreadable: Vec::new(),
                span: Span::default(),
                close: Span::default(),
            },
            block: None,
        }
    }

    /// Adds a documentation line.
    pub fn doc(&mut self, line: &str) {
        self.cascade.docs.push(line.to_string());
    }

    /// Forbids default rounding points.
    pub fn exact(&mut self) {
        self.cascade.exact = true;
    }

    /// Adds a rank bound at launch and returns its extent.
    pub fn rank(&mut self, name: &str) -> Value {
        self.cascade.ranks.push((Ident::new(name), None));
        index(name)
    }

    /// Adds a rank of fixed extent and returns it.
    pub fn fixed_rank(&mut self, name: &str, extent: u64) -> Value {
        self.cascade.ranks.push((Ident::new(name), Some(extent)));
        index(name)
    }

    fn tensor_type<V: Into<Value>>(dtype: DType, dims: impl IntoIterator<Item = V>) -> syntax::TensorType {
        let dims = dims.into_iter().map(|v| v.into().0).collect();
        syntax::TensorType { dtype, dims, storage: Storage::default(), span: Span::default() }
    }

    fn param(&mut self, name: &str, ty: syntax::TensorType, inout: bool, default: Option<Value>) -> TensorRef {
        self.cascade.params.push(syntax::Param {
            docs: Vec::new(),
            inout,
            name: Ident::new(name),
            ty,
            default: default.map(|v| v.0),
            span: Span::default(),
        });
        TensorRef { name: name.to_string() }
    }

    /// Adds an input `[dims]`.
    pub fn input<V: Into<Value>>(&mut self, name: &str, dtype: DType, dims: impl IntoIterator<Item = V>) -> TensorRef {
        self.param(name, Self::tensor_type(dtype, dims), false, None)
    }

    /// Adds a tensor `[dims]` written in place.
    pub fn inout<V: Into<Value>>(&mut self, name: &str, dtype: DType, dims: impl IntoIterator<Item = V>) -> TensorRef {
        self.param(name, Self::tensor_type(dtype, dims), true, None)
    }

    /// Adds a scalar input, with the value it has if the caller gives none.
    pub fn scalar(&mut self, name: &str, dtype: DType, default: Option<Value>) -> TensorRef {
        self.param(name, Self::tensor_type(dtype, [] as [Value; 0]), false, default)
    }

    /// Adds an output `[dims]`.
    pub fn output<V: Into<Value>>(&mut self, name: &str, dtype: DType, dims: impl IntoIterator<Item = V>) -> TensorRef {
        let ty = Self::tensor_type(dtype, dims);
        self.push_output(name, ty, None)
    }

    /// Adds an output that is one point of a state.
    pub fn output_point<V: Into<Value>>(
        &mut self,
        name: &str,
        dtype: DType,
        dims: impl IntoIterator<Item = V>,
        state: &TensorRef,
        at: impl Into<Value>,
    ) -> TensorRef {
        let ty = Self::tensor_type(dtype, dims);
        self.push_output(name, ty, Some((Ident::new(&state.name), syntax::Slice::Point(at.into().0))))
    }

    /// Adds an output that is a state's points from `from` to the last.
    pub fn output_points<V: Into<Value>>(
        &mut self,
        name: &str,
        dtype: DType,
        dims: impl IntoIterator<Item = V>,
        state: &TensorRef,
        from: impl Into<Value>,
    ) -> TensorRef {
        let ty = Self::tensor_type(dtype, dims);
        self.push_output(name, ty, Some((Ident::new(&state.name), syntax::Slice::Points(Some(from.into().0), None))))
    }

    fn push_output(&mut self, name: &str, ty: syntax::TensorType, slice: Option<(Ident, syntax::Slice)>) -> TensorRef {
        let name_ident = Ident::new(name);
        self.cascade.outputs.push(syntax::Output {
            docs: Vec::new(),
            name: name_ident,
            ty,
            slice,
            span: Span::default(),
        });
        TensorRef { name: name.to_string() }
    }

    /// Names a tensor that a statement assigns.
    pub fn tensor(&mut self, name: &str) -> TensorRef {
        TensorRef { name: name.to_string() }
    }

    /// States a fact over ranks and scalars.
    pub fn require(&mut self, fact: Value) {
        self.cascade.body.push(syntax::Stmt::Require(vec![fact.0], Span::default()));
    }

    /// `target = value`.
    pub fn assign(&mut self, target: Value, value: impl Into<Value>) -> &mut syntax::Einsum {
        self.assign_all([target], value)
    }

    /// `(targets) = value`: the results of one reduction. The statement returned can be given a filter, an alternative,
    /// a joining reduction or index extents.
    pub fn assign_all(
        &mut self,
        targets: impl IntoIterator<Item = Value>,
        value: impl Into<Value>,
    ) -> &mut syntax::Einsum {
        let target = |v: Value| {
            let (name, at) = match v.0.kind {
                ExprKind::Access(name, at) => (name, at),
                ExprKind::Name(name) => (Ident::new(name), Vec::new()),
                // Not a place to write: the parser will say so.
                _ => (Ident::new(super::format::expr_text(&v.0)), Vec::new()),
            };
            syntax::Target { name, at, ty: None, span: Span::default() }
        };
        let e = syntax::Einsum {
            docs: Vec::new(),
            targets: targets.into_iter().map(target).collect(),
            binders: Vec::new(),
            join: None,
            value: value.into().0,
            filter: None,
            otherwise: None,
            span: Span::default(),
        };
        let list = match &mut self.block {
            Some(block) => &mut block.body,
            None => {
                self.cascade.body.push(syntax::Stmt::Einsum(e));
                return match self.cascade.body.last_mut() {
                    Some(syntax::Stmt::Einsum(e)) => e,
                    _ => unreachable!("an assignment was pushed"),
                };
            }
        };
        list.push(e);
        let last = list.len() - 1;
        &mut list[last]
    }

    /// Opens `iter index in extent [rev]`: statements go there until [`CascadeBuilder::end_iter`].
    pub fn begin_iter(&mut self, index: &Value, extent: impl Into<Value>, rev: bool) {
        self.end_iter();
        self.block = Some(syntax::Iter {
            index: Ident::new(index.0.as_name().unwrap_or_default()),
            extent: extent.into().0,
            rev,
            body: Vec::new(),
            span: Span::default(),
            close: Span::default(),
        });
    }

    /// Closes the open `iter`, if there is one.
    pub fn end_iter(&mut self) {
        if let Some(block) = self.block.take() {
            self.cascade.body.push(syntax::Stmt::Iter(block));
        }
    }

    /// The cascade as text: what the spans of [`CascadeBuilder::finish`]'s diagnostics point into.
    pub fn source(&self) -> String {
        let mut whole = self.clone();
        whole.end_iter();
        file_text(&syntax::File { docs: Vec::new(), items: vec![syntax::Item::Cascade(whole.cascade)] })
    }

    /// The IR of the cascade.
    ///
    /// # Errors
    /// What the parser and verifier say of [`CascadeBuilder::source`].
    pub fn finish(self) -> Result<Cascade, Diagnostics> {
        let Module { mut cascades, .. } = super::parse(&self.source())?;
        // One cascade was written, so one was read.
        cascades.pop().ok_or_else(|| Vec::new().into())
    }
}

impl syntax::Einsum {
    /// Keeps the points where `filter` holds.
    pub fn filter(&mut self, filter: Value) -> &mut Self {
        self.filter = Some(filter.0);
        self
    }

    /// Says what stands at the points removed.
    pub fn otherwise(&mut self, value: impl Into<Value>) -> &mut Self {
        self.otherwise = Some(value.into().0);
        self
    }

    /// Joins colliding writes.
    pub fn join(&mut self, op: ReduceOp) -> &mut Self {
        self.join = Some(op);
        self
    }

    /// Writes out the extent of a left-hand index.
    pub fn range(&mut self, index: &Value, extent: impl Into<Value>) -> &mut Self {
        let name = Ident::new(index.0.as_name().unwrap_or_default());
        self.binders.push(Binder { index: name, extent: Some(extent.into().0) });
        self
    }

    /// Declares the element type of the first target.
    pub fn stored_as(&mut self, dtype: DType) -> &mut Self {
        if let Some(t) = self.targets.first_mut() {
            t.ty = Some((dtype, Storage::default()));
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cascade::{parse, print, print::print_cascade};

    #[test]
    fn builds_what_the_text_says() {
        let mut c = CascadeBuilder::new("attention");
        c.doc("Causal attention.");
        let [b, g, r, m, n, e, f] = ["B", "G", "R", "M", "N", "E", "F"].map(|x| c.rank(x));
        let q = c.input("Q", DType::BF16, [b.clone(), &g * &r, m.clone(), e.clone()]);
        let k = c.input("K", DType::BF16, [&b, &g, &n, &e]);
        let v = c.input("V", DType::BF16, [&b, &g, &n, &f]);
        let scale = c.scalar("scale", DType::F32, Some(Value::from(1) / unary(UnaryOp::Sqrt, &e)));
        let o = c.output("O", DType::BF16, [b.clone(), &g * &r, m.clone(), f.clone()]);
        c.require(binary(BinaryOp::Gt, scale.scalar(), 0));
        let [s, x, p, l] = ["S", "X", "P", "L"].map(|t| c.tensor(t));
        let [ib, ig, ir, im, jn, ie, jf] = ["b", "g", "r", "m", "n", "e", "f"].map(index);
        let row = [&ib, &ig, &ir, &im];
        let cell = [&ib, &ig, &ir, &im, &jn];
        let head = &ig * &r + &ir;
        let dot = sum([&ie], q.at([&ib, &head, &im, &ie]) * k.at([&ib, &ig, &jn, &ie]));
        c.assign(s.at(cell), scale.scalar() * dot).filter(jn.clone().le(&im + (&n - &m)));
        c.assign(x.at(row), max([&jn], s.at(cell)));
        c.assign(p.at(cell), exp(s.at(cell) - x.at(row)));
        c.assign(l.at(row), sum([&jn], p.at(cell)));
        let weighted = sum([&jn], p.at(cell) * v.at([&ib, &ig, &jn, &jf]));
        c.assign(o.at([&ib, &head, &im, &jf]), weighted / l.at(row));
        let text = "/// Causal attention.
            cascade attention[B, G, R, M, N, E, F](
                Q: bf16[B, G*R, M, E], K: bf16[B, G, N, E], V: bf16[B, G, N, F], scale: f32 = 1 / sqrt(E)
            ) -> (O: bf16[B, G*R, M, F]) {
                require scale > 0
                S[b,g,r,m,n] = scale * (sum(e) Q[b,g*R+r,m,e] * K[b,g,n,e]) where n <= m + (N - M)
                X[b,g,r,m] = max(n) S[b,g,r,m,n]
                P[b,g,r,m,n] = exp(S[b,g,r,m,n] - X[b,g,r,m])
                L[b,g,r,m] = sum(n) P[b,g,r,m,n]
                O[b,g*R+r,m,f] = (sum(n) P[b,g,r,m,n] * V[b,g,n,f]) / L[b,g,r,m]
            }";
        let built = c.finish().unwrap();
        assert_eq!(print_cascade(&built), print(&parse(text).unwrap()));
    }

    #[test]
    fn builds_iteration_and_several_results() {
        let mut c = CascadeBuilder::new("cell");
        let [t, d] = ["T", "D"].map(|x| c.rank(x));
        let x = c.input("x", DType::F32, [&t, &d]);
        let h = c.tensor("h");
        c.output_point("last", DType::F32, [&d], &h, &t);
        c.output_points("all", DType::F32, [&t, &d], &h, 1);
        let [v, w] = ["v", "w"].map(|n| c.tensor(n));
        let (it, id, ij) = (index("t"), index("d"), index("j"));
        c.begin_iter(&it, &t, false);
        c.assign(h.at([Value::from(0), id.clone()]), 0.0);
        c.assign(h.at([&it + 1, id.clone()]), h.at([&it, &id]) * 0.5 + x.at([&it, &id]));
        c.end_iter();
        c.assign_all([v.at([&it, &ij]), w.at([&it, &ij])], top_k(&id, 2, x.at([&it, &id]))).range(&ij, 2);
        let s = c.output("s", DType::F32, [&t]);
        c.assign(s.at([&it]), sum([&ij], v.at([&it, &ij]) + w.at([&it, &ij])));
        let built = c.finish().unwrap();
        assert_eq!(built.outputs.len(), 3);
        assert_eq!(built.stmts.len(), 3);
    }

    #[test]
    fn mistakes_point_into_the_source() {
        let mut c = CascadeBuilder::new("f");
        let m = c.rank("M");
        let a = c.input("A", DType::F32, [&m, &m]);
        let y = c.output("Y", DType::F32, [&m]);
        c.assign(y.at([&index("m")]), a.at([&index("m"), &index("k")]));
        let source = c.source();
        let errors = c.finish().unwrap_err();
        let place = errors[0].primary.0;
        assert_eq!(&source[place.start as usize..place.end as usize], "k", "{errors:?}");
    }
}
