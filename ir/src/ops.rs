//! The scalar operators and monoids every IR level shares: one row each with spelling, meaning and algebra.
//!
//! Invariant: printers, parsers, verifiers, evaluators and backends read these tables and nothing else.

use crate::dtype::DType;

/// A scalar function of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum UnaryOp {
    Neg,
    Abs,
    Exp,
    Exp2,
    Log,
    Log2,
    Log1p,
    Sqrt,
    Rsqrt,
    Recip,
    Sin,
    Cos,
    Tanh,
    /// 1/(1+e^−x).
    Sigmoid,
    /// Gauss error function.
    Erf,
    Floor,
    Ceil,
    /// To the nearest integer, ties to even.
    Round,
    /// −1, 0 or 1.
    Sign,
    /// Boolean negation.
    Not,
}

/// A scalar function of two arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum BinaryOp {
    Add,
    Sub,
    Mul,
    /// Floats divide; integers floor-divide (the quotient of a non-negative remainder). Integer x/0 = 0.
    Div,
    /// Non-negative remainder for positive divisors. x%0 = 0.
    Mod,
    Pow,
    Min,
    Max,
    Lt,
    Le,
    Gt,
    Ge,
    Eq,
    Ne,
    And,
    Or,
}

/// A reduction operator: a commutative monoid on scalars, or an argument selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum ReduceOp {
    Sum,
    Product,
    Min,
    Max,
    /// log Σ exp, stabilised.
    LogSumExp,
    /// Boolean or.
    Any,
    /// Boolean and.
    All,
    /// Lowest index of the smallest element; −1 for an empty reduction.
    ArgMin,
    /// Lowest index of the largest element; −1 for an empty reduction.
    ArgMax,
}

impl UnaryOp {
    /// Every operator.
    pub const ALL: [UnaryOp; 20] = {
        use UnaryOp::*;
        [
            Neg, Abs, Exp, Exp2, Log, Log2, Log1p, Sqrt, Rsqrt, Recip, Sin, Cos, Tanh, Sigmoid, Erf, Floor, Ceil,
            Round, Sign, Not,
        ]
    };

    /// Its spelling as a function; [`UnaryOp::Neg`] and [`UnaryOp::Not`] also print as prefixes in cascades.
    pub fn name(self) -> &'static str {
        use UnaryOp::*;
        match self {
            Neg => "neg",
            Abs => "abs",
            Exp => "exp",
            Exp2 => "exp2",
            Log => "log",
            Log2 => "log2",
            Log1p => "log1p",
            Sqrt => "sqrt",
            Rsqrt => "rsqrt",
            Recip => "recip",
            Sin => "sin",
            Cos => "cos",
            Tanh => "tanh",
            Sigmoid => "sigmoid",
            Erf => "erf",
            Floor => "floor",
            Ceil => "ceil",
            Round => "round",
            Sign => "sign",
            Not => "not",
        }
    }

    /// The operator with this spelling.
    pub fn from_name(name: &str) -> Option<UnaryOp> {
        UnaryOp::ALL.into_iter().find(|o| o.name() == name)
    }

    /// Its value in float64.
    pub fn eval(self, x: f64) -> f64 {
        use UnaryOp::*;
        match self {
            Neg => -x,
            Abs => x.abs(),
            Exp => x.exp(),
            Exp2 => x.exp2(),
            Log => x.ln(),
            Log2 => x.log2(),
            Log1p => x.ln_1p(),
            Sqrt => x.sqrt(),
            Rsqrt => 1.0 / x.sqrt(),
            Recip => 1.0 / x,
            Sin => x.sin(),
            Cos => x.cos(),
            Tanh => x.tanh(),
            Sigmoid => {
                if x >= 0.0 {
                    1.0 / (1.0 + (-x).exp())
                } else {
                    let e = x.exp();
                    e / (1.0 + e)
                }
            }
            Erf => erf(x),
            Floor => x.floor(),
            Ceil => x.ceil(),
            Round => x.round_ties_even(),
            Sign => {
                if x == 0.0 || x.is_nan() {
                    x
                } else {
                    x.signum()
                }
            }
            Not => f64::from(x == 0.0),
        }
    }

    /// The relative error, in ulps of the result type, that a backend may make. 0.5 is correct rounding; exact
    /// operators have 0.
    pub fn ulps(self) -> f64 {
        use UnaryOp::*;
        match self {
            Neg | Abs | Floor | Ceil | Round | Sign | Not => 0.0,
            Sqrt => 0.5,
            Recip => 1.0,
            Rsqrt | Exp | Exp2 => 2.0,
            Log | Log2 | Log1p | Sin | Cos => 3.0,
            Sigmoid | Tanh | Erf => 4.0,
        }
    }
}

