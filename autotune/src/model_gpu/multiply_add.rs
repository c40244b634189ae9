//! Mappings of contractions for devices without instructions for tiles: register tiles of multiply-adds, fed from shared
//! memory.
//!
//! A thread of a warp of 4 by 8 holds a tile of the result; per step of k it reads one row and one column piece, so that
//! R rows by C columns cost R·C multiply-adds for (R + C)/4 vector reads. 8 by 8 where registers allow (a tile of 64,
//! operands of 64, and what addresses take), else 4 by 8; warps one below the other. 32 steps of k at a time where shared
//! memory holds them, one stage of them, else half as many (docs/tuning-log.md, section 11: on an H200 twice as fine
//! pieces in two stages are a seventh slower, and sections of tasks gain nothing). Tiles in shared memory have one word per
//! element. Products of few rows are [`few_rows`]'s. Invariant: what is returned keeps within the sheet's registers and threads, and its shared memory where 16 steps fit (12 KB at most). Kernels of any
//! other form get blocks alone: small ones, whose products are held in registers, where an inner axis is whole; else those of
//! [`products`], whose threads share a row, or a state that goes from step to step.

use einfall_ir::analysis::order_free;
use einfall_ir::analysis::resources::OVERHEAD;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms::Atom;
use einfall_ir::kernel::{Engine, Scope};
use einfall_ir::mapping::{AxisMapping, KernelMapping, MergeSite, OpMapping, RoleMapping, Split, TileMapping, Work};
use einfall_ir::target::{DataSheet, Gpu};
use einfall_ir::tile::{Axis, AxisId, AxisKind, Expr, Kernel, Node, Op, Plan, Space, TileId};

use super::elementwise::Facts;
use super::family::Family;
use super::structure::in_registers;
use super::{cooperative, facts, few_rows, products};

