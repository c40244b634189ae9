//! What elements hold that a stream's filter leaves out.
//!
//! A filter often bounds the streamed index more tightly than its extent: in causal attention `n ≤ m + (N − M)` and
//! `m ≤ M − 1` give `n ≤ N − 1`. Where it does, absent elements of a partial block are left out like any other, and
//! where a value computed from left-out elements is the identity of what consumes it (−∞ under a maximum,
//! `exp2(−∞·c − y) = 0` under a sum), a second mask changes nothing. Invariant: [`value`] holds at every element of an
//! existing row that the filter leaves out, unless a value of the row that passes is NaN or infinite in the same way;
//! [`covers`] compares linear forms over the extents and says no where it cannot tell.

use std::collections::BTreeMap;

use einfall_ir::arena::Id;
use einfall_ir::cascade::Size;
use einfall_ir::ops::{BinaryOp, UnaryOp};
use einfall_ir::tile::{AxisId, Expr, ExprId, Op, TileId, print};

use super::apply_mapping::Facts;
use super::split_domains::{conjuncts, ordered};

/// What is known of a value at left-out elements.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Known {
    /// The value itself.
    constant: Option<f64>,
    /// Greater than zero.
    positive: bool,
    /// Not −∞.
    above: bool,
}

impl Known {
    fn constant(x: f64) -> Known {
        Known { constant: Some(x), positive: x > 0.0, above: x > f64::NEG_INFINITY }
    }
}

/// A sum of extents and coordinates with integer factors.
#[derive(Default)]
struct Form {
    ranks: BTreeMap<usize, i64>,
    axes: BTreeMap<AxisId, i64>,
    constant: i64,
}

impl Form {
    fn plus(mut self, other: Form, factor: i64) -> Form {
        for (r, c) in other.ranks {
            *self.ranks.entry(r).or_default() += factor * c;
        }
        for (a, c) in other.axes {
            *self.axes.entry(a).or_default() += factor * c;
        }
        self.constant += factor * other.constant;
        self
    }
}

fn extent_form(f: &Facts<'_>, s: &Size) -> Option<Form> {
    Some(match s {
        Size::Const(n) => Form { constant: i64::try_from(*n).ok()?, ..Form::default() },
        Size::Rank(r) => match f.plan.ranks[*r].fixed {
            Some(n) => Form { constant: i64::try_from(n).ok()?, ..Form::default() },
            None => Form { ranks: BTreeMap::from([(r.index(), 1)]), ..Form::default() },
        },
        Size::Add(a, b) => extent_form(f, a)?.plus(extent_form(f, b)?, 1),
        Size::Sub(a, b) => extent_form(f, a)?.plus(extent_form(f, b)?, -1),
        Size::Mul(..) | Size::Div(..) | Size::CeilDiv(..) | Size::Min(..) | Size::Max(..) => return None,
    })
}

