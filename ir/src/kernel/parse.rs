//! Reads the text form of the kernel IR ([`super::print`] documents it).
//!
//! Invariant: any input gives a module or diagnostics with spans, never a panic; what is read prints back to the same
//! text. Variables come into being where they are first bound, or in a `vars` line that fixes their order.

use std::collections::HashMap;

use super::*;
use crate::cascade::Rank;
use crate::diag::{Diagnostic, Diagnostics, Span};
use crate::layout::{Digit, DistDigit, Swizzle};
use crate::text::{Tok, Token, lex};

/// Reads a module; all diagnostics if it is wrong.
pub fn parse(source: &str) -> Result<Module, Diagnostics> {
    let lexed = lex(source);
    if !lexed.diagnostics.is_empty() {
        return Err(Diagnostics::new(lexed.diagnostics, source));
    }
    let mut p = Parser {
        source,
        tokens: lexed.tokens,
        at: 0,
        depth: 0,
        errors: Vec::new(),
        ranks: HashMap::new(),
        names: Names::default(),
        kernel: empty_kernel(String::new()),
    };
    let module = p.module();
    match module {
        Ok(module) if p.errors.is_empty() => Ok(module),
        Ok(_) => Err(Diagnostics::new(p.errors, source)),
        Err(e) => {
            p.errors.push(e);
            Err(Diagnostics::new(p.errors, source))
        }
    }
}

fn empty_kernel(name: String) -> Kernel {
    Kernel {
        name,
        variant_of: None,
        assumes: Vec::new(),
        dependent: false,
        grid: Vec::new(),
        cluster: Vec::new(),
        bufs: Arena::new(),
        frags: Arena::new(),
        barriers: Arena::new(),
        vars: Arena::new(),
        roles: Vec::new(),
    }
}

#[derive(Default)]
struct Names {
    bufs: HashMap<String, BufId>,
    frags: HashMap<String, FragId>,
    barriers: HashMap<String, BarrierId>,
    vars: HashMap<String, VarId>,
}

struct Parser<'a> {
    source: &'a str,
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    errors: Vec<Diagnostic>,
    ranks: HashMap<String, RankId>,
    names: Names,
    kernel: Kernel,
}

type Read<T> = Result<T, Diagnostic>;

/// Deepest nesting of expressions and statements accepted.
const MAX_DEPTH: usize = 200;

const STATEMENTS: &str = "a statement starts with for, if, let, map, reduce, scan, load, store, gather, scatter, atom, copy, arrive, wait, bar_sync, bar_arrive, fence, commit, wait_group, last, task_sync, cluster_sync, grid_sync or grid_dependency";

