//! fold-exponents: an exponential relative to a running maximum costs one multiply-add and one `exp2` per element.
//!
//! ```text
//! S = c * r                                        (c > 0 does not vary along n)
//! x_new = x;  x_new = carry reduce max(n) S
//! l = if x == -inf then 0.0 else exp(x - x_new) * l
//! p = if S == -inf then 0.0 else exp(S - x_new)
//! →
//! x_new = x;  x_new = carry reduce max(n) r        (now in units of r: every other use reads c * x)
//! x_top = if x_new == -inf then 0.0 else x_new
//! x_exp = x_top * (c * log2 e);  x_fix = exp2((x - x_top) * (c * log2 e))
//! l = x_fix * l
//! p = exp2(r * (c * log2 e) - x_exp)
//! ```
//!
//! Where a mask stands, it is applied once, to the score: `r = if m then r else -inf`.
//!
//! Three steps that hold separately. A factor that is above 0 and the same along the axes reduced leaves the maximum:
//! max(c·r) = c·max(r). The guards against an empty maximum move from elements to rows: with `x_top` finite, an element
//! that is −∞ gives exp2(−∞) = 0 by itself, and one that is not has made `x_new` finite. And exp(a − b) is
//! exp2(a·log₂e − b·log₂e). What a row shares becomes a tile of its own. Source: FlashAttention-2 (arXiv 2307.08691)
//! §3.1 for the exponent's form. Rounding `x_exp` scales all exponentials of a row alike, by |x·log₂e| units of roundoff:
//! quotients of sums do not see it, a logarithm that x is added to absorbs it. Where a step of the stream reads x beside
//! the exponentials (the entropy's exp(S − x)·(S − x)), the two would disagree: there p = exp2((r − x_top)·(c·log2 e)),
//! an instruction more. Invariant: results agree wherever the plan's were finite.

use std::f64::consts::LOG2_E;

use einfall_ir::ops::{BinaryOp, ReduceOp, UnaryOp};
use einfall_ir::tile::{Expr, ExprId, Kernel, Node, Op, Plan, Tile, TileId};

use super::rewrite_tiles::{axes_of, for_each_root, new_tile, rewrite, same, tidy};

/// Rewrites every running maximum that exponentials are taken against.
pub fn fold_exponents(mut plan: Plan) -> Plan {
    for k in 0..plan.kernels.len() {
        let mut kernel = plan.kernels[k].clone();
        let anchors = anchors(&kernel);
        for a in &anchors {
            fold(&plan, &mut kernel, a);
        }
        if !anchors.is_empty() {
            plan.kernels[k] = tidy(kernel);
        }
    }
    plan
}

/// A running maximum: `new = old; new = carry reduce max(..) mask ? score : −∞; ..; old = new` within one stream.
struct Anchor {
    /// The stream's place in the kernel's body.
    stream: usize,
    old: TileId,
    new: TileId,
    mask: Option<ExprId>,
    score: ExprId,
    /// Whether the stream reads the maximum beside exponentials against it.
    read_beside: bool,
}

/// What one anchor's rewriting knows.
struct Fold {
    old: TileId,
    new: TileId,
    mask: Option<ExprId>,
    score: ExprId,
    /// The factor that leaves the maximum, and what stands for the score then.
    scale: Option<(ExprId, TileId, ExprId)>,
    /// What exponents are multiplied by.
    base: ExprId,
    /// Rows: the new maximum, finite; it times the base; and exp2 of the old against the new.
    top: TileId,
    exponent: TileId,
    repair: TileId,
    read_beside: bool,
}

fn is_tile(k: &Kernel, e: ExprId, t: TileId) -> bool {
    k.exprs[e] == Expr::Tile(t)
}

fn is_bottom(k: &Kernel, e: ExprId) -> bool {
    matches!(k.exprs[e], Expr::Float(x) if x == f64::NEG_INFINITY)
}

