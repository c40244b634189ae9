//! Scalar expressions over ranks and scalar parameters: what a launch computes before any kernel runs.
//!
//! A cascade's defaults (`scale: f32 = 1/sqrt(E)`) and facts (`require scale > 0`) become formulas of its artifact, so
//! that a launch needs no cascade. A formula is a list of steps in postfix order. Invariant: its value is what
//! [`scalar_value`](crate::cascade::bind::scalar_value) gives for the expression it was made of.

use serde::{Deserialize, Serialize};

use super::Artifact;
use crate::arena::Id;
use crate::cascade::{Cascade, Expr, ExprId, Size, SizeError, TensorId};
use crate::dtype::DType;
use crate::ops::{BinaryOp, UnaryOp};
use crate::tile::BufferId;

/// A scalar expression.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Formula(Vec<Step>);

/// A step of a formula: takes values from the stack and leaves one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Step {
    Int(i64),
    Float(f64),
    Size(Size),
    Scalar(BufferId),
    Unary(UnaryOp),
    Binary(BinaryOp),
    /// Of condition, value and other value.
    Select,
    Cast(DType),
}

/// What a formula is made of, besides operators.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Leaf<'a> {
    /// A number.
    Number(f64),
    /// An extent.
    Size(&'a Size),
    /// A scalar parameter.
    Scalar(BufferId),
}

/// Something declared that a caller must keep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fact {
    /// As the text has it.
    pub text: String,
    /// Not 0 where it holds.
    pub holds: Formula,
}

/// Why a formula has no value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormulaError {
    /// A scalar parameter without value and default.
    Missing(BufferId),
    /// An extent has no value.
    Size(SizeError),
    /// Steps that are no expression, or defaults that need each other.
    Malformed,
}

impl std::fmt::Display for FormulaError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FormulaError::Missing(b) => write!(f, "the scalar parameter {} has no value and no default", b.index()),
            FormulaError::Size(e) => write!(f, "an extent {e}"),
            FormulaError::Malformed => f.write_str("steps that are no expression, or defaults that need each other"),
        }
    }
}

impl std::error::Error for FormulaError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            FormulaError::Size(e) => Some(e),
            FormulaError::Missing(_) | FormulaError::Malformed => None,
        }
    }
}

/// Defaults that need defaults, at most.
const MAX_CHAIN: u32 = 64;

impl Formula {
    /// The formula of an expression; none where it reads anything but ranks and scalar parameters.
    fn of(c: &Cascade, e: ExprId, buffer: &impl Fn(TensorId) -> Option<BufferId>) -> Option<Formula> {
        let mut steps = Vec::new();
        flatten(c, e, buffer, &mut steps)?;
        Some(Formula(steps))
    }

    /// Whether it refers only to what the artifact has.
    pub(super) fn is_inside(&self, artifact: &Artifact) -> bool {
        self.0.iter().all(|s| match s {
            Step::Size(size) => {
                let mut known = true;
                size.for_each_rank(&mut |r| known &= r.index() < artifact.ranks.len());
                known
            }
            Step::Scalar(b) => artifact.buffers.get(*b).is_some_and(|b| b.is_scalar()),
            Step::Int(_) | Step::Float(_) | Step::Unary(_) | Step::Binary(_) | Step::Select | Step::Cast(_) => true,
        })
    }

    /// Its value for an extent per rank and the scalars given.
    ///
    /// # Errors
    /// [`FormulaError`].
    pub fn eval(&self, artifact: &Artifact, extents: &[u64], given: &[(BufferId, f64)]) -> Result<f64, FormulaError> {
        self.value(artifact, extents, given, 0).map(|(x, _)| x)
    }

