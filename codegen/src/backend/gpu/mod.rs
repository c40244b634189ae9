//! What printers of code for GPUs share, whatever the text: who holds which element of a fragment ([`held`]), what a
//! statement has computed ([`memo`]), arithmetic on constants and ranges ([`fold`]), how a launch is described ([`launch`]).
//!
//! Invariant: nothing here writes text.

pub(super) mod fold;
pub(super) mod held;
pub(super) mod launch;
pub(super) mod memo;
pub(super) mod reduction;
