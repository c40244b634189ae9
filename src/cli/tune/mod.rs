//! `tune`: measure what the model thinks best and keep the winner in a table.
//!
//! For every case: the model's cheapest diverse mappings, mappings from files, and drawn ones are compiled side by side
//! in child processes, compared with the evaluator at small sizes and timed one at a time; the search ends when the
//! budget is spent or no mapping left can be faster by the model's floor. Invariant: whatever a candidate does, it
//! is recorded with its reason and the next one is measured.

mod again;
mod case;
mod cpu;
mod cuda;
mod device;
mod journal;
mod judged;
mod pool;
mod sizes;
mod worker;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use einfall_autotune::table::{Class, Entry, Table, fingerprint};
use einfall_autotune::tune::{self, Candidate, Origin};
use einfall_ir::cascade::Cascade;
use einfall_ir::mapping::Mapping;
use einfall_ir::mapping::parse::parse;
use indicatif::{ProgressBar, ProgressStyle};

use super::Failure;
use super::gpu::plans::is_for;
use super::lower::read_mapping;
use super::source::{Pairs, Source, data_sheet, ein_files, ranks_of, sizes as joined};
use super::tables;
use super::text::write_whole;
pub use case::{Case, ranks};
use device::Device;
pub use device::{DeviceName, Span};
use journal::Journal;
pub use journal::Record;
use judged::Judged;
use pool::{Jobs, Limits, Outcome, Pool};
pub use sizes::read as size_lists;

