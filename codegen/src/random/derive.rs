//! A mapping for any plan of contractions over one axis of rows, by rule and a few drawn choices: not the fastest, but
//! one that holds whatever the plan is.
//!
//! Rows are cut over the units of one role; what contractions read from device memory comes through shared memory by
//! a producer's copies; what they read of the step's own stays in registers as the left operand or goes through shared
//! memory as the right one. Invariant: names come from the plan alone.

use std::collections::BTreeMap;

use einfall_ir::analysis::resources::launch_registers;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Engine, Scope};
use einfall_ir::mapping::{AxisMapping, KernelMapping, Mapping, OpMapping, RoleMapping, Source, TileMapping};
use einfall_ir::tile::{AxisId, AxisKind, Expr, Kernel, Op, Plan, Space, TileId};

use super::Rng;

/// Registers of each thread of the producer.
const PRODUCER_REGISTERS: u64 = 24;
/// Registers of each thread of the consumers, at most.
const CONSUMER_REGISTERS: u64 = 240;

/// What a mapping is drawn with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choices {
    /// Warpgroups that share a block of rows, 64 rows each.
    pub units: u64,
    /// Coordinates per step, and per block of every other axis a contraction has that the plan does not fix.
    pub block: u64,
    /// Copies in flight.
    pub stages: u64,
    /// Whether units take turns at the tensor cores.
    pub ping_pong: bool,
    /// Whether the last carried contraction of a stream runs an iteration behind the rest.
    pub behind: bool,
    /// Whether results leave through shared memory.
    pub stores_by_engine: bool,
    /// One task per block, or tasks that walk several.
    pub persistent: bool,
}

impl Choices {
    /// One warpgroup, blocks of 64, nothing overlapped.
    pub fn plain() -> Choices {
        Choices {
            units: 1,
            block: 64,
            stages: 1,
            ping_pong: false,
            behind: false,
            stores_by_engine: false,
            persistent: false,
        }
    }

    /// Drawn choices; small blocks, so that evaluators are quick.
    pub fn draw(rng: &mut Rng) -> Choices {
        let units = 1 + rng.below(2);
        Choices {
            units,
            block: *rng.pick(&[32, 64]),
            stages: 1 + rng.below(3),
            ping_pong: units > 1 && rng.one_in(3),
            behind: rng.one_in(2),
            stores_by_engine: rng.one_in(2),
            persistent: rng.one_in(4),
        }
    }
}

/// The mapping of `plan`.
///
/// # Errors
/// What no instruction can do: the contraction's name and why.
pub fn mapping(plan: &Plan, choices: &Choices) -> Result<Mapping, String> {
    let kernels = plan.kernels.iter().map(|k| kernel(plan, k, choices)).collect::<Result<Vec<_>, _>>()?;
    Ok(Mapping { plan: plan.name.clone(), target: "h100".into(), kernels })
}

/// A contraction seen by an instruction.
struct Turned {
    name: String,
    left: TileId,
    right: TileId,
    swapped: bool,
    columns: AxisId,
    carried: bool,
}

