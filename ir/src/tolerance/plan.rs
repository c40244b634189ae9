//! Tolerances for plans: as for cascades, from randomised evaluations in the types a plan declares for its tiles and
//! arrays.
//!
//! tolerance = 4 × the largest deviation from float64, over the tensor, in 16 randomised evaluations, before the last
//! rounding, plus one ulp of the element for that rounding. Invariant: a plan has no running bound, so the sampled part
//! of a cascade's tolerance stands alone, and the last rounding, the largest of all in narrow types, is counted by
//! element; elements that were not evaluated have no value and are not compared.

use super::{Expected, MARGIN, SAMPLES};
use crate::array::Array;
use crate::tile::eval::{Options, TileError, run};
use crate::tile::{BufferKind, Plan};

/// Reference values and tolerances of every output and inout of a plan, in order. `options` gives the blocks and, for
/// large sizes, how many tasks of the last kernel to evaluate; evaluations share the machine's threads.
///
/// # Errors
/// As [`run`].
pub fn expect_plan(
    plan: &Plan,
    ranks: &[u64],
    inputs: &[Array],
    options: &Options,
) -> Result<Vec<Expected>, TileError> {
    let exact = Options { rounding: false, stochastic: None, ..options.clone() };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64).min(SAMPLES);
    let sample = |seed| Options { rounding: true, stochastic: Some(seed), round_results: false, ..options.clone() };
    let part = |t: u64| -> Result<Vec<Vec<Array>>, TileError> {
        (0..SAMPLES).filter(|s| s % threads == t).map(|s| run(plan, ranks, inputs, &sample(s))).collect()
    };
    let part = &part;
    let (reference, samples) = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|t| scope.spawn(move || part(t))).collect();
        let reference = run(plan, ranks, inputs, &exact);
        let join = |w: std::thread::ScopedJoinHandle<'_, _>| w.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
        (reference, workers.into_iter().map(join).collect::<Vec<_>>())
    });
    let outputs = plan.buffers.iter().filter(|(_, b)| matches!(b.kind, BufferKind::Output | BufferKind::InOut));
    let mut all: Vec<Expected> = outputs
        .zip(reference?)
        .map(|((_, b), r)| Expected {
            name: b.name.clone(),
            dtype: b.dtype,
            dims: r.dims,
            packing: None,
            points: None,
            support: options.tasks.map(|_| r.data.iter().map(|x| !x.is_nan()).collect()),
            tolerance: Vec::new(),
            bounds: vec![f64::INFINITY; r.data.len()],
            values: r.data,
            deviation: 0.0,
        })
        .collect();
    for sample in samples {
        for arrays in sample? {
            all.iter_mut().zip(&arrays).for_each(|(x, a)| x.sample(&a.data));
        }
    }
    for x in &mut all {
        let (cap, dtype) = (MARGIN * x.deviation, x.dtype);
        let last = |v: &f64| if dtype.is_float() { dtype.ulp(*v) } else { 0.0 };
        x.tolerance = x.values.iter().map(|v| cap + last(v)).collect();
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tile::eval::Blocks;
    use crate::tolerance::inputs::{Variant, random_for_plan};

    const GEMM: &str = "plan gemm[M, N, K] {
    input A: bf16[M, K]
    input B: bf16[K, N]
    output C: bf16[M, N]

    kernel gemm {
        grid m in M
        grid n in N
        stream k in K
        tile a: bf16[m, k]
        tile b: bf16[k, n]
        tile c: f32[m, n]
        c = 0.0
        for k {
            a = load A[m, k]
            b = load B[k, n]
            c = carry contract(k) a, b
        }
        store C[m, n] = c over m, n
    }
}
";

    #[test]
    fn rounded_evaluations_agree_and_faults_do_not() {
        let plan = crate::tile::parse::parse(GEMM).unwrap();
        let ranks = [9, 10, 40];
        let inputs = random_for_plan(&plan, &ranks, 3, Variant::Normal).unwrap();
        let options = Options { blocks: Blocks::Uniform(4), ..Options::default() };
        let expected = &expect_plan(&plan, &ranks, &inputs, &options).unwrap()[0];
        let rounded = Options { rounding: true, blocks: Blocks::Uniform(16), ..Options::default() };
        let mut got = run(&plan, &ranks, &inputs, &rounded).unwrap().remove(0);
        assert!(expected.compare(&got.data).unwrap().elements == 90);
        // Without the largest product of one sum; the smallest are below the resolution of bf16.
        let product = |k: usize| inputs[0].data[3 * 40 + k] * inputs[1].data[k * 10 + 7];
        let missing = (0..40).map(product).max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
        got.data[3 * 10 + 7] -= missing;
        assert!(expected.compare(&got.data).is_err(), "{missing} against {}", expected.tolerance[37]);
    }

    #[test]
    fn drawn_tasks_are_those_of_the_whole() {
        let plan = crate::tile::parse::parse(GEMM).unwrap();
        let ranks = [33, 31, 5];
        let inputs = random_for_plan(&plan, &ranks, 4, Variant::Normal).unwrap();
        let options = Options { blocks: Blocks::Uniform(8), ..Options::default() };
        let whole = run(&plan, &ranks, &inputs, &options).unwrap().remove(0);
        let some = Options { tasks: Some((6, 1)), ..options };
        let expected = &expect_plan(&plan, &ranks, &inputs, &some).unwrap()[0];
        let n = expected.compare(&whole.data).unwrap().elements;
        assert!(n > 64 && n < whole.data.len(), "{n}");
        let present = expected.support.as_ref().unwrap();
        assert!(present[0] && present[present.len() - 1], "the first and the last task are drawn");
    }
}
