//! Records of measurements: one JSON object a line, appended as each measurement ends.
//!
//! Invariant: a process that is killed loses the measurement it was at; what it wrote of a line is cut off when the
//! journal is opened again. One process at a time has a journal: the system's lock on it ends with the process, however
//! that ends.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use fs4::{FileExt, TryLockError};
use serde::{Deserialize, Serialize};

use super::super::Failure;

/// Bytes of a journal that are read.
const MOST: u64 = 256 << 20;

/// What is known of one mapping of one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Einfall's version.
    pub einfall: String,
    /// The device by its own name.
    pub device: String,
    /// Its driver, or the machine's architecture.
    pub driver: String,
    /// The cascade.
    pub cascade: String,
    /// Extents fixed at compile time.
    pub statics: String,
    /// The sizes.
    pub sizes: String,
    /// `model`, `drawn` or `given`.
    pub origin: String,
    /// The candidate's number within the case.
    pub index: usize,
    /// Which time it was measured.
    pub turn: usize,
    /// `ok`, `failed`, `wrong` or `hung`.
    pub outcome: String,
    /// Why, if it is not `ok`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Microseconds by the model, if the model has a price.
    pub predicted_us: Option<f64>,
    /// No schedule of the same work is faster, by the model.
    pub floor_us: Option<f64>,
    /// The term that binds, by the model.
    pub binding: Option<String>,
    /// The model's terms in microseconds.
    #[serde(default)]
    pub terms: Vec<(String, f64)>,
    /// Median microseconds measured, if it is `ok`.
    pub measured_us: Option<f64>,
    /// Median microseconds of the mapping timed in turns with it, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beside_us: Option<f64>,
    /// Launches of that median.
    pub launches: usize,
    /// Seconds of compiling.
    pub build_s: f64,
    /// Registers of a thread by kernel.
    #[serde(default)]
    pub registers: Vec<u32>,
    /// Bytes of local memory of a thread by kernel.
    #[serde(default)]
    pub local_bytes: Vec<u32>,
    /// The mapping's text.
    pub mapping: String,
}

/// The records of a text; what is none is left out, and said.
fn records(path: &Path, text: &[u8]) -> Vec<Record> {
    let read = |line: &[u8]| {
        let record = serde_json::from_slice(line);
        record.map_err(|e| eprintln!("{}: a line is no record and is left out: {e}", path.display())).ok()
    };
    text.split(|b| *b == b'\n').filter(|l| !l.is_empty()).filter_map(read).collect()
}

/// The records that a run wrote.
pub fn read(path: &Path) -> Result<Vec<Record>, Failure> {
    let fail = |e: std::io::Error| Failure::Machine(format!("{}: {e}", path.display()));
    let mut text = Vec::new();
    File::open(path).and_then(|f| f.take(MOST).read_to_end(&mut text)).map_err(fail)?;
    Ok(records(path, &text))
}

/// A file of records.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Opens or makes a journal: its whole records, and the file ready to append to. Refused while another process has it.
    pub fn open(path: &Path) -> Result<(Journal, Vec<Record>), Failure> {
        let fail = |e: std::io::Error| Failure::Machine(format!("{}: {e}", path.display()));
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(fail)?;
        }
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(fail)?;
        match FileExt::try_lock(&file) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let what = "another process tunes into this table: wait until it ends, or give another --out";
                return Err(Failure::Usage(format!("{}: {what}", path.display())));
            }
            Err(TryLockError::Error(e)) => return Err(fail(e)),
        }
        let bytes = file.metadata().map_err(fail)?.len();
        if bytes > MOST {
            return Err(Failure::Wrong(format!("{}: more than {MOST} bytes; this is no journal", path.display())));
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(fail)?;
        let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        if whole < text.len() {
            file.set_len(whole as u64).map_err(fail)?;
        }
        let records = records(path, &text[..whole]);
        Ok((Journal { path: path.to_owned(), file }, records))
    }

    /// Appends a record in one write.
    pub fn push(&mut self, record: &Record) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(record).map_err(Failure::wrong)?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|e| Failure::Machine(format!("{}: {e}", self.path.display())))
    }

    /// Removes the file: what it held is in a table now.
    pub fn remove(self) {
        // A journal that stays is read again, which costs nothing but time.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(index: usize) -> Record {
        Record {
            einfall: "0".into(),
            device: "d".into(),
            driver: "r".into(),
            cascade: "c".into(),
            statics: String::new(),
            sizes: "M=1".into(),
            origin: "model".into(),
            index,
            turn: 0,
            outcome: "ok".into(),
            reason: None,
            predicted_us: Some(1.5),
            floor_us: None,
            binding: None,
            terms: vec![("L2".into(), 0.5)],
            measured_us: Some(2.0),
            beside_us: None,
            launches: 3,
            build_s: 0.1,
            registers: vec![],
            local_bytes: vec![],
            mapping: "mapping c on d {\n}\n".into(),
        }
    }

    #[test]
    fn a_journal_has_one_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let (mut first, _) = Journal::open(&path).map_err(|_| "opens").unwrap();
        first.push(&record(0)).map_err(|_| "writes").unwrap();
        let Err(Failure::Usage(said)) = Journal::open(&path) else { panic!("the second is refused") };
        assert!(said.contains("another process tunes into this table"), "{said}");
        // Nothing was cut off or added by the attempt.
        first.push(&record(1)).map_err(|_| "writes").unwrap();
        drop(first);
        let (_, records) = Journal::open(&path).map_err(|_| "opens").unwrap();
        assert_eq!(records, [record(0), record(1)]);
    }

    #[test]
    fn a_torn_line_is_cut_off_and_the_rest_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let (mut j, none) = Journal::open(&path).map_err(|_| "opens").unwrap();
        assert_eq!(none, vec![]);
        for i in 0..3 {
            j.push(&record(i)).map_err(|_| "writes").unwrap();
        }
        drop(j);
        let whole = std::fs::read(&path).unwrap();
        // Killed anywhere within the last line: the two before it are read, and appending goes on after them.
        let third = whole[..whole.len() - 1].iter().rposition(|b| *b == b'\n').unwrap() + 1;
        for cut in [third, third + 1, (third + whole.len()) / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut j, two) = Journal::open(&path).map_err(|_| "opens").unwrap();
            assert_eq!(two, [record(0), record(1)]);
            j.push(&record(7)).map_err(|_| "writes").unwrap();
            drop(j);
            let (_, three) = Journal::open(&path).map_err(|_| "opens").unwrap();
            assert_eq!(three, [record(0), record(1), record(7)]);
        }
    }
}
