//! Operands packed once a launch: arrays of the workspace in the panels that a contraction reads.
//!
//! Before: `B = load B[k, n]`, and every task lays `B` out for its register tiles.
//! After:  `kernel matmul_0_pack_B { B = load B[k, n];  store B_packed[n / 32, k, n % 32] = B over k, n }`, and in the
//!         kernel itself `B = load B_packed[n / 32, k, n % 32]`, which its contraction reads in place.
//!
//! Of an operand whose neighbours along `k` stand together the positions are `[n / 32, k / 2, n % 32, k % 2]`. Which tiles
//! are packed the mapping says (`tile B packed`). Invariants: what such positions mean does not depend on this file, so that
//! plans are evaluated as ever; blocks begin at whole panels; rows from the last one to the end of an atom's step are zeros.

use einfall_ir::arena::{Arena, Id};
use einfall_ir::cascade::Size;
use einfall_ir::kernel::BufSpace;
use einfall_ir::mapping::Mapping;
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{
    Axis, AxisId, AxisKind, Buffer, BufferId, BufferKind, Expr, ExprId, Kernel, Node, Op, Plan, Space, Tile, TileId,
};

use super::place::{Layout, Place, Scratch, Shape};
use super::{Lower, NotLowered, Out, contract, fresh};
use crate::backend::llvm::Isa;
use crate::passes::rewrite_tiles::{rewrite, tidy};

/// Coordinates of a block of the kernel that packs, along columns and along the innermost summed axis.
const BLOCK: u64 = 256;

/// Positions in an array of panels.
struct Panels {
    /// The axes: others, the one whose neighbours stand together, the one that is contiguous within a panel.
    order: Vec<AxisId>,
    /// Elements of a panel's row.
    width: u64,
    /// Neighbours that stand together.
    together: u64,
}

impl Panels {
    /// What positions say, where they are of that form.
    fn of(k: &Kernel, at: &[ExprId]) -> Option<Panels> {
        let coordinate = |e: ExprId| match k.exprs[e] {
            Expr::Coord(a) => Some(a),
            _ => None,
        };
        let digit = |e: &ExprId, op: BinaryOp| {
            let Expr::Binary(o, x, n) = k.exprs[*e] else { return None };
            let Expr::Int(n @ 2..) = k.exprs[n] else { return None };
            Some((coordinate(x).filter(|_| o == op)?, n as u64))
        };
        let (first, rest) = at.split_first()?;
        let lane = digit(first, BinaryOp::Div)?;
        let (others, last, together) = match rest {
            [others @ .., group, last, neighbour] if digit(neighbour, BinaryOp::Mod).is_some_and(|k| k.0 != lane.0) => {
                let (of, n) = digit(neighbour, BinaryOp::Mod)?;
                (digit(group, BinaryOp::Div)? == (of, n)).then_some(())?;
                (others, last, Some((of, n)))
            }
            [others @ .., last] => (others, last, None),
            [] => return None,
        };
        (digit(last, BinaryOp::Mod)? == lane).then_some(())?;
        let mut order = others.iter().map(|e| coordinate(*e)).collect::<Option<Vec<AxisId>>>()?;
        order.extend(together.map(|t| t.0));
        order.push(lane.0);
        Some(Panels { order, width: lane.1, together: together.map_or(1, |t| t.1) })
    }

    /// The positions themselves.
    fn positions(&self, exprs: &mut Arena<ExprId, Expr>) -> Vec<ExprId> {
        let coordinates: Vec<ExprId> = self.order.iter().map(|a| exprs.push(Expr::Coord(*a))).collect();
        let Some((&lane, others)) = coordinates.split_last() else { return Vec::new() };
        let mut digit = |op: BinaryOp, e: ExprId, n: u64| {
            let n = exprs.push(Expr::Int(n as i64));
            exprs.push(Expr::Binary(op, e, n))
        };
        let mut at = vec![digit(BinaryOp::Div, lane, self.width)];
        at.extend(others);
        if let (2.., Some(k)) = (self.together, at.last_mut()) {
            let row = *k;
            *k = digit(BinaryOp::Div, row, self.together);
            at.push(digit(BinaryOp::Mod, lane, self.width));
            at.push(digit(BinaryOp::Mod, row, self.together));
        } else {
            at.push(digit(BinaryOp::Mod, lane, self.width));
        }
        at
    }
}

