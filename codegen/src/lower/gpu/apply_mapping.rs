//! apply-mapping: every axis gets its block, every tile its space, every operation its role and place.
//!
//! Invariant: after this step nothing reads the mapping's lists by name again; what is missing there has its default
//! (operations run in the last role, loads by an engine in the first).

use einfall_ir::arena::Id;
use einfall_ir::cascade::{Rank, RankId, Size};
use einfall_ir::kernel::{Engine, Var, VarId};
use einfall_ir::mapping::{KernelMapping, OpMapping, RoleMapping, TileMapping, Work};
use einfall_ir::tile::{AxisId, AxisKind, ExprId, Kernel, Node, Op, Plan, Space, TileId};
use einfall_ir::{arena::Arena, kernel::Scope};

use super::hold_rows::axes_of;
use super::insert_channels::Channel;
use super::spread::Spread;
use super::work_loop::WorkLoop;
use super::{Step, refuse};
use einfall_ir::analysis::order_free;
use einfall_ir::layout::{Distribution, MemLayout};

/// An axis with its partition.
pub(super) struct AxisFacts {
    /// Coordinates per task or step.
    pub block: u64,
    /// Units of the role that cuts it.
    pub units: u64,
    /// Units of a role that cuts it and the axes it is cut together with.
    pub together: u64,
    /// Units from one part of it to the next.
    pub apart: u64,
    /// Tasks of a cluster along it.
    pub cluster: u64,
    /// Whether blocks never reach past the extent.
    pub exact: bool,
    /// Coordinates of one wide access where no atom says (0: a default).
    pub register: u64,
    /// Whether a stream goes from the last block to the first.
    pub descending: bool,
    /// The grid dimension, for grid axes.
    pub grid: Option<usize>,
}

impl AxisFacts {
    /// Whether it is a dimension of fragments and shared tiles; otherwise its coordinate is uniform over a unit.
    pub fn sized(&self) -> bool {
        self.per_unit() > 1
    }

    /// Coordinates of one unit.
    pub fn per_unit(&self) -> u64 {
        self.block / self.units
    }
}

/// A tile with its place.
pub(super) struct TileFacts {
    /// Its name.
    pub name: String,
    pub space: Space,
    pub mapping: TileMapping,
    /// Sized axes: dimensions of the shared layout (tile order) or of the fragment (the distribution's order).
    pub dims: Vec<AxisId>,
    /// For shared tiles.
    pub layout: Option<MemLayout>,
    /// For tiles in registers.
    pub dist: Option<Distribution>,
}

/// An operation with its place.
pub(super) struct OpFacts<'a> {
    pub op: &'a Op,
    pub name: String,
    pub mapping: OpMapping,
    pub role: usize,
    /// The stream around it, by item.
    pub item: usize,
}

/// A part of the kernel's body.
pub(super) enum Item {
    /// One operation.
    Op(usize),
    /// A stream over operations.
    Stream { axis: AxisId, filter: Option<ExprId>, ops: std::ops::Range<usize> },
}

/// A kernel with every decision at hand.
pub(super) struct Facts<'a> {
    pub plan: &'a Plan,
    pub kernel: &'a Kernel,
    pub axes: Vec<AxisFacts>,
    pub tiles: Vec<TileFacts>,
    pub ops: Vec<OpFacts<'a>>,
    pub items: Vec<Item>,
    pub roles: Vec<RoleMapping>,
    pub work: Work,
    pub channels: Vec<Channel>,
    /// By role: how tiles that no atom constrains are held.
    pub spreads: Vec<Spread>,
    /// How tasks find their blocks; none: from the grid's coordinates.
    pub work_loop: Option<WorkLoop>,
    /// Variables of the work loop.
    pub vars: Arena<VarId, Var>,
}

/// Whether the extent is written as a multiple of `n`.
fn multiple(size: &Size, n: u64) -> bool {
    match size {
        Size::Const(c) => c % n == 0,
        Size::Mul(a, b) => multiple(a, n) || multiple(b, n),
        Size::Add(a, b) | Size::Sub(a, b) | Size::Min(a, b) | Size::Max(a, b) => multiple(a, n) && multiple(b, n),
        Size::Rank(_) | Size::Div(..) | Size::CeilDiv(..) => false,
    }
}

