//! `report`: result files of benchmarks, ours and the peers', joined into a table of ratios, as Markdown; and a page that
//! shows them beside rooflines, predictions, passes and derivations.
//!
//! Invariant: a table says nothing that is not in the files: rows join on family, case and device; the best peer is
//! the one with the least time; the ratio is its median time over ours, with the interval that the blocks span. A page is
//! one file that loads nothing.

mod chart;
mod measured;
mod page;
mod story;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::Failure;
use super::source::unreadable;
use super::text::write_whole;
pub use measured::without_splits;

/// Arguments of `report`.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  einfall report docs/results/*.jsonl > docs/benchmarks.md\n  \
einfall report docs/results/*.jsonl --table tables/h200.toml --html report.html")]
pub struct ReportArgs {
    /// Result files: a JSON object per line, as `einfall bench --jsonl` and the peers' script print them
    #[arg(required_unless_present = "html")]
    files: Vec<PathBuf>,
    /// Write a page instead of printing Markdown: one HTML file that opens without a network
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Tables of measured mappings, for the page's rooflines and predictions
    #[arg(long, value_name = "FILE", requires = "html")]
    table: Vec<PathBuf>,
    /// Measurements of `einfall tune --jsonl`, for the page's predictions
    #[arg(long, value_name = "FILE", requires = "html")]
    tuned: Vec<PathBuf>,
}

/// One line of a result file; other fields are left alone.
#[derive(Clone, Debug, serde::Deserialize)]
struct Line {
    family: String,
    #[serde(default)]
    case: String,
    #[serde(default)]
    peer: String,
    #[serde(default)]
    mapping: String,
    #[serde(default)]
    device: String,
    ms: Option<f64>,
    tflops: Option<f64>,
    gbps: Option<f64>,
    error: Option<String>,
}

/// The name our own lines have.
const OURS: &str = "einfall";

/// The times of one way to compute a case.
#[derive(Clone, Debug, Default, PartialEq)]
struct Times {
    ms: Vec<f64>,
    /// Work per time at one of the times: what the rate follows from.
    rate: Option<(f64, f64, &'static str)>,
}

impl Times {
    fn median(&self) -> f64 {
        let mut sorted = self.ms.clone();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0
    }

    fn text(&self) -> String {
        let ms = self.median();
        let rate = self.rate.map(|(at, rate, unit)| format!(", {:.0} {unit}", rate * at / ms)).unwrap_or_default();
        format!("{ms:.4} ms{rate}")
    }
}

/// Prints the tables, or writes the page.
pub fn report(args: &ReportArgs) -> Result<(), Failure> {
    let mut lines = Vec::new();
    for path in &args.files {
        lines.extend(objects::<Line>(path)?);
    }
    let tables = tables(&lines);
    if tables.is_empty() && !args.files.is_empty() {
        let files: Vec<String> = args.files.iter().map(|p| p.display().to_string()).collect();
        let what = "holds no timed case; `einfall bench --jsonl FILE` writes such files";
        return Err(Failure::Wrong(format!("{}: {what}", files.join(", "))));
    }
    let Some(out) = &args.html else {
        print!("{}", markdown(&tables));
        return Ok(());
    };
    let measured = args.table.iter().map(|p| measured::of_table(p)).collect::<Result<Vec<_>, _>>()?;
    let tuned = args.tuned.iter().map(|p| measured::of_records(p)).collect::<Result<Vec<_>, _>>()?;
    let text = page::page(&tables, &measured, &tuned, &story::library()?);
    write_whole(out, text.as_bytes())?;
    println!("{}: {} bytes", out.display(), text.len());
    Ok(())
}

/// The JSON objects of a file, one a line; other lines are left alone.
fn objects<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>, Failure> {
    let text = std::fs::read_to_string(path).map_err(|e| unreadable(path, &e))?;
    let numbered = text.lines().enumerate().filter(|(_, l)| l.starts_with('{'));
    let read = |(i, line): (usize, &str)| {
        serde_json::from_str(line)
            .map_err(|e| Failure::Wrong(format!("{}:{}: not a line that einfall writes: {e}", path.display(), i + 1)))
    };
    numbered.map(read).collect()
}

/// One family of cases on one device.
#[derive(Clone, Debug, PartialEq)]
struct Family {
    device: String,
    name: String,
    cases: Vec<Compared>,
}

/// A case with the fastest of ours and of the peers, each by name.
#[derive(Clone, Debug, PartialEq)]
struct Compared {
    case: String,
    ours: Option<(String, Times)>,
    peer: Option<(String, Times)>,
}

impl Compared {
    /// The peer's median time over ours, and the least and most that repeated blocks span.
    fn ratio(&self) -> Option<(f64, f64, f64)> {
        let ((_, a), (_, b)) = (self.ours.as_ref()?, self.peer.as_ref()?);
        let least = |t: &Times| t.ms.iter().copied().fold(f64::INFINITY, f64::min);
        let most = |t: &Times| t.ms.iter().copied().fold(0.0, f64::max);
        Some((b.median() / a.median(), least(b) / most(a), most(b) / least(a)))
    }
}

/// A way's name and times, for a cell.
fn named(way: Option<&(String, Times)>) -> String {
    match way {
        Some((name, times)) if name.is_empty() => times.text(),
        Some((name, times)) => format!("{} ({name})", times.text()),
        None => "–".to_owned(),
    }
}

/// The tables of `lines`, one per device and family.
fn tables(lines: &[Line]) -> Vec<Family> {
    type Ways = BTreeMap<String, Times>;
    type Row<'a> = (&'a str, Ways, Ways);
    let mut cases: BTreeMap<(&str, &str), Vec<Row>> = BTreeMap::new();
    for line in lines.iter().filter(|l| !l.case.is_empty() && l.error.is_none()) {
        let Some(ms) = line.ms else { continue };
        let table = cases.entry((&line.device, &line.family)).or_default();
        let at = table.iter().position(|(c, _, _)| *c == line.case).unwrap_or_else(|| {
            table.push((&line.case, Ways::new(), Ways::new()));
            table.len() - 1
        });
        let (_, ours, peers) = &mut table[at];
        let (ways, name) = match line.peer == OURS {
            true => (ours, line.mapping.clone()),
            false => (peers, line.peer.clone()),
        };
        let times = ways.entry(name).or_default();
        times.ms.push(ms);
        let rate = line.tflops.map(|r| (r, "TFLOP/s")).or(line.gbps.map(|r| (r, "GB/s")));
        times.rate = times.rate.or(rate.map(|(r, unit)| (ms, r, unit)));
    }
    let best = |ways: Ways| ways.into_iter().min_by(|a, b| a.1.median().total_cmp(&b.1.median()));
    let compared = |(case, ours, peers): Row| Compared { case: case.to_owned(), ours: best(ours), peer: best(peers) };
    let family = |((device, name), rows): ((&str, &str), Vec<Row>)| Family {
        device: device.to_owned(),
        name: name.to_owned(),
        cases: rows.into_iter().map(compared).collect(),
    };
    cases.into_iter().map(family).collect()
}

/// The tables as Markdown.
fn markdown(tables: &[Family]) -> String {
    let mut text = String::from(
        "# Benchmarks\n\nGenerated by `einfall report` from the files in `docs/results`. The ratio is the best peer's \
median time over ours: above 1 is faster than the peer. Brackets: the interval that repeated blocks span.\n",
    );
    for table in tables {
        let head = "| case | Einfall | best peer | ratio |\n|---|---|---|---|\n";
        let _ = write!(text, "\n## {} on {}\n\n{head}", table.name, table.device);
        for row in &table.cases {
            let ratio = row.ratio().map_or("–".to_owned(), |(r, low, high)| format!("{r:.2} [{low:.2}, {high:.2}]"));
            let (ours, peer) = (named(row.ours.as_ref()), named(row.peer.as_ref()));
            let _ = writeln!(text, "| {} | {ours} | {peer} | {ratio} |", row.case);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_the_best_peers_time_over_ours() {
        let text = r#"{"family": "gemm", "case": "a", "peer": "cublas", "ms": 2.0, "tflops": 100.0, "device": "d"}
{"family": "gemm", "case": "a", "peer": "slow", "ms": 4.0, "tflops": 50.0, "device": "d"}
{"family": "gemm", "case": "a", "peer": "einfall", "mapping": "m", "block": 0, "ms": 2.5, "tflops": 80.0, "device": "d"}
{"family": "gemm", "case": "a", "peer": "einfall", "mapping": "m", "block": 1, "ms": 2.0, "tflops": 100.0, "device": "d"}
{"family": "gemm", "case": "a", "peer": "einfall", "mapping": "worse", "block": 0, "ms": 9.0, "device": "d"}
{"family": "gemm", "case": "b", "peer": "cublas", "error": "no", "device": "d"}
{"family": "env", "torch": "2"}"#;
        let lines: Vec<Line> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let report = markdown(&tables(&lines));
        let row = "| a | 2.2500 ms, 89 TFLOP/s (m) | 2.0000 ms, 100 TFLOP/s (cublas) | 0.89 [0.80, 1.00] |";
        assert!(report.contains(row), "{report}");
        assert!(!report.contains("| b |"), "a fault is no result");
    }
}
