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

    /// Its elements, row-major, little-endian, once everything before is done.
    ///
    /// # Errors
    /// [`Error::Tensor`] where it is not dense, [`Error::Cubecl`] where a launch before it or the copy failed.
    pub fn to_bytes(&self, client: &Client) -> Result<Vec<u8>, Error> {
        if self.strides != strides(&self.shape) {
            return Err(Error::Tensor(format!(
                "of shape {:?} has strides {:?}: it is not dense",
                self.shape, self.strides
            )));
        }
        let bytes = client.read_one(self.handle.clone()).map_err(|e| Error::Cubecl(e.to_string()))?;
        let elems: u64 = self.shape.iter().product();
        Ok(bytes[..(elems * u64::from(self.dtype.bits())).div_ceil(8) as usize].to_vec())
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
