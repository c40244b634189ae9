//! Entries, parameters and launches: a kernel module as an artifact.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use einfall_ir::arena::Id;
use einfall_ir::artifact::{Artifact, Code, Condition, GpuLaunch, Launch, Slot};
use einfall_ir::cascade::Size;
use einfall_ir::kernel::{Assumption, BufSpace, Kernel, Module, Stmt, walk};
use einfall_ir::tile::{self, BufferId, Plan};

use super::emit::Emit;
use super::text::{Ty, Val};
use super::{Res, Target, Unprintable};
use crate::backend::llvm::launch::{add, buffer_bytes, flops, is_parameter, launch_bytes, size_of, symbol, traffic};

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
        let name = k.variant_of.as_ref().unwrap_or(&k.name);
        // Kernels that the mapping adds (merges of splits) have no kernel of the plan.
        let source = plan.kernels.iter().find(|s| s.name == *name);
        launches.push(kernel(plan, module, k, source, target, &mut text)?);
    }
    Ok(Artifact {
        name: plan.name.clone(),
        target: target.name.clone(),
        ranks: plan.ranks.clone(),
        buffers: plan.buffers.clone(),
        code: Code::Ptx { text, arch: target.arch.clone() },
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
    text: &mut String,
) -> Res<Launch> {
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

    let counters: Vec<BufferId> = k.counters().into_iter().map(BufferId::new).collect();
    // A kernel that holds a merge touches more than the kernel of the plan it is named after.
    let (reads, writes) = match source.filter(|_| counters.is_empty()) {
        Some(source) => traffic(source),
        None => arrays(k),
    };
    let bytes = match source {
        Some(source) => launch_bytes(plan, source),
        None => reads.iter().chain(&writes).fold(Size::Const(0), |acc, b| add(acc, buffer_bytes(plan, *b))),
    };
    let grid = k.grid.iter().map(|g| size_of(g).ok_or_else(|| e.fail("a grid of that form"))).collect::<Res<_>>()?;
    let mut cooperative = false;
    k.roles.iter().for_each(|r| walk(&r.body, &mut |s| cooperative |= matches!(s, Stmt::GridSync)));
    Ok(Launch {
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
            cluster: k.cluster.clone(),
            shared_bytes: e.shared.bytes,
            cooperative,
            dependent: k.dependent,
            counters,
            maps: std::mem::take(&mut e.maps.all),
            variant_of: k.variant_of.clone(),
            assumes: k.assumes.iter().map(|a| condition(k, a).map_err(|what| e.fail(what))).collect::<Res<_>>()?,
        }),
    })
}

/// What a variant takes for granted, in terms of the artifact.
///
/// # Errors
/// What has no such terms, a noun phrase.
pub(in crate::backend) fn condition(k: &Kernel, a: &Assumption) -> Result<Condition, &'static str> {
    let size = |x| size_of(x).ok_or("an assumption of that form");
    Ok(match a {
        Assumption::AtMost(x, n) => Condition::AtMost(size(x)?, *n),
        Assumption::Multiple(x, n) => Condition::Multiple(size(x)?, *n),
        Assumption::Aligned(b, n) => match k.bufs[*b].space {
            BufSpace::Global { param, .. } => Condition::Aligned(BufferId::new(param), *n),
            BufSpace::Shared { .. } | BufSpace::Scratch { .. } => return Err("an assumption about no array"),
        },
    })
}

/// Arrays that a kernel reads and writes, by its buffers: one that it writes counts as written alone.
pub(in crate::backend) fn arrays(k: &Kernel) -> (BTreeSet<BufferId>, BTreeSet<BufferId>) {
    let of = |w: bool| {
        k.bufs.iter().filter_map(move |(_, b)| match b.space {
            BufSpace::Global { param, written } if written == w => Some(BufferId::new(param)),
            BufSpace::Global { .. } | BufSpace::Shared { .. } | BufSpace::Scratch { .. } => None,
        })
    };
    (of(false).collect(), of(true).collect())
}
