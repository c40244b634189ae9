//! Einfall: kernels for sequence models, derived from cascades of Einsums.
