//! join-parts: the merge of a split stream in the kernel of the parts, run by the last unit to finish its part.
//!
//! ```text
//! kernel k { role r { part; store the states } }      kernel k_merge { grid [..] role main { merge } }
//! →  kernel k { role r { part; store the states
//!                        last arrived = k_count[task's block] of parts·units
//!                        if arrived { for merge's blocks within the task's block { merge } } } }
//! ```
//! The merge reads all states in their own order, so that the result does not depend on who comes last: it is the same
//! bit by bit in every launch. Invariant: units that are not last touch nothing after they counted, and every block of
//! the merge lies within one task's block, so that it is run exactly once.

use std::collections::BTreeMap;

use einfall_ir::arena::Id;
use einfall_ir::kernel::{Bound, Buf, BufId, BufSpace, Expr, FragId, Kernel, Operand, Role, Stmt, Var, VarId, View};
use einfall_ir::mapping::{KernelMapping, RoleMapping};
use einfall_ir::ops::BinaryOp;
use einfall_ir::tile::{self, AxisId, AxisKind, Plan};

use super::exprs::{add, min, mul, size_of};
use super::split_streams::{COUNT, PART};
use super::{Step, refuse};

/// The merge's mapping for a role of the parts' kernel: one of its units.
pub(super) fn mapped(m: &KernelMapping, part: &Kernel) -> Step<KernelMapping> {
    let role = &part.roles[storing(part)?];
    let own = RoleMapping { role: role.name.clone(), scope: role.scope, units: 1, regs: None, ping_pong: false };
    Ok(KernelMapping { roles: vec![own], ..m.clone() })
}

/// The role that stores the parts.
fn storing(part: &Kernel) -> Step<usize> {
    let mut found = Vec::new();
    for (i, r) in part.roles.iter().enumerate() {
        let (mut stores, mut sends) = (false, false);
        each(&r.body, &mut |s| match s {
            Stmt::Store { dst, .. } => stores |= matches!(part.bufs[dst.buf].space, BufSpace::Global { .. }),
            Stmt::Copy { dst, .. } => sends |= matches!(part.bufs[dst.buf].space, BufSpace::Global { .. }),
            _ => {}
        });
        if sends {
            let message = format!("the parts of {} leave by a copy engine", part.name);
            return refuse("split", message, "leave out `by` in their stores, or write `merge second_kernel`");
        }
        found.extend(stores.then_some(i));
    }
    match found[..] {
        [one] => Ok(one),
        _ => refuse(
            "split",
            format!("the parts of {} are not stored by one role", part.name),
            "give one role the stores",
        ),
    }
}

fn each(body: &[Stmt], f: &mut impl FnMut(&Stmt)) {
    for s in body {
        f(s);
        match s {
            Stmt::For { body, .. } => each(body, f),
            Stmt::If { then, otherwise, .. } => {
                each(then, f);
                each(otherwise, f);
            }
            _ => {}
        }
    }
}

/// The grid axes of a kernel in the order of the launch's dimensions.
fn grid<'a>(k: &'a tile::Kernel, m: &KernelMapping) -> Vec<(AxisId, &'a str)> {
    let all: Vec<_> =
        k.axes.iter().filter(|(_, a)| a.kind == AxisKind::Grid).map(|(id, a)| (id, a.name.as_str())).collect();
    let mut out: Vec<_> = m.work.order.iter().filter_map(|n| all.iter().copied().find(|(_, name)| name == n)).collect();
    let rest: Vec<_> = all.into_iter().filter(|x| !out.contains(x)).collect();
    out.extend(rest);
    out
}

