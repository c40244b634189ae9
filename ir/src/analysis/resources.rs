//! What a kernel takes of a GPU: live registers per thread, shared memory, threads, named barriers.
//!
//! Registers: fragments live at once, by backward liveness over a role's statements; elementwise statements work in
//! place. An operand of an asynchronous atom stays live until its group is awaited, as an accumulator does. Addresses,
//! counters and temporaries take more: at least [`LEAST_OVERHEAD`] (ptxas 13.0: 138 registers of fragments, 128 of them
//! accumulators and operands, fit a budget of 160; 146 spill, as do 226 of 240), and [`OVERHEAD`] where a kernel is
//! chosen before it is lowered. Invariant: a kernel beyond the limits spills or fails to launch.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::kernel::{BarrierKind, BufSpace, Expr, FragId, GroupKind, Kernel, Operand, Role, Stmt, atoms, walk};
use crate::layout::Distribution;
use crate::ops::ReduceOp;
use crate::target::{DataSheet, Gpu};

/// Registers per thread beyond fragments, as a choice of mappings reckons.
pub const OVERHEAD: u64 = 32;

/// Registers per thread beyond fragments that no kernel does without.
pub const LEAST_OVERHEAD: u64 = 22;

/// Shared memory that one 32-bit value per thread of a unit takes where warps exchange it.
pub const EXCHANGE_BYTES: u64 = 512;

/// Bytes in which the warps of a unit of `role` exchange what they have of reductions, of which there are two copies a
/// unit: the most that one of its reductions needs, 0 where shuffles are enough.
pub fn exchange(kernel: &Kernel, role: &Role) -> u64 {
    fn go(k: &Kernel, body: &[Stmt], most: &mut u64) {
        for s in body {
            match s {
                Stmt::For { body, .. } => go(k, body, most),
                Stmt::If { then, otherwise, .. } => {
                    go(k, then, most);
                    go(k, otherwise, most);
                }
                Stmt::Reduce { out, src, over, .. } => {
                    let mut place = 1;
                    let crosses = k.frags[*src].dist.threads.iter().any(|g| {
                        place *= g.extent;
                        g.extent > 1 && g.stride > 0 && place > 32 && over.contains(&g.dim)
                    });
                    if crosses {
                        let values: u64 = out.iter().map(|f| k.frags[*f].dist.counts().1).sum();
                        *most = (*most).max(values * EXCHANGE_BYTES);
                    }
                }
                _ => {}
            }
        }
    }
    let mut most = 0;
    go(kernel, &role.body, &mut most);
    most
}

/// What a device allows one task, and how many it runs at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Shared memory in bytes.
    pub shared_bytes: u64,
    /// Registers of a multiprocessor.
    pub registers: u64,
    /// Registers of a thread.
    pub thread_registers: u64,
    /// Threads.
    pub threads: u64,
    /// Named barriers, the whole-task one apart.
    pub named_barriers: u64,
    /// Multiprocessors of the device: tasks of a persistent kernel.
    pub multiprocessors: u64,
}

impl Limits {
    /// What a sheet says.
    pub fn of(gpu: &Gpu) -> Limits {
        Limits {
            shared_bytes: gpu.shared_per_task,
            registers: gpu.registers,
            thread_registers: gpu.thread_registers,
            threads: gpu.threads_per_task,
            named_barriers: gpu.named_barriers,
            multiprocessors: gpu.multiprocessors,
        }
    }

    /// What the built-in sheet of this name says; the H100's where none has it.
    pub fn named(target: &str) -> Limits {
        DataSheet::named(target).and_then(|s| s.gpu).map_or_else(Limits::h100, |g| Limits::of(&g))
    }

    /// NVIDIA H100 SXM or H200 (CUDA C Programming Guide, compute capability 9.0).
    pub fn h100() -> Limits {
        Limits {
            shared_bytes: 227 << 10,
            registers: 65_536,
            thread_registers: 255,
            threads: 1024,
            named_barriers: 15,
            multiprocessors: 132,
        }
    }
}

