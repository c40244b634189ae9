//! Dense arrays of logical element values in float64: what every evaluator takes and returns.
//!
//! Invariant: `data.len()` is the product of `dims`; data is row-major; a scalar has no dimensions. Packed and
//! block-scaled tensors appear by their logical values. Integers beyond ±2⁵³ are not representable.

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
