//! Mappings of contractions for devices without instructions for tiles: register tiles of multiply-adds, fed from shared
//! memory.
//!
//! A thread of a warp of 4 by 8 holds a tile of the result; per step of k it reads one row and one column piece, so that
//! R rows by C columns cost R·C multiply-adds for (R + C)/4 vector reads. 8 by 8 where registers allow (a tile of 64,
//! operands of 64, and what addresses take), else 4 by 8; warps one below the other. 32 steps of k at a time where shared
//! memory holds them, one stage of them, else half as many (docs/tuning-log.md, section 11: on an H200 twice as fine
//! pieces in two stages are a seventh slower, and sections of tasks gain nothing). Tiles in shared memory have one word per
//! element. Invariant: what is returned keeps within the sheet's registers and threads, and its shared memory where 16 steps fit (12 KB at most). Kernels of any
//! other form get blocks alone: small ones, whose products are held in registers, where an inner axis is whole; else those of
//! [`products`], whose threads share a row, or a state that goes from step to step.

use einfall_ir::analysis::order_free;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Engine, Scope};
use einfall_ir::mapping::{AxisMapping, KernelMapping, MergeSite, OpMapping, RoleMapping, Split, TileMapping, Work};
use einfall_ir::target::{DataSheet, Gpu};
use einfall_ir::tile::{Axis, AxisId, AxisKind, Kernel, Node, Op, Plan, Space, TileId};

use super::elementwise::Facts;
use super::products;

/// Bytes of a shared tile's element.
const WORD: u64 = 4;
/// Coordinates along k of one step, the most first.
const DEPTHS: [u64; 2] = [32, 16];
/// Coordinates of a step of a stream whose products are held in registers.
const STEPS: u64 = 16;
/// Columns of a task: one atom's.
const COLUMNS: u64 = 64;
/// Rows of an atom, the fewest first.
const ROWS: [u64; 3] = [4, 8, 16];
/// Registers of a thread for a tile of 8 by 8 with its operands.
const LARGE: u64 = 168;

/// Extents of inner axes that kernels of other forms get variants for.
const INNER: [u64; 3] = [16, 64, 128];
/// Products of a block that a warp holds at once.
const PRODUCTS: u64 = 512;
/// Warps of a multiprocessor that parts of a stream are cut for: each has 8 KB under way, so that together they have what
/// [`super::elementwise`] finds that memory needs. Warps that hold products have less under way.
const FED: u64 = 8;
const FED_PRODUCTS: u64 = 16;
/// Most parts of a stream: a part's result is written and read again.
const PARTS: u64 = 64;

/// The only contraction of a kernel, of floats into f32, with its stream.
struct Contraction {
    /// Its number among the kernel's operations.
    op: usize,
    operands: [TileId; 2],
    rows: AxisId,
    columns: AxisId,
    summed: AxisId,
}