fn form(f: &Facts<'_>, e: ExprId) -> Option<Form> {
    match &f.kernel.exprs[e] {
        Expr::Int(n) => Some(Form { constant: *n, ..Form::default() }),
        Expr::Size(s) => extent_form(f, s),
        Expr::Coord(a) => Some(Form { axes: BTreeMap::from([(*a, 1)]), ..Form::default() }),
        Expr::Binary(BinaryOp::Add, a, b) => Some(form(f, *a)?.plus(form(f, *b)?, 1)),
        Expr::Binary(BinaryOp::Sub, a, b) => Some(form(f, *a)?.plus(form(f, *b)?, -1)),
        Expr::Float(_)
        | Expr::Tile(_)
        | Expr::TileAt { .. }
        | Expr::Read { .. }
        | Expr::Unary(..)
        | Expr::Binary(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Rand(_) => None,
    }
}

/// The form that is ≥ 0 exactly where a comparison holds.
fn at_least_zero(f: &Facts<'_>, e: ExprId) -> Option<Form> {
    let (large, small, strict) = ordered(&f.kernel.exprs[e])?;
    let strict = Form { constant: -strict, ..Form::default() };
    Some(form(f, large)?.plus(form(f, small)?, -1).plus(strict, 1))
}

/// Whether `filter` leaves out every coordinate of `axis` beyond its extent, for coordinates of other axes that exist.
pub(super) fn covers(f: &Facts<'_>, filter: ExprId, axis: AxisId) -> bool {
    let mut all = Vec::new();
    conjuncts(f, filter, &mut all);
    all.into_iter().any(|e| {
        let extent_of = |a: AxisId| extent_form(f, &f.kernel.axes[a].extent);
        let Some(mut rest) = at_least_zero(f, e) else { return false };
        if rest.axes.remove(&axis) != Some(-1) {
            return false;
        }
        // The largest coordinate that passes, less the extent.
        for (a, c) in std::mem::take(&mut rest.axes) {
            if c > 0 {
                let Some(extent) = extent_of(a) else { return false };
                rest = rest.plus(extent, c);
                rest.constant -= c;
            }
        }
        let Some(extent) = extent_of(axis) else { return false };
        let rest = rest.plus(extent, -1);
        rest.ranks.values().all(|c| *c <= 0) && rest.constant < 0
    })
}

/// The value of `e`, read by operation `i`, at elements that `filter` leaves out; none if it depends on anything else.
pub(super) fn value(f: &Facts<'_>, filter: ExprId, i: usize, e: ExprId) -> Option<f64> {
    known(f, filter, i, e).constant
}

/// Whether `cond` fails wherever `filter` does.
fn fails_with(f: &Facts<'_>, filter: ExprId, cond: ExprId) -> bool {
    let text = |e: ExprId| print::expr_text(f.plan, f.kernel, e);
    let (mut needed, mut given) = (Vec::new(), Vec::new());
    conjuncts(f, filter, &mut needed);
    conjuncts(f, cond, &mut given);
    let given: Vec<String> = given.into_iter().map(text).collect();
    needed.into_iter().all(|e| given.contains(&text(e)))
}

/// What the tile holds where operation `i` of a stream reads it, by the last operation before that sets it.
fn of_tile(f: &Facts<'_>, filter: ExprId, i: usize, t: TileId) -> Known {
    let item = f.ops[i].item;
    let sets = |o: &usize| f.ops[*o].item == item && f.ops[*o].op.outs().contains(&t);
    match (0..i).rev().find(sets).map(|o| (o, f.ops[o].op)) {
        Some((o, Op::Map { value, .. })) => known(f, filter, o, *value),
        _ => Known::default(),
    }
}

fn known(f: &Facts<'_>, filter: ExprId, i: usize, e: ExprId) -> Known {
    let of = |e: ExprId| known(f, filter, i, e);
    let lowest = |e: ExprId| of(e).constant == Some(f64::NEG_INFINITY);
    match f.kernel.exprs[e] {
        Expr::Int(n) => Known::constant(n as f64),
        Expr::Float(x) => Known::constant(x),
        Expr::Tile(t) => of_tile(f, filter, i, t),
        Expr::Read { buffer, ref at } if at.is_empty() => {
            let positive = f.plan.buffers[buffer].positive;
            Known { constant: None, positive, above: positive }
        }
        Expr::Select(c, _, b) if fails_with(f, filter, c) => of(b),
        Expr::Select(c, a, b) => {
            let (x, y) = (of(a), of(b));
            // select(b = −∞, a, b)
            let replaces = matches!(f.kernel.exprs[c], Expr::Binary(BinaryOp::Eq, l, r)
                if f.kernel.exprs[l] == f.kernel.exprs[b] && lowest(r));
            Known {
                constant: x.constant.filter(|x| y.constant == Some(*x)),
                positive: x.positive && y.positive,
                above: x.above && (y.above || replaces),
            }
        }
        Expr::Unary(UnaryOp::Exp | UnaryOp::Exp2, a) if lowest(a) => Known::constant(0.0),
        Expr::Binary(BinaryOp::Mul, a, b) => {
            let (x, y) = (of(a), of(b));
            let low = (lowest(a) && y.positive) || (lowest(b) && x.positive);
            Known {
                constant: low.then_some(f64::NEG_INFINITY),
                positive: x.positive && y.positive,
                above: !low && ((x.above && y.positive) || (y.above && x.positive)),
            }
        }
        Expr::Binary(BinaryOp::Sub, a, b) if lowest(a) && of(b).above => Known::constant(f64::NEG_INFINITY),
        Expr::Cast(_, a) => {
            let x = of(a);
            Known { constant: x.constant.filter(|x| *x == 0.0 || x.is_infinite()), ..Known::default() }
        }
        Expr::Size(_)
        | Expr::Coord(_)
        | Expr::TileAt { .. }
        | Expr::Read { .. }
        | Expr::Unary(..)
        | Expr::Binary(..)
        | Expr::Rand(_) => Known::default(),
    }
}
