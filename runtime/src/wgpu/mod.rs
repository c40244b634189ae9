//! Any GPU behind WebGPU's native implementation, wgpu: Vulkan here, found at run time.
//!
//! [`adapters`] lists what there is, [`Engine::new`] opens one by name, [`Engine::load`] takes an artifact's WGSL,
//! [`Executable::bind`] fixes its sizes, [`Bound::prepare`] checks arrays and makes pipelines and bindings once,
//! [`Prepared::launch`] runs them. Invariants: an adapter is picked by name, never by its place; every limit is checked
//! here and named when it is exceeded; after the device is lost, or reports an error of its own, it is refused with its
//! words and the process goes on. Modules run without the implementation's bounds checks: code generation proves its
//! accesses. Guard bytes surround every array.
//!
//! What waits for the device has a second form that ends in `_async` and blocks no thread; a browser (`wasm32`), which has no
//! thread to block, has these alone: [`Engine::new_async`], [`Bound::array_async`], [`Bound::prepare_async`],
//! [`Prepared::launch`], [`DeviceArray::to_host_async`], or all at once [`Bound::run_to_arrays_async`]. On a native device such
//! a future polls the device whenever it is polled, and asks to be polled again.

mod adapter;
mod answer;
mod array;
mod engine;
mod launch;

pub use crate::shaders::{Adapter, Matrices, WgpuError};
#[cfg(not(target_family = "wasm"))]
pub use adapter::adapters;
pub use adapter::adapters_async;
pub use array::DeviceArray;
pub use engine::{Engine, EngineOptions, Executable, Shaders};
pub use launch::{Arguments, Bound, Prepared};
