//! An independent check of derivations, at 120 digits and without any symbolic machinery.
//!
//! It evaluates the text and the derived form on small random fibers (sizes 0 to 3 over the derived rank) by plain
//! recursion over the IR and compares every output wherever the text is finite; then it tests that moving the anchor
//! is a map: from an anchor to itself it is the identity, and a→b followed by b→c is a→c. Invariant: it shares no code
//! with `derive` but the IR and scalar arithmetic, so it accepts no wrong derivation for the reason it was derived.

use std::collections::BTreeMap;

use super::derive::Derivation;
use super::inline::{conjuncts, indices_of, is_integer};
use super::precise::{Num, Stream};
use crate::cascade::{Cascade, Einsum, Expr, ExprId, IndexId, OutputSource, Reducer, Stmt, TensorId, TensorKind};
use crate::dtype::DType;
use crate::ops::ReduceOp;

/// Decimal digits to which two forms must agree.
const DIGITS: i32 = 80;

/// Why a derivation is not accepted, or could not be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// An output differs.
    Output(String),
    /// Moving the anchor by nothing changes an accumulator.
    Identity(String),
    /// Moving the anchor in two steps is not moving it in one.
    Composition(String),
    /// A construct the checker does not evaluate.
    Unsupported(&'static str),
}

impl std::fmt::Display for Rejection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Rejection::Output(what) => write!(f, "an output differs: {what}"),
            Rejection::Identity(what) => write!(f, "moving the anchor by nothing changes an accumulator: {what}"),
            Rejection::Composition(what) => {
                write!(f, "moving the anchor in two steps is not moving it in one: {what}")
            }
            Rejection::Unsupported(what) => write!(f, "{what} cannot be checked"),
        }
    }
}

impl std::error::Error for Rejection {}

/// Accepts `d` as an exact form of `c`.
///
/// # Errors
/// The first disagreement, or the construct that cannot be evaluated.
pub fn check(c: &Cascade, d: &Derivation) -> Result<(), Rejection> {
    for (seed, n) in [(1u64, 3u64), (2, 2), (3, 1), (4, 0)] {
        let extents: Vec<u64> =
            c.ranks.iter().map(|(r, rank)| rank.fixed.unwrap_or(if r == d.rank { n } else { 2 })).collect();
        let mut want = Machine::new(c, &extents, seed);
        want.run()?;
        let mut have = Machine::new(&d.cascade, &extents, seed);
        have.run()?;
        for (a, b) in c.outputs.iter().zip(&d.cascade.outputs) {
            let (OutputSource::Whole(s), OutputSource::Whole(t)) = (&a.source, &b.source) else { continue };
            for (at, x) in want.values.range((*s, Vec::new())..).take_while(|(k, _)| k.0 == *s) {
                let y = have.values.get(&(*t, at.1.clone()));
                let agree = match (x, y) {
                    // Agreement is asked for where the text is finite.
                    (Num::Nan | Num::Infinite(_), _) => true,
                    (x, Some(y)) => x.agrees(y, DIGITS, 1.0),
                    (_, None) => false,
                };
                if !agree {
                    return Err(Rejection::Output(format!(
                        "`{}` at {:?}: {} against {:?}",
                        a.name,
                        at.1,
                        x.to_f64(),
                        y.map(Num::to_f64)
                    )));
                }
            }
        }
    }
    if d.stream.is_some() { laws(d) } else { Ok(()) }
}

