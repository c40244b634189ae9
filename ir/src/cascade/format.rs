//! The syntax tree to text, and `format`: the same with the comments of a source put back.
//!
//! One statement a line, indented by four; a header that does not fit on a line has one parameter a line; single blank
//! lines between statements stay; a comment inside a statement moves before it. Invariants: formatting is idempotent,
//! and what it writes parses to the same tree.

use super::parse::{parse_file, power};
use super::syntax::*;
use super::{PackOrder, Storage};
use crate::diag::{Diagnostics, Span};
use crate::ops::{ReduceOp, UnaryOp};
use crate::text::Comment;

/// The longest line a header or statement is kept on, in bytes.
const WIDTH: usize = 118;

/// `source` in the standard layout, comments kept.
///
/// ```
/// use einfall_ir::cascade::format;
///
/// let text = "cascade c[M](x:f32[M])->(y:f32[M]){y[m]=x[m]// kept\n}";
/// let tidy = format(text).expect("it parses");
/// assert_eq!(tidy, "cascade c[M](x: f32[M]) -> (y: f32[M]) {\n    y[m] = x[m] // kept\n}\n");
/// ```
///
/// # Errors
/// The diagnostics of a text that does not parse. Names and types are not checked.
pub fn format(source: &str) -> Result<String, Diagnostics> {
    let parsed = parse_file(source);
    if !parsed.diagnostics.is_empty() {
        return Err(Diagnostics::new(parsed.diagnostics, source));
    }
    let mut w = Writer { out: String::new(), indent: 0, source, comments: &parsed.comments, last_end: 0 };
    w.file(&parsed.file);
    Ok(w.out)
}

/// The text of a tree that came from no source.
pub fn file_text(file: &File) -> String {
    let mut w = Writer { out: String::new(), indent: 0, source: "", comments: &[], last_end: 0 };
    w.file(file);
    w.out
}

struct Writer<'a> {
    out: String,
    indent: usize,
    source: &'a str,
    /// Those not written yet.
    comments: &'a [Comment],
    /// Where in the source the last thing written ends.
    last_end: u32,
}

