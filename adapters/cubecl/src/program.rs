//! An artifact on a client: sizes from shapes, checks, launches.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cubecl::CubeCount;
use cubecl::ir::features::Plane;
use cubecl::server::{Handle, KernelArguments, MetadataBindingInfo};
use einfall::CompileOptions;
use einfall::ir::artifact::{Artifact, Code};
use einfall::ir::cascade::Cascade;
use einfall::ir::tile::BufferKind;
use einfall::runtime::shaders::{Adapter, Arguments, Bound, Dispatches, Executable, Held, load};

use crate::shader::Shader;
use crate::{Array, Client, Error};

/// Where arrays start in the numbering of memory: what bindings start at multiples of everywhere.
const APART: u64 = 256;

/// What a client's device offers to kernels.
pub fn adapter(client: &Client) -> Adapter {
    let p = client.properties();
    let h = &p.hardware;
    // cubecl says that there are planes where their operations can be used.
    let planes = p.features.plane.contains(Plane::Ops);
    Adapter {
        name: p.identity.name.clone(),
        driver: String::new(),
        backend: client.name().to_owned(),
        software: false,
        subgroup: if planes { (h.plane_size_min, h.plane_size_max) } else { (0, 0) },
        f16: false,
        timestamps: matches!(p.timing_method, cubecl::profile::TimingMethod::Device),
        workgroup_bytes: h.max_shared_memory_size as u64,
        invocations: u64::from(h.max_units_per_cube.min(h.max_cube_dim.0)),
        binding_bytes: p.memory.max_page_size,
        buffer_bytes: p.memory.max_page_size,
        storage_buffers: u64::from(h.max_bindings),
        workgroups: u64::from(h.max_cube_count.0.min(h.max_cube_count.1)),
        matrices: Vec::new(),
    }
}

/// What a launch takes, by the names of the cascade's parameters.
#[derive(Clone, Debug, Default)]
pub struct Call {
    pub(crate) arrays: Vec<(String, Array)>,
    pub(crate) scalars: Vec<(String, f64)>,
    pub(crate) sizes: Vec<(String, u64)>,
    pub(crate) outputs: Vec<(String, Array)>,
}

impl Call {
    /// Nothing yet.
    pub fn new() -> Call {
        Call::default()
    }

    /// An array to read, or to update in place.
    pub fn array(mut self, name: &str, array: Array) -> Call {
        self.arrays.push((name.to_owned(), array));
        self
    }

    /// A scalar parameter; those with a default may be left out.
    pub fn scalar(mut self, name: &str, value: f64) -> Call {
        self.scalars.push((name.to_owned(), value));
        self
    }

    /// The size of a rank that no array's shape decides.
    pub fn size(mut self, rank: &str, extent: u64) -> Call {
        self.sizes.push((rank.to_owned(), extent));
        self
    }

    /// An array to write an output to, overwritten whole; without it the output is a new one.
    pub fn output(mut self, name: &str, array: Array) -> Call {
        self.outputs.push((name.to_owned(), array));
        self
    }
}

/// What is done with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Check,
    Measure,
    Launch,
}

/// The results of a launch: every output and every array updated in place, in the cascade's order.
pub(crate) type Results = Vec<(String, Array)>;

/// A cascade compiled by one mapping, on a client; serves every size of its symbolic ranks.
pub struct Program {
    client: Client,
    executable: Arc<Executable>,
    /// By launch.
    shaders: Vec<Shader>,
    /// By launch, whether cubecl has taken it before.
    taken: Vec<AtomicBool>,
    /// The sizes of the last launch: most callers keep to one.
    bound: Mutex<Option<(Vec<(String, u64)>, Arc<Bound>)>>,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Program").field("name", &self.name()).field("shaders", &self.shaders).finish_non_exhaustive()
    }
}