impl Lower<'_> {
    /// What positions in an array say, where they are of that form and cannot lie outside of it.
    fn panels(&self, array: BufferId, at: &[ExprId]) -> Option<Panels> {
        let p = Panels::of(self.k, at)?;
        // Groups are filled up with zeros by who loads a tile to store it, and nobody else.
        if p.together > 1 && !copied(self.plan, array) {
            return None;
        }
        let dims = &self.plan.buffers[array].dims;
        let grouped = if p.together > 1 { 1 } else { 0 };
        let [.., row] = &dims[..dims.len() - grouped] else { return None };
        let whole = *row == Size::Const(p.width) && (grouped == 0 || dims.last() == Some(&Size::Const(p.together)));
        // Of groups there are those of whole steps of atoms.
        let group = dims.len().checked_sub(3).filter(|_| grouped == 1);
        let inside = |(d, (e, n)): (usize, (&ExprId, &Size))| match group {
            Some(g) if g == d => p.order.iter().rev().nth(1).is_some_and(|k| self.are_groups(*k, n, p.together)),
            _ => self.inside(*e, n),
        };
        (whole && at.iter().zip(dims).enumerate().all(inside)).then_some(p)
    }

    /// Whether a dimension counts the groups of neighbours of an axis up to the end of an atom's last step.
    fn are_groups(&self, axis: AxisId, n: &Size, together: u64) -> bool {
        let (extent, step) = (&self.k.axes[axis].extent, self.step());
        match (extent, n) {
            (Size::Const(e), Size::Const(n)) => *n == e.next_multiple_of(step) / together,
            _ => *n == groups(extent.clone(), step, together),
        }
    }

    /// Neighbours that stand together in an array as the kernel reads or writes it.
    pub(super) fn together(&self, array: BufferId) -> u64 {
        let mut most = 1;
        self.k.for_each_op(&mut |op, _| {
            if let Op::Load { buffer, at, .. } | Op::Store { buffer, at, .. } = op
                && *buffer == array
                && let Some(p) = self.panels(array, at)
            {
                most = most.max(p.together);
            }
        });
        most
    }

    /// The part of an array of panels that a tile is: one that is loaded in the layout `wanted`, or one whose only use is to
    /// be stored there.
    pub(super) fn packed(
        &mut self,
        t: TileId,
        load: Option<&(BufferId, Vec<ExprId>)>,
        wanted: Option<&Layout>,
    ) -> Out<Option<Scratch>> {
        let Some((from, at)) = load else { return Ok(None) };
        let dtype = Self::register_type(self.k.tiles[t].dtype);
        if let Some(p) = self.panels(*from, at) {
            let shared = self.shared(*from, &p);
            // Read where it is used, so nothing may be stored there before.
            let kept = matches!(self.bufs[shared.buf].space, BufSpace::Global { written: false, .. });
            // Rows are read by whole register tiles, for which only scratch has room behind the last one.
            if kept
                && self.columns_of(t).is_some()
                && wanted.is_some_and(|w| self.laid_out(&shared, w))
                && self.plan.buffers[*from].dtype == self.stored_type(t, wanted)
            {
                return Ok(Some(shared));
            }
            if p.together > 1 {
                return Err(
                    self.unsupported(format!("a tile {} of pairs that no contraction reads", self.k.tiles[t].name))
                );
            }
        }
        // The only reader stores it.
        let [position] = self.readers[t.index()].as_slice() else { return Ok(None) };
        let (mut here, mut found) = (0, None);
        self.k.for_each_op(&mut |op, _| {
            if here == *position
                && let Op::Store { buffer, at, value, join: None, when: None, .. } = op
                && self.k.exprs[*value] == Expr::Tile(t)
            {
                found = self.panels(*buffer, at).map(|p| (*buffer, p));
            }
            here += 1;
        });
        let Some((to, p)) = found.filter(|(to, _)| self.plan.buffers[*to].kind == BufferKind::Workspace) else {
            return Ok(None);
        };
        let whole = p.order.len() == self.k.tiles[t].axes.len() && self.aligned(&p);
        let plain = p.together == 1 && self.plan.buffers[to].dtype == dtype;
        if whole && (plain || p.together > 1) {
            return Ok(Some(self.shared(to, &p)));
        }
        if p.together > 1 {
            let name = &self.k.tiles[t].name;
            return Err(
                self.unsupported(format!("a store of tile {name} in pairs, in blocks that are no whole panels"))
            );
        }
        Ok(None)
    }

    fn shared(&self, array: BufferId, p: &Panels) -> Scratch {
        let operand = (p.together > 1).then_some((self.plan.buffers[array].dtype, p.together));
        let layout = Layout { order: p.order.clone(), panel: Some(p.width), operand };
        Scratch { buf: self.globals[&array], layout, shared: true }
    }

    /// The type that a contraction reads of a tile.
    fn stored_type(&self, t: TileId, layout: Option<&Layout>) -> einfall_ir::dtype::DType {
        let registers = Self::register_type(self.k.tiles[t].dtype);
        layout.and_then(|l| l.operand).map_or(registers, |o| o.0)
    }

    /// Whether blocks begin at whole panels, and at whole steps of atoms along the axis whose neighbours stand together.
    fn aligned(&self, p: &Panels) -> bool {
        let multiple = |a: Option<&AxisId>, n: u64| {
            a.is_none_or(|a| match self.k.axes[*a].kind {
                AxisKind::Inner => true,
                AxisKind::Grid | AxisKind::Stream => self.k.axes[*a].block.unwrap_or(1).is_multiple_of(n),
            })
        };
        let step = if p.together > 1 { self.step() } else { 1 };
        let mut from_last = p.order.iter().rev();
        multiple(from_last.next(), p.width) && multiple(from_last.next(), step)
    }

    /// Elements of a summed axis up to whole ones of which operands of atoms are filled with zeros: what an atom takes, and
    /// what is transposed at a time.
    pub(super) fn step(&self) -> u64 {
        self.isa.atoms().first().map_or(1, |a| a.shape[2].max(self.isa.lanes()))
    }

    /// Whether memory is laid out as an operation wants it.
    pub(super) fn laid_out(&self, s: &Scratch, wanted: &Layout) -> bool {
        if !s.shared {
            return s.layout == *wanted;
        }
        let p =
            Panels { order: s.layout.order.clone(), width: s.layout.panel.unwrap_or(1), together: s.layout.together() };
        self.wide(&p.order) == wanted.order
            && s.layout.panel == wanted.panel
            && p.together == wanted.together()
            && self.aligned(&p)
    }

    /// Whether a load fills what is in the workspace already.
    pub(super) fn loaded(&self, op: &Op) -> bool {
        let Op::Load { out, buffer, .. } = op else { return false };
        matches!(&self.places[out.index()], Place::Scratch(s) if s.shared && s.buf == self.globals[buffer])
    }

    /// Whether a store's elements were made in the workspace.
    pub(super) fn stored(&self, op: &Op) -> bool {
        let Op::Store { buffer, value, .. } = op else { return false };
        let Expr::Tile(t) = self.k.exprs[*value] else { return false };
        matches!(&self.places[t.index()], Place::Scratch(s) if s.shared && s.buf == self.globals[buffer])
    }

    /// The contraction that alone reads a tile, along its columns.
    fn columns_of(&self, t: TileId) -> Option<Shape> {
        let (mut found, mut readers) = (None, 0);
        self.k.for_each_op(&mut |op, _| {
            let Op::Contract { a, b, .. } = op else { return };
            if *a == t || *b == t {
                readers += 1;
                let shape = self.contract_shape(op);
                let columns = if shape.swapped { *a } else { *b };
                let whole = shape.lane.is_some() && shape.runs.is_none();
                found = (columns == t && a != b && whole).then_some(shape);
            }
        });
        found.filter(|_| readers == 1 && self.readers[t.index()].len() == 1)
    }
}

