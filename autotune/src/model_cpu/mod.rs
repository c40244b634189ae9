//! Mappings for CPU cores: blocks that keep an operation's tiles in a core's caches.
//!
//! [`choose`] is a rule, and what engines use without a table; [`candidates`] are the cheapest solutions of the integer
//! CSP of [`space`] by the cost model of [`cost`], and [`drawn`] are drawn from all of them, for a tuner to measure. The
//! rule's choice is among the solutions. By the rule, a contraction's result is cut into blocks of whole register tiles
//! along its row and column axes and its stream into panels that fit the second-level cache; other axes of the launch are
//! walked one by one, so that there are tasks for every core.
//! Invariant: functions of the plan, the data sheet, the sizes and the seed alone.

use einfall_ir::analysis::steps;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms;
use einfall_ir::mapping::{AxisMapping, KernelMapping, Mapping, TileMapping};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{AxisId, AxisKind, Kernel, Node, Op, Plan, Space as Memory, TileId};

pub mod cost;
pub mod space;
mod task;
mod work;

pub use cost::Cost;
use cost::Pricer;
use space::Space;

use crate::model_gpu::Rejected;

/// Rows of a contraction's block: a multiple of every register tile's rows in use (14, 6).
const ROWS: u64 = 126;
/// Rows of a block that instructions for tiles multiply: what they take for an element is far less than laying out the
/// other operand's, which all rows share.
const TILED_ROWS: u64 = 256;
/// Columns of a contraction's block: a multiple of every register tile's columns in use (32, 16, 8).
const COLUMNS: u64 = 256;
/// Share of the rule's predicted time below which another mapping is chosen for given sizes: what the model chooses first is
/// within 8 % of the best at the median and two thirds above it at worst (docs/tuning-log.md).
const PLAINLY: f64 = 0.9;
/// Tasks a core that leave no core idle for long.
const BALANCED: u64 = 8;
/// Multiply-adds of a step that are worth waking cores for: some 10 µs of one.
const STEP: u64 = 1 << 20;
/// Columns that a panel holds at most.
const PANEL: u64 = 32;
/// Rows up to which a product is a reduction (`codegen/src/lower/cpu/contract.rs`).
const THIN: u64 = 2;
/// Elements of a block of a kernel without contractions, at least, so that a task is worth starting.
const ELEMENTS: u64 = 4096;

/// The mapping of every kernel of `plan` for a CPU with caches as in `sheet`.
pub fn choose(plan: &Plan, sheet: &DataSheet) -> Mapping {
    let l2 = sheet.levels.iter().find(|l| l.name == "l2").map_or(1 << 20, |l| l.bytes);
    let tiles = multiplies_tiles(sheet);
    let kernels =
        plan.kernels.iter().map(|k| kernel(plan, k, l2, &|out, a, b| tiles && narrow(plan, k, out, a, b))).collect();
    Mapping { plan: plan.name.clone(), target: sheet.name.clone(), kernels }
}

/// The rule at known sizes (one value per rank): as [`choose`], with no more rows than there are, where these are few with
/// rows of the axes around, and with larger blocks of a product where the cores have tasks enough.
pub fn rule_at(plan: &Plan, sheet: &DataSheet, sizes: &[u64]) -> Mapping {
    let mut rule = choose(plan, sheet);
    let cores = sheet.level("registers").map_or(1, |l| l.instances);
    for (k, m) in plan.kernels.iter().zip(&mut rule.kernels) {
        rows_there_are(plan, k, sizes, m);
        fewer_tasks(plan, k, cores, sizes, m);
    }
    rule
}

