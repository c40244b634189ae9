//! Mappings on this machine's processor: compile, compare, time.

use std::time::{Duration, Instant};

use einfall::{Bound, CompileOptions, Engine, Options};
use einfall_ir::mapping::Mapping;
use einfall_ir::tile::{BufferKind, Plan};
use einfall_runtime::{Arguments, Cpu, HostArray};

use super::super::Failure;
use super::super::gpu::bench::values;
use super::super::gpu::plans;
use super::worker::{Fault, Loaded, Timing};

/// Launches in a row, at most.
const LAUNCHES: usize = 500;
/// How often a mapping and the one beside it take turns.
const TURNS: u32 = 4;
/// Most sets of arrays that take turns.
const SETS: usize = 8;

/// The processor with what is compiled and the arrays of a case.
pub struct Bench {
    engine: Engine,
    cache_bytes: u64,
    kernel: Option<einfall::Kernel>,
    /// What every other is timed in turns with.
    beside: Option<einfall::Kernel>,
    sets: Vec<Vec<(String, HostArray, bool)>>,
    /// Launches so far, for whose turn of the sets it is.
    turn: usize,
}

fn failed(e: impl std::fmt::Display) -> Fault {
    Fault::Failed(e.to_string())
}

impl Bench {
    /// Starts the engine.
    pub fn new() -> Result<Bench, Failure> {
        let engine = Engine::new(&Options::from_env().map_err(Failure::usage)?).map_err(Failure::machine)?;
        let cpu = Cpu::detect();
        let cache_bytes = cpu.caches.last().map_or(32 << 20, |c| c.bytes);
        Ok(Bench { engine, cache_bytes, kernel: None, beside: None, sets: Vec::new(), turn: 0 })
    }

    /// Drops the arrays of the case before.
    pub fn forget(&mut self) {
        self.sets.clear();
        (self.kernel, self.beside) = (None, None);
    }

    /// A plan with this processor's roundings.
    pub fn rounded(&self, plan: &Plan) -> Plan {
        self.engine.rounded(plan)
    }

    /// Compiles the mapping that the others are timed in turns with.
    ///
    /// # Errors
    /// Why it is of no use; then there is none.
    pub fn refer(&mut self, loaded: &Loaded, text: &str) -> Result<(), String> {
        let mapping = einfall_ir::mapping::parse::parse(text).map_err(|d| d.message)?;
        einfall::fits(&mapping, &loaded.plan)?;
        let options = CompileOptions { mapping: Some(mapping), ..CompileOptions::default() };
        let kernel = self.engine.compile_with(&loaded.cascade, &options).map_err(|e| e.to_string())?;
        kernel.bind(&loaded.case.sizes).map_err(|e| e.to_string())?;
        self.beside = Some(kernel);
        Ok(())
    }

    /// Compiles a mapping.
    pub fn build(&mut self, loaded: &Loaded, mapping: Mapping) -> Result<(), Fault> {
        let options = CompileOptions { mapping: Some(mapping), ..CompileOptions::default() };
        self.kernel = Some(self.engine.compile_with(&loaded.cascade, &options).map_err(failed)?);
        Ok(())
    }

    fn bound(&self, sizes: &[(String, u64)]) -> Result<Bound, Fault> {
        self.kernel.as_ref().ok_or_else(|| failed("nothing is compiled"))?.bind(sizes).map_err(failed)
    }

    /// Compares results at the small sizes with the evaluator's.
    pub fn check(&mut self, loaded: &mut Loaded) -> Result<(), Fault> {
        let bound = self.bound(&loaded.small)?;
        let case = loaded.expected().map_err(failed)?;
        let (mut arrays, mut scalars) = (Vec::new(), Vec::new());
        for (name, a) in &case.inputs {
            match a.dims.is_empty() {
                true => scalars.push((name.as_str(), a.data[0])),
                false => arrays.push((name.as_str(), HostArray::from_values(a).map_err(failed)?)),
            }
        }
        let given: Vec<(&str, &HostArray)> = arrays.iter().map(|(n, a)| (*n, a)).collect();
        let outputs = bound.runtime().run_to_arrays(&given, &scalars).map_err(failed)?;
        plans::compare(&case.expected, &outputs).map(|_| ()).map_err(Fault::Wrong)
    }

