//! `ldmatrix` and `stmatrix`: fragments that hold 8×8 matrices of 16-bit elements, as the operands of mma.sync and the
//! accumulators of both families do, from and to shared memory.
//!
//! A register of such a fragment is one matrix: lane l has the pair at row l/4, columns 2·(l%4) and the next (of 32-bit
//! elements, one at column l%4). The instructions take from each lane the address of one row of 16 bytes: lanes 8j to
//! 8j+7 those of matrix j, which must lie a fixed step apart. Where rows of the fragment are contiguous in memory across
//! pairs, the transposed form is taken. Invariant: taken only where every row is whole, aligned and within the tile;
//! other loads and stores go element by element.
//! Source: PTX ISA, "ldmatrix", "stmatrix" (sm_90).

use einfall_ir::kernel::{BufSpace, FragId, Scope, View};
use einfall_ir::layout::{DistDigit, Distribution};

use super::Res;
use super::address::{Addresses, divides};
use super::emit::Emit;
use crate::backend::gpu::held::ThreadDigit;

/// Matrices of one instruction: how far the second and the third are from the first, each along one dimension.
struct Steps {
    count: usize,
    steps: Vec<(usize, i64)>,
}

/// The most matrices that one instruction can take, all of `origins` in turn.
fn steps(origins: &[Vec<i64>]) -> Steps {
    let step = |a: &[i64], b: &[i64]| {
        let moved: Vec<(usize, i64)> = (0..a.len()).filter(|d| a[*d] != b[*d]).map(|d| (d, b[d] - a[d])).collect();
        match moved[..] {
            [(d, s)] if s > 0 => Some((d, s)),
            _ => None,
        }
    };
    for count in [4usize, 2] {
        if !origins.len().is_multiple_of(count) {
            continue;
        }
        let of = |g: &[Vec<i64>]| -> Option<Vec<(usize, i64)>> {
            let all: Vec<_> = (0..count.ilog2()).map(|b| step(&g[0], &g[1 << b])).collect::<Option<_>>()?;
            (count < 4 || step(&g[1], &g[3]) == Some(all[1])).then_some(all)
        };
        let first = of(&origins[..count]);
        if let Some(found) = first.clone()
            && origins.chunks(count).all(|g| of(g) == first)
        {
            return Steps { count, steps: found };
        }
    }
    Steps { count: 1, steps: Vec::new() }
}

/// A fragment as 8×8 matrices, so many an instruction.
struct Matrices {
    /// One matrix each.
    registers: Vec<String>,
    /// Where each lane's row is, instruction by instruction.
    places: FragId,
    count: usize,
    trans: &'static str,
}

