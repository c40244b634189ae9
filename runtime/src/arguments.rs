//! Arguments of a launch against what the program takes, the same for every device.
//!
//! Invariant: nothing is launched unless every array has its type, shape and strides, is given once, and no array that
//! is written shares memory with another. Addresses are compared, never read.

use crate::array::View;
use crate::error::Error;
use crate::program::{Program, Sizes};
use einfall_ir::arena::Id;
use einfall_ir::artifact::Slot;
use einfall_ir::dtype::DType;
use einfall_ir::tile::{Buffer, BufferId, BufferKind};

/// An array by name.
pub(crate) type Named<'n, 'v> = (&'n str, &'v View<'v>);

/// Where one buffer is.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) base: usize,
    pub(crate) strides: Vec<i64>,
    /// Slot bits of a scalar.
    pub(crate) scalar: u64,
}

/// Checks the arguments; where each buffer is, `None` for workspace. `read_scalar` gives the slot bits of a scalar
/// that is given as an array of one element.
pub(crate) fn places(
    program: &Program,
    sizes: &Sizes,
    inputs: &[Named],
    outputs: &[Named],
    scalars: &[(&str, f64)],
    read_scalar: impl Fn(DType, &View) -> Result<u64, Error>,
) -> Result<Vec<Option<Place>>, Error> {
    let buffers = &program.artifact.buffers;
    let mut places: Vec<Option<Place>> = vec![None; buffers.len()];
    let mut put = |id: BufferId, place: Place| match places[id.index()].replace(place) {
        Some(_) => Err(Error::Twice { array: buffers[id].name.clone() }),
        None => Ok(()),
    };
    for (name, value) in scalars {
        let (id, buffer) = program.find(name, "scalar", Buffer::is_scalar)?;
        let scalar = Slot::scalar_bits(buffer.dtype, buffer.dtype.round(*value));
        put(id, Place { base: 0, strides: Vec::new(), scalar })?;
    }
    for (name, view) in inputs {
        let (id, buffer) = program.find(name, "input", |b| b.kind == BufferKind::Input)?;
        check_view(program, sizes, id, view)?;
        let scalar = if buffer.is_scalar() { read_scalar(buffer.dtype, view)? } else { 0 };
        put(id, Place { base: view.base() as usize, strides: view.strides().to_vec(), scalar })?;
    }
    for (name, view) in outputs {
        let writable = |k: BufferKind| matches!(k, BufferKind::Output | BufferKind::InOut);
        let (id, _) = program.find(name, "output", |b| writable(b.kind))?;
        check_view(program, sizes, id, view)?;
        put(id, Place { base: view.base() as usize, strides: view.strides().to_vec(), scalar: 0 })?;
    }
    for (i, (name, view)) in outputs.iter().enumerate() {
        if let Some((other, _)) = inputs.iter().chain(&outputs[..i]).find(|(_, v)| view.overlaps(v)) {
            return Err(Error::Overlap { written: name.to_string(), other: other.to_string() });
        }
    }
    for (id, buffer) in buffers.iter() {
        if places[id.index()].is_none() && buffer.kind != BufferKind::Workspace {
            let (array, shape) = (buffer.name.clone(), sizes.shapes[id.index()].clone());
            return Err(Error::MissingArray { array, dtype: buffer.dtype, shape });
        }
    }
    Ok(places)
}

/// Type, shape and strides of one array.
fn check_view(program: &Program, sizes: &Sizes, id: BufferId, view: &View) -> Result<(), Error> {
    let buffer = &program.artifact.buffers[id];
    let array = buffer.name.clone();
    if view.dtype() != buffer.dtype {
        return Err(Error::DType { array, expected: buffer.dtype, found: view.dtype() });
    }
    let expected = &sizes.shapes[id.index()];
    if view.shape() != expected {
        return Err(Error::Shape { array, expected: expected.clone(), found: view.shape().to_vec() });
    }
    let must = &program.dense[id.index()];
    match (0..must.len()).find(|d| must[*d] && !view.is_empty() && !view.is_dense_in(*d)) {
        None => Ok(()),
        Some(dim) => Err(Error::Strides { array, dim, strides: view.strides().to_vec(), shape: view.shape().to_vec() }),
    }
}
