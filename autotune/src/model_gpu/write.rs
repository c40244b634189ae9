//! Assignments as mappings, and mappings as assignments.
//!
//! Invariant: [`write()`] then [`read()`] gives the assignment back; two mappings with the same [`Normal`] mean the same to
//! the lowering, whatever their names of roles, numbers of slots and lines left out.

use einfall_ir::arena::Id;
use einfall_ir::kernel::Scope;
use einfall_ir::mapping::{
    AxisMapping, KernelMapping, MergeSite, OpMapping, RoleMapping, Source, Split, TileMapping, Work,
};
use einfall_ir::tile::{AxisId, AxisKind, Op, Space as TileSpace, TileId};

use super::facts::Facts;
use super::space::Space;
use super::structure::Place;

/// The mapping that an assignment of `space` stands for.
pub fn write(space: &Space<'_, '_>, values: &[i64]) -> KernelMapping {
    let (f, s, v) = (space.facts, space.structure, &space.vars);
    let value = |x: crate::csp::VarId| values[x.idx()] as u64;
    let units = v.units.map_or(1, value);
    let axes = f
        .axes
        .iter()
        .enumerate()
        .filter(|(i, a)| !a.sequential && (a.kind != AxisKind::Inner || s.sized[*i] || a.extent.is_none()))
        .map(|(i, a)| AxisMapping {
            block: v.block[i].map_or(1, value),
            cluster: v.cluster[i].map_or(1, value),
            units: if s.cut == Some(AxisId::new(i)) { units } else { 1 },
            // Inner blocks hold the extents they were made for.
            whole: a.kind == AxisKind::Inner && !a.fixed,
            descending: (f.streams.iter().position(|x| x.axis == AxisId::new(i)))
                .and_then(|x| v.descending[x])
                .is_some_and(|d| value(d) == 1),
            ..AxisMapping::new(&a.name, 1)
        })
        .collect();
    let clustered = (0..f.axes.len()).find(|i| v.cluster[*i].is_some_and(|c| value(c) > 1)).map(AxisId::new);
    let mut tiles = Vec::new();
    for (i, place) in s.places.iter().enumerate() {
        let Some(inner) = place.shared() else { continue };
        let t = TileId::new(i);
        let mut m = TileMapping::new(&f.kernel.tiles[t].name, TileSpace::Shared);
        m.stages = v.stages[i].map_or(1, value);
        m.swizzle = v.swizzle[i].map_or(128, value);
        let own = s.sized_of(f.tile_axes(t));
        if own.last() != Some(&inner) {
            m.contiguous = Some(f.axis(inner).name.clone());
        }
        if matches!(place, Place::Fetched(_)) {
            m.engine = Some(space.family.engine);
            m.multicast = clustered.filter(|a| !f.tile_axes(t).contains(a)).map(|a| f.axis(a).name.clone());
        }
        tiles.push(m);
    }
    let mut ops: Vec<OpMapping> = Vec::new();
    for (i, o) in f.ops.iter().enumerate() {
        let mut m = OpMapping::new(&o.name);
        (m.skew, m.slot) = (s.skews[i], s.slots[i]);
        if s.in_producer(f, i) {
            m.role = Some("producer".into());
        }
        if let Some(c) = s.contractions.iter().position(|c| c.op == i) {
            let x = &s.contractions[c];
            let rows = v.rows.map_or(space.family.rows[0], |r| values[r.idx()]);
            m.atom = Some(space.family.atom(rows, values[v.atom[c].idx()], x.operand));
            m.swapped = x.swapped;
            if s.places[x.a.index()] == Place::Registers {
                m.a = Source::Registers;
            }
        }
        if let Some(l) = s.stores.iter().position(|l| l.op == i)
            && v.staged[l].is_some_and(|x| value(x) == 1)
            && let Op::Store { buffer, .. } = o.op
        {
            m.engine = Some(space.family.engine);
            let mut t = TileMapping::new(format!("{}_out", f.plan.buffers[*buffer].name), TileSpace::Shared);
            t.swizzle = 128;
            if v.reuses[l].is_some_and(|x| value(x) == 1) {
                t.reuses = s.stores[l].reuses.map(|r| f.kernel.tiles[r].name.clone());
                tiles.push(t);
            }
        }
        if m != OpMapping::new(&o.name) {
            ops.push(m);
        }
    }
    let regs = |r: Option<&crate::csp::VarId>| r.map(|r| value(*r)).filter(|r| *r > 0);
    let ping_pong = v.ping_pong.is_some_and(|p| value(p) == 1);
    let consumer = |name: &str| RoleMapping {
        role: name.into(),
        scope: space.family.scope,
        units,
        regs: regs(v.regs.last()),
        ping_pong,
    };
    let roles = if s.producer {
        let copies = RoleMapping {
            role: "producer".into(),
            scope: Scope::Warp,
            units: 1,
            regs: regs(v.regs.first()),
            ping_pong: false,
        };
        vec![copies, consumer("consumer")]
    } else {
        vec![consumer("main")]
    };
    let order = v.order.map_or(0, |o| value(o) as usize);
    let order =
        if order == 0 { Vec::new() } else { space.orders[order].iter().map(|a| f.axis(*a).name.clone()).collect() };
    KernelMapping {
        kernel: f.kernel.name.clone(),
        axes,
        work: Work {
            order,
            persistent: v.persistent.is_some_and(|p| value(p) == 1),
            group: v.group.map(value).filter(|g| *g > 1).unwrap_or(0),
            longest_first: v.longest.is_some_and(|l| value(l) == 1),
        },
        tiles,
        ops,
        roles,
        split: v.split.filter(|x| value(x.parts) > 1).zip(f.shared_stream()).map(|(x, stream)| Split {
            axis: f.axis(f.streams[stream].axis).name.clone(),
            parts: value(x.parts),
            resident: value(x.resident),
            merge: if value(x.last) == 1 { MergeSite::LastArriver } else { MergeSite::SecondKernel },
            ordered: false,
        }),
        early: false,
        dependent: false,
    }
}