/// Twice or four times the rows of a product and twice its columns, where as many tasks are left as balance the cores: each
/// operand is laid out as many times fewer.
fn fewer_tasks(plan: &Plan, k: &Kernel, cores: u64, sizes: &[u64], m: &mut KernelMapping) -> Option<()> {
    let mut products = Vec::new();
    k.for_each_op(&mut |op, _| {
        if let Op::Contract { .. } = op {
            products.push(space::rows_and_columns(plan, k, op));
        }
    });
    // Of several over the same rows and columns each lays its operands out.
    products.dedup();
    let [(Some(row), Some(column))] = products[..] else { return None };
    let lines: Vec<String> = m.axes.iter().map(|l| l.axis.clone()).collect();
    let line = |a: AxisId| lines.iter().position(|l| *l == k.axes[a].name);
    let (i, j) = (line(row)?, line(column)?);
    if k.axes[row].kind != AxisKind::Grid || k.axes[column].kind != AxisKind::Grid {
        return None;
    }
    let own = (m.axes[i].block, m.axes[j].block);
    let more = |a: AxisId, block: u64| k.axes[a].extent.eval(sizes).is_ok_and(|n| n > block);
    if !more(row, own.0) || !more(column, own.1) {
        return None;
    }
    for (rows, columns) in [(2, 1), (2, 2), (4, 2)] {
        let mut blocks: Vec<u64> = m.axes.iter().map(|l| l.block.max(1)).collect();
        (blocks[i], blocks[j]) = (own.0 * rows, own.1 * columns);
        let grid = k.axes.ids().filter(|a| k.axes[*a].kind == AxisKind::Grid);
        let tasks = |a: AxisId| {
            let extent = k.axes[a].extent.eval(sizes).ok()?;
            Some(extent.div_ceil(line(a).map_or(1, |l| blocks[l])))
        };
        if product(grid.map(tasks))? < BALANCED * cores {
            break;
        }
        (m.axes[i].block, m.axes[j].block) = (own.0 * rows, own.1 * columns);
    }
    Some(())
}

/// As [`choose`] at known sizes (one value per rank): [`rule_at`], unless the cost model predicts that another mapping takes
/// so much less that its own error does not matter; a recurrence that would leave cores idle has its steps launched.
pub fn choose_at(plan: &Plan, sheet: &DataSheet, sizes: &[u64]) -> Mapping {
    let rule = rule_at(plan, sheet, sizes);
    let cores = sheet.level("registers").map_or(1, |l| l.instances);
    // By the rule's blocks, which leave the rows of a product together.
    let steps: Vec<Option<KernelMapping>> =
        plan.kernels.iter().zip(&rule.kernels).map(|(k, m)| launched(k, cores, sizes, m)).collect();
    let mut chosen = match price(plan, sheet, Some(sizes), &rule) {
        Ok(usual) => {
            let best = candidates(plan, sheet, Some(sizes), 1).swap_remove(0);
            if best.1.seconds < PLAINLY * usual.seconds { best.0 } else { rule }
        }
        Err(_) => rule,
    };
    for (m, own) in chosen.kernels.iter_mut().zip(steps) {
        *m = own.unwrap_or_else(|| m.clone());
    }
    chosen
}

/// A product of what is known; none where it does not fit.
fn product(mut factors: impl Iterator<Item = Option<u64>>) -> Option<u64> {
    factors.try_fold(1u64, |all, n| all.checked_mul(n?))
}

/// As [`choose_at`] where every size is known, else as [`choose`].
pub fn choose_for(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>) -> Mapping {
    sizes.map_or_else(|| choose(plan, sheet), |sizes| choose_at(plan, sheet, sizes))
}

/// Rows of contractions cut to those that there are; where these are few, axes around that share the other operand are
/// rows too, so that it is laid out for as many.
fn rows_there_are(plan: &Plan, k: &Kernel, sizes: &[u64], m: &mut KernelMapping) {
    k.for_each_op(&mut |op, _| {
        let Op::Contract { out, a, b, .. } = op else { return };
        let (out, a, b) = (&k.tiles[*out].axes, &k.tiles[*a].axes, &k.tiles[*b].axes);
        let Some(last) = space::rows_and_columns(plan, k, op).0 else { return };
        let line = |m: &KernelMapping, x: &AxisId| m.axes.iter().position(|l| l.axis == k.axes[*x].name);
        let Some(i) = line(m, &last) else { return };
        let Ok(extent) = k.axes[last].extent.eval(sizes) else { return };
        let most = m.axes[i].block;
        m.axes[i].block = most.min(extent.max(1));
        let mut held = m.axes[i].block;
        // Rows that share an operand by runs are alone.
        let around = out.iter().rev().filter(|x| a.contains(x) && !b.contains(x)).skip_while(|x| **x != last).skip(1);
        for x in around.filter(|x| k.axes[**x].kind == AxisKind::Grid) {
            let (Some(i), Ok(extent)) = (line(m, x), k.axes[*x].extent.eval(sizes)) else { continue };
            if m.axes[i].block == 1 {
                m.axes[i].block = (most / held).clamp(1, extent.max(1));
            }
            held *= m.axes[i].block;
        }
    });
}

