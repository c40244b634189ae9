//! Every document of the repository: its links lead somewhere, and its code is run.
//!
//! Invariant: every fenced block has a language, and what is shown in it is tested:
//! - `ein`: verifies, and every cascade agrees with the float64 evaluator at drawn sizes. `ein FILE` is also that file for
//!   the commands of the document; `ein wrong` does not verify.
//! - `sh`: its commands run, in a folder with the document's files and the folders of the repository that they name.
//! - `console`: the same after `$ `, and what they print is what is shown. Times, rates and errors are masked, with
//!   `console measured` every number; a line `...` stands for any lines. `console fails`: the last command fails.
//! - `rust`: rustdoc runs it, as src/lib.rs includes the document (README.md's is the crate's own example).
//! - `mapping`, `json`, `toml`: parse; `mapping FILE` is that file, as `ein FILE` is.
//! - `text` and `ebnf` are no code.
//!
//! With `BLESS=1` the shown output of commands is written anew where it differs.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use einfall::ir::cascade::bind::{Given, bind, check_facts};
use einfall::ir::cascade::{self, Cascade};
use einfall::ir::diag::render;
use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// Folders that commands of documents name.
const FOLDERS: &[&str] = &["kernels", "tests/plans", "tests/mappings", "docs/results", "tables", "ir/data"];

/// First parts of the paths that documents name.
const PATHS: &[&str] = &["autotune", "codegen", "docs", "examples", "ir", "kernels", "runtime", "src", "tests", "web"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Every document, relative to the root.
fn documents() -> Vec<String> {
    let markdown = |folder: &str| {
        let entries = std::fs::read_dir(root().join(folder)).expect("a folder");
        let names = entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned());
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        names.filter(|n| n.ends_with(".md")).map(|n| format!("{prefix}{n}")).collect::<Vec<_>>()
    };
    let mut all = ["", "docs", "web", "examples/web"].map(markdown).concat();
    all.sort();
    all
}

/// A fenced block.
struct Block {
    /// The words after the fence: the language first.
    info: Vec<String>,
    /// Its first line's number in the document.
    line: usize,
    content: String,
    /// Where the content stands in the document.
    at: Range<usize>,
}

impl Block {
    fn language(&self) -> &str {
        self.info.first().map_or("", String::as_str)
    }

    fn says(&self, word: &str) -> bool {
        self.info.iter().skip(1).any(|w| w == word)
    }
}

/// What a document is made of, for the tests: blocks, targets of links, spans of code, headings as links name them.
#[derive(Default)]
struct Document {
    blocks: Vec<Block>,
    links: Vec<String>,
    spans: Vec<String>,
    headings: Vec<String>,
}

fn parse(text: &str) -> Document {
    let mut document = Document::default();
    let mut open: Option<Block> = None;
    let mut heading: Option<String> = None;
    for (event, at) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
        match (event, &mut open) {
            (Event::Start(Tag::CodeBlock(kind)), _) => {
                let info = match kind {
                    CodeBlockKind::Fenced(info) => info.split_whitespace().map(str::to_owned).collect(),
                    CodeBlockKind::Indented => vec!["indented".to_owned()],
                };
                let first = text[at.start..].find('\n').map_or(at.end, |n| at.start + n + 1);
                let line = text[..first].matches('\n').count() + 1;
                open = Some(Block { info, line, content: String::new(), at: first..first });
            }
            (Event::Text(t), Some(block)) => {
                block.content.push_str(&t);
                block.at.end = at.end;
            }
            (Event::End(TagEnd::CodeBlock), _) => document.blocks.extend(open.take()),
            (Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }), _) => {
                document.links.push(dest_url.into_string());
            }
            (Event::Start(Tag::Heading { .. }), _) => heading = Some(String::new()),
            (Event::End(TagEnd::Heading(_)), _) => document.headings.extend(heading.take()),
            (Event::Text(t), None) => {
                if let Some(heading) = &mut heading {
                    let kept = t.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
                    heading.extend(kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }));
                }
            }
            (Event::Code(c), _) => document.spans.push(c.into_string()),
            _ => {}
        }
    }
    document
}

