//! stage-stores: a store that a copy engine carries out goes through a tile in shared memory.
//!
//! ```text
//! store C[m, n] = c over m, n          (op store.C by tma)
//! →  C_out = c                         (tile C_out: the array's type, in shared, swizzle 128)
//!    store C[m, n] = C_out over m, n   (op store.C by tma)
//! ```
//! Invariant: the plan computes the same; only the mapping's stores with an engine change.

use std::collections::BTreeMap;

use einfall_ir::mapping::{KernelMapping, Mapping, OpMapping, TileMapping};
use einfall_ir::tile::{Expr, Kernel, Node, Op, Plan, Space, Tile};

use super::{Step, refuse};

/// Applies the pass: the plan with staging tiles, and the mapping with entries for them.
///
/// # Errors
/// A conditional or joined store cannot leave by an engine.
pub fn run(plan: &Plan, mapping: &Mapping) -> Step<(Plan, Mapping)> {
    let (mut plan, mut mapping) = (plan.clone(), mapping.clone());
    for m in &mut mapping.kernels {
        let Some(at) = plan.kernels.iter().position(|k| k.name == m.kernel) else { continue };
        let names = plan.kernels[at].op_names(&plan);
        let mut kernel = plan.kernels[at].clone();
        let mut body = std::mem::take(&mut kernel.body);
        let mut pass = Staging { plan: &plan, names: &names, next: 0, mapping: m, writers: BTreeMap::new() };
        pass.nodes(&mut kernel, &mut body)?;
        kernel.body = body;
        plan.kernels[at] = kernel;
    }
    Ok((plan, mapping))
}

struct Staging<'a> {
    plan: &'a Plan,
    names: &'a [String],
    next: usize,
    mapping: &'a mut KernelMapping,
    /// How often each staging tile is written.
    writers: BTreeMap<String, usize>,
}

impl Staging<'_> {
    fn nodes(&mut self, kernel: &mut Kernel, nodes: &mut Vec<Node>) -> Step<()> {
        let mut out = Vec::with_capacity(nodes.len());
        for mut node in nodes.drain(..) {
            if let Node::Stream(s) = &mut node {
                let mut body = std::mem::take(&mut s.body);
                self.nodes(kernel, &mut body)?;
                s.body = body;
            } else if let Some(staged) = self.store(kernel, &mut node)? {
                out.push(staged);
            }
            out.push(node);
        }
        *nodes = out;
        Ok(())
    }

    /// The operation that fills the staging tile, if `node` is a store by an engine; `node` then reads that tile.
    fn store(&mut self, kernel: &mut Kernel, node: &mut Node) -> Step<Option<Node>> {
        let name = self.names[self.next].clone();
        self.next += 1;
        let Node::Op(Op::Store { buffer, axes, value, join, when, .. }) = node else { return Ok(None) };
        let Some(entry) = self.mapping.op(&name).filter(|o| o.engine.is_some()).cloned() else { return Ok(None) };
        if join.is_some() || when.is_some() {
            return refuse("store engine", format!("{name} is joined or conditional"), "leave out `by` on this store");
        }
        let array = &self.plan.buffers[*buffer];
        let label = format!("{}_out", array.name);
        let writer = match self.writers.get(&label) {
            None => label.clone(),
            Some(k) => format!("{label}@{k}"),
        };
        *self.writers.entry(label.clone()).or_insert(0) += 1;
        let known = kernel.tiles.iter().find(|(_, t)| t.name == label).map(|(id, _)| id);
        let tile = match known {
            Some(id) => id,
            None => {
                let tile =
                    Tile { name: label.clone(), dtype: array.dtype, axes: axes.clone(), space: None, exact: false };
                kernel.tiles.push(tile)
            }
        };
        let staged = Node::Op(Op::Map { out: tile, value: *value });
        *value = kernel.exprs.push(Expr::Tile(tile));
        if self.mapping.tile(&label).is_none() {
            let mut t = TileMapping::new(&label, Space::Shared);
            t.swizzle = 128;
            self.mapping.tiles.push(t);
        }
        self.mapping.ops.push(OpMapping { op: writer, engine: None, atom: None, ..entry });
        Ok(Some(staged))
    }
}
