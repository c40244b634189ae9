//! The contraction instructions as data: shape, types, who holds what, what memory they read and how precisely.
//!
//! Every atom means `acc[m,n] (+)= Σ_k a[m,k]·b[k,n]`; operands are windows of that shape, `a` as (m,k), `b` as (k,n).
//! Invariant: verifier, evaluator, lowering and printers read this table and nothing else about an instruction.
//! Source: PTX ISA 8.x, "wgmma.mma_async" (register fragments, matrix descriptor, canonical layouts), "mma.m16n8k16";
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (tiles), volume 2, "TDPBF16PS",
//! "VDPBF16PS".

use super::{AtomName, Scope};
use crate::dtype::DType;
use crate::layout::{DistDigit, Distribution, MemLayout, Swizzle};
use crate::target::DataSheet;

/// A contraction instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Atom {
    /// Its name, e.g. `wgmma.m64n128k16.bf16`.
    pub name: AtomName,
    /// Extents of m, n and k.
    pub shape: [u64; 3],
    /// Type of both operands.
    pub operand: DType,
    /// Type of the accumulator.
    pub acc: DType,
    /// Mantissa bits kept while accumulating (23: as f32; fp8 on Hopper keeps 13).
    pub acc_mantissa: u32,
    /// Whether it completes asynchronously (fence, commit and wait_group are needed).
    pub asynchronous: bool,
    /// The unit that issues it.
    pub scope: Scope,
    /// Distribution of `a` over the unit's registers; none: only from memory.
    pub a_dist: Option<Distribution>,
    /// Distribution of `b` over the unit's registers; none: only from memory.
    pub b_dist: Option<Distribution>,
    /// Distribution of the accumulator.
    pub acc_dist: Distribution,
    /// Whether `a` may come from shared memory.
    pub a_memory: bool,
    /// Whether `b` may come from shared memory.
    pub b_memory: bool,
    /// Whether memory operands may be contiguous along m or n (16-bit types only); along k always may.
    pub mn_major: bool,
}

impl Atom {
    /// Registers that the instruction takes for each of a fragment's: 2 where it computes twice the rows that the atom
    /// keeps, whose registers of rows between those kept hold zeros.
    pub fn registers_each(&self) -> u64 {
        if self.asynchronous { 64 / self.shape[0] } else { 1 }
    }

    /// Whether it multiplies tiles of a processor: rows of an operand are read together, and sums are in tile registers.
    pub fn tiled(&self) -> bool {
        self.scope == Scope::Thread && !self.dots()
    }

    /// Whether it is dot products of pairs along k, each row's by itself, whose sums are in vector registers.
    fn dots(&self) -> bool {
        self.name.0.starts_with("dot")
    }

    /// What does this atom's work for so many rows and columns at once: the same one where rows are read together.
    pub fn over(&self, rows: u64, columns: u64) -> Atom {
        let lanes = self.acc_dist.counts().2;
        let grown = if self.dots() { dot(lanes, rows, columns, self.operand) } else { None };
        grown.unwrap_or_else(|| self.clone())
    }

    /// Whether it multiplies cooperative matrices: operands come from shared memory, and who holds which element of the
    /// accumulator is the device's secret. [`Atom::acc_dist`] is then how its elements come out of memory and go back.
    pub fn cooperative(&self) -> bool {
        self.name.0.starts_with("coop")
    }

    /// Whether every thread has all of the operands that its part of the accumulator takes: the atom is then
    /// multiply-adds of what each thread holds.
    pub fn threads_alone(&self) -> bool {
        let (Some(a), Some(b)) = (&self.a_dist, &self.b_dist) else { return false };
        a.project(&[0]).serves(&self.acc_dist, &[0])
            && b.project(&[1]).serves(&self.acc_dist, &[1])
            && [(a, 1), (b, 0)].iter().all(|(d, k)| d.threads.iter().all(|g| g.dim != *k || g.stride == 0))
    }
}

fn digit(extent: u64, dim: usize, stride: u64) -> DistDigit {
    DistDigit { extent, dim, stride }
}

fn dist(dims: &[u64], threads: Vec<DistDigit>, regs: Vec<DistDigit>) -> Distribution {
    let regs = regs.into_iter().filter(|g| g.extent > 1).collect();
    Distribution { dims: dims.to_vec(), threads, regs, lanes: Vec::new() }
}

