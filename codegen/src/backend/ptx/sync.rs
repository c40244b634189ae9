//! Barriers, fences and groups.
//!
//! An arrival of a unit is one of the barrier's counts in the IR. On the device one lane of every warp arrives, and the
//! hardware's count is multiplied by the warps of a unit: after `wgmma.wait_group` a warp knows of its own reads only.
//! Barriers that also count the threads of `cp.async` copies keep their count: their warpgroups meet before one thread
//! arrives. Invariant: generic accesses of a unit's lanes come before its arrival (`bar.warp.sync` in between).
//! Source: PTX ISA, "mbarrier", "bar", "wgmma.wait_group", "cp.async.bulk.wait_group".

use einfall_ir::arena::Id;
use einfall_ir::kernel::{
    BarrierId, BarrierKind, BufId, Engine, Expr, FenceKind, GridDependency, GroupKind, Kernel, Scope, Stmt, walk,
};

use super::Res;
use super::emit::Emit;
use super::text::{Ty, Val};

/// How arrivals at one barrier are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Arrivals {
    /// Units of warpgroups arrive.
    warpgroups: bool,
    /// Units of warps or threads arrive.
    others: bool,
    /// Threads of signalled `cp.async` copies arrive.
    threads: bool,
}

impl Arrivals {
    /// Whether each warp of a warpgroup arrives for itself.
    pub(super) fn by_warp(self) -> bool {
        self.warpgroups && !self.others && !self.threads
    }

    /// Of every barrier of the kernel.
    pub(super) fn of(k: &Kernel) -> Vec<Arrivals> {
        let mut all = vec![Arrivals::default(); k.barriers.len()];
        for r in &k.roles {
            walk(&r.body, &mut |s| match s {
                Stmt::Arrive { barrier, .. } => {
                    let a = &mut all[barrier.index()];
                    if r.scope == Scope::Warpgroup {
                        a.warpgroups = true;
                    } else {
                        a.others = true;
                    }
                }
                Stmt::Copy { engine: Engine::CpAsync, signal: Some((b, _)), .. } => all[b.index()].threads = true,
                _ => {}
            });
        }
        all
    }
}

