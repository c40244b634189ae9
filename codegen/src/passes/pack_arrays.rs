//! pack-arrays: where a kernel reads more arrays than a device binds, some are copied one behind the other into one array.
//!
//! Before: `kernel k { h0 = load h0[b, d];  skip = load skip[d];  .. }`       (an array too many)
//! After:  `kernel k_pack_h0 { store k_f32[b * D + d] = h0[b, d] over b, d }`
//!         `kernel k_pack_skip { store k_f32[B * D + d] = skip[d] over d }`
//!         `kernel k { h0 = load k_f32[b * D + d];  skip = load k_f32[B * D + d];  .. }`
//!
//! Arrays of one type are packed, no more than need be: those read before streams first, since their copies cost least,
//! then those of few dimensions. Invariant: an array is packed only where every position at which the kernel reads it is
//! inside by its form (coordinates of axes as long as the dimension, mixed-radix numbers of them, literals), so that no
//! position can reach a neighbour; where the kernel does not store to it; and where it is no operand of a contraction,
//! which copies take as boxes. A kernel that cannot be brought within the limit stays as it is.

use std::collections::{BTreeMap, BTreeSet};

use einfall_ir::arena::Arena;
use einfall_ir::cascade::Size;
use einfall_ir::dtype::DType;
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{Axis, AxisKind, Buffer, BufferId, BufferKind, Expr, ExprId, Kernel, Node, Op, Plan, TileId};

use super::rewrite_tiles::{for_each_root, rewrite, tidy};

/// Packs arrays of kernels that have more than `most`; none: there is no limit.
pub fn pack_arrays(mut plan: Plan, most: Option<usize>) -> Plan {
    let Some(most) = most else { return plan };
    let mut kernels = Vec::new();
    for mut kernel in std::mem::take(&mut plan.kernels) {
        let uses = Uses::of(&plan, &kernel);
        let groups = uses.groups(&plan, most);
        for group in &groups {
            pack(&mut plan, &mut kernel, group, &mut kernels);
        }
        // Expressions that nothing uses any more name the arrays still.
        kernels.push(if groups.is_empty() { kernel } else { tidy(kernel) });
    }
    plan.kernels = kernels;
    plan
}

/// The arrays of a kernel.
#[derive(Default)]
struct Uses {
    all: BTreeSet<BufferId>,
    stored: BTreeSet<BufferId>,
    /// Tiles that contractions read.
    operands: BTreeSet<TileId>,
    /// Read at a position whose form does not keep it inside, or an operand of a contraction, which is copied as a box.
    loose: BTreeSet<BufferId>,
    /// Read in a stream.
    walked: BTreeSet<BufferId>,
}

impl Uses {
    fn of(plan: &Plan, k: &Kernel) -> Uses {
        let mut u = Uses::default();
        k.for_each_op(&mut |op, _| {
            if let Op::Contract { a, b, .. } = op {
                u.operands.extend([*a, *b]);
            }
        });
        u.nodes(plan, k, &k.body, false);
        u
    }

    fn nodes(&mut self, plan: &Plan, k: &Kernel, nodes: &[Node], walked: bool) {
        for node in nodes {
            match node {
                Node::Stream(s) => {
                    s.filter.iter().for_each(|e| self.expr(plan, k, *e, true));
                    self.nodes(plan, k, &s.body, true);
                }
                Node::Op(op) => {
                    match op {
                        Op::Load { buffer, at, out } => {
                            self.read(plan, k, *buffer, at, walked);
                            if self.operands.contains(out) {
                                self.loose.insert(*buffer);
                            }
                        }
                        Op::Store { buffer, .. } => {
                            self.all.insert(*buffer);
                            self.stored.insert(*buffer);
                        }
                        Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {}
                    }
                    op.roots().into_iter().for_each(|e| self.expr(plan, k, e, walked));
                }
            }
        }
    }

    fn expr(&mut self, plan: &Plan, k: &Kernel, root: ExprId, walked: bool) {
        k.walk(root, &mut |_, e| {
            if let Expr::Read { buffer, at } = e {
                self.read(plan, k, *buffer, at, walked);
            }
        });
    }

    fn read(&mut self, plan: &Plan, k: &Kernel, buffer: BufferId, at: &[ExprId], walked: bool) {
        let b = &plan.buffers[buffer];
        if b.is_scalar() {
            return;
        }
        self.all.insert(buffer);
        if walked {
            self.walked.insert(buffer);
        }
        let inside = b.dims.iter().zip(at).all(|(n, e)| inside(k, n, *e));
        if !inside || b.dims.is_empty() {
            self.loose.insert(buffer);
        }
    }

