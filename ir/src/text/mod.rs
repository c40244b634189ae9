//! Lexing shared by the text forms: tokens with byte spans, comments kept aside, newlines as terminators.
//!
//! Tokens are cut by winnow; everything after is a plain pass over the token list. Invariants: token spans ascend and
//! lie on character boundaries; the list ends with one [`Tok::End`]; a [`Tok::Newline`] stands only where a newline
//! ends a statement (not inside `(` or `[`, not after an operator, not before `where`, `then`,
//! `else`, `->` or `{`).

pub(crate) mod cursor;
mod lexer;

pub use lexer::{Comment, Lexed, MAX_SOURCE_BYTES, Tok, Token, lex};
