//! Tile expressions as kernel expressions: coordinates become origins plus positions in a fragment.
//!
//! Invariant: an expression without sized axes is uniform over the unit; with sized axes it is elementwise over the
//! dimensions given.

use einfall_ir::arena::Id;
use einfall_ir::cascade::Size;
use einfall_ir::kernel::{BufId, Expr, VarId};
use einfall_ir::ops::{BinaryOp, UnaryOp};
use einfall_ir::tile::{self, AxisId, AxisKind, ExprId, Plan};

use super::apply_mapping::Facts;

/// Where an operation stands: its role, and the block of the stream around it.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub role: usize,
    /// The axis walked and its block's number.
    pub block: Option<(AxisId, Expr)>,
    /// Whether elements may be masked or absent along the axis walked.
    pub checked: bool,
}

/// `Σ coefficient · axis + base`: `base` is uniform and leaves origins out.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    pub base: Expr,
    pub axes: Vec<(AxisId, i64)>,
}

pub(super) fn add(a: Expr, b: Expr) -> Expr {
    a.bin(BinaryOp::Add, b)
}

pub(super) fn sub(a: Expr, b: Expr) -> Expr {
    a.bin(BinaryOp::Sub, b)
}

pub(super) fn mul(a: Expr, b: Expr) -> Expr {
    a.bin(BinaryOp::Mul, b)
}

pub(super) fn min(a: Expr, b: Expr) -> Expr {
    a.bin(BinaryOp::Min, b)
}

pub(super) fn max(a: Expr, b: Expr) -> Expr {
    a.bin(BinaryOp::Max, b)
}

/// `⌈a / b⌉` for a positive constant.
pub(super) fn ceil_div(a: Expr, b: u64) -> Expr {
    add(a, Expr::Int(b as i64 - 1)).bin(BinaryOp::Div, Expr::Int(b as i64))
}

pub(super) fn var(v: VarId) -> Expr {
    Expr::Var(v)
}

/// The value of an extent.
pub(super) fn size(f: &Facts<'_>, s: &Size) -> Expr {
    size_of(f.plan, s)
}

/// The value of an extent over the ranks of `plan`.
pub(super) fn size_of(plan: &Plan, s: &Size) -> Expr {
    let two = |a: &Size, b: &Size, op| size_of(plan, a).bin(op, size_of(plan, b));
    match s {
        Size::Const(n) => Expr::Int(*n as i64),
        Size::Rank(r) => plan.ranks[*r].fixed.map_or(Expr::Extent(*r), |n| Expr::Int(n as i64)),
        Size::Add(a, b) => two(a, b, BinaryOp::Add),
        Size::Sub(a, b) => two(a, b, BinaryOp::Sub),
        Size::Mul(a, b) => two(a, b, BinaryOp::Mul),
        Size::Div(a, b) => two(a, b, BinaryOp::Div),
        Size::CeilDiv(a, b) => {
            let b = size_of(plan, b);
            sub(add(size_of(plan, a), b.clone()), Expr::Int(1)).bin(BinaryOp::Div, b)
        }
        Size::Min(a, b) => two(a, b, BinaryOp::Min),
        Size::Max(a, b) => two(a, b, BinaryOp::Max),
    }
}

