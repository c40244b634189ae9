//! Arrays in host memory: owned ones, and views of the caller's.
//!
//! Invariants: an owned array is dense, row-major and 64-byte aligned; a view's every element lies inside the memory
//! it was made from; no two elements of a [`ViewMut`] share an address.

use einfall_ir::array::{Array, strides as dense_strides};
use einfall_ir::dtype::DType;
use half::{bf16, f16};
use std::marker::PhantomData;

/// Alignment of owned arrays, in bytes: a cache line, and the widest vector.
pub const ALIGN_BYTES: usize = 64;

/// Why an array or view cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArrayError {
    /// The extents' product does not fit.
    #[error("an array of shape {shape:?} and type {dtype} is larger than memory can be")]
    Overflow {
        /// Element type.
        dtype: DType,
        /// Extents.
        shape: Vec<u64>,
    },
    /// The memory cannot be had.
    #[error("{bytes} bytes of memory for an array cannot be had")]
    Memory {
        /// What was asked for.
        bytes: u64,
    },
    /// The data do not fill the shape.
    #[error("shape {shape:?} needs {expected} bytes, and there are {found}")]
    Length {
        /// Extents.
        shape: Vec<u64>,
        /// Bytes of the shape.
        expected: u64,
        /// Bytes given.
        found: u64,
    },
    /// An extent that the array's type fixes otherwise.
    #[error("the extents {found:?} are not those of the type ({fixed:?}, {dtype})")]
    Extents {
        /// Element type.
        dtype: DType,
        /// The extents that the type fixes.
        fixed: Vec<Option<u64>>,
        /// The extents given.
        found: Vec<u64>,
    },
    /// Strides of another rank than the shape.
    #[error("{strides} strides for {dims} dimensions")]
    Rank {
        /// Dimensions.
        dims: usize,
        /// Strides given.
        strides: usize,
    },
    /// A view reaches outside its memory.
    #[error("a view of shape {shape:?} and strides {strides:?} reaches outside its {elems} elements")]
    OutOfBounds {
        /// Extents.
        shape: Vec<u64>,
        /// Strides in elements.
        strides: Vec<i64>,
        /// Elements of the memory.
        elems: u64,
    },
    /// Two elements of a mutable view at one address.
    #[error("elements of a mutable view of shape {shape:?} and strides {strides:?} overlap")]
    SelfOverlap {
        /// Extents.
        shape: Vec<u64>,
        /// Strides in elements.
        strides: Vec<i64>,
    },
    /// An address that is not a multiple of the element's size.
    #[error("the address {address:#x} is not aligned for {dtype}")]
    Misaligned {
        /// The address.
        address: usize,
        /// Element type.
        dtype: DType,
    },
    /// Strides over a type whose elements share bytes.
    #[error("{dtype} elements share bytes, so a view of them must be dense")]
    Packed {
        /// Element type.
        dtype: DType,
    },
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that is an element type of arrays. Every bit pattern is a value.
pub trait Element: bytemuck::Pod + Send + Sync + sealed::Sealed {
    /// The element type.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),* $(,)?) => { $(
        impl sealed::Sealed for $rust {}
        impl Element for $rust { const DTYPE: DType = DType::$dtype; }
    )* };
}
elements! { f64 => F64, f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, i8 => I8, u8 => U8 }

/// One aligned line of an owned array.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; ALIGN_BYTES]);
// SAFETY: plain bytes; all zeros is a value.
unsafe impl bytemuck::Zeroable for Line {}

/// An owned, dense, row-major array, 64-byte aligned.
#[derive(Clone)]
pub struct HostArray {
    dtype: DType,
    shape: Vec<u64>,
    bytes: usize,
    lines: Vec<Line>,
}

impl std::fmt::Debug for HostArray {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostArray({}{:?})", self.dtype, self.shape)
    }
}

impl PartialEq for HostArray {
    /// Same type, shape and bits.
    fn eq(&self, other: &HostArray) -> bool {
        self.dtype == other.dtype && self.shape == other.shape && self.bytes() == other.bytes()
    }
}