/// The values that `m` gives the variables of `space`; what it does not say keeps its default.
pub fn read(space: &Space<'_, '_>, m: &KernelMapping) -> Vec<i64> {
    let (f, s, v) = (space.facts, space.structure, &space.vars);
    let mut values = vec![0; space.model.vars().len()];
    for (i, a) in f.axes.iter().enumerate() {
        let line = m.axis(&a.name);
        let whole = if a.kind == AxisKind::Inner { a.extent } else { None };
        if let Some(b) = v.block[i] {
            values[b.idx()] = line.map(|l| l.block).or(a.declared).or(whole).unwrap_or(1) as i64;
        }
        if let Some(c) = v.cluster[i] {
            values[c.idx()] = line.map_or(1, |l| l.cluster) as i64;
        }
    }
    let cut = s.cut.and_then(|a| m.axis(&f.axis(a).name));
    if let Some(u) = v.units {
        values[u.idx()] = cut.map_or(1, |l| l.units) as i64;
    }
    for (c, x) in s.contractions.iter().enumerate() {
        let atom = m.op(&f.ops[x.op].name).and_then(|o| o.atom.as_deref());
        let shape = atom.and_then(|a| space.family.shape(a));
        values[v.atom[c].idx()] = shape.map_or(0, |s| s.1);
        if let Some(rows) = v.rows {
            values[rows.idx()] = shape.map_or(0, |s| s.0);
        }
    }
    for (x, d) in f.streams.iter().zip(&v.descending) {
        if let Some(d) = d {
            values[d.idx()] = i64::from(m.axis(&f.axis(x.axis).name).is_some_and(|l| l.descending));
        }
    }
    for i in 0..s.places.len() {
        let line = m.tile(&f.kernel.tiles[TileId::new(i)].name);
        if let Some(x) = v.stages[i] {
            values[x.idx()] = line.map_or(1, |l| l.stages) as i64;
        }
        if let Some(x) = v.swizzle[i] {
            values[x.idx()] = line.map_or(0, |l| l.swizzle) as i64;
        }
    }
    for (i, l) in s.stores.iter().enumerate() {
        let Op::Store { buffer, .. } = f.ops[l.op].op else { continue };
        if let Some(x) = v.staged[i] {
            values[x.idx()] = i64::from(m.op(&f.ops[l.op].name).is_some_and(|o| o.engine.is_some()));
        }
        if let Some(x) = v.reuses[i] {
            let label = format!("{}_out", f.plan.buffers[*buffer].name);
            values[x.idx()] = i64::from(m.tile(&label).is_some_and(|t| t.reuses.is_some()));
        }
    }
    for (i, r) in v.regs.iter().enumerate() {
        values[r.idx()] = m.roles.get(i).and_then(|r| r.regs).unwrap_or(0) as i64;
    }
    if let Some(p) = v.ping_pong {
        values[p.idx()] = i64::from(m.roles.last().is_some_and(|r| r.ping_pong));
    }
    if let Some(l) = v.longest {
        values[l.idx()] = i64::from(m.work.longest_first);
    }
    if let Some(g) = v.group {
        values[g.idx()] = m.work.group.max(1) as i64;
    }
    if let Some(p) = v.persistent {
        values[p.idx()] = i64::from(m.work.persistent);
    }
    if let Some(x) = v.split {
        let split = m.split.as_ref();
        values[x.parts.idx()] = split.map_or(1, |s| s.parts as i64);
        values[x.resident.idx()] = split.map_or(1, |s| s.resident as i64);
        values[x.last.idx()] = i64::from(split.is_some_and(|s| s.merge == MergeSite::LastArriver));
    }
    if let Some(o) = v.order {
        let full = full_order(f, m);
        let at = space.orders.iter().position(|x| *x == full);
        values[o.idx()] = at.map_or(-1, |i| i as i64);
    }
    values
}

fn full_order(f: &Facts<'_>, m: &KernelMapping) -> Vec<AxisId> {
    let id = |name: &String| f.axes.iter().position(|a| a.name == *name).map(AxisId::new);
    let mut order: Vec<AxisId> = m.work.order.iter().filter_map(id).collect();
    for (i, a) in f.axes.iter().enumerate() {
        if a.kind == AxisKind::Grid && !order.contains(&AxisId::new(i)) {
            order.push(AxisId::new(i));
        }
    }
    order
}