/// Mappings that are measured again before one wins.
const FINALISTS: usize = 6;
/// How often.
const TURNS: usize = 4;
/// Measurements after which a search may be asked for what it has found.
const FEW: usize = 8;

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
    /// Time for the candidates at one size, draws included; what is left then is left out, the fastest measured again
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
    /// How good the model's choices were, a row a case
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Measure nothing: price what an earlier run wrote by --jsonl anew, with the model of now
    #[arg(long, value_name = "FILE", conflicts_with_all = ["out", "draws", "mapping"])]
    again: Option<PathBuf>,
    /// With --again: the data sheet, by name or from a file, of the device that was measured
    #[arg(long, value_name = "NAME|FILE", requires = "again")]
    sheet: Option<String>,
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
    if let Some(path) = &args.again {
        return price_again(args, path, &cases);
    }
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
    let mut judged: Vec<Judged> = Vec::new();
    for case in &cases {
        match one(args, &device, &mut pool, &mut log, case, &mappings) {
            Ok((row, entry)) => {
                println!("{row}");
                judged.push(row);
                if let Some(path) = &args.csv {
                    write_whole(path, judged::csv(&judged).as_bytes())?;
                }
                if let Some(path) = &args.out {
                    // Another process may have added to it meanwhile.
                    if path.exists() {
                        table = tables::read(path)?;
                    }
                    table.insert(entry);
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
    if judged.len() > 1 {
        println!("{}", judged::summary(&judged));
    }
    if wrong == 0 { Ok(()) } else { Err(Failure::Wrong(format!("{wrong} of {} cases have no mapping", cases.len()))) }
}

/// Judges the model by what was recorded.
fn price_again(args: &TuneArgs, path: &Path, cases: &[Case]) -> Result<(), Failure> {
    let sheet = match &args.sheet {
        Some(name) => data_sheet(name).map_err(Failure::Usage)?,
        None => args.device.open()?.sheet,
    };
    let records = journal::read(path)?;
    let mut log = Log::new(args.jsonl.as_deref(), None)?;
    let mut judged: Vec<Judged> = Vec::new();
    for case in cases {
        if let Some((row, priced)) = again::again(args.device, &sheet, case, &records)? {
            println!("{row}");
            judged.push(row);
            priced.iter().try_for_each(|r| log.show(r))?;
        }
    }
    if judged.is_empty() {
        let what = format!("{}: no record is of these cascades at these sizes", path.display());
        return Err(Failure::Usage(what));
    }
    if let Some(path) = &args.csv {
        write_whole(path, judged::csv(&judged).as_bytes())?;
    }
    println!("{}", judged::summary(&judged));
    Ok(())
}

/// Every cascade of the files at every size of its lines.
pub fn cases(paths: &[PathBuf], lines: &[sizes::Line], statics: &[(String, u64)]) -> Result<Vec<Case>, Failure> {
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
    let modules = texts.iter().map(Source::module).collect::<Result<Vec<_>, _>>()?;
    let all: Vec<&Cascade> = modules.iter().flat_map(|m| &m.cascades).collect();
    let meant = lines.iter().filter(|l| l.cascade.as_ref().is_none_or(|n| all.iter().any(|c| c.name == *n)));
    for (name, _) in meant.flat_map(|l| &l.sizes).flatten() {
        if all.iter().all(|c| c.rank(name).is_none()) {
            let there = ranks_of(all.iter().copied());
            return Err(Failure::Usage(format!("no cascade given has a rank `{name}`; {there}")));
        }
    }
    for (source, module) in texts.iter().zip(&modules) {
        for c in &module.cascades {
            // Lines for this cascade alone come before those for all.
            let own = |l: &&sizes::Line| l.cascade.as_ref() == Some(&c.name);
            let all = |l: &&sizes::Line| l.cascade.is_none();
            let mut chosen: Vec<_> = lines.iter().filter(own).collect();
            if chosen.is_empty() {
                chosen = lines.iter().filter(all).collect();
            }
            for sizes in chosen.iter().flat_map(|l| &l.sizes) {
                let case = Case::new(&source.text, c, statics, sizes)?;
                if !out.contains(&case) {
                    out.push(case);
                }
            }
        }
    }
    match out.is_empty() {
        true => Err(Failure::Usage(
            "that file has no line for these cascades: write `NAME: RANK=N,..`, or a line for all".to_owned(),
        )),
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
    /// What the mapping beside all others takes.
    usual: Option<f64>,
    turns: Vec<usize>,
    /// Seconds until the first [`FEW`] mappings of the model were measured.
    few_s: Option<f64>,
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
            statics: self.case.fixed(),
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
            beside_us: None,
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
                (r.measured_us, r.beside_us) = (Some(t.us), t.beside_us);
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
        let few = self.candidates.iter().take(FEW).enumerate().filter(|(_, c)| c.origin == Origin::Model);
        if self.few_s.is_none() && few.into_iter().all(|(i, _)| self.turns[i] > 0) {
            self.few_s = Some(self.begin.elapsed().as_secs_f64());
        }
        self.bar.inc(1);
        if self.best.is_finite() {
            self.bar.set_message(format!("best {:.1} µs", self.best));
        }
    }

    /// Median of what was measured of a candidate, as if the mapping beside it had always taken the same time.
    fn measured(&self, at: usize) -> Option<f64> {
        median(self.records.iter().filter(|r| r.index == at).filter_map(|r| self.steady(r)))
    }

    /// What was measured, by how fast the machine was then.
    fn steady(&self, r: &Record) -> Option<f64> {
        let speed = self.usual.zip(r.beside_us).map_or(1.0, |(usual, then)| usual / then);
        Some(r.measured_us? * speed)
    }

    /// How much slower a candidate was the last time than the first.
    fn drift(&self, at: usize) -> Option<f64> {
        let list: Vec<f64> = self.records.iter().filter(|r| r.index == at).filter_map(|r| self.steady(r)).collect();
        match list.as_slice() {
            [first, .., last] => Some(last / first - 1.0),
            [_] | [] => None,
        }
    }

    /// Candidates that are right, fastest first.
    fn ranking(&mut self) -> Vec<(f64, usize)> {
        self.usual = median(self.records.iter().filter_map(|r| r.beside_us));
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

/// Tunes one case; how good the model was, and the case's entry in a table.
fn one(
    args: &TuneArgs,
    device: &Device,
    pool: &mut Pool,
    log: &mut Log,
    case: &Case,
    mappings: &[Mapping],
) -> Result<(Judged, Entry), Failure> {
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
    // What an interrupted run measured counts, also where the model, whose rates are measured anew, would not ask again.
    let known: BTreeSet<String> = candidates.iter().map(|c| c.mapping.to_string()).collect();
    let of_case = |r: &&Record| {
        (r.einfall.as_str(), &r.device, &r.driver) == (env!("CARGO_PKG_VERSION"), &device.name, &device.driver)
            && (&r.cascade, &r.sizes, &r.statics) == (&case.cascade, &case.extents(), &case.fixed())
            && !known.contains(&r.mapping)
    };
    let texts: BTreeMap<&str, Origin> = log
        .before
        .iter()
        .filter(of_case)
        .filter_map(|r| Some((r.mapping.as_str(), Origin::named(&r.origin)?)))
        .collect();
    for (text, origin) in texts {
        if let Some(mapping) = parse(text).ok().filter(|m| einfall::fits(m, &plan).is_ok()) {
            let prediction = tune::predict(&plan, &device.sheet, &ranks, &mapping);
            candidates.push(Candidate { mapping, origin, prediction });
        }
    }
    let bar = ProgressBar::new(candidates.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar.set_prefix(case.label());
    let before = std::mem::take(&mut log.before);
    // A processor is shared with other work, often unseen; a card is the tuner's own.
    let beside = candidates.first().filter(|_| args.device == DeviceName::Cpu).map(|c| c.mapping.to_string());
    let case = &Case { beside, ..case.clone() };
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
        usual: None,
        turns: vec![0; candidates.len()],
        few_s: None,
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
            // What stood beside it then may be another mapping.
            let r = Record { index: at, turn: search.turns[at], beside_us: None, ..r.clone() };
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
    (search.pruning, search.limit) = (false, None);
    let ranking = search.ranking();
    let finalists: Vec<usize> = ranking.iter().map(|r| r.1).take(FINALISTS).collect();
    let first = ranking.iter().map(|r| r.1).min();
    let few = ranking.iter().map(|r| r.1).find(|i| *i < FEW && candidates[*i].origin == Origin::Model);
    for _ in 0..TURNS {
        search.queue.clear();
        let more = [first, few].into_iter().flatten().filter(|i| !finalists.contains(i));
        search.queue.extend(finalists.iter().copied().chain(more).collect::<BTreeSet<_>>());
        pool.run(case, &mut search)?;
    }
    let ranking = search.ranking();
    let drift = first.and_then(|f| search.drift(f));
    let (records, failure, turns) = (search.records, search.failure, search.turns);
    let few_s = search.few_s;
    bar.finish_and_clear();
    log.before = before;
    if let Some(e) = failure {
        return Err(e);
    }
    // One that was lucky once is not the fastest.
    let again = ranking.iter().find(|r| turns[r.1] > 1);
    let Some((best, winner)) = again.or(ranking.first()).copied() else {
        let why = records.iter().find_map(|r| r.reason.clone()).unwrap_or_else(|| "nothing was measured".to_owned());
        return Err(Failure::Wrong(format!("no mapping of {} works: {why}", candidates.len())));
    };
    let pairs: Vec<(f64, f64)> = ranking
        .iter()
        .filter(|r| candidates[r.1].origin == Origin::Drawn)
        .filter_map(|(us, i)| Some((candidates[*i].prediction.as_ref()?.seconds, *us)))
        .collect();
    let of = |at: Option<usize>| ranking.iter().find(|r| Some(r.1) == at).map(|r| r.0);
    let judged = Judged {
        cascade: case.cascade.clone(),
        sizes: case.extents(),
        measured: ranking.len(),
        faults: records.iter().filter(|r| r.measured_us.is_none()).count(),
        best_us: best,
        winner,
        first_us: of(Some(0)),
        few_us: of(few),
        few_s,
        draws: pairs.len(),
        correlation: tune::rank_correlation(&pairs),
        drift,
        seconds: begin.elapsed().as_secs_f64(),
    };
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
    Ok((judged, entry))
}

/// Four digits: more would be noise in every diff.
fn rounded(us: f64) -> f64 {
    format!("{us:.3e}").parse().unwrap_or(us)
}

/// The middle of a list; none of an empty one.
fn median(list: impl Iterator<Item = f64>) -> Option<f64> {
    let mut list: Vec<f64> = list.collect();
    list.sort_by(f64::total_cmp);
    list.get(list.len() / 2).copied()
}
