//! The verifier of the kernel IR: what must hold before a kernel is printed or run.
//!
//! It checks what is decidable from the text: ids and arities, distributions and atoms, layouts, boxes and alignments
//! where they are provable, resources, and (in `flow.rs`) that nothing touches registers a wgmma owns. Order between
//! units is the evaluator's business. Invariant: a violation names the statement and the rule it breaks; a kernel
//! without violations can be printed, parsed, and evaluated without an `Illegal` error from its own text.

use std::collections::{HashMap, HashSet};
use std::fmt;

use super::*;
use crate::arena::{Arena, Id};
use crate::cascade::{Rank, RankId};

mod flow;
mod statement;
mod value;

#[cfg(test)]
mod tests;

/// What a device offers one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Shared memory of a task, in bytes.
    pub shared_bytes: u64,
    /// Registers of a task, 32 bits each.
    pub registers: u64,
    /// Threads of a task.
    pub threads: u64,
}

impl Limits {
    /// An H100 or H200 SM: 227 KiB, 64K registers, 1024 threads (CUDA C++ Programming Guide, compute capability 9.0).
    pub const SM90: Limits = Limits { shared_bytes: 227 * 1024, registers: 65536, threads: 1024 };
}

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// `kernel` or `kernel, role.2.0: statement`.
    pub place: String,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  at {}", self.message, self.place)
    }
}

impl std::error::Error for Violation {}

/// Every violation in `module` on a device with `limits`.
pub fn verify(module: &Module, limits: &Limits) -> Vec<Violation> {
    let mut out = Vec::new();
    let mut names = HashSet::new();
    for kernel in &module.kernels {
        if !names.insert(&kernel.name) {
            out.push(Violation { place: kernel.name.clone(), message: "another kernel has this name".to_string() });
        }
        out.extend(verify_kernel(kernel, &module.ranks, limits));
    }
    out
}

/// Every violation in one kernel over `ranks`.
pub fn verify_kernel(kernel: &Kernel, ranks: &Arena<RankId, Rank>, limits: &Limits) -> Vec<Violation> {
    let mut v = Verifier {
        kernel,
        ranks,
        out: Vec::new(),
        role: 0,
        path: String::new(),
        line: None,
        served: HashMap::new(),
        windows: HashMap::new(),
    };
    v.declarations();
    v.resources(limits);
    // Bodies are only meaningful over sound declarations.
    if v.out.is_empty() {
        for role in 0..kernel.roles.len() {
            v.role = role;
            v.role_body();
        }
    }
    if v.out.is_empty() {
        v.dependency();
        v.barriers();
        for role in 0..kernel.roles.len() {
            v.role = role;
            flow::check(&mut v);
        }
    }
    v.out
}

struct Verifier<'a> {
    kernel: &'a Kernel,
    ranks: &'a Arena<RankId, Rank>,
    out: Vec<Violation>,
    role: usize,
    /// `role.2.0` of the statement being checked.
    path: String,
    line: Option<&'a Stmt>,
    /// Answers of [`crate::layout::Distribution::serves`].
    served: HashMap<(FragId, FragId, Vec<usize>), bool>,
    /// Whether a fragment from some coordinates on is held as an atom's distribution says.
    windows: HashMap<(FragId, Vec<u64>, Distribution), bool>,
}

impl<'a> Verifier<'a> {
    fn wrong(&mut self, message: impl Into<String>) {
        let place = match self.line {
            None => self.kernel.name.clone(),
            Some(s) => {
                format!("{}, {}: {}", self.kernel.name, self.path, print::statement_line(self.kernel, self.ranks, s))
            }
        };
        self.out.push(Violation { place, message: message.into() });
    }

    fn name(&mut self, what: &str, name: &str, seen: &mut HashSet<String>) {
        let mut chars = name.chars();
        let start = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
        if !start || !chars.all(|c| c.is_ascii_alphanumeric() || c == '_') {
            self.wrong(format!("{what} `{name}` is not named by an identifier"));
        }
        if !seen.insert(name.to_string()) {
            self.wrong(format!("two {what}s are called `{name}`"));
        }
    }

