//! The engine: LLVM, the object cache and the threads that executables run on.
//!
//! Invariant: what [`Engine::load`] links is a function of the artifact's text, the target options, LLVM's version
//! and this crate's version, all of which are in the cache's key.

use crate::cache::{Cache, Key};
use crate::error::Error;
use crate::linked::Executable;
use crate::program;
use crate::team::Team;
use einfall_ir::artifact::{self, Artifact, Code};
use einfall_llvm::{Host, Llvm, LoadOptions, Object, Passes, TargetOptions};
use std::path::PathBuf;
use std::sync::Arc;

/// What an engine is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EngineOptions {
    /// Where to look for LLVM.
    pub llvm: LoadOptions,
    /// Folder of the object cache; none for no cache.
    pub cache: Option<PathBuf>,
    /// Worker threads; none for as many as this process may run at once.
    pub threads: Option<usize>,
    /// LLVM's pass pipeline.
    pub passes: Passes,
}

/// Compiles and links artifacts for this machine's processor. Shared by many threads.
#[derive(Debug)]
pub struct Engine {
    llvm: Llvm,
    target: TargetOptions,
    host: Host,
    cache: Option<Cache>,
    team: Team,
}

impl Engine {
    /// Finds LLVM, opens the cache and starts the threads. A cache folder that cannot be used is left out with a
    /// warning.
    ///
    /// # Errors
    /// [`Error::Llvm`] where there is no LLVM, [`Error::Threads`].
    pub fn new(options: &EngineOptions) -> Result<Engine, Error> {
        let threads = match options.threads {
            Some(n) => n.max(1),
            None => std::thread::available_parallelism().map_or(1, |n| n.get()),
        };
        Engine::on(options, crate::launch::threads(threads)?)
    }

    /// As [`Engine::new`], on the caller's threads; `options.threads` is not used. A thread that launches works too, with
    /// all threads of the pool but one, which stay for the next launch for 100 µs, 10 ms at most.
    ///
    /// # Errors
    /// [`Error::Llvm`] where there is no LLVM.
    pub fn with_pool(options: &EngineOptions, pool: Arc<rayon::ThreadPool>) -> Result<Engine, Error> {
        Engine::on(options, Team::new(pool))
    }

    fn on(options: &EngineOptions, team: Team) -> Result<Engine, Error> {
        let llvm = Llvm::load(&options.llvm)?;
        tracing::debug!(path = %llvm.path().display(), version = ?llvm.version(), "LLVM is loaded");
        let cache = options.cache.as_ref().and_then(|folder| {
            Cache::open(folder).inspect_err(|error| tracing::warn!(%error, "kernels are not cached")).ok()
        });
        let mut host = llvm.host();
        if !crate::tiles_permitted() {
            host.remove("amx-");
        }
        Ok(Engine { target: host.options(options.passes), llvm, host, cache, team })
    }

    /// The loaded LLVM.
    pub fn llvm(&self) -> &Llvm {
        &self.llvm
    }

    /// The processor compiled for, in LLVM's words.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// What is compiled for.
    pub fn target(&self) -> &TargetOptions {
        &self.target
    }

    /// The object cache, if there is one.
    pub fn cache(&self) -> Option<&Cache> {
        self.cache.as_ref()
    }

    /// Threads that work on a launch, the launching one among them.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    /// Compiles (or takes from the cache) and links an artifact.
    ///
    /// # Errors
    /// [`Error::Artifact`] where it contradicts itself, [`Error::Llvm`] where LLVM refuses its code.
    ///
    /// # Safety
    /// The code keeps to the convention of [`artifact::Launch`]: symbols have its signature, tasks touch only the
    /// arrays, scratch and slots of their launch and only inside their extents, and tasks of one launch do not write
    /// what another reads or writes. Code generation makes such artifacts.
    pub unsafe fn load(&self, artifact: Artifact) -> Result<Arc<Executable>, Error> {
        // SAFETY: the caller vouches for the code.
        Ok(unsafe { self.load_and_keep(artifact)? }.0)
    }

    /// As [`Engine::load`]; the artifact comes back with its object, which loads again without its text.
    ///
    /// # Errors
    /// As [`Engine::load`].
    ///
    /// # Safety
    /// As [`Engine::load`].
    pub unsafe fn load_and_keep(&self, mut artifact: Artifact) -> Result<(Arc<Executable>, Artifact), Error> {
        let _span = tracing::debug_span!("load", cascade = artifact.name).entered();
        program::check(&artifact)?;
        let (executable, object) = match std::mem::replace(&mut artifact.code, Code::Object(Vec::new())) {
            Code::Object(bytes) => {
                // SAFETY: the caller vouches for the code.
                let object = unsafe { Object::from_bytes(bytes) };
                (self.link(artifact.clone(), &object)?, object)
            }
            Code::Linked => {
                let reason = "its code is linked into a program; this engine compiles kernels".to_owned();
                return Err(Error::Artifact { name: artifact.name, reason });
            }
            Code::Ptx { arch, .. } => {
                let reason = format!("its code is PTX for {arch}; this engine runs kernels on the processor");
                return Err(Error::Artifact { name: artifact.name, reason });
            }
            Code::Wgsl { .. } => {
                let reason = "its code is WGSL; this engine runs kernels on the processor".to_owned();
                return Err(Error::Artifact { name: artifact.name, reason });
            }
            Code::LlvmIr(text) => {
                let key = self.key(&text);
                let cached = self.cache.as_ref().and_then(|cache| cache.get(&key));
                // SAFETY: the entry is whole and this user's, so `put` below wrote it from a compiled object.
                let cached = cached.map(|bytes| unsafe { Object::from_bytes(bytes) });
                match cached.map(|object| (self.link(artifact.clone(), &object), object)) {
                    Some((Ok(executable), object)) => {
                        tracing::debug!(%key, "the object comes from the cache");
                        (executable, object)
                    }
                    refused => {
                        if let Some((Err(error), _)) = refused {
                            tracing::warn!(%key, %error, "a cached object does not link and is rebuilt");
                        }
                        let object = self.llvm.compile(&text, &self.target)?;
                        if let Some(cache) = &self.cache
                            && let Err(error) = cache.put(&key, object.bytes())
                        {
                            tracing::warn!(%error, "a kernel is not cached");
                        }
                        (self.link(artifact.clone(), &object)?, object)
                    }
                }
            }
        };
        artifact.code = Code::Object(object.into_bytes());
        Ok((Arc::new(executable), artifact))
    }

    fn link(&self, artifact: Artifact, object: &Object) -> Result<Executable, Error> {
        let code = self.llvm.link(object)?;
        Executable::new(artifact, code, self.team.clone())
    }

    /// Everything that decides the object of an IR text.
    fn key(&self, text: &str) -> Key {
        let (major, minor, patch) = self.llvm.version();
        let versions = format!("{} {} {major}.{minor}.{patch}", env!("CARGO_PKG_VERSION"), artifact::VERSION);
        let target = &self.target;
        let parts = [&versions, &target.triple, &target.cpu, &target.features, target.passes.pipeline(), text];
        Key::of(&parts.map(str::as_bytes))
    }
}
