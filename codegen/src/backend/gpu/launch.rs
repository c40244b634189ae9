//! How kernels on GPUs are launched, in terms of the artifact.
//!
//! Invariant: what a launch says of sizes it says as expressions over ranks.

use std::collections::BTreeSet;

use einfall_ir::arena::Id;
use einfall_ir::artifact::{Condition, GpuLaunch, Launch, Slot, TensorMap};
use einfall_ir::cascade::Size;
use einfall_ir::kernel::{Assumption, BufSpace, Kernel, Stmt, walk};
use einfall_ir::tile::{self, BufferId, Plan};

use crate::backend::llvm::launch::{add, buffer_bytes, flops, launch_bytes, size_of, traffic};

/// What only the printer of a kernel knows of its launch.
pub(in crate::backend) struct Printed {
    /// The entry's name.
    pub(in crate::backend) symbol: String,
    pub(in crate::backend) slots: Vec<Slot>,
    /// Threads of a task.
    pub(in crate::backend) threads: u64,
    /// Bytes of shared memory of a task.
    pub(in crate::backend) shared_bytes: u64,
    pub(in crate::backend) maps: Vec<TensorMap>,
}

/// The kernel of the plan that `k` was lowered from; none for one that the mapping added (a merge of splits).
pub(in crate::backend) fn source<'p>(plan: &'p Plan, k: &Kernel) -> Option<&'p tile::Kernel> {
    let name = k.variant_of.as_ref().unwrap_or(&k.name);
    plan.kernels.iter().find(|s| s.name == *name)
}

/// The launch of a printed kernel.
///
/// # Errors
/// What has no such terms, a noun phrase.
pub(in crate::backend) fn launch(plan: &Plan, k: &Kernel, printed: Printed) -> Result<Launch, &'static str> {
    let source = source(plan, k);
    let counters: Vec<BufferId> = k.counters().into_iter().map(BufferId::new).collect();
    // A kernel that holds a merge touches more than the kernel of the plan it is named after.
    let (reads, writes) = match source.filter(|_| counters.is_empty()) {
        Some(source) => traffic(source),
        None => arrays(k),
    };
    let bytes = match source {
        Some(source) => launch_bytes(plan, source),
        None => reads.iter().chain(&writes).fold(Size::Const(0), |acc, b| add(acc, buffer_bytes(plan, *b))),
    };
    let grid = k.grid.iter().map(|g| size_of(g).ok_or("a grid of that form")).collect::<Result<_, _>>()?;
    let mut cooperative = false;
    k.roles.iter().for_each(|r| walk(&r.body, &mut |s| cooperative |= matches!(s, Stmt::GridSync)));
    Ok(Launch {
        symbol: printed.symbol,
        slots: printed.slots,
        grid,
        ordered: false,
        scratch_bytes: Size::Const(0),
        reads: reads.into_iter().collect(),
        writes: writes.into_iter().collect(),
        flops: source.map_or(Size::Const(0), flops),
        bytes,
        gpu: Some(GpuLaunch {
            threads: printed.threads as u32,
            cluster: k.cluster.clone(),
            shared_bytes: printed.shared_bytes,
            cooperative,
            dependent: k.dependent,
            counters,
            maps: printed.maps,
            variant_of: k.variant_of.clone(),
            assumes: k.assumes.iter().map(|a| condition(k, a)).collect::<Result<_, _>>()?,
        }),
    })
}

/// What a variant takes for granted, in terms of the artifact.
///
/// # Errors
/// What has no such terms, a noun phrase.
fn condition(k: &Kernel, a: &Assumption) -> Result<Condition, &'static str> {
    let size = |x| size_of(x).ok_or("an assumption of that form");
    Ok(match a {
        Assumption::AtMost(x, n) => Condition::AtMost(size(x)?, *n),
        Assumption::Multiple(x, n) => Condition::Multiple(size(x)?, *n),
        Assumption::Aligned(b, n) => match k.bufs[*b].space {
            BufSpace::Global { param, .. } => Condition::Aligned(BufferId::new(param), *n),
            BufSpace::Shared { .. } | BufSpace::Scratch { .. } => return Err("an assumption about no array"),
        },
    })
}

/// Arrays that a kernel reads and writes, by its buffers: one that it writes counts as written alone.
fn arrays(k: &Kernel) -> (BTreeSet<BufferId>, BTreeSet<BufferId>) {
    let of = |w: bool| {
        k.bufs.iter().filter_map(move |(_, b)| match b.space {
            BufSpace::Global { param, written, .. } if written == w => Some(BufferId::new(param)),
            BufSpace::Global { .. } | BufSpace::Shared { .. } | BufSpace::Scratch { .. } => None,
        })
    };
    (of(false).collect(), of(true).collect())
}