/// Whether an array is in the workspace, all that is stored there are tiles as they were loaded, and all reads are loads.
fn copied(plan: &Plan, array: BufferId) -> bool {
    let mut copied = plan.buffers[array].kind == BufferKind::Workspace;
    for k in &plan.kernels {
        copied &= !k.exprs.iter().any(|(_, e)| matches!(e, Expr::Read { buffer, .. } if *buffer == array));
        k.for_each_op(&mut |op, _| {
            let Op::Store { buffer, value, join, when, .. } = op else { return };
            if *buffer == array {
                let plain = join.is_none() && when.is_none();
                copied &= plain && matches!(k.exprs[*value], Expr::Tile(t) if load_of(k, t).is_some());
            }
        });
    }
    copied
}

fn ceil(n: Size, by: u64) -> Size {
    Size::CeilDiv(Box::new(n), Box::new(Size::Const(by)))
}

/// Groups of so many neighbours along an axis, up to the end of its last step.
fn groups(extent: Size, step: u64, together: u64) -> Size {
    Size::Mul(Box::new(ceil(extent, step)), Box::new(Size::Const(step / together)))
}

/// Adds a kernel and an array of the workspace for every tile that the mapping wants packed.
///
/// # Errors
/// A tile that cannot be.
pub fn pack_operands(plan: &Plan, mapping: &Mapping, isa: &Isa) -> Result<Plan, NotLowered> {
    let mut plan = plan.clone();
    let mut kernels = Vec::new();
    for mut k in plan.kernels.clone() {
        let name = k.name.clone();
        let lines = mapping.kernels.iter().filter(|m| m.kernel == name).flat_map(|m| &m.tiles);
        for line in lines.filter(|t| t.space == Space::Packed) {
            let kernel = name.clone();
            let fail = |why: &str| NotLowered { kernel, what: format!("tile {} packed: {why}", line.tile) };
            let t = k.tiles.iter().find(|(_, t)| t.name == line.tile).map(|(id, _)| id);
            let packed = t.ok_or("there is no such tile").and_then(|t| pack(&mut plan, &mut k, t, isa));
            kernels.push(packed.map_err(fail)?);
        }
        kernels.push(k);
    }
    plan.kernels = kernels;
    Ok(plan)
}

