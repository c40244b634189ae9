//! late-starts: what begins as a constant begins where it is first used.
//!
//! ```text
//! map r = 0.0; for .. { reduce r_unit = sum x carry }; load r_all; reduce r = sum r_all carry
//! →  for .. { reduce r_unit = sum x carry }; load r_all; map r = 0.0; reduce r = sum r_all carry
//! ```
//! The result of a stream whose units meet after it is not used in it: its registers would be held through all steps for a
//! constant. Within the list of statements that sets it. Invariant: a constant moves over statements that do not touch it.

use einfall_ir::kernel::{Expr, Kernel, Stmt, walk};

/// Moves the constants of every role.
pub(super) fn run(mut kernel: Kernel) -> Kernel {
    for role in &mut kernel.roles {
        // Instructions that run asynchronously have rules of their own for what they write.
        let mut asynchronous = false;
        walk(&role.body, &mut |s| asynchronous |= matches!(s, Stmt::Atom { .. } | Stmt::Fence(_)));
        if asynchronous {
            continue;
        }
        let body = &mut role.body;
        for i in (0..body.len()).rev() {
            let Stmt::Map { out, value: Expr::Int(_) | Expr::Float(_) } = &body[i] else { continue };
            let out = *out;
            if let Some(use_at) = (i + 1..body.len()).find(|j| body[*j].touches(out)) {
                body[i..use_at].rotate_left(1);
            }
        }
    }
    kernel
}

#[cfg(test)]
mod tests {
    use super::run;

    const DECLARED: &str = "global x: f32[N, 128] = 0
global y: f32[N, 128] = 1 written
frag a: f32[128] T[32@0.4]V[4@0.1]L[]
frag r: f32[128] T[32@0.4]V[4@0.1]L[]
frag s: f32[128] T[32@0.4]V[4@0.1]L[]
vars i";

    #[test]
    fn a_constant_begins_where_it_is_used() {
        let moved = |body: &str| super::super::moving::moved(DECLARED, 1, body, run);
        assert_eq!(
            moved(
                "map r = 0.0\nmap s = 0.0\nload a = x[grid.0, 0]\nfor i in 0..4 {\nmap s = s[0] + a[0]\n}\nmap r = r[0] + s[0]\nstore y[grid.0, 0] walk [1] = r"
            ),
            "load a = x[grid.0, 0]; map s = 0.0; for i in 0..4 {; map s = s[0] + a[0]; }; map r = 0.0; \
             map r = r[0] + s[0]; store y[grid.0, 0] walk [1] = r"
        );
    }
}
