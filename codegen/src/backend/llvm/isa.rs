//! What the LLVM backend must know of a processor: vector width and registers.
//!
//! Invariant: data only; printing and lowering read nothing else about the processor.

use einfall_ir::kernel::atoms::{self, Atom};

/// Vector facts of a CPU core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Isa {
    /// Bytes of a vector register: 64 (AVX-512), 32 (AVX2) or 16 (NEON, SSE).
    pub vector_bytes: u64,
    /// Vector registers.
    pub vector_registers: u64,
    /// Whether `vscalefps` exists (AVX-512F).
    pub scalef: bool,
    /// Whether a fused multiply-add instruction exists.
    pub fma: bool,
    /// Whether products of bf16 tiles exist (AMX) and the operating system lets the process use them.
    pub amx: bool,
    /// Whether dot products of pairs of bf16 exist (AVX512-BF16) and take no longer than multiply-adds of vectors.
    pub dots: bool,
    /// First-level data cache of a core, in bytes.
    pub l1_bytes: u64,
    /// Second-level cache of a core, in bytes.
    pub l2_bytes: u64,
}

impl Isa {
    /// AVX-512 cores.
    pub const AVX512: Isa = Isa {
        vector_bytes: 64,
        vector_registers: 32,
        scalef: true,
        fma: true,
        amx: false,
        dots: false,
        l1_bytes: 32 << 10,
        l2_bytes: 1 << 20,
    };
    /// AVX-512 cores with AMX's products of bf16 tiles.
    pub const AMX: Isa = Isa { amx: true, l1_bytes: 48 << 10, l2_bytes: 2 << 20, ..Isa::AVX512 };
    /// AVX-512 cores with fast dot products of pairs of bf16: AMD's since Zen 4.
    pub const DOTS: Isa = Isa { dots: true, ..Isa::AVX512 };
    /// AVX2 cores with FMA.
    pub const AVX2: Isa =
        Isa { vector_bytes: 32, vector_registers: 16, scalef: false, l2_bytes: 512 << 10, ..Isa::AVX512 };
    /// 64-bit ARM cores.
    pub const NEON: Isa = Isa { vector_bytes: 16, vector_registers: 32, ..Isa::AVX2 };
    /// Any 64-bit x86 core.
    pub const SSE2: Isa = Isa { vector_bytes: 16, vector_registers: 16, fma: false, ..Isa::AVX2 };

    /// The widest vectors that `triple` and a feature list in LLVM's words (`+avx2,-avx512f`) allow.
    pub fn of(triple: &str, features: &str) -> Isa {
        let has = |name: &str| features.split(',').any(|f| f.strip_prefix('+') == Some(name));
        if triple.starts_with("aarch64") || triple.starts_with("arm64") {
            Isa::NEON
        } else if has("avx512f") && has("avx512vl") && has("avx512dq") && has("avx512bw") {
            // Intel's cores take four times a multiply-add's time for it; SSE4a is AMD's alone.
            let dots = has("avx512bf16") && has("sse4a");
            Isa { amx: has("amx-tile") && has("amx-bf16"), dots, ..Isa::AVX512 }
        } else if has("avx2") && has("fma") {
            Isa::AVX2
        } else {
            Isa::SSE2
        }
    }

    /// The contraction instructions that contractions are lowered to where their types fit.
    pub fn atoms(&self) -> Vec<Atom> {
        if self.amx {
            atoms::processor_tiles().collect()
        } else if self.dots {
            atoms::processor_dots(self.lanes()).collect()
        } else {
            Vec::new()
        }
    }

    /// Lanes of a register of f32.
    pub fn lanes(&self) -> u64 {
        self.vector_bytes / 4
    }

    /// Rows and columns of the f32 register tile of an outer-product contraction: as many accumulators as leave
    /// registers for one row of the right operand and one broadcast. 14×32 for AVX-512, 6×16 for AVX2.
    pub fn register_tile(&self) -> (u64, u64) {
        let rows = if self.vector_registers >= 32 { 14 } else { 6 };
        (rows, 2 * self.lanes())
    }
}