/// Registers per thread that each of `tasks` resident tasks of `threads` threads starts with: an even share of a
/// multiprocessor's, by eights. What roles set aside moves only inside this; one that asks for more waits for ever (PTX
/// ISA, `setmaxnreg`).
pub fn launch_registers(registers: u64, thread_registers: u64, threads: u64, tasks: u64) -> u64 {
    (registers / tasks.max(1) / threads.max(1) / 8 * 8).min(thread_registers / 8 * 8)
}

/// Registers per thread that an instruction takes beside its accumulator and operand, at the count a kernel starts with
/// (ptxas 13.0, C7602: 64 accumulators want 90, with an operand of 4 registers 94; 104 want 130).
pub const INSTRUCTION_OVERHEAD: u64 = 26;

/// Registers per thread that a kernel must start with for its widest asynchronous instruction; 0 without one.
pub fn instruction_registers(kernel: &Kernel) -> u64 {
    let held = |d: &Distribution, bits: u32| (d.counts().1 * u64::from(bits)).div_ceil(32);
    let mut most = 0;
    for role in &kernel.roles {
        walk(&role.body, &mut |s| {
            let Stmt::Atom { atom, a, .. } = s else { return };
            let Some(atom) = atoms::find(atom).filter(|x| x.asynchronous) else { return };
            let operand = match (a, &atom.a_dist) {
                (Operand::Frag { .. }, Some(d)) => held(d, atom.operand.bits()),
                _ => 0,
            };
            let registers = held(&atom.acc_dist, atom.acc.bits()) + operand;
            most = most.max(registers * atom.registers_each() + INSTRUCTION_OVERHEAD);
        });
    }
    most
}

/// What one role takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleResources {
    /// The role.
    pub name: String,
    /// Its threads.
    pub threads: u64,
    /// Registers per thread that fragments need at once.
    pub fragment_registers: u64,
    /// Registers per thread it may use.
    pub budget: u64,
}

/// What one kernel takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Shared memory in bytes, barriers included.
    pub shared_bytes: u64,
    /// Threads of a task.
    pub threads: u64,
    /// Registers of a task by its roles' budgets, allocated by warpgroup where roles set them.
    pub registers: u64,
    /// Registers of a task at most: those of a multiprocessor, or what a task starts with where roles set theirs.
    pub most_registers: u64,
    /// Named barriers.
    pub named_barriers: u64,
    /// Its roles.
    pub roles: Vec<RoleResources>,
}

/// A limit that is exceeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// The constraint: `shared memory`, `registers of consumer`, ..
    pub constraint: String,
    /// What the kernel takes.
    pub have: u64,
    /// What there is.
    pub limit: u64,
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} of at most {}", self.constraint, self.have, self.limit)
    }
}

impl std::error::Error for Exceeded {}

/// What `kernel` takes.
pub fn resources(kernel: &Kernel, limits: &Limits) -> Resources {
    let mut shared_bytes = 0;
    for (_, b) in kernel.bufs.iter() {
        if let BufSpace::Shared { layout, stages } = &b.space {
            shared_bytes =
                u64::next_multiple_of(shared_bytes, layout.alignment()) + layout.stage_bytes(b.dtype.bytes(1)) * stages;
        }
    }
    let mut named_barriers = 0;
    for (_, b) in kernel.barriers.iter() {
        match b.kind {
            BarrierKind::Mbarrier { .. } => shared_bytes += 8 * b.stages,
            BarrierKind::Named { .. } => named_barriers += b.stages,
        }
    }
    shared_bytes += kernel.roles.iter().map(|r| 2 * r.units * exchange(kernel, r)).sum::<u64>();
    let own = |r: &Role| r.units * r.scope.threads();
    let threads: u64 = kernel.roles.iter().map(own).sum();
    // A role alone hands over no registers: its number is a bound that the assembler keeps, by holding fewer values at
    // once.
    let sets = kernel.roles.len() > 1 && kernel.roles.iter().any(|r| r.regs.is_some());
    // Without budgets of their own all threads get the same, a multiple of 8. A multiprocessor's four parts have a quarter
    // of the registers each, so that warps count by fours.
    let padded = threads.next_multiple_of(128);
    let even = (limits.registers / padded.max(1) / 8 * 8).min(limits.thread_registers);
    let mut registers = 0;
    let mut roles = Vec::new();
    for r in &kernel.roles {
        let budget = r.regs.filter(|_| sets).unwrap_or(even);
        let allocated = if sets { own(r).next_multiple_of(128) } else { own(r) };
        registers += allocated * budget;
        let fragment_registers = peak(kernel, r);
        roles.push(RoleResources { name: r.name.clone(), threads: own(r), fragment_registers, budget });
    }
    let most_registers = match sets {
        true => launch_registers(limits.registers, limits.thread_registers, padded, 1) * padded,
        false => limits.registers,
    };
    Resources { shared_bytes, threads, registers, most_registers, named_barriers, roles }
}

