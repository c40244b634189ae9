//! Round trips, files as others write them, and hostile files.

use super::*;
use half::{bf16, f16};
use proptest::prelude::*;
use std::io::Cursor;
use tempfile::TempDir;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// A .npy file of version 1.0 with this header text and data.
fn npy(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

fn header(descr: &str, fortran: &str, shape: &str) -> String {
    format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}  \n")
}

fn save(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// The array of a .npy file with these bytes, or why not.
fn read_npy(bytes: &[u8]) -> Result<HostArray, Reason> {
    let folder = tempfile::tempdir().unwrap();
    let path = save(&folder, "a.npy", bytes);
    read(&path, &Limits::default()).map(|mut arrays| arrays.remove(0).1).map_err(|e| e.reason)
}

fn read_as(name: &str, bytes: &[u8]) -> Result<Vec<(String, HostArray)>, FileError> {
    let folder = tempfile::tempdir().unwrap();
    read(&save(&folder, name, bytes), &Limits::default())
}

fn samples() -> Vec<(&'static str, HostArray)> {
    vec![
        ("f32", HostArray::from_slice(&[1.5f32, -0.0, f32::NAN, f32::INFINITY, 3.0, 1e-45], &[2, 3]).unwrap()),
        ("f64", HostArray::from_slice(&[1.0f64, 2.0], &[2, 1]).unwrap()),
        ("f16", HostArray::from_slice(&[f16::from_f32(0.5)], &[1]).unwrap()),
        ("bf16", HostArray::from_slice(&[bf16::from_f32(-3.0); 5], &[5]).unwrap()),
        ("i64", HostArray::from_slice(&[i64::MIN, 7], &[2]).unwrap()),
        ("i32", HostArray::from_slice(&[-5i32, 6, 7, 8], &[2, 2]).unwrap()),
        ("i8", HostArray::from_slice(&[-1i8], &[1, 1, 1]).unwrap()),
        ("u8", HostArray::from_slice(&[255u8], &[]).unwrap()),
        ("bool", HostArray::from_bytes(DType::Bool, &[3], &[1, 0, 1]).unwrap()),
        ("empty", HostArray::zeros(DType::F32, &[0, 4]).unwrap()),
    ]
}

#[test]
fn every_type_survives_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let samples = samples();
    let all: Vec<(&str, &HostArray)> = samples.iter().map(|(n, a)| (*n, a)).collect();
    for (name, array) in &all {
        let path = folder.path().join(format!("{name}.npy"));
        write(&path, &[(name, array)]).unwrap();
        assert_eq!(read(&path, &Limits::default()).unwrap(), [(name.to_string(), (*array).clone())]);
    }
    let npz = folder.path().join("all.npz");
    write(&npz, &all).unwrap();
    let back = read(&npz, &Limits::default()).unwrap();
    assert!(back.iter().map(|(n, a)| (n.as_str(), a)).eq(all.iter().copied()), "{back:?}");
    let fp8 = HostArray::from_bytes(DType::F8E4M3, &[2], &[0x7e, 0x01]).unwrap();
    let with_fp8 = [&all[..], &[("fp8", &fp8)]].concat();
    let path = folder.path().join("all.safetensors");
    write(&path, &with_fp8).unwrap();
    let mut back = read(&path, &Limits::default()).unwrap();
    back.sort_by_key(|(name, _)| with_fp8.iter().position(|(n, _)| n == name));
    assert!(back.iter().map(|(n, a)| (n.as_str(), a)).eq(with_fp8.iter().copied()), "{back:?}");
    assert!(matches!(write(&npz, &with_fp8).unwrap_err().reason, Reason::DType { .. }), "f8 has no .npy name");
    assert_eq!(read(&npz, &Limits::default()).unwrap().len(), all.len(), "a failed write spoils the file");
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().starts_with('.')), "files left behind: {left:?}");
}

