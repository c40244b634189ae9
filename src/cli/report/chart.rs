//! Plots on logarithmic axes as inline SVG: lines, points with tooltips, ticks at decades.
//!
//! Colours and fonts come from the page's style sheet (classes `axis`, `grid`, `line`, `dot` and a class of the caller's),
//! so that a plot follows light and dark themes. Invariant: values that are not positive and finite are left out.

use std::fmt::Write;

/// Width and height of a plot in SVG units, and the margins left of and below the axes.
const SIZE: (f64, f64) = (760.0, 420.0);
const MARGIN: (f64, f64) = (70.0, 52.0);
/// Space above and right of the plot.
const EDGE: f64 = 16.0;

/// A plot under way.
pub struct Plot {
    x: (f64, f64),
    y: (f64, f64),
    labels: (String, String),
    body: String,
}

/// Text for HTML and SVG.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The least range that holds every value, with some room on either side; a decade where there is none.
pub fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (lo, hi) = values
        .filter(|v| v.is_finite() && *v > 0.0)
        .fold((f64::INFINITY, 0.0f64), |(lo, hi), v| (lo.min(v), hi.max(v)));
    if hi == 0.0 { (1.0, 10.0) } else { (lo / 1.6, hi * 1.6) }
}

/// A number as axes and tables show it.
pub fn number(v: f64) -> String {
    match v {
        v if v >= 1e6 => format!("{:.0}M", v / 1e6),
        v if v >= 1e4 => format!("{:.0}k", v / 1e3),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 1.0 => format!("{v:.1}").trim_end_matches(".0").to_owned(),
        v => format!("{v:.2}"),
    }
}

impl Plot {
    /// An empty plot over ranges of x and y with the names of its axes.
    pub fn new(x: (f64, f64), y: (f64, f64), labels: (&str, &str)) -> Plot {
        Plot { x, y, labels: (escaped(labels.0), escaped(labels.1)), body: String::new() }
    }

    fn place(&self, x: f64, y: f64) -> (f64, f64) {
        let share = |v: f64, (lo, hi): (f64, f64)| (v / lo).ln() / (hi / lo).ln();
        let (width, height) = (SIZE.0 - MARGIN.0 - EDGE, SIZE.1 - MARGIN.1 - EDGE);
        (MARGIN.0 + width * share(x, self.x), EDGE + height * (1.0 - share(y, self.y)))
    }

    fn holds(&self, x: f64, y: f64) -> bool {
        let inside = |v: f64, (lo, hi): (f64, f64)| v.is_finite() && v >= lo * 0.999 && v <= hi * 1.001;
        inside(x, self.x) && inside(y, self.y)
    }

