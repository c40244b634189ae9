//! Which fragments hold values of a narrower float type only, so that storing them in it rounds nothing.
//!
//! Invariant: a fragment is of a type only where everything that writes it is: casts to it, loads of arrays of it, zeros,
//! and choices between such fragments.

use super::*;
use einfall_ir::arena::Id;
use einfall_ir::kernel::{Expr, FragId, Kernel, Stmt};

/// What is known of a fragment's values.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    /// Nothing was seen that writes it, or zeros alone: they are of any type.
    Any,
    Of(DType),
    Wide,
}

impl Known {
    fn and(self, other: Known) -> Known {
        match (self, other) {
            (Known::Any, x) | (x, Known::Any) => x,
            (Known::Of(a), Known::Of(b)) if a == b => self,
            (Known::Of(_) | Known::Wide, Known::Of(_) | Known::Wide) => Known::Wide,
        }
    }
}

/// The narrow type of every fragment, by number.
pub(super) fn types(k: &Kernel) -> Vec<Option<DType>> {
    let mut known = vec![Known::Any; k.frags.len()];
    // What is written may be read before it in the text, in a loop: until nothing changes.
    loop {
        let before = known.clone();
        k.roles.iter().for_each(|r| visit(k, &r.body, &mut known));
        if known == before {
            break;
        }
    }
    let of = |k: Known| match k {
        Known::Of(d) => Some(d),
        Known::Any | Known::Wide => None,
    };
    known.into_iter().map(of).collect()
}

fn narrow(d: DType) -> Known {
    if matches!(d, DType::BF16 | DType::F16) { Known::Of(d) } else { Known::Wide }
}

fn visit(k: &Kernel, body: &[Stmt], known: &mut [Known]) {
    let set = |known: &mut [Known], f: FragId, to: Known| known[f.index()] = known[f.index()].and(to);
    for s in body {
        match s {
            Stmt::For { body, .. } => visit(k, body, known),
            Stmt::If { then, otherwise, .. } => {
                visit(k, then, known);
                visit(k, otherwise, known);
            }
            Stmt::Map { out, value } => {
                let value = value_of(value, known);
                // A fragment of a narrow type rounds what is written to it.
                let own = narrow(k.frags[*out].dtype);
                set(known, *out, if own == Known::Wide { value } else { own });
            }
            Stmt::Load { out, src, .. } => set(known, *out, narrow(k.bufs[src.buf].dtype)),
            Stmt::Gather { out, buf, .. } => set(known, *out, narrow(k.bufs[*buf].dtype)),
            Stmt::Reduce { out, .. } => out.iter().for_each(|f| set(known, *f, Known::Wide)),
            Stmt::Scan { out, carry, .. } => {
                set(known, *out, Known::Wide);
                carry.iter().for_each(|f| set(known, *f, Known::Wide));
            }
            Stmt::Atom { acc, .. } => set(known, *acc, Known::Wide),
            Stmt::Let { .. }
            | Stmt::Store { .. }
            | Stmt::Scatter { .. }
            | Stmt::Copy { .. }
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
    }
}

fn value_of(e: &Expr, known: &[Known]) -> Known {
    match e {
        Expr::Cast(d, _) => narrow(*d),
        Expr::Frag { frag, .. } => known[frag.index()],
        Expr::Float(x) if *x == 0.0 => Known::Any,
        Expr::Select(_, a, b) => value_of(a, known).and(value_of(b, known)),
        Expr::Int(_)
        | Expr::Float(_)
        | Expr::Var(_)
        | Expr::Extent(_)
        | Expr::Grid(_)
        | Expr::Unit
        | Expr::ClusterRank
        | Expr::Scalar(_)
        | Expr::Fetch { .. }
        | Expr::Coord(_)
        | Expr::Unary(..)
        | Expr::Binary(..)
        | Expr::Fma(..)
        | Expr::Rand(_) => Known::Wide,
    }
}
