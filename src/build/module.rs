//! The Rust module of compiled cascades: a typed function and a [`Kernel`](einfall_runtime::aot::Kernel) for each.
//!
//! Invariant: the text depends on the products alone; element types, dimensions and fixed extents of every array are in
//! the function's type, so that a wrong one is refused by the Rust compiler.

use std::fmt::Write as _;

use einfall_ir::artifact::Artifact;
use einfall_ir::cascade::{Cascade, Size};
use einfall_ir::diag::Diagnostic;
use einfall_ir::dtype::DType;
use einfall_ir::tile::{Buffer, BufferKind};
use einfall_runtime::Level;

use super::compile::{Product, Target};

/// Where generated code finds the run time.
const AOT: &str = "::einfall::aot";

/// The module of the products. Artifacts are taken from `NAME.TARGET.artifact` beside the module's file.
///
/// # Errors
/// The cascades with arrays of a type that Rust has no element for.
pub fn module(products: &[Product]) -> Result<String, Vec<(String, Diagnostic)>> {
    let mut text = format!("// Written by einfall {}. Changes are lost.\n\n", env!("CARGO_PKG_VERSION"));
    let mut functions = String::new();
    let mut wrong = Vec::new();
    for product in products {
        match typed(product) {
            Ok(made) => functions += &made,
            Err(d) => wrong.push((product.cascade.name.clone(), d)),
        }
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    text += "#[allow(unused)]\nmod linked {\n    unsafe extern \"C\" {\n";
    for (level, artifact) in products.iter().flat_map(levels) {
        for launch in &artifact.launches {
            let (arch, symbol) = (level.arch(), &launch.symbol);
            let _ = writeln!(
                text,
                "        #[cfg(target_arch = \"{arch}\")]\n        pub fn {symbol}(slots: *const u64, first: i64, end: i64, scratch: *mut u8);"
            );
        }
    }
    text += "    }\n}\n";
    Ok(text + &functions)
}

/// The pieces that are linked.
fn levels(product: &Product) -> impl Iterator<Item = (Level, &Artifact)> {
    product.pieces.iter().filter_map(|p| match p.target {
        Target::Cpu(level) => Some((level, &p.artifact)),
        Target::Cuda(_) | Target::Wgsl => None,
    })
}

/// The name of a file beside the module.
pub fn file_name(cascade: &Cascade, target: Target, extension: &str) -> String {
    format!("{}.{}.{extension}", cascade.name, target.name())
}

fn typed(product: &Product) -> Result<String, Diagnostic> {
    let c = &product.cascade;
    let (name, constant) = (ident(&c.name), c.name.to_uppercase());
    // Programs for browsers read manifests instead.
    let rust = product.pieces.iter().find(|p| p.target != Target::Wgsl);
    let Some(artifact) = rust.map(|p| &p.artifact) else { return Ok(String::new()) };
    let (mut parameters, mut body) = (String::new(), String::new());
    let public = artifact.buffers.iter().filter(|(_, b)| b.kind != BufferKind::Workspace);
    for (id, b) in public {
        let arg = ident(&b.name);
        if b.is_scalar() {
            let optional = artifact.defaults.iter().any(|(of, _)| *of == id);
            if optional {
                let _ = writeln!(parameters, "    {arg}: Option<f64>,");
                let _ = writeln!(
                    body,
                    "    if let Some(value) = {arg} {{\n        arguments = arguments.scalar({:?}, value);\n    }}",
                    b.name
                );
            } else {
                let _ = writeln!(parameters, "    {arg}: f64,");
                let _ = writeln!(body, "    arguments = arguments.scalar({:?}, {arg});", b.name);
            }
            continue;
        }
        let (way, method) = match b.kind {
            BufferKind::Input | BufferKind::Workspace => ("Input", "input"),
            BufferKind::InOut | BufferKind::Output => ("Output", "output"),
        };
        let (element, shape) = (element(c, b)?, shape(artifact, b));
        let _ = writeln!(parameters, "    {arg}: impl Into<{AOT}::{way}<'a, {element}, {shape}>>,");
        let _ = writeln!(body, "    arguments = arguments.{method}({:?}, {arg}.into().view());", b.name);
    }
    let mut text = String::from("\n");
    let signature = signature(artifact);
    let docs = if c.docs.is_empty() { vec![format!("The cascade `{}`.", c.name)] } else { c.docs.clone() };
    for line in docs.iter().map(String::as_str).chain(["", &signature, "", "# Errors"]) {
        let line = line.trim();
        let _ = writeln!(text, "///{}{line}", if line.is_empty() { "" } else { " " });
    }
    let _ = write!(
        text,
        "/// Shapes that contradict each other, facts that do not hold, or a processor that it was not compiled for.\n\
         #[allow(non_snake_case, dead_code, clippy::all)]\npub fn {name}<'a>(\n{parameters}) -> Result<(), {AOT}::Error> {{\n    \
         let mut arguments = {AOT}::Arguments::new();\n{body}    {constant}.launch(arguments)\n}}\n\n"
    );
    let _ = writeln!(
        text,
        "/// The code behind [`{name}`].\n#[allow(dead_code)]\n// SAFETY: functions and artifacts were compiled together.\n\
         pub static {constant}: {AOT}::Kernel = unsafe {{\n    {AOT}::Kernel::new(\n        {:?},\n        &[",
        c.name
    );
    for (level, artifact) in levels(product) {
        let functions: Vec<String> = artifact.launches.iter().map(|l| format!("linked::{}", l.symbol)).collect();
        let file = file_name(c, Target::Cpu(level), "artifact");
        let _ = writeln!(
            text,
            "            #[cfg(target_arch = {:?})]\n            {AOT}::Linked {{ level: {AOT}::Level::{level:?}, artifact: \
             include_bytes!({file:?}), functions: &[{}] }},",
            level.arch(),
            functions.join(", ")
        );
    }
    text += "        ],\n        &[\n";
    for piece in &product.pieces {
        let Target::Cuda(arch) = piece.target else { continue };
        let file = file_name(c, piece.target, "artifact");
        let cubin = match piece.cubin {
            Some(_) => format!("Some(include_bytes!({:?}))", file_name(c, piece.target, "cubin")),
            None => "None".to_owned(),
        };
        let _ = writeln!(
            text,
            "            {AOT}::Ptx {{ arch: {arch:?}, artifact: include_bytes!({file:?}), cubin: {cubin} }},"
        );
    }
    text += "        ],\n    )\n};\n";
    Ok(text)
}

/// `Q[M, 64], K[N, 64] -> O[M, F]`, for the documentation.
fn signature(artifact: &Artifact) -> String {
    let list = |out: bool| {
        let of = artifact.buffers.iter().map(|(_, b)| b).filter(|b| match b.kind {
            BufferKind::Input | BufferKind::InOut => !out,
            BufferKind::Output => out,
            BufferKind::Workspace => false,
        });
        let one = |b: &Buffer| {
            let dims: Vec<String> = b.dims.iter().map(|d| size(artifact, d)).collect();
            format!("`{}: {}[{}]`", b.name, b.dtype, dims.join(", "))
        };
        of.map(one).collect::<Vec<_>>().join(", ")
    };
    format!("{} → {}", list(false), list(true))
}

fn size(artifact: &Artifact, s: &Size) -> String {
    if let Some(n) = fixed(artifact, s) {
        return n.to_string();
    }
    match s {
        Size::Const(n) => n.to_string(),
        Size::Rank(r) => artifact.ranks[*r].name.clone(),
        Size::Add(a, b) => format!("({} + {})", size(artifact, a), size(artifact, b)),
        Size::Sub(a, b) => format!("({} - {})", size(artifact, a), size(artifact, b)),
        Size::Mul(a, b) => format!("{}*{}", size(artifact, a), size(artifact, b)),
        Size::Div(a, b) | Size::CeilDiv(a, b) => format!("({} / {})", size(artifact, a), size(artifact, b)),
        Size::Min(a, b) => format!("min({}, {})", size(artifact, a), size(artifact, b)),
        Size::Max(a, b) => format!("max({}, {})", size(artifact, a), size(artifact, b)),
    }
}

/// An extent's value, where all its ranks are fixed.
fn fixed(artifact: &Artifact, s: &Size) -> Option<u64> {
    let mut known = true;
    s.for_each_rank(&mut |r| known &= artifact.ranks[r].fixed.is_some());
    let extents: Vec<u64> = artifact.ranks.iter().map(|(_, r)| r.fixed.unwrap_or(0)).collect();
    if known { s.eval(&extents).ok() } else { None }
}

fn shape(artifact: &Artifact, b: &Buffer) -> String {
    let dims = b.dims.iter().map(|d| match fixed(artifact, d) {
        Some(n) => format!("{AOT}::Is<{n}>,"),
        None => format!("{AOT}::Any,"),
    });
    format!("({})", dims.collect::<Vec<_>>().join(" "))
}

/// The Rust type of an array's elements.
fn element(c: &Cascade, b: &Buffer) -> Result<String, Diagnostic> {
    Ok(match b.dtype {
        DType::F64 | DType::F32 | DType::I64 | DType::I32 | DType::I8 | DType::U8 => b.dtype.name().to_owned(),
        DType::F16 | DType::BF16 => format!("{AOT}::half::{}", b.dtype.name()),
        DType::Tf32 | DType::F8E4M3 | DType::F8E5M2 | DType::I4 | DType::U4 | DType::Bool => {
            let place = c.tensors.iter().find(|(_, t)| t.name == b.name).map(|(_, t)| t.span).unwrap_or_default();
            let what = format!("`{}` is {}, which no Rust type is an element of", b.name, b.dtype);
            return Err(Diagnostic::error("E0902", place, what)
                .label("this parameter")
                .help("declare it f64, f32, f16, bf16, i64, i32, i8 or u8 and convert in the text"));
        }
    })
}

/// A name as a Rust identifier.
fn ident(name: &str) -> String {
    const KEYWORDS: &[&str] = &[
        "abstract", "as", "async", "await", "become", "box", "break", "const", "continue", "do", "dyn", "else", "enum",
        "extern", "false", "final", "fn", "for", "gen", "if", "impl", "in", "let", "loop", "macro", "match", "mod",
        "move", "mut", "override", "priv", "pub", "ref", "return", "static", "struct", "trait", "true", "try", "type",
        "typeof", "unsafe", "unsized", "use", "virtual", "where", "while", "yield",
    ];
    match name {
        "self" | "super" | "crate" | "Self" | "_" | "arguments" | "value" => format!("{name}_"),
        _ if KEYWORDS.contains(&name) => format!("r#{name}"),
        _ => name.to_owned(),
    }
}
