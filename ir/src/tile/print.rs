//! The text of the tile IR; [`super::parse`] reads it back and printing what was read gives the same text.
//!
//! Invariant: printing never fails, also for plans the verifier refuses (bad ids print as `?`), so that a failing
//! pass can be shown. Arrays are read as `Q[..]` (scalars `s[]`), so tiles and arrays may share names; a bare word is
//! an axis (its coordinate), a tile, or a rank.

use std::fmt::{self, Write};

use super::{
    Axis, AxisId, AxisKind, Buffer, BufferId, BufferKind, Expr, ExprId, Kernel, Node, Op, Place, Plan, Space, Stream,
    TileId,
};
use crate::arena::Arena;
use crate::cascade::{Rank, RankId, Size};
use crate::ops::BinaryOp;

impl BufferKind {
    /// Its keyword.
    pub fn name(self) -> &'static str {
        match self {
            BufferKind::Input => "input",
            BufferKind::InOut => "inout",
            BufferKind::Output => "output",
            BufferKind::Workspace => "workspace",
        }
    }
}

impl AxisKind {
    /// Its keyword.
    pub fn name(self) -> &'static str {
        match self {
            AxisKind::Grid => "grid",
            AxisKind::Stream => "stream",
            AxisKind::Inner => "inner",
        }
    }
}

impl Space {
    /// Every space.
    pub const ALL: [Space; 5] = [Space::Direct, Space::Registers, Space::Shared, Space::Scratch, Space::Packed];

    /// Its keyword.
    pub fn name(self) -> &'static str {
        match self {
            Space::Direct => "direct",
            Space::Registers => "registers",
            Space::Shared => "shared",
            Space::Scratch => "scratch",
            Space::Packed => "packed",
        }
    }
}

/// How strongly an operator binds; higher binds tighter.
pub(super) fn precedence(op: BinaryOp) -> u8 {
    use BinaryOp::*;
    match op {
        Or => 1,
        And => 2,
        Lt | Le | Gt | Ge | Eq | Ne => 3,
        Add | Sub => 4,
        Mul | Div | Mod => 5,
        Pow | Min | Max => 9,
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.exact { "@exact\n" } else { "" })?;
        write!(f, "plan {}[", self.name)?;
        for (i, (_, r)) in self.ranks.iter().enumerate() {
            f.write_str(if i == 0 { "" } else { ", " })?;
            f.write_str(&r.name)?;
            if let Some(n) = r.fixed {
                write!(f, " = {n}")?;
            }
        }
        f.write_str("] {\n")?;
        for (_, b) in self.buffers.iter() {
            f.write_str("    ")?;
            buffer(f, b, &self.ranks)?;
            f.write_char('\n')?;
        }
        for k in &self.kernels {
            f.write_char('\n')?;
            Printer { plan: self, kernel: k }.kernel(f)?;
        }
        f.write_str("}\n")
    }
}

fn buffer(f: &mut fmt::Formatter<'_>, b: &Buffer, ranks: &Arena<RankId, Rank>) -> fmt::Result {
    write!(f, "{} {}: {}", b.kind.name(), b.name, b.dtype)?;
    if !b.dims.is_empty() {
        f.write_char('[')?;
        for (i, d) in b.dims.iter().enumerate() {
            f.write_str(if i == 0 { "" } else { ", " })?;
            f.write_str(&size_text(d, ranks, 0))?;
        }
        f.write_char(']')?;
    }
    f.write_str(if b.positive { " > 0" } else { "" })
}

