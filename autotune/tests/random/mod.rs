//! Random small models and their solutions by enumeration.

mod rng;

use einfall_autotune::csp::{Cmp, Domain, Expr, Model, Pred};
pub use rng::Rng;

/// A domain of at most 12 values.
fn domain(rng: &mut Rng) -> Domain {
    match rng.below(5) {
        0 => {
            let lo = rng.range(-4, 3);
            Domain::range(lo, lo + rng.range(0, 7))
        }
        1 => {
            let n = rng.range(1, 6);
            Domain::Values((0..n).map(|_| rng.range(-3, 20)).collect())
        }
        2 => {
            let lo = rng.range(-6, 6);
            let step = rng.range(2, 5);
            Domain::Range { lo, hi: lo + step * rng.range(0, 5) + 1, step }
        }
        3 => Domain::Divisors(rng.range(1, 60)),
        _ => Domain::range(1, rng.range(2, 9)),
    }
}

fn var(rng: &mut Rng, m: &Model) -> Expr {
    Expr::Var(m.var_ids().nth(rng.below(m.vars().len() as u64) as usize).expect("variables exist"))
}

/// A term of some depth.
pub fn expr(rng: &mut Rng, m: &Model, depth: u32) -> Expr {
    if depth == 0 || rng.below(4) == 0 {
        return if rng.below(4) == 0 { Expr::Const(rng.range(-3, 12)) } else { var(rng, m) };
    }
    let mut sub = || expr(rng, m, depth - 1);
    let (a, b, c) = (sub(), sub(), sub());
    match rng.below(10) {
        0 | 1 => Expr::Sum(vec![a, b]),
        2 => Expr::Sum(vec![a, b, Expr::Neg(Box::new(c))]),
        3 | 4 => Expr::Product(vec![a, b]),
        5 => Expr::Product(vec![a, b, c]),
        6 => a / b,
        7 => a.ceil_div(b),
        8 => a.pow(rng.range(0, 3) as u32),
        _ if rng.below(2) == 0 => Expr::Min(vec![a, b, c]),
        _ => Expr::Max(vec![a, b]),
    }
}

/// A condition of some depth.
pub fn pred(rng: &mut Rng, m: &Model, depth: u32) -> Pred {
    if depth > 0 && rng.below(3) == 0 {
        let mut sub = || Box::new(pred(rng, m, depth - 1));
        let (a, b) = (sub(), sub());
        return match rng.below(5) {
            0 => Pred::Not(a),
            1 => Pred::And(vec![*a, *b]),
            2 => Pred::Or(vec![*a, *b]),
            3 => Pred::Implies(a, b),
            _ => Pred::Iff(a, b),
        };
    }
    match rng.below(9) {
        0..=2 => Pred::Compare(Cmp::Le, expr(rng, m, 2), expr(rng, m, 1)),
        3 => Pred::Compare(Cmp::Lt, expr(rng, m, 1), expr(rng, m, 2)),
        4 | 5 => Pred::Compare(Cmp::Eq, expr(rng, m, 2), expr(rng, m, 1)),
        6 => Pred::Compare(Cmp::Ne, expr(rng, m, 1), expr(rng, m, 1)),
        7 => Pred::Divides { dividend: expr(rng, m, 1), divisor: expr(rng, m, 1) },
        _ => {
            let columns = rng.range(1, 2) as usize;
            let es = (0..columns).map(|_| expr(rng, m, 1)).collect();
            let rows = (0..rng.range(1, 8)).map(|_| (0..columns).map(|_| rng.range(-2, 8)).collect()).collect();
            Pred::Table(es, rows)
        }
    }
}

/// A model with one to four variables and up to four constraints.
pub fn model(rng: &mut Rng) -> Model {
    let mut m = Model::new();
    for i in 0..rng.range(1, 4) {
        let d = domain(rng);
        m.var(format!("v{i}"), d);
    }
    for i in 0..rng.range(1, 4) {
        let p = pred(rng, &m, 2);
        m.constrain(format!("k{i}"), p);
    }
    m
}

/// A cost.
// Not every test has costs.
#[allow(dead_code)]
pub fn cost(rng: &mut Rng, m: &Model) -> Expr {
    expr(rng, m, 2)
}

fn values(d: &Domain) -> Vec<i64> {
    let mut out: Vec<i64> = match d {
        Domain::Range { lo, hi, step } => (*lo..=*hi).step_by(*step as usize).collect(),
        Domain::Values(v) => v.clone(),
        Domain::Divisors(n) => (1..=*n).filter(|d| n % d == 0).collect(),
    };
    out.sort_unstable();
    out.dedup();
    out
}

/// Every assignment, in lexicographic order.
pub fn brute_force(m: &Model) -> Vec<Vec<i64>> {
    let domains: Vec<Vec<i64>> = m.vars().iter().map(|v| values(&v.domain)).collect();
    let mut out = Vec::new();
    let mut tuple = Vec::new();
    fn grow(m: &Model, domains: &[Vec<i64>], tuple: &mut Vec<i64>, out: &mut Vec<Vec<i64>>) {
        if tuple.len() == domains.len() {
            if m.check(tuple).is_ok() {
                out.push(tuple.clone());
            }
            return;
        }
        for v in &domains[tuple.len()] {
            tuple.push(*v);
            grow(m, domains, tuple, out);
            tuple.pop();
        }
    }
    grow(m, &domains, &mut tuple, &mut out);
    out
}