/// Bytes of a shared tile's element.
const WORD: u64 = 4;
/// Coordinates along k of one step, the most first.
const DEPTHS: [u64; 2] = [32, 16];
/// Coordinates of a step of a stream whose products are held in registers.
const STEPS: u64 = 16;
/// Columns of a task: one atom's.
const COLUMNS: u64 = 64;
/// Rows of a warp, warps of a task and coordinates of a step of several contractions' tiles, by what is tried first.
const FUSED: [(u64, u64, u64); 9] =
    [(16, 4, 64), (16, 4, 32), (16, 2, 32), (16, 4, 16), (16, 2, 16), (16, 1, 16), (8, 1, 32), (8, 1, 16), (4, 1, 16)];
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
        Some(c) => {
            let (operands, rows, columns, summed) = (c.operands, c.rows, c.columns, c.summed);
            let product = few_rows::Product { operands, rows, columns, summed };
            let few = few_rows::variants(kernel, plan, gpu, &product, &f);
            few.unwrap_or_else(|| vec![tiled(kernel, plan, sheet, gpu, &c, &f)])
        }
        None if !steps_in_order(kernel) && kernel.axes.iter().any(|(_, a)| inner(a)) => {
            let longest = kernel.axes.iter().filter(|(_, a)| inner(a)).map(|(id, _)| f.extent(id)).max().flatten();
            let fit = longest.and_then(|n| INNER.into_iter().find(|class| n <= *class));
            let best =
                |n: u64| fused(kernel, plan, sheet, &f, sizes, n).unwrap_or_else(|| (blocks(kernel, n), FED_PRODUCTS));
            // The kernel that merges parts has the blocks of one entry.
            let alone = fit.map(best).and_then(|(m, resident)| cut(kernel, plan, gpu, resident, &f, m));
            match alone {
                // Memory is what such parts wait for: what a step loads is under way together.
                Some(m) => vec![KernelMapping { early: m.roles.is_empty(), ..m }],
                None => INNER.into_iter().map(|n| best(n).0).collect(),
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

/// Several contractions of the same rows in one stream, each by register tiles: the rows' operands and results stay with
/// the warp that has the rows, what a step loads lies in shared memory, and so does what it computes and multiplies. With how many such tasks a multiprocessor is fed by. None where shared memory or registers do not hold the
/// least of them at inner axes of `n`, where the rows are fewer than an atom's, and for kernels that are not so. None for
/// adapters of few registers or unknown ones either: of attention these are thousands of lines, which a browser that has no
/// card compiles for minutes.
fn fused(
    kernel: &Kernel,
    plan: &Plan,
    sheet: &DataSheet,
    f: &Facts<'_>,
    sizes: Option<&[u64]>,
    n: u64,
) -> Option<(KernelMapping, u64)> {
    let gpu = sheet.gpu.as_ref()?;
    // Where lanes do not shuffle, they meet in shared memory: up to eight values of a thread, in two copies.
    let alone = sheet.webgpu.as_ref().is_none_or(|w| w.subgroup < 2);
    let exchange = if alone { 16 * WORD * Scope::Warp.threads() } else { 0 };
    if gpu.thread_registers < LARGE {
        return None;
    }
    let facts = facts::Facts::new(plan, kernel, sizes).ok()?.with_inner(|_| Some(n));
    let [stream] = facts.streams.as_slice() else { return None };
    let s = in_registers(&facts, Family::FMA).ok().filter(|s| s.contractions.len() > 1)?;
    let rows = s.contractions[0].m;
    let extent = f.extent(rows).unwrap_or(u64::MAX);
    if kernel.axes[rows].kind != AxisKind::Grid || extent < ROWS[0] || n < 2 * ROWS[1] {
        return None;
    }
    // The products of matrices, where the adapter has those of all operands' types: what one contraction leaves the next one
    // takes, and a thread holds its rows by other layouts than register tiles do. Registers' halves are then as small.
    let dtype = |t: TileId| kernel.tiles[t].dtype;
    let atoms: Option<Vec<Atom>> =
        s.contractions.iter().map(|c| cooperative::atom(sheet, [dtype(c.a), dtype(c.b)])).collect();
    let atoms: Vec<Option<Atom>> = match atoms {
        Some(all) => all.into_iter().map(Some).collect(),
        None => vec![None; s.contractions.len()],
    };
    let size = |t: TileId| if atoms.iter().any(Option::is_some) { dtype(t).bytes(1) } else { WORD };
    // Rows of what a unit multiplies as matrices are apart, and elements of a matrix at a time pass through memory.
    let apart = |t: TileId| {
        let read = s.contractions.iter().zip(&atoms).find(|(c, _)| c.a == t || c.b == t);
        if read.is_some_and(|(_, a)| a.is_some()) { 16 } else { 0 }
    };
    let passage = atoms.iter().flatten().map(|a| WORD * a.shape[0] * a.shape[1]).max().unwrap_or(0);
    // What a step computes and multiplies: left operands that are not loaded.
    let computed: Vec<TileId> = s.contractions.iter().map(|c| c.a).filter(|t| facts.load_of(*t).is_none()).collect();
    // Steps of many keys are for matrices, of which each costs the sums so far a way through memory.
    let mut blocks = FUSED.into_iter().filter(|(_, _, steps)| *steps <= 32 || passage > 0);
    let (unit, units, steps) = blocks.find(|&(unit, units, steps)| {
        let block = |a: AxisId| match kernel.axes[a].kind {
            _ if a == rows => unit * units,
            _ if a == stream.axis => steps,
            AxisKind::Inner => kernel.axes[a].block.unwrap_or(n),
            AxisKind::Stream | AxisKind::Grid => 1,
        };
        let elems = |t: TileId| facts.tile_axes(t).iter().map(|a| block(*a)).product::<u64>();
        let held = |t: TileId| {
            let blocks = || facts.tile_axes(t).iter().map(|a| block(*a));
            let (along, more) = match apart(t) {
                0 if computed.contains(&t) => (1, 0),
                // Rows of right operands are up to a word longer, four of them a vector.
                0 => (blocks().next_back().unwrap_or(1), WORD),
                bytes => (blocks().filter(|n| *n > 1).min().unwrap_or(1), bytes),
            };
            elems(t) * size(t) + elems(t) / along * more
        };
        let bytes = s.fetched().chain(computed.iter().copied()).map(held).sum::<u64>();
        let whole = s.contractions.iter().zip(&atoms).all(|(c, a)| match a {
            Some(a) => unit % a.shape[0] == 0 && block(c.n) % a.shape[1] == 0 && block(c.k) % a.shape[2] == 0,
            None => true,
        });
        // Accumulators, what is computed of them, operands of a step of 4, and values of rows.
        let own = s.contractions.iter().map(|c| unit / 4 * block(c.n) / 8).sum::<u64>();
        let more = computed.iter().map(|t| elems(*t) / (32 * units)).sum::<u64>();
        // Two neighbouring atoms' columns, where there are two.
        let wide = s.contractions.iter().map(|c| block(c.n).min(if block(c.n) % 128 == 0 { 128 } else { 64 })).max();
        let registers = own + more + unit + wide.unwrap_or(0) / 2 + 2 * unit + OVERHEAD;
        let wasted = unit > 4 && extent <= unit / 2 || units > 1 && extent <= unit * units / 2;
        !wasted
            && whole
            && bytes + (exchange + passage) * units <= gpu.shared_per_task
            && registers <= gpu.thread_registers
            && 32 * units <= gpu.threads_per_task
            && s.contractions.iter().all(|c| block(c.k).is_multiple_of(4) && block(c.n).is_multiple_of(8))
    })?;
    let axes = kernel.axes.iter().filter(|(_, a)| a.block.is_none()).map(|(id, a)| match a.kind {
        _ if id == rows => AxisMapping { units, ..AxisMapping::new(&a.name, unit * units) },
        AxisKind::Inner => AxisMapping::new(&a.name, n),
        AxisKind::Stream => AxisMapping::new(&a.name, steps),
        AxisKind::Grid => AxisMapping::new(&a.name, 1),
    });
    let name = |t: TileId| kernel.tiles[t].name.as_str();
    let fetched =
        s.fetched().map(|t| TileMapping { engine: Some(Engine::CpAsync), ..TileMapping::new(name(t), Space::Shared) });
    let turned = computed.iter().map(|t| TileMapping::new(name(*t), Space::Shared));
    let ops = facts.ops.iter().enumerate().filter(|(_, o)| o.stream.is_some()).map(|(i, o)| {
        let contraction = s.contractions.iter().zip(&atoms).find(|(c, _)| c.op == i);
        let atom = contraction.map(|(c, atom)| match atom {
            Some(atom) => atom.name.0.clone(),
            None => format!("fma.m{unit}n{}k4.f32", if c.n == stream.axis { steps } else { n }.min(COLUMNS)),
        });
        OpMapping { atom, slot: u64::from(!s.fetches(&facts, i)), ..OpMapping::new(&o.name) }
    });
    let role = RoleMapping { role: "main".to_owned(), scope: Scope::Warp, units, regs: None, ping_pong: false };
    let grid = kernel.axes.iter().filter(|(id, a)| a.kind == AxisKind::Grid && *id != rows).map(|(id, _)| id);
    let order = grid.chain([rows]).map(|a| kernel.axes[a].name.clone()).collect();
    let m = KernelMapping {
        kernel: kernel.name.clone(),
        axes: axes.collect(),
        tiles: fetched.chain(turned).collect(),
        ops: ops.collect(),
        roles: vec![role],
        work: Work { order, ..Work::default() },
        ..KernelMapping::default()
    };
    Some((m, FED.div_ceil(units)))
}

/// Tiles of a task from the registers, threads and shared memory that there are.
fn tiled(kernel: &Kernel, plan: &Plan, sheet: &DataSheet, gpu: &Gpu, c: &Contraction, f: &Facts<'_>) -> KernelMapping {
    if let Some(tile) = matrices(kernel, sheet, c, f) {
        let resident = tile.fed();
        let blocks = Blocks { rows: tile.rows, units: tile.units, columns: tile.columns, depth: tile.depth };
        let m = written(kernel, plan, c, &blocks, tile.atom.name.0);
        return cut(kernel, plan, gpu, resident, f, m.clone()).unwrap_or(m);
    }
    let most = if gpu.thread_registers >= LARGE { 32 } else { 16 };
    // No more rows than there are, as far as that is known.
    let extent = f.extent(c.rows).unwrap_or(u64::MAX);
    let rows = ROWS.into_iter().find(|n| extent <= *n).unwrap_or(most).min(most);
    let atom = format!("fma.m{rows}n{COLUMNS}k4.f32");
    let units = 4.min(gpu.threads_per_task / Scope::Warp.threads()).max(1);
    let units = units.min(extent.div_ceil(rows).checked_next_power_of_two().unwrap_or(units));
    // Columns that are read along k are a word longer.
    let fits = |depth: &u64| WORD * (depth * (rows * units + COLUMNS) + COLUMNS) <= gpu.shared_per_task;
    let depth = DEPTHS.into_iter().find(fits).unwrap_or(DEPTHS[1]);
    let m = written(kernel, plan, c, &Blocks { rows, units, columns: COLUMNS, depth }, atom);
    cut(kernel, plan, gpu, FED.div_ceil(units), f, m.clone()).unwrap_or(m)
}

/// The blocks of the contraction by cooperative matrices, where the adapter has those of its types.
fn matrices(kernel: &Kernel, sheet: &DataSheet, c: &Contraction, f: &Facts<'_>) -> Option<cooperative::Tile> {
    let atom = cooperative::atom(sheet, c.operands.map(|t| kernel.tiles[t].dtype))?;
    let own = [c.rows, c.columns, c.summed];
    let mut others = kernel.axes.ids().filter(|a| !own.contains(a)).map(|a| f.extent(a));
    let others = others.try_fold(1, |n: u64, x| Some(n.saturating_mul(x?)));
    let [m, n, k] = own.map(|a| f.extent(a));
    // What follows the product is computed beside it.
    let mut follows = false;
    kernel.for_each_op(&mut |op, _| {
        follows |= match op {
            Op::Map { value, .. } => !matches!(kernel.exprs[*value], Expr::Int(_) | Expr::Float(_)),
            Op::Reduce { .. } | Op::Scan { .. } => true,
            Op::Store { value, .. } => !matches!(kernel.exprs[*value], Expr::Tile(_)),
            Op::Load { .. } | Op::Contract { .. } => false,
        };
    });
    cooperative::tile(sheet, &atom, [m, n, k, others], 1 + u64::from(follows))
}

/// Blocks of a task: rows of a warp, warps, columns, and coordinates along k of a step.
struct Blocks {
    rows: u64,
    units: u64,
    columns: u64,
    depth: u64,
}

/// The mapping of a contraction by these blocks.
fn written(kernel: &Kernel, plan: &Plan, c: &Contraction, b: &Blocks, atom: String) -> KernelMapping {
    let Blocks { rows, units, columns, depth } = *b;
    let name = |a: AxisId| kernel.axes[a].name.clone();
    let axes = kernel.axes.ids().map(|a| match a {
        _ if a == c.rows => AxisMapping { units, ..AxisMapping::new(name(a), rows * units) },
        _ if a == c.columns => AxisMapping::new(name(a), columns),
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
    KernelMapping {
        kernel: kernel.name.clone(),
        axes: axes.collect(),
        tiles: tiles.to_vec(),
        ops: loads.into_iter().chain([contract]).collect(),
        roles: vec![role],
        work: Work { order, ..Work::default() },
        ..KernelMapping::default()
    }
}
