//! Ahead of time: the example, a scaffolded crate and the command line's artefacts, against the float64 evaluator.
//!
//! The crates are built as a user would, without the network, in a target folder that they share and keep.
#![cfg(feature = "cli")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use einfall::ir::array::Array;
use einfall::ir::cascade::bind::{Bindings, Given, bind, fill_defaults};
use einfall::ir::cascade::{Cascade, eval, parse};
use einfall::ir::tolerance::{expect, inputs};
use einfall::runtime::HostArray;

/// The example's program, stripped, at most.
const MAX_BYTES: u64 = 3 << 20;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Where ahead-of-time crates are built: the dependencies are compiled once for all of them.
fn target() -> PathBuf {
    root().join("target/aot")
}

/// NVIDIA's assembler, which `make ptxas` brings.
fn ptxas() -> PathBuf {
    let found = root().ancestors().map(|d| d.join("target/ptxas/nvidia/cu13/bin/ptxas")).find(|p| p.exists());
    found.expect("`make ptxas` was run")
}

/// Cargo lets one build at a time into the target folder.
fn build(folder: &Path) -> Output {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--release", "--offline", "--color=never"]).current_dir(folder);
    command.env("CARGO_TARGET_DIR", target()).env("EINFALL_PTXAS", ptxas()).output().expect("cargo runs")
}

