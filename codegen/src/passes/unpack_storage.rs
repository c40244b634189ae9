//! unpack-storage: tensors of packed 4-bit integers become their bytes, reads half bytes, writes whole bytes.
//!
//! Before: `w: i4[N,K] packed(low);  y[n] = sum(k) w[n,k];                q[n,k] = v[n,k]`
//! After:  `w: u8[N,ceildiv(K, 2)];  y[n] = sum(k) <half k % 2 of w[n,k / 2]>`
//!         `t: i8[N,K];  t[n,k] = <v[n,k], clamped>;  q[n,j] = t[n,2 * j] % 16 + t[n,2 * j + 1] % 16 * 16`
//!
//! A byte is written by one point, so that no two threads share one. Rows begin at a byte: of an odd extent the last half
//! byte is 0 where it is written and never read. A signed half is put into the upper four of eight bits and divided by 16, which
//! keeps its sign; the quotient stands outermost, so that later passes see one value and not a sum. Tensors of a
//! caller are his bytes ([`einfall_ir::cascade::Tensor::stored`]); what is kept within is i8. Invariant: nothing is of a
//! 4-bit type afterwards.

use std::collections::HashMap;

use einfall_ir::arena::Id;
use einfall_ir::cascade::affine::same_size;
use einfall_ir::cascade::print::size_text;
use einfall_ir::cascade::{
    Cascade, Einsum, Expr, ExprId, IndexKind, Iter, PackOrder, Size, Stmt, Storage, TensorId, TensorKind,
};
use einfall_ir::diag::Span;
use einfall_ir::dtype::DType;
use einfall_ir::ops::BinaryOp;

use super::Unsupported;
use super::rewrite::{assign, fresh_index, intermediate, mentions, rewrite, substitute};

/// A packed tensor of the caller, before it becomes bytes.
#[derive(Clone)]
struct Packed {
    dtype: DType,
    order: PackOrder,
    last: Size,
}

/// Unpacks what is read and packs what is written.
///
/// # Errors
/// Block-scaled storage; packed tensors that are written where their bytes are not whole.
pub fn unpack_storage(mut c: Cascade) -> Result<Cascade, Unsupported> {
    if let Some((_, t)) = c.tensors.iter().find(|(_, t)| t.storage.block_scale.is_some()) {
        let help = "give the scales as an input of their own and multiply: `w[n,k] * scale[n,k/32]`";
        return Err(Unsupported::new(t.span, format!("block-scaled storage of `{}`", t.name)).help(help));
    }
    let narrow: Vec<TensorId> = c.tensors.ids().filter(|t| c.tensors[*t].dtype.is_packed()).collect();
    let mut given: HashMap<TensorId, Packed> = HashMap::new();
    // What stands for an output while it is made and read.
    let mut made: HashMap<TensorId, (TensorId, Packed)> = HashMap::new();
    let mut clamped: HashMap<TensorId, DType> = HashMap::new();
    for id in narrow {
        let t = c.tensors[id].clone();
        let packed = t.storage.packing.zip(t.dims.last().cloned());
        let packed = packed.map(|(order, last)| Packed { dtype: t.dtype, order, last });
        match (t.kind, packed) {
            (TensorKind::Input | TensorKind::InOut, Some(packed)) => {
                given.insert(id, packed);
            }
            (TensorKind::Output, Some(packed)) => {
                let elements = intermediate(&mut c, &t.name, DType::I8, t.dims.clone(), t.span);
                c.tensors[elements].declared = true;
                clamped.insert(elements, t.dtype);
                made.insert(id, (elements, packed));
            }
            (TensorKind::Intermediate | TensorKind::State, _) | (_, None) => {
                c.tensors[id].dtype = DType::I8;
                c.tensors[id].storage = Storage::default();
                clamped.insert(id, t.dtype);
                continue;
            }
        }
        let (dtype, dims) = t.stored();
        let stored = &mut c.tensors[id];
        (stored.dtype, stored.dims, stored.storage) = (dtype, dims, Storage::default());
        c.outputs.iter_mut().filter(|o| o.name == t.name).for_each(|o| {
            (o.dtype, o.dims) = (stored.dtype, stored.dims.clone());
        });
    }
    let mut pass = Pass { given, made, clamped };
    let mut out = Vec::new();
    for stmt in std::mem::take(&mut c.stmts) {
        match stmt {
            Stmt::Einsum(e) => pass.einsum(&mut c, e, &mut out)?,
            Stmt::Iter(i) => pass.iter(&mut c, i, &mut out)?,
        }
    }
    c.stmts = out;
    Ok(c)
}

