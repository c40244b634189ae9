//! Random inputs of a cascade: seeded, per type, with adversarial variants.
//!
//! Invariant: an element depends on the seed, its parameter and its position alone. Integer parameters that index
//! tensors stay in range, lengths within their rank and offsets are monotone, unless the variant says otherwise;
//! scalars with a default take it.

use crate::arena::Id;
use crate::array::{Array, element_count};
use crate::cascade::bind::{BindError, Bindings, fill_defaults};
use crate::cascade::eval::philox::philox4x32;
use crate::cascade::{Cascade, Expr, SizeError, TensorId};
use crate::dtype::DType;
use crate::ops::BinaryOp;
use crate::tile::{BufferKind, Plan};

/// How the float parameters are distributed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Standard normal.
    Normal,
    /// Normal with a standard deviation of 1/8: recurrences stay far from chaos.
    Small,
    /// Uniform in [−1, 1).
    Uniform,
    /// Integers from −4 to 4: contractions are exact.
    Integers,
    /// Normal with a standard deviation of 30: softmax saturates.
    Large,
    /// Normal with about one element in 16 at ±200: a softmax that misses its maximum overflows.
    Spikes,
    /// Of {−1, 0, 1}: many ties.
    Ties,
    /// Normal with an infinity or NaN in about one of 16 elements.
    NonFinite,
    /// Normal, with integer parameters from the type's whole range: hostile indices and offsets.
    Hostile,
}

impl Variant {
    /// Every variant.
    pub const ALL: [Variant; 9] = [
        Variant::Normal,
        Variant::Small,
        Variant::Uniform,
        Variant::Integers,
        Variant::Large,
        Variant::Spikes,
        Variant::Ties,
        Variant::NonFinite,
        Variant::Hostile,
    ];
}

/// One array per parameter, as it is stored: of packed elements their bytes.
///
/// # Errors
/// An extent or default without a value.
pub fn random(c: &Cascade, b: &Bindings, seed: u64, variant: Variant) -> Result<Vec<Array>, BindError> {
    let mut given = Vec::new();
    for id in &c.params {
        let t = &c.tensors[*id];
        if t.default.is_some() {
            given.push(None);
            continue;
        }
        let dims = b.dims(c, *id)?;
        let n = element_count(&dims).unwrap_or(0);
        let role = role(c, b, *id)?;
        let draw = |i: u64| Draw {
            words: philox4x32([i as u32, (i >> 32) as u32, id.index() as u32, 0], [seed as u32, (seed >> 32) as u32]),
        };
        let mut data: Vec<f64> = (0..n).map(|i| draw(i).element(t.dtype, role, variant, dims.is_empty())).collect();
        if let (Role::Offsets(extent), false) = (role, variant == Variant::Hostile) {
            data.sort_by(f64::total_cmp);
            if let [first, .., last] = &mut data[..] {
                (*first, *last) = (0.0, extent as f64);
            }
        }
        let data = data.into_iter().map(|x| t.dtype.round(x)).collect();
        let array = Array { dtype: t.dtype, dims, data };
        given.push(Some(t.storage.packing.map_or(array.clone(), |order| array.packed(order))));
    }
    fill_defaults(c, b, &given)
}

/// One array per input and inout of a plan, in order; integers are plain values.
///
/// # Errors
/// An extent without a value.
pub fn random_for_plan(plan: &Plan, ranks: &[u64], seed: u64, variant: Variant) -> Result<Vec<Array>, SizeError> {
    let mut given = Vec::new();
    for (id, buffer) in plan.buffers.iter() {
        if !matches!(buffer.kind, BufferKind::Input | BufferKind::InOut) {
            continue;
        }
        let dims = buffer.dims.iter().map(|d| d.eval(ranks)).collect::<Result<Vec<u64>, SizeError>>()?;
        let scalar = dims.is_empty();
        given.push(Array::from_fn(buffer.dtype, &dims, |i| {
            let key = [seed as u32, (seed >> 32) as u32];
            let words = philox4x32([i as u32, (i as u64 >> 32) as u32, id.index() as u32, 1], key);
            buffer.dtype.round(Draw { words }.element(buffer.dtype, Role::Value, variant, scalar))
        }));
    }
    Ok(given)
}

/// What an integer parameter is used for.
#[derive(Clone, Copy)]
enum Role {
    /// Plain values.
    Value,
    /// Positions below this extent.
    Position(u64),
    /// Offsets into an index of this extent.
    Offsets(u64),
    /// A length or window compared with an index of this extent.
    Length(u64),
}