/// Where each tile is written: the top-level node, and the operation within it.
fn writers(k: &Kernel, t: TileId) -> Vec<(usize, Option<usize>)> {
    fn inside(nodes: &[Node], t: TileId) -> bool {
        nodes.iter().any(|n| match n {
            Node::Op(op) => op.outs().contains(&t),
            Node::Stream(s) => inside(&s.body, t),
        })
    }
    let mut found = Vec::new();
    for (i, node) in k.body.iter().enumerate() {
        match node {
            Node::Op(op) if op.outs().contains(&t) => found.push((i, None)),
            Node::Op(_) => {}
            Node::Stream(s) => {
                for (j, node) in s.body.iter().enumerate() {
                    if inside(std::slice::from_ref(node), t) {
                        found.push((i, Some(j)));
                    }
                }
            }
        }
    }
    found
}

fn anchors(k: &Kernel) -> Vec<Anchor> {
    let mut found = Vec::new();
    for (stream, node) in k.body.iter().enumerate() {
        let Node::Stream(s) = node else { continue };
        for (at, node) in s.body.iter().enumerate() {
            let Node::Op(Op::Reduce { out, op: ReduceOp::Max, value, carry: true, .. }) = node else { continue };
            let [new] = out[..] else { continue };
            // `new` is written by the copy before and here; `old` before the stream and by the copy after.
            let [(i, Some(first)), (j, Some(last))] = writers(k, new)[..] else { continue };
            let Node::Op(Op::Map { value: from, .. }) = &s.body[first] else { continue };
            let Expr::Tile(old) = k.exprs[*from] else { continue };
            let [(before, None), (l, Some(end))] = writers(k, old)[..] else { continue };
            let Node::Op(Op::Map { value: back, .. }) = &s.body[end] else { continue };
            if (i, j, l) != (stream, stream, stream)
                || last != at
                || !(first < at && at < end && before < stream)
                || !is_tile(k, *back, new)
                || !matches!(k.body[before], Node::Op(Op::Map { .. }))
            {
                continue;
            }
            let (mask, score) = match k.exprs[*value] {
                Expr::Select(mask, score, other) if is_bottom(k, other) => (Some(mask), score),
                _ => (None, *value),
            };
            if read_as_exponent(k, &s.body, new) {
                let read_beside = s.body.iter().enumerate().any(|(i, node)| match node {
                    Node::Op(op) if ![first, at, end].contains(&i) => {
                        op.roots().into_iter().any(|root| reads_beside(k, root, old, new))
                    }
                    Node::Op(_) => false,
                    Node::Stream(_) => true,
                });
                found.push(Anchor { stream, old, new, mask, score, read_beside });
            }
        }
    }
    found
}

/// Whether some operation takes `exp(_ - anchor)`.
fn read_as_exponent(k: &Kernel, body: &[Node], anchor: TileId) -> bool {
    let mut found = false;
    for node in body {
        let Node::Op(op) = node else { continue };
        for root in op.roots() {
            k.walk(root, &mut |id, _| found |= exponent(k, id).is_some_and(|(_, b)| is_tile(k, b, anchor)));
        }
    }
    found
}

/// Whether either maximum is read other than in `exp(_ - new)` and comparisons with −∞.
fn reads_beside(k: &Kernel, e: ExprId, old: TileId, new: TileId) -> bool {
    let maximum = |e: ExprId| is_tile(k, e, old) || is_tile(k, e, new);
    if maximum(e) {
        return true;
    }
    if let Some((x, _)) = exponent(k, e).filter(|(_, b)| is_tile(k, *b, new)) {
        return !is_tile(k, x, old) && reads_beside(k, x, old, new);
    }
    if let Expr::Binary(BinaryOp::Eq | BinaryOp::Ne, x, y) = k.exprs[e]
        && maximum(x)
        && is_bottom(k, y)
    {
        return false;
    }
    let mut found = false;
    k.exprs[e].for_each_operand(|x| found |= reads_beside(k, x, old, new));
    found
}

