//! Owned handles of the driver: context, module, memory, stream, event, graph.
//!
//! Invariants: a handle is destroyed once, after everything made from it; every call is made with its context current
//! on the calling thread; a driver call that fails is an error with the driver's words, and one that the driver keeps
//! to for good marks the context as failed.

use super::error::CudaError;
use cudarc::driver::sys::{self, CUresult};
use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock};

/// The oldest driver whose calls suffice: tensor maps and launch attributes. 1000 × major + 10 × minor.
const OLDEST_DRIVER: u32 = 12000;

/// Finds and initialises the driver once; the CUDA version it supports, as 1000 × major + 10 × minor.
pub(super) fn version() -> Result<u32, CudaError> {
    static VERSION: OnceLock<Result<u32, CudaError>> = OnceLock::new();
    VERSION
        .get_or_init(|| {
            // SAFETY: loads a library of this name; the system's loader decides which.
            if !unsafe { sys::is_culib_present() } {
                return Err(CudaError::NoDriver);
            }
            let mut found = 0;
            // SAFETY: the library is there; both calls are in every driver.
            unsafe {
                call(sys::cuDriverGetVersion(&mut found), || "asking the driver's version".into())?;
                let found = suffices(found as u32)?;
                call(sys::cuInit(0), || "initialising the CUDA driver".into())?;
                Ok(found)
            }
        })
        .clone()
}

/// An error for a driver that lacks calls made here.
fn suffices(found: u32) -> Result<u32, CudaError> {
    if found < OLDEST_DRIVER { Err(CudaError::OldDriver { found, needed: OLDEST_DRIVER }) } else { Ok(found) }
}

/// An error unless the call succeeded.
pub(super) fn call(result: CUresult, what: impl FnOnce() -> String) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (name, text) = words(result);
    Err(CudaError::Call { what: what(), code: result as u32, name, text })
}

/// The driver's name and words for a code.
fn words(result: CUresult) -> (String, String) {
    let (mut name, mut text) = (ptr::null(), ptr::null());
    // SAFETY: the library is there, as it gave the code; the strings are static.
    unsafe {
        let _ = sys::cuGetErrorName(result, &mut name);
        let _ = sys::cuGetErrorString(result, &mut text);
        let read = |s: *const std::ffi::c_char| match s.is_null() {
            true => format!("error {}", result as u32),
            false => CStr::from_ptr(s).to_string_lossy().into_owned(),
        };
        (read(name), read(text))
    }
}

/// Whether the driver answers every later call in this process with this error. Source: CUDA driver API, the
/// descriptions that end "the context cannot be used" or "the process must be terminated and relaunched".
fn is_sticky(result: CUresult) -> bool {
    use CUresult::*;
    matches!(
        result,
        CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_UNKNOWN
    )
}

/// Kernels named in an error at most.
const MAX_SUSPECTS: usize = 8;

/// The primary context of a device.
#[derive(Debug)]
pub(super) struct Context {
    handle: sys::CUcontext,
    device: sys::CUdevice,
    /// The device's number.
    pub(super) index: usize,
    /// Lists of kernels launched and not known to have ended, without repeats of the last.
    running: Mutex<Vec<Arc<[String]>>>,
    /// The first failure that the driver keeps to.
    failed: OnceLock<(Vec<String>, String)>,
}

