//! Lists of sizes: `B=1,N=1024..8192:x2`, from the command line or a file.

use std::path::Path;

use super::super::Failure;
use super::super::source::unreadable;

/// Most combinations of one list.
const MOST: usize = 4096;

/// Sizes by rank name.
pub type Sizes = Vec<(String, u64)>;

/// A line of a size list: for cascades of this name, or for all.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// The cascade's name; none for any.
    pub cascade: Option<String>,
    /// Every combination.
    pub sizes: Vec<Sizes>,
}

/// Reads `--sizes`: a file with a list a line (`NAME: LIST` for one cascade, `#` starts a comment), or a list itself.
pub fn read(text: &str) -> Result<Vec<Line>, Failure> {
    let path = Path::new(text);
    if !path.is_file() {
        if !text.contains('=') {
            let what = format!("`{text}` is no list of sizes, such as M=512,N=256..1024:x2, and no file of lists");
            return Err(Failure::Usage(what));
        }
        return Ok(vec![Line { cascade: None, sizes: list(text).map_err(Failure::Usage)? }]);
    }
    let body = std::fs::read_to_string(path).map_err(|e| unreadable(path, &e))?;
    let mut lines = Vec::new();
    for (number, line) in body.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let (cascade, rest) = match line.split_once(':') {
            Some((name, rest)) if !name.contains('=') => (Some(name.trim().to_owned()), rest),
            Some(_) | None => (None, line),
        };
        let sizes = list(rest).map_err(|e| Failure::Wrong(format!("{text}:{}: {e}", number + 1)))?;
        lines.push(Line { cascade, sizes });
    }
    match lines.is_empty() {
        true => Err(Failure::Wrong(format!("{text}: no sizes in this file"))),
        false => Ok(lines),
    }
}

/// Every combination of a list, the first rank slowest.
pub fn list(text: &str) -> Result<Vec<Sizes>, String> {
    let mut all: Vec<Sizes> = vec![Vec::new()];
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (name, range) = part.split_once('=').ok_or_else(|| format!("`{part}` is no RANK=N, N..M:xF or N|M"))?;
        let values = values(range.trim())?;
        if all[0].iter().any(|(n, _)| n == name.trim()) {
            return Err(format!("rank `{}` is given twice", name.trim()));
        }
        if all.len() * values.len() > MOST {
            return Err(format!("more than {MOST} combinations"));
        }
        let with = |sizes: &Sizes, v: u64| -> Sizes {
            sizes.iter().cloned().chain(std::iter::once((name.trim().to_owned(), v))).collect()
        };
        all = all.iter().flat_map(|s| values.iter().map(move |v| with(s, *v))).collect();
    }
    if all[0].is_empty() { Err("no sizes".to_owned()) } else { Ok(all) }
}

/// `N`, `N|M|..`, `N..M` (every number), `N..M:xF` or `N..M:+D`; the end is included.
fn values(text: &str) -> Result<Vec<u64>, String> {
    let number = |t: &str| {
        let n = t.trim().parse::<u64>().map_err(|_| format!("`{t}` in `{text}` is no number"))?;
        if n == 0 { Err(format!("`{text}`: extents are positive")) } else { Ok(n) }
    };
    let Some((from, rest)) = text.split_once("..") else {
        return text.split('|').map(number).collect();
    };
    let (to, step) = rest.split_once(':').unwrap_or((rest, "+1"));
    let (from, to) = (number(from)?, number(to)?);
    let wrong = || format!("`{step}` in `{text}` is no step: xF with F ≥ 2, or +D with D ≥ 1");
    let next: Box<dyn Fn(u64) -> Option<u64>> = match (step.strip_prefix('x'), step.strip_prefix('+')) {
        (Some(f), _) => {
            let f = number(f).ok().filter(|f| *f >= 2).ok_or_else(wrong)?;
            Box::new(move |n: u64| n.checked_mul(f))
        }
        (None, Some(d)) => {
            let d = number(d).map_err(|_| wrong())?;
            Box::new(move |n: u64| n.checked_add(d))
        }
        (None, None) => return Err(wrong()),
    };
    let mut list = Vec::new();
    let mut at = Some(from);
    while let Some(n) = at.filter(|n| *n <= to) {
        list.push(n);
        if list.len() > MOST {
            return Err(format!("`{text}` is more than {MOST} sizes"));
        }
        at = next(n);
    }
    if list.is_empty() { Err(format!("`{text}` is empty")) } else { Ok(list) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_expand_in_order() {
        let got = list("B=1, N=1024..8192:x2").unwrap();
        let n: Vec<u64> = got.iter().map(|s| s[1].1).collect();
        assert_eq!(n, [1024, 2048, 4096, 8192]);
        assert!(got.iter().all(|s| s[0] == ("B".to_owned(), 1)));
        assert_eq!(list("A=1|5|7,C=8..16:+4").unwrap().len(), 9);
        assert_eq!(list("A=3..5").unwrap().len(), 3);
    }

    #[test]
    fn wrong_lists_say_what_is_wrong() {
        for (text, says) in [
            ("", "no sizes"),
            ("A", "is no RANK=N"),
            ("A=x", "is no number"),
            ("A=0", "positive"),
            ("A=1..9:x1", "is no step"),
            ("A=1..9:3", "is no step"),
            ("A=9..1", "is empty"),
            ("A=1,A=2", "given twice"),
            ("A=1..100000", "more than"),
            ("A=1..100,B=1..100", "more than"),
        ] {
            let e = list(text).expect_err(text);
            assert!(e.contains(says), "{text}: {e}");
        }
    }
}
