//! Functions, slots and launches: a kernel module as an artifact.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use einfall_ir::arena::Id;
use einfall_ir::artifact::{Artifact, Code, Launch, Slot};
use einfall_ir::cascade::Size;
use einfall_ir::kernel::{BufSpace, Expr, Kernel, Module};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, BufferId, Op, Plan};

use super::emit::{BufFacts, Emit};
use super::isa::Isa;
use super::value::Text;
use crate::lower::cpu::NotLowered;

/// Prints every kernel of `module`, which was lowered from `plan`, as LLVM IR for cores with `isa`.
///
/// # Errors
/// What the printer has no instruction sequence for, named.
pub fn print(plan: &Plan, module: &Module, isa: &Isa, target: &str) -> Result<Artifact, NotLowered> {
    let mut text = String::new();
    let mut decls = BTreeSet::new();
    let mut launches = Vec::new();
    for (k, t) in module.kernels.iter().zip(&plan.kernels) {
        launches.push(kernel(plan, module, k, t, isa, &mut text, &mut decls)?);
    }
    let mut head = format!("; {}: {} kernels\n", module.name, module.kernels.len());
    for d in &decls {
        let _ = writeln!(head, "{d}");
    }
    head.push('\n');
    head += &text;
    let width = isa.vector_bytes * 8;
    let _ = writeln!(
        head,
        "attributes #0 = {{ nounwind \"prefer-vector-width\"=\"{width}\" \"min-legal-vector-width\"=\"{width}\" }}"
    );
    // Loops are tiled and vectorised already.
    head += "!0 = distinct !{!0, !1, !2}\n!1 = !{!\"llvm.loop.vectorize.enable\", i1 false}\n\
             !2 = !{!\"llvm.loop.unroll.disable\"}\n";
    Ok(artifact(plan, target, Code::LlvmIr(head), launches))
}

/// The artifact of a plan's printed kernels.
pub(in crate::backend) fn artifact(plan: &Plan, target: &str, code: Code, launches: Vec<Launch>) -> Artifact {
    Artifact {
        name: plan.name.clone(),
        target: target.to_string(),
        ranks: plan.ranks.clone(),
        buffers: plan.buffers.clone(),
        code,
        launches,
        defaults: Vec::new(),
        facts: Vec::new(),
    }
}

/// Whether an array is only read: without dimensions it is then passed by value.
pub(crate) fn is_parameter(plan: &Plan, param: usize) -> bool {
    plan.buffers[BufferId::new(param)].kind == tile::BufferKind::Input
}

/// A name as an LLVM symbol.
pub(crate) fn symbol(module: &Module, k: &Kernel) -> String {
    let clean = |s: &str| s.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect::<String>();
    format!("{}__{}", clean(&module.name), clean(&k.name))
}

