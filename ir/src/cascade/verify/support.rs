//! Support: which points of a statement exist.
//!
//! A conjunct of the filter over free indices alone, or an operand read outside every reduction at a point it does not
//! have, removes output points; a reduction runs over the points that exist and has a value everywhere. A tensor others
//! see (an output or a state) has a value at every point, if need be by `else`.

use std::collections::{BTreeSet, HashSet};

use super::Verifier;
use crate::cascade::{Cascade, Einsum, Expr, ExprId, IndexId, IndexKind, TensorId, TensorKind};
use crate::diag::{Diagnostic, Severity, Span};
use crate::ops::BinaryOp;

/// Tensors that lack points.
#[derive(Default)]
pub(super) struct Support {
    partial: HashSet<TensorId>,
}

/// The conjuncts of a filter.
pub fn conjuncts(c: &Cascade, filter: ExprId) -> Vec<ExprId> {
    let mut out = Vec::new();
    let mut work = vec![filter];
    while let Some(e) = work.pop() {
        match &c.exprs[e] {
            Expr::Binary(BinaryOp::And, a, b) => work.extend([*b, *a]),
            _ => out.push(e),
        }
    }
    out
}

impl Verifier<'_> {
    /// Reduced indices an expression mentions and does not bind itself.
    fn reduced_in(&self, e: ExprId) -> BTreeSet<IndexId> {
        let mut out = BTreeSet::new();
        let mut own = BTreeSet::new();
        self.c.walk(e, &mut |_, x| match x {
            Expr::Index(i) | Expr::Segment { of: i, .. } if self.c.indices[*i].kind == IndexKind::Reduced => {
                out.insert(*i);
            }
            Expr::Reduce { over, .. } => own.extend(over.iter().copied()),
            Expr::Index(_)
            | Expr::Segment { .. }
            | Expr::Int(_)
            | Expr::Float(_)
            | Expr::Size(_)
            | Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Binary(..)
            | Expr::Select(..)
            | Expr::Cast(..)
            | Expr::Tuple(_)
            | Expr::Scan { .. }
            | Expr::Rand { .. } => {}
        });
        &out - &own
    }

    /// Where `e` needs a point that may not exist, outside every reduction, and why it may not.
    fn partial_read(&self, e: ExprId, support: &Support) -> Option<(Span, String)> {
        match &self.c.exprs[e] {
            Expr::Reduce { .. } | Expr::Scan { .. } => None,
            Expr::Read { tensor, .. } if support.partial.contains(tensor) => {
                Some((self.span(e), format!("`{}` lacks points", self.tensor_name(*tensor))))
            }
            Expr::Segment { of, .. } => {
                Some((self.span(e), format!("`{}` may lie in no segment", self.c.indices[*of].name)))
            }
            x => {
                let mut operands = Vec::new();
                x.for_each_operand(|o| operands.push(o));
                operands.into_iter().find_map(|o| self.partial_read(o, support))
            }
        }
    }

    pub(super) fn support(&mut self, e: &Einsum, support: &mut Support) {
        let c = self.c;
        let mut removed: Option<(Span, String)> = None;
        for k in e.filter.iter().flat_map(|f| conjuncts(c, *f)) {
            let reduced = self.reduced_in(k);
            if reduced.is_empty() {
                removed = removed.or_else(|| Some((self.span(k), "this removes points".to_string())));
                continue;
            }
            // The scopes of the statement's reductions.
            let mut scopes = Vec::new();
            self.reduction_scopes(e.value, &mut BTreeSet::new(), &mut scopes);
            if !scopes.iter().any(|s| reduced.is_subset(s)) {
                let names: Vec<_> = reduced.iter().map(|i| format!("`{}`", c.indices[*i].name)).collect();
                let d = Diagnostic::error(
                    "E0321",
                    self.span(k),
                    format!("no reduction binds {} together", names.join(" and ")),
                );
                self.error(d.help("nest the two reductions, or split the condition with `and`"));
            }
        }
        let read = [Some(e.value), e.filter].into_iter().flatten().find_map(|r| self.partial_read(r, support));
        removed = removed.or(read);
        match (&removed, e.otherwise, e.join) {
            (None, Some(o), None) => {
                let mut d = Diagnostic::error("W0003", self.span(o), "this `else` is never used");
                d.severity = Severity::Warning;
                self.error(d.help("remove it: the statement has a value at every point"));
            }
            (Some((span, why)), None, None) => {
                for t in &e.targets {
                    let x = &c.tensors[t.tensor];
                    match x.kind {
                        TensorKind::Output | TensorKind::State => {
                            let d =
                                Diagnostic::error("E0320", *span, format!("`{}` has no value at some points", x.name))
                                    .label(why.clone())
                                    .also(e.span, "in this statement");
                            self.error(d.help("say what it is there: end the statement with `else 0`"));
                        }
                        TensorKind::Intermediate => {
                            support.partial.insert(t.tensor);
                        }
                        TensorKind::Input | TensorKind::InOut => {}
                    }
                }
            }
            (None, None, _) | (Some(_), Some(_), _) | (None, Some(_), Some(_)) | (Some(_), None, Some(_)) => {}
        }
    }

    fn reduction_scopes(&self, e: ExprId, around: &mut BTreeSet<IndexId>, out: &mut Vec<BTreeSet<IndexId>>) {
        let x = &self.c.exprs[e];
        if let Expr::Reduce { over, body, .. } = x {
            let mut inside = around.clone();
            inside.extend(over);
            out.push(inside.clone());
            self.reduction_scopes(*body, &mut inside, out);
            return;
        }
        let mut operands = Vec::new();
        x.for_each_operand(|o| operands.push(o));
        for o in operands {
            self.reduction_scopes(o, around, out);
        }
    }
}