impl Parser<'_> {
    fn token(&self) -> &Token {
        &self.tokens[self.at.min(self.tokens.len() - 1)]
    }

    fn tok(&self) -> &Tok {
        &self.token().tok
    }

    fn span(&self) -> Span {
        self.token().span
    }

    fn next(&mut self) -> Token {
        let t = self.token().clone();
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        t
    }

    fn wrong(&self, expected: &str) -> Diagnostic {
        Diagnostic::error("E0701", self.span(), format!("found {}, expected {expected}", self.tok()))
            .label(format!("expected {expected}"))
            .help("the grammar of the kernel IR stands at the top of its printer")
    }

    fn is(&self, s: &str) -> bool {
        matches!(self.tok(), Tok::Sym(t) if *t == s)
    }

    fn is_word(&self, s: &str) -> bool {
        matches!(self.tok(), Tok::Ident(t) if t == s)
    }

    fn eat(&mut self, s: &str) -> bool {
        let found = self.is(s);
        if found {
            self.next();
        }
        found
    }

    fn eat_word(&mut self, s: &str) -> bool {
        let found = self.is_word(s);
        if found {
            self.next();
        }
        found
    }

    fn sym(&mut self, s: &str) -> Read<()> {
        if self.eat(s) { Ok(()) } else { Err(self.wrong(&format!("`{s}`"))) }
    }

    fn word(&mut self, s: &str) -> Read<()> {
        if self.eat_word(s) { Ok(()) } else { Err(self.wrong(&format!("`{s}`"))) }
    }

    fn ident(&mut self, what: &str) -> Read<(String, Span)> {
        match self.tok().clone() {
            Tok::Ident(name) => Ok((name, self.next().span)),
            _ => Err(self.wrong(what)),
        }
    }

    fn int(&mut self) -> Read<i64> {
        let negative = self.eat("-");
        match *self.tok() {
            Tok::Int(i) => {
                self.next();
                Ok(if negative { -i } else { i })
            }
            _ => Err(self.wrong("an integer")),
        }
    }

    fn count(&mut self) -> Read<u64> {
        match *self.tok() {
            Tok::Int(i) if i >= 0 => {
                self.next();
                Ok(i as u64)
            }
            _ => Err(self.wrong("a non-negative integer")),
        }
    }

    fn newlines(&mut self) {
        while *self.tok() == Tok::Newline {
            self.next();
        }
    }

    fn end_of_line(&mut self) -> Read<()> {
        match self.tok() {
            Tok::Newline => {
                self.newlines();
                Ok(())
            }
            Tok::Sym("}") | Tok::End => Ok(()),
            _ => Err(self.wrong("the end of the line")),
        }
    }

    /// Reports `e` and continues after the line (and the block it opens).
    fn recover(&mut self, e: Diagnostic) {
        self.errors.push(e);
        let mut depth = 0;
        loop {
            match self.tok() {
                Tok::End => return,
                Tok::Newline if depth == 0 => {
                    self.newlines();
                    return;
                }
                Tok::Sym("{") => depth += 1,
                Tok::Sym("}") if depth == 0 => return,
                Tok::Sym("}") => depth -= 1,
                _ => {}
            }
            self.next();
        }
    }

    /// `[a, b, ..]` of `item`s.
    fn list<T>(&mut self, item: impl FnMut(&mut Self) -> Read<T>) -> Read<Vec<T>> {
        self.sym("[")?;
        self.rest("]", item)
    }

    fn rest<T>(&mut self, close: &str, mut item: impl FnMut(&mut Self) -> Read<T>) -> Read<Vec<T>> {
        let mut out = Vec::new();
        while !self.eat(close) {
            if !out.is_empty() {
                self.sym(",")?;
            }
            out.push(item(self)?);
        }
        Ok(out)
    }

    fn module(&mut self) -> Read<Module> {
        self.newlines();
        self.word("module")?;
        let (name, _) = self.ident("the module's name")?;
        let mut module = Module { name, ranks: Arena::new(), kernels: Vec::new() };
        self.sym("{")?;
        self.newlines();
        while !self.eat("}") {
            if self.eat_word("ranks") {
                loop {
                    let (name, span) = self.ident("a rank's name")?;
                    let fixed = if self.eat("=") { Some(self.count()?) } else { None };
                    let id = module.ranks.push(Rank { name: name.clone(), fixed, span: Span::default() });
                    if self.ranks.insert(name.clone(), id).is_some() {
                        return Err(twice("rank", &name, span));
                    }
                    if !self.eat(",") {
                        break;
                    }
                }
                self.end_of_line()?;
            } else if self.eat_word("kernel") {
                let kernel = self.kernel()?;
                module.kernels.push(kernel);
                self.end_of_line()?;
            } else {
                return Err(self.wrong("`ranks`, `kernel` or `}`"));
            }
        }
        self.newlines();
        if *self.tok() != Tok::End {
            return Err(self.wrong("the end of the text"));
        }
        Ok(module)
    }

    fn kernel(&mut self) -> Read<Kernel> {
        let (name, _) = self.ident("the kernel's name")?;
        self.kernel = empty_kernel(name);
        if self.eat_word("of") {
            self.kernel.variant_of = Some(self.ident("the name of the plan's kernel")?.0);
        }
        self.names = Names::default();
        self.sym("{")?;
        self.newlines();
        while !self.eat("}") {
            if *self.tok() == Tok::End {
                return Err(self.wrong("`}`"));
            }
            let done = self.declaration().and_then(|()| self.end_of_line());
            if let Err(e) = done {
                self.recover(e);
            }
        }
        Ok(std::mem::replace(&mut self.kernel, empty_kernel(String::new())))
    }

    fn declaration(&mut self) -> Read<()> {
        let (word, span) = self.ident("a declaration or a role")?;
        match word.as_str() {
            "grid" => self.kernel.grid = self.list(Self::expr)?,
            "cluster" => self.kernel.cluster = self.list(Self::count)?,
            "global" | "shared" | "scratch" => {
                let (name, at) = self.ident("the buffer's name")?;
                self.sym(":")?;
                let dtype = self.dtype()?;
                let dims = self.list(Self::expr)?;
                let space = match word.as_str() {
                    "global" => {
                        self.sym("=")?;
                        let param = self.count()? as usize;
                        let written = self.eat_word("written");
                        let together = if self.eat_word("together") { self.count()? } else { 1 };
                        BufSpace::Global { param, written, together }
                    }
                    "scratch" => {
                        self.word("strides")?;
                        let strides = self.list(Self::expr)?;
                        let together = if self.eat_word("together") { self.count()? } else { 1 };
                        BufSpace::Scratch { strides, together }
                    }
                    _ => {
                        let stages = if self.eat_word("stages") { self.count()? } else { 1 };
                        let layout = if self.eat_word("layout") {
                            self.layout()?
                        } else {
                            let extents: Option<Vec<u64>> = dims
                                .iter()
                                .map(|d| match d {
                                    Expr::Int(i) => u64::try_from(*i).ok(),
                                    _ => None,
                                })
                                .collect();
                            let small = |e: &Vec<u64>| {
                                e.iter().try_fold(1u64, |a, b| a.checked_mul(*b)).is_some_and(|n| n < 1 << 40)
                            };
                            match extents.filter(small) {
                                Some(e) => MemLayout::row_major(&e),
                                None => {
                                    return Err(Diagnostic::error("E0703", at, "shared memory has constant extents")
                                        .help("write numbers, or give the layout"));
                                }
                            }
                        };
                        BufSpace::Shared { layout, stages }
                    }
                };
                let id = self.kernel.bufs.push(Buf { name: name.clone(), dtype, dims, space });
                if self.names.bufs.insert(name.clone(), id).is_some() {
                    return Err(twice("buffer", &name, at));
                }
            }
            "frag" => {
                let (name, at) = self.ident("the fragment's name")?;
                self.sym(":")?;
                let dtype = self.dtype()?;
                let dims = self.list(Self::count)?;
                let threads = self.digits("T", dims.len())?;
                let regs = self.digits("V", dims.len())?;
                let lanes = self.digits("L", dims.len())?;
                let dist = Distribution { dims, threads, regs, lanes };
                let id = self.kernel.frags.push(Frag { name: name.clone(), dtype, dist });
                if self.names.frags.insert(name.clone(), id).is_some() {
                    return Err(twice("fragment", &name, at));
                }
            }
            "dependent" => self.kernel.dependent = true,
            "assume" => {
                let aligned = matches!(self.tok(), Tok::Ident(name) if self.names.bufs.contains_key(name));
                let assumption = if aligned {
                    let buf = self.buf()?;
                    self.word("aligned")?;
                    Assumption::Aligned(buf, self.count()?)
                } else {
                    let value = self.binary(4)?;
                    if self.eat("<=") {
                        Assumption::AtMost(value, self.count()?)
                    } else {
                        self.word("multiple")?;
                        Assumption::Multiple(value, self.count()?)
                    }
                };
                self.kernel.assumes.push(assumption);
            }
            "mbarrier" | "named" => {
                let (name, at) = self.ident("the barrier's name")?;
                self.sym("[")?;
                let stages = self.count()?;
                self.sym("]")?;
                let kind = if word == "mbarrier" {
                    self.word("count")?;
                    BarrierKind::Mbarrier { count: self.count()? }
                } else {
                    self.word("threads")?;
                    BarrierKind::Named { threads: self.count()? }
                };
                let id = self.kernel.barriers.push(Barrier { name: name.clone(), kind, stages });
                if self.names.barriers.insert(name.clone(), id).is_some() {
                    return Err(twice("barrier", &name, at));
                }
            }
            "vars" => loop {
                let (name, at) = self.ident("a variable's name")?;
                let id = self.kernel.vars.push(Var { name: name.clone() });
                if self.names.vars.insert(name.clone(), id).is_some() {
                    return Err(twice("variable", &name, at));
                }
                if !self.eat(",") {
                    break;
                }
            },
            "role" => {
                let (name, _) = self.ident("the role's name")?;
                self.sym(":")?;
                let units = self.count()?;
                let (scope, at) = self.ident("thread, warp or warpgroup")?;
                let scope = [Scope::Thread, Scope::Warp, Scope::Warpgroup]
                    .into_iter()
                    .find(|s| s.name() == scope)
                    .ok_or_else(|| unknown("scope", &scope, at, "write thread, warp or warpgroup"))?;
                let regs = if self.eat_word("regs") { Some(self.count()?) } else { None };
                let body = self.block()?;
                self.kernel.roles.push(Role { name, scope, units, regs, body });
            }
            other => {
                return Err(unknown(
                    "declaration",
                    other,
                    span,
                    "write grid, cluster, global, shared, scratch, frag, mbarrier, named, assume, vars or role",
                ));
            }
        }
        Ok(())
    }

    fn dtype(&mut self) -> Read<DType> {
        let (name, span) = self.ident("an element type")?;
        DType::from_name(&name).ok_or_else(|| unknown("type", &name, span, "for example f32, bf16 or i32"))
    }

    /// `T[4@1.2,8@0.1]`.
    fn digits(&mut self, axis: &str, rank: usize) -> Read<Vec<DistDigit>> {
        self.word(axis)?;
        self.list(|p| {
            let extent = p.count()?;
            p.sym("@")?;
            let span = p.span();
            let text = &p.source[span.start as usize..span.end as usize];
            // The lexer reads `1.2` as a float; its text is dimension and stride.
            let parts = text.split_once('.').and_then(|(d, s)| Some((d.parse::<usize>().ok()?, s.parse().ok()?)));
            let Some((dim, stride)) = parts else { return Err(p.wrong("a dimension and a stride, like 1.2")) };
            p.next();
            if dim >= rank.max(1) || extent == 0 {
                return Err(Diagnostic::error("E0703", span, format!("digit {extent}@{dim}.{stride} is impossible"))
                    .help("extents are positive and dimensions below the fragment's rank"));
            }
            Ok(DistDigit { extent, dim, stride })
        })
    }

    fn layout(&mut self) -> Read<MemLayout> {
        let digit = |p: &mut Self| -> Read<Digit> {
            let extent = p.count()?;
            p.sym(":")?;
            Ok(Digit { extent, stride: p.count()? })
        };
        self.sym("(")?;
        let dims = self.rest(")", |p| if p.eat("(") { p.rest(")", digit) } else { Ok(vec![digit(p)?]) })?;
        let mut swizzle = None;
        if self.is_word("swizzle") {
            let span = self.next().span;
            swizzle = Some(if self.eat("(") {
                let v = self.rest(")", Self::count)?;
                match v.as_slice() {
                    [bits, base, shift] if [bits, base, shift].iter().all(|x| **x < 16) => {
                        Swizzle { bits: *bits as u32, base: *base as u32, shift: *shift as u32 }
                    }
                    _ => {
                        return Err(Diagnostic::error("E0703", span, "a swizzle is (bits, base, shift)")
                            .help("or a span of 32, 64 or 128 bytes"));
                    }
                }
            } else {
                let bytes = self.count()?;
                Swizzle::span(bytes).ok_or_else(|| {
                    Diagnostic::error("E0703", span, format!("there is no swizzle of {bytes} bytes"))
                        .help("write 32, 64 or 128")
                })?
            });
        }
        Ok(MemLayout { dims, swizzle })
    }

    fn deeper<T>(&mut self, f: impl FnOnce(&mut Self) -> Read<T>) -> Read<T> {
        if self.depth >= MAX_DEPTH {
            return Err(Diagnostic::error("E0702", self.span(), "this is nested too deeply")
                .help(format!("at most {MAX_DEPTH} levels are read")));
        }
        self.depth += 1;
        let r = f(self);
        self.depth -= 1;
        r
    }

    fn block(&mut self) -> Read<Vec<Stmt>> {
        self.sym("{")?;
        self.newlines();
        let mut body = Vec::new();
        while !self.eat("}") {
            if *self.tok() == Tok::End {
                return Err(self.wrong("`}`"));
            }
            let stmt = self.deeper(Self::stmt).and_then(|s| self.end_of_line().map(|()| s));
            match stmt {
                Ok(s) => body.push(s),
                Err(e) => self.recover(e),
            }
        }
        Ok(body)
    }

    fn bind(&mut self, name: String) -> VarId {
        let vars = &mut self.kernel.vars;
        *self.names.vars.entry(name.clone()).or_insert_with(|| vars.push(Var { name }))
    }

    fn frag(&mut self) -> Read<FragId> {
        let (name, span) = self.ident("a fragment")?;
        self.names.frags.get(&name).copied().ok_or_else(|| unknown("fragment", &name, span, "declare it with `frag`"))
    }

    fn buf(&mut self) -> Read<BufId> {
        let (name, span) = self.ident("a buffer")?;
        let hint = "declare it with `global`, `shared` or `scratch`";
        self.names.bufs.get(&name).copied().ok_or_else(|| unknown("buffer", &name, span, hint))
    }

    fn barrier(&mut self) -> Read<(BarrierId, Expr)> {
        let (name, span) = self.ident("a barrier")?;
        let id = self.names.barriers.get(&name).copied();
        let id = id.ok_or_else(|| unknown("barrier", &name, span, "declare it with `mbarrier` or `named`"))?;
        self.sym("(")?;
        let stage = self.expr()?;
        self.sym(")")?;
        Ok((id, stage))
    }

    fn view(&mut self) -> Read<View> {
        let buf = self.buf()?;
        let stage = if self.eat("(") {
            let e = self.expr()?;
            self.sym(")")?;
            Some(e)
        } else {
            None
        };
        let at = self.list(Self::expr)?;
        let walk = if self.eat_word("walk") {
            self.list(|p| {
                if p.eat_word("_") {
                    return Ok(None);
                }
                let dim = p.count()? as usize;
                let step = if p.eat("*") { p.int()? } else { 1 };
                Ok(Some((dim, step)))
            })?
        } else {
            (0..at.len()).map(|d| Some((d, 1))).collect()
        };
        Ok(View { buf, stage, at, walk })
    }

    fn bounds(&mut self) -> Read<Vec<Bound>> {
        if !self.eat_word("bounds") {
            return Ok(Vec::new());
        }
        self.list(|p| {
            let dim = p.count()? as usize;
            p.sym("<")?;
            Ok(Bound { dim, limit: p.binary(4)? })
        })
    }

    fn reduce_op(&mut self) -> Read<ReduceOp> {
        let (name, span) = self.ident("a reduction operator")?;
        ReduceOp::from_name(&name).ok_or_else(|| unknown("reduction", &name, span, "for example sum or max"))
    }

    fn join(&mut self) -> Read<Option<ReduceOp>> {
        if self.eat_word("join") { self.reduce_op().map(Some) } else { Ok(None) }
    }

    fn operand(&mut self) -> Read<Operand> {
        if self.eat_word("mem") {
            return Ok(Operand::Mem(self.view()?));
        }
        let frag = self.frag()?;
        Ok(Operand::Frag { frag, from: self.list(Self::count)? })
    }

    fn kind<T: Copy>(&mut self, all: &[T], name: impl Fn(T) -> &'static str, what: &str) -> Read<T> {
        let (word, span) = self.ident(what)?;
        all.iter().copied().find(|k| name(*k) == word).ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|k| name(*k)).collect();
            unknown(what, &word, span, &format!("write {}", names.join(", ")))
        })
    }

    fn stmt(&mut self) -> Read<Stmt> {
        let (word, span) = self.ident("a statement")?;
        Ok(match word.as_str() {
            "for" => {
                let (name, _) = self.ident("the counter")?;
                self.word("in")?;
                let lo = self.binary(4)?;
                self.sym("..")?;
                let hi = self.binary(4)?;
                let step = if self.eat_word("step") { self.int()? } else { 1 };
                let unroll = self.eat_word("unroll");
                let var = self.bind(name);
                let body = self.block()?;
                Stmt::For { var, lo, hi, step, unroll, body }
            }
            "if" => {
                let cond = self.expr()?;
                let then = self.block()?;
                let otherwise = if self.eat_word("else") { self.block()? } else { Vec::new() };
                Stmt::If { cond, then, otherwise }
            }
            "let" => {
                let (name, _) = self.ident("the variable")?;
                self.sym("=")?;
                let value = self.expr()?;
                Stmt::Let { var: self.bind(name), value }
            }
            "last" => {
                let (name, _) = self.ident("the variable")?;
                self.sym("=")?;
                let counter = self.buf()?;
                let at = self.list(Self::expr)?;
                self.word("of")?;
                let of = self.expr()?;
                Stmt::Last { var: self.bind(name), counter, at, of }
            }
            "map" => {
                let out = self.frag()?;
                self.sym("=")?;
                Stmt::Map { out, value: self.expr()? }
            }
            "reduce" => {
                let mut out = vec![self.frag()?];
                while self.eat(",") {
                    out.push(self.frag()?);
                }
                self.sym("=")?;
                let op = self.reduce_op()?;
                let src = self.frag()?;
                self.word("over")?;
                let over = self.list(Self::count)?.into_iter().map(|d| d as usize).collect();
                let base = if self.eat_word("base") { Some(self.expr()?) } else { None };
                let bounds = self.bounds()?;
                Stmt::Reduce { out, op, src, over, base, bounds, carry: self.eat_word("carry") }
            }
            "scan" => {
                let out = self.frag()?;
                self.sym("=")?;
                let op = self.reduce_op()?;
                let src = self.frag()?;
                self.word("along")?;
                let along = self.count()? as usize;
                let bounds = self.bounds()?;
                let carry = if self.eat_word("from") { Some(self.frag()?) } else { None };
                Stmt::Scan { out, op, src, along, carry, bounds }
            }
            "load" => {
                let out = self.frag()?;
                self.sym("=")?;
                let src = self.view()?;
                Stmt::Load { out, src, bounds: self.bounds()? }
            }
            "store" => {
                let dst = self.view()?;
                self.sym("=")?;
                let src = self.frag()?;
                let bounds = self.bounds()?;
                Stmt::Store { dst, src, bounds, join: self.join()? }
            }
            "gather" => {
                let out = self.frag()?;
                self.sym("=")?;
                let buf = self.buf()?;
                let at = self.list(Self::expr)?;
                Stmt::Gather { out, buf, at, bounds: self.bounds()? }
            }
            "scatter" => {
                let buf = self.buf()?;
                let at = self.list(Self::expr)?;
                self.sym("=")?;
                let src = self.frag()?;
                let bounds = self.bounds()?;
                Stmt::Scatter { buf, at, src, bounds, join: self.join()? }
            }
            "atom" => {
                let start = self.span().start as usize;
                let mut end = start;
                while !self.is(":") {
                    if matches!(self.tok(), Tok::Newline | Tok::End) {
                        return Err(self.wrong("`:` after the atom's name"));
                    }
                    end = self.next().span.end as usize;
                }
                self.next();
                let atom = AtomName(self.source[start..end].to_string());
                let acc = self.frag()?;
                let acc_from = self.list(Self::count)?;
                let adds = self.eat("+=");
                if !adds {
                    self.sym("=")?;
                }
                let a = self.operand()?;
                self.sym("*")?;
                let b = self.operand()?;
                let keep = if self.eat_word("keep") { self.expr()? } else { Expr::Int(i64::from(adds)) };
                Stmt::Atom { atom, acc, acc_from, a, b, keep }
            }
            "copy" => {
                let engine = self.kind(&[Engine::Tma, Engine::CpAsync], Engine::name, "engine")?;
                let extents = self.list(Self::count)?;
                let src = self.view()?;
                self.sym("->")?;
                let dst = self.view()?;
                let signal = if self.eat_word("signal") { Some(self.barrier()?) } else { None };
                let multicast = if self.eat_word("multicast") { Some(self.count()?) } else { None };
                Stmt::Copy { engine, src, dst, extents, signal, multicast }
            }
            "arrive" => {
                let (barrier, stage) = self.barrier()?;
                let expect_bytes = if self.eat_word("expect") { Some(self.count()?) } else { None };
                let remote = if self.eat_word("remote") { Some(self.expr()?) } else { None };
                Stmt::Arrive { barrier, stage, expect_bytes, remote }
            }
            "wait" => {
                let (barrier, stage) = self.barrier()?;
                self.word("phase")?;
                Stmt::Wait { barrier, stage, phase: self.expr()? }
            }
            "bar_sync" => {
                let (barrier, stage) = self.barrier()?;
                Stmt::NamedSync { barrier, stage }
            }
            "bar_arrive" => {
                let (barrier, stage) = self.barrier()?;
                Stmt::NamedArrive { barrier, stage }
            }
            "fence" => Stmt::Fence(self.kind(&FenceKind::ALL, FenceKind::name, "fence")?),
            "commit" => Stmt::Commit(self.kind(&GroupKind::ALL, GroupKind::name, "group")?),
            "wait_group" => {
                let kind = self.kind(&GroupKind::ALL, GroupKind::name, "group")?;
                Stmt::WaitGroup { kind, pending: self.count()? }
            }
            "task_sync" => Stmt::TaskSync,
            "cluster_sync" => Stmt::ClusterSync,
            "grid_sync" => Stmt::GridSync,
            "grid_dependency" => {
                Stmt::GridDependency(self.kind(&GridDependency::ALL, GridDependency::name, "grid dependency")?)
            }
            other => return Err(unknown("statement", other, span, STATEMENTS)),
        })
    }

    fn expr(&mut self) -> Read<Expr> {
        self.deeper(|p| p.binary(1))
    }

    /// Operators that bind at least as tightly as `level`.
    fn binary(&mut self, level: u8) -> Read<Expr> {
        let mut left = self.primary()?;
        loop {
            let op = match self.tok() {
                Tok::Sym(s) => BinaryOp::from_name(s),
                Tok::Ident(s) if s == "and" || s == "or" => BinaryOp::from_name(s),
                _ => None,
            };
            let Some((op, l)) = op.and_then(|o| Some((o, print::binding(o)?))).filter(|(_, l)| *l >= level) else {
                return Ok(left);
            };
            self.next();
            let right = self.deeper(|p| p.binary(l + 1))?;
            left = Expr::Binary(op, Box::new(left), Box::new(right));
        }
    }

    fn arguments(&mut self, n: usize, name: &str, span: Span) -> Read<Vec<Expr>> {
        self.sym("(")?;
        let args = self.rest(")", Self::expr)?;
        if args.len() != n {
            return Err(Diagnostic::error("E0703", span, format!("`{name}` takes {n} arguments, not {}", args.len()))
                .help("see the grammar at the top of the printer"));
        }
        Ok(args)
    }

    fn primary(&mut self) -> Read<Expr> {
        let token = self.next();
        let span = token.span;
        let back = |p: &mut Self| p.at = p.tokens.iter().position(|t| t.span == span).unwrap_or(p.at);
        match token.tok {
            Tok::Int(i) => Ok(Expr::Int(i)),
            Tok::Float(x) => Ok(Expr::Float(x)),
            Tok::Sym("(") => {
                let e = self.expr()?;
                self.sym(")")?;
                Ok(e)
            }
            Tok::Sym("@") => Ok(Expr::Coord(self.count()? as usize)),
            Tok::Sym("-") => match self.tok().clone() {
                Tok::Int(i) => {
                    self.next();
                    Ok(Expr::Int(-i))
                }
                Tok::Float(x) => {
                    self.next();
                    Ok(Expr::Float(-x))
                }
                Tok::Ident(s) if s == "inf" => {
                    self.next();
                    Ok(Expr::Float(f64::NEG_INFINITY))
                }
                _ => Ok(Expr::Unary(UnaryOp::Neg, Box::new(self.deeper(Self::primary)?))),
            },
            Tok::Ident(name) => self.named(name, span),
            Tok::Sym(_) | Tok::Doc(_) | Tok::ModuleDoc(_) | Tok::Newline | Tok::End => {
                back(self);
                Err(self.wrong("an expression"))
            }
        }
    }

    fn named(&mut self, name: String, span: Span) -> Read<Expr> {
        let take = |p: &mut Self, n: usize| p.arguments(n, &name, span).map(|a| a.into_iter().map(Box::new));
        if self.is("(") {
            if let Some(op) = UnaryOp::from_name(&name) {
                return Ok(Expr::Unary(op, take(self, 1)?.next().expect("one argument")));
            }
            if let Some(op) = BinaryOp::from_name(&name).filter(|o| !o.infix()) {
                let mut a = take(self, 2)?;
                return Ok(Expr::Binary(op, a.next().expect("two"), a.next().expect("two")));
            }
            if let Some(d) = DType::from_name(&name) {
                return Ok(Expr::Cast(d, take(self, 1)?.next().expect("one argument")));
            }
            match name.as_str() {
                "rand" => {
                    let of: Vec<Expr> = take(self, 5)?.map(|e| *e).collect();
                    return Ok(Expr::Rand(Box::new(of.try_into().expect("five arguments"))));
                }
                "fma" | "select" => {
                    let mut a = take(self, 3)?;
                    let (x, y, z) = (a.next().expect("three"), a.next().expect("three"), a.next().expect("three"));
                    return Ok(if name == "fma" { Expr::Fma(x, y, z) } else { Expr::Select(x, y, z) });
                }
                "scalar" => {
                    self.sym("(")?;
                    let buf = self.buf()?;
                    self.sym(")")?;
                    return Ok(Expr::Scalar(buf));
                }
                "fetch" => {
                    self.sym("(")?;
                    let buf = self.buf()?;
                    let at = self.list(Self::expr)?;
                    self.sym(")")?;
                    return Ok(Expr::Fetch { buf, at });
                }
                _ => return Err(unknown("function", &name, span, "see the grammar at the top of the printer")),
            }
        }
        if self.is("[") {
            let Some(&frag) = self.names.frags.get(&name) else {
                return Err(unknown("fragment", &name, span, "declare it with `frag`; buffers are read by `fetch`"));
            };
            let dims = self.list(Self::count)?.into_iter().map(|d| d as usize).collect();
            return Ok(Expr::Frag { frag, dims });
        }
        if name == "grid" && self.eat(".") {
            return Ok(Expr::Grid(self.count()? as usize));
        }
        if let Some(&var) = self.names.vars.get(&name) {
            return Ok(Expr::Var(var));
        }
        if let Some(&rank) = self.ranks.get(&name) {
            return Ok(Expr::Extent(rank));
        }
        match name.as_str() {
            "unit" => Ok(Expr::Unit),
            "cluster_rank" => Ok(Expr::ClusterRank),
            "inf" => Ok(Expr::Float(f64::INFINITY)),
            "nan" => Ok(Expr::Float(f64::NAN)),
            _ => Err(unknown("name", &name, span, "variables are bound by `let` or `for`, ranks by `ranks`")),
        }
    }
}

fn unknown(what: &str, name: &str, span: Span, help: &str) -> Diagnostic {
    Diagnostic::error("E0702", span, format!("no {what} is called `{name}`"))
        .label(format!("unknown {what}"))
        .help(help)
}

fn twice(what: &str, name: &str, span: Span) -> Diagnostic {
    Diagnostic::error("E0703", span, format!("{what} `{name}` is declared twice")).help("give it another name")
}
