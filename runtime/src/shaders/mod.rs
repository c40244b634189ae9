//! What a launch of an artifact's WGSL takes, worked out without a device.
//!
//! [`load`] checks an artifact against what an adapter offers, [`Executable::bind`] fixes its sizes, and
//! [`Bound::dispatches`] says for arrays of given types, shapes and strides which modules run, on how many workgroups and
//! with which words. `wgpu` runs them on a device of its own; another framework that owns device and memory runs them
//! there. Invariant: every limit that a launch could exceed is checked here and named when it is exceeded.

mod adapter;
mod error;

pub use adapter::{Adapter, Matrices};
pub use error::WgpuError;

use crate::arguments::{DeviceArguments, Named, Place, places};
use crate::array::{View, ViewMut};
use crate::error::Error;
use crate::executable::{self, Loaded};
use crate::program::{self, Program, Sizes};
use crate::variants::{self, Unfit};
use einfall_ir::arena::Id;
use einfall_ir::array::strides;
use einfall_ir::artifact::{Artifact, Bindings, Code, Launch, Slot, WgslModule};
use einfall_ir::dtype::DType;
use std::sync::Arc;

/// Extents, positions and numbers of elements are below this.
const MOST: u64 = 1 << 31;

/// The modules of an artifact, of which an adapter offers what each asks.
#[derive(Clone, Debug)]
pub struct Modules {
    adapter: Adapter,
    modules: Vec<WgslModule>,
}

/// An artifact whose modules another run time launches.
pub type Executable = executable::Executable<Modules>;

/// An executable at fixed sizes.
pub type Bound = executable::Bound<Modules>;

/// The arrays of one launch, by name. Scalars travel by value.
pub type Arguments<'a> = DeviceArguments<'a, Held>;

/// An array in memory that another run time holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Element type.
    pub dtype: DType,
    /// Extents.
    pub shape: Vec<u64>,
    /// Strides, in elements; none is negative.
    pub strides: Vec<i64>,
    /// The number of its first byte, in a numbering of all memory: a multiple of what it is aligned to, and apart from
    /// those of other arrays.
    pub first: u64,
    /// Bytes that are bound.
    pub bytes: u64,
}

/// One kernel to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dispatch<'a> {
    /// Which of the artifact's launches it is, the same for the same artifact whatever the sizes.
    pub index: usize,
    /// Its entry.
    pub symbol: &'a str,
    /// Its module.
    pub module: &'a WgslModule,
    /// Invocations of a workgroup.
    pub threads: u32,
    /// Names of its arrays, in the order of their bindings.
    pub arrays: Vec<&'a str>,
    /// Its words; none: nothing is bound for them.
    pub words: Vec<u32>,
    /// Workgroups along x and y.
    pub grid: [u32; 2],
}

/// What a launch runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dispatches<'a> {
    /// Memory between kernels: its name among the arrays of kernels, and its bytes, to be bound in whole words.
    pub temporaries: Vec<(&'a str, u64)>,
    /// The kernels, in order; each sees what the ones before it stored.
    pub kernels: Vec<Dispatch<'a>>,
}

/// Takes an artifact for a run time that launches its modules on `adapter`, with memory that it hands out itself.
///
/// # Errors
/// [`Error::Artifact`] where it contradicts itself, is not WGSL or is bound otherwise than [`Bindings::Pooled`];
/// [`Error::Wgpu`] where a kernel exceeds a limit or needs what the adapter lacks.
pub fn load(artifact: Artifact, adapter: &Adapter) -> Result<Arc<Executable>, Error> {
    let modules = Modules::of(&artifact, adapter, Bindings::Pooled)?;
    Ok(Arc::new(Executable { program: Program::new(artifact), code: modules }))
}

impl Modules {
    /// The modules of an artifact, checked: what only WebGPU asks of an artifact, and the adapter's limits.
    pub(crate) fn of(artifact: &Artifact, adapter: &Adapter, bindings: Bindings) -> Result<Modules, Error> {
        program::check(artifact)?;
        let bad = |reason: String| Err(Error::Artifact { name: artifact.name.clone(), reason });
        let Code::Wgsl { modules } = &artifact.code else { return bad("its code is not WGSL".to_owned()) };
        for (launch, module) in artifact.launches.iter().zip(modules) {
            let kernel = &launch.symbol;
            let Some(gpu) = &launch.gpu else { return bad(format!("kernel `{kernel}` says nothing about its launch")) };
            let bases = launch.slots.iter().filter(|s| matches!(s, Slot::Base(_))).count();
            if !launch.slots[..bases].iter().all(|s| matches!(s, Slot::Base(_))) {
                return bad(format!("the arrays of kernel `{kernel}` are not its first slots"));
            }
            if module.bindings != bindings {
                let found = module.bindings;
                return bad(format!("kernel `{kernel}` is printed for bindings `{found:?}`; `{bindings:?}` is needed"));
            }
            let limits = [
                (u64::from(gpu.threads), adapter.invocations, "maxComputeInvocationsPerWorkgroup", "invocations"),
                (
                    gpu.shared_bytes,
                    adapter.workgroup_bytes,
                    "maxComputeWorkgroupStorageSize",
                    "bytes of workgroup memory",
                ),
                (bases as u64, adapter.storage_buffers, "maxStorageBuffersPerShaderStage", "storage buffers"),
            ];
            for (n, most, limit, noun) in limits {
                if n > most {
                    let (what, adapter) = (format!("kernel `{kernel}` takes {n} {noun}"), adapter.name.clone());
                    return Err(WgpuError::Limit { what, limit, adapter, most }.into());
                }
            }
            if module.subgroup > 1 && u64::from(adapter.subgroup.0) < module.subgroup {
                let what = format!("subgroups of at least {}", module.subgroup);
                let (kernel, adapter) = (kernel.clone(), adapter.name.clone());
                return Err(WgpuError::Missing { kernel, what, adapter }.into());
            }
            let products = adapter.products();
            if let Some(name) = module.matrices.iter().find(|m| !products.contains(m)) {
                let what = format!("cooperative matrices of `{name}`");
                let (kernel, adapter) = (kernel.clone(), adapter.name.clone());
                return Err(WgpuError::Missing { kernel, what, adapter }.into());
            }
        }
        Ok(Modules { adapter: adapter.clone(), modules: modules.clone() })
    }

