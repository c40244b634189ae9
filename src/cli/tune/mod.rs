//! `tune`: measure what the model thinks best and keep the winner in a table.
//!
//! For every case: the model's cheapest diverse mappings, mappings from files, and drawn ones are compiled side by side
//! in child processes, compared with the evaluator at small sizes and timed one at a time; the search ends when the
//! budget is spent or no mapping left can be faster by the model's floor. Invariant: whatever a candidate does, it
//! is recorded with its reason and the next one is measured.

mod case;
mod cpu;
mod cuda;
mod journal;
mod pool;
mod sizes;
mod worker;

use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use einfall::Options;
use einfall_autotune::table::{Class, Entry, Kind, Table, fingerprint};
use einfall_autotune::tune::{self, Candidate, Origin};
use einfall_ir::cascade::Cascade;
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;
use indicatif::{ProgressBar, ProgressStyle};

use super::Failure;
use super::gpu::plans::is_for;
use super::lower::read_mapping;
use super::source::{Pairs, Source, ein_files, sizes as joined};
use super::tables;
use case::Case;
use journal::{Journal, Record};
use pool::{Jobs, Limits, Outcome, Pool};

/// Mappings that are measured again before one wins.
const FINALISTS: usize = 3;
/// How often.
const TURNS: usize = 2;

/// A device that is tuned for: `cpu`, `cuda`, `cuda:1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// This machine's processor.
    Cpu,
    /// An NVIDIA GPU by number.
    Cuda(usize),
}

impl std::str::FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceName, String> {
        let number = |n: &str| n.parse().map(DeviceName::Cuda).ok();
        match (text, text.strip_prefix("cuda:").and_then(number)) {
            ("cpu", _) => Ok(DeviceName::Cpu),
            ("cuda", _) => Ok(DeviceName::Cuda(0)),
            (_, Some(name)) => Ok(name),
            _ => Err(format!("`{text}` is no device that is tuned for: cpu, cuda or cuda:N")),
        }
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceName::Cpu => f.write_str("cpu"),
            DeviceName::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl DeviceName {
    /// What tables call it.
    fn kind(self) -> Kind {
        match self {
            DeviceName::Cpu => Kind::Cpu,
            DeviceName::Cuda(_) => Kind::Cuda,
        }
    }

    /// The plan of a cascade for it.
    pub fn plan(self, c: &Cascade) -> Result<Plan, einfall::Error> {
        match self {
            DeviceName::Cpu => einfall::plan(c),
            DeviceName::Cuda(_) => einfall::cuda::plan(c),
        }
    }

    /// What records say of it. Opens it, so that what it lacks is said once.
    fn open(self) -> Result<Device, Failure> {
        let options = Options::from_env().map_err(Failure::Usage)?;
        match self {
            DeviceName::Cpu => {
                let engine = einfall::Engine::new(&options).map_err(Failure::machine)?;
                let (major, minor, patch) = engine.runtime().llvm().version();
                let name = einfall_runtime::Cpu::detect().name;
                let driver = format!("LLVM {major}.{minor}.{patch}");
                Ok(Device { name, driver, sheet: engine.data_sheet().clone() })
            }
            DeviceName::Cuda(n) => {
                let engine = einfall::cuda::Engine::new(&options, n).map_err(Failure::machine)?;
                let gpu = engine.runtime().gpu();
                let driver = format!("CUDA {}.{}", gpu.driver / 1000, gpu.driver % 1000 / 10);
                Ok(Device { name: gpu.name.clone(), driver, sheet: engine.data_sheet().clone() })
            }
        }
    }
}

/// A device as records name it.
struct Device {
    name: String,
    driver: String,
    sheet: DataSheet,
}

/// A length of time: `10s`, `500ms`, `2m`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span(pub Duration);

impl std::str::FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Span, String> {
        let wrong = || format!("`{text}` is no length of time: 500ms, 10s or 2m");
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let number: f64 = text[..digits].parse().map_err(|_| wrong())?;
        let unit = match &text[digits..] {
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            _ => return Err(wrong()),
        };
        Duration::try_from_secs_f64(number * unit).map(Span).map_err(|_| wrong())
    }
}

