//! Arrays in device memory.
//!
//! Invariant: every element lies inside the memory the array holds on to, which lives as long as any array, prepared
//! launch or graph that uses it.

use super::driver::{Context, Direction, Memory, Rows, Stream};
use super::error::CudaError;
use super::tensor_map::ALIGN_BYTES;
use crate::array::{HostArray, View};
use einfall_ir::array::strides as dense_strides;
use einfall_ir::dtype::DType;
use std::sync::Arc;

/// A strided array in the memory of one device. Clones share the memory.
#[derive(Clone, Debug)]
pub struct DeviceArray {
    pub(super) memory: Arc<Memory>,
    dtype: DType,
    shape: Vec<u64>,
    /// In elements.
    strides: Vec<i64>,
}

/// Row-major strides in elements, with the innermost dimension's rows padded to whole multiples of 16 bytes, as copy
/// engines want them.
pub(super) fn padded_strides(dtype: DType, shape: &[u64]) -> Option<Vec<i64>> {
    let per = (ALIGN_BYTES * 8 / u64::from(dtype.bits())).max(1);
    let mut strides = vec![1i64; shape.len()];
    let mut below = shape.last().copied().unwrap_or(1).checked_next_multiple_of(per)?;
    for d in (0..shape.len().saturating_sub(1)).rev() {
        strides[d] = i64::try_from(below).ok()?;
        below = below.checked_mul(shape[d].max(1))?;
    }
    i64::try_from(below).ok()?;
    Some(strides)
}

impl DeviceArray {
    pub(super) fn alloc(
        context: &Arc<Context>,
        dtype: DType,
        shape: &[u64],
        padded: bool,
        what: &str,
    ) -> Result<DeviceArray, CudaError> {
        let dense = crate::array::dense_bytes(dtype, shape)? as u64;
        let (strides, bytes) = match padded && dense > 0 && shape.len() > 1 {
            false => (dense_strides(shape), dense),
            true => {
                let overflow = || crate::array::ArrayError::Overflow { dtype, shape: shape.to_vec() };
                let strides = padded_strides(dtype, shape).ok_or_else(overflow)?;
                let elems = strides[0] as u64 * shape[0];
                (strides, dtype.bytes(elems))
            }
        };
        let memory = Arc::new(Memory::alloc(context, bytes, what)?);
        Ok(DeviceArray { memory, dtype, shape: shape.to_vec(), strides })
    }

    /// Memory of someone else (another library's tensor) as an array; strides in elements.
    ///
    /// # Errors
    /// [`CudaError::Array`] for an address that is not aligned, or strides that do not fit.
    ///
    /// # Safety
    /// Every element is inside one live allocation that a kernel of `engine`'s device may use, for as long as any
    /// clone of the array, prepared launch or graph.
    pub unsafe fn from_raw(
        engine: &super::Engine,
        dtype: DType,
        address: u64,
        shape: &[u64],
        strides: &[i64],
    ) -> Result<DeviceArray, CudaError> {
        // SAFETY: only addresses are computed.
        let view = unsafe { View::from_raw(dtype, address as usize as *const u8, shape, strides)? };
        let bytes = view.extent().len() as u64;
        let memory = Arc::new(Memory::foreign(engine.context(), address, bytes));
        Ok(DeviceArray { memory, dtype, shape: shape.to_vec(), strides: strides.to_vec() })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Strides in elements.
    pub fn strides(&self) -> &[i64] {
        &self.strides
    }

    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.memory.address
    }

    /// Number of the device it is on.
    pub fn device(&self) -> usize {
        self.memory.context.index
    }

