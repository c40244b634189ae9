//! `traffic`: the bytes that mappings move by the analysis, beside what a profiler counts.
//!
//! For every case the model's mapping, its modelled bytes and a copy of the cascade are written into a folder, with a
//! script that runs each once under Nsight Compute; `--join` reads what that wrote and compares. Invariant: both sides
//! are of the same mapping, which is a file in the folder.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use einfall_autotune::model_gpu;
use einfall_codegen::lower::gpu::split_streams;
use einfall_ir::analysis::traffic::{counted_bytes, kernel_traffic};
use einfall_ir::mapping::KernelMapping;
use einfall_ir::target::DataSheet;

use super::Failure;
use super::report::without_splits;
use super::source::{Pairs, sizes as joined, unreadable};
use super::text::write_whole;
use super::tune::{Case, cases, ranks, size_lists};

/// Arguments of `traffic`.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  einfall traffic kernels/matmul.ein --sizes M=4096,N=4096,K=4096 --target h200 --out bytes\n  \
EINFALL=target/release/einfall sh bytes/profile.sh\n  einfall traffic --join bytes"
)]
pub struct TrafficArgs {
    /// .ein files, folders of them, or names of library files
    #[arg(value_name = "FILE|DIR", required_unless_present = "join")]
    paths: Vec<PathBuf>,
    /// Sizes: a list or a file of lists, as `einfall tune` takes them
    #[arg(long, value_name = "LIST|FILE", required_unless_present = "join")]
    sizes: Option<String>,
    /// Extents fixed at compile time
    #[arg(long = "static", value_name = "RANK=N,..")]
    statics: Vec<Pairs<u64>>,
    /// The data sheet of a GPU
    #[arg(long, default_value = "h200")]
    target: String,
    /// Folder for mappings, modelled bytes and the profiler's script
    #[arg(long, value_name = "DIR", required_unless_present = "join")]
    out: Option<PathBuf>,
    /// Compare the bytes in a folder with what the profiler counted there
    #[arg(long, value_name = "DIR", conflicts_with_all = ["paths", "sizes", "out"])]
    join: Option<PathBuf>,
}

/// The file of modelled bytes.
const MODELLED: &str = "modelled.csv";
/// The profiler's counters of bytes read and written.
const COUNTERS: [&str; 2] = ["dram__bytes_read.sum", "dram__bytes_write.sum"];

/// Writes the folder, or compares.
pub fn traffic(args: &TrafficArgs) -> Result<(), Failure> {
    if let Some(folder) = &args.join {
        print!("{}", join(folder)?);
        return Ok(());
    }
    let Some(sheet) = DataSheet::named(&args.target).filter(|s| s.gpu.is_some() && s.webgpu.is_none()) else {
        let gpus = DataSheet::all().into_iter().filter(|s| s.gpu.is_some() && s.webgpu.is_none()).map(|s| s.name);
        let names = gpus.collect::<Vec<_>>().join(", ");
        return Err(Failure::Usage(format!("there is no GPU `{}`; there are {names}", args.target)));
    };
    let lines = size_lists(args.sizes.as_deref().unwrap_or_default())?;
    let cases = cases(&args.paths, &lines, &joined(&args.statics))?;
    let folder = args.out.clone().unwrap_or_default();
    let put = |name: &str, text: &str| {
        let path = folder.join(name);
        write_whole(&path, text.as_bytes())
    };
    std::fs::create_dir_all(&folder).map_err(|e| Failure::Machine(format!("{}: {e}", folder.display())))?;
    let mut csv = String::from("case,cascade,sizes,kernel,read_bytes,written_bytes,tasks\n");
    let mut script = String::from(
        "#!/bin/sh\n# Runs every case once under Nsight Compute. EINFALL names the binary.\ncd \"$(dirname \"$0\")\" || exit 1\n",
    );
    for (i, case) in cases.iter().enumerate() {
        let name = format!("{i:02}");
        let (mapping, rows) = modelled(case, &sheet).map_err(|e| Failure::Wrong(format!("{}: {e}", case.label())))?;
        for row in rows {
            let _ = writeln!(csv, "{name},{},{},{row}", case.cascade, case.extents().replace(',', " "));
        }
        put(&format!("{name}.ein"), &case.text)?;
        put(&format!("{name}.mapping"), &mapping)?;
        let fixed = match case.statics.is_empty() {
            true => String::new(),
            false => {
                let list: Vec<String> = case.statics.iter().map(|(n, v)| format!("{n}={v}")).collect();
                format!(" --static {}", list.join(","))
            }
        };
        let _ = writeln!(
            script,
            "ncu --csv --print-units base --metrics {} --log-file {name}.csv \"${{EINFALL:-einfall}}\" run {name}.ein --cascade {} \
--device cuda --random 1 --size {}{fixed} --mapping {name}.mapping",
            COUNTERS.join(","),
            case.cascade,
            case.extents()
        );
    }
    put(MODELLED, &csv)?;
    put("profile.sh", &script)?;
    print!("{csv}");
    Ok(())
}

