//! Entries, bindings and launches: a kernel module as an artifact.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use einfall_ir::arena::Id;
use einfall_ir::artifact::{Artifact, Code, Launch, Slot, WgslModule};
use einfall_ir::kernel::{BufSpace, Kernel, Module};
use einfall_ir::tile::{BufferId, Plan};

use super::access::stage_elems;
use super::emit::Emit;
use super::{Bindings, Dialect, Res, Target, Unprintable, prelude};
use crate::backend::gpu::launch::{Printed, launch};
use crate::backend::llvm::launch::{artifact, is_parameter, symbol};

/// Prints every kernel of `module`, which was lowered from `plan`, as WGSL for `target`.
///
/// # Errors
/// What the printer has no text for, or a limit of the target that a kernel exceeds, named.
pub fn print(plan: &Plan, module: &Module, target: &Target) -> Result<Artifact, Unprintable> {
    let (mut modules, mut launches) = (Vec::new(), Vec::new());
    for k in &module.kernels {
        let (text, launch) = kernel(plan, module, k, target)?;
        modules.push(text);
        launches.push(launch);
    }
    Ok(artifact(plan, &target.name, Code::Wgsl { modules }, launches))
}

fn kernel(plan: &Plan, module: &Module, k: &Kernel, target: &Target) -> Res<(WgslModule, Launch)> {
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
                let (n, access) = match target.bindings {
                    Bindings::Own => (slots.len(), if writes { "read_write" } else { "read" }),
                    Bindings::Pooled => (slots.len() - 1, "read_write"),
                };
                let item = e.item(id);
                let _ = writeln!(declared, "@group(0) @binding({n}) var<storage, {access}> {variable}: array<{item}>;");
            }
            BufSpace::Shared { layout, stages } => {
                let items = (stage_elems(layout) * stages).next_multiple_of(4) / e.form(id).words;
                let bytes = if e.native(id) { 2 } else { 4 };
                shared_bytes += bytes * items * e.form(id).words;
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
    if let Some((text, bytes)) = e.passage() {
        shared_bytes += bytes;
        declared += &text;
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
    let words = match target.bindings {
        Bindings::Own => Some((0, words)),
        Bindings::Pooled => (!e.words.is_empty()).then_some((slots.len(), words)),
    };
    let subgroups = e.subgroups;
    let mut text = format!("// {name}\n");
    if subgroups && target.dialect == Dialect::Tint {
        text += "enable subgroups;\n";
    }
    if e.products.halves {
        text += "enable f16;\n";
    }
    if !e.products.atoms.is_empty() {
        text += "enable wgpu_cooperative_matrix;\n";
    }
    let threads = e.threads();
    let entry = format!(
        "@compute @workgroup_size({threads})\nfn {name}(\n    @builtin(workgroup_id) group: vec3<u32>,\n    \
         @builtin(num_workgroups) groups: vec3<u32>,\n    @builtin(local_invocation_index) invocation: u32,\n) {{\n    \
         let local = i32(invocation);\n    let unit = local / {0};\n    let thread = local % {0};\n{body}}}\n",
        e.unit_threads
    );
    let used = prelude::used(&entry);
    if let Some((n, words)) = words {
        let _ = writeln!(text, "struct Words {{\n{words}}}\n@group(0) @binding({n}) var<uniform> u: Words;");
    }
    let _ = write!(text, "{declared}{used}\n{entry}");
    slots.extend(e.words.iter().copied());

    let printed = Printed { symbol: name, slots, threads, shared_bytes, maps: Vec::new() };
    let launch = launch(plan, k, printed).map_err(|what| e.fail(what))?;
    let subgroup = if subgroups { target.subgroup } else { 1 };
    let matrices = std::mem::take(&mut e.products.atoms).into_iter().collect();
    Ok((WgslModule { text, bindings: target.bindings, written, subgroup, matrices }, launch))
}
