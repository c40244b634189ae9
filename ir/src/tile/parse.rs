//! Reads the text of the tile IR (the printer's format; blanks and `//` comments are free).
//!
//! ```text
//! plan    = ["@exact"] "plan" NAME "[" rank {"," rank} "]" "{" {buffer} {kernel} "}"
//! rank    = NAME ["=" INT]
//! buffer  = ("input" | "inout" | "output" | "workspace") NAME ":" dtype ["[" size {"," size} "]"] [">" "0"]
//! kernel  = "kernel" NAME "{" {axis} {tile} {node} "}"
//! axis    = ("grid" | "stream" | "inner") NAME "in" size ["block" INT]
//! tile    = "tile" NAME ":" dtype ["[" AXIS {"," AXIS} "]"] ["in" space] ["exact"]
//! node    = "for" AXIS ["rev"] ["sequential"] ["where" expr] "{" {node} "}" | op
//! op      = TILE "=" "load" BUFFER "[" exprs "]"
//!         | "store" BUFFER "[" exprs "]" ["join" REDUCE] "=" expr ["over" axes] ["when" expr]
//!         | TILE ["," TILE] "=" ["carry"] "reduce" REDUCE "(" axes ")" expr
//!         | TILE "=" ["carry"] "contract" "(" axes ")" TILE "," TILE
//!         | TILE "=" "scan" REDUCE "(" AXIS ")" expr ["from" TILE]
//!         | TILE "=" expr
//! expr    = "if" expr "then" expr "else" expr | infix operators, calls, casts `bf16(x)`, `rand(seed, a, b, c, d)`
//!         | BUFFER "[" exprs "]" | TILE "{" AXIS "=" (AXIS | INT) {","..} "}" | AXIS | TILE | RANK | numbers | inf | nan
//! ```
//! `exact` after a tile says that operands of contractions into it keep their types ([`Tile::exact`]).
//! Invariant: ids in a parsed plan are valid and expressions are stored operands first; `verify` checks the rest.

use std::collections::HashMap;

use super::print::precedence;
use super::{
    Axis, AxisId, AxisKind, Buffer, BufferId, BufferKind, Expr, ExprId, Kernel, Node, Op, Place, Plan, Space, Stream,
    Tile, TileId,
};
use crate::arena::Arena;
use crate::cascade::{Rank, Size};
use crate::diag::{Diagnostic, Span};
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};
use crate::text::Tok;
use crate::text::cursor::Cursor;

/// Nesting of expressions and streams accepted.
const MAX_DEPTH: usize = 200;

/// Reads a plan.
///
/// ```
/// use einfall_ir::tile;
///
/// let text = "plan double[M] {
///     input x: f32[M]
///     output y: f32[M]
///
///     kernel double_0 {
///         grid m in M
///         store y[m] = 2.0 * x[m] over m
///     }
/// }
/// ";
/// let plan = tile::parse::parse(text)?;
/// assert!(tile::verify::verify(&plan).is_ok());
/// assert_eq!(plan.to_string(), text);
/// # Ok::<(), einfall_ir::diag::Diagnostic>(())
/// ```
///
/// # Errors
/// The first syntax error (T0101), unknown name (T0102), repeated name (T0103) or second ordered axis (T0104).
pub fn parse(text: &str) -> Result<Plan, Diagnostic> {
    let mut p = Parser {
        c: Cursor::new(text, "T0101")?,
        plan: Plan {
            name: String::new(),
            exact: false,
            ranks: Arena::new(),
            buffers: Arena::new(),
            kernels: Vec::new(),
        },
        depth: 0,
    };
    p.plan()?;
    Ok(p.plan)
}

struct Parser {
    c: Cursor,
    plan: Plan,
    depth: usize,
}

/// The kernel being read.
struct Scope {
    kernel: Kernel,
    /// Every expression read so far: equal ones are shared.
    known: HashMap<String, ExprId>,
}