/// The kernel that fills an array of panels for a tile, which is read there from now on.
fn pack(plan: &mut Plan, k: &mut Kernel, t: TileId, isa: &Isa) -> Result<Kernel, &'static str> {
    let (panels, dtype, step) = {
        let thin = contract::thin(plan, k);
        let (lower, ..) = Lower::open(plan, &thin, isa).map_err(|_| "its kernel is not lowered")?;
        let shape = lower.columns_of(t).ok_or("one contraction must read it, along its columns, and nothing else")?;
        let layout = lower.lane_layout(t, &shape);
        let mut order: Vec<AxisId> = k.tiles[t].axes.clone();
        order.retain(|a| !layout.order.contains(a));
        order.extend(&layout.order);
        let panels = Panels { order, width: shape.nr, together: layout.together() };
        if !lower.aligned(&panels) {
            return Err(
                "its columns must be in blocks of whole panels, its summed axis in whole steps of an instruction",
            );
        }
        (panels, lower.stored_type(t, Some(&layout)), lower.step())
    };
    if !dtype.is_float() {
        return Err("its elements are no floats");
    }
    let (array, at) = load_of(k, t).ok_or("it must be loaded once")?;
    let read_only = |b: BufferId| matches!(plan.buffers[b].kind, BufferKind::Input | BufferKind::Workspace);
    let (mut own, mut stored) = (read_only(array), false);
    k.for_each_op(&mut |op, _| stored |= matches!(op, Op::Store { buffer, .. } if *buffer == array));
    for root in &at {
        k.walk(*root, &mut |_, e| match e {
            Expr::Coord(a) => own &= k.tiles[t].axes.contains(a),
            Expr::Read { buffer, .. } => own &= plan.buffers[*buffer].kind == BufferKind::Input,
            Expr::Tile(_) | Expr::TileAt { .. } | Expr::Rand(_) => own = false,
            Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..) => {}
        });
    }
    if !own || stored {
        return Err("its array must be read alone, at positions that are its own axes'");
    }

    // The array.
    let extent = |a: &AxisId| k.axes[*a].extent.clone();
    let Some((lane, others)) = panels.order.split_last() else { return Err("it has no axes") };
    let mut dims = vec![ceil(extent(lane), panels.width)];
    dims.extend(others.iter().map(extent));
    if let (2.., Some(rows)) = (panels.together, dims.last_mut()) {
        *rows = groups(rows.clone(), step, panels.together);
        dims.extend([Size::Const(panels.width), Size::Const(panels.together)]);
    } else {
        dims.push(Size::Const(panels.width));
    }
    let name = fresh(plan, format!("{}_packed", k.tiles[t].name));
    let packed = plan.buffers.push(Buffer { name, dtype, dims, kind: BufferKind::Workspace, positive: false });

    let name = fresh(plan, format!("{}_pack_{}", k.name, k.tiles[t].name));
    let filling = filling(name, k, t, (array, &at), packed, &panels);
    let at = panels.positions(&mut k.exprs);
    read_at(&mut k.body, t, packed, &at);
    *k = tidy(k.clone());
    Ok(filling)
}

