//! Properties of the cascade language: no text makes it panic, and printing is the inverse of parsing.
//!
//! Random cascades are drawn as untyped skeletons and lowered to well-typed text, so that failures shrink.

use std::path::Path;

use einfall_ir::cascade::{check, format, parse, print};
use einfall_ir::diag::render;
use proptest::prelude::*;

fn library() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
    let mut files: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .map(|f| f.unwrap().path())
        .filter(|f| f.extension().is_some_and(|x| x == "ein"))
        .collect();
    files.sort();
    files.iter().map(|f| std::fs::read_to_string(f).unwrap()).collect()
}

/// Pieces of the language, to splice into texts.
const PIECES: [&str; 48] = [
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ",",
    ";",
    "\n",
    "=",
    "+=",
    "..",
    "->",
    "where ",
    "else ",
    "then ",
    "if ",
    "for ",
    "in ",
    "iter t in T {",
    "ragged n in N by ",
    "require ",
    "cascade f",
    "fn g(x) = ",
    "monoid m(a) {",
    "sum(k) ",
    "max(m, n) ",
    "topk(n, 2) ",
    "cumsum(m) ",
    "not ",
    "and ",
    "- ",
    "@exact ",
    "/// ",
    "// ",
    "//! ",
    "h[1..]",
    "0",
    "1e309",
    "9223372036854775808",
    "inf",
    "é",
    "\u{0}",
    "x[",
    "M",
    "m",
    ".field",
    "scan ",
];

/// Checks, prints and formats a text; nothing may panic.
fn exercise(text: &str) {
    let (module, diagnostics) = check(text);
    let _ = render(&diagnostics, "text.ein", text);
    assert_eq!(module.is_none(), diagnostics.iter().any(|d| d.severity == einfall_ir::diag::Severity::Error));
    if let Some(module) = module {
        let once = print(&module);
        let again = parse(&once).unwrap_or_else(|d| panic!("{text}\nprints as\n{}", render(&d, "printed", &once)));
        assert_eq!(once, print(&again));
    }
    if let Ok(formatted) = format(text) {
        assert_eq!(format(&formatted).as_deref(), Ok(formatted.as_str()), "{text}");
    }
}

/// An untyped skeleton of an expression.
#[derive(Clone, Debug)]
struct Node {
    pick: u8,
    parts: Vec<Node>,
}

fn node() -> impl Strategy<Value = Node> {
    let leaf = any::<u8>().prop_map(|pick| Node { pick, parts: Vec::new() });
    leaf.prop_recursive(5, 40, 3, |inner| {
        (any::<u8>(), prop::collection::vec(inner, 0..=3)).prop_map(|(pick, parts)| Node { pick, parts })
    })
}

/// Tensors of rank two over these indices exist, with kinds by first letter: A, T float; I int; P bool.
struct Scope {
    indices: Vec<&'static str>,
    tensors: Vec<String>,
}

impl Node {
    fn part(&self, k: usize) -> Node {
        self.parts
            .get(k)
            .cloned()
            .unwrap_or(Node { pick: self.pick.wrapping_mul(7).wrapping_add(k as u8), parts: vec![] })
    }

