//! Which fragments statements and expressions touch.
//!
//! Invariant: a statement's own fragments only; those of statements within it ([`Stmt::bodies`]) are theirs.

use super::{Expr, FragId, Operand, Stmt};

impl Expr {
    /// Adds the fragments that the expression reads to `out`, each as often as it is read.
    pub fn frags(&self, out: &mut Vec<FragId>) {
        if let Expr::Frag { frag, .. } = self {
            out.push(*frag);
        }
        self.for_each_operand(|o| o.frags(out));
    }

    /// Whether the expression reads the fragment.
    pub fn reads(&self, f: FragId) -> bool {
        let mut found = matches!(self, Expr::Frag { frag, .. } if *frag == f);
        self.for_each_operand(|o| found |= o.reads(f));
        found
    }
}

impl Stmt {
    /// Fragments that the statement itself reads, and those it writes. An accumulator is both.
    pub fn frags(&self) -> (Vec<FragId>, Vec<FragId>) {
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        match self {
            Stmt::For { lo, hi, .. } => {
                lo.frags(&mut reads);
                hi.frags(&mut reads);
            }
            Stmt::If { cond: e, .. } | Stmt::Let { value: e, .. } => e.frags(&mut reads),
            Stmt::Map { out, value } => {
                value.frags(&mut reads);
                writes.push(*out);
            }
            Stmt::Reduce { out, src, carry, .. } => {
                reads.push(*src);
                if *carry {
                    reads.extend(out);
                }
                writes.extend(out);
            }
            Stmt::Scan { out, src, carry, .. } => {
                reads.push(*src);
                reads.extend(carry);
                writes.push(*out);
                writes.extend(carry);
            }
            Stmt::Load { out, .. } => writes.push(*out),
            Stmt::Store { src, .. } => reads.push(*src),
            Stmt::Gather { out, at, .. } => {
                at.iter().for_each(|e| e.frags(&mut reads));
                writes.push(*out);
            }
            Stmt::Scatter { at, src, .. } => {
                at.iter().for_each(|e| e.frags(&mut reads));
                reads.push(*src);
            }
            Stmt::Atom { acc, a, b, .. } => {
                reads.extend([a, b].into_iter().filter_map(|o| match o {
                    Operand::Frag { frag, .. } => Some(*frag),
                    Operand::Mem(_) => None,
                }));
                reads.push(*acc);
                writes.push(*acc);
            }
            Stmt::Copy { .. }
            | Stmt::Arrive { .. }
            | Stmt::Wait { .. }
            | Stmt::NamedSync { .. }
            | Stmt::NamedArrive { .. }
            | Stmt::Fence(_)
            | Stmt::Commit(_)
            | Stmt::WaitGroup { .. }
            | Stmt::Last { .. }
            | Stmt::TaskSync
            | Stmt::ClusterSync
            | Stmt::GridSync
            | Stmt::GridDependency(_) => {}
        }
        (reads, writes)
    }

    /// Whether the statement, or one within it, reads or writes the fragment.
    pub fn touches(&self, f: FragId) -> bool {
        let (reads, writes) = self.frags();
        reads.contains(&f) || writes.contains(&f) || self.bodies().into_iter().flatten().any(|s| s.touches(f))
    }
}
