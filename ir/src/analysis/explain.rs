//! The report of `einfall explain`: what is known of each cascade of a file, as text and as versioned JSON.
//!
//! A pure function from a module, extents and a data sheet to a [`Report`]; what later stages know (mapping, traffic,
//! predicted time) comes in as [`Mapped`]. The JSON schema is docs/explain-schema.md. Invariant: every field of the
//! schema is present in the JSON; what is not known is null.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::check::{self, Rejection};
use super::derive::Policy;
use super::inline::{Inlined, MAX_FACTORS, Site, inline};
use super::levels::levels_after;
use super::passes::passes_over;
use super::separation::{MAX_RANK, Separation};
use super::symbolic::{Atom, AtomId};
use super::{derive, io};
use crate::cascade::{Cascade, Expr, ExprId, Module, OutputSource, RankId, TensorId};
use crate::target::DataSheet;

/// Name of the JSON schema.
pub const SCHEMA: &str = "einfall-explain";
/// Its version: raised when a field changes its meaning or goes.
pub const VERSION: u32 = 1;

/// What is fixed for the report.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Extents by rank name (`--size` and `--static`).
    pub sizes: BTreeMap<String, u64>,
    /// The device whose memory levels are bounded; none leaves `io` empty.
    pub target: Option<DataSheet>,
}

/// What a mapping of a cascade costs, from the stages after the analyses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mapped {
    /// Kernels of the plan.
    pub kernels: Option<usize>,
    /// The mapping as text.
    pub mapping: Option<String>,
    /// Traffic into each memory level by its name, in bytes.
    pub bytes: BTreeMap<String, f64>,
    /// Predicted time in microseconds.
    pub predicted_us: Option<f64>,
}

/// The report of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// [`VERSION`].
    pub version: u32,
    /// One entry per cascade, in order.
    pub cascades: Vec<CascadeReport>,
}

/// What is known of one cascade.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CascadeReport {
    /// Its name.
    pub name: String,
    /// Per rank of the header.
    pub ranks: BTreeMap<String, RankReport>,
    /// Every reduction of the text, in order.
    pub reductions: Vec<ReductionReport>,
    /// Lower bounds per memory level.
    pub io: Vec<IoReport>,
    /// Where a single pass is not exact or not possible.
    pub refusals: Vec<Refusal>,
    /// Kernels of the plan.
    pub kernels: Option<usize>,
    /// The mapping as text.
    pub mapping: Option<String>,
    /// Predicted time in microseconds.
    pub predicted_us: Option<f64>,
    /// Bytes live at once in one fiber of each rank that is reduced, as written.
    pub footprint_bytes: BTreeMap<String, Option<u64>>,
}

/// Passes over one rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankReport {
    /// Of the text; null if nothing traverses the rank.
    pub passes_before: Option<usize>,
    /// After derivation.
    pub passes_after: Option<usize>,
    /// J of the reductions that feed the outputs.
    pub separation_rank: Option<usize>,
    /// Anchor policies the derived form admits; empty when nothing needs an anchor.
    pub anchors: Option<Vec<String>>,
}

/// One reduction of the text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReductionReport {
    /// The tensor its Einsum assigns.
    pub einsum: String,
    /// The ranks it reduces.
    pub over: Vec<String>,
    /// J of its inlined body; null when not finite, not proved, or over 4.
    pub separation_rank: Option<usize>,
}

/// A lower bound of the traffic into one memory level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IoReport {
    /// The memory level that the bytes enter.
    pub level: String,
    /// The Einsum or stream it is for.
    pub einsum: String,
    /// Bytes that any schedule moves; null when an extent is unknown.
    pub lower_bound_bytes: Option<f64>,
    /// Bytes the mapping moves.
    pub mapping_bytes: Option<f64>,
    /// `mapping_bytes / lower_bound_bytes`.
    pub ratio: Option<f64>,
    /// Where the bound is proved, or `reference: ..` when it is not a proved bound.
    pub source: String,
}

/// Why something stays as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// The tensor its Einsum assigns.
    pub einsum: String,
    /// One sentence.
    pub reason: String,
}