/// A constant extent, if its ranks are fixed.
pub(super) fn fixed(size: &Size, ranks: &Arena<RankId, Rank>) -> Option<u64> {
    let mut known = true;
    let mut values = vec![0; ranks.len()];
    size.for_each_rank(&mut |r| match ranks[r].fixed {
        Some(n) => values[r.index()] = n,
        None => known = false,
    });
    if known { size.eval(&values).ok() } else { None }
}

impl<'a> Facts<'a> {
    pub fn axis(&self, a: AxisId) -> &AxisFacts {
        &self.axes[a.index()]
    }

    pub fn tile(&self, t: TileId) -> &TileFacts {
        &self.tiles[t.index()]
    }

    /// The sized axes among `axes`.
    pub fn sized(&self, axes: &[AxisId]) -> Vec<AxisId> {
        axes.iter().copied().filter(|a| self.axis(*a).sized()).collect()
    }

    pub fn axis_name(&self, a: AxisId) -> &'a str {
        &self.kernel.axes[a].name
    }

    /// The only item an operation belongs to, if it is a stream.
    pub fn stream_of(&self, op: usize) -> Option<usize> {
        let item = self.ops[op].item;
        matches!(self.items[item], Item::Stream { .. }).then_some(item)
    }

    /// The tiles an operation reads.
    pub fn reads(&self, op: &Op) -> Vec<TileId> {
        let mut out = Vec::new();
        for root in op.roots() {
            self.kernel.walk(root, &mut |_, e| match e {
                einfall_ir::tile::Expr::Tile(t) | einfall_ir::tile::Expr::TileAt { tile: t, .. } => out.push(*t),
                einfall_ir::tile::Expr::Int(_)
                | einfall_ir::tile::Expr::Float(_)
                | einfall_ir::tile::Expr::Size(_)
                | einfall_ir::tile::Expr::Coord(_)
                | einfall_ir::tile::Expr::Read { .. }
                | einfall_ir::tile::Expr::Unary(..)
                | einfall_ir::tile::Expr::Binary(..)
                | einfall_ir::tile::Expr::Select(..)
                | einfall_ir::tile::Expr::Cast(..)
                | einfall_ir::tile::Expr::Rand(_) => {}
            });
        }
        match op {
            Op::Contract { out: o, a, b, carry, .. } => {
                out.extend([*a, *b]);
                out.extend(carry.then_some(*o));
            }
            Op::Reduce { out: o, carry, .. } if *carry => out.extend(o),
            Op::Scan { carry, .. } => out.extend(*carry),
            Op::Reduce { .. } | Op::Load { .. } | Op::Store { .. } | Op::Map { .. } => {}
        }
        out.sort();
        out.dedup();
        out
    }
}

