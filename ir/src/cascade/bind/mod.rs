//! Binding: every extent of a cascade solved from parameter shapes, explicit sizes and fixed extents.
//!
//! Each shape gives equations `size = extent`; an equation with one unknown rank in an invertible place (sums,
//! differences, products by checked division) solves it. Invariant: a [`Bindings`] satisfies every equation given,
//! every fixed extent and every `require` whose scalars are known, and every tensor has fewer than 2⁶³ elements.

use std::fmt;

use super::print::size_text;
use super::{Cascade, Expr, ExprId, RankId, Size, SizeError, TensorId};
use crate::arena::Id;
use crate::array::{Array, element_count};
use crate::ops::{BinaryOp, UnaryOp};

/// What a caller knows.
#[derive(Clone, Debug, Default)]
pub struct Given {
    /// Shapes of parameters as they are stored ([`super::Tensor::stored`]).
    pub shapes: Vec<(TensorId, Vec<u64>)>,
    /// Extents by rank name.
    pub sizes: Vec<(String, u64)>,
    /// Values of scalar parameters, for `require` facts.
    pub scalars: Vec<(TensorId, f64)>,
}

/// The extent of every rank of one cascade.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bindings {
    /// One extent per rank, in order.
    pub extents: Vec<u64>,
}

/// Why a cascade cannot be bound.
#[derive(Clone, Debug, PartialEq)]
pub enum BindError {
    /// A size is given for a name that is no rank.
    UnknownRank {
        /// The name given.
        name: String,
        /// The cascade's ranks.
        ranks: Vec<String>,
    },
    /// A tensor has the wrong number of dimensions.
    Dimensions {
        /// The parameter.
        tensor: String,
        /// Its declared dimensions, as text.
        expected: String,
        /// The extents given.
        actual: Vec<u64>,
    },
    /// An extent clashes with what is known already.
    Extent {
        /// The parameter.
        tensor: String,
        /// Which dimension, from 0.
        dim: usize,
        /// Its declared extent, as text.
        declared: String,
        /// What the declaration evaluates to.
        expected: u64,
        /// The extent given.
        actual: u64,
    },
    /// An extent has no solution for its unknown rank: an inexact division or a negative difference.
    Unsolvable {
        /// The parameter.
        tensor: String,
        /// Which dimension, from 0.
        dim: usize,
        /// Its declared extent, as text.
        declared: String,
        /// The extent given.
        actual: u64,
        /// The rank to solve for.
        rank: String,
    },
    /// A given size clashes with a fixed extent or an earlier one.
    Conflict {
        /// The rank.
        rank: String,
        /// The extent known first.
        first: u64,
        /// The extent given later.
        second: u64,
    },
    /// Ranks have no extent.
    Unbound {
        /// The ranks, in the header's order.
        ranks: Vec<String>,
    },
    /// An extent has no value.
    Size {
        /// Where it stands: a tensor, an index or a rank.
        place: String,
        /// The extent as text.
        size: String,
        /// Why.
        error: SizeError,
    },
    /// A tensor has 2⁶³ elements or more.
    TooLarge {
        /// The tensor.
        tensor: String,
        /// Its extents.
        dims: Vec<u64>,
    },
    /// A declared fact does not hold.
    Require {
        /// The extents and scalars it mentions, as `name = value`.
        values: String,
        /// Where the fact stands in the source.
        span: crate::diag::Span,
    },
    /// A fact or default reads something that is neither a rank nor a scalar parameter.
    NotScalar {
        /// What was met.
        what: String,
    },
    /// A scalar parameter has neither a value nor a default.
    MissingScalar {
        /// The parameter.
        tensor: String,
    },
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BindError::UnknownRank { name, ranks } => {
                write!(f, "there is no rank {name}; the ranks are {}", ranks.join(", "))
            }
            BindError::Dimensions { tensor, expected, actual } => write!(
                f,
                "{tensor} is declared {tensor}{expected} but is given {} dimensions {actual:?}; pass an array of the declared rank",
                actual.len()
            ),
            BindError::Extent { tensor, dim, declared, expected, actual } => write!(
                f,
                "{tensor}: dimension {dim} is {declared} = {expected} but is given {actual}; pass {expected}, or change the other inputs or sizes that fix {declared}"
            ),
            BindError::Unsolvable { tensor, dim, declared, actual, rank } => write!(
                f,
                "{tensor}: dimension {dim} is {declared}, given {actual}, which leaves no extent for {rank}; pass an extent that {declared} can take"
            ),
            BindError::Conflict { rank, first, second } => {
                write!(f, "{rank} is given as {second} but is already {first}; give one value")
            }
            BindError::Unbound { ranks } => {
                let example = ranks.iter().map(|r| format!("{r}=64")).collect::<Vec<_>>().join(",");
                write!(f, "no input or size fixes {}; give sizes, e.g. {example}", ranks.join(", "))
            }
            BindError::Size { place, size, error } => {
                write!(f, "{place}: the extent {size} {error}; choose other sizes")
            }
            BindError::TooLarge { tensor, dims } => {
                write!(f, "{tensor} with extents {dims:?} has 2^63 elements or more; choose smaller sizes")
            }
            BindError::Require { values, .. } => {
                write!(f, "a required fact does not hold for {values}; choose sizes and scalars that keep it")
            }
            BindError::NotScalar { what } => {
                write!(f, "a fact or default may use ranks and scalar parameters only, not {what}")
            }
            BindError::MissingScalar { tensor } => {
                write!(f, "the scalar {tensor} has no value and no default; give one")
            }
        }
    }
}