impl BinaryOp {
    /// Every operator.
    pub const ALL: [BinaryOp; 16] = {
        use BinaryOp::*;
        [Add, Sub, Mul, Div, Mod, Pow, Min, Max, Lt, Le, Gt, Ge, Eq, Ne, And, Or]
    };

    /// Its spelling: infix where [`BinaryOp::infix`] says so, a function otherwise.
    pub fn name(self) -> &'static str {
        use BinaryOp::*;
        match self {
            Add => "+",
            Sub => "-",
            Mul => "*",
            Div => "/",
            Mod => "%",
            Pow => "pow",
            Min => "min",
            Max => "max",
            Lt => "<",
            Le => "<=",
            Gt => ">",
            Ge => ">=",
            Eq => "==",
            Ne => "!=",
            And => "and",
            Or => "or",
        }
    }

    /// Whether it is written between its arguments.
    pub fn infix(self) -> bool {
        !matches!(self, BinaryOp::Pow | BinaryOp::Min | BinaryOp::Max)
    }

    /// The operator with this spelling.
    pub fn from_name(name: &str) -> Option<BinaryOp> {
        BinaryOp::ALL.into_iter().find(|o| o.name() == name)
    }

    /// Whether the result is a bool.
    pub fn is_predicate(self) -> bool {
        use BinaryOp::*;
        matches!(self, Lt | Le | Gt | Ge | Eq | Ne | And | Or)
    }

    /// Its value in float64; `int` selects the integer meaning of [`BinaryOp::Div`] and [`BinaryOp::Mod`].
    pub fn eval(self, a: f64, b: f64, int: bool) -> f64 {
        use BinaryOp::*;
        match self {
            Add => a + b,
            Sub => a - b,
            Mul => a * b,
            Div if int => {
                if b == 0.0 {
                    0.0
                } else {
                    (a / b).floor()
                }
            }
            Div => a / b,
            Mod if b == 0.0 && int => 0.0,
            Mod => a - b * (a / b).floor(),
            Pow => a.powf(b),
            // NaN wins in min and max, so that it is never lost in a reduction.
            Min => {
                if a.is_nan() || b.is_nan() {
                    f64::NAN
                } else {
                    a.min(b)
                }
            }
            Max => {
                if a.is_nan() || b.is_nan() {
                    f64::NAN
                } else {
                    a.max(b)
                }
            }
            Lt => f64::from(a < b),
            Le => f64::from(a <= b),
            Gt => f64::from(a > b),
            Ge => f64::from(a >= b),
            Eq => f64::from(a == b),
            Ne => f64::from(a != b),
            And => f64::from(a != 0.0 && b != 0.0),
            Or => f64::from(a != 0.0 || b != 0.0),
        }
    }
}

impl ReduceOp {
    /// Every operator.
    pub const ALL: [ReduceOp; 9] = {
        use ReduceOp::*;
        [Sum, Product, Min, Max, LogSumExp, Any, All, ArgMin, ArgMax]
    };