/// Arguments of `tune`.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  einfall tune kernels/matmul.ein --sizes M=512,N=512..2048:x2,K=512 --out tables/cpu.toml\n  \
einfall tune kernels --device cuda --sizes sizes.txt --budget 10s --out tables/h100.toml\n\n\
A file of sizes has a list a line; `NAME: LIST` is for the cascade of that name. N=1024..8192:x2 stands for every \
power, N=64..256:+64 for every step, N=1|7|64 for these."
)]
pub struct TuneArgs {
    /// .ein files, folders of them, or names of library files
    #[arg(value_name = "FILE|DIR", required_unless_present = "worker")]
    paths: Vec<PathBuf>,
    /// The device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    /// Sizes to be fast at: a list or a file of lists
    #[arg(long, value_name = "LIST|FILE", required_unless_present = "worker")]
    sizes: Option<String>,
    /// Extents fixed at compile time
    #[arg(long = "static", value_name = "RANK=N,..")]
    statics: Vec<Pairs<u64>>,
    /// Time for the search at each size
    #[arg(long, default_value = "10s")]
    budget: Span,
    /// Mappings of the model that are considered at each size
    #[arg(long, default_value_t = 12)]
    candidates: usize,
    /// Mappings drawn from everything the model admits, each measured whatever the budget
    #[arg(long, default_value_t = 0)]
    draws: usize,
    /// Seed of the draws
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Time for everything at one size, draws included; what is left then is left out
    #[arg(long)]
    limit: Option<Span>,
    /// Mapping files that are measured on the cases whose plan they name
    #[arg(long, value_name = "FILE")]
    mapping: Vec<PathBuf>,
    /// Milliseconds of launches per mapping
    #[arg(long, default_value_t = 50)]
    time_ms: u64,
    /// Seconds after which a child that runs a mapping counts as hung
    #[arg(long, default_value_t = 20)]
    hang_s: u64,
    /// Child processes that compile; by default one per core
    #[arg(long)]
    workers: Option<usize>,
    /// The table that keeps the fastest; one that is there is added to
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Every measurement, one JSON object a line
    #[arg(long, value_name = "FILE")]
    jsonl: Option<PathBuf>,
    /// Serve a parent process
    #[arg(long, hide = true)]
    worker: bool,
}

/// Tunes every cascade at every size.
pub fn tune(args: &TuneArgs) -> Result<(), Failure> {
    if args.worker {
        return worker::serve(args.device);
    }
    let lines = sizes::read(args.sizes.as_deref().unwrap_or_default())?;
    let statics = joined(&args.statics);
    let cases = cases(&args.paths, &lines, &statics)?;
    let mappings = args.mapping.iter().map(|p| read_mapping(p)).collect::<Result<Vec<_>, _>>()?;
    let device = args.device.open()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = args.workers.unwrap_or(match args.device {
        DeviceName::Cpu => cores,
        DeviceName::Cuda(_) => cores.saturating_sub(2).clamp(1, 14),
    });
    let limits =
        Limits { build: Duration::from_secs(120), time: Duration::from_secs(args.hang_s), budget_ms: args.time_ms };
    let mut table = match args.out.as_deref().filter(|p| p.exists()) {
        Some(path) => tables::read(path)?,
        None => Table::new(args.device.kind(), &device.name),
    };
    if (table.kind, &table.device) != (args.device.kind(), &device.name) {
        let what = format!("the table is of {}; this is {}: give another --out", table.device, device.name);
        return Err(Failure::Usage(what));
    }
    let journal = args.out.as_ref().map(|p| {
        let mut name = p.clone().into_os_string();
        name.push(".journal");
        PathBuf::from(name)
    });
    let mut log = Log::new(args.jsonl.as_deref(), journal.as_deref())?;
    let mut pool = Pool::new(args.device, workers, limits)?;
    let mut wrong = 0;
    for case in &cases {
        match one(args, &device, &mut pool, &mut log, case, &mappings) {
            Ok((line, entry)) => {
                println!("{line}");
                table.insert(entry);
                if let Some(path) = &args.out {
                    tables::write(path, &table)?;
                }
            }
            Err(Failure::Wrong(e)) => {
                println!("{}: {}", case.label(), e.trim_end());
                wrong += 1;
            }
            Err(e) => return Err(e),
        }
    }
    if let Some(journal) = log.journal.take() {
        journal.remove();
    }
    if wrong == 0 { Ok(()) } else { Err(Failure::Wrong(format!("{wrong} of {} cases have no mapping", cases.len()))) }
}