impl std::error::Error for BindError {}

impl Bindings {
    /// The value of `size`.
    ///
    /// # Errors
    /// As [`Size::eval`].
    pub fn size(&self, size: &Size) -> Result<u64, SizeError> {
        size.eval(&self.extents)
    }

    /// The extents of a tensor.
    ///
    /// # Errors
    /// An extent without a value.
    pub fn dims(&self, c: &Cascade, tensor: TensorId) -> Result<Vec<u64>, BindError> {
        let t = &c.tensors[tensor];
        self.sizes(c, &t.name, &t.dims)
    }

    /// The values of `dims`, extents of something called `place`.
    ///
    /// # Errors
    /// An extent without a value.
    pub fn sizes(&self, c: &Cascade, place: &str, dims: &[Size]) -> Result<Vec<u64>, BindError> {
        let value = |d: &Size| {
            self.size(d).map_err(|error| BindError::Size { place: place.to_owned(), size: size_text(c, d), error })
        };
        dims.iter().map(value).collect()
    }
}

/// Solves every rank of `c`.
///
/// ```
/// use einfall_ir::cascade::bind::{Given, bind};
/// use einfall_ir::cascade::parse;
///
/// let module = parse("cascade c[G, R](x: f32[G*R], w: f32[R]) -> (y: f32[G,R]) { y[g,r] = x[g*R+r] * w[r] }");
/// let c = &module.expect("it is right").cascades[0];
/// let shapes = vec![(c.params[0], vec![12]), (c.params[1], vec![4])];
/// assert_eq!(bind(c, &Given { shapes, ..Given::default() })?.extents, [3, 4]);
///
/// let sizes = vec![("G".to_owned(), 3)];
/// let wrong = bind(c, &Given { sizes, ..Given::default() }).expect_err("nothing says what R is");
/// assert_eq!(wrong.to_string(), "no input or size fixes R; give sizes, e.g. R=64");
/// # Ok::<(), einfall_ir::cascade::bind::BindError>(())
/// ```
///
/// # Errors
/// Clashes, unsolved ranks, extents without a value, tensors too large, facts that do not hold.
pub fn bind(c: &Cascade, given: &Given) -> Result<Bindings, BindError> {
    let mut known: Vec<Option<u64>> = c.ranks.iter().map(|(_, r)| r.fixed).collect();
    for (name, extent) in &given.sizes {
        let Some(rank) = c.rank(name) else {
            let ranks = c.ranks.iter().map(|(_, r)| r.name.clone()).collect();
            return Err(BindError::UnknownRank { name: name.clone(), ranks });
        };
        match known[rank.index()] {
            Some(first) if first != *extent => {
                return Err(BindError::Conflict { rank: name.clone(), first, second: *extent });
            }
            _ => known[rank.index()] = Some(*extent),
        }
    }
    for (tensor, dims) in &given.shapes {
        let t = &c.tensors[*tensor];
        if t.dims.len() != dims.len() {
            let expected = t.stored().1.iter().map(|d| size_text(c, d)).collect::<Vec<_>>().join(", ");
            let (tensor, expected) = (t.name.clone(), format!("[{expected}]"));
            return Err(BindError::Dimensions { tensor, expected, actual: dims.clone() });
        }
    }
    solve_all(c, given, &mut known)?;
    let name = |(i, _): (usize, &Option<u64>)| c.ranks[RankId::new(i)].name.clone();
    let ranks: Vec<String> = known.iter().enumerate().filter(|(_, k)| k.is_none()).map(name).collect();
    if !ranks.is_empty() {
        return Err(BindError::Unbound { ranks });
    }
    let b = Bindings { extents: known.into_iter().flatten().collect() };
    for (tensor, dims) in &given.shapes {
        let t = &c.tensors[*tensor];
        let (_, stored) = t.stored();
        let expected = b.sizes(c, &t.name, &stored)?;
        if let Some(dim) = (0..dims.len()).find(|i| dims[*i] != expected[*i]) {
            let declared = size_text(c, &stored[dim]);
            let (expected, actual) = (expected[dim], dims[dim]);
            return Err(BindError::Extent { tensor: t.name.clone(), dim, declared, expected, actual });
        }
    }
    for (id, t) in c.tensors.iter() {
        let dims = b.dims(c, id)?;
        if element_count(&dims).is_none() {
            return Err(BindError::TooLarge { tensor: t.name.clone(), dims });
        }
    }
    for (_, i) in c.indices.iter() {
        b.sizes(c, &format!("index {}", i.name), std::slice::from_ref(&i.extent))?;
    }
    for o in &c.outputs {
        b.sizes(c, &o.name, &o.dims)?;
    }
    check_facts(c, &b, &given.scalars)?;
    Ok(b)
}

