//! Tokens to the syntax tree.
//!
//! Recursive descent written by hand over winnow's tokens: after an error it knows which bracket and statement it is in,
//! so it reports one message a statement and goes on with the next. Invariants: it never panics and never recurses
//! deeper than [`MAX_DEPTH`]; a file without diagnostics is complete.

use super::syntax::*;
use super::{BlockScale, PackOrder, Storage};
use crate::diag::{Diagnostic, Span};
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};
use crate::text::{Comment, Tok, Token, lex};

/// The deepest expression accepted, in nodes from root to leaf.
pub const MAX_DEPTH: u32 = 100;
/// The most diagnostics reported at once.
pub const MAX_DIAGNOSTICS: usize = 100;

/// Names that cannot be given to tensors, indices or functions.
pub const KEYWORDS: [&str; 20] = [
    "cascade", "fn", "monoid", "iter", "in", "where", "else", "then", "if", "for", "require", "ragged", "inout", "and",
    "or", "not", "true", "false", "inf", "nan",
];

/// A parsed text: the tree, its comments and what was wrong.
#[derive(Clone, Debug, Default)]
pub struct Parsed {
    /// The tree; items with errors are left out.
    pub file: File,
    /// Comments in order.
    pub comments: Vec<Comment>,
    /// Errors in order.
    pub diagnostics: Vec<Diagnostic>,
}

/// Reads `source` into a syntax tree.
pub fn parse_file(source: &str) -> Parsed {
    let lexed = lex(source);
    let mut p =
        Parser { tokens: lexed.tokens, pos: 0, depth: 0, diagnostics: lexed.diagnostics, unreadable: Vec::new() };
    let file = p.file();
    p.diagnostics.sort_by_key(|d| d.primary.0.start);
    // What a bracket without a partner makes unreadable on its line, or leaves open, is the same mistake.
    let line_end = |at: u32| source[at as usize..].find('\n').map_or(source.len(), |n| at as usize + n) as u32;
    let bad: Vec<(u32, u32)> = p
        .diagnostics
        .iter()
        .filter(|d| matches!(d.code, "E0102" | "E0104" | "E0105"))
        .map(|d| (d.primary.0.start, line_end(d.primary.0.start)))
        .collect();
    let open_brace = p.diagnostics.iter().any(|d| d.code == "E0104" && d.message.starts_with("`{`"));
    p.diagnostics.retain(|d| {
        let same_line = bad.iter().any(|(from, to)| (*from..=*to).contains(&d.primary.0.start));
        d.code != "E0106" || !(same_line || open_brace && d.message.starts_with("expected `}`"))
    });
    Parsed { file, comments: lexed.comments, diagnostics: p.diagnostics }
}

/// An error has been recorded; the caller recovers at its statement.
struct Failed;
type Parse<T> = Result<T, Failed>;

struct Parser {
    tokens: Vec<Token>,
    pos: usize,
    depth: u32,
    diagnostics: Vec<Diagnostic>,
    /// Tensors assigned by the failed statements of the present cascade.
    unreadable: Vec<String>,
}

/// Reducer, whether it is a scan.
fn reducer_of(name: &str) -> Option<(ReduceOp, bool)> {
    match (ReduceOp::from_name(name), name.strip_prefix("cum").and_then(ReduceOp::from_name)) {
        (Some(op), _) => Some((op, false)),
        (None, Some(op)) => Some((op, true)),
        (None, None) => None,
    }
}

impl Parser {
    fn peek(&self) -> &Tok {
        &self.tokens[self.pos].tok
    }

    fn peek_at(&self, ahead: usize) -> &Tok {
        &self.tokens[(self.pos + ahead).min(self.tokens.len() - 1)].tok
    }

    fn span(&self) -> Span {
        self.tokens[self.pos].span
    }

    fn prev_span(&self) -> Span {
        self.tokens[self.pos.saturating_sub(1)].span
    }

    fn bump(&mut self) {
        if self.pos + 1 < self.tokens.len() {
            self.pos += 1;
        }
    }

    fn at_sym(&self, s: &str) -> bool {
        matches!(self.peek(), Tok::Sym(t) if *t == s)
    }

    fn at_word(&self, w: &str) -> bool {
        matches!(self.peek(), Tok::Ident(t) if t == w)
    }

