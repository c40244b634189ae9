//! Fragments as function variables: who holds what, as a thread part and a constant part of every coordinate.
//!
//! A coordinate of element `v` of thread `t` is `T(t) + C(v)`: the thread part is computed once, the constant part is
//! known here. Invariant: an element's variable holds its value rounded to the fragment's type.

use std::collections::HashMap;
use std::rc::Rc;

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Frag, FragId};

use super::Res;
use super::emit::Emit;
use super::value::{Ty, Val};

/// A digit of the thread number: `(t / place) % extent` moves `stride` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ThreadDigit {
    pub(super) place: u64,
    pub(super) extent: u64,
    pub(super) stride: u64,
}

/// One fragment.
pub(super) struct Held {
    pub(super) name: String,
    pub(super) dtype: DType,
    /// Extents of the tile.
    pub(super) dims: Vec<i64>,
    /// Constant part of each element's coordinates.
    pub(super) consts: Vec<Vec<i64>>,
    /// Thread digits that move along each dimension.
    pub(super) threads: Vec<Vec<ThreadDigit>>,
    /// Thread digits that replicate.
    pub(super) replicas: Vec<ThreadDigit>,
    /// Threads that the distribution tells apart.
    pub(super) thread_count: u64,
}

impl Held {
    pub(super) fn new(f: &Frag) -> Held {
        let dist = &f.dist;
        let (thread_count, count, _) = dist.counts();
        let mut threads = vec![Vec::new(); dist.dims.len()];
        let mut replicas = Vec::new();
        let mut place = 1;
        for g in dist.threads.iter() {
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
    pub(super) fn count(&self) -> usize {
        self.consts.len()
    }

    /// The variable of element `v`.
    pub(super) fn variable(&self, v: usize) -> String {
        format!("r_{}_{v}", super::emit::plain(&self.name))
    }

    /// Largest thread part of a coordinate.
    pub(super) fn thread_max(&self, dim: usize) -> i64 {
        self.threads[dim].iter().map(|g| ((g.extent - 1) * g.stride) as i64).sum()
    }

    fn thread_part(&self, dim: usize, thread: u64) -> u64 {
        self.threads[dim].iter().map(|g| thread / g.place % g.extent * g.stride).sum()
    }
}

/// The class of a type's values.
pub(super) fn class(dtype: DType) -> Ty {
    if dtype.is_float() { Ty::Float } else { Ty::Int }
}

/// For each element of a result, the operand's element at its place; none: other threads hold it.
pub(super) type Served = Option<Rc<Vec<Option<usize>>>>;

impl Emit<'_> {
    pub(super) fn held(&self, f: FragId) -> &Held {
        &self.frags[f.index()]
    }

    /// The value of element `v` of a fragment.
    pub(super) fn element(&self, f: FragId, v: usize) -> Val {
        let h = self.held(f);
        Val::new(class(h.dtype), h.variable(v))
    }

    /// Writes element `v` of a fragment.
    pub(super) fn set(&mut self, f: FragId, v: usize, value: &Val) -> Res<()> {
        let (dtype, name) = (self.held(f).dtype, self.held(f).variable(v));
        let x = self.rounded(value, dtype)?;
        let x = self.to(&x, class(dtype));
        if x.s != name {
            self.line(&format!("{name} = {};", x.s));
        }
        Ok(())
    }

    /// For each element of `result`, the element of `operand` (whose dimensions are `dims` of it) at its coordinates;
    /// none where that is beyond the tile. None if a thread would need another thread's element.
    pub(super) fn serve(&mut self, operand: FragId, result: FragId, dims: &[usize]) -> Served {
        let key = (operand, result, dims.to_vec());
        if let Some(found) = self.served.get(&key) {
            return found.clone();
        }
        let (f, r) = (self.held(operand), self.held(result));
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

    /// The thread part of a coordinate: computed once, before the body.
    pub(super) fn thread_coord(&mut self, f: FragId, dim: usize) -> Val {
        let h = self.held(f);
        let (digits, hi) = (h.threads[dim].clone(), h.thread_max(dim));
        if digits.is_empty() {
            return Val::int(0);
        }
        if let Some((_, name)) = self.thread_coords.iter().find(|(d, _)| *d == digits) {
            return Val::ranged(name.clone(), 0, hi);
        }
        let threads = self.unit_threads;
        let term = |g: &ThreadDigit| {
            let mut s = "thread".to_string();
            if g.place > 1 {
                s = format!("({s} / {})", g.place);
            }
            if g.place * g.extent < threads {
                s = format!("({s} % {})", g.extent);
            }
            if g.stride > 1 { format!("{s} * {}", g.stride) } else { s }
        };
        let sum: Vec<String> = digits.iter().map(term).collect();
        let name = format!("t_{}", self.thread_coords.len());
        self.head.push_str(&format!("    let {name} = {};\n", sum.join(" + ")));
        self.thread_coords.push((digits, name.clone()));
        Val::ranged(name, 0, hi)
    }

    /// Holds in one of the threads that have copies of the same elements; none if there are no copies.
    pub(super) fn first_replica(&mut self, f: FragId) -> Option<String> {
        let h = self.held(f);
        let mut all: Vec<String> =
            h.replicas.iter().map(|g| format!("(thread / {}) % {} == 0", g.place, g.extent)).collect();
        if h.thread_count < self.unit_threads {
            all.push(format!("thread < {}", h.thread_count));
        }
        (!all.is_empty()).then(|| format!("({})", all.join(" && ")))
    }
}
