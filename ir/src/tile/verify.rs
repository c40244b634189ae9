//! What a well-formed plan is. A refused plan is a fault of the pass that made it (or of a hand-written file).
//!
//! Invariant: on a plan accepted here the evaluator fails only for reasons of run-time values (extents, arguments,
//! elements nothing wrote, tasks that touch one element), never for reasons of form.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{AxisId, AxisKind, BufferId, BufferKind, Expr, ExprId, Kernel, Node, Op, Place, Plan, Stream, TileId};
use crate::arena::Id;
use crate::cascade::Size;

/// One thing wrong with a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where: kernel and operation, or the declaration.
    pub place: String,
    /// What, one sentence without a full stop.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

impl std::error::Error for Fault {}

/// Words that start an operation or an expression and so name no tile.
const RESERVED: [&str; 15] = [
    "load", "store", "reduce", "contract", "scan", "carry", "for", "if", "then", "else", "inf", "nan", "and", "or",
    "tile",
];

/// Checks `plan`.
///
/// # Errors
/// Every fault found.
pub fn verify(plan: &Plan) -> Result<(), Vec<Fault>> {
    let mut faults = Vec::new();
    let mut fault = |place: &str, message: String| faults.push(Fault { place: place.to_string(), message });
    unique(plan.ranks.iter().map(|(_, r)| r.name.as_str()), "rank", "plan", &mut fault);
    unique(plan.buffers.iter().map(|(_, b)| b.name.as_str()), "array", "plan", &mut fault);
    unique(plan.kernels.iter().map(|k| k.name.as_str()), "kernel", "plan", &mut fault);
    for (_, b) in plan.buffers.iter() {
        for d in &b.dims {
            size(plan, d, &format!("array {}", b.name), &mut fault);
        }
    }
    let mut stored: BTreeSet<usize> = BTreeSet::new();
    for kernel in &plan.kernels {
        let ids_hold = Checker::ids(plan, kernel, &mut fault);
        if ids_hold {
            let mut c = Checker::new(plan, kernel, &stored);
            c.run();
            c.faults.into_iter().for_each(|f| fault(&f.place, f.message));
            kernel.for_each_op(&mut |op, _| {
                if let Op::Store { buffer, .. } = op {
                    stored.insert(buffer.index());
                }
            });
        }
    }
    for (id, b) in plan.buffers.iter() {
        if b.kind == BufferKind::Output && !stored.contains(&id.index()) {
            fault(&format!("array {}", b.name), "no kernel stores this output".to_string());
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

fn unique<'n>(names: impl Iterator<Item = &'n str>, kind: &str, place: &str, fault: &mut impl FnMut(&str, String)) {
    let mut seen = BTreeSet::new();
    for n in names {
        if !seen.insert(n) {
            fault(place, format!("there are two {kind}s named {n}"));
        }
    }
}

fn size(plan: &Plan, s: &Size, place: &str, fault: &mut impl FnMut(&str, String)) {
    s.for_each_rank(&mut |r| {
        if plan.ranks.get(r).is_none() {
            fault(place, format!("its extent names {r:?}, which does not exist"));
        }
    });
}

struct Checker<'a> {
    plan: &'a Plan,
    kernel: &'a Kernel,
    /// Arrays stored by earlier kernels.
    stored: &'a BTreeSet<usize>,
    integer: Vec<bool>,
    names: Vec<String>,
    next: usize,
    /// Axes of the streams around, outermost first, and whether each is sequential.
    around: Vec<(AxisId, bool)>,
    /// Tiles that certainly hold values for the present blocks.
    defined: BTreeSet<TileId>,
    faults: Vec<Fault>,
}

impl<'a> Checker<'a> {
    /// Whether every id in the kernel exists, operands come before users, and shapes of accesses are right: what the
    /// rest of the checks (and the evaluator) rely on.
    fn ids(plan: &Plan, kernel: &Kernel, fault: &mut impl FnMut(&str, String)) -> bool {
        let mut ok = true;
        let mut bad = |message: String| {
            ok = false;
            fault(&format!("kernel {}", kernel.name), message);
        };
        let buffer = |b: BufferId, rank: usize| match plan.buffers.get(b) {
            None => Some(format!("{b:?} does not exist")),
            Some(x) if x.dims.len() != rank => {
                Some(format!("array {} of {} dimensions is accessed with {rank} positions", x.name, x.dims.len()))
            }
            Some(_) => None,
        };
        for (_, t) in kernel.tiles.iter() {
            for a in &t.axes {
                if kernel.axes.get(*a).is_none() {
                    bad(format!("tile {} has {a:?}, which does not exist", t.name));
                }
            }
        }
        for (id, e) in kernel.exprs.iter() {
            e.for_each_operand(|o| {
                if o >= id {
                    bad(format!("{id:?} uses {o:?}, which does not come before it"));
                }
            });
            match e {
                Expr::Coord(a) if kernel.axes.get(*a).is_none() => bad(format!("{a:?} does not exist")),
                Expr::Tile(t) if kernel.tiles.get(*t).is_none() => bad(format!("{t:?} does not exist")),
                Expr::TileAt { tile, at } => match kernel.tiles.get(*tile) {
                    None => bad(format!("{tile:?} does not exist")),
                    Some(t) if t.axes.len() != at.len() => {
                        bad(format!("tile {} of {} axes is read with {}", t.name, t.axes.len(), at.len()));
                    }
                    Some(_) => at.iter().for_each(|p| match p {
                        Place::Axis(a) if kernel.axes.get(*a).is_none() => bad(format!("{a:?} does not exist")),
                        Place::Axis(_) | Place::At(_) => {}
                    }),
                },
                Expr::Read { buffer: b, at } => buffer(*b, at.len()).into_iter().for_each(&mut bad),
                Expr::Size(s) => size(plan, s, "expression", &mut |_, m| bad(m)),
                Expr::Coord(_)
                | Expr::Tile(_)
                | Expr::Int(_)
                | Expr::Float(_)
                | Expr::Unary(..)
                | Expr::Binary(..)
                | Expr::Select(..)
                | Expr::Cast(..)
                | Expr::Rand(_) => {}
            }
        }
        for (_, a) in kernel.axes.iter() {
            size(plan, &a.extent, &format!("axis {}", a.name), &mut |_, m| bad(m));
        }
        kernel.for_each_op(&mut |op, _| {
            for e in op.roots() {
                if kernel.exprs.get(e).is_none() {
                    bad(format!("{e:?} does not exist"));
                }
            }
            let (tiles, axes): (Vec<TileId>, Vec<AxisId>) = match op {
                Op::Load { out, buffer: b, at } => {
                    buffer(*b, at.len()).into_iter().for_each(&mut bad);
                    (vec![*out], vec![])
                }
                Op::Store { buffer: b, at, axes, .. } => {
                    buffer(*b, at.len()).into_iter().for_each(&mut bad);
                    (vec![], axes.clone())
                }
                Op::Map { out, .. } => (vec![*out], vec![]),
                Op::Reduce { out, over, .. } => {
                    if out.is_empty() {
                        bad("a reduction writes nothing".to_string());
                    }
                    (out.clone(), over.clone())
                }
                Op::Contract { out, a, b, over, .. } => (vec![*out, *a, *b], over.clone()),
                Op::Scan { out, along, carry, .. } => ([*out].into_iter().chain(*carry).collect(), vec![*along]),
            };
            for t in tiles {
                if kernel.tiles.get(t).is_none() {
                    bad(format!("{t:?} does not exist"));
                }
            }
            for a in axes {
                if kernel.axes.get(a).is_none() {
                    bad(format!("{a:?} does not exist"));
                }
            }
        });
        fn streams(kernel: &Kernel, nodes: &[Node], bad: &mut impl FnMut(String)) {
            for n in nodes {
                if let Node::Stream(s) = n {
                    if kernel.axes.get(s.axis).is_none() {
                        bad(format!("{:?} does not exist", s.axis));
                    }
                    if s.filter.is_some_and(|f| kernel.exprs.get(f).is_none()) {
                        bad("a filter does not exist".to_string());
                    }
                    streams(kernel, &s.body, bad);
                }
            }
        }
        streams(kernel, &kernel.body, &mut bad);
        ok
    }

    fn new(plan: &'a Plan, kernel: &'a Kernel, stored: &'a BTreeSet<usize>) -> Checker<'a> {
        Checker {
            plan,
            kernel,
            stored,
            integer: kernel.integer_exprs(plan),
            names: kernel.op_names(plan),
            next: 0,
            around: Vec::new(),
            defined: BTreeSet::new(),
            faults: Vec::new(),
        }
    }

    fn fault(&mut self, message: impl Into<String>) {
        let place = match self.names.get(self.next) {
            Some(op) => format!("kernel {}, operation {op}", self.kernel.name),
            None => format!("kernel {}", self.kernel.name),
        };
        self.faults.push(Fault { place, message: message.into() });
    }

    fn axis(&self, a: AxisId) -> &'a str {
        &self.kernel.axes[a].name
    }

    fn tile(&self, t: TileId) -> &'a str {
        &self.kernel.tiles[t].name
    }

    fn run(&mut self) {
        let kernel = self.kernel;
        let mut names: BTreeMap<&str, &str> = self.plan.ranks.iter().map(|(_, r)| (r.name.as_str(), "rank")).collect();
        let axes = kernel.axes.iter().map(|(_, a)| (a.name.as_str(), "axis"));
        for (name, kind) in axes.chain(kernel.tiles.iter().map(|(_, t)| (t.name.as_str(), "tile"))) {
            let place = format!("kernel {}", kernel.name);
            if let Some(other) = names.insert(name, kind) {
                self.faults.push(Fault { place, message: format!("{name} names both a {other} and a {kind}") });
            } else if RESERVED.contains(&name) {
                self.faults
                    .push(Fault { place, message: format!("the {kind} name {name} is a word of the text form") });
            }
        }
        for (id, a) in kernel.axes.iter() {
            if self.kernel.ordered == Some(id) && (a.kind != AxisKind::Grid || a.block.is_some_and(|b| b != 1)) {
                let place = format!("kernel {}: axis {}", self.kernel.name, a.name);
                let message = "its blocks follow each other, which takes a grid axis in blocks of 1".to_string();
                self.faults.push(Fault { place, message });
            }
            if a.block == Some(0) {
                let place = format!("kernel {}, axis {}", kernel.name, a.name);
                self.faults.push(Fault { place, message: "its block is 0".to_string() });
            }
        }
        for (_, t) in kernel.tiles.iter() {
            if t.axes.iter().collect::<BTreeSet<_>>().len() != t.axes.len() {
                let place = format!("kernel {}, tile {}", kernel.name, t.name);
                self.faults.push(Fault { place, message: "it has an axis twice".to_string() });
            }
        }
        self.nodes(&kernel.body);
    }

    fn nodes(&mut self, nodes: &'a [Node]) {
        for node in nodes {
            match node {
                Node::Op(op) => {
                    self.op(op);
                    self.next += 1;
                }
                Node::Stream(s) => self.stream(s),
            }
        }
    }

    fn stream(&mut self, s: &'a Stream) {
        let axis = &self.kernel.axes[s.axis];
        if axis.kind != AxisKind::Stream {
            self.fault(format!("a stream walks {} axis {}", axis.kind.name(), axis.name));
        }
        if self.around.iter().any(|(a, _)| *a == s.axis) {
            self.fault(format!("a stream over {} stands inside another over it", axis.name));
        }
        if s.sequential && axis.block.is_some_and(|b| b != 1) {
            self.fault(format!("the sequential stream over {} has a block other than 1", axis.name));
        }
        let kernel = self.kernel;
        let has_axis = |t: &TileId| kernel.tiles[*t].axes.contains(&s.axis);
        self.defined.retain(|t| !has_axis(t));
        let before = self.defined.clone();
        self.around.push((s.axis, s.sequential));
        if let Some(f) = s.filter {
            let mut coords = Vec::new();
            kernel.walk(f, &mut |_, e| match e {
                Expr::Coord(a) => coords.push(*a),
                Expr::Tile(t) | Expr::TileAt { tile: t, .. } => {
                    coords.extend(kernel.tiles[*t].axes.iter().copied());
                }
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
            coords.sort();
            coords.dedup();
            self.expr(f, &coords);
        }
        self.nodes(&s.body);
        self.around.pop();
        // A stream may have no step: only what held values before certainly does after.
        let after: BTreeSet<TileId> = before.intersection(&self.defined).copied().collect();
        self.defined = after.into_iter().filter(|t| !has_axis(t)).collect();
    }

    /// Whether the axis has a present block here.
    fn usable(&mut self, a: AxisId) {
        let kind = self.kernel.axes[a].kind;
        if kind == AxisKind::Stream && !self.around.iter().any(|(x, _)| *x == a) {
            self.fault(format!("stream axis {} is used outside a stream over it", self.axis(a)));
        }
    }

    fn read(&mut self, t: TileId) {
        if !self.defined.contains(&t) {
            self.fault(format!("tile {} is read before it is written", self.tile(t)));
            self.defined.insert(t);
        }
    }

    /// Checks an expression used at the points of `axes`.
    fn expr(&mut self, root: ExprId, axes: &[AxisId]) {
        for a in axes {
            self.usable(*a);
        }
        let mut reached = Vec::new();
        self.kernel.walk(root, &mut |id, _| reached.push(id));
        reached.sort();
        reached.dedup();
        for id in reached {
            match &self.kernel.exprs[id] {
                Expr::Coord(a) => self.point(*a, axes),
                Expr::Tile(t) => {
                    self.read(*t);
                    for a in &self.kernel.tiles[*t].axes {
                        self.point(*a, axes);
                    }
                }
                Expr::TileAt { tile, at } => {
                    self.read(*tile);
                    for (own, p) in self.kernel.tiles[*tile].axes.iter().zip(at) {
                        let x = &self.kernel.axes[*own];
                        let right = match p {
                            Place::Axis(a) => {
                                self.point(*a, axes);
                                own == a || (x.kind == AxisKind::Inner && x.extent == self.kernel.axes[*a].extent)
                            }
                            Place::At(c) => x.kind == AxisKind::Inner && !matches!(x.extent, Size::Const(n) if *c >= n),
                        };
                        if !right {
                            let (tile, axis) = (self.tile(*tile), &x.name);
                            self.fault(format!(
                                "tile {tile} is read at another place of {axis}, which must be an inner axis of the \
                                 same extent that has that place"
                            ));
                        }
                    }
                }
                Expr::Read { buffer, at } => {
                    self.array(*buffer);
                    self.integers(at);
                }
                Expr::Int(_)
                | Expr::Float(_)
                | Expr::Size(_)
                | Expr::Unary(..)
                | Expr::Binary(..)
                | Expr::Select(..)
                | Expr::Cast(..)
                | Expr::Rand(_) => {}
            }
        }
    }

    /// Whether coordinate `a` has one value at a point of `axes`: it is one of them, or a sequential stream or the task
    /// fixes it.
    fn point(&mut self, a: AxisId, axes: &[AxisId]) {
        self.usable(a);
        if !axes.contains(&a) && !self.around.contains(&(a, true)) && self.kernel.ordered != Some(a) {
            self.fault(format!("axis {} is not one of the points' axes", self.axis(a)));
        }
    }

    fn integers(&mut self, at: &[ExprId]) {
        if at.iter().any(|e| !self.integer[e.index()]) {
            self.fault("a position in an array is not an integer");
        }
    }

    /// Checks a read of an array.
    fn array(&mut self, b: BufferId) {
        let buffer = &self.plan.buffers[b];
        if matches!(buffer.kind, BufferKind::Workspace | BufferKind::Output) {
            let mut own = false;
            self.kernel.for_each_op(&mut |op, _| own |= matches!(op, Op::Store { buffer, .. } if *buffer == b));
            if !own && !self.stored.contains(&b.index()) {
                self.fault(format!("array {} is read but no kernel up to here stores it", buffer.name));
            }
        }
    }

    fn write(&mut self, t: TileId) {
        for a in &self.kernel.tiles[t].axes {
            self.usable(*a);
        }
        self.defined.insert(t);
    }

    fn op(&mut self, op: &'a Op) {
        let kernel = self.kernel;
        match op {
            Op::Load { out, buffer, at } => {
                self.array(*buffer);
                self.integers(at);
                for e in at {
                    self.expr(*e, &kernel.tiles[*out].axes);
                }
                self.write(*out);
            }
            Op::Store { buffer, at, axes, value, join: _, when } => {
                if self.plan.buffers[*buffer].kind == BufferKind::Input {
                    self.fault(format!("input {} is stored to", self.plan.buffers[*buffer].name));
                }
                self.integers(at);
                for e in at.iter().chain([value]).chain(when) {
                    self.expr(*e, axes);
                }
            }
            Op::Map { out, value } => {
                self.expr(*value, &kernel.tiles[*out].axes);
                self.write(*out);
            }
            Op::Reduce { out, op, value, over, carry } => {
                let axes = &kernel.tiles[out[0]].axes;
                self.over(axes, over);
                let all: Vec<AxisId> = axes.iter().chain(over).copied().collect();
                self.expr(*value, &all);
                let positions = if op.selects_argument() { out.last() } else { None };
                if out.len() > if op.selects_argument() { 2 } else { 1 } {
                    self.fault(format!("{} writes {} tiles", op.name(), out.len()));
                }
                if positions.is_some_and(|t| !kernel.tiles[*t].dtype.is_int()) {
                    self.fault(format!("{} writes positions to a tile that is not of an integer type", op.name()));
                }
                if out.iter().any(|t| kernel.tiles[*t].axes != *axes) {
                    self.fault("the two tiles written have different axes");
                }
                if *carry {
                    if op.selects_argument() && out.len() == 1 {
                        self.fault("a carried argument selection needs the tile of values too");
                    }
                    out.iter().for_each(|t| self.read(*t));
                }
                out.iter().for_each(|t| self.write(*t));
            }
            Op::Contract { out, a, b, over, carry } => {
                self.read(*a);
                self.read(*b);
                if *carry {
                    self.read(*out);
                }
                let axes = &kernel.tiles[*out].axes;
                self.over(axes, over);
                let (ta, tb) = (&kernel.tiles[*a].axes, &kernel.tiles[*b].axes);
                for x in ta.iter().chain(tb) {
                    if !axes.contains(x) && !over.contains(x) {
                        self.fault(format!("operand axis {} is neither kept nor summed", self.axis(*x)));
                    }
                }
                for x in axes.iter().chain(over) {
                    if !ta.contains(x) && !tb.contains(x) {
                        self.fault(format!("neither operand has axis {}", self.axis(*x)));
                    }
                }
                self.write(*out);
            }
            Op::Scan { out, op, value, along, carry } => {
                let axes = &kernel.tiles[*out].axes;
                if !axes.contains(along) {
                    self.fault(format!("the scanned tile lacks axis {}", self.axis(*along)));
                }
                if op.selects_argument() {
                    self.fault(format!("{} cannot be scanned", op.name()));
                }
                self.expr(*value, axes);
                if let Some(t) = carry {
                    self.read(*t);
                    let rest: BTreeSet<_> = axes.iter().filter(|a| *a != along).collect();
                    if kernel.tiles[*t].axes.iter().collect::<BTreeSet<_>>() != rest {
                        self.fault(format!(
                            "the carried tile {} does not have the scanned tile's other axes",
                            self.tile(*t)
                        ));
                    }
                    self.write(*t);
                }
                self.write(*out);
            }
        }
    }

    /// Checks the axes a reduction binds.
    fn over(&mut self, kept: &[AxisId], over: &[AxisId]) {
        for a in over {
            self.usable(*a);
            if kept.contains(a) {
                self.fault(format!("axis {} is both kept and summed", self.axis(*a)));
            }
            if self.kernel.axes[*a].kind == AxisKind::Grid {
                self.fault(format!("grid axis {} is reduced within a task", self.axis(*a)));
            }
        }
    }
}
