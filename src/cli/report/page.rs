//! The page: one HTML file with its style and its plots in it.
//!
//! Invariant: it loads nothing and runs no script; every text that comes from elsewhere is escaped.

use std::fmt::Write;

use einfall_autotune::tune::rank_correlation;

use super::chart::{Plot, escaped, number, range};
use super::measured::{Measured, Point, Tuned};
use super::story::Story;
use super::{Family, named};

const STYLE: &str = include_str!("page.css");

/// The page.
pub fn page(tables: &[Family], measured: &[Measured], tuned: &[Vec<Tuned>], stories: &[Story]) -> String {
    let tuned: Vec<&Tuned> = tuned.iter().flatten().collect();
    let mut body = String::new();
    let mut contents = Vec::new();
    let mut section = |id: &str, title: &str, text: String| {
        if !text.is_empty() {
            contents.push(format!("<li><a href=\"#{id}\">{}</a></li>", escaped(title)));
            let _ = writeln!(body, "<section id=\"{id}\">\n<h2>{}</h2>\n{text}</section>", escaped(title));
        }
    };
    section("peers", "How fast: against other libraries", peers(tables));
    section("rooflines", "How far from the hardware's limits: rooflines", measured.iter().map(roofline).collect());
    section("predictions", "How well times are predicted", predictions(measured, &tuned));
    section("passes", "Passes over the data, before and after", passes(stories));
    section("derivations", "Derivations, step by step", stories.iter().map(derivation).collect());
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>Einfall report</title>\n\
<style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>Einfall report</h1>\n\
<p>Einfall compiles <em>cascades of Einsums</em>, what a sequence model computes written as on paper, into kernels. \
It works out how many passes over the data a cascade needs, derives the form that needs the fewest, and chooses how \
that form lies on a device. This page shows what was measured and how each kernel came about. It was written by \
<code>einfall report --html</code> (version {}) and loads nothing.</p>\n<nav><ol>\n{}\n</ol></nav>\n</header>\n<main>\n\
{body}</main>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION"),
        contents.join("\n")
    )
}

/// What families of benchmarks are called here.
fn family(name: &str) -> &str {
    match name {
        "gemm" => "Matrix products",
        "attn_fwd" => "Attention, forward",
        "attn_decode" => "Attention, one new query a sequence (decode)",
        "norm" => "Normalisations",
        "rnn_fwd" => "Recurrent cells",
        "ceilings" => "Ceilings of the device",
        other => other,
    }
}

fn peers(tables: &[Family]) -> String {
    if tables.is_empty() {
        return String::new();
    }
    let mut text = String::from(
        "<p>Each row is one problem; times are medians. The bar is the best peer's time over ours: beyond the line at 1 \
Einfall is faster. Brackets hold the interval that repeated runs span. In parentheses: the mapping file that was \
fastest, or <em>model</em> where the mapping was Einfall's own choice, and the peer.</p>\n",
    );
    for t in tables {
        let rows: Vec<_> = t.cases.iter().filter(|c| c.ours.is_some()).collect();
        if rows.is_empty() {
            continue;
        }
        let _ = writeln!(
            text,
            "<h3>{} <small>on {}</small></h3>\n<table>\n<thead><tr><th>case</th><th>Einfall</th><th>best peer</th>\
<th>ratio</th><th class=\"wide\"><span class=\"sr\">bar</span></th></tr></thead>\n<tbody>",
            escaped(family(&t.name)),
            escaped(&t.device)
        );
        for c in rows {
            let (ratio, bar) = match c.ratio() {
                Some((r, low, high)) => {
                    let class = if r >= 1.0 { "good" } else { "bad" };
                    // Twice as fast fills the cell; the line at 1 is in its middle.
                    let width = (r / 2.0).clamp(0.01, 1.0) * 100.0;
                    let bar = format!("<div class=\"bar\"><i class=\"{class}\" style=\"width:{width:.1}%\"></i></div>");
                    (format!("{r:.2} <small>[{low:.2}, {high:.2}]</small>"), bar)
                }
                None => ("–".to_owned(), String::new()),
            };
            let _ = writeln!(
                text,
                "<tr><th>{}</th><td>{}</td><td>{}</td><td>{ratio}</td><td>{bar}</td></tr>",
                escaped(&c.case),
                escaped(&named(c.ours.as_ref())),
                escaped(&named(c.peer.as_ref()))
            );
        }
        text += "</tbody>\n</table>\n";
    }
    text
}

/// Operations per byte and operations per second of a point.
fn place(p: &Point) -> (f64, f64) {
    (p.operations / p.bytes, p.operations / p.measured_us * 1e6)
}

