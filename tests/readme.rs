//! The commands of README.md, run as they stand there by the binary that was built.
//!
//! Invariant: every line of a `sh` block that begins with `einfall` runs here, in a folder that holds the README's
//! first cascade as `first.ein` and the folders of the repository that commands name.

use std::path::Path;
use std::process::Command;

/// Content of every fenced block in `language`.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut open: Option<(bool, String)> = None;
    for line in text.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(l)) => open = Some((l.trim() == language, String::new())),
            (Some((wanted, content)), Some(_)) => {
                if *wanted {
                    found.push(std::mem::take(content));
                }
                open = None;
            }
            (Some((_, content)), None) => {
                content.push_str(line);
                content.push('\n');
            }
            (None, None) => {}
        }
    }
    found
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
        }
    }
}

#[test]
fn commands_of_the_readme_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).expect("README.md");
    let folder = tempfile::tempdir().expect("a folder");
    let first = blocks(&readme, "ein").into_iter().next().expect("a first cascade");
    std::fs::write(folder.path().join("first.ein"), first).expect("first.ein");
    for name in ["kernels", "tests/plans", "tests/mappings", "docs/results", "tables"] {
        copy(&root.join(name), &folder.path().join(name));
    }
    let commands: Vec<String> =
        blocks(&readme, "sh").iter().flat_map(|b| b.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
    let mut n_run = 0;
    for command in &commands {
        let command = command.split(" #").next().unwrap_or_default();
        let mut words = command.split_whitespace();
        if words.next() != Some("einfall") {
            continue;
        }
        let done = Command::new(env!("CARGO_BIN_EXE_einfall"))
            .args(words)
            .current_dir(folder.path())
            .env("EINFALL_CACHE", folder.path().join("cache"))
            .output()
            .expect("the binary starts");
        let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "`{command}` fails:\n{said}");
        assert!(!done.stdout.is_empty(), "`{command}` says nothing");
        n_run += 1;
    }
    assert!(n_run > 0, "README.md shows no command");
}
