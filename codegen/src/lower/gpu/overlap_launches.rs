//! overlap-launches: kernels whose launch may start while the one before them runs (programmatic dependent launch).
//!
//! ```text
//! kernel a { role r { .. } }      kernel b { role r { load x (an input); load y (stored by a); .. } }       (b dependent)
//! →  kernel a { role r { grid_dependency launch; .. } }
//!    kernel b dependent { role r { load x; grid_dependency wait; load y; .. } }
//! ```
//! A role waits before the first of its outermost statements that touches an array in conflict: one that a kernel before
//! it stores to, or that it stores to itself and a kernel before it touches. The kernel before gives leave when a task
//! begins: the next grid starts when all tasks have begun and there is room, and holds nothing but its place while it
//! waits. Invariant: some role of a dependent kernel waits whatever it computes, so a kernel has ended only after all
//! those before it have, and waiting for the last is waiting for all.
//! Source: PTX ISA, "griddepcontrol"; CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".

use std::collections::BTreeSet;

use einfall_ir::kernel::{BufId, BufSpace, Expr, GridDependency, Kernel, Operand, Stmt};

use super::{Step, refuse};

/// Makes the variants of one kernel, which come after `before` in their plan, dependent.
///
/// # Errors
/// There is no kernel before it.
pub(super) fn run(before: &mut [Kernel], own: &mut [Kernel]) -> Step<()> {
    let Some(last) = before.last() else {
        let name = own.first().map_or("", |k| k.name.as_str());
        let message = format!("{name} is the plan's first kernel: there is none to overlap with");
        return refuse("dependent launch", message, "leave out `dependent`");
    };
    let name = last.variant_of.clone().unwrap_or_else(|| last.name.clone());
    let (mut touched, mut stored) = (BTreeSet::new(), BTreeSet::new());
    for k in before.iter() {
        for (_, b) in k.bufs.iter() {
            if let BufSpace::Global { param, written, .. } = b.space {
                touched.insert(param);
                stored.extend(written.then_some(param));
            }
        }
    }
    for k in own {
        let conflicts: Vec<BufId> = k
            .bufs
            .iter()
            .filter(|(_, b)| match b.space {
                BufSpace::Global { param, written, .. } => {
                    stored.contains(&param) || (written && touched.contains(&param))
                }
                BufSpace::Shared { .. } | BufSpace::Scratch { .. } => false,
            })
            .map(|(id, _)| id)
            .collect();
        let wait = Stmt::GridDependency(GridDependency::Wait);
        let mut waits = false;
        for role in &mut k.roles {
            if let Some(at) = role.body.iter().position(|s| touches(s, &conflicts)) {
                role.body.insert(at, wait.clone());
                waits = true;
            }
        }
        if !waits && let Some(role) = k.roles.last_mut() {
            role.body.push(wait);
        }
        k.dependent = true;
    }
    let leave = Stmt::GridDependency(GridDependency::Launch);
    for k in before.iter_mut().filter(|k| k.variant_of.as_ref().unwrap_or(&k.name) == &name) {
        if let Some(role) = k.roles.first_mut()
            && !role.body.contains(&leave)
        {
            role.body.insert(0, leave.clone());
        }
    }
    Ok(())
}

/// Whether the statement, or one within it, reads or writes one of the arrays.
fn touches(s: &Stmt, arrays: &[BufId]) -> bool {
    let any = |list: &[Expr]| list.iter().any(|e| fetches(e, arrays));
    let own = match s {
        Stmt::For { lo, hi, .. } => fetches(lo, arrays) || fetches(hi, arrays),
        Stmt::If { cond: e, .. } | Stmt::Let { value: e, .. } | Stmt::Map { value: e, .. } => fetches(e, arrays),
        Stmt::Reduce { base, bounds, .. } => {
            base.as_ref().is_some_and(|e| fetches(e, arrays)) || bounds.iter().any(|b| fetches(&b.limit, arrays))
        }
        Stmt::Scan { bounds, .. } => bounds.iter().any(|b| fetches(&b.limit, arrays)),
        Stmt::Load { src: view, bounds, .. } | Stmt::Store { dst: view, bounds, .. } => {
            arrays.contains(&view.buf) || any(&view.at) || bounds.iter().any(|b| fetches(&b.limit, arrays))
        }
        Stmt::Gather { buf, at, bounds, .. } | Stmt::Scatter { buf, at, bounds, .. } => {
            arrays.contains(buf) || any(at) || bounds.iter().any(|b| fetches(&b.limit, arrays))
        }
        Stmt::Copy { src, dst, .. } => {
            arrays.contains(&src.buf) || arrays.contains(&dst.buf) || any(&src.at) || any(&dst.at)
        }
        Stmt::Last { counter, at, of, .. } => arrays.contains(counter) || any(at) || fetches(of, arrays),
        Stmt::Atom { a, b, .. } => [a, b].into_iter().any(|o| match o {
            Operand::Mem(view) => any(&view.at),
            Operand::Frag { .. } => false,
        }),
        Stmt::Arrive { .. }
        | Stmt::Wait { .. }
        | Stmt::NamedSync { .. }
        | Stmt::NamedArrive { .. }
        | Stmt::Fence(_)
        | Stmt::Commit(_)
        | Stmt::WaitGroup { .. }
        | Stmt::TaskSync
        | Stmt::ClusterSync
        | Stmt::GridSync
        | Stmt::GridDependency(_) => false,
    };
    own || s.bodies().into_iter().flatten().any(|s| touches(s, arrays))
}

/// Whether the expression reads one of the arrays. Scalars are parameters of the launch.
fn fetches(e: &Expr, arrays: &[BufId]) -> bool {
    let mut found = matches!(e, Expr::Fetch { buf, .. } if arrays.contains(buf));
    e.for_each_operand(|o| found |= fetches(o, arrays));
    found
}
