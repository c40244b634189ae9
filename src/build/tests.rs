//! What build scripts get: typed functions, places of mistakes, libraries that linkers read.

use super::*;
use einfall_ir::artifact::{Artifact, Code};

const TEXT: &str = "/// Rows times numbers.\ncascade times[M, N](x: f16[M, N], w: f32[N], s: f32 = 2.0, type: i32[4]) -> (y: f32[M, N]) {
    require s > 0
    y[m,n] = s * x[m,n] * w[n] + type[0]
}";

fn products(text: &str, targets: &[Target]) -> Result<Vec<Product>, Failure> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ein");
    std::fs::write(&path, text).unwrap();
    let options = CompileOptions { statics: vec![("N".to_owned(), 8)], ..CompileOptions::default() };
    let settings = Settings { options, prefix: "einfall_test".to_owned(), ..Settings::default() };
    compile_file(&path, targets, &settings, Some(&Llvm::load(&LoadOptions::default()).unwrap()))
}

#[test]
fn types_hold_elements_dimensions_and_fixed_extents() {
    let products = products(TEXT, &[Target::named("x86-64-v3"), Target::named("aarch64")]).unwrap();
    let text = module(&products).unwrap();
    for line in [
        "/// Rows times numbers.",
        "    x: impl Into<::einfall::aot::Input<'a, ::einfall::aot::half::f16, (::einfall::aot::Any, ::einfall::aot::Is<8>,)>>,",
        "    s: Option<f64>,",
        "    r#type: impl Into<::einfall::aot::Input<'a, i32, (::einfall::aot::Is<4>,)>>,",
        "pub static TIMES: ::einfall::aot::Kernel = unsafe {",
    ] {
        assert!(text.lines().any(|l| l == line), "no line `{line}` in\n{text}");
    }
    // Symbols say whose and for what they are, and every artifact reads.
    for piece in &products[0].pieces {
        let read = Artifact::from_bytes(&piece.artifact.to_bytes().unwrap()).unwrap();
        assert_eq!((&read.code, read.facts.len(), read.defaults.len()), (&Code::Linked, 1, 1));
        let level = piece.target.name().replace('-', "_");
        let symbol = &read.launches[0].symbol;
        assert!(symbol.starts_with(&format!("einfall_test_times_{level}")), "{symbol}");
        let object = piece.object.as_ref().unwrap();
        assert!(object.windows(symbol.len()).any(|w| w == symbol.as_bytes()), "the object has no `{symbol}`");
    }
}

#[test]
fn mistakes_have_places() {
    let wrong = products("cascade a[M](x: f32[M]) -> (y: f32[M]) {\n    y[m] = z[m]\n}\n", &[]).unwrap_err();
    assert!(wrong.lines[0].contains("a.ein:2:12: E0"), "{:?}", wrong.lines);
    assert!(wrong.rendered.contains("y[m] = z[m]"), "{}", wrong.rendered);
    let wrong =
        products("cascade a[M](x: bool[M]) -> (y: f32[M]) {\n    y[m] = f32(x[m])\n}\n", &[Target::named("x86-64-v3")]);
    let wrong = wrong.unwrap_err();
    assert!(
        wrong.lines[0].contains("a.ein:1:14: E0902") && wrong.lines[0].contains("`x` is bool"),
        "{:?}",
        wrong.lines
    );
    let missing = compile_file(
        Path::new("no/such.ein"),
        &[],
        &Settings::default(),
        Some(&Llvm::load(&LoadOptions::default()).unwrap()),
    );
    assert!(missing.unwrap_err().lines[0].starts_with("no/such.ein: "));
}

#[test]
fn settings_decide_and_the_machine_does_not() {
    let all = [Target::named("x86-64-v3"), Target::named("sm_80")];
    let [one, two] = [(), ()].map(|()| products(TEXT.replace("f16", "f32").as_str(), &all).unwrap());
    for (a, b) in one[0].pieces.iter().zip(&two[0].pieces) {
        assert_eq!((&a.artifact, &a.object), (&b.artifact, &b.object));
    }
    assert!(
        Target::from_name("sm_10").is_none() && Target::ALL.iter().all(|t| Target::from_name(t.name()) == Some(*t))
    );
}

