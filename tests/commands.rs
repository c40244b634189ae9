//! What the commands say to wrong input, under snapshot, and what `explain --json` fills in for a target.
//!
//! Invariant: a command ends with its exit code and a message that says what is wrong; it never panics. With `BLESS=1`
//! the snapshot is written anew.
#![cfg(all(feature = "cli", feature = "cpu"))]

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const GOOD: &str = "cascade scale[M, N](x: f32[M, N]) -> (y: f32[M, N]) {\n    y[m,n] = 2.0 * x[m,n]\n}\n";
const WRONG: &str = "cascade bad[M](x: f32[M]) -> (y: f32[M]) {\n    y[m] = x[q]\n}\n";
const UNLOWERED: &str = "cascade blocks[M](W: i8[M] scaled(f32, 32)) -> (y: f32[M]) {\n    y[m] = f32(W[m])\n}\n";

/// Exit code, standard output and standard error of `einfall ARGS` in `folder`.
fn einfall(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_einfall"))
        .args(args)
        .current_dir(folder)
        .env("EINFALL_CACHE", folder.join("cache"))
        .output()
        .expect("the binary starts");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (done.status.code().unwrap_or(-1), text(&done.stdout), text(&done.stderr))
}

#[test]
fn messages_are_those_of_the_snapshot() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("cache")).expect("a folder");
    for (name, text) in [
        ("ok.ein", GOOD),
        ("bad.ein", WRONG),
        ("blocks.ein", UNLOWERED),
        ("noise.mapping", "what is this"),
        ("plan.mapping", "mapping other on cpu {\n    kernel scale_0 {\n        axis m block 4\n    }\n}\n"),
        ("kernel.mapping", "mapping scale on cpu {\n    kernel nothing {\n        axis m block 4\n    }\n}\n"),
        (
            "cluster.mapping",
            "mapping scale on cpu {\n    kernel scale_0 {\n        axis m block 4 cluster 2\n    }\n}\n",
        ),
        ("empty.jsonl", "{\"family\": \"env\"}\n"),
        ("sizes.txt", "other: M=2\n"),
        ("wrong.toml", "name = \"wrong\"\n"),
    ] {
        std::fs::write(folder.path().join(name), text).expect("a file");
    }
    let commands = [
        "check",
        "check none.ein",
        "check bad.ein",
        "check ok.ein bad.ein",
        "fmt none.ein",
        "explain ok.ein --size M=x",
        "explain ok.ein --size Q=2",
        "explain ok.ein --size M=2,N=3 --target toaster",
        "explain bad.ein --size M=2",
        "lower ok.ein --stop-after nothing",
        "lower bad.ein",
        "lower blocks.ein",
        "lower ok.ein --mapping none.mapping",
        "lower ok.ein --mapping noise.mapping",
        "lower ok.ein --mapping plan.mapping",
        "lower ok.ein --mapping kernel.mapping",
        "lower ok.ein --target gpu --mapping kernel.mapping",
        "explain ok.ein --target h100 --why-not plan.mapping",
        "explain ok.ein --target h100 --why-not kernel.mapping",
        "explain ok.ein --why-not kernel.mapping",
        "explain ok.ein --why-not cluster.mapping",
        "bisect ok.ein",
        "bisect ok.ein --size M=2",
        "bisect bad.ein --size M=2",
        "run none.ein",
        "run ok.ein",
        "run bad.ein --random 1 --size M=1",
        "run blocks.ein --random 1 --size M=1",
        "run ok.ein --random 1 --size M=2,N=2 --device toaster",
        "run ok.ein --random 1 --size M=2,N=2 --device wgpu",
        "run ok.ein --random x --size M=2,N=2",
        "run ok --random 1 --size M=2,N=2",
        "run ok.ein --random 1",
        "run ok.ein --random 1 --size M=1000000000,N=1000000000",
        "run ok.ein --random 1 --size M=2,N=2 --device reference --mapping plan.mapping",
        "run ok.ein --random 1 --size M=2,N=2 --out y.txt",
        "run ok.ein --random 1 --size M=2,N=2 --out nowhere/y.npy",
        "lower ok.ein --size Q=2",
        "bench --device cpu --family none",
        "bench ok.ein",
        "bench none.ein --size M=2",
        "bench ok.ein --size M=2",
        "bench ok.ein --size M=2,N=2 --device cuda",
        "bench ok.ein --size M=2,N=2 --mapping kernel.mapping",
        "explain ok.ein --target none.toml",
        "explain ok.ein --target wrong.toml",
        "lower ok.ein --target none.toml",
        "selftest --device toaster",
        "csp none.csp",
        "report none.jsonl",
        "report empty.jsonl",
        "tune ok.ein --sizes none",
        "tune ok.ein --sizes M=2,Q=2",
        "tune ok.ein --sizes sizes.txt",
        "tune ok.ein --sizes M=2,N=2 --device toaster",
        "tables show none.toml",
        "check cache",
        "frobnicate",
    ];
    let mut have = String::new();
    for command in commands {
        let args: Vec<&str> = command.split_whitespace().collect();
        let (code, _, said) = einfall(folder.path(), &args);
        assert!(code > 0 && code <= 3 && !said.contains("panicked"), "{command}: exit {code}\n{said}");
        writeln!(have, "$ einfall {command}\n{said}exit {code}\n").expect("a string");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/filetests/commands/messages.expected");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &have).expect("the snapshot");
    }
    let want = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(have, want, "run again with BLESS=1 to accept");
}

