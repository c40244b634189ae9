//! Copies under way: what is loaded for a later trip and stored when its group is awaited.
//!
//! A tile's copy has variables of its own, so that it may be issued in one trip of a loop and stored in the next: the variables
//! are the same. That needs the same copies under way wherever control flow meets, and one of a tile at a time. Kernels that
//! multiply matrices, whose tiles are large, have all loads of a step under way together so. Invariant: another kernel whose
//! tiles all have one stage, and one of which that is not so, does its copies when it issues them.

use einfall_ir::kernel::{BufId, BufSpace, Engine, Expr, GroupKind, Kernel, Stmt};

use super::copy::Pieces;

/// Copies of a kernel at a point of its text.
#[derive(Clone, Default)]
pub(super) struct Ahead {
    /// Groups that nobody has awaited, oldest first.
    pub(super) groups: Vec<Vec<Pieces>>,
    /// Copies in no group yet.
    pub(super) open: Vec<Pieces>,
}

/// The same by tiles alone.
#[derive(Clone, Default, PartialEq)]
struct Flow {
    groups: Vec<Vec<BufId>>,
    open: Vec<BufId>,
}

impl Flow {
    /// Follows statements; none where control flow meets with different copies under way, or two of one tile are.
    fn run(mut self, body: &[Stmt]) -> Option<Flow> {
        for s in body {
            match s {
                Stmt::Copy { engine: Engine::CpAsync, dst, .. } => {
                    let under_way = self.groups.iter().flatten().chain(&self.open).any(|b| *b == dst.buf);
                    if under_way || !dst.at.iter().all(settled) {
                        return None;
                    }
                    self.open.push(dst.buf);
                }
                Stmt::Commit(GroupKind::CpAsync) => {
                    let group = std::mem::take(&mut self.open);
                    self.groups.push(group);
                }
                Stmt::WaitGroup { kind: GroupKind::CpAsync, pending } => {
                    let done = self.groups.len().saturating_sub(*pending as usize);
                    self.groups.drain(..done);
                }
                Stmt::For { body, .. } => {
                    let before = self.clone();
                    self = self.run(body).filter(|after| *after == before)?;
                }
                Stmt::If { then, otherwise, .. } => {
                    let other = self.clone().run(otherwise)?;
                    self = self.run(then).filter(|after| *after == other)?;
                }
                _ => {}
            }
        }
        Some(self)
    }
}

/// Whether an expression has the same value wherever it stands.
fn settled(e: &Expr) -> bool {
    let mut same = !matches!(e, Expr::Var(_) | Expr::Fetch { .. });
    e.for_each_operand(|o| same &= settled(o));
    same
}

impl Ahead {
    /// What a kernel begins with; none where its copies are done when they are issued.
    pub(super) fn of(k: &Kernel, matrices: bool) -> Option<Ahead> {
        let rings =
            matrices || k.bufs.iter().any(|(_, b)| matches!(b.space, BufSpace::Shared { stages, .. } if stages > 1));
        let [role] = k.roles.as_slice() else { return None };
        let end = Flow::default().run(&role.body).filter(|_| rings)?;
        (end == Flow::default()).then(Ahead::default)
    }
}