/// The steps of a recurrence over a whole state as launches, where its tasks would leave cores idle and a step is work
/// for several: columns of its products are cut, as many blocks as there are cores, and their operands packed once.
fn launched(k: &Kernel, cores: u64, sizes: &[u64], m: &KernelMapping) -> Option<KernelMapping> {
    let extent = |a: &AxisId| k.axes[*a].extent.eval(sizes).ok();
    let block = |a: &AxisId| m.axis(&k.axes[*a].name).map_or(1, |l| l.block).max(1);
    let grid = k.axes.ids().filter(|a| k.axes[*a].kind == AxisKind::Grid);
    let tasks = product(grid.map(|a| Some(extent(&a)?.div_ceil(block(&a)))))?;
    if tasks >= cores {
        return None;
    }
    let stream = k.body.iter().find_map(|n| match n {
        Node::Stream(s) if s.sequential => Some(s),
        Node::Stream(_) | Node::Op(_) => None,
    })?;
    // Products with what does not change from step to step: its tile, the axis cut, the rows that share it, and their work.
    let mut products: Vec<(TileId, AxisId, u64, u64)> = Vec::new();
    for node in &stream.body {
        let Node::Op(Op::Contract { out, a, b, over, .. }) = node else { continue };
        let (o, x, y) = (&k.tiles[*out].axes, &k.tiles[*a].axes, &k.tiles[*b].axes);
        let lane = *o.iter().rev().find(|i| x.contains(i) != y.contains(i))?;
        let (columns, own, other) = if x.contains(&lane) { (*a, x, y) } else { (*b, y, x) };
        let loaded = k.body.iter().any(|n| matches!(n, Node::Op(Op::Load { out, .. }) if *out == columns));
        let rows = o.iter().filter(|i| other.contains(i) && !own.contains(i));
        let rows =
            rows.map(|i| if k.axes[*i].kind == AxisKind::Inner { extent(i) } else { Some(block(i)) }).max()??;
        let work = product(o.iter().chain(over).map(extent))?;
        if loaded && k.tiles[columns].dtype.is_float() {
            products.push((columns, lane, rows, work));
        }
    }
    let lane = products.first()?.1;
    let work = products.iter().fold(0u64, |sum, p| sum.saturating_add(p.3));
    let whole = k.axes[lane].kind == AxisKind::Inner && products.iter().all(|p| p.1 == lane);
    if !whole || work < STEP || steps::check(k, stream.axis, &[lane]).is_err() {
        return None;
    }
    let share = extent(&lane)?.checked_mul(tasks)?.div_ceil(cores).max(1).checked_next_multiple_of(PANEL)?;
    let mut m = m.clone();
    m.axes.push(AxisMapping::new(&k.axes[lane].name, share));
    let name = &k.axes[stream.axis].name;
    m.axes.iter_mut().filter(|l| l.axis == *name).for_each(|l| l.launches = true);
    let packed = products.iter().filter(|p| p.2 > THIN).map(|p| TileMapping::new(&k.tiles[p.0].name, Memory::Packed));
    m.tiles.extend(packed);
    Some(m)
}