impl Writer<'_> {
    fn line(&mut self, text: &str) {
        for _ in 0..self.indent {
            self.out.push_str("    ");
        }
        self.out.push_str(text);
        self.out.push('\n');
    }

    /// Whether a blank line follows the last thing written.
    fn blank_follows(&self) -> bool {
        let rest = self.source.get(self.last_end as usize..).unwrap_or("");
        self.last_end > 0
            && rest.chars().take_while(|c| c.is_whitespace() || *c == ';').filter(|c| *c == '\n').count() >= 2
    }

    fn keep_blank(&mut self) {
        let at_start = self.out.is_empty() || self.out.ends_with("{\n") || self.out.ends_with("(\n");
        if self.blank_follows() && !at_start && !self.out.ends_with("\n\n") {
            self.out.push('\n');
        }
    }

    /// Writes the comments that stand before `place`, each on a line.
    fn comments_before(&mut self, place: u32) {
        while let Some((first, rest)) = self.comments.split_first() {
            if first.span.start >= place {
                break;
            }
            self.keep_blank();
            self.line(&first.text);
            self.last_end = first.span.end;
            self.comments = rest;
        }
    }

    /// Comments before and inside a statement, the blank line before it, and its docs.
    fn before(&mut self, span: Span, docs: &[String]) {
        self.comments_before(span.end);
        self.keep_blank();
        self.docs("///", docs);
    }

    /// Ends the last line with the comment that stands after `span` on its line, if there is one.
    fn after(&mut self, span: Span) {
        self.last_end = self.last_end.max(span.end);
        if let Some((first, rest)) = self.comments.split_first() {
            let between = self.source.get(self.last_end as usize..first.span.start as usize);
            if first.trailing && between.is_some_and(|t| t.chars().all(|c| " \t,;".contains(c))) {
                self.out.truncate(self.out.trim_end_matches('\n').len());
                self.out.push(' ');
                self.out.push_str(&first.text);
                self.out.push('\n');
                self.last_end = first.span.end;
                self.comments = rest;
            }
        }
    }

    fn docs(&mut self, mark: &str, docs: &[String]) {
        for d in docs {
            self.line(format!("{mark} {d}").trim_end());
        }
    }

    fn file(&mut self, file: &File) {
        self.docs("//!", &file.docs);
        for item in &file.items {
            if !self.out.is_empty() && !self.out.ends_with("\n\n") {
                self.out.push('\n');
            }
            match item {
                Item::Function(f) => self.function(f),
                Item::Monoid(m) => self.monoid(m),
                Item::Cascade(c) => self.cascade(c),
            }
        }
        self.comments_before(u32::MAX);
    }

    fn function(&mut self, f: &Function) {
        self.before(f.span, &f.docs);
        self.line(&format!("fn {}({}) = {}", f.name.name, names(&f.params), expr_text(&f.body)));
        self.after(f.span);
    }

    fn monoid(&mut self, m: &Monoid) {
        self.before(m.span, &m.docs);
        let tuple = |items: &[Expr]| match items {
            [one] => expr_text(one),
            _ => format!("({})", list(items, ", ")),
        };
        self.line(&format!("monoid {}({}) {{", m.name.name, names(&m.fields)));
        self.line(&format!("    identity = {}", tuple(&m.identity)));
        let head = format!("    combine({}, {}) =", m.args.0.name, m.args.1.name);
        let whole = format!("{head} {}", tuple(&m.combine));
        if whole.len() <= WIDTH || m.combine.len() < 2 {
            self.line(&whole);
        } else {
            self.line(&format!("{head} ("));
            for e in &m.combine {
                self.line(&format!("        {},", expr_text(e)));
            }
            self.line("    )");
        }
        self.line("}");
        self.after(m.span);
    }

    fn cascade(&mut self, c: &Cascade) {
        self.comments_before(c.span.start);
        self.keep_blank();
        self.docs("///", &c.docs);
        if c.exact {
            self.line("@exact");
        }
        let rank = |(name, fixed): &(Ident, Option<u64>)| match fixed {
            Some(n) => format!("{} = {n}", name.name),
            None => name.name.clone(),
        };
        let ranks = c.ranks.iter().map(rank).collect::<Vec<_>>().join(", ");
        let ranks = if ranks.is_empty() { ranks } else { format!("[{ranks}]") };
        let outputs: Vec<String> = c.outputs.iter().map(output_text).collect();
        let params: Vec<String> = c.params.iter().map(param_text).collect();
        let open = format!("cascade {}{ranks}(", c.name.name);
        let first = c.params.first().map(|p| p.span).or(c.outputs.first().map(|o| o.span));
        let header_end = c.outputs.last().map(|o| o.span).or(c.params.last().map(|p| p.span));
        let commented = match (first, header_end) {
            (Some(_), Some(end)) => self.comments.first().is_some_and(|k| k.span.start < end.end),
            _ => false,
        };
        let param_docs = commented || c.params.iter().any(|p| !p.docs.is_empty());
        let output_docs = commented || c.outputs.iter().any(|o| !o.docs.is_empty());
        let close = format!(") -> ({}) {{", outputs.join(", "));
        let one_line = format!("{open}{}{close}", params.join(", "));
        if !param_docs && !output_docs && one_line.len() <= WIDTH {
            self.line(&one_line);
        } else {
            let together = params.join(", ");
            if params.is_empty()
                || !param_docs && open.len() + together.len() < WIDTH && !output_docs && close.len() > WIDTH
            {
                self.line(&format!("{open}{together}"));
            } else {
                self.line(&open);
                self.indent += 1;
                if !param_docs && together.len() + 4 <= WIDTH {
                    self.line(&together);
                    self.last_end = self.last_end.max(c.params.last().map_or(0, |p| p.span.end));
                } else {
                    for (p, text) in c.params.iter().zip(&params) {
                        self.before(p.span, &p.docs);
                        self.line(&format!("{text},"));
                        self.after(p.span);
                    }
                }
                self.indent -= 1;
            }
            if !output_docs && close.len() <= WIDTH {
                self.line(&close);
            } else {
                self.line(") -> (");
                self.indent += 1;
                for (o, text) in c.outputs.iter().zip(&outputs) {
                    self.before(o.span, &o.docs);
                    self.line(&format!("{text},"));
                    self.after(o.span);
                }
                self.indent -= 1;
                self.line(") {");
            }
        }
        // Blank lines between the header and the first statement go.
        self.last_end = 0;
        self.indent += 1;
        for s in &c.body {
            match s {
                Stmt::Require(facts, span) => self.simple(*span, &[], &format!("require {}", list(facts, ", "))),
                Stmt::Ragged(r) => {
                    let text = format!(
                        "ragged {} in {} by {} as {}",
                        r.index.name,
                        expr_text(&r.extent),
                        r.offsets.name,
                        r.segment.name
                    );
                    self.simple(r.span, &[], &text);
                }
                Stmt::Einsum(e) => self.einsum(e),
                Stmt::Iter(i) => self.iter(i),
            }
        }
        self.comments_before(c.close.start);
        self.indent -= 1;
        self.line("}");
        self.after(c.span);
    }

    fn simple(&mut self, span: Span, docs: &[String], text: &str) {
        self.before(span, docs);
        self.line(text);
        self.after(span);
    }

    fn einsum(&mut self, e: &Einsum) {
        let (head, filter, otherwise) = einsum_parts(e);
        let whole =
            [head.as_str(), &filter, &otherwise].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(" ");
        self.before(e.span, &e.docs);
        if whole.len() + 4 * self.indent <= WIDTH {
            self.line(&whole);
        } else {
            self.line(&head);
            self.indent += 1;
            for part in [filter, otherwise] {
                if !part.is_empty() {
                    self.line(&part);
                }
            }
            self.indent -= 1;
        }
        self.after(e.span);
    }

    fn iter(&mut self, i: &Iter) {
        self.comments_before(i.span.start);
        self.keep_blank();
        let rev = if i.rev { " rev" } else { "" };
        self.line(&format!("iter {} in {}{rev} {{", i.index.name, expr_text(&i.extent)));
        self.last_end = 0;
        self.indent += 1;
        for e in &i.body {
            self.einsum(e);
        }
        self.comments_before(i.close.start);
        self.indent -= 1;
        self.line("}");
        self.after(i.span);
    }
}

