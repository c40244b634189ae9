//! How far a result may be from the float64 reference, computed per element.
//!
//! tolerance = min(worst-case running bound at the element, 4 × the largest deviation from float64, over the tensor,
//! in 16 randomised evaluations in the declared types), at least one ulp of the stored type. Either alone is weak: the
//! bound is vacuous over long reductions and recurrences, the samples know nothing of an element's own magnitude.
//! Invariant: no tolerance is typed by hand.

pub mod faults;
pub mod inputs;
pub mod plan;

use std::fmt;

use crate::array::{Array, coordinates};
use crate::cascade::bind::Bindings;
use crate::cascade::eval::bound::Bound;
use crate::cascade::eval::declared::Rounding;
use crate::cascade::eval::{
    EvalError, Options, bound_points, declared_points, evaluate_all, evaluate_bounds, evaluate_declared,
    evaluate_points,
};
use crate::cascade::{Cascade, OutputSource, PackOrder};
use crate::dtype::DType;

/// Randomised evaluations behind a tolerance.
pub const SAMPLES: u64 = 16;
/// What the largest sampled deviation is multiplied by.
pub const MARGIN: f64 = 4.0;

/// The reference values of one output, or of chosen points of it, with their tolerances.
#[derive(Clone, Debug)]
pub struct Expected {
    /// The output's name.
    pub name: String,
    /// Its stored type.
    pub dtype: DType,
    /// Its extents.
    pub dims: Vec<u64>,
    /// How its elements are packed, if they are.
    pub packing: Option<PackOrder>,
    /// The points, if not all in row-major order.
    pub points: Option<Vec<Vec<u64>>>,
    /// Float64 values.
    pub values: Vec<f64>,
    /// Which elements have a value; none when all do.
    pub support: Option<Vec<bool>>,
    /// Largest admissible |actual − value|.
    pub tolerance: Vec<f64>,
    /// Worst-case running bounds.
    pub bounds: Vec<f64>,
    /// The largest sampled deviation over the tensor.
    pub deviation: f64,
}

/// A comparison that passed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// Elements compared.
    pub elements: usize,
    /// Largest |actual − expected|.
    pub worst_error: f64,
    /// Largest |actual − expected| / tolerance.
    pub worst_ratio: f64,
}

/// A comparison that failed: its worst element.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    /// The output.
    pub name: String,
    /// The element's coordinates.
    pub at: Vec<u64>,
    /// Its float64 value.
    pub expected: f64,
    /// What came.
    pub actual: f64,
    /// Largest admissible difference.
    pub tolerance: f64,
    /// The element's worst-case running bound.
    pub bound: f64,
    /// The largest sampled deviation over the tensor.
    pub deviation: f64,
    /// How many elements are out of tolerance.
    pub wrong: usize,
    /// How many were compared.
    pub elements: usize,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { name, at, expected, actual, tolerance, bound, deviation, wrong, elements } = self;
        let at: Vec<String> = at.iter().map(u64::to_string).collect();
        write!(
            f,
            "{name}[{}] is {actual:e}, expected {expected:e} ± {tolerance:e} (running bound {bound:e}, sampled deviation {deviation:e}); {wrong} of {elements} elements are out of tolerance",
            at.join(",")
        )
    }
}

impl std::error::Error for Mismatch {}