    fn index(&self, s: &Scope) -> &'static str {
        s.indices[usize::from(self.pick / 16) % s.indices.len()]
    }

    fn int(&self, s: &Scope) -> String {
        let depth = !self.parts.is_empty();
        match self.pick % 8 {
            0 => self.index(s).to_string(),
            1 => (i64::from(self.pick / 8) - 8).to_string(),
            2 => "N".to_string(),
            3 => format!("ids[{}]", self.index(s)),
            4 if depth => format!("({} + {})", self.part(0).int(s), self.part(1).int(s)),
            5 if depth => format!("{} * ({})", "3", self.part(0).int(s)),
            6 if depth => format!("({}) % 4", self.part(0).int(s)),
            _ => "2".to_string(),
        }
    }

    fn boolean(&self, s: &Scope) -> String {
        match self.pick % 6 {
            0 => format!("{} < {}", self.part(0).int(s), self.part(1).int(s)),
            1 => format!("flag[{}]", self.index(s)),
            2 if !self.parts.is_empty() => format!("not ({})", self.part(0).boolean(s)),
            3 if !self.parts.is_empty() => format!("({} or {})", self.part(0).boolean(s), self.part(1).boolean(s)),
            4 if !self.parts.is_empty() => format!("({}) and ({})", self.part(0).boolean(s), self.part(1).boolean(s)),
            _ => format!("({}) >= 0.5", self.part(0).float(s)),
        }
    }

    fn float(&self, s: &Scope) -> String {
        if self.parts.is_empty() {
            return match self.pick % 4 {
                0 => format!("{:?}", f64::from(self.pick) / 16.0),
                1 => "a".to_string(),
                _ => {
                    let t = &s.tensors[usize::from(self.pick) % s.tensors.len()];
                    format!("{t}[{},{}]", self.index(s), self.part(0).index(s))
                }
            };
        }
        let [x, y, z] = [0, 1, 2].map(|k| self.part(k));
        match self.pick % 14 {
            0 => format!("({} + {})", x.float(s), y.float(s)),
            1 => format!("({}) - ({})", x.float(s), y.float(s)),
            2 => format!("({}) * ({})", x.float(s), y.float(s)),
            3 => format!("({}) / ({})", x.float(s), y.float(s)),
            4 => format!("-({})", x.float(s)),
            5 => format!("tanh({})", x.float(s)),
            6 => format!("max({}, {})", x.float(s), y.float(s)),
            7 => format!("(if {} then {} else {})", x.boolean(s), y.float(s), z.float(s)),
            8 => format!("bf16({})", x.float(s)),
            9 => format!("pow({}, 2)", x.float(s)),
            10 => format!("A[{},ids[{}]]", x.index(s), y.index(s)),
            11 => format!("rand(1, {}, {})", x.int(s), y.int(s)),
            n => match (["p", "q", "w"].iter().find(|i| !s.indices.contains(i)), n) {
                (Some(fresh), n) => {
                    let mut indices = s.indices.clone();
                    indices.push(fresh);
                    let inner = Scope { indices, tensors: s.tensors.clone() };
                    let op = if n == 12 { "sum" } else { "max" };
                    format!("({op}({fresh} in N) {})", x.float(&inner))
                }
                (None, _) => format!("exp({})", x.float(s)),
            },
        }
    }
}

/// A cascade whose statements are lowered from skeletons.
fn cascade(statements: &[(Node, Option<Node>, u8)]) -> String {
    let mut s = Scope { indices: vec!["m", "n"], tensors: vec!["A".to_string(), "B".to_string()] };
    let mut body = String::new();
    for (k, (value, filter, style)) in statements.iter().enumerate() {
        let name = format!("T{k}");
        let ty = ["", ": f32", ": bf16"][usize::from(style % 3)];
        let filter = filter.as_ref().map_or(String::new(), |f| format!(" where {}", f.boolean(&s)));
        let value = value.float(&s);
        body.push_str(&format!("    {name}[m,n]{ty} for m in N, n in N = f32({value}){filter}\n"));
        s.tensors.push(name);
    }
    let last = s.tensors.last().cloned().unwrap_or_default();
    format!(
        "cascade c[N](A: f32[N,N], B: bf16[N,N], ids: i32[N], flag: bool[N], a: f32 = 0.5) -> (Y: f32[N,N]) {{\n\
         {body}    Y[m,n] = {last}[m,n] where m >= n else a\n}}\n"
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}") {
        exercise(&text);
    }

    #[test]
    fn spliced_pieces_never_panic(pieces in prop::collection::vec(prop::sample::select(&PIECES[..]), 0..60)) {
        exercise(&pieces.concat());
        exercise(&format!("cascade f[M, K](A: f32[M,K]) -> (Y: f32[M]) {{\n {}\n}}", pieces.concat()));
    }

    #[test]
    fn mutated_library_text_never_panics(
        file in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12, prop::sample::select(&PIECES[..])), 1..5),
    ) {
        let library = library();
        let mut text = file.get(&library).clone();
        for (at, cut, piece) in edits {
            let floor = |text: &str, mut at: usize| {
                while !text.is_char_boundary(at) {
                    at -= 1;
                }
                at
            };
            let start = floor(&text, at.index(text.len() + 1));
            let end = floor(&text, (start + cut).min(text.len()));
            text.replace_range(start..end.max(start), piece);
        }
        exercise(&text);
    }

    #[test]
    fn random_cascades_print_as_they_parse(
        statements in prop::collection::vec((node(), prop::option::of(node()), any::<u8>()), 1..4),
    ) {
        let text = cascade(&statements);
        let module = match parse(&text) {
            Ok(module) => module,
            Err(d) => return Err(TestCaseError::fail(format!("{text}\n{}", render(&d, "random", &text)))),
        };
        let once = print(&module);
        prop_assert_eq!(&once, &print(&parse(&once).unwrap()));
        let formatted = format(&text).unwrap();
        prop_assert_eq!(&formatted, &format(&formatted).unwrap());
        prop_assert_eq!(&once, &print(&parse(&formatted).unwrap()));
        prop_assert_eq!(once.len(), print(&parse(&once).unwrap()).len());
    }
}

