//! Evaluation of cascades: float64 reference values, worst-case error bounds, and randomised simulation of the
//! declared types, by one traversal over several arithmetics.
//!
//! Invariant: an evaluation ends with a result or an [`EvalError`]; sizes beyond [`Limits`] are errors. Semantics:
//! docs/language.md.

pub mod bound;
mod compile;
pub mod declared;
pub mod domain;
mod error;
pub mod philox;
mod program;
mod run;

pub use error::EvalError;

use self::bound::Bounded;
use self::compile::Context;
use self::declared::{Declared, Rounding};
use self::domain::{Domain, Plain, Ty};
use self::program::{Place, Program};
use self::run::{Machine, Store};
use super::bind::{BindError, Bindings, check_facts, fill_defaults};
use super::{Cascade, Einsum, IndexId, Output, OutputSource, Stmt, TensorId, TensorKind};
use crate::arena::Id;
use crate::array::{Array, element_count};
use crate::dtype::DType;

/// What an evaluation may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Elements of all tensors together.
    pub elements: u64,
    /// Points of one Einsum's iteration space.
    pub points: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { elements: 1 << 28, points: 1 << 40 }
    }
}

/// How to evaluate.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// What it may use.
    pub limits: Limits,
    /// Whether a position outside its tensor is an error instead of a 0 or a dropped write.
    pub checked: bool,
}

/// One statement's programs.
enum Step {
    /// An Einsum: its program.
    Once(usize),
    /// An iteration: initial programs, body programs, extent, direction.
    Iterate { inits: Vec<usize>, body: Vec<usize>, extent: u64, rev: bool },
}

/// How one element of a tensor is computed alone.
struct Demand {
    program: usize,
    /// The mixed-radix digits of a linear position: `(slot, coefficient)`, largest coefficient first.
    digits: Vec<(u32, i64)>,
}

/// A cascade compiled for one set of extents.
pub(crate) struct Plan {
    programs: Vec<Program>,
    steps: Vec<Step>,
    dims: Vec<Vec<u64>>,
    partial: Vec<bool>,
    demand: Vec<Option<Demand>>,
    n_tensors: usize,
}

/// The result of an evaluation: every tensor by name, and the outputs.
pub struct Evaluation<'a, V> {
    c: &'a Cascade,
    dims: Vec<Vec<u64>>,
    stores: Vec<Store<V>>,
    outputs: Vec<Elements<V>>,
}

/// Elements in row-major order with their support.
#[derive(Clone, Debug)]
pub struct Elements<V> {
    /// The element type declared.
    pub dtype: DType,
    /// Extents.
    pub dims: Vec<u64>,
    /// Values; those outside the support mean nothing.
    pub values: Vec<V>,
    /// Which elements are present; none when all are.
    pub support: Option<Vec<bool>>,
}

impl Elements<f64> {
    /// The values alone.
    pub fn into_array(self) -> Array {
        Array { dtype: self.dtype, dims: self.dims, data: self.values }
    }
}

/// The outputs of `c` in order, in float64 (not rounded to their types). Inputs are the parameters in order; those
/// with a default may all be left out. Packed ones are given by their bytes or by their elements, and come as elements.
///
/// ```
/// use einfall_ir::array::Array;
/// use einfall_ir::cascade::bind::{Given, bind};
/// use einfall_ir::cascade::{eval::evaluate, parse};
/// use einfall_ir::dtype::DType;
///
/// let module = parse("cascade rows[M, N](x: f32[M,N]) -> (y: f32[M]) { y[m] = sum(n) x[m,n] }").expect("it is right");
/// let c = &module.cascades[0];
/// let sizes = bind(c, &Given { sizes: vec![("M".into(), 2), ("N".into(), 3)], ..Given::default() })?;
/// let x = Array { dtype: DType::F32, dims: vec![2, 3], data: vec![1., 2., 3., 4., 5., 6.] };
/// assert_eq!(evaluate(c, &sizes, &[x])?[0].data, [6.0, 15.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Inputs that do not fit, facts that do not hold, sizes over the limits.
pub fn evaluate(c: &Cascade, b: &Bindings, inputs: &[Array]) -> Result<Vec<Array>, EvalError> {
    let e = evaluate_in(c, b, inputs, &Options::default(), Plain)?;
    (0..c.outputs.len()).map(|i| e.output(i).map(Elements::into_array)).collect()
}

/// As [`evaluate`], with every intermediate kept.
///
/// # Errors
/// As [`evaluate`]; in checked mode also positions outside their tensors.
pub fn evaluate_all<'a>(
    c: &'a Cascade,
    b: &Bindings,
    inputs: &[Array],
    options: &Options,
) -> Result<Evaluation<'a, f64>, EvalError> {
    evaluate_in(c, b, inputs, options, Plain)
}

