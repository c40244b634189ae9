//! Mappings of kernels whose contractions no instruction takes: blocks alone, so that the lowering computes them as sums
//! of products in registers.
//!
//! Contractions without a row or a column axis (a state times a vector), types without an instruction, devices without
//! one that the model maps to. A warp holds the elements of its largest operation, [`HELD`] of them at most: inner axes
//! are whole, streams go a few coordinates at a time, and the axis along which the largest array is contiguous (or else
//! the last grid axis) is cut over the warps of a task in blocks that fill what is left. Inner axes of unknown extent
//! get an entry for each of [`CLASSES`].
//!
//! A tile copied from another axis to one that it is multiplied along (a state that every row of a recurrent matrix
//! reads) is exchanged between threads: it lies in shared memory, in two copies by turns, and the axis it comes from is
//! cut over as many warps as a task may have, so that what is read in every step stays in their registers. Invariant: whatever the kernel, every block is at least 1; what does not fit is
//! refused by the lowering with the constraint's name.

use std::collections::BTreeSet;

use einfall_ir::analysis::resources::OVERHEAD;
use einfall_ir::mapping::{AxisMapping, KernelMapping, TileMapping};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{AxisId, AxisKind, Expr, Kernel, Op, Place, Plan, Space, TileId};

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

/// A tile that is another one with an axis under a new name, where an operation has both axes: no thread holds what it
/// needs of it.
struct Exchange {
    tile: TileId,
    /// The axis it comes from.
    from: AxisId,
    /// Whether a stream makes it in every step.
    turns: bool,
}

fn exchanges(k: &Kernel) -> Vec<Exchange> {
    let mut together: Vec<BTreeSet<AxisId>> = Vec::new();
    k.for_each_op(&mut |op, _| together.push(domain(k, op)));
    let mut found = Vec::new();
    k.for_each_op(&mut |op, around| {
        let Op::Map { out, value } = op else { return };
        let Expr::TileAt { tile, at } = &k.exprs[*value] else { return };
        let pairs = k.tiles[*tile].axes.iter().zip(at);
        let moved = pairs.filter_map(|(own, p)| match p {
            Place::Axis(a) if a != own => Some((*own, *a)),
            Place::Axis(_) | Place::At(_) => None,
        });
        for (from, to) in moved {
            if together.iter().any(|d| d.contains(&from) && d.contains(&to)) {
                found.push(Exchange { tile: *out, from, turns: !around.is_empty() });
            }
        }
    });
    found
}

/// 32-bit registers of a thread for what `warps` warps hold from step to step, and for the products of one operation.
fn registers(k: &Kernel, warps: u64, block: &impl Fn(AxisId) -> u64) -> u64 {
    let (mut loaded, mut most) = (0, 1);
    k.for_each_op(&mut |op, around| {
        let elems = |axes: BTreeSet<AxisId>| axes.into_iter().map(block).fold(1, u64::saturating_mul);
        if let (Op::Load { out, .. }, true) = (op, around.is_empty()) {
            let tile = &k.tiles[*out];
            loaded +=
                elems(tile.axes.iter().copied().collect()).saturating_mul(u64::from(tile.dtype.bits())).div_ceil(32);
        }
        most = most.max(elems(domain(k, op)));
    });
    // Everything else that goes with a row takes a register or so.
    loaded.saturating_add(most).div_ceil(32 * warps).saturating_add(k.tiles.len() as u64)
}

/// The entries of `kernel`, in the order a launch tries them.
pub fn variants(kernel: &Kernel, plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>) -> Vec<KernelMapping> {
    let f = Facts::new(plan, kernel, sizes);
    let inner = |a: &AxisId| kernel.axes[*a].kind == AxisKind::Inner && kernel.axes[*a].block.is_none();
    let open = kernel.axes.ids().any(|a| inner(&a) && f.extent(a).is_none());
    let classes: &[u64] = if open { &CLASSES } else { &CLASSES[..1] };
    let mut out: Vec<KernelMapping> = Vec::new();
    let exchanges = exchanges(kernel);
    for class in classes {
        let extent = |a| f.extent(a).unwrap_or(*class).max(1);
        let entry = match exchanges.first() {
            None => entry(&f, kernel, sheet, extent),
            Some(first) => match exchanging(&f, kernel, sheet, (&exchanges, first.from), extent) {
                // A class that registers do not hold has no entry, unless there would be none.
                Err(_) if !out.is_empty() => break,
                Ok(m) | Err(m) => m,
            },
        };
        if !out.contains(&entry) {
            out.push(entry);
        }
    }
    out
}

/// One entry of a kernel that exchanges tiles, its inner axes as long as `extent` says; as an error where the registers of
/// a thread do not hold it.
fn exchanging(
    f: &Facts<'_>,
    kernel: &Kernel,
    sheet: &DataSheet,
    (exchanges, cut): (&[Exchange], AxisId),
    extent: impl Fn(AxisId) -> u64,
) -> Result<KernelMapping, KernelMapping> {
    let block = |a: AxisId| match (kernel.axes[a].block, kernel.axes[a].kind) {
        (Some(n), _) => n,
        (None, AxisKind::Inner) => extent(a),
        (None, AxisKind::Stream) if !f.stepped.contains(&a) => STEPS,
        (None, AxisKind::Stream | AxisKind::Grid) => 1,
    };
    let most = sheet.gpu.as_ref().map_or(4 * WARPS, |g| (g.threads_per_task / 32).min(4 * WARPS));
    // Two coordinates a warp or more: one alone is no dimension of what it stores.
    let warps = 1 << most.min(block(cut) / 2).max(1).ilog2();
    let cut_block = block(cut).next_multiple_of(warps);
    let free = kernel.axes.iter().filter(|(id, a)| a.block.is_none() && !f.stepped.contains(id));
    let axes = free.map(|(id, a)| match a.kind {
        _ if id == cut => AxisMapping { units: warps, whole: true, ..AxisMapping::new(&a.name, cut_block) },
        // What is exchanged has one block on both sides.
        AxisKind::Inner if a.extent == kernel.axes[cut].extent => {
            AxisMapping { whole: true, ..AxisMapping::new(&a.name, cut_block) }
        }
        AxisKind::Inner => AxisMapping { whole: true, ..AxisMapping::new(&a.name, block(id)) },
        AxisKind::Stream | AxisKind::Grid => AxisMapping::new(&a.name, block(id)),
    });
    let tiles = exchanges.iter().map(|e| TileMapping {
        stages: if e.turns { 2 } else { 1 },
        ..TileMapping::new(&kernel.tiles[e.tile].name, Space::Shared)
    });
    let m = KernelMapping {
        kernel: kernel.name.clone(),
        axes: axes.collect(),
        tiles: tiles.collect(),
        ..KernelMapping::default()
    };
    let have = sheet.gpu.as_ref().map_or(255, |g| g.thread_registers.min(g.registers / (32 * warps)));
    if registers(kernel, warps, &block) + OVERHEAD <= have { Ok(m) } else { Err(m) }
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
