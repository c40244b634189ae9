//! The search: leading numbers of every structure by enumeration, the rest completed greedily, the best by cost.
//!
//! Leading variables are blocks, units, clusters, tasks per multiprocessor and the grid's order; given those, more
//! stages, wider swizzles and instructions and larger register budgets never cost more, so they are set to the most
//! that fits. Invariant: every assignment returned has passed [`crate::csp::Model::check`]; results depend on kernel,
//! sheet and sizes alone.

use einfall_ir::analysis::resources::launch_registers;
use einfall_ir::arena::Id;
use einfall_ir::mapping::KernelMapping;
use einfall_ir::target::{DataSheet, Gpu, TASK_SHARED_BYTES};
use einfall_ir::tile::{AxisId, AxisKind, TileId};

use super::cost::{Cost, Work, bound, cost};
use super::facts::Facts;
use super::family::Family;
use super::space::{GROUP, PARTS, STAGES, Space};
use super::structure::{Place, Schedule, Structure};
use super::write::write;
use crate::csp::{Domain, VarId};

/// A mapping with its price.
#[derive(Clone, Debug)]
pub struct Found {
    /// Which structure.
    pub structure: usize,
    /// The assignment of its CSP.
    pub values: Vec<i64>,
    /// Its price.
    pub cost: Cost,
    /// The mapping.
    pub mapping: KernelMapping,
}

/// Columns of blocks that the search tries; the CSP admits every multiple of 8.
const COLUMNS: [i64; 19] = [8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256, 512];
/// Rows of blocks whose instructions have few.
const ROWS: [i64; 6] = [16, 32, 64, 96, 128, 256];
/// Depths of blocks along summed axes.
const DEPTHS: [i64; 5] = [16, 32, 64, 128, 256];

/// How tasks are to share the device, which stages and budgets follow.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mode {
    /// Tasks that a multiprocessor runs at a time.
    resident: i64,
    /// Whether tasks take block after block.
    persistent: bool,
    /// Whether tasks share a stream.
    split: bool,
}

/// Ways to share the device with so many blocks on so many multiprocessors.
fn modes(space: &Space<'_, '_>, blocks: f64, multiprocessors: f64) -> Vec<Mode> {
    let plain = Mode { resident: 1, persistent: false, split: false };
    let residents: Vec<i64> = [1, 2, 4, 8].into_iter().filter(|n| *n <= space.family.resident).collect();
    let mut out: Vec<Mode> = residents.iter().map(|resident| Mode { resident: *resident, ..plain }).collect();
    if space.vars.persistent.is_some() && blocks > multiprocessors {
        out.push(Mode { persistent: true, ..plain });
    }
    // More rounds than four even out by themselves.
    if space.vars.split.is_some() && blocks < 4.0 * multiprocessors {
        out.extend(residents.into_iter().map(|resident| Mode { resident, split: true, ..plain }));
    }
    out
}

fn contains(d: &Domain, v: i64) -> bool {
    match d {
        Domain::Range { lo, hi, step } => v >= *lo && v <= *hi && (v - lo) % step == 0,
        Domain::Values(list) => list.contains(&v),
        Domain::Divisors(n) => v > 0 && n % v == 0,
    }
}

/// Values of a variable's domain.
pub(super) fn values_of(d: &Domain) -> Vec<i64> {
    match d {
        Domain::Range { lo, hi, step } => (*lo..=*hi).step_by(*step as usize).collect(),
        Domain::Values(list) => list.clone(),
        Domain::Divisors(n) => crate::csp::divisors(*n).unwrap_or_default(),
    }
}

