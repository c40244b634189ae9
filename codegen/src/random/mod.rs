//! Random streams for generality tests: plans of one kernel with 1 to 6 contractions, reductions, filters and emits, and
//! mappings drawn for them.
//!
//! A stream walks n for a block of rows m. Scores `[m, n]` come from contractions of stationary rows with streamed
//! ones; the rows are loaded, or a contraction before the stream left them in registers. Further contractions sum
//! functions of scores against streamed rows into accumulators `[m, f]`, some relative to a running maximum that repairs
//! them; reductions carry rows `[m]`; a contraction after the stream may take an accumulator on. What leaves is stored
//! per step or at the end. Nothing in them is any user's operation. Invariant: a seed gives one plan, whose result does
//! not depend on its blocks, stays of order one and takes every contraction; every contribution selects its identity
//! outside the stream's filter, as the tile IR asks.

mod derive;

pub use derive::{Choices, mapping};

use std::fmt::Write as _;

use einfall_ir::analysis::resources::{Limits, RoleResources, resources};
use einfall_ir::arena::Id;
use einfall_ir::cascade::RankId;
use einfall_ir::kernel::{Module, atoms};
use einfall_ir::mapping::Mapping;
use einfall_ir::tile::{Plan, parse};

use crate::lower::gpu;
use crate::pipeline::{self, Context, Program};
use crate::tables;

/// Registers per thread that drawn mappings leave beside fragments.
const ROOM: u64 = 88;

/// Constraints that a drawn mapping may break: other choices are taken instead.
const DRAWN_REFUSED: [&str; 3] = ["schedule", "resources", "work loop"];

/// A stream as a device with contraction instructions gets it, by a drawn mapping.
#[derive(Clone, Debug)]
pub struct Drawn {
    /// Its plan, after every pass of the tile level.
    pub plan: Plan,
    /// Its ranks that are extents of features.
    pub features: Vec<RankId>,
    /// What the mapping was drawn with.
    pub choices: Choices,
    /// The mapping.
    pub mapping: Mapping,
    /// The kernels.
    pub module: Module,
    /// Whether what was drawn was refused, so that the plain mapping was taken.
    pub plain: bool,
}

/// The stream of a seed, lowered.
///
/// # Errors
/// What refuses the plan itself, or a mapping other than for being too large or for asking an operation to run behind
/// what it feeds: those may be drawn, and other choices are taken instead.
pub fn drawn(seed: u64) -> Result<Drawn, String> {
    let context = Context { atoms: atoms::all().collect(), ..Context::default() };
    let passes: Vec<_> = tables::TO_TILE.iter().filter(|p| p.level == pipeline::Level::Tile).copied().collect();
    let (plan, features) = stream(seed);
    let records = pipeline::run(&passes, tables::FORMS, Program::Tile(plan), &context, None)
        .map_err(|(_, stop)| format!("seed {seed}: {stop}"))?;
    let Some(Program::Tile(plan)) = records.into_iter().next_back().map(|r| r.program) else {
        return Err(format!("seed {seed}: the passes of the tile level make no plan"));
    };
    let first = Choices::draw(&mut Rng::new(seed ^ 0x5eed));
    let level = Choices { behind: false, ..first.clone() };
    let plain = Choices { block: 32, ..Choices::plain() };
    let mut refusal = String::new();
    for (choices, plain) in [(first, false), (level, false), (plain, true)] {
        let mapping = mapping(&plan, &choices).map_err(|e| format!("seed {seed}: {e}\n{plan}"))?;
        match gpu::lower(&plan, &mapping) {
            Ok(module) if roomy(&module) || plain => {
                return Ok(Drawn { plan, features, choices, mapping, module, plain });
            }
            Ok(_) => refusal = format!("seed {seed}: resources leave too few registers\n{plan}\n{mapping}"),
            Err(e) => {
                refusal = format!("seed {seed}: {e:?}\n{plan}\n{mapping}");
                if !e.iter().all(|d| d.constraint.is_some_and(|c| DRAWN_REFUSED.contains(&c))) {
                    break;
                }
            }
        }
    }
    Err(refusal)
}

/// Whether each role has registers left for what the assembler keeps beside fragments. Streams of many contractions with
/// functions between them keep more than the kernels that mappings are chosen for (ptxas 13.0: 188 registers of
/// fragments spill in 255, 168 in 240).
fn roomy(module: &Module) -> bool {
    let limits = Limits::h100();
    let fits = |r: &RoleResources| r.fragment_registers + ROOM <= r.budget;
    module.kernels.iter().all(|k| resources(k, &limits).roles.iter().all(|r| r.fragment_registers == 0 || fits(r)))
}

