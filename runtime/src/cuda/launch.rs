//! A loaded artifact at fixed sizes, and its launches on a device.
//!
//! Invariant: everything a launch needs is made once, by [`Bound::prepare`]: parameter blocks, tensor maps, workspace,
//! launch attributes. A launch hands them to the driver and allocates nothing.

use super::array::DeviceArray;
use super::driver::{Context, Graph, Kept, Memory, Stream};
use super::engine::Modules;
use super::error::CudaError;
use super::tensor_map;
use crate::arguments::{DeviceArguments, Named, Place, places};
use crate::array::{HostArray, View};
use crate::error::Error;
use crate::executable::{self, Loaded};
use crate::program::{Program, Sizes};
use crate::variants;
use cudarc::driver::sys;
use einfall_ir::arena::Id;
use einfall_ir::artifact::{Condition, GpuLaunch, Launch, Slot, TensorMap};
use einfall_ir::dtype::DType;
use einfall_ir::tile::BufferId;
use std::sync::Arc;

/// Tasks a grid may have along x.
const MAX_GRID: u64 = (1 << 31) - 1;
/// Extents and positions are below this (see [`Launch`]).
const MAX_EXTENT: u64 = 1 << 31;

/// The arrays of one launch, by name. Scalars travel by value.
pub type Arguments<'a> = DeviceArguments<'a, DeviceArray>;

/// An executable at fixed sizes.
pub type Bound = executable::Bound<Modules>;

impl Loaded for Modules {
    #[cfg(feature = "cpu")]
    type Memory = ();

    fn check(&self, program: &Program, sizes: &Sizes) -> Result<(), Error> {
        Ok(check_sizes(program, sizes)?)
    }
}

impl Bound {
    /// An array for the parameter `name` with unspecified content and the strides its kernels want: dense, or with
    /// padded rows where a copy engine moves it.
    ///
    /// # Errors
    /// [`Error::UnknownArray`]; [`Error::Cuda`] where memory is short.
    pub fn array(&self, name: &str) -> Result<DeviceArray, Error> {
        let program = &self.executable.program;
        let (id, buffer) = program.find(name, "array", |b| !b.is_scalar())?;
        let shape = &self.sizes.shapes[id.index()];
        let padded = wants_padding(program, id);
        let context = &self.executable.code.shared.context;
        Ok(DeviceArray::alloc(context, buffer.dtype, shape, padded, &format!("`{name}`"))?)
    }

    /// Checks the arrays and makes everything their launches need. The arrays' memory is kept for as long as the result.
    ///
    /// # Errors
    /// [`Error::MissingArray`], [`Error::UnknownArray`], [`Error::Twice`], [`Error::DType`], [`Error::Shape`],
    /// [`Error::Strides`], [`Error::Overlap`]; [`Error::Cuda`] for arrays of another device, misaligned ones, and
    /// where memory for temporaries is short.
    pub fn prepare(&self, arguments: &Arguments) -> Result<Prepared, Error> {
        let executable = &self.executable;
        let (program, shared) = (&executable.program, &executable.code.shared);
        shared.context.enter()?;
        let mut keep = Vec::new();
        for (name, array) in arguments.inputs.iter().chain(&arguments.outputs) {
            check_place(&shared.context, name, array)?;
            keep.push(Kept::Memory(Arc::clone(&array.memory)));
        }
        let view = |(n, a): &'_ (&'_ str, DeviceArray)| -> Result<(String, View<'static>), Error> {
            Ok((n.to_string(), a.place()?))
        };
        let inputs = arguments.inputs.iter().map(view).collect::<Result<Vec<_>, Error>>()?;
        let outputs = arguments.outputs.iter().map(view).collect::<Result<Vec<_>, Error>>()?;
        let ins: Vec<Named> = inputs.iter().map(|(n, v)| (n.as_str(), v)).collect();
        let outs: Vec<Named> = outputs.iter().map(|(n, v)| (n.as_str(), v)).collect();
        let mut places = places(program, &self.sizes, &ins, &outs, &arguments.scalars, refuse_scalar_array)?;