/// Machine code is what NVIDIA's assembler makes of the PTX, and the module includes it. Without an assembler there is none.
#[test]
fn cubins_stand_beside_ptx() {
    let wrong = Assembler::find(Some(Path::new("no/such/ptxas"))).unwrap_err();
    assert!(wrong.contains("no/such/ptxas") && wrong.contains("EINFALL_PTXAS"), "{wrong}");
    assert!(Assembler::find(Some(Path::new("cat"))).unwrap_err().contains("it is no ptxas"));

    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = here.ancestors().map(|d| d.join("target/ptxas/nvidia/cu13/bin/ptxas")).find(|p| p.exists());
    let assembler = Assembler::find(found.as_deref()).expect("`make ptxas` was run");
    assert!(assembler.version().contains("release"), "{}", assembler.version());
    assert!(assembler.assemble("this is no PTX", "sm_80").unwrap_err().contains("refuses"));
    let module_of = |assembler: Option<Assembler>| {
        let settings = Settings { prefix: "einfall_test".to_owned(), assembler, ..Settings::default() };
        let cascade = cascade::parse(TEXT).unwrap().cascades.remove(0);
        let targets = [Target::named("sm_80"), Target::named("sm_90a")];
        let products = [compile(&cascade, &targets, &settings, None).unwrap()];
        let folder = tempfile::tempdir().unwrap();
        write(&products, folder.path()).unwrap();
        for piece in &products[0].pieces {
            let file = folder.path().join(file_name(&products[0].cascade, piece.target, "cubin"));
            assert_eq!(std::fs::read(file).ok(), piece.cubin);
            let Some(cubin) = &piece.cubin else { continue };
            // An ELF file for CUDA, machine 190, with a symbol for each kernel.
            assert_eq!((&cubin[..4], &cubin[18..20]), (&b"\x7fELF"[..], &[190, 0][..]));
            let symbols = piece.artifact.launches.iter().map(|l| l.symbol.as_bytes());
            assert!(symbols.into_iter().all(|s| cubin.windows(s.len()).any(|w| w == s)));
        }
        module(&products).unwrap()
    };
    for arch in ["sm_80", "sm_90a"] {
        let included = format!("cubin: Some(include_bytes!(\"times.{arch}.cubin\"))");
        assert!(module_of(Some(assembler.clone())).contains(&included));
    }
    let without = module_of(None);
    assert!(without.contains("cubin: None") && !without.contains(".cubin\""), "{without}");
}

#[cfg(unix)]
#[test]
fn links_stay_and_what_is_no_file_is_written_to() {
    use std::os::unix::fs::{FileTypeExt, symlink};
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let names = || {
        let mut names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    std::fs::write(at("file"), "old").unwrap();
    symlink("file", at("link")).unwrap();
    symlink("later", at("nowhere")).unwrap();
    for (name, file) in [("link", "file"), ("nowhere", "later"), ("nowhere", "later")] {
        write_whole(&at(name), name.as_bytes()).unwrap();
        assert!(at(name).is_symlink() && !at(file).is_symlink(), "{name}");
        assert_eq!(std::fs::read_to_string(at(file)).unwrap(), name);
    }
    let made = std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap();
    assert!(made.success());
    let reader = std::thread::spawn({
        let pipe = at("pipe");
        move || std::fs::read_to_string(pipe).unwrap()
    });
    write_whole(&at("pipe"), b"through").unwrap();
    assert_eq!(reader.join().unwrap(), "through");
    assert!(std::fs::metadata(at("pipe")).unwrap().file_type().is_fifo());
    write_whole(Path::new("/dev/null"), b"nothing").unwrap();
    assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    assert!(write_whole(folder.path(), b"a folder").is_err());
    assert_eq!(names(), ["file", "later", "link", "nowhere", "pipe"]);
}
