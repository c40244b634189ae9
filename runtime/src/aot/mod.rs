//! Kernels compiled ahead of time: linked into the program, found by what the processor can do.
//!
//! `einfall::build` writes a [`Kernel`] and a typed function for every cascade. Invariants: (1) code of a [`Level`] runs
//! only where [`Level::detected`] says so, the highest level first; (2) nothing is loaded or generated at run time but
//! PTX, which the driver assembles, or its machine code; (3) what a launch checks is what it checks of kernels compiled at run time.

mod shape;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use einfall_ir::artifact::{Artifact, Code};

pub use half;
pub use shape::{Any, Extent, Input, Is, Output, Shape};

pub use crate::array::ArrayError;
pub use crate::error::Error;
pub use crate::launch::Arguments;
pub use crate::level::Level;
pub use crate::linked::KernelFn;

use crate::linked::{Bound, Executable};
use crate::program;
use crate::team::Team;

/// The code of a cascade for one level, linked into the program.
#[derive(Clone, Copy, Debug)]
pub struct Linked {
    /// What it is for.
    pub level: Level,
    /// [`Artifact::to_bytes`], with [`Code::Linked`].
    pub artifact: &'static [u8],
    /// The functions of its launches, in order.
    pub functions: &'static [KernelFn],
}

/// PTX of a cascade, and machine code of it.
#[derive(Clone, Copy, Debug)]
pub struct Ptx {
    /// What it is assembled for: `sm_80`, which later devices run as well, or `sm_90a`, which runs on Hopper alone.
    pub arch: &'static str,
    /// [`Artifact::to_bytes`], with [`Code::Ptx`].
    pub artifact: &'static [u8],
    /// What NVIDIA's assembler made of it for `arch`; none: the driver assembles.
    pub cubin: Option<&'static [u8]>,
}

/// A cascade compiled ahead of time.
#[derive(Debug)]
pub struct Kernel {
    name: &'static str,
    linked: &'static [Linked],
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    ptx: &'static [Ptx],
    loaded: OnceLock<Arc<Executable>>,
    /// The sizes of the last launch: most callers keep to one.
    bound: Mutex<Option<Arc<Bound>>>,
}

/// The threads that all kernels of the program share.
static TEAM: OnceLock<Team> = OnceLock::new();

fn team() -> Result<Team, Error> {
    if let Some(team) = TEAM.get() {
        return Ok(team.clone());
    }
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let team = crate::launch::threads(threads)?;
    Ok(TEAM.get_or_init(|| team).clone())
}

impl Kernel {
    /// What a cascade was compiled to.
    ///
    /// # Safety
    /// The functions are those of the artifact's launches, made together with it, and keep to the convention of
    /// [`Launch`](einfall_ir::artifact::Launch), as does the PTX.
    pub const unsafe fn new(name: &'static str, linked: &'static [Linked], ptx: &'static [Ptx]) -> Kernel {
        Kernel { name, linked, ptx, loaded: OnceLock::new(), bound: Mutex::new(None) }
    }

    /// The cascade's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The code for this machine's processor.
    ///
    /// # Errors
    /// [`Error::Level`] where there is none for it, [`Error::Artifact`] where it was made by another version.
    pub fn executable(&self) -> Result<&Arc<Executable>, Error> {
        if let Some(executable) = self.loaded.get() {
            return Ok(executable);
        }
        let order = |l: &&Linked| Level::ALL.iter().position(|a| *a == l.level);
        let linked = self.linked.iter().filter(|l| l.level.detected()).min_by_key(order).ok_or_else(|| {
            let levels = self.linked.iter().map(|l| l.level.name().to_owned()).collect();
            Error::Level { name: self.name.to_owned(), levels }
        })?;
        let artifact = self.read(linked.artifact)?;
        let reason = match &artifact.code {
            Code::Linked if artifact.launches.len() == linked.functions.len() => None,
            Code::Linked => Some("it has another number of kernels than functions"),
            Code::LlvmIr(_) | Code::Object(_) | Code::Ptx { .. } | Code::Wgsl { .. } => Some("its code is not linked"),
        };
        if let Some(reason) = reason {
            return Err(Error::Artifact { name: self.name.to_owned(), reason: reason.to_owned() });
        }
        let executable = Executable::linked(artifact, linked.functions.to_vec(), team()?);
        Ok(self.loaded.get_or_init(|| Arc::new(executable)))
    }

    fn read(&self, bytes: &[u8]) -> Result<Artifact, Error> {
        let artifact = Artifact::from_bytes(bytes)
            .map_err(|e| Error::Artifact { name: self.name.to_owned(), reason: e.to_string() })?;
        program::check(&artifact)?;
        Ok(artifact)
    }

    /// Finds the sizes by the shapes of the arrays, checks the declared facts and runs the cascade on the processor.
    /// Scalars with a default may be left out.
    ///
    /// # Errors
    /// As [`Kernel::executable`] and [`Bound::launch`]; [`Error::MissingRank`] for a rank that no shape decides;
    /// [`Error::Fact`].
    pub fn launch<'a>(&'a self, mut arguments: Arguments<'a>) -> Result<(), Error> {
        let executable = self.executable()?;
        let sizes = executable.infer(&arguments.shapes())?;
        let bound = self.bind(executable, &sizes)?;
        for (name, value) in executable.program.scalars(&bound.sizes.extents, arguments.scalars())? {
            if !arguments.gives(name) {
                arguments = arguments.scalar(name, value);
            }
        }
        bound.launch(arguments)?;
        Ok(())
    }

    fn bind(&self, executable: &Arc<Executable>, sizes: &[(String, u64)]) -> Result<Arc<Bound>, Error> {
        let mut last = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |b: &&Arc<Bound>| executable.ranks().zip(&b.sizes.extents).map(|(n, v)| (n, *v)).eq(names(sizes));
        if let Some(bound) = last.as_ref().filter(fits) {
            return Ok(Arc::clone(bound));
        }
        let bound = Arc::new(executable.bind(sizes)?);
        *last = Some(Arc::clone(&bound));
        Ok(bound)
    }

    /// Loads the cascade's PTX on a GPU: its own architecture's, else what the device runs as well; as machine code where
    /// there is some for the device.
    ///
    /// # Errors
    /// [`Error::Level`] where no PTX is for the device, [`Error::Cuda`] where the driver refuses it.
    #[cfg(feature = "cuda")]
    pub fn load_on(&self, engine: &crate::cuda::Engine) -> Result<Arc<crate::cuda::Executable>, Error> {
        let (major, minor) = engine.gpu().capability;
        let own = format!("sm_{}a", 10 * major + minor);
        let runs = |arch: &str| {
            arch == own
                || arch.strip_prefix("sm_").and_then(|n| n.parse().ok()).is_some_and(|n: u32| n <= 10 * major + minor)
        };
        let found = self.ptx.iter().find(|p| p.arch == own).or_else(|| self.ptx.iter().find(|p| runs(p.arch)));
        let Some(ptx) = found else {
            let levels = self.ptx.iter().map(|p| p.arch.to_owned()).collect();
            return Err(Error::Level { name: self.name.to_owned(), levels });
        };
        let artifact = self.read(ptx.artifact)?;
        let cubin = ptx.cubin.filter(|_| engine.gpu().runs_code(ptx.arch));
        // SAFETY: whoever made the kernel vouches for its PTX, and for the machine code as made of it.
        unsafe { engine.load_assembled(artifact, cubin) }
    }
}

fn names(sizes: &[(String, u64)]) -> impl Iterator<Item = (&str, u64)> {
    sizes.iter().map(|(n, v)| (n.as_str(), *v))
}
