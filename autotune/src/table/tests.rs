//! Tables: text, limits, lookups, merges.

use super::*;

fn entry(cascade: &str, sizes: &[(&str, u64)], us: f64) -> Entry {
    let sizes: Vec<(String, u64)> = sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
    Entry {
        cascade: cascade.into(),
        plan: "0123456789abcdef".into(),
        class: Class::of(&sizes).to_string(),
        sizes: sizes.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(","),
        measured_us: us,
        predicted_us: Some(1.5 * us),
        candidates: 8,
        einfall: "0.1.0".into(),
        driver: "LLVM 22".into(),
        mapping: format!("mapping {cascade} on cpu {{\n    kernel k {{\n        axis m block 8\n    }}\n}}\n"),
    }
}

fn table() -> Table {
    let mut t = Table::new(Kind::Cpu, "some processor");
    t.insert(entry("b", &[("N", 1000), ("M", 64)], 20.0));
    t.insert(entry("a", &[("N", 4096), ("M", 64)], 10.0));
    t.insert(entry("a", &[("N", 128), ("M", 64)], 1.0));
    t
}

#[test]
fn a_table_is_sorted_text_that_reads_back() {
    let t = table();
    let text = t.to_string();
    assert_eq!(Table::parse(text.as_bytes()), Ok(t.clone()));
    assert!(text.contains("class = \"M=64 N=1024\""), "{text}");
    let order: Vec<(&str, &str)> = t.entries.iter().map(|e| (e.cascade.as_str(), e.sizes.as_str())).collect();
    assert_eq!(order, [("a", "N=128,M=64"), ("a", "N=4096,M=64"), ("b", "N=1000,M=64")]);
    // One entry more changes the lines of that entry alone.
    let mut more = t.clone();
    more.insert(entry("a", &[("N", 512), ("M", 64)], 3.0));
    let more = more.to_string();
    let mut rest = more.lines();
    assert!(text.lines().all(|l| rest.any(|m| m == l)), "the other lines are as they were, in order");
}

#[test]
fn lookups_generalise_by_class() {
    let t = table();
    let of = |n: u64, m: u64| {
        let sizes = [("M".to_owned(), m), ("N".to_owned(), n)];
        t.lookup("0123456789abcdef", &sizes).map(|e| e.sizes.as_str())
    };
    assert_eq!(of(4096, 64), Some("N=4096,M=64"));
    assert_eq!(of(2049, 33), Some("N=4096,M=64"), "of the same class");
    assert_eq!(of(100, 64), Some("N=128,M=64"));
    assert_eq!(of(16384, 64), Some("N=4096,M=64"), "two steps away");
    assert_eq!(of(1 << 20, 64), None, "too far from all");
    assert_eq!(t.lookup("fedcba9876543210", &[]), None, "of another plan");
    // Without sizes the largest.
    let all = t.lookup("0123456789abcdef", &[]).map(|e| e.sizes.as_str());
    assert_eq!(all, Some("N=4096,M=64"));
}

#[test]
fn damaged_foreign_and_hostile_tables_are_refused() {
    let text = table().to_string();
    for (from, to, says) in [
        ("format = 1", "format = 2", "by a later version"),
        ("format = 1", "format = 0", "of format 0"),
        ("format = 1\n", "", "does not say"),
        ("kind = \"cpu\"", "kind = \"abacus\"", "abacus"),
        ("measured_us = 10.0", "measured_us = -10.0", "cannot have been measured"),
        ("measured_us = 10.0", "measured_us = nan", "cannot have been measured"),
        ("predicted_us = 15.0", "predicted_us = inf", "is no time"),
        ("M=64 N=4096", "N=4096 M=64", "no class"),
        ("M=64 N=4096", "M=64 N=4095", "no class"),
        ("axis m block 8", "axis m block eight", "does not parse"),
        ("axis m block 8", "axis m", "does not parse"),
        ("cascade = \"b\"", "cascade = \"\\u0007\"", "control characters"),
        ("cascade = \"b\"", "cascade = \"a\"\nextra = 1", "extra"),
        ("cascade = \"a\"", "cascade = \"c\"", "out of order"),
        ("[[entry]]", "[[entry", "no table"),
    ] {
        assert!(text.contains(from), "{from}");
        let e = Table::parse(text.replacen(from, to, 1).as_bytes()).expect_err(to).to_string();
        assert!(e.contains(says), "{to}: {e}");
    }
    assert_eq!(Table::parse(&[0xff, 0xfe]), Err(TableError::Encoding));
    assert_eq!(Table::parse(&vec![b'#'; MAX_BYTES + 1]), Err(TableError::TooLong(MAX_BYTES + 1)));
    let mut long = table();
    long.entries[0].driver = "x".repeat(MAX_NAME + 1);
    assert!(Table::parse(long.to_string().as_bytes()).is_err());
    let mut long = table();
    long.entries[0].mapping += &" ".repeat(MAX_MAPPING);
    assert!(Table::parse(long.to_string().as_bytes()).is_err());
    // Every way to cut a text short is refused or is a table of fewer entries.
    for cut in 0..text.len() {
        if let Ok(t) = Table::parse(&text.as_bytes()[..cut]) {
            assert!(t.entries.len() < 3 || t == table(), "cut at {cut}");
        }
    }
    // Deep nesting does not exhaust the stack.
    let deep = format!("format = 1\nx = {}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(Table::parse(deep.as_bytes()).is_err());
}

#[test]
fn merges_keep_the_faster_of_equal_sizes() {
    let mut t = table();
    let mut other = Table::new(Kind::Cpu, "some processor");
    other.insert(entry("a", &[("N", 4096), ("M", 64)], 7.0));
    other.insert(entry("a", &[("N", 128), ("M", 64)], 2.0));
    other.insert(entry("c", &[("N", 1)], 2.0));
    let mut back = other.clone();
    t.merge(other).unwrap();
    back.merge(table()).unwrap();
    assert_eq!(t, back, "either way round");
    let times: Vec<f64> = t.entries.iter().map(|e| e.measured_us).collect();
    assert_eq!(times, [1.0, 7.0, 20.0, 2.0]);
    // Of two sizes of a class the larger stays, whichever comes first.
    for turn in [[3000, 4096], [4096, 3000]] {
        let mut t = Table::new(Kind::Cpu, "some processor");
        turn.iter().for_each(|n| t.insert(entry("a", &[("N", *n)], *n as f64)));
        assert_eq!(t.entries.iter().map(|e| e.sizes.as_str()).collect::<Vec<_>>(), ["N=4096"]);
    }
    let foreign = Table::new(Kind::Cuda, "some processor");
    assert!(matches!(t.merge(foreign), Err(TableError::Device(..))));
}
