//! I/O lower bounds per memory level.
//!
//! For one Einsum over |D| points and arrays A with the indices t ∈ A: any weights s_A with Σ_{A∋t} s_A ≥ 1 for every
//! index give |set of points| ≤ Π |A|^{s_A} (discrete Brascamp–Lieb; Christ, Demmel, Knight, Scanlon & Yelick 2013),
//! so a phase that touches X elements computes at most ψ(X) = Π (s_A·X/σ)^{s_A} points, σ = Σ s_A, and
//! Q ≥ |D|·(X−S)/ψ(X) for every X (Hong & Kung 1981; COSMA 2019; IOOpt 2021). The best X is σS/(σ−1). For a matrix
//! product this is 2MNK/√S. Compulsory traffic (inputs once, outputs once) bounds every schedule as well. Attention's
//! Θ bounds (Saha & Ye 2024) have no proved constant here and are marked 'reference'.
//!
//! Capacities and traffic are counted in elements of the smallest type involved, so the bytes are a lower bound too.
//! A level with several instances is bounded by the capacity of one: its points are split among them.

use std::collections::{BTreeMap, BTreeSet};

use super::derive::Derivation;
use super::inline::indices_of;
use super::passes::direct_indices;
use crate::arena::Id;
use crate::cascade::{Cascade, Einsum, Expr, ExprId, IndexId, OutputSource, TensorId, TensorKind};
use crate::ops::{BinaryOp, UnaryOp};
use crate::target::DataSheet;

/// A lower bound of the bytes that enter (or leave) one memory level.
#[derive(Clone, Debug, PartialEq)]
pub struct Bound {
    /// The level.
    pub level: String,
    /// The cascade's name, or the tensor whose Einsum it is for.
    pub scope: String,
    /// Bytes.
    pub bytes: f64,
    /// Proof, or `reference: ..`.
    pub source: String,
}

const PEBBLE: &str = "Hong & Kung 1981 with Brascamp-Lieb exponents (Christ et al. 2013)";

/// Bounds of every level below the first, for the cascade whole, for each of its contractions and for the streams of
/// its derivations.
pub fn bounds(c: &Cascade, derived: &[Derivation], extents: &[u64], target: &DataSheet) -> Vec<Bound> {
    let mut out = Vec::new();
    let spaces: Vec<(&Einsum, Option<Space>)> = c.einsums().map(|e| (e, Space::of(c, e, extents))).collect();
    for level in target.levels.iter().skip(1) {
        let mut whole = (compulsory_bytes(c, extents), "compulsory traffic: inputs once, outputs once".to_string());
        for (e, x) in &spaces {
            let Some(x) = x else { continue };
            let name = c.tensors[e.targets[0].tensor].name.clone();
            let (alone, once) = (x.bound(level.bytes, &x.arrays), x.once_bytes());
            if x.contracts {
                let (bytes, source) =
                    if alone > once { (alone, PEBBLE) } else { (once, "compulsory traffic: each operand once") };
                out.push(Bound { level: level.name.clone(), scope: name, bytes, source: source.into() });
            }
            // Fused with its neighbours, an Einsum still reads what comes from outside and writes what is returned.
            let outside: Vec<Array> = x.arrays.iter().filter(|a| a.external).cloned().collect();
            let bytes = x.bound(level.bytes, &outside);
            if bytes > whole.0 {
                whole = (bytes, format!("{PEBBLE}, over arrays of the signature"));
            }
        }
        out.push(Bound { level: level.name.clone(), scope: c.name.clone(), bytes: whole.0, source: whole.1 });
        out.extend(stream_reference(c, derived, extents, level.bytes).map(|(scope, bytes, source)| Bound {
            level: level.name.clone(),
            scope,
            bytes,
            source,
        }));
    }
    out
}

