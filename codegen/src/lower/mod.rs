//! Lowering between the levels: cascade → tile ([`form`]) → kernel.

pub mod form;
