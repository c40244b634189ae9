//! Classes of sizes: extents up to the same power of two are alike.
//!
//! A class names every rank with the least power of two that is no smaller than its extent: 4096 stands for 2049 to
//! 4096. Blocks, stages and splits that win at one size of a class tend to win at its others. Invariant: ranks are in
//! order of their names, each once.

/// A class of sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class(Vec<(String, u64)>);

/// Most ranks of a class.
const RANKS: usize = 64;

impl Class {
    /// The class of sizes.
    pub fn of(sizes: &[(String, u64)]) -> Class {
        let round = |n: u64| n.max(1).checked_next_power_of_two().unwrap_or(1 << 63);
        let mut list: Vec<(String, u64)> = sizes.iter().map(|(n, v)| (n.clone(), round(*v))).collect();
        list.sort();
        list.dedup_by(|a, b| a.0 == b.0);
        Class(list)
    }

    /// Steps of a factor of two between two classes, over the ranks that both have.
    pub fn distance(&self, other: &Class) -> u32 {
        let of = |name: &str| other.0.iter().find(|(n, _)| n == name).map(|(_, v)| v.ilog2());
        self.0.iter().filter_map(|(n, v)| Some(of(n)?.abs_diff(v.ilog2()))).sum()
    }

    /// The sum of the extents' logarithms.
    pub fn volume(&self) -> u32 {
        self.0.iter().map(|(_, v)| v.ilog2()).sum()
    }
}

impl std::fmt::Display for Class {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list: Vec<String> = self.0.iter().map(|(n, v)| format!("{n}={v}")).collect();
        f.write_str(&list.join(" "))
    }
}

impl std::str::FromStr for Class {
    type Err = String;

    fn from_str(text: &str) -> Result<Class, String> {
        let mut list = Vec::new();
        for part in text.split(' ').filter(|p| !p.is_empty()) {
            let (name, value) = part.split_once('=').ok_or("no NAME=POWER")?;
            let value: u64 = value.parse().map_err(|_| "no number")?;
            if !value.is_power_of_two() || list.len() >= RANKS {
                return Err("no powers of two, or too many".to_owned());
            }
            list.push((name.to_owned(), value));
        }
        if list.windows(2).any(|w: &[(String, u64)]| w[0].0 >= w[1].0) {
            return Err("out of order".to_owned());
        }
        Ok(Class(list))
    }
}
