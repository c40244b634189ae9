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
    let list = ["tune", "scale.ein", "--sizes", "M=64,N=32..128:x4", "--time-ms", "1", "--draws", "5"];
    let list = [&list[..], &["--jsonl", "rows.jsonl"]].concat();
    let given = ["--mapping", "broken.mapping", "--mapping", "fine.mapping"];
    let out = einfall(folder.path(), &[&list[..], &given[..]].concat());
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    assert_eq!(text(&out.stdout).matches("do not work").count(), 2, "{}", text(&out.stdout));
    let rows = rows(&folder.path().join("rows.jsonl"));
    for sizes in ["M=64,N=32", "M=64,N=128"] {
        let of = |outcome: &str| {
            rows.iter().filter(|r| r["sizes"] == sizes && r["outcome"] == outcome && r["turn"] == 0).count()
        };
        assert!(of("ok") >= 2, "the model's and one given at {sizes}");
        assert_eq!(of("failed"), 1, "{sizes}");
    }
    let failed: Vec<_> = rows.iter().filter(|r| r["outcome"] == "failed").collect();
    assert!(failed.iter().all(|r| r["reason"].as_str().is_some_and(|w| w.contains('q'))), "{failed:?}");
    let ok = rows.iter().filter(|r| r["outcome"] == "ok");
    assert!(ok.into_iter().all(|r| r["measured_us"].as_f64().is_some_and(|us| us > 0.0)));
    let drawn = rows.iter().filter(|r| r["origin"] == "drawn");
    assert!(drawn.clone().count() >= 4 && drawn.into_iter().all(|r| r["predicted_us"].as_f64().is_some()));
}

/// Results are judged by the roundings of the device: an 8-bit conversion in the text, operands that an instruction takes
/// narrower than they were computed.
#[test]
fn mappings_of_narrow_types_are_right() {
    let folder = folder();
    for (name, sizes) in [
        ("quantised_matmul", "M=64,N=128,K=256"),
        ("attention", "B=1,G=2,R=1,M=40,N=70,E=64,F=64"),
        ("dequantised_matmul", "M=40,N=64,K=96"),
    ] {
        let list = ["tune", name, "--sizes", sizes, "--time-ms", "1", "--candidates", "2", "--draws", "4"];
        let out = einfall(folder.path(), &list);
        assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
        assert!(!text(&out.stdout).contains("do not work"), "{}", text(&out.stdout));
    }
}

#[test]
fn records_are_priced_again() {
    let folder = folder();
    let list = ["tune", "scale.ein", "--sizes", "M=64,N=32..128:x4"];
    let measure = ["--time-ms", "1", "--jsonl", "rows.jsonl", "--csv", "then.csv"];
    let out = einfall(folder.path(), &[&list[..], &measure].concat());
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    let again = ["--again", "rows.jsonl", "--sheet", "x86-64-v3", "--jsonl", "again.jsonl", "--csv", "now.csv"];
    let out = einfall(folder.path(), &[&list[..], &again].concat());
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    assert!(text(&out.stdout).contains("2 cases; the first choice"), "{}", text(&out.stdout));
    let [then, now] = ["rows.jsonl", "again.jsonl"].map(|f| rows(&folder.path().join(f)));
    assert_eq!(then.len(), now.len());
    let of = |rows: &[serde_json::Value], what: &str| -> Vec<serde_json::Value> {
        let mut all: Vec<_> = rows.iter().map(|r| (r["mapping"].to_string(), r[what].clone())).collect();
        all.sort_by_key(|(m, v)| (m.clone(), v.to_string()));
        all.into_iter().map(|(_, v)| v).collect()
    };
    assert_eq!(of(&then, "measured_us"), of(&now, "measured_us"));
    assert_ne!(of(&then, "predicted_us"), of(&now, "predicted_us"));
    // The fastest that was measured more than once is the same.
    let best = |f: &str| -> Vec<String> {
        let text = std::fs::read_to_string(folder.path().join(f)).expect("a table");
        text.lines().skip(1).filter_map(|l| l.split(',').nth(4).map(str::to_owned)).collect()
    };
    assert_eq!(best("then.csv"), best("now.csv"));
    let other = ["tune", "scale.ein", "--sizes", "M=63,N=32", "--again", "rows.jsonl", "--sheet", "x86-64-v3"];
    let out = einfall(folder.path(), &other);
    assert!(!out.status.success() && text(&out.stderr).contains("no record is of these cascades at these sizes"));
}

