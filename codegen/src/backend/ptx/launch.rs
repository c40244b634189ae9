//! Entries, parameters and launches: a kernel module as an artifact.

use std::fmt::Write as _;

use einfall_ir::arena::Id;
use einfall_ir::artifact::{Artifact, Code, Launch, Slot};
use einfall_ir::kernel::{BufSpace, Kernel, Module};
use einfall_ir::tile::{BufferId, Plan};

use super::emit::Emit;
use super::text::{Ty, Val};
use super::{Res, Target, Unprintable};
use crate::backend::gpu::launch::{Printed, launch};
use crate::backend::llvm::launch::{artifact, is_parameter, symbol};

/// Prints every kernel of `module`, which was lowered from `plan`, as PTX for `target`.
///
/// # Errors
/// What the printer has no instruction sequence for, named.
pub fn print(plan: &Plan, module: &Module, target: &Target) -> Result<Artifact, Unprintable> {
    let mut text = format!(
        "// {}: {} kernels\n.version 8.0\n.target {}\n.address_size 64\n\n.extern .shared .align 1024 .b8 smem[];\n",
        module.name,
        module.kernels.len(),
        target.arch
    );
    let mut launches = Vec::new();
    for k in &module.kernels {
        launches.push(kernel(plan, module, k, target, &mut text)?);
    }
    Ok(artifact(plan, &target.name, Code::Ptx { text, arch: target.arch.clone() }, launches))
}

fn kernel(plan: &Plan, module: &Module, k: &Kernel, target: &Target, text: &mut String) -> Res<Launch> {
    let name = symbol(module, k);
    let mut e = Emit::new(k, &module.ranks, target);
    if !k.cluster.is_empty() && !target.hopper() {
        return Err(e.fail("clusters before sm_90"));
    }
    let mut slots = Vec::new();
    let param = |slots: &mut Vec<Slot>, s: Slot| {
        slots.push(s);
        format!("p{}", slots.len() - 1)
    };
    e.t.name("%b", Ty::S64, k.bufs.len());
    for (id, b) in k.bufs.iter() {
        let i = id.index();
        match &b.space {
            BufSpace::Global { param: p, .. } if b.dims.is_empty() && is_parameter(plan, *p) => {
                let p = param(&mut slots, Slot::Scalar(BufferId::new(*p)));
                let v = if b.dtype.is_float() {
                    let x = Val::reg(Ty::F64, e.t.def(Ty::F64, "ld.param.f64", &[&format!("[{p}]")]));
                    e.rounded(&x, b.dtype)?
                } else {
                    let x = Val::reg(Ty::S64, e.t.def(Ty::S64, "ld.param.s64", &[&format!("[{p}]")]));
                    e.to(&x, super::scalar::class(b.dtype))
                };
                e.scalars[i] = Some(v);
            }
            BufSpace::Global { param: array, .. } => {
                let p = param(&mut slots, Slot::Base(BufferId::new(*array)));
                let r = e.t.def(Ty::S64, "ld.param.u64", &[&format!("[{p}]")]);
                e.t.line(&format!("cvta.to.global.u64 %b{i}, {r}"));
                let strided = b.dims.len().saturating_sub(1);
                if strided > 0 {
                    e.t.name(&format!("%st{i}_"), Ty::S64, strided);
                }
                for d in 0..strided {
                    let p = param(&mut slots, Slot::Stride(BufferId::new(*array), d));
                    let r = e.t.def(Ty::S64, "ld.param.u64", &[&format!("[{p}]")]);
                    e.t.line(&format!("mul.lo.s64 %st{i}_{d}, {r}, {}", b.dtype.bytes(1)));
                }
            }
            BufSpace::Shared { .. } => {}
            BufSpace::Scratch { .. } => return Err(e.fail("memory private to a CPU task")),
        }
    }
    e.t.name("%n", Ty::S32, module.ranks.len());
    for (r, rank) in module.ranks.iter() {
        if rank.fixed.is_none() {
            let p = param(&mut slots, Slot::Extent(r));
            e.t.line(&format!("ld.param.u32 %n{}, [{p}]", r.index()));
        }
    }
    e.place_task()?;
    e.roles()?;

    let mut head = e.t.declarations();
    for r in ["thread", "warp", "lane", "smem", "smem_window", "cluster_rank"] {
        let _ = writeln!(head, "\t.reg .b32 %{r};");
    }
    head += "\tmov.u32 %thread, %tid.x;\n\tmov.u32 %smem, smem;\n\tand.b32 %smem_window, %smem, 0x3FFFF;\n";
    let maps = (0..e.maps.all.len()).map(|m| format!("\t.param .align 64 .b8 map{m}[128]"));
    let params: Vec<String> = maps.chain((0..slots.len()).map(|i| format!("\t.param .b64 p{i}"))).collect();
    let (threads, resident) = (e.threads, e.resident());
    let clustered = k.cluster.iter().product::<u64>() > 1;
    let explicit = if clustered { ".explicitcluster\n" } else { "" };
    // A role alone is bound as a whole.
    let bound = match k.roles.as_slice() {
        [role] => role.regs.map(|r| format!(".maxnreg {r}\n")).unwrap_or_default(),
        _ => String::new(),
    };
    let _ = writeln!(
        text,
        "\n.visible .entry {name}(\n{}\n)\n{explicit}.maxntid {threads}, 1, 1\n.minnctapersm {resident}\n{bound}{{\n{head}{}}}",
        params.join(",\n"),
        e.t.out
    );

    let (shared_bytes, maps) = (e.shared.bytes, std::mem::take(&mut e.maps.all));
    launch(plan, k, Printed { symbol: name, slots, threads, shared_bytes, maps }).map_err(|what| e.fail(what))
}
