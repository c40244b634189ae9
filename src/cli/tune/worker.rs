//! The child process that compiles, checks and times one mapping at a time, as its parent asks on standard input.
//!
//! Lines of JSON both ways. Timing waits for the parent's word, so that several children compile side by side and one
//! is timed alone. Invariant: the end of standard input ends the process, whatever it is doing.

use std::io::{BufRead, Write};
use std::sync::mpsc::channel;

use serde::{Deserialize, Serialize};

use einfall_ir::mapping;
use einfall_ir::tile::Plan;

use super::super::Failure;
use super::super::gpu::plans;
use super::case::{self, Case};
use super::{DeviceName, cpu, cuda};

/// What a parent asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Ask {
    /// Compile this.
    Build {
        /// The cascade and sizes.
        case: Case,
        /// The mapping's text.
        mapping: String,
    },
    /// Check and time what was compiled.
    Time {
        /// Milliseconds of launches.
        budget_ms: u64,
    },
}

/// What a child answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// It is compiled.
    Built {
        /// Seconds that took.
        seconds: f64,
    },
    /// It is right and timed.
    Timed(Timing),
    /// It cannot be compiled or run.
    Failed(String),
    /// Its results are wrong.
    Wrong(String),
}

/// A measurement.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Median microseconds of a launch of all kernels.
    pub us: f64,
    /// Median microseconds of the mapping timed in turns with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beside_us: Option<f64>,
    /// Launches it is the median of.
    pub launches: usize,
    /// Registers of a thread by kernel, where the device says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub registers: Vec<u32>,
    /// Bytes of local memory of a thread by kernel, where the device says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub local_bytes: Vec<u32>,
}

/// Seed of the inputs that results are compared on.
const SEED: u64 = 7;

/// A case as a child keeps it.
pub struct Loaded {
    /// What it was asked for.
    pub case: Case,
    /// The cascade.
    pub cascade: einfall_ir::cascade::Cascade,
    /// Its plan on this device, which mappings are of.
    pub plan: Plan,
    /// The plan with the device's roundings, which results are compared with.
    pub computed: Plan,
    /// Sizes at which results are compared.
    pub small: Vec<(String, u64)>,
    /// Inputs and expected outputs there; made when first needed.
    pub expected: Option<plans::Case>,
}

impl Loaded {
    fn new(case: &Case, device: DeviceName, bench: &Bench) -> Result<Loaded, String> {
        let cascade = case.load()?;
        let plan = device.plan(&cascade).map_err(|e| e.to_string())?;
        let computed = match bench {
            Bench::Cpu(b) => b.rounded(&plan),
            Bench::Cuda(_) => plan.clone(),
        };
        let small = case::small(&cascade, &plan, &case.sizes);
        Ok(Loaded { case: case.clone(), cascade, plan, computed, small, expected: None })
    }

    /// Inputs and expected outputs at the small sizes.
    pub fn expected(&mut self) -> Result<&plans::Case, String> {
        if self.expected.is_none() {
            let ranks = case::ranks(&self.computed, &self.small)?;
            let variant = einfall_ir::tolerance::inputs::Variant::Small;
            self.expected = Some(plans::case(&self.computed, &ranks, SEED, variant, case::POINTS)?);
        }
        self.expected.as_ref().ok_or_else(|| "no expected outputs".to_owned())
    }
}

/// Why a mapping is not timed.
pub enum Fault {
    /// It cannot be compiled or run.
    Failed(String),
    /// Its results are wrong.
    Wrong(String),
    /// The device is of no use to this process any more.
    Fatal(String),
}

enum Bench {
    Cpu(Box<cpu::Bench>),
    Cuda(Box<cuda::Bench>),
}

