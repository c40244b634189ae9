//! early-loads: loads whose places are known are issued beside the first load before them, not where they are used.
//!
//! ```text
//! load x; r = reduce x; task_sync; ..; load gamma; y = x · r · gamma
//! →  load x; load gamma; r = reduce x; task_sync; ..; y = x · r · gamma
//! ```
//! Their latency then runs beside that of the loads before them, and they take registers for longer: whether that pays
//! is a choice of the mapping. Within lists of statements alone: what is loaded for a loop is not held over another.
//! Invariant: only loads of arrays that the kernel does not write move, and only over statements that neither touch
//! the fragment nor set a variable that the load's place depends on; synchronisation orders nothing for them.

use std::collections::BTreeSet;

use einfall_ir::kernel::{BufId, BufSpace, Expr, FragId, Kernel, Stmt, VarId};

/// Moves the loads of every role.
pub(super) fn run(mut kernel: Kernel) -> Kernel {
    let global = |written| {
        let of = move |s: &BufSpace| matches!(s, BufSpace::Global { written: w, .. } if written == *w);
        kernel.bufs.iter().filter(move |(_, b)| of(&b.space))
    };
    let param = |s: &BufSpace| match s {
        BufSpace::Global { param, .. } => Some(*param),
        BufSpace::Shared { .. } | BufSpace::Scratch { .. } => None,
    };
    let written: BTreeSet<usize> = global(true).filter_map(|(_, b)| param(&b.space)).collect();
    let constant: BTreeSet<BufId> = global(false)
        .filter(|(_, b)| param(&b.space).is_some_and(|p| !written.contains(&p)))
        .map(|(id, _)| id)
        .collect();
    let mut roles = std::mem::take(&mut kernel.roles);
    roles.iter_mut().for_each(|r| list(&mut r.body, &constant));
    Kernel { roles, ..kernel }
}

fn list(body: &mut [Stmt], constant: &BTreeSet<BufId>) {
    for s in body.iter_mut() {
        match s {
            Stmt::For { body, .. } => list(body, constant),
            Stmt::If { then, otherwise, .. } => {
                list(then, constant);
                list(otherwise, constant);
            }
            _ => {}
        }
    }
    let is_load = |s: &Stmt| matches!(s, Stmt::Load { src, .. } if constant.contains(&src.buf));
    for i in 0..body.len() {
        let Some(place) = Place::of(&body[i], constant) else { continue };
        let first = (0..i).rev().take_while(|j| place.may_pass(&body[*j])).last().unwrap_or(i);
        // Behind the loads that are there already.
        let Some(beside) = (first..i).find(|j| is_load(&body[*j])) else { continue };
        let to = (beside..i).find(|j| !is_load(&body[*j])).unwrap_or(i);
        body[to..=i].rotate_right(1);
    }
}

/// A load that may move, and what its place depends on.
struct Place {
    out: FragId,
    vars: BTreeSet<VarId>,
}

impl Place {
    fn of(s: &Stmt, constant: &BTreeSet<BufId>) -> Option<Place> {
        fn go(e: &Expr, constant: &BTreeSet<BufId>, vars: &mut BTreeSet<VarId>) -> bool {
            let mut known = match e {
                Expr::Var(v) => {
                    vars.insert(*v);
                    true
                }
                Expr::Fetch { buf, .. } => constant.contains(buf),
                Expr::Frag { .. } => false,
                // No statement changes these; operands are asked below.
                Expr::Int(_)
                | Expr::Float(_)
                | Expr::Extent(_)
                | Expr::Grid(_)
                | Expr::Unit
                | Expr::ClusterRank
                | Expr::Scalar(_)
                | Expr::Coord(_)
                | Expr::Unary(..)
                | Expr::Binary(..)
                | Expr::Fma(..)
                | Expr::Select(..)
                | Expr::Cast(..)
                | Expr::Rand(_) => true,
            };
            e.for_each_operand(|o| known &= go(o, constant, vars));
            known
        }
        let Stmt::Load { out, src, bounds } = s else { return None };
        let mut vars = BTreeSet::new();
        let exprs = src.at.iter().chain(bounds.iter().map(|b| &b.limit));
        let known = exprs.fold(true, |all, e| all & go(e, constant, &mut vars));
        (known && constant.contains(&src.buf)).then_some(Place { out: *out, vars })
    }

    fn may_pass(&self, s: &Stmt) -> bool {
        let ordinary = match s {
            Stmt::Let { var, .. } => !self.vars.contains(var),
            Stmt::Map { .. }
            | Stmt::Reduce { .. }
            | Stmt::Scan { .. }
            | Stmt::Load { .. }
            | Stmt::Store { .. }
            | Stmt::Gather { .. }
            | Stmt::Scatter { .. }
            | Stmt::TaskSync => true,
            // Over loops and branches registers would be held too long; grids, groups and barriers keep their order.
            Stmt::For { .. }
            | Stmt::If { .. }
            | Stmt::Atom { .. }
            | Stmt::Copy { .. }
            | Stmt::Arrive { .. }
            | Stmt::Wait { .. }
            | Stmt::NamedSync { .. }
            | Stmt::NamedArrive { .. }
            | Stmt::Fence(_)
            | Stmt::Commit(_)
            | Stmt::WaitGroup { .. }
            | Stmt::Last { .. }
            | Stmt::ClusterSync
            | Stmt::GridSync
            | Stmt::GridDependency(_) => false,
        };
        ordinary && !s.touches(self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::run;

    const DECLARED: &str = "global x: f32[N, 128] = 0
global g: f32[128] = 1
global n: i32[N] = 2
global y: f32[N, 128] = 3 written
frag a: f32[128] T[32@0.4]V[4@0.1]L[]
frag b: f32[128] T[32@0.4]V[4@0.1]L[]
frag c: f32[128] T[32@0.4]V[4@0.1]L[]
frag r: f32[] T[32@0.0]V[]L[]
vars i";

    fn moved(body: &str) -> String {
        super::super::moving::moved(DECLARED, 1, body, run)
    }

    #[test]
    fn loads_join_the_first_over_arithmetic_and_synchronisation() {
        let text = "load a = x[grid.0, 0]
reduce r = sum a over [0]
task_sync
load b = g[0]
map c = a[0] * r[] * b[0]
store y[grid.0, 0] walk [1] = c";
        let expected = "load a = x[grid.0, 0]; load b = g[0]; reduce r = sum a over [0]; task_sync; \
                        map c = a[0] * r[] * b[0]; store y[grid.0, 0] walk [1] = c";
        assert_eq!(moved(text), expected);
    }

    #[test]
    fn what_depends_on_what_is_between_stays() {
        // A written array; a fragment in use; a variable set in between; a loop in between; no load before it.
        for text in [
            "load a = x[grid.0, 0]; map c = a[0]; load b = y[grid.0, 0]; store y[grid.0, 0] walk [1] = b",
            "load a = x[grid.0, 0]; map b = a[0]; store y[grid.0, 0] walk [1] = b; load b = g[0]",
            "load a = x[grid.0, 0]; map c = a[0]; let i = fetch(n[grid.0]); load b = g[i]",
            "load a = x[grid.0, 0]; for i in 0..4 {; map c = a[0]; }; load b = g[0]",
            "map c = 1.0; load b = g[0]",
        ] {
            let text = text.replace("; ", "\n");
            assert_eq!(moved(&text), text.replace('\n', "; "));
        }
    }
}
