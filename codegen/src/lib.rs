//! Passes, lowering and backends of Einfall.

pub mod backend;
pub mod lower;
pub mod passes;
pub mod pipeline;
pub mod probes;
pub mod random;
pub mod tables;
