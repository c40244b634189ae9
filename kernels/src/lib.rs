//! The kernel library of Einfall: cascades as text.