/// The bytes of a dense array.
pub fn dense_bytes(dtype: DType, shape: &[u64]) -> Result<usize, ArrayError> {
    let overflow = || ArrayError::Overflow { dtype, shape: shape.to_vec() };
    // A zero extent does not excuse extents whose strides overflow.
    let strides_fit = shape.iter().filter(|d| **d != 0).try_fold(1u64, |n, d| n.checked_mul(*d));
    let limit = isize::MAX as u64 - ALIGN_BYTES as u64;
    let bits = strides_fit.and_then(|n| n.checked_mul(u64::from(dtype.bits()))).ok_or_else(overflow)?;
    if bits.div_ceil(8) > limit {
        return Err(overflow());
    }
    Ok(dtype.bytes(shape.iter().product()) as usize)
}

impl HostArray {
    /// An array of zeros.
    ///
    /// # Errors
    /// [`ArrayError::Overflow`] and [`ArrayError::Memory`].
    pub fn zeros(dtype: DType, shape: &[u64]) -> Result<HostArray, ArrayError> {
        let bytes = dense_bytes(dtype, shape)?;
        let lines = bytemuck::try_zeroed_vec(bytes.div_ceil(ALIGN_BYTES))
            .map_err(|()| ArrayError::Memory { bytes: bytes as u64 })?;
        Ok(HostArray { dtype, shape: shape.to_vec(), bytes, lines })
    }

    /// A copy of `data`, row-major.
    ///
    /// ```
    /// use einfall_runtime::HostArray;
    ///
    /// let x = HostArray::from_slice(&[1f32, 2., 3., 4., 5., 6.], &[2, 3])?;
    /// assert_eq!((x.shape(), x.as_slice::<f32>().map(|s| s[4])), (&[2, 3][..], Some(5.0)));
    /// assert!(HostArray::from_slice(&[1f32], &[2, 3]).is_err());
    /// # Ok::<(), einfall_runtime::ArrayError>(())
    /// ```
    ///
    /// # Errors
    /// As [`HostArray::zeros`], and [`ArrayError::Length`] where `data` does not fill the shape.
    pub fn from_slice<T: Element>(data: &[T], shape: &[u64]) -> Result<HostArray, ArrayError> {
        HostArray::from_bytes(T::DTYPE, shape, bytemuck::cast_slice(data))
    }

    /// A copy of row-major little-endian elements. Bytes of a bool other than 0 become 1.
    ///
    /// # Errors
    /// As [`HostArray::from_slice`].
    pub fn from_bytes(dtype: DType, shape: &[u64], data: &[u8]) -> Result<HostArray, ArrayError> {
        let expected = dense_bytes(dtype, shape)?;
        if expected != data.len() {
            let (expected, found) = (expected as u64, data.len() as u64);
            return Err(ArrayError::Length { shape: shape.to_vec(), expected, found });
        }
        let mut array = HostArray::zeros(dtype, shape)?;
        array.bytes_mut().copy_from_slice(data);
        if dtype == DType::Bool {
            array.bytes_mut().iter_mut().for_each(|b| *b = u8::from(*b != 0));
        }
        Ok(array)
    }

    /// Stores logical values, rounded to their type.
    ///
    /// # Errors
    /// As [`HostArray::zeros`], and [`ArrayError::Packed`] for i4, whose order of packing is not declared here.
    pub fn from_values(values: &Array) -> Result<HostArray, ArrayError> {
        let mut array = HostArray::zeros(values.dtype, &values.dims)?;
        crate::element::encode(values.dtype, &values.data, array.bytes_mut())?;
        Ok(array)
    }

