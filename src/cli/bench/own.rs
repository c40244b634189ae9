//! `bench FILE`: a cascade of one's own at given sizes, by the mapping chosen or by mapping files.

use std::path::Path;
use std::time::{Duration, Instant};

use einfall::{CompileOptions, Engine, Options, fits, plan, with_statics};
use einfall_ir::cascade::bind::Given;
use einfall_ir::tolerance::inputs::{Variant, random};
use einfall_runtime::ArraySpec;

use super::{BenchArgs, median, row};
use crate::cli::lower::read_mapping;
use crate::cli::source::{Source, bindings, sizes};
use crate::cli::{Failure, engine_failure};

/// Compiles, times and prints a line for every mapping.
pub fn bench(file: &Path, args: &BenchArgs) -> Result<(), Failure> {
    let source = Source::read(file)?;
    let cascade = source.cascade(args.cascade.as_deref())?;
    let fail = |e| engine_failure(&source, e);
    let statics = sizes(&args.statics);
    let fixed = with_statics(&cascade, &statics).map_err(fail)?;
    let b = bindings(&source, &fixed, &Given { sizes: sizes(&args.size), ..Given::default() })?;
    source.room(&fixed, &b)?;
    let named: Vec<(String, u64)> =
        fixed.ranks.iter().zip(&b.extents).map(|((_, r), n)| (r.name.clone(), *n)).collect();
    let mut mappings = Vec::new();
    for path in &args.mapping {
        let mapping = read_mapping(path)?;
        fits(&mapping, &plan(&fixed).map_err(fail)?)
            .map_err(|why| Failure::Wrong(format!("{}: {why}", path.display())))?;
        mappings.push((path.display().to_string(), Some(mapping)));
    }
    if mappings.is_empty() {
        mappings.push((fixed.name.clone(), None));
    }
    let engine = Engine::new(&Options::from_env().map_err(Failure::usage)?).map_err(fail)?;
    let sheet = engine.runtime().measure().map_err(Failure::machine)?;
    let drawn = random(&fixed, &b, 1, Variant::Normal).map_err(|e| source.bind_failure(&e))?;
    let name = |p: &einfall_ir::cascade::TensorId| fixed.tensors[*p].name.clone();
    let scalars = fixed.params.iter().zip(&drawn).filter(|(_, a)| a.dims.is_empty());
    let scalars: Vec<(String, f64)> = scalars.map(|(p, a)| (name(p), a.data[0])).collect();
    for (label, mapping) in mappings {
        let start = Instant::now();
        let options = CompileOptions { statics: statics.clone(), mapping, sizes: named.clone() };
        let kernel = engine.compile_with(&cascade, &options).map_err(fail)?;
        let build_s = start.elapsed().as_secs_f64();
        let bound = kernel.bind(&named).map_err(fail)?;
        let mut values = |spec: &ArraySpec| {
            let k = fixed.params.iter().position(|p| fixed.tensors[*p].name == spec.name).expect("a parameter");
            drawn[k].clone()
        };
        let seconds = median(&bound, &scalars, &mut values, Duration::from_millis(args.budget_ms))?;
        let extents = named.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(",");
        row(&engine, &kernel, &bound, &sheet, (&label, &extents), build_s, seconds).print(args.jsonl)?;
    }
    Ok(())
}
