//! Reads, loads and stores between device arrays and registers: as windows where positions are linear and provably
//! inside the array, else element by element.
//!
//! Invariant: what lies outside an array reads 0 and is never stored. A window's elements are inside: uniform positions
//! that are not provably so are tested (and clamped for the address), and the test cuts the window to nothing.

use einfall_ir::arena::Id;
use einfall_ir::cascade::Size;
use einfall_ir::kernel::{Bound, Expr, Stmt, View};
use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{self, AxisId, BufferId, ExprId, Space, TileId};

use super::super::Step;
use super::super::apply_mapping::fixed;
use super::super::assign_layouts::renamed;
use super::super::exprs::{Place, add, max, min, size, sub};
use super::super::schedule::Iteration;
use super::super::split_domains::conjuncts;
use super::{Emit, Frame, is_walked};

/// A window into an array over the dimensions of a frame.
struct Access {
    at: Vec<Expr>,
    /// For each dimension of the frame the array's dimension it walks.
    walk: Vec<Option<usize>>,
    /// Limits by dimension of the frame.
    limits: Vec<(usize, Expr)>,
    /// What must hold for the uniform positions to be inside.
    guard: Option<Expr>,
}

impl Emit<'_, '_> {
    /// The window at `position` over the dimensions `dims`; none if there is no such window. `stores`: positions
    /// linear in coordinates are inside, because a cascade's stores are.
    fn access(
        &self,
        i: usize,
        buffer: BufferId,
        position: &[ExprId],
        dims: &[AxisId],
        place: &Place,
        stores: bool,
    ) -> Option<Access> {
        let f = self.f;
        let buf = |b: BufferId| self.global(b);
        let renames = renamed(f, i);
        let own = |a: AxisId| renames.iter().find(|(to, _)| *to == a).map_or(a, |(_, own)| *own);
        let extents = &f.plan.buffers[buffer].dims;
        let mut access = Access { at: Vec::new(), walk: vec![None; dims.len()], limits: Vec::new(), guard: None };
        for (d, p) in position.iter().enumerate() {
            let l = f.linear(*p, place, &buf)?;
            match l.axes[..] {
                [] if self.inside(*p, &extents[d]) || (stores && !self.indirect(*p)) => access.at.push(l.base),
                [] => {
                    let extent = size(f, &extents[d]);
                    let inside = Expr::Int(0)
                        .bin(BinaryOp::Le, l.base.clone())
                        .bin(BinaryOp::And, l.base.clone().bin(BinaryOp::Lt, extent.clone()));
                    access.guard = Some(match access.guard {
                        Some(g) => g.bin(BinaryOp::And, inside),
                        None => inside,
                    });
                    access.at.push(max(min(l.base, sub(extent, Expr::Int(1))), Expr::Int(0)));
                }
                [(axis, 1)] => {
                    let axis = own(axis);
                    let x = dims.iter().position(|a| *a == axis)?;
                    if access.walk[x].replace(d).is_some() {
                        return None;
                    }
                    let first = add(l.base.clone(), f.origin(axis, place));
                    let same = l.base == Expr::Int(0) && f.kernel.axes[axis].extent == extents[d];
                    let full = self.inside && is_walked(place, axis);
                    let mut limit = (!full && !f.axis(axis).exact).then(|| sub(f.extent(axis), f.origin(axis, place)));
                    if !same && !stores {
                        if !non_negative(&l.base) {
                            return None;
                        }
                        if !(full && self.within(*p, &extents[d])) {
                            let end = sub(size(f, &extents[d]), first.clone());
                            limit = Some(limit.map_or(end.clone(), |l| min(l, end)));
                        }
                    }
                    access.limits.extend(limit.map(|l| (x, l)));
                    access.at.push(first);
                }
                _ => return None,
            }
        }
        Some(access)
    }