    fn eat_sym(&mut self, s: &str) -> bool {
        let yes = self.at_sym(s);
        if yes {
            self.bump();
        }
        yes
    }

    fn eat_word(&mut self, w: &str) -> bool {
        let yes = self.at_word(w);
        if yes {
            self.bump();
        }
        yes
    }

    fn error(&mut self, d: Diagnostic) -> Failed {
        if self.diagnostics.len() < MAX_DIAGNOSTICS {
            self.diagnostics.push(d);
        }
        Failed
    }

    fn unexpected(&mut self, wanted: &str, help: &str) -> Failed {
        let found = self.peek().to_string();
        let span = match self.peek() {
            Tok::Newline | Tok::End => Span { start: self.prev_span().end, end: self.prev_span().end },
            _ => self.span(),
        };
        let d = Diagnostic::error("E0106", span, format!("expected {wanted}, found {found}"))
            .label(format!("{wanted} goes here"));
        let d = if help.is_empty() { d } else { d.help(help) };
        self.error(d)
    }

    fn expect(&mut self, s: &str, help: &str) -> Parse<Span> {
        let span = self.span();
        if self.eat_sym(s) { Ok(span) } else { Err(self.unexpected(&format!("`{s}`"), help)) }
    }

    fn skip_newlines(&mut self) {
        while *self.peek() == Tok::Newline {
            self.bump();
        }
    }

    fn name(&mut self, what: &str) -> Parse<Ident> {
        let span = self.span();
        match self.peek().clone() {
            Tok::Ident(name) if KEYWORDS.contains(&name.as_str()) => Err(self.error(
                Diagnostic::error("E0107", span, format!("`{name}` is a keyword, not {what}"))
                    .help("choose another name"),
            )),
            Tok::Ident(name) => {
                self.bump();
                Ok(Ident { name, span })
            }
            _ => Err(self.unexpected(what, "")),
        }
    }

    fn docs(&mut self) -> Vec<String> {
        let mut docs = Vec::new();
        while let Tok::Doc(text) = self.peek() {
            docs.push(text.clone());
            self.bump();
            self.skip_newlines();
        }
        docs
    }

    fn file(&mut self) -> File {
        let mut file = File::default();
        loop {
            self.skip_newlines();
            while let Tok::ModuleDoc(text) = self.peek() {
                file.docs.push(text.clone());
                self.bump();
                self.skip_newlines();
            }
            if *self.peek() == Tok::End {
                break;
            }
            let before = self.pos;
            match self.item() {
                Ok(item) => file.items.push(item),
                Err(Failed) => self.recover_item(before),
            }
        }
        file
    }

    /// Skips to the next token that can begin an item.
    fn recover_item(&mut self, before: usize) {
        if self.pos == before {
            self.bump();
        }
        loop {
            match self.peek() {
                Tok::End => return,
                Tok::Ident(w) if matches!(w.as_str(), "cascade" | "fn" | "monoid") => return,
                _ => self.bump(),
            }
        }
    }

    fn item(&mut self) -> Parse<Item> {
        let docs = self.docs();
        let start = self.span();
        let mut exact = false;
        while self.eat_sym("@") {
            let span = self.span();
            let attribute = self.name("an attribute")?;
            if attribute.name != "exact" {
                return Err(self.error(
                    Diagnostic::error("E0108", span, format!("there is no attribute `@{}`", attribute.name))
                        .help("write `@exact` to forbid default rounding points"),
                ));
            }
            exact = true;
            self.skip_newlines();
        }
        match self.peek() {
            Tok::Ident(w) if w == "cascade" => self.cascade(docs, exact, start).map(Item::Cascade),
            Tok::Ident(w) if w == "fn" && !exact => self.function(docs).map(Item::Function),
            Tok::Ident(w) if w == "monoid" && !exact => self.monoid(docs).map(Item::Monoid),
            _ => {
                Err(self
                    .unexpected("`cascade`, `fn` or `monoid`", "a file is a list of cascades, functions and monoids"))
            }
        }
    }

    /// Items between brackets, separated by commas; a trailing comma is allowed.
    fn list<T>(&mut self, close: &str, help: &str, mut item: impl FnMut(&mut Self) -> Parse<T>) -> Parse<Vec<T>> {
        let mut items = Vec::new();
        while !self.at_sym(close) {
            items.push(item(self)?);
            if !self.eat_sym(",") {
                break;
            }
        }
        self.expect(close, help)?;
        Ok(items)
    }