fn built(folder: &Path) -> String {
    let output = build(folder);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

/// Runs a program on bytes.
fn run(program: &Path, args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{}: {e}", program.display()));
    child.stdin.take().expect("a pipe").write_all(input).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A cascade at sizes with random arrays: scalars have their defaults.
struct Case {
    cascade: Cascade,
    bindings: Bindings,
    values: Vec<Array>,
}

impl Case {
    fn new(text: &str, sizes: &[(&str, u64)], seed: u64) -> Case {
        let cascade = parse(text).unwrap_or_else(|d| panic!("{d:?}")).cascades.remove(0);
        let sizes = sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
        let bindings = bind(&cascade, &Given { sizes, ..Given::default() }).unwrap();
        let drawn = inputs::random(&cascade, &bindings, seed, inputs::Variant::Normal).unwrap();
        let scalar = |a: &Array| a.dims.is_empty();
        let given: Vec<Option<Array>> = drawn.into_iter().map(|a| (!scalar(&a)).then_some(a)).collect();
        let values = fill_defaults(&cascade, &bindings, &given).unwrap();
        Case { cascade, bindings, values }
    }

    /// The arrays' bytes, one after another.
    fn bytes(&self) -> Vec<u8> {
        let arrays = self.values.iter().filter(|a| !a.dims.is_empty());
        arrays.flat_map(|a| HostArray::from_values(a).unwrap().bytes().to_vec()).collect()
    }

    /// Compares the only output, f32, with float64.
    fn check(&self, found: &[f32]) {
        let expected = expect(&self.cascade, &self.bindings, &self.values, &eval::Options::default()).unwrap();
        let found: Vec<f64> = found.iter().map(|v| f64::from(*v)).collect();
        expected[0].compare(&found).unwrap_or_else(|m| panic!("{}: {m}", self.cascade.name));
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (chunks, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty());
    chunks.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn the_example_computes_and_holds_no_compiler() {
    let folder = root().join("examples/aot");
    built(&folder);
    let program = target().join("release/aot");

    let attend = std::fs::read_to_string(folder.join("kernels/attend.ein")).unwrap();
    for (seed, [m, n]) in [[1u64, 1], [7, 33], [128, 257]].into_iter().enumerate() {
        let case = Case::new(&attend, &[("M", m), ("N", n), ("E", 64), ("F", 64)], seed as u64);
        case.check(&floats(&run(&program, &["attend", &m.to_string(), &n.to_string()], &case.bytes())));
    }
    let normalise = std::fs::read_to_string(folder.join("kernels/normalise.ein")).unwrap();
    for (seed, [m, n]) in [[3u64, 5], [64, 384]].into_iter().enumerate() {
        let case = Case::new(&normalise, &[("M", m), ("N", n)], seed as u64);
        case.check(&floats(&run(&program, &["normalise", &m.to_string(), &n.to_string()], &case.bytes())));
    }

    let bytes = std::fs::read(&program).unwrap();
    assert!(bytes.len() as u64 <= MAX_BYTES, "the program has {} bytes", bytes.len());
    let holds = |what: &str| bytes.windows(what.len()).any(|w| w == what.as_bytes());
    // The kernels are there, and PTX for both architectures.
    assert!(holds(".target sm_80") && holds(".target sm_90a"));
    // Machine code of both cascades for both: ELF files for CUDA, machine 190.
    let cubins = bytes.windows(20).filter(|w| w[..4] == *b"\x7fELF" && w[18..] == [190, 0]).count();
    assert_eq!(cubins, 4, "of {} bytes", bytes.len());
    // What LLVM-C is called by, what it is found by, and what passes and the language's parser say.
    for what in ["LLVMContextCreate", "LLVMOrc", "libLLVM", "form-kernels", "fold-exponents", "E0101"] {
        assert!(!holds(what), "the program holds `{what}`");
    }
}

#[test]
fn a_new_crate_builds_computes_and_says_what_is_wrong() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("first-kernels");
    let einfall = Command::new(env!("CARGO_BIN_EXE_einfall"))
        .arg("new")
        .arg(&folder)
        .arg("--einfall")
        .arg(root())
        .output()
        .unwrap();
    assert!(einfall.status.success(), "{}", String::from_utf8_lossy(&einfall.stderr));
    // The versions that are here, as there is no network.
    std::fs::copy(root().join("examples/aot/Cargo.lock"), folder.join("Cargo.lock")).unwrap();

    built(&folder);
    let kernel = folder.join("kernels/softmax.ein");
    let text = std::fs::read_to_string(&kernel).unwrap();
    let case = Case::new(&text, &[("M", 3), ("N", 21)], 5);
    let rows = case.values[0]
        .data
        .chunks(21)
        .map(|row| row.iter().map(|v| (*v as f32).to_string()).collect::<Vec<_>>().join(" "));
    let input = rows.collect::<Vec<_>>().join("\n");
    let program = target().join("release/first-kernels");
    let compute = || {
        let out = String::from_utf8(run(&program, &[], input.as_bytes())).unwrap();
        out.split_whitespace().map(|v| v.parse().unwrap()).collect::<Vec<f32>>()
    };
    case.check(&compute());

    // Nothing changed: nothing runs. A changed file: it is compiled again.
    assert!(!built(&folder).contains("Compiling"));
    let doubled = text.replace("exp(x[m,n] - a[m])", "exp(2.0 * (x[m,n] - a[m]))");
    assert_ne!(doubled, text);
    std::fs::write(&kernel, &doubled).unwrap();
    assert!(built(&folder).contains("Compiling first-kernels"));
    Case { cascade: parse(&doubled).unwrap().cascades.remove(0), ..case }.check(&compute());

    // A wrong file: cargo's own error, with the place.
    std::fs::write(&kernel, text.replace("/ s[m]", "/ t[m]")).unwrap();
    let output = build(&folder);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    let line = said.lines().find(|l| l.starts_with("error")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains("kernels/softmax.ein:8:23: E0230") && line.contains("`t`"), "{said}");

    // Types are checked by rustc: an array of another element type.
    std::fs::write(&kernel, text.replace("x: f32", "x: f16")).unwrap();
    let output = build(&folder);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("E0271") || said.contains("E0308") || said.contains("E0277"),
        "{said}"
    );
}

/// The C program that the header is tried with: arrays from standard input, the result to standard output.
const MAIN_C: &str = r#"
#include "einfall.h"
#include <stdio.h>
int main(int argc, char **argv) {
    int64_t m = atoll(argv[1]), n = atoll(argv[2]);
    float *q = malloc(4 * m * 64 + 4), *k = malloc(4 * n * 64 + 4), *v = malloc(4 * n * 64 + 4), *o = malloc(4 * m * 64 + 4);
    if (fread(q, 256, m, stdin) != (size_t)m || fread(k, 256, n, stdin) != (size_t)n || fread(v, 256, n, stdin) != (size_t)n)
        return 2;
    if (attend_x86_64_v3(q, k, v, 0.125, o, m, n) != 0)
        return 3;
    return fwrite(o, 256, m, stdout) == (size_t)m ? 0 : 4;
}
"#;

#[test]
fn compiled_artefacts_serve_c() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let file = root().join("examples/aot/kernels/attend.ein");
    let compiled = Command::new(env!("CARGO_BIN_EXE_einfall"))
        .arg("compile")
        .arg(&file)
        .args(["--target", "x86-64-v3,aarch64,sm_80", "--static", "E=64,F=64", "--out"])
        .arg(&out)
        .arg("--ptxas")
        .arg(ptxas())
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    for name in [
        "attend.sm_80.ptx",
        "attend.sm_80.cubin",
        "attend.aarch64.o",
        "attend.x86-64-v3.artifact",
        "einfall.rs",
        "libeinfall_kernels.a",
    ] {
        assert!(out.join(name).exists(), "{name} is missing");
    }
    let artifact = std::fs::read(out.join("attend.sm_80.artifact")).unwrap();
    let artifact = einfall::ir::artifact::Artifact::from_bytes(&artifact).unwrap();
    assert_eq!((artifact.facts.len(), artifact.defaults.len()), (1, 1));
    // An ELF object for 64-bit Arm: machine 183.
    assert_eq!(std::fs::read(out.join("attend.aarch64.o")).unwrap()[18..20], [183, 0]);

    let detected = einfall::runtime::Level::X86_64V3.detected();
    if !(cfg!(target_os = "linux") && detected) {
        return;
    }
    std::fs::write(out.join("main.c"), MAIN_C).unwrap();
    let program = out.join("main");
    let cc = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Werror", "-O1", "main.c", "libeinfall_kernels.a", "-o", "main"])
        .current_dir(&out)
        .output()
        .expect("the C compiler that rustc links with");
    assert!(cc.status.success(), "{}", String::from_utf8_lossy(&cc.stderr));
    let text = std::fs::read_to_string(&file).unwrap();
    for (seed, [m, n]) in [[1u64, 1], [9, 130]].into_iter().enumerate() {
        let case = Case::new(&text, &[("M", m), ("N", n), ("E", 64), ("F", 64)], seed as u64);
        case.check(&floats(&run(&program, &[&m.to_string(), &n.to_string()], &case.bytes())));
    }
}
