//! Admitted mappings drawn at random, for tests and for judging the model's choice.
//!
//! Invariant: every structure and every admitted assignment has a chance; a draw depends on its seed alone.

use einfall_ir::arena::Id;
use einfall_ir::mapping::KernelMapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{AxisId, Kernel, Plan};

use super::device;
use super::facts::{Facts, Unsupported};
use super::search::values_of;
use super::space::Space;
use super::structure::structures;
use super::write::write;

/// Draws per mapping before giving up on it.
const TRIES: usize = 20_000;

/// xorshift64*.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n.max(1) as u64) as usize
    }

    fn pick(&mut self, list: &[i64]) -> i64 {
        list[self.below(list.len())]
    }
}

/// `n` admitted mappings of a kernel (fewer where draws fail).
///
/// # Errors
/// Why there is none.
pub fn sample(
    plan: &Plan,
    kernel: &Kernel,
    sheet: &DataSheet,
    sizes: Option<&[u64]>,
    seed: u64,
    n: usize,
) -> Result<Vec<KernelMapping>, Unsupported> {
    let gpu = device(sheet)?;
    let facts = Facts::new(plan, kernel, sizes)?;
    let all = structures(&facts)?;
    let spaces: Vec<Space<'_, '_>> = all.iter().map(|s| Space::new(&facts, s, gpu)).collect();
    let mut rng = Rng(seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15));
    let mut out = Vec::new();
    for _ in 0..n {
        for _ in 0..TRIES {
            let space = &spaces[rng.below(spaces.len())];
            let values = draw(space, &mut rng);
            if space.model.check(&values).is_ok() {
                out.push(write(space, &values));
                break;
            }
        }
    }
    Ok(out)
}

/// One value per variable; those that others determine nearly are drawn from what fits them.
fn draw(space: &Space<'_, '_>, rng: &mut Rng) -> Vec<i64> {
    let (s, v) = (space.structure, &space.vars);
    let mut values: Vec<i64> = space.model.vars().iter().map(|x| rng.pick(&values_of(&x.domain))).collect();
    let units = v.units.map_or(1, |u| values[u.idx()]);
    if let Some(b) = s.cut.and_then(|a| v.block[a.index()]) {
        // Whole units: round down to them.
        let least = if s.contractions.iter().any(|c| Some(c.m) == s.cut) { 64 } else { 8 } * units;
        values[b.idx()] = (values[b.idx()] / least * least).max(least);
    }
    for x in v.cluster.iter().flatten() {
        if rng.below(3) > 0 {
            values[x.idx()] = 1;
        }
    }
    if let Some(split) = v.split {
        if values[split.parts.idx()] == 1 || rng.below(2) == 0 {
            (values[split.parts.idx()], values[split.resident.idx()], values[split.last.idx()]) = (1, 1, 0);
        } else {
            // Parts are alone in their launch.
            let off = v.persistent.iter().chain(&v.longest).chain(v.staged.iter().chain(&v.reuses).flatten());
            off.for_each(|x| values[x.idx()] = 0);
            v.cluster.iter().flatten().chain(&v.group).for_each(|x| values[x.idx()] = 1);
        }
    }
    for (i, c) in s.contractions.iter().enumerate() {
        let block = |a: AxisId| v.block[a.index()].map_or(1, |b| values[b.idx()]);
        let part = if s.cut == Some(c.n) { block(c.n) / units } else { block(c.n) };
        let fits: Vec<i64> = (8..=256).step_by(8).filter(|n| part % n == 0).collect();
        if !fits.is_empty() {
            values[v.atom[i].idx()] = rng.pick(&fits);
        }
    }
    if let [p, c] = v.regs[..] {
        if rng.below(4) == 0 {
            (values[p.idx()], values[c.idx()]) = (0, 0);
        } else {
            // Near the most that fits.
            values[p.idx()] = rng.pick(&[24, 32, 40]);
            let most = ((512 - values[p.idx()]) / units / 8 * 8).min(256);
            values[c.idx()] = (most - 8 * rng.below(4) as i64).max(24);
        }
    }
    values
}
