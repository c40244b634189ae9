//! A cache under a loop nest: the largest part of the nest that fits is brought in once per trip of what is outside.
//!
//! Invariant: traffic never grows with capacity.

use std::collections::BTreeMap;

use super::access::{Place, Touch};
use super::{LevelTraffic, Loop, Model, Work};
use crate::tile::AxisId;

type Moved<'a> = (&'a Place, bool, Vec<usize>, usize);

/// The loops around every operation for one level.
pub(super) struct Nest<'a, 'b> {
    pub(super) model: &'b Model<'a>,
    pub(super) global: Vec<Loop>,
    pub(super) fine: bool,
}

impl Nest<'_, '_> {
    /// The loops around an operation with their positions in the nest: those of all operations, then its own.
    fn around<'x>(&'x self, w: &'x Work<'_>) -> impl DoubleEndedIterator<Item = (usize, &'x Loop)> {
        let own: &[Loop] = if self.fine { &w.loops } else { &[] };
        let shared = self.global.iter().enumerate();
        shared
            .filter(|(_, l)| l.stream.is_none_or(|s| w.streams.contains(&s)))
            .chain(own.iter().enumerate().map(|(n, l)| (self.global.len() + n, l)))
    }

    /// What one trip of the loops before position `from` touches through `t`, in bytes.
    fn footprint(&self, w: &Work<'_>, t: &Touch, from: usize) -> f64 {
        let tile = matches!(t.place, Place::Tile(_));
        let cover = |a: AxisId| {
            let mut reach = None;
            let mut least = None;
            for (n, l) in self.around(w).filter(|(_, l)| l.axis == a) {
                if tile && n < self.global.len() {
                    continue;
                }
                if n >= from {
                    reach = reach.or(Some(l.over));
                } else {
                    least = Some(l.inside);
                }
            }
            reach.or(least).unwrap_or(self.model.block(a))
        };
        t.bytes(&cover)
    }

    pub(super) fn traffic(&self, capacity: f64) -> LevelTraffic {
        let shared = self.global.len();
        let ops = &self.model.ops;
        let touches = |w: &'_ Work<'_>| -> Vec<Touch> {
            w.touches.iter().filter(|t| self.fine || matches!(t.place, Place::Array(..))).cloned().collect()
        };
        let touched: Vec<Vec<Touch>> = ops.iter().map(touches).collect();
        // Where the whole kernel's footprint fits.
        let fits = (0..=shared).find(|from| {
            let mut distinct: BTreeMap<&Place, f64> = BTreeMap::new();
            for (w, ts) in ops.iter().zip(&touched) {
                for t in ts {
                    let bytes = self.footprint(w, t, *from);
                    let have = distinct.entry(&t.place).or_insert(0.0);
                    *have = have.max(bytes);
                }
            }
            distinct.values().sum::<f64>() <= capacity
        });
        // By place, direction, streams outside, and the operation where it is alone.
        let mut moved: BTreeMap<Moved<'_>, f64> = BTreeMap::new();
        for (n, (w, ts)) in ops.iter().zip(&touched).enumerate() {
            let own = if self.fine { w.loops.len() } else { 0 };
            let fit = fits.unwrap_or_else(|| {
                let alone = |from: &usize| ts.iter().map(|t| self.footprint(w, t, *from)).sum::<f64>() <= capacity;
                (shared + 1..shared + own).find(alone).unwrap_or(shared + own)
            });
            for t in ts {
                // Scratch that stays in place is never brought in.
                if fit <= shared && matches!(t.place, Place::Tile(_)) {
                    continue;
                }
                let bytes = self.footprint(w, t, fit) * self.trips(w, t, fit);
                // The same data in two places of what fits is moved once; streams of one step are places of one step.
                let steps = |(p, l): &(usize, &Loop)| *p < fit && l.count() > 1.0;
                let outside: Vec<usize> = self.around(w).filter(steps).filter_map(|(_, l)| l.stream).collect();
                let alone = if fit <= shared { 0 } else { n + 1 };
                let have = moved.entry((&t.place, t.write, outside, alone)).or_insert(0.0);
                *have = have.max(bytes);
            }
        }
        let mut out = LevelTraffic::default();
        for ((_, write, ..), bytes) in moved {
            if write {
                out.write_bytes += bytes;
            } else {
                out.read_bytes += bytes;
            }
        }
        let partials = self.model.partial_bytes();
        out.read_bytes += partials;
        out.write_bytes += partials;
        out.supplied_bytes = out.read_bytes;
        out
    }

    /// How often the loops outside position `fit` bring an access's data in again.
    fn trips(&self, w: &Work<'_>, t: &Touch, fit: usize) -> f64 {
        let shared = self.global.len();
        let mut times = 1.0;
        let mut tail = true;
        for (n, l) in self.around(w).rev().filter(|(n, _)| *n < fit) {
            // Between two runs of an operation that does not fit with its neighbours, they displace what it had.
            tail &= !(fit > shared && n < shared);
            let tile = matches!(t.place, Place::Tile(_));
            let depends = t.axes.contains(&l.axis) && !(tile && n < shared);
            if depends || !tail {
                times *= if depends { l.share() } else { l.count() };
                times *= l.stream.map_or(1.0, |s| self.model.kept[s]);
                tail = false;
            }
        }
        times
    }
}