/// Rows and columns of a 16-row fragment by quads of threads: thread t holds row (t%32)/4 (+16 per warp) and
/// `per` neighbouring elements at column per·(t%4); registers step the 8 lower rows, then `4·per` columns.
fn quad_fragment(rows: u64, cols: u64, per: u64) -> Distribution {
    let mut threads = vec![digit(4, 1, per), digit(8, 0, 1)];
    if rows > 16 {
        threads.push(digit(rows / 16, 0, 16));
    }
    dist(&[rows, cols], threads, vec![digit(per, 1, 1), digit(2, 0, 8), digit(cols / (4 * per), 1, 4 * per)])
}

/// `wgmma.m64nNk*` for one operand type; N a multiple of 8 up to 256.
fn wgmma(operand: DType, n: u64) -> Option<Atom> {
    let k = match operand {
        DType::BF16 | DType::F16 => 16,
        DType::Tf32 => 8,
        DType::F8E4M3 | DType::F8E5M2 => 32,
        DType::F64
        | DType::F32
        | DType::I64
        | DType::I32
        | DType::I8
        | DType::U8
        | DType::I4
        | DType::U4
        | DType::Bool => {
            return None;
        }
    };
    if n == 0 || n > 256 || !n.is_multiple_of(8) {
        return None;
    }
    let per = 32 / u64::from(operand.bits());
    Some(Atom {
        name: AtomName(format!("wgmma.m64n{n}k{k}.{operand}")),
        shape: [64, n, k],
        operand,
        acc: DType::F32,
        acc_mantissa: if operand.bits() == 8 { 13 } else { 23 },
        asynchronous: true,
        scope: Scope::Warpgroup,
        a_dist: Some(quad_fragment(64, k, per)),
        b_dist: None,
        acc_dist: quad_fragment(64, n, 2),
        a_memory: true,
        b_memory: true,
        mn_major: operand.bits() == 16,
    })
}

/// `wgmma.m32nNk*`: wgmma's instruction of 64 rows with 32 of them, the lower 8 of every 16, so that all warps have as
/// many and no thread holds a row that is empty. `a` comes from registers; those of the upper rows are 0.
fn wgmma_half(operand: DType, n: u64) -> Option<Atom> {
    let whole = wgmma(operand, n)?;
    let lower = |d: &Distribution| {
        let threads = d.threads.iter().map(|g| if g.dim == 0 && g.stride == 16 { digit(g.extent, 0, 8) } else { *g });
        let regs = d.regs.iter().filter(|g| g.dim != 0).copied();
        dist(&[32, d.dims[1]], threads.collect(), regs.collect())
    };
    Some(Atom {
        name: AtomName(whole.name.0.replacen("m64", "m32", 1)),
        shape: [32, n, whole.shape[2]],
        a_dist: whole.a_dist.as_ref().map(lower),
        acc_dist: lower(&whole.acc_dist),
        a_memory: false,
        ..whole
    })
}

/// `mma.m16n8k16` (sm_80) for one 16-bit operand type.
fn mma(operand: DType) -> Option<Atom> {
    if !matches!(operand, DType::BF16 | DType::F16) {
        return None;
    }
    Some(Atom {
        name: AtomName(format!("mma.m16n8k16.{operand}")),
        shape: [16, 8, 16],
        operand,
        acc: DType::F32,
        acc_mantissa: 23,
        asynchronous: false,
        scope: Scope::Warp,
        a_dist: Some(quad_fragment(16, 16, 2)),
        b_dist: Some(dist(&[16, 8], vec![digit(4, 0, 2), digit(8, 1, 1)], vec![digit(2, 0, 1), digit(2, 0, 8)])),
        acc_dist: quad_fragment(16, 8, 2),
        a_memory: false,
        b_memory: false,
        mn_major: false,
    })
}