fn roofline(m: &Measured) -> String {
    if m.points.is_empty() {
        return String::new();
    }
    let memory = m.sheet.level("dram").map_or(1e11, |l| l.bandwidth);
    let mut peaks: Vec<(&'static str, f64)> = Vec::new();
    for p in &m.points {
        let dtype = p.dtype.unwrap_or(einfall_ir::dtype::DType::F32);
        let known = m.sheet.peak_of(dtype).map(|peak| (dtype.name(), peak));
        if let Some(new) = known.filter(|n| !peaks.iter().any(|x| x.0 == n.0)) {
            peaks.push(new);
        }
    }
    let top = peaks.iter().map(|p| p.1).fold(memory, f64::max);
    let (x, y): (Vec<f64>, Vec<f64>) = m.points.iter().map(place).unzip();
    // Ridges are in the picture, so that both sides of each roof are.
    let ridges = peaks.iter().map(|p| p.1 / memory);
    let (x_lo, x_hi) = range(x.iter().copied().chain(ridges));
    let (y_lo, _) = range(y.iter().copied());
    let tera = 1e12;
    let mut plot = Plot::new(
        (x_lo, x_hi),
        (y_lo / tera, top * 1.6 / tera),
        ("operations per byte of device memory", "10¹² operations per second"),
    );
    for (name, peak) in &peaks {
        let ridge = peak / memory;
        let slope = (x_lo, memory * x_lo / tera);
        let label = format!("{name} peak {} TFLOP/s", number(peak / tera));
        plot.line(&[slope, (ridge.min(x_hi), memory * ridge.min(x_hi) / tera), (x_hi, peak / tera)], "roof", &label);
    }
    let mut rows = String::new();
    for (i, p) in m.points.iter().enumerate() {
        let (at, rate) = place(p);
        let roof = p.dtype.and_then(|d| m.sheet.peak_of(d)).unwrap_or(top).min(memory * at);
        let share = 100.0 * rate / roof;
        let (tag, tera_rate) = ((i + 1).to_string(), rate / tera);
        let tooltip = format!("{}: {:.1} µs, {share:.0} % of the roof", p.name, p.measured_us);
        plot.dot(at, tera_rate, "ours", &tooltip, &tag);
        let bound = if memory * at < roof * 1.0001 { "memory" } else { "arithmetic" };
        let _ = writeln!(
            rows,
            "<tr><td>{tag}</td><th>{}</th><td>{:.1}</td><td>{}</td><td>{}</td><td>{bound}</td><td>{share:.0} %</td></tr>",
            escaped(&p.name),
            p.measured_us,
            number(at),
            number(tera_rate)
        );
    }
    let title = format!("Roofline of {}", m.device);
    let stale = match m.stale {
        0 => String::new(),
        n => format!(
            "<p class=\"note\">{n} entries of the table are for plans that the compiler does not make any more.</p>\n"
        ),
    };
    format!(
        "<h3>{}</h3>\n<p>A point is a kernel's measured rate over the operations it does for each byte it moves. No point \
can lie above the roof: the slanted part is what device memory delivers ({} GB/s), the flat part what the arithmetic \
units do. The closer to the roof, the less is left to gain; a kernel far below it waits for something else, a recurrence for \
its own previous step. Bytes are counted by the analysis of the mapping; operations \
are those of contractions that are needed.</p>\n<figure>{}</figure>\n<table>\n<thead><tr><th>#</th><th>kernel</th><th>µs</th><th>operations per byte</th><th>10¹²/s</th><th>bound by</th>\
<th>of the roof</th></tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n{stale}",
        escaped(&m.device),
        number(memory / 1e9),
        plot.finish(&title)
    )
}

fn predictions(measured: &[Measured], tuned: &[&Tuned]) -> String {
    let mut text = String::new();
    let head = "<p>The model prices a mapping before anything runs. On the diagonal it is right; what counts for choosing is \
that slower mappings are predicted slower.</p>\n";
    for m in measured {
        let pairs = m.points.iter().filter_map(|p| Some((p.predicted_us?, p.measured_us, p)));
        let pairs: Vec<(f64, f64, &Point)> = pairs.collect();
        if pairs.is_empty() {
            continue;
        }
        let (lo, hi) = range(pairs.iter().flat_map(|p| [p.0, p.1]));
        let mut plot = Plot::new((lo, hi), (lo, hi), ("predicted µs", "measured µs"));
        plot.line(&[(lo, lo), (hi, hi)], "diagonal", "");
        for (predicted, us, p) in &pairs {
            let tooltip = format!("{}: predicted {predicted:.1} µs, measured {us:.1} µs", p.name);
            plot.dot(*predicted, *us, "ours", &tooltip, "");
        }
        let title = format!("Predicted against measured on {}", m.device);
        let mut off: Vec<f64> = pairs.iter().map(|(p, us, _)| (p / us).max(us / p) - 1.0).collect();
        off.sort_by(f64::total_cmp);
        let _ = writeln!(
            text,
            "<h3>Fastest mappings <small>on {}</small></h3>\n<figure>{}</figure>\n<p class=\"note\">{} of {} entries have a price; \
it is {:.0} % off at the median and {:.0} % at worst. The others are mappings that the model does not admit.</p>",
            escaped(&m.device),
            plot.finish(&title),
            pairs.len(),
            m.points.len(),
            100.0 * off[off.len() / 2],
            100.0 * off[off.len() - 1]
        );
    }
    for t in tuned {
        let (lo, hi) = range(t.pairs.iter().flat_map(|p| [p.1, p.2]));
        let mut plot = Plot::new((lo, hi), (lo, hi), ("predicted µs", "measured µs"));
        plot.line(&[(lo, lo), (hi, hi)], "diagonal", "");
        for (origin, predicted, us) in &t.pairs {
            let tooltip = format!("{origin}: predicted {predicted:.1} µs, measured {us:.1} µs");
            plot.dot(*predicted, *us, origin, &tooltip, "");
        }
        let drawn: Vec<(f64, f64)> = t.pairs.iter().filter(|p| p.0 == "drawn").map(|p| (p.1, p.2)).collect();
        let rho = rank_correlation(&drawn).map_or(String::new(), |r| {
            format!(" Rank correlation over {} mappings drawn at random: {r:.2}.", drawn.len())
        });
        let title = format!("Predicted against measured: {}", t.name);
        let _ = writeln!(
            text,
            "<h3>{} <small>on {}</small></h3>\n<figure>{}</figure>\n<p class=\"note\"><span class=\"key model\">●</span> the model's \
cheapest <span class=\"key drawn\">●</span> drawn from all it admits <span class=\"key given\">●</span> given.{rho}</p>",
            escaped(&t.name),
            escaped(&t.device),
            plot.finish(&title)
        );
    }
    if text.is_empty() { text } else { head.to_owned() + &text }
}

/// A count, or a dash.
fn count(n: Option<usize>) -> String {
    n.map_or("–".to_owned(), |n| n.to_string())
}

fn passes(stories: &[Story]) -> String {
    let mut rows = String::new();
    let mut alike = Vec::new();
    for s in stories {
        let mut any = false;
        for (rank, r) in &s.report.ranks {
            // A rank that nothing reduces over has no second pass to save.
            if r.passes_before <= r.passes_after || r.passes_after == Some(0) {
                continue;
            }
            any = true;
            let anchors = r.anchors.as_ref().filter(|a| !a.is_empty()).map_or("–".to_owned(), |a| a.join(", "));
            let name = escaped(&s.report.name);
            let link = match s.derived.is_empty() {
                true => name,
                false => format!("<a href=\"#d-{name}\">{name}</a>"),
            };
            let _ = writeln!(
                rows,
                "<tr><th>{link}</th><td>{}</td><td>{}</td><td><b>{}</b></td><td>{}</td><td>{}</td></tr>",
                escaped(rank),
                count(r.passes_before),
                count(r.passes_after),
                count(r.separation_rank),
                escaped(&anchors)
            );
        }
        if !any {
            alike.push(escaped(&s.report.name));
        }
    }
    format!(
        "<p>A cascade that reduces over a rank and then uses the result beside the same elements must read them again: \
another <em>pass</em>. Where the summand separates into few products of a factor that depends on the element and one that \
does not (J products, the <em>separation rank</em>), partial sums can be carried and repaired instead, and one pass is enough. An \
<em>anchor</em> is a running extremum that sums are carried relative to, so that nothing overflows; its policy says when it moves.</p>\n\
<table>\n<thead><tr><th>cascade</th><th>rank</th><th>passes as written</th><th>after</th><th>J</th><th>anchor policies</th></tr></thead>\n\
<tbody>\n{rows}</tbody>\n</table>\n<p class=\"note\">Nothing to gain, or nothing that is exact: {}.</p>\n",
        alike.join(", ")
    )
}

fn derivation(s: &Story) -> String {
    if s.derived.is_empty() {
        return String::new();
    }
    let name = escaped(&s.report.name);
    let saved = s.derived.iter().map(|d| {
        let r = &s.report.ranks[&d.rank];
        format!("{} → {} over {}", count(r.passes_before), count(r.passes_after), escaped(&d.rank))
    });
    let saved: Vec<String> = saved.collect();
    let mut text = format!(
        "<details id=\"d-{name}\">\n<summary><b>{name}</b>: {}</summary>\n<ol class=\"steps\">\n<li><h4>As written</h4>\n<pre>{}</pre></li>\n",
        saved.join(", "),
        escaped(&s.text)
    );
    let reductions: Vec<String> = s
        .report
        .reductions
        .iter()
        .map(|r| {
            let j = r.separation_rank.map_or("no finite separation rank".to_owned(), |j| format!("J = {j}"));
            format!("<li><code>{}</code> reduces {}: {j}</li>", escaped(&r.einsum), escaped(&r.over.join(", ")))
        })
        .collect();
    let _ = writeln!(
        text,
        "<li><h4>What each reduction's summand separates into</h4>\n<ul>{}</ul></li>",
        reductions.concat()
    );
    for d in &s.derived {
        let accumulators: Vec<String> = d
            .accumulators
            .iter()
            .map(|(n, op, repaired)| {
                let repair = if *repaired { ", rescaled when its anchor moves" } else { "" };
                format!("<li><code>{}</code>: {op}{repair}</li>", escaped(n))
            })
            .collect();
        let anchors = match d.anchors.as_slice() {
            [] => "Nothing needs an anchor.".to_owned(),
            list => format!("Anchor: <code>{}</code>, the running extremum.", escaped(&list.join(", "))),
        };
        let _ = writeln!(
            text,
            "<li><h4>What is carried over {}</h4>\n<p>{anchors}</p><ul>{}</ul></li>\n<li><h4>The derived form over {}</h4>\n\
<p>The same outputs, wherever the text's are finite; checked against it symbolically.</p>\n<pre>{}</pre></li>",
            escaped(&d.rank),
            accumulators.concat(),
            escaped(&d.rank),
            escaped(&d.text)
        );
    }
    match &s.plan {
        Ok(plan) => {
            let _ = writeln!(
                text,
                "<li><h4>Kernels over tiles</h4>\n<p>What <code>form-kernels</code> and the passes after it make of it: grid axes \
are cut over tasks, a stream walks its axis block by block.</p>\n<pre>{}</pre></li>",
                escaped(plan)
            );
        }
        Err(why) => {
            let _ = writeln!(text, "<li><h4>No kernels yet</h4>\n<p>{}</p></li>", escaped(why));
        }
    }
    text + "</ol>\n</details>\n"
}

#[cfg(test)]
mod tests {
    use super::super::{Compared, Times};
    use super::*;

    #[test]
    fn a_page_stands_alone_and_shows_every_section() {
        let times = |ms: f64| Times { ms: vec![ms], rate: Some((ms, 100.0, "GB/s")) };
        let compared =
            Compared { case: "a<b".into(), ours: Some(("m".into(), times(1.0))), peer: Some(("p".into(), times(1.5))) };
        let table = Family { device: "d".into(), name: "norm".into(), cases: vec![compared] };
        let point = Point {
            name: "matmul M=8".into(),
            measured_us: 2.0,
            predicted_us: Some(1.0),
            operations: 1e9,
            dtype: Some(einfall_ir::dtype::DType::BF16),
            bytes: 1e6,
        };
        let sheet = einfall_ir::target::DataSheet::h100();
        let m = Measured { device: "d".into(), sheet, points: vec![point], stale: 1 };
        let pairs = (1..6).map(|i| ("drawn".to_owned(), f64::from(i), f64::from(i * i))).collect();
        let tuned = Tuned { device: "d".into(), name: "t".into(), pairs };
        let stories = super::super::story::library().unwrap_or_default();
        let text = page(&[table], &[m], &[vec![tuned]], &stories);
        for part in
            ["a&lt;b", "1.50", "Roofline of d", "100 % at worst", "Rank correlation over 5", "id=\"d-attention\""]
        {
            assert!(text.contains(part), "{part}");
        }
        assert!(text.contains("1 entries of the table are for plans"));
        for loads in ["http://", "https://", "<script", "src=", "@import", "url("] {
            assert!(!text.contains(loads), "{loads}");
        }
        // Every link of the page leads somewhere in it.
        for link in text.split("href=\"#").skip(1).filter_map(|t| t.split('"').next()) {
            assert!(text.contains(&format!("id=\"{link}\"")), "{link}");
        }
    }
}