/// A small deterministic generator (xorshift64*).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of a seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }

    /// Whether an event of one in `n` happens.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of a list.
    ///
    /// # Panics
    /// On an empty list.
    pub fn pick<'t, T>(&mut self, list: &'t [T]) -> &'t T {
        &list[self.below(list.len() as u64) as usize]
    }
}

/// A random plan of one stream with 1 to 6 contractions, and its ranks that are extents of features: those after M and N.
pub fn stream(seed: u64) -> (Plan, Vec<RankId>) {
    let mut s = Builder::new(seed);
    s.build();
    let text = s.text(seed);
    let plan = parse::parse(&text).unwrap_or_else(|e| panic!("seed {seed}: {e}\n{text}"));
    (plan, (0..s.n_features).map(|f| RankId::new(2 + f as usize)).collect())
}

/// Extents for a stream's ranks, around the edges of blocks of `block` rows and coordinates.
pub fn extents(of: &Drawn, rng: &mut Rng, block: u64) -> Vec<u64> {
    let around = |rng: &mut Rng| match rng.below(4) {
        0 => 8 * (1 + rng.below(4)),
        1 => block,
        2 => block + 8,
        _ => 2 * block + 8 * rng.below(5),
    };
    let features = |rng: &mut Rng| 8 * (1 + rng.below(4));
    of.plan.ranks.ids().map(|r| if of.features.contains(&r) { features(rng) } else { around(rng) }).collect()
}

/// A plan being put together, as text.
struct Builder {
    rng: Rng,
    n_features: u64,
    inputs: Vec<String>,
    outputs: Vec<String>,
    tiles: Vec<String>,
    before: Vec<String>,
    body: Vec<String>,
    after: Vec<String>,
    filter: Option<&'static str>,
    /// Tiles over [m, n] at hand.
    scores: Vec<String>,
    /// Tiles over [m, f] that hold after the stream, with f.
    features: Vec<(String, u64)>,
    names: usize,
    contractions: u64,
}

impl Builder {
    fn new(seed: u64) -> Builder {
        let mut rng = Rng::new(seed);
        let n_features = 2 + rng.below(2);
        let filters = [None, Some("n <= m"), Some("n <= m + (N - M)"), Some("n <= m and n > m - 24")];
        let filter = *rng.pick(&filters);
        Builder {
            rng,
            n_features,
            inputs: Vec::new(),
            outputs: Vec::new(),
            tiles: Vec::new(),
            before: Vec::new(),
            body: Vec::new(),
            after: Vec::new(),
            filter,
            scores: Vec::new(),
            features: Vec::new(),
            names: 0,
            contractions: 0,
        }
    }

    fn name(&mut self, base: &str) -> String {
        self.names += 1;
        format!("{base}{}", self.names)
    }

    fn tile(&mut self, base: &str, dtype: &str, axes: &str) -> String {
        let name = self.name(base);
        self.tiles.push(format!("tile {name}: {dtype}[{axes}]"));
        name
    }

    /// `value` where the filter holds.
    fn guarded(&self, value: &str, otherwise: &str) -> String {
        match self.filter {
            Some(f) => format!("if {f} then {value} else {otherwise}"),
            None => value.to_string(),
        }
    }

    /// An array of bf16 over the two axes, in either order, and the load of its block.
    fn load(&mut self, base: &str, axis: &str, rank: &str, f: u64, stationary: bool) -> String {
        let array = self.name("X");
        let turned = !stationary && self.rng.one_in(3);
        let (dims, at) = match turned {
            true => (format!("F{f}, {rank}"), format!("f{f}, {axis}")),
            false => (format!("{rank}, F{f}"), format!("{axis}, f{f}")),
        };
        self.inputs.push(format!("input {array}: bf16[{dims}]"));
        let tile = self.tile(base, "bf16", &at);
        let line = format!("{tile} = load {array}[{at}]");
        if stationary { &mut self.before } else { &mut self.body }.push(line);
        tile
    }

