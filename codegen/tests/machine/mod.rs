//! A machine that runs the PTX this project prints: warps step by step, asynchronous work done when it is issued.
//!
//! It checks what an assembler cannot: addresses, swizzles, descriptors, predicates, barrier counts and phases. It is no
//! model of time or of races; the kernel evaluator has those. Branches must be uniform in a warp.
//! Source: PTX ISA 8.0.

pub mod launch;
pub mod matrix;
pub mod memory;
pub mod step;

use std::collections::HashMap;

/// An operand.
#[derive(Clone, Debug)]
pub enum Arg {
    Reg(usize),
    Imm(u64),
    /// A register or symbol and an offset.
    Mem(Box<Arg>, i64),
    /// A tensor map and coordinates.
    Tensor(Box<Arg>, Vec<Arg>),
    List(Vec<Arg>),
    /// A name: special register, parameter, label.
    Name(String),
}

/// An instruction.
#[derive(Clone, Debug)]
pub struct Inst {
    /// Guard: register and the value it must have.
    pub guard: Option<(usize, bool)>,
    /// The opcode's parts.
    pub op: Vec<String>,
    pub args: Vec<Arg>,
    pub text: String,
}

/// One entry, parsed.
pub struct Entry {
    pub code: Vec<Inst>,
    pub labels: HashMap<String, usize>,
    pub registers: usize,
}

fn split(s: &str) -> Vec<String> {
    let (mut out, mut depth, mut now) = (Vec::new(), 0, String::new());
    for c in s.chars() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            _ => {}
        }
        if c == ',' && depth == 0 {
            out.push(now.trim().to_string());
            now.clear();
        } else {
            now.push(c);
        }
    }
    if !now.trim().is_empty() {
        out.push(now.trim().to_string());
    }
    out
}

fn number(s: &str) -> Option<u64> {
    if let Some(h) = s.strip_prefix("0f") {
        return u64::from_str_radix(h, 16).ok();
    }
    if let Some(h) = s.strip_prefix("0d").or(s.strip_prefix("0x")) {
        return u64::from_str_radix(h, 16).ok();
    }
    s.parse::<i64>().ok().map(|v| v as u64).or_else(|| s.parse().ok())
}

struct Names(HashMap<String, usize>);

impl Names {
    fn reg(&mut self, s: &str) -> usize {
        let n = self.0.len();
        *self.0.entry(s.to_string()).or_insert(n)
    }

    fn arg(&mut self, s: &str) -> Arg {
        if let Some(inner) = s.strip_prefix('[').and_then(|s| s.strip_suffix(']')) {
            let parts = split(inner);
            if parts.len() == 2 {
                let Arg::List(coords) = self.arg(&parts[1]) else { panic!("{s}") };
                return Arg::Tensor(Box::new(self.arg(&parts[0])), coords);
            }
            let (base, off) = match inner.rsplit_once('+') {
                Some((b, o)) if o.parse::<i64>().is_ok() => (b, o.parse().unwrap()),
                _ => (inner, 0),
            };
            return Arg::Mem(Box::new(self.arg(base)), off);
        }
        if let Some(inner) = s.strip_prefix('{').and_then(|s| s.strip_suffix('}')) {
            return Arg::List(split(inner).iter().map(|x| self.arg(x)).collect());
        }
        if let Some(n) = number(s) {
            return Arg::Imm(n);
        }
        if let Some(p) = s.strip_prefix("_|") {
            return self.arg(p);
        }
        let special = ["%tid.x", "%ctaid.x", "%cluster_ctarank"].contains(&s);
        if s.starts_with('%') && !special { Arg::Reg(self.reg(s)) } else { Arg::Name(s.to_string()) }
    }
}

