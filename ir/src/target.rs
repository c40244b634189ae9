//! Data sheets: what a device has, as numbers a cost or bound can be computed from.
//!
//! Invariant: levels are listed from the slowest (device memory) to the fastest (registers); a sheet
//! describes one device and is data, never code. Sources: NVIDIA H100 and A100 data sheets and CUDA C Programming
//! Guide (compute capability tables); for CPUs the vendor's cache sizes.

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
pub struct DataSheet {
    /// The name `--target` takes.
    pub name: String,
    /// Memory levels, slowest first.
    pub levels: Vec<MemoryLevel>,
    /// Peak rate of contractions by operand type, in operations (two per multiply-add) per second.
    pub peak: Vec<(String, f64)>,
}

impl DataSheet {
    /// Every sheet that is built in.
    pub fn all() -> Vec<DataSheet> {
        vec![DataSheet::h100(), DataSheet::a100(), DataSheet::cpu()]
    }

    /// The sheet of this name.
    pub fn named(name: &str) -> Option<DataSheet> {
        DataSheet::all().into_iter().find(|s| s.name == name)
    }

    /// NVIDIA H100 SXM5 80 GB.
    pub fn h100() -> DataSheet {
        let l =
            |name: &str, bytes, instances, bandwidth| MemoryLevel { name: name.into(), bytes, instances, bandwidth };
        DataSheet {
            name: "h100".into(),
            levels: vec![
                l("dram", 80_000_000_000, 1, 3.35e12),
                l("l2", 50 << 20, 1, 5.5e12),
                l("shared", 227 << 10, 132, 2.3e11),
                l("registers", 256 << 10, 132, 1.0e13),
            ],
            peak: vec![
                ("bf16".into(), 989e12),
                ("f16".into(), 989e12),
                ("f8e4m3".into(), 1979e12),
                ("f32".into(), 67e12),
            ],
        }
    }

    /// NVIDIA A100 SXM4 80 GB.
    pub fn a100() -> DataSheet {
        let l =
            |name: &str, bytes, instances, bandwidth| MemoryLevel { name: name.into(), bytes, instances, bandwidth };
        DataSheet {
            name: "a100".into(),
            levels: vec![
                l("dram", 80_000_000_000, 1, 2.04e12),
                l("l2", 40 << 20, 1, 4.0e12),
                l("shared", 163 << 10, 108, 1.8e11),
                l("registers", 256 << 10, 108, 8.0e12),
            ],
            peak: vec![("bf16".into(), 312e12), ("f16".into(), 312e12), ("f32".into(), 19.5e12)],
        }
    }

    /// A generic server core with AVX-512; a runtime replaces its numbers by what it finds.
    pub fn cpu() -> DataSheet {
        let l =
            |name: &str, bytes, instances, bandwidth| MemoryLevel { name: name.into(), bytes, instances, bandwidth };
        DataSheet {
            name: "cpu".into(),
            levels: vec![
                l("dram", 16_000_000_000, 1, 40e9),
                l("l3", 32 << 20, 1, 100e9),
                l("l2", 1 << 20, 1, 200e9),
                l("l1", 32 << 10, 1, 400e9),
                l("registers", 2 << 10, 1, 1e12),
            ],
            peak: vec![("f32".into(), 200e9)],
        }
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
        }
    }
}