    fn declarations(&mut self) {
        let k = self.kernel;
        self.name("kernel", &k.name, &mut HashSet::new());
        let mut seen = HashSet::new();
        for (_, v) in k.vars.iter() {
            self.name("variable", &v.name, &mut seen);
            let reserved = ["unit", "cluster_rank", "inf", "nan", "grid"].contains(&v.name.as_str());
            if reserved || self.ranks.iter().any(|(_, r)| r.name == v.name) {
                self.wrong(format!("variable `{}` has the name of a rank or a word of the grammar", v.name));
            }
        }
        let mut seen = HashSet::new();
        k.roles.iter().for_each(|r| self.name("role", &r.name, &mut seen));
        for e in &k.grid {
            self.over_extents(e, "a grid dimension");
        }
        if !k.cluster.is_empty() && (k.cluster.len() != k.grid.len() || k.cluster.contains(&0)) {
            self.wrong("a cluster has one positive extent per grid dimension");
        }
        if k.cluster.iter().product::<u64>() > 16 {
            self.wrong("a cluster has at most 16 tasks");
        }
        let mut seen = HashSet::new();
        for (_, b) in k.bufs.iter() {
            self.name("buffer", &b.name, &mut seen);
            b.dims.iter().for_each(|e| self.over_extents(e, "an extent"));
            match &b.space {
                BufSpace::Global { together, .. } => {
                    let whole = |d: &Expr| matches!(d, Expr::Int(n) if *n > 0);
                    if *together == 0 || (*together > 1 && (b.dims.len() < 2 || !b.dims.last().is_some_and(whole))) {
                        self.wrong(format!(
                            "`{}` holds {together} neighbours together, which takes two dimensions, the last a number",
                            b.name
                        ));
                    }
                }
                BufSpace::Scratch { strides, together } => {
                    strides.iter().for_each(|e| self.over_extents(e, "a stride"));
                    if *together == 0 || (*together > 1 && (b.dims.len() < 2 || strides.last() != Some(&Expr::Int(1))))
                    {
                        self.wrong(format!(
                            "`{}` holds {together} neighbours together, which takes two dimensions and a last stride of 1",
                            b.name
                        ));
                    }
                    if strides.len() != b.dims.len() {
                        self.wrong(format!(
                            "`{}` has {} dimensions and {} strides",
                            b.name,
                            b.dims.len(),
                            strides.len()
                        ));
                    }
                }
                BufSpace::Shared { layout, stages } => self.shared(b, layout, *stages),
            }
        }
        let mut seen = HashSet::new();
        for (_, f) in k.frags.iter() {
            self.name("fragment", &f.name, &mut seen);
            let d = &f.dist;
            let digits = d.threads.iter().chain(&d.regs).chain(&d.lanes);
            if digits.clone().any(|g| g.extent == 0 || (g.dim >= d.dims.len() && g.stride != 0)) {
                self.wrong(format!("`{}` has a digit of no extent or of a dimension it lacks", f.name));
            } else if d.dims.contains(&0) || d.dims.iter().product::<u64>() > 1 << 24 {
                self.wrong(format!("`{}` is empty or far too large for registers", f.name));
            } else if !d.covers() {
                self.wrong(format!("`{}`: some element is held by no register", f.name));
            }
        }
        let mut seen = HashSet::new();
        let mut named = 0;
        for (_, b) in k.barriers.iter() {
            self.name("barrier", &b.name, &mut seen);
            match b.kind {
                BarrierKind::Mbarrier { count } if count == 0 || count >= 1 << 20 => {
                    self.wrong(format!("`{}` counts {count} arrivals; 1 to 2^20 - 1 are possible", b.name));
                }
                BarrierKind::Mbarrier { .. } => {}
                BarrierKind::Named { threads } => {
                    named += b.stages;
                    if threads == 0 || threads % 32 != 0 {
                        self.wrong(format!("`{}` is for {threads} threads, not a multiple of 32", b.name));
                    }
                }
            }
            if b.stages == 0 {
                self.wrong(format!("`{}` has no stages", b.name));
            }
        }
        if named > 15 {
            self.wrong(format!("{named} named barriers are used; a task has 15 beside its own"));
        }
    }

