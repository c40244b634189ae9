//! The .npz format: a zip archive whose members are .npy files.
//!
//! Invariant: a member's announced size is compared with its compressed size before memory is taken, as deflate
//! cannot expand more than 1,032 times, and the members together stay below the limit.

use super::{Limits, Named, Reason, npy};
use einfall_runtime::HostArray;
use std::collections::HashSet;
use std::io::{Read, Seek, Write};
use zip::result::ZipError;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Bound on deflate's expansion (RFC 1951: 258 bytes from two bits).
const MAX_EXPANSION: u64 = 1032;

fn reason(error: ZipError) -> Reason {
    match error {
        ZipError::Io(e) => Reason::Io(e),
        other => Reason::Malformed { format: ".npz", detail: other.to_string() },
    }
}

fn malformed(detail: impl Into<String>) -> Reason {
    Reason::Malformed { format: ".npz", detail: detail.into() }
}

/// Reads every member.
pub(super) fn read(
    mut reader: impl Read + Seek,
    file_bytes: u64,
    limits: &Limits,
) -> Result<Vec<(String, HostArray)>, Named> {
    let members = listed_members(&mut reader, file_bytes).map_err(|r| (None, r))?;
    let mut archive = ZipArchive::new(reader).map_err(|e| (None, reason(e)))?;
    if archive.len() > limits.arrays {
        return Err((None, Reason::Limit { limit: limits.arrays as u64, unit: "arrays" }));
    }
    // The reader keeps one member of each name.
    if members.is_some_and(|n| n != archive.len() as u64) {
        return Err((None, Reason::Duplicate));
    }
    let mut left = limits.total_bytes;
    let mut names = HashSet::new();
    let mut arrays = Vec::new();
    for i in 0..archive.len() {
        let mut member = archive.by_index(i).map_err(|e| (None, reason(e)))?;
        let file_name = member.name().map_err(|e| (None, reason(e)))?.into_owned();
        let Some(name) = file_name.strip_suffix(".npy") else {
            return Err((Some(file_name), malformed("a member is not a .npy file")));
        };
        let failed = |reason: Reason| (Some(name.to_string()), reason);
        if !names.insert(name.to_string()) {
            return Err(failed(Reason::Duplicate));
        }
        let (packed, size) = (member.compressed_size(), member.size());
        if packed > file_bytes || size > packed.saturating_mul(MAX_EXPANSION).saturating_add(1 << 10) {
            return Err(failed(malformed(format!("{packed} bytes cannot unpack to {size}"))));
        }
        let array = npy::read(&mut member, size, left).map_err(|r| match r {
            Reason::Limit { unit, .. } => failed(Reason::Limit { limit: limits.total_bytes, unit }),
            other => failed(other),
        })?;
        left = left.saturating_sub(array.bytes().len() as u64);
        arrays.push((name.to_string(), array));
    }
    Ok(arrays)
}

/// The number of members that the end record lists, without zip64 (which lists 65,535 there).
fn listed_members(reader: &mut (impl Read + Seek), file_bytes: u64) -> Result<Option<u64>, Reason> {
    // The end record: 22 bytes and a comment of at most 65,535.
    let window = file_bytes.min(22 + 65_535);
    reader.seek(std::io::SeekFrom::Start(file_bytes - window))?;
    let mut tail = Vec::new();
    reader.take(window).read_to_end(&mut tail)?;
    reader.seek(std::io::SeekFrom::Start(0))?;
    let found = tail.windows(22).rev().find(|w| w[..4] == *b"PK\x05\x06");
    Ok(found.map(|w| u64::from(u16::from_le_bytes([w[10], w[11]]))).filter(|n| *n != 0xffff))
}

/// Writes the arrays uncompressed, as `numpy.savez` does.
pub(super) fn write(out: &mut (impl Write + Seek), arrays: &[(&str, &HostArray)]) -> Result<(), Named> {
    let bare = |e: ZipError| (None, reason(e));
    let mut archive = ZipWriter::new(out);
    for (name, array) in arrays {
        let large = array.bytes().len() as u64 > u64::from(u32::MAX) - (1 << 16);
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(large);
        archive.start_file(format!("{name}.npy"), options).map_err(|e| (Some(name.to_string()), reason(e)))?;
        npy::write(&mut archive, array).map_err(|r| (Some(name.to_string()), r))?;
    }
    archive.finish().map_err(bare)?;
    Ok(())
}
