//! A simple deterministic mapping model for CPU cores: blocks that keep an operation's tiles in a core's caches.
//!
//! The integer CSP takes its place; until then this is what engines use without a table. A contraction's result is
//! cut into blocks of whole register tiles along its row and column axes and its stream into panels that fit the
//! second-level cache; other axes of the launch are walked one by one, so that there are tasks for every core.
//! Invariant: a function of the plan and the data sheet alone.

use einfall_ir::mapping::{Anchor, AxisMapping, KernelMapping, Mapping, Work};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{AxisId, AxisKind, Kernel, Op, Plan};

/// Rows of a contraction's block: a multiple of every register tile's rows in use (14, 6).
const ROWS: u64 = 126;
/// Columns of a contraction's block: a multiple of every register tile's columns in use (32, 16, 8).
const COLUMNS: u64 = 256;
/// Elements of a block of a kernel without contractions, at least, so that a task is worth starting.
const ELEMENTS: u64 = 4096;

/// The mapping of every kernel of `plan` for a CPU with caches as in `sheet`.
pub fn choose(plan: &Plan, sheet: &DataSheet) -> Mapping {
    let l2 = sheet.levels.iter().find(|l| l.name == "l2").map_or(1 << 20, |l| l.bytes);
    let kernels = plan.kernels.iter().map(|k| kernel(k, l2)).collect();
    Mapping { plan: plan.name.clone(), target: sheet.name.clone(), kernels }
}

fn kernel(k: &Kernel, l2: u64) -> KernelMapping {
    let mut blocks: Vec<(AxisId, u64)> = Vec::new();
    let mut set = |axis: AxisId, block: u64| {
        if !blocks.iter().any(|(a, _)| *a == axis) {
            blocks.push((axis, block));
        }
    };
    let mut contracts = false;
    k.for_each_op(&mut |op, streams| {
        let Op::Contract { out, a, b, over, .. } = op else { return };
        contracts = true;
        let (out, a, b) = (&k.tiles[*out].axes, &k.tiles[*a].axes, &k.tiles[*b].axes);
        // Rows: the last axis only the left operand has; columns: the last only the right one has.
        if let Some(&row) = out.iter().rev().find(|x| a.contains(x) && !b.contains(x)) {
            set(row, ROWS);
        }
        if let Some(&column) = out.iter().rev().find(|x| b.contains(x) && !a.contains(x)) {
            set(column, COLUMNS);
        }
        for axis in over.iter().filter(|x| streams.contains(x)) {
            // A panel of the right operand, COLUMNS wide in f32, takes a quarter of the second-level cache.
            set(*axis, (l2 / 4 / (4 * COLUMNS)).clamp(64, 384) / 64 * 64);
        }
    });
    if !contracts {
        // The last axis of what is stored is contiguous: long blocks of it.
        let mut last = None;
        k.for_each_op(&mut |op, _| {
            if let Op::Store { axes, .. } = op {
                last = axes.last().copied().or(last);
            }
        });
        let grid: Vec<AxisId> = k.axes.iter().filter(|(_, a)| a.kind == AxisKind::Grid).map(|(id, _)| id).collect();
        for (id, axis) in k.axes.iter() {
            match axis.kind {
                AxisKind::Stream => set(id, ELEMENTS),
                AxisKind::Grid if Some(id) == last => set(id, if grid.len() == 1 { ELEMENTS / 4 } else { ELEMENTS }),
                // One row of a streamed reduction is work enough; several rows share what they broadcast.
                AxisKind::Grid if grid.last() == Some(&id) => set(id, 4),
                AxisKind::Grid | AxisKind::Inner => {}
            }
        }
    }
    let axes = k
        .axes
        .iter()
        .filter(|(_, a)| a.kind != AxisKind::Inner)
        .map(|(id, a)| {
            let chosen = blocks.iter().find(|(x, _)| *x == id).map_or(1, |(_, b)| *b);
            AxisMapping::new(a.name.clone(), a.block.unwrap_or(chosen))
        })
        .collect();
    KernelMapping {
        kernel: k.name.clone(),
        axes,
        work: Work::default(),
        tiles: Vec::new(),
        ops: Vec::new(),
        roles: Vec::new(),
        anchor: Anchor::default(),
        split: None,
    }
}
