//! The text form of the kernel IR.
//!
//! Invariant: [`super::parse`] reads what this prints back to the same IR (names must be identifiers, unique in their
//! arena; [`super::verify`] checks it). Grammar, one statement a line:
//!
//! ```text
//! module gemm {
//!     ranks M, N, K = 64
//!     kernel gemm {
//!         grid [(M + 127) / 128, N / 128]
//!         cluster [2, 1]
//!         dependent                                   // launched while the kernel before it may run
//!         assume K <= 4096                            // or `K multiple 8`, `A aligned 16`
//!         global A: bf16[M, K] = 0                    // position among the plan's buffers
//!         global C: f32[M, N] = 2 written
//!         shared As: bf16[128, 64] stages 4 layout (128:64, 64:1) swizzle 128
//!         scratch T: f32[64, 64] strides [64, 1]
//!         frag acc: f32[64, 128] T[4@1.2,8@0.1,4@0.16]V[2@1.1,2@0.8,16@1.8]L[]
//!         mbarrier full[4] count 1
//!         named turn[2] threads 256
//!         role consumer: 2 warpgroup regs 240 {
//!             for k in 0..K / 64 {
//!                 wait full(k % 4) phase k / 4 % 2
//!                 atom wgmma.m64n128k16.f32.bf16: acc[0,0] += mem As(k % 4)[64 * unit, 0] * mem Bs(k % 4)[0, 0] walk [1, 0]
//!             }
//!         }
//!     }
//! }
//! ```
//!
//! In elementwise expressions `x[0,2]` is fragment `x` whose dimensions are dimensions 0 and 2 of the result, and
//! `@1` is the element's coordinate along dimension 1. `walk` lists, for each dimension of the tile, the buffer
//! dimension it walks (`1*2`: by steps of 2; `_`: broadcasts); left out, tile and buffer dimensions agree.

use std::fmt::{self, Write};

use super::*;
use crate::arena::Id;
use crate::cascade::{Rank, RankId};
use crate::layout::{MemLayout, Swizzle};
use crate::ops::BinaryOp;

/// Prints `module`.
pub fn print(module: &Module) -> String {
    let mut out = String::new();
    let mut p = Printer { out: &mut out, indent: 0, kernel: None, ranks: &module.ranks };
    p.line(format_args!("module {} {{", module.name));
    p.indent += 1;
    if !module.ranks.is_empty() {
        let ranks: Vec<String> = module
            .ranks
            .iter()
            .map(|(_, r)| r.fixed.map_or_else(|| r.name.clone(), |v| format!("{} = {v}", r.name)))
            .collect();
        p.line(format_args!("ranks {}", ranks.join(", ")));
    }
    for kernel in &module.kernels {
        let mut k = Printer { out: p.out, indent: p.indent, kernel: Some(kernel), ranks: &module.ranks };
        k.kernel(kernel);
    }
    p.indent -= 1;
    p.line(format_args!("}}"));
    out
}

/// Prints one kernel over `ranks`.
pub fn print_kernel(kernel: &Kernel, ranks: &Arena<RankId, Rank>) -> String {
    let mut out = String::new();
    Printer { out: &mut out, indent: 0, kernel: Some(kernel), ranks }.kernel(kernel);
    out
}

/// The first line of a statement: what error messages show.
pub fn statement_line(kernel: &Kernel, ranks: &Arena<RankId, Rank>, stmt: &Stmt) -> String {
    let mut out = String::new();
    let mut p = Printer { out: &mut out, indent: 0, kernel: Some(kernel), ranks };
    p.stmt(stmt, false);
    out.lines().next().unwrap_or_default().trim_end_matches(" {").to_string()
}

/// An expression as text.
pub fn expression(kernel: &Kernel, ranks: &Arena<RankId, Rank>, expr: &Expr) -> String {
    let mut out = String::new();
    let p = Printer { out: &mut out, indent: 0, kernel: Some(kernel), ranks };
    p.expr(expr)
}

