//! Einfall's kernels on cubecl's wgpu run time: the same client, the same buffers, Burn's tensors.
//!
//! A [`Program`] holds the WGSL of one cascade by one mapping and launches it through a cubecl client; each kernel is a
//! [`CubeKernel`](cubecl::CubeKernel) with a source of its own, the shader. A [`Tuned`] program holds several mappings of a cascade as
//! tunables of cubecl's [`LocalTuner`](cubecl::tune::LocalTuner), which measures them on the arrays of the first launch at
//! each sizes and keeps the fastest. With the feature `burn` tensors go in and come out ([`Array::from_tensor`]).
//!
//! Nothing here knows a cascade, and no kernel is written here: shaders, words, workgroups and the variant to run come
//! from [`einfall::shaders`] and [`einfall::runtime::shaders`]. Invariants: what a launch takes is checked before cubecl sees
//! it and what is wrong is named; outputs are buffers of their own, and an array updated in place is nobody else's.
//!
//! The source text is the interface: which version of naga cubecl compiles it with is cubecl's affair. A client that
//! compiles to another language (CUDA, or wgpu with cubecl's features `vulkan` and `metal`) is refused by name.

mod array;
#[cfg(feature = "burn")]
mod burn;
mod error;
mod program;
mod shader;
mod tuned;

pub use array::Array;
pub use error::Error;
pub use program::{Call, Program, adapter};
pub use tuned::Tuned;

pub use cubecl::client::Client;
