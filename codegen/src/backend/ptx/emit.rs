//! Kernels: where everything lives, roles by warps, and control flow.
//!
//! Warps are given to roles in order, warpgroup roles first; a role with a register budget, or of warpgroups, starts at
//! a multiple of four warps, since setmaxnreg and wgmma are instructions of a warpgroup. Warps left over take the budget
//! of their warpgroup and end. The warp number is broadcast by a shuffle, so that ptxas knows what depends on it to be
//! uniform. Invariant: everything printed outside a role's branch is executed by all threads of the task.

use std::collections::{BTreeSet, HashMap};

use einfall_ir::analysis::resources::{exchange, instruction_registers, launch_registers};
use einfall_ir::arena::{Arena, Id};
use einfall_ir::cascade::{Rank, RankId};
use einfall_ir::kernel::{BarrierKind, BufSpace, Expr, FragId, Kernel, Role, Scope, Stmt, View, walk};
use einfall_ir::ops::BinaryOp;

use super::across::Exchange;
use super::copy::Maps;
use super::expr::Memo;
use super::partial::Partial;
use super::ranges::{Facts, Interval, loose, merge};
use super::sync::Arrivals;
use super::text::{Text, Ty, Val};
use super::{Res, Target, Unprintable};
use crate::backend::gpu::held::{Frags, ThreadDigit};
use crate::backend::gpu::memo::Element;
use crate::backend::gpu::reduction::Reduction;

/// Registers a thread can name (PTX ISA: 255 of 256).
const THREAD_REGISTERS: u64 = 255;

/// Where things lie in shared memory, in bytes from its start, and which hardware barriers are taken.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) bufs: Vec<u64>,
    pub(super) barriers: Vec<u64>,
    /// First hardware barrier of a named one.
    pub(super) named: Vec<u64>,
    pub(super) next_named: u64,
    pub(super) bytes: u64,
    /// By role: where its units exchange values, and the bytes of one copy of one unit.
    pub(super) exchange: Vec<(u64, u64)>,
}

impl Shared {
    /// As [`einfall_ir::analysis::resources`] counts it.
    fn of(k: &Kernel) -> Shared {
        let mut s = Shared { next_named: 1, ..Shared::default() };
        for (_, b) in k.bufs.iter() {
            let BufSpace::Shared { layout, stages } = &b.space else {
                s.bufs.push(0);
                continue;
            };
            let at = s.bytes.next_multiple_of(layout.alignment());
            s.bufs.push(at);
            s.bytes = at + layout.stage_bytes(b.dtype.bytes(1)) * stages;
        }
        for (_, b) in k.barriers.iter() {
            s.barriers.push(s.bytes.next_multiple_of(8));
            s.named.push(s.next_named);
            match b.kind {
                BarrierKind::Mbarrier { .. } => s.bytes = s.bytes.next_multiple_of(8) + 8 * b.stages,
                BarrierKind::Named { .. } => s.next_named += b.stages,
            }
        }
        for r in &k.roles {
            let size = exchange(k, r);
            s.exchange.push((s.bytes, size));
            s.bytes += 2 * size * r.units;
        }
        s
    }
}

/// The role being printed.
pub(super) struct RoleState {
    /// Its place among the kernel's.
    pub(super) index: usize,
    pub(super) exchange: Option<Exchange>,
    pub(super) scope: Scope,
    pub(super) units: u64,
    pub(super) unit: Val,
    /// The thread's number in its unit.
    pub(super) thread: Val,
    pub(super) thread_coords: HashMap<Vec<ThreadDigit>, Val>,
    pub(super) replicas: HashMap<(Vec<ThreadDigit>, u64), Val>,
    /// What is known of each variable's range.
    pub(super) vars: Vec<Option<Interval>>,
    /// Variables that may be any integer.
    pub(super) loose: BTreeSet<usize>,
    /// Whether lanes may have accessed memory since they last met.
    pub(super) dirty: bool,
    pub(super) unit_barriers: Option<u64>,
    /// Whether nothing but wgmma has happened since the last `wgmma.fence`.
    pub(super) fenced: bool,
    /// Address fields of matrix descriptors, by window, with constant bytes still to add: of code without branches whose
    /// variables have not changed.
    pub(super) descriptors: Vec<(View, String, i64)>,
    /// Registers of an instruction's rows that a fragment does not have, by fragment and its first register there.
    pub(super) upper_rows: HashMap<(FragId, String), Vec<String>>,
    /// Running sums whose lanes are joined once.
    pub(super) partial: Partial,
    /// The last reduction of many elements since wgmma was last committed or awaited, in code without branches.
    pub(super) joined: Option<FragId>,
    /// Text before the body.
    before: String,
    /// Whether what has one value in a task goes there.
    pub(super) hoists: bool,
    leader: String,
    lane: String,
    others: String,
}

