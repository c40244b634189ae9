//! One instruction of one warp.

use half::{bf16, f16};

use super::memory::decoded;
use super::{Arg, Inst, Machine, Mbarrier, Status};

/// Bits of an address within a task's shared memory.
const WINDOW: u64 = 0xff_ffff;

fn f(x: u64) -> f32 {
    f32::from_bits(x as u32)
}

fn d(x: u64) -> f64 {
    f64::from_bits(x)
}

fn bits(x: f32) -> u64 {
    u64::from(x.to_bits())
}

fn width(ty: &str) -> usize {
    match ty {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" => 2,
        "b64" | "u64" | "s64" | "f64" => 8,
        _ => 4,
    }
}

impl Machine<'_> {
    pub fn value(&self, w: usize, a: &Arg, lane: usize) -> u64 {
        let warp = &self.warps[w];
        match a {
            Arg::Reg(r) => warp.regs[*r][lane],
            Arg::Imm(v) => *v,
            Arg::Mem(base, off) => self.value(w, base, lane).wrapping_add(*off as u64),
            Arg::Name(n) => match n.as_str() {
                "%tid.x" => warp.number * 32 + lane as u64,
                "%ctaid.x" => self.first_task + warp.cta as u64,
                "%cluster_ctarank" => warp.cta as u64,
                // In a cluster the window of shared memory starts at the task's rank.
                "smem" if self.shared.len() > 1 => 1024 | (warp.cta as u64) << 24,
                "smem" => 1024,
                _ if n.starts_with("map") => n[3..].parse().unwrap(),
                _ => panic!("{n}"),
            },
            Arg::Tensor(..) | Arg::List(_) => panic!("{a:?} is no value"),
        }
    }

    pub fn set(&mut self, w: usize, a: &Arg, lane: usize, v: u64) {
        match a {
            Arg::Reg(r) => self.warps[w].regs[*r][lane] = v,
            Arg::Name(n) if n == "_" => {}
            _ => panic!("{a:?} is no register"),
        }
    }

    /// Runs a warp until it waits; whether anything happened.
    pub fn advance(&mut self, w: usize) -> bool {
        match self.warps[w].status {
            Status::Done => return false,
            Status::Barrier(id, generation) => {
                if self.barriers[&(self.warps[w].cta, id)].1 == generation {
                    return false;
                }
            }
            Status::Cluster(generation) => {
                if self.cluster.1 == generation {
                    return false;
                }
            }
            Status::Ready => {}
        }
        let blocked = self.warps[w].status != Status::Ready;
        self.warps[w].status = Status::Ready;
        let entry = self.entry;
        let mut moved = blocked;
        loop {
            let pc = self.warps[w].pc;
            let i = &entry.code[pc];
            let active: Vec<usize> =
                (0..32).filter(|l| i.guard.is_none_or(|(p, want)| (self.warps[w].regs[p][*l] != 0) == want)).collect();
            if i.op[0] == "bra" {
                assert!(active.is_empty() || active.len() == 32, "a divergent branch: {}", i.text);
                if !active.is_empty() {
                    let Arg::Name(l) = &i.args[0] else { panic!("{}", i.text) };
                    let to = entry.labels[l];
                    // A wait that has to be tried again lets others run.
                    let again = to + 1 == pc && entry.code[to].op[0] == "mbarrier";
                    self.warps[w].pc = to;
                    if again {
                        return moved;
                    }
                    moved = true;
                    continue;
                }
                self.warps[w].pc += 1;
                moved = true;
                continue;
            }
            if i.op[0] == "ret" {
                self.warps[w].status = Status::Done;
                self.settle_cluster();
                return true;
            }
            let waits = i.op[0] == "mbarrier" && (i.op[1] == "try_wait" || i.op[1] == "test_wait");
            if !active.is_empty() {
                self.execute(w, i, &active);
            }
            moved |= !waits;
            self.warps[w].pc += 1;
            if self.warps[w].status != Status::Ready {
                return true;
            }
        }
    }

    fn settle_cluster(&mut self) {
        let alive = self.warps.iter().filter(|w| w.status != Status::Done).count() as u64;
        if alive > 0 && self.cluster.0 >= alive {
            self.cluster = (0, self.cluster.1 + 1);
        }
    }

    fn execute(&mut self, w: usize, i: &Inst, active: &[usize]) {
        let op: Vec<&str> = i.op.iter().map(String::as_str).collect();
        let (cta, first) = (self.warps[w].cta, active[0]);
        let at = |s: &Self, n: usize, l: usize| s.value(w, &i.args[n], l);
        match op[0] {
            "setmaxnreg" | "fence" | "prefetch" => {}
            "wgmma" if op[1] != "mma_async" => {}
            "wgmma" => self.wgmma(w, i),
            "elect" => (0..32).for_each(|l| self.set(w, &i.args[0], l, u64::from(l == 0))),
            "shfl" => {
                let old: Vec<u64> = (0..32).map(|l| at(self, 1, l)).collect();
                for l in 0..32 {
                    let b = at(self, 2, l) as usize;
                    let from = match op[2] {
                        "idx" => b,
                        "bfly" => l ^ b,
                        _ => l.checked_sub(b).unwrap_or(l),
                    };
                    self.set(w, &i.args[0], l, old[from]);
                }
            }
            "bar" if op[1] == "warp" => {}
            // Threads meet and learn whether one of them has something to say.
            "bar" if op[1] == "red" => {
                let (id, threads) = (at(self, 1, first), at(self, 2, first));
                let said = (0..32).any(|l| at(self, 3, l) != 0);
                let b = self.barriers.entry((cta, id)).or_default();
                b.0 += 32;
                assert!(b.0 <= threads, "more threads at barrier {id} than it counts");
                let (generation, full) = (b.1, b.0 == threads);
                *self.said.entry((cta, id)).or_default() |= said;
                self.warps[w].status = Status::Barrier(id, generation);
                if full {
                    *self.barriers.get_mut(&(cta, id)).unwrap() = (0, generation + 1);
                    let said = self.said.remove(&(cta, id)).unwrap_or_default();
                    let here = Status::Barrier(id, generation);
                    let met: Vec<usize> = (0..self.warps.len())
                        .filter(|x| self.warps[*x].cta == cta && self.warps[*x].status == here)
                        .collect();
                    for x in met {
                        (0..32).for_each(|l| self.set(x, &i.args[0], l, u64::from(said)));
                    }
                    self.warps[w].status = Status::Ready;
                }
            }
            "vote" => {
                let any = (0..32).any(|l| at(self, 1, l) != 0);
                (0..32).for_each(|l| self.set(w, &i.args[0], l, u64::from(any)));
            }
            "atom" => {
                assert_eq!(op, ["atom", "acq_rel", "gpu", "global", "inc", "u32"], "{}", i.text);
                for &l in active {
                    let (address, most) = (at(self, 1, l), at(self, 2, l));
                    let old = Machine::read(self.global, address, 4);
                    Machine::write(self.global, address, 4, if old >= most { 0 } else { old + 1 });
                    self.set(w, &i.args[0], l, old);
                }
            }
            // What is joined in memory, lane after lane; it has no result.
            "red" => {
                let ty = op[op.len() - 1];
                for &l in active {
                    let (address, x) = (at(self, 0, l), at(self, 1, l));
                    let old = Machine::read(self.global, address, width(ty));
                    let new = scalar(&[op[op.len() - 2], signed(ty)], &[old, x], &i.text);
                    Machine::write(self.global, address, width(ty), new);
                }
            }
            "bar" => {
                let id = at(self, 0, first);
                let threads = i.args.get(1).map_or_else(
                    || self.warps.iter().filter(|x| x.cta == cta).count() as u64 * 32,
                    |a| self.value(w, a, first),
                );
                assert!((0..16).contains(&id), "barrier {id}");
                let b = self.barriers.entry((cta, id)).or_default();
                b.0 += 32;
                assert!(b.0 <= threads, "more threads at barrier {id} than it counts");
                let generation = b.1;
                if b.0 == threads {
                    *b = (0, generation + 1);
                } else if op[1] == "sync" {
                    self.warps[w].status = Status::Barrier(id, generation);
                }
            }
            "barrier" if op[2] == "arrive" => {
                self.cluster.0 += 1;
                let generation = self.cluster.1;
                self.settle_cluster();
                // Arrival and wait stand together in what is printed.
                if self.cluster.1 == generation {
                    self.warps[w].status = Status::Cluster(generation);
                }
            }
            "barrier" => {}
            "mbarrier" => self.mbarrier(w, i, &op, active),
            "mapa" => {
                for &l in active {
                    let v = at(self, 1, l) & WINDOW | at(self, 2, l) << 24;
                    self.set(w, &i.args[0], l, v);
                }
            }
            "cp" if op.contains(&"tensor") => self.tensor_copy(w, i, &op, active),
            "cp" if op[1] == "async" && op[2] != "bulk" => self.copy_async(w, i, &op, active, WINDOW),
            "cp" => {}
            "ldmatrix" => self.load_matrix(w, i, &op, WINDOW),
            "stmatrix" => self.store_matrix(w, i, &op, WINDOW),
            "mma" => self.mma(w, i),
            "ld" if op[1] == "param" => {
                let Arg::Mem(name, _) = &i.args[1] else { panic!("{}", i.text) };
                let Arg::Name(name) = &**name else { panic!("{}", i.text) };
                let v = self.params[name[1..].parse::<usize>().unwrap()];
                let v = if width(op[2]) == 4 { v & 0xffff_ffff } else { v };
                active.iter().for_each(|l| self.set(w, &i.args[0], *l, v));
            }
            "ld" | "st" => {
                let ty = op[op.len() - 1];
                let bytes = width(ty);
                let (m, v) = if op[0] == "ld" { (1, 0) } else { (0, 1) };
                let list = match &i.args[v] {
                    Arg::List(l) => l.clone(),
                    a => vec![a.clone()],
                };
                for &l in active {
                    let global = op[1] == "global";
                    let address = at(self, m, l) & if global { u64::MAX } else { WINDOW };
                    assert!(
                        address.is_multiple_of((bytes * list.len()) as u64),
                        "unaligned: {} at {address:#x}",
                        i.text
                    );
                    for (n, a) in list.iter().enumerate() {
                        let place = address + (n * bytes) as u64;
                        if op[0] == "ld" {
                            let memory = if global { &*self.global } else { &self.shared[cta] };
                            let mut x = Machine::read(memory, place, bytes);
                            if ty == "s8" {
                                x = x as i8 as i32 as u32 as u64;
                            }
                            self.set(w, a, l, x);
                        } else {
                            let x = self.value(w, a, l);
                            let memory = if global { &mut *self.global } else { &mut self.shared[cta] };
                            Machine::write(memory, place, bytes, x);
                        }
                    }
                }
            }
            "mov" => {
                for &l in active {
                    let half = if op[1] == "b64" { 32 } else { 16 };
                    let mask = (1u64 << half) - 1;
                    match (&i.args[0], &i.args[1]) {
                        (Arg::List(d), s) => {
                            let v = self.value(w, s, l);
                            self.set(w, &d[0], l, v & mask);
                            self.set(w, &d[1], l, v >> half & mask);
                        }
                        (_, Arg::List(s)) => {
                            let v = self.value(w, &s[0], l) & mask | (self.value(w, &s[1], l) & mask) << half;
                            self.set(w, &i.args[0], l, v);
                        }
                        (_, s) => {
                            let v = self.value(w, s, l);
                            let v = if width(op[1]) == 4 { v & 0xffff_ffff } else { v };
                            self.set(w, &i.args[0], l, v);
                        }
                    }
                }
            }
            _ => {
                for &l in active {
                    let a: Vec<u64> = (1..i.args.len()).map(|n| at(self, n, l)).collect();
                    let v = scalar(&op, &a, &i.text);
                    self.set(w, &i.args[0], l, v);
                }
            }
        }
    }

    fn mbarrier(&mut self, w: usize, i: &Inst, op: &[&str], active: &[usize]) {
        let cta = self.warps[w].cta;
        match op[1] {
            "init" => {
                for &l in active {
                    let (a, n) = (self.value(w, &i.args[0], l) & WINDOW, self.value(w, &i.args[1], l) as i64);
                    self.mbarriers.insert((cta, a), Mbarrier { count: n, pending: n, tx: 0, phase: 0 });
                }
            }
            "arrive" => {
                for &l in active {
                    let a = self.value(w, &i.args[1], l);
                    let (to, a) = if op.contains(&"shared::cluster") {
                        ((a >> 24) as usize, a & WINDOW)
                    } else {
                        (cta, a & WINDOW)
                    };
                    let tx = if op.contains(&"expect_tx") { self.value(w, &i.args[2], l) as i64 } else { 0 };
                    self.arrive(to, a, 1, tx);
                }
            }
            _ => {
                for l in 0..32 {
                    let (a, parity) = (self.value(w, &i.args[1], l) & WINDOW, self.value(w, &i.args[2], l));
                    assert!(parity < 2, "{}", i.text);
                    let done = self.mbarriers[&(cta, a)].phase % 2 != parity;
                    self.set(w, &i.args[0], l, u64::from(done));
                }
            }
        }
    }

    fn tensor_copy(&mut self, w: usize, i: &Inst, op: &[&str], active: &[usize]) {
        let [l] = active else { panic!("{} threads issue {}", active.len(), i.text) };
        let (l, cta) = (*l, self.warps[w].cta);
        let load = op.contains(&"shared::cluster");
        let (t, s) = if load { (1, 0) } else { (0, 1) };
        let Arg::Tensor(map, coords) = &i.args[t] else { panic!("{}", i.text) };
        let map = self.value(w, map, l) as usize;
        let coords: Vec<i32> = coords.iter().map(|c| self.value(w, c, l) as i32).collect();
        let at = self.value(w, &i.args[s], l) & WINDOW;
        let mask = if op.contains(&"multicast::cluster") { self.value(w, &i.args[3], l) } else { 1 << cta };
        let ctas: Vec<usize> = (0..self.shared.len()).filter(|c| mask >> c & 1 == 1).collect();
        let bytes = self.tensor(map, &coords, &ctas, at, load);
        if load {
            let bar = self.value(w, &i.args[2], l) & WINDOW;
            ctas.iter().for_each(|c| self.arrive(*c, bar, 0, -bytes));
        }
    }

    /// The rows of one warp: the others are their warps' to compute.
    fn wgmma(&mut self, w: usize, i: &Inst) {
        let shape = &i.op[4];
        let (n, k) = shape.strip_prefix("m64n").unwrap().split_once('k').unwrap();
        let (n, k): (u64, u64) = (n.parse().unwrap(), k.parse().unwrap());
        let kind = i.op[6].as_str();
        let cta = self.warps[w].cta;
        let Arg::List(acc) = &i.args[0] else { panic!("{}", i.text) };
        assert_eq!(acc.len() as u64, n / 2);
        let keep = self.value(w, &i.args[3], 0) != 0;
        let flag = |m: usize| i.args.get(m).is_some_and(|a| matches!(a, Arg::Imm(1)));
        let base = 16 * (self.warps[w].number % 4);
        let mut a = vec![0f32; (16 * k) as usize];
        let trans_b = match &i.args[1] {
            Arg::List(regs) => {
                for l in 0..32u64 {
                    for (m, r) in regs.iter().enumerate() {
                        let v = self.value(w, r, l as usize);
                        for e in 0..2 {
                            let (row, col) = (l / 4 + 8 * (m as u64 % 2), 2 * (l % 4) + 8 * (m as u64 / 2) + e);
                            a[(row * k + col) as usize] = decoded(v >> (16 * e) & 0xffff, kind);
                        }
                    }
                }
                flag(6)
            }
            desc => {
                let desc = self.value(w, desc, 0);
                for row in 0..16 {
                    for col in 0..k {
                        a[(row * k + col) as usize] = self.described(cta, desc, flag(6), base + row, col, kind);
                    }
                }
                flag(7)
            }
        };
        let desc = self.value(w, &i.args[2], 0);
        let b: Vec<f32> = (0..n * k).map(|x| self.described(cta, desc, trans_b, x / k, x % k, kind)).collect();
        for l in 0..32u64 {
            for (x, r) in acc.iter().enumerate() {
                let x = x as u64;
                let (row, col) = (l / 4 + 8 * (x / 2 % 2), 8 * (x / 4) + 2 * (l % 4) + x % 2);
                let mut sum = if keep { f(self.value(w, r, l as usize)) } else { 0.0 };
                for q in 0..k {
                    sum += a[(row * k + q) as usize] * b[(col * k + q) as usize];
                }
                self.set(w, r, l as usize, bits(sum));
            }
        }
    }
}