        let workspace = Memory::alloc(&shared.context, self.sizes.workspace_bytes, "temporaries between kernels")?;
        if program.artifact.launches.iter().any(|l| l.gpu.as_ref().is_some_and(|g| !g.counters.is_empty())) {
            let stream = Stream::new(&shared.context)?;
            stream.fill(&workspace, 0)?;
            stream.synchronize()?;
        }
        for ((id, _), offset) in program.artifact.buffers.iter().zip(&self.sizes.offsets) {
            if let Some(offset) = offset {
                let strides = einfall_ir::array::strides(&self.sizes.shapes[id.index()]);
                let base = (workspace.address + offset) as usize;
                places[id.index()] = Some(Place { base, strides, scalar: 0 });
            }
        }
        let mut steps = Vec::new();
        let mut names = Vec::new();
        for index in choose(program, &self.sizes, &places)? {
            let launch = &program.artifact.launches[index];
            let Some(gpu) = &launch.gpu else { continue };
            let tasks = self.sizes.steps[index].tasks;
            if tasks == 0 {
                continue;
            }
            let (function, module) = executable.code.code.function(shared, &program.artifact.launches, index)?;
            keep.push(Kept::Module(module));
            let function = function.0;
            if gpu.cooperative {
                check_resident(&shared.context, function, launch, gpu, tasks, shared.gpu.sms)?;
            }
            let map = |m: &TensorMap| -> Result<[u64; 16], Error> {
                let buffer = &program.artifact.buffers[m.buffer];
                let shape = &self.sizes.shapes[m.buffer.index()];
                let bad = |reason| {
                    let (array, kernel) = (buffer.name.clone(), launch.symbol.clone());
                    Error::Cuda(CudaError::TensorMap { array, kernel, reason })
                };
                let place = places[m.buffer.index()].as_ref().ok_or_else(|| bad("it has no place".to_owned()))?;
                let params = match shape.contains(&0) {
                    // Nothing is moved; the map is one of a single element, as none has zero extents.
                    true => {
                        let ones = vec![1; shape.len()];
                        let strides = vec![1; shape.len()];
                        tensor_map::params(m, buffer.dtype, shared.spare.address, &ones, &strides)
                    }
                    false => tensor_map::params(m, buffer.dtype, place.base as u64, shape, &place.strides),
                };
                Ok(shared.maps.encode(&shared.context, &params.map_err(bad)?)?)
            };
            let maps = gpu.maps.iter().map(map).collect::<Result<Vec<_>, Error>>()?;
            let parameters = parameters(program, launch, &maps, &places, &self.sizes.extents)?;
            names.push(launch.symbol.clone());
            steps.push(Step {
                function,
                tasks: tasks as u32,
                threads: gpu.threads,
                shared_bytes: gpu.shared_bytes as u32,
                attributes: attributes(gpu, !steps.is_empty()),
                pointers: pointers(&parameters, maps.len(), launch.slots.len()),
                _parameters: parameters,
            });
        }
        keep.push(Kept::Memory(Arc::new(workspace)));
        Ok(Prepared { steps, keep, names: names.into(), context: Arc::clone(&shared.context) })
    }

    /// Copies the inputs to the device, runs, and returns the outputs in the cascade's order. Arrays updated in place
    /// are copied from `inputs`; other outputs are filled with NaNs first.
    ///
    /// # Errors
    /// As [`Bound::prepare`] and [`Prepared::launch`].
    pub fn run_to_arrays(
        &self,
        stream: &Stream,
        inputs: &[(&str, &HostArray)],
        scalars: &[(&str, f64)],
    ) -> Result<Vec<(String, HostArray)>, Error> {
        let array = |name: &str, written: bool| {
            let array = self.array(name)?;
            if written {
                array.fill(stream, 0xff)?;
            }
            Ok(array)
        };
        let copy = |array: &DeviceArray, host: &HostArray| Ok(array.copy_from(stream, host)?);
        let (arguments, outputs) = Arguments::of_host(self.arrays(), inputs, scalars, array, copy)?;
        self.prepare(&arguments)?.launch(stream)?;
        outputs.into_iter().map(|(name, array)| Ok((name, array.to_host(stream)?))).collect()
    }
}

/// Scalars are passed by value: a device array of one element is not read on the host.
fn refuse_scalar_array(_: DType, view: &View) -> Result<u64, Error> {
    Err(CudaError::ScalarArray { address: view.base() as u64 }.into())
}

