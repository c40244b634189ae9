//! What `einfall run` says to bad input: each fault ends with its exit code and a message that names what is wrong.
//!
//! Invariant: a fault never writes an output file.
#![cfg(all(feature = "cli", feature = "cpu"))]

use std::path::Path;
use std::process::Command;

use einfall::arrays::write;
use einfall::runtime::HostArray;

const TEXT: &str = "cascade scale[M, N](x: f32[M,N], w: f32[N], k: i32, a: f32 = 2.0) -> (y: f32[M,N]) {
    require N <= 64
    y[m,n] = a * x[m,n] * w[n] + k
}
";

fn array(values: usize, shape: &[usize]) -> HostArray {
    let data: Vec<f32> = (0..values).map(|n| n as f32).collect();
    let shape: Vec<u64> = shape.iter().map(|n| *n as u64).collect();
    HostArray::from_slice(&data, &shape).expect("an array")
}

/// Exit code, standard output and standard error of `einfall run scale.ein ARGS` in `folder`.
fn run(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_einfall"))
        .args(["run", "scale.ein"])
        .args(args)
        .current_dir(folder)
        .env("EINFALL_CACHE", folder.join("cache"))
        .output()
        .expect("the binary starts");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (done.status.code().unwrap_or(-1), text(&done.stdout), text(&done.stderr))
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("scale.ein"), TEXT).expect("scale.ein");
    write(&at("x.npy"), &[("x", &array(6, &[2, 3]))]).expect("x");
    write(&at("w.npy"), &[("w", &array(3, &[3]))]).expect("w");
    write(&at("w4.npy"), &[("w", &array(4, &[4]))]).expect("w4");
    write(&at("wide.npy"), &[("w", &array(65, &[65]))]).expect("wide");
    write(&at("x65.npy"), &[("x", &array(65, &[1, 65]))]).expect("x65");
    write(&at("empty.npy"), &[("x", &array(0, &[0, 3]))]).expect("empty");
    let f64s = HostArray::from_slice(&[1.0f64, 2.0, 3.0], &[3]).expect("f64");
    write(&at("w64.npy"), &[("w", &f64s)]).expect("w64");
    write(&at("two.npz"), &[("x", &array(6, &[2, 3])), ("z", &array(3, &[3]))]).expect("two");
    let whole = std::fs::read(at("x.npy")).expect("x.npy");
    std::fs::write(at("short.npy"), &whole[..whole.len() - 4]).expect("short");
    std::fs::write(at("noise.npy"), b"no array at all").expect("noise");
    folder
}

#[test]
fn every_fault_is_named() {
    let folder = folder();
    let x = ["--input", "x=x.npy"];
    let w = ["--input", "w=w.npy"];
    let k = ["--set", "k=1"];
    let with = |parts: &[&[&'static str]]| parts.concat();
    // Arguments, exit code, what the message holds.
    let cases: Vec<(Vec<&str>, i32, &[&str])> = vec![
        (with(&[&x, &["--input", "w=w4.npy"], &k]), 1, &["N", "3", "4"]),
        (with(&[&["--input", "x=w.npy"], &w, &k]), 1, &["x is declared x[M, N]", "[3]"]),
        (with(&[&x, &["--input", "w=w64.npy"], &k]), 1, &["`w` is f32", "f64"]),
        (with(&[&x, &k]), 1, &["`w` is not given", "--random"]),
        (with(&[&x, &w]), 1, &["`k` is not given"]),
        (with(&[&x, &w, &k, &["--input", "q=w.npy"]]), 1, &["no parameter `q`", "x, w, k, a"]),
        (with(&[&w, &k, &["--inputs", "two.npz"]]), 1, &["no parameter `z`"]),
        (with(&[&w, &k, &["--input", "x=two.npz"]]), 2, &["two.npz holds 2 arrays", "--inputs"]),
        (with(&[&x, &x, &w, &k]), 2, &["`x` is given twice"]),
        (with(&[&x, &w, &["--set", "k=1.5"]]), 1, &["`k` is i32", "1.5"]),
        (with(&[&x, &["--set", "w=1,k=1"]]), 1, &["`w` is an array", "--input"]),
        (with(&[&x, &w, &k, &["--set", "u=1"]]), 1, &["no scalar parameter `u`"]),
        (with(&[&["--input", "x=x65.npy", "--input", "w=wide.npy"], &k]), 1, &["N <= 64"]),
        (with(&[&["--input", "x=short.npy"], &w, &k]), 1, &["short.npy"]),
        (with(&[&["--input", "x=noise.npy"], &w, &k]), 1, &["noise.npy"]),
        (with(&[&["--input", "x=none.npy"], &w, &k]), 1, &["none.npy"]),
        (with(&[&["--input", "x"], &w, &k]), 2, &["NAME=FILE"]),
        (vec!["--random", "1", "--size", "M=2"], 2, &["N"]),
        (vec!["--random", "1", "--size", "M=2,N=3,Q=4"], 1, &["Q"]),
        (vec!["--random", "1", "--size", "M=9223372036854775807,N=64"], 1, &[]),
        (vec!["--random", "1", "--size", "M=2,N=3", "--cascade", "other"], 2, &["other"]),
        (with(&[&x, &w, &k, &["--out", "no/folder/y.npy"]]), 3, &["no/folder/y.npy"]),
        (with(&[&x, &w, &k, &["--out", "y.txt"]]), 2, &["y.txt"]),
    ];
    let mut wrong = Vec::new();
    for (args, code, parts) in cases {
        let (got, _, said) = run(folder.path(), &args);
        if got != code || said.is_empty() || !parts.iter().all(|p| said.contains(p)) || said.contains("panicked") {
            wrong.push(format!("{args:?}: exit {got}, expected {code} and {parts:?}:\n{said}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(!folder.path().join("y.txt").exists() && !folder.path().join("y.npy").exists());
}

#[test]
fn what_fits_runs_and_is_written() {
    let folder = folder();
    let args = ["--input", "x=x.npy", "--input", "w=w.npy", "--set", "k=1", "--out", "y.npy", "--check"];
    let (code, out, err) = run(folder.path(), &args);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("y: f32[2, 3]"), "{out}");
    let y = einfall::arrays::read(&folder.path().join("y.npy"), &Default::default()).expect("y.npy").remove(0).1;
    assert_eq!(y.to_values().expect("values").data, [1.0, 3.0, 9.0, 1.0, 9.0, 21.0]);
    // Nothing to compute is no fault.
    let args = ["--input", "x=empty.npy", "--input", "w=w.npy", "--set", "k=1"];
    let (code, out, err) = run(folder.path(), &args);
    assert!(code == 0 && out.contains("y: f32[0, 3]"), "{out}{err}");
}
