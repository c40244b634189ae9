//! Burn's tensors as arrays.

use burn::backend::Cube;
use burn::tensor::{DType as BurnType, Float, Int, Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::Device;
use cubecl::zspace::Strides;
use cubecl::zspace::metadata::Metadata;
use einfall::ir::dtype::DType;

use crate::{Array, Error};

/// Types of elements that tensors and cascades both have.
const TYPES: [(BurnType, DType); 8] = [
    (BurnType::F64, DType::F64),
    (BurnType::F32, DType::F32),
    (BurnType::F16, DType::F16),
    (BurnType::BF16, DType::BF16),
    (BurnType::I64, DType::I64),
    (BurnType::I32, DType::I32),
    (BurnType::I8, DType::I8),
    (BurnType::U8, DType::U8),
];

impl Array {
    /// A float tensor on a device of cubecl's. Tensors whose last dimension is not dense are copied; others are read where
    /// they are.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor of another backend, one that is tracked for gradients, and a type that no cascade has.
    pub fn from_tensor<const D: usize>(tensor: Tensor<D>) -> Result<Array, Error> {
        let primitive = tensor.try_into_primitive::<Cube>();
        Array::of(primitive.map_err(|e| Error::Tensor(format!("is not on a device of cubecl's: {e:?}")))?)
    }

    /// As [`Array::from_tensor`], of integers.
    ///
    /// # Errors
    /// As [`Array::from_tensor`].
    pub fn from_int_tensor<const D: usize>(tensor: Tensor<D, Int>) -> Result<Array, Error> {
        let primitive = tensor.try_into_primitive::<Cube>();
        Array::of(primitive.map_err(|e| Error::Tensor(format!("is not on a device of cubecl's: {e:?}")))?)
    }

    fn of(tensor: CubeTensor) -> Result<Array, Error> {
        let Some((_, dtype)) = TYPES.iter().find(|(t, _)| *t == tensor.dtype) else {
            return Err(Error::Tensor(format!("has elements of {:?}, which no cascade has", tensor.dtype)));
        };
        let dense = tensor.meta.strides().iter().next_back().is_none_or(|s| *s == 1);
        let tensor = if dense && !tensor.meta.is_tiled() { tensor } else { into_contiguous(tensor) };
        let shape: Vec<u64> = tensor.meta.shape().iter().map(|n| *n as u64).collect();
        let strides: Vec<i64> = tensor.meta.strides().iter().map(|n| *n as i64).collect();
        Ok(Array::new(tensor.handle, *dtype, &shape, &strides))
    }

    fn primitive<const D: usize>(self, device: &Device) -> Result<CubeTensor, Error> {
        let Array { handle, dtype, shape, strides } = self;
        if shape.len() != D {
            return Err(Error::Tensor(format!("of shape {shape:?} has {} dimensions, not {D}", shape.len())));
        }
        let Some((element, _)) = TYPES.iter().find(|(_, t)| *t == dtype) else {
            return Err(Error::Tensor(format!("would have elements of {dtype}, which Burn does not have")));
        };
        let client = device.client();
        if client.service_id() != handle.service {
            return Err(Error::Elsewhere { array: "the tensor".to_owned() });
        }
        let Ok(strides) = strides.iter().map(|n| usize::try_from(*n)).collect::<Result<Vec<_>, _>>() else {
            return Err(Error::Strides { dtype, shape, strides });
        };
        let shape = Shape::from(shape.iter().map(|n| *n as usize).collect::<Vec<_>>());
        // An array updated in place may have padded rows.
        let metadata = Metadata::new(shape, Strides::new(&strides));
        Ok(CubeTensor::new(client, handle, metadata, device.clone(), *element))
    }

    /// A result as a tensor on the device whose client launched.
    ///
    /// # Errors
    /// [`Error::Tensor`] for another number of dimensions and for elements that are no floats of Burn's,
    /// [`Error::Elsewhere`] for another device.
    pub fn into_tensor<const D: usize>(self, device: &Device) -> Result<Tensor<D>, Error> {
        if !self.dtype.is_float() {
            return Err(Error::Tensor(format!("has elements of {}, which are no floats", self.dtype)));
        }
        Ok(Tensor::<D, Float>::from_primitive::<Cube>(self.primitive::<D>(device)?))
    }

    /// As [`Array::into_tensor`], of integers.
    ///
    /// # Errors
    /// As [`Array::into_tensor`].
    pub fn into_int_tensor<const D: usize>(self, device: &Device) -> Result<Tensor<D, Int>, Error> {
        if self.dtype.is_float() {
            return Err(Error::Tensor(format!("has elements of {}, which are no integers", self.dtype)));
        }
        Ok(Tensor::<D, Int>::from_primitive::<Cube>(self.primitive::<D>(device)?))
    }
}
