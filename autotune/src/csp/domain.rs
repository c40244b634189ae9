//! Domains of the variables and the trail that restores them.
//!
//! A domain is an arithmetic progression `lo, lo + step, .., hi` or a sorted set of values. Sets live as slices of one
//! arena that grows with the search and is cut back on backtracking, so narrowing a set by a bound moves two indices
//! and narrowing it by a predicate copies the survivors once.
//!
//! Invariant: `lo` and `hi` are members; every operation only removes values; [`Store::pop`] restores exactly the
//! domains of the matching [`Store::push`]. An operation that would empty a domain returns [`Conflict`] and the store
//! must then be popped.

use super::number::{self, LIMIT};

/// A variable of a compiled problem: an index into its [`Store`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Var(pub(crate) u32);

impl Var {
    pub(crate) fn idx(self) -> usize {
        self.0 as usize
    }
}

/// A domain became empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict;

impl std::fmt::Display for Conflict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a variable has no value left")
    }
}

impl std::error::Error for Conflict {}

/// The result of a narrowing.
pub type Narrow = Result<(), Conflict>;

/// Progressions of at most this many values become sets when an inner value is removed.
pub(crate) const EXPAND: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Stride(i64),
    Set { start: u32, len: u32 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    lo: i64,
    hi: i64,
    shape: Shape,
}

/// The domains of all variables of a problem, with a trail.
#[derive(Clone, Debug, Default)]
pub struct Store {
    states: Vec<State>,
    stamps: Vec<u64>,
    values: Vec<i64>,
    trail: Vec<(u32, State)>,
    levels: Vec<(usize, usize, u64)>,
    stamp: u64,
    next_stamp: u64,
    changed: Vec<Var>,
}

impl Store {
    /// Adds a variable with the domain `lo, lo + step, .., hi`.
    ///
    /// # Errors
    /// [`Conflict`] where the progression is empty.
    pub fn add_range(&mut self, lo: i64, hi: i64, step: i64) -> Result<Var, Conflict> {
        let (lo, hi) = (lo.max(-LIMIT), hi.min(LIMIT));
        if lo > hi || step < 1 {
            return Err(Conflict);
        }
        let hi = hi - (hi - lo).rem_euclid(step);
        Ok(self.add(State { lo, hi, shape: Shape::Stride(step) }))
    }

    /// Adds a variable with the given values, in any order.
    ///
    /// # Errors
    /// [`Conflict`] where there are none.
    pub fn add_set(&mut self, values: &[i64]) -> Result<Var, Conflict> {
        let mut sorted = values.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let (Some(&lo), Some(&hi)) = (sorted.first(), sorted.last()) else { return Err(Conflict) };
        let start = self.values.len() as u32;
        self.values.extend_from_slice(&sorted);
        Ok(self.add(State { lo, hi, shape: Shape::Set { start, len: sorted.len() as u32 } }))
    }

    fn add(&mut self, state: State) -> Var {
        let var = Var(self.states.len() as u32);
        self.states.push(state);
        self.stamps.push(0);
        var
    }

    /// Adds a variable with the domain that `var` has in `other`.
    pub(crate) fn add_copy(&mut self, other: &Store, var: Var) -> Var {
        let state = other.states[var.idx()];
        match state.shape {
            Shape::Stride(_) => self.add(state),
            Shape::Set { start, len } => {
                let at = self.values.len() as u32;
                self.values.extend_from_slice(&other.values[start as usize..(start + len) as usize]);
                self.add(State { shape: Shape::Set { start: at, len }, ..state })
            }
        }
    }

    /// How many variables there are.
    pub fn n_vars(&self) -> usize {
        self.states.len()
    }

    /// The smallest value of `var`.
    #[inline]
    pub fn lo(&self, var: Var) -> i64 {
        self.states[var.idx()].lo
    }

    /// The largest value of `var`.
    #[inline]
    pub fn hi(&self, var: Var) -> i64 {
        self.states[var.idx()].hi
    }

    /// The value of `var` where it has only one left.
    #[inline]
    pub fn value(&self, var: Var) -> Option<i64> {
        let s = &self.states[var.idx()];
        if s.lo == s.hi { Some(s.lo) } else { None }
    }