impl RoleState {
    fn none(k: &Kernel) -> RoleState {
        RoleState {
            index: 0,
            exchange: None,
            scope: Scope::Thread,
            units: 1,
            unit: Val::int(0),
            thread: Val::int(0),
            thread_coords: HashMap::new(),
            replicas: HashMap::new(),
            vars: vec![None; k.vars.len()],
            loose: BTreeSet::new(),
            dirty: false,
            unit_barriers: None,
            fenced: false,
            descriptors: Vec::new(),
            upper_rows: HashMap::new(),
            partial: Partial::default(),
            joined: None,
            before: String::new(),
            hoists: false,
            leader: String::new(),
            lane: String::new(),
            others: String::new(),
        }
    }
}

/// Shared memory that the system takes of every task, in bytes.
const TASK_SHARED: u64 = 1024;

/// Warps of a role.
#[derive(Clone)]
struct Place {
    role: usize,
    first: u64,
    count: u64,
}

/// One kernel under way.
pub(super) struct Emit<'a> {
    pub(super) k: &'a Kernel,
    pub(super) ranks: &'a Arena<RankId, Rank>,
    pub(super) target: &'a Target,
    pub(super) t: Text,
    pub(super) frags: Frags,
    pub(super) shared: Shared,
    pub(super) arrivals: Vec<Arrivals>,
    pub(super) maps: Maps,
    pub(super) grid: Vec<Val>,
    /// Values of scalar parameters, by buffer.
    pub(super) scalars: Vec<Option<Val>>,
    pub(super) role: RoleState,
    /// Expressions computed once for the task, or so far once for the role.
    pub(super) fixed: Vec<(Expr, Val)>,
    /// Whether arrays that bulk copies write are read in the same kernel.
    pub(super) rereads: bool,
    /// Whether any array is both written and read.
    exchanges: bool,
    places: Vec<Place>,
    /// Threads of a task, idle ones included.
    pub(super) threads: u64,
}

