//! Layout algebra: how tile coordinates map to memory, and to threads, registers and lanes.
//!
//! Mixed-radix digits as in CuTe's shape:stride trees, flattened: every digit has an extent and a stride, extents need
//! not be powers of two (176, 144, 80 are legal). Memory offsets may be XOR-swizzled on bytes (PTX, "Swizzling modes").
//! Invariant: digits of one dimension multiply to its extent, fastest first.

use std::fmt;

/// One digit of a mixed-radix decomposition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digit {
    /// Values `0 .. extent`.
    pub extent: u64,
    /// Elements per unit of the digit.
    pub stride: u64,
}

/// An XOR swizzle on byte addresses: bits `[base, base+bits)` are XORed with the `bits` bits `shift` above them.
/// The 128-byte mode is bits 3, base 4, shift 3; 64-byte 2, 4, 3; 32-byte 1, 4, 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Swizzle {
    /// How many bits.
    pub bits: u32,
    /// Lowest bit changed.
    pub base: u32,
    /// Distance to the source bits.
    pub shift: u32,
}

impl Swizzle {
    /// The mode with this span in bytes (32, 64 or 128), as TMA and wgmma define it.
    pub fn span(bytes: u64) -> Option<Swizzle> {
        let bits = match bytes {
            32 => 1,
            64 => 2,
            128 => 3,
            _ => return None,
        };
        Some(Swizzle { bits, base: 4, shift: 3 })
    }

    /// The span in bytes: 32, 64 or 128 for the hardware modes.
    pub fn span_bytes(self) -> u64 {
        1 << (self.base + self.bits)
    }

    /// The swizzled byte address.
    pub fn apply(self, byte: u64) -> u64 {
        let mask = ((1u64 << self.bits) - 1) << self.base;
        byte ^ ((byte >> self.shift) & mask)
    }
}

/// A static memory layout of a tile: per dimension its digits, fastest first; offsets in elements.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MemLayout {
    /// Digits of each dimension, fastest first.
    pub dims: Vec<Vec<Digit>>,
    /// Byte swizzle of the offset.
    pub swizzle: Option<Swizzle>,
}

impl MemLayout {
    /// Row-major over `extents` (the last dimension contiguous).
    pub fn row_major(extents: &[u64]) -> MemLayout {
        let mut stride = 1;
        let mut dims: Vec<_> = extents
            .iter()
            .rev()
            .map(|&extent| {
                let digit = Digit { extent, stride };
                stride *= extent;
                vec![digit]
            })
            .collect();
        dims.reverse();
        MemLayout { dims, swizzle: None }
    }

    /// Row-major over `extents`, rows of the last dimension `gap` elements apart.
    pub fn padded(extents: &[u64], gap: u64) -> MemLayout {
        let mut layout = MemLayout::row_major(extents);
        let last = extents.len().saturating_sub(1);
        let mut stride = extents.last().map_or(1, |n| n + gap);
        for (digits, n) in layout.dims[..last].iter_mut().zip(extents).rev() {
            digits.iter_mut().for_each(|g| g.stride = stride);
            stride *= n;
        }
        layout
    }

    /// Two dimensions, `inner` contiguous in panels of `span` bytes, as TMA writes and wgmma reads them: panels of
    /// `[outer, span / elem_bytes]`, each row `span` bytes, panels one after another along `inner`. `inner_dim` says
    /// which of the two dimensions is contiguous.
    pub fn swizzled_panels(extents: [u64; 2], inner_dim: usize, elem_bytes: u64, span: u64) -> Option<MemLayout> {
        let swizzle = Swizzle::span(span)?;
        let (inner, outer) = (extents[inner_dim], extents[1 - inner_dim]);
        let panel = (span / elem_bytes).min(inner);
        if panel * elem_bytes != span || inner % panel != 0 {
            return None;
        }
        let inner_digits =
            vec![Digit { extent: panel, stride: 1 }, Digit { extent: inner / panel, stride: panel * outer }];
        let outer_digits = vec![Digit { extent: outer, stride: panel }];
        let dims = if inner_dim == 0 { vec![inner_digits, outer_digits] } else { vec![outer_digits, inner_digits] };
        Some(MemLayout { dims, swizzle: Some(swizzle) })
    }