fn unknown(kind: &str, name: &str, span: Span) -> Diagnostic {
    Diagnostic::error("T0102", span, format!("there is no {kind} named `{name}`"))
        .help(format!("declare the {kind} before its use"))
}

fn repeated(kind: &str, name: &str, span: Span) -> Diagnostic {
    Diagnostic::error("T0103", span, format!("there are two {kind}s named `{name}`")).help("rename one of them")
}

type Parsed<T> = Result<T, Diagnostic>;

impl Parser {
    fn plan(&mut self) -> Parsed<()> {
        self.c.skip_lines();
        if self.c.eat_sym("@") {
            self.c.word("exact")?;
            self.c.skip_lines();
            self.plan.exact = true;
        }
        self.c.word("plan")?;
        self.plan.name = self.c.ident("a plan name")?.0;
        self.c.sym("[")?;
        while !self.c.eat_sym("]") {
            let (name, span) = self.c.ident("a rank")?;
            if self.plan.ranks.iter().any(|(_, r)| r.name == name) {
                return Err(repeated("rank", &name, span));
            }
            let fixed = if self.c.eat_sym("=") { Some(self.c.count("an extent")?) } else { None };
            self.plan.ranks.push(Rank { name, fixed, span });
            if !self.c.is_sym("]") {
                self.c.sym(",")?;
            }
        }
        self.c.sym("{")?;
        self.c.skip_lines();
        while !self.c.eat_sym("}") {
            let (word, span) = self.c.ident("an array or a kernel")?;
            let kinds = [BufferKind::Input, BufferKind::InOut, BufferKind::Output, BufferKind::Workspace];
            if let Some(kind) = kinds.into_iter().find(|k| k.name() == word) {
                self.buffer(kind)?;
                self.c.line_end()?;
            } else if word == "kernel" {
                self.kernel()?;
                self.c.line_end()?;
            } else {
                return Err(Diagnostic::error("T0101", span, format!("`{word}` does not start an array or a kernel"))
                    .help("write `input`, `inout`, `output`, `workspace` or `kernel`"));
            }
        }
        self.c.skip_lines();
        if *self.c.tok() == Tok::End { Ok(()) } else { Err(self.c.expected("the end of the text")) }
    }

    fn dtype(&mut self) -> Parsed<DType> {
        let (name, span) = self.c.ident("an element type")?;
        DType::from_name(&name).ok_or_else(|| unknown("element type", &name, span))
    }

    fn buffer(&mut self, kind: BufferKind) -> Parsed<()> {
        let (name, span) = self.c.ident("an array name")?;
        if self.plan.buffers.iter().any(|(_, b)| b.name == name) {
            return Err(repeated("array", &name, span));
        }
        self.c.sym(":")?;
        let dtype = self.dtype()?;
        let mut dims = Vec::new();
        if self.c.eat_sym("[") {
            dims = self.list("]", |p| p.size(0))?;
        }
        let positive = self.c.eat_sym(">");
        if positive && self.c.count("0")? != 0 {
            return Err(self.c.expected("0: facts of arrays say that they are positive"));
        }
        self.plan.buffers.push(Buffer { name, dtype, dims, kind, positive });
        Ok(())
    }

    /// Items separated by commas up to `close`.
    fn list<T>(&mut self, close: &str, mut item: impl FnMut(&mut Parser) -> Parsed<T>) -> Parsed<Vec<T>> {
        let mut items = Vec::new();
        while !self.c.eat_sym(close) {
            items.push(item(self)?);
            if !self.c.is_sym(close) {
                self.c.sym(",")?;
            }
        }
        Ok(items)
    }