impl<'a> Emit<'a> {
    pub(super) fn new(k: &'a Kernel, ranks: &'a Arena<RankId, Rank>, target: &'a Target) -> Emit<'a> {
        let mut t = Text::default();
        let frags = Frags::new(&k.frags);
        frags.iter().for_each(|f| f.declare(&mut t));
        t.name("%v", Ty::S32, k.vars.len());
        let (places, warps) = place_roles(k);
        Emit {
            k,
            ranks,
            target,
            t,
            frags,
            shared: Shared::of(k),
            arrivals: Arrivals::of(k),
            maps: Maps::default(),
            grid: Vec::new(),
            scalars: vec![None; k.bufs.len()],
            role: RoleState::none(k),
            fixed: Vec::new(),
            rereads: super::copy::rereads(k),
            exchanges: super::copy::exchanges(k),
            places,
            threads: warps * 32,
        }
    }

    pub(super) fn fail(&self, what: &str) -> Unprintable {
        Unprintable { kernel: self.k.name.clone(), what: what.to_string() }
    }

    /// A rank's extent.
    pub(super) fn extent(&self, r: RankId) -> Val {
        match self.ranks[r].fixed {
            Some(n) => Val::int(n as i64),
            None => Val::ranged(format!("%n{}", r.index()), 0, i64::from(i32::MAX)),
        }
    }

    /// Prints what `f` does before the role's body.
    pub(super) fn hoisted(&mut self, f: impl FnOnce(&mut Self)) {
        std::mem::swap(&mut self.t.out, &mut self.role.before);
        f(self);
        std::mem::swap(&mut self.t.out, &mut self.role.before);
    }

    /// Guard of instructions that one thread of the unit executes.
    pub(super) fn leader(&self) -> String {
        self.role.leader.clone()
    }

    /// Guard of instructions that one lane of every warp executes.
    pub(super) fn lane_leader(&self) -> String {
        self.role.lane.clone()
    }

    /// Guard of one lane of every warp of the unit but the first.
    pub(super) fn other_warps(&self) -> String {
        self.role.others.clone()
    }

    /// The task's place in the grid: clusters are numbered in the grid of clusters, tasks within them.
    pub(super) fn place_task(&mut self) -> Res<()> {
        let cluster = if self.k.cluster.is_empty() { vec![1; self.k.grid.len()] } else { self.k.cluster.clone() };
        let size: u64 = cluster.iter().product();
        let mut extents = Vec::new();
        for (g, c) in self.k.grid.iter().zip(&cluster) {
            let g = self.int(g)?;
            extents.push(self.bin(BinaryOp::Div, &g, &Val::int(*c as i64))?);
        }
        let task = Val::ranged(self.t.def(Ty::S32, "mov.u32", &["%ctaid.x"]), 0, i64::from(i32::MAX));
        let mut rest = self.bin(BinaryOp::Div, &task, &Val::int(size as i64))?;
        let mut inner = Val::int(0);
        if size > 1 {
            self.t.line("mov.u32 %cluster_rank, %cluster_ctarank");
            inner = Val::ranged("%cluster_rank".to_string(), 0, size as i64 - 1);
        }
        let mut grid = vec![Val::int(0); extents.len()];
        for d in (0..extents.len()).rev() {
            let block = if d == 0 {
                rest.clone()
            } else {
                let b = self.bin(BinaryOp::Mod, &rest, &extents[d])?;
                rest = self.bin(BinaryOp::Div, &rest, &extents[d])?;
                b
            };
            let block = if extents[d].int_const() == Some(1) { Val::int(0) } else { block };
            let c = Val::int(cluster[d] as i64);
            let within = self.bin(BinaryOp::Mod, &inner, &c)?;
            inner = self.bin(BinaryOp::Div, &inner, &c)?;
            let first = self.mul(&block, &c);
            grid[d] = self.add(&first, &within);
            grid[d].lo = grid[d].lo.max(0);
        }
        self.grid = grid;
        Ok(())
    }

    /// Prints the roles.
    pub(super) fn roles(&mut self) -> Res<()> {
        let warp = self.t.def(Ty::S32, "shr.u32", &["%thread", "5"]);
        self.t.line(&format!("shfl.sync.idx.b32 %warp, {warp}, 0, 31, 0xFFFFFFFF"));
        self.t.line("and.b32 %lane, %thread, 31");
        self.init_barriers();
        let end = self.t.label();
        let budgets = self.k.roles.len() > 1 && self.k.roles.iter().any(|r| r.regs.is_some());
        let even = launch_registers(self.target.registers, THREAD_REGISTERS, self.threads, self.resident());
        let places = self.places.clone();
        let shared = self.fixed.len();
        let mut at = 0;
        for p in &places {
            self.fixed.truncate(shared);
            let role = &self.k.roles[p.role];
            let next = self.t.label();
            if at + p.count < self.threads / 32 {
                let inside = self.t.def(Ty::Pred, "setp.lt.u32", &["%warp", &(p.first + p.count).to_string()]);
                self.t.line(&format!("@!{inside} bra {next}"));
            }
            self.t.out.push_str(&format!("\t// role {}\n", role.name));
            if budgets && self.target.hopper() {
                self.set_registers(role.regs, even);
            }
            self.role(role, p.first)?;
            self.t.line(&format!("bra.uni {end}"));
            self.t.place(&next);
            at = p.first + p.count;
        }
        if budgets && self.target.hopper() && !at.is_multiple_of(4) {
            let last = places.last().and_then(|p| self.k.roles[p.role].regs);
            self.set_registers(last, even);
        }
        self.t.place(&end);
        self.t.line("ret");
        Ok(())
    }

    /// Tasks that a multiprocessor runs at a time, where budgets, shared memory and threads leave room for several: then
    /// all of them must start with as many registers as there are for each.
    pub(super) fn resident(&self) -> u64 {
        let mut budget = 0;
        for warp in (0..self.threads / 32).step_by(4) {
            let of = |p: &Place| (p.first..p.first + p.count).contains(&warp);
            let role = self.places.iter().find(|p| of(p)).or(self.places.last());
            match role.and_then(|p| self.k.roles[p.role].regs) {
                Some(r) => budget += r * 128,
                None => return 1,
            }
        }
        if self.k.roles.len() < 2 || !self.target.hopper() {
            return 1;
        }
        let shared = self.target.shared_bytes / (self.shared.bytes + TASK_SHARED);
        let threads = self.target.threads / self.threads.max(1);
        let fits = |tasks: &u64| {
            let each = launch_registers(self.target.registers, THREAD_REGISTERS, self.threads, *tasks);
            each * self.threads >= budget && each >= instruction_registers(self.k)
        };
        (2..=shared.min(threads)).rev().find(fits).unwrap_or(1)
    }

    fn set_registers(&mut self, regs: Option<u64>, even: u64) {
        if let Some(r) = regs {
            let way = if r <= even { "dec" } else { "inc" };
            self.t.line(&format!("setmaxnreg.{way}.sync.aligned.u32 {r}"));
        }
    }

    fn role(&mut self, role: &Role, first: u64) -> Res<()> {
        let warps_per_unit = role.scope.threads() / 32;
        let index = self.k.roles.iter().position(|r| std::ptr::eq(r, role)).unwrap_or(0);
        let loose = loose(&role.body);
        self.role = RoleState { index, scope: role.scope, units: role.units, loose, ..RoleState::none(self.k) };
        let body = std::mem::take(&mut self.t.out);
        self.hoisted(|e| {
            let warp = Val::ranged("%warp".to_string(), first as i64, 31);
            let own = e.sub(&warp, &Val::int(first as i64));
            let last = role.units as i64 - 1;
            match role.scope {
                Scope::Thread => {
                    let base = e.mul(&own, &Val::int(32));
                    let lane = Val::ranged("%lane".to_string(), 0, 31);
                    let n = e.add(&base, &lane);
                    e.role.unit = Val { lo: 0, hi: last.max(0), ..n };
                }
                Scope::Warp | Scope::Warpgroup => {
                    let unit = if role.units == 1 {
                        Val::int(0)
                    } else {
                        e.bin(BinaryOp::Div, &own, &Val::int(warps_per_unit as i64)).expect("integers divide")
                    };
                    e.role.unit = Val { hi: last, ..unit };
                    let lane0 = if e.target.hopper() {
                        let p = e.t.reg(Ty::Pred);
                        e.t.line(&format!("elect.sync _|{p}, 0xFFFFFFFF"));
                        p
                    } else {
                        e.t.def(Ty::Pred, "setp.eq.s32", &["%lane", "0"])
                    };
                    e.role.lane = format!("@{lane0} ");
                    e.role.leader = e.role.lane.clone();
                    e.role.thread = Val::ranged("%lane".to_string(), 0, 31);
                    if role.scope == Scope::Warpgroup {
                        let w = e.t.def(Ty::S32, "and.b32", &["%warp", "3"]);
                        let zero = e.t.def(Ty::Pred, "setp.eq.s32", &[&w, "0"]);
                        let p = e.t.def(Ty::Pred, "and.pred", &[&zero, &lane0]);
                        e.role.leader = format!("@{p} ");
                        let not = e.t.def(Ty::Pred, "setp.ne.s32", &[&w, "0"]);
                        let p = e.t.def(Ty::Pred, "and.pred", &[&not, &lane0]);
                        e.role.others = format!("@{p} ");
                        let t = e.t.def(Ty::S32, "and.b32", &["%thread", "127"]);
                        e.role.thread = Val::ranged(t, 0, 127);
                    }
                }
            }
        });
        self.role.hoists = true;
        let skip = self.t.label();
        if role.scope == Scope::Thread {
            let n = role.units as i64;
            let unit = self.role.unit.clone();
            if n % 32 != 0 {
                let beyond = self.bin(BinaryOp::Ge, &Val::reg(Ty::S32, unit.s), &Val::int(n))?;
                self.t.line(&format!("@{} bra {skip}", beyond.s));
            }
        }
        self.find_partial(&role.body)?;
        self.body(&role.body, true)?;
        self.t.place(&skip);
        let printed = std::mem::replace(&mut self.t.out, body);
        let before = std::mem::take(&mut self.role.before);
        self.t.out.push_str(&before);
        self.t.out.push_str(&printed);
        Ok(())
    }

    /// Prints statements; `last`: nothing of the role follows them.
    fn body(&mut self, body: &[Stmt], last: bool) -> Res<()> {
        for (i, s) in body.iter().enumerate() {
            self.stmt(s, last && i + 1 == body.len(), last && ends_quietly(&body[i + 1..]))?;
            self.complete_partial(s)?;
        }
        self.role.descriptors.clear();
        self.role.joined = None;
        Ok(())
    }

    fn stmt(&mut self, s: &Stmt, last: bool, quiet: bool) -> Res<()> {
        self.role.fenced &= matches!(s, Stmt::Atom { .. } | Stmt::Commit(_) | Stmt::Fence(_));
        if matches!(s, Stmt::Let { .. } | Stmt::For { .. } | Stmt::If { .. }) {
            self.role.descriptors.clear();
        }
        if matches!(s, Stmt::For { .. } | Stmt::If { .. }) {
            self.role.joined = None;
        }
        match s {
            Stmt::For { var, lo, hi, step, unroll, body } => self.for_loop(var.index(), lo, hi, *step, *unroll, body),
            Stmt::If { cond, then, otherwise } => self.branch(cond, then, otherwise, last),
            Stmt::Let { var, value } => {
                let v = self.int(value)?;
                self.t.line(&format!("mov.b32 %v{}, {}", var.index(), v.s));
                self.role.vars[var.index()] = Some((v.lo, v.hi));
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
                self.copy(*engine, src, dst, extents, signal.as_ref(), *multicast)
            }
            Stmt::Arrive { barrier, stage, expect_bytes, remote } => {
                self.arrive(*barrier, stage, *expect_bytes, remote.as_ref())
            }
            Stmt::Wait { barrier, stage, phase } => self.wait(*barrier, stage, phase),
            Stmt::NamedSync { barrier, stage } => self.named(*barrier, stage, true),
            Stmt::NamedArrive { barrier, stage } => self.named(*barrier, stage, false),
            Stmt::Fence(kind) => {
                self.fence(*kind);
                Ok(())
            }
            Stmt::Commit(kind) => {
                self.commit(*kind);
                Ok(())
            }
            Stmt::WaitGroup { kind, pending } => self.wait_group(*kind, *pending, quiet),
            Stmt::Last { var, counter, at, of } => self.last(var.index(), *counter, at, of),
            Stmt::TaskSync => {
                let threads: u64 =
                    self.k.roles.iter().map(|r| (r.units * r.scope.threads()).next_multiple_of(32)).sum();
                self.t.line(&format!("bar.sync 0, {threads}"));
                self.role.dirty = false;
                Ok(())
            }
            Stmt::ClusterSync => {
                // Tasks share no memory but through copies and mbarriers, and arrays that are written and read.
                let order = if self.exchanges { "release" } else { "relaxed" };
                self.t.line(&format!("barrier.cluster.arrive.{order}.aligned"));
                self.t.line("barrier.cluster.wait.acquire.aligned");
                self.role.dirty = false;
                Ok(())
            }
            Stmt::GridSync => Err(self.fail("grid-wide synchronisation")),
            Stmt::GridDependency(kind) => self.grid_dependency(*kind),
        }
    }

    fn map(&mut self, out: FragId, value: &Expr) -> Res<()> {
        let dtype = self.frags.get(out).dtype;
        let mut memo = Memo::new(dtype.is_float() && dtype.bits() <= 16);
        self.set_elements(out, |e, v| {
            let el = Element { of: out, v, at: e.frags.get(out).consts[v].clone() };
            e.value(value, Some(&el), &mut memo)
        })
    }

    fn touches_memory(body: &[Stmt]) -> bool {
        let mut found = false;
        walk(body, &mut |s| {
            found |= matches!(s, Stmt::Load { .. } | Stmt::Store { .. } | Stmt::Gather { .. } | Stmt::Scatter { .. });
        });
        found
    }

    fn for_loop(&mut self, var: usize, lo: &Expr, hi: &Expr, step: i64, unroll: bool, body: &[Stmt]) -> Res<()> {
        let facts = Facts { ranks: self.ranks, units: self.role.units, cluster: self.k.cluster.iter().product() };
        let counter = facts.counter(lo, hi, &self.role.vars);
        let (lo, hi) = (self.int(lo)?, self.int(hi)?);
        if unroll {
            let (Some(mut i), Some(end)) = (lo.int_const(), hi.int_const()) else {
                return Err(self.fail("an unrolled loop whose trip count is not known"));
            };
            while i < end {
                self.t.line(&format!("mov.b32 %v{var}, {i}"));
                self.role.vars[var] = Some((i, i));
                self.body(body, false)?;
                i += step;
            }
            return Ok(());
        }
        let hi = if hi.int_const().is_some() {
            hi
        } else {
            // The bound is fixed before the first trip.
            Val { s: self.t.def(Ty::S32, "mov.b32", &[&hi.s]), ..hi }
        };
        facts.carried(var, counter, body, &mut self.role.vars);
        let before = self.role.vars.clone();
        self.role.dirty |= Self::touches_memory(body);
        let (top, end) = (self.t.label(), self.t.label());
        self.t.line(&format!("mov.b32 %v{var}, {}", lo.s));
        let none = self.bin(BinaryOp::Ge, &lo, &hi)?;
        match none.int_const() {
            Some(0) => {}
            Some(_) => self.t.line(&format!("bra {end}")),
            None => self.t.line(&format!("@{} bra {end}", none.s)),
        }
        self.t.place(&top);
        self.t.line(".pragma \"nounroll\"");
        self.role.vars[var] = Some(counter);
        self.body(body, false)?;
        self.t.line(&format!("add.s32 %v{var}, %v{var}, {step}"));
        let more = self.t.def(Ty::Pred, "setp.lt.s32", &[&format!("%v{var}"), &hi.s]);
        self.t.line(&format!("@{more} bra {top}"));
        self.t.place(&end);
        merge(&mut self.role.vars, &before);
        self.role.vars[var] = None;
        Ok(())
    }

    fn branch(&mut self, cond: &Expr, then: &[Stmt], otherwise: &[Stmt], last: bool) -> Res<()> {
        let c = self.uniform(cond)?;
        let c = self.to(&c, Ty::Pred);
        match c.int_const() {
            Some(0) => return self.body(otherwise, last),
            Some(_) => return self.body(then, last),
            None => {}
        }
        let (other, end) = (self.t.label(), self.t.label());
        let before = (self.role.vars.clone(), self.role.dirty);
        self.t.line(&format!("@!{} bra {other}", c.s));
        self.body(then, last)?;
        let after = std::mem::replace(&mut self.role.vars, before.0);
        let dirty = std::mem::replace(&mut self.role.dirty, before.1);
        if !otherwise.is_empty() {
            self.t.line(&format!("bra.uni {end}"));
        }
        self.t.place(&other);
        if !otherwise.is_empty() {
            self.body(otherwise, last)?;
            self.t.place(&end);
        }
        self.role.dirty |= dirty;
        merge(&mut self.role.vars, &after);
        Ok(())
    }
}

/// Whether what follows a wait does not depend on the unit's threads having met.
fn ends_quietly(rest: &[Stmt]) -> bool {
    rest.iter().all(|s| matches!(s, Stmt::ClusterSync | Stmt::TaskSync | Stmt::Let { .. }))
}

/// Warps of every role, warpgroup roles first; warps of the task.
fn place_roles(k: &Kernel) -> (Vec<Place>, u64) {
    let budgets = k.roles.len() > 1 && k.roles.iter().any(|r| r.regs.is_some());
    let mut order: Vec<usize> = (0..k.roles.len()).collect();
    order.sort_by_key(|r| k.roles[*r].scope != Scope::Warpgroup);
    let mut places = Vec::new();
    let mut at: u64 = 0;
    let mut before: Option<&Role> = None;
    for r in order {
        let role = &k.roles[r];
        let shares = before.is_some_and(|b| b.regs == role.regs);
        if role.scope == Scope::Warpgroup || (budgets && !shares) {
            at = at.next_multiple_of(4);
        }
        let count = (role.units * role.scope.threads()).div_ceil(32);
        places.push(Place { role: r, first: at, count });
        at += count;
        before = Some(role);
    }
    (places, if budgets { at.next_multiple_of(4) } else { at })
}
