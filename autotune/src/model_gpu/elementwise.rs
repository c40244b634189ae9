//! Mappings of kernels without contractions: blocks only.

use einfall_ir::mapping::{AxisMapping, KernelMapping};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{AxisKind, Kernel, Plan};

/// The mapping of a kernel without contractions.
pub fn choose(kernel: &Kernel, _plan: &Plan, _sheet: &DataSheet) -> KernelMapping {
    let last = kernel.axes.iter().filter(|(_, a)| a.kind == AxisKind::Grid).map(|(id, _)| id).last();
    let axes = kernel.axes.iter().filter(|(_, a)| a.kind != AxisKind::Inner).map(|(id, a)| {
        let block = if Some(id) == last || a.kind == AxisKind::Stream { 1024 } else { 1 };
        AxisMapping::new(&a.name, a.block.unwrap_or(block))
    });
    KernelMapping { kernel: kernel.name.clone(), axes: axes.collect(), ..KernelMapping::default() }
}