#[test]
fn fortran_order_is_transposed() {
    // The column-major bytes of [[[0 1 2] [3 4 5]] ..] in extents 2, 2, 3.
    let shape = [2usize, 2, 3];
    let mut data = Vec::new();
    for k in 0..3i32 {
        for j in 0..2 {
            for i in 0..2 {
                data.extend(((i * 2 + j) * 3 + k).to_le_bytes());
            }
        }
    }
    let array = read_npy(&npy(&header("<i4", "True", "(2, 2, 3)"), &data)).unwrap();
    assert_eq!(array.shape(), shape.map(|d| d as u64));
    assert_eq!(array.as_slice::<i32>().unwrap(), (0..12).collect::<Vec<_>>());
    let empty = read_npy(&npy(&header("<i4", "True", "(2, 0)"), &[])).unwrap();
    assert_eq!(empty.shape(), [2, 0]);
}

#[test]
fn big_endian_is_swapped() {
    let data: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| v.to_be_bytes()).collect();
    assert_eq!(read_npy(&npy(&header(">f4", "False", "(2,)"), &data)).unwrap().as_slice(), Some(&[1.5f32, -2.0][..]));
    let data: Vec<u8> = [1i64, 2, 3, 4].iter().flat_map(|v| v.to_be_bytes()).collect();
    let array = read_npy(&npy(&header(">i8", "True", "(2, 2)"), &data)).unwrap();
    assert_eq!(array.as_slice(), Some(&[1i64, 3, 2, 4][..]));
    assert_eq!(read_npy(&npy(&header(">i1", "False", "(1,)"), &[200])).unwrap().as_slice(), Some(&[-56i8][..]));
}

#[test]
fn other_spellings_of_the_header_are_read() {
    for text in [
        "{\"shape\":(1,),\"descr\":\"<f4\",\"fortran_order\":False}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1L,), }          \n",
        "  { 'descr' : '=f4' , 'fortran_order' : True , 'shape' : ( 1 , ) }",
    ] {
        assert_eq!(read_npy(&npy(text, &2f32.to_le_bytes())).unwrap().as_slice(), Some(&[2f32][..]), "{text}");
    }
    let mut two = b"\x93NUMPY\x02\x00".to_vec();
    let text = header("<f4", "False", "()");
    two.extend((text.len() as u32).to_le_bytes());
    two.extend(text.as_bytes());
    two.extend(3f32.to_le_bytes());
    assert_eq!(read_npy(&two).unwrap().shape(), [0u64; 0]);
    // Bytes of a bool that NumPy would take for true.
    let array = read_npy(&npy(&header("|b1", "False", "(2,)"), &[0, 9])).unwrap();
    assert_eq!(array.bytes(), [0, 1]);
}

