//! The devices of this machine, as they describe themselves.
//!
//! Invariant: nothing is assumed; what the system does not say is `None` or absent.

use einfall_ir::dtype::DType;
use einfall_ir::target::{DataSheet, MemoryLevel};
use std::fmt;

/// A device kernels run on.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Device {
    /// This machine's processor.
    Cpu(Cpu),
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::Gpu),
}

impl Device {
    /// Every device found.
    pub fn all() -> Vec<Device> {
        #[allow(unused_mut)]
        let mut list = vec![Device::Cpu(Cpu::detect())];
        #[cfg(feature = "cuda")]
        list.extend(crate::cuda::gpus().unwrap_or_default().into_iter().map(Device::Cuda));
        list
    }

    /// The name it is asked for by: `cpu`, `cuda`.
    pub fn kind(&self) -> &'static str {
        match self {
            Device::Cpu(_) => "cpu",
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => "cuda",
        }
    }
}

/// A processor: what decides the code for it and the tiles.
#[derive(Clone, Debug, PartialEq)]
pub struct Cpu {
    /// Vendor's name of the model, as far as known.
    pub name: String,
    /// Architecture: `x86_64`, `aarch64`, …
    pub arch: &'static str,
    /// Instruction sets of interest that it has.
    pub isa: Vec<Isa>,
    /// Threads this process may run at once.
    pub threads: usize,
    /// Data and unified caches, nearest first.
    pub caches: Vec<CacheLevel>,
}

/// A data or unified cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLevel {
    /// 1 is nearest.
    pub level: u8,
    /// Capacity.
    pub bytes: u64,
    /// Line size.
    pub line_bytes: u32,
    /// Hardware threads that share it.
    pub shared_by: u32,
}

