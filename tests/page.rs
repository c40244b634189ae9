//! The page of `examples/web` as a visitor opens it: headless Chromium, WebGPU on the processor.
//!
//! It needs node, the packages of `web/` (`make web`) and Chromium (`make swiftshader`); without one of them it says that
//! it is skipped.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

const BROWSERS: [&str; 3] = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The browser, or what is not here for it.
fn browser() -> Result<&'static str, &'static str> {
    if !Command::new("node").arg("--version").output().is_ok_and(|o| o.status.success()) {
        return Err("there is no node");
    }
    if !["node_modules/playwright-core", "dist/index.js"].iter().all(|f| root().join("web").join(f).exists()) {
        return Err("`make web` was not run");
    }
    BROWSERS.into_iter().find(|b| Path::new(b).exists()).ok_or("there is no Chromium: apt install chromium")
}

/// What the page of a folder reports.
fn visit(browser: &str, folder: &Path) -> Value {
    let mut node = Command::new("node");
    node.arg(root().join("examples/web/test/page.mjs")).arg(folder).arg(browser).arg(folder.join("page.png"));
    let out = node.output().expect("node runs");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_str(said.trim()).unwrap_or_else(|e| panic!("{e}: {said}"))
}

#[test]
fn the_page_agrees_with_float64_and_says_so_where_it_does_not() {
    let browser = match browser() {
        Ok(b) => b,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    let folder = tempfile::tempdir().expect("a folder");
    let built = Command::new("sh")
        .arg(root().join("examples/web/build.sh"))
        .args([PathBuf::from(env!("CARGO_BIN_EXE_einfall")), folder.path().to_owned()])
        .output()
        .expect("sh runs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));

    let report = visit(browser, folder.path());
    assert_eq!(report["state"], "good", "{report}");
    assert_eq!(report["said"].as_array().map(Vec::len), Some(0), "{report}");
    assert_eq!(report["status"], "All results agree with float64.");
    let checks = report["checks"].as_array().expect("a list");
    let names: Vec<&str> = checks.iter().filter_map(|c| c["name"].as_str()).collect();
    assert_eq!(names, ["recurrence", "attention", "weights"]);
    for c in checks {
        let (most, bound) = (c["most"].as_f64().expect("a number"), c["bound"].as_f64().expect("a number"));
        // Float32 is never right to the last bit of all of these.
        assert!(0.0 < most && most <= bound && bound < 1e-3, "{c}");
    }
    // The picture has squares of many shades, and what is missing is said.
    assert!(report["colours"].as_u64() > Some(50) && report["lacks"].as_u64() >= Some(4), "{report}");

    // One expected weight is wrong: the page must not say that all agree.
    let path = folder.path().join("reference.json");
    let mut reference: Value =
        serde_json::from_str(&std::fs::read_to_string(&path).expect("the reference")).expect("JSON");
    let off = reference["attention"]["A"][100].as_f64().expect("a weight") + 1e-3;
    reference["attention"]["A"][100] = off.into();
    std::fs::write(&path, reference.to_string()).expect("writes");
    let report = visit(browser, folder.path());
    assert_eq!(report["state"], "bad", "{report}");
    assert_eq!(report["status"], "weights differ from float64 by more than float32 may.");
}
