//! The adapter on Mesa's lavapipe. Without it (`make vulkan`) these tests say that they are skipped.

mod common;
mod programs;
#[cfg(feature = "burn")]
mod tensors;