/// `fma.mMnNk4.f32`: no instruction, but multiply-adds of what each thread of 4 by 8 holds, M/4 rows by N/8 columns. Rows
/// and columns go by fours, so that a thread reads its operands in vectors: `a` along k, `b` along n.
fn multiply_add(m: u64, n: u64) -> Option<Atom> {
    let sizes = |x: u64, threads: u64| x.is_multiple_of(threads) && [1, 2, 4, 8].contains(&(x / threads));
    if !sizes(m, 4) || !sizes(n, 8) {
        return None;
    }
    let (rows, columns, k) = (m / 4, n / 8, 4);
    // Neighbours that one thread has, and the steps between its groups of them.
    let part = |count: u64, threads: u64, dim| {
        let per = count.min(4);
        [digit(per, dim, 1), digit(count / per, dim, per * threads)]
    };
    let thread = |count: u64, dim| digit(if dim == 0 { 4 } else { 8 }, dim, count.min(4));
    let (own_rows, own_columns) = (part(rows, 4, 0), part(columns, 8, 1));
    let of = |list: [DistDigit; 2], more: &[DistDigit]| more.iter().copied().chain(list).collect::<Vec<_>>();
    Some(Atom {
        name: AtomName(format!("fma.m{m}n{n}k{k}.f32")),
        shape: [m, n, k],
        operand: DType::F32,
        acc: DType::F32,
        acc_mantissa: 23,
        asynchronous: false,
        scope: Scope::Warp,
        a_dist: Some(dist(&[m, k], vec![digit(8, 0, 0), thread(rows, 0)], of(own_rows, &[digit(k, 1, 1)]))),
        b_dist: Some(dist(
            &[k, n],
            vec![thread(columns, 1), digit(4, 0, 0)],
            own_columns.into_iter().chain([digit(k, 0, 1)]).collect(),
        )),
        acc_dist: dist(&[m, n], vec![thread(columns, 1), thread(rows, 0)], of(own_rows, &own_columns)),
        a_memory: false,
        b_memory: false,
        mn_major: false,
    })
}

/// `amx.m16n16k32.bf16`: a processor's product of tiles, `tdpbf16ps`. Operands come from memory, `a` contiguous along k,
/// `b` with pairs of neighbours along k together ([`super::BufSpace::Scratch`]). Subnormal operands count as 0, and
/// subnormal sums become 0.
fn amx(operand: DType) -> Option<Atom> {
    let name = AtomName(format!("amx.m16n16k32.{operand}"));
    (operand == DType::BF16).then(|| of_memory(name, [16, 16, 32], operand, 16))
}

/// An instruction of a processor's thread that reads both operands from memory and sums in f32, so many lanes to a vector.
fn of_memory(name: AtomName, shape: [u64; 3], operand: DType, lanes: u64) -> Atom {
    Atom {
        name,
        shape,
        operand,
        acc: DType::F32,
        acc_mantissa: 23,
        asynchronous: false,
        scope: Scope::Thread,
        a_dist: None,
        b_dist: None,
        acc_dist: Distribution::vectors(&shape[..2], Some(1), lanes),
        a_memory: true,
        b_memory: true,
        mn_major: false,
    }
}

/// `dotL.mMnNk2.bf16`: M·N/L instructions of a processor, `vdpbf16ps` where vectors have 16 lanes, each of which adds the
/// products of two neighbours along k to a row's sums in L columns. Operands come from memory, `a` contiguous along k and
/// every row anywhere, `b` with pairs of neighbours along k together, as an AMX product reads it. The two products are added one after
/// the other, each sum rounded to nearest; subnormal operands count as 0, and subnormal sums become 0.
fn dot(lanes: u64, m: u64, n: u64, operand: DType) -> Option<Atom> {
    let fits = operand == DType::BF16 && [4, 8, 16].contains(&lanes) && m > 0 && n > 0 && n.is_multiple_of(lanes);
    let k = 32 / u64::from(operand.bits());
    fits.then(|| of_memory(AtomName(format!("dot{lanes}.m{m}n{n}k{k}.{operand}")), [m, n, k], operand, lanes))
}

/// Dot products of pairs on processors that have them, one row by a vector of so many lanes; [`Atom::over`] more of them.
pub fn processor_dots(lanes: u64) -> impl Iterator<Item = Atom> {
    [DType::BF16].into_iter().filter_map(move |t| dot(lanes, 1, lanes, t))
}

/// Products of tiles on processors that have AMX.
pub fn processor_tiles() -> impl Iterator<Item = Atom> {
    [DType::BF16].into_iter().filter_map(amx)
}