/// `(a, b)` of `exp(a - b)`.
fn exponent(k: &Kernel, e: ExprId) -> Option<(ExprId, ExprId)> {
    let Expr::Unary(UnaryOp::Exp, x) = k.exprs[e] else { return None };
    let Expr::Binary(BinaryOp::Sub, a, b) = k.exprs[x] else { return None };
    Some((a, b))
}

/// Whether the expression is above 0 wherever it is finite.
fn is_positive(plan: &Plan, k: &Kernel, e: ExprId) -> bool {
    match &k.exprs[e] {
        Expr::Float(x) => *x > 0.0 && x.is_finite(),
        Expr::Int(n) => *n > 0,
        Expr::Read { buffer, .. } => plan.buffers[*buffer].positive,
        Expr::Binary(BinaryOp::Mul | BinaryOp::Div | BinaryOp::Add, a, b) => {
            is_positive(plan, k, *a) && is_positive(plan, k, *b)
        }
        Expr::Unary(UnaryOp::Sqrt | UnaryOp::Rsqrt | UnaryOp::Recip, a) | Expr::Cast(_, a) => is_positive(plan, k, *a),
        Expr::Binary(..)
        | Expr::Unary(..)
        | Expr::Size(_)
        | Expr::Coord(_)
        | Expr::Tile(_)
        | Expr::TileAt { .. }
        | Expr::Select(..)
        | Expr::Rand(_) => false,
    }
}

/// `e` as a product of factors that are above 0 and do not vary over `tile`'s missing axes, and the rest.
fn split_scale(plan: &Plan, k: &mut Kernel, e: ExprId, row: &Tile) -> Option<(ExprId, ExprId)> {
    let fixed = |k: &Kernel, x: ExprId| is_positive(plan, k, x) && axes_of(k, x).iter().all(|a| row.axes.contains(a));
    match k.exprs[e] {
        Expr::Binary(BinaryOp::Mul, a, b) => {
            for (c, rest) in [(a, b), (b, a)] {
                if fixed(k, c) {
                    return Some(match split_scale(plan, k, rest, row) {
                        Some((more, rest)) => (k.exprs.push(Expr::Binary(BinaryOp::Mul, c, more)), rest),
                        None => (c, rest),
                    });
                }
            }
            let (c, left) = split_scale(plan, k, a, row)?;
            Some((c, k.exprs.push(Expr::Binary(BinaryOp::Mul, left, b))))
        }
        Expr::Binary(BinaryOp::Div, a, b) if fixed(k, b) => {
            let one = k.exprs.push(Expr::Float(1.0));
            let (c, rest) = split_scale(plan, k, a, row).unwrap_or((one, a));
            Some((k.exprs.push(Expr::Binary(BinaryOp::Div, c, b)), rest))
        }
        _ => None,
    }
}

