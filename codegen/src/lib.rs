//! Passes, lowering and backends of Einfall.