/// The contraction instruction of a processor, where it has one.
pub fn of_processor(sheet: &DataSheet) -> Option<Atom> {
    sheet.atoms.iter().find_map(|family| match family.as_str() {
        "amx" => processor_tiles().next(),
        dots => processor_dots(dots.strip_prefix("dot")?.parse().ok()?).next(),
    })
}

/// `coop.mSnSkS.T`: a product of square cooperative matrices by a subgroup of 32 (SPV_KHR_cooperative_matrix; WGSL of naga,
/// `coop_mat16x16`). Operands are read from shared memory, rows or columns of it contiguous. What the accumulator's registers
/// hold nobody knows: its distribution is that of a row-major tile which threads read in vectors, one after another.
fn cooperative(size: u64, operand: DType) -> Option<Atom> {
    if ![8, 16].contains(&size) || !matches!(operand, DType::F16 | DType::F32) {
        return None;
    }
    let (elems, threads) = (size * size, Scope::Warp.threads());
    let per = (elems / threads).min(8);
    let rows = threads * per / size;
    Some(Atom {
        name: AtomName(format!("coop.m{size}n{size}k{size}.{operand}")),
        shape: [size; 3],
        operand,
        acc: DType::F32,
        acc_mantissa: 23,
        asynchronous: false,
        scope: Scope::Warp,
        a_dist: None,
        b_dist: None,
        acc_dist: dist(
            &[size, size],
            vec![digit(size / per, 1, per), digit(rows, 0, 1)],
            vec![digit(per, 1, 1), digit(size / rows, 0, rows)],
        ),
        a_memory: true,
        b_memory: true,
        mn_major: true,
    })
}

/// Products of cooperative matrices, of which an adapter says which it has ([`crate::target::WebGpu::matrices`]).
pub fn cooperative_products() -> impl Iterator<Item = Atom> {
    [16, 8].into_iter().flat_map(|n| [DType::F16, DType::F32].into_iter().filter_map(move |t| cooperative(n, t)))
}

/// The instructions of an adapter of WebGPU: multiply-adds of each thread, and those of `matrices`, names of products of
/// cooperative matrices.
pub fn of_adapter(matrices: &[String]) -> Vec<Atom> {
    let has = |a: &Atom| matrices.contains(&a.name.0);
    multiply_adds().chain(cooperative_products().filter(has)).collect()
}

/// Atoms that are multiply-adds of what each thread holds: for devices without instructions for tiles.
pub fn multiply_adds() -> impl Iterator<Item = Atom> {
    const ROWS: [u64; 4] = [4, 8, 16, 32];
    ROWS.into_iter().flat_map(|m| ROWS.into_iter().filter_map(move |n| multiply_add(m, 2 * n)))
}

/// Every instruction.
pub fn all() -> impl Iterator<Item = Atom> {
    let types = [DType::BF16, DType::F16, DType::Tf32, DType::F8E4M3, DType::F8E5M2];
    let wgmmas = types.into_iter().flat_map(|t| (8..=256).step_by(8).filter_map(move |n| wgmma(t, n)));
    let halves = types.into_iter().flat_map(|t| (8..=256).step_by(8).filter_map(move |n| wgmma_half(t, n)));
    wgmmas.chain(halves).chain([DType::BF16, DType::F16].into_iter().filter_map(mma))
}

/// The instructions that kernels for a device are formed with: none for processors, whose own are chosen when they are
/// lowered; on adapters of WebGPU multiply-adds of each thread and the products of matrices that they report; else those for
/// tiles.
pub fn of(sheet: &DataSheet) -> Vec<Atom> {
    match &sheet.gpu {
        None => Vec::new(),
        Some(_) => match &sheet.webgpu {
            Some(adapter) => of_adapter(&adapter.matrices),
            None => all().collect(),
        },
    }
}