    /// Whether `var` has one value left.
    #[inline]
    pub fn is_fixed(&self, var: Var) -> bool {
        let s = &self.states[var.idx()];
        s.lo == s.hi
    }

    /// The distance between the values where the domain is a progression, and 1 otherwise.
    pub(crate) fn step(&self, var: Var) -> i64 {
        match self.states[var.idx()].shape {
            Shape::Stride(step) => step,
            Shape::Set { .. } => 1,
        }
    }

    /// The values where the domain is a set.
    pub(crate) fn set(&self, var: Var) -> Option<&[i64]> {
        match self.states[var.idx()].shape {
            Shape::Stride(_) => None,
            Shape::Set { start, len } => Some(&self.values[start as usize..(start + len) as usize]),
        }
    }

    /// How many values `var` has left.
    pub fn size(&self, var: Var) -> u64 {
        let s = &self.states[var.idx()];
        match s.shape {
            Shape::Stride(step) => ((s.hi - s.lo) / step) as u64 + 1,
            Shape::Set { len, .. } => u64::from(len),
        }
    }

    /// Whether `value` is left in the domain of `var`.
    pub fn contains(&self, var: Var, value: i64) -> bool {
        let s = &self.states[var.idx()];
        if value < s.lo || value > s.hi {
            return false;
        }
        match s.shape {
            Shape::Stride(step) => step == 1 || (value - s.lo) % step == 0,
            Shape::Set { start, len } => {
                self.values[start as usize..(start + len) as usize].binary_search(&value).is_ok()
            }
        }
    }

    /// The smallest value above `value`, if any.
    pub fn next_above(&self, var: Var, value: i64) -> Option<i64> {
        let s = &self.states[var.idx()];
        if value >= s.hi {
            return None;
        }
        if value < s.lo {
            return Some(s.lo);
        }
        match s.shape {
            Shape::Stride(step) => Some(s.lo + ((value - s.lo) / step + 1) * step),
            Shape::Set { start, len } => {
                let set = &self.values[start as usize..(start + len) as usize];
                Some(set[set.partition_point(|v| *v <= value)])
            }
        }
    }

    /// The largest value below `value`, if any.
    pub fn next_below(&self, var: Var, value: i64) -> Option<i64> {
        let s = &self.states[var.idx()];
        if value <= s.lo {
            return None;
        }
        if value > s.hi {
            return Some(s.hi);
        }
        match s.shape {
            Shape::Stride(step) => Some(s.lo + (value - s.lo - 1) / step * step),
            Shape::Set { start, len } => {
                let set = &self.values[start as usize..(start + len) as usize];
                Some(set[set.partition_point(|v| *v < value) - 1])
            }
        }
    }