/// Reference values and tolerances of every output, then of every parameter written in place, in order.
///
/// ```
/// use einfall_ir::cascade::bind::{Given, bind};
/// use einfall_ir::cascade::{eval, parse};
/// use einfall_ir::tolerance::{expect, inputs};
///
/// let module = parse("cascade rows[M, N](x: f32[M,N]) -> (y: f32[M]) { y[m] = sum(n) x[m,n] }").expect("it is right");
/// let c = &module.cascades[0];
/// let sizes = bind(c, &Given { sizes: vec![("M".into(), 2), ("N".into(), 50)], ..Given::default() })?;
/// let x = inputs::random(c, &sizes, 1, inputs::Variant::Normal)?;
/// let y = &expect(c, &sizes, &x, &eval::Options::default())?[0];
///
/// // Sums in f32, from the last element to the first, are within the tolerance; what leaves one out is not.
/// let row = |m: usize, n: usize| x[0].data[50 * m + n] as f32;
/// let sum = |m, n| f64::from((0..n).rev().fold(0f32, |s, n| s + row(m, n)));
/// assert!(y.compare(&[sum(0, 50), sum(1, 50)])?.worst_ratio <= 1.0);
/// assert!(y.compare(&[sum(0, 50), sum(1, 49)]).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`crate::cascade::eval::evaluate`].
pub fn expect(c: &Cascade, b: &Bindings, inputs: &[Array], options: &Options) -> Result<Vec<Expected>, EvalError> {
    let reference = evaluate_all(c, b, inputs, options)?;
    let bounds = evaluate_bounds(c, b, inputs, options)?;
    let mut all = Vec::new();
    for ((name, r), (_, e)) in reference.results().into_iter().zip(bounds.results()) {
        all.push(Expected {
            packing: c.tensor(&name).and_then(|t| c.tensors[t].storage.packing),
            name,
            dtype: r.dtype,
            dims: r.dims,
            points: None,
            tolerance: Vec::new(),
            bounds: e.values.iter().map(|v: &Bound| v.e).collect(),
            deviation: 0.0,
            values: r.values,
            support: r.support,
        });
    }
    for seed in 0..SAMPLES {
        let sample = evaluate_declared(c, b, inputs, options, seed, Rounding::Stochastic)?;
        for (x, (_, s)) in all.iter_mut().zip(sample.results()) {
            x.sample(&s.values);
        }
    }
    all.iter_mut().for_each(Expected::settle);
    Ok(all)
}

/// Reference values and tolerances of chosen points of one output; the sampled deviation is over these points.
///
/// # Errors
/// As [`crate::cascade::eval::evaluate_points`].
pub fn expect_points(
    c: &Cascade,
    b: &Bindings,
    inputs: &[Array],
    options: &Options,
    output: usize,
    points: &[Vec<u64>],
) -> Result<Expected, EvalError> {
    let values = evaluate_points(c, b, inputs, options, output, points)?;
    let bounds = bound_points(c, b, inputs, options, output, points)?;
    let o = &c.outputs[output];
    let mut x = Expected {
        name: o.name.clone(),
        dtype: o.dtype,
        dims: b.sizes(c, &o.name, &o.dims)?,
        packing: match o.source {
            OutputSource::Whole(t) => c.tensors[t].storage.packing,
            OutputSource::Points { .. } | OutputSource::Point { .. } => None,
        },
        points: Some(points.to_vec()),
        values,
        support: None,
        tolerance: Vec::new(),
        bounds: bounds.iter().map(|v| v.e).collect(),
        deviation: 0.0,
    };
    for seed in 0..SAMPLES {
        let s = declared_points(c, b, inputs, options, seed, output, points)?;
        x.sample(&s);
    }
    x.settle();
    Ok(x)
}

impl Expected {
    fn present(&self, i: usize) -> bool {
        self.support.as_ref().is_none_or(|s| s[i])
    }

    /// Widens the deviation by one randomised evaluation.
    fn sample(&mut self, values: &[f64]) {
        for (i, (x, s)) in self.values.iter().zip(values).enumerate() {
            let finite = self.dtype.round(*x).is_finite();
            if self.present(i) && finite && x != s {
                let d = (s - x).abs();
                // A randomised evaluation that leaves the finite range shows that any deviation is admissible.
                self.deviation = self.deviation.max(if d.is_finite() { d } else { f64::INFINITY });
            }
        }
    }

    fn settle(&mut self) {
        let cap = MARGIN * self.deviation;
        let tolerance = |(x, e): (&f64, &f64)| {
            let t = e.min(cap);
            if self.dtype.is_float() { t.max(self.dtype.ulp(*x)) } else { t }
        };
        self.tolerance = self.values.iter().zip(&self.bounds).map(tolerance).collect();
    }