struct Printer<'a> {
    out: &'a mut String,
    indent: usize,
    kernel: Option<&'a Kernel>,
    ranks: &'a Arena<RankId, Rank>,
}

/// A name of an arena, or a placeholder for an id out of range (only unverified IR has one).
macro_rules! named {
    ($arena:expr, $id:expr, $what:literal) => {
        $arena.get($id).map_or_else(|| format!(concat!("?", $what, "{}"), $id.index()), |x| x.name.clone())
    };
}

impl<'a> Printer<'a> {
    fn line(&mut self, text: fmt::Arguments<'_>) {
        for _ in 0..self.indent {
            self.out.push_str("    ");
        }
        let _ = self.out.write_fmt(text);
        self.out.push('\n');
    }

    fn k(&self) -> &'a Kernel {
        self.kernel.expect("a printer of statements has a kernel")
    }

    fn var(&self, v: VarId) -> String {
        named!(self.k().vars, v, "var")
    }

    fn buf(&self, b: BufId) -> String {
        named!(self.k().bufs, b, "buf")
    }

    fn frag(&self, f: FragId) -> String {
        named!(self.k().frags, f, "frag")
    }

    fn barrier(&self, b: BarrierId, stage: &Expr) -> String {
        format!("{}({})", named!(self.k().barriers, b, "barrier"), self.expr(stage))
    }

    fn kernel(&mut self, kernel: &Kernel) {
        let of = kernel.variant_of.as_ref().map(|s| format!(" of {s}")).unwrap_or_default();
        self.line(format_args!("kernel {}{of} {{", kernel.name));
        self.indent += 1;
        let grid = self.list(&kernel.grid);
        self.line(format_args!("grid [{grid}]"));
        if !kernel.cluster.is_empty() {
            self.line(format_args!("cluster {}", ints(&kernel.cluster)));
        }
        if kernel.dependent {
            self.line(format_args!("dependent"));
        }
        for (_, b) in kernel.bufs.iter() {
            let dims = self.list(&b.dims);
            let head = format!("{}: {}[{dims}]", b.name, b.dtype);
            match &b.space {
                BufSpace::Global { param, written, together } => {
                    let written = if *written { " written" } else { "" };
                    let together = if *together == 1 { String::new() } else { format!(" together {together}") };
                    self.line(format_args!("global {head} = {param}{written}{together}"));
                }
                BufSpace::Shared { layout, stages } => {
                    let extents: Option<Vec<u64>> = b.dims.iter().map(constant).collect();
                    let plain = extents.is_some_and(|e| *layout == MemLayout::row_major(&e));
                    let layout = if plain { String::new() } else { format!(" {}", layout_text(layout)) };
                    let stages = if *stages == 1 { String::new() } else { format!(" stages {stages}") };
                    self.line(format_args!("shared {head}{stages}{layout}"));
                }
                BufSpace::Scratch { strides, together } => {
                    let strides = self.list(strides);
                    let together = if *together == 1 { String::new() } else { format!(" together {together}") };
                    self.line(format_args!("scratch {head} strides [{strides}]{together}"));
                }
            }
        }
        for (_, f) in kernel.frags.iter() {
            self.line(format_args!("frag {}: {}{} {}", f.name, f.dtype, ints(&f.dist.dims), f.dist));
        }
        for (_, b) in kernel.barriers.iter() {
            match b.kind {
                BarrierKind::Mbarrier { count } => {
                    self.line(format_args!("mbarrier {}[{}] count {count}", b.name, b.stages))
                }
                BarrierKind::Named { threads } => {
                    self.line(format_args!("named {}[{}] threads {threads}", b.name, b.stages))
                }
            }
        }
        for a in &kernel.assumes {
            match a {
                Assumption::AtMost(e, n) => self.line(format_args!("assume {} <= {n}", self.expr_at(e, 4))),
                Assumption::Multiple(e, n) => self.line(format_args!("assume {} multiple {n}", self.expr_at(e, 4))),
                Assumption::Aligned(b, n) => self.line(format_args!("assume {} aligned {n}", self.buf(*b))),
            }
        }
        let mut bound = Vec::new();
        kernel.roles.iter().for_each(|r| bind_order(&r.body, &mut bound));
        if !bound.iter().copied().eq(kernel.vars.ids()) {
            let names: Vec<&str> = kernel.vars.iter().map(|(_, v)| v.name.as_str()).collect();
            if !names.is_empty() {
                self.line(format_args!("vars {}", names.join(", ")));
            }
        }
        for role in &kernel.roles {
            let regs = role.regs.map(|r| format!(" regs {r}")).unwrap_or_default();
            self.line(format_args!("role {}: {} {}{regs} {{", role.name, role.units, role.scope.name()));
            self.body(&role.body);
            self.line(format_args!("}}"));
        }
        self.indent -= 1;
        self.line(format_args!("}}"));
    }

    fn body(&mut self, body: &[Stmt]) {
        self.indent += 1;
        for s in body {
            self.stmt(s, true);
        }
        self.indent -= 1;
    }

    fn list(&self, exprs: &[Expr]) -> String {
        exprs.iter().map(|e| self.expr(e)).collect::<Vec<_>>().join(", ")
    }

    fn view(&self, v: &View) -> String {
        let stage = v.stage.as_ref().map(|s| format!("({})", self.expr(s))).unwrap_or_default();
        let identity = v.walk.len() == v.at.len() && v.walk.iter().enumerate().all(|(i, w)| *w == Some((i, 1)));
        let walk = if identity {
            String::new()
        } else {
            let walk: Vec<String> = v
                .walk
                .iter()
                .map(|w| match w {
                    None => "_".to_string(),
                    Some((dim, 1)) => dim.to_string(),
                    Some((dim, step)) => format!("{dim}*{step}"),
                })
                .collect();
            format!(" walk [{}]", walk.join(", "))
        };
        format!("{}{stage}[{}]{walk}", self.buf(v.buf), self.list(&v.at))
    }

    fn bounds(&self, bounds: &[Bound]) -> String {
        if bounds.is_empty() {
            return String::new();
        }
        let parts: Vec<String> = bounds.iter().map(|b| format!("{} < {}", b.dim, self.expr_at(&b.limit, 4))).collect();
        format!(" bounds [{}]", parts.join(", "))
    }

    fn operand(&self, o: &Operand) -> String {
        match o {
            Operand::Frag { frag, from } => format!("{}{}", self.frag(*frag), ints(from)),
            Operand::Mem(view) => format!("mem {}", self.view(view)),
        }
    }

    fn stmt(&mut self, stmt: &Stmt, nested: bool) {
        match stmt {
            Stmt::For { var, lo, hi, step, unroll, body } => {
                let step = if *step == 1 { String::new() } else { format!(" step {step}") };
                let unroll = if *unroll { " unroll" } else { "" };
                let (var, lo, hi) = (self.var(*var), self.expr_at(lo, 4), self.expr_at(hi, 4));
                self.line(format_args!("for {var} in {lo}..{hi}{step}{unroll} {{"));
                if nested {
                    self.body(body);
                    self.line(format_args!("}}"));
                }
            }
            Stmt::If { cond, then, otherwise } => {
                let cond = self.expr(cond);
                self.line(format_args!("if {cond} {{"));
                if nested {
                    self.body(then);
                    if !otherwise.is_empty() {
                        self.line(format_args!("}} else {{"));
                        self.body(otherwise);
                    }
                    self.line(format_args!("}}"));
                }
            }
            Stmt::Let { var, value } => {
                let (var, value) = (self.var(*var), self.expr(value));
                self.line(format_args!("let {var} = {value}"));
            }
            Stmt::Map { out, value } => {
                let (out, value) = (self.frag(*out), self.expr(value));
                self.line(format_args!("map {out} = {value}"));
            }
            Stmt::Reduce { out, op, src, over, base, bounds, carry } => {
                let outs: Vec<String> = out.iter().map(|f| self.frag(*f)).collect();
                let over: Vec<String> = over.iter().map(usize::to_string).collect();
                let base = base.as_ref().map(|b| format!(" base {}", self.expr(b))).unwrap_or_default();
                let carry = if *carry { " carry" } else { "" };
                let (src, bounds) = (self.frag(*src), self.bounds(bounds));
                self.line(format_args!(
                    "reduce {} = {} {src} over [{}]{base}{bounds}{carry}",
                    outs.join(", "),
                    op.name(),
                    over.join(", ")
                ));
            }
            Stmt::Scan { out, op, src, along, carry, bounds } => {
                let carry = carry.map(|c| format!(" from {}", self.frag(c))).unwrap_or_default();
                let (out, src, bounds) = (self.frag(*out), self.frag(*src), self.bounds(bounds));
                self.line(format_args!("scan {out} = {} {src} along {along}{bounds}{carry}", op.name()));
            }
            Stmt::Load { out, src, bounds } => {
                let text = format!("load {} = {}{}", self.frag(*out), self.view(src), self.bounds(bounds));
                self.line(format_args!("{text}"));
            }
            Stmt::Store { dst, src, bounds, join } => {
                let text = format!(
                    "store {} = {}{}{}",
                    self.view(dst),
                    self.frag(*src),
                    self.bounds(bounds),
                    join_text(*join)
                );
                self.line(format_args!("{text}"));
            }
            Stmt::Gather { out, buf, at, bounds } => {
                let text = format!(
                    "gather {} = {}[{}]{}",
                    self.frag(*out),
                    self.buf(*buf),
                    self.list(at),
                    self.bounds(bounds)
                );
                self.line(format_args!("{text}"));
            }
            Stmt::Scatter { buf, at, src, bounds, join } => {
                let text = format!(
                    "scatter {}[{}] = {}{}{}",
                    self.buf(*buf),
                    self.list(at),
                    self.frag(*src),
                    self.bounds(bounds),
                    join_text(*join)
                );
                self.line(format_args!("{text}"));
            }
            Stmt::Atom { atom, acc, acc_from, a, b, keep } => {
                let (assign, tail) = match keep {
                    Expr::Int(1) => ("+=", String::new()),
                    Expr::Int(0) => ("=", String::new()),
                    other => ("=", format!(" keep {}", self.expr(other))),
                };
                let text = format!(
                    "atom {}: {}{} {assign} {} * {}{tail}",
                    atom.0,
                    self.frag(*acc),
                    ints(acc_from),
                    self.operand(a),
                    self.operand(b)
                );
                self.line(format_args!("{text}"));
            }
            Stmt::Copy { engine, src, dst, extents, signal, multicast } => {
                let signal =
                    signal.as_ref().map(|(b, s)| format!(" signal {}", self.barrier(*b, s))).unwrap_or_default();
                let multicast = multicast.map(|m| format!(" multicast {m}")).unwrap_or_default();
                let text = format!(
                    "copy {} {} {} -> {}{signal}{multicast}",
                    engine.name(),
                    ints(extents),
                    self.view(src),
                    self.view(dst)
                );
                self.line(format_args!("{text}"));
            }
            Stmt::Arrive { barrier, stage, expect_bytes, remote } => {
                let expect = expect_bytes.map(|b| format!(" expect {b}")).unwrap_or_default();
                let remote = remote.as_ref().map(|r| format!(" remote {}", self.expr(r))).unwrap_or_default();
                let bar = self.barrier(*barrier, stage);
                self.line(format_args!("arrive {bar}{expect}{remote}"));
            }
            Stmt::Wait { barrier, stage, phase } => {
                let (bar, phase) = (self.barrier(*barrier, stage), self.expr(phase));
                self.line(format_args!("wait {bar} phase {phase}"));
            }
            Stmt::NamedSync { barrier, stage } => {
                let bar = self.barrier(*barrier, stage);
                self.line(format_args!("bar_sync {bar}"));
            }
            Stmt::NamedArrive { barrier, stage } => {
                let bar = self.barrier(*barrier, stage);
                self.line(format_args!("bar_arrive {bar}"));
            }
            Stmt::Fence(kind) => self.line(format_args!("fence {}", kind.name())),
            Stmt::Commit(kind) => self.line(format_args!("commit {}", kind.name())),
            Stmt::WaitGroup { kind, pending } => self.line(format_args!("wait_group {} {pending}", kind.name())),
            Stmt::Last { var, counter, at, of } => {
                let at: Vec<String> = at.iter().map(|e| self.expr(e)).collect();
                let (var, of, counter) = (self.var(*var), self.expr(of), self.buf(*counter));
                self.line(format_args!("last {var} = {counter}[{}] of {of}", at.join(", ")));
            }
            Stmt::TaskSync => self.line(format_args!("task_sync")),
            Stmt::ClusterSync => self.line(format_args!("cluster_sync")),
            Stmt::GridSync => self.line(format_args!("grid_sync")),
            Stmt::GridDependency(kind) => self.line(format_args!("grid_dependency {}", kind.name())),
        }
    }

    fn expr(&self, e: &Expr) -> String {
        self.expr_at(e, 0)
    }

    /// `e`, in parentheses if it binds weaker than `level` (see [`binding`]).
    fn expr_at(&self, e: &Expr, level: u8) -> String {
        match e {
            Expr::Int(i) => i.to_string(),
            Expr::Float(x) => float_text(*x),
            Expr::Var(v) => self.var(*v),
            Expr::Extent(r) => named!(self.ranks, *r, "rank"),
            Expr::Grid(d) => format!("grid.{d}"),
            Expr::Unit => "unit".to_string(),
            Expr::ClusterRank => "cluster_rank".to_string(),
            Expr::Scalar(b) => format!("scalar({})", self.buf(*b)),
            Expr::Fetch { buf, at } => format!("fetch({}[{}])", self.buf(*buf), self.list(at)),
            Expr::Frag { frag, dims } => {
                let dims: Vec<String> = dims.iter().map(usize::to_string).collect();
                format!("{}[{}]", self.frag(*frag), dims.join(","))
            }
            Expr::Coord(d) => format!("@{d}"),
            Expr::Unary(op, a) => format!("{}({})", op.name(), self.expr(a)),
            Expr::Binary(op, a, b) => match binding(*op) {
                Some(l) => {
                    // Comparisons do not associate; everything else associates to the left.
                    let left = if l == 3 { 4 } else { l };
                    let text = format!("{} {} {}", self.expr_at(a, left), op.name(), self.expr_at(b, l + 1));
                    if l < level { format!("({text})") } else { text }
                }
                None => format!("{}({}, {})", op.name(), self.expr(a), self.expr(b)),
            },
            Expr::Fma(a, b, c) => format!("fma({}, {}, {})", self.expr(a), self.expr(b), self.expr(c)),
            Expr::Select(c, a, b) => format!("select({}, {}, {})", self.expr(c), self.expr(a), self.expr(b)),
            Expr::Cast(d, a) => format!("{d}({})", self.expr(a)),
            Expr::Rand(of) => format!("rand({})", self.list(&of[..])),
        }
    }
}

