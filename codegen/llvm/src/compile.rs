//! From IR text to an object, assembly or optimised IR.
//!
//! Invariant: each call has its own LLVM context, so calls on different threads share nothing; every handle is freed
//! on every path; the output is a function of the text, the target options and LLVM's version alone.

use crate::api::{
    ASSEMBLY_FILE, Api, CODE_MODEL_DEFAULT, CODEGEN_DEFAULT, Context, DiagnosticInfo, MemoryBuffer, Module,
    OBJECT_FILE, RELOC_PIC, RETURN_STATUS, SEVERITY_ERROR, TargetMachine,
};
use crate::error::LlvmError;
use crate::load::Llvm;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;

/// The pass pipeline, one of a fixed list: LLVM's pipeline parser is not a place for free text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Passes {
    /// None: for IR that is ready, and to look at what was emitted.
    None,
    /// Scalar cleaning for kernels that are tiled and vectorised already: memory to registers, common
    /// subexpressions, loop-invariant code, dead code. It neither unrolls nor vectorises.
    #[default]
    Tidy,
    /// LLVM's own `default<O2>`, loop vectoriser included.
    O2,
}

impl Passes {
    /// The pipeline in LLVM's spelling; the same text in LLVM 19 to 22.
    pub fn pipeline(self) -> &'static str {
        match self {
            Passes::None => "",
            // Without `no-verify-fixpoint` LLVM ends the process where one iteration of the combiner is not enough.
            Passes::Tidy => {
                "function(sroa,early-cse<memssa>,instcombine<no-verify-fixpoint>,simplifycfg,loop-mssa(loop-simplifycfg,licm),gvn,dse,adce,simplifycfg)"
            }
            Passes::O2 => "default<O2>",
        }
    }
}

/// What to compile for. Everything that decides the output is in here, so it can be hashed into a cache key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TargetOptions {
    /// Target triple, e.g. `x86_64-unknown-linux-gnu`.
    pub triple: String,
    /// Processor in LLVM's words, e.g. `znver5`; LLVM takes one it does not know for `generic`.
    pub cpu: String,
    /// Features in LLVM's words, e.g. `+avx2,-avx512f`; may be empty.
    pub features: String,
    /// The pass pipeline.
    pub passes: Passes,
}

/// The processor this process runs on, in LLVM's words.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    /// Target triple.
    pub triple: String,
    /// Processor name.
    pub cpu: String,
    /// Every feature with its sign, comma-separated.
    pub features: String,
}

impl Host {
    /// Whether the processor has the feature, in LLVM's spelling (`avx512bf16`, `amx-tile`, `fma`).
    pub fn has(&self, feature: &str) -> bool {
        self.features.split(',').any(|f| f.strip_prefix('+') == Some(feature))
    }

    /// Takes away every feature whose name begins so.
    pub fn remove(&mut self, prefix: &str) {
        let kept = |f: &&str| !f.strip_prefix('+').is_some_and(|name| name.starts_with(prefix));
        self.features = self.features.split(',').filter(kept).collect::<Vec<_>>().join(",");
    }

    /// Options to compile for this processor.
    pub fn options(&self, passes: Passes) -> TargetOptions {
        TargetOptions { triple: self.triple.clone(), cpu: self.cpu.clone(), features: self.features.clone(), passes }
    }
}

/// A relocatable object file made by [`Llvm::compile`].
#[derive(Clone, PartialEq, Eq)]
pub struct Object(Vec<u8>);

impl Object {
    /// The file's bytes (ELF, Mach-O or COFF).
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The file's bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// Takes bytes for an object, as a cache does.
    ///
    /// # Safety
    /// They must be the bytes of an object that [`Llvm::compile`] made: linking it runs what it holds.
    pub unsafe fn from_bytes(bytes: Vec<u8>) -> Object {
        Object(bytes)
    }
}

impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Object({} bytes)", self.0.len())
    }
}

impl Llvm {
    /// The processor this process runs on.
    pub fn host(&self) -> Host {
        let api = &*self.api;
        // SAFETY: each returns a C string that is ours to free.
        unsafe {
            Host {
                triple: take_message(api, (api.LLVMGetDefaultTargetTriple)()),
                cpu: take_message(api, (api.LLVMGetHostCPUName)()),
                features: take_message(api, (api.LLVMGetHostCPUFeatures)()),
            }
        }
    }