/// What a mapping means to the lowering: named aspects with their values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Normal(pub Vec<(String, String)>);

impl Normal {
    /// The aspects of `m`.
    pub fn of(f: &Facts<'_>, m: &KernelMapping) -> Normal {
        let mut out: Vec<(String, String)> = Vec::new();
        let mut say = |aspect: String, value: String| out.push((aspect, value));
        for a in &f.axes {
            let line = m.axis(&a.name);
            let whole = if a.kind == AxisKind::Inner { a.extent } else { None };
            let step = a.sequential.then_some(1);
            let block = step.or(line.map(|l| l.block)).or(a.declared).or(whole);
            say(format!("block {}", a.name), format!("{block:?}"));
            let (units, cluster) = line.map_or((1, 1), |l| (l.units, l.cluster));
            say(format!("units {}", a.name), units.to_string());
            say(format!("cluster {}", a.name), cluster.to_string());
            say(format!("descending {}", a.name), line.is_some_and(|l| l.descending).to_string());
        }
        let main =
            [RoleMapping { role: "main".into(), scope: Scope::Warpgroup, units: 1, regs: None, ping_pong: false }];
        let roles: &[RoleMapping] = if m.roles.is_empty() { &main } else { &m.roles };
        say("roles".into(), roles.iter().map(|r| format!("{} {:?} ", r.units, r.scope)).collect());
        for (i, r) in roles.iter().enumerate() {
            say(format!("regs {i}"), format!("{:?}", r.regs));
            say(format!("ping_pong {i}"), (r.ping_pong && r.units > 1).to_string());
        }
        say("work order".into(), format!("{:?}", full_order(f, m)));
        // Blocks differ in length only along axes that a filter depends on.
        let differ = f.streams.iter().any(|x| x.filtered.iter().any(|a| f.axis(*a).kind == AxisKind::Grid));
        let longest = m.work.longest_first && differ;
        say("work".into(), format!("{} {} {longest}", m.work.persistent, m.work.group.max(1)));
        say("split".into(), format!("{:?}", m.split));
        say("early".into(), m.early.to_string());
        for (id, t) in f.kernel.tiles.iter() {
            let used = f.ops.iter().any(|o| o.touches(id));
            let line = m.tile(&t.name).filter(|_| used).cloned();
            let line = line.unwrap_or_else(|| TileMapping::new(&t.name, TileSpace::Registers));
            say(format!("space {}", t.name), format!("{:?} {:?}", line.space, line.engine));
            say(format!("stages {}", t.name), line.stages.to_string());
            say(format!("swizzle {}", t.name), line.swizzle.to_string());
            let last = t.axes.last().map(|a| f.axis(*a).name.clone());
            say(format!("contiguous {}", t.name), format!("{:?}", line.contiguous.or(last)));
            say(format!("multicast {}", t.name), format!("{:?}", line.multicast));
        }
        let mut trips: Vec<Vec<(u64, u64, usize)>> = vec![Vec::new(); roles.len() * f.streams.len()];
        for (i, o) in f.ops.iter().enumerate() {
            let line = m.op(&o.name).cloned().unwrap_or_else(|| OpMapping::new(&o.name));
            let engine = match o.op {
                Op::Load { out, .. } => m.tile(&f.kernel.tiles[*out].name).and_then(|t| t.engine),
                Op::Store { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => None,
            };
            let role = match &line.role {
                Some(r) => roles.iter().position(|x| x.role == *r).unwrap_or(0),
                None if engine.is_some() => 0,
                None => roles.len() - 1,
            };
            say(format!("role of {}", o.name), role.to_string());
            say(format!("atom {}", o.name), format!("{:?} {} {:?}", line.atom, line.swapped, line.a));
            if let Op::Store { buffer, .. } = o.op {
                let label = format!("{}_out", f.plan.buffers[*buffer].name);
                let reuses = m.tile(&label).and_then(|t| t.reuses.clone());
                say(format!("engine of {}", o.name), format!("{:?} {reuses:?}", line.engine));
            }
            if let Some(stream) = o.stream {
                trips[stream * roles.len() + role].push((line.slot, line.skew, i));
            }
        }
        for (at, mut trip) in trips.into_iter().enumerate() {
            trip.sort_by_key(|(slot, _, i)| (*slot, *i));
            let least = trip.iter().map(|x| x.1).min().unwrap_or(0);
            let text: String =
                trip.iter().map(|(_, skew, i)| format!("{}+{} ", f.ops[*i].name, skew - least)).collect();
            say(format!("schedule {at}"), text);
        }
        Normal(out)
    }

    /// The aspects in which two differ.
    pub fn differences(&self, other: &Normal) -> Vec<String> {
        let pairs = self.0.iter().zip(&other.0);
        let mut out: Vec<String> = pairs.filter(|(x, y)| x != y).map(|(x, _)| x.0.clone()).collect();
        if self.0.len() != other.0.len() {
            out.push("roles".into());
        }
        out
    }
}
