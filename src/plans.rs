//! Compiled plans in the cache: what lowering made of a cascade, found again by everything that decides it.
//!
//! An entry holds the plan and the mapping as texts and the artifact as bytes. Invariants: (1) the key covers the
//! cascade's printed text with its fixed extents, the mapping or the sizes asked for, what the engine compiles for (data
//! sheet, instruction set, tables), the contract's version, and the versions and sources of the compiler; (2) an entry
//! that does not read or load is compiled again, and the cache's own rules ([`Cache`]) come before that.

use einfall_ir::artifact::{self, Artifact};
use einfall_ir::cascade::Cascade;
use einfall_ir::cascade::print::print_cascade;
use einfall_ir::mapping::{self, Mapping};
use einfall_ir::tile::{self, Plan};
use einfall_runtime::cache::{Cache, Key};

use crate::lowering::{CompileOptions, Error};

/// A cascade lowered for one device.
#[derive(Debug, PartialEq)]
pub(crate) struct Compiled {
    pub(crate) plan: Plan,
    pub(crate) mapping: Mapping,
    pub(crate) artifact: Artifact,
}

impl Compiled {
    fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let artifact = self.artifact.to_bytes().map_err(|e| e.to_string())?;
        let parts = (self.plan.to_string(), self.mapping.to_string(), artifact);
        postcard::to_extend(&parts, Vec::new()).map_err(|e| e.to_string())
    }

    fn from_bytes(bytes: &[u8]) -> Result<Compiled, String> {
        type Parts<'a> = (&'a str, &'a str, &'a [u8]);
        let ((plan, mapping, artifact), rest) = postcard::take_from_bytes::<Parts>(bytes).map_err(|e| e.to_string())?;
        if !rest.is_empty() {
            return Err(format!("{} bytes are left over", rest.len()));
        }
        Ok(Compiled {
            plan: tile::parse::parse(plan).map_err(|d| d.to_string())?,
            mapping: mapping::parse::parse(mapping).map_err(|d| d.to_string())?,
            artifact: Artifact::from_bytes(artifact).map_err(|e| e.to_string())?,
        })
    }
}

/// What one engine compiles for, as far as it decides artifacts.
#[derive(Debug)]
pub(crate) struct Surroundings(Key);

impl Surroundings {
    /// Of an engine whose artifacts depend on `parts` besides the cascade and its options.
    pub(crate) fn new(parts: &[&str]) -> Surroundings {
        let versions =
            format!("einfall {} {} contract {}", env!("CARGO_PKG_VERSION"), env!("EINFALL_SOURCES"), artifact::VERSION);
        let crates = [einfall_ir::RELEASE, einfall_codegen::RELEASE, einfall_autotune::RELEASE];
        let all = [versions.as_str()].into_iter().chain(crates).chain(parts.iter().copied());
        Surroundings(Key::of(&all.map(str::as_bytes).collect::<Vec<_>>()))
    }

    fn key(&self, cascade: &Cascade, options: &CompileOptions) -> Key {
        let sizes: String = options.sizes.iter().map(|(name, n)| format!("{name}={n},")).collect();
        let mapping = options.mapping.as_ref().map(Mapping::to_string).unwrap_or_default();
        let parts = ["compiled plan", &self.0.to_string(), &print_cascade(cascade), &sizes, &mapping];
        Key::of(&parts.map(str::as_bytes))
    }

    /// The cascade (whose fixed extents are set) compiled and loaded: from the cache if it is there, else made, which loads
    /// it, and put there.
    ///
    /// # Errors
    /// Those of `make` and `load`.
    pub(crate) fn compile<E>(
        &self,
        cache: Option<&Cache>,
        cascade: &Cascade,
        options: &CompileOptions,
        make: impl FnOnce() -> Result<(Compiled, E), Error>,
        load: impl Fn(Artifact) -> Result<E, Error>,
    ) -> Result<(Plan, Mapping, E), Error> {
        let Some(cache) = cache else {
            let (made, loaded) = make()?;
            return Ok((made.plan, made.mapping, loaded));
        };
        let key = self.key(cascade, options);
        if let Some(bytes) = cache.get(&key) {
            let read = Compiled::from_bytes(&bytes);
            let loaded = read.and_then(|c| Ok((c.plan, c.mapping, load(c.artifact).map_err(|e| e.to_string())?)));
            match loaded {
                Ok(loaded) => {
                    tracing::debug!(%key, cascade = cascade.name, "the compiled plan comes from the cache");
                    return Ok(loaded);
                }
                Err(error) => tracing::warn!(%key, error, "a cached plan is refused and is compiled again"),
            }
        }
        let (made, loaded) = make()?;
        if let Err(error) = made.to_bytes().and_then(|b| cache.put(&key, &b).map_err(|e| e.to_string())) {
            tracing::warn!(error, "a compiled plan is not cached");
        }
        Ok((made.plan, made.mapping, loaded))
    }
}

#[cfg(test)]
mod tests;