/// Links that lead nowhere; in the book, whose folder is `docs`, also those that leave it.
fn link_complaints(path: &str, document: &Document) -> Vec<String> {
    let folder = root().join(path).parent().expect("a folder").to_path_buf();
    let mut wrong = Vec::new();
    for link in &document.links {
        let (target, place) = link.split_once('#').unwrap_or((link, ""));
        if target.contains("://") || target.starts_with("mailto:") {
            continue;
        }
        let file = if target.is_empty() { root().join(path) } else { folder.join(target) };
        let place_exists =
            || std::fs::read_to_string(&file).is_ok_and(|text| parse(&text).headings.iter().any(|h| h == place));
        if !file.exists() || (!place.is_empty() && !place_exists()) {
            wrong.push(format!("{path}: dead link {link}"));
        } else if path.starts_with("docs/") && target.starts_with("..") {
            wrong.push(format!("{path}: the link {target} leads out of the book; name the file without a link"));
        }
    }
    wrong
}

/// Paths in spans of code that do not exist. `NAME` in capitals, `*` and braces are patterns.
fn path_complaints(path: &str, document: &Document) -> Vec<String> {
    let folder = root().join(path).parent().expect("a folder").to_path_buf();
    let pattern = |s: &str| s.contains(['*', '{', ' ', '…']) || s.contains("NAME") || s.contains("..");
    let named = document.spans.iter().filter(|s| {
        let first = s.split('/').next().unwrap_or_default();
        s.contains('/') && PATHS.contains(&first) && !pattern(s)
    });
    // `einfall tune --out` writes tables; what it writes need not be here.
    named
        .filter(|s| !root().join(s).exists() && !folder.join(s).exists() && !s.starts_with("docs/results"))
        .map(|s| format!("{path}: there is no `{s}`"))
        .collect()
}

/// What is wrong with the blocks that are not run.
fn block_complaints(path: &str, document: &Document) -> Vec<String> {
    let included = |path: &str| path == "README.md" || read("src/lib.rs").contains(&format!("{path}\")"));
    let mut wrong = Vec::new();
    for block in &document.blocks {
        let mut complain = |what: &str| wrong.push(format!("{path}:{}: {what}", block.line));
        let parsed = |text: &str| cascade::parse(text).map_err(|d| render(&d, path, text));
        match block.language() {
            "ein" if block.says("wrong") => {
                if parsed(&block.content).is_ok() {
                    complain("marked as wrong, and it verifies");
                }
            }
            "ein" => {
                if let Err(e) = parsed(&block.content) {
                    complain(&e);
                }
            }
            "mapping" => {
                if let Err(e) = einfall::ir::mapping::parse::parse(&block.content) {
                    complain(&render(&[e], path, &block.content));
                }
            }
            "json" => {
                if let Err(e) = serde_json::from_str::<serde_json::Value>(&block.content) {
                    complain(&e.to_string());
                }
            }
            "toml" => {
                if let Err(e) = block.content.parse::<toml::Table>() {
                    complain(&e.to_string());
                }
            }
            "rust" if !included(path) => complain("Rust that src/lib.rs does not include"),
            "rust" | "sh" | "console" | "text" | "ebnf" => {}
            // The loader's own tests compile it.
            "ts" if path.starts_with("web/") => {}
            other => complain(&format!("no test runs `{other}`")),
        }
    }
    wrong
}

#[test]
fn links_lead_somewhere_and_blocks_are_right() {
    let mut wrong = Vec::new();
    let mut n_blocks = 0;
    for path in documents() {
        let document = parse(&read(&path));
        n_blocks += document.blocks.len();
        wrong.extend(link_complaints(&path, &document));
        wrong.extend(block_complaints(&path, &document));
        if path != "CHANGELOG.md" {
            wrong.extend(path_complaints(&path, &document));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(n_blocks > 0, "no document shows code");
}

/// Extents at which the facts of a cascade hold.
fn draw(c: &Cascade) -> Option<String> {
    const EXTENTS: [u64; 9] = [3, 7, 5, 13, 2, 17, 8, 4, 1];
    (0..5000usize).find_map(|turn| {
        let free = c.ranks.iter().filter(|(_, r)| r.fixed.is_none()).enumerate();
        let digit = |k: usize| turn / EXTENTS.len().pow(k as u32 % 4) + k;
        let sizes: Vec<(String, u64)> =
            free.map(|(k, (_, r))| (r.name.clone(), EXTENTS[digit(k) % EXTENTS.len()])).collect();
        let text = sizes.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(",");
        let b = bind(c, &Given { sizes, ..Given::default() }).ok()?;
        check_facts(c, &b, &[]).is_ok().then_some(text)
    })
}

/// A command line, run by a shell that finds the binary first.
fn shell(command: &str, folder: &Path) -> (bool, String) {
    let binary = Path::new(env!("CARGO_BIN_EXE_einfall")).parent().expect("a folder");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(binary.to_path_buf()).chain(std::env::split_paths(&path)));
    let done = Command::new("bash")
        .args(["-o", "pipefail", "-c", &format!("{{ {command}\n}} 2>&1")])
        .current_dir(folder)
        .env("PATH", path.expect("folders"))
        .env("EINFALL_CACHE", folder.join(".cache"))
        .output()
        .expect("a shell");
    (done.status.success(), String::from_utf8_lossy(&done.stdout).into_owned())
}

#[test]
fn cascades_of_documents_agree_with_float64() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join(".cache")).expect("a folder");
    let mut n_run = 0;
    for path in documents() {
        for block in parse(&read(&path)).blocks.iter().filter(|b| b.language() == "ein" && !b.says("wrong")) {
            let Ok(module) = cascade::parse(&block.content) else {
                panic!("{path}:{}: does not verify", block.line);
            };
            std::fs::write(folder.path().join("block.ein"), &block.content).expect("a file");
            for c in &module.cascades {
                let sizes = draw(c).unwrap_or_else(|| panic!("{path}: no sizes for {}", c.name));
                let size = if sizes.is_empty() { String::new() } else { format!("--size {sizes}") };
                let command = format!("einfall run block.ein --cascade {} --random 1 {size} --check", c.name);
                let (done, said) = shell(&command, folder.path());
                assert!(done && said.contains("agree"), "{path}:{}: {command}\n{said}", block.line);
                n_run += 1;
            }
        }
    }
    assert!(n_run > 0, "no document shows a cascade");
}