/// Every cascade of the files at every size of its lines.
fn cases(paths: &[PathBuf], lines: &[sizes::Line], statics: &[(String, u64)]) -> Result<Vec<Case>, Failure> {
    let mut out = Vec::new();
    let mut texts = Vec::new();
    for path in paths {
        let library = path.to_str().and_then(einfall_kernels::source);
        match library.filter(|_| !path.exists()) {
            Some(text) => texts.push(Source { name: path.display().to_string(), text: text.to_owned() }),
            None => {
                for file in ein_files(std::slice::from_ref(path))? {
                    texts.push(Source::read(&file)?);
                }
            }
        }
    }
    for source in &texts {
        for c in source.module()?.cascades {
            // Lines for this cascade alone come before those for all.
            let own = |l: &&sizes::Line| l.cascade.as_ref() == Some(&c.name);
            let all = |l: &&sizes::Line| l.cascade.is_none();
            let mut chosen: Vec<_> = lines.iter().filter(own).collect();
            if chosen.is_empty() {
                chosen = lines.iter().filter(all).collect();
            }
            for sizes in chosen.iter().flat_map(|l| &l.sizes) {
                let case = Case::new(&source.text, &c, statics, sizes)?;
                if !out.contains(&case) {
                    out.push(case);
                }
            }
        }
    }
    match out.is_empty() {
        true => Err(Failure::Usage("no cascade has sizes in that list".to_owned())),
        false => Ok(out),
    }
}

/// Where records go as they are made.
struct Log {
    jsonl: Option<std::fs::File>,
    journal: Option<Journal>,
    /// What an earlier run measured.
    before: Vec<Record>,
}

impl Log {
    fn new(jsonl: Option<&Path>, journal: Option<&Path>) -> Result<Log, Failure> {
        let open = |p: &Path| std::fs::File::create(p).map_err(|e| Failure::Machine(format!("{}: {e}", p.display())));
        let jsonl = jsonl.map(open).transpose()?;
        let (journal, before) = match journal.map(Journal::open).transpose()? {
            Some((journal, before)) => (Some(journal), before),
            None => (None, Vec::new()),
        };
        Ok(Log { jsonl, journal, before })
    }

    fn push(&mut self, record: &Record) -> Result<(), Failure> {
        if let Some(journal) = &mut self.journal {
            journal.push(record)?;
        }
        self.show(record)
    }

    fn show(&mut self, record: &Record) -> Result<(), Failure> {
        if let Some(file) = &mut self.jsonl {
            let mut line = serde_json::to_vec(record).map_err(Failure::wrong)?;
            line.push(b'\n');
            file.write_all(&line).map_err(Failure::machine)?;
        }
        Ok(())
    }
}

/// A case under search.
struct Search<'a> {
    device: &'a Device,
    case: &'a Case,
    candidates: &'a [Candidate],
    texts: Vec<String>,
    /// What is left, by position.
    queue: VecDeque<usize>,
    /// Whether the model's floor and the budget end the search.
    pruning: bool,
    begin: Instant,
    budget: Duration,
    limit: Option<Duration>,
    records: Vec<Record>,
    best: f64,
    turns: Vec<usize>,
    log: &'a mut Log,
    bar: &'a ProgressBar,
    failure: Option<Failure>,
}

