//! NVIDIA GPUs through the CUDA driver API, found at run time.
//!
//! [`Engine::new`] opens a device, [`Engine::load`] assembles an artifact's PTX, [`Executable::bind`] fixes its sizes,
//! [`Bound::prepare`] checks arrays in device memory and makes everything a launch needs, [`Prepared::launch`] runs it
//! on a [`Stream`]; [`Prepared::graph`] captures it. Invariants: without a driver every entry returns an error and
//! nothing panics; nothing is allocated, encoded or checked in [`Prepared::launch`]; after an error that the driver
//! keeps to (a kernel that failed), the device is refused for good, with the kernel's name. Source: CUDA driver API.

mod array;
mod code;
mod driver;
mod engine;
mod error;
mod gpu;
mod launch;
mod link;
mod tensor_map;

pub use array::DeviceArray;
pub use code::FunctionInfo;
pub use driver::{Event, Graph, Stream};
pub use engine::{Engine, EngineOptions, Executable, Modules};
pub use error::CudaError;
pub use gpu::{Clocks, Gpu, gpus};
pub use launch::{Arguments, Bound, Prepared};
