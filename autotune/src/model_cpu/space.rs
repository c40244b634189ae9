//! The integer CSP of a kernel on a processor: what the CPU lowering reads is a block per axis of the grid and of each
//! stream.
//!
//! Variables are named as the mapping's lines are (`block m`), constraints as what they keep: every tile within what
//! offsets count, and a task's tiles within what a thread's scratch may take. Invariant: every assignment that passes
//! the check lowers, for every size; today's rule is among the assignments.

use std::ops::ControlFlow;

use einfall_ir::analysis::runs::{runs, single_axes};
use einfall_ir::analysis::steps;
use einfall_ir::arena::Id;
use einfall_ir::mapping::{AxisMapping, KernelMapping, TileMapping, Work};
use einfall_ir::tile::{Axis, AxisId, AxisKind, Kernel, Op, Plan, Space as Memory, TileId};

use super::cost::Pricer;
use crate::csp::{Domain, Expr, Model, Solver, VarId};

/// Elements of one tile.
const TILE: i64 = 1 << 24;
/// Bytes of a task's tiles, four an element.
const SCRATCH: i64 = 256 << 20;
/// Assignments that are priced.
const MOST: usize = 60_000;
/// Nominal extent of an axis without a size.
const NOMINAL: u64 = 1024;

/// Blocks along rows of contractions: multiples of the register tiles' rows (14, 6), and few rows.
const ROWS: [i64; 16] = [1, 4, 6, 12, 14, 28, 42, 56, 70, 84, 98, 126, 140, 168, 182, 252];
/// Blocks along rows that instructions for tiles multiply.
const TILED: [i64; 6] = [16, 32, 64, 128, 256, 512];
/// Blocks along columns of contractions.
const COLUMNS: [i64; 8] = [16, 32, 64, 96, 128, 256, 512, 1024];
/// Blocks along streams and contiguous axes.
const LONG: [i64; 8] = [16, 64, 128, 256, 384, 1024, 2048, 4096];
/// Blocks along other axes.
const SHORT: [i64; 5] = [1, 2, 4, 16, 64];

/// A kernel's CSP.
pub struct Space<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// The kernel.
    pub kernel: &'a Kernel,
    /// The value of every rank, nominal where it is not known.
    pub ranks: Vec<u64>,
    /// The extent of every axis.
    pub extents: Vec<u64>,
    /// The variable of every axis that is cut.
    pub block: Vec<Option<VarId>>,
    /// The recurrence whose steps a given mapping launches one by one, and the blocks that it cuts inner axes in for that.
    pub launched: Option<(AxisId, Vec<(AxisId, u64)>)>,
    /// The CSP.
    pub model: Model,
}

/// The block that a mapping gives an axis; one that it leaves out keeps its own.
fn said(a: &Axis, m: &KernelMapping) -> i64 {
    m.axis(&a.name).map_or(a.block.unwrap_or(1), |l| l.block) as i64
}