#[test]
fn hostile_npy_headers_are_errors() {
    let ok = npy(&header("<f4", "False", "(2, 3)"), &[0; 24]);
    assert!(read_npy(&ok).is_ok());
    for len in 0..ok.len() {
        let reason = read_npy(&ok[..len]).unwrap_err();
        assert!(matches!(reason, Reason::Malformed { .. } | Reason::Truncated { expected: 24, .. }), "{len}: {reason}");
    }
    assert!(matches!(read_npy(&[&ok[..], b"x"].concat()), Err(Reason::Trailing { expected: 24 })));
    let huge = ["(4611686018427387904, 4)", "(18446744073709551615,)", "(0, 4294967296, 4294967296, 4294967296)"];
    for shape in huge {
        let reason = read_npy(&npy(&header("<f4", "False", shape), &[0; 24])).unwrap_err();
        assert!(matches!(reason, Reason::Array(ArrayError::Overflow { .. })), "{shape}: {reason}");
    }
    let reason = read_npy(&npy(&header("<f4", "False", "(1000000000,)"), &[0; 24])).unwrap_err();
    assert!(matches!(reason, Reason::Truncated { expected: 4_000_000_000, found: 24 }), "{reason}");
    let reason = read_npy(&npy(&header("<f4", "False", "(1000000000000,)"), &[0; 24])).unwrap_err();
    assert!(matches!(reason, Reason::Limit { .. }), "{reason}");
    let many = format!("({})", "1,".repeat(65));
    for (what, text) in [
        ("a negative extent", header("<f4", "False", "(-1,)")),
        ("too large an extent", header("<f4", "False", "(18446744073709551616,)")),
        ("a float extent", header("<f4", "False", "(1.5,)")),
        ("no tuple", header("<f4", "False", "3")),
        ("an open tuple", header("<f4", "False", "(3, ")),
        ("many dimensions", header("<f4", "False", &many)),
        ("deep nesting", header("<f4", "False", &"(".repeat(30_000))),
        ("no bool", header("<f4", "1", "(3,)")),
        ("a missing key", "{'descr': '<f4', 'shape': (1,)}".into()),
        ("an unknown key", "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}".into()),
        ("a key twice", "{'descr': '<f4', 'descr': '<f8', 'fortran_order': False, 'shape': (1,)}".into()),
        ("an open string", "{'descr': '<f4".into()),
        ("text behind", header("<f4", "False", "(3,)") + "; import os"),
        ("nothing", String::new()),
        ("not a dict", "[1, 2]".into()),
    ] {
        let reason = read_npy(&npy(&text, &[0; 12])).unwrap_err();
        assert!(matches!(reason, Reason::Malformed { .. }), "{what}: {reason}");
    }
    let mut long = b"\x93NUMPY\x02\x00".to_vec();
    long.extend(u32::MAX.to_le_bytes());
    let reason = read_npy(&long).unwrap_err();
    assert!(reason.to_string().contains("longer than"), "{reason}");
    assert!(matches!(read_npy(b"\x93NUMPY\x09\x00\x00\x00"), Err(Reason::Malformed { .. })));
    assert!(matches!(read_npy(&npy("\u{fffd}", &[])[..11]), Err(Reason::Malformed { .. })));
    for descr in ["<c8", "|O", "<U4", "|S3", "<f16", "<i2", "<u4", "|V1", "", "<", "é4"] {
        let reason = read_npy(&npy(&header(descr, "False", "(1,)"), &[0; 4])).unwrap_err();
        assert!(matches!(reason, Reason::DType { .. }), "{descr}: {reason}");
    }
    let record = "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}";
    assert!(matches!(read_npy(&npy(record, &[0; 4])), Err(Reason::DType { .. })));
}

