//! The reference agrees with the code: its examples parse, and it lists every diagnostic code that exists.

use std::collections::BTreeSet;
use std::path::Path;

use einfall_ir::cascade::check;

fn reference() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/language.md")).unwrap()
}

/// Every `E0123` or `W0123` in a text.
fn codes(text: &str, out: &mut BTreeSet<String>) {
    let bytes = text.as_bytes();
    for at in 0..bytes.len().saturating_sub(4) {
        let code = &bytes[at..at + 5];
        if matches!(code[0], b'E' | b'W') && code[1] == b'0' && code[2..].iter().all(u8::is_ascii_digit) {
            out.insert(String::from_utf8_lossy(code).into_owned());
        }
    }
}

fn codes_of_sources(folder: &Path, out: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            codes_of_sources(&path, out);
        } else if path.extension().is_some_and(|x| x == "rs") {
            codes(&std::fs::read_to_string(&path).unwrap(), out);
        }
    }
}

#[test]
fn every_code_of_the_language_is_listed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut used = BTreeSet::new();
    codes(&std::fs::read_to_string(root.join("text/lexer.rs")).unwrap(), &mut used);
    for file in ["parse.rs", "resolve.rs", "verify.rs"] {
        codes(&std::fs::read_to_string(root.join("cascade").join(file)).unwrap(), &mut used);
    }
    codes_of_sources(&root.join("cascade/resolve"), &mut used);
    codes_of_sources(&root.join("cascade/verify"), &mut used);
    let mut listed = BTreeSet::new();
    codes(&reference(), &mut listed);
    assert_eq!(used, listed);
}

#[test]
fn examples_mean_what_the_reference_says() {
    let text = reference();
    let blocks = |fence: &str| -> Vec<String> {
        text.split(fence).skip(1).filter_map(|t| t.split("```").next()).map(str::to_owned).collect()
    };
    let (right, wrong) = (blocks("```ein\n"), blocks("```ein wrong\n"));
    assert!(right.len() >= 2 && wrong.len() == 1);
    let codes = |example: &str| check(example).1.iter().map(|d| d.code).collect::<Vec<_>>();
    for example in &right {
        assert_eq!(codes(example), [""; 0], "{example}");
    }
    assert_eq!(codes(&wrong[0]), ["E0229"], "{}", wrong[0]);
}