fn fold(plan: &Plan, k: &mut Kernel, a: &Anchor) {
    let Anchor { stream, old, new, mask, score, read_beside } = *a;
    let row = Tile { dtype: einfall_ir::dtype::DType::F32, ..k.tiles[new].clone() };
    let scale = take_scale(plan, k, a, &row);
    let log2e = k.exprs.push(Expr::Float(LOG2_E));
    let base = match &scale {
        Some((c, ..)) => k.exprs.push(Expr::Binary(BinaryOp::Mul, *c, log2e)),
        None => log2e,
    };
    let name = k.tiles[old].name.clone();
    let top = new_tile(k, &format!("{name}_top"), &row);
    let exponent = new_tile(k, &format!("{name}_exp"), &row);
    let repair = new_tile(k, &format!("{name}_fix"), &row);
    let f = Fold { old, new, mask, score, scale, base, top, exponent, repair, read_beside };
    let mut body = std::mem::take(&mut k.body);
    for node in &mut body {
        f.node(k, node);
    }
    // Rows, right after the maximum.
    let mut push = |e| k.exprs.push(e);
    let (x, y) = (push(Expr::Tile(new)), push(Expr::Tile(old)));
    let (bottom, zero) = (push(Expr::Float(f64::NEG_INFINITY)), push(Expr::Float(0.0)));
    let empty = push(Expr::Binary(BinaryOp::Eq, x, bottom));
    let finite = push(Expr::Select(empty, zero, x));
    let t = push(Expr::Tile(top));
    let scaled = push(Expr::Binary(BinaryOp::Mul, t, base));
    let moved = push(Expr::Binary(BinaryOp::Sub, y, t));
    let moved = push(Expr::Binary(BinaryOp::Mul, moved, base));
    let moved = push(Expr::Unary(UnaryOp::Exp2, moved));
    let mut rows = vec![(top, finite), (exponent, scaled), (repair, moved)];
    rows.retain(|(out, _)| *out != exponent || !read_beside);
    if let Node::Stream(s) = &mut body[stream] {
        if let Some((_, unread, _)) = f.scale.filter(|(.., bare)| *bare != score) {
            s.body.retain(|n| !matches!(n, Node::Op(Op::Map { out, .. }) if *out == unread));
        }
        let at = s.body.iter().position(|n| matches!(n, Node::Op(Op::Reduce { out, .. }) if out[..] == [new]));
        let at = at.expect("the anchor is still there") + 1;
        s.body.splice(at..at, rows.into_iter().map(|(out, value)| Node::Op(Op::Map { out, value })));
    }
    k.body = body;
    let score = f.scale.map_or(score, |(_, _, bare)| bare);
    if let (Some(m), Expr::Tile(t)) = (mask, &k.exprs[score]) {
        mask_once(k, *t, m, exponent);
    }
}

/// Where every use of the score `t` selects by the maximum's mask, the score itself is −∞ outside it, once:
/// `x = max(n) if m then t else -inf;  p = if m then exp2(t * c - x_exp) else 0.0` becomes
/// `t = if m then t else -inf;  x = max(n) t;  p = exp2(t * c - x_exp)`.
fn mask_once(k: &mut Kernel, t: TileId, mask: ExprId, row: TileId) {
    // The two forms, and what stands for each.
    let bare = |k: &Kernel, e: ExprId| match k.exprs[e] {
        Expr::Select(m, a, b) if same(k, m, mask) => {
            let power = match k.exprs[a] {
                Expr::Unary(UnaryOp::Exp2, x) => match k.exprs[x] {
                    Expr::Binary(BinaryOp::Sub, x, y) if is_tile(k, y, row) => match k.exprs[x] {
                        Expr::Binary(BinaryOp::Mul, x, _) => is_tile(k, x, t),
                        _ => false,
                    },
                    _ => false,
                },
                _ => false,
            };
            let score = is_tile(k, a, t) && is_bottom(k, b);
            (score || (power && matches!(k.exprs[b], Expr::Float(z) if z == 0.0))).then_some(a)
        }
        _ => None,
    };
    let (mut reads, mut masked, mut operand) = (0, 0, false);
    k.for_each_op(&mut |op, _| {
        for root in op.roots() {
            k.walk(root, &mut |id, e| {
                reads += usize::from(*e == Expr::Tile(t));
                masked += usize::from(bare(k, id).is_some());
                operand |= matches!(e, Expr::TileAt { tile, .. } if *tile == t);
            });
        }
        operand |= matches!(op, Op::Contract { a, b, carry, out, .. }
            if *a == t || *b == t || (*carry && *out == t));
    });
    let [(stream, Some(at))] = writers(k, t)[..] else { return };
    if reads != masked || operand {
        return;
    }
    let mut body = std::mem::take(&mut k.body);
    for_each_root(&mut body, &mut |e| rewrite(k, e, &mut |k, e| bare(k, e)));
    let bottom = k.exprs.push(Expr::Float(f64::NEG_INFINITY));
    if let Node::Stream(s) = &mut body[stream] {
        if let Node::Op(Op::Map { value, .. }) = &mut s.body[at] {
            *value = k.exprs.push(Expr::Select(mask, *value, bottom));
        } else {
            let own = k.exprs.push(Expr::Tile(t));
            let value = k.exprs.push(Expr::Select(mask, own, bottom));
            s.body.insert(at + 1, Node::Op(Op::Map { out: t, value }));
        }
    }
    k.body = body;
}

