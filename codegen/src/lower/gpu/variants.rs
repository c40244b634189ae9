//! variants: what a launch must check before it runs a kernel, and the kernels it chooses among.
//!
//! A mapping's `whole` blocks must hold their extents, `exact` ones divide them. Wide loads and stores need aligned arrays and rows of whole
//! vectors: a kernel whose fragments hold vectors of an array comes twice, first for such arrays, then for any.
//! Invariant: the variants of one kernel compute the same where their assumptions hold, and the last one of the list
//! assumes nothing, or the mapping covers no longer extents (then a launch that fits none is refused).

use einfall_ir::arena::Id;
use einfall_ir::kernel::{Assumption, Bound, BufId, BufSpace, Engine, Expr, FragId, Kernel, Stmt, View, walk};
use einfall_ir::mapping::KernelMapping;
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, AxisKind, Plan};

use super::apply_mapping::fixed;
use super::exprs::size_of;
use super::{Step, refuse};

/// What the blocks of an entry take for granted: those that are `whole` hold their extents, and so do those of inner
/// axes in `lowered`, the kernel that is left when what can be walked is walked; those that are `exact` divide them. None if
/// an extent is known not to fit.
pub(super) fn assumptions(
    plan: &Plan,
    k: &tile::Kernel,
    lowered: &tile::Kernel,
    m: &KernelMapping,
) -> Option<Vec<Assumption>> {
    let mut out = Vec::new();
    let held = lowered.axes.iter().filter(|(_, a)| a.kind == AxisKind::Inner);
    let whole = k.axes.iter().filter(|(_, a)| m.axis(&a.name).is_some_and(|x| x.whole));
    for (_, a) in whole.chain(held) {
        let Some(block) = m.axis(&a.name).map(|x| x.block).or(a.block) else { continue };
        match fixed(&a.extent, &plan.ranks) {
            Some(n) if n > block => return None,
            Some(_) => {}
            None => {
                let assumption = Assumption::AtMost(size_of(plan, &a.extent), block);
                if !out.contains(&assumption) {
                    out.push(assumption);
                }
            }
        }
    }
    for (_, a) in k.axes.iter() {
        let Some(own) = m.axis(&a.name).filter(|x| x.exact && x.block > 1) else { continue };
        match fixed(&a.extent, &plan.ranks) {
            Some(n) if n % own.block != 0 => return None,
            Some(_) => {}
            None => {
                let assumption = Assumption::Multiple(size_of(plan, &a.extent), own.block);
                if !out.contains(&assumption) {
                    out.push(assumption);
                }
            }
        }
    }
    Some(out)
}

/// The variants of kernel `name` in the order a launch tries them, from one kernel per entry of its mapping.
///
/// # Errors
/// No entry fits, or more variants than a launch chooses among.
pub(super) fn run(plan: &Plan, name: &str, entries: Vec<Kernel>) -> Step<Vec<Kernel>> {
    let mut all = Vec::new();
    for k in entries {
        let wide = vectors(plan, &k);
        if !wide.is_empty() {
            let assumes = k.assumes.iter().cloned().chain(wide).collect();
            all.push(Kernel { assumes, ..k.clone() });
        }
        let last = k.assumes.is_empty();
        // Element by element there is more to compute and nothing to gain from more tasks.
        let alone = all.last().is_some_and(|a: &Kernel| a.assumes.len() > k.assumes.len()) && k.roles.len() == 1;
        let mut k = k;
        if alone {
            k.roles.iter_mut().for_each(|r| r.regs = None);
        }
        all.push(k);
        if last {
            break;
        }
    }
    if all.is_empty() {
        let message = format!("no entry for {name} holds its extents");
        return refuse("whole blocks", message, "add an entry without `whole` after the others");
    }
    if all.len() > 1 {
        for (i, k) in all.iter_mut().enumerate() {
            k.variant_of = Some(name.to_string());
            k.name = format!("{name}_v{i}");
        }
    }
    Ok(all)
}

