//! `devices`, `cache` and `selftest`: this machine.

use std::path::PathBuf;

use einfall::{Engine, Options};
use einfall_ir::array::Array;
use einfall_ir::cascade::bind::{Bindings, Given, bind, check_facts};
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::target::DataSheet;
use einfall_ir::tolerance::inputs::{Variant, random};
use einfall_runtime::cache::Cache;
use einfall_runtime::cuda::{Gpu, gpus};
use einfall_runtime::{Cpu, HostArray};

use super::{Failure, compare};

fn options() -> Result<Options, Failure> {
    Options::from_env().map_err(Failure::usage)
}

/// Arguments of `devices`.
#[derive(clap::Args)]
pub struct DevicesArgs {
    /// Print the built-in data sheets instead
    #[arg(long)]
    sheets: bool,
    /// Measure a device (cpu, cuda, cuda:N) and print its data sheet
    #[arg(long, value_name = "DEVICE", conflicts_with = "sheets")]
    probe: Option<super::tune::DeviceName>,
}

/// The data sheet of a device as a file of `ir/data` is: a processor's caches by the system and its rates measured, a
/// GPU's limits by its driver.
fn probe(device: super::tune::DeviceName) -> Result<(), Failure> {
    use super::tune::DeviceName;
    let (mut sheet, from) = match device {
        DeviceName::Cpu => {
            let engine = Engine::new(&options()?).map_err(Failure::machine)?;
            let from = "Capacities by the operating system; the multiply-add rate and bandwidths measured on all threads, no level slower than its feeder.";
            let mut sheet = engine.runtime().measure().map_err(Failure::machine)?;
            sheet.name = Cpu::detect().name;
            (sheet, from)
        }
        DeviceName::Cuda(index) => {
            let list = gpus().map_err(Failure::machine)?;
            let count = list.len();
            let Some(gpu) = list.into_iter().nth(index) else {
                return Err(Failure::Machine(format!("there is no CUDA device {index}; there are {count}")));
            };
            let mut sheet = einfall::cuda::data_sheet(&gpu);
            sheet.name.clone_from(&gpu.name);
            if let Some(dram) = sheet.levels.first_mut().filter(|_| gpu.bandwidth() > 0.0) {
                dram.bandwidth = gpu.bandwidth();
            }
            let from =
                "Capacities, multiprocessors and memory clock by the driver; rates as the nearest built-in sheet.";
            (sheet, from)
        }
    };
    // A level that others disturbed while it was measured is no slower than the one that feeds it: it is put 1 % above.
    for i in 1..sheet.levels.len() {
        let slower = sheet.levels[i - 1].bandwidth * sheet.levels[i - 1].instances as f64;
        let level = &mut sheet.levels[i];
        let least = slower * 1.01 / level.instances as f64;
        level.bandwidth = level.bandwidth.max(least);
    }
    let text = toml::to_string(&sheet).map_err(Failure::wrong)?;
    println!("# {}, by `einfall devices --probe`.\n# {from}\n{text}", sheet.name);
    Ok(())
}

/// A data sheet for the reader: one line a level, one for a GPU's limits.
fn sheet_text(s: &DataSheet) -> String {
    let mut text = format!("{}\n", s.name);
    for l in &s.levels {
        let rate = l.bandwidth * l.instances as f64 / 1e9;
        text += &format!("  {:10} {:>15} bytes x {:<4} {rate:>9.0} GB/s\n", l.name, l.bytes, l.instances);
    }
    let peaks: Vec<String> = s.peak.iter().map(|(n, r)| format!("{n} {}", (r / 1e9).round() / 1e3)).collect();
    text += &format!("  Tflop/s    {}\n", peaks.join(", "));
    if let Some(g) = &s.gpu {
        text += &format!(
            "  GPU        {} multiprocessors at {:.2} GHz, {} registers, {} threads, {} bytes of shared memory a task, \
             clusters of {}, {}, {}\n",
            g.multiprocessors,
            g.clock / 1e9,
            g.registers,
            g.threads_per_multiprocessor,
            g.shared_per_task,
            g.max_cluster,
            g.atoms.join(" "),
            g.copy_engines.join(" ")
        );
    }
    text
}

