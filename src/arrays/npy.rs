//! The .npy format, versions 1.0 to 3.0.
//!
//! The header is a Python dict of exactly `descr`, `fortran_order` and `shape`, so the parser reads that and no other
//! literal; its depth and length are bounded. Fortran order is transposed and big-endian data are swapped on reading.
//! bf16 has no NumPy name: it is written and read as `V2`, as ml_dtypes does. Source: NEP 1 and
//! numpy/lib/format.py.

use super::{Reason, announced_bytes};
use einfall_ir::array::strides;
use einfall_ir::dtype::DType;
use einfall_runtime::HostArray;
use std::io::{Read, Write};

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// NumPy itself refuses headers above 10,000 bytes unless told otherwise.
const MAX_HEADER_BYTES: usize = 1 << 16;
/// NumPy arrays have at most 64 dimensions.
const MAX_DIMS: usize = 64;

fn malformed(detail: impl Into<String>) -> Reason {
    Reason::Malformed { format: ".npy", detail: detail.into() }
}

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    dtype: DType,
    big_endian: bool,
    fortran_order: bool,
    shape: Vec<u64>,
}

/// Reads one array from `reader`, which holds `bytes` bytes; the array has at most `limit` bytes.
pub(super) fn read(reader: &mut impl Read, bytes: u64, limit: u64) -> Result<HostArray, Reason> {
    let mut start = [0; 8];
    read_header_bytes(reader, &mut start)?;
    if start[..6] != MAGIC[..] {
        return Err(malformed("it does not begin with \\x93NUMPY"));
    }
    let (header_bytes, prefix) = match (start[6], start[7]) {
        (1, 0) => {
            let mut length = [0; 2];
            read_header_bytes(reader, &mut length)?;
            (usize::from(u16::from_le_bytes(length)), 10)
        }
        (2 | 3, 0) => {
            let mut length = [0; 4];
            read_header_bytes(reader, &mut length)?;
            (u32::from_le_bytes(length) as usize, 12)
        }
        (major, minor) => return Err(malformed(format!("version {major}.{minor} is not known"))),
    };
    if header_bytes > MAX_HEADER_BYTES {
        return Err(malformed(format!("a header of {header_bytes} bytes is longer than {MAX_HEADER_BYTES}")));
    }
    let mut text = vec![0; header_bytes];
    read_header_bytes(reader, &mut text)?;
    let text = std::str::from_utf8(&text).map_err(|_| malformed("the header is not UTF-8"))?;
    let header = Parser { rest: text }.header()?;
    let expected = announced_bytes(header.dtype, &header.shape, limit)?;
    let found = bytes.saturating_sub(prefix + header_bytes as u64);
    if found < expected {
        return Err(Reason::Truncated { expected, found });
    }
    let mut array = HostArray::zeros(header.dtype, &header.shape)?;
    let mut filled = 0;
    while filled < array.bytes().len() {
        match reader.read(&mut array.bytes_mut()[filled..])? {
            0 => return Err(Reason::Truncated { expected, found: filled as u64 }),
            n => filled += n,
        }
    }
    if reader.read(&mut [0])? != 0 {
        return Err(Reason::Trailing { expected });
    }
    let elem_bytes = header.dtype.bytes(1) as usize;
    if header.big_endian {
        array.bytes_mut().chunks_exact_mut(elem_bytes).for_each(<[u8]>::reverse);
    }
    if header.fortran_order && header.shape.len() > 1 {
        array = transpose(&array)?;
    }
    if header.dtype == DType::Bool {
        // Other bytes than 0 and 1 are not bools.
        array.bytes_mut().iter_mut().for_each(|b| *b = u8::from(*b != 0));
    }
    Ok(array)
}

/// Fills `buffer` from the header, or says that the header ends.
fn read_header_bytes(reader: &mut impl Read, buffer: &mut [u8]) -> Result<(), Reason> {
    reader.read_exact(buffer).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => malformed("the header is cut off"),
        _ => e.into(),
    })
}

/// Row-major bytes of an array whose bytes are column-major.
fn transpose(array: &HostArray) -> Result<HostArray, Reason> {
    let shape = array.shape().to_vec();
    let reversed: Vec<u64> = shape.iter().rev().copied().collect();
    let from: Vec<i64> = strides(&reversed).into_iter().rev().collect();
    let elem = array.dtype().bytes(1) as usize;
    let mut out = HostArray::zeros(array.dtype(), &shape)?;
    let mut at = vec![0u64; shape.len()];
    let mut source = 0i64;
    for chunk in out.bytes_mut().chunks_exact_mut(elem) {
        let start = source as usize * elem;
        chunk.copy_from_slice(&array.bytes()[start..start + elem]);
        // Counts up with the last dimension fastest, carrying the source offset along.
        for d in (0..shape.len()).rev() {
            at[d] += 1;
            source += from[d];
            if at[d] < shape[d] {
                break;
            }
            source -= from[d] * shape[d] as i64;
            at[d] = 0;
        }
    }
    Ok(out)
}

