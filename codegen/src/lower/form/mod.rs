//! form-kernels: from a normalised cascade to a plan of kernels over tiles.
//!
//! Statements that can share one stream become one kernel (`group`); each kernel is emitted in the tile level's
//! normal form (`stream`), iterative ranks as sequential streams (`iterate`). What crosses kernels becomes workspace.
//! Invariant: the plan computes what the cascade does for every choice of blocks; which blocks, placements and
//! instructions are used is the mapping's business.

mod derived;
mod emit;
mod fold;
mod group;
mod iterate;
mod join;
mod program;
mod stream;

use std::collections::{HashMap, HashSet};

use einfall_ir::arena::Arena;
use einfall_ir::cascade::{Cascade, Einsum, Expr, Iter, OutputSource, Stmt, TensorId, TensorKind};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{Buffer, BufferId, BufferKind, Plan};

use self::emit::PlanTypes;
use self::group::Program;
use self::iterate::StateSink;
use self::program::Node;
use crate::passes::Unsupported;

/// Cuts a cascade, normalised by `propagate-support` and `extract-reductions`, into kernels.
///
/// # Errors
/// The first construct that has no lowering yet.
pub fn form_kernels(c: &Cascade) -> Result<Plan, Unsupported> {
    let stages = stages(c);
    let mut former = Former::new(c, &stages)?;
    for stage in stages {
        match stage {
            Stage::Run(run) => {
                former.statements(run.into_iter().map(|e| Node::new(c, e)).collect::<Result<_, _>>()?)?
            }
            Stage::Join(e) => former.join(e)?,
            Stage::Iter(i) => former.iteration(i)?,
        }
    }
    Ok(former.plan)
}

/// What is cut into kernels together. A stage's kernels run after those of the stages before it.
enum Stage<'a> {
    /// Statements that are grouped; one that writes an `inout` tensor is the last.
    Run(Vec<&'a Einsum>),
    /// A joined write: a kernel by itself.
    Join(&'a Einsum),
    /// An iteration: a kernel by itself.
    Iter(&'a Iter),
}

impl<'a> Stage<'a> {
    fn einsums(&self) -> Vec<&'a Einsum> {
        match self {
            Stage::Run(run) => run.clone(),
            Stage::Join(e) => vec![e],
            Stage::Iter(i) => i.inits.iter().chain(&i.body).collect(),
        }
    }
}

/// The statements of a cascade in stages: what reads the old value of an `inout` tensor comes before what writes it,
/// and what reads the new one after.
fn stages(c: &Cascade) -> Vec<Stage<'_>> {
    let in_place = |e: &Einsum| {
        let targets = e.targets.iter().map(|t| t.tensor);
        targets.filter(|t| c.tensors[*t].kind == TensorKind::InOut).collect::<Vec<_>>()
    };
    let mut stages = Vec::new();
    let mut run: Vec<&Einsum> = Vec::new();
    let flush = |run: &mut Vec<_>, stages: &mut Vec<_>| {
        if !run.is_empty() {
            stages.push(Stage::Run(std::mem::take(run)));
        }
    };
    for stmt in &c.stmts {
        match stmt {
            Stmt::Einsum(e) if e.join.is_some() => {
                flush(&mut run, &mut stages);
                stages.push(Stage::Join(e));
            }
            Stmt::Einsum(e) => {
                let written = in_place(e);
                if run.iter().any(|r| written.iter().any(|t| c.reads(r, *t))) {
                    flush(&mut run, &mut stages);
                }
                run.push(e);
                if !written.is_empty() {
                    flush(&mut run, &mut stages);
                }
            }
            Stmt::Iter(i) => {
                flush(&mut run, &mut stages);
                stages.push(Stage::Iter(i));
            }
        }
    }
    flush(&mut run, &mut stages);
    stages
}

struct Former<'a> {
    c: &'a Cascade,
    plan: Plan,
    buffers: HashMap<TensorId, BufferId>,
    types: PlanTypes,
    /// Tensors some statement reads, with how many statements outside its own run.
    read_by: HashMap<TensorId, HashSet<usize>>,
    stage: usize,
}