/// Lists devices and what they compile with. A machine without LLVM or without a CUDA driver is described all the same.
pub fn devices(args: &DevicesArgs) -> Result<(), Failure> {
    if args.sheets {
        for sheet in DataSheet::all() {
            print!("{}", sheet_text(&sheet));
        }
        return Ok(());
    }
    if let Some(device) = args.probe {
        return probe(device);
    }
    let cpu = Cpu::detect();
    let isa: Vec<&str> = cpu.isa.iter().map(|i| i.name()).collect();
    println!("cpu");
    println!("  {} ({}), {} threads, vectors of {} bits", cpu.name, cpu.arch, cpu.threads, cpu.vector_bits());
    println!("  extensions: {}", isa.join(" "));
    for level in &cpu.data_sheet().levels {
        println!("  {:10} {:>14} bytes x {}", level.name, level.bytes, level.instances);
    }
    match Engine::new(&options()?) {
        Ok(engine) => {
            let (major, minor, patch) = engine.runtime().llvm().version();
            println!("  LLVM {major}.{minor}.{patch}: {}", engine.runtime().llvm().path().display());
        }
        Err(e) => println!("  no kernels are compiled for it: {e}"),
    }
    #[cfg(feature = "wgpu")]
    super::wgpu::devices();
    let gpus = match gpus() {
        Ok(gpus) => gpus,
        Err(e) => {
            println!("cuda\n  {e}");
            return Ok(());
        }
    };
    for gpu in &gpus {
        println!("cuda:{}", gpu.index);
        let (major, minor) = gpu.capability;
        println!("  {}, sm_{major}{minor}, {} multiprocessors, driver for CUDA {}", gpu.name, gpu.sms, version(gpu));
        println!("  memory {} bytes at {:.2} TB/s by its clock", gpu.memory_bytes, gpu.bandwidth() / 1e12);
        println!("  L2 {} bytes, shared memory {} bytes a task", gpu.l2_bytes, gpu.shared_bytes);
        print!("  clocks up to {} and {} MHz", gpu.clock_khz / 1000, gpu.memory_clock_khz / 1000);
        match gpu.clocks() {
            Some(now) => println!("; {} and {} MHz now", now.sm_mhz, now.memory_mhz),
            None => println!(),
        }
    }
    if gpus.is_empty() {
        println!("cuda\n  the driver knows no device");
    }
    Ok(())
}

/// The CUDA version of a device's driver: `13.0`.
fn version(gpu: &Gpu) -> String {
    format!("{}.{}", gpu.driver / 1000, gpu.driver % 1000 / 10)
}

/// Subcommands of `cache`.
#[derive(clap::Subcommand)]
pub enum CacheCommand {
    /// Print the cache's folder and how much is in it
    Path,
    /// Remove every entry
    Clear,
}

/// Shows or clears the object cache.
pub fn cache(command: &CacheCommand) -> Result<(), Failure> {
    let Some(folder) = options()?.cache else {
        return Err(Failure::Machine("no cache: EINFALL_CACHE is off, or there is no home folder".to_owned()));
    };
    let cache = Cache::open(&folder).map_err(Failure::machine)?;
    match command {
        CacheCommand::Path => {
            let usage = cache.usage().map_err(Failure::machine)?;
            println!("{}\n{} entries, {} bytes", cache.path().display(), usage.entries, usage.bytes);
        }
        CacheCommand::Clear => {
            let removed = cache.clear().map_err(Failure::machine)?;
            println!("removed {} entries, {} bytes", removed.entries, removed.bytes);
        }
    }
    Ok(())
}

/// Arguments of `selftest`.
#[derive(clap::Args)]
pub struct SelftestArgs {
    /// The device
    #[arg(long, default_value = "cpu")]
    device: super::run::DeviceArg,
    /// Only cascades whose file's name contains this
    #[arg(long)]
    pub filter: Option<String>,
    /// Seed of sizes and inputs
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Sizes drawn per cascade
    #[arg(long, default_value_t = 4)]
    pub sizes: u64,
    /// Folder of reference plans (.tile), for a GPU
    #[arg(long, default_value = "tests/plans")]
    pub plans: PathBuf,
    /// Folder of mappings for them and for library cascades, for a GPU
    #[arg(long, default_value = "tests/mappings")]
    pub mappings: PathBuf,
    /// Do the work itself, from this item on
    #[arg(long, hide = true)]
    pub worker: Option<usize>,
    /// Do every so many items, as a worker
    #[arg(long, hide = true, default_value_t = 1)]
    pub step: usize,
    /// Processes that test at the same time, for a GPU; all share the device
    #[arg(long, default_value_t = 4)]
    pub jobs: usize,
    /// Seconds without a word after which a process counts as hung, for a GPU; more under a checking tool
    #[arg(long, default_value_t = 45)]
    pub silence: u64,
    /// Also arrays of more than 2³¹ elements, for a GPU: 20 GB of its memory
    #[arg(long)]
    pub large: bool,
}