    fn deeper(&mut self) -> Parsed<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(Diagnostic::error("T0101", self.c.span(), "this text is nested too deeply")
                .help(format!("at most {MAX_DEPTH} levels are read")));
        }
        Ok(())
    }

    /// The infix operator here, if it binds at least as strongly as `min`.
    fn operator(&self, min: u8) -> Option<BinaryOp> {
        let name = match self.c.tok() {
            Tok::Sym(s) => s,
            Tok::Ident(s) => s.as_str(),
            Tok::Int(_) | Tok::Float(_) | Tok::Doc(_) | Tok::ModuleDoc(_) | Tok::Newline | Tok::End => return None,
        };
        BinaryOp::from_name(name).filter(|o| o.infix() && precedence(*o) >= min)
    }

    fn size(&mut self, min: u8) -> Parsed<Size> {
        self.deeper()?;
        let mut left = match self.c.tok().clone() {
            Tok::Int(n) => {
                self.c.advance();
                Size::Const(n as u64)
            }
            Tok::Sym("(") => {
                self.c.advance();
                let inner = self.size(0)?;
                self.c.sym(")")?;
                inner
            }
            Tok::Ident(name) => {
                let span = self.c.span();
                self.c.advance();
                match two_sizes(&name).filter(|_| self.c.is_sym("(")) {
                    Some(make) => {
                        self.c.sym("(")?;
                        let a = self.size(0)?;
                        self.c.sym(",")?;
                        let b = self.size(0)?;
                        self.c.sym(")")?;
                        make(Box::new(a), Box::new(b))
                    }
                    None => Size::Rank(self.rank(&name).ok_or_else(|| unknown("rank", &name, span))?),
                }
            }
            Tok::Float(_) | Tok::Sym(_) | Tok::Doc(_) | Tok::ModuleDoc(_) | Tok::Newline | Tok::End => {
                return Err(self.c.expected("an extent"));
            }
        };
        while let Some(op) = self.operator(min.max(precedence(BinaryOp::Add))) {
            let make = match op {
                BinaryOp::Add => Size::Add,
                BinaryOp::Sub => Size::Sub,
                BinaryOp::Mul => Size::Mul,
                BinaryOp::Div => Size::Div,
                BinaryOp::Mod
                | BinaryOp::Pow
                | BinaryOp::Min
                | BinaryOp::Max
                | BinaryOp::Lt
                | BinaryOp::Le
                | BinaryOp::Gt
                | BinaryOp::Ge
                | BinaryOp::Eq
                | BinaryOp::Ne
                | BinaryOp::And
                | BinaryOp::Or => return Err(self.c.expected("`+`, `-`, `*` or `/`")),
            };
            self.c.advance();
            let right = self.size(precedence(op) + 1)?;
            left = make(Box::new(left), Box::new(right));
        }
        self.depth -= 1;
        Ok(left)
    }

    fn rank(&self, name: &str) -> Option<crate::cascade::RankId> {
        self.plan.ranks.iter().find(|(_, r)| r.name == name).map(|(id, _)| id)
    }

    fn find_buffer(&self, name: &str) -> Option<BufferId> {
        self.plan.buffers.iter().find(|(_, b)| b.name == name).map(|(id, _)| id)
    }

    fn kernel(&mut self) -> Parsed<()> {
        let (name, span) = self.c.ident("a kernel name")?;
        if self.plan.kernels.iter().any(|k| k.name == name) {
            return Err(repeated("kernel", &name, span));
        }
        let mut s = Scope { kernel: Kernel::new(name), known: HashMap::new() };
        self.c.sym("{")?;
        self.c.skip_lines();
        while let Some(kind) = [AxisKind::Grid, AxisKind::Stream, AxisKind::Inner]
            .into_iter()
            .find(|k| self.c.is_word(k.name()) && matches!(self.c.ahead(1), Tok::Ident(_)))
        {
            self.c.advance();
            let (name, span) = self.c.ident("an axis name")?;
            if s.axis(&name).is_some() {
                return Err(repeated("axis", &name, span));
            }
            self.c.word("in")?;
            let extent = self.size(0)?;
            let block = if self.c.eat_word("block") { Some(self.c.count("a block size")?) } else { None };
            let ordered = self.c.eat_word("ordered");
            if ordered && s.kernel.ordered.is_some() {
                let message = "the blocks of a second axis follow each other; those of one can".to_string();
                return Err(Diagnostic::error("T0104", span, message).help("leave out one `ordered`"));
            }
            let axis = s.kernel.axes.push(Axis { name, extent, kind, block });
            s.kernel.ordered = s.kernel.ordered.or(ordered.then_some(axis));
            self.c.line_end()?;
        }
        while self.c.is_word("tile") && matches!(self.c.ahead(1), Tok::Ident(_)) {
            self.c.advance();
            let (name, span) = self.c.ident("a tile name")?;
            if s.tile(&name).is_some() {
                return Err(repeated("tile", &name, span));
            }
            self.c.sym(":")?;
            let dtype = self.dtype()?;
            let axes = if self.c.eat_sym("[") { self.list("]", |p| p.axis(&s))? } else { Vec::new() };
            let mut space = None;
            if self.c.eat_word("in") {
                let (word, span) = self.c.ident("a memory space")?;
                let found = Space::ALL.into_iter().find(|x| x.name() == word);
                space = Some(found.ok_or_else(|| unknown("memory space", &word, span))?);
            }
            let exact = self.c.eat_word("exact");
            s.kernel.tiles.push(Tile { name, dtype, axes, space, exact });
            self.c.line_end()?;
        }
        let body = self.nodes(&mut s)?;
        s.kernel.body = body;
        self.plan.kernels.push(s.kernel);
        Ok(())
    }

    fn axis(&mut self, s: &Scope) -> Parsed<AxisId> {
        let (name, span) = self.c.ident("an axis")?;
        s.axis(&name).ok_or_else(|| unknown("axis", &name, span))
    }

    fn tile(&mut self, s: &Scope) -> Parsed<TileId> {
        let (name, span) = self.c.ident("a tile")?;
        s.tile(&name).ok_or_else(|| unknown("tile", &name, span))
    }

    fn reducer(&mut self) -> Parsed<ReduceOp> {
        let (name, span) = self.c.ident("a reduction")?;
        ReduceOp::from_name(&name).ok_or_else(|| unknown("reduction", &name, span))
    }

    /// Nodes up to and past the closing brace.
    fn nodes(&mut self, s: &mut Scope) -> Parsed<Vec<Node>> {
        self.deeper()?;
        let mut nodes = Vec::new();
        self.c.skip_lines();
        while !self.c.eat_sym("}") {
            if self.c.is_word("for") && matches!(self.c.ahead(1), Tok::Ident(_)) {
                self.c.advance();
                let axis = self.axis(s)?;
                let reverse = self.c.eat_word("rev");
                let sequential = self.c.eat_word("sequential");
                let filter = if self.c.eat_word("where") { Some(self.expr(s, 0)?) } else { None };
                self.c.sym("{")?;
                let body = self.nodes(s)?;
                nodes.push(Node::Stream(Stream { axis, reverse, sequential, filter, body }));
            } else {
                nodes.push(Node::Op(self.op(s)?));
            }
            self.c.line_end()?;
        }
        self.depth -= 1;
        Ok(nodes)
    }

    fn op(&mut self, s: &mut Scope) -> Parsed<Op> {
        if self.c.is_word("store") && matches!(self.c.ahead(1), Tok::Ident(_)) {
            self.c.advance();
            let (buffer, at) = self.access(s)?;
            let join = if self.c.eat_word("join") { Some(self.reducer()?) } else { None };
            self.c.sym("=")?;
            let value = self.expr(s, 0)?;
            let axes = if self.c.eat_word("over") { self.axes(s)? } else { Vec::new() };
            let when = if self.c.eat_word("when") { Some(self.expr(s, 0)?) } else { None };
            return Ok(Op::Store { buffer, at, axes, value, join, when });
        }
        let mut outs = vec![self.tile(s)?];
        if self.c.eat_sym(",") {
            outs.push(self.tile(s)?);
        }
        let span = self.c.span();
        self.c.sym("=")?;
        let out = outs[0];
        let carry = self.c.eat_word("carry");
        if self.c.eat_word("reduce") {
            let op = self.reducer()?;
            self.c.sym("(")?;
            let over = self.list(")", |p| p.axis(s))?;
            let value = self.expr(s, 0)?;
            return Ok(Op::Reduce { out: outs, op, value, over, carry });
        }
        if outs.len() > 1 {
            return Err(Diagnostic::error("T0101", span, "only a reduction writes two tiles")
                .help("write `value, position = reduce argmax(n) ..`"));
        }
        if self.c.eat_word("contract") {
            self.c.sym("(")?;
            let over = self.list(")", |p| p.axis(s))?;
            let a = self.tile(s)?;
            self.c.sym(",")?;
            let b = self.tile(s)?;
            return Ok(Op::Contract { out, a, b, over, carry });
        }
        if carry {
            return Err(self.c.expected("`reduce` or `contract`"));
        }
        if self.c.eat_word("load") {
            let (buffer, at) = self.access(s)?;
            return Ok(Op::Load { out, buffer, at });
        }
        if self.c.eat_word("scan") {
            let op = self.reducer()?;
            self.c.sym("(")?;
            let along = self.axis(s)?;
            self.c.sym(")")?;
            let value = self.expr(s, 0)?;
            let carry = if self.c.eat_word("from") { Some(self.tile(s)?) } else { None };
            return Ok(Op::Scan { out, op, value, along, carry });
        }
        Ok(Op::Map { out, value: self.expr(s, 0)? })
    }

    fn axes(&mut self, s: &Scope) -> Parsed<Vec<AxisId>> {
        let mut axes = vec![self.axis(s)?];
        while self.c.eat_sym(",") {
            axes.push(self.axis(s)?);
        }
        Ok(axes)
    }

    fn access(&mut self, s: &mut Scope) -> Parsed<(BufferId, Vec<ExprId>)> {
        let (name, span) = self.c.ident("an array")?;
        let buffer = self.find_buffer(&name).ok_or_else(|| unknown("array", &name, span))?;
        self.c.sym("[")?;
        let at = self.list("]", |p| p.expr(s, 0))?;
        Ok((buffer, at))
    }

    fn expr(&mut self, s: &mut Scope, min: u8) -> Parsed<ExprId> {
        self.deeper()?;
        let mut left = if self.c.eat_word("if") {
            let c = self.expr(s, 0)?;
            self.c.word("then")?;
            let a = self.expr(s, 0)?;
            self.c.word("else")?;
            let b = self.expr(s, 0)?;
            s.push(Expr::Select(c, a, b))
        } else {
            self.primary(s)?
        };
        while let Some(op) = self.operator(min) {
            self.c.advance();
            let right = self.expr(s, precedence(op) + 1)?;
            left = s.push(Expr::Binary(op, left, right));
        }
        self.depth -= 1;
        Ok(left)
    }

    fn primary(&mut self, s: &mut Scope) -> Parsed<ExprId> {
        let negative = self.c.eat_sym("-");
        let span = self.c.span();
        let tok = self.c.tok().clone();
        match tok {
            Tok::Int(n) => {
                self.c.advance();
                Ok(s.push(Expr::Int(if negative { -n } else { n })))
            }
            Tok::Float(x) => {
                self.c.advance();
                Ok(s.push(Expr::Float(if negative { -x } else { x })))
            }
            Tok::Ident(name) if name == "inf" || (name == "nan" && !negative) => {
                self.c.advance();
                let x = if name == "nan" { f64::NAN } else { f64::INFINITY };
                Ok(s.push(Expr::Float(if negative { -x } else { x })))
            }
            _ if negative => Err(self.c.expected("a number after `-`").help("write `neg(x)` for other values")),
            Tok::Sym("(") => {
                self.c.advance();
                let inner = self.expr(s, 0)?;
                self.c.sym(")")?;
                Ok(inner)
            }
            Tok::Ident(name) => {
                if matches!(self.c.ahead(1), Tok::Sym("(")) {
                    return self.call(s);
                }
                if matches!(self.c.ahead(1), Tok::Sym("[")) {
                    let (buffer, at) = self.access(s)?;
                    return Ok(s.push(Expr::Read { buffer, at }));
                }
                self.c.advance();
                if let Some(axis) = s.axis(&name) {
                    return Ok(s.push(Expr::Coord(axis)));
                }
                if let Some(tile) = s.tile(&name) {
                    if !self.c.eat_sym("{") {
                        return Ok(s.push(Expr::Tile(tile)));
                    }
                    let own = s.kernel.tiles[tile].axes.clone();
                    let mut at: Vec<Place> = own.iter().map(|a| Place::Axis(*a)).collect();
                    self.list("}", |p| {
                        let span = p.c.span();
                        let from = p.axis(s)?;
                        p.c.sym("=")?;
                        let to = if matches!(p.c.tok(), Tok::Int(_)) {
                            Place::At(p.c.count("a coordinate")?)
                        } else {
                            Place::Axis(p.axis(s)?)
                        };
                        let Some(i) = own.iter().position(|a| *a == from) else {
                            return Err(Diagnostic::error("T0102", span, format!("tile `{name}` has no such axis"))
                                .help("rename an axis of the tile"));
                        };
                        at[i] = to;
                        Ok(())
                    })?;
                    return Ok(s.push(Expr::TileAt { tile, at }));
                }
                match self.rank(&name) {
                    Some(r) => Ok(s.push(Expr::Size(Size::Rank(r)))),
                    None => Err(unknown("axis, tile or rank", &name, span)),
                }
            }
            Tok::Sym(_) | Tok::Doc(_) | Tok::ModuleDoc(_) | Tok::Newline | Tok::End => {
                Err(self.c.expected("an expression"))
            }
        }
    }

    fn call(&mut self, s: &mut Scope) -> Parsed<ExprId> {
        let (name, span) = self.c.ident("a function")?;
        if name == "ceildiv" {
            self.c.sym("(")?;
            let a = self.size(0)?;
            self.c.sym(",")?;
            let b = self.size(0)?;
            self.c.sym(")")?;
            return Ok(s.push(Expr::Size(Size::CeilDiv(Box::new(a), Box::new(b)))));
        }
        self.c.sym("(")?;
        let args = self.list(")", |p| p.expr(s, 0))?;
        if let ("rand", Ok(of)) = (name.as_str(), args.clone().try_into()) {
            return Ok(s.push(Expr::Rand(of)));
        }
        let binary = BinaryOp::from_name(&name).filter(|o| !o.infix());
        let e = match (args.as_slice(), UnaryOp::from_name(&name), DType::from_name(&name), binary) {
            ([a], Some(op), _, _) => Expr::Unary(op, *a),
            ([a], None, Some(d), _) => Expr::Cast(d, *a),
            ([a, b], _, _, Some(op)) => Expr::Binary(op, *a, *b),
            _ => return Err(unknown(&format!("function of {} arguments", args.len()), &name, span)),
        };
        Ok(s.push(e))
    }
}

/// Makes an extent of two.
type MakeSize = fn(Box<Size>, Box<Size>) -> Size;

/// The two-argument extents that are written as calls.
fn two_sizes(name: &str) -> Option<MakeSize> {
    match name {
        "ceildiv" => Some(Size::CeilDiv),
        "min" => Some(Size::Min),
        "max" => Some(Size::Max),
        _ => None,
    }
}

impl Scope {
    fn axis(&self, name: &str) -> Option<AxisId> {
        self.kernel.axes.iter().find(|(_, a)| a.name == name).map(|(id, _)| id)
    }

    fn tile(&self, name: &str) -> Option<TileId> {
        self.kernel.tiles.iter().find(|(_, t)| t.name == name).map(|(id, _)| id)
    }

    fn push(&mut self, e: Expr) -> ExprId {
        let key = format!("{e:?}");
        if let Some(id) = self.known.get(&key) {
            return *id;
        }
        let id = self.kernel.exprs.push(e);
        self.known.insert(key, id);
        id
    }
}