    fn function(&mut self, docs: Vec<String>) -> Parse<Function> {
        let start = self.span();
        self.bump();
        let name = self.name("a function name")?;
        self.expect("(", "write `fn f(x) = ..`")?;
        let params = self.list(")", "", |p| p.name("a parameter name"))?;
        self.expect("=", "write `fn f(x) = ..`")?;
        let body = self.expr()?;
        self.end_of_statement()?;
        Ok(Function { docs, name, params, span: start.to(body.span), body })
    }

    fn monoid(&mut self, docs: Vec<String>) -> Parse<Monoid> {
        const HELP: &str = "write `monoid m(a, b) { identity = (0, 0); combine(x, y) = (x.a + y.a, x.b + y.b) }`";
        let start = self.span();
        self.bump();
        let name = self.name("a monoid name")?;
        self.expect("(", HELP)?;
        let fields = self.list(")", HELP, |p| p.name("a component name"))?;
        self.expect("{", HELP)?;
        self.skip_newlines();
        if !self.eat_word("identity") {
            return Err(self.unexpected("`identity`", HELP));
        }
        self.expect("=", HELP)?;
        let identity = self.tuple_items()?;
        self.end_of_statement()?;
        self.skip_newlines();
        if !self.eat_word("combine") {
            return Err(self.unexpected("`combine`", HELP));
        }
        self.expect("(", HELP)?;
        let left = self.name("the name of the left value")?;
        self.expect(",", HELP)?;
        let right = self.name("the name of the right value")?;
        self.expect(")", HELP)?;
        self.expect("=", HELP)?;
        let combine = self.tuple_items()?;
        self.end_of_statement()?;
        self.skip_newlines();
        let end = self.expect("}", HELP)?;
        Ok(Monoid { docs, name, fields, identity, args: (left, right), combine, span: start.to(end) })
    }

    fn tuple_items(&mut self) -> Parse<Vec<Expr>> {
        let e = self.expr()?;
        Ok(match e.kind {
            ExprKind::Tuple(items) => items,
            _ => vec![e],
        })
    }

    fn cascade(&mut self, docs: Vec<String>, exact: bool, start: Span) -> Parse<Cascade> {
        const HELP: &str = "write `cascade name[M, K](A: f32[M,K]) -> (Y: f32[M]) { .. }`";
        self.bump();
        let name = self.name("a cascade name")?;
        let ranks = if self.eat_sym("[") { self.list("]", HELP, Self::rank)? } else { Vec::new() };
        self.expect("(", HELP)?;
        let params = self.list(")", HELP, Self::param)?;
        self.expect("->", HELP)?;
        self.expect("(", HELP)?;
        let outputs = self.list(")", HELP, Self::output)?;
        self.expect("{", HELP)?;
        let body = self.block(|p, docs| p.stmt(docs));
        let close = self.expect("}", "close the cascade's body")?;
        let unreadable = std::mem::take(&mut self.unreadable);
        Ok(Cascade { docs, exact, name, ranks, params, outputs, body, unreadable, span: start.to(close), close })
    }

    /// Statements up to a closing brace, each recovered by itself.
    fn block<T>(&mut self, mut stmt: impl FnMut(&mut Self, Vec<String>) -> Parse<T>) -> Vec<T> {
        let mut body = Vec::new();
        loop {
            self.skip_newlines();
            if self.at_sym("}") || *self.peek() == Tok::End {
                return body;
            }
            // A closing brace is missing when the next item begins.
            if matches!(self.peek(), Tok::Ident(w) if matches!(w.as_str(), "cascade" | "monoid" | "fn")) {
                return body;
            }
            let before = self.pos;
            let docs = self.docs();
            match stmt(self, docs) {
                Ok(s) => body.push(s),
                Err(Failed) => self.recover_stmt(before),
            }
        }
    }

    /// Skips to the end of the statement; what it would have assigned is known to those who read it.
    fn recover_stmt(&mut self, before: usize) {
        self.skip_statement(before);
        let skipped = &self.tokens[before..self.pos];
        for (k, t) in skipped.iter().enumerate() {
            let Tok::Ident(name) = &t.tok else { continue };
            let accessed = matches!(skipped.get(k + 1), Some(Token { tok: Tok::Sym("[" | "=" | "+=" | "*="), .. }));
            let segment = k > 0 && skipped[k - 1].tok == Tok::Ident("as".to_string());
            if accessed || segment {
                self.unreadable.push(name.clone());
            }
        }
    }