/// The contraction of a kernel that is one stream over what it sums, with both operands loaded there.
fn contraction(kernel: &Kernel) -> Option<Contraction> {
    let (mut found, mut loaded, mut n) = (Vec::new(), Vec::new(), 0);
    kernel.for_each_op(&mut |op, around| {
        let stream = around.last().copied();
        match op {
            Op::Contract { out, a, b, over, .. } => found.push((n, *out, [*a, *b], over.clone(), stream)),
            Op::Load { out, .. } => loaded.push((*out, stream)),
            Op::Map { .. } | Op::Reduce { .. } | Op::Scan { .. } | Op::Store { .. } => {}
        }
        n += 1;
    });
    let [(op, out, operands, over, stream)] = found.as_slice() else { return None };
    let ([summed], Some(stream)) = (over.as_slice(), stream) else { return None };
    let alone = kernel.body.iter().filter(|n| matches!(n, Node::Stream(_))).count() == 1;
    let in_stream = |t: &TileId| loaded.iter().any(|(l, s)| l == t && *s == Some(*stream));
    // Atoms multiply and add in f32: integers are summed otherwise.
    let dtype = |t: TileId| kernel.tiles[t].dtype;
    let floats = dtype(*out) == DType::F32 && operands.iter().all(|t| dtype(*t).is_float() && dtype(*t).bits() <= 32);
    if !floats || !alone || !operands.iter().all(in_stream) || kernel.axes[*summed].kind != AxisKind::Stream {
        return None;
    }
    let cut = |t: TileId| -> Vec<AxisId> {
        let grid = |a: &AxisId| kernel.axes[*a].kind == AxisKind::Grid && kernel.tiles[*out].axes.contains(a);
        kernel.tiles[t].axes.iter().copied().filter(grid).collect()
    };
    let [left, right] = [cut(operands[0]), cut(operands[1])];
    let own = |list: &[AxisId], other: &[AxisId]| list.iter().copied().rfind(|a| !other.contains(a));
    let (rows, columns) = (own(&left, &right)?, own(&right, &left)?);
    // Every other axis is one coordinate a task.
    let known = |a: &AxisId| [rows, columns, *summed].contains(a) || kernel.axes[*a].kind == AxisKind::Grid;
    let inside = kernel.axes.ids().all(|a| known(&a));
    inside.then_some(Contraction { op: *op, operands: *operands, rows, columns, summed: *summed })
}

/// Whether what a step of a stream leaves is what the next one takes.
fn steps_in_order(kernel: &Kernel) -> bool {
    kernel.body.iter().any(|n| matches!(n, Node::Stream(s) if s.sequential))
}

/// The mappings of a kernel with contractions for the device of `sheet`, in the order a launch tries them; none if it has
/// instructions for tiles.
pub fn variants(kernel: &Kernel, plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>) -> Option<Vec<KernelMapping>> {
    let gpu = sheet.gpu.as_ref().filter(|g| g.atoms.iter().any(|a| a == "fma"))?;
    let f = Facts::new(plan, kernel, sizes);
    Some(match contraction(kernel) {
        Some(c) => vec![tiled(kernel, plan, gpu, &c, &f)],
        None if !steps_in_order(kernel) && kernel.axes.iter().any(|(_, a)| inner(a)) => {
            let longest = kernel.axes.iter().filter(|(_, a)| inner(a)).map(|(id, _)| f.extent(id)).max().flatten();
            let fit = longest.and_then(|n| INNER.into_iter().find(|class| n <= *class)).map(|n| blocks(kernel, n));
            // The kernel that merges parts has the blocks of one entry.
            match fit.and_then(|m| cut(kernel, plan, gpu, FED_PRODUCTS, &f, m)) {
                // Memory is what such parts wait for: what a step loads is under way together.
                Some(m) => vec![KernelMapping { early: true, ..m }],
                None => INNER.into_iter().map(|n| blocks(kernel, n)).collect(),
            }
        }
        None => products::variants(kernel, plan, sheet, sizes),
    })
}

fn inner(a: &Axis) -> bool {
    a.kind == AxisKind::Inner && a.block.is_none()
}

/// Blocks alone, for contractions that are sums of products held in registers: one coordinate of every grid axis, `n` of
/// every inner axis.
fn blocks(kernel: &Kernel, n: u64) -> KernelMapping {
    let axes = kernel.axes.iter().filter(|(_, a)| a.block.is_none()).map(|(_, a)| {
        AxisMapping::new(
            &a.name,
            match a.kind {
                AxisKind::Grid => 1,
                AxisKind::Stream => (PRODUCTS / n).clamp(1, STEPS),
                AxisKind::Inner => n,
            },
        )
    });
    KernelMapping { kernel: kernel.name.clone(), axes: axes.collect(), ..KernelMapping::default() }
}