    fn shared(&mut self, b: &Buf, layout: &crate::layout::MemLayout, stages: u64) {
        let dims: Option<Vec<u64>> = b
            .dims
            .iter()
            .map(|d| match d {
                Expr::Int(i) => u64::try_from(*i).ok(),
                _ => None,
            })
            .collect();
        let extents = layout.extents();
        if stages == 0 {
            self.wrong(format!("`{}` has no stages", b.name));
        }
        if dims.as_ref() != Some(&extents) || extents.contains(&0) {
            self.wrong(format!(
                "shared `{}` needs constant, positive extents equal to its layout's {extents:?}",
                b.name
            ));
            return;
        }
        if layout.span_elems() > 1 << 20 {
            self.wrong(format!("`{}` spans {} elements", b.name, layout.span_elems()));
            return;
        }
        let mut taken = vec![false; layout.span_elems() as usize];
        let mut coords = vec![0; extents.len()];
        for _ in 0..extents.iter().product::<u64>() {
            if std::mem::replace(&mut taken[layout.offset(&coords) as usize], true) {
                self.wrong(format!("the layout of `{}` puts two elements at one place", b.name));
                return;
            }
            for d in (0..coords.len()).rev() {
                coords[d] += 1;
                if coords[d] < extents[d] {
                    break;
                }
                coords[d] = 0;
            }
        }
    }

    fn resources(&mut self, limits: &Limits) {
        let k = self.kernel;
        let mut bytes = 0;
        for (_, b) in k.bufs.iter() {
            if let BufSpace::Shared { layout, stages } = &b.space {
                bytes = u64::next_multiple_of(bytes, layout.alignment());
                bytes += stages * layout.stage_bytes(b.dtype.bytes(1));
            }
        }
        let mbarriers = k.barriers.iter().filter(|(_, b)| matches!(b.kind, BarrierKind::Mbarrier { .. }));
        bytes += mbarriers.map(|(_, b)| 8 * b.stages).sum::<u64>();
        if bytes > limits.shared_bytes {
            self.wrong(format!("{bytes} bytes of shared memory are used; a task has {}", limits.shared_bytes));
        }
        let threads: u64 = k.roles.iter().map(|r| r.units * r.scope.threads()).sum();
        let gpu = k.roles.iter().any(|r| r.scope != Scope::Thread);
        if gpu && threads > limits.threads {
            self.wrong(format!("{threads} threads are used; a task has at most {}", limits.threads));
        }
        let mut registers = 0;
        for r in &k.roles {
            if r.units == 0 {
                self.wrong(format!("role `{}` has no units", r.name));
            }
            let Some(regs) = r.regs else { continue };
            if regs % 8 != 0 || !(24..=256).contains(&regs) {
                self.wrong(format!("role `{}`: setmaxnreg takes multiples of 8 from 24 to 256, not {regs}", r.name));
            }
            // setmaxnreg is a warpgroup's instruction: a lone warp occupies a warpgroup's share.
            registers += regs * (r.units * r.scope.threads()).next_multiple_of(128);
        }
        if registers > limits.registers {
            self.wrong(format!("{registers} registers are asked for; a task has {}", limits.registers));
        }
    }

    /// A dependent kernel ends after the ones before it, so that those after it need wait for it alone: some role waits
    /// on its way, whatever it does else.
    fn dependency(&mut self) {
        self.line = None;
        let wait = |s: &Stmt| matches!(s, Stmt::GridDependency(GridDependency::Wait));
        let waits = self.kernel.roles.iter().any(|r| r.body.iter().any(wait));
        if waits != self.kernel.dependent {
            self.wrong("a kernel is dependent exactly where one of its roles waits for the grids before it");
        }
    }

