//! What a kernel's cost needs to know that no assignment changes: operations, what their values take, what they read and
//! write and how contiguously, and what filters depend on.
//!
//! Invariant: a function of the plan's kernel and its extents alone.

use einfall_ir::analysis::runs::{Runs, runs, single_axes};
use einfall_ir::arena::Id;
use einfall_ir::cascade::Size;
use einfall_ir::ops::{BinaryOp, ReduceOp, UnaryOp};
use einfall_ir::tile::{AxisId, AxisKind, Expr, ExprId, Kernel, Node, Op, Place, TileId};

use super::space::Space;

/// Elements of an array that an operation reads or writes.
#[derive(Clone, Debug)]
pub(super) struct Access {
    /// The array's number.
    pub buffer: usize,
    /// Bytes of an element.
    pub bytes: f64,
    /// Axes that the position depends on.
    pub axes: Vec<AxisId>,
    /// Those by data: positions are checked one by one.
    pub data: Vec<AxisId>,
    /// Bytes of the whole array.
    pub whole: f64,
    /// The axis along which neighbours lie side by side, where there is one.
    pub contiguous: Option<AxisId>,
    /// Elements that the position moves by along each axis, in order; those by data are left out.
    pub strides: Vec<(AxisId, f64)>,
}

impl Access {
    /// Bytes of neighbours that blocks of these sizes reach without a gap.
    pub fn run(&self, block: impl Fn(AxisId) -> f64) -> f64 {
        let mut reached = 1.0;
        for (axis, stride) in &self.strides {
            if *stride > reached {
                break;
            }
            reached += (block(*axis) - 1.0) * stride;
        }
        reached * self.bytes
    }
}

/// What a value is read from, or goes to.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// An array.
    Array(Access),
    /// A tile, under these names of its axes (none at a fixed coordinate).
    Tile(TileId, Vec<Option<AxisId>>),
}

/// What kind of operation it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Contract { out: TileId, a: TileId, b: TileId },
    Load(TileId),
    Reduce,
    Scan,
    Elementwise,
}

/// An operation.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub kind: Kind,
    /// Streams around it, outermost first.
    pub streams: Vec<AxisId>,
    /// Axes of what it writes.
    pub axes: Vec<AxisId>,
    /// Axes it sums or reduces.
    pub over: Vec<AxisId>,
    /// Vector instructions that its value takes, beside reading and writing, with the axes that they depend on: what
    /// stays the same along the lanes is computed once.
    pub nodes: Vec<(f64, Vec<AxisId>)>,
    /// Instructions to join the lanes of a result.
    pub join: f64,
    pub reads: Vec<Source>,
    pub write: Source,
    /// Rows that share a contraction's operand by runs.
    pub runs: Option<Runs>,
}

/// A stream's filter.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    /// The stream's axis.
    pub axis: AxisId,
    pub condition: ExprId,
    /// Axes that it depends on, the stream's first; at most three.
    pub axes: Vec<AxisId>,
}

/// All of a kernel.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub steps: Vec<Step>,
    pub filters: Vec<Filter>,
    /// Tiles that one load fills and nothing else writes: their array may be read in place.
    pub loaded: Vec<Option<Access>>,
    /// Axes of which each tile has one coordinate at a time.
    pub single: Vec<Vec<AxisId>>,
}

