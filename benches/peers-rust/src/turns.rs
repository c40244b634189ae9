//! Ways to compute a case, timed in turns, and what is printed of them.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::{Args, Failure};

/// One library's way to compute a case.
pub trait Way {
    /// The library.
    fn peer(&self) -> &'static str;
    /// What tells several ways of ours apart.
    fn mapping(&self) -> &'static str {
        ""
    }
    /// Computes the case once.
    fn run(&mut self) -> Result<(), Failure>;
    /// What the last run gave, row-major.
    fn result(&self) -> Result<Vec<f32>, Failure>;
}

/// What is computed, ours first.
pub struct Case {
    /// As `einfall bench` names them, where it has the case.
    pub family: &'static str,
    /// As `einfall bench` names it, where it has the case.
    pub name: String,
    /// Floating-point operations, where all ways do as many.
    pub flops: Option<f64>,
    /// What the comparison of results found.
    pub compared: String,
    /// Each was run once and compared.
    pub ways: Vec<Box<dyn Way>>,
}

/// One block of one way, as `einfall report` reads it.
#[derive(serde::Serialize)]
struct Row<'a> {
    family: &'a str,
    case: &'a str,
    peer: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    mapping: &'a str,
    block: usize,
    ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    tflops: Option<f64>,
    threads: usize,
    version: &'a str,
    device: &'a str,
}

/// Takes turns, case after case.
pub struct Turns<'a> {
    args: &'a Args,
    device: &'a str,
    threads: usize,
    out: Option<File>,
}

impl<'a> Turns<'a> {
    /// Lines go to the file that the arguments name.
    pub fn new(args: &'a Args, device: &'a str, threads: usize) -> Result<Turns<'a>, Failure> {
        let create = |path: &Path| File::create(path).map_err(|e| format!("{}: {e}", path.display()));
        let out = args.out.as_deref().map(create).transpose()?;
        Ok(Turns { args, device, threads, out })
    }

    /// Whether a case is asked for.
    pub fn wants(&self, family: &str, name: &str) -> bool {
        self.args.case.as_deref().is_none_or(|c| family.contains(c) || name.contains(c))
    }

    /// Times the blocks of a case and prints a line of it.
    pub fn take(&mut self, mut case: Case) -> Result<(), Failure> {
        let rounds = self.args.rounds.get();
        let mut times = vec![Vec::with_capacity(rounds); case.ways.len()];
        for block in 0..rounds {
            for (way, times) in case.ways.iter_mut().zip(&mut times) {
                // Threads that the last library leaves spinning have gone to sleep.
                std::thread::sleep(Duration::from_millis(20));
                let ms = median_ms(way.as_mut(), Duration::from_millis(self.args.budget_ms))?;
                times.push(ms);
                if let Some(out) = &mut self.out {
                    let row = Row {
                        family: case.family,
                        case: &case.name,
                        peer: &label(way.peer()),
                        mapping: way.mapping(),
                        block,
                        ms,
                        tflops: case.flops.map(|n| n / ms / 1e9),
                        threads: self.threads,
                        version: version(way.peer()),
                        device: self.device,
                    };
                    writeln!(out, "{}", serde_json::to_string(&row)?)?;
                }
            }
        }
        println!("{} {}: {}", case.family, case.name, case.compared);
        let ours: Vec<(&str, &Vec<f64>)> =
            case.ways.iter().zip(&times).filter(|(w, _)| w.peer() == OURS).map(|(w, t)| (w.mapping(), t)).collect();
        for (way, list) in case.ways.iter().zip(&times) {
            let ms = median(list);
            let rate = case.flops.map(|n| format!(" {:7.1} GFLOP/s", n / ms / 1e6)).unwrap_or_default();
            let mut text = format!("  {:14} {:8} {ms:9.3} ms{rate}", label(way.peer()), version(way.peer()));
            if way.peer() == OURS {
                text += &format!("   {}", way.mapping());
            } else {
                for (mapping, ours) in &ours {
                    let ratios: Vec<f64> = list.iter().zip(ours.iter()).map(|(theirs, ours)| theirs / ours).collect();
                    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
                    let most = ratios.iter().copied().fold(0.0, f64::max);
                    text += &format!("   {:5.2} [{least:.2}, {most:.2}] {mapping}", median(&ratios));
                }
            }
            println!("{}", text.trim_end());
        }
        Ok(())
    }
}

/// Our own name.
pub const OURS: &str = "einfall";

/// A library's name, with what its build was given.
fn label(peer: &str) -> String {
    let more = if cfg!(feature = "avx512") && ["candle", "gemm"].contains(&peer) { "_avx512" } else { "" };
    format!("{peer}{more}")
}

/// The version that the lock file gives a library.
pub fn version(peer: &str) -> &'static str {
    let package = if peer == "candle" { "candle-core" } else { peer };
    let entry = include_str!("../Cargo.lock").split("[[package]]").find_map(|entry| {
        let field = |name| entry.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(" = \"")?.strip_suffix('"'));
        (field("name") == Some(package)).then(|| field("version"))
    });
    entry.flatten().unwrap_or("unknown")
}

/// The median of the runs of a block in milliseconds; the first warms up.
fn median_ms(way: &mut dyn Way, budget: Duration) -> Result<f64, Failure> {
    let mut samples = Vec::new();
    let begin = Instant::now();
    way.run()?;
    while samples.len() < 3 || begin.elapsed() < budget {
        let start = Instant::now();
        way.run()?;
        samples.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(&samples))
}

/// Of an even number the mean of the two in the middle.
pub fn median(list: &[f64]) -> f64 {
    let mut sorted = list.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0
}