/// Serves a parent until standard input ends.
pub fn serve(device: DeviceName) -> Result<(), Failure> {
    let (send, asks) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                break;
            }
        }
        std::process::exit(0);
    });
    let mut bench = match device {
        DeviceName::Cpu => Bench::Cpu(Box::new(cpu::Bench::new()?)),
        DeviceName::Cuda(n) => Bench::Cuda(Box::new(cuda::Bench::new(n)?)),
    };
    let mut loaded: Option<Loaded> = None;
    for line in asks {
        let ask = serde_json::from_str(&line).map_err(|e| Failure::Wrong(format!("{line}: {e}")))?;
        match ask {
            Ask::Build { case, mapping } => {
                let start = std::time::Instant::now();
                match build(&mut bench, &mut loaded, device, &case, &mapping) {
                    Ok(()) => answer(&Answer::Built { seconds: start.elapsed().as_secs_f64() }),
                    Err(fault) => fail(fault),
                }
            }
            Ask::Time { budget_ms } => {
                let budget = std::time::Duration::from_millis(budget_ms);
                let done = match (&mut bench, &mut loaded) {
                    (_, None) => Err(Fault::Failed("nothing is compiled".to_owned())),
                    (Bench::Cpu(b), Some(l)) => b.check(l).and_then(|()| b.time(l, budget)),
                    (Bench::Cuda(b), Some(l)) => b.check(l).and_then(|()| b.time(budget)),
                };
                match done {
                    Ok(timing) => answer(&Answer::Timed(timing)),
                    Err(fault) => fail(fault),
                }
            }
        }
    }
    Ok(())
}

fn build(
    bench: &mut Bench,
    loaded: &mut Option<Loaded>,
    device: DeviceName,
    case: &Case,
    text: &str,
) -> Result<(), Fault> {
    if loaded.as_ref().is_none_or(|l| l.case != *case) {
        match bench {
            Bench::Cpu(b) => b.forget(),
            Bench::Cuda(b) => b.forget(),
        }
        let mut fresh = Loaded::new(case, device, bench).map_err(Fault::Failed)?;
        // While others compile, not while one is timed.
        fresh.expected().map_err(Fault::Failed)?;
        if let (Bench::Cpu(b), Some(text)) = (&mut *bench, &case.beside) {
            let refer = std::panic::AssertUnwindSafe(|| b.refer(&fresh, text));
            let done = std::panic::catch_unwind(refer).unwrap_or_else(|_| Err("the compiler failed".to_owned()));
            if let Err(reason) = done {
                tracing::warn!(reason, "nothing is timed beside the mappings");
            }
        }
        *loaded = Some(fresh);
    }
    let Some(loaded) = loaded else { return Err(Fault::Failed("nothing is loaded".to_owned())) };
    let mapping = mapping::parse::parse(text).map_err(|d| Fault::Failed(d.message))?;
    einfall::fits(&mapping, &loaded.plan).map_err(Fault::Failed)?;
    // A fault of the compiler is one candidate's, not the run's.
    let work = std::panic::AssertUnwindSafe(|| match bench {
        Bench::Cpu(b) => b.build(loaded, mapping),
        Bench::Cuda(b) => b.build(loaded, mapping),
    });
    std::panic::catch_unwind(work).unwrap_or_else(|p| {
        let what = p.downcast_ref::<String>().map(String::as_str).or(p.downcast_ref::<&str>().copied());
        Err(Fault::Failed(format!("the compiler failed: {}", what.unwrap_or("it says nothing"))))
    })
}

fn answer(a: &Answer) {
    let mut out = std::io::stdout().lock();
    // A parent that is gone reads nothing; standard input then ends this process.
    let _ = writeln!(out, "{}", serde_json::to_string(a).unwrap_or_default());
    let _ = out.flush();
}

fn fail(fault: Fault) {
    match fault {
        Fault::Failed(e) => answer(&Answer::Failed(e)),
        Fault::Wrong(e) => answer(&Answer::Wrong(e)),
        Fault::Fatal(e) => {
            answer(&Answer::Failed(e));
            std::process::exit(9);
        }
    }
}