impl Search<'_> {
    fn floor(&self, at: usize) -> f64 {
        self.candidates[at].prediction.as_ref().map_or(0.0, |p| p.floor * 1e6)
    }

    /// Whether a candidate of the model can still win.
    fn may_win(&self, at: usize) -> bool {
        !self.pruning || self.candidates[at].origin != Origin::Model || self.floor(at) < self.best
    }

    fn record(&self, at: usize, outcome: Outcome) -> Record {
        let c = &self.candidates[at];
        let p = c.prediction.as_ref();
        let mut r = Record {
            einfall: env!("CARGO_PKG_VERSION").to_owned(),
            device: self.device.name.clone(),
            driver: self.device.driver.clone(),
            cascade: self.case.cascade.clone(),
            statics: self.case.statics.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(","),
            sizes: self.case.extents(),
            origin: c.origin.name().to_owned(),
            index: at,
            turn: self.turns[at],
            outcome: "ok".to_owned(),
            reason: None,
            predicted_us: p.map(|p| p.seconds * 1e6),
            floor_us: p.map(|p| p.floor * 1e6),
            binding: p.map(|p| p.binding.clone()),
            terms: p.map(|p| p.terms.iter().map(|(n, t)| (n.clone(), t * 1e6)).collect()).unwrap_or_default(),
            measured_us: None,
            launches: 0,
            build_s: 0.0,
            registers: Vec::new(),
            local_bytes: Vec::new(),
            mapping: self.texts[at].clone(),
        };
        let mut fault = |outcome: &str, reason: String| {
            r.outcome = outcome.to_owned();
            r.reason = Some(reason);
        };
        match outcome {
            Outcome::Timed(t, seconds) => {
                r.measured_us = Some(t.us);
                (r.launches, r.build_s) = (t.launches, seconds);
                (r.registers, r.local_bytes) = (t.registers, t.local_bytes);
            }
            Outcome::Failed(e) => fault("failed", e),
            Outcome::Wrong(e) => fault("wrong", e),
            Outcome::Hung(e) => fault("hung", e),
            Outcome::Skipped => fault("skipped", "it cannot be the fastest by its floor".to_owned()),
        }
        r
    }

    fn keep(&mut self, record: Record) {
        if let Some(us) = record.measured_us {
            self.best = self.best.min(us);
        }
        self.turns[record.index] += 1;
        self.records.push(record);
        self.bar.inc(1);
        if self.best.is_finite() {
            self.bar.set_message(format!("best {:.1} µs", self.best));
        }
    }

    /// Median of what was measured of a candidate.
    fn measured(&self, at: usize) -> Option<f64> {
        let mut list: Vec<f64> = self.records.iter().filter(|r| r.index == at).filter_map(|r| r.measured_us).collect();
        list.sort_by(f64::total_cmp);
        list.get(list.len() / 2).copied()
    }

    /// Candidates that are right, fastest first.
    fn ranking(&self) -> Vec<(f64, usize)> {
        let bad = |i: usize| self.records.iter().any(|r| r.index == i && r.measured_us.is_none());
        let all = (0..self.candidates.len()).filter(|i| !bad(*i));
        let mut list: Vec<(f64, usize)> = all.filter_map(|i| Some((self.measured(i)?, i))).collect();
        list.sort_by(|x, y| x.0.total_cmp(&y.0));
        list
    }
}

impl Jobs for Search<'_> {
    fn next(&mut self) -> Option<(usize, String)> {
        if self.failure.is_some() {
            return None;
        }
        loop {
            let at = *self.queue.front()?;
            let late = self.limit.is_some_and(|l| self.begin.elapsed() > l);
            let spent = self.pruning
                && self.candidates[at].origin == Origin::Model
                && self.begin.elapsed() > self.budget
                && self.best.is_finite();
            self.queue.pop_front();
            if late {
                return None;
            }
            if !spent && self.may_win(at) {
                return Some((at, self.texts[at].clone()));
            }
        }
    }

    fn wanted(&self, job: usize) -> bool {
        self.may_win(job)
    }

    fn done(&mut self, job: usize, outcome: Outcome) {
        if outcome == Outcome::Skipped {
            return;
        }
        let record = self.record(job, outcome);
        if let Err(e) = self.log.push(&record) {
            self.failure = Some(e);
        }
        self.keep(record);
    }
}