/// Blocks of an axis worth trying.
fn tried(space: &Space<'_, '_>, a: AxisId) -> Vec<i64> {
    let (f, s) = (space.facts, space.structure);
    let Some(var) = space.vars.block[a.index()] else { return vec![1] };
    let domain = &space.model.vars()[var.idx()].domain;
    let all = values_of(domain);
    if f.axis(a).kind == AxisKind::Inner {
        // Whole, for each swizzle.
        let mut out = vec![all[0]];
        for n in [32, 64, 128, 256] {
            let next = (all[0] as u64).next_multiple_of(n) as i64;
            if contains(domain, next) && !out.contains(&next) {
                out.push(next);
            }
        }
        return out;
    }
    let columns = s.contractions.iter().any(|c| c.n == a);
    let rows = s.contractions.iter().any(|c| c.m == a);
    let list: Vec<i64> = match (rows, columns) {
        (true, _) if space.family.asynchronous() => all,
        (true, _) => all.into_iter().filter(|v| ROWS.contains(v)).collect(),
        (false, true) => all.into_iter().filter(|v| COLUMNS.contains(v)).collect(),
        (false, false) => all.into_iter().filter(|v| DEPTHS.contains(v)).collect(),
    };
    // Blocks far beyond the extent only add padding.
    match f.axis(a).extent {
        Some(n) => {
            let enough = list.iter().copied().find(|v| *v as u64 >= n);
            list.into_iter().filter(|v| enough.is_none_or(|e| *v <= e)).collect()
        }
        None => list,
    }
}

/// Register budgets (producer, consumers) that leave room for so many tasks per multiprocessor.
fn budgets(gpu: &Gpu, units: i64, tasks: i64) -> (i64, i64) {
    // A task starts with an even share by eights, and roles move registers inside that.
    let threads = 128 * (units as u64 + 1);
    let share = launch_registers(gpu.registers, gpu.thread_registers, threads, tasks as u64);
    let per_task = share as i64 * (units + 1);
    for producer in [56, 40, 32, 24] {
        let consumer = ((per_task - producer) / units / 8 * 8).min(256);
        if consumer >= 232.min(per_task / units - 16) || producer == 24 {
            return (producer, consumer.max(24));
        }
    }
    (24, 24)
}

/// Fills what leading values leave open.
struct Completer<'p, 's, 'a> {
    space: &'p Space<'s, 'a>,
    gpu: &'p Gpu,
}

