//! Planted faults: a kernel with one piece of its synchronisation left out or bent.
//!
//! Every mutant of a correct kernel must be caught by the evaluator (race, deadlock, misuse or wrong result) under
//! some schedule, or be shown redundant. [`mutants`] gives them in statement order; how the faults are judged is the
//! caller's business. Invariant: mutants differ from the kernel in exactly one statement or declaration.

use super::*;
use crate::layout::Swizzle;
use crate::ops::BinaryOp;

/// What was done to a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// It is left out.
    Missing,
    /// A wait for the other parity.
    WrongPhase,
    /// The stage of a wait or arrival, one further (around the ring).
    WrongStage,
    /// 16 bytes fewer expected.
    FewerBytes,
    /// One group more may stay open.
    LaterGroup,
    /// One unit fewer counts before the last.
    FewerArrivals,
    /// A swizzle of half the span in a shared buffer's layout.
    WrongSwizzle,
    /// One stage fewer in a shared buffer.
    FewerStages,
}

/// A kernel with one fault.
#[derive(Clone, Debug, PartialEq)]
pub struct Mutant {
    /// What was done.
    pub fault: Fault,
    /// Where: `role.2.0: statement`, or the buffer.
    pub place: String,
    /// The kernel with the fault.
    pub kernel: Kernel,
}

/// Every mutant of `kernel`, whose ranks are `ranks`.
pub fn mutants<'a>(kernel: &'a Kernel, ranks: &'a Arena<RankId, Rank>) -> impl Iterator<Item = Mutant> + 'a {
    let mut sites = Vec::new();
    for (r, role) in kernel.roles.iter().enumerate() {
        find(&role.body, &mut vec![r], &mut sites);
    }
    let statements = sites.into_iter().map(move |(path, fault)| {
        let mut mutant = kernel.clone();
        let numbers: Vec<String> = path[1..].iter().map(usize::to_string).collect();
        let role = &kernel.roles[path[0]].name;
        let (body, last) = locate(&mut mutant.roles[path[0]].body, &path[1..]);
        let line = print::statement_line(kernel, ranks, &body[last]);
        bend(body, last, fault, &kernel.barriers);
        Mutant { fault, place: format!("{role}.{}: {line}", numbers.join(".")), kernel: mutant }
    });
    let buffers = kernel.bufs.iter().filter_map(|(id, b)| match &b.space {
        BufSpace::Shared { layout, stages } => Some((id, b.name.clone(), layout.swizzle, *stages)),
        BufSpace::Global { .. } | BufSpace::Scratch { .. } => None,
    });
    let declared = buffers.flat_map(move |(id, name, swizzle, stages)| {
        let swizzled = swizzle.and_then(|s| Swizzle::span(s.span_bytes() / 2)).map(|half| {
            let mut mutant = kernel.clone();
            if let BufSpace::Shared { layout, .. } = &mut mutant.bufs[id].space {
                layout.swizzle = Some(half);
            }
            Mutant { fault: Fault::WrongSwizzle, place: name.clone(), kernel: mutant }
        });
        let fewer = (stages > 1).then(|| {
            let mut mutant = kernel.clone();
            if let BufSpace::Shared { stages, .. } = &mut mutant.bufs[id].space {
                *stages -= 1;
            }
            Mutant { fault: Fault::FewerStages, place: name.clone(), kernel: mutant }
        });
        swizzled.into_iter().chain(fewer)
    });
    statements.chain(declared)
}

/// Paths of statements, role first, with the faults each can have. In a path, the branches of an `if` count on: first
/// those of `then`, then those of `otherwise`.
fn find(body: &[Stmt], path: &mut Vec<usize>, sites: &mut Vec<(Vec<usize>, Fault)>) {
    for (i, s) in body.iter().enumerate() {
        path.push(i);
        let faults: &[Fault] = match s {
            Stmt::For { body, .. } => {
                find(body, path, sites);
                &[]
            }
            Stmt::If { then, otherwise, .. } => {
                let mut both = then.clone();
                both.extend(otherwise.iter().cloned());
                find(&both, path, sites);
                &[]
            }
            Stmt::Wait { .. } => &[Fault::Missing, Fault::WrongPhase, Fault::WrongStage],
            Stmt::Arrive { expect_bytes: Some(b), .. } if *b > 16 => {
                &[Fault::Missing, Fault::WrongStage, Fault::FewerBytes]
            }
            Stmt::Arrive { .. } => &[Fault::Missing, Fault::WrongStage],
            Stmt::WaitGroup { .. } => &[Fault::Missing, Fault::LaterGroup],
            Stmt::Last { .. } => &[Fault::Missing, Fault::FewerArrivals],
            Stmt::NamedSync { .. }
            | Stmt::NamedArrive { .. }
            | Stmt::Fence(_)
            | Stmt::Commit(_)
            | Stmt::TaskSync
            | Stmt::ClusterSync
            | Stmt::GridSync
            | Stmt::GridDependency(GridDependency::Wait) => &[Fault::Missing],
            // Without it the next grid starts later.
            Stmt::GridDependency(GridDependency::Launch)
            | Stmt::Let { .. }
            | Stmt::Map { .. }
            | Stmt::Reduce { .. }
            | Stmt::Scan { .. }
            | Stmt::Load { .. }
            | Stmt::Store { .. }
            | Stmt::Gather { .. }
            | Stmt::Scatter { .. }
            | Stmt::Atom { .. }
            | Stmt::Copy { .. } => &[],
        };
        sites.extend(faults.iter().map(|f| (path.clone(), *f)));
        path.pop();
    }
}

/// The list that holds the statement at `path`, and its position there.
fn locate<'a>(body: &'a mut Vec<Stmt>, path: &[usize]) -> (&'a mut Vec<Stmt>, usize) {
    let (first, rest) = path.split_first().expect("a path has a statement");
    if rest.is_empty() {
        return (body, *first);
    }
    match &mut body[*first] {
        Stmt::For { body, .. } => locate(body, rest),
        Stmt::If { then, otherwise, .. } => match rest[0].checked_sub(then.len()) {
            None => locate(then, rest),
            Some(i) => {
                let mut path = rest.to_vec();
                path[0] = i;
                locate(otherwise, &path)
            }
        },
        _ => unreachable!("paths descend through loops and branches only"),
    }
}

fn bend(body: &mut Vec<Stmt>, at: usize, fault: Fault, barriers: &Arena<BarrierId, Barrier>) {
    match (fault, &mut body[at]) {
        (Fault::WrongPhase, Stmt::Wait { phase, .. }) => {
            *phase = Expr::Int(1).bin(BinaryOp::Sub, phase.clone());
        }
        (Fault::WrongStage, Stmt::Wait { barrier, stage, .. } | Stmt::Arrive { barrier, stage, .. }) => {
            let next = stage.clone().bin(BinaryOp::Add, Expr::Int(1));
            let stages = barriers.get(*barrier).map_or(1, |b| b.stages);
            *stage = if stages > 1 { next.bin(BinaryOp::Mod, Expr::Int(stages as i64)) } else { next };
        }
        (Fault::FewerBytes, Stmt::Arrive { expect_bytes: Some(b), .. }) => *b -= 16,
        (Fault::FewerArrivals, Stmt::Last { of, .. }) => *of = of.clone().bin(BinaryOp::Sub, Expr::Int(1)),
        (Fault::LaterGroup, Stmt::WaitGroup { pending, .. }) => *pending += 1,
        _ => {
            body.remove(at);
        }
    }
}
