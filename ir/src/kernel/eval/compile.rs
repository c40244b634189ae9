//! Kernels prepared for evaluation: bodies flattened to instructions with jumps, expressions with extents folded in,
//! elementwise expressions as columns that work on many elements at a time.
//!
//! Invariant: an instruction's meaning depends only on the unit's state, its position in the grid and memory.

use std::collections::HashMap;
use std::rc::Rc;

use super::{Kernel, KernelError};
use crate::arena::{Arena, Id};
use crate::cascade::{Rank, RankId};
use crate::dtype::DType;
use crate::kernel::atoms::{self, Atom};
use crate::kernel::{Bound, BufSpace, Engine, Expr, FenceKind, GridDependency, GroupKind, Operand, Stmt, View, print};
use crate::ops::{BinaryOp, ReduceOp, UnaryOp};

/// A uniform expression.
#[derive(Clone, Debug)]
pub(super) enum Uniform {
    Const(f64),
    Var(usize),
    Grid(usize),
    Unit,
    ClusterRank,
    Fetch { buf: usize, at: Vec<Uniform> },
    Unary(UnaryOp, Box<Uniform>),
    Binary(BinaryOp, bool, Box<Uniform>, Box<Uniform>),
    Fma(Box<Uniform>, Box<Uniform>, Box<Uniform>),
    Select(Box<Uniform>, Box<Uniform>, Box<Uniform>),
    Cast(DType, Box<Uniform>),
    Rand(Box<[Uniform; 5]>),
}

/// One step of an elementwise expression; operands are earlier steps.
#[derive(Clone, Debug)]
pub(super) enum Lane {
    Uniform(Uniform),
    /// The fragment's elements; `index` maps elements of the result to its own, none is the identity.
    Frag {
        frag: usize,
        index: Option<Rc<[u32]>>,
    },
    /// Values given element by element (coordinates).
    Table(Rc<[u32]>),
    Unary(UnaryOp, usize),
    Binary(BinaryOp, bool, usize, usize),
    Fma(usize, usize, usize),
    Select(usize, usize, usize),
    Cast(DType, usize),
    Rand([usize; 5]),
}

/// An elementwise expression over `len` elements; its value is the last step's.
#[derive(Clone, Debug)]
pub(super) struct Column {
    pub(super) len: usize,
    pub(super) lanes: Vec<Lane>,
}

#[derive(Clone, Debug)]
pub(super) struct Window {
    pub(super) buf: usize,
    pub(super) stage: Option<Uniform>,
    pub(super) at: Vec<Uniform>,
    pub(super) walk: Vec<Option<(usize, i64)>>,
}

pub(super) type Limits = Vec<(usize, Uniform)>;

#[derive(Clone, Debug)]
pub(super) enum Source {
    Frag { frag: usize, from: Vec<u64> },
    Mem(Window),
}

