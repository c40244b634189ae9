//! Mappings on an NVIDIA GPU: compile, compare, time by events with the level-2 cache overwritten before each launch.

use std::time::Duration;

use einfall::cuda::{Engine, Kernel};
use einfall::{CompileOptions, Options};
use einfall_ir::array::Array;
use einfall_ir::dtype::DType;
use einfall_ir::mapping::Mapping;
use einfall_runtime::cuda::{CudaError, DeviceArray, Prepared, Stream};

use super::super::Failure;
use super::super::gpu::bench::fill;
use super::super::gpu::plans;
use super::worker::{Fault, Loaded, Timing};

/// Launches a median is of.
const LAUNCHES: std::ops::RangeInclusive<usize> = 3..=200;
/// Bytes that are overwritten before a launch: the level-2 caches of the data sheets several times over.
const FLUSH_BYTES: u64 = 1 << 28;

/// A GPU with what is compiled and the arrays of a case.
pub struct Bench {
    kernel: Option<Kernel>,
    prepared: Option<Prepared>,
    arrays: Vec<(String, DeviceArray)>,
    flush: DeviceArray,
    stream: Stream,
    engine: Engine,
}

fn failed(e: impl std::fmt::Display) -> Fault {
    let text = e.to_string();
    match text.contains("nothing more can run") || text.contains("not used any more") {
        true => Fault::Fatal(text),
        false => Fault::Failed(text),
    }
}

impl Bench {
    /// Opens device number `index`.
    pub fn new(index: usize) -> Result<Bench, Failure> {
        let options = Options::from_env().map_err(Failure::usage)?;
        let engine = Engine::new(&options, index).map_err(Failure::machine)?;
        let stream = engine.runtime().stream().map_err(Failure::machine)?;
        let flush = engine.runtime().array(DType::U8, &[FLUSH_BYTES]).map_err(Failure::machine)?;
        Ok(Bench { kernel: None, prepared: None, arrays: Vec::new(), flush, stream, engine })
    }

    /// Drops the arrays of the case before.
    pub fn forget(&mut self) {
        self.prepared = None;
        self.arrays.clear();
        self.kernel = None;
    }

    /// Compiles a mapping and puts the arrays of the case in place.
    pub fn build(&mut self, loaded: &Loaded, mapping: Mapping) -> Result<(), Fault> {
        self.prepared = None;
        let options = CompileOptions { mapping: Some(mapping), ..CompileOptions::default() };
        let kernel = self.engine.compile_with(&loaded.cascade, &options).map_err(failed)?;
        let bound = kernel.bind(&loaded.case.sizes).map_err(failed)?;
        let arguments = fill(&bound, &self.stream, &mut self.arrays).map_err(failed)?;
        self.prepared = Some(bound.prepare(arguments).map_err(failed)?);
        self.kernel = Some(kernel);
        Ok(())
    }

    fn kernel(&self) -> Result<&Kernel, Fault> {
        self.kernel.as_ref().ok_or_else(|| failed("nothing is compiled"))
    }

    /// Compares results at the small sizes with the evaluator's. Sizes that the kernels do not take are left out.
    pub fn check(&mut self, loaded: &mut Loaded) -> Result<(), Fault> {
        let Ok(bound) = self.kernel()?.bind(&loaded.small) else { return Ok(()) };
        let case = loaded.expected().map_err(failed)?;
        let inputs: Vec<(&str, &Array)> = case.inputs.iter().map(|(n, a)| (n.as_str(), a)).collect();
        let outputs = match bound.run_values(&self.stream, &inputs) {
            Ok(outputs) => outputs,
            Err(einfall::Error::Runtime(einfall_runtime::Error::Cuda(
                CudaError::TensorMap { .. } | CudaError::Launch { .. } | CudaError::Extent { .. },
            ))) => return Ok(()),
            Err(e) => return Err(failed(e)),
        };
        plans::compare(&case.expected, &outputs).map(|_| ()).map_err(Fault::Wrong)
    }

    /// Times launches on random data: warm-up, then the median of as many as the budget holds.
    pub fn time(&mut self, budget: Duration) -> Result<Timing, Fault> {
        let (Some(kernel), Some(prepared)) = (&self.kernel, &self.prepared) else {
            return Err(failed("nothing is compiled"));
        };
        let first = self.launches(prepared, 2).map_err(failed)?;
        let estimate = first.iter().copied().fold(f64::INFINITY, f64::min) + 0.1;
        let n = ((budget.as_secs_f64() * 1e3 / estimate) as usize).clamp(*LAUNCHES.start(), *LAUNCHES.end());
        if n > 2 * LAUNCHES.start() {
            self.launches(prepared, n / 3).map_err(failed)?;
        }
        let mut samples = self.launches(prepared, n).map_err(failed)?;
        samples.sort_by(f64::total_cmp);
        let launched = prepared.symbols();
        let functions = || kernel.executable().functions().filter(|f| launched.contains(&f.symbol));
        Ok(Timing {
            us: samples[samples.len() / 2] * 1e3,
            beside_us: None,
            launches: n,
            registers: functions().map(|f| f.registers).collect(),
            local_bytes: functions().map(|f| f.local_bytes).collect(),
        })
    }

    fn launches(&self, prepared: &Prepared, n: usize) -> Result<Vec<f64>, CudaError> {
        let mut events = Vec::new();
        for _ in 0..n {
            self.flush.fill(&self.stream, 0)?;
            let (start, end) = (self.engine.runtime().event()?, self.engine.runtime().event()?);
            self.stream.record(&start)?;
            prepared.launch(&self.stream)?;
            self.stream.record(&end)?;
            events.push((start, end));
        }
        self.stream.synchronize()?;
        events.iter().map(|(a, b)| b.milliseconds_since(a)).collect()
    }
}
