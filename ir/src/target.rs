//! Data sheets: what a device has, as numbers a cost or bound can be computed from.
//!
//! A sheet is a TOML file of `ir/data`, with its sources in comments; [`DataSheet::parse`] reads others. Invariant:
//! levels are listed from the slowest (device memory) to the fastest (registers); a sheet describes one device and is
//! data, never code.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

/// One memory level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryLevel {
    /// `dram`, `l2`, `shared`, `l1`, `registers`.
    pub name: String,
    /// Capacity of one instance, in bytes.
    pub bytes: u64,
    /// How many instances work side by side (1 for device memory, one per core for an L1).
    pub instances: u64,
    /// Bytes per second one instance delivers to the level below it.
    pub bandwidth: f64,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSheet {
    /// The name `--target` takes.
    pub name: String,
    /// Families of a processor's contraction instructions, the first of which is taken: `amx`, `dot16`
    /// ([`crate::kernel::atoms::of_processor`]).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub atoms: Vec<String>,
    /// Pages that a processor core's prefetchers follow at a time: with more of them open, what comes from beyond the
    /// second-level cache takes twice the time. None where no bound is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub followed_pages: Option<u64>,
    /// Peak rate of contractions by operand type, in operations (two per multiply-add) per second.
    #[serde(with = "rates")]
    pub peak: Vec<(String, f64)>,
    /// Memory levels, slowest first.
    pub levels: Vec<MemoryLevel>,
    /// What only GPUs have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
    /// What only adapters of WebGPU have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webgpu: Option<WebGpu>,
}

/// What an adapter of WebGPU allows beside what [`Gpu`] says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebGpu {
    /// Invocations with consecutive numbers, from multiples of this on, that are in one subgroup; 1: none are known to be.
    pub subgroup: u64,
    /// Whether the built-in `exp2` keeps 2 ulps.
    pub exact_exp2: bool,
    /// Whether the built-in `unpack2x16float` keeps subnormal numbers, infinities and NaN, and `pack2x16float` gives them and
    /// rounds to nearest, ties to even.
    #[serde(default)]
    pub exact_halves: bool,
    /// Storage buffers of a kernel.
    pub storage_buffers: u64,
    /// Bytes of one binding.
    pub binding_bytes: u64,
    /// Products of cooperative matrices by subgroups of 32, names of atoms ([`crate::kernel::atoms::cooperative_products`]).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub matrices: Vec<String>,
}

/// What a GPU allows a task and a multiprocessor, and how fast it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Compute capability, ten times the major number plus the minor one.
    pub capability: u32,
    /// How many multiprocessors.
    pub multiprocessors: u64,
    /// Clock of tensor operations, in Hz.
    pub clock: f64,
    /// Shared memory one task may have, in bytes.
    pub shared_per_task: u64,
    /// Shared memory of a multiprocessor, in bytes; each task takes [`TASK_SHARED_BYTES`] beside its own.
    pub shared_per_multiprocessor: u64,
    /// Registers of a multiprocessor (32 bits each).
    pub registers: u64,
    /// Registers one thread may have.
    pub thread_registers: u64,
    /// Threads one task may have.
    pub threads_per_task: u64,
    /// Threads of a multiprocessor.
    pub threads_per_multiprocessor: u64,
    /// Named barriers of a task, its own one apart.
    pub named_barriers: u64,
    /// Tasks of a cluster; 1: no clusters.
    pub max_cluster: u64,
    /// Families of contraction instructions: `wgmma`, `mma`.
    pub atoms: Vec<String>,
    /// What copies between device and shared memory without registers: `tma`, `cp_async`.
    pub copy_engines: Vec<String>,
    /// Exponentials and their like per clock and multiprocessor.
    pub special_per_clock: u64,
    /// f32 multiply-adds per clock and multiprocessor.
    pub fma_per_clock: u64,
    /// Clocks until a load from device memory arrives.
    pub memory_latency: u64,
    /// Clocks of one barrier between units of a task.
    pub barrier_latency: u64,
}

/// Shared memory that the system takes per task (CUDA C++ Programming Guide, compute capability 8.0 and later).
pub const TASK_SHARED_BYTES: u64 = 1024;

/// The built-in sheets: every file of `data` by its name, which the build script lists.
const SHEETS: &[(&str, &str)] = &include!(concat!(env!("OUT_DIR"), "/sheets.rs"));

/// Rates as a table in text, in order of names.
mod rates {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::collections::BTreeMap;