/// What parameter `id` is used for: the smallest extent it indexes.
fn role(c: &Cascade, b: &Bindings, id: TensorId) -> Result<Role, BindError> {
    let mut role = Role::Value;
    let mut failed = None;
    let mut indexes = |at: &[crate::cascade::ExprId], t: TensorId| {
        let dims = match b.dims(c, t) {
            Ok(d) => d,
            Err(e) => return failed = Some(e),
        };
        for (e, d) in at.iter().zip(dims) {
            c.walk(*e, &mut |_, x| {
                if matches!(x, Expr::Read { tensor, .. } if *tensor == id) {
                    role = match role {
                        Role::Position(old) => Role::Position(old.min(d)),
                        Role::Value | Role::Length(_) => Role::Position(d),
                        Role::Offsets(n) => Role::Offsets(n),
                    };
                }
            });
        }
    };
    for e in c.einsums() {
        e.targets.iter().for_each(|t| indexes(&t.at, t.tensor));
    }
    for (_, e) in c.exprs.iter() {
        if let Expr::Read { tensor, at } = e {
            indexes(at, *tensor);
        }
    }
    for (_, e) in c.exprs.iter() {
        if let Expr::Segment { offsets, of } = e
            && *offsets == id
        {
            role = Role::Offsets(b.sizes(c, "an index", std::slice::from_ref(&c.indices[*of].extent))?[0]);
        }
    }
    if let Role::Value = role {
        for f in c.einsums().filter_map(|e| e.filter) {
            c.walk(f, &mut |_, x| {
                if let Expr::Binary(BinaryOp::Lt | BinaryOp::Le | BinaryOp::Gt | BinaryOp::Ge, l, r) = x {
                    let (mut reads, mut extent) = (false, None);
                    for side in [*l, *r] {
                        c.walk(side, &mut |_, y| match y {
                            Expr::Read { tensor, .. } => reads |= *tensor == id,
                            Expr::Index(i) => extent = b.size(&c.indices[*i].extent).ok().max(extent),
                            Expr::Int(_)
                            | Expr::Float(_)
                            | Expr::Size(_)
                            | Expr::Unary(..)
                            | Expr::Binary(..)
                            | Expr::Select(..)
                            | Expr::Cast(..)
                            | Expr::Tuple(_)
                            | Expr::Reduce { .. }
                            | Expr::Scan { .. }
                            | Expr::Segment { .. }
                            | Expr::Rand { .. } => {}
                        });
                    }
                    if let (true, Some(n)) = (reads, extent) {
                        role = Role::Length(n);
                    }
                }
            });
        }
    }
    failed.map_or(Ok(role), Err)
}

/// Random words of one element.
struct Draw {
    words: [u32; 4],
}

impl Draw {
    /// Uniform in (0, 1).
    fn unit(&self, word: usize) -> f64 {
        (f64::from(self.words[word]) + 0.5) * 2f64.powi(-32)
    }

    /// Standard normal (Box & Muller 1958).
    fn normal(&self) -> f64 {
        (-2.0 * self.unit(0).ln()).sqrt() * (std::f64::consts::TAU * self.unit(1)).cos()
    }

    fn below(&self, n: u64) -> f64 {
        (self.unit(0) * n as f64).floor().min(n.saturating_sub(1) as f64)
    }

    fn element(&self, dtype: DType, role: Role, variant: Variant, scalar: bool) -> f64 {
        if dtype == DType::Bool {
            return self.below(2);
        }
        if !dtype.is_float() {
            let whole = dtype.min_finite() + self.unit(0) * (dtype.max_finite() - dtype.min_finite());
            return match (variant, role) {
                (Variant::Hostile, _) => whole,
                (_, Role::Position(n)) => self.below(n),
                (_, Role::Offsets(n)) => self.below(n + 1),
                // Mostly one or more; sometimes none.
                (_, Role::Length(n)) if !self.words[2].is_multiple_of(16) => 1.0 + self.below(n),
                (_, Role::Length(_)) => 0.0,
                (_, Role::Value) if dtype == DType::U4 => self.below(16),
                (_, Role::Value) => (self.below(17) - 8.0).max(dtype.min_finite()),
            };
        }
        if scalar {
            // Scalars scale: positive and of order one.
            return 0.5 + self.unit(0);
        }
        match variant {
            Variant::Normal | Variant::Hostile => self.normal(),
            Variant::Small => 0.125 * self.normal(),
            Variant::Uniform => 2.0 * self.unit(0) - 1.0,
            Variant::Integers => self.below(9) - 4.0,
            Variant::Large => 30.0 * self.normal(),
            Variant::Spikes => match self.words[2] % 32 {
                0 => 200.0,
                1 => -200.0,
                _ => self.normal(),
            },
            Variant::Ties => self.below(3) - 1.0,
            Variant::NonFinite => match self.words[2] % 48 {
                0 => f64::INFINITY,
                1 => f64::NEG_INFINITY,
                2 => f64::NAN,
                _ => self.normal(),
            },
        }
    }
}
