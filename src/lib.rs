//! Einfall: kernels for sequence models, derived from cascades of Einsums.
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

#[cfg(feature = "arrays")]
pub mod arrays;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "cpu")]
mod engine;
#[cfg(feature = "cpu")]
mod options;
#[cfg(feature = "cpu")]
mod plans;

pub use einfall_autotune as autotune;
pub use einfall_codegen as codegen;
pub use einfall_ir as ir;
pub use einfall_kernels as kernels;
pub use einfall_runtime as runtime;
#[cfg(feature = "cpu")]
pub use engine::{Bound, CompileOptions, Engine, Error, Kernel, fits, plan, plan_for, trace, with_statics};
#[cfg(feature = "cpu")]
pub use options::{Options, TableSource};
