//! Types: integer positions, boolean conditions, values that their tensors can hold.

use super::Verifier;
use crate::cascade::types::Kind;
use crate::cascade::{Einsum, Expr, ExprId, Reducer};
use crate::diag::{Diagnostic, Severity};
use crate::dtype::DType;
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

fn word(k: Kind) -> &'static str {
    match k {
        Kind::Int => "an integer",
        Kind::Float => "a float",
        Kind::Bool => "a truth value",
    }
}

impl Verifier<'_> {
    /// `whole` says that the value has as many results as there are targets.
    pub(super) fn types(&mut self, e: &Einsum, whole: bool) {
        let c = self.c;
        for t in &e.targets {
            for a in &t.at {
                self.integer(*a, "a position");
            }
        }
        let mut roots = vec![e.value];
        roots.extend(e.filter);
        roots.extend(e.otherwise);
        for r in &roots {
            for id in self.nodes(*r) {
                self.node_types(id);
            }
        }
        if let Some(f) = e.filter {
            self.condition(f, "a filter");
        }
        for (n, t) in e.targets.iter().enumerate().filter(|_| whole) {
            let x = &c.tensors[t.tensor];
            let kind = match &c.exprs[e.value] {
                Expr::Reduce { op: Reducer::Op(op), body, .. } if op.selects_argument() && e.targets.len() == 2 => {
                    if n == 0 { self.kind(*body) } else { Kind::Int }
                }
                Expr::Reduce { op: Reducer::TopK { .. }, .. } if n == 1 => Kind::Int,
                _ => self.kind(e.value),
            };
            let name = x.name.clone();
            self.assignable(e.value, kind, x.dtype, &name);
            if let Some(o) = e.otherwise {
                self.assignable(o, self.kind(o), x.dtype, &name);
            }
            if Kind::of(x.dtype) == Kind::Float {
                self.floored(e.value);
            }
        }
        if let Some(op) = e.join {
            let logic = matches!(op, ReduceOp::Any | ReduceOp::All);
            if logic != (self.kind(e.value) == Kind::Bool) {
                self.wrong_reduction(e.value, op.name(), logic);
            }
        }
    }

    fn integer(&mut self, e: ExprId, what: &str) {
        let k = self.kind(e);
        if k != Kind::Int {
            let d = Diagnostic::error("E0301", self.span(e), format!("{what} is an integer, this is {}", word(k)));
            self.error(
                d.help("positions are made of indices, integers and integer tensors; write `i32(..)` to truncate"),
            );
        }
    }

    fn condition(&mut self, e: ExprId, what: &str) {
        let k = self.kind(e);
        if k != Kind::Bool {
            let d = Diagnostic::error("E0302", self.span(e), format!("{what} is a truth value, this is {}", word(k)));
            self.error(d.help("write a comparison, such as `n <= m` or `x != 0`"));
        }
    }

    fn number(&mut self, e: ExprId, what: &str) {
        if self.kind(e) == Kind::Bool {
            let d = Diagnostic::error("E0303", self.span(e), format!("{what} takes numbers, this is a truth value"));
            self.error(d.help("write `if .. then 1 else 0`, or convert it: `f32(..)`"));
        }
    }

    fn wrong_reduction(&mut self, body: ExprId, name: &str, logic: bool) {
        let d = if logic {
            Diagnostic::error(
                "E0304",
                self.span(body),
                format!("`{name}` joins truth values, this is {}", word(self.kind(body))),
            )
            .help("write a comparison, such as `x != 0`")
        } else {
            Diagnostic::error("E0304", self.span(body), format!("`{name}` joins numbers, this is a truth value"))
                .help("write `if .. then 1 else 0`, or use `any` or `all`; a reduction takes everything to its right, so put it in parentheses to compare its value")
        };
        self.error(d);
    }

    fn node_types(&mut self, id: ExprId) {
        match &self.c.exprs[id] {
            Expr::Int(_) | Expr::Float(_) | Expr::Size(_) | Expr::Index(_) | Expr::Segment { .. } => {}
            Expr::Read { at, .. } => {
                for a in at {
                    self.integer(*a, "a position");
                }
            }
            Expr::Unary(UnaryOp::Not, a) => self.condition(*a, "the operand of `not`"),
            Expr::Unary(op, a) => self.number(*a, &format!("`{}`", if *op == UnaryOp::Neg { "-" } else { op.name() })),
            Expr::Binary(op, a, b) => match op {
                BinaryOp::And | BinaryOp::Or => {
                    let what = format!("an operand of `{}`", op.name());
                    self.condition(*a, &what);
                    self.condition(*b, &what);
                }
                BinaryOp::Eq | BinaryOp::Ne if self.kind(*a) == Kind::Bool && self.kind(*b) == Kind::Bool => {}
                BinaryOp::Add
                | BinaryOp::Sub
                | BinaryOp::Mul
                | BinaryOp::Div
                | BinaryOp::Mod
                | BinaryOp::Pow
                | BinaryOp::Min
                | BinaryOp::Max
                | BinaryOp::Lt
                | BinaryOp::Le
                | BinaryOp::Gt
                | BinaryOp::Ge
                | BinaryOp::Eq
                | BinaryOp::Ne => {
                    let what = format!("`{}`", op.name());
                    self.number(*a, &what);
                    self.number(*b, &what);
                    if self.kind(id) == Kind::Float {
                        self.floored(*a);
                        self.floored(*b);
                    }
                }
            },
            Expr::Select(k, a, b) => {
                self.condition(*k, "the condition of `if`");
                if (self.kind(*a) == Kind::Bool) != (self.kind(*b) == Kind::Bool) {
                    let d =
                        Diagnostic::error("E0303", self.span(id), "one branch is a truth value, the other a number");
                    self.error(d.help("give both branches the same kind of value"));
                }
            }
            Expr::Cast(dtype, a) => {
                if let Expr::Int(_) | Expr::Float(_) = self.c.exprs[*a] {
                    self.holds(*a, *dtype, None);
                }
            }
            Expr::Tuple(items) => {
                for i in items {
                    self.number(*i, "a monoid");
                }
            }
            Expr::Reduce { op, body, .. } | Expr::Scan { op, body, .. } => {
                let boolean = self.kind(*body) == Kind::Bool;
                match op {
                    Reducer::Op(op @ (ReduceOp::Any | ReduceOp::All)) if !boolean => {
                        self.wrong_reduction(*body, op.name(), true);
                    }
                    Reducer::Op(ReduceOp::Any | ReduceOp::All) => {}
                    Reducer::Op(op) if boolean => self.wrong_reduction(*body, op.name(), false),
                    Reducer::Op(_) => {}
                    Reducer::TopK { .. } | Reducer::User(_) => self.number(*body, "this reduction"),
                }
            }
            Expr::Rand { seed, coords } => {
                self.integer(*seed, "a seed");
                for x in coords {
                    self.integer(*x, "a coordinate");
                }
            }
        }
    }

    /// Warns where an integer quotient, rounded down, enters a float expression.
    fn floored(&mut self, e: ExprId) {
        if let Expr::Binary(BinaryOp::Div, a, _) = self.c.exprs[e]
            && self.kind(e) == Kind::Int
        {
            let mut d = Diagnostic::error("W0002", self.span(e), "this quotient of integers is rounded down");
            d.severity = Severity::Warning;
            let text = crate::cascade::print::expr_text_of(self.c, a);
            self.error(d.help(format!("for a fraction, write `f32({text})` above the line")));
        }
    }

    /// Whether a value of kind `kind` may be stored as `dtype`.
    pub(super) fn assignable(&mut self, value: ExprId, kind: Kind, dtype: DType, name: &str) {
        let want = Kind::of(dtype);
        let ok = kind == want || kind == Kind::Int && want == Kind::Float;
        if !ok {
            let d =
                Diagnostic::error("E0305", self.span(value), format!("`{name}` is {dtype}, this is {}", word(kind)));
            self.error(match want {
                Kind::Int => d.help(format!("convert it: `{dtype}(..)` truncates towards zero and saturates")),
                Kind::Float => d.help(format!("write `if .. then 1 else 0`, or convert it: `{dtype}(..)`")),
                Kind::Bool => d.help("write a comparison, such as `x != 0`"),
            });
            return;
        }
        self.holds(value, dtype, Some(name));
    }

    /// Reports a value whose range is known and lies outside the type.
    fn holds(&mut self, value: ExprId, dtype: DType, name: Option<&str>) {
        let Some((low, high)) = self.range(value) else { return };
        let fits = |x: f64| match Kind::of(dtype) {
            Kind::Bool => true,
            Kind::Int => dtype.min_finite() <= x && x <= dtype.max_finite(),
            Kind::Float if x.is_infinite() => dtype != DType::F8E4M3,
            Kind::Float => x.is_nan() || x.abs() <= dtype.max_finite(),
        };
        if fits(low) && fits(high) {
            return;
        }
        let range = if low == high { format!("{low}") } else { format!("values from {low} to {high}") };
        let what = name.map_or(String::new(), |n| format!(" `{n}`:"));
        let d = Diagnostic::error("E0306", self.span(value), format!("{dtype} cannot hold{what} {range}"));
        let (min, max) = (dtype.min_finite(), dtype.max_finite());
        self.error(d.help(format!("{dtype} holds {min} to {max}; use a wider type")));
    }

    /// The values an expression can have, where the text alone fixes them.
    fn range(&self, e: ExprId) -> Option<(f64, f64)> {
        let extent = |i: crate::cascade::IndexId| self.known_size(&self.c.indices[i].extent).filter(|n| *n > 0);
        let hull = |xs: [f64; 4]| {
            let (low, high) = xs.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(*x), h.max(*x)));
            (!xs.iter().any(|x| x.is_nan())).then_some((low, high))
        };
        match &self.c.exprs[e] {
            Expr::Int(n) => Some((*n as f64, *n as f64)),
            Expr::Float(x) => Some((*x, *x)),
            Expr::Size(s) => self.known_size(s).map(|n| (n as f64, n as f64)),
            Expr::Index(i) => extent(*i).map(|n| (0.0, (n - 1) as f64)),
            Expr::Unary(UnaryOp::Neg, a) => self.range(*a).map(|(l, h)| (-h, -l)),
            Expr::Binary(op, a, b) => {
                let ((al, ah), (bl, bh)) = (self.range(*a)?, self.range(*b)?);
                match op {
                    BinaryOp::Add => hull([al + bl, ah + bh, al + bl, ah + bh]),
                    BinaryOp::Sub => hull([al - bh, ah - bl, al - bh, ah - bl]),
                    BinaryOp::Mul => hull([al * bl, al * bh, ah * bl, ah * bh]),
                    BinaryOp::Min => Some((al.min(bl), ah.min(bh))),
                    BinaryOp::Max => Some((al.max(bl), ah.max(bh))),
                    BinaryOp::Div
                    | BinaryOp::Mod
                    | BinaryOp::Pow
                    | BinaryOp::Lt
                    | BinaryOp::Le
                    | BinaryOp::Gt
                    | BinaryOp::Ge
                    | BinaryOp::Eq
                    | BinaryOp::Ne
                    | BinaryOp::And
                    | BinaryOp::Or => None,
                }
            }
            Expr::Select(_, a, b) => {
                let ((al, ah), (bl, bh)) = (self.range(*a)?, self.range(*b)?);
                Some((al.min(bl), ah.max(bh)))
            }
            Expr::Reduce { op: Reducer::Op(op), over, .. } if op.selects_argument() => match over.as_slice() {
                [i] => extent(*i).map(|n| (-1.0, (n - 1) as f64)),
                _ => None,
            },
            Expr::Read { .. }
            | Expr::Unary(..)
            | Expr::Cast(..)
            | Expr::Tuple(_)
            | Expr::Reduce { .. }
            | Expr::Scan { .. }
            | Expr::Segment { .. }
            | Expr::Rand { .. } => None,
        }
    }
}
