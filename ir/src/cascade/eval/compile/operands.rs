//! Default rounding points: which operands of a contraction may be rounded, and to what (docs/language.md, §7).
//!
//! Invariant: an operand already held in a type at least as narrow is not rounded.

use super::Compiler;
use crate::cascade::{Cascade, Expr, ExprId, IndexId, TensorKind};
use crate::dtype::DType;
use crate::ops::{BinaryOp, UnaryOp};

impl Compiler<'_> {
    /// Places the default rounding points of a contraction: in a sum of products, the factors that
    /// depend on the reduced indices, and their partial products, may be rounded to the narrowest float type of 16
    /// bits or more among the stored tensors they read.
    pub(super) fn round_operands(&mut self, e: ExprId, over: &[IndexId]) {
        let c = self.cx.c;
        match &c.exprs[e] {
            Expr::Binary(BinaryOp::Add | BinaryOp::Sub, a, b) => {
                self.round_operands(*a, over);
                self.round_operands(*b, over);
            }
            Expr::Unary(UnaryOp::Neg, a) => self.round_operands(*a, over),
            Expr::Binary(BinaryOp::Mul, a, b) => {
                let (mut factors, mut products) = (Vec::new(), Vec::new());
                factors_of(c, *a, &mut factors, &mut products);
                factors_of(c, *b, &mut factors, &mut products);
                let depends = |f: &ExprId| c.free_indices(*f).iter().any(|i| over.contains(i));
                factors.retain(depends);
                if factors.len() < 2 {
                    return;
                }
                let Some(to) = narrowest(c, &factors) else { return };
                let exact = |f: &ExprId| {
                    matches!(&c.exprs[*f], Expr::Read { tensor, .. }
                        if c.tensors[*tensor].dtype.unit_roundoff() >= to.unit_roundoff() || !c.tensors[*tensor].dtype.is_float())
                };
                for f in factors.iter().filter(|f| !exact(f)) {
                    self.rounding.insert(*f, to);
                }
                for (product, parts) in products {
                    if parts.iter().filter(|f| depends(f)).count() >= 2 {
                        self.rounding.insert(product, to);
                    }
                }
            }
            Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Index(_)
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Tuple(_)
            | Expr::Reduce { .. }
            | Expr::Scan { .. }
            | Expr::Segment { .. }
            | Expr::Rand { .. } => {}
        }
    }
}

/// The most factors told apart; a product of more keeps the rest whole.
const MAX_FACTORS: usize = 64;

/// The factors of a product, and its partial products with their factors.
fn factors_of(c: &Cascade, e: ExprId, factors: &mut Vec<ExprId>, products: &mut Vec<(ExprId, Vec<ExprId>)>) {
    if let Expr::Binary(BinaryOp::Mul, a, b) = &c.exprs[e]
        && factors.len() < MAX_FACTORS
    {
        let from = factors.len();
        factors_of(c, *a, factors, products);
        factors_of(c, *b, factors, products);
        products.push((e, factors[from..].to_vec()));
    } else {
        factors.push(e);
    }
}

/// The narrowest float type of 16 bits or more among the stored tensors read under `roots`, if narrower than f32.
pub(super) fn narrowest(c: &Cascade, roots: &[ExprId]) -> Option<DType> {
    let mut found: Option<DType> = None;
    for root in roots {
        c.walk(*root, &mut |_, e| {
            if let Expr::Read { tensor, .. } = e {
                let t = &c.tensors[*tensor];
                let stored = t.declared || matches!(t.kind, TensorKind::Input | TensorKind::InOut);
                let wide = t.dtype.is_float() && t.dtype.bits() >= 16;
                if stored && wide && found.is_none_or(|f| t.dtype.unit_roundoff() > f.unit_roundoff()) {
                    found = Some(t.dtype);
                }
            }
        });
    }
    found.filter(|d| d.unit_roundoff() > DType::F32.unit_roundoff())
}