    /// A line through points, with a label at its end where it has one.
    pub fn line(&mut self, points: &[(f64, f64)], class: &str, label: &str) {
        let clipped = |(x, y): (f64, f64)| (x.clamp(self.x.0, self.x.1), y.clamp(self.y.0, self.y.1));
        let places: Vec<(f64, f64)> = points.iter().map(|p| clipped(*p)).map(|(x, y)| self.place(x, y)).collect();
        let list: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(self.body, r#"<polyline class="line {class}" points="{}"/>"#, list.join(" "));
        if let (Some((x, y)), false) = (places.last(), label.is_empty()) {
            let text = escaped(label);
            let _ = writeln!(
                self.body,
                r#"<text class="tag {class}" x="{:.1}" y="{:.1}" text-anchor="end">{text}</text>"#,
                x - 4.0,
                y - 6.0
            );
        }
    }

    /// A point with what is shown when it is pointed at, and a short tag beside it.
    pub fn dot(&mut self, x: f64, y: f64, class: &str, tooltip: &str, tag: &str) {
        if !self.holds(x, y) {
            return;
        }
        let (px, py) = self.place(x, y);
        let _ = writeln!(
            self.body,
            r#"<circle class="dot {class}" cx="{px:.1}" cy="{py:.1}" r="4.5"><title>{}</title></circle>"#,
            escaped(tooltip)
        );
        if !tag.is_empty() {
            let _ = writeln!(
                self.body,
                r#"<text class="tag" x="{:.1}" y="{:.1}">{}</text>"#,
                px + 7.0,
                py + 4.0,
                escaped(tag)
            );
        }
    }

    /// The SVG element; `title` says in words what it shows, for readers that do not see it.
    pub fn finish(self, title: &str) -> String {
        let mut out =
            format!("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">\n", SIZE.0, SIZE.1, escaped(title));
        let (left, top) = (MARGIN.0, EDGE);
        let (right, bottom) = (SIZE.0 - EDGE, SIZE.1 - MARGIN.1);
        for v in ticks(self.x) {
            let (x, _) = self.place(v, self.y.0);
            let _ = writeln!(out, r#"<line class="grid" x1="{x:.1}" y1="{top}" x2="{x:.1}" y2="{bottom}"/>"#);
            let _ = writeln!(
                out,
                r#"<text class="axis" x="{x:.1}" y="{}" text-anchor="middle">{}</text>"#,
                bottom + 18.0,
                number(v)
            );
        }
        for v in ticks(self.y) {
            let (_, y) = self.place(self.x.0, v);
            let _ = writeln!(out, r#"<line class="grid" x1="{left}" y1="{y:.1}" x2="{right}" y2="{y:.1}"/>"#);
            let _ = writeln!(
                out,
                r#"<text class="axis" x="{}" y="{:.1}" text-anchor="end">{}</text>"#,
                left - 8.0,
                y + 4.0,
                number(v)
            );
        }
        let (middle, centre) = ((left + right) / 2.0, (top + bottom) / 2.0);
        let _ = writeln!(
            out,
            r#"<text class="axis" x="{middle}" y="{}" text-anchor="middle">{}</text>"#,
            SIZE.1 - 8.0,
            self.labels.0
        );
        let _ = writeln!(
            out,
            r#"<text class="axis" transform="translate(16 {centre}) rotate(-90)" text-anchor="middle">{}</text>"#,
            self.labels.1
        );
        out += &self.body;
        out += "</svg>\n";
        out
    }
}

/// Ticks of a range: decades, with 2 and 5 between them where there are few.
fn ticks((lo, hi): (f64, f64)) -> Vec<f64> {
    let decades = (hi / lo).log10();
    let steps: &[f64] = if decades < 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let first = lo.log10().floor() as i32;
    let last = hi.log10().ceil() as i32;
    let all = (first..=last).flat_map(|d| steps.iter().map(move |s| s * 10f64.powi(d)));
    all.filter(|v| *v >= lo && *v <= hi).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_lie_where_the_axes_say() {
        let mut p = Plot::new((1.0, 100.0), (1.0, 100.0), ("x", "y"));
        p.dot(10.0, 10.0, "a", "<middle>", "1");
        p.dot(0.0, 10.0, "a", "nowhere on such an axis", "");
        p.dot(f64::NAN, 1.0, "a", "nowhere", "");
        let svg = p.finish("a & b");
        let (x, y) = (MARGIN.0 + (SIZE.0 - MARGIN.0 - EDGE) / 2.0, EDGE + (SIZE.1 - MARGIN.1 - EDGE) / 2.0);
        assert!(svg.contains(&format!(r#"cx="{x:.1}" cy="{y:.1}""#)), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 1);
        assert!(svg.contains("&lt;middle&gt;") && svg.contains("a &amp; b"));
    }

    #[test]
    fn ticks_are_round_numbers_within_the_range() {
        assert_eq!(ticks((0.9, 11.0)), [1.0, 2.0, 5.0, 10.0]);
        assert_eq!(ticks((1.0, 1e4)), [1.0, 10.0, 100.0, 1000.0, 10000.0]);
        assert_eq!(range([3.0, 0.0, f64::NAN].into_iter()), (3.0 / 1.6, 3.0 * 1.6));
        assert_eq!(range(std::iter::empty()), (1.0, 10.0));
    }
}