/// The entry of this name.
pub fn parse(text: &str, name: &str) -> Entry {
    let at = text.find(&format!(".entry {name}(")).unwrap_or_else(|| panic!("no entry {name}"));
    let body = &text[at..];
    let body = &body[body.find("\n{").unwrap() + 2..];
    let body = &body[..body.find("\n}").unwrap()];
    let mut names = Names(HashMap::new());
    let mut e = Entry { code: Vec::new(), labels: HashMap::new(), registers: 0 };
    for line in body.lines().map(str::trim) {
        if line.is_empty() || line.starts_with("//") || line.starts_with('.') {
            continue;
        }
        if let Some(l) = line.strip_suffix(':') {
            e.labels.insert(l.to_string(), e.code.len());
            continue;
        }
        let mut rest = line.strip_suffix(';').unwrap_or_else(|| panic!("{line}"));
        let mut guard = None;
        if let Some(g) = rest.strip_prefix('@') {
            let (p, r) = g.split_once(' ').unwrap();
            guard = Some(match p.strip_prefix('!') {
                Some(p) => (names.reg(p), false),
                None => (names.reg(p), true),
            });
            rest = r;
        }
        let (op, args) = rest.split_once(' ').unwrap_or((rest, ""));
        let op = op.split('.').map(str::to_string).collect();
        let args = split(args).iter().map(|a| names.arg(a)).collect();
        e.code.push(Inst { guard, op, args, text: line.to_string() });
    }
    e.registers = names.0.len();
    e
}

/// A tensor map: innermost dimension first.
pub struct Map {
    pub base: u64,
    pub extents: Vec<u64>,
    /// Bytes.
    pub strides: Vec<u64>,
    pub boxed: Vec<u64>,
    pub swizzle: u64,
    pub bytes: u64,
}

#[derive(Clone, Copy, Default)]
pub struct Mbarrier {
    pub count: i64,
    pub pending: i64,
    pub tx: i64,
    pub phase: u64,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Status {
    Ready,
    /// At a hardware barrier, until its generation passes.
    Barrier(u64, u64),
    /// At the cluster's barrier.
    Cluster(u64),
    Done,
}

pub struct Warp {
    pub cta: usize,
    pub number: u64,
    pub pc: usize,
    pub regs: Vec<[u64; 32]>,
    pub status: Status,
    /// Groups of `cp.async` copies under way, the last one open.
    pub copies: Vec<Vec<matrix::Piece>>,
}

/// A cluster of tasks under way.
pub struct Machine<'a> {
    pub entry: &'a Entry,
    pub params: Vec<u64>,
    pub maps: Vec<Map>,
    pub global: &'a mut Vec<u8>,
    pub shared: Vec<Vec<u8>>,
    pub mbarriers: HashMap<(usize, u64), Mbarrier>,
    /// Threads arrived and generation, by task and number.
    pub barriers: HashMap<(usize, u64), (u64, u64)>,
    /// What threads that meet at a barrier have said so far, by task and number.
    pub said: HashMap<(usize, u64), bool>,
    pub cluster: (u64, u64),
    pub first_task: u64,
    pub warps: Vec<Warp>,
    /// Whether the last warp moves first.
    pub backwards: bool,
}

impl<'a> Machine<'a> {
    pub fn new(
        entry: &'a Entry,
        params: Vec<u64>,
        maps: Vec<Map>,
        global: &'a mut Vec<u8>,
        first_task: u64,
        tasks: usize,
        threads: u64,
    ) -> Machine<'a> {
        let mut warps = Vec::new();
        for cta in 0..tasks {
            for number in 0..threads / 32 {
                let regs = vec![[0; 32]; entry.registers];
                warps.push(Warp { cta, number, pc: 0, regs, status: Status::Ready, copies: vec![Vec::new()] });
            }
        }
        let shared = vec![vec![0xA5; 240 << 10]; tasks];
        let (mbarriers, barriers) = (HashMap::new(), HashMap::new());
        let said = HashMap::new();
        let (cluster, backwards) = ((0, 0), false);
        Machine {
            entry,
            params,
            maps,
            global,
            shared,
            mbarriers,
            barriers,
            said,
            cluster,
            first_task,
            warps,
            backwards,
        }
    }

    /// Runs until all warps have ended.
    pub fn run(&mut self) {
        loop {
            let mut moved = false;
            let n = self.warps.len();
            for w in 0..n {
                moved |= self.advance(if self.backwards { n - 1 - w } else { w });
            }
            if self.warps.iter().all(|w| w.status == Status::Done) {
                return;
            }
            let stuck: Vec<String> = self
                .warps
                .iter()
                .filter(|w| w.status != Status::Done)
                .map(|w| format!("task {} warp {}: {:?} at {}", w.cta, w.number, w.status, self.entry.code[w.pc].text))
                .collect();
            assert!(moved, "deadlock:\n{}", stuck.join("\n"));
        }
    }
}