/// The report of a module. `mapped` holds what later stages know, by cascade name.
///
/// ```
/// use einfall_ir::analysis::explain::{Options, report, to_text};
///
/// let text = "cascade lse[M, N](x: f32[M,N]) -> (y: f32[M]) {
///     a[m] = max(n) x[m,n]
///     s[m] = sum(n) exp(x[m,n] - a[m])
///     y[m] = a[m] + log(s[m])
/// }";
/// let module = einfall_ir::cascade::parse(text).expect("it is right");
/// let said = to_text(&report(&module, &Options::default(), &Default::default()));
/// assert!(said.lines().any(|l| l.split_whitespace().take(3).eq(["N", "2", "1"])), "{said}"); // two passes, then one
/// ```
pub fn report(module: &Module, options: &Options, mapped: &BTreeMap<String, Mapped>) -> Report {
    let cascades = module.cascades.iter().map(|c| cascade_report(c, options, mapped.get(&c.name))).collect();
    Report { schema: SCHEMA.into(), version: VERSION, cascades }
}

fn cascade_report(c: &Cascade, options: &Options, mapped: Option<&Mapped>) -> CascadeReport {
    let x = inline(c);
    let name = |t: TensorId| c.tensors[t].name.clone();
    let mut ranks = BTreeMap::new();
    let mut refusals: Vec<Refusal> = Vec::new();
    let mut footprint_bytes = BTreeMap::new();
    let mut derived = Vec::new();
    for (r, rank) in c.ranks.iter() {
        let before = passes_over(c, &[r]).max;
        let mut after = levels_after(c, &x, r);
        let traversed = before > 0;
        let j = separation_rank(c, &x, r);
        let derivation = derive::derive_inlined(c, &x, r, Policy::Rolling);
        let mut anchors = derive::policies_of(&x, r, derivation.as_ref());
        // What the checker does not accept is not claimed.
        let checked = derivation.as_ref().map(|d| check::check(c, d));
        derived.extend(derivation);
        if let Some(Err(rejection @ (Rejection::Output(_) | Rejection::Identity(_) | Rejection::Composition(_)))) =
            checked
        {
            after.passes = before;
            anchors = None;
            let reason = format!("its derivation over {} fails the check: {rejection:?}", rank.name);
            refusals.push(Refusal { einsum: c.name.clone(), reason });
        }
        ranks.insert(
            rank.name.clone(),
            RankReport {
                passes_before: traversed.then_some(before),
                passes_after: traversed.then_some(after.passes),
                separation_rank: j,
                anchors: anchors.map(|a| a.iter().map(|p| p.name().to_string()).collect()),
            },
        );
        if after.passes >= 2 {
            for t in after.kept {
                refusals.push(Refusal {
                    einsum: name(t),
                    reason: format!(
                        "`{}` keeps rank {} and each of its elements depends on a reduction over all of {}, so {} is \
                         read again after it is complete: at least 2 passes",
                        name(t),
                        rank.name,
                        rank.name,
                        rank.name
                    ),
                });
            }
        }
        if x.sites.iter().any(|s| s.ranks.contains(&r)) {
            let sizes = extents(c, options);
            footprint_bytes.insert(rank.name.clone(), sizes.and_then(|n| super::footprint::fiber_bytes(c, r, &n)));
        }
    }
    for (t, factors) in &x.large {
        if x.symbols.hidden.get(t).is_some_and(|h| !h.is_empty()) {
            let reason = format!(
                "its value with all producers in place holds {factors} factors, more than {MAX_FACTORS}: what reads \
                 `{}` takes it as it is, and no one-pass form is derived across it",
                name(*t)
            );
            refusals.push(Refusal { einsum: name(*t), reason });
        }
    }
    let mut seen = BTreeSet::new();
    for site in &x.sites {
        if let (Some(reason), true) = (refusal_of(c, &x, site), seen.insert(site.expr)) {
            refusals.push(Refusal { einsum: name(site.einsum), reason });
        }
    }
    let mut listed = BTreeSet::new();
    let reductions = x
        .sites
        .iter()
        .filter(|s| listed.insert(s.expr))
        .map(|s| ReductionReport {
            einsum: name(s.einsum),
            over: s.ranks.iter().map(|r| c.ranks[*r].name.clone()).collect(),
            separation_rank: s.separation.rank(),
        })
        .collect();
    let io = io_reports(c, &derived, options, mapped);
    CascadeReport {
        name: c.name.clone(),
        ranks,
        reductions,
        io,
        refusals,
        kernels: mapped.and_then(|m| m.kernels),
        mapping: mapped.and_then(|m| m.mapping.clone()),
        predicted_us: mapped.and_then(|m| m.predicted_us),
        footprint_bytes,
    }
}