/// Bytes of every input that is read in full and of every output, once.
pub fn compulsory_bytes(c: &Cascade, extents: &[u64]) -> f64 {
    // Elements that some read alone covers: no more of a dimension than its indices reach.
    let mut read: BTreeMap<TensorId, f64> = BTreeMap::new();
    for e in c.einsums() {
        // A filter that reads data may leave nothing; a gather need not touch every element.
        let by_data = e.filter.is_some_and(|f| {
            let mut found = false;
            c.walk(f, &mut |_, x| found |= matches!(x, Expr::Read { .. }));
            found
        });
        for root in e.roots() {
            c.walk(root, &mut |_, x| {
                if let Expr::Read { tensor, at } = x {
                    let mut gathered = by_data && Some(root) != e.filter;
                    for a in at {
                        c.walk(*a, &mut |_, y| gathered |= matches!(y, Expr::Read { .. } | Expr::Segment { .. }));
                        gathered |= direct_indices(c, *a).is_empty();
                    }
                    if gathered {
                        return;
                    }
                    let size = |n: &crate::cascade::Size| n.eval(extents).map_or(0.0, |n| n as f64);
                    let reach = |a: &ExprId| -> f64 {
                        direct_indices(c, *a).iter().map(|i| size(&c.indices[*i].extent)).product()
                    };
                    let dims = &c.tensors[*tensor].dims;
                    let elems: f64 = at.iter().zip(dims).map(|(a, d)| reach(a).min(size(d))).product();
                    let have = read.entry(*tensor).or_insert(0.0);
                    *have = have.max(elems);
                }
            });
        }
    }
    let bytes = |dims: &[crate::cascade::Size], dtype: crate::dtype::DType| {
        let n: Option<f64> = dims.iter().map(|d| d.eval(extents).ok().map(|n| n as f64)).product();
        n.unwrap_or(0.0) * f64::from(dtype.bits()) / 8.0
    };
    let inputs: f64 = c
        .params
        .iter()
        .filter(|t| c.tensors[**t].kind == TensorKind::Input)
        .filter_map(|t| Some(read.get(t)? * f64::from(c.tensors[*t].dtype.bits()) / 8.0))
        .sum();
    let outputs: f64 = c.outputs.iter().map(|o| bytes(&o.dims, o.dtype)).sum();
    inputs + outputs
}

/// One array of an Einsum: which of its indices it has.
#[derive(Clone, Debug)]
struct Array {
    has: Vec<bool>,
    elems: f64,
    bits: u32,
    external: bool,
}

/// An Einsum's iteration space.
struct Space {
    points: f64,
    arrays: Vec<Array>,
    contracts: bool,
}

impl Space {
    fn of(c: &Cascade, e: &Einsum, extents: &[u64]) -> Option<Space> {
        let mut all: BTreeSet<IndexId> = e.free.iter().copied().collect();
        for r in e.roots() {
            all.extend(indices_of(c, r));
        }
        let indices: Vec<IndexId> = all.into_iter().collect();
        let sizes: Vec<f64> =
            indices.iter().map(|i| c.indices[*i].extent.eval(extents).ok().map(|n| n as f64)).collect::<Option<_>>()?;
        let reduces = matches_reduction(c, e.value);
        // Several reductions in one statement have spaces of their own: only one is bounded.
        if reduces > 1 {
            return None;
        }
        let mut points: f64 = sizes.iter().product();
        if let Some(f) = e.filter {
            points *= kept_fraction(c, f, extents)?;
        }
        let mut arrays: Vec<Array> = Vec::new();
        let mut seen = BTreeSet::new();
        let outputs: BTreeSet<TensorId> = c
            .outputs
            .iter()
            .filter_map(|o| match o.source {
                OutputSource::Whole(t) => Some(t),
                OutputSource::Points { .. } | OutputSource::Point { .. } => None,
            })
            .collect();
        let mut add = |t: TensorId, at: &[ExprId], external: bool| {
            let mut has = vec![false; indices.len()];
            for a in at {
                for v in direct_indices(c, *a) {
                    if let Some(k) = indices.iter().position(|i| *i == v) {
                        has[k] = true;
                    }
                }
                let mut gathered = false;
                c.walk(*a, &mut |_, y| gathered |= matches!(y, Expr::Read { .. } | Expr::Segment { .. }));
                if gathered {
                    return;
                }
            }
            // One access of a tensor counts; a second one may hit the same elements.
            if has.iter().any(|h| *h) && seen.insert(t) {
                let elems = has.iter().zip(&sizes).filter(|(h, _)| **h).map(|(_, n)| n).product();
                arrays.push(Array { has, elems, bits: c.tensors[t].dtype.bits(), external });
            }
        };
        c.walk(e.value, &mut |_, x| {
            if let Expr::Read { tensor, at } = x {
                add(*tensor, at, matches!(c.tensors[*tensor].kind, TensorKind::Input | TensorKind::InOut));
            }
        });
        for t in &e.targets {
            add(t.tensor, &t.at, outputs.contains(&t.tensor));
        }
        let contracts = reduces == 1 && arrays.len() >= 3;
        Some(Space { points, arrays, contracts })
    }