/// The rule's mapping and the cheapest `k` by the cost model, a recurrence's also with its steps launched, with what they
/// are predicted to take, cheapest first; each once.
pub fn candidates(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, k: usize) -> Vec<(Mapping, Cost)> {
    let rule = choose(plan, sheet);
    let cores = sheet.level("registers").map_or(1, |l| l.instances);
    let at_sizes = sizes.map(|sizes| (sizes, rule_at(plan, sheet, sizes)));
    let mut lists: Vec<Vec<(KernelMapping, Cost)>> = Vec::new();
    for (i, (kernel, own)) in plan.kernels.iter().zip(&rule.kernels).enumerate() {
        let space = Space::new(plan, kernel, sizes, multiplies_tiles(sheet), own, None);
        let pricer = Pricer::new(&space, sheet);
        let mut list: Vec<_> = space.best(&pricer, k).into_iter().map(|v| (space.write(&v), pricer.cost(&v))).collect();
        let steps = at_sizes.as_ref().and_then(|(sizes, m)| launched(kernel, cores, sizes, &m.kernels[i]));
        if let Some(m) = steps
            && let Ok(cost) = judged(plan, kernel, sheet, sizes, own, &m)
        {
            let at = list.partition_point(|x| x.1.seconds <= cost.seconds);
            list.insert(at, (m, cost));
        }
        // Last in each list, so that the last candidate is the rule's whole.
        list.push((own.clone(), pricer.cost(&space.read(own))));
        lists.push(list);
    }
    let most = lists.iter().map(Vec::len).max().unwrap_or(0);
    let mut out: Vec<(Mapping, Cost)> = Vec::new();
    for i in 0..most {
        let chosen = lists.iter().filter_map(|l| if i + 1 == most { l.last() } else { l.get(i).or(l.last()) });
        let chosen: Vec<&(KernelMapping, Cost)> = chosen.collect();
        let kernels = chosen.iter().map(|c| c.0.clone()).collect();
        let mapping = Mapping { kernels, ..rule.clone() };
        if out.iter().all(|o| o.0 != mapping) {
            out.push((mapping, Cost::total(chosen.iter().map(|c| &c.1))));
        }
    }
    out.sort_by(|x, y| x.1.seconds.total_cmp(&y.1.seconds));
    out
}

/// What a mapping is predicted to take; kernels that it leaves out are mapped by the rule.
///
/// # Errors
/// The constraint that rejects it.
pub fn price(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, mapping: &Mapping) -> Result<Cost, Rejected> {
    Ok(Cost::total(&costs(plan, sheet, sizes, mapping)?))
}

/// As [`price`], kernel by kernel.
///
/// # Errors
/// The constraint that rejects it.
pub fn costs(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, mapping: &Mapping) -> Result<Vec<Cost>, Rejected> {
    let rule = choose(plan, sheet);
    let mut costs = Vec::new();
    for (kernel, own) in plan.kernels.iter().zip(&rule.kernels) {
        let m = mapping.kernels.iter().find(|m| m.kernel == kernel.name).unwrap_or(own);
        costs.push(judged(plan, kernel, sheet, sizes, own, m)?);
    }
    Ok(costs)
}

/// The constraint that rejects `mapping`; none if it is admitted.
pub fn why_not(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, mapping: &Mapping) -> Option<Rejected> {
    price(plan, sheet, sizes, mapping).err()
}

/// What an admitted mapping of one kernel costs; what rejects it is a line that means nothing on a processor, a block
/// that an axis cannot have, or more memory than a task may take.
fn judged(
    plan: &Plan,
    kernel: &Kernel,
    sheet: &DataSheet,
    sizes: Option<&[u64]>,
    rule: &KernelMapping,
    m: &KernelMapping,
) -> Result<Cost, Rejected> {
    let reject = |constraint: String, message: String| Rejected { kernel: kernel.name.clone(), constraint, message };
    let space = Space::new(plan, kernel, sizes, multiplies_tiles(sheet), rule, Some(m));
    if let Some((constraint, message)) = space.foreign(m) {
        return Err(reject(constraint, message));
    }
    let values = space.read(m);
    match space.model.check(&values) {
        Ok(()) => Ok(Pricer::new(&space, sheet).cost(&values)),
        Err(broken) => {
            let message = space.describe(&values, &broken.name);
            Err(reject(broken.name, message))
        }
    }
}