/// The factor that may leave the maximum: with the score's tile, and what it holds without the factor.
fn take_scale(plan: &Plan, k: &mut Kernel, a: &Anchor, row: &Tile) -> Option<(ExprId, TileId, ExprId)> {
    let Expr::Tile(s) = k.exprs[a.score] else { return None };
    let [(stream, Some(at))] = writers(k, s)[..] else { return None };
    let Node::Stream(around) = &k.body[stream] else { return None };
    let Node::Op(Op::Map { value, .. }) = around.body[at] else { return None };
    if stream != a.stream {
        return None;
    }
    let (c, rest) = split_scale(plan, k, value, row)?;
    let bare = match k.exprs[rest] {
        Expr::Tile(t) if writers(k, t).len() == 1 => rest,
        _ => a.score,
    };
    if let Node::Stream(around) = &mut k.body[stream]
        && let Node::Op(Op::Map { value, .. }) = &mut around.body[at]
    {
        *value = rest;
    }
    Some((c, s, bare))
}

impl Fold {
    fn node(&self, k: &mut Kernel, node: &mut Node) {
        let keeps = |k: &Kernel, op: &Op| match op {
            // The copies between the two, and the value before the stream.
            Op::Map { out, value } if *out == self.new || *out == self.old => {
                is_tile(k, *value, self.old) || is_tile(k, *value, self.new)
            }
            Op::Map { .. }
            | Op::Load { .. }
            | Op::Store { .. }
            | Op::Reduce { .. }
            | Op::Contract { .. }
            | Op::Scan { .. } => false,
        };
        match node {
            Node::Stream(s) => s.body.iter_mut().for_each(|n| self.node(k, n)),
            Node::Op(op) if keeps(k, op) => {}
            Node::Op(Op::Map { out, value }) if *out == self.old => {
                if let Some((c, ..)) = self.scale
                    && !is_bottom(k, *value)
                {
                    *value = k.exprs.push(Expr::Binary(BinaryOp::Div, *value, c));
                }
            }
            Node::Op(Op::Map { out, .. }) if self.scale.is_some_and(|(_, s, _)| s == *out) => {}
            Node::Op(Op::Reduce { out, value, .. }) if out[..] == [self.new] => {
                if let Some((_, _, bare)) = self.scale {
                    *value = rewrite(k, *value, &mut |_, e| (e == self.score).then_some(bare));
                }
            }
            Node::Op(_) => {
                let mut one = [node.clone()];
                for_each_root(&mut one, &mut |e| self.expr(k, e, self.mask.is_none()));
                let [new] = one;
                *node = new;
            }
        }
    }