    /// Skips to the end of the statement, over nested blocks.
    fn skip_statement(&mut self, before: usize) {
        let mut nested = 0usize;
        // Braces opened by the failed statement before the error count too.
        for t in &self.tokens[before..self.pos] {
            match t.tok {
                Tok::Sym("{") => nested += 1,
                Tok::Sym("}") => nested = nested.saturating_sub(1),
                _ => {}
            }
        }
        if self.pos == before {
            self.bump();
        }
        loop {
            match self.peek() {
                Tok::End => return,
                Tok::Newline if nested == 0 => return,
                Tok::Sym("{") => nested += 1,
                Tok::Sym("}") if nested == 0 => return,
                Tok::Sym("}") => nested -= 1,
                _ => {}
            }
            self.bump();
        }
    }

    fn rank(&mut self) -> Parse<(Ident, Option<u64>)> {
        let name = self.name("a rank")?;
        if !name.name.starts_with(|c: char| c.is_ascii_uppercase()) {
            return Err(self.error(
                Diagnostic::error(
                    "E0109",
                    name.span,
                    format!("a rank begins with a capital, `{}` does not", name.name),
                )
                .help(format!("write `{}`", name.name.to_ascii_uppercase())),
            ));
        }
        if !self.eat_sym("=") {
            return Ok((name, None));
        }
        match *self.peek() {
            Tok::Int(n) => {
                self.bump();
                Ok((name, Some(n as u64)))
            }
            _ => Err(self.unexpected("an extent", "a rank's extent is an integer: `E = 128`")),
        }
    }

    fn dtype(&mut self) -> Parse<DType> {
        let span = self.span();
        let word = match self.peek() {
            Tok::Ident(w) => w.clone(),
            _ => return Err(self.unexpected("a type", "types are `bf16[M,K]`, or `f32` for a scalar")),
        };
        match DType::from_name(&word) {
            Some(d) => {
                self.bump();
                Ok(d)
            }
            None => {
                let all: Vec<_> = DType::ALL.iter().map(|d| d.name()).collect();
                Err(self.error(
                    Diagnostic::error("E0110", span, format!("there is no type `{word}`"))
                        .help(format!("the types are {}", all.join(", "))),
                ))
            }
        }
    }

    fn storage(&mut self) -> Parse<Storage> {
        let mut storage = Storage::default();
        loop {
            if self.at_word("packed") {
                self.bump();
                self.expect("(", "write `packed(low)` or `packed(high)`")?;
                storage.packing = Some(if self.eat_word("low") {
                    PackOrder::LowFirst
                } else if self.eat_word("high") {
                    PackOrder::HighFirst
                } else {
                    return Err(self.unexpected(
                        "`low` or `high`",
                        "`packed(low)` puts even elements in the low bits, `packed(high)` in the high bits",
                    ));
                });
                self.expect(")", "")?;
            } else if self.at_word("scaled") {
                const HELP: &str = "write `scaled(f32, 32)`: one f32 scale per 32 elements of the last dimension";
                self.bump();
                self.expect("(", HELP)?;
                let dtype = self.dtype()?;
                self.expect(",", HELP)?;
                let block = match *self.peek() {
                    Tok::Int(n) if n > 0 => n as u64,
                    _ => return Err(self.unexpected("a positive number of elements", HELP)),
                };
                self.bump();
                self.expect(")", HELP)?;
                storage.block_scale = Some(BlockScale { block, dtype });
            } else {
                return Ok(storage);
            }
        }
    }

    fn tensor_type(&mut self) -> Parse<TensorType> {
        let start = self.span();
        let dtype = self.dtype()?;
        let dims = if self.eat_sym("[") { self.list("]", "", Self::expr)? } else { Vec::new() };
        let storage = self.storage()?;
        Ok(TensorType { dtype, dims, storage, span: start.to(self.prev_span()) })
    }

