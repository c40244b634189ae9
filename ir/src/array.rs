//! Dense arrays of logical element values in float64: what every evaluator takes and returns.
//!
//! Invariant: `data.len()` is the product of `dims`; data is row-major; a scalar has no dimensions. Block-scaled tensors
//! appear by their logical values, packed ones by these or by their bytes ([`Array::packed`]). Integers beyond ±2⁵³ are not
//! representable.

use crate::cascade::PackOrder;
use crate::dtype::DType;

/// An array of logical values.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// The element type; values of inputs are representable in it.
    pub dtype: DType,
    /// Extents, outermost first.
    pub dims: Vec<u64>,
    /// Elements in row-major order.
    pub data: Vec<f64>,
}

impl Array {
    /// An array of `data` rounded to `dtype`; none when the element count differs from the product of `dims`.
    pub fn new(dtype: DType, dims: &[u64], data: Vec<f64>) -> Option<Array> {
        let data: Vec<f64> = data.into_iter().map(|x| dtype.round(x)).collect();
        (element_count(dims) == Some(data.len() as u64)).then(|| Array { dtype, dims: dims.to_vec(), data })
    }

    /// A scalar rounded to `dtype`.
    pub fn scalar(dtype: DType, value: f64) -> Array {
        Array { dtype, dims: Vec::new(), data: vec![dtype.round(value)] }
    }

    /// An array whose element at row-major position `i` is `f(i)`, rounded to `dtype`.
    ///
    /// # Panics
    /// When the element count overflows.
    pub fn from_fn(dtype: DType, dims: &[u64], mut f: impl FnMut(usize) -> f64) -> Array {
        let n = element_count(dims).expect("an element count below 2^63");
        Array { dtype, dims: dims.to_vec(), data: (0..n as usize).map(|i| dtype.round(f(i))).collect() }
    }

    /// The bytes of 4-bit elements: two along the last dimension to a byte, each row from a byte on; of an odd row the last
    /// half byte is 0.
    ///
    /// ```
    /// use einfall_ir::{array::Array, cascade::PackOrder, dtype::DType};
    ///
    /// let x = Array { dtype: DType::I4, dims: vec![2, 3], data: vec![1., -1., 7., 0., -8., 2.] };
    /// let bytes = x.packed(PackOrder::LowFirst);
    /// assert_eq!((bytes.dtype, &bytes.dims[..]), (DType::U8, &[2, 2][..]));
    /// assert_eq!(bytes.data, [f64::from(0xf1), f64::from(0x07), f64::from(0x80), f64::from(0x02)]);
    /// assert_eq!(bytes.unpacked(DType::I4, PackOrder::LowFirst, 3), Some(x));
    /// ```
    pub fn packed(&self, order: PackOrder) -> Array {
        let n = self.dims.last().copied().unwrap_or(1).max(1) as usize;
        let half = |x: Option<&f64>| x.map_or(0, |x| self.dtype.round(*x) as i64 & 15);
        let byte = |pair: &[f64]| match (half(pair.first()), half(pair.get(1)), order) {
            (low, high, PackOrder::LowFirst) | (high, low, PackOrder::HighFirst) => (16 * high + low) as f64,
        };
        let data = self.data.chunks(n).flat_map(|row| row.chunks(2).map(byte)).collect();
        let mut dims = self.dims.clone();
        dims.iter_mut().next_back().into_iter().for_each(|last| *last = last.div_ceil(2));
        Array { dtype: DType::U8, dims, data }
    }

    /// The 4-bit elements of bytes, `last` along the last dimension; none where the bytes are not those of such rows.
    pub fn unpacked(&self, dtype: DType, order: PackOrder, last: u64) -> Option<Array> {
        let row_bytes = *self.dims.last()?;
        if self.dtype != DType::U8 || !dtype.is_packed() || row_bytes != last.div_ceil(2) {
            return None;
        }
        let element = |(byte, i): (f64, u64)| {
            let low = (i == 0) == (order == PackOrder::LowFirst);
            let half = if low { byte as i64 & 15 } else { byte as i64 >> 4 };
            if dtype == DType::I4 && half > 7 { half - 16 } else { half }
        };
        let rows = self.data.chunks(row_bytes.max(1) as usize);
        let halves = rows.flat_map(|row| row.iter().flat_map(|b| [(*b, 0), (*b, 1)]).take(last as usize));
        let mut dims = self.dims.clone();
        *dims.last_mut()? = last;
        Some(Array { dtype, dims, data: halves.map(|h| element(h) as f64).collect() })
    }

    /// The coordinates of row-major position `i`.
    pub fn coordinates(&self, i: usize) -> Vec<u64> {
        coordinates(&self.dims, i as u64)
    }
}

/// The product of `dims`, if it is below 2⁶³.
pub fn element_count(dims: &[u64]) -> Option<u64> {
    if dims.contains(&0) {
        return Some(0);
    }
    dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).filter(|n| *n <= i64::MAX as u64)
}

/// The coordinates of row-major position `i` in an array of extents `dims`.
pub fn coordinates(dims: &[u64], i: u64) -> Vec<u64> {
    let mut rest = i;
    let mut at = vec![0; dims.len()];
    for (a, d) in at.iter_mut().zip(dims).rev() {
        *a = rest % d.max(&1);
        rest /= d.max(&1);
    }
    at
}

/// Row-major strides, in elements.
pub fn strides(dims: &[u64]) -> Vec<i64> {
    let mut strides = vec![1i64; dims.len()];
    for i in (0..dims.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1].saturating_mul(dims[i + 1].max(1) as i64);
    }
    strides
}