impl Work {
    pub fn of(space: &Space<'_>) -> Work {
        let k = space.kernel;
        let mut steps: Vec<Step> = Vec::new();
        let mut writers = vec![0; k.tiles.len()];
        let mut loaded: Vec<Option<Access>> = vec![None; k.tiles.len()];
        let own = |t: TileId| Source::Tile(t, k.tiles[t].axes.iter().map(|a| Some(*a)).collect());
        k.for_each_op(&mut |op, streams| {
            op.outs().iter().for_each(|t| writers[t.index()] += 1);
            let mut step = Step {
                kind: Kind::Elementwise,
                streams: streams.to_vec(),
                axes: op.outs().first().map(|t| k.tiles[*t].axes.clone()).unwrap_or_default(),
                over: Vec::new(),
                nodes: Vec::new(),
                join: 0.0,
                reads: Vec::new(),
                write: op.outs().first().map_or(Source::Tile(TileId::new(0), Vec::new()), |t| own(*t)),
                runs: runs(space.plan, k, op),
            };
            match op {
                Op::Contract { out, a, b, over, .. } => {
                    step.kind = Kind::Contract { out: *out, a: *a, b: *b };
                    step.over.clone_from(over);
                    step.reads = vec![own(*a), own(*b)];
                }
                Op::Load { out, buffer, at } => {
                    step.kind = Kind::Load(*out);
                    let access = access(space, *buffer, at);
                    loaded[out.index()] = Some(access.clone());
                    step.reads = vec![Source::Array(access)];
                }
                Op::Store { buffer, at, axes, value, when, .. } => {
                    step.axes.clone_from(axes);
                    step.write = Source::Array(access(space, *buffer, at));
                    value_of(space, *value, &mut step);
                    when.iter().for_each(|w| drop(value_of(space, *w, &mut step)));
                }
                Op::Map { value, .. } => drop(value_of(space, *value, &mut step)),
                Op::Reduce { op, over, value, .. } => {
                    step.kind = Kind::Reduce;
                    step.over.clone_from(over);
                    value_of(space, *value, &mut step);
                    let (each, join) = monoid(*op);
                    step.nodes.push((each, step.axes.iter().chain(over).copied().collect()));
                    step.join = join;
                }
                Op::Scan { op, value, along, .. } => {
                    step.kind = Kind::Scan;
                    step.over = vec![*along];
                    value_of(space, *value, &mut step);
                    step.join = monoid(*op).0;
                }
            }
            steps.push(step);
        });
        for (tile, writers) in loaded.iter_mut().zip(writers) {
            if writers != 1 {
                *tile = None;
            }
        }
        let mut filters = Vec::new();
        find_filters(k, &k.body, &mut filters);
        let single = k.tiles.ids().map(|t| single_axes(space.plan, k, t)).collect();
        Work { steps, filters, loaded, single }
    }
}

fn find_filters(k: &Kernel, nodes: &[Node], out: &mut Vec<Filter>) {
    for node in nodes {
        let Node::Stream(s) = node else { continue };
        if let Some(condition) = s.filter {
            let mut axes = vec![s.axis];
            k.walk(condition, &mut |_, e| {
                if let Expr::Coord(a) = e
                    && !axes.contains(a)
                    && axes.len() < 3
                    && k.axes[*a].kind != AxisKind::Inner
                {
                    axes.push(*a);
                }
            });
            out.push(Filter { axis: s.axis, condition, axes });
        }
        find_filters(k, &s.body, out);
    }
}

impl Work {
    /// How many values the keys of runs may take: the extents that they are positions along, where all are.
    pub fn values(space: &Space<'_>, runs: &Runs) -> Option<f64> {
        let k = space.kernel;
        let mut found: Option<f64> = None;
        k.for_each_op(&mut |op, _| {
            let Op::Load { out, buffer, at } = op else { return };
            if *out == runs.operand {
                let extent = |e: &ExprId| {
                    let d = at.iter().position(|a| a == e)?;
                    size(space, &space.plan.buffers[*buffer].dims[d])
                };
                found = runs.keys.iter().map(extent).product();
            }
        });
        found
    }
}

/// An access to `buffer` at positions.
fn access(space: &Space<'_>, buffer: einfall_ir::tile::BufferId, at: &[ExprId]) -> Access {
    let array = &space.plan.buffers[buffer];
    let (mut axes, mut data, mut strides) = (Vec::new(), Vec::new(), Vec::new());
    let mut contiguous = None;
    for (a, _) in space.kernel.axes.iter() {
        let factors: Vec<Option<f64>> = at.iter().map(|e| factor(space, *e, a)).collect();
        if factors.iter().any(|f| *f != Some(0.0)) {
            axes.push(a);
        }
        if factors.contains(&None) {
            data.push(a);
        }
        let dims = array.dims.iter().map(|d| size(space, d));
        let along = |sum: Option<f64>, (f, d): (&Option<f64>, Option<f64>)| Some(sum? * d? + (*f)?);
        let stride = factors.iter().zip(dims).fold(Some(0.0), along);
        strides.extend(stride.filter(|s| *s != 0.0).map(|s| (a, s.abs())));
        if let Some((last, rest)) = factors.split_last()
            && *last == Some(1.0)
            && rest.iter().all(|f| *f == Some(0.0))
        {
            contiguous = Some(a);
        }
    }
    strides.sort_by(|a, b| a.1.total_cmp(&b.1));
    let bytes = array.dtype.bytes(1) as f64;
    let elements: f64 = array.dims.iter().map(|d| size(space, d).unwrap_or(1.0)).product();
    Access { buffer: buffer.index(), bytes, axes, data, whole: elements * bytes, contiguous, strides }
}