/// The type whose sums have the bits of this one's.
fn signed(ty: &str) -> &str {
    if ty == "u64" { "s64" } else { ty }
}

/// Integer, float and predicate arithmetic.
fn scalar(op: &[&str], a: &[u64], text: &str) -> u64 {
    let ty = op[op.len() - 1];
    let s = |n: usize| a[n] as u32 as i32;
    let u = |n: usize| a[n] as u32;
    let w = |x: i32| u64::from(x as u32);
    let p = u64::from;
    match (op[0], ty) {
        ("add", "s32") => w(s(0).wrapping_add(s(1))),
        ("sub", "s32") => w(s(0).wrapping_sub(s(1))),
        ("add", "s64") => a[0].wrapping_add(a[1]),
        ("sub", "s64") => a[0].wrapping_sub(a[1]),
        ("min", "s64") => (a[0] as i64).min(a[1] as i64) as u64,
        ("max", "s64") => (a[0] as i64).max(a[1] as i64) as u64,
        ("mul", "s32") => w(s(0).wrapping_mul(s(1))),
        ("mul", "u32") => (u64::from(u(0)) * u64::from(u(1))) >> 32,
        ("mul", "s64") => a[0].wrapping_mul(a[1]),
        ("mad", "s64") => a[0].wrapping_mul(a[1]).wrapping_add(a[2]),
        ("mad", "s32") if op[1] == "wide" => (i64::from(s(0)) * i64::from(s(1))).wrapping_add(a[2] as i64) as u64,
        ("div", "u32") => u64::from(u(0).checked_div(u(1)).unwrap_or(u32::MAX)),
        ("rem", "u32") => u64::from(u(0).checked_rem(u(1)).unwrap_or(u(0))),
        ("div", "s32") => w(s(0).checked_div(s(1)).unwrap_or(-1)),
        ("min", "s32") => w(s(0).min(s(1))),
        ("max", "s32") => w(s(0).max(s(1))),
        ("shl", "b32") => u64::from(u(0) << u(1)),
        ("shr", "u32") => u64::from(u(0) >> u(1)),
        ("shr", "u64") => a[0] >> a[1],
        ("shr", "s32") => w(s(0) >> u(1)),
        ("and", "b32" | "b64" | "pred") => a[0] & a[1],
        ("or", "b32" | "b64" | "pred") => a[0] | a[1],
        ("xor", "b32" | "b64") => a[0] ^ a[1],
        ("not", "pred") => a[0] ^ 1,
        ("add", "f32") => bits(f(a[0]) + f(a[1])),
        ("sub", "f32") => bits(f(a[0]) - f(a[1])),
        ("mul", "f32") => bits(f(a[0]) * f(a[1])),
        ("div", "f32") => bits(f(a[0]) / f(a[1])),
        ("fma", "f32") => bits(f(a[0]).mul_add(f(a[1]), f(a[2]))),
        ("min", "f32") => bits(if f(a[0]).is_nan() || f(a[1]).is_nan() { f32::NAN } else { f(a[0]).min(f(a[1])) }),
        ("max", "f32") => bits(if f(a[0]).is_nan() || f(a[1]).is_nan() { f32::NAN } else { f(a[0]).max(f(a[1])) }),
        ("mul", "f64") => (d(a[0]) * d(a[1])).to_bits(),
        ("sub", "f64") => (d(a[0]) - d(a[1])).to_bits(),
        ("fma", "f64") => d(a[0]).mul_add(d(a[1]), d(a[2])).to_bits(),
        ("add", "f64") => (d(a[0]) + d(a[1])).to_bits(),
        ("min", "f64") => d(a[0]).min(d(a[1])).to_bits(),
        ("max", "f64") => d(a[0]).max(d(a[1])).to_bits(),
        ("neg", "f32") => bits(-f(a[0])),
        ("abs", "f32") => bits(f(a[0]).abs()),
        ("copysign", "f32") => bits(f(a[1]).copysign(f(a[0]))),
        ("ex2", "f32") => bits(f(a[0]).exp2()),
        ("lg2", "f32") => bits(f(a[0]).log2()),
        ("rcp", "f32") => bits(1.0 / f(a[0])),
        ("rsqrt", "f32") => bits(1.0 / f(a[0]).sqrt()),
        ("sqrt", "f32") => bits(f(a[0]).sqrt()),
        ("cvta", _) => a[0],
        ("selp", _) => {
            if a[2] != 0 {
                a[0] & mask(ty)
            } else {
                a[1] & mask(ty)
            }
        }
        ("setp", _) => p(compare(op[1], ty, a)),
        ("cvt", _) => convert(op, a, text),
        _ => panic!("the machine does not know {text}"),
    }
}

