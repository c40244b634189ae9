//! Tensor maps: from a recipe and an array to the numbers that the driver encodes.
//!
//! Invariant: numbers that the hardware does not take are refused here, with the rule they break, before the driver
//! sees them. Source: CUDA driver API, `cuTensorMapEncodeTiled`.

use super::driver::{Context, call};
use super::error::CudaError;
use cudarc::driver::sys;
use einfall_ir::artifact::TensorMap;
use einfall_ir::dtype::DType;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

/// Dimensions of a map at most.
const MAX_DIMS: usize = 5;
/// Elements of a box along a dimension at most.
const MAX_BOX: u32 = 256;
/// Multiple that addresses and strides must be of, in bytes.
pub(super) const ALIGN_BYTES: u64 = 16;

/// An encoded map: 128 bytes.
pub(super) type Encoded = [u64; 16];

/// What a map is encoded from. Dimensions innermost first.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Params {
    pub(super) dtype: DType,
    pub(super) base: u64,
    pub(super) extents: Vec<u64>,
    /// Of all dimensions but the innermost.
    pub(super) stride_bytes: Vec<u64>,
    pub(super) boxes: Vec<u32>,
    pub(super) swizzle_bytes: u32,
}

/// The numbers of a map for an array at `base` of `shape` and `strides` (in elements, outermost first).
///
/// # Errors
/// The rule of the hardware that the array or the recipe breaks, in words.
pub(super) fn params(
    map: &TensorMap,
    dtype: DType,
    base: u64,
    shape: &[u64],
    strides: &[i64],
) -> Result<Params, String> {
    let elem_bytes = u64::from(dtype.bits()) / 8;
    let dims = map.dims.len();
    if dtype.bits() < 8 || data_type(dtype).is_none() {
        return Err(format!("it does not move elements of type {dtype}"));
    }
    if dims == 0 || dims > MAX_DIMS || map.extents.len() != dims || map.dims.iter().any(|d| *d >= shape.len()) {
        return Err(format!("a map of {dims} dimensions over {} cannot be", shape.len()));
    }
    if !base.is_multiple_of(ALIGN_BYTES) {
        return Err(format!("its address {base:#x} is no multiple of {ALIGN_BYTES} bytes"));
    }
    if let Some(n) = map.extents.iter().find(|n| **n == 0 || **n > MAX_BOX) {
        return Err(format!("a box of {n} elements; boxes are of 1 to {MAX_BOX}"));
    }
    let inner_bytes = u64::from(map.extents[0]) * elem_bytes;
    if !inner_bytes.is_multiple_of(ALIGN_BYTES) {
        return Err(format!("a box of {inner_bytes} bytes a row; they are multiples of {ALIGN_BYTES}"));
    }
    match map.swizzle_bytes {
        0 => {}
        32 | 64 | 128 if inner_bytes <= u64::from(map.swizzle_bytes) => {}
        32 | 64 | 128 => {
            return Err(format!("a box of {inner_bytes} bytes a row under a {} byte swizzle", map.swizzle_bytes));
        }
        other => return Err(format!("a swizzle of {other} bytes; there are 32, 64 and 128")),
    }
    let extents: Vec<u64> = map.dims.iter().map(|d| shape[*d]).collect();
    if let Some(n) = extents.iter().find(|n| **n == 0 || **n > 1 << 32) {
        return Err(format!("an extent of {n}"));
    }
    let inner = map.dims[0];
    if shape[inner] > 1 && strides[inner] != 1 {
        return Err(format!("its stride in dimension {inner} is {}, not 1", strides[inner]));
    }
    // Elements outside the map's dimensions would not be reached.
    if let Some(d) = (0..shape.len()).find(|d| !map.dims.contains(d) && shape[*d] > 1) {
        return Err(format!("its dimension {d} of extent {} is not in the map", shape[d]));
    }
    let mut stride_bytes = Vec::new();
    // A dimension of extent 1 has any stride: one that is never used and always valid.
    let mut reach = (extents[0] * elem_bytes).next_multiple_of(ALIGN_BYTES);
    for (d, n) in map.dims.iter().zip(&extents).skip(1) {
        let bytes = match strides[*d] {
            _ if *n == 1 => reach,
            s if s <= 0 => return Err(format!("its stride in dimension {d} is {s}; it must be positive")),
            s => s as u64 * elem_bytes,
        };
        if !bytes.is_multiple_of(ALIGN_BYTES) || bytes >= 1 << 40 {
            return Err(format!(
                "its stride in dimension {d} is {bytes} bytes, no multiple of {ALIGN_BYTES} below 2^40: pad the rows"
            ));
        }
        reach = reach.max(bytes.saturating_mul(*n)).min(1 << 39).next_multiple_of(ALIGN_BYTES);
        stride_bytes.push(bytes);
    }
    Ok(Params { dtype, base, extents, stride_bytes, boxes: map.extents.clone(), swizzle_bytes: map.swizzle_bytes })
}

