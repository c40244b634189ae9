//! What the operations of a kernel touch: arrays by how far their index expressions reach, tiles by their axes.
//!
//! Invariant: a reach never exceeds the extent of its dimension, and data-dependent positions are as many as the points
//! that compute them.

use std::collections::BTreeMap;

use super::filter::kept;
use super::{Loop, Model, Work, bytes_of, walk};
use crate::arena::Id;
use crate::mapping::KernelMapping;
use crate::ops::{BinaryOp, UnaryOp};
use crate::target::DataSheet;
use crate::tile::{AxisId, BufferId, Expr, ExprId, Kernel, Node, Op, Plan, Space, TileId};

/// Memory an access is to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    Array(BufferId),
    Tile(TileId),
}

/// How many different positions an index expression takes, given how far its axes reach.
#[derive(Clone, Debug)]
pub(super) enum Reach {
    /// One, at this index where that is known.
    One(Option<f64>),
    Axis(AxisId),
    Scaled(Box<Reach>, f64),
    Sum(Box<Reach>, Box<Reach>),
    Divided(Box<Reach>, f64),
    Modulo(Box<Reach>, f64),
    /// Any position may follow from any point of these axes.
    Gathered(Vec<AxisId>),
}

impl Reach {
    /// Different positions, and the distance between the outermost.
    fn measure(&self, cover: &impl Fn(AxisId) -> f64) -> (f64, f64) {
        match self {
            Reach::One(_) => (1.0, 0.0),
            Reach::Axis(a) => (cover(*a), cover(*a) - 1.0),
            Reach::Scaled(a, c) => {
                let (n, span) = a.measure(cover);
                if *c == 0.0 { (1.0, 0.0) } else { (n, span * c.abs()) }
            }
            Reach::Sum(a, b) => {
                let ((n, s), (m, t)) = (a.measure(cover), b.measure(cover));
                ((n * m).min(s + t + 1.0), s + t)
            }
            Reach::Divided(a, c) => {
                let (n, span) = a.measure(cover);
                let span = (span / c).ceil();
                (n.min(span + 1.0).max(1.0), span)
            }
            Reach::Modulo(a, c) => {
                let (n, span) = a.measure(cover);
                (n.min(*c), span.min(c - 1.0))
            }
            Reach::Gathered(axes) => (axes.iter().map(|a| cover(*a)).product(), f64::INFINITY),
        }
    }

    /// The positions in words, with the caller's words for axes. A shift by less than they span leaves most of them the
    /// same, and is left out.
    fn words(&self, axis: &impl Fn(AxisId) -> String, cover: &impl Fn(AxisId) -> f64) -> String {
        match self {
            Reach::One(at) => format!("{at:?}"),
            Reach::Axis(a) => axis(*a),
            Reach::Scaled(a, c) => format!("{}*{c}", a.words(axis, cover)),
            Reach::Sum(a, b) => match (&**a, &**b) {
                (Reach::One(Some(c)), x) | (x, Reach::One(Some(c))) if c.abs() <= x.measure(cover).1 => {
                    x.words(axis, cover)
                }
                (a, b) => format!("({}+{})", a.words(axis, cover), b.words(axis, cover)),
            },
            Reach::Divided(a, c) => format!("({}/{c})", a.words(axis, cover)),
            Reach::Modulo(a, c) => format!("({}%{c})", a.words(axis, cover)),
            Reach::Gathered(axes) => format!("any{:?}", axes.iter().map(|a| axis(*a)).collect::<Vec<_>>()),
        }
    }

    fn axes(&self, out: &mut Vec<AxisId>) {
        match self {
            Reach::One(_) => {}
            Reach::Axis(a) => out.push(*a),
            Reach::Scaled(a, _) | Reach::Divided(a, _) | Reach::Modulo(a, _) => a.axes(out),
            Reach::Sum(a, b) => {
                a.axes(out);
                b.axes(out);
            }
            Reach::Gathered(axes) => out.extend(axes),
        }
    }
}