/// The atom of this name.
pub fn find(name: &AtomName) -> Option<Atom> {
    let (family, rest) = name.0.split_once('.')?;
    let (shape, operand) = rest.split_once('.')?;
    let operand = DType::from_name(operand)?;
    let atom = match family {
        "wgmma" => {
            let (rows, rest) = shape.split_once('n')?;
            let n = rest.split_once('k')?.0.parse().ok()?;
            if rows == "m32" { wgmma_half(operand, n)? } else { wgmma(operand, n)? }
        }
        "mma" => mma(operand)?,
        "coop" => cooperative(shape.strip_prefix('m')?.split_once('n')?.0.parse().ok()?, operand)?,
        "amx" => amx(operand)?,
        "fma" => {
            let (m, rest) = shape.strip_prefix('m')?.split_once('n')?;
            multiply_add(m.parse().ok()?, rest.split_once('k')?.0.parse().ok()?)?
        }
        _ => {
            let lanes = family.strip_prefix("dot")?.parse().ok()?;
            let (m, rest) = shape.strip_prefix('m')?.split_once('n')?;
            dot(lanes, m.parse().ok()?, rest.split_once('k')?.0.parse().ok()?, operand)?
        }
    };
    (atom.name == *name).then_some(atom)
}

impl Atom {
    /// `acc (+)= a·b` on whole windows, row-major, in float64.
    pub fn apply(&self, acc: &mut [f64], a: &[f64], b: &[f64]) {
        let [m, n, k] = self.shape.map(|x| x as usize);
        for i in 0..m {
            let row = &mut acc[i * n..(i + 1) * n];
            for (l, &x) in a[i * k..(i + 1) * k].iter().enumerate() {
                for (c, y) in row.iter_mut().zip(&b[l * n..(l + 1) * n]) {
                    *c += x * y;
                }
            }
        }
    }

    /// Whether registers of `frag` from coordinates `from` on are what the atom's `window` distribution says: each
    /// thread holds the same elements in the same register order.
    pub fn holds(frag: &Distribution, from: &[u64], window: &Distribution) -> bool {
        if frag.dims.len() != window.dims.len() || from.len() != frag.dims.len() {
            return false;
        }
        let (threads, regs, lanes) = frag.counts();
        let (want_threads, want_regs, want_lanes) = window.counts();
        if threads != want_threads || lanes != want_lanes {
            return false;
        }
        let (frag, window, dims) = (frag.terms(), window.terms(), &window.dims);
        let each = |t: u64, l: u64| {
            let mut want = 0;
            (0..regs).all(|v| {
                let coord = |d: usize| frag.coord(t, v, l, d);
                if (0..dims.len()).any(|d| coord(d) < from[d] || coord(d) - from[d] >= dims[d]) {
                    return true;
                }
                want += 1;
                want <= want_regs && (0..dims.len()).all(|d| coord(d) - from[d] == window.coord(t, want - 1, l, d))
            }) && want == want_regs
        };
        (0..threads).all(|t| (0..lanes).all(|l| each(t, l)))
    }
}

/// How wgmma reads a shared-memory operand: the fields of its matrix descriptor but the start address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// Whether the operand is contiguous along m or n (its transpose immediate is 1), not along k.
    pub mn_major: bool,
    /// Leading byte offset: between panels along the contiguous dimension (unswizzled K-major: core matrices along k).
    pub lbo: u64,
    /// Stride byte offset: between groups of 8 rows.
    pub sbo: u64,
    /// Swizzle mode.
    pub swizzle: Option<Swizzle>,
}