    /// Two dimensions, the last contiguous, with 16 bytes between groups of four rows: threads that read vectors along rows
    /// four apart find them in different banks.
    pub fn staggered(extents: [u64; 2], elem_bytes: u64) -> Option<MemLayout> {
        let [rows, columns] = extents;
        let gap = 16 / elem_bytes;
        if rows <= 4 || !rows.is_multiple_of(4) || !columns.is_multiple_of(gap) {
            return None;
        }
        let outer = vec![Digit { extent: 4, stride: columns }, Digit { extent: rows / 4, stride: 4 * columns + gap }];
        Some(MemLayout { dims: vec![outer, vec![Digit { extent: columns, stride: 1 }]], swizzle: None })
    }

    /// Two dimensions, `inner` contiguous in panels of 16 bytes: what unswizzled operands of wgmma are, 8 rows of a panel
    /// a core matrix.
    pub fn core_matrices(extents: [u64; 2], inner_dim: usize, elem_bytes: u64) -> Option<MemLayout> {
        let (inner, outer) = (extents[inner_dim], extents[1 - inner_dim]);
        let panel = 16 / elem_bytes;
        if !inner.is_multiple_of(panel) {
            return None;
        }
        let inner_digits =
            vec![Digit { extent: panel, stride: 1 }, Digit { extent: inner / panel, stride: panel * outer }];
        let outer_digits = vec![Digit { extent: outer, stride: panel }];
        let dims = if inner_dim == 0 { vec![inner_digits, outer_digits] } else { vec![outer_digits, inner_digits] };
        Some(MemLayout { dims, swizzle: None })
    }

    /// The extent of each dimension.
    pub fn extents(&self) -> Vec<u64> {
        self.dims.iter().map(|d| d.iter().map(|g| g.extent).product()).collect()
    }

    /// One past the largest element offset.
    pub fn span_elems(&self) -> u64 {
        1 + self.dims.iter().flatten().map(|g| g.extent.saturating_sub(1) * g.stride).sum::<u64>()
    }

    /// Bytes of one stage in shared memory. Stages start where the swizzle pattern repeats (1024 bytes for the 128-byte
    /// mode) or, unswizzled, at TMA's 128-byte alignment.
    pub fn stage_bytes(&self, elem_bytes: u64) -> u64 {
        (self.span_elems() * elem_bytes).next_multiple_of(self.alignment())
    }

    /// Alignment in bytes of a stage in shared memory.
    pub fn alignment(&self) -> u64 {
        self.swizzle.map_or(128, |s| 1u64 << (s.base + s.shift + s.bits)).max(128)
    }

    /// The element offset of `coords` before swizzling.
    pub fn offset(&self, coords: &[u64]) -> u64 {
        self.dims
            .iter()
            .zip(coords)
            .map(|(digits, &c)| {
                let mut rest = c;
                let mut offset = 0;
                for (i, g) in digits.iter().enumerate() {
                    let last = i + 1 == digits.len();
                    let value = if last { rest } else { rest % g.extent };
                    rest /= g.extent.max(1);
                    offset += value * g.stride;
                }
                offset
            })
            .sum()
    }

    /// The byte offset of `coords`, swizzled.
    pub fn byte_offset(&self, coords: &[u64], elem_bytes: u64) -> u64 {
        let byte = self.offset(coords) * elem_bytes;
        self.swizzle.map_or(byte, |s| s.apply(byte))
    }
}

