//! Arrays in an adapter's memory, with guard bytes before and after.
//!
//! Buffers of WebGPU have no addresses. At a launch each array gets a range of numbers of its own, so that checks of overlap
//! and alignment are those of every device. Invariant: arrays are dense; all bytes of a buffer but the array's are
//! [`GUARD`] since it was made.

use super::answer::Wait;
use super::engine::Shared;
use crate::arguments::Place;
use crate::array::{HostArray, View, dense_bytes};
use crate::shaders::WgpuError;
use einfall_ir::array::strides;
use einfall_ir::dtype::DType;
use std::sync::Arc;

/// The byte around arrays: NaN in every float type.
const GUARD: u8 = 0xff;
/// Bytes before and after: what offsets of bindings are multiples of everywhere.
pub(super) const GUARD_BYTES: u64 = 256;
/// Bindings are whole vectors of four words.
const ITEM_BYTES: u64 = 16;

/// Numbers for the memory of one launch's arrays.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    given: Vec<(wgpu::Buffer, usize)>,
    next: usize,
}

impl Numbers {
    /// The first number of an array; arrays of one buffer have the same.
    fn of(&mut self, array: &DeviceArray) -> Result<usize, WgpuError> {
        if let Some((_, base)) = self.given.iter().find(|(buffer, _)| *buffer == array.buffer) {
            return Ok(*base);
        }
        let base = self.next + GUARD_BYTES as usize;
        let end = usize::try_from(array.buffer.size()).ok().and_then(|size| base.checked_add(size));
        let next = end.and_then(|end| end.checked_next_multiple_of(GUARD_BYTES as usize));
        self.next = next.filter(|next| isize::try_from(*next).is_ok()).ok_or_else(|| WgpuError::Memory {
            what: "an array after the launch's others".to_owned(),
            bytes: array.bytes,
            adapter: array.shared.adapter.name.clone(),
        })?;
        self.given.push((array.buffer.clone(), base));
        Ok(base)
    }
}

/// A dense array in an adapter's memory.
#[derive(Clone, Debug)]
pub struct DeviceArray {
    pub(super) shared: Arc<Shared>,
    pub(super) buffer: wgpu::Buffer,
    dtype: DType,
    shape: Vec<u64>,
    bytes: u64,
}

impl DeviceArray {
    pub(super) async fn new(
        shared: &Arc<Shared>,
        dtype: DType,
        shape: &[u64],
        what: &str,
    ) -> Result<DeviceArray, WgpuError> {
        shared.alive()?;
        let bytes = dense_bytes(dtype, shape)? as u64;
        let bound = bytes.next_multiple_of(ITEM_BYTES).max(ITEM_BYTES);
        let limit = |what: String, limit, most| {
            Err(WgpuError::Limit { what, limit, adapter: shared.adapter.name.clone(), most })
        };
        let adapter = &shared.adapter;
        if bound > adapter.binding_bytes {
            return limit(format!("{what} has {bytes} bytes"), "maxStorageBufferBindingSize", adapter.binding_bytes);
        }
        let size = bound + 2 * GUARD_BYTES;
        if size > adapter.buffer_bytes {
            return limit(format!("{what} has {bytes} bytes"), "maxBufferSize", adapter.buffer_bytes);
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: Some(what), size, usage, mapped_at_creation: false };
        let buffer = shared.buffer(what, &descriptor).await?;
        let array = DeviceArray { shared: Arc::clone(shared), buffer, dtype, shape: shape.to_vec(), bytes };
        array.poison();
        Ok(array)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Bytes of its binding.
    pub(super) fn bound_bytes(&self) -> u64 {
        self.buffer.size() - 2 * GUARD_BYTES
    }

    /// Fills it, and everything around it, with NaNs.
    pub fn poison(&self) {
        const CHUNK: u64 = 1 << 20;
        let chunk = vec![GUARD; CHUNK.min(self.buffer.size()) as usize];
        let mut at = 0;
        while at < self.buffer.size() {
            let n = (self.buffer.size() - at).min(CHUNK);
            self.shared.queue.write_buffer(&self.buffer, at, &chunk[..n as usize]);
            at += n;
        }
    }

    /// Its place as a view, whose addresses are numbers of a launch: for arithmetic alone, never to be read.
    pub(super) fn place(&self, numbers: &mut Numbers) -> Result<View<'static>, WgpuError> {
        let base = numbers.of(self)? as *const u8;
        // SAFETY: nothing is read through it.
        Ok(unsafe { View::from_raw(self.dtype, base, &self.shape, &strides(&self.shape))? })
    }

    /// Where kernels find it, a temporary.
    pub(super) fn temporary(&self, numbers: &mut Numbers) -> Result<Place, WgpuError> {
        let view = self.place(numbers)?;
        Ok(Place { base: view.base() as usize, strides: view.strides().to_vec(), scalar: 0 })
    }

    /// Copies a host array of the same type and shape here.
    ///
    /// # Errors
    /// [`WgpuError::Host`] where type or shape differ.
    pub fn copy_from(&self, host: &HostArray) -> Result<(), WgpuError> {
        if host.dtype() != self.dtype || host.shape() != self.shape {
            let (expected, found) =
                (format!("{}{:?}", self.dtype, self.shape), format!("{}{:?}", host.dtype(), host.shape()));
            return Err(WgpuError::Host { expected, found });
        }
        // Copies are whole words; what is added stays as it was.
        let mut bytes = host.bytes().to_vec();
        bytes.resize(bytes.len().next_multiple_of(4), GUARD);
        self.shared.queue.write_buffer(&self.buffer, GUARD_BYTES, &bytes);
        Ok(())
    }

    /// Copies it to the host once everything before is done; `name` is for errors.
    ///
    /// # Errors
    /// [`WgpuError::Guard`] where bytes around it changed, [`WgpuError::Lost`].
    #[cfg(not(target_family = "wasm"))]
    pub fn to_host(&self, name: &str) -> Result<HostArray, WgpuError> {
        super::answer::done(self.host(name, Wait::Block))
    }

    /// As `DeviceArray::to_host`, without blocking.
    ///
    /// # Errors
    /// [`WgpuError::Guard`] where bytes around it changed, [`WgpuError::Lost`].
    pub async fn to_host_async(&self, name: &str) -> Result<HostArray, WgpuError> {
        self.host(name, Wait::Yield).await
    }

    pub(super) async fn host(&self, name: &str, wait: Wait) -> Result<HostArray, WgpuError> {
        let all = self.shared.read_back(&self.buffer, wait).await?;
        let data = GUARD_BYTES as usize..(GUARD_BYTES + self.bytes) as usize;
        if all[..data.start].iter().chain(&all[data.end..]).any(|b| *b != GUARD) {
            return Err(WgpuError::Guard { array: name.to_owned() });
        }
        Ok(HostArray::from_bytes(self.dtype, &self.shape, &all[data])?)
    }
}
