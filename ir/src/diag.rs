//! Diagnostics: what is wrong, where in the source, and what to write instead.
//!
//! Invariant: every error a user can cause carries a span into the text it came from and a help line.

use std::fmt;
use std::ops::Deref;

use annotate_snippets::{Annotation, AnnotationKind, Group, Level, Renderer, Snippet};

/// A byte range of a source text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Span {
    /// First byte.
    pub start: u32,
    /// One past the last byte.
    pub end: u32,
}

impl Span {
    /// The range `start..end`.
    pub fn new(start: usize, end: usize) -> Span {
        Span { start: start as u32, end: end as u32 }
    }

    /// The smallest range that holds both.
    pub fn to(self, other: Span) -> Span {
        Span { start: self.start.min(other.start), end: self.end.max(other.end) }
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// The text is refused.
    Error,
    /// The text is accepted but probably not what was meant.
    Warning,
}

/// One message about a source text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// Stable code, e.g. `E0104`, documented in docs/language.md.
    pub code: &'static str,
    /// What is wrong, one sentence without a full stop.
    pub message: String,
    /// Where, with what to say at that place.
    pub primary: (Span, String),
    /// Further places that explain it.
    pub secondary: Vec<(Span, String)>,
    /// What to write instead.
    pub help: Option<String>,
    /// The rule that an infeasible mapping breaks, e.g. `resources`; none of what is wrong otherwise.
    pub constraint: Option<&'static str>,
}

impl Diagnostic {
    /// An error at `span`.
    pub fn error(code: &'static str, span: Span, message: impl Into<String>) -> Diagnostic {
        Diagnostic {
            severity: Severity::Error,
            code,
            message: message.into(),
            primary: (span, String::new()),
            secondary: Vec::new(),
            help: None,
            constraint: None,
        }
    }

    /// Adds the words shown at the primary place.
    pub fn label(mut self, text: impl Into<String>) -> Diagnostic {
        self.primary.1 = text.into();
        self
    }

    /// Adds a further place.
    pub fn also(mut self, span: Span, text: impl Into<String>) -> Diagnostic {
        self.secondary.push((span, text.into()));
        self
    }

    /// Says what to write instead.
    pub fn help(mut self, text: impl Into<String>) -> Diagnostic {
        self.help = Some(text.into());
        self
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)?;
        match &self.help {
            Some(help) => write!(f, " ({help})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Diagnostic {}

/// All that is wrong with a text: a reader's error. It holds the text, so that it shows places by itself; as a slice it is
/// the single diagnostics.
///
/// ```
/// use einfall_ir::cascade;
///
/// fn read(text: &str) -> Result<cascade::Module, Box<dyn std::error::Error>> {
///     Ok(cascade::parse(text)?)
/// }
///
/// let text = "cascade c[M](x: f32[M]) -> (y: f32[M]) {\n    y[m] = z[m]\n}";
/// let shown = read(text).expect_err("there is no z").to_string();
/// assert!(shown.contains("error[E0230]") && shown.contains("2 |     y[m] = z[m]"), "{shown}");
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Diagnostics {
    list: Vec<Diagnostic>,
    source: Option<Box<str>>,
}

impl Diagnostics {
    /// Diagnostics about a text.
    pub fn new(list: Vec<Diagnostic>, source: &str) -> Diagnostics {
        Diagnostics { list, source: Some(source.into()) }
    }

    /// With their places, as [`render`] shows them; without, if they are about no text.
    pub fn render(&self, file_name: &str) -> String {
        match &self.source {
            Some(source) => render(&self.list, file_name, source),
            None => self.list.iter().map(|d| format!("{d}\n")).collect(),
        }
    }
}

/// Diagnostics about something that was not read from a text.
impl From<Vec<Diagnostic>> for Diagnostics {
    fn from(list: Vec<Diagnostic>) -> Diagnostics {
        Diagnostics { list, source: None }
    }
}

impl From<Diagnostics> for Vec<Diagnostic> {
    fn from(d: Diagnostics) -> Vec<Diagnostic> {
        d.list
    }
}

impl Deref for Diagnostics {
    type Target = [Diagnostic];

    fn deref(&self) -> &[Diagnostic] {
        &self.list
    }
}

impl<'a> IntoIterator for &'a Diagnostics {
    type Item = &'a Diagnostic;
    type IntoIter = std::slice::Iter<'a, Diagnostic>;

    fn into_iter(self) -> Self::IntoIter {
        self.list.iter()
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.render("text").trim_end())
    }
}

/// As it is displayed: what `unwrap` and a failing `main` print is for people.
impl fmt::Debug for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n{self}")
    }
}

impl std::error::Error for Diagnostics {}

/// The diagnostics as text for a terminal without colours: code and message, file, line and column, the line itself
/// with the places marked, and what to write instead. `file_name` is shown as given; spans outside `source` are moved
/// to its end.
///
/// ```
/// use einfall_ir::{cascade::parse, diag::render};
///
/// let text = "cascade c[M](x: f32[M]) -> (y: f32[M]) { y[m] = z[m] }";
/// let shown = render(&parse(text).expect_err("there is no z"), "c.ein", text);
/// assert!(shown.contains("E0230") && shown.contains("c.ein:1:49"), "{shown}");
/// ```
pub fn render(diagnostics: &[Diagnostic], file_name: &str, source: &str) -> String {
    let mut out = String::new();
    for d in diagnostics {
        let range = |s: Span| {
            let clamp = |mut at: usize| {
                at = at.min(source.len());
                while !source.is_char_boundary(at) {
                    at -= 1;
                }
                at
            };
            let (start, end) = (clamp(s.start as usize), clamp(s.end as usize));
            start..end.max(start)
        };
        let note = |kind: AnnotationKind, (span, label): &(Span, String)| -> Annotation<'_> {
            let a = kind.span(range(*span));
            if label.is_empty() { a } else { a.label(label.clone()) }
        };
        let level = match d.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let mut snippet = Snippet::source(source).path(file_name).annotation(note(AnnotationKind::Primary, &d.primary));
        for place in &d.secondary {
            snippet = snippet.annotation(note(AnnotationKind::Context, place));
        }
        let mut group: Group<'_> = level.primary_title(d.message.as_str()).id(d.code).element(snippet);
        if let Some(help) = &d.help {
            group = group.element(Level::HELP.message(help.as_str()));
        }
        out.push_str(&Renderer::plain().render(&[group]));
        out.push_str("\n\n");
    }
    out
}