    /// Rebuilds it as a tree: `leaf` makes numbers, extents and parameters, `apply` operators of their operands by their
    /// spelling. Division and remainder of integers are `floor_div` and `floor_mod`, a choice is `if`, a cast the type's
    /// name. None for steps that are no expression.
    pub fn fold<T>(
        &self,
        dtype: impl Fn(BufferId) -> DType,
        mut leaf: impl FnMut(Leaf<'_>) -> T,
        mut apply: impl FnMut(&'static str, Vec<T>) -> T,
    ) -> Option<T> {
        let mut stack: Vec<(T, bool)> = Vec::new();
        for step in &self.0 {
            let made = match step {
                Step::Int(i) => (leaf(Leaf::Number(*i as f64)), true),
                Step::Float(x) => (leaf(Leaf::Number(*x)), false),
                Step::Size(size) => (leaf(Leaf::Size(size)), true),
                Step::Scalar(b) => (leaf(Leaf::Scalar(*b)), !dtype(*b).is_float()),
                Step::Unary(op) => {
                    let (x, int) = stack.pop()?;
                    (apply(op.name(), vec![x]), int && keeps_integers(*op))
                }
                Step::Binary(op) => {
                    let ((y, j), (x, i)) = (stack.pop()?, stack.pop()?);
                    let name = match op {
                        BinaryOp::Div if i && j => "floor_div",
                        BinaryOp::Mod if i && j => "floor_mod",
                        op => op.name(),
                    };
                    (apply(name, vec![x, y]), is_integer(*op, i && j))
                }
                Step::Select => {
                    let (other, value, condition) = (stack.pop()?, stack.pop()?, stack.pop()?);
                    let int = value.1 && other.1;
                    (apply("if", vec![condition.0, value.0, other.0]), int)
                }
                Step::Cast(d) => (apply(d.name(), vec![stack.pop()?.0]), !d.is_float()),
            };
            stack.push(made);
        }
        let (whole, _) = stack.pop()?;
        stack.is_empty().then_some(whole)
    }

    /// The value, and whether it is an integer.
    fn value(
        &self,
        artifact: &Artifact,
        extents: &[u64],
        given: &[(BufferId, f64)],
        chain: u32,
    ) -> Result<(f64, bool), FormulaError> {
        // What has no value makes only what is computed from it fail: a selection drops the side it does not take.
        let mut stack: Vec<Result<(f64, bool), FormulaError>> = Vec::new();
        for step in &self.0 {
            let mut pop = || stack.pop().ok_or(FormulaError::Malformed);
            let value = match step {
                Step::Int(i) => Ok((*i as f64, true)),
                Step::Float(x) => Ok((*x, false)),
                Step::Size(size) => size.eval(extents).map(|n| (n as f64, true)).map_err(FormulaError::Size),
                Step::Scalar(b) => {
                    let dtype = artifact.buffers[*b].dtype;
                    let default = artifact.defaults.iter().find(|(of, _)| of == b).map(|(_, formula)| formula);
                    let x = match (given.iter().find(|(of, _)| of == b), default) {
                        (Some((_, x)), _) => Ok(*x),
                        (None, Some(_)) if chain == MAX_CHAIN => return Err(FormulaError::Malformed),
                        (None, Some(d)) => d.value(artifact, extents, given, chain + 1).map(|(x, _)| dtype.round(x)),
                        (None, None) => Err(FormulaError::Missing(*b)),
                    };
                    x.map(|x| (x, !dtype.is_float()))
                }
                Step::Unary(op) => pop()?.map(|(x, int)| (op.eval(x), int && keeps_integers(*op))),
                Step::Binary(op) => {
                    let (y, x) = (pop()?, pop()?);
                    x.and_then(|(x, i)| {
                        let (y, j) = y?;
                        Ok((op.eval(x, y, i && j), is_integer(*op, i && j)))
                    })
                }
                Step::Select => {
                    let (other, value, condition) = (pop()?, pop()?, pop()?);
                    condition.and_then(|(holds, _)| if holds != 0.0 { value } else { other })
                }
                Step::Cast(d) => pop()?.map(|(x, _)| (d.round(x), !d.is_float())),
            };
            stack.push(value);
        }
        match stack.pop() {
            Some(value) if stack.is_empty() => value,
            _ => Err(FormulaError::Malformed),
        }
    }
}

/// Whether an operator's result is an integer for an integer.
fn keeps_integers(op: UnaryOp) -> bool {
    matches!(op, UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Sign | UnaryOp::Not)
}

/// Whether an operator's result is an integer; `of`: its operands are.
fn is_integer(op: BinaryOp, of: bool) -> bool {
    (of && op != BinaryOp::Pow) || op.is_predicate()
}

fn flatten(
    c: &Cascade,
    e: ExprId,
    buffer: &impl Fn(TensorId) -> Option<BufferId>,
    steps: &mut Vec<Step>,
) -> Option<()> {
    let mut all = |operands: &[ExprId]| operands.iter().try_for_each(|e| flatten(c, *e, buffer, steps));
    let step = match &c.exprs[e] {
        Expr::Int(i) => Step::Int(*i),
        Expr::Float(x) => Step::Float(*x),
        Expr::Size(s) => Step::Size(s.clone()),
        Expr::Read { tensor, at } if at.is_empty() => Step::Scalar(buffer(*tensor)?),
        Expr::Unary(op, a) => {
            all(&[*a])?;
            Step::Unary(*op)
        }
        Expr::Binary(op, a, b) => {
            all(&[*a, *b])?;
            Step::Binary(*op)
        }
        Expr::Select(p, a, b) => {
            all(&[*p, *a, *b])?;
            Step::Select
        }
        Expr::Cast(d, a) => {
            all(&[*a])?;
            Step::Cast(*d)
        }
        Expr::Read { .. }
        | Expr::Index(_)
        | Expr::Tuple(_)
        | Expr::Reduce { .. }
        | Expr::Scan { .. }
        | Expr::Segment { .. }
        | Expr::Rand { .. } => return None,
    };
    steps.push(step);
    Some(())
}

impl Artifact {
    /// With the defaults and facts of the cascade it was made of, whose ranks and parameters are its own.
    pub fn with_formulas(mut self, c: &Cascade) -> Artifact {
        let buffer = |t: TensorId| {
            let name = &c.tensors[t].name;
            self.buffers.iter().find(|(_, b)| b.is_scalar() && b.name == *name).map(|(id, _)| id)
        };
        let default = |t: &TensorId| Some((buffer(*t)?, Formula::of(c, c.tensors[*t].default?, &buffer)?));
        let fact = |e: &ExprId| {
            Some(Fact { text: crate::cascade::print::expr_text_of(c, *e), holds: Formula::of(c, *e, &buffer)? })
        };
        let (defaults, facts) =
            (c.params.iter().filter_map(default).collect(), c.requires.iter().filter_map(fact).collect());
        (self.defaults, self.facts) = (defaults, facts);
        self
    }

    /// The values of the scalar parameters that are not given and have a default.
    ///
    /// # Errors
    /// [`FormulaError`].
    pub fn default_scalars(
        &self,
        extents: &[u64],
        given: &[(BufferId, f64)],
    ) -> Result<Vec<(BufferId, f64)>, FormulaError> {
        let open = self.defaults.iter().filter(|(b, _)| given.iter().all(|(g, _)| g != b));
        open.map(|(b, f)| Ok((*b, f.eval(self, extents, given)?))).collect()
    }

    /// The first fact that does not hold; those over scalars that are neither given nor have a default are passed over.
    ///
    /// # Errors
    /// [`FormulaError`].
    pub fn broken_fact(&self, extents: &[u64], given: &[(BufferId, f64)]) -> Result<Option<&Fact>, FormulaError> {
        for fact in &self.facts {
            match fact.holds.eval(self, extents, given) {
                Ok(v) if v != 0.0 => {}
                Ok(_) => return Ok(Some(fact)),
                Err(FormulaError::Missing(_)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