/// Whether a copy engine moves the buffer and every kernel takes the strides that padding changes.
fn wants_padding(program: &Program, id: BufferId) -> bool {
    let mapped = |l: &Launch| l.gpu.as_ref().is_some_and(|g| g.maps.iter().any(|m| m.buffer == id));
    let dense = &program.dense[id.index()];
    let outer = dense.len().saturating_sub(1);
    program.artifact.launches.iter().any(mapped) && !dense[..outer].contains(&true)
}

/// Extents and grids within what kernels and the device count with.
fn check_sizes(program: &Program, sizes: &Sizes) -> Result<(), CudaError> {
    for ((_, rank), n) in program.artifact.ranks.iter().zip(&sizes.extents) {
        if *n >= MAX_EXTENT {
            return Err(CudaError::Extent { what: format!("rank `{}`", rank.name), extent: *n });
        }
    }
    for ((_, buffer), shape) in program.artifact.buffers.iter().zip(&sizes.shapes) {
        if let Some(d) = shape.iter().position(|n| *n >= MAX_EXTENT) {
            return Err(CudaError::Extent { what: format!("dimension {d} of `{}`", buffer.name), extent: shape[d] });
        }
    }
    for (launch, step) in program.artifact.launches.iter().zip(&sizes.steps) {
        let fits = |c: &Condition| variants::holds(c, program, sizes, |_| true);
        if !launch.gpu.as_ref().is_none_or(|g| g.assumes.iter().all(fits)) {
            continue;
        }
        let refuse = |reason: String| CudaError::Launch { kernel: launch.symbol.clone(), reason };
        if step.tasks > MAX_GRID {
            return Err(refuse(format!("it has {} tasks; a grid has {MAX_GRID} at most", step.tasks)));
        }
        if step.scratch_bytes > 0 {
            return Err(refuse(format!("it wants {} bytes of private memory a task", step.scratch_bytes)));
        }
        let Some(gpu) = &launch.gpu else { continue };
        for (extent, cluster) in launch.grid.iter().zip(&gpu.cluster) {
            let n = extent.eval(&sizes.extents).unwrap_or(0);
            if !n.is_multiple_of(*cluster) {
                return Err(refuse(format!("a grid of {n} tasks is not divided by its clusters of {cluster}")));
            }
        }
    }
    Ok(())
}

/// The launches to make, in order: of the variants of a kernel, the first whose assumptions all hold.
fn choose(program: &Program, sizes: &Sizes, places: &[Option<Place>]) -> Result<Vec<usize>, CudaError> {
    variants::choose(program, sizes, places)
        .map_err(|unfit| CudaError::Launch { kernel: unfit.kernel, reason: unfit.reason })
}

/// Refuses a kernel whose tasks wait for each other and are more than the device holds.
fn check_resident(
    context: &Context,
    function: sys::CUfunction,
    launch: &Launch,
    gpu: &GpuLaunch,
    tasks: u64,
    sms: u32,
) -> Result<(), CudaError> {
    let resident = resident_tasks(context, function, gpu, sms)?;
    if tasks <= resident {
        return Ok(());
    }
    let reason =
        format!("its {tasks} tasks wait for each other and the device holds {resident} at once; give it fewer tasks");
    Err(CudaError::Launch { kernel: launch.symbol.clone(), reason })
}

/// Refuses arrays that kernels of this device may not use.
fn check_place(context: &Arc<Context>, name: &str, array: &DeviceArray) -> Result<(), CudaError> {
    let wrong = |place: String| CudaError::Place { array: name.to_owned(), place, device: context.index };
    if !Arc::ptr_eq(&array.memory.context, context) && array.memory.context.index != context.index {
        return Err(wrong(format!("on CUDA device {}", array.memory.context.index)));
    }
    if array.memory.bytes == 0 {
        return Ok(());
    }
    use sys::CUpointer_attribute::{CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, CU_POINTER_ATTRIBUTE_MEMORY_TYPE};
    let (mut kind, mut ordinal) = (0u32, 0i32);
    // SAFETY: each attribute writes four bytes; an address that the driver does not know is an error.
    let known = unsafe {
        let p = &raw mut kind;
        let q = &raw mut ordinal;
        sys::cuPointerGetAttribute(p.cast(), CU_POINTER_ATTRIBUTE_MEMORY_TYPE, array.address())
            == sys::CUresult::CUDA_SUCCESS
            && sys::cuPointerGetAttribute(q.cast(), CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, array.address())
                == sys::CUresult::CUDA_SUCCESS
    };
    let device_memory = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32;
    match known {
        false => Err(wrong("in memory that the CUDA driver does not know".to_owned())),
        true if kind != device_memory => Err(wrong("in host memory".to_owned())),
        true if ordinal != context.index as i32 => Err(wrong(format!("on CUDA device {ordinal}"))),
        true => Ok(()),
    }
}

