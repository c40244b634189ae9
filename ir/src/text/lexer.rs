//! The lexer: text to tokens.
//!
//! Invariant: it accepts any input and terminates; what it cannot read becomes a diagnostic and is skipped.

use std::collections::HashSet;
use std::fmt;

use winnow::ascii::digit1;
use winnow::combinator::{alt, opt, preceded};
use winnow::error::ContextError;
use winnow::prelude::*;
use winnow::stream::LocatingSlice;
use winnow::token::{one_of, take_while};

use crate::diag::{Diagnostic, Span};

/// The largest source text accepted, in bytes.
pub const MAX_SOURCE_BYTES: usize = 1 << 20;

/// The most diagnostics of one kind kept.
pub const MAX_DIAGNOSTICS: usize = 100;

/// What a token is.
#[derive(Clone, Debug, PartialEq)]
pub enum Tok {
    /// A name or a keyword.
    Ident(String),
    /// An integer literal.
    Int(i64),
    /// A float literal: it has a point or an exponent.
    Float(f64),
    /// Punctuation or an operator.
    Sym(&'static str),
    /// A `///` line without its slashes and first blank.
    Doc(String),
    /// A `//!` line without its slashes and first blank.
    ModuleDoc(String),
    /// A newline or `;` that ends a statement.
    Newline,
    /// The end of the text.
    End,
}

impl fmt::Display for Tok {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tok::Ident(s) => write!(f, "`{s}`"),
            Tok::Int(n) => write!(f, "`{n}`"),
            Tok::Float(x) => write!(f, "`{x:?}`"),
            Tok::Sym(s) => write!(f, "`{s}`"),
            Tok::Doc(_) => f.write_str("a doc comment"),
            Tok::ModuleDoc(_) => f.write_str("a file doc comment"),
            Tok::Newline => f.write_str("the end of the statement"),
            Tok::End => f.write_str("the end of the text"),
        }
    }
}

/// A token and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// What it is.
    pub tok: Tok,
    /// Where.
    pub span: Span,
}

/// A `//` line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comment {
    /// Its text, slashes included, trailing blanks removed.
    pub text: String,
    /// Where.
    pub span: Span,
    /// Whether it stands after code on its line.
    pub trailing: bool,
}

/// The tokens of a text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lexed {
    /// Tokens in order, ending with [`Tok::End`].
    pub tokens: Vec<Token>,
    /// Comments in order.
    pub comments: Vec<Comment>,
    /// What could not be read.
    pub diagnostics: Vec<Diagnostic>,
}

/// Symbols, longest first where one is the prefix of another.
const SYMBOLS: [&str; 29] = [
    "..", "->", "<=", ">=", "==", "!=", "+=", "*=", "(", ")", "[", "]", "{", "}", ",", ":", ";", "=", "+", "-", "*",
    "/", "%", "<", ">", ".", "@", "!", "&",
];

/// A raw piece of text: a token, or something between tokens.
enum Piece {
    Tok(Tok),
    Comment,
    Newline,
    TooLarge,
}

type Input<'a> = LocatingSlice<&'a str>;
type LexResult<T> = Result<T, ContextError>;

fn comment(input: &mut Input<'_>) -> LexResult<Piece> {
    let text = preceded("//", take_while(0.., |c| c != '\n' && c != '\r')).parse_next(input)?;
    let body = |t: &str| t.strip_prefix(' ').unwrap_or(t).trim_end().to_string();
    Ok(match text {
        t if t.starts_with("//") => Piece::Comment,
        t if t.starts_with('/') => Piece::Tok(Tok::Doc(body(&t[1..]))),
        t if t.starts_with('!') => Piece::Tok(Tok::ModuleDoc(body(&t[1..]))),
        _ => Piece::Comment,
    })
}

fn ident(input: &mut Input<'_>) -> LexResult<Piece> {
    (
        one_of(|c: char| c.is_ascii_alphabetic() || c == '_'),
        take_while(0.., |c: char| c.is_ascii_alphanumeric() || c == '_'),
    )
        .take()
        .map(|s: &str| Piece::Tok(Tok::Ident(s.to_string())))
        .parse_next(input)
}