    /// Whether the filter of the stream keeps a position below an extent.
    fn within(&self, p: ExprId, extent: &Size) -> bool {
        let f = self.f;
        let text = |e: ExprId| tile::print::expr_text(f.plan, f.kernel, e);
        fn least(k: &tile::Kernel, e: ExprId, extent: &Size) -> bool {
            match &k.exprs[e] {
                tile::Expr::Size(s) => s == extent,
                tile::Expr::Binary(BinaryOp::Min, a, b) => least(k, *a, extent) || least(k, *b, extent),
                _ => false,
            }
        }
        let mut all = Vec::new();
        self.filter.into_iter().for_each(|e| conjuncts(f, e, &mut all));
        all.into_iter().any(|e| match f.kernel.exprs[e] {
            tile::Expr::Binary(BinaryOp::Lt, a, b) => text(a) == text(p) && least(f.kernel, b, extent),
            _ => false,
        })
    }

    /// Whether a uniform position is one of an axis of the dimension's extent, or a fixed one inside.
    fn inside(&self, p: ExprId, extent: &Size) -> bool {
        let f = self.f;
        match &f.kernel.exprs[p] {
            tile::Expr::Coord(a) => f.kernel.axes[*a].extent == *extent && f.axis(*a).cluster == 1,
            tile::Expr::Int(n) => *n >= 0 && fixed(extent, &f.plan.ranks).is_some_and(|extent| (*n as u64) < extent),
            tile::Expr::Float(_)
            | tile::Expr::Size(_)
            | tile::Expr::Tile(_)
            | tile::Expr::TileAt { .. }
            | tile::Expr::Read { .. }
            | tile::Expr::Unary(..)
            | tile::Expr::Binary(..)
            | tile::Expr::Select(..)
            | tile::Expr::Cast(..)
            | tile::Expr::Rand(_) => false,
        }
    }

    /// Whether a position is read from an array or a tile: its content is not trusted.
    fn indirect(&self, p: ExprId) -> bool {
        let mut found = false;
        self.f.kernel.walk(p, &mut |_, e| {
            found |= matches!(e, tile::Expr::Read { .. } | tile::Expr::Tile(_) | tile::Expr::TileAt { .. });
        });
        found
    }