impl Program {
    /// Compiles a cascade for the client's device by the mapping of `options`, else by the model's for it.
    ///
    /// # Errors
    /// [`Error::Compile`] where something has no lowering or no WGSL; as [`Program::load`].
    pub fn compile(client: &Client, cascade: &Cascade, options: &CompileOptions) -> Result<Program, Error> {
        let sheet = einfall::shaders::data_sheet(&adapter(client));
        let artifact = einfall::shaders::compile(cascade, &sheet, options)?;
        // SAFETY: the artifact was made by code generation a line above.
        unsafe { Program::load(client, artifact) }
    }

    /// Takes an artifact whose modules are bound as [`Pooled`](einfall::ir::artifact::Bindings::Pooled) says.
    ///
    /// # Errors
    /// [`Error::Launch`] where it is bound otherwise, exceeds a limit of the device or needs what it lacks;
    /// [`Error::Client`] for a client that does not take WGSL.
    ///
    /// # Safety
    /// The code keeps to the WebGPU convention of [`Launch`](einfall::ir::artifact::Launch), and its tasks touch only the
    /// arrays of their launch, only inside their extents: no bounds are checked as it runs. Code generation makes such
    /// artifacts.
    pub unsafe fn load(client: &Client, artifact: Artifact) -> Result<Program, Error> {
        if !client.name().contains("wgsl") {
            return Err(Error::Client(client.name().to_owned()));
        }
        let shaders: Vec<Shader> = match &artifact.code {
            Code::Wgsl { modules } => artifact
                .launches
                .iter()
                .zip(modules)
                .map(|(l, m)| Shader::new(&m.text, &l.symbol, l.gpu.as_ref().map_or(1, |g| g.threads)))
                .collect(),
            _ => Vec::new(),
        };
        // Refuses other code.
        let executable = load(artifact, &adapter(client))?;
        let taken = shaders.iter().map(|_| AtomicBool::new(false)).collect();
        Ok(Program { client: client.clone(), executable, shaders, taken, bound: Mutex::new(None) })
    }