impl Completer<'_, '_, '_> {
    fn get(&self, values: &[i64], v: Option<VarId>) -> i64 {
        v.map_or(1, |v| values[v.idx()])
    }

    /// Columns of instructions, the most first.
    fn columns(&self) -> impl Iterator<Item = i64> {
        (8..=self.space.family.columns).rev().step_by(8)
    }

    /// The leading values with more of everything else than fits: no completion costs less.
    fn ideal(&self, leading: &[i64]) -> Vec<i64> {
        let (s, v) = (self.space.structure, &self.space.vars);
        let mut values = leading.to_vec();
        let units = self.get(&values, v.units);
        for (i, c) in s.contractions.iter().enumerate() {
            let part = self.get(&values, v.block[c.n.index()]) / if s.cut == Some(c.n) { units } else { 1 };
            values[v.atom[i].idx()] = self.columns().find(|n| part % n == 0).unwrap_or(8);
        }
        let flags = v.staged.iter().chain(&v.reuses).flatten().chain(&v.ping_pong).chain(&v.longest);
        flags.for_each(|x| values[x.idx()] = 1);
        v.stages.iter().flatten().for_each(|x| values[x.idx()] = 1);
        if let [p, c] = v.regs[..] {
            (values[p.idx()], values[c.idx()]) = (24, 128 / units.max(1));
        }
        values
    }

    /// Fills what follows from the leading values for a way to share the device; none if that does not fit.
    fn complete(&self, mut values: Vec<i64>, mode: Mode) -> Option<Vec<i64>> {
        let tasks = mode.resident;
        let (f, s, v) = (self.space.facts, self.space.structure, &self.space.vars);
        let units = self.get(&values, v.units);
        let block = |values: &[i64], a: AxisId| self.get(values, v.block[a.index()]);
        for (i, place) in s.places.iter().enumerate() {
            let (Some(inner), Some(w)) = (place.shared(), v.swizzle[i]) else { continue };
            let bytes = f.kernel.tiles[TileId::new(i)].dtype.bytes(1) as i64;
            let row = block(&values, inner) * bytes;
            values[w.idx()] = [128, 64, 32].into_iter().find(|x| row % x == 0)?;
        }
        for (i, c) in s.contractions.iter().enumerate() {
            let cut = if s.cut == Some(c.n) { units } else { 1 };
            let n = block(&values, c.n);
            if n % cut != 0 {
                return None;
            }
            let per_unit = n / cut;
            let panel = match (s.places[c.b.index()].shared() == Some(c.n), v.swizzle[c.b.index()]) {
                (true, Some(w)) if self.space.family.asynchronous() => values[w.idx()] / c.operand.bytes(1) as i64,
                _ => 8,
            };
            values[v.atom[i].idx()] = self.columns().find(|n| per_unit % n == 0 && n % panel == 0)?;
        }
        let warpgroups = ((units * self.space.family.threads()) as u64).div_ceil(128) + u64::from(s.producer);
        let share = launch_registers(self.gpu.registers, self.gpu.thread_registers, 128 * warpgroups, tasks as u64);
        match v.regs[..] {
            [p, c] => (values[p.idx()], values[c.idx()]) = budgets(self.gpu, units, tasks),
            // So many tasks fit only if the assembler keeps each within its share.
            [c] => values[c.idx()] = if tasks > 1 { share as i64 } else { 0 },
            _ => unreachable!("consumers have a budget, and a producer beside them"),
        }
        if self.space.widest(&values) > share {
            return None;
        }
        let elementwise = f.ops.iter().any(|o| {
            o.stream.is_some() && !o.op.outs().is_empty() && {
                matches!(o.op, einfall_ir::tile::Op::Reduce { .. } | einfall_ir::tile::Op::Map { .. })
            }
        });
        if let Some(p) = v.ping_pong {
            values[p.idx()] = i64::from(elementwise && s.producer);
        }
        if let Some(l) = v.longest {
            values[l.idx()] = i64::from(!mode.split);
        }
        if let Some(g) = v.group {
            values[g.idx()] = 1;
        }
        if let Some(p) = v.persistent {
            values[p.idx()] = i64::from(mode.persistent);
        }
        if let Some(x) = v.split {
            values[x.parts.idx()] = if mode.split { PARTS[PARTS.len() - 1] } else { 1 };
            values[x.resident.idx()] = if mode.split { mode.resident } else { 1 };
            values[x.last.idx()] = i64::from(mode.split);
        }
        for (i, l) in s.stores.iter().enumerate() {
            if let Some(x) = v.staged[i] {
                values[x.idx()] = 1;
            }
            if let Some(x) = v.reuses[i] {
                let like = l.reuses.zip(l.staged).is_some_and(|(t, [_, y])| {
                    let own = s.sized_of(f.tile_axes(t));
                    let wide = v.swizzle[t.index()].is_some_and(|w| values[w.idx()] == 128);
                    wide && block(&values, own[1]) == block(&values, y)
                });
                // In a work loop memory of its own lets the result leave while the next block is loaded.
                values[x.idx()] = i64::from(like && !mode.persistent);
            }
        }
        let room = (self.gpu.shared_per_multiprocessor as i64 / tasks - TASK_SHARED_BYTES as i64)
            .min(self.gpu.shared_per_task as i64);
        let fits = |values: &[i64]| self.space.shared.eval(values).is_some_and(|b| b <= i128::from(room));
        // Direct stores where staging leaves too little for the ring buffers.
        for staged in [true, false].into_iter().filter(|staged| !(*staged && mode.split)) {
            if !staged {
                for x in v.staged.iter().chain(&v.reuses).flatten() {
                    values[x.idx()] = 0;
                }
            }
            let least = match (s.producer, s.schedule) {
                (false, Schedule::Prefetched(n)) => n as i64 + 1,
                (false, Schedule::Plain) if !self.space.family.asynchronous() => 1,
                (_, Schedule::Plain | Schedule::Overlapped | Schedule::Prefetched(_)) => 2,
            };
            for stages in (least..=STAGES as i64).rev().chain(if s.producer { Some(1) } else { None }) {
                // Where one more copy of every tile is too much, one more of the first still hides its latency.
                let mut several = false;
                for less in [0, 1] {
                    let mut first: Option<Vec<usize>> = None;
                    for (i, x) in v.stages.iter().enumerate() {
                        if let Some(x) = x {
                            let written = matches!(s.places[i], Place::Written(_));
                            // Tiles that one operation reads share a ring.
                            let t = TileId::new(i);
                            let readers: Vec<usize> =
                                (0..f.ops.len()).filter(|o| f.ops[*o].reads.contains(&t)).collect();
                            let apart = first.get_or_insert_with(|| readers.clone()) != &readers;
                            let later = if apart && stages - less >= least { less } else { 0 };
                            values[x.idx()] = if written { stages.min(2) } else { stages - later };
                            several |= apart;
                        }
                    }
                    if fits(&values) {
                        return self.space.model.check(&values).is_ok().then_some(values);
                    }
                    if !several {
                        break;
                    }
                }
                if v.stages.iter().all(Option::is_none) {
                    break;
                }
            }
        }
        None
    }
}

