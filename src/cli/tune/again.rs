//! Recorded measurements priced again: how good the model's choices would be now, or with another data sheet, without
//! measuring anything.
//!
//! Invariant: of mappings that were not recorded nothing is claimed; the model's first choice is its first among those
//! that were.

use std::collections::BTreeMap;

use einfall_autotune::tune;
use einfall_ir::mapping::parse::parse;
use einfall_ir::target::DataSheet;

use super::super::Failure;
use super::case::{self, Case};
use super::journal::Record;
use super::judged::Judged;
use super::{DeviceName, FEW, median};

/// A mapping of a case: what the model says now and what was measured.
struct Priced {
    predicted: f64,
    measured: f64,
    turns: usize,
    drawn: bool,
}

/// The row of one case and its records with the model's new figures; none if nothing of it was recorded.
pub fn again(
    device: DeviceName,
    sheet: &DataSheet,
    case: &Case,
    records: &[Record],
) -> Result<Option<(Judged, Vec<Record>)>, Failure> {
    let begin = std::time::Instant::now();
    let own = |r: &&Record| (&r.cascade, &r.sizes, &r.statics) == (&case.cascade, &case.extents(), &case.fixed());
    let mut own: Vec<Record> = records.iter().filter(own).cloned().collect();
    let c = case.load().map_err(Failure::Wrong)?;
    let plan = device.plan(&c).map_err(Failure::wrong)?;
    let ranks = case::ranks(&plan, &case.sizes).map_err(Failure::Wrong)?;
    let usual = median(own.iter().filter_map(|r| r.beside_us));
    let mut texts: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (i, r) in own.iter().enumerate() {
        texts.entry(r.mapping.clone()).or_default().push(i);
    }
    let (mut list, mut faults) = (Vec::new(), 0);
    for (text, places) in texts {
        let mapping = parse(&text).map_err(|d| Failure::Wrong(format!("a recorded mapping: {}", d.message)))?;
        let prediction = tune::predict(&plan, sheet, &ranks, &mapping);
        for i in &places {
            own[*i].predicted_us = prediction.as_ref().map(|p| p.seconds * 1e6);
            own[*i].floor_us = prediction.as_ref().map(|p| p.floor * 1e6);
            own[*i].binding = prediction.as_ref().map(|p| p.binding.clone());
            let terms = prediction.iter().flat_map(|p| &p.terms);
            own[*i].terms = terms.map(|(n, t)| (n.clone(), t * 1e6)).collect();
        }
        let steady =
            |r: &Record| Some(r.measured_us? * usual.zip(r.beside_us).map_or(1.0, |(usual, then)| usual / then));
        let all = places.iter().all(|i| own[*i].measured_us.is_some());
        match (all, median(places.iter().filter_map(|i| steady(&own[*i]))), prediction) {
            (true, Some(measured), Some(p)) => list.push(Priced {
                predicted: p.seconds,
                measured,
                turns: places.len(),
                drawn: places.iter().any(|i| own[*i].origin == "drawn"),
            }),
            _ => faults += 1,
        }
    }
    list.sort_by(|x, y| x.predicted.total_cmp(&y.predicted));
    let fastest = |only: &dyn Fn(&Priced) -> bool| {
        let of = list.iter().enumerate().filter(|(_, p)| only(p));
        of.min_by(|x, y| x.1.measured.total_cmp(&y.1.measured)).map(|(i, p)| (i, p.measured))
    };
    // One that was lucky once is not the fastest.
    let Some((winner, best_us)) = fastest(&|p| p.turns > 1).or(fastest(&|_| true)) else { return Ok(None) };
    let pairs: Vec<(f64, f64)> = list.iter().filter(|p| p.drawn).map(|p| (p.predicted, p.measured)).collect();
    let few = list.iter().take(FEW).map(|p| p.measured).fold(f64::INFINITY, f64::min);
    let row = Judged {
        cascade: case.cascade.clone(),
        sizes: case.extents(),
        measured: list.len(),
        faults,
        best_us,
        winner,
        first_us: list.first().map(|p| p.measured),
        few_us: Some(few),
        few_s: None,
        draws: pairs.len(),
        correlation: tune::rank_correlation(&pairs),
        drift: None,
        seconds: begin.elapsed().as_secs_f64(),
    };
    Ok(Some((row, own)))
}
