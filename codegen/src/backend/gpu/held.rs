//! Fragments: which thread holds which element, as a thread part and a constant part of every coordinate.
//!
//! A coordinate of element `v` of thread `t` is `T(t) + C(v)`: printers compute the thread part once, the constant part
//! is known here. Invariant: what two fragments serve each other depends on their distributions alone.

use std::collections::HashMap;
use std::rc::Rc;

use einfall_ir::arena::{Arena, Id};
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Frag, FragId};
use einfall_ir::layout::Distribution;
use einfall_ir::ops::ReduceOp;

/// A digit of the thread number: `(t / place) % extent` moves `stride` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::backend) struct ThreadDigit {
    pub(in crate::backend) place: u64,
    pub(in crate::backend) extent: u64,
    pub(in crate::backend) stride: u64,
}

/// One fragment.
pub(in crate::backend) struct Held {
    /// Its number in the kernel.
    pub(in crate::backend) id: usize,
    pub(in crate::backend) name: String,
    pub(in crate::backend) dtype: DType,
    /// Extents of the tile.
    pub(in crate::backend) dims: Vec<i64>,
    /// Constant part of each element's coordinates.
    pub(in crate::backend) consts: Vec<Vec<i64>>,
    /// Thread digits that move along each dimension.
    pub(in crate::backend) threads: Vec<Vec<ThreadDigit>>,
    /// Thread digits that replicate.
    pub(in crate::backend) replicas: Vec<ThreadDigit>,
    /// Threads that the distribution tells apart.
    pub(in crate::backend) thread_count: u64,
}

impl Held {
    fn new(id: usize, f: &Frag) -> Held {
        let dist: &Distribution = &f.dist;
        let (thread_count, count, _) = dist.counts();
        let mut threads = vec![Vec::new(); dist.dims.len()];
        let mut replicas = Vec::new();
        let mut place = 1;
        for g in &dist.threads {
            let digit = ThreadDigit { place, extent: g.extent, stride: g.stride };
            place *= g.extent;
            match g.extent {
                1 => {}
                _ if g.stride == 0 || dist.dims.is_empty() => replicas.push(digit),
                _ => threads[g.dim].push(digit),
            }
        }
        let at = |v| dist.coords(0, v, 0).into_iter().map(|c| c as i64).collect();
        Held {
            id,
            name: f.name.clone(),
            dtype: f.dtype,
            dims: dist.dims.iter().map(|d| *d as i64).collect(),
            consts: (0..count).map(at).collect(),
            threads,
            replicas,
            thread_count,
        }
    }

    /// Elements per thread.
    pub(in crate::backend) fn count(&self) -> usize {
        self.consts.len()
    }

    /// Largest thread part of a coordinate.
    pub(in crate::backend) fn thread_max(&self, dim: usize) -> i64 {
        self.threads[dim].iter().map(|g| ((g.extent - 1) * g.stride) as i64).sum()
    }

    /// The thread part of a coordinate, in plain numbers.
    fn thread_part(&self, dim: usize, thread: u64) -> u64 {
        self.threads[dim].iter().map(|g| thread / g.place % g.extent * g.stride).sum()
    }
}

/// For each element of a result, the operand's element at its place; none: other threads hold it.
pub(in crate::backend) type Served = Option<Rc<Vec<Option<usize>>>>;

/// How a running reduction walks a fragment.
pub(in crate::backend) struct Walk {
    /// The carry's fragment, and its element for each of the source's.
    pub(in crate::backend) carried: Option<(FragId, Rc<Vec<Option<usize>>>)>,
    /// Thread digits along the dimension, neighbours first.
    pub(in crate::backend) lanes: Vec<ThreadDigit>,
    /// Elements of a thread that stand before the next thread's.
    pub(in crate::backend) run: i64,
    /// For every point of the other dimensions, the elements along this one, in order; points as they come.
    pub(in crate::backend) rows: Vec<(Vec<i64>, Vec<usize>)>,
}

/// All fragments of a kernel, and which elements of one serve which of another.
pub(in crate::backend) struct Frags {
    all: Vec<Held>,
    served: HashMap<(FragId, FragId, Vec<usize>), Served>,
}

impl Frags {
    pub(in crate::backend) fn new(frags: &Arena<FragId, Frag>) -> Frags {
        let all = frags.iter().map(|(id, f)| Held::new(id.index(), f)).collect();
        Frags { all, served: HashMap::new() }
    }

