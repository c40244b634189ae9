//! Mappings of products of few rows, for devices without instructions for tiles: the larger operand comes from memory once,
//! straight into registers; of five to eight rows two tasks share it, the second by the cache.
//!
//! What such a product takes is the time that the matrix takes from memory, so nothing passes through shared memory but the
//! sums at the end. A thread loads 16 bytes of [`LOADS`] rows of the matrix at once and has sums for its columns (for the
//! transposed matrix: of as many columns, along what is summed); a task's warps cut what is summed among themselves and meet
//! once (one dispatch: a second one that joined parts of several tasks would cost as much as a third of the matrix). A task's
//! columns are as many as leave work for most multiprocessors; all its loads are under way together, so that memory is full
//! whatever the number of tasks beyond that. Blocks that divide the extents are `exact`, and an entry that takes others comes
//! after. Invariant: what is returned keeps within the sheet's threads and registers.

use einfall_ir::analysis::resources::OVERHEAD;
use einfall_ir::kernel::Scope;
use einfall_ir::mapping::{AxisMapping, KernelMapping};
use einfall_ir::target::Gpu;
use einfall_ir::tile::{AxisId, AxisKind, Expr, Kernel, Op, Plan, TileId};

use super::elementwise::Facts;

/// Rows at most.
const ROWS: u64 = 16;
/// Rows of a task where two tasks have all of them: the second finds the matrix in the cache, and loads are more for the same
/// registers (an H200, eight rows: 22 µs instead of 29; of four tasks for sixteen rows it is not so).
const HALF: u64 = 4;
/// Loads of 16 bytes that a thread has under way, the most first; of a transposed matrix, whose rows end apart, the second.
const LOADS: [u64; 3] = [8, 4, 2];
/// Registers that a thread holds of operands and sums, where there is a choice of loads: with more of either a product of few
/// rows is a third slower (an H200, 16 warps a task).
const HELD: u64 = 64;
/// Bytes of the widest access, and of the shortest run that memory serves at full rate.
const ACCESS: u64 = 16;
const RUN: u64 = 64;
/// Warps of a task, the most first.
const WARPS: [u64; 5] = [16, 8, 4, 2, 1];
/// Threads of a warp.
const WARP: u64 = 32;

/// The axes of a product and the tiles of its operands: the one with rows, the one with columns.
pub(super) struct Product {
    pub operands: [TileId; 2],
    pub rows: AxisId,
    pub columns: AxisId,
    pub summed: AxisId,
}

/// The axis that an operand's array is contiguous in, and bytes of an element.
fn contiguous(kernel: &Kernel, plan: &Plan, t: TileId) -> Option<(AxisId, u64)> {
    let mut found = None;
    kernel.for_each_op(&mut |op, _| {
        if let Op::Load { out, buffer, at } = op
            && *out == t
            && let Some(Expr::Coord(a)) = at.last().map(|e| &kernel.exprs[*e])
        {
            found = Some((*a, plan.buffers[*buffer].dtype.bytes(1).max(1)));
        }
    });
    found
}

/// The entries for a product with few rows or few columns; none where there are more of both, sizes are not known, or too few
/// tasks would be left.
pub(super) fn variants(
    kernel: &Kernel,
    plan: &Plan,
    gpu: &Gpu,
    c: &Product,
    f: &Facts<'_>,
) -> Option<Vec<KernelMapping>> {
    let (m, n, k) = (f.extent(c.rows)?, f.extent(c.columns)?, f.extent(c.summed)?);
    let (few, many, [vector, matrix]) = match m <= n {
        true => ((c.rows, m), (c.columns, n), c.operands),
        false => ((c.columns, n), (c.rows, m), [c.operands[1], c.operands[0]]),
    };
    if few.1 > ROWS || few.1 == 0 {
        return None;
    }
    let rows = if few.1 <= 2 * HALF { few.1.div_ceil(few.1.div_ceil(HALF)) } else { few.1 };
    let (lead, bytes) = contiguous(kernel, plan, matrix)?;
    let width = (ACCESS / bytes).max(1);
    let own = contiguous(kernel, plan, vector).filter(|x| x.0 == c.summed).map_or(1, |x| (ACCESS / x.1).max(1));
    // Multiprocessors that have work.
    let enough = |tasks: u64| 4 * tasks >= 3 * gpu.multiprocessors;
    let tasks = |block: u64| -> Option<u64> {
        let batch = kernel.axes.ids().filter(|a| kernel.axes[*a].kind == AxisKind::Grid);
        let batch = batch.filter(|a| *a != few.0 && *a != many.0);
        let mut all = many.1.div_ceil(block);
        for a in batch {
            all = all.saturating_mul(f.extent(a)?);
        }
        Some(all)
    };
    let mut found = None;
    let (most, any) = (LOADS[..2].iter().map(|n| (*n, HELD)), LOADS[1..].iter().map(|n| (*n, u64::MAX)));
    for (loads, held_most) in most.chain(any) {
        // Columns of a task, coordinates of a warp's step along what is summed, neighbours of a thread there, and what a thread
        // holds of the vector and of the result.
        let (columns, step, near, held, sums) = if lead == many.0 {
            let widest = [4 * RUN, 2 * RUN, RUN].into_iter().map(|run| run / bytes);
            let fit = |columns: &u64| *columns >= width && tasks(*columns).is_some_and(enough);
            let columns = widest.into_iter().find(fit)?;
            let lanes = WARP / (columns / width).min(WARP);
            (columns, lanes * loads, own.min(loads), rows * loads, rows * width)
        } else if lead == c.summed {
            if loads > LOADS[1] {
                continue;
            }
            tasks(loads).filter(|n| enough(*n))?;
            (loads, WARP * width, 0, rows * width, rows * loads)
        } else {
            return None;
        };
        let threads = |units: u64| units * Scope::Warp.threads();
        let fits = |units: &u64| {
            let have = gpu.thread_registers.min(gpu.registers / threads(*units));
            let need = held + loads * width + sums;
            let room = need <= held_most && need + OVERHEAD <= have;
            threads(*units) <= gpu.threads_per_task && step * units <= k && room
        };
        // Steps without a tail, if there are such of half as many warps at least.
        if let Some(most) = WARPS.into_iter().find(fits) {
            let even = |units: &u64| fits(units) && k.is_multiple_of(step * units) && 2 * units >= most;
            let units = WARPS.into_iter().find(even).unwrap_or(most);
            found = Some((columns, step * units, near, units));
            break;
        }
    }
    let (columns, step, near, units) = found?;
    let entry = |exact: bool| {
        let axes = kernel.axes.iter().filter(|(_, a)| a.block.is_none()).map(|(id, a)| match id {
            _ if id == few.0 => AxisMapping { exact: exact && rows > 1, ..AxisMapping::new(&a.name, rows) },
            _ if id == many.0 => AxisMapping { exact, ..AxisMapping::new(&a.name, columns) },
            _ if id == c.summed => AxisMapping { units, register: near, exact, ..AxisMapping::new(&a.name, step) },
            _ => AxisMapping::new(&a.name, 1),
        });
        KernelMapping { kernel: kernel.name.clone(), axes: axes.collect(), ..KernelMapping::default() }
    };
    let even = few.1.is_multiple_of(rows) && many.1.is_multiple_of(columns) && k.is_multiple_of(step);
    Some(if even { vec![entry(true), entry(false)] } else { vec![entry(false)] })
}

