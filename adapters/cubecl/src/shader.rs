//! One kernel's module as cubecl takes it.
//!
//! Invariant: two shaders with different texts are never the same kernel to cubecl's cache of pipelines.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use cubecl::ir::UIntKind;
use cubecl::ir::metadata::Info;
use cubecl::prelude::*;
use cubecl::{CubeKernel, PrecompiledSource};

/// The text of a module, compared by its hash first.
#[derive(Clone, PartialEq, Eq)]
struct Source {
    hash: u64,
    text: Arc<str>,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Source({:016x})", self.hash)
    }
}

impl Hash for Source {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.hash.hash(state);
    }
}

/// A module with one entry.
#[derive(Clone, Debug)]
pub(crate) struct Shader {
    source: Source,
    entry: Arc<str>,
    dim: CubeDim,
}

impl Shader {
    /// Of a module's text, its entry and the invocations of a workgroup.
    pub(crate) fn new(text: &str, entry: &str, threads: u32) -> Shader {
        let mut hasher = DefaultHasher::new();
        (text, entry, threads).hash(&mut hasher);
        let source = Source { hash: hasher.finish(), text: text.into() };
        Shader { source, entry: entry.into(), dim: CubeDim::new_1d(threads) }
    }
}

impl KernelMetadata for Shader {
    fn name(&self) -> &'static str {
        "einfall"
    }

    fn id(&self) -> KernelId {
        // Code generation proved the bounds of accesses and that loops end.
        KernelId::new::<Self>().mode(ExecutionMode::Unchecked).cube_dim(self.dim.into()).info(self.source.clone())
    }

    fn address_type(&self) -> ElemType {
        UIntKind::U32.into()
    }
}

impl CubeKernel for Shader {
    fn define(&self) -> KernelDefinition {
        // The source is the kernel: there is nothing for cubecl to expand.
        let settings = KernelSettings::new(self.dim.into(), ExecutionMode::Unchecked, AddressType::U32);
        KernelDefinition { body: Scope::root(settings.clone()), info: Info::default(), settings }
    }

    fn source(&self) -> Option<PrecompiledSource> {
        let (source, entrypoint_name) = (self.source.text.to_string(), self.entry.to_string());
        Some(PrecompiledSource { source, entrypoint_name, lang: "wgsl" })
    }
}