/// One access of an operation.
#[derive(Clone, Debug)]
pub(super) struct Touch {
    pub(super) place: Place,
    /// Per dimension: the positions touched and how many there are.
    pub(super) dims: Vec<(Reach, f64)>,
    pub(super) axes: Vec<AxisId>,
    pub(super) element_bytes: f64,
    pub(super) write: bool,
    /// The load that fills a tile, with the tile.
    pub(super) fills: Option<TileId>,
}

impl Touch {
    /// What is touched: accesses for which this is equal touch the same data.
    pub(super) fn identity(&self, axis: &impl Fn(AxisId) -> String, cover: &impl Fn(AxisId) -> f64) -> (Place, String) {
        let words = match self.place {
            Place::Array(_) => self.dims.iter().map(|(r, _)| r.words(axis, cover)).collect::<Vec<_>>().join(", "),
            Place::Tile(_) => String::new(),
        };
        (self.place.clone(), words)
    }

    pub(super) fn bytes(&self, cover: &impl Fn(AxisId) -> f64) -> f64 {
        let by_dim: f64 = self.dims.iter().map(|(r, extent)| r.measure(cover).0.min(*extent)).product();
        let by_axis: f64 = self.axes.iter().map(|a| cover(*a)).product();
        by_dim.min(by_axis) * self.element_bytes
    }
}

/// Turns operations into accesses.
pub(super) struct Build<'a, 's, S: Fn(&crate::cascade::Size) -> Option<f64>> {
    pub(super) plan: &'a Plan,
    pub(super) names: std::vec::IntoIter<String>,
    pub(super) sizes: &'s S,
    /// Tiles read in place: the array and the positions.
    pub(super) direct: BTreeMap<TileId, (BufferId, &'a [ExprId])>,
}

impl<'a, S: Fn(&crate::cascade::Size) -> Option<f64>> Build<'a, '_, S> {
    /// Tiles that are no copies: by the mapping, or on a device of caches those only loaded and not contracted.
    pub(super) fn direct_tiles(&mut self, k: &'a Kernel, m: &KernelMapping, sheet: &DataSheet) {
        let caches = sheet.levels.iter().all(|l| l.name != "shared");
        let mut written = vec![0; k.tiles.len()];
        let mut contracted = vec![false; k.tiles.len()];
        visit(&k.body, &mut |op| {
            op.outs().iter().for_each(|t| written[t.index()] += 1);
            if let Op::Contract { a, b, .. } = op {
                contracted[a.index()] = true;
                contracted[b.index()] = true;
            }
        });
        visit(&k.body, &mut |op| {
            let Op::Load { out, buffer, at } = op else { return };
            let n = out.index();
            let space = m.tile(&k.tiles[*out].name).map(|t| t.space).or(k.tiles[*out].space);
            let direct = match space {
                Some(s) => s == Space::Direct,
                None => caches && !contracted[n],
            };
            if direct && written[n] == 1 {
                self.direct.insert(*out, (*buffer, at));
            }
        });
    }

    pub(super) fn nodes(&mut self, nodes: &'a [Node], streams: &mut Vec<usize>, m: &mut Model<'a>) -> Option<()> {
        for n in nodes {
            match n {
                Node::Op(op) => self.op(op, streams, m)?,
                Node::Stream(s) => {
                    let (inside, over) = (m.block(s.axis), m.extent[s.axis.index()]);
                    let id = m.streams.len();
                    m.streams.push(Loop { axis: s.axis, inside, over, stream: Some(id) });
                    let kept = kept(m, s, self.sizes, &|a| m.block(a));
                    m.kept.push(kept);
                    streams.push(id);
                    self.nodes(&s.body, streams, m)?;
                    streams.pop();
                }
            }
        }
        Some(())
    }