/// The best `k` mappings of a kernel, any two of which differ in structure or at least two leading numbers.
pub fn search(
    facts: &Facts<'_>,
    all: &[Structure],
    sheet: &DataSheet,
    (family, gpu): (Family, &Gpu),
    k: usize,
) -> Vec<Found> {
    let spaces: Vec<Space<'_, '_>> = all.iter().map(|s| Space::new(facts, s, family, gpu)).collect();
    let works: Vec<Work> = all.iter().map(|s| Work::of(facts, s)).collect();
    // What is likely best comes first, so that its cost cuts off the rest.
    let mut turn: Vec<usize> = (0..all.len()).collect();
    turn.sort_by_key(|i| (!all[*i].producer, all[*i].schedule != Schedule::Overlapped, *i));
    // Candidates kept for diversity: the cheapest of each structure and then of all, far more than asked for.
    let wanted = if k == 1 { 1 } else { 64 * k };
    let mut found: Vec<(f64, usize, Vec<i64>)> = Vec::new();
    let mut limit = f64::INFINITY;
    for at in turn {
        let space = &spaces[at];
        let completer = Completer { space, gpu };
        leading(space, &mut |leading| {
            let price = |values: &[i64]| cost(space, &works[at], sheet, gpu, values).seconds;
            // What is left out costs more than what is kept, so that the first is the first however many are kept.
            if bound(space, &works[at], sheet, gpu, &completer.ideal(leading)) > limit {
                return;
            }
            for mode in modes(space, blocks(space, &works[at], leading), gpu.multiprocessors as f64) {
                let Some(mut values) = completer.complete(leading.to_vec(), mode) else { continue };
                let mut seconds = price(&values);
                refine(space, &price, &mut values, &mut seconds);
                if seconds <= limit {
                    found.push((seconds, at, values));
                }
            }
            if found.len() >= 2 * wanted {
                keep(&mut found, wanted);
                limit = found.last().map_or(limit, |f| f.0);
            }
        });
    }
    keep(&mut found, usize::MAX);
    let mut out: Vec<Found> = Vec::new();
    for (_, at, values) in found {
        if out.len() >= k {
            break;
        }
        let space = &spaces[at];
        let apart = |o: &Found| o.structure != at || distance(space, &o.values, &values) >= 2;
        if out.iter().all(apart) {
            let cost = cost(space, &works[at], sheet, gpu, &values);
            let mapping = write(space, &values);
            out.push(Found { structure: at, values, cost, mapping });
        }
    }
    out
}

/// Blocks of the launch by leading values.
fn blocks(space: &Space<'_, '_>, work: &Work, leading: &[i64]) -> f64 {
    let block = |a: AxisId| space.vars.block[a.index()].map_or(1, |b| leading[b.idx()].max(1)) as f64;
    space.orders[0].iter().map(|a| (work.extents[a.index()] / block(*a)).ceil()).product()
}

