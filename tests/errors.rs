//! Whatever a public function can fail with is an error that others can carry: it has a `Display`, a `std::error::Error`,
//! and crosses threads.
//!
//! Invariant: the compiler checks every type of the list; the list is held to the signatures in the sources.

use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};

use einfall::{arrays, autotune, build, codegen, ir, runtime};

/// The name of an error type.
fn error<E: Error + Send + Sync + 'static>() -> &'static str {
    std::any::type_name::<E>().rsplit("::").next().unwrap_or_default()
}

fn listed() -> Vec<&'static str> {
    vec![
        error::<arrays::FileError>(),
        error::<autotune::csp::Broken>(),
        error::<autotune::csp::Error>(),
        error::<autotune::csp::check::Violation>(),
        error::<autotune::csp::compile::Empty>(),
        error::<autotune::csp::domain::Conflict>(),
        error::<autotune::csp::search::OutOfNodes>(),
        error::<autotune::model_gpu::Rejected>(),
        error::<autotune::model_gpu::Unsupported>(),
        error::<autotune::table::TableError>(),
        error::<build::Failure>(),
        error::<codegen::backend::ptx::Unprintable>(),
        error::<codegen::backend::wgsl::Unprintable>(),
        error::<codegen::lower::cpu::NotLowered>(),
        error::<codegen::passes::Unsupported>(),
        error::<codegen::pipeline::Stop>(),
        error::<einfall::Error>(),
        error::<ir::analysis::check::Rejection>(),
        error::<ir::analysis::emit::Unsupported>(),
        error::<ir::analysis::resources::Exceeded>(),
        error::<ir::artifact::BytesError>(),
        error::<ir::artifact::FormulaError>(),
        error::<ir::cascade::SizeError>(),
        error::<ir::cascade::bind::BindError>(),
        error::<ir::cascade::eval::EvalError>(),
        error::<ir::diag::Diagnostic>(),
        error::<ir::diag::Diagnostics>(),
        error::<ir::kernel::eval::KernelError>(),
        error::<ir::kernel::verify::Violation>(),
        error::<ir::tile::eval::TileError>(),
        error::<ir::tile::verify::Fault>(),
        error::<ir::tolerance::Mismatch>(),
        error::<runtime::ArrayError>(),
        error::<runtime::Error>(),
        error::<runtime::cache::CacheError>(),
        error::<runtime::cuda::CudaError>(),
        error::<runtime::llvm::LlvmError>(),
    ]
}

/// Errors that are not in this list, and why.
const OTHERS: &[(&str, &str)] = &[
    ("String", "a sentence, for callers who put it in an error of their own"),
    ("AtomId", "the factor that does not split, which is an answer"),
    ("WgpuError", "of a feature that this build may lack; thiserror derives it"),
];

/// Types with the name of an error that nothing fails with: how many, and what they are.
const ALIKE: &[(&str, usize, &str)] = &[
    ("Conflict", 1, "constraints that cannot hold together, which is an answer"),
    ("Fault", 2, "faults that are planted"),
];

/// Sources of the library, relative to the root; not the command line's, whose errors are exit codes.
fn sources() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["ir/src", "autotune/src", "codegen/src", "codegen/llvm/src", "runtime/src", "src"];
    let mut open: Vec<PathBuf> = folders.iter().map(|f| root.join(f)).collect();
    let mut found = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                if path != root.join("src/cli") {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|x| x == "rs") {
                found.push(path);
            }
        }
    }
    found
}