impl Emit<'_> {
    /// A fragment's registers as matrices in a window of shared memory; none if it is not held, or its elements do not
    /// lie, as that needs.
    fn matrices(&mut self, held: FragId, view: &View) -> Option<Matrices> {
        let k = self.k;
        let b = &k.bufs[view.buf];
        let BufSpace::Shared { layout, .. } = &b.space else { return None };
        let frag = self.frags.get(held);
        let bytes = b.dtype.bytes(1);
        let unit = self.role.scope.threads();
        if frag.dtype != b.dtype
            || frag.dims.len() != 2
            || !matches!(bytes, 2 | 4)
            || b.dtype.bits() < 16
            || self.role.scope == Scope::Thread
            || frag.thread_count != unit
            || !frag.replicas.is_empty()
        {
            return None;
        }
        let per = (4 / bytes) as usize;
        let has = |d: usize, place, extent, stride| frag.threads[d].contains(&ThreadDigit { place, extent, stride });
        let pairs = (0..2).find(|d| has(*d, 1, 4, per as u64) && has(1 - d, 4, 8, 1))?;
        let rows = 1 - pairs;
        let neighbours = frag.consts.chunks(per).all(|c| {
            c.len() == per
                && c.iter().enumerate().all(|(i, x)| x[pairs] == c[0][pairs] + i as i64 && x[rows] == c[0][rows])
        });
        let contiguous = self.contiguous(view)?;
        let transposed = view.walk[pairs] != Some((contiguous, 1));
        // The dimension whose elements are neighbours in memory, and the one along which rows follow one another.
        let (run, line) = if transposed { (rows, pairs) } else { (pairs, rows) };
        let unit_steps =
            view.walk[run] == Some((contiguous, 1)) && matches!(view.walk[line], Some((d, 1)) if d != contiguous);
        let n = 16 / bytes;
        let origins: Vec<Vec<i64>> = frag.consts.iter().step_by(per).cloned().collect();
        let others: Vec<(usize, ThreadDigit)> =
            (0..2).flat_map(|d| frag.threads[d].iter().filter(|g| g.place >= 32).map(move |g| (d, *g))).collect();
        let whole = (0..2).all(|d| frag.consts.iter().all(|c| c[d] + frag.thread_max(d) < frag.dims[d]));
        let aligned =
            layout.dims.iter().flatten().all(|g| g.stride == 1 || g.extent == 1 || g.stride.is_multiple_of(n))
                && layout.dims[contiguous].first().is_some_and(|g| g.extent.is_multiple_of(n))
                && divides(k, n, &view.at[contiguous])
                && origins.iter().all(|o| o[run] % n as i64 == 0)
                && others.iter().all(|(d, g)| *d != run || g.stride.is_multiple_of(n));
        if !neighbours || !unit_steps || !whole || !aligned || (transposed && bytes != 2) {
            return None;
        }
        let registers: Vec<String> = (0..origins.len()).map(|i| frag.register(i * per)).collect();
        let Steps { count, steps } = steps(&origins);
        let mut threads = vec![DistDigit { extent: 8, dim: line, stride: 1 }];
        threads.extend(steps.iter().map(|(dim, s)| DistDigit { extent: 2, dim: *dim, stride: *s as u64 }));
        threads.push(DistDigit { extent: 4 / count as u64, dim: 0, stride: 0 });
        threads.extend(others.iter().map(|(dim, g)| DistDigit { extent: g.extent, dim: *dim, stride: g.stride }));
        let dims = frag.dims.iter().map(|d| *d as u64).collect();
        let dist = Distribution { dims, threads, regs: Vec::new(), lanes: Vec::new() };
        let firsts = origins.into_iter().step_by(count).collect();
        let places = self.frags.places(&dist, b.dtype, Some(firsts));
        Some(Matrices { registers, places, count, trans: if transposed { ".trans" } else { "" } })
    }

    /// Loads a fragment by `ldmatrix`; false if it is not held, or its elements do not lie, as that needs.
    pub(super) fn load_matrices(&mut self, out: FragId, src: &View) -> Res<bool> {
        let Some(m) = self.matrices(out, src) else { return Ok(false) };
        let mut a = Addresses::default();
        for (g, list) in m.registers.chunks(m.count).enumerate() {
            let (r, offset) = self.address(src, m.places, g, &mut a)?;
            let (count, trans, list) = (m.count, m.trans, list.join(", "));
            self.t.line(&format!(
                "ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared::cta.b16 {{{list}}}, [{r}+{offset}]"
            ));
        }
        Ok(true)
    }

    /// Stores a fragment by `stmatrix`; false if the device has none, it is not held, or its elements do not lie, as that
    /// needs.
    pub(super) fn store_matrices(&mut self, dst: &View, src: FragId) -> Res<bool> {
        if !self.target.hopper() {
            return Ok(false);
        }
        let Some(m) = self.matrices(src, dst) else { return Ok(false) };
        let mut a = Addresses::default();
        for (g, list) in m.registers.chunks(m.count).enumerate() {
            let (r, offset) = self.address(dst, m.places, g, &mut a)?;
            let (count, trans, list) = (m.count, m.trans, list.join(", "));
            self.t.line(&format!(
                "stmatrix.sync.aligned.m8n8.x{count}{trans}.shared::cta.b16 [{r}+{offset}], {{{list}}}"
            ));
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_go_four_at_a_time_where_they_lie_evenly() {
        let o = |list: &[[i64; 2]]| -> Vec<Vec<i64>> { list.iter().map(|x| x.to_vec()).collect() };
        let of = |list: &[[i64; 2]]| {
            let s = steps(&o(list));
            (s.count, s.steps)
        };
        assert_eq!(of(&[[0, 0], [8, 0], [0, 8], [8, 8]]), (4, vec![(0, 8), (1, 8)]));
        assert_eq!(of(&[[0, 0], [8, 0], [16, 0], [24, 0]]), (4, vec![(0, 8), (0, 16)]));
        assert_eq!(of(&[[0, 0], [8, 0], [0, 8], [16, 8]]), (1, vec![]));
        assert_eq!(of(&[[0, 0], [8, 0], [0, 8], [8, 8], [0, 24], [8, 24]]), (2, vec![(0, 8)]));
        assert_eq!(of(&[[0, 0], [8, 0]]), (2, vec![(0, 8)]));
        assert_eq!(of(&[[0, 0], [8, 8]]), (1, vec![]));
        assert_eq!(of(&[[0, 0]]), (1, vec![]));
    }
}