    /// Array elements as an elementwise value over `frame`; the same element is read once per operation.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn read(
        &mut self,
        i: usize,
        buffer: BufferId,
        position: &[ExprId],
        frame: &Frame,
        place: &Place,
        at: &Iteration,
        out: &mut Vec<Stmt>,
    ) -> Step<Expr> {
        let f = self.f;
        let array = &f.plan.buffers[buffer];
        let text: Vec<String> = position.iter().map(|p| tile::print::expr_text(f.plan, f.kernel, *p)).collect();
        let key = format!("{}[{}]", array.name, text.join(", "));
        if let Some(known) = self.reads.get(&key) {
            return Ok(known.clone());
        }
        let global = self.global.clone();
        let buf = |b: BufferId| global[b.index()].expect("arrays in use have a buffer");
        let fixed: Option<Vec<Expr>> = position.iter().map(|p| f.uniform(*p, place, &buf)).collect();
        let temp = format!("{}_{}{}", f.ops[i].name, array.name, self.reads.len());
        let value = match (fixed, self.access(i, buffer, position, &frame.dims, place, false)) {
            (Some(at), _) => Expr::Fetch { buf: self.global(buffer), at },
            (None, Some(access)) => {
                let dims: Vec<usize> = (0..frame.dims.len()).filter(|d| access.walk[*d].is_some()).collect();
                let t = self.temp(&temp, array.dtype, &frame.dist.project(&dims));
                let (src, bounds) = self.windowed(buffer, access, &dims, frame);
                out.push(Stmt::Load { out: t, src, bounds });
                Expr::Frag { frag: t, dims }
            }
            (None, None) => {
                let indices =
                    position.iter().map(|p| self.value(i, *p, frame, place, at, out)).collect::<Step<Vec<_>>>()?;
                let t = self.temp(&temp, array.dtype, &frame.dist);
                let bounds = self.bounds(&frame.dims, place);
                out.push(Stmt::Gather { out: t, buf: self.global(buffer), at: indices, bounds });
                Expr::Frag { frag: t, dims: (0..frame.dims.len()).collect() }
            }
        };
        self.reads.insert(key, value.clone());
        Ok(value)
    }

    /// The view and bounds of an access for a fragment with dimensions `dims` of the frame.
    fn windowed(&self, buffer: BufferId, access: Access, dims: &[usize], frame: &Frame) -> (View, Vec<Bound>) {
        let mut bounds: Vec<Bound> = access
            .limits
            .into_iter()
            .filter_map(|(x, limit)| dims.iter().position(|d| *d == x).map(|dim| Bound { dim, limit }))
            .collect();
        if let Some(guard) = access.guard
            && !dims.is_empty()
        {
            let whole = Expr::Int(frame.dist.dims[dims[0]] as i64);
            let limit = match bounds.iter().position(|b| b.dim == 0) {
                Some(at) => bounds.remove(at).limit,
                None => whole,
            };
            let limit = Expr::Select(Box::new(guard), Box::new(limit), Box::new(Expr::Int(0)));
            bounds.insert(0, Bound { dim: 0, limit });
        }
        let walk = dims.iter().map(|d| access.walk[*d].map(|b| (b, 1))).collect();
        (View { buf: self.global(buffer), stage: None, at: access.at, walk }, bounds)
    }

    pub(super) fn load_registers(
        &mut self,
        i: usize,
        t: TileId,
        buffer: BufferId,
        position: &[ExprId],
        place: &Place,
        out: &mut Vec<Stmt>,
    ) -> Step<()> {
        let dims = self.f.tile(t).dims.clone();
        let frame = Frame { dist: self.f.tile(t).dist.clone().expect("assigned"), dims };
        let access = self.access(i, buffer, position, &frame.dims, place, false);
        let none = Iteration { trip: None, rel: 0 };
        match access {
            Some(access) if access.guard.is_none() || !frame.dims.is_empty() => {
                let all: Vec<usize> = (0..frame.dims.len()).collect();
                let (src, bounds) = self.windowed(buffer, access, &all, &frame);
                out.push(Stmt::Load { out: self.frag(t), src, bounds });
            }
            Some(_) => {
                let value = self.read(i, buffer, position, &frame, place, &none, out)?;
                out.push(Stmt::Map { out: self.frag(t), value });
            }
            None => {
                let bounds = self.bounds(&frame.dims, place);
                let at =
                    position.iter().map(|p| self.value(i, *p, &frame, place, &none, out)).collect::<Step<Vec<_>>>()?;
                out.push(Stmt::Gather { out: self.frag(t), buf: self.global(buffer), at, bounds });
            }
        }
        Ok(())
    }

    /// A store from registers; `when` leaves out elements, or all of a tile.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn store_registers(
        &mut self,
        i: usize,
        buffer: BufferId,
        position: &[ExprId],
        axes: &[AxisId],
        value: ExprId,
        join: Option<ReduceOp>,
        when: Option<ExprId>,
        place: &Place,
        at: &Iteration,
        out: &mut Vec<Stmt>,
    ) -> Step<()> {
        let f = self.f;
        let uniform = when.and_then(|w| {
            let buf = |b: BufferId| self.global(b);
            f.uniform(w, place, &buf)
        });
        let elementwise = when.filter(|_| uniform.is_none());
        // Units that hold the same elements store them once.
        let repeats = f.roles[place.role].units > 1 && !axes.iter().any(|a| f.cut(*a, place.role));
        let mut conds: Vec<Expr> = uniform.into_iter().collect();
        if repeats {
            conds.push(Expr::Unit.bin(BinaryOp::Eq, Expr::Int(0)));
        }
        let frame = self.frame(i)?;
        debug_assert_eq!(f.sized(axes).len(), frame.dims.len());
        let mut body = Vec::new();
        let src = match &f.kernel.exprs[value] {
            tile::Expr::Tile(t) if f.tile(*t).dims == frame.dims && f.tile(*t).space == Space::Registers => {
                self.frag(*t)
            }
            _ => {
                let v = self.value(i, value, &frame, place, at, &mut body)?;
                let dtype = f.plan.buffers[buffer].dtype;
                let src = self.temp(&format!("{}_part", f.ops[i].name), dtype, &frame.dist);
                body.push(Stmt::Map { out: src, value: v });
                src
            }
        };
        let window = self.access(i, buffer, position, &frame.dims, place, true).filter(|a| {
            // A store through a window writes every element once.
            elementwise.is_none() && a.walk.iter().all(Option::is_some)
        });
        match window {
            Some(access) => {
                let all: Vec<usize> = (0..frame.dims.len()).collect();
                conds.extend(access.guard.clone());
                let access = Access { guard: None, ..access };
                let (dst, bounds) = self.windowed(buffer, access, &all, &frame);
                body.push(Stmt::Store { dst, src, bounds, join });
            }
            None => {
                let mut at_all = position
                    .iter()
                    .map(|p| self.value(i, *p, &frame, place, at, &mut body))
                    .collect::<Step<Vec<_>>>()?;
                if let Some(w) = elementwise {
                    let w = self.value(i, w, &frame, place, at, &mut body)?;
                    match at_all.first_mut() {
                        // What is not to be stored goes outside the array, where it is dropped.
                        Some(first) => {
                            let kept = std::mem::replace(first, Expr::Int(0));
                            *first = Expr::Select(Box::new(w), Box::new(kept), Box::new(Expr::Int(-1)));
                        }
                        None => {
                            let message = format!("{} stores one element under conditions", f.ops[i].name);
                            return super::refuse("stores", message, "give the array a dimension");
                        }
                    }
                }
                let bounds = self.bounds(&frame.dims, place);
                body.push(Stmt::Scatter { buf: self.global(buffer), at: at_all, src, bounds, join });
            }
        }
        match conds.into_iter().reduce(|a, b| a.bin(BinaryOp::And, b)) {
            Some(cond) => out.push(Stmt::If { cond, then: body, otherwise: Vec::new() }),
            None => out.extend(body),
        }
        Ok(())
    }
}