impl<'a> Former<'a> {
    fn new(c: &'a Cascade, stages: &[Stage<'a>]) -> Result<Former<'a>, Unsupported> {
        let plan = Plan {
            name: c.name.clone(),
            exact: c.exact,
            ranks: c.ranks.clone(),
            buffers: Arena::new(),
            kernels: Vec::new(),
        };
        let mut f = Former {
            c,
            plan,
            buffers: HashMap::new(),
            types: PlanTypes { dtypes: HashMap::new(), names: HashMap::new() },
            read_by: HashMap::new(),
            stage: 0,
        };
        for &p in &c.params {
            let kind = match c.tensors[p].kind {
                TensorKind::InOut => BufferKind::InOut,
                TensorKind::Input | TensorKind::Intermediate | TensorKind::State | TensorKind::Output => {
                    BufferKind::Input
                }
            };
            f.array(p, kind);
        }
        for output in &c.outputs {
            let buffer = f.plan.buffers.push(Buffer {
                name: output.name.clone(),
                dtype: output.dtype,
                dims: output.dims.clone(),
                kind: BufferKind::Output,
                positive: false,
            });
            f.types.dtypes.insert(buffer, output.dtype);
            f.types.names.insert(buffer, output.name.clone());
            if let OutputSource::Whole(t) = output.source {
                f.buffers.insert(t, buffer);
            }
        }
        for (n, stage) in stages.iter().enumerate() {
            for e in stage.einsums() {
                for root in e.roots() {
                    c.walk(root, &mut |_, x| {
                        if let Expr::Read { tensor, .. } = x {
                            f.read_by.entry(*tensor).or_default().insert(n);
                        }
                    });
                }
            }
        }
        Ok(f)
    }

    /// The device array of a tensor, made if there is none.
    fn array(&mut self, t: TensorId, kind: BufferKind) -> BufferId {
        if let Some(&b) = self.buffers.get(&t) {
            return b;
        }
        let tensor = &self.c.tensors[t];
        let buffer = self.plan.buffers.push(Buffer {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            dims: tensor.dims.clone(),
            kind,
            positive: self.c.requires.iter().any(|e| says_positive(self.c, *e, t)),
        });
        self.buffers.insert(t, buffer);
        self.types.dtypes.insert(buffer, tensor.dtype);
        self.types.names.insert(buffer, tensor.name.clone());
        buffer
    }

    /// Tensors that stages other than `stage` read.
    fn read_elsewhere(&self, stage: usize) -> HashSet<TensorId> {
        self.read_by.iter().filter(|(_, s)| s.iter().any(|&k| k != stage)).map(|(t, _)| *t).collect()
    }

    fn kernel_name(&self) -> String {
        format!("{}_{}", self.plan.name, self.plan.kernels.len())
    }

    fn statements(&mut self, nodes: Vec<Node>) -> Result<(), Unsupported> {
        let c = self.c;
        let producer: HashMap<TensorId, usize> =
            nodes.iter().enumerate().flat_map(|(k, n)| n.einsum.targets.iter().map(move |t| (t.tensor, k))).collect();
        let mut pinned = self.read_elsewhere(self.stage);
        pinned.extend(c.outputs.iter().filter_map(|o| match o.source {
            OutputSource::Whole(t) => Some(t),
            OutputSource::Points { .. } | OutputSource::Point { .. } => None,
        }));
        pinned.extend(c.tensors.iter().filter(|(_, t)| t.kind == TensorKind::InOut).map(|(id, _)| id));
        let consumers = program::reductions_of_dims(c, &nodes);
        let program = Program::new(c, nodes, producer, consumers, pinned);
        for schedule in program.groups() {
            for &k in &schedule.stored {
                for t in &program.nodes[k].einsum.targets {
                    if !matches!(c.tensors[t.tensor].kind, TensorKind::Output | TensorKind::InOut) {
                        self.array(t.tensor, BufferKind::Workspace);
                    }
                }
            }
            let name = self.kernel_name();
            let kernel = match program.derivation(&schedule) {
                _ if program.nodes[schedule.nodes[0]].is_fold() => {
                    fold::emit_fold(c, &program.nodes[schedule.nodes[0]], name, &self.buffers)?
                }
                Some(d) => derived::emit_derived(&program, &schedule, &d, name, &self.buffers, &self.types)?,
                None => stream::emit_group(&program, &schedule, name, &self.buffers, &self.types)?,
            };
            self.plan.kernels.push(kernel);
        }
        self.stage += 1;
        Ok(())
    }

    /// A joined write as a kernel: sums and the like are kept in the type they are accumulated in.
    fn join(&mut self, e: &Einsum) -> Result<(), Unsupported> {
        let target = e.targets[0].tensor;
        let tensor = &self.c.tensors[target];
        let result = match tensor.kind {
            TensorKind::InOut | TensorKind::Output => self.buffers[&target],
            TensorKind::Input | TensorKind::Intermediate | TensorKind::State => {
                self.array(target, BufferKind::Workspace)
            }
        };
        let held = join::accumulator(self.c, e);
        let sums = if held == tensor.dtype {
            result
        } else {
            let name = format!("{}_joined", tensor.name);
            let dims = tensor.dims.clone();
            let kind = BufferKind::Workspace;
            let buffer = self.plan.buffers.push(Buffer { name, dtype: held, dims, kind, positive: false });
            self.types.dtypes.insert(buffer, held);
            buffer
        };
        let kernel = join::emit_join(self.c, e, self.kernel_name(), &self.buffers, (sums, result))?;
        self.plan.kernels.push(kernel);
        self.stage += 1;
        Ok(())
    }

    fn iteration(&mut self, iter: &Iter) -> Result<(), Unsupported> {
        let c = self.c;
        let outside = self.read_elsewhere(self.stage);
        let mut sinks = Vec::new();
        for t in iterate::escaping(c, iter, &outside) {
            let buffer = self.array(t, BufferKind::Workspace);
            if iter.states.contains(&t) {
                sinks.push(StateSink { state: t, buffer, source: OutputSource::Whole(t) });
            }
        }
        for (k, output) in c.outputs.iter().enumerate() {
            let state = match &output.source {
                OutputSource::Points { state, .. } | OutputSource::Point { state, .. } => *state,
                OutputSource::Whole(_) => continue,
            };
            if iter.states.contains(&state) {
                let buffer = self.output_buffer(k);
                sinks.push(StateSink { state, buffer, source: output.source.clone() });
            }
        }
        let name = self.kernel_name();
        let kernel = iterate::emit_iter(c, iter, name, &self.buffers, &sinks, &self.types)?;
        self.plan.kernels.push(kernel);
        self.stage += 1;
        Ok(())
    }

    /// The array of the k-th output: outputs follow the parameters.
    fn output_buffer(&self, k: usize) -> BufferId {
        einfall_ir::arena::Id::new(self.c.params.len() + k)
    }
}

/// Whether the fact says that the scalar parameter `t` is above 0.
fn says_positive(c: &Cascade, fact: einfall_ir::cascade::ExprId, t: TensorId) -> bool {
    let is_t = |e| matches!(&c.exprs[e], Expr::Read { tensor, at } if *tensor == t && at.is_empty());
    let at_least = |e| match c.exprs[e] {
        Expr::Int(n) => Some(n as f64),
        Expr::Float(x) => Some(x),
        _ => None,
    };
    match c.exprs[fact] {
        Expr::Binary(BinaryOp::And, a, b) => says_positive(c, a, t) || says_positive(c, b, t),
        Expr::Binary(BinaryOp::Gt, a, b) if is_t(a) => at_least(b).is_some_and(|x| x >= 0.0),
        Expr::Binary(BinaryOp::Ge, a, b) if is_t(a) => at_least(b).is_some_and(|x| x > 0.0),
        Expr::Binary(BinaryOp::Lt, a, b) if is_t(b) => at_least(a).is_some_and(|x| x >= 0.0),
        Expr::Binary(BinaryOp::Le, a, b) if is_t(b) => at_least(a).is_some_and(|x| x > 0.0),
        _ => false,
    }
}
