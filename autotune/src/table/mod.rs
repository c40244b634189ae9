//! Device tables: the fastest mappings that a tuner has measured, as text that people keep in version control.
//!
//! A table is TOML: a format version, the device, and entries in order of cascade, plan and class, so that two tables
//! differ in the lines of the entries that differ. An entry says for which plan ([`fingerprint`]) and which class of
//! sizes ([`class`]) its mapping won, what was measured, what the model had predicted, and by which version and driver.
//! Invariants: a table that is read has passed [`Table::check`]; a text of another format, beyond the limits, or with an
//! entry that says what cannot be is refused whole; without an entry for a plan the model alone decides.

use einfall_ir::mapping::{self, Mapping};
use einfall_ir::tile::Plan;
use serde::{Deserialize, Serialize};

mod class;
#[cfg(test)]
mod tests;

pub use class::Class;

/// The format this version reads and writes.
pub const FORMAT: u32 = 1;
/// Bytes of a table's text.
pub const MAX_BYTES: usize = 16 << 20;
/// Entries of a table.
pub const MAX_ENTRIES: usize = 1 << 16;
/// Bytes of a mapping's text.
pub const MAX_MAPPING: usize = 1 << 16;
/// Bytes of any other string.
pub const MAX_NAME: usize = 256;

/// What a table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// A table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// [`FORMAT`].
    pub format: u32,
    /// What the device is.
    pub kind: Kind,
    /// The device by its own name.
    pub device: String,
    /// Entries, sorted.
    #[serde(default, rename = "entry")]
    pub entries: Vec<Entry>,
}

/// The fastest mapping of a plan for a class of sizes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The cascade's name.
    pub cascade: String,
    /// The plan's [`fingerprint`].
    pub plan: String,
    /// The class of sizes, as [`Class`] prints it.
    pub class: String,
    /// The sizes measured: `M=4096,N=1000`.
    pub sizes: String,
    /// Median microseconds measured.
    pub measured_us: f64,
    /// Microseconds that the model had predicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_us: Option<f64>,
    /// Mappings measured for these sizes.
    pub candidates: u32,
    /// Einfall's version.
    pub einfall: String,
    /// The device's driver or compiler.
    pub driver: String,
    /// The mapping's text.
    pub mapping: String,
}

/// Why a table is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableError {
    /// Longer than [`MAX_BYTES`].
    TooLong(usize),
    /// No UTF-8.
    Encoding,
    /// No TOML, or not a table's fields.
    Syntax(String),
    /// Another format.
    Format(Option<i64>),
    /// What an entry says cannot be.
    Entry {
        /// Its position.
        index: usize,
        /// What is wrong.
        reason: String,
    },
    /// Two tables of different devices.
    Device(String, String),
}

impl std::fmt::Display for TableError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TableError::TooLong(n) => write!(f, "a table of {n} bytes; {MAX_BYTES} is the most"),
            TableError::Encoding => f.write_str("a table is UTF-8 text"),
            TableError::Syntax(e) => write!(f, "no table: {}", e.trim_end()),
            TableError::Format(None) => write!(f, "no table: it does not say `format = {FORMAT}`"),
            TableError::Format(Some(n)) if *n > i64::from(FORMAT) => {
                write!(f, "a table of format {n}, by a later version; this one reads {FORMAT}: tune again or update")
            }
            TableError::Format(Some(n)) => write!(f, "a table of format {n}; this version reads {FORMAT}"),
            TableError::Entry { index, reason } => write!(f, "entry {}: {reason}", index + 1),
            TableError::Device(a, b) => write!(f, "tables of different devices: {a} and {b}"),
        }
    }
}

impl std::error::Error for TableError {}

/// What identifies a plan: a hash of its text. A plan that other versions of the compiler form differently has another.
pub fn fingerprint(plan: &Plan) -> String {
    blake3::hash(plan.to_string().as_bytes()).to_hex()[..16].to_owned()
}

impl Table {
    /// An empty table.
    pub fn new(kind: Kind, device: &str) -> Table {
        Table { format: FORMAT, kind, device: device.to_owned(), entries: Vec::new() }
    }

    /// Reads a table's text, as [`Table`]'s display writes it.
    ///
    /// ```
    /// use einfall_autotune::table::Table;
    ///
    /// let table = Table::parse(b"format = 1\nkind = \"cpu\"\ndevice = \"a processor\"\n")?;
    /// assert!(table.entries.is_empty() && Table::parse(table.to_string().as_bytes())? == table);
    /// assert!(Table::parse(b"format = 7").is_err());
    /// # Ok::<(), einfall_autotune::table::TableError>(())
    /// ```
    ///
    /// # Errors
    /// Everything that [`TableError`] lists; nothing of a damaged table is used.
    pub fn parse(bytes: &[u8]) -> Result<Table, TableError> {
        if bytes.len() > MAX_BYTES {
            return Err(TableError::TooLong(bytes.len()));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| TableError::Encoding)?;
        let value: toml::Table = toml::from_str(text).map_err(|e| TableError::Syntax(e.to_string()))?;
        match value.get("format").and_then(toml::Value::as_integer) {
            Some(n) if n == i64::from(FORMAT) => {}
            other => return Err(TableError::Format(other)),
        }
        let table: Table = toml::from_str(text).map_err(|e| TableError::Syntax(e.to_string()))?;
        table.check()?;
        Ok(table)
    }