/// Resolves `m` for `kernel`.
///
/// # Errors
/// Names the constraint the mapping breaks.
pub(super) fn run<'a>(plan: &'a Plan, kernel: &'a Kernel, m: &KernelMapping) -> Step<Facts<'a>> {
    if m.split.is_some() && !super::split_streams::is_split(plan, &kernel.name) {
        return refuse("split", format!("{} has not been cut", kernel.name), "run split-streams first");
    }
    let roles = if m.roles.is_empty() {
        let atoms = m.ops.iter().any(|o| o.atom.is_some());
        let scope = if atoms { Scope::Warpgroup } else { Scope::Warp };
        let units = m.axes.iter().map(|a| a.units).max().unwrap_or(1);
        vec![RoleMapping { role: "main".into(), scope, units, regs: None, ping_pong: false }]
    } else {
        m.roles.clone()
    };
    let mut grid: Vec<&str> = m.work.order.iter().map(String::as_str).collect();
    for (_, a) in kernel.axes.iter().filter(|(_, a)| a.kind == AxisKind::Grid) {
        if !grid.contains(&a.name.as_str()) {
            grid.push(&a.name);
        }
    }
    let steps = kernel.body.iter().filter_map(|n| match n {
        Node::Stream(s) if s.sequential => Some(kernel.axes[s.axis].name.as_str()),
        Node::Stream(_) | Node::Op(_) => None,
    });
    let sequential: Vec<&str> = steps.collect();
    let mut axes = Vec::new();
    let mut used = Vec::new();
    kernel.for_each_op(&mut |op, around| {
        used.extend(axes_of(kernel, op));
        used.extend(around);
    });
    for (id, a) in kernel.axes.iter() {
        let extent = fixed(&a.extent, &plan.ranks);
        let mapped = m.axis(&a.name);
        let whole = if a.kind == AxisKind::Inner { extent } else { None };
        let step = sequential.contains(&a.name.as_str()).then_some(1);
        // An axis that an earlier step folded into another is in no operation.
        let folded = (a.kind != AxisKind::Grid && !used.contains(&id)).then_some(1);
        let mapped = mapped.filter(|_| folded.is_none());
        let Some(block) = folded.or(step).or(mapped.map(|m| m.block)).or(a.block).or(whole) else {
            let message = format!("axis {} of kernel {} has no block", a.name, kernel.name);
            return refuse("blocks", message, "add an `axis` line, or fix the rank's extent");
        };
        let (units, cluster) = mapped.map_or((1, 1), |m| (m.units, m.cluster));
        axes.push(AxisFacts {
            block,
            units,
            together: units,
            apart: 1,
            cluster,
            exact: mapped.is_some_and(|m| m.exact)
                || block == 1
                || extent.is_some_and(|n| n % block == 0)
                || multiple(&a.extent, block),
            register: mapped.map_or(0, |m| m.register),
            descending: mapped.is_some_and(|m| m.descending),
            grid: grid.iter().position(|g| *g == a.name),
        });
    }
    let tiles = kernel
        .tiles
        .iter()
        .map(|(_, t)| {
            let space = t.space.unwrap_or(Space::Registers);
            let mapping = m.tile(&t.name).cloned().unwrap_or_else(|| TileMapping::new(&t.name, space));
            TileFacts {
                name: t.name.clone(),
                space: mapping.space,
                mapping,
                dims: Vec::new(),
                layout: None,
                dist: None,
            }
        })
        .collect::<Vec<_>>();
    let names = kernel.op_names(plan);
    let mut facts = Facts {
        plan,
        kernel,
        axes,
        tiles,
        ops: Vec::new(),
        items: Vec::new(),
        roles,
        work: m.work.clone(),
        channels: Vec::new(),
        spreads: Vec::new(),
        work_loop: None,
        vars: Arena::new(),
    };
    for node in &kernel.body {
        let first = facts.ops.len();
        let item = facts.items.len();
        match node {
            Node::Op(op) => {
                facts.items.push(Item::Op(first));
                push(&mut facts, op, item, &names, m)?;
            }
            Node::Stream(s) => {
                facts.items.push(Item::Stream { axis: s.axis, filter: s.filter, ops: first..first });
                for inner in &s.body {
                    let Node::Op(op) = inner else {
                        return refuse("nested streams", "streams in streams are not lowered for GPUs yet", "flatten");
                    };
                    push(&mut facts, op, item, &names, m)?;
                }
                let end = facts.ops.len();
                if let Item::Stream { ops, .. } = &mut facts.items[item] {
                    ops.end = end;
                }
                if facts.axis(s.axis).descending {
                    order_free::check(kernel, s).or_else(|why| {
                        let message = format!("{} does not descend: {why}", kernel.axes[s.axis].name);
                        refuse("stream order", message, "leave out `descending`")
                    })?;
                }
                if s.reverse {
                    return refuse("stream order", "reversed streams are not lowered for GPUs yet", "leave out `rev`");
                }
            }
        }
    }
    let cut: Vec<_> = kernel.axes.ids().filter(|a| facts.axis(*a).units > 1).collect();
    cut_together(&mut facts, &cut)?;
    if cut.is_empty() && facts.roles.len() == 1 && facts.roles[0].units > 1 {
        return refuse("units", "several units would do the same work", "cut an axis over them by `units`");
    }
    for (id, t) in kernel.tiles.iter().filter(|(id, _)| facts.tile(*id).space == Space::Registers) {
        let uses = |o: &&OpFacts<'_>| o.op.outs().contains(&id) || facts.reads(o.op).contains(&id);
        let mut users = facts.ops.iter().filter(uses);
        if let Some(first) = users.next()
            && let Some(other) = users.find(|o| o.role != first.role)
        {
            let message =
                format!("tile {} in registers is used by {} and {} of other roles", t.name, first.name, other.name);
            return refuse("roles", message, "put the tile in shared memory, or the operations in one role");
        }
    }
    if let Some(a) = m.axes.iter().find(|a| a.launches) {
        let message = format!("steps of {} are launches of their own, which a GPU's kernels do not have", a.axis);
        return refuse("launches", message, "leave out `launches`");
    }
    for t in &facts.tiles {
        if !matches!(t.space, Space::Registers | Space::Shared) {
            return refuse(
                "spaces",
                format!("tile {} is in {} on a GPU", t.name, t.space.name()),
                "registers or shared",
            );
        }
    }
    Ok(facts)
}

