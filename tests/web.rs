//! The loader of `web/` on Dawn: the library's shaders, all of them through Tint, launched by their manifests alone,
//! against the float64 evaluator.
//!
//! SwiftShader compiles a kernel of attention in minutes, so only cascades of short kernels of few variables are launched.
//! It needs node, the packages of `web/` (`make web`) and SwiftShader, the Vulkan driver that comes with Chromium; without
//! one of them it says that it is skipped.

mod library;

use std::path::{Path, PathBuf};
use std::process::Command;

use einfall::build::{self, Settings, Target};
use einfall_ir::artifact::Code;
use einfall_ir::cascade::bind::{Given, bind};
use einfall_ir::cascade::{Cascade, eval};
use einfall_ir::tolerance::inputs::{Variant, random};
use einfall_ir::tolerance::{Expected, expect};
use einfall_runtime::HostArray;
use serde_json::{Map, Value, json};

/// Where Chromium keeps SwiftShader.
const DRIVERS: [&str; 2] =
    ["/usr/lib/chromium/vk_swiftshader_icd.json", "/usr/lib/chromium-browser/vk_swiftshader_icd.json"];

/// Bytes of a shader that SwiftShader compiles in a second or two.
const SHORT: usize = 20_000;
/// The most variables of one that is launched: SwiftShader takes minutes over many that live across branches.
const FEW: usize = 100;

/// What runs the loader, or what is not here for it.
fn node() -> Result<Command, &'static str> {
    let web = Path::new(env!("CARGO_MANIFEST_DIR")).join("web");
    if !Command::new("node").arg("--version").output().is_ok_and(|o| o.status.success()) {
        return Err("there is no node");
    }
    if !["node_modules/webgpu", "dist/index.js"].iter().all(|f| web.join(f).exists()) {
        return Err("`make web` was not run");
    }
    let driver =
        DRIVERS.iter().find(|d| Path::new(d).exists()).ok_or("there is no SwiftShader: apt install chromium")?;
    let mut node = Command::new("node");
    node.arg(web.join("test/launch.mjs")).env("VK_ICD_FILENAMES", driver).env("XDG_RUNTIME_DIR", std::env::temp_dir());
    Ok(node)
}

/// Writes a cascade's shaders, manifest and inputs to `folder`: what the outputs should be, in which files, and the job.
/// No outputs where a shader is long.
///
/// # Errors
/// Why something has no WGSL.
fn job(c: &Cascade, folder: &Path) -> Result<(Vec<(Expected, PathBuf)>, Value), String> {
    let product = build::compile(c, &[Target::named("wgsl")], &Settings::default(), None).map_err(|e| e.to_string())?;
    std::fs::create_dir_all(folder).expect("a folder");
    build::write(std::slice::from_ref(&product), folder).expect("writes");
    let Code::Wgsl { modules } = &product.pieces[0].artifact.code else { panic!("{}: no WGSL", c.name) };
    let manifest = folder.join(format!("{}.wgsl.json", c.name));
    if modules.iter().any(|m| m.text.len() > SHORT || m.text.matches("    var ").count() > FEW) {
        return Ok((Vec::new(), json!({ "manifest": manifest, "outputs": null })));
    }
    let sizes = library::sizes(c, 500_000).next().unwrap_or_else(|| panic!("{}: no sizes satisfy its facts", c.name));
    let b = bind(c, &Given { sizes: sizes.clone(), ..Given::default() }).expect("sizes");
    let inputs = random(c, &b, 11, Variant::Small).expect("inputs");
    let expected = expect(c, &b, &inputs, &eval::Options::default()).expect("evaluates");
    let (mut arrays, mut scalars) = (Map::new(), Map::new());
    for (p, a) in c.params.iter().zip(&inputs) {
        let name = c.tensors[*p].name.clone();
        if a.dims.is_empty() {
            scalars.insert(name, json!(a.data[0]));
            continue;
        }
        let path = folder.join(format!("{name}.in"));
        std::fs::write(&path, HostArray::from_values(a).expect("an array").bytes()).expect("an input");
        arrays.insert(name, json!(path));
    }
    let file = |e: &Expected| folder.join(format!("{}.out", e.name));
    let outputs: Map<String, Value> = expected.iter().map(|e| (e.name.clone(), json!(file(e)))).collect();
    let sizes: Map<String, Value> = sizes.into_iter().map(|(n, v)| (n, json!(v))).collect();
    let job = json!({ "manifest": manifest, "sizes": sizes, "scalars": scalars, "inputs": arrays, "outputs": outputs });
    Ok((expected.into_iter().map(|e| (file(&e), e)).map(|(f, e)| (e, f)).collect(), job))
}

#[test]
fn the_library_agrees_in_tint() {
    let mut node = match node() {
        Ok(node) => node,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    let folder = tempfile::tempdir().expect("a folder");
    let (mut cases, mut jobs, mut refused) = (Vec::new(), Vec::new(), Vec::new());
    for (name, c) in library::all() {
        match job(&c, &folder.path().join(&name)) {
            Ok((outputs, job)) => {
                cases.push((name, outputs));
                jobs.push(job);
            }
            Err(why) => refused.push((name, why)),
        }
    }
    // What has no WGSL is on the list, nothing else.
    let known = include_str!("../codegen/tests/wgsl_refused.txt");
    let known = known.lines().filter_map(|l| l.strip_prefix("webgpu: ")?.split_once(": ")).map(|l| l.0);
    assert_eq!(refused.iter().map(|r| r.0.as_str()).collect::<Vec<_>>(), known.collect::<Vec<_>>(), "{refused:#?}");
    let list = folder.path().join("jobs.json");
    std::fs::write(&list, Value::from(jobs).to_string()).expect("jobs");
    let out = node.arg(&list).output().expect("node runs");
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    if said.trim() == "no adapter" {
        return eprintln!("SKIPPED: no driver is found: apt install libvulkan1");
    }
    let mut lines = said.lines();
    let ended = format!("{}: {said}{}", out.status, String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && lines.next().is_some_and(|l| l.contains("SwiftShader")), "{ended}");
    let mut wrong = Vec::new();
    for (name, outputs) in &cases {
        let Some(line) = lines.next() else { panic!("{name} was not run; {ended}") };
        let result: Value = serde_json::from_str(line).expect("a line of JSON");
        if let Some(error) = result["error"].as_str() {
            wrong.push(format!("{name}: {error}"));
            continue;
        }
        for (e, file) in outputs {
            let bytes = std::fs::read(file).expect("an output");
            let got = HostArray::from_bytes(e.dtype, &e.dims, &bytes).expect("as many bytes").to_values();
            if let Err(m) = e.compare(&got.expect("values").data) {
                wrong.push(format!("{name}: {m}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let launched = cases.iter().filter(|(_, outputs)| !outputs.is_empty()).count();
    assert!(launched > 10 && lines.next().is_none(), "{} cascades, {launched} launched", cases.len());
}