// SAFETY: the driver's handles may be used from every thread that makes the context current, which `enter` does.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens a device that is known to be there.
    pub(super) fn new(index: usize) -> Result<Context, CudaError> {
        let what = || format!("opening CUDA device {index}");
        let (mut device, mut handle) = (0, ptr::null_mut());
        // SAFETY: the driver is initialised, as there is a device.
        unsafe {
            call(sys::cuDeviceGet(&mut device, index as i32), what)?;
            call(sys::cuDevicePrimaryCtxRetain(&mut handle, device), what)?;
        }
        Ok(Context { handle, device, index, running: Mutex::default(), failed: OnceLock::new() })
    }

    /// Makes the context current on this thread; refuses one that failed.
    pub(super) fn enter(&self) -> Result<(), CudaError> {
        if let Some((names, error)) = self.failed.get() {
            return Err(CudaError::Refused { names: names.clone(), error: error.clone() });
        }
        self.make_current()
    }

    fn make_current(&self) -> Result<(), CudaError> {
        // SAFETY: the context lives as long as `self`.
        call(unsafe { sys::cuCtxSetCurrent(self.handle) }, || format!("entering CUDA device {}", self.index))
    }

    /// An error unless the call succeeded; a failure for good is kept, with the kernels that may have caused it.
    pub(super) fn check(&self, result: CUresult, what: impl FnOnce() -> String) -> Result<(), CudaError> {
        if !is_sticky(result) {
            return call(result, what);
        }
        let (name, text) = words(result);
        let error = format!("{name} ({text})");
        let running = self.running.lock().unwrap_or_else(|e| e.into_inner());
        let mut names: Vec<String> = Vec::new();
        for name in running.iter().rev().flat_map(|list| list.iter().rev()) {
            if !names.contains(name) && names.len() < MAX_SUSPECTS {
                names.push(name.clone());
            }
        }
        match self.failed.set((names.clone(), error.clone())) {
            Ok(()) => Err(CudaError::Kernel { names, error }),
            Err((names, error)) => Err(CudaError::Refused { names, error }),
        }
    }

    /// Notes kernels as running.
    pub(super) fn started(&self, names: &Arc<[String]>) {
        let mut running = self.running.lock().unwrap_or_else(|e| e.into_inner());
        if running.last().is_none_or(|last| !Arc::ptr_eq(last, names)) {
            if running.len() >= 2 * MAX_SUSPECTS {
                running.remove(0);
            }
            running.push(Arc::clone(names));
        }
    }

    /// Waits for everything on the device.
    pub(super) fn synchronize(&self) -> Result<(), CudaError> {
        self.enter()?;
        // SAFETY: the context is current.
        self.check(unsafe { sys::cuCtxSynchronize() }, || "waiting for the device".into())?;
        self.running.lock().unwrap_or_else(|e| e.into_inner()).clear();
        Ok(())
    }

    /// Free and all bytes of the device's memory.
    pub(super) fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current.
        self.check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, || "asking for free memory".into())?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `new`; everything made in the context holds it and is gone.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Loaded code.
#[derive(Debug)]
pub(super) struct Module {
    handle: sys::CUmodule,
    context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Module {}
// SAFETY: as for `Context`.
unsafe impl Sync for Module {}

impl Module {
    /// Loads assembled code.
    ///
    /// # Safety
    /// The image was made by the driver's assembler (or one of NVIDIA's) and is whole.
    pub(super) unsafe fn load(context: &Arc<Context>, image: &[u8]) -> Result<Module, CudaError> {
        context.enter()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the caller's promise; the driver copies the image.
        let result =
            unsafe { sys::cuModuleLoadDataEx(&mut handle, image.as_ptr().cast(), 0, ptr::null_mut(), ptr::null_mut()) };
        context.check(result, || "loading a module".into())?;
        Ok(Module { handle, context: Arc::clone(context) })
    }

    /// Has the driver assemble and load a text in one step, with options as numbers or addresses.
    ///
    /// # Safety
    /// The text ends with a zero byte, and what the option values point to outlives the call.
    pub(super) unsafe fn load_text(
        context: &Arc<Context>,
        source: &[u8],
        options: &mut [sys::CUjit_option],
        values: &mut [*mut c_void],
    ) -> (sys::CUresult, Option<Module>) {
        let mut handle = ptr::null_mut();
        let n = options.len() as u32;
        // SAFETY: the caller's promise; the driver's assembler checks the text and copies it.
        let result = unsafe {
            sys::cuModuleLoadDataEx(&mut handle, source.as_ptr().cast(), n, options.as_mut_ptr(), values.as_mut_ptr())
        };
        let loaded = result == sys::CUresult::CUDA_SUCCESS;
        (result, loaded.then(|| Module { handle, context: Arc::clone(context) }))
    }

    /// The kernel of this name. It lives as long as the module.
    pub(super) fn function(&self, symbol: &str) -> Result<Function, CudaError> {
        self.context.enter()?;
        let name = CString::new(symbol).unwrap_or_default();
        let mut handle = ptr::null_mut();
        // SAFETY: the module is loaded and the name ends with a zero byte.
        let result = unsafe { sys::cuModuleGetFunction(&mut handle, self.handle, name.as_ptr()) };
        self.context.check(result, || format!("finding kernel `{symbol}`"))?;
        Ok(Function(handle))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: loaded once; those who launch its kernels hold it and are gone, and what they launched has ended.
            unsafe {
                let _ = sys::cuCtxSynchronize();
                let _ = sys::cuModuleUnload(self.handle);
            }
        }
    }
}

/// A kernel of a module that outlives it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function(pub(super) sys::CUfunction);

// SAFETY: as for `Context`.
unsafe impl Send for Function {}
// SAFETY: as for `Context`.
unsafe impl Sync for Function {}

