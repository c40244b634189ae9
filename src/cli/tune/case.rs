//! What is tuned: a cascade at some sizes, as text that a child process can be handed.

use einfall_ir::cascade::bind::{Bindings, Given, bind, check_facts};
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::tile::{AxisKind, Plan};

use super::super::Failure;
use super::super::gpu::plans;

/// A cascade with its sizes.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Case {
    /// The text that declares it.
    pub text: String,
    /// Its name.
    pub cascade: String,
    /// Extents fixed at compile time.
    pub statics: Vec<(String, u64)>,
    /// The extent of every rank.
    pub sizes: Vec<(String, u64)>,
    /// A mapping that is timed in turns with every other, where a machine's speed changes from second to second.
    #[serde(default)]
    pub beside: Option<String>,
}

/// Elements of the largest array where results are compared, at most.
const ELEMENTS: u64 = 1 << 17;
/// Points that the evaluator is asked for within a case, and may visit where kernels depend on others: about half a second.
pub const POINTS: f64 = 1e5;
const VISITS: f64 = 2.5e5;

impl Case {
    /// A case, with every rank solved and the facts checked. Ranks that the cascade lacks are left out of `given`.
    pub fn new(text: &str, c: &Cascade, statics: &[(String, u64)], given: &[(String, u64)]) -> Result<Case, Failure> {
        let own = |list: &[(String, u64)]| -> Vec<(String, u64)> {
            list.iter().filter(|(n, _)| c.rank(n).is_some()).cloned().collect()
        };
        let statics = own(statics);
        let fixed = einfall::with_statics(c, &statics).map_err(|e| Failure::Usage(e.to_string()))?;
        let mut sizes = own(given);
        sizes.extend(statics.iter().filter(|s| !given.iter().any(|g| g.0 == s.0)).cloned());
        let b = solve(&fixed, &sizes).map_err(|e| Failure::Usage(format!("{}: {e}", c.name)))?;
        let sizes = names(&fixed).zip(b.extents).collect();
        Ok(Case { text: text.to_owned(), cascade: c.name.clone(), statics, sizes, beside: None })
    }

    /// The cascade, with its static extents fixed.
    pub fn load(&self) -> Result<Cascade, String> {
        let module = parse(&self.text).map_err(|d| format!("{d:?}"))?;
        let found = module.cascades.into_iter().find(|c| c.name == self.cascade);
        let c = found.ok_or_else(|| format!("there is no cascade `{}`", self.cascade))?;
        einfall::with_statics(&c, &self.statics).map_err(|e| e.to_string())
    }

    /// `NAME M=1,N=2`.
    pub fn label(&self) -> String {
        format!("{} {}", self.cascade, self.extents())
    }

    /// `M=1,N=2`.
    pub fn extents(&self) -> String {
        joined(&self.sizes)
    }

    /// As [`Case::extents`], those that are fixed at compile time.
    pub fn fixed(&self) -> String {
        joined(&self.statics)
    }
}

fn joined(pairs: &[(String, u64)]) -> String {
    pairs.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(",")
}

fn names(c: &Cascade) -> impl Iterator<Item = String> + '_ {
    c.ranks.iter().map(|(_, r)| r.name.clone())
}

fn solve(c: &Cascade, sizes: &[(String, u64)]) -> Result<Bindings, String> {
    let b = bind(c, &Given { sizes: sizes.to_vec(), ..Given::default() }).map_err(|e| e.to_string())?;
    check_facts(c, &b, &[]).map_err(|e| e.to_string())?;
    Ok(b)
}

/// The value of every rank of a plan, in order.
pub fn ranks(plan: &Plan, sizes: &[(String, u64)]) -> Result<Vec<u64>, String> {
    let value = |name: &str| sizes.iter().find(|(n, _)| n == name).map(|(_, v)| *v);
    let of = |name: &str, fixed: Option<u64>| value(name).or(fixed).ok_or_else(|| format!("rank `{name}` has no size"));
    plan.ranks.iter().map(|(_, r)| of(&r.name, r.fixed)).collect()
}

/// Smaller sizes under the same facts at which results are compared with an evaluator: whole inner axes, several
/// blocks and a tail along the others where that is few points.
pub fn small(c: &Cascade, plan: &Plan, sizes: &[(String, u64)]) -> Vec<(String, u64)> {
    let mut keep: Vec<&str> = c.ranks.iter().filter(|(_, r)| r.fixed.is_some()).map(|(_, r)| r.name.as_str()).collect();
    for kernel in &plan.kernels {
        for (_, a) in kernel.axes.iter().filter(|(_, a)| a.kind == AxisKind::Inner) {
            a.extent.for_each_rank(&mut |r| keep.push(&plan.ranks[r].name));
        }
    }
    let elements = |sizes: &[(String, u64)]| -> u64 {
        let Ok(values) = ranks(plan, sizes) else { return u64::MAX };
        let of = |d: &[einfall_ir::cascade::Size]| d.iter().map(|s| s.eval(&values).unwrap_or(1)).product::<u64>();
        plan.buffers.iter().map(|(_, b)| of(&b.dims)).max().unwrap_or(0)
    };
    let mut small = sizes.to_vec();
    let mut stuck: Vec<String> = Vec::new();
    let visited =
        |sizes: &[(String, u64)]| ranks(plan, sizes).map_or(f64::INFINITY, |r| plans::visits(plan, &r, POINTS));
    while elements(&small) > ELEMENTS || visited(&small) > VISITS {
        // Halve the longest that may be halved; a fact that this breaks keeps it.
        let free = |s: &(String, u64)| s.1 > 1 && !keep.contains(&s.0.as_str()) && !stuck.contains(&s.0);
        let Some(i) = (0..small.len()).filter(|i| free(&small[*i])).max_by_key(|i| small[*i].1) else { break };
        let mut next = small.clone();
        next[i].1 /= 2;
        match solve(c, &next) {
            Ok(b) => small = names(c).zip(b.extents).collect(),
            Err(_) => stuck.push(small[i].0.clone()),
        }
    }
    for i in 0..small.len() {
        let (name, n) = small[i].clone();
        if n >= 32 && !keep.contains(&name.as_str()) {
            let mut next = small.clone();
            next[i].1 = n - 5;
            if let Ok(b) = solve(c, &next) {
                small = names(c).zip(b.extents).collect();
            }
        }
    }
    small
}