    /// The arrays to pack together, list by list; none where that does not suffice.
    fn groups(&self, plan: &Plan, most: usize) -> Vec<Vec<BufferId>> {
        let mut excess = self.all.len().saturating_sub(most);
        let mut by_type: BTreeMap<String, Vec<BufferId>> = BTreeMap::new();
        for b in self.all.iter().filter(|b| !self.stored.contains(b) && !self.loose.contains(b)) {
            by_type.entry(plan.buffers[*b].dtype.to_string()).or_default().push(*b);
        }
        let mut lists: Vec<Vec<BufferId>> = by_type.into_values().collect();
        for list in &mut lists {
            list.sort_by_key(|b| (self.walked.contains(b), plan.buffers[*b].dims.len(), *b));
        }
        // Types with the most arrays that are read once.
        lists.sort_by_key(|l| std::cmp::Reverse(l.iter().filter(|b| !self.walked.contains(b)).count()));
        let mut chosen = Vec::new();
        for mut list in lists {
            if excess == 0 || list.len() < 2 {
                continue;
            }
            list.truncate(excess + 1);
            excess -= list.len() - 1;
            chosen.push(list);
        }
        if excess == 0 { chosen } else { Vec::new() }
    }
}

/// Whether a position is within a dimension of extent `n` by its form.
fn inside(k: &Kernel, n: &Size, e: ExprId) -> bool {
    match (&k.exprs[e], n) {
        (Expr::Int(i), Size::Const(n)) => u64::try_from(*i).is_ok_and(|i| i < *n),
        _ => extent(k, e).as_ref() == Some(n),
    }
}

/// The extent that a position counts through, by its form: of a coordinate its axis's, of `a · n + b`, where b counts
/// through n, the product.
fn extent(k: &Kernel, e: ExprId) -> Option<Size> {
    match &k.exprs[e] {
        Expr::Coord(a) => Some(k.axes[*a].extent.clone()),
        Expr::Binary(BinaryOp::Add, a, b) => {
            let Expr::Binary(BinaryOp::Mul, x, n) = k.exprs[*a] else { return None };
            let n = match &k.exprs[n] {
                Expr::Size(n) => n.clone(),
                Expr::Int(n) => Size::Const(u64::try_from(*n).ok()?),
                _ => return None,
            };
            (extent(k, *b)? == n).then_some(())?;
            Some(Size::Mul(Box::new(extent(k, x)?), Box::new(n)))
        }
        Expr::Int(_)
        | Expr::Float(_)
        | Expr::Size(_)
        | Expr::Tile(_)
        | Expr::TileAt { .. }
        | Expr::Read { .. }
        | Expr::Unary(..)
        | Expr::Binary(..)
        | Expr::Select(..)
        | Expr::Cast(..)
        | Expr::Rand(_) => None,
    }
}

/// Packs `arrays` for `kernel`: an array in the plan, a kernel for each copy, and the kernel's reads.
fn pack(plan: &mut Plan, kernel: &mut Kernel, arrays: &[BufferId], kernels: &mut Vec<Kernel>) {
    let dtype: DType = plan.buffers[arrays[0]].dtype;
    let mut first: BTreeMap<BufferId, Size> = BTreeMap::new();
    let mut total = Size::Const(0);
    for b in arrays {
        first.insert(*b, total.clone());
        let all = plan.buffers[*b].dims.iter().cloned().reduce(|x, y| Size::Mul(Box::new(x), Box::new(y)));
        let all = all.unwrap_or(Size::Const(1));
        total = if total == Size::Const(0) { all } else { Size::Add(Box::new(total), Box::new(all)) };
    }
    let base = format!("{}_{dtype}", kernel.name);
    let taken = |n: &str| plan.buffers.iter().any(|(_, b)| b.name == n);
    let name = (1..).map(|i| if i == 1 { base.clone() } else { format!("{base}_{i}") }).find(|n| !taken(n));
    let name = name.expect("some name is free");
    let kind = BufferKind::Workspace;
    let packed = plan.buffers.push(Buffer { name, dtype, dims: vec![total], kind, positive: false });
    for b in arrays {
        kernels.push(copy(plan, &kernel.name, *b, packed, &first[b]));
    }
    let mut body = std::mem::take(&mut kernel.body);
    loads(plan, kernel, &mut body, packed, &first);
    for_each_root(&mut body, &mut |e| {
        rewrite(kernel, e, &mut |k, e| {
            let Expr::Read { buffer, at } = k.exprs[e].clone() else { return None };
            let start = first.get(&buffer)?;
            let at = linear(&mut k.exprs, &plan.buffers[buffer].dims, start, &at);
            Some(k.exprs.push(Expr::Read { buffer: packed, at: vec![at] }))
        })
    });
    kernel.body = body;
}

