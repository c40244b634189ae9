//! The GPUs of this machine, as their driver describes them.
//!
//! Invariant: listing devices runs nothing on them and opens none.

use super::driver::{call, version};
use super::error::CudaError;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

/// An NVIDIA GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// Its number.
    pub index: usize,
    /// The vendor's name of the model.
    pub name: String,
    /// Compute capability, major and minor: 9.0 is Hopper.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Device memory.
    pub memory_bytes: u64,
    /// Second-level cache.
    pub l2_bytes: u64,
    /// Shared memory a task may have, at most.
    pub shared_bytes: u64,
    /// Registers of 32 bits per multiprocessor.
    pub registers: u32,
    /// Highest clock of the multiprocessors, in kHz.
    pub clock_khz: u32,
    /// Highest clock of the memory, in kHz.
    pub memory_clock_khz: u32,
    /// Width of the memory bus in bits.
    pub bus_bits: u32,
    /// PCI domain, bus and device, by which the management library knows it.
    pub pci: (u32, u32, u32),
    /// The CUDA version its driver supports, as 1000 × major + 10 × minor.
    pub driver: u32,
}

impl Gpu {
    /// Bytes per second that its memory's clock and bus allow: two transfers a clock.
    pub fn bandwidth(&self) -> f64 {
        2.0 * f64::from(self.memory_clock_khz) * 1e3 * f64::from(self.bus_bits) / 8.0
    }

    /// The architectures whose code it runs best, best first: `sm_90a`, `sm_90`; then `sm_80`.
    pub fn runs(&self, arch: &str) -> bool {
        let Some(digits) = arch.strip_prefix("sm_") else { return false };
        let exact = digits.ends_with('a');
        let Ok(number) = digits.trim_end_matches('a').parse::<u32>() else { return false };
        let own = 10 * self.capability.0 + self.capability.1;
        if exact { own == number } else { own >= number }
    }

    /// Whether it runs machine code of an architecture, which unlike PTX serves no later major version.
    pub fn runs_code(&self, arch: &str) -> bool {
        let number = arch.strip_prefix("sm_").and_then(|n| n.trim_end_matches('a').parse::<u32>().ok());
        self.runs(arch) && number.is_some_and(|n| n / 10 == self.capability.0)
    }
}

/// Every GPU of this machine.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::OldDriver`], [`CudaError::Call`].
pub fn gpus() -> Result<Vec<Gpu>, CudaError> {
    let driver = version()?;
    let mut count = 0;
    // SAFETY: the driver is initialised.
    call(unsafe { sys::cuDeviceGetCount(&mut count) }, || "counting devices".into())?;
    (0..count).map(|i| describe(i, driver)).collect()
}

fn describe(index: i32, driver: u32) -> Result<Gpu, CudaError> {
    let what = || format!("describing CUDA device {index}");
    let mut handle = 0;
    // SAFETY: the driver is initialised and has this many devices.
    call(unsafe { sys::cuDeviceGet(&mut handle, index) }, what)?;
    let attribute = |a: Attribute| {
        let mut value = 0;
        // SAFETY: as above.
        call(unsafe { sys::cuDeviceGetAttribute(&mut value, a, handle) }, what)?;
        Ok::<u32, CudaError>(value.max(0) as u32)
    };
    let mut name = [0u8; 256];
    let mut memory = 0;
    // SAFETY: the buffer is of the length said; the driver ends the text with a zero byte.
    unsafe {
        call(sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, handle), what)?;
        call(sys::cuDeviceTotalMem_v2(&mut memory, handle), what)?;
    }
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    use Attribute::*;
    Ok(Gpu {
        index: index as usize,
        name: String::from_utf8_lossy(&name[..end]).into_owned(),
        capability: (
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        sms: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory_bytes: memory as u64,
        l2_bytes: u64::from(attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
        shared_bytes: u64::from(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?),
        registers: attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR)?,
        // Newer drivers may have dropped these two.
        clock_khz: attribute(CU_DEVICE_ATTRIBUTE_CLOCK_RATE).unwrap_or(0),
        memory_clock_khz: attribute(CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).unwrap_or(0),
        bus_bits: attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?,
        pci: (
            attribute(CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            attribute(CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            attribute(CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
        ),
        driver,
    })
}

/// Clocks of the moment, in MHz.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// Of the multiprocessors.
    pub sm_mhz: u32,
    /// Of the memory.
    pub memory_mhz: u32,
}

impl Gpu {
    /// The clocks it runs at now; none where the management library is not there or does not say. Source: NVML API.
    pub fn clocks(&self) -> Option<Clocks> {
        use std::ffi::{CString, c_char, c_int, c_uint, c_void};
        type Init = unsafe extern "C" fn() -> c_int;
        type Find = unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> c_int;
        type Clock = unsafe extern "C" fn(*mut c_void, c_uint, *mut c_uint) -> c_int;
        let (domain, bus, device) = self.pci;
        let id = CString::new(format!("{domain:08x}:{bus:02x}:{device:02x}.0")).ok()?;
        // SAFETY: the library is NVIDIA's by its name; the signatures are those of nvml.h; 1 and 2 name the clocks.
        unsafe {
            let library = libloading::Library::new("libnvidia-ml.so.1").ok()?;
            let init = library.get::<Init>(b"nvmlInit_v2\0").ok()?;
            let find = library.get::<Find>(b"nvmlDeviceGetHandleByPciBusId_v2\0").ok()?;
            let clock = library.get::<Clock>(b"nvmlDeviceGetClockInfo\0").ok()?;
            let shutdown = library.get::<Init>(b"nvmlShutdown\0").ok()?;
            if init() != 0 {
                return None;
            }
            let (mut handle, mut sm_mhz, mut memory_mhz) = (std::ptr::null_mut(), 0, 0);
            let found = find(id.as_ptr(), &mut handle) == 0
                && clock(handle, 1, &mut sm_mhz) == 0
                && clock(handle, 2, &mut memory_mhz) == 0;
            shutdown();
            found.then_some(Clocks { sm_mhz, memory_mhz })
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::cuda) fn h200() -> Gpu {
        Gpu {
            index: 0,
            name: "NVIDIA H200".into(),
            capability: (9, 0),
            sms: 132,
            memory_bytes: 139 << 30,
            l2_bytes: 60 << 20,
            shared_bytes: 232_448,
            registers: 65_536,
            clock_khz: 1_980_000,
            memory_clock_khz: 3_201_000,
            bus_bits: 6144,
            pci: (0, 1, 0),
            driver: 13000,
        }
    }

    #[test]
    fn architectures_are_matched() {
        let gpu = h200();
        assert!(["sm_90a", "sm_90", "sm_80"].iter().all(|a| gpu.runs(a)));
        assert!(!["sm_80a", "sm_100", "sm_100a", "sm_x", "cpu"].iter().any(|a| gpu.runs(a)));
        assert!(["sm_90a", "sm_90"].iter().all(|a| gpu.runs_code(a)));
        assert!(!["sm_80", "sm_86", "sm_100", "sm_x"].iter().any(|a| gpu.runs_code(a)));
        assert!((gpu.bandwidth() / 4.917e12 - 1.0).abs() < 1e-3);
    }

    #[test]
    fn a_machine_without_a_driver_says_so_in_a_sentence() {
        match gpus() {
            Ok(list) => assert!(list.iter().all(|g| g.sms > 0)),
            Err(e) => assert!(!e.to_string().contains('\n'), "{e}"),
        }
    }
}