    /// Compiles IR text to a relocatable object: parse, verify, run the pipeline, emit position-independent code.
    /// A target triple or data layout in the text is replaced by the option's.
    ///
    /// # Errors
    /// [`LlvmError::Parse`], [`LlvmError::Verify`], [`LlvmError::Passes`] and [`LlvmError::Emit`] with LLVM's message;
    /// [`LlvmError::Target`] for a triple that this LLVM cannot compile for.
    pub fn compile(&self, ir: &str, options: &TargetOptions) -> Result<Object, LlvmError> {
        Ok(Object(Unit::new(&self.api, ir, options)?.run(options.passes)?.emit(OBJECT_FILE)?))
    }

    /// As [`Llvm::compile`], to assembly text.
    pub fn assembly(&self, ir: &str, options: &TargetOptions) -> Result<String, LlvmError> {
        let bytes = Unit::new(&self.api, ir, options)?.run(options.passes)?.emit(ASSEMBLY_FILE)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The IR text after the pipeline, in this LLVM's spelling.
    pub fn optimize(&self, ir: &str, options: &TargetOptions) -> Result<String, LlvmError> {
        let unit = Unit::new(&self.api, ir, options)?.run(options.passes)?;
        // SAFETY: a live module; the string is ours to free.
        Ok(unsafe { take_message(unit.api, (unit.api.LLVMPrintModuleToString)(unit.module)) })
    }
}

/// One module in its own context, with the machine it is compiled for.
struct Unit<'a> {
    api: &'a Api,
    context: *mut Context,
    module: *mut Module,
    machine: *mut TargetMachine,
    /// Errors LLVM reported through the context; boxed, as the handler holds its address.
    diagnostics: Box<RefCell<Vec<String>>>,
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        // SAFETY: each handle is either null or ours and live; the module goes before its context.
        unsafe {
            if !self.module.is_null() {
                (self.api.LLVMDisposeModule)(self.module);
            }
            if !self.machine.is_null() {
                (self.api.LLVMDisposeTargetMachine)(self.machine);
            }
            (self.api.LLVMContextDispose)(self.context);
        }
    }
}

/// What the diagnostic handler is handed.
struct Sink<'a> {
    api: &'a Api,
    errors: &'a RefCell<Vec<String>>,
}

/// Keeps errors. Without a handler LLVM prints an error and ends the process.
unsafe extern "C" fn keep_diagnostic(info: *mut DiagnosticInfo, sink: *mut c_void) {
    // SAFETY: `sink` is the `Sink` registered for the duration of the call that reports.
    let sink = unsafe { &*sink.cast::<Sink>() };
    // SAFETY: LLVM hands a live diagnostic; the string is ours to free.
    unsafe {
        if (sink.api.LLVMGetDiagInfoSeverity)(info) == SEVERITY_ERROR {
            let text = take_message(sink.api, (sink.api.LLVMGetDiagInfoDescription)(info));
            sink.errors.borrow_mut().push(text);
        }
    }
}

impl<'a> Unit<'a> {
    /// Parses and verifies the text, and makes the target machine.
    fn new(api: &'a Api, ir: &str, options: &TargetOptions) -> Result<Unit<'a>, LlvmError> {
        let triple = c_string(&options.triple, "target triple")?;
        let cpu = c_string(&options.cpu, "processor name")?;
        let features = c_string(&options.features, "feature list")?;
        // SAFETY: LLVM-C calls on handles that `unit` owns; out-pointers are valid places.
        unsafe {
            let mut unit = Unit {
                api,
                context: (api.LLVMContextCreate)(),
                module: ptr::null_mut(),
                machine: ptr::null_mut(),
                diagnostics: Box::default(),
            };
            let mut target = ptr::null_mut();
            let mut message = ptr::null_mut();
            if (api.LLVMGetTargetFromTriple)(triple.as_ptr(), &mut target, &mut message) != 0 {
                let message = take_message(api, message);
                return Err(LlvmError::Target { triple: options.triple.clone(), message });
            }
            unit.machine = (api.LLVMCreateTargetMachine)(
                target,
                triple.as_ptr(),
                cpu.as_ptr(),
                features.as_ptr(),
                CODEGEN_DEFAULT,
                RELOC_PIC,
                CODE_MODEL_DEFAULT,
            );
            if unit.machine.is_null() {
                let message = "no target machine".into();
                return Err(LlvmError::Target { triple: options.triple.clone(), message });
            }
            // The parser takes the buffer over, whether it succeeds or not.
            let text =
                (api.LLVMCreateMemoryBufferWithMemoryRangeCopy)(ir.as_ptr().cast(), ir.len(), c"kernel".as_ptr());
            if (api.LLVMParseIRInContext)(unit.context, text, &mut unit.module, &mut message) != 0 {
                unit.module = ptr::null_mut();
                return Err(LlvmError::Parse { message: take_message(api, message) });
            }
            let layout = (api.LLVMCreateTargetDataLayout)(unit.machine);
            (api.LLVMSetModuleDataLayout)(unit.module, layout);
            (api.LLVMDisposeTargetData)(layout);
            (api.LLVMSetTarget)(unit.module, triple.as_ptr());
            let mut message = ptr::null_mut();
            let malformed = (api.LLVMVerifyModule)(unit.module, RETURN_STATUS, &mut message) != 0;
            let message = take_message(api, message);
            if malformed { Err(LlvmError::Verify { message }) } else { Ok(unit) }
        }
    }

    /// Calls `work` with LLVM's diagnostics kept; returns the errors it reported.
    fn with_diagnostics<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<String>) {
        let mut sink = Sink { api: self.api, errors: &self.diagnostics };
        // SAFETY: the handler is taken away again before `sink` goes.
        unsafe {
            let place: *mut Sink = &mut sink;
            (self.api.LLVMContextSetDiagnosticHandler)(self.context, Some(keep_diagnostic), place.cast());
            let result = work();
            (self.api.LLVMContextSetDiagnosticHandler)(self.context, None, ptr::null_mut());
            (result, self.diagnostics.take())
        }
    }