    pub fn serialize<S: Serializer>(rates: &[(String, f64)], s: S) -> Result<S::Ok, S::Error> {
        rates.iter().map(|(n, r)| (n.as_str(), *r)).collect::<BTreeMap<_, _>>().serialize(s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<(String, f64)>, D::Error> {
        Ok(BTreeMap::<String, f64>::deserialize(d)?.into_iter().collect())
    }
}

impl DataSheet {
    /// Reads the text of a sheet.
    ///
    /// ```
    /// use einfall_ir::target::DataSheet;
    ///
    /// let text = r#"
    /// name = "board"
    /// peak = { f32 = 16e9 }
    /// levels = [
    ///     { name = "dram", bytes = 4_000_000_000, instances = 1, bandwidth = 8e9 },
    ///     { name = "l1", bytes = 32_768, instances = 4, bandwidth = 40e9 },
    /// ]
    /// "#;
    /// assert_eq!(DataSheet::parse(text)?.level("l1").map(|l| l.instances), Some(4));
    /// # Ok::<(), String>(())
    /// ```
    ///
    /// # Errors
    /// Says what is missing, unknown or out of order.
    pub fn parse(text: &str) -> Result<DataSheet, String> {
        let sheet: DataSheet = toml::from_str(text).map_err(|e| e.to_string())?;
        if sheet.levels.first().is_none_or(|l| l.name != "dram") {
            return Err(format!("sheet {}: the first level is device memory, `dram`", sheet.name));
        }
        let rate = |l: &MemoryLevel| l.bandwidth * l.instances as f64;
        if let Some(w) = sheet.levels.windows(2).find(|w| rate(&w[0]) >= rate(&w[1])) {
            return Err(format!("sheet {}: level {} is no faster than {}", sheet.name, w[1].name, w[0].name));
        }
        Ok(sheet)
    }

    /// Every sheet that is built in.
    pub fn all() -> Vec<DataSheet> {
        SHEETS.iter().map(|(_, t)| DataSheet::parse(t).expect("built-in sheets are tested")).collect()
    }

    /// The sheet of this name.
    pub fn named(name: &str) -> Option<DataSheet> {
        DataSheet::all().into_iter().find(|s| s.name == name)
    }

    /// Sheets that code names have a test each.
    fn built_in(name: &str) -> DataSheet {
        let found = SHEETS.iter().find(|s| s.0 == name);
        found.and_then(|(_, t)| DataSheet::parse(t).ok()).expect("built-in sheets are tested")
    }

    /// NVIDIA H100 SXM5 80 GB.
    pub fn h100() -> DataSheet {
        DataSheet::built_in("h100")
    }

    /// NVIDIA A100 SXM4 80 GB.
    pub fn a100() -> DataSheet {
        DataSheet::built_in("a100")
    }

    /// A generic server core with AVX-512; a runtime replaces its numbers by what it finds.
    pub fn cpu() -> DataSheet {
        DataSheet::built_in("cpu")
    }

    /// The level of this name.
    pub fn level(&self, name: &str) -> Option<&MemoryLevel> {
        self.levels.iter().find(|l| l.name == name)
    }

    /// Peak operations per second for operands of `dtype`, if the sheet has it.
    pub fn peak_of(&self, dtype: DType) -> Option<f64> {
        self.peak.iter().find(|(n, _)| n == dtype.name()).map(|p| p.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sheets_are_ordered_and_named() {
        for s in DataSheet::all() {
            assert_eq!(DataSheet::named(&s.name), Some(s.clone()));
            assert!(s.levels.len() >= 3);
            assert_eq!(s.levels[0].name, "dram");
            let rate = |l: &MemoryLevel| l.bandwidth * l.instances as f64;
            assert!(s.levels.windows(2).all(|w| rate(&w[0]) < rate(&w[1])), "{}", s.name);
            assert_eq!(DataSheet::parse(&toml::to_string(&s).unwrap()), Ok(s.clone()));
            let known = |name: &String| crate::kernel::atoms::cooperative_products().any(|a| a.name.0 == *name);
            assert!(s.webgpu.iter().flat_map(|w| &w.matrices).all(known), "{}", s.name);
            let Some(gpu) = &s.gpu else { continue };
            assert!(gpu.shared_per_task + TASK_SHARED_BYTES <= gpu.shared_per_multiprocessor, "{}", s.name);
            assert_eq!(
                s.level("shared").map(|l| (l.bytes, l.instances)),
                Some((gpu.shared_per_task, gpu.multiprocessors))
            );
        }
    }

    #[test]
    fn every_file_is_a_sheet_of_its_name() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/data");
        let mut files: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        let listed: Vec<String> = SHEETS.iter().map(|(name, _)| format!("{name}.toml")).collect();
        assert_eq!(files, listed);
        for (name, text) in SHEETS {
            assert_eq!(DataSheet::parse(text).map(|s| s.name), Ok(name.to_string()));
        }
        for (sheet, name) in [(DataSheet::h100(), "h100"), (DataSheet::a100(), "a100"), (DataSheet::cpu(), "cpu")] {
            assert_eq!(sheet.name, name);
        }
    }

    #[test]
    fn damaged_sheets_say_what_is_wrong() {
        for (from, to, says) in [
            ("clock = 1.83e9\n", "", "missing field `clock`"),
            ("name = \"dram\"", "name = \"hbm\"", "the first level is device memory"),
            ("3.35e12", "99.5e12", "level l2 is no faster than dram"),
            ("max_cluster", "cluster", "unknown field `cluster`"),
        ] {
            let (_, text) = SHEETS.iter().find(|s| s.0 == "h100").expect("a sheet");
            assert!(text.contains(from), "{from}");
            let e = DataSheet::parse(&text.replacen(from, to, 1)).expect_err(from);
            assert!(e.contains(says), "{e}");
        }
    }
}
