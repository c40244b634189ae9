//! insert-channels: a shared tile that one role writes and a role reads becomes a ring buffer with barriers.
//!
//! A channel has `stages` copies of its tiles, a full barrier per stage (TMA: one arrival that expects the bytes; plain
//! stores: one arrival per writing unit, after a proxy fence) and an empty barrier per stage (one arrival per reading
//! unit of every task that shares the copy). Tiles with the same readers, writer, stream and stages share one channel.
//! The producer's first pass over the ring waits for the parity before the first phase, which has passed (PTX ISA,
//! "mbarrier.test_wait.parity"). Invariant: every shared tile is in one channel, or private to its unit.

use einfall_ir::arena::Id;
use einfall_ir::kernel::{AtomName, Engine, atoms};
use einfall_ir::tile::{AxisId, Op, Space, TileId};

use super::apply_mapping::{Facts, Item};
use super::{Step, refuse};

/// A ring buffer between two roles (or the units of one).
#[derive(Clone, Debug)]
pub(super) struct Channel {
    /// For barriers' names.
    pub name: String,
    pub tiles: Vec<TileId>,
    pub stages: u64,
    pub producer: usize,
    pub consumer: usize,
    /// What fills it; none: stores do.
    pub engine: Option<Engine>,
    /// The stream it turns in; none: filled once per block of the work loop.
    pub stream: Option<usize>,
    /// Whether it is filled more than once.
    pub turns: bool,
    /// Axes along which the tasks of a cluster fill each other's copies.
    pub multicast: Vec<AxisId>,
    /// The operation after which a stage is free.
    pub last_reader: usize,
    /// The operation that starts filling a stage.
    pub first_writer: usize,
    /// Whether the threads that store it are those that read it, without an instruction of another proxy: that they
    /// meet before they read is enough, and there are no mbarriers.
    pub meets: bool,
    readers: Vec<usize>,
}

impl Channel {
    /// Whether stages are given back by a barrier. Not where a role hands a tile to itself through two stages or more: a
    /// unit fills step i+1 only after its reads of step i, and step i+2 only after every unit has filled step i+1, or the
    /// schedule is refused (`thread_copies`, `keeps_stages`).
    pub fn needs_empty(&self) -> bool {
        let tma = self.engine == Some(Engine::Tma);
        !self.by_threads() && !self.meets && self.turns && (tma || self.producer != self.consumer || self.stages < 2)
    }

    /// Whether the threads that read it copy it themselves (`cp.async`): groups and a barrier of all of them order it,
    /// and there are no mbarriers.
    pub fn by_threads(&self) -> bool {
        self.engine == Some(Engine::CpAsync)
    }

    /// Whether one copy of it is stored and read by the same threads in every trip: they meet before they store it again.
    pub fn is_single(&self) -> bool {
        self.meets && self.stages == 1 && self.stream.is_some()
    }

    /// Whether mbarriers order it.
    pub fn has_mbarriers(&self) -> bool {
        !self.by_threads() && !self.meets
    }

    /// Operations that read it.
    pub fn readers(&self) -> &[usize] {
        &self.readers
    }
}

/// Whether `t` is staging of an engine's store: each unit writes and sends its own part.
pub(super) fn is_private(f: &Facts<'_>, t: TileId) -> bool {
    let sends = |op: &Op| matches!(op, Op::Store { .. }) && f.reads(op).contains(&t);
    f.ops.iter().any(|o| sends(o.op) && o.mapping.engine == Some(Engine::Tma))
}