    /// Its spelling.
    pub fn name(self) -> &'static str {
        use ReduceOp::*;
        match self {
            Sum => "sum",
            Product => "product",
            Min => "min",
            Max => "max",
            LogSumExp => "logsumexp",
            Any => "any",
            All => "all",
            ArgMin => "argmin",
            ArgMax => "argmax",
        }
    }

    /// The operator with this spelling.
    pub fn from_name(name: &str) -> Option<ReduceOp> {
        ReduceOp::ALL.into_iter().find(|o| o.name() == name)
    }

    /// The value of an empty reduction (−1 for the index of an argument selection).
    pub fn identity(self) -> f64 {
        use ReduceOp::*;
        match self {
            Sum | Any => 0.0,
            Product | All => 1.0,
            Min => f64::INFINITY,
            Max | LogSumExp => f64::NEG_INFINITY,
            ArgMin | ArgMax => -1.0,
        }
    }

    /// The value of an empty reduction of elements of `dtype`: infinities saturate in integers.
    pub fn identity_of(self, dtype: DType) -> f64 {
        if dtype.is_float() { self.identity() } else { dtype.round(self.identity()) }
    }

    /// Whether `x`, as an element of `dtype`, is the value of an empty reduction.
    pub fn is_identity(self, x: f64, dtype: DType) -> bool {
        let x = if dtype.is_float() { x } else { dtype.round(x) };
        !self.selects_argument() && x == self.identity_of(dtype)
    }

    /// Whether the result is the position of an element, not a value.
    pub fn selects_argument(self) -> bool {
        matches!(self, ReduceOp::ArgMin | ReduceOp::ArgMax)
    }

    /// Two partial values joined; for argument selections the caller compares values and keeps the lower index.
    pub fn combine(self, a: f64, b: f64) -> f64 {
        use ReduceOp::*;
        match self {
            Sum => a + b,
            Product => a * b,
            Min | ArgMin => BinaryOp::Min.eval(a, b, false),
            Max | ArgMax => BinaryOp::Max.eval(a, b, false),
            LogSumExp => {
                let m = BinaryOp::Max.eval(a, b, false);
                if m.is_infinite() { m } else { m + ((a - m).exp() + (b - m).exp()).ln() }
            }
            Any => BinaryOp::Or.eval(a, b, false),
            All => BinaryOp::And.eval(a, b, false),
        }
    }
}

/// erf to float64 accuracy: the Taylor series below 2.5, a continued fraction of erfc above (Abramowitz & Stegun
/// 7.1.6 and 7.1.14).
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if x.is_nan() {
        return x;
    }
    let r = if a < 2.5 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term > sum * 1e-17 {
            n += 1.0;
            term *= 2.0 * a * a / (2.0 * n + 1.0);
            sum += term;
        }
        2.0 / std::f64::consts::PI.sqrt() * (-a * a).exp() * sum
    } else if a > 6.0 {
        1.0
    } else {
        let mut f = a;
        for k in (1..=60).rev() {
            f = a + f64::from(k) / 2.0 / f;
        }
        1.0 - (-a * a).exp() / (f * std::f64::consts::PI.sqrt())
    };
    r.copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for o in UnaryOp::ALL {
            assert_eq!(UnaryOp::from_name(o.name()), Some(o));
        }
        for o in BinaryOp::ALL {
            assert_eq!(BinaryOp::from_name(o.name()), Some(o));
        }
        for o in ReduceOp::ALL {
            assert_eq!(ReduceOp::from_name(o.name()), Some(o));
        }
    }

    #[test]
    fn erf_is_accurate() {
        // Reference values to 17 digits (NIST DLMF 7.23).
        for (x, y) in [
            (0.1, 0.112_462_916_018_284_9),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (3.0, 0.999_977_909_503_001_4),
        ] {
            assert!((UnaryOp::Erf.eval(x) - y).abs() < 4e-16, "{x}");
            assert_eq!(UnaryOp::Erf.eval(-x), -UnaryOp::Erf.eval(x));
        }
    }

    #[test]
    fn identities_are_neutral() {
        for o in ReduceOp::ALL {
            let x = if matches!(o, ReduceOp::Any | ReduceOp::All) { 1.0 } else { 2.5 };
            if !o.selects_argument() {
                assert_eq!(o.combine(o.identity(), x), x, "{o:?}");
            }
        }
        let most = f64::from(i32::MAX);
        assert_eq!(ReduceOp::Min.identity_of(DType::I32), most);
        assert!(ReduceOp::Min.is_identity(most, DType::I32) && !ReduceOp::Min.is_identity(most, DType::I64));
        assert!(ReduceOp::Max.is_identity(f64::NEG_INFINITY, DType::I8) && !ReduceOp::Max.is_identity(0.0, DType::I8));
    }
}