impl Descriptor {
    /// The descriptor that reads windows of `mn`×`k` elements of a buffer laid out as `layout`, whose dimensions
    /// `mn_dim` and `k_dim` are the operand's. Errors say which rule of the canonical layouts is broken.
    pub fn of(
        layout: &MemLayout,
        elem_bytes: u64,
        mn_dim: usize,
        k_dim: usize,
        mn: u64,
        k: u64,
    ) -> Result<Descriptor, String> {
        let digits = |dim: usize| -> Vec<crate::layout::Digit> {
            layout.dims[dim].iter().copied().filter(|g| g.extent > 1).collect()
        };
        let (mn_digits, k_digits) = (digits(mn_dim), digits(k_dim));
        let swizzle = match layout.swizzle {
            None => None,
            Some(s) if Swizzle::span(s.span_bytes()) == Some(s) => Some(s),
            Some(s) => return Err(format!("swizzle({}, {}, {}) is no mode of the hardware", s.bits, s.base, s.shift)),
        };
        let contiguous = |d: &[crate::layout::Digit]| d.first().is_some_and(|g| g.stride == 1);
        // The contiguous dimension, the other, and the window's extents along both.
        let (mn_major, inner, outer, inner_len, outer_len) = if contiguous(&k_digits) {
            (false, &k_digits, &mn_digits, k, mn)
        } else if contiguous(&mn_digits) {
            (true, &mn_digits, &k_digits, mn, k)
        } else {
            return Err("neither dimension of the operand is contiguous".to_string());
        };
        // Elements of a row: the swizzle span, or one 16-byte core-matrix row.
        let row = swizzle.map_or(16, Swizzle::span_bytes) / elem_bytes;
        if swizzle.is_none() && mn_major {
            return Err("operands contiguous along m or n must be swizzled".to_string());
        }
        let panel = inner[0].extent;
        if panel != row {
            return Err(format!("rows of {panel} elements are contiguous; the swizzle mode asks for {row}"));
        }
        let lbo = inner.get(1).map_or(0, |g| g.stride * elem_bytes);
        if inner.len() > 2 || (inner.len() == 2 && inner[1].extent * panel < inner_len) {
            return Err("panels of the operand are not equally spaced".to_string());
        }
        let eight = 8u64.min(outer_len);
        let first = outer.first().ok_or("the operand has one row only")?;
        if first.stride != row {
            return Err(format!("rows are {} elements apart; the swizzle mode asks for {row}", first.stride));
        }
        let sbo = if first.extent >= outer_len {
            8 * row * elem_bytes
        } else if first.extent == eight && outer.len() == 2 {
            outer[1].stride * elem_bytes
        } else {
            return Err("groups of 8 rows are not equally spaced".to_string());
        };
        Ok(Descriptor { mn_major, lbo, sbo, swizzle })
    }

