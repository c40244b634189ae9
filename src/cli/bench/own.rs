//! `bench FILE`: a cascade of one's own at given sizes, by the mapping chosen or by mapping files.

use std::path::Path;
use std::time::{Duration, Instant};

use einfall::{CompileOptions, Engine, Error, fits, plan, with_statics};
use einfall_ir::array::Array;
use einfall_ir::cascade::Cascade;
use einfall_ir::cascade::bind::Given;
use einfall_ir::mapping::Mapping;
use einfall_ir::tile::Plan;
use einfall_ir::tolerance::inputs::{Variant, random};
use einfall_runtime::{ArraySpec, HostArray};

use super::BenchArgs;
use super::cpu::{Launches, row, work};
use crate::cli::lower::read_mapping;
use crate::cli::source::{Source, bindings, sizes};
use crate::cli::{Failure, engine_failure};

/// A cascade at its sizes, its random parameters, and the mappings to time it by.
pub struct Subject {
    pub source: Source,
    /// With what `--static` fixes.
    pub cascade: Cascade,
    /// Extents of all its ranks.
    pub sizes: Vec<(String, u64)>,
    /// A value for every parameter.
    pub drawn: Vec<(String, Array)>,
    /// By their files; under no name what a table or the model chooses.
    pub mappings: Vec<(String, Option<Mapping>)>,
}

impl Subject {
    /// Reads a file and the mappings of the command line, which must fit what `plan` makes of the cascade.
    pub fn read(
        file: &Path,
        args: &BenchArgs,
        plan: impl Fn(&Cascade) -> Result<Plan, Error>,
    ) -> Result<Subject, Failure> {
        let source = Source::read(file)?;
        let cascade = source.cascade(args.cascade.as_deref())?;
        let fail = |e| engine_failure(&source, e);
        let cascade = with_statics(&cascade, &sizes(&args.statics)).map_err(fail)?;
        let b = bindings(&source, &cascade, &Given { sizes: sizes(&args.size), ..Given::default() })?;
        source.room(&cascade, &b)?;
        let named = cascade.ranks.iter().zip(&b.extents).map(|((_, r), n)| (r.name.clone(), *n)).collect();
        let mut mappings = Vec::new();
        for path in &args.mapping {
            let mapping = read_mapping(path)?;
            fits(&mapping, &plan(&cascade).map_err(fail)?)
                .map_err(|why| Failure::Wrong(format!("{}: {why}", path.display())))?;
            mappings.push((path.display().to_string(), Some(mapping)));
        }
        if mappings.is_empty() {
            mappings.push((String::new(), None));
        }
        let values = random(&cascade, &b, 1, Variant::Normal).map_err(|e| source.bind_failure(&e))?;
        let names = cascade.params.iter().map(|p| cascade.tensors[*p].name.clone());
        let drawn = names.zip(values).collect();
        Ok(Subject { source, cascade, sizes: named, drawn, mappings })
    }

    /// Its sizes, as `--size` takes them.
    pub fn extents(&self) -> String {
        self.sizes.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(",")
    }

    /// The value of a parameter.
    pub fn value(&self, name: &str) -> &Array {
        &self.drawn.iter().find(|(n, _)| n == name).expect("a parameter").1
    }

    /// Parameters without dimensions.
    pub fn scalars(&self) -> Vec<(String, f64)> {
        let scalars = self.drawn.iter().filter(|(_, a)| a.dims.is_empty());
        scalars.map(|(n, a)| (n.clone(), a.data[0])).collect()
    }
}

/// Compiles, times and prints a line for every mapping.
pub fn bench(file: &Path, args: &BenchArgs) -> Result<(), Failure> {
    let subject = Subject::read(file, args, plan)?;
    let fail = |e| engine_failure(&subject.source, e);
    let engine = Engine::new(&args.options()?).map_err(fail)?;
    let sheet = engine.runtime().measure().map_err(Failure::machine)?;
    let (scalars, extents) = (subject.scalars(), subject.extents());
    for (name, mapping) in &subject.mappings {
        let start = Instant::now();
        let options =
            CompileOptions { mapping: mapping.clone(), sizes: subject.sizes.clone(), ..CompileOptions::default() };
        let kernel = engine.compile_with(&subject.cascade, &options).map_err(fail)?;
        let build_s = start.elapsed().as_secs_f64();
        let bound = kernel.bind(&subject.sizes).map_err(fail)?;
        let value = |spec: &ArraySpec| HostArray::from_values(subject.value(spec.name));
        let mut launches = Launches::new(bound, scalars.clone(), value)?;
        launches.spread(2)?;
        let seconds = launches.time(Duration::from_millis(args.budget_ms))?;
        let label = if name.is_empty() { &subject.cascade.name } else { name };
        let (flops, bytes) = work(&launches.bound);
        let rates = (Some(flops / seconds / 1e12), Some(bytes / seconds / 1e9));
        let measured = (label.as_str(), extents.as_str(), rates);
        row(&engine, (&kernel, &launches.bound), &sheet, measured, build_s, seconds).print(args.jsonl)?;
    }
    Ok(())
}