/// One kernel of `part`, lowered from `parts` by `m`, and `merge`, lowered from `merges` by `mm`.
///
/// # Errors
/// The merge's blocks do not lie within the parts' tasks, or its kernel needs more than one unit.
pub(super) fn run(
    plan: &Plan,
    (part, parts, m): (Kernel, &tile::Kernel, &KernelMapping),
    (merge, merges, mm): (Kernel, &tile::Kernel, &KernelMapping),
) -> Step<Kernel> {
    let role = storing(&part)?;
    let work = &m.work;
    if work.persistent || work.group > 1 || work.longest_first || !part.cluster.is_empty() {
        let message =
            format!("{} merges where tasks arrive, and its tasks are clustered or walk several blocks", part.name);
        return refuse("split", message, "leave out `work` and clusters, or write `merge second_kernel`");
    }
    let mut meets = !merge.barriers.is_empty() || merge.roles.len() != 1 || merge.roles[0].units != 1;
    each(&merge.roles[0].body, &mut |s| {
        meets |=
            matches!(s, Stmt::TaskSync | Stmt::ClusterSync | Stmt::GridSync | Stmt::Copy { .. } | Stmt::Last { .. });
    });
    if meets {
        let message = format!("the merge of {} needs several units", part.name);
        return refuse("split", message, "cut no axis of the merge over units");
    }
    let dims = grid(parts, m);
    let block = |k: &tile::Kernel, m: &KernelMapping, a: AxisId| {
        let axis = &k.axes[a];
        m.axis(&axis.name).map(|x| x.block).or(axis.block).unwrap_or(1)
    };

    let mut joined = Joined {
        kernel: part,
        from: &merge,
        grid: Vec::new(),
        bufs: BTreeMap::new(),
        vars: BTreeMap::new(),
        frags: BTreeMap::new(),
    };
    // Where each dimension of the merge's grid stands, and the loops around it.
    let mut loops: Vec<(VarId, Expr, Expr)> = Vec::new();
    for (d, (a, name)) in grid(merges, mm).into_iter().enumerate() {
        let own = block(merges, mm, a);
        let Some(at) = dims.iter().position(|(_, n)| *n == name) else {
            let v = joined.var(&format!("at_{name}"));
            loops.push((v, Expr::Int(0), merge.grid[d].clone()));
            joined.grid.push(Expr::Var(v));
            continue;
        };
        let whole = block(parts, m, dims[at].0);
        if whole % own != 0 {
            let message = format!("blocks of {own} along {name} cross the tasks of {}, of {whole}", joined.kernel.name);
            return refuse("split", message, "choose a block of the merge that divides the parts'");
        }
        let each = Expr::Int((whole / own) as i64);
        let first = mul(Expr::Grid(at), each.clone());
        if whole == own {
            joined.grid.push(first);
            continue;
        }
        let v = joined.var(&format!("at_{name}"));
        loops.push((v, first.clone(), min(add(first, each), merge.grid[d].clone())));
        joined.grid.push(Expr::Var(v));
    }
    let mut body: Vec<Stmt> = merge.roles[0].body.iter().map(|s| joined.stmt(s)).collect();
    for (var, lo, hi) in loops.into_iter().rev() {
        body = vec![Stmt::For { var, lo, hi, step: 1, unroll: false, body }];
    }

    // One counter per block of the launch without its parts.
    let name = format!("{}_{COUNT}", parts.name);
    let Some((id, counters)) = plan.buffers.iter().find(|(_, b)| b.name == name) else {
        return refuse("split", format!("{} has no counters", parts.name), "run split-streams first");
    };
    let extents = counters.dims.iter().map(|s| size_of(plan, s)).collect();
    let space = BufSpace::Global { param: id.index(), written: true, together: 1 };
    let counter = joined.kernel.bufs.push(Buf { name, dtype: counters.dtype, dims: extents, space });
    let part_axis = format!("{}_{PART}", m.split.as_ref().map_or("", |s| s.axis.as_str()));
    let at = (0..dims.len()).filter(|d| dims[*d].1 != part_axis).map(Expr::Grid).collect();
    let Some(number) = dims.iter().position(|(_, n)| *n == part_axis) else {
        return refuse("split", format!("{} has not been cut", parts.name), "run split-streams first");
    };
    let arrived = joined.var("arrived");
    let mut kernel = joined.kernel;
    let units = Expr::Int(kernel.roles[role].units as i64);
    let of = kernel.grid[number].clone().bin(BinaryOp::Mul, units);
    let Role { body: all, .. } = &mut kernel.roles[role];
    all.push(Stmt::Last { var: arrived, counter, at, of });
    all.push(Stmt::If { cond: Expr::Var(arrived), then: body, otherwise: Vec::new() });
    for a in &merge.assumes {
        if !kernel.assumes.contains(a) {
            kernel.assumes.push(a.clone());
        }
    }
    Ok(kernel)
}