    fn build(&mut self) {
        let wanted = 1 + self.rng.below(6);
        let (rows, f) = self.rows(wanted);
        self.score(&rows, f);
        while self.contractions < wanted {
            match self.rng.below(4) {
                0 => {
                    let (rows, f) = self.rows(wanted);
                    self.score(&rows, f);
                }
                1 => self.anchored(wanted),
                2 if !self.features.is_empty() => self.project(),
                _ => self.accumulate(),
            }
        }
        for (o, f) in std::mem::take(&mut self.features) {
            let out = self.name("O");
            self.outputs.push(format!("output {out}: bf16[M, F{f}]"));
            self.after.push(format!("store {out}[m, f{f}] = {o} * 0.5 over m, f{f}"));
        }
        for s in self.scores.clone() {
            if !self.is_read(&s) {
                self.reduce_of(format!("tanh({s} * 0.25)"));
            }
        }
        for _ in 0..self.rng.below(3) {
            self.reduce();
        }
        if self.filter.is_none() && self.rng.one_in(2) {
            let (out, value) = (self.name("P"), self.elementwise());
            self.outputs.push(format!("output {out}: bf16[M, N]"));
            self.body.push(format!("store {out}[m, n] = {value} over m, n"));
        }
        if self.outputs.is_empty() {
            self.reduce();
        }
    }

    /// Two different feature axes.
    fn two_features(&mut self) -> (u64, u64) {
        let f = self.rng.below(self.n_features);
        (f, (f + 1 + self.rng.below(self.n_features - 1)) % self.n_features)
    }

    /// Stationary rows: loaded, or loaded ones contracted with a matrix.
    fn rows(&mut self, wanted: u64) -> (String, u64) {
        let (f, g) = self.two_features();
        let q = self.load("q", "m", "M", f, true);
        if self.contractions + 2 > wanted || self.rng.one_in(2) {
            return (q, f);
        }
        let w = self.matrix(f, g, false);
        let u = self.tile("u", "f32", &format!("m, f{g}"));
        self.before.push(format!("{u} = contract(f{f}) {q}, {w}"));
        self.before.push(format!("{u} = tanh({u})"));
        self.contractions += 1;
        (u, g)
    }

    /// A matrix loaded once.
    fn matrix(&mut self, f: u64, g: u64, after: bool) -> String {
        let array = self.name("W");
        self.inputs.push(format!("input {array}: bf16[F{f}, F{g}]"));
        let tile = self.tile("w", "bf16", &format!("f{f}, f{g}"));
        let line = format!("{tile} = load {array}[f{f}, f{g}]");
        if after { &mut self.after } else { &mut self.before }.push(line);
        tile
    }

    /// An accumulator contracted with a matrix after the stream.
    fn project(&mut self) {
        let k = self.rng.below(self.features.len() as u64) as usize;
        let (o, f) = self.features.swap_remove(k);
        let g = (f + 1 + self.rng.below(self.n_features - 1)) % self.n_features;
        let w = self.matrix(f, g, true);
        let x = self.tile("x", "f32", &format!("m, f{f}"));
        let y = self.tile("y", "f32", &format!("m, f{g}"));
        self.after.push(format!("{x} = tanh({o} * 0.25)"));
        self.after.push(format!("{y} = contract(f{f}) {x}, {w}"));
        self.contractions += 1;
        self.features.push((y, g));
    }

    /// Accumulators relative to a running maximum, which repairs them when it moves.
    fn anchored(&mut self, wanted: u64) {
        let s = self.rng.pick(&self.scores.clone()).clone();
        let (x, new) = (self.tile("x", "f32", "m"), self.tile("x", "f32", "m"));
        self.before.push(format!("{x} = -inf"));
        self.body.push(format!("{new} = {x}"));
        let score = self.guarded(&s, "-inf");
        self.body.push(format!("{new} = carry reduce max(n) {score}"));
        let fix = |acc: &str| format!("{acc} = if {x} == -inf then 0.0 else exp({x} - {new}) * {acc}");
        let power = self.guarded(&format!("if {s} == -inf then 0.0 else exp({s} - {new})"), "0.0");
        let l = self.tile("l", "f32", "m");
        self.before.push(format!("{l} = 0.0"));
        let mut sums = Vec::new();
        for _ in 0..=self.rng.below(2) {
            if self.contractions >= wanted {
                break;
            }
            let f = self.rng.below(self.n_features);
            let o = self.tile("o", "f32", &format!("m, f{f}"));
            self.before.push(format!("{o} = 0.0"));
            self.body.push(fix(&o));
            self.contractions += 1;
            sums.push((o, f));
        }
        self.body.push(fix(&l));
        let p = self.tile("p", "f32", "m, n");
        self.body.push(format!("{p} = {power}"));
        for (o, f) in &sums {
            let v = self.load("v", "n", "N", *f, false);
            self.body.push(format!("{o} = carry contract(n) {p}, {v}"));
        }
        self.body.push(format!("{l} = carry reduce sum(n) {p}"));
        self.body.push(format!("{x} = {new}"));
        for (o, f) in sums {
            let y = self.tile("y", "f32", &format!("m, f{f}"));
            self.after.push(format!("{y} = if {x} == -inf then 0.0 else {o} / {l}"));
            self.features.push((y, f));
        }
        let out = self.name("L");
        self.outputs.push(format!("output {out}: f32[M]"));
        self.after.push(format!("store {out}[m] = if {x} == -inf then -inf else {x} + log({l}) over m"));
    }

