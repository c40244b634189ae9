//! The text form: ConstrINT's documented examples, what it adds, its errors with their places, and the report.

use einfall_autotune::csp::{Explanation, Left, Report, Solver, Status, text};

/// Every value of the first variable over the solutions.
fn values(source: &str) -> Vec<i64> {
    let m = text::parse(source).unwrap_or_else(|e| panic!("{source}: {e:?}"));
    let first = m.var_ids().next().expect("a variable");
    Solver::new(&m).all(&[first], 1000).expect("solved").iter().map(|a| a[first.idx()]).collect()
}

#[test]
fn constrints_examples_have_its_answers() {
    assert_eq!(values("5 * x == 10"), [2]);
    assert_eq!(values("x * 5 == 10"), [2]);
    assert_eq!(values("5 * x <= 15; x + 1 <= 3"), [1, 2]);
    assert_eq!(values("x == [1, 2, 3] # This is a comment"), [1, 2, 3]);
    assert_eq!(values("x ^ 2 == 9  # Another comment"), [3]);
    assert_eq!(values("512 % b == 0;"), [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
    assert_eq!(values("a <= 20; b <= 20; a * b == 15"), [1, 3, 5, 15]);
    assert_eq!(values("a == 5 | a == 3"), [3, 5]);
    assert_eq!(values("(a == 5 |\n a == 3);\n"), [3, 5]);
    assert_eq!(values("x % 9 == 0; x % 6 == 0; x <= 40"), [18, 36]);
    assert_eq!(values("24 % a * 4 == 0"), [1, 2, 3, 6]);
    let m = text::parse("A == [1, 2]; B == [3, 4];").expect("read");
    let all = Solver::new(&m).all(&[], 10).expect("solved");
    assert_eq!(all, [[1, 3], [1, 4], [2, 3], [2, 4]]);
}

#[test]
fn what_constrint_cannot_say() {
    assert_eq!(values("var x in -3..3; x * x == 9"), [-3, 3]);
    assert_eq!(values("var x in 0..100 step 25; x != 50; x < 100"), [0, 25, 75]);
    assert_eq!(values("var x in divisors(12); x > 2; x >= 4"), [4, 6, 12]);
    assert_eq!(values("var x, y in {1, 2, 4}; x == 4 -> y == 1; y > 1"), [1, 2]);
    assert_eq!(values("var x in 1..9; !(x % 2 == 0) & x % 3 != 0"), [1, 5, 7]);
    assert_eq!(values("var x in 1..9; x / 4 == 1; ceildiv(x, 4) == 2"), [5, 6, 7]);
    assert_eq!(values("var x in 1..9; var y in 2..3; max(x, y) == min(x + 1, 3)"), [1, 2, 3]);
    assert_eq!(values("var x in 1..9; table(x, x + 1) in {(1, 2), (3, 4), (5, 9)}"), [1, 3]);
    assert_eq!(values("var x in 1..9; 2 * (x + 1) == 10"), [4]);
    assert_eq!(values("var x in 1..9; [2, 3] * x == 6"), [2, 3]);
    assert_eq!(values("var x in 1..9; x == 1 <-> x <= 4"), [1, 5, 6, 7, 8, 9]);
    // A comparison with an undefined quotient is false, and so its negation true.
    assert_eq!(values("var x in 0..2; 2 / x == 1"), [2]);
    assert_eq!(values("var x in 0..2; !(2 / x == 1)"), [0, 1]);
}

#[test]
fn large_values_do_not_overflow() {
    // Products of default domains leave 64 bits by far.
    assert_eq!(values("a * b * c * d * e * f == 2 ^ 30; b * c * d * e * f == 2 ^ 29"), [2]);
    assert_eq!(values("var x in 1..3; var y in {4000000000000000000}; x * y <= y | x == 2"), [1, 2]);
    // A product beyond the range has no value, so no comparison with it holds.
    assert_eq!(values("var x in 1..3; var y in {4000000000000000000}; x * y <= y * 4"), [0; 0]);
    assert_eq!(values("var x in 1..3; var y in {4000000000000000000}; !(x * y <= y * 4)"), [1, 2, 3]);
}

#[test]
fn propagation_alone_narrows_the_documented_domains() {
    let left = |source: &str| {
        let m = text::parse(source).expect("read");
        Solver::new(&m).domains(100).expect("compiled").expect("feasible").swap_remove(0)
    };
    assert_eq!(left("5 * x <= 15; x + 1 <= 3"), Left::Values(vec![1, 2]));
    assert_eq!(left("x ^ 2 == 9"), Left::Values(vec![3]));
    assert_eq!(left("512 % b == 0"), Left::Values((0..10).map(|i| 1 << i).collect()));
    assert_eq!(left("a <= 20; b <= 20; a * b == 15"), Left::Values(vec![1, 3, 5, 15]));
    assert_eq!(left("a == 5 | a == 3"), Left::Values(vec![3, 5]));
    assert_eq!(left("x % 9 == 0; x % 6 == 0; x <= 40"), Left::Values(vec![18, 36]));
}

#[test]
fn errors_say_where_and_what_to_write() {
    for (source, code, line, column, part) in [
        ("a == 1;\nb = 2;", "E0801", 2, 3, "`==`"),
        ("a == 99999999999999999999", "E0802", 1, 6, "too large"),
        ("a == 1\nb == 2;", "E0803", 2, 1, "`;`"),
        ("a == ;", "E0803", 1, 6, "a variable, a number or a list"),
        ("a % 3 == 1", "E0803", 1, 10, "compares with 0 only"),
        ("a <= b <= c", "E0803", 1, 8, "do not chain"),
        ("(a == 1 | b == ) ; c == 1", "E0803", 1, 16, "a variable"),
        ("gcd(a, b) == 1", "E0803", 1, 1, "no function `gcd`"),
        ("var x in 5..2;", "E0804", 1, 10, "empty"),
        ("n: a == 1; n: b == 1", "E0804", 1, 12, "exists already"),
        ("table(a, b) in {(1)}", "E0804", 1, 17, "1 values for 2 columns"),
    ] {
        let errors = text::parse(source).expect_err(source);
        let d = &errors[0];
        let at = text::line_column(source, d.primary.0.start);
        assert_eq!((d.code, at), (code, (line, column)), "{source}: {d}");
        assert!(d.to_string().contains(part), "{source}: {d}");
    }
    // Each bad constraint is reported.
    assert_eq!(text::parse("a == ; b == 1; c +; d == 1").expect_err("two errors").len(), 2);
    let deep = format!("{}a == 1{}", "(".repeat(100_000), ")".repeat(100_000));
    assert_eq!(text::parse(&deep).expect_err("deep")[0].code, "E0805");
    let m = text::parse("a <= 3").expect("read");
    assert_eq!(text::parse_expr("a + q", &m).expect_err("unknown")[0].code, "E0806");
    assert_eq!(text::parse_order("a:up", &m).expect_err("direction")[0].code, "E0803");
    assert_eq!(text::parse_names("a, q", &m).expect_err("unknown")[0].code, "E0806");
}

#[test]
fn a_conflict_is_named_with_its_place() {
    let source = "size: x * y == 35;\nlow: x <= 4;\nother: z <= 9;\n  high: y <= 6;\n";
    let m = text::parse(source).expect("read");
    let explanation = Solver::new(&m).explain().expect("explained");
    assert!(matches!(explanation, Explanation::Conflict(_)));
    let report = Report::of_explanation(&m, source, &explanation);
    assert_eq!((report.status, report.minimal), (Status::Infeasible, Some(true)));
    let names: Vec<&str> = report.conflict.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["size", "low", "high"]);
    assert_eq!((report.conflict[2].line, report.conflict[2].column), (4, 9));
    let json = serde_json::to_value(&report).expect("serialises");
    assert_eq!(json["conflict"][1]["text"], "x <= 4");
    assert_eq!(json["schema"], 1);
}

#[test]
fn independent_parts_multiply_without_enumeration() {
    // 30 variables of 10 values: 10^30 assignments, and a pair with 4.
    let mut source: String = (0..30).map(|i| format!("var f{i} in 1..10;")).collect();
    source += "a * b == 8;";
    let m = text::parse(&source).expect("read");
    assert_eq!(Solver::new(&m).count(&[]), Ok(4 * 10u128.pow(30)));
}
