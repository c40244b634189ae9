//! The C header of compiled cascades: for every processor level a function on dense arrays, in terms of the objects'
//! kernels and their launches.
//!
//! Invariant: the header needs nothing but a C11 compiler and the objects beside it; sizes, grids and workspace are the
//! artifact's expressions, printed as C.

use std::fmt::Write as _;

use einfall_ir::arena::Id;
use einfall_ir::artifact::{Artifact, Launch, Slot};
use einfall_ir::cascade::Size;
use einfall_ir::dtype::DType;
use einfall_ir::tile::{Buffer, BufferKind};

use super::compile::{Product, Target};

/// The header of the products: `name_level(arrays.., scalars.., extents..)` for each cascade and processor level.
pub fn header(products: &[Product]) -> String {
    let mut text = format!(
        "/* Written by einfall {}. Changes are lost.\n *\n * Arrays are dense and row-major; f16 and bf16 are uint16_t, \
         bool is uint8_t. A function returns 0, or -1 where\n * memory for temporaries is short. It runs on the calling \
         thread; kernels may be called for ranges of tasks from\n * many threads at once. The caller sees to it that the \
         processor is of the function's level and that facts hold; for x86_64_v4_amx also that Linux keeps tiles for\n * the \
         process: syscall(SYS_arch_prctl, 0x1023, 18), once. */\n#pragma once\n#include <stdint.h>\n#include \
         <stdlib.h>\n#include <string.h>\n\n#ifdef __cplusplus\nextern \"C\" {{\n#endif\n\n\
         static inline int64_t einfall_ceil_div(int64_t a, int64_t b) {{ return (a + b - 1) / b; }}\n\
         static inline int64_t einfall_min(int64_t a, int64_t b) {{ return a < b ? a : b; }}\n\
         static inline int64_t einfall_max(int64_t a, int64_t b) {{ return a > b ? a : b; }}\n\
         static inline void *einfall_memory(int64_t bytes) {{ return aligned_alloc(64, (size_t)(bytes / 64 + 1) * 64); }}\n",
        env!("CARGO_PKG_VERSION")
    );
    for product in products {
        for piece in &product.pieces {
            if let Target::Cpu(level) = piece.target {
                function(&mut text, &product.cascade.name, level.name(), &piece.artifact);
            }
        }
    }
    text + "\n#ifdef __cplusplus\n}\n#endif\n"
}

/// The C type of an element.
fn element(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "double",
        DType::F32 | DType::Tf32 => "float",
        DType::F16 | DType::BF16 => "uint16_t",
        DType::I64 => "int64_t",
        DType::I32 => "int32_t",
        DType::I8 => "int8_t",
        DType::F8E4M3 | DType::F8E5M2 | DType::U8 | DType::I4 | DType::U4 | DType::Bool => "uint8_t",
    }
}

/// A name that neither C nor this header uses.
fn c_name(kind: &str, name: &str) -> String {
    format!("{kind}_{name}")
}

