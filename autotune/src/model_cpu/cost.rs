//! The cost of blocks on a processor: the greatest of what arithmetic, packing and the caches take a core per task, over
//! how evenly ranges of tasks fill the cores, and what device memory takes for all of them. Little work is done by the
//! calling thread, as the run time has it: waking the others takes as long.
//!
//! Contractions are outer products in register tiles, so partial tiles cost whole ones; their right operand is packed
//! once a step. Invariant: costs rank mappings of one kernel; absolute seconds are as good as the data sheet.

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{AxisId, AxisKind, Expr, Op};

use super::space::Space;

/// Rows and columns (in elements of f32) of a register tile on most processors.
const REGISTER_TILE: [f64; 2] = [6.0, 16.0];
/// Share of the peak that the inner loop reaches.
const INNER: f64 = 0.8;
/// Multiply-adds an elementwise node costs, and a special function.
const NODE: f64 = 1.0;
const SPECIAL: f64 = 12.0;
/// Operations and bytes together below which the calling thread does all tasks, and ranges of tasks that a thread is
/// handed (`runtime/src/launch.rs`).
const INLINE_WORK: f64 = 131_072.0;
const RANGES_PER_THREAD: f64 = 8.0;
/// Seconds to wake the other threads and wait for them, and to hand out a range.
const WAKE: f64 = 5e-6;
const RANGE: f64 = 4e-7;
/// Seconds to start a task, a step of a stream, and an operation in it.
const TASK: f64 = 1e-7;
const STEP: f64 = 4e-8;
const OPERATION: f64 = 3e-8;

/// Seconds that an assignment is predicted to take.
pub fn seconds(space: &Space<'_>, sheet: &DataSheet, values: &[i64]) -> f64 {
    let kernel = space.kernel;
    let block = space.blocks(values);
    let extent = |a: AxisId| space.extents[a.index()] as f64;
    let count = |a: AxisId| (extent(a) / block[a.index()]).ceil();
    // A block beyond the extent is clipped.
    let held = |a: AxisId| block[a.index()].min(extent(a));
    let cores = sheet.level("registers").map_or(1.0, |l| l.instances as f64);
    let peak = sheet.peak_of(DType::F32).unwrap_or(1e11) / cores;
    let rate = |name: &str, none: f64| sheet.level(name).map_or(none, |l| l.bandwidth);
    let l2_bytes = sheet.level("l2").map_or(1e6, |l| l.bytes as f64);
    let footprint: f64 = kernel.tiles.iter().map(|(_, t)| 4.0 * t.axes.iter().map(|a| held(*a)).product::<f64>()).sum();
    // Tiles that leave the second-level cache come from the next one.
    let near = rate("l2", 5e10) / if footprint > l2_bytes { 3.0 } else { 1.0 };
    let last = sheet.levels.get(1).map_or(3e7, |l| l.bytes as f64 * l.instances as f64);
    let tasks: f64 = kernel.axes.iter().filter(|(_, a)| a.kind == AxisKind::Grid).map(|(id, _)| count(id)).product();

    let (mut arithmetic, mut moved, mut steps, mut dram) = (0.0, 0.0, 0.0, 0.0);
    // Operations of all tasks, and bytes of every array once.
    let (mut operations, mut compulsory) = (0.0, 0.0);
    let whole = |axes: &[AxisId]| axes.iter().map(|a| extent(*a)).product::<f64>();
    kernel.for_each_op(&mut |op, streams| {
        let trips: f64 = streams.iter().map(|a| count(*a)).product();
        steps += OPERATION * trips;
        let product = |axes: &[AxisId]| axes.iter().map(|a| held(*a)).product::<f64>();
        let nodes = |roots: Vec<einfall_ir::tile::ExprId>| {
            let mut cost = 0.0;
            for root in roots {
                kernel.walk(root, &mut |_, e| {
                    cost += match e {
                        Expr::Unary(..) => SPECIAL,
                        Expr::Binary(..) | Expr::Select(..) | Expr::Cast(..) | Expr::Rand(_) => NODE,
                        _ => 0.0,
                    }
                });
            }
            cost
        };
        match op {
            Op::Contract { out, a, b, over, .. } => {
                let axes = |t: &einfall_ir::tile::TileId| &kernel.tiles[*t].axes;
                let mut points = product(axes(out)) * product(over);
                let own: Vec<AxisId> = axes(out).iter().chain(over).chain(streams).copied().collect();
                operations += 2.0 * whole(&distinct(own));
                let row = axes(out).iter().rev().find(|x| axes(a).contains(x) && !axes(b).contains(x));
                let column = axes(out).iter().rev().find(|x| axes(b).contains(x) && !axes(a).contains(x));
                for (axis, tile) in [row, column].into_iter().zip(REGISTER_TILE) {
                    if let Some(axis) = axis {
                        points *= (held(*axis) / tile).ceil() * tile / held(*axis);
                    }
                }
                arithmetic += 2.0 * points * trips / (peak * INNER);
                // Packed once a step, read once a block of rows.
                moved += (2.0 * product(axes(b)) + product(axes(a))) * 4.0 * trips / near;
            }
            Op::Load { out, buffer, .. } => {
                let bytes = space.plan.buffers[*buffer].dtype.bytes(1) as f64;
                let tile = product(&kernel.tiles[*out].axes) * bytes * trips;
                moved += tile / near;
                let own: Vec<AxisId> = kernel.tiles[*out].axes.iter().chain(streams).copied().collect();
                let once = whole(&distinct(own)) * bytes;
                compulsory += once;
                dram += if once > last { tile * tasks } else { once };
            }
            Op::Store { buffer, axes, .. } => {
                let bytes = space.plan.buffers[*buffer].dtype.bytes(1) as f64;
                let tile = product(axes) * bytes * trips;
                moved += tile / near;
                dram += tile * tasks;
                compulsory += whole(axes) * bytes;
            }
            Op::Map { out, .. } | Op::Scan { out, .. } => {
                let elements = product(&kernel.tiles[*out].axes) * trips;
                arithmetic += elements * 2.0 * (1.0 + nodes(op.roots())) / peak;
                moved += elements * 4.0 / rate("l1", 2e11);
            }
            Op::Reduce { out, over, .. } => {
                let kept = out.first().map_or(1.0, |t| product(&kernel.tiles[*t].axes));
                let elements = kept * product(over) * trips;
                arithmetic += elements * 2.0 * (1.0 + nodes(op.roots())) / peak;
                moved += elements * 4.0 / rate("l1", 2e11);
            }
        }
    });
    let streamed = kernel.axes.iter().filter(|(_, a)| a.kind == AxisKind::Stream).map(|(id, _)| count(id)).sum::<f64>();
    let task = arithmetic.max(moved) + 0.3 * arithmetic.min(moved) + steps + STEP * streamed + TASK;
    let busy = if cores < 2.0 || tasks < 2.0 || operations + compulsory < INLINE_WORK {
        tasks * task
    } else {
        let ranges = tasks.min(cores * RANGES_PER_THREAD);
        // The longest ranges are handed out like all others: the last round may keep one core.
        let longest = (tasks / ranges).ceil() * task + RANGE;
        ((ranges / cores).ceil() * longest).max(tasks * task / cores) + WAKE
    };
    busy.max(dram / rate("dram", 2e10))
}

/// Each axis once.
fn distinct(mut axes: Vec<AxisId>) -> Vec<AxisId> {
    axes.sort();
    axes.dedup();
    axes
}