/// The limits that `kernel` exceeds.
pub fn check(kernel: &Kernel, limits: &Limits) -> Vec<Exceeded> {
    let r = resources(kernel, limits);
    let mut all = vec![
        ("shared memory".to_string(), r.shared_bytes, limits.shared_bytes),
        ("threads".to_string(), r.threads, limits.threads),
        ("registers of the task".to_string(), r.registers, r.most_registers),
        ("named barriers".to_string(), r.named_barriers, limits.named_barriers),
    ];
    for role in &r.roles {
        let fit = role.budget.min(limits.thread_registers).saturating_sub(LEAST_OVERHEAD);
        // A role without fragments needs no more than addresses and counters.
        let have = role.fragment_registers;
        all.push((format!("registers of {}", role.name), have, fit));
    }
    all.into_iter()
        .filter(|(_, have, limit)| have > limit && *have > 0)
        .map(|(constraint, have, limit)| Exceeded { constraint, have, limit })
        .collect()
}

/// 32-bit registers per thread that a fragment takes.
pub fn fragment_registers(kernel: &Kernel, f: FragId) -> u64 {
    let frag = &kernel.frags[f];
    (frag.dist.counts().1 * u64::from(frag.dtype.bits())).div_ceil(32)
}

/// Registers of the rows between those that a role's fragments keep: an instruction of twice the rows reads and writes
/// them in one run with those of the fragment, from the start of the role to its last.
fn between(kernel: &Kernel, role: &Role) -> u64 {
    let mut found: BTreeMap<FragId, u64> = BTreeMap::new();
    walk(&role.body, &mut |s| {
        let Stmt::Atom { atom, acc, a, .. } = s else { return };
        let Some(atom) = atoms::find(atom) else { return };
        let operand = match a {
            Operand::Frag { frag, .. } => Some(*frag),
            Operand::Mem(_) => None,
        };
        for f in operand.into_iter().chain([*acc]) {
            found.insert(f, (atom.registers_each() - 1) * fragment_registers(kernel, f));
        }
    });
    found.values().sum()
}

type Live = BTreeSet<FragId>;

struct Liveness<'a> {
    kernel: &'a Kernel,
    /// Operands of asynchronous atoms of the role.
    operands: Live,
    /// Registers of rows between those that fragments keep, and whether an instruction that takes them is under way or comes later.
    between: u64,
    instructions: bool,
    peak: u64,
}

/// The most registers that fragments of the role need at any point between statements.
fn peak(kernel: &Kernel, role: &Role) -> u64 {
    let mut operands = Live::new();
    walk(&role.body, &mut |s| {
        if let Stmt::Atom { a, b, .. } = s {
            operands.extend([a, b].into_iter().filter_map(|o| match o {
                Operand::Frag { frag, .. } => Some(*frag),
                Operand::Mem(_) => None,
            }));
        }
    });
    let mut l = Liveness { kernel, operands, between: between(kernel, role), instructions: false, peak: 0 };
    l.block(&role.body, Live::new());
    l.peak
}

/// The fragment that the last statement sums and that the one before it computes of others: a printer that computes its
/// elements where they are summed needs no thread to hold it whole.
pub fn passing(body: &[Stmt]) -> Option<FragId> {
    let [.., Stmt::Map { out, value }, Stmt::Reduce { out: sums, op: ReduceOp::Sum, src, .. }] = body else {
        return None;
    };
    (out == src && !sums.contains(src) && !value.reads(*src)).then_some(*src)
}

