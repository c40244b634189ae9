//! Fragments as function variables.
//!
//! The thread part of a coordinate (see [`crate::backend::gpu::held`]) is computed once, before the body. Invariant: an
//! element's variable holds its value rounded to the fragment's type.

use einfall_ir::dtype::DType;
use einfall_ir::kernel::FragId;

use super::Res;
use super::emit::Emit;
use super::value::{Ty, Val};
use crate::backend::gpu::held::{Held, ThreadDigit};

impl Held {
    /// The variable of element `v`.
    pub(super) fn variable(&self, v: usize) -> String {
        format!("r_{}_{v}", super::emit::plain(&self.name))
    }
}

/// The class of a type's values.
pub(super) fn class(dtype: DType) -> Ty {
    if dtype.is_float() { Ty::Float } else { Ty::Int }
}

impl Emit<'_> {
    pub(super) fn held(&self, f: FragId) -> &Held {
        self.frags.get(f)
    }

    /// The value of element `v` of a fragment.
    pub(super) fn element(&self, f: FragId, v: usize) -> Val {
        let h = self.held(f);
        Val::new(class(h.dtype), h.variable(v))
    }

    /// Writes element `v` of a fragment.
    pub(super) fn set(&mut self, f: FragId, v: usize, value: &Val) -> Res<()> {
        let (dtype, name) = (self.held(f).dtype, self.held(f).variable(v));
        let x = self.rounded(value, dtype)?;
        let x = self.to(&x, class(dtype));
        if x.s != name {
            self.line(&format!("{name} = {};", x.s));
        }
        Ok(())
    }

    /// The thread part of a coordinate: computed once, before the body.
    pub(super) fn thread_coord(&mut self, f: FragId, dim: usize) -> Val {
        let h = self.held(f);
        let (digits, hi) = (h.threads[dim].clone(), h.thread_max(dim));
        if digits.is_empty() {
            return Val::int(0);
        }
        if let Some((_, name)) = self.thread_coords.iter().find(|(d, _)| *d == digits) {
            return Val::ranged(name.clone(), 0, hi);
        }
        let threads = self.unit_threads;
        let term = |g: &ThreadDigit| {
            let mut s = "thread".to_string();
            if g.place > 1 {
                s = format!("({s} / {})", g.place);
            }
            if g.place * g.extent < threads {
                s = format!("({s} % {})", g.extent);
            }
            if g.stride > 1 { format!("{s} * {}", g.stride) } else { s }
        };
        let sum: Vec<String> = digits.iter().map(term).collect();
        let name = format!("t_{}", self.thread_coords.len());
        self.head.push_str(&format!("    let {name} = {};\n", sum.join(" + ")));
        self.thread_coords.push((digits, name.clone()));
        Val::ranged(name, 0, hi)
    }

    /// Holds in one of the threads that have copies of the same elements; none if there are no copies.
    pub(super) fn first_replica(&mut self, f: FragId) -> Option<String> {
        let h = self.held(f);
        let mut all: Vec<String> =
            h.replicas.iter().map(|g| format!("(thread / {}) % {} == 0", g.place, g.extent)).collect();
        if h.thread_count < self.unit_threads {
            all.push(format!("thread < {}", h.thread_count));
        }
        (!all.is_empty()).then(|| format!("({})", all.join(" && ")))
    }
}
