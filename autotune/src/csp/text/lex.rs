//! Tokens of the text form.

use super::super::number::LIMIT;
use einfall_ir::diag::{Diagnostic, Span};

/// One token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token<'s> {
    /// A name.
    Name(&'s str),
    /// A number.
    Number(i64),
    /// An operator or bracket.
    Sign(&'static str),
    /// The end of the text.
    End,
}

/// The operators and brackets, longest first.
const SIGNS: [&str; 30] = [
    "<->", "<=>", "..", "==", "!=", "<=", ">=", "->", "=>", "||", "&&", "<", ">", "|", "&", "!", "+", "-", "*", "/",
    "%", "^", "(", ")", "[", "]", "{", "}", ",", ";",
];

/// Splits a text into tokens with their places; the last one is [`Token::End`].
pub fn lex(source: &str) -> Result<Vec<(Token<'_>, Span)>, Vec<Diagnostic>> {
    let bytes = source.as_bytes();
    let mut out = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let byte = bytes[at];
        if byte.is_ascii_whitespace() {
            at += 1;
        } else if byte == b'#' {
            while at < bytes.len() && bytes[at] != b'\n' {
                at += 1;
            }
        } else if byte.is_ascii_alphabetic() || byte == b'_' {
            while at < bytes.len() && (bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_') {
                at += 1;
            }
            out.push((Token::Name(&source[start..at]), Span::new(start, at)));
        } else if byte.is_ascii_digit() {
            while at < bytes.len() && bytes[at].is_ascii_digit() {
                at += 1;
            }
            let span = Span::new(start, at);
            match source[start..at].parse::<i64>() {
                Ok(n) if n < LIMIT => out.push((Token::Number(n), span)),
                _ => {
                    return Err(vec![
                        Diagnostic::error("E0802", span, "the number is too large")
                            .label("at most 4611686018427387902 (2^62 − 2)"),
                    ]);
                }
            }
        } else if let Some(sign) = SIGNS.iter().chain(&[":"]).find(|s| source[at..].starts_with(**s)) {
            at += sign.len();
            out.push((Token::Sign(sign), Span::new(start, at)));
        } else {
            let end = source[at..].chars().next().map_or(at + 1, |c| at + c.len_utf8());
            let span = Span::new(start, end);
            let message = format!("`{}` means nothing here", &source[start..end]);
            let help = if byte == b'=' { "equality is written `==`" } else { "comments start with `#`" };
            return Err(vec![Diagnostic::error("E0801", span, message).help(help)]);
        }
    }
    out.push((Token::End, Span::new(source.len(), source.len())));
    Ok(out)
}
