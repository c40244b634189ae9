//! Machine code of this process: what the processor's executables hold.
//!
//! Invariant: the functions are those of the artifact's launches, in order, and live as long as the executable does.

use crate::error::Error;
use crate::executable::{self, Loaded};
use crate::program::{Program, Sizes};
use crate::scratch::ScratchPool;
use crate::team::Team;
use einfall_ir::artifact::Artifact;

/// The calling convention of a CPU kernel (see [`einfall_ir::artifact::Launch`]).
pub type KernelFn = unsafe extern "C" fn(slots: *const u64, first: i64, end: i64, scratch: *mut u8);

/// The functions of an artifact and the threads that call them.
#[derive(Debug)]
pub struct Linked {
    pub(crate) functions: Vec<KernelFn>,
    /// Keeps the functions' memory, where it is not the program's own.
    #[cfg(feature = "jit")]
    _code: Option<einfall_llvm::Code>,
    pub(crate) team: Team,
}

/// An artifact linked into this process.
pub type Executable = executable::Executable<Linked>;

/// An executable at fixed sizes. Many threads may launch it at once.
pub type Bound = executable::Bound<Linked>;

impl Loaded for Linked {
    type Memory = ScratchPool;

    fn check(&self, _: &Program, _: &Sizes) -> Result<(), Error> {
        Ok(())
    }
}

impl Executable {
    /// Of functions that are linked into the program: those of the checked artifact's launches, in order.
    pub(crate) fn linked(artifact: Artifact, functions: Vec<KernelFn>, team: Team) -> Executable {
        let code = Linked {
            functions,
            #[cfg(feature = "jit")]
            _code: None,
            team,
        };
        Executable { program: Program::new(artifact), code }
    }

    /// Resolves the kernels of a checked artifact.
    #[cfg(feature = "jit")]
    pub(crate) fn new(artifact: Artifact, code: einfall_llvm::Code, team: Team) -> Result<Executable, Error> {
        let mut functions = Vec::new();
        for launch in &artifact.launches {
            let address = code.symbol(&launch.symbol)?;
            // SAFETY: the loader's caller vouches that the symbol has the convention's signature.
            functions.push(unsafe { std::mem::transmute::<*const std::ffi::c_void, KernelFn>(address) });
        }
        let code = Linked { functions, _code: Some(code), team };
        Ok(Executable { program: Program::new(artifact), code })
    }
}