    fn once_bytes(&self) -> f64 {
        self.arrays.iter().map(|a| a.elems * f64::from(a.bits) / 8.0).sum()
    }

    /// The best bound over the weights of a grid, in bytes, for a memory of `capacity` bytes.
    fn bound(&self, capacity: u64, arrays: &[Array]) -> f64 {
        let Some(bits) = arrays.iter().map(|a| a.bits).min() else { return 0.0 };
        let s = capacity as f64 * 8.0 / f64::from(bits);
        let n = arrays.len();
        if n > 6 || s < 1.0 {
            return 0.0;
        }
        const WEIGHTS: [f64; 5] = [0.0, 1.0 / 3.0, 0.5, 2.0 / 3.0, 1.0];
        let mut best = 0.0f64;
        for code in 0..WEIGHTS.len().pow(n as u32) {
            let w: Vec<f64> = (0..n).map(|k| WEIGHTS[code / WEIGHTS.len().pow(k as u32) % WEIGHTS.len()]).collect();
            let covers = (0..arrays[0].has.len()).all(|t| {
                let sum: f64 = arrays.iter().zip(&w).filter(|(a, _)| a.has[t]).map(|(_, w)| w).sum();
                sum >= 1.0 - 1e-12
            });
            let sigma: f64 = w.iter().sum();
            if !covers || sigma <= 1.0 + 1e-9 {
                continue;
            }
            let x = sigma * s / (sigma - 1.0);
            let psi: f64 = w.iter().filter(|w| **w > 0.0).map(|w| (w * x / sigma).powf(*w)).product();
            // The last phase may be short: |D|/ψ phases less one.
            let q = (self.points / psi - 1.0).max(0.0) * (x - s);
            best = best.max(q);
        }
        best * f64::from(bits) / 8.0
    }
}

fn matches_reduction(c: &Cascade, e: ExprId) -> usize {
    let mut n = 0;
    c.walk(e, &mut |_, x| n += usize::from(matches!(x, Expr::Reduce { .. })));
    n
}

/// Boxes of points that a filter is looked at for.
const BOXES: usize = 1 << 14;

/// The share of points that a filter over indices certainly keeps, by halving boxes until it is decided on them or
/// [`BOXES`] were looked at (what is then undecided is left out: bounds stay bounds); none if it reads data.
fn kept_fraction(c: &Cascade, filter: ExprId, extents: &[u64]) -> Option<f64> {
    let vars: Vec<IndexId> = indices_of(c, filter).into_iter().collect();
    let sizes: Vec<u64> = vars.iter().map(|i| c.indices[*i].extent.eval(extents).ok()).collect::<Option<_>>()?;
    let total: f64 = sizes.iter().map(|n| *n as f64).product();
    if total == 0.0 {
        return Some(0.0);
    }
    // Largest boxes first.
    let mut open: BTreeMap<u128, Vec<Vec<(i64, i64)>>> = BTreeMap::new();
    let points = |b: &[(i64, i64)]| b.iter().map(|(l, h)| (h - l + 1) as u128).product::<u128>();
    let whole: Vec<(i64, i64)> = sizes.iter().map(|n| Some((0, i64::try_from(n - 1).ok()?))).collect::<Option<_>>()?;
    open.insert(points(&whole), vec![whole]);
    let mut kept = 0.0;
    for _ in 0..BOXES {
        let Some(mut entry) = open.last_entry() else { break };
        let b = entry.get_mut().pop()?;
        if entry.get().is_empty() {
            entry.remove();
        }
        let value = |i: IndexId| vars.iter().position(|v| *v == i).map(|k| b[k]);
        match truth(c, filter, extents, &value)? {
            (1.., _) => kept += points(&b) as f64,
            (_, 0) => {}
            _ => {
                let (k, (l, h)) = b.iter().copied().enumerate().max_by_key(|(_, (l, h))| h - l)?;
                if l == h {
                    return None;
                }
                for half in [(l, l + (h - l) / 2), (l + (h - l) / 2 + 1, h)] {
                    let mut part = b.clone();
                    part[k] = half;
                    open.entry(points(&part)).or_default().push(part);
                }
            }
        }
    }
    Some(kept / total)
}