/// Float64 with a worst-case absolute error bound of any admissible evaluation in the declared types.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_bounds<'a>(
    c: &'a Cascade,
    b: &Bindings,
    inputs: &[Array],
    options: &Options,
) -> Result<Evaluation<'a, bound::Bound>, EvalError> {
    evaluate_in(c, b, inputs, options, Bounded::default())
}

/// One randomised evaluation in the declared types: stochastic rounding, random summation order, intrinsics
/// perturbed by their ulps. [`Rounding::Nearest`] stands for a device, [`Rounding::Stochastic`] explores.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_declared<'a>(
    c: &'a Cascade,
    b: &Bindings,
    inputs: &[Array],
    options: &Options,
    seed: u64,
    rounding: Rounding,
) -> Result<Evaluation<'a, f64>, EvalError> {
    evaluate_in(c, b, inputs, options, Declared::new(seed, rounding))
}

fn evaluate_in<'a, D: Arithmetic>(
    c: &'a Cascade,
    b: &Bindings,
    inputs: &[Array],
    options: &Options,
    domain: D,
) -> Result<Evaluation<'a, D::Value>, EvalError> {
    let inputs = prepare(c, b, inputs)?;
    let plan = plan(c, b, D::PERMISSIONS && !c.exact, &vec![false; c.tensors.len()])?;
    let mut m = Machine::new(c, &plan, options.limits, options.checked, domain);
    load(&mut m, c, &inputs)?;
    for step in &plan.steps {
        run_step(&mut m, step)?;
    }
    let Machine { stores, mut domain, .. } = m;
    let mut e = Evaluation { c, dims: plan.dims, stores, outputs: Vec::new() };
    for o in &c.outputs {
        let mut elements = e.slice(b, o)?;
        let stored = output_tensor(o);
        // An output of another type than its tensor rounds once more.
        if c.tensors[stored].dtype != o.dtype {
            let ty = Ty::of(c.tensors[stored].dtype);
            elements.values.iter_mut().for_each(|v| *v = domain.store(o.dtype, ty, *v));
        }
        e.outputs.push(elements);
    }
    Ok(e)
}

/// A domain and whether it takes the default rounding points.
pub(crate) trait Arithmetic: Domain {
    const PERMISSIONS: bool;
}

impl Arithmetic for Plain {
    const PERMISSIONS: bool = false;
}
impl Arithmetic for Bounded {
    const PERMISSIONS: bool = true;
}
impl Arithmetic for Declared {
    const PERMISSIONS: bool = true;
}

/// Float64 values of chosen points of output `output`, computing only what they need. Statements in iterations and
/// those with scatters, several targets or irregular left sides are evaluated whole.
///
/// # Errors
/// As [`evaluate`]; a point outside the output.
pub fn evaluate_points(
    c: &Cascade,
    b: &Bindings,
    inputs: &[Array],
    options: &Options,
    output: usize,
    points: &[Vec<u64>],
) -> Result<Vec<f64>, EvalError> {
    points_in(c, b, inputs, options, Plain, output, points)
}

/// As [`evaluate_points`], with error bounds.
///
/// # Errors
/// As [`evaluate_points`].
pub fn bound_points(
    c: &Cascade,
    b: &Bindings,
    inputs: &[Array],
    options: &Options,
    output: usize,
    points: &[Vec<u64>],
) -> Result<Vec<bound::Bound>, EvalError> {
    points_in(c, b, inputs, options, Bounded::default(), output, points)
}

/// As [`evaluate_points`], in the declared types with stochastic rounding.
///
/// # Errors
/// As [`evaluate_points`].
pub fn declared_points(
    c: &Cascade,
    b: &Bindings,
    inputs: &[Array],
    options: &Options,
    seed: u64,
    output: usize,
    points: &[Vec<u64>],
) -> Result<Vec<f64>, EvalError> {
    points_in(c, b, inputs, options, Declared::new(seed, Rounding::Stochastic), output, points)
}

