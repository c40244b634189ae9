//! Tile plans → kernel IR for CPU cores: a task is one grid block, run by one thread with vector lanes.
//!
//! Tiles are read in place ([`place::Place::Direct`]) or live in the task's scratch, laid out for the operation that
//! reads them most (panels for contractions). Every operation becomes a nest of loops around registers of lanes:
//! elementwise chains share one nest ([`nest`]), contractions are outer products in a register tile ([`contract`]).
//! Invariants: loop bounds clip tails, so no element beyond an extent is read from or written to an array; results do
//! not depend on how tasks are spread over threads; nothing here names an operation of the user's.

mod access;
mod build;
mod contract;
mod filter;
mod gather;
mod launched;
mod nest;
mod packed;
mod place;
mod runs;
mod scan;
mod strip;

use std::collections::BTreeMap;
use std::fmt;

use einfall_ir::arena::{Arena, Id};
use einfall_ir::cascade::Size;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::{self, Buf, BufId, BufSpace, Expr as E, Frag, FragId, Role, Scope, Stmt, Var, VarId};
use einfall_ir::layout::Distribution;
use einfall_ir::mapping::Mapping;
use einfall_ir::tile::{self, AxisId, AxisKind, BufferId, BufferKind, Node, Op, Plan, TileId};

use self::build::*;
pub use self::launched::launch_steps;
pub use self::packed::pack_operands;
use self::place::Place;
use crate::backend::llvm::Isa;

/// What the CPU path does not lower yet: a clear refusal, never wrong code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotLowered {
    /// The kernel.
    pub kernel: String,
    /// What it needs, a noun phrase.
    pub what: String,
}

impl fmt::Display for NotLowered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {}: the CPU backend does not support {}", self.kernel, self.what)
    }
}

impl std::error::Error for NotLowered {}

/// Blocks of axes that the mapping (if any) chooses, put into the plan. Axes it leaves out keep theirs.
pub fn apply(plan: &Plan, mapping: &Mapping) -> Plan {
    let mut plan = plan.clone();
    for k in &mut plan.kernels {
        let Some(m) = mapping.kernels.iter().find(|m| m.kernel == k.name) else { continue };
        for (_, axis) in k.axes.iter_mut() {
            if let Some(a) = m.axes.iter().find(|a| a.axis == axis.name && a.block > 0)
                && axis.kind != AxisKind::Inner
            {
                axis.block = Some(a.block);
            }
        }
    }
    plan
}

/// A name for an array or a kernel that the plan has none of: `base`, or with a number behind it.
fn fresh(plan: &Plan, base: String) -> String {
    let taken = |n: &str| plan.buffers.iter().any(|(_, b)| b.name == n) || plan.kernels.iter().any(|k| k.name == n);
    let mut name = base.clone();
    for i in 2.. {
        if !taken(&name) {
            break;
        }
        name = format!("{base}_{i}");
    }
    name
}

/// Lowers every kernel of a plan whose grid and stream axes have blocks.
///
/// # Errors
/// What has no lowering yet.
pub fn lower(plan: &Plan, isa: &Isa) -> Result<kernel::Module, NotLowered> {
    let kernels = plan
        .kernels
        .iter()
        .map(|k| Lower::kernel(plan, &gather::gather(&contract::thin(plan, k)), isa))
        .collect::<Result<_, _>>()?;
    Ok(kernel::Module { name: plan.name.clone(), ranks: plan.ranks.clone(), kernels })
}

type Out<T> = Result<T, NotLowered>;

/// An axis where an operation stands.
#[derive(Clone, Debug)]
struct Range {
    /// First coordinate of the block.
    origin: E,
    /// Coordinates in the block, tails clipped.
    size: E,
    /// Coordinates at most (a literal for blocks, an expression for inner axes).
    most: E,
    /// Exactly one coordinate, always.
    unit: bool,
}

