//! Mappings of contractions for adapters that multiply cooperative matrices: the blocks of one that takes the least time.
//!
//! A warp has 16 or 32 rows of the task's and all its columns, so that a step of k reads (rows + columns) · k elements of
//! shared memory for rows · columns · k multiply-adds; warps one below the other. A step takes a multiprocessor what the
//! slowest of its tasks' products, reads and loads takes, but no less than one task needs: its loads until they arrive, then
//! a warp's products one after another. Loads under way while a warp multiplies gained nothing on an H200
//! (docs/tuning-log.md, section 11), so that rings of one stage are what is chosen. Invariant: what is returned keeps within the sheet's registers, threads and shared memory, of which
//! each warp takes a matrix of sums at a time through; atoms are among those the sheet has.

use einfall_ir::analysis::resources::{LEAST_OVERHEAD, OVERHEAD};
use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms::{self, Atom};
use einfall_ir::target::{DataSheet, Gpu};

/// Blocks of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Tile {
    /// The instruction.
    pub atom: Atom,
    /// Rows of a warp.
    pub rows: u64,
    /// Warps.
    pub units: u64,
    /// Columns.
    pub columns: u64,
    /// Summed coordinates of a step.
    pub depth: u64,
    /// Tasks of a multiprocessor.
    pub resident: u64,
}

/// Matrices of a warp: down, and warps.
const ROWS: [(u64, u64); 9] = [(1, 16), (2, 8), (1, 8), (2, 4), (1, 4), (2, 2), (1, 2), (2, 1), (1, 1)];
/// Clocks from one product of a warp to its next: on an H200 a step of so many products takes a warp so long, whether four or
/// eight warps are at work (docs/tuning-log.md, section 11).
const PRODUCT: u64 = 80;
/// Columns of a task.
const COLUMNS: [u64; 3] = [128, 64, 32];
/// Summed coordinates of a step.
const DEPTHS: [u64; 2] = [32, 16];
/// Fewer rows than this are sums of products, or register tiles, whose memory is what they wait for.
const LEAST: u64 = 16;

/// The instruction for operands of these types, if the sheet's adapter has it.
pub fn atom(sheet: &DataSheet, operands: [DType; 2]) -> Option<Atom> {
    let names = &sheet.webgpu.as_ref()?.matrices;
    let fits = |a: &Atom| names.contains(&a.name.0) && operands.iter().all(|d| *d == a.operand);
    atoms::cooperative_products().find(fits)
}

/// The blocks of a product of `extents`: rows, columns, what is summed, and how many such products there are; none of them
/// where it is not known. `held`: tiles of sums' extents that threads have at once. None where nothing fits, or where there
/// are few rows.
pub fn tile(sheet: &DataSheet, atom: &Atom, extents: [Option<u64>; 4], held: u64) -> Option<Tile> {
    let gpu = sheet.gpu.as_ref()?;
    if extents[..2].iter().flatten().any(|n| *n < LEAST) {
        return None;
    }
    let mut best: Option<(f64, Tile)> = None;
    for (down, units) in ROWS {
        for (columns, depth) in COLUMNS.into_iter().flat_map(|c| DEPTHS.map(|d| (c, d))) {
            let rows = down * atom.shape[0];
            let tile = Tile { atom: atom.clone(), rows, units, columns, depth, resident: 0 };
            let resident = tile.fits(gpu, held);
            if resident == 0 {
                continue;
            }
            let tile = Tile { resident, ..tile };
            let seconds = tile.seconds(sheet, gpu, extents);
            if best.as_ref().is_none_or(|b| seconds < b.0) {
                best = Some((seconds, tile));
            }
        }
    }
    best.map(|b| b.1)
}

impl Tile {
    /// Tasks that a multiprocessor holds.
    fn fits(&self, gpu: &Gpu, held: u64) -> u64 {
        let [m, n, k] = self.atom.shape;
        let threads = 32 * self.units;
        if threads > gpu.threads_per_task || !self.depth.is_multiple_of(k) || !self.columns.is_multiple_of(n) {
            return 0;
        }
        let bytes = self.atom.operand.bytes(1);
        // Sums, operands of a step of the instruction, and what a thread loads at a time.
        let sums = self.rows * self.columns / 32;
        let operands = (self.rows + 2 * n) * k * bytes / 4 / 32;
        let loaded = (self.rows * self.units + self.columns) * self.depth * bytes / 4 / threads;
        let registers = sums + OVERHEAD + operands.max(loaded);
        // Rows of shared tiles are 16 bytes apart, whichever dimension they are of.
        let tile = |outer: u64, inner: u64| outer.max(inner) * (outer.min(inner) * bytes + 16);
        let shared = tile(self.rows * self.units, self.depth) + tile(self.depth, self.columns);
        let shared = shared + 4 * m * n * self.units;
        let share = (gpu.registers / threads).min(gpu.thread_registers);
        if registers.max(held * sums + LEAST_OVERHEAD) > share || shared > gpu.shared_per_task {
            return 0;
        }
        // Tasks together have as much shared memory as one may have (the driver leaves the rest to its cache: tasks of 30 KB and
        // more took as long as one at a time, docs/tuning-log.md, section 11).
        (gpu.registers / (registers.next_multiple_of(8) * threads))
            .min(gpu.shared_per_task / shared)
            .min(gpu.threads_per_multiprocessor / threads)
    }