/// Texts built to exhaust a reader: each is refused or accepted at once, never by a stack overflow or a long wait.
#[test]
fn hostile_texts_are_bounded() {
    let wrap = |value: &str| format!("cascade f[M](A: f32[M]) -> (Y: f32[M]) {{\n Y[m] = {value}\n}}\n");
    let doubling = |n: usize| {
        let mut text = String::from("fn g0(x) = x + x\n");
        for k in 1..=n {
            text.push_str(&format!("fn g{k}(x) = g{0}(x) + g{0}(x)\n", k - 1));
        }
        text + &wrap(&format!("g{n}(A[m])"))
    };
    let cases = [
        ("E0115", wrap(&format!("{}A[m]{}", "(".repeat(50_000), ")".repeat(50_000)))),
        ("E0115", wrap(&format!("{}A[m]", "-".repeat(50_000)))),
        ("E0115", wrap(&vec!["A[m]"; 50_000].join(" + "))),
        ("E0115", wrap(&format!("{}A[m]", "if true then 1 else ".repeat(20_000)))),
        ("E0115", wrap(&format!("{}A[m]", "not ".repeat(50_000)))),
        ("E0115", wrap(&format!("{}A[m]", "sum(k) ".repeat(20_000)))),
        ("E0101", " ".repeat(2 << 20)),
        ("E0217", doubling(40)),
        ("E0233", doubling(80)),
        ("E0105", format!("{}{}", "[".repeat(50_000), ")".repeat(50_000))),
        ("E0104", "{".repeat(100_000)),
        ("E0104", "[".repeat(100_000)),
        (
            "E0204",
            format!(
                "cascade f[{}](a: f32) -> (y: f32) {{\n y = a\n}}",
                (0..100).map(|i| format!("R{i}")).collect::<Vec<_>>().join(", ")
            ),
        ),
        (
            "E0217",
            wrap("f32(m)")
                .replacen(
                    "cascade",
                    &format!("fn g(x) = {}\nfn h(x) = g(g(g(g(x))))\ncascade", vec!["x"; 40].join(" * ")),
                    1,
                )
                .replace("f32(m)", "h(h(A[m]))"),
        ),
    ];
    for (code, text) in &cases {
        let (module, diagnostics) = check(text);
        assert!(module.is_none());
        let found: Vec<_> = diagnostics.iter().map(|d| d.code).collect();
        assert!(found.contains(code), "{code} expected, found {found:?} in {}", &text[..text.len().min(200)]);
        assert!(diagnostics.len() <= 100);
    }
}