/// What a position moves by per step along an axis; none where that is not the same everywhere.
fn factor(space: &Space<'_>, e: ExprId, axis: AxisId) -> Option<f64> {
    let k = space.kernel;
    match &k.exprs[e] {
        Expr::Int(_) | Expr::Float(_) | Expr::Size(_) => Some(0.0),
        Expr::Coord(a) => Some(if *a == axis { 1.0 } else { 0.0 }),
        Expr::Tile(t) => (!k.tiles[*t].axes.contains(&axis)).then_some(0.0),
        Expr::TileAt { at, .. } => (!at.contains(&Place::Axis(axis))).then_some(0.0),
        Expr::Binary(op, a, b) => {
            let (x, y) = (factor(space, *a, axis)?, factor(space, *b, axis)?);
            let number = |e: &ExprId| match &k.exprs[*e] {
                Expr::Int(i) => Some(*i as f64),
                Expr::Size(s) => size(space, s),
                _ => None,
            };
            match op {
                BinaryOp::Add => Some(x + y),
                BinaryOp::Sub => Some(x - y),
                _ if x == 0.0 && y == 0.0 => Some(0.0),
                BinaryOp::Mul => number(a).map(|i| i * y).or(number(b).map(|i| i * x)),
                _ => None,
            }
        }
        other => {
            let mut none = true;
            other.for_each_operand(|o| none &= factor(space, o, axis) == Some(0.0));
            none.then_some(0.0)
        }
    }
}

/// Adds what computing a value takes; the axes that it depends on.
fn value_of(space: &Space<'_>, e: ExprId, step: &mut Step) -> Vec<AxisId> {
    let k = space.kernel;
    let cost = match &k.exprs[e] {
        Expr::Tile(t) => {
            let axes = k.tiles[*t].axes.clone();
            step.reads.push(Source::Tile(*t, axes.iter().map(|a| Some(*a)).collect()));
            return axes;
        }
        Expr::TileAt { tile, at } => {
            let name = |p: &Place| if let Place::Axis(a) = p { Some(*a) } else { None };
            step.reads.push(Source::Tile(*tile, at.iter().map(name).collect()));
            return at.iter().filter_map(name).collect();
        }
        Expr::Read { buffer, at } => {
            let access = access(space, *buffer, at);
            let axes = access.axes.clone();
            if !axes.is_empty() {
                step.reads.push(Source::Array(access));
            }
            return axes;
        }
        Expr::Coord(a) => return vec![*a],
        Expr::Int(_) | Expr::Float(_) | Expr::Size(_) => return Vec::new(),
        Expr::Unary(op, _) => unary(*op),
        Expr::Binary(op, ..) => binary(*op),
        Expr::Select(..) => 1.0,
        Expr::Cast(..) => 2.0,
        Expr::Rand(_) => 120.0,
    };
    let mut axes = Vec::new();
    k.exprs[e].for_each_operand(|o| axes.extend(value_of(space, o, step)));
    axes.sort();
    axes.dedup();
    step.nodes.push((cost, axes.clone()));
    axes
}

/// Vector instructions of a reduction an element's vector, and to join the lanes of one result: selections carry
/// positions of 64 bits along, and a sum of exponentials its maximum.
fn monoid(op: ReduceOp) -> (f64, f64) {
    match op {
        ReduceOp::ArgMin | ReduceOp::ArgMax => (10.0, 500.0),
        ReduceOp::LogSumExp => (50.0, 250.0),
        _ => (1.0, 20.0),
    }
}

