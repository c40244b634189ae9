//! What every reader of bytes must keep, whatever the bytes: no panic, no hang, and what it prints reads back as the same.
//!
//! A target is a function of bytes that panics where its reader is wrong. cargo-fuzz runs each as a program of its own
//! (`fuzz_targets`), `tests/hostile.rs` runs all of them on damaged seeds and on what was found once. Invariant: a
//! target decides by the bytes alone; files it needs are its own and temporary.

use std::path::{Path, PathBuf};

use einfall::arrays::{self, Limits};
use einfall::autotune::csp;
use einfall::autotune::table::Table;
use einfall::codegen::backend::ptx;
use einfall::ir::artifact::Artifact;
use einfall::ir::diag::{self, Diagnostic, Severity};
use einfall::ir::target::DataSheet;
use einfall::ir::{cascade, kernel, mapping, tile};
use einfall::runtime::HostArray;
use einfall::runtime::cache::{Cache, Key};

/// A reader with what to begin from.
pub struct Target {
    /// Its name, of the program and of the folder of regressions.
    pub name: &'static str,
    /// Reads bytes, and panics where the reader is wrong.
    pub run: fn(&[u8]),
    /// Inputs that the reader accepts.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

impl Target {
    /// Inputs that were wrong once, by name.
    pub fn regressions(&self) -> Vec<(String, Vec<u8>)> {
        let Ok(folder) = std::fs::read_dir(root().join("fuzz/regressions").join(self.name)) else { return Vec::new() };
        let one = |entry: std::io::Result<std::fs::DirEntry>| {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            (name, std::fs::read(&path).expect("a file"))
        };
        let mut list: Vec<_> = folder.map(one).collect();
        list.sort();
        list
    }
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "artifact", run: artifact, seeds: artifacts },
    Target { name: "cache", run: cache, seeds: entries },
    Target { name: "cascade", run: cascade, seeds: || files(&["kernels", "tests/filetests"], "ein") },
    Target { name: "compile", run: compile, seeds: || files(&["kernels"], "ein") },
    Target { name: "csp", run: csp, seeds: || files(&["autotune/tests/data"], "csp") },
    Target { name: "kernel", run: kernel, seeds: || files(&["ir/src/kernel/testdata"], "kernel") },
    Target { name: "mapping", run: mapping, seeds: || files(&["tests/mappings"], "mapping") },
    Target { name: "npy", run: npy, seeds: || saved("npy") },
    Target { name: "npz", run: npz, seeds: || saved("npz") },
    Target { name: "safetensors", run: safetensors, seeds: || saved("safetensors") },
    Target { name: "sheet", run: sheet, seeds: || files(&["ir/data"], "toml") },
    Target { name: "table", run: table, seeds: || files(&["tables"], "toml") },
    Target { name: "tile", run: tile, seeds: || files(&["tests/plans"], "tile") },
];

/// One by its name.
pub fn named(name: &str) -> &'static Target {
    TARGETS.iter().find(|t| t.name == name).expect("a target of this name")
}

/// The repository's folder, from here or from the package beside.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().find(|p| p.join("kernels").is_dir()).expect("within the repository").to_owned()
}

/// Files under folders of the repository, by extension, in order.
fn files(folders: &[&str], extension: &str) -> Vec<Vec<u8>> {
    let mut paths = Vec::new();
    let mut open: Vec<PathBuf> = folders.iter().map(|f| root().join(f)).collect();
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|x| x == extension) {
                paths.push(path);
            }
        }
    }
    paths.sort();
    paths.iter().map(|p| std::fs::read(p).expect("a file")).collect()
}

/// Text of bytes; none where they are no UTF-8.
fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// Diagnostics point into the text, and are shown.
fn shown(diagnostics: &[Diagnostic], text: &str) {
    assert!(!diagnostics.is_empty(), "refused without a word");
    assert!(!diag::render(diagnostics, "fuzz", text).is_empty());
}