/// Finds the channels.
///
/// # Errors
/// Shared tiles with several writers, readers in several roles, or used outside the stream that fills them.
pub(super) fn run(mut f: Facts<'_>) -> Step<Facts<'_>> {
    let mut channels: Vec<Channel> = Vec::new();
    for (id, tile) in f.kernel.tiles.iter() {
        if f.tile(id).space != Space::Shared || is_private(&f, id) {
            continue;
        }
        let of = |wanted: &dyn Fn(&Op) -> bool| -> Vec<usize> {
            (0..f.ops.len()).filter(|i| wanted(f.ops[*i].op)).collect()
        };
        let writers = of(&|op| op.outs().contains(&id));
        let readers = of(&|op| f.reads(op).contains(&id));
        let ([writer], Some(&first)) = (writers.as_slice(), readers.first()) else {
            if readers.is_empty() && writers.is_empty() {
                continue;
            }
            let message = format!("shared tile {} has {} writers, {} readers", tile.name, writers.len(), readers.len());
            return refuse("channels", message, "use one writer and at least one reader");
        };
        let (producer, consumer) = (f.ops[*writer].role, f.ops[first].role);
        if readers.iter().any(|r| f.ops[*r].role != consumer) {
            return refuse("channels", format!("{} is read by several roles", tile.name), "read it in one role");
        }
        let stream = f.stream_of(*writer);
        let m = &f.tile(id).mapping;
        if stream.is_some() && readers.iter().any(|r| f.stream_of(*r) != stream) {
            return refuse("channels", format!("{} is read outside its stream", tile.name), "copy it to registers");
        }
        let turns = stream.is_some() || f.work_loop.as_ref().is_some_and(|w| w.persistent);
        if !turns && m.stages != 1 {
            return refuse("channels", format!("{} is filled once but has stages", tile.name), "leave out `stages`");
        }
        let engine = match f.ops[*writer].op {
            Op::Load { .. } if m.engine.is_some() => m.engine,
            Op::Load { .. } => {
                let message = format!("{} is loaded without an engine", tile.name);
                return refuse("copy engine", message, "write `by tma` or `by cp_async` on its `tile` line");
            }
            Op::Map { .. } => None,
            Op::Store { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {
                return refuse("channels", format!("{} cannot be written to shared memory", tile.name), "map it there");
            }
        };
        let key = |i: &usize| (f.ops[*i].mapping.skew, f.ops[*i].mapping.slot, *i);
        let last_reader = readers.iter().copied().max_by_key(key).unwrap_or(first);
        let along = |name: &String| f.kernel.axes.ids().find(|a| f.axis_name(*a) == name);
        let multicast: Vec<AxisId> = m.multicast.as_ref().and_then(along).into_iter().collect();
        let stages = m.stages;
        if engine == Some(Engine::CpAsync) && producer != consumer {
            let message = format!("{} is copied by cp_async in one role and read in another", tile.name);
            return refuse("copy engine", message, "load it in the role that reads it");
        }
        if engine == Some(Engine::CpAsync) && !multicast.is_empty() {
            let message = format!("{} is copied by cp_async", tile.name);
            return refuse("multicast", message, "write `by tma`");
        }
        // Threads that load what they multiply read it as they do any other tile, and so does a unit that loads matrices.
        let loads = |r: &usize| {
            let atom = f.ops[*r].mapping.atom.clone().and_then(|name| atoms::find(&AtomName(name)));
            atom.is_some_and(|a| a.threads_alone() || a.cooperative())
        };
        let contracted = readers.iter().any(|r| matches!(f.ops[*r].op, Op::Contract { .. }) && !loads(r));
        let persistent = f.work_loop.as_ref().is_some_and(|w| w.persistent);
        let meets = engine.is_none() && f.roles.len() == 1 && !contracted && !persistent;
        let joins = |c: &&mut Channel| {
            engine.is_some()
                && c.engine == engine
                && c.readers == readers
                && f.ops[c.first_writer].mapping.skew == f.ops[*writer].mapping.skew
                && (c.stages, c.producer, c.stream) == (stages, producer, stream)
        };
        if let Some(c) = channels.iter_mut().find(joins) {
            c.name = format!("{}_{}", c.name, tile.name);
            c.tiles.push(id);
            c.multicast.extend(multicast);
            c.multicast.sort();
            c.multicast.dedup();
            if key(writer) < key(&c.first_writer) {
                c.first_writer = *writer;
            }
            continue;
        }
        channels.push(Channel {
            name: tile.name.clone(),
            tiles: vec![id],
            stages,
            producer,
            consumer,
            engine,
            stream,
            turns,
            multicast,
            last_reader,
            first_writer: *writer,
            meets,
            readers,
        });
    }
    f.channels = channels;
    for t in f.kernel.tiles.ids().filter(|t| f.home(*t) != *t) {
        let host = f.channel(f.home(t)).map(|c| &f.channels[c]);
        let writers = f.ops.iter().filter(|o| o.op.outs().contains(&t));
        let after = writers.into_iter().all(|o| host.is_some_and(|c| c.consumer == o.role && c.stream.is_none()));
        if !is_private(&f, t) || !after || !matches!(f.items[f.items.len() - 1], Item::Op(_)) {
            let (t, host) = (&f.tile(t).name, &f.tile(f.home(t)).name);
            let message = format!("{t} cannot take the place of {host}");
            return refuse("reuse", message, "the staging tile of a store may, of a tile its role reads in no ring");
        }
    }
    Ok(f)
}

impl Facts<'_> {
    /// The channel of a shared tile.
    pub fn channel(&self, t: TileId) -> Option<usize> {
        self.channels.iter().position(|c| c.tiles.contains(&t))
    }

    /// The buffer a tile's memory belongs to: its own, or that of the tile whose place it takes.
    pub fn home(&self, t: TileId) -> TileId {
        let reused = self.tile(t).mapping.reuses.as_ref();
        reused.and_then(|name| self.tiles.iter().position(|x| x.name == *name)).map_or(t, TileId::new)
    }
}
