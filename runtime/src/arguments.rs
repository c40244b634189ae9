//! Arguments of a launch against what the program takes, the same for every device.
//!
//! Invariant: nothing is launched unless every array has its type, shape and strides, is given once, and no array that
//! is written shares memory with another. Addresses are compared, never read.

#[cfg(any(feature = "cuda", feature = "wgpu"))]
use crate::array::HostArray;
use crate::array::View;
use crate::error::Error;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use crate::program::ArraySpec;
use crate::program::{Program, Sizes};
use einfall_ir::arena::Id;
use einfall_ir::artifact::Slot;
use einfall_ir::dtype::DType;
use einfall_ir::tile::{Buffer, BufferId, BufferKind};

/// The arrays of one launch on a device that holds them as `A`, by name. Scalars travel by value.
#[cfg(any(feature = "cuda", feature = "shaders"))]
#[derive(Clone, Debug)]
pub struct DeviceArguments<'a, A> {
    pub(crate) inputs: Vec<(&'a str, A)>,
    pub(crate) outputs: Vec<(&'a str, A)>,
    pub(crate) scalars: Vec<(&'a str, f64)>,
}

#[cfg(any(feature = "cuda", feature = "shaders"))]
impl<A> Default for DeviceArguments<'_, A> {
    fn default() -> Self {
        DeviceArguments { inputs: Vec::new(), outputs: Vec::new(), scalars: Vec::new() }
    }
}

#[cfg(any(feature = "cuda", feature = "shaders"))]
impl<'a, A: Clone> DeviceArguments<'a, A> {
    /// None yet.
    pub fn new() -> Self {
        DeviceArguments::default()
    }

    /// An array to read.
    pub fn input(mut self, name: &'a str, array: &A) -> Self {
        self.inputs.push((name, array.clone()));
        self
    }

    /// An array to write, or to update in place.
    pub fn output(mut self, name: &'a str, array: &A) -> Self {
        self.outputs.push((name, array.clone()));
        self
    }

    /// A scalar parameter; it is rounded to its type.
    pub fn scalar(mut self, name: &'a str, value: f64) -> Self {
        self.scalars.push((name, value));
        self
    }

    /// Whether an array or scalar of this name is among them.
    pub fn gives(&self, name: &str) -> bool {
        self.inputs.iter().chain(&self.outputs).any(|(n, _)| *n == name) || self.scalars.iter().any(|(n, _)| *n == name)
    }

    /// The scalars given by value, by name.
    pub fn scalars(&self) -> &[(&'a str, f64)] {
        &self.scalars
    }

    /// Of arrays on the host: `array` makes a parameter's on the device (`true`: one that is written, full of NaNs),
    /// `copy` fills it. Also the arrays that hold the results, in the cascade's order; those updated in place are filled
    /// from `inputs`.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub(crate) fn of_host(
        specs: impl Iterator<Item = ArraySpec<'a>>,
        inputs: &[(&'a str, &HostArray)],
        scalars: &[(&'a str, f64)],
        array: impl Fn(&str, bool) -> Result<A, Error>,
        copy: impl Fn(&A, &HostArray) -> Result<(), Error>,
    ) -> Result<(Self, Vec<(String, A)>), Error> {
        let mut arguments = DeviceArguments::new();
        let mut outputs = Vec::new();
        for spec in specs.filter(|s| matches!(s.kind, BufferKind::Output | BufferKind::InOut)) {
            let made = array(spec.name, true)?;
            if spec.kind == BufferKind::InOut {
                let (_, host) = inputs.iter().find(|(name, _)| *name == spec.name).ok_or_else(|| {
                    let (array, shape) = (spec.name.to_string(), spec.shape.to_vec());
                    Error::MissingArray { array, dtype: spec.dtype, shape }
                })?;
                copy(&made, host)?;
            }
            arguments = arguments.output(spec.name, &made);
            outputs.push((spec.name.to_string(), made));
        }
        for (name, host) in inputs {
            if outputs.iter().any(|(n, _)| n == name) {
                continue;
            }
            let made = array(name, false)?;
            copy(&made, host)?;
            arguments = arguments.input(name, &made);
        }
        arguments.scalars.extend(scalars);
        Ok((arguments, outputs))
    }
}

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
