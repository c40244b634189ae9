//! What an adapter of WebGPU offers.

use einfall_ir::dtype::DType;
use einfall_ir::kernel::Scope;
use einfall_ir::kernel::atoms::{self, Atom};

/// An adapter, with what kernels may ask of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// Its name, e.g. `llvmpipe (LLVM 15.0.6, 256 bits)`.
    pub name: String,
    /// Its driver, name and version.
    pub driver: String,
    /// The interface behind it, e.g. `vulkan`.
    pub backend: String,
    /// Whether it is a processor that acts as a GPU.
    pub software: bool,
    /// Smallest and largest subgroup; 0 where there are no subgroup operations.
    pub subgroup: (u32, u32),
    /// Whether shaders may compute in f16.
    pub f16: bool,
    /// Whether the device takes times itself.
    pub timestamps: bool,
    /// `maxComputeWorkgroupStorageSize`, in bytes.
    pub workgroup_bytes: u64,
    /// `maxComputeInvocationsPerWorkgroup`.
    pub invocations: u64,
    /// `maxStorageBufferBindingSize`, in bytes.
    pub binding_bytes: u64,
    /// `maxBufferSize`, in bytes.
    pub buffer_bytes: u64,
    /// `maxStorageBuffersPerShaderStage`.
    pub storage_buffers: u64,
    /// `maxComputeWorkgroupsPerDimension`.
    pub workgroups: u64,
    /// Cooperative matrices that a subgroup multiplies.
    pub matrices: Vec<Matrices>,
}

/// A product of cooperative matrices, `c += a·b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrices {
    /// Extents of m, n and k.
    pub shape: [u32; 3],
    /// Type of both operands.
    pub operand: DType,
    /// Type of sums.
    pub sum: DType,
}

impl Adapter {
    /// The products of cooperative matrices that kernels may take, names of atoms: those that it reports and code generation
    /// knows, where every subgroup has the invocations of a unit.
    pub fn products(&self) -> Vec<String> {
        let unit = Scope::Warp.threads() as u32;
        if !self.f16 || self.subgroup != (unit, unit) {
            return Vec::new();
        }
        let reported = |a: &Atom| {
            let shape = a.shape.map(|n| n as u32);
            self.matrices.contains(&Matrices { shape, operand: a.operand, sum: a.acc })
        };
        atoms::cooperative_products().filter(reported).map(|a| a.name.0).collect()
    }

    /// Whether `name` means it: a part of its name or driver in any case.
    pub fn is_named(&self, name: &str) -> bool {
        let name = name.to_lowercase();
        // The processor that Mesa runs shaders on has the driver's name in one place and another in the other.
        let known = if self.name.starts_with("llvmpipe") { "lavapipe" } else { "" };
        [&self.name, &self.driver, known].iter().any(|s| s.to_lowercase().contains(&name))
    }
}
