//! A cursor over tokens: what the recursive-descent parsers of the tile, mapping and other machine-level texts share.
//!
//! Invariant: a parser built on it stops at the first error, with its place and what was expected there.

use super::{Tok, Token, lex};
use crate::diag::{Diagnostic, Span};

/// A position in a token list.
pub(crate) struct Cursor {
    tokens: Vec<Token>,
    at: usize,
    /// The diagnostic code of this text's syntax errors.
    code: &'static str,
}

impl Cursor {
    /// At the start of `text`.
    ///
    /// # Errors
    /// The first thing the lexer cannot read.
    pub(crate) fn new(text: &str, code: &'static str) -> Result<Cursor, Diagnostic> {
        let lexed = lex(text);
        match lexed.diagnostics.into_iter().next() {
            Some(d) => Err(d),
            None => Ok(Cursor { tokens: lexed.tokens, at: 0, code }),
        }
    }

    pub(crate) fn tok(&self) -> &Tok {
        &self.tokens[self.at].tok
    }

    /// The token `n` after the present one.
    pub(crate) fn ahead(&self, n: usize) -> &Tok {
        &self.tokens[(self.at + n).min(self.tokens.len() - 1)].tok
    }

    pub(crate) fn span(&self) -> Span {
        self.tokens[self.at].span
    }

    /// Moves past the present token; the end of the text is never passed.
    pub(crate) fn advance(&mut self) {
        self.at = (self.at + 1).min(self.tokens.len() - 1);
    }

    /// An error here: something else was expected.
    pub(crate) fn expected(&self, what: &str) -> Diagnostic {
        Diagnostic::error(self.code, self.span(), format!("expected {what}, found {}", self.tok())).label("here")
    }

    pub(crate) fn is_sym(&self, s: &str) -> bool {
        matches!(self.tok(), Tok::Sym(t) if *t == s)
    }

    pub(crate) fn is_word(&self, w: &str) -> bool {
        matches!(self.tok(), Tok::Ident(t) if t == w)
    }

    pub(crate) fn eat_sym(&mut self, s: &str) -> bool {
        let found = self.is_sym(s);
        if found {
            self.advance();
        }
        found
    }

    pub(crate) fn eat_word(&mut self, w: &str) -> bool {
        let found = self.is_word(w);
        if found {
            self.advance();
        }
        found
    }

    pub(crate) fn sym(&mut self, s: &str) -> Result<(), Diagnostic> {
        if self.eat_sym(s) { Ok(()) } else { Err(self.expected(&format!("`{s}`"))) }
    }

    pub(crate) fn word(&mut self, w: &str) -> Result<(), Diagnostic> {
        if self.eat_word(w) { Ok(()) } else { Err(self.expected(&format!("`{w}`"))) }
    }

    pub(crate) fn ident(&mut self, what: &str) -> Result<(String, Span), Diagnostic> {
        match self.tok() {
            Tok::Ident(name) => {
                let out = (name.clone(), self.span());
                self.advance();
                Ok(out)
            }
            Tok::Int(_) | Tok::Float(_) | Tok::Sym(_) | Tok::Doc(_) | Tok::ModuleDoc(_) | Tok::Newline | Tok::End => {
                Err(self.expected(what))
            }
        }
    }

    /// A non-negative integer.
    pub(crate) fn count(&mut self, what: &str) -> Result<u64, Diagnostic> {
        match self.tok() {
            Tok::Int(n) => {
                let n = *n as u64;
                self.advance();
                Ok(n)
            }
            Tok::Ident(_) | Tok::Float(_) | Tok::Sym(_) | Tok::Doc(_) | Tok::ModuleDoc(_) | Tok::Newline | Tok::End => {
                Err(self.expected(what))
            }
        }
    }

    /// The end of a statement: a newline, or a closing brace or the end ahead.
    pub(crate) fn line_end(&mut self) -> Result<(), Diagnostic> {
        if self.is_sym("}") || *self.tok() == Tok::End {
            return Ok(());
        }
        if *self.tok() != Tok::Newline {
            return Err(self.expected("the end of the line"));
        }
        self.skip_lines();
        Ok(())
    }

    /// Moves past newlines and doc comments.
    pub(crate) fn skip_lines(&mut self) {
        while matches!(self.tok(), Tok::Newline | Tok::Doc(_) | Tok::ModuleDoc(_)) {
            self.advance();
        }
    }
}