/// Tunes one case; a line about it, and its entry in a table.
fn one(
    args: &TuneArgs,
    device: &Device,
    pool: &mut Pool,
    log: &mut Log,
    case: &Case,
    mappings: &[Mapping],
) -> Result<(String, Entry), Failure> {
    let c = case.load().map_err(Failure::Wrong)?;
    let plan = args.device.plan(&c).map_err(Failure::wrong)?;
    let ranks = case::ranks(&plan, &case.sizes).map_err(Failure::Wrong)?;
    let begin = Instant::now();
    let mut candidates = tune::candidates(&plan, &device.sheet, &ranks, args.candidates);
    for m in mappings.iter().filter(|m| is_for(m, &plan)) {
        let prediction = tune::predict(&plan, &device.sheet, &ranks, m);
        candidates.push(Candidate { mapping: m.clone(), origin: Origin::Given, prediction });
    }
    candidates.extend(tune::drawn(&plan, &device.sheet, &ranks, args.seed, args.draws));
    let bar = ProgressBar::new(candidates.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar.set_prefix(case.label());
    let before = std::mem::take(&mut log.before);
    let mut search = Search {
        device,
        case,
        texts: candidates.iter().map(|c| c.mapping.to_string()).collect(),
        queue: VecDeque::new(),
        pruning: true,
        begin,
        budget: args.budget.0,
        limit: args.limit.map(|l| l.0),
        records: Vec::new(),
        best: f64::INFINITY,
        turns: vec![0; candidates.len()],
        candidates: &candidates,
        log,
        bar: &bar,
        failure: None,
    };
    for at in 0..candidates.len() {
        let fresh = search.record(at, Outcome::Skipped);
        let same = |r: &&Record| {
            r.mapping == fresh.mapping
                && (&r.einfall, &r.device, &r.driver) == (&fresh.einfall, &fresh.device, &fresh.driver)
                && (&r.cascade, &r.statics, &r.sizes) == (&fresh.cascade, &fresh.statics, &fresh.sizes)
        };
        let mut known = false;
        for r in before.iter().filter(same) {
            let r = Record { index: at, turn: search.turns[at], ..r.clone() };
            search.log.show(&r)?;
            search.keep(r);
            known = true;
        }
        if !known {
            search.queue.push_back(at);
        }
    }
    pool.run(case, &mut search)?;
    // The fastest again, in turns, and the first with them: what drifts, drifts for all.
    search.pruning = false;
    let finalists: Vec<usize> = search.ranking().iter().map(|r| r.1).take(FINALISTS).collect();
    let first = search.ranking().iter().map(|r| r.1).min();
    for _ in 0..TURNS {
        search.queue.clear();
        search.queue.extend(finalists.iter().copied().chain(first.filter(|f| !finalists.contains(f))));
        pool.run(case, &mut search)?;
    }
    let (ranking, records, failure) = (search.ranking(), search.records, search.failure);
    bar.finish_and_clear();
    log.before = before;
    if let Some(e) = failure {
        return Err(e);
    }
    let Some((best, winner)) = ranking.first().copied() else {
        let why = records.iter().find_map(|r| r.reason.clone()).unwrap_or_else(|| "nothing was measured".to_owned());
        return Err(Failure::Wrong(format!("no mapping of {} works: {why}", candidates.len())));
    };
    let pairs: Vec<(f64, f64)> = ranking
        .iter()
        .filter(|r| candidates[r.1].origin == Origin::Drawn)
        .filter_map(|(us, i)| Some((candidates[*i].prediction.as_ref()?.seconds, *us)))
        .collect();
    let mut line = format!("{}: {best:.2} µs by candidate {winner} of {}", case.label(), ranking.len());
    if let Some((us, _)) = ranking.iter().find(|r| r.1 == 0) {
        line += &format!("; the model's first choice {us:.2} µs ({:+.0}%)", 100.0 * (us / best - 1.0));
    }
    if let Some(rho) = tune::rank_correlation(&pairs) {
        line += &format!("; rank correlation {rho:.2} over {} draws", pairs.len());
    }
    if let Some(drift) = first.and_then(|f| drift(&records, f)) {
        line += &format!("; drift {:+.1}%", 100.0 * drift);
    }
    let faults = records.iter().filter(|r| r.measured_us.is_none()).count();
    if faults > 0 {
        line += &format!("; {faults} do not work");
    }
    let entry = Entry {
        cascade: case.cascade.clone(),
        plan: fingerprint(&plan),
        class: Class::of(&case.sizes).to_string(),
        sizes: case.extents(),
        measured_us: rounded(best),
        predicted_us: candidates[winner].prediction.as_ref().map(|p| rounded(p.seconds * 1e6)),
        candidates: ranking.len() as u32,
        einfall: env!("CARGO_PKG_VERSION").to_owned(),
        driver: device.driver.clone(),
        mapping: candidates[winner].mapping.to_string(),
    };
    Ok((format!("{line}; {:.1} s", begin.elapsed().as_secs_f64()), entry))
}

/// Four digits: more would be noise in every diff.
fn rounded(us: f64) -> f64 {
    format!("{us:.3e}").parse().unwrap_or(us)
}

/// How much slower a candidate was the last time than the first.
fn drift(records: &[Record], at: usize) -> Option<f64> {
    let list: Vec<f64> = records.iter().filter(|r| r.index == at).filter_map(|r| r.measured_us).collect();
    match list.as_slice() {
        [first, .., last] => Some(last / first - 1.0),
        [_] | [] => None,
    }
}
