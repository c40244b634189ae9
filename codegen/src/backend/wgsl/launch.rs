//! Entries, bindings and launches: a kernel module as an artifact.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use einfall_ir::arena::Id;
use einfall_ir::artifact::{Artifact, Code, GpuLaunch, Launch, Slot, WgslModule};
use einfall_ir::cascade::Size;
use einfall_ir::kernel::{BufSpace, Kernel, Module};
use einfall_ir::tile::{self, BufferId, Plan};

use super::access::stage_elems;
use super::emit::Emit;
use super::{Dialect, Res, Target, Unprintable, prelude};
use crate::backend::llvm::launch::{add, buffer_bytes, flops, is_parameter, launch_bytes, size_of, symbol, traffic};
use crate::backend::ptx::launch::{arrays, condition};

/// Prints every kernel of `module`, which was lowered from `plan`, as WGSL for `target`.
///
/// # Errors
/// What the printer has no text for, or a limit of the target that a kernel exceeds, named.
pub fn print(plan: &Plan, module: &Module, target: &Target) -> Result<Artifact, Unprintable> {
    let (mut modules, mut launches) = (Vec::new(), Vec::new());
    for k in &module.kernels {
        let name = k.variant_of.as_ref().unwrap_or(&k.name);
        let source = plan.kernels.iter().find(|s| s.name == *name);
        let (text, launch) = kernel(plan, module, k, source, target)?;
        modules.push(text);
        launches.push(launch);
    }
    Ok(Artifact {
        name: plan.name.clone(),
        target: target.name.clone(),
        ranks: plan.ranks.clone(),
        buffers: plan.buffers.clone(),
        code: Code::Wgsl { modules },
        launches,
        defaults: Vec::new(),
        facts: Vec::new(),
    })
}

fn kernel(
    plan: &Plan,
    module: &Module,
    k: &Kernel,
    source: Option<&tile::Kernel>,
    target: &Target,
) -> Res<(WgslModule, Launch)> {
    let name = symbol(module, k);
    let mut e = Emit::new(k, &module.ranks, target)?;
    let body = e.run()?;
    let (mut declared, mut slots) = (String::new(), Vec::new());
    let (mut seen, mut shared_bytes, mut written) = (BTreeSet::new(), 0, Vec::new());
    for (id, b) in k.bufs.iter() {
        let variable = e.variable(id);
        match &b.space {
            BufSpace::Global { param, .. } => {
                let scalar = b.dims.is_empty() && is_parameter(plan, *param);
                if scalar || !seen.insert(*param) {
                    continue;
                }
                slots.push(Slot::Base(BufferId::new(*param)));
                let writes = e.form(id).written || e.form(id).atomic;
                written.push(writes);
                let access = if writes { "read_write" } else { "read" };
                let item = e.item(id);
                let n = slots.len();
                let _ = writeln!(declared, "@group(0) @binding({n}) var<storage, {access}> {variable}: array<{item}>;");
            }
            BufSpace::Shared { layout, stages } => {
                let items = (stage_elems(layout) * stages).next_multiple_of(4) / e.form(id).words;
                shared_bytes += 4 * items * e.form(id).words;
                let _ = writeln!(declared, "var<workgroup> {variable}: array<{}, {items}>;", e.item(id));
            }
            BufSpace::Scratch { .. } => return Err(e.fail("memory private to a CPU task")),
        }
    }
    if e.exchanged > 0 {
        let words = (e.exchange_slots() + e.exchanged) * e.threads();
        shared_bytes += 4 * words;
        let _ = writeln!(declared, "var<workgroup> exchange: array<u32, {words}>;");
    }
    if shared_bytes > target.workgroup_bytes {
        let what = format!(
            "{shared_bytes} bytes of workgroup memory: `maxComputeWorkgroupStorageSize` of {} is {}",
            target.name, target.workgroup_bytes
        );
        return Err(Unprintable { help: "use smaller blocks or fewer stages", ..e.fail(&what) });
    }
    if slots.len() as u64 > target.storage_buffers {
        let what = format!(
            "{} storage buffers: `maxStorageBuffersPerShaderStage` of {} is {}",
            slots.len(),
            target.name,
            target.storage_buffers
        );
        return Err(Unprintable { help: "split the cascade", ..e.fail(&what) });
    }
    let words: String = (0..e.words.len().max(1)).map(|i| format!("    w{i}: i32,\n")).collect();
    let subgroups = body.contains("subgroup");
    let mut text = format!("// {name}\n");
    if subgroups && target.dialect == Dialect::Tint {
        text += "enable subgroups;\n";
    }
    let threads = e.threads();
    let entry = format!(
        "@compute @workgroup_size({threads})\nfn {name}(\n    @builtin(workgroup_id) group: vec3<u32>,\n    \
         @builtin(num_workgroups) groups: vec3<u32>,\n    @builtin(local_invocation_index) invocation: u32,\n) {{\n    \
         let local = i32(invocation);\n    let unit = local / {0};\n    let thread = local % {0};\n{body}}}\n",
        e.unit_threads
    );
    let used = prelude::used(&entry);
    let _ = write!(
        text,
        "struct Words {{\n{words}}}\n@group(0) @binding(0) var<uniform> u: Words;\n{declared}{used}\n{entry}"
    );
    slots.extend(e.words.iter().copied());

    let (reads, writes) = source.map_or_else(|| arrays(k), traffic);
    let bytes = match source {
        Some(source) => launch_bytes(plan, source),
        None => reads.iter().chain(&writes).fold(Size::Const(0), |acc, b| add(acc, buffer_bytes(plan, *b))),
    };
    let grid = k.grid.iter().map(|g| size_of(g).ok_or_else(|| e.fail("a grid of that form"))).collect::<Res<_>>()?;
    let launch = Launch {
        symbol: name,
        slots,
        grid,
        scratch_bytes: Size::Const(0),
        reads: reads.into_iter().collect(),
        writes: writes.into_iter().collect(),
        flops: source.map_or(Size::Const(0), flops),
        bytes,
        gpu: Some(GpuLaunch {
            threads: threads as u32,
            cluster: Vec::new(),
            shared_bytes,
            cooperative: false,
            dependent: false,
            counters: Vec::new(),
            maps: Vec::new(),
            variant_of: k.variant_of.clone(),
            assumes: k.assumes.iter().map(|a| condition(k, a).map_err(|what| e.fail(what))).collect::<Res<_>>()?,
        }),
    };
    let subgroup = if subgroups { target.subgroup } else { 1 };
    Ok((WgslModule { text, written, subgroup }, launch))
}