/// The driver's name for an element type; types of one width and no arithmetic share.
fn data_type(dtype: DType) -> Option<sys::CUtensorMapDataType> {
    use sys::CUtensorMapDataType::*;
    Some(match dtype {
        DType::F64 => CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
        DType::F32 => CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        DType::Tf32 => CU_TENSOR_MAP_DATA_TYPE_TFLOAT32,
        DType::F16 => CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::BF16 => CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::F8E4M3 | DType::F8E5M2 | DType::I8 | DType::U8 | DType::Bool => CU_TENSOR_MAP_DATA_TYPE_UINT8,
        DType::I32 => CU_TENSOR_MAP_DATA_TYPE_INT32,
        DType::I64 => CU_TENSOR_MAP_DATA_TYPE_INT64,
        DType::I4 | DType::U4 => return None,
    })
}

/// Encodes maps, each once.
#[derive(Debug, Default)]
pub(super) struct Maps {
    encoded: Mutex<HashMap<Params, Encoded>>,
}

/// Maps kept before the table is started anew.
const MAX_MAPS: usize = 1 << 14;

impl Maps {
    pub(super) fn encode(&self, context: &Context, params: &Params) -> Result<Encoded, CudaError> {
        let mut encoded = self.encoded.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(map) = encoded.get(params) {
            return Ok(*map);
        }
        if encoded.len() >= MAX_MAPS {
            encoded.clear();
        }
        context.enter()?;
        let map = encode(params)?;
        encoded.insert(params.clone(), map);
        Ok(map)
    }
}

