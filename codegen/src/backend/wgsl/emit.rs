//! One kernel: its only role, control flow, and what all invocations must reach together.
//!
//! A branch whose condition differs between units cannot hold a barrier. Its statements stand in guarded runs instead,
//! `if (g) { .. }  barrier  if (g) { .. }`: values that cross a barrier are function variables. Invariant: barriers and
//! subgroup operations are printed outside all guards, in control flow that is the same for the whole workgroup.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;

use einfall_ir::analysis::resources;
use einfall_ir::arena::{Arena, Id};
use einfall_ir::artifact::Slot;
use einfall_ir::cascade::{Rank, RankId};
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{BufSpace, Expr, FragId, GroupKind, Kernel, Stmt, VarId, walk};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::BufferId;

use super::access::Form;
use super::ahead::Ahead;
use super::expr::Memo;
use super::frag::class;
use super::matrix::Products;
use super::value::{Ty, Val};
use super::{Res, Target, Unprintable};
use crate::backend::gpu::held::{Frags, ThreadDigit};
use crate::backend::gpu::memo::Element;
use crate::backend::gpu::reduction::Reduction;

/// Most values per invocation that one exchange moves.
const SLOTS: u64 = 8;

/// A name that WGSL takes, from one that may hold anything.
pub(super) fn plain(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }).collect()
}

/// How often a fragment is computed for the next statement alone, which sums it.
fn passing_pairs(body: &[Stmt], found: &mut BTreeMap<FragId, usize>) {
    for (i, s) in body.iter().enumerate() {
        if let Some(f) = resources::passing(&body[..=i]) {
            *found.entry(f).or_default() += 1;
        }
        match s {
            Stmt::For { body, .. } => passing_pairs(body, found),
            Stmt::If { then, otherwise, .. } => [then, otherwise].into_iter().for_each(|b| passing_pairs(b, found)),
            _ => {}
        }
    }
}

/// One kernel under way.
pub(super) struct Emit<'a> {
    pub(super) k: &'a Kernel,
    pub(super) ranks: &'a Arena<RankId, Rank>,
    pub(super) target: &'a Target,
    /// The body so far.
    pub(super) out: String,
    indent: usize,
    /// Integers that extents alone decide, by their text: names that the kernel begins with.
    settled: Vec<(String, String)>,
    /// Lines before the body.
    pub(super) head: String,
    /// Declarations of function variables.
    vars: String,
    pub(super) frags: Frags,
    pub(super) thread_coords: Vec<(Vec<ThreadDigit>, String)>,
    pub(super) units: u64,
    pub(super) unit_threads: u64,
    /// What the words of the uniform buffer are.
    pub(super) words: Vec<Slot>,
    pub(super) forms: Vec<Form>,
    pub(super) grid: Vec<Val>,
    /// What is known of each variable's range.
    pub(super) ranges: Vec<Option<(i64, i64)>>,
    /// Variables that differ between units.
    uneven: BTreeSet<VarId>,
    guards: Vec<String>,
    open: bool,
    /// Blocks entered within the guarded run that is open.
    inner: usize,
    names: usize,
    /// Fragments whose lanes hold parts of a sum, with what was summed over, and after which statements they are
    /// completed.
    pub(super) partial: BTreeMap<FragId, (FragId, Vec<usize>)>,
    complete: HashMap<*const Stmt, Vec<FragId>>,
    /// Which copy of the exchange is written next; none: some invocations may still read either.
    pub(super) turn: Option<usize>,
    /// Values per invocation in one copy of the exchange; 0: not used so far.
    pub(super) exchanged: u64,
    /// Fragments that one statement writes and one reads.
    summed_once: BTreeSet<FragId>,
    /// What the statement under way sums, as its elements are computed.
    pub(super) passing: Option<(FragId, Expr)>,
    /// Whether arrays that the kernel writes are read in it too.
    rereads: bool,
    /// Whether invocations exchange by operations of a subgroup.
    pub(super) subgroups: bool,
    /// Cooperative matrices.
    pub(super) products: Products,
    /// Copies that are under way, where they are not done when they are issued.
    pub(super) ahead: Option<Ahead>,
    /// Variables declared on the way.
    declared: BTreeSet<String>,
}

