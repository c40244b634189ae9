//! Expressions: what they may name where, and what is known of their values.
//!
//! Invariant: [`Verifier::range`] and [`Verifier::factor`] claim only what holds for every launch and unit.

use super::*;
use crate::ops::BinaryOp;

/// Values an expression takes: all between `lo` and `hi`, both taken if `exact`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) lo: i64,
    pub(super) hi: i64,
    pub(super) exact: bool,
}

/// What is known of variables at a statement.
#[derive(Clone, Debug, Default)]
pub(super) struct Scope {
    /// Variables that have a value.
    pub(super) bound: HashSet<VarId>,
    /// Values of counters of loops with constant bounds.
    pub(super) ranges: HashMap<VarId, Range>,
    /// Numbers that divide a counter.
    pub(super) factors: HashMap<VarId, u64>,
    /// Whether a branch may keep values from being taken together.
    pub(super) guarded: bool,
}

impl<'a> Verifier<'a> {
    /// Checks an expression over extents alone.
    pub(super) fn over_extents(&mut self, e: &Expr, what: &str) {
        let legal = match e {
            Expr::Int(_) => true,
            Expr::Extent(r) => self.ranks.get(*r).is_some(),
            Expr::Binary(..) | Expr::Select(..) => true,
            Expr::Unary(..) | Expr::Cast(..) | Expr::Rand(_) | Expr::Fma(..) | Expr::Float(_) => false,
            Expr::Var(_) | Expr::Grid(_) | Expr::Unit | Expr::ClusterRank => false,
            Expr::Scalar(_) | Expr::Fetch { .. } | Expr::Frag { .. } | Expr::Coord(_) => false,
        };
        if !legal {
            self.wrong(format!("{what} is an integer expression over extents"));
        }
        let mut operands = Vec::new();
        e.for_each_operand(|o| operands.push(o));
        operands.into_iter().for_each(|o| self.over_extents(o, what));
    }

    /// Checks a uniform expression; `integer` asks for an integer.
    pub(super) fn uniform(&mut self, e: &Expr, scope: &Scope, integer: bool) {
        self.names(e, scope, None);
        if integer && self.out.is_empty() && !self.kernel.is_integer(e) {
            self.wrong(format!("`{}` is used as an integer", print::expression(self.kernel, self.ranks, e)));
        }
    }

    /// Checks an elementwise expression over the elements of `result`.
    pub(super) fn elementwise(&mut self, e: &Expr, scope: &Scope, result: FragId) {
        self.names(e, scope, Some(result));
    }