/// How tightly an infix operator binds, from 1 (`or`) to 5 (`*`); none for functions.
pub(super) fn binding(op: BinaryOp) -> Option<u8> {
    match op {
        BinaryOp::Or => Some(1),
        BinaryOp::And => Some(2),
        BinaryOp::Lt | BinaryOp::Le | BinaryOp::Gt | BinaryOp::Ge | BinaryOp::Eq | BinaryOp::Ne => Some(3),
        BinaryOp::Add | BinaryOp::Sub => Some(4),
        BinaryOp::Mul | BinaryOp::Div | BinaryOp::Mod => Some(5),
        BinaryOp::Pow | BinaryOp::Min | BinaryOp::Max => None,
    }
}

/// Variables in the order in which a reader meets their first binding.
pub(super) fn bind_order(body: &[Stmt], seen: &mut Vec<VarId>) {
    walk(body, &mut |s| {
        if let Stmt::For { var, .. } | Stmt::Let { var, .. } | Stmt::Last { var, .. } = s
            && !seen.contains(var)
        {
            seen.push(*var);
        }
    });
}

fn constant(e: &Expr) -> Option<u64> {
    match e {
        Expr::Int(i) => u64::try_from(*i).ok(),
        _ => None,
    }
}

fn float_text(x: f64) -> String {
    if x.is_nan() {
        "nan".to_string()
    } else if x.is_infinite() {
        if x > 0.0 { "inf".to_string() } else { "-inf".to_string() }
    } else {
        format!("{x:?}")
    }
}