/// Tasks of a kernel that the device holds at once.
fn resident_tasks(context: &Context, function: sys::CUfunction, gpu: &GpuLaunch, sms: u32) -> Result<u64, CudaError> {
    let mut n = 0;
    let (threads, shared) = (gpu.threads as i32, gpu.shared_bytes as usize);
    let cluster = gpu.cluster.iter().product::<u64>();
    if cluster > 1 {
        let mut attributes = attributes(gpu, false);
        let config =
            config(cluster as u32, gpu.threads, gpu.shared_bytes as u32, std::ptr::null_mut(), &mut attributes);
        // SAFETY: the function is loaded and the configuration lives during the call.
        let result = unsafe { sys::cuOccupancyMaxActiveClusters(&mut n, function, &config) };
        context.check(result, || "counting resident clusters".to_owned())?;
        return Ok(n.max(0) as u64 * cluster);
    }
    // SAFETY: the function is loaded.
    let result = unsafe { sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut n, function, threads, shared) };
    context.check(result, || "counting resident tasks".to_owned())?;
    Ok(n.max(0) as u64 * u64::from(sms))
}

/// The launch attributes of a kernel; `follows`: another kernel of the plan comes before it.
fn attributes(gpu: &GpuLaunch, follows: bool) -> Vec<sys::CUlaunchAttribute> {
    use sys::CUlaunchAttributeID::*;
    let mut list = Vec::new();
    let mut push = |id, set: &dyn Fn(&mut sys::CUlaunchAttributeValue)| {
        // SAFETY: plain numbers; zero is a value of each.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = id;
        set(&mut attribute.value);
        list.push(attribute);
    };
    let cluster = gpu.cluster.iter().product::<u64>();
    if cluster > 1 {
        push(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, &|v| {
            v.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: cluster as u32, y: 1, z: 1 };
        });
    }
    if gpu.cooperative {
        push(CU_LAUNCH_ATTRIBUTE_COOPERATIVE, &|v| v.cooperative = 1);
    }
    if gpu.dependent && follows {
        push(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, &|v| v.programmaticStreamSerializationAllowed = 1);
    }
    list
}

/// A launch's configuration; `attributes` must outlive its use.
fn config(
    tasks: u32,
    threads: u32,
    shared_bytes: u32,
    stream: sys::CUstream,
    attributes: &mut [sys::CUlaunchAttribute],
) -> sys::CUlaunchConfig {
    sys::CUlaunchConfig {
        gridDimX: tasks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared_bytes,
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    }
}

/// The parameter block of a launch: maps of 128 bytes, then slots of 8, from a 64-byte aligned start.
fn parameters(
    program: &Program,
    launch: &Launch,
    maps: &[[u64; 16]],
    places: &[Option<Place>],
    extents: &[u64],
) -> Result<HostArray, Error> {
    let place = |b: BufferId| {
        places[b.index()].as_ref().ok_or_else(|| Error::Artifact {
            name: program.artifact.name.clone(),
            reason: format!("`{}` is not placed", program.artifact.buffers[b].name),
        })
    };
    let mut words: Vec<u64> = maps.iter().flatten().copied().collect();
    for slot in &launch.slots {
        words.push(match *slot {
            Slot::Base(b) => place(b)?.base as u64,
            Slot::Stride(b, d) => place(b)?.strides[d] as u64,
            Slot::Scalar(b) => place(b)?.scalar,
            Slot::Extent(r) => extents[r.index()],
        });
    }
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    Ok(HostArray::from_bytes(DType::U8, &[bytes.len() as u64], &bytes)?)
}