/// Device memory.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) address: u64,
    pub(super) bytes: u64,
    owned: bool,
    pub(super) context: Arc<Context>,
}

impl Memory {
    /// Allocates; the content is unspecified. No bytes take no memory.
    pub(super) fn alloc(context: &Arc<Context>, bytes: u64, what: &str) -> Result<Memory, CudaError> {
        context.enter()?;
        let mut address = 0;
        if bytes > 0 {
            // SAFETY: the context is current.
            match unsafe { sys::cuMemAlloc_v2(&mut address, bytes as usize) } {
                CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    let (free, total) = context.memory()?;
                    return Err(CudaError::Memory { what: what.to_owned(), bytes, free, total });
                }
                result => context.check(result, || format!("allocating {bytes} bytes for {what}"))?,
            }
        }
        Ok(Memory { address, bytes, owned: bytes > 0, context: Arc::clone(context) })
    }

    /// Memory of someone else, which is not freed here.
    pub(super) fn foreign(context: &Arc<Context>, address: u64, bytes: u64) -> Memory {
        Memory { address, bytes, owned: false, context: Arc::clone(context) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.owned && self.context.make_current().is_ok() {
            // SAFETY: allocated once by `alloc`; nothing that still runs uses it after the wait.
            unsafe {
                let _ = sys::cuCtxSynchronize();
                let _ = sys::cuMemFree_v2(self.address);
            }
        }
    }
}

/// A queue of launches and copies, run in order.
#[derive(Debug)]
pub struct Stream {
    pub(super) handle: sys::CUstream,
    pub(super) context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Stream {}
// SAFETY: as for `Context`.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Stream, CudaError> {
        context.enter()?;
        let mut handle = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current.
        context.check(unsafe { sys::cuStreamCreate(&mut handle, flags) }, || "making a stream".into())?;
        Ok(Stream { handle, context: Arc::clone(context) })
    }

    /// Waits until everything on the stream has ended.
    ///
    /// # Errors
    /// [`CudaError::Kernel`] for a kernel that failed, [`CudaError::Refused`] after one.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.context.enter()?;
        // SAFETY: the stream lives as long as `self`.
        self.context.check(unsafe { sys::cuStreamSynchronize(self.handle) }, || "waiting for a stream".into())
    }

    /// Fills device memory with a byte.
    pub(super) fn fill(&self, memory: &Memory, byte: u8) -> Result<(), CudaError> {
        self.context.enter()?;
        if memory.bytes == 0 {
            return Ok(());
        }
        // SAFETY: the memory is of this length.
        let result = unsafe { sys::cuMemsetD8Async(memory.address, byte, memory.bytes as usize, self.handle) };
        self.context.check(result, || "filling device memory".into())
    }

    /// Copies rows between host and device: `rows` of `row_bytes` each, dense on the host, `pitch_bytes` apart on the
    /// device. Returns when the copy has ended.
    pub(super) fn copy_rows(&self, copy: &Rows, direction: Direction) -> Result<(), CudaError> {
        self.context.enter()?;
        if copy.rows == 0 || copy.row_bytes == 0 {
            return Ok(());
        }
        use sys::CUmemorytype::{CU_MEMORYTYPE_DEVICE as DEVICE, CU_MEMORYTYPE_HOST as HOST};
        let mut c = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: HOST,
            srcHost: ptr::null(),
            srcDevice: 0,
            srcArray: ptr::null_mut(),
            srcPitch: 0,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: HOST,
            dstHost: ptr::null_mut(),
            dstDevice: 0,
            dstArray: ptr::null_mut(),
            dstPitch: 0,
            WidthInBytes: copy.row_bytes,
            Height: copy.rows,
        };
        match direction {
            Direction::ToDevice => {
                (c.srcMemoryType, c.srcHost, c.srcPitch) = (HOST, copy.host.cast_const(), copy.row_bytes);
                (c.dstMemoryType, c.dstDevice, c.dstPitch) = (DEVICE, copy.device, copy.pitch_bytes);
            }
            Direction::ToHost => {
                (c.dstMemoryType, c.dstHost, c.dstPitch) = (HOST, copy.host, copy.row_bytes);
                (c.srcMemoryType, c.srcDevice, c.srcPitch) = (DEVICE, copy.device, copy.pitch_bytes);
            }
        }
        // SAFETY: the caller's rows are inside both memories (see `DeviceArray`).
        let result = unsafe { sys::cuMemcpy2DAsync_v2(&c, self.handle) };
        self.context.check(result, || "copying an array".into())?;
        self.synchronize()
    }

    /// Notes the time on the device when everything before it on the stream has ended.
    ///
    /// # Errors
    /// [`CudaError::Call`], [`CudaError::Refused`].
    pub fn record(&self, event: &Event) -> Result<(), CudaError> {
        self.context.enter()?;
        // SAFETY: both live.
        self.context.check(unsafe { sys::cuEventRecord(event.handle, self.handle) }, || "recording an event".into())
    }

    /// Captures what `body` puts on this stream instead of running it.
    pub(super) fn capture(&self, body: impl FnOnce() -> Result<(), CudaError>) -> Result<Graph, CudaError> {
        self.context.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        let begun = unsafe { sys::cuStreamBeginCapture_v2(self.handle, mode) };
        self.context.check(begun, || "beginning a capture".into())?;
        let done = body();
        let mut graph = ptr::null_mut();
        // SAFETY: the capture was begun above; it ends also where the body failed.
        let ended = unsafe { sys::cuStreamEndCapture(self.handle, &mut graph) };
        let mut handle = ptr::null_mut();
        let made = done.and_then(|()| {
            self.context.check(ended, || "ending a capture".into())?;
            // SAFETY: the graph was captured.
            let result = unsafe { sys::cuGraphInstantiateWithFlags(&mut handle, graph, 0) };
            self.context.check(result, || "making a graph".into())
        });
        if !graph.is_null() {
            // SAFETY: captured above; the instance does not need it.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
        made?;
        Ok(Graph { handle, context: Arc::clone(&self.context), names: Arc::new([]), keep: Vec::new() })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made once; the driver waits for what is on it.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.handle) };
        }
    }
}

