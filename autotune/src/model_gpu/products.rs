//! Mappings of kernels whose contractions no instruction takes: blocks alone, so that the lowering computes them as sums
//! of products in registers.
//!
//! Contractions without a row or a column axis (a state times a vector), types without an instruction, devices without
//! one that the model maps to. A warp holds the elements of its largest operation, [`HELD`] of them at most: inner axes
//! are whole, streams go a few coordinates at a time, and the axis along which the largest array is contiguous (or else
//! the last grid axis) is cut over the warps of a task in blocks that fill what is left. Inner axes of unknown extent
//! get an entry for each of [`CLASSES`]. Invariant: whatever the kernel, every block is at least 1; what does not fit is
//! refused by the lowering with the constraint's name.

use std::collections::BTreeSet;

use einfall_ir::mapping::{AxisMapping, KernelMapping};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{AxisId, AxisKind, Expr, Kernel, Op, Place, Plan};

use super::elementwise::Facts;

/// Elements of one operation that a warp holds: 32 a thread, beside as many of the products under way.
const HELD: u64 = 1024;
/// Warps of a task.
const WARPS: u64 = 4;
/// Coordinates of a step of a stream.
const STEPS: u64 = 8;
/// Extents of inner axes that entries are made for where none is known.
const CLASSES: [u64; 4] = [16, 64, 128, 256];

/// The axes whose coordinates an operation's elements have. What is read of a tile at an index of the operation counts
/// as that.
fn domain(k: &Kernel, op: &Op) -> BTreeSet<AxisId> {
    let mut axes: BTreeSet<AxisId> = op.outs().iter().flat_map(|t| k.tiles[*t].axes.clone()).collect();
    match op {
        Op::Store { axes: own, .. } => axes.extend(own),
        Op::Reduce { over, .. } => axes.extend(over),
        Op::Contract { a, b, over, .. } => {
            axes.extend(over.iter().chain(&k.tiles[*a].axes).chain(&k.tiles[*b].axes));
        }
        Op::Load { .. } | Op::Map { .. } | Op::Scan { .. } => {}
    }
    for root in op.roots() {
        k.walk(root, &mut |_, e| match e {
            Expr::Coord(a) => {
                axes.insert(*a);
            }
            Expr::Tile(t) => axes.extend(&k.tiles[*t].axes),
            Expr::TileAt { at, .. } => axes.extend(at.iter().filter_map(|p| match p {
                Place::Axis(a) => Some(*a),
                Place::At(_) => None,
            })),
            Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => {}
        });
    }
    axes
}

/// The entries of `kernel`, in the order a launch tries them.
pub fn variants(kernel: &Kernel, plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>) -> Vec<KernelMapping> {
    let f = Facts::new(plan, kernel, sizes);
    let inner = |a: &AxisId| kernel.axes[*a].kind == AxisKind::Inner && kernel.axes[*a].block.is_none();
    let open = kernel.axes.ids().any(|a| inner(&a) && f.extent(a).is_none());
    let classes: &[u64] = if open { &CLASSES } else { &CLASSES[..1] };
    let mut out: Vec<KernelMapping> = Vec::new();
    for class in classes {
        let entry = entry(&f, kernel, sheet, |a| f.extent(a).unwrap_or(*class).max(1));
        if !out.contains(&entry) {
            out.push(entry);
        }
    }
    out
}

/// One entry, whose inner axes are as long as `extent` says.
fn entry(f: &Facts<'_>, kernel: &Kernel, sheet: &DataSheet, extent: impl Fn(AxisId) -> u64) -> KernelMapping {
    let own = |a: AxisId| kernel.axes[a].block;
    let sequential = |a: &AxisId| f.stepped.contains(a);
    let cuts = |a: &AxisId| match kernel.axes[*a].kind {
        AxisKind::Grid => own(*a).is_none(),
        AxisKind::Stream => own(*a).is_none() && !sequential(a),
        AxisKind::Inner => false,
    };
    let contiguous = f.contiguous.iter().filter(|(a, _)| cuts(a)).max_by_key(|(a, (dims, _))| (*dims, **a));
    let grid = |a: &AxisId| kernel.axes[*a].kind == AxisKind::Grid && cuts(a);
    let lead = contiguous.map(|(a, _)| *a).or(kernel.axes.ids().rfind(grid));
    // Coordinates of a step or a block along every axis but the leading one.
    let block = |a: AxisId| match (own(a), kernel.axes[a].kind) {
        (Some(n), _) => n,
        (None, AxisKind::Inner) => extent(a),
        (None, AxisKind::Stream) if !sequential(&a) && Some(a) != lead => STEPS,
        (None, AxisKind::Stream | AxisKind::Grid) => 1,
    };
    let mut most = 1;
    kernel.for_each_op(&mut |op, _| {
        most = most.max(domain(kernel, op).into_iter().map(block).fold(1, u64::saturating_mul));
    });
    let width = (HELD / most).max(1);
    // No wider than the axis, as far as that is known.
    let width = lead.and_then(|a| f.extent(a)).map_or(width, |n| width.min(n.div_ceil(WARPS).max(1)));
    let width = 1 << width.ilog2();
    let wide = sheet.gpu.as_ref().map_or(WARPS, |g| (g.threads_per_task / 32).min(WARPS));
    let mut axes = Vec::new();
    for (id, a) in kernel.axes.iter() {
        if a.block.is_some() || sequential(&id) {
            continue;
        }
        axes.push(match a.kind {
            _ if Some(id) == lead => AxisMapping { units: wide, ..AxisMapping::new(&a.name, wide * width) },
            AxisKind::Inner => AxisMapping { whole: true, ..AxisMapping::new(&a.name, block(id)) },
            AxisKind::Stream | AxisKind::Grid => AxisMapping::new(&a.name, block(id)),
        });
    }
    KernelMapping { kernel: kernel.name.clone(), axes, ..KernelMapping::default() }
}
