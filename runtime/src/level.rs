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
    /// Any 64-bit Arm processor.
    Aarch64,
}

impl Level {
    /// Every level, the most capable of an architecture first.
    pub const ALL: [Level; 3] = [Level::X86_64V4, Level::X86_64V3, Level::Aarch64];

    /// Its name: a processor in LLVM's words, or the architecture.
    pub fn name(self) -> &'static str {
        match self {
            Level::X86_64V3 => "x86-64-v3",
            Level::X86_64V4 => "x86-64-v4",
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
            Level::X86_64V3 | Level::X86_64V4 => "x86_64",
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
            match self {
                Level::X86_64V3 => v3,
                Level::X86_64V4 => v3 && all!("avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl"),
                Level::Aarch64 => false,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self.arch() == std::env::consts::ARCH
        }
    }
}