    fn names(&mut self, e: &Expr, scope: &Scope, result: Option<FragId>) {
        match e {
            Expr::Var(v) if !scope.bound.contains(v) => {
                let name = self.kernel.vars.get(*v).map_or_else(|| v.index().to_string(), |v| v.name.clone());
                self.wrong(format!("variable `{name}` has no value on some path to here"));
            }
            Expr::Extent(r) if self.ranks.get(*r).is_none() => self.wrong(format!("there is no rank {}", r.index())),
            Expr::Grid(d) if *d >= self.kernel.grid.len() => self.wrong(format!("the grid has no dimension {d}")),
            Expr::ClusterRank if self.kernel.cluster.is_empty() => self.wrong("the kernel has no clusters"),
            Expr::Scalar(b) => {
                if let Some(buf) = self.buf(*b)
                    && !(buf.dims.is_empty() && matches!(buf.space, BufSpace::Global { .. }))
                {
                    self.wrong(format!("`{}` is no scalar parameter", buf.name));
                }
            }
            Expr::Fetch { buf, at } => {
                if let Some(b) = self.buf(*buf)
                    && b.dims.len() != at.len()
                {
                    self.wrong(format!(
                        "`{}` has {} dimensions; {} coordinates are given",
                        b.name,
                        b.dims.len(),
                        at.len()
                    ));
                }
                at.iter().for_each(|e| self.uniform(e, scope, true));
                return;
            }
            Expr::Frag { frag, dims } => match result {
                None => {
                    let text = print::expression(self.kernel, self.ranks, e);
                    self.wrong(format!("`{text}` is elementwise where a uniform value is needed"));
                }
                Some(result) => self.operand(*frag, result, dims),
            },
            Expr::Coord(d) => {
                let rank = result.and_then(|r| self.kernel.frags.get(r)).map(|f| f.dist.dims.len());
                if rank.is_none_or(|r| *d >= r) {
                    self.wrong(format!("@{d} is no dimension of the result"));
                }
            }
            Expr::Var(_)
            | Expr::Extent(_)
            | Expr::Grid(_)
            | Expr::ClusterRank
            | Expr::Int(_)
            | Expr::Float(_)
            | Expr::Unit
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Fma(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => {}
        }
        let mut operands = Vec::new();
        e.for_each_operand(|o| operands.push(o));
        operands.into_iter().for_each(|o| self.names(o, scope, result));
    }

    /// Checks that `frag`, whose dimensions are `dims` of `result`, is held where `result` is.
    pub(super) fn operand(&mut self, frag: FragId, result: FragId, dims: &[usize]) {
        let (Some(f), Some(r)) = (self.frag(frag), self.frag(result)) else { return };
        let key = (frag, result, dims.to_vec());
        let held = match self.served.get(&key) {
            Some(held) => *held,
            None => {
                let held = f.dist.serves(&r.dist, dims);
                self.served.insert(key, held);
                held
            }
        };
        if !held {
            self.wrong(format!(
                "`{}` {:?} {} is not distributed as dimensions {dims:?} of `{}` {:?} {}",
                f.name, f.dist.dims, f.dist, r.name, r.dist.dims, r.dist
            ));
        }
    }

    /// What values `e` takes in the role, if that is known.
    pub(super) fn range(&self, e: &Expr, scope: &Scope) -> Option<Range> {
        let fixed = |v: i64| Some(Range { lo: v, hi: v, exact: true });
        match e {
            Expr::Int(i) => fixed(*i),
            Expr::Var(v) => scope.ranges.get(v).copied(),
            Expr::Extent(r) => self.ranks.get(*r)?.fixed.and_then(|v| fixed(v as i64)),
            Expr::Unit => {
                Some(Range { lo: 0, hi: self.kernel.roles[self.role].units as i64 - 1, exact: !scope.guarded })
            }
            Expr::ClusterRank => {
                Some(Range { lo: 0, hi: self.kernel.cluster.iter().product::<u64>() as i64 - 1, exact: !scope.guarded })
            }
            Expr::Binary(op, a, b) => {
                let exact = |x: &Range, y: &Range| x.exact && y.exact && !shares(a, b);
                match op {
                    BinaryOp::Add => {
                        let (x, y) = (self.range(a, scope)?, self.range(b, scope)?);
                        Some(Range { lo: x.lo.checked_add(y.lo)?, hi: x.hi.checked_add(y.hi)?, exact: exact(&x, &y) })
                    }
                    BinaryOp::Sub => {
                        let (x, y) = (self.range(a, scope)?, self.range(b, scope)?);
                        Some(Range { lo: x.lo.checked_sub(y.hi)?, hi: x.hi.checked_sub(y.lo)?, exact: exact(&x, &y) })
                    }
                    BinaryOp::Mul => {
                        let (x, y) = (self.range(a, scope)?, self.range(b, scope)?);
                        let corner = |p: i64, q: i64| p.checked_mul(q);
                        let all = [corner(x.lo, y.lo)?, corner(x.lo, y.hi)?, corner(x.hi, y.lo)?, corner(x.hi, y.hi)?];
                        Some(Range { lo: *all.iter().min()?, hi: *all.iter().max()?, exact: exact(&x, &y) })
                    }
                    BinaryOp::Mod => match self.range(b, scope)? {
                        Range { lo, hi, .. } if lo == hi && lo > 0 => Some(Range { lo: 0, hi: lo - 1, exact: false }),
                        _ => None,
                    },
                    BinaryOp::Div
                    | BinaryOp::Pow
                    | BinaryOp::Min
                    | BinaryOp::Max
                    | BinaryOp::Lt
                    | BinaryOp::Le
                    | BinaryOp::Gt
                    | BinaryOp::Ge
                    | BinaryOp::Eq
                    | BinaryOp::Ne
                    | BinaryOp::And
                    | BinaryOp::Or => None,
                }
            }
            Expr::Float(_)
            | Expr::Grid(_)
            | Expr::Scalar(_)
            | Expr::Fetch { .. }
            | Expr::Frag { .. }
            | Expr::Coord(_)
            | Expr::Unary(..)
            | Expr::Fma(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => None,
        }
    }

    /// A number that divides `e` and, as far as its form tells, no larger one does; none if nothing is known; 0 for 0.
    pub(super) fn factor(&self, e: &Expr, scope: &Scope) -> Option<u64> {
        match e {
            Expr::Int(i) => Some(i.unsigned_abs()),
            Expr::Var(v) => scope.factors.get(v).copied(),
            Expr::Unit if self.kernel.roles[self.role].units == 1 => Some(0),
            Expr::Unit | Expr::Grid(_) | Expr::ClusterRank => Some(1),
            Expr::Extent(r) => self.ranks.get(*r)?.fixed,
            Expr::Binary(BinaryOp::Add | BinaryOp::Sub, a, b) => {
                Some(gcd(self.factor(a, scope)?, self.factor(b, scope)?))
            }
            Expr::Binary(BinaryOp::Mul, a, b) => self.factor(a, scope)?.checked_mul(self.factor(b, scope)?),
            Expr::Binary(..)
            | Expr::Float(_)
            | Expr::Scalar(_)
            | Expr::Fetch { .. }
            | Expr::Frag { .. }
            | Expr::Coord(_)
            | Expr::Unary(..)
            | Expr::Fma(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => None,
        }
    }
}

pub(super) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Whether two expressions depend on a common variable or unit.
fn shares(a: &Expr, b: &Expr) -> bool {
    fn leaves<'e>(e: &'e Expr, out: &mut Vec<&'e Expr>) {
        if matches!(e, Expr::Var(_) | Expr::Unit | Expr::ClusterRank) {
            out.push(e);
        }
        e.for_each_operand(|o| leaves(o, out));
    }
    let (mut x, mut y) = (Vec::new(), Vec::new());
    leaves(a, &mut x);
    leaves(b, &mut y);
    x.iter().any(|e| y.contains(e))
}