    /// Its place as a view, whose addresses are the device's: for arithmetic alone, never to be read on the host.
    pub(super) fn place(&self) -> Result<View<'static>, CudaError> {
        // SAFETY: nothing is read through it.
        Ok(unsafe { View::from_raw(self.dtype, self.address() as usize as *const u8, &self.shape, &self.strides)? })
    }

    /// Fills its memory, padding included, with a byte: 0xff makes NaNs of every float type.
    ///
    /// # Errors
    /// [`CudaError::Call`], [`CudaError::Refused`].
    pub fn fill(&self, stream: &Stream, byte: u8) -> Result<(), CudaError> {
        stream.fill(&self.memory, byte)
    }

    /// Copies a host array of the same type and shape here; returns when that is done.
    ///
    /// # Errors
    /// [`CudaError::Array`] where type or shape differ, [`CudaError::Call`], [`CudaError::Refused`].
    pub fn copy_from(&self, stream: &Stream, host: &HostArray) -> Result<(), CudaError> {
        self.check_host(host)?;
        stream.copy_rows(&self.rows(host.bytes().as_ptr().cast_mut().cast()), Direction::ToDevice)
    }

    /// Copies it to the host, dense; returns when that is done.
    ///
    /// # Errors
    /// [`CudaError::Array`] where host memory is short, [`CudaError::Kernel`], [`CudaError::Refused`].
    pub fn to_host(&self, stream: &Stream) -> Result<HostArray, CudaError> {
        let mut host = HostArray::zeros(self.dtype, &self.shape)?;
        self.check_host(&host)?;
        stream.copy_rows(&self.rows(host.bytes_mut().as_mut_ptr().cast()), Direction::ToHost)?;
        Ok(host)
    }

    /// A host array fits if it has the type and shape, and the strides here are dense but for row padding.
    fn check_host(&self, host: &HostArray) -> Result<(), CudaError> {
        let (expected, found) = (self.dtype.bytes(self.shape.iter().product()), host.bytes().len() as u64);
        if host.dtype() != self.dtype || host.shape() != self.shape || found != expected {
            return Err(crate::array::ArrayError::Length { shape: self.shape.clone(), expected, found }.into());
        }
        let elems = self.memory.bytes * 8 / u64::from(self.dtype.bits());
        let fits = host.elems() == 0 || self.pitch().is_some();
        if fits { Ok(()) } else { Err(out_of_bounds(&self.shape, &self.strides, elems)) }
    }

    /// Elements from row to row, if its rows follow each other at equal distances.
    fn pitch(&self) -> Option<u64> {
        let n = self.shape.len();
        let real = |d: usize| self.shape[d] > 1;
        if n > 0 && real(n - 1) && self.strides[n - 1] != 1 {
            return None;
        }
        let inner = self.shape.last().copied().unwrap_or(1);
        let mut pitch = None;
        let mut rows_below = 1u64;
        for d in (0..n.saturating_sub(1)).rev() {
            if !real(d) {
                continue;
            }
            let stride = u64::try_from(self.strides[d]).ok()?;
            let p = *pitch.get_or_insert(stride);
            if stride != p.checked_mul(rows_below)? || p < inner {
                return None;
            }
            rows_below *= self.shape[d];
        }
        Some(pitch.unwrap_or(inner))
    }

    fn rows(&self, host: *mut std::ffi::c_void) -> Rows {
        let bytes = |elems: u64| self.dtype.bytes(elems) as usize;
        let inner = self.shape.last().copied().unwrap_or(1);
        let rows: u64 = self.shape.iter().take(self.shape.len().saturating_sub(1)).product();
        let pitch = self.pitch().unwrap_or(inner);
        if pitch == inner {
            // One long row: no limit of the copy engine's pitch applies.
            let all = bytes(inner * rows);
            return Rows { host, device: self.memory.address, rows: 1, row_bytes: all, pitch_bytes: all };
        }
        let (row_bytes, pitch_bytes) = (bytes(inner), bytes(pitch));
        Rows { host, device: self.memory.address, rows: rows as usize, row_bytes, pitch_bytes }
    }
}

fn out_of_bounds(shape: &[u64], strides: &[i64], elems: u64) -> CudaError {
    crate::array::ArrayError::OutOfBounds { shape: shape.to_vec(), strides: strides.to_vec(), elems }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_padded_to_sixteen_bytes() {
        assert_eq!(padded_strides(DType::BF16, &[3, 5, 63]), Some(vec![320, 64, 1]));
        assert_eq!(padded_strides(DType::F32, &[3, 64]), Some(vec![64, 1]));
        assert_eq!(padded_strides(DType::U8, &[2, 1]), Some(vec![16, 1]));
        assert_eq!(padded_strides(DType::F32, &[7]), Some(vec![1]));
        assert_eq!(padded_strides(DType::F32, &[u64::MAX, u64::MAX]), None);
    }
}
