//! round-operands: where a contraction's operands may be narrower and an instruction wants them so, they are rounded.
//!
//! Before: `o = carry contract(n) p, v`            (p in f32, v loaded from a bf16 array)
//! After:  `p_bf16 = p;  o = carry contract(n) p_bf16, v`
//!
//! These are the language's default rounding points (docs/language.md, "Contractions"): both operands may be rounded to
//! the narrowest float type of 16 bits or more among the arrays that feed them elementwise; `@exact` forbids it, and so
//! does a tile that is exact by its derivation. An
//! operand that only contractions of that type read takes the type itself; one with other readers gets a copy, made
//! where the operand is made, so that the other readers keep the wide value. Invariant: without an atom for the narrow
//! type nothing changes.

use std::collections::BTreeSet;

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms::Atom;
use einfall_ir::tile::{BufferId, BufferKind, Expr, Kernel, Node, Op, Plan, Tile, TileId};

/// Rounds the operands that `atoms` want narrower than they are.
pub fn round_operands(mut plan: Plan, atoms: &[Atom]) -> Plan {
    if plan.exact || atoms.is_empty() {
        return plan;
    }
    for k in 0..plan.kernels.len() {
        let mut kernel = plan.kernels[k].clone();
        // One operand at a time: a copy moves the operations after it.
        loop {
            let (mut wanted, mut next) = (Vec::new(), None);
            kernel.for_each_op(&mut |op, _| {
                let to = narrower(&plan, &kernel, op, atoms);
                if let (Op::Contract { a, b, .. }, Some(to)) = (op, to) {
                    next = next.or([*a, *b].into_iter().find(|t| kernel.tiles[*t].dtype != to).map(|t| (t, to)));
                }
                wanted.push(to);
            });
            let Some((tile, to)) = next else { break };
            round(&mut kernel, tile, to, &wanted);
        }
        plan.kernels[k] = kernel;
    }
    plan
}

/// The type to which the operands of `op` are to be rounded, if it is a contraction that has an atom then and none now.
fn narrower(plan: &Plan, kernel: &Kernel, op: &Op, atoms: &[Atom]) -> Option<DType> {
    let Op::Contract { out, a, b, .. } = op else { return None };
    if kernel.tiles[*out].exact {
        return None;
    }
    let [acc, left, right] = [*out, *a, *b].map(|t| kernel.tiles[t].dtype);
    let has_atom = |operand: DType| atoms.iter().any(|x| x.operand == operand && x.acc == acc);
    if left == right && has_atom(left) {
        return None;
    }
    let mut fed = BTreeSet::new();
    for t in [*a, *b] {
        stored_types(plan, kernel, t, &mut BTreeSet::new(), &mut fed);
    }
    let roundoff = |d: &DType| d.unit_roundoff();
    let to = fed.into_iter().max_by(|x, y| roundoff(x).total_cmp(&roundoff(y)))?;
    let wide = |d: DType| d == to || (d.is_float() && roundoff(&d) < roundoff(&to));
    (to.unit_roundoff() > DType::F32.unit_roundoff() && has_atom(to) && wide(left) && wide(right)).then_some(to)
}

/// Float types of 16 bits or more of the arrays that feed `tile` elementwise.
fn stored_types(plan: &Plan, kernel: &Kernel, tile: TileId, seen: &mut BTreeSet<TileId>, found: &mut BTreeSet<DType>) {
    if !seen.insert(tile) {
        return;
    }
    let mut arrays: Vec<BufferId> = Vec::new();
    let mut tiles: Vec<TileId> = Vec::new();
    kernel.for_each_op(&mut |op, _| match op {
        Op::Load { out, buffer, .. } if *out == tile => arrays.push(*buffer),
        Op::Map { out, value } if *out == tile => kernel.walk(*value, &mut |_, e| match e {
            Expr::Read { buffer, .. } => arrays.push(*buffer),
            Expr::Tile(t) | Expr::TileAt { tile: t, .. } => tiles.push(*t),
            Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Coord(_)
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Rand(_) => {}
        }),
        Op::Load { .. }
        | Op::Store { .. }
        | Op::Map { .. }
        | Op::Reduce { .. }
        | Op::Contract { .. }
        | Op::Scan { .. } => {}
    });
    for b in arrays {
        let b = &plan.buffers[b];
        // A temporary of f32 was declared nowhere: it says nothing.
        let given = b.kind != BufferKind::Workspace || b.dtype.unit_roundoff() > DType::F32.unit_roundoff();
        if given && b.dtype.is_float() && b.dtype.bits() >= 16 {
            found.insert(b.dtype);
        }
    }
    for t in tiles {
        stored_types(plan, kernel, t, seen, found);
    }
}