fn points_in<D: Arithmetic>(
    c: &Cascade,
    b: &Bindings,
    inputs: &[Array],
    options: &Options,
    domain: D,
    output: usize,
    points: &[Vec<u64>],
) -> Result<Vec<D::Value>, EvalError> {
    let o = c.outputs.get(output).ok_or_else(|| EvalError::NoSuchPoint { what: format!("output {output}") })?;
    let inputs = prepare(c, b, inputs)?;
    let demanded = demandable(c);
    let plan = plan(c, b, D::PERMISSIONS && !c.exact, &demanded)?;
    let mut m = Machine::new(c, &plan, options.limits, options.checked, domain);
    load(&mut m, c, &inputs)?;
    let needed = needed(c, o);
    for (t, _) in demanded.iter().enumerate().filter(|(t, d)| **d && plan.demand[*t].is_some()) {
        m.stores[t] = Store::Demanded(Default::default());
    }
    for (step, stmt) in plan.steps.iter().zip(&c.stmts) {
        let whole = match stmt {
            Stmt::Einsum(e) => e
                .targets
                .iter()
                .any(|t| needed[t.tensor.index()] && !matches!(m.stores[t.tensor.index()], Store::Demanded(_))),
            Stmt::Iter(i) => i.inits.iter().chain(&i.body).flat_map(|e| &e.targets).any(|t| needed[t.tensor.index()]),
        };
        if whole {
            run_step(&mut m, step)?;
        }
    }
    let (tensor, first) = source(b, o)?;
    let dims = &plan.dims[tensor.index()];
    let strides = crate::array::strides(dims);
    let out_dims = b.sizes(c, &o.name, &o.dims)?;
    points
        .iter()
        .map(|p| {
            if p.len() != out_dims.len() || p.iter().zip(&out_dims).any(|(x, d)| x >= d) {
                return Err(EvalError::NoSuchPoint { what: format!("point {p:?} in {} {out_dims:?}", o.name) });
            }
            let mut at: Vec<u64> = p.clone();
            match &o.source {
                OutputSource::Whole(_) => {}
                OutputSource::Points { .. } => at[0] += first,
                OutputSource::Point { .. } => at.insert(0, first),
            }
            let linear = at.iter().zip(&strides).map(|(x, s)| *x as i64 * s).sum();
            Ok(m.element(tensor.index() as u32, linear)?.0)
        })
        .collect()
}

/// The tensor behind an output.
fn output_tensor(o: &Output) -> TensorId {
    match &o.source {
        OutputSource::Whole(t) => *t,
        OutputSource::Points { state, .. } | OutputSource::Point { state, .. } => *state,
    }
}

/// The tensor behind an output and the first point of a slice.
fn source(b: &Bindings, o: &Output) -> Result<(TensorId, u64), EvalError> {
    let size = |s| {
        b.size(s)
            .map_err(|error| EvalError::Bind(BindError::Size { place: o.name.clone(), size: format!("{s:?}"), error }))
    };
    Ok(match &o.source {
        OutputSource::Whole(t) => (*t, 0),
        OutputSource::Points { state, from, .. } => (*state, size(from)?),
        OutputSource::Point { state, at } => (*state, size(at)?),
    })
}

/// Tensors that an output depends on.
fn needed(c: &Cascade, o: &Output) -> Vec<bool> {
    let mut needed = vec![false; c.tensors.len()];
    needed[output_tensor(o).index()] = true;
    let mut changed = true;
    while changed {
        changed = false;
        for e in c.einsums().filter(|e| e.targets.iter().any(|t| needed[t.tensor.index()])).collect::<Vec<_>>() {
            for root in e.roots() {
                c.walk(root, &mut |_, x| {
                    if let super::Expr::Read { tensor, .. } | super::Expr::Segment { offsets: tensor, .. } = x {
                        changed |= !std::mem::replace(&mut needed[tensor.index()], true);
                    }
                });
            }
        }
    }
    needed
}

/// Tensors assigned by exactly one plain Einsum outside iterations.
fn demandable(c: &Cascade) -> Vec<bool> {
    let mut writers = vec![0u32; c.tensors.len()];
    let mut plain = vec![false; c.tensors.len()];
    for e in c.einsums() {
        e.targets.iter().for_each(|t| writers[t.tensor.index()] += 1);
    }
    for s in &c.stmts {
        if let Stmt::Einsum(e) = s
            && let [t] = &e.targets[..]
            && e.join.is_none()
            && writers[t.tensor.index()] == 1
        {
            let t = &c.tensors[t.tensor];
            let block = t.storage.block_scale.is_some();
            let owned = matches!(t.kind, TensorKind::Intermediate | TensorKind::Output);
            plain[e.targets[0].tensor.index()] = owned && !block;
        }
    }
    plain
}