fn join_text(join: Option<ReduceOp>) -> String {
    join.map(|op| format!(" join {}", op.name())).unwrap_or_default()
}

fn ints(v: &[u64]) -> String {
    let parts: Vec<String> = v.iter().map(u64::to_string).collect();
    format!("[{}]", parts.join(", "))
}

/// `layout (128:64, (64:1, 2:8192)) swizzle 128`.
pub(super) fn layout_text(layout: &MemLayout) -> String {
    let digits = |d: &Vec<crate::layout::Digit>| match d.as_slice() {
        [g] => format!("{}:{}", g.extent, g.stride),
        many => {
            let parts: Vec<String> = many.iter().map(|g| format!("{}:{}", g.extent, g.stride)).collect();
            format!("({})", parts.join(", "))
        }
    };
    let dims: Vec<String> = layout.dims.iter().map(digits).collect();
    let swizzle = match layout.swizzle {
        None => String::new(),
        Some(s) if Swizzle::span(s.span_bytes()) == Some(s) => format!(" swizzle {}", s.span_bytes()),
        Some(s) => format!(" swizzle({}, {}, {})", s.bits, s.base, s.shift),
    };
    format!("layout ({}){swizzle}", dims.join(", "))
}

impl Scope {
    /// Its spelling.
    pub fn name(self) -> &'static str {
        match self {
            Scope::Thread => "thread",
            Scope::Warp => "warp",
            Scope::Warpgroup => "warpgroup",
        }
    }
}

