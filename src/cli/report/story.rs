//! What the analyses say of the library's cascades, step by step: the text, what it costs, its one-pass form, its kernels.
//!
//! Invariant: a function of the library alone; what is shown is what the analyses and passes print.

use einfall_ir::analysis::derive::derive;
use einfall_ir::analysis::explain::{CascadeReport, Options, report};
use einfall_ir::cascade::Cascade;
use einfall_ir::cascade::print::print_cascade;

use super::super::Failure;
use super::super::source::Source;

/// A cascade with what is known of it.
pub struct Story {
    /// What the analyses report.
    pub report: CascadeReport,
    /// The cascade as the library has it, printed.
    pub text: String,
    /// Per rank that a derivation saves passes over: the rank, the derived cascade, its anchors and accumulators.
    pub derived: Vec<Derived>,
    /// The plan for a CPU, or why there is none.
    pub plan: Result<String, String>,
}

/// One derivation.
pub struct Derived {
    /// The rank.
    pub rank: String,
    /// The derived cascade.
    pub text: String,
    /// Names of the states that sums are carried relative to.
    pub anchors: Vec<String>,
    /// Names of the carried accumulators, each with the monoid that joins contributions and whether it is repaired.
    pub accumulators: Vec<(String, &'static str, bool)>,
}

/// Every cascade of the library.
pub fn library() -> Result<Vec<Story>, Failure> {
    let mut out = Vec::new();
    for (name, text) in einfall_kernels::SOURCES {
        let source = Source { name: (*name).to_owned(), text: (*text).to_owned() };
        let module = source.module()?;
        let reports = report(&module, &Options::default(), &Default::default()).cascades;
        for (c, report) in module.cascades.iter().zip(reports) {
            out.push(story(c, report));
        }
    }
    Ok(out)
}

fn story(c: &Cascade, report: CascadeReport) -> Story {
    let mut derived = Vec::new();
    for (r, rank) in c.ranks.iter() {
        let row = &report.ranks[&rank.name];
        if row.passes_before <= row.passes_after || row.passes_after == Some(0) {
            continue;
        }
        let Some(d) = derive(c, r) else { continue };
        let name = |t| d.cascade.tensors[t].name.clone();
        derived.push(Derived {
            rank: rank.name.clone(),
            text: print_cascade(&d.cascade),
            anchors: d.anchors.iter().map(|a| name(a.state)).collect(),
            accumulators: d.accumulators.iter().map(|a| (name(a.state), a.op.name(), a.repair.is_some())).collect(),
        });
    }
    let plan = einfall::plan(c).map(|p| p.to_string()).map_err(|e| match e {
        einfall::Error::Refused { diagnostics, .. } if !diagnostics.is_empty() => diagnostics[0].message.clone(),
        e => e.to_string(),
    });
    Story { report, text: print_cascade(c), derived, plan }
}
