//! The LLVM-C functions this crate calls, resolved once from a shared library.
//!
//! Invariant: every signature is that of the LLVM-C headers and the same in LLVM 19 to 22; enums travel as C `int`.

use libloading::Library;
use std::ffi::{c_char, c_int, c_uint, c_void};

/// Opaque types of LLVM-C.
macro_rules! opaque {
    ($($name:ident)*) => { $(
        #[repr(C)]
        pub(crate) struct $name { _private: [u8; 0] }
    )* };
}
opaque! { Context Module MemoryBuffer Target TargetMachine TargetData PassBuilderOptions ErrorValue DiagnosticInfo
LlJit LlJitBuilder JitDylib ExecutionSession SymbolName MaterializationUnit }

/// `LLVMOrcCSymbolMapPair`: an interned name and where it is.
#[repr(C)]
pub(crate) struct SymbolPair {
    pub(crate) name: *mut SymbolName,
    pub(crate) address: u64,
    pub(crate) generic_flags: u8,
    pub(crate) target_flags: u8,
}

/// `LLVMJITSymbolGenericFlagsExported | LLVMJITSymbolGenericFlagsCallable`.
pub(crate) const EXPORTED_FUNCTION: u8 = 1 | 4;

pub(crate) type DiagnosticHandler = unsafe extern "C" fn(*mut DiagnosticInfo, *mut c_void);
pub(crate) type ErrorReporter = unsafe extern "C" fn(*mut c_void, *mut ErrorValue);

/// `LLVMReturnStatusAction`.
pub(crate) const RETURN_STATUS: c_int = 2;
/// `LLVMCodeGenLevelDefault`.
pub(crate) const CODEGEN_DEFAULT: c_int = 2;
/// `LLVMRelocPIC`.
pub(crate) const RELOC_PIC: c_int = 2;
/// `LLVMCodeModelDefault`.
pub(crate) const CODE_MODEL_DEFAULT: c_int = 0;
/// `LLVMAssemblyFile`.
pub(crate) const ASSEMBLY_FILE: c_int = 0;
/// `LLVMObjectFile`.
pub(crate) const OBJECT_FILE: c_int = 1;
/// `LLVMDSError`.
pub(crate) const SEVERITY_ERROR: c_int = 0;

/// Declares the table: one line a function, resolved by its own name.
macro_rules! table {
    ($(fn $name:ident($($arg:ty),*) $(-> $ret:ty)?;)*) => {
        /// The resolved functions. Their code is never unmapped.
        #[allow(non_snake_case)]
        pub(crate) struct Api { $(pub(crate) $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)* }

        impl Api {
            /// Resolves every function, or names the first that is missing.
            ///
            /// # Safety
            /// The library's functions of these names must have LLVM-C's signatures.
            pub(crate) unsafe fn resolve(library: &Library) -> Result<Api, &'static str> {
                Ok(Api { $($name: {
                    let name = concat!(stringify!($name), "\0").as_bytes();
                    // SAFETY: the type is the declared signature; the caller vouches for the library.
                    *unsafe { library.get(name) }.map_err(|_| stringify!($name))?
                },)* })
            }
        }
    };
}

