//! A loaded artifact, and its binding to sizes: the same for every device.
//!
//! Invariant: a bound executable's sizes satisfy its artifact, and the device that holds the code takes them.

use crate::error::Error;
use crate::program::{ArraySpec, KernelSpec, Program, Sizes};
use std::sync::Arc;

/// What a device holds of an artifact's code.
pub trait Loaded {
    /// What a bound executable keeps from launch to launch, on processors.
    #[cfg(feature = "cpu")]
    type Memory: std::fmt::Debug + Default;

    /// Refuses sizes beyond what the kernels and the device count with.
    ///
    /// # Errors
    /// What is too large, named.
    fn check(&self, program: &Program, sizes: &Sizes) -> Result<(), Error>;
}

/// An artifact loaded on a device, which holds its code as a `C`. Sizes are bound by [`Executable::bind`].
#[derive(Debug)]
pub struct Executable<C> {
    pub(crate) program: Program,
    pub(crate) code: C,
}

impl<C: Loaded> Executable<C> {
    /// The cascade's name.
    pub fn name(&self) -> &str {
        self.program.name()
    }

    /// Names of the ranks, in the cascade's order.
    pub fn ranks(&self) -> impl Iterator<Item = &str> {
        self.program.ranks()
    }

    /// The sizes of ranks that the shapes of arrays imply, with the ranks that the text fixes. Extents that are sums,
    /// differences or products of ranks are solved where all but one are known.
    ///
    /// # Errors
    /// [`Error::UnknownArray`], [`Error::Dimensions`], and [`Error::RankConflict`] or [`Error::Extent`] for shapes that contradict each other.
    pub fn infer(&self, shapes: &[(&str, &[u64])]) -> Result<Vec<(String, u64)>, Error> {
        self.program.infer(shapes)
    }

    /// Fixes the sizes of all ranks. No size is compiled for: the code serves all.
    ///
    /// # Errors
    /// [`Error::UnknownRank`], [`Error::MissingRank`], [`Error::RankConflict`] (with a size the text fixes, or given
    /// twice), [`Error::Size`] where an extent has no value, and the device's own error for what is too large: an
    /// extent that kernels do not count to, a grid that cannot be launched.
    pub fn bind<S: AsRef<str>>(self: &Arc<Executable<C>>, sizes: &[(S, u64)]) -> Result<Bound<C>, Error> {
        let sizes = self.program.bind(sizes)?;
        self.code.check(&self.program, &sizes)?;
        Ok(Bound {
            executable: Arc::clone(self),
            sizes,
            #[cfg(feature = "cpu")]
            memory: C::Memory::default(),
        })
    }
}

/// An executable at fixed sizes.
#[derive(Debug)]
pub struct Bound<C: Loaded> {
    pub(crate) executable: Arc<Executable<C>>,
    pub(crate) sizes: Sizes,
    #[cfg(feature = "cpu")]
    pub(crate) memory: C::Memory,
}

impl<C: Loaded> Bound<C> {
    /// The executable.
    pub fn executable(&self) -> &Arc<Executable<C>> {
        &self.executable
    }

    /// Arrays and scalars to give, outputs included, in the cascade's order.
    pub fn arrays(&self) -> impl Iterator<Item = ArraySpec<'_>> {
        self.sizes.arrays(&self.executable.program)
    }

    /// The kernels, in launch order.
    pub fn kernels(&self) -> impl Iterator<Item = KernelSpec<'_>> {
        self.sizes.kernels(&self.executable.program)
    }

    /// Bytes of memory for temporaries between kernels: on a processor a caller may provide it, on a GPU each prepared
    /// launch takes its own.
    pub fn workspace_bytes(&self) -> u64 {
        self.sizes.workspace_bytes
    }
}
