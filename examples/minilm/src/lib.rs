//! Sentence embeddings by all-MiniLM-L6-v2 on kernels derived from cascades.
//!
//! Invariant: every numeric operation between token ids and similarities is in `encoder.ein`; this code loads,
//! tokenizes, launches and prints. Sources: BERT (Devlin et al., arXiv 1810.04805), Sentence-BERT (Reimers &
//! Gurevych, arXiv 1908.10084).

pub mod encoder;
pub mod model;
pub mod report;

use std::path::PathBuf;

/// Why there are no embeddings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the model is missing or contradicts itself.
    #[error("{}: {reason}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The weights cannot be read.
    #[error(transparent)]
    File(#[from] einfall::arrays::FileError),
    /// Tokens that the model does not have.
    #[error("tokens: {0}")]
    Tokens(String),
    /// The encoder does not compile or run.
    #[error(transparent)]
    Einfall(#[from] einfall::Error),
    /// Memory or arrays.
    #[error(transparent)]
    Runtime(#[from] einfall::runtime::Error),
    /// The plan of a layer has more kernels than [`encoder::MAX_LAYER_KERNELS`].
    #[error("a layer is {found} kernels, more than {most}")]
    Kernels {
        /// Kernels of the plan.
        found: usize,
        /// The limit.
        most: usize,
    },
    /// A fault in `encoder.ein`.
    #[error("encoder.ein: {0}")]
    Text(String),
}