/// The inputs in parameter order, defaults filled, unpacked, checked against the declarations.
fn prepare(c: &Cascade, b: &Bindings, inputs: &[Array]) -> Result<Vec<Array>, EvalError> {
    let open = |id: &TensorId| c.tensors[*id].default.is_none();
    let given: Vec<Option<Array>> = if inputs.len() == c.params.len() {
        inputs.iter().cloned().map(Some).collect()
    } else if inputs.len() == c.params.iter().filter(|id| open(id)).count() {
        let mut rest = inputs.iter().cloned();
        c.params.iter().map(|id| if open(id) { rest.next() } else { None }).collect()
    } else {
        return Err(EvalError::InputCount { expected: c.params.len(), actual: inputs.len() });
    };
    let mut arrays = fill_defaults(c, b, &given)?;
    let mut scalars = Vec::new();
    for (id, a) in c.params.iter().zip(&mut arrays) {
        let (t, dims) = (&c.tensors[*id], b.dims(c, *id)?);
        if let (Some(order), Some(last)) = (t.storage.packing, dims.last())
            && a.dtype == DType::U8
        {
            match a.unpacked(t.dtype, order, *last) {
                Some(elements) => *a = elements,
                None => {
                    let expected = b.sizes(c, &t.name, &t.stored().1)?;
                    return Err(EvalError::InputShape { tensor: t.name.clone(), expected, actual: a.dims.clone() });
                }
            }
        }
        if a.dtype != t.dtype {
            return Err(EvalError::InputType { tensor: t.name.clone(), expected: t.dtype, actual: a.dtype });
        }
        if a.dims != dims || element_count(&dims) != Some(a.data.len() as u64) {
            return Err(EvalError::InputShape { tensor: t.name.clone(), expected: dims, actual: a.dims.clone() });
        }
        if let [x] = a.data[..]
            && dims.is_empty()
        {
            scalars.push((*id, x));
        }
    }
    check_facts(c, b, &scalars)?;
    Ok(arrays)
}

fn load<D: Domain>(m: &mut Machine<D>, c: &Cascade, inputs: &[Array]) -> Result<(), EvalError> {
    for (id, a) in c.params.iter().zip(inputs) {
        m.reserve(&c.tensors[*id].name, &a.dims)?;
        let data = a.data.iter().map(|x| m.domain.exact(*x)).collect();
        m.stores[id.index()] = Store::Dense(data, None);
    }
    Ok(())
}

fn run_step<D: Domain>(m: &mut Machine<D>, step: &Step) -> Result<(), EvalError> {
    let plan = m.plan;
    match step {
        Step::Once(p) => m.execute(&plan.programs[*p], 0),
        Step::Iterate { inits, body, extent, rev } => {
            for p in inits {
                m.execute(&plan.programs[*p], 0)?;
            }
            for p in body {
                m.prepare(&plan.programs[*p])?;
            }
            for n in 0..*extent {
                let t = if *rev { extent - 1 - n } else { n };
                for p in body {
                    m.execute(&plan.programs[*p], t)?;
                }
            }
            Ok(())
        }
    }
}

/// Compiles every statement; repeats until the set of tensors on partial support is stable.
fn plan(c: &Cascade, b: &Bindings, permissions: bool, demanded: &[bool]) -> Result<Plan, EvalError> {
    let dims = c.tensors.ids().map(|t| b.dims(c, t)).collect::<Result<Vec<_>, _>>()?;
    let kinds = super::types::kinds(c);
    let mut partial = vec![false; c.tensors.len()];
    loop {
        let mut hidden = c.tensors.len() as u32;
        let mut programs = Vec::new();
        let mut add = |e: &Einsum, iterated: Option<IndexId>| {
            let cx = Context { c, b, permissions, partial: &partial, demanded, kinds: &kinds, iterated };
            programs.push(compile::compile(&cx, e, &mut hidden)?);
            Ok::<usize, EvalError>(programs.len() - 1)
        };
        let mut steps = Vec::new();
        for s in &c.stmts {
            steps.push(match s {
                Stmt::Einsum(e) => Step::Once(add(e, None)?),
                Stmt::Iter(i) => Step::Iterate {
                    inits: i.inits.iter().map(|e| add(e, Some(i.index))).collect::<Result<_, _>>()?,
                    body: i.body.iter().map(|e| add(e, Some(i.index))).collect::<Result<_, _>>()?,
                    extent: b.sizes(c, "an iteration", std::slice::from_ref(&i.extent))?[0],
                    rev: i.rev,
                },
            });
        }
        let mut next = partial.clone();
        for p in programs.iter().filter(|p| p.partial) {
            p.targets.iter().filter(|t| !t.in_place).for_each(|t| next[t.tensor as usize] = true);
        }
        if next == partial {
            let mut demand: Vec<Option<Demand>> = c.tensors.iter().map(|_| None).collect();
            for s in &steps {
                if let Step::Once(p) = s
                    && let [t] = programs[*p].targets[..]
                    && demanded[t.tensor as usize]
                {
                    demand[t.tensor as usize] = Demand::of(*p, &programs[*p]);
                }
            }
            return Ok(Plan { programs, steps, dims, partial, demand, n_tensors: hidden as usize });
        }
        partial = next;
    }
}