fn mask(ty: &str) -> u64 {
    if width(ty) == 8 { u64::MAX } else { 0xffff_ffff }
}

fn compare(how: &str, ty: &str, a: &[u64]) -> bool {
    use std::cmp::Ordering::{Equal, Greater, Less};
    let order = match ty {
        "f32" => f(a[0]).partial_cmp(&f(a[1])),
        "f64" => d(a[0]).partial_cmp(&d(a[1])),
        "u32" => Some((a[0] as u32).cmp(&(a[1] as u32))),
        "s64" => Some((a[0] as i64).cmp(&(a[1] as i64))),
        _ => Some((a[0] as u32 as i32).cmp(&(a[1] as u32 as i32))),
    };
    match how {
        "lt" => order == Some(Less),
        "le" => matches!(order, Some(Less | Equal)),
        "gt" => order == Some(Greater),
        "ge" => matches!(order, Some(Greater | Equal)),
        "eq" => order == Some(Equal),
        "ne" => matches!(order, Some(Less | Greater)),
        "neu" => order != Some(Equal),
        "ltu" => order.is_none_or(|o| o == Less),
        "leu" => order.is_none_or(|o| o != Greater),
        "nan" => order.is_none(),
        _ => panic!("setp.{how}"),
    }
}

/// Conversions to or from 64 bits give the least integer for NaN, others 0.
fn truncated(x: f64) -> i64 {
    if x.is_nan() { i64::MIN } else { x as i64 }
}

