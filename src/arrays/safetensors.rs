//! The .safetensors format.
//!
//! The `safetensors` crate checks the header: offsets in order, no gap, no overlap, sizes that agree with shapes, no
//! overflow. What it does not see, two entries of one name, is checked here.

use super::{Limits, Named, Reason, announced_bytes};
use einfall_ir::dtype::DType;
use einfall_runtime::HostArray;
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use std::collections::HashSet;
use std::io::{Read, Write};

fn malformed(detail: impl Into<String>) -> Reason {
    Reason::Malformed { format: ".safetensors", detail: detail.into() }
}

fn reason(error: SafeTensorError) -> Reason {
    match error {
        SafeTensorError::IoError(e) => Reason::Io(e),
        other => malformed(other.to_string()),
    }
}

/// Reads every array.
pub(super) fn read(file: std::fs::File, bytes: u64, limits: &Limits) -> Result<Vec<(String, HostArray)>, Named> {
    let bare = |reason| (None, reason);
    if bytes > limits.total_bytes {
        return Err(bare(Reason::Limit { limit: limits.total_bytes, unit: "bytes" }));
    }
    let mut data = Vec::new();
    data.try_reserve_exact(bytes as usize).map_err(|_| bare(malformed("it does not fit into memory")))?;
    // A file that grows meanwhile is cut off here, and then its header is wrong.
    file.take(bytes).read_to_end(&mut data).map_err(|e| bare(e.into()))?;
    check_names(&data)?;
    let tensors = SafeTensors::deserialize(&data).map_err(|e| bare(reason(e)))?;
    if tensors.len() > limits.arrays {
        return Err(bare(Reason::Limit { limit: limits.arrays as u64, unit: "arrays" }));
    }
    let mut views = tensors.tensors();
    views.sort_by_key(|(_, view)| view.data().as_ptr() as usize);
    let mut arrays = Vec::new();
    for (name, view) in views {
        let failed = |reason: Reason| (Some(name.clone()), reason);
        let dtype = dtype(view.dtype()).map_err(failed)?;
        let shape: Vec<u64> = view.shape().iter().map(|d| *d as u64).collect();
        announced_bytes(dtype, &shape, limits.total_bytes).map_err(failed)?;
        let array = HostArray::from_bytes(dtype, &shape, view.data()).map_err(|e| failed(e.into()))?;
        arrays.push((name, array));
    }
    Ok(arrays)
}

/// Refuses a header that names an array twice; other damage is left to the crate.
fn check_names(data: &[u8]) -> Result<(), Named> {
    struct Names;
    impl<'de> Visitor<'de> for Names {
        type Value = Option<String>;
        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            f.write_str("a map of arrays")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<String>, A::Error> {
            let mut seen = HashSet::new();
            let mut twice = None;
            while let Some(name) = map.next_key::<String>()? {
                map.next_value::<IgnoredAny>()?;
                if !seen.insert(name.clone()) {
                    twice.get_or_insert(name);
                }
            }
            Ok(twice)
        }
    }
    let Some((length, rest)) = data.split_first_chunk::<8>() else { return Ok(()) };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    let Some(header) = rest.get(..length) else { return Ok(()) };
    match serde_json::Deserializer::from_slice(header).deserialize_map(Names) {
        Ok(Some(name)) => Err((Some(name), Reason::Duplicate)),
        Ok(None) | Err(_) => Ok(()),
    }
}

fn dtype(found: Dtype) -> Result<DType, Reason> {
    Ok(match found {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F8_E4M3 => DType::F8E4M3,
        Dtype::F8_E5M2 => DType::F8E5M2,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::I8 => DType::I8,
        Dtype::U8 => DType::U8,
        Dtype::BOOL => DType::Bool,
        other => return Err(Reason::DType { found: format!("{other:?}"), hint: "" }),
    })
}

/// Writes the arrays.
pub(super) fn write(out: &mut impl Write, arrays: &[(&str, &HostArray)]) -> Result<(), Named> {
    let mut views = Vec::new();
    for (name, array) in arrays {
        let failed = |reason: Reason| (Some(name.to_string()), reason);
        let dtype = match array.dtype() {
            DType::F64 => Dtype::F64,
            DType::F32 | DType::Tf32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::F8E4M3 => Dtype::F8_E4M3,
            DType::F8E5M2 => Dtype::F8_E5M2,
            DType::I64 => Dtype::I64,
            DType::I32 => Dtype::I32,
            DType::I8 => Dtype::I8,
            DType::U8 => Dtype::U8,
            DType::Bool => Dtype::BOOL,
            dtype @ (DType::I4 | DType::U4) => {
                return Err(failed(Reason::DType { found: dtype.to_string(), hint: "" }));
            }
        };
        if *name == "__metadata__" {
            return Err(failed(malformed("`__metadata__` names no array in this format")));
        }
        let shape = array.shape().iter().map(|d| *d as usize).collect();
        let view = TensorView::new(dtype, shape, array.bytes()).map_err(|e| failed(reason(e)))?;
        views.push((name.to_string(), view));
    }
    let bytes = safetensors::serialize(views, None).map_err(|e| (None, reason(e)))?;
    out.write_all(&bytes).map_err(|e| (None, e.into()))
}
