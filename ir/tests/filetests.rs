//! Filetests of the cascade language: a text in, its expected text out in the sibling `.expected` file.
//!
//! The first line of a file says what to run: `// format` (the formatter), `// print` (parse, resolve, verify and print),
//! or `// diagnostics: CODES` (the rendered diagnostics, and exactly these codes). Files that parse also run printed and
//! parsed again. `BLESS=1` rewrites the expected files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use einfall_ir::cascade::{check, format, parse, print};
use einfall_ir::diag::render;

fn files(folder: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/filetests").join(folder);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&root)
        .unwrap_or_else(|e| panic!("{}: {e}", root.display()))
        .map(|f| f.unwrap().path())
        .filter(|f| f.extension().is_some_and(|x| x == "ein"))
        .collect();
    files.sort();
    files
}

fn produce(name: &str, text: &str) -> String {
    let command = text.lines().next().and_then(|l| l.strip_prefix("// ")).unwrap_or("");
    match command.split_once(": ").unwrap_or((command, "")) {
        ("format", _) => {
            let once = format(text).unwrap_or_else(|d| panic!("{}", render(&d, name, text)));
            assert_eq!(once, format(&once).unwrap(), "{name}: formatting is not idempotent");
            assert_eq!(reprinted(name, text), reprinted(name, &once), "{name}: formatting changed the meaning");
            once
        }
        ("print", _) => reprinted(name, text),
        ("diagnostics", codes) => {
            let (_, diagnostics) = check(text);
            let found: BTreeSet<&str> = diagnostics.iter().map(|d| d.code).collect();
            assert_eq!(found, codes.split(' ').collect(), "{name}:\n{}", render(&diagnostics, name, text));
            for d in &diagnostics {
                assert!(d.help.is_some(), "{name}: {d} does not say what to write instead");
            }
            render(&diagnostics, name, text)
        }
        (other, _) => panic!("{name}: unknown command `{other}`"),
    }
}

/// The printed module, which parses and prints to itself.
fn reprinted(name: &str, text: &str) -> String {
    let module = parse(text).unwrap_or_else(|d| panic!("{}", render(&d, name, text)));
    let once = print(&module);
    let again = parse(&once).unwrap_or_else(|d| panic!("printed text does not parse\n{}", render(&d, name, &once)));
    assert_eq!(once, print(&again), "{name}");
    once
}

fn run(folder: &str) -> usize {
    let bless = std::env::var_os("BLESS").is_some();
    let files = files(folder);
    let mut wrong = Vec::new();
    for file in &files {
        let name = file.file_name().unwrap().to_str().unwrap();
        let text = std::fs::read_to_string(file).unwrap();
        let Ok(found) = std::panic::catch_unwind(|| produce(name, &text)) else {
            wrong.push(format!("{name}: see above"));
            continue;
        };
        let expected_file = file.with_extension("expected");
        if bless {
            std::fs::write(&expected_file, &found).unwrap();
        } else if std::fs::read_to_string(&expected_file).unwrap_or_default() != found {
            wrong.push(format!("{name}: found\n{found}\nbut {} says otherwise", expected_file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    files.len()
}

#[test]
fn format_and_keep_comments() {
    assert!(run("parse") > 0);
}

#[test]
fn resolve_verify_and_print() {
    assert!(run("verify") > 0);
}

#[test]
fn wrong_programs_are_explained() {
    assert!(run("errors") >= 25);
}