/// Whether a uniform expression cannot be negative, by its form.
fn non_negative(e: &Expr) -> bool {
    least(e).is_some_and(|n| n >= 0)
}

/// What a uniform expression is at least, by its form.
fn least(e: &Expr) -> Option<i64> {
    match e {
        Expr::Int(n) => Some(*n),
        Expr::Extent(_) | Expr::Grid(_) | Expr::Unit | Expr::ClusterRank | Expr::Var(_) => Some(0),
        Expr::Binary(BinaryOp::Add, a, b) => least(a)?.checked_add(least(b)?),
        // What is rounded up to a multiple: the number and the divisor without 1.
        Expr::Binary(BinaryOp::Sub, a, b) => match **b {
            Expr::Int(n) => least(a)?.checked_sub(n),
            _ => None,
        },
        Expr::Binary(BinaryOp::Mul, a, b) => {
            let (a, b) = (least(a)?, least(b)?);
            (a >= 0 && b >= 0).then(|| a.checked_mul(b)).flatten()
        }
        Expr::Binary(BinaryOp::Div | BinaryOp::Mod, a, b) => (least(a)? >= 0 && least(b)? >= 0).then_some(0),
        Expr::Binary(BinaryOp::Min, a, b) => Some(least(a)?.min(least(b)?)),
        Expr::Binary(BinaryOp::Max, a, b) => least(a).max(least(b)),
        Expr::Binary(
            BinaryOp::Pow
            | BinaryOp::Lt
            | BinaryOp::Le
            | BinaryOp::Gt
            | BinaryOp::Ge
            | BinaryOp::Eq
            | BinaryOp::Ne
            | BinaryOp::And
            | BinaryOp::Or,
            ..,
        )
        | Expr::Float(_)
        | Expr::Scalar(_)
        | Expr::Fetch { .. }
        | Expr::Frag { .. }
        | Expr::Coord(_)
        | Expr::Unary(..)
        | Expr::Fma(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Rand(_) => None,
    }
}
