//! Devices that are tuned for, by the names of the command line, and lengths of time.
//!
//! Invariant: a name that parses prints as it was written, `cuda` as `cuda:0`.

use std::time::Duration;

use einfall::Options;
use einfall_autotune::table::Kind;
use einfall_ir::cascade::Cascade;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;

use super::super::Failure;

/// A device that is tuned for: `cpu`, `cuda`, `cuda:1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// This machine's processor.
    Cpu,
    /// An NVIDIA GPU by number.
    Cuda(usize),
}

impl std::str::FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceName, String> {
        let number = |n: &str| n.parse().map(DeviceName::Cuda).ok();
        match (text, text.strip_prefix("cuda:").and_then(number)) {
            ("cpu", _) => Ok(DeviceName::Cpu),
            ("cuda", _) => Ok(DeviceName::Cuda(0)),
            (_, Some(name)) => Ok(name),
            _ => Err(format!("`{text}` is no device here; name cpu, cuda or cuda:N")),
        }
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceName::Cpu => f.write_str("cpu"),
            DeviceName::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl DeviceName {
    /// What tables call it.
    pub fn kind(self) -> Kind {
        match self {
            DeviceName::Cpu => Kind::Cpu,
            DeviceName::Cuda(_) => Kind::Cuda,
        }
    }

    /// The plan of a cascade for it.
    pub fn plan(self, c: &Cascade) -> Result<Plan, einfall::Error> {
        match self {
            DeviceName::Cpu => einfall::plan(c),
            DeviceName::Cuda(_) => einfall::cuda::plan(c),
        }
    }

    /// What records say of it. Opens it, so that what it lacks is said once.
    pub fn open(self) -> Result<Device, Failure> {
        let options = Options::from_env().map_err(Failure::usage)?;
        match self {
            DeviceName::Cpu => {
                let engine = einfall::Engine::new(&options).map_err(Failure::machine)?;
                let (major, minor, patch) = engine.runtime().llvm().version();
                let name = einfall_runtime::Cpu::detect().name;
                let driver = format!("LLVM {major}.{minor}.{patch}");
                // Floors are times that nothing beats only by rates that this processor reaches.
                let sheet = engine.runtime().measure().map_err(Failure::machine)?;
                Ok(Device { name, driver, sheet })
            }
            DeviceName::Cuda(n) => {
                let engine = einfall::cuda::Engine::new(&options, n).map_err(Failure::machine)?;
                let gpu = engine.runtime().gpu();
                let driver = format!("CUDA {}.{}", gpu.driver / 1000, gpu.driver % 1000 / 10);
                Ok(Device { name: gpu.name.clone(), driver, sheet: engine.data_sheet().clone() })
            }
        }
    }
}

/// A device as records name it.
pub struct Device {
    /// Its own name.
    pub name: String,
    /// Its driver, or what compiles for it.
    pub driver: String,
    /// Its data sheet.
    pub sheet: DataSheet,
}

/// A length of time: `10s`, `500ms`, `2m`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span(pub Duration);

impl std::str::FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Span, String> {
        let wrong = || format!("`{text}` is no length of time: 500ms, 10s or 2m");
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let number: f64 = text[..digits].parse().map_err(|_| wrong())?;
        let unit = match &text[digits..] {
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            _ => return Err(wrong()),
        };
        Duration::try_from_secs_f64(number * unit).map(Span).map_err(|_| wrong())
    }
}