/// Extents of all ranks, if every one is known.
pub(crate) fn extents(c: &Cascade, options: &Options) -> Option<Vec<u64>> {
    c.ranks.iter().map(|(_, r)| options.sizes.get(&r.name).copied().or(r.fixed)).collect()
}

fn io_reports(
    c: &Cascade,
    derived: &[derive::Derivation],
    options: &Options,
    mapped: Option<&Mapped>,
) -> Vec<IoReport> {
    let Some(target) = &options.target else { return Vec::new() };
    let sizes = extents(c, options);
    let bounds = match &sizes {
        Some(n) => io::bounds(c, derived, n, target),
        None => Vec::new(),
    };
    let mut out: Vec<IoReport> = bounds
        .into_iter()
        .map(|b| {
            let whole = b.scope == c.name;
            let bytes = mapped.filter(|_| whole).and_then(|m| m.bytes.get(&b.level).copied());
            IoReport {
                level: b.level,
                einsum: b.scope,
                lower_bound_bytes: Some(b.bytes),
                mapping_bytes: bytes,
                ratio: bytes.filter(|_| b.bytes > 0.0).map(|m| m / b.bytes),
                source: b.source,
            }
        })
        .collect();
    if sizes.is_none() {
        for l in &target.levels[1..] {
            out.push(IoReport {
                level: l.name.clone(),
                einsum: c.name.clone(),
                lower_bound_bytes: None,
                mapping_bytes: mapped.and_then(|m| m.bytes.get(&l.name).copied()),
                ratio: None,
                source: "an extent is unknown: give it with --size".into(),
            });
        }
    }
    out
}

/// J over `rank`: for each output that of the reductions that feed it; the largest over the outputs; none if one of
/// them is refused. Where several reductions feed one output, those with the most indices count: the others only scale
/// or shift what those sum, whether the text has them inside the sum or before it. An output made of several sums has
/// at least the J of its value ([`super::sums`]).
pub fn separation_rank(c: &Cascade, x: &Inlined, rank: RankId) -> Option<usize> {
    let mut j = None;
    for o in &c.outputs {
        let t = match o.source {
            OutputSource::Whole(t) => t,
            OutputSource::Points { state, .. } | OutputSource::Point { state, .. } => state,
        };
        let mut feeding = BTreeSet::new();
        feed_tensor(c, t, rank, &mut BTreeSet::new(), &mut feeding);
        let sites: Vec<&Site> = x.sites.iter().filter(|s| feeding.contains(&s.expr)).collect();
        let indices = |s: &Site| x.symbols.vars(s.value).len();
        let most = sites.iter().map(|s| indices(s)).max().unwrap_or(0);
        for site in sites {
            if indices(site) == most || site.separation.rank().is_none() {
                j = Some(site.separation.rank()?.max(j.unwrap_or(0)));
            }
        }
        // What the output is made of counts, however it is spread over statements.
        if let (Some(n), Some(d)) = (j, x.tensors.get(&t).filter(|d| d.inlined)) {
            j = Some(n.max(super::sums::value_rank(&x.symbols, d.value, rank)));
        }
    }
    j
}

fn feed_tensor(c: &Cascade, t: TensorId, rank: RankId, seen: &mut BTreeSet<TensorId>, feeding: &mut BTreeSet<ExprId>) {
    if !seen.insert(t) {
        return;
    }
    for e in c.einsums().filter(|e| e.targets.iter().any(|x| x.tensor == t)) {
        feed_expr(c, e.value, rank, seen, feeding);
    }
}

fn feed_expr(c: &Cascade, e: ExprId, rank: RankId, seen: &mut BTreeSet<TensorId>, feeding: &mut BTreeSet<ExprId>) {
    match &c.exprs[e] {
        Expr::Reduce { over, .. } if over.iter().any(|i| c.indices[*i].rank == Some(rank)) => {
            feeding.insert(e);
        }
        Expr::Read { tensor, .. } => feed_tensor(c, *tensor, rank, seen, feeding),
        x => {
            let mut operands = Vec::new();
            x.for_each_operand(|o| operands.push(o));
            for o in operands {
                feed_expr(c, o, rank, seen, feeding);
            }
        }
    }
}