/// The model's mapping of a case, and for each launch its kernel, bytes read, bytes written and tasks.
fn modelled(case: &Case, sheet: &DataSheet) -> Result<(String, Vec<String>), String> {
    let plan = einfall::cuda::plan(&case.load()?).map_err(|e| e.to_string())?;
    let extents = ranks(&plan, &case.sizes)?;
    let mapping = model_gpu::choose(&plan, sheet, Some(&extents));
    let multiprocessors = sheet.gpu.as_ref().map_or(1, |g| g.multiprocessors);
    let cut = split_streams::run(&plan, &mapping, multiprocessors).map_err(|d| d.message)?;
    let (empty, text) = (KernelMapping::default(), mapping.to_string());
    let mapping = without_splits(&mapping);
    let row = |k: &einfall_ir::tile::Kernel| {
        let own = mapping.kernels.iter().find(|m| m.kernel == k.name).unwrap_or(&empty);
        let t = kernel_traffic(&cut, k, own, &extents, sheet).ok_or("an extent is unknown")?;
        let (read, written) =
            counted_bytes(&cut, k, own, &extents, sheet).ok_or("the sheet has no cache of the device")?;
        Ok(format!("{},{read:.0},{written:.0},{:.0}", k.name, t.tasks))
    };
    let rows = cut.kernels.iter().map(row).collect::<Result<Vec<_>, &str>>()?;
    Ok((text, rows))
}

/// Modelled bytes beside counted ones, a line a case.
fn join(folder: &Path) -> Result<String, Failure> {
    let path = folder.join(MODELLED);
    let text = std::fs::read_to_string(&path).map_err(|e| unreadable(&path, &e))?;
    let mut all: Vec<(String, String, [f64; 2])> = Vec::new();
    for line in text.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        let &[case, cascade, sizes, _, read, written, _] = cells.as_slice() else {
            return Err(Failure::Wrong(format!("{}: `{line}` is no line of `einfall traffic`", path.display())));
        };
        let bytes = [read, written].map(|b| b.parse().unwrap_or(f64::NAN));
        match all.last_mut().filter(|a| a.0 == case) {
            Some(a) => (0..2).for_each(|i| a.2[i] += bytes[i]),
            None => all.push((case.to_owned(), format!("{cascade} {sizes}"), bytes)),
        }
    }
    let mut out = String::from(
        "| case | read, modelled | counted | written, modelled | counted | together |\n|---|---|---|---|---|---|\n",
    );
    let mut off = Vec::new();
    for (case, name, modelled) in all {
        let path = folder.join(format!("{case}.csv"));
        let Ok(text) = std::fs::read_to_string(&path) else {
            let _ = writeln!(
                out,
                "| {name} | {:.1} MB | not counted | {:.1} MB | not counted | – |",
                modelled[0] / 1e6,
                modelled[1] / 1e6
            );
            continue;
        };
        let counted = COUNTERS.map(|c| counted(&text, c));
        let ratio = (modelled[0] + modelled[1]) / (counted[0] + counted[1]);
        off.push((ratio - 1.0).abs());
        let _ = writeln!(
            out,
            "| {name} | {:.1} MB | {:.1} MB | {:.1} MB | {:.1} MB | {ratio:.3} |",
            modelled[0] / 1e6,
            counted[0] / 1e6,
            modelled[1] / 1e6,
            counted[1] / 1e6
        );
    }
    off.sort_by(f64::total_cmp);
    if let (Some(middle), Some(worst)) = (off.get(off.len() / 2), off.last()) {
        let _ = writeln!(
            out,
            "\n{} cases: {:.1} % off at the median, {:.1} % at worst.",
            off.len(),
            100.0 * middle,
            100.0 * worst
        );
    }
    Ok(out)
}

/// The sum of a counter over all launches in the profiler's table.
fn counted(text: &str, counter: &str) -> f64 {
    let rows: Vec<Vec<String>> = text.lines().filter(|l| l.starts_with('"')).map(cells).collect();
    let Some(head) = rows.first() else { return 0.0 };
    let column = |name: &str| head.iter().position(|c| c == name);
    let (Some(name), Some(value)) = (column("Metric Name"), column("Metric Value")) else { return 0.0 };
    let own = rows.iter().skip(1).filter(|r| r.get(name).is_some_and(|n| n == counter));
    own.filter_map(|r| r.get(value)?.replace(',', "").parse::<f64>().ok()).sum()
}

/// The cells of a line of quoted values.
fn cells(line: &str) -> Vec<String> {
    let inner = line.trim().trim_start_matches('"').trim_end_matches('"');
    inner.split("\",\"").map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_summed_over_launches() {
        let text = "==PROF== Connected\n\"ID\",\"Kernel Name\",\"Metric Name\",\"Metric Unit\",\"Metric Value\"\n\
\"0\",\"k(a, b)\",\"dram__bytes_read.sum\",\"byte\",\"1,000\"\n\"0\",\"k\",\"dram__bytes_write.sum\",\"byte\",\"5\"\n\
\"1\",\"m\",\"dram__bytes_read.sum\",\"byte\",\"24\"\n";
        assert_eq!(counted(text, COUNTERS[0]), 1024.0);
        assert_eq!(counted(text, COUNTERS[1]), 5.0);
        assert_eq!(counted("no table", COUNTERS[0]), 0.0);
    }

    #[test]
    fn a_folder_joins_case_by_case() {
        let folder = tempfile::tempdir().unwrap();
        let modelled = "case,cascade,sizes,kernel,read_bytes,written_bytes,tasks\n00,a,M=1 N=2,k,1000000,0,1\n\
00,a,M=1 N=2,k_merge,1000000,1000000,1\n01,b,M=1,k,1,1,1\n";
        std::fs::write(folder.path().join(MODELLED), modelled).unwrap();
        let counts = "\"Metric Name\",\"Metric Value\"\n\"dram__bytes_read.sum\",\"2,500,000\"\n\"dram__bytes_write.sum\",\"500,000\"\n";
        std::fs::write(folder.path().join("00.csv"), counts).unwrap();
        let Ok(text) = join(folder.path()) else { panic!("it joins") };
        assert!(text.contains("| a M=1 N=2 | 2.0 MB | 2.5 MB | 1.0 MB | 0.5 MB | 1.000 |"), "{text}");
        assert!(text.contains("not counted") && text.contains("1 cases: 0.0 % off"), "{text}");
    }
}