/// Where each parameter of a block is: maps of 128 bytes, then slots of 8.
fn pointers(block: &HostArray, maps: usize, slots: usize) -> Vec<*const u8> {
    let offsets = (0..maps).map(|i| 128 * i).chain((0..slots).map(|i| 128 * maps + 8 * i));
    offsets.map(|at| block.bytes()[at..].as_ptr()).collect()
}

/// One kernel, ready to be launched.
struct Step {
    function: sys::CUfunction,
    tasks: u32,
    threads: u32,
    shared_bytes: u32,
    attributes: Vec<sys::CUlaunchAttribute>,
    /// Keeps what `pointers` points into.
    _parameters: HostArray,
    /// Where each parameter is. The assembler, not the convention, decides their offsets: it aligns maps in the
    /// constant bank, so a packed buffer in one piece would be read askew.
    pointers: Vec<*const u8>,
}

impl std::fmt::Debug for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Step({} tasks of {} threads)", self.tasks, self.threads)
    }
}

/// A plan with its arrays in place. It may be launched any number of times, on one stream at a time, as its launches
/// share their workspace.
#[derive(Debug)]
pub struct Prepared {
    steps: Vec<Step>,
    keep: Vec<Kept>,
    names: Arc<[String]>,
    context: Arc<Context>,
}

// SAFETY: the function handles belong to a module that `keep` holds; the parameters and attributes are read only.
unsafe impl Send for Prepared {}
// SAFETY: as above.
unsafe impl Sync for Prepared {}

impl Prepared {
    /// Puts every kernel on the stream, in order, and returns at once.
    ///
    /// # Errors
    /// [`CudaError::Call`] where the driver refuses a launch; [`CudaError::Kernel`] and [`CudaError::Refused`] for a
    /// kernel that failed earlier.
    pub fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        self.context.enter()?;
        self.context.started(&self.names);
        for (index, step) in self.steps.iter().enumerate() {
            let config = sys::CUlaunchConfig {
                attrs: step.attributes.as_ptr().cast_mut(),
                numAttrs: step.attributes.len() as u32,
                ..config(step.tasks, step.threads, step.shared_bytes, stream.handle, &mut [])
            };
            // SAFETY: the loader's caller vouches for the code; its parameters are laid out as the convention says and
            // the arrays were checked; the driver reads the attributes and copies the parameters before it returns.
            let result = unsafe {
                sys::cuLaunchKernelEx(
                    &config,
                    step.function,
                    step.pointers.as_ptr().cast_mut().cast(),
                    std::ptr::null_mut(),
                )
            };
            self.context.check(result, || format!("launching kernel {index} of {:?}", self.names))?;
        }
        Ok(())
    }

    /// Captures the launches as one graph, which keeps the arrays and the workspace. Nothing is run.
    ///
    /// # Errors
    /// [`CudaError::Call`], [`CudaError::Refused`].
    pub fn graph(&self) -> Result<Graph, CudaError> {
        let stream = Stream::new(&self.context)?;
        let mut graph = stream.capture(|| self.launch(&stream))?;
        (graph.names, graph.keep) = (Arc::clone(&self.names), self.keep.clone());
        Ok(graph)
    }

    /// The kernels that a launch puts on its stream, in order: of the variants of a kernel the one that fits, and none
    /// that has no tasks.
    pub fn symbols(&self) -> &[String] {
        &self.names
    }
}

#[cfg(test)]
mod tests {
    use super::super::engine::parameter_bytes;
    use super::*;
    use einfall_ir::arena::Arena;
    use einfall_ir::artifact::{Artifact, Code};
    use einfall_ir::cascade::{Rank, RankId, Size};
    use einfall_ir::diag::Span;
    use einfall_ir::tile::{Buffer, BufferKind};