impl Engine {
    /// Its spelling.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Tma => "tma",
            Engine::CpAsync => "cp_async",
        }
    }
}

impl FenceKind {
    /// Every kind.
    pub const ALL: [FenceKind; 4] = [FenceKind::ProxyAsync, FenceKind::Wgmma, FenceKind::MbarrierInit, FenceKind::Gpu];

    /// Its spelling.
    pub fn name(self) -> &'static str {
        match self {
            FenceKind::ProxyAsync => "proxy_async",
            FenceKind::Wgmma => "wgmma",
            FenceKind::MbarrierInit => "mbarrier_init",
            FenceKind::Gpu => "gpu",
        }
    }
}

impl GridDependency {
    /// Every kind.
    pub const ALL: [GridDependency; 2] = [GridDependency::Wait, GridDependency::Launch];

    /// Its spelling.
    pub fn name(self) -> &'static str {
        match self {
            GridDependency::Wait => "wait",
            GridDependency::Launch => "launch",
        }
    }
}

impl GroupKind {
    /// Every kind.
    pub const ALL: [GroupKind; 3] = [GroupKind::Wgmma, GroupKind::CpAsync, GroupKind::Bulk];

    /// Its spelling.
    pub fn name(self) -> &'static str {
        match self {
            GroupKind::Wgmma => "wgmma",
            GroupKind::CpAsync => "cp_async",
            GroupKind::Bulk => "bulk",
        }
    }
}
