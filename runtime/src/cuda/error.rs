//! What can go wrong between an artifact and a GPU.
//!
//! Invariant: an error names the device, array or kernel it is about and says what to do where something can be done.

use crate::array::ArrayError;

/// An error of the CUDA driver, or of what is asked of it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver library.
    #[error("there is no CUDA driver on this machine (libcuda is not found): install NVIDIA's driver")]
    NoDriver,
    /// The driver is older than the calls made here.
    #[error("the CUDA driver is too old: it supports CUDA {}, and {} is needed; update the driver", version(*found), version(*needed))]
    OldDriver {
        /// What it supports: 1000 × major + 10 × minor.
        found: u32,
        /// What is needed, likewise.
        needed: u32,
    },
    /// No device of this number.
    #[error("there is no CUDA device {index}; this machine has {count}")]
    NoDevice {
        /// The number asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// A call that failed.
    #[error("{what}: {name} ({text})")]
    Call {
        /// What was being done.
        what: String,
        /// The driver's code.
        code: u32,
        /// Its name.
        name: String,
        /// The driver's words.
        text: String,
    },
    /// The code is for another architecture.
    #[error("the code is for {arch}, and {device} is sm_{}{}", capability.0, capability.1)]
    Arch {
        /// The code's.
        arch: String,
        /// The device's name.
        device: String,
        /// Compute capability, major and minor.
        capability: (u32, u32),
    },
    /// The driver's assembler is older than the PTX.
    #[error("the driver is too old for this code: it supports CUDA {}, and the code is PTX {ptx}; update the driver", version(*driver))]
    OldAssembler {
        /// What the driver supports: 1000 × major + 10 × minor.
        driver: u32,
        /// The PTX version.
        ptx: String,
    },
    /// The driver's assembler refuses the code.
    #[error("the driver refuses the code of `{name}`: {error}\n{log}")]
    Assemble {
        /// The artifact.
        name: String,
        /// The driver's error.
        error: String,
        /// The assembler's log.
        log: String,
    },
    /// Device memory is short. What the operation had taken is given back.
    #[error("{bytes} bytes of device memory for {what} cannot be had; {free} of {total} bytes are free")]
    Memory {
        /// What for.
        what: String,
        /// How much.
        bytes: u64,
        /// Free bytes of the device.
        free: u64,
        /// All bytes of the device.
        total: u64,
    },
    /// A kernel failed on the device. Nothing more runs on it in this process.
    #[error("{} failed on the device: {error}; nothing more can run on it in this process", kernels(names))]
    Kernel {
        /// The kernels launched since the last that was known to have ended; the last names come first.
        names: Vec<String>,
        /// The driver's error.
        error: String,
    },
    /// The device is refused, as a kernel failed on it before.
    #[error("the device is not used any more, as {} failed on it before ({error})", kernels(names))]
    Refused {
        /// The kernels of the first failure.
        names: Vec<String>,
        /// The first failure.
        error: String,
    },
    /// An array on another device, or in memory that no kernel of this device may use.
    #[error("`{array}` is {place}, not on CUDA device {device}")]
    Place {
        /// The array.
        array: String,
        /// Where it is, in words.
        place: String,
        /// The engine's device.
        device: usize,
    },
    /// A scalar given as an array.
    #[error("a scalar is given as a device array (at {address:#x}); scalars travel by value")]
    ScalarArray {
        /// Where the array is.
        address: u64,
    },
    /// An array that the copy engine cannot address.
    #[error("`{array}` cannot be moved by the copy engine of `{kernel}`: {reason}")]
    TensorMap {
        /// The array.
        array: String,
        /// The kernel.
        kernel: String,
        /// Which rule of `cuTensorMapEncodeTiled` it breaks.
        reason: String,
    },
    /// A kernel that cannot be launched at these sizes or on this device.
    #[error("`{kernel}` cannot be launched: {reason}")]
    Launch {
        /// The kernel.
        kernel: String,
        /// Why.
        reason: String,
    },
    /// An extent that does not fit 31 bits.
    #[error("{what} has extent {extent}; on a GPU extents are below 2147483648")]
    Extent {
        /// The rank or dimension.
        what: String,
        /// Its extent.
        extent: u64,
    },
    /// An array that cannot be made.
    #[error(transparent)]
    Array(#[from] ArrayError),
}

/// `12080` as `12.8`.
fn version(v: u32) -> String {
    format!("{}.{}", v / 1000, v % 1000 / 10)
}

fn kernels(names: &[String]) -> String {
    match names {
        [] => "an operation".to_owned(),
        [one] => format!("kernel `{one}`"),
        many => format!("one of the kernels {}", many.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_happened_and_what_to_do() {
        let old = CudaError::OldAssembler { driver: 12020, ptx: "8.6".into() };
        assert!(old.to_string().contains("CUDA 12.2, and the code is PTX 8.6"), "{old}");
        let error = "CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)".to_owned();
        let one = CudaError::Kernel { names: vec!["k".into()], error: error.clone() };
        assert!(one.to_string().starts_with("kernel `k` failed on the device: CUDA_ERROR_ILLEGAL_ADDRESS"), "{one}");
        let two = CudaError::Refused { names: vec!["k".into(), "l".into()], error };
        assert!(two.to_string().contains("as one of the kernels `k`, `l` failed"), "{two}");
        assert!(!CudaError::NoDriver.to_string().contains('\n'));
    }
}