/// A zip archive of these members.
fn archive(members: &[(&str, Vec<u8>)], method: CompressionMethod) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, data) in members {
        zip.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(data).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

#[test]
fn hostile_npz_files_are_errors() {
    let array = npy(&header("<f4", "False", "(1000,)"), &[0; 4000]);
    let two = vec![("a.npy", array.clone()), ("b.npy", array.clone())];
    for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
        let good = archive(&two, method);
        let names: Vec<String> = read_as("x.npz", &good).unwrap().into_iter().map(|(n, _)| n).collect();
        assert_eq!(names, ["a", "b"]);
        for len in (0..good.len()).step_by(1 + good.len() / 97) {
            assert!(read_as("x.npz", &good[..len]).is_err(), "truncated to {len}");
        }
        // A second member of the first's name.
        let twice: Vec<u8> = replace_all(&good, b"b.npy", b"a.npy");
        let error = read_as("x.npz", &twice).unwrap_err();
        assert!(matches!(error.reason, Reason::Duplicate), "{error}");
    }
    // A flipped data byte fails the checksum.
    let mut flipped = archive(&two, CompressionMethod::Stored);
    let at = flipped.windows(4).position(|w| w == b"b.np").unwrap() + 300;
    flipped[at] ^= 1;
    assert!(read_as("x.npz", &flipped).is_err());

    // A bomb: 64 MB of zeros in 64 KB, beyond the limit set.
    let big = npy(&header("<f4", "False", "(16000000,)"), &vec![0; 64_000_000]);
    let bomb = archive(&[("a.npy", array.clone()), ("bomb.npy", big)], CompressionMethod::Deflated);
    assert!(bomb.len() < 200_000);
    let folder = tempfile::tempdir().unwrap();
    let path = save(&folder, "bomb.npz", &bomb);
    let limits = Limits { total_bytes: 1 << 20, ..Limits::default() };
    let error = read(&path, &limits).unwrap_err();
    assert!(matches!(error.reason, Reason::Limit { limit: 1_048_576, unit: "bytes" }), "{error}");
    assert_eq!(error.array.as_deref(), Some("bomb"));
    assert!(matches!(read(&path, &Limits { arrays: 1, ..limits }).unwrap_err().reason, Reason::Limit { .. }));
    // A member that announces more than its bytes can unpack to.
    let lying =
        archive(&[("a.npy", npy(&header("<f4", "False", "(1000000000,)"), &[0; 64]))], CompressionMethod::Stored);
    assert!(matches!(read_as("x.npz", &lying).unwrap_err().reason, Reason::Truncated { .. }));
    let mut patched = lying;
    let central = patched.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    patched[central + 24..central + 28].copy_from_slice(&4_000_001_000u32.to_le_bytes());
    let error = read_as("x.npz", &patched).unwrap_err();
    assert!(error.to_string().contains("cannot unpack"), "{error}");
    // Members that fit one by one, and not together.
    let half = npy(&header("<f4", "False", "(150000,)"), &[0; 600_000]);
    let path =
        save(&folder, "two.npz", &archive(&[("a.npy", half.clone()), ("b.npy", half)], CompressionMethod::Stored));
    let error = read(&path, &limits).unwrap_err();
    assert!(matches!(error.reason, Reason::Limit { limit: 1_048_576, unit: "bytes" }), "{error}");

    let error = read_as("x.npz", &archive(&[("readme.txt", b"hi".to_vec())], CompressionMethod::Stored)).unwrap_err();
    assert!(error.to_string().contains("readme.txt"), "{error}");
    assert!(matches!(read_as("x.npz", b"").unwrap_err().reason, Reason::Malformed { .. } | Reason::Io(_)));
    assert!(read_as("x.npz", &array).is_err(), "a .npy file under another name");
}

fn replace_all(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for at in 0..=bytes.len() - from.len() {
        if &bytes[at..at + from.len()] == from {
            out[at..at + from.len()].copy_from_slice(to);
        }
    }
    out
}

/// A .safetensors file with this header and data.
fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

#[test]
fn hostile_safetensors_files_are_errors() {
    let entry = |name: &str, dtype: &str, shape: &str, from: u64, to: u64| {
        format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{from},{to}]}}")
    };
    let one = |e: String| safetensors(&format!("{{{e}}}"), &[1; 8]);
    let good = one(entry("a", "F32", "[2]", 0, 8));
    assert_eq!(read_as("x.safetensors", &good).unwrap()[0].1.shape(), [2]);
    for len in 0..good.len() {
        assert!(read_as("x.safetensors", &good[..len]).is_err(), "truncated to {len}");
    }
    // A header of odd length leaves the data unaligned in the file, which must not matter.
    let text = format!("{{{}}}", entry("a", "F32", "[2]", 0, 8));
    for pad in 0..4 {
        let file = safetensors(&(text.clone() + &" ".repeat(pad)), &[1, 2, 3, 4, 5, 6, 7, 8]);
        let arrays = read_as("x.safetensors", &file).unwrap();
        assert_eq!(arrays[0].1.view().base() as usize % 64, 0);
        assert_eq!(arrays[0].1.bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
    }
    for (what, e) in [
        ("a size that lies", entry("a", "F32", "[3]", 0, 8)),
        ("offsets beyond the end", entry("a", "F32", "[3]", 0, 12)),
        ("offsets backwards", entry("a", "F32", "[2]", 8, 0)),
        ("a gap", entry("a", "F32", "[1]", 4, 8)),
        ("an overflowing shape", entry("a", "F32", "[4611686018427387904,4,4]", 0, 8)),
        ("a negative extent", entry("a", "F32", "[-2]", 0, 8)),
        ("an unknown type", entry("a", "Q7", "[8]", 0, 8)),
        ("overlap", [entry("a", "F32", "[2]", 0, 8), entry("b", "F32", "[2]", 0, 8)].join(",")),
        ("an uncovered tail", entry("a", "F32", "[1]", 0, 4)),
        ("no JSON", "a".into()),
    ] {
        let error = read_as("x.safetensors", &one(e)).unwrap_err();
        assert!(matches!(error.reason, Reason::Malformed { .. }), "{what}: {error}");
    }
    for dup in [entry("a", "F32", "[1]", 0, 4) + "," + &entry("a", "F32", "[1]", 4, 8), {
        let e = entry("a", "F32", "[2]", 0, 8);
        format!("{e},{e}")
    }] {
        let error = read_as("x.safetensors", &one(dup)).unwrap_err();
        assert!(matches!(error.reason, Reason::Duplicate), "{error}");
        assert_eq!(error.array.as_deref(), Some("a"));
    }
    let error = read_as("x.safetensors", &one(entry("a", "U16", "[4]", 0, 8))).unwrap_err();
    assert!(matches!(error.reason, Reason::DType { .. }), "{error}");
    let deep = safetensors(&"[".repeat(100_000), &[]);
    assert!(read_as("x.safetensors", &deep).is_err());
    let long = [&u64::MAX.to_le_bytes()[..], &[0; 64]].concat();
    assert!(read_as("x.safetensors", &long).is_err());
    let folder = tempfile::tempdir().unwrap();
    let path = save(&folder, "x.safetensors", &good);
    let limits = Limits { total_bytes: 16, ..Limits::default() };
    assert!(matches!(read(&path, &limits).unwrap_err().reason, Reason::Limit { .. }));
}