/// Identity and composition of the repairs.
fn laws(d: &Derivation) -> Result<(), Rejection> {
    let extents: Vec<u64> = d.cascade.ranks.iter().map(|(_, r)| r.fixed.unwrap_or(2)).collect();
    let mut random = Stream(11);
    let levels: Vec<[Num; 3]> = d
        .anchors
        .iter()
        .map(|_| {
            let a = random.within(-1.0, 1.0);
            let b = a + random.within(0.1, 1.0);
            [Num::of(a), Num::of(b), Num::of(b + random.within(0.1, 1.0))]
        })
        .collect();
    let start: Vec<Num> = d.accumulators.iter().map(|_| Num::of(random.within(0.5, 2.0))).collect();
    let step = |from: usize, to: usize, acc: &[Num]| -> Result<Vec<Num>, Rejection> {
        let mut m = Machine::new(&d.cascade, &extents, 5);
        let origin = |t: TensorId, point: i64| {
            let mut at = vec![0; d.cascade.tensors[t].dims.len()];
            at[0] = point;
            (t, at)
        };
        for (a, l) in d.anchors.iter().zip(&levels) {
            m.values.insert(origin(a.state, 0), l[from].clone());
            m.values.insert(origin(a.state, 1), l[to].clone());
        }
        for (a, v) in d.accumulators.iter().zip(acc) {
            m.values.insert(origin(a.state, 0), v.clone());
        }
        let mut out = Vec::new();
        for (a, v) in d.accumulators.iter().zip(acc) {
            let Some(repair) = a.repair else {
                out.push(v.clone());
                continue;
            };
            let mut env: BTreeMap<IndexId, i64> = a.dims.iter().map(|i| (*i, 0)).collect();
            env.extend(d.index.map(|i| (i, 0)));
            out.push(m.eval(repair, &mut env, &[])?.unwrap_or(Num::Nan));
        }
        Ok(out)
    };
    let name = |k: usize| d.cascade.tensors[d.accumulators[k].state].name.clone();
    let differ = |x: &[Num], y: &[Num]| x.iter().zip(y).position(|(a, b)| !a.agrees(b, DIGITS, 1e-30));
    if let Some(k) = differ(&step(0, 0, &start)?, &start) {
        return Err(Rejection::Identity(name(k)));
    }
    let twice = step(1, 2, &step(0, 1, &start)?)?;
    if let Some(k) = differ(&twice, &step(0, 2, &start)?) {
        return Err(Rejection::Composition(name(k)));
    }
    Ok(())
}

/// Evaluation by plain recursion; absent elements are points outside a support.
struct Machine<'a> {
    c: &'a Cascade,
    extents: &'a [u64],
    seed: u64,
    values: BTreeMap<(TensorId, Vec<i64>), Num>,
}

impl<'a> Machine<'a> {
    fn new(c: &'a Cascade, extents: &'a [u64], seed: u64) -> Self {
        Machine { c, extents, seed, values: BTreeMap::new() }
    }

    fn size(&self, s: &crate::cascade::Size) -> Result<i64, Rejection> {
        s.eval(self.extents).map(|n| n as i64).map_err(|_| Rejection::Unsupported("an extent without a value"))
    }

