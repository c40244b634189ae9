//! Einfall: kernels for sequence models, derived from cascades of Einsums.

#[cfg(feature = "arrays")]
pub mod arrays;