/// What is printed of what is read is a fixed point: it reads, and prints itself.
fn fixed<T, E: std::fmt::Debug>(read: &T, parse: impl Fn(&str) -> Result<T, E>, print: impl Fn(&T) -> String) {
    let once = print(read);
    let again = parse(&once).unwrap_or_else(|e| panic!("what is printed does not read: {e:?}\n{once}"));
    assert_eq!(print(&again), once, "what is printed reads as something else");
}

fn cascade(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    let (module, diagnostics) = cascade::check(text);
    assert_eq!(module.is_none(), diagnostics.iter().any(|d| d.severity == Severity::Error));
    match &module {
        Some(module) => {
            fixed(module, cascade::parse, cascade::print);
            for c in &module.cascades {
                assert!(cascade::verify(c).iter().all(|d| d.severity == Severity::Warning), "read, and not verified");
            }
        }
        None => shown(&diagnostics, text),
    }
    if let Ok(laid_out) = cascade::format(text) {
        assert_eq!(cascade::format(&laid_out).as_ref(), Ok(&laid_out), "laid out twice, it differs");
        assert_eq!(cascade::check(&laid_out).0.is_some(), module.is_some(), "laid out, it means something else");
    }
}

/// Cascades that are read are lowered to a plan or refused with diagnostics; the plan prints and parses.
fn compile(bytes: &[u8]) {
    let Some(text) = text(bytes).filter(|t| t.len() < 4096) else { return };
    let Ok(module) = cascade::parse(text) else { return };
    for c in &module.cascades {
        match einfall::plan(c) {
            Ok(plan) => fixed(&plan, tile::parse::parse, ToString::to_string),
            Err(einfall::Error::Refused { diagnostics, .. }) => shown(&diagnostics, text),
            Err(e) => panic!("{e}"),
        }
    }
}

fn tile(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    match tile::parse::parse(text) {
        Ok(plan) => {
            fixed(&plan, tile::parse::parse, ToString::to_string);
            let _ = tile::verify::verify(&plan);
        }
        Err(d) => shown(&[d], text),
    }
}

fn mapping(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    match mapping::parse::parse(text) {
        Ok(m) => fixed(&m, mapping::parse::parse, ToString::to_string),
        Err(d) => shown(&[d], text),
    }
}

fn kernel(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    match kernel::parse::parse(text) {
        Ok(module) => {
            fixed(&module, kernel::parse::parse, kernel::print::print);
            let limits = kernel::verify::Limits { shared_bytes: 1 << 18, registers: 1 << 16, threads: 1 << 10 };
            let _ = kernel::verify::verify(&module, &limits);
        }
        Err(d) => shown(&d, text),
    }
}

fn csp(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    match csp::text::parse(text) {
        Ok(model) => fixed(&model, csp::text::parse, csp::text::print),
        Err(d) => shown(&d, text),
    }
}

fn table(bytes: &[u8]) {
    if let Ok(table) = Table::parse(bytes) {
        let printed = table.to_string();
        assert_eq!(Table::parse(printed.as_bytes()).as_ref(), Ok(&table), "{printed}");
    }
}

fn sheet(bytes: &[u8]) {
    if let Some(Err(e)) = text(bytes).map(DataSheet::parse) {
        assert!(!e.to_string().is_empty());
    }
}

fn artifact(bytes: &[u8]) {
    if let Ok(a) = Artifact::from_bytes(bytes) {
        let again = Artifact::from_bytes(&a.to_bytes().expect("what was read is written"));
        // By text, as a NaN in a default differs from itself.
        assert_eq!(format!("{:?}", again.expect("what was written is read")), format!("{a:?}"));
    }
}

