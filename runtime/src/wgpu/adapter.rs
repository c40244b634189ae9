//! Adapters: what there is, and one by its name.
//!
//! Invariant: nothing is chosen by its place in a list.

use super::error::WgpuError;
use std::future::Future;
use std::task::{Context, Poll, Waker};

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
    pub(super) fn of(adapter: &wgpu::Adapter) -> Adapter {
        let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
        let subgroups = features.contains(wgpu::Features::SUBGROUP);
        let sizes = (info.subgroup_min_size, info.subgroup_max_size);
        Adapter {
            driver: [info.driver, info.driver_info].join(" ").trim().to_owned(),
            backend: info.backend.to_string(),
            software: info.device_type == wgpu::DeviceType::Cpu,
            name: info.name,
            subgroup: if subgroups { sizes } else { (0, 0) },
            f16: features.contains(wgpu::Features::SHADER_F16),
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            workgroup_bytes: u64::from(limits.max_compute_workgroup_storage_size),
            invocations: u64::from(limits.max_compute_invocations_per_workgroup),
            binding_bytes: limits.max_storage_buffer_binding_size,
            buffer_bytes: limits.max_buffer_size,
            storage_buffers: u64::from(limits.max_storage_buffers_per_shader_stage),
            workgroups: u64::from(limits.max_compute_workgroups_per_dimension),
        }
    }

    /// Whether `name` means it: a part of its name or driver in any case.
    pub fn is_named(&self, name: &str) -> bool {
        let name = name.to_lowercase();
        // The processor that Mesa runs shaders on has the driver's name in one place and another in the other.
        let known = if self.name.starts_with("llvmpipe") { "lavapipe" } else { "" };
        [&self.name, &self.driver, known].iter().any(|s| s.to_lowercase().contains(&name))
    }
}

/// A future of the native implementation, which is done when it is polled.
pub(super) fn done<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
        std::thread::yield_now();
    }
}

/// Everything that is there.
fn all() -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::PRIMARY;
    descriptor.flags = wgpu::InstanceFlags::empty();
    done(wgpu::Instance::new(descriptor).enumerate_adapters(wgpu::Backends::PRIMARY))
}

/// Every adapter of this machine.
pub fn adapters() -> Vec<Adapter> {
    all().iter().map(Adapter::of).collect()
}

/// The adapter that `name` means; none: the only one, or the only one that is no processor.
pub(super) fn named(name: Option<&str>) -> Result<wgpu::Adapter, WgpuError> {
    let every = all();
    let names = |list: &[wgpu::Adapter]| list.iter().map(|a| a.get_info().name).collect::<Vec<_>>();
    let found = names(&every);
    let wanted = |a: &wgpu::Adapter| name.is_none_or(|n| Adapter::of(a).is_named(n));
    let mut matching: Vec<wgpu::Adapter> = every.into_iter().filter(wanted).collect();
    if matching.len() > 1 && matching.iter().any(|a| !Adapter::of(a).software) {
        matching.retain(|a| !Adapter::of(a).software);
    }
    let name = name.unwrap_or_default().to_owned();
    match matching.len() {
        0 => Err(WgpuError::NoAdapter { name, found }),
        1 => Ok(matching.remove(0)),
        _ => Err(WgpuError::Ambiguous { name, found: names(&matching) }),
    }
}
