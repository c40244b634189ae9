//! What tables of mappings and files of a tuner's measurements say, beside what the model predicts and the analyses count.
//!
//! Invariant: operations and bytes are those of the entry's own mapping at its sizes; an entry whose plan the compiler does
//! not make any more is counted and left out.

use std::path::Path;

use einfall_autotune::table::{Entry, Kind, fingerprint};
use einfall_autotune::tune;
use einfall_codegen::lower::gpu::split_streams;
use einfall_ir::analysis::traffic::plan_traffic;
use einfall_ir::dtype::DType;
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;

use super::super::Failure;
use super::super::tables::{plans, read};
use super::super::tune::{Record, ranks};
use super::objects;

/// A measured mapping.
pub struct Point {
    /// The cascade and its sizes.
    pub name: String,
    /// Microseconds measured, and by today's model.
    pub measured_us: f64,
    /// See `measured_us`; none where the model has no price.
    pub predicted_us: Option<f64>,
    /// Operations: two per multiply-add of contractions, or scalar ones where nothing contracts.
    pub operations: f64,
    /// The type of the contractions' operands.
    pub dtype: Option<DType>,
    /// Bytes from and to device memory, by the analysis.
    pub bytes: f64,
}

/// The entries of a table.
pub struct Measured {
    /// The device by its own name.
    pub device: String,
    /// Its data sheet, or the one of its kind.
    pub sheet: DataSheet,
    /// One per entry.
    pub points: Vec<Point>,
    /// Entries for plans that the compiler does not make any more.
    pub stale: usize,
}

/// Measurements of one tuned case.
pub struct Tuned {
    /// The device by its own name.
    pub device: String,
    /// The cascade and its sizes.
    pub name: String,
    /// Origin, microseconds predicted, microseconds measured.
    pub pairs: Vec<(String, f64, f64)>,
}

/// The data sheet for a device of a table.
fn sheet(kind: Kind, device: &str) -> Option<DataSheet> {
    let name = device.to_lowercase();
    let gpu = |s: &DataSheet| s.gpu.is_some() && s.webgpu.is_none() && name.contains(&s.name);
    match kind {
        Kind::Cuda => DataSheet::all().into_iter().find(gpu).or_else(|| DataSheet::named("h100")),
        Kind::Cpu => {
            let cpu = einfall_runtime::Cpu::detect();
            if cpu.name == device { Some(cpu.data_sheet()) } else { DataSheet::named("x86-64-v4") }
        }
    }
}

/// Reads a table.
pub fn of_table(path: &Path) -> Result<Measured, Failure> {
    let table = read(path)?;
    let Some(sheet) = sheet(table.kind, &table.device) else {
        return Err(Failure::Wrong(format!("{}: no data sheet for {}", path.display(), table.device)));
    };
    let plans = plans(&[])?;
    let (mut points, mut stale) = (Vec::new(), 0);
    for e in &table.entries {
        let known = plans.iter().find(|(kind, print, _)| (*kind, print) == (table.kind, &e.plan));
        match known.and_then(|(_, _, plan)| point(e, plan, &sheet)) {
            Some(p) => points.push(p),
            None => stale += 1,
        }
    }
    Ok(Measured { device: table.device, sheet, points, stale })
}

fn point(e: &Entry, plan: &Plan, sheet: &DataSheet) -> Option<Point> {
    debug_assert_eq!(fingerprint(plan), e.plan);
    let pair = |part: &str| part.split_once('=').and_then(|(n, v)| Some((n.to_owned(), v.parse::<u64>().ok()?)));
    let sizes: Vec<(String, u64)> = e.sizes.split(',').filter_map(pair).collect();
    let extents = ranks(plan, &sizes).ok()?;
    let mapping = e.read().ok()?;
    let multiprocessors = sheet.gpu.as_ref().map_or(1, |g| g.multiprocessors);
    let cut = split_streams::run(plan, &mapping, multiprocessors).ok()?;
    let traffic = plan_traffic(&cut, &without_splits(&mapping), &extents, sheet)?;
    let contracted: f64 = traffic.contractions.iter().map(|c| c.1).sum();
    let most = traffic.contractions.iter().max_by(|a, b| a.1.total_cmp(&b.1));
    Some(Point {
        name: format!("{} {}", e.cascade, e.sizes),
        measured_us: e.measured_us,
        predicted_us: tune::predict(plan, sheet, &extents, &mapping).map(|p| p.seconds * 1e6),
        operations: if contracted > 0.0 { contracted } else { traffic.scalar_ops },
        dtype: most.map(|c| c.0),
        bytes: traffic.levels.first().map_or(0.0, |l| l.supplied_bytes + l.write_bytes),
    })
}

/// A mapping for a plan whose streams are cut already.
pub fn without_splits(mapping: &Mapping) -> Mapping {
    let mut mapping = mapping.clone();
    mapping.kernels.iter_mut().for_each(|m| m.split = None);
    mapping
}

/// Reads a tuner's measurements, by case.
pub fn of_records(path: &Path) -> Result<Vec<Tuned>, Failure> {
    let mut out: Vec<Tuned> = Vec::new();
    for r in objects::<Record>(path)? {
        let (Some(predicted), Some(measured)) = (r.predicted_us, r.measured_us) else { continue };
        let name = format!("{} {}", r.cascade, r.sizes);
        let pair = (r.origin, predicted, measured);
        match out.iter_mut().find(|t| t.name == name && t.device == r.device) {
            Some(t) => t.pairs.push(pair),
            None => out.push(Tuned { device: r.device, name, pairs: vec![pair] }),
        }
    }
    Ok(out)
}