/// `n` different mappings drawn uniformly from the solutions of every kernel's CSP, of the first that the solver
/// finds where there are very many, or all where there are fewer. Sizes that admit the same blocks draw the same ones, so that what is compiled for one serves the other.
pub fn drawn(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, seed: u64, n: usize) -> Vec<Mapping> {
    let rule = choose(plan, sheet);
    let spaces: Vec<Space<'_>> = plan
        .kernels
        .iter()
        .zip(&rule.kernels)
        .map(|(k, own)| Space::new(plan, k, sizes, multiplies_tiles(sheet), own, None))
        .collect();
    let lists: Vec<Vec<Vec<i64>>> = spaces.iter().map(Space::all).collect();
    let total = lists.iter().fold(1usize, |all, l| all.saturating_mul(l.len().max(1)));
    let mut out: Vec<Mapping> = Vec::new();
    // Each kernel's assignments in an order of their own, a new one each time that all were drawn.
    let mut orders: Vec<Vec<usize>> = vec![Vec::new(); spaces.len()];
    for i in 0..20 * n {
        if out.len() >= n.min(total) {
            break;
        }
        let mut kernels = Vec::new();
        for (k, (space, list)) in spaces.iter().zip(&lists).enumerate() {
            let at = i % list.len().max(1);
            if at == 0 {
                let round = (i / list.len().max(1)) as u64;
                let key = |v: &usize| mixed(seed, k as u64, round, &list[*v]);
                orders[k] = (0..list.len()).collect();
                orders[k].sort_by_cached_key(key);
            }
            kernels.push(orders[k].get(at).map_or_else(|| rule.kernels[k].clone(), |v| space.write(&list[*v])));
        }
        let mapping = Mapping { kernels, ..rule.clone() };
        if !out.contains(&mapping) {
            out.push(mapping);
        }
    }
    out
}

/// A number that looks random for an assignment (SplitMix64's mixing, Steele, Lea and Flood, OOPSLA 2014).
fn mixed(seed: u64, kernel: u64, round: u64, values: &[i64]) -> u64 {
    let mut state = seed;
    for x in [kernel, round].into_iter().chain(values.iter().map(|v| *v as u64)) {
        state = (state ^ x).wrapping_add(0x9e37_79b9_7f4a_7c15);
        state = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ state >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 31;
    }
    state
}

/// Whether the processor has instructions that multiply tiles of bf16.
fn multiplies_tiles(sheet: &DataSheet) -> bool {
    atoms::of_processor(sheet).is_some_and(|a| a.tiled())
}

/// Whether a processor with an instruction for products of bf16 would take it for these: both operands are of that type, or may be
/// rounded to it beside the one that is (`codegen/src/passes/round_operands.rs`).
fn narrow(plan: &Plan, k: &Kernel, out: TileId, a: TileId, b: TileId) -> bool {
    let [x, y] = [a, b].map(|t| k.tiles[t].dtype);
    let may = |d: DType| matches!(d, DType::BF16 | DType::F32);
    let rounded = !plan.exact && !k.tiles[out].exact && may(x) && may(y) && (x == DType::BF16 || y == DType::BF16);
    k.tiles[out].dtype == DType::F32 && (rounded || x == DType::BF16 && y == DType::BF16)
}

fn kernel(plan: &Plan, k: &Kernel, l2: u64, tiled: &dyn Fn(TileId, TileId, TileId) -> bool) -> KernelMapping {
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
        let by_tiles = tiled(*out, *a, *b);
        let (row, column) = space::rows_and_columns(plan, k, op);
        if let Some(row) = row {
            set(row, if by_tiles { TILED_ROWS } else { ROWS });
        }
        if let Some(column) = column {
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
                AxisKind::Stream if space::sequential(k, id) => {}
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
    KernelMapping { kernel: k.name.clone(), axes, ..KernelMapping::default() }
}