impl<'a> Space<'a> {
    /// The CSP of a kernel at sizes (one value per rank of the plan), with the rule's blocks in every domain, and those
    /// of a mapping that is `given` wherever a block is free. With `tiles` the processor multiplies tiles of bf16.
    pub fn new(
        plan: &'a Plan,
        kernel: &'a Kernel,
        sizes: Option<&[u64]>,
        tiles: bool,
        rule: &KernelMapping,
        given: Option<&KernelMapping>,
    ) -> Space<'a> {
        let ranks: Vec<Option<u64>> = plan
            .ranks
            .iter()
            .enumerate()
            .map(|(i, (_, r))| r.fixed.or_else(|| sizes.and_then(|s| s.get(i).copied())))
            .collect();
        let known: Vec<u64> = ranks.iter().map(|r| r.unwrap_or(NOMINAL)).collect();
        let extents = kernel.axes.iter().map(|(_, a)| a.extent.eval(&known).unwrap_or(NOMINAL).max(1)).collect();
        let (model, block) = (Model::new(), Vec::new());
        let launched = given.and_then(|m| steps_of(kernel, m));
        let mut space = Space { plan, kernel, ranks: known, extents, block, launched, model };
        let (rows, columns, long) = roles(plan, kernel);
        let tiles = tiles && all_tiled(plan, kernel);
        for (id, a) in kernel.axes.iter() {
            let own = rule.axis(&a.name).map_or(1, |m| m.block as i64);
            let list: Vec<i64> = match (a.kind, a.block) {
                (AxisKind::Inner, _) => {
                    space.block.push(None);
                    continue;
                }
                (_, Some(_)) => vec![own],
                _ if sequential(kernel, id) => vec![own],
                _ if rows.contains(&id) && tiles => TILED.to_vec(),
                _ if rows.contains(&id) => ROWS.to_vec(),
                _ if columns.contains(&id) => COLUMNS.to_vec(),
                _ if long.contains(&id) || a.kind == AxisKind::Stream => LONG.to_vec(),
                _ => SHORT.to_vec(),
            };
            let extent = space.extents[id.index()] as i64;
            // Blocks beyond the extent are all alike: the first of them stands for the rest.
            let enough = list.iter().copied().find(|v| *v >= extent).unwrap_or(i64::MAX);
            let free = list.len() > 1;
            let more = given.map(|g| said(a, g)).filter(|b| free && *b > 0);
            let mut list: Vec<i64> = list.into_iter().filter(|v| *v <= enough).chain([own]).chain(more).collect();
            list.sort_unstable();
            list.dedup();
            space.block.push(Some(space.model.var(format!("block {}", a.name), Domain::Values(list))));
        }
        space.memory();
        space
    }

    fn memory(&mut self) {
        let mut all = Vec::new();
        for (id, t) in self.kernel.tiles.iter() {
            let single = single_axes(self.plan, self.kernel, id);
            let size: Vec<Expr> = t.axes.iter().filter(|a| !single.contains(a)).map(|a| self.block(*a)).collect();
            let size = Expr::Product(size);
            self.model.constrain(format!("elements of {}", t.name), size.clone().at_most(TILE));
            all.push(size * 4);
        }
        if !all.is_empty() {
            self.model.constrain("memory of the task", Expr::Sum(all).at_most(SCRATCH));
        }
    }

    fn block(&self, a: AxisId) -> Expr {
        match self.block[a.index()] {
            Some(v) => Expr::Var(v),
            None => Expr::Const(self.extents[a.index()].min(1 << 20) as i64),
        }
    }

    /// The block of every axis in an assignment.
    pub fn blocks(&self, values: &[i64]) -> Vec<f64> {
        let whole = |i: usize| self.cut(AxisId::new(i)).map_or(self.extents[i], |b| b.min(self.extents[i])) as f64;
        let of = |(i, v): (usize, &Option<VarId>)| v.map_or_else(|| whole(i), |v| values[v.idx()] as f64);
        self.block.iter().enumerate().map(of).collect()
    }

    /// The block of an inner axis that launched steps cut.
    fn cut(&self, axis: AxisId) -> Option<u64> {
        self.launched.iter().flat_map(|l| &l.1).find(|c| c.0 == axis).map(|c| c.1)
    }

    /// Whether blocks along an axis are tasks of their own.
    pub fn parallel(&self, axis: AxisId) -> bool {
        self.kernel.axes[axis].kind == AxisKind::Grid || self.cut(axis).is_some()
    }

    /// The mapping that an assignment stands for.
    pub fn write(&self, values: &[i64]) -> KernelMapping {
        let axis = |(i, v): (usize, &Option<VarId>)| {
            v.map(|v| AxisMapping::new(&self.kernel.axes[AxisId::new(i)].name, values[v.idx()] as u64))
        };
        let axes = self.block.iter().enumerate().filter_map(axis).collect();
        KernelMapping { kernel: self.kernel.name.clone(), axes, ..KernelMapping::default() }
    }

    /// The assignment that a mapping stands for.
    pub fn read(&self, m: &KernelMapping) -> Vec<i64> {
        let mut values = vec![1; self.model.vars().len()];
        for ((_, a), v) in self.kernel.axes.iter().zip(&self.block) {
            if let Some(v) = v {
                values[v.idx()] = said(a, m);
            }
        }
        values
    }

    /// A line of a mapping that means nothing on a processor, and what it is. What is packed once and steps that are
    /// launches are no part of the CSP; the former is priced as if every task packed it.
    pub fn foreign(&self, m: &KernelMapping) -> Option<(String, String)> {
        let only = "a processor's kernel has blocks of axes of the launch and of streams, packed tiles and launched steps: leave \
                    this out";
        let mut found: Option<String> = None;
        let mut see = |there: bool, what: String| {
            if there && found.is_none() {
                found = Some(what);
            }
        };
        // Inner axes have blocks where steps are launches of their own.
        let launches = m.axes.iter().any(|a| a.launches);
        for a in &m.axes {
            let plain = AxisMapping { block: a.block, launches: a.launches, ..AxisMapping::new(&a.axis, 1) };
            see(*a != plain, format!("axis {}", a.axis));
            let inner = self.kernel.axes.iter().find(|(_, x)| x.name == a.axis && x.kind == AxisKind::Inner);
            see(inner.is_some() && !launches, format!("block {}", a.axis));
        }
        if let Some((axis, blocks)) = steps_of(self.kernel, m) {
            let cut: Vec<AxisId> = blocks.iter().map(|c| c.0).collect();
            if let Err(why) = steps::check(self.kernel, axis, &cut) {
                return Some((format!("launches of {}", self.kernel.axes[axis].name), why));
            }
        }
        see(m.work != Work::default(), "work".into());
        let packed = |t: &TileMapping| *t == TileMapping::new(&t.tile, Memory::Packed);
        see(!m.tiles.iter().all(packed), "tiles".into());
        see(!m.ops.is_empty(), "operations".into());
        see(!m.roles.is_empty(), "roles".into());
        see(m.split.is_some(), "split".into());
        see(m.early || m.dependent, "launch".into());
        found.map(|what| (what, only.to_owned()))
    }

    /// What an assignment gives to the variables of what it breaks, and what a block may be.
    pub fn describe(&self, values: &[i64], name: &str) -> String {
        if let Some(v) = self.model.find(name) {
            let allowed = match &self.model.vars()[v.idx()].domain {
                Domain::Values(list) => list.iter().map(i64::to_string).collect::<Vec<_>>().join(", "),
                Domain::Range { .. } | Domain::Divisors(_) => unreachable!("blocks are lists of values"),
            };
            return format!("{} is not among {allowed}", values[v.idx()]);
        }
        let mut vars: Vec<VarId> = Vec::new();
        if let Some(c) = self.model.constraints().iter().find(|c| c.name == name) {
            c.pred.for_each_var(&mut |v| {
                if !vars.contains(&v) {
                    vars.push(v);
                }
            });
        }
        let list: Vec<String> = vars.iter().map(|v| format!("{} = {}", self.model.name(*v), values[v.idx()])).collect();
        format!("does not hold for {}", list.join(", "))
    }

    /// Every assignment, up to [`MOST`].
    pub fn all(&self) -> Vec<Vec<i64>> {
        let mut found: Vec<Vec<i64>> = Vec::new();
        let mut visit = |values: &[i64]| {
            found.push(values.to_vec());
            if found.len() >= MOST { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        // Of a system that cannot be enumerated nothing is drawn.
        let _ = Solver::new(&self.model).for_each(&[], &mut visit);
        found
    }

    /// The cheapest `k` assignments, any two of which differ in two blocks (or in one, where there is only one).
    pub fn best(&self, pricer: &Pricer<'_, '_>, k: usize) -> Vec<Vec<i64>> {
        let priced = |v: Vec<i64>| (pricer.cost(&v).seconds, v);
        let mut found: Vec<(f64, Vec<i64>)> = self.all().into_iter().map(priced).collect();
        found.sort_by(|x, y| x.0.total_cmp(&y.0).then_with(|| x.1.cmp(&y.1)));
        let free = self.model.vars().iter().filter(|v| !matches!(&v.domain, Domain::Values(l) if l.len() == 1)).count();
        let apart = free.min(2);
        let mut out: Vec<Vec<i64>> = Vec::new();
        for (_, values) in found {
            let differs = |o: &Vec<i64>| o.iter().zip(&values).filter(|(a, b)| a != b).count() >= apart;
            if out.len() < k && out.iter().all(differs) {
                out.push(values);
            }
        }
        out
    }
}

/// The axis of which a mapping launches the steps one by one, and the inner axes that it cuts, with their blocks.
fn steps_of(kernel: &Kernel, m: &KernelMapping) -> Option<(AxisId, Vec<(AxisId, u64)>)> {
    let named = |l: &AxisMapping| kernel.axes.iter().find(|(_, a)| a.name == l.axis).map(|(id, _)| (id, l.block));
    let (axis, _) = m.axes.iter().filter(|l| l.launches).find_map(named)?;
    let inner = |(a, _): &(AxisId, u64)| kernel.axes[*a].kind == AxisKind::Inner;
    Some((axis, m.axes.iter().filter_map(named).filter(inner).filter(|c| c.1 > 0).collect()))
}

/// Whether a stream walks the axis one by one.
pub(super) fn sequential(kernel: &Kernel, axis: AxisId) -> bool {
    fn visit(nodes: &[einfall_ir::tile::Node], axis: AxisId) -> bool {
        nodes.iter().any(|n| match n {
            einfall_ir::tile::Node::Stream(s) => (s.axis == axis && s.sequential) || visit(&s.body, axis),
            einfall_ir::tile::Node::Op(_) => false,
        })
    }
    visit(&kernel.body, axis)
}

/// Whether instructions for tiles multiply in all contractions of a kernel that has some.
pub(super) fn all_tiled(plan: &Plan, kernel: &Kernel) -> bool {
    let (mut any, mut all) = (false, true);
    kernel.for_each_op(&mut |op, _| {
        if let Op::Contract { out, a, b, .. } = op {
            any = true;
            all &= super::narrow(plan, kernel, *out, *a, *b);
        }
    });
    any && all
}

/// The axes that a contraction's result has of one operand alone, as its rows and its columns: the last of the left one
/// and of the right one; or rows that share an operand by runs, and that operand's columns.
pub(super) fn rows_and_columns(plan: &Plan, kernel: &Kernel, op: &Op) -> (Option<AxisId>, Option<AxisId>) {
    let Op::Contract { out, a, b, .. } = op else { return (None, None) };
    let axes = |t: &TileId| &kernel.tiles[*t].axes;
    let last = |t: &TileId, other: &TileId| {
        axes(out).iter().rev().copied().find(|x| axes(t).contains(x) && !axes(other).contains(x))
    };
    match runs(plan, kernel, op) {
        Some(r) if r.first => (Some(r.axis), last(a, b)),
        Some(r) => (Some(r.axis), last(b, a)),
        None => (last(a, b), last(b, a)),
    }
}

/// Axes that contractions see as rows and as columns, and the contiguous ones of what is stored.
pub(super) fn roles(plan: &Plan, kernel: &Kernel) -> (Vec<AxisId>, Vec<AxisId>, Vec<AxisId>) {
    let (mut rows, mut columns, mut long) = (Vec::new(), Vec::new(), Vec::new());
    kernel.for_each_op(&mut |op, _| match op {
        Op::Contract { .. } => {
            let (row, column) = rows_and_columns(plan, kernel, op);
            rows.extend(row);
            columns.extend(column);
        }
        Op::Store { axes, .. } => long.extend(axes.last()),
        Op::Load { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Scan { .. } => {}
    });
    (rows, columns, long)
}
