//! A joined write as one kernel: `Y[dst[n],d] += value`.
//!
//! A task owns the elements that its block of the *owned* indices reaches: those that stand alone in a position of the
//! left side, which no other value of them writes. It sets them to the identity (to the old value for an `inout`
//! tensor) and then walks every other index point after point, in order. So no element is touched by two tasks,
//! nothing is atomic, and the order of joining, and with it the rounding, is the same for every number of threads.
//! What is joined is computed before, by kernels of its own.

use std::collections::{HashMap, HashSet};

use einfall_ir::cascade::{Cascade, Einsum, Expr, IndexId, TensorId, TensorKind};
use einfall_ir::dtype::DType;
use einfall_ir::ops::ReduceOp;
use einfall_ir::tile::{self, Axis, AxisKind, BufferId, Kernel, Op};

use super::emit::Emitter;
use crate::passes::Unsupported;

/// The type that the values of a joined write are joined in: integers in 32 bits, or 64 where an operand is i64.
pub(super) fn accumulator(c: &Cascade, e: &Einsum) -> DType {
    let dtype = c.tensors[e.targets[0].tensor].dtype;
    let mut wide = false;
    c.walk(e.value, &mut |_, x| {
        wide |= match x {
            Expr::Read { tensor, .. } => c.tensors[*tensor].dtype == DType::I64,
            Expr::Cast(to, _) => *to == DType::I64,
            Expr::Int(n) => i32::try_from(*n).is_err(),
            Expr::Float(_)
            | Expr::Size(_)
            | Expr::Index(_)
            | Expr::Segment { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Tuple(_)
            | Expr::Reduce { .. }
            | Expr::Scan { .. }
            | Expr::Rand { .. } => false,
        }
    });
    match dtype {
        DType::F64 | DType::Bool => dtype,
        DType::F32 | DType::Tf32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => DType::F32,
        DType::I32 | DType::I8 | DType::U8 | DType::I4 | DType::U4 if !wide => DType::I32,
        DType::I64 | DType::I32 | DType::I8 | DType::U8 | DType::I4 | DType::U4 => DType::I64,
    }
}

/// Emits one joined write. `sums` is the array joined in, `result` the tensor's own; they may be one.
pub(super) fn emit_join(
    c: &Cascade,
    e: &Einsum,
    name: String,
    buffers: &HashMap<TensorId, BufferId>,
    (sums, result): (BufferId, BufferId),
) -> Result<Kernel, Unsupported> {
    let op = e.join.unwrap_or(ReduceOp::Sum);
    let unsupported = |what: &str| Err(Unsupported::new(e.span, what));
    let [target] = &e.targets[..] else { return unsupported("a joined write of several results") };
    if op.selects_argument() {
        return unsupported("a write joined by an argument selection");
    }
    let tensor = &c.tensors[target.tensor];
    if c.reads(e, target.tensor) {
        return unsupported("a joined write of a tensor that it reads");
    }
    let held = accumulator(c, e);
    let mut em = Emitter::new(c, name, buffers, |i| i);
    let mut owned: HashSet<IndexId> = HashSet::new();
    // The coordinate of every dimension of the target in the sweep over all its elements.
    let mut sweep = Vec::new();
    let mut axes = Vec::new();
    for (d, &a) in target.at.iter().enumerate() {
        let axis = match c.exprs[a] {
            Expr::Index(i) if c.indices[i].extent == tensor.dims[d] && owned.insert(i) => em.axis(i, AxisKind::Grid),
            _ => {
                let extent = tensor.dims[d].clone();
                em.new_axis(&format!("{}{d}", tensor.name), Axis::inner(extent))
            }
        };
        sweep.push(em.expr(tile::Expr::Coord(axis)));
        axes.push(axis);
    }
    let start = match tensor.kind {
        TensorKind::InOut if sums == result => None,
        TensorKind::InOut => Some(em.expr(tile::Expr::Read { buffer: result, at: sweep.clone() })),
        TensorKind::Input | TensorKind::Intermediate | TensorKind::State | TensorKind::Output => {
            Some(em.constant(op.identity(), held))
        }
    };
    if let Some(value) = start {
        let (at, axes) = (sweep.clone(), axes.clone());
        em.push(Op::Store { buffer: sums, at, axes, value, join: None, when: None });
    }
    let walked: Vec<_> = e.free.iter().filter(|i| !owned.contains(i)).map(|&i| em.axis(i, AxisKind::Stream)).collect();
    for &axis in &walked {
        em.open(axis);
    }
    let at = target.at.iter().map(|&a| em.convert(a)).collect::<Result<Vec<_>, _>>()?;
    let mut value = em.convert(e.value)?;
    let mut when = e.filter.map(|f| em.convert(f)).transpose()?;
    // Of a scalar, a value that is left out is the identity.
    if let Some(holds) = when.take_if(|_| at.is_empty()) {
        let identity = em.constant(op.identity(), held);
        value = em.expr(tile::Expr::Select(holds, value, identity));
    }
    let over: Vec<_> = e.free.iter().filter(|i| owned.contains(i)).copied().collect();
    let over = em.axes(&over);
    em.push(Op::Store { buffer: sums, at, axes: over, value, join: Some(op), when });
    for _ in &walked {
        em.close(false, true, None);
    }
    if sums != result {
        let value = em.expr(tile::Expr::Read { buffer: sums, at: sweep.clone() });
        em.push(Op::Store { buffer: result, at: sweep, axes, value, join: None, when: None });
    }
    Ok(em.finish())
}