impl Liveness<'_> {
    fn note(&mut self, live: &Live) {
        let sum: u64 = live.iter().map(|f| fragment_registers(self.kernel, *f)).sum();
        self.peak = self.peak.max(sum + if self.instructions { self.between } else { 0 });
    }

    /// What is live before `body`, given what is live after it.
    fn block(&mut self, body: &[Stmt], mut live: Live) -> Live {
        self.note(&live);
        for (i, s) in body.iter().enumerate().rev() {
            let after = live.clone();
            live = self.stmt(s, live);
            match passing(&body[..=i]).filter(|f| !after.contains(f)) {
                // An element of it at a time.
                Some(f) => self.note(&live.iter().copied().filter(|x| *x != f).collect()),
                None => self.note(&live),
            }
        }
        live
    }

    fn stmt(&mut self, s: &Stmt, mut live: Live) -> Live {
        // An instruction has its registers until it is awaited.
        self.instructions |= matches!(s, Stmt::Atom { .. } | Stmt::WaitGroup { kind: GroupKind::Wgmma, .. });
        match s {
            Stmt::For { body, .. } => {
                // What a trip needs from the one before is live around the loop.
                loop {
                    let before = self.block(body, live.clone());
                    let joined: Live = live.union(&before).copied().collect();
                    if joined == live {
                        return live;
                    }
                    live = joined;
                }
            }
            Stmt::If { then, otherwise, .. } => {
                let a = self.block(then, live.clone());
                let b = self.block(otherwise, live);
                a.union(&b).copied().collect()
            }
            Stmt::Atom { acc, acc_from, a, b, keep, .. } => {
                let starts = *keep == Expr::Int(0) && acc_from.iter().all(|x| *x == 0);
                if starts {
                    live.remove(acc);
                } else {
                    live.insert(*acc);
                }
                for o in [a, b] {
                    if let Operand::Frag { frag, .. } = o {
                        live.insert(*frag);
                    }
                }
                live
            }
            Stmt::WaitGroup { kind: GroupKind::Wgmma, pending: 0 } => {
                live.extend(&self.operands);
                live
            }
            _ => {
                let (reads, writes) = s.frags();
                writes.iter().for_each(|f| {
                    live.remove(f);
                });
                live.extend(reads);
                live
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::AtomName;

    #[test]
    fn tasks_start_with_an_even_share_by_eights() {
        let share = |threads, tasks| launch_registers(65_536, 255, threads, tasks);
        assert_eq!([share(384, 1), share(384, 2), share(128, 1)], [168, 80, 248]);
        // No thread names more than 255, and nothing is a share of no tasks.
        assert_eq!([share(256, 1), share(1024, 1), share(1024, 2), share(384, 0)], [248, 64, 32, 168]);
    }

    /// An instruction of 64 rows that keeps 32 takes the registers of 64 up to its last use, and none after it.
    #[test]
    fn rows_between_are_counted_up_to_the_last_instruction() {
        let kernel = |rows: u64, after: &str| {
            let atom = atoms::find(&AtomName(format!("wgmma.m{rows}n64k16.bf16"))).unwrap();
            let text = format!(
                "module t {{
    kernel t {{
        grid [1]
        global x: f32[{rows}, 64] = 0 written
        shared Bs: bf16[16, 64] layout (16:64, 64:1) swizzle 128
        frag a: bf16[{rows}, 16] {}
        frag acc: f32[{rows}, 64] {}
        frag late: f32[{rows}, 64] {}
        role main: 1 warpgroup {{
            map a = 1.0
            fence wgmma
            atom wgmma.m{rows}n64k16.bf16: acc[0, 0] = a[0, 0] * mem Bs[0, 0]
            commit wgmma
            wait_group wgmma 0
            {after}
            store x[0, 0] = acc
        }}
    }}
}}",
                atom.a_dist.unwrap(),
                atom.acc_dist,
                atom.acc_dist
            );
            let module = crate::kernel::parse::parse(&text).unwrap_or_else(|e| panic!("{e}"));
            resources(module.kernels.first().unwrap(), &Limits::h100()).roles[0].fragment_registers
        };
        // 32 of the sum and 4 of the operand, whatever of them is kept.
        assert_eq!((kernel(64, ""), kernel(32, "")), (36, 36));
        // After the instructions 32 rows are half of 64.
        let both = "map late = acc[0,1]\n            store x[0, 0] = late";
        assert_eq!((kernel(64, both), kernel(32, both)), (64, 36));
    }
}
