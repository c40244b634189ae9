//! A scheduled group of statements as one kernel: streams one after another, with what stands between them.

use std::collections::{HashMap, HashSet};

use einfall_ir::cascade::{Cascade, ExprId, TensorId};
use einfall_ir::dtype::DType;
use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{self, AxisKind, BufferId, Kernel};

use super::emit::{Emitter, PlanTypes};
use super::group::{Program, Role, Schedule};
use super::program::{Kind, Node};
use crate::passes::Unsupported;
use crate::passes::propagate_support::{guard_of, split_conjuncts};

/// Emits one kernel.
pub(super) fn emit_group(
    program: &Program<'_>,
    s: &Schedule,
    name: String,
    buffers: &HashMap<TensorId, BufferId>,
    types: &PlanTypes,
) -> Result<Kernel, Unsupported> {
    let classes = s.classes.clone();
    let mut em = Emitter::new(program.cascade, name, buffers, move |i| classes.find(i));
    for &i in &s.grid {
        em.axis(i, AxisKind::Grid);
    }
    let stream = s.stream.map(|i| em.axis(i, AxisKind::Stream));
    let group = Group { program, s, types };
    let Some(stream) = stream else {
        for p in 0..s.nodes.len() {
            group.row(&mut em, p)?;
        }
        return Ok(em.finish());
    };
    let n_levels = (0..s.nodes.len()).filter(|&p| s.levels[p].1 != Role::Row).map(|p| s.levels[p].0 + 1).max();
    let n_levels = n_levels.unwrap_or(0);
    for level in 0..n_levels {
        for p in group.at(level, Role::Row) {
            group.row(&mut em, p)?;
        }
        group.stream(&mut em, stream, level)?;
    }
    for (p, (level, role)) in s.levels.iter().enumerate() {
        if *role == Role::Row && *level >= n_levels {
            group.row(&mut em, p)?;
        }
    }
    Ok(em.finish())
}

struct Group<'a> {
    program: &'a Program<'a>,
    s: &'a Schedule,
    types: &'a PlanTypes,
}

impl Group<'_> {
    fn node(&self, p: usize) -> &Node {
        &self.program.nodes[self.s.nodes[p]]
    }

    fn at(&self, level: usize, role: Role) -> Vec<usize> {
        (0..self.s.nodes.len()).filter(|&p| self.s.levels[p] == (level, role)).collect()
    }

    fn is_stored(&self, p: usize) -> bool {
        self.s.stored.contains(&self.s.nodes[p])
    }

    /// A statement without the streamed axis: computed where it stands.
    fn row(&self, em: &mut Emitter<'_>, p: usize) -> Result<(), Unsupported> {
        emit_statement(em, self.node(p), self.is_stored(p), self.is_read_inside(p), self.types)
    }

    /// Whether another member reads it.
    fn is_read_inside(&self, p: usize) -> bool {
        let targets: Vec<TensorId> = self.node(p).einsum.targets.iter().map(|t| t.tensor).collect();
        (0..self.s.nodes.len()).any(|q| q != p && self.node(q).reads.iter().any(|(t, _)| targets.contains(t)))
    }

    /// The stream of one level: what its reductions and stored statements need, then those.
    fn stream(&self, em: &mut Emitter<'_>, axis: tile::AxisId, level: usize) -> Result<(), Unsupported> {
        let c = self.program.cascade;
        let carried = self.at(level, Role::Carried);
        let kept: Vec<usize> = self.at(level, Role::Inside).into_iter().filter(|&p| self.is_stored(p)).collect();
        if carried.is_empty() && kept.is_empty() {
            return Ok(());
        }
        let mut carried_tiles = HashMap::new();
        for &p in &carried {
            let Kind::Reduce { op, .. } = self.node(p).kind else { continue };
            let tiles = em.result_tiles(self.node(p));
            for (tile, identity) in tiles.iter().zip(Emitter::identities(op)) {
                em.fill(*tile, identity);
            }
            carried_tiles.insert(p, tiles);
        }
        let mut needed: HashSet<usize> = HashSet::new();
        let mut todo: Vec<usize> = carried.iter().chain(&kept).copied().collect();
        while let Some(p) = todo.pop() {
            for (t, _) in &self.node(p).reads {
                let Some(k) = self.program.producer.get(t) else { continue };
                let Some(q) = self.s.nodes.iter().position(|n| n == k) else { continue };
                if self.s.levels[q].1 == Role::Inside && needed.insert(q) {
                    todo.push(q);
                }
            }
        }
        needed.extend(&kept);
        // Scans carry a tile without the streamed axis from block to block.
        let mut scan_carry = HashMap::new();
        for &p in &needed {
            if let Kind::Scan { op, .. } = self.node(p).kind {
                let dims = self.node(p).dims.clone().unwrap_or_default();
                let axes: Vec<_> = em.axes(&dims).into_iter().filter(|a| *a != axis).collect();
                let name = format!("{}_carry", c.tensors[self.node(p).target()].name);
                let carry = em.tile(&name, c.tensors[self.node(p).target()].dtype, axes);
                em.fill(carry, op.identity());
                scan_carry.insert(p, carry);
            }
        }
        em.open(axis);
        for p in 0..self.s.nodes.len() {
            let node = self.node(p);
            if needed.contains(&p) {
                match node.kind {
                    Kind::Scan { op, over, body } => {
                        let value = em.convert(body)?;
                        let along = em.known_axis(over);
                        let out = em.result_tiles(node)[0];
                        em.push(tile::Op::Scan { out, op, value, along, carry: scan_carry.get(&p).copied() });
                        em.store(node, None, node.einsum.span)?;
                    }
                    Kind::Map | Kind::Reduce { .. } | Kind::Fold { .. } => {
                        let store = kept.contains(&p);
                        let read = needed.len() + carried.len() > 1 && self.is_read_inside(p);
                        emit_statement(em, node, store, read, self.types)?;
                    }
                }
            } else if carried.contains(&p) {
                let Kind::Reduce { op, over, body } = node.kind.clone() else { continue };
                em.reduce(&carried_tiles[&p], op, (&node.einsum.free, &over), body, true, self.types)?;
            }
        }
        let bodies: Vec<(ExprId, ReduceOp, DType)> = carried
            .iter()
            .filter_map(|&p| match self.node(p).kind {
                Kind::Reduce { op, body, .. } => Some((body, op, c.tensors[self.node(p).target()].dtype)),
                Kind::Map | Kind::Scan { .. } | Kind::Fold { .. } => None,
            })
            .collect();
        let filter = if kept.is_empty() { common_guard(em, c, &bodies)? } else { None };
        em.close(false, false, filter);
        for &p in &carried {
            if self.is_stored(p) {
                em.store(self.node(p), None, self.node(p).einsum.span)?;
            }
        }
        Ok(())
    }
}