/// Axes of one operation that are cut over units are cut together: a unit has a part of each, and its number is that of their
/// parts, the last axis first. What one operation cuts together every other one does: all those axes, or none, or, where
/// nothing is stored or reduced along one of them, some, whose units then do the same.
fn cut_together(f: &mut Facts<'_>, cut: &[AxisId]) -> Step<()> {
    let refused = || {
        let message = "the axes that an operation cuts over units are cut over as many as a role has";
        refuse("units", message, "check `units`")
    };
    let of = |op: &Op| -> Vec<AxisId> {
        let axes = axes_of(f.kernel, op);
        cut.iter().copied().filter(|a| axes.contains(a)).collect()
    };
    let lists: Vec<Vec<AxisId>> = f.ops.iter().map(|o| of(o.op)).collect();
    let mut groups: Vec<Vec<AxisId>> = Vec::new();
    for list in lists.iter().filter(|l| l.len() > 1) {
        let shared = groups.iter().position(|g| g.iter().any(|a| list.contains(a)));
        match shared {
            None => groups.push(list.clone()),
            Some(g) if list.iter().all(|a| groups[g].contains(a)) => {}
            Some(g) if groups[g].iter().all(|a| list.contains(a)) => groups[g] = list.clone(),
            Some(_) => return refused(),
        }
    }
    for (o, list) in f.ops.iter().zip(&lists) {
        let Some(group) = groups.iter().find(|g| list.iter().any(|a| g.contains(a))) else { continue };
        let reduced = match o.op {
            Op::Reduce { over, .. } | Op::Contract { over, .. } => over.clone(),
            Op::Scan { along, .. } => vec![*along],
            Op::Load { .. } | Op::Map { .. } | Op::Store { .. } => Vec::new(),
        };
        let some = list.len() < group.len() && !matches!(o.op, Op::Load { .. } | Op::Map { .. });
        if some || reduced.iter().any(|a| group.contains(a)) {
            let message = format!("{} is not cut over units along two axes, as others are", o.name);
            return refuse("units", message, "cut one axis alone");
        }
    }
    for group in groups {
        let together = group.iter().map(|a| f.axis(*a).units).product();
        let mut apart = 1;
        for a in group.iter().rev() {
            let x = &mut f.axes[a.index()];
            (x.together, x.apart) = (together, apart);
            apart *= x.units;
        }
    }
    if cut.iter().all(|a| f.roles.iter().any(|r| r.units == f.axis(*a).together)) { Ok(()) } else { refused() }
}

fn push<'a>(f: &mut Facts<'a>, op: &'a Op, item: usize, names: &[String], m: &KernelMapping) -> Step<()> {
    let name = names[f.ops.len()].clone();
    let mapping = m.op(&name).cloned().unwrap_or_else(|| OpMapping::new(&name));
    let by_engine = match op {
        Op::Load { out, .. } => f.tile(*out).mapping.engine,
        Op::Store { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => None,
    };
    let role = match &mapping.role {
        Some(r) => f.roles.iter().position(|x| x.role == *r).unwrap_or(0),
        None if by_engine == Some(Engine::Tma) => 0,
        None => f.roles.len() - 1,
    };
    if by_engine == Some(Engine::Tma) && f.roles[role].units != 1 {
        return refuse("copy engine", format!("{name} is issued by a role of several units"), "use a role of one warp");
    }
    f.ops.push(OpFacts { op, name, mapping, role, item });
    Ok(())
}