    /// Barriers used against their kind, and expected bytes that do not match the copies beside them.
    fn barriers(&mut self) {
        self.line = None;
        let k = self.kernel;
        let mut waited = HashSet::new();
        let mut arrived = HashSet::new();
        let mut stack: Vec<&[Stmt]> = k.roles.iter().map(|r| r.body.as_slice()).collect();
        let mut lists = Vec::new();
        while let Some(body) = stack.pop() {
            lists.push(body);
            for s in body {
                stack.extend(s.bodies());
                match s {
                    Stmt::Wait { barrier, .. } | Stmt::NamedSync { barrier, .. } => {
                        waited.insert(*barrier);
                        if matches!(s, Stmt::NamedSync { .. }) {
                            arrived.insert(*barrier);
                        }
                    }
                    Stmt::Arrive { barrier, .. } | Stmt::NamedArrive { barrier, .. } => {
                        arrived.insert(*barrier);
                    }
                    Stmt::Copy { engine: Engine::CpAsync, signal: Some((barrier, _)), .. } => {
                        arrived.insert(*barrier);
                    }
                    Stmt::Copy { .. }
                    | Stmt::For { .. }
                    | Stmt::If { .. }
                    | Stmt::Let { .. }
                    | Stmt::Map { .. }
                    | Stmt::Reduce { .. }
                    | Stmt::Scan { .. }
                    | Stmt::Load { .. }
                    | Stmt::Store { .. }
                    | Stmt::Gather { .. }
                    | Stmt::Scatter { .. }
                    | Stmt::Atom { .. }
                    | Stmt::Fence(_)
                    | Stmt::Commit(_)
                    | Stmt::WaitGroup { .. }
                    | Stmt::Last { .. }
                    | Stmt::TaskSync
                    | Stmt::ClusterSync
                    | Stmt::GridSync
                    | Stmt::GridDependency(_) => {}
                }
            }
        }
        for (id, b) in k.barriers.iter() {
            if waited.contains(&id) && !arrived.contains(&id) {
                self.wrong(format!("`{}` is waited for, but nothing arrives at it", b.name));
            }
            self.expected_bytes(id, &b.name, &lists);
        }
    }

    /// Where all copies that signal a barrier and all its expectations stand in one statement list, at the same stage
    /// and without multicast, the bytes must agree.
    fn expected_bytes(&mut self, id: BarrierId, name: &str, lists: &[&[Stmt]]) {
        let mut here = Vec::new();
        for (n, body) in lists.iter().enumerate() {
            let (mut copied, mut expected, mut stages, mut multicast) = (0, 0, Vec::new(), false);
            let mut any = false;
            for s in *body {
                match s {
                    Stmt::Copy {
                        engine: Engine::Tma, src, extents, signal: Some((b, stage)), multicast: m, ..
                    } if *b == id => {
                        copied += extents.iter().product::<u64>() * self.kernel.bufs[src.buf].dtype.bytes(1);
                        stages.push(stage);
                        multicast |= m.is_some();
                        any = true;
                    }
                    Stmt::Arrive { barrier, stage, expect_bytes: Some(bytes), .. } if *barrier == id => {
                        expected += bytes;
                        stages.push(stage);
                        any = true;
                    }
                    _ => {}
                }
            }
            if any {
                here.push((n, copied, expected, stages.windows(2).all(|w| w[0] == w[1]), multicast));
            }
        }
        if let [(_, copied, expected, true, false)] = here.as_slice()
            && copied != expected
        {
            self.wrong(format!("`{name}` expects {expected} bytes per phase; the copies beside it bring {copied}"));
        }
    }

    fn buf(&mut self, id: BufId) -> Option<&'a Buf> {
        let b = self.kernel.bufs.get(id);
        if b.is_none() {
            self.wrong(format!("there is no buffer {}", id.index()));
        }
        b
    }

    fn frag(&mut self, id: FragId) -> Option<&'a Frag> {
        let f = self.kernel.frags.get(id);
        if f.is_none() {
            self.wrong(format!("there is no fragment {}", id.index()));
        }
        f
    }

    fn barrier(&mut self, id: BarrierId) -> Option<&'a Barrier> {
        let b = self.kernel.barriers.get(id);
        if b.is_none() {
            self.wrong(format!("there is no barrier {}", id.index()));
        }
        b
    }
}
