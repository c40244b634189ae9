//! How good the model's choices were: a row a case, and what the rows say together.
//!
//! Times of one case are medians of interleaved turns, so that what drifts drifts for all. Invariant: a figure is over the
//! cases that have it; how many those are is said with it.

use std::fmt::{self, Write};

/// One case.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judged {
    /// The cascade.
    pub cascade: String,
    /// Its sizes.
    pub sizes: String,
    /// Mappings that are right and measured.
    pub measured: usize,
    /// Mappings that are not.
    pub faults: usize,
    /// Microseconds of the fastest.
    pub best_us: f64,
    /// Its number among the candidates, which the model orders.
    pub winner: usize,
    /// Microseconds of the model's first choice.
    pub first_us: Option<f64>,
    /// Microseconds of the fastest of the first few measurements.
    pub few_us: Option<f64>,
    /// Seconds until those were done, compiling included.
    pub few_s: Option<f64>,
    /// Mappings drawn at random among the measured.
    pub draws: usize,
    /// Rank correlation of predicted and measured times over the draws.
    pub correlation: Option<f64>,
    /// How much slower the first choice was the last time than the first.
    pub drift: Option<f64>,
    /// Seconds of the whole search.
    pub seconds: f64,
}

impl Judged {
    /// The first choice's time over the fastest's.
    fn first(&self) -> Option<f64> {
        self.first_us.map(|us| us / self.best_us)
    }

    /// The best of the first few's time over the fastest's.
    fn few(&self) -> Option<f64> {
        self.few_us.map(|us| us / self.best_us)
    }
}

impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, best) = (format!("{} {}", self.cascade, self.sizes), self.best_us);
        write!(f, "{name}: {best:.2} µs by candidate {} of {}", self.winner, self.measured)?;
        if let (Some(us), Some(ratio)) = (self.first_us, self.first()) {
            write!(f, "; the model's first choice {us:.2} µs ({:+.0}%)", 100.0 * (ratio - 1.0))?;
        }
        if let Some(rho) = self.correlation {
            write!(f, "; rank correlation {rho:.2} over {} draws", self.draws)?;
        }
        if let Some(drift) = self.drift {
            write!(f, "; drift {:+.1}%", 100.0 * drift)?;
        }
        if self.faults > 0 {
            write!(f, "; {} do not work", self.faults)?;
        }
        write!(f, "; {:.1} s", self.seconds)
    }
}

/// The rows as CSV: times in microseconds, ratios to the fastest, seconds. Sizes are joined by blanks.
pub fn csv(rows: &[Judged]) -> String {
    let mut text = String::from(
        "cascade,sizes,measured,draws,best_us,winner,first_us,first_ratio,few_ratio,few_s,rank_correlation,drift,seconds\n",
    );
    let cell = |v: Option<f64>, digits: usize| v.map_or(String::new(), |v| format!("{v:.digits$}"));
    for r in rows {
        let _ = writeln!(
            text,
            "{},{},{},{},{:.3},{},{},{},{},{},{},{},{:.1}",
            r.cascade,
            r.sizes.replace(',', " "),
            r.measured,
            r.draws,
            r.best_us,
            r.winner,
            cell(r.first_us, 3),
            cell(r.first(), 3),
            cell(r.few(), 3),
            cell(r.few_s, 2),
            cell(r.correlation, 2),
            cell(r.drift, 3),
            r.seconds
        );
    }
    text
}

/// Median and most of a list; none for an empty one.
fn middle_and_most(list: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let mut list: Vec<f64> = list.collect();
    list.sort_by(f64::total_cmp);
    Some((*list.get(list.len() / 2)?, *list.last()?))
}

/// What the rows say together, in lines.
pub fn summary(rows: &[Judged]) -> String {
    let mut text = format!("{} cases", rows.len());
    let percent = |r: f64| 100.0 * (r - 1.0);
    if let Some((middle, most)) = middle_and_most(rows.iter().filter_map(Judged::first)) {
        let (middle, most) = (percent(middle), percent(most));
        let _ = write!(text, "; the first choice {middle:+.1}% at the median, {most:+.1}% at worst");
    }
    if let Some((middle, most)) = middle_and_most(rows.iter().filter_map(Judged::few)) {
        let (middle, most) = (percent(middle), percent(most));
        let _ = write!(text, "; after a few measurements {middle:+.1}%, {most:+.1}%");
    }
    if let Some((middle, most)) = middle_and_most(rows.iter().filter_map(|r| r.few_s)) {
        let _ = write!(text, " in {middle:.1} s, {most:.1} s");
    }
    if let Some((middle, _)) = middle_and_most(rows.iter().filter_map(|r| r.correlation)) {
        let least = rows.iter().filter_map(|r| r.correlation).fold(1.0, f64::min);
        let _ = write!(text, "; rank correlation {middle:.2} at the median, {least:.2} at worst");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_their_summary() {
        let row = |first: f64, few: f64, rho: Option<f64>| Judged {
            cascade: "c".into(),
            sizes: "M=1,N=2".into(),
            measured: 9,
            best_us: 10.0,
            first_us: Some(first),
            few_us: Some(few),
            few_s: Some(1.0),
            correlation: rho,
            ..Judged::default()
        };
        let rows = [row(10.0, 10.0, Some(0.5)), row(11.0, 10.0, None), row(13.0, 12.0, Some(0.9))];
        let text = csv(&rows);
        assert!(text.contains("c,M=1 N=2,9,0,10.000,0,13.000,1.300,1.200,1.00,0.90,,0.0"), "{text}");
        let columns = |l: &str| l.split(',').count();
        assert!(text.lines().all(|l| columns(l) == columns(text.lines().next().unwrap_or_default())), "{text}");
        let text = summary(&rows);
        for part in [
            "3 cases",
            "+10.0% at the median, +30.0% at worst",
            "0.90 at the median, 0.50 at worst",
            "+0.0%, +20.0% in 1.0 s",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
