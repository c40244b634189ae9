//! Passes after derivation: the levels of [`super::passes`] recomputed on canonical values, where separable barriers
//! have left the reductions that used them.
//!
//! In canonical form a reduction's body holds a barrier over its own rank only if it could not be separated, so the
//! nesting depth of reductions over a rank is the number of passes that are left. An output that keeps the rank and
//! depends on a whole fiber costs one more. Invariant: never more than the passes of the text.

use std::collections::{BTreeMap, BTreeSet};

use super::inline::Inlined;
use super::passes::passes_over;
use super::symbolic::{Atom, AtomId, PolyId, Var};
use crate::cascade::{Cascade, RankId, Size, Stmt, TensorId};

/// What is left over one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Levels {
    /// Passes over the rank; 0 if it is never traversed.
    pub passes: usize,
    /// Outputs that keep the rank and wait for a whole fiber of it.
    pub kept: Vec<TensorId>,
}

/// Passes over `rank` once every separable reduction is derived.
pub fn levels_after(c: &Cascade, x: &Inlined, rank: RankId) -> Levels {
    let before = passes_over(c, &[rank]).max;
    let mut out = Levels { passes: before, kept: Vec::new() };
    let mut walk =
        Walk { x, extent: Size::Rank(rank), levels: BTreeSet::new(), known: BTreeMap::new(), atoms: BTreeMap::new() };
    for o in &c.outputs {
        let t = match o.source {
            crate::cascade::OutputSource::Whole(t) => t,
            crate::cascade::OutputSource::Points { state, .. } | crate::cascade::OutputSource::Point { state, .. } => {
                state
            }
        };
        if walk.tensor(t) {
            out.kept.push(t);
        }
    }
    // What an iteration over the rank, or within a step of one, hides from the canonical values stays as written.
    let iterated = c.stmts.iter().any(|s| match s {
        Stmt::Einsum(_) => false,
        Stmt::Iter(i) => {
            let over = |v: &crate::cascade::Index| v.rank == Some(rank);
            over(&c.indices[i.index])
                || i.inits.iter().chain(&i.body).any(|e| {
                    e.free.iter().any(|v| over(&c.indices[*v]))
                        || e.roots().any(|r| {
                            let mut found = false;
                            c.walk(r, &mut |_, x| {
                                if let crate::cascade::Expr::Index(v) = x {
                                    found |= over(&c.indices[*v]);
                                }
                            });
                            found
                        })
                })
        }
    });
    if !iterated {
        out.passes = before.min(walk.levels.len());
    }
    out
}

struct Walk<'a> {
    x: &'a Inlined,
    extent: Size,
    levels: BTreeSet<usize>,
    /// Levels of tensors that are read as they are; a state that depends on itself counts once.
    known: BTreeMap<TensorId, usize>,
    /// Levels of factors.
    atoms: BTreeMap<AtomId, usize>,
}

impl Walk<'_> {
    /// Records the levels a tensor's value needs; whether it keeps the rank and waits for a fiber.
    fn tensor(&mut self, t: TensorId) -> bool {
        let Some(d) = self.x.tensors.get(&t) else { return false };
        let mut level = self.poly(d.value);
        for p in &d.support {
            level = level.max(self.poly(*p));
        }
        let kept = d.free.iter().any(|(_, v)| *v.extent() == self.extent);
        if kept && d.free.iter().any(|(_, v)| *v.extent() == self.extent && self.along(d.value, v)) {
            self.levels.insert(level);
        }
        kept && level > 1
    }

    /// Whether a value reads anything along `v`.
    fn along(&self, p: PolyId, v: &Var) -> bool {
        self.x.symbols.vars(p).contains(v)
    }

    /// The level at which a value is available.
    fn poly(&mut self, p: PolyId) -> usize {
        let mut atoms: Vec<AtomId> = Vec::new();
        self.x.symbols.visit(p, &mut |a| {
            atoms.push(a);
            false
        });
        atoms.into_iter().map(|a| self.atom(a)).max().unwrap_or(1)
    }

    fn atom(&mut self, a: AtomId) -> usize {
        if let Some(level) = self.atoms.get(&a) {
            return *level;
        }
        let level = self.level_of(a);
        self.atoms.insert(a, level);
        level
    }

    fn level_of(&mut self, a: AtomId) -> usize {
        let s = &self.x.symbols;
        let atom = s.atom(a).clone();
        let inner = super::symbolic::atom_operands(&atom).into_iter().map(|p| self.poly(p)).max().unwrap_or(1);
        match &atom {
            Atom::Reduce { vars, .. } if vars.iter().any(|v| *v.extent() == self.extent) => {
                self.levels.insert(inner);
                inner + 1
            }
            Atom::Read(t, _) if self.x.tensors.contains_key(t) => {
                let d = &self.x.tensors[t];
                let joined = d.joined && d.free.iter().any(|(_, v)| *v.extent() == self.extent);
                let value = d.value;
                let level = match self.known.get(t) {
                    Some(l) => *l,
                    None => {
                        self.known.insert(*t, 1);
                        let l = self.poly(value);
                        self.known.insert(*t, l);
                        l
                    }
                };
                if joined {
                    self.levels.insert(level);
                }
                inner.max(level + usize::from(joined))
            }
            _ => inner,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::inline::inline;
    use super::super::samples::{self, one};
    use super::*;

    fn after(source: &str, rank: &str) -> (usize, usize) {
        let c = one(source);
        let x = inline(&c);
        let l = levels_after(&c, &x, c.rank(rank).expect("rank"));
        (l.passes, l.kept.len())
    }

    #[test]
    fn separable_barriers_leave() {
        for (text, rank) in [
            (samples::attention().as_str(), "N"),
            (samples::DEFERRED, "N"),
            (samples::UNSTABILISED, "N"),
            (samples::UNSTABILISED_DEFERRED, "N"),
            (samples::LSE, "N"),
            (samples::CROSS_ENTROPY, "N"),
            (samples::RMS_MATMUL, "K"),
            (&samples::layernorm(false), "K"),
            (&samples::layernorm(true), "K"),
            (samples::VARIANCE, "N"),
            (samples::THIRD, "N"),
            (samples::ENTROPY, "N"),
            (samples::AMAX, "K"),
        ] {
            assert_eq!(after(text, rank), (1, 0), "{text}");
        }
        for (text, rank) in [(samples::SOFTMAX, "N"), (samples::LAYERNORM, "K")] {
            assert_eq!(after(text, rank), (2, 1), "{text}");
        }
        for (text, rank) in [(samples::SIGMOID, "N"), (samples::FP8, "K")] {
            assert_eq!(after(text, rank), (2, 0), "{text}");
        }
    }
}