struct Pass {
    given: HashMap<TensorId, Packed>,
    made: HashMap<TensorId, (TensorId, Packed)>,
    /// Tensors of bytes whose values keep to a narrower type.
    clamped: HashMap<TensorId, DType>,
}

impl Pass {
    fn einsum(&mut self, c: &mut Cascade, mut e: Einsum, out: &mut Vec<Stmt>) -> Result<(), Unsupported> {
        self.reads(c, &mut e);
        let written = self.redirect(c, &mut e)?;
        let in_place = e.targets.iter().find_map(|t| Some((t.tensor, self.given.get(&t.tensor)?.clone())));
        match in_place {
            Some((tensor, packed)) => update(c, tensor, &packed, e, out)?,
            None => out.push(Stmt::Einsum(e)),
        }
        self.bytes(c, &written, out);
        Ok(())
    }

    fn iter(&mut self, c: &mut Cascade, mut i: Iter, out: &mut Vec<Stmt>) -> Result<(), Unsupported> {
        let mut written = Vec::new();
        for e in i.inits.iter_mut().chain(&mut i.body) {
            self.reads(c, e);
            written.extend(self.redirect(c, e)?);
            if let Some(t) = e.targets.iter().find(|t| self.given.contains_key(&t.tensor)) {
                let what = format!("writing packed elements of `{}` in an iteration", c.tensors[t.tensor].name);
                return Err(Unsupported::new(e.span, what).help(DECLARE_I8));
            }
        }
        out.push(Stmt::Iter(i));
        self.bytes(c, &written, out);
        Ok(())
    }

    /// Unpacks in every expression of a statement.
    fn reads(&self, c: &mut Cascade, e: &mut Einsum) {
        e.value = self.unpacked(c, e.value);
        e.filter = e.filter.map(|f| self.unpacked(c, f));
        e.otherwise = e.otherwise.map(|o| self.unpacked(c, o));
        for t in &mut e.targets {
            t.at = t.at.iter().map(|a| self.unpacked(c, *a)).collect();
        }
    }

    fn unpacked(&self, c: &mut Cascade, root: ExprId) -> ExprId {
        rewrite(c, root, &mut |c, id, x| {
            let b = Builder { span: c.spans[id.index()] };
            if let Expr::Cast(to, a) = x
                && to.is_packed()
            {
                let a = self.unpacked(c, *a);
                return Some(b.clamped(c, *to, a));
            }
            let Expr::Read { tensor, at } = x else { return None };
            let elements = |c: &mut Cascade| at.iter().map(|a| self.unpacked(c, *a)).collect::<Vec<ExprId>>();
            if let Some((tensor, _)) = self.made.get(tensor) {
                let at = elements(c);
                return Some(c.push_expr(Expr::Read { tensor: *tensor, at }, b.span));
            }
            let packed = self.given.get(tensor)?;
            let at = elements(c);
            Some(b.element(c, *tensor, packed, at))
        })
    }

    /// Writes elements where the text writes a packed output, and clamps what is kept in a wider type than it has. The
    /// outputs that were written.
    fn redirect(&self, c: &mut Cascade, e: &mut Einsum) -> Result<Vec<TensorId>, Unsupported> {
        let narrow = |t: TensorId| {
            let packed = self.given.get(&t).or(self.made.get(&t).map(|(_, packed)| packed));
            self.clamped.get(&t).copied().or(packed.map(|packed| packed.dtype))
        };
        let Some((name, dtype)) = e.targets.iter().find_map(|t| Some((t.tensor, narrow(t.tensor)?))) else {
            return Ok(Vec::new());
        };
        if e.targets.len() > 1 || e.join.is_some() {
            let how = if e.join.is_some() { "joined writes" } else { "one of several results" };
            let what = format!("{how} to {dtype} elements of `{}`", c.tensors[name].name);
            return Err(Unsupported::new(e.span, what).help(DECLARE_I8));
        }
        let mut written = Vec::new();
        for t in &mut e.targets {
            if let Some((elements, _)) = self.made.get(&t.tensor) {
                written.push(t.tensor);
                t.tensor = *elements;
            }
        }
        let b = Builder { span: e.span };
        e.value = b.clamped(c, dtype, e.value);
        e.otherwise = e.otherwise.map(|o| b.clamped(c, dtype, o));
        Ok(written)
    }