/// Checks every `require` whose scalars are in `scalars` or have a default.
///
/// # Errors
/// The first fact that does not hold.
pub fn check_facts(c: &Cascade, b: &Bindings, scalars: &[(TensorId, f64)]) -> Result<(), BindError> {
    for fact in &c.requires {
        match scalar_value(c, b, scalars, *fact) {
            Ok(v) if v != 0.0 => {}
            Ok(_) => {
                return Err(BindError::Require {
                    values: mentioned(c, b, scalars, *fact),
                    span: c.spans[fact.index()],
                });
            }
            Err(BindError::MissingScalar { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The parameters as arrays in order: `given` holds one entry per parameter, or only those without a default.
/// Scalars left out take their defaults.
///
/// # Errors
/// A missing parameter.
pub fn fill_defaults(c: &Cascade, b: &Bindings, given: &[Option<Array>]) -> Result<Vec<Array>, BindError> {
    let mut scalars = Vec::new();
    for (i, id) in c.params.iter().enumerate() {
        if let Some(Some(a)) = given.get(i)
            && let [x] = a.data[..]
        {
            scalars.push((*id, x));
        }
    }
    let fill = |(i, id): (usize, &TensorId)| {
        let t = &c.tensors[*id];
        match given.get(i).cloned().flatten() {
            Some(a) => Ok(a),
            None => match t.default {
                Some(e) => Ok(Array::scalar(t.dtype, scalar_value(c, b, &scalars, e)?)),
                None => Err(BindError::MissingScalar { tensor: t.name.clone() }),
            },
        }
    };
    c.params.iter().enumerate().map(fill).collect()
}

/// The value of a scalar expression over ranks and scalar parameters: a fact or a default.
///
/// # Errors
/// [`BindError::NotScalar`] for anything else, [`BindError::MissingScalar`] for a scalar without value and default.
pub fn scalar_value(c: &Cascade, b: &Bindings, scalars: &[(TensorId, f64)], e: ExprId) -> Result<f64, BindError> {
    scalar(c, b, scalars, e, 0).map(|(x, _)| x)
}

/// The value and whether it is an integer; `depth` bounds chains of defaults.
fn scalar(
    c: &Cascade,
    b: &Bindings,
    scalars: &[(TensorId, f64)],
    e: ExprId,
    depth: u32,
) -> Result<(f64, bool), BindError> {
    let not_scalar = |what: &str| Err(BindError::NotScalar { what: what.to_owned() });
    if depth > 500 {
        return not_scalar("an expression nested 500 deep");
    }
    let of = |e: ExprId| scalar(c, b, scalars, e, depth + 1);
    match &c.exprs[e] {
        Expr::Int(i) => Ok((*i as f64, true)),
        Expr::Float(x) => Ok((*x, false)),
        Expr::Size(s) => match b.size(s) {
            Ok(n) => Ok((n as f64, true)),
            Err(error) => Err(BindError::Size { place: "a fact".to_owned(), size: size_text(c, s), error }),
        },
        Expr::Read { tensor, at } if at.is_empty() && c.params.contains(tensor) => {
            let t = &c.tensors[*tensor];
            let int = !t.dtype.is_float();
            match (scalars.iter().find(|(id, _)| id == tensor), t.default) {
                (Some((_, x)), _) => Ok((*x, int)),
                (None, Some(d)) => of(d).map(|(x, _)| (t.dtype.round(x), int)),
                (None, None) => Err(BindError::MissingScalar { tensor: t.name.clone() }),
            }
        }
        Expr::Unary(op, a) => {
            let (x, int) = of(*a)?;
            let keeps = matches!(op, UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Sign | UnaryOp::Not);
            Ok((op.eval(x), int && keeps))
        }
        Expr::Binary(op, l, r) => {
            let ((x, i), (y, j)) = (of(*l)?, of(*r)?);
            Ok((op.eval(x, y, i && j), (i && j && *op != BinaryOp::Pow) || op.is_predicate()))
        }
        Expr::Select(p, l, r) => of(if of(*p)?.0 != 0.0 { *l } else { *r }),
        Expr::Cast(d, a) => Ok((d.round(of(*a)?.0), !d.is_float())),
        Expr::Read { tensor, .. } => not_scalar(&format!("the tensor {}", c.tensors[*tensor].name)),
        Expr::Index(i) => not_scalar(&format!("the index {}", c.indices[*i].name)),
        Expr::Tuple(_) => not_scalar("a tuple"),
        Expr::Reduce { .. } | Expr::Scan { .. } => not_scalar("a reduction"),
        Expr::Segment { .. } => not_scalar("a ragged segment"),
        Expr::Rand { .. } => not_scalar("a random value"),
    }
}

/// `name = value` of every rank and scalar that `e` mentions.
fn mentioned(c: &Cascade, b: &Bindings, scalars: &[(TensorId, f64)], e: ExprId) -> String {
    let mut names: Vec<String> = Vec::new();
    let mut add = |text: String| {
        if !names.contains(&text) {
            names.push(text);
        }
    };
    c.walk(e, &mut |_, x| match x {
        Expr::Size(s) => s.for_each_rank(&mut |r| add(format!("{} = {}", c.ranks[r].name, b.extents[r.index()]))),
        Expr::Read { tensor, .. } => {
            if let Ok((v, _)) = scalar(c, b, scalars, read_of(c, *tensor, e), 0) {
                add(format!("{} = {v}", c.tensors[*tensor].name));
            }
        }
        Expr::Int(_)
        | Expr::Float(_)
        | Expr::Index(_)
        | Expr::Unary(..)
        | Expr::Binary(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Tuple(_)
        | Expr::Reduce { .. }
        | Expr::Scan { .. }
        | Expr::Segment { .. }
        | Expr::Rand { .. } => {}
    });
    names.join(", ")
}

/// The read of `tensor` under `root`.
fn read_of(c: &Cascade, tensor: TensorId, root: ExprId) -> ExprId {
    let mut found = root;
    c.walk(root, &mut |id, e| {
        if matches!(e, Expr::Read { tensor: t, .. } if *t == tensor) {
            found = id;
        }
    });
    found
}

/// Solves equations until none makes progress.
fn solve_all(c: &Cascade, given: &Given, known: &mut [Option<u64>]) -> Result<(), BindError> {
    loop {
        let mut progress = false;
        for (tensor, dims) in &given.shapes {
            for (dim, (size, actual)) in c.tensors[*tensor].stored().1.iter().zip(dims).enumerate() {
                match solve(size, *actual, known) {
                    Solution::Rank(r, n) => {
                        known[r.index()] = Some(n);
                        progress = true;
                    }
                    Solution::None(r) => {
                        let (tensor, rank) = (c.tensors[*tensor].name.clone(), c.ranks[r].name.clone());
                        let declared = size_text(c, size);
                        return Err(BindError::Unsolvable { tensor, dim, declared, actual: *actual, rank });
                    }
                    Solution::Known | Solution::Open => {}
                }
            }
        }
        if !progress {
            return Ok(());
        }
    }
}

/// What one equation says.
enum Solution {
    /// It has no unknown.
    Known,
    /// It solves a rank.
    Rank(RankId, u64),
    /// It has no solution for this rank.
    None(RankId),
    /// Two unknowns, or one that cannot be isolated.
    Open,
}

/// Solves `size = value` for its only unknown rank.
fn solve(size: &Size, value: u64, known: &[Option<u64>]) -> Solution {
    let mut unknown: Vec<RankId> = Vec::new();
    size.for_each_rank(&mut |r| {
        if known[r.index()].is_none() {
            unknown.push(r);
        }
    });
    let rank = match unknown[..] {
        [] => return Solution::Known,
        [r] => r,
        _ => return Solution::Open,
    };
    let extents: Vec<u64> = known.iter().map(|k| k.unwrap_or(0)).collect();
    let mentions = |s: &Size| {
        let mut yes = false;
        s.for_each_rank(&mut |r| yes |= r == rank);
        yes
    };
    let (mut size, mut value) = (size, Some(value));
    loop {
        let Some(v) = value else { return Solution::None(rank) };
        let (next, other, left) = match size {
            Size::Rank(_) => return Solution::Rank(rank, v),
            Size::Const(_) => return Solution::Known,
            Size::Div(..) | Size::CeilDiv(..) | Size::Min(..) | Size::Max(..) => return Solution::Open,
            Size::Add(a, b) | Size::Sub(a, b) | Size::Mul(a, b) => {
                if mentions(a) {
                    (a, b, true)
                } else {
                    (b, a, false)
                }
            }
        };
        let Ok(o) = other.eval(&extents) else { return Solution::None(rank) };
        value = match size {
            Size::Add(..) => v.checked_sub(o),
            Size::Sub(..) if left => v.checked_add(o),
            Size::Sub(..) => o.checked_sub(v),
            // A factor of zero says nothing about the other factor.
            Size::Mul(..) if o == 0 && v == 0 => return Solution::Open,
            Size::Mul(..) => (o != 0 && v % o == 0).then(|| v / o),
            Size::Const(_) | Size::Rank(_) | Size::Div(..) | Size::CeilDiv(..) | Size::Min(..) | Size::Max(..) => None,
        };
        size = next;
    }
}

#[cfg(test)]
mod tests;
