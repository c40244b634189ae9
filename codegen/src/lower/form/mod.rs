//! form-kernels: from a normalised cascade to a plan of kernels over tiles.
//!
//! Statements that can share one stream become one kernel (`group`); each kernel is emitted in design §2's normal
//! form (`stream`), iterative ranks as sequential streams (`iterate`). What crosses kernels becomes workspace.
//! Invariant: the plan computes what the cascade does for every choice of blocks; which blocks, placements and
//! instructions are used is the mapping's business.

mod derived;
mod emit;
mod group;
mod iterate;
mod program;
mod stream;

use std::collections::{HashMap, HashSet};

use einfall_ir::arena::Arena;
use einfall_ir::cascade::{Cascade, Expr, Iter, OutputSource, Stmt, TensorId, TensorKind};
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
    let mut former = Former::new(c)?;
    // Statements between two iterations are grouped on their own: an iteration is a kernel by itself.
    let mut run: Vec<Node> = Vec::new();
    for stmt in &c.stmts {
        match stmt {
            Stmt::Einsum(e) => run.push(Node::new(c, e)?),
            Stmt::Iter(i) => {
                former.statements(std::mem::take(&mut run))?;
                former.iteration(i)?;
            }
        }
    }
    former.statements(run)?;
    Ok(former.plan)
}

struct Former<'a> {
    c: &'a Cascade,
    plan: Plan,
    buffers: HashMap<TensorId, BufferId>,
    types: PlanTypes,
    /// Tensors some statement reads, with how many statements outside its own run.
    read_by: HashMap<TensorId, HashSet<usize>>,
    /// Which run or iteration defines a tensor.
    stage_of: HashMap<TensorId, usize>,
    stage: usize,
}

impl<'a> Former<'a> {
    fn new(c: &'a Cascade) -> Result<Former<'a>, Unsupported> {
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
            stage_of: HashMap::new(),
            stage: 0,
        };
        for &p in &c.params {
            let kind = match c.tensors[p].kind {
                TensorKind::InOut => return Err(Unsupported::new(c.tensors[p].span, "an `inout` tensor")),
                TensorKind::Input | TensorKind::Intermediate | TensorKind::State | TensorKind::Output => {
                    BufferKind::Input
                }
            };
            if c.tensors[p].storage != Default::default() {
                return Err(Unsupported::new(c.tensors[p].span, "packed or block-scaled storage"));
            }
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
        // Stages: maximal runs of plain statements, and iterations.
        let (mut stage, mut in_run) = (0, false);
        for stmt in &c.stmts {
            let einsums: Vec<_> = match stmt {
                Stmt::Einsum(e) => {
                    in_run = true;
                    vec![e]
                }
                Stmt::Iter(i) => {
                    stage += usize::from(in_run);
                    in_run = false;
                    i.inits.iter().chain(&i.body).collect()
                }
            };
            for e in einsums {
                for t in &e.targets {
                    f.stage_of.insert(t.tensor, stage);
                }
                for root in e.roots() {
                    c.walk(root, &mut |_, x| {
                        if let Expr::Read { tensor, .. } = x {
                            f.read_by.entry(*tensor).or_default().insert(stage);
                        }
                    });
                }
            }
            stage += usize::from(matches!(stmt, Stmt::Iter(_)));
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
        if nodes.is_empty() {
            return Ok(());
        }
        let c = self.c;
        let producer: HashMap<TensorId, usize> =
            nodes.iter().enumerate().flat_map(|(k, n)| n.einsum.targets.iter().map(move |t| (t.tensor, k))).collect();
        let mut pinned = self.read_elsewhere(self.stage);
        pinned.extend(c.outputs.iter().filter_map(|o| match o.source {
            OutputSource::Whole(t) => Some(t),
            OutputSource::Points { .. } | OutputSource::Point { .. } => None,
        }));
        let consumers = program::reductions_of_dims(c, &nodes);
        let program = Program::new(c, nodes, producer, consumers, pinned);
        for schedule in program.groups() {
            for &k in &schedule.stored {
                for t in &program.nodes[k].einsum.targets {
                    if c.tensors[t.tensor].kind != TensorKind::Output {
                        self.array(t.tensor, BufferKind::Workspace);
                    }
                }
            }
            let name = self.kernel_name();
            let kernel = match program.derivation(&schedule) {
                Some(d) => derived::emit_derived(&program, &schedule, &d, name, &self.buffers, &self.types)?,
                None => stream::emit_group(&program, &schedule, name, &self.buffers, &self.types)?,
            };
            self.plan.kernels.push(kernel);
        }
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
