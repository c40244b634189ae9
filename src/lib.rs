//! Einfall: kernels for sequence models, derived from cascades of Einsums.
//!
//! Features: `cpu` (default) compiles for this machine's processor and runs there, `cuda` for an NVIDIA GPU; `build` compiles
//! ahead of time in build scripts, and `aot` (`aot-cuda`) is all that a program so built needs.
//!
//! ```
//! use einfall::{Engine, Options, ir::cascade};
//! use einfall::runtime::{Arguments, View, ViewMut};
//!
//! let text = "cascade scale_rows[M, N](x: f32[M, N], s: f32[M]) -> (y: f32[M, N]) { y[m,n] = x[m,n] * s[m] }";
//! let module = cascade::parse(text).expect("a correct cascade");
//! let engine = Engine::new(&Options::default())?;
//! let kernel = engine.compile(&module.cascades[0])?.bind(&[("M", 2), ("N", 3)])?;
//!
//! let (x, s) = ([1f32, 2., 3., 4., 5., 6.], [10f32, 100.]);
//! let mut y = [0f32; 6];
//! let arguments = Arguments::new()
//!     .input("x", View::dense(&x, &[2, 3]).expect("six elements"))
//!     .input("s", View::dense(&s, &[2]).expect("two elements"))
//!     .output("y", ViewMut::dense(&mut y, &[2, 3]).expect("six elements"));
//! kernel.launch(arguments)?;
//! assert_eq!(y, [10., 20., 30., 400., 500., 600.]);
//! # Ok::<(), einfall::Error>(())
//! ```

/// The book's Rust, run by rustdoc's tests.
#[cfg(all(doctest, feature = "cpu"))]
pub mod book {
    #[doc = include_str!("../docs/extending.md")]
    pub mod extending {}
    #[doc = include_str!("../docs/tutorial.md")]
    pub mod tutorial {}
}

#[cfg(feature = "arrays")]
pub mod arrays;
#[cfg(feature = "build")]
pub mod build;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub mod device;
#[cfg(feature = "cpu")]
mod engine;
#[cfg(feature = "compiler")]
mod lowering;
#[cfg(feature = "compiler")]
mod options;
#[cfg(feature = "cpu")]
mod plans;
#[cfg(feature = "shaders")]
pub mod shaders;
#[cfg(feature = "wgpu")]
pub mod wgpu;

#[cfg(feature = "compiler")]
pub use einfall_autotune as autotune;
#[cfg(feature = "compiler")]
pub use einfall_codegen as codegen;
pub use einfall_ir as ir;
#[cfg(feature = "cpu")]
pub use einfall_kernels as kernels;
pub use einfall_runtime as runtime;
#[cfg(feature = "aot")]
pub use einfall_runtime::aot;
#[cfg(feature = "cpu")]
pub use engine::{Bound, Engine, Kernel};
#[cfg(feature = "compiler")]
pub use lowering::{
    CompileOptions, Error, compile_ptx, compile_wgsl, fits, gpu_plan, plan, plan_for, trace, unmapped, wgsl_plan,
    with_statics,
};
#[cfg(feature = "cpu")]
pub use options::Options;
#[cfg(feature = "compiler")]
pub use options::TableSource;

/// The module that `einfall::build` wrote for this package: a function and a kernel for every cascade.
#[macro_export]
macro_rules! include_kernels {
    () => {
        include!(concat!(env!("OUT_DIR"), "/einfall.rs"));
    };
}
