//! Mappings for CPU cores: blocks that keep an operation's tiles in a core's caches.
//!
//! [`choose`] is a rule, and what engines use without a table; [`candidates`] are the cheapest solutions of the integer
//! CSP of [`space`] by the cost model of [`cost`], and [`drawn`] are drawn from all of them, for a tuner to measure. The
//! rule's choice is among the solutions. By the rule, a contraction's result is cut into blocks of whole register tiles along its row and column axes and its stream into panels that fit the
//! second-level cache; other axes of the launch are walked one by one, so that there are tasks for every core.
//! Invariant: functions of the plan, the data sheet, the sizes and the seed alone.

use einfall_ir::mapping::{AxisMapping, KernelMapping, Mapping, Work};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{AxisId, AxisKind, Kernel, Op, Plan};

use crate::csp::Domain;

pub mod cost;
pub mod space;

use space::Space;

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

/// The rule's mapping and the cheapest `k` by the cost model, with predicted seconds, cheapest first; each once.
pub fn candidates(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, k: usize) -> Vec<(Mapping, f64)> {
    let rule = choose(plan, sheet);
    let mut lists: Vec<Vec<(KernelMapping, f64)>> = Vec::new();
    for (kernel, own) in plan.kernels.iter().zip(&rule.kernels) {
        let space = Space::new(plan, kernel, sizes, own);
        let best = space.best(sheet, k).into_iter().map(|(s, v)| (space.write(&v), s));
        let own = (own.clone(), cost::seconds(&space, sheet, &space.read(own)));
        // Last in each list, so that the last candidate is the rule's whole.
        lists.push(best.chain([own]).collect());
    }
    let most = lists.iter().map(Vec::len).max().unwrap_or(0);
    let mut out: Vec<(Mapping, f64)> = Vec::new();
    for i in 0..most {
        let chosen = lists.iter().filter_map(|l| if i + 1 == most { l.last() } else { l.get(i).or(l.last()) });
        let chosen: Vec<&(KernelMapping, f64)> = chosen.collect();
        let kernels = chosen.iter().map(|c| c.0.clone()).collect();
        let mapping = Mapping { kernels, ..rule.clone() };
        if out.iter().all(|o| o.0 != mapping) {
            out.push((mapping, chosen.iter().map(|c| c.1).sum()));
        }
    }
    out.sort_by(|x, y| x.1.total_cmp(&y.1));
    out
}

/// Predicted seconds of a mapping; none where it is not admitted.
pub fn price(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, mapping: &Mapping) -> Option<f64> {
    let rule = choose(plan, sheet);
    let mut total = 0.0;
    for (kernel, own) in plan.kernels.iter().zip(&rule.kernels) {
        let m = mapping.kernels.iter().find(|m| m.kernel == kernel.name).unwrap_or(own);
        let space = Space::new(plan, kernel, sizes, m);
        let values = space.read(m);
        space.model.check(&values).ok()?;
        total += cost::seconds(&space, sheet, &values);
    }
    Some(total)
}

/// `n` mappings drawn uniformly from the blocks of every kernel's CSP.
pub fn drawn(plan: &Plan, sheet: &DataSheet, sizes: Option<&[u64]>, seed: u64, n: usize) -> Vec<Mapping> {
    let rule = choose(plan, sheet);
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut below = |n: usize| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    };
    let spaces: Vec<Space<'_>> =
        plan.kernels.iter().zip(&rule.kernels).map(|(k, own)| Space::new(plan, k, sizes, own)).collect();
    let mut one = |space: &Space<'_>, own: &KernelMapping| {
        for _ in 0..100 {
            let pick = |d: &Domain, at: usize| match d {
                Domain::Values(list) => list[at % list.len()],
                Domain::Range { .. } | Domain::Divisors(_) => 1,
            };
            let values: Vec<i64> = space.model.vars().iter().map(|v| pick(&v.domain, below(1 << 20))).collect();
            if space.model.check(&values).is_ok() {
                return space.write(&values);
            }
        }
        own.clone()
    };
    (0..n)
        .map(|_| {
            let kernels = spaces.iter().zip(&rule.kernels).map(|(s, own)| one(s, own)).collect();
            Mapping { kernels, ..rule.clone() }
        })
        .collect()
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
    KernelMapping {
        kernel: k.name.clone(),
        axes,
        work: Work::default(),
        tiles: Vec::new(),
        ops: Vec::new(),
        roles: Vec::new(),
        split: None,
        early: false,
        dependent: false,
    }
}