/// An extent as text, in parentheses where an operator of strength `around` asks for them.
pub(crate) fn size_text(s: &Size, ranks: &Arena<RankId, Rank>, around: u8) -> String {
    let two = |a: &Size, b: &Size, op: BinaryOp| {
        let p = precedence(op);
        let text = format!("{} {} {}", size_text(a, ranks, p), op.name(), size_text(b, ranks, p + 1));
        if p < around { format!("({text})") } else { text }
    };
    let call =
        |name: &str, a: &Size, b: &Size| format!("{name}({}, {})", size_text(a, ranks, 0), size_text(b, ranks, 0));
    match s {
        Size::Const(n) => n.to_string(),
        Size::Rank(r) => ranks.get(*r).map_or_else(|| "?".to_string(), |r| r.name.clone()),
        Size::Add(a, b) => two(a, b, BinaryOp::Add),
        Size::Sub(a, b) => two(a, b, BinaryOp::Sub),
        Size::Mul(a, b) => two(a, b, BinaryOp::Mul),
        Size::Div(a, b) => two(a, b, BinaryOp::Div),
        Size::CeilDiv(a, b) => call("ceildiv", a, b),
        Size::Min(a, b) => call("min", a, b),
        Size::Max(a, b) => call("max", a, b),
    }
}

/// A float as text that reads back as the same float.
pub(crate) fn float_text(x: f64) -> String {
    if x.is_nan() {
        "nan".to_string()
    } else if x.is_infinite() {
        if x > 0.0 { "inf".to_string() } else { "-inf".to_string() }
    } else {
        format!("{x:?}")
    }
}

/// One expression of a kernel as text.
pub fn expr_text(plan: &Plan, kernel: &Kernel, e: ExprId) -> String {
    Printer { plan, kernel }.expr(e, 0)
}

struct Printer<'a> {
    plan: &'a Plan,
    kernel: &'a Kernel,
}

