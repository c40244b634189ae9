//! Habits of the repository that a compiler does not check: files that say what they are, no leftovers, tables that
//! list everything. Documents are `documents.rs`'s.
//!
//! Each rule is a function from names and texts to complaints, so that every rule is also tested on a planted fault.

use std::path::{Path, PathBuf};

use einfall::codegen::tables;

const MAX_LINES: usize = 1000;

/// Modules of lowering passes; all others are the file of `codegen/src/passes` that bears their name.
const LOWERING: &[(&str, &str)] = &[
    ("form-kernels", "codegen/src/lower/form/mod.rs"),
    ("launch-steps", "codegen/src/lower/cpu/launched.rs"),
    ("pack-operands", "codegen/src/lower/cpu/packed.rs"),
    ("apply-blocks", "codegen/src/lower/cpu/mod.rs"),
    ("lower-cpu", "codegen/src/lower/cpu/mod.rs"),
    ("split-streams", "codegen/src/lower/gpu/split_streams.rs"),
    ("lower-gpu", "codegen/src/lower/gpu/mod.rs"),
];

/// Files of `codegen/src/passes` that are no pass.
const NO_PASS: &[&str] = &["mod.rs", "rewrite.rs", "rewrite_tiles.rs"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files of the repository's own folders with one of `extensions`, relative to the root, with `/`.
fn files(extensions: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(root().join(&folder)).expect("a folder") {
            let entry = entry.expect("an entry");
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = folder.join(&name);
            if entry.file_type().expect("a type").is_dir() {
                if !name.starts_with('.') && name != "target" && name != "node_modules" {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|x| extensions.contains(&x.to_string_lossy().as_ref())) {
                found.push(path.components().map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/"));
            }
        }
    }
    found.sort();
    found
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// What one `.rs` file breaks.
fn source_complaints(path: &str, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut complain = |what: String| wrong.push(format!("{path}: {what}"));
    let after_attributes = text.lines().find(|l| !l.starts_with("#![") && !l.trim().is_empty()).unwrap_or_default();
    if !after_attributes.starts_with("//! ") {
        complain("does not open with `//!`".to_owned());
    }
    let n = text.lines().count();
    if n > MAX_LINES {
        complain(format!("{n} lines; split it"));
    }
    // Spelled in pieces, so that this file does not contain them.
    for leftover in
        [concat!("todo", "!("), concat!("unimplement", "ed!("), concat!("dbg", "!("), concat!("#[ign", "ore")]
    {
        if text.contains(leftover) {
            complain(format!("contains `{leftover}`"));
        }
    }
    wrong
}

/// Paths of a machine and hosts of package registries in any text.
fn machine_complaints(path: &str, text: &str) -> Vec<String> {
    let places = [
        concat!("/wo", "rk/"),
        concat!("/ro", "ot/"),
        concat!("/home", "/"),
        concat!("crates", ".io/"),
        concat!("index.crates", ".io"),
        concat!("pypi", ".org"),
        concat!("files.python", "hosted.org"),
        concat!("registry.npm", "js.org"),
        concat!("deb.deb", "ian.org"),
    ];
    let found = places.iter().filter(|p| text.contains(**p));
    found.map(|p| format!("{path}: names a machine's path or a registry's host: `{p}`")).collect()
}

#[test]
fn sources_open_with_what_they_are_and_hold_no_leftovers() {
    let wrong: Vec<String> = files(&["rs"]).iter().flat_map(|p| source_complaints(p, &read(p))).collect();
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn no_machine_shows() {
    let all = files(&[
        "rs", "md", "toml", "ein", "tile", "mapping", "kernel", "csp", "py", "json", "jsonl", "txt", "yml", "sh", "js",
        "mjs", "ts", "html", "expected",
    ]);
    let mut wrong: Vec<String> = all.iter().flat_map(|p| machine_complaints(p, &read(p))).collect();
    for path in ["Makefile", ".ci/run"] {
        if root().join(path).is_file() {
            wrong.extend(machine_complaints(path, &read(path)));
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn planted_faults_of_sources_are_found() {
    assert_eq!(source_complaints("a.rs", "//! What it is.\nfn f() {}\n").len(), 0);
    assert_eq!(source_complaints("a.rs", "#![allow(x)]\n\n//! What it is.\n").len(), 0);
    assert_eq!(source_complaints("a.rs", "fn f() {}\n").len(), 1);
    assert_eq!(source_complaints("a.rs", &format!("//! Long.\n{}", "\n".repeat(1000))).len(), 1);
    for word in ["todo", "unimplemented", "dbg"] {
        assert_eq!(source_complaints("a.rs", &format!("//! A.\nfn f() {{ {word}!() }}\n")).len(), 1, "{word}");
    }
    assert_eq!(source_complaints("a.rs", &format!("//! A.\n#[{}] fn f() {{}}\n", "ignore")).len(), 1);
    assert_eq!(machine_complaints("a.md", &format!("see /{}/x", "work")).len(), 1);
    assert_eq!(machine_complaints("a.md", &format!("https://{}.org/simple", "pypi")).len(), 1);
    assert_eq!(machine_complaints("a.md", "the package of PyPI").len(), 0);
}

/// Library files that are not listed, and names listed without a file.
fn library_complaints(files: &[String], listed: &[&str]) -> Vec<String> {
    let stem = |f: &String| f.trim_start_matches("kernels/").trim_end_matches(".ein").to_owned();
    let here: Vec<String> = files.iter().filter(|f| f.starts_with("kernels/")).map(stem).collect();
    let mut wrong: Vec<String> = here
        .iter()
        .filter(|h| !listed.contains(&h.as_str()))
        .map(|h| format!("kernels/{h}.ein is not listed"))
        .collect();
    wrong.extend(listed.iter().filter(|l| !here.iter().any(|h| h == *l)).map(|l| format!("{l} has no file")));
    wrong
}

#[test]
fn every_library_cascade_is_listed() {
    let listed: Vec<&str> = einfall::kernels::SOURCES.iter().map(|(name, _)| *name).collect();
    assert_eq!(library_complaints(&files(&["ein"]), &listed), Vec::<String>::new());
    let here = ["kernels/a.ein".to_owned(), "docs/b.ein".to_owned()];
    assert_eq!(library_complaints(&here, &["a"]).len(), 0);
    assert_eq!(library_complaints(&here, &[]).len(), 1);
    assert_eq!(library_complaints(&here, &["a", "c"]).len(), 1);
}

/// Passes without a reason or a module, and modules of passes that no table runs.
fn pass_complaints(passes: &[(&str, &str)], modules: &[String]) -> Vec<String> {
    let mut wrong = Vec::new();
    let file = |name: &str| match LOWERING.iter().find(|(n, _)| *n == name) {
        Some((_, path)) => (*path).to_owned(),
        None => format!("codegen/src/passes/{}.rs", name.replace('-', "_")),
    };
    for (name, why) in passes {
        if why.trim().len() < 10 {
            wrong.push(format!("{name}: no reason for its place"));
        }
        if !modules.contains(&file(name)) {
            wrong.push(format!("{name}: no module {}", file(name)));
        }
        let verb_noun = name.contains('-') && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
        if !verb_noun {
            wrong.push(format!("{name}: not verb-noun"));
        }
    }
    for module in modules.iter().filter(|m| m.starts_with("codegen/src/passes/")) {
        let name = module.trim_start_matches("codegen/src/passes/");
        if !NO_PASS.contains(&name) && !passes.iter().any(|(p, _)| file(p) == *module) {
            wrong.push(format!("{module}: in no table of codegen/src/tables.rs"));
        }
    }
    wrong
}

#[test]
fn every_pass_has_a_reason_and_a_module() {
    let passes: Vec<(&str, &str)> =
        tables::TO_TILE.iter().chain(tables::CPU).chain(tables::GPU).map(|p| (p.name, p.why)).collect();
    let modules = files(&["rs"]);
    assert_eq!(pass_complaints(&passes, &modules), Vec::<String>::new());
    let architecture = read("ARCHITECTURE.md");
    for (name, _) in &passes {
        assert!(architecture.contains(&format!("`{name}`")), "ARCHITECTURE.md does not name the pass {name}");
    }
    assert_eq!(pass_complaints(&[("lower-cpu", "")], &["codegen/src/lower/cpu/mod.rs".to_owned()]).len(), 1);
    assert_eq!(pass_complaints(&[("no-module", "first of all: reasons")], &[]).len(), 1);
    assert_eq!(pass_complaints(&[], &["codegen/src/passes/lost.rs".to_owned()]).len(), 1);
}