#[cfg(test)]
mod tests {
    use einfall_ir::target::DataSheet;

    use super::super::choose;

    /// Blocks and units of the axes of every entry of a product's only kernel.
    fn entries(right: &str, dtype: &str, sizes: [u64; 3]) -> Vec<Vec<(u64, u64, bool)>> {
        let at = if right == "[K, N]" { "[k, n]" } else { "[n, k]" };
        let text = format!(
            "plan mm[M, N, K] {{
    input A: {dtype}[M, K]
    input B: {dtype}{right}
    output Y: f32[M, N]

    kernel mm_0 {{
        grid m in M
        grid n in N
        stream k in K
        tile r: f32[m, n]
        tile a: {dtype}[m, k]
        tile b: {dtype}{}
        r = 0.0
        for k {{
            a = load A[m, k]
            b = load B{at}
            r = carry contract(k) a, b
        }}
        store Y[m, n] = r over m, n
    }}
}}
",
            at
        );
        let plan = einfall_ir::tile::parse::parse(&text).unwrap_or_else(|e| panic!("{e:?}"));
        let sheet = DataSheet::named("webgpu-nvidia").unwrap();
        let m = choose(&plan, &sheet, Some(&sizes));
        let of = |k: &einfall_ir::mapping::KernelMapping| {
            assert_eq!(k.ops.is_empty(), k.tiles.is_empty());
            if k.ops.is_empty() { k.axes.iter().map(|a| (a.block, a.units, a.exact)).collect() } else { Vec::new() }
        };
        m.kernels.iter().map(of).collect()
    }

    #[test]
    fn a_matrix_of_few_rows_is_read_once() {
        let exact = [(1, 1, false), (32, 1, true), (512, 16, true)];
        let any = [(1, 1, false), (32, 1, false), (512, 16, false)];
        assert_eq!(entries("[K, N]", "f32", [1, 4096, 4096]), [exact.to_vec(), any.to_vec()]);
        // Twice the columns in 16 bytes; columns and steps that the blocks do not divide; the transposed matrix.
        assert_eq!(entries("[K, N]", "f16", [4, 4096, 4096])[0], [(4, 1, true), (32, 1, true), (512, 16, true)]);
        assert_eq!(entries("[K, N]", "f32", [1, 4099, 4096]), [any.to_vec()]);
        assert_eq!(entries("[N, K]", "f32", [1, 4096, 4096])[0], [(1, 1, false), (4, 1, true), (2048, 16, true)]);
        // More rows have more sums: fewer loads, then fewer warps.
        assert_eq!(entries("[K, N]", "f32", [4, 4096, 4096])[0], [(4, 1, true), (32, 1, true), (256, 16, true)]);
        // Eight rows are two tasks of four.
        assert_eq!(entries("[K, N]", "f32", [8, 4096, 4096])[0], [(4, 1, true), (32, 1, true), (256, 16, true)]);
        assert_eq!(entries("[K, N]", "f32", [7, 4096, 4096])[0], [(4, 1, false), (32, 1, false), (256, 16, false)]);
        assert_eq!(entries("[K, N]", "f32", [16, 4096, 4096])[0], [(16, 1, true), (32, 1, true), (128, 8, true)]);
        // More rows still, or too few columns for the multiprocessors, by tiles.
        assert_eq!(entries("[K, N]", "f32", [17, 4096, 4096]), [[].to_vec()]);
        assert_eq!(entries("[K, N]", "f32", [1, 512, 4096]), [[].to_vec()]);
    }
}