    fn run(&mut self) -> Result<(), Rejection> {
        let c = self.c;
        for s in &c.stmts {
            match s {
                Stmt::Einsum(e) => self.einsum(e, &BTreeMap::new())?,
                Stmt::Iter(i) => {
                    for e in &i.inits {
                        self.einsum(e, &BTreeMap::new())?;
                    }
                    let n = self.size(&i.extent)?;
                    for k in 0..n {
                        let at = if i.rev { n - 1 - k } else { k };
                        for e in &i.body {
                            self.einsum(e, &BTreeMap::from([(i.index, at)]))?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn einsum(&mut self, e: &Einsum, outer: &BTreeMap<IndexId, i64>) -> Result<(), Rejection> {
        if e.join.is_some() || e.targets.len() != 1 {
            return Err(Rejection::Unsupported("a scatter or a statement with several targets"));
        }
        let c = self.c;
        let mut all = Vec::new();
        if let Some(f) = e.filter {
            conjuncts(c, f, &mut all);
        }
        let reduced = |f: &ExprId| indices_of(c, *f).iter().any(|i| !outer.contains_key(i) && !e.free.contains(i));
        let (inner, own): (Vec<ExprId>, Vec<ExprId>) = all.into_iter().partition(reduced);
        let sizes: Vec<i64> = e.free.iter().map(|i| self.size(&c.indices[*i].extent)).collect::<Result<_, _>>()?;
        let total: i64 = sizes.iter().product();
        for code in 0..total {
            let mut env = outer.clone();
            let mut rest = code;
            for (i, n) in e.free.iter().zip(&sizes) {
                env.insert(*i, rest % n);
                rest /= n;
            }
            let mut holds = true;
            for f in &own {
                holds &= self.eval(*f, &mut env, &[])?.is_some_and(|v| !v.is_zero());
            }
            let mut value = if holds { self.eval(e.value, &mut env, &inner)? } else { None };
            if let (None, Some(o)) = (&value, e.otherwise) {
                value = self.eval(o, &mut env, &[])?;
            }
            let at = self.place(&e.targets[0].at, &mut env)?;
            if let Some(v) = value {
                self.values.insert((e.targets[0].tensor, at), v);
            }
        }
        Ok(())
    }

    fn place(&mut self, at: &[ExprId], env: &mut BTreeMap<IndexId, i64>) -> Result<Vec<i64>, Rejection> {
        at.iter().map(|a| Ok(self.eval(*a, env, &[])?.map_or(-1, |v| v.to_f64() as i64))).collect()
    }

    /// An element of an input: a function of its name, its place and the seed alone.
    fn input(&self, t: TensorId, at: &[i64]) -> Result<Num, Rejection> {
        let tensor = &self.c.tensors[t];
        let mut hash = self.seed.wrapping_mul(0x1000_0000_01b3) ^ 0xcbf2_9ce4_8422_2325;
        for b in tensor.name.bytes().map(u64::from).chain(at.iter().map(|x| *x as u64 + 1000)) {
            hash = (hash ^ b).wrapping_mul(0x1000_0000_01b3);
        }
        for (x, d) in at.iter().zip(&tensor.dims) {
            if *x < 0 || *x >= self.size(d)? {
                return Ok(Num::of(0.0));
            }
        }
        let u = Stream(hash).unit();
        Ok(Num::of(match tensor.dtype {
            DType::Bool | DType::I64 | DType::I32 | DType::I8 | DType::U8 | DType::I4 | DType::U4 => (u * 2.0).floor(),
            _ if tensor.dims.is_empty() => 0.25 + u,
            _ => 4.0 * u - 2.0,
        }))
    }

    fn eval(
        &mut self,
        e: ExprId,
        env: &mut BTreeMap<IndexId, i64>,
        inner: &[ExprId],
    ) -> Result<Option<Num>, Rejection> {
        let c = self.c;
        Ok(match &c.exprs[e] {
            Expr::Int(n) => Some(Num::of(*n as f64)),
            Expr::Float(x) => Some(Num::of(*x)),
            Expr::Size(s) => Some(Num::of(self.size(s)? as f64)),
            Expr::Index(i) => Some(Num::of(env[i] as f64)),
            Expr::Read { tensor, at } => {
                let at = self.place(at, env)?;
                match c.tensors[*tensor].kind {
                    TensorKind::Input | TensorKind::InOut => Some(self.input(*tensor, &at)?),
                    TensorKind::Intermediate | TensorKind::State | TensorKind::Output => {
                        self.values.get(&(*tensor, at)).cloned()
                    }
                }
            }
            Expr::Unary(op, a) => self.eval(*a, env, inner)?.map(|x| x.unary(*op)),
            Expr::Binary(op, a, b) => {
                let integer = is_integer(c, *a) && is_integer(c, *b);
                match (self.eval(*a, env, inner)?, self.eval(*b, env, inner)?) {
                    (Some(x), Some(y)) => Some(x.binary(*op, &y, integer)),
                    _ => None,
                }
            }
            Expr::Select(k, a, b) => match self.eval(*k, env, inner)? {
                Some(k) => self.eval(if k.is_zero() { *b } else { *a }, env, inner)?,
                None => None,
            },
            Expr::Cast(d, a) => self.eval(*a, env, inner)?.map(|x| x.cast(*d)),
            Expr::Reduce { op: Reducer::Op(op), over, body } => Some(self.reduce(*op, over, *body, env, inner)?),
            Expr::Reduce { .. } | Expr::Tuple(_) => return Err(Rejection::Unsupported("a reduction of tuples")),
            Expr::Scan { .. } => return Err(Rejection::Unsupported("a running reduction")),
            Expr::Segment { .. } => return Err(Rejection::Unsupported("a ragged rank")),
            Expr::Rand { .. } => return Err(Rejection::Unsupported("random values")),
        })
    }

    fn reduce(
        &mut self,
        op: ReduceOp,
        over: &[IndexId],
        body: ExprId,
        env: &mut BTreeMap<IndexId, i64>,
        inner: &[ExprId],
    ) -> Result<Num, Rejection> {
        let c = self.c;
        let sizes: Vec<i64> = over.iter().map(|i| self.size(&c.indices[*i].extent)).collect::<Result<_, _>>()?;
        let mut acc = Num::of(op.identity());
        let mut best: Option<Num> = None;
        for code in 0..sizes.iter().product::<i64>() {
            let mut rest = code;
            for (i, n) in over.iter().zip(&sizes) {
                env.insert(*i, rest % n);
                rest /= n;
            }
            let mut holds = true;
            for f in inner {
                let used = indices_of(c, *f);
                if used.iter().any(|i| over.contains(i)) && used.iter().all(|i| env.contains_key(i)) {
                    holds &= self.eval(*f, env, &[])?.is_some_and(|v| !v.is_zero());
                }
            }
            let x = if holds { self.eval(body, env, inner)? } else { None };
            let Some(x) = x else { continue };
            acc = match op {
                ReduceOp::Sum => acc.add(&x),
                ReduceOp::Product => acc.mul(&x),
                ReduceOp::Max => acc.max(&x),
                ReduceOp::Min => acc.min(&x),
                ReduceOp::Any => acc.max(&x.binary(crate::ops::BinaryOp::Ne, &Num::of(0.0), false)),
                ReduceOp::All => acc.min(&x.binary(crate::ops::BinaryOp::Ne, &Num::of(0.0), false)),
                ReduceOp::LogSumExp => acc.exp().add(&x.exp()).ln(),
                ReduceOp::ArgMax | ReduceOp::ArgMin => {
                    let x = if op == ReduceOp::ArgMin { x.neg() } else { x };
                    let first = best.as_ref().is_none_or(|b| x.compare(b) == Some(std::cmp::Ordering::Greater));
                    if first {
                        best = Some(x);
                        Num::of(code as f64)
                    } else {
                        acc
                    }
                }
            };
        }
        for i in over {
            env.remove(i);
        }
        Ok(acc)
    }
}

#[cfg(test)]
mod tests {
    use super::super::derive::derive;
    use super::super::samples::{self, one};
    use super::*;
    use crate::ops::{BinaryOp, UnaryOp};

    fn derived(text: &str, rank: &str) -> (Cascade, Derivation) {
        let c = one(text);
        let d = derive(&c, c.rank(rank).unwrap()).unwrap();
        (c, d)
    }

    #[test]
    fn right_derivations_are_accepted() {
        for (t, r) in [
            (samples::attention(), "N"),
            (samples::UNSTABILISED.into(), "N"),
            (samples::LSE.into(), "N"),
            (samples::ENTROPY.into(), "N"),
            (samples::THIRD.into(), "N"),
            (samples::layernorm(true), "K"),
            (samples::SOFTMAX.into(), "N"),
        ] {
            let (c, d) = derived(&t, r);
            assert_eq!(check(&c, &d), Ok(()), "{t}");
        }
    }

    /// Rewrites the nodes under `root` that `f` changes.
    fn plant(d: &mut Derivation, root: ExprId, f: impl Fn(&Expr) -> Option<Expr>) {
        let mut changes = Vec::new();
        d.cascade.walk(root, &mut |id, e| changes.extend(f(e).map(|x| (id, x))));
        assert!(!changes.is_empty());
        for (id, x) in changes {
            d.cascade.exprs[id] = x;
        }
    }

    #[test]
    fn planted_faults_are_rejected() {
        let exp2 = |e: &Expr| match e {
            Expr::Unary(UnaryOp::Exp, a) => Some(Expr::Unary(UnaryOp::Exp2, *a)),
            _ => None,
        };
        let add = |e: &Expr| match e {
            Expr::Binary(BinaryOp::Sub, a, b) => Some(Expr::Binary(BinaryOp::Add, *a, *b)),
            _ => None,
        };
        for t in [samples::attention(), samples::ENTROPY.to_string()] {
            let (c, good) = derived(&t, "N");
            for k in 0..good.accumulators.len() {
                let mut d = good.clone();
                let repair = d.accumulators[k].repair.unwrap();
                plant(&mut d, repair, exp2);
                assert!(check(&c, &d).is_err(), "a wrong base in repair {k}");
                let mut d = good.clone();
                plant(&mut d, repair, add);
                assert!(check(&c, &d).is_err(), "a wrong sign in repair {k}");
                assert!(laws(&d).is_err(), "the laws see a wrong sign in repair {k}");
                let mut d = good.clone();
                let contribution = d.accumulators[k].contribution;
                plant(&mut d, contribution, exp2);
                assert!(check(&c, &d).is_err(), "a wrong contribution {k}");
            }
        }
        // A skipped rescale.
        let (c, mut d) = derived(&samples::attention(), "N");
        let repair = d.accumulators[0].repair.unwrap();
        plant(&mut d, repair, |e| match e {
            Expr::Unary(UnaryOp::Exp, _) => Some(Expr::Float(1.0)),
            _ => None,
        });
        assert!(matches!(check(&c, &d), Err(Rejection::Output(_))));
        // A moment of the wrong order.
        let (c, mut d) = derived(&samples::layernorm(true), "K");
        let contribution = d.accumulators[0].contribution;
        d.cascade.exprs[contribution] = Expr::Float(1.0);
        assert!(check(&c, &d).is_err());
    }
}