/// The mapping with its only stream cut over tasks, where those that there are would leave multiprocessors without work:
/// `resident` tasks each is what they are cut for. None where there are enough, sizes are not known or nothing merges parts.
fn cut(
    kernel: &Kernel,
    plan: &Plan,
    gpu: &Gpu,
    resident: u64,
    f: &Facts<'_>,
    m: KernelMapping,
) -> Option<KernelMapping> {
    let place = kernel.body.iter().position(|n| matches!(n, Node::Stream(_)))?;
    let Node::Stream(s) = &kernel.body[place] else { return None };
    order_free::equal_parts(plan, kernel, place).ok()?;
    let name = &kernel.axes[s.axis].name;
    let block = |a: AxisId| m.axis(&kernel.axes[a].name).map_or(1, |x| x.block);
    let mut tasks: u64 = 1;
    for a in kernel.axes.ids().filter(|a| kernel.axes[*a].kind == AxisKind::Grid) {
        tasks = tasks.saturating_mul(f.extent(a)?.div_ceil(block(a)));
    }
    // At least two parts, of two steps each.
    let worth = 2 * tasks <= gpu.multiprocessors * resident && f.extent(s.axis)? >= 4 * block(s.axis);
    let (parts, merge) = (PARTS, MergeSite::SecondKernel);
    let split = Split { axis: name.clone(), parts, resident, merge, ordered: false };
    worth.then_some(KernelMapping { split: Some(split), ..m })
}

/// Tiles of a task from the registers, threads and shared memory that there are.
fn tiled(kernel: &Kernel, plan: &Plan, gpu: &Gpu, c: &Contraction, f: &Facts<'_>) -> KernelMapping {
    let most = if gpu.thread_registers >= LARGE { 32 } else { 16 };
    // No more rows than there are, as far as that is known.
    let extent = f.extent(c.rows).unwrap_or(u64::MAX);
    let rows = ROWS.into_iter().find(|n| extent <= *n).unwrap_or(most).min(most);
    let atom = format!("fma.m{rows}n{COLUMNS}k4.f32");
    let units = 4.min(gpu.threads_per_task / Scope::Warp.threads()).max(1);
    let units = units.min(extent.div_ceil(rows).checked_next_power_of_two().unwrap_or(units));
    let fits = |depth: &u64| WORD * depth * (rows * units + COLUMNS) <= gpu.shared_per_task;
    let depth = DEPTHS.into_iter().find(fits).unwrap_or(DEPTHS[1]);
    let name = |a: AxisId| kernel.axes[a].name.clone();
    let axes = kernel.axes.ids().map(|a| match a {
        _ if a == c.rows => AxisMapping { units, ..AxisMapping::new(name(a), rows * units) },
        _ if a == c.columns => AxisMapping::new(name(a), COLUMNS),
        _ if a == c.summed => AxisMapping::new(name(a), depth),
        _ => AxisMapping::new(name(a), 1),
    });
    let copied = |t: TileId| TileMapping::new(&kernel.tiles[t].name, Space::Shared);
    let tiles = c.operands.map(|t| TileMapping { engine: Some(Engine::CpAsync), ..copied(t) });
    let names = kernel.op_names(plan);
    let loads = c.operands.map(|t| OpMapping { slot: 0, ..OpMapping::new(&kernel.tiles[t].name) });
    let contract = OpMapping { atom: Some(atom), slot: 1, ..OpMapping::new(&names[c.op]) };
    let role = RoleMapping { role: "main".to_owned(), scope: Scope::Warp, units, regs: None, ping_pong: false };
    let grid = |id: &AxisId| kernel.axes[*id].kind == AxisKind::Grid && ![c.rows, c.columns].contains(id);
    let order = kernel.axes.ids().filter(grid).chain([c.rows, c.columns]).map(name).collect();
    let m = KernelMapping {
        kernel: kernel.name.clone(),
        axes: axes.collect(),
        tiles: tiles.to_vec(),
        ops: loads.into_iter().chain([contract]).collect(),
        roles: vec![role],
        work: Work { order, ..Work::default() },
        ..KernelMapping::default()
    };
    cut(kernel, plan, gpu, FED.div_ceil(units), f, m.clone()).unwrap_or(m)
}
