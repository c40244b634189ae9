//! An array in a client's memory.

use cubecl::server::Handle;
use einfall::ir::array::strides;
use einfall::ir::dtype::DType;

use crate::{Client, Error};

/// An array in a client's memory; clones share it.
#[derive(Clone, Debug)]
pub struct Array {
    pub(crate) handle: Handle,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    pub(crate) strides: Vec<i64>,
}

impl Array {
    /// An array of a buffer that holds it: extents and strides in elements.
    pub fn new(handle: Handle, dtype: DType, shape: &[u64], strides: &[i64]) -> Array {
        Array { handle, dtype, shape: shape.to_vec(), strides: strides.to_vec() }
    }

    /// A dense array of `bytes`, row-major, little-endian.
    ///
    /// # Errors
    /// [`Error::Launch`] where they are not as many as the type and the shape take.
    pub fn from_bytes(client: &Client, dtype: DType, shape: &[u64], bytes: &[u8]) -> Result<Array, Error> {
        // Checks the length.
        let host =
            einfall::runtime::HostArray::from_bytes(dtype, shape, bytes).map_err(einfall::runtime::Error::from)?;
        Ok(Array::new(client.create_from_slice(&words(host.bytes())), dtype, shape, &strides(shape)))
    }

    /// A dense array with unspecified content.
    pub fn empty(client: &Client, dtype: DType, shape: &[u64]) -> Array {
        let elems: u64 = shape.iter().product();
        let bytes = (elems * u64::from(dtype.bits())).div_ceil(8).next_multiple_of(4).max(4);
        Array::new(client.empty(bytes as usize), dtype, shape, &strides(shape))
    }

    /// A buffer of its own that holds the same array, padding and all, with unspecified content.
    pub(crate) fn stand_in(&self, client: &Client) -> Array {
        let bytes = self.handle.size_in_used().next_multiple_of(4).max(4);
        Array { handle: client.empty(bytes as usize), ..self.clone() }
    }

    /// Its elements, row-major, little-endian, without what lies between its rows, once everything before is done.
    ///
    /// # Errors
    /// [`Error::Strides`] where a stride leads before the buffer, beyond its end or into the middle of a byte,
    /// [`Error::Cubecl`] where a launch before it or the copy failed.
    pub fn to_bytes(&self, client: &Client) -> Result<Vec<u8>, Error> {
        let bytes = client.read_one(self.handle.clone()).map_err(|e| Error::Cubecl(e.to_string()))?;
        let bits = u64::from(self.dtype.bits());
        let elems: u64 = self.shape.iter().product();
        if self.strides == strides(&self.shape) {
            let all = bytes.get(..(elems * bits).div_ceil(8) as usize);
            return all.map(<[u8]>::to_vec).ok_or_else(|| self.strides_error());
        }
        let size = bits as usize / 8;
        if !bits.is_multiple_of(8) {
            return Err(self.strides_error());
        }
        let mut all = Vec::with_capacity(elems as usize * size);
        for elem in 0..elems {
            let (mut rest, mut at) = (elem, 0i64);
            for (n, stride) in self.shape.iter().zip(&self.strides).rev() {
                at = at.saturating_add(stride.saturating_mul((rest % n) as i64));
                rest /= n;
            }
            let start = usize::try_from(at).ok().and_then(|at| at.checked_mul(size));
            let found = start.and_then(|start| bytes.get(start..start.checked_add(size)?));
            all.extend_from_slice(found.ok_or_else(|| self.strides_error())?);
        }
        Ok(all)
    }

    fn strides_error(&self) -> Error {
        Error::Strides { dtype: self.dtype, shape: self.shape.clone(), strides: self.strides.clone() }
    }

    /// Its buffer, for kernels of one's own. Who keeps a copy shares the array: it is not updated in place meanwhile.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Strides, in elements.
    pub fn strides(&self) -> &[i64] {
        &self.strides
    }
}

/// Bytes to a whole number of words: what is bound.
fn words(bytes: &[u8]) -> Vec<u8> {
    let mut all = bytes.to_vec();
    all.resize(bytes.len().next_multiple_of(4).max(4), 0);
    all
}