impl Demand {
    /// How to invert the left side of `program`, if its positions are mixed-radix in the free indices.
    fn of(program: usize, p: &Program) -> Option<Demand> {
        let Place::Cursor(cursor) = p.endings.first()?.first()?.place else { return None };
        if p.cursors[cursor as usize] != 0 || p.endings[0][0].count != 1 {
            return None;
        }
        // The linear position is a sum of coefficient · index; written in mixed radix it inverts digit by digit.
        let mut terms: Vec<(u32, i64, u64)> = Vec::new();
        for l in &p.free {
            let c: i64 = l.cursors.iter().filter(|(c, _)| *c == cursor).map(|(_, s)| *s).sum();
            if l.extent == 0 || (c <= 0 && l.extent > 1) {
                return None;
            }
            terms.push((l.slot, c, l.extent));
        }
        terms.retain(|(_, _, extent)| *extent > 1);
        terms.sort_by_key(|(_, c, _)| std::cmp::Reverse(*c));
        let mut below = 1i64;
        for (_, c, extent) in terms.iter().rev() {
            if *c < below {
                return None;
            }
            below = c.checked_mul(*extent as i64)?;
        }
        Some(Demand { program, digits: terms.iter().map(|(s, c, _)| (*s, *c)).collect() })
    }

    /// Sets the free indices of the point that writes linear position `at`.
    fn invert(&self, at: i64, p: &Program, slots: &mut [i64]) {
        p.free.iter().for_each(|l| slots[l.slot as usize] = 0);
        let mut rest = at;
        for (slot, c) in &self.digits {
            slots[*slot as usize] = rest / c;
            rest %= c;
        }
    }
}

impl<V: Copy> Evaluation<'_, V> {
    /// Output `i` in order, in the output's type.
    ///
    /// # Errors
    /// No such output.
    pub fn output(&self, i: usize) -> Result<Elements<V>, EvalError> {
        self.outputs.get(i).cloned().ok_or_else(|| EvalError::NoSuchPoint { what: format!("output {i}") })
    }

    fn slice(&self, b: &Bindings, o: &Output) -> Result<Elements<V>, EvalError> {
        let none = || EvalError::NoSuchPoint { what: format!("value of output {}", o.name) };
        let dims = b.sizes(self.c, &o.name, &o.dims)?;
        let (tensor, first) = source(b, o)?;
        let n = element_count(&dims).ok_or_else(none)? as usize;
        if n == 0 {
            return Ok(Elements { dtype: o.dtype, dims, values: Vec::new(), support: None });
        }
        let all = self.elements(tensor).ok_or_else(none)?;
        let row = match &o.source {
            OutputSource::Whole(_) => 0,
            OutputSource::Points { .. } | OutputSource::Point { .. } => {
                first as usize * element_count(&self.dims[tensor.index()][1..]).ok_or_else(none)? as usize
            }
        };
        let values = all.values.get(row..row + n).ok_or_else(none)?.to_vec();
        let support = all.support.map(|s| s[row..row + n].to_vec());
        Ok(Elements { dtype: o.dtype, dims, values, support })
    }

    /// Everything a caller sees: the outputs, then the parameters written in place, with their names.
    pub fn results(&self) -> Vec<(String, Elements<V>)> {
        let outputs = self.c.outputs.iter().zip(&self.outputs).map(|(o, e)| (o.name.clone(), e.clone()));
        let in_place = self.c.params.iter().filter(|p| self.c.tensors[**p].kind == TensorKind::InOut);
        let in_place = in_place.filter_map(|p| Some((self.c.tensors[*p].name.clone(), self.elements(*p)?)));
        outputs.chain(in_place).collect()
    }

    /// A tensor by name: parameter (in-place ones as written), intermediate, state or output.
    pub fn tensor(&self, name: &str) -> Option<Elements<V>> {
        self.elements(self.c.tensor(name)?)
    }

    fn elements(&self, t: TensorId) -> Option<Elements<V>> {
        match &self.stores[t.index()] {
            Store::Dense(values, support) => Some(Elements {
                dtype: self.c.tensors[t].dtype,
                dims: self.dims[t.index()].clone(),
                values: values.clone(),
                support: support.clone(),
            }),
            Store::Empty | Store::Demanded(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