    fn param(&mut self) -> Parse<Param> {
        let docs = self.docs();
        let start = self.span();
        let inout = self.eat_word("inout");
        let name = self.name("a parameter")?;
        self.expect(":", &format!("write `{}: f32[..]`", name.name))?;
        let ty = self.tensor_type()?;
        let default = if self.eat_sym("=") { Some(self.expr()?) } else { None };
        Ok(Param { docs, inout, name, ty, default, span: start.to(self.prev_span()) })
    }

    fn output(&mut self) -> Parse<Output> {
        const HELP: &str = "a slice of a state is `h[1..]`, `h[..T]`, `h[a..b]` or `h[T]`";
        let docs = self.docs();
        let start = self.span();
        let name = self.name("an output")?;
        self.expect(":", &format!("write `{}: f32[..]`", name.name))?;
        let ty = self.tensor_type()?;
        let slice = if self.eat_sym("=") {
            let state = self.name("a state")?;
            self.expect("[", HELP)?;
            let from = if self.at_sym("..") { None } else { Some(self.expr()?) };
            let slice = if self.eat_sym("..") {
                Slice::Points(from, if self.at_sym("]") { None } else { Some(self.expr()?) })
            } else {
                match from {
                    Some(at) => Slice::Point(at),
                    None => return Err(self.unexpected("a point", HELP)),
                }
            };
            self.expect("]", HELP)?;
            Some((state, slice))
        } else {
            None
        };
        Ok(Output { docs, name, ty, slice, span: start.to(self.prev_span()) })
    }

    fn end_of_statement(&mut self) -> Parse<()> {
        match self.peek() {
            Tok::Newline => {
                self.bump();
                Ok(())
            }
            Tok::End | Tok::Sym("}") => Ok(()),
            Tok::Sym("<" | "<=" | ">" | ">=" | "==" | "!=") => {
                let span = self.span();
                Err(self.error(
                    Diagnostic::error("E0111", span, "comparisons do not chain").help("write `a <= b and b < c`"),
                ))
            }
            _ => Err(self.unexpected("the end of the statement", "one statement a line, or `;` between two")),
        }
    }

    fn stmt(&mut self, docs: Vec<String>) -> Parse<Stmt> {
        let start = self.span();
        match self.peek().clone() {
            Tok::Ident(w) if w == "require" => {
                self.bump();
                let mut facts = vec![self.expr()?];
                while self.eat_sym(",") {
                    facts.push(self.expr()?);
                }
                let span = start.to(self.prev_span());
                self.end_of_statement()?;
                Ok(Stmt::Require(facts, span))
            }
            Tok::Ident(w) if w == "ragged" => self.ragged().map(Stmt::Ragged),
            Tok::Ident(w) if w == "iter" => self.iter().map(Stmt::Iter),
            _ => self.einsum(docs).map(Stmt::Einsum),
        }
    }

    fn ragged(&mut self) -> Parse<Ragged> {
        const HELP: &str = "write `ragged n in N by offs as e`, where `offs: i32[X+1]` holds where each segment begins";
        let start = self.span();
        self.bump();
        let index = self.name("an index")?;
        if !self.eat_word("in") {
            return Err(self.unexpected("`in` and a rank", HELP));
        }
        let extent = self.expr()?;
        if !self.eat_word("by") {
            let span = start.to(self.prev_span());
            return Err(self.error(
                Diagnostic::error("E0112", span, format!("ragged index `{}` has no offsets", index.name))
                    .label("where its segments begin is not said")
                    .help(HELP),
            ));
        }
        let offsets = self.name("the tensor of offsets")?;
        if !self.eat_word("as") {
            return Err(self.unexpected("`as` and the segment's name", HELP));
        }
        let segment = self.name("the segment's name")?;
        let span = start.to(segment.span);
        self.end_of_statement()?;
        Ok(Ragged { index, extent, offsets, segment, span })
    }

    fn iter(&mut self) -> Parse<Iter> {
        const HELP: &str = "write `iter t in T { .. }` or `iter t in T rev { .. }`";
        let start = self.span();
        self.bump();
        let index = self.name("an index")?;
        if !self.eat_word("in") {
            return Err(self.unexpected("`in` and a rank", HELP));
        }
        let extent = self.expr()?;
        let rev = self.eat_word("rev");
        self.expect("{", HELP)?;
        let body = self.block(|p, docs| match p.peek() {
            Tok::Ident(w) if matches!(w.as_str(), "iter" | "ragged" | "require") => {
                let w = w.clone();
                let span = p.span();
                Err(p.error(
                    Diagnostic::error("E0113", span, format!("`{w}` does not stand inside `iter`"))
                        .help("move it before the block; one level of iteration is supported"),
                ))
            }
            _ => p.einsum(docs),
        });
        let close = self.expect("}", "close the `iter` block")?;
        Ok(Iter { index, extent, rev, body, span: start.to(close), close })
    }