/// Rows of an array on both sides of a copy.
pub(super) struct Rows {
    pub(super) host: *mut c_void,
    pub(super) device: u64,
    pub(super) rows: usize,
    pub(super) row_bytes: usize,
    pub(super) pitch_bytes: usize,
}

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    ToDevice,
    ToHost,
}

/// A point in time on the device.
#[derive(Debug)]
pub struct Event {
    handle: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Event {}
// SAFETY: as for `Context`.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(context: &Arc<Context>) -> Result<Event, CudaError> {
        context.enter()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the context is current.
        context.check(unsafe { sys::cuEventCreate(&mut handle, 0) }, || "making an event".into())?;
        Ok(Event { handle, context: Arc::clone(context) })
    }

    /// Milliseconds from `earlier` to this event; both were recorded and have passed.
    ///
    /// # Errors
    /// [`CudaError::Call`] where one was not, [`CudaError::Kernel`].
    pub fn milliseconds_since(&self, earlier: &Event) -> Result<f64, CudaError> {
        self.context.enter()?;
        let mut ms = 0f32;
        // SAFETY: both live.
        let result = unsafe { sys::cuEventElapsedTime(&mut ms, earlier.handle, self.handle) };
        self.context.check(result, || "reading a time".into())?;
        Ok(f64::from(ms))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made once.
            let _ = unsafe { sys::cuEventDestroy_v2(self.handle) };
        }
    }
}

/// A captured plan: all its launches in one.
#[derive(Debug)]
pub struct Graph {
    handle: sys::CUgraphExec,
    context: Arc<Context>,
    pub(super) names: Arc<[String]>,
    /// What the captured launches use.
    pub(super) keep: Vec<Kept>,
}

/// What must outlive a graph.
#[derive(Clone, Debug)]
pub(super) enum Kept {
    /// Arrays and workspace.
    Memory(#[allow(dead_code)] Arc<Memory>),
    /// The code.
    Module(#[allow(dead_code)] Arc<Module>),
}

// SAFETY: as for `Context`; a launch of one graph at a time is the driver's own rule, kept by its stream order.
unsafe impl Send for Graph {}
// SAFETY: as for `Context`.
unsafe impl Sync for Graph {}

impl Graph {
    /// Runs every captured launch on `stream`.
    ///
    /// # Errors
    /// [`CudaError::Call`], [`CudaError::Kernel`], [`CudaError::Refused`].
    pub fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        self.context.enter()?;
        self.context.started(&self.names);
        // SAFETY: the instance lives, with what it uses; the stream is of the same context.
        self.context.check(unsafe { sys::cuGraphLaunch(self.handle, stream.handle) }, || "launching a graph".into())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made once.
            let _ = unsafe { sys::cuGraphExecDestroy(self.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_that_lack_calls_are_refused() {
        assert!(matches!(suffices(12000), Ok(12000)));
        let old = suffices(11080).unwrap_err().to_string();
        assert_eq!(old, "the CUDA driver is too old: it supports CUDA 11.8, and 12.0 is needed; update the driver");
    }
}
