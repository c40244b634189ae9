//! A cache under a loop nest: the largest part of the nest that fits is brought in once per trip of what is outside.
//!
//! Invariant: traffic never grows with capacity.

use std::collections::BTreeMap;

use super::access::{Place, Touch};
use super::{LevelTraffic, Loop, Model, Work};
use crate::arena::Id;
use crate::tile::AxisId;

type Moved = ((Place, String), bool, Vec<usize>, usize);

/// The loops around every operation for one level.
pub(super) struct Nest<'a, 'b> {
    pub(super) model: &'b Model<'a>,
    pub(super) global: Vec<Loop>,
    pub(super) fine: bool,
    /// The share of its steps that a stream's filter leaves to the tasks that run at the same time.
    pub(super) kept: Vec<f64>,
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

    /// How far an axis reaches in one trip of the loops before position `from`.
    fn cover(&self, w: &Work<'_>, t: &Touch, from: usize, a: AxisId) -> f64 {
        let tile = matches!(t.place, Place::Tile(_));
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
    }

    /// What one trip of the loops before position `from` touches through `t`, in bytes.
    fn footprint(&self, w: &Work<'_>, t: &Touch, from: usize) -> f64 {
        t.bytes(&|a| self.cover(w, t, from, a))
    }

    /// What that is: two axes that walk all of an extent touch the same.
    fn identity(&self, w: &Work<'_>, t: &Touch, from: usize) -> (Place, String) {
        let cover = |a| self.cover(w, t, from, a);
        let axis = |a: AxisId| {
            let all = cover(a) >= self.model.extent[a.index()];
            if all { format!("{:?}", self.model.kernel.axes[a].extent) } else { format!("{a:?}") }
        };
        t.identity(&axis, &cover)
    }