    /// Times launches: random data, warm-up, the median, in turns with the mapping beside. Where memory binds, sets of
    /// arrays beyond the last cache take turns.
    pub fn time(&mut self, loaded: &Loaded, budget: Duration) -> Result<Timing, Fault> {
        let bound = self.bound(&loaded.case.sizes)?;
        let beside = self.beside.as_ref().map(|k| k.bind(&loaded.case.sizes)).transpose().map_err(failed)?;
        if self.sets.is_empty() {
            let flops: u64 = bound.runtime().kernels().map(|k| k.flops).sum();
            let bytes: u64 = bound.runtime().kernels().map(|k| k.bytes).sum();
            // Few operations a byte: what is read must come from memory.
            let cold = flops < 16 * bytes;
            let many = (2 * self.cache_bytes).div_ceil(bytes.max(1)).clamp(2, SETS as u64) as usize;
            let sets = (0..if cold { many } else { 1 }).map(|i| arrays(&bound, i as u64));
            self.sets = sets.collect::<Result<_, _>>().map_err(failed)?;
        }
        // Until the other threads came and have a core each.
        self.launches(&bound, 1, budget / 4)?;
        let (mut own, mut other) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            own.extend(self.launches(&bound, 1, budget / TURNS)?);
            if let Some(b) = &beside {
                other.extend(self.launches(b, 1, budget / TURNS / 2)?);
            }
        }
        let launches = own.len();
        let middle = |mut list: Vec<f64>| {
            list.sort_by(f64::total_cmp);
            list.get(list.len() / 2).copied()
        };
        let us = middle(own).ok_or_else(|| failed("nothing was launched"))?;
        Ok(Timing { us, beside_us: middle(other), launches, ..Timing::default() })
    }

    /// Microseconds of launches, as many as `least` and the time ask for; without the first with every set, which find
    /// data where another kernel's threads had it.
    fn launches(&mut self, bound: &Bound, least: usize, time: Duration) -> Result<Vec<f64>, Fault> {
        let mut samples = Vec::new();
        let mut begin = Instant::now();
        for launch in 0.. {
            if launch == self.sets.len() {
                begin = Instant::now();
            }
            if samples.len() >= least && (begin.elapsed() >= time || samples.len() >= LAUNCHES) {
                break;
            }
            let turn = self.turn % self.sets.len();
            self.turn += 1;
            let mut arguments = Arguments::new();
            for (name, array, written) in &mut self.sets[turn] {
                arguments = match written {
                    true => arguments.output(name, array.view_mut()),
                    false => arguments.input(name, array.view()),
                };
            }
            let start = Instant::now();
            bound.launch(arguments).map_err(failed)?;
            if launch >= self.sets.len() {
                samples.push(start.elapsed().as_secs_f64() * 1e6);
            }
        }
        Ok(samples)
    }
}

/// One set of arrays: near-normal values, never zeros; and whether each is written.
fn arrays(bound: &Bound, seed: u64) -> Result<Vec<(String, HostArray, bool)>, String> {
    let mut out = Vec::new();
    for (i, spec) in bound.runtime().arrays().filter(|s| !s.shape.is_empty()).enumerate() {
        let written = spec.kind != BufferKind::Input;
        let array = match spec.kind {
            BufferKind::Output => HostArray::zeros(spec.dtype, spec.shape).map_err(|e| e.to_string())?,
            BufferKind::Input | BufferKind::InOut | BufferKind::Workspace => {
                values(spec.dtype, spec.shape, 64 * seed + i as u64).map_err(|e| e.to_string())?
            }
        };
        out.push((spec.name.to_owned(), array, written));
    }
    Ok(out)
}