    fn binder(&mut self) -> Parse<Binder> {
        let index = self.name("an index")?;
        let extent = if self.eat_word("in") { Some(self.expr()?) } else { None };
        Ok(Binder { index, extent })
    }

    fn target(&mut self) -> Parse<Target> {
        let name = self.name("a tensor to assign")?;
        let at = if self.eat_sym("[") { self.list("]", "", Self::expr)? } else { Vec::new() };
        let ty = if self.eat_sym(":") {
            let dtype = self.dtype()?;
            if self.at_sym("[") {
                let span = self.span();
                return Err(self.error(
                    Diagnostic::error("E0114", span, "an assignment declares an element type only")
                        .help(format!("extents follow from the indices: write `{}[..]: {dtype} = ..`", name.name)),
                ));
            }
            Some((dtype, self.storage()?))
        } else {
            None
        };
        let span = name.span.to(self.prev_span());
        Ok(Target { name, at, ty, span })
    }

    fn einsum(&mut self, docs: Vec<String>) -> Parse<Einsum> {
        const HELP: &str = "a statement is `Y[m,n] = ..`";
        let start = self.span();
        let targets = if self.eat_sym("(") {
            self.list(")", "write `(v[m], i[m]) = argmax(n) S[m,n]`", Self::target)?
        } else {
            vec![self.target()?]
        };
        let mut binders = Vec::new();
        if self.eat_word("for") {
            binders.push(self.binder()?);
            while self.eat_sym(",") {
                binders.push(self.binder()?);
            }
        }
        let join = self.assignment(HELP)?;
        let value = self.expr()?;
        let filter = if self.eat_word("where") { Some(self.expr()?) } else { None };
        let otherwise = if self.eat_word("else") { Some(self.expr()?) } else { None };
        let span = start.to(self.prev_span());
        self.end_of_statement()?;
        Ok(Einsum { docs, targets, binders, join, value, filter, otherwise, span })
    }

    /// `=`, `+=`, `*=` or `NAME=`.
    fn assignment(&mut self, help: &str) -> Parse<Option<ReduceOp>> {
        if self.eat_sym("=") {
            return Ok(None);
        }
        if self.eat_sym("+=") {
            return Ok(Some(ReduceOp::Sum));
        }
        if self.eat_sym("*=") {
            return Ok(Some(ReduceOp::Product));
        }
        if let (Tok::Ident(w), Tok::Sym("=")) = (self.peek(), self.peek_at(1))
            && let Some(op) = ReduceOp::from_name(w).filter(|op| !op.selects_argument())
        {
            self.bump();
            self.bump();
            return Ok(Some(op));
        }
        Err(self.unexpected("`=`", help))
    }

    /// An expression; reductions and `if` take everything to their right.
    fn expr(&mut self) -> Parse<Expr> {
        self.binary(0)
    }

    fn deeper<T>(&mut self, f: impl FnOnce(&mut Self) -> Parse<T>) -> Parse<T> {
        if self.depth >= MAX_DEPTH {
            let span = self.span();
            return Err(self.too_deep(span));
        }
        self.depth += 1;
        let r = f(self);
        self.depth -= 1;
        r
    }

    fn too_deep(&mut self, span: Span) -> Failed {
        self.error(
            Diagnostic::error("E0115", span, "this expression is nested too deeply")
                .label(format!("more than {MAX_DEPTH} levels"))
                .help("name a part of it in a statement of its own"),
        )
    }

    fn node(&mut self, kind: ExprKind, span: Span) -> Parse<Expr> {
        let e = Expr::new(kind, span);
        if e.depth > MAX_DEPTH { Err(self.too_deep(span)) } else { Ok(e) }
    }

