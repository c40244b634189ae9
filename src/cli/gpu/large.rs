//! Arrays of more than 2³¹ elements: a cascade whose outermost rank only counts independent rows runs on an array that
//! repeats a small one again and again. Every repetition must give the bits of the small run, whose values the
//! evaluator has confirmed. Invariant: an offset that is cut to 32 bits anywhere reads other values or stores into
//! another repetition: no power of two from 2²⁹ to 2³² is a multiple of a repeated input's elements.

use einfall::cuda::{Engine, Kernel};
use einfall_ir::cascade::bind::{Bindings, Given, bind};
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::tile::BufferKind;
use einfall_ir::tolerance::inputs::{Variant, random};
use einfall_runtime::HostArray;
use einfall_runtime::cuda::{Arguments, DeviceArray, Stream};

use super::super::compare;
use super::{Failure, text};

/// A library file, the rank of independent rows, how many rows are repeated, and the other ranks.
type Case = (&'static str, &'static str, u64, &'static [(&'static str, u64)]);

/// Largest array at the repeated sizes: just above 2³¹ elements.
pub const CASES: [Case; 5] = [
    ("rmsnorm", "M", 67, &[("K", 4096)]),
    ("softmax", "M", 67, &[("N", 2048)]),
    ("matmul", "M", 251, &[("N", 64), ("K", 4096)]),
    ("linear_gelu", "M", 251, &[("N", 4096), ("K", 64)]),
    ("attention_full", "B", 3, &[("H", 4), ("M", 64), ("N", 192), ("E", 64), ("F", 64)]),
];

/// Runs one case.
pub fn check(engine: &Engine, stream: &Stream, case: &Case, seed: u64) -> Result<String, String> {
    let (file, rows, period, others) = case;
    let source = einfall_kernels::source(file).ok_or_else(|| format!("no library file {file}"))?;
    let module = parse(source).map_err(|d| format!("{file}: {d:?}"))?;
    let cascade = module.cascades.into_iter().next_back().ok_or_else(|| format!("{file} is empty"))?;
    let kernel = engine.compile(&cascade).map_err(text)?;
    let mut sizes: Vec<(String, u64)> = others.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
    sizes.push(((*rows).to_owned(), *period));
    let b = bind(&cascade, &Given { sizes: sizes.clone(), ..Given::default() }).map_err(text)?;
    let values = random(&cascade, &b, seed, Variant::Small).map_err(text)?;
    let inputs: Vec<(&str, HostArray)> = cascade
        .params
        .iter()
        .zip(&values)
        .filter(|(_, a)| !a.dims.is_empty())
        .map(|(p, a)| Ok((cascade.tensors[*p].name.as_str(), HostArray::from_values(a).map_err(text)?)))
        .collect::<Result<_, String>>()?;
    let scalars: Vec<(&str, f64)> = cascade
        .params
        .iter()
        .zip(&values)
        .filter(|(_, a)| a.dims.is_empty())
        .map(|(p, a)| (cascade.tensors[*p].name.as_str(), a.data[0]))
        .collect();
    let small = small(&kernel, stream, &cascade, &b, &values, seed)?;
    let largest = |b: &einfall::cuda::Bound| b.runtime().arrays().map(|a| a.shape.iter().product::<u64>()).max();
    let per = largest(&kernel.bind(&sizes).map_err(text)?).unwrap_or(0);
    let repeats = (1u64 << 31) / per + 3;
    sizes.last_mut().expect("the rows").1 = period * repeats;
    let bound = kernel.bind(&sizes).map_err(text)?;
    let mut arguments = Arguments::new();
    for (name, value) in &scalars {
        arguments = arguments.scalar(name, *value);
    }
    let mut outputs = Vec::new();
    for spec in bound.runtime().arrays().filter(|s| !s.shape.is_empty()) {
        let array = bound.runtime().array(spec.name).map_err(text)?;
        if spec.kind == BufferKind::Output {
            array.fill(stream, 0xff).map_err(text)?;
            arguments = arguments.output(spec.name, &array);
            outputs.push((spec.name, array));
            continue;
        }
        let host = &inputs.iter().find(|(n, _)| *n == spec.name).ok_or("an input without values")?.1;
        if array.shape() == host.shape() {
            array.copy_from(stream, host).map_err(text)?;
        } else {
            for k in 0..repeats {
                part(engine, &array, *period, k)?.copy_from(stream, host).map_err(text)?;
            }
        }
        arguments = arguments.input(spec.name, &array);
    }
    bound.prepare(arguments).map_err(text)?.launch(stream).map_err(text)?;
    for (name, array) in &outputs {
        let (_, expected) = small.iter().find(|(n, _)| n == name).ok_or("an output without values")?;
        for k in 0..repeats {
            let got = part(engine, array, *period, k)?.to_host(stream).map_err(text)?;
            if got.bytes() != expected.bytes() {
                return Err(format!("repetition {k} of {repeats} of `{name}` has other bits than the small run"));
            }
        }
    }
    Ok(format!("{file} with {} elements", largest(&bound).unwrap_or(0)))
}