    /// `y[M,N] = f(x[M,N], a)` over a grid of `ceil(M/64) × 2`, moving `x` by a tensor map.
    fn program(gpu: GpuLaunch) -> Program {
        let mut ranks: Arena<RankId, Rank> = Arena::new();
        let rank = |name: &str| Rank { name: name.into(), fixed: None, span: Span::default() };
        let (m, n) = (ranks.push(rank("M")), ranks.push(rank("N")));
        let mut buffers: Arena<BufferId, Buffer> = Arena::new();
        let mut buffer = |name: &str, dtype, dims, kind| {
            buffers.push(Buffer { name: name.into(), dtype, dims, kind, positive: false })
        };
        let dims = || vec![Size::Rank(m), Size::Rank(n)];
        let x = buffer("x", DType::BF16, dims(), BufferKind::Input);
        let a = buffer("a", DType::F32, vec![], BufferKind::Input);
        let y = buffer("y", DType::F32, dims(), BufferKind::Output);
        let tiles = Size::CeilDiv(Box::new(Size::Rank(m)), Box::new(Size::Const(64)));
        let launch = Launch {
            symbol: "f".into(),
            slots: vec![Slot::Base(y), Slot::Stride(y, 0), Slot::Scalar(a), Slot::Extent(m), Slot::Stride(x, 0)],
            grid: vec![tiles, Size::Const(2)],
            ordered: false,
            scratch_bytes: Size::Const(0),
            reads: vec![x, a],
            writes: vec![y],
            flops: Size::Const(0),
            bytes: Size::Const(0),
            gpu: Some(gpu),
        };
        let code = Code::Ptx { text: String::new(), arch: "sm_90a".into() };
        let (name, target) = ("f".into(), "gpu".into());
        Program::new(Artifact {
            name,
            target,
            ranks,
            buffers,
            code,
            launches: vec![launch],
            defaults: vec![],
            facts: vec![],
        })
    }

    fn gpu() -> GpuLaunch {
        let map = TensorMap { buffer: BufferId::new(0), dims: vec![1, 0], extents: vec![64, 64], swizzle_bytes: 128 };
        GpuLaunch {
            threads: 384,
            cluster: vec![],
            shared_bytes: 200_000,
            cooperative: false,
            dependent: false,
            counters: vec![],
            maps: vec![map],
            variant_of: None,
            assumes: vec![],
        }
    }