    /// The module of a launch.
    #[cfg(feature = "wgpu")]
    pub(crate) fn module(&self, index: usize) -> &WgslModule {
        &self.modules[index]
    }

    /// Extents, elements and grids within what kernels count with.
    pub(crate) fn check_sizes(&self, program: &Program, sizes: &Sizes) -> Result<(), WgpuError> {
        let adapter = &self.adapter;
        let refuse = |reason: String| Err(WgpuError::Launch { kernel: program.name().to_owned(), reason });
        for ((_, rank), n) in program.artifact.ranks.iter().zip(&sizes.extents) {
            if *n >= MOST {
                return refuse(format!("rank `{}` is {n}; kernels count to 2^31 - 1", rank.name));
            }
        }
        for ((_, buffer), shape) in program.artifact.buffers.iter().zip(&sizes.shapes) {
            let elems = shape.iter().try_fold(1u64, |a, n| a.checked_mul(*n)).unwrap_or(u64::MAX);
            if elems >= MOST {
                return refuse(format!("`{}` has {elems} elements; kernels count to 2^31 - 1", buffer.name));
            }
        }
        let most = adapter.workgroups.saturating_mul(adapter.workgroups).min(MOST - 1);
        for (launch, step) in program.artifact.launches.iter().zip(&sizes.steps) {
            let assumes = launch.gpu.as_ref().map_or(&[][..], |g| &g.assumes);
            if step.tasks > most && assumes.iter().all(|c| variants::holds(c, program, sizes, |_| true)) {
                return Err(self.too_many(launch, step.tasks));
            }
        }
        Ok(())
    }

    fn too_many(&self, launch: &Launch, tasks: u64) -> WgpuError {
        WgpuError::Limit {
            what: format!("kernel `{}` has {tasks} workgroups", launch.symbol),
            limit: "maxComputeWorkgroupsPerDimension",
            adapter: self.adapter.name.clone(),
            most: self.adapter.workgroups,
        }
    }

    /// The kernels to run on arrays at `places`, temporaries included: of each kernel's variants one.
    pub(crate) fn dispatches<'a>(
        &'a self,
        program: &'a Program,
        sizes: &Sizes,
        places: &[Option<Place>],
    ) -> Result<Vec<Dispatch<'a>>, Error> {
        let artifact = &program.artifact;
        let chosen = variants::choose(program, sizes, places).map_err(|unfit| match unfit {
            Unfit { kernel, reason, sizes: true } => WgpuError::Sizes { kernel, reason },
            Unfit { kernel, reason, sizes: false } => WgpuError::Launch { kernel, reason },
        })?;
        let mut kernels = Vec::new();
        for index in chosen {
            let (launch, tasks) = (&artifact.launches[index], sizes.steps[index].tasks);
            if tasks == 0 {
                continue;
            }
            let most = self.adapter.workgroups;
            let x = tasks.min(most);
            let y = tasks.div_ceil(x);
            // Kernels number workgroups with 31 bits.
            if y > most || x * y >= MOST {
                return Err(self.too_many(launch, tasks).into());
            }
            let name = |s: &Slot| match s {
                Slot::Base(b) => Some(artifact.buffers[*b].name.as_str()),
                Slot::Stride(..) | Slot::Scalar(_) | Slot::Extent(_) => None,
            };
            kernels.push(Dispatch {
                index,
                symbol: &launch.symbol,
                module: &self.modules[index],
                threads: launch.gpu.as_ref().map_or(0, |g| g.threads),
                arrays: launch.slots.iter().filter_map(name).collect(),
                words: words(program, launch, places, &sizes.extents)?,
                grid: [x as u32, y as u32],
            });
        }
        Ok(kernels)
    }
}

impl Loaded for Modules {
    #[cfg(feature = "cpu")]
    type Memory = ();