/// The small run, confirmed by the evaluator.
fn small(
    kernel: &Kernel,
    stream: &Stream,
    cascade: &Cascade,
    b: &Bindings,
    values: &[einfall_ir::array::Array],
    seed: u64,
) -> Result<Vec<(String, HostArray)>, String> {
    let sizes: Vec<(&str, u64)> =
        cascade.ranks.iter().zip(&b.extents).map(|((_, r), n)| (r.name.as_str(), *n)).collect();
    let named: Vec<(&str, &einfall_ir::array::Array)> =
        cascade.params.iter().zip(values).map(|(p, a)| (cascade.tensors[*p].name.as_str(), a)).collect();
    let outputs = kernel.bind(&sizes).map_err(text)?.run_values(stream, &named).map_err(text)?;
    compare::outputs(cascade, b, values, &outputs, seed).map_err(|e| match e {
        Failure::Wrong(m) | Failure::Usage(m) | Failure::Machine(m) => m,
    })?;
    Ok(outputs)
}

/// The `k`-th repetition of `period` rows of an array.
fn part(engine: &Engine, array: &DeviceArray, period: u64, k: u64) -> Result<DeviceArray, String> {
    let mut shape = array.shape().to_vec();
    shape[0] = period;
    let offset = array.dtype().bytes(k * period * array.strides()[0].unsigned_abs());
    // SAFETY: `k` counts repetitions inside `array`, which outlives the part.
    unsafe { DeviceArray::from_raw(engine.runtime(), array.dtype(), array.address() + offset, &shape, array.strides()) }
        .map_err(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use einfall_ir::cascade::Size;

    #[test]
    fn a_cut_offset_finds_other_values() {
        for (file, rows, period, others) in CASES {
            let module = parse(einfall_kernels::source(file).unwrap()).unwrap();
            let cascade = module.cascades.last().unwrap();
            let sizes = others.iter().copied().chain([(rows, period)]).map(|(n, v)| (n.to_owned(), v)).collect();
            let b = bind(cascade, &Given { sizes, ..Given::default() }).unwrap();
            let rank = cascade.rank(rows).unwrap();
            let mut repeated = 0;
            for p in &cascade.params {
                let dims = &cascade.tensors[*p].dims;
                if !dims.contains(&Size::Rank(rank)) {
                    continue;
                }
                repeated += 1;
                let elements: u64 = b.dims(cascade, *p).unwrap().iter().product();
                assert!(
                    (29..=32).all(|bits| !(1u64 << bits).is_multiple_of(elements)),
                    "{file}: {elements} elements a repetition"
                );
            }
            assert!(repeated > 0, "{file}: nothing has the rank {rows}");
        }
    }
}
