//! Adapters: what there is, and one by its name.
//!
//! Invariant: nothing is chosen by its place in a list. A browser lists one adapter, of its own choice.

use crate::shaders::{Adapter, Matrices, WgpuError};
use einfall_ir::dtype::DType;

/// One of the products that an adapter reports; none for types that kernels do not multiply.
fn product(p: &wgpu::CooperativeMatrixProperties) -> Option<Matrices> {
    let dtype = |t| match t {
        wgpu::CooperativeScalarType::F16 => Some(DType::F16),
        wgpu::CooperativeScalarType::F32 => Some(DType::F32),
        wgpu::CooperativeScalarType::I32 | wgpu::CooperativeScalarType::U32 => None,
    };
    let (operand, sum) = (dtype(p.ab_type)?, dtype(p.cr_type)?);
    (!p.saturating_accumulation).then_some(Matrices { shape: [p.m_size, p.n_size, p.k_size], operand, sum })
}

impl Adapter {
    pub(super) fn of(adapter: &wgpu::Adapter) -> Adapter {
        let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
        let subgroups = features.contains(wgpu::Features::SUBGROUP);
        let sizes = (info.subgroup_min_size, info.subgroup_max_size);
        let matrices = match features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
            true => adapter.cooperative_matrix_properties().iter().filter_map(product).collect(),
            false => Vec::new(),
        };
        Adapter {
            matrices,
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
}

/// Everything that is there.
async fn all() -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::PRIMARY;
    descriptor.flags = wgpu::InstanceFlags::empty();
    wgpu::Instance::new(descriptor).enumerate_adapters(wgpu::Backends::PRIMARY).await
}

/// Every adapter of this machine.
#[cfg(not(target_family = "wasm"))]
pub fn adapters() -> Vec<Adapter> {
    super::answer::done(adapters_async())
}

/// Every adapter of this machine.
pub async fn adapters_async() -> Vec<Adapter> {
    all().await.iter().map(Adapter::of).collect()
}

/// The adapter that `name` means; none: the only one, or the only one that is no processor.
pub(super) async fn named(name: Option<&str>) -> Result<wgpu::Adapter, WgpuError> {
    let every = all().await;
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