/// What must hold for every vector that fragments hold along the last dimension of an array to be one access.
fn vectors(plan: &Plan, k: &Kernel) -> Vec<Assumption> {
    let (mut out, mut copied) = (Vec::new(), Vec::new());
    let mut add = |frag: FragId, view: &View, bounds: &[Bound]| {
        for a in vector(plan, k, frag, view, bounds).into_iter().flatten() {
            if !out.contains(&a) {
                out.push(a);
            }
        }
    };
    for r in &k.roles {
        walk(&r.body, &mut |s| match s {
            Stmt::Load { out, src, bounds } => add(*out, src, bounds),
            Stmt::Store { dst, src, bounds, join: None } => add(*src, dst, bounds),
            Stmt::Copy { engine: Engine::CpAsync, src, extents, .. } => {
                copied.extend(pieces(plan, k, src, extents).into_iter().flatten());
            }
            Stmt::Copy { engine: Engine::Tma, .. } => {}
            Stmt::Store { join: Some(_), .. }
            | Stmt::For { .. }
            | Stmt::If { .. }
            | Stmt::Let { .. }
            | Stmt::Map { .. }
            | Stmt::Reduce { .. }
            | Stmt::Scan { .. }
            | Stmt::Gather { .. }
            | Stmt::Scatter { .. }
            | Stmt::Atom { .. }
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
        });
    }
    for a in copied {
        if !out.contains(&a) {
            out.push(a);
        }
    }
    // Alignment first, extents after, each once: the text is for readers.
    out.sort_by_key(|a| match a {
        Assumption::Aligned(b, _) => (0, b.index()),
        Assumption::AtMost(..) | Assumption::Multiple(..) => (1, 0),
    });
    let mut merged: Vec<Assumption> = Vec::new();
    for a in out {
        match (merged.last_mut(), a) {
            (Some(Assumption::Aligned(b, n)), Assumption::Aligned(c, m)) if *b == c => *n = (*n).max(m),
            (_, a) => merged.push(a),
        }
    }
    merged
}

/// Bytes of the widest access.
const WIDEST: u64 = 16;
/// Narrower vectors are not worth a kernel of their own.
const NARROWEST: u64 = 16;

/// What one load or store needs to go in vectors; none if it cannot, or gains little.
fn vector(plan: &Plan, k: &Kernel, frag: FragId, view: &View, bounds: &[Bound]) -> Option<[Assumption; 2]> {
    let array: BufId = view.buf;
    let BufSpace::Global { .. } = k.bufs[array].space else { return None };
    let run = k.frags[frag].dist.regs.first().filter(|g| g.stride == 1)?;
    let last = k.bufs[array].dims.len().checked_sub(1)?;
    if view.walk[run.dim] != Some((last, 1)) {
        return None;
    }
    let bytes = k.bufs[array].dtype.bytes(run.extent).min(WIDEST);
    let elems = (bytes * 8 / u64::from(k.bufs[array].dtype.bits())).max(1);
    if bytes < NARROWEST || !divides(elems, &view.at[last]) {
        return None;
    }
    let extent = k.bufs[array].dims[last].clone();
    // A tail that ends inside a vector would need its elements one by one.
    if let Some(n) = constant(plan, &extent)
        && n % elems as i64 != 0
        && bounds.iter().any(|b| b.dim == run.dim)
    {
        return None;
    }
    Some([Assumption::Aligned(array, bytes), Assumption::Multiple(extent, run.extent)])
}

/// What a copy by threads needs to go in the widest pieces, each whole or absent.
fn pieces(plan: &Plan, k: &Kernel, src: &View, extents: &[u64]) -> Option<[Assumption; 2]> {
    let last = k.bufs[src.buf].dims.len().checked_sub(1)?;
    let d = src.walk.iter().position(|w| *w == Some((last, 1)))?;
    let bytes = k.bufs[src.buf].dtype.bytes(extents[d]);
    let extent = k.bufs[src.buf].dims[last].clone();
    let elems = WIDEST * 8 / u64::from(k.bufs[src.buf].dtype.bits());
    if !bytes.is_multiple_of(WIDEST) || constant(plan, &extent).is_some_and(|n| n % elems as i64 != 0) {
        return None;
    }
    Some([Assumption::Aligned(src.buf, WIDEST), Assumption::Multiple(extent, elems)])
}

fn constant(plan: &Plan, e: &Expr) -> Option<i64> {
    match e {
        Expr::Int(n) => Some(*n),
        Expr::Extent(r) => plan.ranks[*r].fixed.and_then(|n| i64::try_from(n).ok()),
        _ => None,
    }
}

/// Whether `n` divides the expression by its form.
fn divides(n: u64, e: &Expr) -> bool {
    match e {
        Expr::Int(v) => v.unsigned_abs() % n == 0,
        Expr::Binary(BinaryOp::Add | BinaryOp::Sub, a, b) => divides(n, a) && divides(n, b),
        Expr::Binary(BinaryOp::Mul, a, b) => divides(n, a) || divides(n, b),
        _ => false,
    }
}