impl<'a> Emit<'a> {
    pub(super) fn new(k: &'a Kernel, ranks: &'a Arena<RankId, Rank>, target: &'a Target) -> Res<Emit<'a>> {
        let mut e = Emit {
            k,
            ranks,
            target,
            out: String::new(),
            indent: 1,
            settled: Vec::new(),
            head: String::new(),
            vars: String::new(),
            frags: Frags::new(&k.frags),
            thread_coords: Vec::new(),
            units: 1,
            unit_threads: 1,
            words: Vec::new(),
            forms: Vec::new(),
            grid: Vec::new(),
            ranges: vec![None; k.vars.len()],
            uneven: BTreeSet::new(),
            guards: Vec::new(),
            open: false,
            inner: 0,
            names: 0,
            partial: BTreeMap::new(),
            complete: HashMap::new(),
            turn: Some(0),
            exchanged: 0,
            summed_once: BTreeSet::new(),
            passing: None,
            rereads: false,
            subgroups: false,
            products: Products::default(),
            ahead: None,
            declared: BTreeSet::new(),
        };
        let [role] = k.roles.as_slice() else { return Err(e.fail("several roles")) };
        if !k.cluster.is_empty() {
            return Err(e.fail("clusters"));
        }
        if k.dependent {
            return Err(e.fail("dependent launches"));
        }
        (e.units, e.unit_threads) = (role.units, role.scope.threads());
        if e.threads() > target.invocations {
            let what = format!(
                "{} invocations in a workgroup: `maxComputeInvocationsPerWorkgroup` of {} is {}",
                e.threads(),
                target.name,
                target.invocations
            );
            return Err(e.fail(&what));
        }
        for (_, f) in k.frags.iter() {
            if f.dist.counts().2 > 1 {
                return Err(e.fail("vector lanes"));
            }
        }
        e.products = Products::of(k, target, |what| e.fail(what))?;
        e.ahead = Ahead::of(k, !e.products.atoms.is_empty());
        e.forms()?;
        let array = |b: &BufSpace| matches!(b, BufSpace::Global { .. });
        e.rereads = k.bufs.iter().zip(&e.forms).any(|((_, b), f)| array(&b.space) && f.written && f.read);
        let mut used: BTreeMap<FragId, [usize; 2]> = BTreeMap::new();
        walk(&role.body, &mut |s| {
            let (reads, writes) = s.frags();
            reads.iter().for_each(|f| used.entry(*f).or_default()[0] += 1);
            writes.iter().for_each(|f| used.entry(*f).or_default()[1] += 1);
        });
        // A loop's trips without masks and those with them are two pieces of code.
        let mut pairs = BTreeMap::new();
        passing_pairs(&role.body, &mut pairs);
        e.summed_once = pairs.into_iter().filter(|(f, n)| used.get(f) == Some(&[*n; 2])).map(|(f, _)| f).collect();
        for (id, f) in k.frags.iter() {
            let ty = class(f.dtype).name();
            for v in 0..e.held(id).count() {
                let name = e.held(id).variable(v);
                let _ = writeln!(e.vars, "    var {name}: {ty};");
            }
        }
        e.vars.push_str(&e.declare_matrices());
        for (_, v) in k.vars.iter() {
            let _ = writeln!(e.vars, "    var v_{}: i32;", plain(&v.name));
        }
        Ok(e)
    }

    /// Invocations of a workgroup.
    pub(super) fn threads(&self) -> u64 {
        self.units * self.unit_threads
    }

    pub(super) fn fail(&self, what: &str) -> Unprintable {
        let help = "choose another mapping, or rewrite it with supported constructs";
        Unprintable { kernel: self.k.name.clone(), what: what.to_string(), help }
    }

    /// A line of the body, within the guards.
    pub(super) fn line(&mut self, s: &str) {
        if !self.guards.is_empty() && !self.open {
            let all = self.guards.join(" && ");
            self.raw(&self.condition(&all, !self.products.atoms.is_empty()));
            self.indent += 1;
            self.open = true;
        }
        self.raw(s);
    }

    /// What begins a block that runs under a condition. naga takes no product of matrices in a branch on what a variable says, but
    /// a loop that is left: such a block is a loop of one trip, and ends with `break`.
    fn condition(&self, c: &str, products: bool) -> String {
        if products { format!("loop {{ if (!({c})) {{ break; }}") } else { format!("if ({c}) {{") }
    }

    fn raw(&mut self, s: &str) {
        for _ in 0..self.indent {
            self.out.push_str("    ");
        }
        self.out.push_str(s);
        self.out.push('\n');
    }

    /// Ends a guarded run.
    fn close(&mut self) {
        if self.open {
            if !self.products.atoms.is_empty() {
                self.raw("break;");
            }
            self.indent -= 1;
            self.open = false;
            self.raw("}");
        }
    }

    /// Prints outside the guards. Where invocations meet the open run has no block that is not closed.
    fn unguarded<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> T {
        assert_eq!(self.inner, 0, "a guarded run ends in a block of its own");
        self.close();
        let guards = std::mem::take(&mut self.guards);
        let r = f(self);
        self.guards = guards;
        r
    }

    /// Prints what binds a variable: outside the guards, where what units meet for can read it, but in a block of the
    /// guarded run, where they do not meet, in its place.
    fn binding<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> T {
        if self.inner > 0 { f(self) } else { self.unguarded(f) }
    }

    /// All invocations of the workgroup meet, unless they have just met.
    pub(super) fn barrier(&mut self) {
        self.products.passing = false;
        self.unguarded(|e| {
            if e.out.trim_end().ends_with("Barrier();") {
                return;
            }
            e.raw("workgroupBarrier();");
            if e.rereads {
                e.raw("storageBarrier();");
            }
        });
    }

    /// A line outside the guards.
    pub(super) fn outside(&mut self, s: &str) {
        self.unguarded(|e| e.raw(s));
    }

    /// Bytes of workgroup memory that tiles take.
    pub(super) fn tile_bytes(&self) -> u64 {
        let of = |b: &einfall_ir::kernel::Buf| match &b.space {
            BufSpace::Shared { layout, stages } => {
                let bytes = if self.products.halves && b.dtype == DType::F16 { 2 } else { 4 };
                bytes * (super::access::stage_elems(layout) * stages).next_multiple_of(4)
            }
            BufSpace::Global { .. } | BufSpace::Scratch { .. } => 0,
        };
        self.k.bufs.iter().map(|(_, b)| of(b)).sum()
    }

    /// Bytes of workgroup memory that exchanges take.
    pub(super) fn exchange_bytes(&self) -> u64 {
        let words = if self.exchanged > 0 { (self.exchange_slots() + self.exchanged) * self.threads() } else { 0 };
        4 * words
    }

    /// Values per invocation in one copy of the exchange, as far as workgroup memory reaches.
    pub(super) fn exchange_slots(&self) -> u64 {
        let left = self.target.workgroup_bytes.saturating_sub(self.tile_bytes());
        (left / (2 * 4 * self.threads())).clamp(2, SLOTS)
    }

    /// `{`, with what follows one level deeper.
    pub(super) fn enter(&mut self, s: &str) {
        self.line(s);
        self.indent += 1;
        self.inner += usize::from(self.open);
    }

    /// Ends what [`Emit::enter`] began.
    pub(super) fn leave(&mut self) {
        self.indent -= 1;
        self.inner -= usize::from(self.open);
        self.raw("}");
    }

    /// A fresh name.
    pub(super) fn fresh(&mut self, prefix: &str) -> String {
        self.names += 1;
        format!("{prefix}{}", self.names)
    }

    /// The value under a name of its own, within the present block.
    pub(super) fn named(&mut self, v: &Val) -> Val {
        let plain = v.s.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if plain { v.clone() } else { self.copied(v) }
    }

    /// The value as it is now, within the present block: a variable named in it may change.
    fn copied(&mut self, v: &Val) -> Val {
        if v.k.is_some() || v.known().is_some() {
            return v.clone();
        }
        let name = self.fresh("x");
        self.line(&format!("let {name} = {};", v.s));
        Val { s: name, ..v.clone() }
    }

    /// An integer that extents alone decide, computed once at the kernel's start.
    pub(super) fn settled(&mut self, v: &Val) -> Val {
        if v.ty != Ty::Int || v.known().is_some() {
            return v.clone();
        }
        let found = self.settled.iter().find(|(text, name)| *text == v.s || *name == v.s);
        let name = found.map(|(_, name)| name.clone()).unwrap_or_else(|| {
            let name = format!("e_{}", self.settled.len());
            self.settled.push((v.s.clone(), name.clone()));
            name
        });
        Val { s: name, ..v.clone() }
    }

    /// A function variable, which keeps its value across barriers.
    pub(super) fn kept(&mut self, ty: Ty) -> String {
        let name = self.fresh("k");
        let _ = writeln!(self.vars, "    var {name}: {};", ty.name());
        name
    }

    /// A function variable of this name, which keeps its value across barriers.
    pub(super) fn declare_once(&mut self, name: &str, ty: &str) {
        if self.declared.insert(name.to_owned()) {
            let _ = writeln!(self.vars, "    var {name}: {ty};");
        }
    }

    /// A word of the uniform buffer.
    pub(super) fn word(&mut self, slot: Slot) -> String {
        let i = self.words.iter().position(|s| *s == slot).unwrap_or_else(|| {
            self.words.push(slot);
            self.words.len() - 1
        });
        format!("u.w{i}")
    }

    /// A rank's extent.
    pub(super) fn extent(&mut self, r: RankId) -> Val {
        match self.ranks[r].fixed {
            Some(n) => Val::int(n as i64),
            None => Val::ranged(self.word(Slot::Extent(r)), 0, i64::from(i32::MAX)),
        }
    }

    /// The array of a buffer in device memory.
    pub(super) fn array(&self, buf: einfall_ir::kernel::BufId) -> Option<BufferId> {
        match self.k.bufs[buf].space {
            BufSpace::Global { param, .. } => Some(BufferId::new(param)),
            BufSpace::Shared { .. } | BufSpace::Scratch { .. } => None,
        }
    }

    /// The task's place in the grid, from its number.
    fn place_task(&mut self) -> Res<()> {
        let extents = self.k.grid.iter().map(|g| self.int(g)).collect::<Res<Vec<_>>>()?;
        let mut all = Val::int(1);
        for n in &extents {
            all = self.bin(BinaryOp::Mul, &all, n)?;
        }
        self.line("let task = i32(group.x + group.y * groups.x);");
        self.line(&format!("if (task >= {}) {{ return; }}", all.s));
        let mut rest = Val::ranged("task", 0, i64::from(i32::MAX));
        let mut grid = vec![Val::int(0); extents.len()];
        for d in (0..extents.len()).rev() {
            let n = extents[d].clone();
            // The task exists: no extent is 0.
            let n = Val { lo: n.lo.max(1), ..n };
            if n.known() == Some(1) {
                continue;
            }
            let place = if d == 0 { rest.clone() } else { self.bin(BinaryOp::Mod, &rest, &n)? };
            let name = format!("g_{d}");
            self.line(&format!("let {name} = {};", place.s));
            grid[d] = Val::ranged(name, 0, i64::from(i32::MAX));
            if d > 0 {
                let next = self.bin(BinaryOp::Div, &rest, &n)?;
                rest = self.named(&next);
            }
        }
        self.grid = grid;
        Ok(())
    }

    /// The entry's body: declarations, the task's place, the role.
    pub(super) fn run(&mut self) -> Res<String> {
        self.place_task()?;
        let placed = std::mem::take(&mut self.out);
        let body = &self.k.roles[0].body;
        self.find_partial(body);
        self.body(body)?;
        let body = std::mem::take(&mut self.out);
        let settled: String = self.settled.iter().map(|(text, name)| format!("    let {name} = {text};\n")).collect();
        Ok(format!("{settled}{placed}{}{}{body}", self.head, self.vars))
    }

    /// Finds the sums whose lanes are joined once.
    fn find_partial(&mut self, body: &'a [Stmt]) {
        use crate::backend::ptx::partial::{last, sums};
        for f in self.k.frags.ids() {
            let Some(end) = last(self.k, body, f) else { continue };
            let mut all = Vec::new();
            sums(body, f, &mut all);
            let lanes: Vec<Vec<ThreadDigit>> = all.iter().map(|(src, over)| self.reduced(*src, over)).collect();
            let Some(first) = lanes.first().filter(|l| !l.is_empty()) else { continue };
            if class(self.held(f).dtype) == Ty::Float && lanes.iter().all(|l| l == first) {
                self.partial.insert(f, (all[0].0, all[0].1.to_vec()));
                self.complete.entry(std::ptr::from_ref(end)).or_default().push(f);
            }
        }
    }

    fn body(&mut self, body: &[Stmt]) -> Res<()> {
        for (i, s) in body.iter().enumerate() {
            // What the next statement alone sums is computed there, element by element.
            let passing = body.get(..i + 2).and_then(resources::passing).filter(|f| self.summed_once.contains(f));
            if let (Some(f), Stmt::Map { value, .. }) = (passing, s) {
                self.before_elements(s)?;
                self.passing = Some((f, value.clone()));
                continue;
            }
            self.stmt(s)?;
            self.passing = None;
            for f in self.complete.get(&std::ptr::from_ref(s)).cloned().unwrap_or_default() {
                self.complete(f)?;
            }
        }
        Ok(())
    }

    /// Whether invocations of the workgroup meet somewhere in the statements.
    fn meets(&self, body: &[Stmt]) -> bool {
        let mut found = self.passes_elements(body);
        let mut reductions = Vec::new();
        walk(body, &mut |s| {
            found |= self.complete.contains_key(&std::ptr::from_ref(s));
            match s {
                Stmt::TaskSync | Stmt::NamedSync { .. } => found = true,
                // Parts of a sum are joined later.
                Stmt::Reduce { out, carry: true, .. } if self.partial.contains_key(&out[0]) => {}
                Stmt::Reduce { src, over, .. } => reductions.push((*src, over.clone())),
                Stmt::Scan { src, along, .. } => reductions.push((*src, vec![*along])),
                _ => {}
            };
        });
        found || reductions.iter().any(|(src, over)| !self.reduced(*src, over).is_empty())
    }

    /// Whether the value differs between units of a task.
    fn uneven(&self, e: &Expr) -> bool {
        let mut found = match e {
            Expr::Unit => self.units > 1,
            Expr::Var(v) => self.uneven.contains(v),
            Expr::Fetch { buf, .. } => self.forms[buf.index()].written,
            _ => false,
        };
        e.for_each_operand(|o| found |= self.uneven(o));
        found
    }

    fn stmt(&mut self, s: &Stmt) -> Res<()> {
        if matches!(s, Stmt::Atom { .. }) {
            return self.statement(s);
        }
        self.before_elements(s)?;
        if !self.cleared(s) {
            self.statement(s)?;
            self.after_elements(s);
        }
        Ok(())
    }

    fn statement(&mut self, s: &Stmt) -> Res<()> {
        match s {
            Stmt::For { var, lo, hi, step, unroll, body } => self.for_loop(*var, lo, hi, *step, *unroll, body),
            Stmt::If { cond, then, otherwise } => self.branch(cond, then, otherwise),
            Stmt::Let { var, value } => {
                let apart = self.uneven(value);
                let v = self.binding(|e| -> Res<Val> {
                    let v = e.int(value)?;
                    let name = plain(&e.k.vars[*var].name);
                    e.line(&format!("v_{name} = {};", v.s));
                    Ok(v)
                })?;
                if apart {
                    self.uneven.insert(*var);
                } else {
                    self.uneven.remove(var);
                }
                self.ranges[var.index()] = Some((v.lo, v.hi));
                Ok(())
            }
            Stmt::Map { out, value } => self.map(*out, value),
            Stmt::Reduce { out, op, src, over, base, bounds, carry } => {
                let (op, src, base, carry) = (*op, *src, base.as_ref(), *carry);
                self.reduce(&Reduction { out, op, src, over, base, bounds, carry })
            }
            Stmt::Scan { out, op, src, along, carry, bounds } => self.scan(*out, *op, *src, *along, *carry, bounds),
            Stmt::Load { out, src, bounds } => self.load(*out, src, bounds),
            Stmt::Store { dst, src, bounds, join } => self.store(dst, *src, bounds, *join),
            Stmt::Gather { out, buf, at, bounds } => self.gather(*out, *buf, at, bounds),
            Stmt::Scatter { buf, at, src, bounds, join } => self.scatter(*buf, at, *src, bounds, *join),
            Stmt::Atom { atom, acc, acc_from, a, b, keep } => self.atom(atom, *acc, acc_from, a, b, keep),
            Stmt::Copy { engine, src, dst, extents, signal, multicast } => {
                self.copy(*engine, src, dst, extents, signal.is_some() || multicast.is_some())
            }
            Stmt::Commit(GroupKind::CpAsync) => {
                self.commit();
                Ok(())
            }
            Stmt::WaitGroup { kind: GroupKind::CpAsync, pending } => self.await_groups(*pending),
            Stmt::TaskSync => {
                self.barrier();
                self.turn = Some(0);
                Ok(())
            }
            Stmt::Arrive { .. } | Stmt::Wait { .. } => Err(self.fail("mbarriers")),
            Stmt::NamedSync { .. } | Stmt::NamedArrive { .. } => Err(self.fail("named barriers")),
            Stmt::Fence(_) => Err(self.fail("fences of asynchronous engines")),
            Stmt::Commit(_) | Stmt::WaitGroup { .. } => Err(self.fail("groups of asynchronous instructions")),
            Stmt::Last { .. } => Err(self.fail("counters of arrivals in device memory")),
            Stmt::ClusterSync => Err(self.fail("clusters")),
            Stmt::GridSync => Err(self.fail("grid-wide synchronisation")),
            Stmt::GridDependency(_) => Err(self.fail("dependent launches")),
        }
    }

    fn map(&mut self, out: FragId, value: &Expr) -> Res<()> {
        let mut memo = Memo::default();
        let reads_itself = value.reads(out);
        let mut late = Vec::new();
        for v in 0..self.held(out).count() {
            let el = Element { of: out, v, at: self.held(out).consts[v].clone() };
            let x = self.value(value, Some(&el), &mut memo)?;
            if reads_itself {
                // Values kept in the memo may be those of other elements.
                late.push(self.copied(&x));
            } else {
                self.set(out, v, &x)?;
            }
        }
        for (v, x) in late.iter().enumerate() {
            self.set(out, v, x)?;
        }
        Ok(())
    }

    /// Forgets what is known of variables that the statements bind.
    fn forget(&mut self, body: &[Stmt]) {
        let mut bound = Vec::new();
        walk(body, &mut |s| {
            if let Stmt::Let { var, .. } | Stmt::For { var, .. } = s {
                bound.push(*var);
            }
        });
        bound.into_iter().for_each(|v| self.ranges[v.index()] = None);
    }

    fn for_loop(&mut self, var: VarId, lo: &Expr, hi: &Expr, step: i64, unroll: bool, body: &[Stmt]) -> Res<()> {
        let written = if unroll { Vec::new() } else { self.settle(body)? };
        let meets = self.meets(body);
        if meets && (self.uneven(lo) || self.uneven(hi)) {
            return Err(self.fail("a loop whose trips differ between units and in which they meet"));
        }
        let apart = self.uneven(lo) || self.uneven(hi);
        let name = format!("v_{}", plain(&self.k.vars[var].name));
        if unroll {
            let (lo, hi) = (self.int(lo)?, self.int(hi)?);
            let (Some(mut i), Some(end)) = (lo.known(), hi.known()) else {
                return Err(self.fail("an unrolled loop whose trip count is not known"));
            };
            while i < end {
                self.binding(|e| e.line(&format!("{name} = {i};")));
                self.ranges[var.index()] = Some((i, i));
                // A matrix of another trip is another window by the same name.
                self.products.loaded.clear();
                self.body(body)?;
                i += step;
            }
            return Ok(());
        }
        // What a trip stores first of what the one before it loaded is stored in that one, behind everything else: values that
        // live from one trip to the next would be waited for before the next trip's products (docs/tuning-log.md, section 11).
        let (stored, body) = match body {
            [s @ Stmt::WaitGroup { pending: 0, .. }, rest @ ..] if self.ahead.is_some() => (Some(s), rest),
            _ => (None, body),
        };
        if let Some(s) = stored {
            self.stmt(s)?;
        }
        self.forget(body);
        // Guards stand within the loop if units meet there.
        let print = |e: &mut Self| -> Res<()> {
            let (lo, hi) = (e.int(lo)?, e.int(hi)?);
            // The bound is fixed before the first trip.
            let hi = e.named(&hi);
            e.ranges[var.index()] = Some((lo.lo, i64::from(i32::MAX)));
            e.enter(&format!("for ({name} = {}; {name} < {}; {name} += {step}) {{", lo.s, hi.s));
            Ok(())
        };
        if meets {
            self.unguarded(print)?;
        } else {
            print(self)?;
        }
        if apart {
            self.uneven.insert(var);
        } else {
            self.uneven.remove(&var);
        }
        let before = self.turn.take();
        let passing = self.products.passing;
        self.body(body)?;
        if let Some(s) = stored {
            self.stmt(s)?;
        }
        self.settled_as(&written)?;
        self.products.passing |= passing;
        if meets {
            self.close();
        }
        self.leave();
        self.turn = if meets { None } else { before };
        self.forget(body);
        self.ranges[var.index()] = None;
        Ok(())
    }

    fn branch(&mut self, cond: &Expr, then: &[Stmt], otherwise: &[Stmt]) -> Res<()> {
        let mut written = self.settle(then)?;
        written.extend(self.settle(otherwise)?);
        self.settled_as(&written)?;
        let meets = self.meets(then) || self.meets(otherwise);
        let value = |e: &mut Self| -> Res<Val> {
            let c = e.uniform(cond)?;
            Ok(e.to(&c, Ty::Bool))
        };
        let c = if meets { self.unguarded(value)? } else { value(self)? };
        match c.known() {
            Some(0) => return self.body(otherwise),
            Some(_) => return self.body(then),
            None => {}
        }
        let (before, ranges) = (self.turn, self.ranges.clone());
        let passing = self.products.passing;
        // Either branch begins with the copies under way here, and both leave the same.
        let ahead = self.ahead.clone();
        if meets && self.uneven(cond) {
            let name = self.fresh("in");
            self.unguarded(|e| e.line(&format!("let {name} = {};", c.s)));
            for (guard, list) in [(name.clone(), then), (format!("!{name}"), otherwise)] {
                self.close();
                self.guards.push(guard);
                self.ahead.clone_from(&ahead);
                self.body(list)?;
                self.settled_as(&written)?;
                self.close();
                self.guards.pop();
                self.ranges.clone_from(&ranges);
            }
        } else {
            let products = [then, otherwise].iter().any(|body| self.multiplies(body));
            let c = if products { self.binding(|e| e.named(&c)) } else { c };
            let head = self.condition(&c.s, products);
            if meets {
                self.unguarded(|e| e.enter(&head))
            } else {
                self.enter(&head)
            }
            self.body(then)?;
            self.settled_as(&written)?;
            let after = self.turn;
            if meets {
                self.close();
            }
            if products {
                self.raw("break;");
            }
            if !otherwise.is_empty() {
                self.indent -= 1;
                match products {
                    true => {
                        self.raw("}");
                        self.raw(&self.condition(&format!("!{}", c.s), true));
                    }
                    false => self.raw("} else {"),
                }
                self.indent += 1;
                self.ranges.clone_from(&ranges);
                self.turn = before;
                self.ahead.clone_from(&ahead);
                self.body(otherwise)?;
                self.settled_as(&written)?;
                if meets {
                    self.close();
                }
                if products {
                    self.raw("break;");
                }
            }
            self.leave();
            self.turn = if after == self.turn && after == before { before } else { None };
        }
        self.ranges = ranges;
        self.products.passing |= passing;
        self.forget(then);
        self.forget(otherwise);
        Ok(())
    }
}