    /// Rewrites an expression; `inside` says that the point passes the maximum's mask.
    fn expr(&self, k: &mut Kernel, root: ExprId, inside: bool) -> ExprId {
        rewrite(k, root, &mut |k, e| match k.exprs[e] {
            Expr::Select(cond, a, b) => {
                if let Some(body) = self.unguarded(k, cond, a, b, inside) {
                    return Some(body);
                }
                if !inside && self.mask.is_some_and(|m| same(k, m, cond)) {
                    let (a, b) = (self.expr(k, a, true), self.expr(k, b, false));
                    return Some(k.exprs.push(Expr::Select(cond, a, b)));
                }
                None
            }
            Expr::Binary(BinaryOp::Eq | BinaryOp::Ne, x, y) if is_bottom(k, y) => match k.exprs[x] {
                Expr::Tile(t) if t == self.old || t == self.new => Some(e),
                Expr::Tile(t) => self.scale.filter(|(_, s, _)| *s == t).map(|(_, _, bare)| {
                    let op =
                        if matches!(k.exprs[e], Expr::Binary(BinaryOp::Eq, ..)) { BinaryOp::Eq } else { BinaryOp::Ne };
                    k.exprs.push(Expr::Binary(op, bare, y))
                }),
                _ => None,
            },
            Expr::Unary(UnaryOp::Exp, _) => {
                let (x, _) = exponent(k, e).filter(|(_, b)| is_tile(k, *b, self.new))?;
                Some(self.power(k, x, inside))
            }
            Expr::Tile(t) => {
                let (c, s, bare) = self.scale?;
                let value = match t {
                    t if t == self.old || t == self.new => e,
                    t if t == s => bare,
                    _ => return None,
                };
                Some(k.exprs.push(Expr::Binary(BinaryOp::Mul, c, value)))
            }
            _ => None,
        })
    }

    /// `exp(x - new)`.
    fn power(&self, k: &mut Kernel, x: ExprId, inside: bool) -> ExprId {
        if is_tile(k, x, self.old) {
            return k.exprs.push(Expr::Tile(self.repair));
        }
        let (x, by) = match (&k.exprs[x], self.scale) {
            (Expr::Tile(t), Some((_, s, bare))) if *t == s => (bare, self.base),
            _ => (self.expr(k, x, inside), k.exprs.push(Expr::Float(LOG2_E))),
        };
        let mut push = |e| k.exprs.push(e);
        let power = if self.read_beside {
            let top = push(Expr::Tile(self.top));
            let top = match self.scale {
                Some((c, ..)) if by != self.base => push(Expr::Binary(BinaryOp::Mul, c, top)),
                _ => top,
            };
            let below = push(Expr::Binary(BinaryOp::Sub, x, top));
            push(Expr::Binary(BinaryOp::Mul, below, by))
        } else {
            let scaled = push(Expr::Binary(BinaryOp::Mul, x, by));
            let row = push(Expr::Tile(self.exponent));
            push(Expr::Binary(BinaryOp::Sub, scaled, row))
        };
        push(Expr::Unary(UnaryOp::Exp2, power))
    }

    /// The rewritten `b` of `if x == -inf then 0.0 else b`, where `b` is `exp(x - new)` or a product with it, and `x`
    /// is the old maximum or a score that the new one has seen.
    fn unguarded(&self, k: &mut Kernel, cond: ExprId, a: ExprId, b: ExprId, inside: bool) -> Option<ExprId> {
        let Expr::Binary(BinaryOp::Eq, x, bottom) = k.exprs[cond] else { return None };
        let seen = is_tile(k, x, self.old) || (inside && same(k, x, self.score));
        if !is_bottom(k, bottom) || !matches!(k.exprs[a], Expr::Float(z) if z == 0.0) || !seen {
            return None;
        }
        let is_power = |k: &Kernel, e: ExprId| {
            exponent(k, e).is_some_and(|(y, anchor)| is_tile(k, anchor, self.new) && same(k, x, y))
        };
        // What is multiplied must stay finite where the power is 0: it reads neither of what may be −∞.
        let finite = |k: &Kernel, e: ExprId| {
            let mut reads = false;
            k.walk(e, &mut |id, _| {
                reads |= is_tile(k, id, self.old) || is_tile(k, id, self.new) || same(k, id, self.score);
            });
            !reads
        };
        let guarded = match k.exprs[b] {
            Expr::Binary(BinaryOp::Mul, l, r) => (is_power(k, l) && finite(k, r)) || (is_power(k, r) && finite(k, l)),
            _ => is_power(k, b),
        };
        guarded.then(|| self.expr(k, b, inside))
    }
}
