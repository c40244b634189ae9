//! The cases of library cascades that `bench` times on a processor and through WebGPU: one table.
//!
//! Invariant: a case is named as the peers' scripts name it (`benches/peers_cpu.py` has the same names), counts what they
//! count, and is given values under which the work is what the name says: full lengths, groups of uneven sizes.

use einfall::with_statics;
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::dtype::DType;
use einfall_runtime::{ArrayError, ArraySpec, HostArray};

use super::super::Failure;
use super::super::gpu::bench::values;

/// What a case counts, by the peers' formulas.
#[derive(Clone, Copy)]
pub enum Measure {
    /// Floating-point operations.
    Flops(f64),
    /// Bytes moved at least.
    Bytes(f64),
    /// Time alone.
    Time,
}

impl Measure {
    /// TFLOP/s or GB/s of so many seconds.
    pub fn rates(self, seconds: f64) -> (Option<f64>, Option<f64>) {
        match self {
            Measure::Flops(n) => (Some(n / seconds / 1e12), None),
            Measure::Bytes(n) => (None, Some(n / seconds / 1e9)),
            Measure::Time => (None, None),
        }
    }
}

/// What a parameter holds where near-normal values would not do.
#[derive(Clone)]
pub enum Fill {
    /// Near-normal values times this.
    Scaled(f32),
    /// These, row-major.
    Values(Vec<f64>),
}

/// One case: a library file, its sizes, and the name the peers' scripts give it.
#[derive(Clone)]
pub struct Case {
    pub family: &'static str,
    pub name: String,
    pub file: &'static str,
    pub sizes: Vec<(&'static str, u64)>,
    /// In place of the file's bf16.
    pub dtype: DType,
    /// Tensors that the peers keep in `dtype` too, whatever the library's file says.
    pub also: &'static [&'static str],
    /// Ranks that a program knows when it compiles.
    pub fixed: &'static [&'static str],
    pub fills: Vec<(&'static str, Fill)>,
    pub measure: Measure,
}