/// A kernel being lowered.
struct Lower<'a> {
    plan: &'a Plan,
    k: &'a tile::Kernel,
    isa: &'a Isa,
    bufs: Arena<BufId, Buf>,
    frags: Arena<FragId, Frag>,
    vars: Arena<VarId, Var>,
    globals: BTreeMap<BufferId, BufId>,
    places: Vec<Place>,
    ranges: Vec<Range>,
    /// Operations that read each tile, by position in program order.
    readers: Vec<Vec<usize>>,
    /// Position of the next operation.
    position: usize,
    /// Conditions known to hold where code is emitted.
    known: Vec<tile::ExprId>,
    /// Types of the memory that fragments were loaded from, by fragment name.
    loaded_types: BTreeMap<String, DType>,
    /// What is fetched once before the loops of the nest being emitted; none outside of nests.
    front: Option<Vec<(E, VarId)>>,
    /// Scratch for packed operands, by operation and side.
    packs: BTreeMap<(usize, bool), place::Scratch>,
    /// The axis that is walked in strips now, a strip's first coordinate, and how many it has.
    stripped: Option<(AxisId, VarId, u64)>,
    /// What is fixed while the operand of a run is packed.
    run: runs::Fixed,
}

/// A kernel being lowered, its grid, and the statements that bind its blocks.
type Opened<'a> = (Lower<'a>, Vec<E>, Vec<Stmt>);

