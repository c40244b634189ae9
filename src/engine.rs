//! From a cascade to results: compile, bind sizes, launch.

use std::sync::Arc;

use einfall_autotune::model_cpu;
use einfall_autotune::table::{Kind, Table};
use einfall_codegen::backend::llvm::{self, Isa};
use einfall_codegen::passes::round_operands::round_operands;
use einfall_codegen::pipeline::Context;
use einfall_codegen::tables;
use einfall_ir::array::Array;
use einfall_ir::cascade::Cascade;
use einfall_ir::cascade::bind::{Bindings, Given, bind, check_facts, scalar_value};
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;
use einfall_runtime::{Arguments, Cpu, Executable, HostArray};

use crate::lowering::{CompileOptions, Error, lower, plan, unprintable, with_statics};
use crate::options::{Options, joined};
use crate::plans::{Compiled, Surroundings};

/// Compiles cascades for this machine's processor and runs them on its threads. Shared by many threads.
///
/// ```
/// use einfall::{Engine, Options};
///
/// let engine = Engine::new(&Options::default())?; // no cache; LLVM as found; a thread per core
/// println!("{} threads, {}", engine.runtime().threads(), engine.data_sheet().name);
/// # Ok::<(), einfall::Error>(())
/// ```
#[derive(Debug)]
pub struct Engine {
    runtime: einfall_runtime::Engine,
    sheet: DataSheet,
    table: Table,
    isa: Isa,
    surroundings: Surroundings,
}

impl Engine {
    /// Finds LLVM, opens the cache, starts the threads, reads the tables.
    ///
    /// # Errors
    /// [`Error::Runtime`] where there is no LLVM or no threads, [`Error::Table`] for a table that is refused.
    pub fn new(options: &Options) -> Result<Engine, Error> {
        let runtime = einfall_runtime::Engine::new(&options.engine())?;
        let host = runtime.host();
        let cpu = Cpu::detect();
        let mut isa = Isa::of(&host.triple, &host.features);
        for (level, bytes) in [(1, &mut isa.l1_bytes), (2, &mut isa.l2_bytes)] {
            if cpu.cache_bytes(level) > 0 {
                *bytes = cpu.cache_bytes(level);
            }
        }
        let table = joined(&options.tables, Kind::Cpu, &cpu.name)?;
        // Mappings are for the threads that there are to run tasks.
        let sheet = Cpu { threads: runtime.threads().min(cpu.threads), ..cpu }.data_sheet();
        // Entries hold machine code: what LLVM it is of, and for which processor, counts as well.
        let code = format!("{:?} {:?}", runtime.llvm().version(), runtime.target());
        let device = format!("{sheet:?} {isa:?}");
        let surroundings = Surroundings::new(&["cpu", &code, &device, &table.to_string()]);
        Ok(Engine { sheet, table, isa, runtime, surroundings })
    }

    /// The run time underneath.
    pub fn runtime(&self) -> &einfall_runtime::Engine {
        &self.runtime
    }

    /// The data sheet of this machine's processor.
    pub fn data_sheet(&self) -> &DataSheet {
        &self.sheet
    }

    /// Compiles a cascade for every size.
    ///
    /// # Errors
    /// [`Error::Refused`] where something has no lowering, [`Error::Runtime`] where LLVM refuses.
    pub fn compile(&self, cascade: &Cascade) -> Result<Kernel, Error> {
        self.compile_with(cascade, &CompileOptions::default())
    }

    /// As [`Engine::compile`], with extents fixed or a mapping given.
    ///
    /// ```
    /// use einfall::{CompileOptions, Engine, Options};
    ///
    /// # let text = "cascade scale[M, N](x: f32[M, N], k: f32 = 2.0) -> (y: f32[M, N]) { y[m,n] = k * x[m,n] }";
    /// # let c = einfall::ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
    /// let engine = Engine::new(&Options::default())?;
    /// let options = CompileOptions { statics: vec![("N".to_owned(), 64)], ..CompileOptions::default() };
    /// let kernel = engine.compile_with(&c, &options)?;
    /// assert_eq!(kernel.bind(&[("M", 3)])?.bindings().extents, [3, 64]);
    /// # Ok::<(), einfall::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Engine::compile`]; [`Error::Size`] for a rank that is not there.
    pub fn compile_with(&self, cascade: &Cascade, options: &CompileOptions) -> Result<Kernel, Error> {
        let cascade = with_statics(cascade, &options.statics)?;
        // SAFETY: the artifact was made by code generation, now or before it went into the cache.
        let load = |artifact| Ok(unsafe { self.runtime.load(artifact)? });
        let make = || {
            let made = self.lowered(&cascade, options)?;
            // SAFETY: the artifact was made by code generation a line above.
            let (executable, artifact) = unsafe { self.runtime.load_and_keep(made.artifact)? };
            Ok((Compiled { artifact, ..made }, executable))
        };
        let cache = self.runtime.cache();
        let (plan, mapping, executable) = self.surroundings.compile(cache, &cascade, options, make, load)?;
        Ok(Kernel { cascade, plan, mapping, executable })
    }