fn encode(p: &Params) -> Result<Encoded, CudaError> {
    use sys::CUtensorMapSwizzle::*;
    let swizzle = match p.swizzle_bytes {
        32 => CU_TENSOR_MAP_SWIZZLE_32B,
        64 => CU_TENSOR_MAP_SWIZZLE_64B,
        128 => CU_TENSOR_MAP_SWIZZLE_128B,
        _ => CU_TENSOR_MAP_SWIZZLE_NONE,
    };
    let steps = [1u32; MAX_DIMS];
    let what = || {
        format!(
            "encoding a tensor map of extents {:?}, strides {:?} bytes, boxes {:?}",
            p.extents, p.stride_bytes, p.boxes
        )
    };
    let Some(data_type) = data_type(p.dtype) else {
        return call(sys::CUresult::CUDA_ERROR_INVALID_VALUE, what).map(|()| [0; 16]);
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: every list has as many numbers as the rank says (one less of strides, which may be empty); the map is
    // aligned by its type.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            data_type,
            p.extents.len() as u32,
            std::ptr::with_exposed_provenance_mut::<c_void>(p.base as usize),
            p.extents.as_ptr(),
            p.stride_bytes.as_ptr(),
            p.boxes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    call(result, what)?;
    Ok(map.opaque)
}

#[cfg(test)]
mod tests {
    use super::*;
    use einfall_ir::arena::Id;
    use einfall_ir::tile::BufferId;

    fn map(dims: &[usize], extents: &[u32], swizzle_bytes: u32) -> TensorMap {
        TensorMap { buffer: BufferId::new(0), dims: dims.to_vec(), extents: extents.to_vec(), swizzle_bytes }
    }

    #[test]
    fn a_recipe_gives_the_numbers_innermost_first() {
        // bf16 [M,K] row-major, and the same array with batch outside.
        let two = params(&map(&[1, 0], &[64, 128], 128), DType::BF16, 0x1000, &[300, 520], &[520, 1]).unwrap();
        assert_eq!((two.extents.as_slice(), two.stride_bytes.as_slice()), ([520, 300].as_slice(), [1040].as_slice()));
        assert_eq!((two.boxes.as_slice(), two.swizzle_bytes), ([64, 128].as_slice(), 128));
        let three =
            params(&map(&[2, 1, 0], &[64, 128, 1], 128), DType::BF16, 0x1000, &[7, 300, 520], &[156_000, 520, 1]);
        assert_eq!(three.unwrap().stride_bytes, [1040, 312_000]);
        // Rows padded to 16 bytes serve an odd extent.
        let odd = params(&map(&[1, 0], &[64, 128], 128), DType::BF16, 0x1000, &[300, 519], &[520, 1]).unwrap();
        assert_eq!((odd.extents.as_slice(), odd.stride_bytes.as_slice()), ([519, 300].as_slice(), [1040].as_slice()));
        // A dimension of extent 1 may have any stride.
        let one = params(&map(&[2, 1, 0], &[64, 1, 64], 128), DType::BF16, 0x1000, &[4, 1, 64], &[64, 3, 1]).unwrap();
        assert!(one.stride_bytes.iter().all(|s| s % 16 == 0 && *s > 0));
        assert_eq!(one.stride_bytes[1], 128);
    }

    #[test]
    fn rules_of_the_hardware_are_named() {
        let why = |m: &TensorMap, base: u64, shape: &[u64], strides: &[i64]| {
            params(m, DType::BF16, base, shape, strides).unwrap_err()
        };
        let good = map(&[1, 0], &[64, 128], 128);
        let cases = [
            (why(&good, 0x1008, &[8, 64], &[64, 1]), "its address 0x1008 is no multiple of 16 bytes"),
            (why(&good, 0, &[8, 63], &[63, 1]), "dimension 0 is 126 bytes, no multiple of 16"),
            (why(&good, 0, &[8, 64], &[1, 8]), "its stride in dimension 1 is 8, not 1"),
            (why(&good, 0, &[8, 64], &[-64, 1]), "must be positive"),
            (why(&map(&[1, 0], &[128, 8], 128), 0, &[8, 128], &[128, 1]), "256 bytes a row under a 128 byte"),
            (why(&map(&[1, 0], &[64, 257], 128), 0, &[300, 64], &[64, 1]), "a box of 257"),
            (why(&map(&[1, 0], &[4, 8], 0), 0, &[8, 64], &[64, 1]), "8 bytes a row"),
            (why(&map(&[1], &[64], 128), 0, &[8, 64], &[64, 1]), "dimension 0 of extent 8 is not in the map"),
            (why(&good, 0, &[0, 64], &[64, 1]), "an extent of 0"),
            (why(&map(&[1, 0], &[64, 8], 48), 0, &[8, 64], &[64, 1]), "a swizzle of 48"),
            (why(&map(&[0; 6], &[64; 6], 0), 0, &[8, 64], &[64, 1]), "6 dimensions"),
        ];
        for (found, part) in cases {
            assert!(found.contains(part), "{found:?} should say {part:?}");
        }
        assert!(params(&good, DType::I4, 0, &[8, 64], &[64, 1]).is_err());
    }
}
