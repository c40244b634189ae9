//! `einfall tune` on this machine's processor: what works is measured, what does not is recorded with its reason.

use std::path::Path;
use std::process::{Command, Output};

const SCALE: &str = "cascade scale_rows[M, N](x: f32[M, N], s: f32[M]) -> (y: f32[M, N]) { y[m,n] = x[m,n] * s[m] }\n";

fn einfall(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_einfall"))
        .args(arguments)
        .current_dir(folder)
        .env("EINFALL_CACHE", "off")
        .output()
        .expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn rows(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).expect("a file of records");
    text.lines().map(|l| serde_json::from_str(l).expect("a JSON object a line")).collect()
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("scale.ein"), SCALE).expect("written");
    folder
}

#[test]
fn what_does_not_compile_is_recorded_and_the_rest_is_measured() {
    let folder = folder();
    // An axis that the kernel has not.
    let broken = "mapping scale_rows on cpu {\n    kernel scale_rows_0 {\n        axis q block 4\n    }\n}\n";
    std::fs::write(folder.path().join("broken.mapping"), broken).expect("written");
    let fine = "mapping scale_rows on cpu {\n    kernel scale_rows_0 {\n        axis m block 8\n        axis n block 64\n    }\n}\n";
    std::fs::write(folder.path().join("fine.mapping"), fine).expect("written");
    let list = ["tune", "scale.ein", "--sizes", "M=64,N=32..128:x4", "--time-ms", "1", "--jsonl", "rows.jsonl"];
    let given = ["--mapping", "broken.mapping", "--mapping", "fine.mapping"];
    let out = einfall(folder.path(), &[&list[..], &given[..]].concat());
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    assert_eq!(text(&out.stdout).matches("do not work").count(), 2, "{}", text(&out.stdout));
    let rows = rows(&folder.path().join("rows.jsonl"));
    for sizes in ["M=64,N=32", "M=64,N=128"] {
        let of = |outcome: &str| {
            rows.iter().filter(|r| r["sizes"] == sizes && r["outcome"] == outcome && r["turn"] == 0).count()
        };
        assert_eq!((of("ok"), of("failed")), (2, 1), "{sizes}");
    }
    let failed: Vec<_> = rows.iter().filter(|r| r["outcome"] == "failed").collect();
    assert!(failed.iter().all(|r| r["reason"].as_str().is_some_and(|w| w.contains('q'))), "{failed:?}");
    let ok = rows.iter().filter(|r| r["outcome"] == "ok");
    assert!(ok.into_iter().all(|r| r["measured_us"].as_f64().is_some_and(|us| us > 0.0)));
}

#[test]
fn what_hangs_is_recorded() {
    let folder = folder();
    // A minute of launches against a second.
    let list = ["tune", "scale.ein", "--sizes", "M=2048,N=4096", "--hang-s", "1", "--time-ms", "60000"];
    let out = einfall(folder.path(), &[&list[..], &["--workers", "1", "--jsonl", "rows.jsonl"]].concat());
    assert_eq!(out.status.code(), Some(1), "{}{}", text(&out.stdout), text(&out.stderr));
    let rows = rows(&folder.path().join("rows.jsonl"));
    assert!(!rows.is_empty() && rows.iter().all(|r| r["outcome"] == "hung"), "{rows:?}");
}

#[test]
fn wrong_command_lines_say_what_is_wrong() {
    let folder = folder();
    for (arguments, says) in [
        (&["tune", "scale.ein", "--sizes", "M=64"][..], "N"),
        (&["tune", "scale.ein", "--sizes", "M=64,N=0"], "positive"),
        (&["tune", "scale.ein", "--sizes", "M=64,N=1", "--device", "abacus"], "abacus"),
        (&["tune", "scale.ein", "--sizes", "M=64,N=1", "--budget", "ten"], "length of time"),
    ] {
        let out = einfall(folder.path(), arguments);
        assert_eq!(out.status.code(), Some(2), "{arguments:?}: {}", text(&out.stderr));
        assert!(text(&out.stderr).contains(says), "{}", text(&out.stderr));
    }
}
