//! Passes, lowering and backends of Einfall.

pub mod passes;