#[derive(Clone, Debug)]
pub(super) enum Inst {
    LoopInit {
        var: usize,
        lo: Uniform,
        hi: Uniform,
        slot: usize,
    },
    LoopTest {
        var: usize,
        slot: usize,
        exit: usize,
    },
    LoopStep {
        var: usize,
        step: i64,
        top: usize,
    },
    Branch {
        cond: Uniform,
        otherwise: usize,
    },
    Jump(usize),
    Let {
        var: usize,
        value: Uniform,
    },
    Map {
        out: usize,
        value: Column,
    },
    Reduce {
        out: Vec<usize>,
        op: ReduceOp,
        src: usize,
        over: Vec<usize>,
        base: Option<Uniform>,
        bounds: Limits,
        carry: bool,
    },
    Scan {
        out: usize,
        op: ReduceOp,
        src: usize,
        along: usize,
        carry: Option<usize>,
        bounds: Limits,
    },
    Load {
        out: usize,
        src: Window,
        bounds: Limits,
    },
    Store {
        dst: Window,
        src: usize,
        bounds: Limits,
        join: Option<ReduceOp>,
    },
    Gather {
        out: usize,
        buf: usize,
        at: Vec<Column>,
        bounds: Limits,
    },
    Scatter {
        buf: usize,
        at: Vec<Column>,
        src: usize,
        bounds: Limits,
        join: Option<ReduceOp>,
    },
    Atom {
        atom: Rc<Atom>,
        acc: usize,
        acc_from: Vec<u64>,
        a: Source,
        b: Source,
        keep: Uniform,
    },
    Copy {
        engine: Engine,
        src: Window,
        dst: Window,
        extents: Vec<u64>,
        signal: Option<(usize, Uniform)>,
        multicast: Option<u64>,
    },
    Arrive {
        barrier: usize,
        stage: Uniform,
        expect: Option<u64>,
        remote: Option<Uniform>,
    },
    Wait {
        barrier: usize,
        stage: Uniform,
        phase: Uniform,
    },
    Named {
        barrier: usize,
        stage: Uniform,
        blocks: bool,
    },
    Fence(FenceKind),
    Commit(GroupKind),
    WaitGroup {
        kind: GroupKind,
        pending: u64,
    },
    Last {
        var: usize,
        counter: usize,
        at: Vec<Uniform>,
        of: Uniform,
    },
    TaskSync,
    ClusterSync,
    GridSync,
    GridDependency(GridDependency),
    End,
}

/// An instruction and the statement it came from.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) inst: Inst,
    pub(super) stmt: u32,
}

/// A role's body.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) steps: Vec<Step>,
    pub(super) loops: usize,
    /// Whether it issues copies.
    pub(super) copies: bool,
}

/// Per tile extents and what is picked from a coordinate, one number per element.
type Tables<K> = HashMap<(Vec<u64>, K), Rc<[u32]>>;

/// What is shared while compiling one kernel.
pub(super) struct Compiler<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) names: &'a Arena<RankId, Rank>,
    pub(super) ranks: &'a [u64],
    /// Values of scalar parameters by buffer.
    pub(super) scalars: &'a HashMap<usize, f64>,
    /// Whether floating-point casts round.
    pub(super) rounding: bool,
    /// Where each statement stands, for messages.
    pub(super) places: Vec<String>,
    index_tables: Tables<Vec<usize>>,
    coord_tables: Tables<usize>,
}