    /// The LLVM IR of a cascade whose fixed extents are set.
    fn lowered(&self, cascade: &Cascade, options: &CompileOptions) -> Result<Compiled, Error> {
        let plan = plan(cascade)?;
        // For any size the rule; at given ones the rule cut to the rows there are, or what is priced plainly lower.
        let model = |sizes: Option<&[u64]>| model_cpu::choose_for(&plan, &self.sheet, sizes);
        let mapping = options.choose(&plan, &self.table, model);
        let context = Context { mapping: Some(mapping.clone()), ..self.context(None) };
        let (mapped, module) = lower(tables::CPU, &plan, &context)?;
        let artifact = llvm::print(&mapped, &module, &self.isa, "cpu").map_err(unprintable)?;
        Ok(Compiled { plan: mapped, mapping, artifact })
    }

    /// `plan` with the roundings of this processor, whose results a tolerance is for: operands of contractions take the
    /// type that its instructions multiply (`round-operands`).
    pub fn rounded(&self, plan: &Plan) -> Plan {
        round_operands(plan.clone(), &self.isa.atoms())
    }

    /// The context passes run in for this processor.
    pub fn context(&self, mapping: Option<Mapping>) -> Context {
        Context { mapping, isa: Some(self.isa), ..Context::default() }
    }
}

/// A compiled cascade: serves every size of its symbolic ranks.
#[derive(Clone, Debug)]
pub struct Kernel {
    cascade: Cascade,
    plan: Plan,
    mapping: Mapping,
    executable: Arc<Executable>,
}

impl Kernel {
    /// The cascade compiled.
    pub fn cascade(&self) -> &Cascade {
        &self.cascade
    }

    /// Its kernels over tiles, as mapped.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How it is mapped.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The linked code.
    pub fn executable(&self) -> &Arc<Executable> {
        &self.executable
    }

    /// Fixes the sizes by rank name; fixed ranks need not be given. Facts over ranks are checked.
    ///
    /// # Errors
    /// [`Error::Bind`] for sizes that do not fit or facts that do not hold, [`Error::Runtime`].
    pub fn bind<S: AsRef<str>>(&self, sizes: &[(S, u64)]) -> Result<Bound, Error> {
        let given =
            Given { sizes: sizes.iter().map(|(n, v)| (n.as_ref().to_owned(), *v)).collect(), ..Given::default() };
        let bindings = bind(&self.cascade, &given)?;
        check_facts(&self.cascade, &bindings, &[])?;
        self.bound(bindings)
    }

    /// Fixes the sizes by the shapes of arrays given by name.
    ///
    /// ```
    /// use einfall::{Engine, Options};
    ///
    /// # let text = "cascade scale[M, N](x: f32[M, N], k: f32 = 2.0) -> (y: f32[M, N]) { y[m,n] = k * x[m,n] }";
    /// # let c = einfall::ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
    /// let kernel = Engine::new(&Options::default())?.compile(&c)?;
    /// assert_eq!(kernel.bind_shapes(&[("x", &[5, 7])])?.bindings().extents, [5, 7]);
    /// # Ok::<(), einfall::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Kernel::bind`].
    pub fn bind_shapes(&self, shapes: &[(&str, &[u64])]) -> Result<Bound, Error> {
        let mut given = Given::default();
        for (name, shape) in shapes {
            if let Some(t) = self.cascade.params.iter().find(|t| self.cascade.tensors[**t].name == *name) {
                given.shapes.push((*t, shape.to_vec()));
            }
        }
        let bindings = bind(&self.cascade, &given)?;
        check_facts(&self.cascade, &bindings, &[])?;
        self.bound(bindings)
    }

    fn bound(&self, bindings: Bindings) -> Result<Bound, Error> {
        let c = &self.cascade;
        let sizes: Vec<(&str, u64)> =
            c.ranks.iter().zip(&bindings.extents).map(|((_, r), n)| (r.name.as_str(), *n)).collect();
        let runtime = self.executable.bind(&sizes)?;
        let defaults = defaults(c, &bindings)?;
        Ok(Bound { runtime, cascade: self.cascade.clone(), bindings, defaults })
    }
}

/// Values of the scalar parameters that have a default.
pub(crate) fn defaults(c: &Cascade, bindings: &Bindings) -> Result<Vec<(String, f64)>, Error> {
    let mut list = Vec::new();
    for &p in &c.params {
        if let Some(e) = c.tensors[p].default {
            list.push((c.tensors[p].name.clone(), scalar_value(c, bindings, &[], e)?));
        }
    }
    Ok(list)
}

