//! Reductions of fragments: in a thread's variables, then between threads.
//!
//! Threads of one subgroup exchange by shuffles where the target promises them; all others write what they have to
//! workgroup memory, meet, and read what the others have. Two copies by turns need one meeting per exchange: who writes
//! a copy again has met everybody since the last read of it. Sums of one result run in four chains, of more in
//! fewer each. Invariant: every thread that
//! holds an element of the result holds its whole value afterwards, but for sums that are completed later, as in
//! [`crate::backend::ptx`].

use einfall_ir::dtype::DType;
use einfall_ir::kernel::FragId;
use einfall_ir::ops::{BinaryOp, ReduceOp};

use super::Res;
use super::access::Addresses;
use super::emit::Emit;
use super::expr::Memo;
use super::frag::class;
use super::value::{Ty, Val};
use crate::backend::gpu::held::ThreadDigit;
use crate::backend::gpu::memo::Element;
use crate::backend::gpu::reduction::{CHAINS, Reduction, joined};

/// Values that one exchange between threads reads at most; more go in two.
const PEERS: u64 = 16;

/// The value of an empty reduction of elements of `dtype`.
pub(super) fn identity(op: ReduceOp, dtype: DType) -> Val {
    match (class(dtype), op) {
        (_, ReduceOp::Any | ReduceOp::All) => Val::int(op.identity() as i64),
        (Ty::Float, _) => Val::float(op.identity()),
        (Ty::Int | Ty::Bool, ReduceOp::Min) => Val::int(dtype.max_finite() as i64),
        (Ty::Int | Ty::Bool, ReduceOp::Max) => Val::int(dtype.min_finite() as i64),
        (Ty::Int | Ty::Bool, _) => Val::int(op.identity() as i64),
    }
}