fn refusal_of(c: &Cascade, x: &Inlined, site: &Site) -> Option<String> {
    let over: Vec<&str> = site.ranks.iter().map(|r| c.ranks[*r].name.as_str()).collect();
    let over = if over.is_empty() { "its index".to_string() } else { over.join(", ") };
    match &site.separation {
        Separation::Free | Separation::Rank(_) => None,
        Separation::TooMany(j) => Some(format!(
            "its summand has separation rank {j} over {over}; at most {MAX_RANK} accumulators are carried"
        )),
        Separation::Mixed(a) => Some(match (large_in(x, *a), cast_in(x, *a)) {
            (Some(t), _) => format!(
                "it reads `{}`, which is not looked into for its size, and behind that {over} takes part in a \
                 reduction: no one-pass form is derived across it",
                c.tensors[t].name
            ),
            (None, Some(dtype)) => format!(
                "a written cast to {dtype} rounds a value that depends on a reduction over {over}: the rounding does \
                 not commute with a change of that value, so one pass would not be exact"
            ),
            (None, None) => {
                let measured = match super::numeric::rank(x, site) {
                    Some(j) if j > MAX_RANK => format!(" (measured: more than {MAX_RANK} at 120 digits)"),
                    Some(j) => format!(" (measured: {j} at 120 digits, without a symbolic proof)"),
                    None => String::new(),
                };
                format!(
                    "its summand depends on the reduced index and on a reduction over {over} through a factor that is \
                     no finite sum of products{measured}: no exact one-pass form"
                )
            }
        }),
    }
}

/// A tensor within `a` that is taken as it is for its size, though something is reduced behind it.
fn large_in(x: &Inlined, a: AtomId) -> Option<TensorId> {
    let mut found = None;
    x.symbols.visit_atom(a, &mut |b| {
        if let Atom::Read(t, _) = x.symbols.atom(b)
            && x.symbols.hidden.get(t).is_some_and(|h| !h.is_empty())
        {
            found = Some(*t);
        }
        found.is_none()
    });
    found
}

fn cast_in(x: &Inlined, a: AtomId) -> Option<&'static str> {
    let mut found = None;
    x.symbols.visit_atom(a, &mut |b| {
        if let Atom::Cast(d, _) = x.symbols.atom(b) {
            found = Some(d.name());
        }
        found.is_none()
    });
    found
}

/// The report as JSON, indented.
pub fn to_json(report: &Report) -> String {
    serde_json::to_string_pretty(report).expect("a report has no maps with other than string keys")
}

