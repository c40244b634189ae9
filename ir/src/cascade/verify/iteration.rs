//! Iteration and order: every tensor has its value before it is read, and steps read the present step only.
//!
//! A state comes in at `t` and is produced at `t + 1`; in a reversed `iter` it comes in at `t + 1` and is produced at
//! `t`. The statements of a step are in evaluation order.

use std::collections::HashSet;

use super::Verifier;
use crate::cascade::affine::{Affine, Poly};
use crate::cascade::{Einsum, Expr, ExprId, Iter, Stmt, TensorId, TensorKind};
use crate::diag::{Diagnostic, Span};

/// A point of a state, relative to the step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Point {
    /// `t`.
    This,
    /// `t + 1`.
    Next,
    /// Anything else.
    Other,
}

impl Verifier<'_> {
    fn point(&self, i: &Iter, at: ExprId) -> Point {
        let Some(f) = Affine::of(self.c, at) else { return Point::Other };
        let one = Poly::constant(1);
        match (f.terms.len(), f.terms.get(&i.index), f.constant.as_constant()) {
            (1, Some(k), Some(0)) if *k == one => Point::This,
            (1, Some(k), Some(1)) if *k == one => Point::Next,
            _ => Point::Other,
        }
    }

    pub(super) fn iteration(&mut self) {
        let c = self.c;
        let mut known: HashSet<TensorId> = c.params.iter().copied().collect();
        for s in &c.stmts {
            match s {
                Stmt::Einsum(e) => {
                    self.reads_known(e, &known);
                    for t in &e.targets {
                        self.once(e.span, t.tensor, &mut known);
                    }
                }
                Stmt::Iter(i) => self.iter(i, &mut known),
            }
        }
    }

    fn once(&mut self, span: Span, t: TensorId, known: &mut HashSet<TensorId>) {
        if !known.insert(t) && self.c.tensors[t].kind != TensorKind::InOut {
            let d = Diagnostic::error("E0261", span, format!("`{}` is assigned twice", self.tensor_name(t)));
            self.error(d.help("give the second value another name: a tensor has one definition"));
        }
    }

    fn reads_known(&mut self, e: &Einsum, known: &HashSet<TensorId>) {
        for root in e.roots() {
            for id in self.nodes(root) {
                if let Expr::Read { tensor, .. } | Expr::Segment { offsets: tensor, .. } = &self.c.exprs[id]
                    && !known.contains(tensor)
                {
                    self.too_early(id, *tensor);
                }
            }
        }
    }

    fn too_early(&mut self, at: ExprId, t: TensorId) {
        let d = Diagnostic::error(
            "E0229",
            self.span(at),
            format!("`{}` is used before it is assigned", self.tensor_name(t)),
        );
        self.error(d.help("move the statement that assigns it above this one"));
    }

    fn iter(&mut self, i: &Iter, known: &mut HashSet<TensorId>) {
        let c = self.c;
        let first = if i.rev { Poly::of(&i.extent) } else { Some(Poly::constant(0)) };
        let at_first =
            |at: ExprId| Affine::of(c, at).is_some_and(|f| f.terms.is_empty() && Some(&f.constant) == first.as_ref());
        let index = c.indices[i.index].name.clone();
        let (incoming, produced) = if i.rev { (Point::Next, Point::This) } else { (Point::This, Point::Next) };
        let produced_text = if i.rev { index.clone() } else { format!("{index}+1") };
        for e in &i.inits {
            for root in e.roots() {
                for id in self.nodes(root) {
                    let Expr::Read { tensor, at } = &c.exprs[id] else { continue };
                    if i.states.contains(tensor) {
                        if !known.contains(tensor) {
                            self.too_early(id, *tensor);
                        } else if !at.first().is_some_and(|a| at_first(*a)) {
                            self.other_step(id, *tensor, "an initialiser reads first points only");
                        }
                    } else if !known.contains(tensor) {
                        self.too_early(id, *tensor);
                    }
                }
            }
            for t in &e.targets {
                self.once(e.span, t.tensor, known);
                if !t.at.first().is_some_and(|a| at_first(*a)) {
                    self.other_step(
                        t.at.first().copied().unwrap_or(e.value),
                        t.tensor,
                        "an initialiser sets the first point",
                    );
                }
            }
        }
        let mut stepped: HashSet<TensorId> = HashSet::new();
        for e in &i.body {
            for root in e.roots() {
                for id in self.nodes(root) {
                    let Expr::Read { tensor, at } = &c.exprs[id] else { continue };
                    // An inout tensor may be read anywhere, before and after it is written.
                    if c.tensors[*tensor].kind == TensorKind::InOut {
                        continue;
                    }
                    if i.states.contains(tensor) {
                        match at.first().map_or(Point::Other, |a| self.point(i, *a)) {
                            p if p == incoming => {}
                            p if p == produced => {
                                if !stepped.contains(tensor) {
                                    self.too_early(id, *tensor);
                                }
                            }
                            Point::This | Point::Next | Point::Other => {
                                self.other_step(
                                    id,
                                    *tensor,
                                    &format!("a step reads a state at `{index}` or `{index}+1`"),
                                );
                            }
                        }
                    } else if stepped.contains(tensor) {
                        self.this_step(i, id, *tensor, at);
                    } else if !known.contains(tensor) {
                        self.too_early(id, *tensor);
                    }
                }
            }
            for t in &e.targets {
                if i.states.contains(&t.tensor) {
                    if t.at.first().map_or(Point::Other, |a| self.point(i, *a)) != produced {
                        self.other_step(
                            t.at.first().copied().unwrap_or(e.value),
                            t.tensor,
                            &format!("a step produces point `{produced_text}`"),
                        );
                    }
                    if !stepped.insert(t.tensor) {
                        let d = Diagnostic::error(
                            "E0261",
                            e.span,
                            format!("`{}` is assigned twice", self.tensor_name(t.tensor)),
                        );
                        self.error(d.help("give the second value another name: a step produces each state once"));
                    }
                } else {
                    self.once(e.span, t.tensor, known);
                    known.remove(&t.tensor);
                    stepped.insert(t.tensor);
                }
            }
        }
        for s in &i.states {
            if !stepped.contains(s) {
                let name = self.tensor_name(*s).to_string();
                let d = Diagnostic::error("E0330", c.tensors[*s].span, format!("state `{name}` is never stepped"));
                self.error(d.help(format!(
                    "write `{name}[{produced_text}, ..] = ..` in the block, or make it a plain tensor before it"
                )));
            }
        }
        known.extend(stepped);
    }

    fn other_step(&mut self, at: ExprId, t: TensorId, what: &str) {
        let d = Diagnostic::error(
            "E0331",
            self.span(at),
            format!("this point of `{}` is not in reach", self.tensor_name(t)),
        );
        self.error(d.help(format!("{what}; carry older values in a state of their own")));
    }

    /// A tensor of the step is read at this step.
    fn this_step(&mut self, i: &Iter, id: ExprId, t: TensorId, at: &[ExprId]) {
        let c = self.c;
        let writer = i.body.iter().flat_map(|e| &e.targets).find(|x| x.tensor == t);
        let Some(k) = writer.and_then(|w| w.at.iter().position(|a| self.point(i, *a) == Point::This)) else { return };
        if self.point(i, at[k]) != Point::This {
            let index = &c.indices[i.index].name;
            let what = format!("a step reads `{}` at `{index}` only", self.tensor_name(t));
            self.other_step(id, t, &what);
        }
    }
}
