//! Private memory of kernel calls and workspaces, kept between launches.
//!
//! Invariant: a block is handed to one holder at a time, 64-byte aligned; its content is unspecified.

use crate::array::{ArrayError, HostArray};
use einfall_ir::dtype::DType;
use std::sync::Mutex;

/// Blocks to be taken and given back.
#[derive(Debug, Default)]
pub struct ScratchPool {
    free: Mutex<Vec<HostArray>>,
}

impl ScratchPool {
    /// A block of at least `bytes` bytes.
    pub(crate) fn take(&self, bytes: u64) -> Result<HostArray, ArrayError> {
        if bytes > 0 {
            let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
            // The smallest that is large enough.
            let fits = (0..free.len()).filter(|i| free[*i].elems() >= bytes).min_by_key(|i| free[*i].elems());
            if let Some(i) = fits {
                return Ok(free.swap_remove(i));
            }
        }
        HostArray::zeros(DType::U8, &[bytes])
    }

    /// Gives a block back.
    pub(crate) fn give(&self, block: HostArray) {
        if block.elems() > 0 {
            self.free.lock().unwrap_or_else(|e| e.into_inner()).push(block);
        }
    }
}