/// Reads the header's dict; `rest` is what is left of it.
struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn header(mut self) -> Result<Header, Reason> {
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        self.expect('{')?;
        while !self.take('}') {
            let key = self.string()?;
            self.expect(':')?;
            let again = match key {
                "descr" => descr.replace(self.descr()?).is_some(),
                "fortran_order" => fortran_order.replace(self.boolean()?).is_some(),
                "shape" => shape.replace(self.shape()?).is_some(),
                _ => return Err(malformed(format!("the header has an unknown key `{}`", key.escape_debug()))),
            };
            if again {
                return Err(malformed(format!("the header has `{key}` twice")));
            }
            if !self.take(',') {
                self.expect('}')?;
                break;
            }
        }
        if !self.rest.trim().is_empty() {
            return Err(malformed("text follows the header's dict"));
        }
        let missing = |key: &str| malformed(format!("the header has no `{key}`"));
        let (dtype, big_endian) = descr.ok_or_else(|| missing("descr"))?;
        let fortran_order = fortran_order.ok_or_else(|| missing("fortran_order"))?;
        Ok(Header { dtype, big_endian, fortran_order, shape: shape.ok_or_else(|| missing("shape"))? })
    }

    fn take(&mut self, c: char) -> bool {
        self.rest = self.rest.trim_start();
        let stripped = self.rest.strip_prefix(c);
        self.rest = stripped.unwrap_or(self.rest);
        stripped.is_some()
    }

    fn expect(&mut self, c: char) -> Result<(), Reason> {
        if self.take(c) {
            return Ok(());
        }
        let found: String = self.rest.chars().take(12).flat_map(char::escape_debug).collect();
        Err(malformed(format!("the header has `{found}` where `{c}` is expected")))
    }

    fn string(&mut self) -> Result<&'a str, Reason> {
        let quote = if self.take('"') { '"' } else { '\'' };
        if quote == '\'' {
            self.expect('\'')?;
        }
        let (text, rest) = self.rest.split_once(quote).ok_or_else(|| malformed("the header has an open string"))?;
        self.rest = rest;
        Ok(text)
    }

    fn boolean(&mut self) -> Result<bool, Reason> {
        self.rest = self.rest.trim_start();
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = self.rest.strip_prefix(word) {
                self.rest = rest;
                return Ok(value);
            }
        }
        Err(malformed("`fortran_order` is neither True nor False"))
    }

    fn shape(&mut self) -> Result<Vec<u64>, Reason> {
        self.expect('(')?;
        let mut shape = Vec::new();
        while !self.take(')') {
            if shape.len() == MAX_DIMS {
                return Err(malformed(format!("the shape has more than {MAX_DIMS} dimensions")));
            }
            let digits = self.rest.len() - self.rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (number, rest) = self.rest.split_at(digits);
            shape.push(number.parse().map_err(|_| malformed("the shape is not a tuple of sizes below 2^64"))?);
            // Python 2 wrote long integers with an L.
            self.rest = rest.strip_prefix('L').unwrap_or(rest);
            if !self.take(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(shape)
    }

    /// Element type and whether it is big-endian.
    fn descr(&mut self) -> Result<(DType, bool), Reason> {
        self.rest = self.rest.trim_start();
        if self.rest.starts_with('[') {
            return Err(Reason::DType { found: "of a structured array".into(), hint: "" });
        }
        let text = self.string()?;
        let unsupported =
            |hint| Reason::DType { found: format!("`{}`", text.chars().take(32).collect::<String>()), hint };
        let (order, kind) = match text.chars().next() {
            Some(c @ ('<' | '>' | '|' | '=')) => (c, &text[1..]),
            Some(_) | None => ('|', text),
        };
        let dtype = match kind {
            "f8" => DType::F64,
            "f4" => DType::F32,
            "f2" => DType::F16,
            // NumPy knows no bf16; ml_dtypes saves it as two bytes of no type.
            "V2" => DType::BF16,
            "i8" => DType::I64,
            "i4" => DType::I32,
            "i1" => DType::I8,
            "u1" => DType::U8,
            "b1" => DType::Bool,
            "V1" => return Err(unsupported("; store 8-bit floats as .safetensors, which names them")),
            "i2" | "u2" | "u4" | "u8" => return Err(unsupported("; convert to int32 or int64")),
            "O" | "O8" => return Err(unsupported("; pickled objects are never loaded")),
            _ => return Err(unsupported("")),
        };
        Ok((dtype, order == '>' && dtype.bits() > 8))
    }
}

/// Writes one array, version 1.0, row-major, data at a multiple of 64 bytes.
pub(super) fn write(out: &mut impl Write, array: &HostArray) -> Result<(), Reason> {
    let descr = match array.dtype() {
        DType::F64 => "<f8",
        DType::F32 | DType::Tf32 => "<f4",
        DType::F16 => "<f2",
        DType::BF16 => "<V2",
        DType::I64 => "<i8",
        DType::I32 => "<i4",
        DType::I8 => "|i1",
        DType::U8 => "|u1",
        DType::Bool => "|b1",
        dtype @ (DType::F8E4M3 | DType::F8E5M2 | DType::I4 | DType::U4) => {
            let hint = "; .npy has no name for it: write .safetensors";
            return Err(Reason::DType { found: dtype.to_string(), hint });
        }
    };
    let shape: String = array.shape().iter().map(|d| format!("{d},")).collect();
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    let unpadded = MAGIC.len() + 4 + header.len() + 1;
    header.extend(std::iter::repeat_n(' ', unpadded.next_multiple_of(64) - unpadded));
    header.push('\n');
    let length = u16::try_from(header.len()).map_err(|_| malformed("the shape has too many dimensions"))?;
    out.write_all(MAGIC)?;
    out.write_all(&[1, 0])?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    out.write_all(array.bytes())?;
    Ok(())
}