    /// Operators of binding power `min` and above: 1 or, 2 and, 4 comparison, 5 sum, 6 product.
    fn binary(&mut self, min: u8) -> Parse<Expr> {
        self.deeper(|p| {
            let mut left = p.prefix(min)?;
            loop {
                let Some((op, power)) = p.infix() else { return Ok(left) };
                if power < min {
                    return Ok(left);
                }
                let comparison = power == 4;
                p.bump();
                let right = p.binary(power + 1)?;
                let span = left.span.to(right.span);
                left = p.node(ExprKind::Binary(op, Box::new(left), Box::new(right)), span)?;
                if comparison && p.infix().is_some_and(|(_, power)| power == 4) {
                    let span = p.span();
                    return Err(p.error(
                        Diagnostic::error("E0111", span, "comparisons do not chain").help("write `a <= b and b < c`"),
                    ));
                }
            }
        })
    }

    fn infix(&self) -> Option<(BinaryOp, u8)> {
        let name = match self.peek() {
            Tok::Ident(w) if w == "and" || w == "or" => w.as_str(),
            Tok::Sym(s) => s,
            _ => return None,
        };
        let op = BinaryOp::from_name(name)?;
        Some((op, power(op)))
    }

    fn prefix(&mut self, min: u8) -> Parse<Expr> {
        let start = self.span();
        if self.eat_sym("-") {
            let arg = self.deeper(|p| p.prefix(7))?;
            let span = start.to(arg.span);
            return match arg.kind {
                ExprKind::Int(n) if n >= 0 => self.node(ExprKind::Int(-n), span),
                ExprKind::Float(x) if !x.is_sign_negative() => self.node(ExprKind::Float(-x), span),
                _ => self.node(ExprKind::Unary(UnaryOp::Neg, Box::new(arg)), span),
            };
        }
        if self.at_word("not") && min > 3 {
            return Err(self.unexpected("a value", "put `not ..` in parentheses here"));
        }
        if self.at_word("not") {
            self.bump();
            let arg = self.deeper(|p| if p.at_word("not") { p.prefix(0) } else { p.binary(4) })?;
            let span = start.to(arg.span);
            return self.node(ExprKind::Unary(UnaryOp::Not, Box::new(arg)), span);
        }
        if self.eat_word("if") {
            const HELP: &str = "write `if c then a else b`";
            let c = self.expr()?;
            if !self.eat_word("then") {
                return Err(self.unexpected("`then`", HELP));
            }
            let a = self.expr()?;
            if !self.eat_word("else") {
                return Err(self.unexpected("`else`", HELP));
            }
            let b = self.expr()?;
            let span = start.to(b.span);
            return self.node(ExprKind::Select(Box::new(c), Box::new(a), Box::new(b)), span);
        }
        self.primary()
    }

    fn primary(&mut self) -> Parse<Expr> {
        let span = self.span();
        match self.peek().clone() {
            Tok::Int(n) => {
                self.bump();
                self.node(ExprKind::Int(n), span)
            }
            Tok::Float(x) => {
                self.bump();
                self.node(ExprKind::Float(x), span)
            }
            Tok::Sym("(") => {
                self.bump();
                let mut items = self.list(")", "close the parenthesis", Self::expr)?;
                let span = span.to(self.prev_span());
                match items.len() {
                    0 => Err(self.error(
                        Diagnostic::error("E0106", span, "expected a value, found `()`")
                            .help("write a value between the parentheses"),
                    )),
                    1 => {
                        let mut e = items.remove(0);
                        e.span = span;
                        Ok(e)
                    }
                    _ => self.node(ExprKind::Tuple(items), span),
                }
            }
            Tok::Ident(w) => match w.as_str() {
                "inf" | "nan" => {
                    self.bump();
                    self.node(ExprKind::Float(if w == "inf" { f64::INFINITY } else { f64::NAN }), span)
                }
                "true" | "false" => {
                    self.bump();
                    self.node(ExprKind::Bool(w == "true"), span)
                }
                "scan" if matches!(self.peek_at(1), Tok::Ident(_)) => {
                    self.bump();
                    let name = self.name("an operator")?;
                    self.expect("(", "write `scan m(n) ..`")?;
                    self.reduction(name, true)
                }
                _ => self.named(),
            },
            _ => Err(self.unexpected("a value", "")),
        }
    }