/// The kernel under way: `from`'s statements get names and positions of their own in it.
struct Joined<'a> {
    kernel: Kernel,
    from: &'a Kernel,
    /// For each dimension of `from`'s grid.
    grid: Vec<Expr>,
    bufs: BTreeMap<BufId, BufId>,
    vars: BTreeMap<VarId, VarId>,
    frags: BTreeMap<FragId, FragId>,
}

impl Joined<'_> {
    fn var(&mut self, base: &str) -> VarId {
        let name = fresh(base, |n| self.kernel.vars.iter().any(|(_, v)| v.name == n));
        self.kernel.vars.push(Var { name })
    }

    fn own_var(&mut self, v: VarId) -> VarId {
        if let Some(known) = self.vars.get(&v) {
            return *known;
        }
        let new = self.var(&self.from.vars[v].name.clone());
        self.vars.insert(v, new);
        new
    }

    fn frag(&mut self, f: FragId) -> FragId {
        if let Some(known) = self.frags.get(&f) {
            return *known;
        }
        let mut frag = self.from.frags[f].clone();
        frag.name = fresh(&frag.name, |n| self.kernel.frags.iter().any(|(_, x)| x.name == n));
        let new = self.kernel.frags.push(frag);
        self.frags.insert(f, new);
        new
    }

    /// The same array, or a buffer of its own in shared memory.
    fn buf(&mut self, b: BufId) -> BufId {
        if let Some(known) = self.bufs.get(&b) {
            return *known;
        }
        let mut buf = self.from.bufs[b].clone();
        let same = match buf.space {
            BufSpace::Global { param, .. } => self.kernel.bufs.iter().find_map(|(id, x)| match x.space {
                BufSpace::Global { param: p, .. } => (p == param).then_some(id),
                BufSpace::Shared { .. } | BufSpace::Scratch { .. } => None,
            }),
            BufSpace::Shared { .. } | BufSpace::Scratch { .. } => None,
        };
        let new = match same {
            Some(id) => {
                if let (BufSpace::Global { written, .. }, BufSpace::Global { written: also, .. }) =
                    (&mut self.kernel.bufs[id].space, &buf.space)
                {
                    *written |= also;
                }
                id
            }
            None => {
                buf.name = fresh(&buf.name, |n| self.kernel.bufs.iter().any(|(_, x)| x.name == n));
                self.kernel.bufs.push(buf)
            }
        };
        self.bufs.insert(b, new);
        new
    }

    fn exprs(&mut self, list: &[Expr]) -> Vec<Expr> {
        list.iter().map(|e| self.expr(e)).collect()
    }

    fn expr(&mut self, e: &Expr) -> Expr {
        let mut boxed = |e: &Expr| Box::new(self.expr(e));
        match e {
            Expr::Unary(op, a) => Expr::Unary(*op, boxed(a)),
            Expr::Binary(op, a, b) => {
                let (a, b) = (self.expr(a), self.expr(b));
                a.bin(*op, b)
            }
            Expr::Fma(a, b, c) => Expr::Fma(boxed(a), boxed(b), boxed(c)),
            Expr::Select(a, b, c) => Expr::Select(boxed(a), boxed(b), boxed(c)),
            Expr::Cast(d, a) => Expr::Cast(*d, boxed(a)),
            Expr::Rand(of) => Expr::Rand(Box::new(std::array::from_fn(|i| self.expr(&of[i])))),
            Expr::Var(v) => Expr::Var(self.own_var(*v)),
            Expr::Grid(d) => self.grid[*d].clone(),
            // The merge has one unit.
            Expr::Unit | Expr::ClusterRank => Expr::Int(0),
            Expr::Scalar(b) => Expr::Scalar(self.buf(*b)),
            Expr::Fetch { buf, at } => Expr::Fetch { buf: self.buf(*buf), at: self.exprs(at) },
            Expr::Frag { frag, dims } => Expr::Frag { frag: self.frag(*frag), dims: dims.clone() },
            Expr::Int(_) | Expr::Float(_) | Expr::Extent(_) | Expr::Coord(_) => e.clone(),
        }
    }

    fn view(&mut self, v: &View) -> View {
        let stage = v.stage.as_ref().map(|s| self.expr(s));
        View { buf: self.buf(v.buf), stage, at: self.exprs(&v.at), walk: v.walk.clone() }
    }

    fn bounds(&mut self, list: &[Bound]) -> Vec<Bound> {
        list.iter().map(|b| Bound { dim: b.dim, limit: self.expr(&b.limit) }).collect()
    }

    fn operand(&mut self, o: &Operand) -> Operand {
        match o {
            Operand::Frag { frag, from } => Operand::Frag { frag: self.frag(*frag), from: from.clone() },
            Operand::Mem(v) => Operand::Mem(self.view(v)),
        }
    }

    fn body(&mut self, list: &[Stmt]) -> Vec<Stmt> {
        list.iter().map(|s| self.stmt(s)).collect()
    }

    fn stmt(&mut self, s: &Stmt) -> Stmt {
        match s {
            Stmt::For { var, lo, hi, step, unroll, body } => Stmt::For {
                var: self.own_var(*var),
                lo: self.expr(lo),
                hi: self.expr(hi),
                step: *step,
                unroll: *unroll,
                body: self.body(body),
            },
            Stmt::If { cond, then, otherwise } => {
                Stmt::If { cond: self.expr(cond), then: self.body(then), otherwise: self.body(otherwise) }
            }
            Stmt::Let { var, value } => {
                let value = self.expr(value);
                Stmt::Let { var: self.own_var(*var), value }
            }
            Stmt::Map { out, value } => Stmt::Map { out: self.frag(*out), value: self.expr(value) },
            Stmt::Reduce { out, op, src, over, base, bounds, carry } => Stmt::Reduce {
                out: out.iter().map(|f| self.frag(*f)).collect(),
                op: *op,
                src: self.frag(*src),
                over: over.clone(),
                base: base.as_ref().map(|e| self.expr(e)),
                bounds: self.bounds(bounds),
                carry: *carry,
            },
            Stmt::Scan { out, op, src, along, carry, bounds } => Stmt::Scan {
                out: self.frag(*out),
                op: *op,
                src: self.frag(*src),
                along: *along,
                carry: carry.map(|f| self.frag(f)),
                bounds: self.bounds(bounds),
            },
            Stmt::Load { out, src, bounds } => {
                Stmt::Load { out: self.frag(*out), src: self.view(src), bounds: self.bounds(bounds) }
            }
            Stmt::Store { dst, src, bounds, join } => {
                Stmt::Store { dst: self.view(dst), src: self.frag(*src), bounds: self.bounds(bounds), join: *join }
            }
            Stmt::Gather { out, buf, at, bounds } => Stmt::Gather {
                out: self.frag(*out),
                buf: self.buf(*buf),
                at: self.exprs(at),
                bounds: self.bounds(bounds),
            },
            Stmt::Scatter { buf, at, src, bounds, join } => Stmt::Scatter {
                buf: self.buf(*buf),
                at: self.exprs(at),
                src: self.frag(*src),
                bounds: self.bounds(bounds),
                join: *join,
            },
            Stmt::Atom { atom, acc, acc_from, a, b, keep } => Stmt::Atom {
                atom: atom.clone(),
                acc: self.frag(*acc),
                acc_from: acc_from.clone(),
                a: self.operand(a),
                b: self.operand(b),
                keep: self.expr(keep),
            },
            // Refused before: a merge of one unit has none of these.
            Stmt::Copy { .. }
            | Stmt::Arrive { .. }
            | Stmt::Wait { .. }
            | Stmt::NamedSync { .. }
            | Stmt::NamedArrive { .. }
            | Stmt::Last { .. }
            | Stmt::Fence(_)
            | Stmt::Commit(_)
            | Stmt::WaitGroup { .. }
            | Stmt::TaskSync
            | Stmt::ClusterSync
            | Stmt::GridSync
            | Stmt::GridDependency(_) => s.clone(),
        }
    }
}

/// `base`, with a number when taken.
fn fresh(base: &str, taken: impl Fn(&str) -> bool) -> String {
    if !taken(base) {
        return base.to_string();
    }
    (2..).map(|i| format!("{base}_{i}")).find(|n| !taken(n)).expect("some name is free")
}