impl<'a> Compiler<'a> {
    pub(super) fn new(
        kernel: &'a Kernel,
        names: &'a Arena<RankId, Rank>,
        ranks: &'a [u64],
        scalars: &'a HashMap<usize, f64>,
        rounding: bool,
    ) -> Compiler<'a> {
        Compiler {
            kernel,
            names,
            ranks,
            scalars,
            rounding,
            places: Vec::new(),
            index_tables: HashMap::new(),
            coord_tables: HashMap::new(),
        }
    }

    pub(super) fn program(&mut self, role: usize) -> Result<Program, KernelError> {
        let mut program = Program { steps: Vec::new(), loops: 0, copies: false };
        let role = &self.kernel.roles[role];
        self.body(&role.body, &role.name, &mut program)?;
        let stmt = self.place(format!("{}: end", role.name));
        program.steps.push(Step { inst: Inst::End, stmt });
        Ok(program)
    }

    fn place(&mut self, text: String) -> u32 {
        self.places.push(text);
        (self.places.len() - 1) as u32
    }

    fn body(&mut self, body: &[Stmt], path: &str, p: &mut Program) -> Result<(), KernelError> {
        for (i, s) in body.iter().enumerate() {
            let path = format!("{path}.{i}");
            let stmt = self.place(format!("{path}: {}", print::statement_line(self.kernel, self.names, s)));
            self.stmt(s, stmt, &path, p)?;
        }
        Ok(())
    }

    fn stmt(&mut self, s: &Stmt, stmt: u32, path: &str, p: &mut Program) -> Result<(), KernelError> {
        let here = |e: String| KernelError::illegal(e);
        let inst = match s {
            Stmt::For { var, lo, hi, step, unroll: _, body } => {
                let (lo, hi) = (self.uniform(lo)?, self.uniform(hi)?);
                let slot = p.loops;
                p.loops += 1;
                if *step <= 0 {
                    return Err(here(format!("{path}: a loop's step must be positive")));
                }
                p.steps.push(Step { inst: Inst::LoopInit { var: var.index(), lo, hi, slot }, stmt });
                let top = p.steps.len();
                p.steps.push(Step { inst: Inst::End, stmt });
                self.body(body, path, p)?;
                p.steps.push(Step { inst: Inst::LoopStep { var: var.index(), step: *step, top }, stmt });
                let exit = p.steps.len();
                p.steps[top].inst = Inst::LoopTest { var: var.index(), slot, exit };
                return Ok(());
            }
            Stmt::If { cond, then, otherwise } => {
                let cond = self.uniform(cond)?;
                let branch = p.steps.len();
                p.steps.push(Step { inst: Inst::End, stmt });
                self.body(then, path, p)?;
                let jump = p.steps.len();
                p.steps.push(Step { inst: Inst::End, stmt });
                p.steps[branch].inst = Inst::Branch { cond, otherwise: p.steps.len() };
                self.body(otherwise, &format!("{path}.else"), p)?;
                p.steps[jump].inst = Inst::Jump(p.steps.len());
                return Ok(());
            }
            Stmt::Let { var, value } => Inst::Let { var: var.index(), value: self.uniform(value)? },
            Stmt::Map { out, value } => {
                let dims = self.kernel.frags[*out].dist.dims.clone();
                Inst::Map { out: out.index(), value: self.column(value, &dims)? }
            }
            Stmt::Reduce { out, op, src, over, base, bounds, carry } => Inst::Reduce {
                out: out.iter().map(|f| f.index()).collect(),
                op: *op,
                src: src.index(),
                over: over.clone(),
                base: base.as_ref().map(|b| self.uniform(b)).transpose()?,
                bounds: self.bounds(bounds)?,
                carry: *carry,
            },
            Stmt::Scan { out, op, src, along, carry, bounds } => Inst::Scan {
                out: out.index(),
                op: *op,
                src: src.index(),
                along: *along,
                carry: carry.map(|c| c.index()),
                bounds: self.bounds(bounds)?,
            },
            Stmt::Load { out, src, bounds } => {
                Inst::Load { out: out.index(), src: self.window(src)?, bounds: self.bounds(bounds)? }
            }
            Stmt::Store { dst, src, bounds, join } => {
                Inst::Store { dst: self.window(dst)?, src: src.index(), bounds: self.bounds(bounds)?, join: *join }
            }
            Stmt::Gather { out, buf, at, bounds } => {
                let dims = self.kernel.frags[*out].dist.dims.clone();
                let at = at.iter().map(|e| self.column(e, &dims)).collect::<Result<_, _>>()?;
                Inst::Gather { out: out.index(), buf: buf.index(), at, bounds: self.bounds(bounds)? }
            }
            Stmt::Scatter { buf, at, src, bounds, join } => {
                let dims = self.kernel.frags[*src].dist.dims.clone();
                let at = at.iter().map(|e| self.column(e, &dims)).collect::<Result<_, _>>()?;
                Inst::Scatter { buf: buf.index(), at, src: src.index(), bounds: self.bounds(bounds)?, join: *join }
            }
            Stmt::Atom { atom, acc, acc_from, a, b, keep } => {
                let found = atoms::find(atom).ok_or_else(|| here(format!("{path}: no atom is called {}", atom.0)))?;
                Inst::Atom {
                    atom: Rc::new(found),
                    acc: acc.index(),
                    acc_from: acc_from.clone(),
                    a: self.source(a)?,
                    b: self.source(b)?,
                    keep: self.uniform(keep)?,
                }
            }
            Stmt::Copy { engine, src, dst, extents, signal, multicast } => {
                p.copies = true;
                Inst::Copy {
                    engine: *engine,
                    src: self.window(src)?,
                    dst: self.window(dst)?,
                    extents: extents.clone(),
                    signal: match signal {
                        Some((b, stage)) => Some((b.index(), self.uniform(stage)?)),
                        None => None,
                    },
                    multicast: *multicast,
                }
            }
            Stmt::Arrive { barrier, stage, expect_bytes, remote } => Inst::Arrive {
                barrier: barrier.index(),
                stage: self.uniform(stage)?,
                expect: *expect_bytes,
                remote: remote.as_ref().map(|r| self.uniform(r)).transpose()?,
            },
            Stmt::Wait { barrier, stage, phase } => {
                Inst::Wait { barrier: barrier.index(), stage: self.uniform(stage)?, phase: self.uniform(phase)? }
            }
            Stmt::NamedSync { barrier, stage } => {
                Inst::Named { barrier: barrier.index(), stage: self.uniform(stage)?, blocks: true }
            }
            Stmt::NamedArrive { barrier, stage } => {
                Inst::Named { barrier: barrier.index(), stage: self.uniform(stage)?, blocks: false }
            }
            Stmt::Fence(kind) => Inst::Fence(*kind),
            Stmt::Commit(kind) => Inst::Commit(*kind),
            Stmt::WaitGroup { kind, pending } => Inst::WaitGroup { kind: *kind, pending: *pending },
            Stmt::Last { var, counter, at, of } => Inst::Last {
                var: var.index(),
                counter: counter.index(),
                at: at.iter().map(|e| self.uniform(e)).collect::<Result<_, _>>()?,
                of: self.uniform(of)?,
            },
            Stmt::TaskSync => Inst::TaskSync,
            Stmt::ClusterSync => Inst::ClusterSync,
            Stmt::GridSync => Inst::GridSync,
            Stmt::GridDependency(kind) => Inst::GridDependency(*kind),
        };
        p.steps.push(Step { inst, stmt });
        Ok(())
    }

    fn bounds(&self, bounds: &[Bound]) -> Result<Limits, KernelError> {
        bounds.iter().map(|b| Ok((b.dim, self.uniform(&b.limit)?))).collect()
    }

    fn window(&self, v: &View) -> Result<Window, KernelError> {
        Ok(Window {
            buf: v.buf.index(),
            stage: v.stage.as_ref().map(|s| self.uniform(s)).transpose()?,
            at: v.at.iter().map(|e| self.uniform(e)).collect::<Result<_, _>>()?,
            walk: v.walk.clone(),
        })
    }

    fn source(&self, o: &Operand) -> Result<Source, KernelError> {
        Ok(match o {
            Operand::Frag { frag, from } => Source::Frag { frag: frag.index(), from: from.clone() },
            Operand::Mem(view) => Source::Mem(self.window(view)?),
        })
    }

    /// Whether a cast to `dtype` changes values in this evaluation.
    fn rounds(&self, dtype: DType) -> bool {
        self.rounding || !dtype.is_float()
    }

    pub(super) fn uniform(&self, e: &Expr) -> Result<Uniform, KernelError> {
        let sub = |e: &Expr| self.uniform(e).map(Box::new);
        let u = match e {
            Expr::Int(i) => Uniform::Const(*i as f64),
            Expr::Float(x) => Uniform::Const(*x),
            Expr::Var(v) => Uniform::Var(v.index()),
            Expr::Extent(r) => Uniform::Const(self.extent(*r)?),
            Expr::Grid(d) => Uniform::Grid(*d),
            Expr::Unit => Uniform::Unit,
            Expr::ClusterRank => Uniform::ClusterRank,
            Expr::Scalar(b) => Uniform::Const(*self.scalars.get(&b.index()).ok_or_else(|| {
                KernelError::illegal(format!("`{}` is no scalar parameter", self.kernel.bufs[*b].name))
            })?),
            Expr::Fetch { buf, at } => {
                Uniform::Fetch { buf: buf.index(), at: at.iter().map(|e| self.uniform(e)).collect::<Result<_, _>>()? }
            }
            Expr::Frag { .. } | Expr::Coord(_) => {
                return Err(KernelError::illegal(format!(
                    "`{}` is elementwise where a uniform value is needed",
                    print::expression(self.kernel, self.names, e)
                )));
            }
            Expr::Unary(op, a) => Uniform::Unary(*op, sub(a)?),
            Expr::Binary(op, a, b) => Uniform::Binary(*op, self.is_int(a) && self.is_int(b), sub(a)?, sub(b)?),
            Expr::Fma(a, b, c) => Uniform::Fma(sub(a)?, sub(b)?, sub(c)?),
            Expr::Select(c, a, b) => Uniform::Select(sub(c)?, sub(a)?, sub(b)?),
            Expr::Cast(d, a) if self.rounds(*d) => Uniform::Cast(*d, sub(a)?),
            Expr::Cast(_, a) => self.uniform(a)?,
            Expr::Rand(of) => {
                let of = of.iter().map(|e| self.uniform(e)).collect::<Result<Vec<_>, _>>()?;
                Uniform::Rand(Box::new(of.try_into().expect("five operands")))
            }
        };
        Ok(fold(u))
    }

    fn extent(&self, r: RankId) -> Result<f64, KernelError> {
        match self.ranks.get(r.index()) {
            Some(v) => Ok(*v as f64),
            None => Err(KernelError::illegal(format!("rank {} has no extent", r.index()))),
        }
    }

    fn is_int(&self, e: &Expr) -> bool {
        self.kernel.is_integer(e)
    }

    fn column(&mut self, e: &Expr, dims: &[u64]) -> Result<Column, KernelError> {
        let mut lanes = Vec::new();
        self.lane(e, dims, &mut lanes)?;
        Ok(Column { len: dims.iter().product::<u64>() as usize, lanes })
    }

    fn lane(&mut self, e: &Expr, dims: &[u64], lanes: &mut Vec<Lane>) -> Result<usize, KernelError> {
        let lane = if !elementwise(e) {
            Lane::Uniform(self.uniform(e)?)
        } else {
            match e {
                Expr::Frag { frag, dims: kept } => {
                    let own = &self.kernel.frags[*frag].dist.dims;
                    if kept.len() != own.len() || kept.iter().zip(own).any(|(k, n)| dims.get(*k) != Some(n)) {
                        return Err(KernelError::illegal(format!(
                            "`{}` does not have the extents of the result {dims:?}",
                            print::expression(self.kernel, self.names, e)
                        )));
                    }
                    let identity = kept.len() == dims.len() && kept.iter().enumerate().all(|(i, k)| i == *k);
                    let index = (!identity).then(|| self.index_table(dims, kept));
                    Lane::Frag { frag: frag.index(), index }
                }
                Expr::Coord(d) => Lane::Table(self.coord_table(dims, *d)),
                Expr::Unary(op, a) => Lane::Unary(*op, self.lane(a, dims, lanes)?),
                Expr::Binary(op, a, b) => {
                    let int = self.is_int(a) && self.is_int(b);
                    Lane::Binary(*op, int, self.lane(a, dims, lanes)?, self.lane(b, dims, lanes)?)
                }
                Expr::Fma(a, b, c) => {
                    Lane::Fma(self.lane(a, dims, lanes)?, self.lane(b, dims, lanes)?, self.lane(c, dims, lanes)?)
                }
                Expr::Select(c, a, b) => {
                    Lane::Select(self.lane(c, dims, lanes)?, self.lane(a, dims, lanes)?, self.lane(b, dims, lanes)?)
                }
                Expr::Cast(d, a) if self.rounds(*d) => Lane::Cast(*d, self.lane(a, dims, lanes)?),
                Expr::Cast(_, a) => return self.lane(a, dims, lanes),
                Expr::Rand(of) => {
                    let of = of.iter().map(|e| self.lane(e, dims, lanes)).collect::<Result<Vec<_>, _>>()?;
                    Lane::Rand(of.try_into().expect("five operands"))
                }
                Expr::Fetch { .. } => {
                    return Err(KernelError::illegal(format!(
                        "`{}` has elementwise coordinates; use a gather",
                        print::expression(self.kernel, self.names, e)
                    )));
                }
                Expr::Int(_)
                | Expr::Float(_)
                | Expr::Var(_)
                | Expr::Extent(_)
                | Expr::Grid(_)
                | Expr::Unit
                | Expr::ClusterRank
                | Expr::Scalar(_) => Lane::Uniform(self.uniform(e)?),
            }
        };
        lanes.push(lane);
        Ok(lanes.len() - 1)
    }

    fn index_table(&mut self, dims: &[u64], kept: &[usize]) -> Rc<[u32]> {
        let table = || {
            let mut strides = vec![0u64; dims.len()];
            let mut stride = 1;
            for &k in kept.iter().rev() {
                strides[k] += stride;
                stride *= dims[k];
            }
            tile(dims, |coords| coords.iter().zip(&strides).map(|(c, s)| c * s).sum::<u64>() as u32)
        };
        self.index_tables.entry((dims.to_vec(), kept.to_vec())).or_insert_with(table).clone()
    }

    fn coord_table(&mut self, dims: &[u64], dim: usize) -> Rc<[u32]> {
        self.coord_tables
            .entry((dims.to_vec(), dim))
            .or_insert_with(|| tile(dims, |coords| coords.get(dim).map_or(0, |c| *c as u32)))
            .clone()
    }

    /// Whether the buffer is a scalar parameter.
    pub(super) fn scalar_param(kernel: &Kernel, buf: usize) -> Option<usize> {
        let b = &kernel.bufs[Id::new(buf)];
        match b.space {
            BufSpace::Global { param, .. } if b.dims.is_empty() => Some(param),
            BufSpace::Global { .. } | BufSpace::Shared { .. } | BufSpace::Scratch { .. } => None,
        }
    }
}

