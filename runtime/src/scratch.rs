//! Private memory of kernel calls and workspaces, kept between launches.
//!
//! A thread gets the block back that it had before, if that is free and large enough: its lines are in the caches of that
//! thread's core, where another's would be fetched from there line by line. Invariant: a block is handed to one holder at a
//! time, 64-byte aligned; its content is unspecified.

use crate::array::{ArrayError, HostArray};
use einfall_ir::dtype::DType;
use std::sync::Mutex;
use std::thread::ThreadId;

/// Blocks to be taken and given back.
#[derive(Debug, Default)]
pub struct ScratchPool {
    /// With who gave them back.
    free: Mutex<Vec<(ThreadId, HostArray)>>,
}

impl ScratchPool {
    /// A block of at least `bytes` bytes.
    pub(crate) fn take(&self, bytes: u64) -> Result<HostArray, ArrayError> {
        if bytes > 0 {
            let own = std::thread::current().id();
            let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
            // This thread's before others', of these the smallest that is large enough.
            let fits = (0..free.len()).filter(|i| free[*i].1.elems() >= bytes);
            if let Some(i) = fits.min_by_key(|i| (free[*i].0 != own, free[*i].1.elems())) {
                return Ok(free.swap_remove(i).1);
            }
        }
        HostArray::zeros(DType::U8, &[bytes])
    }

    /// Gives a block back.
    pub(crate) fn give(&self, block: HostArray) {
        if block.elems() > 0 {
            let own = std::thread::current().id();
            self.free.lock().unwrap_or_else(|e| e.into_inner()).push((own, block));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gets_its_own_block_back() {
        let pool = ScratchPool::default();
        let place = |b: &HostArray| b.bytes().as_ptr() as usize;
        let (here, small) = (pool.take(4096).unwrap(), pool.take(100).unwrap());
        let own = place(&here);
        std::thread::scope(|s| {
            s.spawn(|| {
                let there = pool.take(2048).unwrap();
                pool.give(there);
            });
        });
        pool.give(here);
        pool.give(small);
        // A larger one of its own, though another's fits better.
        let again = pool.take(2048).unwrap();
        assert_eq!(place(&again), own);
        // Another's before new memory.
        let other = pool.take(2048).unwrap();
        assert_eq!(other.elems(), 2048);
        assert!(pool.take(1).unwrap().elems() == 100 && pool.free.lock().unwrap().is_empty());
        assert_eq!(pool.take(0).unwrap().elems(), 0);
    }
}
