//! What can go wrong between an artifact and an adapter of WebGPU.
//!
//! Invariant: an error names the adapter, array, kernel or limit it is about and says what to do where something can
//! be done.

use crate::array::ArrayError;

/// What to do where there is no adapter.
const DRIVER: &str = "install a Vulkan driver (mesa-vulkan-drivers has one for processors)";

/// An error of an adapter, or of what is asked of it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum WgpuError {
    /// No adapter has such a name.
    #[error("{}", match (name.is_empty(), found.is_empty()) {
        (true, _) => format!("there is no adapter: {DRIVER}"),
        (false, true) => format!("no adapter's name contains `{name}`; there are none: {DRIVER}"),
        (false, false) => format!("no adapter's name contains `{name}`; there are: {}", found.join(", ")),
    })]
    NoAdapter {
        /// The name asked for; empty: any.
        name: String,
        /// Names of those that are there.
        found: Vec<String>,
    },
    /// Several adapters have such a name.
    #[error("{}: {}; write more of one", match name.is_empty() {
        true => "there are several adapters, and none is named".to_owned(),
        false => format!("several adapters' names contain `{name}`"),
    }, found.join(", "))]
    Ambiguous {
        /// The name asked for; empty: any.
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
    /// The adapter's memory is full.
    #[error("{what} of {bytes} bytes does not fit what is left of the memory of {adapter}")]
    Memory {
        /// What it was for: an array by its name.
        what: String,
        /// Bytes asked for.
        bytes: u64,
        /// The adapter.
        adapter: String,
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
    /// None of a kernel's variants is for these sizes; code that is compiled with them has one.
    #[error("kernel `{kernel}` cannot be launched: {reason}")]
    Sizes {
        /// The kernel.
        kernel: String,
        /// What it takes for granted of sizes.
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