fn loads(plan: &Plan, k: &mut Kernel, nodes: &mut [Node], packed: BufferId, first: &BTreeMap<BufferId, Size>) {
    for node in nodes {
        match node {
            Node::Stream(s) => loads(plan, k, &mut s.body, packed, first),
            Node::Op(Op::Load { buffer, at, .. }) => {
                if let Some(start) = first.get(buffer) {
                    *at = vec![linear(&mut k.exprs, &plan.buffers[*buffer].dims, start, at)];
                    *buffer = packed;
                }
            }
            Node::Op(_) => {}
        }
    }
}

/// `start + ((i · n + j) · m + ..)`.
fn linear(exprs: &mut Arena<ExprId, Expr>, dims: &[Size], start: &Size, at: &[ExprId]) -> ExprId {
    let mut all: Option<ExprId> = None;
    for (n, e) in dims.iter().zip(at) {
        all = Some(match all {
            None => *e,
            Some(before) => {
                let n = exprs.push(Expr::Size(n.clone()));
                let rows = exprs.push(Expr::Binary(BinaryOp::Mul, before, n));
                exprs.push(Expr::Binary(BinaryOp::Add, rows, *e))
            }
        });
    }
    let all = all.unwrap_or_else(|| exprs.push(Expr::Int(0)));
    if *start == Size::Const(0) {
        return all;
    }
    let start = exprs.push(Expr::Size(start.clone()));
    exprs.push(Expr::Binary(BinaryOp::Add, start, all))
}

/// The kernel that copies an array to its place.
fn copy(plan: &Plan, of: &str, array: BufferId, packed: BufferId, start: &Size) -> Kernel {
    let b = &plan.buffers[array];
    let (mut axes, mut exprs) = (Arena::new(), Arena::new());
    let mut at = Vec::new();
    for (i, n) in b.dims.iter().enumerate() {
        let axis = Axis { name: format!("i{i}"), extent: n.clone(), kind: AxisKind::Grid, block: None };
        at.push(exprs.push(Expr::Coord(axes.push(axis))));
    }
    let value = exprs.push(Expr::Read { buffer: array, at: at.clone() });
    let to = linear(&mut exprs, &b.dims, start, &at);
    let store = Op::Store { buffer: packed, at: vec![to], axes: axes.ids().collect(), value, join: None, when: None };
    let name = format!("{of}_pack_{}", b.name);
    Kernel { axes, exprs, body: vec![Node::Op(store)], ..Kernel::new(name) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use einfall_ir::tile::parse::parse;

    const TEXT: &str = "plan k[B, D] {
    input a: f32[B, D]
    input b: f32[D]
    input c: f32[2, D]
    input i: i32[D]
    output y: f32[B, D]

    kernel k_0 {
        grid m in B
        grid d in D
        store y[m, d] = a[m, d] + b[i[d]] * c[1, d] over m, d
    }
}
";

    fn arrays(plan: &Plan) -> Vec<usize> {
        plan.kernels.iter().map(|k| Uses::of(plan, k).all.len()).collect()
    }

    #[test]
    fn arrays_read_inside_by_form_are_packed() {
        let plan = parse(TEXT).expect("a plan");
        assert_eq!(pack_arrays(plan.clone(), None), plan);
        assert_eq!(pack_arrays(plan.clone(), Some(5)), plan);
        // b is read wherever i says: only a and c may have neighbours.
        let packed = pack_arrays(plan.clone(), Some(4));
        assert_eq!(arrays(&packed), [2, 2, 4]);
        let text = packed.to_string();
        for line in [
            "workspace k_0_f32: f32[B * D + 2 * D]",
            "store k_0_f32[i0 * D + i1] = a[i0, i1] over i0, i1",
            "store k_0_f32[B * D + (i0 * D + i1)] = c[i0, i1] over i0, i1",
            "store y[m, d] = k_0_f32[m * D + d] + b[i[d]] * k_0_f32[B * D + (1 * D + d)] over m, d",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        einfall_ir::tile::verify::verify(&packed).expect("a plan that holds");
        assert_eq!(pack_arrays(plan.clone(), Some(3)), plan, "three cannot be had");
    }
}