    /// The bytes of outputs whose elements are there.
    fn bytes(&self, c: &mut Cascade, written: &[TensorId], out: &mut Vec<Stmt>) {
        for id in written {
            let Some((elements, packed)) = self.made.get(id) else { continue };
            let span = c.tensors[*id].span;
            let dims = c.tensors[*id].dims.clone();
            let (mut free, mut at) = (Vec::new(), Vec::new());
            for size in dims {
                let (index, value) = fresh_index(c, "j", size, IndexKind::Free, span);
                free.push(index);
                at.push(value);
            }
            let (outer, byte) = (at[..at.len() - 1].to_vec(), at[at.len() - 1]);
            let value = Builder { span }.byte(c, packed, byte, &mut |c, position| {
                let at = [&outer[..], &[position]].concat();
                c.push_expr(Expr::Read { tensor: *elements, at }, span)
            });
            out.push(Stmt::Einsum(assign(*id, at, free, value, span)));
        }
    }
}

/// What to write instead where bytes are not written whole.
const DECLARE_I8: &str = "write an i8 tensor there, and assign the packed one from it in a statement of its own";

/// Updates whole rows of a packed tensor in place: the elements first, then their bytes.
fn update(
    c: &mut Cascade,
    tensor: TensorId,
    packed: &Packed,
    e: Einsum,
    out: &mut Vec<Stmt>,
) -> Result<(), Unsupported> {
    let (span, name) = (e.span, c.tensors[tensor].name.clone());
    let at = e.targets[0].at.clone();
    let (outer, last) = (&at[..at.len() - 1], at[at.len() - 1]);
    let row = match c.exprs[last] {
        Expr::Index(i) if e.free.contains(&i) && same_size(&c.indices[i].extent, &packed.last) => Some(i),
        _ => None,
    };
    let parts = |i| outer.iter().chain(&e.filter).any(|x| mentions(c, *x, i));
    let Some(row) = row.filter(|i| !parts(*i)) else {
        let axis = size_text(c, &packed.last);
        let what = format!("writing `{name}`, packed along its last axis {axis}, at part of that axis");
        let help = format!("let an index over all of {axis} stand alone there, or declare `{name}` i8");
        return Err(Unsupported::new(span, what).help(help));
    };
    let dims: Vec<Size> = e.free.iter().map(|i| c.indices[*i].extent.clone()).collect();
    let elements = intermediate(c, &name, DType::I8, dims, span);
    c.tensors[elements].declared = true;
    let points: Vec<ExprId> = e.free.iter().map(|i| c.push_expr(Expr::Index(*i), span)).collect();
    out.push(Stmt::Einsum(assign(elements, points.clone(), e.free.clone(), e.value, span)));

    let bytes = c.tensors[tensor].stored().1.pop().unwrap_or(Size::Const(0));
    let mut renamed = HashMap::new();
    let mut free = Vec::new();
    for i in &e.free {
        let extent = if *i == row { bytes.clone() } else { c.indices[*i].extent.clone() };
        let base = c.indices[*i].name.clone();
        let (index, value) = fresh_index(c, &base, extent, IndexKind::Free, span);
        free.push(index);
        renamed.insert(*i, value);
    }
    let byte = renamed[&row];
    let value = Builder { span }.byte(c, packed, byte, &mut |c, position| {
        let at = e.free.iter().map(|i| if *i == row { position } else { renamed[i] }).collect();
        c.push_expr(Expr::Read { tensor: elements, at }, span)
    });
    let target = at.iter().map(|a| substitute(c, *a, &renamed)).collect();
    let filter = e.filter.map(|f| substitute(c, f, &renamed));
    out.push(Stmt::Einsum(Einsum { filter, ..assign(tensor, target, free, value, span) }));
    Ok(())
}

/// Makes expressions at one place of the source.
struct Builder {
    span: Span,
}

impl Builder {
    fn int(&self, c: &mut Cascade, v: i64) -> ExprId {
        c.push_expr(Expr::Int(v), self.span)
    }

