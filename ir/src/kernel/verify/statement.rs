//! Statements one by one: arities, types, distributions, windows, boxes and descriptors.
//!
//! Invariant: alignment and range are refused only where they are provably wrong; the evaluator sees the rest.

use super::value::{Range, Scope, gcd};
use super::*;
use crate::kernel::atoms::{Atom, Descriptor};
use crate::kernel::copies::{BOX_ALIGN, TmaBox};

impl<'a> Verifier<'a> {
    pub(super) fn role_body(&mut self) {
        let role = &self.kernel.roles[self.role];
        let mut scope = Scope::default();
        self.body(&role.body, &role.name.clone(), &mut scope);
        self.line = None;
    }

    fn body(&mut self, body: &'a [Stmt], path: &str, scope: &mut Scope) {
        for (i, s) in body.iter().enumerate() {
            let path = format!("{path}.{i}");
            (self.path, self.line) = (path.clone(), Some(s));
            self.stmt(s, &path, scope);
        }
    }

    fn bind(&mut self, var: VarId, scope: &mut Scope) {
        if self.kernel.vars.get(var).is_none() {
            self.wrong(format!("there is no variable {}", var.index()));
        }
        scope.bound.insert(var);
        scope.ranges.remove(&var);
        scope.factors.remove(&var);
    }