#[test]
fn what_hangs_is_recorded() {
    let folder = folder();
    // A minute of launches against a second.
    let list = ["tune", "scale.ein", "--sizes", "M=2048,N=4096", "--hang-s", "1", "--time-ms", "60000"];
    let out = einfall(
        folder.path(),
        &[&list[..], &["--workers", "1", "--candidates", "1", "--jsonl", "rows.jsonl"]].concat(),
    );
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

/// A mapping of `SCALE` with blocks of `m` rows.
fn mapping(m: u64) -> String {
    format!(
        "mapping scale_rows on cpu {{\n    kernel scale_rows_0 {{\n        axis m block {m}\n        axis n block 64\n    }}\n}}\n"
    )
}

#[test]
fn tables_are_written_shown_merged_verified_pruned_and_used() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("eight.mapping"), mapping(8)).expect("written");
    let tune = |sizes: &str, out: &str| {
        let list =
            ["tune", "scale.ein", "--sizes", sizes, "--time-ms", "1", "--out", out, "--mapping", "eight.mapping"];
        let done = einfall(folder.path(), &list);
        assert!(done.status.success(), "{}{}", text(&done.stdout), text(&done.stderr));
    };
    tune("M=64,N=64", "tables/a.toml");
    tune("M=64,N=256", "tables/b.toml");
    assert!(!at("tables/a.toml.journal").exists(), "the table holds what the journal held");
    let run = |list: &[&str]| {
        let out = einfall(folder.path(), list);
        (out.status.code(), text(&out.stdout) + &text(&out.stderr))
    };
    let (code, said) = run(&["tables", "merge", "tables/a.toml", "tables/b.toml", "-o", "all.toml"]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = run(&["tables", "show", "all.toml", "--mappings"]);
    assert_eq!((code, said.matches("scale_rows  ").count()), (Some(0), 2), "{said}");
    let (code, said) = run(&["tables", "verify", "all.toml", "--cascades", "scale.ein"]);
    assert_eq!(code, Some(0), "{said}");
    // Without the cascade its entries are nobody's.
    let (code, said) = run(&["tables", "verify", "all.toml"]);
    assert_eq!((code, said.contains("no cascade given")), (Some(1), true), "{said}");
    let whole = std::fs::read_to_string(at("all.toml")).expect("a table");
    // The mapping of a kernel that the plan has not.
    std::fs::write(at("stale.toml"), whole.replace("kernel scale_rows_0", "kernel other")).expect("written");
    let (code, said) = run(&["tables", "prune", "stale.toml", "--cascades", "scale.ein"]);
    assert_eq!((code, said.contains("2 entries removed, 0 left")), (Some(0), true), "{said}");
    std::fs::write(at("foreign.toml"), whole.replace("format = 1", "format = 9")).expect("written");
    let (code, said) = run(&["tables", "show", "foreign.toml"]);
    assert_eq!((code, said.contains("later version")), (Some(1), true), "{said}");

    // Engines take it from a file, embedded, or not at all.
    use einfall::{CompileOptions, Engine, Options, TableSource};
    let module = einfall::ir::cascade::parse(SCALE).expect("a cascade");
    let compiled = |tables: Vec<TableSource>, sizes: &[(&str, u64)]| {
        let engine = Engine::new(&Options { tables, ..Options::default() })?;
        let sizes = sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
        let options = CompileOptions { sizes, ..CompileOptions::default() };
        Ok::<String, einfall::Error>(engine.compile_with(&module.cascades[0], &options)?.mapping().to_string())
    };
    let model = compiled(Vec::new(), &[]).expect("compiles");
    // A block that no model chooses, so that its use shows.
    let lines: Vec<String> = whole
        .lines()
        .map(|l| if l.trim().starts_with("axis m block") { "        axis m block 37".to_owned() } else { l.to_owned() })
        .collect();
    let odd = lines.join("\n") + "\n";
    std::fs::write(at("odd.toml"), &odd).expect("written");
    let near = [("M", 50), ("N", 200)];
    for source in [TableSource::File(at("odd.toml")), TableSource::Embedded(odd.clone().into_bytes().into())] {
        let got = compiled(vec![source], &near).expect("compiles");
        assert!(got.contains("axis m block 37") && got != model, "{got}");
    }
    // Far from everything measured, and on another device, the model decides.
    let far = [("M", 1 << 20), ("N", 1)];
    assert_eq!(
        compiled(vec![TableSource::File(at("odd.toml"))], &far).expect("compiles"),
        compiled(Vec::new(), &far).expect("compiles")
    );
    let elsewhere = odd.replacen("device = \"", "device = \"not ", 1);
    assert_eq!(
        compiled(vec![TableSource::Embedded(elsewhere.into_bytes().into())], &near).expect("compiles"),
        compiled(Vec::new(), &near).expect("compiles")
    );
    for (bytes, says) in [(&b"format = 9"[..], "later version"), (b"]", "no table"), (b"\xff", "UTF-8")] {
        let e = compiled(vec![TableSource::Embedded(bytes.into())], &near).expect_err("refused");
        assert!(e.to_string().contains(says), "{e}");
    }
    assert!(compiled(vec![TableSource::File(at("nowhere.toml"))], &near).is_err());
}

