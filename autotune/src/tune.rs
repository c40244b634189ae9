//! What a tuner measures: candidates of a plan with what the model predicts of them, whichever device it is for.
//!
//! Invariant: a function of plan, sheet, sizes and seed alone; candidates come cheapest first by the model, and a
//! candidate's floor is a time that no mapping with its traffic and its operations can beat.

use einfall_ir::mapping::{KernelMapping, Mapping};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;

use crate::{model_cpu, model_gpu};

/// Where a candidate comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Among the model's cheapest.
    Model,
    /// Drawn from everything the model admits.
    Drawn,
    /// Written by hand, or by another run.
    Given,
}

impl Origin {
    /// As records spell it.
    pub fn name(self) -> &'static str {
        match self {
            Origin::Model => "model",
            Origin::Drawn => "drawn",
            Origin::Given => "given",
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Origin> {
        [Origin::Model, Origin::Drawn, Origin::Given].into_iter().find(|o| o.name() == name)
    }
}

/// What the model says of a mapping.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// Seconds of all kernels.
    pub seconds: f64,
    /// Seconds that the busiest resource alone takes: no schedule is faster.
    pub floor: f64,
    /// The term that binds.
    pub binding: String,
    /// Seconds that each resource alone would take.
    pub terms: Vec<(String, f64)>,
}

impl From<&model_cpu::Cost> for Prediction {
    fn from(c: &model_cpu::Cost) -> Prediction {
        Prediction {
            seconds: c.seconds,
            floor: c.floor,
            binding: c.binding.to_owned(),
            terms: c.terms.iter().map(|(n, t)| ((*n).to_owned(), *t)).collect(),
        }
    }
}

impl From<&model_gpu::Cost> for Prediction {
    fn from(c: &model_gpu::Cost) -> Prediction {
        Prediction {
            seconds: c.seconds,
            floor: c.floor(),
            binding: c.binding.to_owned(),
            terms: c.terms.iter().map(|(n, t)| ((*n).to_owned(), *t)).collect(),
        }
    }
}

/// A mapping to measure.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// The mapping.
    pub mapping: Mapping,
    /// Where it comes from.
    pub origin: Origin,
    /// What the model says of it; none for a mapping outside of the model.
    pub prediction: Option<Prediction>,
}

/// The `k` cheapest diverse mappings of a plan at `sizes` (one value per rank), cheapest first; at least one.
pub fn candidates(plan: &Plan, sheet: &DataSheet, sizes: &[u64], k: usize) -> Vec<Candidate> {
    let of = |mapping: Mapping, prediction| Candidate { mapping, origin: Origin::Model, prediction };
    if sheet.gpu.is_none() {
        let found = model_cpu::candidates(plan, sheet, Some(sizes), k);
        return found.into_iter().map(|(m, c)| of(m, Some(Prediction::from(&c)))).collect();
    }
    let found = model_gpu::candidates(plan, sheet, Some(sizes), k);
    found.into_iter().map(|(m, c)| of(m, (!c.terms.is_empty()).then(|| Prediction::from(&c)))).collect()
}

/// `n` mappings drawn from everything the model admits, each once.
pub fn drawn(plan: &Plan, sheet: &DataSheet, sizes: &[u64], seed: u64, n: usize) -> Vec<Candidate> {
    let mut out: Vec<Candidate> = Vec::new();
    let found = match sheet.gpu {
        Some(_) => model_gpu::drawn(plan, sheet, Some(sizes), seed, n),
        None => model_cpu::drawn(plan, sheet, Some(sizes), seed, n),
    };
    for mapping in found {
        if out.iter().all(|c| c.mapping != mapping) {
            let prediction = predict(plan, sheet, sizes, &mapping);
            out.push(Candidate { mapping, origin: Origin::Drawn, prediction });
        }
    }
    out
}

/// What the model says of a mapping; none for one that it does not admit or has no price for.
pub fn predict(plan: &Plan, sheet: &DataSheet, sizes: &[u64], mapping: &Mapping) -> Option<Prediction> {
    if sheet.gpu.is_none() {
        return model_cpu::price(plan, sheet, Some(sizes), mapping).ok().map(|c| Prediction::from(&c));
    }
    model_gpu::price(plan, sheet, Some(sizes), mapping).ok().flatten().map(|c| Prediction::from(&c))
}