/// The error types of public functions in a source: of `Result<T, E>` the last argument, without `Box` and `Vec`.
fn errors(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim_start().starts_with("//")).map(str::trim_end).collect();
    // Not those in strings that sources write.
    let functions = lines.join("\n").replace("\n    pub fn ", "\npub fn ");
    for signature in format!("\n{functions}").split("\npub fn ").skip(1) {
        let signature = signature.replace('\n', " ");
        let signature = signature.split(" {").next().unwrap_or_default();
        let Some((_, result)) = signature.rsplit_once("-> Result<") else { continue };
        let (mut depth, mut last) = (1, 0);
        let mut end = result.len();
        for (i, c) in result.char_indices() {
            match c {
                '<' | '(' | '[' => depth += 1,
                '>' | ')' | ']' => depth -= 1,
                ',' if depth == 1 => last = i + 1,
                _ => {}
            }
            if depth == 0 {
                end = i;
                break;
            }
        }
        let mut name = result[last..end].trim();
        // An alias with its error inside has no argument here.
        if last == 0 {
            continue;
        }
        for around in ["Box<", "Vec<"] {
            name = name.strip_prefix(around).map_or(name, |n| n.trim_end_matches('>'));
        }
        // With what was done until then, or where: the error is the last.
        name = name.strip_suffix(')').and_then(|n| n.rsplit_once(", ")).map_or(name, |(_, n)| n);
        found.insert(name.rsplit("::").next().unwrap_or(name).to_owned());
    }
    found
}

#[test]
fn what_public_functions_fail_with_is_an_error() {
    let listed = listed();
    let mut wrong = Vec::new();
    for path in sources() {
        let text = std::fs::read_to_string(&path).expect("a source");
        for name in errors(&text) {
            if !listed.contains(&name.as_str()) && !OTHERS.iter().any(|(other, _)| *other == name) {
                wrong.push(format!("{}: {name}", path.display()));
            }
        }
    }
    // Types of one name are told apart by their number.
    let texts: Vec<String> = sources().iter().map(|p| std::fs::read_to_string(p).expect("a source")).collect();
    for name in listed.iter().collect::<BTreeSet<_>>() {
        let defines = |l: &&str| {
            let rest = ["pub struct ", "pub enum "].iter().find_map(|k| l.strip_prefix(k)?.strip_prefix(*name));
            rest.is_some_and(|r| !r.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
        };
        let defined = texts.iter().flat_map(|t| t.lines()).filter(defines).count();
        let entries = listed.iter().filter(|l| *l == name).count();
        let alike = ALIKE.iter().find(|a| a.0 == *name).map_or(0, |a| a.1);
        if defined != entries + alike {
            wrong.push(format!("{name}: {defined} types of that name, {entries} in the list"));
        }
    }
    let seen: BTreeSet<String> = texts.iter().flat_map(|t| errors(t)).collect();
    wrong.extend(OTHERS.iter().filter(|o| !seen.contains(o.0)).map(|o| format!("{}: no function fails with it", o.0)));
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn signatures_are_read() {
    let text = "/// -> Result<(), Doc>\npub fn a(x: u8) -> Result<Vec<(u8, u8)>, a::B> {\npub fn b(\n x: u8,\n) -> Result<u8, Vec<C>> {
        fn c() -> Result<u8, D> {\npub fn d() -> Parsed<u8> {\n    pub fn e() -> Result<Box<dyn F>, Box<E>> {
pub fn f() -> Result<u8, (Vec<G>, H)> {\n        pub fn i() -> Result<u8, {J}> {";
    assert_eq!(errors(text), BTreeSet::from(["B", "C", "E", "H"].map(String::from)));
}

#[test]
fn a_reader_s_error_shows_its_place_and_what_to_do() {
    fn read(text: &str) -> Result<(), Box<dyn Error + Send + Sync>> {
        let module = ir::cascade::parse(text)?;
        ir::mapping::verify::verify(
            &ir::mapping::parse::parse("mapping other on cpu {\n}\n")?,
            &einfall::plan(&module.cascades[0])?,
        )?;
        Ok(())
    }
    let wrong = read("cascade c[M](x: f32[M]) -> (y: f32[M]) {\n    y[m] = 2 * x[k]\n}\n").expect_err("no index k");
    let shown = wrong.to_string();
    assert!(shown.contains("2 |     y[m] = 2 * x[k]") && shown.contains("help: "), "{shown}");
    assert!(format!("{wrong:?}").contains(&shown), "what `unwrap` prints is another text");
    // About no text: one line each.
    let wrong = read("cascade c[M](x: f32[M]) -> (y: f32[M]) { y[m] = 2 * x[m] }").expect_err("another plan's mapping");
    assert!(wrong.to_string().starts_with("M0201: the mapping is for plan `other`, not `c`"), "{wrong}");
}