    /// The cascade's name.
    pub fn name(&self) -> &str {
        self.executable.name()
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The sizes that a call's shapes imply.
    pub(crate) fn bind(&self, call: &Call) -> Result<Arc<Bound>, Error> {
        let given = call.arrays.iter().chain(&call.outputs);
        let shapes: Vec<(&str, &[u64])> = given.map(|(n, a)| (n.as_str(), a.shape.as_slice())).collect();
        let mut sizes = self.executable.infer(&shapes)?;
        sizes.extend(call.sizes.iter().cloned());
        let mut last = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bound)) = last.as_ref().filter(|(s, _)| *s == sizes) {
            return Ok(Arc::clone(bound));
        }
        let bound = Arc::new(self.executable.bind(&sizes)?);
        *last = Some((sizes, Arc::clone(&bound)));
        Ok(bound)
    }

    /// Checks a call and puts its kernels on the client's queue. Whether cubecl takes a kernel is asked when it is first
    /// launched; what fails on the device is said when results are read.
    ///
    /// # Errors
    /// [`Error::Launch`] for arrays, scalars and sizes that do not fit; [`Error::Shared`], [`Error::Elsewhere`] and
    /// [`Error::Offset`]; [`Error::Cubecl`] for a kernel that cubecl refuses.
    pub fn launch(&self, call: Call) -> Result<Vec<(String, Array)>, Error> {
        self.run(call, How::Launch)
    }

    /// Checks a call as a launch does.
    ///
    /// # Errors
    /// As [`Program::launch`].
    pub fn check(&self, call: Call) -> Result<(), Error> {
        self.run(call, How::Check).map(|_| ())
    }

    /// Launches a call whose written arrays are nobody's: those updated in place may be shared with other such calls.
    pub(crate) fn measure(&self, call: Call) -> Result<(), Error> {
        self.run(call, How::Measure).map(|_| ())
    }

    fn run(&self, call: Call, how: How) -> Result<Results, Error> {
        let bound = self.bind(&call)?;
        let Call { arrays, scalars, mut outputs, .. } = call;
        let (mut inputs, mut results) = (Vec::new(), Results::new());
        let mut arrays: Vec<(String, Option<Array>)> = arrays.into_iter().map(|(n, a)| (n, Some(a))).collect();
        for spec in bound.arrays().filter(|s| matches!(s.kind, BufferKind::Output | BufferKind::InOut)) {
            let given = match spec.kind {
                BufferKind::InOut => arrays.iter_mut().find(|(n, _)| n == spec.name).and_then(|(_, a)| a.take()),
                _ => outputs.iter().position(|(n, _)| n == spec.name).map(|i| outputs.remove(i).1),
            };
            let array = match given {
                Some(array) if how == How::Launch && !array.handle.can_mut() => {
                    return Err(Error::Shared { array: spec.name.to_owned() });
                }
                Some(array) => array,
                // An array updated in place that is not given is missed below.
                None if spec.kind == BufferKind::InOut => continue,
                None => Array::empty(&self.client, spec.dtype, spec.shape),
            };
            results.push((spec.name.to_owned(), array));
        }
        inputs.extend(arrays.into_iter().filter_map(|(n, a)| Some((n, a?))));
        // What is left over has no output of its name; the run time says which there are.
        results.extend(outputs);
        let multiple = self.client.properties().memory.alignment.max(1);
        let mut memory = Memory { client: &self.client, multiple, next: APART };
        let mut arguments = Arguments::new();
        for (name, array) in &inputs {
            arguments = arguments.input(name, &memory.hold(name, array)?);
        }
        for (name, array) in &results {
            arguments = arguments.output(name, &memory.hold(name, array)?);
        }
        for (name, value) in &scalars {
            arguments = arguments.scalar(name, *value);
        }
        let run = bound.dispatches(&arguments)?;
        if how != How::Check {
            let own = inputs.iter().chain(&results).map(|(n, a)| (n.as_str(), a.handle.clone())).collect();
            self.enqueue(&run, own);
            if run.kernels.iter().any(|k| !self.taken[k.index].load(Ordering::Relaxed)) {
                self.client.check(results.iter().map(|(_, a)| &a.handle)).map_err(|e| Error::Cubecl(e.to_string()))?;
                run.kernels.iter().for_each(|k| self.taken[k.index].store(true, Ordering::Relaxed));
            }
        }
        Ok(results)
    }

    fn enqueue<'a>(&self, run: &Dispatches<'a>, mut handles: HashMap<&'a str, Handle>) {
        for &(name, bytes) in &run.temporaries {
            handles.insert(name, self.client.empty(bytes.next_multiple_of(4).max(4) as usize));
        }
        for kernel in &run.kernels {
            let bindings = kernel.arrays.iter().map(|name| handles[name].clone().binding()).collect();
            let words = kernel.words.chunks(2).map(|w| u64::from(w[0]) | u64::from(*w.get(1).unwrap_or(&0)) << 32);
            let arguments =
                KernelArguments::new().with_buffers(bindings).with_info(MetadataBindingInfo::custom(words.collect()));
            let [x, y] = kernel.grid;
            self.client.launch(Box::new(self.shaders[kernel.index].clone()), CubeCount::Static(x, y, 1), arguments);
        }
    }
}

/// Numbers for the memory of one launch's arrays.
struct Memory<'a> {
    /// Whose memory it is.
    client: &'a Client,
    /// What bindings start at multiples of.
    multiple: u64,
    next: u64,
}

impl Memory<'_> {
    /// A range of its own for an array.
    fn hold(&mut self, name: &str, array: &Array) -> Result<Held, Error> {
        if array.handle.service != self.client.service_id() {
            return Err(Error::Elsewhere { array: name.to_owned() });
        }
        let offset = array.handle.offset_start.unwrap_or(0);
        if !offset.is_multiple_of(self.multiple) {
            return Err(Error::Offset { array: name.to_owned(), offset, multiple: self.multiple });
        }
        let bytes = array.handle.size_in_used();
        let first = self.next;
        self.next = (first + bytes + APART).next_multiple_of(APART);
        Ok(Held { dtype: array.dtype, shape: array.shape.clone(), strides: array.strides.clone(), first, bytes })
    }
}
