//! Channels that their readers fill themselves: every thread of the role copies its part by `cp.async`, in groups.
//!
//! A ring of S stages needs no mbarrier: whoever reads a stage first waits for its own copies of it (all but the newest
//! groups), then meets the other units. That one meeting makes every unit's copies visible and says that all units have
//! read what came before, so that the stage they left may be filled again. At the start of a trip everything its
//! operations will read of earlier trips is awaited at once. Tiles filled once per block join the first group of the
//! stream that reads them. Invariant: a stage is read only after its group was awaited and all units met since; it is
//! written only after all units met since its last read ([`Copies::read`] are the reads since).
//! Source: PTX ISA, "cp.async.wait_group"; the multistage loop of CUTLASS 2 (include/cutlass/gemm/threadblock).

use std::collections::BTreeSet;

use einfall_ir::kernel::{Engine, Expr, GroupKind, Stmt, View};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{BufferId, ExprId, Op, TileId};

use super::super::exprs::{Place, add, mul};
use super::super::insert_channels::Channel;
use super::super::schedule::{Flow, Iteration};
use super::super::{Step, refuse};
use super::Emit;

/// The iteration of a channel that is filled once per block.
pub(in super::super) const BLOCK: i64 = i64::MIN;

/// Copies by threads in flight at a point of a role's code, and stages in use. A stage is a channel with an iteration
/// relative to the present trip.
#[derive(Clone, Debug, Default, PartialEq)]
pub(in super::super) struct Copies {
    /// Groups not awaited, oldest first: the stages each fills.
    pub groups: Vec<BTreeSet<(usize, i64)>>,
    /// Channels filled once per block whose copies are in no group yet.
    pub open: BTreeSet<usize>,
    /// Stages read since all units met.
    pub read: BTreeSet<(usize, i64)>,
}

/// Reads further back than any ring are alike.
const LONG_AGO: i64 = -1 << 20;

/// The iteration as the next trip counts it.
pub(in super::super) fn later(rel: i64) -> i64 {
    if rel == BLOCK { BLOCK } else { (rel - 1).max(LONG_AGO) }
}

impl Copies {
    /// What holds where control flow from both places meets; groups must agree but for what is filled once.
    pub fn meet(&self, other: &Copies) -> Option<Copies> {
        let turning = |c: &Copies| -> Vec<BTreeSet<(usize, i64)>> {
            c.groups.iter().map(|g| g.iter().copied().filter(|s| s.1 != BLOCK).collect()).collect()
        };
        let groups = if self.groups == other.groups { self.groups.clone() } else { turning(self) };
        (turning(self) == turning(other)).then(|| Copies {
            groups,
            open: self.open.intersection(&other.open).copied().collect(),
            read: self.read.union(&other.read).copied().collect(),
        })
    }

    /// The next trip begins.
    pub fn advance(&mut self) {
        for stages in self.groups.iter_mut().chain([&mut self.read]) {
            *stages = stages.iter().map(|(c, rel)| (*c, later(*rel))).collect();
        }
    }
}

impl Emit<'_, '_> {
    /// The stages of channels filled by threads that operation `i` of the present stream reads, `rel` trips on.
    pub(in super::super) fn stages_read(&self, i: usize, rel: i64) -> Vec<(usize, i64)> {
        let f = self.f;
        let reads = f.reads(f.ops[i].op);
        let of = |c: &usize| {
            let ch = &f.channels[*c];
            ch.by_threads() && ch.tiles.iter().any(|t| reads.contains(t))
        };
        (0..f.channels.len())
            .filter(of)
            .map(|c| (c, if f.channels[c].stream.is_some() { rel } else { BLOCK }))
            .collect()
    }

    /// Tiles of one copy, stored and read by the same threads in every trip, that operation `i` reads: all units meet before
    /// they store it again.
    pub(super) fn single_copies(&self, i: usize, rel: i64) -> Vec<(usize, i64)> {
        let reads = self.f.reads(self.f.ops[i].op);
        let all = self.f.channels.iter().enumerate();
        let of = all.filter(|(_, c)| c.is_single() && c.tiles.iter().any(|t| reads.contains(t)));
        of.map(|(c, _)| (c, rel)).collect()
    }

    /// Closes a group of the copies issued since the last one.
    fn commit_copies(&mut self, stage: Option<(usize, i64)>, flow: &mut Flow, out: &mut Vec<Stmt>) {
        out.push(Stmt::Commit(GroupKind::CpAsync));
        let once = std::mem::take(&mut flow.copies.open).into_iter().map(|c| (c, BLOCK));
        flow.copies.groups.push(once.chain(stage).collect());
    }