    #[test]
    fn parameters_are_maps_then_slots() {
        let p = program(gpu());
        let sizes = p.bind(&[("M", 100), ("N", 8)]).unwrap();
        let place = |base, strides: &[i64], scalar| Some(Place { base, strides: strides.to_vec(), scalar });
        let places = [place(0x1000, &[16, 1], 0), place(0, &[], 2.5f64.to_bits()), place(0x2000, &[8, 1], 0)];
        let launch = &p.artifact.launches[0];
        let block = parameters(&p, launch, &[[7; 16]], &places, &sizes.extents).unwrap();
        assert_eq!(block.bytes().len(), parameter_bytes(1, &launch.slots));
        assert_eq!(block.view().base() as usize % 64, 0);
        let words: Vec<u64> = block.bytes().chunks(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect();
        assert_eq!(words[..16], [7; 16]);
        let start = block.bytes().as_ptr() as usize;
        let at: Vec<usize> = pointers(&block, 1, launch.slots.len()).iter().map(|p| *p as usize - start).collect();
        assert_eq!(at, [0, 128, 136, 144, 152, 160]);
        assert_eq!(words[16..], [0x2000, 8, 2.5f64.to_bits(), 100, 16]);
        assert!(parameters(&p, launch, &[], &[None, None, None], &sizes.extents).is_err());
    }

    #[test]
    fn attributes_are_what_the_launch_asks_for() {
        use sys::CUlaunchAttributeID::*;
        let ids = |g: &GpuLaunch, follows| attributes(g, follows).iter().map(|a| a.id).collect::<Vec<_>>();
        assert!(ids(&gpu(), true).is_empty());
        let all = GpuLaunch { cluster: vec![2, 1], cooperative: true, dependent: true, ..gpu() };
        let (cluster, cooperative) = (CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
        let dependent = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        assert_eq!(ids(&all, true), [cluster, cooperative, dependent]);
        assert_eq!(ids(&all, false), [cluster, cooperative], "the first kernel has none to overlap");
        // SAFETY: the attribute was written as a cluster dimension.
        assert_eq!(unsafe { attributes(&all, true)[0].value.clusterDim.x }, 2);
    }

    #[test]
    fn sizes_beyond_the_device_are_refused_when_bound() {
        let check = |gpu: GpuLaunch, m: u64, n: u64| {
            let p = program(gpu);
            check_sizes(&p, &p.bind(&[("M", m), ("N", n)]).unwrap())
        };
        assert!(check(gpu(), (1 << 31) - 1, 1).is_ok());
        assert!(check(gpu(), 0, 5).is_ok(), "no tasks");
        let error = check(gpu(), 1 << 31, 1).unwrap_err();
        assert_eq!(error, CudaError::Extent { what: "rank `M`".into(), extent: 1 << 31 });
        let clusters = GpuLaunch { cluster: vec![2, 1], ..gpu() };
        assert!(check(clusters.clone(), 128, 1).is_ok());
        let error = check(clusters, 129, 1).unwrap_err();
        assert!(error.to_string().contains("a grid of 3 tasks is not divided by its clusters of 2"), "{error}");
    }

    #[test]
    fn the_first_variant_that_fits_is_launched() {
        let p = program(gpu());
        let (m, x) = (p.artifact.ranks.iter().next().unwrap().0, BufferId::new(0));
        let mut artifact = p.artifact;
        let base = artifact.launches[0].clone();
        let variant = |symbol: &str, assumes: Vec<Condition>| {
            let gpu = GpuLaunch { variant_of: Some("f".into()), assumes, ..gpu() };
            Launch { symbol: symbol.into(), gpu: Some(gpu), ..base.clone() }
        };
        artifact.launches = vec![
            base.clone(),
            variant("small", vec![Condition::AtMost(Size::Rank(m), 64), Condition::Aligned(x, 16)]),
            variant("even", vec![Condition::Multiple(Size::Rank(m), 2), Condition::Aligned(x, 4)]),
            variant("any", vec![]),
            base.clone(),
        ];
        let p = Program::new(artifact);
        let chosen = |p: &Program, m: u64, base: usize, stride: i64| {
            let sizes = p.bind(&[("M", m), ("N", 8)]).unwrap();
            let x = Place { base, strides: vec![stride, 1], scalar: 0 };
            choose(p, &sizes, &[Some(x), None, None])
        };
        assert_eq!(chosen(&p, 64, 0x1000, 8), Ok(vec![0, 1, 4]));
        assert_eq!(chosen(&p, 65, 0x1000, 8), Ok(vec![0, 3, 4]), "too large, and odd");
        assert_eq!(chosen(&p, 64, 0x1008, 8), Ok(vec![0, 2, 4]), "the base is not aligned");
        assert_eq!(chosen(&p, 64, 0x1000, 9), Ok(vec![0, 3, 4]), "the rows are not aligned");
        assert_eq!(chosen(&p, 1, 0x1000, 9), Ok(vec![0, 1, 4]), "there is one row");
        let mut last = p.artifact;
        last.launches.remove(3);
        let last = Program::new(last);
        let said = chosen(&last, 65, 0x1000, 8).unwrap_err().to_string();
        assert!(said.contains("none of its variants fits") && said.contains("M is a multiple of 2"), "{said}");
        assert!(said.contains("compile it with these sizes"), "{said}");
        let error = chosen(&last, 64, 0x1001, 8).unwrap_err().to_string();
        assert!(
            error.contains("`x` starts at a multiple of 4 bytes") && error.contains("give the array so"),
            "{error}"
        );
        let by_sizes = |m: u64, base: usize| {
            let x = Place { base, strides: vec![8, 1], scalar: 0 };
            let sizes = last.bind(&[("M", m), ("N", 8)]).unwrap();
            variants::choose(&last, &sizes, &[Some(x), None, None]).unwrap_err().sizes
        };
        assert!(by_sizes(65, 0x1000) && !by_sizes(64, 0x1001));
    }

    #[test]
    fn arrays_of_copy_engines_are_padded_where_strides_allow() {
        let p = program(gpu());
        assert!(wants_padding(&p, BufferId::new(0)));
        assert!(!wants_padding(&p, BufferId::new(2)), "no map moves it");
        let mut fixed = program(gpu()).artifact;
        fixed.launches[0].slots = vec![Slot::Base(BufferId::new(0)), Slot::Base(BufferId::new(2))];
        assert!(!wants_padding(&Program::new(fixed), BufferId::new(0)), "its kernel takes dense rows");
    }
}