/// Vector instructions of a scalar function as the backends expand it, a division as the sixteen cycles it takes.
fn unary(op: UnaryOp) -> f64 {
    match op {
        UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Floor | UnaryOp::Ceil | UnaryOp::Round | UnaryOp::Not => 1.0,
        UnaryOp::Sign => 3.0,
        UnaryOp::Sqrt | UnaryOp::Recip => DIVISION,
        UnaryOp::Rsqrt => 2.0 * DIVISION,
        UnaryOp::Exp | UnaryOp::Exp2 => 14.0,
        UnaryOp::Log | UnaryOp::Log2 | UnaryOp::Log1p => 24.0,
        UnaryOp::Sigmoid | UnaryOp::Tanh => 16.0 + DIVISION,
        UnaryOp::Sin | UnaryOp::Cos | UnaryOp::Erf => 40.0,
    }
}

fn binary(op: BinaryOp) -> f64 {
    match op {
        BinaryOp::Div => DIVISION,
        BinaryOp::Mod => DIVISION + 3.0,
        BinaryOp::Pow => 50.0,
        _ => 1.0,
    }
}

/// Issue slots of a vector division.
const DIVISION: f64 = 24.0;

/// The share of a stream's blocks in which a filter holds somewhere, by a sample of blocks of `block` along its axes;
/// what depends on data counts as holding.
pub(super) fn kept(space: &Space<'_>, f: &Filter, block: &[f64]) -> f64 {
    const STEPS: usize = 10;
    let extent = |a: AxisId| space.extents[a.index()] as f64;
    let counts: Vec<f64> = f.axes.iter().map(|a| (extent(*a) / block[a.index()]).ceil().max(1.0)).collect();
    let samples: Vec<usize> = counts.iter().map(|c| (*c as usize).clamp(1, STEPS)).collect();
    let total: usize = samples.iter().product();
    let corners = 1usize << f.axes.len();
    let mut held = 0;
    for code in 0..total {
        let mut rest = code;
        let first: Vec<f64> = (0..f.axes.len())
            .map(|i| {
                let at = rest % samples[i];
                rest /= samples[i];
                ((at as f64 + 0.5) / samples[i] as f64 * counts[i]).floor()
            })
            .collect();
        let some = (0..=corners).any(|corner| {
            let at = |a: AxisId| {
                let i = f.axes.iter().position(|x| *x == a)?;
                let (b, low) = (block[a.index()], first[i] * block[a.index()]);
                let high = (low + b).min(extent(a)) - 1.0;
                Some(match corner {
                    c if c == corners => ((low + high) / 2.0).floor(),
                    c if c >> i & 1 == 1 => high,
                    _ => low,
                })
            };
            value(space, f.condition, &at).is_none_or(|v| v != 0.0)
        });
        held += usize::from(some);
    }
    (held as f64 / total as f64).max(0.01)
}

fn value(space: &Space<'_>, e: ExprId, at: &dyn Fn(AxisId) -> Option<f64>) -> Option<f64> {
    let of = |e: ExprId| value(space, e, at);
    match &space.kernel.exprs[e] {
        Expr::Int(n) => Some(*n as f64),
        Expr::Float(x) => Some(*x),
        Expr::Size(s) => size(space, s),
        Expr::Coord(a) => at(*a).or(Some(0.0)),
        Expr::Unary(op, a) => Some(op.eval(of(*a)?)),
        // A conjunct that depends on data leaves the other to decide.
        Expr::Binary(BinaryOp::And, a, b) => match (of(*a), of(*b)) {
            (Some(x), Some(y)) => Some(f64::from(x != 0.0 && y != 0.0)),
            (x, y) => x.or(y),
        },
        Expr::Binary(op, a, b) => Some(op.eval(of(*a)?, of(*b)?, true)),
        Expr::Select(c, a, b) => of(if of(*c)? != 0.0 { *a } else { *b }),
        Expr::Tile(_) | Expr::TileAt { .. } | Expr::Read { .. } | Expr::Cast(..) | Expr::Rand(_) => None,
    }
}

fn size(space: &Space<'_>, s: &Size) -> Option<f64> {
    s.eval(&space.ranks).ok().map(|n| n as f64)
}