/// A mapping for some sizes beside one for all: every kernel gets the entries of `special`, and those of `general` that
/// hold extents which `special`'s whole axes do not, in the order in which a launch must try them.
pub fn beside(special: Mapping, general: Mapping) -> Mapping {
    let whole = |m: &KernelMapping| -> Vec<(String, u64)> {
        m.axes.iter().filter(|a| a.whole).map(|a| (a.axis.clone(), a.block)).collect()
    };
    let size = |m: &KernelMapping| whole(m).iter().map(|(_, n)| *n as f64).product::<f64>();
    let mut kernels = special.kernels;
    let named: Vec<String> = kernels.iter().map(|m| m.kernel.clone()).collect();
    // Kernels that a split makes belong to the mapping that splits.
    let splits = kernels.iter().any(|m| m.split.is_some());
    for m in general.kernels {
        let holds = |s: &KernelMapping| {
            let own = whole(s);
            s.kernel == m.kernel
                && whole(&m).iter().all(|(a, n)| own.iter().all(|(b, k)| a != b || n <= k))
                && own.iter().all(|(b, _)| whole(&m).iter().any(|(a, _)| a == b))
        };
        let always = |s: &KernelMapping| s.kernel == m.kernel && whole(s).is_empty();
        let covered = kernels.iter().any(|s| holds(s) || always(s));
        if !covered && !splits || !named.contains(&m.kernel) {
            kernels.push(m);
        }
    }
    // Per kernel, where it stood, the tightest first.
    let mut order: Vec<String> = Vec::new();
    for m in &kernels {
        if !order.contains(&m.kernel) {
            order.push(m.kernel.clone());
        }
    }
    let place = |m: &KernelMapping| order.iter().position(|k| *k == m.kernel);
    kernels.sort_by(|a, b| place(a).cmp(&place(b)).then(size(a).total_cmp(&size(b))));
    Mapping { plan: special.plan, target: special.target, kernels }
}

/// Spearman's rank correlation of pairs; none for fewer than three or for values that are all equal.
pub fn rank_correlation(pairs: &[(f64, f64)]) -> Option<f64> {
    if pairs.len() < 3 {
        return None;
    }
    let (x, y) = (ranks(pairs.iter().map(|p| p.0)), ranks(pairs.iter().map(|p| p.1)));
    let mean = (pairs.len() as f64 - 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum::<f64>();
    let (xy, xx, yy) = (product(&x, &y), product(&x, &x), product(&y, &y));
    (xx > 0.0 && yy > 0.0).then(|| xy / (xx * yy).sqrt())
}

/// The rank of every value; equal ones share the mean of theirs.
fn ranks(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let values: Vec<f64> = values.collect();
    let below = |v: f64| values.iter().filter(|w| **w < v).count() as f64;
    let equal = |v: f64| values.iter().filter(|w| **w == v).count() as f64;
    values.iter().map(|v| below(*v) + (equal(*v) - 1.0) / 2.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_correlation_is_spearmans() {
        let up: Vec<(f64, f64)> = (0..10).map(|i| (f64::from(i), f64::from(i).exp())).collect();
        assert_eq!(rank_correlation(&up), Some(1.0));
        let down: Vec<(f64, f64)> = up.iter().map(|(x, y)| (*x, -y)).collect();
        assert_eq!(rank_correlation(&down), Some(-1.0));
        // By hand: ranks 0 1 2 3 against 1 0 3 2 give 1 - 6·4/(4·15) = 0.6.
        let some = [(1.0, 20.0), (2.0, 10.0), (3.0, 40.0), (4.0, 30.0)];
        assert!((rank_correlation(&some).unwrap() - 0.6).abs() < 1e-12);
        // Ties share a rank: 0.5 0.5 2 against 0 1 2.
        let ties = [(1.0, 1.0), (1.0, 2.0), (2.0, 3.0)];
        assert!((rank_correlation(&ties).unwrap() - 0.75f64.sqrt()).abs() < 1e-12);
        assert_eq!(rank_correlation(&[(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]), None);
        assert_eq!(rank_correlation(&up[..2]), None);
    }
}