/// Bounds of an integer expression or predicate (0 or 1) over a box of indices; none if it reads data.
fn truth(
    c: &Cascade,
    e: ExprId,
    extents: &[u64],
    value: &impl Fn(IndexId) -> Option<(i64, i64)>,
) -> Option<(i64, i64)> {
    let of = |e: ExprId| truth(c, e, extents, value);
    let point = |n: i64| Some((n, n));
    match &c.exprs[e] {
        Expr::Int(n) => point(*n),
        Expr::Size(n) => n.eval(extents).ok().and_then(|n| i64::try_from(n).ok()).and_then(point),
        Expr::Index(i) => value(*i),
        Expr::Unary(UnaryOp::Neg, a) => of(*a).map(|(l, h)| (-h, -l)),
        Expr::Unary(UnaryOp::Not, a) => of(*a).map(|(l, h)| (i64::from(h == 0), i64::from(l == 0))),
        Expr::Unary(UnaryOp::Abs, a) => of(*a).map(|(l, h)| (l.max(-h).max(0), h.max(-l))),
        Expr::Binary(op, a, b) => {
            let ((al, ah), (bl, bh)) = (of(*a)?, of(*b)?);
            let holds = |always: bool, sometimes: bool| Some((i64::from(always), i64::from(sometimes)));
            match op {
                BinaryOp::Add => Some((al.checked_add(bl)?, ah.checked_add(bh)?)),
                BinaryOp::Sub => Some((al.checked_sub(bh)?, ah.checked_sub(bl)?)),
                BinaryOp::Mul => {
                    let all = [al.checked_mul(bl)?, al.checked_mul(bh)?, ah.checked_mul(bl)?, ah.checked_mul(bh)?];
                    Some((*all.iter().min()?, *all.iter().max()?))
                }
                BinaryOp::Div if bl == bh && bl > 0 => Some((al.div_euclid(bl), ah.div_euclid(bl))),
                BinaryOp::Mod if bl == bh && bl > 0 && al.div_euclid(bl) == ah.div_euclid(bl) => {
                    Some((al.rem_euclid(bl), ah.rem_euclid(bl)))
                }
                BinaryOp::Mod if bl == bh && bl > 0 => Some((0, bl - 1)),
                BinaryOp::Min => Some((al.min(bl), ah.min(bh))),
                BinaryOp::Max => Some((al.max(bl), ah.max(bh))),
                BinaryOp::Lt => holds(ah < bl, al < bh),
                BinaryOp::Le => holds(ah <= bl, al <= bh),
                BinaryOp::Gt => holds(al > bh, ah > bl),
                BinaryOp::Ge => holds(al >= bh, ah >= bl),
                BinaryOp::Eq => holds(al == ah && bl == bh && al == bl, al <= bh && bl <= ah),
                BinaryOp::Ne => holds(ah < bl || al > bh, !(al == ah && bl == bh && al == bl)),
                BinaryOp::And => holds(al > 0 && bl > 0, ah > 0 && bh > 0),
                BinaryOp::Or => holds(al > 0 || bl > 0, ah > 0 || bh > 0),
                BinaryOp::Div | BinaryOp::Mod | BinaryOp::Pow => None,
            }
        }
        Expr::Select(k, a, b) => match of(*k)? {
            (1.., _) => of(*a),
            (_, 0) => of(*b),
            _ => {
                let ((al, ah), (bl, bh)) = (of(*a)?, of(*b)?);
                Some((al.min(bl), ah.max(bh)))
            }
        },
        Expr::Unary(..)
        | Expr::Float(_)
        | Expr::Read { .. }
        | Expr::Cast(..)
        | Expr::Tuple(_)
        | Expr::Reduce { .. }
        | Expr::Scan { .. }
        | Expr::Segment { .. }
        | Expr::Rand { .. } => None,
    }
}

