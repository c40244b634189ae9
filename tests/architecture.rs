//! The dependency arrows of ARCHITECTURE.md, read from `cargo metadata`, and who may read the environment.
//!
//! Invariant: the tables here are the whole list; a new package or a new arrow fails until it is entered.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand, Package};

/// Package, its folder, and the packages of this workspace it may build on.
const ARROWS: &[(&str, &str, &[&str])] = &[
    ("einfall-ir", "ir", &[]),
    ("einfall-llvm", "codegen/llvm", &[]),
    ("einfall-codegen", "codegen", &["einfall-ir", "einfall-llvm"]),
    ("einfall-autotune", "autotune", &["einfall-ir"]),
    ("einfall-kernels", "kernels", &["einfall-ir"]),
    ("einfall-runtime", "runtime", &["einfall-ir", "einfall-llvm"]),
    ("einfall", "", &["einfall-ir", "einfall-codegen", "einfall-autotune", "einfall-kernels", "einfall-runtime"]),
];

/// Further arrows that tests alone may use.
const TEST_ARROWS: &[(&str, &str, &str)] = &[
    ("einfall-codegen", "einfall-kernels", "lowering is tested on the library's cascades"),
    ("einfall-codegen", "einfall-llvm", "emitted text is compiled and run"),
    ("einfall-codegen", "einfall-autotune", "every mapping that the model admits is lowered"),
];

/// Applications of the workspace: they may use the facade and nothing below it.
const APPLICATIONS: &str = "examples";

/// Files outside of tests that may read the environment, and why.
const ENVIRONMENT: &[(&str, &str)] = &[
    ("ir/build.rs", "cargo tells build scripts by the environment"),
    ("src/build/mod.rs", "cargo tells build scripts by the environment"),
    ("src/options.rs", "Options::from_env is the one place"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn packages() -> Vec<Package> {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .other_options(vec!["--offline".to_owned()])
        .exec()
        .expect("cargo metadata");
    metadata.packages
}

/// The folder of a package, relative to the root, with `/`.
fn folder(p: &Package) -> String {
    let folder = p.manifest_path.parent().expect("a manifest lies in a folder").as_std_path();
    let relative = folder.strip_prefix(root()).expect("packages lie in the workspace");
    relative.components().map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
}

/// What `packages` break of the tables above, one line each.
/// A package: its name, its folder, and the packages of ours it depends on (and whether for tests only).
type Declared = (String, String, Vec<(String, bool)>);

fn violations(packages: &[Declared]) -> Vec<String> {
    let ours: BTreeSet<&str> = packages.iter().map(|(name, ..)| name.as_str()).collect();
    let mut wrong = Vec::new();
    for (name, at, dependencies) in packages {
        let application = at.starts_with(&format!("{APPLICATIONS}/"));
        let allowed: &[&str] = match ARROWS.iter().find(|(n, ..)| n == name) {
            Some((_, expected, allowed)) => {
                if at != expected {
                    wrong.push(format!("{name} lies in {at:?}, not in {expected:?}"));
                }
                allowed
            }
            None if application => &["einfall"],
            None => {
                wrong.push(format!("{name} is not in the table of arrows"));
                continue;
            }
        };
        for (on, for_tests) in dependencies.iter().filter(|(on, _)| ours.contains(on.as_str())) {
            let in_tests = *for_tests && TEST_ARROWS.iter().any(|(a, b, _)| a == name && b == on);
            if !allowed.contains(&on.as_str()) && !in_tests {
                let kind = if *for_tests { "its tests use" } else { "it depends on" };
                wrong.push(format!("{name}: {kind} {on}, which ARCHITECTURE.md rules out"));
            }
        }
    }
    for (name, ..) in ARROWS {
        if !ours.contains(name) {
            wrong.push(format!("{name} is in the table of arrows and not in the workspace"));
        }
    }
    wrong
}

#[test]
fn packages_depend_only_along_the_arrows() {
    let packages: Vec<_> = packages()
        .iter()
        .map(|p| {
            let on = p.dependencies.iter().map(|d| (d.name.clone(), d.kind == DependencyKind::Development));
            (p.name.to_string(), folder(p), on.collect())
        })
        .collect();
    assert_eq!(violations(&packages), Vec::<String>::new());
}

#[test]
fn a_wrong_arrow_is_found() {
    let plain: Vec<Declared> = ARROWS
        .iter()
        .map(|(n, f, on)| (n.to_string(), f.to_string(), on.iter().map(|o| (o.to_string(), false)).collect()))
        .collect();
    assert_eq!(violations(&plain), Vec::<String>::new());
    let with = |from: &str, on: &str, for_tests: bool| {
        let mut p = plain.clone();
        p.iter_mut().find(|(n, ..)| n == from).expect("a package").2.push((on.to_owned(), for_tests));
        violations(&p).len()
    };
    assert_eq!(with("einfall-ir", "einfall-codegen", false), 1);
    assert_eq!(with("einfall-ir", "einfall-kernels", true), 1);
    assert_eq!(with("einfall-runtime", "einfall-codegen", false), 1);
    assert_eq!(with("einfall-llvm", "einfall-ir", false), 1);
    assert_eq!(with("einfall-codegen", "einfall-kernels", false), 1);
    assert_eq!(with("einfall-codegen", "einfall-kernels", true), 0);
    let mut moved = plain.clone();
    moved[0].1 = "elsewhere".to_owned();
    assert_eq!(violations(&moved).len(), 1);
}

/// Every `.rs` file of the repository's own folders, relative to the root.
fn sources() -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![root().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if path.is_dir() && !name.starts_with('.') && name != "target" {
                folders.push(path);
            } else if path.extension().is_some_and(|x| x == "rs") {
                files.push(path.strip_prefix(root()).expect("below the root").to_path_buf());
            }
        }
    }
    files.sort();
    files
}

/// Whether a file is only built for tests or benches.
fn for_tests(path: &Path) -> bool {
    path.components().any(|c| matches!(c.as_os_str().to_str(), Some("tests" | "benches")))
        || path.file_name().is_some_and(|f| f == "tests.rs")
}

#[test]
fn the_environment_is_read_in_one_place() {
    let readers = ["env::var", "env::vars", "env::set_var", "option_env!"];
    let mut wrong = Vec::new();
    for path in sources().iter().filter(|p| !for_tests(p)) {
        let text = std::fs::read_to_string(root().join(path)).expect("a file");
        let reads =
            text.lines().any(|line| !line.trim_start().starts_with("//") && readers.iter().any(|r| line.contains(r)));
        let listed = ENVIRONMENT.iter().any(|(file, _)| Path::new(file) == path);
        if reads != listed {
            wrong.push(format!("{}: reads the environment: {reads}; listed: {listed}", path.display()));
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}