    /// Its logical values.
    ///
    /// # Errors
    /// [`ArrayError::Packed`] for i4.
    pub fn to_values(&self) -> Result<Array, ArrayError> {
        let data = crate::element::decode(self.dtype, self.bytes())?;
        Ok(Array { dtype: self.dtype, dims: self.shape.clone(), data })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Number of elements.
    pub fn elems(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Its bytes, row-major.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the lines hold at least `bytes` initialised bytes.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.bytes) }
    }

    /// Its bytes, row-major.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as `bytes`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.bytes) }
    }

    /// Its elements, row-major, if `T` is its type.
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        (T::DTYPE == self.dtype).then(|| bytemuck::cast_slice(self.bytes()))
    }

    /// Its elements, row-major, if `T` is its type.
    pub fn as_mut_slice<T: Element>(&mut self) -> Option<&mut [T]> {
        (T::DTYPE == self.dtype).then(|| bytemuck::cast_slice_mut(self.bytes_mut()))
    }

    /// The whole array to read.
    pub fn view(&self) -> View<'_> {
        View {
            dtype: self.dtype,
            base: self.lines.as_ptr().cast(),
            strides: dense_strides(&self.shape),
            shape: self.shape.clone(),
            memory: PhantomData,
        }
    }

    /// The whole array to write.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let base = self.lines.as_mut_ptr().cast();
        ViewMut { view: View { base, memory: PhantomData, ..self.view().unbound() }, exclusive: PhantomData }
    }
}

/// A strided array to read, in memory borrowed for `'a`.
#[derive(Clone, Debug)]
pub struct View<'a> {
    dtype: DType,
    base: *const u8,
    shape: Vec<u64>,
    /// In elements.
    strides: Vec<i64>,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: a view is a shared borrow of plain numbers.
unsafe impl Send for View<'_> {}
// SAFETY: as above.
unsafe impl Sync for View<'_> {}