/// The kernel that loads a tile and stores it in panels.
fn filling(
    name: String,
    k: &Kernel,
    t: TileId,
    (array, at): (BufferId, &[ExprId]),
    packed: BufferId,
    panels: &Panels,
) -> Kernel {
    let tile = &k.tiles[t];
    let mut own = Kernel { exprs: k.exprs.clone(), ..Kernel::new(name) };
    let blocked: Vec<AxisId> = panels.order.iter().rev().take(2).copied().collect();
    let axis = |a: &AxisId| {
        let block = if blocked.contains(a) { BLOCK.next_multiple_of(panels.width) } else { 1 };
        Axis { kind: AxisKind::Grid, block: Some(block), ..k.axes[*a].clone() }
    };
    let axes: Vec<AxisId> = tile.axes.iter().map(|a| own.axes.push(axis(a))).collect();
    let renamed = |a: &AxisId| tile.axes.iter().position(|x| x == a).map_or(*a, |i| axes[i]);
    let at: Vec<ExprId> = at
        .iter()
        .map(|e| {
            rewrite(&mut own, *e, &mut |k, e| match k.exprs[e] {
                Expr::Coord(a) => Some(k.exprs.push(Expr::Coord(renamed(&a)))),
                _ => None,
            })
        })
        .collect();
    let out = own.tiles.push(Tile { axes: axes.clone(), space: None, ..tile.clone() });
    let value = own.exprs.push(Expr::Tile(out));
    let order = panels.order.iter().map(renamed).collect();
    let to = Panels { order, ..*panels }.positions(&mut own.exprs);
    own.body = vec![
        Node::Op(Op::Load { out, buffer: array, at }),
        Node::Op(Op::Store { buffer: packed, at: to, axes, value, join: None, when: None }),
    ];
    tidy(own)
}

/// The load that alone writes a tile.
fn load_of(k: &Kernel, t: TileId) -> Option<(BufferId, Vec<ExprId>)> {
    let (mut found, mut writers) = (None, 0);
    k.for_each_op(&mut |op, _| {
        if op.outs().contains(&t) {
            writers += 1;
            if let Op::Load { buffer, at, .. } = op {
                found = Some((*buffer, at.clone()));
            }
        }
    });
    found.filter(|_| writers == 1)
}

/// The load of a tile from another array.
fn read_at(nodes: &mut [Node], t: TileId, array: BufferId, positions: &[ExprId]) {
    for node in nodes {
        match node {
            Node::Stream(s) => read_at(&mut s.body, t, array, positions),
            Node::Op(Op::Load { out, buffer, at }) if *out == t => {
                *buffer = array;
                *at = positions.to_vec();
            }
            Node::Op(_) => {}
        }
    }
}