/// A statement over axes that are all at hand: an elementwise tile or a whole reduction, stored if asked.
pub(super) fn emit_statement(
    em: &mut Emitter<'_>,
    node: &Node,
    store: bool,
    read: bool,
    types: &PlanTypes,
) -> Result<(), Unsupported> {
    let span = node.einsum.span;
    match node.kind.clone() {
        Kind::Map => {
            let value = em.convert(node.einsum.value)?;
            if read || node.dims.is_none() && !store {
                let tile = em.result_tiles(node)[0];
                em.push(tile::Op::Map { out: tile, value });
                if store {
                    em.store(node, None, span)?;
                }
            } else {
                em.store(node, Some(value), span)?;
            }
        }
        Kind::Reduce { op, over, body } => {
            let out = em.result_tiles(node);
            em.reduce(&out, op, (&node.einsum.free, &over), body, false, types)?;
            if store {
                em.store(node, None, span)?;
            }
        }
        Kind::Fold { .. } => return Err(Unsupported::new(span, "a user-defined monoid within an iteration")),
        Kind::Scan { op, over, body } => {
            let value = em.convert(body)?;
            let along = em.known_axis(over);
            let out = em.result_tiles(node)[0];
            em.push(tile::Op::Scan { out, op, value, along, carry: None });
            if store {
                em.store(node, None, span)?;
            }
        }
    }
    Ok(())
}

/// The predicate without which none of these reduction bodies contributes anything, of what is known before a step.
pub(super) fn common_guard(
    em: &mut Emitter<'_>,
    c: &Cascade,
    bodies: &[(ExprId, ReduceOp, DType)],
) -> Result<Option<tile::ExprId>, Unsupported> {
    let mut common: Option<Vec<tile::ExprId>> = None;
    for &(body, op, dtype) in bodies {
        let Some(cond) = guard_of(c, body, op, dtype) else { return Ok(None) };
        let mut parts = Vec::new();
        split_conjuncts(c, cond, &mut parts);
        let parts: Vec<_> = parts.into_iter().map(|e| em.convert(e)).collect::<Result<_, _>>()?;
        let parts: Vec<_> = parts.into_iter().filter(|e| !em.is_computed_here(*e)).collect();
        common = Some(match common {
            None => parts,
            Some(old) => old.into_iter().filter(|e| parts.contains(e)).collect(),
        });
    }
    let parts = common.unwrap_or_default();
    Ok(parts.into_iter().reduce(|a, b| em.binary(BinaryOp::And, a, b)))
}
