//! Ranges of integer variables, by interval arithmetic over a role's statements.
//!
//! What a loop carries is widened once: a bound that a trip moves is given up. Invariant: an interval holds at the
//! statement it is asked for on every path there; positions do not overflow 32 bits (the launch contract).

use std::collections::BTreeSet;

use einfall_ir::arena::Id;
use einfall_ir::cascade::{Rank, RankId};
use einfall_ir::kernel::{Expr, Stmt, walk};
use einfall_ir::ops::{BinaryOp, UnaryOp};

/// Least and largest value.
pub(super) type Interval = (i64, i64);

const ALL: Interval = (i32::MIN as i64, i32::MAX as i64);
const NATURAL: Interval = (0, i32::MAX as i64);

/// What an expression's value depends on.
pub(super) struct Facts<'a> {
    pub(super) ranks: &'a einfall_ir::arena::Arena<RankId, Rank>,
    pub(super) units: u64,
    pub(super) cluster: u64,
}

fn join(a: Interval, b: Interval) -> Interval {
    (a.0.min(b.0), a.1.max(b.1))
}

impl Facts<'_> {
    fn interval(&self, e: &Expr, vars: &[Option<Interval>]) -> Interval {
        let (lo, hi) = match e {
            Expr::Int(i) => (*i, *i),
            Expr::Var(v) => vars[v.index()].unwrap_or(ALL),
            Expr::Extent(r) => self.ranks[*r].fixed.map_or(NATURAL, |n| (n as i64, n as i64)),
            Expr::Grid(_) => NATURAL,
            Expr::Unit => (0, self.units.saturating_sub(1) as i64),
            Expr::ClusterRank => (0, self.cluster.saturating_sub(1) as i64),
            Expr::Select(_, a, b) => join(self.interval(a, vars), self.interval(b, vars)),
            Expr::Unary(UnaryOp::Not, _) => (0, 1),
            Expr::Binary(op, a, b) => self.binary(*op, self.interval(a, vars), self.interval(b, vars)),
            Expr::Float(_)
            | Expr::Scalar(_)
            | Expr::Fetch { .. }
            | Expr::Frag { .. }
            | Expr::Coord(_)
            | Expr::Unary(..)
            | Expr::Fma(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => ALL,
        };
        (lo.max(ALL.0), hi.min(ALL.1))
    }

    fn binary(&self, op: BinaryOp, a: Interval, b: Interval) -> Interval {
        match op {
            BinaryOp::Add => (a.0 + b.0, a.1 + b.1),
            BinaryOp::Sub => (a.0 - b.1, a.1 - b.0),
            BinaryOp::Mul => {
                let all = [a.0 * b.0, a.0 * b.1, a.1 * b.0, a.1 * b.1];
                all.iter().fold((i64::MAX, i64::MIN), |r, x| join(r, (*x, *x)))
            }
            BinaryOp::Div if b.0 > 0 => (a.0.div_euclid(b.0).min(a.0.div_euclid(b.1)), a.1.div_euclid(b.0).max(0)),
            BinaryOp::Div if a.0 >= 0 && b.0 >= 0 => (0, a.1),
            BinaryOp::Mod if b.0 >= 0 => (0, (b.1 - 1).max(0)),
            BinaryOp::Min => (a.0.min(b.0), a.1.min(b.1)),
            BinaryOp::Max => (a.0.max(b.0), a.1.max(b.1)),
            BinaryOp::Lt
            | BinaryOp::Le
            | BinaryOp::Gt
            | BinaryOp::Ge
            | BinaryOp::Eq
            | BinaryOp::Ne
            | BinaryOp::And
            | BinaryOp::Or => (0, 1),
            BinaryOp::Div | BinaryOp::Mod | BinaryOp::Pow => ALL,
        }
    }

    /// Variables after `body`, given them before it.
    fn flow(&self, body: &[Stmt], vars: &mut Vec<Option<Interval>>) {
        for s in body {
            match s {
                Stmt::Let { var, value } => vars[var.index()] = Some(self.interval(value, vars)),
                Stmt::Last { var, .. } => vars[var.index()] = Some((0, 1)),
                Stmt::For { var, lo, hi, body, .. } => {
                    let counter = self.counter(lo, hi, vars);
                    self.carried(var.index(), counter, body, vars);
                    let before = vars.clone();
                    vars[var.index()] = Some(counter);
                    self.flow(body, vars);
                    merge(vars, &before);
                }
                Stmt::If { then, otherwise, .. } => {
                    let mut other = vars.clone();
                    self.flow(then, vars);
                    self.flow(otherwise, &mut other);
                    merge(vars, &other);
                }
                Stmt::Map { .. }
                | Stmt::Reduce { .. }
                | Stmt::Scan { .. }
                | Stmt::Load { .. }
                | Stmt::Store { .. }
                | Stmt::Gather { .. }
                | Stmt::Scatter { .. }
                | Stmt::Atom { .. }
                | Stmt::Copy { .. }
                | Stmt::Arrive { .. }
                | Stmt::Wait { .. }
                | Stmt::NamedSync { .. }
                | Stmt::NamedArrive { .. }
                | Stmt::Fence(_)
                | Stmt::Commit(_)
                | Stmt::WaitGroup { .. }
                | Stmt::TaskSync
                | Stmt::ClusterSync
                | Stmt::GridSync
                | Stmt::GridDependency(_) => {}
            }
        }
    }

    /// The counter of a loop inside its body.
    pub(super) fn counter(&self, lo: &Expr, hi: &Expr, vars: &[Option<Interval>]) -> Interval {
        let (lo, hi) = (self.interval(lo, vars), self.interval(hi, vars));
        (lo.0, (hi.1 - 1).max(lo.0))
    }

    /// Makes `vars` hold at the start of every trip of a loop.
    pub(super) fn carried(&self, var: usize, counter: Interval, body: &[Stmt], vars: &mut [Option<Interval>]) {
        loop {
            let mut after = vars.to_vec();
            after[var] = Some(counter);
            self.flow(body, &mut after);
            let mut moved = false;
            for (v, (now, then)) in vars.iter_mut().zip(&after).enumerate() {
                let (Some(a), b) = (*now, then.unwrap_or(ALL)) else { continue };
                if v != var && (b.0 < a.0 || b.1 > a.1) {
                    moved = true;
                    // A bound that moves moves on: only its sign may be kept.
                    let floor = if b.0 >= a.0 {
                        a.0
                    } else if b.0 >= 0 {
                        0
                    } else {
                        ALL.0
                    };
                    *now = Some((floor, if b.1 <= a.1 { a.1 } else { ALL.1 }));
                }
            }
            if !moved {
                return;
            }
        }
    }
}