fn kernel(plan: &Plan, k: &Kernel, choices: &Choices) -> Result<KernelMapping, String> {
    let names = k.op_names(plan);
    let mut ops: Vec<(String, &Op, bool)> = Vec::new();
    let all = collect(k);
    for (name, (op, streamed)) in names.iter().zip(&all) {
        ops.push((name.clone(), op, *streamed));
    }
    let mut m = KernelMapping { kernel: k.name.clone(), ..KernelMapping::default() };
    let contracts: Vec<&(String, &Op, bool)> =
        ops.iter().filter(|(_, op, _)| matches!(op, Op::Contract { .. })).collect();
    if contracts.is_empty() {
        for (_, a) in k.axes.iter() {
            m.axes.push(AxisMapping::new(&a.name, if a.kind == AxisKind::Grid { 1 } else { choices.block }));
        }
        return Ok(m);
    }
    let has = |t: TileId, a: &AxisId| k.tiles[t].axes.contains(a);
    let produced = |t: TileId| !ops.iter().any(|(_, op, _)| matches!(op, Op::Load { out, .. } if *out == t));
    // What is read under another axis goes from unit to unit, through shared memory: only a right operand can.
    let exchanged = |t: TileId| {
        ops.iter().any(|(_, op, _)| {
            let Op::Map { out, value } = op else { return false };
            let mut renamed = false;
            k.walk(*value, &mut |_, e| renamed |= matches!(e, Expr::TileAt { .. }));
            *out == t && renamed
        })
    };
    // The axis whose rows an instruction's left operand has: one that every contraction keeps and one operand has; the
    // innermost, the left operands as written before the right ones.
    let fits = |a: &AxisId| {
        contracts.iter().all(|(_, op, _)| {
            let Op::Contract { out, a: x, b: y, .. } = op else { return false };
            let operand = |t: &TileId| match (produced(*t), exchanged(*t)) {
                (_, true) => !has(*t, a),
                (true, false) => has(*t, a),
                (false, false) => true,
            };
            has(*out, a) && has(*x, a) != has(*y, a) && operand(x) && operand(y)
        })
    };
    let as_written =
        |a: &AxisId| contracts.iter().all(|(_, op, _)| matches!(op, Op::Contract { a: x, .. } if has(*x, a)));
    let candidates: Vec<AxisId> = k.axes.ids().filter(fits).collect();
    let rows = candidates.iter().rev().find(|a| as_written(a)).or(candidates.last()).copied();
    let Some(rows) = rows else { return Err(format!("no axis of kernel {} is every contraction's rows", k.name)) };
    let mut turned = Vec::new();
    let mut blocks: BTreeMap<AxisId, u64> = BTreeMap::new();
    let inner = |a: AxisId| match (k.axes[a].kind, fixed(plan, &k.axes[a].extent)) {
        (AxisKind::Inner, Some(n)) => n.next_multiple_of(16),
        _ => choices.block,
    };
    blocks.insert(rows, 64 * choices.units);
    for (name, op, _) in &contracts {
        let Op::Contract { out, a, b, over, carry } = op else { continue };
        let swapped = has(*b, &rows);
        let (left, right) = if swapped { (*b, *a) } else { (*a, *b) };
        let columns = k.tiles[*out].axes.iter().rev().find(|x| has(right, x) && !has(left, x));
        let Some(&columns) = columns else { return Err(format!("{name} has no columns")) };
        let [.., depth] = over[..] else { return Err(format!("{name} sums nothing")) };
        // A state that goes round between units is for few tasks at once: narrow blocks.
        let narrow = exchanged(right) && k.axes[columns].kind == AxisKind::Grid;
        blocks.insert(columns, if narrow { 16 } else { inner(columns) });
        blocks.insert(depth, if exchanged(right) { 64 * choices.units } else { inner(depth) });
        turned.push(Turned { name: name.clone(), left, right, swapped, columns, carried: *carry });
    }
    for (id, a) in k.axes.iter() {
        let sequential = is_sequential(k, id);
        let block = if sequential { 1 } else { blocks.get(&id).copied().unwrap_or(1) };
        let block = match fixed(plan, &a.extent) {
            Some(n) if a.kind == AxisKind::Inner => block.max(n),
            _ => block,
        };
        let mut axis = AxisMapping::new(&a.name, block);
        if id == rows {
            axis.units = choices.units;
        }
        m.axes.push(axis);
    }
    // The producer's share of registers goes to the consumers, by eights.
    let role = |role: &str, scope, units, regs: u64, ping_pong| RoleMapping {
        role: role.into(),
        scope,
        units,
        regs: Some(regs),
        ping_pong,
    };
    let even = launch_registers(65_536, 255, (1 + choices.units) * 128, 1);
    let rest = ((1 + choices.units) * even - PRODUCER_REGISTERS) / choices.units / 8 * 8;
    m.roles = vec![
        role("producer", Scope::Warp, 1, PRODUCER_REGISTERS, false),
        role("consumer", Scope::Warpgroup, choices.units, rest.min(CONSUMER_REGISTERS), choices.ping_pong),
    ];
    m.work.persistent = choices.persistent;
    let behind = turned.iter().rposition(|t| t.carried).filter(|_| choices.behind && turned.len() > 1);
    for (i, t) in turned.iter().enumerate() {
        let width = blocks[&t.columns];
        let operand = k.tiles[t.left].dtype;
        let depth = match operand {
            DType::BF16 | DType::F16 => 16,
            DType::Tf32 => 8,
            DType::F8E4M3 | DType::F8E5M2 => 32,
            other => return Err(format!("{} has operands of {other}", t.name)),
        };
        let mut o = OpMapping::new(&t.name);
        o.atom = Some(format!("wgmma.m64n{width}k{depth}.{operand}"));
        o.swapped = t.swapped;
        if produced(t.left) {
            o.a = Source::Registers;
        }
        if behind == Some(i) {
            o.skew = 1;
            o.slot = 0;
        }
        m.ops.push(o);
        for (tile, left) in [(t.left, true), (t.right, false)] {
            let name = &k.tiles[tile].name;
            if m.tile(name).is_some() || (left && produced(tile)) {
                continue;
            }
            let sized: Vec<AxisId> =
                k.tiles[tile].axes.iter().copied().filter(|a| blocks.get(a).is_some_and(|b| *b > 1)).collect();
            let bytes = sized.last().map_or(0, |a| k.tiles[tile].dtype.bytes(blocks[a]));
            let mut x = TileMapping::new(name, Space::Shared);
            x.swizzle = [128, 64, 32].into_iter().find(|s| bytes.is_multiple_of(*s)).unwrap_or(0);
            let streamed = ops.iter().any(|(_, op, inside)| *inside && op.outs().contains(&tile));
            if streamed {
                x.stages = if produced(tile) { 2 } else { choices.stages };
            }
            if !produced(tile) {
                x.engine = Some(Engine::Tma);
                let load = ops.iter().find(|(_, op, _)| matches!(op, Op::Load { out, .. } if *out == tile));
                if let Some((name, ..)) = load {
                    let mut o = OpMapping::new(name);
                    o.role = Some("producer".into());
                    m.ops.push(o);
                }
            }
            m.tiles.push(x);
        }
    }
    if choices.stores_by_engine {
        for (name, op, _) in &ops {
            let Op::Store { axes, when: None, join: None, buffer, .. } = op else { continue };
            let wide: Vec<u64> = axes.iter().map(|a| blocks.get(a).copied().unwrap_or(1)).filter(|b| *b > 1).collect();
            let bytes = wide.last().map_or(0, |b| plan.buffers[*buffer].dtype.bytes(*b));
            if wide.len() == 2 && bytes.is_multiple_of(128) && !is_stored_twice(&ops, *buffer) {
                let mut o = OpMapping::new(name);
                o.engine = Some(Engine::Tma);
                m.ops.push(o);
            }
        }
    }
    Ok(m)
}