    /// Runs the pipeline.
    fn run(self, passes: Passes) -> Result<Unit<'a>, LlvmError> {
        if passes == Passes::None {
            return Ok(self);
        }
        let pipeline = c_string(passes.pipeline(), "pipeline")?;
        let (failed, reported) = self.with_diagnostics(|| {
            // SAFETY: live handles; the options are freed here, the error by `take_error`.
            unsafe {
                let options = (self.api.LLVMCreatePassBuilderOptions)();
                let error = (self.api.LLVMRunPasses)(self.module, pipeline.as_ptr(), self.machine, options);
                (self.api.LLVMDisposePassBuilderOptions)(options);
                take_error(self.api, error)
            }
        });
        match failed.or_else(|| reported.into_iter().next()) {
            Some(message) => Err(LlvmError::Passes { message }),
            None => Ok(self),
        }
    }

    /// Emits the module as an object or as assembly text.
    fn emit(self, kind: c_int) -> Result<Vec<u8>, LlvmError> {
        let mut message = ptr::null_mut();
        let mut buffer: *mut MemoryBuffer = ptr::null_mut();
        let (failed, reported) = self.with_diagnostics(|| {
            // SAFETY: live handles and valid out-pointers.
            unsafe {
                let emit = self.api.LLVMTargetMachineEmitToMemoryBuffer;
                emit(self.machine, self.module, kind, &mut message, &mut buffer) != 0
            }
        });
        // SAFETY: the message and the buffer are ours; the bytes are copied before the buffer goes.
        unsafe {
            if failed {
                return Err(LlvmError::Emit { message: take_message(self.api, message) });
            }
            let start = (self.api.LLVMGetBufferStart)(buffer).cast::<u8>();
            let bytes = std::slice::from_raw_parts(start, (self.api.LLVMGetBufferSize)(buffer)).to_vec();
            (self.api.LLVMDisposeMemoryBuffer)(buffer);
            if reported.is_empty() { Ok(bytes) } else { Err(LlvmError::Emit { message: reported.join("\n") }) }
        }
    }
}

/// `text` as a C string, or an error that names it.
pub(crate) fn c_string(text: &str, what: &'static str) -> Result<CString, LlvmError> {
    CString::new(text).map_err(|_| LlvmError::Nul { what })
}

/// Copies and frees a message that LLVM allocated; null is the empty text.
///
/// # Safety
/// Null, or a C string to be freed by `LLVMDisposeMessage`.
unsafe fn take_message(api: &Api, message: *mut c_char) -> String {
    if message.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().trim_end().to_string();
        (api.LLVMDisposeMessage)(message);
        text
    }
}

/// Consumes an LLVM error: its message, or `None` for success.
///
/// # Safety
/// Null, or an error that nothing else consumes.
pub(crate) unsafe fn take_error(api: &Api, error: *mut crate::api::ErrorValue) -> Option<String> {
    if error.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    unsafe {
        let message = (api.LLVMGetErrorMessage)(error);
        let text = CStr::from_ptr(message).to_string_lossy().trim_end().to_string();
        (api.LLVMDisposeErrorMessage)(message);
        Some(text)
    }
}