    /// A distribution of places without registers, to compute addresses with.
    /// `at`: the constant parts, where no digits say them.
    pub(in crate::backend) fn places(
        &mut self,
        dist: &Distribution,
        dtype: DType,
        at: Option<Vec<Vec<i64>>>,
    ) -> FragId {
        let id = self.all.len();
        let mut places = Held::new(id, &Frag { name: String::new(), dtype, dist: dist.clone() });
        if let Some(at) = at {
            places.consts = at;
        }
        self.all.push(places);
        FragId::new(id)
    }

    pub(in crate::backend) fn get(&self, f: FragId) -> &Held {
        &self.all[f.index()]
    }

    pub(in crate::backend) fn iter(&self) -> impl Iterator<Item = &Held> {
        self.all.iter()
    }

    /// For each element of `result`, the element of `operand` (whose dimensions are `dims` of it) at its coordinates;
    /// none where that is beyond the tile. None if a thread would need another thread's element.
    pub(in crate::backend) fn serve(&mut self, operand: FragId, result: FragId, dims: &[usize]) -> Served {
        let key = (operand, result, dims.to_vec());
        if let Some(found) = self.served.get(&key) {
            return found.clone();
        }
        let (f, r) = (self.get(operand), self.get(result));
        let threads = f.thread_count.max(r.thread_count);
        let same = |(i, d): (usize, &usize)| (0..threads).all(|t| f.thread_part(i, t) == r.thread_part(*d, t));
        let found = dims.iter().enumerate().all(same).then(|| {
            let mut at: HashMap<&[i64], usize> = HashMap::new();
            for (v, c) in f.consts.iter().enumerate() {
                at.entry(c.as_slice()).or_insert(v);
            }
            let look = |c: &Vec<i64>| at.get(dims.iter().map(|d| c[*d]).collect::<Vec<_>>().as_slice()).copied();
            Rc::new(r.consts.iter().map(look).collect::<Vec<_>>())
        });
        self.served.insert(key, found.clone());
        found
    }

    /// For every element of a reduction's result, the elements of the source that it joins; `kept`: the dimensions of the
    /// source that the result has.
    ///
    /// # Errors
    /// What cannot be printed, where other threads hold the result.
    pub(in crate::backend) fn groups(
        &mut self,
        out: FragId,
        src: FragId,
        kept: &[usize],
    ) -> Result<Vec<Vec<usize>>, String> {
        let (o, s) = (self.get(out), self.get(src));
        let mut at: HashMap<Vec<i64>, Vec<usize>> = HashMap::new();
        for (v, c) in s.consts.iter().enumerate() {
            at.entry(kept.iter().map(|d| c[*d]).collect()).or_default().push(v);
        }
        let groups = o.consts.iter().map(|c| at.get(c).cloned()).collect::<Option<Vec<_>>>();
        let what = format!("a reduction of `{}` into `{}`, which other threads hold", s.name, o.name);
        groups.filter(|_| self.serve(out, src, kept).is_some()).ok_or(what)
    }

    /// How a running reduction of `src` along a dimension walks it.
    ///
    /// # Errors
    /// What cannot be printed.
    pub(in crate::backend) fn walk(
        &mut self,
        op: ReduceOp,
        out: FragId,
        src: FragId,
        along: usize,
        carry: Option<FragId>,
    ) -> Result<Walk, String> {
        if op.selects_argument() {
            return Err(format!("a scan by {}", op.name()));
        }
        let rank = self.get(src).dims.len();
        let all: Vec<usize> = (0..rank).collect();
        if self.get(out).consts != self.get(src).consts || self.serve(src, out, &all).is_none() {
            return Err("a scan between fragments that are held differently".to_owned());
        }
        let kept: Vec<usize> = (0..rank).filter(|d| *d != along).collect();
        let carried = match carry {
            None => None,
            Some(c) => Some((c, self.serve(c, src, &kept).ok_or("a scan whose carry other threads hold")?)),
        };
        let mut lanes = self.get(src).threads[along].clone();
        lanes.sort_by_key(|g| g.stride);
        let run = lanes.first().map_or(i64::MAX, |g| g.stride as i64);
        let mut ends = run;
        for g in &lanes {
            if g.stride as i64 != ends {
                return Err("a scan over threads that do not follow one another".to_owned());
            }
            ends *= g.extent as i64;
        }
        let mut rows: Vec<(Vec<i64>, Vec<usize>)> = Vec::new();
        for (v, c) in self.get(src).consts.iter().enumerate() {
            let key: Vec<i64> = kept.iter().map(|d| c[*d]).collect();
            match rows.iter_mut().find(|(k, _)| *k == key) {
                Some((_, row)) => row.push(v),
                None => rows.push((key, vec![v])),
            }
        }
        for (_, row) in &mut rows {
            row.sort_by_key(|v| self.get(src).consts[*v][along]);
        }
        Ok(Walk { carried, lanes, run, rows })
    }
}