    /// Before stages are read: their copies by every unit have arrived.
    pub(in super::super) fn await_copies(
        &mut self,
        stages: &[(usize, i64)],
        flow: &mut Flow,
        out: &mut Vec<Stmt>,
    ) -> Step<()> {
        let missing: Vec<(usize, i64)> = stages.iter().copied().filter(|s| !flow.filled.contains(s)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        if missing.iter().any(|(c, rel)| *rel == BLOCK && flow.copies.open.contains(c)) {
            self.commit_copies(None, flow, out);
        }
        if let Some((c, _)) = missing.iter().find(|s| !flow.copies.groups.iter().any(|g| g.contains(s))) {
            let message = format!("{} is read before it is copied", self.f.channels[*c].name);
            return refuse("schedule", message, "check `skew` and `slot`");
        }
        let holds = |g: &BTreeSet<(usize, i64)>| missing.iter().any(|s| g.contains(s));
        let last = flow.copies.groups.iter().rposition(holds).unwrap_or(0);
        let pending = (flow.copies.groups.len() - 1 - last) as u64;
        out.push(Stmt::WaitGroup { kind: GroupKind::CpAsync, pending });
        flow.filled.extend(flow.copies.groups.drain(..=last).flatten());
        self.role_sync(self.role, out);
        flow.copies.read.clear();
        Ok(())
    }

    /// No copies are in flight any more.
    pub(in super::super) fn end_copies(&mut self, flow: &mut Flow, out: &mut Vec<Stmt>) {
        if !flow.copies.open.is_empty() {
            self.commit_copies(None, flow, out);
        }
        if !flow.copies.groups.is_empty() {
            out.push(Stmt::WaitGroup { kind: GroupKind::CpAsync, pending: 0 });
            flow.copies.groups.clear();
        }
    }

    /// Whether the stages of the rings that this role fills for itself are read, by every unit, for the last time before
    /// any unit fills them again.
    ///
    /// What copies by threads, all units meet before they fill a stage that was read; the barriers of a ring of one stage
    /// say as much. Stores into several stages rely on what orders them with the reads. Where all threads meet, once a
    /// trip, before the first read, they meet between a read of iteration i and the same read of i + 1, which must come
    /// before iteration i + S fills the stage. Barriers in memory say less: that all units have stored an iteration, so
    /// that there must be a d for which every unit reads i before it stores i + d, and waits for i + d before it stores
    /// i + S.
    pub(in super::super) fn keeps_stages(&self, ops: &[usize]) -> Step<()> {
        let f = self.f;
        let time = |i: usize| (self.skews[i], ops.iter().position(|x| *x == i));
        let own = |c: &&Channel| c.by_threads() || (c.engine.is_none() && c.producer == c.consumer);
        for c in f.channels.iter().filter(own) {
            let writers = ops.iter().filter(|i| f.ops[**i].op.outs().iter().any(|t| c.tiles.contains(t)));
            for &w in writers {
                let readers = || c.readers().iter().copied().filter(|r| ops.contains(r));
                let first = readers().map(time).min();
                for r in readers() {
                    let (write, read) = (time(w), time(r));
                    let refilled = (write.0 + c.stages as i64, write.1);
                    let late = if c.by_threads() || c.needs_empty() || c.is_single() {
                        read > refilled
                    } else if c.meets {
                        (read.0 + 1, read.1) >= refilled
                    } else {
                        // The first iteration stored after the read, and the first wait for it.
                        let d = read.0 - write.0 + i64::from(read.1 > write.1);
                        first.is_some_and(|(skew, slot)| (skew + d, slot) >= refilled)
                    };
                    if read < write {
                        let message = format!("{} reads what {} fills after it", f.ops[r].name, f.ops[w].name);
                        return refuse("stages", message, "check `skew` and `slot`");
                    }
                    if late {
                        let message = format!(
                            "{} runs {} iterations behind {}, which fills {} stages",
                            f.ops[r].name,
                            read.0 - write.0,
                            f.ops[w].name,
                            c.stages
                        );
                        return refuse("stages", message, "give the tile as many stages as iterations are under way");
                    }
                }
            }
        }
        Ok(())
    }

    /// Channels filled once per block, by threads, that the operations of a stream read: those that may join its first
    /// group, as every reader stands behind a reader of a ring, and the others.
    pub(in super::super) fn deferrable(&self, ops: &[usize], once: &[usize]) -> (Vec<usize>, Vec<usize>) {
        let f = self.f;
        let place = |i: usize| ops.iter().position(|x| *x == i);
        let behind = |i: usize| {
            ops.iter().any(|j| {
                let ring = self.stages_read(*j, 0).into_iter().any(|(_, rel)| rel != BLOCK);
                ring && *j <= i
                    && (self.skews[*j] < self.skews[i] || (self.skews[*j] == self.skews[i] && place(*j) <= place(i)))
            })
        };
        once.iter()
            .copied()
            .partition(|c| f.channels[*c].readers().iter().filter(|r| ops.contains(r)).all(|r| behind(*r)))
    }

    /// What is under way when a stream begins: copies that join its first group, and stages of its rings that the block
    /// before may have read.
    pub(in super::super) fn entering(&self, deferred: &[usize]) -> Flow {
        let f = self.f;
        let mut flow = Flow::default();
        flow.copies.open = deferred.iter().copied().collect();
        if f.work_loop.as_ref().is_some_and(|w| w.persistent) {
            let rings = (0..f.channels.len()).filter(|c| f.channels[*c].by_threads());
            flow.copies.read = rings.map(|c| (c, LONG_AGO)).collect();
        }
        flow
    }

    /// Every unit of the role copies its part of a tile.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn load_by_threads(
        &mut self,
        i: usize,
        t: TileId,
        buffer: BufferId,
        position: &[ExprId],
        place: &Place,
        at: &Iteration,
        flow: &mut Flow,
        out: &mut Vec<Stmt>,
    ) -> Step<()> {
        let f = self.f;
        let c = f.channel(t).expect("loaded shared tiles are in a channel");
        let ch = &f.channels[c];
        let dims = f.tile(t).dims.clone();
        let whole = |a| f.task_origin(a, place);
        let Some(src) = self.window_from(buffer, position, &dims, place, whole) else {
            let message = format!("{} is not a box of the array", f.ops[i].name);
            return refuse("copy engine", message, "load gathers into registers");
        };
        let rel = if ch.stream.is_some() { at.rel } else { BLOCK };
        let before = |r: i64| rel == BLOCK || (r != BLOCK && r <= rel - ch.stages as i64);
        if flow.copies.read.iter().any(|(x, r)| *x == c && before(*r)) {
            self.role_sync(self.role, out);
            flow.copies.read.clear();
        }
        let full: Vec<u64> = dims.iter().map(|a| f.axis(*a).block).collect();
        let units = f.roles[place.role].units;
        let layout = f.tile(t).layout.as_ref().expect("shared tiles have a layout");
        let outer = layout.dims.iter().position(|d| d.first().is_some_and(|g| g.stride != 1));
        // Rows are cut over the units; a tile that cannot be is copied by the first.
        let cut = outer.filter(|d| full[*d].is_multiple_of(units));
        let mut extents = full;
        let mut offset = vec![Expr::Int(0); extents.len()];
        if let Some(d) = cut {
            extents[d] /= units;
            offset[d] = mul(Expr::Unit, Expr::Int(extents[d] as i64));
        }
        let mut from = src;
        for (d, w) in from.walk.iter().enumerate() {
            if let Some((dim, _)) = w {
                from.at[*dim] = add(from.at[*dim].clone(), offset[d].clone());
            }
        }
        let walk = (0..dims.len()).map(|d| Some((d, 1))).collect();
        let dst = View { buf: self.shared(t), stage: self.stage(c, at), at: offset, walk };
        let copy = Stmt::Copy { engine: Engine::CpAsync, src: from, dst, extents, signal: None, multicast: None };
        if cut.is_some() || units == 1 {
            out.push(copy);
        } else {
            let cond = Expr::Unit.bin(BinaryOp::Eq, Expr::Int(0));
            out.push(Stmt::If { cond, then: vec![copy], otherwise: Vec::new() });
        }
        if rel == BLOCK {
            flow.copies.open.insert(c);
        } else {
            self.commit_copies(Some((c, rel)), flow, out);
        }
        Ok(())
    }

    /// Refuses instructions that would read, asynchronously, what threads copied.
    pub(super) fn reads_what_threads_copied(&self, i: usize) -> Step<()> {
        let f = self.f;
        if self.stages_read(i, 0).is_empty() || !matches!(f.ops[i].op, Op::Contract { .. }) {
            return Ok(());
        }
        let message = format!("{} is asynchronous and reads what cp_async copied", f.ops[i].name);
        refuse("copy engine", message, "write `by tma`, or take an `mma` atom")
    }
}