/// A line for comparison: single spaces, and `#` for numbers that are measured.
fn masked(line: &str, all: bool) -> String {
    const UNITS: &[&str] = &["ns", "us", "µs", "ms", "s", "GB/s", "GFLOP/s", "bytes,"];
    let words: Vec<&str> = line.split_whitespace().collect();
    let mask = |k: usize| {
        let word = words[k];
        let core = word.trim_matches(|c: char| "(),;:+-%".contains(c));
        let end = |w: &str| w.trim_end_matches([',', ';', ')', ':', '.']).to_owned();
        let before = k.checked_sub(1).map_or("", |b| words[b]);
        let timed = words.get(k + 1).is_some_and(|w| UNITS.contains(&end(w).as_str())) && before != "predicted:";
        let measured = all || timed || before == "error" || end(word).ends_with('%');
        let number = measured && core.parse::<f64>().is_ok();
        if number { word.replace(core, "#").replace("+#", "#").replace("-#", "#") } else { word.to_owned() }
    };
    (0..words.len()).map(mask).collect::<Vec<_>>().join(" ")
}

/// Whether what a command printed is what is shown.
fn agrees(shown: &[String], printed: &[String]) -> bool {
    match shown {
        [] => printed.is_empty(),
        [first, rest @ ..] if first == "..." => (0..=printed.len()).any(|skip| agrees(rest, &printed[skip..])),
        [first, rest @ ..] => printed.first() == Some(first) && agrees(rest, &printed[1..]),
    }
}

/// A `console` block: every command and the lines shown under it.
fn session(content: &str) -> Vec<(String, String)> {
    let mut commands: Vec<(String, String)> = Vec::new();
    for line in content.lines() {
        match (line.strip_prefix("$ "), commands.last_mut()) {
            (Some(command), _) => commands.push((command.to_owned(), String::new())),
            (None, Some((_, shown))) => writeln!(shown, "{line}").expect("a string"),
            (None, None) => panic!("a session begins with `$ `: {line}"),
        }
    }
    commands
}

/// Runs a session: what does not agree, and the block with what was printed instead.
fn run_session(block: &Block, folder: &Path) -> (Vec<String>, String) {
    let (mut wrong, mut text) = (Vec::new(), String::new());
    let commands = session(&block.content);
    for (k, (command, shown)) in commands.iter().enumerate() {
        let (done, said) = shell(command, folder);
        if done == (block.says("fails") && k + 1 == commands.len()) {
            wrong.push(format!("`{command}` {}:\n{said}", if done { "succeeds" } else { "fails" }));
        }
        let lines = |t: &str| -> Vec<String> {
            t.trim_end().lines().map(|l| masked(l, block.says("measured"))).filter(|l| !l.is_empty()).collect()
        };
        let same = agrees(&lines(shown), &lines(&said));
        if !same {
            wrong.push(format!("`{command}` does not print what is shown:\n{said}"));
        }
        let kept = if same { shown.trim_end() } else { said.trim_end() };
        writeln!(text, "$ {command}").expect("a string");
        if !kept.is_empty() {
            writeln!(text, "{kept}").expect("a string");
        }
    }
    (wrong, text)
}