    fn op(&mut self, op: &'a Op, streams: &[usize], m: &mut Model<'a>) -> Option<()> {
        let k = m.kernel;
        let own = |t: &TileId| k.tiles[*t].axes.clone();
        let domain = match op {
            Op::Load { out, .. } | Op::Map { out, .. } | Op::Scan { out, .. } => own(out),
            Op::Store { axes, .. } => axes.clone(),
            Op::Reduce { out, over, .. } => {
                out.first().map(own).unwrap_or_default().into_iter().chain(over.iter().copied()).collect()
            }
            Op::Contract { out, over, .. } => own(out).into_iter().chain(over.iter().copied()).collect(),
        };
        let mut touches = Vec::new();
        let mut scalar_ops = 0;
        let direct_load = matches!(op, Op::Load { out, .. } if self.direct.contains_key(out));
        if !direct_load {
            for root in op.roots() {
                scalar_ops += self.reads(k, root, &mut touches)?;
            }
        }
        match op {
            Op::Load { out, buffer, at } => {
                scalar_ops = 0;
                if !direct_load {
                    touches.push(self.array(k, *buffer, at, false, Some(*out))?);
                    touches.push(Touch { write: true, ..self.tile(k, *out)? });
                }
            }
            Op::Store { buffer, at, join, .. } => {
                scalar_ops = 0;
                touches.push(self.array(k, *buffer, at, true, None)?);
                if join.is_some() {
                    touches.push(self.array(k, *buffer, at, false, None)?);
                }
            }
            Op::Map { out, .. } => touches.push(Touch { write: true, ..self.tile(k, *out)? }),
            Op::Reduce { out, carry, .. } => {
                scalar_ops += 1;
                for t in out {
                    touches.push(Touch { write: true, ..self.tile(k, *t)? });
                    if *carry {
                        touches.push(self.tile(k, *t)?);
                    }
                }
            }
            Op::Contract { out, a, b, carry, .. } => {
                touches.push(self.tile(k, *a)?);
                touches.push(self.tile(k, *b)?);
                touches.push(Touch { write: true, ..self.tile(k, *out)? });
                if *carry {
                    touches.push(self.tile(k, *out)?);
                }
            }
            Op::Scan { out, carry, .. } => {
                scalar_ops += 1;
                touches.push(Touch { write: true, ..self.tile(k, *out)? });
                if let Some(c) = carry {
                    touches.push(self.tile(k, *c)?);
                    touches.push(Touch { write: true, ..self.tile(k, *c)? });
                }
            }
        }
        touches.retain(|t| !t.dims.is_empty());
        let name = self.names.next().unwrap_or_default();
        let streams = streams.to_vec();
        m.ops.push(Work { op, name, streams, domain, loops: Vec::new(), touches, scalar_ops });
        Some(())
    }

    /// Adds what the expression reads; how many scalar operations it is.
    fn reads(&self, k: &Kernel, root: ExprId, out: &mut Vec<Touch>) -> Option<usize> {
        let mut tiles = Vec::new();
        let mut reads = Vec::new();
        let mut ops = 0;
        walk(k, root, &mut |e| match e {
            Expr::Tile(t) | Expr::TileAt { tile: t, .. } => tiles.push(*t),
            Expr::Read { buffer, at } => reads.push((*buffer, at.clone())),
            Expr::Unary(..) | Expr::Binary(..) | Expr::Select(..) | Expr::Cast(..) | Expr::Rand(_) => ops += 1,
            Expr::Int(_) | Expr::Float(_) | Expr::Size(_) | Expr::Coord(_) => {}
        });
        for (buffer, at) in reads {
            out.push(self.array(k, buffer, &at, false, None)?);
        }
        for t in tiles {
            out.push(self.tile(k, t)?);
            // A tile read in place needs the positions that its load was given.
            if let Some((_, at)) = self.direct.get(&t) {
                for e in *at {
                    self.reads(k, *e, out)?;
                }
            }
        }
        Some(ops)
    }