/// For a derived stream whose anchor is a contraction of two inputs and which sums that against a third: the shape
/// of attention, with the Θ bounds of Saha & Ye (2024) at constant 1.
fn stream_reference(
    c: &Cascade,
    derived: &[Derivation],
    extents: &[u64],
    capacity: u64,
) -> Option<(String, f64, String)> {
    for d in derived.iter().filter(|d| d.stream.is_some()) {
        let n = *extents.get(d.rank.index())? as f64;
        let x = &d.cascade;
        let anchor = d.anchors.first()?;
        let rows: f64 = anchor
            .dims
            .iter()
            .map(|i| x.indices[*i].extent.eval(extents).ok().map(|n| n as f64))
            .product::<Option<f64>>()?;
        // The contracted rank of the score and the ranks the sums have besides the anchor's.
        let scores: Vec<TensorId> = {
            let mut read = Vec::new();
            x.walk(anchor.contribution, &mut |_, e| {
                if let Expr::Read { tensor, .. } = e {
                    read.push(*tensor);
                }
            });
            read
        };
        let score = x.einsums().find(|e| scores.contains(&e.targets[0].tensor));
        let inner: f64 = score
            .and_then(|e| {
                let mut over = Vec::new();
                x.walk(e.value, &mut |_, y| {
                    if let Expr::Reduce { over: o, .. } = y {
                        over.extend(o.iter().copied());
                    }
                });
                (!over.is_empty()).then_some(over)
            })
            .and_then(|o| o.iter().map(|i| x.indices[*i].extent.eval(extents).ok().map(|n| n as f64)).product())
            .unwrap_or(0.0);
        let outer = d
            .accumulators
            .iter()
            .filter(|a| a.dims.len() > anchor.dims.len())
            .filter_map(|a| {
                let all: Option<f64> =
                    a.dims.iter().map(|i| x.indices[*i].extent.eval(extents).ok().map(|n| n as f64)).product();
                all.map(|n| n / rows.max(1.0))
            })
            .fold(0.0, f64::max);
        if inner == 0.0 || outer == 0.0 {
            continue;
        }
        let elem = c.params.iter().map(|t| c.tensors[*t].dtype.bits()).min()? as f64 / 8.0;
        let s = capacity as f64 / elem;
        let (elems, form) = if s >= inner * outer {
            (rows * n * inner * outer / s, "Θ(M·N·E·F/S), S ≥ E·F")
        } else {
            (rows * n * inner.max(outer) / s.sqrt(), "Θ(M·N·max(E,F)/√S), S < E·F: fusion does not pay here")
        };
        let scope = d.finals.iter().map(|t| x.tensors[*t].name.clone()).collect::<Vec<_>>().join(", ");
        let source = format!("reference: {form} (Saha & Ye 2024), constant 1, no proof of the constant");
        return Some((format!("stream of {scope}"), elems * elem, source));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, one};
    use super::*;
    use crate::target::MemoryLevel;

    fn sheet(bytes: u64) -> DataSheet {
        let l = |name: &str, bytes| MemoryLevel { name: name.into(), bytes, instances: 1, bandwidth: 1.0 };
        DataSheet {
            name: "test".into(),
            atoms: Vec::new(),
            followed_pages: None,
            levels: vec![l("dram", 1 << 60), l("fast", bytes)],
            peak: Vec::new(),
            gpu: None,
            webgpu: None,
        }
    }

    const MATMUL: &str = "cascade matmul[M, N, K](A: f32[M,K], B: f32[K,N]) -> (C: f32[M,N]) {
        C[m,n] = sum(k) A[m,k] * B[k,n]
    }";

    #[test]
    fn matmul_is_two_mnk_over_root_s() {
        let c = one(MATMUL);
        let (n, s) = (4096u64, 8192u64);
        let b = bounds(&c, &[], &[n, n, n], &sheet(4 * s));
        let want = 4.0 * 2.0 * (n as f64).powi(3) / (s as f64).sqrt();
        let have = b.iter().find(|b| b.scope == "C").unwrap();
        assert!((have.bytes / want - 1.0).abs() < 1e-3, "{} against {want}", have.bytes);
        let whole = b.iter().find(|b| b.scope == "matmul").unwrap();
        assert!((whole.bytes / want - 1.0).abs() < 1e-3);
    }

    #[test]
    fn large_memories_leave_compulsory_traffic() {
        let c = one(MATMUL);
        let b = bounds(&c, &[], &[64, 32, 16], &sheet(1 << 30));
        let whole = b.iter().find(|b| b.scope == "matmul").unwrap();
        assert_eq!(whole.bytes, 4.0 * (64.0 * 16.0 + 16.0 * 32.0 + 64.0 * 32.0));
        assert!(whole.source.contains("compulsory"));
    }

    /// No schedule may beat a bound: a blocked product with its best square tile, counted exactly.
    #[test]
    fn a_blocked_product_stays_above_the_bound() {
        let c = one(MATMUL);
        for s in [256u64, 1024, 5000] {
            let n = 512u64;
            let b = bounds(&c, &[], &[n, n, n], &sheet(4 * s));
            let bound = b.iter().find(|b| b.scope == "C").unwrap().bytes / 4.0;
            let best = (1..=n)
                .filter(|t| t * t + 2 * t <= s && n.is_multiple_of(*t))
                .map(|t| 2 * n * n * n / t + n * n)
                .min()
                .unwrap() as f64;
            assert!(bound <= best, "S={s}: bound {bound}, achieved {best}");
            assert!(best <= 2.5 * bound, "S={s}: bound {bound} is vacuous against {best}");
        }
    }

    #[test]
    fn filters_are_counted() {
        let of = |filter: &str, sizes: &[u64]| {
            let c = one(&format!(
                "cascade c[M, N](x: f32[M,N]) -> (y: f32[M]) {{\n y[m] = sum(n) x[m,n] where {filter}\n}}"
            ));
            let e = c.einsums().next().unwrap();
            kept_fraction(&c, e.filter.unwrap(), sizes).unwrap()
        };
        assert_eq!(of("n <= m", &[16, 16]), 136.0 / 256.0);
        assert_eq!(of("n <= m + (N - M)", &[8, 16]), 100.0 / 128.0);
        assert_eq!(of("n <= m and n > m - 3", &[16, 16]), 45.0 / 256.0);
        assert_eq!(of("n % 4 == 1 or n / 2 == 3", &[3, 16]), 6.0 / 16.0);
        // Many points: never more than there are, and not much less.
        let large = of("n <= m", &[1 << 20, 1 << 20]);
        assert!((0.49..=0.5).contains(&large), "{large}");
    }

    #[test]
    fn rows_beyond_an_index_are_not_read() {
        let c =
            one("cascade c[T, P, D](x: f32[P,D]) -> (y: f32[T,D]) {\n require T <= P\n y[t,d] for t in T = x[t,d]\n}");
        assert_eq!(compulsory_bytes(&c, &[4, 100, 8]), 2.0 * 4.0 * 8.0 * 4.0);
    }

    fn derived(c: &Cascade) -> Vec<Derivation> {
        c.ranks.ids().filter_map(|r| super::super::derive::derive(c, r)).collect()
    }

    #[test]
    fn attention_has_both_regimes_as_references() {
        let c = one(samples::DEFERRED);
        // M, N, E, F
        let large = bounds(&c, &derived(&c), &[4096, 4096, 64, 64], &sheet(4 * 65536));
        let r = large.iter().find(|b| b.scope.starts_with("stream")).unwrap();
        assert!(r.source.starts_with("reference"));
        assert_eq!(r.bytes, 4.0 * 4096.0 * 4096.0 * 64.0 * 64.0 / 65536.0);
        let small = bounds(&c, &derived(&c), &[4096, 4096, 128, 128], &sheet(4 * 8192));
        let r = small.iter().find(|b| b.scope.starts_with("stream")).unwrap();
        assert!(r.source.contains("fusion does not pay"));
        // The whole cascade never pays less than its inputs and outputs.
        let whole = small.iter().find(|b| b.scope == "deferred").unwrap();
        assert!(whole.bytes >= 4.0 * 4.0 * 4096.0 * 128.0);
    }

    #[test]
    fn gathers_need_not_read_everything() {
        let text = "cascade embed[T, V, D](ids: i32[T], table: f32[V,D]) -> (y: f32[T,D]) {
            y[t,d] = table[ids[t],d]
        }";
        let c = one(text);
        assert_eq!(compulsory_bytes(&c, &[10, 1_000_000, 4]), 40.0 + 160.0);
    }
}