/// An entry of the cache: the file as it is, and its bytes as a payload.
fn cache(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cache = Cache::open(&folder.path().join("cache")).expect("a folder of one's own");
    let key = entry_key();
    let path = cache.path().join(format!("{key}.entry"));
    std::fs::write(&path, bytes).expect("a file");
    match cache.get(&key) {
        // Only what is in the file, behind a header.
        Some(payload) => assert!(bytes.ends_with(&payload) && payload.len() < bytes.len()),
        None => assert!(!path.exists(), "a refused entry stays"),
    }
    cache.put(&key, bytes).expect("an entry");
    assert_eq!(cache.get(&key).as_deref(), Some(bytes));
}

fn entry_key() -> Key {
    Key::of(&[b"fuzz"])
}

fn entries() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cache = Cache::open(&folder.path().join("cache")).expect("a folder of one's own");
    let one = |payload: &[u8]| {
        cache.put(&entry_key(), payload).expect("an entry");
        std::fs::read(cache.path().join(format!("{}.entry", entry_key()))).expect("the entry's file")
    };
    vec![one(b""), one(b"some machine code")]
}

fn npy(bytes: &[u8]) {
    array_file(bytes, "npy");
}

fn npz(bytes: &[u8]) {
    array_file(bytes, "npz");
}

fn safetensors(bytes: &[u8]) {
    array_file(bytes, "safetensors");
}

/// Arrays are whole, as large as they say, within the limits, and the same when they are written and read again.
fn array_file(bytes: &[u8], extension: &str) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join(format!("x.{extension}"));
    std::fs::write(&path, bytes).expect("a file");
    let limits = Limits { total_bytes: 1 << 20, arrays: 16 };
    match arrays::read(&path, &limits) {
        Ok(read) => {
            let held: u64 = read.iter().map(|(_, a)| a.bytes().len() as u64).sum();
            assert!(held <= limits.total_bytes && read.len() <= limits.arrays);
            assert!(read.iter().all(|(_, a)| a.bytes().len() as u64 == a.dtype().bytes(a.elems())));
            let given: Vec<(&str, &HostArray)> = read.iter().map(|(n, a)| (n.as_str(), a)).collect();
            // Names that the other format cannot hold are refused with a word.
            if arrays::write(&path, &given).is_ok() {
                let again = arrays::read(&path, &limits).expect("what was written is read");
                let by_name = |mut list: Vec<(String, HostArray)>| {
                    list.sort_by(|a, b| a.0.cmp(&b.0));
                    list
                };
                assert_eq!(by_name(again), by_name(read));
            }
        }
        Err(e) => assert!(e.to_string().contains("x."), "{e}"),
    }
}

fn saved(extension: &str) -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join(format!("x.{extension}"));
    let ints = HostArray::from_slice(&[1i32, 2, 3, 4, 5, 6], &[2, 3]).expect("six elements");
    let floats = HostArray::from_slice(&[0.5f32; 5], &[5]).expect("five elements");
    let scalar = HostArray::from_slice(&[7u8], &[]).expect("one element");
    let mut seeds = Vec::new();
    let one = [("x", &ints)];
    let three = [("x", &ints), ("y", &floats), ("z", &scalar)];
    for list in [&one[..], &[("x", &floats)], &[("x", &scalar)], &three] {
        if extension != "npy" || list.len() == 1 {
            arrays::write(&path, list).expect("arrays are written");
            seeds.push(std::fs::read(&path).expect("the file"));
        }
    }
    seeds
}

fn artifacts() -> Vec<Vec<u8>> {
    let file = |path: &str| std::fs::read_to_string(root().join("tests").join(path)).expect("a file");
    let cases = [("plans/gemm.tile", "mappings/gemm.mapping"), ("plans/attention.tile", "mappings/attention.mapping")];
    let made = cases.iter().map(|(plan, by)| {
        let plan = tile::parse::parse(&file(plan)).expect("a plan");
        let by = mapping::parse::parse(&file(by)).expect("a mapping");
        let artifact = einfall::compile_ptx(&plan, &by, &ptx::Target::sm_90a()).expect("PTX");
        artifact.to_bytes().expect("bytes")
    });
    made.collect()
}