    fn check(&self, program: &Program, sizes: &Sizes) -> Result<(), Error> {
        Ok(self.check_sizes(program, sizes)?)
    }
}

impl Bound {
    /// What a launch on these arrays runs. Scalars with a default may be left out; the declared facts are checked.
    ///
    /// # Errors
    /// [`Error::MissingArray`], [`Error::UnknownArray`], [`Error::Twice`], [`Error::DType`], [`Error::Shape`],
    /// [`Error::Strides`], [`Error::Overlap`], [`Error::Fact`]; [`Error::Wgpu`] for an array that is larger than what is
    /// bound of it or than the adapter binds, and for too many workgroups.
    pub fn dispatches(&self, arguments: &Arguments) -> Result<Dispatches<'_>, Error> {
        let (program, modules) = (&self.executable.program, &self.executable.code);
        let refuse = |reason: String| Error::from(WgpuError::Launch { kernel: program.name().to_owned(), reason });
        let bind = |name: &str, bytes: u64| match modules.adapter.binding_bytes {
            most if bytes > most => Err(Error::from(WgpuError::Limit {
                what: format!("`{name}` has {bytes} bytes"),
                limit: "maxStorageBufferBindingSize",
                adapter: modules.adapter.name.clone(),
                most,
            })),
            _ => Ok(()),
        };
        let mut views = Vec::new();
        let inputs = arguments.inputs.len();
        for (n, (name, held)) in arguments.inputs.iter().chain(&arguments.outputs).enumerate() {
            let first = held.first as usize as *mut u8;
            // SAFETY: nothing is read or written through them.
            let view = unsafe {
                if n >= inputs {
                    // Two of what is written may not be one.
                    ViewMut::from_raw(held.dtype, first, &held.shape, &held.strides)?;
                }
                View::from_raw(held.dtype, first, &held.shape, &held.strides)?
            };
            let last =
                held.shape.iter().zip(&held.strides).map(|(n, s)| (n.saturating_sub(1)).saturating_mul(*s as u64));
            if held.strides.iter().any(|s| *s < 0) || last.fold(0, u64::saturating_add) >= MOST {
                let (strides, shape) = (&held.strides, &held.shape);
                return Err(refuse(format!(
                    "`{name}` of {shape:?} has strides {strides:?}; kernels count from 0 to 2^31 - 1"
                )));
            }
            let reached = view.extent();
            if reached.len() as u64 > held.bytes {
                return Err(refuse(format!("`{name}` reaches beyond the {} bytes that are bound", held.bytes)));
            }
            bind(name, held.bytes)?;
            views.push((*name, view));
        }
        let named: Vec<Named> = views.iter().map(|(n, v)| (*n, v)).collect();
        let (ins, outs) = named.split_at(arguments.inputs.len());
        let defaults = program.scalars(&self.sizes.extents, &arguments.scalars)?;
        let scalars: Vec<(&str, f64)> = arguments.scalars.iter().copied().chain(defaults).collect();
        let mut places = places(program, &self.sizes, ins, outs, &scalars, |_: DType, _: &View| {
            Err(refuse("a scalar is given as an array; give its value".to_owned()))
        })?;
        let mut temporaries = Vec::new();
        for (id, buffer) in program.artifact.buffers.iter() {
            if places[id.index()].is_none() && self.sizes.offsets[id.index()].is_some() {
                let shape = &self.sizes.shapes[id.index()];
                places[id.index()] = Some(Place { base: 0, strides: strides(shape), scalar: 0 });
                let bytes = crate::array::dense_bytes(buffer.dtype, shape)? as u64;
                bind(&buffer.name, bytes)?;
                temporaries.push((buffer.name.as_str(), bytes));
            }
        }
        Ok(Dispatches { temporaries, kernels: modules.dispatches(program, &self.sizes, &places)? })
    }
}

/// The words of a kernel's uniform buffer.
fn words(program: &Program, launch: &Launch, places: &[Option<Place>], extents: &[u64]) -> Result<Vec<u32>, WgpuError> {
    let bad = |reason: String| WgpuError::Launch { kernel: launch.symbol.clone(), reason };
    let mut words = Vec::new();
    for slot in &launch.slots {
        let place = |b: einfall_ir::tile::BufferId| {
            let name = &program.artifact.buffers[b].name;
            places[b.index()].as_ref().ok_or_else(|| bad(format!("`{name}` has no place")))
        };
        words.push(match *slot {
            Slot::Base(_) => continue,
            Slot::Stride(b, d) => {
                let stride = place(b)?.strides[d];
                i32::try_from(stride).map_err(|_| bad(format!("a stride of {stride} elements does not fit 31 bits")))?
                    as u32
            }
            Slot::Extent(r) => extents[r.index()] as u32,
            Slot::Scalar(b) => {
                let (bits, dtype) = (place(b)?.scalar, program.artifact.buffers[b].dtype);
                match dtype.is_float() {
                    true => (f64::from_bits(bits) as f32).to_bits(),
                    false => {
                        i32::try_from(bits as i64).map_err(|_| bad("a scalar does not fit 32 bits".to_owned()))? as u32
                    }
                }
            }
        });
    }
    Ok(words)
}
