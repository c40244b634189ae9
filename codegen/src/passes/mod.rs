//! Passes: each a pure function from IR to IR, one file each.

use einfall_ir::diag::{Diagnostic, Span};

pub mod expand_segments;
pub mod expand_selections;
pub mod extract_reductions;
pub mod fix_extents;
pub mod fold_exponents;
pub mod fuse_indices;
pub mod load_reads;
pub mod pack_arrays;
pub mod propagate_support;
pub(crate) mod rewrite;
pub(crate) mod rewrite_tiles;
pub mod round_operands;
pub mod split_constant_dims;
pub mod unpack_storage;
pub mod unroll_axes;

/// A construct that has no lowering yet: an expected refusal with its place, not a bug.
#[derive(Clone, Debug, PartialEq)]
pub struct Unsupported {
    /// Where it stands in the source.
    pub span: Span,
    /// What it is.
    pub what: String,
    /// What to write instead, where there is something better than to evaluate it.
    pub help: Option<String>,
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is not lowered yet", self.what)
    }
}

impl std::error::Error for Unsupported {}

impl Unsupported {
    /// `what` at `span` cannot be lowered.
    pub fn new(span: Span, what: impl Into<String>) -> Unsupported {
        Unsupported { span, what: what.into(), help: None }
    }

    /// With what to write instead.
    pub fn help(self, help: impl Into<String>) -> Unsupported {
        Unsupported { help: Some(help.into()), ..self }
    }

    /// As a diagnostic.
    pub fn diagnostic(&self) -> Diagnostic {
        Diagnostic::error("E0900", self.span, self.to_string())
            .label("this parses and evaluates, but no backend compiles it")
            .help(self.help.as_deref().unwrap_or(
                "evaluate it with `einfall run --device reference`, or rewrite it with supported constructs",
            ))
    }
}