/// Seeks the order of the blocks, whether long ones go first and whether units take turns: traffic depends on the first
/// two, and how evenly the last blocks end.
fn refine(space: &Space<'_, '_>, price: &dyn Fn(&[i64]) -> f64, values: &mut [i64], seconds: &mut f64) {
    let v = &space.vars;
    let mut other = values.to_vec();
    let mut take = |other: &[i64], values: &mut [i64]| {
        let s = price(other);
        if s < *seconds {
            *seconds = s;
            values.copy_from_slice(other);
        }
    };
    let split = v.split.is_some_and(|x| values[x.parts.idx()] > 1);
    for i in 0..space.worth {
        for g in [1, GROUP] {
            if let Some(order) = v.order {
                other[order.idx()] = i as i64;
            }
            match v.group {
                _ if g > 1 && split => continue,
                Some(group) => other[group.idx()] = g,
                None if g > 1 => continue,
                None => {}
            }
            take(&other, values);
        }
    }
    // Fewer copies under way than fit, where device memory has enough to do.
    for most in [2, 3] {
        other.copy_from_slice(values);
        for x in v.stages.iter().flatten() {
            other[x.idx()] = other[x.idx()].min(most);
        }
        if other != values && space.model.check(&other).is_ok() {
            take(&other, values);
        }
    }
    if let Some(p) = v.ping_pong
        && values[p.idx()] == 1
    {
        other.copy_from_slice(values);
        other[p.idx()] = 0;
        take(&other, values);
    }
}

/// The cheapest `n`, in order.
fn keep(found: &mut Vec<(f64, usize, Vec<i64>)>, n: usize) {
    found.sort_by(|x, y| x.0.total_cmp(&y.0).then_with(|| (x.1, &x.2).cmp(&(y.1, &y.2))));
    found.truncate(n);
}

fn leading_vars(space: &Space<'_, '_>) -> Vec<VarId> {
    let v = &space.vars;
    let all = v.rows.iter().chain(v.block.iter().chain(&v.cluster).flatten()).copied();
    let all = all.chain(v.units).chain(v.order).chain(v.group);
    all.chain(v.persistent).chain(v.split.map(|s| s.parts)).collect()
}

fn distance(space: &Space<'_, '_>, x: &[i64], y: &[i64]) -> usize {
    // Another way to share the device is another mapping, be it in the same blocks.
    let shares = space.vars.persistent.into_iter().chain(space.vars.split.map(|s| s.parts));
    leading_vars(space).into_iter().chain(shares).filter(|v| x[v.idx()] != y[v.idx()]).count()
}

/// Calls `visit` on every combination of leading values worth trying; the other variables, and the order, are 0.
fn leading(space: &Space<'_, '_>, visit: &mut dyn FnMut(&[i64])) {
    let v = &space.vars;
    let domain = |x: VarId| values_of(&space.model.vars()[x.idx()].domain);
    let mut lists: Vec<(VarId, Vec<i64>)> = v.units.iter().chain(&v.rows).map(|u| (*u, domain(*u))).collect();
    for (i, b) in v.block.iter().enumerate() {
        if let Some(b) = b {
            lists.push((*b, tried(space, AxisId::new(i))));
        }
    }
    lists.extend(v.cluster.iter().flatten().map(|x| (*x, domain(*x))));
    let mut values = vec![0; space.model.vars().len()];
    descend(space, &lists, &mut values, visit);
}

fn descend(space: &Space<'_, '_>, lists: &[(VarId, Vec<i64>)], values: &mut [i64], visit: &mut dyn FnMut(&[i64])) {
    let Some(((var, list), rest)) = lists.split_first() else {
        visit(values);
        return;
    };
    for value in list {
        values[var.idx()] = *value;
        if plausible(space, values, *var) {
            descend(space, rest, values, visit);
        }
    }
    values[var.idx()] = 0;
}