/// One digit of a distribution: a hardware digit of `extent` values, each unit of which moves `stride` along tile
/// dimension `dim`. Stride 0 replicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DistDigit {
    /// Values `0 .. extent`.
    pub extent: u64,
    /// Tile dimension.
    pub dim: usize,
    /// Coordinates per unit; 0 replicates.
    pub stride: u64,
}

/// Who holds which element of a fragment: threads, the registers of a thread, and the lanes of a register, each a
/// list of digits, fastest first. A CPU core is one thread with vector lanes; a GPU thread has one lane. Written
/// `(T32,V4) -> (M16,N8)` in prose.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Distribution {
    /// Extents of the tile.
    pub dims: Vec<u64>,
    /// Digits of the thread number.
    pub threads: Vec<DistDigit>,
    /// Digits of the register number.
    pub regs: Vec<DistDigit>,
    /// Digits of the lane number.
    pub lanes: Vec<DistDigit>,
}

/// Coordinates of a [`Distribution`] as sums of three tables, one per kind of number; see [`Distribution::coords`].
pub struct Terms {
    rank: usize,
    threads: Vec<u64>,
    regs: Vec<u64>,
    lanes: Vec<u64>,
}

impl Terms {
    /// Coordinate `dim` of what (thread, register, lane) holds.
    pub fn coord(&self, thread: u64, reg: u64, lane: u64, dim: usize) -> u64 {
        let of = |table: &[u64], number: u64| table[number as usize * self.rank + dim];
        of(&self.threads, thread) + of(&self.regs, reg) + of(&self.lanes, lane)
    }

