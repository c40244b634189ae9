//! Classes of processors that code is made for ahead of time.
//!
//! Source: the levels of the x86-64 psABI, as LLVM and rustc name them.

/// A class of processors that code is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// x86-64 with AVX2 and FMA: `x86-64-v3` of the System V psABI.
    X86_64V3,
    /// x86-64 with AVX-512 (F, BW, CD, DQ, VL): `x86-64-v4`.
    X86_64V4,
    /// `x86-64-v4` with dot products of pairs of bf16 (AVX512-BF16) at the rate of multiply-adds: AMD's since Zen 4.
    X86_64V4Bf16,
    /// `x86-64-v4` with products of bf16 tiles (AMX-TILE, AMX-BF16), which the operating system must let a process use.
    X86_64V4Amx,
    /// Any 64-bit Arm processor.
    Aarch64,
}

impl Level {
    /// Every level, the most capable of an architecture first.
    pub const ALL: [Level; 5] =
        [Level::X86_64V4Amx, Level::X86_64V4Bf16, Level::X86_64V4, Level::X86_64V3, Level::Aarch64];

    /// Its name: a processor in LLVM's words with what it has besides, or the architecture.
    pub fn name(self) -> &'static str {
        match self {
            Level::X86_64V3 => "x86-64-v3",
            Level::X86_64V4 => "x86-64-v4",
            Level::X86_64V4Bf16 => "x86-64-v4-bf16",
            Level::X86_64V4Amx => "x86-64-v4-amx",
            Level::Aarch64 => "aarch64",
        }
    }

    /// The level of this name.
    pub fn from_name(name: &str) -> Option<Level> {
        Level::ALL.into_iter().find(|l| l.name() == name)
    }

    /// The architecture, as `CARGO_CFG_TARGET_ARCH` names it.
    pub fn arch(self) -> &'static str {
        match self {
            Level::X86_64V3 | Level::X86_64V4 | Level::X86_64V4Bf16 | Level::X86_64V4Amx => "x86_64",
            Level::Aarch64 => "aarch64",
        }
    }

    /// Whether this machine's processor is of the level.
    pub fn detected(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! all {
                ($($name:tt)*) => { $(std::arch::is_x86_feature_detected!($name))&&* };
            }
            let v3 = all!("avx" "avx2" "bmi1" "bmi2" "f16c" "fma" "lzcnt" "movbe");
            let v4 = v3 && all!("avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl");
            match self {
                Level::X86_64V3 => v3,
                Level::X86_64V4 => v4,
                // Intel's processors take four times a multiply-add's time for it (docs/tuning-log.md); SSE4a is AMD's.
                Level::X86_64V4Bf16 => v4 && all!("avx512bf16" "sse4a"),
                Level::X86_64V4Amx => v4 && tiles_permitted(),
                Level::Aarch64 => false,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self.arch() == std::env::consts::ARCH
        }
    }
}

/// Whether the processor multiplies tiles of bf16 (AMX) and this process may: Linux keeps tile registers only for processes
/// that ask, which the first call does.
///
/// Source: Linux, Documentation/arch/x86/xstate.rst (`ARCH_REQ_XCOMP_PERM`); Intel 64 and IA-32 Architectures Software
/// Developer's Manual, volume 2, CPUID leaf 7, and volume 1, chapter 18.
pub fn tiles_permitted() -> bool {
    static PERMITTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *PERMITTED.get_or_init(request_tiles)
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn request_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XTILEDATA: libc::c_ulong = 18;
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has CPUID.
    let has = unsafe {
        let (tile, bf16) = (1 << 24, 1 << 22);
        __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (tile | bf16) == tile | bf16
    };
    // SAFETY: the call reads two numbers and writes no memory; a kernel that does not know it answers with an error.
    has && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn request_tiles() -> bool {
    false
}