    /// The values of `var` in ascending order.
    pub fn iter(&self, var: Var) -> impl Iterator<Item = i64> + '_ {
        let mut next = Some(self.lo(var));
        std::iter::from_fn(move || {
            let out = next?;
            next = self.next_above(var, out);
            Some(out)
        })
    }

    #[inline]
    fn write(&mut self, var: Var, state: State) {
        let i = var.idx();
        if self.stamps[i] != self.stamp {
            self.stamps[i] = self.stamp;
            self.trail.push((var.0, self.states[i]));
        }
        self.states[i] = state;
        self.changed.push(var);
    }

    /// Removes the values below `bound`.
    #[inline]
    pub fn set_min(&mut self, var: Var, bound: i128) -> Narrow {
        let s = self.states[var.idx()];
        if bound <= i128::from(s.lo) {
            return Ok(());
        }
        if bound > i128::from(s.hi) {
            return Err(Conflict);
        }
        let bound = bound as i64;
        let state = match s.shape {
            Shape::Stride(step) => {
                let lo = if step == 1 { bound } else { s.hi - (s.hi - bound) / step * step };
                State { lo, ..s }
            }
            Shape::Set { start, len } => {
                let set = &self.values[start as usize..(start + len) as usize];
                let cut = set.partition_point(|v| *v < bound) as u32;
                State { lo: set[cut as usize], hi: s.hi, shape: Shape::Set { start: start + cut, len: len - cut } }
            }
        };
        self.write(var, state);
        Ok(())
    }

    /// Removes the values above `bound`.
    #[inline]
    pub fn set_max(&mut self, var: Var, bound: i128) -> Narrow {
        let s = self.states[var.idx()];
        if bound >= i128::from(s.hi) {
            return Ok(());
        }
        if bound < i128::from(s.lo) {
            return Err(Conflict);
        }
        let bound = bound as i64;
        let state = match s.shape {
            Shape::Stride(step) => {
                let hi = if step == 1 { bound } else { s.lo + (bound - s.lo) / step * step };
                State { hi, ..s }
            }
            Shape::Set { start, len } => {
                let set = &self.values[start as usize..(start + len) as usize];
                let keep = set.partition_point(|v| *v <= bound) as u32;
                State { lo: s.lo, hi: set[keep as usize - 1], shape: Shape::Set { start, len: keep } }
            }
        };
        self.write(var, state);
        Ok(())
    }

    /// Leaves only `value`.
    pub fn assign(&mut self, var: Var, value: i128) -> Narrow {
        let s = self.states[var.idx()];
        if value < i128::from(s.lo) || value > i128::from(s.hi) {
            return Err(Conflict);
        }
        let value = value as i64;
        if s.lo == s.hi {
            return Ok(());
        }
        let shape = match s.shape {
            Shape::Stride(step) => {
                if (value - s.lo) % step != 0 {
                    return Err(Conflict);
                }
                Shape::Stride(1)
            }
            Shape::Set { start, len } => {
                let set = &self.values[start as usize..(start + len) as usize];
                match set.binary_search(&value) {
                    Ok(at) => Shape::Set { start: start + at as u32, len: 1 },
                    Err(_) => return Err(Conflict),
                }
            }
        };
        self.write(var, State { lo: value, hi: value, shape });
        Ok(())
    }

    /// Removes `value`. An inner value of a progression longer than [`EXPAND`] stays: the caller re-checks it when the
    /// domain has shrunk.
    pub fn remove(&mut self, var: Var, value: i64) -> Narrow {
        if !self.contains(var, value) {
            return Ok(());
        }
        let s = self.states[var.idx()];
        if value == s.lo {
            return self.set_min(var, i128::from(value) + 1);
        }
        if value == s.hi {
            return self.set_max(var, i128::from(value) - 1);
        }
        self.retain(var, |v| v != value)
    }

    /// Keeps the values that satisfy `keep`. Of a progression longer than [`EXPAND`] only the ends are trimmed.
    pub fn retain(&mut self, var: Var, mut keep: impl FnMut(i64) -> bool) -> Narrow {
        let s = self.states[var.idx()];
        match s.shape {
            Shape::Set { start, len } => {
                let range = start as usize..(start + len) as usize;
                let Some(first_bad) = range.clone().find(|i| !keep(self.values[*i])) else { return Ok(()) };
                let at = self.values.len();
                self.values.extend_from_within(range.start..first_bad);
                for i in first_bad + 1..range.end {
                    let v = self.values[i];
                    if keep(v) {
                        self.values.push(v);
                    }
                }
                self.write_set(var, at)
            }
            Shape::Stride(step) if self.size(var) <= EXPAND => {
                let at = self.values.len();
                let mut v = s.lo;
                let mut dropped = false;
                loop {
                    if keep(v) {
                        self.values.push(v);
                    } else {
                        dropped = true;
                    }
                    if v == s.hi {
                        break;
                    }
                    v += step;
                }
                if !dropped {
                    self.values.truncate(at);
                    return Ok(());
                }
                self.write_set(var, at)
            }
            Shape::Stride(step) => {
                const TRIMS: usize = 64;
                let (mut lo, mut hi) = (s.lo, s.hi);
                for _ in 0..TRIMS {
                    if keep(lo) {
                        break;
                    }
                    lo += step;
                }
                for _ in 0..TRIMS {
                    if keep(hi) {
                        break;
                    }
                    hi -= step;
                }
                if (lo, hi) != (s.lo, s.hi) {
                    self.write(var, State { lo, hi, shape: s.shape });
                }
                Ok(())
            }
        }
    }

    /// Makes the arena's tail from `at` the domain of `var`.
    fn write_set(&mut self, var: Var, at: usize) -> Narrow {
        let tail = &self.values[at..];
        let (Some(&lo), Some(&hi)) = (tail.first(), tail.last()) else { return Err(Conflict) };
        let shape = Shape::Set { start: at as u32, len: tail.len() as u32 };
        self.write(var, State { lo, hi, shape });
        Ok(())
    }

    /// Keeps the values that occur in the sorted slice `allowed`.
    pub fn intersect(&mut self, var: Var, allowed: &[i64]) -> Narrow {
        let s = self.states[var.idx()];
        match s.shape {
            Shape::Set { .. } => {
                if (allowed.len() as u64) < self.size(var) * 8 {
                    let mut i = 0;
                    self.retain(var, |v| {
                        while i < allowed.len() && allowed[i] < v {
                            i += 1;
                        }
                        i < allowed.len() && allowed[i] == v
                    })
                } else {
                    self.retain(var, |v| allowed.binary_search(&v).is_ok())
                }
            }
            Shape::Stride(step) => {
                let at = self.values.len();
                let from = allowed.partition_point(|v| *v < s.lo);
                let to = allowed.partition_point(|v| *v <= s.hi);
                self.values.extend(allowed[from..to].iter().filter(|v| (**v - s.lo) % step == 0));
                if (self.values.len() - at) as u64 == self.size(var) {
                    self.values.truncate(at);
                    return Ok(());
                }
                self.write_set(var, at)
            }
        }
    }

    /// Keeps the values congruent to `residue` modulo `step`, `step >= 1`.
    pub fn set_stride(&mut self, var: Var, step: i64, residue: i64) -> Narrow {
        if step == 1 {
            return Ok(());
        }
        let s = self.states[var.idx()];
        let residue = residue.rem_euclid(step);
        match s.shape {
            Shape::Set { .. } => self.retain(var, |v| v.rem_euclid(step) == residue),
            Shape::Stride(old) => {
                if old % step == 0 {
                    return if s.lo.rem_euclid(step) == residue { Ok(()) } else { Err(Conflict) };
                }
                // The first member with the residue lies within `step / gcd` members of `lo`.
                let period = step / number::gcd(old, step);
                let mut lo = s.lo;
                let mut tries = 0;
                if old == 1 {
                    let ahead = (residue - s.lo.rem_euclid(step)).rem_euclid(step);
                    match lo.checked_add(ahead).filter(|v| *v <= s.hi) {
                        Some(v) => lo = v,
                        None => return Err(Conflict),
                    }
                } else {
                    while lo.rem_euclid(step) != residue {
                        tries += 1;
                        if tries > EXPAND as i64 && tries < period {
                            return Ok(());
                        }
                        if tries >= period || lo > s.hi - old {
                            return Err(Conflict);
                        }
                        lo += old;
                    }
                }
                match number::lcm(old, step) {
                    Some(both) => {
                        let hi = lo + (s.hi - lo) / both * both;
                        self.write(var, State { lo, hi, shape: Shape::Stride(both) });
                    }
                    None => self.write(var, State { lo, hi: lo, shape: Shape::Stride(1) }),
                }
                Ok(())
            }
        }
    }

    /// Opens a level that [`Store::pop`] undoes.
    pub fn push(&mut self) {
        self.levels.push((self.trail.len(), self.values.len(), self.stamp));
        self.next_stamp += 1;
        self.stamp = self.next_stamp;
    }

    /// Undoes everything since the matching [`Store::push`].
    pub fn pop(&mut self) {
        let Some((trail, values, stamp)) = self.levels.pop() else { return };
        while self.trail.len() > trail {
            if let Some((var, state)) = self.trail.pop() {
                self.states[var as usize] = state;
                self.stamps[var as usize] = 0;
            }
        }
        self.values.truncate(values);
        self.changed.clear();
        self.stamp = stamp;
    }

    /// How many levels are open.
    pub fn depth(&self) -> usize {
        self.levels.len()
    }

    /// Takes one variable whose domain changed since it was last reported.
    #[inline]
    pub(crate) fn take_changed(&mut self) -> Option<Var> {
        self.changed.pop()
    }

    /// Whether a domain changed since the last report.
    pub(crate) fn has_changes(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Forgets which domains changed.
    pub(crate) fn forget_changes(&mut self) {
        self.changed.clear();
    }
}