    /// A score: rows contracted with streamed rows.
    fn score(&mut self, rows: &str, f: u64) {
        let k = self.load("k", "n", "N", f, false);
        let s = self.tile("s", "f32", "m, n");
        self.body.push(format!("{s} = contract(f{f}) {rows}, {k}"));
        self.contractions += 1;
        if self.rng.one_in(2) {
            let value = self.elementwise_of(&s);
            self.body.push(format!("{s} = {value}"));
        }
        self.scores.push(s);
    }

    /// An elementwise value over [m, n], within [-1, 1].
    fn elementwise(&mut self) -> String {
        let s = self.rng.pick(&self.scores.clone()).clone();
        self.elementwise_of(&s)
    }

    fn elementwise_of(&mut self, s: &str) -> String {
        let other = if self.scores.is_empty() { s.to_string() } else { self.rng.pick(&self.scores.clone()).clone() };
        match self.rng.below(5) {
            0 => format!("tanh({s} * 0.25)"),
            1 => format!("sigmoid({s} - {other})"),
            2 => format!("tanh(max({s}, {other}) + 0.01 * (m - n))"),
            3 => format!("if {s} < {other} then sigmoid({s}) else tanh({other})"),
            _ => format!("exp(-{s} * {s})").replace("(-", "(0.0 - "),
        }
    }

    /// A function of scores contracted with streamed rows into an accumulator.
    fn accumulate(&mut self) {
        let f = self.rng.below(self.n_features);
        let value = self.elementwise();
        let value = self.guarded(&value, "0.0");
        let w = self.tile("w", "f32", "m, n");
        self.body.push(format!("{w} = {value}"));
        let v = self.load("v", "n", "N", f, false);
        let o = self.tile("o", "f32", &format!("m, f{f}"));
        self.contractions += 1;
        self.before.push(format!("{o} = 0.0"));
        self.body.push(format!("{o} = carry contract(n) {w}, {v}"));
        self.features.push((o, f));
    }

    /// Whether an operation other than its own reads a tile of the stream's.
    fn is_read(&self, tile: &str) -> bool {
        let own = format!("{tile} = ");
        let others = self.body.iter().filter(|line| !line.starts_with(&own));
        let words = |line: &str| line.split(|c: char| !c.is_alphanumeric()).any(|w| w == tile);
        others.into_iter().any(|line| words(line))
    }

    /// A row carried over the stream.
    fn reduce(&mut self) {
        let value = self.elementwise();
        self.reduce_of(value);
    }

    fn reduce_of(&mut self, value: String) {
        let (op, identity) = *self.rng.pick(&[("sum", "0.0"), ("max", "-inf"), ("min", "inf")]);
        let value = self.guarded(&value, identity);
        let row = self.tile("l", "f32", "m");
        self.before.push(format!("{row} = {identity}"));
        self.body.push(format!("{row} = carry reduce {op}(n) {value}"));
        let out = self.name("L");
        self.outputs.push(format!("output {out}: f32[M]"));
        self.after.push(format!("store {out}[m] = {row} over m"));
    }

    fn text(&self, seed: u64) -> String {
        let mut t = String::new();
        let features: Vec<String> = (0..self.n_features).map(|f| format!("F{f}")).collect();
        let _ = writeln!(t, "plan stream{seed}[M, N, {}] {{", features.join(", "));
        let lines = |t: &mut String, indent: usize, list: &[String]| {
            for l in list {
                let _ = writeln!(t, "{:indent$}{l}", "");
            }
        };
        lines(&mut t, 4, &self.inputs);
        lines(&mut t, 4, &self.outputs);
        let _ = writeln!(t, "    kernel k {{\n        grid m in M\n        stream n in N");
        for f in 0..self.n_features {
            let _ = writeln!(t, "        inner f{f} in F{f}");
        }
        lines(&mut t, 8, &self.tiles);
        lines(&mut t, 8, &self.before);
        let filter = self.filter.map_or_else(String::new, |f| format!(" where {f}"));
        let _ = writeln!(t, "        for n{filter} {{");
        lines(&mut t, 12, &self.body);
        let _ = writeln!(t, "        }}");
        lines(&mut t, 8, &self.after);
        t.push_str("    }\n}\n");
        t
    }
}