fn names(items: &[Ident]) -> String {
    items.iter().map(|i| i.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn list(items: &[Expr], separator: &str) -> String {
    items.iter().map(expr_text).collect::<Vec<_>>().join(separator)
}

/// Access expressions are written tight.
fn access(items: &[Expr]) -> String {
    items.iter().map(|e| text(e, 0, true)).collect::<Vec<_>>().join(",")
}

fn storage_text(s: &Storage) -> String {
    let mut out = String::new();
    match s.packing {
        Some(PackOrder::LowFirst) => out.push_str(" packed(low)"),
        Some(PackOrder::HighFirst) => out.push_str(" packed(high)"),
        None => {}
    }
    if let Some(b) = &s.block_scale {
        out.push_str(&format!(" scaled({}, {})", b.dtype, b.block));
    }
    out
}

fn type_text(ty: &TensorType) -> String {
    let dims: Vec<String> = ty.dims.iter().map(|e| text(e, 0, true)).collect();
    let dims = if dims.is_empty() { String::new() } else { format!("[{}]", dims.join(", ")) };
    format!("{}{dims}{}", ty.dtype, storage_text(&ty.storage))
}

fn param_text(p: &Param) -> String {
    let inout = if p.inout { "inout " } else { "" };
    let default = p.default.as_ref().map_or(String::new(), |d| format!(" = {}", expr_text(d)));
    format!("{inout}{}: {}{default}", p.name.name, type_text(&p.ty))
}

fn output_text(o: &Output) -> String {
    let end = |e: &Option<Expr>| e.as_ref().map_or(String::new(), |e| text(e, 0, true));
    let slice = match &o.slice {
        None => String::new(),
        Some((state, Slice::Point(at))) => format!(" = {}[{}]", state.name, text(at, 0, true)),
        Some((state, Slice::Points(from, to))) => format!(" = {}[{}..{}]", state.name, end(from), end(to)),
    };
    format!("{}: {}{slice}", o.name.name, type_text(&o.ty))
}

fn target_text(t: &Target) -> String {
    let at = if t.at.is_empty() { String::new() } else { format!("[{}]", access(&t.at)) };
    let ty = t.ty.as_ref().map_or(String::new(), |(d, s)| format!(": {d}{}", storage_text(s)));
    format!("{}{at}{ty}", t.name.name)
}

fn binders_text(binders: &[Binder]) -> String {
    let one = |b: &Binder| match &b.extent {
        Some(e) => format!("{} in {}", b.index.name, text(e, 0, true)),
        None => b.index.name.clone(),
    };
    binders.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The assignment, its filter and its alternative.
fn einsum_parts(e: &Einsum) -> (String, String, String) {
    let targets: Vec<String> = e.targets.iter().map(target_text).collect();
    let targets = if targets.len() == 1 { targets.concat() } else { format!("({})", targets.join(", ")) };
    let binders = if e.binders.is_empty() { String::new() } else { format!(" for {}", binders_text(&e.binders)) };
    let assign = match e.join {
        None => "=".to_string(),
        Some(ReduceOp::Sum) => "+=".to_string(),
        Some(ReduceOp::Product) => "*=".to_string(),
        Some(op) => format!("{}=", op.name()),
    };
    let clause =
        |word: &str, e: &Option<Expr>| e.as_ref().map_or(String::new(), |e| format!("{word} {}", expr_text(e)));
    let head = format!("{targets}{binders} {assign} {}", expr_text(&e.value));
    (head, clause("where", &e.filter), clause("else", &e.otherwise))
}

/// A statement on one line.
pub fn einsum_text(e: &Einsum) -> String {
    let (head, filter, otherwise) = einsum_parts(e);
    [head, filter, otherwise].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(" ")
}

/// An expression on one line.
pub fn expr_text(e: &Expr) -> String {
    text(e, 0, false)
}

/// An extent or a position, without blanks around arithmetic.
pub fn tight_text(e: &Expr) -> String {
    text(e, 0, true)
}

fn float_text(x: f64) -> String {
    if x.is_nan() {
        "nan".to_string()
    } else if x.is_infinite() {
        if x > 0.0 { "inf".to_string() } else { "-inf".to_string() }
    } else {
        format!("{x:?}")
    }
}

/// `e` where an operand of binding power `min` or more is wanted; `tight` leaves out blanks around arithmetic.
fn text(e: &Expr, min: u8, tight: bool) -> String {
    let (s, own) = match &e.kind {
        ExprKind::Int(n) => (n.to_string(), if *n < 0 { 7 } else { 9 }),
        ExprKind::Float(x) => (float_text(*x), if x.is_sign_negative() && !x.is_nan() { 7 } else { 9 }),
        ExprKind::Bool(b) => (b.to_string(), 9),
        ExprKind::Name(n) => (n.clone(), 9),
        ExprKind::Field(a, f) => (format!("{}.{}", a.name, f.name), 9),
        ExprKind::Access(t, at) => (format!("{}[{}]", t.name, access(at)), 9),
        ExprKind::Call(f, args) => (format!("{}({})", f.name, list(args, ", ")), 9),
        ExprKind::Unary(UnaryOp::Not, a) => (format!("not {}", text(a, 4, tight)), 3),
        ExprKind::Unary(op, a) => {
            debug_assert_eq!(*op, UnaryOp::Neg);
            (format!("-{}", text(a, 7, tight)), 7)
        }
        ExprKind::Binary(op, a, b) => {
            let p = power(*op);
            // Comparisons do not chain on either side.
            let left = if p == 4 { 5 } else { p };
            let space = if tight && p >= 5 { "" } else { " " };
            (format!("{}{space}{}{space}{}", text(a, left, tight), op.name(), text(b, p + 1, tight)), p)
        }
        ExprKind::Select(c, a, b) => {
            (format!("if {} then {} else {}", text(c, 0, tight), text(a, 0, tight), text(b, 0, tight)), 0)
        }
        ExprKind::Reduce { op, scan, over, body } => {
            let body = text(body, 0, tight);
            let over_text = binders_text(over);
            let (head, certain) = match op {
                Reducer::Op(op) => {
                    let cum = if *scan { "cum" } else { "" };
                    let two = matches!(op, ReduceOp::Min | ReduceOp::Max) && over.len() == 2 && !scan;
                    (format!("{cum}{}({over_text})", op.name()), !two)
                }
                Reducer::TopK(k) => (format!("topk({over_text}, {})", expr_text(k)), true),
                Reducer::User(name) => {
                    let scan_word = if *scan { "scan " } else { "" };
                    (format!("{scan_word}{}({over_text})", name.name), *scan)
                }
            };
            // Where a call of two arguments is possible, a minus would be read as a difference.
            let body = if !certain && body.starts_with('-') { format!("({body})") } else { body };
            (format!("{head} {body}"), 0)
        }
        ExprKind::Tuple(items) => (format!("({})", list(items, ", ")), 9),
    };
    if own < min { format!("({s})") } else { s }
}