/// `f` of every coordinate of a tile, last dimension fastest.
fn tile(dims: &[u64], f: impl Fn(&[u64]) -> u32) -> Rc<[u32]> {
    let n: u64 = dims.iter().product();
    let mut coords = vec![0; dims.len()];
    (0..n)
        .map(|_| {
            let v = f(&coords);
            for d in (0..dims.len()).rev() {
                coords[d] += 1;
                if coords[d] < dims[d] {
                    break;
                }
                coords[d] = 0;
            }
            v
        })
        .collect()
}

fn elementwise(e: &Expr) -> bool {
    let mut any = matches!(e, Expr::Frag { .. } | Expr::Coord(_));
    e.for_each_operand(|o| any |= elementwise(o));
    any
}

/// Operations on constants, computed.
fn fold(u: Uniform) -> Uniform {
    match u {
        Uniform::Binary(op, int, a, b) => match (&*a, &*b) {
            (Uniform::Const(x), Uniform::Const(y)) => Uniform::Const(op.eval(*x, *y, int)),
            _ => Uniform::Binary(op, int, a, b),
        },
        Uniform::Unary(op, a) => match &*a {
            Uniform::Const(x) => Uniform::Const(op.eval(*x)),
            _ => Uniform::Unary(op, a),
        },
        other @ (Uniform::Const(_)
        | Uniform::Var(_)
        | Uniform::Grid(_)
        | Uniform::Unit
        | Uniform::ClusterRank
        | Uniform::Fetch { .. }
        | Uniform::Fma(..)
        | Uniform::Select(..)
        | Uniform::Cast(..)
        | Uniform::Rand(_)) => other,
    }
}