fn function(text: &mut String, name: &str, level: &str, a: &Artifact) {
    let level = level.replace('-', "_");
    for launch in &a.launches {
        let _ = write!(
            text,
            "\nvoid {}(const uint64_t *slots, int64_t first_task, int64_t end_task, void *scratch);",
            launch.symbol
        );
    }
    let mut parameters = Vec::new();
    for (_, b) in a.buffers.iter() {
        let arg = c_name("a", &b.name);
        parameters.push(match b.kind {
            BufferKind::Workspace => continue,
            BufferKind::Input if b.is_scalar() => format!("double {arg}"),
            BufferKind::Input => format!("const {} *{arg}", element(b.dtype)),
            BufferKind::InOut | BufferKind::Output => format!("{} *{arg}", element(b.dtype)),
        });
    }
    let open = a.ranks.iter().filter(|(_, r)| r.fixed.is_none());
    parameters.extend(open.map(|(_, r)| format!("int64_t {}", c_name("r", &r.name))));
    let _ = write!(text, "\n\n/* ");
    for (_, b) in a.buffers.iter().filter(|(_, b)| b.kind != BufferKind::Workspace) {
        let dims: Vec<String> = b.dims.iter().map(|d| size(a, d)).collect();
        let _ = write!(text, "{}: {}[{}]; ", c_name("a", &b.name), b.dtype, dims.join("]["));
    }
    for fact in &a.facts {
        let _ = write!(text, "it must hold that {}; ", fact.text.replace("*/", "* /"));
    }
    let _ = writeln!(text, "*/\nstatic inline int {name}_{level}({}) {{", parameters.join(", "));
    for (_, r) in a.ranks.iter() {
        if let Some(n) = r.fixed {
            let _ = writeln!(text, "    const int64_t {} = {n};", c_name("r", &r.name));
        }
        let _ = writeln!(text, "    (void){};", c_name("r", &r.name));
    }
    let workspace: Vec<&Buffer> =
        a.buffers.iter().map(|(_, b)| b).filter(|b| b.kind == BufferKind::Workspace).collect();
    let _ = writeln!(text, "    int done = -1;");
    let scratch: Vec<String> = a.launches.iter().map(|l| size(a, &l.scratch_bytes)).collect();
    let all = scratch.iter().fold("0".to_owned(), |max, s| format!("einfall_max({max}, {s})"));
    let _ = writeln!(text, "    void *scratch = einfall_memory({all});");
    for b in &workspace {
        let elems = b.dims.iter().map(|d| size(a, d)).collect::<Vec<_>>().join(" * ");
        let elems = if elems.is_empty() { "1".to_owned() } else { elems };
        let _ = writeln!(
            text,
            "    {ty} *{} = ({ty} *)einfall_memory((int64_t)sizeof({ty}) * {elems});",
            c_name("a", &b.name),
            ty = element(b.dtype)
        );
    }
    let memory = workspace.iter().map(|b| c_name("a", &b.name)).collect::<Vec<_>>();
    let _ = writeln!(text, "    if (scratch{}) {{", memory.iter().map(|m| format!(" && {m}")).collect::<String>());
    for launch in &a.launches {
        call(text, a, launch);
    }
    let _ = writeln!(text, "        done = 0;\n    }}");
    for m in memory.iter().map(String::as_str).chain(["scratch"]) {
        let _ = writeln!(text, "    free({m});");
    }
    let _ = writeln!(text, "    return done;\n}}");
}

fn call(text: &mut String, a: &Artifact, launch: &Launch) {
    let _ = writeln!(text, "        {{");
    let _ = writeln!(text, "            uint64_t slots[{}];", launch.slots.len().max(1));
    for (i, slot) in launch.slots.iter().enumerate() {
        let value = match *slot {
            Slot::Base(b) => format!("(uint64_t)(uintptr_t){}", c_name("a", &a.buffers[b].name)),
            Slot::Stride(b, d) => {
                let inner: Vec<String> = a.buffers[b].dims[d + 1..].iter().map(|s| size(a, s)).collect();
                format!("(uint64_t)({})", if inner.is_empty() { "1".to_owned() } else { inner.join(" * ") })
            }
            Slot::Extent(r) => format!("(uint64_t){}", c_name("r", &a.ranks[r].name)),
            Slot::Scalar(b) => {
                let arg = c_name("a", &a.buffers[b].name);
                if a.buffers[b].dtype.is_float() {
                    let round = if a.buffers[b].dtype == DType::F32 { "(double)(float)" } else { "" };
                    let _ = writeln!(
                        text,
                        "            {{ double value = {round}{arg}; memcpy(&slots[{i}], &value, 8); }}"
                    );
                    continue;
                }
                format!("(uint64_t)(int64_t){arg}")
            }
        };
        let _ = writeln!(text, "            slots[{i}] = {value};");
    }
    let tasks = launch.grid.iter().map(|s| size(a, s)).collect::<Vec<_>>().join(" * ");
    let tasks = if tasks.is_empty() { "1".to_owned() } else { tasks };
    let _ = writeln!(text, "            const int64_t tasks = {tasks};");
    let _ = writeln!(text, "            if (tasks > 0) {}(slots, 0, tasks, scratch);\n        }}", launch.symbol);
}

/// An extent as a C expression.
fn size(a: &Artifact, s: &Size) -> String {
    let two = |x: &Size, y: &Size, op: &str| format!("({} {op} {})", size(a, x), size(a, y));
    let call = |x: &Size, y: &Size, f: &str| format!("einfall_{f}({}, {})", size(a, x), size(a, y));
    match s {
        Size::Const(n) => format!("INT64_C({n})"),
        Size::Rank(r) => c_name("r", &a.ranks.get(*r).map_or_else(|| r.index().to_string(), |r| r.name.clone())),
        Size::Add(x, y) => two(x, y, "+"),
        Size::Sub(x, y) => two(x, y, "-"),
        Size::Mul(x, y) => two(x, y, "*"),
        Size::Div(x, y) => two(x, y, "/"),
        Size::CeilDiv(x, y) => call(x, y, "ceil_div"),
        Size::Min(x, y) => call(x, y, "min"),
        Size::Max(x, y) => call(x, y, "max"),
    }
}
