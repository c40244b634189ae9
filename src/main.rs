//! The `einfall` command line.
fn main() {}
