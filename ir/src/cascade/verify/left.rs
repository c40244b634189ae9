//! Left sides: injective and covering unless a join is named.
//!
//! An access position is understood if its linear part is a mixed-radix number (`g*R + r` with r < R): then it
//! determines its indices, and covers the product of their extents.

use std::collections::BTreeSet;

use super::{Block, Verifier};
use crate::cascade::affine::{Affine, product_extent, same_size};
use crate::cascade::{Einsum, IndexId, Target, TensorKind};
use crate::diag::Diagnostic;

impl Verifier<'_> {
    pub(super) fn left_sides(&mut self, e: &Einsum, block: Block<'_>) {
        if e.join.is_some() {
            return;
        }
        for t in &e.targets {
            if self.injective(e, t, block) {
                self.covering(e, t, block);
            }
        }
    }

    fn injective(&mut self, e: &Einsum, t: &Target, block: Block<'_>) -> bool {
        let c = self.c;
        let mut determined: BTreeSet<IndexId> = BTreeSet::new();
        for a in &t.at {
            let Some(mut f) = Affine::of(c, *a) else { continue };
            // A constant offset changes nothing, nor does the stride of one index alone.
            f.constant = Default::default();
            if f.terms.len() == 1 || f.mixed_radix(c).is_some() {
                determined.extend(f.terms.keys());
            }
        }
        let name = self.tensor_name(t.tensor).to_string();
        if let Some((i, false)) = block
            && !determined.contains(&i.index)
        {
            let index = &c.indices[i.index].name;
            let d = Diagnostic::error("E0310", e.span, format!("every step of `{index}` assigns `{name}` again"));
            self.error(d.help(format!(
                "write `{name}[{index}, ..]`, or name the reduction that joins the steps: `{name}[..] += ..`"
            )));
            return false;
        }
        if let Some(i) = e.free.iter().find(|i| !determined.contains(*i)) {
            let index = &c.indices[*i].name;
            let d =
                Diagnostic::error("E0310", e.span, format!("different `{index}` write the same element of `{name}`"))
                    .label("this left-hand side is not injective");
            self.error(d.help(format!(
                "give `{index}` a dimension of its own, or name the reduction that joins collisions: `{name}[..] += ..`"
            )));
            return false;
        }
        true
    }

    fn covering(&mut self, e: &Einsum, t: &Target, block: Block<'_>) {
        let c = self.c;
        let x = &c.tensors[t.tensor];
        if x.kind == TensorKind::InOut {
            return;
        }
        let mut used: BTreeSet<IndexId> = BTreeSet::new();
        for (k, (a, dim)) in t.at.iter().zip(&x.dims).enumerate() {
            if k == 0 && x.kind == TensorKind::State && block.is_some() {
                used.extend(Affine::of(c, *a).iter().flat_map(|f| f.terms.keys().copied()));
                continue;
            }
            let order = Affine::of(c, *a).and_then(|f| f.mixed_radix(c));
            let twice = order.iter().flatten().any(|i| !used.insert(*i));
            let whole = order.as_ref().is_some_and(|order| same_size(&product_extent(c, order), dim));
            if twice || !whole {
                let extent = crate::cascade::print::size_text(c, dim);
                let d = Diagnostic::error(
                    "E0311",
                    self.span(*a),
                    format!("this does not reach every element of `{}`", x.name),
                )
                .label(format!("the dimension has extent {extent}"));
                let help = match order.as_deref() {
                    Some([i]) if !twice => format!("let `{}` run over {extent}", c.indices[*i].name),
                    _ => format!(
                        "write an index of extent {extent}, or name a reduction that joins into zeros: `{}[..] += ..`",
                        x.name
                    ),
                };
                self.error(d.help(help));
                return;
            }
        }
        debug_assert!(e.free.iter().all(|i| used.contains(i)));
    }
}
