//! The work loop: which blocks a task computes, and in which order.
//!
//! Blocks of the grid axes are taken in the mapping's order, the last axis fastest. Tasks of a cluster walk neighbouring
//! blocks together, so the unit of work is a cluster. With `group G` the two fastest axes are walked in sections: G
//! blocks of the second-fastest axis for each block of the fastest, so that a section's operands stay in the L2 cache
//! (Triton's grouped order; FlashAttention-3's sections of heads); fewer than G where what they share would not.
//! `longest_first` turns axes that a stream's filter cuts around. A `persistent` kernel has as many tasks as the device holds at once, one per multiprocessor of the
//! data sheet: that number is a constant of the grid's expression, which stays an expression over extents. A task then
//! takes every `tasks`-th unit of work. With `longest_first` it takes folded pairs, where there are enough: the i-th
//! block from the long end of the axis that the filter cuts around, then the i-th from the short end. Pairs are equally
//! long where length is linear in the block, so tasks end together whatever order sections ask for. (A round-robin over
//! blocks of falling length drifts against the sections: causal attention of 64 heads by 32 blocks on 132
//! multiprocessors waits for a task with 1.27 times the mean work, and by turning every other round for one with 1.6.)
//! Invariant: every block is computed by exactly one task.

use std::collections::BTreeMap;

use einfall_ir::arena::{Arena, Id};
use einfall_ir::kernel::{Expr, Stmt, Var, VarId};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, AxisId, AxisKind, BufferId, ExprId, Op};

use super::apply_mapping::Facts;
use super::exprs::{add, ceil_div, max, min, mul, size, sub, var};
use super::{Step, refuse};

/// What a section's blocks read in common, in bytes: that much of an H100's 50 MB of level-2 cache stays beside what passes
/// through it (as FlashAttention-3 has it).
const SECTION_BYTES: i64 = 32 << 20;

/// Variables of one role's work loop.
#[derive(Clone, Debug)]
pub(super) struct RoleWork {
    /// Block number of each grid axis.
    pub blocks: Vec<Option<VarId>>,
    /// The unit of work.
    pub tile: VarId,
    /// How many the task has computed before: its counter.
    pub round: VarId,
    /// How many the task computes.
    pub rounds: VarId,
    /// How many there are; pairs, where they are folded.
    units: VarId,
    /// Clusters of a section, where the sizes decide.
    section: VarId,
    /// Units of work of one pair: 2 where they are folded, else 1; and which of them it is.
    fold: VarId,
    half: VarId,
    /// How many are computed at once.
    step: VarId,
}

/// How blocks are found: none if they are the grid's coordinates.
#[derive(Clone, Debug)]
pub(super) struct WorkLoop {
    /// Whether tasks loop.
    pub persistent: bool,
    /// Tasks that the device holds at once.
    pub slots: u64,
    /// Per role.
    pub roles: Vec<RoleWork>,
}

fn div(a: Expr, b: Expr) -> Expr {
    a.bin(BinaryOp::Div, b)
}

fn boxed(n: i64) -> Box<Expr> {
    Box::new(Expr::Int(n))
}

fn rem(a: Expr, b: Expr) -> Expr {
    if b == Expr::Int(1) { Expr::Int(0) } else { a.bin(BinaryOp::Mod, b) }
}