    fn stmt(&mut self, s: &'a Stmt, path: &str, scope: &mut Scope) {
        match s {
            Stmt::For { var, lo, hi, step, unroll, body } => {
                self.uniform(lo, scope, true);
                self.uniform(hi, scope, true);
                if *step <= 0 {
                    self.wrong("a loop's step must be positive");
                    return;
                }
                let constant = |e: &Expr, s: &Scope, v: &Self| v.range(e, s).filter(|r| r.lo == r.hi).map(|r| r.lo);
                let bounds = constant(lo, scope, self).zip(constant(hi, scope, self));
                if *unroll && bounds.is_none() {
                    self.wrong("an unrolled loop needs constant bounds");
                }
                let first = self.factor(lo, scope);
                let outer = scope.clone();
                self.bind(*var, scope);
                if let Some((lo, hi)) = bounds.filter(|(lo, hi)| lo < hi) {
                    let last = lo + (hi - 1 - lo) / step * step;
                    scope.ranges.insert(*var, Range { lo, hi: last, exact: !scope.guarded });
                }
                // Variables bound again in the body are unknown from the second iteration on.
                let mut rebound = Vec::new();
                print::bind_order(body, &mut rebound);
                for v in rebound.iter().filter(|v| *v != var) {
                    scope.ranges.remove(v);
                    scope.factors.remove(v);
                }
                if !rebound.contains(var)
                    && let Some(first) = first
                {
                    scope.factors.insert(*var, gcd(first, step.unsigned_abs()));
                }
                self.body(body, path, scope);
                // The loop may not run: only what was bound before is.
                let bound = outer.bound.clone();
                *scope = outer;
                for v in rebound.iter().chain([var]) {
                    scope.ranges.remove(v);
                    scope.factors.remove(v);
                }
                scope.bound = bound;
            }
            Stmt::If { cond, then, otherwise } => {
                self.uniform(cond, scope, false);
                let (mut a, mut b) = (scope.clone(), scope.clone());
                (a.guarded, b.guarded) = (true, true);
                for r in a.ranges.values_mut().chain(b.ranges.values_mut()) {
                    r.exact = false;
                }
                self.body(then, path, &mut a);
                self.body(otherwise, &format!("{path}.else"), &mut b);
                scope.bound = a.bound.intersection(&b.bound).copied().collect();
                let mut rebound = Vec::new();
                print::bind_order(then, &mut rebound);
                print::bind_order(otherwise, &mut rebound);
                for v in rebound {
                    scope.ranges.remove(&v);
                    scope.factors.remove(&v);
                }
            }
            Stmt::Let { var, value } => {
                self.uniform(value, scope, true);
                let (range, factor) = (self.range(value, scope), self.factor(value, scope));
                self.bind(*var, scope);
                scope.ranges.extend(range.map(|r| (*var, Range { exact: r.exact && r.lo == r.hi, ..r })));
                scope.factors.extend(factor.map(|f| (*var, f)));
            }
            Stmt::Map { out, value } => {
                if self.frag(*out).is_some() {
                    self.elementwise(value, scope, *out);
                }
            }
            Stmt::Reduce { out, op, src, over, base, bounds, carry: _ } => {
                let Some(f) = self.frag(*src) else { return };
                let rank = f.dist.dims.len();
                let wanted = if op.selects_argument() { 2 } else { 1 };
                let distinct: HashSet<_> = over.iter().collect();
                if out.len() != wanted || distinct.len() != over.len() || over.iter().any(|d| *d >= rank) {
                    self.wrong(format!(
                        "a reduction by {} has {wanted} results and reduces distinct dimensions",
                        op.name()
                    ));
                    return;
                }
                if base.is_some() && wanted == 1 {
                    self.wrong("only an argument selection has a base");
                }
                base.iter().for_each(|b| self.uniform(b, scope, true));
                let kept: Vec<usize> = (0..rank).filter(|d| !over.contains(d)).collect();
                for o in out {
                    self.operand(*o, *src, &kept);
                }
                self.bounds(bounds, rank, scope);
            }
            Stmt::Scan { out, op, src, along, carry, bounds } => {
                let Some(f) = self.frag(*src) else { return };
                let rank = f.dist.dims.len();
                if *along >= rank || op.selects_argument() {
                    self.wrong("a scan runs along a dimension of its source and selects no argument");
                    return;
                }
                self.operand(*src, *out, &(0..rank).collect::<Vec<_>>());
                if let Some(c) = carry {
                    let kept: Vec<usize> = (0..rank).filter(|d| d != along).collect();
                    self.operand(*c, *src, &kept);
                }
                self.bounds(bounds, rank, scope);
            }
            Stmt::Load { out, src, bounds } => {
                let Some(f) = self.frag(*out) else { return };
                self.window(src, &f.dist.dims, bounds, scope, false);
                self.bounds(bounds, f.dist.dims.len(), scope);
            }
            Stmt::Store { dst, src, bounds, join } => {
                let Some(f) = self.frag(*src) else { return };
                self.window(dst, &f.dist.dims, bounds, scope, false);
                self.bounds(bounds, f.dist.dims.len(), scope);
                self.written(dst.buf);
                self.joined(*join);
            }
            Stmt::Gather { out, buf, at, bounds } => {
                let Some(f) = self.frag(*out) else { return };
                self.indexed(*buf, at, *out, scope);
                self.bounds(bounds, f.dist.dims.len(), scope);
            }
            Stmt::Scatter { buf, at, src, bounds, join } => {
                let Some(f) = self.frag(*src) else { return };
                self.indexed(*buf, at, *src, scope);
                self.bounds(bounds, f.dist.dims.len(), scope);
                self.written(*buf);
                self.joined(*join);
            }
            Stmt::Atom { atom, acc, acc_from, a, b, keep } => {
                self.uniform(keep, scope, false);
                let Some(found) = atoms::find(atom) else {
                    self.wrong(format!("no atom is called `{}`", atom.0));
                    return;
                };
                self.atom(&found, *acc, acc_from, a, b, scope);
            }
            Stmt::Copy { engine, src, dst, extents, signal, multicast } => {
                self.copy(*engine, src, dst, extents, signal.as_ref(), *multicast, scope);
            }
            Stmt::Arrive { barrier, stage, expect_bytes: _, remote } => {
                self.at_barrier(*barrier, stage, true, scope);
                if let Some(r) = remote {
                    self.uniform(r, scope, true);
                    if self.kernel.cluster.is_empty() {
                        self.wrong("a remote arrival needs a cluster");
                    }
                }
            }
            Stmt::Wait { barrier, stage, phase } => {
                self.at_barrier(*barrier, stage, true, scope);
                self.uniform(phase, scope, true);
                if self.range(phase, scope).is_some_and(|r| r.exact && (r.lo < 0 || r.hi > 1)) {
                    self.wrong("the phase of a wait is a parity, 0 or 1");
                }
            }
            Stmt::NamedSync { barrier, stage } | Stmt::NamedArrive { barrier, stage } => {
                self.at_barrier(*barrier, stage, false, scope);
            }
            Stmt::Last { var, counter, at, of } => {
                at.iter().chain([of]).for_each(|e| self.uniform(e, scope, true));
                if let Some(b) = self.buf(*counter) {
                    if b.dtype != DType::I32 || !matches!(b.space, BufSpace::Global { .. }) || b.dims.len() != at.len()
                    {
                        self.wrong(format!("`{}` is no array of counters with {} dimensions", b.name, at.len()));
                    }
                    self.written(*counter);
                }
                if self.range(of, scope).is_some_and(|r| r.exact && r.hi < 1) {
                    self.wrong("a unit counts itself: at least one does");
                }
                self.bind(*var, scope);
            }
            Stmt::ClusterSync if self.kernel.cluster.is_empty() => self.wrong("the kernel has no clusters"),
            Stmt::Fence(_)
            | Stmt::Commit(_)
            | Stmt::WaitGroup { .. }
            | Stmt::TaskSync
            | Stmt::ClusterSync
            | Stmt::GridSync
            | Stmt::GridDependency(_) => {}
        }
    }

