//! Printer of the text form.

use super::super::model::{Cmp, Domain, Expr, Model, Pred};
use std::fmt::Write;

/// The text of a model: declarations that differ from the default, then constraints.
pub fn print(model: &Model) -> String {
    let mut out = String::new();
    for var in model.vars() {
        let _ = writeln!(out, "var {} in {};", var.name, domain(&var.domain));
    }
    for c in model.constraints() {
        let _ = writeln!(out, "{}: {};", c.name, print_pred(model, &c.pred));
    }
    out
}

fn domain(d: &Domain) -> String {
    match d {
        Domain::Range { lo, hi, step: 1 } => format!("{lo}..{hi}"),
        Domain::Range { lo, hi, step } => format!("{lo}..{hi} step {step}"),
        Domain::Values(v) => format!("{{{}}}", join(v.iter().map(i64::to_string), ", ")),
        Domain::Divisors(n) => format!("divisors({n})"),
    }
}

fn join(parts: impl Iterator<Item = String>, by: &str) -> String {
    parts.collect::<Vec<_>>().join(by)
}

/// The text of a condition.
pub fn print_pred(model: &Model, p: &Pred) -> String {
    let e = |e: &Expr| print_expr(model, e);
    let bracketed = |p: &Pred| match p {
        Pred::Compare(..) | Pred::Divides { .. } | Pred::Table(..) | Pred::Bool(_) => print_pred(model, p),
        Pred::Not(_) | Pred::And(_) | Pred::Or(_) | Pred::Implies(..) | Pred::Iff(..) => {
            format!("({})", print_pred(model, p))
        }
    };
    match p {
        Pred::Bool(b) => b.to_string(),
        Pred::Compare(cmp, a, b) => {
            let sign = match cmp {
                Cmp::Eq => "==",
                Cmp::Ne => "!=",
                Cmp::Le => "<=",
                Cmp::Lt => "<",
            };
            format!("{} {sign} {}", e(a), e(b))
        }
        Pred::Divides { dividend, divisor } => format!("{} % {} == 0", e(dividend), e(divisor)),
        Pred::Table(es, rows) => {
            if let [one] = &es[..] {
                let values = rows.iter().filter_map(|r| r.first()).map(i64::to_string);
                return format!("{} in {{{}}}", e(one), join(values, ", "));
            }
            let rows = rows.iter().map(|r| format!("({})", join(r.iter().map(i64::to_string), ", ")));
            format!("table({}) in {{{}}}", join(es.iter().map(e), ", "), join(rows, ", "))
        }
        Pred::Not(p) => format!("!({})", print_pred(model, p)),
        Pred::And(ps) => join(ps.iter().map(bracketed), " & "),
        Pred::Or(ps) => join(ps.iter().map(bracketed), " | "),
        Pred::Implies(p, q) => format!("{} -> {}", bracketed(p), bracketed(q)),
        Pred::Iff(p, q) => format!("{} <-> {}", bracketed(p), bracketed(q)),
    }
}

/// The text of a term.
pub fn print_expr(model: &Model, e: &Expr) -> String {
    let text = |e: &Expr| print_expr(model, e);
    let bracketed = |e: &Expr| match e {
        Expr::Const(c) if *c >= 0 => text(e),
        Expr::Var(_) | Expr::Min(_) | Expr::Max(_) | Expr::CeilDiv(..) => text(e),
        Expr::Const(_) | Expr::Sum(_) | Expr::Neg(_) | Expr::Product(_) | Expr::Quotient(..) | Expr::Power(..) => {
            format!("({})", text(e))
        }
    };
    let summand = |e: &Expr| match e {
        Expr::Product(_) | Expr::Quotient(..) | Expr::Power(..) => text(e),
        Expr::Const(_)
        | Expr::Var(_)
        | Expr::Sum(_)
        | Expr::Neg(_)
        | Expr::CeilDiv(..)
        | Expr::Min(_)
        | Expr::Max(_) => bracketed(e),
    };
    match e {
        Expr::Const(c) => c.to_string(),
        Expr::Var(v) => model.name(*v).to_owned(),
        Expr::Sum(es) => {
            let mut out = String::new();
            for (i, e) in es.iter().enumerate() {
                match e {
                    Expr::Neg(inner) if i > 0 => out += &format!(" - {}", bracketed(inner)),
                    _ if i > 0 => out += &format!(" + {}", summand(e)),
                    _ => out += &summand(e),
                }
            }
            out
        }
        Expr::Neg(e) => format!("-{}", bracketed(e)),
        Expr::Product(es) => join(es.iter().map(bracketed), " * "),
        Expr::Quotient(a, b) => format!("{} / {}", bracketed(a), bracketed(b)),
        Expr::CeilDiv(a, b) => format!("ceildiv({}, {})", text(a), text(b)),
        Expr::Power(e, n) => format!("{} ^ {n}", bracketed(e)),
        Expr::Min(es) => format!("min({})", join(es.iter().map(text), ", ")),
        Expr::Max(es) => format!("max({})", join(es.iter().map(text), ", ")),
    }
}
