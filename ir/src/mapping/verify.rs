//! Whether a mapping fits a plan: every name it uses exists there, and numbers make sense.
//!
//! Invariant: what is checked here needs no data sheet; budgets are in [`crate::analysis`].

use super::{KernelMapping, Mapping};
use crate::diag::{Diagnostic, Diagnostics, Span};
use crate::tile::{AxisKind, Kernel, Plan, Space};

/// Checks `mapping` against `plan`.
///
/// # Errors
/// M0201 for names the plan lacks, M0202 for numbers and combinations that mean nothing. Spans are empty: a mapping
/// may have been made without a text; messages name the line.
pub fn verify(mapping: &Mapping, plan: &Plan) -> Result<(), Diagnostics> {
    let mut out = Vec::new();
    if mapping.plan != plan.name {
        let message = format!("the mapping is for plan `{}`, not `{}`", mapping.plan, plan.name);
        out.push(Diagnostic::error("M0201", Span::default(), message).help("pass the mapping made for this plan"));
    }
    for (i, k) in mapping.kernels.iter().enumerate() {
        let variants = mapping.kernels[..=i].iter().filter(|m| m.kernel == k.kernel).count();
        if variants > MAX_VARIANTS {
            let message = format!("kernel `{}` has {variants} entries", k.kernel);
            let help = format!("a kernel has at most {MAX_VARIANTS} variants, half of them for unaligned arrays");
            out.push(Diagnostic::error("M0202", Span::default(), message).help(help));
        }
        match plan.kernels.iter().find(|p| p.name == k.kernel) {
            Some(p) => Checker { k, names: p.op_names(plan), p, out: &mut out }.run(),
            None => {
                let names: Vec<_> = plan.kernels.iter().map(|p| p.name.as_str()).collect();
                out.push(missing("kernel", &k.kernel, &names, "mapping"));
            }
        }
    }
    if out.is_empty() { Ok(()) } else { Err(out.into()) }
}

fn missing(kind: &str, name: &str, there: &[&str], place: &str) -> Diagnostic {
    Diagnostic::error("M0201", Span::default(), format!("{place} names {kind} `{name}`, which does not exist"))
        .help(format!("the {kind}s are {}", there.join(", ")))
}

/// Entries of one kernel: each may need a second variant for arrays that are not aligned, and a launch chooses among
/// at most 8.
const MAX_VARIANTS: usize = 4;

struct Checker<'a> {
    k: &'a KernelMapping,
    p: &'a Kernel,
    names: Vec<String>,
    out: &'a mut Vec<Diagnostic>,
}

impl Checker<'_> {
    fn bad(&mut self, message: String, help: &str) {
        let message = format!("kernel `{}`: {message}", self.k.kernel);
        self.out.push(Diagnostic::error("M0202", Span::default(), message).help(help));
    }

    fn axis(&mut self, name: &str, place: &str) -> Option<AxisKind> {
        let found = self.p.axes.iter().find(|(_, a)| a.name == name).map(|(_, a)| a.kind);
        if found.is_none() {
            let names: Vec<_> = self.p.axes.iter().map(|(_, a)| a.name.as_str()).collect();
            self.out.push(missing("axis", name, &names, place));
        }
        found
    }

    fn run(&mut self) {
        let k = self.k;
        for a in &k.axes {
            let place = format!("`axis {}`", a.axis);
            let Some(kind) = self.axis(&a.axis, &place) else { continue };
            if a.block == 0 || a.cluster == 0 || a.units == 0 {
                self.bad(format!("{place} has a count of 0"), "write at least 1");
            } else if a.block % a.units != 0 {
                self.bad(
                    format!("{place}: a block of {} is not cut evenly over {} units", a.block, a.units),
                    "make the block a multiple of the units",
                );
            }
            if a.whole && kind == AxisKind::Grid {
                self.bad(format!("{place} is whole but cut over tasks"), "leave out `whole` on grid axes");
            }
            if a.descending && kind != AxisKind::Stream {
                self.bad(format!("{place} descends but is not a stream axis"), "leave out `descending`");
            }
            if a.launches && a.block != 1 {
                self.bad(
                    format!("{place} launches steps of {} coordinates; a step is one", a.block),
                    "write `block 1`",
                );
            }
            if a.launches && kind != AxisKind::Stream {
                self.bad(format!("{place} has steps to launch but is not a stream axis"), "leave out `launches`");
            }
            if a.cluster > 1 && kind != AxisKind::Grid {
                self.bad(format!("{place} has a cluster but is not a grid axis"), "put clusters on grid axes");
            }
        }
        for o in &k.work.order {
            if self.axis(o, "`work order`").is_some_and(|kind| kind != AxisKind::Grid) {
                self.bad(format!("`work order` names `{o}`, which is not a grid axis"), "order grid axes only");
            }
        }
        if let Some(s) = &k.split
            && self.axis(&s.axis, "`split`").is_some_and(|kind| kind != AxisKind::Stream)
        {
            self.bad(format!("`split {}` is not over a stream axis", s.axis), "split a stream axis");
        }
        for t in &k.tiles {
            let place = format!("`tile {}`", t.tile);
            let Some((_, tile)) = self.p.tiles.iter().find(|(_, x)| x.name == t.tile) else {
                let names: Vec<_> = self.p.tiles.iter().map(|(_, t)| t.name.as_str()).collect();
                self.out.push(missing("tile", &t.tile, &names, &place));
                continue;
            };
            let own: Vec<&str> = tile.axes.iter().map(|a| self.p.axes[*a].name.as_str()).collect();
            if t.contiguous.as_deref().is_some_and(|a| !own.contains(&a)) {
                self.bad(format!("{place} is contiguous along an axis it lacks"), "name one of the tile's axes");
            }
            if let Some(m) = &t.multicast {
                if own.contains(&m.as_str()) {
                    self.bad(
                        format!("{place} is multicast along `{m}`, along which it differs"),
                        "multicast along an axis the tile lacks",
                    );
                } else if self.axis(m, &place).is_some() && k.axis(m).is_none_or(|a| a.cluster < 2) {
                    self.bad(format!("{place} is multicast along `{m}`, which has no cluster"), "add `cluster 2`");
                }
            }
            if ![0, 32, 64, 128].contains(&t.swizzle) {
                self.bad(format!("{place} has a swizzle of {} bytes", t.swizzle), "write 32, 64 or 128");
            }
            if t.stages == 0 {
                self.bad(format!("{place} has no stage"), "write at least 1");
            }
            if t.space != Space::Shared && (t.stages > 1 || t.swizzle > 0 || t.engine.is_some()) {
                self.bad(
                    format!("{place} is not in shared memory but has stages, a swizzle or an engine"),
                    "write `in shared`",
                );
            }
        }
        for o in &k.ops {
            let place = format!("`op {}`", o.op);
            if !self.names.contains(&o.op) {
                let names: Vec<_> = self.names.iter().map(String::as_str).collect();
                self.out.push(missing("operation", &o.op, &names, &place));
            }
            if let Some(r) = &o.role
                && !k.roles.iter().any(|x| x.role == *r)
            {
                let names: Vec<_> = k.roles.iter().map(|r| r.role.as_str()).collect();
                self.out.push(missing("role", r, &names, &place));
            }
        }
        for r in &k.roles {
            if r.units == 0 {
                self.bad(format!("role `{}` has no unit", r.role), "write at least 1");
            }
            if r.regs.is_some_and(|n| n % 8 != 0 || !(24..=256).contains(&n)) {
                self.bad(format!("role `{}` has a register budget setmaxnreg refuses", r.role), "24 to 256, by 8");
            }
        }
    }
}