    fn at_barrier(&mut self, id: BarrierId, stage: &Expr, mbarrier: bool, scope: &Scope) {
        self.uniform(stage, scope, true);
        let Some(b) = self.barrier(id) else { return };
        if matches!(b.kind, BarrierKind::Mbarrier { .. }) != mbarrier {
            let kind = if mbarrier { "an mbarrier" } else { "a named barrier" };
            self.wrong(format!("`{}` is not {kind}", b.name));
        }
        if self.range(stage, scope).is_some_and(|r| outside(r, b.stages as i64)) {
            self.wrong(format!("`{}` has {} stages", b.name, b.stages));
        }
    }

    fn bounds(&mut self, bounds: &[Bound], rank: usize, scope: &Scope) {
        for b in bounds {
            self.uniform(&b.limit, scope, true);
            if b.dim >= rank {
                self.wrong(format!("the bound's dimension {} is none of the fragment's", b.dim));
            }
        }
    }

    fn written(&mut self, buf: BufId) {
        if let Some(b) = self.buf(buf)
            && matches!(b.space, BufSpace::Global { written: false, .. })
        {
            self.wrong(format!("`{}` is not declared as written", b.name));
        }
    }

    fn joined(&mut self, join: Option<ReduceOp>) {
        if join.is_some_and(ReduceOp::selects_argument) {
            self.wrong("argument selections do not join into memory");
        }
    }

    fn indexed(&mut self, buf: BufId, at: &[Expr], frag: FragId, scope: &Scope) {
        let Some(b) = self.buf(buf) else { return };
        if b.dims.len() != at.len() {
            self.wrong(format!("`{}` has {} dimensions; {} coordinates are given", b.name, b.dims.len(), at.len()));
        }
        for e in at {
            self.elementwise(e, scope, frag);
            if self.out.is_empty() && !self.kernel.is_integer(e) {
                self.wrong(format!("coordinate `{}` is no integer", print::expression(self.kernel, self.ranks, e)));
            }
        }
    }