/// Cheap tests as soon as their variables have values: one cluster axis, whole instructions per unit, accumulators that
/// can fit. 0 stands for no value yet.
fn plausible(space: &Space<'_, '_>, values: &[i64], last: VarId) -> bool {
    let (s, v) = (space.structure, &space.vars);
    if v.cluster.contains(&Some(last)) {
        return v.cluster.iter().flatten().map(|c| values[c.idx()].max(1)).product::<i64>() <= 2;
    }
    let units = v.units.map_or(1, |u| values[u.idx()]);
    let at = |a: AxisId| v.block[a.index()].map_or(1, |b| values[b.idx()]);
    let part = |a: AxisId| if s.cut == Some(a) { units } else { 1 };
    let family = space.family;
    let rows = v.rows.map_or(family.rows[0], |r| values[r.idx()]).max(1);
    s.contractions.iter().all(|c| {
        let (m, n) = (at(c.m), at(c.n));
        let whole = m % (rows * part(c.m)) == 0 && n % (8 * part(c.n)) == 0;
        // Few instructions' rows per unit, and no more accumulators than a thread has registers.
        let most = 216 * family.threads();
        whole && m / part(c.m) <= family.unit_rows && (m == 0 || n == 0 || m / part(c.m) * n / part(c.n) <= most)
    })
}

#[cfg(test)]
mod tests {
    use einfall_ir::analysis::resources::launch_registers;
    use einfall_ir::target::DataSheet;

    use super::super::facts::Facts;
    use super::super::structure::structures;
    use super::*;

    /// Threads of a producer's and the consumers' warpgroups.
    fn threads(units: u64) -> u64 {
        128 * (units + 1)
    }

    #[test]
    fn budgets_are_what_a_task_starts_with() {
        let gpu = DataSheet::h100().gpu.expect("a GPU");
        for units in 1..=4 {
            for tasks in 1..=2 {
                let n = threads(units);
                let starts = launch_registers(gpu.registers, gpu.thread_registers, n, tasks) * n;
                let (producer, consumer) = budgets(&gpu, units as i64, tasks as i64);
                let set = |consumer: i64| 128 * (producer + units as i64 * consumer) as u64;
                assert!(set(consumer) <= starts, "{units} units, {tasks} tasks: {producer}, {consumer}");
                // Nothing is left that would give every consumer another eight.
                let more = consumer + 8;
                assert!(more > 256 || set(more) > starts, "{units} units, {tasks} tasks: {producer}, {consumer}");
            }
        }
        // Two tasks of three warpgroups start with 80 a thread: 32 + 2·104 fit, 32 + 2·112 would wait for ever.
        assert_eq!(budgets(&gpu, 2, 2), (32, 104));
    }

    #[test]
    fn the_constraint_on_registers_is_that_of_the_launch() {
        let text = include_str!("../../../tests/plans/gemm.tile");
        let plan = einfall_ir::tile::parse::parse(text).expect("a plan");
        let sizes = [4096, 4096, 4096];
        let facts = Facts::new(&plan, &plan.kernels[0], Some(&sizes)).expect("facts");
        let gpu = DataSheet::h100().gpu.expect("a GPU");
        let family = Family::WGMMA;
        let all = structures(&facts, family).expect("structures");
        let mut judged = 0;
        for s in all.iter().filter(|s| s.producer) {
            let space = Space::new(&facts, s, family, &gpu);
            let rule = space.model.constraints().iter().find(|c| c.name == "registers of the task").expect("the rule");
            let units = space.vars.units.expect("units");
            let [p, c] = space.vars.regs[..] else { panic!("a producer has a budget") };
            let mut values = vec![1; space.model.vars().len()];
            for n in values_of(&space.model.vars()[units.idx()].domain) {
                values[units.idx()] = n;
                let starts = launch_registers(gpu.registers, gpu.thread_registers, threads(n as u64), 1);
                for producer in [24, 32, 40, 56] {
                    for consumer in (24..=256).step_by(8) {
                        (values[p.idx()], values[c.idx()]) = (producer, consumer);
                        let fits = 128 * (producer + n * consumer) as u64 <= starts * threads(n as u64);
                        assert_eq!(rule.pred.eval(&values), fits, "{n} units: {producer}, {consumer}");
                        judged += 1;
                    }
                }
            }
        }
        assert!(judged > 0);
    }
}
