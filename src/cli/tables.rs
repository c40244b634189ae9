//! `tables`: show, merge, check and prune tables of measured mappings.

use std::io::Write;
use std::path::{Path, PathBuf};

use einfall::TableSource;
use einfall_autotune::table::{Kind, Table, fingerprint};
use einfall_ir::tile::Plan;

use super::Failure;
use super::source::{Source, ein_files};

/// Subcommands of `tables`.
#[derive(clap::Subcommand)]
pub enum TablesCommand {
    /// Print what is in tables, a line an entry
    Show {
        /// The tables
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Print the mappings too
        #[arg(long)]
        mappings: bool,
    },
    /// Join tables of one device; of two entries for the same sizes the faster stays
    Merge {
        /// The tables
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Where to write the result
        #[arg(short, long)]
        out: PathBuf,
    },
    /// Check that tables read, and that their mappings fit the plans of today's compiler
    Verify {
        /// The tables
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// .ein files or folders of the cascades; the library besides
        #[arg(long = "cascades", value_name = "FILE|DIR")]
        cascades: Vec<PathBuf>,
    },
    /// Remove entries whose plan the compiler no longer makes or whose mapping no longer fits, in place
    Prune {
        /// The tables
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// .ein files or folders of the cascades; the library besides
        #[arg(long = "cascades", value_name = "FILE|DIR")]
        cascades: Vec<PathBuf>,
    },
}

/// Reads a table.
pub fn read(path: &Path) -> Result<Table, Failure> {
    if !path.is_file() {
        return Err(Failure::Machine(format!(
            "{}: there is no such file; `einfall tune --out FILE` writes tables",
            path.display()
        )));
    }
    TableSource::File(path.to_owned()).read().map_err(Failure::wrong)
}

/// Writes a table whole: into a file beside it, which takes its name.
pub fn write(path: &Path, table: &Table) -> Result<(), Failure> {
    let fail = |e: &dyn std::fmt::Display| Failure::Machine(format!("{}: {e}", path.display()));
    table.check().map_err(|e| Failure::Wrong(format!("{}: {e}", path.display())))?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|e| fail(&e))?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(|e| fail(&e))?;
    file.write_all(table.to_string().as_bytes()).map_err(|e| fail(&e))?;
    file.as_file().sync_all().map_err(|e| fail(&e))?;
    #[cfg(unix)]
    {
        // As files that people keep are; temporary ones are private.
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(path).map_or(0o644, |m| m.permissions().mode());
        file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).map_err(|e| fail(&e))?;
    }
    file.persist(path).map_err(|e| fail(&e))?;
    Ok(())
}

/// Runs a subcommand.
pub fn tables(command: &TablesCommand) -> Result<(), Failure> {
    match command {
        TablesCommand::Show { files, mappings } => {
            for file in files {
                show(&read(file)?, *mappings);
            }
            Ok(())
        }
        TablesCommand::Merge { files, out } => {
            let mut tables = files.iter().map(|f| read(f)).collect::<Result<Vec<_>, _>>()?.into_iter();
            let Some(mut all) = tables.next() else { return Ok(()) };
            for table in tables {
                all.merge(table).map_err(Failure::wrong)?;
            }
            write(out, &all)?;
            println!("{}: {} entries", out.display(), all.entries.len());
            Ok(())
        }
        TablesCommand::Verify { files, cascades } => {
            let plans = plans(cascades)?;
            let mut stale = 0;
            for file in files {
                let table = read(file)?;
                for (i, why) in faults(&table, &plans) {
                    println!("{}: entry {} ({}): {why}", file.display(), i + 1, table.entries[i].cascade);
                    stale += 1;
                }
                println!("{}: {} entries for {}", file.display(), table.entries.len(), table.device);
            }
            if stale == 0 { Ok(()) } else { Err(Failure::Wrong(format!("{stale} entries are not used any more"))) }
        }
        TablesCommand::Prune { files, cascades } => {
            let plans = plans(cascades)?;
            for file in files {
                let mut table = read(file)?;
                let bad: Vec<usize> = faults(&table, &plans).into_iter().map(|f| f.0).collect();
                let mut at = 0;
                table.entries.retain(|_| {
                    at += 1;
                    !bad.contains(&(at - 1))
                });
                if !bad.is_empty() {
                    write(file, &table)?;
                }
                println!("{}: {} entries removed, {} left", file.display(), bad.len(), table.entries.len());
            }
            Ok(())
        }
    }
}

fn show(table: &Table, mappings: bool) {
    println!("{}: {} entries", table.device, table.entries.len());
    for e in &table.entries {
        let predicted = e.predicted_us.map(|p| format!("predicted {p:.1}, ")).unwrap_or_default();
        println!(
            "  {:24} {:40} {:>10.1} µs ({predicted}best of {}; einfall {}, {})",
            e.cascade, e.sizes, e.measured_us, e.candidates, e.einfall, e.driver
        );
        if mappings {
            print!("{}", e.mapping);
        }
    }
}

/// Plans of the library and of files, for either kind of device, with their fingerprints.
pub fn plans(paths: &[PathBuf]) -> Result<Vec<(Kind, String, Plan)>, Failure> {
    let mut sources: Vec<Source> = einfall_kernels::SOURCES
        .iter()
        .map(|(name, text)| Source { name: (*name).to_owned(), text: (*text).to_owned() })
        .collect();
    if !paths.is_empty() {
        for file in ein_files(paths)? {
            sources.push(Source::read(&file)?);
        }
    }
    let mut out = Vec::new();
    for source in &sources {
        for c in source.module()?.cascades {
            // What has no lowering has no entries.
            out.extend(einfall::plan(&c).ok().map(|p| (Kind::Cpu, fingerprint(&p), p)));
            out.extend(einfall::cuda::plan(&c).ok().map(|p| (Kind::Cuda, fingerprint(&p), p)));
        }
    }
    Ok(out)
}

/// Entries that no compilation uses, with why.
fn faults(table: &Table, plans: &[(Kind, String, Plan)]) -> Vec<(usize, String)> {
    let mut out = Vec::new();
    for (i, e) in table.entries.iter().enumerate() {
        let Some((_, _, plan)) = plans.iter().find(|(kind, print, _)| (*kind, print) == (table.kind, &e.plan)) else {
            out.push((i, format!("no cascade given has the plan {}", e.plan)));
            continue;
        };
        match e.read().and_then(|m| einfall::fits(&m, plan)) {
            Ok(()) => {}
            Err(why) => out.push((i, why)),
        }
    }
    out
}