    /// The byte address at which the hardware reads element (mn, k) of a window that starts at byte `start`.
    pub fn address(&self, start: u64, elem_bytes: u64, mn: u64, k: u64) -> u64 {
        let row = self.swizzle.map_or(16, Swizzle::span_bytes);
        let (inner, outer) = if self.mn_major { (mn, k) } else { (k, mn) };
        let inner = inner * elem_bytes;
        // Within one panel a start inside the row is legal (advancing k by +32 bytes), so only whole rows carry over.
        let linear = start + inner % row + inner / row * self.lbo + outer % 8 * row + outer / 8 * self.sbo;
        self.swizzle.map_or(linear, |s| s.apply(linear))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_find_their_atoms() {
        let mut n = 0;
        for atom in all() {
            assert_eq!(find(&atom.name).as_ref(), Some(&atom));
            n += 1;
        }
        assert_eq!(n, 2 * 5 * 32 + 2);
        for atom in multiply_adds() {
            assert_eq!(find(&atom.name).as_ref(), Some(&atom));
            assert!(atom.threads_alone(), "{}", atom.name.0);
            let (a, b) = (atom.a_dist.as_ref().unwrap(), atom.b_dist.as_ref().unwrap());
            assert!(a.covers() && b.covers() && atom.acc_dist.covers(), "{}", atom.name.0);
        }
        assert!(all().all(|a| !a.threads_alone() && !a.cooperative()));
        for atom in cooperative_products() {
            assert_eq!(find(&atom.name).as_ref(), Some(&atom));
            assert!(atom.cooperative() && !atom.threads_alone() && !atom.tiled() && atom.acc_dist.covers());
            // Element `per·(32·group + thread) + e` of the row-major tile.
            let (threads, registers, _) = atom.acc_dist.counts();
            let per = registers.min(8);
            for (t, v) in (0..threads).flat_map(|t| (0..registers).map(move |v| (t, v))) {
                let at = (v / per * threads + t) * per + v % per;
                let n = atom.shape[1];
                assert_eq!(atom.acc_dist.coords(t, v, 0), [at / n, at % n], "{}", atom.name.0);
            }
        }
        assert_eq!(cooperative_products().count(), 4);
        for lanes in [4, 8, 16] {
            for atom in processor_dots(lanes).flat_map(|a| [a.over(14, 2 * lanes), a.over(1, 3 * lanes), a]) {
                assert_eq!(find(&atom.name).as_ref(), Some(&atom));
                assert!(atom.acc_dist.covers() && !atom.tiled(), "{}", atom.name.0);
            }
        }
        assert!(processor_tiles().all(|a| a.tiled() && a.over(32, 32) == a));
        // The instructions that sheets name have a rate.
        for sheet in DataSheet::all().iter().filter(|s| !s.atoms.is_empty()) {
            let rate = of_processor(sheet).and_then(|a| sheet.peak_of(a.operand));
            assert!(rate > sheet.peak_of(DType::F32), "{}", sheet.name);
        }
        let named = |name| DataSheet::named(name).and_then(|s| of_processor(&s)).map(|a| a.tiled());
        assert_eq!(["x86-64-v4", "x86-64-v4-bf16", "x86-64-v4-amx"].map(named), [None, Some(false), Some(true)]);
        for bad in [
            "wgmma.m64n12k16.bf16",
            "wgmma.m64n264k16.bf16",
            "wgmma.m64n64k8.bf16",
            "mma.m16n8k16.f32",
            "dot16.m14n24k2.bf16",
            "dot16.m14n32k4.bf16",
            "dot3.m1n3k2.bf16",
            "dot16.m1n16k1.f32",
            "coop.m16n16k16.bf16",
            "coop.m16n8k16.f16",
            "coop.m32n32k32.f16",
            "x",
        ] {
            assert_eq!(find(&AtomName(bad.to_string())), None, "{bad}");
        }
    }

    #[test]
    fn wgmma_accumulator_is_held_as_ptx_says() {
        for n in [8, 64, 176, 256] {
            let d = wgmma(DType::BF16, n).unwrap().acc_dist;
            assert_eq!(d.counts(), (128, n / 2, 1));
            for t in 0..128 {
                for i in 0..n / 2 {
                    let row = 16 * (t / 32) + (t % 32) / 4 + 8 * ((i / 2) % 2);
                    let col = 8 * (i / 4) + 2 * (t % 4) + i % 2;
                    assert_eq!(d.coords(t, i, 0), [row, col], "n {n} thread {t} register {i}");
                }
            }
            assert!(d.covers());
        }
    }

    #[test]
    fn wgmma_a_registers_are_held_as_ptx_says() {
        let a16 = wgmma(DType::F16, 64).unwrap().a_dist.unwrap();
        let a32 = wgmma(DType::Tf32, 64).unwrap().a_dist.unwrap();
        let a8 = wgmma(DType::F8E4M3, 64).unwrap().a_dist.unwrap();
        for t in 0..128u64 {
            let r = 16 * (t / 32) + (t % 32) / 4;
            for m in 0..4u64 {
                let row = r + 8 * (m % 2);
                for e in 0..2 {
                    assert_eq!(a16.coords(t, 2 * m + e, 0), [row, 2 * (t % 4) + 8 * (m / 2) + e]);
                }
                for e in 0..4 {
                    assert_eq!(a8.coords(t, 4 * m + e, 0), [row, 4 * (t % 4) + 16 * (m / 2) + e]);
                }
                assert_eq!(a32.coords(t, m, 0), [row, t % 4 + 4 * (m / 2)]);
            }
        }
        assert!(a16.covers() && a32.covers() && a8.covers());
    }

    /// Row 8·w + g of the half is row 16·w + g of the instruction, in the registers of its lower rows.
    #[test]
    fn half_the_rows_are_the_lower_eight_of_sixteen() {
        let (whole, half) = (wgmma(DType::BF16, 16).unwrap(), wgmma_half(DType::BF16, 16).unwrap());
        let pairs =
            [(&whole.acc_dist, &half.acc_dist), (whole.a_dist.as_ref().unwrap(), half.a_dist.as_ref().unwrap())];
        for (w, h) in pairs {
            assert!(h.covers());
            assert_eq!(w.counts().1, 2 * h.counts().1);
            for t in 0..128 {
                for v in 0..h.counts().1 {
                    let [row, col] = h.coords(t, v, 0)[..] else { panic!() };
                    let at = w.coords(t, v / 2 * 4 + v % 2, 0);
                    assert_eq!(at, [row / 8 * 16 + row % 8, col], "thread {t} register {v}");
                }
            }
        }
    }

    #[test]
    fn sm80_fragments_are_held_as_ptx_says() {
        let atom = mma(DType::BF16).unwrap();
        let (a, b, c) = (atom.a_dist.unwrap(), atom.b_dist.unwrap(), atom.acc_dist);
        for lane in 0..32u64 {
            let (g, t) = (lane / 4, lane % 4);
            for e in 0..2 {
                for m in 0..4u64 {
                    assert_eq!(a.coords(lane, 2 * m + e, 0), [g + 8 * (m % 2), 2 * t + 8 * (m / 2) + e]);
                }
                for m in 0..2u64 {
                    assert_eq!(b.coords(lane, 2 * m + e, 0), [2 * t + 8 * m + e, g]);
                    assert_eq!(c.coords(lane, 2 * m + e, 0), [g + 8 * m, 2 * t + e]);
                }
            }
        }
    }

    #[test]
    fn an_accumulator_converts_to_an_a_operand_in_place() {
        // Softmax's P: k-block j of A takes the accumulator's columns 16j.. register by register, without shuffles.
        let s = wgmma(DType::BF16, 128).unwrap().acc_dist;
        let a = wgmma(DType::BF16, 64).unwrap().a_dist.unwrap();
        for j in 0..8 {
            assert!(Atom::holds(&s, &[0, 16 * j], &a));
        }
        assert!(!Atom::holds(&s, &[0, 8], &a.project(&[1, 0])));
        assert!(!Atom::holds(&s, &[0, 120], &a));
        let fp8 = wgmma(DType::F8E4M3, 64).unwrap().a_dist.unwrap();
        assert!(!Atom::holds(&s, &[0, 0], &fp8), "fp8 needs byte permutes");
    }

    /// The descriptor reads what the layout stores, element by element, for every major-ness, swizzle and k-step.
    #[test]
    fn descriptors_read_the_layout() {
        for (bytes, k, span) in
            [(2u64, 16, 128), (2, 16, 64), (2, 16, 32), (4, 8, 128), (4, 8, 32), (1, 32, 128), (1, 32, 64)]
        {
            let (mn, depth) = (64u64, 2 * span / bytes);
            let layout = MemLayout::swizzled_panels([mn, depth], 1, bytes, span).unwrap();
            let d = Descriptor::of(&layout, bytes, 0, 1, mn, k).unwrap();
            assert!(!d.mn_major);
            assert_eq!(d.sbo, 8 * span);
            for step in 0..depth / k {
                let start = layout.offset(&[0, step * k]) * bytes;
                for i in 0..mn {
                    for l in 0..k {
                        let want = layout.byte_offset(&[i, step * k + l], bytes);
                        assert_eq!(d.address(start, bytes, i, l), want, "span {span} step {step} ({i},{l})");
                    }
                }
            }
        }
        for span in [128, 64, 32] {
            let (mn, depth) = (128u64, 64u64);
            let layout = MemLayout::swizzled_panels([depth, mn], 1, 2, span).unwrap();
            let d = Descriptor::of(&layout, 2, 1, 0, mn, 16).unwrap();
            assert!(d.mn_major);
            assert_eq!((d.sbo, d.lbo), (8 * span, depth * span));
            for step in 0..depth / 16 {
                let start = layout.offset(&[step * 16, 0]) * 2;
                for i in 0..mn {
                    for l in 0..16 {
                        let want = layout.byte_offset(&[step * 16 + l, i], 2);
                        assert_eq!(d.address(start, 2, i, l), want, "span {span} step {step} ({i},{l})");
                    }
                }
            }
        }
    }

    /// A swizzle bit too many or too few reads other elements.
    #[test]
    fn a_wrong_swizzle_bit_reads_other_addresses() {
        let layout = MemLayout::swizzled_panels([64, 64], 1, 2, 128).unwrap();
        let right = Descriptor::of(&layout, 2, 0, 1, 64, 16).unwrap();
        for wrong in [None, Swizzle::span(64), Swizzle::span(32)] {
            let d = Descriptor { swizzle: wrong, ..right };
            let differs = (0..64).any(|i| (0..16).any(|l| d.address(0, 2, i, l) != right.address(0, 2, i, l)));
            assert!(differs, "{wrong:?}");
            let mut bad = layout.clone();
            bad.swizzle = wrong;
            assert!(Descriptor::of(&bad, 2, 0, 1, 64, 16).is_err());
        }
    }
}
