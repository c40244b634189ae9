//! What an adapter of WebGPU offers.

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
}

impl Adapter {
    /// Whether `name` means it: a part of its name or driver in any case.
    pub fn is_named(&self, name: &str) -> bool {
        let name = name.to_lowercase();
        // The processor that Mesa runs shaders on has the driver's name in one place and another in the other.
        let known = if self.name.starts_with("llvmpipe") { "lavapipe" } else { "" };
        [&self.name, &self.driver, known].iter().any(|s| s.to_lowercase().contains(&name))
    }
}