    /// Tasks of a multiprocessor that together have under way what memory needs, at most those it holds.
    pub fn fed(&self) -> u64 {
        const UNDER_WAY: u64 = 40 << 10;
        let bytes = (self.rows * self.units + self.columns) * self.depth * self.atom.operand.bytes(1);
        UNDER_WAY.div_ceil(bytes).min(self.resident)
    }

    /// What the product takes: waves of tasks, each as long as its steps. What is not known is long.
    fn seconds(&self, sheet: &DataSheet, gpu: &Gpu, extents: [Option<u64>; 4]) -> f64 {
        const LONG: u64 = 1 << 14;
        let [m, n, k, others] = extents.map(|n| n.unwrap_or(LONG));
        let others = if extents[3].is_none() { 1 } else { others };
        let rows = self.rows * self.units;
        let tasks = m.div_ceil(rows) * n.div_ceil(self.columns) * others;
        // Tasks are dealt out evenly: with few of them a multiprocessor has fewer than it could hold.
        let together = tasks.div_ceil(gpu.multiprocessors).clamp(1, self.resident) as f64;
        let rounds = tasks.div_ceil(gpu.multiprocessors) as f64 / together;
        let clock = gpu.clock;
        let peak = sheet.peak_of(self.atom.operand).or(sheet.peak_of(DType::F32)).unwrap_or(1.0);
        let products = (2 * rows * self.columns * self.depth) as f64 * gpu.multiprocessors as f64 / peak;
        let bytes = self.units * (self.rows + self.columns) * self.depth * self.atom.operand.bytes(1);
        let rate = sheet.level("shared").map_or(1.0, |l| l.bandwidth);
        let reads = bytes as f64 / rate;
        let arrive = (gpu.memory_latency + 2 * gpu.barrier_latency) as f64 / clock;
        // Loads of all tasks together come from the second level of memory.
        let level = sheet.level("l2").or(sheet.level("dram")).map_or(1.0, |l| l.bandwidth * l.instances as f64);
        let loads = ((rows + self.columns) * self.depth * self.atom.operand.bytes(1)) as f64;
        let loads = loads * gpu.multiprocessors as f64 / level;
        let busy = products.max(reads).max(loads);
        let [am, an, ak] = self.atom.shape;
        let chain = (self.rows / am * (self.columns / an) * (self.depth / ak)) as f64 * PRODUCT as f64 / clock;
        let step = (together * busy).max(arrive + chain);
        // The sums go through shared memory, and out, as the slowest level takes them.
        let slowest = sheet.levels.first().map_or(1.0, |l| l.bandwidth * l.instances as f64);
        let out = (4 * rows * self.columns) as f64 * gpu.multiprocessors as f64 / slowest;
        rounds * (k.div_ceil(self.depth) as f64 * step + together * out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nvidia() -> DataSheet {
        DataSheet::named("webgpu-nvidia").expect("a sheet")
    }

    /// Large products have large tiles; small ones as many tasks as there are multiprocessors; few rows none at all.
    #[test]
    fn tiles_follow_the_sizes() {
        let sheet = nvidia();
        let atom = atom(&sheet, [DType::F16; 2]).expect("f16 has matrices");
        let of = |m, n, k| tile(&sheet, &atom, [Some(m), Some(n), Some(k), Some(1)], 1);
        let large = of(4096, 4096, 4096).expect("a tile");
        assert_eq!((large.rows, large.units, large.columns), (16, 16, 128), "{large:?}");
        let small = of(512, 512, 512).expect("a tile");
        assert!(512 * 512 / (small.rows * small.units * small.columns) >= 32, "{small:?}");
        // What follows a product has its elements twice.
        let more = tile(&sheet, &atom, [None; 4], 2).expect("a tile");
        assert!(2 * more.rows * more.columns / 32 + LEAST_OVERHEAD <= 65_536 / (32 * more.units), "{more:?}");
        assert_eq!((of(15, 4096, 4096), of(4096, 8, 4096)), (None, None));
        assert_eq!(tile(&sheet, &atom, [None; 4], 1).map(|t| (t.rows * t.units, t.columns)), Some((256, 128)));
    }

    /// What no adapter reports is not taken: other types, and other adapters.
    #[test]
    fn only_what_is_reported_is_taken() {
        let none = [[DType::BF16; 2], [DType::F32; 2], [DType::F16, DType::F32]];
        assert!(none.into_iter().all(|types| atom(&nvidia(), types).is_none()));
        for sheet in DataSheet::all().iter().filter(|s| s.name != "webgpu-nvidia") {
            assert_eq!(atom(sheet, [DType::F16; 2]), None, "{}", sheet.name);
        }
    }

    /// Less shared memory, registers or threads make smaller tiles, or none.
    #[test]
    fn tiles_keep_within_the_sheet() {
        let mut sheet = nvidia();
        let atom = atom(&sheet, [DType::F16; 2]).expect("f16 has matrices");
        let first = tile(&sheet, &atom, [None; 4], 1).expect("a tile");
        let change = |sheet: &mut DataSheet, f: &dyn Fn(&mut Gpu)| f(sheet.gpu.as_mut().expect("a GPU"));
        change(&mut sheet, &|g| g.thread_registers = 96);
        let fewer = tile(&sheet, &atom, [None; 4], 1).expect("a tile");
        assert!(fewer.rows * fewer.columns < first.rows * first.columns);
        change(&mut sheet, &|g| g.shared_per_task = 2 << 10);
        assert_eq!(tile(&sheet, &atom, [None; 4], 1), None);
    }
}
