//! store-once: what only one unit stores is computed by that unit alone.
//!
//! ```text
//! task_sync; load r_all = r_units; reduce r = sum r_all; map y = r · s; if unit == 0 { store y }
//! →  task_sync; if unit == 0 { load r_all = r_units; reduce r = sum r_all; map y = r · s; store y }
//! ```
//! Units that hold the same result have one of them store it. The others then need not read what all units left in shared
//! memory either: of a result of many elements by many units that would be most of a task's end. Invariant: only the end of
//! a role moves, where no units meet any more and nothing is written but under the same condition.

use einfall_ir::kernel::{BufSpace, Expr, Kernel, Stmt};
use einfall_ir::ops::BinaryOp;

/// Applies the pass.
pub(super) fn run(mut kernel: Kernel) -> Kernel {
    if kernel.roles.len() != 1 || kernel.roles[0].units < 2 {
        return kernel;
    }
    let mut body = std::mem::take(&mut kernel.roles[0].body);
    let end = body.iter().rposition(|s| !is_once(s)).map_or(0, |i| i + 1);
    let moves = |s: &Stmt| match s {
        Stmt::Map { .. } | Stmt::Reduce { .. } => true,
        Stmt::Load { src, .. } => matches!(kernel.bufs[src.buf].space, BufSpace::Shared { .. }),
        _ => false,
    };
    let start = body[..end].iter().rposition(|s| !moves(s) && !is_once(s)).map_or(0, |i| i + 1);
    // What sets out before the units' last meeting overlaps it.
    let meets = start > 0 && matches!(body[start - 1], Stmt::TaskSync);
    if meets && start < end && end < body.len() {
        let then = body.split_off(start);
        body.push(Stmt::If { cond: first_unit(), then, otherwise: Vec::new() });
    }
    kernel.roles[0].body = body;
    kernel
}

fn first_unit() -> Expr {
    Expr::Unit.bin(BinaryOp::Eq, Expr::Int(0))
}

/// Whether the first unit alone does it.
fn is_once(s: &Stmt) -> bool {
    fn says(e: &Expr) -> bool {
        match e {
            Expr::Binary(BinaryOp::And, a, b) => says(a) || says(b),
            e => *e == first_unit(),
        }
    }
    matches!(s, Stmt::If { cond, otherwise, .. } if otherwise.is_empty() && says(cond))
}

#[cfg(test)]
mod tests {
    use super::run;

    const DECLARED: &str = "global y: f32[N, 128] = 0 written
shared s: f32[2, 128]
frag a: f32[2, 128] T[32@1.4]V[4@1.1,2@0.1]L[]
frag r: f32[128] T[32@0.4]V[4@0.1]L[]
vars i";

    fn moved(body: &str) -> String {
        super::super::moving::moved(DECLARED, 2, body, run)
    }

    #[test]
    fn the_end_of_what_one_unit_stores_is_its_own() {
        let text = "task_sync
load a = s[0, 0]
reduce r = sum a over [0]
if unit == 0 {
store y[grid.0, 0] walk [1] = r
}";
        let all = "task_sync; if unit == 0 {; load a = s[0, 0]; reduce r = sum a over [0]; if unit == 0 {; \
                   store y[grid.0, 0] walk [1] = r; }; }";
        assert_eq!(moved(text), all);
        // Stored by every unit; met again; nothing stored.
        for text in [
            text.replace("unit == 0", "unit < 2"),
            text.replace("reduce r", "task_sync\nlet i = 1\nreduce r"),
            text.lines().take(3).collect::<Vec<_>>().join("\n"),
        ] {
            assert_eq!(moved(&text), text.replace('\n', "; "));
        }
    }
}
