//! The kernel library of Einfall: cascades as text.
//!
//! Invariant: every file of the folder is listed here and parses; no target code lives in this crate.

/// Every library file: its name without suffix, and its text.
pub const SOURCES: &[(&str, &str)] = &[
    ("attention", include_str!("../attention.ein")),
    ("lstm", include_str!("../lstm.ein")),
    ("moe", include_str!("../moe.ein")),
];

/// The text of a library file.
pub fn source(name: &str) -> Option<&'static str> {
    SOURCES.iter().find(|(n, _)| *n == name).map(|(_, text)| *text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cascade_parses() {
        for (name, text) in SOURCES {
            if let Err(diagnostics) = einfall_ir::cascade::parse(text) {
                panic!("{name}: {diagnostics:#?}");
            }
        }
    }
}