    /// Checks a window walked by a tile of `extents`; `clipped` windows may reach outside.
    fn window(&mut self, v: &View, extents: &[u64], bounds: &[Bound], scope: &Scope, clipped: bool) -> Option<&'a Buf> {
        let b = self.buf(v.buf)?;
        v.at.iter().for_each(|e| self.uniform(e, scope, true));
        let rank = b.dims.len();
        if v.at.len() != rank || v.walk.len() != extents.len() || v.walk.iter().flatten().any(|(d, _)| *d >= rank) {
            self.wrong(format!(
                "the window into `{}` needs {rank} coordinates and walks {} dimensions",
                b.name,
                extents.len()
            ));
            return None;
        }
        let stages = match &b.space {
            BufSpace::Shared { stages, .. } => *stages,
            BufSpace::Global { .. } | BufSpace::Scratch { .. } => 1,
        };
        match &v.stage {
            None if stages > 1 => self.wrong(format!("`{}` has {stages} stages; say which", b.name)),
            None => {}
            Some(s) => {
                self.uniform(s, scope, true);
                if self.range(s, scope).is_some_and(|r| outside(r, stages as i64)) {
                    self.wrong(format!("`{}` has {stages} stages", b.name));
                }
            }
        }
        for dim in 0..rank {
            let (Some(origin), Some(extent)) = (self.range(&v.at[dim], scope), self.range(&b.dims[dim], scope)) else {
                continue;
            };
            let (mut lo, mut hi) = (origin.lo, origin.hi);
            let mut cut = false;
            for (d, w) in v.walk.iter().enumerate() {
                if let Some((at, step)) = w
                    && *at == dim
                {
                    cut |= bounds.iter().any(|b| b.dim == d);
                    let reach = (extents[d] as i64 - 1) * step;
                    lo += reach.min(0);
                    hi += reach.max(0);
                }
            }
            let touched = Range { lo, hi, exact: origin.exact };
            if !clipped && !cut && outside(touched, extent.lo) {
                self.wrong(format!("dimension {dim} of `{}` ends at {}; the window reaches {hi}", b.name, extent.lo));
            }
        }
        Some(b)
    }

    /// Refuses `e` if it is provably no multiple of `n`.
    fn aligned(&mut self, e: &Expr, n: u64, what: &str, scope: &Scope) {
        if let Some(f) = self.factor(e, scope)
            && f % n != 0
        {
            let text = print::expression(self.kernel, self.ranks, e);
            self.wrong(format!("{what} must be a multiple of {n}; `{text}` is one of {f} only"));
        }
    }

    fn atom(&mut self, atom: &Atom, acc: FragId, acc_from: &[u64], a: &Operand, b: &Operand, scope: &Scope) {
        let [m, n, k] = atom.shape;
        let role = &self.kernel.roles[self.role];
        if role.scope != atom.scope {
            self.wrong(format!("a {} issues {}, not a {}", atom.scope.name(), atom.name.0, role.scope.name()));
        }
        self.registers(acc, acc_from, Some(&atom.acc_dist), atom.acc, "accumulator");
        for (o, dist, memory, mn, shape) in
            [(a, &atom.a_dist, atom.a_memory, 0, [m, k]), (b, &atom.b_dist, atom.b_memory, 1, [k, n])]
        {
            let what = if mn == 0 { "operand a" } else { "operand b" };
            match o {
                Operand::Frag { frag, from } => self.registers(*frag, from, dist.as_ref(), atom.operand, what),
                Operand::Mem(_) if !memory => self.wrong(format!("{} takes {what} from registers", atom.name.0)),
                Operand::Mem(v) => self.described(atom, v, shape, mn, what, scope),
            }
        }
    }

    fn registers(
        &mut self,
        frag: FragId,
        from: &[u64],
        window: Option<&crate::layout::Distribution>,
        dtype: DType,
        what: &str,
    ) {
        let Some(f) = self.frag(frag) else { return };
        let Some(window) = window else {
            self.wrong(format!("{what} is read from memory, not from `{}`", f.name));
            return;
        };
        if f.dtype != dtype {
            self.wrong(format!("{what} `{}` is {}, not {dtype}", f.name, f.dtype));
        }
        let key = (frag, from.to_vec(), window.clone());
        let held = *self.windows.entry(key).or_insert_with(|| Atom::holds(&f.dist, from, window));
        if !held {
            self.wrong(format!(
                "registers of {what} `{}` {} from {from:?} on are not distributed as {:?} {window}",
                f.name, f.dist, window.dims
            ));
        }
    }

    fn described(&mut self, atom: &Atom, v: &View, shape: [u64; 2], mn: usize, what: &str, scope: &Scope) {
        let Some(b) = self.window(v, &shape, &[], scope, false) else { return };
        if b.dtype != atom.operand {
            self.wrong(format!("{what} `{}` is {}, not {}", b.name, b.dtype, atom.operand));
        }
        let layout = match &b.space {
            BufSpace::Shared { layout, .. } => layout,
            BufSpace::Scratch { together, .. } | BufSpace::Global { together, .. }
                if atom.scope == crate::kernel::Scope::Thread =>
            {
                let last = b.dims.len().wrapping_sub(1);
                // The last dimension of an array is contiguous.
                let dense = match &b.space {
                    BufSpace::Scratch { strides, .. } => strides.last() == Some(&Expr::Int(1)),
                    BufSpace::Global { .. } | BufSpace::Shared { .. } => true,
                };
                let pair = u64::from(32 / atom.operand.bits());
                // Rows of `a` along k; of `b` as many neighbours along k together as fill four bytes.
                let (walk, want) = if mn == 0 {
                    (v.walk[1] == Some((last, 1)) && dense, 1)
                } else {
                    (v.walk == [Some((last.wrapping_sub(1), 1)), Some((last, 1))], pair)
                };
                if !walk || *together != want {
                    self.wrong(format!("{what} `{}` is not laid out as {} reads it", b.name, atom.name.0));
                } else if mn == 1 {
                    self.aligned(&v.at[last - 1], pair, &format!("the origin of {what} along k"), scope);
                }
                return;
            }
            BufSpace::Scratch { .. } | BufSpace::Global { .. } => {
                let place =
                    if atom.scope == crate::kernel::Scope::Thread { "the task's scratch" } else { "shared memory" };
                self.wrong(format!("{what} must be in {place}"));
                return;
            }
        };
        let (Some((mn_dim, 1)), Some((k_dim, 1))) = (v.walk[mn], v.walk[1 - mn]) else {
            self.wrong(format!("{what} walks two dimensions by steps of 1"));
            return;
        };
        let bytes = b.dtype.bytes(1);
        if atom.cooperative() {
            // Rows or columns are contiguous, and begin at multiples of 16 bytes.
            let contiguous = |d: usize| layout.dims[d].first().is_some_and(|g| g.stride == 1);
            let single = |d: usize| layout.dims[d].len() == 1;
            let Some(run) = [mn_dim, k_dim].into_iter().find(|d| contiguous(*d)) else {
                self.wrong(format!("{what} `{}` has neither rows nor columns that are contiguous", b.name));
                return;
            };
            let unit = 16 / bytes;
            let apart = layout.dims.iter().flatten().all(|g| g.stride == 1 || g.stride.is_multiple_of(unit));
            if layout.swizzle.is_some() || !single(mn_dim) || !single(k_dim) || !apart {
                self.wrong(format!("rows of {what} `{}` do not lie whole and at multiples of 16 bytes", b.name));
            }
            self.aligned(&v.at[run], unit, &format!("the origin of {what}"), scope);
            return;
        }
        match Descriptor::of(layout, bytes, mn_dim, k_dim, shape[mn], shape[1 - mn]) {
            Err(e) => self.wrong(format!("{what} `{}`: {e}", b.name)),
            Ok(d) if d.mn_major && !atom.mn_major => {
                self.wrong(format!("{} reads {what} contiguous along k only", atom.name.0));
            }
            Ok(d) => {
                let row = d.swizzle.map_or(16, crate::layout::Swizzle::span_bytes) / bytes;
                let (mn_step, k_step) = if d.mn_major { (row, 8) } else { (8, shape[1 - mn]) };
                self.aligned(&v.at[mn_dim], mn_step, &format!("the origin of {what} along m or n"), scope);
                self.aligned(&v.at[k_dim], k_step, &format!("the origin of {what} along k"), scope);
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn copy(
        &mut self,
        engine: Engine,
        src: &View,
        dst: &View,
        extents: &[u64],
        signal: Option<&(BarrierId, Expr)>,
        multicast: Option<u64>,
        scope: &Scope,
    ) {
        let (Some(from), Some(to)) =
            (self.window(src, extents, &[], scope, true), self.window(dst, extents, &[], scope, true))
        else {
            return;
        };
        if from.dtype != to.dtype {
            self.wrong(format!("a copy does not convert {} to {}", from.dtype, to.dtype));
        }
        if let Some((barrier, stage)) = signal {
            self.at_barrier(*barrier, stage, true, scope);
        }
        self.written(dst.buf);
        let (shared, shared_view, global, global_view, load) = match (&from.space, &to.space) {
            (BufSpace::Global { .. }, BufSpace::Shared { .. }) => (to, dst, from, src, true),
            (BufSpace::Shared { .. }, BufSpace::Global { .. }) if engine == Engine::Tma => (from, src, to, dst, false),
            _ => {
                self.wrong(format!("{} does not copy between these spaces", engine.name()));
                return;
            }
        };
        // Only the side in device memory may reach outside.
        self.window(shared_view, extents, &[], scope, false);
        if engine == Engine::CpAsync {
            if multicast.is_some() {
                self.wrong("cp.async has no multicast");
            }
            return;
        }
        if load != signal.is_some() {
            self.wrong("a TMA load signals a barrier, a TMA store does not");
        }
        let tasks = self.kernel.cluster.iter().product::<u64>();
        if let Some(mask) = multicast
            && (!load || self.kernel.cluster.is_empty() || mask == 0 || (tasks < 64 && mask >> tasks != 0))
        {
            self.wrong("a multicast is a load to tasks of the cluster");
        }
        let BufSpace::Shared { layout, .. } = &shared.space else { return };
        let bytes = shared.dtype.bytes(1);
        let tma = match TmaBox::of(extents, shared_view, layout, bytes) {
            Ok(tma) => tma,
            Err(e) => {
                self.wrong(e);
                return;
            }
        };
        let walked: Vec<usize> = shared_view.walk.iter().flatten().map(|w| w.0).collect();
        if !tma.agrees(extents, &walked, layout) {
            self.wrong(format!("the box is dense in shared memory; the layout of `{}` has it elsewhere", shared.name));
        }
        let inner = tma.order[0];
        let last = global.dims.len().checked_sub(1);
        if extents[inner] > 1 && global_view.walk[inner].map(|w| w.0) != last {
            self.wrong(format!("the innermost dimension of the box must be the last of `{}`", global.name));
        }
        if global_view.walk.iter().any(|w| !matches!(w, Some((_, 1)))) {
            self.wrong("a tensor copy walks every dimension by steps of 1");
        }
        // The origin's offset is a sum over dimensions; with swizzles, rows carry the alignment.
        for (dim, digits) in layout.dims.iter().enumerate() {
            let Some(step) = digits.iter().find(|g| g.extent > 1).map(|g| g.stride * bytes) else { continue };
            let several = digits.iter().filter(|g| g.extent > 1).count() > 1;
            if !several && step % BOX_ALIGN != 0 {
                let n = BOX_ALIGN / gcd(BOX_ALIGN, step);
                self.aligned(&shared_view.at[dim], n, "the origin of a box in shared memory", scope);
            }
        }
    }
}

/// Whether some value of `r` is provably not in `0 .. extent`.
fn outside(r: Range, extent: i64) -> bool {
    r.hi < 0 || r.lo >= extent || (r.exact && (r.lo < 0 || r.hi >= extent))
}
