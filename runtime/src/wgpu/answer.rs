//! What a device answers later, waited for with or without a thread to block.
//!
//! Invariant: nothing here blocks in a browser, whose devices answer between two turns of its loop alone. A native device
//! answers while it is polled: who waits for one as a future is woken again and again until it has answered.

use super::engine::Shared;
use crate::shaders::WgpuError;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

/// A future whose device has answered by now, or answers at once.
#[cfg(not(target_family = "wasm"))]
pub(super) fn done<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut std::task::Context::from_waker(Waker::noop())) {
            return value;
        }
        std::thread::yield_now();
    }
}

/// How to wait before an answer is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// The thread sleeps until the device is done.
    #[cfg(not(target_family = "wasm"))]
    Block,
    /// The future waits.
    Yield,
}

/// What a callback of a device says; clones are the same answer.
#[derive(Debug)]
pub(super) struct Answer<T>(Arc<Mutex<State<T>>>);

#[derive(Debug)]
struct State<T> {
    value: Option<T>,
    waker: Option<Waker>,
}

impl<T> Clone for Answer<T> {
    fn clone(&self) -> Answer<T> {
        Answer(Arc::clone(&self.0))
    }
}

impl<T> Answer<T> {
    pub(super) fn new() -> Answer<T> {
        Answer(Arc::new(Mutex::new(State { value: None, waker: None })))
    }

    /// The answer, given once.
    pub(super) fn give(&self, value: T) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.value = Some(value);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The answer, once it is there.
    ///
    /// # Errors
    /// [`WgpuError::Lost`] where the device is, or cannot be asked.
    pub(super) async fn wait(&self, shared: &Shared, wait: Wait) -> Result<T, WgpuError> {
        match wait {
            #[cfg(not(target_family = "wasm"))]
            Wait::Block => shared.poll(wgpu::PollType::wait_indefinitely())?,
            Wait::Yield => {}
        }
        std::future::poll_fn(|context| {
            if let Err(e) = shared.poll(wgpu::PollType::Poll) {
                return Poll::Ready(Err(e));
            }
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(value) = state.value.take() {
                return Poll::Ready(Ok(value));
            }
            state.waker = Some(context.waker().clone());
            drop(state);
            if cfg!(not(target_family = "wasm")) {
                context.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await
    }
}