    /// A name and what follows it: an access, a call, a reduction or nothing.
    fn named(&mut self) -> Parse<Expr> {
        let name = self.name("a value")?;
        if self.eat_sym("[") {
            let at = self.list("]", "", Self::expr)?;
            let span = name.span.to(self.prev_span());
            return self.node(ExprKind::Access(name, at), span);
        }
        if self.eat_sym(".") {
            let field = self.name("a component")?;
            let span = name.span.to(field.span);
            return self.node(ExprKind::Field(name, field), span);
        }
        if self.eat_sym("(") {
            return self.reduction(name, false);
        }
        let span = name.span;
        self.node(ExprKind::Name(name.name), span)
    }

    /// After `NAME(`: a reduction if `NAME` is one, or if a value follows the closing parenthesis.
    fn reduction(&mut self, name: Ident, scan: bool) -> Parse<Expr> {
        const HELP: &str = "a reduction names its indices: `sum(k) A[m,k] * B[k,n]`, `sum(p in D) ..`";
        let args = self.list(")", "close the parenthesis", |p| {
            let e = p.expr()?;
            if !p.eat_word("in") {
                return Ok((e, None));
            }
            let extent = p.expr()?;
            Ok((e, Some(extent)))
        })?;
        let close = self.prev_span();
        let builtin = reducer_of(&name.name);
        let value_follows = match self.peek() {
            Tok::Ident(w) => {
                !KEYWORDS.contains(&w.as_str()) && !matches!(w.as_str(), "as" | "by" | "rev")
                    || matches!(w.as_str(), "if" | "not" | "inf" | "nan" | "true" | "false")
            }
            Tok::Int(_) | Tok::Float(_) | Tok::Sym("(") => true,
            _ => false,
        };
        // `max(a, b)` and `min(a, b)` are functions unless a value follows.
        let function = matches!(builtin, Some((ReduceOp::Max | ReduceOp::Min, false)) if args.len() == 2);
        let always = builtin.is_some() && !function || name.name == "topk" || scan;
        let has_extent = args.iter().any(|(_, extent)| extent.is_some());
        if !(always || value_follows || has_extent) {
            let span = name.span.to(close);
            return self.node(ExprKind::Call(name, args.into_iter().map(|(e, _)| e).collect()), span);
        }
        let mut args = args;
        let op = match builtin {
            _ if name.name == "topk" => {
                if args.len() < 2 {
                    let span = name.span.to(close);
                    return Err(self.error(
                        Diagnostic::error("E0116", span, "`topk` takes an index and how many to keep")
                            .help("write `(v[m,j], i[m,j]) = topk(n, 8) S[m,n]`"),
                    ));
                }
                match args.pop() {
                    Some((k, None)) => Reducer::TopK(Box::new(k)),
                    Some((k, Some(_))) => {
                        return Err(self.error(
                            Diagnostic::error("E0116", k.span, "the last argument of `topk` is how many to keep")
                                .help("write `topk(n, 8)`"),
                        ));
                    }
                    None => return Err(Failed),
                }
            }
            Some((op, _)) => Reducer::Op(op),
            None => Reducer::User(name.clone()),
        };
        let scan = scan || matches!(builtin, Some((_, true)));
        let mut over = Vec::new();
        for (e, extent) in args {
            match e.kind {
                ExprKind::Name(n) => over.push(Binder { index: Ident { name: n, span: e.span }, extent }),
                _ => {
                    return Err(self.error(
                        Diagnostic::error("E0117", e.span, format!("`{}` reduces over indices", name.name))
                            .label("this is not an index")
                            .help(HELP),
                    ));
                }
            }
        }
        if over.is_empty() {
            return Err(self.error(
                Diagnostic::error("E0117", name.span.to(close), format!("`{}` names no index", name.name)).help(HELP),
            ));
        }
        let body = self.expr()?;
        let span = name.span.to(body.span);
        self.node(ExprKind::Reduce { op, scan, over, body: Box::new(body) }, span)
    }
}

/// The binding power of an infix operator: higher binds tighter.
pub(super) fn power(op: BinaryOp) -> u8 {
    match op {
        BinaryOp::Or => 1,
        BinaryOp::And => 2,
        BinaryOp::Lt | BinaryOp::Le | BinaryOp::Gt | BinaryOp::Ge | BinaryOp::Eq | BinaryOp::Ne => 4,
        BinaryOp::Add | BinaryOp::Sub => 5,
        BinaryOp::Mul | BinaryOp::Div | BinaryOp::Mod => 6,
        BinaryOp::Pow | BinaryOp::Min | BinaryOp::Max => 7,
    }
}
