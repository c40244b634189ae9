//! What is printed: similarities, and a table of kernels.
//!
//! Invariant: every number is measured, counted from the plan at the sizes launched, or proved by an analysis of the
//! cascade; what is not known is `-`.

use std::collections::BTreeMap;
use std::fmt::Write;

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use einfall::Kernel;
use einfall::ir::analysis::passes;
use einfall::ir::cascade::Size;
use einfall::ir::tile::{self, Node};

use crate::encoder::{Encoder, Stats};

/// Sentences up to this many are compared in a matrix with their texts under it.
const WIDTH: usize = 60;

/// The matrix of similarities, and the sentences by number.
pub fn similarities(sentences: &[&str], cosines: &[f32]) -> String {
    let n = sentences.len();
    let mut out = String::from("Cosine similarities\n\n");
    let digits = n.to_string().len();
    let _ = write!(out, "{:>digits$} ", "");
    for j in 1..=n {
        let _ = write!(out, " {j:>6}");
    }
    out.push('\n');
    for (i, row) in cosines.chunks(n.max(1)).enumerate() {
        let _ = write!(out, "{:>digits$} ", i + 1);
        for c in row {
            let _ = write!(out, " {c:>6.3}");
        }
        let text: String = sentences[i].chars().take(WIDTH).collect();
        let more = if sentences[i].chars().count() > WIDTH { "…" } else { "" };
        let _ = writeln!(out, "  {text}{more}");
    }
    out
}

/// Embeddings as JSON, one array per line.
pub fn embeddings(vectors: &[f32], hidden: usize) -> String {
    let mut out = String::new();
    for row in vectors.chunks(hidden.max(1)) {
        let numbers: Vec<String> = row.iter().map(f32::to_string).collect();
        let _ = writeln!(out, "[{}]", numbers.join(","));
    }
    out
}

/// The table of kernels: launches, time, rate, passes over the ranks that a kernel streams, traffic.
///
/// `passes` is how often a fiber of the streamed rank is traversed by the cascade as written, and by the kernel.
/// `I/O` is what the kernels of a cascade move with a perfect cache in each, over what any schedule must move: each
/// array that the cascade is given or returns, once.
pub fn kernels(encoder: &Encoder, stats: &Stats) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header(["kernel", "launches", "ms", "share", "GFLOP/s", "GB/s", "streams", "passes", "MB", "I/O ratio"]);
    for column in [1, 2, 3, 4, 5, 8, 9] {
        if let Some(c) = table.column_mut(column) {
            c.set_cell_alignment(CellAlignment::Right);
        }
    }
    let all: f64 = stats.kernels.iter().map(|k| k.time.as_secs_f64()).sum();
    let mut seen = BTreeMap::new();
    for k in &stats.kernels {
        let compiled = match k.cascade {
            "embed" => &encoder.embed,
            "layer" => &encoder.layer,
            "pool" => &encoder.pool,
            _ => &encoder.similarity,
        };
        let kernel = &compiled.plan().kernels[k.index];
        let (streams, passes) = streamed(compiled, kernel);
        let seconds = k.time.as_secs_f64();
        let moved: f64 = stats.kernels.iter().filter(|o| o.cascade == k.cascade).map(|o| o.bytes).sum();
        let bound = stats.lower_bound_bytes.iter().find(|(name, _)| *name == k.cascade).map(|(_, b)| *b);
        let ratio = match (seen.insert(k.cascade, ()), bound) {
            (None, Some(bound)) if bound > 0.0 => format!("{:.2}", moved / bound),
            _ => String::new(),
        };
        table.add_row([
            format!("{}.{}", k.cascade, kernel.name),
            k.launches.to_string(),
            format!("{:.2}", seconds * 1e3),
            format!("{:.0} %", 100.0 * seconds / all.max(f64::MIN_POSITIVE)),
            format!("{:.2}", k.flops / seconds.max(1e-9) / 1e9),
            format!("{:.2}", k.bytes / seconds.max(1e-9) / 1e9),
            streams,
            passes,
            format!("{:.2}", k.bytes / 1e6),
            ratio,
        ]);
    }
    let mut out = table.trim_fmt();
    out.push_str(
        "\npasses: traversals of a fiber of the streamed rank by the cascade as written → by the kernel; I/O ratio: bytes the\n\
         kernels of a cascade move with a perfect cache in each, over its arrays once.\n",
    );
    out
}

/// The ranks that a kernel streams; for each, passes over it by the cascade as written, and how often this kernel walks
/// it.
fn streamed(compiled: &Kernel, kernel: &tile::Kernel) -> (String, String) {
    fn go(nodes: &[Node], axes: &mut Vec<(tile::AxisId, usize)>) {
        for node in nodes {
            if let Node::Stream(s) = node {
                match axes.iter_mut().find(|(axis, _)| *axis == s.axis) {
                    Some((_, n)) => *n += 1,
                    None => axes.push((s.axis, 1)),
                }
                go(&s.body, axes);
            }
        }
    }
    let cascade = compiled.cascade();
    let mut axes = Vec::new();
    go(&kernel.body, &mut axes);
    let (mut streams, mut counts) = (Vec::new(), Vec::new());
    for (axis, after) in axes {
        let axis = &kernel.axes[axis];
        let rank = match &axis.extent {
            Size::Rank(r) => Some(*r),
            Size::Const(_)
            | Size::Add(..)
            | Size::Sub(..)
            | Size::Mul(..)
            | Size::Div(..)
            | Size::CeilDiv(..)
            | Size::Min(..)
            | Size::Max(..) => None,
        };
        match rank {
            Some(r) => {
                streams.push(cascade.ranks[r].name.clone());
                counts.push(format!("{} → {after}", passes::passes_over(cascade, &[r]).max));
            }
            None => {
                streams.push(axis.name.clone());
                counts.push(format!("- → {after}"));
            }
        }
    }
    match streams.is_empty() {
        true => ("-".to_owned(), "-".to_owned()),
        false => (streams.join(", "), counts.join(", ")),
    }
}