#[test]
fn files_are_written_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.npy");
    let array = HostArray::from_slice(&[1f32], &[1]).unwrap();
    write(&path, &[("out", &array)]).unwrap();
    assert!(matches!(write(&path, &[("a", &array), ("b", &array)]).unwrap_err().reason, Reason::Count { found: 2 }));
    assert!(matches!(write(&path, &[]).unwrap_err().reason, Reason::Count { found: 0 }));
    assert_eq!(read(&path, &Limits::default()).unwrap(), [("out".to_string(), array.clone())]);
    let npz = folder.path().join("out.npz");
    assert!(matches!(write(&npz, &[("a", &array), ("a", &array)]).unwrap_err().reason, Reason::Duplicate));
    assert!(!npz.exists());
    assert!(matches!(write(&folder.path().join("out.txt"), &[]).unwrap_err().reason, Reason::Format));
    let nowhere = folder.path().join("no").join("out.npy");
    assert!(matches!(write(&nowhere, &[("a", &array)]).unwrap_err().reason, Reason::Io(_)));
    let metadata = folder.path().join("m.safetensors");
    assert!(write(&metadata, &[("__metadata__", &array)]).is_err());
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let plain = save(&folder, "plain", b"");
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), mode(&plain), "other permissions than an ordinary file's");
    }
}

#[test]
fn what_is_no_file_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("d.npy")).unwrap();
    for name in ["d.npy", "absent.npz", "absent.safetensors"] {
        assert!(
            matches!(read(&folder.path().join(name), &Limits::default()).unwrap_err().reason, Reason::Io(_)),
            "{name}"
        );
    }
    let error = read(&folder.path().join("a.bin"), &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("a.bin") && error.to_string().contains(".safetensors"), "{error}");
}

proptest! {
    /// Damage never panics, and what is read from a damaged file is an array of sound size.
    #[test]
    fn damaged_files_never_panic(
        format in 0usize..3,
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let name = ["x.npy", "x.npz", "x.safetensors"][format];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        let array = HostArray::from_slice(&[1i32, 2, 3, 4, 5, 6], &[2, 3]).unwrap();
        write(&path, &[("x", &array)]).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        std::fs::write(&path, &bytes).unwrap();
        let limits = Limits { total_bytes: 1 << 16, arrays: 4 };
        if let Ok(arrays) = read(&path, &limits) {
            prop_assert!(arrays.iter().all(|(_, a)| a.bytes().len() as u64 == a.dtype().bytes(a.elems())));
        }
    }
}