impl Emit<'_> {
    pub(super) fn reduce(&mut self, r: &Reduction) -> Res<()> {
        let Reduction { op, src, over, bounds, carry, .. } = *r;
        if op.selects_argument() {
            return self.select_argument(r);
        }
        let out = r.out[0];
        let kept = r.kept(self.held(src).dims.len());
        let groups = self.frags.groups(out, src, &kept).map_err(|what| self.fail(&what))?;
        let digits = self.reduced(src, over);
        let dtype = self.held(src).dtype;
        let identity = identity(op, dtype);
        let ty = identity.ty;
        let partial = carry && op == ReduceOp::Sum && self.partial.contains_key(&out);
        let alone = digits.is_empty() || partial;
        // Several results are chains already.
        let most = CHAINS.div_ceil(groups.len().max(1));
        let mut a = Addresses::default();
        let mut results = Vec::new();
        for (v, members) in groups.iter().enumerate() {
            let mut chains: Vec<Val> = Vec::new();
            if carry && (r.idempotent() || alone) {
                chains.push(self.to(&self.element(out, v), ty));
            }
            for (n, &m) in members.iter().enumerate() {
                let x = self.summand(src, m)?;
                let p = self.present(src, m, bounds, &mut a)?;
                let x = self.to(&self.select(&p, &x, &identity), ty);
                if chains.len() < most.min(members.len()) {
                    chains.push(x);
                } else {
                    let n = n % chains.len();
                    let joined = self.combine(op, &chains[n], &x)?;
                    chains[n] = self.named(&joined);
                }
            }
            let joined = joined(chains, |a, b| {
                let x = self.combine(op, a, b)?;
                Ok(self.named(&x))
            })?;
            let x = joined.unwrap_or_else(|| identity.clone());
            results.push(self.to(&x, ty));
        }
        if !alone {
            let combine = |e: &mut Self, a: &[Val], b: &[Val]| Ok(vec![e.combine(op, &a[0], &b[0])?]);
            let rows = results.into_iter().map(|x| vec![x]).collect();
            results = self.across(rows, &digits, combine)?.into_iter().flatten().collect();
            if carry && !r.idempotent() {
                for (v, x) in results.iter_mut().enumerate() {
                    *x = self.combine(op, &self.to(&self.element(out, v), ty), x)?;
                }
            }
        }
        // A group's values may name variables that are written here.
        let results: Vec<Val> = results.iter().map(|x| self.named(x)).collect();
        for (v, x) in results.iter().enumerate() {
            self.set(out, v, x)?;
        }
        Ok(())
    }

    /// Element `m` of what is reduced: its variable, or its value where it is computed here.
    fn summand(&mut self, src: FragId, m: usize) -> Res<Val> {
        let Some((_, value)) = self.passing.clone().filter(|(f, _)| *f == src) else { return Ok(self.element(src, m)) };
        let el = Element { of: src, v: m, at: self.held(src).consts[m].clone() };
        let x = self.value(&value, Some(&el), &mut Memo::default())?;
        let dtype = self.held(src).dtype;
        let x = self.rounded(&x, dtype)?;
        Ok(self.to(&x, class(dtype)))
    }

    /// Joins the lanes of a sum whose lanes held parts.
    pub(super) fn complete(&mut self, f: FragId) -> Res<()> {
        let Some((src, over)) = self.partial.get(&f).cloned() else { return Ok(()) };
        let digits = self.reduced(src, &over);
        let rows = (0..self.held(f).count()).map(|v| vec![self.element(f, v)]).collect();
        let all = self.across(rows, &digits, |e, a, b| Ok(vec![e.combine(ReduceOp::Sum, &a[0], &b[0])?]))?;
        for (v, x) in all.iter().enumerate() {
            self.set(f, v, &x[0])?;
        }
        Ok(())
    }

    /// The digits of the thread number along reduced dimensions.
    pub(super) fn reduced(&self, src: FragId, over: &[usize]) -> Vec<ThreadDigit> {
        over.iter().flat_map(|d| self.held(src).threads[*d].clone()).collect()
    }

    /// Joins rows of values over all threads that differ in the digits only, lower numbers first.
    fn across(
        &mut self,
        mut rows: Vec<Vec<Val>>,
        digits: &[ThreadDigit],
        mut combine: impl FnMut(&mut Self, &[Val], &[Val]) -> Res<Vec<Val>>,
    ) -> Res<Vec<Vec<Val>>> {
        let mut rest = Vec::new();
        for g in digits {
            let (end, mut place) = (g.place * g.extent, g.place);
            // Neighbours that one subgroup holds, whatever its size.
            while g.extent.is_power_of_two() && g.place.is_power_of_two() && 2 * place <= end.min(self.target.subgroup)
            {
                self.subgroups = true;
                rows = self.kept_rows(rows);
                let mut joined = Vec::new();
                for row in &rows {
                    let shuffle = |x: &Val| Val::new(x.ty, format!("subgroupShuffleXor({}, {place}u)", x.s));
                    let others: Vec<Val> = row.iter().map(shuffle).collect();
                    joined.push(others);
                }
                rows = self.joined_rows(rows, joined, &mut combine)?;
                place *= 2;
            }
            if place < end {
                rest.push(ThreadDigit { place, extent: end / place, stride: g.stride });
            }
        }
        // More than a few peers go in two exchanges.
        let mut stages: Vec<Vec<ThreadDigit>> = vec![Vec::new()];
        let mut peers = 1;
        for mut g in rest {
            while g.extent > PEERS && g.extent.is_multiple_of(8) {
                stages.insert(0, vec![ThreadDigit { extent: 8, ..g }]);
                g = ThreadDigit { place: g.place * 8, extent: g.extent / 8, ..g };
            }
            if peers * g.extent > PEERS {
                stages.push(Vec::new());
                peers = 1;
            }
            peers *= g.extent;
            if let Some(last) = stages.last_mut() {
                last.push(g);
            }
        }
        for stage in stages.iter().filter(|s| !s.is_empty()) {
            rows = self.exchange(rows, stage, &mut combine)?;
        }
        Ok(rows)
    }

    /// Values in variables that outlive guarded runs.
    fn kept_rows(&mut self, rows: Vec<Vec<Val>>) -> Vec<Vec<Val>> {
        let keep = |e: &mut Self, x: Val| {
            let name = e.kept(x.ty);
            e.line(&format!("{name} = {};", x.s));
            Val::new(x.ty, name)
        };
        rows.into_iter().map(|row| row.into_iter().map(|x| keep(self, x)).collect()).collect()
    }

    /// Each row joined with another, in variables of its own; shuffles stand outside guards.
    fn joined_rows(
        &mut self,
        rows: Vec<Vec<Val>>,
        others: Vec<Vec<Val>>,
        combine: &mut impl FnMut(&mut Self, &[Val], &[Val]) -> Res<Vec<Val>>,
    ) -> Res<Vec<Vec<Val>>> {
        // All shuffles first: names of what is joined end with the guarded run.
        let mut outside = |x: Val| {
            let name = self.kept(x.ty);
            self.outside(&format!("{name} = {};", x.s));
            Val::new(x.ty, name)
        };
        let shuffled: Vec<Vec<Val>> = others.into_iter().map(|r| r.into_iter().map(&mut outside).collect()).collect();
        let mut out = Vec::new();
        for (row, other) in rows.iter().zip(&shuffled) {
            let joined = combine(self, row, other)?;
            out.push(joined.iter().zip(row).map(|(x, y)| self.to(x, y.ty)).collect::<Vec<_>>());
        }
        Ok(self.kept_rows(out))
    }

    /// One exchange through workgroup memory.
    fn exchange(
        &mut self,
        rows: Vec<Vec<Val>>,
        digits: &[ThreadDigit],
        combine: &mut impl FnMut(&mut Self, &[Val], &[Val]) -> Res<Vec<Val>>,
    ) -> Res<Vec<Vec<Val>>> {
        let rows = self.kept_rows(rows);
        let width = rows.first().map_or(1, Vec::len).max(1);
        let slots = (self.exchange_slots() as usize).max(width);
        self.exchanged = self.exchanged.max(slots.min(rows.len() * width) as u64);
        let mut out = Vec::new();
        for chunk in rows.chunks(slots / width) {
            let copy = self.next_copy();
            let values: Vec<Val> = chunk.iter().flatten().cloned().collect();
            for (i, x) in values.iter().enumerate() {
                let at = self.slot(copy, i, "local");
                let bits = if x.ty == Ty::Float { format!("bitcast<u32>({})", x.s) } else { format!("u32({})", x.s) };
                self.line(&format!("{at} = {bits};"));
            }
            self.barrier();
            self.turn = Some(1 - copy);
            let first = self.first_peer(digits);
            let mut i = 0;
            for row in chunk {
                let mut all: Option<Vec<Val>> = None;
                for offset in offsets(digits) {
                    let peer = if offset == 0 { first.clone() } else { format!("{first} + {offset}") };
                    let read = |(j, x): (usize, &Val)| {
                        let name = self.slot(copy, i + j, &peer);
                        let ty = x.ty.name();
                        Val::new(
                            x.ty,
                            if x.ty == Ty::Float { format!("bitcast<f32>({name})") } else { format!("{ty}({name})") },
                        )
                    };
                    let values: Vec<Val> = row.iter().enumerate().map(read).collect();
                    let values: Vec<Val> = values.iter().map(|v| self.named(v)).collect();
                    all = Some(match all {
                        None => values,
                        Some(before) => {
                            let joined = combine(self, &before, &values)?;
                            joined.iter().zip(row).map(|(x, y)| self.named(&self.to(x, y.ty))).collect()
                        }
                    });
                }
                i += row.len();
                out.push(all.unwrap_or_else(|| row.clone()));
            }
            // What follows may be another chunk's exchange.
            let last = out.len() - chunk.len();
            let tail = out.split_off(last);
            out.extend(self.kept_rows(tail));
        }
        Ok(out)
    }

    /// The copy of the exchange to write now; everybody has read it.
    pub(super) fn next_copy(&mut self) -> usize {
        match self.turn {
            Some(copy) => copy,
            None => {
                self.barrier();
                0
            }
        }
    }

    /// A value of an invocation in the exchange.
    pub(super) fn slot(&self, copy: usize, i: usize, invocation: &str) -> String {
        let threads = self.threads();
        let first = (copy * self.exchange_slots() as usize + i) as u64 * threads;
        if first == 0 { format!("exchange[{invocation}]") } else { format!("exchange[{invocation} + {first}]") }
    }

    /// The invocation that has 0 in the digits, and this one's others.
    pub(super) fn first_peer(&mut self, digits: &[ThreadDigit]) -> String {
        let term = |g: &ThreadDigit| format!("thread / {} % {} * {}", g.place, g.extent, g.place);
        let terms: Vec<String> = digits.iter().map(term).collect();
        let text = format!("local - ({})", terms.join(" + "));
        let name = format!(
            "peer_{}",
            digits.iter().map(|g| format!("{}x{}", g.place, g.extent)).collect::<Vec<_>>().join("_")
        );
        let line = format!("    let {name} = {text};\n");
        if !self.head.contains(&line) {
            self.head.push_str(&line);
        }
        name
    }

    /// Two partial values joined, the one of earlier elements first.
    pub(super) fn combine(&self, op: ReduceOp, a: &Val, b: &Val) -> Res<Val> {
        let join = match op {
            ReduceOp::Sum => BinaryOp::Add,
            ReduceOp::Product => BinaryOp::Mul,
            ReduceOp::Min | ReduceOp::ArgMin => BinaryOp::Min,
            ReduceOp::Max | ReduceOp::ArgMax => BinaryOp::Max,
            ReduceOp::Any | ReduceOp::All => {
                let op = if op == ReduceOp::Any { BinaryOp::Or } else { BinaryOp::And };
                return Ok(self.to(&self.bin(op, a, b)?, Ty::Int));
            }
            ReduceOp::LogSumExp => return Ok(Val::new(Ty::Float, format!("log_sum_exp({}, {})", a.s, b.s))),
        };
        self.bin(join, a, b)
    }

    /// (value, position) of the best element: NaN first, ties to the lowest position.
    fn select_argument(&mut self, r: &Reduction) -> Res<()> {
        let Reduction { op, src, over, base, bounds, carry, .. } = *r;
        let [value, position] = r.out else { return Err(self.fail("an argument selection without two results")) };
        let dims = self.held(src).dims.clone();
        let kept = r.kept(dims.len());
        let groups = self.frags.groups(*value, src, &kept).map_err(|what| self.fail(&what))?;
        let also = self.frags.groups(*position, src, &kept).map_err(|what| self.fail(&what))?;
        if groups != also || class(self.held(src).dtype) != Ty::Float {
            return Err(self.fail("an argument selection whose results are held differently, or of integers"));
        }
        let base = match base {
            Some(b) => self.int(b)?,
            None => Val::int(0),
        };
        let mut a = Addresses::default();
        let mut rows = Vec::new();
        let better = if op == ReduceOp::ArgMin { "lower" } else { "higher" };
        for (v, members) in groups.iter().enumerate() {
            let start = Val::float(if op == ReduceOp::ArgMax { f64::NEG_INFINITY } else { f64::INFINITY });
            let mut best = match carry {
                true => vec![self.element(*value, v), self.to(&self.element(*position, v), Ty::Int)],
                false => vec![start, Val::int(-1)],
            };
            for &m in members {
                let y = self.element(src, m);
                let c = self.held(src).consts[m].clone();
                let (mut q, mut stride) = (base.clone(), 1);
                for &d in over.iter().rev() {
                    let t = self.thread_coord(src, d);
                    let e = self.bin(BinaryOp::Add, &t, &Val::int(c[d]))?;
                    let e = self.bin(BinaryOp::Mul, &e, &Val::int(stride))?;
                    q = self.bin(BinaryOp::Add, &q, &e)?;
                    stride *= dims[d];
                }
                let p = self.present(src, m, bounds, &mut a)?;
                let q = self.named(&self.select(&p, &q, &Val::int(-1)));
                best = self.better(better, &best, &[y, q])?;
            }
            rows.push(best);
        }
        let digits = self.reduced(src, over);
        if !digits.is_empty() {
            rows = self.across(rows, &digits, |e, a, b| e.better(better, a, b))?;
        }
        let rows: Vec<Vec<Val>> = rows.iter().map(|r| r.iter().map(|x| self.named(x)).collect()).collect();
        for (v, row) in rows.iter().enumerate() {
            self.set(*value, v, &row[0])?;
            self.set(*position, v, &row[1])?;
        }
        Ok(())
    }

    /// The better of two candidates; a negative position is none.
    fn better(&mut self, which: &str, a: &[Val], b: &[Val]) -> Res<Vec<Val>> {
        let [a, b] = [a, b].map(|r| r.iter().map(|x| x.s.clone()).collect::<Vec<_>>());
        let take = self.fresh("x");
        self.line(&format!("let {take} = is_{which}({}, {}, {}, {});", a[0], a[1], b[0], b[1]));
        let x = Val::new(Ty::Float, format!("select({}, {}, {take})", a[0], b[0]));
        let at = Val::new(Ty::Int, format!("select({}, {}, {take})", a[1], b[1]));
        Ok(vec![self.named(&x), self.named(&at)])
    }
}

/// Distances from the first to every thread that differs in the digits.
pub(super) fn offsets(digits: &[ThreadDigit]) -> Vec<u64> {
    let mut all = vec![0];
    for g in digits {
        all = (0..g.extent).flat_map(|i| all.iter().map(move |o| o + i * g.place)).collect();
    }
    all.sort_unstable();
    all
}