    fn tile(&self, k: &Kernel, t: TileId) -> Option<Touch> {
        if let Some((buffer, at)) = self.direct.get(&t) {
            return self.array(k, *buffer, at, false, None);
        }
        let tile = &k.tiles[t];
        let dims = tile
            .axes
            .iter()
            .map(|a| Some((Reach::Axis(*a), (self.sizes)(&k.axes[*a].extent)?)))
            .collect::<Option<Vec<_>>>()?;
        let element_bytes = bytes_of(tile.dtype);
        Some(Touch { place: Place::Tile(t), dims, axes: tile.axes.clone(), element_bytes, write: false, fills: None })
    }

    fn array(&self, k: &Kernel, b: BufferId, at: &[ExprId], write: bool, fills: Option<TileId>) -> Option<Touch> {
        let buffer = &self.plan.buffers[b];
        let mut dims = Vec::new();
        let mut axes = Vec::new();
        for (e, size) in at.iter().zip(&buffer.dims) {
            let reach = self.reach(k, *e);
            reach.axes(&mut axes);
            dims.push((reach, (self.sizes)(size)?));
        }
        axes.sort();
        axes.dedup();
        let element_bytes = bytes_of(buffer.dtype);
        Some(Touch { place: Place::Array(b), dims, axes, element_bytes, write, fills })
    }

    fn reach(&self, k: &Kernel, e: ExprId) -> Reach {
        let value = |e: ExprId| match &k.exprs[e] {
            Expr::Int(n) => Some(*n as f64),
            Expr::Size(s) => (self.sizes)(s),
            Expr::Float(_)
            | Expr::Coord(_)
            | Expr::Tile(_)
            | Expr::TileAt { .. }
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => None,
        };
        let boxed = |e: ExprId| Box::new(self.reach(k, e));
        match &k.exprs[e] {
            Expr::Int(_) | Expr::Size(_) | Expr::Float(_) => Reach::One(value(e)),
            Expr::Coord(a) => Reach::Axis(*a),
            Expr::Unary(UnaryOp::Neg, a) => self.reach(k, *a),
            Expr::Binary(BinaryOp::Add | BinaryOp::Sub, a, b) => Reach::Sum(boxed(*a), boxed(*b)),
            Expr::Binary(BinaryOp::Mul, a, b) => match (value(*a), value(*b)) {
                (Some(c), _) => Reach::Scaled(boxed(*b), c),
                (_, Some(c)) => Reach::Scaled(boxed(*a), c),
                (None, None) => self.gathered(k, e),
            },
            Expr::Binary(BinaryOp::Div, a, b) => match value(*b).filter(|c| *c >= 1.0) {
                Some(c) => Reach::Divided(boxed(*a), c),
                None => self.gathered(k, e),
            },
            Expr::Binary(BinaryOp::Mod, a, b) => match value(*b).filter(|c| *c >= 1.0) {
                Some(c) => Reach::Modulo(boxed(*a), c),
                None => self.gathered(k, e),
            },
            Expr::Tile(_)
            | Expr::TileAt { .. }
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => self.gathered(k, e),
        }
    }

    fn gathered(&self, k: &Kernel, e: ExprId) -> Reach {
        let mut axes = Vec::new();
        walk(k, e, &mut |x| match x {
            Expr::Coord(a) => axes.push(*a),
            Expr::Tile(t) | Expr::TileAt { tile: t, .. } => axes.extend(&k.tiles[*t].axes),
            Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => {}
        });
        axes.sort();
        axes.dedup();
        Reach::Gathered(axes)
    }
}

fn visit<'a>(nodes: &'a [Node], f: &mut impl FnMut(&'a Op)) {
    for n in nodes {
        match n {
            Node::Op(op) => f(op),
            Node::Stream(s) => visit(&s.body, f),
        }
    }
}