#[test]
fn a_killed_run_goes_on_where_it_was() {
    let folder = folder();
    let mut list: Vec<String> = ["tune", "scale.ein", "--sizes", "M=512,N=1024", "--time-ms", "60", "--workers", "1"]
        .iter()
        .map(|s| (*s).to_owned())
        .collect();
    for m in 1..=12 {
        let name = format!("{m}.mapping");
        std::fs::write(folder.path().join(&name), mapping(m)).expect("written");
        list.extend(["--mapping".to_owned(), name]);
    }
    list.extend(["--out", "t.toml", "--jsonl", "rows.jsonl"].map(str::to_owned));
    let mut child = Command::new(env!("CARGO_BIN_EXE_einfall"))
        .args(&list)
        .current_dir(folder.path())
        .env("EINFALL_CACHE", "off")
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("the program starts");
    let journal = folder.path().join("t.toml.journal");
    let lines = || std::fs::read_to_string(&journal).unwrap_or_default().lines().count();
    let begin = std::time::Instant::now();
    while lines() < 3 {
        assert!(begin.elapsed().as_secs() < 60 && child.try_wait().expect("alive").is_none(), "nothing is measured");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().expect("killed");
    child.wait().expect("gone");
    assert!(!folder.path().join("t.toml").exists());
    // What a write that was cut short leaves.
    let before = rows(&journal);
    let mut torn = std::fs::read(&journal).expect("a journal");
    torn.extend(b"{\"einfall\":\"0.1");
    std::fs::write(&journal, torn).expect("written");
    let list: Vec<&str> = list.iter().map(String::as_str).collect();
    let out = einfall(folder.path(), &list);
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    let after = rows(&folder.path().join("rows.jsonl"));
    for b in &before {
        let kept = |a: &&serde_json::Value| a["mapping"] == b["mapping"] && a["measured_us"] == b["measured_us"];
        assert!(after.iter().any(|a| kept(&a)), "{b}");
        let again = after.iter().filter(|a| a["mapping"] == b["mapping"] && a["turn"] == 0).count();
        assert_eq!(again, 1, "measured once: {b}");
    }
    let given = after.iter().filter(|r| r["turn"] == 0 && r["origin"] == "given").count();
    assert_eq!(given, 12);
    assert!(folder.path().join("t.toml").exists() && !journal.exists());
}

#[test]
fn a_probe_writes_a_data_sheet_that_reads_back() {
    let folder = folder();
    let out = einfall(folder.path(), &["devices", "--probe", "cpu"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let sheet = einfall::ir::target::DataSheet::parse(&text(&out.stdout)).expect("a data sheet");
    assert!(sheet.gpu.is_none() && sheet.levels.len() >= 3 && sheet.peak[0].1 > 1e9, "{sheet:?}");
    let out = einfall(folder.path(), &["devices", "--probe", "cuda:99"]);
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
}
