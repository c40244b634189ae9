//! The manifest of a cascade's shaders: what a program in any language needs to launch them, as JSON.
//!
//! Expressions are numbers, names of ranks, or `[operator, operand, ..]`, so that a reader evaluates them without a
//! parser; `["scalar", name]` is a parameter's value. Invariant: a manifest says everything of the artifact that a launch
//! on dense arrays depends on; its form is `web/src/manifest.ts`, and `web/` reads it.

use einfall_ir::artifact::{Artifact, Condition, Formula, Launch, Leaf, Slot, WgslModule};
use einfall_ir::cascade::Size;
use einfall_ir::tile::{BufferId, BufferKind};
use serde_json::{Value, json};

/// Version of the form.
pub const VERSION: u32 = 1;

/// The manifest of an artifact whose kernels are `modules`; `file` names the file of a kernel's shader.
pub fn manifest(a: &Artifact, modules: &[WgslModule], file: impl Fn(&Launch) -> String) -> Value {
    let rank = |name: &str, fixed: Option<u64>| match fixed {
        None => json!({ "name": name }),
        Some(n) => json!({ "name": name, "extent": n }),
    };
    let array = |b: &einfall_ir::tile::Buffer| {
        let kind = match b.kind {
            BufferKind::Input => "input",
            BufferKind::InOut => "inout",
            BufferKind::Output => "output",
            BufferKind::Workspace => "workspace",
        };
        let shape: Vec<Value> = b.dims.iter().map(|d| size(a, d)).collect();
        json!({ "name": b.name, "kind": kind, "dtype": b.dtype.name(), "shape": shape })
    };
    let scalar = |id: BufferId, b: &einfall_ir::tile::Buffer| {
        let default = a.defaults.iter().find(|(of, _)| *of == id).map(|(_, f)| formula(a, f));
        match default {
            None => json!({ "name": b.name, "dtype": b.dtype.name() }),
            Some(default) => json!({ "name": b.name, "dtype": b.dtype.name(), "default": default }),
        }
    };
    let facts = a.facts.iter().map(|f| json!({ "text": f.text, "holds": formula(a, &f.holds) }));
    let mut kernels: Vec<(Option<&str>, Vec<Value>)> = Vec::new();
    for (launch, module) in a.launches.iter().zip(modules) {
        let of = launch.gpu.as_ref().and_then(|g| g.variant_of.as_deref());
        let one = variant(a, launch, module, file(launch));
        match kernels.last_mut() {
            Some((before, variants)) if of.is_some() && *before == of => variants.push(one),
            _ => kernels.push((of, vec![one])),
        }
    }
    json!({
        "format": "einfall.wgsl",
        "version": VERSION,
        "name": a.name,
        "target": a.target,
        "ranks": a.ranks.iter().map(|(_, r)| rank(&r.name, r.fixed)).collect::<Vec<_>>(),
        "arrays": a.buffers.iter().filter(|(_, b)| !b.is_scalar()).map(|(_, b)| array(b)).collect::<Vec<_>>(),
        "scalars": a.buffers.iter().filter(|(_, b)| b.is_scalar()).map(|(id, b)| scalar(id, b)).collect::<Vec<_>>(),
        "facts": facts.collect::<Vec<_>>(),
        "kernels": kernels.into_iter().map(|(_, variants)| variants).collect::<Vec<_>>(),
    })
}

/// One shader with how it is launched.
fn variant(a: &Artifact, launch: &Launch, module: &WgslModule, shader: String) -> Value {
    let gpu = launch.gpu.as_ref();
    let bases = launch.slots.iter().filter_map(|s| match s {
        Slot::Base(b) => Some(*b),
        Slot::Stride(..) | Slot::Scalar(_) | Slot::Extent(_) => None,
    });
    let bindings = bases.zip(&module.written).map(
        |(b, written)| json!({ "array": a.buffers[b].name, "access": if *written { "read_write" } else { "read" } }),
    );
    let bindings: Vec<Value> = bindings.collect();
    let words = launch.slots.iter().filter_map(|s| match *s {
        Slot::Base(_) => None,
        Slot::Extent(r) => Some(json!({ "i32": a.ranks[r].name })),
        Slot::Stride(b, d) => Some(json!({ "i32": product(a, &a.buffers[b].dims[d + 1..]) })),
        Slot::Scalar(b) => {
            let kind = if a.buffers[b].dtype.is_float() { "f32" } else { "i32" };
            Some(json!({ kind: ["scalar", a.buffers[b].name] }))
        }
    });
    let conditions = gpu.map_or(&[][..], |g| &g.assumes).iter().map(|c| match c {
        Condition::AtMost(s, n) => json!({ "at_most": [size(a, s), n] }),
        Condition::Multiple(s, n) => json!({ "multiple": [size(a, s), n] }),
        Condition::Aligned(b, bytes) => json!({ "aligned": [a.buffers[*b].name, bytes] }),
    });
    json!({
        "entry": launch.symbol,
        "shader": shader,
        "workgroups": product(a, &launch.grid),
        "bindings": bindings,
        "words": words.collect::<Vec<_>>(),
        "assumes": conditions.collect::<Vec<_>>(),
        "needs": {
            "subgroup": module.subgroup,
            "maxComputeInvocationsPerWorkgroup": gpu.map_or(1, |g| g.threads),
            "maxComputeWorkgroupStorageSize": gpu.map_or(0, |g| g.shared_bytes),
            "maxStorageBuffersPerShaderStage": module.written.len(),
        },
    })
}

/// The product of sizes.
fn product(a: &Artifact, sizes: &[Size]) -> Value {
    let all = sizes.iter().map(|s| size(a, s));
    all.reduce(|x, y| json!(["*", x, y])).unwrap_or_else(|| json!(1))
}

fn size(a: &Artifact, s: &Size) -> Value {
    let two = |op: &str, x: &Size, y: &Size| json!([op, size(a, x), size(a, y)]);
    match s {
        Size::Const(n) => json!(n),
        Size::Rank(r) => json!(a.ranks[*r].name),
        Size::Add(x, y) => two("+", x, y),
        Size::Sub(x, y) => two("-", x, y),
        Size::Mul(x, y) => two("*", x, y),
        Size::Div(x, y) => two("floor_div", x, y),
        Size::CeilDiv(x, y) => two("ceil_div", x, y),
        Size::Min(x, y) => two("min", x, y),
        Size::Max(x, y) => two("max", x, y),
    }
}

fn formula(a: &Artifact, f: &Formula) -> Value {
    let leaf = |l: Leaf<'_>| match l {
        // JSON has no other numbers.
        Leaf::Number(x) if x.is_finite() => json!(x),
        Leaf::Number(x) => json!([if x.is_nan() {
            "nan"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        }]),
        Leaf::Size(s) => size(a, s),
        Leaf::Scalar(b) => json!(["scalar", a.buffers[b].name]),
    };
    let apply = |op: &str, operands: Vec<Value>| json!([json!(op)].into_iter().chain(operands).collect::<Vec<_>>());
    f.fold(|b| a.buffers[b].dtype, leaf, apply).unwrap_or(Value::Null)
}