#[test]
fn right_input_is_silent_on_standard_error() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("ok.ein"), GOOD).expect("a file");
    for command in [
        "check ok.ein",
        "fmt ok.ein",
        "explain ok.ein",
        "passes",
        "lower ok.ein",
        "bisect ok.ein --size M=3,N=5",
        "run ok.ein --random 1 --size M=3,N=5 --check --device reference",
        "cache path",
    ] {
        let args: Vec<&str> = command.split_whitespace().collect();
        let (code, out, said) = einfall(folder.path(), &args);
        assert_eq!((code, said.as_str()), (0, ""), "{command}");
        assert!(!out.is_empty() || command.starts_with("check") || command.starts_with("fmt"), "{command}");
    }
    assert_eq!(std::fs::read_to_string(folder.path().join("ok.ein")).expect("a file"), GOOD);
}

/// The values of the schema that a target fills in: each mapped level's bytes, their ratio to the bound, the time.
#[test]
fn explain_fills_in_what_a_target_adds() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cases = [
        ("kernels/attention.ein", "B=1,G=2,R=2,M=256,N=256", "E=64,F=64"),
        ("kernels/matmul.ein", "M=512,N=512,K=256", ""),
        ("kernels/layernorm_matmul.ein", "M=256,N=256,K=256", ""),
    ];
    for (file, sizes, fixed) in cases {
        for target in ["cpu", "x86-64-v3", "h100"] {
            let mut args = vec!["explain", file, "--size", sizes, "--target", target, "--json"];
            if !fixed.is_empty() {
                args.extend(["--static", fixed]);
            }
            let (code, out, said) = einfall(root, &args);
            assert_eq!(code, 0, "{file} on {target}: {said}");
            let json: Value = serde_json::from_str(&out).expect("JSON");
            assert_eq!((&json["schema"], &json["version"]), (&"einfall-explain".into(), &1.into()));
            let c = &json["cascades"][0];
            assert_eq!(c["kernels"], 1, "{file} on {target}");
            assert!(c["predicted_us"].as_f64().is_some_and(|t| t > 0.0), "{file} on {target}: {c}");
            assert!(c["mapping"].as_str().is_some_and(|m| m.contains("kernel")), "{file} on {target}");
            let mapped: Vec<&Value> =
                c["io"].as_array().expect("io").iter().filter(|b| !b["mapping_bytes"].is_null()).collect();
            assert!(!mapped.is_empty(), "{file} on {target}: {}", c["io"]);
            for b in mapped {
                let number = |key: &str| b[key].as_f64().unwrap_or(f64::NAN);
                let (bytes, bound, ratio) = (number("mapping_bytes"), number("lower_bound_bytes"), number("ratio"));
                assert!(bytes > 0.0 && bound > 0.0 && (ratio - bytes / bound).abs() < 1e-9 * ratio, "{file}: {b}");
                // No mapping moves less than a proved bound.
                let proved = !b["source"].as_str().is_some_and(|s| s.starts_with("reference"));
                assert!(!proved || ratio >= 0.999, "{file} on {target}: {b}");
            }
        }
    }
}

/// A reader that has gone ends a command quietly.
#[test]
fn a_closed_pipe_is_no_panic() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let done = Command::new(env!("CARGO_BIN_EXE_einfall")).arg("passes").stdout(writer).output().expect("it starts");
    assert_eq!((done.status.code(), done.stderr), (Some(0), Vec::new()));
}

/// `-v` says what is compiled and where it comes from, `-vv` every pass, and without either nothing is said.
#[test]
fn verbosity_is_heeded() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("cache")).expect("a folder");
    std::fs::write(folder.path().join("ok.ein"), GOOD).expect("a file");
    let said = |flags: &[&str]| {
        let args = [&["run", "ok.ein", "--random", "1", "--size", "M=2,N=3"], flags].concat();
        let (code, _, said) = einfall(folder.path(), &args);
        assert_eq!(code, 0, "{said}");
        said
    };
    let fresh = said(&["-vv"]);
    assert!(fresh.contains("form-kernels") && fresh.contains("LLVM is loaded"), "{fresh}");
    let cached = said(&["-v"]);
    assert!(cached.contains("the compiled plan comes from the cache") && !cached.contains("form-kernels"), "{cached}");
    assert_eq!(said(&[]), "");
}