    /// Checks limits, order and every entry by itself.
    ///
    /// # Errors
    /// The first entry that is wrong.
    pub fn check(&self) -> Result<(), TableError> {
        let wrong = |index, reason: String| Err(TableError::Entry { index, reason });
        if self.entries.len() > MAX_ENTRIES {
            return wrong(MAX_ENTRIES, format!("there are {} entries; {MAX_ENTRIES} is the most", self.entries.len()));
        }
        for (i, e) in self.entries.iter().enumerate() {
            for (what, text) in e.names() {
                if text.len() > MAX_NAME || text.chars().any(char::is_control) {
                    return wrong(i, format!("its {what} is longer than {MAX_NAME} bytes or has control characters"));
                }
            }
            if !(e.measured_us.is_finite() && e.measured_us > 0.0) {
                return wrong(i, format!("{} microseconds cannot have been measured", e.measured_us));
            }
            if e.predicted_us.is_some_and(|p| !(p.is_finite() && p > 0.0)) {
                return wrong(i, "its prediction is no time".to_owned());
            }
            if e.class.parse::<Class>().map(|c| c.to_string()).as_ref() != Ok(&e.class) {
                return wrong(i, format!("`{}` is no class of sizes: N=1024 M=64 in order of names", e.class));
            }
            if e.mapping.len() > MAX_MAPPING {
                return wrong(i, format!("a mapping of {} bytes; {MAX_MAPPING} is the most", e.mapping.len()));
            }
            e.read().map_err(|reason| TableError::Entry { index: i, reason })?;
        }
        if let Some(i) = self.entries.windows(2).position(|w| w[0].key() >= w[1].key()) {
            return wrong(i + 1, "it is out of order, or there twice".to_owned());
        }
        Ok(())
    }

    /// The entry for a plan at sizes: of the same class, else of the nearest class within a factor of eight over all
    /// ranks together. Ranks without a size do not count; of equally near entries the one of the largest sizes.
    pub fn lookup(&self, fingerprint: &str, sizes: &[(String, u64)]) -> Option<&Entry> {
        let wanted = Class::of(sizes);
        let near = self.entries.iter().filter(|e| e.plan == fingerprint).filter_map(|e| {
            let class: Class = e.class.parse().ok()?;
            let distance = class.distance(&wanted);
            (distance <= 3).then_some((distance, std::cmp::Reverse(class.volume()), e))
        });
        near.min_by_key(|(distance, volume, _)| (*distance, *volume)).map(|n| n.2)
    }

    /// Puts an entry in its place. One of the same sizes is replaced; of two sizes of a class the larger stays.
    pub fn insert(&mut self, entry: Entry) {
        match self.entries.binary_search_by(|e| e.key().cmp(&entry.key())) {
            Ok(i) if self.entries[i].sizes == entry.sizes || entry.points() > self.entries[i].points() => {
                self.entries[i] = entry;
            }
            Ok(_) => {}
            Err(i) => self.entries.insert(i, entry),
        }
    }

    /// Takes over every entry of another table of the device: of two for the same class and sizes the faster, of two for
    /// the same class that of the larger sizes.
    ///
    /// # Errors
    /// [`TableError::Device`].
    pub fn merge(&mut self, other: Table) -> Result<(), TableError> {
        if (self.kind, &self.device) != (other.kind, &other.device) {
            return Err(TableError::Device(self.device.clone(), other.device));
        }
        for e in other.entries {
            let same = |x: &Entry| x.key() == e.key() && x.sizes == e.sizes;
            if !self.entries.iter().any(|x| same(x) && x.measured_us <= e.measured_us) {
                self.insert(e);
            }
        }
        Ok(())
    }
}

impl Entry {
    fn key(&self) -> (&str, &str, &str) {
        (&self.cascade, &self.plan, &self.class)
    }

    fn names(&self) -> [(&'static str, &str); 6] {
        [
            ("cascade", &self.cascade),
            ("plan", &self.plan),
            ("class", &self.class),
            ("sizes", &self.sizes),
            ("version", &self.einfall),
            ("driver", &self.driver),
        ]
    }

    /// Points of its sizes together, and the sizes themselves where those are equal.
    fn points(&self) -> (f64, &str) {
        let number = |part: &str| part.split_once('=').and_then(|(_, n)| n.parse::<f64>().ok()).unwrap_or(1.0);
        (self.sizes.split(',').map(number).product(), &self.sizes)
    }

    /// Its mapping.
    ///
    /// # Errors
    /// Where the text is no mapping.
    pub fn read(&self) -> Result<Mapping, String> {
        mapping::parse::parse(&self.mapping).map_err(|d| format!("its mapping does not parse: {}", d.message))
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(
            "# The fastest mappings measured by `einfall tune`; `einfall tables` shows, merges and checks it.\n",
        )?;
        f.write_str(&toml::to_string_pretty(self).map_err(|_| std::fmt::Error)?)
    }
}