    /// The elements of a whole result: of packed ones given by their bytes, these unpacked.
    pub fn elements(&self, result: &Array) -> Vec<f64> {
        let unpacked = |order| result.unpacked(self.dtype, order, *self.dims.last()?);
        self.packing.and_then(unpacked).map_or_else(|| result.data.clone(), |a| a.data)
    }

    /// The coordinates of element `i`.
    pub fn coordinates(&self, i: usize) -> Vec<u64> {
        match &self.points {
            Some(p) => p[i].clone(),
            None => coordinates(&self.dims, i as u64),
        }
    }

    /// Whether element `i` may be `actual`; NaN and infinities must match in class.
    pub fn admits(&self, i: usize, actual: f64) -> bool {
        self.error_ratio(i, actual) <= 1.0
    }

    /// |actual − expected| / tolerance; infinite for another class of value.
    fn error_ratio(&self, i: usize, actual: f64) -> f64 {
        let (x, t) = (self.values[i], self.tolerance[i]);
        let stored = self.dtype.round(x);
        if stored.is_nan() || actual.is_nan() {
            return if stored.is_nan() && actual.is_nan() { 0.0 } else { f64::INFINITY };
        }
        if stored == actual || x == actual {
            return 0.0;
        }
        if actual.is_infinite() {
            // A finite value near the type's limit may overflow.
            let reaches = x.is_finite() && x.signum() == actual.signum() && x.abs() + t > self.dtype.max_finite();
            return if reaches { 1.0 } else { f64::INFINITY };
        }
        if x.is_infinite() {
            return f64::INFINITY;
        }
        let d = (actual - x).abs();
        if t > 0.0 { d / t } else { f64::INFINITY }
    }

    /// Compares a whole result's elements ([`Expected::elements`]), or the chosen points in their order. Elements without a
    /// value are skipped.
    ///
    /// # Errors
    /// The worst element out of tolerance; a result of another length is wrong as a whole.
    pub fn compare(&self, actual: &[f64]) -> Result<Report, Mismatch> {
        let mut report = Report { elements: 0, worst_error: 0.0, worst_ratio: 0.0 };
        let (mut wrong, mut worst) = (0, None);
        if actual.len() != self.values.len() {
            return Err(self.mismatch(0, f64::NAN, self.values.len(), self.values.len()));
        }
        for (i, a) in actual.iter().enumerate().filter(|(i, _)| self.present(*i)) {
            report.elements += 1;
            let ratio = self.error_ratio(i, *a);
            let d = (a - self.values[i]).abs();
            if d.is_finite() {
                report.worst_error = report.worst_error.max(d);
            }
            if ratio > 1.0 {
                wrong += 1;
            }
            if ratio > report.worst_ratio {
                report.worst_ratio = ratio;
                worst = Some((i, *a));
            }
        }
        match worst {
            Some((i, a)) if wrong > 0 => Err(self.mismatch(i, a, wrong, report.elements)),
            _ => Ok(report),
        }
    }

    fn mismatch(&self, i: usize, actual: f64, wrong: usize, elements: usize) -> Mismatch {
        let none = f64::NAN;
        Mismatch {
            name: self.name.clone(),
            at: if i < self.values.len() { self.coordinates(i) } else { Vec::new() },
            expected: self.values.get(i).copied().unwrap_or(none),
            actual,
            tolerance: self.tolerance.get(i).copied().unwrap_or(none),
            bound: self.bounds.get(i).copied().unwrap_or(none),
            deviation: self.deviation,
            wrong,
            elements,
        }
    }
}

/// A value no computation should leave behind: what outputs hold before a launch.
pub fn poison(dtype: DType) -> f64 {
    if dtype.is_float() { f64::NAN } else { dtype.min_finite() }
}

#[cfg(test)]
mod tests;
