//! Results against the float64 evaluator, within computed tolerances: whole outputs where that is quick, sampled
//! elements where it is not.
//!
//! Invariant: every result is compared, tensors updated in place included; where there is none, that is an error.

use einfall_ir::array::{Array, coordinates, element_count};
use einfall_ir::cascade::bind::Bindings;
use einfall_ir::cascade::{Cascade, Einsum, Expr, eval};
use einfall_ir::tolerance::{Expected, expect, expect_points};
use einfall_runtime::HostArray;

use super::Failure;

/// Points of an iteration space up to which whole outputs are evaluated (17 evaluations of each).
pub const WHOLE: u64 = 4_000_000;
/// Elements sampled of each larger output.
const SAMPLES: u64 = 48;

/// Compares every output and every tensor updated in place; a line for each.
pub fn outputs(
    c: &Cascade,
    b: &Bindings,
    inputs: &[Array],
    outputs: &[(String, HostArray)],
    seed: u64,
) -> Result<Vec<String>, Failure> {
    outputs_within(c, b, inputs, outputs, seed, WHOLE)
}

/// As [`outputs`], sampled where there are more than `whole` points. Of every two samples one lies at the far end along
/// about half of its dimensions: that is where blocks have tails. Tensors updated in place are compared whole.
pub fn outputs_within(
    c: &Cascade,
    b: &Bindings,
    inputs: &[Array],
    outputs: &[(String, HostArray)],
    seed: u64,
    whole: u64,
) -> Result<Vec<String>, Failure> {
    if points(c, b) > whole {
        return sampled(c, b, inputs, outputs, seed, SAMPLES);
    }
    let expected = expect(c, b, inputs, &eval::Options::default()).map_err(Failure::wrong)?;
    agree(b, expected, outputs)
}

/// As [`outputs_within`], so many sampled elements of every output.
pub fn sampled(
    c: &Cascade,
    b: &Bindings,
    inputs: &[Array],
    outputs: &[(String, HostArray)],
    seed: u64,
    samples: u64,
) -> Result<Vec<String>, Failure> {
    let options = eval::Options::default();
    let expected: Vec<Expected> = {
        let mut list = Vec::new();
        for (k, o) in c.outputs.iter().enumerate() {
            let dims = b.sizes(c, &o.name, &o.dims).map_err(Failure::wrong)?;
            let total = element_count(&dims).unwrap_or(u64::MAX);
            let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut random = || {
                state ^= state >> 12;
                state ^= state << 25;
                state ^= state >> 27;
                state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
            };
            let points: Vec<Vec<u64>> = (0..samples.min(total))
                .map(|i| {
                    let mut at = coordinates(&dims, random() % total);
                    let far = if i % 2 == 0 { 0 } else { random() };
                    for (k, n) in dims.iter().enumerate().filter(|(k, _)| far >> k & 1 == 1) {
                        at[k] = n - 1;
                    }
                    at
                })
                .collect();
            list.push(expect_points(c, b, inputs, &options, k, &points).map_err(Failure::wrong)?);
        }
        let sampled = |name: &str| c.outputs.iter().any(|o| o.name == name);
        if outputs.iter().any(|(name, _)| !sampled(name)) {
            let all = expect(c, b, inputs, &options).map_err(Failure::wrong)?;
            list.extend(all.into_iter().filter(|e| !sampled(&e.name)));
        }
        list
    };
    agree(b, expected, outputs)
}

/// Compares what is expected with every result.
fn agree(b: &Bindings, expected: Vec<Expected>, outputs: &[(String, HostArray)]) -> Result<Vec<String>, Failure> {
    if let Some((name, _)) = outputs.iter().find(|(name, _)| expected.iter().all(|e| e.name != *name)) {
        return Err(Failure::Wrong(format!("nothing says what `{name}` should be")));
    }
    if expected.is_empty() {
        return Err(Failure::Wrong("there is no output to compare".into()));
    }
    let mut lines = Vec::new();
    for mut e in expected {
        let Some((_, got)) = outputs.iter().find(|(n, _)| *n == e.name) else {
            return Err(Failure::Wrong(format!("output `{}` is missing", e.name)));
        };
        let actual: Vec<f64> = match &e.points {
            None => e.elements(&got.to_values().map_err(Failure::wrong)?),
            // Only what is sampled is decoded: the rest may be larger than memory in float64.
            Some(points) => points.iter().map(|p| element(&e, got, p)).collect::<Result<_, Failure>>()?,
        };
        // A one-pass form may give a finite value where the text's own is 0/0 of an empty fiber (docs/language.md).
        if b.extents.contains(&0) {
            for (v, got) in e.values.iter_mut().zip(&actual).filter(|(v, _)| v.is_nan()) {
                *v = *got;
            }
        }
        let report = e.compare(&actual).map_err(Failure::wrong)?;
        let which = if e.points.is_some() { "sampled elements" } else { "elements" };
        lines.push(format!(
            "{}: {} {which} agree; largest error {:.2e}, {:.0}% of its tolerance",
            e.name,
            report.elements,
            report.worst_error,
            100.0 * report.worst_ratio
        ));
    }
    Ok(lines)
}

/// One element of a dense array.
fn element(e: &Expected, array: &HostArray, at: &[u64]) -> Result<f64, Failure> {
    let mut at = at.to_vec();
    // Of packed elements, which half of its byte.
    let half = e.packing.zip(at.last_mut()).map(|(order, last)| {
        let half = *last as usize % 2;
        *last /= 2;
        (order, half)
    });
    let strides = einfall_ir::array::strides(array.shape());
    let i = at.iter().zip(&strides).map(|(c, s)| *c as usize * *s as usize).sum::<usize>();
    let bytes = array.dtype().bytes(1) as usize;
    let one = HostArray::from_bytes(array.dtype(), &[1], &array.bytes()[i * bytes..(i + 1) * bytes]);
    let one = one.and_then(|a| a.to_values()).map_err(Failure::wrong)?;
    let unpacked = half.and_then(|(order, half)| Some(one.unpacked(e.dtype, order, 2)?.data[half]));
    Ok(unpacked.unwrap_or(one.data[0]))
}

/// Points of the iteration spaces of all statements.
fn points(c: &Cascade, b: &Bindings) -> u64 {
    c.einsums().fold(0, |all, e| all.saturating_add(points_of(c, b, e)))
}

/// As [`points`], of the statements alone whose results others read, or their own next step: sampling elements of the
/// outputs does not save these.
pub fn inner_points(c: &Cascade, b: &Bindings) -> u64 {
    let mut read = Vec::new();
    for e in c.einsums() {
        for root in e.roots() {
            c.walk(root, &mut |_, x| {
                if let Expr::Read { tensor, .. } = x {
                    read.push(*tensor);
                }
            });
        }
    }
    let inner = c.einsums().filter(|e| e.targets.iter().any(|t| read.contains(&t.tensor)));
    inner.fold(0, |all, e| all.saturating_add(points_of(c, b, e)))
}

fn points_of(c: &Cascade, b: &Bindings, e: &Einsum) -> u64 {
    let mut indices = e.free.clone();
    for root in e.roots() {
        c.walk(root, &mut |_, x| {
            if let Expr::Reduce { over, .. } = x {
                indices.extend(over);
            }
        });
    }
    indices.sort();
    indices.dedup();
    indices.iter().map(|i| b.size(&c.indices[*i].extent).unwrap_or(u64::MAX)).fold(1, u64::saturating_mul)
}