/// Makes the contractions with `wanted[op] == to` read `tile` in that type.
fn round(kernel: &mut Kernel, tile: TileId, to: DType, wanted: &[Option<DType>]) {
    let mut uses =
        Uses { next: 0, tile, to, wanted, others: false, first: None, writers: Vec::new(), exprs: BTreeSet::new() };
    for (id, e) in kernel.exprs.iter() {
        if matches!(e, Expr::Tile(t) | Expr::TileAt { tile: t, .. } if *t == tile) {
            uses.exprs.insert(id.index());
        }
    }
    uses.nodes(kernel, &kernel.body, &mut Vec::new());
    let only_map = matches!(uses.writers.as_slice(), [(_, true)]);
    if only_map && !uses.others {
        kernel.tiles[tile].dtype = to;
        return;
    }
    let wide = &kernel.tiles[tile];
    let base = format!("{}_{to}", wide.name);
    let taken = |n: &str| kernel.tiles.iter().any(|(_, t)| t.name == n) || kernel.axes.iter().any(|(_, a)| a.name == n);
    let name = (1..).map(|k| if k == 1 { base.clone() } else { format!("{base}_{k}") }).find(|n| !taken(n));
    let copy = Tile {
        name: name.expect("some name is free"),
        dtype: to,
        axes: wide.axes.clone(),
        space: wide.space,
        exact: false,
    };
    let out = kernel.tiles.push(copy);
    let value = kernel.exprs.push(Expr::Tile(tile));
    let place = uses.place();
    let mut body = std::mem::take(&mut kernel.body);
    Copy { next: 0, tile, out, to, wanted, map: Node::Op(Op::Map { out, value }), place }.nodes(&mut body);
    kernel.body = body;
}

/// How a tile is used.
struct Uses<'a> {
    next: usize,
    tile: TileId,
    to: DType,
    wanted: &'a [Option<DType>],
    /// Whether anything but contractions that want the narrow type reads it.
    others: bool,
    /// The first contraction that reads it.
    first: Option<usize>,
    /// Operations that write it: the streams around and the operation's number; whether it is elementwise.
    writers: Vec<((Vec<usize>, usize), bool)>,
    /// Expressions that read it.
    exprs: BTreeSet<usize>,
}

impl Uses<'_> {
    fn nodes(&mut self, kernel: &Kernel, nodes: &[Node], around: &mut Vec<usize>) {
        for node in nodes {
            match node {
                Node::Stream(s) => {
                    around.push(self.next);
                    self.others |= s.filter.is_some_and(|e| self.reads(kernel, e));
                    self.nodes(kernel, &s.body, around);
                    around.pop();
                }
                Node::Op(op) => {
                    self.others |= op.roots().into_iter().any(|e| self.reads(kernel, e));
                    self.others |= match op {
                        Op::Contract { out, a, b, .. } => {
                            let operand = *a == self.tile || *b == self.tile;
                            self.first = self.first.or(operand.then_some(self.next));
                            *out == self.tile || (operand && self.wanted[self.next] != Some(self.to))
                        }
                        Op::Scan { carry, .. } => *carry == Some(self.tile),
                        Op::Load { .. } | Op::Store { .. } | Op::Map { .. } | Op::Reduce { .. } => false,
                    };
                    if op.outs().contains(&self.tile) {
                        self.writers.push(((around.clone(), self.next), matches!(op, Op::Map { .. })));
                    }
                    self.next += 1;
                }
            }
        }
    }

    fn reads(&self, kernel: &Kernel, root: einfall_ir::tile::ExprId) -> bool {
        let mut found = false;
        kernel.walk(root, &mut |id, _| found |= self.exprs.contains(&id.index()));
        found
    }

    /// The operation after which a copy holds for every reader: the last writer, where all stand in one list before them.
    fn place(&self) -> Option<usize> {
        let ((around, last), _) = self.writers.last()?;
        let before = self.first.is_some_and(|f| f > *last);
        (before && self.writers.iter().all(|((a, _), _)| a == around)).then_some(*last)
    }
}

/// Puts the copy in and lets contractions read it.
struct Copy<'a> {
    next: usize,
    tile: TileId,
    out: TileId,
    to: DType,
    wanted: &'a [Option<DType>],
    map: Node,
    /// The operation it follows; none: it precedes every contraction that reads it.
    place: Option<usize>,
}

impl Copy<'_> {
    fn nodes(&mut self, nodes: &mut Vec<Node>) {
        let mut made = Vec::with_capacity(nodes.len());
        for mut node in nodes.drain(..) {
            match &mut node {
                Node::Stream(s) => {
                    self.nodes(&mut s.body);
                    made.push(node);
                }
                Node::Op(op) => {
                    if let Op::Contract { a, b, .. } = op
                        && self.wanted[self.next] == Some(self.to)
                        && (*a == self.tile || *b == self.tile)
                    {
                        for operand in [a, b].into_iter().filter(|t| **t == self.tile) {
                            *operand = self.out;
                        }
                        if self.place.is_none() {
                            made.push(self.map.clone());
                        }
                    }
                    made.push(node);
                    if self.place == Some(self.next) {
                        made.push(self.map.clone());
                    }
                    self.next += 1;
                }
            }
        }
        *nodes = made;
    }
}