impl<'a> Lower<'a> {
    /// A kernel whose arrays, axes and readers are known.
    fn open(plan: &'a Plan, k: &'a tile::Kernel, isa: &'a Isa) -> Out<Opened<'a>> {
        let mut l = Lower {
            plan,
            k,
            isa,
            bufs: Arena::new(),
            frags: Arena::new(),
            vars: Arena::new(),
            globals: BTreeMap::new(),
            places: Vec::new(),
            ranges: Vec::new(),
            readers: vec![Vec::new(); k.tiles.len()],
            position: 0,
            known: Vec::new(),
            loaded_types: BTreeMap::new(),
            front: None,
            packs: BTreeMap::new(),
            stripped: None,
            run: runs::Fixed::default(),
        };
        l.declare_arrays();
        let (grid, body) = l.axes()?;
        l.find_readers();
        Ok((l, grid, body))
    }

    fn kernel(plan: &'a Plan, k: &'a tile::Kernel, isa: &'a Isa) -> Out<kernel::Kernel> {
        let (mut l, grid, mut body) = Lower::open(plan, k, isa)?;
        l.place_tiles()?;
        body.extend(l.nodes(&k.body)?);
        Ok(kernel::Kernel {
            name: k.name.clone(),
            variant_of: None,
            assumes: Vec::new(),
            dependent: false,
            grid,
            cluster: Vec::new(),
            bufs: l.bufs,
            frags: l.frags,
            barriers: Arena::new(),
            vars: l.vars,
            roles: vec![Role { name: "core".into(), scope: Scope::Thread, units: 1, regs: None, body }],
        })
    }

    fn unsupported(&self, what: impl Into<String>) -> NotLowered {
        NotLowered { kernel: self.k.name.clone(), what: what.into() }
    }

    /// Every array the kernel names, in order of first use.
    fn declare_arrays(&mut self) {
        let mut used: BTreeMap<BufferId, bool> = BTreeMap::new();
        for (_, e) in self.k.exprs.iter() {
            if let tile::Expr::Read { buffer, .. } = e {
                used.entry(*buffer).or_insert(false);
            }
        }
        self.k.for_each_op(&mut |op, _| match op {
            Op::Load { buffer, .. } => {
                used.entry(*buffer).or_insert(false);
            }
            Op::Store { buffer, .. } => {
                used.insert(*buffer, true);
            }
            Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {}
        });
        for (b, written) in used {
            let buffer = &self.plan.buffers[b];
            let written = written && buffer.kind != BufferKind::Input;
            let mut dims: Vec<E> = buffer.dims.iter().map(size).collect();
            let together = self.together(b);
            if let (2.., [.., rows, columns, _]) = (together, dims.as_mut_slice()) {
                *rows = mul(rows.clone(), int(together as i64));
                let columns = columns.clone();
                dims.truncate(dims.len() - 2);
                dims.push(columns);
            }
            let space = BufSpace::Global { param: b.index(), written, together };
            let id = self.bufs.push(Buf { name: buffer.name.clone(), dtype: buffer.dtype, dims, space });
            self.globals.insert(b, id);
        }
    }

    /// Grid extents, and the statements that bind each grid axis's origin and size.
    fn axes(&mut self) -> Out<(Vec<E>, Vec<Stmt>)> {
        let mut body = Vec::new();
        // The axis whose blocks follow each other is the outermost dimension.
        let mut dims: Vec<AxisId> = self.k.axes.ids().filter(|a| self.k.axes[*a].kind == AxisKind::Grid).collect();
        dims.sort_by_key(|a| self.k.ordered != Some(*a));
        let mut grid = vec![int(1); dims.len()];
        for (id, a) in self.k.axes.iter() {
            let extent = size(&a.extent);
            let range = match a.kind {
                AxisKind::Inner => {
                    let unit = a.extent == Size::Const(1);
                    Range { origin: int(0), size: extent.clone(), most: extent, unit }
                }
                AxisKind::Grid => {
                    let block = a.block.unwrap_or(1).max(1);
                    let d = dims.iter().position(|x| *x == id).unwrap_or_default();
                    grid[d] = ceil_div(extent.clone(), block);
                    let (r, stmts) = self.block_range(&a.name, extent, block, mul(E::Grid(d), int(block as i64)));
                    body.extend(stmts);
                    r
                }
                // Bound where the stream stands.
                AxisKind::Stream => {
                    let block = a.block.unwrap_or(1).max(1) as i64;
                    let most = match &a.extent {
                        Size::Const(n) => int((*n as i64).min(block)),
                        _ => int(block),
                    };
                    Range { origin: int(0), size: most.clone(), most, unit: block == 1 || a.extent == Size::Const(1) }
                }
            };
            debug_assert_eq!(id.index(), self.ranges.len());
            self.ranges.push(range);
        }
        if grid.is_empty() {
            grid.push(int(1));
        }
        Ok((grid, body))
    }

    /// The range of a block that starts at `origin`, with the statements that bind it.
    fn block_range(&mut self, name: &str, extent: E, block: u64, origin: E) -> (Range, Vec<Stmt>) {
        let o = self.var(&format!("{name}0"));
        let mut stmts = vec![Stmt::Let { var: o, value: origin }];
        let b = block as i64;
        let (size, most) = match &extent {
            _ if block == 1 => (int(1), int(1)),
            E::Int(n) if n % b == 0 => (int(b), int(b)),
            E::Int(n) if *n < b => (int(*n), int(*n)),
            _ => {
                let s = self.var(&format!("{name}s"));
                stmts.push(Stmt::Let { var: s, value: min(int(b), sub(extent.clone(), E::Var(o))) });
                (E::Var(s), int(b))
            }
        };
        let unit = block == 1 || extent == int(1);
        (Range { origin: E::Var(o), size, most, unit }, stmts)
    }

    fn var(&mut self, name: &str) -> VarId {
        let n = self.vars.len();
        self.vars.push(Var { name: format!("{name}_{n}") })
    }

    /// A fragment of `width` lanes' worth of elements along one dimension, or a scalar where 0.
    fn frag(&mut self, name: &str, dtype: DType, width: u64) -> FragId {
        let dist = if width == 0 {
            Distribution::vectors(&[], None, self.isa.lanes())
        } else {
            Distribution::vectors(&[width], Some(0), self.isa.lanes())
        };
        let name = format!("{name}_{}", self.frags.len());
        self.frags.push(Frag { name, dtype, dist })
    }

    /// The type registers hold elements of `dtype` in.
    fn register_type(dtype: DType) -> DType {
        match dtype {
            DType::F64 => DType::F64,
            DType::Bool => DType::Bool,
            DType::F32 | DType::Tf32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => DType::F32,
            DType::I64 | DType::I32 | DType::I8 | DType::U8 | DType::I4 | DType::U4 => DType::I64,
        }
    }

    /// The type a tile's elements are rounded to when written. An accumulator carried over steps is held in f32
    /// whatever its type, so that the result does not depend on the blocks; its readers round.
    fn held(&self, t: TileId) -> DType {
        let dtype = self.k.tiles[t].dtype;
        if !dtype.is_float() || dtype == DType::F64 {
            return dtype;
        }
        let mut carried = false;
        self.k.for_each_op(&mut |op, _| {
            carried |= match op {
                Op::Contract { out, carry, .. } => *carry && *out == t,
                Op::Reduce { out, carry, .. } => *carry && out.contains(&t),
                Op::Load { .. } | Op::Store { .. } | Op::Map { .. } | Op::Scan { .. } => false,
            };
        });
        if carried { DType::F32 } else { dtype }
    }

    /// Fills `readers`.
    fn find_readers(&mut self) {
        let mut readers = std::mem::take(&mut self.readers);
        let mut position = 0;
        let k = self.k;
        k.for_each_op(&mut |op, _| {
            let mut read = |t: TileId| {
                if !readers[t.index()].contains(&position) {
                    readers[t.index()].push(position);
                }
            };
            for root in op.roots() {
                tiles_of(k, root, &mut read);
            }
            match op {
                Op::Contract { out, a, b, carry, .. } => {
                    read(*a);
                    read(*b);
                    if *carry {
                        read(*out);
                    }
                }
                Op::Reduce { out, carry: true, .. } => out.iter().for_each(|t| read(*t)),
                Op::Scan { carry: Some(c), .. } => read(*c),
                Op::Load { .. } | Op::Store { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Scan { .. } => {}
            }
            position += 1;
        });
        self.readers = readers;
    }

    /// Operations and streams in order.
    fn nodes(&mut self, nodes: &[Node]) -> Out<Vec<Stmt>> {
        let mut out = Vec::new();
        let mut i = 0;
        while i < nodes.len() {
            match &nodes[i] {
                Node::Stream(s) => {
                    out.extend(self.stream(s)?);
                    i += 1;
                }
                Node::Op(op) => match op {
                    Op::Contract { .. } => {
                        out.extend(self.contract(op)?);
                        self.position += 1;
                        i += 1;
                    }
                    Op::Scan { .. } => {
                        out.extend(self.scan(op)?);
                        self.position += 1;
                        i += 1;
                    }
                    Op::Load { out: t, .. } | Op::Map { out: t, .. } if self.made_where_read(*t) || self.loaded(op) => {
                        self.position += 1;
                        i += 1;
                    }
                    Op::Load { out: t, buffer, at } if self.paired(*t) => {
                        out.extend(self.load_paired(*t, *buffer, at)?);
                        self.position += 1;
                        i += 1;
                    }
                    Op::Store { .. } if self.stored(op) => {
                        self.position += 1;
                        i += 1;
                    }
                    Op::Load { .. } | Op::Store { .. } | Op::Map { .. } | Op::Reduce { .. } => {
                        if let Some((stmts, n)) = self.strips(&nodes[i..])? {
                            out.extend(stmts);
                            i += n;
                            continue;
                        }
                        let n = self.group(&nodes[i..]);
                        out.extend(self.nest(&strip::operations(&nodes[i..i + n]))?);
                        self.position += n;
                        i += n;
                    }
                },
            }
        }
        Ok(out)
    }

    /// Whether a tile has no place of its own.
    fn made_where_read(&self, t: TileId) -> bool {
        matches!(self.places[t.index()], Place::Direct { .. } | Place::Computed(_))
    }

    /// Whether a tile lives where neighbours stand together.
    fn paired(&self, t: TileId) -> bool {
        matches!(&self.places[t.index()], Place::Scratch(s) if s.layout.together() > 1)
    }

    /// Axes of `axes` with more than one coordinate.
    fn wide(&self, axes: &[AxisId]) -> Vec<AxisId> {
        let mut v: Vec<AxisId> = Vec::new();
        for a in axes {
            if !self.ranges[a.index()].unit && !v.contains(a) {
                v.push(*a);
            }
        }
        v
    }
}

/// Calls `f` on every tile an expression reads.
fn tiles_of(k: &tile::Kernel, root: tile::ExprId, f: &mut impl FnMut(TileId)) {
    k.walk(root, &mut |_, e| match e {
        tile::Expr::Tile(t) | tile::Expr::TileAt { tile: t, .. } => f(*t),
        tile::Expr::Int(_)
        | tile::Expr::Float(_)
        | tile::Expr::Size(_)
        | tile::Expr::Coord(_)
        | tile::Expr::Read { .. }
        | tile::Expr::Unary(..)
        | tile::Expr::Binary(..)
        | tile::Expr::Select(..)
        | tile::Expr::Cast(..)
        | tile::Expr::Rand(_) => {}
    });
}