#[allow(clippy::too_many_arguments)]
fn kernel(
    plan: &Plan,
    module: &Module,
    k: &Kernel,
    source: &tile::Kernel,
    isa: &Isa,
    text: &mut String,
    decls: &mut BTreeSet<String>,
) -> Result<Launch, NotLowered> {
    let name = symbol(module, k);
    let fail = |what: &str| NotLowered { kernel: k.name.clone(), what: what.to_string() };
    if k.roles.len() != 1 || k.roles[0].units != 1 || !k.cluster.is_empty() || !k.barriers.is_empty() {
        return Err(fail("several roles, units or clusters on a CPU"));
    }

    // Parameters of the task function, and the slots that fill them.
    let mut params: Vec<(String, &'static str, String)> = Vec::new();
    let mut slots = Vec::new();
    let mut facts = Vec::new();
    for (id, b) in k.bufs.iter() {
        let i = id.index();
        match &b.space {
            BufSpace::Global { param, .. } if b.dims.is_empty() && is_parameter(plan, *param) => {
                params.push((format!("%s{i}"), "i64", format!("slot{}", slots.len())));
                slots.push(Slot::Scalar(BufferId::new(*param)));
                facts.push(BufFacts {
                    ptr: format!("%s{i}"),
                    strides: vec![],
                    dims: vec![],
                    dtype: b.dtype,
                    together: 1,
                });
            }
            BufSpace::Global { param, together, .. } => {
                params.push((format!("%b{i}"), "ptr noalias", format!("slot{}", slots.len())));
                slots.push(Slot::Base(BufferId::new(*param)));
                let mut strides = Vec::new();
                // A dimension whose neighbours stand together is one of groups in the array.
                let grouped = if *together > 1 { 2 } else { 1 };
                for d in 0..b.dims.len().saturating_sub(grouped) {
                    params.push((format!("%b{i}.{d}"), "i64", format!("slot{}", slots.len())));
                    slots.push(Slot::Stride(BufferId::new(*param), d));
                    strides.push(format!("%b{i}.{d}"));
                }
                if let (2.., Some(Expr::Int(row))) = (*together, b.dims.last()) {
                    strides.extend([row.to_string(), together.to_string()]);
                } else if !b.dims.is_empty() {
                    strides.push("1".to_string());
                }
                let together = *together;
                facts.push(BufFacts { ptr: format!("%b{i}"), strides, dims: vec![], dtype: b.dtype, together });
            }
            BufSpace::Scratch { .. } => {
                params.push((format!("%b{i}"), "ptr noalias align 64", format!("scratch{i}")));
                facts.push(BufFacts {
                    ptr: format!("%b{i}"),
                    strides: vec![],
                    dims: vec![],
                    dtype: b.dtype,
                    together: 1,
                });
            }
            BufSpace::Shared { .. } => return Err(fail("shared memory on a CPU")),
        }
    }
    for r in module.ranks.ids() {
        params.push((format!("%ext{}", r.index()), "i64", format!("slot{}", slots.len())));
        slots.push(Slot::Extent(r));
    }
    for d in 0..k.grid.len() {
        params.push((format!("%grid{d}"), "i64", format!("grid{d}")));
    }

    // The task function.
    let mut e = Emit::new(k, isa, facts)?;
    e.shared_writes = !k.grid.iter().all(|g| *g == Expr::Int(1));
    for (id, b) in k.bufs.iter() {
        let dims = b.dims.iter().map(|d| e.int(d)).collect::<Result<Vec<_>, _>>()?;
        e.bufs[id.index()].dims = dims;
        if let BufSpace::Scratch { strides, together } = &b.space {
            let mut strides = strides.iter().map(|d| e.int(d)).collect::<Result<Vec<_>, _>>()?;
            if let (2.., Some(last)) = (*together, strides.last_mut()) {
                *last = together.to_string();
            }
            e.bufs[id.index()].strides = strides;
            e.bufs[id.index()].together = *together;
        }
    }
    e.configure_tiles();
    e.stmts(&k.roles[0].body)?;
    e.release_tiles();
    let list: Vec<String> = params.iter().map(|(n, t, _)| format!("{t} {n}")).collect();
    let _ = writeln!(text, "define internal void @{name}.task({}) #0 {{\nentry:", list.join(", "));
    text.push_str(&e.t.allocas);
    text.push_str(&e.t.body);
    text.push_str("  ret void\n}\n\n");
    decls.append(&mut e.t.decls);

    // The entry: slots, scratch, tasks.
    let mut w = Text::new(isa.lanes());
    for (i, slot) in slots.iter().enumerate() {
        let p = if i == 0 { "%slots".to_string() } else { w.def(&format!("getelementptr i64, ptr %slots, i64 {i}")) };
        let ty = match slot {
            Slot::Base(_) => "ptr",
            Slot::Stride(..) | Slot::Scalar(_) | Slot::Extent(_) => "i64",
        };
        w.line(&format!("%slot{i} = load {ty}, ptr {p}, align 8"));
        if let Slot::Extent(r) = slot {
            w.line(&format!("%ext{} = add i64 %slot{i}, 0", r.index()));
        }
    }
    let mut at = Size::Const(0);
    for (id, b) in k.bufs.iter() {
        let BufSpace::Scratch { strides, .. } = &b.space else { continue };
        let bytes = scratch_bytes(b.dtype.bits() / 8, &b.dims, strides).ok_or_else(|| fail("scratch of that shape"))?;
        let off = size_text(&mut w, &at);
        w.line(&format!("%scratch{} = getelementptr i8, ptr %scratch, i64 {off}", id.index()));
        at = add(at, bytes);
    }
    let grid: Vec<Size> =
        k.grid.iter().map(|g| size_of(g).ok_or_else(|| fail("a grid of that form"))).collect::<Result<_, _>>()?;
    let extents: Vec<String> = grid.iter().map(|g| size_text(&mut w, g)).collect();
    w.line("%any = icmp slt i64 %first, %end");
    w.line("br i1 %any, label %tasks, label %done");
    w.start("tasks");
    w.line("%task = phi i64 [ %first, %entry ], [ %next, %tasks ]");
    let mut rest = "%task".to_string();
    for d in (0..grid.len()).rev() {
        if d == 0 {
            w.line(&format!("%grid{d} = add i64 {rest}, 0"));
        } else {
            w.line(&format!("%grid{d} = urem i64 {rest}, {}", extents[d]));
            rest = w.def(&format!("udiv i64 {rest}, {}", extents[d]));
        }
    }
    let args: Vec<String> =
        params.iter().map(|(_, t, from)| format!("{} %{from}", t.split(' ').next().unwrap_or(t))).collect();
    w.line(&format!("call void @{name}.task({})", args.join(", ")));
    w.line("%next = add nsw i64 %task, 1");
    w.line("%more = icmp slt i64 %next, %end");
    w.line("br i1 %more, label %tasks, label %done");
    w.start("done");
    w.line("ret void");
    let _ = writeln!(
        text,
        "define void @{name}(ptr %slots, i64 %first, i64 %end, ptr %scratch) #0 {{\nentry:\n{}}}\n",
        w.body
    );
    decls.append(&mut w.decls);

    let (reads, writes) = traffic(source);
    let bytes = launch_bytes(plan, source);
    Ok(Launch {
        symbol: name,
        slots,
        grid,
        ordered: source.ordered.is_some(),
        scratch_bytes: at,
        reads: reads.into_iter().collect(),
        writes: writes.into_iter().collect(),
        flops: flops(source),
        bytes,
        gpu: None,
    })
}

/// Bytes of a scratch buffer, a multiple of 64.
fn scratch_bytes(elem: u32, dims: &[Expr], strides: &[Expr]) -> Option<Size> {
    let elems = match (dims.first(), strides.first()) {
        (Some(d), Some(s)) => mul(size_of(d)?, size_of(s)?),
        _ => Size::Const(1),
    };
    let bytes = mul(elems, Size::Const(u64::from(elem)));
    // One line more: a vector may end beyond the last element.
    Some(match bytes {
        Size::Const(b) => Size::Const(b.div_ceil(64) * 64 + 64),
        b => add(mul(Size::CeilDiv(Box::new(b), Box::new(Size::Const(64))), Size::Const(64)), Size::Const(64)),
    })
}

pub(crate) fn add(a: Size, b: Size) -> Size {
    match (a, b) {
        (Size::Const(x), Size::Const(y)) => Size::Const(x + y),
        (Size::Const(0), s) | (s, Size::Const(0)) => s,
        (a, b) => Size::Add(Box::new(a), Box::new(b)),
    }
}

fn mul(a: Size, b: Size) -> Size {
    match (a, b) {
        (Size::Const(x), Size::Const(y)) => Size::Const(x * y),
        (Size::Const(1), s) | (s, Size::Const(1)) => s,
        (a, b) => Size::Mul(Box::new(a), Box::new(b)),
    }
}

/// An integer expression over extents as a size.
pub(crate) fn size_of(e: &Expr) -> Option<Size> {
    Some(match e {
        Expr::Int(i) => Size::Const(u64::try_from(*i).ok()?),
        Expr::Extent(r) => Size::Rank(*r),
        Expr::Binary(op, a, b) => {
            let (a, b) = (Box::new(size_of(a)?), Box::new(size_of(b)?));
            match op {
                BinaryOp::Add => Size::Add(a, b),
                BinaryOp::Sub => Size::Sub(a, b),
                BinaryOp::Mul => Size::Mul(a, b),
                BinaryOp::Div => Size::Div(a, b),
                BinaryOp::Min => Size::Min(a, b),
                BinaryOp::Max => Size::Max(a, b),
                BinaryOp::Mod
                | BinaryOp::Pow
                | BinaryOp::Lt
                | BinaryOp::Le
                | BinaryOp::Gt
                | BinaryOp::Ge
                | BinaryOp::Eq
                | BinaryOp::Ne
                | BinaryOp::And
                | BinaryOp::Or => return None,
            }
        }
        _ => return None,
    })
}

/// A size computed in the entry function, where `%extR` are the extents.
fn size_text(w: &mut Text, s: &Size) -> String {
    let mut two = |op: &str, a: &Size, b: &Size| {
        let (a, b) = (size_text(w, a), size_text(w, b));
        match op {
            "add" => w.add(&a, &b),
            "sub" => w.sub(&a, &b),
            "mul" => w.mul(&a, &b),
            "ceil" => {
                let b1 = w.sub(&b, "1");
                let s = w.add(&a, &b1);
                w.def(&format!("udiv i64 {s}, {b}"))
            }
            "min" | "max" => w.call("i64", &format!("llvm.u{op}.i64"), &[("i64", &a), ("i64", &b)]),
            _ => w.def(&format!("{op} i64 {a}, {b}")),
        }
    };
    match s {
        Size::Const(c) => c.to_string(),
        Size::Rank(r) => format!("%ext{}", r.index()),
        Size::Add(a, b) => two("add", a, b),
        Size::Sub(a, b) => two("sub", a, b),
        Size::Mul(a, b) => two("mul", a, b),
        Size::Div(a, b) => two("udiv", a, b),
        Size::CeilDiv(a, b) => two("ceil", a, b),
        Size::Min(a, b) => two("min", a, b),
        Size::Max(a, b) => two("max", a, b),
    }
}

/// Arrays a kernel reads and writes.
pub(crate) fn traffic(k: &tile::Kernel) -> (BTreeSet<BufferId>, BTreeSet<BufferId>) {
    let (mut reads, mut writes) = (BTreeSet::new(), BTreeSet::new());
    k.for_each_op(&mut |op, _| match op {
        Op::Load { buffer, .. } => {
            reads.insert(*buffer);
        }
        Op::Store { buffer, .. } => {
            writes.insert(*buffer);
        }
        Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {}
    });
    for (_, e) in k.exprs.iter() {
        if let tile::Expr::Read { buffer, .. } = e {
            reads.insert(*buffer);
        }
    }
    (reads, writes)
}

pub(crate) fn buffer_bytes(plan: &Plan, b: BufferId) -> Size {
    let b = &plan.buffers[b];
    let elems = b.dims.iter().fold(Size::Const(1), |acc, d| mul(acc, d.clone()));
    mul(elems, Size::Const(u64::from(b.dtype.bits().div_ceil(8))))
}

/// Compulsory bytes of a launch: every array that is read once, every array that is written once; of an array that is
/// only reached by data (a gather, a scatter) as many elements as there are points to reach it from, at most all.
pub(crate) fn launch_bytes(plan: &Plan, k: &tile::Kernel) -> Size {
    // Elements per array and direction; none: all of them.
    let mut elems: BTreeMap<(BufferId, bool), Option<Size>> = BTreeMap::new();
    let mut access = |b: BufferId, at: &[tile::ExprId], write: bool| {
        let n = gathered_elems(plan, k, b, at);
        let have = elems.entry((b, write)).or_insert_with(|| Some(Size::Const(0)));
        *have = have.take().zip(n).map(|(a, n)| add(a, n));
    };
    k.for_each_op(&mut |op, _| match op {
        Op::Load { buffer, at, .. } => access(*buffer, at, false),
        Op::Store { buffer, at, .. } => access(*buffer, at, true),
        Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {}
    });
    for (_, e) in k.exprs.iter() {
        if let tile::Expr::Read { buffer, at } = e {
            access(*buffer, at, false);
        }
    }
    let mut total = Size::Const(0);
    for ((b, _), n) in elems {
        let b = &plan.buffers[b];
        let all = b.dims.iter().fold(Size::Const(1), |acc, d| mul(acc, d.clone()));
        let n = match n {
            Some(n) => Size::Min(Box::new(n), Box::new(all)),
            None => all,
        };
        total = add(total, mul(n, Size::Const(u64::from(b.dtype.bits().div_ceil(8)))));
    }
    total
}

/// Elements that an access by data reaches at most; none for one by coordinates alone.
fn gathered_elems(plan: &Plan, k: &tile::Kernel, b: BufferId, at: &[tile::ExprId]) -> Option<Size> {
    let mut axes: BTreeSet<tile::AxisId> = BTreeSet::new();
    let mut gathers = false;
    let mut rest = Size::Const(1);
    for (e, extent) in at.iter().zip(&plan.buffers[b].dims) {
        let mut own = BTreeSet::new();
        let mut by_data = false;
        k.walk(*e, &mut |_, x| match x {
            tile::Expr::Coord(a) => {
                own.insert(*a);
            }
            tile::Expr::Tile(t) | tile::Expr::TileAt { tile: t, .. } => {
                by_data = true;
                own.extend(&k.tiles[*t].axes);
            }
            tile::Expr::Read { .. } => by_data = true,
            tile::Expr::Int(_)
            | tile::Expr::Float(_)
            | tile::Expr::Size(_)
            | tile::Expr::Unary(..)
            | tile::Expr::Binary(..)
            | tile::Expr::Select(..)
            | tile::Expr::Cast(..)
            | tile::Expr::Rand(_) => {}
        });
        if by_data {
            gathers = true;
            axes.extend(own);
        } else {
            rest = mul(rest, extent.clone());
        }
    }
    gathers.then(|| axes.iter().fold(rest, |acc, a| mul(acc, k.axes[*a].extent.clone())))
}

/// Operations of a launch: two per multiply-add of a contraction, one per arithmetic operator and point elsewhere.
pub(crate) fn flops(k: &tile::Kernel) -> Size {
    let grid: Vec<tile::AxisId> =
        k.axes.iter().filter(|(_, a)| a.kind == tile::AxisKind::Grid).map(|(id, _)| id).collect();
    let mut total = Size::Const(0);
    k.for_each_op(&mut |op, around| {
        let mut axes: BTreeSet<tile::AxisId> = BTreeSet::new();
        let mut per_point = 0u64;
        let count = |root: tile::ExprId| {
            let mut n = 0;
            k.walk(root, &mut |_, e| match e {
                tile::Expr::Unary(..) | tile::Expr::Binary(..) => n += 1,
                tile::Expr::Int(_)
                | tile::Expr::Float(_)
                | tile::Expr::Size(_)
                | tile::Expr::Coord(_)
                | tile::Expr::Tile(_)
                | tile::Expr::TileAt { .. }
                | tile::Expr::Read { .. }
                | tile::Expr::Select(..)
                | tile::Expr::Cast(..)
                | tile::Expr::Rand(_) => {}
            });
            n
        };
        match op {
            Op::Load { .. } => {}
            Op::Store { axes: a, value, .. } => {
                axes.extend(a);
                per_point = count(*value);
            }
            Op::Map { out, value } => {
                axes.extend(&k.tiles[*out].axes);
                per_point = count(*value);
            }
            Op::Reduce { out, value, over, .. } => {
                axes.extend(&k.tiles[out[0]].axes);
                axes.extend(over);
                per_point = count(*value) + 1;
            }
            Op::Contract { out, over, .. } => {
                axes.extend(&k.tiles[*out].axes);
                axes.extend(over);
                per_point = 2;
            }
            Op::Scan { out, value, .. } => {
                axes.extend(&k.tiles[*out].axes);
                per_point = count(*value) + 1;
            }
        }
        if per_point == 0 {
            return;
        }
        let mut points = Size::Const(per_point);
        // An operation repeats for every block of the grid and stream axes it does not range over.
        for a in axes.iter().copied().chain(grid.iter().chain(around).copied().filter(|a| !axes.contains(a))) {
            let axis = &k.axes[a];
            let n = if axes.contains(&a) {
                axis.extent.clone()
            } else {
                let block = axis.block.unwrap_or(1);
                Size::CeilDiv(Box::new(axis.extent.clone()), Box::new(Size::Const(block)))
            };
            points = mul(points, n);
        }
        total = add(std::mem::replace(&mut total, Size::Const(0)), points);
    });
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathered_rows_are_counted_not_the_table() {
        let text = "plan embed[T, W, D] {
    input word: f32[W, D]
    input bias: f32[D]
    input token: i32[T]
    output Y: f32[T, D]
    kernel embed {
        grid t in T
        inner d in D
        tile i: i32[t]
        tile x: f32[t, d]
        i = load token[t]
        x = load word[i, d]
        store Y[t, d] = x + bias[d] over t, d
    }
}
";
        let plan = tile::parse::parse(text).expect("a plan");
        let bytes = |t: u64, w: u64, d: u64| launch_bytes(&plan, &plan.kernels[0]).eval(&[t, w, d]).expect("known");
        assert_eq!(bytes(8, 30_000, 16), 8 * 16 * 4 + 16 * 4 + 8 * 4 + 8 * 16 * 4);
        // More tokens than rows reach at most every row.
        assert_eq!(bytes(8, 3, 16), 3 * 16 * 4 + 16 * 4 + 8 * 4 + 8 * 16 * 4);
        // Read by coordinates as well, the table counts whole.
        let both = text.replace("x + bias[d]", "x + word[0, d]");
        let plan = tile::parse::parse(&both).expect("a plan");
        let n = launch_bytes(&plan, &plan.kernels[0]).eval(&[8, 30_000, 16]).expect("known");
        assert_eq!(n, 30_000 * 16 * 4 + 8 * 4 + 8 * 16 * 4);
    }
}