fn number(input: &mut Input<'_>) -> LexResult<Piece> {
    let exponent = || (one_of(['e', 'E']), opt(one_of(['+', '-'])), digit1).take();
    let fraction = (".", digit1).take();
    let text = (digit1, opt(fraction), opt(exponent())).take().parse_next(input)?;
    Ok(if text.bytes().all(|b| b.is_ascii_digit()) {
        text.parse().map_or(Piece::TooLarge, |n| Piece::Tok(Tok::Int(n)))
    } else {
        match text.parse::<f64>() {
            Ok(x) if x.is_finite() => Piece::Tok(Tok::Float(x)),
            _ => Piece::TooLarge,
        }
    })
}

fn symbol(input: &mut Input<'_>) -> LexResult<Piece> {
    let rest: &str = input.as_ref();
    match SYMBOLS.iter().find(|s| rest.starts_with(**s)) {
        Some(s) => winnow::token::take(s.len()).map(|_: &str| Piece::Tok(Tok::Sym(s))).parse_next(input),
        None => Err(ContextError::new()),
    }
}

fn newline(input: &mut Input<'_>) -> LexResult<Piece> {
    one_of(['\n', '\r']).map(|_| Piece::Newline).parse_next(input)
}

/// Cuts `source` into tokens.
pub fn lex(source: &str) -> Lexed {
    let mut out = Lexed::default();
    if source.len() > MAX_SOURCE_BYTES {
        out.diagnostics.push(
            Diagnostic::error("E0101", Span::new(0, 1), "the text is too large")
                .label(format!("{} bytes; at most {MAX_SOURCE_BYTES} are read", source.len()))
                .help("split the file"),
        );
        out.tokens.push(Token { tok: Tok::End, span: Span::new(0, 0) });
        return out;
    }
    let mut raw: Vec<Token> = Vec::new();
    let mut input = LocatingSlice::new(source);
    let mut line_has_code = false;
    loop {
        let _: Result<&str, ContextError> = take_while(0.., [' ', '\t']).parse_next(&mut input);
        let rest: &str = input.as_ref();
        let start = source.len() - rest.len();
        let Some(first) = rest.chars().next() else { break };
        let piece = alt((comment, ident, number, symbol, newline)).parse_next(&mut input);
        let end = source.len() - input.as_ref().len();
        let span = Span::new(start, end);
        match piece {
            Ok(Piece::Tok(tok)) => {
                line_has_code = true;
                raw.push(Token { tok, span });
            }
            Ok(Piece::Comment) => {
                let text = source[start..end].trim_end().to_string();
                out.comments.push(Comment { text, span, trailing: line_has_code });
            }
            Ok(Piece::Newline) => {
                line_has_code = false;
                raw.push(Token { tok: Tok::Newline, span });
            }
            Ok(Piece::TooLarge) => {
                out.diagnostics.push(Diagnostic::error("E0103", span, "this number is too large").help(
                    "integers go up to 9223372036854775807, floats up to about 1.8e308; write `inf` for infinity",
                ));
                raw.push(Token { tok: Tok::Int(1), span });
            }
            Err(_) => {
                let _: Result<&str, ContextError> = winnow::token::take(1usize).parse_next(&mut input);
                let span = Span::new(start, start + first.len_utf8());
                out.diagnostics.push(
                    Diagnostic::error("E0102", span, format!("`{}` means nothing here", first.escape_debug()))
                        .help("names are ASCII letters, digits and `_`; see docs/language.md for the operators"),
                );
            }
        }
    }
    out.diagnostics.truncate(MAX_DIAGNOSTICS);
    let end = source.len();
    raw.push(Token { tok: Tok::End, span: Span::new(end, end) });
    let unclosed = match_brackets(&raw, &mut out.diagnostics);
    out.diagnostics.truncate(2 * MAX_DIAGNOSTICS);
    out.tokens = keep_terminators(raw, &unclosed);
    out
}

/// The brackets opened inside one brace, or outside all.
struct Level {
    /// Where its brackets begin in the list of open ones.
    base: usize,
    round: usize,
    square: usize,
}