impl Emit<'_> {
    /// Initialises every mbarrier, by one thread, and makes that visible.
    pub(super) fn init_barriers(&mut self) {
        let mut any = false;
        let p = self.t.def(Ty::Pred, "setp.eq.s32", &["%thread", "0"]);
        for (id, b) in self.k.barriers.iter() {
            let BarrierKind::Mbarrier { count } = b.kind else { continue };
            let scale = if self.arrivals[id.index()].by_warp() { 4 } else { 1 };
            for s in 0..b.stages {
                let at = self.shared.barriers[id.index()] + 8 * s;
                self.t.line(&format!("@{p} mbarrier.init.shared::cta.b64 [%smem+{at}], {}", count * scale));
                any = true;
            }
        }
        let cluster = self.k.cluster.iter().product::<u64>() > 1;
        if any && self.target.hopper() {
            self.t.line(&format!("@{p} fence.mbarrier_init.release.cluster"));
        }
        if cluster {
            self.t.line("barrier.cluster.arrive.relaxed.aligned");
            self.t.line("barrier.cluster.wait.acquire.aligned");
        } else if any {
            self.t.line("bar.sync 0");
        }
    }

    /// The address of one stage of an mbarrier: a register and an offset.
    pub(super) fn barrier_address(&mut self, b: BarrierId, stage: &Expr) -> Res<(String, u64)> {
        let base = self.shared.barriers[b.index()];
        let stage = self.int(stage)?;
        if let Some(s) = stage.int_const() {
            return Ok(("%smem".to_string(), base + 8 * s as u64));
        }
        let offset = self.mul(&stage, &Val::int(8));
        let a = self.add(&offset, &Val::reg(Ty::S32, "%smem".to_string()));
        Ok((a.s, base))
    }

    pub(super) fn arrive(
        &mut self,
        barrier: BarrierId,
        stage: &Expr,
        expect: Option<u64>,
        remote: Option<&Expr>,
    ) -> Res<()> {
        let by_warp = self.arrivals[barrier.index()].by_warp();
        if self.role.scope == Scope::Warpgroup && !by_warp {
            self.unit_sync()?;
        } else if self.role.dirty && self.role.scope != Scope::Thread {
            self.t.line("bar.warp.sync 0xFFFFFFFF");
            self.role.dirty = false;
        }
        let (register, offset) = self.barrier_address(barrier, stage)?;
        // A remote arrival gives back memory that has been read, so it releases nothing that was written: the default
        // scope does, as in CUTLASS; `.release.cluster` would wait for all of the thread's stores to the device.
        let space = if remote.is_some() { "shared::cluster" } else { "shared::cta" };
        let mut address = format!("{register}+{offset}");
        if let Some(rank) = remote {
            let rank = self.int(rank)?;
            let local = self.add(&Val::reg(Ty::S32, register), &Val::int(offset as i64));
            address = self.t.def(Ty::S32, "mapa.shared::cluster.u32", &[&local.s, &rank.s]);
        }
        let leader = self.leader();
        let lane = if by_warp { self.lane_leader() } else { leader.clone() };
        match expect {
            None => self.t.line(&format!("{lane}mbarrier.arrive.{space}.b64 _, [{address}]")),
            Some(bytes) => {
                if by_warp {
                    // The bytes are expected before any warp's arrival can end the phase: one warp does both.
                    let others = self.other_warps();
                    self.t.line(&format!("{others}mbarrier.arrive.{space}.b64 _, [{address}]"));
                }
                self.t.line(&format!("{leader}mbarrier.arrive.expect_tx.{space}.b64 _, [{address}], {bytes}"));
            }
        }
        Ok(())
    }

    pub(super) fn wait(&mut self, barrier: BarrierId, stage: &Expr, phase: &Expr) -> Res<()> {
        let (register, offset) = self.barrier_address(barrier, stage)?;
        let phase = self.int(phase)?;
        let phase = self.in_reg(&phase);
        let (again, p) = (self.t.label(), self.t.reg(Ty::Pred));
        self.t.place(&again);
        let op = if self.target.hopper() { "mbarrier.try_wait" } else { "mbarrier.test_wait" };
        self.t.line(&format!("{op}.parity.shared::cta.b64 {p}, [{register}+{offset}], {phase}"));
        self.t.line(&format!("@!{p} bra {again}"));
        Ok(())
    }

    pub(super) fn named(&mut self, barrier: BarrierId, stage: &Expr, blocks: bool) -> Res<()> {
        let BarrierKind::Named { threads } = self.k.barriers[barrier].kind else {
            return Err(self.fail("a named barrier that is an mbarrier"));
        };
        let first = self.shared.named[barrier.index()];
        let stage = self.int(stage)?;
        let id = self.add(&stage, &Val::int(first as i64));
        let op = if blocks { "bar.sync" } else { "bar.arrive" };
        self.t.line(&format!("{op} {}, {threads}", id.s));
        if blocks {
            self.role.dirty = false;
        }
        Ok(())
    }

    /// All threads of the unit meet.
    pub(super) fn unit_sync(&mut self) -> Res<()> {
        match self.role.scope {
            Scope::Thread => {}
            Scope::Warp => self.t.line("bar.warp.sync 0xFFFFFFFF"),
            Scope::Warpgroup => {
                let first = self.unit_barriers()?;
                let id = self.add(&self.role.unit.clone(), &Val::int(first as i64));
                self.t.line(&format!("bar.sync {}, 128", id.s));
            }
        }
        self.role.dirty = false;
        Ok(())
    }

    /// Whether the unit is the last of `of` to count at a counter: its threads meet, one of them adds one (around to 0
    /// after the last) with release and acquire, and all learn the outcome where they meet again. What the unit's
    /// threads wrote is released with it, since barriers order them before (PTX ISA, "Memory consistency model",
    /// causality order).
    pub(super) fn last(&mut self, var: usize, counter: BufId, at: &[Expr], of: &Expr) -> Res<()> {
        let coords = at.iter().map(|e| self.int(e)).collect::<Res<Vec<_>>>()?;
        let of = self.int(of)?;
        let most = self.sub(&of, &Val::int(1));
        let address = self.global_address(counter, &coords)?;
        let thread = self.role.thread.clone();
        self.unit_sync()?;
        let first = self.t.def(Ty::Pred, "setp.eq.s32", &[&thread.s, "0"]);
        let before = self.t.def(Ty::S32, "mov.b32", &["0"]);
        self.t.line(&format!("@{first} atom.acq_rel.gpu.global.inc.u32 {before}, [{address}], {}", most.s));
        let own = self.t.reg(Ty::Pred);
        self.t.line(&format!("setp.eq.and.u32 {own}, {before}, {}, {first}", most.s));
        let last = match self.role.scope {
            Scope::Thread => return Err(self.fail("a count by single threads")),
            Scope::Warp => {
                let last = self.t.reg(Ty::Pred);
                self.t.line(&format!("vote.sync.any.pred {last}, {own}, 0xFFFFFFFF"));
                self.t.line("bar.warp.sync 0xFFFFFFFF");
                last
            }
            Scope::Warpgroup => {
                let id = self.unit_barriers()?;
                let id = self.add(&self.role.unit.clone(), &Val::int(id as i64));
                let last = self.t.reg(Ty::Pred);
                self.t.line(&format!("bar.red.or.pred {last}, {}, 128, {own}", id.s));
                last
            }
        };
        self.t.line(&format!("selp.b32 %v{var}, 1, 0, {last}"));
        self.role.vars[var] = Some((0, 1));
        self.role.dirty = false;
        Ok(())
    }

    /// Order between this grid and its neighbours. Every thread waits for itself; one of a task suffices to say that the
    /// next grid may start.
    pub(super) fn grid_dependency(&mut self, kind: GridDependency) -> Res<()> {
        if !self.target.hopper() {
            return Err(self.fail("dependent launches before sm_90"));
        }
        match kind {
            GridDependency::Wait => self.t.line("griddepcontrol.wait"),
            GridDependency::Launch => self.t.line("griddepcontrol.launch_dependents"),
        }
        Ok(())
    }

    /// The first of the hardware barriers that units of this role meet at, one each.
    fn unit_barriers(&mut self) -> Res<u64> {
        if let Some(b) = self.role.unit_barriers {
            return Ok(b);
        }
        let first = self.shared.next_named;
        self.shared.next_named += self.role.units;
        if self.shared.next_named > 16 {
            return Err(self.fail("more than 15 named barriers"));
        }
        self.role.unit_barriers = Some(first);
        Ok(first)
    }

    pub(super) fn fence(&mut self, kind: FenceKind) {
        match kind {
            // What reads asynchronously came with Hopper: before, there is one proxy.
            FenceKind::ProxyAsync if !self.target.hopper() => {}
            FenceKind::ProxyAsync => self.t.line("fence.proxy.async.shared::cta"),
            FenceKind::Wgmma => self.wgmma_fence(),
            FenceKind::MbarrierInit => self.t.line("fence.mbarrier_init.release.cluster"),
            FenceKind::Gpu => self.t.line("fence.acq_rel.gpu"),
        }
    }

    /// Orders registers before wgmma, unless that is done. ptxas would put one after every wait and branch by itself;
    /// printed, what is emitted and what is assembled agree.
    pub(super) fn wgmma_fence(&mut self) {
        if !self.role.fenced {
            self.t.line("wgmma.fence.sync.aligned");
            self.role.fenced = true;
        }
    }

    pub(super) fn commit(&mut self, kind: GroupKind) {
        match kind {
            GroupKind::Wgmma => {
                self.role.joined = None;
                self.t.line("wgmma.commit_group.sync.aligned");
            }
            GroupKind::CpAsync => self.t.line("cp.async.commit_group"),
            GroupKind::Bulk => {
                let leader = self.leader();
                self.t.line(&format!("{leader}cp.async.bulk.commit_group"));
            }
        }
    }

    /// Keeps what stands before a wait for wgmma before it. ptxas lets arithmetic sink below the wait, and with it the
    /// overlap that the schedule is for; a load that depends on the last reduction stays, and what the reduction
    /// joins must precede it. The load asks for a value that no arithmetic makes, so it is hardly ever executed, and
    /// changes nothing if it is.
    fn finish_before_waiting(&mut self) {
        let Some(f) = self.role.joined.take() else { return };
        let frag = self.frags.get(f);
        let registers: Vec<String> = (0..frag.count()).map(|v| frag.register(v)).collect();
        let mut bits = self.t.def(Ty::S32, "mov.b32", &[&registers[0]]);
        for r in &registers[1..] {
            let other = self.t.def(Ty::S32, "mov.b32", &[r]);
            bits = self.t.def(Ty::S32, "and.b32", &[&bits, &other]);
        }
        let never = self.t.def(Ty::Pred, "setp.eq.s32", &[&bits, "0x7FBADBAD"]);
        let value = self.t.reg(Ty::S32);
        self.t.line(&format!("@{never} ld.volatile.shared.b32 {value}, [%smem]"));
    }

    pub(super) fn wait_group(&mut self, kind: GroupKind, pending: u64, last: bool) -> Res<()> {
        match kind {
            GroupKind::Wgmma => {
                self.finish_before_waiting();
                self.t.line(&format!("wgmma.wait_group.sync.aligned {pending}"));
            }
            GroupKind::CpAsync => {
                self.t.line(&format!("cp.async.wait_group {pending}"));
                // The copies of the other lanes are waited for by them.
                self.unit_sync()?;
            }
            GroupKind::Bulk => {
                // Stored arrays that the kernel does not read again need not have arrived, only to have been read.
                let read = if self.rereads { "" } else { ".read" };
                let leader = self.leader();
                self.t.line(&format!("{leader}cp.async.bulk.wait_group{read} {pending}"));
                if !last {
                    self.unit_sync()?;
                }
            }
        }
        Ok(())
    }
}