/// A folder as the document's commands expect it.
fn workplace(document: &Document) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join(".cache")).expect("a folder");
    for name in FOLDERS {
        let to: PathBuf = folder.path().join(name);
        std::fs::create_dir_all(&to).expect("a folder");
        for entry in std::fs::read_dir(root().join(name)).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_file() {
                std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
            }
        }
    }
    for block in &document.blocks {
        for name in block.info.iter().skip(1).filter(|w| w.contains('.')) {
            std::fs::write(folder.path().join(name), &block.content).expect("a file");
        }
    }
    folder
}

/// Runs the commands of a document: what is wrong, and how many blocks were run.
fn run_document(path: &str) -> (Vec<String>, usize) {
    let text = read(path);
    let document = parse(&text);
    let commands: Vec<&Block> = document.blocks.iter().filter(|b| matches!(b.language(), "sh" | "console")).collect();
    if commands.is_empty() {
        return (Vec::new(), 0);
    }
    let folder = workplace(&document);
    let mut wrong = Vec::new();
    let mut blessed = text.clone();
    for block in &commands {
        if block.language() == "sh" {
            for command in block.content.lines().filter(|l| !l.trim().is_empty()) {
                let (done, said) = shell(command, folder.path());
                if !done || said.is_empty() {
                    let what = if done { "says nothing" } else { "fails" };
                    wrong.push(format!("{path}:{}: `{command}` {what}:\n{said}", block.line));
                }
            }
            continue;
        }
        let (found, now) = run_session(block, folder.path());
        wrong.extend(found.into_iter().map(|w| format!("{path}:{}: {w}", block.line)));
        // A later block moves by what the text grew.
        let shift = |at: usize| (at + blessed.len()) - text.len();
        let at = shift(block.at.start)..shift(block.at.end);
        blessed.replace_range(at, &now);
    }
    if std::env::var_os("BLESS").is_some() && blessed != text {
        std::fs::write(root().join(path), blessed).expect("the document");
    }
    (wrong, commands.len())
}

#[test]
fn commands_of_documents_do_what_is_shown() {
    let done: Vec<(Vec<String>, usize)> = std::thread::scope(|scope| {
        let started: Vec<_> = documents().into_iter().map(|path| scope.spawn(move || run_document(&path))).collect();
        started.into_iter().map(|t| t.join().expect("a document's commands")).collect()
    });
    let wrong: Vec<&str> = done.iter().flat_map(|d| &d.0).map(String::as_str).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(done.iter().any(|d| d.1 > 0), "no document shows a command");
}

/// The row of a library file in the book's index: its name, and what its first comment says.
fn row(name: &str, text: &str) -> String {
    let comment: Vec<&str> = text.lines().map_while(|l| l.strip_prefix("//!")).map(str::trim).collect();
    format!("| `{name}` | {} |", comment.join(" ").trim_end_matches('.'))
}

#[test]
fn the_book_lists_every_library_cascade_and_every_page() {
    let index = read("docs/examples.md");
    let missing = einfall::kernels::SOURCES.iter().map(|(name, text)| row(name, text));
    let missing: Vec<String> = missing.filter(|r| index.lines().filter(|l| l == r).count() != 1).collect();
    assert!(missing.is_empty(), "docs/examples.md lacks, or has twice:\n{}", missing.join("\n"));
    let library = index.split_once("## The library").map_or("", |x| x.1);
    let listed = library.lines().filter(|l| l.starts_with("| `"));
    assert_eq!(listed.count(), einfall::kernels::SOURCES.len(), "docs/examples.md lists files that are not there");
    assert_eq!(row("a", "//! One\n//! two (x. y).\n\n/// No.\n"), "| `a` | One two (x. y) |");
    let pages = parse(&read("docs/SUMMARY.md")).links;
    let lost: Vec<String> = documents()
        .into_iter()
        .filter_map(|d| Some(d.strip_prefix("docs/")?.to_owned()))
        .filter(|d| d != "SUMMARY.md" && !pages.contains(d))
        .collect();
    assert_eq!(lost, Vec::<String>::new(), "pages that docs/SUMMARY.md does not list");
}

/// Result files of benchmarks in docs/results.
fn results() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join("docs/results")).expect("a folder");
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    files.retain(|f| f.extension().is_some_and(|x| x == "jsonl"));
    files.sort();
    files
}