/// Decides how tasks find their blocks.
///
/// # Errors
/// A group without a second axis, or that clusters do not divide.
pub(super) fn run(mut f: Facts<'_>, multiprocessors: u64) -> Step<Facts<'_>> {
    let axes = f.grid_axes();
    let group = f.work.group;
    if group > 1 {
        let Some(second) = axes.len().checked_sub(2) else {
            return refuse("work loop", "a group needs two grid axes", "leave out `group`");
        };
        let cluster = f.axis(axes[second]).cluster;
        if !group.is_multiple_of(cluster) {
            let message =
                format!("a group of {group} blocks along {} cuts clusters of {cluster}", { f.axis_name(axes[second]) });
            return refuse("work loop", message, "make the group a multiple of the cluster");
        }
    }
    let persistent = f.work.persistent;
    if axes.is_empty() || !(persistent || group > 1) {
        return Ok(f);
    }
    let mut vars = Arena::new();
    let mut roles = Vec::new();
    for r in &f.roles {
        let mut new = |name: &str| vars.push(Var { name: format!("{name}_{}", r.role) });
        let (units, step) = (new("units"), new("step"));
        let (fold, half, section) = (new("fold"), new("half"), new("section"));
        let (tile, round, rounds) = (new("tile"), new("round"), new("rounds"));
        let mut blocks = vec![None; f.axes.len()];
        for a in &axes {
            blocks[a.index()] = Some(new(&format!("block_{}", f.kernel.axes[*a].name)));
        }
        roles.push(RoleWork { blocks, tile, round, rounds, units, section, fold, half, step });
    }
    f.vars = vars;
    let slots = (multiprocessors / f.cluster_tasks()).max(1);
    f.work_loop = Some(WorkLoop { persistent, slots, roles });
    Ok(f)
}

impl Facts<'_> {
    /// Grid axes, slowest first.
    pub fn grid_axes(&self) -> Vec<AxisId> {
        let mut grid: Vec<(usize, AxisId)> =
            self.kernel.axes.ids().filter_map(|a| self.axis(a).grid.map(|g| (g, a))).collect();
        grid.sort();
        grid.into_iter().map(|(_, a)| a).collect()
    }

    /// Tasks of a cluster.
    pub fn cluster_tasks(&self) -> u64 {
        self.axes.iter().map(|a| a.cluster).product()
    }

    /// The task's position in its cluster along an axis: ranks count the last grid axis fastest.
    pub fn cluster_position(&self, a: AxisId) -> Expr {
        let axes = self.grid_axes();
        let at = axes.iter().position(|x| *x == a);
        let inner: u64 = axes.iter().skip(at.map_or(0, |i| i + 1)).map(|x| self.axis(*x).cluster).product();
        let outer: u64 = axes.iter().take(at.unwrap_or(0)).map(|x| self.axis(*x).cluster).product();
        let own = self.axis(a).cluster;
        if own == 1 {
            return Expr::Int(0);
        }
        let rank = div(Expr::ClusterRank, Expr::Int(inner as i64));
        if outer == 1 { rank } else { rem(rank, Expr::Int(own as i64)) }
    }

    /// How far ranks of neighbours along an axis are apart.
    fn rank_stride(&self, a: AxisId) -> u64 {
        let axes = self.grid_axes();
        let at = axes.iter().position(|x| *x == a);
        axes.iter().skip(at.map_or(0, |i| i + 1)).map(|x| self.axis(*x).cluster).product()
    }

    /// The rank of the first task of the cluster in the task's line along an axis, and the ranks it can be.
    pub fn line(&self, a: AxisId) -> (Expr, Vec<u64>) {
        let (stride, own) = (self.rank_stride(a), self.axis(a).cluster);
        let firsts: Vec<u64> = (0..self.cluster_tasks()).filter(|r| r / stride % own == 0).collect();
        let first = match firsts.as_slice() {
            [only] => Expr::Int(*only as i64),
            _ => sub(Expr::ClusterRank, mul(self.cluster_position(a), Expr::Int(stride as i64))),
        };
        (first, firsts)
    }

    /// Ranks of the tasks of the cluster in the task's line along an axis.
    pub fn line_ranks(&self, a: AxisId, first: u64) -> impl Iterator<Item = u64> {
        let stride = self.rank_stride(a);
        (0..self.axis(a).cluster).map(move |j| first + j * stride)
    }

    /// Ranks of all tasks that fill the task's memory along `axes`, its own among them.
    pub fn peers(&self, axes: &[AxisId]) -> Vec<Expr> {
        let Some((first_axis, rest)) = axes.split_first() else { return vec![Expr::ClusterRank] };
        let along = |a: AxisId, place: Expr| add(self.line(a).0, mul(place, Expr::Int(self.rank_stride(a) as i64)));
        let mut ranks: Vec<Expr> =
            (0..self.axis(*first_axis).cluster).map(|j| along(*first_axis, Expr::Int(j as i64))).collect();
        for a in rest {
            // The task itself is among the first axis's.
            let n = self.axis(*a).cluster;
            let others = (1..n).map(|j| add(self.cluster_position(*a), Expr::Int(j as i64)));
            ranks.extend(others.map(|x| along(*a, rem(x, Expr::Int(n as i64)))));
        }
        ranks
    }

    /// Clusters along a grid axis.
    fn clusters(&self, a: AxisId) -> Expr {
        let x = self.axis(a);
        ceil_div(self.extent(a), x.block * x.cluster)
    }

    /// Units of work.
    fn work_units(&self) -> Expr {
        self.grid_axes().into_iter().fold(Expr::Int(1), |n, a| mul(n, self.clusters(a)))
    }

    /// The grid and the cluster.
    pub fn launch(&self) -> (Vec<Expr>, Vec<u64>) {
        let tasks = self.cluster_tasks();
        match &self.work_loop {
            None => {
                let axes = self.grid_axes();
                let cluster = axes.iter().map(|a| self.axis(*a).cluster).collect();
                (axes.iter().map(|a| self.blocks(*a)).collect(), if tasks > 1 { cluster } else { Vec::new() })
            }
            Some(w) => {
                let grid = mul(self.units_at_once(w), Expr::Int(tasks as i64));
                (vec![grid], if tasks > 1 { vec![tasks] } else { Vec::new() })
            }
        }
    }

    fn units_at_once(&self, w: &WorkLoop) -> Expr {
        let units = self.work_units();
        if w.persistent { min(units, Expr::Int(w.slots as i64)) } else { units }
    }

    /// Before the loop: how many units of work the task has. Without a loop the first one's blocks.
    pub fn work_prologue(&self, role: usize) -> Vec<Stmt> {
        let Some(w) = &self.work_loop else { return Vec::new() };
        let r = &w.roles[role];
        let first = div(Expr::Grid(0), Expr::Int(self.cluster_tasks() as i64));
        let lets = |var, value| Stmt::Let { var, value };
        if !w.persistent {
            let mut out = vec![lets(r.tile, first)];
            out.extend(self.work_blocks(role));
            return out;
        }
        let slots = Expr::Int(w.slots as i64);
        let units = self.work_units();
        let mut out = vec![lets(r.step, min(units.clone(), slots))];
        let (step, fold) = (var(r.step), var(r.fold));
        match self.folded() {
            None => out.push(lets(r.units, units)),
            Some(a) => {
                // An even number of blocks, and pairs for two rounds.
                let even = rem(self.clusters(a), Expr::Int(2)).bin(BinaryOp::Eq, Expr::Int(0));
                let many = mul(step.clone(), Expr::Int(4)).bin(BinaryOp::Le, units.clone());
                let two = Expr::Select(Box::new(even.bin(BinaryOp::And, many)), boxed(2), boxed(1));
                out.push(lets(r.fold, two));
                out.push(lets(r.units, div(units, fold.clone())));
            }
        }
        let (units, whole) = (var(r.units), div(var(r.units), step.clone()));
        let more = first.bin(BinaryOp::Lt, rem(units, step));
        let rounds = Expr::Select(Box::new(more), Box::new(add(whole.clone(), Expr::Int(1))), Box::new(whole));
        out.push(lets(r.rounds, if self.folded().is_some() { mul(rounds, fold) } else { rounds }));
        out
    }

    /// The blocks of the unit of work in the variable `tile`; at the start of a round first that unit.
    pub fn work_step(&self, role: usize) -> Vec<Stmt> {
        let Some(w) = &self.work_loop else { return Vec::new() };
        let r = &w.roles[role];
        let first = div(Expr::Grid(0), Expr::Int(self.cluster_tasks() as i64));
        let mut out = Vec::new();
        let mut turn = var(r.round);
        if self.folded().is_some() {
            out.push(Stmt::Let { var: r.half, value: rem(turn.clone(), var(r.fold)) });
            turn = div(turn, var(r.fold));
        }
        out.push(Stmt::Let { var: r.tile, value: add(mul(turn, var(r.step)), first) });
        out.extend(self.work_blocks(role));
        out
    }

    /// The axis along which long and short blocks are paired.
    fn folded(&self) -> Option<AxisId> {
        let persistent = self.work_loop.as_ref().is_some_and(|w| w.persistent);
        self.grid_axes().into_iter().find(|a| persistent && self.work.longest_first && self.masks(*a))
    }

    /// Clusters along `second` of one section: the mapping's group, or as many as leave what blocks along `fastest` share
    /// in the level-2 cache.
    fn section(&self, second: AxisId, fastest: AxisId) -> Expr {
        let x = self.axis(second);
        let group = Expr::Int((self.work.group / x.cluster) as i64);
        if x.cluster > 1 {
            return group;
        }
        let uses = |e: ExprId, found: &dyn Fn(AxisId) -> bool| {
            let mut any = false;
            self.kernel.walk(e, &mut |_, e| any |= matches!(e, tile::Expr::Coord(a) if found(*a)));
            any
        };
        let walked = |a: AxisId| self.kernel.axes[a].kind != AxisKind::Grid;
        let shared = self.ops.iter().filter_map(|o| match o.op {
            Op::Load { buffer, at, .. } => {
                let any = |a: AxisId| at.iter().any(|e| uses(*e, &|x| x == a));
                (any(second) && !any(fastest)).then_some((*buffer, at))
            }
            Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Store { .. } | Op::Scan { .. } => None,
        });
        let shared: BTreeMap<BufferId, &Vec<ExprId>> = shared.collect();
        let arrays = shared.len().max(1) as i64;
        shared.into_iter().fold(group, |group, (buffer, at)| {
            let b = &self.plan.buffers[buffer];
            let each = SECTION_BYTES / arrays / (b.dtype.bytes(1) as i64).max(1);
            let fit = b.dims.iter().zip(at).fold(Expr::Int(each), |fit, (dim, e)| {
                if uses(*e, &walked) {
                    div(fit, max(size(self, dim), Expr::Int(1)))
                } else if uses(*e, &|a| a == second) && x.block > 1 {
                    div(fit, Expr::Int(x.block as i64))
                } else {
                    fit
                }
            });
            min(group, max(fit, Expr::Int(1)))
        })
    }

    fn work_blocks(&self, role: usize) -> Vec<Stmt> {
        let Some(w) = &self.work_loop else { return Vec::new() };
        let r = &w.roles[role];
        let axes = self.grid_axes();
        let (mut sizes, mut out) = (Vec::new(), Vec::new());
        let mut rest = var(r.tile);
        let mut left: &[AxisId] = &axes;
        let folded = self.folded();
        // Clusters along an axis that the unit of work counts.
        let counted = |a: AxisId| {
            let n = self.clusters(a);
            if folded == Some(a) { div(n, var(r.fold)) } else { n }
        };
        let mut set = |a: AxisId, cluster: Expr| {
            let x = self.axis(a);
            let cluster = if folded == Some(a) {
                let back = sub(sub(self.clusters(a), Expr::Int(1)), cluster.clone());
                let second = var(r.half).bin(BinaryOp::Eq, Expr::Int(1));
                Expr::Select(Box::new(second), Box::new(back), Box::new(cluster))
            } else {
                cluster
            };
            let block = add(mul(cluster, Expr::Int(x.cluster as i64)), self.cluster_position(a));
            let turned = self.turned(a, block);
            out.push(Stmt::Let { var: r.blocks[a.index()].expect("grid axes have a variable"), value: turned });
        };
        if self.work.group > 1
            && let [outer @ .., second, fastest] = left
        {
            let group = match self.section(*second, *fastest) {
                Expr::Int(n) => Expr::Int(n),
                fit => {
                    sizes.push(Stmt::Let { var: r.section, value: fit });
                    var(r.section)
                }
            };
            let (along, across) = (counted(*fastest), counted(*second));
            // A plane of the two axes, cut into sections of `group` of the second one; the last may be smaller.
            let plane = mul(along.clone(), across.clone());
            let within = if outer.is_empty() { rest.clone() } else { rem(rest.clone(), plane.clone()) };
            let section = mul(along, group.clone());
            let start = mul(div(within.clone(), section.clone()), group.clone());
            // At least one: no task is beyond the last section.
            let width = max(min(sub(across, start.clone()), group), Expr::Int(1));
            let place = rem(within, section);
            set(*second, add(start, rem(place.clone(), width.clone())));
            set(*fastest, div(place, width));
            rest = div(rest, plane);
            left = outer;
        }
        for (i, a) in left.iter().enumerate().rev() {
            let n = counted(*a);
            if i == 0 {
                set(*a, rest.clone());
            } else {
                set(*a, rem(rest.clone(), n.clone()));
                rest = div(rest, n);
            }
        }
        sizes.extend(out);
        sizes
    }
}