/// Whether several stores go to the array.
fn is_stored_twice(ops: &[(String, &Op, bool)], b: einfall_ir::tile::BufferId) -> bool {
    ops.iter().filter(|(_, op, _)| matches!(op, Op::Store { buffer, .. } if *buffer == b)).count() > 1
}

/// Every operation, and whether it stands in a stream.
fn collect(k: &Kernel) -> Vec<(Op, bool)> {
    let mut all = Vec::new();
    k.for_each_op(&mut |op, around| all.push((op.clone(), !around.is_empty())));
    all
}

/// Whether a stream walks the axis step by step.
fn is_sequential(k: &Kernel, a: AxisId) -> bool {
    k.body.iter().any(|n| matches!(n, einfall_ir::tile::Node::Stream(s) if s.sequential && s.axis == a))
}

/// A constant extent, if its ranks are fixed.
fn fixed(plan: &Plan, size: &einfall_ir::cascade::Size) -> Option<u64> {
    use einfall_ir::arena::Id;
    let mut known = true;
    let mut values = vec![0; plan.ranks.len()];
    size.for_each_rank(&mut |r| match plan.ranks[r].fixed {
        Some(n) => values[r.index()] = n,
        None => known = false,
    });
    if known { size.eval(&values).ok() } else { None }
}
