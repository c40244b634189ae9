//! The text of a mapping; [`super::parse`] reads it back to the same mapping.
//!
//! Invariant: what has its default value is not printed.

use std::fmt::{self, Write};

use super::{KernelMapping, Mapping, MergeSite, Source};
use crate::kernel::{Engine, Scope};

impl MergeSite {
    /// Every site.
    pub const ALL: [MergeSite; 3] = [MergeSite::LastArriver, MergeSite::Cluster, MergeSite::SecondKernel];

    /// Its keyword.
    pub fn name(self) -> &'static str {
        match self {
            MergeSite::LastArriver => "last_arriver",
            MergeSite::Cluster => "cluster",
            MergeSite::SecondKernel => "second_kernel",
        }
    }
}

/// The engines with their keywords.
pub(super) const ENGINES: [(Engine, &str); 2] = [(Engine::Tma, "tma"), (Engine::CpAsync, "cp_async")];

/// The scopes with their keywords.
pub(super) const SCOPES: [(Scope, &str); 3] =
    [(Scope::Thread, "thread"), (Scope::Warp, "warp"), (Scope::Warpgroup, "warpgroup")];

fn word<T: PartialEq>(table: &[(T, &'static str)], value: T) -> &'static str {
    table.iter().find(|(t, _)| *t == value).map_or("?", |(_, w)| w)
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "mapping {} on {} {{", self.plan, self.target)?;
        for k in &self.kernels {
            kernel(f, k)?;
        }
        f.write_str("}\n")
    }
}

fn kernel(f: &mut fmt::Formatter<'_>, k: &KernelMapping) -> fmt::Result {
    let KernelMapping { kernel, axes, work, tiles, ops, roles, split, early, dependent } = k;
    writeln!(f, "    kernel {kernel} {{")?;
    for a in axes {
        write!(f, "        axis {} block {}", a.axis, a.block)?;
        for (name, value, default) in [("cluster", a.cluster, 1), ("units", a.units, 1), ("register", a.register, 0)] {
            if value != default {
                write!(f, " {name} {value}")?;
            }
        }
        f.write_str(if a.whole { " whole" } else { "" })?;
        f.write_str(if a.exact { " exact" } else { "" })?;
        f.write_str(if a.descending { " descending" } else { "" })?;
        f.write_str(if a.launches { " launches\n" } else { "\n" })?;
    }
    let mut text = String::new();
    if !work.order.is_empty() {
        write!(text, " order {}", work.order.join(", "))?;
    }
    text += if work.persistent { " persistent" } else { "" };
    if work.group > 1 {
        write!(text, " group {}", work.group)?;
    }
    text += if work.longest_first { " longest_first" } else { "" };
    if !text.is_empty() {
        writeln!(f, "        work{text}")?;
    }
    if let Some(s) = split {
        write!(f, "        split {} parts {}", s.axis, s.parts)?;
        if s.resident != 1 {
            write!(f, " resident {}", s.resident)?;
        }
        write!(f, " merge {}", s.merge.name())?;
        f.write_str(if s.ordered { " ordered\n" } else { "\n" })?;
    }
    f.write_str(if *early { "        early\n" } else { "" })?;
    f.write_str(if *dependent { "        dependent\n" } else { "" })?;
    for r in roles {
        write!(f, "        role {}: {} {}", r.role, r.units, word(&SCOPES, r.scope))?;
        if let Some(n) = r.regs {
            write!(f, " regs {n}")?;
        }
        f.write_str(if r.ping_pong { " ping_pong\n" } else { "\n" })?;
    }
    for t in tiles {
        write!(f, "        tile {} in {}", t.tile, t.space.name())?;
        if t.stages != 1 {
            write!(f, " stages {}", t.stages)?;
        }
        if t.swizzle != 0 {
            write!(f, " swizzle {}", t.swizzle)?;
        }
        if let Some(a) = &t.contiguous {
            write!(f, " contiguous {a}")?;
        }
        if let Some(e) = t.engine {
            write!(f, " by {}", word(&ENGINES, e))?;
        }
        if let Some(a) = &t.multicast {
            write!(f, " multicast {a}")?;
        }
        if let Some(t) = &t.reuses {
            write!(f, " reuses {t}")?;
        }
        f.write_char('\n')?;
    }
    for o in ops {
        write!(f, "        op {}", o.op)?;
        if let Some(a) = &o.atom {
            write!(f, " atom {a}")?;
        }
        f.write_str(if o.swapped { " swapped" } else { "" })?;
        f.write_str(if o.a == Source::Registers { " a registers" } else { "" })?;
        if let Some(r) = &o.role {
            write!(f, " role {r}")?;
        }
        if o.skew != 0 {
            write!(f, " skew {}", o.skew)?;
        }
        if o.slot != 0 {
            write!(f, " slot {}", o.slot)?;
        }
        if let Some(e) = o.engine {
            write!(f, " by {}", word(&ENGINES, e))?;
        }
        f.write_char('\n')?;
    }
    f.write_str("    }\n")
}