/// The report as text.
pub fn to_text(report: &Report) -> String {
    let mut out = String::new();
    let number = |n: Option<usize>| n.map_or("-".to_string(), |n| n.to_string());
    for c in &report.cascades {
        let _ = writeln!(out, "cascade {}", c.name);
        let _ = writeln!(out, "  {:<8} {:>6} {:>6} {:>3}  anchors", "rank", "before", "after", "J");
        for (name, r) in &c.ranks {
            let anchors = r.anchors.as_ref().map_or("-".to_string(), |a| a.join(", "));
            let _ = writeln!(
                out,
                "  {:<8} {:>6} {:>6} {:>3}  {}",
                name,
                number(r.passes_before),
                number(r.passes_after),
                number(r.separation_rank),
                anchors
            );
        }
        if !c.reductions.is_empty() {
            let _ = writeln!(out, "  reductions");
            for r in &c.reductions {
                let _ = writeln!(out, "    {} over {}: J = {}", r.einsum, r.over.join(", "), number(r.separation_rank));
            }
        }
        for (rank, bytes) in &c.footprint_bytes {
            if let Some(b) = bytes {
                let _ = writeln!(out, "  live bytes per fiber of {rank}: {b}");
            }
        }
        if !c.io.is_empty() {
            let _ = writeln!(out, "  I/O lower bounds");
            for b in &c.io {
                let bytes = b.lower_bound_bytes.map_or("-".to_string(), |x| format!("{x:.4e} B"));
                let ratio = b.ratio.map_or(String::new(), |r| format!(", mapping moves {r:.2}x"));
                let _ = writeln!(out, "    {:<10} {:<14} {bytes}{ratio}  [{}]", b.level, b.einsum, b.source);
            }
        }
        for r in &c.refusals {
            let _ = writeln!(out, "  refused {}: {}", r.einsum, r.reason);
        }
        if let Some(k) = c.kernels {
            let _ = writeln!(out, "  kernels: {k}");
        }
        if let Some(t) = c.predicted_us {
            let _ = writeln!(out, "  predicted: {t:.2} us");
        }
        if let Some(m) = &c.mapping {
            let _ = writeln!(out, "  mapping:");
            for line in m.lines() {
                let _ = writeln!(out, "    {line}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;
    use crate::cascade::parse;

    fn of(source: &str) -> CascadeReport {
        let m = parse(source).unwrap_or_else(|d| panic!("{d:?}\n{source}"));
        report(&m, &Options::default(), &BTreeMap::new()).cascades.remove(0)
    }

    /// before, after, J of a rank.
    fn row(source: &str, rank: &str) -> (usize, usize, Option<usize>) {
        let r = of(source);
        let r = &r.ranks[rank];
        (r.passes_before.unwrap(), r.passes_after.unwrap(), r.separation_rank)
    }

    #[test]
    fn the_table() {
        let qk = samples::QK;
        for (params, score, filter) in [
            ("", qk.to_string(), "where n <= m + (N - M)"),
            ("", qk.to_string(), ""),
            (", W: i32", qk.to_string(), "where n <= m and n > m - W"),
            ("", format!("50.0 * tanh({qk} / 50.0)"), "where n <= m"),
            (", cap: f32", format!("cap * tanh({qk} / cap)"), "where n <= m"),
            (", slope: f32[G,R]", format!("{qk} - slope[g,r] * (m - n)"), "where n <= m"),
            (", bias: f32[G,M,N]", format!("{qk} + bias[g,m,n]"), ""),
            (", dm: i32[M], dn: i32[N]", qk.to_string(), "where dm[m] == dn[n]"),
            (", mask: bool[ceildiv(M,16), ceildiv(N,16)]", qk.to_string(), "where mask[m/16, n/16]"),
            (", scale: f32", "scale * (sum(e) Q[b,g*R+r,m,e] * K[b,g,n,e])".into(), "where n <= m"),
        ] {
            let text = samples::attention_with(params, &score, filter);
            assert_eq!(row(&text, "N"), (3, 1, Some(1)), "{text}");
            assert!(of(&text).refusals.is_empty());
        }
        assert_eq!(row(samples::DEFERRED, "N"), (2, 1, Some(1)));
        assert_eq!(row(samples::UNSTABILISED, "N"), (2, 1, Some(1)));
        assert_eq!(row(samples::UNSTABILISED_DEFERRED, "N"), (1, 1, Some(1)));
        assert_eq!(row(samples::LSE, "N"), (2, 1, Some(1)));
        assert_eq!(row(samples::CROSS_ENTROPY, "N"), (2, 1, Some(1)));
        assert_eq!(row(samples::RMS_MATMUL, "K"), (2, 1, Some(1)));
        assert_eq!(row(&samples::layernorm(false), "K"), (3, 1, Some(2)));
        assert_eq!(row(&samples::layernorm(true), "K"), (3, 1, Some(3)));
        assert_eq!(row(samples::VARIANCE, "N"), (2, 1, Some(3)));
        assert_eq!(row(samples::THIRD, "N"), (2, 1, Some(4)));
        assert_eq!(row(samples::ENTROPY, "N"), (3, 1, Some(2)));
        // The same values with other spellings.
        let raw = "cascade v[M, N](x: f32[M,N]) -> (u: f32[M], v: f32[M]) {\n u[m] = (sum(n) x[m,n]) / N\n \
                   v[m] = (sum(n) x[m,n] * x[m,n]) / N - u[m] * u[m]\n}";
        assert_eq!(row(raw, "N"), (1, 1, Some(3)));
        let entropy = "cascade h[M, N](x: f32[M,N]) -> (h: f32[M]) {\n X[m] = max(n) x[m,n]\n \
                       L[m] = sum(n) exp(x[m,n] - X[m])\n l[m] = X[m] + log(L[m])\n \
                       h[m] = l[m] - (sum(n) exp(x[m,n] - l[m]) * x[m,n])\n}";
        assert_eq!(row(entropy, "N"), (3, 1, Some(2)));
        for (text, rank, einsum) in [(samples::SOFTMAX, "N", "A"), (samples::LAYERNORM, "K", "y")] {
            assert!(row(text, rank).1 >= 2);
            let r = of(text).refusals;
            assert_eq!((r.len(), r[0].einsum.as_str()), (1, einsum));
            assert!(r[0].reason.contains(&format!("keeps rank {rank}")), "{}", r[0].reason);
        }
        let r = of(samples::SIGMOID);
        assert_eq!(r.ranks["N"].separation_rank, None);
        assert!(r.refusals[0].reason.contains("more than 4 at 120 digits"), "{}", r.refusals[0].reason);
        let r = of(samples::FP8);
        assert_eq!(r.ranks["K"].anchors, None);
        assert!(r.refusals[0].reason.contains("cast to f8e4m3"), "{}", r.refusals[0].reason);
    }

    #[test]
    fn a_whole_layer_is_explained_up_to_its_budget() {
        let text = include_str!("../../../examples/minilm/encoder.ein");
        let m = parse(text).unwrap();
        let layer = m.cascades.iter().find(|c| c.name == "layer").unwrap();
        let r = cascade_report(layer, &Options::default(), None);
        assert_eq!((r.ranks["T"].passes_before, r.ranks["T"].passes_after), (Some(3), Some(2)));
        let j = |t: &str| r.reductions.iter().find(|s| s.einsum == t).unwrap().separation_rank;
        assert_eq!((j("L"), j("O"), j("R1"), j("R2")), (Some(1), Some(1), Some(1), Some(1)));
        // Behind the budget nothing is claimed: a reduction of what is not looked into is refused by name.
        let x = inline(layer);
        let large: Vec<&str> = x.large.keys().map(|t| layer.tensors[*t].name.as_str()).collect();
        assert!(large.contains(&"Y1"), "{large:?}");
        assert_eq!(j("Z"), None);
        let of = |t: &str| r.refusals.iter().filter(|x| x.einsum == t).map(|x| x.reason.as_str()).collect::<Vec<_>>();
        assert!(of("Y1").iter().any(|x| x.contains("more than 64")), "{:?}", of("Y1"));
        assert!(of("Z").iter().any(|x| x.contains("reads `Y1`")), "{:?}", of("Z"));
        // Within the budget values stay small, so the time does: whatever is kept has at most that many factors.
        for (t, d) in &x.tensors {
            let mut n = 0;
            x.symbols.visit(d.value, &mut |_| {
                n += 1;
                true
            });
            assert!(n <= 4 * MAX_FACTORS, "{}: {n}", layer.tensors[*t].name);
        }
    }

    #[test]
    fn json_has_every_field_and_reads_back() {
        let m = parse(&samples::attention()).unwrap();
        let sizes = [("B", 1), ("G", 2), ("R", 4), ("M", 512), ("N", 512), ("E", 64), ("F", 64)];
        let options = Options {
            sizes: sizes.into_iter().map(|(k, v)| (k.to_string(), v)).collect(),
            target: DataSheet::named("h100"),
        };
        let mapped = Mapped {
            kernels: Some(1),
            mapping: Some("tile".into()),
            bytes: BTreeMap::from([("l2".to_string(), 1e9)]),
            predicted_us: Some(3.5),
        };
        let r = report(&m, &options, &BTreeMap::from([("attention".to_string(), mapped)]));
        let json = to_json(&r);
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), r);
        let v: serde_json::Value = serde_json::from_str(&json).unwrap();
        let c = &v["cascades"][0];
        assert_eq!(v["version"], VERSION);
        for key in ["name", "ranks", "reductions", "io", "refusals", "kernels", "mapping", "predicted_us"] {
            assert!(c.get(key).is_some(), "{key}");
        }
        let bound = c["io"].as_array().unwrap().iter().find(|b| b["mapping_bytes"] == 1e9).unwrap();
        let ratio = bound["mapping_bytes"].as_f64().unwrap() / bound["lower_bound_bytes"].as_f64().unwrap();
        assert_eq!(bound["ratio"], ratio);
        assert!(bound["level"] == "l2" && ratio > 1.0);
        let bare = report(&m, &Options::default(), &BTreeMap::new());
        let v: serde_json::Value = serde_json::from_str(&to_json(&bare)).unwrap();
        assert!(v["cascades"][0]["mapping"].is_null() && v["cascades"][0]["predicted_us"].is_null());
        assert!(to_text(&r).contains("rolling, lazy, tree"));
    }
}