    /// All of them.
    pub fn at(&self, thread: u64, reg: u64, lane: u64) -> impl Iterator<Item = u64> {
        (0..self.rank).map(move |d| self.coord(thread, reg, lane, d))
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Distribution {
    /// Vector registers of `lanes` lanes along `lane_dim`, one thread: `(V.., L)`. Registers run along `lane_dim`
    /// first, then over the other dimensions, last fastest.
    pub fn vectors(dims: &[u64], lane_dim: Option<usize>, lanes: u64) -> Distribution {
        let mut regs = Vec::new();
        let lane_digits = match lane_dim {
            Some(dim) => {
                regs.push(DistDigit { extent: dims[dim].div_ceil(lanes), dim, stride: lanes });
                vec![DistDigit { extent: lanes, dim, stride: 1 }]
            }
            None => vec![DistDigit { extent: lanes, dim: 0, stride: 0 }],
        };
        for dim in (0..dims.len()).rev().filter(|d| Some(*d) != lane_dim) {
            regs.push(DistDigit { extent: dims[dim], dim, stride: 1 });
        }
        Distribution { dims: dims.to_vec(), threads: Vec::new(), regs, lanes: lane_digits }
    }

    /// The elements of a tile in accesses of `width` neighbours along dimension `lead`: lanes one after another along it,
    /// then registers; `threads` that are left go to the other dimensions, last first, and what is left of them repeats.
    pub fn accesses(dims: &[u64], lead: Option<usize>, width: u64, threads: u64) -> Distribution {
        Distribution::neighbours(dims, lead, width, &[], threads)
    }

    /// The same, where a thread holds `near[d]` neighbours along each other dimension d (1 where it is not given).
    pub fn neighbours(dims: &[u64], lead: Option<usize>, width: u64, near: &[u64], threads: u64) -> Distribution {
        let (mut lanes, mut regs) = (Vec::new(), Vec::new());
        let digit = |list: &mut Vec<DistDigit>, extent, dim, stride| {
            if extent > 1 {
                list.push(DistDigit { extent, dim, stride });
            }
        };
        let mut left = threads;
        let mut rest = dims.to_vec();
        if let Some(c) = lead {
            // Rows stay within a warp, so that reductions along the leading dimension are shuffles.
            let across = gcd(dims[c] / width, threads.min(32));
            digit(&mut regs, width, c, 1);
            digit(&mut lanes, across, c, width);
            digit(&mut regs, dims[c] / width / across, c, width * across);
            left /= across;
            rest[c] = 1;
        }
        for c in (0..dims.len()).rev() {
            let near = gcd(rest[c], near.get(c).copied().unwrap_or(1).max(1));
            let across = gcd(rest[c] / near, left);
            digit(&mut regs, near, c, 1);
            digit(&mut lanes, across, c, near);
            digit(&mut regs, rest[c] / near / across, c, near * across);
            left /= across;
        }
        digit(&mut lanes, left, 0, 0);
        Distribution { dims: dims.to_vec(), threads: lanes, regs, lanes: Vec::new() }
    }

    /// Threads, registers and lanes in all.
    pub fn counts(&self) -> (u64, u64, u64) {
        let product = |d: &[DistDigit]| d.iter().map(|g| g.extent).product();
        (product(&self.threads), product(&self.regs), product(&self.lanes))
    }

    /// The tile coordinates held by (thread, register, lane).
    pub fn coords(&self, thread: u64, reg: u64, lane: u64) -> Vec<u64> {
        let mut coords = vec![0; self.dims.len()];
        for (digits, mut number) in [(&self.threads, thread), (&self.regs, reg), (&self.lanes, lane)] {
            for g in digits {
                if !coords.is_empty() {
                    coords[g.dim] += number % g.extent * g.stride;
                }
                number /= g.extent;
            }
        }
        coords
    }

    /// What thread, register and lane numbers each add to the coordinates.
    pub fn terms(&self) -> Terms {
        let table = |digits: &[DistDigit]| {
            let count: u64 = digits.iter().map(|g| g.extent).product();
            let mut sums = vec![0; self.dims.len() * count as usize];
            for (mut number, coords) in (0..count).zip(sums.chunks_exact_mut(self.dims.len().max(1))) {
                for g in digits {
                    coords[g.dim] += number % g.extent * g.stride;
                    number /= g.extent;
                }
            }
            sums
        };
        Terms {
            rank: self.dims.len(),
            threads: table(&self.threads),
            regs: table(&self.regs),
            lanes: table(&self.lanes),
        }
    }

    /// The distribution of a fragment that keeps only dimensions `kept` of this one (in that order): what a
    /// broadcast operand or the result of a reduction over the other dimensions has. Digits of dropped dimensions
    /// replicate; replicated register digits disappear.
    pub fn project(&self, kept: &[usize]) -> Distribution {
        let map = |digits: &[DistDigit], drop_replicas: bool| {
            digits
                .iter()
                .filter_map(|g| match kept.iter().position(|&k| k == g.dim && g.stride != 0) {
                    Some(dim) => Some(DistDigit { dim, ..*g }),
                    None if drop_replicas => None,
                    None => Some(DistDigit { extent: g.extent, dim: 0, stride: 0 }),
                })
                .collect()
        };
        Distribution {
            dims: kept.iter().map(|&k| self.dims[k]).collect(),
            threads: map(&self.threads, false),
            regs: map(&self.regs, true),
            lanes: map(&self.lanes, false),
        }
    }

    /// Whether whoever holds an element of `result` also holds the element of this fragment at its coordinates `dims`:
    /// what an elementwise operand (or the result of a reduction of `result`) needs to stay in registers. A fragment
    /// with a single thread or lane is uniform over them.
    pub fn serves(&self, result: &Distribution, dims: &[usize]) -> bool {
        if dims.len() != self.dims.len() || dims.iter().zip(&self.dims).any(|(d, n)| result.dims.get(*d) != Some(n)) {
            return false;
        }
        let ((threads, regs, lanes), (t, v, l)) = (result.counts(), self.counts());
        if (t != threads && t != 1) || (l != lanes && l != 1) {
            return false;
        }
        let (mine, theirs) = (self.terms(), result.terms());
        let mut held: Vec<Vec<u64>> = Vec::new();
        (0..threads).all(|thread| {
            (0..lanes).all(|lane| {
                let (thread_here, lane_here) = (if t == 1 { 0 } else { thread }, if l == 1 { 0 } else { lane });
                held.clear();
                held.extend((0..v).map(|reg| mine.at(thread_here, reg, lane_here).collect()));
                held.sort_unstable();
                let mut at = vec![0; dims.len()];
                (0..regs).all(|reg| {
                    let coord = |d: usize| theirs.coord(thread, reg, lane, d);
                    if (0..result.dims.len()).any(|d| coord(d) >= result.dims[d]) {
                        return true;
                    }
                    at.iter_mut().zip(dims).for_each(|(a, d)| *a = coord(*d));
                    held.binary_search(&at).is_ok()
                })
            })
        })
    }

    /// Whether every element of the tile is held by someone.
    pub fn covers(&self) -> bool {
        let (t, v, l) = self.counts();
        let total: u64 = self.dims.iter().product();
        let mut seen = vec![false; total as usize];
        let terms = self.terms();
        for thread in 0..t {
            for reg in 0..v {
                for lane in 0..l {
                    if terms.at(thread, reg, lane).zip(&self.dims).all(|(c, d)| c < *d) {
                        let flat = terms.at(thread, reg, lane).zip(&self.dims).fold(0, |acc, (c, d)| acc * d + c);
                        seen[flat as usize] = true;
                    }
                }
            }
        }
        seen.into_iter().all(|s| s)
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axis = |f: &mut fmt::Formatter<'_>, name: &str, digits: &[DistDigit]| {
            write!(f, "{name}[")?;
            for (i, g) in digits.iter().enumerate() {
                let sep = if i == 0 { "" } else { "," };
                write!(f, "{sep}{}@{}.{}", g.extent, g.dim, g.stride)?;
            }
            f.write_str("]")
        };
        axis(f, "T", &self.threads)?;
        axis(f, "V", &self.regs)?;
        axis(f, "L", &self.lanes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swizzle_128_permutes_16_byte_chunks_of_a_row() {
        let s = Swizzle::span(128).unwrap();
        assert_eq!(s.span_bytes(), 128);
        // PTX: bits [6:4] ^= [9:7]: row r of a 128-byte-wide panel XORs its chunk number with r % 8.
        for row in 0..16u64 {
            for chunk in 0..8u64 {
                assert_eq!(s.apply(row * 128 + chunk * 16), row * 128 + (chunk ^ (row % 8)) * 16);
            }
        }
    }

    #[test]
    fn panels_are_bijective() {
        let l = MemLayout::swizzled_panels([64, 128], 1, 2, 128).unwrap();
        let mut seen = vec![false; 64 * 128];
        for m in 0..64 {
            for k in 0..128 {
                let b = l.byte_offset(&[m, k], 2);
                assert_eq!(b % 2, 0);
                assert!(!std::mem::replace(&mut seen[(b / 2) as usize], true));
            }
        }
        assert_eq!(l.span_elems(), 64 * 128);
    }

    #[test]
    fn vectors_cover_and_project() {
        let d = Distribution::vectors(&[6, 40], Some(1), 16);
        assert_eq!(d.counts(), (1, 18, 16));
        assert!(d.covers());
        let row = d.project(&[0]);
        assert_eq!((row.dims.clone(), row.counts()), (vec![6], (1, 6, 16)));
        assert!(row.covers());
        assert!(row.serves(&d, &[0]) && !row.serves(&d, &[1]));
        assert!(d.serves(&d, &[0, 1]));
        let scalar = Distribution { dims: vec![], threads: vec![], regs: vec![], lanes: vec![] };
        assert!(scalar.serves(&d, &[]));
        // Rows spread over lanes are not where columns spread over lanes need them.
        let other = Distribution::vectors(&[40], Some(0), 16);
        assert!(other.serves(&d, &[1]) && !other.serves(&Distribution::vectors(&[6, 40], Some(0), 16), &[1]));
    }
}
