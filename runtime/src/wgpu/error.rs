//! What can go wrong between an artifact and an adapter of WebGPU.
//!
//! Invariant: an error names the adapter, array, kernel or limit it is about and says what to do where something can
//! be done.

use crate::array::ArrayError;

/// An error of an adapter, or of what is asked of it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum WgpuError {
    /// No adapter has such a name.
    #[error("no adapter's name contains `{name}`; {}", match found.is_empty() {
        true => "there are none: install a Vulkan driver (mesa-vulkan-drivers has one for processors)".to_owned(),
        false => format!("there are: {}", found.join(", ")),
    })]
    NoAdapter {
        /// The name asked for.
        name: String,
        /// Names of those that are there.
        found: Vec<String>,
    },
    /// Several adapters have such a name.
    #[error("several adapters' names contain `{name}`: {}; write more of one", found.join(", "))]
    Ambiguous {
        /// The name asked for.
        name: String,
        /// Names of those that match.
        found: Vec<String>,
    },
    /// The adapter gives no device.
    #[error("{adapter} gives no device: {reason}")]
    NoDevice {
        /// The adapter.
        adapter: String,
        /// The implementation's words.
        reason: String,
    },
    /// The device was lost, or reported an error; it is refused from then on.
    #[error("{adapter} is refused since {reason}")]
    Lost {
        /// The adapter.
        adapter: String,
        /// What happened, in the implementation's words.
        reason: String,
    },
    /// A module or pipeline is refused by the implementation.
    #[error("kernel `{kernel}` is refused by {adapter}: {reason}")]
    Refused {
        /// The kernel.
        kernel: String,
        /// The adapter.
        adapter: String,
        /// The implementation's words.
        reason: String,
    },
    /// A limit of the adapter is exceeded.
    #[error("{what}: `{limit}` of {adapter} is {most}")]
    Limit {
        /// What exceeds it, with its number.
        what: String,
        /// The limit, by WebGPU's name.
        limit: &'static str,
        /// The adapter.
        adapter: String,
        /// Its value.
        most: u64,
    },
    /// Something that the adapter lacks.
    #[error("kernel `{kernel}` needs {what}, which {adapter} does not have; compile for its own data sheet")]
    Missing {
        /// The kernel.
        kernel: String,
        /// What is missing.
        what: String,
        /// The adapter.
        adapter: String,
    },
    /// A kernel cannot be launched with these sizes and arrays.
    #[error("kernel `{kernel}` cannot be launched: {reason}")]
    Launch {
        /// The kernel.
        kernel: String,
        /// Why.
        reason: String,
    },
    /// A kernel wrote outside an array.
    #[error("bytes around `{array}` changed: a kernel wrote outside it; this is a fault of the compiler")]
    Guard {
        /// The array.
        array: String,
    },
    /// A host array of another type or shape.
    #[error("the array is {expected} and the host's is {found}")]
    Host {
        /// Type and shape on the device.
        expected: String,
        /// Type and shape on the host.
        found: String,
    },
    /// A shape or copy that cannot be.
    #[error(transparent)]
    Array(#[from] ArrayError),
}