/// The differential suite: every library cascade at drawn sizes against the float64 evaluator.
pub fn selftest(args: &SelftestArgs) -> Result<(), Failure> {
    if args.device == super::run::DeviceArg::Reference {
        return Err(Failure::Usage("the reference device is what the others are tested against".to_owned()));
    }
    if let super::run::DeviceArg::Cuda(n) = args.device {
        return super::gpu::selftest::selftest(args, n);
    }
    #[cfg(feature = "wgpu")]
    if let super::run::DeviceArg::Wgpu(name) = &args.device {
        return super::wgpu::selftest(args, name.as_deref());
    }
    let engine = Engine::new(&options()?).map_err(Failure::machine)?;
    let compile = |c: &Cascade| engine.compile(c);
    suite(args, compile, |c, kernel, sizes, inputs| kernel.bind(sizes)?.run_values(c, inputs))
}

/// What a launch returns: the outputs by name.
type Outputs = Vec<(String, HostArray)>;

/// Every library cascade at drawn sizes against the float64 evaluator: `compile` makes a kernel of it, `run` launches that
/// on inputs, one for each parameter in order. What is refused with a diagnostic is skipped.
pub fn suite<K>(
    args: &SelftestArgs,
    compile: impl Fn(&Cascade) -> Result<K, einfall::Error>,
    run: impl Fn(&Cascade, &K, &[(&str, u64)], &[Array]) -> Result<Outputs, einfall::Error>,
) -> Result<(), Failure> {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let mut state = args.seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    for (file, text) in einfall_kernels::SOURCES {
        if args.filter.as_ref().is_some_and(|f| !file.contains(f.as_str())) {
            continue;
        }
        let module = parse(text).map_err(|d| Failure::Wrong(format!("{file}: {d:?}")))?;
        for c in &module.cascades {
            let kernel = match compile(c) {
                Ok(kernel) => kernel,
                Err(einfall::Error::Refused { diagnostics, .. }) => {
                    let why = diagnostics.first().map(|d| d.message.clone()).unwrap_or_default();
                    println!("skip {file}/{}: {why}", c.name);
                    skipped += 1;
                    continue;
                }
                Err(e) => {
                    println!("FAIL {file}/{}: {e}", c.name);
                    failed += 1;
                    continue;
                }
            };
            for _ in 0..args.sizes {
                let Some(b) = draw(c, &mut state) else {
                    println!("FAIL {file}/{}: no sizes satisfy its facts", c.name);
                    failed += 1;
                    break;
                };
                let launch = |sizes: &[(&str, u64)], inputs: &[Array]| run(c, &kernel, sizes, inputs);
                match one(c, &b, next(&mut state), launch) {
                    Ok(()) => passed += 1,
                    Err(e) => {
                        println!("FAIL {file}/{} at {:?}: {e}", c.name, b.extents);
                        failed += 1;
                    }
                }
            }
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 { Ok(()) } else { Err(Failure::Wrong(format!("{failed} comparisons failed"))) }
}

fn one(
    c: &Cascade,
    b: &Bindings,
    seed: u64,
    launch: impl Fn(&[(&str, u64)], &[Array]) -> Result<Outputs, einfall::Error>,
) -> Result<(), String> {
    let inputs = random(c, b, seed, Variant::Small).map_err(|e| e.to_string())?;
    let sizes: Vec<(&str, u64)> = c.ranks.iter().zip(&b.extents).map(|((_, r), n)| (r.name.as_str(), *n)).collect();
    let outputs = launch(&sizes, &inputs).map_err(|e| e.to_string())?;
    match compare::outputs(c, b, &inputs, &outputs, seed) {
        Ok(_) => Ok(()),
        Err(Failure::Wrong(m) | Failure::Usage(m) | Failure::Machine(m)) => Err(m),
    }
}

pub fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33
}

/// Extents under which the cascade's facts hold: small, prime, and around register tiles.
pub fn draw(c: &Cascade, state: &mut u64) -> Option<Bindings> {
    const EXTENTS: [u64; 14] = [1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 33, 48, 65];
    (0..500).find_map(|_| {
        let sizes = c
            .ranks
            .iter()
            .filter(|(_, r)| r.fixed.is_none())
            .map(|(_, r)| (r.name.clone(), EXTENTS[next(state) as usize % EXTENTS.len()]))
            .collect();
        let b = bind(c, &Given { sizes, ..Given::default() }).ok()?;
        let points: u64 = b.extents.iter().fold(1u64, |n, e| n.saturating_mul(*e));
        (check_facts(c, &b, &[]).is_ok() && points < 2_000_000).then_some(b)
    })
}