    pub(super) fn traffic(&self, capacity: f64) -> LevelTraffic {
        let shared = self.global.len();
        let ops = &self.model.ops;
        let touches = |w: &'_ Work<'_>| -> Vec<Touch> {
            w.touches.iter().filter(|t| self.fine || matches!(t.place, Place::Array(_))).cloned().collect()
        };
        let touched: Vec<Vec<Touch>> = ops.iter().map(touches).collect();
        // Where the whole kernel's footprint fits.
        let fits = (0..=shared).find(|from| {
            let mut distinct: BTreeMap<(Place, String), f64> = BTreeMap::new();
            for (w, ts) in ops.iter().zip(&touched) {
                for t in ts {
                    let bytes = self.footprint(w, t, *from);
                    let have = distinct.entry(self.identity(w, t, *from)).or_insert(0.0);
                    *have = have.max(bytes);
                }
            }
            distinct.values().sum::<f64>() <= capacity
        });
        // By place, direction, streams outside, and the operation where it is alone.
        let mut moved: BTreeMap<Moved, f64> = BTreeMap::new();
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
                let have = moved.entry((self.identity(w, t, fit), t.write, outside, alone)).or_insert(0.0);
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

    /// What a cache of `capacity` bytes brings in and, by the end, has written back: bytes read and bytes written. Tasks
    /// of the innermost `together` loops run at once and share what each brings in; what several of them read takes two
    /// places, as in a cache of two halves that both keep what they are asked for ([`survives`]).
    pub(super) fn counted(&self, capacity: f64, together: usize) -> (f64, f64) {
        let from = self.global.len() - together;
        let mut held: Vec<Resident<'_>> = Vec::new();
        for (n, w) in self.model.ops.iter().enumerate() {
            for t in w.touches.iter().filter(|t| matches!(t.place, Place::Array(_))) {
                let bytes = self.footprint(w, t, from);
                let loops = self.global[from..].iter();
                let shared = loops.clone().any(|l| l.count() > 1.0 && !t.axes.contains(&l.axis));
                held.push(Resident {
                    op: n,
                    touch: t,
                    bytes,
                    missed: bytes,
                    places: if shared && !t.write { 2.0 } else { 1.0 },
                });
            }
        }
        // Tasks that walk no step in between have what they share at hand.
        self.merge(&mut held, from, f64::INFINITY);
        for p in (0..from).rev() {
            let l = &self.global[p];
            let inside = |r: &Resident<'_>| l.stream.is_none_or(|s| self.model.ops[r.op].streams.contains(&s));
            let again = |r: &Resident<'_>| !r.touch.axes.contains(&l.axis);
            let trip: f64 = held.iter().filter(|r| inside(r)).map(|r| r.places * r.missed).sum();
            let gone = 1.0 - survives(trip, capacity);
            for r in held.iter_mut().filter(|r| inside(r)) {
                let kept = l.stream.map_or(1.0, |s| self.kept[s]);
                let whole = self.footprint(&self.model.ops[r.op], r.touch, p);
                if again(r) {
                    let trips = l.count() * kept;
                    let distinct = whole.min(trips * r.bytes);
                    // What is written again is still to be written back.
                    let hits = (trips * r.bytes - distinct) * if r.touch.write { 1.0 } else { 1.0 - gone };
                    r.missed = trips * r.missed - hits;
                    r.bytes = distinct;
                } else {
                    r.missed *= l.share() * kept;
                    r.bytes = whole.min(l.share() * kept * r.bytes);
                }
            }
            self.merge(&mut held, p, capacity);
        }
        let sum = |write: bool, by: fn(&Resident<'_>) -> f64| {
            held.iter().filter(|r| r.touch.write == write).map(by).sum::<f64>()
        };
        let (read, written) = (sum(false, |r| r.missed), sum(true, |r| r.missed));
        let all = sum(false, |r| r.missed * r.places) + written;
        // What is written is spread evenly over the launch.
        const PARTS: usize = 256;
        let still = |i: usize| survives(all * (i as f64 + 0.5) / PARTS as f64, capacity);
        let left = written * (0..PARTS).map(still).sum::<f64>() / PARTS as f64;
        let partials = self.model.partial_bytes();
        (read + partials, written - left + partials)
    }

    /// Makes one of those that touch the same data in a trip of the loops before position `from`.
    fn merge(&self, held: &mut Vec<Resident<'_>>, from: usize, capacity: f64) {
        let all: f64 = held.iter().map(|r| r.places * r.missed).sum();
        let survives = survives(all, capacity);
        let mut out: Vec<(Resident<'_>, _)> = Vec::new();
        for r in held.drain(..) {
            let w = &self.model.ops[r.op];
            // Streams that are still to be walked keep them apart.
            let walked: Vec<usize> =
                w.streams.iter().copied().filter(|s| self.at(*s).is_some_and(|at| at < from)).collect();
            let key = (self.identity(w, r.touch, from), r.touch.write, walked);
            match out.iter_mut().find(|(_, k)| *k == key) {
                Some((first, _)) => {
                    first.missed =
                        first.missed.max(r.missed) + first.missed.min(r.missed) - first.bytes.min(r.bytes) * survives;
                    first.bytes = first.bytes.max(r.bytes);
                    first.places = first.places.max(r.places);
                }
                None => out.push((r, key)),
            }
        }
        held.extend(out.into_iter().map(|x| x.0));
    }

    /// The position in the nest of a stream's loop, if that takes several steps.
    fn at(&self, stream: usize) -> Option<usize> {
        self.global.iter().position(|l| l.stream == Some(stream) && l.count() > 1.0)
    }
}

/// What an access touches in one trip, and how much of that it had to bring in.
struct Resident<'a> {
    op: usize,
    touch: &'a Touch,
    bytes: f64,
    missed: f64,
    /// Places that a byte takes.
    places: f64,
}

/// The share of what a cache holds that is still there when `bytes` others, by the places they take, were touched since.
/// Of sets that replace the least recently used, into which addresses are hashed, some overflow before the whole does:
/// a Weibull curve whose shape is fitted to counts of an H200 (docs/tuning-log.md).
fn survives(bytes: f64, capacity: f64) -> f64 {
    const SHAPE: i32 = 4;
    (-(bytes / capacity).powi(SHAPE)).exp()
}