/// The variables of a role that may be any integer, as elements of tensors are: those bound to what reads one.
pub(super) fn loose(body: &[Stmt]) -> BTreeSet<usize> {
    fn may(e: &Expr, known: &BTreeSet<usize>) -> bool {
        use BinaryOp::*;
        match e {
            Expr::Fetch { .. } | Expr::Scalar(_) | Expr::Frag { .. } | Expr::Rand(_) => return true,
            Expr::Var(v) => return known.contains(&v.index()),
            Expr::Binary(Lt | Le | Gt | Ge | Eq | Ne | And | Or, ..) | Expr::Unary(UnaryOp::Not, _) => return false,
            _ => {}
        }
        let mut found = false;
        e.for_each_operand(|o| found |= may(o, known));
        found
    }
    let mut known = BTreeSet::new();
    loop {
        let before = known.len();
        walk(body, &mut |s| {
            if let Stmt::Let { var, value } = s
                && may(value, &known)
            {
                known.insert(var.index());
            }
        });
        if known.len() == before {
            return known;
        }
    }
}

/// What holds on both paths.
pub(super) fn merge(vars: &mut [Option<Interval>], other: &[Option<Interval>]) {
    for (a, b) in vars.iter_mut().zip(other) {
        *a = match (*a, *b) {
            (Some(a), Some(b)) => Some(join(a, b)),
            (Some(_), None) | (None, _) => None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use einfall_ir::kernel::parse::parse;

    #[test]
    fn what_a_loop_adds_up_stays_natural() {
        let text = "module m {
    ranks K
    kernel k {
        grid [K]
        vars before, i, down, j
        role main: 2 warp {
            let before = 0
            let down = 8
            for i in 0..K {
                let before = before + (K + 63) / 64
                let down = down - 1
                for j in 1..before {
                    let before = before + j % 3
                }
            }
        }
    }
}";
        let m = parse(text).unwrap();
        let f = Facts { ranks: &m.ranks, units: 2, cluster: 1 };
        let mut vars = vec![None; 4];
        f.flow(&m.kernels[0].roles[0].body, &mut vars);
        assert_eq!(vars[0], Some(NATURAL));
        assert_eq!(vars[2].unwrap().0, ALL.0);
        assert_eq!(vars[2].unwrap().1, 8);
    }
}