/// Pairs brackets; reports those without a partner and returns the positions of openers never closed. Parentheses and
/// square brackets never reach over a brace. Linear: every opener scanned is removed.
fn match_brackets(raw: &[Token], diagnostics: &mut Vec<Diagnostic>) -> HashSet<usize> {
    let mut open: Vec<usize> = Vec::new();
    let mut levels = vec![Level { base: 0, round: 0, square: 0 }];
    let mut unclosed = HashSet::new();
    let closer = |s: &str| match s {
        "(" => ")",
        "[" => "]",
        _ => "}",
    };
    let mut report = |at: usize, diagnostics: &mut Vec<Diagnostic>| {
        if let Tok::Sym(s) = raw[at].tok {
            diagnostics.push(
                Diagnostic::error("E0104", raw[at].span, format!("`{s}` is never closed"))
                    .label("opened here")
                    .help(format!("write the matching `{}`", closer(s))),
            );
            unclosed.insert(at);
        }
    };
    for (i, token) in raw.iter().enumerate() {
        let Tok::Sym(s) = token.tok else { continue };
        let depth = levels.len();
        let level = &mut levels[depth - 1];
        let count = match s {
            "(" | ")" => &mut level.round,
            "[" | "]" => &mut level.square,
            "{" => {
                open.push(i);
                levels.push(Level { base: open.len(), round: 0, square: 0 });
                continue;
            }
            "}" if depth > 1 => {
                for at in open.drain(level.base..) {
                    report(at, diagnostics);
                }
                open.pop();
                levels.pop();
                continue;
            }
            "}" => &mut 0,
            _ => continue,
        };
        if matches!(s, "(" | "[") {
            *count += 1;
            open.push(i);
        } else if *count == 0 {
            diagnostics.push(
                Diagnostic::error("E0105", token.span, format!("`{s}` closes nothing"))
                    .help("remove it, or write the opening bracket"),
            );
        } else {
            // The nearest opener of its kind is its partner; what was opened since is never closed.
            while let Some(at) = open.pop() {
                match raw[at].tok {
                    Tok::Sym("(") => level.round -= 1,
                    _ => level.square -= 1,
                }
                if matches!(raw[at].tok, Tok::Sym(o) if closer(o) == s) {
                    break;
                }
                report(at, diagnostics);
            }
        }
    }
    for at in open {
        report(at, diagnostics);
    }
    unclosed
}

/// Drops the newlines that end nothing and turns `;` into terminators.
fn keep_terminators(raw: Vec<Token>, unclosed: &HashSet<usize>) -> Vec<Token> {
    let mut out: Vec<Token> = Vec::with_capacity(raw.len());
    // Whether newlines end statements in each open bracket.
    let mut stack: Vec<bool> = Vec::new();
    let next_code = |i: usize| raw[i + 1..].iter().map(|t| &t.tok).find(|t| **t != Tok::Newline);
    for (i, token) in raw.iter().enumerate() {
        match &token.tok {
            Tok::Sym(";") => out.push(Token { tok: Tok::Newline, span: token.span }),
            Tok::Newline => {
                let inside = stack.last() == Some(&false);
                let continued = match next_code(i) {
                    Some(Tok::Ident(k)) => matches!(k.as_str(), "where" | "then" | "else"),
                    Some(tok) => matches!(tok, Tok::Sym("->" | "{")),
                    None => false,
                };
                let ends = match out.last().map(|t| &t.tok) {
                    None | Some(Tok::Newline | Tok::Doc(_) | Tok::ModuleDoc(_)) => false,
                    Some(Tok::Sym(s)) => matches!(*s, ")" | "]" | "}" | "{"),
                    Some(Tok::Ident(k)) => !matches!(k.as_str(), "and" | "or" | "not" | "where" | "then" | "else"),
                    Some(Tok::Int(_) | Tok::Float(_) | Tok::End) => true,
                };
                if ends && !inside && !continued {
                    out.push(token.clone());
                }
            }
            tok => {
                if let Tok::Sym(s) = tok {
                    match *s {
                        "(" | "[" => stack.push(unclosed.contains(&i)),
                        "{" => stack.push(true),
                        ")" | "]" | "}" => drop(stack.pop()),
                        _ => {}
                    }
                }
                out.push(token.clone());
            }
        }
    }
    out
}