table! {
    fn LLVMContextCreate() -> *mut Context;
    fn LLVMContextDispose(*mut Context);
    fn LLVMContextSetDiagnosticHandler(*mut Context, Option<DiagnosticHandler>, *mut c_void);
    fn LLVMGetDiagInfoDescription(*mut DiagnosticInfo) -> *mut c_char;
    fn LLVMGetDiagInfoSeverity(*mut DiagnosticInfo) -> c_int;
    fn LLVMDisposeMessage(*mut c_char);
    fn LLVMGetErrorMessage(*mut ErrorValue) -> *mut c_char;
    fn LLVMDisposeErrorMessage(*mut c_char);

    fn LLVMCreateMemoryBufferWithMemoryRangeCopy(*const c_char, usize, *const c_char) -> *mut MemoryBuffer;
    fn LLVMGetBufferStart(*mut MemoryBuffer) -> *const c_char;
    fn LLVMGetBufferSize(*mut MemoryBuffer) -> usize;
    fn LLVMDisposeMemoryBuffer(*mut MemoryBuffer);

    fn LLVMParseIRInContext(*mut Context, *mut MemoryBuffer, *mut *mut Module, *mut *mut c_char) -> c_int;
    fn LLVMVerifyModule(*mut Module, c_int, *mut *mut c_char) -> c_int;
    fn LLVMSetTarget(*mut Module, *const c_char);
    fn LLVMSetModuleDataLayout(*mut Module, *mut TargetData);
    fn LLVMPrintModuleToString(*mut Module) -> *mut c_char;
    fn LLVMDisposeModule(*mut Module);

    fn LLVMCreatePassBuilderOptions() -> *mut PassBuilderOptions;
    fn LLVMDisposePassBuilderOptions(*mut PassBuilderOptions);
    fn LLVMRunPasses(*mut Module, *const c_char, *mut TargetMachine, *mut PassBuilderOptions) -> *mut ErrorValue;

    fn LLVMGetDefaultTargetTriple() -> *mut c_char;
    fn LLVMGetHostCPUName() -> *mut c_char;
    fn LLVMGetHostCPUFeatures() -> *mut c_char;
    fn LLVMGetTargetFromTriple(*const c_char, *mut *mut Target, *mut *mut c_char) -> c_int;
    fn LLVMCreateTargetMachine(
        *mut Target, *const c_char, *const c_char, *const c_char, c_int, c_int, c_int
    ) -> *mut TargetMachine;
    fn LLVMDisposeTargetMachine(*mut TargetMachine);
    fn LLVMCreateTargetDataLayout(*mut TargetMachine) -> *mut TargetData;
    fn LLVMDisposeTargetData(*mut TargetData);
    fn LLVMTargetMachineEmitToMemoryBuffer(
        *mut TargetMachine, *mut Module, c_int, *mut *mut c_char, *mut *mut MemoryBuffer
    ) -> c_int;

    fn LLVMOrcCreateLLJIT(*mut *mut LlJit, *mut LlJitBuilder) -> *mut ErrorValue;
    fn LLVMOrcDisposeLLJIT(*mut LlJit) -> *mut ErrorValue;
    fn LLVMOrcLLJITGetMainJITDylib(*mut LlJit) -> *mut JitDylib;
    fn LLVMOrcLLJITGetExecutionSession(*mut LlJit) -> *mut ExecutionSession;
    fn LLVMOrcExecutionSessionSetErrorReporter(*mut ExecutionSession, Option<ErrorReporter>, *mut c_void);
    fn LLVMOrcLLJITMangleAndIntern(*mut LlJit, *const c_char) -> *mut SymbolName;
    fn LLVMOrcAbsoluteSymbols(*mut SymbolPair, usize) -> *mut MaterializationUnit;
    fn LLVMOrcJITDylibDefine(*mut JitDylib, *mut MaterializationUnit) -> *mut ErrorValue;
    fn LLVMOrcLLJITAddObjectFile(*mut LlJit, *mut JitDylib, *mut MemoryBuffer) -> *mut ErrorValue;
    fn LLVMOrcLLJITLookup(*mut LlJit, *mut u64, *const c_char) -> *mut ErrorValue;
}

/// The library's version, or `None` where it does not say (LLVM before 16, or no LLVM).
///
/// # Safety
/// A function `LLVMGetVersion` of the library must have LLVM-C's signature.
pub(crate) unsafe fn version(library: &Library) -> Option<(u32, u32, u32)> {
    type GetVersion = unsafe extern "C" fn(*mut c_uint, *mut c_uint, *mut c_uint);
    // SAFETY: the declared signature; the caller vouches for the library.
    let get = unsafe { library.get::<GetVersion>(b"LLVMGetVersion\0") }.ok()?;
    let (mut major, mut minor, mut patch) = (0, 0, 0);
    // SAFETY: three valid places to write.
    unsafe { get(&mut major, &mut minor, &mut patch) };
    Some((major, minor, patch))
}

/// Registers the CPU targets that the library was built with; returns whether there is any.
///
/// # Safety
/// As [`Api::resolve`]; not to run on two threads at once, as LLVM's registry is not synchronised.
pub(crate) unsafe fn initialize_targets(library: &Library) -> bool {
    let mut any = false;
    for arch in ["X86", "AArch64"] {
        let parts = ["TargetInfo", "Target", "TargetMC", "AsmPrinter", "AsmParser"];
        let functions: Option<Vec<unsafe extern "C" fn()>> = parts
            .iter()
            .map(|part| {
                let name = format!("LLVMInitialize{arch}{part}\0");
                // SAFETY: LLVM-C's initialisers take and return nothing.
                unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.ok().map(|f| *f)
            })
            .collect();
        for f in functions.iter().flatten() {
            // SAFETY: as above; repeated registration is permitted.
            unsafe { f() };
            any = true;
        }
    }
    any
}