fn saturated(x: i64) -> u64 {
    u64::from(x.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as u32)
}

fn convert(op: &[&str], a: &[u64], text: &str) -> u64 {
    let n = op.len();
    match (op[n - 2], op[n - 1]) {
        ("bf16x2", "f32") => {
            u64::from(bf16::from_f32(f(a[0])).to_bits()) << 16 | u64::from(bf16::from_f32(f(a[1])).to_bits())
        }
        ("f16x2", "f32") => {
            u64::from(f16::from_f32(f(a[0])).to_bits()) << 16 | u64::from(f16::from_f32(f(a[1])).to_bits())
        }
        ("bf16", "f32") => u64::from(bf16::from_f32(f(a[0])).to_bits()),
        ("f16", "f32") => u64::from(f16::from_f32(f(a[0])).to_bits()),
        ("f32", "f16") => bits(f16::from_bits(a[0] as u16).to_f32()),
        ("f32", "f64") => bits(d(a[0]) as f32),
        ("f64", "f32") => f64::from(f(a[0])).to_bits(),
        ("f64", "f64") => d(a[0]).round_ties_even().to_bits(),
        ("s64", "f64") => truncated(d(a[0])) as u64,
        ("s64", "f32") => truncated(f64::from(f(a[0]))) as u64,
        ("s32", "f64") => saturated(truncated(d(a[0]))),
        ("f64", "s32") => f64::from(a[0] as u32 as i32).to_bits(),
        ("f64", "s64") => (a[0] as i64 as f64).to_bits(),
        ("f32", "s64") => bits(a[0] as i64 as f32),
        ("s32", "s64") if op[1] == "sat" => saturated(a[0] as i64),
        ("f32", "s32") => bits(a[0] as u32 as i32 as f32),
        ("s32", "f32") => f(a[0]) as i32 as u32 as u64,
        ("s64", "s32") => a[0] as u32 as i32 as i64 as u64,
        ("u32", "u64") => a[0] & 0xffff_ffff,
        ("u32", "u16") => a[0] & 0xffff,
        ("f32", "f32") => bits(match op[1] {
            "rni" => f(a[0]).round_ties_even(),
            "rmi" => f(a[0]).floor(),
            _ => f(a[0]).ceil(),
        }),
        _ => panic!("the machine does not know {text}"),
    }
}