impl<'a> View<'a> {
    /// A strided view of `data`, whose first element is at index zero.
    ///
    /// # Errors
    /// [`ArrayError::Rank`] and [`ArrayError::OutOfBounds`].
    pub fn new<T: Element>(data: &'a [T], shape: &[u64], strides: &[i64]) -> Result<View<'a>, ArrayError> {
        check_bounds(data.len() as u64, shape, strides)?;
        // SAFETY: every element is inside `data`, which is borrowed for `'a`.
        unsafe { View::from_raw(T::DTYPE, data.as_ptr().cast(), shape, strides) }
    }

    /// A dense row-major view of `data`.
    ///
    /// ```
    /// use einfall_runtime::View;
    ///
    /// let x = [1f32, 2., 3., 4., 5., 6.];
    /// assert_eq!(View::dense(&x, &[2, 3])?.shape(), [2, 3]);
    /// assert!(View::dense(&x, &[2, 2]).is_err());
    /// # Ok::<(), einfall_runtime::ArrayError>(())
    /// ```
    ///
    /// # Errors
    /// [`ArrayError::Length`] where `data` does not fill the shape exactly.
    pub fn dense<T: Element>(data: &'a [T], shape: &[u64]) -> Result<View<'a>, ArrayError> {
        check_length::<T>(data.len(), shape)?;
        View::new(data, shape, &dense_strides(shape))
    }

    /// A view of the caller's memory; strides in elements, possibly negative or zero.
    ///
    /// # Errors
    /// [`ArrayError::Rank`], [`ArrayError::Misaligned`], [`ArrayError::Packed`], [`ArrayError::Overflow`].
    ///
    /// # Safety
    /// Every element is initialised, inside one live allocation, and not written during `'a` (but by a launch it is
    /// passed to).
    pub unsafe fn from_raw(
        dtype: DType,
        base: *const u8,
        shape: &[u64],
        strides: &[i64],
    ) -> Result<View<'a>, ArrayError> {
        dense_bytes(dtype, shape)?;
        if shape.len() != strides.len() {
            return Err(ArrayError::Rank { dims: shape.len(), strides: strides.len() });
        }
        let elem_bytes = (dtype.bits() as usize).div_ceil(8);
        if !(base as usize).is_multiple_of(elem_bytes) {
            return Err(ArrayError::Misaligned { address: base as usize, dtype });
        }
        let view = View { dtype, base, shape: shape.to_vec(), strides: strides.to_vec(), memory: PhantomData };
        if dtype.bits() < 8 && !view.is_dense() {
            return Err(ArrayError::Packed { dtype });
        }
        // Rules out strides whose reach overflows, so that later address arithmetic cannot.
        reach(shape, strides)
            .filter(|(lo, hi)| [lo, hi].iter().all(|x| x.checked_mul(elem_bytes as i64).is_some()))
            .ok_or_else(|| ArrayError::Overflow { dtype, shape: shape.to_vec() })?;
        Ok(view)
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
    pub fn base(&self) -> *const u8 {
        self.base
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Whether dimension `d` has its row-major dense stride. One of extent 1 or less has any.
    pub fn is_dense_in(&self, d: usize) -> bool {
        self.shape[d] <= 1 || self.strides[d] == dense_strides(&self.shape)[d]
    }

    /// Whether every dimension is dense.
    pub fn is_dense(&self) -> bool {
        self.is_empty() || (0..self.shape.len()).all(|d| self.is_dense_in(d))
    }

    /// The addresses its elements lie between, empty for none.
    pub fn extent(&self) -> std::ops::Range<usize> {
        let base = self.base as usize;
        match reach(&self.shape, &self.strides) {
            Some((lo, hi)) if !self.is_empty() => {
                let bits = i64::from(self.dtype.bits());
                let first = base as i64 + lo * bits / 8;
                first as usize..(base as i64 + (hi * bits + bits + 7) / 8) as usize
            }
            Some(_) | None => base..base,
        }
    }

    /// Whether the address ranges meet. Interleaved views of one allocation count as overlapping.
    pub fn overlaps(&self, other: &View) -> bool {
        let (a, b) = (self.extent(), other.extent());
        !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end
    }

    /// The same place without its lifetime.
    fn unbound<'b>(self) -> View<'b> {
        View { dtype: self.dtype, base: self.base, shape: self.shape, strides: self.strides, memory: PhantomData }
    }
}

/// A strided array to write, in memory borrowed exclusively for `'a`.
#[derive(Debug)]
pub struct ViewMut<'a> {
    view: View<'a>,
    exclusive: PhantomData<&'a mut [u8]>,
}

impl<'a> ViewMut<'a> {
    /// A strided view of `data`, whose first element is at index zero.
    ///
    /// # Errors
    /// As [`View::new`], and [`ArrayError::SelfOverlap`].
    pub fn new<T: Element>(data: &'a mut [T], shape: &[u64], strides: &[i64]) -> Result<ViewMut<'a>, ArrayError> {
        check_bounds(data.len() as u64, shape, strides)?;
        // SAFETY: every element is inside `data`, which is borrowed exclusively for `'a`.
        unsafe { ViewMut::from_raw(T::DTYPE, data.as_mut_ptr().cast(), shape, strides) }
    }

    /// A dense row-major view of `data`.
    ///
    /// # Errors
    /// [`ArrayError::Length`] where `data` does not fill the shape exactly.
    pub fn dense<T: Element>(data: &'a mut [T], shape: &[u64]) -> Result<ViewMut<'a>, ArrayError> {
        check_length::<T>(data.len(), shape)?;
        ViewMut::new(data, shape, &dense_strides(shape))
    }

    /// A view of the caller's memory; strides in elements, possibly negative.
    ///
    /// # Errors
    /// As [`View::from_raw`], and [`ArrayError::SelfOverlap`].
    ///
    /// # Safety
    /// Every element is initialised, inside one live allocation, and accessed by nothing else during `'a`.
    pub unsafe fn from_raw(
        dtype: DType,
        base: *mut u8,
        shape: &[u64],
        strides: &[i64],
    ) -> Result<ViewMut<'a>, ArrayError> {
        // SAFETY: the caller's promise.
        let view = unsafe { View::from_raw(dtype, base, shape, strides) }?;
        if !distinct(shape, strides) {
            return Err(ArrayError::SelfOverlap { shape: shape.to_vec(), strides: strides.to_vec() });
        }
        Ok(ViewMut { view, exclusive: PhantomData })
    }

    /// What it covers.
    pub fn as_view(&self) -> &View<'a> {
        &self.view
    }

    /// Address of the first element.
    pub fn base(&self) -> *mut u8 {
        self.view.base.cast_mut()
    }

    /// The same view for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { view: self.view.clone().unbound(), exclusive: PhantomData }
    }
}

/// Lowest and highest element offset of a view from its base; `(0, 0)` without elements, `None` on overflow.
fn reach(shape: &[u64], strides: &[i64]) -> Option<(i64, i64)> {
    if shape.contains(&0) {
        return Some((0, 0));
    }
    shape.iter().zip(strides).try_fold((0i64, 0i64), |(lo, hi), (n, s)| {
        let span = i64::try_from(n - 1).ok()?.checked_mul(*s)?;
        Some((lo.checked_add(span.min(0))?, hi.checked_add(span.max(0))?))
    })
}

/// Whether no two index vectors give one offset: each stride, in order of size, clears the reach of those below it.
/// Sufficient, and necessary for the views that slicing, transposing and reversing a dense array give.
fn distinct(shape: &[u64], strides: &[i64]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut dims: Vec<(u64, u64)> =
        shape.iter().zip(strides).filter(|(n, _)| **n > 1).map(|(n, s)| (s.unsigned_abs(), *n)).collect();
    dims.sort_unstable();
    let mut below = 0u64;
    dims.into_iter().all(|(stride, n)| {
        let clears = stride > below;
        below = below.saturating_add(stride.saturating_mul(n - 1));
        clears
    })
}

fn check_bounds(elems: u64, shape: &[u64], strides: &[i64]) -> Result<(), ArrayError> {
    if shape.len() != strides.len() {
        return Err(ArrayError::Rank { dims: shape.len(), strides: strides.len() });
    }
    let inside = shape.contains(&0)
        || reach(shape, strides).is_some_and(|(lo, hi)| lo >= 0 && u64::try_from(hi).is_ok_and(|hi| hi < elems));
    if inside {
        Ok(())
    } else {
        Err(ArrayError::OutOfBounds { shape: shape.to_vec(), strides: strides.to_vec(), elems })
    }
}

fn check_length<T: Element>(elems: usize, shape: &[u64]) -> Result<(), ArrayError> {
    let expected = dense_bytes(T::DTYPE, shape)? as u64;
    let found = std::mem::size_of::<T>() as u64 * elems as u64;
    if expected == found { Ok(()) } else { Err(ArrayError::Length { shape: shape.to_vec(), expected, found }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn owned_arrays_are_aligned_and_typed() {
        for n in [0u64, 1, 15, 17, 1000] {
            let a = HostArray::zeros(DType::BF16, &[n, 3]).unwrap();
            assert_eq!(a.view().base() as usize % ALIGN_BYTES, 0);
            assert_eq!(a.bytes().len() as u64, n * 6);
        }
        let mut a = HostArray::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3]).unwrap();
        assert_eq!(a.as_slice::<f32>().unwrap()[4], 5.0);
        assert!(a.as_slice::<i32>().is_none());
        a.as_mut_slice::<f32>().unwrap()[0] = 9.0;
        assert_eq!(a.bytes()[..4], 9f32.to_le_bytes());
        assert_eq!(HostArray::from_slice(&[2u8], &[]).unwrap().elems(), 1);
        let error = HostArray::from_slice(&[1i64], &[2]).unwrap_err();
        assert_eq!(error, ArrayError::Length { shape: vec![2], expected: 16, found: 8 });
        assert_eq!(HostArray::from_bytes(DType::Bool, &[3], &[0, 1, 200]).unwrap().bytes(), [0, 1, 1]);
        assert_eq!(HostArray::zeros(DType::I4, &[3]).unwrap().bytes().len(), 2);
    }

    #[test]
    fn values_survive_storage() {
        for dtype in DType::ALL {
            let values = Array::from_fn(dtype, &[3, 5], |i| (i as f64 - 7.0) * 0.37);
            match HostArray::from_values(&values) {
                Ok(stored) => assert_eq!(stored.to_values().unwrap(), values, "{dtype}"),
                Err(e) => assert_eq!((dtype.is_packed(), e), (true, ArrayError::Packed { dtype })),
            }
        }
    }

    #[test]
    fn sizes_that_cannot_be_are_errors() {
        for shape in [vec![u64::MAX], vec![1 << 40, 1 << 40], vec![0, 1 << 40, 1 << 40], vec![1 << 62]] {
            assert!(matches!(HostArray::zeros(DType::F32, &shape), Err(ArrayError::Overflow { .. })), "{shape:?}");
        }
        assert!(matches!(HostArray::zeros(DType::U8, &[1 << 56]), Err(ArrayError::Memory { .. })));
        assert_eq!(HostArray::zeros(DType::F32, &[0, 1 << 40]).unwrap().elems(), 0);
    }

    #[test]
    fn views_stay_inside_their_memory() {
        let data = [0i32; 12];
        assert!(View::new(&data, &[3, 4], &[4, 1]).unwrap().is_dense());
        let transposed = View::new(&data, &[4, 3], &[1, 4]).unwrap();
        assert!(!transposed.is_dense());
        assert_eq!(transposed.extent().len(), 48);
        assert!(View::new(&data, &[3, 4], &[4, 0]).is_ok(), "a broadcast may be read");
        for (shape, strides) in [([3, 4], [4, 2]), ([4, 4], [4, 1]), ([3, 4], [-4, 1]), ([3, 4], [i64::MAX, 1])] {
            let error = View::new(&data, &shape, &strides).unwrap_err();
            assert!(matches!(error, ArrayError::OutOfBounds { .. }), "{shape:?} {strides:?}");
        }
        assert!(View::new(&data, &[0, 400], &[400, 1]).unwrap().extent().is_empty());
        assert!(matches!(View::new(&data, &[3], &[1, 1]), Err(ArrayError::Rank { .. })));
        assert!(matches!(View::dense(&data, &[3, 3]), Err(ArrayError::Length { .. })));
    }

    #[test]
    fn raw_views_are_checked_for_alignment_and_packing() {
        let bytes = [0u8; 64];
        let odd = bytes.as_ptr().wrapping_add(1 - (bytes.as_ptr() as usize & 1));
        // SAFETY: the views are inside `bytes`, and nothing is read.
        unsafe {
            assert!(matches!(View::from_raw(DType::F32, odd, &[2], &[1]), Err(ArrayError::Misaligned { .. })));
            assert!(View::from_raw(DType::U8, odd, &[2], &[1]).is_ok());
            let error = View::from_raw(DType::I4, bytes.as_ptr(), &[2, 2], &[4, 1]).unwrap_err();
            assert_eq!(error, ArrayError::Packed { dtype: DType::I4 });
            let back = View::from_raw(DType::U8, bytes.as_ptr().add(9), &[10], &[-1]).unwrap();
            assert_eq!(back.extent(), bytes.as_ptr() as usize..bytes.as_ptr() as usize + 10);
        }
    }

    #[test]
    fn overlap_is_seen() {
        let data = [0f32; 10];
        let (left, right) = (View::dense(&data[..5], &[5]).unwrap(), View::dense(&data[5..], &[5]).unwrap());
        assert!(!left.overlaps(&right));
        assert!(View::dense(&data[..6], &[6]).unwrap().overlaps(&right));
        assert!(!View::dense(&data[5..5], &[0]).unwrap().overlaps(&right));
    }

    proptest! {
        #[test]
        fn mutable_views_have_distinct_elements(
            shape in proptest::collection::vec(0u64..4, 0..4),
            strides in proptest::collection::vec(0i64..14, 4),
        ) {
            let strides = &strides[..shape.len()];
            let mut offsets = vec![0];
            for (n, s) in shape.iter().zip(strides) {
                offsets = offsets.iter().flat_map(|o| (0..*n as i64).map(move |i| o + i * s)).collect();
            }
            let distinct = offsets.iter().collect::<HashSet<_>>().len() == offsets.len();
            let mut data = [0u8; 128];
            if ViewMut::new(&mut data, &shape, strides).is_ok() {
                prop_assert!(distinct, "{shape:?} {strides:?}");
            }
        }
    }

    #[test]
    fn transposed_and_sliced_mutable_views_are_allowed() {
        let mut data = [0f32; 60];
        for (shape, strides) in
            [([3, 4, 5], [20, 5, 1]), ([5, 4, 3], [1, 5, 20]), ([3, 2, 5], [20, 10, 1]), ([1, 4, 1], [0, 5, 0])]
        {
            assert!(ViewMut::new(&mut data, &shape, &strides).is_ok(), "{shape:?} {strides:?}");
        }
        assert!(matches!(ViewMut::new(&mut data, &[3, 4], &[1, 0]), Err(ArrayError::SelfOverlap { .. })));
        assert!(matches!(ViewMut::new(&mut data, &[3, 4], &[2, 1]), Err(ArrayError::SelfOverlap { .. })));
    }
}