impl Printer<'_> {
    fn axis(&self, a: AxisId) -> &str {
        self.kernel.axes.get(a).map_or("?", |a| &a.name)
    }

    fn tile(&self, t: TileId) -> &str {
        self.kernel.tiles.get(t).map_or("?", |t| &t.name)
    }

    fn buffer(&self, b: BufferId) -> &str {
        self.plan.buffers.get(b).map_or("?", |b| &b.name)
    }

    fn axes(&self, axes: &[AxisId]) -> String {
        axes.iter().map(|a| self.axis(*a)).collect::<Vec<_>>().join(", ")
    }

    fn kernel(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "    kernel {} {{", self.kernel.name)?;
        for (id, a) in self.kernel.axes.iter() {
            let Axis { name, extent, kind, block } = a;
            write!(f, "        {} {name} in {}", kind.name(), size_text(extent, &self.plan.ranks, 0))?;
            if let Some(b) = block {
                write!(f, " block {b}")?;
            }
            f.write_str(if self.kernel.ordered == Some(id) { " ordered\n" } else { "\n" })?;
        }
        for (_, t) in self.kernel.tiles.iter() {
            write!(f, "        tile {}: {}", t.name, t.dtype)?;
            if !t.axes.is_empty() {
                write!(f, "[{}]", self.axes(&t.axes))?;
            }
            if let Some(s) = t.space {
                write!(f, " in {}", s.name())?;
            }
            writeln!(f, "{}", if t.exact { " exact" } else { "" })?;
        }
        self.nodes(f, &self.kernel.body, 8)?;
        f.write_str("    }\n")
    }

    fn nodes(&self, f: &mut fmt::Formatter<'_>, nodes: &[Node], indent: usize) -> fmt::Result {
        for node in nodes {
            match node {
                Node::Op(op) => writeln!(f, "{:indent$}{}", "", self.op(op))?,
                Node::Stream(s) => {
                    let Stream { axis, reverse, sequential, filter, body } = s;
                    write!(f, "{:indent$}for {}", "", self.axis(*axis))?;
                    f.write_str(if *reverse { " rev" } else { "" })?;
                    f.write_str(if *sequential { " sequential" } else { "" })?;
                    if let Some(e) = filter {
                        write!(f, " where {}", self.expr(*e, 0))?;
                    }
                    f.write_str(" {\n")?;
                    self.nodes(f, body, indent + 4)?;
                    writeln!(f, "{:indent$}}}", "")?;
                }
            }
        }
        Ok(())
    }

    fn op(&self, op: &Op) -> String {
        match op {
            Op::Load { out, buffer, at } => {
                format!("{} = load {}[{}]", self.tile(*out), self.buffer(*buffer), self.list(at))
            }
            Op::Store { buffer, at, axes, value, join, when } => {
                let join = join.map_or_else(String::new, |j| format!(" join {}", j.name()));
                let when = when.map_or_else(String::new, |w| format!(" when {}", self.expr(w, 0)));
                let over = if axes.is_empty() { String::new() } else { format!(" over {}", self.axes(axes)) };
                let value = self.expr(*value, 0);
                format!("store {}[{}]{join} = {value}{over}{when}", self.buffer(*buffer), self.list(at))
            }
            Op::Map { out, value } => format!("{} = {}", self.tile(*out), self.expr(*value, 0)),
            Op::Reduce { out, op, value, over, carry } => {
                let names = out.iter().map(|t| self.tile(*t)).collect::<Vec<_>>().join(", ");
                let carry = if *carry { "carry " } else { "" };
                format!("{names} = {carry}reduce {}({}) {}", op.name(), self.axes(over), self.expr(*value, 0))
            }
            Op::Contract { out, a, b, over, carry } => {
                let carry = if *carry { "carry " } else { "" };
                let (out, a, b) = (self.tile(*out), self.tile(*a), self.tile(*b));
                format!("{out} = {carry}contract({}) {a}, {b}", self.axes(over))
            }
            Op::Scan { out, op, value, along, carry } => {
                let from = carry.map_or_else(String::new, |t| format!(" from {}", self.tile(t)));
                let (out, along) = (self.tile(*out), self.axis(*along));
                format!("{out} = scan {}({along}) {}{from}", op.name(), self.expr(*value, 0))
            }
        }
    }

    fn list(&self, es: &[ExprId]) -> String {
        es.iter().map(|e| self.expr(*e, 0)).collect::<Vec<_>>().join(", ")
    }

    fn expr(&self, id: ExprId, around: u8) -> String {
        let Some(e) = self.kernel.exprs.get(id) else { return "?".to_string() };
        let wrap = |p: u8, text: String| if p < around { format!("({text})") } else { text };
        match e {
            Expr::Int(n) => n.to_string(),
            Expr::Float(x) => float_text(*x),
            Expr::Size(s) => size_text(s, &self.plan.ranks, around),
            Expr::Coord(a) => self.axis(*a).to_string(),
            Expr::Tile(t) => self.tile(*t).to_string(),
            Expr::TileAt { tile, at } => {
                let own = self.kernel.tiles.get(*tile).map_or(&[][..], |t| &t.axes);
                let pairs = own.iter().zip(at).filter(|(o, p)| **p != Place::Axis(**o));
                let pairs: Vec<_> = pairs
                    .map(|(o, p)| match p {
                        Place::Axis(a) => format!("{} = {}", self.axis(*o), self.axis(*a)),
                        Place::At(c) => format!("{} = {c}", self.axis(*o)),
                    })
                    .collect();
                format!("{}{{{}}}", self.tile(*tile), pairs.join(", "))
            }
            Expr::Read { buffer, at } => format!("{}[{}]", self.buffer(*buffer), self.list(at)),
            Expr::Unary(op, a) => format!("{}({})", op.name(), self.expr(*a, 0)),
            Expr::Binary(op, a, b) => {
                if op.infix() {
                    let p = precedence(*op);
                    // Comparisons do not chain.
                    let left = if op.is_predicate() && p == 3 { p + 1 } else { p };
                    wrap(p, format!("{} {} {}", self.expr(*a, left), op.name(), self.expr(*b, p + 1)))
                } else {
                    format!("{}({}, {})", op.name(), self.expr(*a, 0), self.expr(*b, 0))
                }
            }
            Expr::Select(c, a, b) => {
                let text = format!("if {} then {} else {}", self.expr(*c, 0), self.expr(*a, 0), self.expr(*b, 0));
                wrap(0, text)
            }
            Expr::Cast(d, a) => format!("{d}({})", self.expr(*a, 0)),
            Expr::Rand(of) => format!("rand({})", self.list(of)),
        }
    }
}