/// `lower` takes the limits of the data sheet it is given, built in or not, and for a mapping on another device that one's.
#[test]
fn lowering_heeds_the_sheet_of_the_target() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).expect("a file");
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("a file");
    let sheet = |shared: &str| {
        let text = read("ir/data/h100.toml").replacen("name = \"h100\"", "name = \"small\"", 1);
        let number = |key: &str| text.lines().find(|l| l.starts_with(key)).expect("a line").to_owned();
        let text = text.replace(&number("multiprocessors = "), "multiprocessors = 14");
        text.replace(&number("shared_per_task = "), &format!("shared_per_task = {shared}"))
    };
    file("small.toml", &sheet("232448"));
    file("tiny.toml", &sheet("1024"));
    file("gemm.tile", &read("tests/plans/gemm.tile"));
    let mapping = read("tests/mappings/gemm_persistent.mapping");
    file("h100.mapping", &mapping);
    file("small.mapping", &mapping.replacen("on h100", "on small", 1));
    let lower = |target: &str, mapping: &str| {
        einfall(folder.path(), &["lower", "gemm.tile", "--target", target, "--mapping", mapping])
    };
    // Clusters of two on each of so many pairs of multiprocessors.
    for (target, mapping, pairs) in [
        ("small.toml", "small.mapping", 7),
        ("small.toml", "h100.mapping", 66),
        ("tiny.toml", "h100.mapping", 66),
        ("h100", "h100.mapping", 66),
    ] {
        let (code, out, said) = lower(target, mapping);
        assert_eq!(code, 0, "{target}, {mapping}: {said}");
        assert!(out.contains(&format!("((N + 255) / 256), {pairs}) * 2]")), "{target}, {mapping}: {out}");
    }
    let (code, _, said) = lower("tiny.toml", "small.mapping");
    assert!(code == 1 && said.contains("shared memory") && said.contains("at most 1024"), "{said}");
}

/// A packed parameter is given by its bytes, or by its elements as i8; a packed output comes as bytes. Devices agree.
#[test]
fn packed_arrays_are_bytes_or_elements() {
    use einfall::arrays::{Limits, read, write};
    use einfall::runtime::HostArray;
    let folder = tempfile::tempdir().expect("a folder");
    let text = "cascade half[N, K](w: i4[N,K] packed(low), K0: f32[K]) -> (q: i4[N,K] packed(high), y: f32[N,K]) {\n\
                q[n,k] = w[n,k]\n y[n,k] = w[n,k] + K0[k]\n}\n";
    std::fs::write(folder.path().join("half.ein"), text).expect("a file");
    let put =
        |name: &str, array: HostArray| write(folder.path().join(name).as_path(), &[("w", &array)]).expect("a file");
    put("bytes.npy", HostArray::from_slice(&[0x8fu8, 0x07, 0x21, 0x03], &[2, 2]).expect("an array"));
    put("elements.npy", HostArray::from_slice(&[-1i8, -8, 7, 1, 2, 3], &[2, 3]).expect("an array"));
    put("outside.npy", HostArray::from_slice(&[-1i8, -8, 7, 1, 9, 3], &[2, 3]).expect("an array"));
    put("floats.npy", HostArray::from_slice(&[0f32; 4], &[2, 2]).expect("an array"));
    put("zeros.npy", HostArray::from_slice(&[0f32; 3], &[3]).expect("an array"));
    for device in ["cpu", "reference"] {
        for file in ["bytes", "elements"] {
            let line = format!(
                "run half.ein --input w={file}.npy --input K0=zeros.npy --check --out out.npz --device {device}"
            );
            let (code, _, said) = einfall(folder.path(), &line.split(' ').collect::<Vec<_>>());
            assert_eq!(code, 0, "{line}: {said}");
            let outputs = read(folder.path().join("out.npz").as_path(), &Limits::default()).expect("arrays");
            let of = |name: &str| &outputs.iter().find(|(n, _)| n == name).expect("an output").1;
            assert_eq!(of("q").as_slice::<u8>(), Some(&[0xf8u8, 0x70, 0x12, 0x30][..]), "{line}");
            assert_eq!(of("y").as_slice::<f32>(), Some(&[-1f32, -8., 7., 1., 2., 3.][..]), "{line}");
        }
    }
    for (file, says) in [
        ("outside", "parameter `w` is i4, which cannot hold the 9 at [1, 1]"),
        ("floats", "give its bytes as u8, or its elements as i8"),
    ] {
        let line = format!("run half.ein --input w={file}.npy --input K0=zeros.npy");
        let (code, _, said) = einfall(folder.path(), &line.split(' ').collect::<Vec<_>>());
        assert!(code == 1 && said.contains(says), "{line}: {said}");
    }
}