impl Case {
    fn new(family: &'static str, name: String, file: &'static str, sizes: Vec<(&'static str, u64)>) -> Case {
        let (also, fixed): (&[&str], &[&str]) = (&[], &[]);
        Case { family, name, file, sizes, dtype: DType::F32, also, fixed, fills: Vec::new(), measure: Measure::Time }
    }

    /// The library's cascade in the case's type, with what it fixes.
    pub fn cascade(&self) -> Result<Cascade, Failure> {
        let text = einfall_kernels::source(self.file).expect("a library file");
        let module = parse(text).map_err(|d| Failure::Wrong(format!("{}: {d:?}", self.file)))?;
        let c = module.cascades.into_iter().next_back().expect("a cascade");
        let mut c = retyped(c, self.dtype);
        c.tensors
            .iter_mut()
            .filter(|(_, t)| self.also.contains(&t.name.as_str()))
            .for_each(|(_, t)| t.dtype = self.dtype);
        c.outputs.iter_mut().filter(|o| self.also.contains(&o.name.as_str())).for_each(|o| o.dtype = self.dtype);
        let fixed = self.sizes.iter().filter(|(n, _)| self.fixed.contains(n));
        let fixed: Vec<(String, u64)> = fixed.map(|(n, size)| ((*n).to_owned(), *size)).collect();
        with_statics(&c, &fixed).map_err(Failure::wrong)
    }

    /// Its sizes for the ranks of its cascade.
    pub fn extents(&self, c: &Cascade) -> Vec<(String, u64)> {
        let known = self.sizes.iter().filter(|(n, _)| c.rank(n).is_some());
        known.map(|(n, size)| ((*n).to_owned(), *size)).collect()
    }

    /// Scalars that are not left at their default.
    pub fn scalars(&self, c: &Cascade) -> Vec<(String, f64)> {
        let scalar = |name: &str| c.tensor(name).is_some_and(|t| c.tensors[t].dims.is_empty());
        let given = self.fills.iter().filter(|(n, _)| scalar(n));
        given
            .filter_map(|(n, f)| match f {
                Fill::Values(v) => Some(((*n).to_owned(), v[0])),
                Fill::Scaled(_) => None,
            })
            .collect()
    }

    /// What an array holds.
    pub fn array(&self, spec: &ArraySpec, seed: u64) -> Result<HostArray, ArrayError> {
        let drawn = || values(spec.dtype, spec.shape, seed);
        match self.fills.iter().find(|(n, _)| *n == spec.name).map(|(_, f)| f) {
            None => drawn(),
            Some(Fill::Scaled(by)) => {
                let mut array = drawn()?.to_values()?;
                array.data.iter_mut().for_each(|x| *x *= f64::from(*by));
                HostArray::from_values(&array)
            }
            Some(Fill::Values(list)) => {
                let mut array = HostArray::zeros(spec.dtype, spec.shape)?.to_values()?;
                array.data.copy_from_slice(list);
                HostArray::from_values(&array)
            }
        }
    }
}

/// The cascade with its bf16 tensors declared as `dtype`.
pub fn retyped(mut c: Cascade, dtype: DType) -> Cascade {
    let set = |d: &mut DType| {
        if *d == DType::BF16 {
            *d = dtype;
        }
    };
    c.tensors.iter_mut().for_each(|(_, t)| set(&mut t.dtype));
    c.outputs.iter_mut().for_each(|o| set(&mut o.dtype));
    c
}

/// Every case.
pub fn cases() -> Vec<Case> {
    let copy = Case {
        measure: Measure::Bytes(2.0 * f64::from(1 << 26)),
        ..Case::new("ceilings", "copy_64MiB".to_owned(), "copy", vec![("M", 16384), ("N", 1024)])
    };
    let mut list = vec![copy];
    for dtype in [DType::F32, DType::BF16] {
        let typed = |family, name: String, file, sizes| Case { dtype, ..Case::new(family, name, file, sizes) };
        gemms(&mut list, &typed, dtype);
        attentions(&mut list, &typed, dtype);
        rows(&mut list, &typed, dtype);
        recurrences(&mut list, &typed, dtype);
        let (t, e, d, f) = (2048u64, 8u64, 512u64, 1024u64);
        list.push(Case {
            fills: vec![
                ("offs", Fill::Values(uneven(t, e))),
                // Every token once, in no order; 1,237 and the number of tokens have no common divisor.
                ("src", Fill::Values((0..t).map(|i| (i * 1237 % t) as f64).collect())),
            ],
            measure: Measure::Flops(2.0 * (t * d * f) as f64),
            ..typed(
                "moe",
                format!("up_t{t}_e{e}_k1_d{d}_f{f}_{dtype}"),
                "moe_up",
                vec![("T", t), ("N", t), ("X", e), ("D", d), ("F", f)],
            )
        });
    }
    list
}

/// Makes a case of a type: its family, name, file and sizes.
type Typed<'a> = &'a dyn Fn(&'static str, String, &'static str, Vec<(&'static str, u64)>) -> Case;

fn gemms(list: &mut Vec<Case>, typed: Typed<'_>, dtype: DType) {
    let shapes =
        [(512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (16, 4096, 4096), (4, 4096, 4096), (1, 4096, 4096)];
    for (m, n, k) in shapes {
        let sizes = vec![("M", m), ("N", n), ("K", k)];
        let case = typed("gemm", format!("m{m}_n{n}_k{k}_{dtype}"), "matmul", sizes);
        let measure = match m {
            // Of few rows the weight is what takes time.
            ..64 => Measure::Bytes(dtype.bytes(n * k) as f64),
            _ => Measure::Flops(2.0 * (m * n * k) as f64),
        };
        list.push(Case { measure, ..case });
    }
}

fn attentions(list: &mut Vec<Case>, typed: Typed<'_>, dtype: DType) {
    let (h, n) = (8u64, 2048u64);
    let sizes = |d| vec![("B", 1), ("G", h), ("R", 1), ("H", h), ("M", n), ("N", n), ("E", d), ("F", d)];
    let flops = |d: u64, causal| 4.0 * (h * n * n * d) as f64 * if causal { 0.5 } else { 1.0 };
    for (d, causal) in [(64, false), (64, true), (128, false), (128, true)] {
        let what = if causal { "causal" } else { "full" };
        let file = if causal { "attention" } else { "attention_full" };
        list.push(Case {
            fixed: &["E", "F"],
            measure: Measure::Flops(flops(d, causal)),
            ..typed("attn_fwd", format!("b1_h{h}_kv{h}_n{n}_d{d}_{what}_{dtype}"), file, sizes(d))
        });
    }
    if dtype == DType::F32 {
        let slopes = (0..h).map(|i| (-(i as f64) - 1.0).exp2()).collect();
        for (what, file, fills) in [
            ("softcap20_causal", "attention_softcap", vec![("cap", Fill::Values(vec![20.0]))]),
            ("alibi_causal", "attention_alibi", vec![("slope", Fill::Values(slopes))]),
        ] {
            list.push(Case {
                fixed: &["E", "F"],
                fills,
                measure: Measure::Flops(flops(64, true)),
                ..typed("attn_variants", format!("b1_h{h}_n{n}_d64_{what}_{dtype}"), file, sizes(64))
            });
        }
    }
    let (b, hq, hkv, n, d) = (8u64, 32u64, 8u64, 2048u64, 128u64);
    list.push(Case {
        fixed: &["E", "F"],
        fills: vec![("len", Fill::Values(vec![n as f64; b as usize]))],
        measure: Measure::Bytes(dtype.bytes(2 * b * hkv * n * d) as f64),
        ..typed(
            "attn_decode",
            format!("b{b}_h{hq}_kv{hkv}_ctx{n}_d{d}_{dtype}"),
            "decode_attention",
            vec![("B", b), ("G", hkv), ("R", hq / hkv), ("N", n), ("E", d), ("F", d)],
        )
    });
}

fn rows(list: &mut Vec<Case>, typed: Typed<'_>, dtype: DType) {
    let (rows, d) = (4096u64, 4096u64);
    for (file, also) in [("layernorm", &["gamma", "beta"][..]), ("rmsnorm", &["gamma"]), ("softmax", &["S", "Y"])] {
        list.push(Case {
            also,
            measure: Measure::Bytes(dtype.bytes(2 * rows * d) as f64),
            ..typed("norm", format!("{file}_{rows}x{d}_{dtype}"), file, vec![("M", rows), ("K", d), ("N", d)])
        });
    }
}

fn recurrences(list: &mut Vec<Case>, typed: Typed<'_>, dtype: DType) {
    let (t, b, h, d) = (256u64, 16u64, 12u64, 64u64);
    let scale = |d: u64| Fill::Scaled(1.0 / (d as f32).sqrt());
    list.push(Case {
        fills: vec![("Rw", scale(d))],
        measure: Measure::Flops(2.0 * (t * b * h * 4 * d * d) as f64),
        ..typed(
            "rnn_fwd",
            format!("lstm_b{b}_t{t}_h{h}_d{d}_{dtype}"),
            "lstm",
            vec![("T", t), ("B", b), ("H", h), ("D", d)],
        )
    });
    let (t, d) = (512u64, 512u64);
    list.push(Case {
        fills: vec![("W", scale(d)), ("Rw", scale(d))],
        measure: Measure::Flops(2.0 * (t * b * 4 * d * 2 * d) as f64),
        ..typed(
            "rnn_fwd",
            format!("lstm_dense_b{b}_t{t}_hidden{d}_{dtype}"),
            "lstm_layer",
            vec![("T", t), ("B", b), ("I", d), ("D", d)],
        )
    });
    if dtype == DType::F32 {
        let (t, h, d) = (2048u64, 8u64, 64u64);
        list.push(Case {
            fixed: &["E", "F"],
            measure: Measure::Bytes(dtype.bytes(4 * t * h * d) as f64),
            ..typed(
                "linrec_fwd",
                format!("linear_attn_b1_t{t}_h{h}_d{d}_{dtype}"),
                "linear_attention",
                vec![("B", 1), ("T", t), ("H", h), ("E", d), ("F", d)],
            )
        });
        let d = 4096u64;
        list.push(Case {
            measure: Measure::Bytes(dtype.bytes(3 * t * d) as f64),
            ..typed(
                "linrec_fwd",
                format!("diagonal_b1_t{t}_d{d}_{dtype}"),
                "diagonal_recurrence",
                vec![("T", t), ("B", 1), ("D", d)],
            )
        });
    }
}

/// Offsets of `parts` groups of `n` rows whose sizes are to each other as 2, 3, 4 and so on.
pub fn uneven(n: u64, parts: u64) -> Vec<f64> {
    let whole = parts * (parts + 3) / 2;
    (0..=parts).map(|i| (n * (i * (i + 3) / 2) / whole) as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_cascade_in_its_type_and_a_name_of_its_own() {
        let list = cases();
        for case in &list {
            let c = case.cascade().unwrap_or_else(|_| panic!("{}", case.name));
            let sizes = case.extents(&c);
            assert!(c.ranks.iter().all(|(_, r)| sizes.iter().any(|(n, _)| *n == r.name)), "{}", case.name);
            assert!(case.fills.iter().all(|(n, _)| c.tensor(n).is_some()), "{}", case.name);
            let x = c.tensors.iter().find(|(_, t)| t.dtype == case.dtype);
            assert!(
                x.is_some() && (case.dtype == DType::BF16 || c.tensors.iter().all(|(_, t)| t.dtype != DType::BF16))
            );
        }
        let names: std::collections::BTreeSet<_> = list.iter().map(|c| (c.family, &c.name)).collect();
        assert_eq!(names.len(), list.len());
        let offsets = uneven(2048, 8);
        assert!(offsets.first() == Some(&0.0) && offsets.last() == Some(&2048.0) && offsets.is_sorted());
    }
}