macro_rules! isa {
    ($($(#[$meta:meta])* $variant:ident $name:literal,)*) => {
        /// An instruction-set extension that code generation asks about.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Isa { $($(#[$meta])* $variant,)* }

        impl Isa {
            /// Its feature name in LLVM's spelling.
            pub fn name(self) -> &'static str {
                match self { $(Isa::$variant => $name,)* }
            }
        }
    };
}
isa! {
    /// 256-bit integer and float vectors.
    Avx2 "avx2",
    /// Fused multiply-add on 128 and 256 bits.
    Fma "fma",
    /// f16 conversions.
    F16c "f16c",
    /// 512-bit vectors.
    Avx512F "avx512f",
    /// 512-bit vectors of bytes and words.
    Avx512Bw "avx512bw",
    /// AVX-512 on narrower vectors.
    Avx512Vl "avx512vl",
    /// 512-bit vectors of doublewords: more operations.
    Avx512Dq "avx512dq",
    /// 8-bit dot products.
    Avx512Vnni "avx512vnni",
    /// bf16 dot products and conversions.
    Avx512Bf16 "avx512bf16",
    /// AMD's insertions and extractions of bits, by which its processors are known.
    Sse4a "sse4a",
    /// f16 arithmetic.
    Avx512Fp16 "avx512fp16",
    /// Tile registers.
    AmxTile "amx-tile",
    /// bf16 tile products.
    AmxBf16 "amx-bf16",
    /// 8-bit tile products.
    AmxInt8 "amx-int8",
    /// 128-bit vectors of Arm.
    Neon "neon",
    /// f16 arithmetic of Arm.
    FullFp16 "fullfp16",
    /// bf16 of Arm.
    Bf16 "bf16",
    /// 8-bit dot products of Arm.
    DotProd "dotprod",
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Cpu {
    /// Asks the processor and the system.
    pub fn detect() -> Cpu {
        Cpu {
            name: model_name(),
            arch: std::env::consts::ARCH,
            isa: detect_isa(),
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            caches: detect_caches(),
        }
    }

    /// Whether it has an extension.
    pub fn has(&self, isa: Isa) -> bool {
        self.isa.contains(&isa)
    }

    /// Bits of its widest vector register that arithmetic uses.
    pub fn vector_bits(&self) -> u32 {
        if self.has(Isa::Avx512F) {
            512
        } else if self.has(Isa::Avx2) {
            256
        } else {
            128
        }
    }

    /// Its data sheet: capacities as found, rates of its class of processors. `Engine::measure` measures the rates.
    pub fn data_sheet(&self) -> DataSheet {
        let class = match (self.arch, self.vector_bits()) {
            ("aarch64", _) => "aarch64",
            (_, 512) => "x86-64-v4",
            (_, 256) => "x86-64-v3",
            _ => "cpu",
        };
        let generic = DataSheet { name: "cpu".into(), ..DataSheet::named(class).unwrap_or_else(DataSheet::cpu) };
        let rate = |name: &str| generic.levels.iter().find(|l| l.name == name).map_or(1e11, |l| l.bandwidth);
        let threads = self.threads as u64;
        let level = |name: String, bytes, instances| {
            let bandwidth = rate(&name);
            MemoryLevel { name, bytes, instances, bandwidth }
        };
        let mut levels = vec![level("dram".into(), memory_bytes().unwrap_or(generic.levels[0].bytes), 1)];
        for cache in self.caches.iter().rev() {
            let instances = threads.div_ceil(u64::from(cache.shared_by)).max(1);
            levels.push(level(format!("l{}", cache.level), cache.bytes, instances));
        }
        let registers = if self.has(Isa::Avx512F) || self.arch == "aarch64" { 32 } else { 16 };
        levels.push(level("registers".into(), registers * u64::from(self.vector_bits()) / 8, threads));
        let peak = generic.peak.iter().map(|(name, one)| (name.clone(), one * threads as f64)).collect();
        // The sheets' are of Intel's cores.
        let followed_pages = generic.followed_pages.filter(|_| !self.has(Isa::Sse4a));
        let mut sheet = DataSheet { levels, peak, followed_pages, ..generic };
        self.add_products(&mut sheet);
        sheet
    }

    /// Whether it multiplies tiles of bf16 and this process may.
    pub fn multiplies_tiles(&self) -> bool {
        self.has(Isa::AmxTile) && self.has(Isa::AmxBf16) && crate::tiles_permitted()
    }

    /// Whether dot products of pairs of bf16 take no longer than multiply-adds of vectors: they do on Intel's processors,
    /// four times as long (docs/tuning-log.md), and not on AMD's.
    pub fn multiplies_pairs(&self) -> bool {
        self.has(Isa::Avx512Bf16) && self.has(Isa::Sse4a)
    }

    /// The instruction for products of bf16 and its rate beside that of multiply-adds of vectors: 16 times as many products of
    /// tiles, where the process may use them (Intel 64 and IA-32 Architectures Optimization Reference Manual, "Intel AMX"),
    /// twice as many of pairs.
    pub(crate) fn add_products(&self, sheet: &mut DataSheet) {
        let found = match () {
            () if self.multiplies_tiles() => Some(("amx", 16.0)),
            () if self.multiplies_pairs() => Some(("dot16", 2.0)),
            () => None,
        };
        if let (Some((family, times)), Some(f32)) = (found, sheet.peak_of(DType::F32)) {
            sheet.atoms = vec![family.into()];
            sheet.peak.push(("bf16".into(), times * f32));
        }
    }

    /// Capacity of a cache level, 0 where it has none.
    pub fn cache_bytes(&self, level: u8) -> u64 {
        self.caches.iter().find(|c| c.level == level).map_or(0, |c| c.bytes)
    }
}

/// `(extension, the standard library's feature name)` pairs that the processor has. AMX is asked of CPUID, as the
/// standard library does not detect it on stable.
fn detect_isa() -> Vec<Isa> {
    let mut isa = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! have {
            ($($variant:ident $feature:tt),* $(,)?) => { $(
                if std::is_x86_feature_detected!($feature) { isa.push(Isa::$variant); }
            )* };
        }
        have! {
            Avx2 "avx2", Fma "fma", F16c "f16c", Avx512F "avx512f", Avx512Bw "avx512bw", Avx512Vl "avx512vl",
            Avx512Dq "avx512dq", Avx512Vnni "avx512vnni", Avx512Bf16 "avx512bf16", Avx512Fp16 "avx512fp16",
            Sse4a "sse4a",
        }
        #[allow(unused_unsafe)]
        // SAFETY: every x86-64 processor has CPUID and XGETBV is read only where OSXSAVE says so (AVX2 implies it).
        unsafe {
            use std::arch::x86_64::{__cpuid, __cpuid_count};
            if __cpuid(0).eax >= 7 && isa.contains(&Isa::Avx512F) {
                let edx = __cpuid_count(7, 0).edx;
                let bits = [(24, Isa::AmxTile), (22, Isa::AmxBf16), (25, Isa::AmxInt8)];
                isa.extend(bits.into_iter().filter(|(bit, _)| edx >> bit & 1 == 1).map(|(_, isa)| isa));
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        use std::arch::is_aarch64_feature_detected as detected;
        let found = [
            (detected!("neon"), Isa::Neon),
            (detected!("fp16"), Isa::FullFp16),
            (detected!("bf16"), Isa::Bf16),
            (detected!("dotprod"), Isa::DotProd),
        ];
        isa.extend(found.into_iter().filter(|(has, _)| *has).map(|(_, isa)| isa));
    }
    isa.sort_unstable();
    isa
}

/// The brand string of CPUID, or the architecture's name.
fn model_name() -> String {
    #[cfg(target_arch = "x86_64")]
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has CPUID.
    unsafe {
        use std::arch::x86_64::__cpuid;
        if __cpuid(0x8000_0000).eax >= 0x8000_0004 {
            let bytes: Vec<u8> = (0x8000_0002u32..=0x8000_0004)
                .map(__cpuid)
                .flat_map(|r| [r.eax, r.ebx, r.ecx, r.edx])
                .flat_map(u32::to_le_bytes)
                .take_while(|b| *b != 0)
                .collect();
            let name = String::from_utf8_lossy(&bytes).split_whitespace().collect::<Vec<_>>().join(" ");
            if !name.is_empty() {
                return name;
            }
        }
    }
    std::env::consts::ARCH.to_string()
}

/// The caches of processor 0, from sysfs on Linux; none elsewhere.
fn detect_caches() -> Vec<CacheLevel> {
    read_caches(std::path::Path::new("/sys/devices/system/cpu/cpu0/cache"))
}

fn read_caches(folder: &std::path::Path) -> Vec<CacheLevel> {
    let mut caches = Vec::new();
    for index in 0..16 {
        let field = |name: &str| {
            let text = std::fs::read_to_string(folder.join(format!("index{index}")).join(name)).ok()?;
            Some(text.trim().to_string())
        };
        let Some(level) = field("level").and_then(|t| t.parse().ok()) else { continue };
        if field("type").as_deref() == Some("Instruction") {
            continue;
        }
        let Some(bytes) = field("size").and_then(|t| parse_size(&t)) else { continue };
        let line_bytes = field("coherency_line_size").and_then(|t| t.parse().ok()).unwrap_or(64);
        let shared_by = field("shared_cpu_list").map_or(1, |t| count_list(&t).max(1));
        caches.push(CacheLevel { level, bytes, line_bytes, shared_by });
    }
    caches.sort_by_key(|c| c.level);
    caches
}

/// The memory of this machine, from /proc on Linux.
fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1 << 10)
}

/// `48K`, `2048K`, `32M` in bytes.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// How many numbers a list such as `0-3,8,10-11` names.
fn count_list(text: &str) -> u32 {
    text.split(',')
        .filter_map(|part| match part.split_once('-') {
            None => part.trim().parse::<u32>().ok().map(|_| 1),
            Some((a, b)) => Some(b.trim().parse::<u32>().ok()?.checked_sub(a.trim().parse().ok()?)?.saturating_add(1)),
        })
        .fold(0, u32::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let cpu = Cpu::detect();
        assert!(cpu.threads >= 1 && !cpu.name.is_empty());
        assert!([128, 256, 512].contains(&cpu.vector_bits()));
        assert!(cpu.caches.windows(2).all(|w| w[0].level <= w[1].level));
        assert!(cpu.caches.iter().all(|c| c.bytes >= 1 << 10 && c.shared_by >= 1));
        let sheet = cpu.data_sheet();
        assert_eq!((sheet.name.as_str(), sheet.levels[0].name.as_str()), ("cpu", "dram"));
        assert_eq!(sheet.levels.len(), cpu.caches.len() + 2);
        assert_eq!(Device::all()[0].kind(), "cpu");
    }

    #[test]
    fn system_files_are_read_with_care() {
        assert_eq!(parse_size("48K"), Some(48 << 10));
        assert_eq!(parse_size("32M"), Some(32 << 20));
        assert_eq!(parse_size("K"), None);
        assert_eq!(parse_size("99999999999999999999G"), None);
        assert_eq!(count_list("0-3,8,10-11"), 7);
        assert_eq!(count_list("junk,5-2,7"), 1);
        assert_eq!(count_list("0-4294967295,3"), u32::MAX);
        assert!(read_caches(std::path::Path::new("/no/such/folder")).is_empty());
    }
}