    fn size(&self, c: &mut Cascade, s: &Size) -> ExprId {
        match s {
            Size::Const(n) => self.int(c, *n as i64),
            other => c.push_expr(Expr::Size(other.clone()), self.span),
        }
    }

    fn binary(&self, c: &mut Cascade, op: BinaryOp, a: ExprId, b: ExprId) -> ExprId {
        c.push_expr(Expr::Binary(op, a, b), self.span)
    }

    /// `a op k`.
    fn with(&self, c: &mut Cascade, op: BinaryOp, a: ExprId, k: i64) -> ExprId {
        let k = self.int(c, k);
        self.binary(c, op, a, k)
    }

    /// The element of a packed tensor at a position.
    fn element(&self, c: &mut Cascade, tensor: TensorId, packed: &Packed, mut at: Vec<ExprId>) -> ExprId {
        let Some(position) = at.pop() else { return self.int(c, 0) };
        at.push(match c.exprs[position] {
            Expr::Int(i) => self.int(c, i.div_euclid(2)),
            _ => self.with(c, BinaryOp::Div, position, 2),
        });
        let byte = c.push_expr(Expr::Read { tensor, at }, self.span);
        let low_first = packed.order == PackOrder::LowFirst;
        let high = self.with(c, BinaryOp::Div, byte, 16);
        let half = match c.exprs[position] {
            Expr::Int(i) => {
                if (i.rem_euclid(2) == 0) == low_first {
                    byte
                } else {
                    high
                }
            }
            _ => {
                let odd = self.with(c, BinaryOp::Mod, position, 2);
                let even = self.with(c, BinaryOp::Eq, odd, 0);
                let (first, second) = if low_first { (byte, high) } else { (high, byte) };
                c.push_expr(Expr::Select(even, first, second), self.span)
            }
        };
        let value = if packed.dtype == DType::I4 {
            // Eight bits of two's complement with the half on top: -128 to 127.
            let top = self.with(c, BinaryOp::Mul, half, 16);
            let top = self.with(c, BinaryOp::Add, top, 128);
            let top = self.with(c, BinaryOp::Mod, top, 256);
            let top = self.with(c, BinaryOp::Sub, top, 128);
            self.with(c, BinaryOp::Div, top, 16)
        } else {
            self.with(c, BinaryOp::Mod, half, 16)
        };
        // Indices are inside, and literals inside extents that the text fixes.
        let checked = match c.exprs[position] {
            Expr::Index(_) => true,
            Expr::Int(_) => matches!(packed.last, Size::Const(_)),
            _ => false,
        };
        if checked {
            return value;
        }
        // Any other position may lie in the unused half of an odd extent, which is outside.
        let (extent, zero) = (self.size(c, &packed.last), self.int(c, 0));
        let inside = self.binary(c, BinaryOp::Lt, position, extent);
        c.push_expr(Expr::Select(inside, value, zero), self.span)
    }

    /// The byte of two neighbours along a packed axis.
    fn byte(
        &self,
        c: &mut Cascade,
        packed: &Packed,
        byte: ExprId,
        element: &mut dyn FnMut(&mut Cascade, ExprId) -> ExprId,
    ) -> ExprId {
        let first = self.with(c, BinaryOp::Mul, byte, 2);
        let second = self.with(c, BinaryOp::Add, first, 1);
        let (extent, zero) = (self.size(c, &packed.last), self.int(c, 0));
        let inside = self.binary(c, BinaryOp::Lt, second, extent);
        let (first, second) = (element(c, first), element(c, second));
        let second = c.push_expr(Expr::Select(inside, second, zero), self.span);
        let (low, high) = match packed.order {
            PackOrder::LowFirst => (first, second),
            PackOrder::HighFirst => (second, first),
        };
        let (low, high) = (self.with(c, BinaryOp::Mod, low, 16), self.with(c, BinaryOp::Mod, high, 16));
        let high = self.with(c, BinaryOp::Mul, high, 16);
        self.binary(c, BinaryOp::Add, low, high)
    }

    /// A value rounded to a 4-bit type, as i8.
    fn clamped(&self, c: &mut Cascade, to: DType, value: ExprId) -> ExprId {
        let value = c.push_expr(Expr::Cast(DType::I8, value), self.span);
        let value = self.with(c, BinaryOp::Max, value, to.min_finite() as i64);
        self.with(c, BinaryOp::Min, value, to.max_finite() as i64)
    }
}