/// Checks the facts of a cascade at these sizes with scalars by name.
///
/// # Errors
/// [`Error::Bind`] with the first fact that does not hold.
pub(crate) fn check_scalars(c: &Cascade, bindings: &Bindings, scalars: &[(&str, f64)]) -> Result<(), Error> {
    let tensor = |name: &str| c.params.iter().copied().find(|t| c.tensors[*t].name == name);
    let scalars: Vec<_> = scalars.iter().filter_map(|(n, v)| Some((tensor(n)?, *v))).collect();
    Ok(check_facts(c, bindings, &scalars)?)
}

/// Arrays by name, and scalars by name.
pub(crate) type Split<'a> = (Vec<(&'a str, HostArray)>, Vec<(&'a str, f64)>);

/// The evaluator's arrays as arrays of the host and, where they have no dimensions, scalars.
///
/// # Errors
/// [`Error::Runtime`] for one too large.
pub(crate) fn split<'a>(inputs: &[(&'a str, &Array)]) -> Result<Split<'a>, Error> {
    let (mut arrays, mut scalars) = (Vec::new(), Vec::new());
    for (name, a) in inputs {
        match a.dims.is_empty() {
            true => scalars.push((*name, a.data[0])),
            false => arrays.push((*name, HostArray::from_values(a).map_err(|e| Error::Runtime(e.into()))?)),
        }
    }
    Ok((arrays, scalars))
}

/// A compiled cascade at fixed sizes. Many threads may launch it at once.
#[derive(Debug)]
pub struct Bound {
    runtime: einfall_runtime::Bound,
    /// For the facts over scalars, which code relies on.
    cascade: Cascade,
    bindings: Bindings,
    /// Scalars the caller need not give.
    defaults: Vec<(String, f64)>,
}

impl Bound {
    /// The run time's view: array specifications, kernels, workspace.
    pub fn runtime(&self) -> &einfall_runtime::Bound {
        &self.runtime
    }

    /// The extent of every rank.
    pub fn bindings(&self) -> &Bindings {
        &self.bindings
    }

    /// Runs every kernel on the caller's arrays and returns the time of each. Scalars with a default may be left out.
    ///
    /// ```
    /// use einfall::runtime::{Arguments, View, ViewMut};
    /// use einfall::{Engine, Options};
    ///
    /// # let text = "cascade scale[M, N](x: f32[M, N], k: f32 = 2.0) -> (y: f32[M, N]) { y[m,n] = k * x[m,n] }";
    /// # let c = einfall::ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
    /// let bound = Engine::new(&Options::default())?.compile(&c)?.bind(&[("M", 1), ("N", 3)])?;
    /// let (x, mut y) = ([1f32, 2., 3.], [0f32; 3]);
    /// let arguments = Arguments::new().input("x", View::dense(&x, &[1, 3])?).output("y", ViewMut::dense(&mut y, &[1, 3])?);
    /// bound.launch(arguments.scalar("k", 10.0))?; // without `scalar`, k would be 2
    /// assert_eq!(y, [10., 20., 30.]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Bind`] where a scalar breaks a fact, [`Error::Runtime`]; before anything is written.
    pub fn launch<'a>(&'a self, mut arguments: Arguments<'a>) -> Result<Vec<std::time::Duration>, Error> {
        for (name, value) in &self.defaults {
            if !arguments.gives(name) {
                arguments = arguments.scalar(name, *value);
            }
        }
        check_scalars(&self.cascade, &self.bindings, arguments.scalars())?;
        Ok(self.runtime.launch(arguments)?)
    }

    /// Runs on evaluator arrays, one per parameter in order, and returns the outputs: for tests and small data.
    ///
    /// ```
    /// use einfall::ir::{array::Array, dtype::DType};
    /// use einfall::{Engine, Options};
    ///
    /// # let text = "cascade scale[M, N](x: f32[M, N], k: f32 = 2.0) -> (y: f32[M, N]) { y[m,n] = k * x[m,n] }";
    /// # let c = einfall::ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
    /// let bound = Engine::new(&Options::default())?.compile(&c)?.bind(&[("M", 1), ("N", 3)])?;
    /// let x = Array { dtype: DType::F32, dims: vec![1, 3], data: vec![1., 2., 3.] };
    /// let outputs = bound.run_values(&c, &[x, Array::scalar(DType::F32, 5.0)])?;
    /// assert_eq!(outputs[0].1.as_slice::<f32>(), Some(&[5f32, 10., 15.][..]));
    /// # Ok::<(), einfall::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Bind`] where a scalar breaks a fact, [`Error::Runtime`].
    pub fn run_values(&self, cascade: &Cascade, inputs: &[Array]) -> Result<Vec<(String, HostArray)>, Error> {
        let names = cascade.params.iter().map(|p| cascade.tensors[*p].name.as_str());
        let (arrays, scalars) = split(&names.zip(inputs).collect::<Vec<_>>())?;
        check_scalars(&self.cascade, &self.bindings, &scalars)?;
        let arrays: Vec<(&str, &HostArray)> = arrays.iter().map(|(n, a)| (*n, a)).collect();
        Ok(self.runtime.run_to_arrays(&arrays, &scalars)?)
    }
}