impl Facts<'_> {
    /// The extent of an axis.
    pub fn extent(&self, a: AxisId) -> Expr {
        size(self, &self.kernel.axes[a].extent)
    }

    /// Whether the units of `role` cut the axis.
    pub fn cut(&self, a: AxisId, role: usize) -> bool {
        self.axis(a).units > 1 && self.roles[role].units == self.axis(a).together
    }

    /// Coordinates along the axis that a unit of `role` holds.
    pub fn held(&self, a: AxisId, role: usize) -> u64 {
        if self.cut(a, role) { self.axis(a).per_unit() } else { self.axis(a).block }
    }

    /// Blocks along a grid axis: whole clusters of them.
    pub fn blocks(&self, a: AxisId) -> Expr {
        let x = self.axis(a);
        mul(ceil_div(self.extent(a), x.block * x.cluster), Expr::Int(x.cluster as i64))
    }

    /// Where the unit's part within the task's block starts.
    pub fn unit_offset(&self, a: AxisId, role: usize) -> Expr {
        if !self.cut(a, role) {
            return Expr::Int(0);
        }
        let x = self.axis(a);
        let part = if x.apart > 1 { Expr::Unit.bin(BinaryOp::Div, Expr::Int(x.apart as i64)) } else { Expr::Unit };
        let first = x.apart * x.units == x.together;
        let part = if first { part } else { part.bin(BinaryOp::Mod, Expr::Int(x.units as i64)) };
        mul(part, Expr::Int(x.per_unit() as i64))
    }

    /// The first coordinate of the task's block.
    pub fn task_origin(&self, a: AxisId, place: &Place) -> Expr {
        let x = self.axis(a);
        let block = Expr::Int(x.block as i64);
        match (self.kernel.axes[a].kind, &place.block) {
            (AxisKind::Grid, _) => {
                let at = match &self.work_loop {
                    None => self.turned(a, Expr::Grid(x.grid.expect("grid axes have a dimension"))),
                    Some(w) => var(w.roles[place.role].blocks[a.index()].expect("grid axes have a variable")),
                };
                mul(at, block)
            }
            (AxisKind::Stream, Some((axis, number))) if *axis == a => mul(number.clone(), block),
            (AxisKind::Stream | AxisKind::Inner, _) => Expr::Int(0),
        }
    }

    /// The first coordinate of the unit's part.
    pub fn origin(&self, a: AxisId, place: &Place) -> Expr {
        add(self.task_origin(a, place), self.unit_offset(a, place.role))
    }

    /// The block at place `at` of the walk along a grid axis: from the other end where long blocks go first.
    pub fn turned(&self, a: AxisId, at: Expr) -> Expr {
        if self.work.longest_first && self.masks(a) { sub(sub(self.blocks(a), Expr::Int(1)), at) } else { at }
    }

    /// Whether a stream's filter depends on the axis: blocks along it differ in length.
    pub fn masks(&self, a: AxisId) -> bool {
        self.items.iter().any(|i| match i {
            super::apply_mapping::Item::Stream { filter: Some(e), .. } => {
                let mut found = false;
                self.kernel.walk(*e, &mut |_, e| found |= *e == tile::Expr::Coord(a));
                found
            }
            super::apply_mapping::Item::Stream { filter: None, .. } | super::apply_mapping::Item::Op(_) => false,
        })
    }

    /// `e` as a linear form of sized axes with a uniform rest; none if it is not.
    pub fn linear(&self, e: ExprId, place: &Place, buf: &dyn Fn(tile::BufferId) -> BufId) -> Option<Linear> {
        let uniform = |base| Some(Linear { base, axes: Vec::new() });
        match &self.kernel.exprs[e] {
            tile::Expr::Int(n) => uniform(Expr::Int(*n)),
            tile::Expr::Float(_) | tile::Expr::Tile(_) | tile::Expr::TileAt { .. } => None,
            tile::Expr::Size(s) => uniform(size(self, s)),
            tile::Expr::Coord(a) if self.axis(*a).sized() => Some(Linear { base: Expr::Int(0), axes: vec![(*a, 1)] }),
            tile::Expr::Coord(a) => uniform(self.origin(*a, place)),
            tile::Expr::Read { buffer, at } if at.is_empty() => uniform(Expr::Scalar(buf(*buffer))),
            tile::Expr::Read { buffer, at } => {
                let at = at.iter().map(|x| self.uniform(*x, place, buf)).collect::<Option<Vec<_>>>()?;
                uniform(Expr::Fetch { buf: buf(*buffer), at })
            }
            tile::Expr::Unary(op, a) => {
                let mut l = self.linear(*a, place, buf)?;
                if *op == UnaryOp::Neg {
                    l.axes.iter_mut().for_each(|x| x.1 = -x.1);
                } else if !l.axes.is_empty() {
                    return None;
                }
                Some(Linear { base: Expr::Unary(*op, Box::new(l.base)), axes: l.axes })
            }
            tile::Expr::Binary(op, a, b) => {
                let (x, y) = (self.linear(*a, place, buf)?, self.linear(*b, place, buf)?);
                let (plain_x, plain_y) = (x.axes.is_empty(), y.axes.is_empty());
                let axes = match (op, &x.base, &y.base) {
                    (BinaryOp::Add | BinaryOp::Sub, _, _) => {
                        let sign = if *op == BinaryOp::Sub { -1 } else { 1 };
                        let mut axes = x.axes;
                        for (a, c) in y.axes {
                            match axes.iter_mut().find(|(b, _)| *b == a) {
                                Some(found) => found.1 += sign * c,
                                None => axes.push((a, sign * c)),
                            }
                        }
                        axes.retain(|x| x.1 != 0);
                        axes
                    }
                    (BinaryOp::Mul, _, Expr::Int(c)) if plain_y => x.axes.iter().map(|(a, k)| (*a, k * c)).collect(),
                    (BinaryOp::Mul, Expr::Int(c), _) if plain_x => y.axes.iter().map(|(a, k)| (*a, k * c)).collect(),
                    _ if plain_x && plain_y => Vec::new(),
                    _ => return None,
                };
                Some(Linear { base: x.base.bin(*op, y.base), axes })
            }
            tile::Expr::Select(c, a, b) => {
                let [c, a, b] = [*c, *a, *b].map(|x| self.uniform(x, place, buf));
                uniform(Expr::Select(Box::new(c?), Box::new(a?), Box::new(b?)))
            }
            tile::Expr::Cast(d, a) => {
                let a = self.uniform(*a, place, buf)?;
                uniform(Expr::Cast(*d, Box::new(a)))
            }
            tile::Expr::Rand(_) => None,
        }
    }

    /// `e` as a uniform expression, if it has no sized axis.
    pub fn uniform(&self, e: ExprId, place: &Place, buf: &dyn Fn(tile::BufferId) -> BufId) -> Option<Expr> {
        self.linear(e, place, buf).filter(|l| l.axes.is_empty()).map(|l| l.base)
    }
}