#[test]
fn the_benchmarks_page_is_what_the_result_files_say() {
    let report = |files: &[PathBuf]| {
        let done = Command::new(env!("CARGO_BIN_EXE_einfall")).arg("report").args(files).output().expect("it starts");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).expect("UTF-8")
    };
    let (page, files) = (read("docs/benchmarks.md"), results());
    assert!(page == report(&files), "run `einfall report docs/results/*.jsonl > docs/benchmarks.md`");
    // A file more or less is seen.
    assert!(page != report(&files[1..]));
}

#[test]
fn planted_faults_of_documents_are_found() {
    let links = |path: &str, text: &str| link_complaints(path, &parse(text)).len();
    assert_eq!(links("README.md", "[a](Cargo.toml) [b](docs/language.md#5-operators) [c](https://example.org/x)"), 0);
    assert_eq!(links("README.md", "[a](Cargo.toml) [b](nowhere.md)"), 1);
    assert_eq!(links("README.md", "[a](docs/language.md#nowhere)"), 1);
    assert_eq!(links("docs/terms.md", "[a](language.md)"), 0);
    assert_eq!(links("docs/terms.md", "[a](../Cargo.toml)"), 1);
    let paths = |text: &str| path_complaints("a.md", &parse(text)).len();
    assert_eq!(paths("`src/lib.rs` `codegen/src/passes/NAME.rs` `a/b` `tests/*`"), 0);
    assert_eq!(paths("`src/nothing.rs`"), 1);
    let blocks =
        |info: &str, text: &str| block_complaints("a.md", &parse(&format!("x\n```{info}\n{text}\n```\n"))).len();
    assert_eq!(blocks("ein", "cascade c[M](x: f32[M]) -> (y: f32[M]) { y[m] = 2 * x[m] }"), 0);
    assert_eq!(blocks("ein", "cascade c[M](x: f32[M]) -> (y: f32[M]) { y[m] = 2 * x[n] }"), 1);
    assert_eq!(blocks("ein wrong", "cascade c[M](x: f32[M]) -> (y: f32[M]) { y[m] = x[m] }"), 1);
    for (info, text) in
        [("json", "{"), ("toml", "x"), ("mapping", "m"), ("rust", "fn f() {}"), ("fortran", "end"), ("", "what")]
    {
        assert_eq!(blocks(info, text), 1, "{info}");
    }
    assert_eq!(masked("largest error 2.49e-6, 9% of 3", false), "largest error #, #% of 3");
    assert_eq!(masked("in 1.5 ms; 4 kernels, predicted: 8 us", false), "in # ms; 4 kernels, predicted: 8 us");
    assert_eq!(masked("candidate 3 of 4, drift (+7%)", true), "candidate # of #, drift (#%)");
    let lines = |t: &str| t.lines().map(str::to_owned).collect::<Vec<_>>();
    assert!(agrees(&lines("a\n...\nd"), &lines("a\nb\nc\nd")) && agrees(&lines("a"), &lines("a")));
    assert!(!agrees(&lines("a\n...\nd"), &lines("a\nb")) && !agrees(&lines("a"), &lines("a\nb")));
    let folder = tempfile::tempdir().expect("a folder");
    let session = |info: &str, text: &str| {
        let document = parse(&format!("```{info}\n{text}\n```\n"));
        run_session(&document.blocks[0], folder.path()).0.len()
    };
    assert_eq!(session("console", "$ echo one\none"), 0);
    assert_eq!(session("console", "$ echo one\ntwo"), 1);
    assert_eq!(session("console", "$ false"), 1);
    assert_eq!(session("console fails", "$ false"), 0);
    assert_eq!(session("console fails", "$ true"), 1);
}

/// The example of a file's `//!` lines, as a reader sees it.
fn example_of(source: &str) -> String {
    let documented: String = source
        .lines()
        .map_while(|l| l.strip_prefix("//!"))
        .map(|l| format!("{}\n", l.strip_prefix(' ').unwrap_or(l)))
        .collect();
    let example = parse(&documented).blocks.into_iter().next().expect("an example");
    example.content.lines().filter(|l| !l.starts_with("# ")).map(|l| format!("{l}\n")).collect()
}

#[test]
fn the_readme_shows_the_example_that_is_tested() {
    let readme = parse(&read("README.md"));
    let shown = readme.blocks.iter().find(|b| b.language() == "rust").expect("an example");
    assert_eq!(shown.content, example_of(&read("src/lib.rs")), "README.md and src/lib.rs differ");
    assert_eq!(example_of("//! A.\n//!\n//! ```\n//! let x = 1;\n//! # drop(x);\n//! ```\n"), "let x = 1;\n");
}
