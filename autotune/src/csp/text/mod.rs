//! The text form of models.
//!
//! Constraints end in `;` and may be named; everything ConstrINT reads is read with the same meaning, except that
//! brackets group here where ConstrINT drops them.
//!
//! ```text
//! # A comment.
//! var warps in {1, 2, 4, 8};                 # {values}, lo..hi, lo..hi step n, divisors(n); else 1..2^30
//! var rows, cols in 1..4096 step 8;
//! fits: rows * cols * 2 + 64 <= 227000;      # a name before a colon
//! cols % warps * 8 == 0;                     # % binds weaker than + and *: warps * 8 divides cols
//! rows == [16, 32] | cols <= 64;             # a list stands for any of its values; | is or, & is and, ! is not
//! warps == 8 -> rows / 16 <= 64;             # implication; <-> is equivalence; / rounds down, ceildiv(a, b) up
//! max(rows, cols) <= 2 * min(rows, cols) ^ 2;
//! table(warps, rows) in {(4, 64), (8, 128)};
//! ```
//!
//! Invariant: [`print()`] and [`parse()`] are inverse on models; every error carries a span and says what to write.
//! Source: ConstrINT's grammar in the documentation of the PyPI package flashrnn 1.0.8.

mod lex;
mod parse;
mod print;

pub use parse::{parse, parse_expr, parse_names, parse_order};
pub use print::{print, print_expr, print_pred};

/// The 1-based line and column, in characters, of a byte of a text.
pub fn line_column(source: &str, byte: u32) -> (usize, usize) {
    let before = source.get(..byte as usize).unwrap_or(source);
    let line_start = before.rfind('\n').map_or(0, |i| i + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}
