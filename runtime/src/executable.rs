//! A linked artifact, and its binding to sizes.
//!
//! Invariant: an executable's functions are those of its artifact's launches, in order, and live as long as it does.

use crate::error::Error;
use crate::program::{ArraySpec, KernelSpec, Program, Sizes};
use crate::scratch::ScratchPool;
use einfall_ir::artifact::Artifact;
use std::sync::Arc;

/// The calling convention of a CPU kernel (see [`einfall_ir::artifact::Launch`]).
pub type KernelFn = unsafe extern "C" fn(slots: *const u64, first: i64, end: i64, scratch: *mut u8);

/// An artifact linked into this process. Sizes are bound by [`Executable::bind`].
#[derive(Debug)]
pub struct Executable {
    pub(crate) program: Program,
    pub(crate) functions: Vec<KernelFn>,
    /// Keeps the functions' memory, where it is not the program's own.
    #[cfg(feature = "jit")]
    _code: Option<einfall_llvm::Code>,
    pub(crate) pool: Arc<rayon::ThreadPool>,
}

impl Executable {
    /// Of functions that are linked into the program: those of the checked artifact's launches, in order.
    pub(crate) fn linked(artifact: Artifact, functions: Vec<KernelFn>, pool: Arc<rayon::ThreadPool>) -> Executable {
        Executable {
            program: Program::new(artifact),
            functions,
            #[cfg(feature = "jit")]
            _code: None,
            pool,
        }
    }

    /// Resolves the kernels of a checked artifact.
    #[cfg(feature = "jit")]
    pub(crate) fn new(
        artifact: Artifact,
        code: einfall_llvm::Code,
        pool: Arc<rayon::ThreadPool>,
    ) -> Result<Executable, Error> {
        let mut functions = Vec::new();
        for launch in &artifact.launches {
            let address = code.symbol(&launch.symbol)?;
            // SAFETY: the loader's caller vouches that the symbol has the convention's signature.
            functions.push(unsafe { std::mem::transmute::<*const std::ffi::c_void, KernelFn>(address) });
        }
        Ok(Executable { program: Program::new(artifact), functions, _code: Some(code), pool })
    }

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

    /// Fixes the sizes of all ranks.
    ///
    /// # Errors
    /// [`Error::UnknownRank`], [`Error::MissingRank`], [`Error::RankConflict`] (with a size the text fixes, or given
    /// twice) and [`Error::Size`] where an extent has no value.
    pub fn bind<S: AsRef<str>>(self: &Arc<Executable>, sizes: &[(S, u64)]) -> Result<Bound, Error> {
        let sizes = self.program.bind(sizes)?;
        Ok(Bound { sizes, scratch: ScratchPool::default(), executable: Arc::clone(self) })
    }
}

/// An executable at fixed sizes. Many threads may launch it at once.
#[derive(Debug)]
pub struct Bound {
    pub(crate) executable: Arc<Executable>,
    pub(crate) sizes: Sizes,
    pub(crate) scratch: ScratchPool,
}

impl Bound {
    /// The executable.
    pub fn executable(&self) -> &Arc<Executable> {
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

    /// Bytes of memory for temporaries between kernels, which a caller may provide.
    pub fn workspace_bytes(&self) -> u64 {
        self.sizes.workspace_bytes
    }
}
